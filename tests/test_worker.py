"""What a worker does with good and bad runs, when it leaves, what code it runs, and what it writes down about itself.

Workers that are killed, stopped or asked to leave in mid-run are in tests/races/test_kills.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rnnq import db
from tests.processes import Study, pseudo_text

# a family whose runs behave as their mood says
MOODS = """
import os
import signal
import sys
import time

import torch

import rnnq


class Config(rnnq.Config):
    mood: str = "good"
    steps: int = 3


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("an error that cannot say what it is")


@rnnq.family(Config)
def moods(config):
    for step in range(1, config.steps + 1):
        yield {"loss": 1 / step}
    BAD.get(config.mood, lambda: None)()
    if config.mood == "diverges":
        yield {"loss": float("nan")}
    if config.mood == "names numbers":
        until = time.monotonic() + 1.1  # points are handed over once a second
        while time.monotonic() < until:
            yield {1: 2.0}
        yield {"loss": 0.5, 1: 2.0}


def raises():
    return {}["nothing here"]


def strange():
    raise ValueError("a name that is no text: \\udcff, and a NUL: \\0")


def unspeakable():
    raise Unspeakable


def out_of_memory():
    raise MemoryError


def cublas_out_of_memory():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


BAD = {
    "raises": raises,
    "strange": strange,
    "unspeakable": unspeakable,
    "leaves": lambda: sys.exit(0),
    "memory": out_of_memory,
    "torch's memory": lambda: torch.empty(1 << 55),
    "cuBLAS's memory": cublas_out_of_memory,
    "kills": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "diverges": lambda: None,
    "names numbers": lambda: None,
}


class Unbuilt(rnnq.Family):
    Config = Config
    name = "unbuilt"

    def __init__(self):
        raise OSError("its own file is missing")


stage = rnnq.stage("moods", moods, [{"mood": mood} for mood in MOODS_HERE])
"""


def moods(*names: str) -> str:
    """The definition file with runs of such moods, in this order."""
    return MOODS.replace("MOODS_HERE", repr(list(names)))


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as study:
        yield study


# -------------------------------------------------------------------------------------------------- bad runs

ENDS = {  # mood -> cause, what its message says
    "good": (None, None),
    "raises": ("bug", "KeyError: 'nothing here'"),
    "strange": ("bug", r"ValueError: a name that is no text: \udcff, and a NUL: \x00"),
    "unspeakable": ("bug", "Unspeakable: "),
    "leaves": ("bug", "SystemExit: 0"),
    "memory": ("oom", "MemoryError: "),
    "torch's memory": ("oom", "can't allocate memory"),
    "cuBLAS's memory": ("oom", "CUBLAS_STATUS_ALLOC_FAILED"),
    "diverges": ("diverged", "loss is nan at step 4"),
    "names numbers": ("bug", "step 4 yielded {1: 2.0}"),
    "good, too": (None, None),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, str]]:
    """A study of a run of each mood after one `rnnq worker`, and what it wrote."""
    with Study(tmp_path_factory.mktemp("bad")) as study:
        study.environment["RNNQ_RETRY_S"] = "0.01"
        study.rnnq("init", study.define(moods(*ENDS)))
        yield study, study.rnnq("worker", code=1)


@pytest.mark.parametrize("mood", ENDS)
def test_one_bad_run_is_written_down_whole_and_ends_no_other(bad, mood):
    study, output = bad
    run = list(ENDS).index(mood) + 1
    row, (cause, message) = study.run(run), ENDS[mood]
    # what may heal is tried again, twice
    assert len(row["attempts"]) == (3 if cause == "oom" else 1)
    attempt = row["attempts"][-1]
    assert row["config"]["mood"] == mood
    if cause is None:
        assert (row["state"], row["loss"], attempt["ended"]) == ("done", 1 / 3, "done")
        return
    assert (row["state"], row["cause"], row["failures"]) == ("failed", cause, len(row["attempts"]))
    assert (attempt["ended"], attempt["cause"]) == ("failed", cause)
    assert message in row["message"]
    assert message in attempt["message"]
    assert attempt["traceback"].startswith("Traceback (most recent call last)")
    assert f"run {run} moods: {row['label']}: FAILED ({cause})" in output


def test_the_trace_of_a_failed_run_leads_to_the_line_that_raised(bad):
    study, _ = bad
    trace = study.run(2)["attempts"][0]["traceback"]
    assert 'study.py", line' in trace
    assert "in raises" in trace
    assert 'return {}["nothing here"]' in trace
    assert trace.endswith("KeyError: 'nothing here'\n")


def test_a_run_whose_family_cannot_be_made_fails_alone(study):
    study.rnnq("init", study.define(moods("good").replace('"moods", moods', '"unbuilt", Unbuilt'), "unbuilt.py"))
    study.rnnq("init", study.define(moods("good")))
    study.rnnq("worker", code=1)
    assert study.states() == {1: "failed", 2: "done"}
    assert study.ended() == [("failed", "bug")]
    assert "its own file is missing" in study.run()["message"]


BROKEN = """
import os
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def works_elsewhere(config):
    if not os.path.exists("mended"):
        raise RuntimeError(f"no kernel image is available for run {config.seed}")
    yield {"loss": 1.0}

