"""rnnq status, workers: what is pending, running, done and failed; who works; when it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import output
from rnnq.cli.options import DB, Db, Format, Rows, Stage
from rnnq.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from rnnq.cli.fit import Column
    from rnnq.status import StageStatus

Records = Sequence[Mapping[str, Any]]


def status(
    db: Db = DB,
    stage: Stage = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until q or Ctrl-C.")] = False,
    every: Annotated[
        float | None, typer.Option("--every", help="Seconds between two looks of --watch.", show_default="1")
    ] = None,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="With --watch: leave when nothing is open any more.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 while a stage has failed runs; with --watch, at its end.")
    ] = False,
    format: Rows = Format.table,
) -> None:
    """What is pending, running, done and failed; who works; when it ends."""
    if not watch and (every is not None or until_done):
        raise InputError(f"{'--until-done' if until_done else '--every'} goes with --watch")
    if every is not None and not 0.1 <= every <= 86400:
        raise InputError(f"--every {every:g}: not from 0.1 to 86,400 seconds")
    if watch and format is Format.csv:
        raise InputError("--watch has no CSV", "--format json prints a JSON document a line for each look")
    if watch:
        from rnnq.cli.watch import follow

        follow(db, stage, every or 1.0, until_done, format)
    else:
        _status(db, stage, format)
    if check:
        _check(db, stage)


def _check(db: str, stage: str | None) -> None:
    """Say which stages have failed runs, and leave with exit code 1 if one has."""
    from rnnq import db as database

    failed = {found.stage: found.counts.get("failed", 0) for found in chosen_stages(database.open(db), stage)}
    for name, n in failed.items():
        if n:
            output.remark(f"{name}: {output.count(n, 'failed run')}")
    if any(failed.values()):
        raise typer.Exit(1)


def _status(db: str, stage: str | None, format: Format) -> None:
    from rnnq import db as database
    from rnnq import status as overview

    engine = database.open(db)
    stages = chosen_stages(engine, stage)
    if format is Format.csv:
        _as_csv(stages)
        return
    workers = overview.workers(engine, stage)
    stopped = overview.stopped(engine, stage)
    failures = overview.failures(engine, stage)
    if format is Format.json:
        found = {"stages": [asdict(s) for s in stages], "workers": workers, "stopped": stopped, "failures": failures}
        output.as_json(found)
        return
    _show_stages(stages)
    if any(found.counts.get("waiting") for found in stages):
        _show_behind(*overview.behind(engine, stage))
    _show_workers(workers)
    _show_stopped(stopped)
    _show_failures(failures, stages)


def chosen_stages(engine: Engine, stage: str | None) -> list[StageStatus]:
    """All stages, or the one that is named. Raises InputError when it is not there."""
    from rnnq import status as overview
    from rnnq.errors import nearest

    found = overview.stages(engine, stage)
    if stage is not None and not found:
        known = [other.stage for other in overview.stages(engine)]
        raise InputError(f"there is no stage {stage!r}", nearest(stage, known) if known else "`rnnq init` adds one")
    return found


# ------------------------------------------------------------------------------------------------ for people


def eta_words(found: StageStatus) -> str:
    """When a stage ends: "2 h 10 min (1 h 55 min to 2 h 40 min)"; nothing when it has ended."""
    if found.eta_s == 0:
        return ""
    if found.eta_s is None:
        return "paused" if found.paused else "unknown"
    between = interval_words(found)
    return output.duration(found.eta_s) + (f" ({between})" if between else "")


def interval_words(found: StageStatus) -> str:
    """The interval around an ETA: "1 h 55 min to 2 h 40 min"; nothing where it is narrower than what is shown."""
    if not found.eta_s:
        return ""
    if found.eta_low_s is None:
        return "no interval yet"
    low, high = output.duration(found.eta_low_s), output.duration(found.eta_high_s)
    return f"{low} to {high}" if low != high else ""


def rate_words(found: StageStatus) -> str:
    """Runs per hour."""
    per_hour = found.runs_per_hour
    return "" if per_hour is None else f"{per_hour:,.0f}" if per_hour >= 10 else f"{per_hour:.1f}"


def state_of(row: Mapping[str, Any]) -> str:
    """A worker's state; leaving, when it was asked to and has not left yet."""
    return "leaving" if row["wish"] and row["state"] == "live" else str(row["state"])


def idle_words(row: Mapping[str, Any]) -> str:
    """What a worker without a run is about."""
    return row["message"] or ("looks for work" if row["state"] == "live" else "nothing")


def loss_words(row: Mapping[str, Any]) -> str:
    """The newest loss of a run, with its name where that is another one."""
    if row["metric"] is None:
        return ""
    value = "not finite" if row["loss"] is None else output.cell(row["loss"])
    return value if row["metric"] == "loss" else f"{row['metric']} {value}"


