"""Opening, the two doors, the constraints and the functions of the database: on real files."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, exc, text

from rnnq import db, queue, tables
from rnnq.errors import DatabaseError, InputError
from tests.conftest import claim_one, new_stage


def path_of(engine: Engine) -> Path:
    return Path(str(engine.url.database))


@contextlib.contextmanager
def stranger(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that knows nothing of rnnq and does not wait."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    yield connection
    connection.close()


def scalar(engine: Engine, sql: str) -> object:
    with db.reading(engine) as connection:
        return connection.execute(text(sql)).scalar()


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --------------------------------------------------------------------------------------------------- opening


def test_a_database_is_made_once_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "experiments.db"

    assert db.upgrade(str(path)) == f"created {path}"
    assert db.upgrade(str(path)) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["experiments.db"]

    engine = db.open(str(path))
    assert db.revision(engine) == db.SCHEMA
    assert db.check(engine) == []
    engine.dispose()


def test_a_path_and_an_address_name_the_same_database(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    db.upgrade(f"sqlite:///{path}")
    by_path, by_address = db.open(str(path)), db.open(f"sqlite:///{path}")

    assert db.study(by_path) == db.study(by_address)

    by_path.dispose()
    by_address.dispose()


@pytest.mark.parametrize("folder", ["100% sure?", "a#b", "with space", "ü", "?mode=ro", "a%20b"])
def test_a_folder_may_have_any_name(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "x.db"
    path.parent.mkdir()

    db.upgrade(str(path))
    engine = db.open(str(path))

    assert path.exists()
    assert [p.name for p in tmp_path.iterdir()] == [folder]
    assert db.study(engine)[2] == path.parent
    engine.dispose()


def test_a_relative_path_stays_right_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    db.upgrade("x.db")
    engine = db.open("x.db")

    monkeypatch.chdir("/")

    assert db.study(engine)[2] == tmp_path
    engine.dispose()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mysql://host/x", "no database that rnnq can use"),
        ("postgresql+psycopg2://host/x", "another driver than psycopg"),
        ("postgresql+psycopg://host", "names no database"),
        ("sqlite://", "no database that rnnq can use"),
        ("sqlite:///:memory:", "no database that rnnq can use"),
        ("://", "no database address"),
        ("postgresql://host:port/x", "no database address"),
    ],
)
def test_an_address_that_names_no_database_that_we_know_is_refused(address: str, message: str) -> None:
    for door in (db.open, db.upgrade):
        with pytest.raises(InputError, match=message):
            door(address)


def test_a_missing_database_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no database") as refused:
        db.open(str(tmp_path / "x.db"))

    assert "rnnq init" in str(refused.value.hint)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    for door in (db.open, db.upgrade):
        with pytest.raises(InputError, match="is a folder"):
            door(str(tmp_path))


def test_a_database_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no database"):
        db.open(str(tmp_path / "nowhere" / "x.db"))
    with pytest.raises(InputError, match=r"folder .*nowhere .* does not exist"):
        db.upgrade(str(tmp_path / "nowhere" / "x.db"))


@pytest.mark.parametrize("content", [b"PNG\x00\x01", b"import rnnq\n" * 50, b"SQLite format 2\x00" + bytes(100)])
def test_a_file_that_is_not_a_database_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content)

    for door in (db.open, db.upgrade):
        with pytest.raises(InputError, match="is not a database"):
            door(str(path))

    assert path.read_bytes() == content


@pytest.mark.parametrize("rest", [b"", b"garbage" * 1000])
def test_a_file_that_only_begins_like_a_database_is_refused_and_kept(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"SQLite format 3\x00" + rest)

    for door in (db.open, db.upgrade):
        with pytest.raises(InputError, match="is not a usable database"):
            door(str(path))

    assert path.read_bytes() == b"SQLite format 3\x00" + rest


def test_an_empty_file_becomes_a_database_only_by_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.touch()

    with pytest.raises(InputError, match="not one of rnnq"):
        db.open(str(path))

    assert db.upgrade(str(path)) == f"created {path}"


@pytest.mark.parametrize(
    "schema",
    [
        "CREATE TABLE photos (id)",
        "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('0000')",
        "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('f00d')",
        "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('0001')",
        "CREATE TABLE alembic_version (version_num TEXT)",
    ],
    ids=["tables", "older", "newer", "equal", "unversioned"],
)
def test_the_database_of_another_program_is_refused_and_kept(tmp_path: Path, schema: str) -> None:
    path = tmp_path / "x.db"
    with stranger(path) as connection:
        connection.executescript(schema)
    before = path.read_bytes()

    for door in (db.open, db.upgrade):
        with pytest.raises(InputError, match="not one of rnnq"):
            door(str(path))

    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.db"]


def test_a_newer_database_is_refused(engine: Engine) -> None:
    with stranger(path_of(engine)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0099'")

    for door in (db.open, db.upgrade):
        with pytest.raises(InputError, match="has schema 0099; this rnnq knows up to") as refused:
            door(str(path_of(engine)))
        assert refused.value.hint == "install a newer rnnq"


def test_an_older_database_asks_for_an_upgrade(engine: Engine) -> None:
    with stranger(path_of(engine)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")

    with pytest.raises(InputError, match="has schema 0000; this rnnq needs") as refused:
        db.open(str(path_of(engine)))
    assert "rnnq db upgrade" in str(refused.value.hint)


READ_ONLY = """
import os, sys
from sqlalchemy import text
from rnnq import db, host, queue
from rnnq.errors import InputError
host.name()
if os.geteuid() == 0:
    os.setuid(65534)  # nobody: the permissions of files do not bind root
