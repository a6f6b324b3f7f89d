"""What tests share: a study in a temporary folder, runs to put into it, and the command line as a user types it.

Under RNNQ_NO_SKIP=1 a skipped test fails: a server that is not there must not look like a pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from rnnq import db, queue
from tests import postgres

ROOT = Path(__file__).parent.parent

# what a developer's shell may set must not reach the tests
for name in ("RNNQ_DB", "RNNQ_LEASE_S", "RNNQ_CHECKPOINT_EVERY", "RNNQ_CACHE", "RNNQ_ENWIK8_URL"):
    os.environ.pop(name, None)
PROVENANCE = {
    "host": "testhost",
    "device": "cpu",
    "git_commit": None,
    "git_dirty": None,
    "command_line": "pytest",
    "versions": "{}",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if os.environ.get("RNNQ_NO_SKIP") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under RNNQ_NO_SKIP=1: {report.longrepr}"
    return report


BOTH = (
    "test_queue",
    "test_query",
    "test_frame",
    "test_promote",
    "test_gates",
)  # modules whose tests run on both databases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of BOTH that need a database run on each, but for those that are marked sqlite: it has what others lack.
    Of other modules, those that are marked both.
    """
    marked = metafunc.definition.get_closest_marker("both")
    if "kind" in metafunc.fixturenames and (marked or metafunc.module.__name__.rpartition(".")[2] in BOTH):
        only = metafunc.definition.get_closest_marker("sqlite")
        metafunc.parametrize("kind", ["sqlite"] if only else ["sqlite", "postgres"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    """The database that a test runs on: sqlite or postgres."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with an empty study, to be copied."""
    made = tmp_path_factory.mktemp("empty") / "experiments.db"
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RNNQ_LEASE_S", raising=False)
        db.upgrade(str(made))
    return made


@pytest.fixture
def address(kind: str, empty: Path, tmp_path: Path) -> Iterator[str]:
    """Where a new, empty study is."""
    if kind == "sqlite":
        yield shutil.copy(empty, tmp_path)
        return
    url = postgres.study(tmp_path)
    yield url
    postgres.drop(url)


@pytest.fixture
def engine(address: str) -> Iterator[Engine]:
    """A new, empty study, opened."""
    opened = db.open(address)
    yield opened
    opened.dispose()


def address_of(engine: Engine) -> str:
    """Where another process finds the same study."""
    return str(db.file_of(engine) or engine.url.render_as_string(hide_password=False))


def new_runs(n: int, first: int = 0) -> list[queue.NewRun]:
    """Runs without meaning, told apart by their seed."""
    return [
        queue.NewRun(
            label=f"run{i}",
            config=f'{{"seed":{i}}}',
            fingerprint=f"f{i}",
            group_key="g",
            seed=i,
            pack_key=None,
            budget=10,
        )
        for i in range(first, first + n)
    ]


def new_stage(n: int = 1, name: str = "s", **changes: object) -> queue.NewStage:
    """A stage of n such runs."""
    values: dict[str, object] = {
        "name": name,
        "family": "f",
        "version": 1,
        "family_in_source": False,
        "has_rule": False,
        "source": None,
        "source_sha256": None,
        "fields": {"seed": "int"},
        "metrics": [{"name": "loss", "unit": "nats", "better": "min", "primary": True}],
        "seed_fields": ["seed"],
        "data": {},
        "runs": new_runs(n),
    }
    return queue.NewStage(**(values | changes))  # type: ignore[arg-type]


def claim_one(engine: Engine, worker: str = "w", now: float | None = None) -> queue.Claim:
    """Claim the next run for a worker that is registered if need be."""
    with db.reading(engine) as connection:
        known = connection.execute(text("SELECT 1 FROM workers WHERE id = :id"), {"id": worker}).first()
    if not known:
        queue.register(engine, worker, "cpu", {})
    [claim] = queue.claim(engine, worker, PROVENANCE, now=now)
    return claim


Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Cli:
    """`rnnq ...` as a real process in a temporary folder: cli("init", "defs/x.py", code=0)."""
    place = {} if kind == "sqlite" else {"RNNQ_DB": request.getfixturevalue("address")}

    def run(*words: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "rnnq", *words],
            cwd=tmp_path,
            env={**os.environ, **place, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if code is not None:
            assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
