"""rnnq gc: what goes, what stays whatever happens, and in which order; also while workers train and are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from rnnq import db, definitions, doctor, garbage, logs, plan, promote, queue, runs, steer
from rnnq.errors import DatabaseError, InputError
from rnnq.promote import Request
from rnnq.steer import Choice
from tests.conftest import Cli, claim_one, new_runs, new_stage
from tests.processes import Study, pseudo_text
from tests.studies import add, new_run


def root(engine: Engine) -> Path:
    return db.study(engine)[2]


def file(engine: Engine, claim: queue.Claim, step: int, kind: str = "", size: int = 10) -> dict[str, Any]:
    """A checkpoint file of an attempt on disk, and what a row says of it."""
    study, _, place = db.study(engine)
    path = f"checkpoints/{study}/{claim.stage}/{claim.run}/a{claim.attempt}-s{step}{kind}.pt"
    (place / path).parent.mkdir(parents=True, exist_ok=True)
    (place / path).write_bytes(b"x" * size)
    return {"path": path, "step": step, "bytes": size, "sha256": "0"}


def finish(engine: Engine, loss: float = 1.0, best: bool = True, worker: str = "w") -> queue.Claim:
    """Train the next run to its end: a last checkpoint of 10 bytes, a best one of 7."""
    claim = claim_one(engine, worker)
    kept = file(engine, claim, 5, "-best", 7) if best else None
    queue.finish(engine, claim, 10, {"loss": loss}, "loss", (), file(engine, claim, 10), kept)
    return claim


def study_of(engine: Engine, losses: list[float], keep: str | None = None, name: str = "s", **changes: Any) -> None:
    """A stage of finished runs, each a group of its own."""
    add(engine, [new_run(i) for i in range(len(losses))], name=name, keep=keep, **changes)
    for loss in losses:
        finish(engine, loss)


def collect(engine: Engine, stage: str | None = None, keep: str | None = None) -> garbage.Gone:
    return garbage.collect(engine, garbage.look(engine, stage, keep))


def on_disk(engine: Engine) -> set[str]:
    """Every file below checkpoints/ as run/name."""
    places = (root(engine) / "checkpoints").rglob("*")
    return {f"{path.parent.name}/{path.name}" for path in places if path.is_file() or path.is_symlink()}


def kept(engine: Engine) -> dict[int, str]:
    """What the row of each run names: last, best, both or nothing; each of which is there."""
    found = {}
    for row in runs.find(engine):
        files = {"last": row["checkpoint"], "best": row["checkpoint_best"]}
        assert all((root(engine) / one["path"]).exists() for one in files.values() if one), "a row names what is gone"
        found[row["id"]] = " ".join(name for name, one in files.items() if one)
    return found


def changes(engine: Engine, verb: str) -> list[dict[str, Any]]:
    with db.reading(engine) as connection:
        sql = text("SELECT detail FROM changes WHERE verb = :verb ORDER BY id")
        return [json.loads(words) for words in connection.execute(sql, {"verb": verb}).scalars()]


# ------------------------------------------------------------------------------------------------------- the rules


def test_without_a_rule_last_and_best_of_every_finished_run_stay(engine: Engine) -> None:
    study_of(engine, [1.0, 2.0])
    assert collect(engine).files == 0
    assert kept(engine) == {1: "last best", 2: "last best"}
    assert changes(engine, "gc") == []


@pytest.mark.parametrize(
    ("rule", "stays"),
    [
        ("last", ["last"] * 4),
        ("best", ["best"] * 4),
        ("none", [""] * 4),
        ("best of top 25%", ["", "best", "", ""]),
        ("last and best of top 2, best for losers", ["best", "last best", "best", "last best"]),
        ("best of top 10", ["best"] * 4),
        ("none for losers", ["last best"] * 4),  # it was never promoted, so nobody has lost
    ],
)
def test_a_rule_keeps_what_it_says(engine: Engine, rule: str, stays: list[str]) -> None:
    study_of(engine, [3.0, 1.0, 4.0, 2.0], keep=rule)
    collect(engine)
    assert list(kept(engine).values()) == stays
    assert len(on_disk(engine)) == sum(len(words.split()) for words in stays)
    assert collect(engine).files == 0


def test_high_is_good_where_the_family_says_so(engine: Engine) -> None:
    metric = {"name": "loss", "unit": "", "better": "max", "primary": True}
    study_of(engine, [3.0, 1.0, 4.0, 2.0], keep="best of top 1", metrics=[metric])
    collect(engine)
    assert list(kept(engine).values()) == ["", "", "best", ""]


@pytest.mark.both
def test_a_group_wins_or_loses_with_all_its_seeds_and_one_that_lacks_seeds_loses_to_nobody(engine: Engine) -> None:
    made = [new_run(i, group=f"g{i // 2}", seed=i % 2) for i in range(6)]
    add(engine, made, keep="best of top 1")
    for loss in (1.0, 9.0, 3.0, 3.0, 99.0):  # means 5 and 3; the third group has one seed
        finish(engine, loss)
    queue.fail(engine, claim_one(engine), "bug", "x")

    found = garbage.look(engine)
    garbage.collect(engine, found)

    assert kept(engine) == {1: "", 2: "", 3: "best", 4: "best", 5: "best", 6: ""}
    assert found.unjudged == {"s": 1}


def test_what_is_let_go_while_others_are_open_would_lose_at_the_end_too(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(10)], keep="last and best of top 20%")
    for loss in (3.0, 1.0, 2.0):
        finish(engine, loss)
    collect(engine)
    assert list(kept(engine).values())[:3] == ["", "last best", "last best"]  # the best two of ten
    for loss in (0.5, 9, 9, 9, 9, 9, 9):
        finish(engine, loss)
    collect(engine)
    assert [run for run, words in kept(engine).items() if words] == [2, 4]


@pytest.mark.both
def test_after_a_promote_losers_keep_their_best_alone(engine: Engine) -> None:
    study_of(engine, [1.0, 2.0, 3.0])
    child = new_runs(1)[0]
    child = queue.NewRun(**{**vars(child), "parents": ((2, "promote", "{}"),)})
    queue.init(engine, [new_stage(name="next", runs=[child])])
    collect(engine)
    assert list(kept(engine).values())[:3] == ["best", "last best", "best"]


def test_a_run_that_ended_after_the_promote_has_not_lost(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(3)], keep="none for losers")
    for loss in (1.0, 2.0):
        finish(engine, loss)
    child = queue.NewRun(**{**vars(new_runs(1)[0]), "parents": ((1, "promote", "{}"),)})
    queue.init(engine, [new_stage(name="next", runs=[child])])
    finish(engine, 0.5)
    collect(engine)
    assert list(kept(engine).values())[:3] == ["last best", "", "last best"]


def test_where_the_best_is_the_last_or_none_is_kept_the_last_stays(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(2)], keep="best")
    finish(engine, best=False)
    claim = claim_one(engine)
    one = file(engine, claim, 10)
    queue.finish(engine, claim, 10, {"loss": 1.0}, "loss", (), one, one)
    assert collect(engine).files == 0
    assert kept(engine) == {1: "last", 2: "last best"}


def test_a_row_that_cannot_be_read_stops_everything(engine: Engine) -> None:
    study_of(engine, [1.0], keep="none")
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE runs SET checkpoint_prev = '{}'"))
    with pytest.raises(DatabaseError, match="nothing was deleted"):
        garbage.look(engine)


# ------------------------------------------------------------------------------------- what stays whatever is said


def test_only_runs_that_are_done_let_anything_go(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(5)], keep="none")
    for end in ("fail", "release", "cancel", "extend"):
        claim = claim_one(engine)
        queue.record(engine, claim, 5, (), file(engine, claim, 5))
        if end == "fail":
            queue.fail(engine, claim, "bug", "x")
        elif end == "cancel":
            queue.cancel(engine, [claim.run], at_once=True)
        elif end == "extend":
            queue.finish(engine, claim, 10, {"loss": 1.0}, "loss", (), file(engine, claim, 10))
            queue.extend(engine, {claim.run: 20})
        else:
            queue.release(engine, claim)
        queue.prioritise(engine, [claim.run], -1)  # so that the next claim takes another
    running = claim_one(engine)
    queue.record(engine, running, 5, (), file(engine, running, 5))
    before = kept(engine)
    assert collect(engine).files == 1  # of the run that is extended the file of step 5, which its row let go before
    assert kept(engine) == before
    assert set(before.values()) == {"last"}


@pytest.mark.parametrize("state", ["pending", "failed", "cancelled"])
@pytest.mark.both
def test_a_run_keeps_what_a_run_that_goes_on_from_it_may_still_need(engine: Engine, state: str) -> None:
    study_of(engine, [1.0, 2.0], keep="none")
    child = queue.NewRun(**{**vars(new_runs(1)[0]), "parents": ((1, "continue", "{}"),)})
    queue.init(engine, [new_stage(name="next", runs=[child])])
    if state == "failed":
        queue.fail(engine, claim_one(engine), "bug", "x")
    elif state == "cancelled":
        queue.cancel(engine, [3])
    collect(engine)
    assert kept(engine) == {1: "last best", 2: "", 3: ""}
    if state == "pending":
        finish(engine)
        collect(engine)
        assert kept(engine)[1] == ""


def test_a_row_that_changed_meanwhile_keeps_its_files(engine: Engine) -> None:
    study_of(engine, [1.0, 2.0], keep="none")
    found = garbage.look(engine)
    queue.extend(engine, {1: 20})
    child = queue.NewRun(**{**vars(new_runs(1)[0]), "parents": ((2, "continue", "{}"),)})
    queue.init(engine, [new_stage(name="next", runs=[child])])

    gone = garbage.collect(engine, found)

    assert (gone.files, gone.kept) == (0, 2)
    assert kept(engine) == {1: "last best", 2: "last best", 3: ""}
    assert changes(engine, "gc") == []


def test_the_row_lets_go_before_the_file_goes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    study_of(engine, [1.0], keep="none")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(garbage, "_remove", killed)
        collect(engine)
    assert kept(engine) == {1: ""}
    assert len(on_disk(engine)) == 2
    assert runs.show(engine, 1)["artifacts"] == []
    assert collect(engine).files == 2  # nobody names them any more
    assert on_disk(engine) == set()


# ----------------------------------------------------------------------------------------- files that no row names


def beside(engine: Engine, claim: queue.Claim, name: str) -> Path:
    """Another file in a run's folder."""
    study, _, place = db.study(engine)
    path = place / "checkpoints" / study / claim.stage / str(claim.run) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"garbage")
    return path


