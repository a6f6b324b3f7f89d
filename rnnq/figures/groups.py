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
from matplotlib.patheffects import withStroke
from pandas import DataFrame, Series

from rnnq.figures import canvas
from rnnq.figures.canvas import BLUE, DARK, GREY, MARKS, Scale, count, plain, with_unit
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
from rnnq.spread import Spread, half_width, with_spread

PANELS = 12  # groups that have a panel of their own
FEW = 30  # runs of the named groups; of so many at most, each has a thin line of its own
HALO = [withStroke(linewidth=2, foreground="white")]
MEAN: Any = {"color": BLUE, "linewidth": 4, "alpha": 0.4}


def mean_curves(found: Examined, points: DataFrame) -> DataFrame:
    """The mean over the finished runs of each group, at each step that all of them that got so far have logged.

    A run that ended earlier is not in the means behind its end: no value is made up for it. Columns: group (its place
    in `found.groups`), step, n, of (finished runs that have a curve), mean, std (n - 1; missing for n = 1), half (what
    stands behind ±), min, max.
    """
    group = Series({run: place for place, ranked in enumerate(found.groups) for run in ranked.runs}, dtype=float)
    placed = points.assign(group=points["run"].map(group)).dropna(subset="group").astype({"group": int})
    means = placed.groupby(["group", "step"])["value"].agg(["count", "mean", "std", "min", "max"]).reset_index()
    means = means.rename(columns={"count": "n"})
    means = means.assign(of=means["group"].map(placed.groupby("group")["run"].nunique()))
    kept = means[means["n"] == means["of"] - _ended(placed, means)]
    shared = kept.loc[kept["n"] == kept["of"], "group"].unique()  # without a step of all its runs, a group has no mean
    kept = kept[kept["group"].isin(shared)].reset_index(drop=True)
    factor = {n: half_width(1.0, n, found.spread) for n in kept["n"].unique().tolist()}
    half = kept["std"] * kept["n"].map(factor).astype(float)
    return kept.assign(half=half)[["group", "step", "n", "of", "mean", "std", "half", "min", "max"]]


def _ended(placed: DataFrame, means: DataFrame) -> np.ndarray:
    """How many runs of the group have ended before the step of each mean."""
    last = placed.groupby(["group", "run"])["step"].max().reset_index()
    beyond = int(placed["step"].max() if len(placed) else 0) + 1
    ends = np.sort((last["group"] * beyond + last["step"]).to_numpy())
    first = (means["group"] * beyond).to_numpy()
    return np.asarray(np.searchsorted(ends, first + means["step"].to_numpy()) - np.searchsorted(ends, first))


def _spells(own: DataFrame) -> list[DataFrame]:
    """The means of a group, cut where the number of runs changes: between two such, a line would be a jump."""
    return [part for _, part in own.groupby("n", sort=False)]


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
    handles = _draw_means(found, axes, points, numbers, words)
    legend_below(figure, handles)
    runs = numbers["group"].map(dict(enumerate(group.n for group in found.groups)))
    shorter = int(numbers[numbers["n"] < numbers["of"]]["group"].nunique())
    remarks = canvas.remarks(
        (beyond, "group reaches beyond the axis", "groups reach beyond the axis"),
        (shorter, "group has runs that ended before others", "groups have runs that ended before others"),
    )
    canvas.heading(
        figure,
        f"{stage}: {metric['name']} while training, means over seeds of {count(len(means), 'group')}, "
        f"n={_from_to(runs)} finished runs each",
        ", ".join([*sampling(len(means)), *thinning(every), *remarks, *canvas.refused(axes, scale)]),
    )
    return figure, "curves_groups", _mean_numbers(found, numbers)


def _draw_means(
    found: Examined, axes: Axes, points: DataFrame, numbers: DataFrame, words: Words
) -> list[Artist]:
    """Draw the groups, the best on top; returns what the legend shows."""
    whole = numbers[numbers["n"] == numbers["of"]]
    means = lines_of(whole, "group", "mean") if len(whole) else {}
    places = numbers["group"].unique().tolist()
    ranked = [place for place in places if found.groups[place].place is not None] or places
    lacking = sorted(set(places) - set(ranked))
    _draw_lacking(axes, [means[place] for place in lacking if place in means])
    named, rest = ranked[:BEST], [place for place in evenly(ranked[BEST:][::-1]) if place in means]
    if rest:
        bar = draw_ranked(axes, [means[place] for place in rest], [place + 1 for place in rest])
        label_bar(bar, [group.mean for group in found.groups], found, words)
    thin_ones = _draw_members(found, axes, points, named)
    handles: list[Artist] = [
        _draw_named(found, axes, numbers[numbers["group"] == place], i, len(named)) for i, place in enumerate(named)
    ]
    if lacking:
        text = f"{count(len(lacking), 'group')} that {'lacks' if len(lacking) == 1 else 'lack'} seeds"
        handles.append(Line2D([], [], color=GREY, linewidth=0.7, linestyle="--", label=text))
    return [*handles, *_mean_handles(found, axes, numbers[numbers["group"].isin(named)], thin_ones)]


