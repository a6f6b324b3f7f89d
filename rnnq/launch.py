"""`rnnq worker --nproc`: processes that torchrun's agent starts together, watches, and starts anew when one dies.

The agent runs in a thread; the main thread hears signals. The processes of a group leave word in a folder of theirs:
`leave`, to be asked to save, give back and leave; `code`, with which the worker among them ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from rnnq import host, processes
from rnnq.errors import WorkerBroken
from rnnq.processes import FOLDER, Asked
from rnnq.ranks import AGAIN, AGAIN_SOUND

RESTARTS = 3  # of one group after a process of it died; LOST_LIMIT attempts of a run, and one for others
QUICK = 60.0  # a group that lives longer is sound
BREAKER = 5  # groups that end sooner, one after the other, each by an error of a run
LOOK = 0.3  # seconds between two looks into the folder
LATE = 60.0  # seconds that a process stays when its leader has gone: the worker may be saving
SOON = 5.0  # and when the worker has ended


def run(n: int, words: Sequence[str]) -> int:
    """Start `rnnq worker WORDS` as n processes that train each run together; returns the worker's exit code.

    Raises WorkerBroken when they die again and again. The first signal asks them to save, give back and leave; a
    second one ends all at once. Should this process be killed, they find out by themselves.
    """
    # what the agent says of processes that end is said here
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="rnnq-"))
    me = f"{os.getpid()}:{host.process_start(os.getpid()) or ''}"
    os.environ |= {processes.LEADER: me, FOLDER: str(folder)}
    try:
        return _run(n, words, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(n: int, words: Sequence[str], folder: Path) -> int:
    group, quick, worst = _Group(n, words, folder), 0, 0
    with group.hearing_signals():
        while True:
            began = time.monotonic()
            group.work()
            code, asked = _code(folder), (folder / "leave").exists()
            if group.failed and not asked:
                raise WorkerBroken(group.failed, "`rnnq show RUN` says what became of its runs; was memory short?")
            again = code in (AGAIN, AGAIN_SOUND)
            worst = max(worst, 1 if again else code or 0)  # again: a run has failed
            if asked or not again:
                return worst
            quick = _quick(quick, code, time.monotonic() - began)
            if quick >= BREAKER and "--keep-going" not in words:
                why = f"{quick} runs, one after the other, failed within seconds"
                raise WorkerBroken(why, "`rnnq ls --state failed`, and `rnnq show RUN`")


def _quick(before: int, code: int | None, seconds: float) -> int:
    """How many groups, one after the other, ended within QUICK seconds by an error of a run, and none ended well."""
    return 0 if seconds >= QUICK else 1 if code == AGAIN_SOUND else before + 1


class _Group:
    """The processes, and the agent that has them."""

    def __init__(self, n: int, words: Sequence[str], folder: Path) -> None:
        self.n, self.folder = n, folder
        # -P: a queue.py in the user's folder is not Python's
        self._line = ("-P", "-m", "rnnq.cli.rank", "worker", *words)
        self._agent: LocalElasticAgent | None = None
        self.failed: str | None = None  # why there is no group any more

    def _new_agent(self) -> LocalElasticAgent:
        parameters = RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, "localhost")
        spec = WorkerSpec(
            role="rnnq",
            local_world_size=self.n,
            rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
            entrypoint=sys.executable,
            args=self._line,
            max_restarts=RESTARTS,
            local_addr="localhost",
        )
        return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=str(self.folder)), shutdown_timeout=60)

    def work(self) -> None:
        """Start the processes; returns when all have ended."""
        thread = threading.Thread(target=self._work, name="agent", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK)  # in parts: a signal is handled between two of them

    def _work(self) -> None:
        try:
            self._agent = self._new_agent()
            result = self._agent.run()
        except Exception as error:
            self.failed = f"the group could not be started: {type(error).__name__}: {error}"
            return
        if result.is_failed():
            ends = [f"process {rank} by {_how(failure.exitcode)}" for rank, failure in result.failures.items()]
            how = ", ".join(ends) or "they do not answer"
            self.failed = f"processes of the group died {RESTARTS + 1} times: {how}"

    @contextlib.contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """The first signal: leave in good order. A second one: at once."""
        asked = Asked()

        def on_signal(number: int, _frame: FrameType | None) -> None:
            (self.folder / "leave").touch()
            if asked.is_at_once(number):
                self._kill()
                shutil.rmtree(self.folder, ignore_errors=True)
                os._exit(128 + number)

        before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in processes.HEARD}
        try:
            yield
        finally:
            processes.restore(before, (self.folder / "leave").exists())

    def _kill(self) -> None:
        for worker in self._agent.get_worker_group().workers if self._agent else ():
            if isinstance(worker.id, int) and worker.id:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.id, signal.SIGKILL)


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _code(folder: Path) -> int | None:
    """The exit code that the worker left, once."""
    try:
        found = int((folder / "code").read_text())
    except OSError:
        return None
    (folder / "code").unlink()
    return found


def begin() -> None:
    """The worker of a group begins: what another one left, before the group was started anew, is old."""
    if os.environ["RANK"] == "0":
        (Path(os.environ[FOLDER]) / "code").unlink(missing_ok=True)


def leave_code(code: int) -> None:
    """The worker of a group ends with this exit code. To the agent any but 0 is a death, and a reason to start anew."""
    place = Path(os.environ[FOLDER])
    with contextlib.suppress(FileNotFoundError):  # nobody is there any more to read it
        (place / ".code").write_text(str(code))
        (place / ".code").replace(place / "code")
    if processes.Leader.of_environment().is_gone():  # who would have removed it
        shutil.rmtree(place, ignore_errors=True)


class Lookout:
    """A thread that looks for what only the folder says: that the group is to leave, or that nobody leads it.

    `leave` is what it calls then; until a worker has begun, there is nothing to give back.
    """

    def __init__(self) -> None:
        self.leave: Callable[[], None] = _leave_at_once
        self._folder, self._leader = Path(os.environ[FOLDER]), processes.Leader.of_environment()
        threading.Thread(target=self._look, name="lookout", daemon=True).start()

    def _look(self) -> None:
        since: float | None = None  # when the one that this process follows, or all who lead it, had gone
        while True:
            gone = self._leader.is_gone()
            if gone or (self._folder / "leave").exists():
                self.leave()
            ended = (self._folder / "code").exists()
            since = (since or time.monotonic()) if gone or ended else None
            if os.environ["RANK"] != "0" and since and time.monotonic() - since > (LATE if gone else SOON):
                os._exit(1)  # it would have heard of it, did it stand where it can hear
            time.sleep(LOOK)


def _leave_at_once() -> None:
    if os.environ["RANK"] == "0":
        leave_code(0)
        os._exit(0)
