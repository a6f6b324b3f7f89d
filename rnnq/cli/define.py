"""rnnq init: a definition becomes pending runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, Db, Defs, DryRun, Format, Rows
from rnnq.errors import InputError

SHOWN = 8  # labels of a stage that --dry-run tells of; all of them in JSON

if TYPE_CHECKING:
    from rnnq.definitions import Definition
    from rnnq.queue import Added, NewStage


def init(
    definitions: Annotated[
        list[Path],
        typer.Argument(metavar="DEF...", help="Definition files, .py or .yaml; FILE.py:NAME is a list of that file."),
    ],
    db: Db = DB,
    defs: Defs = DEFS,
    root: Annotated[
        Path | None,
        typer.Option("--root", help="Where checkpoints go; default: the folder of the database file, else this one."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Only the runs of these labels; several with commas, STAGE/LABEL for one stage."),
    ] = None,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Add the runs of a study that are not there yet; again: 0 added. Makes the database if there is none."""
    from rnnq import definitions as sources
    from rnnq import plan

    files, problems = [], []
    for path in definitions:
        try:
            files.append(sources.load(path, later=True))
        except InputError as error:
            problems.append(error)
    stages = _checked(
        lambda: plan.from_definitions(files, defs, lambda items: output.counted(items, "checking configs")), problems
    )
    if any(file.questions for file in files):
        _refuse_questions(files, stages, db)
    if only:
        stages = plan.only(stages, only)
    added = _preview(db, stages) if dry_run else _init(db, stages, root)
    if format is Format.json:
        output.as_json({"stages": [_row(item) | ({"labels": item.labels} if dry_run else {}) for item in added]})
        return
    behind = ["waiting"] if any(item.waiting for item in added) else []
    output.rows(format, [_row(item) for item in added], ["stage", "added", "present", *behind])
    if format is Format.table:
        _remarks(added, dry_run)
        for line in [*(line for file in files for line in file.remarks), *plan.ignored(stages)]:
            output.remark(line)


def _checked(check: Callable[[], list[NewStage]], problems: list[InputError]) -> list[NewStage]:
    """The stages of the files that could be loaded. Raises InputError with what is wrong in any of the files."""
    try:
        stages = check()
    except InputError as error:
        problems.append(error)
        stages = []
    if len(problems) == 1:
        raise problems[0]
    if problems:
        hints = [error.hint for error in problems if error.hint]
        raise InputError([line for error in problems for line in error.problems], hints[0] if hints else None)
    return stages


def _refuse_questions(files: Sequence[Definition], stages: Sequence[NewStage], db: str) -> None:
    from rnnq import db as database
    from rnnq.cli.sources import refuse_questions

    refuse_questions(files, stages, database.open(db) if database.exists(db) else None)


def _row(item: Added) -> dict[str, Any]:
    some = {"left": item.left, "waiting": item.waiting}  # where there are any
    row = {"stage": item.stage, "added": item.added, "present": item.present}
    return row | {name: value for name, value in some.items() if value}


def _preview(db: str, stages: list[NewStage]) -> list[Added]:
    from rnnq import db as database
    from rnnq import queue

    if database.exists(db):
        return queue.preview(database.open(db), stages)
    fresh = [(stage, tuple(run.label for run in stage.runs)) for stage in stages]
    return [queue.Added(stage.name, len(labels), 0, (), labels=labels) for stage, labels in fresh]


def _init(db: str, stages: list[NewStage], root: Path | None) -> list[Added]:
    from rnnq import db as database
    from rnnq import queue

    if not database.is_server(db):
        _warn_of_network(database.path_of(db))
    done = database.upgrade(db, str(root.absolute()) if root else None)
    if done:
        output.remark(done)
    engine = database.open(db)
    recorded = database.study(engine)[2]
    if root is not None and root.resolve() != recorded.resolve():
        raise InputError(
            f"--root {root}: the root of {database.shown(engine)} is {recorded}",
            "it is set once, when the database is made",
        )
    return queue.init(engine, stages)


def _warn_of_network(path: Path) -> None:
    from rnnq import db as database

    kind = database.on_network(path)
    if kind is not None:
        warning, hint = database.network_warning(path, kind)
        output.remark(f"warning: {warning}\nhint: {hint}")


def _remarks(added: list[Added], dry_run: bool) -> None:
    total = sum(item.added for item in added)
    output.remark(f"{'would add' if dry_run else 'added'} {output.count(total, 'run')}")
    for item in added if dry_run else ():
        if item.labels:
            more = f", and {len(item.labels) - SHOWN:,} more" if len(item.labels) > SHOWN else ""
            output.remark(f"{item.stage}: {', '.join(item.labels[:SHOWN])}{more}")
    for item in added:
        if item.left:
            names = ", ".join(item.left[:5]) + (", ..." if len(item.left) > 5 else "")
            output.remark(f"{item.stage}: {output.count(len(item.left), 'run')} no longer in the definition: {names}")
