"""Every change of a run's state; nothing else writes one.

    waiting  -> pending (gate open, wake_at passed), skipped, cancelled
    pending  -> running (claim), cancelled
    running  -> done (finish), failed (fail, reap), cancelled, pending (release, reap), waiting (delayed retry)
    failed, cancelled, skipped -> pending (retry);   done -> pending (extend)
    cancelled -> waiting (retry of one whose gate is undecided)
    skipped, and pending that never ran -> waiting (redecide)

`attempt` rises in the claim statement and nowhere else. Every later write of the owner is guarded by run, attempt,
worker and state, not by the clock: a lease that is past its time but not reaped is still ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar
from unicodedata import category

from sqlalchemy import Connection, Engine, bindparam, text

from rnnq import db, gates, host
from rnnq.databases.words import IN_RANGE, LEVELS
from rnnq.errors import Conflict, DatabaseError, InputError, LeaseLost

CHUNK = 2000  # rows a transaction of init inserts: about 0.05 s, so that nobody's heartbeat waits long
LONG = 0.3  # seconds after which a transaction that decides on many gates ends, and another one goes on
LOST_LIMIT = 3  # attempts lost in a row without a new checkpoint, after which a run fails
FAILED_LIMIT = 3  # attempts failed in a row without a new checkpoint, for a cause that can heal
HEALING = ("oom", "stalled", "database")  # causes that another time, or another machine, may not have
REFUSED = 1.0  # seconds that a worker waits to put on record that a write of its was refused
DELAY = 60.0  # seconds until a run that failed for such a cause is tried again; four times as many the next time

P = ParamSpec("P")
T = TypeVar("T")
Point = tuple[str, int, float]  # name, step, value
Range = tuple[int, int]  # the first and the last of ids
Saved = Mapping[str, Any]  # a checkpoint file: path below the root, step, sha256, bytes


# ------------------------------------------------------------------------------------------ what enters, cleaned


def clean_text(value: str) -> str:
    """NUL, control codes and halves of pairs escaped: databases refuse some, terminals obey others."""
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cs") else _escaped(c) for c in value)


def _escaped(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"  # a file's name may hold lone surrogates


def clean(value: Any, name: str, nonfinite: list[str]) -> Any:
    """A value that JSON can hold. Numbers that are not finite become null, and their names are noted."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy or torch
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean_text(str(k)): clean(v, f"{name}.{k}" if name else str(k), nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item, name, nonfinite) for item in value]
    return value


def clean_summary(summary: Mapping[str, Any]) -> str:
    """A summary as JSON text. One NaN in it would make every filter on it fail."""
    nonfinite: list[str] = []
    cleaned = clean(summary, "", nonfinite)
    if nonfinite:
        cleaned["nonfinite"] = sorted(set(nonfinite))
    return _dump(cleaned)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _load(value: str | None) -> Any:
    return None if value is None else json.loads(value)


# ---------------------------------------------------------------------------------------------------------- init


@dataclass(frozen=True)
class NewRun:
    """A run to be: its config, checked, and what was derived from it."""

    label: str
    config: str
    fingerprint: str
    group_key: str
    seed: int | None
    pack_key: str | None
    budget: int | None
    parents: tuple[tuple[int, str, str], ...] = ()  # (parent run, kind, JSON detail)
    summary: Mapping[str, Any] | None = None  # of a run that was trained elsewhere: it is done from the start
    message: str | None = None
    gate: str | None = None  # JSON of gates.Gate: what it waits for
    start_from: str | None = None  # JSON: the run whose weights it starts from
    priority: int = 0


