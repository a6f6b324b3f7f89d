"""Many processes at one queue: every run is claimed once, and nobody is told that the database is locked."""

from __future__ import annotations

import time
from pathlib import Path

from rnnq import status
from tests.processes import Process, Study

WORKERS, RUNS = 16, 2000

INSTANT = """
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def instant(config):
    yield {"loss": float(config.seed), "half": config.seed / 2}

stage = rnnq.stage("instant", instant, rnnq.grid(seed=range(RUNS)))
"""


def test_sixteen_workers_finish_two_thousand_runs_once_each_beside_a_reader(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(INSTANT.replace("RUNS", str(RUNS))))
        began = time.monotonic()
        workers = [study.start("rnnq", "worker") for _ in range(WORKERS)]
        reads = read_until_they_have_left(study, workers)
        took = time.monotonic() - began
        print(f"{RUNS} runs, {WORKERS} workers: {took:.1f} s; {len(reads)} reads, the slowest {max(reads):.3f} s")

        for worker in workers:
            worker.end(0)
            assert "locked" not in worker.output.lower()
            assert "Traceback" not in worker.output
        assert status.stages(study.engine)[0].counts == {"done": RUNS}
        once = "SELECT count(*) AS n FROM runs WHERE state = 'done' AND attempt = 1 AND lost = 0 AND failures = 0"
        assert study.rows(once) == [{"n": RUNS}]
        attempts = study.rows("SELECT run_id, attempt, ended, worker FROM attempts ORDER BY run_id")
        assert [(a["run_id"], a["attempt"], a["ended"]) for a in attempts] == [(i + 1, 1, "done") for i in range(RUNS)]
        assert len({a["worker"] for a in attempts}) == WORKERS, "each had its share"
        points = study.rows("SELECT run_id, name, step, value FROM points ORDER BY run_id, name")
        seeds = {row["id"]: row["seed"] for row in study.rows("SELECT id, seed FROM runs")}
        expected = [
            (run, name, 1, value)
            for run, seed in sorted(seeds.items())
            for name, value in (("half", seed / 2), ("loss", float(seed)))
        ]
        assert [tuple(point.values()) for point in points] == expected
        losses = study.rows("SELECT id, loss FROM runs")
        assert {row["id"]: row["loss"] for row in losses} == seeds
        left = study.rows("SELECT state, count(*) AS n FROM workers GROUP BY state")
        assert left == [{"state": "left", "n": WORKERS}]


def read_until_they_have_left(study: Study, workers: list[Process]) -> list[float]:
    """Ask for the status over and over; how long each look took, in seconds."""
    took: list[float] = []
    while any(worker.lives for worker in workers):
        began = time.monotonic()
        found = status.stages(study.engine)
        status.workers(study.engine)
        status.failures(study.engine)
        took.append(time.monotonic() - began)
        assert found[0].total == RUNS
        workers[-1].wait(0.05)
    return took
