"""The second level: an ordinary torch module, resumed to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import rnnq
from rnnq import checkpoint, families, train
from rnnq.checkpoint import Owner
from rnnq.families.base import Parent
from rnnq.families.single import Single
from rnnq.train import Every, Outcome, Point


class NetConfig(rnnq.Config):
    metrics: ClassVar[tuple[rnnq.Metric, ...]] = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric: ClassVar[str | None] = "val_loss"
    steps: int = 40
    log_every: int = 5
    eval_every: int = 10
    lr: float = 1e-2


class Net(nn.Module):
    """With everything that is easily lost: dropout, a running mean, tied weights, a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(self.drop(self.norm(self.first(x))) * self.frozen)
        return hidden


class NetFamily(rnnq.Family):
    Config = NetConfig
    name = "net"

    def build(self, config: NetConfig) -> nn.Module:
        return Net()

    def batch(self, config: NetConfig, step: int) -> Any:  # type: ignore[override]
        generator = torch.Generator().manual_seed(1000 * config.seed + step)
        x = torch.randn(8, 6, generator=generator)
        return {"x": x, "y": x.roll(1, 1)}

    def loss(self, module: nn.Module, data: Any) -> torch.Tensor:  # type: ignore[override]
        return nn.functional.mse_loss(module(data["x"]), data["y"])

    def evaluate(self, module: nn.Module, config: NetConfig, split: str) -> dict[str, float]:  # type: ignore[override]
        assert not module.training
        x = torch.ones(4, 6)
        return {f"{split}_loss": float(nn.functional.mse_loss(module(x), x))}


class StopAt:
    """A desk that wishes the loop to stop at a step."""

    def __init__(self, step: int | None = None) -> None:
        self.step, self.at = step, 0
        self.points: list[Point] = []

    def record(self, step: int, points: Sequence[Point]) -> None:
        self.points += points

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        self.points += points

    def leave_behind(self, points: Sequence[Point]) -> None:
        self.points += points

    def wish(self) -> bool:
        self.at += 1
        return self.at == self.step


def run(stop: int | None = None, resumed: Mapping[str, Any] | None = None) -> Outcome:
    torch.set_num_threads(1)
    family = families.as_family(NetFamily)
    return train.train(family, NetConfig(seed=3), StopAt(stop), torch.device("cpu"), 40, Every(), resumed)


def test_a_family_with_build_is_driven_as_a_pack_of_one() -> None:
    assert isinstance(families.as_family(NetFamily), Single)
    outcome = run()
    assert outcome.finished
    assert outcome.state is not None
    losses = [value for name, _, value in outcome.state["curve"] if name == "loss"]
    assert losses[-1] < losses[0]
    assert {"loss", "val_loss", "test_loss"} <= set(outcome.summary)
    assert outcome.best is not None


def test_stopped_and_resumed_through_a_file_equals_not_stopped(tmp_path: Path) -> None:
    whole = run()
    for k in (1, 7, 10, 23, 39):
        stopped = run(stop=k)
        assert not stopped.finished
        assert stopped.state is not None
        owner = Owner("study", "s", 1, "f")
        path = checkpoint.relative_path(owner, 1, k)
        saved = checkpoint.publish(tmp_path, path, checkpoint.write_aside(tmp_path, path, owner, stopped.state), k)
        again = run(resumed=checkpoint.load(tmp_path, saved, owner))
        assert same(whole.state, again.state), k
        assert same(whole.best, again.best), k


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_a_module_starts_from_the_tensors_of_another_run_with_buffers_and_frozen_ones() -> None:
    family = families.as_family(NetFamily)
    donor = run()
    assert donor.state is not None
    held = donor.state["members"]
    parent = Parent(4, "net", {}, 40, held["params"], held["carried"])
    config = NetConfig(seed=5)
    state = family.begin(config, family.init([config]), parent)
    assert same(state.params, held["params"])
    assert same(state.carried, held["carried"])


class HeadFamily(NetFamily):
    """Takes over one layer."""

    name = "head"

    def begin(self, module: Any, config: Any, parent: Parent) -> None:  # type: ignore[override]
        module.first.bias.copy_(parent.params["first.bias"])
        module.frozen.copy_(2 * parent.carried["frozen"])


def test_a_family_with_build_may_say_itself_what_it_takes_over() -> None:
    family = families.as_family(HeadFamily)
    donor = run()
    assert donor.state is not None
    held = donor.state["members"]
    config = NetConfig(seed=5)
    drawn = family.init([config])
    state = family.begin(config, drawn, Parent(4, "net", {}, 40, held["params"], held["carried"]))
    assert torch.equal(state.params["first.bias"], held["params"]["first.bias"])
    assert torch.equal(state.params["first.weight"], drawn.params["first.weight"])
    assert state.carried["module.frozen"].tolist() == [[2.0] * 6]


def test_tied_weights_stay_one_and_frozen_ones_stay() -> None:
    outcome = run()
    assert outcome.state is not None
    params = outcome.state["members"]["params"]
    assert "second.weight" not in params
    assert "frozen" not in params


class Stateful(nn.Module):
    """With what is neither trained nor changed in place: a state that is assigned, a frozen slow copy, a mask."""

    h: torch.Tensor
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)
        self.slow = nn.Parameter(torch.zeros(6, 6), requires_grad=False)
        self.register_buffer("h", torch.zeros(8, 6))
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.tanh(self.map(x) + self.h @ torch.softmax(self.mask, -1) + x @ self.slow)
        self.h = out.detach()
        with torch.no_grad():
            self.slow.lerp_(self.map.weight, 0.1)
        return out


class StatefulFamily(NetFamily):
    name = "stateful"

    def build(self, config: NetConfig) -> nn.Module:
        return Stateful()

    def evaluate(self, module: nn.Module, config: NetConfig, split: str) -> dict[str, float]:  # type: ignore[override]
        return {}


def test_what_a_module_assigns_and_what_is_frozen_is_carried_on_and_resumed() -> None:
    family = families.as_family(StatefulFamily)

    def train_to_end(stop: int | None = None, resumed: Mapping[str, Any] | None = None) -> Outcome:
        return train.train(family, NetConfig(), StopAt(stop), torch.device("cpu"), 40, Every(), resumed)

    whole = train_to_end()
    assert whole.state is not None
    carried = whole.state["members"]["carried"]
    assert set(carried) == {"module.h", "module.mask", "module.slow"}
    assert carried["module.h"].abs().sum() > 0
    assert carried["module.slow"].abs().sum() > 0
    again = train_to_end(resumed=train_to_end(stop=17).state)
    assert same(whole.state, again.state)
