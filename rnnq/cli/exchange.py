"""rnnq export, import: tables for other programs, and results of other programs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rnnq.cli import complete, output
from rnnq.cli.options import DB, DEFS, Db, Defs, DryRun, Filter, Format, Rows, Stage
from rnnq.errors import InputError, nearest

if TYPE_CHECKING:
    from rnnq.exchange import Export, Import
    from rnnq.queue import Added
    from rnnq.results import Tree
    from rnnq.sheets import Sheets

M = TypeVar("M", bound="Tree | Sheets")


class What(StrEnum):
    """What a row of an export is."""

    runs = "runs"
    groups = "groups"
    curves = "curves"


class Layout(StrEnum):
    """A tree of folders in place of a table."""

    sweep = "sweep"
    csv = "csv"


# -------------------------------------------------------------------------------------------------------- export


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[runs|groups|curves|DIR]",
            help="What a row is: a run, a group of seeds, or a point. With --layout: where the tree is made.",
            autocompletion=complete.what,
        ),
    ] = "runs",
    stage: Stage = None,
    filter: Filter = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Only this metric or curve; may be repeated.", autocompletion=complete.metrics),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="FILE.csv or FILE.parquet; default: CSV to standard output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE, or the files of --layout csv.")] = False,
    layout: Annotated[
        Layout | None,
        typer.Option(
            "--layout", help="sweep: folders below DIR, one for each experiment and seed; csv: STAGE/RUN.csv."
        ),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="With --layout sweep: the trained weights, too.")] = False,
    db: Db = DB,
) -> None:
    """Runs, groups or curves as CSV or Parquet, exact to the bit; or a stage as a tree of folders."""
    if layout is Layout.csv:
        _check_layout(what, layout, [("--metric", metric), ("--out", out), ("--weights", weights)])
        _sheets(db, stage, filter, Path(what), force)
        return
    if layout is Layout.sweep:
        _check_layout(what, layout, [("--metric", metric), ("--out", out), ("--force", force)])
        _tree(db, stage, filter, Path(what), weights)
        return
    if weights:
        raise InputError("--weights goes with --layout sweep")
    if what not in list(What):
        raise InputError(f"export {what}: {nearest(what, list(What))}", "a folder goes with --layout sweep")
    _table(db, What(what), stage, filter, metric or (), out, force)


def _check_layout(what: str, layout: Layout, others: Sequence[tuple[str, object]]) -> None:
    problems = [f"{option} does not go with --layout {layout.value}" for option, value in others if value]
    if what in list(What):
        problems.append(f"--layout {layout.value} needs the folder that the tree is made in")
    if problems:
        raise InputError(problems, f"rnnq export --layout {layout.value} {layout.value}s/")


def _made(db: str, stage: str | None, filter: str | None, write: Callable[..., M | None]) -> M | None:
    """What `write` makes of the database, and its remarks; None, and why, where no run fulfils the filter."""
    from rnnq import db as database

    engine = database.open(db)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is taken away
    with output.bars() as watch:
        made = write(engine, stage, filter, progress=watch)
    for line in [_nothing(stage, filter)] if made is None else made.remarks:
        output.remark(line)
    return made


def _sheets(db: str, stage: str | None, filter: str | None, into: Path, force: bool) -> None:
    from rnnq import sheets

    made = _made(db, stage, filter, partial(sheets.write, into=into, force=force))
    if made is None:
        return
    more = f", {made.partial:,} of them not done: see the column state" if made.partial else ""
    output.remark(f"{output.count(made.runs, 'run')}{more}")
    for path in made.paths:
        output.say(str(path))


def _tree(db: str, stage: str | None, filter: str | None, into: Path, weights: bool) -> None:
    from rnnq import results

    made = _made(db, stage, filter, partial(results.write, into=into, weights=weights))
    if made is None:
        return
    more = f", {made.unfinished:,} of them not ended yet" if made.unfinished else ""
    output.remark(f"{output.count(made.experiments, 'experiment')}, {output.count(made.runs, 'run')}{more}")
    output.say(str(made.path))


def _nothing(stage: str | None, filter: str | None) -> str:
    return f"no run{f' of stage {stage}' if stage else ''} fulfils {filter}" if filter else "no runs"


def _table(
    db: str,
    what: What,
    stage: str | None,
    filter: str | None,
    metrics: Sequence[str],
    out: Path | None,
    force: bool,
) -> None:
    from rnnq import db as database
    from rnnq import exchange

    if out is not None:
        exchange.check_target(out, force)
    found = exchange.export(database.open(db), what.value, stage, filter, metrics)
    if out is None:
        _to_stdout(found)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is taken away
        with closing(_watched(found)) as frames:
            rows = exchange.write_file(frames, out, force)
        output.remark(f"{output.count(rows, _noun(what, rows))} to {out}")
    if not found.runs:
        output.remark(_nothing(stage, filter))


def _noun(what: What, rows: int) -> str:
    return {What.runs: "run", What.groups: "group", What.curves: "point"}[what]


def _to_stdout(found: Export) -> None:
    from rnnq import exchange

    # the same bytes whatever the terminal speaks
    sys.stdout.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
    frames = (frame for _, frame in found.pieces) if sys.stdout.isatty() else _watched(found)
    with closing(frames):
        exchange.write_csv(frames, sys.stdout)


def _watched(found: Export) -> Generator[Any, None, None]:
    """The frames, with a bar on a terminal."""
    done = 0
    with output.bars() as watch:
        for runs, frame in found.pieces:
            yield frame
            done += runs
            watch("writing runs", done, found.runs)


# -------------------------------------------------------------------------------------------------------- import


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A table: FILE.csv or FILE.parquet.")],
    stage: Annotated[
        str,
        typer.Option(
            "--stage", help="The stage that the runs become part of; made if need be.", autocompletion=complete.stages
        ),
    ],
    family: Annotated[str, typer.Option("--family", help="Its family: a name, or defs/file.py:name.")],
    loss: Annotated[str, typer.Option("--loss", help="The column of the family's primary metric.")] = "loss",
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="COLUMN=NAME: another metric; a new one as COLUMN=NAME:min, or :max."),
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", help="COLUMN=FIELD, where they are called differently.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="A column to leave out; may be repeated.")
    ] = None,
    db: Db = DB,
    defs: Defs = DEFS,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Results from elsewhere become finished runs, for examine and promote. The columns are config fields."""
    from rnnq import db as database
    from rnnq import exchange, queue

    request = exchange.Request(file, stage, family, loss, metric or (), field or (), ignore or (), defs)
    is_there = database.exists(db)
    made = exchange.prepare(
        database.open(db) if is_there else None, request, lambda rows: output.counted(rows, "checking rows")
    )
    if not dry_run:
        created = None if is_there else database.upgrade(db)
        if created:
            output.remark(created)
        [added] = queue.init(database.open(db), [made.stage])
    elif is_there:
        [added] = queue.preview(database.open(db), [made.stage])
    else:
        added = queue.Added(made.stage.name, len(made.stage.runs), 0, ())
    _show_import(made, added, dry_run, format)


def _show_import(made: Import, added: Added, dry_run: bool, format: Format) -> None:
    numbers = {"stage": added.stage, "added": added.added, "present": added.present}
    more = {"without_loss": made.without_loss, "left_out": made.left_out}
    output.rows(format, [numbers | more], [*numbers, *(name for name, n in more.items() if n or format is Format.csv)])
    if format is not Format.table:
        return
    output.remark(f"{'would add' if dry_run else 'added'} {output.count(added.added, 'run')}")
    if made.without_loss:
        output.remark(f"{output.count(made.without_loss, 'run')} without a loss: it was not finite")
    if made.left_out:
        output.remark(f"{output.count(made.left_out, 'run')} of the file left out: they had not finished")