@dataclass(frozen=True)
class NewStage:
    """A stage to be made or added to, and all its runs."""

    name: str
    family: str
    version: int
    family_in_source: bool
    has_rule: bool
    source: str | None
    source_sha256: str | None
    fields: Mapping[str, str]
    metrics: Sequence[Mapping[str, Any]]
    seed_fields: Sequence[str]
    data: Mapping[str, str]
    runs: Sequence[NewRun] = field(default_factory=tuple)
    keep: str | None = None  # which checkpoints of its finished runs stay; None: as it is, or the default
    phase: str | None = None  # the part of a plan that it belongs to
    defined: bool = True  # False: some runs, with no word on the stage's phase or on what its other runs wait for
    partial: bool = False  # some of the definition's runs: the others are in it, too
    # keys of a list of experiments that nothing reads -> how many of its runs have them, and why
    ignored: Mapping[str, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Added:
    """What an init did to one stage. `left` are the runs that the definition no longer has; they stay."""

    stage: str
    added: int
    present: int
    left: tuple[str, ...]
    waiting: int = 0  # of those added: behind a gate
    labels: tuple[str, ...] = field(default=(), compare=False)  # of those added


def preview(engine: Engine, stages: Sequence[NewStage]) -> list[Added]:
    """What `init` would do. Raises InputError for a stage that exists with another family or other data."""
    with db.reading(engine) as connection:
        _refuse_changed(connection, stages)
        refuse_gates(stages, lambda: _known(connection, stages))
        return [_compare(stage, _present(connection, stage.name)) for stage in stages]


def init(engine: Engine, stages: Sequence[NewStage]) -> list[Added]:
    """Add the runs that are not there yet: all of them, or none.

    The rows go in by chunks, into intakes that no one sees or claims until the last transaction marks them
    complete. An intake that a dead process left open is removed; that of a living one is waited for.
    """
    found = preview(engine, stages)
    intakes = _open_intakes(engine, stages)
    try:
        found = preview(engine, stages)  # again: now nobody else adds to these stages
        for stage in stages:
            _insert_runs(engine, intakes, stage)
        _complete(engine, intakes, stages)
    except BaseException:
        for intake in intakes.values():
            _remove_intake(engine, intake)
        raise
    if any(run.gate for stage in stages for run in stage.runs):
        decide(engine)  # what they wait for may have ended before
    return found


def _known(connection: Connection, stages: Sequence[NewStage]) -> dict[str, gates.Known]:
    """The stages of the database; of those that are added to, with what runs wait for that stay as they are."""
    found = gates.known(connection)
    sql = """SELECT runs.fingerprint, gates.condition FROM runs JOIN gates ON gates.id = runs.gate
             JOIN intakes ON intakes.id = runs.intake AND intakes.complete
             WHERE runs.stage = :stage AND runs.state = 'waiting' AND gates.decision IS NULL"""
    for stage in stages:
        if stage.name in found:
            changed = {run.fingerprint for run in stage.runs} if stage.defined else set()
            rows = connection.execute(text(sql), {"stage": stage.name}).all()
            kept = {row.condition for row in rows if row.fingerprint not in changed}
            after = frozenset(parents.stage for gate in kept for parents in gates.of_json(gate).after)
            found[stage.name] = dataclasses.replace(found[stage.name], after=after)
    return found


def refuse_gates(stages: Sequence[NewStage], before: Callable[[], Mapping[str, gates.Known]] = dict) -> None:
    """Raises InputError for gates that name what there is not, or that wait for each other in a ring.

    `before` gives the stages that the database has.
    """
    wanted = {stage.name: _gates_of(stage) for stage in stages}
    if not any(wanted.values()):
        return
    known = dict(before())
    for stage in stages:
        was = known.get(stage.name, gates.Known(gates.NO_NAMES, frozenset(), frozenset()))
        scope = gates.scope(stage.fields, stage.metrics)
        seeds = was.seeds | {run.seed for run in stage.runs}
        after = frozenset(parents.stage for gate in wanted[stage.name] for parents in gate.after)
        known[stage.name] = gates.Known(scope, seeds, was.after | after)
    problems = [p for stage, found in wanted.items() for p in gates.problems(stage, found, known)]
    ring = gates.cycle({name: stage.after for name, stage in known.items()})
    if ring:
        problems.append(f"stages wait for each other: {' after '.join(ring)}")
    if problems:
        raise InputError(problems, "after=, when= and start_from= name stages of the same files, or of the database")


def _gates_of(stage: NewStage) -> list[gates.Gate]:
    return [gates.of_json(content) for content in dict.fromkeys(run.gate for run in stage.runs) if content]


def _compare(stage: NewStage, present: Mapping[str, str]) -> Added:
    wanted = {run.fingerprint for run in stage.runs}
    known = len(wanted & present.keys())
    left = tuple(label for key, label in present.items() if key not in wanted and not stage.partial)
    waiting = len({run.fingerprint for run in stage.runs if run.gate} - present.keys())
    labels = tuple(run.label for run in stage.runs if run.fingerprint not in present)
    return Added(stage.name, len(wanted) - known, known, left, waiting, labels)


def _present(connection: Connection, stage: str) -> dict[str, str]:
    sql = "SELECT runs.id, fingerprint, label FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete"
    rows = connection.execute(text(f"{sql} WHERE runs.stage = :stage ORDER BY runs.id"), {"stage": stage})
    return {row.fingerprint: f"run {row.id} ({row.label})" for row in rows}


def _refuse_changed(connection: Connection, stages: Sequence[NewStage]) -> None:
    problems = []
    for stage in stages:
        sql = """SELECT family, version, data FROM stages WHERE name = :name
                 AND EXISTS (SELECT 1 FROM intakes WHERE stage = :name AND complete)"""
        row = connection.execute(text(sql), {"name": stage.name}).one_or_none()
        if row is None:
            continue
        if row.family != stage.family:
            problems.append(f"stage {stage.name} exists with family {row.family}, not {stage.family}")
        known = _load(row.data)
        for corpus, sha256 in stage.data.items():
            if known.get(corpus, sha256) != sha256:
                was = known[corpus][:12]
                problems.append(f"stage {stage.name} was made with {corpus} of sha256 {was}, now it is {sha256[:12]}")
    if problems:
        raise InputError(problems, "give the stage another name, or use another --db")


def _open_intakes(engine: Engine, stages: Sequence[NewStage]) -> dict[str, int]:
    while True:
        opened, dead = _open_or_look(engine, stages)
        if opened is not None:
            return opened
        for intake in dead:
            _remove_intake(engine, intake)
        if not dead:
            time.sleep(0.05)  # a living init adds to one of our stages: it ends soon


@db.retried
def _open_or_look(engine: Engine, stages: Sequence[NewStage]) -> tuple[dict[str, int] | None, list[int]]:
    """An intake for each of the stages, all at once; or None, and the intakes in the way whose inits are dead."""
    with db.transaction(engine) as connection:
        rivals = [rival for stage in stages for rival in _rivals(connection, stage.name)]
        if not rivals:
            return {stage.name: _open_intake(connection, stage) for stage in stages}, []
        dead = sorted(intake for intake, alive in rivals if not alive)
        for intake in dead:  # should it only have slept, it finds out before it writes another row
            connection.execute(text("UPDATE intakes SET removing = :yes WHERE id = :id"), {"id": intake, "yes": True})
    return None, dead


def _rivals(connection: Connection, stage: str) -> list[tuple[int, bool]]:
    """Open intakes of a stage, each with whether its process may still live."""
    sql = f"""SELECT id, host, pid, pid_start, {db.NOW} - beat_at > (SELECT lease_s FROM study) AS silent
              FROM intakes WHERE stage = :stage AND NOT complete"""
    rows = connection.execute(text(sql), {"stage": stage}).all()
    return [(r.id, not (r.silent or host.is_gone(r.host, r.pid, r.pid_start))) for r in rows]


def _open_intake(connection: Connection, stage: NewStage) -> int:
    _write_stage(connection, stage, "INSERT INTO stages ({names}) VALUES ({values}) ON CONFLICT (name) DO NOTHING")
    sql = f"""INSERT INTO intakes (stage, complete, host, pid, pid_start, beat_at)
              VALUES (:stage, :no, :host, :pid, :start, {db.NOW}) ON CONFLICT DO NOTHING RETURNING id"""
    found = connection.execute(text(sql), {"stage": stage.name, "no": False, **_me()}).scalar()
    if found is None:  # of a rival that began between our look and now
        raise Conflict(f"another init adds to stage {stage.name}")
    return int(found)


def _me() -> dict[str, Any]:
    return {"host": host.name(), "pid": os.getpid(), "start": host.process_start(os.getpid())}


def _write_stage(connection: Connection, stage: NewStage, sql: str) -> None:
    values = {
        "name": stage.name,
        "family": stage.family,
        "version": stage.version,
        "family_in_source": stage.family_in_source,
        "has_rule": stage.has_rule,
        "source": stage.source,
        "source_sha256": stage.source_sha256,
        "command_line": host.command_line(),
        "fields": json.dumps(dict(stage.fields)),  # in the order in which the config declares them
        "metrics": _dump(list(stage.metrics)),
        "seed_fields": _dump(list(stage.seed_fields)),
        "data": _dump(dict(stage.data)),
        "keep": stage.keep,
        "phase": stage.phase,
    }
    names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
    changes = ", ".join(f"{name} = :{name}" for name in values if name not in ("name", "keep"))
    changes += ", keep = coalesce(:keep, keep)"  # a definition that is silent leaves what a person has said
    sql = sql.format(names=f"{names}, created_at", values=f"{marks}, {db.NOW}", changes=changes)
    connection.execute(text(sql), values)


def _insert_runs(engine: Engine, intakes: Mapping[str, int], stage: NewStage) -> None:
    with db.reading(engine) as connection:
        present = _present(connection, stage.name)
    fresh = [run for run in stage.runs if run.fingerprint not in present]
    sql = f"""INSERT INTO runs (stage, intake, family, label, config, fingerprint, group_key, seed, state, pack_key,
                                budget, source, source_sha256, created_at, steps_done, summary, loss, message, ended_at,
                                gate, start_from, priority)
              VALUES (:stage, :intake, :family, :label, :config, :fingerprint, :group_key, :seed, :state, :pack_key,
                      :budget, :source, :source_sha256, {db.NOW}, :steps, :summary, :loss, :message,
                      CASE WHEN :state = 'done' THEN {db.NOW} END, :gate_id, :start_from, :priority)"""
    behind = _insert_gates(engine, stage, fresh)
    same = {"stage": stage.name, "intake": intakes[stage.name], "family": stage.family}
    same |= {"source": stage.source, "source_sha256": stage.source_sha256}
    primary = next((str(metric["name"]) for metric in stage.metrics if metric["primary"]), "loss")
    for start in range(0, len(fresh), CHUNK):
        chunk = fresh[start : start + CHUNK]
        rows = [same | _row_of(run, primary) | {"gate_id": behind.get(run.gate)} for run in chunk]
        _insert_chunk(engine, intakes, sql, rows)
        time.sleep(0.02)  # leave a gap in which a waiting heartbeat finds the lock free


@db.retried
def _insert_chunk(engine: Engine, intakes: Mapping[str, int], sql: str, rows: Sequence[Mapping[str, Any]]) -> None:
    with db.transaction(engine) as connection:
        _hold(connection, intakes)
        connection.execute(text(sql), rows)


@db.retried
def _insert_gates(engine: Engine, stage: NewStage, runs: Sequence[NewRun]) -> dict[str | None, int]:
    """The ids of the gates that the runs wait for, each made once, by what they say."""
    wanted = list(dict.fromkeys(run.gate for run in runs if run.gate is not None and run.summary is None))
    if not wanted:
        return {}
    with db.transaction(engine) as connection:
        return {gate: _gate_id(connection, stage.name, gate) for gate in wanted}


def _gate_id(connection: Connection, stage: str, gate: str) -> int:
    values = {"stage": stage, "gate": gate}
    sql = "INSERT INTO gates (stage, condition) VALUES (:stage, :gate) ON CONFLICT DO NOTHING"
    connection.execute(text(sql), values)
    sql = "SELECT id FROM gates WHERE stage = :stage AND condition = :gate"
    return int(connection.execute(text(sql), values).scalar_one())


_RUN_FIELDS = ("label", "config", "fingerprint", "group_key", "seed", "pack_key", "budget", "message", "start_from",
               "priority")  # fmt: skip


def _row_of(run: NewRun, primary: str) -> dict[str, Any]:
    same = {name: getattr(run, name) for name in _RUN_FIELDS}
    if run.summary is None:
        return {**same, "state": "waiting" if run.gate else "pending", "steps": 0, "summary": None, "loss": None}
    ended = {"state": "done", "summary": clean_summary(run.summary), "loss": _loss(run.summary, primary)}
    return {**same, **ended, "steps": run.budget or 0}


def _loss(summary: Mapping[str, Any], primary: str) -> float | None:
    """What `runs.loss` holds: the primary metric of a summary; null when it is not finite."""
    value = clean(summary.get(primary), primary, [])
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _hold(connection: Connection, intakes: Mapping[str, int]) -> None:
    """Show that this init lives. Raises DatabaseError when another one removed an intake; no id is given twice."""
    sql = f"UPDATE intakes SET beat_at = {db.NOW} WHERE id = :id AND NOT complete AND NOT removing"
    for stage, intake in intakes.items():
        if connection.execute(text(sql), {"id": intake}).rowcount == 0:
            why = f"this init slept for so long that another one of stage {stage} took it for dead"
            raise DatabaseError(f"{why}; nothing was added", "start it again")


@db.retried
def _complete(engine: Engine, intakes: Mapping[str, int], stages: Sequence[NewStage]) -> None:
    with db.transaction(engine) as connection:
        _hold(connection, intakes)
        for stage in stages:
            _write_stage(connection, _merged(connection, stage), "UPDATE stages SET {changes} WHERE name = :name")
            for run in stage.runs:
                _write_lineage(connection, stage.name, run)
            _change_gates(connection, stage)
        for intake in intakes.values():
            # an init that added nothing leaves no intake behind: every claim visits each of them
            connection.execute(
                text("DELETE FROM intakes WHERE id = :id AND NOT EXISTS (SELECT 1 FROM runs WHERE intake = :id)"),
                {"id": intake},
            )
            connection.execute(text("UPDATE intakes SET complete = :yes WHERE id = :id"), {"id": intake, "yes": True})


def _change_gates(connection: Connection, stage: NewStage) -> None:
    """Runs that have not begun, and on whose gate nobody has decided, wait for what the definition says now."""
    # locked: whoever decides on one now is done before we look, and sees the runs that are here
    sql = f"SELECT id FROM gates WHERE stage = :stage ORDER BY id{db.words(connection).locked}"
    has_some = bool(connection.execute(text(sql), {"stage": stage.name}).all())
    if not has_some and not any(run.gate for run in stage.runs):
        return  # nobody's heartbeat shall wait for a look at all the runs of a stage without gates
    wanted = {run.fingerprint: run.gate for run in stage.runs} if stage.defined else {}
    # those that were there before: what this init has added waits for the right gate already
    sql = """SELECT runs.id, runs.state, runs.fingerprint, gates.condition
             FROM runs LEFT JOIN gates ON gates.id = runs.gate
             WHERE runs.stage = :stage AND runs.attempt = 0 AND runs.wake_at IS NULL AND gates.decision IS NULL
             AND runs.intake IN (SELECT id FROM intakes WHERE intakes.stage = :stage AND intakes.complete)
             AND (runs.state = 'waiting' OR (runs.state = 'pending' AND runs.gate IS NULL))"""
    rows = connection.execute(text(sql), {"stage": stage.name}).all()
    for row in rows:
        gate = wanted.get(row.fingerprint, row.condition)
        if gate == row.condition:
            continue
        values = {"run": row.id, "was": row.state, "state": "waiting" if gate else "pending"}
        values["gate"] = _gate_id(connection, stage.name, gate) if gate else None
        change = "UPDATE runs SET gate = :gate, state = :state WHERE id = :run AND state = :was AND attempt = 0"
        connection.execute(text(change), values)
    _follow(connection, stage.name)
    _forget_gates(connection, stage.name)


def _follow(connection: Connection, stage: str) -> None:
    """Runs that came when their gate was decided on already: a decision is final, and is theirs too."""
    sql = """SELECT DISTINCT gates.id, gates.decision, gates.seen FROM runs JOIN gates ON gates.id = runs.gate
             WHERE runs.stage = :stage AND runs.state = 'waiting' AND runs.wake_at IS NULL
             AND gates.decision IS NOT NULL"""
    for row in connection.execute(text(sql), {"stage": stage}).all():
        _apply(connection, row.id, row.decision, _load(row.seen)["reason"])


def _forget_gates(connection: Connection, stage: str) -> None:
    sql = "DELETE FROM gates WHERE stage = :stage AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.gate = gates.id)"
    connection.execute(text(sql), {"stage": stage})


def _merged(connection: Connection, stage: NewStage) -> NewStage:
    """The stage with what its older runs still need: their data, and names that the definition no longer has."""
    sql = "SELECT fields, metrics, data, phase FROM stages WHERE name = :n"
    row = connection.execute(text(sql), {"n": stage.name}).one()
    names = {metric["name"] for metric in stage.metrics}
    older = [metric for metric in _load(row.metrics) if metric["name"] not in names]
    return dataclasses.replace(
        stage,
        fields={**stage.fields, **{k: v for k, v in _load(row.fields).items() if k not in stage.fields}},
        metrics=[*stage.metrics, *(metric | {"primary": False} for metric in older)],
        data={**_load(row.data), **stage.data},
        phase=stage.phase if stage.defined else row.phase,
    )


def _write_lineage(connection: Connection, stage: str, run: NewRun) -> None:
    sql = """INSERT INTO lineage (child, parent, kind, detail)
             SELECT id, :parent, :kind, :detail FROM runs
             WHERE stage = :stage AND fingerprint = :fingerprint AND id != :parent
             ON CONFLICT DO NOTHING"""
    for parent, kind, detail in run.parents:
        values = {"stage": stage, "fingerprint": run.fingerprint, "parent": parent, "kind": kind, "detail": detail}
        connection.execute(text(sql), values)


_OF_RUNS = (("point", "run_id"), ("attempts", "run_id"), ("artifacts", "run_id"), ("tags", "run_id"),
            ("lineage", "child"), ("lineage", "parent"))  # fmt: skip


def _remove_intake(engine: Engine, intake: int) -> None:
    """Take back an open intake by chunks: one that was never completed, or one of a stage that is being deleted."""
    chunk = 100  # runs; some have thousands of points
    while True:
        began = time.monotonic()
        if not _remove_some(engine, intake, chunk):
            return
        took = time.monotonic() - began
        chunk = min(CHUNK, chunk * 2) if took < 0.1 else max(1, chunk // 2) if took > 0.3 else chunk
        time.sleep(0.02)


@db.retried
def _remove_some(engine: Engine, intake: int, limit: int) -> bool:
    """Whether more is to be removed."""
    with db.transaction(engine) as connection:
        if connection.execute(text("SELECT complete FROM intakes WHERE id = :id"), {"id": intake}).scalar():
            return False
        if _remove_runs(connection, intake, limit):
            return True
        sql = "DELETE FROM intakes WHERE id = :id RETURNING stage"
        stage = connection.execute(text(sql), {"id": intake}).scalar()
        if stage is not None:  # else another process removed it, and the next init may be under way
            _forget_gates(connection, stage)
    return False


def _remove_runs(connection: Connection, intake: int, limit: int) -> int:
    sql = f"SELECT id FROM runs WHERE intake = :id LIMIT :limit{db.words(connection).locked}"
    runs = connection.execute(text(sql), {"id": intake, "limit": limit}).scalars().all()
    connection.execute(text(f"UPDATE intakes SET beat_at = {db.NOW} WHERE id = :id"), {"id": intake})
    if runs:
        for table, column in (*_OF_RUNS, ("runs", "id")):
            statement = text(f"DELETE FROM {table} WHERE {column} IN :runs")
            connection.execute(statement.bindparams(bindparam("runs", list(runs), expanding=True)))
    return len(runs)


# ------------------------------------------------------------------------------------------------------- workers


@db.retried
def register(engine: Engine, worker: str, device: str, scope: Mapping[str, Any]) -> None:
    """Enter a worker, so that others see it and can tell whether it still lives."""
    sql = f"""INSERT INTO workers (id, host, pid, pid_start, device, scope, command_line, state, started_at, beat_at)
              VALUES (:id, :host, :pid, :start, :device, :scope, :line, 'live', {db.NOW}, {db.NOW})"""
    values = {"id": worker, "device": device, "scope": _dump(dict(scope)), "line": host.command_line(), **_me()}
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


@db.retried
def leave(engine: Engine, worker: str, message: str) -> None:
    """A worker says goodbye."""
    sql = f"UPDATE workers SET state = 'left', left_at = {db.NOW}, message = :message WHERE id = :id"
    with db.transaction(engine) as connection:
        connection.execute(text(sql), {"id": worker, "message": clean_text(message)})


def beat(engine: Engine, worker: str, held: Iterable[tuple[int, int]], now: float | None = None) -> dict[int, str]:
    """Renew the leases of exactly the runs that are named: (run, attempt) pairs.

    Returns {run: wish} for those that are still ours; the wish is "" when there is none. A run whose claim was
    answered but never heard is not named, and so expires.
    """
    return _beat(engine, worker, list(held), now)


@db.retried
def _beat(engine: Engine, worker: str, pairs: Sequence[tuple[int, int]], now: float | None) -> dict[int, str]:
    marks = ", ".join(f"(:r{i}, :a{i})" for i in range(len(pairs)))
    values: dict[str, Any] = {f"r{i}": run for i, (run, _) in enumerate(pairs)}
    values |= {f"a{i}": attempt for i, (_, attempt) in enumerate(pairs)}
    renew = f"""UPDATE runs SET lease_until = :now + (SELECT lease_s FROM study)
                WHERE worker = :worker AND state = 'running' AND (id, attempt) IN (VALUES {marks})
                RETURNING id, wish"""
    alive = "UPDATE workers SET beat_at = :now, state = 'live', left_at = NULL WHERE id = :worker"
    with db.transaction(engine) as connection:
        values |= {"worker": worker, "now": db.clock(connection, now)}
        connection.execute(text(alive), {"worker": worker, "now": values["now"]})
        if not pairs:
            return {}
        _lock(connection, [run for run, _ in pairs])
        return {row.id: row.wish or "" for row in connection.execute(text(renew), values).all()}


def _lock(connection: Connection, runs: Sequence[int]) -> None:
    """Before several runs are changed: lock them in the order of their ids, so that no two writers wait in a ring."""
    locked = db.words(connection).locked
    if locked:
        sql = text(f"SELECT id FROM runs WHERE id IN :runs ORDER BY id{locked}")
        connection.execute(sql.bindparams(bindparam("runs", list(runs), expanding=True)))


@db.retried
def ask_to_leave(engine: Engine, worker: str, wish: str) -> bool:
    """Ask a live worker to leave: "stop" at once, with its run given back, or "drain" after the run at hand.

    It hears of it at its next beat. False when it does not live.
    """
    with db.transaction(engine) as connection:
        sql = "UPDATE workers SET wish = :wish WHERE id = :id AND state = 'live'"
        found = connection.execute(text(sql), {"id": worker, "wish": wish}).rowcount == 1
        if found:
            _log(connection, wish, {"worker": worker})
        return found


def asked_to_leave(engine: Engine, worker: str) -> str | None:
    """What was asked of a worker: "stop", "drain", or nothing."""
    with db.reading(engine) as connection:
        found = connection.execute(text("SELECT wish FROM workers WHERE id = :id"), {"id": worker}).scalar()
    return None if found is None else str(found)


# --------------------------------------------------------------------------------------------------------- claim


@dataclass(frozen=True)
class Claim:
    """The right to train one run, and all that is needed to do it. `attempt` is the fencing token."""

    run: int
    attempt: int
    worker: str
    until: float  # when the lease ends, unless a beat renews it
    stage: str
    family: str
    label: str
    config: Mapping[str, Any]
    fingerprint: str
    pack_key: str | None
    budget: int | None
    steps_done: int
    checkpoint: Saved | None
    checkpoint_prev: Saved | None
    checkpoint_best: Saved | None
    source: str | None  # the definition file that holds the family; None for a family of a package
    source_sha256: str | None
    data: Mapping[str, str]  # {corpus: sha256} of the stage
    start_from: Mapping[str, Any] | None = None  # the run whose weights it starts from: see `parent_of`


# the cost does not grow with the table: see `claimable` in rnnq/databases/words.py
_CLAIM = """
{with_}
UPDATE runs SET state = 'running', attempt = attempt + 1, worker = :worker, wish = NULL, message = NULL, cause = NULL,
                lease_until = :now + (SELECT lease_s FROM study), started_at = coalesce(started_at, :now)
WHERE state = 'pending' AND id IN ({claimable})
RETURNING id, attempt, lease_until, stage, family, label, config, fingerprint, pack_key, budget, steps_done,
          checkpoint, checkpoint_prev, checkpoint_best, priority, start_from,
          (SELECT CASE WHEN family_in_source THEN source END FROM stages WHERE name = runs.stage) AS source,
          (SELECT source_sha256 FROM stages WHERE name = runs.stage) AS source_sha256,
          (SELECT data FROM stages WHERE name = runs.stage) AS data
"""

_WAKE = """UPDATE runs SET state = 'pending', wake_at = NULL WHERE id IN (
               SELECT id FROM runs WHERE state = 'waiting' AND wake_at <= :now{})"""

_ATTEMPT = """
INSERT INTO attempts (run_id, attempt, worker, host, device, started_at, git_commit, git_dirty, command_line,
                      versions, source_sha256)
VALUES (:run, :attempt, :worker, :host, :device, :now, :git_commit, :git_dirty, :command_line,
        :versions, :source_sha256)
"""


def claim(
    engine: Engine,
    worker: str,
    provenance: Mapping[str, Any],
    limit: int = 1,
    stage: str | None = None,
    without: Iterable[str] = (),
    now: float | None = None,
    kind: tuple[str, str | None] | None = None,
    within: Range | None = None,
) -> list[Claim]:
    """Take up to `limit` pending runs: highest priority first, then oldest; none of the stages `without`.

    With `kind`, a stage and a pack key, only runs that can be trained together as one pack; with `within`, only runs
    of that range of ids.

    Each claim is ours for LEASE seconds unless `beat` renews it. An empty list means that nothing is pending now,
    not that all is done. `provenance` goes into the attempt's row: host, device, git_commit, git_dirty,
    command_line, versions.
    """
    scope = _scope_of(stage, without, within)
    if kind is not None:
        scope |= {"stage": kind[0], "pack_key": kind[1]}
    return [_claim_of(row, worker) for row in _take(engine, worker, provenance, limit, scope, now)]


def _scope_of(stage: str | None, without: Iterable[str], within: Range | None) -> dict[str, Any]:
    scope = {"stage": stage, "without": _dump(list(without))}
    return scope if within is None else scope | {"first": within[0], "last": within[1]}


@db.retried
def _take(
    engine: Engine,
    worker: str,
    provenance: Mapping[str, Any],
    limit: int,
    scope: Mapping[str, Any],
    now: float | None,
) -> list[Any]:
    with db.transaction(engine) as connection:
        moment = db.clock(connection, now)
        connection.execute(text(_WAKE.format(db.words(connection).locked_free)), {"now": moment})
        rows = _claimed(connection, {"worker": worker, "now": moment, "limit": limit, **scope})
        same = {**provenance, "worker": worker, "now": moment}
        made = [same | {"run": r.id, "attempt": r.attempt, "source_sha256": r.source_sha256} for r in rows]
        if made:
            connection.execute(text(_ATTEMPT), made)
    return rows


def _claim_statement(connection: Connection, alike: bool = False, within: bool = False) -> str:
    """Of one shape only, through the index that begins with it; or of any. `within` a range of ids; or anywhere."""
    words = db.words(connection)
    with_, claimable = words.claim_with, words.claimable
    if within:
        with_, claimable = words.claim_with_within, words.claimable_within
    found = _CLAIM.format(with_=with_, claimable=claimable)
    some = " AND inner_run.pack_key = :pack_key ORDER BY inner_run"
    return re.sub(r"\s+ORDER BY inner_run", some, found) if alike else found


def _claimed(connection: Connection, values: Mapping[str, Any]) -> list[Any]:
    statement = text(_claim_statement(connection, "pack_key" in values, "first" in values))
    rows: list[Any] = []
    # the heads of the queues, and more of them only where rivals had all of these
    for rivals in db.words(connection).rivals:
        if len(rows) < values["limit"]:
            rows += connection.execute(statement, {**values, **rivals, "limit": values["limit"] - len(rows)}).all()
    return sorted(rows, key=lambda row: (-row.priority, row.id))


@dataclass(frozen=True)
class Ahead:
    """The run that would be claimed next, and who waits with it."""

    stage: str
    family: str
    config: Mapping[str, Any]
    budget: int | None
    pack_key: str | None
    source: str | None
    source_sha256: str | None
    pending: int  # runs of its stage and pack key, itself included; counted up to MANY
    workers: int  # live ones that could claim it


MANY = 4096


def ahead(
    engine: Engine, stage: str | None = None, without: Iterable[str] = (), within: Range | None = None
) -> Ahead | None:
    """What `claim` would take now; None when nothing is pending. Nothing is promised: others claim meanwhile."""
    skipped = db.words(engine).words("without")
    stages = f"""FROM intakes JOIN stages ON stages.name = intakes.stage
              JOIN runs AS head ON head.id = (
                  SELECT inner_run.id FROM runs AS inner_run
                  WHERE inner_run.state = 'pending' AND inner_run.intake = intakes.id
                  AND inner_run.stage = intakes.stage
                  ORDER BY inner_run.priority DESC, inner_run.id LIMIT 1)
              WHERE intakes.complete AND NOT stages.paused AND (:stage IS NULL OR stages.name = :stage)
              AND stages.name NOT IN {skipped}"""
    levels = f"""FROM levels JOIN stages ON stages.name = levels.stage
              JOIN runs AS head ON head.id = (SELECT inner_run.id FROM runs AS inner_run WHERE {IN_RANGE} LIMIT 1)"""
    head = f"""{"" if within is None else LEVELS.format(skipped)}
              SELECT head.id, head.stage, head.family, head.config, head.budget, head.pack_key, stages.source_sha256,
                     CASE WHEN stages.family_in_source THEN stages.source END AS source
              {stages if within is None else levels}
              ORDER BY head.priority DESC, head.id LIMIT 1"""
    alike = f"""SELECT count(*) FROM (
                   SELECT 1 FROM intakes JOIN runs ON runs.intake = intakes.id AND runs.stage = intakes.stage
                   WHERE intakes.complete AND intakes.stage = :stage AND runs.state = 'pending'
                   AND runs.pack_key = :pack_key{_in_range("runs", within)} LIMIT :many) AS alike"""
    with db.reading(engine) as connection:
        row = connection.execute(text(head), _scope_of(stage, without, within)).one_or_none()
        if row is None:
            return None
        values = {"stage": row.stage, "pack_key": row.pack_key, "many": MANY}
        pending = connection.execute(text(alike), values).scalar_one() if row.pack_key is not None else 1
        scopes = connection.execute(text("SELECT scope FROM workers WHERE state = 'live'")).scalars().all()
    workers = sum((_load(scope) or {}).get("stage") in (None, row.stage) for scope in scopes)
    names = ("stage", "family", "budget", "pack_key", "source")
    return Ahead(
        config=_load(row.config),
        source_sha256=row.source_sha256 if row.source else None,
        pending=pending,
        workers=workers,
        **{name: getattr(row, name) for name in names},
    )


def _in_range(runs: str, within: Range | None) -> str:
    """For a WHERE; the ids are ours, not a user's words."""
    return "" if within is None else f" AND {runs}.id BETWEEN {int(within[0])} AND {int(within[1])}"


def packs(engine: Engine, shape: str) -> list[dict[str, Any]]:
    """What workers have found out about packs of a shape: members, equal, rate, fits."""
    sql = "SELECT members, equal, rate, fits FROM packs WHERE shape = :shape ORDER BY members"
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"shape": shape}).all()
    return [
        {"members": row.members, "equal": None if row.equal is None else bool(row.equal), "rate": row.rate,
         "fits": bool(row.fits)}
        for row in rows
    ]  # fmt: skip


