"""The best runs, the figures, and what leads on to promote."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sqlalchemy import Engine

from rnnq import cli as command_line
from rnnq import examine, families, plan, queue, sweep
from rnnq.errors import InputError
from rnnq.families.dynamics import figures as dynamics
from tests.conftest import Cli, claim_one, new_stage

LOSS = {"name": "loss", "unit": "nats/byte", "better": "min", "primary": True}
ACCURACY = {"name": "accuracy", "unit": "", "better": "max", "primary": False}
FIELDS = {"width": "int", "gate": "bool", "seed": "int"}
VALUES = [2.0, 1.5, 3.0, 1.0, 2.5, 1.5]  # of the runs of `study`, by id


def new_run(number: int, group: str | None = None, seed: int = 0, **config: Any) -> queue.NewRun:
    """A run in a group of its own."""
    content = {"width": 16, "gate": True, "seed": seed} | config
    return queue.NewRun(f"label{number}", json.dumps(content), f"f{number}", group or f"g{number}", seed, None, 10)


def add(engine: Engine, made: list[queue.NewRun], name: str = "s", **changes: Any) -> None:
    """Add a stage of such runs."""
    queue.init(engine, [new_stage(name=name, runs=made, **{"fields": FIELDS, "metrics": [LOSS, ACCURACY]} | changes)])


def finish(engine: Engine, loss: float, curve: bool = True, **summary: float) -> None:
    """Claim and finish the next run; its curve falls to its loss."""
    points = [("loss", step, loss + 1 / step) for step in range(1, 11)] if curve else []
    queue.finish(engine, claim_one(engine), 10, {"loss": loss, **summary}, "loss", points)


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "DPI", 40)  # a third of the time


@pytest.fixture
def study(engine: Engine) -> Engine:
    """Six finished runs of three widths, the gate on and off; accuracy falls from run to run."""
    add(engine, [new_run(i, width=[128, 16, 32][i % 3], gate=i % 2 == 0) for i in range(6)])
    for place, value in enumerate(VALUES):
        finish(engine, value, accuracy=1 - place / 10)
    return engine


def ids(found: examine.Examined) -> list[int]:
    """The best runs, in their order."""
    return [row["id"] for row in found.best]


# ------------------------------------------------------------------------------------------------- the best runs


def test_low_is_good_unless_the_metric_says_otherwise_and_ties_go_to_the_lower_id(study: Engine) -> None:
    assert ids(examine.examine(study, "s")) == [4, 2, 6, 1, 5, 3]
    assert ids(examine.examine(study, "s", by="accuracy")) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_the_metric_is_last_and_one_that_failed_is_not_there(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(4)])
    finish(engine, math.nan)
    finish(engine, 2.0)
    queue.fail(engine, claim_one(engine), "bug", "broken")

    assert ids(examine.examine(engine, "s")) == [2, 1]


def test_a_filter_chooses_among_all_runs(study: Engine) -> None:
    found = examine.examine(study, "s", "loss < 2.5 and gate")

    assert ids(found) == [1]
    assert len(found.rows) == 6


def test_what_the_user_got_wrong_is_named(study: Engine) -> None:
    for words, message in (
        (("t",), "no stage 't'"),
        (("s", "lss < 1"), "no such name: lss"),
        (("s", None, "acuracy"), "no metric 'acuracy'"),
    ):
        with pytest.raises(InputError, match=message):
            examine.examine(study, *words)


def test_the_table_has_the_fields_that_differ_and_the_metrics(study: Engine) -> None:
    rows, columns = examine.table(examine.examine(study, "s", by="accuracy"), 2)

    assert columns == ["id", "label", "width", "gate", "accuracy", "loss"]
    assert rows[0] == {"id": 1, "label": "label0", "width": 128, "gate": True, "accuracy": 1.0, "loss": 2.0}
    assert len(rows) == 2


def test_the_table_tells_seeds_apart_and_a_field_from_a_column(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i, label="ab"[i], loss=i) for i in range(2)])
    finish(engine, 1.0)

    rows, columns = examine.table(examine.examine(engine, "s"), 9)

    assert columns == ["id", "label", "seed", "config.label", "config.loss", "loss"]
    assert rows == [{"id": 1, "label": "label0", "seed": 0, "config.label": "a", "config.loss": 0, "loss": 1.0}]


def test_a_record_is_a_run_whole_with_checkpoints_as_paths(engine: Engine) -> None:
    add(engine, [new_run(0)])
    saved = {"path": "checkpoints/last.pt", "step": 10, "sha256": "00", "bytes": 1}
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0, "accuracy": 0.5}, "loss", checkpoint=saved)

    assert examine.records(examine.examine(engine, "s"), 20) == [
        {
            "id": 1,
            "stage": "s",
            "label": "label0",
            "state": "done",
            "seed": 0,
            "attempt": 1,
            "loss": 1.0,
            "config": {"width": 16, "gate": True, "seed": 0},
            "summary": {"loss": 1.0, "accuracy": 0.5},
            "checkpoint": "checkpoints/last.pt",
            "checkpoint_best": None,
        }
    ]


def test_the_promote_line_names_what_was_asked_and_counts_groups(study: Engine) -> None:
    def line(limit: int = 20, **asked: str) -> str:
        return shlex.join(examine.promote_words(examine.examine(study, "s", **asked), limit) or [])

    assert line() == "rnnq promote --stage s --top 6"
    assert line(2, by="loss") == "rnnq promote --stage s --top 2"
    assert line(filter="loss<2.4", by="accuracy") == "rnnq promote --stage s --by accuracy --filter 'loss<2.4' --top 4"


def test_the_promote_line_of_an_open_stage_is_partial_and_seeds_are_one_group(engine: Engine) -> None:
    add(engine, [new_run(i, "ab"[i // 2], seed=i % 2) for i in range(4)])
    for value in (1.0, 2.0, math.nan):
        finish(engine, value)

    assert examine.promote_words(examine.examine(engine, "s"), 20) == (
        ["rnnq", "promote", "--stage", "s", "--top", "1", "--partial"]
    )
    assert examine.promote_words(examine.examine(engine, "s", "loss > 9"), 20) is None


# ---------------------------------------------------------------------------------------------------- all figures


def test_each_figure_lies_beside_its_numbers(study: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "figures" / "s"

    written = examine.draw(study, examine.examine(study, "s"), folder)

    assert [path.name for path in written] == [
        "curves.png", "curves.csv", "hyperparameters.png", "hyperparameters.csv"
    ]  # fmt: skip
    assert all(path.stat().st_size for path in written)
    assert written[0].read_bytes().startswith(b"\x89PNG")
    curves = pd.read_csv(folder / "curves.csv")
    assert curves.columns.tolist() == ["run", "label", "rank", "step", "loss"]
    assert len(curves) == 60
    assert curves[curves["run"] == 4][["rank", "step", "loss"]].to_numpy().tolist()[-1] == [1, 10, 1.1]
    numbers = pd.read_csv(folder / "hyperparameters.csv")
    assert numbers.columns.tolist() == ["hyperparameter", "value", "run", "loss", "n", "mean"]
    off = numbers[(numbers["hyperparameter"] == "gate") & (numbers["value"] == "False")]
    assert off["run"].tolist() == [2, 4, 6]
    assert off["mean"].tolist() == pytest.approx([4 / 3] * 3) and off["n"].tolist() == [3, 3, 3]


def test_a_filter_has_a_figure_of_its_own_unless_nothing_fulfils_it(study: Engine, tmp_path: Path) -> None:
    def names(filter: str) -> list[str]:
        written = examine.draw(study, examine.examine(study, "s", filter), tmp_path / filter)
        return [path.name for path in written if path.suffix == ".png"]

    assert names("loss<2.2") == ["curves.png", "hyperparameters.png", "hyperparameters_filtered.png"]
    assert len(pd.read_csv(tmp_path / "loss<2.2" / "curves.csv")) == 60
    assert set(pd.read_csv(tmp_path / "loss<2.2" / "hyperparameters_filtered.csv")["run"]) == {1, 2, 4, 6}
    assert names("loss<0") == ["curves.png", "hyperparameters.png"]


def test_a_folder_that_cannot_be_made_is_the_users_fault(study: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="figures cannot be written to"):
            examine.draw(study, examine.examine(study, "s"), folder)


def test_the_users_own_style_changes_nothing_and_stays(study: Engine, tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True, "font.size": 3}):
        examine.draw(study, examine.examine(study, "s"), tmp_path)
        assert matplotlib.rcParams["font.size"] == 3


def test_odd_words_are_drawn_as_they_are(engine: Engine, tmp_path: Path) -> None:
    words = ["$x^2", r"$\nonsense{$", "中文", "_hidden", "a_very_long_word_without_a_single_space_in_it" * 3]
    add(engine, [new_run(i, name=word) for i, word in enumerate(words)])
    for value in range(5):
        finish(engine, float(value))

    examine.draw(engine, examine.examine(engine, "s", 'label ~ "*" or label = "$\\\\x$"'), tmp_path)


def test_examining_loads_no_torch() -> None:
    code = """import sys, rnnq.cli, rnnq.examine, rnnq.families as families
