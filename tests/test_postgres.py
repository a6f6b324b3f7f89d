"""What only PostgreSQL has: many writers at once, plans that change, a server that goes and comes, an address.

The tests of the queue, of filters, frames and promotes run there, too: see BOTH in conftest.py; of other modules, those
that are marked `both`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, exc, text

import rnnq
from rnnq import db, doctor, host, queue, runs, tables
from rnnq.databases import words
from rnnq.errors import Conflict, DatabaseError, InputError, LeaseLost
from rnnq.queue import Added
from tests import postgres
from tests.conftest import PROVENANCE, address_of, claim_one, new_runs, new_stage
from tests.processes import Study, pseudo_text

NOW = 1000.0


@pytest.fixture(scope="module")
def kind() -> str:
    return "postgres"


def change(engine: Engine, sql: str, **values: object) -> None:
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


def ask(engine: Engine, sql: str, **values: object) -> list[Any]:
    with db.reading(engine) as connection:
        return [tuple(row) if len(row) > 1 else row[0] for row in connection.execute(text(sql), values)]


def wait_until(what: Callable[[], bool]) -> None:
    """Look until it is so: the server tells nobody that somebody waits."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # between two looks


WAITING = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"""


def someone_waits(engine: Engine) -> None:
    wait_until(lambda: ask(engine, WAITING) == [1])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture
def study(engine: Engine) -> Engine:
    """Three pending runs of a stage, and two workers."""
    queue.init(engine, [new_stage(3)])
    queue.register(engine, "w", "cpu", {})
    queue.register(engine, "v", "cpu", {})
    return engine


@contextmanager
def uncommitted_claim(engine: Engine, limit: int = 1) -> Iterator[list[int]]:
    """Another worker's claim that has been made, and will be committed."""
    with db.transaction(engine) as connection:
        values = {"worker": "v", "now": NOW, "limit": limit, "stage": None, "without": "[]"}
        yield [row.id for row in queue._claimed(connection, values)]


# ----------------------------------------------------------------------------------------------------------- claim


PLANS = {
    "as it likes": (),
    "nested loops": ("enable_hashjoin", "enable_mergejoin", "enable_hashagg", "enable_material", "enable_sort"),
    "hashes": ("enable_nestloop", "enable_mergejoin", "enable_indexscan", "enable_bitmapscan"),
    "merges": ("enable_nestloop", "enable_hashjoin", "enable_hashagg"),
}
# the statement that one writes first; PostgreSQL may run its subselect anew for each row that it tests
PLAIN = """UPDATE runs SET state = 'running', worker = 'w', lease_until = 1 WHERE state = 'pending' AND id IN (
               SELECT id FROM runs WHERE state = 'pending' ORDER BY priority DESC, id LIMIT 3 FOR UPDATE SKIP LOCKED)"""


@pytest.mark.parametrize("plan", PLANS)
def test_a_claim_takes_as_many_runs_as_it_may_under_every_plan(engine: Engine, plan: str) -> None:
    queue.init(engine, [new_stage(1000)])
    queue.register(engine, "w", "cpu", {})

    @event.listens_for(engine, "begin")
    def choose(connection: sa.Connection) -> None:
        for setting in PLANS[plan]:
            connection.exec_driver_sql(f"SET LOCAL {setting} = off")

    claims = queue.claim(engine, "w", PROVENANCE, limit=3)

    assert [claim.run for claim in claims] == [1, 2, 3]
    assert ask(engine, "SELECT count(*) FROM runs WHERE state = 'running'") == [3]
    if plan == "nested loops":  # so that this test is known to look at a plan that is a trap
        with db.transaction(engine) as connection:
            assert connection.execute(text(PLAIN)).rowcount > 3


def rows_visited(engine: Engine) -> float:
    """How many rows of runs a claim looks at, over all nodes of its plan."""
    with engine.connect() as connection:
        values = {"worker": "w", "now": NOW, "limit": 1, "stage": None, "without": "[]", "rivals": 64}
        sql = "EXPLAIN (ANALYZE, FORMAT JSON) " + queue._claim_statement(connection)
        [found] = connection.execute(text(sql), values).scalar_one()
        connection.rollback()
    return sum(
        node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
        for node in nodes(found["Plan"])
        if node.get("Relation Name") == "runs"
    )


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def test_the_cost_of_a_claim_does_not_grow_with_the_table(engine: Engine) -> None:
    queue.init(engine, [new_stage(1), new_stage(1, "paused")])
    queue.register(engine, "w", "cpu", {})
    queue.pause(engine, "paused")
    columns = "stage, intake, family, label, config, group_key, created_at"
    more = f"""INSERT INTO runs ({columns}, fingerprint, state, ended_at)
               SELECT {columns}, :state || :turn || n, :state, CASE :state WHEN 'done' THEN 1 END
               FROM runs, generate_series(1, 5000) AS n WHERE fingerprint = 'f0'"""
    visited = []
    for turn in "ab":
        for state in ("pending", "done"):
            change(engine, more, state=state, turn=turn)
        change(engine, "ANALYZE")
        visited.append(rows_visited(engine))

    assert 0 < visited[1] <= visited[0] < 300, visited


