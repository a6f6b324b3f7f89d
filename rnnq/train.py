"""The only training loop: resume, step, measure, evaluate, checkpoint, stop on divergence or on a wish.

It trains a pack: runs of equal shape side by side on a leading axis of K members, each with its own seed, step, curve,
best, and end; a run alone is a pack of one. It knows no database: whoever owns a run hands in a `Desk` for it. It
never waits for the device at a step; losses are gathered there and read at the logging interval.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rnnq import optimizer
from rnnq.config import Config
from rnnq.errors import Diverged, InputError, LeaseLost, RnnqError
from rnnq.families import denormals
from rnnq.families.base import Family, Generator, Parent, State
from rnnq.families.device import brought
from rnnq.ranks import STEP, Ranks

Point = tuple[str, int, float]  # name, step, value
Shrink = Callable[[int, int], int | None]  # members active, members held -> a smaller pack's size, or None
FIRST = 30.0  # seconds of a run in which no checkpoint by time is made


@dataclass(frozen=True)
class Every:
    """How often to checkpoint: by seconds or by steps."""

    seconds: float | None = 60.0
    steps: int | None = None


class Desk(Protocol):
    """What the loop needs of the owner of a run. A method may raise LeaseLost, which ends the training."""

    def record(self, step: int, points: Sequence[Point]) -> None:
        """New points, up to a step."""

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """New points and the whole state, to be kept on disk."""

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Weights at a step that the config names, to be kept for good."""

    def leave_behind(self, points: Sequence[Point]) -> None:
        """Points that were not handed over yet when training ends by an error."""

    def wish(self) -> bool:
        """Whether the owner wishes the loop to checkpoint and stop."""


class NoDesk:
    """The desk of a run that nobody keeps: nothing is ever put on it, and nothing wished."""

    def record(self, step: int, points: Sequence[Point]) -> None:
        """Nothing."""

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """Nothing."""

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def leave_behind(self, points: Sequence[Point]) -> None:
        """Nothing."""

    def wish(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Outcome:
    """How training ended. `state` is None for a family that cannot be resumed."""

    finished: bool
    step: int
    points: list[Point]  # not yet recorded
    summary: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    best: dict[str, Any] | None = None  # step, value, params, carried
    error: RnnqError | None = None  # why it ended alone, and no other of its pack: it diverged, or is no longer ours


def numerics(device: torch.device, compile: bool = False) -> dict[str, Any]:
    """What the bits of a run depend on besides its config, its data and the code of its family."""
    cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),  # a plain str: weights_only refuses a checkpoint that holds torch's own class
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": torch.get_float32_matmul_precision() if cuda else "",
        "compile": compile,
    }


