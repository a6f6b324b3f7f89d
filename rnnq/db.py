"""Opening, reading, writing and upgrading the database. Every difference between SQLite and PostgreSQL lives here and
in the folder `databases`, and nowhere else.

Two doors: `reading()` begins a transaction that takes no lock and sees one state of things throughout, `transaction()`
one that writes. On SQLite a writer is alone from its first statement on. On PostgreSQL there are many: what is decided
on is read with `words(...).locked`, rows are locked in the order of their ids, and `retried` runs a function again
whose transaction the database undid because two writers met.
"""

from __future__ import annotations

import functools
import sqlite3
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, exc, text

from rnnq import host
from rnnq.databases import sqlite
from rnnq.databases.sqlite import STEP
from rnnq.databases.sqlite import file_system as file_system
from rnnq.databases.sqlite import jitter as _jitter
from rnnq.databases.sqlite import network_warning as network_warning
from rnnq.databases.sqlite import on_network as on_network
from rnnq.databases.sqlite import path_of as path_of
from rnnq.databases.words import NOW as NOW
from rnnq.databases.words import OF, Words
from rnnq.errors import Conflict, DatabaseError, InputError

SCHEMA = "0005"  # the revision that this program reads and writes; tests hold it equal to tables.SCHEMA and the head
LEASE = 60.0  # seconds; written into the database when it is made
BUSY = 60.0  # seconds to wait for a lock
MEETINGS = 20  # times that a transaction is run again because another one was in its way

P = ParamSpec("P")
T = TypeVar("T")

# --------------------------------------------------------------------------------------------------- opening


def is_server(url: str) -> bool:
    """Whether a database is named by an address of PostgreSQL, and not a file."""
    return url.lower().startswith("postgres") and ":" in url and _postgres().is_address(url)


def _postgres() -> ModuleType:
    from rnnq.databases import postgres  # only where there is one

    return postgres


def _side(engine: Engine) -> ModuleType:
    """What is said and done in the way of this database."""
    return sqlite if engine.dialect.name == "sqlite" else _postgres()


def words(connection: Connection | Engine) -> Words:
    """What this database says in its own words, as parts of statements."""
    return OF[connection.dialect.name]


def open(url: str) -> Engine:
    """The database at a path or address, ready for use.

    Raises InputError when it is missing, not a database, not rnnq's, or not at the revision of this program, and
    DatabaseError for a server that does not answer.
    """
    engine: Engine = _postgres().open(url) if is_server(url) else sqlite.open(url)
    try:
        _refuse_other_schema(_given(url), revision(engine))
    except BaseException:
        engine.dispose()
        raise
    return engine


def exists(url: str) -> bool:
    """Whether there is a database: a file, whatever it holds, or a study on a server. Raises as `open` does."""
    if not is_server(url):
        return path_of(url).exists()
    engine = _postgres().open(url)
    try:
        return revision(engine) is not None
    finally:
        engine.dispose()


def file_of(engine: Engine) -> Path | None:
    """The database's file; None on a server."""
    return Path(engine.url.database or ".") if engine.dialect.name == "sqlite" else None


def shown(engine: Engine) -> str:
    """The database for people: a path, or an address without its password."""
    return str(_side(engine).shown(engine))


def _given(url: str) -> str:
    """The database as it was named, without a password."""
    return host.masked(url) if is_server(url) else str(path_of(url))


def _refuse_other_schema(name: str, found: str | None) -> None:
    if found is None and not is_server(name):
        raise InputError(f"{name} is an SQLite database, but not one of rnnq", "--db names another")
    if found is None:
        raise InputError(f"{name} holds no study", "`rnnq init DEFINITION` makes one; --db names another")
    if found > SCHEMA:
        raise InputError(f"{name} has schema {found}; this rnnq knows up to {SCHEMA}", "install a newer rnnq")
    if found < SCHEMA:
        raise InputError(f"{name} has schema {found}; this rnnq needs {SCHEMA}", "run `rnnq db upgrade`")


