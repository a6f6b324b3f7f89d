"""What a test's processes do besides `rnnq ...`: a worker that stops itself at an exact place, an init that is
killed at its nth commit, a process that only beats.

    driver work|pulse|asked|init|beat|digest JSON

Each tells what happens as JSON lines on its events file.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from sqlalchemy import event

from rnnq import checkpoint, db, queue, runs
from rnnq.errors import RnnqError
from rnnq.train import Every
from rnnq.worker import Pulse, Scope, Stop, Worker, pick_device, prepare
from tests.conftest import PROVENANCE, new_stage

Say = Callable[..., None]


def main(file: int) -> None:
    lock = threading.Lock()

    def say(name: str, **details: Any) -> None:
        with lock:
            os.write(file, (json.dumps({"event": name, **details}) + "\n").encode())

    verb, spec = sys.argv[1], json.loads(sys.argv[2])
    engine = db.open(os.environ.get("RNNQ_DB", "experiments.db"))
    verbs = {"work": work, "pulse": pulse, "asked": asked, "init": init, "beat": beat, "digest": digest}
    sys.exit(verbs[verb](engine, spec, say))


# -------------------------------------------------------------------------------------------------------- workers


def work(engine: Any, spec: Mapping[str, Any], say: Say) -> int:
    """A worker. spec: traps, every (steps), threads, pack (members; none: auto), and what Scope takes.

    A trap is {"at": event, "do": kill|stop|wait|raise, ...} with the run, attempt or step that it waits for; it fires
    once. `wait` goes on when a line comes on stdin. "committing" is the end of a write, with what the event before
    it told.
    """
    device = pick_device(None, "cpu")
    prepare(device)
    if spec.get("threads"):
        torch.set_num_threads(spec["threads"])
    traps = list(spec.get("traps", ()))

    latest: dict[str, Any] = {}

    def watch(name: str, details: Mapping[str, Any]) -> None:
        told = plain(details)
        if name != "recorded":
            say(name, **told)
        latest.clear()
        latest.update(told)
        look(name, told)

    def look(name: str, told: dict[str, Any]) -> None:
        for trap in traps:
            if trap["at"] == name and all(told.get(key) == trap[key] for key in trap.keys() - {"at", "do"}):
                traps.remove(trap)
                say("trapped", at=name, **told)
                act(trap["do"])
                return

    def on_commit(connection: Any) -> None:
        if is_write(connection) and threading.current_thread() is threading.main_thread():
            look("committing", dict(latest))

    event.listen(engine, "commit", on_commit)
    scope = Scope(**{name: spec[name] for name in ("stage", "runs", "drain", "wait") if name in spec})
    every = Every(seconds=None, steps=spec["every"]) if spec.get("every") else Every()
    return Worker(engine, device, scope, Path("defs"), every, watch, pack_size=spec.get("pack")).work()


def is_write(connection: Any) -> bool:
    """Whether a transaction holds the write lock."""
    return bool(connection.get_execution_options().get("rnnq_write"))


def plain(details: Mapping[str, Any]) -> dict[str, Any]:
    """An event's details as JSON can hold them."""
    told = {k: v for k, v in details.items() if isinstance(v, (str, int, float, bool, list, type(None)))}
    told.pop("points", None)
    told.pop("members", None)
    if "claims" in told:
        told["runs"] = [claim.run for claim in told.pop("claims")]
    if "claim" in details:
        told |= {"run": details["claim"].run, "attempt": details["claim"].attempt}
    return told


