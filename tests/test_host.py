"""Who is dead for sure, and what code ran: told by real processes and real git folders."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnnq import host

needs_proc = pytest.mark.skipif(
    host.process_start(os.getpid()) is None, reason="this system does not tell when a process began (no /proc)"
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A living process of ours."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def die_unburied(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and leave it a zombie."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@needs_proc
def test_a_living_process_is_not_gone(child: subprocess.Popen[bytes]) -> None:
    assert not host.is_gone(host.name(), child.pid, host.process_start(child.pid))
    assert not host.is_gone(host.name(), os.getpid(), host.process_start(os.getpid()))


@needs_proc
def test_a_zombie_is_gone_though_its_pid_is_still_taken(child: subprocess.Popen[bytes]) -> None:
    start = host.process_start(child.pid)

    die_unburied(child)

    assert host.process_start(child.pid) is None
    assert host.is_gone(host.name(), child.pid, start)


@needs_proc
def test_a_buried_process_is_gone(child: subprocess.Popen[bytes]) -> None:
    start = host.process_start(child.pid)

    child.kill()
    child.wait()

    assert host.process_start(child.pid) is None
    assert host.is_gone(host.name(), child.pid, start)


@needs_proc
def test_a_pid_that_another_process_has_now_counts_as_gone(child: subprocess.Popen[bytes]) -> None:
    start = host.process_start(child.pid)
    assert start is not None

    assert host.is_gone(host.name(), child.pid, str(int(start) - 1))


def test_a_process_of_another_host_is_never_gone(child: subprocess.Popen[bytes]) -> None:
    start = host.process_start(child.pid)
    child.kill()
    child.wait()

    assert not host.is_gone("elsewhere/0123abcd/4026531836", child.pid, start)


def test_a_process_without_a_known_start_is_never_gone(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()

    assert not host.is_gone(host.name(), child.pid, None)


@needs_proc
def test_a_process_is_not_gone_because_we_ran_out_of_file_handles(child: subprocess.Popen[bytes]) -> None:
    start = host.process_start(child.pid)
    name = host.name()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        gone = host.is_gone(name, child.pid, start)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert not gone


@needs_proc
@pytest.mark.parametrize("name", [b"a) b (c", b"not utf-8 \xff"])
def test_a_process_keeps_its_start_under_any_name(tmp_path: Path, name: bytes) -> None:
    odd = tmp_path / os.fsdecode(name)
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([odd, "600"])
    try:
        start = host.process_start(process.pid)
        assert start is not None
        assert start.isdigit()
        assert int(start) >= int(host.process_start(os.getpid()) or 0)
    finally:
        process.kill()
        process.wait()


@needs_proc
def test_the_name_of_a_host_tells_boot_and_process_namespace_but_people_see_it_short() -> None:
    name, boot, namespace = host.name().split("/")

    assert Path("/proc/sys/kernel/random/boot_id").read_text().startswith(boot)
    assert namespace.isdigit()
    assert host.short(host.name()) == name


# ------------------------------------------------------------------------------------------------ provenance


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_outside_of_git_there_is_neither_commit_nor_dirt(tmp_path: Path) -> None:
    assert host.git_state(tmp_path) == (None, None)


def test_a_repository_without_a_commit_has_no_state(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")

    assert host.git_state(tmp_path) == (None, None)


def test_only_a_changed_tracked_file_makes_a_commit_dirty(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert host.git_state(tmp_path) == (commit, False)

    (tmp_path / "experiments.db").write_text("untracked")
    assert host.git_state(tmp_path) == (commit, False)

    (tmp_path / "a.py").write_text("2")
    assert host.git_state(tmp_path) == (commit, True)


def test_the_command_line_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/rnnq", "ls", "--filter", "loss<1.9 and seed=0"])
    assert host.command_line() == "rnnq ls --filter 'loss<1.9 and seed=0'"

    monkeypatch.setattr(sys, "argv", ["/somewhere/rnnq/__main__.py", "status"])
    assert shlex.split(host.command_line())[1:] == ["-m", "rnnq", "status"]

    monkeypatch.setattr(sys, "argv", ["-c"])
    assert host.command_line() == "-c"


def test_versions_name_what_numbers_depend_on_without_loading_it() -> None:
    code = "import sys; from rnnq import host; print(sorted(host.versions())); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["['numpy', 'pid', 'platform', 'python', 'rnnq', 'torch']", "False"]