# ---------------------------------------------------------------------------------------------- transactions


@contextmanager
def reading(engine: Engine, scratch: bool = False) -> Iterator[Connection]:
    """A consistent view for reading; takes no lock. Raises DatabaseError.

    With `scratch`, one in which temporary tables may be made.
    """
    side = _side(engine)
    options = side.SCRATCH if scratch else side.READING
    with _translated(engine), engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


@contextmanager
def transaction(engine: Engine, patience: float | None = None) -> Iterator[Connection]:
    """A transaction that writes; on SQLite it holds the write lock from its first statement.

    `patience` is how many seconds to wait for a lock, by default BUSY. Raises DatabaseError, and of that Conflict for
    what `retried` runs again.
    """
    patience = BUSY if patience is None else patience
    side = _side(engine)
    with _translated(engine, patience), engine.connect() as connection:
        connection = connection.execution_options(**side.writing(patience))
        whole = False
        try:
            with connection.begin():
                side.be_patient(connection, patience)
                yield connection
                whole = True
        except exc.DBAPIError:
            if whole:  # it ended while it was committed: nobody knows whether it was
                _in_doubt.add(engine)
            raise


_in_doubt: weakref.WeakSet[Engine] = weakref.WeakSet()


def again(connection: Connection) -> str:
    """What ends an INSERT of points. A point that is there already is a fault of the run's code, but for one case: the
    answer to a commit was lost on the way from a server, and the same points are written once more.
    """
    return words(connection).point_again if connection.engine in _in_doubt else ""


@contextmanager
def _translated(engine: Engine, patience: float = BUSY) -> Iterator[None]:
    try:
        yield
    except (exc.DBAPIError, sqlite3.Error) as error:
        translated = _side(engine).translate(engine, error, patience)
        if translated is None:
            raise
        raise translated from error


def retried(write: Callable[P, T]) -> Callable[P, T]:
    """A function of one transaction, run again when the database undid it because two writers met.

    Raises Conflict when they meet again and again.
    """

    def kept(value: Any) -> Any:
        return list(value) if isinstance(value, Iterator) else value  # the second time it would be empty

    @functools.wraps(write)
    def again(*args: P.args, **named: P.kwargs) -> T:
        args = tuple(map(kept, args))  # type: ignore[assignment]
        named = {name: kept(value) for name, value in named.items()}  # type: ignore[assignment]
        for meeting in range(MEETINGS):
            try:
                return write(*args, **named)
            except Conflict:
                time.sleep(_jitter.uniform(0.0, 0.01 * (meeting + 1)))
        return write(*args, **named)

    return again


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
    if not _side(connection.engine).is_known(connection):
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

    An upgrade keeps a backup beside an SQLite file, is refused while workers beat, and either happens whole or not at
    all. `scripts` are other migrations than our own, for tests.
    """
    engine, fresh = _place(url)
    try:
        found = None if fresh else _revision_to_upgrade(engine)
        if found is None:
            lease_from_environment()  # a bad one is refused before there is a database
        head, name = _head(scripts), _given(url)
        if found == head:
            return None
        if found is not None and found > head:
            raise InputError(f"{name} has schema {found}; this rnnq knows up to {head}", "install a newer rnnq")
        backup = _back_up(engine, found) if found else None
        with _translated(engine):
            done = _migrate(engine, head, root, scripts)
        if not done:
            return None
        kept = f"; backup: {backup}" if backup else ""
        return f"upgraded {name} from schema {found} to {head}{kept}" if found else f"created {name}"
    finally:
        engine.dispose()


def _place(url: str) -> tuple[Engine, bool]:
    """Where the database is or will be, and whether it is surely yet to be made. Raises InputError."""
    if is_server(url):
        return _postgres().open(url), False
    fresh = sqlite.make_room(url)
    if fresh:
        lease_from_environment()  # opening it makes the file
    return sqlite.engine(path_of(url)), fresh


def _revision_to_upgrade(engine: Engine) -> str | None:
    """The revision of a database that is there; None while it holds nothing. Raises InputError for a stranger's."""
    with reading(engine) as connection:  # one view: another process may be making this database right now
        found = _revision(connection)
        if found is None:
            _side(engine).refuse_strangers(connection, engine)
        return found