def test_a_claim_passes_over_what_a_rival_is_just_taking_and_waits_for_nobody(study: Engine) -> None:
    queue.init(study, [new_stage(2, "first", runs=new_runs(2, 50))])
    queue.prioritise(study, [4], 9)
    queue.prioritise(study, [1], 5)

    with uncommitted_claim(study) as taken:
        mine = [claim_one(study).run for _ in range(4)]

    assert (taken, mine) == ([4], [1, 2, 3, 5])  # by priority, also across stages
    assert queue.claim(study, "w", PROVENANCE) == []


def test_more_rivals_than_a_claim_looks_at_hide_no_run_from_it(engine: Engine) -> None:
    queue.init(engine, [new_stage(200)])
    queue.register(engine, "v", "cpu", {})
    queue.register(engine, "w", "cpu", {})

    with uncommitted_claim(engine, 150) as taken:
        assert taken == list(range(1, 151))
        assert [claim.run for claim in queue.claim(engine, "w", PROVENANCE, limit=60)] == list(range(151, 201))


def test_a_claim_that_a_cancel_was_faster_than_takes_the_next_run(study: Engine, pool: ThreadPoolExecutor) -> None:
    with db.transaction(study) as connection:
        connection.execute(text("UPDATE runs SET state = 'cancelled', ended_at = 1 WHERE id = 1"))
        assert claim_one(study).run == 2

    assert ask(study, "SELECT state FROM runs ORDER BY id") == ["cancelled", "running", "pending"]


def test_a_pause_sees_the_claim_that_was_under_way(study: Engine, pool: ThreadPoolExecutor) -> None:
    with uncommitted_claim(study) as taken:
        paused = pool.submit(queue.pause, study, "s")
        someone_waits(study)

    assert paused.result(60) == taken == [1]
    assert ask(study, "SELECT wish FROM runs WHERE id = 1") == ["pause"]


def test_a_claim_that_waited_for_a_pause_takes_nothing(study: Engine, pool: ThreadPoolExecutor) -> None:
    with db.transaction(study) as connection:
        connection.execute(text("UPDATE stages SET paused = true"))
        claimed = pool.submit(queue.claim, study, "w", PROVENANCE)
        someone_waits(study)

    assert claimed.result(60) == []


def test_a_delete_sees_the_claim_that_was_under_way(study: Engine, pool: ThreadPoolExecutor) -> None:
    with uncommitted_claim(study):
        deleted = pool.submit(queue.delete, study, "s")
        someone_waits(study)

    with pytest.raises(InputError, match="stage s is running: run 1 by v"):
        deleted.result(60)


def test_a_rename_sees_the_claim_that_was_under_way(study: Engine, pool: ThreadPoolExecutor) -> None:
    with uncommitted_claim(study):
        renamed = pool.submit(queue.rename, study, "s", "t")
        someone_waits(study)

    with pytest.raises(InputError, match="stage s is running: run 1 by v"):
        renamed.result(60)


# ------------------------------------------------------------------------------------------------------- the fence


def points(engine: Engine) -> list[Any]:
    return ask(engine, "SELECT run_id, name, step, value FROM points ORDER BY run_id, name, step")


OWNERS: dict[str, Callable[[Engine, queue.Claim], object]] = {
    "record": lambda e, c: queue.record(e, c, 5, [("loss", 5, 1.0)]),
    "restore": lambda e, c: queue.restore(e, c, queue.Start(2, [("loss", 2, 1.0)], {}, True)),
    "finish": lambda e, c: queue.finish(e, c, 10, {"loss": 1.0}, "loss", [("loss", 10, 1.0)]),
    "fail": lambda e, c: queue.fail(e, c, "bug", "x", "", [("loss", 9, 1.0)]),
    "release": lambda e, c: queue.release(e, c),
}


@pytest.mark.parametrize("verb", OWNERS)
def test_an_owner_that_waited_while_its_run_was_taken_back_writes_nothing(
    study: Engine, pool: ThreadPoolExecutor, verb: str
) -> None:
    claim = claim_one(study)
    taken = "UPDATE runs SET state = 'pending', worker = NULL, lease_until = NULL WHERE id = 1"
    with db.transaction(study) as connection:
        connection.execute(text(taken))
        written = pool.submit(OWNERS[verb], study, claim)
        someone_waits(study)

    with pytest.raises(LeaseLost, match="run 1 attempt 1 is no longer ours"):
        written.result(60)
    assert points(study) == []
    assert ask(study, "SELECT ended FROM attempts") == [None]


