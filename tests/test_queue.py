"""Every change of a run's state, on real SQLite files: who may make it, what it writes, and what a crash leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, exc, text

from rnnq import db, host, queue, runs, status, tables
from rnnq.errors import DatabaseError, InputError, LeaseLost
from rnnq.queue import Added, Start
from tests.conftest import PROVENANCE, address_of, claim_one, new_runs, new_stage

NOW = 1000.0  # a moment long past: leases that tests take are over by any clock


def row(engine: Engine, run: int = 1) -> dict[str, Any]:
    with db.reading(engine) as connection:
        found = connection.execute(text("SELECT * FROM runs WHERE id = :run"), {"run": run}).one()
    return dict(found._mapping)


def attempts(engine: Engine, run: int = 1) -> list[dict[str, Any]]:
    with db.reading(engine) as connection:
        sql = "SELECT * FROM attempts WHERE run_id = :run ORDER BY attempt"
        return [dict(found._mapping) for found in connection.execute(text(sql), {"run": run})]


def points(engine: Engine, run: int = 1) -> list[tuple[str, int, float | None]]:
    with db.reading(engine) as connection:
        sql = "SELECT name, step, value FROM points WHERE run_id = :run ORDER BY name, step"
        return [tuple(found) for found in connection.execute(text(sql), {"run": run})]


def count(engine: Engine, table: str) -> int:
    with db.reading(engine) as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def everything(engine: Engine) -> list[str]:
    """The whole database as text, to see that nothing changed."""
    with db.reading(engine) as connection:
        every = [(table.name, connection.execute(table.select()).all()) for table in tables.metadata.sorted_tables]
    return [f"{name}: {row}" for name, rows in every for row in sorted(map(repr, rows))]


def change(engine: Engine, sql: str, **values: object) -> None:
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


def saved(attempt: int, step: int) -> dict[str, Any]:
    """A checkpoint file as `checkpoint.Saved` gives it."""
    return {"path": f"checkpoints/a{attempt}-s{step}.pt", "step": step, "sha256": f"{attempt}{step}", "bytes": 9}


def path(attempt: int, step: int) -> str:
    return str(saved(attempt, step)["path"])


def start(step: int = 0, **changes: Any) -> Start:
    return replace(Start(step, [], {"torch": "2.10"}, exact=True), **changes)


@pytest.fixture
def study(engine: Engine) -> Engine:
    """Three pending runs of a stage, and a worker."""
    queue.init(engine, [new_stage(3)])
    queue.register(engine, "w", "cpu", {})
    return engine


# ---------------------------------------------------------------------------------------------------------- init


def test_init_adds_what_is_not_there_and_nothing_twice(engine: Engine) -> None:
    assert queue.init(engine, [new_stage(3)]) == [Added("s", 3, 0, ())]
    assert queue.init(engine, [new_stage(3)]) == [Added("s", 0, 3, ())]
    assert queue.init(engine, [new_stage(5)]) == [Added("s", 2, 3, ())]

    assert count(engine, "runs") == 5
    assert count(engine, "intakes") == 2  # one that adds nothing leaves none behind: every claim visits each


def test_a_preview_says_what_init_will_do_and_changes_nothing(engine: Engine) -> None:
    before = everything(engine)
    assert queue.preview(engine, [new_stage(3)]) == [Added("s", 3, 0, ())]
    assert everything(engine) == before

    assert queue.init(engine, [new_stage(3)]) == [Added("s", 3, 0, ())]
    assert queue.preview(engine, [new_stage(3)]) == [Added("s", 0, 3, ())]


def test_rows_that_the_definition_lost_are_named_and_stay(engine: Engine) -> None:
    queue.init(engine, [new_stage(3)])

    assert queue.init(engine, [new_stage(runs=new_runs(2, first=1))]) == [Added("s", 0, 2, ("run 1 (run0)",))]

    assert [found["label"] for found in runs.find(engine)] == ["run0", "run1", "run2"]


def test_a_run_is_known_by_its_fingerprint_and_not_by_its_label(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    renamed = [replace(run, label="other") for run in new_runs(1)]

    assert queue.init(engine, [new_stage(runs=renamed)]) == [Added("s", 0, 1, ())]
    assert row(engine)["label"] == "run0"


def test_a_fingerprint_may_stand_in_two_stages(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "a"), new_stage(1, "b")])

    assert [found["stage"] for found in runs.find(engine)] == ["a", "b"]


def test_a_new_run_is_pending_untouched_and_carries_what_it_was_made_from(engine: Engine) -> None:
    [new] = new_runs(1)
    queue.init(engine, [new_stage(runs=[replace(new, pack_key="p")], source="x.py", source_sha256="abc")])

    made = row(engine)
    nothing = ("worker", "lease_until", "started_at", "ended_at", "summary", "loss", "checkpoint", "cause", "wish")
    assert {name: made[name] for name in nothing} == dict.fromkeys(nothing)
    assert (made["state"], made["attempt"], made["failures"], made["lost"], made["steps_done"]) == (
        "pending",
        0,
        0,
        0,
        0,
    )
    assert (made["config"], made["fingerprint"], made["group_key"], made["seed"]) == ('{"seed":0}', "f0", "g", 0)
    assert (made["pack_key"], made["budget"], made["source"], made["source_sha256"]) == ("p", 10, "x.py", "abc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "other"}, "stage s exists with family f, not other"),
        ({"data": {"text": "b" * 64}}, "stage s was made with text of sha256 aaaaaaaaaaaa, now it is bbbbbbbbbbbb"),
    ],
)
def test_a_stage_keeps_its_family_and_its_data(engine: Engine, changes: dict[str, Any], message: str) -> None:
    queue.init(engine, [new_stage(2, data={"text": "a" * 64})])
    before = everything(engine)

    for door in (queue.preview, queue.init):
        with pytest.raises(InputError, match=message):
            door(engine, [new_stage(1, "new"), new_stage(3, **({"data": {"text": "a" * 64}} | changes))])

    assert everything(engine) == before


def test_everything_that_changed_is_listed_at_once(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "a", data={"x": "1"}), new_stage(1, "b")])

    with pytest.raises(InputError) as refused:
        queue.init(engine, [new_stage(1, "a", data={"x": "2"}, family="g"), new_stage(1, "b", family="g")])

    assert len(refused.value.problems) == 3


def test_a_stage_may_learn_of_new_data(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, data={"x": "1"})])
    queue.init(engine, [new_stage(2, data={"x": "1", "y": "2"})])

    assert claim_one(engine).data == {"x": "1", "y": "2"}


def test_init_fills_all_stages_or_none(engine: Engine) -> None:
    many = new_runs(queue.CHUNK + 1)  # the first chunk is committed when the second one fails
    twice = [*many, many[0]]

    with pytest.raises(exc.IntegrityError):
        queue.init(engine, [new_stage(2, "a"), new_stage(name="b", runs=twice)])

    assert count(engine, "runs") == count(engine, "intakes") == 0
    assert runs.stage_infos(engine) == {}
    assert queue.init(engine, [new_stage(2, "a")]) == [Added("a", 2, 0, ())]


def test_an_interrupted_init_takes_back_what_it_added(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    seen: list[int] = []

    def interrupt(connection: Any) -> None:
        seen.append(connection.exec_driver_sql("SELECT count(*) FROM runs").scalar())
        if seen[-1] > queue.CHUNK + 2:  # the second chunk; the first one is committed
            event.remove(engine, "commit", interrupt)
            raise KeyboardInterrupt

    event.listen(engine, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        queue.init(engine, [new_stage(queue.CHUNK + 100)])

    assert queue.CHUNK + 2 in seen
    assert (count(engine, "runs"), count(engine, "intakes")) == (2, 1)


def test_lineage_goes_to_every_parent_of_a_run_once(engine: Engine) -> None:
    queue.init(engine, [new_stage(2, "a")])
    parents = ((1, "promote", '{"rank":1}'), (2, "promote", '{"rank":2}'))
    children = [replace(run, parents=parents) for run in new_runs(1)]

    queue.init(engine, [new_stage(name="b", runs=children)])
    queue.init(engine, [new_stage(name="b", runs=children)])

    assert [(p["run"], p["kind"], p["detail"]) for p in runs.show(engine, 3)["parents"]] == [
        (1, "promote", {"rank": 1}),
        (2, "promote", {"rank": 2}),
    ]


def test_a_run_that_is_there_gains_the_parents_of_a_later_promote(engine: Engine) -> None:
    queue.init(engine, [new_stage(2, "a"), new_stage(1, "b")])

    queue.init(engine, [new_stage(name="b", runs=[replace(new_runs(1)[0], parents=((1, "promote", "{}"),))])])

    assert [p["run"] for p in runs.show(engine, 3)["parents"]] == [1]


def test_a_parent_that_is_not_there_undoes_the_whole_init(engine: Engine) -> None:
    orphan = replace(new_runs(1)[0], parents=((99, "promote", "{}"),))

    with pytest.raises(exc.IntegrityError):
        queue.init(engine, [new_stage(3, "a"), new_stage(name="b", runs=[orphan])])

    assert count(engine, "runs") == count(engine, "intakes") == count(engine, "lineage") == 0


# ------------------------------------------------------------------------------------ intakes, living and dead

KILLED_INIT = """
import os, signal, sys
from sqlalchemy import event
from rnnq import db, queue
from tests.conftest import new_stage
engine = db.open(sys.argv[1])
chunks = []
def die(connection):
    if connection.exec_driver_sql("SELECT count(*) FROM runs WHERE stage = 'big'").scalar() > queue.CHUNK:
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of the second chunk
event.listen(engine, "commit", die)
queue.init(engine, [new_stage(queue.CHUNK + 500, "big", family="dead")])
"""


def script(code: str, *arguments: str) -> subprocess.Popen[str]:
    here = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(here)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=-1, stderr=-1, text=True)


@pytest.fixture
def half(engine: Engine) -> Engine:
    """A study with one done run, in which an init was killed between its chunks."""
    queue.init(engine, [new_stage(1)])
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0}, "loss")
    process = script(KILLED_INIT, address_of(engine))
    _, trouble = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, trouble
    assert count(engine, "runs") == 1 + queue.CHUNK
    return engine


def test_nobody_sees_a_row_of_an_init_that_was_killed(half: Engine) -> None:
    assert queue.claim(half, "w", PROVENANCE, limit=10) == []
    assert queue.claim(half, "w", PROVENANCE, stage="big") == []
    assert not queue.has_open(half)
    assert not queue.has_open(half, "big")
    assert [s.stage for s in status.stages(half)] == ["s"]
    assert status.stages(half)[0].counts == {"done": 1}
    assert list(runs.stage_infos(half)) == ["s"]
    assert [found["stage"] for found in runs.find(half)] == ["s"]
    assert len(runs.find(half, filter="seed >= 0")) == 1
    with pytest.raises(InputError, match="there is no run 2"):
        runs.show(half, 2)
    with pytest.raises(InputError, match="there is no stage 'big'"):
        runs.find(half, stage="big")
    assert queue.reap(half) == []


def dare_not_wait(engine: Engine) -> None:
    """From now on an init that looks again and again at the same open intake fails, instead of waiting for a minute."""
    looks: list[str] = []

    def look(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        looks.append(statement)
        assert sum("AS silent" in seen for seen in looks) < 5, "it waits"

    event.listen(engine, "after_cursor_execute", look)


def test_the_next_init_removes_what_a_killed_one_left_even_of_another_family(half: Engine) -> None:
    dare_not_wait(half)
    assert queue.preview(half, [new_stage(2, "big")]) == [Added("big", 2, 0, ())]
    assert queue.init(half, [new_stage(2, "big")]) == [Added("big", 2, 0, ())]

    assert count(half, "runs") == 3
    assert runs.stage_info(half, "big").family == "f"
    assert len(queue.claim(half, "w", PROVENANCE, limit=10)) == 2


def open_intake(engine: Engine, beat_at: str = db.NOW, **who: object) -> int:
    """An init of stage s that has not ended; by default one of this very process."""
    me: dict[str, object] = {"host": host.name(), "pid": os.getpid(), "start": host.process_start(os.getpid())}
    sql = f"""INSERT INTO intakes (stage, complete, host, pid, pid_start, beat_at)
              VALUES ('s', false, :host, :pid, :start, {beat_at}) RETURNING id"""
    with db.transaction(engine) as connection:
        return int(connection.execute(text(sql), me | who).scalar_one())


def test_an_init_waits_for_a_living_one_and_then_sees_what_it_added(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    intake = open_intake(engine)
    change(engine, "UPDATE runs SET intake = :intake", intake=intake)  # the living one has added run 0 so far
    looks = threading.Semaphore(0)

    def look(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "NOT complete" in statement:
            looks.release()

    event.listen(engine, "after_cursor_execute", look)
    added: list[Added] = []
    second = threading.Thread(target=lambda: added.extend(queue.init(engine, [new_stage(3)])))
    second.start()
    for _ in range(3):
        assert looks.acquire(timeout=30)
    assert second.is_alive()
    change(engine, "UPDATE intakes SET complete = true WHERE id = :intake", intake=intake)
    second.join(timeout=30)
    event.remove(engine, "after_cursor_execute", look)

    assert added == [Added("s", 2, 1, ())]


@pytest.mark.parametrize(
    ("who", "beat_at"),
    [
        ({"start": "1"}, db.NOW),
        ({"host": "elsewhere"}, f"{db.NOW} - 3600"),
        ({"host": "elsewhere", "start": None}, f"{db.NOW} - 3600"),
        ({}, f"{db.NOW} - 3600"),
    ],
    ids=["its pid is another's now", "a silent host", "a silent laptop", "a stopped process"],
)
def test_an_intake_of_the_dead_or_silent_is_not_waited_for(
    engine: Engine, who: dict[str, object], beat_at: str
) -> None:
    queue.init(engine, [new_stage(1)])
    change(engine, "UPDATE runs SET intake = :intake", intake=open_intake(engine, beat_at, **who))
    dare_not_wait(engine)

    assert queue.init(engine, [new_stage(3)]) == [Added("s", 3, 0, ())]
    assert count(engine, "runs") == 3


def test_the_number_of_a_removed_intake_is_never_given_again(engine: Engine) -> None:
    """Else an init that others took for dead would write into the intake of its successor, or remove that."""
    queue.init(engine, [new_stage(1)])
    lost = open_intake(engine, f"{db.NOW} - 3600")

    queue.init(engine, [new_stage(3)])

    with db.reading(engine) as connection:
        assert lost not in connection.execute(text("SELECT id FROM intakes")).scalars().all()
        assert connection.execute(text("SELECT max(id) FROM intakes")).scalar_one() > lost


def test_an_init_shows_that_it_lives_for_all_its_stages_while_it_fills_the_first(engine: Engine) -> None:
    rows, silences = [0], []

    def grow_old(connection: Any) -> None:
        """After each chunk the intakes have beaten an hour ago, until something renews them."""
        rows.append(connection.exec_driver_sql("SELECT count(*) FROM runs").scalar())
        if rows[-1] > rows[-2]:
            sql = f"SELECT max({db.NOW} - beat_at) FROM intakes"
            silences.append(connection.exec_driver_sql(sql).scalar())
            connection.exec_driver_sql("UPDATE intakes SET beat_at = beat_at - 3600")

    event.listen(engine, "commit", grow_old)
    queue.init(engine, [new_stage(queue.CHUNK + 1, "a"), new_stage(1, "b")])

    assert len(silences) == 3
    assert max(silences) < 3600


@pytest.mark.parametrize("n", [5, queue.CHUNK + 5], ids=["before its last step", "between its chunks"])
def test_an_init_that_was_taken_for_dead_says_so_and_takes_nothing_from_its_successor(engine: Engine, n: int) -> None:
    other = db.open(address_of(engine))
    added: list[Added] = []

    def sleep_past_the_lease(*_connection: object) -> None:
        """Between two transactions of the first init; meanwhile another one does the work."""
        if added or not count(other, "runs"):
            return
        change(other, "UPDATE intakes SET beat_at = beat_at - 3600")
        added.extend(queue.init(other, [new_stage(3)]))

    event.listen(engine, "checkin", sleep_past_the_lease)
    with pytest.raises(DatabaseError, match="another one of stage s took it for dead"):
        queue.init(engine, [new_stage(n)])
    other.dispose()

    assert added == [Added("s", 3, 0, ())]
    assert len(runs.find(engine)) == count(engine, "runs") == 3


# --------------------------------------------------------------------------------------------------------- claim


def test_the_highest_priority_is_claimed_first_and_then_the_oldest_across_intakes_and_stages(engine: Engine) -> None:
    queue.init(engine, [new_stage(2, "a")])  # 1, 2
    queue.init(engine, [new_stage(2, "b")])  # 3, 4
    queue.init(engine, [new_stage(4, "a")])  # 5, 6
    change(engine, "UPDATE runs SET priority = 5 WHERE id IN (4, 6)")
    change(engine, "UPDATE runs SET priority = -1 WHERE id = 1")
    queue.register(engine, "w", "cpu", {})

    assert [claim_one(engine).run for _ in range(3)] == [4, 6, 2]
    assert [claim.run for claim in queue.claim(engine, "w", PROVENANCE, limit=10)] == [3, 5, 1]
    assert queue.claim(engine, "w", PROVENANCE) == []


@pytest.mark.parametrize(("limit", "runs_of_it"), [(1, [2]), (2, [2, 3]), (3, [2, 3, 1]), (99, [2, 3, 1])])
def test_a_limit_takes_the_best_in_their_order(study: Engine, limit: int, runs_of_it: list[int]) -> None:
    change(study, "UPDATE runs SET priority = 1 WHERE id > 1")

    assert [claim.run for claim in queue.claim(study, "w", PROVENANCE, limit=limit)] == runs_of_it
    assert count(study, "attempts") == len(runs_of_it)


def test_paused_stages_are_passed_over_and_stages_can_be_chosen(engine: Engine) -> None:
    queue.init(engine, [new_stage(2, "a"), new_stage(2, "b")])
    change(engine, "UPDATE runs SET priority = 9 WHERE stage = 'a'")
    change(engine, "UPDATE stages SET paused = true WHERE name = 'a'")
    queue.register(engine, "w", "cpu", {})

    assert queue.claim(engine, "w", PROVENANCE, stage="a") == []
    assert not queue.has_open(engine, "a")
    assert queue.has_open(engine)
    assert [c.stage for c in queue.claim(engine, "w", PROVENANCE, limit=10)] == ["b", "b"]

    change(engine, "UPDATE stages SET paused = false")
    assert queue.claim(engine, "w", PROVENANCE, stage="nowhere") == []
    assert [c.stage for c in queue.claim(engine, "w", PROVENANCE, stage="a")] == ["a"]


def test_only_pending_runs_are_claimed(study: Engine) -> None:
    change(study, "UPDATE runs SET state = 'waiting', wake_at = 1e12 WHERE id = 1")
    for run, state in ((2, "cancelled"), (3, "skipped")):
        change(study, "UPDATE runs SET state = :state, ended_at = 5 WHERE id = :run", state=state, run=run)

    assert queue.claim(study, "w", PROVENANCE, limit=9) == []
    assert queue.has_open(study)  # its time will come

    change(study, "UPDATE runs SET state = 'failed', ended_at = 5 WHERE id = 1")
    assert not queue.has_open(study)


def test_a_claim_carries_all_that_is_needed_to_train(engine: Engine) -> None:
    config = '{"lr":0.1,"seed":0}'
    new = replace(new_runs(1)[0], config=config, pack_key="p")
    queue.init(engine, [new_stage(runs=[new], source="x.py", source_sha256="abc", data={"t": "1"})])
    queue.record(engine, claim_one(engine), 4, checkpoint=saved(1, 4))
    queue.reap(engine, now=db_now(engine) + 61)

    claim = claim_one(engine, now=NOW)

    assert (claim.run, claim.attempt, claim.worker, claim.until) == (1, 2, "w", NOW + 60)
    assert (claim.stage, claim.family, claim.label, claim.fingerprint) == ("s", "f", "run0", "f0")
    assert (claim.config, claim.budget, claim.steps_done) == ({"lr": 0.1, "seed": 0}, 10, 4)
    assert (claim.checkpoint, claim.checkpoint_prev, claim.checkpoint_best) == (saved(1, 4), None, None)
    assert (claim.source, claim.source_sha256, claim.data) == (None, None, {"t": "1"})
    assert claim.pack_key is None  # after a lost attempt it is claimed alone


def db_now(engine: Engine) -> float:
    with db.reading(engine) as connection:
        return db.clock(connection)


def test_a_claim_names_the_definition_only_where_that_holds_the_family(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, source="x.py", source_sha256="abc", family_in_source=True)])

    claim = claim_one(engine)

    assert (claim.source, claim.source_sha256) == ("x.py", "abc")
    assert attempts(engine)[0]["source_sha256"] == "abc"


def test_an_attempt_begins_with_its_row_in_the_transaction_of_the_claim(study: Engine) -> None:
    provenance = {**PROVENANCE, "git_commit": "c0ffee", "git_dirty": True, "device": "cuda:1"}
    queue.claim(study, "w", provenance, now=NOW)

    [attempt] = attempts(study)
    assert (attempt["run_id"], attempt["attempt"], attempt["worker"], attempt["started_at"]) == (1, 1, "w", NOW)
    assert (attempt["host"], attempt["device"], attempt["git_commit"]) == ("testhost", "cuda:1", "c0ffee")
    assert (bool(attempt["git_dirty"]), attempt["command_line"], attempt["versions"]) == (True, "pytest", "{}")
    assert (attempt["ended"], attempt["ended_at"], attempt["step_from"]) == (None, None, None)
    assert (row(study)["state"], row(study)["started_at"], row(study)["lease_until"]) == ("running", NOW, NOW + 60)


def test_a_claim_whose_attempt_cannot_be_written_does_not_happen(study: Engine) -> None:
    before = everything(study)

    with pytest.raises(exc.IntegrityError):
        queue.claim(study, "nobody", PROVENANCE)

    assert everything(study) == before


def test_the_attempt_rises_in_the_claim_and_nowhere_else(study: Engine) -> None:
    seen = []

    def look() -> None:
        seen.append((row(study)["attempt"], len(attempts(study))))

    look()
    first = claim_one(study, now=NOW)
    look()
    queue.beat(study, "w", [(1, 1)], now=NOW + 9)
    queue.restore(study, first, start())
    queue.record(study, first, 3, [("loss", 3, 1.0)], saved(1, 3))
    queue.release(study, first)
    look()
    claim_one(study, now=NOW)
    look()
    queue.reap(study, now=NOW + 61)
    look()
    queue.finish(study, claim_one(study, now=NOW), 10, {}, "loss")
    look()

    assert seen == [(0, 0), (1, 1), (1, 1), (2, 2), (2, 2), (3, 3)]
    assert [attempt["ended"] for attempt in attempts(study)] == ["released", "lost", "done"]


def test_a_run_keeps_the_moment_when_it_first_began(study: Engine) -> None:
    queue.release(study, claim_one(study, now=NOW))
    claim_one(study, now=NOW + 500)

    assert row(study)["started_at"] == NOW


# ----------------------------------------------------------------------------- what it costs when the table is big


def fill(engine: Engine, n: int) -> None:
    """n pending, n done, n waiting rows, and n pending ones of a paused stage."""
    one = new_stage(1)
    queue.init(engine, [one, new_stage(1, "paused")])
    change(engine, "UPDATE stages SET paused = true WHERE name = 'paused'")
    copy = """
        INSERT INTO runs (stage, intake, family, label, config, fingerprint, group_key, seed, state, ended_at,
                          created_at)
        WITH RECURSIVE numbers (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM numbers WHERE i < :n)
        SELECT stage, intake, family, label, config, :state || i, group_key, i, :state, :ended, created_at
        FROM runs JOIN numbers WHERE stage = :stage AND fingerprint = 'f0'"""
    for stage, state in (("s", "pending"), ("s", "done"), ("s", "waiting"), ("paused", "pending")):
        change(engine, copy, n=n, stage=stage, state=state, ended=5 if state == "done" else None)


def cost(engine: Engine, action: Callable[[], object]) -> int:
    """Instructions of SQLite's virtual machine."""
    steps = [0]

    def tick() -> int:
        steps[0] += 1
        return 0

    def listen(connection: sqlite3.Connection, *_rest: object) -> None:
        connection.set_progress_handler(tick, 1)

    event.listen(engine, "checkout", listen)
    try:
        action()
    finally:
        event.remove(engine, "checkout", listen)
        engine.dispose()  # the counted connection goes
    return steps[0]


