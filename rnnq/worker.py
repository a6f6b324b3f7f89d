"""A process that claims runs and trains them, one after the other, until there are none left for it.

The main thread trains; a second one beats for the runs that are held. Whoever watches (a progress bar, a test)
gets events by name: started, claimed, restored, recorded, written (a checkpoint aside), saved, done, failed,
released, cancelled, lost, reaped, idle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import secrets
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

import torch
from sqlalchemy import Engine

import rnnq
from rnnq import checkpoint, config, db, families, host, logs, processes, queue, sweep, train
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import CheckpointError, DatabaseError, DataError, InputError, LeaseLost, RnnqError
from rnnq.families.base import Family, Generator
from rnnq.queue import Claim, Point
from rnnq.train import Every

Watcher = Callable[[str, Mapping[str, Any]], None]

FLUSH = 1.0  # seconds between two writes of points, so that many short runs do not fight for the lock
IDLE = 1.0  # seconds between two looks for work
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
    ) -> None:
        self.engine, self.device, self.scope, self.defs, self.every = engine, device, scope, defs, every
        self._watch, self.keep_logs = watch, keep_logs
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.study, self.lease, self.root = db.study(engine)
        self.stop = Stop()
        self.pulse = Pulse(engine, self.id, self.lease, self._reaped)
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
            self._reaped(self.pulse.reap())
            claims = queue.claim(self.engine, self.id, self.provenance, stage=self.scope.stage, without=self.unfit)
            if claims:
                trained += 1
                failed += self._hold(claims[0]) == "failed"
            elif self._is_over():
                break
            else:
                self.watch("idle", {})
                self.stop.wait(min(IDLE, self.lease / 4) * _jitter.uniform(0.5, 1.0))
        if self.unfit and not self.is_to_stop():
            raise next(iter(self.unfit.values()))
        return failed

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
        try:
            ended, details = self._end(claim)
        finally:
            self.pulse.drop(claim)
        self.watch(ended, {"claim": claim, "seconds": time.monotonic() - began, **details})
        return ended

    def _end(self, claim: Claim) -> tuple[str, dict[str, Any]]:
        """How the run ends. What ends the worker, too, is raised once the run is given back."""
        desk = RunDesk(self, claim)
        try:
            with logs.kept(self.root, self.study, claim.run, claim.attempt, self.keep_logs):
                return self._train(claim, desk)
        except LeaseLost as error:
            return "lost", {"message": error.message}
        except DatabaseError:
            raise  # nothing can be written: the lease ends by itself
        except CheckpointError as error:
            with contextlib.suppress(LeaseLost):
                queue.release(self.engine, claim, error.message)
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
                self.stop.set()  # after such an error the device is of no use to this process
        try:
            return "failed", self._fail(claim, desk, *words)
        except LeaseLost as error:
            return "lost", {"message": error.message}

    def _fail(self, claim: Claim, desk: RunDesk, cause: str, message: str, trace: str) -> dict[str, Any]:
        try:
            queue.fail(self.engine, claim, cause, message, trace, desk.waiting)
        except (LeaseLost, DatabaseError):
            raise
        except Exception:  # it may be the points that no database takes, and why the run failed
            queue.fail(self.engine, claim, cause, message, trace)
        return {"cause": cause, "message": message}

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
        queue.restore(self.engine, claim, start)
        desk.exact = start.exact
        self.watch("restored", {"claim": claim, "step": step, "problems": problems, "exact": start.exact})
        return state


class _NotHere(InputError):
    """The code of a run's family, or its corpus, is not on this machine, or not as it was: no run of the stage can be
    trained here, and none of them is to blame."""


def _cause(error: BaseException) -> str:
    if isinstance(error, RnnqError):
        return error.cause
    # on a CPU torch reports that memory is out as a RuntimeError
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in _text(error):
        return "oom"
    return "bug"


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, RnnqError) else f"{type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be had)"


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
        self.flushed = time.monotonic()

    def wish(self) -> bool:
        """Whether to checkpoint and stop. Raises LeaseLost once a beat has found that the run is not ours."""
        if self.claim.run in self.worker.pulse.lost:
            raise LeaseLost(f"run {self.claim.run} attempt {self.claim.attempt} is no longer ours")
        return self.worker.is_to_stop() or self.claim.run in self.worker.pulse.wishes

    def record(self, step: int, points: Sequence[Point]) -> None:
        """Keep points, and write them when the last write is long enough ago."""
        self.waiting += points
        if time.monotonic() - self.flushed >= FLUSH:
            queue.record(self.worker.engine, self.claim, step, self.waiting)
            self._written()
        self.worker.watch("recorded", {"claim": self.claim, "step": step, "points": points})

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """A checkpoint: first the file, then the row that names it, then the file that it no longer names."""
        self.waiting += points
        saved = self._file(step, state)
        old = queue.record(self.worker.engine, self.claim, step, self.waiting, asdict(saved))
        self._written()
        self._remove(old)
        self.worker.watch("saved", {"claim": self.claim, "step": step, "path": saved.path, "points": points})

    def leave_behind(self, points: Sequence[Point]) -> None:
        """What was measured and not yet handed over when training ended by an error; `fail` writes it."""
        self.waiting += points

    def give_back(self, outcome: train.Outcome) -> str:
        """Checkpoint and release; returns what that came to: released, or cancelled."""
        if outcome.state is not None:
            self.save(outcome.step, outcome.points, outcome.state)
        wish = self.worker.pulse.wishes.get(self.claim.run)
        why = {"pause": "its stage was paused", "cancel": "it was cancelled"}.get(wish or "", "asked to stop")
        state = queue.release(self.worker.engine, self.claim, why)
        return "cancelled" if state == "cancelled" else "released"

    def finish(self, outcome: train.Outcome, primary: str) -> None:
        """The final checkpoint, then everything else in one transaction."""
        last = best = None
        if outcome.state is not None:
            last = self._file(outcome.step, outcome.state)
            best = self._best(outcome, last)
        files = {name: asdict(saved) for name, saved in (("checkpoint", last), ("best", best)) if saved}
        points = [*self.waiting, *outcome.points]
        old = queue.finish(self.worker.engine, self.claim, outcome.step, outcome.summary, primary, points, **files)
        self._remove(old)

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

    def _written(self) -> None:
        self.waiting, self.flushed = [], time.monotonic()


class Pulse:
    """The heartbeat: a thread that renews the leases of the runs that are held, and reaps those of the dead.

    Whether others may be taken back by the clock is judged by the clock that their leases are written in, the
    database's. It sees SIGSTOP, an outage, and also a sleeping laptop and a clock that was set, which this process's
    own does not.
    """

    def __init__(
        self, engine: Engine, worker: str, lease: float, reaped: Callable[[Sequence[queue.Reaped]], None]
    ) -> None:
        self.engine, self.worker, self.lease, self.reaped = engine, worker, lease, reaped
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
                self._beat()
                self.reaped(self.reap())
            except RnnqError:
                continue  # the database is away; training goes on, and the next beat tries again

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
    """The first SIGTERM or SIGINT: checkpoint, release, leave. The second: at once."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