def test_a_reaper_leaves_a_run_whose_owner_is_just_writing(study: Engine) -> None:
    claim_one(study, now=NOW)
    with db.transaction(study) as connection:
        connection.execute(text("UPDATE runs SET lease_until = 5000 WHERE id = 1"))  # as a beat does
        assert queue.reap(study, now=NOW + 61) == []

    assert queue.reap(study, now=NOW + 61) == []
    assert [reaped.run for reaped in queue.reap(study, now=6000)] == [1]


def test_two_reapers_take_a_run_back_once(study: Engine, pool: ThreadPoolExecutor) -> None:
    claim_one(study, now=NOW)

    found = [pool.submit(queue.reap, study, True, NOW + 61) for _ in range(8)]

    assert sum(len(one.result(60)) for one in found) == 1
    assert ask(study, "SELECT lost FROM runs WHERE id = 1") == [1]


def test_two_workers_that_enter_the_same_new_metric_agree_on_its_number(
    study: Engine, pool: ThreadPoolExecutor
) -> None:
    first, second = claim_one(study), claim_one(study)
    with db.transaction(study) as connection:
        queue._insert_points(connection, first.run, [("acc", 1, 0.5), ("zeal", 1, 0.5)])
        recorded = pool.submit(queue.record, study, second, 1, [("zeal", 1, 0.25), ("acc", 1, 0.25)])
        someone_waits(study)

    recorded.result(60)
    assert points(study) == [(1, "acc", 1, 0.5), (1, "zeal", 1, 0.5), (2, "acc", 1, 0.25), (2, "zeal", 1, 0.25)]
    assert ask(study, "SELECT name FROM metrics ORDER BY name") == ["acc", "zeal"]


# ------------------------------------------------------------------------------------------- writers that meet


MEET = """
import random, sys
from rnnq import db, queue
from tests.conftest import PROVENANCE
engine, name = db.open(sys.argv[1]), sys.argv[2]
chance = random.Random(name)
queue.register(engine, name, "cpu", {})
for turn in range(10):
    some = chance.sample(range(1, 61), 40)
    claims = queue.claim(engine, name, PROVENANCE, limit=10)
    queue.prioritise(engine, some, turn)
    queue.tag(engine, some, f"t{turn % 3}")
    queue.beat(engine, name, [(c.run, c.attempt) for c in reversed(claims)])
    queue.cancel(engine, some)
    queue.pause(engine, "s")
    queue.reap(engine, now=9e9)
    queue.resume(engine, "s")
    queue.retry(engine, some)
print("done")
"""


def test_writers_of_the_same_rows_never_wait_for_each_other_in_a_ring(engine: Engine) -> None:
    queue.init(engine, [new_stage(60)])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    words_ = [sys.executable, "-c", MEET, address_of(engine)]
    started = [subprocess.Popen([*words_, f"w{i}"], env=environment, stdout=-1, stderr=-1, text=True) for i in range(4)]
    told = [process.communicate(timeout=120) for process in started]

    assert [out for out, _ in told] == ["done\n"] * 4, told
    statistics = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert ask(engine, "SELECT pg_stat_force_next_flush() IS NULL") and ask(engine, statistics) == [0]
    assert db.check(engine) == []
    order = {finding.name: finding for finding in doctor.examine(engine)}
    assert order["order"].level == order["invariants"].level == "ok"


