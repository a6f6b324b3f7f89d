"""Snapshots: weights at steps that a config names, once each whatever happens to the worker, and never collected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine

from rnnq import checkpoint, db, garbage, queue, runs
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import LeaseLost
from tests.conftest import claim_one
from tests.processes import Study
from tests.studies import add, new_run

STUDY = """
import rnnq
base = {
    "data": {"p": 8, "k": 2, "template_type": "onehot", "batch_size": 16},
    "model": {"hidden_dim": 16, "init_scale": 0.5},
}
stage = rnnq.stage("s", "groups", rnnq.configs(
    [{"training": {"num_steps": 40, "save_param_interval": n, "learning_rate": 0.01}} for n in (10, 15)]), base=base)
"""
STEPS = {1: [0, 10, 20, 30, 40], 2: [0, 15, 30, 40]}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with made(tmp_path / "study") as found:
        yield found


def made(folder: Path) -> Study:
    found = Study(folder, lease=2.0)
    found.rnnq("init", found.define(STUDY))
    return found


def snapshots(study: Study, run: int) -> dict[int, dict[str, Any]]:
    """The weights of each snapshot of a run, by step, read from the files that the rows name."""
    rows = [row for row in study.run(run)["artifacts"] if row["kind"] == "snapshot"]
    assert len(rows) == len({row["step"] for row in rows}), "a step has one snapshot"
    identity, _, root = db.study(study.engine)
    owner = Owner(identity, "s", run, study.run(run)["fingerprint"])
    found = {row["step"]: Saved(row["path"], row["step"], row["sha256"], row["bytes"]) for row in rows}
    return {step: checkpoint.load(root, saved, owner)["params"] for step, saved in sorted(found.items())}


def same(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[step][name], b[step][name]) for step in a for name in a[step])


@pytest.mark.parametrize("at", ["snapshot", "written"], ids=["after the row", "before the row"])
def test_each_member_of_a_pack_has_its_own_once_each_though_the_worker_was_killed(
    study: Study, tmp_path: Path, at: str
) -> None:
    """Killed at step 20, with a checkpoint of step 14: step 15 comes a second time for one, step 20 for the other."""
    with made(tmp_path / "quiet") as quiet:
        quiet.worker(every=14).end()
        study.worker({"at": at, "run": 1, "step": 20, "do": "kill"}, every=14, pack=2).end(-9)
        study.worker(every=14, pack=2).end()

        assert study.states() == {1: "done", 2: "done"}
        for run, steps in STEPS.items():
            assert list(snapshots(study, run)) == steps
            assert same(snapshots(study, run), snapshots(quiet, run))
            assert study.result(run) == quiet.result(run)


def test_gc_takes_what_the_kill_left_behind_and_no_snapshot(study: Study) -> None:
    study.worker({"at": "written", "run": 1, "step": 20, "do": "kill"}, every=14).end(-9)
    study.worker(every=14).end()
    before = {run: snapshots(study, run) for run in STEPS}

    found = garbage.look(study.engine, "s", keep="none")
    garbage.collect(study.engine, found)

    named = {row["path"] for run in STEPS for row in study.run(run)["artifacts"]}
    assert study.files() == named, "the last and the best checkpoint went, and whatever no row names"
    assert found.shares["s", "snapshots"].stay == 9
    assert all(same(snapshots(study, run), kept) for run, kept in before.items())

    assert "snapshots: 5, from step 0 to step 40, 0.0 MB" in study.rnnq("show", "1")
    study.rnnq("delete", "s", "--yes")
    assert study.files() == set()


def saved(step: int, attempt: int) -> dict[str, Any]:
    return {"path": f"checkpoints/x/s/1/a{attempt}-s{step}-snapshot.pt", "step": step, "bytes": 9, "sha256": "0"}


def test_a_later_attempt_replaces_what_it_makes_again_and_a_stale_worker_is_refused(engine: Engine) -> None:
    add(engine, [new_run(0)], name="s")
    first = claim_one(engine, "first")
    assert queue.snapshot(engine, first, saved(0, 1)) == []
    assert queue.snapshot(engine, first, saved(10, 1)) == []
    queue.reap(engine, now=first.until + 1)
    second = claim_one(engine, "second")

    with pytest.raises(LeaseLost):
        queue.snapshot(engine, first, saved(20, 1))
    assert queue.snapshot(engine, second, saved(10, 2)) == [saved(10, 1)["path"]]

    kept = [(one["step"], one["path"]) for one in runs.show(engine, 1)["artifacts"]]
    assert kept == [(0, saved(0, 1)["path"]), (10, saved(10, 2)["path"])]
