"""Curves: one of every run; of groups, the mean and spread over seeds; of each of the best groups, all its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from pandas import DataFrame, Series

from rnnq.figures import canvas
from rnnq.figures.canvas import GREY, MARKS, Scale, count, plain, with_unit
from rnnq.figures.subject import NO_WORDS, Examined, Row, Words
from rnnq.spread import number

BEST = 5  # runs or groups that the legend names
NAMED = 10  # up to so many curves of runs, all are named
POINTS = 1000  # of a curve that are drawn; a longer one is thinned
TOTAL = 250_000  # points of a figure; many curves are thinned more, but never below FEWEST
FEWEST = 20
MOST = 2000  # thin lines of a figure; of more, so many are drawn, evenly by rank
PANELS = 12  # groups that have a panel of their own
LABEL = 60  # characters of a label in a legend

Drawn = tuple[Figure, str, DataFrame]  # a figure, its name, and its numbers


# ---------------------------------------------------------------------------------------------- what there is to draw


def metric_of(found: Examined, curves: DataFrame) -> Row:
    """The metric that runs are ranked by, where it has curves; else the primary one."""
    is_curve = curves.loc[curves["name"] == found.name, "run"].duplicated().any()  # a single point is none
    return found.metric if is_curve else found.info.metric(found.info.primary)


def points_of(curves: DataFrame, metric: Row) -> tuple[DataFrame, int]:
    """The finite points of a metric: run, step, value; and how many are not finite."""
    own = curves[curves["name"] == metric["name"]][["run", "step", "value"]]
    kept = own[np.isfinite(own["value"])]
    return kept, len(own) - len(kept)


def thin(points: DataFrame, by: str) -> tuple[DataFrame, int]:
    """Every n-th point of each curve and its last one, so that none has many more than can be told apart."""
    position = points.groupby(by).cumcount()
    most = min(POINTS, max(FEWEST, TOTAL // max(1, points[by].nunique())))
    every = math.ceil((int(position.max()) + 1) / most)
    if every == 1:
        return points, 1
    last = ~points[by].duplicated(keep="last")
    return points[(position % every == 0) | last], every


def lines_of(points: DataFrame, by: str, value: str) -> dict[int, np.ndarray]:
    """Each curve as an array of (step, value). The points of a curve stand together."""
    keys = points[by].to_numpy()
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    parts = np.split(points[["step", value]].to_numpy(float), starts[1:])
    return dict(zip(keys[starts].tolist(), parts, strict=True))


def sampling(n: int) -> list[str]:
    """The remark that not all of n curves are drawn."""
    return [f"{MOST:,} of the curves are drawn, evenly by rank"] if n > MOST + NAMED else []


def thinning(every: int) -> list[str]:
    """The remark that not all points are drawn."""
    return [f"1 of {every} logged points"] if every > 1 else []


# ------------------------------------------------------------------------------------------------------- every run


def curves_figure(
    found: Examined,
    curves: DataFrame,
    words: Words = NO_WORDS,
    curve_words: Words = NO_WORDS,
    scale: Scale = Scale.auto,
) -> Drawn:
    """Every run's curve; the best are named, the others coloured by their rank, those without one grey."""
    stage, total = found.info.name, len(found.rows)
    metric = metric_of(found, curves)
    points, dropped = points_of(curves, metric)
    if not points["run"].duplicated().any():  # a single point is no curve
        text = f"stage {stage}: none of its {count(total, 'run')} has recorded a curve of {metric['name']} yet"
        return canvas.note(text), "curves", DataFrame(columns=["run", "label", "rank", "step", metric["name"]])
    points, every = thin(points, "run")
    lines = lines_of(points, "run", "value")

    figure, axes = canvas_of_one()
    handles = _draw_runs(found, axes, lines, words)
    beyond = frame_of(axes, metric, list(lines.values()), curve_words, scale)
    legend_below(figure, handles)
    remarks = canvas.remarks(
        (dropped, "point that is not finite left out", "points that are not finite left out"),
        (beyond, "run reaches beyond the axis", "runs reach beyond the axis"),
    )
    canvas.heading(
        figure,
        f"{stage}: {metric['name']} while training, {canvas.part(len(lines), total, 'run')}",
        ", ".join([*sampling(len(lines)), *thinning(every), *remarks, *canvas.refused(axes, scale)]),
    )
    return figure, "curves", _run_numbers(found, points, str(metric["name"]))


def canvas_of_one() -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    return figure, figure.subplots()


