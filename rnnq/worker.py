"""A process that claims runs and trains them, one after the other, until there are none left for it.

The main thread trains; a second one beats for the runs that are held. Whoever watches (a progress bar, a test)
gets events by name: started, claimed, restored, recorded, written (a checkpoint aside), saved, done, failed,
delayed (failed, to be tried again), released, cancelled, lost, reaped, away (the database), idle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, TypeVar

import torch
from sqlalchemy import Engine

import rnnq
from rnnq import checkpoint, config, db, families, host, logs, processes, queue, sweep, train
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import (
    CheckpointError,
    DatabaseError,
    DataError,
    InputError,
    LeaseLost,
    RnnqError,
    WorkerBroken,
    is_out_of_memory,
    text_of,
)
from rnnq.families.base import Family, Generator
from rnnq.queue import Claim, Point
from rnnq.train import Every

Watcher = Callable[[str, Mapping[str, Any]], None]
T = TypeVar("T")

FLUSH = 1.0  # seconds between two writes of points, so that many short runs do not fight for the lock
IDLE = 1.0  # seconds between two looks for work
AWAY = 1800.0  # seconds that the database may be away before a worker gives up
HELD = 1_000_000  # points of a run that wait in memory while it is away; of more, the run stops and waits, too
SHORT = 2.0  # seconds that a training run waits for the write lock before it trains on
QUICK = 60.0  # a run that fails sooner may have failed for the worker's sake
BREAKER = 5  # different runs that fail so in a row, without one that ends well between them: then the worker leaves
STALL = 900.0  # seconds without a step, or fifty times the slowest step so far if that is more: the run is stalled
_jitter = random.Random()  # our own: a family draws from the global one, and its draws must not depend on our waits


@dataclass(frozen=True)
class Scope:
    """What a worker may claim, and when it leaves."""

    stage: str | None = None
    runs: int | None = None  # leave after so many
    drain: bool = False  # leave when nothing is claimable now
    wait: bool = False  # never leave


def pick_device(gpu: int | None, device: str) -> torch.device:
    """The device of a worker: `--gpu N`, or cpu, cuda:N, auto. Raises InputError for one that is not there."""
    count = torch.cuda.device_count()
    wanted = f"cuda:{gpu}" if gpu is not None else device
    if wanted == "auto":
        wanted = "cuda:0" if count else "cpu"
    try:
        found = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"--device {wanted}: there is no such device", "cpu, cuda:0, or auto") from error
    if found.type == "cuda" and (found.index or 0) >= count:
        there = f"{count} GPU{'s' if count != 1 else ''} here" if count else "no GPU here"
        raise InputError(f"there is no GPU {found.index or 0}: {there}", "`--device cpu` does without")
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"--device {wanted}: rnnq computes on cpu and cuda", "cpu, cuda:0, or auto")
    return found


def prepare(device: torch.device) -> None:
    """One thread on a CPU, so that workers side by side do not fight; deterministic kernels on a GPU."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