assert families.find_figures("dynamics").draw and families.find_figures("toy") is None
assert "torch" not in sys.modules and "seaborn" not in sys.modules and "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------------------- curves


def drawn(engine: Engine, **asked: Any) -> tuple[Figure, pd.DataFrame]:
    """The figure of curves, laid out."""
    found = examine.examine(engine, "s", **asked)
    figure, _, numbers = examine.curves_figure(found, examine.frame.curves_frame(engine, "s", ["loss", "accuracy"]))
    figure.draw_without_rendering()
    return figure, numbers


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_figure_of_few_curves_names_each_with_its_rank(study: Engine) -> None:
    figure, _ = drawn(study)
    [axes] = figure.axes

    assert title(figure) == "s: loss while training, 6 of 6 runs"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimiser step", "loss (nats/byte)")
    assert legend(figure)[:2] == ["1. label3 (run 4): 1.000", "2. label1 (run 2): 1.500"]
    assert len(legend(figure)) == 6


def test_a_figure_of_many_curves_names_the_best_and_colours_the_rest_by_rank(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(40)])
    for i in range(38):
        finish(engine, 1 + i / 10)
    queue.record(engine, claim_one(engine), 2, [("loss", 1, 5.0), ("loss", 2, 4.0)])

    figure, numbers = drawn(engine)
    bar = figure.axes[1]
    ticks = [text.get_text() for text in bar.get_yticklabels()]

    assert title(figure) == "s: loss while training, 39 of 40 runs"
    assert len(legend(figure)) == 6
    assert legend(figure)[0] == "1. label0 (run 1): 1.000"
    assert legend(figure)[-1] == "1 run without a rank: not finished, or no finite loss"
    assert bar.get_ylabel() == "rank by loss (nats/byte)"
    assert (ticks[0], ticks[-1]) == ("1: 1.000", "38: 4.700")
    assert numbers["run"].nunique() == 39 and numbers[numbers["run"] == 39]["rank"].isna().all()