def _width() -> int | None:
    """Cells of a line of the terminal; None for a pipe or a file, where a line may be as long as it needs to be."""
    return output.console().width if sys.stdout.isatty() else None


def _show(rows: Records, columns: Sequence[Column]) -> None:
    """A table, or, where a column would have to go, paragraphs."""
    from rnnq.cli import fit

    width = _width()
    if fit.all_fit(rows, columns, width):
        console = output.console()
        for line in fit.table(rows, columns, width):
            console.print(line, soft_wrap=True)
    else:
        for words in fit.paragraphs(rows, columns, width):
            output.say(words)


def _show_stages(stages: Sequence[StageStatus]) -> None:
    """As much side by side as fits; the rest in a line for each stage below, or all of it in paragraphs."""
    from rnnq import query
    from rnnq.cli import fit
    from rnnq.cli.fit import Column

    if not stages:
        output.remark("there is no stage yet; `rnnq init DEFINITION` adds one")
        return
    counts = [Column("stage", "stage", 0), *(Column(state, state, 1, right=True) for state in query.STATES)]
    ends = Column("eta", "ETA", 1)
    more = [Column("total", "total", 1, right=True), Column("rate", "runs/h", 1, right=True)]
    reckoned = Column("reckoned", "reckoned from", 1)
    rows, width = [_stage_row(found) for found in stages], _width()
    layouts = [([*counts, *more, ends, reckoned], ()), ([*counts, *more, ends], ("reckoned",))]
    layouts += [([*counts, ends], ("all", "per_hour", "reckoned"))]
    columns, below = next((layout for layout in layouts if fit.all_fit(rows, layout[0], width)), layouts[0])
    _show(rows, columns)
    for row in rows:
        left_out = "; ".join(row[name] for name in below if row[name])
        if left_out:
            _say(f"{row['stage']}: {left_out}")


def _show_behind(runs: int, gates: int) -> None:
    if runs:
        wait = f"{output.count(runs, 'run')} {'waits' if runs == 1 else 'wait'} behind {output.count(gates, 'gate')}"
        _say(f"{wait}: `rnnq plan` shows what for")


def _say(text: str) -> None:
    from textwrap import wrap

    for line in wrap(text, _width() or 10_000, subsequent_indent="  "):
        output.say(line)


def _stage_row(found: StageStatus) -> dict[str, Any]:
    return {
        "stage": f"{found.stage} (paused)" if found.paused else found.stage,
        **{state: f"{n:,}" for state, n in found.counts.items()},
        "total": f"{found.total:,}",
        "all": output.count(found.total, "run"),
        "rate": rate_words(found),
        "per_hour": rate_words(found) and f"{rate_words(found)} runs/h",
        "eta": eta_words(found),
        "reckoned": "" if found.eta_s == 0 else found.reckoned,
    }


def _show_workers(workers: Records) -> None:
    from rnnq.cli.fit import Column

    if not workers:
        return
    columns = [Column("worker", "worker", 0), Column("device", "device", 1, plain=True)]
    columns += [Column("state", "state", 1, plain=True), Column("does", "does", 1, least=40, plain=True)]
    columns += [Column("beat", "beat", 1)]
    output.say("")
    rows = []
    for pack in packs(workers):
        first = pack[0]
        does = _does(first) if len(pack) == 1 else _pack_does(pack)
        rows.append({**first, "state": state_of(first), "does": does, "beat": _ago(first["beat_s_ago"])})
    _show(rows, columns)


