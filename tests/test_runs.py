"""Runs as plain rows: found, shown, grouped; only those whose init is complete."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from rnnq import db, queue, runs
from rnnq.errors import InputError
from tests.conftest import PROVENANCE, claim_one, new_runs, new_stage

METRICS = [
    {"name": "val_loss", "unit": "nats", "better": "min", "primary": True},
    {"name": "acc", "unit": "", "better": "max", "primary": False},
]


def change(engine: Engine, sql: str, **values: object) -> None:
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


def finish(engine: Engine, summary: dict[str, Any], points: list[queue.Point] | None = None) -> int:
    claim = claim_one(engine)
    queue.finish(engine, claim, 10, summary, "val_loss", points or [])
    return claim.run


@pytest.fixture
def study(engine: Engine) -> Engine:
    """Four runs of a stage with a metric that shall be low and one that shall be high."""
    queue.init(engine, [new_stage(4, metrics=METRICS)])
    return engine


def hide(engine: Engine) -> None:
    """Everything is of an init that has not ended."""
    change(engine, "UPDATE intakes SET complete = false")


# ------------------------------------------------------------------------------------------------------ stages


def test_a_stage_says_what_its_definition_said(engine: Engine) -> None:
    stage = new_stage(1, metrics=METRICS, source="defs/x.py", source_sha256="abc", has_rule=True, family="parity")
    queue.init(engine, [stage])

    info = runs.stage_info(engine, "s")

    assert (info.name, info.family, info.family_in_source, info.has_rule) == ("s", "parity", False, True)
    assert (info.source, info.source_sha256) == ("defs/x.py", "abc")
    assert (info.fields, info.metrics, info.seed_fields) == ({"seed": "int"}, METRICS, ["seed"])
    assert info.primary == "val_loss"


def test_a_changed_definition_speaks_from_its_next_init_on(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, source="a.py", source_sha256="1")])
    queue.init(engine, [new_stage(2, source="b.py", source_sha256="2", metrics=METRICS)])

    info = runs.stage_info(engine, "s")
    assert (info.source, info.source_sha256, info.primary) == ("b.py", "2", "val_loss")


def test_stages_come_in_the_order_in_which_they_were_made(engine: Engine) -> None:
    for name in ("z", "a", "m"):
        queue.init(engine, [new_stage(1, name)])

    assert list(runs.stage_infos(engine)) == ["z", "a", "m"]


def test_a_stage_that_is_not_there_gets_the_nearest_name_as_a_hint(engine: Engine) -> None:
    with pytest.raises(InputError, match="there is no stage 'stage1'") as refused:
        runs.stage_info(engine, "stage1")
    assert refused.value.hint == "`rnnq init` adds one"

    queue.init(engine, [new_stage(1, "stage1")])
    with pytest.raises(InputError) as refused:
        runs.stage_info(engine, "stagel")
    assert refused.value.hint == "did you mean stage1?"


def test_the_newest_stage_with_finished_runs_is_the_one_that_was_made_last(engine: Engine) -> None:
    with pytest.raises(InputError, match="no stage has finished runs yet"):
        runs.newest_finished_stage(engine)
    for name in ("b", "a", "c"):
        queue.init(engine, [new_stage(1, name)])
    for _ in range(2):
        finish(engine, {})
    queue.fail(engine, claim_one(engine), "bug", "x")

    assert runs.newest_finished_stage(engine) == "a"


# ----------------------------------------------------------------------------------------------------- metrics


def test_a_metric_is_found_by_its_name_and_loss_means_the_primary_one(study: Engine) -> None:
    info = runs.stage_info(study, "s")

    assert info.metric("acc")["better"] == "max"
    assert info.metric("loss") == info.metric("val_loss") == METRICS[0]
    with pytest.raises(InputError, match="stage s has no metric 'ac'") as refused:
        info.metric("ac")
    assert refused.value.hint == "did you mean acc?"


def test_a_family_may_have_a_metric_called_loss_that_is_not_its_primary_one(engine: Engine) -> None:
    """`loss` is the column of the primary metric in filters; ranked by another one it would be ranked wrongly."""
    metrics = [{"name": "loss", "unit": "", "better": "max", "primary": False}, METRICS[0]]
    queue.init(engine, [new_stage(1, metrics=metrics)])
    finish(engine, {"loss": 7.0, "val_loss": 2.0})
    info = runs.stage_info(engine, "s")

    [row] = runs.find(engine, filter="loss < 3")

    metric = info.metric("loss")
    assert (metric["name"], metric["better"]) == ("val_loss", "min")
    assert runs.value_of(row, metric["name"], info.primary) == row["loss"] == 2.0


def test_the_value_of_a_run_is_a_number_or_nothing(study: Engine) -> None:
    finish(study, {"val_loss": 2.0, "acc": 0.5})
    finish(study, {"val_loss": math.nan, "acc": math.inf})
    rows = runs.find(study)

    assert [runs.value_of(row, "val_loss", "val_loss") for row in rows] == [2.0, None, None, None]
    assert runs.value_of(rows[0], "loss", "val_loss") is None  # a metric of that name, which nobody measured
    assert [runs.value_of(row, "acc", "val_loss") for row in rows] == [0.5, None, None, None]
    assert runs.value_of(rows[0], "unknown", "val_loss") is None


# -------------------------------------------------------------------------------------------------------- find


def test_runs_are_found_by_stage_state_and_filter_in_the_order_of_their_ids(engine: Engine) -> None:
    queue.init(engine, [new_stage(3, "a", metrics=METRICS), new_stage(2, "b", metrics=METRICS)])
    for acc in (0.1, 0.9):
        finish(engine, {"val_loss": 1.0, "acc": acc})

    def ids(**chosen: Any) -> list[int]:
        return [row["id"] for row in runs.find(engine, **chosen)]

    assert ids() == [1, 2, 3, 4, 5]
    assert ids(stage="b") == [4, 5]
    assert ids(state="done") == [1, 2]
    assert ids(state="pending", stage="a") == [3]
    assert ids(filter="acc > 0.5") == [2]
    assert ids(filter="seed = 0 or acc > 0.5", stage="a") == [1, 2]
    assert ids(filter="acc > 0.5", state="pending") == []


def test_what_a_row_holds_as_json_comes_as_values(study: Engine) -> None:
    claim = claim_one(study)
    file = {"path": "x.pt", "step": 4, "sha256": "y", "bytes": 9}
    queue.record(study, claim, 4, checkpoint=file)
    queue.finish(study, claim, 10, {"val_loss": 2.0}, "val_loss", best=file)

    row = runs.find(study)[0]

    assert (row["config"], row["summary"]) == ({"seed": 0}, {"val_loss": 2.0})
    assert (row["checkpoint"], row["checkpoint_prev"], row["checkpoint_best"]) == (file, None, file)
    json.dumps(row)


def test_a_label_that_looks_like_json_stays_text(engine: Engine) -> None:
    queue.init(engine, [new_stage(runs=[replace(new_runs(1)[0], label="[1]")])])

    assert runs.find(engine)[0]["label"] == "[1]"


def test_a_wrong_stage_or_filter_is_the_users_error(study: Engine) -> None:
    with pytest.raises(InputError, match="there is no stage 'x'"):
        runs.find(study, stage="x")
    with pytest.raises(InputError, match="nonsense"):
        runs.find(study, filter="nonsense < 3")


def test_a_filter_over_one_stage_knows_only_its_names(engine: Engine) -> None:
    queue.init(engine, [new_stage(1, "a", fields={"seed": "int"}), new_stage(1, "b", fields={"width": "int"})])

    assert runs.find(engine, filter="width > 3") == []  # a field is valid if any stage in scope has it
    with pytest.raises(InputError, match="width"):
        runs.find(engine, stage="a", filter="width > 3")


# -------------------------------------------------------------------------------------------------------- show


@pytest.mark.both
def test_a_run_is_shown_whole(study: Engine) -> None:
    child = replace(new_runs(1)[0], parents=((1, "promote", '{"rank":1}'), (2, "promote", '{"rank":2}')))
    queue.release(study, claim_one(study), "asked to stop")
    file = {"path": "x.pt", "step": 10, "sha256": "y", "bytes": 9}
    claim = claim_one(study)
    queue.restore(study, claim, queue.Start(0, [], {"threads": 1}, exact=True))
    curve = [("val_loss", 5, 2.5), ("val_loss", 10, math.inf), ("acc", 10, 0.5)]
    queue.finish(study, claim, 10, {"val_loss": 2.0}, "val_loss", curve, file)
    queue.init(study, [new_stage(name="next", runs=[child])])

    shown = runs.show(study, 1)

    assert (shown["id"], shown["state"], shown["summary"]) == (1, "done", {"val_loss": 2.0})
    assert [(a["attempt"], a["ended"]) for a in shown["attempts"]] == [(1, "released"), (2, "done")]
    assert (shown["attempts"][1]["numerics"], shown["attempts"][1]["versions"]) == ({"threads": 1}, {})
    assert shown["curves"] == {"acc": [(10, 0.5)], "val_loss": [(5, 2.5), (10, None)]}
    assert [(a["kind"], a["path"]) for a in shown["artifacts"]] == [("checkpoint", "x.pt")]
    assert shown["parents"] == []
    assert [(c["run"], c["kind"], c["stage"], c["label"]) for c in shown["children"]] == [
        (5, "promote", "next", "run0")
    ]
    assert [(p["run"], p["detail"]) for p in runs.show(study, 5)["parents"]] == [(1, {"rank": 1}), (2, {"rank": 2})]
    json.dumps(shown)


@pytest.mark.parametrize("run", [0, -1, 5, 2**40])
def test_a_run_that_is_not_there_is_the_users_error(study: Engine, run: int) -> None:
    with pytest.raises(InputError, match=f"there is no run {run}"):
        runs.show(study, run)


# ------------------------------------------------------------------------------------------- an init on its way


def test_rows_of_an_init_that_has_not_ended_are_not_there(study: Engine) -> None:
    finish(study, {"val_loss": 1.0}, [("val_loss", 1, 1.0)])
    hide(study)

    assert runs.stage_infos(study) == {}
    assert runs.find(study) == []
    with pytest.raises(InputError):
        runs.find(study, stage="s")
    with pytest.raises(InputError):
        runs.stage_info(study, "s")
    with pytest.raises(InputError):
        runs.show(study, 1)
    with pytest.raises(InputError):
        runs.newest_finished_stage(study)
    assert runs.points(study, "s", ["val_loss"]) == []


# ------------------------------------------------------------------------------------------------ curves, groups


@pytest.mark.both
def test_curves_come_ordered_by_metric_run_and_step(study: Engine) -> None:
    for run in (1, 2):
        finish(study, {}, [("val_loss", 20, 1.0), ("acc", 10, 0.5), ("val_loss", 10, float(run)), ("other", 1, 0.0)])
    queue.init(study, [new_stage(1, "elsewhere")])

    assert runs.points(study, "s", ["val_loss", "acc", "unknown"]) == [
        (1, "val_loss", 10, 1.0),
        (1, "val_loss", 20, 1.0),
        (2, "val_loss", 10, 2.0),
        (2, "val_loss", 20, 1.0),
        (1, "acc", 10, 0.5),
        (2, "acc", 10, 0.5),
    ]
    assert runs.points(study, "elsewhere", ["val_loss"]) == []


def test_groups_are_runs_that_differ_in_their_seeds_alone_in_the_order_of_their_first(engine: Engine) -> None:
    keys = ["y", "x", "y", "x", "z"]
    made = [replace(run, group_key=key) for run, key in zip(new_runs(5), keys, strict=True)]
    queue.init(engine, [new_stage(runs=made)])

    found = runs.groups(runs.find(engine))

    assert {key: [row["id"] for row in rows] for key, rows in found.items()} == {"y": [1, 3], "x": [2, 4], "z": [5]}
    assert list(found) == ["y", "x", "z"]


def test_a_filter_asks_about_the_group_of_a_run(engine: Engine) -> None:
    made = [replace(run, group_key=f"g{i % 2}") for i, run in enumerate(new_runs(4))]
    queue.init(engine, [new_stage(runs=made, metrics=METRICS)])
    queue.register(engine, "w", "cpu", {})
    for claim, loss in zip(queue.claim(engine, "w", PROVENANCE, limit=4), (1.0, 5.0, 2.0, 6.0), strict=True):
        queue.finish(engine, claim, 10, {"val_loss": loss}, "val_loss")

    assert [row["id"] for row in runs.find(engine, filter="mean(loss) < 2")] == [1, 3]
