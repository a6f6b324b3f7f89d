"""rnnq logs: what runs print while they are trained."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db, RunId
from rnnq.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Engine


def logs(
    run: RunId,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Only this attempt; default: all.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the run is running.")] = False,
    db: Db = DB,
) -> None:
    """What a run printed, attempt by attempt, and the trace of one that failed."""
    from rnnq import db as database
    from rnnq import runs as study

    engine = database.open(db)
    state, found = study.attempts(engine, run)
    numbers = [row["attempt"] for row in found]
    if attempt is not None and attempt not in numbers:
        raise InputError(f"run {run} has no attempt {attempt}; it has {', '.join(map(str, numbers)) or 'none yet'}")
    reader = _Reader(engine, run)
    silent = not any([reader.show(row) for row in found if attempt in (None, row["attempt"])])
    if follow and (attempt is None or attempt == max(numbers)):
        reader.follow(state)
    elif silent:
        output.remark(f"run {run} has printed nothing" if numbers else f"run {run} has not begun yet")


class _Reader:
    """Shows the logs of a run, from where the last look ended."""

    def __init__(self, engine: Engine, run: int) -> None:
        from rnnq import db as database

        self.engine, self.run = engine, run
        self.study, _, self.root = database.study(engine)
        self.ends: dict[int, int] = {}
        self.headed: set[int] = set()
        self.traced: set[int] = set()

    def show(self, row: Mapping[str, Any]) -> bool:
        """What is new of an attempt; whether there was anything."""
        from rnnq import logs as files

        attempt = row["attempt"]
        place = files.path(self.root, self.study, self.run, attempt)
        words, self.ends[attempt] = files.read(place, self.ends.get(attempt, 0))
        if row["traceback"] and attempt not in self.traced:
            self.traced.add(attempt)
            words += ("\n" if words and not words.endswith("\n") else "") + row["traceback"]
        if not words:
            return False
        if attempt not in self.headed:
            self.headed.add(attempt)
            output.remark(f"==> run {self.run}, attempt {attempt}: {row['ended'] or 'running'} on {row['device']} <==")
        sys.stdout.write(words if not sys.stdout.isatty() else _harmless(words))
        sys.stdout.flush()
        return True

    def follow(self, state: str) -> None:
        """Go on until the run has ended, through as many attempts as it takes."""
        from rnnq import runs as study
        from rnnq.query import OPEN

        while state in OPEN:
            time.sleep(0.25)
            state, found = study.attempts(self.engine, self.run)
            for row in found:
                self.show(row)
        output.remark(f"run {self.run} is {state}")


def _harmless(words: str) -> str:
    """What a run printed may hold codes that turn a terminal upside down; colours and bars may stay."""
    return _CODES.sub(lambda code: code[1] or "", words)


# colours, whole, stay; all other escape sequences go, and control codes but tab, newline and carriage return. No escape
# stays on its own: with what is left behind it, it could begin a sequence that was not there before
_CODES = re.compile(r"(\x1b\[[0-9;:]*m)|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[^\[]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
