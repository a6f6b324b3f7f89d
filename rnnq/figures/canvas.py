"""What all figures share: their style, how they are saved, their axes and their words."""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from pandas import DataFrame

from rnnq.errors import InputError

DPI = 160
DENSE = 3000  # marks or lines of one layer; more become an image inside an SVG or PDF, so that its file stays small
IMAGES = ("png", "svg", "pdf")
BLUE, RED, GREY, DARK = "#4878a8", "#c1272d", "#999999", "#444444"
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
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "rnnq",  # the same figure is the same file
    "pdf.fonttype": 42,
}

Save = Callable[[Figure, str, DataFrame], list[Path]]


class Scale(StrEnum):
    """How an axis of the metric is divided."""

    auto = "auto"
    linear = "linear"
    log = "log"


class Mark(NamedTuple):
    """How one of several named curves is told from the others: by its colour, and in grey print by its marker."""

    colour: str
    marker: str


MARKS = tuple(
    map(
        Mark,
        ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#8c564b", "#7f6fc9", "#bcbd22"),
        ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*"),
    )
)


# --------------------------------------------------------------------------------------------------------- saving


def images(words: Sequence[str]) -> tuple[str, ...]:
    """The formats that `--image` names, each a word or several with commas. Raises InputError for unknown ones."""
    named = [part.strip().lower() for word in words for part in word.split(",")]
    wrong = [name for name in dict.fromkeys(named) if name not in IMAGES]
    if wrong:
        problems = [f"--image {name or repr(name)}: no format of figures" for name in wrong]
        raise InputError(problems, "png, svg or pdf, or several: --image png,svg")
    return tuple(dict.fromkeys(named)) or IMAGES[:1]


def saver(folder: Path, formats: Sequence[str] = IMAGES[:1]) -> Save:
    """A function that saves a figure and its numbers below a folder, which is made. Raises InputError."""

    def save(figure: Figure, name: str, numbers: DataFrame) -> list[Path]:
        paths = [folder / f"{name}.{suffix}" for suffix in (*formats, "csv")]
        with _translated(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a box in its place will do
            _lay_out(figure)
            for path in paths[:-1]:
                figure.savefig(path, dpi=DPI, **_file_options(path.suffix))
            numbers.to_csv(paths[-1], index=False, lineterminator="\n")
        return paths

    with _translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return save


def _lay_out(figure: Figure) -> None:
    """Once: left to itself, matplotlib goes through everything twice for each file."""
    engine = figure.get_layout_engine()
    if engine is not None:
        figure.set_dpi(DPI)
        engine.execute(figure)
        figure.set_layout_engine(None)


def _file_options(suffix: str) -> dict[str, Any]:
    if suffix == ".png":
        return {"pil_kwargs": {"compress_level": 2}}  # a quarter of the time of 6
    return {"metadata": {"Date" if suffix == ".svg" else "CreationDate": None}}  # the same figure is the same file


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


def rasterize(artist: Artist, n: int) -> None:
    """Let a layer of many marks be an image inside an SVG or PDF; text and axes stay as they are."""
    artist.set_rasterized(n > DENSE)


# ---------------------------------------------------------------------------------------------------------- words


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


def part(n: int, total: int, noun: str) -> str:
    """ "39 of 40 runs"."""
    return f"{n:,} of {count(total, noun)}"


def remarks(*counted: tuple[int, str, str]) -> list[str]:
    """Those of several counts that are not zero, each in its words for one or for many."""
    return [f"{n:,} {one if n == 1 else many}" for n, one, many in counted if n]


def note(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(7, 1.6))
    figure.text(0.5, 0.5, "\n".join(textwrap.wrap(plain(text), 80)), ha="center", va="center", fontsize=11)
    return figure


# ----------------------------------------------------------------------------------------------------------- axes


def fit(
    axes: Axes, metric: Mapping[str, Any], lows: Sequence[float], highs: Sequence[float], scale: Scale = Scale.auto
) -> int:
    """Fit the y axis to runs that lie between `lows` and `highs`; returns how many reach beyond it.

    A run far from all others (ten times the middle half beyond it) is not what the axis is made for. By itself,
    `auto`, the axis is logarithmic where low is good and positive numbers span more than a factor of 50. Numbers
    that are not all positive have a linear axis always; `refused` tells.
    """
    low, high = np.asarray(lows, float), np.asarray(highs, float)
    wide = np.quantile(high, 0.9) > 50 * np.quantile(low, 0.1)
    wanted = scale is Scale.log or (scale is Scale.auto and metric["better"] == "min" and bool(wide))
    logarithmic = wanted and low.min() > 0
    if logarithmic:
        axes.set_yscale("log")
        low, high = np.log10(low), np.log10(high)
    bottom, top = _without_outliers(-low)[1] * -1, _without_outliers(high)[1]
    pad = 0.04 * (top - bottom) or 0.05 * abs(top) or 1.0
    limits = (bottom - pad, top + pad)
    axes.set_ylim(*((10 ** limits[0], 10 ** limits[1]) if logarithmic else limits))
    if logarithmic:
        log_ticks(axes.yaxis, limits[1] - limits[0])
    return int(((low < bottom) | (high > top)).sum())


def refused(axes: Axes, scale: Scale) -> list[str]:
    """The remark that a logarithmic axis was asked for and could not be."""
    if scale is Scale.log and axes.get_yscale() != "log":
        return ["the axis is linear: not all values are positive"]
    return []


def _without_outliers(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value that are not far above all others."""
    lower, upper = np.quantile(values, [0.25, 0.75])
    near = values[values <= upper + 10 * (upper - lower)] if upper > lower else values
    return float(near.min()), float(near.max())


def log_ticks(axis: Axis, decades: float) -> None:
    """Ticks of a logarithmic axis in plain numbers, several even where it spans less than a decade."""
    if decades < 1:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    else:
        within = (1, 2, 3, 5, 7) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
        axis.set_major_locator(LogLocator(subs=within, numticks=12))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number for a tick: 0.05, 1,500, 20k, 1.5M."""
    for least, unit, sign in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:,.6g}{sign}"
    return f"{value:,.6g}"


def log_x(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis around positive numbers."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.06 * (high - low) or 0.1
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - pad), 10 ** (high + pad))
    log_ticks(axes.xaxis, high - low + 2 * pad)


def thousands(axes: Axes, most: int = 6) -> None:
    """Steps as 10,000."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def dot_area(n: int) -> float:
    """The area of a dot of a scatter of n."""
    return 16 if n <= 500 else 7 if n <= 3000 else 3


def is_wide(labels: Sequence[str]) -> bool:
    """Whether a legend of these has room for one column alone."""
    return max(map(len, labels), default=0) > 55


def every(n: int, place: int, of: int) -> tuple[int, int]:
    """Where the curve at a place of several has its markers: up to eight of n points, none below another curve's."""
    gap = max(1, n // 8, min(of, n))
    return (place * gap // of) % gap, gap


def cells(n: int, most: int = 4) -> tuple[int, int]:
    """Rows and columns of n panels."""
    columns = n if n <= 3 else 2 if n == 4 else 3 if n <= 9 else most
    return math.ceil(n / columns), columns


def panels(figure: Figure, n: int, **options: Any) -> list[Axes]:
    """That many axes in a grid that fits them, row by row."""
    rows, columns = cells(n)
    grid: list[Axes] = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for axes in itertools.islice(grid, n, None):
        axes.remove()
    return grid[:n]
