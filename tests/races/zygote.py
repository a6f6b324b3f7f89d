"""A process that has imported everything and opened nothing; every process that a test asks for is forked from it.

Importing torch takes 3 s and a fork 0.01 s. What is forked is a process like any other: it has its own pid, memory,
signals and files, and opens its own database. It runs `rnnq ...` as the command line does, or driver.py.

A request is one JSON message with four files (stdin, stdout, stderr, events); the answer is the pid. What becomes
of the process is written to its events: stopped, continued, exited. When the socket closes, all are killed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

import alembic.command  # noqa: F401
import driver

import rnnq.cli
import rnnq.cli.work
import rnnq.desk
import rnnq.families.dynamics.model
import rnnq.worker


def main() -> None:
    asked = socket.socket(fileno=int(sys.argv[1]))
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    events: dict[int, int] = {}  # pid -> where its life is written down
    gc.collect()
    gc.freeze()  # else each child's first collection copies all of torch
    asked.sendall(b"ready")
    while True:
        readable, _, _ = select.select([asked, wake], [], [])
        if wake in readable:
            os.read(wake, 4096)
            report(events)
        if asked in readable:
            message, files, _, _ = socket.recv_fds(asked, 1 << 20, 4)
            if not message:
                break
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for mine in (asked.detach(), wake, waker, *events.values()):
                    os.close(mine)
                become(json.loads(message), files)
            for file in files[:3]:
                os.close(file)
            events[pid] = files[3]
            asked.sendall(str(pid).encode())
    for pid in events:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def report(events: dict[int, int]) -> None:
    """Write down which processes were stopped, continued or ended."""
    while events:
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if pid == 0:
            return
        if os.WIFSTOPPED(status):
            say(events[pid], event="stopped")
        elif os.WIFCONTINUED(status):
            say(events[pid], event="continued")
        else:
            file = events.pop(pid)
            say(file, event="exited", code=os.waitstatus_to_exitcode(status))
            os.close(file)


def say(file: int, **what: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test has ended
        os.write(file, (json.dumps(what) + "\n").encode())


def become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """The forked process takes the request's files, folder and environment, and does what it asks for."""
    for target, file in enumerate(files[:3]):
        os.dup2(file, target)
        os.close(file)
    # anew: the old ones remember what kind of file was there before
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    rnnq.db._jitter.seed()  # else all would wait for the same times, which processes of their own do not
    rnnq.worker._jitter.seed()
    rnnq.desk._jitter.seed()
    code: Any = 0
    try:
        if request["words"][0] == "rnnq":
            os.close(files[3])
            rnnq.cli.main()
        else:
            driver.main(files[3])
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)  # an interpreter that takes torch apart before it ends needs 0.3 s


if __name__ == "__main__":
    main()
