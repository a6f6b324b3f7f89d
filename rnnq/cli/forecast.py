"""rnnq plan --dry-run: what definitions would do and cost, before anything is queued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq.cli import fit, output
from rnnq.cli.options import Format
from rnnq.cli.sources import loaded, refuse_questions, stages_of, stated

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from rnnq.costs import Costs
    from rnnq.graph import Foreseen


def dry_run(names: Sequence[str], db: str, defs: Path, format: Format) -> None:
    """Print it. Raises InputError with everything that is wrong in the definitions."""
    from rnnq import db as database
    from rnnq import graph, queue
    from rnnq.plan import ignored

    files = loaded(names, later=True)
    stages = stages_of(files, defs)
    engine = database.open(db) if database.exists(db) else None
    if engine is None:
        queue.refuse_gates(stages)
        added = None
    else:
        added = queue.preview(engine, stages)
    refuse_questions(files, stages, engine)
    known = _costs(engine)
    found = graph.foresee(stages, known, stated(files))
    totals = graph.totals(found)
    if format is Format.json:
        output.as_json({"stages": [stage.as_row() for stage in found], "total": totals})
        return
    if format is Format.csv:
        rows = [stage.as_row() for stage in found]
        output.rows(format, rows, list(rows[0]) if rows else ["stage"])
        return
    _show_foreseen(found, totals)
    for line in ignored(stages):
        output.remark(line)
    if known.devices:
        output.remark(f"speeds were measured on {', '.join(known.devices)}")
    if added is not None and any(item.present for item in added):
        present = sum(item.present for item in added)
        output.remark(f"{output.count(present, 'run')} of these are in the database already: `rnnq plan` shows them")


def _costs(engine: Engine | None) -> Costs:
    """What was measured, as far as there is a database."""
    from rnnq import costs

    if engine is None:
        return costs.Costs()
    return costs.read_all(engine)


def _show_foreseen(found: Sequence[Foreseen], totals: Mapping[str, Mapping[str, Any]]) -> None:

    numbered = list(enumerate(found, start=1))
    columns = [fit.Column("stage", "    stage", 0)]
    columns += [fit.Column("phase", "phase", 2, least=8), fit.Column("priority", "priority", 1, right=True)]
    columns += [fit.Column("runs", "runs", 1, right=True), fit.Column("steps", "steps", 1, right=True)]
    columns += [fit.Column("time", "time", 1, right=True)]
    for words, is_certain in (("certain, in order:", True), ("only if:", False)):
        rows = [_foreseen_row(number, one) for number, one in numbered if (one.condition is None) == is_certain]
        if not rows:
            continue
        output.say(words)
        _show_some(rows, columns)
        for number, one in numbered:
            if one.condition is not None and not is_certain:
                fit.say(f"{number}. if {one.condition}", "    ")
        output.say("")
    for words, key in (("certain", "certain"), ("with all that is conditional", "all")):
        if key == "certain" or totals["all"]["stages"] > totals["certain"]["stages"]:
            fit.say(f"{words}: {_total_words(totals[key])}")
    if totals["all"]["stages"] > totals["certain"]["stages"]:
        fit.say("branches that exclude each other are both in the second sum")
    _show_basis(numbered)


def _show_some(rows: Sequence[Mapping[str, Any]], columns: Sequence[fit.Column]) -> None:
    """As `_show`, but the phase may go before the table does."""

    without = [column for column in columns if column.name != "phase"]
    fit.show(rows, columns if fit.all_fit(rows, columns, fit.screen()) else without)


def _foreseen_row(number: int, one: Foreseen) -> dict[str, Any]:
    at_least = "over " if one.unknown and one.seconds is not None else ""
    return {
        "stage": f"{number}. {one.stage}",
        "phase": one.phase,
        "priority": str(one.priority),
        "runs": f"{one.runs:,}",
        "steps": "unknown" if one.steps is None else f"{one.steps:,}",
        "time": "unknown" if one.seconds is None else at_least + output.duration(one.seconds),
    }


def _total_words(total: Mapping[str, Any]) -> str:
    head = f"{output.count(total['stages'], 'stage')}, {output.count(total['runs'], 'run')}, {total['steps']:,} steps"
    time = output.duration(total["hours"] * 3600)
    if total["unknown_runs"] == total["runs"]:
        return f"{head}, of unknown cost"
    if total["unknown_runs"]:
        return f"{head}, {time} and {output.count(total['unknown_runs'], 'run')} of unknown cost"
    return f"{head}, {time} of one worker"


def _show_basis(numbered: Iterable[tuple[int, Foreseen]]) -> None:
    """What the times rest on, each once."""
    of: dict[str, list[str]] = {}
    for number, one in numbered:
        for basis in one.basis:
            of.setdefault(basis, []).append(str(number))
    for basis, numbers in of.items():
        fit.say(f"time of {', '.join(numbers)}: {basis}")
