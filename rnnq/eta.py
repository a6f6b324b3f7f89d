"""When a stage ends, and how sure that is: learnt from its finished runs. Arithmetic alone.

Like config: an open run is expected to take the seconds per step of the finished runs of its group; where there are
none, of its shape (pack key); else of the whole stage. Where a budget is not known, a run stands for a step.

The interval holds the end in about 80 of 100 cases. What it rests on:

* Finished runs tell how far like ones lie apart, as the standard deviation of log(seconds per step): runs of a group,
  groups of a shape, and, for an open run of a shape that none has finished of, the shapes of the stage. At least FREE
  degrees of freedom are asked for; where the runs of a group are too few to tell, the groups of the shape, and else
  all groups of the stage, stand in for them, which lie further apart.
* Each open run is off by its own error, which many runs average out; the runs of a group that none has finished of
  share one, as do those of such a shape. The mean of n finished ones is off by 1/sqrt(n) of the spread, for all runs
  that are reckoned by it: that error no number of open runs averages out. The spread itself, taken from few, is
  uncertain, too, and drawn anew each time (scaled inverse chi-square: so the interval of one class is Student's t).
* The end is drawn up to DRAWS times, from the same seed; the interval leaves out a tenth of the draws on either side.
  With several workers the runs are dealt out in the order of claims, the stage ends with the last of them, and the ETA
  is the middle draw. Only the last TAIL runs are dealt out one by one: all workers have work until then.

Not in it: workers that come, go or turn to other stages; machines that get slower; retries; and that of runs which
began together the short ones finish first.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

FREE = 4  # degrees of freedom behind a spread: five runs of one group, say
DRAWS = 200
TAIL = 100  # runs that are dealt out one by one, and classes that have an error of their mean each
EFFORT = 12_000  # errors drawn in all draws together: some 0.03 s
LOW, HIGH = 0.1, 0.9

Key = tuple[str, str | None]  # a class of like runs: ("group", its key), ("shape", its key), ("stage", None), ...


@dataclass(frozen=True)
class Finished:
    """What one finished run took. `size` is in steps, or 1 where runs are counted."""

    group: str
    shape: str | None
    size: float
    seconds: float


@dataclass(frozen=True)
class Left:
    """An open run: what is left of it, in the same measure. `times` open runs are like this one."""

    group: str
    shape: str | None
    size: float
    running: bool = False
    spent: float = 0.0  # seconds since it began, where runs are counted
    times: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Seconds until the end and the interval around them, and the seconds of work in it for one worker.

    Without an interval, too few runs of like config have finished.
    """

    eta_s: float
    low_s: float | None
    high_s: float | None
    work_s: float


def estimate(finished: Sequence[Finished], left: Sequence[Left], workers: int) -> Estimate:
    """When the open runs end if so many workers take them in this order, the running ones first.

    Raises ValueError without a finished run that took time and has a size.
    """
    paces = Paces(finished)
    items = [paces.expect(run) for run in left]
    work = sum(item.seconds * item.times for item in items)
    plan = Plan(items, workers)
    eta = plan.end()
    if any(item.spread is None for item in items):
        return Estimate(eta, None, None, work)
    ends = plan.draws()
    low, middle, high = (ends[round(share * (len(ends) - 1))] for share in (LOW, 0.5, HIGH))
    if workers > 1:
        eta = middle  # where each worker has few runs, the last of them ends later than it would without errors
    return Estimate(eta, min(low, eta), max(high, eta), work)


# ------------------------------------------------------------------------------------------------- what is learnt


@dataclass(frozen=True)
class Spread:
    """Standard deviation of log(seconds per step), and from how many degrees of freedom."""

    sigma: float
    free: int


@dataclass(frozen=True)
class Item:
    """An open run and what is expected of it."""

    seconds: float
    spent: float
    times: float
    running: bool
    like: Key  # the class that it is reckoned by
    behind: float  # how many units the mean of that class is taken from
    unit: Key | None  # the runs that share its error; None: it has its own
    spread: Spread | None


