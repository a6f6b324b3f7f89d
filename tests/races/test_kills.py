"""Workers that are killed, stopped or asked to leave at an exact place: nothing is lost, mixed or done twice.

Every run here has the same config, and one twin of it is trained without interruption. Whatever happens to a run,
it must end with the twin's final state and curves, to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rnnq import queue
from tests.conftest import claim_one, new_stage
from tests.processes import Process, Study, pseudo_text

STEPS, EVERY, WINDOW = 300, 20, 64
POSITIONS = WINDOW - 1  # steps of a window; the states are zero before the first of them
TEXT = pseudo_text(200_000)

DEFINITION = f"""
import rnnq

stage = rnnq.stage("SMALL", "dynamics", rnnq.grid(seed=SEEDS), base=dict(
    corpus="text", state_size=16, n_layers=2, window={WINDOW}, batch_size=8, steps={STEPS}, log_every=1, eval_every=100,
    use_input_gate=True, use_forget_gate=True, use_state_gate=True, use_old_state=True))
"""

TINY = """
import rnnq

class Config(rnnq.Config):
    pass

@rnnq.family(Config)
def tiny(config):
    yield {"loss": 1.0}

stage = rnnq.stage("tiny", tiny, rnnq.grid(seed=[0]))
"""


def new_study(folder: Path, lease: float = 0.5, seeds: tuple[int, ...] = (0,)) -> Study:
    """A study of the small run, and of its siblings of other seeds."""
    study = Study(folder, lease)
    (folder / "text").write_bytes(TEXT)
    study.rnnq("init", study.define(DEFINITION.replace("SEEDS", repr(list(seeds))).replace("SMALL", "small")))
    return study


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of the small run."""
    with new_study(tmp_path_factory.mktemp("template") / "study") as study:
        return study.folder


@pytest.fixture
def study(template: Path, tmp_path: Path) -> Iterator[Study]:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    with Study(tmp_path) as study:
        yield study


@pytest.fixture(scope="module")
def twin(template: Path) -> dict[str, Any]:
    """The result of the small run when nothing happens to it."""
    folder = shutil.copytree(template, template.with_name("twin"))
    with Study(folder) as study:
        study.rnnq("worker")
        assert study.ended() == [("done", None)]
        return study.result()


