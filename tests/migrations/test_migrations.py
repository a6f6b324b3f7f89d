"""Migrations build what tables.py says, keep every row of a database that has some, and happen whole or not at all.

The tests bring revisions of their own: a copy of migrations/ and the next revision beside them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, exc, text

from rnnq import db, query, queue, runs, tables
from rnnq.errors import DatabaseError, InputError, RnnqError
from tests.conftest import ROOT, claim_one, new_runs, new_stage

NEXT = f"{int(db.SCHEMA) + 1:04d}"
HEAD = f'''
"""A revision of a test."""
import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{db.SCHEMA}"

'''

# A table is rebuilt from what SQLAlchemy can read of it; it cannot read that an index goes down.
# So whoever rebuilds `runs` makes the two indexes of the claim anew.
REBUILD_RUNS = """
def upgrade():
    with op.batch_alter_table("runs", recreate="always", table_kwargs={"sqlite_autoincrement": True}) as batch:
        batch.add_column(sa.Column("extra", sa.Text(), server_default="x"))
    for name, columns in (("ix_runs_claim", []), ("ix_runs_claim_pack", ["pack_key"])):
        op.drop_index(name, "runs")
        columns = ["intake", "stage", *columns, sa.text("priority DESC"), "id"]
        op.create_index(name, "runs", columns, sqlite_where=sa.text("state = 'pending'"))
"""


@pytest.fixture(autouse=True)
def a_lease_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNQ_LEASE_S", raising=False)


def revision(folder: Path, upgrade: str) -> Path:
    """Our migrations and one more."""
    scripts = folder / "scripts"
    shutil.copytree(db.migrations(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / f"{NEXT}_of_a_test.py").write_text(HEAD + upgrade)
    return scripts


@contextlib.contextmanager
def plain(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that knows nothing of rnnq."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield connection


def everything(path: Path) -> list[str]:
    """The whole database as text, with its schema."""
    with plain(path) as connection:
        return list(connection.iterdump())


def rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, without columns that a test added."""
    found = {}
    with plain(path) as connection:
        for table in tables.metadata.tables.values():
            columns = ", ".join(f'"{column.name}"' for column in table.columns)
            found[table.name] = connection.execute(f"SELECT {columns} FROM {table.name} ORDER BY 1, 2").fetchall()
    return found


def sql_of(path: Path, kind: str) -> dict[str, str]:
    with plain(path) as connection:
        sql = "SELECT name, sql FROM sqlite_master WHERE type = ? AND sql IS NOT NULL"
        return {name: " ".join(sql.split()) for name, sql in connection.execute(sql, (kind,))}