def test_steps_have_thousands(engine: Engine) -> None:
    add(engine, [new_run(0)])
    points = [("loss", step, 3.0) for step in (5000, 10_000)]
    queue.finish(engine, claim_one(engine), 10_000, {"loss": 3.0}, "loss", points)

    figure, _ = drawn(engine)

    assert "10,000" in [text.get_text() for text in figure.axes[0].get_xticklabels()]


def test_points_that_are_not_finite_are_left_out_and_counted(engine: Engine) -> None:
    add(engine, [new_run(0)])
    values = [3.0, math.nan, math.inf, 2.0]
    points = [("loss", step, value) for step, value in enumerate(values, start=1)]
    queue.finish(engine, claim_one(engine), 4, {"loss": 2.0}, "loss", points)

    figure, numbers = drawn(engine)

    assert "2 points that are not finite left out" in title(figure)
    assert numbers["loss"].tolist() == [3.0, 2.0]


def test_a_run_far_from_all_others_does_not_stretch_the_axis(engine: Engine) -> None:
    add(engine, [new_run(i) for i in range(8)])
    for value in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 900.0):
        finish(engine, value)

    figure, _ = drawn(engine)

    assert figure.axes[0].get_ylim()[1] < 4
    assert "1 run reaches beyond the axis" in title(figure)