def costs(engine: Engine) -> dict[str, int]:
    claims: list[queue.Claim] = []
    queue.register(engine, "w", "cpu", {})
    queue.register(engine, "v", "cpu", {})
    queue.claim(engine, "v", PROVENANCE, limit=50, now=db_now(engine))

    def claim(limit: int) -> None:
        claims.extend(queue.claim(engine, "w", PROVENANCE, limit=limit, now=NOW))

    return {
        "claim 1": cost(engine, lambda: claim(1)),
        "claim 4": cost(engine, lambda: claim(4)),
        "has_open": cost(engine, lambda: queue.has_open(engine)),
        "beat": cost(engine, lambda: queue.beat(engine, "w", [(c.run, c.attempt) for c in claims], now=NOW)),
        "record": cost(engine, lambda: queue.record(engine, claims[0], 1, [("loss", 1, 1.0)], saved(1, 1))),
        "finish": cost(engine, lambda: queue.finish(engine, claims[0], 1, {"loss": 1.0}, "loss")),
        "fail": cost(engine, lambda: queue.fail(engine, claims[1], "bug", "x")),
        "release": cost(engine, lambda: queue.release(engine, claims[2])),
        "reap": cost(engine, lambda: queue.reap(engine, now=NOW + 61)),
        "nothing to reap": cost(engine, lambda: queue.reap(engine)),
    }


