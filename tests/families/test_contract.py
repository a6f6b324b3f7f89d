"""The promises of a family, kept by every family that can be named, and by one of each level as a user writes it.

1. A config survives JSON and back unchanged. 2. The same config gives the same numbers twice. 3. Three steps are
finite, and the gradient reaches every parameter that is meant to learn. 4. Stopped at step k and resumed equals not
stopped, to the bit, through a real checkpoint file. 5. A pack equals its singles to the bit. 6. `pack_key` is equal
only for configs that stack. (4 for the second and third level, 5 and 6 for the third.)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnnq
from rnnq import checkpoint, families, optimizer
from rnnq.checkpoint import Owner, Saved
from rnnq.config import Config, field_types, parse, to_json
from rnnq.errors import InputError
from rnnq.families.base import Family, Generator, Parent, Spec, State
from rnnq.families.dynamics.config import FLAGS, DynamicsConfig
from rnnq.families.fsm.config import Config as AutomataConfig
from rnnq.families.fsm.probe import Probe
from rnnq.families.fsm.probe_config import ProbeConfig
from rnnq.families.groups.config import GroupsConfig
from rnnq.families.scaling.config import ScalingConfig
from rnnq.train import Every, Member, Outcome, Point, Training, together, train

torch.set_num_threads(1)

CPU = torch.device("cpu")
STEPS = 24
NEVER = Every(seconds=None, steps=10**9)


# -------------------------------------------------------------------------------------- one family of each level


class ToyConfig(rnnq.Config):
    metrics: ClassVar[tuple[rnnq.Metric, ...]] = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric: ClassVar[str | None] = "val_loss"

    steps: int = STEPS
    lr: float = 0.01
    log_every: int = 3
    eval_every: int = 5
    sizes: tuple[int, ...] = (4,)


@rnnq.family(ToyConfig)
def counted(config: ToyConfig) -> Iterator[dict[str, float]]:
    """The first level. It draws from every generator that there is."""
    for _ in range(config.steps):
        yield {"loss": random.random() + float(np.random.random()) + float(torch.rand(()))}


class Modular(rnnq.Family):
    """The second level: dropout draws from torch's global numbers."""

    Config = ToyConfig
    name = "modular"

    def build(self, config: ToyConfig) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))

    def batch(self, config: ToyConfig, step: int) -> Any:  # type: ignore[override]
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(97 * config.seed + step))

    def loss(self, module: nn.Module, data: Any) -> Tensor:  # type: ignore[override]
        return (module(data) - data).square().mean()

    def evaluate(self, module: nn.Module, config: ToyConfig, split: str) -> dict[str, float]:  # type: ignore[override]
        x = torch.ones(2, 4)
        return {f"{split}_loss": float((module(x) - x).square().mean())}


