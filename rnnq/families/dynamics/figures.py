"""What only this family has to show: whether a net uses its memory. Reaches no torch.

A low loss alone proves no memory: the best run of the original study whose recurrence was never trained still had
1.78 nats per byte, below the 1.9 that its author took as proof. Two comparisons are drawn instead, both on held-out
text. Below its own loss with every state zeroed, a net depends on its states. Below a bigram table, it predicts
better than whatever knows the current byte alone. A net uses its memory when both hold.

Losses of runs on other tokens than bytes are shown per byte, too: all of a run are measured on the same windows, so
that one factor turns them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from pandas import DataFrame

CURVES = ("val_loss", "val_loss_no_state")
WORDS = {
    "loss": "lowest training loss (moving average)",
    "val_loss": "held-out loss",
    "val_bpb": "held-out loss",
    "val_loss_per_byte": "held-out loss",
    "val_loss_no_state": "held-out loss, states zeroed",
    "test_loss": "test loss",
    "test_bpb": "test loss",
    "test_loss_per_byte": "test loss",
    "steps_per_s": "speed",
}
CURVE_WORDS = {**WORDS, "loss": "training loss (moving average)"}
SEED_BOUND = 1.9  # nats a byte of training loss that the original study took as proof of memory, on enwik8
BEST = 5
DENSE = 3000  # marks; more become an image inside an SVG or PDF
UNIT = "nats/byte"
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000")
MARKERS = ("o", "s", "^", "D", "v")  # for grey print
USES, NOT = "#009e73", "#999999"
TABLES = {"bigram_loss": ("bigram table", (0, (4, 2))), "unigram_loss": ("unigram table", (0, (1, 2)))}


def draw(runs: DataFrame, curves: DataFrame, save: Callable[[Figure, str, DataFrame], list[Path]]) -> list[Path]:
    """Draw the family's figures with the frames of a stage; returns what `save` wrote.

    runs    as of frame.runs_frame, all runs of the stage
    curves  as of frame.curves_frame: CURVES of those that `drawn` names
    """
    judged = judge(runs)
    if judged.empty:
        return []
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = _curves_of(judged.head(BEST), curves)
    _draw_curves(left, judged.head(BEST), shown)
    _draw_runs(right, judged)
    missing = len(runs) - len(judged)
    right.set_title("every finished run" + (f" ({missing} of {len(runs)} lack these numbers)" if missing else ""))
    figure.suptitle("\n".join(part for line in summary(judged) for part in textwrap.wrap(line, 130)))
    return save(figure, "memory", _numbers(judged, shown))


def drawn(runs: DataFrame) -> list[int]:
    """The runs whose curves are drawn."""
    return [int(run) for run in judge(runs).head(BEST)["id"]]


def judge(runs: DataFrame) -> DataFrame:
    """The finished runs with both held-out losses, lowest val_loss first, each with what it shows; in nats per byte.

    needs_state    its loss is below that without states
    beats_bigram   its loss is below that of a table of the current byte
    uses_memory    both
    passes_bound   its training loss is below the bound of the original study
    per_byte       tokens in a byte of held-out text, which its losses have been multiplied with
    """
    if not set(CURVES) <= set(runs.columns):
        return runs.iloc[:0]
    finite = np.isfinite(runs[list(CURVES)]).all(axis=1)
    found = _per_byte(runs[(runs["state"] == "done") & finite]).sort_values(["val_loss", "id"])
    needs = found["val_loss"] < found["val_loss_no_state"]
    beats = found["val_loss"] < found["bigram_loss"]
    return found.assign(
        needs_state=needs, beats_bigram=beats, uses_memory=needs & beats, passes_bound=found["loss"] < SEED_BOUND
    )


def _per_byte(runs: DataFrame) -> DataFrame:
    """With the training loss it is exact only where training text has as many bytes a token as held-out text."""
    if "val_loss_per_byte" not in runs.columns:
        return runs.assign(per_byte=1.0)
    factor = (runs["val_loss_per_byte"] / runs["val_loss"]).fillna(1.0)
    names = [name for name in ("loss", *CURVES, *TABLES) if name in runs.columns]
    return runs.assign(per_byte=factor, **{name: runs[name] * factor for name in names})


def summary(judged: DataFrame) -> list[str]:
    """What the runs show, in words."""
    uses, passes = judged["uses_memory"], judged["passes_bound"]
    return [
        f"{judged['stage'].iloc[0]}: does a net use its memory? {uses.sum():,} of {len(judged):,} runs do: below their "
        "own loss without states, and below the bigram table",
        f"training loss < {SEED_BOUND}, the original study's proof of memory: passed by {passes.sum():,} runs "
        f"({(passes & ~uses).sum():,} do not use it), not by {(~passes).sum():,} "
        f"({(uses & ~passes).sum():,} do use it)",
    ]


def _curves_of(best: DataFrame, curves: DataFrame) -> DataFrame:
    """run, step, val_loss, val_loss_no_state of the best runs; what is not finite is left out."""
    kept = curves[curves["run"].isin(best["id"]) & curves["name"].isin(CURVES) & np.isfinite(curves["value"])]
    kept = kept.assign(value=kept["value"] * kept["run"].map(best.set_index("id")["per_byte"]))
    wide = kept.pivot(index=["run", "step"], columns="name", values="value").reset_index()
    return wide.reindex(columns=["run", "step", *CURVES])


# ----------------------------------------------------------------------------------------------------- left panel


def _draw_curves(axes: Axes, best: DataFrame, shown: DataFrame) -> None:
    handles = []
    for place, (_, run) in enumerate(best.iterrows()):
        own = shown[shown["run"] == run["id"]]
        same: dict[str, Any] = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 3.5}
        axes.plot(own["step"], own["val_loss"], **same)
        axes.plot(own["step"], own["val_loss_no_state"], linestyle="--", linewidth=1, **same)
        label = f"{place + 1}. {_short(run['label'])} (run {run['id']})"
        handles.append(Line2D([], [], label=label, **same))
    handles.append(Line2D([], [], color="#444444", linestyle="--", lw=1, label="the same net, every state zeroed"))
    handles += _draw_tables(axes, best, ["bigram_loss", "unigram_loss"])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"held-out loss ({UNIT})")
    axes.set_title(f"the {len(best)} runs of lowest held-out loss, with and without their states")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _draw_tables(axes: Axes, runs: DataFrame, names: list[str]) -> list[Line2D]:
    """A line for each table's loss; several where runs differ in what they read."""
    handles = []
    for name in names:
        words, dashes = TABLES[name]
        values = sorted(set(runs[name].dropna().round(6)))
        for value in values[:3]:
            axes.axhline(value, color="#444444", linestyle=dashes, linewidth=1.2)
        if values:
            text = ", ".join(f"{value:.3f}" for value in values[:3])
            handles.append(Line2D([], [], color="#444444", linestyle=dashes, lw=1.2, label=f"{words} ({text})"))
    return handles


