"""Runs, groups and curves as data frames."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine

from rnnq import frame, queue, runs
from rnnq.errors import InputError
from tests.conftest import claim_one, new_stage

FIELDS = {"width": "int", "gate": "bool", "optimizer.name": "str", "seed": "int"}
METRICS = [
    {"name": "accuracy", "unit": "", "better": "max", "primary": True},
    {"name": "loss", "unit": "nats", "better": "min", "primary": False},
    {"name": "attempt", "unit": "", "better": "min", "primary": False},
    {"name": "test_loss", "unit": "nats", "better": "min", "primary": False},
]


def new_run(number: int, group: str = "g", **config: Any) -> queue.NewRun:
    """A run of a config; its seed is its number."""
    content = {"width": 16, "gate": True, "optimizer": {"name": "adam"}, "seed": number} | config
    return queue.NewRun(f"run{number}", json.dumps(content), f"f{number}", group, number, None, 10)


def add(engine: Engine, *made: queue.NewRun) -> None:
    """Add a stage `s` of such runs."""
    queue.init(engine, [new_stage(fields=FIELDS, metrics=METRICS, runs=list(made))])


def finish(engine: Engine, summary: dict[str, Any], points: list[queue.Point] | None = None) -> None:
    """Claim and finish the next run."""
    queue.finish(engine, claim_one(engine), 10, summary, "accuracy", points or [])


def test_a_run_becomes_a_row_of_columns(engine: Engine) -> None:
    add(engine, new_run(1), new_run(2, width=32))
    saved = {"path": "checkpoints/x.pt", "step": 10, "sha256": "00", "bytes": 1}
    queue.finish(engine, claim_one(engine), 10, {"accuracy": 0.5, "test_loss": 2.0}, "accuracy", checkpoint=saved)

    found = frame.runs_frame(engine, "s")

    assert found["id"].tolist() == [1, 2]
    assert found["state"].tolist() == ["done", "pending"]
    assert found["config.width"].tolist() == [16, 32]
    assert found["config.gate"].dtype == bool
    assert found["config.optimizer.name"].tolist() == ["adam", "adam"]
    assert found["loss"][0] == 0.5 and math.isnan(found["loss"][1])
    assert found["test_loss"][0] == 2.0 and math.isnan(found["test_loss"][1])
    assert found["checkpoint"][0] == "checkpoints/x.pt" and pd.isna(found["checkpoint"][1])
    assert not {"config", "summary"} & set(found.columns)


def test_a_metric_that_no_run_has_yet_has_its_column(engine: Engine) -> None:
    add(engine, new_run(1))

    assert frame.runs_frame(engine, "s")["test_loss"].isna().all()


def test_a_metric_whose_name_a_column_has_is_found_under_summary(engine: Engine) -> None:
    add(engine, new_run(1))
    finish(engine, {"accuracy": 0.5, "loss": 2.0, "attempt": 7.0})
    info = runs.stage_info(engine, "s")

    found = frame.runs_frame(engine, "s").iloc[0]

    assert [frame.column(info, name) for name in ("accuracy", "loss", "test_loss")] == [
        "loss",
        "summary.loss",
        "test_loss",
    ]
    assert (found["loss"], found["summary.loss"]) == (0.5, 2.0)
    assert (found["attempt"], found["summary.attempt"]) == (1, 7.0)
    [row] = runs.find(engine, "s")
    assert [frame.value(row, info, name) for name in ("accuracy", "loss", "test_loss")] == [0.5, 2.0, None]


def test_a_field_that_only_newer_runs_have_is_missing_in_the_older(engine: Engine) -> None:
    add(engine, new_run(1), new_run(2, dropout=0.1))

    found = frame.runs_frame(engine, "s")

    assert pd.isna(found["config.dropout"][0]) and found["config.dropout"][1] == 0.1
    assert frame.varying(found, runs.stage_info(engine, "s")) == ["dropout"]


def test_seeds_do_not_vary_and_true_is_not_one(engine: Engine) -> None:
    add(engine, new_run(1, mixed=1, width=16, sizes=[1, 2]), new_run(2, mixed=True, width=16.0, sizes=[1, 2]))

    assert frame.varying(frame.runs_frame(engine, "s"), runs.stage_info(engine, "s")) == ["mixed"]


def test_a_filter_chooses_and_none_found_keeps_the_columns(engine: Engine) -> None:
    add(engine, new_run(1), new_run(2, width=32))

    assert frame.runs_frame(engine, "s", "width > 16")["id"].tolist() == [2]
    empty = frame.runs_frame(engine, "s", "width > 99")
    assert empty.empty and {"id", "config.width", "test_loss"} <= set(empty.columns)
    with pytest.raises(InputError, match="no stage"):
        frame.runs_frame(engine, "t")


def test_groups_have_the_mean_and_spread_of_their_finished_runs(engine: Engine) -> None:
    add(engine, *(new_run(i, "ab"[i // 3], width=[16, 32][i // 3]) for i in range(6)))
    for value in (1.0, 2.0, 6.0, 5.0):
        finish(engine, {"accuracy": value})

    found = frame.groups_frame(frame.runs_frame(engine, "s"), runs.stage_info(engine, "s"), "accuracy")

    assert found["group_key"].tolist() == ["a", "b"]
    assert found["id"].tolist() == [1, 4]
    assert found[["runs", "n"]].to_numpy().tolist() == [[3, 3], [3, 1]]
    assert found["mean"].tolist() == [3.0, 5.0]
    assert found["std"][0] == pytest.approx(math.sqrt(7)) and math.isnan(found["std"][1])
    assert found[["min", "max"]].to_numpy().tolist() == [[1.0, 6.0], [5.0, 5.0]]
    assert found["config.width"].tolist() == [16, 32]
    assert "config.seed" not in found.columns


def test_no_runs_make_no_groups_and_keep_the_columns(engine: Engine) -> None:
    add(engine, new_run(1))

    found = frame.groups_frame(frame.runs_frame(engine, "s", "width > 99"), runs.stage_info(engine, "s"), "accuracy")

    assert found.empty
    assert {"group_key", "label", "config.width", "runs", "n", "mean", "std", "min", "max"} <= set(found.columns)


def test_curves_are_ordered_and_keep_the_place_of_what_was_not_finite(engine: Engine) -> None:
    add(engine, new_run(1), new_run(2))
    finish(engine, {}, [("accuracy", 2, 0.2), ("accuracy", 1, math.nan), ("loss", 1, 3.0)])
    finish(engine, {}, [("accuracy", 1, 0.4)])

    found = frame.curves_frame(engine, "s", ["loss", "accuracy"])

    assert found[["run", "name", "step"]].to_numpy().tolist() == [
        [1, "loss", 1],
        [1, "accuracy", 1],
        [1, "accuracy", 2],
        [2, "accuracy", 1],
    ]
    assert found["value"].isna().tolist() == [False, True, False, False]
    assert frame.curves_frame(engine, "s", ["accuracy"], [2])["value"].tolist() == [0.4]
    assert frame.curves_frame(engine, "s", ["accuracy"], []).empty
    assert frame.curves_frame(engine, "s", ["nothing"]).columns.tolist() == ["run", "name", "step", "value"]
