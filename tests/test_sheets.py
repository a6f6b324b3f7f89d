"""The CSV of each run, as the scaling study wrote them: what stands where, and that partial runs say so."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from rnnq import config as configs
from rnnq import queue, sheets
from rnnq.errors import InputError, RnnqError
from rnnq.families.scaling import counts
from rnnq.families.scaling.config import ScalingConfig
from tests.conftest import Cli, claim_one, new_stage
from tests.studies import add, finish, new_run

STEPS = 10
HEADER = "step,training_loss,validation_loss,total_flops_profiler,theoretical_flops,tokens,optimizer_step,state"


def made(**fields: Any) -> ScalingConfig:
    return configs.parse(ScalingConfig, {"steps": STEPS, **fields})  # type: ignore[return-value]


def add_scaling(engine: Engine, every: dict[str, ScalingConfig] | list[ScalingConfig], name: str = "s") -> None:
    """Pending runs of the family, by label."""
    named = list(every.items()) if isinstance(every, dict) else [(config.label(), config) for config in every]
    rows = [
        queue.NewRun(label, configs.to_json(c), configs.fingerprint("scaling", c), configs.group_key("scaling", c),
                     c.seed, None, c.steps)
        for label, c in named
    ]  # fmt: skip
    queue.init(engine, [new_stage(name=name, family="scaling", runs=rows, fields=configs.field_types(ScalingConfig),
                                  metrics=configs.metric_rows(ScalingConfig))])  # fmt: skip


def finish_scaling(engine: Engine, loss: float = 5.0) -> None:
    """The training loss is logged every 3 steps, the validation loss measured every 4 and at the end."""
    points = [("loss", step, 10.0 - step / 10) for step in (3, 6, 9, 10)]
    points += [("val_loss", step, loss + (10 - step)) for step in (4, 8, 10)]
    queue.finish(engine, claim_one(engine), STEPS, {"val_loss": loss, "loss": 9.0}, "val_loss", points)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_has_the_columns_of_the_study_and_a_row_for_each_evaluation(engine: Engine, tmp_path: Path) -> None:
    config = made(hidden_size=16)
    add_scaling(engine, {"lstm_16d": config})
    finish_scaling(engine)

    written = sheets.write(engine, None, None, tmp_path / "out")

    assert written is not None and (written.runs, written.partial) == (1, 0)
    path = tmp_path / "out" / "s" / "lstm_16d.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == HEADER
    tokens = 4 * config.tokens_per_step()  # 16 micro-batches of 32 streams of 128 tokens: 65,536 a step
    assert tokens == 262_144
    profiler, every = 6 * 16 * 50257 * tokens, 6 * counts.parameters(config) * tokens
    assert lines[1] == f"64,9.7000,11.0000,{profiler:.2e},{every:.2e},262144,4,done"
    rows = read(path)
    assert [row["step"] for row in rows] == ["64", "128", "160"]
    assert [row["training_loss"] for row in rows] == ["9.7000", "9.4000", "9.0000"]  # the last that was logged
    assert [row["validation_loss"] for row in rows] == ["11.0000", "7.0000", "5.0000"]
    # 1.976e10 FLOPs for the 4096 tokens of a micro-batch, as the study's profiler counted
    assert float(rows[-1]["total_flops_profiler"]) == pytest.approx(160 * 1.976e10, rel=5e-3)

    about = json.loads(path.with_suffix(".json").read_text())
    assert configs.parse(ScalingConfig, about["config"]) == config
    assert (about["state"], about["complete"], about["steps_done"]) == ("done", True, 10)
    assert list(about["columns"]) == HEADER.split(",")


def test_partial_runs_say_so_and_have_a_last_row_where_they_ended(engine: Engine, tmp_path: Path) -> None:
    add_scaling(engine, [made(hidden_size=h) for h in (16, 32, 48)])
    claim = claim_one(engine)
    queue.record(engine, claim, 7, [("val_loss", 4, 9.0), ("loss", 3, 9.5), ("loss", 6, 9.2)])
    queue.fail(engine, claim, "diverged", "the loss is nan")
    claim = claim_one(engine)
    queue.record(engine, claim, 5, [("val_loss", 4, 8.0), ("val_loss", 5, float("nan"))])

    written = sheets.write(engine, "s", None, tmp_path)

    assert written is not None and (written.runs, written.partial) == (2, 2)
    assert written.remarks == ["1 of 3 runs have no numbers yet: no file"]
    failed = read(tmp_path / "s" / "16d_L2_adamw_lr_0002.csv")
    assert [(row["optimizer_step"], row["training_loss"], row["validation_loss"], row["state"]) for row in failed] == [
        ("4", "9.5000", "9.0000", "failed"),
        ("7", "9.2000", "", "failed"),
    ]
    assert json.loads((tmp_path / "s" / "16d_L2_adamw_lr_0002.json").read_text())["complete"] is False
    running = read(tmp_path / "s" / "32d_L2_adamw_lr_0002.csv")
    assert [(row["optimizer_step"], row["validation_loss"]) for row in running] == [("4", "8.0000"), ("5", "")]
    assert running[0]["state"] == "running"


def test_seeds_of_a_group_have_files_of_their_own_whichever_are_written(engine: Engine, tmp_path: Path) -> None:
    add_scaling(engine, [made(hidden_size=h, seed=seed) for h in (16, 32) for seed in (1, 2)] + [made(hidden_size=64)])
    for _ in range(5):
        finish_scaling(engine)

    written = sheets.write(engine, None, "seed = 2 or hidden_size = 64", tmp_path)

    assert written is not None
    assert sorted(path.name for path in (tmp_path / "s").glob("*.csv")) == [
        "16d_L2_adamw_lr_0002_2.csv",
        "32d_L2_adamw_lr_0002_2.csv",
        "64d_L2_adamw_lr_0002.csv",
    ]


def test_seeds_that_have_labels_of_their_own_keep_them(engine: Engine, tmp_path: Path) -> None:
    add_scaling(engine, {"16d_0": made(seed=0), "16d_1": made(seed=1)})  # as create_multi_seed_experiments calls them
    for _ in range(2):
        finish_scaling(engine)

    sheets.write(engine, None, None, tmp_path)

    assert sorted(path.name for path in (tmp_path / "s").glob("*.csv")) == ["16d_0.csv", "16d_1.csv"]


def test_runs_that_would_share_a_file_are_all_listed_and_nothing_is_written(engine: Engine, tmp_path: Path) -> None:
    same = {
        "lr_1.5": made(),
        "lr_15": made(hidden_size=32),
        "LR_15": made(hidden_size=48),
        "fine": made(hidden_size=64),
    }
    add_scaling(engine, same, "a")
    add_scaling(engine, {"--": made()}, "b")
    for _ in range(5):
        finish_scaling(engine)

    with pytest.raises(InputError) as caught:
        sheets.write(engine, None, None, tmp_path / "out")

    assert caught.value.problems == [
        "stage a: run 1 (lr_1.5, seed 0), run 2 (lr_15, seed 0), run 3 (LR_15, seed 0) would share lr_15.csv",
        "stage b: nothing is left of the label '--' of run 5",
    ]
    assert not (tmp_path / "out").exists()
    written = sheets.write(engine, "a", "hidden_size >= 48", tmp_path / "out")
    assert written is not None and written.runs == 2


def test_files_that_exist_are_replaced_only_when_asked_and_others_stay(engine: Engine, tmp_path: Path) -> None:
    add_scaling(engine, {"one": made(), "two": made(hidden_size=32)})
    finish_scaling(engine, 5.0)
    sheets.write(engine, None, None, tmp_path)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    finish_scaling(engine, 6.0)

    with pytest.raises(InputError, match=r"has s/one.csv already"):
        sheets.write(engine, None, None, tmp_path)
    sheets.write(engine, None, None, tmp_path, force=True)

    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "notes.txt", "one.csv", "one.json", "two.csv", "two.json"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_left_of_an_export_that_fails_half_way(engine: Engine, tmp_path: Path) -> None:
    add_scaling(engine, {"one": made(), "two": made(hidden_size=32)})
    finish_scaling(engine)
    finish_scaling(engine)

    def full(what: str, done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RnnqError, match="No space left on device"):
        sheets.write(engine, None, None, tmp_path / "out", progress=full)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        sheets.write(engine, None, None, tmp_path / "file")


def test_other_families_have_the_columns_that_they_can_fill(engine: Engine, tmp_path: Path) -> None:
    add(engine, [new_run(0), new_run(1)])
    finish(engine, 2.0)
    finish(engine, 3.0, curve=False)  # as of an import: known by its summary alone

    sheets.write(engine, None, None, tmp_path)

    rows = read(tmp_path / "s" / "label0.csv")
    assert list(rows[0]) == ["step", "training_loss", "validation_loss", "optimizer_step", "state"]
    assert len(rows) == 10 and rows[-1] == {
        "step": "10", "training_loss": "2.1000", "validation_loss": "", "optimizer_step": "10", "state": "done"
    }  # fmt: skip
    assert read(tmp_path / "s" / "label1.csv") == [
        {"step": "10", "training_loss": "3.0000", "validation_loss": "", "optimizer_step": "10", "state": "done"}
    ]
    other = [{"name": "score", "unit": "", "better": "max", "primary": True}]
    queue.init(engine, [new_stage(name="other", metrics=other)])
    queue.finish(engine, claim_one(engine), 10, {"score": 1.0}, "score", [])
    with pytest.raises(InputError, match="stage other: its family measures neither loss nor val_loss"):
        sheets.write(engine, "other", None, tmp_path)


def test_the_command_writes_below_the_folder_and_refuses_what_does_not_go_together(
    engine: Engine, tmp_path: Path, cli: Cli
) -> None:
    add_scaling(engine, {"one": made(), "two": made(hidden_size=32)})
    finish_scaling(engine)
    done = cli("export", "--layout", "csv", "csvs")
    assert done.stdout == "csvs/s\n"
    assert done.stderr == "1 of 2 runs have no numbers yet: no file\n1 run\n"
    assert (tmp_path / "csvs" / "s" / "one.csv").read_text().startswith(HEADER)
    refused = cli("export", "--layout", "csv", "--weights", "--out", "x.csv", code=2).stderr
    for part in ("--weights does not go with --layout csv", "--out does not", "--layout csv needs the folder"):
        assert part in refused
    assert "no run fulfils" in cli("export", "--layout", "csv", "csvs", "--filter", "loss < 0").stderr