def killed_at(study: Study, step: int, at: str = "recorded") -> None:
    """A worker of the study trains until it is killed at a step."""
    study.worker({"at": at, "step": step, "do": "kill"}, every=EVERY).end(-signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------- killed


def test_a_run_that_is_killed_five_times_ends_as_if_nothing_had_happened(tmp_path, twin):
    seed = int(os.environ.get("RNNQ_TEST_SEED", random.randrange(2**32)))
    chance = random.Random(seed)
    # each kill is inside a window, and at least two checkpoints after the step where the attempt began
    firsts = range(2 * EVERY, 11 * EVERY, 2 * EVERY)
    steps = [chance.choice([s for s in range(first + 1, first + EVERY) if s % POSITIONS]) for first in firsts]
    print(f"RNNQ_TEST_SEED={seed}: kills at steps {steps}")
    with new_study(tmp_path, lease=1) as study:
        begins = 0
        for step in steps:
            worker = study.worker({"at": "recorded", "step": step, "do": "kill"}, every=EVERY)
            worker.end(-signal.SIGKILL)
            assert [event["step"] for event in worker.told("restored")] == [begins]
            assert len(worker.told("saved")) == 2
            begins = step - step % EVERY
        study.worker(every=EVERY).end()

        assert study.result() == twin
        assert study.ended() == [("lost", "lost")] * 5 + [("done", None)]
        assert [a["exact"] for a in study.run()["attempts"]] == [True] * 6


@pytest.mark.parametrize("at", ["written", "committing"])
def test_a_worker_killed_before_the_row_names_its_file_leaves_the_checkpoint_before(study, twin, at):
    killed_at(study, 60, at)
    assert {name: saved["step"] for name, saved in study.named().items()} == {"checkpoint": 40, "checkpoint_prev": 20}

    killed_at(study, STEPS, at)  # all trained, the last file written, nothing of it in the row
    assert study.run()["state"] == "running"
    assert study.run()["checkpoint"]["step"] == STEPS - EVERY

    [end] = [e for e in study.worker(every=EVERY).end() if e["event"] == "restored"]
    assert end["step"] == STEPS - EVERY
    assert study.result() == twin


def test_points_written_after_the_last_checkpoint_are_not_there_twice(study, twin):
    killed_at(study, 65)
    # points between checkpoints are written once a second: as if the dead worker had lived to do so
    study.write("INSERT INTO point SELECT run_id, metric_id, 65, 9.0 FROM point WHERE step = 40 AND metric_id = 1")
    study.worker(every=EVERY).end()
    assert study.result() == twin


def test_old_files_go_only_after_the_write_that_replaced_them(study):
    worker = study.worker({"at": "written", "step": 80, "do": "wait"}, {"at": "saved", "step": 80, "do": "wait"},
                          {"at": "written", "step": STEPS, "do": "wait"}, every=EVERY)  # fmt: skip
    folder = f"checkpoints/{study.rows('SELECT id FROM study')[0]['id']}/small/1/"

    worker.expect("trapped", at="written", step=80)
    aside = f".a1-s80.pt.{worker.pid}.tmp"
    assert study.files() == {folder + name for name in ("a1-s40.pt", "a1-s60.pt", aside)}
    worker.go_on()
    worker.expect("trapped", at="saved", step=80)
    assert study.files() == {folder + name for name in ("a1-s60.pt", "a1-s80.pt")}
    assert {saved["path"] for saved in study.named().values()} == study.files()
    worker.go_on()
    worker.expect("trapped", at="written", step=STEPS)
    assert {folder + f"a1-s{STEPS - 2 * EVERY}.pt", folder + f"a1-s{STEPS - EVERY}.pt"} < study.files()
    worker.go_on()
    worker.end()

    assert {saved["path"] for saved in study.named().values()} == study.files() == {folder + f"a1-s{STEPS}.pt"}


def test_a_finished_run_keeps_its_last_and_its_best_checkpoint(study):
    wild = (
        DEFINITION.replace("SEEDS", "[0]").replace("SMALL", "wild").replace("eval_every=100", "eval_every=20, lr=0.1")
    )
    study.rnnq("init", study.define(wild, "wild.py"))
    study.worker(stage="wild", every=EVERY).end()
    named, losses = study.named(2), study.run(2)["curves"]["val_loss"]
    best = min(losses, key=lambda point: point[1])[0]
    assert best < STEPS, "or the two would be one file"
    assert {name: saved["step"] for name, saved in named.items()} == {"checkpoint": STEPS, "checkpoint_best": best}
    assert {saved["path"] for saved in named.values()} == study.files()
    assert {(a["kind"], a["path"]) for a in study.run(2)["artifacts"]} == {(k, s["path"]) for k, s in named.items()}


# ------------------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize(
    ("place", "begins"),
    [
        ({"at": "claimed"}, 0),
        ({"at": "restored"}, 0),
        ({"at": "recorded", "step": 65}, 60),
        ({"at": "written", "step": 60}, 40),
        ({"at": "written", "step": STEPS}, STEPS - EVERY),
    ],
    ids=["after the claim", "after the restore", "in mid-run", "before the rename", "before the last rename"],
)
def test_a_worker_that_was_stopped_past_its_lease_changes_nothing_when_it_wakes(study, twin, place, begins):
    stale = study.worker({**place, "do": "stop"}, every=EVERY)
    stale.expect("stopped")
    other = study.worker(every=EVERY)
    other.end()
    assert [(e["run"], e["attempt"]) for e in other.told("reaped")] == [(1, 1)]  # by the clock: the stale one lives
    assert [e["step"] for e in other.told("restored")] == [begins]
    study.rnnq("init", study.define(TINY, "tiny.py"))
    before, files = study.run(1), study.files()

    stale.send(signal.SIGCONT)
    stale.end()

    assert [(e["run"], e["attempt"]) for e in stale.told("lost")] == [(1, 1)]
    assert [e["run"] for e in stale.told("done")] == [2], "it goes on with other runs"
    assert study.run(1) == before
    assert study.ended(1) == [("lost", "lost"), ("done", None)]
    assert files - study.files() <= {f for f in files if f.endswith(".tmp")}  # the stale one deletes only what is aside
    assert all("/a1-" in path for path in study.files() - {s["path"] for s in study.named(1).values()})
    assert all("/a2-" in saved["path"] for saved in study.named(1).values())
    assert study.result(1) == twin


