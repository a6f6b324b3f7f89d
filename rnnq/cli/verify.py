"""rnnq verify-resume: is a run that was interrupted the same as one that was not?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, Db, Defs, Device, Format, Rows, Stage
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.verify import Difference, Interruption, Subject, Verdict

LONGEST = 12  # differences of one interruption that are shown to people
COLUMNS = ("what", "interrupted", "equal", "where", "elements", "of", "largest", "first_step", "note")


def verify_resume(
    what: Annotated[str, typer.Argument(metavar="RUN|DEF", help="The id of a run, or a definition file.")],
    stage: Stage = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Train for so many; default: 300, or the run's budget if less.")
    ] = None,
    times: Annotated[int, typer.Option("--times", min=1, max=1000, help="At how many random steps.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides at which steps.")] = 0,
    device: Device = "cpu",
    db: Db = DB,
    defs: Defs = DEFS,
    format: Rows = Format.table,
) -> None:
    """Train with and without an interruption and compare all that is left, to the bit. Exit code 1 when it differs."""
    subjects = _subjects(what, stage, db, defs)

    from rnnq import verify, worker

    chosen = worker.pick_device(None, device)
    worker.prepare(chosen)
    verdicts = [verify.verify(one, chosen, steps, times, seed, output.remark) for one in subjects]
    for verdict in verdicts:
        for line in verdict.remarks:
            output.remark(f"{verdict.subject.name}: {line}")
    _show(verdicts, format)
    raise typer.Exit(0 if all(verdict.equal for verdict in verdicts) else 1)


def _subjects(what: str, stage: str | None, db: str, defs: Path) -> Sequence[Subject]:
    if not what.isdecimal():
        from rnnq import verify

        return verify.of_definition(Path(what), stage)
    if stage is not None:
        raise InputError(f"--stage {stage} chooses among the stages of a definition file; run {what} has its own")
    if int(what) >= 2**63:
        raise InputError(f"there is no run {what}", "`rnnq ls` lists them")
    from rnnq import db as database

    engine = database.open(db)
    from rnnq import verify  # a second's work, for torch: what can be refused at once is refused before

    return [verify.of_run(engine, int(what), defs)]


def _show(verdicts: Sequence[Verdict], format: Format) -> None:
    if format is Format.json:
        output.as_json([_document(verdict) for verdict in verdicts])
    elif format is Format.csv:
        found = [
            {"what": verdict.subject.name, "interrupted": one.step, "equal": one.equal, **row}
            for verdict in verdicts
            for one in verdict.interruptions
            for row in [difference.row() for difference in one.differences] or [{}]
        ]
        output.rows(format, found, COLUMNS)
    else:
        for verdict in verdicts:
            for one in verdict.interruptions:
                _say(verdict.subject.name, one)


def _say(name: str, one: Interruption) -> None:
    """Lines, not a table: the names of tensors are too long for a narrow screen."""
    from rnnq.queue import clean_text

    output.say(f"{name}, interrupted after step {one.step:,}: {'equal to the bit' if one.equal else 'differs'}")
    for difference in one.differences[:LONGEST]:
        output.say(f"  {clean_text(_sentence(difference))}")
    if len(one.differences) > LONGEST:
        output.say(f"  and {output.count(len(one.differences) - LONGEST, 'more place')}: see --format json")


def _sentence(difference: Difference) -> str:
    words = [] if difference.note else [f"{difference.elements:,} of {difference.of:,}"]
    words += [] if difference.largest is None else [f"by up to {difference.largest:.3g}"]
    words += [] if difference.first_step is None else [f"from step {difference.first_step:,}"]
    words += [difference.note] if difference.note else []
    return f"{difference.where}: {', '.join(words)}"


def _document(verdict: Verdict) -> dict[str, Any]:
    return {
        "what": verdict.subject.name,
        "family": verdict.subject.family,
        "steps": verdict.steps,
        "equal": verdict.equal,
        "remarks": verdict.remarks,
        "interruptions": [
            {"step": one.step, "equal": one.equal, "differences": [each.row() for each in one.differences]}
            for one in verdict.interruptions
        ],
    }
