"""What `rnnq status` says: counts, rate and ETA with the arithmetic done by hand, workers, failures."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
from sqlalchemy import Engine, event, text

from rnnq import db, queue, status, tables
from rnnq.status import StageStatus
from tests.conftest import PROVENANCE, Cli, claim_one, new_runs, new_stage


@pytest.fixture(autouse=True)
def a_lease_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNQ_LEASE_S", raising=False)


def change(engine: Engine, sql: str, **values: object) -> None:
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


def clock(engine: Engine) -> float:
    with db.reading(engine) as connection:
        return db.clock(connection)


def train(engine: Engine, began: float, seconds: float, steps: int = 10, worker: str = "w") -> int:
    """A run is claimed, trained and finished, at times of our choosing: seconds from now."""
    now = clock(engine)
    claim = claim_one(engine, worker, now=now + began)
    queue.restore(engine, claim, queue.Start(0, [], {}, exact=True))
    queue.finish(engine, claim, steps, {"loss": 1.0}, "loss")
    ended = {"ended": now + began + seconds, "run": claim.run}
    change(engine, "UPDATE runs SET ended_at = :ended WHERE id = :run", **ended)
    change(engine, "UPDATE attempts SET ended_at = :ended WHERE run_id = :run AND ended = 'done'", **ended)
    return claim.run


def only(engine: Engine) -> StageStatus:
    [found] = status.stages(engine)
    return found


def leave_all(engine: Engine) -> None:
    change(engine, f"UPDATE workers SET state = 'left', left_at = {db.NOW}")


# ------------------------------------------------------------------------------------------------------- counts


def test_every_state_that_occurs_is_counted_in_the_order_of_a_runs_life(engine: Engine) -> None:
    queue.init(engine, [new_stage(9)])
    queue.fail(engine, claim_one(engine), "bug", "x")
    train(engine, -10, 5)
    claim_one(engine)
    change(engine, "UPDATE runs SET state = 'waiting' WHERE id IN (4, 5)")
    change(engine, "UPDATE runs SET state = 'cancelled', ended_at = 1 WHERE id = 6")
    change(engine, "UPDATE runs SET state = 'skipped', ended_at = 1 WHERE id = 7")

    found = only(engine)

    assert list(found.counts.items()) == [
        ("waiting", 2),
        ("pending", 2),
        ("running", 1),
        ("done", 1),
        ("failed", 1),
        ("cancelled", 1),
        ("skipped", 1),
    ]
    assert tuple(found.counts) == tables.STATES
    assert found.total == 9


def test_stages_come_in_the_order_in_which_they_were_made_and_one_can_be_chosen(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "z")])
    queue.init(engine, [new_stage(2, "a")])
    change(engine, "UPDATE stages SET paused = true WHERE name = 'a'")

    assert [(s.stage, s.paused, s.total) for s in status.stages(engine)] == [("z", False, 1), ("a", True, 2)]
    assert [s.stage for s in status.stages(engine, "a")] == ["a"]
    assert status.stages(engine, "nowhere") == []


def test_runs_of_several_inits_are_counted_together(engine: Engine) -> None:
    for n in (2, 5):
        queue.init(engine, [new_stage(n)])

    assert only(engine).counts == {"pending": 5}


def test_runs_of_an_init_that_has_not_ended_count_for_nothing(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    train(engine, -100, 10)
    queue.init(engine, [new_stage(5)])
    change(engine, "UPDATE intakes SET complete = false WHERE id = 2")

    found = only(engine)
    assert found.counts == {"pending": 1, "done": 1}
    assert found.eta_s == pytest.approx(10.0)


def test_an_empty_study_has_nothing_to_say(engine: Engine) -> None:
    assert (status.stages(engine), status.workers(engine), status.failures(engine)) == ([], [], [])


def test_the_words_for_states_are_those_of_the_tables() -> None:
    assert status.OPEN == tables.OPEN


# ---------------------------------------------------------------------------------------------------- rate, ETA


def test_runs_per_hour_are_those_of_the_last_hour_of_work(engine: Engine) -> None:
    queue.init(engine, [new_stage(5)])
    train(engine, -9000, 100)  # long before
    for began in (-1800, -1200, -600):
        train(engine, began, 600)

    assert only(engine).runs_per_hour == pytest.approx(3 / 1800 * 3600, rel=1e-3)  # the clock goes on meanwhile


def test_the_rate_of_a_stage_that_ended_last_week_is_that_of_its_last_hour(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    for began in (-604800, -603800):
        train(engine, began, 1000)

    found = only(engine)
    assert found.runs_per_hour == pytest.approx(2 / 2000 * 3600, rel=1e-3)
    assert (found.eta_s, found.reckoned) == (0.0, "nothing is left")


def test_without_a_finished_run_there_is_no_rate_and_no_eta_and_it_says_why(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    queue.fail(engine, claim_one(engine), "bug", "x")

    found = only(engine)
    assert (found.runs_per_hour, found.eta_s) == (None, None)
    assert found.reckoned == "no run of the stage has finished yet"


def test_the_eta_is_the_steps_that_are_left_at_the_speed_of_finished_attempts(engine: Engine) -> None:
    queue.init(engine, [new_stage(6)])  # 10 steps each
    train(engine, -100, 5)
    train(engine, -90, 15)  # together 20 steps in 20 s
    queue.record(engine, claim_one(engine), 4)  # 6 to go, and 3 x 10 pending

    found = only(engine)
    assert found.eta_s == pytest.approx(36.0)
    assert found.reckoned == "36 steps left at 1 steps/s; 2 finished runs, 1 worker"


def test_workers_share_the_work(engine: Engine) -> None:
    queue.init(engine, [new_stage(5)])
    train(engine, -100, 0.01)
    queue.register(engine, "v", "cpu", {})

    found = only(engine)
    assert found.eta_s == pytest.approx(40 / 1000 / 2)
    assert found.reckoned == "40 steps left at 1,000 steps/s; 1 finished run, 2 workers"


def test_workers_that_left_or_are_silent_do_not_share_it(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    train(engine, -100, 10)
    for worker in ("silent", "left"):
        queue.register(engine, worker, "cpu", {})
    queue.beat(engine, "silent", [], now=clock(engine) - 61)
    queue.leave(engine, "left", "")

    assert only(engine).reckoned.endswith("1 finished run, 1 worker")


def test_without_a_worker_the_eta_is_that_of_one_and_says_so(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    train(engine, -100, 10)
    leave_all(engine)

    found = only(engine)
    assert found.eta_s == pytest.approx(20.0)
    assert found.reckoned == "20 steps left at 1 steps/s; 1 finished run, if one worker worked"


def test_a_slow_speed_is_not_shown_as_none(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    train(engine, -1000, 80)

    assert only(engine).reckoned.startswith("10 steps left at 0.12 steps/s")


def test_an_attempt_that_went_on_from_a_checkpoint_counts_only_its_own_steps_and_time(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    now = clock(engine)
    first = claim_one(engine, now=now - 9000)
    queue.record(engine, first, 8, checkpoint={"path": "x", "step": 8, "sha256": "y", "bytes": 1})
    queue.reap(engine, now=now)
    again = claim_one(engine, now=now - 4)
    queue.restore(engine, again, queue.Start(8, [], {}, exact=True))
    queue.finish(engine, again, 10, {"loss": 1.0}, "loss")
    change(engine, "UPDATE attempts SET ended_at = :now WHERE attempt = 2", now=now)

    assert only(engine).eta_s == pytest.approx(20.0)  # 2 steps took 4 s; 10 are left


def test_where_a_budget_is_not_known_the_eta_goes_by_runs(engine: Engine) -> None:
    queue.init(engine, [new_stage(runs=[replace(run, budget=None) for run in new_runs(4)])])
    train(engine, -100, 4)
    train(engine, -90, 8)

    found = only(engine)
    assert found.eta_s == pytest.approx(12.0)
    assert found.reckoned == "2 runs left at 6.0 s each; 2 finished runs, 1 worker"


def test_runs_that_took_no_time_at_all_do_not_stop_the_status(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    train(engine, -10, 0)

    found = only(engine)
    assert (found.runs_per_hour, found.eta_s) == (None, 0.0)
    assert found.reckoned == "2 runs left at 0.0 s each; 1 finished run, 1 worker"


def test_a_run_that_went_past_its_budget_takes_nothing_off_the_rest(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    train(engine, -100, 10)
    queue.record(engine, claim_one(engine), 25)  # a generator that does not keep to its budget

    assert only(engine).eta_s == pytest.approx(10.0)


def test_failed_and_cancelled_runs_are_not_waited_for(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    train(engine, -100, 10)
    queue.fail(engine, claim_one(engine), "bug", "x")
    change(engine, "UPDATE runs SET state = 'cancelled', ended_at = 1 WHERE id = 3")

    assert (only(engine).eta_s, only(engine).reckoned) == (0.0, "nothing is left")


def grouped(n: int, group: str, shape: str | None, first: int) -> list[queue.NewRun]:
    """Runs of one config."""
    return [replace(run, group_key=group, pack_key=shape) for run in new_runs(n, first)]


def test_a_run_is_reckoned_by_what_finished_runs_of_like_config_took(engine: Engine) -> None:
    runs = [*grouped(2, "slow", "a", 0), *grouped(1, "fast", "b", 2), *grouped(2, "new", "b", 3)]
    queue.init(engine, [new_stage(runs=runs)])
    train(engine, -300, 100)  # slow
    change(engine, "UPDATE runs SET priority = 1 WHERE id = 3")
    train(engine, -100, 10)  # fast
    assert only(engine).eta_s == pytest.approx(100 + 10 + 10)

    change(engine, "UPDATE runs SET pack_key = NULL WHERE id = 5")  # as after a lost attempt: of any shape

    assert only(engine).eta_s == pytest.approx(100 + 10 + 55)


@pytest.mark.both
def test_five_finished_runs_of_like_config_give_an_interval_around_the_eta(engine: Engine) -> None:
    queue.init(engine, [new_stage(9)])
    for i, seconds in enumerate((8, 9, 11, 12)):
        train(engine, -100 + 20 * i, seconds)
    assert (only(engine).eta_low_s, only(engine).eta_high_s) == (None, None)
    train(engine, -10, 10)

    found = only(engine)

    assert found.eta_s == pytest.approx(40)
    assert found.eta_low_s is not None and found.eta_high_s is not None
    assert 30 < found.eta_low_s < 39 and 41 < found.eta_high_s < 50


def test_waiting_runs_do_not_go_on_by_themselves(engine: Engine) -> None:
    queue.init(engine, [new_stage(4)])
    train(engine, -100, 10)
    change(engine, "UPDATE runs SET state = 'waiting' WHERE id = 4")
    found = only(engine)
    assert found.eta_s == pytest.approx(20)
    assert found.reckoned.endswith("; 1 waiting run not counted")
    assert found.open == 3

    change(engine, "UPDATE runs SET state = 'waiting' WHERE state = 'pending'")

    assert (only(engine).eta_s, only(engine).reckoned) == (None, "3 runs wait, and nothing else is left")


@pytest.mark.both
def test_a_paused_stage_has_no_eta_and_says_so(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    train(engine, -100, 10)
    change(engine, "UPDATE stages SET paused = true")

    found = only(engine)

    assert (found.paused, found.eta_s, found.eta_low_s) == (True, None, None)
    assert found.reckoned.startswith("paused: no run of it is claimed; 20 steps left at 1 steps/s")


def test_workers_that_were_asked_to_leave_or_whose_process_is_gone_do_not_share_the_work(engine: Engine) -> None:
    queue.init(engine, [new_stage(5)])
    train(engine, -100, 10)
    for worker in ("leaving", "gone"):
        queue.register(engine, worker, "cpu", {})
    assert only(engine).reckoned.endswith("3 workers")
    change(engine, "UPDATE workers SET wish = 'drain' WHERE id = 'leaving'")
    change(engine, "UPDATE workers SET pid_start = '1' WHERE id = 'gone'")

    assert only(engine).reckoned.endswith("1 worker")


@pytest.mark.both
def test_of_very_many_runs_some_stand_for_the_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # the shape follows the parity of the id, as it may in a grid
    runs = [replace(run, pack_key=f"p{i % 2}", group_key=f"g{i}", budget=10 + 20 * (i % 2))
            for i, run in enumerate(new_runs(1000))]  # fmt: skip
    queue.init(engine, [new_stage(runs=runs)])
    train(engine, -100, 10)
    whole = only(engine)
    monkeypatch.setattr(status, "LOOK", 100)

    found = only(engine)

    assert whole.eta_s is not None and found.eta_s == pytest.approx(whole.eta_s, rel=0.05)
    assert found.reckoned.startswith("about ") and whole.reckoned.startswith("19,990 steps")


def test_only_the_newest_finished_runs_are_learnt_from(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LEARN", 2)
    queue.init(engine, [new_stage(4)])
    train(engine, -9000, 1000)
    for began in (-50, -30):
        train(engine, began, 10)

    assert only(engine).eta_s == pytest.approx(10)
    assert "the newest 2 finished runs" in only(engine).reckoned


def test_a_run_without_a_budget_that_runs_is_taken_off_what_it_has_had(engine: Engine) -> None:
    queue.init(engine, [new_stage(runs=[replace(run, budget=None) for run in new_runs(2)])])
    train(engine, -100, 50)
    claim_one(engine, now=clock(engine) - 20)

    assert only(engine).eta_s == pytest.approx(30, abs=2)


# ------------------------------------------------------------------------------------------------------ workers


def test_a_worker_is_shown_with_what_it_does_and_when_it_last_beat(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    claim = claim_one(engine)
    queue.record(engine, claim, 4)
    queue.beat(engine, "w", [(1, 1)], now=clock(engine) - 20)

    [worker] = status.workers(engine)

    assert (worker["worker"], worker["device"], worker["state"]) == ("w", "cpu", "live")
    assert worker["beat_s_ago"] == pytest.approx(20, abs=5)
    doing = {name: worker[name] for name in ("run", "stage", "label", "attempt", "step", "budget")}
    assert doing == {"run": 1, "stage": "s", "label": "run0", "attempt": 1, "step": 4, "budget": 10}
    assert "/" not in worker["host"]
    json.dumps(worker)


def test_a_worker_that_holds_several_runs_is_shown_with_each(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])
    queue.register(engine, "w", "cpu", {})
    queue.claim(engine, "w", PROVENANCE, limit=2)

    assert [(w["worker"], w["run"]) for w in status.workers(engine)] == [("w", 1), ("w", 2)]


def test_an_idle_worker_does_nothing(engine: Engine) -> None:
    queue.register(engine, "w", "cpu", {})

    assert [(w["state"], w["run"], w["stage"]) for w in status.workers(engine)] == [("live", None, None)]


def test_a_worker_past_its_lease_is_silent_until_someone_decides(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine, now=clock(engine) - 61)
    queue.beat(engine, "w", [], now=clock(engine) - 59)
    assert status.workers(engine)[0]["state"] == "live"

    queue.beat(engine, "w", [], now=clock(engine) - 61)

    assert [(w["state"], w["run"]) for w in status.workers(engine)] == [("silent", claim.run)]


def test_lost_workers_are_shown_for_an_hour_and_those_that_left_not_at_all(engine: Engine) -> None:
    for worker in ("lost", "lost long ago", "left"):
        queue.register(engine, worker, "cpu", {})
    queue.leave(engine, "left", "done")
    sql = f"UPDATE workers SET state = 'lost', message = 'gone', left_at = {db.NOW} - :ago WHERE id = :id"
    change(engine, sql, id="lost", ago=3500)
    change(engine, sql, id="lost long ago", ago=3700)

    assert [(w["worker"], w["state"], w["message"]) for w in status.workers(engine)] == [("lost", "lost", "gone")]


def stop_itself(
    engine: Engine, worker: str, why: str, ago: float, device: str = "cpu", stage: str | None = None
) -> None:
    """A worker that began a minute before it stopped itself."""
    queue.register(engine, worker, device, {"stage": stage})
    queue.leave(engine, worker, f"stopped itself: {why}")
    times = {"left": clock(engine) - ago, "began": clock(engine) - ago - 60, "id": worker}
    change(engine, "UPDATE workers SET left_at = :left, started_at = :began WHERE id = :id", **times)


def stopped(engine: Engine, stage: str | None = None) -> list[tuple[str, str, int]]:
    return [(row["worker"], row["why"], row["n"]) for row in status.stopped(engine, stage)]


@pytest.mark.both
def test_a_worker_that_stopped_itself_is_told_of_for_a_day(engine: Engine) -> None:
    stop_itself(engine, "a", "5 runs failed\nat once", ago=300)
    stop_itself(engine, "b", "long ago", ago=86500, device="cuda:0")
    queue.register(engine, "c", "cuda:1", {})
    queue.leave(engine, "c", "a signal")
    assert stopped(engine) == [("a", "5 runs failed", 1)]
    [row] = status.stopped(engine)
    assert (row["state"], row["device"]) == ("left", "cpu")
    assert row["left_s_ago"] == pytest.approx(300, abs=30)
    json.dumps(row)


def test_of_workers_that_stopped_for_one_reason_one_is_named_and_no_more_than_three_are(engine: Engine) -> None:
    stop_itself(engine, "a", "run 1 failed", ago=30)
    stop_itself(engine, "b", "run 2 failed", ago=20)
    assert stopped(engine) == [("b", "run 2 failed", 2)], "they differ in a number alone"
    for ago in range(5):
        stop_itself(engine, f"c{ago}", "its disk is full", ago, device=f"cuda:{ago}")
    assert [worker for worker, _, _ in stopped(engine)] == ["c0", "c1", "c2"]


@pytest.mark.both
def test_of_a_place_where_another_worker_has_started_since_nothing_is_told(engine: Engine) -> None:
    stop_itself(engine, "a", "run 1 failed", ago=300)
    queue.register(engine, "other device", "cuda:0", {})
    assert [worker for worker, _, _ in stopped(engine)] == ["a"]
    queue.register(engine, "next", "cpu", {})
    assert stopped(engine) == []


def test_with_a_stage_come_the_workers_that_stopped_at_it_and_those_bound_to_none(engine: Engine) -> None:
    stop_itself(engine, "a", "one", ago=30, stage="s")
    stop_itself(engine, "b", "two", ago=20, stage="t")
    stop_itself(engine, "c", "three", ago=10)
    assert [worker for worker, _, _ in stopped(engine, "s")] == ["c", "a"]


def test_with_a_stage_come_its_workers_and_the_idle_ones(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "a"), new_stage(1, "b")])
    for worker in ("on a", "on b"):
        claim_one(engine, worker)
    queue.register(engine, "idle", "cpu", {})

    assert [w["worker"] for w in status.workers(engine, "a")] == ["on a", "idle"]


@pytest.mark.both
def test_a_run_at_work_is_shown_with_its_newest_loss_its_speed_and_its_end(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine, now=clock(engine) - 100)
    queue.restore(engine, claim, queue.Start(2, [], {}, exact=True))
    queue.record(engine, claim, 6, [("loss", 3, 9.0), ("loss", 5, 1.5), ("acc", 6, 0.5)])

    [worker] = status.workers(engine)

    assert (worker["metric"], worker["loss"]) == ("loss", 1.5)
    assert worker["steps_per_s"] == pytest.approx(0.04, rel=0.05)  # 4 steps of this attempt in 100 s
    assert worker["run_eta_s"] == pytest.approx(100, rel=0.05)


def test_the_loss_of_a_run_is_its_primary_metric_once_that_has_a_point(engine: Engine) -> None:
    metrics = [{"name": "acc", "unit": "", "better": "max", "primary": True}]
    queue.init(engine, [new_stage(1, metrics=metrics)])
    claim = claim_one(engine)
    assert status.workers(engine)[0]["metric"] is None
    queue.record(engine, claim, 1, [("loss", 1, 2.0)])
    assert (status.workers(engine)[0]["metric"], status.workers(engine)[0]["loss"]) == ("loss", 2.0)
    queue.record(engine, claim, 2, [("loss", 2, 1.0), ("acc", 1, 0.1), ("acc", 2, float("nan"))])
    assert (status.workers(engine)[0]["metric"], status.workers(engine)[0]["loss"]) == ("acc", None)


def test_a_worker_tells_what_it_is_bound_to_and_what_it_was_asked_for(engine: Engine) -> None:
    queue.register(engine, "w", "cpu", {"stage": "s", "runs": None})
    change(engine, "UPDATE workers SET wish = 'drain'")

    [worker] = status.workers(engine)

    assert (worker["scope"], worker["wish"], worker["state"]) == ("s", "drain", "live")
    assert worker["since"] == pytest.approx(clock(engine), abs=60)


@pytest.mark.both
def test_every_worker_there_ever_was_comes_with_what_it_ended(engine: Engine) -> None:
    queue.init(engine, [new_stage(6)])
    train(engine, -10, 1, worker="a")
    train(engine, -9, 1, worker="a")
    queue.fail(engine, claim_one(engine, "a"), "bug", "x")
    queue.release(engine, claim_one(engine, "a"))
    claim_one(engine, "b", now=clock(engine) - 100)
    change(engine, "UPDATE workers SET pid_start = '1' WHERE id = 'b'")
    queue.reap(engine)
    queue.leave(engine, "a", "nothing left to do")

    a, b = status.all_workers(engine)

    assert [(w["worker"], w["state"], w["done"], w["failed"], w["lost"]) for w in (a, b)] == [
        ("a", "left", 2, 1, 0),
        ("b", "lost", 0, 0, 1),
    ]
    assert [w["worker"] for w in status.workers(engine)] == ["b"]


# --------------------------------------------------------------------------------------------------------- ended


@pytest.mark.both
def test_the_runs_that_ended_last_come_first_with_loss_or_cause(engine: Engine) -> None:
    queue.init(engine, [new_stage(4, "a"), new_stage(4, "b")])
    train(engine, -300, 10)  # of a
    train(engine, -200, 10)
    queue.fail(engine, claim_one(engine), "bug", "KeyError")
    change(engine, "UPDATE runs SET state = 'cancelled', ended_at = created_at WHERE id = 4")
    train(engine, -100, 10)  # of b

    found = status.lately(engine, limit=3)

    assert [(one["run"], one["stage"], one["state"], one["loss"]) for one in found] == [
        (3, "a", "failed", None), (5, "b", "done", 1.0), (2, "a", "done", 1.0),
    ]  # fmt: skip
    assert (found[0]["cause"], found[0]["message"]) == ("bug", "KeyError")
    assert found[1]["s_ago"] == pytest.approx(90, abs=20)
    assert [one["run"] for one in status.lately(engine, "b")] == [5]


# ----------------------------------------------------------------------------------------------------- failures


@pytest.mark.both
def test_failures_are_grouped_by_stage_and_cause_the_most_first(engine: Engine) -> None:
    queue.init(engine, [new_stage(9)])
    for i in range(7):
        queue.fail(engine, claim_one(engine), "diverged", f"loss of run {i} is nan")
    queue.fail(engine, claim_one(engine), "bug", "KeyError: 'x'")
    change(engine, "UPDATE runs SET ended_at = id WHERE state = 'failed'")

    many, one = status.failures(engine)

    assert (many["stage"], many["cause"], many["n"]) == ("s", "diverged", 7)
    assert many["runs"] == [7, 6, 5, 4, 3]  # the latest five
    assert many["message"] == "loss of run 6 is nan"
    assert (one["cause"], one["n"], one["runs"], one["message"]) == ("bug", 1, [8], "KeyError: 'x'")
    json.dumps([many, one])


def test_failures_of_one_cause_with_different_messages_stand_apart(engine: Engine) -> None:
    queue.init(engine, [new_stage(5)])
    for message in ("KeyError: 'x' in layer 3", "CUDA error at 0x7f3a", "KeyError: 'x' in layer 12", "KeyError: 'y'"):
        queue.fail(engine, claim_one(engine), "bug", message)

    found = {one["message"]: one["n"] for one in status.failures(engine)}

    assert found == {"KeyError: 'x' in layer 12": 2, "CUDA error at 0x7f3a": 1, "KeyError: 'y'": 1}


@pytest.mark.parametrize(
    ("message", "blanked"),
    [
        ("loss 1.25e-7 at step 1,200 of run 3", "loss # at step # of run #"),
        ("-3 of 0x7fA0, 1_000", "# of #, #"),
        ("sha256 deadbeef01 is not 12ab34cd99", "sha256 # is not #"),
        ("sha256 deadbeef01", "sha256 #"),
        ("faced effaced decade", "faced effaced decade"),
        ("", ""),
    ],
)
def test_numbers_addresses_and_hashes_are_blanked(message: str, blanked: str) -> None:
    assert status.blank(message).replace("sha#", "sha256") == blanked


def test_of_very_many_failures_the_newest_are_told_apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "FAILED", 3)
    queue.init(engine, [new_stage(5)])
    for i in range(5):
        queue.fail(engine, claim_one(engine), "bug", f"x{'abcde'[i]}")
    change(engine, "UPDATE runs SET ended_at = id WHERE state = 'failed'")

    assert sorted(one["message"] for one in status.failures(engine)) == ["xc", "xd", "xe"]


def test_the_same_cause_in_two_stages_is_two_lines(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "a"), new_stage(1, "b")])
    for _ in range(2):
        queue.fail(engine, claim_one(engine), "bug", "x")

    assert [(f["stage"], f["n"], f["runs"]) for f in status.failures(engine)] == [("a", 1, [1]), ("b", 1, [2])]
    assert [f["stage"] for f in status.failures(engine, "b")] == ["b"]


def test_a_run_that_somebody_failed_by_hand_does_not_stop_the_status(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    change(engine, "UPDATE runs SET state = 'failed', ended_at = 5")

    [found] = status.failures(engine)
    assert (found["cause"], found["n"], found["runs"], found["message"]) == (None, 1, [1], "")


# ---------------------------------------------------------------------------------------------------------- cost


def test_a_check_fails_while_a_stage_has_failed_runs_and_says_which(engine: Engine, cli: Cli) -> None:
    cli("status", "--check")  # an empty study has none
    queue.init(engine, [new_stage(2, "a"), new_stage(3, "b", runs=new_runs(3, first=10))])
    assert not cli("status", "--check", "--format", "json").stderr
    for _ in range(2):
        queue.fail(engine, claim_one(engine), "bug", "no", "Trace")

    done = cli("status", "--check", "--format", "json", code=1)

    assert done.stderr == "a: 2 failed runs\n"
    assert {stage["stage"] for stage in json.loads(done.stdout)["stages"]} == {"a", "b"}
    assert not cli("status", "--check", "--stage", "b").stderr
    cli("status")  # without it failed runs are only shown


def test_status_loads_neither_the_tables_nor_pydantic_nor_what_trains() -> None:
    unwanted = {"rnnq.tables", "pydantic", "torch", "pandas", "matplotlib", "alembic", "numpy"}
    code = f"import sys, rnnq.status; print({unwanted!r} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"


def test_counts_and_failures_come_from_the_index_that_covers_them(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    train(engine, -10, 5)
    asked: list[str] = []

    def trace(connection: sqlite3.Connection, *_rest: object) -> None:
        connection.set_trace_callback(asked.append)

    event.listen(engine, "checkout", trace)
    status.stages(engine)
    status.failures(engine)
    engine.dispose()

    with contextlib.closing(sqlite3.connect(str(engine.url.database))) as connection:
        plans = {
            sql: [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
            for sql in asked
            if "FROM runs" in sql
        }
    [counting] = [plan for sql, plan in plans.items() if "GROUP BY intake, state" in sql]
    assert counting[0] == "SEARCH runs USING COVERING INDEX ix_runs_count (intake=? AND stage=?)"
    assert not [step for step in counting if "TEMP B-TREE" in step]
    [failing] = [plan for sql, plan in plans.items() if "state = 'failed'" in sql]
    assert failing[0] == "SEARCH runs USING INDEX ix_runs_count (intake=? AND stage=? AND state=?)"
    [learning] = [plan for sql, plan in plans.items() if "attempts.ended = 'done'" in sql]
    assert learning[0] == "SEARCH runs USING INDEX ix_runs_ended (stage=?)"
    assert not [step for step in learning if "TEMP B-TREE" in step]  # it ends when it has read enough
    waiting = [plan for sql, plan in plans.items() if "2654435761" in sql]
    assert waiting and all("ix_runs_count" in plan[0] for plan in waiting)
    assert not [step for plan in plans.values() for step in plan if step.startswith("SCAN runs")]