@db.retried
def remember_pack(engine: Engine, shape: str, members: int, equal: bool | None, rate: float | None, fits: bool) -> None:
    """What a worker has found out about packs of so many members; the newest counts."""
    sql = f"""INSERT INTO packs (shape, members, equal, rate, fits, found_at)
              VALUES (:shape, :members, :equal, :rate, :fits, {db.NOW})
              ON CONFLICT (shape, members) DO UPDATE SET equal = excluded.equal, rate = excluded.rate,
              fits = excluded.fits, found_at = excluded.found_at"""
    values = {"shape": shape, "members": members, "equal": equal, "rate": rate, "fits": fits}
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


def _claim_of(row: Any, worker: str) -> Claim:
    same = ("attempt", "stage", "family", "label", "fingerprint", "pack_key", "budget", "steps_done")
    parsed = ("config", "checkpoint", "checkpoint_prev", "checkpoint_best", "data", "start_from")
    return Claim(
        run=row.id,
        worker=worker,
        until=row.lease_until,
        source=row.source,
        source_sha256=row.source_sha256 if row.source else None,
        **{name: getattr(row, name) for name in same},
        **{name: _load(getattr(row, name)) for name in parsed},
    )


def count(engine: Engine, stage: str | None = None, within: Range | None = None) -> tuple[int, int]:
    """Runs in the scope that are open (pending, running, or waiting and able to open), and all of them.

    Paused stages are out of every worker's scope.
    """
    sql = f"""SELECT runs.state IN ('waiting', 'pending', 'running') AS open, count(*) AS n
             FROM intakes JOIN stages ON stages.name = intakes.stage
             JOIN runs ON runs.intake = intakes.id AND runs.stage = intakes.stage{_in_range("runs", within)}
             WHERE intakes.complete AND NOT stages.paused AND (:stage IS NULL OR stages.name = :stage)
             GROUP BY open"""
    with db.reading(engine) as connection:
        found = {bool(row.open): int(row.n) for row in connection.execute(text(sql), {"stage": stage})}
    return found.get(True, 0), sum(found.values())


