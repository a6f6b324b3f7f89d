"""What a good run costs: the metric against parameters and against training time, and the runs that none beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from pandas import DataFrame

from rnnq import frame, spread
from rnnq.figures import canvas
from rnnq.figures.canvas import BLUE, DARK, GREY, RED, Scale, plain, with_unit
from rnnq.figures.subject import NO_WORDS, Examined, Words

NAMED = 12  # of the front that the legend names
APART = (0.035, 0.03)  # of a panel: numbers that are nearer would lie on each other
LABEL = 34  # characters of a label there
COLUMNS = ["cost", "group", "run", "label", "n", "value", "metric", "std", "front"]

Drawn = tuple[Figure, str, DataFrame]


@dataclass(frozen=True)
class Cost:
    """One thing that a run costs."""

    name: str
    words: str  # of the axis
    form: str  # of a value: "{:,.0f} parameters"
    values: Mapping[int, float]  # by run


def costs_of(found: Examined, seconds: Mapping[int, float]) -> list[Cost]:
    """Parameters, where runs have a metric of this name, and seconds of training over all attempts."""
    column = frame.column(found.info, "parameters")
    counted = found.frame.set_index("id")[column].dropna() if column in found.frame else None
    made = [Cost("seconds", "training time over all attempts (s)", "{:,.4g} s", seconds)]
    if counted is not None and len(counted):
        made.insert(0, Cost("parameters", "parameters", "{:,.0f} parameters", counted.to_dict()))
    return made


def cost_figure(
    found: Examined, seconds: Mapping[int, float], words: Words = NO_WORDS, scale: Scale = Scale.auto
) -> Drawn:
    """A panel for each cost: every finished run, or the mean of each group, and the Pareto front of these.

    seconds  of training by run, over all its attempts
    """
    rows = found.shown(filtered=False)
    tables = [(cost, _table(found, rows, cost)) for cost in costs_of(found, seconds)]
    tables = [(cost, table) for cost, table in tables if len(table)]
    if not tables:
        text = f"stage {found.info.name}: no finished run has both a finite {found.name} and a cost to set it against"
        return canvas.note(text), "cost", DataFrame(columns=COLUMNS)
    figure = Figure(figsize=(5.6 * len(tables) + 0.4, 6.6), layout="constrained")
    panels = canvas.panels(figure, len(tables), sharey=True)
    values = rows["metric"]
    beyond = canvas.fit(panels[0], found.metric, values, values, scale)
    _make_room(panels[0], found)
    for axes, (cost, table) in zip(panels, tables, strict=True):
        _draw(axes, cost, table, found)
    panels[0].set_ylabel(with_unit(words.get(found.name, found.name), found.metric["unit"]))
    canvas.heading(figure, *_lines(found, rows, tables, beyond), *canvas.refused(panels[0], scale))
    return figure, "cost", pd.concat([table for _, table in tables])[COLUMNS]


def _make_room(axes: Axes, found: Examined) -> None:
    """Space for the numbers of the front, which stand beyond its points."""
    low, high = axes.transScale.transform([(1, y) for y in axes.get_ylim()])[:, 1]
    room = 0.04 * (high - low)
    ends = (low - room, high) if found.metric["better"] == "min" else (low, high + room)
    axes.set_ylim(*axes.transScale.inverted().transform([(1, y) for y in ends])[:, 1])


def _lines(found: Examined, rows: DataFrame, tables: list[tuple[Cost, DataFrame]], beyond: int) -> list[str]:
    of = "groups (means over seeds)" if found.has_seeds else "runs"
    without = [(len(rows) - int(table["n"].sum()), cost.name) for cost, table in tables]
    lacking = [f"{n:,} without {name}" for n, name in without if n]
    also = canvas.remarks((beyond, "run lies beyond the axis", "runs lie beyond the axis"))
    return [
        f"{found.info.name}: {found.name} against its cost, {canvas.part(len(rows), len(found.rows), 'run')}; on the "
        f"front: {of} that no other beats at its cost or less",
        ", ".join([*lacking, *also]),
    ]


def _table(found: Examined, rows: DataFrame, cost: Cost) -> DataFrame:
    """A row for each group, or each run where none has seeds: its mean cost and metric, and whether it is in front.

    A cost of zero has no place on a logarithmic axis and is left out.
    """
    paid = rows.assign(value=rows.index.map(cost.values).astype(float), run=rows.index)
    paid = paid[paid["value"] > 0]
    by_group = paid.groupby("group_key" if found.has_seeds else "run", sort=False)
    table = by_group.agg(
        run=("run", "first"),
        label=("label", "first"),
        n=("run", "size"),
        value=("value", "mean"),
        metric=("metric", "mean"),
        std=("metric", "std"),
    ).reset_index(drop=True)
    lowest = found.metric["better"] == "min"
    return table.assign(cost=cost.name, group=range(1, len(table) + 1), front=front(table, lowest)).astype(
        {"front": bool}
    )


def front(table: DataFrame, lowest: bool) -> np.ndarray:
    """Which rows no other beats: none that costs less, or as little, is as good; equals go to the first."""
    ordered = table.assign(metric=table["metric"] * (1 if lowest else -1)).sort_values(["value", "metric"])
    before = ordered["metric"].cummin().shift(fill_value=np.inf)
    ahead: np.ndarray = (ordered["metric"] < before).reindex(table.index).to_numpy()
    return ahead


def _draw(axes: Axes, cost: Cost, table: DataFrame, found: Examined) -> None:
    n = len(table)
    size = canvas.dot_area(n)
    dots = axes.scatter(table["value"], table["metric"], s=size, color=BLUE, alpha=0.5, linewidths=0)
    canvas.rasterize(dots, n)
    if found.has_seeds and n <= 200:
        axes.errorbar(
            table["value"], table["metric"], yerr=table["std"], fmt="none", ecolor=GREY, elinewidth=0.7, zorder=1
        )
    best = table[table["front"]].sort_values("value")
    axes.step(best["value"], best["metric"], where="post", color=RED, linewidth=1, zorder=3)
    axes.scatter(best["value"], best["metric"], s=40, marker="D", facecolors="white", edgecolors=RED, lw=1.3, zorder=4)
    canvas.log_x(axes, table["value"].tolist())
    axes.set_xlabel(cost.words)
    named = _apart(axes, best)
    side = -11 if found.metric["better"] == "min" else 11
    for number, (_, row) in enumerate(named.iterrows(), start=1):
        axes.annotate(str(number), (row["value"], row["metric"]), xytext=(0, side), textcoords="offset points",
                      ha="center", va="center", fontsize=7.5, color=DARK, zorder=5,
                      path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
    _name_front(axes, cost, best, named, found)


def _apart(axes: Axes, best: DataFrame) -> DataFrame:
    """Of the front, from its best end, those whose numbers would not lie on each other; NAMED at most."""
    at = axes.transScale.transform(best[["value", "metric"]].to_numpy(float))
    low, high = axes.transScale.transform(np.transpose([axes.get_xlim(), axes.get_ylim()]))
    places = (at - low) / (high - low)  # of the panel's width and height
    kept: list[int] = []
    for i in reversed(range(len(best))):
        if all((np.abs(places[i] - places[j]) > APART).any() for j in kept) and len(kept) < NAMED:
            kept.append(i)
    return best.iloc[sorted(kept)]


def _name_front(axes: Axes, cost: Cost, best: DataFrame, named: DataFrame, found: Examined) -> None:
    what = "group: mean ± std" if found.has_seeds else "run"
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=4, color=BLUE, alpha=0.6, label=f"one {what}"),
        Line2D([], [], color=RED, linewidth=1, marker="D", markerfacecolor="white",
               label=f"Pareto front (n={len(best)}{'' if len(best) == len(named) else f', {len(named)} named'})"),
    ]  # fmt: skip
    for number, (_, row) in enumerate(named.iterrows(), start=1):
        who = f"run {row['run']}" if row["n"] == 1 else f"n={row['n']}"
        numbers = f"{spread.number(row['metric'])}, {cost.form.format(row['value'])}"
        text = f"{number}  {plain(row['label'], LABEL)} ({who}): {numbers}"
        handles.append(Line2D([], [], linestyle="", label=text))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), fontsize=7.5, handlelength=1.6)
