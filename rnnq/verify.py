"""Whether a run that is interrupted and resumed equals one that never was, to the bit.

The real loop trains a config twice: once to its end, and once until it is asked to leave at some step, through a real
checkpoint file, and on from there. Each training gets the family anew, its definition file executed again, and finds
the global random numbers elsewhere: what is kept outside of a checkpoint shows as a difference. All of it happens in
one process, so what differs from process to process alone, such as the order of a set of strings, does not show. No
database is written.
"""

from __future__ import annotations

import math
import random
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy import Engine
from torch import Tensor

from rnnq import checkpoint, config, definitions, families, runs, sweep, train
from rnnq.checkpoint import Owner
from rnnq.config import Config
from rnnq.errors import InputError, RnnqError, nearest
from rnnq.families.base import Family, Generator
from rnnq.train import Every, Outcome, Point

STEPS = 300  # of a training, unless more or fewer are asked for or the run takes fewer
LOOKS = {"log_every": 10, "eval_every": 4}  # a shortened training is logged and evaluated at least so often
NEVER = Every(seconds=None, steps=2**62)
OWNER = Owner("verify-resume", "verify-resume", 1, "")

# what the parts of a state are called for people
PARTS = {"params": "weights", "optimizer": "optimiser", "carried": "carried state", "average": "average of the loss"}


@dataclass(frozen=True)
class Subject:
    """What is trained. `find` gives the family anew, as a fresh process would have it."""

    name: str  # "run 12", or the name of a stage
    family: str
    config: Config
    budget: int | None
    find: Callable[[], Family | Generator]


@dataclass(frozen=True)
class Difference:
    """A part of the final state, or a curve, that is not equal to the bit."""

    where: str  # such as "weights w", "curve loss"
    elements: int  # how many differ
    of: int
    largest: float | None  # difference; None where it is not of numbers
    first_step: int | None = None  # of a curve: the first at which it differs
    note: str = ""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Interruption:
    """One resumed training beside the one without an interruption."""

    step: int
    differences: list[Difference]

    @property
    def equal(self) -> bool:
        """To the bit."""
        return not self.differences


@dataclass
class Verdict:
    """What came of a subject. Without interruptions nothing could be compared, and the remarks say why."""

    subject: Subject
    steps: int | None
    remarks: list[str] = field(default_factory=list)
    interruptions: list[Interruption] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether every resumed training equalled the one without an interruption."""
        return all(one.equal for one in self.interruptions)


# ----------------------------------------------------------------------------------------------------- what to train


def of_run(engine: Engine, run: int, defs: Path) -> Subject:
    """The config of a run. Raises InputError when its family's code is not here, or is another version."""
    row = runs.show(engine, run)
    info = runs.stage_info(engine, row["stage"])
    place = (info.source, info.source_sha256) if info.family_in_source else (None, None)

    def find() -> Family | Generator:
        source, sha256 = place
        definition = definitions.load_source(source, sha256, defs) if source and sha256 else None
        return families.find(row["family"], definition)

    made = config.parse(find().Config, row["config"])
    if config.fingerprint(row["family"], made, config.start_key(row["start_from"])) != row["fingerprint"]:
        raise InputError(
            f"run {run} was made by another version of {row['family']}; here it has version {made.version}",
            "the code as it was when the stage was made can train it",
        )
    return Subject(f"run {run}", row["family"], made, row["budget"], find)


