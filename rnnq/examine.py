"""What came of a stage: its best runs as a table, and the figures that every stage has.

Each figure is saved with the numbers that it shows, as `<name>.png` and `<name>.csv`.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter
from pandas import DataFrame, Series
from sqlalchemy import Engine

from rnnq import families, frame, runs
from rnnq.errors import InputError
from rnnq.query import OPEN
from rnnq.runs import StageInfo

BEST = 5  # runs that the legend of a figure names
NAMED = 10  # up to so many curves, all are named
POINTS = 1000  # of a curve that are drawn; a longer one is thinned
NUMBERS = 12  # values of a numeric hyper-parameter that get a place each; more share an axis
TEXTS = 24  # values of another one that do; the rarest of more are put together
LEVELS = 40  # of a panel: runs of one value and one level lie side by side

REST = "(others)"
DPI = 160
BLUE, RED, GREY = "#4878a8", "#c1272d", "#999999"
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#8c564b", "#7f6fc9", "#bcbd22")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.labelsize": 10,
    "figure.titlesize": 11,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}

Row = Mapping[str, Any]
Words = Mapping[str, str]  # metric -> what it is called on an axis, where that is not its name
NO_WORDS: Words = {}
Save = Callable[[Figure, str, DataFrame], list[Path]]


# ------------------------------------------------------------------------------------------------- the best runs


@dataclass(frozen=True)
class Examined:
    """What was asked of a stage, and the runs that answer it."""

    info: StageInfo
    metric: Row  # name, unit, better
    filter: str | None
    rows: list[dict[str, Any]]  # every run of the stage, by id
    best: list[dict[str, Any]]  # the finished ones that fulfil the filter, best first
    frame: DataFrame  # of `rows`

    @property
    def open(self) -> int:
        """Runs of the stage that have not ended yet."""
        return sum(row["state"] in OPEN for row in self.rows)

    def value(self, row: Row) -> float | None:
        """What a run is ranked by."""
        return frame.value(row, self.info, self.metric["name"])


def examine(engine: Engine, stage: str, filter: str | None = None, by: str | None = None) -> Examined:
    """Rank the finished runs of a stage by a metric. Raises InputError for a wrong stage, filter or metric."""
    info = runs.stage_info(engine, stage)
    metric = info.metric(by or info.primary)
    rows = runs.find(engine, stage)
    found = rows if filter is None else runs.find(engine, stage, filter)
    return Examined(info, metric, filter, rows, ranked(found, info, metric), frame.of_rows(rows, info))


def ranked(rows: Sequence[dict[str, Any]], info: StageInfo, metric: Row) -> list[dict[str, Any]]:
    """The finished runs, best first; ties by id, those without the metric last."""
    sign = -1 if metric["better"] == "max" else 1

    def place(row: dict[str, Any]) -> tuple[bool, float, int]:
        value = frame.value(row, info, metric["name"])
        return value is None, sign * (value or 0.0), row["id"]

    return sorted((row for row in rows if row["state"] == "done"), key=place)


def table(found: Examined, limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first `limit` of the best runs, and the columns that tell them apart."""
    fields = frame.varying(found.frame, found.info)
    head = ["id", "label", *(["seed"] if found.frame["seed"].nunique() > 1 else [])]
    known = [str(metric["name"]) for metric in found.info.metrics]
    wanted = (str(found.metric["name"]), found.info.primary, "val_loss")
    metrics = [name for name in dict.fromkeys(wanted) if name in known]
    named = {name: f"config.{name}" if name in {*head, *metrics} else name for name in fields}
    rows = []
    for row in found.best[:limit]:
        config = frame.flat(row["config"])
        values = {name: frame.value(row, found.info, name) for name in metrics}
        rows.append({n: row[n] for n in head} | {named[n]: config.get(n) for n in fields} | values)
    return rows, [*head, *named.values(), *metrics]


