"""SQLite: one file, and one writer at a time.

A deferred BEGIN that reads first cannot be upgraded once another process has written, and no busy timeout helps it;
and if every reader took the write lock, each `status` would stop the workers. So there are two kinds of transaction.
"""

from __future__ import annotations

import math
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, text
from sqlalchemy.engine import make_url

from rnnq import files, host
from rnnq.errors import DatabaseError, InputError, RnnqError

BUSY = 60.0  # seconds to wait for the write lock
STEP = 1024  # pages that a backup copies at once
# file systems of other hosts, on which SQLite's locks and shared memory do not hold
NETWORK = ("nfs", "nfs4", "cifs", "smb", "smb3", "smbfs", "sshfs", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph",
           "ceph-fuse", "9p", "afs", "glusterfs")  # fmt: skip

jitter = random.Random()  # our own: a family draws from the global one, and its draws must not depend on our waits
_WRITE = "rnnq_write"
_PATIENCE = "rnnq_patience"
_MAGIC = b"SQLite format 3\x00"
ADDRESSES = "a path, sqlite:///path, or postgresql+psycopg://user@host/name"

READING: Mapping[str, Any] = {}  # execution options of a transaction that reads
SCRATCH = READING  # and of one that makes temporary tables, too


def writing(patience: float) -> Mapping[str, Any]:
    """Execution options of a transaction that writes, and waits so many seconds for the write lock."""
    return {_WRITE: True, _PATIENCE: patience}


def be_patient(connection: Connection, patience: float) -> None:
    """Nothing more to do: the only lock is taken already."""


# --------------------------------------------------------------------------------------------------- opening


def path_of(url: str) -> Path:
    """The file of a database that is named by a path or by an sqlite:/// address. Raises InputError."""
    if "://" not in url:
        return Path(url).expanduser()
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError) as error:
        raise InputError(f"{host.masked(url)!r} is no database address", ADDRESSES) from error
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise InputError(f"{host.masked(url)!r} is no database that rnnq can use", ADDRESSES)
    return Path(parsed.database)


def open(url: str) -> Engine:
    """The file at a path or address. Raises InputError when it is missing, or not a database."""
    path = path_of(url)
    if not path.exists():
        raise InputError(f"there is no database {path}", "`rnnq init DEFINITION` makes one; --db names another")
    _refuse_strange_file(path)
    return engine(path)


def shown(engine: Engine) -> str:
    """The database for people: its path."""
    return str(engine.url.database)


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


def engine(path: Path) -> Engine:
    """A file, whatever it holds; it is made where there is none."""
    url = URL.create("sqlite", database=str(path.resolve()))  # not pasted: a folder's name may hold ? and %
    made = create_engine(url, connect_args={"timeout": 5.0, "check_same_thread": False}, pool_size=4)
    event.listen(made, "connect", _on_connect)
    event.listen(made, "begin", _on_begin)
    return made


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
            time.sleep(jitter.uniform(0.001, 0.012))
    finally:
        driver.execute("PRAGMA busy_timeout = 5000")


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def translate(engine: Engine, error: exc.DBAPIError | sqlite3.Error, patience: float) -> RnnqError | None:
    """The same as an error for people; None for one that is a fault of ours."""
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
        return DatabaseError(f"the write lock of {path} was not free for {patience:g} s", "another process holds it")
    if isinstance(cause, sqlite3.OperationalError):
        return DatabaseError(f"the database {path} failed: {cause}")
    return None  # an integrity error is a bug of ours: it keeps its whole trace


# ------------------------------------------------------------------------------------------------- migrating


def is_known(connection: Connection) -> bool:
    """Whether the database has the tables by which a study is known."""
    known = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('alembic_version', 'study')"
    return bool(connection.execute(text(known)).scalar() == 2)


def root() -> str | None:
    """Where the files of a new study go; None: wherever the database's file is."""
    return None


def tables(connection: Connection) -> set[str]:
    """The names of all tables."""
    names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    return set(connection.execute(text(names)).scalars())


def make_room(url: str) -> bool:
    """Whether the database is yet to be made. Raises InputError for a place where it cannot be."""
    path = path_of(url)
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the database {path.name} does not exist", "make it first")
    if path.exists():
        _refuse_strange_file(path)
    return not path.exists() or path.stat().st_size == 0


def refuse_strangers(connection: Connection, engine: Engine) -> None:
    """Raises InputError for a database without a study that holds anything at all."""
    if connection.execute(text("SELECT 1 FROM sqlite_master")).first() is not None:
        raise InputError(f"{shown(engine)} is an SQLite database, but not one of rnnq", "--db names another")


def safety_copy(engine: Engine, found: str) -> Path:
    """Copy the file as it is before its upgrade; returns where it is."""
    path = Path(str(engine.url.database))
    backup = path.with_name(f"{path.name}.backup-{found}-{time.strftime('%Y%m%d-%H%M%S')}")
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    return backup


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A write transaction in which tables may be rebuilt."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        _patiently(connection, "PRAGMA journal_mode = WAL")
        # rebuilding a table drops it: with foreign keys on, its children would be checked or emptied
        driver.execute("PRAGMA foreign_keys = OFF")
        try:
            connection = connection.execution_options(**{_WRITE: True})
            with connection.begin():
                yield connection
        finally:
            driver.execute("PRAGMA foreign_keys = ON")


def orphans(connection: Connection) -> list[str]:
    """Rows that name a row which is not there, in words."""
    found = connection.execute(text("PRAGMA foreign_key_check")).all()
    return [f"{row[0]} row {row[1]} names a row of {row[2]} that is not there" for row in found]


def check(connection: Connection) -> list[str]:
    """What is wrong inside the database, in words; an empty list when nothing is."""
    pages = connection.execute(text("PRAGMA integrity_check")).scalars().all()
    return [str(line) for line in pages if line != "ok"] + orphans(connection)


def size(connection: Connection) -> int:
    """Bytes on the disk."""
    return Path(str(connection.engine.url.database)).stat().st_size


# --------------------------------------------------------------------------------------------------- backup


def backup(
    connection: Connection,
    target: Path | None = None,
    watch: Callable[[int, int], None] | None = None,
    step: int = STEP,
) -> Path:
    """A consistent copy of the database, also while workers write; returns where it is.

    `watch` is told how many pages are copied, and of how many. Nobody waits for it: it reads one view, `step` pages
    at a time. The copy is written aside, looked through, brought down to the disk and then named; by default it lies
    beside the database, with the time in its name. Raises InputError for a name that is taken, DatabaseError for a
    copy with damage.
    """
    source = Path(connection.engine.url.database or ".")
    target = target or source.with_name(f"{source.name}.backup-{time.strftime('%Y%m%d-%H%M%S')}")
    aside = _room_for_backup(target)
    try:
        with closing(sqlite3.connect(aside)) as copy:
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
    opened = engine(copy)
    try:
        with opened.connect() as connection:
            found = check(connection)
    finally:
        opened.dispose()
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
    return what, f"{hint}; or take PostgreSQL, for many hosts: docs/postgresql.md"