@dataclass
class _Class:
    size: float = 0.0
    seconds: float = 0.0
    units: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def add(self, run: Finished, unit: str) -> None:
        self.size += run.size
        self.seconds += run.seconds
        self.units[unit][0] += run.size
        self.units[unit][1] += run.seconds


class Paces:
    """The seconds per step of every class, and how far its units lie apart."""

    def __init__(self, finished: Iterable[Finished]) -> None:
        known = [run for run in finished if run.size > 0 and run.seconds > 0]
        if not known:
            raise ValueError("no finished run tells how long one takes")
        self._classes: dict[Key, _Class] = defaultdict(_Class)
        stage, shapes = _Class(), _Class()
        for number, run in enumerate(known):
            self._classes["group", run.group].add(run, str(number))
            if run.shape is not None:
                self._classes["shape", run.shape].add(run, run.group)
                shapes.add(run, run.shape)
            stage.add(run, run.group)
        self._spreads = {level: _spread(self._of(level)) for level in ("group", "shape")}
        self._spreads |= {"stage": _spread([stage]), "new shape": _spread([shapes])}
        self._classes["stage", None] = stage
        if shapes.units:
            self._classes["new shape", None] = shapes

    def _of(self, level: str) -> list[_Class]:
        return [found for key, found in self._classes.items() if key[0] == level]

    def expect(self, run: Left) -> Item:
        """What an open run is expected to take, from the finished runs that are most like it."""
        like, unit, spread = self._like(run)
        found = self._classes[like]
        seconds = run.size * found.seconds / found.size
        return Item(seconds, run.spent, run.times, run.running, like, len(found.units), unit, spread)

    def _like(self, run: Left) -> tuple[Key, Key | None, Spread | None]:
        if ("group", run.group) in self._classes:
            return ("group", run.group), None, self._known("group", "shape", "stage")
        if ("shape", run.shape) in self._classes:
            return ("shape", run.shape), ("group", run.group), self._known("shape", "stage")
        if run.shape is None or ("new shape", None) not in self._classes:  # it may be of any shape
            return ("stage", None), ("group", run.group), self._known("stage")
        return ("new shape", None), ("shape", run.shape), self._known("new shape")

    def _known(self, *levels: str) -> Spread | None:
        """The first of these spreads that enough runs tell of."""
        return next((self._spreads[level] for level in levels if self._spreads[level].free >= FREE), None)


def _spread(classes: Iterable[_Class]) -> Spread:
    squares, free = 0.0, 0
    for one in classes:
        logs = [math.log(seconds / size) for size, seconds in one.units.values()]
        mean = sum(logs) / len(logs) if logs else 0.0
        squares += sum((value - mean) ** 2 for value in logs)
        free += max(len(logs) - 1, 0)
    return Spread(math.sqrt(squares / free) if free else 0.0, free)


# ------------------------------------------------------------------------------------------------- when it ends


