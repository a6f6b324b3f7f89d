"""The figures: what they show, and what they say of what they do not show."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from sqlalchemy import Engine, text

from rnnq import db, examine, frame, queue, runs
from rnnq.families.dynamics import figures as dynamics
from rnnq.figures import bars, canvas, cost, curves, groups, influence, regression
from rnnq.figures.canvas import Scale
from rnnq.spread import Spread
from tests.conftest import claim_one
from tests.studies import ACCURACY, LOSS, add, add_study, finish, new_run


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 40)  # a third of the time


@pytest.fixture
def study(engine: Engine) -> Engine:
    """Six finished runs."""
    add_study(engine)
    return engine


def recorded(engine: Engine) -> pd.DataFrame:
    """The curves of the stage."""
    return frame.curves_frame(engine, "s", ["loss", "accuracy"])


# --------------------------------------------------------------------------------------------------------- curves


def drawn(engine: Engine, scale: Scale = Scale.auto, **asked: Any) -> tuple[Figure, pd.DataFrame]:
    """The figure of curves, laid out."""
    found = examine.examine(engine, "s", **asked)
    figure, _, numbers = curves.curves_figure(found, recorded(engine), scale=scale)
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
    assert len(numbers) <= curves.POINTS + 1
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
    figure, _, _ = influence.hyperparameters_figure(found, filtered=filter is not None, **options)
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
    assert len(examine.draw(engine, examine.examine(engine, "s"), tmp_path)) == 8


def test_many_numbers_share_an_axis_and_rare_words_a_place(engine: Engine) -> None:
    add(engine, [new_run(i, lr=10.0 ** (-i / 10), word=f"w{i % 30}") for i in range(60)])
    for i in range(60):
        finish(engine, 1 + i / 60)

    figure, found = panels(engine)
    by_name = {axes.get_xlabel(): axes for axes in figure.axes}

    assert by_name["lr (means of 8 parts, n=7 to 8 each)"].get_xscale() == "log"
    assert len(found["word"]) == influence.TEXTS
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

    influence._draw_swarm(axes, place, pd.Series(1.0, index=place.index))

    sideways = np.asarray(axes.collections[0].get_offsets())[:, 0] - place
    assert sideways.abs().max() <= 0.4
    assert sideways.groupby(place).mean().abs().max() < 1e-9


# ------------------------------------------------------------------------------------------------------ every axis


@pytest.mark.parametrize(
    ("values", "better", "scale", "expected"),
    [
        ([1.0, 2.0, 3.0], "min", Scale.auto, "linear"),
        ([0.01, 1.0, 100.0], "min", Scale.auto, "log"),
        ([0.01, 1.0, 100.0], "max", Scale.auto, "linear"),
        ([0.01, 1.0, 100.0], "min", Scale.linear, "linear"),
        ([1.0, 2.0, 3.0], "min", Scale.log, "log"),
        ([0.0, 2.0, 3.0], "min", Scale.log, "linear"),
    ],
)
def test_an_axis_is_divided_as_asked_or_as_its_values_need(
    values: list[float], better: str, scale: Scale, expected: str
) -> None:
    axes = Figure().subplots()

    canvas.fit(axes, {"better": better}, values, values, scale)

    assert axes.get_yscale() == expected
    assert bool(canvas.refused(axes, scale)) == (scale is Scale.log and expected == "linear")


def test_a_logarithmic_axis_of_less_than_a_decade_has_several_ticks(study: Engine) -> None:
    figure, _ = drawn(study, scale=Scale.log)
    [axes] = figure.axes

    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    inside = [text.get_text() for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert len(inside) >= 3


def test_the_best_curves_are_told_apart_without_colour(study: Engine) -> None:
    figure, _ = drawn(study)

    marked = [line for line in figure.axes[0].lines if line.get_color() != "white"]
    assert len({line.get_marker() for line in marked}) == len(marked) == 6
    assert len({line.get_markevery() for line in marked}) == 6


def test_of_very_many_curves_some_are_drawn_and_all_are_in_the_numbers(
    study: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "NAMED", 1)
    monkeypatch.setattr(curves, "BEST", 1)
    monkeypatch.setattr(curves, "MOST", 2)

    figure, numbers = drawn(study)

    assert "2 of the curves are drawn, evenly by rank" in title(figure)
    assert len(figure.axes[0].collections[-1].get_paths()) == 2
    assert numbers["run"].nunique() == 6


# --------------------------------------------------------------------------------------------------------- groups


def seeded(engine: Engine, grids: list[list[int]], values: list[float]) -> None:
    """Groups of two seeds; run i logs at the steps of its grid, its curve is its value throughout."""
    add(engine, [new_run(i, f"g{i // 2}", seed=i % 2, width=16 << i // 2) for i in range(len(grids))])
    for steps, value in zip(grids, values, strict=True):
        points = [("loss", step, value) for step in steps]
        queue.finish(engine, claim_one(engine), 10, {"loss": value}, "loss", points)


def test_a_mean_curve_has_the_steps_that_all_finished_members_logged(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i) for i in range(3)])
    for steps, value in (([1, 2, 4], 1.0), ([2, 3, 4], 3.0)):
        points = [("loss", step, value) for step in steps]
        queue.finish(engine, claim_one(engine), 4, {"loss": value}, "loss", points)
    queue.record(engine, claim_one(engine), 4, [("loss", step, 100.0) for step in (1, 2, 3, 4)])

    found = examine.examine(engine, "s")
    means = groups.mean_curves(found, recorded(engine))

    assert means[["step", "n", "mean"]].to_numpy().tolist() == [[2, 2, 2.0], [4, 2, 2.0]]
    assert means["std"].tolist() == pytest.approx([math.sqrt(2)] * 2)


def early(engine: Engine) -> None:
    """One group of three: a run ends at step 2, one at 4, one at 6; each is constant."""
    add(engine, [new_run(i, "g", seed=i) for i in range(3)])
    for value, end in ((1.0, 2), (2.0, 4), (6.0, 6)):
        points = [("loss", step, value) for step in range(1, end + 1)]
        queue.finish(engine, claim_one(engine), 6, {"loss": value}, "loss", points)


def test_a_run_that_ended_early_is_in_the_mean_up_to_its_end_and_no_further(engine: Engine) -> None:
    early(engine)

    means = groups.mean_curves(examine.examine(engine, "s"), recorded(engine))

    assert means[["step", "n", "of", "mean"]].to_numpy().tolist() == [
        [1, 3, 3, 3.0], [2, 3, 3, 3.0], [3, 2, 3, 4.0], [4, 2, 3, 4.0], [5, 1, 3, 6.0], [6, 1, 3, 6.0],
    ]  # fmt: skip
    assert means["half"].tolist()[:4] == pytest.approx([math.sqrt(7)] * 2 + [math.sqrt(8)] * 2)
    assert means["half"].isna().tolist()[4:] == [True, True]


def test_the_end_of_a_run_breaks_the_mean_and_says_how_many_go_on(engine: Engine) -> None:
    early(engine)

    figure, _, _ = groups.means_figure(examine.examine(engine, "s"), recorded(engine))
    [axes] = figure.axes

    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[3, 4], [5, 6]]
    assert [text.get_text() for text in axes.texts] == ["n=2", "n=1"]
    assert legend(figure)[-1] == "of the n runs that go on"
    assert "1 group has runs that ended before others" in title(figure)
    panels, _, _ = groups.seeds_figure(examine.examine(engine, "s"), recorded(engine))
    assert [text.get_text() for text in panels.axes[0].texts] == ["n=2", "n=1"]


def test_a_band_may_be_the_interval_of_the_mean(engine: Engine) -> None:
    seeded(engine, [[1, 2, 3]] * 2, [4.0, 5.0])

    found = examine.examine(engine, "s", spread=Spread.t95)
    figure, _, numbers = groups.means_figure(found, recorded(engine))

    assert numbers["t95"].tolist() == pytest.approx([12.706 / 2] * 3, rel=1e-4)  # t of one degree of freedom
    assert legend(figure)[:2] == [
        "1. label0: 4.5 ± 6.4 (mean ± 95%, n=2)", "band: mean ± 95% interval of the mean of the runs at a step",
    ]  # fmt: skip


def test_the_means_of_groups_are_named_with_their_spread_and_have_a_band(engine: Engine) -> None:
    seeded(engine, [[1, 2, 3]] * 4, [4.0, 5.0, 1.0, 2.0])

    figure, name, numbers = groups.means_figure(examine.examine(engine, "s"), recorded(engine))
    figure.draw_without_rendering()

    assert name == "curves_groups"
    assert title(figure) == "s: loss while training, means over seeds of 2 groups, n=2 finished runs each"
    assert legend(figure) == [
        "1. label2: 1.50 ± 0.71 (mean ± std, n=2)",
        "2. label0: 4.50 ± 0.71 (mean ± std, n=2)",
        "band: mean ± std of the runs at a step",
        "one run",
    ]
    bands = figure.axes[0].collections[2:]
    assert len(bands) == 2 and bands[0].get_datalim(figure.axes[0].transData).height == pytest.approx(math.sqrt(2))
    assert numbers.columns.tolist() == ["place", "label", "run", "step", "n", "of", "mean", "std", "min", "max"]
    assert numbers[["place", "run", "mean"]].drop_duplicates().to_numpy().tolist() == [[1, 3, 1.5], [2, 1, 4.5]]


def test_on_a_logarithmic_axis_a_band_ends_at_the_lowest_run(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 2, [0.01, 5.0])

    figure, _, _ = groups.means_figure(examine.examine(engine, "s"), recorded(engine), scale=Scale.log)
    [axes] = figure.axes

    assert min(y for _, y in axes.collections[-1].get_paths()[0].vertices) == 0.01
    assert legend(figure)[-2] == "band: mean ± std of the runs at a step, not below the lowest"


def test_many_groups_are_coloured_by_the_rank_of_their_mean_and_the_best_five_named(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 16, [float(i // 2) for i in range(16)])

    figure, _, _ = groups.means_figure(examine.examine(engine, "s"), recorded(engine))
    figure.draw_without_rendering()

    assert [text.split(":")[0] for text in legend(figure)[:5]] == [f"{i + 1}. label{2 * i}" for i in range(5)]
    assert figure.axes[1].get_yticklabels()[-1].get_text() == "8: 7.000"


def test_a_group_that_lacks_seeds_is_grey_and_has_no_rank(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 5, [4.0, 5.0, 3.0, 3.0, 1.0])
    add(engine, [new_run(5, "g2", seed=1, width=64)])
    queue.fail(engine, claim_one(engine), "bug", "broken")

    figure, _, numbers = groups.means_figure(examine.examine(engine, "s"), recorded(engine))

    assert [text.split(":")[0] for text in legend(figure)] == [
        "1. label2", "2. label0", "1 group that lacks seeds", "band", "one run",
    ]  # fmt: skip
    assert numbers["place"].isna().tolist() == [False] * 4 + [True] * 2


def test_groups_whose_seeds_share_no_steps_say_so(engine: Engine) -> None:
    seeded(engine, [[1, 2], [3, 4]], [1.0, 2.0])

    figure, _, numbers = groups.means_figure(examine.examine(engine, "s"), recorded(engine))

    assert "no group has a curve of loss with steps that all its finished runs logged" in said(figure)
    assert numbers.empty


def said(figure: Figure) -> str:
    """The words of a figure that has nothing to draw."""
    return figure.texts[0].get_text().replace("\n", " ")


def test_each_of_the_best_groups_has_a_panel_with_all_its_seeds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "PANELS", 2)
    add(engine, [new_run(i, f"g{i // 3}", seed=i % 3) for i in range(9)])
    for value in (5.0, 6.0, 7.0, 1.0, 2.0, 3.0, 8.0, 9.0):
        finish(engine, value)
    queue.record(engine, claim_one(engine), 2, [("loss", 1, 5.0), ("loss", 2, 4.0)])

    figure, name, numbers = groups.seeds_figure(examine.examine(engine, "s"), recorded(engine))
    figure.draw_without_rendering()

    assert name == "curves_seeds"
    assert [axes.get_title() for axes in figure.axes] == [
        "1. label3\n2.0 ± 1.0 (mean ± std, n=3)", "2. label0\n6.0 ± 1.0 (mean ± std, n=3)",
    ]  # fmt: skip
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimiser step"] * 2
    assert title(figure) == "s: loss while training, every seed of the best 2 of 3 groups"
    assert numbers.columns.tolist() == ["place", "label", "run", "seed", "state", "step", "loss"]
    assert set(numbers["run"]) == {1, 2, 3, 4, 5, 6}


def test_a_seed_that_has_not_finished_is_dashed_and_not_in_the_mean(engine: Engine) -> None:
    add(engine, [new_run(i, "g", seed=i) for i in range(3)])
    finish(engine, 1.0)
    finish(engine, 3.0)
    queue.record(engine, claim_one(engine), 2, [("loss", 1, 90.0), ("loss", 2, 90.0)])

    figure, _, _ = groups.seeds_figure(examine.examine(engine, "s"), recorded(engine))
    [axes] = figure.axes
    mean, *seeds = axes.lines

    assert axes.get_title() == "– label0\n2.0 ± 1.4 (mean ± std, n=2 of 3)"
    assert [line.get_linestyle() for line in seeds] == ["-", "-", "--"]
    assert mean.get_ydata()[0] == 3.0
    assert "a seed that has not finished" in legend(figure)


# ----------------------------------------------------------------------------------------- what groups came to


def barred(engine: Engine, scale: Scale = Scale.auto, **asked: Any) -> tuple[Figure, pd.DataFrame]:
    """The figure of means with error bars, laid out."""
    figure, name, numbers = bars.bars_figure(examine.examine(engine, "s", **asked), scale=scale)
    figure.draw_without_rendering()
    assert name == "groups"
    return figure, numbers


def test_each_group_has_its_mean_an_error_bar_and_its_runs_best_first(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 5, [4.0, 5.0, 1.0, 2.0, 3.0])
    add(engine, [new_run(5, "g2", seed=1, width=64)])
    queue.fail(engine, claim_one(engine), "bug", "broken")

    figure, numbers = barred(engine)
    axes, beside = figure.axes[0], figure.axes[0].child_axes[0]

    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["1. label2", "2. label0", "– label4"]
    said = [text.get_text() for text in beside.get_yticklabels()]
    assert said == ["1.50 ± 0.71 (2)", "4.50 ± 0.71 (2)", "3.000 (1 of 2)"]
    ends = [bar.get_paths()[0].vertices[:, 0] for bar in axes.collections if isinstance(bar, LineCollection)]
    assert np.array(ends) == pytest.approx(np.array([[0.7929, 2.2071], [3.7929, 5.2071]]), abs=1e-4)
    assert [patch.get_width() for patch in axes.patches] == [1.5, 4.5, 3.0]  # from zero
    assert title(figure) == "s: loss of 3 groups, mean ± std over seeds (n)"
    assert "lacks seeds, and so is not ranked" in legend(figure)
    assert numbers[["run", "value", "n", "of"]].to_numpy().tolist()[-1] == [5, 3.0, 1, 2]


def test_where_zero_would_hide_the_differences_there_are_no_bars_and_the_title_says_so(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 4, [0.98, 0.99, 0.97, 0.995])

    figure, _ = barred(engine)

    assert not figure.axes[0].patches
    assert "the axis does not begin at zero" in title(figure)


def test_on_a_logarithmic_axis_an_error_bar_ends_at_the_lowest_run(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 2, [0.01, 5.0])

    figure, _ = barred(engine, Scale.log)
    [bar] = [bar for bar in figure.axes[0].collections if isinstance(bar, LineCollection)]

    assert bar.get_paths()[0].vertices[0, 0] == pytest.approx(0.01)
    assert not figure.axes[0].patches


def test_of_many_groups_the_best_thirty_have_a_row(engine: Engine) -> None:
    seeded(engine, [[1, 2]] * 64, [float(i // 2 + i % 2) for i in range(64)])

    figure, numbers = barred(engine, spread=Spread.t95)

    assert title(figure) == "s: loss of the best 30 of 32 groups, mean ± 95% interval of the mean over seeds (n)"
    assert numbers["t95"].tolist() == pytest.approx([12.7062 / 2] * 60, rel=1e-4)


def test_a_stage_without_finished_groups_has_no_bars(engine: Engine) -> None:
    add(engine, [new_run(0, "g")])

    figure, _, numbers = bars.bars_figure(examine.examine(engine, "s"))

    assert "no group has a finished run with loss" in said(figure) and numbers.empty


# ----------------------------------------------------------------------------------------------------- regression


def fitted(engine: Engine, filter: str | None = None, by: str | None = None) -> regression.Regression:
    """The regression of the stage."""
    return regression.regress(examine.examine(engine, "s", filter, by), filtered=filter is not None)


def grid(engine: Engine, n: int = 60, words: str = "abc") -> None:
    """Runs whose loss is exp(a width's logarithm - a gate): known coefficients."""
    made = [{"width": 16 << i % 3, "gate": i % 2 == 0, "word": words[i % 3]} for i in range(n)]
    add(engine, [new_run(i, **config) for i, config in enumerate(made)])
    noise = np.random.default_rng(0).normal(size=n) * 0.1
    for i in range(n):
        finish(engine, math.exp(math.log([16, 32, 64][i % 3]) - (i % 2 == 0) + noise[i]), curve=False)


def test_a_regression_finds_the_coefficients_that_the_losses_were_made_with(engine: Engine) -> None:
    add(engine, [new_run(i, width=[16, 32, 64][i // 20], gate=i % 2 == 0) for i in range(60)])
    made = [math.log([16, 32, 64][i // 20]) - (i % 2 == 0) for i in range(60)]
    for value in made:
        finish(engine, math.exp(value), curve=False)

    found = fitted(engine)
    assert found.coefficients is not None

    assert (found.target, found.n, found.test, found.remarks) == ("log(loss)", 60, 12, ())
    assert found.coefficients["feature"].tolist() == ["log(width)", "gate"]
    assert found.coefficients["scale"].tolist() == ["logarithm", "0 or 1"]
    width, gate = math.log(2) * math.sqrt(2 / 3), 0.5  # the standard deviation of each part
    expected = [width / math.hypot(width, gate), -gate / math.hypot(width, gate)]
    for column in ("coefficient", "all"):
        assert found.coefficients[column].tolist() == pytest.approx(expected)
    assert (found.r2, found.r2_mean, found.r2_all) == pytest.approx((1, 1, 1))
    assert (found.mse, found.r2_std) == pytest.approx((0, 0), abs=1e-9)


def test_the_split_is_that_of_random_state_42_over_runs_by_id(engine: Engine) -> None:
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    grid(engine, words="aaa")
    rows = frame.runs_frame(engine, "s")
    features = rows[["config.width", "config.gate"]].astype(float).assign(width=np.log(rows["config.width"]))
    x = StandardScaler().fit_transform(features[["width", "config.gate"]])
    y = StandardScaler().fit_transform(np.log(rows[["loss"]]))[:, 0]
    x_seen, x_unseen, y_seen, y_unseen = train_test_split(x, y, test_size=0.2, random_state=42)

    found = fitted(engine)

    assert found.r2 == pytest.approx(LinearRegression().fit(x_seen, y_seen).score(x_unseen, y_unseen))
    assert found.r2_all == pytest.approx(LinearRegression().fit(x, y).score(x, y))
    assert 0 < found.r2_std < 0.1 and found.r2_mean == pytest.approx(found.r2_all, abs=0.05)


@pytest.mark.parametrize(
    ("values", "feature", "scale"),
    [
        ([1, 2, 3], "f", "as it is"),
        ([0.001, 0.003, 0.01], "log(f)", "logarithm"),
        ([32, 256], "f", "as it is"),
        ([0, 10, 100, 1000], "f", "as it is"),
        ([False, True], "f", "0 or 1"),
        (["b", "a", "c"], "f=b", "1 or 0, against a"),
        ([None, 0.5], "f=none", "1 or 0, against 0.5"),
    ],
)
def test_what_a_hyper_parameter_becomes_in_a_regression(values: list[Any], feature: str, scale: str) -> None:
    rows = pd.DataFrame({"config.f": pd.Series(values * 3, dtype=object).infer_objects()})

    columns, scales = regression.features(rows, ["f"])

    first = next(iter(columns))
    assert (first, scales[first]) == (feature, scale)
    assert columns.shape[1] == (2 if feature == "f=b" else 1)


def test_factors_that_are_unbalanced_or_vary_together_are_named(engine: Engine) -> None:
    grid(engine)

    found = fitted(engine)

    assert any("collinear" in line and "word=b" in line for line in found.remarks)
    assert any(line.startswith("not independent") and "log(width) with word=c" in line for line in found.remarks)


def test_a_value_that_few_runs_have_is_named(engine: Engine) -> None:
    add(engine, [new_run(i, width=16 << i % 2, gate=i == 7) for i in range(20)])
    for i in range(20):
        finish(engine, 1.0 + i % 2 + i / 100, curve=False)

    assert fitted(engine).remarks == ("unbalanced, so little is known of: gate=on (n=1 of 20)",)


def test_a_run_that_rules_the_fit_is_mentioned(engine: Engine) -> None:
    add(engine, [new_run(i, width=[16, 32, 64][i % 3]) for i in range(60)])
    for i in range(60):
        finish(engine, 1e9 if i == 3 else 1 + i % 3, curve=False)

    assert "1 run lies over 5 standard deviations from the mean and rules the fit" in fitted(engine).remarks


def test_a_metric_that_is_not_positive_is_fitted_as_it_is(engine: Engine) -> None:
    add(engine, [new_run(i, width=[16, 32, 64][i % 3]) for i in range(12)])
    for i in range(12):
        finish(engine, i % 3 - 1.0, curve=False)

    found = fitted(engine)

    assert found.target == "loss"
    assert "loss is not positive everywhere: it is fitted as it is, without a logarithm" in found.remarks


def test_why_there_is_no_regression_is_said(engine: Engine) -> None:
    add(engine, [new_run(i, width=i + 1) for i in range(12)])
    assert fitted(engine).reason == (
        "too few runs: 0 finished runs with a finite loss; 0 coefficients would need at least 10"
    )
    for _ in range(11):
        finish(engine, 2.0, curve=False)
    finish(engine, math.nan, curve=False)
    assert fitted(engine).reason == "every run has the same loss"
    assert fitted(engine, "width = 1 or width = 2").reason is not None

    figure, name, numbers = regression.regression_figure(examine.examine(engine, "s"), fitted(engine))

    assert said(figure) == "stage s: no regression of log(loss): every run has the same loss"
    assert (name, len(numbers)) == ("regression", 0)


def test_seeds_of_one_config_on_both_sides_of_a_split_are_mentioned(engine: Engine) -> None:
    seeded(engine, [[1]] * 20, [1.0 + i // 2 + i / 100 for i in range(20)])

    assert any("fall on both sides" in line for line in fitted(engine).remarks)


def test_the_figure_of_a_regression_shows_coefficients_and_what_was_not_fitted(engine: Engine) -> None:
    grid(engine)
    found = examine.examine(engine, "s")

    figure, name, numbers = regression.regression_figure(found, regression.regress(found))
    figure.draw_without_rendering()
    left, right = figure.axes

    assert name == "regression"
    assert [text.get_text() for text in left.get_yticklabels()][:1] == [numbers["feature"].iloc[0]]
    assert right.get_xlabel() == "predicted log(loss), z-scored"
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["fitted (n=48)", "not fitted (n=12)"]
    assert "on the 12 of 60 runs not fitted: R²\u00a0" in title(figure)
    assert numbers["panel"].value_counts().to_dict() == {"runs": 60, "coefficients": 4}
    assert numbers[numbers["panel"] == "runs"]["part"].value_counts().to_dict() == {"fit": 48, "test": 12}


# ----------------------------------------------------------------------------------------------------------- cost


def spent(engine: Engine, by: str | None = None, seconds: dict[int, float] | None = None) -> (
    tuple[Figure, pd.DataFrame]
):  # fmt: skip
    """The figure of cost, laid out."""
    found = examine.examine(engine, "s", by=by)
    figure, name, numbers = cost.cost_figure(found, runs.seconds(engine, "s") if seconds is None else seconds)
    figure.draw_without_rendering()
    assert name == "cost"
    return figure, numbers


def test_no_run_of_the_front_is_beaten_at_its_cost_or_less() -> None:
    values, metric = [10, 20, 20, 30, 40, 50], [5.0, 4.0, 3.0, 3.0, 3.5, 1.0]
    table = pd.DataFrame({"value": values, "metric": metric})

    assert cost.front(table, lowest=True).tolist() == [True, False, True, False, False, True]
    assert cost.front(table, lowest=False).tolist() == [True, False, False, False, False, False]


def test_loss_is_set_against_parameters_and_time_and_the_front_is_named(engine: Engine) -> None:
    add(engine, [new_run(i, width=i) for i in range(4)])
    for loss, parameters in ((3.0, 100), (2.0, 1000), (2.5, 5000), (1.0, 20_000)):
        finish(engine, loss, parameters=parameters)

    figure, numbers = spent(engine, seconds={1: 10.0, 2: 0.0, 3: 20.0})
    left, right = figure.axes

    assert (left.get_xlabel(), right.get_xlabel()) == ("parameters", "training time over all attempts (s)")
    assert left.get_xscale() == right.get_xscale() == "log"
    assert left.get_ylabel() == "loss (nats/byte)"
    words = [text.get_text() for text in left.get_legend().get_texts()]
    assert words[:3] == ["one run", "Pareto front (n=3)", "1  label0 (run 1): 3.000, 100 parameters"]
    assert words[-1] == "3  label3 (run 4): 1.000, 20,000 parameters"
    assert "2 without seconds" in title(figure)
    parameters = numbers[numbers["cost"] == "parameters"]
    assert parameters["run"].tolist() == [1, 2, 3, 4] and parameters["front"].tolist() == [True, True, False, True]
    assert numbers[numbers["cost"] == "seconds"]["value"].tolist() == [10.0, 20.0]


def test_with_seeds_the_front_is_of_groups(engine: Engine) -> None:
    seeded(engine, [[1]] * 6, [1.0, 5.0, 2.0, 2.0, 9.0, 9.0])

    figure, numbers = spent(engine, seconds={1: 1.0, 2: 3.0, 3: 1.0, 4: 1.0, 5: 9.0, 6: 9.0})

    assert numbers[["run", "n", "value", "metric", "front"]].to_numpy().tolist() == [
        [1, 2, 2.0, 3.0, False], [3, 2, 1.0, 2.0, True], [5, 2, 9.0, 9.0, False],
    ]  # fmt: skip
    assert "groups (means over seeds)" in title(figure).replace("\n", " ")


def test_time_is_counted_over_all_attempts_that_have_ended(engine: Engine) -> None:
    add(engine, [new_run(0), new_run(1)])
    queue.release(engine, claim_one(engine))
    finish(engine, 1.0)
    claim_one(engine)
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE attempts SET started_at = 100 * attempt"))
        connection.execute(text("UPDATE attempts SET ended_at = 130 * attempt WHERE ended IS NOT NULL"))

    assert runs.seconds(engine, "s") == {1: 30.0 + 60.0}


def test_a_stage_without_costs_says_so(engine: Engine) -> None:
    add(engine, [new_run(0)])
    finish(engine, 1.0)

    figure, numbers = spent(engine, seconds={})

    assert said(figure).startswith("stage s: no finished run has both a finite loss and a cost")
    assert numbers.empty


def test_where_high_is_good_the_numbers_of_the_front_stand_above_it(study: Engine) -> None:
    figure, numbers = spent(study, by="accuracy", seconds={run: float(7 - run) for run in range(1, 7)})

    assert numbers["front"].tolist() == [True] * 6
    assert figure.axes[0].get_ylabel() == "accuracy"
    assert {note.xyann[1] for note in figure.axes[0].texts} == {11}


# ----------------------------------------------------------------------------------------------------- many runs


def fill(engine: Engine, n: int, length: int) -> None:
    """A falling curve for each of n runs, and an attempt."""
    with db.transaction(engine) as connection:
        connection.execute(text("INSERT INTO metrics (name) VALUES ('loss')"))
        connection.execute(
            text("""INSERT INTO workers (id, host, pid, device, command_line, state, started_at, beat_at, left_at)
                    VALUES ('w', 'h', 1, 'cpu', 'x', 'left', 0, 0, 0)""")
        )
        connection.execute(
            text("""INSERT INTO attempts (run_id, attempt, worker, host, device, started_at, ended_at, ended,
                                          command_line)
                    SELECT id, 1, 'w', 'h', 'cpu', 0, 1 + id % 100, 'done', 'x' FROM runs""")
        )
        connection.execute(
            text("""WITH RECURSIVE step(at) AS (SELECT 1 UNION ALL SELECT at + 1 FROM step WHERE at < :length)
                    INSERT INTO point SELECT runs.id, metrics.id, at, loss + 1.0 / at FROM runs, metrics, step
                    WHERE runs.id <= :n ORDER BY 1, 2, 3"""),
            {"n": n, "length": length},
        )


@pytest.mark.slow
def test_a_stage_of_ten_thousand_runs_is_drawn_in_time_and_in_small_files(engine: Engine, tmp_path: Path) -> None:
    """Three formats, where one is usual; the bound leaves room for a machine that is busy."""
    made = [
        queue.NewRun(
            f"label{i}", f'{{"width":{16 << i % 5},"gate":{"true" if i % 2 else "false"},"seed":0}}', f"f{i}", f"g{i}",
            0, None, 10, summary={"loss": 1 + (i % 997) / 500, "parameters": 100 + i},
        )
        for i in range(10_000)
    ]  # fmt: skip
    add(engine, made, metrics=[LOSS, ACCURACY])
    fill(engine, 10_000, 50)

    began = time.perf_counter()
    found = examine.examine(engine, "s")
    how = examine.drawing(["png,svg,pdf"], "auto")
    written = examine.draw(engine, found, tmp_path, how=how)

    assert time.perf_counter() - began < 60
    assert max(path.stat().st_size for path in written if path.suffix in (".svg", ".pdf", ".png")) < 3e6


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
    points = pd.DataFrame(
        [(run, name, step, 3.0 - step / 1000) for run in (1, 2, 9) for name in dynamics.CURVES for step in (500, 1000)],
        columns=["run", "name", "step", "value"],
    )

    with canvas.style():
        written = dynamics.draw(JUDGED, points, canvas.saver(tmp_path))

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
    points = pd.DataFrame(columns=["run", "name", "step", "value"])

    assert dynamics.draw(JUDGED.drop(columns="val_loss"), points, canvas.saver(tmp_path)) == []
    assert dynamics.draw(JUDGED.iloc[4:], points, canvas.saver(tmp_path)) == []
    assert dynamics.drawn(JUDGED) == [1, 4, 2, 3]