def test_a_metric_without_a_curve_ranks_the_curves_of_the_primary_one(study: Engine) -> None:
    figure, numbers = drawn(study, by="accuracy")

    assert figure.axes[0].get_ylabel() == "loss (nats/byte)"
    assert legend(figure)[0] == "1. label0 (run 1): 1.000"
    assert numbers.columns[-1] == "loss"


def test_a_long_curve_is_thinned_and_keeps_its_end(engine: Engine) -> None:
    add(engine, [new_run(0)])
    points = [("loss", step, 1 / step) for step in range(1, 2502)]
    queue.finish(engine, claim_one(engine), 2501, {"loss": 0.0004}, "loss", points)

    figure, numbers = drawn(engine)

    assert "1 of 3 logged points" in title(figure)
    assert len(numbers) <= examine.POINTS + 1
    assert numbers["step"].tolist()[:2] == [1, 4] and numbers["step"].tolist()[-1] == 2501


def test_a_stage_without_curves_says_so(engine: Engine) -> None:
    add(engine, [new_run(0)])
    finish(engine, 1.0, curve=False)

    figure, numbers = drawn(engine)

    assert "none of its 1 run has recorded a curve of loss" in figure.texts[0].get_text().replace("\n", " ")
    assert numbers.empty


# ----------------------------------------------------------------------------------------------- hyper-parameters


def panels(engine: Engine, filter: str | None = None, **options: Any) -> tuple[Figure, dict[str, list[str]]]:
    """The figure, laid out, and the tick labels of each panel."""
    found = examine.examine(engine, "s", filter)
    figure, _, _ = examine.hyperparameters_figure(found, filtered=filter is not None, **options)
    figure.draw_without_rendering()
    return figure, {a.get_xlabel(): [text.get_text() for text in a.get_xticklabels()] for a in figure.axes}


def test_each_value_has_its_place_in_order_and_its_n(study: Engine) -> None:
    figure, found = panels(study)

    assert found == {"width": ["16\nn=2", "32\nn=2", "128\nn=2"], "gate": ["off\nn=3", "on\nn=3"]}
    assert title(figure) == "s: loss by hyper-parameter, 6 of 6 runs"
    assert figure.get_supylabel() == "loss (nats/byte)"
    assert legend(figure) == ["one run", "mean of the n runs of a value"]
    assert figure.axes[0].get_shared_y_axes().joined(*figure.axes)


def test_a_metric_is_called_what_its_family_calls_it(study: Engine) -> None:
    figure, _ = panels(study, words={"loss": "lowest training loss"})

    assert figure.get_supylabel() == "lowest training loss (nats/byte)"


def test_the_means_are_where_the_numbers_say(study: Engine) -> None:
    figure, _ = panels(study)

    gate = next(axes for axes in figure.axes if axes.get_xlabel() == "gate")
    means = gate.collections[1].get_offsets()
    assert np.asarray(means).tolist() == [[0, pytest.approx(4 / 3)], [1, 2.5]]


def test_the_filtered_figure_has_the_panels_of_the_stage_and_names_the_filter(study: Engine) -> None:
    figure, found = panels(study, "loss < 1.8 and width < 100")

    assert found == {"width": ["16\nn=1", "32\nn=1", "128\nn=0"], "gate": ["off\nn=2", "on\nn=0"]}
    assert title(figure) == "s: loss by hyper-parameter, the 2 of 6 runs with loss < 1.8 and width < 100"