def records(found: Examined, limit: int) -> list[dict[str, Any]]:
    """The same runs whole: what JSON shows."""
    same = ("id", "stage", "label", "state", "seed", "attempt", "loss", "config")
    return [
        {name: row[name] for name in same}
        | {"summary": row["summary"] or {}}
        | {name: row[name]["path"] if row[name] else None for name in ("checkpoint", "checkpoint_best")}
        for row in found.best[:limit]
    ]


def promote_words(found: Examined, limit: int) -> list[str] | None:
    """The command that promotes the groups of the runs shown; None when none of them has the metric."""
    groups = {row["group_key"] for row in found.best[:limit] if found.value(row) is not None}
    if not groups:
        return None
    words = ["rnnq", "promote", "--stage", found.info.name]
    if found.metric["name"] != found.info.primary:
        words += ["--by", str(found.metric["name"])]
    if found.filter is not None:
        words += ["--filter", found.filter]
    return [*words, "--top", str(len(groups)), *(["--partial"] if found.open else [])]


# ---------------------------------------------------------------------------------------------------- all figures


def draw(
    engine: Engine, found: Examined, folder: Path, on_figure: Callable[[str], object] = lambda name: None
) -> list[Path]:
    """Draw a stage into a folder; returns what was written. Raises InputError for a folder that cannot be written.

    `on_figure` hears the name of each figure before it is drawn. A family that has figures of its own has a module
    with `draw(runs, curves, save)`, CURVES (those that it draws), and what its metrics are called: WORDS for a
    run's, CURVE_WORDS while it trains.
    """
    module = None if found.info.family_in_source else families.find_figures(found.info.family)
    words, curve_words = getattr(module, "WORDS", NO_WORDS), getattr(module, "CURVE_WORDS", NO_WORDS)
    names = [str(found.metric["name"]), found.info.primary, *getattr(module, "CURVES", ())]
    save = saver(folder)
    with style():
        on_figure("curves")
        curves = frame.curves_frame(engine, found.info.name, list(dict.fromkeys(names)))
        written = save(*curves_figure(found, curves, words, curve_words))
        on_figure("hyperparameters")
        written += save(*hyperparameters_figure(found, words))
        if found.filter is not None and found.best:
            on_figure("hyperparameters_filtered")
            written += save(*hyperparameters_figure(found, words, filtered=True))
        if module is not None:
            on_figure(f"those of {found.info.family}")
            written += module.draw(found.frame, curves, save)
    return written


def saver(folder: Path) -> Save:
    """A function that saves a figure and its numbers below a folder, which is made. Raises InputError."""

    def save(figure: Figure, name: str, numbers: DataFrame) -> list[Path]:
        paths = [folder / f"{name}.png", folder / f"{name}.csv"]
        with _translated(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in its place will do
            figure.savefig(paths[0], dpi=DPI, pil_kwargs={"compress_level": 3})  # a third of the time of 6
            numbers.to_csv(paths[1], index=False, lineterminator="\n")
        return paths

    with _translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return save


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"figures cannot be written to {folder}: {error.strerror}", "--save names a folder") from error