@pytest.mark.sqlite
def test_what_a_worker_does_costs_the_same_in_a_table_two_hundred_times_as_big(engine: Engine, tmp_path: Path) -> None:
    db.upgrade(str(tmp_path / "big.db"))
    big = db.open(str(tmp_path / "big.db"))
    fill(engine, 100)
    fill(big, 20_000)

    small_costs, big_costs = costs(engine), costs(big)
    big.dispose()

    assert big_costs == small_costs  # a dive into a deeper tree is the same number of instructions


@pytest.mark.sqlite
def test_a_claim_reads_the_head_of_each_queue_from_the_partial_index_and_sorts_no_queue(study: Engine) -> None:
    with db.reading(study) as connection:
        values = {"worker": "w", "now": NOW, "limit": 1, "stage": None, "without": "[]"}
        plan = connection.execute(text("EXPLAIN QUERY PLAN " + queue._claim_statement(connection)), values).all()

    [dive] = [step for step in plan if "inner_run" in step.detail]
    assert "SEARCH inner_run USING INDEX ix_runs_claim (" in dive.detail
    assert [step.detail for step in plan if step.parent == dive.parent] == [dive.detail]  # beside it: no sort
    assert not [step.detail for step in plan if step.detail.startswith(("SCAN runs", "SCAN head", "SCAN inner_run"))]