def act(what: str) -> None:
    """Do it exactly here."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        # to this thread: a stop that another thread takes lets this one run on for a while
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif what == "wait":
        sys.stdin.readline()
    elif what == "raise":
        raise KeyError("a watcher with a bug")


def pulse(engine: Any, spec: Mapping[str, Any], say: Say) -> int:
    """Only a worker's heart. Once it has taken back a run by the clock it stops itself, or does so inside reap(), at
    the beginning of its spec["inside"]th transaction; then it beats on until it has taken back another."""
    _, lease, _ = db.study(engine)
    name = f"heart{os.getpid()}"
    queue.register(engine, name, "cpu", {})
    taken: SimpleQueue[list[int]] = SimpleQueue()

    def reaped(found: Sequence[queue.Reaped]) -> None:
        if found:
            say("reaped", runs=[item.run for item in found], moment=time.monotonic())
            taken.put([item.run for item in found])

    heart = Pulse(engine, name, lease, reaped)
    say("beating", moment=time.monotonic())
    heart.start()
    taken.get()
    transactions = 0

    def on_begin(_connection: Any) -> None:
        nonlocal transactions
        if threading.current_thread() is threading.main_thread():
            transactions += 1
            if transactions == spec.get("inside"):
                act("stop")

    event.listen(engine, "begin", on_begin)
    if not spec.get("inside"):
        act("stop")
    at_once = heart.reap()
    say("woke", moment=time.monotonic(), at_once=[item.run for item in at_once])
    taken.get()
    heart.stop()
    return 0


def asked(_engine: Any, _spec: Mapping[str, Any], say: Say) -> int:
    """Wait for a request to leave that comes, by a signal, after the nth bytecode of the wait; for every n there is."""
    places = bytecodes = 0

    def on_bytecode(frame: Any, _event: str, _arg: Any) -> Any:
        nonlocal bytecodes
        frame.f_trace_opcodes = True
        bytecodes += 1
        if bytecodes == places:
            signal.raise_signal(signal.SIGUSR1)
        return on_bytecode

    while bytecodes >= places:
        stop, places, bytecodes = Stop(), places + 1, 0
        signal.signal(signal.SIGUSR1, lambda *_, stop=stop: stop.set())
        sys.settrace(on_bytecode)
        stop.wait(0.001)
        sys.settrace(None)
        assert stop.is_set() == (bytecodes >= places)
    say("waited", places=places)
    return 0


# ----------------------------------------------------------------------------------------------------- the queue


def init(engine: Any, spec: Mapping[str, Any], say: Say) -> int:
    """Add spec["n"] runs. At write number spec["at"], do spec["do"]: before it commits, or, "after", between it and
    the next."""
    writes = 0
    trapped = threading.Event()

    def on_commit(connection: Any) -> None:
        nonlocal writes
        writes += is_write(connection)
        if not spec.get("after"):
            look()

    def look(*_: Any) -> None:
        if writes == spec.get("at") and not trapped.is_set():
            trapped.set()
            say("trapped", writes=writes)
            act(spec["do"])

    event.listen(engine, "commit", on_commit)
    event.listen(engine.pool, "checkin", look)
    say("ready")
    began = time.monotonic()
    try:
        [added] = queue.init(engine, [new_stage(spec["n"])])
    except RnnqError as error:
        say("refused", message=error.message)
        return 1
    say("added", added=added.added, present=added.present, seconds=time.monotonic() - began, writes=writes)
    return 0


def beat(engine: Any, spec: Mapping[str, Any], say: Say) -> int:
    """Hold one run and beat for it, at intervals of spec["every"] seconds, until stdin ends. Tells the slowest beat."""
    queue.register(engine, "beater", "cpu", {})
    [claim] = queue.claim(engine, "beater", PROVENANCE)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
    took: list[float] = []
    say("beating")
    while not ended.wait(spec["every"]):
        began = time.monotonic()
        held = queue.beat(engine, "beater", [(claim.run, claim.attempt)])
        took.append(time.monotonic() - began)
        if claim.run not in held:
            say("lost")
            return 1
    say("beaten", n=len(took), slowest=max(took), mean=sum(took) / len(took))
    return 0


# ------------------------------------------------------------------------------------------------------- results


def digest(engine: Any, spec: Mapping[str, Any], say: Say) -> int:
    """A hash of each part of the final checkpoint of a run, opened as a worker opens it."""
    study, _, root = db.study(engine)
    row = runs.show(engine, spec["run"])
    owner = checkpoint.Owner(study, row["stage"], row["id"], row["fingerprint"])
    state = checkpoint.load(root, checkpoint.Saved(**row["checkpoint"]), owner)
    best = checkpoint.load(root, checkpoint.Saved(**row["checkpoint_best"]), owner)
    parts = {**state, **state["members"], "best_file": best}
    say("digest", **{name: hash_of(part) for name, part in parts.items()})
    return 0


def hash_of(tree: Any) -> str:
    """One hash of a tree of dicts, lists, tensors and plain values, to the bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value):
                found.update(f"<{name}>".encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            found.update(f"{value!r};".encode())

    add(tree)
    return found.hexdigest()