def lines_of(path: Path, table: str) -> list[str]:
    """The columns and constraints of a table, in an order that does not matter."""
    with plain(path) as connection:
        [create] = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", (table,))
    head, _, rest = " ".join(create[0].split()).partition("(")
    inside, _, tail = rest.rpartition(")")
    # a column that was added later says by itself what a table that was made whole says of it at its end
    inside = re.sub(r"(\w+) (\w+) (REFERENCES \w+ \(\w+\))", r"\1 \2, FOREIGN KEY(\1) \3", inside)
    parts = re.split(r",(?![^(]*\))", inside.replace("()", ""))  # commas that stand in no parentheses
    return sorted([head.replace('"', "").strip(), tail.strip(), *(part.strip() for part in parts)])


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A database in which a study has lived: rows in every table, and no worker at work."""
    path = tmp_path / "experiments.db"
    db.upgrade(str(path))
    engine = db.open(str(path))
    live(engine)
    engine.dispose()
    return path


def live(engine: Engine) -> None:
    queue.init(engine, [new_stage(4)])
    file = {"path": "a.pt", "step": 5, "sha256": "x", "bytes": 1}
    first = claim_one(engine, now=1000.0)
    queue.record(engine, first, 5, [("loss", step, 1 / step) for step in range(1, 6)], file)
    queue.reap(engine, now=2000.0)
    again = claim_one(engine)
    queue.finish(engine, again, 10, {"loss": 0.1, "note": "naïve"}, "loss", [("loss", 10, float("nan"))], file, file)
    queue.fail(engine, claim_one(engine), "bug", "x", "trace", [("other", 1, 1.5)])
    child = replace(new_runs(1)[0], parents=((1, "promote", '{"rank":1}'),))
    queue.init(engine, [new_stage(name="next", runs=[child])])
    queue.leave(engine, "w", "done")
    queue.remember_pack(engine, "{}", 8, True, 100.0, True)
    with db.transaction(engine) as connection:
        connection.execute(text("INSERT INTO gates (stage, condition) VALUES ('next', '{}')"))
        connection.execute(text("INSERT INTO tags VALUES (1, 'good')"))
        connection.execute(text("INSERT INTO changes VALUES (1, 0, 'cancel', '{}', 'h', 'rnnq')"))


def test_the_study_of_these_tests_has_rows_in_every_table(used: Path) -> None:
    assert {name for name, found in rows(used).items() if not found} == set()
    assert len(rows(used)["point"]) == 7
    assert len(rows(used)["attempts"]) == 3


# ------------------------------------------------------------------------------------- the schema is one and known


def test_the_program_the_tables_and_the_migrations_are_at_one_revision() -> None:
    scripts = ScriptDirectory(str(db.migrations()))

    assert db.SCHEMA == tables.SCHEMA == scripts.get_current_head()
    assert scripts.get_bases() == ["0001"]
    assert len(scripts.get_heads()) == 1


def test_the_filter_language_knows_the_states_of_the_tables() -> None:
    assert query.STATES == tables.STATES
    assert set(tables.OPEN) | set(tables.FINAL) == set(tables.STATES)
    assert not set(tables.OPEN) & set(tables.FINAL)


def columns_of(path: Path, table: str) -> list[tuple[Any, ...]]:
    with plain(path) as connection:
        return connection.execute(f"PRAGMA table_xinfo({table})").fetchall()


def test_all_migrations_together_build_what_the_tables_say(tmp_path: Path) -> None:
    migrated, declared = tmp_path / "migrated.db", tmp_path / "declared.db"
    db.upgrade(str(migrated))
    engine = create_engine(f"sqlite:///{declared}")
    with engine.begin() as connection:
        tables.metadata.create_all(connection)
        connection.execute(text(tables.POINTS_VIEW))
    engine.dispose()

    for name in tables.metadata.tables:
        assert lines_of(migrated, name) == lines_of(declared, name)
        assert columns_of(migrated, name) == columns_of(declared, name)
    for kind in ("index", "view", "trigger"):
        assert sql_of(migrated, kind) == sql_of(declared, kind)
    assert set(sql_of(migrated, "table")) - set(sql_of(declared, "table")) == {"alembic_version"}


def test_a_study_is_never_downgraded() -> None:
    scripts = ScriptDirectory(str(db.migrations()))

    for found in scripts.walk_revisions():
        with pytest.raises(NotImplementedError, match="restore the backup"):
            found.module.downgrade()


OLD = sorted((Path(__file__).parent / "assets").glob("*.sql"))


@pytest.mark.parametrize("asset", OLD, ids=lambda path: path.stem)
def test_a_study_of_an_older_schema_is_upgraded_and_keeps_every_row(asset: Path, tmp_path: Path) -> None:
    path = tmp_path / "experiments.db"
    with plain(path) as connection:
        connection.executescript(asset.read_text())
        old = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        old -= {"alembic_version", "sqlite_sequence"}
        tables_then = {name: connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in old}

    db.upgrade(str(path))

    with plain(path) as connection:
        for name, before in tables_then.items():
            after = connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall()
            assert [row[: len(then)] for row, then in zip(after, before, strict=True)] == before, name
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    engine = db.open(str(path))
    assert runs.show(engine, 1)["curves"]["loss"][-1] == (10, None)
    assert claim_one(engine).run == 3
    [added] = queue.init(engine, [new_stage(name="next", runs=new_runs(2))])
    assert runs.find(engine, "next")[-1]["id"] == 6
    assert added.added == 1
    engine.dispose()


# ----------------------------------------------------------------------------------------- a migration that works


def test_rebuilding_runs_keeps_every_row_of_every_table(used: Path, tmp_path: Path) -> None:
    before = rows(used)
    schema, indexes, view = lines_of(used, "runs"), sql_of(used, "index"), sql_of(used, "view")

    said = db.upgrade(str(used), scripts=revision(tmp_path, REBUILD_RUNS))

    [backup] = used.parent.glob(f"experiments.db.backup-{db.SCHEMA}-*")
    assert said == f"upgraded {used} from schema {db.SCHEMA} to {NEXT}; backup: {backup}"
    assert rows(used) == before
    assert rows(backup) == before
    assert sql_of(used, "index") == indexes
    assert sql_of(used, "view") == view
    gone, new = (set(a) - set(b) for a, b in ((schema, lines_of(used, "runs")), (lines_of(used, "runs"), schema)))
    assert gone == set()
    assert new == {"extra TEXT DEFAULT 'x'"}
    with plain(used) as connection:
        assert connection.execute("SELECT DISTINCT extra FROM runs").fetchall() == [("x",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(NEXT,)]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_after_runs_were_rebuilt_the_database_still_refuses_and_a_claim_still_dives(
    used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.upgrade(str(used), scripts=revision(tmp_path, REBUILD_RUNS))
    monkeypatch.setattr(db, "SCHEMA", NEXT)
    engine = db.open(str(used))

    for wrong in (
        "UPDATE runs SET state = 'ready'",
        "UPDATE runs SET steps_done = -1",
        "UPDATE runs SET lease_until = 5 WHERE state = 'pending'",
        "UPDATE runs SET ended_at = NULL WHERE state = 'done'",
        "UPDATE runs SET fingerprint = 'f0'",
        "INSERT INTO point VALUES (99, 1, 1, 0)",
        "DELETE FROM runs",
    ):
        with pytest.raises(exc.IntegrityError), db.transaction(engine) as connection:
            connection.execute(text(wrong))
    with db.reading(engine) as connection:
        values = {"worker": "w", "now": 1.0, "limit": 1, "stage": None, "without": "[]"}
        plan = [
            row.detail
            for row in connection.execute(text("EXPLAIN QUERY PLAN " + queue._claim_statement(connection)), values)
        ]
    assert "SEARCH inner_run USING INDEX ix_runs_claim (intake=? AND stage=?)" in plan
    assert claim_one(engine).run == 3
    assert runs.show(engine, 1)["children"][0]["run"] == 5
    engine.dispose()


def test_every_table_can_be_rebuilt_and_keeps_its_rows(used: Path, tmp_path: Path) -> None:
    before = rows(used)
    upgrade = """
