"""The scripts that start workers, with real processes and a real Ctrl-C."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

STUDY = """
import rnnq
stage = rnnq.stage("long", "dynamics", rnnq.grid(n_layers=[1, 2]),
                   base=dict(state_size=8, batch_size=4, window=32, steps=10_000_000, log_every=10))
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """workers/local.sh as a shell starts it: in a process group of its own, which Ctrl-C reaches whole."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(ROOT / "workers" / "local.sh"), *words],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_every_worker_save_and_give_back_its_run(cli: Cli, tmp_path: Path, number: int) -> None:
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "long.py").write_text(STUDY)
    cli("init", "defs/long.py")
    with sqlite3.connect(tmp_path / "experiments.db") as database:
        # each worker has both runs to choose from: a checkpoint every few steps tells that it trains
        script = start(tmp_path, "2", "--checkpoint-every", "50", "--no-bar")
        assert script.stderr is not None
        for _ in range(2):
            assert script.stderr.readline().startswith("worker ")
        trains = "SELECT count(*) FROM runs WHERE checkpoint IS NOT NULL"
        while database.execute(trains).fetchone()[0] < 2:
            assert script.poll() is None

        os.killpg(script.pid, number)
        said = script.stderr.read()

        assert script.wait() == 0, said
        assert said.count("given back at step") == 2
        assert database.execute("SELECT DISTINCT state FROM runs").fetchall() == [("pending",)]
        assert database.execute("SELECT DISTINCT ended FROM attempts").fetchall() == [("released",)]
    database.close()
    script.stderr.close()


def test_a_number_of_workers_is_asked_for(tmp_path: Path) -> None:
    script = start(tmp_path)
    assert script.stderr is not None
    assert script.stderr.read().startswith("usage: ")
    assert script.wait() == 2
    script.stderr.close()
