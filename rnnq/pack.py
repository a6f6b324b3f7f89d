"""Which runs train together, how many, and the certificate that it changes no bit.

Nothing is assumed of a shape: how fast a pack of so many members is, and whether each of them keeps the bits that it
has alone, is tried on this device before such a pack is trained, and remembered. Kernels may treat the last few
numbers of a tensor otherwise than those before them, so at odd shapes members of a pack do differ: there each run is
trained alone.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rnnq.config import Config, as_json
from rnnq.errors import is_out_of_memory
from rnnq.families.base import Family
from rnnq.train import Member, Shrink, Training

MOST = 32  # members that `auto` tries: beyond it a CPU's cache is left, and a kill takes more with it
STEPS = 20  # of the certificate
ROUND = 0.1  # seconds that a size is timed for, at least two steps; three rounds
WORTH = 20.0  # seconds: what waits must take longer than that, alone, for sizes to be tried
CLOSE = 0.95  # of two sizes whose speed is as near as that the smaller one is better: less is lost with a worker
GIVEN_UP = 0.85  # a size so much slower than the best before it: larger ones are not tried
ROOM = 0.5  # of the free memory that a pack may be expected to take


@dataclass(frozen=True)
class Size:
    """What is known of packs of so many members, of one shape, on one device."""

    members: int
    equal: bool | None = None  # whether each member has the bits that it has alone; None: not tried
    rate: float | None = None  # member-steps per second; None: not timed
    fits: bool = True  # false once memory was out


class Memory(Protocol):
    """Where findings are kept, for all workers."""

    def recall(self, shape: str) -> Sequence[Size]:
        """All that is known of a shape."""

    def remember(self, shape: str, size: Size) -> None:
        """A finding; of one size the newest counts."""


def shape(family: str, config: Config, numerics: Mapping[str, Any]) -> str:
    """What a finding holds for: the family and its version, the pack key, and all that the bits depend on."""
    return as_json({"family": f"{family} {config.version}", "pack_key": config.pack_key(), "numerics": numerics})


def ladder(most: int) -> list[int]:
    """Sizes from `most` down in steps of about a quarter to a third: 32, 24, 16, 12, 8, 6, 4, 3, 2, 1."""
    whole = [n for i in range(most.bit_length()) for n in (2**i, 3 * 2**i) if n < most]
    return sorted({most, *whole}, reverse=True)


def can_pack(family: Any, config: Config) -> bool:
    """Whether such runs can be trained side by side at all: third-level families that name a pack key."""
    return isinstance(family, Family) and family.stacks and config.pack_key() is not None


class Planner:
    """How many runs of a shape to train together. `wanted` is that number, or None to find the fastest."""

    def __init__(
        self,
        wanted: int | None,
        device: torch.device,
        memory: Memory,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.wanted, self.device, self.memory, self.say = wanted, device, memory, say
        self._known: dict[str, dict[int, Size]] = {}

    def best(self, trial: Trial, pending: int, workers: int) -> int:
        """How many of `pending` such runs to claim now, so that as many workers have something to do.

        Sizes are timed where these runs are worth the time; a size is certified before it is named.
        """
        known = self._recall(trial.shape)
        if self.wanted is None and not any(size.rate is not None for size in known.values()):
            self._time(trial, pending)
        share = max(1, -(-pending // max(1, workers)))
        for wanted in ladder(self.wanted) if self.wanted else _by_speed(known):
            n = next(n for n in ladder(wanted) if n <= share)
            if self.is_certified(trial, n):
                return n
        return 1

    def is_certified(self, trial: Trial, members: int) -> bool:
        """Whether packs of this size may be trained; tried now if it never was."""
        if members == 1:
            return True
        known = self._recall(trial.shape)
        size = known.get(members, Size(members))
        if not size.fits:
            return False
        if size.equal is None:
            size = self._remember(trial.shape, _tried(lambda: trial.certify(members), size))
        return bool(size.equal)

    def shrink(self, trial: Trial) -> Shrink:
        """When a pack gets smaller: once a quarter has ended, to the next certified size that holds the rest."""

        def to(active: int, held: int) -> int | None:
            if active == 0 or 4 * active > 3 * held:
                return None
            fitting = [n for n in reversed(ladder(held)) if active <= n < held]
            return next((n for n in fitting if self.is_certified(trial, n)), None)

        return to

    def ran_out(self, trial: Trial, members: int) -> None:
        """Memory was out in a pack of this size."""
        known = self._recall(trial.shape)
        self._remember(trial.shape, replace(known.get(members, Size(members)), fits=False))

    def _recall(self, shape: str) -> dict[int, Size]:
        if shape not in self._known:
            self._known[shape] = {size.members: size for size in self.memory.recall(shape)}
        return self._known[shape]

    def _remember(self, shape: str, size: Size) -> Size:
        self._known[shape][size.members] = size
        self.memory.remember(shape, size)
        return size

    def _time(self, trial: Trial, pending: int) -> None:
        if pending < 2 or trial.seconds_alone() * pending < WORTH:
            return
        self.say(f"trying how many runs like {trial.config.label()} train best together")
        for size in trial.time([n for n in (1, 2, 4, 8, 16, 32) if n <= MOST]):
            known = self._known[trial.shape].get(size.members, size)
            self._remember(trial.shape, replace(known, rate=size.rate, fits=size.fits))
        tried = self._known[trial.shape]
        alone, best = tried[1].rate, tried[_by_speed(tried)[0]]
        if alone and best.rate:
            self.say(f"packs of {best.members}: {best.rate / alone:.1f} times the steps per second of one run alone")


def _by_speed(known: Mapping[int, Size]) -> list[int]:
    """The smallest of the sizes that are about as fast as the fastest, and then ever slower ones down to one alone."""
    timed = {n: size.rate for n, size in known.items() if size.rate is not None and size.fits}
    ordered = []
    while timed:
        best = max(timed.values())
        first = min(n for n, rate in timed.items() if rate >= CLOSE * best)
        ordered.append(first)
        if first == 1:
            break
        timed = {n: rate for n, rate in timed.items() if n < first}
    return ordered or [1]


def _tried(certify: Callable[[], bool], size: Size) -> Size:
    try:
        return replace(size, equal=certify())
    except Exception as error:
        if is_out_of_memory(error):
            return replace(size, fits=False)
        # code that fails in a pack may do well alone, and else will say there what is wrong
        return replace(size, equal=False)


# ----------------------------------------------------------------------------------------------------------- trials


class _Idle:
    """The desk of runs that nobody keeps."""

    def record(self, step: int, points: Any) -> None: ...
    def save(self, step: int, points: Any, state: Any) -> None: ...
    def leave_behind(self, points: Any) -> None: ...
    def wish(self) -> bool:
        return False


class Trial:
    """Trains runs like a given one, for what can be learnt of them. `make` gives its family anew."""

    def __init__(
        self,
        make: Callable[[], Any],
        name: str,
        config: Config,
        budget: int,
        device: torch.device,
        numerics: Mapping[str, Any],
    ) -> None:
        self.make, self.config, self.budget, self.device = make, config, budget, device
        self.shape = shape(name, config, numerics)
        self._alone: float | None = None

    def _members(self, seeds: Sequence[int], first: int = 0) -> list[Member]:
        """Runs that differ by their seeds; with `first` their first steps differ, too."""
        found = []
        for k in seeds:
            seed = (self.config.seed + k) % 2**31
            member = Member(self.config.model_copy(update={"seed": seed}), _Idle(), self.budget)
            member.step = min(k % 3 if first else 0, max(0, self.budget - STEPS))
            found.append(member)
        return found

    def seconds_alone(self) -> float:
        """What one such run takes alone, roughly, evaluations aside."""
        if self._alone is None:
            training = Training(self.make(), self._members([0]), self.device)
            self._alone = self.budget / _rate(training)
        return self._alone

    def time(self, sizes: Sequence[int]) -> list[Size]:
        """Member-steps per second of packs of these sizes, ascending; up to where more members only cost.

        Medians of three rounds in which all sizes take turns.
        """
        rates: dict[int, list[float]] = {}
        found: dict[int, Training] = {}
        for n in sizes:
            try:
                peak = _peak(self.device)
                found[n] = Training(self.make(), self._members(range(n)), self.device)
                rates[n] = [_rate(found[n])]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return [*_medians(rates), Size(n, fits=False)]
            best = max(max(each) for each in rates.values())
            if rates[n][0] < GIVEN_UP * best or 2 * (_peak(self.device) - peak) > ROOM * _free(self.device):
                break
        for _ in range(2):
            for n, training in found.items():
                rates[n].append(_rate(training))
        return _medians(rates)

    def certify(self, members: int) -> bool:
        """Train a pack and its members alone, some steps each, and compare all that they hold, to the bit."""
        seeds = range(members)
        together = Training(self.make(), self._members(seeds, first=1), self.device)
        steps = max(1, min(STEPS, self.budget))
        before = torch.get_rng_state()
        for _ in range(steps):
            together.update()
        if not torch.equal(before, torch.get_rng_state()):
            return False  # it draws from the global numbers, which members of a pack would share
        measured = together.measure("val")
        for k in seeds:
            alone = Training(self.make(), self._members([k], first=1), self.device)
            for _ in range(steps):
                alone.update()
            same_state = _equal(together.tensors(k), alone.tensors(0))
            if not same_state or repr(measured[k]) != repr(alone.measure("val")[0]):  # a NaN equals itself
                return False
        return True


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(_same_bits(ours[name], theirs[name]) for name in ours)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _rate(training: Training) -> float:
    """Member-steps per second, over ROUND seconds and two steps at least."""
    for _ in range(2):
        _step(training)
    _wait(training)
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < ROUND:
        _step(training)
        steps += 1
        if training.device.type == "cuda":
            _wait(training)  # else the clock would see how fast work is handed over
    return training.size * steps / (time.perf_counter() - began)


def _step(training: Training) -> None:
    for member in training.active:
        if member.is_at_end():
            member.step = 0  # there may be no data beyond it
    training.update()


def _wait(training: Training) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize(training.device)


def _medians(rates: Mapping[int, Sequence[float]]) -> list[Size]:
    return [Size(n, rate=statistics.median(each)) for n, each in rates.items()]


def _peak(device: torch.device) -> int:
    """Bytes that this process has held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free(device: torch.device) -> int:
    """Bytes that are free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 2**62  # the system does not tell
