"""Rows to stdout as a table, JSON or CSV; remarks to stderr. Readable without colour."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rnnq.cli.options import Format

T = TypeVar("T")
PATIENCE = 0.5  # seconds after which what takes longer is shown


def console() -> Console:
    """Standard output; piped, a table is as wide as it needs to be."""
    wide = None if sys.stdout.isatty() else 250
    return Console(width=wide, highlight=False, soft_wrap=False)


def harmless(text: str) -> str:
    """Control codes escaped, but tabs and ends of lines: a terminal obeys them, and a database may come from anywhere.

    Those that a JSON document may hold as they are, and halves of pairs, which no encoding has, as JSON escapes them.
    """
    return _CODES.sub(lambda sign: f"\\x{ord(sign[0]):02x}" if sign[0] < " " else f"\\u{ord(sign[0]):04x}", text)


_CODES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def remark(text: str) -> None:
    """A line for people, on stderr."""
    sys.stderr.write(harmless(text) + "\n")


def say(text: str) -> None:
    """A line of output."""
    sys.stdout.write(harmless(text) + "\n")


def rows(format: Format, found: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str | None = None) -> None:
    """Print rows. JSON has every field of a row; a table and CSV have the columns."""
    if format is Format.json:
        as_json(list(found))
    elif format is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        plain = _plain_here if sys.stdout.isatty() else _plain
        writer.writerows([plain(row.get(name)) for name in columns] for row in found)
    else:
        table(found, columns, title)


def as_json(value: Any) -> None:
    """One JSON document on stdout."""
    say(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(found: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str | None = None) -> None:
    """A table; numbers to the right. Columns that are empty in every row are left out."""
    if not found:
        return
    shown = [name for name in columns if any(row.get(name) not in (None, "") for row in found)]
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in shown:
        numeric = all(isinstance(row.get(name), (int, float, type(None))) for row in found)
        made.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in found:
        made.add_row(*(escape(cell(row.get(name))) for name in shown))
    console().print(made)


def cell(value: Any) -> str:
    """A value for people."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return harmless(str(value))


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _plain_here(value: Any) -> Any:
    """A value of CSV on a terminal; a file gets it as it is."""
    found = _plain(value)
    return harmless(found) if isinstance(found, str) else found


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal: a bar for each thing that takes longer than PATIENCE. Told: what, how much is done, of how much.

    A total of 0 is one that nobody knows.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}
    began = time.monotonic()
    with ExitStack() as stack:

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what)
            shown.update(tasks[what], completed=done, total=total or None)
            if not shown.live.is_started and time.monotonic() - began > PATIENCE:
                stack.enter_context(shown)

        yield watch


def counted(items: Iterable[T], what: str) -> Iterator[T]:
    """The items of something that has a length, with a bar for what is done of them."""
    total = len(items)  # type: ignore[arg-type]
    with bars() as watch:
        for done, item in enumerate(items, start=1):
            yield item
            if done % 100 == 0:  # each telling costs as much as some items do
                watch(what, done, total)


def duration(seconds: float | None) -> str:
    """Seconds for people: "42 s", "3 min 05 s", "2 h 10 min", "3 d 4 h"."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(n: float) -> str:
    """Bytes for people: "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def count(n: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