def test_a_stale_worker_and_the_one_that_took_over_live_side_by_side(tmp_path, twin):
    with new_study(tmp_path, lease=2) as study:
        stale = study.worker({"at": "written", "step": 60, "do": "stop"}, every=EVERY)
        stale.expect("stopped")
        other = study.worker({"at": "saved", "step": 60, "do": "wait"}, every=EVERY)
        other.expect("trapped")  # it stands where the stale one stands: at its own checkpoint of step 60

        stale.send(signal.SIGCONT)
        stale.expect("lost", run=1)
        stale.expect("idle")
        stale.expect("idle")
        paths = {path.rpartition("/")[2] for path in study.files()}
        assert {"a1-s60.pt", "a2-s60.pt"} <= paths
        assert study.named()["checkpoint"]["path"].endswith("a2-s60.pt")

        other.go_on()
        other.end()
        stale.end()
        assert not other.told("lost")
        assert study.ended() == [("lost", "lost"), ("done", None)]
        assert study.result() == twin


@pytest.mark.parametrize("inside", [None, 1, 2], ids=["between beats", "before the clock is read", "after it"])
def test_after_a_stop_others_are_taken_back_only_after_a_whole_lease(tmp_path, inside):
    lease = 0.4
    with Study(tmp_path, lease) as study:
        study.make()
        queue.init(study.engine, [new_stage(1)])
        long_ago = 1e9
        claim_one(study.engine, "sleeper", now=long_ago)
        heart = study.drive("pulse", inside=inside)
        began = heart.expect("beating")["moment"]
        assert heart.expect("reaped")["moment"] - began >= lease, "first it is connected for a whole LEASE"
        heart.expect("stopped")
        first = claim_one(study.engine, "sleeper")
        other = study.drive("pulse")
        other.expect("reaped", runs=[1])  # so the heart has been stopped for longer than LEASE
        other.close()
        claim_one(study.engine, "sleeper", now=first.until - lease)

        heart.send(signal.SIGCONT)

        woke = heart.expect("woke")
        assert woke["at_once"] == []
        assert heart.expect("reaped", runs=[1])["moment"] - woke["moment"] >= lease * 0.9


# ---------------------------------------------------------------------------------------------- asked to leave


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_worker_that_is_asked_to_leave_saves_releases_and_leaves(study, twin, number):
    worker = study.worker({"at": "recorded", "step": 75, "do": "wait"}, every=EVERY)
    worker.expect("trapped")
    worker.send(number)
    worker.go_on()
    worker.end(0)

    assert [e["step"] for e in worker.told("released")] == [76]
    row = study.run()
    assert (row["state"], row["worker"], row["failures"], row["lost"]) == ("pending", None, 0, 0)
    assert study.ended() == [("released", "preempted")]
    assert study.named()["checkpoint"]["step"] == 76
    assert study.rows("SELECT state, message FROM workers") == [{"state": "left", "message": "a signal"}]

    study.rnnq("worker")
    assert study.ended() == [("released", "preempted"), ("done", None)]
    assert study.result() == twin


