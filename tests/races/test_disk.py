"""The disk is full: under the checkpoints, under the database, under the logs. What was saved stays whole, no run is
done that is not, and once there is room again every run ends as if nothing had happened, to the bit.

A full disk is a real one: a file system in memory of a few megabytes, filled to the last byte. Where none may be
mounted (that takes root) the kernel's limit on the size of a file, RLIMIT_FSIZE, refuses what is written instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.processes import Process, Study, pseudo_text

LEASE, STEPS, EVERY = 1.0, 100, 20

DEFINITION = f"""
import rnnq

stage = rnnq.stage("small", "dynamics", rnnq.grid(seed=[0]), base=dict(
    corpus="text", state_size=128, window=32, batch_size=2, steps={STEPS}, log_every=1, eval_every=50))
"""

TALK = """
import subprocess, sys
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def talk(config):
    yield {"loss": 2.0}
    print("x" * 1_000_000)
    sys.stderr.write("and no newline at the end" * 1000)
    subprocess.run(["echo", "from a child"], stderr=subprocess.DEVNULL)
    yield {"loss": 1.0}

stage = rnnq.stage("talks", talk, rnnq.grid(seed=[0, 1]))
"""


class Disk(Protocol):
    """A disk that can be full."""

    def fill(self, worker: Process) -> None:
        """From now on it refuses what the worker writes."""

    def free(self, worker: Process) -> None:
        """There is room again."""


class Mounted:
    """A file system in memory."""

    def __init__(self, place: Path, size: str) -> None:
        self.place, self.ballast = place, place / "ballast"
        place.mkdir(parents=True, exist_ok=True)
        if os.geteuid() != 0:
            pytest.skip("only root may mount a file system; RLIMIT_FSIZE is tried without")
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "rnnq-test", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}; RLIMIT_FSIZE is tried without")

    def fill(self, worker: Process | None = None) -> None:
        with self.ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (65536, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self, worker: Process | None = None) -> None:
        self.ballast.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)


class Limited:
    """A limit on the size of any file of a process; `size` is the largest."""

    def __init__(self, size: int) -> None:
        self.size = size

    def fill(self, worker: Process) -> None:
        self._limit(worker, self.size)

    def free(self, worker: Process) -> None:
        if worker.lives:
            self._limit(worker, resource.RLIM_INFINITY)

    def _limit(self, worker: Process, size: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.fixture
def mount() -> Iterator[Any]:
    """mount(place, size) makes a small disk, for the time of a test."""
    mounted: list[Mounted] = []

    def make(place: Path, size: str) -> Mounted:
        mounted.append(Mounted(place, size))
        return mounted[-1]

    yield make
    for disk in mounted:
        disk.unmount()


@pytest.fixture
def study(tmp_path: Path, mount: Any) -> Iterator[Study]:
    (tmp_path / "text").write_bytes(pseudo_text(50_000))
    with Study(tmp_path, LEASE) as study:
        yield study


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the small run when nothing happens to it."""
    folder = tmp_path_factory.mktemp("twin")
    (folder / "text").write_bytes(pseudo_text(50_000))
    with Study(folder) as study:
        study.rnnq("init", study.define(DEFINITION))
        study.rnnq("worker")
        return study.result()


@pytest.mark.parametrize("kind", ["mounted", "limited"])
def test_a_checkpoint_for_which_the_disk_has_no_room_costs_nothing_but_the_steps_since_the_one_before(
    study: Study, twin: dict[str, Any], mount: Any, kind: str
) -> None:
    disk = mount(study.folder / "checkpoints", "16m") if kind == "mounted" else Limited(1_000_000)
    study.rnnq("init", study.define(DEFINITION))
    worker = study.worker({"at": "recorded", "step": 50, "do": "wait"}, every=EVERY)
    worker.expect("trapped")
    size = study.named()["checkpoint"]["bytes"]
    assert size > 1_000_000, "more than the limit, of which the database does with less"

    disk.fill(worker)
    worker.go_on()
    worker.end(1)

    said = worker.output
    assert re.search(r"the checkpoint \S+/a1-s60.pt of about [0-9,]+ bytes could not be written: \w+", said), said
    assert "No space left on device (0 bytes are free there)" in said or "File too large" in said
    wanted = int(re.search(r"of about ([0-9,]+) bytes", said)[1].replace(",", ""))  # type: ignore[index]
    assert size < wanted < 1.5 * size, "it holds the best state since step 50, too"
    row = study.run()
    assert (row["state"], row["failures"], row["lost"]) == ("pending", 0, 0)
    assert study.ended() == [("released", "preempted")]
    assert "a1-s60.pt" in row["attempts"][0]["message"]
    assert {name: saved["step"] for name, saved in study.named().items()} == {"checkpoint": 40, "checkpoint_prev": 20}
    assert {path for path in study.files() if "ballast" not in path} == {s["path"] for s in study.named().values()}
    assert "stopped itself: the checkpoint" in study.rows("SELECT message FROM workers")[0]["message"]

    disk.free(worker)
    study.worker(every=EVERY).end()
    assert study.run()["attempts"][1]["step_from"] == 40
    assert study.result() == twin


