"""A process that claims runs and trains them, a pack after the other, until there are none left for it.

The main thread trains; a second one beats for the runs that are held. Whoever watches (a progress bar, a test)
gets events by name: started, trying (sizes of packs), claimed, packed, restored, recorded, written (a checkpoint
aside), saved, done, failed, delayed (failed, to be tried again), released, cancelled, lost, scattered (a pack, by an
error), reaped, decided (a gate), inherited (the weights of another run), away (the database), idle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
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
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, TypeVar

import torch
from sqlalchemy import Engine

import rnnq
from rnnq import checkpoint, config, db, definitions, families, host, logs, pack, processes, queue, train
from rnnq.checkpoint import Owner, Saved
from rnnq.desk import AWAY, Desks, RunDesk
from rnnq.errors import (
    CheckpointError,
    Damaged,
    DatabaseError,
    DataError,
    InputError,
    LeaseLost,
    RnnqError,
    WorkerBroken,
    cause_of,
    message_of,
)
from rnnq.families.base import Family, Generator, Parent
from rnnq.queue import Claim, Point
from rnnq.ranks import AGAIN, AGAIN_SOUND, CannotShare, Ranks
from rnnq.train import Every, Member

Watcher = Callable[[str, Mapping[str, Any]], None]
T = TypeVar("T")

IDLE = 1.0  # seconds between two looks for work
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
    within: queue.Range | None = None  # only runs of these ids: a slice


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
        # else each new tensor is filled before it is written; that finds memory read too early, and costs a kernel each
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.cuda.set_device(device.index or 0)  # what a family calls "cuda" is this one


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
        pack_size: int | None = None,
        compile: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine, self.device, self.scope, self.defs, self.every = engine, device, scope, defs, every
        self._watch, self.keep_logs, self.keep_going, self.compile = watch, keep_logs, keep_going, compile
        self.ranks = ranks  # the processes that train each run together; this is the first of them
        self.place = f"{ranks.size} x {device.type}" if ranks else str(device)
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.study, self.lease, self.root = db.study(engine)
        self.stop = Stop()
        self.pulse = Pulse(engine, self.id, self.lease, self._reaped, self._look_for_stall)
        commit, dirty = host.git_state(Path.cwd())
        self.provenance = {
            "host": host.name(),
            "device": self.place,
            "git_commit": commit,
            "git_dirty": dirty,
            "command_line": host.command_line(),
            "versions": json.dumps(host.versions(), sort_keys=True),
        }
        self.unfit: dict[str, InputError] = {}  # stages whose code or data this machine lacks
        self.device_broke = False
        self.trained = 0  # runs that it took
        self.sound = False  # whether one of them ended well
        self.desks: Desks | None = None  # of the runs that are being trained
        self.planner = pack.Planner(pack_size, device, _Findings(engine), self._say) if pack_size != 1 else None
        self._trials: dict[_Kind, pack.Trial | None] = {}
        self.ahead: queue.Ahead | None = None  # what would have been claimed at the last look
        self.decided_at = -math.inf  # when this worker last looked at the gates
        self.short: set[int] = set()  # runs of packs for which memory was out
        self.waits = False  # for the database, with a write that training cannot go on without
        self._looked = time.monotonic()
        self.delay = host.seconds_from_environment("RNNQ_RETRY_S", queue.DELAY)
        self.stall = host.seconds_from_environment("RNNQ_STALL_S", STALL)
        self.quick: list[tuple[Claim, str, str]] = []  # runs that failed at once, in a row: why, and at which place
        self._definitions: dict[tuple[str, str], definitions.Definition] = {}

    def watch(self, event: str, details: Mapping[str, Any]) -> None:
        """Tell whoever watches. That a terminal or a pipe has gone must neither fail a run nor still the heart."""
        with contextlib.suppress(OSError):
            self._watch(event, details)

    # ------------------------------------------------------------------------------------------------ the life

    def work(self) -> int:
        """Register, beat, train until the scope is empty or a signal comes, and say goodbye.

        Its ranks may have come apart by an error of a run: then AGAIN, or AGAIN_SOUND, and they are to be
        started anew.
        """
        why = "its process ended by an error"
        with _signals(self.stop):
            queue.register(self.engine, self.id, self.place, asdict(self.scope))
            self.watch("started", {"worker": self.id, "device": self.place})
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
        if self.is_apart() and self._goes_on():
            return AGAIN_SOUND if self.sound else AGAIN
        return 1 if failed else 0

    def _goes_on(self) -> bool:
        """Whether nothing but its ranks keeps this worker from the next run."""
        return not self.stop.is_set() and self.pulse.asked is None and self.trained != self.scope.runs

    def is_apart(self) -> bool:
        """Whether an error has ended a step that other processes may still be in: no run can be trained here now."""
        return self.ranks is not None and self.ranks.broken

    def is_to_stop(self) -> bool:
        """Whether a signal, or `rnnq worker --stop`, asks to checkpoint, give back and leave."""
        return self.stop.is_set() or self.pulse.asked == "stop"

    def _say(self, text: str) -> None:
        self.watch("trying", {"message": text})

    def is_lost(self, claim: Claim) -> bool:
        """Whether a beat has found that the run is no longer ours."""
        return claim.run in self.pulse.lost

    def wish_of(self, claim: Claim) -> str | None:
        """What was wished of the run: cancel, pause."""
        return self.pulse.wishes.get(claim.run)

    def _train_all(self) -> int:
        failed = 0
        while not self.is_apart() and self._goes_on():
            left = pack.MOST_EVER if self.scope.runs is None else self.scope.runs - self.trained
            claims = self.insist(partial(self._claim, left))
            if claims:
                claims = self._with_mates(claims, left)
                self.trained += len(claims)
                failed += self._hold(claims)
                self._break()
            elif self.insist(self._is_over):
                break
            else:
                self.watch("idle", {})
                self.stop.wait(min(IDLE, self.lease / 4) * _jitter.uniform(0.5, 1.0))
        if not self.is_to_stop() and not self.is_apart():
            self.insist(self._decide)  # what was trained here may be the last that others wait for
        if self.unfit and not self.is_to_stop():
            raise next(iter(self.unfit.values()))
        return failed

    def _claim(self, most: int) -> list[Claim]:
        """As many runs of one shape as are known to train well together; else one."""
        self._reaped(self.pulse.reap())
        if time.monotonic() - self.decided_at > IDLE:
            self._decide()
        self.ahead = queue.ahead(self.engine, **self._scope()) if self.planner and most > 1 else None
        trial = self._trial(self.ahead) if self.ahead else None
        size = 1
        if trial is not None and self.ahead is not None and self.planner is not None:
            size = min(most, self.planner.best(trial, self.ahead.pending, self._rivals(self.ahead)))
        kind = (self.ahead.stage, self.ahead.pack_key) if self.ahead and size > 1 else None
        return queue.claim(self.engine, self.id, self.provenance, size, **self._scope(), kind=kind)

    def _scope(self) -> dict[str, Any]:
        return {"stage": self.scope.stage, "without": self.unfit, "within": self.scope.within}

    def _decide(self) -> bool:
        """Open or shut the gates whose runs have all ended; whether there were any."""
        self.decided_at = time.monotonic()
        found = queue.decide(self.engine)
        for decided in found:
            self.watch("decided", vars(decided))
        return bool(found)

    @staticmethod
    def _rivals(ahead: queue.Ahead) -> int:
        return max(ahead.workers, processes.side_by_side())

    def _with_mates(self, claims: list[Claim], most: int) -> list[Claim]:
        """With a run in hand whose shape is new here, find out how many to train together, and claim the others.

        In hand: should the trial end this process, or hang, it is the run's attempt that was lost or stalled, and
        whoever claims it next trains it alone.
        """
        [first, *others], ahead = claims, self.ahead
        trial = self._trials.get(_kind(first)) if not others else None
        if trial is None or ahead is None or self.planner is None or _kind(ahead) != _kind(first):
            return claims
        pending, rivals = ahead.pending, self._rivals(ahead)
        if not self.planner.is_to_try(trial, pending, rivals) or not self._find_out(first, trial, pending, rivals):
            return claims
        size = min(most, self.planner.best(trial, pending, rivals))
        if size == 1 or self.is_to_stop() or self.pulse.asked is not None:
            return claims
        kind = first.stage, first.pack_key
        more = partial(queue.claim, self.engine, self.id, self.provenance, size - 1, **self._scope(), kind=kind)
        return [first, *self.insist(more)]

    def _find_out(self, claim: Claim, trial: pack.Trial, pending: int, rivals: int) -> bool:
        """Try sizes; whether that came to an end."""
        assert self.planner is not None
        self.pulse.hold(claim)
        self.desks = Desks(self, [claim])
        try:
            with logs.unheard():
                self.planner.find_out(trial, pending, rivals)
        except DatabaseError:
            raise
        except pack.Interrupted:
            return False
        except (Exception, SystemExit) as error:  # what is wrong shows when the run is trained
            self._words(error)
            return False
        finally:
            self.desks = None
        return True

    def _on_trial_step(self) -> None:
        """Trials are watched as training is, and are given up when this worker is to leave."""
        if self.desks is not None:
            self.desks.stepped = time.monotonic()
        if self.is_to_stop():
            raise pack.Interrupted

    def _trial(self, ahead: queue.Ahead) -> pack.Trial | None:
        """What is to be learnt of runs like the next one; None for those that are trained alone."""
        kind = _kind(ahead)
        if kind not in self._trials:
            self._trials[kind] = None
            with contextlib.suppress(Exception):  # what is wrong shows when the run is trained
                self._trials[kind] = self._new_trial(ahead)
        return self._trials[kind]

    def _new_trial(self, ahead: queue.Ahead) -> pack.Trial | None:
        if ahead.pack_key is None or ahead.budget is None:
            return None
        find = partial(self._found, ahead.family, self._definition(ahead))
        made = config.parse(find().Config, ahead.config)
        if not pack.can_pack(find(), made) or made.pack_key() != ahead.pack_key:
            return None
        code = ahead.source_sha256 or f"rnnq {rnnq.__version__}"
        numerics = self._numerics(find())
        return pack.Trial(find, ahead.family, made, ahead.budget, self.device, numerics, code, self._on_trial_step)

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
                self.watch("away", {"message": error.message, "waiting": self.desks.waiting() if self.desks else 0})
            if self.stop.is_set():
                time.sleep(0.3)  # waiting for a stop would return at once
            else:
                self.stop.wait(_jitter.uniform(0.2, 3.0))

    def _is_over(self) -> bool:
        if self.scope.wait:
            return False
        if self.scope.drain:
            return True
        # the last run that a gate waited for may have ended a moment ago, and nobody has looked yet
        return not (queue.has_open(self.engine, **self._scope()) or self._decide())

    def _reaped(self, taken: Sequence[queue.Reaped]) -> None:
        for reaped in taken:
            self.watch("reaped", vars(reaped))

    # -------------------------------------------------------------------------------------------------- one pack

    def _hold(self, claims: Sequence[Claim]) -> int:
        """Train claimed runs of one shape and bring each to an end; returns how many failed."""
        desks = self.desks = Desks(self, claims)
        for claim in claims:
            self.pulse.hold(claim)
            self.watch("claimed", {"claim": claim})
        try:
            if self.device_broke:  # in a trial
                for desk in desks.all:
                    self._guarded(desk, partial(self._hand_on, desk, "the device broke"))
                return 0
            with logs.kept(self.root, self.study, [(claim.run, claim.attempt) for claim in claims], self.keep_logs):
                self._train(desks)
        except CheckpointError as error:  # a full disk: none of the runs is to blame
            self.stop.set()  # the database, which may lie on the same disk, is waited for, but not for long
            # that the first of them has waited for in vain is not there for the others
            with contextlib.suppress(DatabaseError):
                for desk in desks.open:
                    with contextlib.suppress(LeaseLost):
                        self._release(desk.claim, error)
            raise
        finally:
            self.desks = None
            for claim in claims:
                self.pulse.drop(claim)
        return sum(desk.ended == "failed" for desk in desks.all)

    def _train(self, desks: Desks) -> None:
        """Prepare each run alone, so that what is wrong with one is its own; then train them in certified packs."""
        members = {}
        for desk in desks.all:
            member = self._guarded(desk, partial(self._prepare, desk))
            if member is not None:
                members[member] = desk
        part = list(members)
        if len(part) > 1:
            size = self._may_begin(desks.all[0].claim, len(part))
            for member in part[size:]:  # rivals left us fewer than were to be claimed: others may have the rest
                self._guarded(
                    members[member], partial(self._hand_on, members[member], "no pack of this size is certified")
                )
            part = part[:size]
        if len(part) == 1:
            self._guarded(members[part[0]], partial(self._train_together, part, members))
        elif part:
            self._train_pack(part, members)

    def _train_pack(self, part: Sequence[Member], members: Mapping[Member, RunDesk]) -> None:
        try:
            self._train_together(part, members)
            return
        except (DatabaseError, CheckpointError):
            raise
        except (Exception, SystemExit) as error:
            words = self._words(error)
        self._scatter([members[member] for member in part], words)

    def _may_begin(self, claim: Claim, n: int) -> int:
        trial = self._trials.get(_kind(claim))
        return self.planner.split(trial, n) if trial is not None and self.planner is not None else 1

    def _hand_on(self, desk: RunDesk, why: str) -> None:
        self.insist(lambda: queue.release(self.engine, desk.claim, why))
        self._ended(desk, "released", {"step": desk.step})

    def _train_together(self, part: Sequence[Member], members: Mapping[Member, RunDesk]) -> None:
        first = members[part[0]].claim
        trial = self._trials.get(_kind(first)) if len(part) > 1 else None
        shrink = self.planner.shrink(trial) if trial and self.planner else train.as_it_is
        self.watch("packed", {"claims": [members[member].claim for member in part], "members": part})
        if self.ranks is not None:
            names = ("family", "config", "source", "source_sha256", "budget")
            self.ranks.subject = {name: getattr(first, name) for name in names}
        for member, outcome in train.together(self._family(first), part, self.device, self.every, shrink, self.ranks):
            self._guarded(members[member], partial(self._close, members[member], outcome))

    def _close(self, desk: RunDesk, outcome: train.Outcome) -> None:
        """A run's training has come to an end. Raises what it ended by."""
        if outcome.error is not None:
            raise outcome.error
        if not outcome.finished:
            self._ended(desk, desk.give_back(outcome), {"step": outcome.step})
            return
        desk.finish(outcome)
        self._ended(desk, "done", {"step": outcome.step, "loss": outcome.summary.get(desk.primary)})

    def _guarded(self, desk: RunDesk, act: Callable[[], T]) -> T | None:
        """Do it; by an error the run ends, and None is returned.

        What ends the worker, too, is raised once the run is given back.
        """
        claim = desk.claim
        try:
            return act()
        except LeaseLost as error:
            self._ended(desk, "lost", {"message": error.message})
            return None
        except (DatabaseError, CheckpointError):
            raise  # nothing can be written, here or there: none of the runs is to blame
        except (_NotHere, CannotShare) as error:  # nor is it here; another stage may well be trained by this worker
            self.unfit[claim.stage] = error
            with contextlib.suppress(LeaseLost):
                queue.release(self.engine, claim, error.message)
            self._ended(desk, "unfit", {"message": error.message})
            return None
        except (Exception, SystemExit) as error:  # a run's code may also ask Python to leave
            words = self._words(error)
        if self.is_apart():
            words = self._words_of_all(desk, words)
        try:
            details = self._fail(desk, words)
            self._ended(desk, {"waiting": "delayed"}.get(details["state"], details["state"]), details)
        except LeaseLost as error:
            self._ended(desk, "lost", {"message": error.message})
        return None

    def _words(self, error: BaseException) -> _Words:
        """As words: the exception holds the frames, and these all the tensors of what failed."""
        if isinstance(error, torch.AcceleratorError):
            self.device_broke = True
            self.stop.set()  # after such an error the device is of no use to this process
        return _Words(cause_of(error), message_of(error), "".join(traceback.format_exception(error)))

    def _words_of_all(self, desk: RunDesk, mine: _Words) -> _Words:
        """Whose error ended a step: this process's, or another's, which this one only felt.

        When another one has died without a word this one ends, too, at once: the run is lost, and whoever looks next,
        such as the group that is started in its place, takes it back and goes on from the last checkpoint.
        """
        assert self.ranks is not None
        gone, theirs = self.ranks.lost()
        if theirs is not None:
            return _Words(**theirs)
        if gone:
            who = ", ".join(f"process {rank} of {self.ranks.size}" for rank in gone)
            self.watch("lost", {"claim": desk.claim, "message": f"{who} is gone; it goes on from its last checkpoint"})
            os._exit(1)
        return mine

    def _ended(self, desk: RunDesk, ended: str, details: Mapping[str, Any]) -> None:
        desk.ended = ended
        self.pulse.drop(desk.claim)
        took = time.monotonic() - desk.began
        self.watch(ended, {"claim": desk.claim, "seconds": took, **details})
        self._count(desk.claim, ended, took, details)

    def _scatter(self, part: Sequence[RunDesk], words: _Words) -> None:
        """An error inside a pack says not whose it is: each of its runs is next trained alone, and only that counts.

        When memory was out they may stay together, fewer at a time.
        """
        desks = [desk for desk in part if desk.ended is None]
        trial = self._trials.get(_kind(part[0].claim))
        if words.cause == "oom" and self.planner is not None and trial is not None:
            self.planner.ran_out(trial, len(part))
        why = f"an error in a pack of {len(part)}: {words.message}"
        self.watch("scattered", {"claims": [desk.claim for desk in desks], "message": why})
        for desk in desks:
            # one that needs too much wherever it is shall not make all packs smaller, one after the other
            together = words.cause == "oom" and desk.claim.run not in self.short
            if words.cause == "oom":
                self.short.add(desk.claim.run)
            release = partial(queue.release, self.engine, desk.claim, why, alone=not together, trace=words.trace)
            try:
                self.insist(release)
                self._ended(desk, "released", {"step": desk.step})
            except LeaseLost as error:
                self._ended(desk, "lost", {"message": error.message})

    def _count(self, claim: Claim, ended: str, took: float, details: Mapping[str, Any]) -> None:
        """Failures that may be this worker's own: quick, in a row, at one place, of runs that failed nowhere else."""
        if ended not in ("failed", "delayed"):
            self.quick = [] if ended == "done" else self.quick
            self.sound = self.sound or ended == "done"
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

    def _release(self, claim: Claim, error: RnnqError) -> str:
        """Give back a run that is not to blame for what happened."""
        return self.insist(lambda: queue.release(self.engine, claim, error.message))

    def _fail(self, desk: RunDesk, words: _Words) -> dict[str, Any]:
        claim = desk.claim
        # after an error of the device it is not sure who is to blame: another worker may have more luck
        heals = True if self.device_broke else None

        def fail(points: Sequence[Point]) -> str:
            return queue.fail(self.engine, claim, words.cause, words.message, words.trace, points, heals, self.delay)

        try:
            state = self.insist(lambda: fail(desk.waiting))
        except (LeaseLost, DatabaseError):
            raise
        except Exception:  # it may be the points that no database takes, and why the run failed
            state = self.insist(lambda: fail(()))
        step = max((step for _, step, _ in desk.waiting), default=claim.steps_done)
        return {
            "cause": words.cause,
            "message": words.message,
            "state": state,
            "place": _place(words.trace),
            "step": step,
        }

    def _prepare(self, desk: RunDesk) -> Member:
        """The run as the loop takes it: its config checked, its state restored. Raises what is wrong with it."""
        claim = desk.claim
        family = self._family(claim)
        if self.ranks is not None and isinstance(family, Generator):
            raise CannotShare(
                f"{family.name} is a function that yields its numbers: it has no batch that processes could share",
                "`rnnq worker` without --nproc trains it",
            )
        run_config = config.parse(family.Config, claim.config)
        _check_identity(claim, run_config)
        desk.claim = dataclasses.replace(claim, pack_key=run_config.pack_key())
        _check_data(claim, run_config)
        desk.primary = run_config.primary().name
        state = self._restore(claim, desk, family)
        start = self._parent(claim) if state is None and claim.start_from is not None else None
        # whoever added it lacked the corpus that tells
        budget = run_config.steps_total() if claim.budget is None else claim.budget
        return Member(run_config, desk, budget, state, start)

    def _parent(self, claim: Claim) -> Parent:
        """The weights that a run starts from. Raises InputError when there are none, or the file is not what it was."""
        found = self.insist(lambda: queue.parent_of(self.engine, claim))
        owner = Owner(self.study, found.stage, found.run, found.fingerprint)
        try:
            state = checkpoint.load(self.root, Saved(**found.file), owner)
        except Damaged as error:  # of that run, not of this worker
            what = f"run {claim.run} starts from run {found.run} of {found.stage}, and {error.message}"
            raise DataError(what, "put the file back, or train that run again; then `rnnq retry`") from error
        held = state.get("members", state)  # a best checkpoint has no optimiser
        self.watch("inherited", {"claim": claim, "parent": found.run, "step": state["step"]})
        return Parent(found.run, found.family, found.config, state["step"], held["params"], held["carried"])

    def _family(self, claim: Claim) -> Family | Generator:
        """The code of the run's family."""
        try:
            return self._found(claim.family, self._definition(claim))
        except InputError as error:
            raise _NotHere(error.problems, error.hint) from error

    def _found(self, name: str, definition: definitions.Definition | None) -> Family | Generator:
        found = families.find(name, definition)
        return train.compiled(found) if isinstance(found, Family) and self._compiles(found) else found

    def _compiles(self, family: Family | Generator) -> bool:
        return self.compile and isinstance(family, Family) and family.stacks

    def _numerics(self, family: Family | Generator) -> dict[str, Any]:
        found = train.numerics(self.device, self._compiles(family))
        return found if self.ranks is None else found | {"processes": self.ranks.size}

    def _definition(self, claim: Claim | queue.Ahead) -> definitions.Definition | None:
        """The definition file that holds the run's family, opened while its hash matches. Raises InputError."""
        if claim.source is None or claim.source_sha256 is None:
            return None
        key = (claim.source, claim.source_sha256)
        if key not in self._definitions:
            self._definitions[key] = definitions.load_source(*key, self.defs)
        return self._definitions[key]

    def _restore(self, claim: Claim, desk: RunDesk, family: Family | Generator) -> Mapping[str, Any] | None:
        """Open the newest checkpoint that can be used, and make the run's points equal to its curve."""
        candidates = [Saved(**saved) if saved else None for saved in (claim.checkpoint, claim.checkpoint_prev)]
        saved, state, problems = checkpoint.newest(self.root, candidates, desk.owner)
        desk.numerics = self._numerics(family) | {
            "rnnq": rnnq.__version__,
            "family": f"{claim.family} {family.Config.version}",
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
        desks, now = self.desks, time.monotonic()
        slept = now - self._looked > self.lease  # this process was stopped as a whole: that is no stall
        self._looked = now
        if desks is None:
            return
        if slept or self.waits:
            desks.stepped = now
        seen = desks.stepped
        if now - seen <= max(self.stall, 50 * desks.slowest):
            return
        message = f"no step has ended for {now - seen:.0f} s; the slowest before took {desks.slowest:.1f} s"
        claims = [desk.claim for desk in desks.open]
        with contextlib.suppress(RnnqError):
            self._give_up(claims, message)
            runs = ", ".join(str(claim.run) for claim in claims)
            queue.leave(self.engine, self.id, f"stopped itself: run {runs} stalled: {message}")
        if desks.stepped != seen:
            return  # it went on in this very moment, and its next write finds that the run is no longer its own
        for claim in claims:
            self.watch("stalled", {"claim": claim, "message": message})
        os._exit(1)  # the thread that trains cannot be ended otherwise

    def _give_up(self, claims: Sequence[Claim], message: str) -> None:
        """Without the points that wait: the thread that trains may be writing them at this very moment."""
        if len(claims) == 1:
            queue.fail(self.engine, claims[0], "stalled", message, _stacks(), (), None, self.delay)
            return
        for claim in claims:  # of a pack nobody knows whose fault it is
            with contextlib.suppress(LeaseLost):
                queue.release(self.engine, claim, f"stalled in a pack: {message}", alone=True, trace=_stacks())


class _Findings:
    """What is known of packs, kept in the database. That it cannot be written now stops nobody."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def recall(self, shape: str) -> Sequence[pack.Size]:
        return [pack.Size(**row) for row in queue.packs(self.engine, shape)]

    def remember(self, shape: str, size: pack.Size) -> None:
        with contextlib.suppress(DatabaseError):
            queue.remember_pack(self.engine, shape, **asdict(size))


@dataclass(frozen=True)
class _Words:
    """What is kept of an error."""

    cause: str
    message: str
    trace: str


_Kind = tuple[str, str, str | None, str | None]


def _kind(claim: Claim | queue.Ahead) -> _Kind:
    """Runs of which a trial says the same."""
    return claim.stage, claim.family, claim.source_sha256, claim.pack_key


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


def _check_identity(claim: Claim, run_config: config.Config) -> None:
    """Raises InputError when the family's version or a default has changed since init: it would be another run."""
    if config.fingerprint(claim.family, run_config, config.start_key(claim.start_from)) != claim.fingerprint:
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