def upgrade():
    op.execute("DROP VIEW points")  # it would stop the renaming of the tables below it
    for table in ("study", "stages", "workers", "attempts", "metrics", "point", "lineage", "gates", "artifacts",
                  "tags", "changes", "packs"):
        with op.batch_alter_table(table, recreate="always") as batch:
            batch.add_column(sa.Column("extra", sa.Text()))
    op.execute("CREATE VIEW points AS SELECT run_id, name, step, value FROM point JOIN metrics ON id = metric_id")
"""
    db.upgrade(str(used), scripts=revision(tmp_path, upgrade))

    assert rows(used) == before
    without_rowid = {name for name, sql in sql_of(used, "table").items() if "WITHOUT ROWID" in sql}
    assert without_rowid == {"attempts", "point", "lineage", "tags", "packs"}


def test_an_upgrade_happens_once(used: Path, tmp_path: Path) -> None:
    scripts = revision(tmp_path, REBUILD_RUNS)
    db.upgrade(str(used), scripts=scripts)
    after = everything(used)

    assert db.upgrade(str(used), scripts=scripts) is None
    assert everything(used) == after
    assert len(list(used.parent.glob("*.backup-*"))) == 1


def test_a_new_database_goes_through_all_revisions_and_needs_no_backup(tmp_path: Path) -> None:
    path = tmp_path / "new.db"

    assert db.upgrade(str(path), scripts=revision(tmp_path, REBUILD_RUNS)) == f"created {path}"
    assert not list(tmp_path.glob("*.backup-*"))


# ------------------------------------------------------------------------------------- a migration that must not be

REFUSED = {
    "it raises midway": (
        RuntimeError,
        "out of ideas",
        REBUILD_RUNS
        + """
    op.create_table("extra", sa.Column("x", sa.Integer()))
    op.execute("UPDATE runs SET extra = 'half'")
    op.execute("DELETE FROM point")
    raise RuntimeError("out of ideas")