class Worker:
    """One worker. `work()` returns the exit code: 1 when a run that it trained ended failed."""

    def __init__(
        self,
        engine: Engine,
        device: torch.device,
        scope: Scope,
        defs: Path,
        every: Every,
        watch: Watcher,
        keep_logs: bool = True,
        keep_going: bool = False,
    ) -> None:
        self.engine, self.device, self.scope, self.defs, self.every = engine, device, scope, defs, every
        self._watch, self.keep_logs, self.keep_going = watch, keep_logs, keep_going
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.study, self.lease, self.root = db.study(engine)
        self.stop = Stop()
        self.pulse = Pulse(engine, self.id, self.lease, self._reaped, self._look_for_stall)
        commit, dirty = host.git_state(Path.cwd())
        self.provenance = {
            "host": host.name(),
            "device": str(device),
            "git_commit": commit,
            "git_dirty": dirty,
            "command_line": host.command_line(),
            "versions": json.dumps(host.versions(), sort_keys=True),
        }
        self.unfit: dict[str, _NotHere] = {}  # stages whose code or data this machine lacks
        self.device_broke = False
        self.desk: RunDesk | None = None  # of the run that is being trained
        self.waits = False  # for the database, with a write that training cannot go on without
        self._looked = time.monotonic()
        self.delay = host.seconds_from_environment("RNNQ_RETRY_S", queue.DELAY)
        self.stall = host.seconds_from_environment("RNNQ_STALL_S", STALL)
        self.quick: list[tuple[Claim, str, str]] = []  # runs that failed at once, in a row: why, and at which place
        self._definitions: dict[tuple[str, str], sweep.Definition] = {}

    def watch(self, event: str, details: Mapping[str, Any]) -> None:
        """Tell whoever watches. That a terminal or a pipe has gone must neither fail a run nor still the heart."""
        with contextlib.suppress(OSError):
            self._watch(event, details)

    # ------------------------------------------------------------------------------------------------ the life

    def work(self) -> int:
        """Register, beat, train until the scope is empty or a signal comes, and say goodbye."""
        why = "its process ended by an error"
        with _signals(self.stop):
            queue.register(self.engine, self.id, str(self.device), asdict(self.scope))
            self.watch("started", {"worker": self.id, "device": self.device})
            self.pulse.start()
            try:
                failed = self._train_all()
                why = "a signal" if self.stop.is_set() else "asked to" if self.pulse.asked else "nothing left to do"
            except RnnqError as error:
                why = f"stopped itself: {error.message}"
                raise
            finally:
                self.pulse.stop()
                with contextlib.suppress(RnnqError):
                    queue.leave(self.engine, self.id, why)
        return 1 if failed else 0

    def is_to_stop(self) -> bool:
        """Whether a signal, or `rnnq worker --stop`, asks to checkpoint, give back and leave."""
        return self.stop.is_set() or self.pulse.asked == "stop"

    def _train_all(self) -> int:
        trained = failed = 0
        while not self.stop.is_set() and self.pulse.asked is None and trained != self.scope.runs:
            claims = self.insist(self._claim)
            if claims:
                trained += 1
                failed += self._hold(claims[0]) == "failed"
                self._break()
            elif self.insist(self._is_over):
                break
            else:
                self.watch("idle", {})
                self.stop.wait(min(IDLE, self.lease / 4) * _jitter.uniform(0.5, 1.0))
        if self.unfit and not self.is_to_stop():
            raise next(iter(self.unfit.values()))
        return failed

    def _claim(self) -> list[Claim]:
        self._reaped(self.pulse.reap())
        return queue.claim(self.engine, self.id, self.provenance, stage=self.scope.stage, without=self.unfit)

    def insist(self, write: Callable[[], T]) -> T:
        """Do it, and again, with jitter, while the database is away.

        Raises DatabaseError after AWAY seconds, or a minute when this worker is to leave; and whatever `write` raises.
        """
        began = time.monotonic()
        while True:
            try:
                found = write()
                self.waits = False
                return found
            except DatabaseError as error:
                self.waits = True
                patience = db.BUSY if self.is_to_stop() else AWAY
                if time.monotonic() - began > patience:
                    raise
                self.watch("away", {"message": error.message, "waiting": len(self.desk.waiting) if self.desk else 0})
            if self.stop.is_set():
                time.sleep(0.3)  # waiting for a stop would return at once
            else:
                self.stop.wait(_jitter.uniform(0.2, 3.0))

    def _is_over(self) -> bool:
        if self.scope.wait:
            return False
        return self.scope.drain or not queue.has_open(self.engine, self.scope.stage, self.unfit)

    def _reaped(self, taken: Sequence[queue.Reaped]) -> None:
        for reaped in taken:
            self.watch("reaped", vars(reaped))

    # -------------------------------------------------------------------------------------------------- one run

    def _hold(self, claim: Claim) -> str:
        """Train a claimed run and bring it to an end; returns which."""
        self.pulse.hold(claim)
        self.watch("claimed", {"claim": claim})
        began = time.monotonic()
        desk = self.desk = RunDesk(self, claim)
        try:
            ended, details = self._end(claim, desk)
        finally:
            self.desk = None
            self.pulse.drop(claim)
        took = time.monotonic() - began
        self.watch(ended, {"claim": claim, "seconds": took, **details})
        self._count(claim, ended, took, details)
        return ended

    def _count(self, claim: Claim, ended: str, took: float, details: Mapping[str, Any]) -> None:
        """Failures that may be this worker's own: quick, in a row, at one place, of runs that failed nowhere else."""
        if ended not in ("failed", "delayed"):
            self.quick = [] if ended == "done" else self.quick
            return
        place = details["place"]
        if (
            took >= QUICK
            or details["cause"] == "diverged"
            or self.insist(lambda: queue.was_handed_back(self.engine, claim))
        ):
            self.quick = []
        elif any(seen.run != claim.run and where != place for seen, _, where in self.quick):
            self.quick = [(claim, details["message"], place)]
        else:  # of a run that was tried again its newest attempt
            others = [entry for entry in self.quick if entry[0].run != claim.run]
            self.quick = [*others, (claim, details["message"], place)]

    def _break(self) -> None:
        """Leave, and take back what failed here, once the worker itself must be suspected. Raises WorkerBroken."""
        if self.keep_going or len(self.quick) < BREAKER:
            return
        claims, messages, _ = zip(*self.quick, strict=True)
        why = f"{len(claims)} different runs failed within seconds on this worker; the last: {messages[-1]}"
        back = self.insist(lambda: queue.hand_back(self.engine, claims, f"handed back: {why}"))
        raise WorkerBroken(
            f"{why}; handed back uncounted: runs {', '.join(map(str, back)) or 'none'}",
            "is the device, the disk or the code here broken? `rnnq show RUN` has the traces; a run that fails on a "
            "second worker stays failed, and `--keep-going` blames the runs at once",
        )

    def _end(self, claim: Claim, desk: RunDesk) -> tuple[str, dict[str, Any]]:
        """How the run ends. What ends the worker, too, is raised once the run is given back."""
        try:
            with logs.kept(self.root, self.study, claim.run, claim.attempt, self.keep_logs):
                return self._train(claim, desk)
        except LeaseLost as error:
            return "lost", {"message": error.message}
        except DatabaseError:
            raise  # nothing can be written: the lease ends by itself
        except CheckpointError as error:
            self.stop.set()  # the database, which may lie on the same disk, is waited for, but not for long
            with contextlib.suppress(LeaseLost, DatabaseError):
                self._release(claim, error)
            raise  # a full disk: the run is not to blame
        except _NotHere as error:  # nor is it here; another stage may well be trained on this machine
            self.unfit[claim.stage] = error
            with contextlib.suppress(LeaseLost):
                queue.release(self.engine, claim, error.message)
            return "unfit", {"message": error.message}
        except (Exception, SystemExit) as error:  # a run's code may also ask Python to leave
            # as words: the exception holds the frames, and these all the tensors of the run that failed
            words = _cause(error), _message(error), "".join(traceback.format_exception(error))
            if isinstance(error, torch.AcceleratorError):
                self.device_broke = True
                self.stop.set()  # after such an error the device is of no use to this process
        try:
            details = self._fail(claim, desk, *words)
            return {"waiting": "delayed"}.get(details["state"], details["state"]), details
        except LeaseLost as error:
            return "lost", {"message": error.message}

    def _release(self, claim: Claim, error: RnnqError) -> str:
        """Give back a run that is not to blame for what happened."""
        return self.insist(lambda: queue.release(self.engine, claim, error.message))

    def _fail(self, claim: Claim, desk: RunDesk, cause: str, message: str, trace: str) -> dict[str, Any]:
        # after an error of the device it is not sure who is to blame: another worker may have more luck
        heals = True if self.device_broke else None

        def fail(points: Sequence[Point]) -> str:
            return queue.fail(self.engine, claim, cause, message, trace, points, heals, self.delay)

        try:
            state = self.insist(lambda: fail(desk.waiting))
        except (LeaseLost, DatabaseError):
            raise
        except Exception:  # it may be the points that no database takes, and why the run failed
            state = self.insist(lambda: fail(()))
        step = max((step for _, step, _ in desk.waiting), default=claim.steps_done)
        return {"cause": cause, "message": message, "state": state, "place": _place(trace), "step": step}

    def _train(self, claim: Claim, desk: RunDesk) -> tuple[str, dict[str, Any]]:
        family = self._family(claim)
        run_config = config.parse(family.Config, claim.config)
        _check_identity(claim, run_config)
        desk.claim = dataclasses.replace(claim, pack_key=run_config.pack_key())
        _check_data(claim, run_config)
        state = self._restore(claim, desk, family.Config.version)
        outcome = train.train(family, run_config, desk, self.device, claim.budget, self.every, state)
        if not outcome.finished:
            return desk.give_back(outcome), {"step": outcome.step}
        desk.finish(outcome, run_config.primary().name)
        return "done", {"step": outcome.step, "loss": outcome.summary.get(run_config.primary().name)}

    def _family(self, claim: Claim) -> Family | Generator:
        """The code of the run's family."""
        try:
            return families.find(claim.family, self._definition(claim))
        except InputError as error:
            raise _NotHere(error.problems, error.hint) from error

    def _definition(self, claim: Claim) -> sweep.Definition | None:
        """The definition file that holds the run's family, opened while its hash matches. Raises InputError."""
        if claim.source is None or claim.source_sha256 is None:
            return None
        key = (claim.source, claim.source_sha256)
        if key not in self._definitions:
            self._definitions[key] = sweep.load_source(*key, self.defs)
        return self._definitions[key]

    def _restore(self, claim: Claim, desk: RunDesk, version: int) -> Mapping[str, Any] | None:
        """Open the newest checkpoint that can be used, and make the run's points equal to its curve."""
        candidates = [Saved(**saved) if saved else None for saved in (claim.checkpoint, claim.checkpoint_prev)]
        saved, state, problems = checkpoint.newest(self.root, candidates, desk.owner)
        desk.numerics = train.numerics(self.device) | {
            "rnnq": rnnq.__version__,
            "family": f"{claim.family} {version}",
            "definition": claim.source_sha256,
        }
        step = state["step"] if state else 0
        start = queue.Start(
            step=step,
            curve=state["curve"] if state else (),
            numerics=desk.numerics,
            exact=state is None or (state["exact"] and state["numerics"] == desk.numerics),
            checkpoint=asdict(saved) if saved else None,
            problems=problems,
        )
        self.insist(lambda: queue.restore(self.engine, claim, start))
        desk.exact = start.exact
        self.watch("restored", {"claim": claim, "step": step, "problems": problems, "exact": start.exact})
        return state

    def _look_for_stall(self) -> None:
        """End this process, and its run as stalled, when no step has ended for very long. The heartbeat calls it."""
        desk, now = self.desk, time.monotonic()
        slept = now - self._looked > self.lease  # this process was stopped as a whole: that is no stall
        self._looked = now
        if desk is None:
            return
        if slept or self.waits:
            desk.stepped = now
        seen = desk.stepped
        if now - seen <= max(self.stall, 50 * desk.slowest):
            return
        message = f"no step has ended for {now - desk.stepped:.0f} s; the slowest before took {desk.slowest:.1f} s"
        with contextlib.suppress(RnnqError):
            # without the points that wait: the thread that trains may be writing them at this very moment
            queue.fail(self.engine, desk.claim, "stalled", message, _stacks(), (), None, self.delay)
            queue.leave(self.engine, self.id, f"stopped itself: run {desk.claim.run} stalled: {message}")
        if desk.stepped != seen:
            return  # it went on in this very moment, and its next write finds that the run is no longer its own
        self.watch("stalled", {"claim": desk.claim, "message": message})
        os._exit(1)  # the thread that trains cannot be ended otherwise