def _head(scripts: Path | None) -> str:
    if scripts is None:
        return SCHEMA
    from alembic.script import ScriptDirectory  # 0.1 s, and only needed here

    head = ScriptDirectory(str(scripts)).get_current_head()
    assert head is not None
    return head


def _back_up(engine: Engine, found: str) -> Path | None:
    """A copy of an SQLite file. On a server `pg_dump` makes one; an upgrade that fails leaves nothing there either."""
    with reading(engine) as connection:
        _refuse_while_workers_beat(connection)  # now, before it costs time and space, and again under the lock
    return sqlite.safety_copy(engine, found) if file_of(engine) else None


def _migrate(engine: Engine, head: str, root: str | None, scripts: Path | None) -> bool:
    """Run the migrations in one transaction; False when another process was faster."""
    side = _side(engine)
    with side.migrating(engine) as connection:
        before = _row_counts(connection)
        if "study" in before:
            if _revision(connection) == head:
                return False
            _refuse_while_workers_beat(connection)
        else:
            side.refuse_strangers(connection, engine)
        _run_alembic(connection, scripts)
        _refuse_losses(connection, before)
        if "study" not in before:
            _write_study(connection, root or side.root())
    return True


def _refuse_losses(connection: Connection, before: dict[str, int]) -> None:
    broken = _side(connection.engine).orphans(connection) if before else []
    if broken:
        raise DatabaseError(f"the migration left {len(broken)} rows without their parent; nothing was changed")
    after = _row_counts(connection)
    changed = [f"{t}: {n} -> {after.get(t, 0)}" for t, n in before.items() if after.get(t, 0) != n]
    if changed:
        raise DatabaseError("the migration changed numbers of rows (" + ", ".join(changed) + "); nothing was changed")


def _row_counts(connection: Connection) -> dict[str, int]:
    tables = sorted(_side(connection.engine).tables(connection))
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


# ----------------------------------------------------------------------------------------------- study, backup


def study(engine: Engine) -> tuple[str, float, Path]:
    """The study's id, its LEASE in seconds, and the folder that relative paths start from."""
    with reading(engine) as connection:
        row = connection.execute(text("SELECT id, lease_s, root FROM study")).one()
    file = file_of(engine)
    return row.id, float(row.lease_s), Path(row.root) if row.root else file.parent if file else Path.cwd()


def backup(
    engine: Engine, target: Path | None = None, watch: Callable[[int, int], None] | None = None, step: int = STEP
) -> Path:
    """A consistent copy of an SQLite file, also while workers write; returns where it is. See sqlite.backup.

    Raises InputError for a database on a server: `pg_dump` copies that.
    """
    if file_of(engine) is None:
        command = _postgres().dump_command(engine, str(target or "study.dump"))
        raise InputError(f"{shown(engine)} is copied by PostgreSQL's own program, also while workers write", command)
    with _translated(engine), reading(engine) as connection:
        return sqlite.backup(connection, target, watch, step)


def check(engine: Engine) -> list[str]:
    """What is wrong inside the database, in words; an empty list when nothing is."""
    with reading(engine) as connection:
        found: list[str] = _side(engine).check(connection)
    return found


def size(engine: Engine) -> int:
    """Bytes that the database takes on the disk."""
    with reading(engine) as connection:
        return int(_side(engine).size(connection))


def server(engine: Engine) -> dict[str, str]:
    """What a server says of itself: its version, and the settings by which it keeps what is written."""
    with reading(engine) as connection:
        return dict(_postgres().server(connection))
