"""The scripts that start workers, with real processes and a real Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

STUDY = """
import rnnq
stage = rnnq.stage("long", "dynamics", rnnq.grid(n_layers=[1, 2]),
                   base=dict(state_size=8, batch_size=4, window=32, steps=10_000_000, log_every=10))
"""


WAITING = """
import os
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def wait(config):
    while not os.path.exists("go"):
        yield {"loss": 1.0}
    yield {"loss": 1.0}

stage = rnnq.stage("waits", wait, rnnq.grid(seed=[0, 1]))
"""


DEAF = """
import os
import time
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def deaf(config):
    yield {"loss": 2.0}
    open(f"deaf{config.seed}", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.05)
    yield {"loss": 1.0}

stage = rnnq.stage("deaf", deaf, rnnq.grid(seed=[0, 1]))
"""


def start(
    folder: Path, *words: str, environment: Mapping[str, str] | None = None, script: str = "local.sh"
) -> subprocess.Popen[str]:
    """workers/local.sh as a shell starts it: in a process group of its own, which Ctrl-C reaches whole."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(ROOT / "workers" / script), *words],
        cwd=folder,
        env={**os.environ, "PATH": path, **(environment or {})},
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
        wait_for(database, trains, 2, script)

        os.killpg(script.pid, number)
        said = script.stderr.read()

        assert script.wait() == 0, said
        assert said.count("given back at step") == 2
        assert database.execute("SELECT DISTINCT state FROM runs").fetchall() == [("pending",)]
        assert database.execute("SELECT DISTINCT ended FROM attempts").fetchall() == [("released",)]
    database.close()
    script.stderr.close()


def processes_of(pid: int) -> list[int]:
    """The children of a process, as the kernel lists them."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def lead(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """`rnnq worker --processes ...`."""
    line = [sys.executable, "-m", "rnnq", "worker", *words]
    environment = {**os.environ, **environment}
    return subprocess.Popen(line, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def long(cli: Cli, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A study of two long runs, with a lease of a second."""
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "long.py").write_text(STUDY)
    cli("init", "defs/long.py", RNNQ_LEASE_S="1")
    database = sqlite3.connect(tmp_path / "experiments.db")
    yield database
    database.close()


def wait_for(database: sqlite3.Connection, sql: str, wanted: object, process: subprocess.Popen[str] | None) -> None:
    while database.execute(sql).fetchone()[0] != wanted:
        assert process is None or process.poll() is None
        time.sleep(0.02)  # a look now and then: the processes want the cores


SAVED = "SELECT count(*) FROM runs WHERE state = 'running' AND checkpoint IS NOT NULL"
PENDING = "SELECT count(*) FROM runs WHERE state = 'pending'"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_are_started_and_stopped_together(long: sqlite3.Connection, tmp_path: Path, number: int) -> None:
    leader = lead(tmp_path, "--processes", "2", "--checkpoint-every", "50")
    assert leader.stderr is not None
    wait_for(long, SAVED, 2, leader)
    assert len(processes_of(leader.pid)) == 2

    leader.send_signal(number)
    said = leader.stderr.read()

    assert leader.wait() == 0, said
    assert said.count("given back at step") == 2
    assert long.execute(PENDING).fetchone() == (2,)
    leader.stderr.close()


def test_a_step_whose_every_process_gets_the_signals_gives_back_every_run(
    long: sqlite3.Connection, tmp_path: Path
) -> None:
    """As SLURM does when the time is up: a warning, then SIGTERM. The leader passes on what they had."""
    leader = lead(tmp_path, "--processes", "2", "--checkpoint-every", "50")
    assert leader.stderr is not None
    wait_for(long, SAVED, 2, leader)
    everyone = [leader.pid, *processes_of(leader.pid)]

    for number in (signal.SIGUSR1, signal.SIGTERM):
        for pid in everyone:
            with contextlib.suppress(ProcessLookupError):  # it has left at the first one
                os.kill(pid, number)
    said = leader.stderr.read()

    assert leader.wait() == 0, said
    assert said.count("given back at step") == 2
    assert long.execute("SELECT DISTINCT ended FROM attempts").fetchall() == [("released",)]
    leader.stderr.close()


def test_at_a_second_signal_the_processes_leave_at_once(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "deaf.py").write_text(DEAF)
    cli("init", "defs/deaf.py")
    leader = lead(tmp_path, "--processes", "2")
    assert leader.stderr is not None
    while not (tmp_path / "deaf0").exists() or not (tmp_path / "deaf1").exists():
        assert leader.poll() is None
        time.sleep(0.02)  # a look now and then: the processes want the cores
    for _ in range(3):
        leader.send_signal(signal.SIGUSR1)
    leader.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        leader.wait(0.5)  # nothing happens: their runs end no step
    leader.send_signal(signal.SIGINT)
    assert leader.wait(30) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    leader.stderr.close()


