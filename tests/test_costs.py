"""Costs: what attempts took of their workers' time, and what open runs will."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, text

from rnnq import costs, db, queue
from rnnq.costs import Costs, Left
from tests.conftest import PROVENANCE, claim_one
from tests.studies import add, new_run


def test_runs_of_a_pack_share_the_time_of_their_worker() -> None:
    alone, both, other = ("a", 0.0, 10.0), ("a", 10.0, 30.0), ("b", 0.0, 5.0)
    assert costs.shares([alone, both, both, other]) == [10.0, 10.0, 10.0, 5.0]


def test_a_member_that_ends_early_leaves_the_rest_of_the_time_to_the_others() -> None:
    # 0 to 10 s three of them, 10 to 20 s two, 20 to 30 s one
    assert costs.shares([("a", 0, 10), ("a", 0, 20), ("a", 0, 30)]) == pytest.approx([10 / 3, 10 / 3 + 5, 10 / 3 + 15])


def test_an_attempt_that_ended_before_it_began_costs_nothing() -> None:
    assert costs.shares([("a", 10, 5), ("a", 20, 22)]) == [0.0, 2.0]


def lasting(engine: Engine, run: int, attempt: int, began: float, ended: float | None) -> None:
    """Set when an attempt began and ended."""
    sql = "UPDATE attempts SET started_at = :began, ended_at = :ended WHERE run_id = :run AND attempt = :attempt"
    with db.transaction(engine) as connection:
        values = {"began": began, "ended": ended, "run": run, "attempt": attempt}
        connection.execute(text(sql), values)


def finish_in(engine: Engine, seconds: float, began: float = 1000.0) -> None:
    """Finish the next run, so that it took so long."""
    claim = claim_one(engine)
    queue.finish(engine, claim, 10, {"loss": 1.0}, "loss", [])
    with db.transaction(engine) as connection:
        sql = "UPDATE attempts SET step_from = 0 WHERE run_id = :run"
        connection.execute(text(sql), {"run": claim.run})
    lasting(engine, claim.run, claim.attempt, began, began + seconds)


def read(engine: Engine, now: float | None = None) -> tuple[Costs, dict[str, costs.Expected]]:
    """The costs, and what each stage's open runs are expected to cost, where they are of one group and state."""
    with db.reading(engine) as connection:
        found = costs.read(connection, now)
        return found, {left.stage: found.expect(left) for _, left in costs.open_runs(connection)}


@pytest.mark.both
def test_open_runs_are_reckoned_by_equal_ones_then_by_their_stage(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i) for i in range(3)])
    finish_in(engine, 20)
    finish_in(engine, 40, began=2000)
    _, expected = read(engine)
    assert (expected["s"].seconds, expected["s"].basis) == (30, "measured on 2 runs equal but for the seed")

    add(engine, [new_run(i, "other", seed=i, width=64) for i in range(10, 12)])
    _, expected = read(engine)
    assert expected["s"].seconds in (30, 60)  # of the two groups that are open the last one
    with db.reading(engine) as connection:
        found = {left.group: costs.read(connection).expect(left) for _, left in costs.open_runs(connection)}
    assert (found["other"].seconds, found["other"].basis) == (60, "measured on 2 runs of the same stage")


@pytest.mark.both
def test_what_is_left_of_a_run_is_reckoned_by_the_step(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i) for i in range(2)])
    finish_in(engine, 20)
    claim = claim_one(engine)
    queue.record(engine, claim, 5, [])
    _, expected = read(engine)
    assert expected["s"].seconds == 10  # 5 of 10 steps at 2 s


@pytest.mark.both
def test_a_lost_attempt_costs_until_the_last_heartbeat_of_its_worker_and_is_named(engine: Engine) -> None:
    add(engine, [new_run(0)])
    claim = claim_one(engine)
    queue.reap(engine, now=claim.until + 100_000)  # nobody looked for a day
    with db.transaction(engine) as connection:
        sql = "UPDATE attempts SET started_at = (SELECT beat_at FROM workers) - 30"
        connection.execute(text(sql))
    found, _ = read(engine)
    assert (found.spent["s"].seconds, found.spent["s"].lost) == (pytest.approx(30), pytest.approx(30))


def test_a_running_attempt_costs_until_now_but_not_past_its_lease(engine: Engine) -> None:
    add(engine, [new_run(0)])
    claim = claim_one(engine, now=1000.0)
    soon, _ = read(engine, now=1010.0)
    assert soon.spent["s"].seconds == pytest.approx(10)
    late, _ = read(engine, now=900_000.0)
    assert late.spent["s"].seconds == pytest.approx(claim.until - 1000.0)
    assert late.spent["s"].lost == 0


def left(stage: str = "new", group: str = "new", **config: Any) -> Left:
    """Two open runs of ten steps each."""
    return Left(stage, "f", group, None, 2, 20, lambda: {"width": 16, "gate": True, "seed": 7} | config)


@pytest.mark.both
def test_a_stage_that_nobody_has_trained_is_reckoned_by_what_it_says_itself_else_by_the_likest(engine: Engine) -> None:
    add(engine, [new_run(0, width=16, gate=False)], name="near")
    add(engine, [new_run(0, width=99, gate=False)], name="far")
    finish_in(engine, 10)
    finish_in(engine, 1000, began=5000)
    with db.reading(engine) as connection:
        found = costs.read(connection)
        assert found.expect(left(), lambda: 7200.0) == costs.Expected(7200.0, "hours= of the stage")
        assert found.expect(left()) == costs.Expected(20.0, "measured on 1 run of near (differs in gate)")
        other = Left("new", "unheard of", "new", None, 2, 20, lambda: {})
        assert found.expect(other).seconds is None


def test_devices_are_those_that_speeds_were_measured_on(engine: Engine) -> None:
    add(engine, [new_run(0), new_run(1)])
    finish_in(engine, 10)
    queue.register(engine, "gpu", "cuda:0", {})
    queue.claim(engine, "gpu", PROVENANCE | {"device": "cuda:0"})
    found, _ = read(engine)
    assert list(found.devices) == ["cpu"]
