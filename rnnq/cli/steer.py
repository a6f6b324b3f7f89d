"""What a person does to runs (retry, cancel, extend, priority, note, tag) and stages (pause, resume, rename, delete).

Each says how many rows it changed, and why it left others alone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import complete, output
from rnnq.cli.options import DB, DEFS, Db, Defs, DryRun, Filter, Format, Rows, RunIds, Stage, StageName
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.steer import Choice, Doomed, Steered

SHOWN = 20  # rows of a table; JSON and CSV have all

StageNames = Annotated[
    list[str], typer.Argument(metavar="STAGE...", help="Stages.", autocompletion=complete.stages, show_default=False)
]


# ---------------------------------------------------------------------------------------------------------- runs


def retry(
    runs: RunIds = None,
    filter: Filter = None,
    stage: Stage = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: a new run with this changed; the old one stays.")
    ] = None,
    db: Db = DB,
    defs: Defs = DEFS,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Failed runs are pending again, and go on from their checkpoints.

    Cancelled and skipped ones, too, where an id or a filter with `state` names them.
    """
    from rnnq import db as database
    from rnnq import steer

    engine, choice = database.open(db), _choice(runs, stage, filter)
    if set:
        _retry_with(engine, choice, set, defs, dry_run, format)
    else:
        _show(steer.retry(engine, choice, dry_run), ("retry", "retried"), "run", dry_run, format)


def _retry_with(engine: Any, choice: Choice, changes: list[str], defs: Any, dry_run: bool, format: Format) -> None:
    from rnnq import queue, steer

    stages = steer.retry_with(engine, choice, changes, defs)
    if not stages:
        output.remark("none of the runs can be retried; `rnnq retry` without --set says why")
    added = queue.preview(engine, stages) if dry_run else queue.init(engine, stages)
    rows = [{"stage": item.stage, "added": item.added, "present": item.present} for item in added]
    output.rows(format, rows, ["stage", "added", "present"])
    total, present = sum(item.added for item in added), sum(item.present for item in added)
    more = f" ({output.count(present, 'run')} with these settings {'is' if present == 1 else 'are'} there already)"
    output.remark(f"{'would add' if dry_run else 'added'} {output.count(total, 'run')}{more if present else ''}")