# ------------------------------------------------------------------------------------------------- packs of runs


def of_key(n: int, key: str | None, first: int = 0) -> list[queue.NewRun]:
    return [replace(run, pack_key=key) for run in new_runs(n, first)]


@pytest.fixture
def mixed(engine: Engine) -> Engine:
    """Runs 1 to 3 of shape x, 4 and 5 of y, 6 of none; then 7 of x in another stage. Worker w."""
    runs_ = [*of_key(3, "x"), *of_key(2, "y", 3), *of_key(1, None, 5)]
    queue.init(engine, [new_stage(runs=runs_), new_stage(name="t", runs=of_key(1, "x", 50))])
    queue.register(engine, "w", "cpu", {})
    return engine


def take(engine: Engine, limit: int, kind: tuple[str, str]) -> list[queue.Claim]:
    return queue.claim(engine, "w", PROVENANCE, limit, kind=kind)


def test_what_is_ahead_is_the_run_that_a_claim_takes_with_how_many_wait_that_are_alike(mixed: Engine) -> None:
    seen = []
    for _ in range(7):
        found = queue.ahead(mixed)
        claim = claim_one(mixed)
        assert found is not None
        assert (found.stage, found.pack_key, found.config) == (claim.stage, claim.pack_key, claim.config)
        assert (found.family, found.budget, found.source, found.source_sha256) == ("f", 10, None, None)
        seen.append((found.stage, found.pack_key, found.pending))

    assert seen == [("s", "x", 3), ("s", "x", 2), ("s", "x", 1), ("s", "y", 2), ("s", "y", 1), ("s", None, 1),
                    ("t", "x", 1)]  # fmt: skip
    assert queue.ahead(mixed) is None


def test_what_is_ahead_goes_by_priority_and_by_the_scope_and_leaves_out_paused_stages(mixed: Engine) -> None:
    def head(*scope: Any) -> tuple[str, str | None, int] | None:
        found = queue.ahead(mixed, *scope)
        return found and (found.stage, found.pack_key, found.pending)

    queue.prioritise(mixed, [5], 1)
    assert head() == ("s", "y", 2)
    assert head("t") == head(None, ["s"]) == ("t", "x", 1)
    queue.pause(mixed, "s")
    assert head() == ("t", "x", 1)
    assert head("s") is None
    queue.resume(mixed, "s")
    queue.prioritise(mixed, [7], 2)
    assert head() == ("t", "x", 1)
    assert head("s") == ("s", "y", 2)


def test_what_is_ahead_is_known_with_the_file_of_a_family_of_ones_own(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, family_in_source=True, source="study.py", source_sha256="abc")])

    found = queue.ahead(engine)

    assert found is not None
    assert (found.source, found.source_sha256) == ("study.py", "abc")


def test_runs_of_an_init_that_has_not_ended_are_not_ahead_nor_counted(mixed: Engine) -> None:
    stage = new_stage(runs=of_key(4, "x", 20))
    intakes = queue._open_intakes(mixed, [stage])
    queue._insert_runs(mixed, intakes, stage)
    queue.prioritise(mixed, [8], 9)

    found = queue.ahead(mixed)

    assert found is not None
    assert (found.pack_key, found.pending) == ("x", 3)
    assert [claim.run for claim in take(mixed, 10, ("s", "x"))] == [1, 2, 3]


def test_live_workers_that_could_claim_what_is_ahead_are_counted(mixed: Engine) -> None:
    for worker, stage in (("any", None), ("here", "s"), ("elsewhere", "t"), ("gone", "s")):
        queue.register(mixed, worker, "cpu", {"stage": stage})
    queue.leave(mixed, "gone", "bye")

    found, elsewhere = queue.ahead(mixed), queue.ahead(mixed, "t")

    assert found is not None and elsewhere is not None
    assert (found.workers, elsewhere.workers) == (3, 3)  # w and any, and the one that is bound to the stage
    queue.leave(mixed, "here", "bye")
    found = queue.ahead(mixed)
    assert found is not None
    assert found.workers == 2


def test_a_claim_of_one_kind_takes_that_stage_and_shape_alone_by_priority(mixed: Engine) -> None:
    queue.prioritise(mixed, [3], 5)
    queue.prioritise(mixed, [4], 9)

    assert [claim.run for claim in take(mixed, 2, ("s", "x"))] == [3, 1]
    assert [(claim.run, claim.pack_key) for claim in take(mixed, 9, ("s", "x"))] == [(2, "x")]
    assert take(mixed, 9, ("s", "x")) == take(mixed, 9, ("s", "z")) == []
    queue.pause(mixed, "s")
    assert take(mixed, 9, ("s", "y")) == []
    assert [claim.run for claim in take(mixed, 9, ("t", "x"))] == [7]


@pytest.mark.sqlite
def test_a_claim_of_one_kind_reads_the_index_that_begins_with_it_and_sorts_no_queue(mixed: Engine) -> None:
    with db.reading(mixed) as connection:
        values = {"worker": "w", "now": NOW, "limit": 1, "stage": "s", "without": "[]", "pack_key": "x"}
        statement = queue._claim_statement(connection, alike=True)
        plan = connection.execute(text("EXPLAIN QUERY PLAN " + statement), values).all()

    [dive] = [step for step in plan if "inner_run" in step.detail]
    assert "SEARCH inner_run USING INDEX ix_runs_claim_pack (intake=? AND stage=? AND pack_key=?)" in dive.detail
    assert [step.detail for step in plan if step.parent == dive.parent] == [dive.detail]  # beside it: no sort


def test_of_runs_recorded_together_one_that_was_lost_is_not_written_and_stays_on_record(mixed: Engine) -> None:
    claims = take(mixed, 3, ("s", "x"))
    queue.cancel(mixed, [2], at_once=True)

    progress = [(claim, 5, [("loss", 5, float(claim.run)), ("new", 5, 0.5)]) for claim in reversed(claims)]
    assert queue.record_together(mixed, progress) == [2]

    assert {run: points(mixed, run) for run in (1, 2, 3)} == {
        1: [("loss", 5, 1.0), ("new", 5, 0.5)],
        2: [],
        3: [("loss", 5, 3.0), ("new", 5, 0.5)],
    }
    assert [(row(mixed, run)["state"], row(mixed, run)["steps_done"]) for run in (1, 2, 3)] == [
        ("running", 5),
        ("cancelled", 0),
        ("running", 5),
    ]
    with db.reading(mixed) as connection:
        refused = connection.execute(text("SELECT detail FROM changes WHERE verb = 'refused'")).scalars().all()
    assert list(map(json.loads, refused)) == [{"run": 2, "attempt": 1, "worker": "w", "what": "record"}]