def has_open(
    engine: Engine, stage: str | None = None, without: Iterable[str] = (), within: Range | None = None
) -> bool:
    """Whether anything in the scope is open: looks at one row, not at all of them.

    A run that waits is, while something goes on anywhere that may let it go on, or its time will come.
    """
    sql = """SELECT 1 FROM intakes JOIN stages ON stages.name = intakes.stage
             WHERE intakes.complete AND NOT stages.paused AND (:stage IS NULL OR stages.name = :stage)
             AND stages.name NOT IN {}
             AND EXISTS (SELECT 1 FROM runs WHERE runs.intake = intakes.id AND runs.stage = intakes.stage
                         AND runs.state IN {}{}) LIMIT 1"""
    anywhere = """SELECT 1 WHERE EXISTS (SELECT 1 FROM runs WHERE state = 'waiting' AND wake_at > 0)
                  OR EXISTS (SELECT 1 FROM runs WHERE state = 'running' AND lease_until > 0)"""
    with db.reading(engine) as connection:
        skipped = db.words(connection).words("without")

        def there_is(states: str, stage: str | None, within: Range | None = None) -> bool:
            values = {"stage": stage, "without": _dump(list(without))}
            statement = sql.format(skipped, states, _in_range("runs", within))
            return connection.execute(text(statement), values).first() is not None

        if there_is("('pending', 'running')", stage, within):
            return True
        if not there_is("('waiting')", stage, within):
            return False
        return connection.execute(text(anywhere)).first() is not None or there_is("('pending')", None)


# --------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Decided:
    """A gate that was decided on, and the runs that it lets go on or leaves out."""

    stage: str
    decision: str  # open, shut
    reason: str
    runs: tuple[int, ...]


_UNDECIDED = """SELECT gates.id, gates.stage, gates.condition FROM gates WHERE gates.decision IS NULL
                AND EXISTS (SELECT 1 FROM intakes WHERE intakes.stage = gates.stage AND intakes.complete)
                AND EXISTS (SELECT 1 FROM runs WHERE runs.gate = gates.id) ORDER BY gates.id"""


def decide(engine: Engine) -> list[Decided]:
    """Decide on every gate whose runs have all ended: its own become pending, or are skipped, with the reason.

    What is skipped may be what others wait for: they are decided on in the same transaction, unless there are hundreds.
    Without gates it costs a look at one index.
    """
    with db.reading(engine) as connection:
        ready = bool(_ripe(connection))
    made: list[Decided] = []
    while ready:
        found, ready = _decide(engine)
        made += found
        if ready:
            time.sleep(0.02)  # leave a gap in which a waiting heartbeat finds the lock free
    return made


def _ripe(connection: Connection, lock: str = "") -> list[Any]:
    """The rows of the gates that can be decided on now. Locked, they are ours from here on: of two that end the last
    parents, the second sees what the first did.
    """
    rows = connection.execute(text(_UNDECIDED + lock)).all()
    ripe = set(gates.ripe(connection, {row.id: gates.of_json(row.condition) for row in rows}))
    return [row for row in rows if row.id in ripe]


@db.retried
def _decide(engine: Engine) -> tuple[list[Decided], bool]:
    """What was decided in one transaction, and whether there may be more."""
    made: list[Decided] = []
    until = time.monotonic() + LONG
    with db.transaction(engine) as connection:
        while True:
            before = len(made)
            for row in _ripe(connection, db.words(connection).locked):
                if time.monotonic() > until and made:
                    return made, True
                decided = _decide_on(connection, row)
                made += [decided] if decided else []
            if len(made) == before:
                return made, False


def _decide_on(connection: Connection, row: Any) -> Decided | None:
    seen = gates.look(connection, gates.of_json(row.condition))
    if seen.decision is None:
        return None
    sql = f"""UPDATE gates SET decision = :decision, seen = :seen, decided_at = {db.NOW}
              WHERE id = :gate AND decision IS NULL"""
    values = {"gate": row.id, "decision": seen.decision, "seen": clean_text(seen.to_json())}
    if connection.execute(text(sql), values).rowcount == 0:
        return None
    return Decided(row.stage, seen.decision, seen.reason, _apply(connection, row.id, seen.decision, seen.reason))


def _apply(connection: Connection, gate: int, decision: str, reason: str) -> tuple[int, ...]:
    """What a decision means for the runs that wait behind a gate; returns which."""
    changes = "state = 'pending', message = NULL"
    if decision == gates.SHUT:
        changes = f"state = 'skipped', message = :reason, ended_at = {db.NOW}"
    # said so that it is found by its gate: there may be thousands without a time to wake at
    sql = (
        f"UPDATE runs SET {changes} WHERE gate = :gate AND state = 'waiting' AND coalesce(wake_at, 0) = 0 RETURNING id"
    )
    found = connection.execute(text(sql), {"gate": gate, "reason": clean_text(reason)}).scalars()
    return tuple(sorted(found))


def redecide(engine: Engine, stage: str | None = None) -> list[Decided]:
    """Take back the decisions that would be others today, with those that follow from them; returns the new ones.

    Runs that have begun, or that a person has retried, stay as they are.
    """
    made: list[Decided] = []
    while _reopen(engine, stage):
        stage = None  # what follows may be anywhere
        made += decide(engine)
    return made


@db.retried
def _reopen(engine: Engine, stage: str | None = None, waiting_for: Collection[str] | None = None) -> set[str]:
    """Gates are undecided again where the runs say other than they did; returns the stages that they are of.

    Of one stage, or of all; or those that wait for certain ones.
    """
    sql = """SELECT id, stage, decision, condition FROM gates WHERE decision IS NOT NULL
             AND (:stage IS NULL OR stage = :stage) ORDER BY id"""
    back = """UPDATE runs SET state = 'waiting', message = NULL, ended_at = NULL
              WHERE gate = :gate AND attempt = 0 AND state = :state AND wake_at IS NULL RETURNING id"""
    reopened: set[str] = set()
    runs: list[int] = []
    with db.transaction(engine) as connection:
        locked = db.words(connection).locked
        for row in connection.execute(text(sql + locked), {"stage": stage}).all():
            gate = gates.of_json(row.condition)
            if waiting_for is not None and not {of.stage for of in gate.after} & set(waiting_for):
                continue
            if gates.look(connection, gate).decision == row.decision:
                continue
            state = "skipped" if row.decision == gates.SHUT else "pending"
            found = list(connection.execute(text(back), {"gate": row.id, "state": state}).scalars())
            if found:
                undecided = "UPDATE gates SET decision = NULL, seen = NULL, decided_at = NULL WHERE id = :gate"
                connection.execute(text(undecided), {"gate": row.id})
                reopened.add(row.stage)
                runs += found
        _log(connection, "redecide", {"runs": sorted(runs)})
    return reopened


