"""What each group came to: its mean with an error bar, and every run of it as a dot."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from pandas import DataFrame

from rnnq.figures import canvas
from rnnq.figures.canvas import BLUE, DARK, GREY, Scale, count, plain, with_unit
from rnnq.figures.curves import Drawn
from rnnq.figures.subject import NO_WORDS, Examined, Words
from rnnq.ranking import Ranked
from rnnq.spread import Spread

MOST = 30  # groups
LABEL = 46  # characters of a label beside the axis
COLUMNS = ["place", "label", "run", "value", "n", "of", "mean", "std"]


def bars_figure(found: Examined, words: Words = NO_WORDS, scale: Scale = Scale.auto) -> Drawn:
    """A row for each of the best groups, the best on top; those that lack seeds are last, and pale."""
    shown = found.groups[:MOST]
    if not shown:
        text = f"stage {found.info.name}: no group has a finished run with {found.name}"
        return canvas.note(text), "groups", DataFrame(columns=COLUMNS)
    figure = Figure(figsize=(9, 1.7 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    beyond = _frame(axes, found, shown, scale)
    for row, group in enumerate(shown):
        _draw(axes, row, group, found)
    axes.set_yticks(range(len(shown)), [_name(group) for group in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(with_unit(words.get(found.name, found.name), found.metric["unit"]))
    _say_numbers(axes, shown, found)
    figure.legend(handles=_handles(axes, found, shown), loc="outside lower center", ncols=3)
    which = count(len(shown), "group") if len(shown) == len(found.groups) else (
        f"the best {len(shown)} of {count(len(found.groups), 'group')}"
    )  # fmt: skip
    remarks = canvas.remarks((beyond, "run lies beyond the axis", "runs lie beyond the axis"))
    zero = [] if _from_zero(axes) or axes.get_xscale() == "log" else ["the axis does not begin at zero"]
    refused = ["the axis is linear: not all values are positive"]
    refused = refused if scale is Scale.log and axes.get_xscale() != "log" else []
    canvas.heading(
        figure,
        f"{found.info.name}: {found.name} of {which}, mean ± {found.spread.words} over seeds (n)",
        ", ".join([*remarks, *zero, *refused]),
    )
    return figure, "groups", _numbers(found, shown)


def _frame(axes: Axes, found: Examined, shown: list[Ranked], scale: Scale) -> int:
    """An x axis around all runs and error bars; from zero on where that hides no difference."""
    values = [value for group in shown for value in group.values]
    ends = [end for group in shown for end in _ends(found, group)]
    # canvas knows how a metric is divided, and has the y axis for it: borrowed, and turned
    beyond = canvas.fit(axes, found.metric, values, values, scale)
    logarithmic, (low, high) = axes.get_yscale() == "log", axes.get_ylim()
    axes.set_yscale("linear")
    if not logarithmic:
        near = [end for end in ends if low - (high - low) <= end <= high + (high - low)]
        pad = 0.03 * (high - low)
        low, high = min([low, *(end - pad for end in near)]), max([high, *(end + pad for end in near)])
        low = 0.0 if 0 <= min(values) < 0.5 * max(values) else low
    axes.set_xlim(low, high)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        canvas.log_ticks(axes.xaxis, np.log10(high / low))
    return beyond


def _ends(found: Examined, group: Ranked) -> tuple[float, float]:
    half = found.half(group) or 0.0
    return group.mean - half, group.mean + half


def _from_zero(axes: Axes) -> bool:
    """Whether the lengths of bars can be compared."""
    return axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0


def _draw(axes: Axes, row: int, group: Ranked, found: Examined) -> None:
    colour = BLUE if group.place is not None else GREY
    if _from_zero(axes):
        axes.barh(row, group.mean, height=0.66, color=colour, alpha=0.3, linewidth=0)
    low, high = _ends(found, group)
    if axes.get_xscale() == "log":  # mean - std may be negative there
        low = max(low, min(group.values))
    if high > low:
        axes.errorbar(group.mean, row, xerr=[[group.mean - low], [high - group.mean]], fmt="none", ecolor=DARK,
                      elinewidth=1.2, capsize=3, zorder=3)  # fmt: skip
    spots = row + np.linspace(-0.2, 0.2, len(group.values)) if len(group.values) > 1 else np.array([row])
    axes.scatter(group.values, spots, s=12, color=colour, alpha=0.8, linewidths=0, zorder=4)
    axes.plot(group.mean, row, marker="D", markersize=5, markerfacecolor="white", markeredgecolor=DARK, zorder=5)


def _name(group: Ranked) -> str:
    place = f"{group.place}. " if group.place is not None else "– "
    return place + plain(group.label, LABEL)


def _say_numbers(axes: Axes, shown: list[Ranked], found: Examined) -> None:
    """The same as numbers, at the right side."""
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(shown)), [found.counted(group) for group in shown])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)


def _handles(axes: Axes, found: Examined, shown: list[Ranked]) -> list[Line2D | Patch]:
    mean = Line2D([], [], color=DARK, linewidth=1.2, marker="D", markersize=5, markerfacecolor="white",
                  label=f"mean ± {found.spread.words}")  # fmt: skip
    handles: list[Line2D | Patch] = [
        Line2D([], [], linestyle="", marker="o", markersize=4, color=BLUE, label="one run"), mean
    ]  # fmt: skip
    if any(group.place is None for group in shown):
        handles.append(Patch(color=GREY, alpha=0.6, linewidth=0, label="lacks seeds, and so is not ranked"))
    return handles


def _numbers(found: Examined, shown: list[Ranked]) -> DataFrame:
    """A row for each run: place, label, run, value; n, of, mean and std of its group, t95 where it was asked for."""
    interval = [] if found.spread is Spread.std else [found.spread.value]
    return DataFrame([
        {"place": group.place, "label": group.label, "run": run, "value": value, "n": group.n, "of": group.of,
         "mean": group.mean, "std": group.std, **{name: found.half(group) for name in interval}}
        for group in shown for run, value in zip(group.runs, group.values, strict=True)
    ], columns=[*COLUMNS, *interval]).astype({"place": "Int64"})  # fmt: skip