stage = rnnq.stage("broken", works_elsewhere, rnnq.grid(seed=list(range(12))))
"""


def test_a_worker_on_which_several_runs_fail_at_once_leaves_and_hands_them_back(study):
    study.rnnq("init", study.define(BROKEN))
    said = study.rnnq("worker", code=1)
    assert "error: 5 different runs failed within seconds on this worker" in said
    assert "no kernel image is available for run 4" in said
    assert "handed back uncounted: runs 1, 2, 3, 4, 5" in said
    assert set(study.states().values()) == {"pending"}
    assert study.rows("SELECT DISTINCT failures FROM runs") == [{"failures": 0}]
    [attempt] = study.run(1)["attempts"]
    assert attempt["ended"] == "released"
    assert attempt["traceback"].startswith("Traceback")
    assert "stopped itself: 5 different runs" in study.rows("SELECT message FROM workers")[0]["message"]
    shown = study.rnnq("status")
    assert "stopped itself 0 s ago: 5 different runs failed" in re.sub(r"\d s ago", "0 s ago", shown)
    assert "stopped itself: 5 different runs" in study.rnnq("workers")

    (study.folder / "mended").touch()
    study.rnnq("worker")
    assert set(study.states().values()) == {"done"}
    assert "stopped itself" not in study.rnnq("status")


def test_runs_that_fail_on_a_second_worker_stay_failed(study):
    study.rnnq("init", study.define(BROKEN))
    study.rnnq("worker", code=1)
    said = study.rnnq("worker", code=1)  # the first five again, and five that nobody has tried before
    assert "handed back uncounted: runs 6, 7, 8, 9, 10" in said
    assert [run for run, state in study.states().items() if state == "failed"] == [1, 2, 3, 4, 5]


def test_a_worker_that_is_to_keep_going_blames_the_runs(study):
    study.rnnq("init", study.define(BROKEN))
    study.rnnq("worker", "--keep-going", code=1)
    assert set(study.states().values()) == {"failed"}


def test_runs_that_fail_at_different_places_or_beside_good_ones_are_to_blame_themselves(study):
    study.rnnq("init", study.define(BROKEN.replace('os.path.exists("mended")', "config.seed % 4 == 0")))
    study.define(moods("raises", "strange", "unspeakable", "leaves", "names numbers"), "other.py")
    study.rnnq("init", "defs/other.py")
    study.rnnq("worker", code=1)
    assert list(study.states().values()).count("failed") == 9 + 5
    assert "pending" not in study.states().values()


DYNAMICS = """
import rnnq

stage = rnnq.stage("bytes", "dynamics", [dict(corpus="text"), dict(corpus="text", lr=10.0)], base=dict(
    state_size=8, window=16, batch_size=2, steps=40, log_every=10, eval_every=20))