def test_a_transaction_that_the_database_undid_is_run_again(study: Engine, pool: ThreadPoolExecutor) -> None:
    """A stranger, with SQL of its own, locks run 2 and then run 1; we lock run 1 and then run 2."""

    @event.listens_for(study, "begin")
    def be_the_one_that_is_undone(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SET LOCAL deadlock_timeout = '2s'")

    stranger = sa.create_engine(address_of(study))
    with stranger.begin() as other:
        other.execute(text("SET LOCAL deadlock_timeout = '60s'"))
        other.execute(text("UPDATE runs SET note = 'theirs' WHERE id = 2"))
        changed = pool.submit(queue.prioritise, study, (run for run in [1, 2, 3]), 5)  # type: ignore[arg-type]
        someone_waits(study)
        other.execute(text("UPDATE runs SET note = 'theirs' WHERE id = 1"))
    stranger.dispose()

    assert changed.result(60) == [1, 2, 3]
    assert ask(study, "SELECT DISTINCT priority FROM runs") == [5]
    assert ask(study, "SELECT count(*) FROM changes") == [1]


def test_writers_that_meet_again_and_again_are_an_error_of_the_database(study: Engine) -> None:
    tries = []

    @db.retried
    def unlucky(numbers: Iterator[int]) -> None:
        tries.append(list(numbers))
        with db.transaction(study) as connection:
            connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'deadlock_detected'; END $$"))

    with pytest.raises(Conflict) as caught:
        unlucky(iter([1, 2]))
    assert isinstance(caught.value, DatabaseError)  # so that a worker insists
    assert len(tries) > 5
    assert tries[-1] == [1, 2]


def test_a_lock_that_stays_taken_is_an_error_after_as_long_as_one_is_patient(study: Engine) -> None:
    claim = claim_one(study)
    with db.transaction(study) as connection:
        connection.execute(text("UPDATE runs SET note = 'x' WHERE id = 1"))
        with pytest.raises(DatabaseError, match=r"a lock in .* was not free for 0.05 s"):
            queue.record(study, claim, 5, patience=0.05)

    queue.record(study, claim, 5)


# -------------------------------------------------------------------------------------------------------- init


def test_two_inits_of_a_stage_add_each_run_once(engine: Engine, pool: ThreadPoolExecutor) -> None:
    start = threading.Barrier(4)

    def add() -> Added:
        start.wait()
        return queue.init(engine, [new_stage(300)])[0]

    added = [future.result(60) for future in [pool.submit(add) for _ in range(4)]]

    assert sorted(one.added for one in added) == [0, 0, 0, 300]
    assert len(runs.find(engine)) == 300


def test_an_init_waits_for_one_that_began_a_moment_before(engine: Engine, pool: ThreadPoolExecutor) -> None:
    me = {"host": host.name(), "pid": os.getpid(), "start": host.process_start(os.getpid())}
    sql = f"""INSERT INTO intakes (stage, complete, host, pid, pid_start, beat_at)
              VALUES ('s', false, :host, :pid, :start, {db.NOW})"""
    queue.init(engine, [new_stage(1)])
    with db.transaction(engine) as connection:
        connection.execute(text(sql), me)
        second = pool.submit(queue.init, engine, [new_stage(3)])
        someone_waits(engine)

    change(engine, "UPDATE intakes SET complete = true")
    assert second.result(60) == [Added("s", 2, 1, ())]


def test_two_processes_that_make_a_database_make_one_study(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    url = postgres.fresh()
    made = [future.result(60) for future in [pool.submit(db.upgrade, url, str(tmp_path)) for _ in range(4)]]

    assert sorted(made, key=str) == [None, None, None, f"created {url}"]
    engine = db.open(url)
    assert ask(engine, "SELECT count(*) FROM study") == [1]
    assert db.study(engine)[2] == tmp_path
    engine.dispose()
    postgres.drop(url)


# ------------------------------------------------------------------------------------------------ the two doors


def test_a_reader_sees_one_state_of_things_and_cannot_write(study: Engine) -> None:
    with db.reading(study) as connection:
        before = connection.execute(text("SELECT state FROM runs WHERE id = 1")).scalar()
        claim_one(study)
        assert connection.execute(text("SELECT state FROM runs WHERE id = 1")).scalar() == before == "pending"

    with pytest.raises(DatabaseError, match="read-only"), db.reading(study) as connection:
        connection.execute(text("UPDATE runs SET priority = 1"))
    with pytest.raises(DatabaseError, match="read-only"), db.reading(study, scratch=False) as connection:
        connection.execute(text("CREATE TEMP TABLE x (y int)"))


def test_the_clock_goes_on_inside_of_a_transaction(engine: Engine) -> None:
    with db.reading(engine) as connection:
        assert db.clock(connection) < db.clock(connection)
        assert abs(db.clock(connection) - time.time()) < 5


def test_a_broken_constraint_is_raised_as_it_is(study: Engine) -> None:
    with pytest.raises(exc.IntegrityError):
        change(study, "UPDATE runs SET state = 'ready'")


def backend(connection: sa.Connection) -> int:
    return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def test_a_connection_that_broke_is_an_error_of_the_database_and_the_next_one_is_good(study: Engine) -> None:
    other = db.open(address_of(study))
    with pytest.raises(DatabaseError, match="terminating connection"), db.transaction(study) as connection:
        connection.execute(text("UPDATE runs SET priority = 7"))
        change(other, f"SELECT pg_terminate_backend({backend(connection)})")
        connection.execute(text("UPDATE runs SET priority = 8"))

    queue.prioritise(study, [1], 9)
    assert ask(study, "SELECT priority FROM runs ORDER BY id") == [9, 0, 0]
    other.dispose()


def test_points_whose_commit_was_not_answered_are_written_once_more_without_harm(study: Engine) -> None:
    """The connection breaks between the commit and its answer."""
    claim = claim_one(study)
    other = db.open(address_of(study))

    lost: list[int] = []

    def lose_the_answer(connection: sa.Connection) -> None:
        if lost:
            return
        lost.append(me := backend(connection))
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("BEGIN")
        change(other, f"SELECT pg_terminate_backend({me})")

    event.listen(study, "commit", lose_the_answer)
    with pytest.raises(DatabaseError):
        queue.record(study, claim, 5, [("loss", 5, 1.0)])
    assert points(study) == [(1, "loss", 5, 1.0)]

    queue.record(study, claim, 6, [("loss", 5, 1.0), ("loss", 6, 0.5)])
    assert points(study) == [(1, "loss", 5, 1.0), (1, "loss", 6, 0.5)]
    with pytest.raises(exc.IntegrityError):  # elsewhere nothing is in doubt
        queue.record(other, claim, 6, [("loss", 6, 0.5)])
    other.dispose()


# --------------------------------------------------------------------------------------------- making, upgrading


def test_the_migrated_schema_is_that_of_the_tables(engine: Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []
        checks = "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid::regclass::text = 'runs'"
        found = set(connection.execute(text(checks.replace("::", "\\:\\:"))).scalars())
    wanted = {str(c.name) for c in tables.runs.constraints if isinstance(c, sa.CheckConstraint)}
    assert found == wanted


def test_an_old_study_is_upgraded_with_its_rows(tmp_path: Path) -> None:
    url, older = postgres.fresh(), tmp_path / "migrations"
    (older / "versions").mkdir(parents=True)
    for name in ("env.py", "versions/0001_first_tables.py"):
        (older / name).write_text((db.migrations() / name).read_text())
    db.upgrade(url, str(tmp_path), scripts=older)
    with pytest.raises(InputError, match="has schema 0001; this rnnq needs"):
        db.open(url)
    old = sa.create_engine(url)
    with old.begin() as connection:
        connection.execute(
            text(f"""
            INSERT INTO stages (name, family, version, family_in_source, has_rule, command_line, fields, metrics,
                                seed_fields, data, created_at)
                VALUES ('s', 'f', 1, false, false, '', '{{}}', '[]', '[]', '{{}}', 1);
            INSERT INTO intakes (stage, complete, host, pid, beat_at) VALUES ('s', true, 'h', 1, 1);
            INSERT INTO runs (stage, intake, family, label, config, fingerprint, group_key, state, created_at)
                VALUES ('s', 1, 'f', 'old', '{{}}', 'x', 'g', 'pending', 1);
            INSERT INTO metrics (name) VALUES ('loss'); INSERT INTO point VALUES (1, 1, 5, 0.25);
            INSERT INTO workers (id, host, pid, device, command_line, state, started_at, beat_at)
                VALUES ('w', 'h', 1, 'cpu', '', 'live', 1, {time.time() + 1000})
            """)
        )
    with pytest.raises(InputError, match="workers are at work: w"):
        db.upgrade(url)
    with old.begin() as connection:
        connection.execute(text("UPDATE workers SET beat_at = 1"))
    old.dispose()

    assert str(db.upgrade(url)).startswith(f"upgraded {url} from schema 0001 to {db.SCHEMA}")

    engine = db.open(url)
    assert points(engine) == [(1, "loss", 5, 0.25)]
    assert runs.find(engine)[0]["note"] is None
    assert db.upgrade(url) is None
    engine.dispose()
    postgres.drop(url)


def test_a_database_of_others_is_shared_unless_a_name_is_taken(tmp_path: Path) -> None:
    url = postgres.fresh()
    stranger = sa.create_engine(url)
    with stranger.begin() as connection:
        connection.execute(text("CREATE TABLE theirs (x int); CREATE TABLE alembic_version (version_num text)"))
    with pytest.raises(InputError, match="tables of such names, and they are not rnnq's: alembic_version") as caught:
        db.upgrade(url, str(tmp_path))
    assert "search_path" in str(caught.value.hint)
    with pytest.raises(InputError, match="holds no study"):
        db.open(url)

    with stranger.begin() as connection:
        connection.execute(text("CREATE SCHEMA ours"))
    apart = f"{url}?options=-csearch_path%3Dours"
    assert str(db.upgrade(apart, str(tmp_path))).startswith("created ")
    engine = db.open(apart)
    queue.init(engine, [new_stage(2)])
    assert claim_one(engine).run == 1
    engine.dispose()
    assert not db.exists(url)
    stranger.dispose()
    postgres.drop(url)


def test_an_upgrade_that_fails_leaves_nothing(tmp_path: Path) -> None:
    url, broken = postgres.fresh(), tmp_path / "migrations"
    (broken / "versions").mkdir(parents=True)
    (broken / "env.py").write_text((db.migrations() / "env.py").read_text())
    first = (db.migrations() / "versions" / "0001_first_tables.py").read_text()
    (broken / "versions" / "0001_x.py").write_text(
        first.replace("def downgrade", "    raise OSError('full')\n\n\ndef downgrade")
    )

    with pytest.raises(OSError, match="full"):
        db.upgrade(url, scripts=broken)

    assert not db.exists(url)
    assert str(db.upgrade(url, str(tmp_path))).startswith("created")
    postgres.drop(url)


# ------------------------------------------------------------------------------------------- check, backup, doctor


def test_a_check_finds_rows_without_parents_and_switches_that_are_off(study: Engine) -> None:
    assert db.check(study) == []

    change(study, "ALTER TABLE point DISABLE TRIGGER ALL")
    change(study, "INSERT INTO metrics (name) VALUES ('loss')")
    change(study, "INSERT INTO point VALUES (99, 1, 1, 0.5)")

    found = db.check(study)
    assert "the foreign keys of point are switched off" in found
    assert "point: 1 rows name a row of runs that is not there" in found
    change(study, "DROP TABLE tags")
    assert db.check(study) == ["the table tags is missing"]


def test_a_backup_says_how_postgresql_makes_one(study: Engine, cli: Any) -> None:
    refused = cli("db", "backup", "safe.dump", code=2)

    assert "pg_dump --format=custom --file=safe.dump postgresql://test@127.0.0.1" in refused.stderr
    assert cli("db", "check").stdout.strip().endswith(f"schema {db.SCHEMA}, no damage found")
    assert "already" in cli("db", "upgrade").stdout


def test_the_doctor_looks_at_the_server_instead_of_a_file(study: Engine) -> None:
    claim = claim_one(study)
    queue.finish(study, claim, 10, {"loss": 1.0}, "loss", [("loss", 10, 1.0)])

    found = {finding.name: finding for finding in doctor.examine(study)}

    assert {name for name, finding in found.items() if finding.level == "problem"} == {"server"}
    assert "fsync and full_page_writes off" in found["server"].says  # as the tests start it
    assert not {"file system", "journal"} & set(found)
    assert found["attempts"].numbers["total"] == 1


# ------------------------------------------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "cannot be reached"),
        ("postgresql+psycopg://me:secret@127.0.0.1:port/x", "no database address"),
        ("postgresql+asyncpg://me:secret@127.0.0.1/x", "asks for another driver"),
        ("postgresql+psycopg://me:secret@127.0.0.1", "names no database"),
        ("postgresql+psycopg://127.0.0.1:1/x?user=me&password=secret", "cannot be reached"),
        ("mysql://me:secret@host/x", "no database that rnnq can use"),
    ],
)
def test_an_error_names_the_address_without_its_password(address: str, message: str, cli: Any) -> None:
    done = cli("status", "--db", address, code=None)

    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.split())
    assert "secret" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_password_is_never_stored(address: str, tmp_path: Path) -> None:
    with Study(tmp_path, address=address) as study:
        study.define(TOY)
        named = ("--db", address.replace("test@", "test:secret@"))
        told = study.rnnq("init", "defs/study.py", *named)
        told += study.rnnq("worker", "--device", "cpu", "--runs", "1", *named) + study.rnnq("note", "1", "x", *named)

        assert "secret" not in told
        lines = " UNION ".join(f"SELECT command_line FROM {t}" for t in ("stages", "attempts", "workers", "changes"))
        stored = ask(study.engine, lines)
        assert len(stored) == 3
        assert all("test:***@127.0.0.1" in line for line in stored)