class Plan:
    """Open runs and the workers that share them: the running ones and the last ones one by one, the rest as sums."""

    def __init__(self, items: Sequence[Item], workers: int) -> None:
        self.workers = workers
        self.first: list[Item] = []
        self.tail: list[Item] = []
        rest = list(items)
        if workers > 1:  # for one worker the order does not matter
            pending = [item for item in items if not item.running]
            self.first = [item for item in items if item.running]
            self.tail = pending[-TAIL:]
            rest = pending[:-TAIL] + [replace(item, times=item.times - 1) for item in self.tail if item.times > 1]
        self.rest = _sums(rest)
        self._draws = min(DRAWS, max(DRAWS // 4, EFFORT // max(len(self.first) + len(self.tail) + len(self.rest), 1)))

    def end(self) -> float:
        """The end if every run took what is expected of it."""
        rest = sum(part.seconds for part in self.rest)
        return self._deal([_after(item, 1.0) for item in self.first], [item.seconds for item in self.tail], rest)

    def draws(self) -> list[float]:
        """Ends drawn at random, in order."""
        chance = random.Random(0)
        return sorted(self._draw(chance) for _ in range(self._draws))

    def _draw(self, chance: random.Random) -> float:
        errors = _Errors(chance)
        first = [_after(item, errors.factor(item)) for item in self.first]
        tail = [item.seconds * errors.factor(item) for item in self.tail]
        rest = sum(errors.sum_of(part) for part in self.rest)
        return self._deal(first, tail, rest)

    def _deal(self, first: list[float], tail: list[float], rest: float) -> float:
        """The end of the last run; every run goes to the worker that is free first."""
        if self.workers == 1:
            return rest
        free = first + [0.0] * (self.workers - len(first))
        heapq.heapify(free)
        for seconds in tail:
            heapq.heapreplace(free, free[0] + seconds)
        return max(free) + rest / self.workers


def _after(item: Item, factor: float) -> float:
    return max(item.seconds * factor - item.spent, 0.0)


@dataclass
class _Sum:
    """Many runs of one class."""

    item: Item
    seconds: float = 0.0
    units: dict[Key | None, float] = field(default_factory=lambda: defaultdict(float))  # seconds of those that share
    squares: float = 0.0  # of the seconds of those that share nothing


def _sums(items: Iterable[Item]) -> list[_Sum]:
    found: dict[Key, _Sum] = {}
    for item in items:
        part = found.setdefault(item.like, _Sum(item))
        seconds = _after(item, 1.0)
        part.seconds += seconds * item.times
        if item.unit is None:
            part.squares += seconds**2 * item.times
        else:
            part.units[item.unit] += seconds * item.times
    for part in found.values():
        part.squares += sum(seconds**2 for seconds in part.units.values())
    parts = sorted(found.values(), key=lambda part: -part.seconds)
    return parts[:TAIL] + _merged(parts[TAIL:])


def _merged(parts: Iterable[_Sum]) -> list[_Sum]:
    """Many small classes as one for each spread: the errors of their means are many, too, and independent."""
    found: dict[Spread | None, _Sum] = {}
    for part in parts:
        item = part.item
        whole = found.setdefault(item.spread, _Sum(replace(item, like=("rest of", item.like[0]), behind=math.inf)))
        whole.seconds += part.seconds
        whole.squares += part.squares + part.seconds**2 / item.behind
    return list(found.values())


class _Errors:
    """The errors of one draw: one for the mean of each class, one for each unit, one for each run without a unit."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._sigmas: dict[Spread, float] = {}
        self._means: dict[Key, float] = {}
        self._units: dict[Key, float] = {}

    def factor(self, item: Item) -> float:
        """How much longer than expected a run takes; 1 on the mean over all runs."""
        sigma = self._sigma(item)
        if item.unit is None:
            own = self._chance.gauss(0, sigma)
        else:
            own = self._kept(self._units, item.unit, sigma)
        return math.exp(own - sigma**2 / 2 + self._mean(item, sigma))

    def sum_of(self, part: _Sum) -> float:
        """The seconds that many runs of a class take; their own errors add up to a normal one."""
        sigma = self._sigma(part.item)
        own = part.seconds + self._chance.gauss(0, sigma) * math.sqrt(part.squares)
        return max(own, 0.0) * math.exp(self._mean(part.item, sigma))

    def _mean(self, item: Item, sigma: float) -> float:
        off = sigma / math.sqrt(item.behind)
        return self._kept(self._means, item.like, off) - off**2 / 2

    def _sigma(self, item: Item) -> float:
        spread = item.spread
        assert spread is not None
        if spread not in self._sigmas:
            chi_square = self._chance.gammavariate(spread.free / 2, 2)
            self._sigmas[spread] = spread.sigma * math.sqrt(spread.free / chi_square)
        return self._sigmas[spread]

    def _kept(self, kept: dict[Key, float], key: Key, sigma: float) -> float:
        if key not in kept:
            kept[key] = self._chance.gauss(0, sigma)
        return kept[key]