class Stacked(rnnq.Family):
    """The third level: a carried state, and noise from torch's, numpy's and Python's global numbers."""

    Config = ToyConfig
    name = "stacked"

    def init(self, configs: Sequence[ToyConfig]) -> State:
        drawn = [torch.randn(4, 4, generator=torch.Generator().manual_seed(config.seed)) for config in configs]
        zero = torch.zeros(len(configs), 8, 4)
        return State({"w": torch.stack(drawn), "b": torch.zeros(len(configs), 1, 4)}, {"h": zero})

    def batch(self, configs: Sequence[ToyConfig], steps: Sequence[int]) -> Tensor:
        seeds = [97 * config.seed + step for config, step in zip(configs, steps, strict=True)]
        return torch.stack([torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(torch.baddbmm(state.params["b"], data + state.carried["h"], state.params["w"]))
        noise = torch.randn_like(h) + float(np.random.standard_normal()) + random.gauss()
        return (h + 0.1 * noise - data).square().mean((1, 2)), {"h": h.detach()}

    def evaluate(self, state: State, configs: Sequence[ToyConfig], split: str) -> list[dict[str, float]]:
        return [{f"{split}_loss": float(w.square().mean())} for w in state.params["w"]]


# ------------------------------------------------------------------------------------------------ what is tested


@dataclass(frozen=True)
class Case:
    """A family and a small config of it. `silent` tells the parameters that are not meant to learn."""

    make: Callable[[], Family | Generator]
    config: Config
    silent: Callable[[str], bool] = lambda name: False
    places: Mapping[str, str] = field(default_factory=dict)  # where a nested config has what others have on top
    # sizes at which all rows are whole SIMD lanes
    whole: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 32, "state_size": 32})
    bound: frozenset[str] = frozenset({"n_layers", "state_size", "batch_size", "window"})  # what shapes depend on

    def changed(self, config: Any = None, **values: Any) -> Any:
        """The config with other values of what most families have: seed, steps, lr, batch_size, state_size, ..."""
        found = (config or self.config).model_dump(mode="json")
        for name, value in values.items():
            *folders, last = self.places.get(name, name).split(".")
            part = found
            for folder in folders:
                part = part[folder]
            part[last] = value
        return parse(type(self.config), found)

    def run(self, desk: Notebook, config: Config | None = None, resumed: Mapping[str, Any] | None = None) -> Outcome:
        config = config or self.config
        return train(self.make(), config, desk, CPU, config.steps_total(), desk.every, resumed)


class Notebook:
    """The owner of a run who writes everything down, and wishes it to stop after one step or another."""

    def __init__(self, every: Every = NEVER, stop_at: int | None = None, save: Any = None) -> None:
        self.points: list[Point] = []
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.every, self.stop_at, self.keep = every, stop_at, save
        self.steps = 0

    def record(self, step: int, points: Sequence[Point]) -> None:
        self.points += points
        self.steps = step

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        self.record(step, points)
        self.keep(step, state)

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        self.snapshots[step] = dict(state)

    def wish(self) -> bool:
        self.steps += 1
        return self.stop_at is not None and self.steps >= self.stop_at


def dynamics(code: str, **fields: Any) -> Case:
    """A small gated RNN: windows of 6 bytes, so that its states are zeroed before steps 0, 5, 10, 15 and 20."""
    flags = {flag: letter != "." for flag, letter in zip(FLAGS, code, strict=True)}
    small = {"state_size": 8, "batch_size": 4, "window": 6, "steps": STEPS, "log_every": 3, "eval_every": 4, "lr": 0.01}
    config = parse(
        DynamicsConfig, flags | small | {"corpus": argparse.__file__} | fields
    )  # 100 KB that stay as they are

    def silent(name: str) -> bool:
        """Spec 1.5: with the new state unread, what makes it learns nothing; and without residual and input gate no
        gradient passes the topmost layer's state."""
        if flags["use_new_state"]:
            return False
        layer, _, rest = name.partition(".")
        frozen = ("state.", "state_gate.", "forget_gate.", "input_gate.")
        if rest.startswith(frozen):
            return True
        top = str(fields.get("n_layers", 1) - 1)
        return not (flags["use_residual"] or flags["use_input_gate"]) and layer not in (top, "head")

    return Case(lambda: families.find("dynamics"), config, silent)


def fsm(model: str, **fields: Any) -> Case:
    """A small net on small machines: 10 batches make an epoch, the last of them smaller."""
    machines = {"states": 3, "actions": 2, "demos": 2, "demo_length": 4, "query_length": 3, "n_val": 9, "n_test": 8}
    small = {"d_model": 8, "d_ff": 12, "n_heads": 2, "batch_size": 4, "n_train": 38, "steps": STEPS, "lr": 0.01}
    looks = {"log_every": 3, "eval_every": 4, "open_samples": 5}
    config = parse(AutomataConfig, {"model": model} | machines | small | looks | fields)
    bound = frozenset({"n_layers", "d_model", "batch_size", "states", "demo_length"})
    return Case(lambda: families.find("fsm"), config, whole={"batch_size": 8, "d_model": 32}, bound=bound)