def test_runs_that_are_not_shown_are_counted(engine: Engine) -> None:
    add(engine, [new_run(i, width=i + 1) for i in range(10)])
    for value in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 900.0, math.nan):
        finish(engine, value)

    figure, _ = panels(engine)

    assert title(figure).replace("\n", " ") == (
        "s: loss by hyper-parameter, 7 of 10 runs 2 runs are not finished, 1 has no finite value, "
        "1 lies beyond the axis; a mean that does is not drawn"
    )


def test_a_stage_in_which_nothing_varies_says_so(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i) for i in range(3)])
    for value in (1.0, 2.0, 3.0):
        finish(engine, value)

    figure, found = panels(engine)

    assert found == {"": ["all runs\nn=3"]}
    assert "no hyper-parameter varies: the runs differ by their seeds at most" in title(figure)


def test_a_stage_without_finished_runs_says_so(engine: Engine, tmp_path: Path) -> None:
    add(engine, [new_run(i, width=i + 1) for i in range(2)])

    figure, _ = panels(engine)

    assert "no finished run has a finite loss" in figure.texts[0].get_text()
    assert len(examine.draw(engine, examine.examine(engine, "s"), tmp_path)) == 4


def test_many_numbers_share_an_axis_and_rare_words_a_place(engine: Engine) -> None:
    add(engine, [new_run(i, lr=10.0 ** (-i / 10), word=f"w{i % 30}") for i in range(60)])
    for i in range(60):
        finish(engine, 1 + i / 60)

    figure, found = panels(engine)
    by_name = {axes.get_xlabel(): axes for axes in figure.axes}

    assert by_name["lr (means of 8 parts, n=7 to 8 each)"].get_xscale() == "log"
    assert len(found["word"]) == examine.TEXTS
    assert found["word"][-1] == "(others) n=14"


def test_values_of_each_kind_are_in_order(engine: Engine) -> None:
    kinds = [None, True, 10, 2, "b", "a", False, 0.5]
    add(engine, [new_run(i, kind=kind) for i, kind in enumerate(kinds)])
    for _ in kinds:
        finish(engine, 1.0)

    _, found = panels(engine)

    assert [text.split()[0] for text in found["kind"]] == ["none", "off", "on", "0.5", "2", "10", "a", "b"]


def test_a_swarm_of_500_equal_values_stays_in_its_place(engine: Engine) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlim(-0.5, 1.5)
    axes.set_ylim(0, 2)
    place = pd.Series([0, 1] * 500)

    examine._draw_swarm(axes, place, pd.Series(1.0, index=place.index))

    sideways = np.asarray(axes.collections[0].get_offsets())[:, 0] - place
    assert sideways.abs().max() <= 0.4
    assert sideways.groupby(place).mean().abs().max() < 1e-9


# --------------------------------------------------------------------------------------- figures of a family: memory


def nets(**columns: Any) -> pd.DataFrame:
    """Finished runs of the family, as frame.runs_frame gives them."""
    n = len(columns["val_loss"])
    same = {"stage": "s", "state": "done", "bigram_loss": 2.4, "unigram_loss": 3.2, "loss": 2.0}
    named = {"id": range(1, n + 1), "label": [f"net{i}" for i in range(1, n + 1)]}
    return pd.DataFrame({**same, **named, **columns})


JUDGED = nets(
    val_loss=[2.0, 2.3, 2.6, 2.2, math.nan, 2.0],
    val_loss_no_state=[2.9, 2.3, 3.0, 2.1, 3.0, 2.9],
    loss=[2.0, 1.8, 1.7, 1.8, 1.0, 1.0],
    state=["done"] * 5 + ["failed"],
)


def test_a_net_uses_its_memory_when_it_needs_its_state_and_beats_the_table() -> None:
    found = dynamics.judge(JUDGED)

    assert found["id"].tolist() == [1, 4, 2, 3]
    assert found["needs_state"].tolist() == [True, False, False, True]
    assert found["beats_bigram"].tolist() == [True, True, True, False]
    assert found["uses_memory"].tolist() == [True, False, False, False]
    assert found["passes_bound"].tolist() == [False, True, True, True]


