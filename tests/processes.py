"""Real processes for tests: forked quickly, followed by their events, stopped at an exact place; no sleeps.

`Study` is a folder as a user has it: definitions, a database, and workers that run in it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from rnnq import db, runs

PATIENCE = 120.0  # seconds after which an event that does not come is a failure
RACES = Path(__file__).parent / "races"


class Zygote:
    """The process that all others are forked from; see races/zygote.py."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(PATIENCE)
        # without a GPU everywhere, so that all workers of a test compute the same
        places = os.pathsep.join(filter(None, [str(RACES.parent.parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, str(RACES / "zygote.py"), str(theirs.fileno())]
        self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        assert self._socket.recv(16) == b"ready"
        atexit.register(self.close)

    def fork(self, request: Mapping[str, Any], files: list[int]) -> int:
        """Start a process; its pid."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        return int(self._socket.recv(32))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


zygote = cache(Zygote)


class Process:
    """A running process and what it tells: the worker's events, and stopped, continued, exited."""

    def __init__(self, folder: Path, words: list[str], environment: Mapping[str, str], mute: bool) -> None:
        self.seen: list[dict[str, Any]] = []
        self._err = folder / f".err-{random.randbytes(6).hex()}"
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        stdin, answers = os.pipe()
        self._stdin: int | None = answers
        events, told = os.pipe()
        self._err.touch()
        err = _closed_pipe() if mute else os.open(self._err, os.O_WRONLY)
        request = {"folder": str(folder), "words": words, "environment": dict(environment)}
        self.pid = zygote().fork(request, [stdin, err, err, told])
        for file in (stdin, told, err):
            os.close(file)
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def _read(self, file: int) -> None:
        with os.fdopen(file) as lines:
            for line in lines:
                self._events.put(json.loads(line))

    def expect(self, event: str, **details: Any) -> dict[str, Any]:
        """Wait for an event with such details; those that come before it are kept in `seen`."""
        while True:
            try:
                found = self._events.get(timeout=PATIENCE)
            except queue.Empty:
                raise AssertionError(f"no {event} {details} after {PATIENCE:g} s\n{self._story()}") from None
            self.seen.append(found)
            if found["event"] == event and all(found.get(name) == value for name, value in details.items()):
                return found
            assert found["event"] != "exited", f"it ended before {event} {details}\n{self._story()}"

    def end(self, code: int | None = 0) -> list[dict[str, Any]]:
        """Wait for the end, with that exit code (negative: a signal); returns all events."""
        found = self.expect("exited")
        assert code is None or found["code"] == code, f"exit {found['code']}, not {code}\n{self._story()}"
        return self.seen

    def _story(self) -> str:
        return "\n".join([*(str(event) for event in self.seen[-20:]), self.output])

    def told(self, event: str, **details: Any) -> list[dict[str, Any]]:
        """The events of that name and with such details among those seen so far."""
        return [e for e in self.seen if e["event"] == event and all(e.get(n) == v for n, v in details.items())]

    def wait(self, seconds: float) -> None:
        """Wait for its end, but not for longer than that."""
        self._reader.join(seconds)

    @property
    def lives(self) -> bool:
        """Whether it has not ended yet."""
        return self._reader.is_alive()

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr."""
        return self._err.read_text()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def go_on(self) -> None:
        """Let it pass the place where it waits."""
        assert self._stdin is not None
        os.write(self._stdin, b"\n")

    def close(self) -> None:
        """Kill it if it still lives."""
        if self.lives and not self.told("exited"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._reader.join()
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None


def _closed_pipe() -> int:
    """A file that nobody reads from any more, as the terminal of a connection that broke."""
    nobody, file = os.pipe()
    os.close(nobody)
    return file


class Study:
    """A folder with definitions, a database, and processes at work in it. Use it with `with`."""

    def __init__(self, folder: Path, lease: float | None = None, address: str | None = None) -> None:
        """With an `address` the database is there, and not in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = address or str(folder / "experiments.db")
        self.environment = {"RNNQ_LEASE_S": str(lease)} if lease else {}
        self.environment |= {"RNNQ_DB": address} if address else {}
        self._processes: list[Process] = []
        self._engine: Engine | None = None

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()
        self.forget()

    # ------------------------------------------------------------------------------------------------- processes

    def start(self, *words: str, mute: bool = False) -> Process:
        """A process in this folder: "rnnq ..." or "driver ...". A mute one writes into a pipe without a reader."""
        process = Process(self.folder, list(words), self.environment, mute)
        self._processes.append(process)
        return process

    def rnnq(self, *words: str, code: int = 0) -> str:
        """`rnnq ...` to its end; returns what it wrote."""
        process = self.start("rnnq", *words)
        process.end(code)
        return process.output

    def drive(self, verb: str, **spec: Any) -> Process:
        """A process of races/driver.py."""
        return self.start("driver", verb, json.dumps(spec))

    def worker(self, *traps: Mapping[str, Any], **spec: Any) -> Process:
        """A worker that falls into traps; see races/driver.py."""
        return self.drive("work", traps=traps, **spec)

    # --------------------------------------------------------------------------------------------------- content

    def make(self) -> None:
        """Make an empty database."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            db.upgrade(self.address, str(self.folder) if "RNNQ_DB" in self.environment else None)

    def define(self, content: str, name: str = "study.py") -> str:
        """Write a definition file; returns its path."""
        path = self.folder / "defs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return f"defs/{name}"

    @property
    def engine(self) -> Engine:
        """The database, opened by the test's own process."""
        if self._engine is None:
            self._engine = db.open(self.address)
        return self._engine

    def forget(self) -> None:
        """Close the database."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """What a query finds."""
        with db.reading(self.engine) as connection:
            return [dict(row._mapping) for row in connection.execute(text(sql), values)]

    def write(self, sql: str, **values: Any) -> None:
        """Change the database behind rnnq's back."""
        with db.transaction(self.engine) as connection:
            connection.execute(text(sql), values)

    def run(self, run: int = 1) -> dict[str, Any]:
        """A run whole: its row, attempts, curves."""
        return runs.show(self.engine, run)

    def ended(self, run: int = 1) -> list[tuple[str, str | None]]:
        """How each attempt of a run ended, and its cause."""
        return [(attempt["ended"], attempt["cause"]) for attempt in self.run(run)["attempts"]]

    def states(self) -> dict[int, str]:
        """The state of each run."""
        return {row["id"]: row["state"] for row in self.rows("SELECT id, state FROM runs ORDER BY id")}

    def files(self) -> set[str]:
        """Every file below checkpoints/, hidden ones too."""
        folder = self.folder / "checkpoints"
        return {str(path.relative_to(self.folder)) for path in folder.rglob("*") if path.is_file()}

    def named(self, run: int = 1) -> dict[str, dict[str, Any]]:
        """The files that a run's row names, each proved to hold the bytes that the row says."""
        row = self.run(run)
        found = {}
        for name in ("checkpoint", "checkpoint_prev", "checkpoint_best"):
            if row[name]:
                content = (self.folder / row[name]["path"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == row[name]["sha256"], f"{name} holds other bytes"
                assert len(content) == row[name]["bytes"]
                found[name] = row[name]
        return found

    def result(self, run: int = 1) -> dict[str, Any]:
        """All that a finished run has to show for itself but its speed; equal for equal runs, to the bit."""
        row = self.run(run)
        assert row["state"] == "done", row["message"]
        process = self.drive("digest", run=run)
        digest = process.expect("digest")
        summary = {name: value for name, value in row["summary"].items() if name != "steps_per_s"}
        return {"curves": row["curves"], "summary": summary, "steps": row["steps_done"], "loss": row["loss"], **digest}


def pseudo_text(n: int, seed: int = 0) -> bytes:
    """n bytes of made-up words, the same for the same seed."""
    chance = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(chance.choices(letters, range(26, 0, -1), k=chance.randint(1, 9))) for _ in range(400)]
    found: list[str] = []
    size = 0
    while size < n:
        word = chance.choices(words, range(400, 0, -1))[0] + chance.choice([" ", " ", " ", ", ", ".\n"])
        found.append(word)
        size += len(word)
    return "".join(found).encode()[:n]