""",
    ),
    "its SQL is wrong": (
        RnnqError,
        "no such table: nowhere",
        REBUILD_RUNS + "    op.execute('DELETE FROM nowhere')\n",
    ),
    "it loses points": (
        DatabaseError,
        r"changed numbers of rows \(point: 7 -> 6\); nothing was changed",
        "def upgrade():\n    op.execute('DELETE FROM point WHERE step = 1 AND run_id = 1')\n",
    ),
    "it doubles rows": (
        DatabaseError,
        r"lineage: 1 -> 2",
        "def upgrade():\n    op.execute(\"INSERT INTO lineage SELECT child, parent, 'retry', detail FROM lineage\")\n",
    ),
    "it drops a table with rows": (
        DatabaseError,
        r"artifacts: 2 -> 0",
        "def upgrade():\n    op.drop_table('artifacts')\n",
    ),
    "it leaves points without a run": (
        DatabaseError,
        r"left 6 rows without their parent; nothing was changed",
        "def upgrade():\n    op.execute('UPDATE point SET run_id = 99 WHERE run_id = 1')\n",
    ),
}


@pytest.mark.parametrize(("error", "message", "upgrade"), REFUSED.values(), ids=REFUSED)
def test_a_migration_is_refused_whole_when(
    used: Path, tmp_path: Path, error: type[Exception], message: str, upgrade: str
) -> None:
    before = everything(used)

    with pytest.raises(error, match=message):
        db.upgrade(str(used), scripts=revision(tmp_path, upgrade))

    assert everything(used) == before  # the version and the schema, too
    [backup] = used.parent.glob(f"experiments.db.backup-{db.SCHEMA}-*")
    assert everything(backup) == before
    engine = db.open(str(used))
    assert db.check(engine) == []
    assert claim_one(engine).run == 3  # and work goes on
    engine.dispose()


def test_a_table_without_rows_may_go(used: Path, tmp_path: Path) -> None:
    with plain(used) as connection, connection:
        connection.execute("DELETE FROM gates")

    db.upgrade(str(used), scripts=revision(tmp_path, "def upgrade():\n    op.drop_table('gates')\n"))

    assert "gates" not in sql_of(used, "table")


def test_an_upgrade_is_refused_while_a_worker_beats_and_leaves_no_backup(used: Path, tmp_path: Path) -> None:
    scripts = revision(tmp_path, REBUILD_RUNS)
    engine = db.open(str(used))
    queue.register(engine, "busy", "cpu", {})
    before = everything(used)

    with pytest.raises(InputError, match="workers are at work: busy"):
        db.upgrade(str(used), scripts=scripts)

    assert everything(used) == before
    assert not list(used.parent.glob("*.backup-*"))

    queue.leave(engine, "busy", "")
    engine.dispose()
    assert db.upgrade(str(used), scripts=scripts) is not None


def test_a_worker_that_is_long_silent_does_not_stop_an_upgrade(used: Path, tmp_path: Path) -> None:
    engine = db.open(str(used))
    queue.register(engine, "dead", "cpu", {})
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE workers SET beat_at = beat_at - 61 WHERE id = 'dead'"))
    engine.dispose()

    assert db.upgrade(str(used), scripts=revision(tmp_path, REBUILD_RUNS)) is not None


# ------------------------------------------------------------------------------------------------ for developers


def test_alembics_own_command_reads_the_project_file() -> None:
    done = subprocess.run([sys.executable, "-m", "alembic", "heads"], cwd=ROOT, capture_output=True, text=True)

    assert done.stdout.split() == [tables.SCHEMA, "(head)"], done.stderr


def test_alembics_own_upgrade_is_turned_away_since_it_is_not_transactional(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "alembic", "upgrade", "head"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "error: migrations run inside rnnq's own transaction",
        "hint: `rnnq db upgrade`",
    ]


def test_a_new_revision_begins_with_a_template_that_works(used: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(db.migrations(), project / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    config = Config(toml_file=project / "pyproject.toml")

    command.revision(config, "Runs have a note", rev_id=NEXT)

    assert (project / "migrations" / "versions" / f"{NEXT}_runs_have_a_note.py").is_file()
    assert ScriptDirectory.from_config(config).get_current_head() == NEXT
    said = db.upgrade(str(used), scripts=project / "migrations")
    assert said is not None
    assert said.startswith(f"upgraded {used} from schema {db.SCHEMA} to {NEXT}")


# ------------------------------------------------------------------------------------------------------ the wheel


def test_an_installed_rnnq_has_its_migrations_and_makes_a_database_with_them(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())

    ours = {p.relative_to(ROOT).as_posix() for p in db.migrations().rglob("*") if "__pycache__" not in p.parts}
    files = {f"rnnq/{name}" for name in ours if (ROOT / name).is_file()}
    assert files <= names
    assert not [name for name in names if name.startswith(("tests/", "migrations/")) or "__pycache__" in name]
    code = "import rnnq, rnnq.db as db; print(rnnq.__file__, db.migrations(), db.upgrade('x.db'), sep='\\n')"
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        str(tmp_path / "installed" / "rnnq" / "__init__.py"),
        str(tmp_path / "installed" / "rnnq" / "migrations"),
        "created x.db",
    ], done.stderr
