"""What the figures of the family show: groups of finished runs, their modes, and how these are called and coloured.

Reaches no torch.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from rnnq.config import check, field_types
from rnnq.errors import InputError
from rnnq.families.groups import templates, theory
from rnnq.families.groups.config import DataConfig, GroupsConfig

if TYPE_CHECKING:
    from torch import Tensor

Save = Callable[[Figure, str, DataFrame], list[Path]]

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f6fc9")
MARKERS = "os^Dv<>P"
DARK, GREY = "#444444", "#999999"
MODES = 6  # of the template, the strongest first, that have a colour; the rest are put together
REST = "other modes"
TYPES = field_types(GroupsConfig)


class Weights(Protocol):
    """Weights of runs over time."""

    def steps(self, run: int) -> Sequence[int]:
        """The steps of which there are weights, in order."""

    def at(self, run: int, step: int) -> Mapping[str, Tensor]:
        """Parameters, (1, ...) each, on the CPU. Raises CheckpointError."""


class Mode(NamedTuple):
    """A mode of the template, and how it is shown."""

    place: int  # in theory.modes
    words: str
    power: float  # the template's
    colour: str
    marker: str


@dataclass(frozen=True, eq=False)
class Group:
    """Finished runs that are equal but for their seeds, the one of lowest loss first."""

    name: str
    of: int  # runs, finished or not
    runs: tuple[int, ...]
    seeds: tuple[int, ...]
    configs: tuple[GroupsConfig, ...]
    templates: tuple[np.ndarray, ...]

    @property
    def config(self) -> GroupsConfig:
        """That of the best run."""
        return self.configs[0]

    @property
    def data(self) -> DataConfig:
        """The group of the algebra, and its template."""
        return self.config.data

    @property
    def template(self) -> np.ndarray:
        """That of the best run."""
        return self.templates[0]

    @property
    def has_one_task(self) -> bool:
        """Whether all runs have one template."""
        return all(np.array_equal(self.template, other) for other in self.templates)

    @property
    def counted(self) -> str:
        """ "n = 3", or "n = 2 of 3" where some have not finished."""
        n = len(self.runs)
        return f"n = {n}" if n == self.of else f"n = {n} of {self.of}"

    @property
    def modes(self) -> list[Mode]:
        """Those of the template that have a colour, the strongest first."""
        known = {mode: place for place, mode in enumerate(theory.modes(self.data))}
        power = theory.power(self.data, self.template)
        names = [plateau.mode for plateau in theory.plateaus(self.data, self.template)[1 : MODES + 1]]
        places = [known[name] for name in names if name is not None]
        return [
            Mode(place, words_of(self.data, place), float(power[place]), COLOURS[i], MARKERS[i])
            for i, place in enumerate(places)
        ]


def words_of(data: DataConfig, place: int) -> str:
    """A mode by its name: "f = 4", "(1, 0)", "ρ2 (3 x 3)" for the representation at place 2, of size 3."""
    mode = theory.modes(data)[place]
    if data.group_name == "cn":
        return f"f = {mode[0]}"
    if data.group_name == "cnxcn":
        return f"({mode[0]}, {mode[1]})"
    return f"ρ{mode[0]} ({mode[1]} x {mode[1]})"


# ---------------------------------------------------------------------------------------------- what there is to show


def groups_of(runs: DataFrame, most: int) -> tuple[list[Group], list[str]]:
    """The groups of lowest mean loss, best first, and remarks on what is left out.

    runs: as of frame.of_rows. A group is left out whose config is not of this version, or whose template cannot be
    drawn here.
    """
    done = runs[(runs["state"] == "done") & np.isfinite(runs["loss"])]
    found: list[tuple[float, Group]] = []
    problems: list[str] = []
    for key, own in done.groupby("group_key", sort=False):
        try:
            group = _group(own.sort_values(["loss", "id"]), int((runs["group_key"] == key).sum()))
        except InputError as error:
            problems.append(error.message)
            continue
        found.append((float(own["loss"].mean()), group))
    best = [group for _, group in sorted(found, key=lambda pair: pair[0])]
    remarks = [f"the best {most} of {len(best)} groups"] if len(best) > most else []
    if problems:
        remarks.append(f"left out: {len(problems)} ({problems[0]})")
    return _told_apart(best[:most]), remarks


def _group(own: DataFrame, of: int) -> Group:
    configs = tuple(config_of(row) for row in own.to_dict("records"))
    first = own.iloc[0]
    drawn = tuple(templates.draw(config) for config in configs)
    seeds = tuple(config.seed for config in configs)
    return Group(str(first["label"]), of, tuple(int(run) for run in own["id"]), seeds, configs, drawn)


def _told_apart(groups: list[Group]) -> list[Group]:
    """Groups of one label get the number of their best run."""
    names = [group.name for group in groups]
    return [
        Group(f"{group.name} (run {group.runs[0]})", *list(vars(group).values())[1:])
        if names.count(group.name) > 1
        else group
        for group in groups
    ]


def config_of(row: Mapping[Any, Any]) -> GroupsConfig:
    """The config of a row of a frame, where nested fields stand with dots. Raises InputError."""
    nested: dict[str, Any] = {}
    for name, value in row.items():
        if not str(name).startswith("config."):
            continue
        *parts, last = str(name).removeprefix("config.").split(".")
        at = nested
        for part in parts:
            at = at.setdefault(part, {})
        at[last] = _value(value, TYPES.get(".".join((*parts, last)), ""))
    config, problems = check(GroupsConfig, nested)
    if config is None:
        raise InputError(problems)
    assert isinstance(config, GroupsConfig)
    return config


def _value(value: Any, kind: str) -> Any:
    """A value of a frame as it was in the config: pandas makes NaN of null, and floats of whole numbers beside it."""
    if kind == "json" and isinstance(value, str):
        return json.loads(value)
    if value is None or value is pd.NA or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def means_of(points: DataFrame, value: str) -> DataFrame:
    """step, n, mean, std over the runs that got so far, at the steps that all of these have."""
    found = points.groupby("step")[value].agg(["count", "mean", "std"]).reset_index().rename(columns={"count": "n"})
    last = np.sort(points.groupby("run")["step"].max().to_numpy())
    return found[found["n"] == len(last) - np.searchsorted(last, found["step"].to_numpy())]


# --------------------------------------------------------------------------------------------------------- the canvas


def plain(text: str, width: int = 48) -> str:
    """Text for a figure: a dollar sign opens no formula, and a long one is cut."""
    return (text if len(text) <= width else text[: width - 1].rstrip() + "…").replace("$", r"\$")


def wrapped(text: str, width: int = 44) -> str:
    """The same in two lines where one is too short."""
    lines = textwrap.wrap(text, width) or [""]
    return "\n".join([plain(lines[0], width), *([plain(" ".join(lines[1:]), width)] if lines[1:] else [])])


def grid_of(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, up to three in a row; one alone is wider."""
    columns = n if n <= 3 else 2 if n == 4 else 3
    rows = math.ceil(n / columns)
    wide = width * (1.6 if columns == 1 else 1.15 if columns == 2 else 1)
    figure = Figure(figsize=(wide * columns, height * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[n:]:
        axes.remove()
    return figure, grid[:n]


def heading(figure: Figure, text: str, remarks: Sequence[str]) -> None:
    """A title, and below it what is to be known beside."""
    figure.suptitle(text + ("\n" + plain("; ".join(remarks), 140) if remarks else ""))


def short(value: float) -> str:
    """A number of a tick or a level: 0.394, 13.89, 2,000."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