def train(
    family: Family | Generator,
    config: Config,
    desk: Desk,
    device: torch.device,
    budget: int | None,
    every: Every,
    resumed: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train one run to its budget, or until the desk wishes otherwise.

    `resumed` is the state of a checkpoint. Raises Diverged, and whatever the family or the desk raises.
    """
    [(_, outcome)] = together(family, [Member(config, desk, budget, resumed)], device, every)
    if outcome.error is not None:
        raise outcome.error
    return outcome


def as_it_is(active: int, held: int) -> None:
    """A pack that is never made smaller."""


def why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine; None when it has all that it needs."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is not installed"
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, wanted)) else f"there is no C++ compiler (looked for {', '.join(wanted)})"


def compiled(family: Family) -> Family:
    """The family with its step compiled by torch.compile, for the shapes that come; some seconds for each shape."""
    # beyond a limit torch would go on without: then a run's bits would depend on what its process did before
    torch._dynamo.config.recompile_limit = 2**16
    torch._dynamo.config.accumulated_recompile_limit = 2**16
    name = "gradients" if has_own_gradients(family) else "loss"
    setattr(family, name, torch.compile(getattr(family, name), dynamic=False))
    return family


def together(
    family: Family | Generator,
    members: Sequence[Member],
    device: torch.device,
    every: Every,
    shrink: Shrink = as_it_is,
    ranks: Ranks | None = None,
) -> Iterator[tuple[Member, Outcome]]:
    """Train runs of equal shape as one pack. Each is given out the moment it ends: at its budget, by its desk's wish,
    because it diverged, or because it is no longer ours; the others go on.

    `shrink` says to which size a pack goes, of which so many members of so many are still active, or None to leave it.
    `ranks` are the processes that train a run together; this is the one that evaluates and has a desk.

    Raises whatever the family, or a desk but for LeaseLost, raises: then no member that was not yet given out has
    ended, and what it measured is left with its desk.
    """
    if isinstance(family, Generator):
        [member] = members
        seed_everything(member.config.seed)
        yield member, _consume(family, member.config, member.desk)
        return
    for member in members:
        if member.budget is None:
            raise InputError(
                f"{type(member.config).__name__} does not say how many steps a run takes",
                "give it a field `steps`, or a steps_total() of its own",
            )
    training = Training(family, members, device, ranks)
    try:
        yield from _run(training, Pace(every), shrink)
    except Exception:
        for member in training.active:
            member.desk.leave_behind(member.take_points())
        raise
    finally:
        if ranks is not None:
            ranks.end()


def to_device(data: Any, device: torch.device) -> Any:
    """A tensor, a tree of them in tuples, lists and dicts, or anything with a `.to`, without waiting for the copy."""
    if isinstance(data, Tensor):
        return brought(data, device)
    if isinstance(data, dict):
        return {name: to_device(part, device) for name, part in data.items()}
    if isinstance(data, (tuple, list)):
        parts = [to_device(part, device) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return data.to(device) if hasattr(data, "to") else data


def seed_everything(seed: int) -> None:
    """The global random numbers, for families that draw from them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the global random numbers stand, without anything that weights_only would refuse to load."""
    numpy: Any = np.random.get_state()  # its kind, 624 numbers, and where among them it stands
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing from where `random_state` stood."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


# ------------------------------------------------------------------------------------------ the first level


def _consume(family: Generator, config: Config, desk: Desk) -> Outcome:
    """Drive a generator: each dict that it yields is one step."""
    waiting: list[Point] = []
    try:
        return _consume_all(family, config, desk, waiting)
    except Exception:
        desk.leave_behind(waiting)
        raise


def _consume_all(family: Generator, config: Config, desk: Desk, waiting: list[Point]) -> Outcome:
    log_every = max(1, int(getattr(config, "log_every", 1)))
    latest: dict[str, float] = {}
    points: list[Point] = []  # of the last step
    step = 0
    recorded = time.monotonic()
    for step, measured in enumerate(family(config), start=1):
        points = _points(step, measured)
        latest |= {name: value for name, _, value in points}
        if step % log_every == 0:
            waiting += points
        _refuse_divergence(config, step, latest)
        if desk.wish():
            return Outcome(False, step, list(waiting))
        if time.monotonic() - recorded > 1.0:
            desk.record(step, list(waiting))
            waiting.clear()
            recorded = time.monotonic()
    if step and step % log_every:
        waiting += points
    return Outcome(True, step, list(waiting), latest)


def _points(step: int, measured: Any) -> list[Point]:
    if not isinstance(measured, Mapping) or not all(isinstance(name, str) for name in measured):
        raise InputError(f"step {step:,} yielded {measured!r}", 'a generator yields dicts of numbers: {"loss": 1.5}')
    return [(name, step, float(value)) for name, value in measured.items()]


def _refuse_divergence(config: Config, step: int, measured: Mapping[str, float]) -> None:
    value = measured.get(config.primary().name)
    if value is not None and not math.isfinite(value):
        raise Diverged(f"{config.primary().name} is {value} at step {step:,}", "a lower lr?")


# ---------------------------------------------------------------------------------- the second and third level


class Member:
    """A run in a pack: what of it is not in the stacked tensors."""

    def __init__(
        self,
        config: Config,
        desk: Desk,
        budget: int | None,
        resumed: Mapping[str, Any] | None = None,
        start: Parent | None = None,
    ) -> None:
        self.config, self.desk, self.budget, self.resumed = config, desk, budget, resumed
        self.start = start  # whose weights it starts from, where it is not resumed
        self.step = self.began = 0  # now, and when this attempt began
        self.curve: list[Point] = []
        self.best: dict[str, Any] | None = None
        self.evaluated_at: int | None = None  # the step of the last evaluation of this attempt
        self.rng: dict[str, Any] = {}  # where the global random numbers stood after its own seed and its init
        self._recorded = self._looked_at = 0
        self.log_every = max(1, int(getattr(config, "log_every", 50)))
        self.eval_every = config.evaluation_interval()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint's state stands; its tensors are the pack's to take."""
        self.step = self.began = state["step"]
        self.best, self.rng = state["best"], state["rng"]
        self.curve = [(name, step, value) for name, step, value in state["curve"]]
        self._recorded = len(self.curve)

    def is_to_log(self) -> bool:
        """Whether this step's average loss is a point."""
        return self.step % self.log_every == 0 or self.step == self.budget

    def is_to_evaluate(self) -> bool:
        """Whether the schedule has an evaluation here; at the end there is one in any case."""
        return bool(self.eval_every) and self.step % (self.eval_every or 1) == 0 and not self.is_at_end()

    def is_at_end(self) -> bool:
        """Whether the budget is used up."""
        return self.budget is not None and self.step >= self.budget

    def has_news(self) -> bool:
        """Whether there are points that this was not yet asked about."""
        found, self._looked_at = len(self.curve) > self._looked_at, len(self.curve)
        return found

    def has_points(self) -> bool:
        """Whether there are points that were not yet handed over."""
        return self._recorded < len(self.curve)

    def take_points(self) -> list[Point]:
        """The points that were not yet handed over."""
        points = self.curve[self._recorded :]
        self._recorded = len(self.curve)
        return points

    def add(self, found: Mapping[str, float], split: str) -> None:
        """What an evaluation measured. Raises InputError for a metric that has a value at this step already."""
        twice = sorted({name for name, step, _ in reversed(self.curve) if step == self.step} & set(found))
        if twice:
            raise InputError(
                f"evaluate() for {split} measures {', '.join(twice)}, of which step {self.step:,} has a value already",
                f"a metric belongs to one split: {split}_{twice[0]}?",
            )
        self.curve += [(name, self.step, float(value)) for name, value in found.items()]

    def is_better(self, value: float) -> bool:
        """Whether this value of the config's best metric is better than all before it."""
        direction = next((m.better for m in self.config.metrics if m.name == self.config.best_metric), "min")
        sign = 1 if direction == "min" else -1
        return math.isfinite(value) and (self.best is None or sign * value < sign * self.best["value"])


def _run(training: Training, pace: Pace, shrink: Shrink) -> Iterator[tuple[Member, Outcome]]:
    yield from _keep_weights(training, [member for member in training.active if member.step == 0])
    yield from _close(training)  # one that was lost before it could say that it was done
    while training.active:
        for member, error in training.advance():
            yield training.end(member, error)
        yield from _keep_weights(training, training.active)  # before the checkpoint that a resumed run begins from
        yield from _close(training)
        yield from _hand_over(training, pace)
        size = shrink(len(training.active), training.size) if training.frozen else None
        if size is not None:
            training.compact(size)


def _keep_weights(training: Training, members: Sequence[Member]) -> Iterator[tuple[Member, Outcome]]:
    """The snapshots that are due. A member that diverged or is no longer ours ends."""
    yield from _snapshots(training, [member for member in members if member.step in training.snapshots[member]])


def _close(training: Training) -> Iterator[tuple[Member, Outcome]]:
    """Members that are at their end. One that ends early has there the snapshot that its last step would have had."""
    ending = [m for m in training.active if m.is_at_end() or training.is_enough(m)]
    early = [m for m in ending if not m.is_at_end() and m.step not in training.snapshots[m]]
    yield from _snapshots(training, [m for m in early if m.config.steps_total() in training.snapshots[m]])
    yield from training.close([member for member in ending if member in training.active])


def _snapshots(training: Training, members: Sequence[Member]) -> Iterator[tuple[Member, Outcome]]:
    for member in members:
        try:
            member.desk.snapshot(member.step, training.snapshot(member))
        except (Diverged, LeaseLost) as error:
            yield training.end(member, error)


def _hand_over(training: Training, pace: Pace) -> Iterator[tuple[Member, Outcome]]:
    """What is due after a step: wishes, checkpoints, points. A member that diverged or is no longer ours ends."""
    saved = False
    by_time = pace.every.steps is None and pace.is_due(0)  # one look for all
    for member in list(training.active):
        try:
            if member.desk.wish():
                state = training.state(member)
                training.freeze(member)
                yield member, Outcome(False, member.step, member.take_points(), state=state)
            elif by_time or (pace.every.steps is not None and pace.is_due(member.step)):
                state = training.state(member)
                member.desk.save(member.step, member.take_points(), state)
                saved = True
            elif member.has_points():
                member.desk.record(member.step, member.take_points())
        except (Diverged, LeaseLost) as error:
            yield training.end(member, error)
    if saved:
        pace.saved()


class Pace:
    """When the next checkpoint is due."""

    def __init__(self, every: Every) -> None:
        self.every = every
        self.due = time.monotonic() + max(every.seconds or 0.0, FIRST)

    def is_due(self, step: int) -> bool:
        """By steps: at every multiple. By time: when the interval has passed, and never in the first 30 s."""
        if self.every.steps is not None:
            return step % self.every.steps == 0
        return time.monotonic() >= self.due

    def saved(self) -> None:
        """A checkpoint was made."""
        self.due = time.monotonic() + (self.every.seconds or 0.0)


class Training:
    """A pack in training: everything that changes has a leading axis of K members.

    A member that has ended stays in its row, frozen, until the pack is made smaller: rows are independent.
    """

    def __init__(
        self, family: Family, members: Sequence[Member], device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.family, self.device = family, device
        self.rows = list(members)  # by their place on the axis
        self.active = list(members)
        self.frozen: set[int] = set()  # rows of members that have ended
        # what begins without an infinity has none later: a mask of a module's own may hold some
        self._infinite: set[str] = set()
        drawn = [self._draw(member) for member in members]
        # contiguous, as the fused optimiser walks through the memory of a row from its first element to its last
        self.params = {n: p.contiguous().requires_grad_() for n, p in self._stack([d.params for d in drawn]).items()}
        self.carried = self._stack([d.carried for d in drawn])
        self.optimizer = optimizer.of(self.params, [family.optimizer(member.config) for member in members])
        decay, start = family.smoothing or (0.0, 0.0)
        self.decay = decay
        self.average = torch.full((self.size,), start, dtype=torch.float64, device=device)  # of the training loss
        self.busy = 0.0  # seconds spent in steps of this attempt
        self.loss_name = family.training_loss or members[0].config.primary().name
        self.snapshots = {member: frozenset(member.config.snapshot_steps()) for member in members}
        for k, member in enumerate(members):
            if member.resumed is not None:
                self.optimizer.load(k, member.resumed["members"]["optimizer"])
                self.average[k : k + 1].copy_(member.resumed["members"]["average"])
                member.resumed = None  # its tensors are no longer needed
        if self.size == 1:
            set_random_state(members[0].rng, device)
        self.ranks: Ranks | None = None
        if ranks is not None:
            self._share_out(ranks)

    def _share_out(self, ranks: Ranks) -> None:
        """From now on this process has its own part of each batch, and of what is carried."""
        [member] = self.rows
        place = member.step - member.is_at_end()  # after the last step there may be no further batch
        data = self.family.batch([member.config], [place])
        ranks.check(self.family, data, self.carried)
        ranks.begin(lambda: self.state(member))
        before = random_state(self.device)
        self.carried = ranks.carried_share(self.family, self.carried)
        mine = to_device(ranks.share(self.family, data), self.device)
        ranks.wrap(self.family, State(self.params, self.carried), mine)
        set_random_state(before, self.device)
        self.ranks = ranks

    @property
    def size(self) -> int:
        """K: the members that have a row, ended or not."""
        return len(self.rows)

    def _draw(self, member: Member) -> State:
        """Each member is drawn alone, from its own seed: nothing of it depends on who is beside it."""
        seed_everything(member.config.seed)
        drawn = self.family.init([member.config])
        self._infinite |= {name for name, c in drawn.carried.items() if not bool(torch.isfinite(c).all())}
        member.rng = random_state(self.device)
        if member.resumed is None:
            return drawn if member.start is None else self.family.begin(member.config, drawn, member.start)
        member.resume(member.resumed)
        saved = member.resumed["members"]
        return State({name: saved["params"][name] for name in drawn.params}, dict(saved["carried"]))

    def _stack(self, trees: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if len(trees) == 1:
            return {name: t.to(self.device) for name, t in trees[0].items()}
        kinds = [{name: (t.shape, t.dtype) for name, t in tree.items()} for tree in trees]
        if any(kind != kinds[0] for kind in kinds):
            raise InputError("members of a pack hold tensors of other names or shapes", "each is to be trained alone")
        return {name: torch.cat([tree[name] for tree in trees]).to(self.device) for name in trees[0]}

    # ------------------------------------------------------------------------------------------------ stepping

    def advance(self) -> list[tuple[Member, Diverged]]:
        """One optimiser step, and what is due after it: logging, evaluation. Returns who diverged."""
        began = time.perf_counter()
        self.update()
        due = [member for member in self.active if member.is_to_log()]
        diverged = self._log(due) if due else []
        self.busy += time.perf_counter() - began
        out = [member for member, _ in diverged]
        due = [member for member in self.active if member.is_to_evaluate() and member not in out]
        if due:
            self._evaluate(due, "val")
        return diverged

    def update(self) -> None:
        """One optimiser step of every active member."""
        if self.ranks is not None:
            self.ranks.broken = True  # until all have made the step
            self.ranks.say(STEP)
        configs = [member.config for member in self.rows]
        # of a member that has ended the last step again: there may be no further one
        steps = [max(0, member.step - (k in self.frozen)) for k, member in enumerate(self.rows)]
        data = self.family.batch(configs, steps)
        data = to_device(data if self.ranks is None else self.ranks.share(self.family, data), self.device)
        find = gradients_of if self.ranks is None else self.ranks.gradients
        with denormals.flushed() if self.family.flushes_denormals else contextlib.nullcontext():
            losses, gradients, carried = find(self.family, State(self.params, self.carried), data)
        rows = [k for k in range(self.size) if k not in self.frozen] if self.frozen else range(self.size)
        self.optimizer.update([gradients[name] for name in self.params], rows, steps)
        self.average.mul_(self.decay).add_(losses, alpha=1 - self.decay)
        self.carried = carried
        for member in self.active:
            member.step += 1
        if self.ranks is not None:
            self.ranks.broken = False

    def joined(self) -> dict[str, Tensor]:
        """What is carried from step to step, of all processes that train this."""
        return self.carried if self.ranks is None else self.ranks.joined(self.family, self.carried)

    def _log(self, due: Sequence[Member]) -> list[tuple[Member, Diverged]]:
        values = self.average.tolist()  # the only place where the host waits for the device
        diverged = []
        for member in due:
            value = values[self.rows.index(member)]
            member.curve.append((self.loss_name, member.step, value))
            if not math.isfinite(value) or value > self.family.loss_bound:
                why = Diverged(f"the training loss is {value:g} at step {member.step:,}", "a lower lr?")
                diverged.append((member, why))
        return diverged

    # --------------------------------------------------------------------------------------------- measuring

    @torch.no_grad()
    def _evaluate(self, due: Sequence[Member], split: str) -> None:
        """Measure members: all in one where most are due, else each alone. The pack's certificate covers both."""
        places = [self.rows.index(member) for member in due]
        if 4 * len(due) >= self.size:
            every = self.measure(split)
            found = [every[k] for k in places]
        else:
            found = [
                self.family.evaluate(self._alone(k), [member.config], split)[0]
                for k, member in zip(places, due, strict=True)
            ]
        for k, member, measured in zip(places, due, found, strict=True):
            counted = member.config.counted(member.step) if split == "val" else {}
            member.add({**measured, **counted}, split)
            member.evaluated_at = member.step
            best = member.config.best_metric
            if best in measured and member.is_better(float(measured[best])):
                member.best = {"step": member.step, "value": float(measured[best]), **self._parts(k)}

    @torch.no_grad()
    def _test(self, due: Sequence[Member]) -> None:
        """Measure members on test data: with the weights that they have now, or with their best."""
        best = [member for member in due if self.family.tests_best and member.best is not None]
        if rest := [member for member in due if member not in best]:
            self._evaluate(rest, "test")
        for member in best:
            kept = member.best or {}
            trees = ({n: t.to(self.device) for n, t in kept[part].items()} for part in ("params", "carried"))
            [measured] = self.family.evaluate(State(*trees), [member.config], "test")
            member.add(measured, "test")

    def _alone(self, k: int) -> State:
        cut = slice(k, k + 1)
        return State({n: p[cut] for n, p in self.params.items()}, {n: c[cut] for n, c in self.joined().items()})

    def _parts(self, k: int) -> dict[str, dict[str, Tensor]]:
        """Copies of a member's parameters and of what it carries, such as running means, on the CPU."""
        alone = self._alone(k)
        return {
            "params": {name: p.detach().to("cpu", copy=True) for name, p in alone.params.items()},
            "carried": {name: c.detach().to("cpu", copy=True) for name, c in alone.carried.items()},
        }

    def is_enough(self, member: Member) -> bool:
        """Whether the family ends a member here, before its budget."""
        if not member.has_news():
            return False
        return self.family.is_enough(member.config, member.curve)

    def close(self, ending: Sequence[Member]) -> Iterator[tuple[Member, Outcome]]:
        """The last evaluation of members that are at their end, also on test data, and their ends."""
        due = [m for m in ending if not any(at == m.step and name != self.loss_name for name, at, _ in m.curve)]
        # the schedule may just have had its evaluation of those that end before their budget
        untested = [m for m in ending if m in due or m.evaluated_at == m.step]
        if due:
            self._evaluate(due, "val")
        if untested:
            self._test(untested)
        for member in ending:
            try:
                state = self.state(member)
            except Diverged as error:
                yield self.end(member, error)
                continue
            summary = self.summary(member)
            self.freeze(member)
            points = member.take_points()
            yield member, Outcome(True, member.step, points, summary, state, member.best)

    def end(self, member: Member, error: RnnqError) -> tuple[Member, Outcome]:
        """A member ends by an error that is its own."""
        self.freeze(member)
        points = member.take_points()
        member.desk.leave_behind(points)
        return member, Outcome(False, member.step, points, error=error)

    def summary(self, member: Member) -> dict[str, Any]:
        """The family's summary and the speed of this attempt in steps per second, evaluations aside."""
        speed = (member.step - member.began) / self.busy if self.busy else None
        found = self.family.summary(member.config, member.curve)
        return found | ({"steps_per_s": speed} if speed else {})

    @torch.no_grad()
    def measure(self, split: str) -> list[dict[str, float]]:
        """What the family measures of each row now; no curve has it."""
        configs = [member.config for member in self.rows]
        return self.family.evaluate(State(self.params, self.joined()), configs, split)

    # ------------------------------------------------------------------------------------------ members that end

    def freeze(self, member: Member) -> None:
        """The member has ended: its row is computed, as rows are, but no longer changed."""
        self.active.remove(member)
        self.frozen.add(self.rows.index(member))

    def compact(self, size: int) -> None:
        """Make the pack `size` rows: the active ones, and as many of the frozen as that leaves room for."""
        kept = sorted(range(self.size), key=lambda k: (k in self.frozen, k))[:size]
        keep = torch.tensor(sorted(kept), device=self.device)
        self.params = {n: p.detach().index_select(0, keep).requires_grad_() for n, p in self.params.items()}
        self.carried = {n: c.index_select(0, keep) for n, c in self.carried.items()}
        self.average = self.average.index_select(0, keep)
        self.optimizer.select(self.params, keep)
        self.rows = [self.rows[k] for k in sorted(kept)]
        self.frozen = {k for k, member in enumerate(self.rows) if member not in self.active}
        if self.size == 1 and self.active:
            set_random_state(self.active[0].rng, self.device)

    # -------------------------------------------------------------------------------------------------- state

    def tensors(self, k: int) -> dict[str, Tensor]:
        """All tensors that row k stands for, by name."""
        parts = {f"{part}.{name}": t for part, tree in self._parts(k).items() for name, t in tree.items()}
        return parts | self.optimizer.state(k) | {"average": self.average[k : k + 1]}

    def snapshot(self, member: Member) -> dict[str, Any]:
        """A member's weights. Raises Diverged where they are not finite."""
        params = self._parts(self.rows.index(member))["params"]
        _refuse_nonfinite([params], member.step)
        return {"step": member.step, "params": params}

    def state(self, member: Member) -> dict[str, Any]:
        """All that is needed to go on as if nothing had happened. Raises Diverged rather than keep a bad state."""
        k = self.rows.index(member)
        alone = self._parts(k)
        moments = self.optimizer.state(k)
        carried = {name: c for name, c in alone["carried"].items() if name not in self._infinite}
        _refuse_nonfinite([alone["params"], carried, moments], member.step)
        average = self.average[k : k + 1].to("cpu", copy=True)
        return {
            "step": member.step,
            "members": {**alone, "optimizer": moments, "average": average},
            "best": member.best,
            "curve": [list(point) for point in member.curve],
            # alone a family may draw from the global numbers; one that does so at a step is trained in no pack
            "rng": random_state(self.device) if self.size == 1 else member.rng,
        }


def has_own_gradients(family: Family) -> bool:
    """Whether its gradients are of its own loss: one that gives its parent's family another loss has autograd's."""
    order = type(family).__mro__
    mine, loss = (next(at for at, kind in enumerate(order) if name in vars(kind)) for name in ("gradients", "loss"))
    return order[mine] is not Family and mine <= loss


def gradients_of(
    family: Family, state: State, data: Any
) -> tuple[Tensor, Mapping[str, Tensor | None], dict[str, Tensor]]:
    """The losses, (K,), the gradient of each parameter, and the next carried state: the family's own, or autograd's."""
    if not has_own_gradients(family):
        return by_autograd(family, state, data)
    with torch.no_grad():
        return family.gradients(state, data)


def by_autograd(
    family: Family, state: State, data: Any
) -> tuple[Tensor, Mapping[str, Tensor | None], dict[str, Tensor]]:
    """As `gradients_of`, from the family's loss alone."""
    parts = family.micro_batches(data)
    total, sums, carried = _part_by_autograd(family, state, parts[0])
    for part in parts[1:]:
        losses, found, carried = _part_by_autograd(family, State(state.params, carried), part)
        total = total + losses
        for name, gradient in found.items():
            before = sums[name]
            sums[name] = gradient if before is None else before if gradient is None else before + gradient
    if len(parts) > 1:
        total, sums = total / len(parts), {n: None if g is None else g / len(parts) for n, g in sums.items()}
    return total, sums, carried


def _part_by_autograd(
    family: Family, state: State, part: Any
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    losses, carried = family.loss(state, part)
    # members are independent: the gradient of the sum is each member's own
    found = torch.autograd.grad(losses.sum(), list(state.params.values()), allow_unused=True)
    return losses.detach(), dict(zip(state.params, found, strict=True)), carried


def _refuse_nonfinite(trees: Iterable[Mapping[str, Tensor]], step: int) -> None:
    tensors = [t for tree in trees for t in tree.values() if t.is_floating_point()]
    if not bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all()):
        raise Diverged(f"the state is not finite at step {step:,}", "a lower lr?")
