"""rnnq doctor: what happened, proved from the rows, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db, Format, Rows, Stage

if TYPE_CHECKING:
    from rnnq.doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    db: Db = DB,
    stage: Stage = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare the sha256 of every file, and look through a large database.")
    ] = False,
    format: Rows = Format.table,
) -> None:
    """Replay the attempts and say what happened; look for what is wrong; exit code 1 when there is a problem."""
    from rnnq import db as database
    from rnnq import doctor as examiner

    engine = database.open(db)
    with output.bars() as watch:
        found = examiner.examine(engine, stage, deep, watch)
    problems = sum(finding.level == "problem" for finding in found)
    if format is Format.json:
        output.as_json({"problems": problems, "findings": [asdict(finding) for finding in found]})
    elif format is Format.csv:
        output.rows(format, [asdict(finding) for finding in found], ["name", "level", "says", "hint", "numbers"])
    else:
        _show(found)
        notes = sum(finding.level == "note" for finding in found)
        output.remark(f"{output.count(problems, 'problem')}, {output.count(notes, 'note')}")
    if problems:
        raise typer.Exit(1)


def _show(found: Sequence[Finding]) -> None:
    """A paragraph for each finding, as wide as the terminal."""
    from rich.text import Text

    console = output.console()
    for finding in found:
        said = output.harmless(f"{finding.level:7}  {finding.name}: {finding.says}")
        lines = wrap(said, console.width, subsequent_indent="         ")
        if finding.hint:
            hint = output.harmless(f"hint: {finding.hint}")
            lines += wrap(hint, console.width, initial_indent="         ", subsequent_indent="         ")
        for i, line in enumerate(lines):
            shown = Text(line)
            if i == 0:
                shown.stylize(STYLES[finding.level], 0, len(finding.level))
            console.print(shown, soft_wrap=True)
