"""rnnq gc: free the disk of what no rule keeps and no row names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db, DryRun, Format, Keep, Rows, Stage
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.garbage import Found

COLUMNS = ["stage", "kind", "files", "size", "stay", "stay size"]


def gc(
    stage: Stage = None,
    keep: Keep = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    db: Db = DB,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Delete checkpoints that a stage's rule does not keep, and files that no row names; it asks first."""
    from rnnq import db as database
    from rnnq import garbage, queue

    engine = database.open(db)
    if not dry_run:
        queue.reap(engine, by_clock=False)  # what a dead process of this host held is running no more
    with output.bars() as watch:
        found = garbage.look(engine, stage, keep, watch)
    _show(found, format)
    _remark(found)
    what = f"{output.count(found.files, 'file')} of {output.size(found.bytes)}"
    if dry_run:
        output.remark(f"would delete {what}")
        return
    if found.files and not yes:
        _confirm(what)
    if stage is not None and keep is not None:
        queue.keep(engine, stage, str(found.rules[stage]))
    with output.bars() as watch:
        gone = garbage.collect(engine, found, watch)
    output.remark(f"deleted {output.count(gone.files, 'file')} of {output.size(gone.bytes)}")
    if gone.kept:
        output.remark(f"left alone: {output.count(gone.kept, 'run')} changed meanwhile")


def _show(found: Found, format: Format) -> None:
    rows = [asdict(found.shares[key]) for key in sorted(found.shares)]
    if format is Format.json:
        rules = {stage: str(rule) for stage, rule in found.rules.items()}
        output.as_json({"rules": rules, "files": found.files, "bytes": found.bytes, "rows": rows})
    elif format is Format.csv:
        output.rows(format, rows, ["stage", "kind", "files", "bytes", "stay", "stay_bytes"])
    else:
        output.rows(format, [_sized(row) for row in rows], COLUMNS)


def _sized(row: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"size": output.size(row["bytes"]), "stay size": output.size(row["stay_bytes"])}
    return {**row, **{name: size for name, size in sizes.items() if size != output.size(0)}}


def _remark(found: Found) -> None:
    for stage, rule in found.rules.items():
        output.remark(f"{stage} keeps: {rule}")
    for stage, groups in found.unjudged.items():
        output.remark(f"{stage}: {output.count(groups, 'group')} without all seeds, which lose to nobody and keep all")
    for why, files in found.left.items():
        output.remark(f"left alone: {output.count(files, 'file')}: {why}")


def _confirm(what: str) -> None:
    hint = "`rnnq gc --yes` does not ask, `--dry-run` only tells"
    if not sys.stdin.isatty():
        raise InputError(f"nobody is here to say yes; nothing was deleted ({what})", hint)
    sys.stderr.write(f"Delete {what} for good? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError("nothing was deleted", hint)
