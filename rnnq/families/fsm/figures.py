"""What only this family has to show: how right each architecture is, where in the query, and along a curriculum.

Every figure has the perfect solver, who knows the shown demonstrations alone, and the shortcuts that need no lookup:
an accuracy says something only between these two. Reaches no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter
from pandas import DataFrame

from rnnq.families.fsm.config import BASELINES, LEARNERS, PARTS, Machines
from rnnq.spread import with_spread

Save = Callable[[Figure, str, DataFrame], list[Path]]

CURVES = ("val_acc",)
POSITIONS = [f"test_acc_pos{number}" for number in range(PARTS)]
WORDS = {
    "loss": "training loss (running mean)",
    "val_loss": "validation loss, best checkpoint",
    "val_acc": "validation accuracy, best checkpoint",
    "val_score": "validation score, best checkpoint: 0 is the best shortcut, 1 the solver",
    "test_acc": "test accuracy",
    "test_score": "test score: 0 is the best shortcut, 1 the solver",
}
CURVE_WORDS = {"loss": "training loss (running mean)", "val_loss": "validation loss", "val_acc": "validation accuracy"}
COLOURS = dict(zip(LEARNERS, ("#0072b2", "#d55e00", "#e69f00", "#56b4e9", "#009e73"), strict=True))
MARKERS = dict(zip(LEARNERS, "osD^v", strict=True))
MOST = 8  # groups of a panel that have a curve; data sets that have a panel; stages of a curriculum
DARK, GREY = "#444444", "#999999"
DASHES: dict[str, Any] = {
    "perfect solver": "-",
    "best shortcut": (0, (4, 2)),
    "shortcut U (next states so far)": (0, (1, 3)),
    "shortcut A (given the action)": (0, (1, 2)),
    "shortcut S (given the state)": (0, (3, 1, 1, 1)),
}
BASELINE_WORDS = dict(zip(BASELINES, ("perfect solver", *list(DASHES)[2:]), strict=True))


def drawn(runs: DataFrame) -> list[int]:
    """The runs whose curves are drawn: none, of the stage alone."""
    return []


def draw(runs: DataFrame, curves: DataFrame, save: Save) -> list[Path]:
    """Draw the figures of a stage; returns what `save` wrote.

    runs  as of frame.of_rows, all runs of the stage
    """
    if not {"test_acc", "config.model"} <= set(runs.columns):
        return []
    groups = groups_of(runs, ["test_acc", "parameters", *LIMITS, *POSITIONS], name_of_net)
    groups = groups.assign(model=groups["config.model"], data=[data_of(row) for _, row in groups.iterrows()])
    written: list[Path] = []
    for figure in (_architectures, _positions):
        made = figure(groups)
        if made is not None:
            written += save(*made)
    return written


# ----------------------------------------------------------------------------------------------------- what is shown

LIMITS = ("test_ceiling", "test_shortcut")


def groups_of(runs: DataFrame, metrics: Sequence[str], name: Callable[[pd.Series], str]) -> DataFrame:
    """A row for each group with a finished run, in the order of the first: name, run (the first), n, of, the config
    columns, and of each metric its mean in its own column and the sample standard deviation (n - 1) in `<metric>_std`.
    """
    rows = []
    config = [column for column in runs.columns if column.startswith("config.")]
    for _, own in runs.groupby("group_key", sort=False):
        done = own[own["state"] == "done"]
        if done.empty:
            continue
        first = done.iloc[0]
        row = {"name": name(first), "run": int(first["id"]), "n": len(done), "of": len(own)}
        row |= {column: first[column] for column in config}
        for metric in metrics:
            values = done[metric] if metric in done else pd.Series(dtype=float)
            row |= {metric: values.mean(), f"{metric}_std": values.std()}
        rows.append(row)
    columns = ["name", "run", "n", "of", *config, *(m + end for m in metrics for end in ("", "_std"))]
    return _told_apart(DataFrame(rows, columns=columns))


def _told_apart(groups: DataFrame) -> DataFrame:
    """Groups that differ in what their name does not say get the number of their first run."""
    twice = groups["name"].duplicated(keep=False)
    return groups.assign(name=groups["name"].where(~twice, groups["name"] + " (run " + groups["run"].astype(str) + ")"))


def name_of_net(row: pd.Series) -> str:
    """ "lstm d64 L2"."""
    model = str(row["config.model"])
    return model if model in BASELINES else f"{model} d{row['config.d_model']} L{row['config.n_layers']}"


def data_of(row: pd.Series) -> str:
    """ "5s5a 80/80"."""
    given = {name: row.get(f"config.{name}") for name in Machines.model_fields}
    fields = {name: value for name, value in given.items() if value is not None and not pd.isna(value)}
    types = {name: type(field.default) for name, field in Machines.model_fields.items()}
    whole: dict[str, Any] = {
        name: value if types[name] in (str, bool, float) else int(value) for name, value in fields.items()
    }
    return Machines.model_construct(**whole).data_name()


def panels_of(names: Sequence[str], width: float = 5.4, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, side by side, three in a row."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(6.4, width * columns), height * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    for axes in grid[len(names) :]:
        axes.remove()
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(name.replace("$", r"\$"))
    return figure, grid[: len(names)]


@dataclass(frozen=True)
class Limit:
    """An accuracy that others are judged by."""

    words: str
    value: float


def limits_of(groups: DataFrame, ceiling: str = LIMITS[0], floor: str = LIMITS[1]) -> list[Limit]:
    """The solver, the best shortcut, and what else stands in the stage as runs of its own."""
    found = {}
    for words, metric in (("perfect solver", ceiling), ("best shortcut", floor)):
        if groups[metric].notna().any():
            found[words] = float(groups[metric].mean())
    for _, row in groups[groups["config.model"].isin(BASELINES)].iterrows():
        found.setdefault(BASELINE_WORDS[row["config.model"]], float(row["test_acc"]))
    return [Limit(words, value) for words, value in found.items() if math.isfinite(value)]


def draw_limits(axes: Axes, limits: Sequence[Limit]) -> None:
    """A line across the panel for each."""
    for limit in limits:
        axes.axhline(limit.value, color=DARK, linestyle=DASHES[limit.words], linewidth=1.1, zorder=1)


def limit_handles(panels: Sequence[Sequence[Limit]]) -> list[Line2D]:
    """What the legend says of the lines; with its value where all panels have the same."""
    handles = []
    for words in DASHES:
        values = {f"{limit.value:.4f}" for limits in panels for limit in limits if limit.words == words}
        if values:
            value = f": {values.pop()}" if len(values) == 1 else ""
            handles.append(Line2D([], [], color=DARK, linestyle=DASHES[words], linewidth=1.1, label=words + value))
    return handles


def fit(grid: Sequence[Axes], values: Sequence[float]) -> None:
    """One y axis for accuracies, around all of them. An error bar may reach above 1, and is not cut there."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.02
    grid[0].set_ylim(low - pad, high + pad)
    grid[0].yaxis.set_major_locator(MaxNLocator(8))