@pytest.mark.parametrize("kind", ["mounted", "limited"])
def test_a_run_is_not_done_while_there_is_no_room_for_its_last_checkpoint(
    study: Study, twin: dict[str, Any], mount: Any, kind: str
) -> None:
    disk = mount(study.folder / "checkpoints", "16m") if kind == "mounted" else Limited(1_000_000)
    study.rnnq("init", study.define(DEFINITION))
    worker = study.worker({"at": "recorded", "step": STEPS - 1, "do": "wait"}, every=EVERY)
    worker.expect("trapped")
    disk.fill(worker)
    worker.go_on()
    worker.end(1)
    assert study.states() == {1: "pending"}
    assert study.ended() == [("released", "preempted")]
    assert study.named()["checkpoint"]["step"] == STEPS - EVERY

    disk.free(worker)
    study.worker(every=EVERY).end()
    assert study.result() == twin


@pytest.mark.parametrize("kind", ["mounted", "limited"])
def test_training_goes_on_while_the_disk_of_the_database_is_full(
    tmp_path: Path, twin: dict[str, Any], mount: Any, kind: str
) -> None:
    """On a mounted disk the checkpoints lie elsewhere. The limit is on every file: then a checkpoint waits, too."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    disk = mount(tmp_path / "study", "4m") if kind == "mounted" else Limited(4096)
    with Study(tmp_path / "study", LEASE) as study:
        (study.folder / "text").write_bytes(pseudo_text(50_000))
        study.rnnq("init", study.define(DEFINITION), "--root", str(elsewhere))
        # the worker must meet the full disk when points are due, before a checkpoint is
        worker = study.worker({"at": "recorded", "step": 45, "do": "wait"}, {"at": "away", "do": "wait"}, every=EVERY)
        worker.expect("trapped", at="recorded")
        disk.fill(worker)
        time.sleep(2 * LEASE)  # that every lease ends meanwhile, and points are due, is what is tested
        worker.go_on()
        worker.expect("trapped", at="away")
        assert "disk is full" in worker.seen[-1]["message"] or "disk I/O error" in worker.seen[-1]["message"]
        worker.go_on()
        time.sleep(LEASE)  # it trains, and then waits to write its end
        assert worker.lives
        assert study.states() == {1: "running"}

        disk.free(worker)
        worker.end(0)

        assert study.ended() == [("done", None)]
        assert not worker.told("lost")
        row = study.run()
        assert [step for step, _ in row["curves"]["loss"]] == list(range(1, STEPS + 1))
        assert study.result() == twin
        study.forget()


def test_a_full_disk_under_the_logs_fails_no_run(study: Study, mount: Any) -> None:
    disk = mount(study.folder / "logs", "1m")
    study.rnnq("init", study.define(TALK))
    disk.fill()
    study.rnnq("worker")
    assert study.states() == {1: "done", 2: "done"}


def test_a_log_that_outgrows_the_disk_fails_no_run(study: Study) -> None:
    study.rnnq("init", study.define(TALK))
    worker = study.worker({"at": "claimed", "run": 1, "do": "wait"})
    worker.expect("trapped")
    Limited(500_000).fill(worker)
    worker.go_on()
    worker.end(0)
    assert study.states() == {1: "done", 2: "done"}
    assert 0 < len(study.rnnq("logs", "1")) <= 501_000


def test_a_worker_that_finds_no_room_at_all_gives_up_in_good_order(study: Study, twin: dict[str, Any]) -> None:
    """Database, checkpoints and logs on one disk, which stays full: nothing can be written, and nothing is lost."""
    study.rnnq("init", study.define(DEFINITION))
    worker = study.worker({"at": "recorded", "step": 45, "do": "wait"}, every=EVERY)
    worker.expect("trapped")
    Limited(4096).fill(worker)
    worker.go_on()
    worker.expect("away")
    worker.send(signal.SIGTERM)
    worker.send(signal.SIGINT)
    worker.end(None)
    assert study.named()["checkpoint"]["step"] == 40

    study.worker(every=EVERY).end()
    assert study.ended() == [("lost", "lost"), ("done", None)]
    assert study.result() == twin