def groups(steps: int = STEPS, **fields: Any) -> Case:
    """A small net on a small group."""
    common = {"log_every": 3, "eval_every": 4, "learning_rate": 0.01, "save_param_interval": 5}
    config = parse(
        GroupsConfig,
        {
            "data": {"p": 8, "template_type": "onehot", "batch_size": 16} | fields.get("data", {}),
            "model": {"hidden_dim": 16, "init_scale": 0.5} | fields.get("model", {}),
            "training": common | {"num_steps": steps} | fields.get("training", {}),
        },
    )
    places = {"lr": "training.learning_rate", "batch_size": "data.batch_size", "state_size": "model.hidden_dim"}
    places |= {"steps": "training.num_steps", "eval_every": "training.eval_every"}
    if config.training.mode == "offline":  # type: ignore[attr-defined]
        places["steps"] = "training.epochs"
    return Case(lambda: families.find("groups"), config, places=places, bound=GROUPS_BOUND)


GROUPS_BOUND = frozenset({"data.p", "data.k", "data.batch_size", "model.hidden_dim"})
TINY = {"states": 2, "actions": 3, "demos": 2, "demo_length": 6, "query_length": 6, "n_train": 20, "n_val": 18,
        "n_test": 8, "d_model": 8, "n_layers": 2}  # fmt: skip


class Started(Probe):
    """Probes of another run's net, which every other run of theirs starts from, too."""

    def init(self, configs: Sequence[ProbeConfig]) -> State:
        net = parse(AutomataConfig, TINY | {"model": configs[0].model, "steps": 1, "seed": 99})
        parent = Parent(7, "fsm", net.model_dump(mode="json"), 1, families.find("fsm").init([net]).params, {})  # type: ignore[union-attr]
        return self.begin(configs[0], super().init(configs), parent)


def probe(**fields: Any) -> Case:
    """Small probes: an epoch is 5 steps."""
    small = {"batch_size": 4, "steps": STEPS, "log_every": 3, "eval_every": 4}
    return Case(Started, parse(ProbeConfig, TINY | small | fields))


def scaling(**fields: Any) -> Case:
    """A small language model of bytes, which reads its text several times."""
    text = {"data_path": argparse.__file__, "tokens": "bytes", "max_characters": 1000, "fixed_val_tokens": 200}
    size = {"hidden_size": 8, "batch_size": 4, "sequence_length": 6, "tbptt_length": 3}
    small = {"gradient_accumulation_steps": 2, "steps": STEPS, "num_epochs": 9, "learning_rate": 0.01, "log_every": 3}
    looks = {"csv_log_interval": 8, "lr_schedule": "constant"}  # a schedule ends with the steps, and cannot be extended
    config = parse(ScalingConfig, text | size | small | looks | fields)
    places = {"lr": "learning_rate", "state_size": "hidden_size", "n_layers": "num_layers"}
    return Case(lambda: families.find("scaling"), config, places=places | {"eval_every": "csv_log_interval"})