def _sets(groups: DataFrame) -> list[str]:
    """The data sets that have a panel: those of most groups first."""
    return [str(name) for name in groups["data"].value_counts(sort=True).index[:MOST]]


def _learners(groups: DataFrame) -> DataFrame:
    return groups[groups["model"].isin(LEARNERS) & groups["test_acc"].notna()]


def _range(groups: DataFrame, metrics: Sequence[str], limits: Iterator[Limit] | Sequence[Limit]) -> list[float]:
    ends = [groups[m] + sign * groups[f"{m}_std"].fillna(0) for m in metrics for sign in (-1, 1)]
    values = pd.concat(ends).dropna().tolist()
    return [*values, *(limit.value for limit in limits)]


# ---------------------------------------------------------------------------------------- by architecture and size


def _architectures(groups: DataFrame) -> tuple[Figure, str, DataFrame] | None:
    """Accuracy against the number of parameters, a colour and a marker for each architecture."""
    learners = _learners(groups)
    if learners.empty:
        return None
    names = _sets(learners)
    figure, grid = panels_of(names)
    limits = [limits_of(groups[groups["data"] == name]) for name in names]
    for axes, name, own_limits in zip(grid, names, limits, strict=True):
        draw_limits(axes, own_limits)
        _draw_sizes(axes, learners[learners["data"] == name])
        axes.set_xlabel("parameters")
    shown = learners[learners["data"].isin(names)]
    fit(grid, _range(shown, ["test_acc"], [limit for own in limits for limit in own]))
    grid[0].set_ylabel("test accuracy (share of query steps)")
    models = [model for model in LEARNERS if model in set(shown["model"])]
    handles = [Line2D([], [], color=COLOURS[m], marker=MARKERS[m], linewidth=1, label=f"{m}: mean ± std over seeds (n)")
               for m in models]  # fmt: skip
    figure.legend(handles=[*handles, *limit_handles(limits)], loc="outside lower center", ncols=2)
    figure.suptitle(f"accuracy by architecture and size: {_counted(shown)}")
    return figure, "architectures", _numbers(groups[groups["data"].isin(names)], ["test_acc", *LIMITS])


