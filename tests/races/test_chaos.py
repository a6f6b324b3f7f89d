"""benchmarks/chaos.py in small: workers are killed, stopped and asked to leave at random, and no bit is lost.

The large one, with a thousand kills, is for one's own machine: `python benchmarks/chaos.py`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from benchmarks import chaos
from rnnq import db, queue
from tests.conftest import ROOT, claim_one

KILLS, STOPS, TERMS = 40, 10, 3


@pytest.fixture(scope="module", params=[1, 4], ids=["alone", "in packs"])
def report(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, dict[str, Any]]:
    """The folder of a small chaos, its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("chaos")
    seed = int(os.environ.get("RNNQ_TEST_SEED", random.randrange(2**32)))
    print(f"RNNQ_TEST_SEED={seed}")
    plan = {"workers": 8, "runs": 60, "kills": KILLS, "stops": STOPS, "terms": TERMS, "lease": 0.5, "seed": seed}
    plan["pack"] = request.param
    words = [word for name, value in plan.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *words, "--keep", str(folder), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    return folder, done.returncode, json.loads(done.stdout)


def test_workers_that_are_killed_and_stopped_at_random_lose_nothing_and_do_nothing_twice(report) -> None:
    _, code, found = report
    assert found["problems"] == []
    assert code == 0
    figures = found["figures"]
    assert (figures["kills"], figures["stops"], figures["terms"]) == (KILLS, STOPS, TERMS)
    assert figures["attempts done"] == 60
    assert figures["attempts"] == 60 + figures["attempts lost"] + figures["attempts given back"]
    assert figures["... to a worker that was killed"] >= KILLS // 8, "kills land on runs in training"
    assert (figures["... that began in a pack"] >= 8) == (found["pack"] > 1)
    assert figures["points compared"] == 60 * 28
    assert figures["checkpoints compared"] == 60 * 2
    assert figures["status reads"] > 10


# what a fault would leave behind, in one run each
FAULTS = [
    "UPDATE point SET value = value + 1e-12 WHERE run_id = 1 AND step = 30",
    "DELETE FROM point WHERE run_id = 2 AND step = 30",
    "UPDATE runs SET checkpoint = (SELECT checkpoint FROM runs AS other WHERE other.id = 4) WHERE id = 3",
    "UPDATE runs SET checkpoint = replace(checkpoint, '/a', '/a9') WHERE id = 5",
    "UPDATE attempts SET exact = 0 WHERE run_id = 6 AND ended = 'done'",
    """INSERT INTO attempts (run_id, attempt, worker, host, device, started_at, ended_at, ended, command_line)
       SELECT run_id, attempt + 1, worker, host, device, started_at, ended_at, ended, command_line
       FROM attempts WHERE run_id = 7 AND ended = 'done'""",
    "UPDATE attempts SET ended = 'lost' WHERE run_id = 8 AND ended = 'done'",
    "UPDATE runs SET state = 'failed' WHERE id = 9",
]
FOUND = [
    "1 runs are not done: run 9",
    "2 runs were done more or less than once",
    "1 runs went on after the attempt that was done: run 7",
    "1 attempts began before the one before had ended: run 7",
    "1 attempts were not exact: run 6",
    "writes were made by a worker that did not hold the run",
    "final checkpoints are not of the last attempt",
    "2 runs have other points than their twins",
    "runs have other checkpoints than their twins",
    "a checkpoint of run 3 cannot be opened",
    "a checkpoint of run 5 cannot be opened",
]


def test_what_a_fault_would_leave_behind_is_found(report: Any, tmp_path: Path) -> None:
    study = Path(shutil.copytree(report[0] / "study", tmp_path / "study"))
    engine = db.open(str(study / "experiments.db"))
    with db.transaction(engine) as connection:
        for fault in FAULTS:
            assert connection.exec_driver_sql(fault).rowcount >= 1, fault
    engine.dispose()

    problems = chaos.judge(study, report[0] / "twin").problems

    for expected in FOUND:
        assert any(expected in problem for problem in problems), f"{expected} is not in {problems}"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Engine]:
    """A study with watchdogs, whose first run has gone on from the checkpoint of a worker that was lost."""
    spawner = chaos.Spawner()
    chaos.make(spawner, tmp_path / "study", runs=1, lease=60, pack=1)
    spawner.close()
    engine = db.open(str(tmp_path / "study" / "experiments.db"))
    first = claim_one(engine, "first", now=1e9)
    queue.restore(engine, first, queue.Start(0, (), {}, True))
    queue.record(engine, first, 20, [], saved(1, 20))
    queue.reap(engine, now=2e9)
    second = claim_one(engine, "second")
    queue.restore(engine, second, queue.Start(20, (), {}, True))
    queue.record(engine, second, 60, [("loss", 60, 1.0)], saved(2, 60))
    assert seen(engine) == []
    yield engine
    engine.dispose()


def saved(attempt: int, step: int) -> dict[str, Any]:
    return {"path": f"checkpoints/x/chaos/1/a{attempt}-s{step}.pt", "step": step, "sha256": "", "bytes": 1}


def seen(engine: Engine) -> list[str]:
    with db.reading(engine) as connection:
        return list(connection.exec_driver_sql("SELECT what FROM chaos ORDER BY rowid").scalars())


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (f"UPDATE runs SET checkpoint = '{json.dumps(saved(1, 80))}'", ["a checkpoint of another attempt"]),
        (f"UPDATE runs SET checkpoint = '{json.dumps(saved(2, 80))}'", []),
        (f"UPDATE runs SET checkpoint = '{json.dumps(saved(2, 40))}'", ["a checkpoint that is no newer"]),
        ("UPDATE runs SET steps_done = 45", ["a step back inside an attempt"]),
        ("UPDATE runs SET steps_done = 65", []),
        ("INSERT INTO point SELECT run_id, metric_id, 61, 1.0 FROM point", ["a point past its run's step"]),
        ("UPDATE point SET value = 2.0", ["a point was rewritten"]),
        ("UPDATE attempts SET step_from = 0 WHERE attempt = 2", ["a start elsewhere than at the last checkpoint"]),
        ("UPDATE attempts SET ended = 'done' WHERE attempt = 1", ["a second end of an attempt"]),
    ],
)
def test_a_watchdog_notes_what_only_a_stale_worker_writes(running: Engine, write: str, what: list[str]) -> None:
    with db.transaction(running) as connection:
        assert connection.execute(text(write.replace(":", "\\:"))).rowcount == 1
    assert seen(running) == what
