"""The training loop: what it hands over and when, when it measures, stops and refuses, and that it never waits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnnq
from rnnq import train
from rnnq.errors import Diverged, InputError, LeaseLost
from rnnq.families.base import Parent, State
from rnnq.families.dynamics.config import DynamicsConfig
from rnnq.families.dynamics.model import Dynamics
from rnnq.train import Every, Member, Outcome, Pace, Point, Training

torch.set_num_threads(1)

CPU = torch.device("cpu")
NEVER = Every(seconds=None, steps=10**9)


class Clock:
    """Time as the test wants it. Each look at it takes `tick` seconds."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Desk:
    """The owner of a run, who keeps what he is handed."""

    def __init__(self, stop_at: int | None = None, lost_at: int | None = None) -> None:
        self.recorded: list[tuple[int, list[Point]]] = []
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.stop_at, self.lost_at = stop_at, lost_at
        self.asked = 0
        self.kept: list[tuple[int, list[float]]] = []

    def record(self, step: int, points: Sequence[Point]) -> None:
        if self.lost_at is not None and step >= self.lost_at:
            raise LeaseLost("run 1 attempt 1 is no longer ours")
        self.recorded.append((step, list(points)))

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        self.recorded.append((step, list(points)))
        self.saved.append((step, dict(state)))

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        if self.lost_at is not None and step >= self.lost_at:
            raise LeaseLost("run 1 attempt 1 is no longer ours")
        self.kept.append((step, state["params"]["w"].flatten().tolist()))

    def leave_behind(self, points: Sequence[Point]) -> None:
        self.left = list(points)

    def wish(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_at

    def points(self, outcome: Outcome) -> list[Point]:
        return [point for _, points in self.recorded for point in points] + outcome.points


class LineConfig(rnnq.Config):
    metrics: ClassVar[tuple[rnnq.Metric, ...]] = (
        rnnq.Metric("loss", primary=True),
        rnnq.Metric("val_score", better="max"),
    )
    best_metric: ClassVar[str | None] = "val_score"

    steps: int = 20
    lr: float = 0.1
    log_every: int = 5
    eval_every: int = 8


class Line(rnnq.Family):
    """w goes from 0 towards 1; dropout draws from torch's global numbers."""

    Config = LineConfig
    name = "line"
    dropout = 0.5

    def init(self, configs: Sequence[LineConfig]) -> State:
        return State({"w": torch.zeros(len(configs), 1, 3)}, {"seen": torch.zeros(len(configs))})

    def batch(self, configs: Sequence[LineConfig], steps: Sequence[int]) -> Tensor:
        return torch.tensor(steps, dtype=torch.float32)

    def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        w = torch.nn.functional.dropout(state.params["w"], self.dropout)
        return (w - 1).square().mean((1, 2)), {"seen": state.carried["seen"] + data}

    def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
        return [{f"{split}_score": float(w.mean())} for w in state.params["w"]]


def run(
    family: Any, config: rnnq.Config, desk: Desk, every: Every = NEVER, resumed: Mapping[str, Any] | None = None
) -> Outcome:
    return train.train(family, config, desk, CPU, config.steps_total(), every, resumed)


# --------------------------------------------------------------------------------- where a run begins and ends


class Enough(Line):
    """Ends once its held-out score has passed a bar."""

    def is_enough(self, config: Any, curve: Any) -> bool:
        return any(name == "val_score" and value > 0.4 for name, _, value in curve)


def test_a_run_that_is_good_enough_ends_before_its_budget_and_is_tested_there() -> None:
    config = LineConfig(steps=200)
    outcome = run(Enough(), config, Desk())
    assert outcome.finished and outcome.step < 200
    assert outcome.step % config.eval_every == 0
    at_the_end = {name for name, step, _ in outcome.points if step == outcome.step}
    assert {"val_score", "test_score"} <= at_the_end
    assert [step for name, step, _ in outcome.points if name == "val_score"].count(outcome.step) == 1


def test_a_run_that_ends_early_does_so_at_the_same_step_when_it_is_stopped_and_resumed() -> None:
    whole = run(Enough(), LineConfig(steps=200), Desk())
    stopped = run(Enough(), LineConfig(steps=200), Desk(stop_at=whole.step - 1))
    again = run(Enough(), LineConfig(steps=200), Desk(), resumed=stopped.state)
    assert again.step == whole.step
    assert again.state is not None and whole.state is not None
    assert again.state["curve"] == whole.state["curve"]
    asked_again = run(Enough(), LineConfig(steps=400), Desk(), resumed=whole.state)
    assert asked_again.finished and asked_again.step == whole.step


def _parent(**params: Tensor) -> Parent:
    return Parent(7, "line", {}, 20, params, {"seen": torch.ones(1)})


def test_a_run_that_starts_from_another_has_its_parameters_and_nothing_that_it_carried() -> None:
    config = LineConfig()
    member = Member(config, Desk(), 20, start=_parent(w=torch.full((1, 1, 3), 0.5)))
    training = Training(Line(), [member], CPU)
    assert training.params["w"].tolist() == [[[0.5, 0.5, 0.5]]]
    assert training.carried["seen"].tolist() == [0.0]
    assert member.step == 0
    resumed = Member(config, Desk(), 20, training.state(member), _parent(w=torch.zeros(1, 1, 3)))
    assert Training(Line(), [resumed], CPU).params["w"].tolist() == [[[0.5, 0.5, 0.5]]]


def test_all_that_does_not_fit_in_the_weights_that_a_run_starts_from_is_said_at_once() -> None:
    member = Member(LineConfig(), Desk(), 20, start=_parent(w=torch.zeros(1, 1, 4), head=torch.zeros(1, 2)))
    with pytest.raises(InputError) as caught:
        Training(Line(), [member], CPU)
    assert caught.value.problems == [
        "run 7 cannot be started from: w is of shape [1, 3] here and of shape [1, 4] in run 7",
        "run 7 cannot be started from: head is missing here and of shape [2] in run 7",
    ]


# ------------------------------------------------------------------------------------------ when to checkpoint


def test_by_steps_a_checkpoint_is_due_at_every_multiple_even_in_the_first_seconds() -> None:
    pace = Pace(Every(seconds=60.0, steps=3))
    assert [step for step in range(1, 11) if pace.is_due(step)] == [3, 6, 9]


def test_by_time_a_checkpoint_is_due_after_the_interval_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    pace = Pace(Every(seconds=60.0))
    clock.now += 59.9
    assert not pace.is_due(1)
    clock.now += 0.2
    assert pace.is_due(2)
    assert pace.is_due(3), "until it is made"
    pace.saved()
    assert not pace.is_due(4)
    clock.now += 60
    assert pace.is_due(5)


def test_by_time_none_is_due_in_the_first_30_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    pace = Pace(Every(seconds=5.0))
    clock.now += 29.9
    assert not pace.is_due(1)
    clock.now += 0.2
    assert pace.is_due(2)
    pace.saved()
    clock.now += 5.0
    assert pace.is_due(3), "after that, every 5 seconds"


def test_the_loop_saves_at_each_due_step_but_leaves_the_last_to_the_end() -> None:
    desk = Desk()
    outcome = run(Line(), LineConfig(), desk, Every(steps=5))

    assert [step for step, _ in desk.saved] == [5, 10, 15]
    assert [state["step"] for _, state in desk.saved] == [5, 10, 15]
    assert outcome.state is not None
    assert outcome.state["step"] == 20


def test_the_loop_saves_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", Clock(tick=10.0))  # each look takes 10 s, one look a step
    desk = Desk()
    run(Line(), LineConfig(), desk, Every(seconds=20.0))

    first, *_, last = [step for step, _ in desk.saved]
    assert first == 3
    assert last < 20
    assert len(desk.saved) < 10


# ------------------------------------------------------------------------------------------- what is handed over


def test_every_point_is_handed_over_once_in_order() -> None:
    desk = Desk()
    outcome = run(Line(), LineConfig(log_every=3, eval_every=4), desk, Every(steps=7))
    points = desk.points(outcome)

    assert [step for name, step, _ in points if name == "loss"] == [3, 6, 9, 12, 15, 18, 20]
    assert [step for name, step, _ in points if name == "val_score"] == [4, 8, 12, 16, 20]
    assert [step for name, step, _ in points if name == "test_score"] == [20]
    assert len(points) == len({point[:2] for point in points})
    assert [step for _, step, _ in points] == sorted(step for _, step, _ in points)
    assert all(points for step, points in desk.recorded if step not in (7, 14)), "without points nothing is written"
    assert outcome.state is not None
    assert [tuple(point) for point in outcome.state["curve"]] == points


def test_without_smoothing_a_point_is_the_loss_of_its_own_step() -> None:
    class Plain(Line):
        dropout = 0.0

        def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return state.params["w"].sum((1, 2)) * 0 + data, {}

    desk = Desk()
    outcome = run(Plain(), LineConfig(log_every=5), desk)

    assert [p for p in desk.points(outcome) if p[0] == "loss"] == [("loss", s, s - 1.0) for s in (5, 10, 15, 20)]


def test_with_smoothing_a_point_is_the_average_from_its_start() -> None:
    class Smooth(Line):
        smoothing: ClassVar[tuple[float, float] | None] = (0.9, 3.0)

        def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return state.params["w"].sum((1, 2)) * 0 + data, {}

    outcome = run(Smooth(), LineConfig(log_every=2, steps=2), Desk())

    assert outcome.summary["loss"] == pytest.approx(0.9 * (0.9 * 3.0 + 0.1 * 0.0) + 0.1 * 1.0, abs=1e-12)


def test_a_family_that_measures_nothing_else_is_trained_all_the_same() -> None:
    class Blind(Line):
        def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
            return super(Line, self).evaluate(state, configs, split)

    outcome = run(Blind(), LineConfig(), Desk())

    assert outcome.finished
    assert set(outcome.summary) == {"loss", "steps_per_s"}
    assert outcome.best is None


def test_the_last_evaluation_is_not_made_twice_when_the_schedule_has_it_too() -> None:
    desk = Desk()
    outcome = run(Line(), LineConfig(steps=16, eval_every=8), desk)

    assert [point[:2] for point in desk.points(outcome) if point[0] != "loss"] == [
        ("val_score", 8),
        ("val_score", 16),
        ("test_score", 16),
    ]


def test_the_summary_has_last_values_and_the_speed() -> None:
    desk = Desk()
    outcome = run(Line(), LineConfig(), desk)
    last = {name: value for name, _, value in desk.points(outcome)}

    assert {name: outcome.summary[name] for name in last} == last
    assert outcome.summary["steps_per_s"] > 0


def test_what_depends_on_the_machine_is_plain_and_can_be_compared() -> None:
    found = train.numerics(CPU)

    assert json.loads(json.dumps(found)) == found
    assert {type(value) for value in found.values()} <= {str, int, bool}
    assert found["threads"] == 1


# ------------------------------------------------------------------------------------------------------- the best


class Scripted(Line):
    """Its held-out score is read from a list."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = list(scores)

    def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
        return [{"val_score": self.scores.pop(0)}] if split == "val" else [{}]


@pytest.mark.parametrize(
    ("better", "scores", "step"),
    [
        ("max", [1.0, 3.0, 2.0, 0.0], 2),
        ("min", [1.0, 3.0, 2.0, 0.5], 4),
        ("max", [1.0, 3.0, 3.0, 3.0], 2),
        ("max", [math.nan, 1.0, math.inf, math.nan], 2),
        ("min", [-math.inf, 2.0, 1.0, math.nan], 3),
        ("max", [math.nan] * 4, None),
    ],
)
def test_the_best_is_the_first_of_the_finite_values_that_are_best(
    better: Any, scores: list[float], step: int | None
) -> None:
    class Judged(LineConfig):
        metrics: ClassVar[tuple[rnnq.Metric, ...]] = (rnnq.Metric("loss"), rnnq.Metric("val_score", better=better))

    outcome = run(Scripted(scores), Judged(steps=4, eval_every=1), Desk())

    assert (outcome.best["step"] if outcome.best else None) == step
    if outcome.best:
        assert outcome.best["value"] == scores[outcome.best["step"] - 1]


def test_the_parameters_of_the_best_step_stay_as_they_were_then() -> None:
    class Kept(Line):
        dropout = 0.0

        def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
            return [{"val_score": -abs(float(state.params["w"].mean()) - 0.3)}] if split == "val" else [{}]

    outcome = run(Kept(), LineConfig(eval_every=1), Desk())

    assert outcome.best is not None
    assert outcome.best["step"] == 3  # Adam's first steps are of 0.1 each
    assert float(outcome.best["params"]["w"].mean()) == pytest.approx(0.3, abs=0.01)


# ------------------------------------------------------------------------------------------------------- stopping


def test_a_wish_stops_the_loop_after_the_step_it_is_in() -> None:
    desk = Desk(stop_at=7)
    outcome = run(Line(), LineConfig(), desk)

    assert (outcome.finished, outcome.step) == (False, 7)
    assert outcome.state is not None
    assert outcome.state["step"] == 7
    assert outcome.summary == {}


def test_a_wish_at_the_last_step_comes_too_late() -> None:
    assert run(Line(), LineConfig(), Desk(stop_at=20)).finished


def test_a_lost_lease_ends_the_training_at_once() -> None:
    desk = Desk(lost_at=10)
    with pytest.raises(LeaseLost):
        run(Line(), LineConfig(), desk)
    assert [step for step, _ in desk.recorded] == [5, 8]


def test_dropout_from_the_global_numbers_goes_on_to_the_bit() -> None:
    whole = run(Line(), LineConfig(), Desk())
    stopped = run(Line(), LineConfig(), Desk(stop_at=7))
    torch.manual_seed(12345)
    torch.rand(99)
    resumed = run(Line(), LineConfig(), Desk(), resumed=stopped.state)

    assert whole.state is not None
    assert resumed.state is not None
    assert torch.equal(resumed.state["members"]["params"]["w"], whole.state["members"]["params"]["w"])
    assert resumed.state["curve"] == whole.state["curve"]
    assert torch.equal(resumed.state["rng"]["torch"], whole.state["rng"]["torch"])


# ------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e6])
def test_a_loss_that_is_not_finite_or_above_the_bound_ends_the_run_at_the_next_point(value: float) -> None:
    class Bad(Line):
        def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return state.params["w"].sum((1, 2)) * 0 + (value if float(data) >= 6 else 1.0), {}

    desk = Desk()
    with pytest.raises(Diverged, match="at step 10"):
        run(Bad(), LineConfig(eval_every=100), desk)
    assert [step for step, _ in desk.recorded] == [5]


class Breaking(Line):
    """Its loss stays finite; its gradient is 0/0 from the first step on, and so are its weights."""

    def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        broken = torch.nan_to_num(state.params["w"]) * 0
        return broken.square().sum((1, 2)).sqrt() + 1, {}


@pytest.mark.parametrize("every", [NEVER, Every(steps=2)], ids=["at the end", "at a checkpoint"])
def test_a_state_that_is_not_finite_is_never_handed_over(every: Every) -> None:
    desk = Desk()
    with pytest.raises(Diverged, match="the state is not finite"):
        run(Breaking(), LineConfig(), desk, every)
    assert desk.saved == []


def test_a_wish_hands_over_no_broken_state_either() -> None:
    with pytest.raises(Diverged, match="the state is not finite at step 3"):
        run(Breaking(), LineConfig(), Desk(stop_at=3))


def test_a_family_of_the_third_level_must_say_how_many_steps_it_takes() -> None:
    class Endless(rnnq.Config):
        lr: float = 0.1

    with pytest.raises(InputError, match="Endless does not say how many steps") as caught:
        run(Line(), Endless(), Desk())
    assert caught.value.hint is not None


@pytest.mark.parametrize("name", ["score", "loss"])
def test_a_metric_that_would_have_two_values_at_one_step_is_refused(name: str) -> None:
    """Val and test under one name, or a metric called as the training loss: a curve has one value at a step."""

    class Same(Line):
        def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
            return [{name: 1.0}]

    with pytest.raises(InputError, match=f"measures {name}, of which step 20 has a value already") as caught:
        run(Same(), LineConfig(eval_every=100), Desk())
    assert caught.value.hint is not None


# ------------------------------------------------------------------------------- what the optimiser is handed


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_parameters_and_gradients_may_lie_in_memory_as_they_like(layout: str) -> None:
    """The fused optimiser walks through raw memory; the same numbers in order must give the same training."""

    def first() -> Tensor:
        if layout == "expanded":
            return torch.zeros(1, 1, 1).expand(1, 3, 4)
        return torch.linspace(-1, 1, 12).view(1, 4, 3).transpose(1, 2)

    target = torch.linspace(0, 2, 12).view(1, 3, 4)

    class Laid(Line):
        def init(self, configs: Sequence[LineConfig]) -> State:
            return State({"w": first()}, {})

        def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # of a transposed use the gradient comes transposed
            w = state.params["w"].transpose(1, 2)
            return torch.bmm(torch.eye(4)[None], w - target.transpose(1, 2)).square().sum((1, 2)), {}

        def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
            return [{}]

    outcome = run(Laid(), LineConfig(), Desk())
    w = first().clone(memory_format=torch.contiguous_format).requires_grad_()
    adam = torch.optim.Adam([w], lr=0.1)
    for _ in range(20):
        adam.zero_grad()
        (w - target).square().sum().backward()
        adam.step()

    assert outcome.state is not None
    torch.testing.assert_close(outcome.state["members"]["params"]["w"], w.detach(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- no waiting


class Lists(TorchFunctionMode):
    """Counts tensors that are read as a list: on a CPU that is no operation of its own."""

    count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Counts how often numbers are read from the device, which on a GPU waits for all that was asked before."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.lists = Lists()

    def __enter__(self) -> Reads:
        self.lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.lists.__exit__(*error)
        self.count += self.lists.count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_loop_reads_from_the_device_only_where_it_logs() -> None:
    """100 steps across three window borders, logged at 50 and 100: two numbers."""
    config = DynamicsConfig(
        state_size=8, batch_size=4, window=33, steps=100, log_every=50, use_state_gate=True, use_forget_gate=True
    )
    training = Training(Dynamics(), [Member(config, Desk(), 100)], CPU)
    with Reads() as reads:
        for _ in range(100):
            training.advance()
    assert reads.count == 2

    with Reads() as control:
        float(torch.ones(1))
        torch.ones(1).tolist()
    assert control.count == 2, "what is counted is what reads"


def test_the_loop_around_the_steps_reads_no_more() -> None:
    class Blind(Line):
        def evaluate(self, state: State, configs: Sequence[LineConfig], split: str) -> list[dict[str, float]]:
            return [{}]

    with Reads() as reads:
        run(Blind(), LineConfig(steps=100, log_every=50), Desk())
    # two points, and one look each at what the carried state holds at first and whether the last state is finite
    assert reads.count == 4


# ------------------------------------------------------------------------------------------------ the first level


class CountConfig(rnnq.Config):
    steps: int = 10
    log_every: int = 4


@rnnq.family(CountConfig)
def counted(config: CountConfig) -> Iterator[dict[str, float]]:
    """Every third step it measures something else, too."""
    for step in range(1, config.steps + 1):
        yield {"loss": 1.0 / step} | ({"extra": float(step)} if step % 3 == 0 else {})


def test_a_generator_gives_points_at_the_logging_interval_and_at_the_end() -> None:
    outcome = run(counted, CountConfig(), Desk())

    assert outcome.finished
    assert outcome.step == 10
    assert outcome.points == [("loss", 4, 0.25), ("loss", 8, 0.125), ("loss", 10, 0.1)]
    assert outcome.state is None
    assert outcome.best is None


def test_the_summary_of_a_generator_has_the_last_value_of_each_name() -> None:
    assert run(counted, CountConfig(), Desk()).summary == {"loss": 0.1, "extra": 9.0}


def test_a_point_of_a_generator_has_the_value_of_its_own_step() -> None:
    """Extra was last measured at step 9: it is no point of step 10."""
    assert ("extra", 10, 9.0) not in run(counted, CountConfig(), Desk()).points
    assert ("extra", 12, 12.0) in run(counted, CountConfig(steps=12), Desk()).points


def test_without_log_every_each_step_of_a_generator_is_a_point() -> None:
    class Bare(rnnq.Config):
        pass

    @rnnq.family(Bare)
    def three(config: Bare) -> Iterator[dict[str, Any]]:
        yield {"loss": 3}
        yield {"loss": torch.tensor(2.0)}
        yield {"loss": True}

    assert run(three, Bare(), Desk()).points == [("loss", 1, 3.0), ("loss", 2, 2.0), ("loss", 3, 1.0)]


def test_a_generator_that_yields_nothing_is_finished_with_nothing() -> None:
    outcome = run(counted, CountConfig(steps=0), Desk())
    assert (outcome.finished, outcome.step, outcome.points, outcome.summary) == (True, 0, [], {})


def test_a_generator_is_stopped_by_a_wish_and_cannot_be_resumed() -> None:
    outcome = run(counted, CountConfig(), Desk(stop_at=5))

    assert (outcome.finished, outcome.step, outcome.state) == (False, 5, None)
    assert outcome.points == [("loss", 4, 0.25)]


def test_a_generator_hands_over_its_points_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", Clock(tick=0.6))
    desk = Desk()
    outcome = run(counted, CountConfig(log_every=1), desk)

    assert [step for step, _ in desk.recorded][:3] == [2, 4, 6]
    losses = [point for point in desk.points(outcome) if point[0] == "loss"]
    assert losses == [("loss", step, 1.0 / step) for step in range(1, 11)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_generator_whose_primary_metric_is_not_finite_diverges(value: float) -> None:
    @rnnq.family(CountConfig)
    def broken(config: CountConfig) -> Iterator[dict[str, float]]:
        yield {"loss": 1.0, "other": value}
        yield {"loss": value}

    with pytest.raises(Diverged, match=f"loss is {value} at step 2"):
        run(broken, CountConfig(), Desk())


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_any_seed_that_a_config_may_have_can_be_used(seed: int) -> None:
    assert run(counted, CountConfig(seed=seed), Desk()).finished
    assert run(Line(), LineConfig(seed=seed), Desk()).finished


# ------------------------------------------------------------------------------------------------------- snapshots


class PhotoConfig(LineConfig):
    every: int = 6

    def snapshot_steps(self) -> Sequence[int]:
        return range(0, self.steps + 1, self.every)


class Photo(Line):
    Config = PhotoConfig
    dropout = 0.0


class Bursting(Photo):
    """Its weights are no numbers any more after nine steps; its loss is not logged so soon."""

    def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses, carried = super().loss(state, data)
        return losses * torch.where(data > 8, math.inf, 1.0), carried


def test_weights_are_kept_at_the_steps_that_a_config_names() -> None:
    desk = Desk()
    outcome = run(Photo(), PhotoConfig(), desk)

    assert [step for step, _ in desk.kept] == [0, 6, 12, 18]
    assert desk.kept[0][1] == [0.0] * 3, "before any update"
    assert 0 < desk.kept[1][1][0] < desk.kept[2][1][0]
    assert outcome.finished
    plain = run(Photo(), LineConfig(), Desk())
    assert torch.equal(plain.state["members"]["params"]["w"], outcome.state["members"]["params"]["w"])


def test_each_member_of_a_pack_has_steps_of_its_own_and_one_that_is_lost_ends_alone() -> None:
    desks = [Desk(), Desk(lost_at=12), Desk()]
    configs = [PhotoConfig(every=8), PhotoConfig(every=4), PhotoConfig(every=20)]
    members = [Member(config, desk, 20) for config, desk in zip(configs, desks, strict=True)]
    for desk in desks:  # lost when it keeps weights, not before
        desk.record = lambda step, points: None  # type: ignore[method-assign]
    ended = dict(train.together(Photo(), members, CPU, NEVER))

    assert [[step for step, _ in desk.kept] for desk in desks] == [[0, 8, 16], [0, 4, 8], [0, 20]]
    assert isinstance(ended[members[1]].error, LeaseLost)
    assert ended[members[1]].step == 12
    assert [ended[members[k]].finished for k in (0, 2)] == [True, True]


def test_weights_that_are_no_numbers_are_not_kept_and_end_the_run() -> None:
    desk = Desk()
    with pytest.raises(Diverged, match="not finite at step 12"):
        run(Bursting(), PhotoConfig(log_every=100), desk)
    assert [step for step, _ in desk.kept] == [0, 6]


class Content(Photo):
    """Has enough at its second point."""

    def is_enough(self, config: Any, curve: Any) -> bool:
        return sum(name == "loss" for name, _, _ in curve) > 1


def test_a_run_that_ends_early_keeps_the_weights_of_its_end_where_it_was_to_keep_those_of_its_last_step() -> None:
    desks, lost = [Desk() for _ in range(3)], Desk(lost_at=10)
    configs = [PhotoConfig(every=every, log_every=5) for every in (4, 6, 5)]  # the last step is 20
    members = [Member(config, desk, 20) for config, desk in zip(configs, desks, strict=True)]
    ended = dict(train.together(Content(), members, CPU, NEVER))

    assert [[step for step, _ in desk.kept] for desk in desks] == [[0, 4, 8, 10], [0, 6], [0, 5, 10]]
    assert all(outcome.finished and outcome.step == 10 for outcome in ended.values())
    assert ended[members[0]].state is not None
    assert desks[0].kept[-1][1] == ended[members[0]].state["members"]["params"]["w"].flatten().tolist()

    lost.record = lambda step, points: None  # type: ignore[method-assign]
    [outcome] = dict(train.together(Content(), [Member(configs[0], lost, 20)], CPU, NEVER)).values()
    assert isinstance(outcome.error, LeaseLost)


# ------------------------------------------------------------------------------------ a step in several parts


class Slope(rnnq.Family):
    """w x is to be 2 x; what it carries counts the numbers that it has seen."""

    Config = LineConfig
    name = "slope"
    parts = 1

    def init(self, configs: Sequence[LineConfig]) -> State:
        return State({"w": torch.zeros(1, 1)}, {"seen": torch.zeros(1)})

    def batch(self, configs: Sequence[LineConfig], steps: Sequence[int]) -> Tensor:
        return torch.randn(12, generator=torch.Generator().manual_seed(steps[0]), dtype=torch.float32)

    def micro_batches(self, data: Tensor) -> Sequence[Tensor]:
        return data.chunk(self.parts)

    def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (state.params["w"] * data - 2 * data).square().mean(1)
        return loss, {"seen": state.carried["seen"] + len(data)}


def test_a_step_in_parts_takes_the_mean_of_their_gradients_and_hands_on_what_they_carry() -> None:
    class Parts(Slope):
        parts = 3

    config = LineConfig(steps=40, eval_every=100)
    whole, parts = run(Slope(), config, Desk()), run(Parts(), config, Desk())
    assert whole.state and parts.state
    assert float(parts.state["members"]["params"]["w"]) == pytest.approx(float(whole.state["members"]["params"]["w"]))
    assert float(parts.state["members"]["params"]["w"]) > 1
    assert float(parts.state["members"]["carried"]["seen"]) == 40 * 12


def test_what_a_config_reckons_of_a_step_is_a_point_at_every_evaluation() -> None:
    class Counting(LineConfig):
        def counted(self, step: int) -> dict[str, float]:
            return {"read": 10.0 * step}

    desk = Desk()
    outcome = run(Line(), Counting(), desk)
    read = [(step, value) for name, step, value in desk.points(outcome) if name == "read"]
    assert read == [(8, 80.0), (16, 160.0), (20, 200.0)]
    assert outcome.summary["read"] == 200.0


def test_a_family_may_have_numbers_below_1e_38_taken_for_zero_inside_a_step_alone() -> None:
    seen: list[bool] = []

    class Flushing(Slope):
        flushes_denormals = True

        def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(_has_denormals())
            return super().loss(state, data)

    class Keeping(Flushing):
        flushes_denormals = False

    run(Flushing(), LineConfig(steps=2), Desk())
    run(Keeping(), LineConfig(steps=2), Desk())
    assert seen == [False, False, True, True]
    assert _has_denormals()


def _has_denormals() -> bool:
    return bool(torch.full((1,), 2.0**-130) * 1.0)