class _NotHere(InputError):
    """The code of a run's family, or its corpus, is not on this machine, or not as it was: no run of the stage can be
    trained here, and none of them is to blame."""


def _place(trace: str) -> str:
    """Where an error was raised, and its kind: failures that have one cause share it."""
    frames = re.findall(r'^ +File "(.*)", line (\d+)', trace, re.M)
    kind = trace.strip().rpartition("\n")[2].partition(":")[0]
    return f"{frames[-1] if frames else ''} {kind}"


def _stacks() -> str:
    """Where each thread of this process stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


def _cause(error: BaseException) -> str:
    if isinstance(error, RnnqError):
        return error.cause
    return "oom" if is_out_of_memory(error) else "bug"


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, RnnqError) else f"{type(error).__name__}: {text_of(error)}"


def _check_identity(claim: Claim, run_config: config.Config) -> None:
    """Raises InputError when the family's version or a default has changed since init: it would be another run."""
    if config.fingerprint(claim.family, run_config) != claim.fingerprint:
        raise InputError(
            f"run {claim.run} was made by another version of {claim.family}; here it has version {run_config.version}",
            "`rnnq init` adds it anew, as this version trains it",
        )


def _check_data(claim: Claim, run_config: config.Config) -> None:
    """Raises DataError when the corpus here is not the one that the stage was made with."""
    try:
        here = run_config.datasets()
    except DataError as error:
        raise _NotHere(error.problems, error.hint) from error
    for corpus, sha256 in here.items():
        expected = claim.data.get(corpus, sha256)
        if expected != sha256:
            raise DataError(
                f"{corpus} has sha256 {sha256[:12]} on this machine; the stage was made with {expected[:12]}",
                "train on the machine that made it, or name a file that all machines have",
            )


