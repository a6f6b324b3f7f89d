"""Rows on a screen that may be narrow: columns are left out by importance, never folded into one another."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from rnnq.cli import output

GAP = 2  # cells between two columns


@dataclass(frozen=True)
class Column:
    """A column and what becomes of it where there is little room: the highest rank goes first, rank 0 never.

    One with `least` may be cut to so many cells before any column goes: at its end, or from its beginning. A `plain`
    one needs no title to be understood.
    """

    name: str
    title: str
    rank: int
    right: bool = False
    least: int | None = None
    from_the_left: bool = False
    plain: bool = False


Rows = Sequence[Mapping[str, Any]]


def widths(rows: Rows, columns: Sequence[Column], width: int | None) -> dict[Column, int]:
    """The columns that fit side by side, and how wide each is. Those without content are left out."""
    natural = {column: _natural(rows, column) for column in columns}
    shown = [column for column in columns if natural[column]]
    if width is None:
        return {column: natural[column] for column in shown}
    while shown and _sum(least := _least(natural, shown)) > width:
        last = max(shown, key=lambda column: column.rank)
        if last.rank == 0:
            return _squeezed(least, width)
        shown.remove(last)
    found = _least(natural, shown)
    for column in sorted(shown, key=lambda column: column.rank):  # what is left over, to the most important first
        found[column] += min(natural[column] - found[column], width - _sum(found))
    return found


def all_fit(rows: Rows, columns: Sequence[Column], width: int | None) -> bool:
    """Whether no column with content has to go."""
    return len(widths(rows, columns, width)) == len(widths(rows, columns, None))


def _natural(rows: Rows, column: Column) -> int:
    """Cells that a column needs; 0 when it is empty in every row."""
    cells = max((cell_len(text_of(row, column)) for row in rows), default=0)
    return max(cells, cell_len(column.title)) if cells else 0


def _least(natural: Mapping[Column, int], shown: Sequence[Column]) -> dict[Column, int]:
    return {column: min(natural[column], column.least or natural[column]) for column in shown}


def _sum(found: Mapping[Column, int]) -> int:
    return sum(found.values()) + GAP * (len(found) - 1)


def _squeezed(found: dict[Column, int], width: int) -> dict[Column, int]:
    """What must be shown on a screen that is too narrow even for that: the widest gives way."""
    while found and _sum(found) > width and max(found.values()) > 1:
        found[max(found, key=lambda column: found[column])] -= 1
    return found


def text_of(row: Mapping[str, Any], column: Column) -> str:
    """A cell as one line of text."""
    value = row.get(column.name)
    return "" if value is None else output.harmless(" ".join(str(value).split()))


def table(rows: Rows, columns: Sequence[Column], width: int | None) -> list[Text]:
    """A line of titles and a line for each row; a row's `style` says how its line looks."""
    shown = widths(rows, columns, width)
    head = [Text(_line([(column.title, column, cells) for column, cells in shown.items()]), "bold")]
    return head + [
        Text(_line([(text_of(row, column), column, cells) for column, cells in shown.items()]), row.get("style") or "")
        for row in rows
    ]


def _line(cells: Sequence[tuple[str, Column, int]]) -> str:
    return (" " * GAP).join(_cell(text, column, width) for text, column, width in cells).rstrip()


def _cell(text: str, column: Column, width: int) -> str:
    text = cut(text, width, column.from_the_left)
    room = width - cell_len(text)
    return " " * room + text if column.right else text + " " * room


def cut(text: str, width: int, from_the_left: bool = False) -> str:
    """A text that is too long, with … where something is missing."""
    if cell_len(text) <= width:
        return text
    if not from_the_left:
        return set_cell_size(text, max(width - 1, 0)).rstrip() + "…"
    while cell_len(text) > max(width - 1, 0):
        text = text[1:]
    return "…" + text


def paragraphs(rows: Rows, columns: Sequence[Column], width: int | None) -> list[str]:
    """Rows without a table, for a screen on which it does not fit: the first column, and all others below it."""
    lines = []
    for row in rows:
        first, *rest = (text_of(row, column) for column in columns)
        named = zip(columns[1:], rest, strict=True)
        words = [text if column.plain else f"{column.title} {text}" for column, text in named if text]
        lines += [*_filled([first], width, ""), *_filled(words, width, "  ")]
    return lines


def _filled(parts: Sequence[str], width: int | None, indent: str) -> list[str]:
    """Parts with commas between them; a line ends inside of one only where it has no room for it alone."""
    from textwrap import wrap

    lines: list[str] = []
    for i, part in enumerate(parts):
        part += "," if i < len(parts) - 1 else ""
        if lines and (width is None or cell_len(f"{lines[-1]} {part}") <= width):
            lines[-1] += f" {part}"
        else:
            lines += wrap(part, width or 10_000, initial_indent=indent, subsequent_indent=indent)
    return lines


# ------------------------------------------------------------------------------------------------------- the screen


def screen() -> int | None:
    """Cells of a line of the terminal; None for a pipe or a file, where a line may be as long as it needs to be."""
    return output.console().width if sys.stdout.isatty() else None


def say(text: str, later: str = "  ", first: str = "") -> None:
    """A line of output, wrapped on a terminal: the first one indented so, the later ones so."""
    from textwrap import wrap

    clean = output.harmless(" ".join(text.split()))
    width = screen() or 10_000
    for line in wrap(clean, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False):
        output.say(line)


def show(rows: Rows, columns: Sequence[Column]) -> None:
    """A table, or, where it does not fit, paragraphs."""
    width = screen()
    if all_fit(rows, columns, width):
        for line in table(rows, columns, width):
            output.say(line.plain)
    else:
        for words in paragraphs(rows, columns, width):
            output.say(words)
