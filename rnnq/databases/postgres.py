"""PostgreSQL: many hosts, many writers.

Who reads sees one state of things throughout (REPEATABLE READ, READ ONLY); who writes sees what is committed (READ
COMMITTED) and locks the rows that it decides on. Parameters are put into the text of a statement by the driver, so that
a parameter which is null, or compared with null, needs no type; and nothing is prepared, which poolers like.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, TextClause, bindparam, create_engine, event, exc, text
from sqlalchemy.engine import make_url

from rnnq import host
from rnnq.databases.words import NOW, POSTGRES_NOW
from rnnq.errors import Conflict, DatabaseError, InputError, RnnqError

BUSY = 60.0  # seconds to wait for a lock
BATCH = 500  # statements that are sent at once
LOCK = 0x726E6E71  # "rnnq": who makes or upgrades a database holds this advisory lock

# A host that is gone without a word is noticed within a minute, and so are the locks of a client that is: on that of a
# stage others would wait. Commits are waited for also where the server is set to lose some at a power cut.
_SESSION = f"""
SET lock_timeout = {int(BUSY * 1000)}; SET idle_in_transaction_session_timeout = {int(BUSY * 1000)}; SET jit = off;
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
_NETWORK = {"connect_timeout": 10, "keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 4}

READING: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
SCRATCH: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ"}  # reading, with temporary tables


def writing(patience: float) -> Mapping[str, Any]:
    """Execution options of a transaction that writes; see `be_patient`."""
    return {"isolation_level": "READ COMMITTED", "rnnq_write": True}  # told as on SQLite: listeners count writes


# --------------------------------------------------------------------------------------------------- opening


def is_address(url: str) -> bool:
    """Whether a database is named by an address of PostgreSQL."""
    return re.match(r"postgres(ql)?(\+\w*)?:", url, re.IGNORECASE) is not None


def open(url: str) -> Engine:
    """The database at an address; nothing is asked of the server yet. Raises InputError."""
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError) as error:
        raise InputError(f"{host.masked(url)!r} is no database address", _EXAMPLE) from error
    if parsed.drivername not in ("postgresql+psycopg", "postgresql", "postgres") or not parsed.database:
        what = "names no database" if parsed.database is None else "asks for another driver than psycopg"
        raise InputError(f"{_shown(parsed)} {what}", _EXAMPLE)
    return _engine(parsed.set(drivername="postgresql+psycopg"))


_EXAMPLE = "postgresql+psycopg://user@host:5432/name"


def shown(engine: Engine) -> str:
    """The database for people: its address, without a password."""
    return _shown(engine.url)


def _shown(url: URL) -> str:
    if "password" in url.query:
        url = url.update_query_dict({"password": "***"})
    return url.render_as_string(hide_password=True)


def _engine(url: URL) -> Engine:
    try:
        from psycopg import ClientCursor  # 0.1 s, and only needed here
    except ImportError as error:
        raise InputError(
            f"{_shown(url)}: psycopg is not installed ({error})", 'pip install "rnnq[postgres]"'
        ) from error
    settings: dict[str, Any] = {name: value for name, value in _NETWORK.items() if name not in url.query}
    settings |= {} if "application_name" in url.query else {"application_name": "rnnq"}
    made = create_engine(
        url, connect_args={"cursor_factory": ClientCursor, **settings}, pool_size=4, use_native_hstore=False
    )
    event.listen(made, "connect", _on_connect)
    event.listen(made, "before_cursor_execute", _in_our_words, retval=True)
    event.listen(made, "do_executemany", _at_once)
    return made


def _on_connect(connection: Any, _record: Any) -> None:
    from psycopg.adapt import Loader

    class Number(Loader):
        """A sum of whole numbers is numeric: as SQLite says it, a whole number, or a float."""

        def load(self, data: Any) -> int | float:
            words = bytes(data).decode()
            return int(words) if words.lstrip("-").isdigit() else float(words)

    connection.adapters.register_loader("numeric", Number)
    connection.autocommit = True
    connection.execute(_SESSION)
    connection.autocommit = False


