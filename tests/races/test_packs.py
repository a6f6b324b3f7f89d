"""Workers that train packs: claimed together, ended one by one, killed, resumed in packs of other sizes, scattered."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Study, pseudo_text

SMALL = """
import rnnq

stage = rnnq.stage(
    "s", "dynamics",
    rnnq.grid(lr=[0.001, 0.003, 0.01, 0.03]).seeds(2),
    base=dict(state_size=32, batch_size=32, window=64, steps=60, log_every=5, eval_every=25, corpus="text"),
)
"""

# a family of the third level whose runs behave as their mood says
MOODS = """
import os

import torch

import rnnq


class Config(rnnq.Config):
    mood: str = "good"
    steps: int = 30
    log_every: int = 5
    lr: float = 0.1

    def pack_key(self):
        return "all"


class Moody(rnnq.Family):
    Config = Config
    name = "moody"

    def init(self, configs):
        drawn = [torch.rand(1, 32, generator=torch.Generator().manual_seed(c.seed)) for c in configs]
        return rnnq.State({"w": torch.stack(drawn)}, {})

    def batch(self, configs, steps):
        print("a batch of", len(configs))
        for config, step in zip(configs, steps):
            if step == 12 and config.mood == "raises":
                raise KeyError("nothing here")
            if step == 12 and config.mood == "kills":
                os.kill(os.getpid(), 9)
            if step == 12 and config.mood == "is large" and len(configs) > 2:
                raise MemoryError("too many")
        bad = [float("nan") if c.mood == "diverges" and s >= 12 else 1.0 for c, s in zip(configs, steps)]
        return torch.tensor(bad)

    def loss(self, state, data):
        return (state.params["w"] - 3).square().mean((1, 2)) * data, {}


def stage(name, moods):
    return rnnq.stage(name, Moody(), rnnq.grid(mood=moods).seeds(2))