def cancel(
    runs: RunIds = None,
    filter: Filter = None,
    stage: Stage = None,
    now: Annotated[bool, typer.Option("--now", help="Take running runs from their workers without a checkpoint.")] = (
        False
    ),
    db: Db = DB,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Open runs are cancelled; the worker of one that is running saves its state first."""
    from rnnq import db as database
    from rnnq import steer

    engine = database.open(db)
    found = steer.cancel(engine, _choice(runs, stage, filter), now, dry_run)
    asked = sum(row["now"] == "asked to stop" for row in found.rows)
    _show(found, ("cancel", "cancelled"), "run", dry_run, format)
    if asked and not dry_run:
        beat = database.study(engine)[1] / 4
        output.remark(f"{asked} of them running: saved and stopped by their workers within about {beat:g} s")


def extend(
    steps: Annotated[str, typer.Option("--steps", help="How many steps in all (20000), or how many more (+5000).")],
    runs: RunIds = None,
    filter: Filter = None,
    stage: Stage = None,
    db: Db = DB,
    defs: Defs = DEFS,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Finished runs are trained further from their last checkpoints, each along the same curve."""
    from rnnq import db as database
    from rnnq import steer

    found = steer.extend(database.open(db), _choice(runs, stage, filter), steps, defs, dry_run)
    _show(found, ("extend", "extended"), "run", dry_run, format)


def priority(
    number: Annotated[int, typer.Argument(metavar="N", help="The highest is claimed first; all begin with 0.",
                                          min=-1_000_000, max=1_000_000)],
    runs: RunIds = None,
    filter: Filter = None,
    stage: Stage = None,
    db: Db = DB,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:  # fmt: skip
    """Change the order in which open runs are claimed. A negative N stands after --: `rnnq priority -- -5 12`."""
    from rnnq import db as database
    from rnnq import steer

    found = steer.prioritise(database.open(db), _choice(runs, stage, filter), number, dry_run)
    _show(found, ("change the priority of", "changed the priority of"), "run", dry_run, format)


def note(
    words: Annotated[list[str], typer.Argument(metavar="[RUN...] TEXT", help='Ids, then what to say; "" removes it.')],
    filter: Filter = None,
    stage: Stage = None,
    db: Db = DB,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Say something of runs; `note ~ "*word*"` finds it, `rnnq show` shows it."""
    from rnnq import db as database
    from rnnq import steer

    *ids, said = words
    wrong = [word for word in ids if not (word.isdecimal() and int(word) < 2**63)]
    if wrong:
        raise InputError(
            f"{wrong[0]!r} is no id of a run", 'a note of several words goes in quotes: rnnq note 12 "a b"'
        )
    found = steer.note(database.open(db), _choice([int(word) for word in ids], stage, filter), said, dry_run)
    _show(found, ("note", "noted"), "run", dry_run, format)


def tag(
    name: Annotated[str, typer.Argument(metavar="TAG", help="A word.")],
    runs: RunIds = None,
    filter: Filter = None,
    stage: Stage = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the tag away.")] = False,
    db: Db = DB,
    dry_run: DryRun = False,
    format: Rows = Format.table,
) -> None:
    """Give runs a tag; `--filter "tag = good"` finds them in every command."""
    from rnnq import db as database
    from rnnq import steer

    found = steer.tag(database.open(db), _choice(runs, stage, filter), name, remove, dry_run)
    verbs = ("untag", "untagged") if remove else ("tag", "tagged")
    _show(found, verbs, "run", dry_run, format)


def _choice(runs: list[int] | None, stage: str | None, filter: str | None) -> Choice:
    from rnnq import steer

    return steer.Choice(tuple(runs or ()), stage, filter)


def _show(found: Steered, verbs: tuple[str, str], noun: str, dry_run: bool, format: Format) -> None:
    """The rows that changed on stdout; how many they are, and why others did not, on stderr."""
    columns = ["run", "stage", "label", "was", "now"]
    rows = found.rows[:SHOWN] if format is Format.table else found.rows
    output.rows(format, rows, columns)
    if len(rows) < len(found.rows):
        output.remark(f"... and {len(found.rows) - len(rows):,} more")
    if not found.rows and not found.left:
        output.remark("no run is like that")
    output.remark(f"{f'would {verbs[0]}' if dry_run else verbs[1]} {output.count(len(found.rows), noun)}")
    for why, ids in found.left.items():
        shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        output.remark(f"left alone: {len(ids):,} {why} ({shown})")


# -------------------------------------------------------------------------------------------------------- stages


def pause(stages: StageNames, db: Db = DB, dry_run: DryRun = False) -> None:
    """No more runs of these stages are claimed; those that run are saved and given back."""
    from rnnq import db as database
    from rnnq import steer

    engine = database.open(db)
    asked = steer.pause(engine, stages, dry_run)
    _say_paused("pause", stages, dry_run)
    if asked:
        beat = database.study(engine)[1] / 4
        output.remark(f"{output.count(asked, 'running run')}: saved and given back within about {beat:g} s")


def resume(stages: StageNames, db: Db = DB, dry_run: DryRun = False) -> None:
    """Runs of paused stages may be claimed again. Workers that have left need to be started."""
    from rnnq import db as database
    from rnnq import steer

    steer.resume(database.open(db), stages, dry_run)
    _say_paused("resume", stages, dry_run)


def _say_paused(verb: str, stages: list[str], dry_run: bool) -> None:
    what = f"{output.count(len(stages), 'stage')}: {', '.join(stages)}"
    output.remark(f"would {verb} {what}" if dry_run else f"{verb}d {what}")


def rename(
    stage: StageName,
    to: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.")],
    db: Db = DB,
) -> None:
    """Give a stage another name. Its definition file keeps the old one: `rnnq init` would make that stage anew."""
    from rnnq import db as database
    from rnnq import steer

    steer.rename(database.open(db), stage, to)
    output.remark(f"renamed 1 stage: {stage} is {to} now")


def delete(
    stage: StageName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for the stage's name once more.")] = False,
    db: Db = DB,
    dry_run: DryRun = False,
) -> None:
    """Delete a stage for good: its runs, points, checkpoints and logs. Never while one of its runs is running."""
    from rnnq import db as database
    from rnnq import steer

    engine = database.open(db)
    found = steer.doomed(engine, stage)
    output.remark(_describe(found))
    if dry_run:
        output.remark(f"would delete {output.count(found.runs, 'run')}")
        return
    if not yes:
        _confirm(stage)
    gone = steer.delete(engine, stage)
    output.remark(f"deleted {output.count(gone, 'run')}")


def _describe(found: Doomed) -> str:
    what = f"stage {found.stage}: {output.count(found.runs, 'run')}, {output.count(found.points, 'point')}, "
    what += f"{output.count(found.files, 'file')} of {found.bytes / 1e6:.1f} MB"
    if found.children:
        what += f"; {output.count(found.children, 'run')} of other stages descend from it, and will no longer say so"
    return what


def _confirm(stage: str) -> None:
    hint = f"`rnnq delete {stage} --yes` does not ask"
    if not sys.stdin.isatty():
        raise InputError("nobody is here to type the stage's name; nothing was deleted", hint)
    sys.stderr.write("Type the name of the stage to delete it: ")
    sys.stderr.flush()
    typed = sys.stdin.readline().strip()
    if typed != stage:
        raise InputError(f"{typed!r} is not {stage!r}; nothing was deleted", hint)