def test_a_database_that_is_not_there_is_the_users_fault() -> None:
    with pytest.raises(InputError, match='database "nothing" does not exist') as caught:
        db.open(postgres.server().address("nothing"))
    assert "createdb" in str(caught.value.hint)
    with pytest.raises(InputError, match="does not exist"):
        db.open(postgres.server().address("postgres").replace("test@", "nobody-such@"))


def test_without_psycopg_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('no pq wrapper available')")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    done = subprocess.run(
        [sys.executable, "-m", "rnnq", "status", "--db", "postgresql+psycopg://me@host/x"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 2
    assert 'pip install "rnnq[postgres]"' in done.stderr
    assert "psycopg is not installed" in done.stderr


def test_a_file_needs_no_psycopg(tmp_path: Path) -> None:
    code = """
import sys
from rnnq import db, status
db.upgrade("x.db"); status.stages(db.open("x.db"))
print([name for name in sys.modules if name in ("psycopg", "rnnq.databases.postgres")])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ------------------------------------------------------------------------------------------------------- patterns

SIGNS = st.text(st.sampled_from("ab-]^[*?\\.+(){}|$B é"), max_size=8)


@pytest.fixture(scope="module")
def both() -> Iterator[Callable[[str, str], list[bool]]]:
    import sqlite3

    here = sqlite3.connect(":memory:")
    there = sa.create_engine(postgres.server().address("postgres")).connect()

    def ask_both(word: str, patterns: list[str]) -> tuple[list[bool], list[bool]]:
        globs = [bool(here.execute("SELECT ? GLOB ?", (word, one)).fetchone()[0]) for one in patterns]
        marks = ", ".join(f"CAST(:word AS text) ~ :r{i}" for i in range(len(patterns)))
        values = {f"r{i}": words.as_regex(one) for i, one in enumerate(patterns)}
        return globs, list(there.execute(text(f"SELECT {marks}"), {"word": word, **values}).one())

    yield ask_both
    there.close()
    here.close()


@settings(max_examples=300, deadline=None)
@given(SIGNS, SIGNS)
def test_a_pattern_matches_on_both_databases_or_on_none(both: Any, word: str, pattern: str) -> None:
    near = [word, f"*{word}*", "?" * len(word), f"[{word}]", f"[^{word}]*", f"[a-{word}]?"]
    here, there = both(word, [pattern, *near])
    assert here == there, (word, pattern)


# ------------------------------------------------------------------------------------------- the whole program

TOY = """
import rnnq

class Config(rnnq.Config):
    x: int = 1
    steps: int = 5
    seed_fields = ("seed",)

    def steps_total(self):
        return self.steps

@rnnq.family(Config)
def toy(config):
    for step in range(config.steps):
        yield {"loss": config.x / (step + 1)}

def grow(config):
    yield config | {"steps": 8}

stage = rnnq.stage("toys", toy, rnnq.grid(x=[1, 2, 3, 4]), refine=grow)
"""


def test_a_study_from_init_to_the_next_stage(tmp_path: Path) -> None:
    url = postgres.fresh()
    with Study(tmp_path, address=url) as study:
        assert "created postgresql+psycopg://" in study.rnnq("init", study.define(TOY))
        assert "added 0 runs" in study.rnnq("init", "defs/study.py")
        study.rnnq("worker", "--device", "cpu")
        assert '"done": 4' in study.rnnq("status", "--format", "json")
        best = study.rnnq("ls", "--filter", "loss < 0.3 and label ~ '*' and x in (1, 2)", "--format", "csv")
        assert best.splitlines()[1:] and all(",0.2," in line for line in best.splitlines()[1:])
        study.rnnq("examine")
        assert (tmp_path / "figures" / "toys").is_dir()
        assert "added 2 runs" in study.rnnq("promote", "--top", "50%")
        study.rnnq("worker", "--device", "cpu")
        for words_ in (
            ("show", "5"), ("logs", "5"), ("stages",), ("diff", "1", "2"), ("workers", "--all"), ("export", "runs"),
            ("export", "curves"), ("note", "1", "good"), ("tag", "best", "1"), ("db", "check"),
            ("ls", "--filter", "tag = best and loss@5 < 1"), ("rename", "toys-2", "second"),
            ("delete", "second", "--yes"), ("status", "--watch", "--until-done"), ("examine", "--groups"),
        ):  # fmt: skip
            assert "Traceback" not in study.rnnq(*words_)
        assert db.study(study.engine)[2] == tmp_path
        assert set(study.states().values()) == {"done"}
    postgres.drop(url)


# ------------------------------------------------------------------------------- real runs: steered, read, moved

REAL = """
import rnnq

def grow(config):
    yield config | {"steps": 20}

base = dict(corpus="text", state_size=8, window=32, batch_size=4, log_every=10, eval_every=50)
small = rnnq.stage("small", "dynamics", rnnq.grid(steps=[50, 100], seed=[0, 1]), base=base, refine=grow)
endless = rnnq.stage("endless", "dynamics", rnnq.grid(seed=[0, 1]), base=base | {"steps": 10_000_000})
"""


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Study]:
    """Runs 1 to 4 of stage small, 5 and 6 of stage endless."""
    url = postgres.fresh()
    with Study(tmp_path, lease=2.0, address=url) as study:
        (tmp_path / "text").write_bytes(pseudo_text(50_000))
        study.rnnq("init", study.define(REAL))
        yield study
    postgres.drop(url)


def test_real_runs_are_trained_in_packs_and_what_comes_of_them_is_read_and_moved(real: Study) -> None:
    real.rnnq("worker", "--stage", "small", "--pack", "2")
    assert real.rows("SELECT max(members) AS n FROM packs") == [{"n": 2}]
    assert " 50  100" in real.rnnq("extend", "1", "2", "--steps", "100")
    real.rnnq("worker", "--stage", "small", "--pack", "1")
    for longer, straight in ((1, 3), (2, 4)):
        assert real.run(longer)["curves"]["loss"] == real.run(straight)["curves"]["loss"]
        assert real.ended(longer) == [("done", None)] * 2
    assert real.rnnq("sample", "1", "--length", "9")
    assert "equal to the bit" in real.rnnq("verify-resume", "1", "--times", "1")

    for what in ("runs", "groups", "curves"):
        for kind in ("csv", "parquet"):
            real.rnnq("export", what, "--stage", "small", "--out", f"{what}.{kind}")
    for stage, file in (("a", "runs.csv"), ("b", "runs.parquet")):
        said = real.rnnq("import", file, "--stage", stage, "--family", "dynamics", "--loss", "loss")
        assert "added 4 runs" in said
    shown = rnnq.load(real.address)
    assert len(shown.runs("small")) == 4 and len(shown.groups("small")) == 2
    assert shown.runs("a")["loss"].tolist() == shown.runs("b")["loss"].tolist()
    assert shown.curves("small", names=["loss"])["run"].nunique() == 4
    shown.close()

    real.rnnq("promote", "--stage", "small", "--top", "1")
    real.rnnq("worker", "--stage", "small-2")
    assert "deleted 2 files" in real.rnnq("gc", "--stage", "small", "--keep", "last, none for losers", "--yes")
    found = {finding.name: finding.level for finding in doctor.examine(real.engine, deep=True)}
    assert {name for name, level in found.items() if level == "problem"} == {"server"}  # without fsync, for tests


def test_real_runs_are_steered_while_they_are_trained(real: Study) -> None:
    worker = real.worker(stage="endless", every=20)
    worker.expect("saved", run=5)
    reader = real.start("rnnq", "status", "--watch", "--until-done", "--every", "0.2", "--stage", "endless")
    follower = real.start("rnnq", "logs", "5", "--follow")
    real.rnnq("cancel", "5", "--now")
    worker.expect("lost")
    worker.expect("saved", run=6)
    follower.end()
    assert "run 5 is cancelled" in follower.output
    real.rnnq("cancel", "6")
    worker.expect("cancelled")
    worker.end()
    reader.end()

    assert real.ended(5) == [("cancelled", None)] and real.named(6)
    refused = real.rows("SELECT detail FROM changes WHERE verb = 'refused'")
    told = {finding.name for finding in doctor.examine(real.engine) if finding.level == "note"}
    # whether a write or the beat finds out first is chance; a write that was refused is on record
    assert ("refused" in told) == bool(refused)
    assert "added 1 run" in real.rnnq("retry", "5", "--set", "state_size=4")
    assert [parent["kind"] for parent in real.run(7)["parents"]] == ["retry"]
    real.rnnq("retry", "6")
    real.rnnq("priority", "9", "6")
    worker = real.worker(stage="endless", every=20)
    assert worker.expect("restored", run=6)["step"] > 0
    real.rnnq("worker", "--stop", worker.told("started")[0]["worker"])
    worker.end()
    assert real.states() == {1: "pending", 2: "pending", 3: "pending", 4: "pending"} | dict(
        zip((5, 6, 7), ("cancelled", "pending", "pending"), strict=True)
    )
    for words_ in (
        ("pause", "endless"),
        ("rename", "endless", "long"),
        ("resume", "long"),
        ("delete", "long", "--yes"),
    ):
        real.rnnq(*words_)
    assert sorted(real.states()) == [1, 2, 3, 4]
    assert not any("/endless/" in file for file in real.files())
    assert db.check(real.engine) == []


# ------------------------------------------------------------------------------------------- workers at one server

COUNTED = """
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def counted(config):
    for step in range(1, 21):
        yield {"loss": config.seed + 1 / step}

stage = rnnq.stage("counted", counted, rnnq.grid(seed=range(RUNS)))
"""


def trained_once(study: Study, runs: int) -> None:
    """Every run is done, by one attempt that ended so, and has its curve once."""
    assert set(study.states().values()) == {"done"}
    done = study.rows("SELECT run_id FROM attempts WHERE ended = 'done' ORDER BY run_id")
    assert [row["run_id"] for row in done] == list(range(1, runs + 1))
    curves = study.rows("SELECT run_id, count(*) AS n, max(step) AS last FROM points GROUP BY run_id ORDER BY run_id")
    assert [(row["run_id"], row["n"], row["last"]) for row in curves] == [(i + 1, 20, 20) for i in range(runs)]
    found = {finding.name: finding for finding in doctor.examine(study.engine)}
    assert {name for name, finding in found.items() if finding.level == "problem"} == {"server"}


def test_workers_train_every_run_once_although_one_is_killed(tmp_path: Path) -> None:
    url = postgres.fresh()
    with Study(tmp_path, lease=2.0, address=url) as study:
        study.rnnq("init", study.define(COUNTED.replace("RUNS", "48")))
        doomed = study.worker({"at": "restored", "do": "kill"})
        workers = [study.start("rnnq", "worker", "--device", "cpu") for _ in range(3)]
        doomed.end(-signal.SIGKILL)
        for worker in workers:
            worker.end(0)
            assert "Traceback" not in worker.output

        trained_once(study, 48)
        assert study.rows("SELECT count(*) AS n FROM attempts WHERE ended = 'lost'") == [{"n": 1}]
        assert study.rows("SELECT count(DISTINCT worker) AS n FROM attempts") == [{"n": 4}]
    postgres.drop(url)


def test_workers_ride_out_a_server_that_crashes_and_comes_again(tmp_path: Path) -> None:
    server = postgres.Server()
    url = server.create("study")
    with Study(tmp_path, lease=10.0, address=url) as study:
        study.rnnq("init", study.define(COUNTED.replace("RUNS", "40")))
        workers = [study.worker({"at": "restored", "do": "wait"}) for _ in range(3)]
        for worker in workers:
            worker.expect("trapped")
        study.forget()
        server.stop(signal.SIGQUIT)
        for worker in workers:
            worker.go_on()
        for worker in workers:
            worker.expect("away")
        server.start()
        for worker in workers:
            worker.end(0)

        trained_once(study, 40)
        assert study.rows("SELECT DISTINCT ended FROM attempts") == [{"ended": "done"}]
    server.close()
