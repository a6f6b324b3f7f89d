"""What each hyper-parameter does: the metric by its values, a dot a run, and the mean of each value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame, Series

from rnnq import frame
from rnnq.figures import canvas
from rnnq.figures.canvas import BLUE, RED, Scale, with_unit
from rnnq.figures.subject import NO_WORDS, Examined, Words

NUMBERS = 12  # values of a numeric hyper-parameter that get a place each; more share an axis
TEXTS = 24  # values of another one that do; the rarest of more are put together
MANY = 2000  # runs of which dots are smaller
LEVELS = 40  # of a panel: runs of one value and one level lie side by side
WIDE = 40  # characters of a name below a panel
REST = "(others)"


def hyperparameters_figure(
    found: Examined, words: Words = NO_WORDS, filtered: bool = False, scale: Scale = Scale.auto
) -> tuple[Figure, str, DataFrame]:
    """The metric by each hyper-parameter that varies in the stage: a dot a run, and the mean of each value.

    `filtered` shows the runs of the filter alone, in the panels of the whole stage. `words` say what a metric is.
    """
    name, unit = found.name, found.metric["unit"]
    shown = found.shown(filtered)["metric"]
    stem = "hyperparameters_filtered" if filtered else "hyperparameters"
    if shown.empty:
        text = f"stage {found.info.name}: no finished run has a finite {name}"
        return canvas.note(text), stem, DataFrame(columns=["hyperparameter", "value", "run", name, "n", "mean"])
    panels = _panels(found)
    rows, columns = canvas.cells(len(panels))
    figure = Figure(figsize=(max(6.0, 3.7 * columns), 2.9 * rows + 1.1), layout="constrained")
    grid = canvas.panels(figure, len(panels), sharey=True)
    beyond = canvas.fit(grid[0], found.metric, shown, shown, scale)
    numbers = [panel.draw(axes, shown) for panel, axes in zip(panels, grid, strict=True)]
    figure.supylabel(with_unit(words.get(name, name), unit))
    figure.legend(handles=_key_handles(), loc="outside lower center", ncols=3)
    lines = _hyperparameter_lines(found, len(shown), filtered, beyond)
    canvas.heading(figure, *lines, *canvas.refused(grid[0], scale))
    return figure, stem, pd.concat(numbers).rename(columns={"metric": name})


def _hyperparameter_lines(found: Examined, n: int, filtered: bool, beyond: int) -> list[str]:
    part = canvas.part(n, len(found.rows), "run")
    which = f"the {part} with {found.filter}" if filtered else part
    first = f"{found.info.name}: {found.metric['name']} by hyper-parameter, {which}"
    done = len(found.best) if filtered else found.finished
    remarks = canvas.remarks(
        (0 if filtered else len(found.rows) - done, "run is not finished", "runs are not finished"),
        (done - n, "has no finite value", "have no finite value"),
        (
            beyond,
            "lies beyond the axis; a mean that does is not drawn",
            "lie beyond the axis; a mean that does is not drawn",
        ),
    )
    nothing = "no hyper-parameter varies: the runs differ by their seeds at most"
    return [first, *([] if found.varying else [nothing]), *([", ".join(remarks)] if remarks else [])]


def _key_handles() -> list[Line2D]:
    dot = Line2D([], [], linestyle="", marker="o", color=BLUE, alpha=0.6, markersize=4, label="one run")
    mean = Line2D([], [], color=RED, linewidth=1, marker="D", markersize=7, markerfacecolor="white")
    mean.set_label("mean of the n runs of a value")
    return [dot, mean]


def _panels(found: Examined) -> list[_Panel]:
    by_run = found.frame.set_index("id")
    if not found.varying:
        return [_ByValue("", Series("all runs", index=by_run.index))]
    made: list[_Panel] = []
    for field in found.varying:
        values = by_run[frame.CONFIG + field]
        numeric = all(is_number(value) for value in values)
        made.append((_ByNumber if numeric and values.nunique() > NUMBERS else _ByValue)(field, values))
    return made


@dataclass(frozen=True)
class _Panel:
    """One hyper-parameter."""

    field: str
    values: Series  # by run, of the whole stage

    def draw(self, axes: Axes, shown: Series) -> DataFrame:
        """Draw the runs that are shown; returns a row for each: hyperparameter, value, run, metric, n, mean."""
        raise NotImplementedError

    def _numbers(self, shown: Series, group: Series) -> DataFrame:
        """The numbers of a panel whose means are over `group`."""
        by_group = shown.groupby(group)
        return DataFrame({
            "hyperparameter": self.field,
            "value": self.values[shown.index].astype(object),  # beside numbers of other panels, True stays True
            "run": shown.index,
            "metric": shown,
            "n": by_group.transform("size"),
            "mean": by_group.transform("mean"),
        })  # fmt: skip


class _ByValue(_Panel):
    """A place for each value: numbers in their order, booleans as off and on."""

    def draw(self, axes: Axes, shown: Series) -> DataFrame:
        """A swarm: runs of about equal value lie side by side."""
        texts = _with_rest(texts_of(self.values))
        there = set(texts)
        places = [text for text in [*_in_order(frame.distinct(self.values)), REST] if text in there]
        place = texts.map({text: i for i, text in enumerate(places)})[shown.index]
        numbers = self._numbers(shown, place)
        axes.set_xlim(-0.5, len(places) - 0.5)
        _draw_swarm(axes, place, shown)
        means = numbers.groupby(place)["mean"].first()
        _draw_means(axes, means.index.to_series(), means, joined=_has_order(self.values))
        _label_places(axes, places, place.value_counts())
        axes.set_xlabel(canvas.plain(self.field, WIDE))
        axes.grid(visible=False, axis="x")
        return numbers


def _label_places(axes: Axes, places: Sequence[str], sizes: Series) -> None:
    """Each value and its n, cut to its share of the 46 characters that a panel is wide; many stand upright."""
    upright = len(places) > 6
    texts = [canvas.plain(text, 16 if upright else 46 // len(places)) for text in places]
    labels = [f"{text}{' ' if upright else chr(10)}n={sizes.get(i, 0):,}" for i, text in enumerate(texts)]
    axes.set_xticks(range(len(texts)), labels, rotation=90 if upright else 0)


class _ByNumber(_Panel):
    """Many numbers share an axis; the means are over eight parts of about equal size."""

    def draw(self, axes: Axes, shown: Series) -> DataFrame:
        """A scatter."""
        x = self.values[shown.index].astype(float)
        part = pd.qcut(x, 8, labels=False, duplicates="drop") if x.nunique() > 1 else Series(0, index=x.index)
        numbers = self._numbers(shown, part)
        dots = axes.scatter(x, shown, s=9 if len(x) <= MANY else 4, color=BLUE, alpha=0.5, linewidths=0)
        canvas.rasterize(dots, len(x))
        _draw_means(axes, x.groupby(part).median(), shown.groupby(part).mean(), joined=True)
        if x.min() > 0 and x.max() > 50 * x.min():
            axes.set_xscale("log")
        size = part.value_counts()
        of = f" (means of {len(size)} parts, n={size.min()} to {size.max()} each)"
        axes.set_xlabel(canvas.plain(self.field, WIDE) + of)
        return numbers


def is_number(value: Any) -> bool:
    """Whether it is a number that is there, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _has_order(values: Series) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _in_order(values: Iterable[Any]) -> list[str]:
    """The values as texts: none, off, on, numbers in their order, then texts in theirs."""

    def place(value: Any) -> tuple[int, float, str]:
        if isinstance(value, (bool, int, float)) and value == value:
            return (1 if isinstance(value, bool) else 2), float(value), ""
        return (0, 0.0, "") if text_of(value) == "none" else (3, 0.0, str(value))

    return list(dict.fromkeys(text_of(value) for value in sorted(values, key=place)))


