"""What only this family has to show: plateaus, which modes are learnt when, and what the weights are like.

The loss and the powers are means over the seeds of a group; what is said of single neurons is of its best run.
Reaches no torch; `draw_weights` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from pandas import DataFrame

from rnnq.errors import CheckpointError
from rnnq.families.groups import theory
from rnnq.families.groups.shown import (
    COLOURS,
    DARK,
    GREY,
    REST,
    Group,
    Mode,
    Save,
    Weights,
    grid_of,
    groups_of,
    heading,
    means_of,
    short,
    words_of,
    wrapped,
)

CURVES = ("loss",)
WORDS = {
    "loss": "training loss (MSE per entry)",
    "val_loss": "validation loss (MSE per entry)",
    "val_accuracy": "share of outputs nearest to the right element",
    "test_loss": "test loss (MSE per entry)",
    "test_accuracy": "share of test outputs nearest to the right element",
    "zero_loss": "loss of a net that outputs 0 (MSE per entry)",
    "steps_per_s": "speed",
}
CURVE_WORDS = WORDS
MOST = 6  # groups that have a panel
LEVELS = 12  # predicted plateaus that have a line
APART = 0.055  # of the height of a panel: names of plateaus that are nearer to each other are left out
FLOOR = 1e-3  # of the lowest plateau: what is below is off the axis
SNAPSHOTS = 24  # of a run that are read, more of the early ones
TUPLES = 256  # that a net answers for its power


def drawn(runs: DataFrame) -> list[int]:
    """The runs whose curves are drawn."""
    return [run for group in groups_of(runs, MOST)[0] for run in group.runs]


def draw(runs: DataFrame, curves: DataFrame, save: Save) -> list[Path]:
    """Draw the losses with the plateaus that are predicted for them; returns what `save` wrote.

    runs    as of frame.of_rows, all runs of the stage
    curves  as of frame.curves_frame: CURVES of those that `drawn` names
    """
    groups, remarks = groups_of(runs, MOST)
    kept = curves[np.isfinite(curves["value"]) & (curves["value"] > 0) & (curves["name"] == CURVES[0])]
    groups = [group for group in groups if kept["run"].isin(group.runs).any()]
    if not groups:
        return []
    return _plateaus(groups, kept[kept["step"] > 0], remarks, save)


def draw_weights(runs: DataFrame, weights: Weights, save: Save) -> list[Path]:
    """Draw what the weights say: power by mode, neurons, W_mix, predictions; returns what `save` wrote."""
    from rnnq.families.groups import weight_figures

    groups, remarks = groups_of(runs, MOST)
    groups = [group for group in groups if any(len(weights.steps(run)) for run in group.runs)]
    if not groups:
        return []
    table, lost = powers(groups, weights)
    written = [] if table.empty else _powers(groups, table, [*remarks, *lost], save)
    return written + weight_figures.draw(groups, weights, remarks, save)


# ------------------------------------------------------------------------------------------- losses and plateaus


def _plateaus(groups: Sequence[Group], points: DataFrame, remarks: Sequence[str], save: Save) -> list[Path]:
    figure, grid = grid_of(len(groups), 4.6, 3.6)
    numbers = []
    for axes, group in zip(grid, groups, strict=True):
        own = points[points["run"].isin(group.runs)]
        means = means_of(own, "value")
        _draw_losses(axes, group, own, means)
        numbers += [
            _loss_numbers(group, own),
            means.assign(group=group.name, what="mean"),
            _draw_levels(axes, group),
        ]
    grid[0].set_ylabel("training loss (MSE per entry)")
    figure.legend(handles=_loss_handles(), loc="outside lower center", ncols=4)
    heading(figure, "training loss, and the plateaus that the template's spectrum predicts", remarks)
    columns = ["group", "what", "run", "seed", "step", "value", "n", "mean", "std", "mode"]
    whole = dict.fromkeys(("run", "seed", "step", "n"), "Int64")
    return save(figure, "plateaus", pd.concat(numbers).reindex(columns=columns).astype(whole))


def _draw_losses(axes: Axes, group: Group, points: DataFrame, means: DataFrame) -> None:
    for _, own in points.groupby("run"):
        axes.plot(own["step"], own["value"], color=GREY, linewidth=0.6, alpha=0.8, zorder=2)
    for place, (_, part) in enumerate(means.groupby("n", sort=False)):
        if part["n"].iloc[0] > 1:
            least = points["value"].min()  # a mean less its deviation may be negative, which no logarithm has
            low = (part["mean"] - part["std"]).clip(lower=least)
            axes.fill_between(part["step"], low, part["mean"] + part["std"], color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(part["step"], part["mean"], color=COLOURS[1], linewidth=1.6, zorder=3,
                  linestyle="--" if place else "-", marker="" if len(part) > 1 else "_")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = float(points["step"].min()), float(points["step"].max())
    axes.set_xlim(low, max(high, low * 1.1))
    _log_ticks(axes)
    bottom, top = _range(group, points)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("optimiser step")
    axes.set_title(wrapped(f"{group.name} ({group.counted})"), fontsize=9.5)


def _range(group: Group, points: DataFrame) -> tuple[float, float]:
    """The y axis: around the plateaus, and down to a part of the lowest where a loss gets so far."""
    levels = [level for level in theory.levels(group.data, group.template) if level > 0]
    low = max(float(points["value"].min()), FLOOR * levels[-1])
    return min(low, levels[-1]) / 1.5, max(float(points["value"].quantile(0.99)), levels[0]) * 1.6


def _draw_levels(axes: Axes, group: Group) -> DataFrame:
    """The plateaus as lines, each named by the mode that is learnt when it is reached; what the CSV says of them."""
    rows = []
    each = [theory.plateaus(group.data, template) for template in group.templates]
    same = all(len(found) == len(each[0]) for found in each)
    below: float | None = None
    for i, plateau in enumerate(each[0][:-1][:LEVELS]):
        values = [found[i].level for found in each] if same else [plateau.level]
        mean = float(np.mean(values))
        if max(values) > 1.001 * min(values):
            axes.axhspan(min(values), max(values), color=DARK, alpha=0.08, linewidth=0)
        axes.axhline(mean, color=DARK, linestyle=(0, (4, 2)), linewidth=0.9, zorder=1)
        place = float(axes.transAxes.inverted().transform(axes.transData.transform((1.0, mean)))[1])
        if below is None or below - place > APART:
            text = "nothing learnt" if plateau.mode is None else f"+ {_of_mode(group, plateau.mode)}"
            axes.annotate(f"{text}: {short(mean)}", (1.0, mean), xycoords=("axes fraction", "data"), xytext=(3, 0),
                          textcoords="offset points", fontsize=7, va="center", color=DARK)  # fmt: skip
            below = place
        mode = "" if plateau.mode is None else _of_mode(group, plateau.mode)
        rows.append({"group": group.name, "what": "plateau", "value": mean, "mode": mode})
    return DataFrame(rows)


def _of_mode(group: Group, mode: tuple[int, ...]) -> str:
    return words_of(group.data, theory.modes(group.data).index(mode))


def _loss_handles() -> list[Any]:
    return [
        Line2D([], [], color=COLOURS[1], linewidth=1.6, label="mean ± std over seeds (n)"),
        Line2D([], [], color=GREY, linewidth=0.6, label="one run"),
        Line2D([], [], color=DARK, linestyle=(0, (4, 2)), linewidth=0.9,
               label="predicted plateau, and the mode that is learnt when it is reached"),
    ]  # fmt: skip


def _loss_numbers(group: Group, points: DataFrame) -> DataFrame:
    seeds = dict(zip(group.runs, group.seeds, strict=True))
    same = {"group": group.name, "what": "run"}
    return DataFrame({**same, "run": points["run"], "seed": points["run"].map(seeds), "step": points["step"],
                      "value": points["value"]})  # fmt: skip


def _log_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value >= 1e-4 else f"{value:g}"))


# ------------------------------------------------------------------------------------------------- power by mode


def powers(groups: Sequence[Group], weights: Weights) -> tuple[DataFrame, list[str]]:
    """The power of each mode in what nets answer, over training, and remarks.

    A row for each run, step and mode: group, run, seed, step, mode, power (mean over tuples), template (its power).
    Modes are those of `Group.modes` and, as one, all others but the mean.
    """
    from rnnq.families.groups.weight_figures import answers

    rows: list[dict[str, Any]] = []
    lost = 0
    for group in groups:
        modes = group.modes
        for run, seed, config, template in zip(group.runs, group.seeds, group.configs, group.templates, strict=True):
            own = theory.power(config.data, template)
            for step in thinned(weights.steps(run)):
                try:
                    found = answers(config, weights.at(run, step), TUPLES)[0]
                except CheckpointError:
                    lost += 1
                    continue
                power = theory.mean_output_power(config.data, found)
                same = {"group": group.name, "run": run, "seed": seed, "step": step}
                rows += [{**same, "mode": mode.words, "power": power[mode.place], "template": own[mode.place]}
                         for mode in modes]  # fmt: skip
                rest = [place for place in range(1, len(power)) if place not in {mode.place for mode in modes}]
                rows.append({**same, "mode": REST, "power": power[rest].sum(), "template": own[rest].sum()})
    remarks = [f"{lost} {'file' if lost == 1 else 'files'} of weights cannot be read"] if lost else []
    columns = ["group", "run", "seed", "step", "mode", "power", "template"]
    return DataFrame(rows, columns=columns), remarks


def thinned(steps: Sequence[int], most: int = SNAPSHOTS) -> list[int]:
    """At most so many of the steps, the first and the last among them, and more of the early ones."""
    if len(steps) <= most:
        return list(steps)
    chosen = np.array([0, len(steps) - 1])
    for n in range(most, 20 * most):  # the first places of many coincide
        places = np.unique(np.geomspace(1, len(steps), n).round().astype(int) - 1)
        if len(places) > most:
            break
        chosen = places
    return [steps[place] for place in chosen]


def _powers(groups: Sequence[Group], table: DataFrame, remarks: Sequence[str], save: Save) -> list[Path]:
    shown = [group for group in groups if (table["group"] == group.name).any()]
    figure, grid = grid_of(len(shown), 4.4, 3.9)
    numbers = []
    for axes, group in zip(grid, shown, strict=True):
        own = table[table["group"] == group.name]
        over_time = own.groupby("run")["step"].nunique().max() > 2
        (_draw_over_time if over_time else _draw_spectrum)(axes, group, own)
        axes.set_title(wrapped(f"{group.name} ({group.counted})"), fontsize=9.5)
        numbers += [means_of(part, "power").assign(group=group.name, mode=mode) for mode, part in own.groupby("mode")]
    grid[0].set_ylabel("mean power of the outputs (sum of squares)")
    handles = [
        Line2D([], [], color=DARK, linewidth=1.2, marker="o", markersize=3, label="the net's, mean ± std over seeds"),
        Line2D([], [], color=DARK, linewidth=1.1, linestyle=":", label="the template's: the mode is learnt"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    heading(figure, "power of each mode in what the net answers", remarks)
    both = pd.concat([table.assign(what="run"), pd.concat(numbers).assign(what="mean")])
    columns = ["group", "mode", "what", "run", "seed", "step", "power", "template", "n", "mean", "std"]
    return save(figure, "power", both.reindex(columns=columns).astype({"run": "Int64", "seed": "Int64", "n": "Int64"}))


def _draw_over_time(axes: Axes, group: Group, own: DataFrame) -> None:
    handles = []
    for mode in [*group.modes, Mode(-1, REST, math.nan, GREY, "")]:
        part = own[own["mode"] == mode.words]
        if mode.words == REST and part["power"].max() < 1e-3 * own["template"].sum():
            continue  # nothing to see
        means = means_of(part, "power")
        axes.errorbar(means["step"], means["mean"], yerr=means["std"].fillna(0), color=mode.colour,
                      marker=mode.marker or None, markersize=3, linewidth=1.2, elinewidth=0.7, capsize=1.5,
                      zorder=3)  # fmt: skip
        level = float(part["template"].mean())
        if mode.words != REST:
            axes.axhline(level, color=mode.colour, linestyle=":", linewidth=1.1, zorder=1)
        label = mode.words if mode.words == REST else f"{mode.words}: {short(level)}"
        handles.append(Line2D([], [], color=mode.colour, marker=mode.marker or None, markersize=4, label=label))
    _power_axis(axes, group)
    steps = own["step"][own["step"] > 0]
    axes.set_xscale("symlog", linthresh=float(steps.min()), linscale=0.4)
    axes.set_xlim(0, own["step"].max() * 1.05)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(float(steps.min()), float(steps.max()))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimiser step")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=7.5)


def _ticks(low: float, high: float) -> list[float]:
    """0, and 1, 2 or 5 times a power of ten between the two, not more than can be read."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = (1, 2, 5) if math.log10(high / low) < 1.7 else (1, 3) if math.log10(high / low) < 2.5 else (1,)
    return [0.0, *(factor * 10.0**d for d in decades for factor in within if low <= factor * 10.0**d <= high)]


