"""Opening, reading, writing and upgrading the database; every difference between databases lives here.

Two doors: `reading()` begins a deferred transaction and takes no lock, `transaction()` takes the write lock at
once. A deferred BEGIN that reads first cannot be upgraded once another process has written, and no busy timeout
helps it; and if every reader took the write lock, each `status` would stop the workers.
"""

from __future__ import annotations

import math
import os
import random
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, text
from sqlalchemy.engine import make_url

from rnnq import files, host
from rnnq.errors import DatabaseError, InputError, RnnqError

SCHEMA = "0004"  # the revision that this program reads and writes; tests hold it equal to tables.SCHEMA and the head
LEASE = 60.0  # seconds; written into the database when it is made
BUSY = 60.0  # seconds to wait for the write lock
NOW = "(julianday('now') - 2440587.5) * 86400.0"  # unixepoch('subsec') is silently NULL before SQLite 3.42

STEP = 1024  # pages that a backup copies at once
# file systems of other hosts, on which SQLite's locks and shared memory do not hold
NETWORK = ("nfs", "nfs4", "cifs", "smb", "smb3", "smbfs", "sshfs", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph",
           "ceph-fuse", "9p", "afs", "glusterfs")  # fmt: skip

_jitter = random.Random()  # our own: a family draws from the global one, and its draws must not depend on our waits
_WRITE = "rnnq_write"
_PATIENCE = "rnnq_patience"
_MAGIC = b"SQLite format 3\x00"


# --------------------------------------------------------------------------------------------------- opening


def path_of(url: str) -> Path:
    """The file of a database that is named by a path or by an sqlite:/// address. Raises InputError."""
    if "://" not in url:
        return Path(url).expanduser()
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError) as error:
        raise InputError(f"{url!r} is no database address", "a path, or sqlite:///path") from error
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise InputError(f"{url!r}: this version keeps studies in SQLite files only", "a path, or sqlite:///path")
    return Path(parsed.database)


def open(url: str) -> Engine:
    """The database at a path or address, ready for use.

    Raises InputError when it is missing, not a database, not rnnq's, or not at the revision of this program.
    """
    path = path_of(url)
    if not path.exists():
        raise InputError(f"there is no database {path}", "`rnnq init DEFINITION` makes one; --db names another")
    _refuse_strange_file(path)
    engine = _engine(path)
    try:
        _refuse_other_schema(path, revision(engine))
    except BaseException:
        engine.dispose()
        raise
    return engine


def _refuse_other_schema(path: Path, found: str | None) -> None:
    if found is None:
        raise InputError(f"{path} is an SQLite database, but not one of rnnq", "--db names another")
    if found > SCHEMA:
        raise InputError(f"{path} has schema {found}; this rnnq knows up to {SCHEMA}", "install a newer rnnq")
    if found < SCHEMA:
        raise InputError(f"{path} has schema {found}; this rnnq needs {SCHEMA}", "run `rnnq db upgrade`")


def _refuse_strange_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a database", "--db names the file")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if head and head != _MAGIC:
        raise InputError(f"{path} is not a database (it begins with {head[:8]!r})", "--db names another")


def _engine(path: Path) -> Engine:
    url = URL.create("sqlite", database=str(path.resolve()))  # not pasted: a folder's name may hold ? and %
    engine = create_engine(url, connect_args={"timeout": 5.0, "check_same_thread": False}, pool_size=4)
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: the driver would say it too late
    connection.execute("PRAGMA foreign_keys = ON")
    # NORMAL may drop commits at a power cut: attempt numbers would repeat, and rows name files that are gone
    connection.execute("PRAGMA synchronous = FULL")
    connection.create_aggregate("std", 1, _Std)  # type: ignore[arg-type]
    connection.create_aggregate("median", 1, _Median)  # type: ignore[arg-type]