def _draw_sizes(axes: Axes, learners: DataFrame) -> None:
    for model, own in learners.groupby("model", sort=False):
        by_size = own.sort_values("parameters")
        colour, marker = COLOURS[str(model)], MARKERS[str(model)]
        axes.errorbar(by_size["parameters"], by_size["test_acc"], yerr=by_size["test_acc_std"].fillna(0), color=colour,
                      marker=marker, markersize=5, markeredgecolor="white", linewidth=0.8, elinewidth=1.2, capsize=3,
                      zorder=3)  # fmt: skip
        for _, row in by_size.iterrows():
            size = row["name"].partition(" ")[2]
            n = row["n"] if row["n"] == row["of"] else f"{row['n']} of {row['of']}"
            axes.annotate(f"{size} ({n})", (row["parameters"], row["test_acc"]), xytext=(5, -9),
                          textcoords="offset points", fontsize=7, color=colour, zorder=4)  # fmt: skip
    axes.set_xscale("log")
    low, high = learners["parameters"].min(), learners["parameters"].max()
    axes.set_xlim(low / 1.35, high * 1.9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if high / low < 20:  # too few powers of ten for ticks
        ticks = np.geomspace(low, high, 4)
        axes.set_xticks([float(f"{tick:.1g}") for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _counted(groups: DataFrame) -> str:
    n, runs, of = len(groups), int(groups["n"].sum()), int(groups["of"].sum())
    part = f"{runs:,}" if runs == of else f"{runs:,} of {of:,}"
    return f"{n} group{'' if n == 1 else 's'}, {part} runs"


def _numbers(groups: DataFrame, metrics: Sequence[str]) -> DataFrame:
    """data, name, model, run (the first), n, of, parameters; of each metric its mean and std."""
    columns = ["data", "name", "model", "run", "n", "of", "parameters"]
    return groups[[*columns, *(m + end for m in metrics for end in ("", "_std"))]]


# ------------------------------------------------------------------------------------------- by position in the query


def _positions(groups: DataFrame) -> tuple[Figure, str, DataFrame] | None:
    """Accuracy by eighths of the query, which grows as the context does: for the best groups and for the baselines."""
    learners = _learners(groups)
    learners = learners[learners[POSITIONS].notna().any(axis=1)]
    if learners.empty:
        return None
    names = _sets(learners)
    figure, grid = panels_of(names)
    places = (np.arange(PARTS) + 0.5) * 100 / PARTS
    every, shown, limits = [], [], []
    for axes, name in zip(grid, names, strict=True):
        here = groups[groups["data"] == name]
        baselines = here[here["model"].isin(BASELINES) & here[POSITIONS].notna().any(axis=1)]
        known = {BASELINE_WORDS[model] for model in baselines["model"]}
        flat = [limit for limit in limits_of(here) if limit.words not in known]
        draw_limits(axes, flat)
        for _, row in baselines.iterrows():
            dashes = DASHES[BASELINE_WORDS[row["model"]]]
            axes.plot(places, row[POSITIONS].to_numpy(float), color=DARK, linestyle=dashes, linewidth=1.1)
        best = learners[learners["data"] == name].sort_values("test_acc", ascending=False).head(MOST)
        within = best.groupby("model").cumcount()  # of one architecture: its sizes are told apart by their dashes
        handles = [_draw_position(axes, row, places + (i - (len(best) - 1) / 2) * 0.7, within[at])
                   for i, (at, row) in enumerate(best.iterrows())]  # fmt: skip
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=7.5)
        axes.set_xlabel("position in the query (%)")
        limits.append([*flat, *(Limit(words, math.nan) for words in known)])
        every += _range(pd.concat([best, baselines]), POSITIONS, flat)
        shown.append(pd.concat([best, baselines]))
    fit(grid, every)
    grid[0].set_ylabel("test accuracy (share of query steps)")
    figure.legend(handles=_lines_of(limits), loc="outside lower center", ncols=3)
    figure.suptitle("accuracy by position in the query, mean ± std over seeds (n)")
    return figure, "positions", _position_numbers(pd.concat(shown))


def _lines_of(panels: Sequence[Sequence[Limit]]) -> list[Line2D]:
    words = {limit.words for limits in panels for limit in limits}
    return [Line2D([], [], color=DARK, linestyle=DASHES[name], linewidth=1.1, label=name)
            for name in DASHES if name in words]  # fmt: skip


def _draw_position(axes: Axes, row: pd.Series, places: np.ndarray, within: int) -> Line2D:
    """A group's curve, a little beside the others so that error bars do not lie on each other; what the legend says."""
    means = row[POSITIONS].to_numpy(float)
    stds = row[[f"{name}_std" for name in POSITIONS]].to_numpy(float)
    style: Any = {"color": COLOURS[row["model"]], "marker": MARKERS[row["model"]], "linewidth": 1,
                  "linestyle": ("-", "--", "-.", ":")[within % 4], "markersize": 5 - within % 3}  # fmt: skip
    axes.errorbar(places, means, yerr=np.nan_to_num(stds), elinewidth=1, capsize=2, zorder=3, **style)
    std = row["test_acc_std"]
    n = row["n"] if row["n"] == row["of"] else f"{row['n']} of {row['of']}"
    label = f"{row['name']}: {with_spread(row['test_acc'], None if pd.isna(std) else std)} ({n})"
    return Line2D([], [], label=label.replace("$", r"\$"), **style)


def _position_numbers(shown: DataFrame) -> DataFrame:
    """A row for each group and eighth: data, name, run, n, of, part (from 0), from, to (percent), mean, std."""
    rows = [
        {"data": row["data"], "name": row["name"], "run": row["run"], "n": row["n"], "of": row["of"], "part": number,
         "from": 100 * number / PARTS, "to": 100 * (number + 1) / PARTS, "mean": row[name], "std": row[f"{name}_std"]}
        for _, row in shown.iterrows() for number, name in enumerate(POSITIONS)
    ]  # fmt: skip
    return DataFrame(rows)


# ------------------------------------------------------------------------------------------------- along a curriculum


def draw_lineage(links: DataFrame, runs: DataFrame, curves: DataFrame, save: Save) -> list[Path]:
    """Draw validation accuracy along the runs that went on from each other's weights; returns what `save` wrote.

    links   child, parent, step (of the checkpoint that the child began with)
    runs    as of frame.of_rows, of all stages
    curves  as of frame.curves_frame, the same
    """
    points = curves[np.isfinite(curves["value"]) & (curves["name"] == CURVES[0])]
    stages = _in_order(links, runs)
    stages = [stage for stage in stages if points["run"].isin(runs.loc[runs["stage"] == stage, "id"]).any()][-MOST:]
    if len(stages) < 2:
        return []
    figure, grid = panels_of(stages, width=4.4)
    limits, every, numbers = [], [], []
    for axes, stage in zip(grid, stages, strict=True):
        own = runs[runs["stage"] == stage]
        here = points[points["run"].isin(own["id"])]
        limits.append(_curriculum_limits(own))
        draw_limits(axes, limits[-1])
        means = _means(here)
        _draw_stage(axes, here, means, links[links["parent"].isin(own["id"])])
        axes.set_title(f"{stage}: {', '.join(sorted({data_of(row) for _, row in own.iterrows()}))}".replace("$", r"\$"))
        axes.set_xlabel("optimiser step in this stage")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        every += [
            *here["value"],
            *(means["mean"] - means["std"]).dropna().clip(lower=0),
            *(limit.value for limit in limits[-1]),
        ]
        numbers += [_stage_numbers(stage, here, own), means.assign(stage=stage)]
    fit(grid, every)
    grid[0].set_ylabel("validation accuracy (share of query steps)")
    handles = [
        Line2D([], [], color=COLOURS["lstm"], linewidth=1.8, label="mean of the runs that got so far"),
        Patch(color=COLOURS["lstm"], alpha=0.2, linewidth=0, label="± std over these runs"),
        Line2D([], [], color=GREY, linewidth=0.6, label="one run"),
        Line2D([], [], color=DARK, linestyle="", marker="o", markersize=5, label="where the next one began"),
    ]  # fmt: skip
    figure.legend(handles=[*handles, *_lines_of(limits)], loc="outside lower center", ncols=3)
    figure.suptitle(f"curriculum: {' → '.join(stages)}, each stage from the weights of the one before")
    return save(
        figure, "curriculum", pd.concat(numbers)[["stage", "run", "seed", "step", "val_acc", "n", "mean", "std"]]
    )


def _in_order(links: DataFrame, runs: DataFrame) -> list[str]:
    """The stages, oldest first: each after those that its runs went on from."""
    stage = dict(zip(runs["id"], runs["stage"], strict=True))
    parents: dict[str, set[str]] = {name: set() for name in stage.values()}
    for child, parent in zip(links["child"], links["parent"], strict=True):
        if child in stage and parent in stage and stage[child] != stage[parent]:
            parents[stage[child]].add(stage[parent])
    order: list[str] = []
    while len(order) < len(parents):
        ready = [name for name in parents if name not in order and parents[name] <= set(order)]
        order += ready or [name for name in parents if name not in order]  # a circle of stages cannot be ordered
    return order


def _curriculum_limits(own: DataFrame) -> list[Limit]:
    found = [("perfect solver", "val_ceiling"), ("best shortcut", "val_shortcut")]
    means = [(words, float(own[name].mean())) for words, name in found if name in own]
    return [Limit(words, value) for words, value in means if math.isfinite(value)]


def _means(points: DataFrame) -> DataFrame:
    """step, n, mean, std over the runs that got so far, where all of these were measured."""
    found = points.groupby("step")["value"].agg(["count", "mean", "std"]).reset_index().rename(columns={"count": "n"})
    last = np.sort(points.groupby("run")["step"].max().to_numpy())
    return found[found["n"] == len(last) - np.searchsorted(last, found["step"].to_numpy())]


def _draw_stage(axes: Axes, points: DataFrame, means: DataFrame, onwards: DataFrame) -> None:
    runs = {run: own.sort_values("step") for run, own in points.groupby("run")}
    for own in runs.values():
        axes.plot(own["step"], own["value"], color=GREY, linewidth=0.6, zorder=2)
    for place, (n, part) in enumerate(means.groupby("n", sort=False)):
        if len(runs) > 1:
            axes.fill_between(part["step"], part["mean"] - part["std"], part["mean"] + part["std"], linewidth=0,
                              color=COLOURS["lstm"], alpha=0.2, zorder=1.5)  # fmt: skip
        axes.plot(part["step"], part["mean"], color=COLOURS["lstm"], linewidth=1.8, linestyle="--" if place else "-",
                  marker="" if len(part) > 1 else "_", zorder=3)  # fmt: skip
        at = (float(part["step"].iloc[0]), float(part["mean"].iloc[0]))
        axes.annotate(f"n={n}", at, xytext=(3, -11), textcoords="offset points", fontsize=7.5, color=COLOURS["lstm"])
    for parent, step in zip(onwards["parent"], onwards["step"], strict=True):
        own = runs.get(parent)
        value = own.loc[own["step"] == step, "value"] if own is not None else []
        if len(value):
            axes.plot(step, value.iloc[0], color=DARK, marker="o", markersize=5, zorder=4)  # type: ignore[union-attr]


def _stage_numbers(stage: str, points: DataFrame, own: DataFrame) -> DataFrame:
    seeds = dict(zip(own["id"], own["seed"], strict=True))
    return DataFrame({
        "stage": stage, "run": points["run"], "seed": points["run"].map(seeds), "step": points["step"],
        "val_acc": points["value"],
    })  # fmt: skip