# ------------------------------------------------------------------------------------------- the owner's writes


def _write(connection: Connection, claim: Claim, changes: str, values: Mapping[str, Any]) -> None:
    """Change the run if it is still ours. Raises LeaseLost when it is not."""
    guard = "id = :run AND attempt = :attempt AND worker = :worker AND state = 'running'"
    ours = {"run": claim.run, "attempt": claim.attempt, "worker": claim.worker}
    if connection.execute(text(f"UPDATE runs SET {changes} WHERE {guard}"), {**values, **ours}).rowcount == 0:
        raise _lease_lost(connection, claim)


def _lease_lost(connection: Connection, claim: Claim) -> LeaseLost:
    row = connection.execute(
        text("SELECT state, attempt, worker, steps_done FROM runs WHERE id = :run"), {"run": claim.run}
    ).one_or_none()
    if row is None:
        return LeaseLost(f"run {claim.run} is no longer in the database", "it was deleted; this worker goes on")
    who = f"attempt {row.attempt} of {row.worker} has it" if row.worker else f"it is {row.state} now"
    return LeaseLost(
        f"run {claim.run} attempt {claim.attempt} is no longer ours: {who}",
        f"nothing is lost; the run stands at step {row.steps_done:,}",
    )


def _fenced(write: Callable[P, T]) -> Callable[P, T]:
    """A write of a run's owner. One that is refused, because the run is no longer its own, stays on record."""

    @functools.wraps(write)
    def fenced(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return write(*args, **kwargs)
        except LeaseLost:
            _refused(write.__name__, *args)
            raise

    return fenced


def _refused(what: str, *args: Any) -> None:
    """For the doctor alone, so neither patient nor loud: whatever happens, the worker goes on as if this were not."""
    with contextlib.suppress(Exception):
        engine, claim, *_ = args
        detail = {"run": claim.run, "attempt": claim.attempt, "worker": claim.worker, "what": what}
        with db.transaction(engine, REFUSED) as connection:
            _log(connection, "refused", detail)


def _insert_points(connection: Connection, run: int, points: Iterable[Point]) -> None:
    points = [(clean_text(name), step, value) for name, step, value in points]
    if not points:
        return
    ids = _metric_ids(connection, {name for name, _, _ in points})
    rows = [
        {"run": run, "metric": ids[name], "step": step, "value": value if math.isfinite(value) else None}
        for name, step, value in points
    ]
    sql = "INSERT INTO point (run_id, metric_id, step, value) VALUES (:run, :metric, :step, :value)"
    connection.execute(text(sql + db.again(connection)), rows)


def _metric_ids(connection: Connection, names: set[str]) -> dict[str, int]:
    known = {row.name: row.id for row in connection.execute(text("SELECT id, name FROM metrics"))}
    for name in sorted(names - known.keys()):
        # in order, as others may enter the same names: whoever comes second waits, and reads the number of the first
        sql = "INSERT INTO metrics (name) VALUES (:name) ON CONFLICT DO NOTHING RETURNING id"
        made = connection.execute(text(sql), {"name": name}).scalar()
        again = text("SELECT id FROM metrics WHERE name = :name")
        known[name] = made if made is not None else connection.execute(again, {"name": name}).scalar_one()
    return known


@dataclass(frozen=True)
class Start:
    """Where an attempt begins: the step, the curve up to it, and whether the run can still have the same bits."""

    step: int
    curve: Sequence[Point]
    numerics: Mapping[str, Any]
    exact: bool
    checkpoint: Saved | None = None  # the file that was opened
    problems: Sequence[str] = ()  # what was wrong with the files that the row named before it


@_fenced
@db.retried
def restore(engine: Engine, claim: Claim, start: Start) -> None:
    """Before training goes on: make the run's points equal to the checkpoint's curve.

    Points that a dead attempt wrote after its last checkpoint go. A damaged checkpoint is no longer named by the
    row, so that it cannot become "the one before". Raises LeaseLost.
    """
    with db.transaction(engine) as connection:
        changes = "steps_done = :step"
        values: dict[str, Any] = {"step": start.step}
        if start.problems:
            changes += ", checkpoint_prev = NULL, checkpoint = :checkpoint"
            values["checkpoint"] = _dump(dict(start.checkpoint)) if start.checkpoint else None
        _write(connection, claim, changes, values)
        connection.execute(text("DELETE FROM point WHERE run_id = :run"), {"run": claim.run})
        _insert_points(connection, claim.run, start.curve)
        sql = """UPDATE attempts SET step_from = :step, step_to = :step, numerics = :numerics, exact = :exact,
                        message = :message WHERE run_id = :run AND attempt = :attempt"""
        values |= {"numerics": _dump(dict(start.numerics)), "exact": start.exact}
        values |= {"message": clean_text("\n".join(start.problems)) or None}
        connection.execute(text(sql), values | {"run": claim.run, "attempt": claim.attempt})


@_fenced
@db.retried
def record(
    engine: Engine,
    claim: Claim,
    step: int,
    points: Iterable[Point] = (),
    checkpoint: Saved | None = None,
    patience: float | None = None,
) -> list[str]:
    """Write points, and a new checkpoint when there is one, in one fenced transaction.

    `patience` is how many seconds to wait for a lock, by default db.BUSY. Returns the paths of files that the row named
    before and no longer names: only now may they go. Raises LeaseLost.
    """
    with db.transaction(engine, patience) as connection:
        before = _files(connection, claim.run)
        changes = "steps_done = :step"
        values: dict[str, Any] = {"step": step}
        if checkpoint is not None:
            # progress was saved: earlier losses and failures no longer count, and the run may join a pack again
            changes += ", checkpoint_prev = checkpoint, checkpoint = :checkpoint, pack_key = :pack_key"
            changes += ", lost = 0, failures = 0"
            values |= {"checkpoint": _dump(dict(checkpoint)), "pack_key": claim.pack_key}
        _write(connection, claim, changes, values)
        _insert_points(connection, claim.run, points)
        return _let_go(connection, claim.run, before)


@_fenced
@db.retried
def snapshot(engine: Engine, claim: Claim, saved: Saved) -> list[str]:
    """Name a file of weights as the run's snapshot of a step, in place of one that an earlier attempt made there.

    Returns the paths of files that are named no longer. Raises LeaseLost.
    """
    with db.transaction(engine) as connection:
        _write(connection, claim, "steps_done = steps_done", {})  # fenced
        of_step = "FROM artifacts WHERE run_id = :run AND kind = 'snapshot' AND step = :step"
        values = {"run": claim.run, "step": saved["step"]}
        old = [row.path for row in connection.execute(text(f"SELECT path {of_step}"), values)]
        connection.execute(text(f"DELETE {of_step}"), values)
        _insert_artifact(connection, claim.run, "snapshot", saved)
    return [path for path in old if path != saved["path"]]


@db.retried
def record_together(
    engine: Engine, progress: Sequence[tuple[Claim, int, Sequence[Point]]], patience: float = db.BUSY
) -> list[int]:
    """Write points of several runs, each with the step that they reach to, in one transaction.

    Each run is fenced on its own. Returns those that are no longer ours, of which nothing is written.
    """
    lost = []
    with db.transaction(engine, patience) as connection:
        for claim, step, points in sorted(progress, key=lambda one: one[0].run):  # all writers go in this order
            try:
                _write(connection, claim, "steps_done = :step", {"step": step})
            except LeaseLost:
                lost.append(claim)
            else:
                _insert_points(connection, claim.run, points)
    for claim in lost:
        _refused("record", engine, claim)
    return [claim.run for claim in lost]


def _let_go(connection: Connection, run: int, before: set[str]) -> list[str]:
    """The files that the row named and names no longer. Those of an earlier end are no artifacts any more."""
    gone = sorted(before - _files(connection, run))
    sql = "DELETE FROM artifacts WHERE run_id = :run AND path = :path"
    for path in gone:
        connection.execute(text(sql), {"run": run, "path": path})
    return gone


def _files(connection: Connection, run: int) -> set[str]:
    """The paths that the row names; it is ours from here on, so that they are those that a write replaces."""
    sql = f"SELECT checkpoint, checkpoint_prev, checkpoint_best FROM runs WHERE id = :run{db.words(connection).locked}"
    row = connection.execute(text(sql), {"run": run}).one_or_none()
    return {_load(value)["path"] for value in row or () if value is not None}


@_fenced
@db.retried
def finish(
    engine: Engine,
    claim: Claim,
    step: int,
    summary: Mapping[str, Any],
    primary: str,
    points: Iterable[Point] = (),
    checkpoint: Saved | None = None,
    best: Saved | None = None,
) -> list[str]:
    """The run is done: state, summary, last points, files and the attempt's end in one fenced transaction.

    `primary` names the metric that `runs.loss` holds. Returns the paths of files that the row no longer names.
    Raises LeaseLost.
    """
    with db.transaction(engine) as connection:
        before = _files(connection, claim.run)
        changes = "steps_done = :step, summary = :summary, loss = :loss, checkpoint_prev = NULL, lost = 0, failures = 0"
        ended_with = clean_summary(summary)
        values = {"step": step, "summary": ended_with, "loss": _loss(summary, primary)}
        files = {"checkpoint": checkpoint, "checkpoint_best": best}
        kept = {name: saved for name, saved in files.items() if saved is not None}
        for name, saved in kept.items():
            changes += f", {name} = :{name}"
            values[name] = _dump(dict(saved))
        _end(connection, claim, "done", changes, values)
        _insert_points(connection, claim.run, points)
        for name, saved in kept.items():
            _insert_artifact(connection, claim.run, name, saved)
        _end_attempt(connection, claim, "done", step, summary=ended_with)
        return _let_go(connection, claim.run, before)


def _insert_artifact(connection: Connection, run: int, kind: str, saved: Saved) -> None:
    sql = """INSERT INTO artifacts (run_id, kind, step, path, bytes, sha256)
             VALUES (:run, :kind, :step, :path, :bytes, :sha256)"""
    connection.execute(text(sql), {**saved, "run": run, "kind": kind})


@_fenced
@db.retried
def fail(
    engine: Engine,
    claim: Claim,
    cause: str,
    message: str,
    trace: str = "",
    points: Iterable[Point] = (),
    heals: bool | None = None,
    delay: float = DELAY,
) -> str:
    """The run has failed; its trace is kept whole. Returns its new state. Raises LeaseLost.

    For a cause that `heals` (by default those of HEALING) it waits for `delay` seconds, four times as long the next
    time, and is tried again from its checkpoint, until it has failed FAILED_LIMIT times without a new one.
    """
    message, points = clean_text(message), list(points)
    heals = cause in HEALING if heals is None else heals
    with db.transaction(engine) as connection:
        sql = text(f"SELECT failures, wish FROM runs WHERE id = :run{db.words(connection).locked}")
        row = connection.execute(sql, {"run": claim.run}).one_or_none()
        if row is None:
            raise _lease_lost(connection, claim)
        failures = row.failures + 1
        tried_again = heals and failures < FAILED_LIMIT
        state = "cancelled" if row.wish == "cancel" else "waiting" if tried_again else "failed"
        values: dict[str, Any] = {"cause": cause, "message": message, "failures": failures}
        values["step"] = max((step for _, step, _ in points), default=0)
        changes = "failures = :failures, cause = :cause, message = :message"
        changes += ", steps_done = CASE WHEN :step > steps_done THEN :step ELSE steps_done END"
        if state == "waiting":
            # alone, whatever it was that it ran into
            changes += ", state = 'waiting', worker = NULL, lease_until = NULL, wish = NULL, pack_key = NULL"
            values["wake"] = delay * 4 ** (failures - 1)
            _write(connection, claim, f"{changes}, wake_at = {db.NOW} + :wake", values)
        else:
            _end(connection, claim, state, changes, values)
        _insert_points(connection, claim.run, points)
        _end_attempt(connection, claim, "failed", None, cause, message, clean_text(trace))
        if state == "waiting":
            _back_to_checkpoint(connection, claim.run)
    return state


@_fenced
@db.retried
def release(engine: Engine, claim: Claim, message: str = "", alone: bool = False, trace: str = "") -> str:
    """Give the run back uncounted, with its checkpoints: it is pending again, or cancelled where that was wished.

    `alone`: until its next checkpoint no worker trains it in a pack. Returns its new state. Raises LeaseLost.
    """
    with db.transaction(engine) as connection:
        sql = f"SELECT wish FROM runs WHERE id = :run{db.words(connection).locked}"
        if connection.execute(text(sql), {"run": claim.run}).scalar() == "cancel":
            state, ended, cause = "cancelled", "cancelled", None
            _end(connection, claim, state, "message = NULL", {})
        else:
            state, ended, cause = "pending", "released", "preempted"
            changes = "state = 'pending', worker = NULL, lease_until = NULL, wish = NULL"
            _write(connection, claim, changes + (", pack_key = NULL" if alone else ""), {})
        _end_attempt(connection, claim, ended, None, cause, clean_text(message), clean_text(trace) or None)
        _back_to_checkpoint(connection, claim.run)
    return state


def _saved_step(engine: Engine) -> str:
    """The step of a run's checkpoint, 0 where it has none, as a part of a statement."""
    return f"coalesce({db.words(engine).step_of('checkpoint')}, 0)"


@db.retried
def hand_back(engine: Engine, claims: Sequence[Claim], message: str) -> list[int]:
    """Take back failures that were the worker's, not the runs': they are pending again, uncounted. Returns which.

    Only what this worker's own attempt failed, and nobody has touched since; the trace stays with the attempt.
    """
    found = []
    sql = f"""UPDATE runs SET state = 'pending', failures = 0, cause = NULL, message = NULL, ended_at = NULL,
                    wake_at = NULL, steps_done = {_saved_step(engine)}
             WHERE id = :run AND attempt = :attempt AND state IN ('failed', 'waiting')"""
    back = "UPDATE attempts SET ended = 'released', message = :message WHERE run_id = :run AND attempt = :attempt"
    with db.transaction(engine) as connection:
        for claim in sorted(claims, key=lambda claim: claim.run):
            values = {"run": claim.run, "attempt": claim.attempt}
            if connection.execute(text(sql), values).rowcount:
                connection.execute(text(back), values | {"message": clean_text(message)})
                found.append(claim.run)
    # what was decided on failures that were none is open again, and what followed from it
    stages = {claim.stage for claim in claims if claim.run in found}
    while stages:
        stages = _reopen(engine, waiting_for=stages)
    return found


def was_handed_back(engine: Engine, claim: Claim) -> bool:
    """Whether an earlier attempt of the run failed and was handed back: another worker had no luck with it either."""
    sql = """SELECT 1 FROM attempts WHERE run_id = :run AND attempt < :attempt AND ended = 'released'
             AND traceback IS NOT NULL AND cause != 'preempted' LIMIT 1"""  # that was in a pack: no word on this run
    with db.reading(engine) as connection:
        values = {"run": claim.run, "attempt": claim.attempt}
        return connection.execute(text(sql), values).first() is not None


def _back_to_checkpoint(connection: Connection, run: int) -> None:
    """Steps that were done since the last checkpoint are to be done again."""
    row = connection.execute(text("SELECT checkpoint FROM runs WHERE id = :run"), {"run": run}).one()
    step = _load(row.checkpoint)["step"] if row.checkpoint else 0
    connection.execute(text("UPDATE runs SET steps_done = :step WHERE id = :run"), {"run": run, "step": step})


def _end(connection: Connection, claim: Claim, state: str, changes: str, values: Mapping[str, Any]) -> None:
    ended = f"{changes}, state = :state, ended_at = {db.NOW}, worker = NULL, lease_until = NULL, wish = NULL"
    _write(connection, claim, ended, {**values, "state": state})


def _end_attempt(
    connection: Connection,
    claim: Claim,
    ended: str,
    step: int | None,
    cause: str | None = None,
    message: str | None = None,
    trace: str | None = None,
    summary: str | None = None,
) -> None:
    sql = f"""UPDATE attempts SET ended = :ended, ended_at = {db.NOW}, cause = :cause, traceback = :trace,
                     message = coalesce(:message, message), summary = :summary,
                     step_to = coalesce(:step, (SELECT steps_done FROM runs WHERE id = :run))
              WHERE run_id = :run AND attempt = :attempt"""
    values = {"ended": ended, "cause": cause, "message": message, "trace": trace, "step": step, "summary": summary}
    connection.execute(text(sql), values | {"run": claim.run, "attempt": claim.attempt})


# ------------------------------------------------------------------------------------------- whose weights it has


@dataclass(frozen=True)
class Ancestor:
    """The run whose weights another one starts from, and the file that has them."""

    run: int
    stage: str
    family: str
    config: Mapping[str, Any]
    fingerprint: str
    file: Saved


@_fenced
@db.retried
def parent_of(engine: Engine, claim: Claim) -> Ancestor:
    """The run that a claimed one starts from, by its `start_from`; kept in the lineage, so that it stays the same.

    Another one is chosen only where the file is no longer what the parent's row names. Raises InputError when there is
    none, LeaseLost.
    """
    assert claim.start_from is not None
    with db.transaction(engine) as connection:
        _write(connection, claim, "wish = wish", {})  # still ours, and locked from here on
        row = _chosen_before(connection, claim) or _choose(connection, claim)
        ancestor = _ancestor(row, claim.start_from)
        kind = "continue" if row.family == claim.family else "probe"
        known = "DELETE FROM lineage WHERE child = :child AND kind IN ('continue', 'probe')"
        connection.execute(text(known), {"child": claim.run})
        detail = _dump({"start_from": dict(claim.start_from), **ancestor.file})
        sql = "INSERT INTO lineage (child, parent, kind, detail) VALUES (:child, :parent, :kind, :detail)"
        values = {"child": claim.run, "parent": ancestor.run, "kind": kind, "detail": detail}
        connection.execute(text(sql), values)
    return ancestor


_ANCESTOR = """runs.id, runs.stage, runs.family, runs.config, runs.fingerprint, runs.checkpoint,
               runs.checkpoint_best"""


# one that was done once and is trained further has the files of that end until it comes to another one
_HAS_ENDED = "runs.summary IS NOT NULL"


def _chosen_before(connection: Connection, claim: Claim) -> Any:
    sql = f"""SELECT {_ANCESTOR}, lineage.detail FROM runs JOIN lineage ON lineage.parent = runs.id
              WHERE lineage.child = :child AND lineage.kind IN ('continue', 'probe') AND {_HAS_ENDED}"""
    row = connection.execute(text(sql), {"child": claim.run}).first()
    if row is None or row.detail is None:
        return None
    named = [(_load(file) or {}).get("path") for file in (row.checkpoint, row.checkpoint_best)]
    return row if _load(row.detail).get("path") in named else None


def _choose(connection: Connection, claim: Claim) -> Any:
    """The best finished run that `start_from` selects, by its stage's primary metric."""
    spec = dict(claim.start_from or {})
    stage, params = spec["stage"], {"of_stage": spec["stage"]}
    metrics = _load(connection.execute(text("SELECT metrics FROM stages WHERE name = :s"), {"s": stage}).scalar()) or []
    better = next((metric["better"] for metric in metrics if metric["primary"]), "min")
    sql = f"""SELECT {_ANCESTOR} FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
              WHERE runs.stage = :of_stage AND {_HAS_ENDED}"""
    said = stage
    if spec.get("same_seed"):
        params["of_seed"] = claim.config["seed"]
        sql += " AND runs.seed = :of_seed"
        said += f" with seed {claim.config['seed']}"
    if spec.get("where"):
        sql += f" AND runs.id IN ({gates.selected(connection, stage, spec['where'], params)})"
        said += f" where {spec['where']}"
    order = "DESC" if better == "max" else "ASC"
    row = connection.execute(text(f"{sql} ORDER BY runs.loss {order} NULLS LAST, runs.id LIMIT 1"), params).first()
    if row is None:
        raise InputError(f"no run of {said} is done, whose weights run {claim.run} would start from", "see `rnnq plan`")
    return row


def _ancestor(row: Any, spec: Mapping[str, Any]) -> Ancestor:
    best, last = _load(row.checkpoint_best), _load(row.checkpoint)
    file = (best or last) if spec.get("which", "best") == "best" else last
    if file is None:
        what = f"run {row.id} of {row.stage} has no checkpoint that another run could start from"
        raise InputError(what, "a run keeps one where its family has `build`, or stands on the third level")
    return Ancestor(row.id, row.stage, row.family, _load(row.config), row.fingerprint, file)


# ---------------------------------------------------------------------------------------------------------- reap


@dataclass(frozen=True)
class Reaped:
    """A run taken from a worker that no longer beats, and what became of it: pending, failed, or cancelled."""

    run: int
    attempt: int
    worker: str
    state: str


def reap(engine: Engine, by_clock: bool = True, now: float | None = None) -> list[Reaped]:
    """Take back the runs of processes of this host that are gone and, `by_clock`, those whose lease has ended.

    Such a run is pending again and keeps its checkpoints; the third attempt lost in a row without a new checkpoint
    fails it. `by_clock` is for callers that have been connected for a whole LEASE: after an outage the living
    shall beat first.
    """
    with db.reading(engine) as connection:
        moment = db.clock(connection, now)
        gone = _gone_workers(connection)
        sql = f"SELECT 1 WHERE EXISTS ({_EXPIRED}) OR EXISTS ({_SILENT})"
        late = by_clock and connection.execute(text(sql), {"now": moment}).first() is not None
    if not gone and not late:
        return []  # the usual case takes no write lock
    return _take_back(engine, gone, by_clock, now)


_SILENT = "SELECT id FROM workers WHERE state = 'live' AND beat_at < :now - (SELECT lease_s FROM study)"
_EXPIRED = "SELECT id FROM runs WHERE state = 'running' AND lease_until < :now"


def _gone_workers(connection: Connection) -> list[str]:
    # also those that took leave with a run in their hands, because an error of ours ended them
    what = "SELECT id, host, pid, pid_start FROM workers WHERE host = :host AND"
    sql = f"{what} state = 'live' UNION {what} id IN (SELECT worker FROM runs WHERE state = 'running')"
    rows = connection.execute(text(sql), {"host": host.name()}).all()
    return [row.id for row in rows if host.is_gone(row.host, row.pid, row.pid_start)]


@db.retried
def _take_back(engine: Engine, gone: list[str], by_clock: bool, now: float | None) -> list[Reaped]:
    with db.transaction(engine) as connection:
        moment = db.clock(connection, now)
        # workers before runs, as in `beat`; what another process has in its hands it takes back, or renews
        free = db.words(connection).locked_free
        if by_clock:
            # of another host, or from before a reboot; one that lives says so at its next beat
            silent = "UPDATE workers SET state = 'lost', left_at = :now, message = 'no heartbeat' WHERE id IN ({}{})"
            connection.execute(text(silent.format(_SILENT, free)), {"now": moment})
        for worker in sorted(gone):
            sql = "UPDATE workers SET state = 'lost', left_at = :now, message = :why WHERE id = :id"
            connection.execute(text(sql), {"now": moment, "id": worker, "why": "its process is gone"})
        sql = "SELECT id, attempt, worker, lost, lease_until, wish FROM runs WHERE state = 'running' AND {}" + free
        of_worker, late = text(sql.format("worker = :worker")), text(sql.format("lease_until < :now"))
        rows = [row for worker in gone for row in connection.execute(of_worker, {"worker": worker}).all()]
        if by_clock:
            seen = {row.id for row in rows}
            # sorted here: ORDER BY id would make SQLite walk the whole table in that order
            found = connection.execute(late, {"now": moment}).all()
            rows += [row for row in sorted(found, key=lambda row: row.id) if row.id not in seen]
        return [_lose(connection, row, moment, row.worker in gone) for row in rows]


def _lose(connection: Connection, row: Any, now: float, gone: bool) -> Reaped:
    why = "its process is gone" if gone else f"no heartbeat; the lease ended {now - row.lease_until:.1f} s before"
    message = f"worker {row.worker} was lost: {why}"
    if row.wish == "cancel":
        state = "cancelled"
        changes = "ended_at = :now, message = :message"
    elif row.lost + 1 >= LOST_LIMIT:
        state = "failed"
        changes = "failures = failures + 1, ended_at = :now, cause = 'lost', message = :message"
        message = f"lost {row.lost + 1} times in a row without a new checkpoint; last: {message}"
    else:
        state = "pending"
        changes = "message = :message"
    # without a pack key the run is next claimed alone: what killed its worker shall not take pack mates along
    sql = f"""UPDATE runs SET state = :state, worker = NULL, lease_until = NULL, wish = NULL, lost = lost + 1,
                     pack_key = NULL, {changes} WHERE id = :run"""
    values = {"state": state, "run": row.id, "message": message, **({"now": now} if state != "pending" else {})}
    connection.execute(text(sql), values)
    sql = """UPDATE attempts SET ended = 'lost', ended_at = :now, cause = 'lost', message = :message,
                    step_to = (SELECT steps_done FROM runs WHERE id = :run)
             WHERE run_id = :run AND attempt = :attempt"""
    connection.execute(text(sql), {"now": now, "message": message, "run": row.id, "attempt": row.attempt})
    _back_to_checkpoint(connection, row.id)
    return Reaped(row.id, row.attempt, row.worker, state)


# ------------------------------------------------------------------------------------------------------ steering


def retry(engine: Engine, runs: Sequence[int]) -> list[int]:
    """Failed, cancelled and skipped runs are pending again, and go on from their checkpoints. Returns which.

    One that was cancelled while it waited, and on whose gate nobody has decided yet, waits again.
    """
    return [run for chunk in _chunks(runs) for run in _retry(engine, chunk)]


@db.retried
def _retry(engine: Engine, runs: Sequence[int]) -> list[int]:
    waits = "attempt = 0 AND gate IN (SELECT id FROM gates WHERE decision IS NULL)"
    changes = f"""state = CASE WHEN {waits} THEN 'waiting' ELSE 'pending' END, ended_at = NULL, cause = NULL,
                  message = NULL, wake_at = NULL, lost = 0, failures = 0, steps_done = {_saved_step(engine)}"""
    with db.transaction(engine) as connection:
        locked = db.words(connection).locked
        if locked:  # gates before runs, as whoever decides on one
            sql = text(f"""SELECT id FROM gates WHERE id IN (SELECT gate FROM runs WHERE id IN :runs)
                           ORDER BY id{locked}""")
            connection.execute(sql.bindparams(bindparam("runs", list(runs), expanding=True)))
        _lock(connection, runs)
        changed = _change(connection, changes, "state IN ('failed', 'cancelled', 'skipped')", runs)
        _log(connection, "retry", {"runs": changed})
    return changed


def cancel(engine: Engine, runs: Sequence[int], at_once: bool = False) -> tuple[list[int], list[int]]:
    """Open runs are cancelled. Returns those that are, and the running ones whose workers were asked to.

    Such a worker checkpoints first, at its next beat; `at_once` takes the run from it without that.
    """
    ended: list[int] = []
    asked: list[int] = []
    for chunk in _chunks(runs):
        ended_here, asked_here = _cancel(engine, chunk, at_once)
        ended += ended_here
        asked += asked_here
    return sorted(ended), asked


@db.retried
def _cancel(engine: Engine, runs: Sequence[int], at_once: bool) -> tuple[list[int], list[int]]:
    with db.transaction(engine) as connection:
        _lock(connection, runs)
        waiting = "state IN ('waiting', 'pending')"
        changes = f"state = 'cancelled', ended_at = {db.NOW}, wake_at = NULL, cause = NULL, message = NULL"
        ended, asked = _change(connection, changes, waiting, runs), []
        if at_once:
            ended += _fence(connection, runs)
        else:
            asked = _change(connection, "wish = 'cancel'", "state = 'running'", runs)
        _log(connection, "cancel", {"runs": sorted(ended + asked), "at_once": at_once})
    return ended, asked


def _fence(connection: Connection, runs: Sequence[int]) -> list[int]:
    """Take running runs from their workers, whose next write finds that they are no longer theirs."""
    sql = f"""UPDATE attempts SET ended = 'cancelled', ended_at = {db.NOW}, message = 'cancelled at once',
                     step_to = (SELECT steps_done FROM runs WHERE id = run_id)
              WHERE (run_id, attempt) IN (SELECT id, attempt FROM runs WHERE state = 'running' AND id IN :runs)"""
    connection.execute(text(sql).bindparams(bindparam("runs", list(runs), expanding=True)))
    changes = f"state = 'cancelled', ended_at = {db.NOW}, worker = NULL, lease_until = NULL, wish = NULL"
    return _change(connection, changes, "state = 'running'", runs)


def extend(engine: Engine, budgets: Mapping[int, int]) -> list[int]:
    """Finished runs are pending again with a larger budget, and go on from their last checkpoint. Returns which.

    What each earlier end came to stays with its attempt.
    """
    found: list[int] = []
    for chunk in _chunks(list(budgets), CHUNK // 10):
        found += _extend(engine, {run: budgets[run] for run in chunk})
    return found


@db.retried
def _extend(engine: Engine, budgets: Mapping[int, int]) -> list[int]:
    changes = f"""state = 'pending', budget = :budget, ended_at = NULL, message = NULL, lost = 0, failures = 0,
                  steps_done = {_saved_step(engine)}"""
    guard = "id = :run AND state = 'done' AND budget < :budget AND checkpoint IS NOT NULL"
    kept = """UPDATE attempts SET summary = (SELECT summary FROM runs WHERE id = run_id)
              WHERE run_id = :run AND attempt = (SELECT attempt FROM runs WHERE id = :run) AND summary IS NULL"""
    with db.transaction(engine) as connection:
        _lock(connection, list(budgets))
        extended = {}
        for run, budget in budgets.items():
            connection.execute(text(kept), {"run": run})
            values = {"run": run, "budget": budget}
            if connection.execute(text(f"UPDATE runs SET {changes} WHERE {guard}"), values).rowcount:
                extended[run] = budget
        _log(connection, "extend", {"runs": extended})
    return list(extended)


def prioritise(engine: Engine, runs: Sequence[int], priority: int) -> list[int]:
    """Open runs get a priority: of those that are pending, the highest is claimed first. Returns which changed."""
    guard = "state IN ('waiting', 'pending', 'running') AND priority != :priority"
    return _steer(engine, "priority", runs, "priority = :priority", guard, {"priority": priority})


def note(engine: Engine, runs: Sequence[int], words: str) -> list[int]:
    """What a person says of runs; nothing takes a note away. Returns which changed."""
    values = {"note": clean_text(words) or None}
    return _steer(engine, "note", runs, "note = :note", "coalesce(note, '') != coalesce(:note, '')", values)


def tag(engine: Engine, runs: Sequence[int], name: str) -> list[int]:
    """Give runs a tag; returns those that did not have it."""
    sql = """INSERT INTO tags (run_id, tag) SELECT id, :tag FROM runs WHERE id IN :runs ON CONFLICT DO NOTHING
             RETURNING run_id AS id"""
    return _mark(engine, "tag", sql, runs, name)


def untag(engine: Engine, runs: Sequence[int], name: str) -> list[int]:
    """Take a tag away; returns the runs that had it."""
    sql = "DELETE FROM tags WHERE tag = :tag AND run_id IN :runs RETURNING run_id AS id"
    return _mark(engine, "untag", sql, runs, name)


def _mark(engine: Engine, verb: str, sql: str, runs: Sequence[int], name: str) -> list[int]:
    return [run for chunk in _chunks(runs) for run in _mark_some(engine, verb, sql, chunk, name)]


@db.retried
def _mark_some(engine: Engine, verb: str, sql: str, runs: Sequence[int], name: str) -> list[int]:
    with db.transaction(engine) as connection:
        _lock(connection, runs)
        statement = text(sql).bindparams(bindparam("runs", runs, expanding=True))
        changed = sorted(row.id for row in connection.execute(statement, {"tag": name}).all())
        _log(connection, verb, {"tag": name, "runs": changed})
    return changed


@db.retried
def pause(engine: Engine, stage: str) -> list[int]:
    """No run of the stage is claimed any more; those that run are to be given back. Returns these."""
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE stages SET paused = :yes WHERE name = :stage"), {"stage": stage, "yes": True})
        asked = _change(connection, "wish = 'pause'", "state = 'running' AND wish IS NULL", _running(connection, stage))
        _log(connection, "pause", {"stage": stage})
        return asked


def _running(connection: Connection, stage: str) -> list[int]:
    """The runs of a stage that are running, and locked from here on."""
    sql = """SELECT id FROM runs WHERE stage = :stage AND state = 'running'
             AND intake IN (SELECT id FROM intakes WHERE stage = :stage)"""
    found = sorted(connection.execute(text(sql), {"stage": stage}).scalars())
    _lock(connection, found)
    return found


@db.retried
def resume(engine: Engine, stage: str) -> None:
    """The runs of the stage may be claimed again; a wish to pause that no worker has heard yet is taken back."""
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE stages SET paused = :no WHERE name = :stage"), {"stage": stage, "no": False})
        _change(connection, "wish = NULL", "state = 'running' AND wish = 'pause'", _running(connection, stage))
        _log(connection, "resume", {"stage": stage})


def _steer(
    engine: Engine, verb: str, runs: Sequence[int], changes: str, guard: str, values: Mapping[str, Any] | None = None
) -> list[int]:
    return [run for chunk in _chunks(runs) for run in _steer_some(engine, verb, chunk, changes, guard, values or {})]


@db.retried
def _steer_some(
    engine: Engine, verb: str, runs: Sequence[int], changes: str, guard: str, values: Mapping[str, Any]
) -> list[int]:
    with db.transaction(engine) as connection:
        _lock(connection, runs)
        changed = _change(connection, changes, guard, runs, values)
        _log(connection, verb, {"runs": changed, **values})
    return changed


def _change(
    connection: Connection, changes: str, guard: str, runs: Sequence[int], values: Mapping[str, Any] | None = None
) -> list[int]:
    """Change those of the runs that are as the guard says; returns their ids."""
    statement = text(f"UPDATE runs SET {changes} WHERE id IN :runs AND {guard} RETURNING id")
    statement = statement.bindparams(bindparam("runs", list(runs), expanding=True))
    return sorted(row.id for row in connection.execute(statement, dict(values or {})).all())


def _chunks(runs: Sequence[int], size: int = CHUNK) -> Iterator[list[int]]:
    """Parts that are each changed in one transaction, so that nobody's heartbeat waits long."""
    ordered = sorted(set(runs))
    for start in range(0, len(ordered), size):
        if start:
            time.sleep(0.02)
        yield ordered[start : start + size]


def _log(connection: Connection, verb: str, detail: Mapping[str, Any]) -> None:
    """What a person has changed stays on record; where nothing changed there is nothing to say."""
    if detail.get("runs") in ([], {}):
        return
    sql = f"""INSERT INTO changes (at, verb, detail, host, command_line)
              VALUES ({db.NOW}, :verb, :detail, :host, :line)"""
    values = {"verb": verb, "detail": _dump(dict(detail)), "host": host.name(), "line": host.command_line()}
    connection.execute(text(sql), values)


# ---------------------------------------------------------------------------------------- what is kept of the done


@dataclass(frozen=True)
class Leaving:
    """Files that the row of a finished run shall name no longer."""

    run: int
    attempt: int  # the run's newest, when it was looked at
    columns: tuple[str, ...]  # of checkpoint and checkpoint_best
    paths: tuple[str, ...]
    bytes: int  # that they have on disk


# while a run that goes on from another's weights has not ended well, it may need them again
NEEDED = """(EXISTS (SELECT 1 FROM lineage JOIN runs AS child ON child.id = lineage.child
                     WHERE lineage.parent = runs.id AND lineage.kind IN ('continue', 'probe', 'extend')
                     AND child.state != 'done')
             OR EXISTS (SELECT 1 FROM runs AS child WHERE child.start_from IS NOT NULL AND child.state != 'done'
                        AND child.start_from LIKE '%"stage":"' || runs.stage || '"%'))"""
# of a run that is not done any more, or was done once more, nothing goes
_LEAVE = f"UPDATE runs SET {{changes}} WHERE id = :run AND state = 'done' AND attempt = :attempt AND NOT {NEEDED}"


def let_go(engine: Engine, leaving: Sequence[Leaving], detail: Mapping[str, Any]) -> list[Leaving]:
    """Rows of finished runs name these files no longer, in one transaction. Returns those of which that is true now:
    only their files may go. What went is logged, with what `detail` says of why.
    """
    gone = []
    with db.transaction(engine) as connection:
        for one in leaving:
            changes = ", ".join(f"{column} = NULL" for column in one.columns)
            values = {"run": one.run, "attempt": one.attempt}
            if connection.execute(text(_LEAVE.format(changes=changes)), values).rowcount:
                gone.append(one)
        for one in gone:
            for path in one.paths:
                sql = "DELETE FROM artifacts WHERE run_id = :run AND path = :path"
                connection.execute(text(sql), {"run": one.run, "path": path})
        numbers = {"files": sum(len(one.paths) for one in gone), "bytes": sum(one.bytes for one in gone)}
        _log(connection, "gc", {**detail, **numbers, "runs": [one.run for one in gone]})
    return gone


def keep(engine: Engine, stage: str, rule: str) -> None:
    """Give a stage a rule of which checkpoints of its finished runs are kept; see retention.py."""
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE stages SET keep = :rule WHERE name = :stage"), {"stage": stage, "rule": rule})
        _log(connection, "keep", {"stage": stage, "rule": rule})


def swept(engine: Engine, files: int, size: int) -> None:
    """Keep on record that files went which no row named: how many, and their bytes."""
    with db.transaction(engine) as connection:
        _log(connection, "gc", {"files": files, "bytes": size})


# ------------------------------------------------------------------------------------------------- whole stages


@db.retried
def rename(engine: Engine, stage: str, to: str) -> None:
    """Give a stage another name. Raises InputError when that is taken, and while a run of the stage is running: the
    workers that are bound to it by its name would find nothing more to do.
    """
    with db.transaction(engine) as connection:
        if connection.execute(text("SELECT 1 FROM stages WHERE name = :to"), {"to": to}).first():
            raise InputError(f"there is a stage {to} already", "give it another name")
        _refuse_decided_on(connection, to)
        _copy_stage(connection, stage, to)
        for table in ("intakes", "runs", "gates"):
            connection.execute(text(f"UPDATE {table} SET stage = :to WHERE stage = :stage"), {"stage": stage, "to": to})
        _rename_in_gates(connection, stage, to)
        connection.execute(text("DELETE FROM stages WHERE name = :stage"), {"stage": stage})
        _log(connection, "rename", {"stage": stage, "to": to})


def _refuse_decided_on(connection: Connection, stage: str) -> None:
    """Raises InputError where gates were decided on a stage of this name, which was deleted since."""
    rows = connection.execute(text("SELECT stage, condition FROM gates")).all()
    who = sorted({r.stage for r in rows if any(of.stage == stage for of in gates.of_json(r.condition).after)})
    if who:
        raise InputError(f"gates of {', '.join(who)} were decided on an earlier stage {stage}", "give it another name")


def _rename_in_gates(connection: Connection, stage: str, to: str) -> None:
    """What waits for the stage, or starts from it, goes by its new name."""
    for row in connection.execute(text("SELECT id, condition FROM gates")).all():
        gate = gates.of_json(row.condition)
        after = tuple(dataclasses.replace(p, stage=to) if p.stage == stage else p for p in gate.after)
        if after != gate.after:
            values = {"id": row.id, "gate": dataclasses.replace(gate, after=after).to_json()}
            connection.execute(text("UPDATE gates SET condition = :gate WHERE id = :id"), values)
    sql = "SELECT DISTINCT start_from FROM runs WHERE start_from IS NOT NULL"
    for start in connection.execute(text(sql)).scalars().all():
        spec = _load(start)
        if spec["stage"] == stage:
            renamed = {"defined_as": stage, **spec, "stage": to}
            values = {"old": start, "new": _dump(renamed)}
            connection.execute(text("UPDATE runs SET start_from = :new WHERE start_from = :old"), values)


def _copy_stage(connection: Connection, stage: str, to: str) -> None:
    """The row of a stage once more, under another name: those that name it change one after the other."""
    # locked first: a claim that is under way waits, or is over and seen below
    sql = f"SELECT * FROM stages WHERE name = :stage{db.words(connection).locked}"
    row = dict(connection.execute(text(sql), {"stage": stage}).one()._mapping)
    _refuse_running(connection, stage)
    before = row["defined_as"] or stage
    row |= {"name": to, "defined_as": None if before == to else before}
    marks = ", ".join(f":{name}" for name in row)
    connection.execute(text(f"INSERT INTO stages ({', '.join(row)}) VALUES ({marks})"), row)


def delete(engine: Engine, stage: str, on_gone: Callable[[list[int]], None] = lambda runs: None) -> list[int]:
    """Delete a stage and all its rows; returns the ids of its runs.

    It is gone for every reader at once; then `on_gone` hears the ids of its runs, whose files nobody will name any
    more; the rows follow by chunks, so that nobody's heartbeat waits. One that was interrupted is ended by the next.
    Raises InputError while any of its runs is running.
    """
    intakes, found = _hide(engine, stage)
    on_gone(found)
    for intake in intakes:
        _remove_intake(engine, intake)
    _forget(engine, stage)
    return found


@db.retried
def _hide(engine: Engine, stage: str) -> tuple[list[int], list[int]]:
    """Take a stage from the eyes of every reader; returns its intakes and its runs."""
    with db.transaction(engine) as connection:
        locked = db.words(connection).locked
        if locked:  # claims lock the intake of what they take: one that is under way ends before we look
            connection.execute(text(f"SELECT 1 FROM intakes WHERE stage = :stage{locked}"), {"stage": stage})
        _refuse_running(connection, stage)
        _refuse_waited_for(connection, stage)
        sql = f"""UPDATE intakes SET complete = :no, removing = :yes, host = :host, pid = :pid, pid_start = :start,
                         beat_at = {db.NOW} WHERE stage = :stage RETURNING id"""
        rows = connection.execute(text(sql), {"stage": stage, "no": False, "yes": True, **_me()}).all()
        sql = "SELECT id FROM runs WHERE stage = :stage ORDER BY id"
        found = [int(run) for run in connection.execute(text(sql), {"stage": stage}).scalars()]
        _log(connection, "delete", {"stage": stage, "runs": len(found), "first": min(found, default=None)})
    return [int(row.id) for row in rows], found


@db.retried
def _forget(engine: Engine, stage: str) -> None:
    with db.transaction(engine) as connection:
        for table, name in (("gates", "stage"), ("stages", "name")):
            unused = "NOT EXISTS (SELECT 1 FROM intakes WHERE intakes.stage = :stage)"
            connection.execute(text(f"DELETE FROM {table} WHERE {name} = :stage AND {unused}"), {"stage": stage})


def _refuse_running(connection: Connection, stage: str) -> None:
    sql = "SELECT id, worker FROM runs WHERE stage = :stage AND state = 'running' ORDER BY id"
    running = connection.execute(text(sql), {"stage": stage}).all()
    if running:
        who = ", ".join(f"run {row.id} by {row.worker}" for row in running[:3])
        more = f" and {len(running) - 3} more" if len(running) > 3 else ""
        raise InputError(f"stage {stage} is running: {who}{more}", f"`rnnq pause {stage}`, and wait for its workers")
    if any(alive for _, alive in _rivals(connection, stage)):
        raise DatabaseError(f"stage {stage} is being added to, or deleted", "try again when that is done")


def _refuse_waited_for(connection: Connection, stage: str) -> None:
    """Raises InputError where runs of another stage wait for this one."""
    sql = """SELECT stage, condition FROM gates WHERE decision IS NULL AND stage != :stage
             AND EXISTS (SELECT 1 FROM runs WHERE runs.gate = gates.id)"""
    rows = connection.execute(text(sql), {"stage": stage}).all()
    waiting = {r.stage for r in rows if any(parents.stage == stage for parents in gates.of_json(r.condition).after)}
    if waiting:
        who = ", ".join(sorted(waiting))
        raise InputError(f"stage {stage} is waited for by {who}", f"delete {who} first, or let its gates be decided")
    sql = """SELECT DISTINCT stage, start_from FROM runs WHERE start_from IS NOT NULL AND stage != :stage
             AND state IN ('waiting', 'pending', 'running')"""
    rows = connection.execute(text(sql), {"stage": stage}).all()
    starting = {row.stage for row in rows if _load(row.start_from)["stage"] == stage}
    if starting:
        who = ", ".join(sorted(starting))
        raise InputError(f"runs of {who} start from stage {stage}", f"delete {who} first, or let its runs end")
