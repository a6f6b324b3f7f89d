"""Packs: each member has the bits that it has alone, whoever is beside it; and how many to train together."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import rnnq
from rnnq import pack, train
from rnnq.errors import Diverged, InputError, LeaseLost
from rnnq.families.base import Adam, State
from rnnq.pack import Planner, Size, Trial
from rnnq.train import Every, Member, Outcome, Point, Training

torch.set_num_threads(1)

CPU = torch.device("cpu")
NEVER = Every(seconds=None, steps=10**9)
STEPS = 200


class WideConfig(rnnq.Config):
    metrics: ClassVar[tuple[rnnq.Metric, ...]] = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric: ClassVar[str | None] = "val_loss"

    width: int = 32
    batch_size: int = 32
    steps: int = STEPS
    lr: float = 0.01
    dropout: float = 0.0
    clip: float | None = None
    warm_up: int = 0
    log_every: int = 7
    eval_every: int = 30
    poison_at: int = 10**9

    def pack_key(self) -> str:
        return f"{self.width}/{self.batch_size}"


def draws(config: WideConfig, step: int) -> torch.Generator:
    """A stream of random numbers for a member's step, the same alone and in a pack."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


class Wide(rnnq.Family):
    """A small recurrent net on random numbers; dropout masks come with the batch, from each member's own stream."""

    Config = WideConfig
    name = "wide"

    def init(self, configs: Sequence[WideConfig]) -> State:
        params: dict[str, list[Tensor]] = {"w": [], "u": [], "b": []}
        for config in configs:
            generator = torch.Generator().manual_seed(config.seed)
            for name, rows in (("w", config.width), ("u", config.width), ("b", 1)):
                params[name].append(torch.randn(rows, config.width, generator=generator) / config.width**0.5)
        zero = torch.zeros(len(configs), configs[0].batch_size, configs[0].width)
        return State({name: torch.stack(each) for name, each in params.items()}, {"h": zero})

    def batch(self, configs: Sequence[WideConfig], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, keep = [], []
        for config, step in zip(configs, steps, strict=True):
            generator = draws(config, step)
            shape = (config.batch_size, config.width)
            scale = math.nan if step >= config.poison_at else 1.0
            x.append(torch.randn(shape, generator=generator) * scale)
            kept = torch.rand(shape, generator=generator) >= config.dropout
            keep.append(kept / (1 - config.dropout))
        return torch.stack(x), torch.stack(keep)

    def loss(self, state: State, data: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        p, (x, keep) = state.params, data
        h = torch.sigmoid(torch.baddbmm(p["b"], x, p["w"]) + torch.bmm(state.carried["h"], p["u"]))
        return (torch.nn.functional.silu(h) * keep - x.sin()).square().mean((1, 2)), {"h": h.detach()}

    def evaluate(self, state: State, configs: Sequence[WideConfig], split: str) -> list[dict[str, float]]:
        losses, _ = self.loss(state, self.batch(configs, [10**6] * len(configs)))
        return [{f"{split}_loss": value} for value in losses.tolist()]

    def optimizer(self, config: WideConfig) -> Adam:
        rise = (lambda done: min(1.0, (done + 1) / config.warm_up)) if config.warm_up else None
        return Adam(lr=config.lr, clip=config.clip, schedule=rise)


class Desk:
    """The owner of a run, who keeps what he is handed, and may wish it to stop or lose it."""

    def __init__(self, stop_at: int | None = None, lost_at: int | None = None) -> None:
        self.points: list[Point] = []
        self.saved: dict[int, dict[str, Any]] = {}
        self.stop_at, self.lost_at = stop_at, lost_at
        self.steps = 0

    def record(self, step: int, points: Sequence[Point]) -> None:
        self.points += points

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        self.points += points
        self.saved[step] = dict(state)

    def leave_behind(self, points: Sequence[Point]) -> None:
        self.points += points

    def wish(self) -> bool:
        self.steps += 1
        if self.steps == self.lost_at:
            raise LeaseLost("run 1 attempt 1 is no longer ours")
        return self.steps == self.stop_at


CONFIGS = [WideConfig(seed=k, lr=0.002 * (k + 1), log_every=5 + k, eval_every=20 + 7 * k) for k in range(8)]
SMALLER = pack.ladder(8)


def halved(active: int, held: int) -> int | None:
    """As a planner makes packs smaller where every size is certified."""
    return (
        next((n for n in reversed(pack.ladder(held)) if active <= n < held), None) if 4 * active <= 3 * held else None
    )


def train_pack(
    configs: Sequence[WideConfig],
    desks: Sequence[Desk] | None = None,
    resumed: Sequence[Mapping[str, Any] | None] | None = None,
    shrink: train.Shrink = halved,
    every: Every = NEVER,
) -> list[tuple[Outcome, list[Point]]]:
    """Outcomes, and all points, of a pack's members, in their order."""
    desks = desks or [Desk() for _ in configs]
    resumed = resumed or [None] * len(configs)
    members = [Member(c, d, c.steps, r) for c, d, r in zip(configs, desks, resumed, strict=True)]
    ended = dict(train.together(Wide(), members, CPU, every, shrink))
    assert len(ended) == len(configs)
    return [
        (ended[m], [*d.points, *(ended[m].points if ended[m].error is None else [])])
        for m, d in zip(members, desks, strict=True)
    ]


@functools.cache
def alone(config: WideConfig) -> tuple[Outcome, list[Point]]:
    return train_pack([config])[0]


def assert_same(ours: tuple[Outcome, list[Point]], theirs: tuple[Outcome, list[Point]]) -> None:
    """Weights, optimiser, carried state, best, curve and random numbers, to the bit."""
    assert ours[1] == theirs[1]
    assert flat(ours[0].state) == flat(theirs[0].state)
    assert flat(ours[0].best) == flat(theirs[0].best)
    same = [{k: v for k, v in o.summary.items() if k != "steps_per_s"} for o, _ in (ours, theirs)]
    assert same[0] == same[1]


def flat(tree: Any) -> Any:
    """Tensors as their bytes, so that -0.0 is not 0.0 and a NaN is itself."""
    if isinstance(tree, Tensor):
        return (str(tree.dtype), tuple(tree.shape), tree.contiguous().numpy().tobytes())
    if isinstance(tree, Mapping):
        return {name: flat(part) for name, part in tree.items()}
    return tree


# ----------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "fields",
    [{}, {"dropout": 0.3}, {"clip": 0.01}, {"warm_up": 50}],
    ids=["plain", "dropout", "clipped", "warm-up"],
)
def test_every_member_of_a_pack_of_eight_equals_its_pack_of_one(fields: dict[str, Any]) -> None:
    """After 200 steps; each has its own seed, learning rate, logging and evaluation."""
    configs = [config.model_copy(update=fields) for config in CONFIGS]
    together = train_pack(configs)
    for config, found in zip(configs, together, strict=True):
        assert found[0].finished
        assert_same(found, alone(config))
    assert len({repr(points) for _, points in together}) == 8, "they are different runs"


def test_members_may_have_different_budgets_and_the_pack_gets_smaller() -> None:
    configs = [config.model_copy(update={"steps": 40 + 20 * k}) for k, config in enumerate(CONFIGS)]
    sizes: list[int] = []

    def shrink(active: int, held: int) -> int | None:
        size = halved(active, held)
        sizes.extend([size] if size is not None and active else [])
        return size

    together = train_pack(configs, shrink=shrink)
    assert sizes == [6, 4, 3, 2, 1]
    for config, found in zip(configs, together, strict=True):
        assert found[0].step == config.steps
        assert_same(found, alone(config))


def test_frozen_members_change_nothing_where_the_pack_keeps_its_size() -> None:
    configs = [config.model_copy(update={"steps": 40 + 20 * k}) for k, config in enumerate(CONFIGS)]
    for config, found in zip(configs, train_pack(configs, shrink=train.as_it_is), strict=True):
        assert_same(found, alone(config))


def test_a_member_full_of_nan_changes_no_bit_of_the_others() -> None:
    """From step 20 its data are NaN, and from then on its weights; it ends at its next point, and they go on."""
    configs = [*CONFIGS[:3], CONFIGS[3].model_copy(update={"poison_at": 20}), *CONFIGS[4:]]
    together = train_pack(configs, shrink=train.as_it_is)
    assert isinstance(together[3][0].error, Diverged)
    assert together[3][0].step == 24
    for k in (0, 1, 2, 4, 5, 6, 7):
        assert_same(together[k], alone(configs[k]))


def test_members_that_stop_or_are_lost_leave_the_others_as_they_are() -> None:
    desks = [Desk(), Desk(stop_at=33), Desk(), Desk(lost_at=50), *(Desk() for _ in range(4))]
    together = train_pack(CONFIGS, desks)
    stopped, lost = together[1][0], together[3][0]
    assert (stopped.finished, stopped.step) == (False, 33)
    assert isinstance(lost.error, LeaseLost)
    for k in (0, 2, 4, 5, 6, 7):
        assert_same(together[k], alone(CONFIGS[k]))


@pytest.mark.parametrize("sizes", [(8, 8), (8, 3), (1, 8), (3, 1)])
def test_what_was_stopped_in_one_pack_goes_on_in_a_pack_of_another_size(sizes: tuple[int, int]) -> None:
    """The first members stop at different steps and meet again, at these steps, in the second pack."""
    first, second = sizes
    n = max(sizes)
    states: list[Any] = []
    for start in range(0, n, first):
        desks = [Desk(stop_at=30 + 11 * k) for k in range(start, min(n, start + first))]
        states += [found[0].state for found in train_pack(CONFIGS[start : start + len(desks)], desks)]
    whole = [alone(config) for config in CONFIGS[:n]]
    for start in range(0, n, second):
        part = slice(start, min(n, start + second))
        for found, expected in zip(train_pack(CONFIGS[part], resumed=states[part]), whole[part], strict=True):
            assert flat(found[0].state) == flat(expected[0].state)
            assert flat(found[0].best) == flat(expected[0].best)


def test_a_checkpoint_of_a_member_holds_the_member_alone() -> None:
    desks = [Desk() for _ in CONFIGS]
    train_pack(CONFIGS, desks, every=Every(seconds=None, steps=50))
    lone = Desk()
    train_pack(CONFIGS[5:6], [lone], every=Every(seconds=None, steps=50))
    assert sorted(desks[5].saved) == sorted(lone.saved) == [50, 100, 150]
    for step, state in lone.saved.items():
        assert flat(desks[5].saved[step]) == flat(state)
    weights = desks[5].saved[50]["members"]["params"]["w"]
    assert weights.untyped_storage().nbytes() == weights.numel() * 4, "no file holds the weights of its pack mates"


def test_an_error_of_the_code_ends_the_pack_and_leaves_what_was_measured_at_the_desks() -> None:
    class Breaks(Wide):
        def batch(self, configs: Sequence[WideConfig], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
            if 21 <= max(steps) < 10**6:
                raise KeyError("broken")
            return super().batch(configs, steps)

    desks = [Desk(), Desk()]
    members = [Member(config, desk, 100) for config, desk in zip(CONFIGS[:2], desks, strict=True)]
    with pytest.raises(KeyError):
        list(train.together(Breaks(), members, CPU, NEVER))
    assert [step for _, step, _ in desks[0].points] == [5, 10, 15, 20, 20]


# ------------------------------------------------------------------------------------------------- the certificate


def trial(make: Callable[[], Any] = Wide, **fields: Any) -> Trial:
    config = WideConfig(**fields)
    return Trial(make, "wide", config, config.steps, CPU, train.numerics(CPU))


def equal_by_hand(config: WideConfig, members: int) -> bool:
    configs = [config.model_copy(update={"seed": k, "steps": 20}) for k in range(members)]
    together = train_pack(configs, shrink=train.as_it_is)
    return all(flat(t[0].state) == flat(alone(c)[0].state) for c, t in zip(configs, together, strict=True))


def test_members_train_alone_once_for_the_certificates_of_all_sizes() -> None:
    made: list[Wide] = []

    def make() -> Wide:
        made.append(Wide())
        return made[-1]

    tried = trial(make)
    assert tried.certify(4)
    assert len(made) == 1 + 4
    assert tried.certify(2)
    assert tried.certify(3)
    assert len(made) == 1 + 4 + 2, "a pack each, and no member alone"


@pytest.mark.parametrize(("width", "batch_size"), [(32, 32), (21, 25), (7, 3), (1, 5)])
@pytest.mark.parametrize("members", [2, 3, 8])
def test_a_certificate_says_of_a_shape_what_training_shows(width: int, batch_size: int, members: int) -> None:
    certified = trial(width=width, batch_size=batch_size).certify(members)
    assert certified == equal_by_hand(WideConfig(width=width, batch_size=batch_size), members)
    if (width, batch_size) == (32, 32):
        assert certified


def test_there_are_shapes_that_only_the_certificate_keeps_from_being_packed() -> None:
    """Batch 25 and width 21: 525 numbers a member are no whole number of vectors, and the last few go another way."""
    assert not trial(width=21, batch_size=25).certify(8)
    assert not trial(width=7, batch_size=25).certify(8)


def test_a_family_that_draws_from_the_global_numbers_gets_no_certificate() -> None:
    class Global(Wide):
        def loss(self, state: State, data: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            torch.rand(1)
            return super().loss(state, data)

    assert not trial(Global).certify(2)
    assert trial(Wide).certify(2)


def test_a_family_that_mixes_its_members_gets_no_certificate() -> None:
    class Mixed(Wide):
        def loss(self, state: State, data: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            losses, carried = super().loss(state, data)
            return losses / losses.detach().sum(), carried

    assert not trial(Mixed).certify(2)


def test_a_family_whose_evaluation_differs_in_a_pack_gets_no_certificate() -> None:
    class Measured(Wide):
        def evaluate(self, state: State, configs: Sequence[WideConfig], split: str) -> list[dict[str, float]]:
            return [{"val_loss": float(len(configs))} for _ in configs]

    assert not trial(Measured).certify(2)


def test_a_trial_leaves_short_runs_within_their_data() -> None:
    class Finite(Wide):
        def batch(self, configs: Sequence[WideConfig], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
            assert all(0 <= step < config.steps for config, step in zip(configs, steps, strict=True))
            return super().batch(configs, steps)

        def evaluate(self, state: State, configs: Sequence[WideConfig], split: str) -> list[dict[str, float]]:
            return [{} for _ in configs]

    short = trial(Finite, steps=5)
    assert short.certify(4)
    assert [size.members for size in short.time([1, 2])] == [1, 2]


def test_states_full_of_nan_are_no_proof() -> None:
    with pytest.raises(pack.Undecided):
        trial(width=7, batch_size=25, poison_at=5).certify(4)
    memory = Notes()
    assert choose(planner(memory, wanted=4), trial(width=7, batch_size=25, poison_at=5), 96, 1) == 1
    assert memory.told == []


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("how", ["differs", "draws"])
def test_evaluation_on_both_splits_is_part_of_the_certificate(split: str, how: str) -> None:
    class Measured(Wide):
        def evaluate(self, state: State, configs: Sequence[WideConfig], which: str) -> list[dict[str, float]]:
            if which != split:
                return [{} for _ in configs]
            if how == "draws":
                return [{"x_loss": random.random() * 0} for _ in configs]
            return [{"x_loss": float(len(configs))} for _ in configs]

    assert not trial(Measured).certify(2)


def test_a_child_with_a_loss_of_its_own_is_not_trained_on_its_parents_gradients() -> None:
    class Closed(Wide):
        def gradients(self, state: State, data: Any) -> Any:
            raise AssertionError("of the parent's loss")

        def loss(self, state: State, data: Any) -> Any:
            return super().loss(state, data)

    class Child(Closed):
        def loss(self, state: State, data: Any) -> Any:
            return super().loss(state, data)

    assert train.has_own_gradients(Closed())
    assert not train.has_own_gradients(Child())
    assert not train.has_own_gradients(Wide())


def test_members_whose_tensors_do_not_stack_are_refused_not_cut() -> None:
    """One resumed from a state that holds more than a fresh one does."""
    state = dict(alone(CONFIGS[0])[0].state or {}) | {"step": 10}
    state["members"] = {**state["members"], "carried": {**state["members"]["carried"], "late": torch.zeros(1)}}
    with pytest.raises(InputError, match="other names or shapes"):
        train_pack(CONFIGS[:2], resumed=[state, None])


def test_a_trial_is_given_up_when_the_worker_is_to_leave() -> None:
    steps = []

    def on_step() -> None:
        steps.append(1)
        if len(steps) == 30:
            raise pack.Interrupted

    made = Trial(Wide, "wide", WideConfig(), STEPS, CPU, {}, None, on_step)
    with pytest.raises(pack.Interrupted):
        planner(wanted=8).find_out(made, 96, 1)
    assert len(steps) == 30


# ----------------------------------------------------------------------------------------------------- the planner


class Notes:
    """Memory that counts what it is told."""

    def __init__(self, *known: Size) -> None:
        self.known = {size.members: size for size in known}
        self.told: list[Size] = []

    def recall(self, shape: str) -> Sequence[Size]:
        return list(self.known.values())

    def remember(self, shape: str, size: Size) -> None:
        self.told.append(size)
        self.known[size.members] = size


class Sure(Trial):
    """A trial whose answers are known: rates by size, and which sizes are equal or do not fit."""

    def __init__(
        self,
        rates: Mapping[int, float],
        unequal: Sequence[int] = (),
        too_large: Sequence[int] = (),
        seconds: float = 60,
    ) -> None:
        super().__init__(Wide, "wide", WideConfig(), STEPS, CPU, {})
        self.rates, self.unequal, self.too_large, self.seconds = rates, unequal, too_large, seconds
        self.certified: list[int] = []

    def seconds_alone(self) -> float:
        return self.seconds

    def time(self, sizes: Sequence[int]) -> list[Size]:
        return [Size(n, rate=self.rates[n]) for n in sizes if n in self.rates]

    def certify(self, members: int) -> bool:
        self.certified.append(members)
        if members in self.too_large:
            raise MemoryError
        return members not in self.unequal


FAST = {1: 100.0, 2: 190.0, 4: 350.0, 8: 600.0, 16: 590.0, 32: 610.0}


def choose(plan: Planner, trial: Trial, pending: int, workers: int) -> int:
    """As a worker does."""
    if plan.is_to_try(trial, pending, workers):
        plan.find_out(trial, pending, workers)
    return plan.best(trial, pending, workers)


def planner(memory: Notes | None = None, wanted: int | None = None) -> Planner:
    return Planner(wanted, CPU, memory or Notes())


def test_auto_takes_the_smallest_of_the_sizes_that_are_about_as_fast_as_the_fastest() -> None:
    assert choose(planner(), Sure(FAST), pending=96, workers=2) == 8
    assert choose(planner(), Sure({1: 100.0, 2: 99.0, 4: 80.0}), pending=96, workers=2) == 1


def test_no_worker_takes_more_than_its_share_of_what_waits() -> None:
    plan = planner()
    assert [choose(plan, Sure(FAST), pending, 2) for pending in (96, 12, 7, 3, 2, 1)] == [8, 6, 4, 2, 1, 1]


def test_what_was_found_is_remembered_and_not_tried_again() -> None:
    memory = Notes()
    first = Sure(FAST)
    choose(planner(memory), first, 96, 2)
    again = Sure(FAST)
    assert choose(planner(memory), again, 96, 2) == 8
    assert (first.certified, again.certified) == ([8, 4, 2], [])


def test_sizes_are_not_tried_for_less_work_than_that_takes() -> None:
    memory = Notes()
    assert choose(planner(memory), Sure(FAST, seconds=0.1), pending=96, workers=1) == 1
    assert memory.told == []


def test_a_size_that_is_not_equal_is_never_used() -> None:
    assert choose(planner(), Sure(FAST, unequal=[8]), 96, 2) == 6
    assert choose(planner(), Sure(FAST, unequal=[8, 6, 4, 3, 2]), 96, 2) == 1
    assert choose(planner(wanted=8), Sure({}, unequal=[8, 6]), 96, 2) == 4


def test_a_size_that_does_not_fit_is_halved_and_remembered() -> None:
    memory = Notes()
    plan, sure = planner(memory, wanted=8), Sure({}, too_large=[8])
    assert choose(plan, sure, 96, 1) == 6
    plan.ran_out(sure, 6)
    assert choose(plan, sure, 96, 1) == 4
    assert [size.members for size in memory.known.values() if not size.fits] == [6], (
        "of a trial only this process knows"
    )


def test_a_pack_gets_smaller_once_a_quarter_has_ended_and_only_to_a_certified_size() -> None:
    sure = Sure(FAST, unequal=[6])
    plan = planner(Notes(*(Size(n, equal=n != 6) for n in (8, 6, 4, 3, 1))))
    shrink = plan.shrink(sure)
    assert [shrink(active, 8) for active in (8, 7, 6, 5, 4, 3, 1, 0)] == [None, None, None, None, 4, 3, 1, None]
    assert sure.certified == [], "nothing is tried in the middle of a training"


def test_what_a_pack_fails_at_does_not_fail_the_planner() -> None:
    class Fails(Wide):
        def init(self, configs: Sequence[WideConfig]) -> State:
            raise KeyError("broken")

    memory = Notes()
    assert choose(planner(memory, wanted=4), trial(Fails), 96, 1) == 1
    assert memory.told == [], "an error is no finding for others"


def test_findings_are_of_one_shape_version_and_numerics() -> None:
    numerics = train.numerics(CPU)
    config = WideConfig()
    shapes = {
        pack.shape("wide", config, numerics, None),
        pack.shape("wide", config, numerics, "other code"),
        pack.shape("other", config, numerics, None),
        pack.shape("wide", config.model_copy(update={"width": 64}), numerics, None),
        pack.shape("wide", config, numerics | {"threads": 2}, None),
        pack.shape("wide", config, numerics | {"cpu": "another"}, None),
    }
    assert len(shapes) == 6
    assert pack.shape("wide", config.model_copy(update={"seed": 1, "lr": 1.0}), numerics, None) in shapes


def test_real_sizes_are_timed_and_more_members_are_faster_where_steps_are_small() -> None:
    """A step of this net alone is all overhead: eight together must at least double its speed; measured 5 times."""
    rates = {size.members: size.rate for size in trial(width=32, batch_size=8).time([1, 8])}
    assert rates[1] is not None
    assert rates[8] is not None
    assert rates[8] > 2 * rates[1]


def test_the_ladder_goes_down_by_quarters_and_thirds() -> None:
    assert pack.ladder(32) == [32, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    assert pack.ladder(10) == [10, 8, 6, 4, 3, 2, 1]
    assert pack.ladder(1) == [1]


def test_only_the_third_level_with_a_pack_key_can_be_packed() -> None:
    class Modular(rnnq.Family):
        Config = WideConfig
        name = "modular"

        def build(self, config: WideConfig) -> torch.nn.Module:
            return torch.nn.Linear(1, 1)

    from rnnq.families.single import Single

    class Keyless(rnnq.Config):
        pass

    assert pack.can_pack(Wide(), WideConfig())
    assert not pack.can_pack(Single(Modular()), WideConfig())
    assert not pack.can_pack(Wide(), Keyless())


def test_a_pack_of_many_sizes_is_compacted_row_by_row() -> None:
    """What is left in the rows after a compaction is what was there before."""
    members = [Member(config, Desk(), 100) for config in CONFIGS]
    training = Training(Wide(), members, CPU)
    for _ in range(5):
        training.advance()
    before = {m: training.tensors(k) for k, m in enumerate(training.rows)}
    for member in (members[1], members[4], members[6]):
        training.freeze(member)
    training.compact(6)
    assert training.rows == [members[k] for k in (0, 1, 2, 3, 5, 7)]
    assert training.frozen == {1}
    for k, member in enumerate(training.rows):
        assert flat(training.tensors(k)) == flat(before[member])