@contextmanager
def style() -> Iterator[None]:
    """Our style, whatever the user's matplotlib is set to."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def plain(text: str, width: int | None = None) -> str:
    """Text for a figure: a dollar sign opens no formula, and a long one is cut."""
    short = text if width is None or len(text) <= width else text[: width - 1].rstrip() + "…"
    return short.replace("$", r"\$")


def heading(figure: Figure, *lines: str) -> None:
    """A title in one or more lines; long ones are wrapped to the width of the figure."""
    width = int(figure.get_figwidth() * 11.5)  # characters
    figure.suptitle("\n".join(plain(part) for line in lines for part in textwrap.wrap(line, width)))


def with_unit(words: str, unit: str) -> str:
    """ "loss (nats/byte)"."""
    return plain(f"{words} ({unit})" if unit else words)


def count(n: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def note(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(7, 1.6))
    figure.text(0.5, 0.5, "\n".join(textwrap.wrap(plain(text), 80)), ha="center", va="center", fontsize=11)
    return figure


def fit(axes: Axes, metric: Row, lows: Sequence[float], highs: Sequence[float]) -> int:
    """Fit the y axis to runs that lie between `lows` and `highs`; returns how many reach beyond it.

    A run far from all others (ten times the middle half beyond it) is not what the axis is made for. Positive
    numbers of which low is good get a logarithmic axis if they span more than a factor of 50.
    """
    low, high = np.asarray(lows, float), np.asarray(highs, float)
    wide = np.quantile(high, 0.9) > 50 * np.quantile(low, 0.1)
    logarithmic = metric["better"] == "min" and low.min() > 0 and bool(wide)
    if logarithmic:
        axes.set_yscale("log")
        low, high = np.log10(low), np.log10(high)
    bottom, top = _without_outliers(-low)[1] * -1, _without_outliers(high)[1]
    pad = 0.04 * (top - bottom) or 0.05 * abs(top) or 1.0
    limits = (bottom - pad, top + pad)
    axes.set_ylim(*((10 ** limits[0], 10 ** limits[1]) if logarithmic else limits))
    return int(((low < bottom) | (high > top)).sum())


def _without_outliers(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value that are not far above all others."""
    lower, upper = np.quantile(values, [0.25, 0.75])
    near = values[values <= upper + 10 * (upper - lower)] if upper > lower else values
    return float(near.min()), float(near.max())


def thousands(axes: Axes) -> None:
    """Steps as 10,000."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


# --------------------------------------------------------------------------------------------------------- curves


def curves_figure(
    found: Examined, curves: DataFrame, words: Words = NO_WORDS, curve_words: Words = NO_WORDS
) -> tuple[Figure, str, DataFrame]:
    """Every run's curve; the best are named, the others coloured by their rank, those without one grey."""
    stage, total = found.info.name, len(found.rows)
    metric = _curve_metric(found, curves)
    points, dropped = _finite(curves[curves["name"] == metric["name"]])
    if not points["run"].duplicated().any():  # a single point is no curve
        text = f"stage {stage}: none of its {count(total, 'run')} has recorded a curve of {metric['name']} yet"
        return note(text), "curves", DataFrame(columns=["run", "label", "rank", "step", metric["name"]])
    points, thinned = _thin(points)
    places = _places(found)
    lines = {int(run): part[["step", "value"]].to_numpy(float) for run, part in points.groupby("run")}

    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.subplots()
    handles = _draw_lines(found, axes, lines, places, words)
    ends = [(line[:, 1].min(), line[:, 1].max()) for line in lines.values()]
    beyond = fit(axes, metric, *zip(*ends, strict=True))
    axes.set_xlim(0, max(line[:, 0].max() for line in lines.values()))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(with_unit(curve_words.get(metric["name"], metric["name"]), metric["unit"]))
    thousands(axes)
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if _is_wide(handles) else 2)
    remarks = _remarks(
        (dropped, "point that is not finite left out", "points that are not finite left out"),
        (beyond, "run reaches beyond the axis", "runs reach beyond the axis"),
    )
    thinning = [f"1 of {thinned} logged points"] if thinned > 1 else []
    heading(figure, f"{stage}: {metric['name']} while training, {len(lines)} of {count(total, 'run')}",
            *[", ".join([*thinning, *remarks])])  # fmt: skip
    return figure, "curves", _curve_numbers(found, points, places, metric["name"])


def _curve_metric(found: Examined, curves: DataFrame) -> Row:
    """The metric that runs are ranked by, where it has curves; else the primary one."""
    steps = curves[curves["name"] == found.metric["name"]].groupby("run")["step"].nunique()
    return found.metric if (steps > 1).any() else found.info.metric(found.info.primary)


def _finite(points: DataFrame) -> tuple[DataFrame, int]:
    kept = points[np.isfinite(points["value"])]
    return kept, len(points) - len(kept)