CASES = {
    "scaling adamw": scaling(),
    "scaling sgd, mup, tied": scaling(
        optimizer="sgd", use_mup=True, mup_base_width=4, tie_embeddings=True, layer_norm_position="both"
    ),
    "fsm_probe of weights": probe(seed=1),
    "fsm_probe of shuffled answers": probe(model="rnn", target="current_state", control="shuffled_labels"),
    "fsm_probe of a table": probe(target="table", layers="top", seed=3),
    "groups rnn": groups(),
    "groups rnn all outputs": groups(model={"return_all_outputs": True, "transform_type": "multiplicative"}),
    "groups hybrid": groups(training={"optimizer": "hybrid", "scaling_factor": -1.0}),
    "groups mlp": groups(model={"model_type": "SequentialMLP"}, data={"k": 2, "batch_size": 64}),
    "groups two layers": groups(
        data={"group_name": "dihedral", "group_n": 4, "k": 2, "mode": "exhaustive", "batch_size": 64},
        model={"model_type": "TwoLayerNet"},
        training={"mode": "offline", "epochs": STEPS, "num_steps": None, "optimizer": "per_neuron"},
    ),
    "groups epochs": groups(
        data={"mode": "sampled", "num_samples": 29, "batch_size": 8},  # four steps an epoch, the last one of 5 tuples
        training={"mode": "offline", "epochs": STEPS // 4, "num_steps": None},
    ),
    "dynamics ....N.R": dynamics("....N.R"),
    "dynamics IFOSNLR": dynamics("IFOSNLR", n_layers=2, seed=3),
    "dynamics .F.S.L.": dynamics(".F.S.L.", n_layers=3),
    "fsm lstm": fsm("lstm", seed=2, weight_decay=0.01),
    "fsm transformer": fsm("transformer", seed=4),
    "fsm rnn": fsm("rnn", seed=5, activation="relu"),
    "fsm rnn_seed": fsm("rnn_seed", n_layers=3, head="states"),
    "second level": Case(lambda: families.as_family(Modular), ToyConfig(seed=5)),
    "third level": Case(Stacked, ToyConfig(seed=6, sizes=(1, 2))),
}
GENERATORS = {"first level": Case(lambda: counted, ToyConfig(seed=4))}
PACKED = [name for name, case in CASES.items() if case.config.pack_key() is not None]


def test_every_built_in_family_is_among_the_cases() -> None:
    assert {name.split()[0] for name in CASES} >= set(families.BUILTIN)


def equal(found: Any, expected: Any) -> bool:
    """Equal to the bit, however deep."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(equal(found[name], value) for name, value in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return bool(found == expected)


@pytest.fixture(autouse=True)
def forgotten_numbers() -> None:
    """Nothing that a family draws may depend on what was drawn before its run."""
    forget_numbers()


def forget_numbers() -> None:
    random.seed()
    np.random.seed(None)
    torch.seed()


# ------------------------------------------------------------------------------------------------ the promises


@pytest.mark.parametrize("name", [*CASES, *GENERATORS])
def test_1_a_config_survives_json_and_back_unchanged(name: str) -> None:
    config = (CASES | GENERATORS)[name].config
    again = parse(type(config), json.loads(to_json(config)))

    assert again == config
    assert to_json(again) == to_json(config)
    assert all(type(getattr(again, field)) is type(getattr(config, field)) for field in type(config).model_fields)


@pytest.mark.parametrize("name", [*CASES, *GENERATORS])
def test_2_the_same_config_gives_the_same_numbers_twice_and_another_seed_gives_others(name: str) -> None:
    case = (CASES | GENERATORS)[name]
    desks = [Notebook(), Notebook(), Notebook()]
    configs = [case.config, case.config, case.changed(seed=77)]
    outcomes = [case.run(desk, config) for desk, config in zip(desks, configs, strict=True)]
    curves = [desk.points + outcome.points for desk, outcome in zip(desks, outcomes, strict=True)]

    assert curves[0]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]
    if name in CASES:
        assert equal(outcomes[0].state, outcomes[1].state)
        assert equal(outcomes[0].best, outcomes[1].best)


@pytest.mark.parametrize("name", CASES)
def test_3_three_steps_are_finite_and_whatever_is_meant_to_learn_has_moved(name: str) -> None:
    case = CASES[name]
    [member] = members = [Member(case.config, Notebook(), 3)]
    training = Training(case.make(), members, CPU)  # type: ignore[arg-type]
    before = {key: p.detach().clone() for key, p in training.params.items()}
    for _ in range(3):
        training.advance()

    assert np.isfinite(member.curve[-1][2])
    for key, p in training.params.items():
        assert bool(p.isfinite().all()), key
        moved = not torch.equal(p, before[key])
        assert moved != case.silent(key), f"{key} {'learns' if moved else 'does not learn'}"


# ---------------------------------------------------------------------------------------------------- 4. resume


class Disk:
    """Real checkpoint files of one run."""

    def __init__(self, root: Path) -> None:
        self.root, self.owner = root, Owner("study", "stage", 1, "f" * 64)
        self.attempt = 1
        self.saved: list[Saved] = []

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        path = checkpoint.relative_path(self.owner, self.attempt, step)
        aside = checkpoint.write_aside(self.root, path, self.owner, state)
        self.saved.append(checkpoint.publish(self.root, path, aside, step))

    def load(self, saved: Saved) -> dict[str, Any]:
        return checkpoint.load(self.root, saved, self.owner)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_4_killed_after_any_checkpoint_and_resumed_equals_not_stopped(name: str, disk: Disk) -> None:
    """A checkpoint after every step, also at the borders of windows, at logged and at evaluated steps."""
    case = CASES[name]
    desk = Notebook()
    whole = case.run(desk)
    curve = desk.points + whole.points
    watched = Notebook(every=Every(steps=1), save=disk.save)
    assert equal(case.run(watched).state, whole.state), "to save changes nothing"
    assert [saved.step for saved in disk.saved] == list(range(1, STEPS))

    for saved in disk.saved[:12] + disk.saved[-4:]:
        forget_numbers()
        resumed = disk.load(saved)
        later = Notebook()
        outcome = case.run(later, resumed=resumed)

        assert outcome.finished
        assert equal(outcome.state, whole.state), f"resumed at step {saved.step}"
        assert equal(outcome.best, whole.best)
        known = [tuple(point) for point in resumed["curve"]]
        assert known + later.points + outcome.points == curve


@pytest.mark.parametrize("name", CASES)
def test_4_stopped_by_a_wish_again_and_again_equals_not_stopped(name: str, disk: Disk) -> None:
    case = CASES[name]
    quiet = Notebook()
    whole = case.run(quiet)
    resumed: dict[str, Any] | None = None
    points: list[Point] = []
    kept: dict[int, dict[str, Any]] = {}
    for steps in itertools.cycle([1, 4, 5, 7]):
        start = resumed["step"] if resumed else 0
        desk = Notebook(stop_at=start + steps)
        desk.steps = start
        outcome = case.run(desk, resumed=resumed)
        points += desk.points + outcome.points
        assert not kept.keys() & desk.snapshots.keys(), "no snapshot is made twice"
        kept |= desk.snapshots
        assert outcome.state is not None
        if outcome.finished:
            break
        assert outcome.step == desk.stop_at
        disk.save(outcome.step, outcome.state)
        disk.attempt += 1
        resumed = disk.load(disk.saved[-1])

    assert [saved.step for saved in disk.saved] == [1, 5, 10, 17, 18, 22]
    assert equal(outcome.state, whole.state)
    assert equal(outcome.best, whole.best)
    assert whole.state is not None
    assert points == [tuple(point) for point in whole.state["curve"]]
    assert list(quiet.snapshots) == list(case.config.snapshot_steps())
    assert equal(kept, quiet.snapshots)


@pytest.mark.parametrize("name", CASES)
def test_4_a_finished_run_that_is_opened_again_is_finished(name: str, disk: Disk) -> None:
    """It measures nothing twice; and it can be extended to what a longer run would have been."""
    case = CASES[name]
    whole = case.run(Notebook())
    assert whole.state is not None
    disk.save(whole.step, whole.state)
    again = case.run(Notebook(), resumed=disk.load(disk.saved[0]))

    assert again.finished
    assert again.points == []
    assert equal(again.state, whole.state)

    config = case.changed(steps=case.config.steps_total() + 5)  # offline these are epochs
    longer = case.run(Notebook(), config)
    extended = case.run(Notebook(), config, resumed=disk.load(disk.saved[0]))
    assert longer.state is not None
    assert extended.state is not None
    assert equal(extended.state["members"], longer.state["members"])


# ------------------------------------------------------------------------------------------------- 5 and 6. packs


@pytest.mark.parametrize("name", PACKED)
def test_5_a_pack_of_four_equals_four_singles_to_the_bit(name: str) -> None:
    """At a shape of whole SIMD lanes; at odd shapes a certificate decides, not this test."""
    case = CASES[name]
    base = case.changed(**case.whole)
    configs = [case.changed(base, seed=seed, lr=lr) for seed, lr in enumerate((0.01, 0.001, 0.1, 0.003))]
    make = CASES[name].make
    packed = steps_of(make(), configs, 12)  # type: ignore[arg-type]
    for k, config in enumerate(configs):
        single = steps_of(make(), [config], 12)  # type: ignore[arg-type]
        assert equal({key: p[k] for key, p in packed.items()}, {key: p[0] for key, p in single.items()}), f"member {k}"


@pytest.mark.parametrize("name", PACKED)
def test_5_a_pack_of_eight_equals_eight_packs_of_one_after_200_steps(name: str) -> None:
    """Through the training loop: weights, optimiser, carried state, best, curve, random numbers."""
    case = CASES[name]
    base = case.changed(**case.whole, steps=200, eval_every=70)
    configs = [case.changed(base, seed=k, lr=0.001 * (1 + k // 2)) for k in range(8)]

    def trained(some: Sequence[Any]) -> list[Outcome]:
        members = [Member(config, Notebook(), 200) for config in some]  # type: ignore[arg-type]
        ended = dict(together(CASES[name].make(), members, CPU, NEVER))
        return [ended[member] for member in members]

    for config, found in zip(configs, trained(configs), strict=True):
        [alone] = trained([config])
        assert found.finished
        assert equal(found.state, alone.state)
        assert equal(found.best, alone.best)


def steps_of(family: Family, configs: Sequence[Any], steps: int) -> dict[str, Tensor]:
    """Parameters, states and losses of members that trained side by side."""
    drawn = family.init(configs)
    params = {name: p.requires_grad_() for name, p in drawn.params.items()}
    carried = drawn.carried
    specs: list[Spec] = [family.optimizer(config) for config in configs]
    updates = optimizer.of(params, specs)
    losses = []
    for step in range(steps):
        loss, carried = family.loss(State(params, carried), family.batch(configs, [step] * len(configs)))
        updates.update(torch.autograd.grad(loss.sum(), list(params.values()), allow_unused=True))
        losses.append(loss.detach())
    return {name: p.detach() for name, p in params.items()} | carried | {"losses": torch.stack(losses, 1)}


@pytest.mark.parametrize("name", PACKED)
def test_6_the_pack_key_is_equal_only_for_configs_that_stack(name: str) -> None:
    """Every field is changed, one at a time: where the key stays, the shapes stay, and a pack can be drawn."""
    case = CASES[name]
    family, base = case.make(), case.config
    assert isinstance(family, Family)
    same = []
    for name, changed in variants(case):
        if changed.pack_key() != base.pack_key():
            continue
        same.append(name)
        state = family.init([base, changed])
        assert all(p.shape[0] == 2 for p in [*state.params.values(), *state.carried.values()])
        losses, _ = family.loss(state, family.batch([base, changed], [0, 1]))
        assert losses.shape == (2,)
    assert set(same) >= {"seed", case.places.get("lr", "lr")}
    assert case.bound
    assert not case.bound & set(same)


def variants(case: Case) -> Iterator[tuple[str, Any]]:
    """The config with one field changed, for each number and flag of which another value is valid."""
    for name in field_types(type(case.config)):
        value = functools.reduce(lambda part, place: part[place], name.split("."), case.config.model_dump(mode="json"))
        if not isinstance(value, (bool, int, float)):
            continue
        other = (not value) if isinstance(value, bool) else value * 2 + 1
        with contextlib.suppress(InputError):
            yield name, case.changed(**{name: other})
