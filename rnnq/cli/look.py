"""rnnq ls, show: what there is."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db, Filter, Format, Rows, RunId, Stage

BLOCKS = "▁▂▃▄▅▆▇█"


def ls(db: Db = DB, stage: Stage = None, filter: Filter = None, format: Rows = Format.table) -> None:
    """Runs, one a line."""
    from rnnq import db as database
    from rnnq import runs

    found = runs.find(database.open(db), stage, filter)
    columns = ["id", "stage", "state", "label", "seed", "attempt", "steps_done", "budget", "loss", "worker", "cause",
               "tags", "note"]  # fmt: skip
    if format is Format.json:
        output.as_json([{**row, "checkpoint": path(row, "checkpoint")} for row in found])
        return
    output.rows(format, found, columns)
    if format is Format.table:
        output.remark(output.count(len(found), "run"))
        if any(row["gate"] is not None and row["state"] in ("waiting", "skipped") for row in found):
            output.remark("`rnnq show RUN` says what a run waits for, or why it was skipped; `rnnq plan` of all")


def path(row: Mapping[str, Any], name: str) -> str | None:
    """The path of a checkpoint, below the study's folder."""
    return row[name]["path"] if row[name] else None


def show(
    run: RunId,
    db: Db = DB,
    format: Annotated[Format, typer.Option("--format", help="table or json.")] = Format.table,
) -> None:
    """One run whole: config, attempts, curves, checkpoints, lineage, trace."""
    from rnnq import db as database
    from rnnq import runs

    engine = database.open(db)
    found = runs.show(engine, run)
    if found["gate"] is not None:
        from rnnq import graph

        found["waits_for"] = graph.gate_row(engine, run)
    if format is Format.json:
        output.as_json(found)
        return
    if format is Format.csv:
        output.rows(format, [found], [name for name, value in found.items() if not isinstance(value, list)])
        return
    _show_head(found)
    _show_gate(found)
    _show_curves(found)
    _show_files(found)
    _show_lineage(found)
    _show_attempts(found, runs.stage_info(engine, found["stage"]).source_sha256)


def _show_head(found: Mapping[str, Any]) -> None:
    output.say(f"run {found['id']}  {found['stage']}: {found['label']}  seed {found['seed']}")
    share = f" of {found['budget']:,}" if found["budget"] else ""
    cause = f" ({found['cause']})" if found["cause"] else ""
    output.say(f"{found['state']}{cause}, step {found['steps_done']:,}{share}, attempt {found['attempt']}")
    if found["message"]:
        output.say(f"message: {found['message']}")
    if found["tags"]:
        output.say("tags:    " + ", ".join(found["tags"]))
    if found["note"]:
        output.say(f"note:    {found['note']}")
    if found["wish"]:
        output.say(f"its worker is asked to {found['wish']}")
    output.say("config:  " + ", ".join(f"{k}={json.dumps(v)}" for k, v in found["config"].items()))
    if found["summary"]:
        output.say("summary: " + ", ".join(f"{k} {output.cell(v)}" for k, v in found["summary"].items()))


def _show_gate(found: Mapping[str, Any]) -> None:
    """What a waiting run waits for, and how that stands; why a skipped one was skipped."""
    gate = found.get("waits_for")
    if found["state"] == "waiting" and found["wake_at"] is not None:
        output.say(f"waits:   is tried again at {time.strftime('%H:%M:%S', time.localtime(found['wake_at']))}")
    elif gate is not None:
        word = "waits:  " if found["state"] == "waiting" else "waited: "
        output.say(f"{word} for {gate['condition']}")
        decided = f"gate {gate['decision']}" if gate["decision"] else "not yet"
        why = "" if gate["reason"] == found["message"] else f": {gate['reason']}"  # of a skipped run it is the message
        output.say(f"         {decided}{why}")
        if gate["stale"]:
            output.say(f"         stale: {gate['stale']}; see `rnnq plan --redecide`")
    if found["start_from"]:
        from rnnq import graph

        output.say(f"starts:  from {graph.start_words(found['start_from'])}")


def _show_curves(found: Mapping[str, Any]) -> None:
    for name, points in found["curves"].items():
        values = [value for _, value in points if value is not None]
        if values:
            ends = f"{output.cell(values[0])} → {output.cell(values[-1])}"
            bounds = f"between {output.cell(min(values))} and {output.cell(max(values))}"
            output.say(f"{name:>18} {sparkline(values)} {ends}, {bounds}, n={len(points)}")


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve as a line of blocks: the mean of each piece, scaled to the lowest and highest."""
    pieces = min(width, len(values))
    bounds = [round(i * len(values) / pieces) for i in range(pieces + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _show_files(found: Mapping[str, Any]) -> None:
    for name in ("checkpoint", "checkpoint_prev", "checkpoint_best"):
        saved = found[name]
        if saved:
            size = f"{saved['bytes'] / 1e6:.1f} MB"
            output.say(f"{name}: {saved['path']} (step {saved['step']:,}, {size}, sha256 {saved['sha256'][:12]})")
    kept = [one for one in found["artifacts"] if one["kind"] == "snapshot"]
    if kept:
        size = f"{sum(one['bytes'] for one in kept) / 1e6:.1f} MB"
        steps = sorted(one["step"] for one in kept)
        output.say(f"snapshots: {len(kept):,}, from step {steps[0]:,} to step {steps[-1]:,}, {size}")


def _show_lineage(found: Mapping[str, Any]) -> None:
    for word, relatives in (("from", found["parents"]), ("led to", found["children"])):
        for other in relatives:
            output.say(f"{word} run {other['run']} {other['stage']}: {other['label']} ({other['kind']})")


def _show_attempts(found: Mapping[str, Any], stage_source: str | None) -> None:
    for attempt in found["attempts"]:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["started_at"]))
        ended = attempt["ended"] or "running"
        took = "" if attempt["ended_at"] is None else f" after {attempt['ended_at'] - attempt['started_at']:.1f} s"
        steps = "" if attempt["step_from"] is None else f", steps {attempt['step_from']:,} to {attempt['step_to']:,}"
        inexact = ", not to the bit (other numerics)" if attempt["exact"] == 0 else ""
        output.say(f"attempt {attempt['attempt']}: {began} {ended}{took} on {attempt['device']}{steps}{inexact}")
        commit = (attempt["git_commit"] or "no git")[:12] + (" with changes" if attempt["git_dirty"] else "")
        output.say(f"  {attempt['worker']}, {commit}: {attempt['command_line']}")
        if attempt["source_sha256"] != stage_source:
            output.say("  the definition file has changed since")
        for text in (attempt["message"], attempt["traceback"]):
            for line in (text or "").rstrip().splitlines():
                output.say(f"  {line}")
