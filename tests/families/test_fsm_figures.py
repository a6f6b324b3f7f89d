"""The figures of fsm and of its probes: every accuracy stands between the solver and the shortcuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from pandas import DataFrame
from sqlalchemy import Engine, text

from rnnq import db, examine, runs
from rnnq.families.fsm import baselines, data, evaluation, figures, probe_figures
from rnnq.families.fsm.config import Config
from rnnq.families.fsm.probe_config import ProbeConfig
from tests.studies import ACCURACY, LOSS, add, finish, new_run

SHOWN: dict[str, tuple[Figure, DataFrame]] = {}


@pytest.fixture(autouse=True)
def _nothing_shown() -> None:
    SHOWN.clear()


def save(figure: Figure, name: str, numbers: DataFrame) -> list[Path]:
    """In place of files."""
    figure.draw_without_rendering()
    SHOWN[name] = figure, numbers
    return [Path(f"{name}.png"), Path(f"{name}.csv")]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def frame_of(config: Config | ProbeConfig, rows: list[dict[str, Any]]) -> DataFrame:
    """Runs as frame.of_rows has them."""
    made = []
    for i, row in enumerate(rows, start=1):
        fields = config.model_dump(mode="json") | row.pop("config", {})
        made.append(
            {"id": i, "stage": "s", "state": "done", "seed": i} | row | {f"config.{n}": v for n, v in fields.items()}
        )
    return DataFrame(made)


def learner(group: str, acc: float, parameters: int = 1000, state: str = "done", **config: Any) -> dict[str, Any]:
    positions = {name: acc - 0.01 * (7 - i) for i, name in enumerate(figures.POSITIONS)}
    limits = {"test_ceiling": 0.99, "test_shortcut": 0.6}
    numbers = {"test_acc": acc, "parameters": parameters, **limits, **positions} if state == "done" else {}
    return {"group_key": group, "state": state, "config": config, **numbers}


def baseline(model: str, acc: float) -> dict[str, Any]:
    return learner(model, acc, 0, model=model)


NET = Config(steps=1, d_model=64)


def test_each_size_has_its_mean_and_error_bar_between_the_solver_and_the_shortcuts() -> None:
    large = [learner("b", 0.7, 9000, d_model=256), learner("b", 0, state="failed")]
    rows = [learner("a", 0.9), learner("a", 0.94), *large, learner("c", 0.65, 500, model="rnn")]
    rows.append(baseline("shortcut_a", 0.59))

    written = figures.draw(frame_of(NET, rows), DataFrame(), save)
    figure, numbers = SHOWN["architectures"]
    [axes] = figure.axes

    assert [path.name for path in written] == [
        "architectures.png",
        "architectures.csv",
        "positions.png",
        "positions.csv",
    ]
    assert axes.get_title() == "5s5a 80/80"
    assert [text.get_text() for text in axes.texts] == ["d64 L2 (2)", "d256 L2 (1 of 2)", "d64 L2 (1)"]
    assert legend(figure) == [
        "lstm: mean ± std over seeds (n)", "rnn: mean ± std over seeds (n)", "perfect solver: 0.9900",
        "best shortcut: 0.6000", "shortcut A (given the action): 0.5900",
    ]  # fmt: skip
    first = numbers.iloc[0]
    assert (first["name"], first["n"], first["of"], first["test_acc"]) == ("lstm d64 L2", 2, 2, pytest.approx(0.92))
    assert first["test_acc_std"] == pytest.approx(0.04 / np.sqrt(2))  # sample standard deviation
    assert "3 groups, 4 of 5 runs" in figure.get_suptitle()


def test_groups_of_one_name_are_told_apart_and_data_have_a_panel_each() -> None:
    rows = [learner("a", 0.9), learner("b", 0.8, lr=0.1), learner("c", 0.7, states=3, actions=3)]

    figures.draw(frame_of(NET, rows), DataFrame(), save)
    figure, numbers = SHOWN["positions"]

    assert [axes.get_title() for axes in figure.axes] == ["5s5a 80/80", "3s3a 19/19"]
    assert numbers["name"].unique().tolist() == ["lstm d64 L2 (run 1)", "lstm d64 L2 (run 2)", "lstm d64 L2 (run 3)"]


def test_the_curve_by_position_is_what_was_stored_with_baselines_as_lines_of_their_own() -> None:
    rows = [learner("a", 0.9), learner("a", 0.94), baseline("solver", 0.98)]

    figures.draw(frame_of(NET, rows), DataFrame(), save)
    figure, numbers = SHOWN["positions"]
    own = numbers[numbers["name"] == "lstm d64 L2"]

    assert own["mean"].tolist() == pytest.approx([0.92 - 0.01 * (7 - i) for i in range(8)])
    assert own[["from", "to"]].to_numpy().tolist()[-1] == [87.5, 100.0]
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "lstm d64 L2: 0.920 ± 0.028 (2)"  # type: ignore[union-attr]
    assert legend(figure) == ["perfect solver", "best shortcut"]
    assert len(figure.axes[0].lines) > 2 and len(numbers) == 16


def test_a_stage_without_finished_learners_has_no_such_figures() -> None:
    assert (
        figures.draw(frame_of(NET, [learner("a", 0, state="failed")]).assign(test_acc=np.nan), DataFrame(), save) == []
    )
    assert figures.draw(DataFrame({"id": [1]}), DataFrame(), save) == []
    assert figures.draw(frame_of(NET, [baseline("solver", 0.98)]), DataFrame(), save) == []


def test_the_accuracy_of_an_eighth_is_that_of_its_share_of_each_query() -> None:
    config = Config(
        states=2, actions=3, demos=2, demo_length=4, query_length=12, n_train=9, n_val=9, n_test=40, model="solver"
    )
    dataset = data.load(config)
    part, rows = dataset.test, np.arange(40)
    said = baselines.solver_predictions(part, rows, part.picks(rows))
    query = part.query(rows)
    hits: list[list[bool]] = [[] for _ in range(8)]
    for i, length in enumerate(query.lengths.tolist()):
        for k in range(length):
            hits[8 * k // length].append(bool(said[i, k] == query.next_states[i, k]))

    found = evaluation.measure_baseline(config, dataset, "test")

    assert [found[f"acc_pos{number}"] for number in range(8)] == pytest.approx([np.mean(own) for own in hits])
    assert not any(name.startswith("acc_pos") for name in evaluation.measure_baseline(config, dataset, "val"))


# --------------------------------------------------------------------------------------------------------- curriculum


def line(stages: dict[str, list[int]]) -> DataFrame:
    return DataFrame([
        {"id": run, "stage": stage, "seed": i, "state": "done", "val_ceiling": 0.99, "val_shortcut": 0.5,
         **{f"config.{name}": value for name, value in NET.model_dump().items()}}
        for stage, ids in stages.items() for i, run in enumerate(ids)
    ])  # fmt: skip


def test_a_curriculum_has_a_panel_for_each_stage_in_the_order_of_the_weights() -> None:
    links = DataFrame({"child": [5, 6, 3, 4], "parent": [3, 4, 1, 2], "step": [20, 30, 10, 20]})
    stages = {"last": [5, 6], "middle": [3, 4], "first": [1, 2]}
    ends = {1: 20, 2: 30, 3: 30, 4: 30, 5: 30, 6: 30}  # run 1 stopped early
    points = [(run, "val_acc", step, run / 10) for run, end in ends.items() for step in range(10, end + 1, 10)]
    curves = DataFrame(points, columns=["run", "name", "step", "value"])

    figures.draw_lineage(links, line(stages), curves, save)
    figure, numbers = SHOWN["curriculum"]

    assert [axes.get_title().split(":")[0] for axes in figure.axes] == ["first", "middle", "last"]
    assert "first → middle → last" in figure.get_suptitle()
    assert [text.get_text() for text in figure.axes[0].texts] == ["n=2", "n=1"]
    first = numbers[(numbers["stage"] == "first") & numbers["mean"].notna()]
    assert first[["step", "n", "mean"]].to_numpy().tolist() == pytest.approx(
        np.array([[10, 2, 0.15], [20, 2, 0.15], [30, 1, 0.2]])
    )
    handed = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_data()[0][0] for dot in handed] == [10, 20]
    assert legend(figure)[-2:] == ["perfect solver", "best shortcut"]


def test_one_stage_alone_is_no_curriculum() -> None:
    curves = DataFrame([(1, "val_acc", 10, 0.5)], columns=["run", "name", "step", "value"])
    links = DataFrame({"child": [2], "parent": [1], "step": [10]})

    assert figures.draw_lineage(links, line({"s": [1, 2]}), curves, save) == []


@pytest.mark.both
def test_the_ancestry_of_a_stage_goes_back_to_the_first_run(engine: Engine) -> None:
    for name in ("one", "two", "three"):
        add(engine, [new_run(0)], name)
        finish(engine, 1.0)
    with db.transaction(engine) as connection:
        for child, parent, kind in ((2, 1, "continue"), (3, 2, "continue"), (3, 1, "probe")):
            sql = "INSERT INTO lineage (child, parent, kind, detail) VALUES (:child, :parent, :kind, :detail)"
            detail = f'{{"step": {10 * child}}}'
            connection.execute(text(sql), {"child": child, "parent": parent, "kind": kind, "detail": detail})

    assert [(link["child"], link["parent"], link["step"]) for link in runs.ancestry(engine, "three")] == [
        (3, 2, 30), (2, 1, 20),
    ]  # fmt: skip
    assert runs.ancestry(engine, "one") == []
    assert [link["stage"] for link in runs.ancestry(engine, "two")] == ["two"]


def test_examine_draws_what_the_family_draws_along_the_lineage(engine: Engine, tmp_path: Path) -> None:
    metrics = [LOSS, ACCURACY, {"name": "val_acc", "unit": "", "better": "max", "primary": False}]
    for name in ("one", "two"):
        add(engine, [new_run(i, seed=i) for i in range(2)], name, family="fsm", metrics=metrics)
        for i in range(2):
            finish(engine, 1.0, accuracy=0.5 + i / 10)
    with db.transaction(engine) as connection:
        rows = [{"run": run, "step": step, "value": 0.5 + step / 100} for run in (1, 2, 3, 4) for step in (10, 20)]
        connection.execute(text("INSERT INTO metrics (name) VALUES ('val_acc')"))
        sql = "INSERT INTO point SELECT :run, id, :step, :value FROM metrics WHERE name = 'val_acc'"
        connection.execute(text(sql), rows)
        known = (
            "INSERT INTO lineage (child, parent, kind, detail) VALUES (:child, :parent, 'continue', '{\"step\": 20}')"
        )
        connection.execute(text(known), [{"child": 3, "parent": 1}, {"child": 4, "parent": 2}])

    written = examine.draw(engine, examine.examine(engine, "two"), tmp_path)

    assert {"curriculum.png", "curriculum.csv"} <= {path.name for path in written}
    assert set(pd.read_csv(tmp_path / "curriculum.csv")["stage"]) == {"one", "two"}


# -------------------------------------------------------------------------------------------------------------- probes


def probed(group: str, accs: dict[str, float], **config: Any) -> dict[str, Any]:
    numbers = {f"test_acc_{place}": acc for place, acc in accs.items()}
    controls = {f"test_control_acc_{place}": 0.5 for place in accs}
    top = max(accs.values())
    return {"group_key": group, "config": config, "test_acc": top, "test_control_acc": 0.5, "test_ceiling": 0.99,
            "test_selectivity": top - 0.5, "test_floor": 0.55, **numbers, **controls}  # fmt: skip


PROBE = ProbeConfig(d_model=64)


def test_probes_have_a_point_for_each_layer_and_their_control_beside() -> None:
    rows = [probed("a", {"embed": 0.5, "h1": 0.7, "h2": acc, "c1": 0.6, "c2": 0.8}) for acc in (0.9, 0.94)]
    rows.append(probed("t", {"embed": 0.5, "h1": 0.6, "h2": 0.8}, target="table"))

    written = probe_figures.draw(frame_of(PROBE, rows), DataFrame(), save)
    figure, numbers = SHOWN["layers"]
    first, table = figure.axes

    assert [path.name for path in written] == ["layers.png", "layers.csv"]
    assert first.get_title() == "the next state, 5s5a 80/80"
    assert table.get_title() == "the whole transition table, 5s5a 80/80"
    assert [tick.get_text() for tick in first.get_xticklabels()] == [
        "embedding",
        "layer 1",
        "layer 2",
        "cell 1",
        "cell 2",
    ]
    assert first.get_legend().get_texts()[0].get_text() == (  # type: ignore[union-attr]
        "lstm d64 L2, against random weights: +0.420 ± 0.028 (2)"
    )
    own = numbers[(numbers["target"] == "next_state") & (numbers["place"] == "h2")].iloc[0]
    assert (own["acc"], own["control_acc"], own["n"]) == (pytest.approx(0.92), 0.5, 2)
    assert own["acc_std"] == pytest.approx(0.04 / np.sqrt(2))


def test_a_probe_of_the_top_layer_alone_stands_at_its_layer() -> None:
    row = probed("a", {"h2": 0.9}, layers="top") | {"test_acc": 0.88}
    rows = frame_of(PROBE, [row]).drop(columns=["test_acc_h2", "test_control_acc_h2"])

    probe_figures.draw(rows, DataFrame(), save)

    assert SHOWN["layers"][1][["place", "acc"]].to_numpy().tolist() == [["h2", 0.88]]


def test_probes_that_have_not_finished_have_no_figure() -> None:
    assert probe_figures.draw(DataFrame({"id": [1]}), DataFrame(), save) == []
