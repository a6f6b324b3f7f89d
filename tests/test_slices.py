"""A worker that takes a slice of the runs: which slice, what is in it, and that slices are together all runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from rnnq import db, queue, slices
from rnnq.errors import InputError
from tests.conftest import PROVENANCE, new_stage
from tests.processes import Study

RUNS = """
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def short(config):
    if config.seed == 4:
        raise RuntimeError("a run that fails")
    yield {"loss": 1.0}

first = rnnq.stage("first", short, rnnq.grid(seed=[0, 1, 2, 3, 4]))
second = rnnq.stage("second", short, rnnq.grid(seed=[0, 1, 2, 3]))
"""


@given(st.integers(0, 3000), st.integers(1, 400))
def test_slices_are_together_all_runs_in_their_order_and_none_is_longer_than_the_first(total, n):
    taken = [slices.places(total, number, n) for number in range(n)]
    assert [place for part in taken for place in part] == list(range(total))
    assert all(len(part) <= len(taken[0]) for part in taken)


def test_fifty_runs_over_65_slices_are_one_each_and_over_16_four_each_but_for_the_last():
    assert [len(slices.places(50, number, 65)) for number in range(65)] == [1] * 50 + [0] * 15
    assert [len(slices.places(50, number, 16)) for number in range(16)] == [4] * 12 + [2, 0, 0, 0]


# --------------------------------------------------------------------------------------------- which one is asked for


def array(**values: int | str) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("number", "n", "from_array", "environment", "found"),
    [
        (None, None, False, array(ID=3, MIN=0, MAX=7, COUNT=8), None),  # an array's tasks share the queue
        (2, 5, False, array(ID=3, MIN=0, MAX=7), (2, 5)),
        (None, 8, False, array(ID=3), (3, 8)),
        (None, 8, False, array(ID=4, MIN=1, MAX=8), (3, 8)),  # the first task is slice 0
        (None, None, True, array(ID=4, MIN=1, MAX=8), (3, 8)),
        (None, None, True, array(ID=14, MIN=10, MAX=18, STEP=2, COUNT=5), (2, 5)),
        (0, None, False, array(ID=4, MIN=1, MAX=8), (0, 8)),
    ],
)
def test_a_slice_is_said_by_options_or_by_the_place_in_an_array_and_only_when_asked(
    number, n, from_array, environment, found
):
    assert slices.asked(number, n, from_array, environment) == found


@pytest.mark.parametrize(
    ("number", "n", "from_array", "environment", "problem"),
    [
        (8, 8, False, {}, "--job-id 8: of 8 slices the last is 7"),
        (-1, 8, False, {}, "--job-id -1: the first slice is 0"),
        (0, 0, False, {}, "--total-jobs 0: there is one slice at least"),
        (3, None, False, {}, "which slice of how many is not said"),
        (None, 4, False, {}, "which slice of how many is not said"),
        (None, None, True, {}, "SLURM_ARRAY_TASK_ID is not set"),
        (None, None, True, array(ID="x"), "SLURM_ARRAY_TASK_ID='x' is no whole number"),
        (None, None, True, array(ID=7, MIN=0, MAX=7, COUNT=5), "--job-id 7: of 5 slices the last is 4"),
    ],
)
def test_what_is_no_slice_is_refused_with_a_hint(number, n, from_array, environment, problem):
    with pytest.raises(InputError) as refused:
        slices.asked(number, n, from_array, environment)
    assert problem in refused.value.message
    assert "--job-id" in refused.value.hint


# --------------------------------------------------------------------------------------------------- what it claims


@pytest.mark.both
def test_a_claim_within_a_range_takes_its_runs_alone_by_priority_and_age(engine: Engine) -> None:
    queue.init(engine, [new_stage(6), new_stage(4, "t")])
    queue.register(engine, "w", "cpu", {})
    queue.prioritise(engine, [1, 4], 9)
    queue.prioritise(engine, [8], 5)

    def take(limit: int = 1, **scope) -> list[int]:
        return [claim.run for claim in queue.claim(engine, "w", PROVENANCE, limit, within=(3, 8), **scope)]

    assert queue.ahead(engine, within=(5, 8)).pending == 1
    assert take() == [4]
    assert take(stage="s") == [3]
    assert take(3) == [8, 5, 6]
    assert queue.has_open(engine, "t", within=(3, 8))
    assert take(9) == [7]
    assert take(9) == []
    assert queue.count(engine, within=(3, 8)) == (6, 6)
    queue.pause(engine, "t")
    assert not queue.has_open(engine, "t", within=(3, 8))
    assert take(9) == []


@pytest.mark.both
def test_the_cost_of_a_claim_does_not_grow_with_the_runs_of_other_slices(engine: Engine) -> None:
    queue.init(engine, [new_stage(3000)])
    queue.register(engine, "w", "cpu", {})
    queue.prioritise(engine, [2999], 3)
    part = slices.find(engine, None, 99, 100)
    assert part.within == (2971, 3000)
    if engine.dialect.name == "sqlite":
        with db.reading(engine) as connection:
            values = {"worker": "w", "now": 1.0, "limit": 1, "stage": None, "without": "[]", "first": 1, "last": 2}
            sql = "EXPLAIN QUERY PLAN " + queue._claim_statement(connection, within=True)
            plan = [step.detail for step in connection.execute(text(sql), values)]
        [dive] = [step for step in plan if "inner_run" in step]
        # either index leads to the first run of the range at once
        assert re.search(
            r"SEARCH inner_run USING INDEX ix_runs_\w+ \(intake=\? AND stage=\? .*id>\? AND (row)?id<\?\)", dive
        )
        assert not [step for step in plan if re.match("SCAN (runs|head|top|next|inner_run)", step)]
    assert [claim.run for claim in queue.claim(engine, "w", PROVENANCE, 2, within=part.within)] == [2999, 2971]


# ------------------------------------------------------------------------------------------------------ real workers


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(RUNS))
        yield study


def test_workers_with_all_slices_train_all_runs_and_each_its_own(study: Study) -> None:
    ends = {"0": 0, "1": 1, "2": 0, "3": 0}  # run 5 fails, which is of slice 1
    workers = [study.start("rnnq", "worker", "--job_id", i, "--total_jobs", "4") for i in ends]
    for worker, code in zip(workers, ends.values(), strict=True):
        worker.end(code)
    assert "slice 1 of 0 to 3: runs 4 to 6 (3 of 9)" in workers[1].output
    assert "slice 3 of 0 to 3 is empty: there are 9 runs" in workers[3].output
    assert study.states() == {run: "failed" if run == 5 else "done" for run in range(1, 10)}
    by = study.rows("SELECT run_id, worker FROM attempts ORDER BY run_id")
    assert len(by) == 9
    assert len({row["worker"] for row in by}) == 3
    for part in ((1, 2, 3), (4, 5, 6), (7, 8, 9)):
        assert len({row["worker"] for row in by if row["run_id"] in part}) == 1


def test_an_array_shares_the_queue_unless_it_is_asked_for_slices(study: Study) -> None:
    study.environment |= array(ID=2, MIN=1, MAX=2, COUNT=2)
    shown = study.rnnq("worker", "--stage", "second", "--slice", "--dry-run", "--format", "json")
    rows = json.loads(shown[shown.index("[") : shown.rindex("]") + 1])
    assert [(row["run"], row["state"]) for row in rows] == [(8, "pending"), (9, "pending")]
    assert set(study.states().values()) == {"pending"}
    study.rnnq("worker", "--stage", "second", "--slice")
    assert [run for run, state in study.states().items() if state == "done"] == [8, 9]
    study.rnnq("worker", "--stage", "second")
    assert [run for run, state in study.states().items() if state == "done"] == [6, 7, 8, 9]


def test_runs_that_come_later_are_in_no_slice_until_its_worker_starts_again(study: Study) -> None:
    within = slices.find(study.engine, None, 2, 3).within
    assert within == (7, 9)
    study.rnnq("init", study.define(RUNS.replace('"second"', '"third"')))
    assert [row["run"] for row in slices.listed(study.engine, None, within)] == [7, 8, 9]
    assert slices.find(study.engine, None, 2, 3).within == (11, 13)


@pytest.mark.slow
def test_several_processes_take_the_runs_of_a_slice_alone(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(SHARED))
        study.rnnq("worker", "--nproc", "2", "--device", "cpu", "--job-id", "1", "--total-jobs", "2")
        assert study.states() == {1: "pending", 2: "pending", 3: "done", 4: "done"}


SHARED = """
import torch

import rnnq


class Config(rnnq.Config):
    steps: int = 3


class Shared(rnnq.Family):
    Config = Config
    name = "shared"

    def build(self, config):
        return torch.nn.Linear(2, 1)

    def batch(self, config, step):
        return torch.ones(4, 2)

    def loss(self, module, data):
        return module(data).square().mean()

    def share(self, data, rank, ranks):
        return data.chunk(ranks)[rank]


stage = rnnq.stage("s", Shared, rnnq.grid(seed=[0, 1, 2, 3]))
"""


def test_bad_slices_end_a_worker_before_it_begins(study: Study) -> None:
    for words in (["--job-id", "4", "--total-jobs", "4"], ["--job-id", "-1", "--total-jobs", "4"], ["--slice"]):
        said = study.rnnq("worker", *words, code=2)
        assert "error: " in said
        assert "hint: " in said
    assert study.rows("SELECT id FROM workers") == []
