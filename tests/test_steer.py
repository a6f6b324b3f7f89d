"""What a person does to runs and stages, while workers are at work beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, inspect, text

from rnnq import config, db, queue, runs, steer
from rnnq.errors import DatabaseError, InputError, LeaseLost
from rnnq.steer import Choice
from tests.conftest import address_of, claim_one, new_runs, new_stage
from tests.processes import Study, pseudo_text

DEFINITION = """
import rnnq

def grow(config):
    yield config | {"steps": 77}

small = rnnq.stage("small", "dynamics", rnnq.grid(steps=[150, 300]), refine=grow, base=dict(
    corpus="text", state_size=8, window=32, batch_size=4, log_every=10, eval_every=100))
endless = rnnq.stage("endless", "dynamics", rnnq.grid(seed=[0, 1]), base=dict(
    corpus="text", state_size=8, window=32, batch_size=4, log_every=10, eval_every=1_000_000, steps=10_000_000))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs 1 and 2 of stage small, 3 and 4 of stage endless."""
    folder = tmp_path_factory.mktemp("template") / "study"
    with Study(folder, lease=1.0) as study:
        (folder / "text").write_bytes(pseudo_text(50_000))
        study.rnnq("init", study.define(DEFINITION))
    return folder


@pytest.fixture
def study(template: Path, tmp_path: Path) -> Iterator[Study]:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    with Study(tmp_path, lease=1.0) as study:
        yield study


def everything(engine: Engine) -> list[Any]:
    """Every row of every table, as one compares it."""
    with db.reading(engine) as connection:
        names = inspect(connection).get_table_names()
        return [(name, connection.execute(text(f"SELECT * FROM {name}")).all()) for name in sorted(names)]


def states(engine: Engine) -> dict[int, str]:
    return {row["id"]: row["state"] for row in runs.find(engine)}


def put(engine: Engine, run: int, state: str) -> None:
    """A run in an ended state, as history may have brought it there."""
    with db.transaction(engine) as connection:
        sql = text("UPDATE runs SET state = :state, ended_at = 1, cause = 'bug', message = 'm' WHERE id = :run")
        connection.execute(sql, {"state": state, "run": run})


@pytest.fixture
def mixed(engine: Engine) -> Engine:
    """Runs 1 to 7: done, failed, cancelled, skipped, running, pending, pending."""
    queue.init(engine, [new_stage(7)])
    file = {"path": "checkpoints/x/s/1/a1-s10.pt", "step": 10, "sha256": "x", "bytes": 1}
    queue.finish(engine, claim_one(engine), 10, {"loss": 0.5}, "loss", [("loss", 10, 0.5)], file)
    for run, state in ((2, "failed"), (3, "cancelled"), (4, "skipped")):
        put(engine, run, state)
    assert claim_one(engine).run == 5
    return engine


# ---------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(), "no runs are named"),
        (Choice((1,), filter="loss<1"), "ids of runs and --filter exclude each other"),
        (Choice((1,), stage="s"), "ids of runs and --stage exclude each other"),
        (Choice((99, 1, 98)), "there is no run 98, 99"),
        (Choice(stage="t"), "there is no stage 't'"),
        (Choice(filter="los<1"), "no such name: los"),
        (Choice(filter="state = ready"), "no such state: ready"),
    ],
)
def test_a_choice_that_is_none_is_refused(mixed: Engine, choice: Choice, message: str) -> None:
    with pytest.raises(InputError) as caught:
        steer.retry(mixed, choice)
    assert message in caught.value.message


VERBS: dict[str, Callable[[Engine, Choice, bool], steer.Steered]] = {
    "retry": lambda engine, choice, dry: steer.retry(engine, choice, dry),
    "cancel": lambda engine, choice, dry: steer.cancel(engine, choice, dry_run=dry),
    "cancel now": lambda engine, choice, dry: steer.cancel(engine, choice, True, dry),
    "priority": lambda engine, choice, dry: steer.prioritise(engine, choice, 5, dry),
    "note": lambda engine, choice, dry: steer.note(engine, choice, "odd", dry),
    "tag": lambda engine, choice, dry: steer.tag(engine, choice, "odd", False, dry),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_names_the_runs_that_will_change_and_changes_nothing(mixed: Engine, verb: str) -> None:
    choice = Choice(filter="state in (done, failed, cancelled, skipped, running, pending)")
    before = everything(mixed)

    would = VERBS[verb](mixed, choice, True)
    assert everything(mixed) == before

    did = VERBS[verb](mixed, choice, False)
    assert would.ids == did.ids
    assert would.rows == did.rows
    assert would.left == did.left
    assert did.ids
    assert everything(mixed) != before


@pytest.mark.parametrize("verb", VERBS)
def test_a_choice_that_holds_nothing_changes_nothing(mixed: Engine, verb: str) -> None:
    before = everything(mixed)
    found = VERBS[verb](mixed, Choice(filter="loss > 100"), False)
    assert not found.rows
    assert not found.left
    assert everything(mixed) == before


def test_what_was_changed_is_on_record(mixed: Engine) -> None:
    steer.cancel(mixed, Choice((6,)))
    steer.cancel(mixed, Choice((6,)))  # changes nothing
    with db.reading(mixed) as connection:
        [row] = connection.execute(text("SELECT verb, detail FROM changes"))
    assert row.verb == "cancel"
    assert json.loads(row.detail) == {"runs": [6], "at_once": False}


# ------------------------------------------------------------------------------------------------------- retry


def test_a_retry_by_stage_takes_the_failed_and_leaves_what_somebody_cancelled(mixed: Engine) -> None:
    found = steer.retry(mixed, Choice(stage="s"))
    assert found.ids == [2]
    assert found.left == {"done": [1], "cancelled": [3], "skipped": [4], "running": [5], "pending": [6, 7]}
    assert states(mixed)[2] == "pending"
    row = runs.show(mixed, 2)
    assert (row["cause"], row["message"], row["ended_at"]) == (None, None, None)


@pytest.mark.parametrize("choice", [Choice((3, 4)), Choice(filter="state in (cancelled, skipped)")])
def test_a_retry_that_names_the_run_or_the_state_takes_cancelled_and_skipped_ones(
    mixed: Engine, choice: Choice
) -> None:
    assert steer.retry(mixed, choice).ids == [3, 4]
    assert states(mixed)[3] == states(mixed)[4] == "pending"


def test_a_retried_run_goes_on_from_its_checkpoint_and_counts_its_losses_anew(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine)
    queue.record(engine, claim, 6, (), {"path": "p", "step": 6, "sha256": "x", "bytes": 1})
    queue.record(engine, claim, 9, [("loss", 9, 1.0)])
    queue.fail(engine, claim, "bug", "m")
    steer.retry(engine, Choice((1,)))
    row = runs.show(engine, 1)
    assert (row["steps_done"], row["failures"], row["lost"], row["attempt"]) == (6, 0, 0, 1)
    assert claim_one(engine).checkpoint == {"path": "p", "step": 6, "sha256": "x", "bytes": 1}


def test_a_retry_with_another_value_is_a_new_run_with_its_lineage_and_the_old_one_stays(study: Study) -> None:
    put(study.engine, 1, "failed")
    said = study.rnnq("retry", "1", "--set", "batch_size=2", "--set", "lr=0.01")
    assert "added 1 run\n" in said
    old, new = study.run(1), study.run(5)
    assert old["state"] == "failed"
    assert new["state"] == "pending"
    assert new["config"] == old["config"] | {"batch_size": 2, "lr": 0.01}
    assert [(p["run"], p["kind"], p["detail"]) for p in new["parents"]] == [
        (1, "retry", {"set": {"batch_size": 2, "lr": 0.01}})
    ]
    again = study.rnnq("retry", "1", "--set", "batch_size=2", "--set", "lr=0.01")
    assert "added 0 runs (1 run with these settings is there already)" in again


def test_a_retry_that_changes_nothing_makes_no_run_its_own_parent(study: Study) -> None:
    put(study.engine, 1, "failed")
    assert "added 0 runs" in study.rnnq("retry", "1", "--set", "batch_size=4")
    assert study.run(1)["parents"] == []


def test_failures_count_anew_once_a_run_has_ended_well(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    for _ in range(2):
        assert queue.fail(engine, claim_one(engine), "oom", "m", delay=0.0) == "waiting"
    file = {"path": "p", "step": 10, "sha256": "x", "bytes": 1}
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0}, "loss", (), file)
    assert runs.show(engine, 1)["failures"] == 0
    queue.extend(engine, {1: 20})
    assert queue.fail(engine, claim_one(engine), "oom", "m", delay=0.0) == "waiting"
    assert queue.fail(engine, claim_one(engine), "oom", "m", delay=0.0) == "waiting"
    assert queue.fail(engine, claim_one(engine), "oom", "m", delay=0.0) == "failed"


@pytest.mark.both
def test_a_run_that_waits_is_claimed_once_its_time_has_come(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    queue.fail(engine, claim_one(engine), "oom", "m", delay=60.0)
    wake = runs.show(engine, 1)["wake_at"]
    assert queue.claim(engine, "w", {}, now=wake - 1) == []
    assert claim_one(engine, now=wake + 1).run == 1


def test_a_retry_with_a_wrong_value_says_what_is_wrong_and_adds_nothing(study: Study) -> None:
    put(study.engine, 1, "failed")
    before = everything(study.engine)
    said = study.rnnq("retry", "1", "--set", "batchsize=2", "--set", "lr=-1", code=2)
    assert "has no field batchsize" in said
    assert "batch_size" in said
    assert "lr=-1" in said
    assert everything(study.engine) == before


# ------------------------------------------------------------------------------------------------------ cancel


def test_a_run_that_nobody_has_is_cancelled_at_once_and_one_that_runs_is_wished_so(mixed: Engine) -> None:
    found = steer.cancel(mixed, Choice((1, 5, 6)))
    assert [(row["run"], row["now"]) for row in found.rows] == [(5, "asked to stop"), (6, "cancelled")]
    assert found.left == {"done": [1]}
    assert runs.show(mixed, 5)["wish"] == "cancel"
    assert states(mixed)[6] == "cancelled"


def test_a_cancelled_run_whose_worker_dies_is_cancelled_and_not_given_to_another(mixed: Engine) -> None:
    steer.cancel(mixed, Choice((5,)))
    with db.reading(mixed) as connection:
        now = db.clock(connection)
    [reaped] = queue.reap(mixed, now=now + 1000)
    assert (reaped.run, reaped.state) == (5, "cancelled")
    row = runs.show(mixed, 5)
    assert (row["state"], row["attempts"][0]["ended"]) == ("cancelled", "lost")


def test_a_run_that_is_given_back_in_the_moment_of_its_cancel_is_cancelled(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine)
    steer.cancel(engine, Choice((1,)))
    assert queue.release(engine, claim, "a signal") == "cancelled"
    row = runs.show(engine, 1)
    assert (row["state"], row["wish"], row["attempts"][0]["ended"]) == ("cancelled", None, "cancelled")


def test_a_run_that_ends_before_its_worker_hears_of_the_cancel_is_done(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine)
    steer.cancel(engine, Choice((1,)))
    queue.finish(engine, claim, 10, {"loss": 0.5}, "loss")
    assert states(engine) == {1: "done"}


@pytest.mark.parametrize("cause", ["bug", "oom"])
def test_a_run_that_fails_before_its_worker_hears_of_the_cancel_is_cancelled(engine: Engine, cause: str) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine)
    steer.cancel(engine, Choice((1,)))
    assert queue.fail(engine, claim, cause, "m", "trace") == "cancelled"
    row = runs.show(engine, 1)
    assert (row["state"], row["attempts"][0]["ended"], row["attempts"][0]["traceback"]) == (
        "cancelled", "failed", "trace")  # fmt: skip
    assert queue.hand_back(engine, [claim], "m") == []


def test_a_cancel_at_once_fences_the_worker(engine: Engine) -> None:
    queue.init(engine, [new_stage(1)])
    claim = claim_one(engine)
    steer.cancel(engine, Choice((1,)), at_once=True)
    assert states(engine) == {1: "cancelled"}
    with pytest.raises(LeaseLost, match="it is cancelled now"):
        queue.record(engine, claim, 3, [("loss", 3, 1.0)])
    assert runs.show(engine, 1)["attempts"][0]["ended"] == "cancelled"


def test_the_worker_of_a_cancelled_run_saves_it_and_goes_on_with_the_next(study: Study) -> None:
    worker = study.worker(stage="endless", every=20)
    worker.expect("saved", run=3)
    said = study.rnnq("cancel", "3")
    assert "cancelled 1 run" in said
    assert "within about 0.25 s" in said
    ended = worker.expect("cancelled")
    worker.expect("saved", run=4)
    row = study.run(3)
    assert row["state"] == "cancelled"
    assert row["checkpoint"]["step"] == row["steps_done"] == ended["step"]
    assert study.named(3)
    assert study.ended(3) == [("cancelled", None)]
    worker.send(signal.SIGTERM)
    worker.end()

    study.rnnq("retry", "3")
    again = study.worker(stage="endless", every=20, runs=1)
    assert again.expect("restored")["step"] == ended["step"]
    again.send(signal.SIGTERM)
    again.end()


def test_a_cancel_now_takes_the_run_from_its_worker(study: Study) -> None:
    worker = study.worker(stage="endless", every=20)
    worker.expect("saved", run=3)
    study.rnnq("cancel", "3", "--now")
    assert study.states()[3] == "cancelled"
    worker.expect("lost")
    worker.expect("saved", run=4)
    worker.send(signal.SIGTERM)
    worker.end()
    assert study.states()[3] == "cancelled"


# ------------------------------------------------------------------------------------------------------- pause


def test_a_paused_stage_gives_back_its_runs_with_their_states_and_resumes_from_there(study: Study) -> None:
    worker = study.worker(stage="endless", every=20, pack=1)
    worker.expect("saved", run=3)
    said = study.rnnq("pause", "endless")
    assert "1 running run: saved and given back" in said
    worker.end()  # nothing is left in its scope
    row = study.run(3)
    assert (row["state"], row["wish"]) == ("pending", None)
    assert row["checkpoint"]["step"] == row["steps_done"] > 0
    assert row["attempts"][0]["message"] == "its stage was paused"
    assert "(paused)" in study.rnnq("status")

    study.rnnq("resume", "endless")
    again = study.worker(stage="endless", every=20)
    assert again.expect("restored", run=3)["step"] == row["steps_done"]
    again.send(signal.SIGTERM)
    again.end()


def test_a_cancel_of_what_a_dead_process_held_is_done_at_once(study: Study) -> None:
    worker = study.worker({"at": "saved", "run": 3, "do": "kill"}, stage="endless", every=20)
    worker.end(-signal.SIGKILL)
    assert "cancelled 1 run\n" in study.rnnq("cancel", "3")
    assert study.states()[3] == "cancelled"


@pytest.mark.both
def test_a_pause_that_is_taken_back_before_it_was_heard_leaves_no_trace(mixed: Engine) -> None:
    assert queue.pause(mixed, "s") == [5]
    assert queue.claim(mixed, "w", {}) == []
    queue.resume(mixed, "s")
    assert runs.show(mixed, 5)["wish"] is None
    assert claim_one(mixed).run == 6


def test_a_pause_does_not_save_a_run_that_is_being_cancelled(mixed: Engine) -> None:
    steer.cancel(mixed, Choice((5,)))
    assert queue.pause(mixed, "s") == []
    queue.resume(mixed, "s")
    assert runs.show(mixed, 5)["wish"] == "cancel"


# ------------------------------------------------------------------------------------------------------ extend


def test_an_extended_run_is_trained_on_to_the_bit_along_one_curve(study: Study) -> None:
    study.rnnq("worker", "--stage", "small")
    first = study.result(1)
    said = study.rnnq("extend", "1", "--steps", "300")
    assert "150  300" in said
    row = study.run(1)
    assert (row["state"], row["budget"], row["steps_done"]) == ("pending", 300, 150)
    assert row["config"]["steps"] == 150

    study.rnnq("worker", "--stage", "small")
    longer, straight = study.result(1), study.result(2)

    for part in ("params", "optimizer", "carried", "average"):
        assert longer[part] == straight[part]
    assert longer["curves"]["loss"] == straight["curves"]["loss"]
    assert longer["curves"]["loss"][:15] == first["curves"]["loss"]
    assert [step for step, _ in longer["curves"]["val_loss"]] == [100, 150, 200, 300]
    assert longer["steps"] == 300
    assert [end["summary"]["loss"] for end in study.run(1)["attempts"]] == [first["loss"], longer["loss"]]
    named = {saved["path"] for saved in study.named(1).values()}
    assert {artifact["path"] for artifact in study.run(1)["artifacts"]} == named
    assert {file for file in study.files() if "/1/" in file} == named


def test_more_steps_may_be_said_as_a_difference(mixed: Engine) -> None:
    with db.transaction(mixed) as connection:
        connection.execute(text("UPDATE stages SET family = 'dynamics'"))
    found = steer.extend(mixed, Choice((1, 2)), "+5", Path("defs"))
    assert [(row["run"], row["was"], row["now"]) for row in found.rows] == [(1, 10, 15)]
    assert found.left == {"failed": [2]}
    assert runs.show(mixed, 1)["budget"] == 15


@pytest.mark.parametrize("steps", ["0", "-5", "many", "1e4", "", "+", "5.5", "5_", "1__0", "9" * 30])
def test_steps_that_are_no_number_of_steps_are_refused(mixed: Engine, steps: str) -> None:
    with pytest.raises(InputError, match="not a number of steps"):
        steer.extend(mixed, Choice((1,)), steps, Path("defs"))


def test_runs_that_cannot_be_trained_further_are_left_alone_and_the_reason_is_said(study: Study) -> None:
    study.define("""
