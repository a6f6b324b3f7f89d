"""rnnq status, ls, show: what there is."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db, Filter, Format, Rows, Stage

BLOCKS = "▁▂▃▄▅▆▇█"


def status(db: Db = DB, stage: Stage = None, format: Rows = Format.table) -> None:
    """What is pending, running, done and failed; who works; when it ends."""
    from rnnq import db as database
    from rnnq import query
    from rnnq import status as overview
    from rnnq.errors import InputError, nearest

    engine = database.open(db)
    stages = overview.stages(engine, stage)
    if stage is not None and not stages:
        known = [found.stage for found in overview.stages(engine)]
        raise InputError(f"there is no stage {stage!r}", nearest(stage, known))
    workers = overview.workers(engine, stage)
    failures = overview.failures(engine, stage)
    if format is Format.json:
        output.as_json({"stages": [asdict(s) for s in stages], "workers": workers, "failures": failures})
        return
    rows = [_stage_row(found) for found in stages]
    states = [s for s in query.STATES if any(s in found.counts for found in stages)]
    output.rows(format, rows, ["stage", *states, "total", "runs/h", "ETA", "reckoned from"])
    if format is Format.table:
        _status_rest(workers, failures)


def _stage_row(found: Any) -> dict[str, Any]:
    per_hour = found.runs_per_hour
    rate = None if per_hour is None else round(per_hour) if per_hour >= 10 else round(per_hour, 1)
    name = f"{found.stage} (paused)" if found.paused else found.stage
    reckoned = "" if found.eta_s == 0 else found.reckoned
    eta = "" if found.eta_s == 0 else output.duration(found.eta_s) or "unknown"
    return {
        "stage": name,
        **found.counts,
        "total": found.total,
        "runs/h": rate,
        "ETA": eta,
        "reckoned from": reckoned,
    }


def _status_rest(workers: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]]) -> None:
    if workers:
        output.say("")
        rows = [{**row, "does": _does(row), "beat": f"{max(row['beat_s_ago'], 0):.0f} s ago"} for row in workers]
        output.table(rows, ["worker", "device", "state", "does", "beat"])
    if failures:
        output.say("")
        rows = [{**row, "failed": row["n"], "such as run": row["runs"]} for row in failures]
        output.table(rows, ["failed", "stage", "cause", "such as run", "message"])


def _does(row: Mapping[str, Any]) -> str:
    if row["run"] is None:
        return row["message"] or "looks for work"
    share = f" of {row['budget']:,}" if row["budget"] else ""
    return f"run {row['run']} {row['stage']}: {row['label']}, step {row['step']:,}{share}"


def ls(db: Db = DB, stage: Stage = None, filter: Filter = None, format: Rows = Format.table) -> None:
    """Runs, one a line."""
    from rnnq import db as database
    from rnnq import runs

    found = runs.find(database.open(db), stage, filter)
    columns = ["id", "stage", "state", "label", "seed", "attempt", "steps_done", "budget", "loss", "worker", "cause"]
    if format is Format.json:
        output.as_json([{**row, "checkpoint": path(row, "checkpoint")} for row in found])
        return
    output.rows(format, found, columns)
    if format is Format.table:
        output.remark(output.count(len(found), "run"))


def path(row: Mapping[str, Any], name: str) -> str | None:
    """The path of a checkpoint, below the study's folder."""
    return row[name]["path"] if row[name] else None


def show(
    run: Annotated[int, typer.Argument(help="The id of a run.", min=0, max=2**63 - 1)],
    db: Db = DB,
    format: Annotated[Format, typer.Option("--format", help="table or json.")] = Format.table,
) -> None:
    """One run whole: config, attempts, curves, checkpoints, lineage, trace."""
    from rnnq import db as database
    from rnnq import runs

    engine = database.open(db)
    found = runs.show(engine, run)
    if format is Format.json:
        output.as_json(found)
        return
    if format is Format.csv:
        output.rows(format, [found], [name for name, value in found.items() if not isinstance(value, list)])
        return
    _show_head(found)
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
    output.say("config:  " + ", ".join(f"{k}={json.dumps(v)}" for k, v in found["config"].items()))
    if found["summary"]:
        output.say("summary: " + ", ".join(f"{k} {output.cell(v)}" for k, v in found["summary"].items()))


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