def story():
    engine = db.open(sys.argv[1])
    print("opened", db.study(engine)[1])
    queue.register(engine, "w", "cpu", {})
try:
    story()
except InputError as error:
    print("refused:", error.message)
"""


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can enter; tmp_path is for its owner alone."""
    folder = Path(tempfile.mkdtemp(prefix="rnnq-test-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("folder_mode", [0o777, 0o555], ids=["in a folder of ours", "in a folder of others"])
def test_a_read_only_database_is_refused_and_kept(shared_folder: Path, folder_mode: int) -> None:
    path = shared_folder / "x.db"
    db.upgrade(str(path))
    path.chmod(0o444)
    shared_folder.chmod(folder_mode)
    before = path.read_bytes()

    said, trouble = python(READ_ONLY, str(path)).communicate(timeout=60)

    assert trouble == ""
    last = said.splitlines()[-1]
    assert last.startswith("refused:")
    assert str(path) in last
    assert "read-only" in last or "cannot be opened" in last
    assert path.read_bytes() == before


def test_a_database_that_may_not_be_read_is_refused(shared_folder: Path) -> None:
    path = shared_folder / "x.db"
    db.upgrade(str(path))
    path.chmod(0o000)

    said, trouble = python(READ_ONLY, str(path)).communicate(timeout=60)

    assert (said.strip(), trouble) == (f"refused: {path} cannot be read: Permission denied", "")


# ----------------------------------------------------------------------------------------------------- study


def test_two_databases_in_one_folder_are_two_studies(tmp_path: Path) -> None:
    ids = set()
    for name in ("a.db", "b.db"):
        db.upgrade(str(tmp_path / name))
        engine = db.open(str(tmp_path / name))
        ids.add(db.study(engine)[0])
        engine.dispose()

    assert len(ids) == 2


def test_the_root_is_the_folder_of_the_file_unless_one_is_given(tmp_path: Path) -> None:
    db.upgrade(str(tmp_path / "x.db"), root="/data/studies")
    engine = db.open(str(tmp_path / "x.db"))

    assert db.study(engine)[2] == Path("/data/studies")
    engine.dispose()


def test_a_lease_is_a_minute_unless_the_environment_gives_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RNNQ_LEASE_S", raising=False)
    db.upgrade(str(tmp_path / "a.db"))
    monkeypatch.setenv("RNNQ_LEASE_S", "1.5")
    db.upgrade(str(tmp_path / "b.db"))
    monkeypatch.setenv("RNNQ_LEASE_S", "7")

    a, b = db.open(str(tmp_path / "a.db")), db.open(str(tmp_path / "b.db"))
    assert (db.study(a)[1], db.study(b)[1]) == (60.0, 1.5)  # stored when the database was made; read from there
    a.dispose()
    b.dispose()


@pytest.mark.parametrize("lease", ["", "abc", "0", "-1", "0.1", "nan", "inf", "1e9", "60s"])
def test_a_lease_that_is_none_is_refused_before_a_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease: str
) -> None:
    monkeypatch.setenv("RNNQ_LEASE_S", lease)

    with pytest.raises(InputError, match=r"RNNQ_LEASE_S=.* is no number of seconds from 0.2 to 86400"):
        db.upgrade(str(tmp_path / "x.db"))

    assert not list(tmp_path.iterdir())


CREATE = """
import sys
from rnnq import db
for i in range(int(sys.argv[2])):
    said = db.upgrade(f"{sys.argv[1]}/{i}.db")
    engine = db.open(f"{sys.argv[1]}/{i}.db")
    print(said is not None, db.study(engine)[0])
    engine.dispose()
"""


def test_processes_that_make_a_database_at_once_make_one(tmp_path: Path) -> None:
    rounds = 12
    processes = [python(CREATE, str(tmp_path), str(rounds)) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]

    assert [trouble for _, trouble in answers] == [""] * 3
    for lines in zip(*(said.splitlines() for said, _ in answers), strict=True):
        made, studies = zip(*(line.split() for line in lines), strict=True)
        assert sorted(made) == ["False", "False", "True"]
        assert len(set(studies)) == 1
    assert len(list(tmp_path.glob("*.db"))) == rounds


# ------------------------------------------------------------------------------------------------- two doors


def test_every_connection_is_durable_and_checks_foreign_keys(engine: Engine) -> None:
    with contextlib.ExitStack() as stack:
        for connection in [stack.enter_context(db.reading(engine)) for _ in range(5)]:
            found = [
                connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
            assert found == ["wal", 2, 1]  # 2 is FULL


def test_a_reader_takes_no_lock_and_sees_one_moment(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    with db.reading(engine) as reader:
        assert reader.execute(text("SELECT count(*) FROM runs")).scalar() == 2

        queue.init(engine, [new_stage(3)])  # writes while the reader is in the middle

        assert reader.execute(text("SELECT count(*) FROM runs")).scalar() == 2
    assert scalar(engine, "SELECT count(*) FROM runs") == 3


def test_a_reader_does_not_wait_for_a_writer(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    with db.transaction(engine) as writer:
        writer.execute(text("UPDATE runs SET priority = 5"))

        assert scalar(engine, "SELECT max(priority) FROM runs") == 0

    assert scalar(engine, "SELECT max(priority) FROM runs") == 5


def test_a_write_transaction_holds_the_lock_before_its_first_statement(engine: Engine) -> None:
    with stranger(path_of(engine)) as other:
        with db.transaction(engine), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")

        with db.reading(engine) as reader:
            reader.execute(text("SELECT * FROM study"))
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")


def test_a_lock_that_stays_taken_is_an_error_that_names_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "BUSY", 0.05)
    with stranger(path_of(engine)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match=r"the write lock of .* was not free for 0.05 s"):
            queue.register(engine, "w", "cpu", {})
        other.execute("ROLLBACK")

    queue.register(engine, "w", "cpu", {})  # the connection is still good


def test_a_transaction_that_raises_leaves_nothing(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    with pytest.raises(ZeroDivisionError), db.transaction(engine) as connection:
        connection.execute(text("UPDATE runs SET priority = 5"))
        raise ZeroDivisionError

    assert scalar(engine, "SELECT priority FROM runs") == 0


def test_a_broken_constraint_is_raised_as_it_is_and_is_not_its_own_cause(engine: Engine) -> None:
    """An exception that is its own cause sends printers of tracebacks round in a ring."""
    with pytest.raises(exc.IntegrityError) as broken, db.transaction(engine) as connection:
        connection.execute(text("INSERT INTO lineage (child, parent, kind) VALUES (1, 2, 'promote')"))

    assert broken.value.__cause__ is not broken.value


def test_a_disk_that_fails_is_a_database_error(engine: Engine) -> None:
    with pytest.raises(DatabaseError, match="no such table: nowhere"), db.reading(engine) as connection:
        connection.execute(text("SELECT * FROM nowhere"))


def test_the_clock_is_the_databases_to_the_millisecond_unless_a_test_gives_one(engine: Engine) -> None:
    with db.reading(engine) as connection:
        moment = connection.exec_driver_sql("SELECT strftime('%s', 'now') + 0").scalar_one()
        clock = db.clock(connection)
        assert db.clock(connection, 12.5) == 12.5

    assert moment <= clock + 0.001 < moment + 60
    assert {float(str(scalar(engine, f"SELECT {db.NOW}"))) % 1 for _ in range(20)} != {0.0}


# ------------------------------------------------------------------------------------------------ constraints


def start(engine: Engine) -> None:
    """Now there is a running run 1 with a point, and a pending run 2."""
    queue.init(engine, [new_stage(2)])
    queue.record(engine, claim_one(engine), 1, [("loss", 1, 2.0)])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Such a study, for many statements that are all refused."""
    path = tmp_path_factory.mktemp("running") / "x.db"
    db.upgrade(str(path))
    opened = db.open(str(path))
    start(opened)
    yield opened
    opened.dispose()


@pytest.mark.parametrize(
    ("constraint", "sql"),
    [
        ("ck_runs_state", "UPDATE runs SET state = 'ready' WHERE id = 2"),
        ("ck_runs_wish", "UPDATE runs SET wish = 'stop' WHERE id = 1"),
        ("ck_runs_leased", "UPDATE runs SET lease_until = NULL WHERE id = 1"),
        ("ck_runs_leased", "UPDATE runs SET lease_until = 5 WHERE id = 2"),
        ("ck_runs_owned", "UPDATE runs SET worker = NULL WHERE id = 1"),
        ("ck_runs_owned", "UPDATE runs SET worker = 'w' WHERE id = 2"),
        ("ck_runs_ended", "UPDATE runs SET state = 'failed' WHERE id = 2"),
        ("ck_runs_ended", "UPDATE runs SET ended_at = 5 WHERE id = 2"),
        ("ck_runs_counters", "UPDATE runs SET attempt = -1 WHERE id = 2"),
        ("ck_runs_counters", "UPDATE runs SET failures = -1 WHERE id = 2"),
        ("ck_runs_counters", "UPDATE runs SET lost = -1 WHERE id = 2"),
        ("ck_runs_steps", "UPDATE runs SET steps_done = -1 WHERE id = 2"),
        ("ck_workers_state", "UPDATE workers SET state = 'dead', left_at = 5"),
        ("ck_workers_left", "UPDATE workers SET state = 'left'"),
        ("ck_workers_left", "UPDATE workers SET left_at = 5"),
        ("ck_attempts_ended", "UPDATE attempts SET ended = 'done'"),
        ("ck_attempts_ended", "UPDATE attempts SET ended_at = 5"),
        ("ck_attempts_how", "UPDATE attempts SET ended = 'well', ended_at = 5"),
        ("ck_lineage_kind", "INSERT INTO lineage (child, parent, kind) VALUES (2, 1, 'copy')"),
        ("UNIQUE", "UPDATE runs SET fingerprint = 'f0' WHERE id = 2"),
        ("UNIQUE", "INSERT INTO metrics (name) VALUES ('loss')"),
        ("UNIQUE", "INSERT INTO point VALUES (1, 1, 1, 0)"),
        ("NOT NULL", "UPDATE runs SET config = NULL"),
        ("FOREIGN KEY", "UPDATE runs SET stage = 'nowhere' WHERE id = 2"),
        ("FOREIGN KEY", "UPDATE runs SET intake = 99 WHERE id = 2"),
        ("FOREIGN KEY", "UPDATE runs SET worker = 'nobody' WHERE id = 1"),
        ("FOREIGN KEY", "INSERT INTO point VALUES (99, 1, 1, 0)"),
        ("FOREIGN KEY", "INSERT INTO point VALUES (1, 99, 1, 0)"),
        ("FOREIGN KEY", "UPDATE attempts SET worker = 'nobody'"),
        ("FOREIGN KEY", "INSERT INTO lineage (child, parent, kind) VALUES (2, 99, 'promote')"),
        ("FOREIGN KEY", "INSERT INTO artifacts (run_id, kind, path, bytes, sha256) VALUES (99, 'x', 'y', 1, 'z')"),
        ("FOREIGN KEY", "INSERT INTO gates (stage, condition) VALUES ('nowhere', '{}')"),
        ("FOREIGN KEY", "DELETE FROM runs WHERE id = 1"),
        ("FOREIGN KEY", "DELETE FROM workers"),
        ("FOREIGN KEY", "DELETE FROM stages"),
        ("FOREIGN KEY", "DELETE FROM intakes"),
        ("FOREIGN KEY", "DELETE FROM metrics"),
    ],
)
def test_the_database_refuses(running: Engine, constraint: str, sql: str) -> None:
    with pytest.raises(exc.IntegrityError, match=constraint), db.transaction(running) as connection:
        connection.execute(text(sql))


def test_every_check_of_the_schema_is_tried_above() -> None:
    [cases] = test_the_database_refuses.pytestmark
    tried = {constraint for constraint, _ in cases.args[1]}
    names = {str(c.name) for t in tables.metadata.tables.values() for c in t.constraints if str(c.name)[:3] == "ck_"}

    assert names <= tried


def test_nothing_in_the_schema_cascades(engine: Engine) -> None:
    with db.reading(engine) as connection:
        assert not connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE sql LIKE '%cascade%'").all()
        for table in tables.metadata.tables:
            for key in connection.exec_driver_sql(f"PRAGMA foreign_key_list({table})").mappings():
                assert (key["on_delete"], key["on_update"]) == ("NO ACTION", "NO ACTION")


def test_a_check_names_rows_that_lost_their_parent(engine: Engine) -> None:
    start(engine)
    with stranger(path_of(engine)) as connection:
        connection.execute("DELETE FROM metrics")  # a stranger's connection checks no foreign keys

    [orphan] = db.check(engine)
    assert "point" in orphan
    assert "metrics" in orphan


def test_a_check_finds_damage_inside_the_file(engine: Engine) -> None:
    queue.init(engine, [new_stage(500)])
    path = path_of(engine)
    with stranger(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    content = path.read_bytes()
    place = content.rindex(b"ix_runs_claim ")  # in the schema: damage elsewhere
    size = 4096
    page = next(p for p in range(len(content) // size - 1, 0, -1) if b"run499" in content[p * size : (p + 1) * size])
    assert place < page * size
    path.write_bytes(content[: page * size] + b"\xff" * size + content[(page + 1) * size :])

    reopened = db.open(str(path))
    try:
        assert db.check(reopened)
    except InputError as refused:
        assert "is not a usable database" in refused.message
    reopened.dispose()


# ------------------------------------------------------------------------------------------------- aggregates


def aggregate(engine: Engine, name: str, values: list[float | None]) -> float | None:
    with db.reading(engine) as connection:
        connection.exec_driver_sql("CREATE TEMP TABLE IF NOT EXISTS numbers (x)")
        connection.exec_driver_sql("DELETE FROM numbers")
        for value in values:
            connection.exec_driver_sql("INSERT INTO numbers VALUES (?)", (value,))
        return connection.exec_driver_sql(f"SELECT {name}(x) FROM numbers").scalar()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One database for many examples that write no row into it."""
    path = tmp_path_factory.mktemp("made") / "x.db"
    db.upgrade(str(path))
    engine = db.open(str(path))
    yield engine
    engine.dispose()


numbers = st.lists(st.none() | st.floats(-1e6, 1e6) | st.integers(-1000, 1000), max_size=9)


@settings(max_examples=60, deadline=None)
@given(numbers)
def test_std_and_median_are_those_of_the_statistics_module_and_pass_over_nulls(
    made: Engine, values: list[float | None]
) -> None:
    there = [float(v) for v in values if v is not None]
    std = statistics.stdev(there) if len(there) > 1 else None
    median = statistics.median(there) if there else None

    found = aggregate(made, "std", values)
    assert found == (None if std is None else pytest.approx(std, rel=1e-9, abs=1e-9))
    assert aggregate(made, "median", values) == median


@pytest.mark.parametrize("values", [[], [None], [None, None]])
def test_the_std_and_median_of_nothing_are_null(made: Engine, values: list[float | None]) -> None:
    assert aggregate(made, "std", values) is None
    assert aggregate(made, "median", values) is None


def test_std_and_median_work_by_group_on_every_connection(engine: Engine) -> None:
    with contextlib.ExitStack() as stack:
        for connection in [stack.enter_context(db.reading(engine)) for _ in range(3)]:
            rows = connection.exec_driver_sql(
                """WITH n(g, x) AS (VALUES ('a', 1.0), ('a', 3.0), ('a', NULL), ('b', 5.0), ('c', NULL))
                   SELECT g, std(x), median(x) FROM n GROUP BY g ORDER BY g"""
            ).all()
            assert [tuple(row) for row in rows] == [
                ("a", pytest.approx(2**0.5), 2.0),
                ("b", None, 5.0),
                ("c", None, None),
            ]


def test_connections_are_closed_when_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with stranger(path) as connection:
        connection.execute("CREATE TABLE photos (id)")
    opened: list[object] = []
    closed: list[object] = []

    with _watched(opened, closed), pytest.raises(InputError):
        db.open(str(path))

    assert opened
    assert closed == opened


@contextlib.contextmanager
def _watched(opened: list[object], closed: list[object]) -> Iterator[None]:
    from sqlalchemy.pool import Pool

    def on_connect(connection: object, _record: object) -> None:
        opened.append(connection)

    def on_close(connection: object, _record: object) -> None:
        closed.append(connection)

    event.listen(Pool, "connect", on_connect)
    event.listen(Pool, "close", on_close)
    try:
        yield
    finally:
        event.remove(Pool, "connect", on_connect)
        event.remove(Pool, "close", on_close)