def _thin(points: DataFrame) -> tuple[DataFrame, int]:
    """Every n-th point of each run and its last one, so that no run has many more than can be told apart."""
    position = points.groupby("run").cumcount()
    every = math.ceil((int(position.max()) + 1) / POINTS)
    if every == 1:
        return points, 1
    last = ~points["run"].duplicated(keep="last")
    return points[(position % every == 0) | last], every


def _places(found: Examined) -> dict[int, int]:
    """Run -> rank among all finished runs of the stage that have the metric, from 1."""
    with_value = [row for row in ranked(found.rows, found.info, found.metric) if found.value(row) is not None]
    return {row["id"]: place for place, row in enumerate(with_value, start=1)}


def _draw_lines(
    found: Examined, axes: Axes, lines: Mapping[int, np.ndarray], places: Mapping[int, int], words: Words
) -> list[Line2D]:
    """Draw curves, the best on top; returns what the legend shows."""
    order = sorted((run for run in lines if run in places), key=lambda run: places[run])
    named = order if len(order) <= NAMED else order[:BEST]
    unranked = [run for run in lines if run not in places]
    axes.add_collection(LineCollection([lines[run] for run in unranked], colors=GREY, linewidths=0.7, alpha=0.6))
    rest = order[len(named) :][::-1]
    if rest:
        bar = _draw_ranked(found, axes, [lines[run] for run in rest], [places[run] for run in rest])
        what = words.get(found.metric["name"], found.metric["name"])
        bar.set_label("rank by " + with_unit(what, found.metric["unit"]))
    by_id = {row["id"]: row for row in found.rows}
    handles = []
    for colour, run in reversed(list(zip(COLOURS, named, strict=False))):
        if rest:
            axes.plot(*lines[run].T, color="white", linewidth=2.6, zorder=3)  # a rim, to stand out from the others
        [line] = axes.plot(*lines[run].T, color=colour, linewidth=1.3, zorder=4)
        line.set_label(f"{places[run]}. {_name(found, by_id[run])}: {_shown(found.value(by_id[run]))}")
        handles.append(line)
    if unranked:
        text = f"{count(len(unranked), 'run')} without a rank: not finished, or no finite {found.metric['name']}"
        handles.insert(0, Line2D([], [], color=GREY, linewidth=0.7, label=plain(text)))
    return handles[::-1]


def _draw_ranked(found: Examined, axes: Axes, lines: Sequence[np.ndarray], places: Sequence[int]) -> Colorbar:
    """Thin lines coloured by rank, with a bar that says which rank and value a colour is."""
    total = max(places)
    collection = LineCollection(lines, array=np.array(places), cmap="viridis", linewidths=0.7, alpha=0.55)
    collection.set_clim(1, total)
    axes.add_collection(collection)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    ticks = sorted({round(1 + share * (total - 1)) for share in (0, 0.25, 0.5, 0.75, 1)})
    best = [row for row in ranked(found.rows, found.info, found.metric) if found.value(row) is not None]
    bar = figure.colorbar(collection, ax=axes, pad=0.01, aspect=35)
    bar.solids.set_alpha(1)  # type: ignore[union-attr]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.set_yticklabels([f"{tick}: {_shown(found.value(best[tick - 1]))}" for tick in ticks])
    if found.metric["better"] == "max":
        bar.ax.invert_yaxis()
    return bar


def _name(found: Examined, row: Row) -> str:
    seed = f", seed {row['seed']}" if found.frame["seed"].nunique() > 1 else ""
    return plain(row["label"], 60) + f" (run {row['id']}{seed})"


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}"


def _is_wide(handles: Sequence[Line2D]) -> bool:
    return max(len(str(handle.get_label())) for handle in handles) > 55


def _remarks(*counted: tuple[int, str, str]) -> list[str]:
    return [f"{n:,} {one if n == 1 else many}" for n, one, many in counted if n]


