"""The database goes away, all workers sleep, a run wedges its worker, memory is short: what can heal, heals."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Study, pseudo_text

LEASE = 1.0

DEFINITION = """
import rnnq

stage = rnnq.stage("long", "dynamics", rnnq.grid(seed=[0, 1]), base=dict(
    corpus="text", state_size=8, window=32, batch_size=4, log_every=10, eval_every=1_000_000, steps=10_000_000))
"""

WEDGED = """
import os, time
import rnnq

class Config(rnnq.Config):
    pass

class Wedged(rnnq.Family):
    Config = Config
    name = "wedged"

    def build(self, config):
        import torch
        return torch.nn.Linear(1, 1)

    def batch(self, config, step):
        import torch
        while step == 7 and not os.path.exists("go"):
            time.sleep(0.05)
        return torch.ones(1, 1)

    def loss(self, module, data):
        return module(data).square().mean()

class Steps(Config):
    steps: int = 20

Wedged.Config = Steps
stage = rnnq.stage("wedged", Wedged, rnnq.grid(seed=[0]))
"""

SHORT_OF_MEMORY = """
import os
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def hungry(config):
    yield {"loss": 2.0}
    if not os.path.exists("memory"):
        raise MemoryError("no room")
    yield {"loss": 1.0}

stage = rnnq.stage("hungry", hungry, rnnq.grid(seed=[0]))
"""


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    (tmp_path / "text").write_bytes(pseudo_text(50_000))
    with Study(tmp_path, LEASE) as study:
        yield study


@contextlib.contextmanager
def locked(study: Study, kind: str = "IMMEDIATE") -> Iterator[None]:
    """The write lock in somebody's hand."""
    with contextlib.closing(sqlite3.connect(study.folder / "experiments.db", isolation_level=None)) as holder:
        while True:
            with contextlib.suppress(sqlite3.OperationalError):
                holder.execute(f"BEGIN {kind}")
                break
        yield
        holder.execute("ROLLBACK")


def steps_of(study: Study, run: int) -> list[int]:
    sql = "SELECT step FROM points WHERE run_id = :run AND name = 'loss' ORDER BY step"
    return [row["step"] for row in study.rows(sql, run=run)]


def test_training_goes_on_while_the_database_is_locked_for_longer_than_the_lease(study: Study) -> None:
    study.rnnq("init", study.define(DEFINITION))
    workers = [study.worker(every=200) for _ in range(2)]
    for worker in workers:
        worker.expect("saved")
    before = {run: max(steps_of(study, run)) for run in (1, 2)}

    with locked(study):
        began = time.monotonic()
        for worker in workers:
            worker.expect("away")
        while time.monotonic() - began < 3 * LEASE:
            assert all(worker.lives for worker in workers)
            time.sleep(0.05)  # between two looks; the outage must outlast the lease

    for worker in workers:
        worker.expect("saved")
        worker.send(signal.SIGTERM)
        assert not worker.told("lost")
        worker.end()
    for run in (1, 2):
        assert study.ended(run) == [("released", "preempted")]  # the one attempt: nobody took it away
        steps = steps_of(study, run)
        assert steps == list(range(10, max(steps) + 1, 10))  # and no point is missing
        assert max(steps) > before[run] + 200
        assert study.named(run)


def test_a_run_that_ends_while_the_database_is_locked_is_done_when_it_is_back(study: Study) -> None:
    study.rnnq("init", study.define(DEFINITION.replace("10_000_000", "400").replace("[0, 1]", "[0]")))
    worker = study.worker({"at": "saved", "step": 300, "do": "wait"}, every=100)
    worker.expect("trapped")
    with locked(study):
        worker.go_on()
        time.sleep(3 * LEASE)  # that the lease runs out meanwhile is what is tested
        assert worker.lives
    worker.end()
    assert study.ended() == [("done", None)]
    assert steps_of(study, 1) == list(range(10, 401, 10))


def test_a_run_that_waits_for_the_database_is_not_stalled(study: Study) -> None:
    study.environment |= {"RNNQ_STALL_S": "1"}
    study.rnnq("init", study.define(DEFINITION.replace("10_000_000", "400").replace("[0, 1]", "[0]")))
    worker = study.worker({"at": "saved", "step": 300, "do": "wait"}, every=100)
    worker.expect("trapped")
    study.write("ALTER TABLE point RENAME TO elsewhere")  # every write fails at once
    worker.go_on()
    worker.expect("away")
    time.sleep(3)  # three times what counts as stalled
    assert worker.lives
    study.write("ALTER TABLE elsewhere RENAME TO point")
    worker.end()
    assert study.ended() == [("done", None)]


def test_a_worker_that_looks_for_work_waits_for_the_database(study: Study) -> None:
    study.rnnq("init", study.define(DEFINITION.replace("10_000_000", "40")))
    worker = study.worker({"at": "done", "run": 1, "do": "wait"})
    worker.expect("trapped")
    with locked(study):
        worker.go_on()
        time.sleep(2 * LEASE)  # it tells nobody that it waits; it must only not have ended
        assert worker.lives
    worker.end()
    assert set(study.states().values()) == {"done"}


def test_workers_that_slept_together_keep_their_runs(study: Study) -> None:
    study.rnnq("init", study.define(DEFINITION))
    workers = [study.worker(every=200) for _ in range(2)]
    for worker in workers:
        worker.expect("saved")
    for worker in workers:
        worker.send(signal.SIGSTOP)
        worker.expect("stopped")
    time.sleep(2 * LEASE)  # past every lease
    for worker in workers:
        worker.send(signal.SIGCONT)
    for worker in workers:
        worker.expect("saved")
        worker.send(signal.SIGTERM)
        worker.end()
        assert not worker.told("lost")
        assert not worker.told("reaped")
    assert [study.ended(run) for run in (1, 2)] == [[("released", "preempted")]] * 2