def test_the_title_sets_the_old_proof_beside_the_new() -> None:
    first, second = dynamics.summary(dynamics.judge(JUDGED))

    assert first.startswith("s: does a net use its memory? 1 of 4 runs do:")
    assert second.endswith("passed by 3 runs (3 do not use it), not by 1 (1 do use it)")


def test_the_figure_of_memory_is_written_with_both_its_panels(tmp_path: Path) -> None:
    curves = pd.DataFrame(
        [(run, name, step, 3.0 - step / 1000) for run in (1, 2, 9) for name in dynamics.CURVES for step in (500, 1000)],
        columns=["run", "name", "step", "value"],
    )

    with examine.style():
        written = dynamics.draw(JUDGED, curves, examine.saver(tmp_path))

    assert [path.name for path in written] == ["memory.png", "memory.csv"]
    numbers = pd.read_csv(tmp_path / "memory.csv")
    assert numbers["panel"].value_counts().to_dict() == {"curves": 4, "runs": 4}
    assert numbers[numbers["panel"] == "runs"]["uses_memory"].tolist() == [True, False, False, False]


def test_the_panels_of_memory_have_labels_and_lines() -> None:
    figures = []

    dynamics.draw(
        JUDGED,
        pd.DataFrame(columns=["run", "name", "step", "value"]).astype({"value": float}),
        lambda figure, *_: figures.append(figure) or [],
    )
    left, right = figures[0].axes

    assert (left.get_xlabel(), left.get_ylabel()) == ("optimiser step", "held-out loss (nats/byte)")
    assert right.get_xlabel() == "held-out loss with every state zeroed (nats/byte)"
    words = [text.get_text() for axes in (left, right) for text in axes.get_legend().get_texts()]
    assert {"bigram table (2.400)", "unigram table (3.200)", "1. net1 (run 1)"} <= set(words)
    assert {"uses memory: below both lines (n=1)", "does not (n=3)", "training loss < 1.9 (n=3)"} <= set(words)
    assert right.get_title() == "every finished run (2 of 6 lack these numbers)"


def test_runs_without_held_out_losses_have_no_figure_of_memory(tmp_path: Path) -> None:
    curves = pd.DataFrame(columns=["run", "name", "step", "value"])

    assert dynamics.draw(JUDGED.drop(columns="val_loss"), curves, examine.saver(tmp_path)) == []
    assert dynamics.draw(JUDGED.iloc[4:], curves, examine.saver(tmp_path)) == []