def _in_our_words(
    _connection: Any, _cursor: Any, statement: str, parameters: Any, context: Any, _many: bool
) -> tuple[str, Any]:
    statement = statement.replace(NOW, POSTGRES_NOW)
    if isinstance(getattr(context.compiled, "statement", None), TextClause):
        statement = statement.replace("::INTEGER", "::BIGINT")  # SQLAlchemy takes each number of a list for a small one
    return statement, parameters


def _at_once(cursor: Any, statement: str, parameters: Sequence[Any], _context: Any) -> bool:
    """Many rows in few messages: the network's time counts for each message."""
    for start in range(0, len(parameters), BATCH):
        cursor.execute("; ".join(cursor.mogrify(statement, one) for one in parameters[start : start + BATCH]))
    return True


# ---------------------------------------------------------------------------------------------- transactions


def be_patient(connection: Connection, patience: float) -> None:
    """Wait for each lock of this transaction for so many seconds, where these are not the usual ones."""
    if patience != BUSY:
        connection.execute(text(f"SET LOCAL lock_timeout = {max(1, int(patience * 1000))}"))


_AWAY = ("08", "53", "57", "58", "25006")  # connection, resources, the server's operator, the system, a standby
_CONFLICTS = ("40P01", "40001")  # deadlock, serialization failure


def translate(engine: Engine, error: exc.DBAPIError, patience: float) -> RnnqError | None:
    """The same as an error for people; None for one that is a fault of ours."""
    name, cause = shown(engine), error.orig
    code = getattr(cause, "sqlstate", None)
    why = "; ".join(line.strip() for line in str(cause).splitlines() if line.strip())
    if code in _CONFLICTS:
        return Conflict(f"two writers of {name} met: {why}")
    if code == "55P03":
        return DatabaseError(f"a lock in {name} was not free for {patience:g} s", "another process holds it")
    if code == "42501":
        return InputError(f"{name}: {why}", "the user of the address needs to own the database, or its schema")
    if code is None and isinstance(error, exc.OperationalError):
        return _unreachable(name, why)
    if code is not None and code.startswith("XX"):
        return InputError(f"{name} is not a usable database: {why}", "restore it from a backup")
    if error.connection_invalidated or (code is not None and code.startswith(_AWAY)):
        return DatabaseError(f"the database {name} failed: {why}")
    return None  # an integrity error is a bug of ours: it keeps its whole trace


def _unreachable(name: str, why: str) -> RnnqError:
    """A connection that was not made, or broke. Only the server's words tell what cannot heal by itself."""
    if re.search(r'FATAL:.*(authentication|no pg_hba\.conf entry|role ".*" does not exist)', why):
        return InputError(f"{name}: {why}", "the user is in the address, the password in ~/.pgpass or PGPASSWORD")
    if re.search(r'FATAL:.*database ".*" does not exist', why):
        return InputError(f"{name}: {why}", "`createdb` makes one; --db names another")
    return DatabaseError(f"the database {name} cannot be reached: {why}", "is the server up, and the address right?")


# ------------------------------------------------------------------------------------------------- migrating


def is_known(connection: Connection) -> bool:
    """Whether the database has the tables by which a study is known."""
    known = "SELECT to_regclass('alembic_version') IS NOT NULL AND to_regclass('study') IS NOT NULL"
    return bool(connection.execute(text(known)).scalar())


def root() -> str:
    """Where the files of a new study go: the folder in which it is made, the same path on every host."""
    return str(Path.cwd())


def tables(connection: Connection) -> set[str]:
    """The names of our tables and of Alembic's that are there, whoever made them."""
    sql = """SELECT relname FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
             AND pg_catalog.pg_table_is_visible(oid) AND relname IN :ours"""
    statement = text(sql).bindparams(bindparam("ours", _ours(), expanding=True))
    return {str(name) for name in connection.execute(statement).scalars()} - {"points"}