import rnnq
class Cosine(rnnq.Config):
    steps: int = 5
    def ends_with_steps(self):
        return "with a schedule that ends"
class Plain(rnnq.Family):
    Config = Cosine
    name = "plain"
    def build(self, config):
        import torch
        return torch.nn.Linear(2, 1)
    def batch(self, config, step):
        import torch
        return torch.ones(3, 2)
    def loss(self, module, data):
        return module(data).square().mean()
@rnnq.family(Cosine)
def toy(config):
    for _ in range(config.steps):
        yield {"loss": 1.0}
cosine = rnnq.stage("cosine", Plain, rnnq.grid(seed=[0]))
toys = rnnq.stage("toys", toy, rnnq.grid(seed=[0]))
""", "own.py")  # fmt: skip
    study.rnnq("init", "defs/own.py")
    study.rnnq("pause", "endless", "small")
    study.rnnq("worker")
    said = study.rnnq("extend", "5", "6", "1", "--steps", "500")
    assert "extended 0 runs" in said
    assert "left alone: 1 with a schedule that ends (5)" in said
    assert "left alone: 1 without a checkpoint to go on from (6)" in said
    assert "left alone: 1 pending (1)" in said
    assert study.states()[5] == "done"


# ------------------------------------------------------------------------------- priority, notes and tags


def test_a_higher_priority_is_claimed_first(mixed: Engine) -> None:
    steer.prioritise(mixed, Choice((7, 1)), 3)
    assert claim_one(mixed).run == 7


@pytest.mark.both
def test_notes_and_tags_are_seen_by_the_filter_language(mixed: Engine) -> None:
    steer.note(mixed, Choice((1, 2)), 'it "spiked"\n at 3')
    steer.tag(mixed, Choice((1, 2, 3)), "odd")
    steer.tag(mixed, Choice((3,)), "lr/high")

    def ids(filter: str) -> list[int]:
        return [row["id"] for row in runs.find(mixed, None, filter)]

    assert ids('note ~ "*spiked*"') == [1, 2]
    assert ids("tag = odd") == [1, 2, 3]
    assert ids("tag != odd") == [4, 5, 6, 7]
    assert ids("not tag = odd and state = pending") == [6, 7]
    assert ids('tag ~ "lr/*"') == [3]
    assert ids('tag !~ "lr/*" and tag = odd') == [1, 2]
    assert ids("tag in (odd, other) and tag not in (lr/high)") == [1, 2]
    steer.tag(mixed, Choice((1,)), "odd", remove=True)
    steer.note(mixed, Choice((1,)), "")
    assert ids("tag = odd") == [2, 3]
    assert ids('note ~ "*"') == [2]
    assert runs.show(mixed, 3)["tags"] == ["lr/high", "odd"]


def test_a_filter_reads_a_point_of_a_curve(mixed: Engine) -> None:
    def ids(filter: str) -> list[int]:
        return [row["id"] for row in runs.find(mixed, None, filter)]

    queue.record(mixed, claim_one(mixed), 20, [("loss", 20, 0.75), ("loss", 30, float("nan"))])  # run 6
    assert ids("loss@10 < 1") == [1]
    assert ids("loss@20 < 1") == [6]
    assert ids("loss@20 > loss@10") == []
    assert ids("loss@30 < 1 or not loss@30 < 1") == []  # null is neither
    assert ids("loss@10 = loss") == [1]


@pytest.mark.parametrize("wrong", ["tag", "tag < 3", "mean(tag) = 1", "tag = 5"])
def test_a_filter_that_takes_a_tag_for_something_else_is_refused(mixed: Engine, wrong: str) -> None:
    with pytest.raises(InputError):
        runs.find(mixed, None, wrong)


@pytest.mark.parametrize("name", ["", "two words", "-x", "a,b", "x" * 101, "a\n", "12", "1e5", "and", "NOT"])
def test_a_tag_is_one_word(mixed: Engine, name: str) -> None:
    with pytest.raises(InputError, match="is no tag"):
        steer.tag(mixed, Choice((1,)), name)


# ------------------------------------------------------------------------------------------------------ stages


def test_a_renamed_stage_keeps_its_runs_its_rule_and_its_files(study: Study) -> None:
    study.rnnq("worker", "--stage", "small")
    study.rnnq("rename", "small", "tiny")
    assert study.named(1)
    assert {row["stage"] for row in study.rows("SELECT stage FROM runs WHERE id < 3")} == {"tiny"}
    said = study.rnnq("promote", "--stage", "tiny", "--top", "1")
    assert "tiny -> tiny-2" in said
    assert study.run(5)["config"]["steps"] == 77


def test_a_run_resumes_under_the_new_name_of_its_stage(study: Study) -> None:
    worker = study.worker({"at": "saved", "run": 1, "step": 100, "do": "kill"}, stage="small", every=50)
    worker.end(-signal.SIGKILL)
    study.rnnq("rename", "small", "tiny")
    assert study.rows("SELECT name, defined_as FROM stages WHERE name = 'tiny'") == [
        {"name": "tiny", "defined_as": "small"}
    ]
    again = study.worker(stage="tiny", every=50)
    assert again.expect("restored", run=1)["step"] == 100
    again.end()
    study.rnnq("rename", "tiny", "small")
    assert study.rows("SELECT defined_as FROM stages WHERE name = 'small'") == [{"defined_as": None}]
    assert not [file for file in study.files() if "s50.pt" in file or "s100.pt" in file]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rename", "smal", "x"), "there is no stage 'smal'"),
        (("rename", "small", "endless"), "there is a stage endless already"),
        (("rename", "small", "a/b"), "a/b"),
        (("delete", "smal", "--yes"), "there is no stage 'smal'"),
        (("delete", "small"), "nobody is here to type the stage's name"),
        (("pause", "smal", "endles"), "there is no stage 'endles'"),
        (("resume", "smal"), "there is no stage 'smal'"),
    ],
)
def test_a_stage_that_is_not_there_or_a_name_that_cannot_be_is_refused(
    study: Study, words: tuple[str, ...], message: str
) -> None:
    before = everything(study.engine)
    said = study.rnnq(*words, code=2)
    assert message in said
    assert "hint: " in said
    assert everything(study.engine) == before


def test_a_deleted_stage_is_gone_with_its_files_and_its_parents_keep_theirs(study: Study) -> None:
    study.rnnq("worker", "--stage", "small")
    study.rnnq("promote", "--stage", "small", "--top", "1", "--to", "next")
    study.rnnq("worker", "--stage", "next")
    parents = study.files() - {file for file in study.files() if "/next/" in file}
    said = study.rnnq("delete", "next", "--dry-run")
    assert "would delete 1 run" in said
    assert study.run(5)["state"] == "done"

    said = study.rnnq("delete", "next", "--yes")
    assert "deleted 1 run" in said
    assert study.files() == parents
    assert parents
    assert study.rows("SELECT * FROM stages WHERE name = 'next'") == []
    assert db.check(study.engine) == []
    # its id is never given to another run
    study.rnnq("promote", "--stage", "small", "--top", "1", "--to", "next")
    assert sorted(study.states()) == [1, 2, 3, 4, 6]

    said = study.rnnq("delete", "small", "--yes")
    assert "1 run of other stages descend" in said
    assert study.run(6)["parents"] == []


@pytest.mark.both
def test_a_stage_with_a_running_run_is_neither_renamed_nor_deleted(mixed: Engine) -> None:
    before = everything(mixed)
    for verb in (lambda: queue.rename(mixed, "s", "x"), lambda: queue.delete(mixed, "s")):
        with pytest.raises(InputError, match="stage s is running: run 5 by w"):
            verb()
    assert everything(mixed) == before


def _delete_until_the_third_commit(address: str) -> None:
    """Delete stage s, and be killed in the middle."""
    committed = 0

    def die(connection: Any) -> None:
        nonlocal committed
        if connection.get_execution_options().get("rnnq_write"):
            committed += 1
            if committed == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    mine = db.open(address)
    event.listen(mine, "commit", die)
    queue.delete(mine, "s")


@pytest.mark.both
def test_a_delete_that_was_killed_is_seen_by_nobody_and_ended_by_the_next(engine: Engine) -> None:
    queue.init(engine, [new_stage(300), new_stage(name="t", runs=new_runs(2))])
    queue.init(engine, [new_stage(name="s", runs=new_runs(400))])  # a second intake
    for run in (1, 2):
        claim = claim_one(engine)
        queue.finish(engine, claim, 10, {"loss": 1.0}, "loss", [("loss", step, 1.0) for step in range(10)])
        assert claim.run == run
    pid = os.fork()
    if pid == 0:
        try:
            _delete_until_the_third_commit(address_of(engine))
        finally:
            os._exit(1)  # it is not for the child to end the tests
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    assert list(runs.stage_infos(engine)) == ["t"]
    assert sorted(states(engine)) == [301, 302]
    with db.reading(engine) as connection:
        left = connection.execute(text("SELECT count(*) FROM runs WHERE stage = 's'")).scalar_one()
    assert 0 < left < 400
    assert steer.delete(engine, "s") == left
    assert db.check(engine) == []
    with db.reading(engine) as connection:
        for table in ("runs", "point", "attempts", "intakes", "stages"):
            column = {"point": "run_id", "attempts": "run_id", "runs": "id"}.get(table)
            sql = f"SELECT count(*) FROM {table}" + (f" WHERE {column} NOT IN (301, 302)" if column else "")
            assert connection.execute(text(sql)).scalar_one() == (0 if column else 1), table


@pytest.mark.both
def test_an_init_that_slept_through_a_delete_adds_nothing_more(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    stage = new_stage(name="s", runs=new_runs(5))
    intakes = queue._open_intakes(engine, [stage])
    with db.transaction(engine) as connection:  # it has been silent for long
        connection.execute(text("UPDATE intakes SET beat_at = 0, pid_start = NULL WHERE NOT complete"))
        connection.execute(text("UPDATE intakes SET removing = :yes WHERE NOT complete"), {"yes": True})
    with pytest.raises(DatabaseError, match="took it for dead"):
        queue._insert_runs(engine, intakes, stage)
    with pytest.raises(DatabaseError, match="took it for dead"):
        queue._complete(engine, intakes, [stage])
    assert sorted(states(engine)) == [1, 2]


@pytest.mark.both
def test_a_delete_takes_the_files_even_when_it_is_interrupted_at_the_rows(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    study, _, root = db.study(engine)
    folder = root / "checkpoints" / study / "s" / "2"
    folder.mkdir(parents=True)
    seen: list[list[int]] = []

    def interrupt(gone: list[int]) -> None:
        seen.append(gone)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.delete(engine, "s", interrupt)
    assert seen == [[1, 2]]
    with db.transaction(engine) as connection:  # by a process that is gone
        connection.execute(text("UPDATE intakes SET pid = 999999999, pid_start = '1'"))
    assert runs.stage_infos(engine) == {}
    assert steer.delete(engine, "s") == 2
    assert not folder.exists()


@pytest.mark.both
def test_a_stage_that_is_being_deleted_is_waited_for_and_made_anew(engine: Engine) -> None:
    queue.init(engine, [new_stage(5)])
    with db.transaction(engine) as connection:  # by a process that is gone
        sql = "UPDATE intakes SET complete = :no, removing = :yes, pid = 999999999, pid_start = '1'"
        connection.execute(text(sql), {"no": False, "yes": True})
    [added] = queue.init(engine, [new_stage(3)])
    assert added.added == 3
    assert sorted(states(engine)) == [6, 7, 8]


@pytest.mark.both
def test_a_stage_that_is_being_added_to_is_neither_renamed_nor_deleted(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    with db.transaction(engine) as connection:
        sql = "INSERT INTO intakes (stage, complete, host, pid, pid_start, beat_at) SELECT stage, :no, host, pid, "
        connection.execute(text(sql + f"pid_start, {db.NOW} FROM intakes"), {"no": False})
    for verb in (lambda: queue.rename(engine, "s", "x"), lambda: queue.delete(engine, "s")):
        with pytest.raises(DatabaseError, match="being added to"):
            verb()


def test_the_base_config_can_be_trained_further() -> None:
    assert config.Config().ends_with_steps() is None


# ------------------------------------------------------------------------------------- through the real program


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("retry",), "no runs are named"),
        (("retry", "99"), "there is no run 99"),
        (("cancel", "1", "--filter", "loss<1"), "exclude each other"),
        (("cancel", "--filter", "los<1"), "no such name: los"),
        (("cancel", "--stage", "nowhere"), "there is no stage 'nowhere'"),
        (("extend", "1", "--steps", "x"), "not a number of steps"),
        (("priority", "5"), "no runs are named"),
        (("priority", "high", "1"), "'high' is not a valid int"),
        (("priority", "9999999", "1"), "is not in the range"),
        (("note", "one", "text"), "'one' is no id of a run"),
        (("note", "text"), "no runs are named"),
        (("tag", "a b", "1"), "'a b' is no tag"),
        (("logs", "99"), "there is no run 99"),
        (("logs", "1", "--attempt", "2"), "run 1 has no attempt 2"),
        (("worker", "--stop", "nobody"), "there is no live worker nobody"),
        (("worker", "--after-run"), "--after-run says when"),
        (("worker", "--processes", "0"), "is not in the range"),
        (("worker", "--processes", "2", "--stage", "nowhere"), "there is no stage 'nowhere'"),
    ],
)
def test_bad_input_is_refused_with_a_hint_and_changes_nothing(
    study: Study, words: tuple[str, ...], message: str
) -> None:
    before = everything(study.engine)
    said = study.rnnq(*words, code=2)
    assert message in said
    assert said.startswith("error: ")
    assert everything(study.engine) == before


def test_what_changed_is_printed_as_rows_and_counted(study: Study) -> None:
    found = json.loads(study.rnnq("tag", "x", "1", "2", "--format", "json").rpartition("]")[0] + "]")
    assert found[0] == {"run": 1, "stage": "small", "label": study.run(1)["label"], "was": "", "now": "x"}
    assert "tagged 0 runs\nleft alone: 2 with this tag already (1, 2)" in study.rnnq("tag", "x", "1", "2")
    assert "no run is like that\ncancelled 0 runs" in study.rnnq("cancel", "--filter", "loss > 5")
