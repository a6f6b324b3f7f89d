"""A run that wants more memory than there is: it waits and is tried again, ends failed with cause `oom`, and the worker
trains the next one in the memory that it left. A smaller one is made of it, with its lineage."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Process, Study, pseudo_text

ROOM = 300 * 2**20  # bytes that a worker may take beyond what it has when it claims its first run

HUNGRY = """
import numpy
import torch
import rnnq

class Config(rnnq.Config):
    batch_size: int
    of: str

HOLD = {
    "torch": lambda n: torch.ones(n, 2**18),  # n MiB
    "numpy": lambda n: numpy.ones((n, 2**17)),
    "python": lambda n: bytearray(n * 2**20),
    "a file's map": lambda n: numpy.memmap("map", "uint8", "w+", shape=n * 2**20),
}

@rnnq.family(Config)
def hungry(config):
    yield {"loss": 2.0}
    held = [HOLD[config.of](config.batch_size // 4) for _ in range(4)]
    yield {"loss": 1.0 / len(held)}

stage = rnnq.stage("hungry", hungry, RUNS)
"""

BYTES = """
import rnnq

stage = rnnq.stage("bytes", "dynamics", [{}], base=dict(
    corpus="text", state_size=64, window=16, batch_size=2, steps=40, log_every=10, eval_every=20))
"""


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as study:
        study.environment["RNNQ_RETRY_S"] = "0.01"
        yield study


def bound(worker: Process, room: int) -> None:
    """From now on the worker gets no more memory than that."""
    pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + room
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_a_run_that_wants_too_much_memory_fails_and_the_worker_trains_the_next_ones(study: Study) -> None:
    kinds = ["torch", "numpy", "python", "a file's map"]
    # each of the small ones needs most of the room: whatever the big ones had must have been given back
    sizes = [(kind, size) for kind in kinds for size in (4000, 160)]
    listed = [{"of": kind, "batch_size": size} for kind, size in sizes]
    study.rnnq("init", study.define(HUNGRY.replace("RUNS", repr(listed))))
    worker = study.worker({"at": "claimed", "run": 1, "do": "wait"})
    worker.expect("trapped")
    bound(worker, ROOM)
    worker.go_on()
    worker.end(1)

    for run, (kind, size) in enumerate(sizes, start=1):
        row = study.run(run)
        if size == 4000:
            assert (row["state"], row["cause"], row["failures"]) == ("failed", "oom", 3), (kind, row["message"])
            assert study.ended(run) == [("failed", "oom")] * 3
            assert "delayed" in [event["event"] for event in worker.seen if event.get("run") == run]
            assert "in hungry" in row["attempts"][-1]["traceback"]
        else:
            assert (row["state"], row["message"]) == ("done", None), kind
    assert study.rows("SELECT count(*) AS n FROM workers") == [{"n": 1}]

    study.rnnq("retry", "--filter", "cause == 'oom'", "--set", "batch_size=4")
    study.rnnq("worker")
    lineage = study.rows("SELECT child, parent, kind FROM lineage ORDER BY child")
    assert [(row["parent"], row["kind"]) for row in lineage] == [(run, "retry") for run in (1, 3, 5, 7)]
    for row in lineage:
        new, old = study.run(row["child"]), study.run(row["parent"])
        assert (new["state"], new["config"]) == ("done", old["config"] | {"batch_size": 4})
        assert (old["state"], old["cause"], old["attempt"]) == ("failed", "oom", 3)


def test_memory_that_is_short_when_a_run_is_resumed_costs_no_checkpoint(study: Study) -> None:
    (study.folder / "text").write_bytes(pseudo_text(50_000))
    wide = BYTES.replace("state_size=64", "state_size=1024")
    study.rnnq("init", study.define(wide))
    study.worker({"at": "saved", "step": 10, "do": "kill"}, every=10).end(-signal.SIGKILL)
    size = study.named()["checkpoint"]["bytes"]
    worker = study.worker({"at": "claimed", "run": 1, "do": "wait"}, every=10)
    worker.expect("trapped")
    bound(worker, size // 2)
    worker.go_on()
    worker.end(1)

    assert set(study.ended()[1:]) == {("failed", "oom")}
    assert study.named()["checkpoint"]["step"] == 10
    study.rnnq("retry", "1")
    study.rnnq("worker")
    assert study.run()["attempts"][-1]["step_from"] == 10
    assert study.states() == {1: "done"}
