"""Which runs train together, how many, and the certificate that it changes no bit.

Nothing is assumed of a shape: how fast a pack of so many members is, and whether each of them keeps the bits that it
has alone, is tried on this device before such a pack is trained, and remembered. Kernels may treat the last few
numbers of a tensor otherwise than those before them, so at odd shapes members of a pack do differ: there each run is
trained alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rnnq.config import Config, as_json
from rnnq.errors import is_out_of_memory
from rnnq.families.base import Family
from rnnq.train import Member, NoDesk, Shrink, Training, random_state

MOST = 32  # members that `auto` tries: beyond it a CPU's cache is left, and a kill takes more with it
STEPS = 20  # of the certificate
ROUND = 0.1  # seconds that a size is timed for, at least two steps; three rounds
WORTH = 20.0  # seconds: what waits must take longer than that, alone, for sizes to be tried
CLOSE = 0.95  # of two sizes whose speed is as near as that the smaller one is better: less is lost with a worker
GIVEN_UP = 0.85  # a size so much slower than the best before it: larger ones are not tried
MOST_EVER = 1024  # members that may be asked for
CHEAP = 0.05  # of the steps that are to be done: what a trial may take
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


def shape(family: str, config: Config, numerics: Mapping[str, Any], code: str | None) -> str:
    """What a finding holds for: the family, its version and code, the pack key, and all that the bits depend on."""
    name = f"{family} {config.version}"
    return as_json({"family": name, "code": code, "pack_key": config.pack_key(), "numerics": numerics})


def ladder(most: int) -> list[int]:
    """Sizes from `most` down in steps of about a quarter to a third: 32, 24, 16, 12, 8, 6, 4, 3, 2, 1."""
    whole = [n for i in range(most.bit_length()) for n in (2**i, 3 * 2**i) if n < most]
    return sorted({most, *whole}, reverse=True)


def can_pack(family: Any, config: Config) -> bool:
    """Whether such runs can be trained side by side at all: third-level families that name a pack key."""
    return isinstance(family, Family) and family.stacks and config.pack_key() is not None


_Hashes = dict[str, tuple[torch.dtype, torch.Size, bytes]]


class Undecided(Exception):
    """A trial that shows nothing: of NaN all are equal."""


class Interrupted(Exception):
    """A trial that was given up: this worker is to leave."""


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
        self._tried: set[str] = set()  # shapes that are not tried once more by this process, whatever came of it

    def best(self, trial: Trial, pending: int, workers: int) -> int:
        """How many of `pending` such runs to claim now, so that as many workers have something to do.

        Only of sizes that have their certificate; nothing is tried.
        """
        known, share = self._recall(trial.shape), _share(pending, workers)
        wanted = self.wanted or _fastest(known)
        return next(n for n in ladder(wanted) if n <= share and self.is_certified(trial, n))

    def is_to_try(self, trial: Trial, pending: int, workers: int) -> bool:
        """Whether something may be found out that is worth the time."""
        known, share = self._recall(trial.shape), _share(pending, workers)
        if pending < 2:
            return False
        if self.wanted is None and not any(size.rate is not None for size in known.values()):
            return trial.shape not in self._tried
        n = self._next(known, self.wanted or _fastest(known), share)
        is_worth = self.wanted is not None or 40 * n < 4 * CHEAP * pending * trial.budget
        return n > 1 and known.get(n, Size(n)).equal is None and is_worth

    @staticmethod
    def _next(known: Mapping[int, Size], wanted: int, share: int) -> int:
        """The largest size of which nothing bad is known."""
        sizes = (known.get(n, Size(n)) for n in ladder(wanted) if n <= share)
        return next(size.members for size in sizes if size.members == 1 or (size.fits and size.equal is not False))

    def find_out(self, trial: Trial, pending: int, workers: int) -> None:
        """Time sizes and certify the best, and those that it may shrink to. Raises what a broken device raises."""
        try:
            self._find_out(trial, pending, workers)
        finally:
            _give_back(self.device)

    def _find_out(self, trial: Trial, pending: int, workers: int) -> None:
        known, share = self._recall(trial.shape), _share(pending, workers)
        if self.wanted is None and not any(size.rate is not None for size in known.values()):
            self._tried.add(trial.shape)
            if trial.seconds_alone() * pending < WORTH:
                self._tried.discard(trial.shape)  # more may come
                return
            self._time(trial, pending)
        wanted = self.wanted or _fastest(known)
        n = next(n for n in ladder(wanted) if n <= share and (n == 1 or self._certify(trial, n)))
        # 40 member-steps for each member of a size; the halves take as much again, all together
        while (n := n // 2) > 1 and 80 * n < CHEAP * pending * trial.budget:
            self._certify(trial, n)

    def is_certified(self, trial: Trial, members: int) -> bool:
        """Whether packs of this size may be trained."""
        size = self._recall(trial.shape).get(members, Size(members))
        return members == 1 or (size.fits and bool(size.equal))

    def _certify(self, trial: Trial, members: int) -> bool:
        size = self._recall(trial.shape).get(members, Size(members))
        if size.equal is None and size.fits:
            try:
                size = self._remember(trial.shape, replace(size, equal=trial.certify(members)))
            except (Interrupted, torch.AcceleratorError):
                raise
            except (Exception, SystemExit) as error:
                # only what a comparison has shown is told to others: an error may be this process's own
                lacks_room = isinstance(error, Exception) and is_out_of_memory(error)
                self._known[trial.shape][members] = replace(size, equal=False, fits=not lacks_room)
        return self.is_certified(trial, members)

    def shrink(self, trial: Trial) -> Shrink:
        """When a pack gets smaller: once a quarter has ended, to the next certified size that holds the rest."""

        def to(active: int, held: int) -> int | None:
            if active == 0 or 4 * active > 3 * held:
                return None
            return next((n for n in range(active, held) if self.is_certified(trial, n)), None)

        return to

    def split(self, trial: Trial, n: int) -> int:
        """The largest pack that n runs may begin with."""
        return next(size for size in range(n, 0, -1) if self.is_certified(trial, size))

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
        self.say(f"trying how many runs like {trial.config.label()} train best together")
        # of each size some twelve steps, as long as that is little beside what is to be done
        most = CHEAP * pending * trial.budget / 12
        for size in trial.time([n for n in (1, 2, 4, 8, 16, 32) if n <= min(MOST, max(2, most))]):
            known = self._known[trial.shape].get(size.members, size)
            self._remember(trial.shape, replace(known, rate=size.rate, fits=size.fits))
        tried = self._known[trial.shape]
        alone, best = tried[1].rate, tried[_fastest(tried)]
        if alone and best.rate:
            self.say(f"packs of {best.members}: {best.rate / alone:.1f} times the steps per second of one run alone")


def _fastest(known: Mapping[int, Size]) -> int:
    """The smallest of the sizes that are about as fast as the fastest; 1 where none was timed."""
    timed = {n: size.rate for n, size in known.items() if size.rate is not None and size.fits}
    best = max(timed.values(), default=0.0)
    return min((n for n, rate in timed.items() if rate >= CLOSE * best), default=1)


def _share(pending: int, workers: int) -> int:
    """What one worker may take of what waits."""
    return max(1, -(-pending // max(1, workers)))


# ----------------------------------------------------------------------------------------------------------- trials


class Trial:
    """Trains runs like a given one, for what can be learnt of them.

    `make` gives its family anew; `code` says which code that is. `on_step` is called before each step: what it raises
    ends the trial.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        name: str,
        config: Config,
        budget: int,
        device: torch.device,
        numerics: Mapping[str, Any],
        code: str | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.make, self.config, self.budget, self.device, self.on_step = make, config, budget, device, on_step
        self.shape = shape(name, config, numerics, code)
        self._alone: float | None = None
        # what members came to alone, which is the same whatever the size of a pack
        self._lone: dict[int, tuple[_Hashes, list[str]]] = {}

    def _members(self, seeds: Sequence[int], first: int = 0) -> list[Member]:
        """Runs that differ by their seeds; with `first` their first steps differ, too."""
        found = []
        for k in seeds:
            seed = (self.config.seed + k) % 2**31
            member = Member(self.config.model_copy(update={"seed": seed}), NoDesk(), self.budget)
            member.step = min(k % 3 if first else 0, max(0, self.budget - STEPS))
            found.append(member)
        return found

    def seconds_alone(self) -> float:
        """What one such run takes alone, roughly, evaluations aside."""
        if self._alone is None:
            self._alone = self.budget / self._rate(self._training(self._members([0])))
        return self._alone

    def time(self, sizes: Sequence[int]) -> list[Size]:
        """Member-steps per second of packs of these sizes, ascending; up to where more members only cost.

        Medians of three rounds in which all sizes take turns.
        """
        rates: dict[int, list[float]] = {}
        found: dict[int, Training] = {}
        for n in sizes:
            try:
                held = _in_use(self.device)
                found[n] = self._training(self._members(range(n)))
                rates[n] = [self._rate(found[n])]
            except (Interrupted, torch.AcceleratorError):
                raise
            except (Exception, SystemExit) as error:
                found.pop(n, None)
                if isinstance(error, Exception) and is_out_of_memory(error):
                    return [*_medians(rates), Size(n, fits=False)]
                if n == 1:
                    raise
                break  # what is larger fails, too; what was timed may do
            best = max(max(each) for each in rates.values())
            if rates[n][0] < GIVEN_UP * best or 2 * (_in_use(self.device) - held) > ROOM * _free(self.device):
                break
        for _ in range(2):
            for n, training in found.items():
                rates[n].append(self._rate(training))
        return _medians(rates)

    def certify(self, members: int) -> bool:
        """Train a pack and its members alone, some steps each, and compare all that they hold, to the bit.

        Raises Undecided where that is not finite: of NaN all are equal.
        """
        seeds = range(members)
        together = self._training(self._members(seeds, first=1))
        before = random_state(self.device)
        self._advance(together)
        measured = [together.measure(split) for split in SPLITS]
        if not _same_numbers(before, random_state(self.device)):
            return False  # it draws from the global numbers, which members of a pack would share
        # a NaN that was measured equals itself
        return all(
            self._what_alone(k) == (_hashes(together.tensors(k)), [repr(each[k]) for each in measured]) for k in seeds
        )

    def _what_alone(self, k: int) -> tuple[_Hashes, list[str]]:
        """What member k holds after its steps alone, as hashes, and what it measures. Raises Undecided."""
        if k not in self._lone:
            alone = self._training(self._members([k], first=1))
            self._advance(alone)
            held = alone.tensors(0)
            if not all(bool(torch.isfinite(t).all()) for t in held.values() if t.is_floating_point()):
                raise Undecided
            self._lone[k] = _hashes(held), [repr(alone.measure(split)[0]) for split in SPLITS]
        return self._lone[k]

    def _training(self, members: Sequence[Member]) -> Training:
        self.on_step()
        return Training(self.make(), members, self.device)

    def _advance(self, training: Training) -> None:
        for _ in range(max(1, min(STEPS, self.budget))):
            self.on_step()
            training.update()

    def _rate(self, training: Training) -> float:
        """Member-steps per second, over ROUND seconds and two steps at least."""
        for _ in range(2):
            self._step(training)
        _wait(training)
        began, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - began < ROUND:
            self._step(training)
            steps += 1
            _wait(training)  # else the clock would see how fast work is handed over
        return training.size * steps / (time.perf_counter() - began)

    def _step(self, training: Training) -> None:
        self.on_step()
        for member in training.active:
            if member.is_at_end():
                member.step = 0  # there may be no data beyond it
        training.update()


SPLITS = ("val", "test")


def _same_numbers(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the global random numbers stand where they stood."""
    tensors = [name for name in a if isinstance(a[name], Tensor)]
    return all(torch.equal(a[n], b[n]) for n in tensors) and all(a[n] == b[n] for n in a.keys() - set(tensors))


def _hashes(held: Mapping[str, Tensor]) -> _Hashes:
    """Of each tensor its kind and its bits."""
    return {name: (t.dtype, t.shape, hashlib.sha256(_bytes(t)).digest()) for name, t in held.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _wait(training: Training) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize(training.device)


def _medians(rates: Mapping[int, Sequence[float]]) -> list[Size]:
    return [Size(n, rate=statistics.median(each)) for n, each in rates.items()]


def _in_use(device: torch.device) -> int:
    """Bytes that this process holds; on a GPU with what it held at most since it was asked last."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0  # the system does not tell


def _give_back(device: torch.device) -> None:
    """To other workers on the GPU, what a trial took there and torch would keep for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free(device: torch.device) -> int:
    """Bytes that may be had now: what files are cached in may go."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 2**62