def _draw_named(found: Examined, axes: Axes, own: DataFrame, place: int, of: int) -> Line2D:
    """The mean of a group and its band; behind the end of a run dashed, with the number of those that go on."""
    colour, group = MARKS[place].colour, found.groups[int(own["group"].iloc[0])]
    first, *later = _spells(own)
    _draw_band(axes, own, colour)
    drawn = draw_named(axes, first[["step", "mean"]].to_numpy(float), group_name(found, group), place, of)
    for part in later:
        marker = MARKS[place].marker if len(part) == 1 else ""
        axes.plot(part["step"], part["mean"], color=colour, linewidth=1.3, linestyle="--", zorder=4, marker=marker)
        _say_n(axes, part, colour)
    return drawn


def _say_n(axes: Axes, part: DataFrame, colour: str) -> None:
    at = (float(part["step"].iloc[0]), float(part["mean"].iloc[0]))
    axes.annotate(f"n={part['n'].iloc[0]}", at, xytext=(0, 5), textcoords="offset points", ha="center",
                  fontsize=7.5, color=colour, zorder=5, path_effects=HALO)  # fmt: skip


def _draw_members(found: Examined, axes: Axes, points: DataFrame, named: Sequence[int]) -> bool:
    """Where they are few, the runs of the named groups as thin lines; returns whether there are any."""
    colours = {run: MARKS[i].colour for i, place in enumerate(named) for run in found.groups[place].runs}
    own = points[points["run"].isin(colours)]
    if not 0 < own["run"].nunique() <= FEW:
        return False
    lines = lines_of(thin(own, "run")[0], "run", "value")
    shades = [colours[run] for run in lines]
    axes.add_collection(LineCollection(list(lines.values()), colors=shades, linewidths=0.5, alpha=0.5, zorder=3.2))
    return True


def _mean_handles(found: Examined, axes: Axes, named: DataFrame, thin_ones: bool) -> list[Artist]:
    band = f"band: mean ± {found.spread.words} of the runs at a step"
    if axes.get_yscale() == "log":
        band += ", not below the lowest"
    handles: list[Artist] = [Patch(color=GREY, alpha=0.3, linewidth=0, label=band)]
    if thin_ones:
        handles.append(Line2D([], [], color=GREY, linewidth=0.5, label="one run"))
    if (named["n"] < named["of"]).any():
        handles.append(Line2D([], [], color=GREY, linewidth=1.3, linestyle="--", label="of the n runs that go on"))
    return handles


def _from_to(sizes: Series) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return str(low) if low == high else f"{low} to {high}"


def _draw_lacking(axes: Axes, lines: Sequence[np.ndarray]) -> None:
    grey = LineCollection(lines, colors=GREY, linewidths=0.7, alpha=0.6, linestyles="--")
    canvas.rasterize(grey, sum(map(len, lines)))
    axes.add_collection(grey)


def _draw_band(axes: Axes, own: DataFrame, colour: str) -> None:
    """The spread to either side; on a logarithmic axis not below the lowest run, as it may be negative."""
    for part in _spells(own):
        if part["half"].isna().all():
            continue
        low, high = part["mean"] - part["half"], part["mean"] + part["half"]
        if axes.get_yscale() == "log":
            low = np.maximum(low, part["min"])
        axes.fill_between(part["step"], low, high, color=colour, alpha=0.15, linewidth=0, zorder=3)


def group_name(found: Examined, group: Ranked, width: int = LABEL) -> str:
    """ "1. .F.SN.R L2 S256: 1.593 ± 0.016 (mean ± std, n=3)"; a group that lacks seeds has no place."""
    place = f"{group.place}. " if group.place is not None else "– "
    return f"{place}{plain(group.label, width)}: {_mean_of(found, group)}"


def _mean_of(found: Examined, group: Ranked) -> str:
    n = f"n={group.n}" if group.n == group.of else f"n={group.n} of {group.of}"
    half, what = found.half(group), "std" if found.spread is Spread.std else "95%"
    return f"{with_spread(group.mean, half)} ({f'mean ± {what}, ' if half is not None else ''}{n})"


def _mean_numbers(found: Examined, numbers: DataFrame) -> DataFrame:
    """place, label, run (the first of the group), step, n, of, mean, std, min, max; t95 where it was asked for."""
    order = numbers["group"]
    by_place = dict(enumerate(found.groups))
    interval = {} if found.spread is Spread.std else {found.spread.value: numbers["half"]}
    return DataFrame({
        "place": order.map({i: group.place for i, group in by_place.items()}).astype("Int64"),
        "label": order.map({i: group.label for i, group in by_place.items()}),
        "run": order.map({i: group.runs[0] for i, group in by_place.items()}),
        **{name: numbers[name] for name in ("step", "n", "of", "mean", "std", "min", "max")},
        **interval,
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
        axes.set_title(_panel_title(found, found.groups[place]), fontsize=9)
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
    for part in _spells(mean):  # wide and pale, so that it hides no seed
        if len(part) > 1:
            axes.plot(part["step"], part["mean"], **MEAN)
        if part["n"].iloc[0] < part["of"].iloc[0]:
            _say_n(axes, part, BLUE)
    for run, line in lines.items():
        done = found.by_id[run]["state"] == "done"
        axes.plot(*line.T, color=DARK if done else GREY, linewidth=0.6, linestyle="-" if done else "--")


def _panel_title(found: Examined, group: Ranked) -> str:
    name = f"{group.place}. {group.label}" if group.place is not None else f"– {group.label}"
    return f"{plain(name, 40)}\n{_mean_of(found, group)}"


def _seed_handles(found: Examined, lines: Mapping[int, np.ndarray]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=DARK, linewidth=0.8, label="one seed"),
        Line2D([], [], label="mean of the finished seeds that got so far", **MEAN),
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
