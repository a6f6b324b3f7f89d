"""rnnq plan: the graph of a study's gates, what it has cost and will cost, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnnq.cli import fit, output
from rnnq.cli.options import DB, DEFS, Db, Defs, Format, Rows
from rnnq.cli.sources import loaded, stated
from rnnq.errors import InputError

if TYPE_CHECKING:
    from rnnq.graph import Graph, Node, Standing

SIGNS = {"running": "◐", "pending": "○", "waiting": "◌", "failed": "✗", "done": "●", "skipped": "–", "cancelled": "–"}
SHOWN = 3  # of a list of seeds, runs or reasons


def plan(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="DEF...", help="Definition files; a stage, for --redecide."),
    ] = None,
    db: Db = DB,
    defs: Defs = DEFS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="What definitions would do and cost, before anything is queued.")
    ] = False,
    redecide: Annotated[
        bool, typer.Option("--redecide", help="Take back decisions that would be others today, and take them anew.")
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="What the runs answer to the questions of the definitions.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option("--save", help="Draw the graph, as PNG and SVG, into this folder.")
    ] = None,
    format: Rows = Format.table,
) -> None:
    """The graph of the study: stages, gates and decisions, what it has cost and will cost; what it answers."""
    given = names or []
    _refuse_mixed(given, dry_run, redecide, answers, save)
    if dry_run:
        from rnnq.cli import forecast

        forecast.dry_run(given, db, defs, format)
    elif redecide:
        _redecide(given, db, format)
    elif answers:
        from rnnq.cli import answers as told

        told.answer(given, db, defs, format)
    else:
        _plan(given, db, save, format)


def _refuse_mixed(names: Sequence[str], dry_run: bool, redecide: bool, answers: bool, save: Path | None) -> None:
    asked = [
        name
        for name, is_asked in (("--dry-run", dry_run), ("--redecide", redecide), ("--answers", answers))
        if is_asked
    ]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are different questions", "ask for one at a time")
    if save is not None and asked:
        raise InputError(f"--save draws the graph of the database, which {asked[0]} does not show")
    if dry_run and not names:
        raise InputError("--dry-run needs a definition file", "rnnq plan --dry-run defs/plan.py")
    if redecide and len(names) > 1:
        raise InputError("--redecide takes one stage, or none for all", "rnnq plan --redecide stage2")


# -------------------------------------------------------------------------------------------------------- the graph


def _plan(names: Sequence[str], db: str, save: Path | None, format: Format) -> None:
    from rnnq import db as database
    from rnnq import graph

    engine = database.open(db)
    found = graph.read(engine, stated(loaded(names)))
    rows = [node.as_row() for node in found.nodes]
    if format is Format.json:
        phases = [{"phase": phase, **graph.cost_row(nodes)} for phase, nodes in found.phases()]
        output.as_json({"stages": rows, "phases": phases, "total": graph.cost_row(found.nodes)})
    elif format is Format.csv:
        output.rows(format, rows, list(rows[0]) if rows else ["stage"])
    else:
        _show_graph(found)
        if not names and any(node.unknown for node in found.nodes):
            output.remark("of unknown cost: nothing like it was measured; `rnnq plan DEF` uses hours= of a definition")
    if save is not None and found.nodes:
        from rnnq.figures import graph as picture

        written = picture.save(found, save)
        output.remark(f"drawn in {save}/: " + ", ".join(path.name for path in written))


def _show_graph(found: Graph) -> None:
    if not found.nodes:
        output.remark("there is no stage yet; `rnnq init DEFINITION` adds one")
        return
    phases = found.phases()
    for phase, nodes in phases:
        if len(phases) > 1 or phase is not None:
            output.say("")
            fit.say(f"phase {phase}" if phase is not None else "without a phase")
        for node in nodes:
            _show_node(node)
    output.say("")
    _show_costs(phases, found.nodes)
    stale = [node.stage for node in found.nodes if node.stale]
    if stale:
        output.remark(f"decisions that would be others today, at {', '.join(stale)}: `rnnq plan --redecide` takes them")


def _show_node(node: Node) -> None:
    low, high = node.priority
    rank = f", priority {high}" if low == high else f", priority {low} to {high}"
    runs = ", ".join(f"{n:,} {state}" for state, n in node.runs.items())
    paused = ", paused" if node.paused else ""
    fit.say(f"{SIGNS[node.state]} {node.stage}: {runs} ({node.family}{rank}{paused})", "    ")
    for line in [*_waits_for(node), *_rules(node), *_decisions(node.gates), _starts_from(node), _cost_words(node)]:
        if line:
            fit.say(line, "      ", "    ")


def _waits_for(node: Node) -> list[str]:
    # a stage that its runs start from, without a condition, is told of where they start
    told = [arrow for arrow in node.after if arrow.when is not None or not arrow.start]
    return [f"after {arrow.shown()} {_seen(node.seen_of(arrow))}" for arrow in told]


def _seen(entries: Sequence[Mapping[str, Any]]) -> str:
    """How the runs that others wait for stand, or stood when that was decided: "[1.5; n = 5 of 5]"."""
    of, done, left = (sum(int(one[name]) for one in entries) for name in ("of", "done", "open"))
    if left:
        return f"[{of - left} of {of} ended]"
    values: dict[str, list[str]] = {}
    for one in entries:
        for name, value in (one.get("values") or {}).items():
            values.setdefault(name, []).append("null" if value is None else output.cell(float(value)))
    listed = {
        name: ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "") for name, found in values.items()
    }
    # the condition has said what a value is, where there is one alone
    said = list(listed.values()) if len(listed) == 1 else [f"{name} = {words}" for name, words in listed.items()]
    return f"[{'; '.join([*said, f'n = {done} of {of}'])}]"


def _rules(node: Node) -> list[str]:
    """What becomes of the runs behind a gate, where that is not what one would expect."""
    said = []
    if node.otherwise == "go":
        said.append("go on even where the condition does not hold")
    if node.on_failed == "go":
        said.append("go on without those that fail")
    return ["; ".join(said)] if said else []


def _decisions(standings: Sequence[Standing]) -> list[str]:
    """How the gates of a stage were decided: each decision once, with the values that it was taken on."""
    groups: dict[str | None, list[Standing]] = {}
    for one in standings:
        groups.setdefault(one.decision, []).append(one)
    lines = [_decision(decision, found, len(standings)) for decision, found in groups.items()]
    for one in [one for one in standings if one.stale][:SHOWN]:
        takes = f"--redecide takes back {output.count(one.movable, 'run')}" if one.movable else "its runs have begun"
        lines.append(f"stale{_of_seed(one)}: {one.stale} ({takes})")
    more = sum(bool(one.stale) for one in standings) - SHOWN
    return [*lines, f"stale: {more:,} more"] if more > 0 else lines


def _decision(decision: str | None, found: Sequence[Standing], of: int) -> str:
    words = f"gate {decision or 'not decided'}"
    if len(found) < of:
        seeds = [str(one.seed) for one in found if one.seed is not None]
        which = f"seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"
        words += f" for {which if len(seeds) == len(found) else output.count(len(found), 'gate')}"
    elif decision is None:
        return ""  # the lines above say why not
    whys = list(dict.fromkeys(one.reason for one in found)) if decision == "shut" else []
    return words + (f": {'; '.join(whys[:SHOWN])}{'; ...' if len(whys) > SHOWN else ''}" if whys else "")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[: 2 * SHOWN]) + (", ..." if len(words) > 2 * SHOWN else "")


def _of_seed(one: Standing) -> str:
    return "" if one.seed is None else f" for seed {one.seed}"


def _starts_from(node: Node) -> str:
    if node.start_from is None:
        return ""
    entries = [one for arrow in node.after if arrow.start for one in node.seen_of(arrow)]
    return f"starts from {node.start_from} {_seen(entries)}{_started(node)}"


def _started(node: Node) -> str:
    if not node.started:
        return ""
    pairs = [f"run {child} from {parent}" for child, parent in node.started[:SHOWN]]
    return f" ({', '.join(pairs)}{', ...' if len(node.started) > SHOWN else ''})"


def _cost_words(node: Node) -> str:
    lost = f" ({output.duration(node.spent.lost)} of it in lost attempts)" if node.spent.lost >= 1 else ""
    parts = [f"cost {output.duration(node.spent.seconds)}{lost}"] if node.spent.seconds else []
    if node.to_go_s:
        parts.append(f"to go {output.duration(node.to_go_s)}")
    if node.waiting_s:
        parts.append(f"{output.duration(node.waiting_s)} if let go on")
    known = "; ".join(basis for basis in node.basis if not basis.startswith("unknown"))
    if node.unknown and (parts or node.total > node.unknown):
        parts.append(f"{output.count(node.unknown, 'run')} of unknown cost")
    return ", ".join(parts) + (f"; {known}" if known else "")


def _show_costs(phases: Sequence[tuple[str | None, Sequence[Node]]], nodes: Sequence[Node]) -> None:

    rows = [_cost_row(phase or "without a phase", found) for phase, found in phases] if len(phases) > 1 else []
    rows.append(_cost_row("total", nodes))
    columns = [fit.Column("phase", "phase" if len(phases) > 1 else "", 0), fit.Column("runs", "runs", 1, right=True)]
    columns += [fit.Column("ended", "ended", 1, right=True), fit.Column("cost", "cost", 1, right=True)]
    columns += [fit.Column("lost", "lost", 1, right=True), fit.Column("to_go", "to go", 1, right=True)]
    columns += [fit.Column("waiting", "if let go on", 1, right=True), fit.Column("unknown", "unknown", 1, right=True)]
    fit.show(rows, columns)


def _cost_row(phase: str, nodes: Sequence[Node]) -> dict[str, Any]:
    from rnnq import graph, query

    costs = graph.cost_row(nodes)
    ended = sum(n for node in nodes for state, n in node.runs.items() if state not in query.OPEN)
    words = {name: output.duration(costs[f"{name}_h"] * 3600) for name in ("cost", "lost", "to_go", "waiting")}
    words |= {name: "" for name in ("lost", "waiting") if costs[f"{name}_h"] * 3600 < 0.5}
    unknown = output.count(costs["unknown_runs"], "run") if costs["unknown_runs"] else ""
    return {
        "phase": phase,
        "runs": f"{sum(node.total for node in nodes):,}",
        "ended": f"{ended:,}",
        **words,
        "unknown": unknown,
    }


# -------------------------------------------------------------------------------------------------------- redecide


def _redecide(names: Sequence[str], db: str, format: Format) -> None:
    from rnnq import db as database
    from rnnq import graph, queue, runs

    engine = database.open(db)
    stage = names[0] if names else None
    if stage is not None:
        runs.stage_info(engine, stage)
    decided = {key for key, gate in graph.read(engine).gates().items() if gate.decision is not None}
    made = queue.redecide(engine, stage)
    rows: list[dict[str, Any]] = [
        {"stage": one.stage, "decision": one.decision, "runs": len(one.runs), "reason": one.reason} for one in made
    ]
    for key, gate in graph.read(engine).gates().items():
        if key in decided and gate.decision is None:
            n = gate.runs.get("waiting", 0)
            rows.append({"stage": key[0], "decision": "undecided", "runs": n, "reason": gate.reason})
    if format is not Format.table:
        output.rows(format, rows, ["stage", "decision", "runs", "reason"])
    does = {"open": "may be trained", "shut": "skipped", "undecided": "waiting"}
    for row in rows if format is Format.table else ():
        counted = output.count(row["runs"], "run")
        fit.say(f"{row['stage']}: now {row['decision']}, {counted} {does[row['decision']]}: {row['reason']}")
    if not rows:
        output.remark("nothing was decided anew: each decision would be the same today, or its runs have begun")
