"""Several worker processes that are started, stopped and waited for together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from rnnq import host

LEADER = "RNNQ_LEADER"  # tells a worker who started it: pid and start of that process
SIDE_BY_SIDE = "RNNQ_SIDE_BY_SIDE"  # and how many were started together
FOLDER = "RNNQ_RANKS"  # where processes that train each run together leave word for each other; see launch.py
WITHIN = "RNNQ_WITHIN"  # the slice that these had at their very first start
ECHO = 0.5  # seconds in which the same signal, come twice, is one
# a scheduler's warning that time is nearly up: what SLURM and submitit send; Windows has none
WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
HEARD = (signal.SIGTERM, signal.SIGINT, *WARNINGS)  # each asks to save, give back and leave


class Asked:
    """What signals ask for: the first one to leave; a second SIGTERM or SIGINT to leave at once.

    A warning hurries nobody, however often it comes: SLURM sends it to every process of a step, and SIGTERM after it.
    Nor does the echo of a signal: `timeout` sends it to its child, and again to the group that the child is in.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None  # SIGTERM or SIGINT, and when

    def is_at_once(self, number: int) -> bool:
        """Whether this signal, which has just come, means: at once."""
        if number in WARNINGS:
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            return False
        first, when = self._first
        return number != first or now - when > ECHO


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

    The first signal reaches each of them as a warning, since they may have got it themselves; a second one means: at
    once. Should this process be killed, they find out at their next beat, give back what they have and leave.
    """
    me = f"{os.getpid()}:{host.process_start(os.getpid()) or ''}"
    environment = {**os.environ, LEADER: me, SIDE_BY_SIDE: str(n)}
    started: list[subprocess.Popen[bytes]] = []
    passed: list[signal.Signals] = []  # what was sent to each
    asked = Asked()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        # two different ones mean: at once, whatever came before
        passed[:] = [signal.SIGTERM, signal.SIGINT] if asked.is_at_once(number) else passed or [_GENTLY]
        for process in started:
            _send(process, passed)

    before = {number: signal.signal(number, pass_on) for number in HEARD}
    try:
        for i in range(n):
            if passed:
                break
            # one bar a terminal: the first worker has it. A group of its own: Ctrl-C on a terminal goes to a whole
            # group, and with what we pass on a worker would get two signals
            # -P: a queue.py in the user's folder is not Python's
            line = [sys.executable, "-P", "-m", "rnnq", "worker", *words, *(["--no-bar"] if i else [])]
            started.append(subprocess.Popen(line, env=environment, process_group=0))
            if passed:  # the signal came while it was being started
                _send(started[-1], passed)
        return max((_code(process.wait()) for process in started), default=0)
    except OSError:  # no more processes to be had
        pass_on(signal.SIGTERM, None)
        raise
    finally:
        restore(before, bool(passed))


def restore(handlers: Mapping[int, Any], asked: bool) -> None:
    """Put signal handlers back. One who was asked to leave is on the way out: another warning must not kill it there,
    as it would by itself, and make a failure of an end in good order."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_IGN if asked and number in WARNINGS else handler)


_GENTLY = WARNINGS[0] if WARNINGS else signal.SIGTERM


def _send(process: subprocess.Popen[bytes], numbers: Sequence[signal.Signals]) -> None:
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)


def _code(returned: int) -> int:
    if -returned in WARNINGS:
        return 0  # it had not begun: there was nothing to give back
    return 128 - returned if returned < 0 else returned
