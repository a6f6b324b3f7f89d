"""The graph of a study as a picture: boxes for stages, a band for each phase, arrows for what waits for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path as MplPath
from pandas import DataFrame

from rnnq.figures import canvas
from rnnq.figures.canvas import DARK, GREY, RED, plain
from rnnq.graph import Arrow, Graph, Node, by_phase

# by the state that says most of a stage; light, so that black text reads well on each
COLOURS = {
    "running": "#f7d774",
    "pending": "#ffffff",
    "waiting": "#dcdcdc",
    "done": "#b9dfb4",
    "failed": "#f2a7a0",
    "skipped": "#f3f1ea",
    "cancelled": "#f3f1ea",
}
GREEN = "#3f8f3a"
BOX, ROW, COLUMN = (2.15, 0.62), 1.0, 3.85  # inches: a box, and the distance of two, below and beside each other
TOP = 0.65  # of the middle of the first row
NAME = 30  # characters of a line in a box
LABEL = 27  # of a line on an arrow
PHASE = 22


@dataclass(frozen=True)
class Place:
    """Where a box stands: its column, and its row from the top."""

    column: int
    row: float


def layout(nodes: Sequence[Node]) -> tuple[dict[str, Place], list[tuple[str | None, float, float]]]:
    """A place for each stage, and the band of rows of each phase, from the top.

    A stage's column is how many come before it. In a band each takes the row, among those that are free in its column,
    that is nearest to what it waits for, so that arrows are short.
    """
    places: dict[str, Place] = {}
    bands: list[tuple[str | None, float, float]] = []
    top = 0
    for phase, found in by_phase(nodes):
        taken: set[tuple[int, int]] = set()
        for node in sorted(found, key=lambda node: node.depth):
            rows = [places[arrow.stage].row for arrow in node.after if arrow.stage in places]
            near = sum(rows) / len(rows) if rows else float(top)
            row = min(_free(node.depth, top, taken, len(found)), key=lambda row: (abs(row - near), row))
            taken.add((node.depth, row))
            places[node.stage] = Place(node.depth, row)
        top = _packed(places, [node.stage for node in found], top)
        bands.append((phase, min(places[node.stage].row for node in found), top - 1))
    return places, bands


def _free(column: int, top: int, taken: set[tuple[int, int]], n: int) -> list[int]:
    return [row for row in range(top, top + n) if (column, row) not in taken]


def _packed(places: dict[str, Place], names: Sequence[str], top: int) -> int:
    """Close the rows of a band that nobody stands in; the first row of the next band."""
    used = sorted({places[name].row for name in names})
    for name in names:
        places[name] = Place(places[name].column, top + used.index(places[name].row))
    return top + len(used)


def draw(found: Graph) -> tuple[Figure, DataFrame]:
    """The picture, and a row for each arrow and for each stage without one."""
    places, bands = layout(found.nodes)
    columns = max(place.column for place in places.values()) + 1
    rows = int(max(place.row for place in places.values())) + 1
    named = any(phase is not None for phase, _, _ in bands)
    left = 1.75 if named else 0.35
    size = (left + columns * COLUMN - (COLUMN - BOX[0]) + 0.35, rows * ROW + 0.8)
    size = (max(size[0], 6.5), size[1])
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)  # inches from the top
    _draw_bands(axes, bands, size[0], named)
    centre = {name: (left + place.column * COLUMN, TOP + place.row * ROW) for name, place in places.items()}
    lanes: Counter[float] = Counter()
    for node in found.nodes:
        for parent, arrows in _by_parent(node).items():
            if parent in centre:
                _draw_arrow(axes, node, arrows, centre, lanes)
    for node in found.nodes:
        _draw_box(axes, node, *centre[node.stage])
    _draw_legend(figure, found, size)
    return figure, DataFrame(_rows(found, places))


def _draw_bands(axes: Axes, bands: Sequence[tuple[str | None, float, float]], width: float, named: bool) -> None:
    for number, (phase, first, last) in enumerate(bands):
        top, bottom = TOP + first * ROW - ROW / 2, TOP + last * ROW + ROW / 2
        if number % 2 == 0 and len(bands) > 1:
            axes.axhspan(top, bottom, facecolor="#f5f8fb", zorder=0)
        if named:
            words = "\n".join(wrap(plain(phase or "without a phase"), PHASE))
            axes.text(0.12, (top + bottom) / 2, words, ha="left", va="center", fontsize=8.5, color=DARK, zorder=1)
    axes.set_xlim(0, width)


def _draw_box(axes: Axes, node: Node, x: float, y: float) -> None:
    width, height = BOX
    stale = bool(node.stale)
    is_out = node.state in ("skipped", "cancelled")
    box = FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.07", facecolor=COLOURS[node.state],
        edgecolor=RED if stale else DARK, linewidth=1.6 if stale else 0.8, linestyle="--" if is_out else "-", zorder=4,
    )  # fmt: skip
    axes.add_patch(box)
    name = plain(node.stage, NAME)
    middle = x + width / 2
    runs = ", ".join(f"{n:,} {state}" for state, n in node.runs.items())
    size = 8.0 if len(name) <= 26 else 7.2
    axes.text(middle, y - 0.17, name, ha="center", va="center", fontsize=size, weight="bold", zorder=5)
    axes.text(middle, y + 0.02, plain(runs, 34), ha="center", va="center", fontsize=7.5, zorder=5)
    axes.text(middle, y + 0.19, plain(_facts(node), 40), ha="center", va="center", fontsize=6.8, color=DARK, zorder=5)


def _facts(node: Node) -> str:
    parts = [f"priority {node.priority[1]}"] + (["paused"] if node.paused else [])
    if node.spent.seconds:
        parts.append(f"cost {duration(node.spent.seconds)}")
    if node.to_go_s or node.waiting_s:
        parts.append(f"{'to go' if node.to_go_s else 'if let go on'} {duration(node.to_go_s or node.waiting_s)}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _by_parent(node: Node) -> dict[str, list[Arrow]]:
    """What a stage waits for: a stage may have to hold a condition, and be where weights come from, too."""
    found: dict[str, list[Arrow]] = {}
    for arrow in node.after:
        found.setdefault(arrow.stage, []).append(arrow)
    return found


def _draw_arrow(
    axes: Axes, node: Node, arrows: Sequence[Arrow], centre: Mapping[str, tuple[float, float]], lanes: Counter[float]
) -> None:
    """From the right side of a box to the left side of another, with its condition before the tip."""
    (x0, y0), (x1, y1) = centre[arrows[0].stage], centre[node.stage]
    shift = _shift(node, arrows[0].stage)
    path = _path((x0 + BOX[0], y0), (x1, y1 + shift), lanes)
    patch = FancyArrowPatch(
        path=path, arrowstyle="-|>", mutation_scale=9, color=_colour(node, arrows), linewidth=1.0,
        linestyle="--" if any(arrow.start for arrow in arrows) else "-", shrinkA=0, shrinkB=0, zorder=2,
    )  # fmt: skip
    axes.add_patch(patch)
    said = [f"{arrow.where}: {arrow.when}" if arrow.where and arrow.when else arrow.when or arrow.where for arrow in arrows]
    if words := " and ".join(dict.fromkeys(one for one in said if one)):
        label = "\n".join(wrap(plain(words), LABEL)[:3])
        # a box behind it, not an outline around its letters: so it stays text in an SVG
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
        axes.text(x1 - 0.17, y1 + shift, label, ha="right", va="center", fontsize=6.8, color=DARK, zorder=3,
                  bbox=behind, linespacing=0.95)  # fmt: skip


def _path(start: tuple[float, float], end: tuple[float, float], lanes: Counter[float]) -> MplPath:
    """A curve that leaves and arrives level. One that passes other columns does so between two rows of boxes."""
    (x0, y0), (x1, y1) = start, end
    gap = COLUMN - BOX[0]
    if x1 - x0 <= gap + 0.01:
        middle = (x0 + x1) / 2
        return MplPath([start, (middle, y0), (middle, y1), end], _CURVE)
    row = round((y1 - TOP) / ROW)
    lane = TOP + (row - 0.5 if y1 >= y0 else row + 0.5) * ROW
    lanes[lane] += 1  # several that pass there lie side by side
    lane += 0.06 * ((lanes[lane] % 5) - 2)
    first, last = x0 + gap * 0.75, x1 - gap * 0.75
    into = [start, ((x0 + first) / 2, y0), ((x0 + first) / 2, lane), (first, lane)]
    out = [(last, lane), ((last + x1) / 2, lane), ((last + x1) / 2, y1), end]
    return MplPath(into + out, [*_CURVE, MplPath.LINETO, *_CURVE[1:]])


_CURVE = [MplPath.MOVETO, MplPath.CURVE4, MplPath.CURVE4, MplPath.CURVE4]


def _shift(node: Node, parent: str) -> float:
    """Several arrows end one below the other."""
    parents = list(_by_parent(node))
    place = parents.index(parent) - (len(parents) - 1) / 2
    return place * min(0.2, (BOX[1] - 0.1) / len(parents))


def _colour(node: Node, arrows: Sequence[Arrow]) -> str:
    """Of an arrow whose gate is decided: whether it was what stood in the way."""
    entries = [one for arrow in arrows for one in node.seen_of(arrow)]
    if any(gate.decision is None for gate in node.gates) or not entries:
        return GREY
    shut = any(gate.decision == "shut" for gate in node.gates)
    against = [one for one in entries if one.get("holds") is False or one["ended_badly"] or not one["of"]]
    return RED if shut and against else GREEN


def _decision(node: Node) -> str | None:
    found = {gate.decision for gate in node.gates}
    return found.pop() if len(found) == 1 else None


def _draw_legend(figure: Figure, found: Graph, size: tuple[float, float]) -> None:
    states = [state for state in COLOURS if any(node.state == state for node in found.nodes)]
    handles: list[Any] = [Patch(facecolor=COLOURS[state], edgecolor=DARK, linewidth=0.8, label=state) for state in states]
    handles += [
        Line2D([], [], color=GREY, linewidth=1.2, label="waits for"),
        Line2D([], [], color=GREY, linewidth=1.2, linestyle="--", label="starts from its weights"),
    ]
    decisions = {_decision(node) for node in found.nodes}
    handles += [Line2D([], [], color=GREEN, lw=1.2, label="let go on")] if "open" in decisions else []
    handles += [Line2D([], [], color=RED, lw=1.2, label="stood in the way")] if "shut" in decisions else []
    if any(node.stale for node in found.nodes):
        handles.append(Patch(facecolor="none", edgecolor=RED, linewidth=1.6, label="stale: another decision today"))
    columns = max(2, int(size[0] / 1.55))
    figure.legend(handles=handles, loc="lower center", ncols=min(columns, len(handles)), fontsize=7.5)


def _rows(found: Graph, places: Mapping[str, Place]) -> list[dict[str, Any]]:
    """What is drawn, as numbers: a row for each arrow, and one for each stage that waits for nothing."""
    rows = []
    for node in found.nodes:
        own = {name: value for name, value in node.as_row().items() if not isinstance(value, (list, dict))}
        place = places[node.stage]
        own |= {"state": node.state, "column": place.column, "row": place.row}
        arrows = node.after or (None,)
        for arrow in arrows:
            of = {} if arrow is None else {"waits_for": arrow.stage, "where": arrow.where, "when": arrow.when}
            also = {} if arrow is None else {"same_seed": arrow.same_seed, "takes_weights": arrow.start}
            rows.append({**own, **of, **also, "decision": _decision(node)})
    return rows


def save(found: Graph, folder: Path) -> list[Path]:
    """Draw a graph into a folder as plan.png and plan.svg, with its numbers beside them. Raises InputError."""
    with canvas.style():
        figure, numbers = draw(found)
        return canvas.saver(folder, ("png", "svg"))(figure, "plan", numbers)
