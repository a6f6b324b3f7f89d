"""What probes have to show: what can be read off where, beside the control. Reaches no torch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from pandas import DataFrame

from rnnq.families.fsm.figures import (
    DARK,
    DASHES,
    MOST,
    Limit,
    Save,
    data_of,
    draw_limits,
    fit,
    groups_of,
    name_of_net,
    panels_of,
)
from rnnq.spread import with_spread

CURVES = ()
WORDS = {
    "loss": "training loss of the top layer's probe (running mean)",
    "val_loss": "validation loss of the top layer's probe",
    "val_acc": "validation accuracy of the top layer's probe",
    "test_acc": "test accuracy of the top layer's probe",
    "test_control_acc": "test accuracy of the control",
    "test_selectivity": "test accuracy above the control's",
}
CURVE_WORDS = WORDS
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000")
MARKERS = "osD^vP<>"
ANSWERS = {"next_state": "the next state", "current_state": "the current state", "table": "the whole transition table"}
_PLACE = re.compile(r"test_acc_(embed|[hc]\d+)$")


def drawn(runs: DataFrame) -> list[int]:
    """The runs whose curves are drawn: none."""
    return []


def draw(runs: DataFrame, curves: DataFrame, save: Save) -> list[Path]:
    """Draw the accuracy of the probes of each layer; returns what `save` wrote."""
    if not {"test_acc", "config.target"} <= set(runs.columns):
        return []
    runs = _with_top(runs)
    places = _places(runs)
    metrics = [f"test_{kind}_{place}" for place in places for kind in ("acc", "control_acc")]
    groups = groups_of(runs, [*metrics, "test_selectivity", "test_ceiling", "test_floor"], _name)
    groups = groups[groups[metrics].notna().any(axis=1)] if metrics else groups.iloc[:0]
    if groups.empty:
        return []
    panel = [f"{ANSWERS[row['config.target']]}, {data_of(row)}" for _, row in groups.iterrows()]
    groups = groups.assign(panel=panel)
    names = list(dict.fromkeys(panel))[:MOST]
    figure, grid = panels_of(names, height=4.9)
    values: list[float] = []
    for axes, name in zip(grid, names, strict=True):
        values += _draw_panel(axes, groups[groups["panel"] == name].head(len(COLOURS)), places)
    fit(grid, values)
    grid[0].set_ylabel("test accuracy (share of answers)")
    figure.legend(handles=_handles(), loc="outside lower center", ncols=2)
    beside = "beside each name: by how much the probe of the top layer is better than its control (n)"
    figure.suptitle(f"what a linear probe reads off each layer, mean ± std over seeds\n{beside}")
    return save(figure, "layers", _numbers(groups[groups["panel"].isin(names)], places))


def _with_top(runs: DataFrame) -> DataFrame:
    """Of runs with a probe of the top layer alone, its numbers under the name of that layer."""
    if "config.layers" not in runs:
        return runs
    found = runs.copy()
    for layers in sorted(set(runs.loc[runs["config.layers"] == "top", "config.n_layers"])):
        own = (runs["config.layers"] == "top") & (runs["config.n_layers"] == layers)
        for kind in ("acc", "control_acc"):
            name = f"test_{kind}_h{layers}"
            before = found[name] if name in found else pd.Series(np.nan, index=found.index)
            found[name] = before.where(~own, found[f"test_{kind}"])
    return found


def _places(runs: DataFrame) -> list[str]:
    """What was read: the embedding, the hidden states from the first layer on, then the cells."""
    found = [match[1] for name in runs.columns if (match := _PLACE.match(name)) and runs[name].notna().any()]
    return sorted(found, key=lambda place: ("ehc".index(place[0]), int(place[1:]) if place != "embed" else 0))


def _name(row: pd.Series) -> str:
    control = "shuffled answers" if row["config.control"] == "shuffled_labels" else "random weights"
    return f"{row['config.target']}, {name_of_net(row)}, {data_of(row)}, against {control}"


def _draw_panel(axes: Axes, groups: DataFrame, places: list[str]) -> list[float]:
    """The groups side by side; returns all that the axis has to hold."""
    own = [place for place in places if groups[f"test_acc_{place}"].notna().any()]
    limits = [Limit("perfect solver", float(groups["test_ceiling"].mean())),
              Limit("best shortcut", float(groups["test_floor"].mean()))]  # fmt: skip
    draw_limits(axes, limits)
    values = [limit.value for limit in limits]
    handles = []
    for i, (_, row) in enumerate(groups.iterrows()):
        at = np.arange(len(own)) + (i - (len(groups) - 1) / 2) * min(0.12, 0.6 / len(groups))
        colour, marker = COLOURS[i], MARKERS[i]
        for kind, face, style in (("acc", colour, "-"), ("control_acc", "white", ":")):
            means, stds = _of(row, kind, own)
            hidden = [j for j, place in enumerate(own) if place[0] != "c"]
            cells = [j for j, place in enumerate(own) if place[0] == "c"]
            for part in filter(None, (hidden, cells)):  # a cell is not the next layer of the hidden states
                axes.errorbar(at[part], means[part], yerr=np.nan_to_num(stds[part]), color=colour, marker=marker,
                              markerfacecolor=face, markersize=5, linewidth=1, linestyle=style, capsize=2,
                              zorder=3)  # fmt: skip
            values += [*(means - np.nan_to_num(stds)), *(means + np.nan_to_num(stds))]
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1, label=_words(row)))
    axes.set_xticks(range(len(own)), [_place_words(place) for place in own])
    axes.set_xlim(-0.5, len(own) - 0.5)
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=7.5)
    return [value for value in values if np.isfinite(value)]


def _of(row: pd.Series, kind: str, places: list[str]) -> tuple[np.ndarray, np.ndarray]:
    names = [f"test_{kind}_{place}" for place in places]
    return row[names].to_numpy(float), row[[f"{name}_std" for name in names]].to_numpy(float)


def _place_words(place: str) -> str:
    return "embedding" if place == "embed" else f"{'layer' if place[0] == 'h' else 'cell'} {place[1:]}"


def _words(row: pd.Series) -> str:
    """ "lstm d64 L2, against random weights: +0.356 ± 0.021 (5)": how much more the top layer's probe has."""
    n = row["n"] if row["n"] == row["of"] else f"{row['n']} of {row['of']}"
    _, net, rest = row["name"].split(", ", 2)
    against = rest.split(", ", 1)[-1]
    std = row["test_selectivity_std"]
    more = with_spread(row["test_selectivity"], None if pd.isna(std) else std)
    return f"{net}, {against}: {'' if more.startswith('-') else '+'}{more} ({n})"


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], color=DARK, marker="o", linewidth=1, label="probe of the trained net"),
        Line2D([], [], color=DARK, marker="o", markerfacecolor="white", linestyle=":", linewidth=1,
               label="its control"),
        Line2D([], [], color=DARK, linestyle=DASHES["perfect solver"], linewidth=1.1, label="perfect solver"),
        Line2D([], [], color=DARK, linestyle=DASHES["best shortcut"], linewidth=1.1,
               label="best shortcut, or always the most frequent answer"),
    ]  # fmt: skip


def _numbers(groups: DataFrame, places: list[str]) -> DataFrame:
    """A row for each group and what was read: means and sample standard deviations over the seeds."""
    rows = []
    for _, row in groups.iterrows():
        for place in places:
            if np.isfinite(row[f"test_acc_{place}"]):
                numbers = {f"{kind}{end}": row[f"test_{kind}_{place}{end}"] for kind in ("acc", "control_acc")
                           for end in ("", "_std")}  # fmt: skip
                rows.append({"name": row["name"], "target": row["config.target"], "run": row["run"], "n": row["n"],
                             "of": row["of"], "place": place, **numbers, "ceiling": row["test_ceiling"],
                             "floor": row["test_floor"]})  # fmt: skip
    return DataFrame(rows)