class _Numbers:
    """An SQL aggregate over the values that are not null."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, value: float | None) -> None:
        if value is not None:
            self.values.append(float(value))


class _Std(_Numbers):
    """Sample standard deviation (n - 1); null for fewer than two values."""

    def finalize(self) -> float | None:
        n = len(self.values)
        if n < 2:
            return None
        mean = math.fsum(self.values) / n
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / (n - 1))


class _Median(_Numbers):
    def finalize(self) -> float | None:
        values = sorted(self.values)
        if not values:
            return None
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


# ---------------------------------------------------------------------------------------------- transactions


def _on_begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get(_WRITE):
        _patiently(connection, "BEGIN IMMEDIATE", options.get(_PATIENCE, BUSY))
    else:
        connection.exec_driver_sql("BEGIN")


def _patiently(connection: Connection, statement: str, patience: float = BUSY) -> None:
    """Run a statement that takes a lock. We poll by ourselves, shortly and with jitter.

    SQLite's own busy handler sleeps up to 100 ms between looks and has no queue, so that a process which looks
    seldom never meets the short gaps that a busy one leaves; and a change to WAL mode does not always ask it.
    """
    deadline = time.monotonic() + patience
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                driver.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_jitter.uniform(0.001, 0.012))
    finally:
        driver.execute("PRAGMA busy_timeout = 5000")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A consistent view for reading; takes no lock. Raises DatabaseError."""
    with _translated(engine), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def transaction(engine: Engine, patience: float = BUSY) -> Iterator[Connection]:
    """A write transaction that holds the lock from its first statement.

    `patience` is how many seconds to wait for the lock. Raises DatabaseError.
    """
    with _translated(engine), engine.connect() as connection:
        connection = connection.execution_options(**{_WRITE: True, _PATIENCE: patience})
        with connection.begin():
            yield connection


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    try:
        yield
    except (exc.DBAPIError, sqlite3.Error) as error:
        translated = _translate(engine, error)
        if translated is None:
            raise
        raise translated from error


def _translate(engine: Engine, error: exc.DBAPIError | sqlite3.Error) -> RnnqError | None:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    name = getattr(cause, "sqlite_errorname", "")
    path = engine.url.database
    if name.startswith("SQLITE_READONLY"):
        hint = "SQLite keeps a log beside the file: even reading needs a folder that it may write to"
        return InputError(f"the database {path} is read-only", hint)
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return InputError(f"{path} is not a usable database: {cause}", "--db names another; restore it from a backup")
    if name.startswith("SQLITE_CANTOPEN"):
        return InputError(f"the database {path} cannot be opened: {cause}", "may this user write in its folder?")
    if name.startswith("SQLITE_BUSY"):
        return DatabaseError(f"the write lock of {path} was not free for {BUSY:g} s", "another process holds it")
    if isinstance(cause, sqlite3.OperationalError):
        return DatabaseError(f"the database {path} failed: {cause}")
    return None  # an integrity error is a bug of ours: it keeps its whole trace


def clock(connection: Connection, now: float | None = None) -> float:
    """The database's time in seconds since 1970; `now` where a test passes one."""
    return float(connection.execute(text(f"SELECT {NOW}")).scalar_one()) if now is None else now


# --------------------------------------------------------------------------------------- creating, upgrading


def revision(engine: Engine) -> str | None:
    """The schema revision of the database; None when it is not rnnq's."""
    with reading(engine) as connection:
        return _revision(connection)


def _revision(connection: Connection) -> str | None:
    # other programs use Alembic, too: its table alone says nothing
    known = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('alembic_version', 'study')"
    if connection.execute(text(known)).scalar() != 2:
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return str(found) if found is not None else None


def migrations() -> Path:
    """The folder of the migrations: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def upgrade(url: str, root: str | None = None, scripts: Path | None = None) -> str | None:
    """Make or upgrade the database. Returns what was done in words, or None when there was nothing to do.

    An upgrade keeps a backup beside the file, is refused while workers beat, and either happens whole or not
    at all. `scripts` are other migrations than our own, for tests.
    """
    path = path_of(url)
    fresh = _make_room(path)
    engine = _engine(path)
    try:
        found = None if fresh else _revision_to_upgrade(engine, path)
        head = _head(scripts)
        if found == head:
            return None
        if found is not None and found > head:
            raise InputError(f"{path} has schema {found}; this rnnq knows up to {head}", "install a newer rnnq")
        backup = _back_up(engine, path, found) if found else None
        with _translated(engine):
            done = _migrate(engine, head, root, scripts)
        if not done:
            return None
        return f"upgraded {path} from schema {found} to {head}; backup: {backup}" if found else f"created {path}"
    finally:
        engine.dispose()


def _make_room(path: Path) -> bool:
    """Whether the database is yet to be made. Raises InputError for a place where it cannot be."""
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the database {path.name} does not exist", "make it first")
    if path.exists():
        _refuse_strange_file(path)
    fresh = not path.exists() or path.stat().st_size == 0
    if fresh:
        lease_from_environment()  # a bad one is refused before there is a file
    return fresh


def _revision_to_upgrade(engine: Engine, path: Path) -> str | None:
    """The revision of a file that is there; None while it holds nothing. Raises InputError for a stranger's."""
    with reading(engine) as connection:  # one view: another process may be making this database right now
        found = _revision(connection)
        if found is None and connection.execute(text("SELECT 1 FROM sqlite_master")).first() is not None:
            raise InputError(f"{path} is an SQLite database, but not one of rnnq", "--db names another")
        return found