def _short(label: str) -> str:
    return (label if len(label) <= 40 else label[:39] + "…").replace("$", r"\$")


# ---------------------------------------------------------------------------------------------------- right panel


def _draw_runs(axes: Axes, judged: DataFrame) -> None:
    uses = judged["uses_memory"]
    small = 1.0 if len(judged) <= 500 else 0.5 if len(judged) <= 3000 else 0.25
    for mask, colour, marker, size, width in ((~uses, NOT, "x", 14, 0.8), (uses, USES, "o", 22, 0)):
        part = judged[mask]
        dots = axes.scatter(part["val_loss_no_state"], part["val_loss"], s=size * small, color=colour, marker=marker,
                            alpha=0.7, linewidths=width)  # fmt: skip
        dots.set_rasterized(len(judged) > DENSE)
    passing = judged[judged["passes_bound"]]
    rings = axes.scatter(passing["val_loss_no_state"], passing["val_loss"], s=46 * small, facecolors="none",
                         edgecolors="#d55e00", linewidths=0.8 * small, zorder=0.9)  # fmt: skip
    rings.set_rasterized(len(judged) > DENSE)
    low = float(judged[list(CURVES)].min().min())
    axes.axline((low, low), slope=1, color="#444444", linewidth=1)
    handles = [*_run_handles(judged), Line2D([], [], color="#444444", lw=1, label="no use of the state: both equal")]
    handles += _draw_tables(axes, judged, ["bigram_loss"])
    axes.set_xlabel(f"held-out loss with every state zeroed ({UNIT})")
    axes.set_ylabel(f"held-out loss ({UNIT})")
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _run_handles(judged: DataFrame) -> list[Line2D]:
    uses, passes = int(judged["uses_memory"].sum()), int(judged["passes_bound"].sum())
    same: dict[str, Any] = {"linestyle": ""}
    return [
        Line2D([], [], marker="o", color=USES, markersize=5,
               label=f"uses memory: below both lines (n={uses:,})", **same),
        Line2D([], [], marker="x", color=NOT, markersize=4, label=f"does not (n={len(judged) - uses:,})", **same),
        Line2D([], [], marker="o", markerfacecolor="none", markeredgecolor="#d55e00", markersize=7,
               label=f"training loss < {SEED_BOUND} (n={passes:,})", **same),
    ]  # fmt: skip


def _numbers(judged: DataFrame, shown: DataFrame) -> DataFrame:
    """Both panels in one table: `panel` is "curves" (a row for each evaluation) or "runs"."""
    verdicts = ["needs_state", "beats_bigram", "uses_memory", "passes_bound"]
    runs = judged[["id", "label", *CURVES, *TABLES, "loss", *verdicts]].rename(columns={"id": "run"})
    labels = judged.set_index("id")["label"]
    curves = shown.assign(label=shown["run"].map(labels), panel="curves")
    both = pd.concat([curves, runs.assign(panel="runs")])
    return both[["panel", "run", "label", "step", *CURVES, *TABLES, "loss", *verdicts]].astype({"step": "Int64"})
