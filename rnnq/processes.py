"""Several worker processes that are started, stopped and waited for together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from rnnq import host

LEADER = "RNNQ_LEADER"  # tells a worker who started it: pid and start of that process
SIDE_BY_SIDE = "RNNQ_SIDE_BY_SIDE"  # and how many were started together


@dataclass(frozen=True)
class Leader:
    """The process that started this worker beside others; pid 0 when nobody did."""

    pid: int = 0
    start: str | None = None

    @classmethod
    def of_environment(cls) -> Leader:
        """The leader of this process."""
        pid, _, start = os.environ.get(LEADER, "").partition(":")
        return cls(int(pid), start) if pid.isdigit() and start else cls()

    def is_gone(self) -> bool:
        """Whether it was there and is no more: then its workers leave, too."""
        return self.pid != 0 and host.is_gone(host.name(), self.pid, self.start)


def side_by_side() -> int:
    """How many workers were started together with this one, itself among them; not all need be up yet."""
    given = os.environ.get(SIDE_BY_SIDE, "")
    return int(given) if given.isdigit() and Leader.of_environment().pid else 1


def run(n: int, words: Sequence[str]) -> int:
    """Start `rnnq worker WORDS` n times and wait for all; returns the worst exit code.

    The first signal reaches each of them once; of a second one, too, which means: at once. Should this process be
    killed, they find out at their next beat, give back what they have and leave.
    """
    me = f"{os.getpid()}:{host.process_start(os.getpid()) or ''}"
    environment = {**os.environ, LEADER: me, SIDE_BY_SIDE: str(n)}
    started: list[subprocess.Popen[bytes]] = []
    stopped: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for i in range(n):
            if stopped:
                break
            # one bar a terminal: the first worker has it. A group of its own: Ctrl-C on a terminal goes to a whole
            # group, and with what we pass on a worker would get two signals
            # -P: a queue.py in the user's folder is not Python's
            line = [sys.executable, "-P", "-m", "rnnq", "worker", *words, *(["--no-bar"] if i else [])]
            started.append(subprocess.Popen(line, env=environment, process_group=0))
            if stopped:  # the signal came while it was being started
                started[-1].send_signal(signal.SIGTERM)
        return max((_code(process.wait()) for process in started), default=0)
    except OSError:  # no more processes to be had
        pass_on(signal.SIGTERM, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(returned: int) -> int:
    return 128 - returned if returned < 0 else returned
