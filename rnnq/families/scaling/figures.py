"""What only this family has to show: which learning rate is best at which width, and what compute buys.

What is drawn is of finished runs; means are over seeds, and groups of which a run is missing are hollow. Reaches no
torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pandas import DataFrame

from rnnq.families.scaling import findings as found_in
from rnnq.families.scaling import laws
from rnnq.families.scaling.findings import COSTS, Fit, Sweep
from rnnq.families.scaling.laws import Parametric
from rnnq.families.scaling.shown import (
    COLOURS,
    DARK,
    DASHES,
    GREY,
    MARKERS,
    Save,
    Shown,
    colours_of,
    diverged,
    flop_axis,
    grid_of,
    heading,
    key_of,
    log_axis,
    log_losses,
    plain,
    read,
    short,
)

CURVES = ("val_loss", "val_loss_per_byte", "loss")
WORDS = {
    "loss": "training loss",
    "val_loss": "validation loss",
    "val_loss_per_byte": "validation loss",
    "val_ppl": "validation perplexity",
    "test_loss": "test loss",
    "tokens": "training tokens read",
    "flops": "compute of training, read-out included",
    "flops_lstm": "compute of training, without the read-out",
    "steps_per_s": "speed",
}
CURVE_WORDS = WORDS
COST_WORDS = {"flops": "training compute C (FLOP)", "flops_lstm": "training compute without the read-out (FLOP)"}
PANELS = 12  # of the figure of training
DENSE = 3000  # points of thin lines; more become an image inside an SVG

Drawn = tuple[Figure, str, DataFrame] | None


def drawn(runs: DataFrame) -> list[int]:
    """The runs whose curves are drawn: all that have begun."""
    return [int(run) for run in runs.loc[runs["state"].isin(["done", "failed", "running"]), "id"]]


def findings(runs: DataFrame) -> list[str]:
    """What there is to say of the runs of a stage, as of frame.of_rows, a line each."""
    return found_in.sentences(read(runs))


def draw(runs: DataFrame, curves: DataFrame, save: Save) -> list[Path]:
    """Draw the figures of a stage; returns what `save` wrote.

    runs    as of frame.of_rows, all runs of the stage
    curves  as of frame.curves_frame: CURVES of those that `drawn` names
    """
    shown = read(runs)
    made: list[Drawn] = [_training(shown, curves)]
    if not shown.cells.empty:
        swept, fits = found_in.sweeps(shown), found_in.fits(shown)
        made += [_rates(shown, swept), _optima(shown, swept), _compute(shown, curves, fits), _laws(shown, fits)]
        made += [_parametric(shown), _widths(shown)]
    return [path for figure in made if figure is not None for path in save(*figure)]


def _marks(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _counted(n: int, of: int) -> str:
    return f"n={n}" if n == of else f"n={n} of {of}"


def _runs(n: int, of: int) -> str:
    return f"{n:,} of {of:,} runs" if n < of else f"{n:,} run{'' if n == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------ learning rates


def _rates(shown: Shown, swept: list[Sweep]) -> Drawn:
    """Loss against learning rate: a panel for each kind, a curve for each width."""
    if not swept:
        return None
    figure, grid = grid_of(len(swept), 5.0, 4.4, sharey=True)
    cells = shown.cells[shown.cells["kind"].isin([one.kind for one in swept])]
    colours = colours_of(cells["width"].tolist())
    for axes, one in zip(grid, swept, strict=True):
        own = shown.of(one.kind)
        for width, cells_of in own.groupby("width"):
            _draw_sweep(axes, cells_of, colours[float(str(width))])
        for (width, best), interval in zip(one.optima, one.intervals, strict=True):
            _draw_optimum(axes, own[own["width"] == width], best, interval, colours[width])
        out = _draw_diverged(axes, shown, one.kind, colours)
        log_axis(axes.xaxis, [*own["rate"], *out])
        axes.tick_params(axis="x", labelrotation=30 if own["rate"].nunique() > 6 else 0)
        axes.set_xlabel("learning rate")
        axes.set_title("\n".join([plain(one.kind), one.short]), fontsize=9)
    grid[0].set_ylabel(shown.words)
    handles = [
        Line2D([], [], color=DARK, marker="o", linewidth=1, markersize=4, label="mean ± std over seeds"),
        Line2D([], [], color=DARK, marker="o", linewidth=0, markersize=4, markerfacecolor="white",
               label="a run is missing: not in the optimum"),
        Line2D([], [], color=DARK, marker="*", linewidth=0, markersize=9, label="best rate: parabola, 95% over seeds"),
        Line2D([], [], color=DARK, marker="x", linewidth=0, markersize=6, label="best rate: lowest of the sweep"),
        Line2D([], [], color=DARK, marker="v", linewidth=0, markersize=5, markerfacecolor="none", label="diverged"),
    ]  # fmt: skip
    columns = 2 + min(2, len(swept))
    figure.legend(handles=[*key_of(colours, "width"), *handles], loc="outside lower center", ncols=columns, fontsize=8)
    seeds = f"{cells['of'].min()}" if cells["of"].nunique() == 1 else f"{cells['of'].min()} to {cells['of'].max()}"
    heading(figure, f"final validation loss by learning rate and width, {seeds} seeds each, "
            f"{_runs(int(cells['n'].sum()), len(shown.every))}", _remarks(shown))  # fmt: skip
    numbers = cells[["kind", "width", "rate", "run", "n", "of", "diverged", "mean", "std", "tokens"]]
    return figure, "learning_rate", numbers


def _remarks(shown: Shown) -> str:
    return "; ".join(shown.remarks)


def _draw_sweep(axes: Axes, cells: DataFrame, colour: Any) -> None:
    axes.errorbar(cells["rate"], cells["mean"], yerr=cells["std"].fillna(0), color=colour, linewidth=1.2,
                  elinewidth=0.9, capsize=2, zorder=3)  # fmt: skip
    whole = cells["n"] == cells["of"]
    axes.plot(cells["rate"][whole], cells["mean"][whole], "o", color=colour, markersize=4, zorder=4)
    axes.plot(cells["rate"][~whole], cells["mean"][~whole], "o", color=colour, markersize=4.5, markerfacecolor="white",
              zorder=4)  # fmt: skip
    for _, row in cells[~whole].iterrows():
        axes.annotate(f"{row['n']} of {row['of']}", (row["rate"], row["mean"]), xytext=(4, 3), fontsize=6.5,
                      textcoords="offset points", color=colour)  # fmt: skip


def _draw_diverged(axes: Axes, shown: Shown, kind: str, colours: Mapping[float, Any]) -> list[float]:
    """A mark at the upper end of the axis for each width and rate of which a run diverged; returns these rates."""
    out = diverged(shown.every[shown.every["kind"] == kind])
    places = out[["width", "rate"]].drop_duplicates().sort_values("width")
    for number, (_, row) in enumerate(places.iterrows()):
        level = 0.985 - 0.025 * (number % 6)  # those of several widths at one rate must not lie on each other
        axes.plot([row["rate"]], [level], "v", transform=axes.get_xaxis_transform(), markersize=5,
                  markerfacecolor="none", color=colours.get(row["width"], DARK), zorder=4)  # fmt: skip
    return list(places["rate"])


def _draw_optimum(axes: Axes, cells: DataFrame, best: Any, interval: tuple[float, float] | None, colour: Any) -> None:
    """A star at the best rate, a little below the lowest mean, with the interval of the rate."""
    own = cells[cells["n"] == cells["of"]]
    if own.empty:
        return
    level = float(own["mean"].min())
    if interval is not None:
        axes.plot(interval, (level, level), color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt", zorder=2)
    style: Any = {"marker": "*", "markersize": 12} if best.is_parabola else {"marker": "x", "markersize": 8}
    rim = {"markeredgecolor": "black", "markeredgewidth": 0.6} if best.is_parabola else {"markeredgewidth": 1.8}
    axes.plot([best.rate], [level], color=colour, zorder=5, **style, **rim)


def _optima(shown: Shown, swept: list[Sweep]) -> Drawn:
    """The best rate against width, with the line through them."""
    shown_kinds = [one for one in swept if len(one.optima) > 1]
    if not shown_kinds:
        return None
    figure, [axes] = grid_of(1, 5.2, 4.6)
    places, handles = _marks(shown.kinds), []
    widths = sorted({width for one in shown_kinds for width, _ in one.optima})
    rates = []
    for one in shown_kinds:
        at = places[one.kind]
        colour, marker = COLOURS[at], MARKERS[at]
        for (width, best), interval in zip(one.optima, one.intervals, strict=True):
            if interval is not None:
                axes.plot((width, width), interval, color=colour, linewidth=1.2, zorder=2)
            face = colour if best.is_parabola else "white"
            axes.plot([width], [best.rate], marker=marker, color=colour, markerfacecolor=face, markersize=7, zorder=3)
            if best.edge:
                axes.annotate("↓ edge" if best.edge < 0 else "↑ edge", (width, best.rate), xytext=(6, 0), fontsize=7,
                              textcoords="offset points", color=colour, va="center")  # fmt: skip
            rates += [best.rate, *(interval or ())]
        if one.shift is not None:
            line = np.array([width for width, best in one.optima if not best.edge], float)
            axes.plot(line, one.shift.factor * line**one.shift.slope, color=colour, linestyle=DASHES[at], linewidth=1.2)
        label = f"{one.kind}: {one.law or 'no line: fewer than 2 widths within their sweeps'}"
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=DASHES[at], label=plain(label)))
    log_axis(axes.xaxis, widths)
    log_axis(axes.yaxis, rates, few=0)
    axes.set_ylim(min(rates) / 1.4, max(rates) * 1.4)
    axes.set_xlabel("width (hidden_size)")
    axes.set_ylabel("best learning rate")
    filled = ((DARK, "parabola"), ("white", "lowest of the sweep: the parabola does not hold"))
    more = [
        Line2D([], [], color=DARK, marker="o", linewidth=0, markerfacecolor=face, label=said) for face, said in filled
    ]
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=1, fontsize=8)
    lines = [f"{one.kind}: {one.short}" for one in shown_kinds]
    heading(figure, "best learning rate against width, 95% intervals over seeds", *lines)
    return figure, "learning_rate_optimum", found_in.table_of_optima(swept)


# ------------------------------------------------------------------------------------------------------------- compute


def _compute(shown: Shown, curves: DataFrame, fits: list[Fit]) -> Drawn:
    """Loss against compute, with and without the read-out: curves, ends, fronts, and a power law of each form."""
    figure, grid = grid_of(2, 5.4, 5.0, sharey=True)
    points = _points(shown, curves, shown.metric_curve)
    colours, places = colours_of(shown.ended["width"].tolist()), _marks(shown.forms)
    numbers = [points.assign(what="curve"), shown.ended.assign(what="end")]
    for axes, cost in zip(grid, COSTS, strict=True):
        _draw_curves(axes, points, cost, colours)
        for form in shown.forms:
            own = shown.ended[shown.ended["form"] == form]
            for width, ends in own.groupby("width"):
                axes.plot(ends[cost], ends["loss"], MARKERS[places[form]], color=colours[float(str(width))],
                          markersize=5, markeredgecolor="white", markeredgewidth=0.5, zorder=4)  # fmt: skip
            front = _front(shown, points, form, cost)
            axes.plot(front[cost], front["loss"], color=DARK, linestyle=DASHES[places[form]], linewidth=1.1,
                      drawstyle="steps-post", zorder=3)  # fmt: skip
            numbers.append(front.assign(what=f"front: {cost}"))
        _draw_laws(axes, shown, fits, cost)
        flop_axis(axes)
        axes.set_xlabel(COST_WORDS[cost])
    _fit_losses(grid[0], shown, points)
    grid[0].set_ylabel(shown.words)
    grid[1].legend(handles=key_of(colours, "width"), loc="upper right", fontsize=7.5)
    figure.legend(handles=_front_handles(shown, fits), loc="outside lower center", ncols=1, fontsize=7.5)
    said = "final points, as laws are: while its rate is yet to fall, a run looks worse than it is"
    if not shown.cells["annealed"].any():
        said = "all points of curves, laws of final points"
    heading(figure, f"validation loss against training compute, {_runs(len(shown.ended), len(shown.every))}",
            f"fronts are of {said}", _remarks(shown))  # fmt: skip
    columns = ["kind", "what", "width", "rate", "run", "seed", "steps", "tokens", "flops", "flops_lstm", "loss"]
    return figure, "compute", pd.concat(numbers)[columns]


def _points(shown: Shown, curves: DataFrame, name: str) -> DataFrame:
    """The finite points of a curve with what they have cost: a row each, as in `Shown.every`, by run and step."""
    kept = curves[(curves["name"] == name) & np.isfinite(curves["value"]) & (curves["step"] > 0)]
    kept = kept[["run", "step", "value"]].rename(columns={"step": "steps", "value": "loss"})
    of_runs = shown.every[["run", "seed", "state", "kind", "form", "cell", "width", "rate", "annealed", "step_tokens",
                           "step_flops", "step_flops_lstm"]]  # fmt: skip
    points = kept.merge(of_runs, on="run")
    for cost in ("tokens", *COSTS):
        points[cost] = points["steps"] * points[f"step_{cost}"]
    return points


def _draw_curves(axes: Axes, points: DataFrame, cost: str, colours: Mapping[float, Any]) -> None:
    own = points[(points["state"] == "done") & points["width"].isin(colours)]
    lines = [(run[[cost, "loss"]].to_numpy(float), colours[run["width"].iloc[0]]) for _, run in own.groupby("run")]
    collection = LineCollection([line for line, _ in lines], colors=[colour for _, colour in lines],
                                linewidths=0.7, alpha=0.55, zorder=2)  # fmt: skip
    collection.set_rasterized(len(own) > DENSE)
    axes.add_collection(collection)


def _front(shown: Shown, points: DataFrame, form: str, cost: str) -> DataFrame:
    """The front of a form: of the ends of runs, or of all points where no schedule ends with the steps."""
    own = shown.ended[shown.ended["form"] == form]
    if not own["annealed"].any():
        own = pd.concat([points[points["run"].isin(own["run"])], own]).drop_duplicates(["run", "steps"])
    return own.iloc[laws.front(own[cost].tolist(), own["loss"].tolist())]


def _draw_laws(axes: Axes, shown: Shown, fits: list[Fit], cost: str) -> None:
    for fit in fits:
        law = fit.chosen
        if fit.cost != cost or law is None:
            continue
        own = shown.ended.loc[shown.ended["run"].isin(fit.runs), cost]
        at = np.geomspace(own.min() / 1.5, own.max() * 1.5, 80)
        axes.plot(at, law.at(at), color=COLOURS[_marks(shown.forms)[fit.form]], linewidth=2.2, alpha=0.75, zorder=2.5)


def _fit_losses(axes: Axes, shown: Shown, points: DataFrame) -> None:
    """Around the ends, and as far up as most curves of finished runs begin behind their first tenth."""
    low = float(shown.ended["loss"].min())
    later = points[(points["state"] == "done")]["loss"]
    top = max(float(shown.ended["loss"].quantile(0.98)), float(later.quantile(0.9)) if len(later) else 0.0)
    log_losses(axes, [low, top])
    axes.set_ylim(low / 1.03, max(top, low * 1.05) * 1.03)


def _front_handles(shown: Shown, fits: list[Fit]) -> list[Line2D]:
    handles = []
    for form, at in _marks(shown.forms).items():
        handles.append(Line2D([], [], color=DARK, marker=MARKERS[at], linestyle=DASHES[at], markersize=5,
                              label=plain(f"{form}: ends of runs, and their front")))  # fmt: skip
    for fit in fits:
        if fit.chosen is not None and (fit.cost == "flops" or len(shown.forms) < 4):  # the others are in power_law.csv
            where = "C" if fit.cost == "flops" else "C without read-out"
            label = plain(f"{fit.form}, {where}: {fit.words}")
            handles.append(
                Line2D([], [], color=COLOURS[_marks(shown.forms)[fit.form]], linewidth=2.2, alpha=0.75, label=label)
            )
    return handles


def _laws(shown: Shown, fits: list[Fit]) -> Drawn:
    """The exponent that each E gives: how much of it is the guess of E."""
    known = [fit for fit in fits if fit.laws]
    if not known:
        return None
    figure, grid = grid_of(2, 4.6, 4.0, sharey=True)
    places = _marks(shown.forms)
    for axes, cost in zip(grid, COSTS, strict=True):
        for fit in [one for one in known if one.cost == cost]:
            at, given = places[fit.form], [law for _, law in fit.laws if law.is_e_given]
            axes.plot([law.e for law in given], [law.alpha for law in given], color=COLOURS[at], marker=MARKERS[at],
                      linestyle=DASHES[at], markersize=5)  # fmt: skip
            for _, law in fit.laws:
                _draw_interval(axes, law, COLOURS[at])
        axes.set_xlabel(f"E, the loss that no compute removes ({shown.unit})")
        axes.set_title(COST_WORDS[cost])
    grid[0].set_ylabel("exponent α of L = E + A C^α")
    alphas = [law.alpha for fit in known for _, law in fit.laws]
    pad = max(0.4 * (max(alphas) - min(alphas)), 0.2 * max(map(abs, alphas)))
    grid[0].set_ylim(min(alphas) - pad, max(alphas) + pad)
    handles = [Line2D([], [], color=COLOURS[at], marker=MARKERS[at], linestyle=DASHES[at],
                      label=plain(f"{form}: E given"))
               for form, at in places.items() if any(fit.form == form for fit in known)]  # fmt: skip
    handles.append(Line2D([], [], color=DARK, marker="*", linewidth=0, markersize=10, label="E fitted"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    heading(figure, "what the exponent is for each E, 95% intervals over runs; fitted to the ends on the front")
    return figure, "power_law", found_in.table_of_fits(fits)


def _draw_interval(axes: Axes, law: Any, colour: str) -> None:
    if law.alpha_interval is not None:
        axes.plot((law.e, law.e), law.alpha_interval, color=colour, linewidth=1, alpha=0.8)
    if not law.is_e_given:
        axes.plot([law.e], [law.alpha], "*", color=colour, markersize=12, markeredgecolor="black", markeredgewidth=0.6)


def _parametric(shown: Shown) -> Drawn:
    """Loss against tokens for each number of parameters, with the parametric form, where it can be fitted."""
    made = [(form, found_in.parametric(shown, form)) for form in shown.forms]
    fitted = [(form, law) for form, law in made if isinstance(law, Parametric)]
    if not fitted:
        return None
    figure, grid = grid_of(len(fitted), 5.4, 4.4, sharey=True)
    numbers = []
    whole = shown.whole
    colours = colours_of(whole["parameters"].tolist())
    for axes, (form, law) in zip(grid, fitted, strict=True):
        own = whole[whole["form"] == form]
        for size, cells in own.groupby("parameters"):
            colour = colours[float(str(size))]
            axes.errorbar(cells["tokens"], cells["mean"], yerr=cells["std"].fillna(0), color=colour, marker="o",
                          markersize=4, linewidth=0, elinewidth=1)  # fmt: skip
            at = np.geomspace(own["tokens"].min(), own["tokens"].max(), 60)
            axes.plot(at, law.at(np.full_like(at, float(str(size))), at), color=colour, linewidth=1)
        flop_axis(axes)
        axes.set_xlabel("training tokens D")
        axes.set_title(plain(form) + "\n" + textwrap.fill(found_in.parametric_words(law), 92), fontsize=8)
        said = law.at(own["parameters"].to_numpy(float), own["tokens"].to_numpy(float))
        numbers.append(
            own[["kind", "width", "rate", "n", "of", "parameters", "tokens", "mean", "std"]].assign(law=said)
        )
    grid[0].set_ylabel(shown.words)
    figure.legend(handles=key_of(colours, "N =", short), loc="outside lower center", ncols=5, fontsize=8)
    heading(figure, "loss by parameters and tokens, and the parametric form of Hoffmann et al. 2022")
    return figure, "parametric", pd.concat(numbers)


# --------------------------------------------------------------------------------------------------------------- width


def _widths(shown: Shown) -> Drawn:
    """Final loss against width and against parameters, at the best rate of each."""
    best = found_in.best_of_widths(shown)
    if best["width"].nunique() < 2:
        return None
    figure, grid = grid_of(2, 5.0, 4.2, sharey=True)
    places = _marks(shown.kinds)
    for axes, column, words in zip(grid, ("width", "parameters"), ("width (hidden_size)", "parameters"), strict=True):
        for kind, own in best.groupby("kind"):
            _draw_widths(axes, own.sort_values(column), column, places[str(kind)])
        log_axis(axes.xaxis, best[column].tolist())
        axes.set_xlabel(words)
    grid[0].set_ylabel(shown.words)
    handles = [Line2D([], [], color=COLOURS[at], marker=MARKERS[at], linestyle=DASHES[at],
                      label=plain(f"{kind} ({_seeds(best[best['kind'] == kind])})"))
               for kind, at in places.items()]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    n, of = int(best["n"].sum()), int(best["of"].sum())
    at = "at the best learning rate of each" if shown.cells.groupby(["kind", "width"]).size().max() > 1 else "and size"
    heading(figure, f"final validation loss by width {at}, mean ± std over seeds, {_runs(n, of)}", _remarks(shown))
    columns = ["kind", "width", "parameters", "rate", "n", "of", "mean", "std", "tokens", "flops", "flops_lstm"]
    return figure, "width", best[columns]


def _draw_widths(axes: Axes, own: DataFrame, column: str, at: int) -> None:
    axes.errorbar(own[column], own["mean"], yerr=own["std"].fillna(0), color=COLOURS[at], marker=MARKERS[at],
                  markersize=6, linestyle=DASHES[at], linewidth=1, elinewidth=1.2, capsize=3)  # fmt: skip
    for _, row in own.iterrows():
        if row["n"] == row["of"] and own["of"].nunique() == 1:
            continue  # the legend says it
        axes.annotate(_counted(row["n"], row["of"]), (row[column], row["mean"]), xytext=(4, 5), fontsize=7,
                      textcoords="offset points", color=COLOURS[at])  # fmt: skip


def _seeds(own: DataFrame) -> str:
    low, high = int(own["of"].min()), int(own["of"].max())
    return f"n={low}" if low == high else f"n={low} to {high}"


# ------------------------------------------------------------------------------------------------------------ training


def _training(shown: Shown, curves: DataFrame) -> Drawn:
    """Validation and training loss against tokens: a panel for each kind and width, coloured by learning rate."""
    points = _points(shown, curves, shown.metric_curve)
    trained = _points(shown, curves, "loss") if shown.unit == "nats/token" else points[:0]
    groups = list(dict.fromkeys(zip(points["kind"], points["width"], strict=True)))
    groups = sorted(groups, key=lambda one: ([*shown.kinds, one[0]].index(one[0]), one[1]))
    if not groups:
        return None
    kept = groups[:PANELS]
    figure, grid = grid_of(len(kept), 4.3, 3.5, sharey=True)
    both = pd.concat([points.assign(what="validation"), trained.assign(what="training")])
    colours, limits = colours_of(both["rate"].tolist()), _limits(points)
    for axes, (kind, width) in zip(grid, kept, strict=True):
        own = both[(both["kind"] == kind) & (both["width"] == width)]
        _draw_training(axes, own, colours, limits[1])
        every = shown.every[(shown.every["kind"] == kind) & (shown.every["width"] == width)]
        axes.set_title(f"width {width}, {_runs(own['run'].nunique(), len(every))}\n{plain(str(kind))}", fontsize=8.5)
        axes.set_xlabel("training tokens")
        axes.set_ylabel(shown.words.replace("validation ", "") if axes.get_subplotspec().is_first_col() else "")  # type: ignore[union-attr]
    log_losses(grid[0], limits)
    grid[0].set_ylim(*limits)
    handles = [
        Line2D([], [], color=DARK, linewidth=1.3, label="validation"),
        Line2D([], [], color=DARK, linewidth=0.6, alpha=0.6, label="training"),
        Line2D([], [], color=GREY, marker="X", linewidth=0, label="a run that failed ended here"),
    ]
    columns = 2 + min(3, len(kept))
    figure.legend(handles=[*key_of(colours, "rate"), *handles], loc="outside lower center", ncols=columns, fontsize=8)
    more = f"; {len(groups) - len(kept)} more of kind and width are in the CSV" if len(groups) > len(kept) else ""
    heading(figure, f"loss while training, {_runs(points['run'].nunique(), len(shown.every))}{more}", _remarks(shown))
    names = ["kind", "width", "rate", "run", "seed", "state", "what", "steps", "tokens", "loss"]
    return figure, "training", both[names]


def _limits(points: DataFrame) -> tuple[float, float]:
    """A y axis around all but the highest losses: those of a run that diverges are beyond it."""
    kept = points[points["state"] == "done"] if (points["state"] == "done").any() else points
    low, top = float(points["loss"].min()), float(kept["loss"].quantile(0.995))
    return low / 1.04, max(top, low * 1.05) * 1.04


def _draw_training(axes: Axes, own: DataFrame, colours: Mapping[float, Any], top: float) -> None:
    dense = len(own) > DENSE
    for (_, what), run in own.groupby(["run", "what"]):
        colour, is_val = colours[run["rate"].iloc[0]], what == "validation"
        marker = "." if len(run) == 1 else ""
        axes.plot(run["tokens"], run["loss"], color=colour, linewidth=1.3 if is_val else 0.6, marker=marker,
                  alpha=0.95 if is_val else 0.5, zorder=3 if is_val else 2, rasterized=dense)  # fmt: skip
        if is_val and run["state"].iloc[0] == "failed":
            end = min(float(run["loss"].iloc[-1]), 0.985 * top)  # on the axis, although the loss may be beyond
            axes.plot(run["tokens"].iloc[-1:], [end], "X", color=GREY, markersize=6, zorder=4)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