def packs(workers: Records) -> list[Records]:
    """Rows of workers, one for each run in training, with those together that one worker trains as a pack."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in workers:
        found.setdefault(row["worker"], []).append(row)
    return list(found.values())


def members_words(pack: Records) -> str:
    """Which runs a pack has: "3-18", or "3-9, 11"."""
    parts: list[list[int]] = []
    for run in sorted(row["run"] for row in pack):
        if parts and run == parts[-1][-1] + 1:
            parts[-1].append(run)
        else:
            parts.append([run])
    shown = [f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:3], "..."])


def _pack_does(pack: Records) -> str:
    steps, losses = [row["step"] for row in pack], [row["loss"] for row in pack if row["loss"] is not None]
    at = f"step {min(steps):,}" if min(steps) == max(steps) else f"steps {min(steps):,}-{max(steps):,}"
    budgets = {row["budget"] for row in pack}
    share = f" of {pack[0]['budget']:,}" if len(budgets) == 1 and pack[0]["budget"] else ""
    name = pack[0]["metric"] or "loss"
    loss = f", {name} {output.cell(min(losses))} to {output.cell(max(losses))}" if losses else ""
    return f"pack of {len(pack)}: runs {members_words(pack)}, {at}{share}{loss}, {pack[0]['stage']}: {pack[0]['label']}"


def _ago(seconds: float) -> str:
    return f"{output.duration(max(seconds, 0))} ago"


def _does(row: Mapping[str, Any]) -> str:
    if row["run"] is None:
        return idle_words(row)
    share = f" of {row['budget']:,}" if row["budget"] else ""
    loss = f", {'loss ' if row['metric'] == 'loss' else ''}{loss_words(row)}" if row["metric"] else ""
    # the label comes last: it is the part that may be cut
    return f"run {row['run']}, step {row['step']:,}{share}{loss}, {row['stage']}: {row['label']}"


def _show_stopped(stopped: Records) -> None:
    """Workers that stopped themselves: a machine that needs a look."""
    if stopped:
        output.say("")
    for row in stopped:
        _say(stopped_words(row))


def stopped_words(row: Mapping[str, Any]) -> str:
    """Who stopped itself, where, when and why; a long reason is cut."""
    others = f" and {output.count(row['n'] - 1, 'other')}" if row["n"] > 1 else ""
    why = row["why"] if len(row["why"]) <= 300 else row["why"][:299] + "…"
    where = f"{row['host']}, {row['device']}"
    return f"worker {row['worker']}{others} ({where}) stopped itself {_ago(row['left_s_ago'])}: {why}"


def _show_failures(failures: Records, stages: Sequence[StageStatus]) -> None:
    from rnnq import status as overview
    from rnnq.cli.fit import Column

    if not failures:
        return
    columns = [Column("stage", "stage", 0), Column("n", "failed", 1, right=True)]
    columns += [Column("cause", "cause", 1, plain=True), Column("such", "such as run", 1)]
    columns += [Column("message", "message", 1, least=30, plain=True)]
    output.say("")
    _show([{**row, "n": f"{row['n']:,}", "such": output.cell(row["runs"])} for row in failures], columns)
    if any(found.counts.get("failed", 0) > overview.FAILED for found in stages):
        _say(f"of each stage the newest {overview.FAILED:,} failed runs are told apart")


def _as_csv(stages: Sequence[StageStatus]) -> None:
    from rnnq import query

    rows = [{**asdict(found), **found.counts, "total": found.total} for found in stages]
    numbers = ["total", "runs_per_hour", "eta_s", "eta_low_s", "eta_high_s"]
    output.rows(Format.csv, rows, ["stage", "paused", *query.STATES, *numbers, "reckoned"])


# ------------------------------------------------------------------------------------------------------ workers


def workers(
    db: Db = DB,
    all: Annotated[bool, typer.Option("--all", help="Every worker there ever was, and what it ended.")] = False,
    format: Rows = Format.table,
) -> None:
    """Who works, or was lost in the last hour, or stopped itself: on what, since when, and when it last beat."""
    from rnnq import db as database
    from rnnq import status as overview

    engine = database.open(db)
    found = overview.all_workers(engine) if all else [*overview.workers(engine), *overview.stopped(engine)]
    rows = [{**row, "state": state_of(row)} for row in found]
    counted = ["done", "failed", "lost"] if all else []
    if format is not Format.table:
        columns = ["worker", "host", "pid", "device", "state", "run", "stage", "label", "scope", "since", "beat_s_ago"]
        output.rows(format, rows, [*columns, "message", *counted])
        return
    if rows:
        shown = rows if all else [_with_members(pack) for pack in packs(rows)]
        _show([_worker_row(row) for row in shown], _worker_columns(counted))
    n = len({row["worker"] for row in rows})
    which = "" if all else ", live or lost in the last hour, or stopped by itself; --all: every one"
    output.remark(output.count(n, "worker") + which)


def _with_members(pack: Records) -> dict[str, Any]:
    if len(pack) == 1:
        return dict(pack[0])
    return {**pack[0], "run": members_words(pack)}


def _worker_columns(counted: Sequence[str]) -> list[Column]:
    from rnnq.cli.fit import Column

    columns = [Column("worker", "worker", 0), Column("host", "host", 1), Column("pid", "pid", 1, right=True)]
    columns += [Column("device", "device", 1, plain=True), Column("state", "state", 1, plain=True)]
    columns += [Column("run", "run", 1, right=True), Column("scope", "bound to", 1)]
    columns += [Column("since", "since", 1), Column("beat", "beat", 1)]
    columns += [Column(name, name, 1, right=True) for name in counted]
    return [*columns, Column("message", "message", 1, plain=True), Column("label", "label", 1, least=12, plain=True)]


def _worker_row(row: Mapping[str, Any]) -> dict[str, Any]:
    same_day = time.localtime(row["since"])[:3] == time.localtime()[:3]
    since = time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M", time.localtime(row["since"]))
    label = "" if row["run"] is None else f"{row['stage']}: {row['label']}"
    return {**row, "since": since, "beat": _ago(row["beat_s_ago"]), "label": label}
