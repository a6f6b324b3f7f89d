"""The results tree: what stands where, what it comes to, and that there is a whole one or none."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sqlalchemy import Engine

from rnnq import checkpoint, db, definitions, folder, plan, queue, results, runs, steer
from rnnq.checkpoint import Owner
from rnnq.errors import Damaged, InputError, RnnqError
from rnnq.queue import Claim
from tests.conftest import Cli, claim_one, new_stage

LOSSES = {"plain": [2.0, 1.0, 4.0], "wide / x": [3.0, 3.0, 3.0]}
STUDY = """\
family: dynamics
base_config: {steps: 10, lr: 1e-5}
n_seeds: 3
experiments:
  - {name: plain}
  - {name: wide / x, overrides: {state_size: 512}}
"""


def add(engine: Engine, folder: Path, text: str = STUDY) -> None:
    """The runs of a study in YAML."""
    path = folder / "study.yaml"
    path.write_text(text)
    queue.init(engine, plan.from_definitions([definitions.load(path)], folder))


def finish(engine: Engine, loss: float) -> None:
    """The next run ends well; a val_loss, and a curve with a hole."""
    points = [("loss", step, 5.0 / step) for step in (5, 10)] + [("val_loss", 10, math.nan)]
    summary = {"loss": loss, "val_loss": loss / 2, "rate": math.inf}
    queue.finish(engine, claim_one(engine), 10, summary, "loss", points)


@pytest.fixture
def study(engine: Engine, tmp_path: Path) -> Engine:
    """Two experiments of three seeds: of the first all are done, of the second one failed and one is left."""
    add(engine, tmp_path)
    for loss in (*LOSSES["plain"], 3.0):
        finish(engine, loss)
    queue.fail(engine, claim_one(engine), "diverged", "the loss is \x1b[2J nan", "Trace")
    return engine


def new_run_of(number: int, label: str, group: str | None = None, seed: int = 0) -> queue.NewRun:
    """A run with a label of its own."""
    return queue.NewRun(label, f'{{"seed":{seed}}}', f"f{number}", group or f"g{number}", seed, None, 10)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def tree(engine: Engine, into: Path, **options: Any) -> Path:
    made = results.write(engine, None, options.pop("filter", None), into, **options)
    assert made is not None
    return made.path


def test_the_tree_has_a_folder_for_each_experiment_and_each_seed_that_has_ended(study: Engine, tmp_path: Path) -> None:
    path = tree(study, tmp_path / "sweeps")

    assert path.parent == tmp_path / "sweeps"
    assert path.name.startswith("study_2")
    assert [one.name for one in path.parent.iterdir()] == [path.name]  # nothing is left beside it
    assert sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_dir()) == [
        "configs",
        "plain",
        "plain/seed_0",
        "plain/seed_1",
        "plain/seed_2",
        "wide___x",
        "wide___x/seed_0",
        "wide___x/seed_1",
    ]
    assert sorted(one.name for one in (path / "plain" / "seed_0").iterdir()) == [
        "config.yaml",
        "curves.csv",
        "metadata.json",
        "run_summary.yaml",
        "train_loss_history.npy",
        "train_loss_steps.npy",
        "val_loss_history.npy",
        "val_loss_steps.npy",
    ]


def test_its_metadata_and_configs_say_what_was_trained(study: Engine, tmp_path: Path) -> None:
    path = tree(study, tmp_path)

    known = read(path / "sweep_metadata.yaml")
    assert known["sweep_name"] == "study"
    assert known["experiments"] == ["plain", "wide___x"]
    assert (known["n_seeds"], known["n_experiments"], known["total_runs"]) == (3, 2, 6)
    assert (known["definition"], known["family"]) == ("study.yaml", "dynamics")
    merged = read(path / "configs" / "wide___x_config.yaml")
    assert "seed" not in merged
    assert merged["lr"] == 1e-5  # a number for every reader
    assert read(path / "wide___x" / "seed_1" / "config.yaml") == {**merged, "seed": 1}


def test_means_and_deviations_are_over_the_finished_seeds_and_say_how_many(study: Engine, tmp_path: Path) -> None:
    path = tree(study, tmp_path)

    plain = read(path / "plain" / "experiment_summary.yaml")
    losses = LOSSES["plain"]
    assert plain["train_loss_stats"] == {
        "n": 3,
        "mean": statistics.fmean(losses),
        "std": pytest.approx(float(np.std(losses))),  # of the population, as numpy has it by default
        "std_sample": pytest.approx(float(np.std(losses, ddof=1))),
        "min": 1.0,
        "max": 4.0,
        "median": 2.0,
    }
    assert plain["val_loss_stats"]["mean"] == pytest.approx(statistics.fmean(losses) / 2)
    assert (plain["total_seeds"], plain["successful_runs"], plain["failed_runs"]) == (3, 3, 0)
    assert plain["success_rate"] == 1.0
    assert "rate" not in plain["metric_stats"]  # no seed has a finite one
    wide = read(path / "wide___x" / "experiment_summary.yaml")
    assert (wide["label"], wide["experiment_name"]) == ("wide / x", "wide___x")
    assert (wide["successful_runs"], wide["failed_runs"], wide["other_runs"]) == (1, 1, 1)
    assert (wide["train_loss_stats"]["n"], wide["train_loss_stats"]["std"]) == (1, 0.0)
    assert wide["train_loss_stats"]["std_sample"] is None
    whole = read(path / "sweep_summary.yaml")
    assert (whole["total_runs"], whole["total_successful_runs"], whole["total_failed_runs"]) == (6, 4, 1)
    assert whole["sweep_completed_at"] is None  # a run has not ended
    assert whole["overall_success_rate"] == pytest.approx(4 / 6)
    assert whole["experiment_statistics"]["plain"]["train_loss_stats"] == plain["train_loss_stats"]
    assert "population" in whole["std"]


def test_each_run_has_its_summary_its_curves_and_its_metadata(study: Engine, tmp_path: Path) -> None:
    path = tree(study, tmp_path)

    one = path / "plain" / "seed_2"
    told = read(one / "run_summary.yaml")
    assert (told["experiment_name"], told["seed"], told["status"]) == ("plain", 2, "completed")
    assert (told["final_train_loss"], told["final_val_loss"]) == (4.0, 2.0)
    assert told["seed_dir"] == "plain/seed_2"
    assert told["training_time"] >= 0
    assert told == read(path / "plain" / "experiment_summary.yaml")["run_details"][2]
    assert np.load(one / "train_loss_history.npy").tolist() == [1.0, 0.5]
    assert np.load(one / "train_loss_steps.npy").tolist() == [5, 10]
    assert np.isnan(np.load(one / "val_loss_history.npy")).tolist() == [True]
    assert "val_loss,10,\n" in (one / "curves.csv").read_text()
    known = json.loads((one / "metadata.json").read_text())
    assert (known["final_train_loss"], known["seed"], known["status"]) == (4.0, 2, "completed")
    assert known["fingerprint"] == runs.show(study, 3)["fingerprint"]


def test_a_failed_run_says_why(study: Engine, tmp_path: Path) -> None:
    place = tree(study, tmp_path) / "wide___x" / "seed_1"

    told = read(place / "error_summary.yaml")
    assert (told["status"], told["cause"]) == ("failed", "diverged")
    assert "the loss is" in told["error"]
    assert "\x1b" not in (place / "error_summary.yaml").read_text()
    assert told["failed_at"]
    assert not (place / "run_summary.yaml").exists()


def test_when_all_have_ended_it_is_complete_and_a_filter_leaves_out(study: Engine, tmp_path: Path) -> None:
    steer.cancel(study, steer.Choice(filter="state = pending"))
    assert read(tree(study, tmp_path) / "sweep_summary.yaml")["total_other_runs"] == 1

    some = tree(study, tmp_path, filter='label = "plain" and seed < 2')
    summary = read(some / "sweep_summary.yaml")
    assert summary["total_runs"] == summary["total_successful_runs"] == 2
    assert summary["sweep_completed_at"] is not None
    assert results.write(study, None, "loss < 0", tmp_path / "never") is None
    assert not (tmp_path / "never").exists()


def test_two_trees_of_one_second_do_not_share_a_folder(study: Engine, tmp_path: Path) -> None:
    first, second = tree(study, tmp_path), tree(study, tmp_path)

    assert first != second
    assert (first / "sweep_summary.yaml").exists()
    assert (second / "sweep_summary.yaml").exists()


def test_labels_that_are_no_names_for_folders_get_ones_that_differ(engine: Engine, tmp_path: Path) -> None:
    labels = ["a/b", "a_b", "A_B", "../..", "configs", "", "x" * 300, "sweep_summary.yaml", "é ∞", "a\nb"]
    made = [new_run_of(number, label) for number, label in enumerate(labels)]
    queue.init(engine, [new_stage(runs=made)])

    path = tree(engine, tmp_path / "out")

    names = read(path / "sweep_metadata.yaml")["experiments"]
    assert len({name.lower() for name in names}) == len(labels)
    assert names[:3] == ["a_b", "a_b_2", "A_B_3"]
    assert sorted(names) == sorted(one.name for one in path.iterdir() if one.is_dir() and one.name != "configs")
    assert [one.name for one in (tmp_path / "out").iterdir()] == [path.name]


def test_two_runs_of_an_experiment_with_one_seed_have_two_folders(engine: Engine, tmp_path: Path) -> None:
    made = [new_run_of(number, "same", group="g", seed=0) for number in range(2)]
    queue.init(engine, [new_stage(runs=made)])
    for _ in made:
        finish(engine, 1.0)

    path = tree(engine, tmp_path)

    assert sorted(one.name for one in (path / "same").iterdir() if one.is_dir()) == ["seed_0", "seed_0_run_2"]


# ------------------------------------------------------------------------------------------------ all or nothing


def test_what_fails_half_way_leaves_nothing(study: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "sweeps"

    def interrupted(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write(study, None, None, into, progress=interrupted)
    assert list(into.iterdir()) == []

    def full(what: str, done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RnnqError, match="No space left on device") as caught:
        results.write(study, None, None, into, progress=full)
    assert caught.value.exit_code == 1
    assert list(into.iterdir()) == []


def test_a_wrong_export_of_a_tree_is_refused(study: Engine, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="File exists"):
        results.write(study, None, None, tmp_path / "file")
    with pytest.raises(InputError, match="there is no stage 'studi'"):
        results.write(study, "studi", None, tmp_path)
    queue.init(study, [new_stage(name="other")])
    with pytest.raises(InputError, match=r"there are 2 stages \(study, other\): which one"):
        results.write(study, None, None, tmp_path)
    done = cli("export", "--layout", "sweep", "--out", "x.csv", code=2)
    assert "--out does not go with --layout" in done.stderr
    assert "--layout sweep needs the folder" in done.stderr
    assert "a folder goes with --layout sweep" in cli("export", "sweeps", code=2).stderr


def test_the_command_prints_where_the_tree_is(study: Engine, cli: Cli, tmp_path: Path) -> None:
    done = cli("export", "--layout", "sweep", "sweeps", "--stage", "study")

    assert (tmp_path / done.stdout.strip() / "sweep_summary.yaml").exists()
    assert done.stderr == "2 experiments, 6 runs, 1 of them not ended yet\n"


# ------------------------------------------------------------------------------------------------------- weights


def keep(engine: Engine, claim: Claim, content: dict[str, Any], name: str) -> dict[str, Any]:
    """A checkpoint file as a worker makes one, and how a row names it."""
    study, _, root = db.study(engine)
    owner = Owner(study, claim.stage, claim.run, claim.fingerprint)
    path = checkpoint.relative_path(owner, claim.attempt, 10, name)
    saved = checkpoint.publish(root, path, checkpoint.write_aside(root, path, owner, content), 10)
    return vars(saved)


def test_weights_come_along_when_they_are_asked_for(engine: Engine, tmp_path: Path) -> None:
    add(engine, tmp_path, STUDY.replace("n_seeds: 3", "n_seeds: 1"))
    claim = claim_one(engine)
    last = {"members": {"params": {"w": torch.ones(1, 2)}, "carried": {"module.mean": torch.zeros(1, 3)}}}
    best = {"params": {"w": torch.full((1, 2), 2.0)}}
    saved = keep(engine, claim, last, ""), keep(engine, claim, best, "-best")
    queue.finish(engine, claim, 10, {"loss": 1.0}, "loss", [], checkpoint=saved[0], best=saved[1])
    finish(engine, 2.0)  # it keeps none

    made = results.write(engine, None, None, tmp_path / "out", weights=True)

    assert made is not None
    assert made.remarks == ["run 2 has no checkpoint: its weights are not there"]
    kept = made.path / "plain" / "seed_0" / "checkpoints"
    final = torch.load(kept / "final_model.pt", weights_only=True)
    assert {name: tensor.tolist() for name, tensor in final.items()} == {"w": [1.0, 1.0], "mean": [0.0, 0.0, 0.0]}
    assert torch.load(kept / "best_model.pt", weights_only=True)["w"].tolist() == [2.0, 2.0]

    (tmp_path / saved[0]["path"]).write_bytes(b"other bytes")
    with pytest.raises(Damaged):
        results.write(engine, None, None, tmp_path / "again", weights=True)
    assert list((tmp_path / "again").iterdir()) == []


def test_snapshots_become_one_file_with_their_steps_unless_they_are_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (100, 20, 3):
        folder.write_snapshot(tmp_path, step, {"w": torch.full((1, 2), float(step))})
    monkeypatch.setattr(folder, "JOINED", 10)
    folder.join_snapshots(tmp_path)
    assert len(list((tmp_path / "snapshots").iterdir())) == 3

    monkeypatch.undo()
    folder.join_snapshots(tmp_path)

    history = torch.load(tmp_path / "param_history.pt", weights_only=True)
    assert [one["w"].tolist() for one in history] == [[3.0, 3.0], [20.0, 20.0], [100.0, 100.0]]
    assert np.load(tmp_path / "param_history_steps.npy").tolist() == [3, 20, 100]
    assert not (tmp_path / "snapshots").exists()