def test_of_runs_recorded_together_nothing_is_written_where_one_write_fails(mixed: Engine) -> None:
    claims = take(mixed, 2, ("s", "x"))
    queue.record(mixed, claims[1], 1, [("loss", 1, 1.0)])

    with pytest.raises(exc.IntegrityError):  # a point that is there already
        queue.record_together(mixed, [(claim, 5, [("loss", 1, 2.0)]) for claim in claims])

    assert (points(mixed, 1), points(mixed, 2)) == ([], [("loss", 1, 1.0)])
    assert (row(mixed, 1)["steps_done"], row(mixed, 2)["steps_done"]) == (0, 1)
    assert queue.record_together(mixed, [(claim, 6, [("loss", 6, 1.0)]) for claim in claims]) == []


def test_a_run_that_is_given_back_alone_has_no_shape_until_its_next_checkpoint(mixed: Engine) -> None:
    one, two, _ = take(mixed, 3, ("s", "x"))
    queue.release(mixed, two, "out of a pack")
    queue.release(mixed, one, "fell out of a pack", alone=True, trace="Traceback: x")

    assert [(row(mixed, run)["state"], row(mixed, run)["pack_key"]) for run in (1, 2)] == [
        ("pending", None),
        ("pending", "x"),
    ]
    assert [claim.run for claim in take(mixed, 9, ("s", "x"))] == [2]
    [ended] = attempts(mixed)
    assert (ended["ended"], ended["cause"], ended["traceback"]) == ("released", "preempted", "Traceback: x")
    again = claim_one(mixed)
    assert (again.run, again.pack_key) == (1, None)
    found = row(mixed)
    queue.record(mixed, replace(again, pack_key="x"), 2, (), saved(2, 2))
    assert (found["pack_key"], row(mixed)["pack_key"]) == (None, "x")


def test_only_what_failed_alone_and_was_handed_back_is_no_luck_of_another_worker(mixed: Engine) -> None:
    one, two, three = take(mixed, 3, ("s", "x"))
    queue.release(mixed, one, "a pack fell apart", alone=True, trace="Traceback: of the pack")
    queue.release(mixed, two, "bye")
    queue.fail(mixed, three, "bug", "x", "Traceback: of this run")
    assert queue.hand_back(mixed, [three], "all failed here") == [3]
    again = {claim.run: claim for claim in queue.claim(mixed, "w", PROVENANCE, 3)}

    assert {run: queue.was_handed_back(mixed, claim) for run, claim in again.items()} == {1: False, 2: False, 3: True}
    assert not queue.was_handed_back(mixed, three)  # of that very attempt nothing is known yet


def test_what_was_found_out_about_packs_is_remembered_and_the_newest_counts(engine: Engine) -> None:
    assert queue.packs(engine, "a") == []
    queue.remember_pack(engine, "a", 8, True, 125.5, True)
    queue.remember_pack(engine, "a", 4, None, None, True)
    queue.remember_pack(engine, "b", 2, False, 1.0, True)
    queue.remember_pack(engine, "a", 8, False, None, False)

    assert queue.packs(engine, "a") == [
        {"members": 4, "equal": None, "rate": None, "fits": True},
        {"members": 8, "equal": False, "rate": None, "fits": False},
    ]
    assert queue.packs(engine, "b") == [{"members": 2, "equal": False, "rate": 1.0, "fits": True}]
    assert queue.packs(engine, "a")[1]["equal"] is False  # not 0


# ---------------------------------------------------------------------------------------------- the fencing token

Verb = Callable[[Engine, queue.Claim], object]
VERBS: dict[str, Verb] = {
    "restore": lambda e, c: queue.restore(e, c, start(2, curve=[("loss", 2, 1.0)], problems=["x"])),
    "record": lambda e, c: queue.record(e, c, 5, [("new", 5, 1.0)]),
    "record a checkpoint": lambda e, c: queue.record(e, c, 5, [("loss", 5, 1.0)], saved(1, 5)),
    "finish": lambda e, c: queue.finish(e, c, 10, {"loss": 1.0}, "loss", [("new", 10, 1.0)], saved(1, 10), saved(1, 4)),
    "fail": lambda e, c: queue.fail(e, c, "bug", "x", "trace", [("new", 9, 1.0)]),
    "release": lambda e, c: queue.release(e, c, "bye"),
}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def reaped(engine: Engine, claim: queue.Claim) -> None:
    queue.reap(engine, now=claim.until + 1)


def given_to_another(engine: Engine, claim: queue.Claim) -> None:
    reaped(engine, claim)
    claim_one(engine, "other")


def given_to_the_same_worker_again(engine: Engine, claim: queue.Claim) -> None:
    reaped(engine, claim)
    claim_one(engine, claim.worker)


def finished_by_another(engine: Engine, claim: queue.Claim) -> None:
    reaped(engine, claim)
    queue.finish(engine, claim_one(engine, "other"), 10, {"loss": 2.0}, "loss", [("loss", 10, 2.0)])


def cancelled_at_once(engine: Engine, claim: queue.Claim) -> None:
    sql = "UPDATE runs SET state = 'cancelled', worker = NULL, lease_until = NULL, ended_at = 5 WHERE id = :run"
    change(engine, sql, run=claim.run)


LOSSES = (reaped, given_to_another, given_to_the_same_worker_again, finished_by_another, cancelled_at_once)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_stale_worker_can_write_nothing(study: Engine, loss: Callable[[Engine, queue.Claim], None]) -> None:
    claim = claim_one(study, now=NOW)
    queue.record(study, claim, 4, [("loss", 4, 3.0)], saved(1, 4))
    loss(study, claim)
    before = everything(study)

    for verb in VERBS.values():
        with pytest.raises(LeaseLost, match="run 1 attempt 1 is no longer ours"):
            verb(study, claim)

    told = [line for line in everything(study) if line not in before]
    assert all(line.startswith("changes: ") and "refused" in line for line in told)
    assert len(told) == len(VERBS)  # that it was refused, and nothing else
    assert set(before) <= set(everything(study))
    assert queue.beat(study, "w", [(1, 1)], now=NOW + 9) == {}
    assert row(study)["lease_until"] != NOW + 69


def test_a_lost_lease_says_who_has_the_run_and_where_it_stands(study: Engine) -> None:
    claim = claim_one(study, now=NOW)
    queue.record(study, claim, 3000, [], saved(1, 3000))
    given_to_another(study, claim)

    with pytest.raises(LeaseLost) as lost:
        queue.record(study, claim, 3001)

    assert lost.value.message == "run 1 attempt 1 is no longer ours: attempt 2 of other has it"
    assert lost.value.hint == "nothing is lost; the run stands at step 3,000"


def test_a_run_that_was_deleted_is_a_lost_lease_and_no_crash(study: Engine) -> None:
    claim = claim_one(study)
    change(study, "DELETE FROM attempts")
    change(study, "DELETE FROM runs WHERE id = 1")

    for verb in VERBS.values():
        with pytest.raises(LeaseLost, match="no longer in the database"):
            verb(study, claim)


@each_verb
def test_a_lease_past_its_time_but_not_reaped_is_still_ours(study: Engine, verb: Verb) -> None:
    claim = claim_one(study, now=NOW)
    assert db_now(study) > claim.until + 1e6

    verb(study, claim)


# ---------------------------------------------------------------------------------------------------------- beat


def test_a_beat_renews_exactly_the_runs_that_it_names(study: Engine) -> None:
    queue.claim(study, "w", PROVENANCE, limit=2, now=NOW)
    claim_one(study, "other", now=NOW)

    ours = queue.beat(study, "w", [(1, 1), (3, 1)], now=NOW + 30)

    assert ours == {1: ""}  # 2 was not named; 3 is not ours
    assert [row(study, run)["lease_until"] for run in (1, 2, 3)] == [NOW + 90, NOW + 60, NOW + 60]