FINITE = DEFINITION.replace("10_000_000", "200")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two short runs when nothing happens to them."""
    folder = tmp_path_factory.mktemp("twin")
    (folder / "text").write_bytes(pseudo_text(50_000))
    with Study(folder) as study:
        study.rnnq("init", study.define(FINITE))
        study.rnnq("worker")
        return [study.result(run) for run in (1, 2)]


@pytest.mark.parametrize("outage", ["asleep", "locked"])
def test_an_outage_longer_than_the_lease_changes_no_bit_of_any_run(
    study: Study, undisturbed: list[dict[str, Any]], outage: str
) -> None:
    study.rnnq("init", study.define(FINITE))
    workers = [study.worker({"at": "saved", "step": 100, "do": "wait"}, every=50) for _ in range(2)]
    for worker in workers:
        worker.expect("trapped")

    if outage == "asleep":
        for worker in workers:
            worker.go_on()
            worker.send(signal.SIGSTOP)
            worker.expect("stopped")
        time.sleep(2.5 * LEASE)  # past every lease
        for worker in workers:
            worker.send(signal.SIGCONT)
    else:
        with locked(study, "EXCLUSIVE"):
            for worker in workers:
                worker.go_on()
            time.sleep(2.5 * LEASE)  # they train, and their leases run out
    for worker in workers:
        worker.end()

    assert [study.ended(run) for run in (1, 2)] == [[("done", None)]] * 2
    assert not any(worker.told("lost") or worker.told("reaped") for worker in workers)
    assert [study.result(run) for run in (1, 2)] == undisturbed


def test_a_run_that_wedges_its_worker_is_stalled_tried_again_and_goes_on(study: Study) -> None:
    study.environment |= {"RNNQ_STALL_S": "1", "RNNQ_RETRY_S": "0.01"}
    study.rnnq("init", study.define(WEDGED))
    worker = study.start("rnnq", "worker", "--checkpoint-every", "5")
    worker.end(1)
    row = study.run()
    assert (row["state"], row["cause"], row["failures"], row["steps_done"]) == ("waiting", "stalled", 1, 5)
    [attempt] = row["attempts"]
    assert (attempt["ended"], attempt["cause"]) == ("failed", "stalled")
    assert "in batch" in attempt["traceback"]  # where it hangs
    assert "no step has ended for" in row["message"]
    assert "stalled" in study.rows("SELECT message FROM workers")[0]["message"]

    (study.folder / "go").touch()
    study.rnnq("worker", "--checkpoint-every", "5")
    assert study.ended() == [("failed", "stalled"), ("done", None)]
    assert study.run()["attempts"][1]["step_from"] == 5


def test_the_third_stall_without_progress_fails_the_run(study: Study) -> None:
    study.environment |= {"RNNQ_STALL_S": "0.5", "RNNQ_RETRY_S": "0.01"}
    study.rnnq("init", study.define(WEDGED))
    for _ in range(3):
        study.rnnq("worker", code=1)
    assert study.states() == {1: "failed"}
    assert study.ended() == [("failed", "stalled")] * 3
    assert "nothing is pending" in study.rnnq("worker")


def test_a_worker_that_was_stopped_for_long_does_not_take_its_run_for_stalled(study: Study) -> None:
    study.environment |= {"RNNQ_STALL_S": "1"}
    study.rnnq("init", study.define(DEFINITION.replace("[0, 1]", "[0]")))
    worker = study.worker(every=200)
    worker.expect("saved")
    worker.send(signal.SIGSTOP)
    worker.expect("stopped")
    time.sleep(2.5)  # more than what counts as stalled
    worker.send(signal.SIGCONT)
    worker.expect("saved")
    worker.send(signal.SIGTERM)
    worker.end()
    assert study.ended() == [("released", "preempted")]


def test_a_run_that_was_short_of_memory_waits_and_is_tried_again(study: Study) -> None:
    study.environment["RNNQ_RETRY_S"] = "0.5"
    study.rnnq("init", study.define(SHORT_OF_MEMORY))
    worker = study.start("rnnq", "worker")
    while not study.states() or study.states()[1] != "waiting":
        assert worker.lives
        time.sleep(0.02)  # a look now and then: the worker wants the core
    (study.folder / "memory").touch()
    worker.end()
    first, second = study.run()["attempts"]
    assert (first["cause"], second["ended"]) == ("oom", "done")
    assert second["started_at"] - first["ended_at"] >= 0.5
    assert "to be tried again: MemoryError: no room" in worker.output


def test_a_run_that_waits_for_its_next_try_can_be_cancelled(study: Study) -> None:
    study.rnnq("init", study.define(SHORT_OF_MEMORY))
    study.rnnq("worker", "--drain")
    row = study.run()
    assert row["state"] == "waiting"
    assert row["wake_at"] > time.time() + 30
    study.rnnq("cancel", "1")
    assert study.states() == {1: "cancelled"}
    study.rnnq("worker")


@pytest.mark.parametrize("name", ["RNNQ_RETRY_S", "RNNQ_STALL_S"])
@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_a_number_of_seconds_that_is_none_is_refused(study: Study, name: str, value: str) -> None:
    study.rnnq("init", study.define(SHORT_OF_MEMORY))
    study.environment[name] = value
    assert f"{name}={value!r} is no number of seconds" in study.rnnq("worker", code=2)