def test_slurm_warns_the_shell_and_every_worker_saves_and_gives_back_its_run(
    long: sqlite3.Connection, tmp_path: Path
) -> None:
    script = start(tmp_path, "2", "--checkpoint-every", "50", script="slurm.sh")
    assert script.stderr is not None
    wait_for(long, SAVED, 2, script)

    script.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B:USR1 does
    said = script.stderr.read()

    assert script.wait() == 0, said
    assert said.count("given back at step") == 2
    assert long.execute(PENDING).fetchone() == (2,)
    script.stderr.close()


def test_processes_whose_leader_was_killed_give_back_their_runs_and_leave(
    long: sqlite3.Connection, tmp_path: Path
) -> None:
    leader = lead(tmp_path, "--processes=2", "--checkpoint-every", "50")
    assert leader.stderr is not None
    wait_for(long, SAVED, 2, leader)
    leader.kill()
    wait_for(long, "SELECT count(*) FROM workers WHERE state = 'left' AND message = 'asked to'", 2, None)
    assert long.execute(PENDING).fetchone() == (2,)
    assert long.execute("SELECT DISTINCT ended FROM attempts").fetchall() == [("released",)]
    leader.wait()
    leader.stderr.close()


def test_what_is_wrong_with_the_options_is_said_once_for_all_processes(cli: Cli) -> None:
    assert cli("worker", "--processes", "3", code=2).stderr.count("error: ") == 1
    cli("init", str(ROOT / "defs" / "demo.py"), "--defs", str(ROOT / "defs"))
    assert cli("worker", "--processes", "3", "--gpu", "7", code=2).stderr.count("there is no GPU 7") == 1


def test_one_worker_is_asked_to_leave_and_the_other_goes_on(long: sqlite3.Connection, cli: Cli, tmp_path: Path) -> None:
    leader = lead(tmp_path, "--processes", "2", "--checkpoint-every", "50")
    assert leader.stderr is not None
    wait_for(long, SAVED, 2, leader)
    [(first,)] = long.execute("SELECT worker FROM runs WHERE id = 1").fetchall()

    assert f"asked {first} to leave" in cli("worker", "--stop", first).stderr
    wait_for(long, f"SELECT state FROM workers WHERE id = '{first}'", "left", leader)
    [(row,)] = long.execute("SELECT ended FROM attempts WHERE run_id = 1 AND attempt = 1").fetchall()
    assert row == "released"
    assert long.execute("SELECT count(*) FROM workers WHERE state = 'live'").fetchone() == (1,)

    assert "asked 1 worker" in cli("worker", "--stop", "all").stderr
    assert leader.wait() == 0
    assert long.execute(PENDING).fetchone() == (2,)
    assert "no worker is live" in cli("worker", "--stop", "all").stderr
    leader.stderr.close()


def test_a_worker_that_is_to_leave_after_its_run_ends_it_and_begins_no_other(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "wait.py").write_text(WAITING)
    cli("init", "defs/wait.py", RNNQ_LEASE_S="1")
    with sqlite3.connect(tmp_path / "experiments.db") as database:
        worker = lead(tmp_path, "--no-bar")
        assert worker.stderr is not None
        wait_for(database, "SELECT count(*) FROM runs WHERE state = 'running'", 1, worker)
        cli("worker", "--stop", "all", "--after-run")
        wait_for(database, "SELECT beat_at > (SELECT max(at) FROM changes) + 0.3 FROM workers", 1, worker)
        assert database.execute("SELECT state FROM runs ORDER BY id").fetchall() == [("running",), ("pending",)]
        (tmp_path / "go").touch()
        assert worker.wait() == 0
        assert database.execute("SELECT state FROM runs ORDER BY id").fetchall() == [("done",), ("pending",)]
        worker.stderr.close()
    database.close()


def test_workers_are_started_on_every_visible_gpu(cli: Cli, tmp_path: Path) -> None:
    """There is none here: each leader says which one it lacks."""
    cli("init", str(ROOT / "defs" / "demo.py"), "--defs", str(ROOT / "defs"))
    script = start(tmp_path, "2", environment={"CUDA_VISIBLE_DEVICES": "4,7,5"})
    assert script.stderr is not None
    said = script.stderr.read()
    assert script.wait() == 2
    assert sorted(line for line in said.splitlines() if line.startswith("error")) == [
        f"error: there is no GPU {gpu}: no GPU here" for gpu in range(3)
    ]
    script.stderr.close()


@pytest.mark.parametrize("visible", ["", "-1"])
def test_where_no_gpu_is_visible_the_workers_are_on_the_cpu(cli: Cli, tmp_path: Path, visible: str) -> None:
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "wait.py").write_text(WAITING)
    (tmp_path / "go").touch()
    cli("init", "defs/wait.py")
    script = start(tmp_path, "2", environment={"CUDA_VISIBLE_DEVICES": visible})
    assert script.stderr is not None
    said = script.stderr.read()
    assert script.wait() == 0, said
    assert " on cpu" in said
    assert said.count("done, loss") == 2
    script.stderr.close()


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh"])
def test_a_number_of_workers_is_asked_for(tmp_path: Path, name: str) -> None:
    script = start(tmp_path, script=name)
    assert script.stderr is not None
    assert script.stderr.read().startswith("usage: ")
    assert script.wait() == 2
    script.stderr.close()