def _curve_numbers(found: Examined, points: DataFrame, places: Mapping[int, int], name: str) -> DataFrame:
    labels = {row["id"]: row["label"] for row in found.rows}
    numbers = DataFrame({"run": points["run"], "label": points["run"].map(labels)})
    numbers["rank"] = points["run"].map(places).astype("Int64")
    return numbers.assign(step=points["step"], **{name: points["value"]})


# ----------------------------------------------------------------------------------------------- hyper-parameters


def hyperparameters_figure(
    found: Examined, words: Words = NO_WORDS, filtered: bool = False
) -> tuple[Figure, str, DataFrame]:
    """The metric by each hyper-parameter that varies in the stage: a dot a run, and the mean of each value.

    `filtered` shows the runs of the filter alone, in the panels of the whole stage. `words` say what a metric is.
    """
    name, unit = str(found.metric["name"]), found.metric["unit"]
    shown = _values(found, filtered)
    stem = "hyperparameters_filtered" if filtered else "hyperparameters"
    if shown.empty:
        text = f"stage {found.info.name}: no finished run has a finite {name}"
        return note(text), stem, DataFrame(columns=["hyperparameter", "value", "run", name, "n", "mean"])
    panels = _panels(found)
    figure, grid = _grid(len(panels))
    beyond = fit(grid[0], found.metric, shown, shown)
    numbers = [panel.draw(axes, shown) for panel, axes in zip(panels, grid, strict=True)]
    figure.supylabel(with_unit(words.get(name, name), unit))
    figure.legend(handles=_key_handles(), loc="outside lower center", ncols=3)
    heading(figure, *_hyperparameter_lines(found, len(shown), filtered, beyond))
    return figure, stem, pd.concat(numbers).rename(columns={"metric": name})


def _values(found: Examined, filtered: bool) -> Series:
    """The finite metric of each run that is shown, by run."""
    by_run = found.frame.set_index("id")
    values = by_run[frame.column(found.info, found.metric["name"])]
    kept = (by_run["state"] == "done") & np.isfinite(values)
    if filtered:
        kept &= by_run.index.isin([row["id"] for row in found.best])
    return values[kept]


def _hyperparameter_lines(found: Examined, n: int, filtered: bool, beyond: int) -> list[str]:
    total = count(len(found.rows), "run")
    which = f"the {n} of {total} with {found.filter}" if filtered else f"{n} of {total}"
    first = f"{found.info.name}: {found.metric['name']} by hyper-parameter, {which}"
    done = len(found.best) if filtered else sum(row["state"] == "done" for row in found.rows)
    remarks = _remarks(
        (0 if filtered else len(found.rows) - done, "run is not finished", "runs are not finished"),
        (done - n, "has no finite value", "have no finite value"),
        (
            beyond,
            "lies beyond the axis; a mean that does is not drawn",
            "lie beyond the axis; a mean that does is not drawn",
        ),
    )
    nothing = "no hyper-parameter varies: the runs differ by their seeds at most"
    varies = frame.varying(found.frame, found.info)
    return [first, *([] if varies else [nothing]), *([", ".join(remarks)] if remarks else [])]


