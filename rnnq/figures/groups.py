"""Curves of groups: the mean and spread over seeds, and each seed of the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from pandas import DataFrame, Series

from rnnq.figures import canvas
from rnnq.figures.canvas import BLUE, DARK, GREY, MARKS, Scale, count, plain, with_spread, with_unit
from rnnq.figures.curves import (
    BEST,
    LABEL,
    Drawn,
    canvas_of_one,
    draw_named,
    draw_ranked,
    evenly,
    frame_of,
    label_bar,
    legend_below,
    lines_of,
    metric_of,
    points_of,
    sampling,
    thin,
    thinning,
)
from rnnq.figures.subject import NO_WORDS, Examined, Words
from rnnq.ranking import Ranked

PANELS = 12  # groups that have a panel of their own
MEAN: Any = {"color": BLUE, "linewidth": 4, "alpha": 0.4}


def mean_curves(found: Examined, points: DataFrame) -> DataFrame:
    """The mean over the finished runs of each group at each step that all of them have logged.

    Columns: group (its place in `found.groups`), step, n, mean, std (n - 1; missing for n = 1), min, max. A finished
    run that has no curve at all is not counted.
    """
    group = Series({run: place for place, ranked in enumerate(found.groups) for run in ranked.runs}, dtype=float)
    placed = points.assign(group=points["run"].map(group)).dropna(subset="group").astype({"group": int})
    members = placed.groupby("group")["run"].nunique()
    means = placed.groupby(["group", "step"])["value"].agg(["count", "mean", "std", "min", "max"]).reset_index()
    means = means.rename(columns={"count": "n"})
    return means[means["n"] == means["group"].map(members)].reset_index(drop=True)


# ------------------------------------------------------------------------------------------------- means of groups


def means_figure(
    found: Examined,
    curves: DataFrame,
    words: Words = NO_WORDS,
    curve_words: Words = NO_WORDS,
    scale: Scale = Scale.auto,
) -> Drawn:
    """The mean curve of each group; the best are named, with a band of one standard deviation over the seeds."""
    stage, metric = found.info.name, metric_of(found, curves)
    points, _ = points_of(curves, metric)
    numbers = mean_curves(found, points)
    if not numbers["group"].duplicated().any():
        text = f"stage {stage}: no group has a curve of {metric['name']} with steps that all its finished runs logged"
        return canvas.note(text), "curves_groups", _mean_numbers(found, numbers)
    numbers, every = thin(numbers, "group")
    means = lines_of(numbers, "group", "mean")

    figure, axes = canvas_of_one()
    beyond = frame_of(axes, metric, list(means.values()), curve_words, scale)
    handles = _draw_means(found, axes, means, numbers, words)
    legend_below(figure, handles)
    runs = numbers["group"].map(dict(enumerate(group.n for group in found.groups)))
    remarks = canvas.remarks((beyond, "group reaches beyond the axis", "groups reach beyond the axis"))
    canvas.heading(
        figure,
        f"{stage}: {metric['name']} while training, means over seeds of {count(len(means), 'group')}, "
        f"n={_from_to(runs)} finished runs each",
        ", ".join([*sampling(len(means)), *thinning(every), *remarks, *canvas.refused(axes, scale)]),
    )
    return figure, "curves_groups", _mean_numbers(found, numbers)


def _draw_means(
    found: Examined, axes: Axes, means: Mapping[int, np.ndarray], numbers: DataFrame, words: Words
) -> list[Artist]:
    """Draw the groups, the best on top; returns what the legend shows."""
    ranked = [place for place in means if found.groups[place].place is not None] or list(means)
    lacking = sorted(set(means) - set(ranked))
    _draw_lacking(axes, [means[place] for place in lacking])
    named, rest = ranked[:BEST], evenly(ranked[BEST:][::-1])
    if rest:
        bar = draw_ranked(axes, [means[place] for place in rest], [place + 1 for place in rest])
        label_bar(bar, [group.mean for group in found.groups], found, words)
    handles: list[Artist] = []
    for i, place in enumerate(named):
        _draw_band(axes, numbers[numbers["group"] == place], MARKS[i].colour)
        handles.append(draw_named(axes, means[place], group_name(found.groups[place]), i, len(named)))
    if lacking:
        text = f"{count(len(lacking), 'group')} that {'lacks' if len(lacking) == 1 else 'lack'} seeds"
        handles.append(Line2D([], [], color=GREY, linewidth=0.7, linestyle="--", label=text))
    band = "band: mean ± std of the runs at a step"
    band += ", not below the lowest" if axes.get_yscale() == "log" else ""
    return [*handles, Patch(color=GREY, alpha=0.3, linewidth=0, label=band)]


def _from_to(sizes: Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return str(low) if low == high else f"{low} to {high}"


def _draw_lacking(axes: Axes, lines: Sequence[np.ndarray]) -> None:
    grey = LineCollection(lines, colors=GREY, linewidths=0.7, alpha=0.6, linestyles="--")
    canvas.rasterize(grey, sum(map(len, lines)))
    axes.add_collection(grey)


def _draw_band(axes: Axes, own: DataFrame, colour: str) -> None:
    """One standard deviation to either side; on a logarithmic axis not below the lowest run, as it may be negative."""
    if own["std"].isna().all():
        return
    low, high = own["mean"] - own["std"], own["mean"] + own["std"]
    if axes.get_yscale() == "log":
        low = np.maximum(low, own["min"])
    axes.fill_between(own["step"], low, high, color=colour, alpha=0.15, linewidth=0, zorder=3)


def group_name(group: Ranked, width: int = LABEL) -> str:
    """ "1. .F.SN.R L2 S256: 1.593 ± 0.016 (mean ± std, n=3)"; a group that lacks seeds has no place."""
    place = f"{group.place}. " if group.place is not None else "– "
    return f"{place}{plain(group.label, width)}: {_mean_of(group)}"


def _mean_of(group: Ranked) -> str:
    n = f"n={group.n}" if group.n == group.of else f"n={group.n} of {group.of}"
    return f"{with_spread(group.mean, group.std)} ({'mean ± std, ' if group.std is not None else ''}{n})"


def _mean_numbers(found: Examined, numbers: DataFrame) -> DataFrame:
    """place, label, run (the first of the group), step, n, mean, std."""
    order = numbers["group"]
    by_place = dict(enumerate(found.groups))
    return DataFrame({
        "place": order.map({i: group.place for i, group in by_place.items()}).astype("Int64"),
        "label": order.map({i: group.label for i, group in by_place.items()}),
        "run": order.map({i: group.runs[0] for i, group in by_place.items()}),
        **{name: numbers[name] for name in ("step", "n", "mean", "std", "min", "max")},
    })  # fmt: skip


# ------------------------------------------------------------------------------------------- all seeds of a group


def seeds_figure(found: Examined, curves: DataFrame, curve_words: Words = NO_WORDS, scale: Scale = Scale.auto) -> Drawn:
    """A panel for each of the best groups: every seed's curve, and their mean."""
    metric = metric_of(found, curves)
    points, _ = points_of(curves, metric)
    members = _members(found, points)
    means = mean_curves(found, members[["run", "step", "value"]])
    if members.empty:
        text = f"stage {found.info.name}: no group with a finished run has recorded a curve of {metric['name']}"
        return canvas.note(text), "curves_seeds", _seed_numbers(found, members, str(metric["name"]))
    members, every = thin(members, "run")
    order = sorted(members["group"].unique())
    rows, columns = canvas.cells(len(order))
    figure = Figure(figsize=(max(6.5, 3.7 * columns), 2.5 * rows + 1.4), layout="constrained")
    grid = canvas.panels(figure, len(order), sharex=True, sharey=True)
    lines = lines_of(members, "run", "value")
    beyond = frame_of(grid[0], metric, list(lines.values()), NO_WORDS, scale)
    for axes, place in zip(grid, order, strict=True):
        own = {run: lines[run] for run in members[members["group"] == place]["run"].unique()}
        _draw_seeds(found, axes, own, means[means["group"] == place])
        axes.set_title(_panel_title(found.groups[place]), fontsize=9)
        axes.set_ylabel("")
    for axes in grid[-columns:]:  # below each column: a common label would lie on the legend
        axes.set_xlabel("optimiser step")
    grid[0].set_xlabel(grid[-1].get_xlabel() if len(grid) <= columns else "")
    canvas.thousands(grid[0], most=4)
    figure.supylabel(with_unit(curve_words.get(metric["name"], metric["name"]), metric["unit"]))
    figure.legend(handles=_seed_handles(found, lines), loc="outside lower center", ncols=3)
    remarks = canvas.remarks((beyond, "run reaches beyond the axis", "runs reach beyond the axis"))
    which = f"the best {len(order)} of {count(len(found.groups), 'group')}"
    which = count(len(order), "group") if len(order) == len(found.groups) else which
    canvas.heading(
        figure,
        f"{found.info.name}: {metric['name']} while training, every seed of {which}",
        ", ".join([*thinning(every), *remarks, *canvas.refused(grid[0], scale)]),
    )
    return figure, "curves_seeds", _seed_numbers(found, members, str(metric["name"]))