def test_a_family_of_a_definition_file_has_not_the_figures_of_its_namesake(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(families, "find_figures", asked.append)
    for name, in_source in (("mine", True), ("s", False)):
        add(engine, [new_run(0)], name, family="dynamics", family_in_source=in_source)
        examine.draw(engine, examine.examine(engine, name), tmp_path)

    assert asked == ["dynamics"]


# ------------------------------------------------------------------------------------------------ the command line

DEFINITION = """
import rnnq

class Toy(rnnq.Config):
    width: int = 1

@rnnq.family(Toy)
def toy(config):
    yield {"loss": 1.0}

stage = rnnq.stage("toys", toy, rnnq.grid(width=[1, 2, 3]).seeds(SEEDS))
"""


class Terminal:
    """`rnnq ...` in this process: (exit code, stdout, stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["rnnq", *words])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        out, err = self.capsys.readouterr()
        return int(left.value.code or 0), out, err


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(monkeypatch, capsys)


def define(engine: Engine, tmp_path: Path, seeds: int = 1) -> None:
    """The stage `toys`, with a definition file that promote finds."""
    (tmp_path / "defs").mkdir()
    path = tmp_path / "defs" / "toys.py"
    path.write_text(DEFINITION.replace("SEEDS", str(seeds)))
    queue.init(engine, plan.from_definitions([sweep.load(path)], tmp_path / "defs"))


def test_a_stage_is_examined_from_the_command_line(study: Engine, cli: Cli, tmp_path: Path) -> None:
    done = cli("examine", "--limit", "3", "--filter", "loss<2.2")

    lines = done.stdout.splitlines()
    assert lines[0].strip() == "s: 3 of 4 finished runs with loss<2.2, lowest loss in nats/byte first"
    assert lines[1].split() == ["id", "label", "width", "gate", "loss"]
    assert [line.split()[0] for line in lines[2:5]] == ["4", "2", "6"]
    assert lines[-1] == "rnnq promote --stage s --filter 'loss<2.2' --top 3"
    assert done.stderr.splitlines() == [
        "stage s (the newest with finished runs)",
        "figures in figures/s/: curves.png, hyperparameters.png, hyperparameters_filtered.png",
    ]
    assert (tmp_path / "figures" / "s" / "hyperparameters_filtered.csv").exists()


def test_json_and_csv_are_alone_on_stdout(study: Engine, terminal: Terminal, tmp_path: Path) -> None:
    _, out, err = terminal("examine", "--stage", "s", "--by", "accuracy", "--format", "json", "--save", "pictures")

    assert [row["id"] for row in json.loads(out)] == [1, 2, 3, 4, 5, 6]
    assert err.splitlines()[-1] == "rnnq promote --stage s --by accuracy --top 6"
    assert (tmp_path / "pictures" / "curves.png").exists()
    _, out, _ = terminal("examine", "--stage", "s", "--format", "csv", "--limit", "1")
    assert out == "id,label,width,gate,loss\n4,label3,128,False,1.0\n"


def test_a_filter_that_nothing_fulfils_is_no_error(study: Engine, terminal: Terminal, tmp_path: Path) -> None:
    code, out, err = terminal("examine", "--filter", "loss<0")

    assert (code, out) == (0, "")
    assert "none of the 6 finished runs of stage s fulfils loss<0" in err
    assert "promote" not in err
    assert not (tmp_path / "figures" / "s" / "hyperparameters_filtered.png").exists()
    assert terminal("examine", "--filter", "loss<0", "--format", "json")[1] == "[]\n"


def test_bad_input_exits_with_2_and_says_what_is_right(study: Engine, terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, message in (
        (["--stage", "t"], "there is no stage 't'"),
        (["--by", "acuracy"], "did you mean accuracy?"),
        (["--filter", "loss<"], "error: the filter cannot be used"),
        (["--limit", "0"], "--limit"),
        (["--save", "file"], "figures cannot be written to file"),
        (["--db", "none.db"], "there is no database none.db"),
    ):
        code, out, err = terminal("examine", *words)
        assert (code, out) == (2, "") and message in err, err


def test_a_study_without_finished_runs_says_so(engine: Engine, terminal: Terminal) -> None:
    add(engine, [new_run(0)])

    assert terminal("examine")[0] == 2
    code, _, err = terminal("examine", "--stage", "s")
    assert code == 0
    assert "none of the 1 run of stage s has finished yet" in err


def test_the_promote_line_does_what_it_says(engine: Engine, terminal: Terminal, tmp_path: Path) -> None:
    define(engine, tmp_path)
    for value in (2.0, 1.0, 3.0):
        finish(engine, value)

    _, out, _ = terminal("examine", "--filter", "loss < 2.5", "--db", str(tmp_path / "experiments.db"))
    line = out.splitlines()[-1]
    code, out, err = terminal(*shlex.split(line)[1:], "--dry-run", "--format", "json")

    assert line.endswith(f"--top 2 --db {tmp_path / 'experiments.db'}")
    assert code == 0, err
    assert [group["runs"] for group in json.loads(out)["ranked"]] == [[2], [1]]


def test_with_seeds_the_promote_line_says_that_means_are_ranked(
    engine: Engine, terminal: Terminal, tmp_path: Path
) -> None:
    define(engine, tmp_path, seeds=2)
    for value in (1.0, 9.0, 2.0, 3.0, 4.0):
        finish(engine, value)
    queue.fail(engine, claim_one(engine), "bug", "broken")

    _, out, err = terminal("examine", "--limit", "1")

    assert out.splitlines()[-1] == "rnnq promote --stage toys --top 1"
    assert (
        "promote ranks groups by their mean over seeds: of the 1 group shown it takes 0; "
        "it leaves out 1 that lack seeds (see --allow-missing)"
    ) in err