def of_definition(path: Path, stage: str | None) -> list[Subject]:
    """The first config of each stage of a definition file, or of the one that is named. Raises InputError."""
    definition = definitions.load(path)
    chosen = [one for one in definition.stages if stage in (None, one.name)]
    if not chosen:
        raise InputError(f"{path} has no stage {stage!r}", nearest(stage or "", [s.name for s in definition.stages]))
    problems: list[str] = []
    found = []
    for one in chosen:
        try:
            found.append(_of_stage(path, one))
        except InputError as error:
            problems += [f"stage {one.name}: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    return found


def _of_stage(path: Path, stage: sweep.Stage) -> Subject:
    in_source = not isinstance(stage.family, str)
    name = families.name_of(stage.family) if in_source else str(stage.family)

    def find() -> Family | Generator:
        return families.find(name, definitions.load(path) if in_source else None)

    kind = families.config_of(stage.family) if in_source else families.find_config(name)
    values = next(stage.configs())
    made = config.parse(kind, config.known_keys(kind, values) if stage.listed else values)
    return Subject(f"stage {stage.name}", name, made, made.steps_total(), find)


# ---------------------------------------------------------------------------------------------------------- training


def verify(
    subject: Subject,
    device: torch.device,
    steps: int | None = None,
    times: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """Train a subject without and with interruptions at `times` random steps, drawn from `seed`, and compare.

    Raises what the training without an interruption raises; an error of a resumed one is a difference.
    """
    if isinstance(subject.find(), Generator):
        why = f"{subject.family} is a generator: nothing can be resumed inside it, a run restarts at step 0"
        return Verdict(subject, None, [why])
    n, remarks = _steps(subject, steps)
    made, more = _looked_at(subject.config, n) if remarks else (subject.config, [])
    verdict = Verdict(subject, n, [*remarks, *more])
    if n < 2:
        verdict.remarks.append("a training of one step cannot be interrupted inside")
        return verdict
    trial = Trial(subject, made, device, n)
    places = sorted(random.Random(seed).sample(range(1, n), min(times, n - 1)))
    progress(f"{subject.name}: training 1 of {len(places) + 1}, {n:,} steps without an interruption")
    whole = trial.straight()
    for number, step in enumerate(places, start=2):
        progress(f"{subject.name}: training {number} of {len(places) + 1}, interrupted after step {step:,}")
        found = trial.compare(whole, partial(trial.interrupted, step))
        verdict.interruptions.append(Interruption(step, found))
    if not verdict.equal:
        verdict.remarks.append(_why(trial, whole))
    return verdict


def _steps(subject: Subject, wanted: int | None) -> tuple[int, list[str]]:
    """How many steps to train, and what is to be said of it."""
    n = min(wanted or STEPS, subject.budget or 2**62)
    if subject.budget is None:
        return n, [f"the config does not say how many steps a run takes: trained for {n:,}"]
    return n, [f"trained for {n:,} of its {subject.budget:,} steps"] if n < subject.budget else []


def _looked_at(made: Config, steps: int) -> tuple[Config, list[str]]:
    """The config with logging and evaluations before an interruption, too, where its steps were cut short."""
    most = {name: max(1, steps // looks) for name, looks in LOOKS.items()}
    now = {name: getattr(made, name, None) for name in LOOKS}
    if hasattr(made, "eval_every"):  # where it is None there may be an interval all the same
        now["eval_every"] = made.evaluation_interval()
    wide = {name: n for name, n in most.items() if isinstance(at := now[name], int) and at > n}
    changed, _ = config.check(type(made), made.model_dump(mode="json") | wide)
    if not wide or changed is None:
        return made, []
    return changed, [f"with {name}={n}, not {now[name]}" for name, n in wide.items()]


def _why(trial: Trial, whole: Result) -> str:
    """Whether it is the interruption that makes the difference."""
    if trial.compare(whole, trial.straight):
        return (
            "two trainings without an interruption differ, too: the family draws from a source that no seed decides, "
            "or keeps something outside of its instance"
        )
    return (
        "two trainings without an interruption are equal: something that training depends on is in no checkpoint, such "
        "as a counter of the family's own, or a batch that is no pure function of config and step"
    )


class _Desk:
    """The owner of a training that keeps its points, and wishes it to stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.points: list[Point] = []
        self.stop_after, self.steps = stop_after, 0

    def record(self, step: int, points: Sequence[Point]) -> None:
        self.points += points

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        self.points += points  # never due: the only checkpoint is the one at the interruption

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Not compared: the last weights are."""

    def leave_behind(self, points: Sequence[Point]) -> None:
        self.points += points

    def wish(self) -> bool:
        self.steps += 1  # it is asked once after each step
        return self.steps == self.stop_after


@dataclass(frozen=True)
class Result:
    """All that a training leaves."""

    state: Mapping[str, Any]
    points: list[Point]  # as they were handed to the desk
    summary: Mapping[str, Any]


class Trial:
    """Trains one config again and again."""

    def __init__(self, subject: Subject, made: Config, device: torch.device, steps: int) -> None:
        self.subject, self.config, self.device, self.steps = subject, made, device, steps

    def straight(self) -> Result:
        """From the first step to the last. Raises InputError where the family's code fails."""
        desk = _Desk()
        try:
            outcome = self._train(desk)
        except RnnqError:
            raise
        except Exception as error:
            what = f"{self.subject.name} cannot be trained: {type(error).__name__}: {error}"
            raise InputError(what, "the whole trace:\n" + traceback.format_exc().rstrip()) from error
        return _result(desk.points, outcome)

    def interrupted(self, step: int) -> Result:
        """Left after a step, and resumed from what lies on the disk."""
        desk = _Desk(stop_after=step)
        left = self._train(desk)
        points = desk.points + left.points
        resumed = _through_a_file(left)
        desk = _Desk()
        outcome = self._train(desk, resumed)
        return _result(points + desk.points, outcome)

    def compare(self, whole: Result, other: Callable[[], Result]) -> list[Difference]:
        """What is different in another training; that it fails where the first one did not, is."""
        try:
            found = other()
        except Exception as error:  # a family's code can raise anything
            text = error.message if isinstance(error, RnnqError) else f"{type(error).__name__}: {error}"
            return [Difference("the training", 1, 1, None, None, f"it failed: {text}")]
        return list(differences(whole, found))

    def _train(self, desk: _Desk, resumed: Mapping[str, Any] | None = None) -> Outcome:
        _forget_random_numbers()
        return train.train(self.subject.find(), self.config, desk, self.device, self.steps, NEVER, resumed)


def _forget_random_numbers() -> None:
    """As in a fresh process: what is drawn before the loop seeds is another thing each time."""
    torch.seed()
    random.seed()
    np.random.seed(None)


def _result(points: Sequence[Point], outcome: Outcome) -> Result:
    summary = {name: value for name, value in outcome.summary.items() if name != "steps_per_s"}
    return Result(outcome.state or {}, [*points, *outcome.points], summary)


def _through_a_file(left: Outcome) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root, path = Path(folder), checkpoint.relative_path(OWNER, 1, left.step)
        aside = checkpoint.write_aside(root, path, OWNER, left.state or {})
        return checkpoint.load(root, checkpoint.publish(root, path, aside, left.step), OWNER)


# --------------------------------------------------------------------------------------------------------- comparing


def differences(whole: Result, found: Result) -> Iterator[Difference]:
    """What is not equal to the bit. Curves first: they say since when."""
    curves = list(_of_curves(_curves(whole.points), _curves(found.points)))
    yield from (replace(one, where=f"curve {one.where}") for one in curves)
    for one in _of_curves(*(_curves(result.state["curve"]) for result in (whole, found))):
        if one not in curves:  # the same is said once
            yield replace(one, where=f"the checkpoint's curve {one.where}")
    ours, theirs = _leaves(whole), _leaves(found)
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            yield Difference(
                name, 1, 1, None, None, "only without an interruption" if name in ours else "only with an interruption"
            )
        else:
            yield from _of_values(name, ours[name], theirs[name])


def _curves(points: Iterable[Sequence[Any]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for name, step, value in points:
        found.setdefault(name, {})[step] = value
    return found


def _of_curves(
    whole: Mapping[str, Mapping[int, float]], found: Mapping[str, Mapping[int, float]]
) -> Iterator[Difference]:
    for name in {**whole, **found}:
        ours, theirs = whole.get(name, {}), found.get(name, {})
        steps = sorted(ours.keys() | theirs.keys())
        other = [at for at in steps if at not in ours or at not in theirs or _bits(ours[at]) != _bits(theirs[at])]
        if other:
            apart = [abs(ours[at] - theirs[at]) for at in other if at in ours and at in theirs]
            note = "" if len(apart) == len(other) else "points are missing, or too many"
            yield Difference(name, len(other), len(steps), _largest(apart), other[0], note)


def _leaves(result: Result) -> dict[str, Any]:
    """All that must be equal, by a name for people; lists of numbers count as one thing, as tensors do."""
    state = dict(result.state)
    members, best = state.pop("members"), state.pop("best")
    state.pop("curve")
    found = {name: value for part, tree in members.items() for name, value in _named(PARTS.get(part, part), tree)}
    found |= dict(_named("best", best)) | dict(_named("summary", result.summary))
    rng = {f"{name} random numbers": value for name, value in state.pop("rng").items()}
    return found | rng | dict(_named("", state))


def _named(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _named(f"{prefix} {name}".strip(), value)
    else:
        yield prefix, tree


def _of_values(name: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        yield from _of_tensors(name, ours.detach().cpu(), theirs.detach().cpu())
        return
    first, second = _flat(ours), _flat(theirs)
    n = max(len(first), len(second))
    other = [i for i in range(n) if _bits(first[i : i + 1]) != _bits(second[i : i + 1])]
    if other:
        numbers = [(first[i], second[i]) for i in other if i < min(len(first), len(second))]
        apart = [abs(a - b) for a, b in numbers if isinstance(a, (int, float)) and isinstance(b, (int, float))]
        yield Difference(name, len(other), n, _largest(apart))


def _of_tensors(name: str, ours: Tensor, theirs: Tensor) -> Iterator[Difference]:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        note = f"{ours.dtype} {tuple(ours.shape)}, resumed {theirs.dtype} {tuple(theirs.shape)}"
        yield Difference(name, ours.numel(), ours.numel(), None, None, note)
        return
    other = (_bytes(ours) != _bytes(theirs)).any(1)  # by their bits: 0.0 is not -0.0, and a NaN equals itself
    if bool(other.any()):
        apart = [] if ours.is_complex() else (ours.double() - theirs.double()).reshape(-1)[other].abs().tolist()
        yield Difference(name, int(other.sum()), ours.numel(), _largest(apart))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8).reshape(tensor.numel(), -1)


def _largest(apart: Sequence[float]) -> float | None:
    """None where nothing that can be subtracted differs."""
    return max((float(d) for d in apart if math.isfinite(d)), default=None)


def _flat(value: Any) -> list[Any]:
    """A value as a list of plain ones: what Python's and numpy's random states are made of."""
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in _flat(part)]
    return [value]


def _bits(value: Any) -> Any:
    """Equal exactly for values that are equal to the bit."""
    return struct.pack("<d", value) if isinstance(value, float) else repr(value)