def _members(found: Examined, points: DataFrame) -> DataFrame:
    """The points of all runs, finished or not, of the best groups: run, step, value, group."""
    place = {group.key: i for i, group in enumerate(found.groups[:PANELS])}
    of_run = {row["id"]: place[row["group_key"]] for row in found.rows if row["group_key"] in place}
    kept = points[points["run"].isin(of_run)]
    return kept.assign(group=kept["run"].map(of_run))


def _draw_seeds(found: Examined, axes: Axes, lines: Mapping[int, np.ndarray], mean: DataFrame) -> None:
    if len(mean) > 1:  # wide and pale, so that it hides no seed
        axes.plot(mean["step"], mean["mean"], **MEAN)
    for run, line in lines.items():
        done = found.by_id[run]["state"] == "done"
        axes.plot(*line.T, color=DARK if done else GREY, linewidth=0.6, linestyle="-" if done else "--")


def _panel_title(group: Ranked) -> str:
    name = f"{group.place}. {group.label}" if group.place is not None else f"– {group.label}"
    return f"{plain(name, 40)}\n{_mean_of(group)}"


def _seed_handles(found: Examined, lines: Mapping[int, np.ndarray]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=DARK, linewidth=0.8, label="one seed"),
        Line2D([], [], label="mean, where all finished seeds have logged", **MEAN),
    ]
    if any(found.by_id[run]["state"] != "done" for run in lines):
        handles.insert(
            1, Line2D([], [], color=GREY, linewidth=0.8, linestyle="--", label="a seed that has not finished")
        )
    return handles


def _seed_numbers(found: Examined, members: DataFrame, name: str) -> DataFrame:
    groups = dict(enumerate(found.groups))
    order = members["group"] if "group" in members else pd.Series(dtype=int)
    return DataFrame({
        "place": order.map({i: group.place for i, group in groups.items()}).astype("Int64"),
        "label": order.map({i: group.label for i, group in groups.items()}),
        "run": members["run"],
        "seed": members["run"].map({row["id"]: row["seed"] for row in found.rows}),
        "state": members["run"].map({row["id"]: row["state"] for row in found.rows}),
        "step": members["step"],
        name: members["value"],
    })  # fmt: skip