def _head(scripts: Path | None) -> str:
    if scripts is None:
        return SCHEMA
    from alembic.script import ScriptDirectory  # 0.1 s, and only needed here

    head = ScriptDirectory(str(scripts)).get_current_head()
    assert head is not None
    return head


def _back_up(engine: Engine, path: Path, found: str) -> Path:
    with reading(engine) as connection:
        _refuse_while_workers_beat(connection)  # now, before it costs time and space, and again under the lock
    backup = path.with_name(f"{path.name}.backup-{found}-{time.strftime('%Y%m%d-%H%M%S')}")
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    return backup


def _migrate(engine: Engine, head: str, root: str | None, scripts: Path | None) -> bool:
    """Run the migrations in one transaction; False when another process was faster."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        _patiently(connection, "PRAGMA journal_mode = WAL")
        # rebuilding a table drops it: with foreign keys on, its children would be checked or emptied
        driver.execute("PRAGMA foreign_keys = OFF")
        try:
            connection = connection.execution_options(**{_WRITE: True})
            with connection.begin():
                return _migrate_inside(connection, head, root, scripts)
        finally:
            driver.execute("PRAGMA foreign_keys = ON")


def _migrate_inside(connection: Connection, head: str, root: str | None, scripts: Path | None) -> bool:
    before = _row_counts(connection)
    if "alembic_version" in before:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        if found == head:
            return False
        _refuse_while_workers_beat(connection)
    _run_alembic(connection, scripts)
    broken = connection.execute(text("PRAGMA foreign_key_check")).all()
    if broken:
        raise DatabaseError(f"the migration left {len(broken)} rows without their parent; nothing was changed")
    after = _row_counts(connection)
    changed = [f"{t}: {n} -> {after.get(t, 0)}" for t, n in before.items() if after.get(t, 0) != n]
    if changed:
        raise DatabaseError("the migration changed numbers of rows (" + ", ".join(changed) + "); nothing was changed")
    if "study" not in before:
        _write_study(connection, root)
    return True


def _row_counts(connection: Connection) -> dict[str, int]:
    names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    tables = connection.execute(text(names)).scalars().all()
    return {t: int(connection.execute(text(f'SELECT count(*) FROM "{t}"')).scalar_one()) for t in tables}


def _refuse_while_workers_beat(connection: Connection) -> None:
    live = f"SELECT id FROM workers WHERE state = 'live' AND beat_at > {NOW} - (SELECT lease_s FROM study)"
    workers = connection.execute(text(live)).scalars().all()
    if workers:
        raise InputError(f"workers are at work: {', '.join(workers)}", "stop them before `rnnq db upgrade`")


def _run_alembic(connection: Connection, scripts: Path | None) -> None:
    from alembic import command  # 0.1 s, and only needed here
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts or migrations()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _write_study(connection: Connection, root: str | None) -> None:
    values = {"id": str(uuid.uuid4()), "lease": lease_from_environment(), "root": root}
    insert = f"INSERT INTO study (id, created_at, lease_s, root) VALUES (:id, {NOW}, :lease, :root)"
    connection.execute(text(insert), values)


def lease_from_environment() -> float:
    """LEASE, or RNNQ_LEASE_S. Raises InputError when that is no number of seconds from 0.2 to 86400."""
    return host.seconds_from_environment("RNNQ_LEASE_S", LEASE, 0.2)


# --------------------------------------------------------------------------------------------------- backup


def backup(
    engine: Engine, target: Path | None = None, watch: Callable[[int, int], None] | None = None, step: int = STEP
) -> Path:
    """A consistent copy of the database, also while workers write; returns where it is.

    `watch` is told how many pages are copied, and of how many. Nobody waits for it: it reads one view, `step` pages
    at a time. The copy is written aside, looked through, brought down to the disk and then named; by default it lies
    beside the database, with the time in its name. Raises InputError for a name that is taken, DatabaseError for a
    copy with damage.
    """
    source = Path(engine.url.database or ".")
    target = target or source.with_name(f"{source.name}.backup-{time.strftime('%Y%m%d-%H%M%S')}")
    aside = _room_for_backup(target)
    try:
        with _translated(engine), reading(engine) as connection, closing(sqlite3.connect(aside)) as copy:
            # read first: in a view that is held no write of another process makes the copying begin anew
            connection.execute(text("SELECT 1 FROM sqlite_master")).all()
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            driver.backup(copy, pages=step, progress=lambda _, left, n: watch(n - left, n) if watch else None)
        _refuse_damaged(aside)
        _name_once(aside, target)
    finally:
        for ending in ("", "-journal", "-wal", "-shm"):
            aside.with_name(aside.name + ending).unlink(missing_ok=True)
    return target


def _room_for_backup(target: Path) -> Path:
    """An empty file beside the place of the copy, to be filled. Raises InputError for a place where none can be."""
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} is there already; a backup overwrites nothing", "give it another name")
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}", "another folder may take it") from error
    return aside


def _refuse_damaged(copy: Path) -> None:
    engine = _engine(copy)
    try:
        found = check(engine)
    finally:
        engine.dispose()
    if found:
        more = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
        hint = "`rnnq db check` tells whether the database is damaged, too; `cp` copies a database as it is"
        raise DatabaseError(f"the copy is damaged, and was not kept: {found[0]}{more}", hint)


def _name_once(aside: Path, target: Path) -> None:
    """Give a file its name once it is on the disk; never that of another file."""
    try:
        files.sync(aside)
        files.link_once(aside, target)
        files.sync(target.parent)
    except FileExistsError as error:
        raise InputError(f"{target} is there already; a backup overwrites nothing", "give it another name") from error
    except OSError as error:
        raise DatabaseError(f"the backup {target} could not be put in place: {error}") from error


# ---------------------------------------------------------------------------------------------- file systems


def file_system(path: Path, mounts: str | None = None) -> str | None:
    """The kind of the file system that a path lies on, such as ext4 or nfs4; None where the system does not tell.

    `mounts` is what /proc/mounts says, by default of this host.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(errors="replace")
        except OSError:
            return None
    place, found, depth = path.resolve(), None, -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1]))  # a space is \040
        # of two mounted on the same place the later one covers the other
        if place.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = fields[2], len(point.parts)
    return found