"""


def test_a_training_that_diverges_fails_and_the_next_one_is_fine(study):
    (study.folder / "text").write_bytes(pseudo_text(4000))
    wild = DYNAMICS.replace("lr=10.0", "lr=10.0, state_size=64, n_layers=8, steps=400")
    study.rnnq("init", study.define(wild))
    study.write("UPDATE runs SET priority = 1 WHERE id = 2")
    study.rnnq("worker", code=1)
    assert study.states() == {1: "done", 2: "failed"}
    assert study.ended(2) == [("failed", "diverged")]
    assert "the training loss is" in study.run(2)["message"]
    assert study.run(2)["checkpoint"] is None


def test_a_corpus_that_changed_fails_its_runs_before_the_first_step(study):
    text = study.folder / "text"
    text.write_bytes(pseudo_text(4000))
    study.rnnq("init", study.define(DYNAMICS))
    study.rnnq("init", study.define(moods("good"), "moods.py"))
    text.write_bytes(pseudo_text(4000, seed=1))
    study.rnnq("worker", code=1)
    assert study.states() == {1: "failed", 2: "failed", 3: "done"}
    row = study.run(1)
    assert (row["cause"], row["steps_done"], row["curves"]) == ("data", 0, {})
    assert hashlib.sha256(text.read_bytes()).hexdigest()[:12] in row["message"]
    assert study.ended(1) == [("failed", "data")]


def test_a_corpus_that_changed_fails_a_run_that_is_resumed(study):
    text = study.folder / "text"
    text.write_bytes(pseudo_text(4000))
    study.rnnq("init", study.define(DYNAMICS))
    study.worker({"at": "saved", "step": 20, "do": "kill"}, every=10).end(-signal.SIGKILL)
    text.write_bytes(pseudo_text(4001))
    study.rnnq("worker", code=1)
    assert study.ended(1) == [("lost", "lost"), ("failed", "data")]
    assert study.named(1)["checkpoint"]["step"] == 20, "nothing of it is lost"


def test_a_stage_that_cannot_be_trained_here_is_left_alone_and_others_are_trained(study):
    text = study.folder / "text"
    text.write_bytes(pseudo_text(4000))
    study.rnnq("init", study.define(DYNAMICS))
    study.rnnq("init", study.define(moods("good")))
    text.unlink()

    output = study.rnnq("worker", code=2)

    assert "cannot be trained here, and is left to others" in output
    assert "there is no file" in output
    rows = study.rows("SELECT stage, state, failures FROM runs ORDER BY id")
    assert {(row["state"], row["failures"]) for row in rows if row["stage"] == "bytes"} == {("pending", 0)}
    assert {row["state"] for row in rows if row["stage"] != "bytes"} == {"done"}


def test_a_run_that_kills_its_worker_three_times_in_a_row_fails_and_the_queue_goes_on(study):
    study.rnnq("init", study.define(moods("kills", "good")))
    for _ in range(3):
        study.start("rnnq", "worker").end(-signal.SIGKILL)
    assert study.run(1)["state"] == "running"
    output = study.rnnq("worker")  # it trained nothing that failed
    assert "run 1: taken back from" in output
    row = study.run(1)
    assert (row["state"], row["cause"], row["attempt"], row["failures"]) == ("failed", "lost", 3, 1)
    assert "lost 3 times in a row without a new checkpoint" in row["message"]
    assert study.ended(1) == [("lost", "lost")] * 3
    assert study.run(2)["state"] == "done"


def test_a_new_checkpoint_makes_good_for_the_losses_before_it(study):
    (study.folder / "text").write_bytes(pseudo_text(4000))
    study.rnnq("init", study.define(DYNAMICS))
    for at, step in (("restored", 0), ("restored", 0), ("saved", 10), ("restored", 10)):
        study.worker({"at": at, "run": 1, "step": step, "do": "kill"}, every=10).end(-signal.SIGKILL)
    study.worker(runs=1, every=10).end()
    assert study.ended(1) == [("lost", "lost")] * 4 + [("done", None)]


def test_a_generator_that_was_interrupted_begins_again_and_has_each_point_once(study):
    study.rnnq("init", study.define(moods("good")))
    worker = study.worker({"at": "restored", "do": "wait"})
    worker.expect("trapped")
    worker.send(signal.SIGTERM)
    worker.go_on()
    worker.end()
    assert study.ended() == [("released", "preempted")]
    study.rnnq("worker")
    assert study.run()["curves"] == {"loss": [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]}
    assert [a["step_from"] for a in study.run()["attempts"]] == [0, 0]


# ----------------------------------------------------------------------------------- what it claims, when it leaves


def test_a_worker_waits_while_another_ones_run_is_under_way_and_leaves_when_all_is_done(study):
    study.rnnq("init", study.define(moods("good")))
    busy = study.worker({"at": "claimed", "do": "wait"})
    busy.expect("trapped")
    waiting = study.worker()
    waiting.expect("idle")
    waiting.expect("idle")
    drained = study.rnnq("worker", "--drain")
    assert "run 1" not in drained

    busy.go_on()
    busy.end()
    waiting.end()

    assert not waiting.told("claimed")
    assert study.states() == {1: "done"}


def test_a_worker_takes_the_run_of_another_one_that_dies_while_it_waits(tmp_path):
    with Study(tmp_path, lease=20) as study:  # its beat looks every 5 s, its search for work sooner
        study.rnnq("init", study.define(moods("good")))
        busy = study.worker({"at": "claimed", "do": "wait"})
        busy.expect("trapped")
        waiting = study.worker()
        waiting.expect("idle")
        busy.send(signal.SIGKILL)
        waiting.end()
        assert [e["run"] for e in waiting.told("done")] == [1]
        assert study.ended() == [("lost", "lost"), ("done", None)]


def test_drain_leaves_when_nothing_is_pending_and_wait_never(study):
    assert "there is no database" in study.rnnq("worker", "--drain", code=2)
    study.rnnq("init", study.define(moods("good")))
    study.rnnq("worker", "--drain")
    assert study.states() == {1: "done"}
    study.rnnq("worker", "--drain")

    waiting = study.worker(wait=True)
    waiting.expect("idle")
    waiting.expect("idle")
    study.rnnq("init", study.define(moods("good", "raises")))
    waiting.expect("failed", run=2)
    waiting.expect("idle")
    waiting.send(signal.SIGTERM)
    waiting.end(1)


def test_runs_and_stage_bound_what_a_worker_takes(study):
    study.rnnq("init", study.define(moods("good", "raises", "strange")))
    study.rnnq("init", study.define(moods("good").replace('"moods"', '"other"'), "other.py"))
    study.rnnq("worker", "--runs", "1", "--stage", "other")
    assert study.states() == {1: "pending", 2: "pending", 3: "pending", 4: "done"}
    study.rnnq("worker", "--stage", "other")  # nothing is left of it
    study.rnnq("worker", "--runs", "1")
    assert study.states() == {1: "done", 2: "pending", 3: "pending", 4: "done"}
    study.rnnq("worker", "--runs", "1", code=1)
    assert study.states() == {1: "done", 2: "failed", 3: "pending", 4: "done"}
    assert "there is no stage 'othr'" in study.rnnq("worker", "--stage", "othr", code=2)
    study.rnnq("worker", code=1)
    study.rnnq("worker")  # what failed before was not its own


def test_a_paused_stage_is_left_alone(study):
    study.rnnq("init", study.define(moods("good")))
    study.write("UPDATE stages SET paused = 1")
    study.rnnq("worker")
    assert study.states() == {1: "pending"}


def test_a_gpu_that_is_not_there_is_refused_before_any_run_is_claimed(study):
    study.rnnq("init", study.define(moods("good")))
    output = study.rnnq("worker", "--gpu", "63", code=2)
    assert "there is no GPU 63" in output
    assert "--device cpu" in output
    assert study.run()["attempt"] == 0
    assert study.rows("SELECT count(*) AS n FROM workers") == [{"n": 0}]


# --------------------------------------------------------------------------------------------- whose code it runs


def test_a_definition_that_changed_is_not_run_and_the_run_is_given_back(study):
    path = study.define(moods("good"))
    study.rnnq("init", path)
    file = study.folder / path
    original = file.read_text()
    marker = study.folder / "marker"
    file.write_text(f"open({str(marker)!r}, 'w')\n{original}")

    output = study.rnnq("worker", code=2)

    assert path in output
    assert "--defs" in output
    assert "--rules" in output
    assert not marker.exists()
    row = study.run()
    assert (row["state"], row["failures"], row["lost"], row["worker"]) == ("pending", 0, 0, None)
    assert study.ended() == [("released", "preempted")]
    assert study.rows("SELECT state FROM workers") == [{"state": "left"}]

    (study.folder / "elsewhere").mkdir()
    (study.folder / "elsewhere" / "study.py").write_text(original)
    study.rnnq("worker", "--defs", "elsewhere")
    assert study.states() == {1: "done"}


def test_a_definition_that_is_gone_is_not_found_in_the_database(study):
    path = study.define(moods("good"))
    study.rnnq("init", path)
    (study.folder / path).unlink()
    assert path in study.rnnq("worker", code=2)
    assert study.states() == {1: "pending"}
    with db.reading(study.engine) as connection:
        tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
        stored = [row for table in tables for row in connection.exec_driver_sql(f'SELECT * FROM "{table}"')]
    assert "yield" not in str(stored), "no code lies in it"


@pytest.mark.parametrize("source", ["../evil.py", "{folder}/evil.py", "link.py", "folder/../../evil.py"])
def test_a_source_that_leads_out_of_the_folder_of_definitions_is_never_executed(study, source):
    study.rnnq("init", study.define(moods("good")))
    marker = study.folder / "marker"
    evil = study.folder / "evil.py"
    evil.write_text(f"open({str(marker)!r}, 'w')\n{moods('good')}")
    (study.folder / "defs" / "link.py").symlink_to(evil)
    (study.folder / "defs" / "folder").mkdir()
    source = source.format(folder=study.folder)
    sha256 = hashlib.sha256(evil.read_bytes()).hexdigest()
    study.write("UPDATE stages SET source = :source, source_sha256 = :sha256", source=source, sha256=sha256)

    output = study.rnnq("worker", code=2)

    assert source in output
    assert not marker.exists()
    assert study.states() == {1: "pending"}
    assert study.ended() == [("released", "preempted")]


def test_a_stale_worker_whose_definition_changed_meanwhile_says_so(tmp_path):
    with Study(tmp_path, lease=0.5) as study:
        path = study.define(moods("good"))
        study.rnnq("init", path)
        stale = study.worker({"at": "claimed", "do": "stop"})
        stale.expect("stopped")
        study.worker().end()
        before = study.run()
        (study.folder / path).write_text("stage = 1")
        stale.send(signal.SIGCONT)
        stale.end(1)
        assert "has changed since the stage was made" in stale.output
        assert study.run() == before


# ------------------------------------------------------------------------------------------------- provenance


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


def test_an_attempt_says_by_whom_where_and_with_what_it_was_made(study):
    path = study.define(moods("good", "good, too"))
    git(study.folder, "init")
    git(study.folder, "add", path)
    git(study.folder, "commit", "-m", "a study")
    commit = git(study.folder, "rev-parse", "HEAD").strip()
    study.rnnq("init", path)
    study.rnnq("worker", "--runs", "1", "--device", "cpu")
    (study.folder / "tracked").write_text("a")
    git(study.folder, "add", "tracked")
    study.rnnq("worker", "--device", "cpu")

    [first], [second] = (study.run(run)["attempts"] for run in (1, 2))
    assert (first["git_commit"], first["git_dirty"]) == (commit, 0)
    assert (second["git_commit"], second["git_dirty"]) == (commit, 1)
    assert first["command_line"] == "rnnq worker --runs 1 --device cpu"
    assert first["device"] == "cpu"
    assert first["source_sha256"] == hashlib.sha256((study.folder / path).read_bytes()).hexdigest()
    assert {"python", "platform", "rnnq", "torch", "numpy"} <= first["versions"].keys()
    assert re.match(r"\d+\.\d+", first["versions"]["torch"])
    assert first["numerics"]["torch"] == first["versions"]["torch"]
    assert (first["numerics"]["threads"], first["numerics"]["device"]) == (1, "cpu")
    assert first["numerics"]["family"] == "moods 1"
    assert first["exact"] == 1
    assert (first["step_from"], first["step_to"]) == (0, 3)
    assert first["ended_at"] >= first["started_at"]
    [one, other] = study.rows("SELECT id, host, pid, state, message FROM workers ORDER BY started_at")
    assert (first["worker"], second["worker"]) == (one["id"], other["id"])
    assert first["host"] == one["host"]
    assert one["message"] == "nothing left to do"


def test_outside_of_git_there_is_no_commit(study):
    study.rnnq("init", study.define(moods("good")))
    study.rnnq("worker")
    [attempt] = study.run()["attempts"]
    assert (attempt["git_commit"], attempt["git_dirty"]) == (None, None)


def test_rnnq_worker_as_a_user_starts_it(cli: Any, tmp_path: Path) -> None:
    """Not forked, as all others here: a new interpreter, from the first import to the exit code."""
    with Study(tmp_path) as study:
        study.define(moods("good", "raises"))
        added = json.loads(cli("init", "defs/study.py", "--format", "json").stdout)
        assert added == {"stages": [{"stage": "moods", "added": 2, "present": 0}]}
        done = cli("worker", code=1, CUDA_VISIBLE_DEVICES="")
        assert done.stdout == ""
        assert "(no GPU here: one thread of the CPU)" in done.stderr
        assert study.states() == {1: "done", 2: "failed"}