@pytest.mark.both
def test_files_of_dead_attempts_go_and_those_of_the_living_stay(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    claim = claim_one(engine, now=1000.0)
    dead = [beside(engine, claim, "a1-s7.pt"), beside(engine, claim, "a1-s7-best.pt")]
    aside = beside(engine, claim, ".a1-s9.pt.123.tmp")
    assert collect(engine).files == 0  # a worker may be about to name them
    queue.reap(engine, now=2000.0)
    again = claim_one(engine)
    living = [beside(engine, again, "a2-s7.pt"), beside(engine, again, ".a2-s9.pt.123.tmp")]

    gone = collect(engine)

    assert (gone.files, gone.bytes) == (2, 14)
    assert not any(path.exists() for path in dead)
    assert all(path.exists() for path in [*living, aside])  # a worker that only slept still writes the one aside
    assert changes(engine, "gc") == [{"files": 2, "bytes": 14}]


@pytest.mark.both
def test_a_temporary_file_goes_once_its_worker_has_left_or_nobody_has_written_it_for_an_hour(engine: Engine) -> None:
    queue.init(engine, [new_stage(2)])
    first, second = claim_one(engine, "one"), claim_one(engine, "two")
    files = [beside(engine, claim, ".a1-s9.pt.123.tmp") for claim in (first, second)]
    for claim in (first, second):
        queue.release(engine, claim)
    assert collect(engine).files == 0
    queue.leave(engine, "one", "done")
    collect(engine)
    assert [path.exists() for path in files] == [False, True]
    os.utime(files[1], (0, 0))
    collect(engine)
    assert not files[1].exists()


def test_logs_and_checkpoints_of_runs_that_are_gone_go_and_other_logs_stay(engine: Engine) -> None:
    study_of(engine, [1.0])
    study, _, place = db.study(engine)
    stranger = queue.Claim(**{**vars(claim_of_nobody()), "run": 77})
    beside(engine, stranger, "a1-s5.pt")
    for run in (1, 77):
        logs.path(place, study, run, 1).parent.mkdir(parents=True)
        logs.path(place, study, run, 1).write_text("words")
    collect(engine)
    assert logs.path(place, study, 1, 1).exists()
    assert not logs.path(place, study, 77, 1).exists()
    assert "77/a1-s5.pt" not in on_disk(engine)
    assert kept(engine) == {1: "last best"}


def claim_of_nobody() -> queue.Claim:
    nothing = dict.fromkeys(queue.Claim.__dataclass_fields__)
    return queue.Claim(**{**nothing, "run": 1, "attempt": 1, "stage": "s"})  # type: ignore[arg-type]


def test_what_is_not_named_as_rnnq_names_its_files_is_left_alone(engine: Engine) -> None:
    study_of(engine, [1.0])
    mine = [beside(engine, claim_of_nobody(), name) for name in ("notes.txt", "a1.pt", "a1-s3.pt.bak", "b1-s3.pt")]
    (mine[0].parent.parent / "a9-s9.pt").write_text("beside the run's folder")
    found = garbage.look(engine)
    assert garbage.collect(engine, found).files == 0
    assert all(path.exists() for path in mine)
    assert found.left == {"not named as rnnq names its files": 5}


def test_links_and_paths_that_lead_elsewhere_are_never_followed(engine: Engine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = [outside / name for name in ("a1-s10.pt", "a1-s5-best.pt", "a3-s3.pt")]
    for path in precious:
        path.write_text("precious")
    study_of(engine, [1.0, 2.0, 3.0, 4.0], keep="none")
    study, _, place = db.study(engine)
    home = place / "checkpoints" / study / "s"
    (home / "9").symlink_to(outside)  # a folder of a run that is not there
    beside(engine, claim_of_nobody(), "a0-s3.pt").unlink()
    (home / "1" / "a0-s3.pt").symlink_to(precious[2])  # a file that no row names
    (home / "2" / "a1-s10.pt").unlink()
    (home / "2" / "a1-s10.pt").symlink_to(precious[0])  # a file that a row names
    (home / "4").rename(outside / "4")
    (home / "4").symlink_to(outside / "4")  # a whole folder
    with db.transaction(engine) as connection:  # a row that names a file elsewhere, as a stranger's database may
        saved = json.dumps(
            {"path": f"checkpoints/{study}/s/3/../../../../outside/a3-s3.pt", "step": 3, "bytes": 1, "sha256": ""}
        )
        connection.execute(text("UPDATE runs SET checkpoint = :saved WHERE id = 3"), {"saved": saved})

    collect(engine)

    assert [path.read_text() for path in precious] == ["precious"] * 3
    assert (home / "1" / "a0-s3.pt").is_symlink()
    assert (home / "2" / "a1-s10.pt").is_symlink()
    assert runs.show(engine, 1)["checkpoint"] is None
    assert runs.show(engine, 2)["checkpoint"] is not None
    assert runs.show(engine, 3)["checkpoint"] is not None
    assert runs.show(engine, 4)["checkpoint"] is not None
    assert len(list((outside / "4").iterdir())) == 2


def test_a_study_whose_checkpoints_lie_on_another_disk_behind_a_link_is_collected(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "large").mkdir()
    (root(engine) / "checkpoints").symlink_to(tmp_path / "large")
    study_of(engine, [1.0], keep="best")
    assert collect(engine).files == 1
    assert kept(engine) == {1: "best"}


def test_a_run_never_lets_go_of_a_file_of_another_run(engine: Engine) -> None:
    study_of(engine, [1.0, 2.0])
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE runs SET checkpoint = (SELECT checkpoint FROM runs WHERE id = 1) WHERE id = 2"))
        connection.execute(text("UPDATE runs SET checkpoint_best = NULL WHERE id = 2"))
    found = garbage.look(engine, "s", "none")
    assert found.left["links, or not the run's own"] == 1
    assert [one.run for one in found.leaving["s"]] == [1]


# ---------------------------------------------------------------------------------------------- stages and commands


def test_only_the_stage_that_is_asked_for_is_collected(engine: Engine) -> None:
    study_of(engine, [1.0], keep="none", name="a")
    study_of(engine, [1.0], keep="none", name="b")
    collect(engine, "b")
    assert kept(engine) == {1: "last best", 2: ""}
    with pytest.raises(InputError, match="no stage"):
        garbage.look(engine, "c")
    with pytest.raises(InputError, match="of one stage"):
        garbage.look(engine, None, "best")


def test_an_init_that_is_silent_leaves_the_rule_and_one_that_says_another_sets_it(engine: Engine) -> None:
    add(engine, [new_run(0)], keep="best")
    add(engine, [new_run(0)])
    assert runs.stage_info(engine, "s").keep == "best"
    queue.keep(engine, "s", "last")
    assert runs.stage_info(engine, "s").keep == "last"
    add(engine, [new_run(0)], keep="none")
    assert runs.stage_info(engine, "s").keep == "none"
    assert changes(engine, "keep") == [{"stage": "s", "rule": "last"}]


def test_extending_or_sampling_what_gc_took_says_so(engine: Engine) -> None:
    study_of(engine, [1.0, 2.0], keep="best of top 1")
    add(engine, [new_run(0)], name="none")
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0}, "loss")  # a generator, which never had a checkpoint
    collect(engine)
    found = steer.extend(engine, Choice([1, 2, 3]), "50", Path("defs"))
    why = "without a last checkpoint: `rnnq gc` deleted it (its rule: best of top 1, none for losers)"
    assert found.left == {why: [1, 2], "without a checkpoint to go on from": [3]}


