"""The coordinate check as a figure: how large activations are at the start, and how far training moves them, by width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from pandas import DataFrame

from rnnq.figures import canvas

STEM = "mup_coordinates"
WORDS = {"standard": "standard", "mup": "muP", "seed": "the published study's rule"}
LAYERS = 4  # that have a panel; of more the first and the last ones


def draw(rows: DataFrame, slopes: DataFrame) -> tuple[Figure, str, DataFrame]:
    """A panel for each quantity: a row of them at the start, and one after the last step for each optimiser.

    rows, slopes  as coordinates.Row and coordinates.Slope of one check; returns the figure, its name, its numbers
    """
    last = int(rows["step"].max())
    quantities = _shown(list(rows["quantity"].unique()))
    kinds = [kind for kind in WORDS if kind in set(rows["parametrization"])]
    optimizers = list(rows["optimizer"].unique())
    figure = Figure(figsize=(2.9 * len(quantities) + 0.6, 2.5 * (1 + len(optimizers)) + 1.2), layout="constrained")
    grid = figure.subplots(1 + len(optimizers), len(quantities), squeeze=False, sharex=True)
    marks = dict(zip(WORDS, canvas.MARKS, strict=False))
    for line, (optimizer, step, name) in zip(grid, _lines(optimizers, last), strict=True):
        words = "size at the start" if step == 0 else f"change after {last} steps\nof {optimizer}"
        line[0].set_ylabel(f"{words} (standard deviation)")
        for axes, quantity in zip(line, quantities, strict=True):
            chosen = _of(rows, optimizer, step, quantity)
            found = _of(slopes, optimizer, step, quantity).set_index("parametrization")[name].astype(float)
            _draw_panel(axes, chosen, name, {kind: found[kind] for kind in kinds}, marks)
    for axes, quantity in zip(grid[0], quantities, strict=True):
        axes.set_title("logits (nats)" if quantity == "logits" else f"{quantity} (no unit)")
    for axes in grid[-1]:
        axes.set_xlabel("hidden_size (units)")
    handles = [
        Line2D([], [], color=marks[kind].colour, marker=marks[kind].marker, markersize=5, label=WORDS[kind])
        for kind in kinds
    ]
    seeds = canvas.count(rows["seed"].nunique(), "seed")
    handles.append(Line2D([], [], linestyle="", marker=".", color=canvas.GREY, label=f"one of {seeds}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    canvas.heading(figure, "Coordinate check: what training changes, by width. Numbers: slope of the curve, log-log")
    return figure, STEM, rows[rows["step"].isin([0, last])]


def _lines(optimizers: Sequence[str], last: int) -> Iterator[tuple[str, int, str]]:
    """Optimiser, step and column of each row of panels; the start is the same for all optimisers."""
    yield optimizers[0], 0, "std"
    yield from ((optimizer, last, "change_std") for optimizer in optimizers)


def _shown(quantities: Sequence[str]) -> list[str]:
    layers = [name for name in quantities if name.startswith("layer")]
    half = LAYERS // 2
    left_out = layers[half:-half] if len(layers) > LAYERS else []
    return [name for name in quantities if name not in left_out]


def _of(numbers: DataFrame, optimizer: str, step: int, quantity: str) -> DataFrame:
    return numbers[
        (numbers["optimizer"] == optimizer) & (numbers["step"] == step) & (numbers["quantity"] == quantity)
    ]


def _draw_panel(
    axes: Axes, rows: DataFrame, name: str, slopes: Mapping[str, float], marks: Mapping[str, canvas.Mark]
) -> None:
    axes.set_xscale("log")
    positive = rows[np.isfinite(rows[name]) & (rows[name] > 0)]
    handles = []
    for kind, slope in slopes.items():
        own = positive[positive["parametrization"] == kind]
        mark, label = marks[kind], "0 or not finite" if np.isnan(slope) else f"{round(slope, 2) + 0.0:+.2f}"
        axes.scatter(own["width"], own[name], s=6, color=mark.colour, alpha=0.45, linewidth=0)
        mean = own.groupby("width")[name].mean()
        drawn = axes.plot(mean.index, mean, color=mark.colour, marker=mark.marker, markersize=4.5, linewidth=1.2)
        drawn[0].set_label(label)
        handles += drawn
    if len(positive):
        axes.set_yscale("log")
        low, high = np.log10(positive[name].min()), np.log10(positive[name].max())
        middle, half = (low + high) / 2, max(0.5, 0.6 * (high - low))  # a decade at least: what is flat looks flat
        axes.set_ylim(10 ** (middle - half), 10 ** (middle + half))
        canvas.log_ticks(axes.yaxis, 2 * half)
    widths = sorted(rows["width"].unique())
    axes.xaxis.set_major_locator(FixedLocator([float(width) for width in widths]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.legend(handles=handles, fontsize=7, loc="best", handlelength=1.5)
