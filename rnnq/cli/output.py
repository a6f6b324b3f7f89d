"""Rows to stdout as a table, JSON or CSV; remarks to stderr. Readable without colour."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rnnq.cli.options import Format


def console() -> Console:
    """Standard output; piped, a table is as wide as it needs to be."""
    wide = None if sys.stdout.isatty() else 250
    return Console(width=wide, highlight=False, soft_wrap=False)


def remark(text: str) -> None:
    """A line for people, on stderr."""
    sys.stderr.write(text + "\n")


def say(text: str) -> None:
    """A line of output."""
    sys.stdout.write(text + "\n")


def rows(format: Format, found: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str | None = None) -> None:
    """Print rows. JSON has every field of a row; a table and CSV have the columns."""
    if format is Format.json:
        as_json(list(found))
    elif format is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_plain(row.get(name)) for name in columns] for row in found)
    else:
        table(found, columns, title)


def as_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


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
    return str(value)


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


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


def count(n: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
