"""rnnq stages, diff: what came from what, and in what two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq.cli import output
from rnnq.cli.options import DB, DEFS, Db, Defs, Format, Rows, RunId

if TYPE_CHECKING:
    from rnnq.compare import Curves, Difference, StageRow


# -------------------------------------------------------------------------------------------------------- stages


def stages(db: Db = DB, defs: Defs = DEFS, format: Rows = Format.table) -> None:
    """Every stage below the one that it was promoted from: its runs, when it was made, and from which file."""
    from rnnq import compare
    from rnnq import db as database

    found = compare.stages(database.open(db), defs)
    if format is Format.json:
        output.as_json([{**asdict(row), "total": row.total} for row in found])
        return
    if format is Format.csv:
        columns = ["stage", "family", "depth", "runs", "made", "source", "source_state", "defined_as", "parents"]
        output.rows(format, [asdict(row) | {"runs": row.total} for row in found], columns)
        return
    rows = [_stage_row(row, defs) for row in found]
    output.table(rows, ["stage", "family", "runs", "made", "definition", "also from"])
    output.remark(output.count(len(found), "stage"))


def _stage_row(row: StageRow, defs: Path) -> dict[str, Any]:
    said = [word for word, holds in (("paused", row.paused), (f"made as {row.defined_as}", row.defined_as)) if holds]
    others = list(row.parents)[1:] if row.depth else list(row.parents)
    changed = "" if row.source_state in (None, "as it was") else f" ({row.source_state})"
    return {
        "stage": "  " * row.depth + row.stage + (f" ({', '.join(said)})" if said else ""),
        "family": row.family,
        "runs": ", ".join(f"{n:,} {state}" for state, n in row.counts.items()),
        "made": row.made[:16],
        "definition": None if row.source is None else f"{defs / row.source}{changed}",
        "also from": others,
    }


# ---------------------------------------------------------------------------------------------------------- diff


def diff(first: RunId, second: RunId, db: Db = DB, format: Rows = Format.table) -> None:
    """In what two runs differ: config, code and machine of their last attempts, and what came of them."""
    from rnnq import compare
    from rnnq import db as database

    found = compare.diff(database.open(db), first, second)
    if format is Format.json:
        output.as_json(found.as_dict())
        return
    rows = [*_pairs("config", found.config), *_pairs("definition", found.definition), *_pairs("", found.attempt)]
    rows += [
        row | {"difference": compare.minus(*found.summary[row["key"]])} for row in _pairs("summary", found.summary)
    ]
    if format is Format.csv:
        rows += [_curve_row(name, curve) for name, curve in found.curves.items() if not curve.same]
        output.rows(format, rows, ["what", "first", "second", "difference", "at_step"])
        return
    _show_heads(found)
    _show_rows(found, rows)
    _show_results(found)


def _pairs(of: str, pairs: Mapping[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    prefix = f"{of}." if of else ""
    return [{"what": prefix + name, "key": name, "first": a, "second": b} for name, (a, b) in pairs.items()]


def _curve_row(name: str, curve: Curves) -> dict[str, Any]:
    a, b = curve.points
    return {
        "what": f"curve.{name}",
        "first": f"{a} points",
        "second": f"{b} points",
        "difference": curve.largest,
        "at_step": curve.at,
    }


def _show_heads(found: Difference) -> None:
    for word, run in zip(("first ", "second"), found.runs, strict=True):
        output.say(f"{word} run {run['run']}  {run['stage']}: {run['label']}, {run['state']}, step {run['step']:,}")


def _show_rows(found: Difference, rows: list[dict[str, Any]]) -> None:
    if not found.config:
        output.say("config: equal")
    for word, run in zip(("first", "second"), found.runs, strict=True):
        if not run["attempt"]:
            output.say(f"the {word} has not been tried yet")
    if rows:
        output.say("")
        shown = [{**row, "first": _short(row, "first"), "second": _short(row, "second")} for row in rows]
        output.table(shown, ["what", "first", "second", "difference"])
        output.say("")


def _short(row: Mapping[str, Any], side: str) -> str:
    if row[side] is None:
        return "-"
    is_hash = row["what"].endswith(("sha256", "git_commit"))
    return str(row[side])[:12] if is_hash else output.cell(row[side])


def _show_results(found: Difference) -> None:
    points = sum(curve.points[0] for curve in found.curves.values())
    if found.identical:
        parts = f"{output.count(len(found.curves), 'curve')} with {output.count(points, 'point')}, and the summary"
        output.say(f"the results are identical to the bit: {parts}")
        return
    for name, curve in found.curves.items():
        output.say(f"{name}: {_sentence(curve)}")
    if not found.curves and not found.metrics:
        output.say("neither has results yet")


def _sentence(curve: Curves) -> str:
    a, b = curve.points
    if curve.same:
        return f"identical to the bit, {output.count(a, 'point')}"
    if not curve.common:
        return f"{a:,} and {output.count(b, 'point')}, none of them at the same step"
    missing = "" if a == b == curve.common else f"; {a:,} and {b:,} points, {curve.common:,} at the same steps"
    if curve.first is None:
        return f"identical to the bit at {output.count(curve.common, 'step')} of both{missing}"
    largest = "" if curve.largest is None else f", by up to {output.cell(abs(curve.largest))} at step {curve.at:,}"
    return f"differs from step {curve.first:,} on{largest}{missing}"