def frame_of(axes: Axes, metric: Row, lines: Sequence[np.ndarray], words: Words, scale: Scale) -> int:
    """Axes that fit the curves, and what they are called; returns how many curves reach beyond them."""
    beyond = canvas.fit(axes, metric, [line[:, 1].min() for line in lines], [line[:, 1].max() for line in lines], scale)
    axes.set_xlim(0, max(line[:, 0].max() for line in lines))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(with_unit(words.get(metric["name"], metric["name"]), metric["unit"]))
    canvas.thousands(axes)
    return beyond


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend in two columns, or in one where names are long."""
    columns = 1 if canvas.is_wide([str(handle.get_label()) for handle in handles]) else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _draw_runs(found: Examined, axes: Axes, lines: Mapping[int, np.ndarray], words: Words) -> list[Line2D]:
    """Draw curves, the best on top; returns what the legend shows."""
    order = sorted((run for run in lines if run in found.places), key=lambda run: found.places[run])
    named = order if len(order) <= NAMED else order[:BEST]
    unranked = [run for run in lines if run not in found.places]
    behind = [lines[run] for run in evenly(unranked)]
    grey = LineCollection(behind, colors=GREY, linewidths=0.7, alpha=0.6, linestyles="--")
    canvas.rasterize(grey, sum(map(len, behind)))
    axes.add_collection(grey)
    rest = evenly(order[len(named) :][::-1])
    if rest:
        bar = draw_ranked(axes, [lines[run] for run in rest], [found.places[run] for run in rest])
        label_bar(bar, [found.value(row) for row in found.ranked], found, words)
    handles = []
    for place, run in reversed(list(enumerate(named))):
        label = f"{found.places[run]}. {_name(found, found.by_id[run])}: {number(found.value(found.by_id[run]))}"
        handles.append(draw_named(axes, lines[run], label, place, len(named)))
    if unranked:
        text = f"{count(len(unranked), 'run')} without a rank: not finished, or no finite {found.name}"
        handles.insert(0, Line2D([], [], color=GREY, linewidth=0.7, linestyle="--", label=plain(text)))
    return handles[::-1]


def evenly(runs: Sequence[int]) -> list[int]:
    """All of them, or of too many to be told apart MOST, from the first to the last."""
    return [runs[at] for at in np.linspace(0, len(runs) - 1, MOST).round().astype(int)] if len(runs) > MOST else [*runs]


def draw_named(axes: Axes, line: np.ndarray, label: str, place: int, of: int) -> Line2D:
    """One of several curves that stand out: from those below by a white rim, from each other by colour and markers."""
    mark = MARKS[place]
    axes.plot(*line.T, color="white", linewidth=2.6, zorder=3.5)  # the rims of all lie below the curves of all
    [drawn] = axes.plot(
        *line.T,
        color=mark.colour,
        linewidth=1.3,
        zorder=4,
        marker=mark.marker,
        markersize=5,
        markevery=canvas.every(len(line), place, of),
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
    )
    return drawn


def draw_ranked(axes: Axes, lines: Sequence[np.ndarray], places: Sequence[int]) -> Colorbar:
    """Thin lines coloured by rank, with a bar that says which rank a colour is."""
    many = len(lines) > 1000
    collection = LineCollection(
        lines, array=np.array(places), cmap="viridis", linewidths=0.4 if many else 0.7, alpha=0.4 if many else 0.55
    )
    collection.set_clim(1, max(places))
    canvas.rasterize(collection, sum(map(len, lines)))
    axes.add_collection(collection)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure.colorbar(collection, ax=axes, pad=0.01, aspect=35)


def label_bar(bar: Colorbar, values: Sequence[float | None], found: Examined, words: Words) -> None:
    """Ticks with the rank and the value that has it."""
    total = round(bar.mappable.get_clim()[1])
    ticks = sorted({round(1 + share * (total - 1)) for share in (0, 0.25, 0.5, 0.75, 1)})
    bar.solids.set_alpha(1)  # type: ignore[union-attr]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.set_yticklabels([f"{tick:,}: {number(values[tick - 1])}" for tick in ticks])
    if found.metric["better"] == "max":
        bar.ax.invert_yaxis()
    bar.set_label("rank by " + with_unit(words.get(found.name, found.name), found.metric["unit"]))


def _name(found: Examined, row: Row) -> str:
    seed = f", seed {row['seed']}" if found.frame["seed"].nunique() > 1 else ""
    return plain(row["label"], LABEL) + f" (run {row['id']}{seed})"


def _run_numbers(found: Examined, points: DataFrame, name: str) -> DataFrame:
    labels = Series({row["id"]: row["label"] for row in found.rows}, dtype="category")  # written in half the time
    numbers = DataFrame({"run": points["run"], "label": points["run"].map(labels)})
    numbers["rank"] = points["run"].map(found.places).astype("Int64")
    return numbers.assign(step=points["step"], **{name: points["value"]})