def test_a_beat_with_an_old_attempt_renews_nothing(study: Engine) -> None:
    first = claim_one(study, now=NOW)
    given_to_the_same_worker_again(study, first)
    until = row(study)["lease_until"]

    assert queue.beat(study, "w", [(1, 1)], now=until + 5) == {}
    assert row(study)["lease_until"] == until
    assert queue.beat(study, "w", [(1, 1), (1, 2)], now=until + 5) == {1: ""}


def test_a_beat_brings_the_wishes_of_the_runs_that_are_still_ours(study: Engine) -> None:
    queue.claim(study, "w", PROVENANCE, limit=3, now=NOW)
    change(study, "UPDATE runs SET wish = 'cancel' WHERE id = 1")
    change(study, "UPDATE runs SET wish = 'pause' WHERE id = 2")

    held = [(1, 1), (2, 1), (3, 1)]
    assert queue.beat(study, "w", held, now=NOW) == {1: "cancel", 2: "pause", 3: ""}

    queue.reap(study, now=NOW + 61)
    assert queue.beat(study, "w", held, now=NOW) == {}


def test_a_beat_without_runs_shows_that_the_worker_lives(study: Engine) -> None:
    assert queue.beat(study, "w", [], now=NOW) == {}

    with db.reading(study) as connection:
        assert connection.execute(text("SELECT beat_at FROM workers")).scalar_one() == NOW


def test_a_beat_renews_many_runs_at_once(engine: Engine) -> None:
    queue.init(engine, [new_stage(1500)])
    queue.register(engine, "w", "cpu", {})
    claims = queue.claim(engine, "w", PROVENANCE, limit=1500, now=NOW)

    assert len(queue.beat(engine, "w", [(c.run, c.attempt) for c in claims], now=NOW + 1)) == 1500


def test_a_claim_whose_answer_was_never_heard_expires(study: Engine) -> None:
    heard = claim_one(study, now=NOW)
    claim_one(study, now=NOW)  # the worker never learns of it, so it never names it

    queue.beat(study, "w", [(heard.run, heard.attempt)], now=NOW + 50)

    assert [r.run for r in queue.reap(study, now=NOW + 61)] == [2]
    assert row(study, 2)["state"] == "pending"


def test_a_living_worker_that_was_taken_for_lost_is_live_again_when_it_beats(study: Engine) -> None:
    change(study, "UPDATE workers SET state = 'lost', left_at = 5")

    queue.beat(study, "w", [])

    with db.reading(study) as connection:
        assert connection.execute(text("SELECT state, left_at FROM workers")).one() == ("live", None)


def test_a_worker_that_leaves_says_why(study: Engine) -> None:
    queue.leave(study, "w", "nothing\x1b[31m left")

    with db.reading(study) as connection:
        found = connection.execute(text("SELECT state, message, left_at FROM workers")).one()
    assert (found.state, found.message) == ("left", "nothing\\x1b[31m left")
    assert found.left_at is not None


# ---------------------------------------------------------------------------------------------------------- reap


def test_a_reaped_run_is_pending_again_with_its_checkpoints_and_points(study: Engine) -> None:
    claim = claim_one(study, now=NOW)
    queue.record(study, claim, 4, [("loss", 4, 3.0)], saved(1, 4))
    queue.record(study, claim, 8, [("loss", 8, 2.0)], saved(1, 8))

    [taken] = queue.reap(study, now=claim.until + 14)

    assert taken == queue.Reaped(1, 1, "w", "pending")
    run = row(study)
    assert (run["state"], run["worker"], run["lease_until"], run["ended_at"]) == ("pending", None, None, None)
    assert (run["attempt"], run["lost"], run["failures"], run["steps_done"]) == (1, 1, 0, 8)
    assert (json.loads(run["checkpoint"]), json.loads(run["checkpoint_prev"])) == (saved(1, 8), saved(1, 4))
    assert len(points(study)) == 2
    [attempt] = attempts(study)
    assert (attempt["ended"], attempt["cause"], attempt["step_to"]) == ("lost", "lost", 8)
    assert attempt["message"] == "worker w was lost: no heartbeat; the lease ended 14.0 s before"
    assert claim_one(study, "other").run == 1


def test_a_lease_is_reaped_only_past_its_time(study: Engine) -> None:
    claim = claim_one(study, now=NOW)

    assert queue.reap(study, now=claim.until) == []
    assert [r.run for r in queue.reap(study, now=claim.until + 0.01)] == [1]


def test_the_clock_reaps_only_when_it_is_asked_to(study: Engine) -> None:
    claim = claim_one(study, now=NOW)

    assert queue.reap(study, by_clock=False, now=claim.until + 1e6) == []
    assert row(study)["state"] == "running"


def test_the_third_loss_in_a_row_without_a_new_checkpoint_fails_the_run(study: Engine) -> None:
    states = []
    for _ in range(3):
        claim = claim_one(study, now=NOW)
        queue.record(study, claim, 1)  # points are not progress that lasts
        states += [r.state for r in queue.reap(study, now=NOW + 61)]

    assert states == ["pending", "pending", "failed"]
    run = row(study)
    assert (run["state"], run["cause"], run["lost"], run["failures"]) == ("failed", "lost", 3, 1)
    assert run["message"].startswith("lost 3 times in a row without a new checkpoint; last: worker w was lost")
    assert run["ended_at"] == NOW + 61
    assert [a["ended"] for a in attempts(study)] == ["lost"] * 3
    assert claim_one(study).run == 2


def test_a_new_checkpoint_forgives_earlier_losses(study: Engine) -> None:
    for i in range(6):
        claim = claim_one(study, now=NOW)
        if i % 2:
            queue.record(study, claim, i, checkpoint=saved(claim.attempt, i))
        queue.reap(study, now=NOW + 61)

    assert (row(study)["state"], row(study)["lost"]) == ("pending", 1)


def test_a_run_that_was_given_back_is_not_a_lost_one(study: Engine) -> None:
    for _ in range(5):
        queue.release(study, claim_one(study))

    assert (row(study)["state"], row(study)["lost"], row(study)["failures"]) == ("pending", 0, 0)