class RunDesk:
    """What the training loop is handed: writes of one run, each of them fenced."""

    def __init__(self, worker: Worker, claim: Claim) -> None:
        self.worker, self.claim = worker, claim
        self.owner = Owner(worker.study, claim.stage, claim.run, claim.fingerprint)
        self.numerics: dict[str, Any] = {}
        self.exact = True
        self.waiting: list[Point] = []
        self.due = time.monotonic() + FLUSH  # when points are written next
        self.away: float | None = None  # since when the database does not answer
        self.stepped, self.slowest = time.monotonic(), 0.0  # the end of the last step; seconds that the slowest took

    def wish(self) -> bool:
        """Whether to checkpoint and stop. Raises LeaseLost once a beat has found that the run is not ours."""
        now = time.monotonic()
        self.slowest, self.stepped = max(self.slowest, now - self.stepped), now
        if self.claim.run in self.worker.pulse.lost:
            raise LeaseLost(f"run {self.claim.run} attempt {self.claim.attempt} is no longer ours")
        return self.worker.is_to_stop() or self.claim.run in self.worker.pulse.wishes

    def record(self, step: int, points: Sequence[Point]) -> None:
        """Keep points, and write them when the last write is long enough ago."""
        self.waiting += points
        if time.monotonic() >= self.due:
            self._write(step)
        self.worker.watch("recorded", {"claim": self.claim, "step": step, "points": points})

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """A checkpoint: first the file, then the row that names it, then the file that it no longer names."""
        if self.away is not None and time.monotonic() < self.due:
            self.waiting += points
            return  # no row could name the file, and the disk may be what is full
        self._keep(step, points, state)

    def _keep(self, step: int, points: Sequence[Point], state: Mapping[str, Any], insist: bool = False) -> None:
        self.waiting += points
        saved = self._file(step, state)
        if self._write(step, saved, insist):
            self.worker.watch("saved", {"claim": self.claim, "step": step, "path": saved.path, "points": points})

    def _write(self, step: int, saved: Saved | None = None, insist: bool = False) -> bool:
        """Write what waits, and a checkpoint; whether that could be done. While it cannot, training goes on.

        A file that no row has come to name is garbage, and the next one is made in its time. To `insist`, as with
        more points than memory should hold, is to wait until it can be done.
        """
        named = asdict(saved) if saved else None

        def write(patience: float = db.BUSY) -> list[str]:
            return queue.record(self.worker.engine, self.claim, step, self.waiting, named, patience)

        if insist or len(self.waiting) >= HELD:
            old = self.worker.insist(write)
        else:
            try:
                old = write(SHORT)
            except DatabaseError as error:
                self._is_away(error)
                return False
        self.waiting, self.due, self.away = [], time.monotonic() + FLUSH, None
        self._remove(old)
        return True

    def _is_away(self, error: DatabaseError) -> None:
        """Try again after a while. Raises the error once that has gone on for too long."""
        now = time.monotonic()
        self.away = self.away or now
        if now - self.away > AWAY:
            raise error
        self.due = now + _jitter.uniform(0.5, 1.5) * min(30.0, max(FLUSH, now - self.away))
        self.worker.watch("away", {"message": error.message, "waiting": len(self.waiting)})

    def _wait_for_the_database(self, step: int) -> None:
        """Before a last file is made: that the database cannot be written may be for want of room on the disk."""
        if self.away is not None:
            self._write(step, insist=True)

    def leave_behind(self, points: Sequence[Point]) -> None:
        """What was measured and not yet handed over when training ended by an error; `fail` writes it."""
        self.waiting += points

    def give_back(self, outcome: train.Outcome) -> str:
        """Checkpoint and release; returns what that came to: released, or cancelled."""
        if outcome.state is not None:
            self._wait_for_the_database(outcome.step)
            self._keep(outcome.step, outcome.points, outcome.state, insist=True)
        wish = self.worker.pulse.wishes.get(self.claim.run)
        why = {"pause": "its stage was paused", "cancel": "it was cancelled"}.get(wish or "", "asked to stop")
        state = self.worker.insist(lambda: queue.release(self.worker.engine, self.claim, why))
        return "cancelled" if state == "cancelled" else "released"

    def finish(self, outcome: train.Outcome, primary: str) -> None:
        """The final checkpoint, then everything else in one transaction."""
        engine, claim = self.worker.engine, self.claim
        last = best = None
        if outcome.state is not None:
            self._wait_for_the_database(outcome.step)
            last = self._file(outcome.step, outcome.state)
            best = self._best(outcome, last)
        files = {name: asdict(saved) for name, saved in (("checkpoint", last), ("best", best)) if saved}
        points = [*self.waiting, *outcome.points]
        self._remove(
            self.worker.insist(
                lambda: queue.finish(engine, claim, outcome.step, outcome.summary, primary, points, **files)
            )
        )

    def _remove(self, paths: Sequence[str]) -> None:
        """Only files of this very run: a row may come from anywhere, and name another's."""
        checkpoint.remove(self.worker.root, [path for path in paths if checkpoint.belongs(self.owner, path)])

    def _best(self, outcome: train.Outcome, last: Saved) -> Saved | None:
        if outcome.best is None or outcome.best["step"] == outcome.step:
            return last if outcome.best else None
        return self._file(outcome.best["step"], outcome.best, "-best")

    def _file(self, step: int, state: Mapping[str, Any], kind: str = "") -> Saved:
        path = checkpoint.relative_path(self.owner, self.claim.attempt, step, kind)
        whole = {**state, "numerics": self.numerics, "exact": self.exact, "data": dict(self.claim.data)}
        aside = checkpoint.write_aside(self.worker.root, path, self.owner, whole)
        self.worker.watch("written", {"claim": self.claim, "step": step, "aside": aside})
        return checkpoint.publish(self.worker.root, path, aside, step)