def on_network(path: Path, mounts: str | None = None) -> str | None:
    """The kind of a network file system that a path lies on; None for a local one."""
    kind = file_system(path, mounts)
    return kind if kind is not None and kind.removeprefix("fuse.") in NETWORK else None


def network_warning(path: Path, kind: str) -> tuple[str, str]:
    """What is wrong with a database on a network file system, and what to do."""
    what = f"the database {path} lies on a network file system ({kind}), on which SQLite may lose what is written"
    hint = "its log needs the shared memory of one host: keep the database on a local disk, and train on one host"
    return what, f"{hint}; PostgreSQL, for many hosts, is planned"


# ---------------------------------------------------------------------------------------------------- study


def study(engine: Engine) -> tuple[str, float, Path]:
    """The study's id, its LEASE in seconds, and the folder that relative paths start from."""
    with reading(engine) as connection:
        row = connection.execute(text("SELECT id, lease_s, root FROM study")).one()
    database = Path(engine.url.database or ".")
    return row.id, float(row.lease_s), Path(row.root) if row.root else database.parent


def check(engine: Engine) -> list[str]:
    """What is wrong inside the database, in words; an empty list when nothing is."""
    with reading(engine) as connection:
        pages = connection.execute(text("PRAGMA integrity_check")).scalars().all()
        orphans = connection.execute(text("PRAGMA foreign_key_check")).all()
    found = [str(line) for line in pages if line != "ok"]
    return found + [f"{row[0]} row {row[1]} names a row of {row[2]} that is not there" for row in orphans]