def test_at_the_second_signal_a_worker_leaves_at_once_and_its_run_is_free_at_once(tmp_path, twin):
    with new_study(tmp_path, lease=60) as study:
        worker = study.worker({"at": "recorded", "step": 75, "do": "wait"}, every=EVERY)
        worker.expect("trapped")
        worker.send(signal.SIGTERM)
        worker.send(signal.SIGINT)
        with contextlib.suppress(BrokenPipeError):  # both may have been heard while it waits, or the second only now
            worker.go_on()
        worker.end(None)
        assert worker.seen[-1]["code"] in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert study.run()["state"] == "running"

        output = study.rnnq("worker")
        assert f"taken back from {study.run()['attempts'][0]['worker']}" in output
        assert "resumed at step 60" in output
        assert study.result() == twin


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM],
        [signal.SIGUSR2, signal.SIGINT, signal.SIGUSR1],
        [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM],
    ],
    ids=["SLURM warns, and ends the job", "Ctrl-C after a warning", "timeout sends its signal twice"],
)
def test_warnings_and_the_echo_of_a_signal_hurry_nobody(study, twin, numbers):
    worker = study.worker({"at": "recorded", "step": 75, "do": "wait"}, every=EVERY)
    worker.expect("trapped")
    for number in numbers:
        worker.send(number)
        heard(worker, number)
    worker.go_on()
    worker.end(0)

    assert study.ended() == [("released", "preempted")]
    assert study.named()["checkpoint"]["step"] == 76
    study.rnnq("worker")
    assert study.result() == twin


def heard(worker: Process, number: int) -> None:
    """Wait until a signal is no longer pending: two of a kind that both are would be one."""
    while int(re.search(r"ShdPnd:\t(\w+)", Path(f"/proc/{worker.pid}/status").read_text())[1], 16) >> (number - 1) & 1:
        time.sleep(0.001)  # the kernel tells nobody that a signal has come


def test_a_worker_that_waits_for_work_leaves_at_the_first_signal(tmp_path):
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(TINY))
        worker = study.worker(wait=True)
        worker.expect("done")
        worker.expect("idle")
        worker.send(signal.SIGTERM)
        worker.end(0)
        assert study.rows("SELECT state FROM workers") == [{"state": "left"}]


# ------------------------------------------------------------------------------------- another study, bad files


def test_a_study_that_was_made_again_picks_up_nothing_of_the_old_one(study, twin):
    killed_at(study, 65)
    old = {path: (study.folder / path).read_bytes() for path in study.files()}
    assert len(old) == 2
    study.forget()
    for path in study.folder.glob("experiments.db*"):
        path.unlink()
    study.rnnq("init", "defs/study.py")

    output = study.rnnq("worker", "--checkpoint-every", str(EVERY))

    assert "resumed" not in output
    assert [(a["step_from"], a["ended"]) for a in study.run()["attempts"]] == [(0, "done")]
    assert {path: (study.folder / path).read_bytes() for path in old} == old
    assert len({path.split("/")[1] for path in study.files()}) == 2, "a folder for each study id"
    assert study.result() == twin


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 8):
        content[place] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damages", "back"),
    [([flip], 40), ([Path.unlink], 40), ([flip, truncate], 0), ([truncate, Path.unlink], 0)],
    ids=["newest flipped", "newest gone", "both damaged", "both gone or short"],
)
def test_a_damaged_checkpoint_costs_steps_and_no_bit(study, twin, damages, back):
    killed_at(study, 65)
    row = study.run()
    for name, damage in zip(("checkpoint", "checkpoint_prev"), damages, strict=False):
        damage(study.folder / row[name]["path"])

    output = study.rnnq("worker", "--checkpoint-every", str(EVERY))

    for name in ("checkpoint", "checkpoint_prev")[: len(damages)]:
        assert row[name]["path"] in output
    assert f"run 1: goes on from {f'step {back}' if back else 'the start'}\n" in output
    last = study.run()["attempts"][-1]
    assert (last["step_from"], last["ended"]) == (back, "done")
    assert "a1-s60.pt" in last["message"]
    assert study.result() == twin


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Study, Study]]:
    """Two studies of two runs: the first run is done, the second, the twin's brother, was killed at step 65."""
    with new_study(tmp_path / "one", seeds=(1, 0)) as one, new_study(tmp_path / "other", seeds=(1, 0)) as other:
        for study in (one, other):
            study.worker({"at": "recorded", "run": 2, "step": 65, "do": "kill"}, every=EVERY).end(-signal.SIGKILL)
        yield one, other


