"""This machine and this process: who they are, whether another process still lives, and what code runs here."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from rnnq.errors import InputError


@cache
def name() -> str:
    """Host name, boot and process namespace: together they say where a process id means something.

    Two containers may share a host name and not see each other's processes; a reboot hands out the same ids anew.
    """
    boot = _read("/proc/sys/kernel/random/boot_id").strip()[:8]
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")
    except OSError:
        namespace = ""
    return "/".join(part for part in (socket.gethostname(), boot, namespace) if part)


def short(host: str) -> str:
    """The host name alone, for people."""
    return host.split("/", 1)[0]


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; with the pid it names a process for good.

    None where the system does not tell, and for a process that is gone. A zombie is gone: it will not write again.
    """
    try:
        return _start(pid)
    except OSError:
        return None


def is_gone(host: str, pid: int, start: str | None) -> bool:
    """Whether a process is surely dead. Never true for a process of another host, or one without a known start."""
    if host != name() or start is None:
        return False
    try:
        return _start(pid) != start
    except (FileNotFoundError, ProcessLookupError):
        return not _exists(pid)  # the system may hide what other users run
    except OSError:
        return False  # we could not look, say for want of file handles: that proves nothing


def _start(pid: int) -> str | None:
    """As `process_start`; raises OSError for a process that cannot be seen."""
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    fields = stat.rpartition(")")[2].split()  # the name in brackets may hold spaces
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is there, and another user's
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def seconds_from_environment(variable: str, default: float, least: float = 0.0) -> float:
    """A number of seconds, up to a day, that an environment variable may say. Raises InputError for anything else."""
    given = os.environ.get(variable)
    if given is None:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not least <= seconds <= 86400:
        raise InputError(f"{variable}={given!r} is no number of seconds from {least:g} to 86400")
    return seconds


# ------------------------------------------------------------------------------------------------ provenance


def command_line() -> str:
    """The command as one could type it again, but for passwords in addresses."""
    program = Path(sys.argv[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name or "python"]
    return shlex.join(map(masked, [*words, *sys.argv[1:]]))


def masked(word: str) -> str:
    """A word with *** for the password of an address in it."""
    word = re.sub(r"(?<=://)([^:/@\s]*):\S*@", r"\1:***@", word)
    return re.sub(r"(?<=[?&]password=)[^&\s]*", "***", word)


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of a folder, and whether tracked files differ from it; (None, None) outside of git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if changes is None else bool(changes.strip())


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Python's version and those of the packages that numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "pid": str(os.getpid())}
    for package in ("rnnq", "torch", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found