def _power_axis(axes: Axes, group: Group) -> None:
    """Logarithmic where the template's modes differ by more than a factor of 20."""
    levels = [mode.power for mode in group.modes]
    if max(levels) > 20 * min(levels):
        axes.set_yscale("log")
        axes.set_ylim(min(levels) / 30, max(levels) * 2)
    else:
        axes.set_ylim(-0.03 * max(levels), max(levels) * 1.2)


def _draw_spectrum(axes: Axes, group: Group, own: DataFrame) -> None:
    """Bars: the last weights alone."""
    last = own[own["step"] == own.groupby("run")["step"].transform("max")]
    names = [mode.words for mode in group.modes] + [REST]
    found = last.groupby("mode").agg(mean=("power", "mean"), std=("power", "std"), template=("template", "mean"))
    found = found.reindex(names)
    places = np.arange(len(names))
    colours = [*(mode.colour for mode in group.modes), GREY]
    axes.bar(places, found["mean"], 0.6, yerr=found["std"].fillna(0), color=colours, capsize=3,
             error_kw={"elinewidth": 1}, zorder=2)  # fmt: skip
    axes.hlines(found["template"], places - 0.4, places + 0.4, color=DARK, linestyle=":", linewidth=1.6, zorder=3)
    _power_axis(axes, group)
    axes.set_xticks(places, names, rotation=20 if len(names) > 4 else 0)
    axes.set_xlabel(f"mode, after step {last['step'].max():,}")
    axes.grid(False, axis="x")