@pytest.mark.both
def test_what_went_is_logged_with_counts_and_bytes(engine: Engine) -> None:
    study_of(engine, [1.0, 2.0])
    collect(engine, "s", "best")
    detail = {"stage": "s", "rule": "best", "runs": [1, 2], "files": 2, "bytes": 20}
    assert changes(engine, "gc") == [detail]
    assert {f.level for f in doctor.examine(engine) if f.name in ("checkpoints", "files")} == {"ok"}
    assert [one["kind"] for one in runs.show(engine, 1)["artifacts"]] == ["checkpoint_best"]


def test_the_command_tells_asks_and_then_deletes(cli: Cli, engine: Engine) -> None:
    study_of(engine, [1.0, 2.0, 3.0])

    told = cli("gc", "--stage", "s", "--keep", "best of top 1", "--dry-run")
    assert "would delete 5 files of 44 B" in told.stderr
    assert "s keeps: best of top 1, none for losers" in told.stderr
    assert told.stdout.split()[:5] == ["stage", "kind", "files", "size", "stay"]
    asked = cli("gc", "--stage", "s", "--keep", "best of top 1", code=2)
    assert "nobody is here to say yes" in asked.stderr
    assert "--yes" in asked.stderr
    assert (kept(engine)[3], runs.stage_info(engine, "s").keep) == ("last best", None)

    done = cli("gc", "--stage", "s", "--keep", "best of top 1", "--yes", "--format", "json")
    assert "deleted 5 files of 44 B" in done.stderr
    shown = json.loads(done.stdout)
    assert (shown["files"], shown["bytes"]) == (5, 44)
    assert shown["rules"] == {"s": "best of top 1, none for losers"}
    row = {"stage": "s", "kind": "best", "files": 2, "bytes": 14, "stay": 1, "stay_bytes": 7}
    assert row in shown["rows"]
    assert runs.stage_info(engine, "s").keep == "best of top 1, none for losers"
    assert kept(engine) == {1: "best", 2: "", 3: ""}
    assert collect(engine).files == 0