def _grid(n: int) -> tuple[Figure, list[Axes]]:
    columns = n if n <= 3 else 2 if n == 4 else 3 if n <= 9 else 4
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(max(6.0, 3.7 * columns), 2.9 * rows + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten().tolist()
    for axes in grid[n:]:
        axes.remove()
    return figure, grid[:n]


def _key_handles() -> list[Line2D]:
    dot = Line2D([], [], linestyle="", marker="o", color=BLUE, alpha=0.6, markersize=4, label="one run")
    mean = Line2D([], [], color=RED, linewidth=1, marker="D", markersize=7, markerfacecolor="white")
    mean.set_label("mean of the n runs of a value")
    return [dot, mean]


def _panels(found: Examined) -> list[_Panel]:
    by_run = found.frame.set_index("id")
    fields = frame.varying(found.frame, found.info)
    if not fields:
        return [_ByValue("", Series("all runs", index=by_run.index))]
    made: list[_Panel] = []
    for field in fields:
        values = by_run[frame.CONFIG + field]
        numeric = all(_is_number(value) for value in values)
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
        texts = _with_rest(self.values.map(_text))
        places = [text for text in [*_in_order(self.values), REST] if text in set(texts)]
        place = texts.map({text: i for i, text in enumerate(places)})[shown.index]
        numbers = self._numbers(shown, place)
        axes.set_xlim(-0.5, len(places) - 0.5)
        _draw_swarm(axes, place, shown)
        means = numbers.groupby(place)["mean"].first()
        _draw_means(axes, means.index.to_series(), means, joined=_has_order(self.values))
        _label_places(axes, places, place.value_counts())
        axes.set_xlabel(plain(self.field))
        axes.grid(visible=False, axis="x")
        return numbers


def _label_places(axes: Axes, places: Sequence[str], sizes: Series) -> None:
    """Each value and its n, cut to its share of the 46 characters that a panel is wide; many stand upright."""
    upright = len(places) > 6
    texts = [plain(text, 16 if upright else 46 // len(places)) for text in places]
    labels = [f"{text}{' ' if upright else chr(10)}n={sizes.get(i, 0)}" for i, text in enumerate(texts)]
    axes.set_xticks(range(len(texts)), labels, rotation=90 if upright else 0)


class _ByNumber(_Panel):
    """Many numbers share an axis; the means are over eight parts of about equal size."""

    def draw(self, axes: Axes, shown: Series) -> DataFrame:
        """A scatter."""
        x = self.values[shown.index].astype(float)
        part = pd.qcut(x, 8, labels=False, duplicates="drop") if x.nunique() > 1 else Series(0, index=x.index)
        numbers = self._numbers(shown, part)
        axes.scatter(x, shown, s=9, color=BLUE, alpha=0.5, linewidths=0)
        _draw_means(axes, x.groupby(part).median(), shown.groupby(part).mean(), joined=True)
        if x.min() > 0 and x.max() > 50 * x.min():
            axes.set_xscale("log")
        size = part.value_counts()
        axes.set_xlabel(plain(f"{self.field} (means of {len(size)} parts, n={size.min()} to {size.max()} each)"))
        return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _has_order(values: Series) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _in_order(values: Series) -> list[str]:
    """The values as texts: none, off, on, numbers in their order, then texts in theirs."""

    def place(value: Any) -> tuple[int, float, str]:
        if isinstance(value, (bool, int, float)) and value == value:
            return (1 if isinstance(value, bool) else 2), float(value), ""
        return (0, 0.0, "") if _text(value) == "none" else (3, 0.0, str(value))

    return list(dict.fromkeys(_text(value) for value in sorted(values, key=place)))


def _text(value: Any) -> str:
    if value is None or value is pd.NA or value != value:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return str(value)


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
    size = 4.0 if len(shown) <= 60 else 3.0
    room = 190 / (axes.get_xlim()[1] - axes.get_xlim()[0])  # points of width for a value, of a panel's 230
    step = min(1.2 * size / room, 0.8 / crowd.max())
    axes.scatter(place + sideways * step, shown, s=size**2, color=BLUE, alpha=0.55, linewidths=0)


def _draw_means(axes: Axes, x: Series, means: Series, joined: bool) -> None:
    """See-through diamonds that hide no run; those beyond the axis are left out, and nothing leads there."""
    bottom, top = axes.get_ylim()
    inside = means.where(means.between(bottom, top))
    if joined:
        axes.plot(x, inside, color=RED, linewidth=1, zorder=3)
    axes.scatter(x, inside, s=50, marker="D", facecolors=(1, 1, 1, 0.35), edgecolors=RED, linewidths=1.5, zorder=4)