class Pulse:
    """The heartbeat: a thread that renews the leases of the runs that are held, and reaps those of the dead.

    Whether others may be taken back by the clock is judged by the clock that their leases are written in, the
    database's. It sees SIGSTOP, an outage, and also a sleeping laptop and a clock that was set, which this process's
    own does not.
    """

    def __init__(
        self,
        engine: Engine,
        worker: str,
        lease: float,
        reaped: Callable[[Sequence[queue.Reaped]], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.worker, self.lease, self.reaped, self.look = engine, worker, lease, reaped, look
        self.lost: set[int] = set()
        self.wishes: dict[int, str] = {}  # run -> what its owner shall do: cancel, pause
        self.asked: str | None = None  # of the worker itself: stop, drain
        self._leader = processes.Leader.of_environment()
        self._held: dict[int, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._last = self._connected_since = self._now()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()
        self._thread.join(timeout=self.lease)

    def hold(self, claim: Claim) -> None:
        """Renew this run's lease from now on."""
        with self._lock:
            self.lost.discard(claim.run)
            self.wishes.pop(claim.run, None)
            self._held[claim.run] = claim.attempt

    def drop(self, claim: Claim) -> None:
        """The run is no longer held."""
        with self._lock:
            self._held.pop(claim.run, None)

    def reap(self) -> list[queue.Reaped]:
        """Take back what the dead left. By the clock only when we have been connected for a whole LEASE."""
        # leases are compared with the very moment that was judged: whoever is stopped between these lines, or waits
        # long for the write lock, takes back nothing that ended meanwhile
        moment = self._now()
        with self._lock:
            connected = moment - self._connected_since >= self.lease and moment - self._last <= self.lease / 2
        return queue.reap(self.engine, by_clock=connected, now=moment)

    def _now(self) -> float:
        with db.reading(self.engine) as connection:
            return db.clock(connection)

    def _run(self) -> None:
        while not self._ended.wait(self.lease / 4):
            try:
                self.look()
                self._beat()
                self.reaped(self.reap())
            except RnnqError:
                continue  # the database is away; training goes on, and the next beat tries again
            except Exception:
                traceback.print_exc()  # a fault of ours: but a worker without a heart would lose run after run

    def _beat(self) -> None:
        with self._lock:
            held = dict(self._held)
        moment = self._now()  # before the beat: a stop between the two must count as a gap
        ours = queue.beat(self.engine, self.worker, held.items())
        with self._lock:
            if abs(moment - self._last) > self.lease / 2:
                self._connected_since = moment  # the others may not have beaten either: they go first
            self._last = moment
            # what was dropped or claimed anew while we asked is not lost
            same = {run for run, attempt in held.items() if self._held.get(run) == attempt}
            self.lost |= {run for run in same if run not in ours}
            self.wishes = {run: ours[run] for run in same if ours.get(run)}
        asked = queue.asked_to_leave(self.engine, self.worker)
        self.asked = "stop" if self._leader.is_gone() else asked


class Stop:
    """Whether to leave. A signal handler may set it.

    An Event would not do: its set() takes a lock, and waits for ever when the signal came while the very thread that
    handles it held that lock in wait().
    """

    def __init__(self) -> None:
        self._asked = False
        self._wake: SimpleQueue[None] = SimpleQueue()  # its put() may interrupt a get() of the same thread

    def set(self) -> None:
        """Ask to leave."""
        self._asked = True
        self._wake.put(None)

    def is_set(self) -> bool:
        """Whether somebody asked."""
        return self._asked

    def wait(self, seconds: float) -> None:
        """Return after so long, or as soon as somebody asks."""
        if not self._asked:
            with contextlib.suppress(Empty):
                self._wake.get(timeout=seconds)


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """The first signal, or SLURM's warning: checkpoint, release, leave. A second SIGTERM or SIGINT: at once."""
    asked = processes.Asked()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if asked.is_at_once(number):
            os._exit(128 + number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in processes.HEARD}
    try:
        yield
    finally:
        processes.restore(before, stop.is_set())