"""


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, lease=1.0) as made:
        (made.folder / "text").write_bytes(pseudo_text(8000))
        yield made


def twin(tmp_path: Path, definition: str, n: int) -> dict[int, dict[str, Any]]:
    """What the same runs come to when each is trained alone, undisturbed."""
    with Study(tmp_path / "twin") as alone:
        (alone.folder / "text").write_bytes(pseudo_text(8000))
        alone.rnnq("init", alone.define(definition))
        alone.worker(pack=1).end()
        return {run: alone.result(run) for run in range(1, n + 1)}


def sizes(worker: Any) -> list[int]:
    return [len(event["runs"]) for event in worker.told("packed")]


def test_a_pack_is_claimed_in_one_statement_and_each_run_ends_as_it_would_alone(study: Study, tmp_path: Path) -> None:
    study.rnnq("init", study.define(SMALL))
    worker = study.worker(pack=8)
    worker.end()

    assert sizes(worker) == [8]
    assert set(study.states().values()) == {"done"}
    assert len(study.rows("SELECT DISTINCT started_at FROM attempts")) == 2, (
        "one in hand for the trial, then the others"
    )

    study.rnnq("init", study.define(SMALL.replace('"s"', '"t"').replace("0.001", "0.002"), "other.py"))
    worker = study.worker(pack=8)
    worker.end()
    assert sizes(worker) == [8]
    assert len(study.rows("SELECT DISTINCT started_at FROM attempts WHERE run_id > 8")) == 1, "now its shape is known"
    expected = twin(tmp_path, SMALL, 8)
    assert {run: study.result(run) for run in expected} == expected


def test_a_pack_that_is_killed_goes_on_in_packs_of_another_size_to_the_bit(study: Study, tmp_path: Path) -> None:
    study.rnnq("init", study.define(SMALL))
    study.worker({"at": "saved", "step": 40, "run": 5, "do": "kill"}, pack=8, every=10).end(-signal.SIGKILL)
    # a lost attempt is tried alone until its next checkpoint: nobody knows who killed the worker
    survivor = study.worker(pack=3, every=10)
    survivor.end()
    assert all(attempt["ended"] == "lost" for run in range(1, 9) for attempt in study.run(run)["attempts"][:1])
    assert sizes(survivor) == [1] * 8

    expected = twin(tmp_path, SMALL, 8)
    assert {run: study.result(run) for run in expected} == expected


def test_a_pack_that_is_stopped_goes_on_in_packs_of_another_size_to_the_bit(study: Study, tmp_path: Path) -> None:
    study.rnnq("init", study.define(SMALL))
    first = study.worker({"at": "recorded", "run": 3, "step": 30, "do": "wait"}, pack=8)
    first.expect("trapped")
    first.send(signal.SIGTERM)
    first.go_on()
    first.end()
    assert set(study.states().values()) == {"pending"}
    # the signal may come between the looks of two members at what is wished of them
    assert {row["steps_done"] for row in study.rows("SELECT steps_done FROM runs")} <= {30, 31}

    second = study.worker(pack=3)
    second.end()
    assert sizes(second) == [3, 3, 2]
    assert all(study.ended(run) == [("released", "preempted"), ("done", None)] for run in range(1, 9))
    expected = twin(tmp_path, SMALL, 8)
    assert {run: study.result(run) for run in expected} == expected


def test_one_run_of_a_pack_is_cancelled_and_the_others_go_on(study: Study, tmp_path: Path) -> None:
    study.rnnq("init", study.define(SMALL))
    worker = study.worker({"at": "recorded", "run": 1, "step": 20, "do": "wait"}, pack=8)
    worker.expect("trapped")
    assert "pack of 8: runs 1-8, step" in study.rnnq("status")
    assert " 1-8 " in study.rnnq("workers")
    study.rnnq("cancel", "4", "--now")
    worker.go_on()
    worker.end()

    assert study.states() == {run: "cancelled" if run == 4 else "done" for run in range(1, 9)}
    assert [event["run"] for event in worker.told("lost")] == [4]
    expected = twin(tmp_path, SMALL, 8)
    assert {run: study.result(run) for run in expected if run != 4} == {r: e for r, e in expected.items() if r != 4}


def moody(study: Study, moods: list[str]) -> None:
    study.rnnq("init", study.define(f"{MOODS}\nmade = stage('m', {moods})"))


def test_a_run_that_diverges_fails_alone(study: Study) -> None:
    moody(study, ["good", "diverges", "fine"])
    worker = study.worker(pack=6)
    worker.end(1)
    assert sizes(worker) == [6]
    found = {row["id"]: (row["state"], row["cause"]) for row in study.rows("SELECT id, state, cause FROM runs")}
    bad, good = ("failed", "diverged"), ("done", None)
    assert list(found.values()).count(bad) == 2
    assert list(found.values()).count(good) == 4


def test_an_error_in_a_pack_scatters_it_and_only_who_fails_alone_has_failed(study: Study) -> None:
    moody(study, ["good", "raises", "fine"])
    worker = study.worker(pack=6)
    worker.end(1)
    assert sizes(worker) == [6, 1, 1, 1, 1, 1, 1]
    rows = study.rows("SELECT id, state, cause, config, failures FROM runs ORDER BY id")
    for row in rows:
        raises = '"raises"' in row["config"]
        assert (row["state"], row["cause"]) == (("failed", "bug") if raises else ("done", None))
        first = study.run(row["id"])["attempts"][0]
        assert (first["ended"], first["cause"]) == ("released", "preempted")
        assert "an error in a pack of 6: KeyError" in first["message"]
        assert "Traceback" in first["traceback"]


def test_a_run_that_kills_its_worker_takes_no_pack_mate_along(study: Study) -> None:
    moody(study, ["good", "kills"])
    study.worker(pack=4).end(-signal.SIGKILL)
    for _ in range(8):  # each of two runs kills three workers: one in the pack, two alone
        if study.worker(pack=4).end(None)[-1]["code"] != -signal.SIGKILL:
            break
    rows = study.rows("SELECT state, cause, config, attempt FROM runs ORDER BY id")
    for row in rows:
        if '"kills"' in row["config"]:
            assert (row["state"], row["cause"], row["attempt"]) == ("failed", "lost", 3)
        else:
            assert (row["state"], row["attempt"]) == ("done", 2)


def test_when_memory_is_out_the_pack_is_made_smaller_and_that_is_remembered(study: Study) -> None:
    moody(study, ["good", "is large"])
    worker = study.worker(pack=4)
    worker.end()
    assert sizes(worker) == [4, 3, 1, 1, 1, 1], "who was there twice is trained alone: it may be the one"
    assert set(study.states().values()) == {"done"}
    assert all(row["failures"] == 0 for row in study.rows("SELECT failures FROM runs"))
    known = study.rows("SELECT members, fits FROM packs ORDER BY members")
    assert [(row["members"], bool(row["fits"])) for row in known] == [(3, False), (4, False)]


def test_what_a_pack_prints_is_in_the_log_of_each_of_its_runs(study: Study) -> None:
    moody(study, ["good"])
    study.worker(pack=2).end()
    first, second = (study.rnnq("logs", str(run)).splitlines()[1:] for run in (1, 2))
    assert first == second
    assert "a batch of 2" in first


def test_runs_are_packed_with_their_like_and_by_priority(study: Study) -> None:
    other = SMALL.replace("lr=[0.001, 0.003, 0.01, 0.03]", "state_size=[32, 64]").replace("state_size=32, ", "")
    study.rnnq("init", study.define(other))
    study.rnnq("priority", "5", "4")
    worker = study.worker(pack=8)
    worker.end()
    packs = [sorted(event["runs"]) for event in worker.told("packed")]
    configs = {row["id"]: row["pack_key"] for row in study.rows("SELECT id, pack_key FROM runs")}
    assert packs == [[3, 4], [1, 2]]
    assert all(len({configs[run] for run in each}) == 1 for each in packs)


def test_two_workers_share_what_waits(study: Study) -> None:
    """The second registers before the first claims: so each takes half."""
    study.rnnq("init", study.define(SMALL))
    first = study.worker({"at": "started", "do": "wait"}, pack=8)
    first.expect("trapped")
    second = study.worker({"at": "started", "do": "wait"}, pack=8)
    second.expect("trapped")
    first.go_on()
    first.expect("packed")
    second.go_on()
    first.end()
    second.end()
    assert sizes(first)[0] == 4
    assert sum(sizes(first)) + sum(sizes(second)) == 8
    assert set(study.states().values()) == {"done"}


TINY = """
import rnnq