def text_of(value: Any) -> str:
    """A value of a hyper-parameter for people."""
    if value is None or value is pd.NA or value != value:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return str(value)


def texts_of(values: Series) -> Series:
    """The same for each of many, of which most are equal."""
    if values.dtype == object:  # where True and 1 would be one key
        return values.map(text_of)
    return values.map({value: text_of(value) for value in frame.distinct(values)})


def _with_rest(texts: Series) -> Series:
    """Texts, of which the rarest are put together when there are too many for a place each."""
    often = texts.value_counts().index
    return texts if len(often) <= TEXTS else texts.where(texts.isin(often[: TEXTS - 1]), REST)


def _draw_swarm(axes: Axes, place: Series, shown: Series) -> None:
    """Dots in their place, side by side where they are at one level; closer together where they are many.

    Never the time, nor the overflow, of a swarm that avoids each touch.
    """
    bottom, top = axes.get_ylim()
    values = shown
    if axes.get_yscale() == "log":
        values, bottom, top = np.log10(shown), math.log10(bottom), math.log10(top)
    level = ((values - bottom) / (top - bottom) * LEVELS).clip(-1, LEVELS).astype(int)
    together = shown.groupby([place, level])
    crowd, turn = together.transform("size"), together.cumcount()
    sideways = (turn + 1) // 2 * np.where(turn % 2, 1, -1) - np.where(crowd % 2, 0.0, 0.5)  # 0, 1, -1, 2, -2, ...
    size = 4.0 if len(shown) <= 60 else 3.0 if len(shown) <= MANY else 2.0
    room = 190 / (axes.get_xlim()[1] - axes.get_xlim()[0])  # points of width for a value, of a panel's 230
    step = min(1.2 * size / room, 0.8 / crowd.max())
    dots = axes.scatter(place + sideways * step, shown, s=size**2, color=BLUE, alpha=0.55, linewidths=0)
    canvas.rasterize(dots, len(shown))


def _draw_means(axes: Axes, x: Series, means: Series, joined: bool) -> None:
    """See-through diamonds that hide no run; those beyond the axis are left out, and nothing leads there."""
    bottom, top = axes.get_ylim()
    inside = means.where(means.between(bottom, top))
    if joined:
        axes.plot(x, inside, color=RED, linewidth=1, zorder=3)
    axes.scatter(x, inside, s=50, marker="D", facecolors=(1, 1, 1, 0.35), edgecolors=RED, linewidths=1.5, zorder=4)