def test_after_a_loss_a_run_is_alone_until_its_next_checkpoint(engine: Engine) -> None:
    queue.init(engine, [new_stage(runs=[replace(new_runs(1)[0], pack_key="p")])])
    claim = claim_one(engine, now=NOW)
    assert claim.pack_key == "p"

    queue.reap(engine, now=NOW + 61)
    again = replace(claim_one(engine), pack_key="p")  # the worker computes it anew from the config
    assert row(engine)["pack_key"] is None
    queue.record(engine, again, 1)
    assert row(engine)["pack_key"] is None

    queue.record(engine, again, 2, checkpoint=saved(2, 2))
    assert row(engine)["pack_key"] == "p"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that will hold a run as if it were a worker."""
    started = subprocess.Popen(["sleep", "600"])
    yield started
    started.kill()
    started.wait()


def lend(engine: Engine, process: subprocess.Popen[bytes], **changes: object) -> None:
    """Let the worker w be that process."""
    values = {"host": host.name(), "pid": process.pid, "start": host.process_start(process.pid)} | changes
    change(engine, "UPDATE workers SET host = :host, pid = :pid, pid_start = :start WHERE id = 'w'", **values)


needs_proc = pytest.mark.skipif(
    host.process_start(os.getpid()) is None, reason="this system does not tell when a process began (no /proc)"
)


@needs_proc
@pytest.mark.parametrize("buried", [False, True], ids=["a zombie", "buried"])
def test_the_runs_of_a_process_of_this_host_that_is_gone_are_free_at_once(
    study: Engine, process: subprocess.Popen[bytes], buried: bool
) -> None:
    lend(study, process)
    claims = queue.claim(study, "w", PROVENANCE, limit=2)
    assert queue.reap(study, by_clock=False) == []  # it lives

    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if buried:
        process.wait()

    assert queue.reap(study, by_clock=False) == [queue.Reaped(c.run, 1, "w", "pending") for c in claims]
    assert queue.reap(study, by_clock=False) == []
    assert attempts(study)[0]["message"] == "worker w was lost: its process is gone"
    [worker] = status.workers(study)
    assert (worker["state"], worker["message"], worker["run"]) == ("lost", "its process is gone", None)


@needs_proc
def test_a_pid_that_belongs_to_another_process_now_counts_as_gone(
    study: Engine, process: subprocess.Popen[bytes]
) -> None:
    lend(study, process, start="1")
    claim_one(study)

    assert [r.run for r in queue.reap(study, by_clock=False)] == [1]


@pytest.mark.parametrize("other", [{"host": "elsewhere/0/1"}, {"start": None}], ids=["another host", "start unknown"])
def test_a_process_that_cannot_be_judged_from_here_is_never_gone(
    study: Engine, process: subprocess.Popen[bytes], other: dict[str, object]
) -> None:
    lend(study, process, **other)
    claim = claim_one(study)
    process.kill()
    process.wait()

    assert queue.reap(study, by_clock=False) == []
    assert [r.run for r in queue.reap(study, now=claim.until + 1)] == [1]


@needs_proc
def test_a_gone_worker_and_an_expired_lease_are_reaped_together_and_no_run_twice(
    study: Engine, process: subprocess.Popen[bytes]
) -> None:
    lend(study, process)
    claim_one(study, now=NOW)  # gone and expired
    claim_one(study, "far", now=NOW)  # expired
    claim_one(study, "near")  # neither
    process.kill()
    process.wait()

    assert [(r.run, r.worker) for r in queue.reap(study)] == [(1, "w"), (2, "far")]
    assert row(study, 3)["state"] == "running"


@needs_proc
def test_a_gone_worker_does_not_make_the_clock_count_for_others(
    study: Engine, process: subprocess.Popen[bytes]
) -> None:
    lend(study, process)
    claim_one(study)
    claim_one(study, "far", now=NOW)  # expired, but we have only just connected
    process.kill()
    process.wait()

    assert [r.worker for r in queue.reap(study, by_clock=False)] == ["w"]
    assert row(study, 2)["state"] == "running"


WORKER = """
import sys
from rnnq import db, queue
from tests.conftest import claim_one
engine = db.open(sys.argv[1])
print(claim_one(engine, "child").run, flush=True)
sys.stdin.read()
"""


@needs_proc
def test_a_real_worker_that_is_killed_frees_its_run(study: Engine) -> None:
    process = script(WORKER, address_of(study))
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    assert queue.reap(study, by_clock=False) == []

    process.kill()
    process.communicate()

    assert queue.reap(study, by_clock=False) == [queue.Reaped(1, 1, "child", "pending")]


def test_nothing_to_reap_takes_no_write_lock(study: Engine) -> None:
    claim_one(study)
    with db.transaction(study) as connection:
        connection.execute(text("UPDATE runs SET priority = 1"))

        assert queue.reap(study) == []


# ------------------------------------------------------------------------------------------------------- restore


def test_restore_makes_the_points_equal_to_the_curve_of_the_checkpoint(study: Engine) -> None:
    first = claim_one(study, now=NOW)
    curve = [("loss", 2, 3.0), ("loss", 4, 2.5), ("val", 4, 2.0)]
    queue.record(study, first, 4, curve, saved(1, 4))
    queue.record(study, first, 9, [("loss", 6, 2.2), ("loss", 8, 2.1), ("other", 9, 1.0)])
    queue.record(study, claim_one(study, "v"), 1, [("loss", 1, 7.0)])
    queue.reap(study, now=NOW + 61)
    again = claim_one(study)

    queue.restore(study, again, start(4, curve=curve, numerics={"threads": 1}, exact=False))

    assert points(study) == curve
    assert points(study, 2) == [("loss", 1, 7.0)]
    assert row(study)["steps_done"] == 4
    assert json.loads(row(study)["checkpoint"]) == saved(1, 4)
    attempt = attempts(study)[-1]
    assert (attempt["step_from"], attempt["step_to"], attempt["exact"]) == (4, 4, 0)
    assert (attempt["numerics"], attempt["message"]) == ('{"threads":1}', None)


def test_restore_at_step_zero_clears_what_a_dead_attempt_wrote(study: Engine) -> None:
    queue.record(study, claim_one(study, now=NOW), 9, [("loss", 6, math.nan), ("loss", 8, 2.1)])
    queue.reap(study, now=NOW + 61)

    queue.restore(study, claim_one(study), start())

    assert points(study) == []
    assert row(study)["steps_done"] == 0


def test_a_damaged_checkpoint_is_no_longer_named_so_it_never_becomes_the_one_before(study: Engine) -> None:
    first = claim_one(study, now=NOW)
    queue.record(study, first, 4, checkpoint=saved(1, 4))
    queue.record(study, first, 8, checkpoint=saved(1, 8))
    queue.reap(study, now=NOW + 61)
    again = claim_one(study)

    queue.restore(study, again, start(4, exact=False, checkpoint=saved(1, 4), problems=["s8 is cut\x00short"]))
    assert (json.loads(row(study)["checkpoint"]), row(study)["checkpoint_prev"]) == (saved(1, 4), None)
    assert attempts(study)[-1]["message"] == "s8 is cut\\x00short"

    assert queue.record(study, again, 8, checkpoint=saved(2, 8)) == []
    assert json.loads(row(study)["checkpoint_prev"]) == saved(1, 4)


def test_when_both_checkpoints_are_damaged_the_row_names_none(study: Engine) -> None:
    first = claim_one(study, now=NOW)
    queue.record(study, first, 4, checkpoint=saved(1, 4))
    queue.record(study, first, 8, checkpoint=saved(1, 8))
    queue.reap(study, now=NOW + 61)

    queue.restore(study, claim_one(study), start(exact=False, problems=["s8 is bad", "s4 is bad"]))

    assert (row(study)["checkpoint"], row(study)["checkpoint_prev"]) == (None, None)
    assert attempts(study)[-1]["message"] == "s8 is bad\ns4 is bad"


# ------------------------------------------------------------------------------------------------ record, finish


def test_a_new_checkpoint_makes_the_last_one_the_one_before_and_frees_the_oldest(study: Engine) -> None:
    claim = claim_one(study)

    freed = [queue.record(study, claim, step, checkpoint=saved(1, step)) for step in (2, 4, 6, 8)]

    assert freed == [[], [], [path(1, 2)], [path(1, 4)]]
    assert (json.loads(row(study)["checkpoint"]), json.loads(row(study)["checkpoint_prev"])) == (
        saved(1, 8),
        saved(1, 6),
    )
    assert queue.record(study, claim, 9, [("loss", 9, 1.0)]) == []
    assert row(study)["steps_done"] == 9


def test_a_finished_run_keeps_its_last_and_its_best_file(study: Engine) -> None:
    claim = claim_one(study)
    for step in (2, 4):
        queue.record(study, claim, step, checkpoint=saved(1, step))

    freed = queue.finish(study, claim, 10, {"loss": 1.5}, "loss", checkpoint=saved(1, 10), best=saved(1, 2))

    assert freed == [path(1, 4)]  # s2 was the one before; it is the best one now
    run = row(study)
    assert [json.loads(run[n]) for n in ("checkpoint", "checkpoint_best")] == [saved(1, 10), saved(1, 2)]
    assert run["checkpoint_prev"] is None


def test_finish_writes_the_run_its_points_its_files_and_the_end_of_its_attempt(study: Engine) -> None:
    claim = claim_one(study, now=NOW)
    queue.restore(study, claim, start())
    change(study, "UPDATE runs SET wish = 'pause' WHERE id = 1")

    queue.finish(study, claim, 10, {"loss": 1.5, "acc": 0.5}, "loss", [("loss", 10, 1.5)], saved(1, 10), saved(1, 8))

    run = row(study)
    assert (run["state"], run["loss"], run["summary"]) == ("done", 1.5, '{"acc":0.5,"loss":1.5}')
    assert (run["steps_done"], run["worker"], run["lease_until"], run["wish"]) == (10, None, None, None)
    assert run["ended_at"] is not None
    assert points(study) == [("loss", 10, 1.5)]
    [attempt] = attempts(study)
    assert (attempt["ended"], attempt["step_from"], attempt["step_to"], attempt["cause"]) == ("done", 0, 10, None)
    assert attempt["ended_at"] is not None
    artifacts = [(a["kind"], a["step"], a["path"], a["bytes"]) for a in runs.show(study, 1)["artifacts"]]
    assert artifacts == [("checkpoint", 10, path(1, 10), 9), ("checkpoint_best", 8, path(1, 8), 9)]


def test_the_loss_of_a_run_is_the_primary_metric_of_its_family(study: Engine) -> None:
    queue.finish(study, claim_one(study), 10, {"loss": 1.5, "val": 2.5}, "val")
    queue.finish(study, claim_one(study), 10, {"loss": 1.5}, "val")

    assert (row(study, 1)["loss"], row(study, 2)["loss"]) == (2.5, None)


def test_a_failed_run_keeps_its_whole_trace_its_points_and_its_checkpoints(study: Engine) -> None:
    claim = claim_one(study)
    queue.record(study, claim, 4, checkpoint=saved(1, 4))
    trace = "\n".join(f"line {i}" for i in range(5000))

    queue.fail(study, claim, "diverged", "the loss is nan", trace, [("loss", 5, math.nan)])

    run = row(study)
    assert (run["state"], run["cause"], run["message"]) == ("failed", "diverged", "the loss is nan")
    assert (run["failures"], run["steps_done"], json.loads(run["checkpoint"])) == (1, 5, saved(1, 4))
    assert points(study) == [("loss", 5, None)]
    [attempt] = attempts(study)
    assert (attempt["ended"], attempt["cause"], attempt["step_to"]) == ("failed", "diverged", 5)
    assert (attempt["message"], attempt["traceback"]) == ("the loss is nan", trace)


def test_a_run_that_is_given_back_waits_with_its_checkpoint_and_its_attempt_says_why(study: Engine) -> None:
    claim = claim_one(study)
    queue.record(study, claim, 4, [("loss", 4, 1.0)], saved(1, 4))
    change(study, "UPDATE runs SET wish = 'pause' WHERE id = 1")

    queue.release(study, claim, "asked to stop")

    run = row(study)
    assert (run["state"], run["worker"], run["lease_until"], run["wish"]) == ("pending", None, None, None)
    assert (json.loads(run["checkpoint"]), len(points(study))) == (saved(1, 4), 1)
    [attempt] = attempts(study)
    assert (attempt["ended"], attempt["cause"], attempt["message"]) == ("released", "preempted", "asked to stop")
    assert attempt["step_to"] == 4


# ----------------------------------------------------------------------------------- a write that itself fails

BREAKS = {
    "the attempt": ("BEFORE UPDATE ON attempts", ("restore", "finish", "fail", "release")),
    "the points": ("BEFORE INSERT ON point", ("restore", "record", "record a checkpoint", "finish", "fail")),
    "the files": ("BEFORE INSERT ON artifacts", ("finish",)),
    "the run": ("AFTER UPDATE ON runs", tuple(VERBS)),
}


def break_on(engine: Engine, what: str) -> None:
    if db.file_of(engine):
        change(engine, f"CREATE TRIGGER broken {what} BEGIN SELECT RAISE(ABORT, 'a full disk, say'); END")
        return
    refuse = "RAISE EXCEPTION 'a full disk, say' USING ERRCODE = 'check_violation'"
    change(engine, f"CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {refuse}; END $$")
    change(engine, f"CREATE TRIGGER broken {what} FOR EACH ROW EXECUTE FUNCTION broken()")


@pytest.mark.parametrize(("what", "verb"), [(what, verb) for what, (_, verbs) in BREAKS.items() for verb in verbs])
def test_a_write_that_itself_fails_leaves_the_run_ours_and_nothing_half_written(
    study: Engine, what: str, verb: str
) -> None:
    claim = claim_one(study)
    queue.record(study, claim, 4, [("loss", 4, 3.0)], saved(1, 4))
    break_on(study, BREAKS[what][0])
    before = everything(study)

    with pytest.raises(exc.IntegrityError, match="a full disk, say"):
        VERBS[verb](study, claim)

    assert everything(study) == before
    change(study, "DROP TRIGGER broken" + ("" if db.file_of(study) else f" ON {BREAKS[what][0].split()[-1]}"))
    queue.finish(study, claim, 10, {"loss": 1.0}, "loss")
    assert row(study)["state"] == "done"


def test_a_point_that_is_there_already_makes_finish_fail_whole_and_the_run_can_still_fail(study: Engine) -> None:
    claim = claim_one(study)
    queue.record(study, claim, 4, [("loss", 4, 3.0)])
    before = everything(study)

    with pytest.raises(exc.IntegrityError):
        queue.finish(study, claim, 10, {"loss": 1.0}, "loss", [("x", 1, 1.0), ("loss", 4, 3.0)], saved(1, 10))
    with pytest.raises(exc.IntegrityError):
        queue.fail(study, claim, "bug", "x", "", [("loss", 4, 3.0)])
    with pytest.raises(exc.IntegrityError):
        queue.record(study, claim, 10, [("loss", 4, 3.0)], saved(1, 10))
    assert everything(study) == before

    queue.fail(study, claim, "bug", "IntegrityError")
    assert row(study)["state"] == "failed"


def test_a_summary_that_json_cannot_hold_leaves_the_run_ours(study: Engine) -> None:
    claim = claim_one(study)
    before = everything(study)

    with pytest.raises(TypeError):
        queue.finish(study, claim, 10, {"loss": 1.0, "model": object()}, "loss")

    assert everything(study) == before


# ------------------------------------------------------------------------------------------ what enters, cleaned


def test_numbers_that_are_not_finite_become_null_and_are_named_and_filters_still_work(engine: Engine) -> None:
    metrics = [{"name": n, "unit": "", "better": "min", "primary": n == "loss"} for n in ("loss", "acc")]
    queue.init(engine, [new_stage(2, metrics=metrics)])
    summary = {"loss": math.nan, "acc": 0.5, "deep": {"a": math.inf, "b": [1.0, -math.inf]}, "ok": [1, "x", None, True]}

    queue.finish(engine, claim_one(engine), 10, summary, "loss")
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0, "acc": 0.25}, "loss")

    assert json.loads(row(engine)["summary"]) == {
        "loss": None,
        "acc": 0.5,
        "deep": {"a": None, "b": [1.0, None]},
        "ok": [1, "x", None, True],
        "nonfinite": ["deep.a", "deep.b", "loss"],
    }
    assert row(engine)["loss"] is None
    assert "nonfinite" not in json.loads(row(engine, 2)["summary"])
    assert [found["id"] for found in runs.find(engine, filter="acc > 0.3")] == [1]
    assert [found["id"] for found in runs.find(engine, filter="acc < 0.3")] == [2]
    acc = db.words(engine).field("summary", ["acc"], "float", lambda value: f"'{value}'")
    with db.reading(engine) as connection:
        assert connection.execute(text(f"SELECT {acc} FROM runs ORDER BY id")).scalars().all() == [0.5, 0.25]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_point_that_is_not_finite_is_null(study: Engine, value: float) -> None:
    claim = claim_one(study)
    queue.restore(study, claim, start(1, curve=[("loss", 1, value)]))
    queue.record(study, claim, 2, [("loss", 2, value), ("loss", 3, 1.0)])
    queue.finish(study, claim, 4, {}, "loss", [("loss", 4, value)])

    assert [found[2] for found in points(study)] == [None, None, 1.0, None]


DIRTY = "a\x00b\x1b[31mc\x7fd\x9be\tf\ng\udcffh é σ 😀"
CLEAN = "a\\x00b\\x1b[31mc\\x7fd\\x9be\tf\ng\\udcffh é σ 😀"


def test_nul_control_codes_and_broken_text_are_escaped_wherever_they_enter(study: Engine) -> None:
    queue.fail(study, claim_one(study), "bug", DIRTY, DIRTY)
    queue.release(study, claim_one(study), DIRTY)
    second = claim_one(study)
    queue.restore(study, second, start(problems=[DIRTY]))
    queue.finish(study, second, 10, {"note": DIRTY, DIRTY: 1.0}, "loss", [(DIRTY, 1, 1.0)])

    assert row(study)["message"] == CLEAN
    assert (attempts(study)[0]["message"], attempts(study)[0]["traceback"]) == (CLEAN, CLEAN)
    assert [attempt["message"] for attempt in attempts(study, 2)] == [CLEAN, CLEAN]
    assert json.loads(row(study, 2)["summary"]) == {"note": CLEAN, CLEAN: 1.0}
    assert points(study, 2) == [(CLEAN, 1, 1.0)]


def test_clean_text_leaves_what_is_clean() -> None:
    assert queue.clean_text("loss = 1.9 σ ≤ 2\n\tok") == "loss = 1.9 σ ≤ 2\n\tok"
    assert queue.clean_text("") == ""


def test_the_names_of_metrics_are_kept_once(study: Engine) -> None:
    for _ in range(2):
        queue.record(study, claim_one(study), 2, [("loss", 1, 1.0), ("val", 1, 1.0), ("loss", 2, 1.0)])

    assert count(study, "metrics") == 2
    assert count(study, "point") == 6