stage = rnnq.stage(
    "s", "dynamics", rnnq.grid(lr=[0.01]).seeds(2),
    base=dict(state_size=32, batch_size=32, window=64, steps=30, log_every=5, eval_every=25, corpus="text"),
)
"""


def test_compiled_steps_give_the_same_curve_up_to_rounding_and_it_is_on_record(study: Study, tmp_path: Path) -> None:
    """A compiled step adds in another order: the losses, near 3, may differ by some roundings of a float32."""
    study.rnnq("init", study.define(TINY))
    study.environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "compiled")
    study.rnnq("worker", "--compile", "--pack", "off", "--no-bar")
    expected = twin(tmp_path, TINY, 2)
    for run in (1, 2):
        found = study.run(run)
        assert found["state"] == "done"
        assert found["attempts"][0]["numerics"]["compile"] is True
        assert found["loss"] == pytest.approx(expected[run]["loss"], abs=1e-5)


def test_without_a_compiler_runs_are_trained_without_it(study: Study) -> None:
    study.rnnq("init", study.define(TINY))
    study.environment["CXX"] = "no-such-compiler"
    said = study.rnnq("worker", "--compile", "--no-bar", "--runs", "1")
    assert "--compile: there is no C++ compiler (looked for no-such-compiler); runs are trained without it" in said
    assert study.run(1)["attempts"][0]["numerics"]["compile"] is False


BAD = """
import os, time

def act(n):
    if n > 1 and MOOD == "kills":
        os.kill(os.getpid(), 9)
    if n > 1 and MOOD == "hangs":
        time.sleep(3600)  # for ever: what is to be found
"""


@pytest.mark.parametrize("mood", ["kills", "hangs"])
def test_a_run_that_cannot_even_be_tried_in_a_pack_is_trained_alone(study: Study, mood: str) -> None:
    """The trial has a run in hand: its attempt is lost, or given back, and after that it is trained alone."""
    study.environment["RNNQ_STALL_S"] = "2"
    bad = BAD.replace("MOOD", repr(mood)) + MOODS.replace('print("a batch of", len(configs))', "act(len(configs))")
    study.rnnq("init", study.define(f"{bad}\nmade = stage('m', ['good'])"))
    for _ in range(4):
        if study.worker(pack=2).end(None)[-1]["code"] == 0:
            break
    assert set(study.states().values()) == {"done"}
    assert study.ended(1)[0] in (("lost", "lost"), ("failed", "stalled"))


SLOW = """
import pathlib, time

def act(n):
    if n > 1:
        pathlib.Path("trying").touch()
    time.sleep(0.1 * n)  # a slow step
"""


def test_a_worker_that_is_trying_sizes_hears_a_signal(study: Study) -> None:
    """The trial of 8 would take 32 s; it is given up at the next step."""
    slow = SLOW + MOODS.replace('print("a batch of", len(configs))', "act(len(configs))")
    study.rnnq("init", study.define(f"{slow}\nmade = stage('m', ['good', 'fine', 'well', 'so'])"))
    worker = study.worker(pack=8)
    deadline = time.monotonic() + 60
    while not (study.folder / "trying").exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # between two looks: a trial tells nobody that it began
    worker.send(signal.SIGTERM)
    began = time.monotonic()
    worker.end()
    assert time.monotonic() - began < 15
    assert set(study.states().values()) == {"pending"}


@pytest.mark.parametrize("wrong", ["0", "some", "-3", "1025", ""])
def test_a_wrong_size_is_refused(study: Study, wrong: str) -> None:
    study.rnnq("init", study.define(SMALL))
    said = study.rnnq("worker", f"--pack={wrong}", code=2)
    assert f"error: --pack {wrong}: neither auto, nor off, nor a number" in said