def name_file(study: Study, column: str, path: str) -> None:
    """Make run 2 name a file, rightly hashed."""
    content = (study.folder / path).read_bytes()
    saved = {"path": path, "step": 60, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    study.write(f"UPDATE runs SET {column} = :saved WHERE id = 2", saved=json.dumps(saved))


def test_checkpoints_of_another_run_and_of_another_study_are_refused_and_left_alone(pair, twin):
    study, other = pair
    others = study.named(1)["checkpoint"]["path"]
    foreign = Path(study.named(2)["checkpoint"]["path"]).with_name("a1-s70.pt")
    shutil.copy(other.folder / other.named(2)["checkpoint"]["path"], study.folder / foreign)
    name_file(study, "checkpoint", others)
    name_file(study, "checkpoint_prev", str(foreign))
    before = {path: (study.folder / path).read_bytes() for path in (others, str(foreign))}

    output = study.rnnq("worker", "--checkpoint-every", str(EVERY))

    assert f"{others} belongs to" in output
    assert f"{foreign} belongs to" in output
    assert "run 2: goes on from the start" in output
    assert {path: (study.folder / path).read_bytes() for path in before} == before
    assert study.result(2) == twin


def test_a_file_of_another_run_is_not_deleted_as_an_old_one(pair, twin):
    study, _ = pair
    name_file(study, "checkpoint_prev", study.named(1)["checkpoint"]["path"])
    study.rnnq("worker", "--checkpoint-every", str(EVERY))
    assert study.named(1).keys() == {"checkpoint", "checkpoint_best"}
    assert study.result(2) == twin


class Evil:
    """Pickled, it is a call that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_a_checkpoint_that_would_run_code_is_refused(study, twin):
    killed_at(study, 65)
    marker = study.folder / "marker"
    for name in ("checkpoint", "checkpoint_prev"):
        saved = study.run()[name]
        content = pickle.dumps(Evil(marker))
        (study.folder / saved["path"]).write_bytes(content)
        saved |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        study.write(f"UPDATE runs SET {name} = :saved", saved=json.dumps(saved))
    assert "goes on from the start" in study.rnnq("worker")
    assert not marker.exists()
    assert study.result() == twin


# ---------------------------------------------------------------------------------------------- other numerics


def test_a_run_resumed_under_other_numerics_says_that_it_is_not_exact(study):
    study.worker({"at": "recorded", "step": 65, "do": "kill"}, every=EVERY, threads=2).end(-signal.SIGKILL)
    output = study.rnnq("worker")  # one thread
    assert "resumed at step 60, under other numerics: not to the bit" in output
    first, second = study.run()["attempts"]
    assert (first["exact"], second["exact"]) == (True, False)
    assert (first["numerics"]["threads"], second["numerics"]["threads"]) == (2, 1)
    assert {**first["numerics"], "threads": 1} == second["numerics"]


# ------------------------------------------------------------------------------------------ nobody is listening


def test_a_worker_whose_terminal_has_gone_trains_on(study, twin):
    killed_at(study, 65)
    study.start("rnnq", "worker", mute=True).end(0)
    assert study.ended() == [("lost", "lost"), ("done", None)]
    assert study.result() == twin


def test_a_run_whose_worker_ended_by_an_error_of_ours_is_free_at_once(tmp_path):
    with Study(tmp_path, lease=60) as study:
        study.rnnq("init", study.define(TINY))
        worker = study.worker({"at": "claimed", "do": "raise"})
        worker.end(1)
        assert "a watcher with a bug" in worker.output
        assert study.states() == {1: "running"}
        study.worker().end()
        assert study.ended() == [("lost", "lost"), ("done", None)]
        assert "its process is gone" in study.run()["attempts"][0]["message"]


def test_a_signal_between_any_two_bytecodes_of_a_wait_ends_it(study):
    waited = study.drive("asked")
    assert waited.expect("waited")["places"] > 10
