"""What the training loop is handed for each run that a worker holds: writes, each of them fenced.

Runs of a pack end one by one, and are resumed apart from each other; only their points go into the database together,
in one transaction, so that a pack waits for the disk no more often than a run alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import Engine

from rnnq import checkpoint, db, queue, train
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import DatabaseError, LeaseLost
from rnnq.queue import Claim, Point

T = TypeVar("T")

FLUSH = 1.0  # seconds between two writes of points, so that many short runs do not fight for the lock
AWAY = 1800.0  # seconds that the database may be away before a worker gives up
HELD = 1_000_000  # points that wait in memory while it is away; with more, training waits, too
SHORT = 2.0  # seconds that a training run waits for the write lock before it trains on
_jitter = random.Random()  # our own: a family draws from the global one, and its draws must not depend on our waits


class Holder(Protocol):
    """The worker, as far as its desks need it."""

    engine: Engine
    root: Path
    study: str

    def watch(self, event: str, details: Mapping[str, Any]) -> None:
        """Tell whoever watches."""

    def insist(self, write: Callable[[], T]) -> T:
        """Do it, and again while the database is away."""

    def is_to_stop(self) -> bool:
        """Whether to checkpoint, give back and leave."""

    def is_lost(self, claim: Claim) -> bool:
        """Whether a beat has found that a run is no longer ours."""

    def wish_of(self, claim: Claim) -> str | None:
        """What was wished of a run: cancel, pause."""


class Desks:
    """The desks of the runs that are trained together."""

    def __init__(self, holder: Holder, claims: Sequence[Claim]) -> None:
        self.holder = holder
        self.all = [RunDesk(self, claim) for claim in claims]
        self.due = time.monotonic() + FLUSH  # when points are written next
        self.away: float | None = None  # since when the database does not answer
        self.stepped, self.slowest = time.monotonic(), 0.0  # the end of the last step; seconds that the slowest took

    @property
    def open(self) -> list[RunDesk]:
        """Those of runs that have not ended."""
        return [desk for desk in self.all if desk.ended is None]

    def waiting(self) -> int:
        """Points that wait in memory."""
        return sum(len(desk.waiting) for desk in self.all)

    def flush(self, insist: bool = False) -> None:
        """Write what waits, when the last write is long enough ago. Where that cannot be done, training goes on.

        To `insist`, as with more points than memory should hold, is to wait until it can be done.
        """
        if time.monotonic() < self.due and not insist:
            return
        desks = [desk for desk in self.open if desk.waiting or desk.step != desk.written]

        def write(patience: float = db.BUSY) -> list[int]:
            progress = [(desk.claim, desk.step, desk.waiting) for desk in desks]
            return queue.record_together(self.holder.engine, progress, patience)

        if insist or self.waiting() >= HELD:
            lost = self.holder.insist(write)
        else:
            try:
                lost = write(SHORT)
            except DatabaseError as error:
                self.is_away(error)
                return
        for desk in desks:
            desk.waiting, desk.written, desk.lost = [], desk.step, desk.claim.run in lost
        self.answered()

    def answered(self) -> None:
        """The database has taken what it was given."""
        self.due, self.away = time.monotonic() + FLUSH, None

    def is_away(self, error: DatabaseError) -> None:
        """Try again after a while. Raises the error once that has gone on for too long."""
        now = time.monotonic()
        self.away = self.away or now
        if now - self.away > AWAY:
            raise error
        self.due = now + _jitter.uniform(0.5, 1.5) * min(30.0, max(FLUSH, now - self.away))
        self.holder.watch("away", {"message": error.message, "waiting": self.waiting()})


class RunDesk:
    """The desk of one run."""

    def __init__(self, desks: Desks, claim: Claim) -> None:
        self.desks, self.holder, self.claim = desks, desks.holder, claim
        self.owner = Owner(self.holder.study, claim.stage, claim.run, claim.fingerprint)
        self.numerics: dict[str, Any] = {}
        self.primary = "loss"  # the metric that the row's loss holds
        self.exact = True
        self.waiting: list[Point] = []
        self.step = self.written = claim.steps_done  # of the points that wait, and of those that are written
        self.lost = False  # a write has found that the run is not ours
        self.began = time.monotonic()
        self.ended: str | None = None  # how

    def wish(self) -> bool:
        """Whether to checkpoint and stop. Raises LeaseLost once it is known that the run is not ours."""
        now, desks = time.monotonic(), self.desks
        desks.slowest, desks.stepped = max(desks.slowest, now - desks.stepped), now
        if self.lost or self.holder.is_lost(self.claim):
            raise LeaseLost(f"run {self.claim.run} attempt {self.claim.attempt} is no longer ours")
        return self.holder.is_to_stop() or self.holder.wish_of(self.claim) is not None

    def record(self, step: int, points: Sequence[Point]) -> None:
        """Keep points, and write them, with those of the whole pack, when the last write is long enough ago."""
        self.waiting += points
        self.step = step
        self.desks.flush()
        self.holder.watch("recorded", {"claim": self.claim, "step": step, "points": points})

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """A checkpoint: first the file, then the row that names it, then the file that it no longer names."""
        if self.desks.away is not None and time.monotonic() < self.desks.due:
            self.waiting += points
            return  # no row could name the file, and the disk may be what is full
        self._keep(step, points, state)

    def snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Weights, as an artifact. Waits for a database that is away: a snapshot comes but once. Raises LeaseLost."""
        self._wait_for_the_database()
        saved = self._file(step, state, "-snapshot")
        engine, claim = self.holder.engine, self.claim
        self._remove(self.holder.insist(lambda: queue.snapshot(engine, claim, asdict(saved))))
        self.holder.watch("snapshot", {"claim": claim, "step": step, "path": saved.path})

    def _keep(self, step: int, points: Sequence[Point], state: Mapping[str, Any], insist: bool = False) -> None:
        self.waiting += points
        self.step = step
        saved = self._file(step, state)
        if self._write(saved, insist):
            self.holder.watch("saved", {"claim": self.claim, "step": step, "path": saved.path, "points": points})

    def _write(self, saved: Saved, insist: bool) -> bool:
        """Write what waits, and a checkpoint; whether that could be done. While it cannot, training goes on.

        A file that no row has come to name is garbage, and the next one is made in its time. To `insist`, as with
        more points than memory should hold, is to wait until it can be done. Raises LeaseLost.
        """

        def write(patience: float = db.BUSY) -> list[str]:
            return queue.record(self.holder.engine, self.claim, self.step, self.waiting, asdict(saved), patience)

        if insist or self.desks.waiting() >= HELD:
            old = self.holder.insist(write)
        else:
            try:
                old = write(SHORT)
            except DatabaseError as error:
                self.desks.is_away(error)
                return False
        self.waiting, self.written = [], self.step
        self.desks.answered()
        self._remove(old)
        return True

    def _wait_for_the_database(self) -> None:
        """Before a last file is made: that the database cannot be written may be for want of room on the disk."""
        if self.desks.away is not None:
            self.desks.flush(insist=True)

    def leave_behind(self, points: Sequence[Point]) -> None:
        """What was measured and not yet handed over when training ended by an error; `fail` writes it."""
        self.waiting += points

    def give_back(self, outcome: train.Outcome) -> str:
        """Checkpoint and release; returns what that came to: released, or cancelled. Raises LeaseLost."""
        if outcome.state is not None:
            self._wait_for_the_database()
            self._keep(outcome.step, outcome.points, outcome.state, insist=True)
        wish = self.holder.wish_of(self.claim)
        why = {"pause": "its stage was paused", "cancel": "it was cancelled"}.get(wish or "", "asked to stop")
        state = self.holder.insist(lambda: queue.release(self.holder.engine, self.claim, why))
        return "cancelled" if state == "cancelled" else "released"

    def finish(self, outcome: train.Outcome) -> None:
        """The final checkpoint, then everything else in one transaction. Raises LeaseLost."""
        engine, claim = self.holder.engine, self.claim
        last = best = None
        self._wait_for_the_database()
        if outcome.state is not None:
            last = self._file(outcome.step, outcome.state)
            best = self._best(outcome, last)
        files = {name: asdict(saved) for name, saved in (("checkpoint", last), ("best", best)) if saved}
        points = [*self.waiting, *outcome.points]
        self._remove(
            self.holder.insist(
                lambda: queue.finish(engine, claim, outcome.step, outcome.summary, self.primary, points, **files)
            )
        )

    def _remove(self, paths: Sequence[str]) -> None:
        """Only files of this very run: a row may come from anywhere, and name another's."""
        checkpoint.remove(self.holder.root, [path for path in paths if checkpoint.belongs(self.owner, path)])

    def _best(self, outcome: train.Outcome, last: Saved) -> Saved | None:
        if outcome.best is None or outcome.best["step"] == outcome.step:
            return last if outcome.best else None
        return self._file(outcome.best["step"], outcome.best, "-best")

    def _file(self, step: int, state: Mapping[str, Any], kind: str = "") -> Saved:
        path = checkpoint.relative_path(self.owner, self.claim.attempt, step, kind)
        whole = {**state, "numerics": self.numerics, "exact": self.exact, "data": dict(self.claim.data)}
        aside = checkpoint.write_aside(self.holder.root, path, self.owner, whole)
        self.holder.watch("written", {"claim": self.claim, "step": step, "aside": aside})
        return checkpoint.publish(self.holder.root, path, aside, step)