def test_a_promoted_stage_inherits_the_rule_or_takes_another(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(pseudo_text(20_000))
    (tmp_path / "one.py").write_text(f"""
import rnnq
three = rnnq.stage("three", keep="last of top 5")
stage = rnnq.stage("one", "dynamics", rnnq.grid(seed=[0]), keep="best", next=three, base=dict(
    corpus={str(tmp_path / "text")!r}, state_size=4, window=32, steps=20))
""")
    queue.init(engine, plan.from_definitions([definitions.load(tmp_path / "one.py")], tmp_path))
    finish(engine)

    def promoted(to: str | None = None, keep: str | None = None, seeds: int | None = None) -> str | None:
        request = Request("one", "1", to=to, keep=keep, seeds=seeds, defs=tmp_path)
        made = promote.prepare(engine, request).stage
        queue.init(engine, [made])
        return runs.stage_info(engine, made.name).keep

    assert promoted("two") == "best"
    assert promoted() == "last of top 5, none for losers"  # next= declares it
    assert promoted("four", "BEST, none for losers") == "best, none for losers"
    queue.keep(engine, "two", "none")
    assert promoted("two", seeds=2) == "none"  # a stage that is there keeps its own
    assert promoted("two", "last", seeds=3) == "last"
    with pytest.raises(InputError, match="is no rule"):
        promoted("five", "bets")


# ----------------------------------------------------------------------------------------------- beside real workers

DEFINITION = """
import rnnq
stage = rnnq.stage("s", "dynamics", rnnq.grid(state_size=[4, 6, 8, 10]), base=dict(
    corpus="text", window=32, batch_size=4, log_every=10, eval_every=50, steps=200), keep="best of top 2")
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pending runs, each a group of its own."""
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


def test_what_killed_workers_leave_goes_while_others_train_on(study: Study) -> None:
    killed = [
        study.worker({"at": "written", "do": "kill", "step": 40}, every=20),  # a file aside
        study.worker({"at": "committing", "do": "kill", "step": 60}, every=20),  # a file with a name, not in the row
    ]
    for process in killed:
        process.end(-signal.SIGKILL)
    left = [path for path in study.files() if path.endswith(".tmp")]
    assert left
    workers = [study.worker(every=20) for _ in range(2)]
    sweeps = 0
    while any(worker.lives for worker in workers):  # as often as can be, while they write, name and replace files
        study.rnnq("gc", "--yes")
        sweeps += 1
        for run in study.states():
            row = study.run(run)
            if row["state"] == "done" and row["checkpoint_best"]:
                assert (study.folder / row["checkpoint_best"]["path"]).exists()
    for worker in workers:
        worker.end()
    assert sweeps > 1
    assert set(study.states().values()) == {"done"}
    study.rnnq("gc", "--yes")
    best = sorted(study.states(), key=lambda run: study.run(run)["loss"])[:2]
    named = {one["path"] for run in study.states() for one in study.named(run).values()}
    assert study.files() == named
    assert {int(path.split("/")[3]) for path in named} == set(best)
    said = study.rnnq("doctor")
    assert "missing" not in said
    assert "that no row names" not in said


def test_a_worker_that_slept_through_its_lease_and_a_collection_loses_nothing_but_its_own_attempt(study: Study) -> None:
    sleeper = study.worker({"at": "written", "do": "stop", "step": 40}, every=20)
    told = sleeper.expect("trapped")
    run = told["run"]
    sleeper.expect("stopped")
    other = study.worker(every=20)
    other.end()
    study.rnnq("gc", "--yes")
    assert any(path.endswith(".tmp") for path in study.files())  # its process lives: the file aside is left to it
    sleeper.send(signal.SIGCONT)
    sleeper.expect("lost", run=run)
    sleeper.end()
    study.rnnq("gc", "--yes")
    assert not any(path.endswith(".tmp") for path in study.files())
    assert set(study.states().values()) == {"done"}


def test_sampling_what_gc_took_says_so(study: Study) -> None:
    study.worker(every=100).end()
    study.rnnq("gc", "--yes")
    rows = {row["id"]: row for row in runs.find(study.engine)}
    winner = next(run for run, row in rows.items() if row["checkpoint_best"])
    loser = next(run for run, row in rows.items() if not row["checkpoint_best"])
    assert "`rnnq gc` deleted the checkpoints" in study.rnnq("sample", str(loser), code=2)
    if rows[winner]["checkpoint"] is None:
        said = study.rnnq("sample", str(winner), "--checkpoint", "last", code=2)
        assert "`rnnq gc` deleted the last checkpoint" in said
        assert "--checkpoint best" in said
    assert study.rnnq("sample", str(winner), "--length", "5")
    said = study.rnnq("extend", "--steps", "+10", str(loser))
    assert "`rnnq gc` deleted it" in said