def _ours() -> list[str]:
    from rnnq.tables import metadata  # 0.02 s, and only needed here

    return ["alembic_version", "points", *metadata.tables]


def refuse_strangers(connection: Connection, engine: Engine) -> None:
    """Raises InputError for a database without a study in which a name of ours is taken."""
    taken = sorted(tables(connection))
    if taken:
        hint = "give the study a database of its own, or a schema: ?options=-csearch_path%3Dname in the address"
        raise InputError(f"{shown(engine)} has tables of such names, and they are not rnnq's: {', '.join(taken)}", hint)


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A write transaction of which there is one at a time."""
    with engine.connect() as connection:
        connection = connection.execution_options(**writing(BUSY))
        with connection.begin():
            # whoever waits may wait for longer than for a row: an upgrade takes its time
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
            yield connection


def orphans(connection: Connection) -> list[str]:
    """Rows that name a row which is not there, in words: where somebody has switched the foreign keys off."""
    from rnnq.tables import metadata

    found = []
    for table in metadata.sorted_tables:
        for key in sorted(table.foreign_keys, key=lambda key: key.parent.name):
            child, parent = key.parent, key.column
            sql = f"""SELECT count(*) FROM {table.name} AS child WHERE child.{child.name} IS NOT NULL AND NOT EXISTS
                      (SELECT 1 FROM {parent.table.name} AS parent WHERE parent.{parent.name} = child.{child.name})"""
            n = int(connection.execute(text(sql)).scalar_one())
            if n:
                found.append(f"{table.name}: {n:,} rows name a row of {parent.table.name} that is not there")
    return found


_BROKEN = """
SELECT 'index ' || indexrelid::regclass || ' is not valid' FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
WHERE NOT (indisvalid AND indisready) AND relname IN :ours AND pg_table_is_visible(pg_class.oid)
UNION ALL
SELECT 'constraint ' || conname || ' of ' || relname || ' was never tested' FROM pg_constraint
JOIN pg_class ON pg_class.oid = conrelid
WHERE NOT convalidated AND relname IN :ours AND pg_table_is_visible(pg_class.oid)
UNION ALL
SELECT DISTINCT 'the foreign keys of ' || relname || ' are switched off' FROM pg_trigger
JOIN pg_class ON pg_class.oid = tgrelid
WHERE tgisinternal AND tgenabled = 'D' AND relname IN :ours AND pg_table_is_visible(pg_class.oid)
"""


def check(connection: Connection) -> list[str]:
    """What is wrong inside the database, in words; an empty list when nothing is.

    The server looks after its files itself (`pg_amcheck` looks through them); here: tables that are missing, indexes
    that are not valid, constraints that do not hold.
    """
    missing = sorted(set(_ours()) - {"points"} - tables(connection))
    if missing:
        return [f"the table {name} is missing" for name in missing]
    statement = text(_BROKEN.replace("::regclass", "\\:\\:regclass")).bindparams(
        bindparam("ours", _ours(), expanding=True)
    )
    return [str(line) for line in connection.execute(statement).scalars()] + orphans(connection)


def size(connection: Connection) -> int:
    """Bytes on the server's disk."""
    return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())


def server(connection: Connection) -> dict[str, str]:
    """What the server says of itself, and of how it keeps what is written."""
    names = ("server_version", "fsync", "full_page_writes", "synchronous_commit")
    columns = ", ".join(f"current_setting('{name}') AS {name}" for name in names)
    return dict(connection.execute(text(f"SELECT {columns}")).one()._mapping)


def dump_command(engine: Engine, target: str) -> str:
    """The command that copies the database into a file."""
    url, kept = engine.url, {name: value for name, value in engine.url.query.items() if name != "password"}
    plain = URL.create("postgresql", url.username, None, url.host, url.port, url.database, kept)
    return f"pg_dump --format=custom --file={shlex.quote(target)} {shlex.quote(plain.render_as_string())}"
