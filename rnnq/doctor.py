"""What happened to the runs, proved from the rows, and what is wrong with the database, its files and its place.

The attempts are replayed: how they ended, which steps were done twice, whether a run was ever trained by two workers at
once or done a second time. Nothing is changed. What is compared with the disk is looked at in an order that stays true
while workers write: a file goes only after the row that named it, and a row names only a file that is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, text

from rnnq import db, host, runs
from rnnq.errors import RnnqError
from rnnq.query import STATES

SHOWN = 20  # runs or files that a finding names; it counts all of them
SKEW = 1.0  # seconds by which clocks may differ before anybody is told
LARGE = 128 * 2**20  # bytes of a database that is looked through only when asked: it takes seconds
LITTLE = 2**30  # bytes of free disk below which a note is made, and
TOO_LITTLE = 64 * 2**20  # a problem

Watch = Callable[[str, int, int], None]  # what is being done, how much of it is, and of how much (0: nobody knows)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ok, note (good to know) or problem, what it came to, and what to do."""

    name: str
    level: str
    says: str
    hint: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)


def examine(engine: Engine, stage: str | None = None, deep: bool = False, watch: Watch | None = None) -> list[Finding]:
    """Look at everything. With a stage: its runs alone, but the whole database, its clock and its place.

    `deep` compares the sha256 of every file and looks through a large database. Raises InputError for a stage that is
    not there.
    """
    if stage is not None:
        runs.stage_info(engine, stage)
    patient = watch or (lambda what, done, total: None)
    parts: Sequence[tuple[str, Callable[[], Iterable[Finding]]]] = (
        ("attempts", lambda: _history(engine, stage)),
        ("points", lambda: _points(engine, stage)),
        ("workers", lambda: _workers(engine)),
        ("intakes", lambda: _intakes(engine)),
        ("invariants", lambda: _invariants(engine, stage)),
        ("files", lambda: _files(engine, stage, deep, patient)),
        ("integrity", lambda: _integrity(engine, deep, patient)),
        ("clock", lambda: _clock(engine)),
        ("file system", lambda: _place(engine)),
    )
    return [finding for name, part in parts for finding in _whatever_happens(name, part)]


def _whatever_happens(name: str, part: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a part; a database with damage may refuse to answer one of them, and the others still count."""
    try:
        return list(part())
    except (RnnqError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.message if isinstance(error, RnnqError) else f"{type(error).__name__}: {error}"
        return [Finding(name, "problem", f"could not be looked at: {why}", "`rnnq db check` looks for damage")]


def _of_stage(stage: str | None) -> str:
    some = "" if stage is None else " AND runs.stage = :stage"
    return f"runs.intake IN (SELECT id FROM intakes WHERE complete){some}"


def _n(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 run", "2 runs", "12,000 runs"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _some(values: Sequence[object]) -> str:
    """The first few of a list, in brackets."""
    return f"({', '.join(map(str, values[:5]))}{', ...' if len(values) > 5 else ''})"


# ------------------------------------------------------------------------------------------- replaying the attempts


@dataclass
class Replay:
    """What the attempts of all runs came to."""

    per_run: dict[int, int] = field(default_factory=dict)  # attempts of a run -> runs
    ended: dict[tuple[str, str | None], int] = field(default_factory=dict)  # how, cause -> attempts
    steps: int = 0
    seconds: float = 0.0
    lost_runs: int = 0  # that lost an attempt
    lost_but_done: int = 0
    again: list[int] = field(default_factory=list)  # runs trained again although done, and not extended
    done_twice: list[int] = field(default_factory=list)  # of these, runs that were done more than once
    overlapping: list[int] = field(default_factory=list)
    overlap_s: float = 0.0  # the longest
    misnumbered: list[int] = field(default_factory=list)
    unended: list[int] = field(default_factory=list)  # runs with an attempt without an end that nobody trains
    not_done: list[int] = field(default_factory=list)  # done runs whose last attempt says otherwise
    twice: list[Any] = field(default_factory=list)  # how, attempts, steps and seconds that were done once more


# what is asked several times, narrow and in order. Attempts first: in the order of their key nothing is sorted
_TABLE = """CREATE TEMP TABLE tries (run_id BIGINT, attempt INTEGER, started_at DOUBLE PRECISION,
                                     until DOUBLE PRECISION, ended TEXT, cause TEXT, step_from BIGINT, step_to BIGINT,
                                     state TEXT, latest INTEGER, PRIMARY KEY (run_id, attempt)){without_rowid}"""
_TRIES = """INSERT INTO tries
            SELECT run_id, attempts.attempt, attempts.started_at, coalesce(attempts.ended_at, :never), attempts.ended,
                   attempts.cause, step_from, coalesce(step_to, step_from), runs.state, runs.attempt
            FROM attempts CROSS JOIN runs WHERE runs.id = attempts.run_id AND {seen} ORDER BY 1, 2"""

_ENDED = """SELECT coalesce(ended, 'running') AS how, cause, count(*) AS n,
                   coalesce(sum(CASE WHEN step_to > step_from THEN step_to - step_from END), 0) AS steps,
                   coalesce(sum(CASE WHEN ended IS NOT NULL THEN until - started_at END), 0) AS seconds
            FROM tries GROUP BY how, cause"""

_PER_RUN = """(SELECT run_id, max(state) AS state, max(latest) AS latest, count(*) AS n, max(attempt) AS highest,
                      count(*) - count(ended) AS open, count(CASE WHEN ended = 'lost' THEN 1 END) AS lost,
                      max(CASE WHEN attempt = latest THEN ended END) AS last
               FROM tries GROUP BY run_id) AS per_run"""

_COUNTS = f"""SELECT n, count(*) AS runs, count(CASE WHEN lost > 0 THEN 1 END) AS lost,
                     count(CASE WHEN lost > 0 AND state = 'done' THEN 1 END) AS done
              FROM {_PER_RUN} GROUP BY n ORDER BY n"""

_ORDER = f"""SELECT * FROM (
                 SELECT run_id, n != highest OR n != latest AS misnumbered,
                        state = 'done' AND coalesce(last, '') != 'done' AS not_done,
                        open != CASE WHEN state = 'running' THEN 1 ELSE 0 END
                        OR (state = 'running' AND last IS NOT NULL) AS unended
                 FROM {_PER_RUN}) AS wrong
             WHERE misnumbered OR not_done OR unended"""

# Only an extension makes a done run pending, and each leaves a row. So an attempt after an end without one between them
# proves that the run was trained once more; that both have a summary proves nothing, as every extended run has several.
_PAIRS = """SELECT run_id, ended, until, next, overlap_s FROM (
                SELECT run_id, ended, until, next,
                       CASE WHEN earlier < until THEN earlier WHEN earlier IS NOT NULL THEN until END - started_at
                       AS overlap_s FROM (
                    SELECT run_id, ended, until, started_at, lead(started_at) OVER in_order AS next,
                           max(until) OVER (in_order ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS earlier
                    FROM tries WINDOW in_order AS (PARTITION BY run_id ORDER BY attempt)) AS ordered) AS pairs
            WHERE overlap_s > 0 OR (ended = 'done' AND next IS NOT NULL)"""

# Steps beyond the one from which the next attempt began were done again, at the speed of the one that did them first.
_TWICE = """SELECT how, count(*) AS attempts, sum(more) AS steps, sum(seconds * more / nullif(steps, 0)) AS seconds
            FROM (
                SELECT coalesce(ended, 'running') AS how, step_to - step_from AS steps, until - started_at AS seconds,
                       step_to - lead(step_from) OVER (PARTITION BY run_id ORDER BY attempt) AS more
                FROM tries WHERE step_from IS NOT NULL) AS repeated
            WHERE more > 0 GROUP BY how ORDER BY steps DESC"""


def replay(connection: Connection, stage: str | None = None) -> Replay:
    """Go through all attempts of all runs, in their order."""
    found = Replay()
    connection.execute(text(_TABLE.format(without_rowid=db.words(connection).without_rowid)))
    try:
        values = {"never": math.inf, **({"stage": stage} if stage else {})}
        connection.execute(text(_TRIES.format(seen=_of_stage(stage))), values)
        _replay_counts(connection, found)
        _replay_order(connection, found)
        _replay_pairs(connection, found)
        found.twice = list(connection.execute(text(_TWICE)))
    finally:
        connection.execute(text("DROP TABLE tries"))
    return found


def _replay_counts(connection: Connection, found: Replay) -> None:
    for row in connection.execute(text(_ENDED)):
        found.ended[row.how, row.cause] = row.n
        found.steps += row.steps
        found.seconds += row.seconds
    for row in connection.execute(text(_COUNTS)):
        found.per_run[row.n] = row.runs
        found.lost_runs += row.lost
        found.lost_but_done += row.done


def _replay_order(connection: Connection, found: Replay) -> None:
    for row in connection.execute(text(_ORDER)):
        found.misnumbered += [row.run_id] if row.misnumbered else []
        found.not_done += [row.run_id] if row.not_done else []
        found.unended += [row.run_id] if row.unended else []


def _replay_pairs(connection: Connection, found: Replay) -> None:
    extended = _extensions(connection)
    again: set[int] = set()
    for row in connection.execute(text(_PAIRS)):
        if row.overlap_s is not None and row.overlap_s > 0:
            found.overlapping.append(row.run_id)
            found.overlap_s = max(found.overlap_s, row.overlap_s)
        is_followed = row.ended == "done" and row.next is not None
        if is_followed and not any(row.until <= at <= row.next for at in extended.get(row.run_id, ())):
            again.add(row.run_id)
    found.overlapping, found.again = sorted(set(found.overlapping)), sorted(again)
    ends = text("SELECT count(*) FROM tries WHERE run_id = :run AND ended = 'done'")
    found.done_twice = [run for run in found.again if connection.execute(ends, {"run": run}).scalar_one() > 1]


def _extensions(connection: Connection) -> dict[int, list[float]]:
    """When each run was given more steps."""
    found: dict[int, list[float]] = {}
    for row in connection.execute(text("SELECT at, detail FROM changes WHERE verb = 'extend' ORDER BY id")):
        for run in json.loads(row.detail)["runs"]:
            found.setdefault(int(run), []).append(row.at)
    return found


# ----------------------------------------------------------------------------------------------- what they came to


def _history(engine: Engine, stage: str | None) -> Iterator[Finding]:
    sql = f"SELECT state, count(*) AS n FROM runs WHERE {_of_stage(stage)} GROUP BY state"
    with db.reading(engine, scratch=True) as connection:
        states = {row.state: row.n for row in connection.execute(text(sql), {"stage": stage} if stage else {})}
        found = replay(connection, stage)
    yield _states(states)
    yield _attempts(found)
    yield _ends(found)
    yield _losses(found)
    yield _doubles(found)
    yield _overlaps(found)
    yield _twice(found)
    yield _order(found)


def _states(states: Mapping[str, int]) -> Finding:
    counts = {state: states[state] for state in STATES if state in states}
    words = ", ".join(f"{n:,} {state}" for state, n in counts.items())
    total = sum(counts.values())
    return Finding("runs", "ok", _n(total, "run") + (f": {words}" if words else ""), None, {"total": total} | counts)


def _attempts(found: Replay) -> Finding:
    total = sum(n * many for n, many in found.per_run.items())
    words = ", ".join(f"{_n(many, 'run')} with {n:,}" for n, many in sorted(found.per_run.items())[:8])
    more = ", and some with more" if len(found.per_run) > 8 else ""
    numbers: dict[str, Any] = {"total": total, "per_run": dict(sorted(found.per_run.items()))}
    numbers |= {"steps": found.steps, "seconds": found.seconds}
    return Finding("attempts", "ok", _n(total, "attempt") + (f": {words}{more}" if words else ""), None, numbers)


def _ends(found: Replay) -> Finding:
    ends = sorted(found.ended.items(), key=lambda item: -item[1])
    # lost has the cause lost, released the cause preempted: only what failed differs
    words = [f"{n:,} {how}{f' ({cause})' if cause and how == 'failed' else ''}" for (how, cause), n in ends]
    numbers = [{"ended": how, "cause": cause, "n": n} for (how, cause), n in ends]
    return Finding("ends", "ok", "attempts ended: " + (", ".join(words) or "none yet"), None, {"ended": numbers})


def _losses(found: Replay) -> Finding:
    n = sum(many for (how, _), many in found.ended.items() if how == "lost")
    numbers: dict[str, Any] = {"attempts": n, "runs": found.lost_runs, "done_nevertheless": found.lost_but_done}
    if not n:
        return Finding("leases", "ok", "no attempt was lost", None, numbers)
    says = f"{_n(n, 'attempt')} of {_n(found.lost_runs, 'run')} lost: the worker died or was silent for a whole lease; "
    says += f"{found.lost_but_done:,} of these runs were done nevertheless"
    hint = "what a lost worker wrote later was refused, and left no row: how much that was nobody knows"
    return Finding("leases", "note", says, hint, numbers)


def _doubles(found: Replay) -> Finding:
    numbers: dict[str, Any] = {"n": len(found.done_twice), "runs": found.done_twice[:SHOWN]}
    numbers |= {"trained_after_done": len(found.again), "runs_trained_after_done": found.again[:SHOWN]}
    if not found.again:
        return Finding("doubles", "ok", "no run was done twice, or trained once more when it was done", None, numbers)
    says = f"{_n(len(found.again), 'run')} trained again although done, and not extended {_some(found.again)}; "
    says += f"{_n(len(found.done_twice), 'run')} done more than once"
    hint = "rows were changed by hand, or this is a fault of rnnq: please report it, with `rnnq show RUN --format json`"
    return Finding("doubles", "problem", says, hint, numbers)


def _overlaps(found: Replay) -> Finding:
    runs_ = found.overlapping
    longest = None if math.isinf(found.overlap_s) else found.overlap_s
    numbers: dict[str, Any] = {"n": len(runs_), "runs": runs_[:SHOWN], "longest_s": longest}
    if not runs_:
        return Finding("overlaps", "ok", "no two attempts had a run at the same time", None, numbers)
    long = "without an end" if longest is None else f"for up to {longest:.3f} s"
    says = f"two attempts had {_n(len(runs_), 'run')} at the same time, {long} {_some(runs_)}"
    hint = "a clock that was set back looks like this, too; the numbers of attempts fence a late writer all the same"
    return Finding("overlaps", "problem", says, hint, numbers)


def _twice(found: Replay) -> Finding:
    by = {row.how: {"attempts": row.attempts, "steps": row.steps, "seconds": row.seconds or 0.0} for row in found.twice}
    steps, seconds = sum(row.steps for row in found.twice), sum(row.seconds or 0.0 for row in found.twice)
    numbers: dict[str, Any] = {"steps": steps, "seconds": seconds, "of_steps": found.steps, "by_end": by}
    if not steps:
        return Finding("repeats", "ok", "no step is known to have been done twice", None, numbers)
    share = f" ({steps / found.steps:.1%} of all {found.steps:,})" if found.steps else ""
    words = ", ".join(f"{one['steps']:,} of {_n(int(one['attempts']), how + ' attempt')}" for how, one in by.items())
    says = f"{_n(steps, 'step')}{share} and about {seconds:,.1f} s were done twice: {words}"
    hint = "`rnnq worker --checkpoint-every` says how often state is saved; a family of generators begins at step 0"
    return Finding("repeats", "note", says, hint, numbers)


def _order(found: Replay) -> Finding:
    wrong = {
        "whose attempts are not numbered 1, 2, 3, ...": found.misnumbered,
        "with an attempt without an end that nobody trains": found.unended,
        "done whose last attempt did not end done": found.not_done,
    }
    numbers: dict[str, Any] = {what: {"n": len(ids), "runs": ids[:SHOWN]} for what, ids in wrong.items()}
    words = [f"{_n(len(ids), 'run')} {what} {_some(ids)}" for what, ids in wrong.items() if ids]
    if not words:
        return Finding("order", "ok", "every run is where its last attempt left it", None, numbers)
    return Finding(
        "order", "problem", "; ".join(words), "rows were changed by hand, or this is a fault of rnnq", numbers
    )


def _points(engine: Engine, stage: str | None) -> Iterator[Finding]:
    # by metric, so that only the points beyond the checkpoint are visited
    saved = db.words(engine).step_of("runs.checkpoint")
    sql = f"""SELECT runs.id, count(*) AS n FROM runs CROSS JOIN metrics CROSS JOIN point
              WHERE point.run_id = runs.id AND point.metric_id = metrics.id AND point.step > coalesce({saved}, -1)
              AND runs.state IN ('pending', 'waiting') AND runs.attempt > 0 AND {_of_stage(stage)} GROUP BY runs.id"""
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"stage": stage} if stage else {}).all()
    n = sum(row.n for row in rows)
    numbers: dict[str, Any] = {"points": n, "runs": len(rows)}
    if not n:
        yield Finding("points", "ok", "no pending run has points after its checkpoint", None, numbers)
        return
    says = f"{_n(n, 'point')} of {_n(len(rows), 'pending run')} lie after the last checkpoint"
    yield Finding("points", "note", says, "nothing to do: they are measured again when the run goes on", numbers)


# ---------------------------------------------------------------------------------------- workers, intakes, rules


def _workers(engine: Engine) -> Iterator[Finding]:
    sql = """SELECT id, host, pid, pid_start, state, :now - beat_at AS silent_s,
                    (SELECT count(*) FROM runs WHERE runs.worker = workers.id AND runs.state = 'running') AS held
             FROM workers WHERE state = 'live' OR id IN (SELECT worker FROM runs WHERE state = 'running')"""
    with db.reading(engine) as connection:
        lease = float(connection.execute(text("SELECT lease_s FROM study")).scalar_one())
        rows = connection.execute(text(sql), {"now": db.clock(connection)}).all()
    gone = [row for row in rows if host.is_gone(row.host, row.pid, row.pid_start)]
    silent = [row for row in rows if row not in gone and (row.state != "live" or row.silent_s > lease)]
    held = sum(row.held for row in (*gone, *silent))
    numbers: dict[str, Any] = {
        "live": len(rows) - len(gone) - len(silent),
        "gone": len(gone),
        "silent": len(silent),
        "held": held,
    }
    numbers |= {"names": [row.id for row in (*gone, *silent)][:SHOWN]}
    if not gone and not silent:
        yield Finding("workers", "ok", f"{_n(numbers['live'], 'worker')} live, none dead or silent", None, numbers)
        return
    says = f"{_n(len(gone), 'worker')} dead, {_n(len(silent), 'worker')} silent for longer than a lease ({lease:g} s), "
    says += f"with {_n(held, 'run')} in their hands {_some(numbers['names'])}"
    yield Finding("workers", "note", says, "the next `rnnq worker` takes back what they had", numbers)


def _intakes(engine: Engine) -> Iterator[Finding]:
    sql = """SELECT id, stage, removing, host, pid, pid_start, :now - beat_at > (SELECT lease_s FROM study) AS silent,
                    (SELECT count(*) FROM runs WHERE runs.intake = intakes.id) AS runs
             FROM intakes WHERE NOT complete ORDER BY id"""
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"now": db.clock(connection)}).all()
    alive = [row for row in rows if not (row.silent or host.is_gone(row.host, row.pid, row.pid_start))]
    dead = [row for row in rows if row not in alive]
    added = [row.stage for row in dead if not row.removing]
    removed = [row.stage for row in dead if row.removing]
    numbers: dict[str, Any] = {"at_work": len(alive), "inits": added[:SHOWN], "deletes": removed[:SHOWN]}
    numbers |= {"rows": sum(row.runs for row in dead)}
    if not dead:
        busy = f"; {len(alive)} at work" if alive else ""
        yield Finding("intakes", "ok", f"no init or delete was interrupted{busy}", None, numbers)
        return
    parts = [(added, "init"), (removed, "delete")]
    words = [f"{_n(len(stages), what)} interrupted {_some(sorted(set(stages)))}" for stages, what in parts if stages]
    says = f"{', '.join(words)}, with {_n(numbers['rows'], 'row')} that nobody sees"
    yield Finding("intakes", "note", says, "`rnnq init`, or `rnnq delete STAGE`, of the stage ends them", numbers)


_FINAL = "runs.state IN ('done', 'failed', 'cancelled', 'skipped')"
_NEVER = {  # what the CHECKs of the schema rule out, and a little more
    "of a state that is none": f"runs.state NOT IN ({', '.join(repr(state) for state in STATES)})",
    "running without a lease, or leased without running": "(runs.state = 'running') != (lease_until IS NOT NULL)",
    "running without a worker, or of one without running": "(runs.state = 'running') != (worker IS NOT NULL)",
    "ended without a time, or the reverse": f"({_FINAL}) != (runs.ended_at IS NOT NULL)",
    "asked to stop that do not run": "wish IS NOT NULL AND runs.state != 'running'",
    "done without a summary": "runs.state = 'done' AND summary IS NULL",
    "claimed without an attempt's row": """runs.attempt > 0 AND NOT EXISTS (
         SELECT 1 FROM attempts WHERE run_id = runs.id AND attempts.attempt = runs.attempt)""",
}


def _invariants(engine: Engine, stage: str | None) -> Iterator[Finding]:
    broken = " OR ".join(f"({condition})" for condition in _NEVER.values())
    marks = ", ".join(f"({condition}) AS rule{i}" for i, condition in enumerate(_NEVER.values()))
    sql = f"SELECT id, {marks} FROM runs WHERE ({broken}) AND {_of_stage(stage)} ORDER BY id"
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"stage": stage} if stage else {}).all()
    found = {what: [row.id for row in rows if row[i + 1]] for i, what in enumerate(_NEVER)}
    numbers: dict[str, Any] = {what: {"n": len(ids), "runs": ids[:SHOWN]} for what, ids in found.items()}
    words = [f"{_n(len(ids), 'run')} {what} {_some(ids)}" for what, ids in found.items() if ids]
    if not words:
        yield Finding("invariants", "ok", f"all {len(_NEVER)} hold for every run", None, numbers)
        return
    hint = "rows were changed by hand: the database itself refuses to write most of these"
    yield Finding("invariants", "problem", "; ".join(words), hint, numbers)


# ------------------------------------------------------------------------------------------------------------ files


class File(NamedTuple):
    """A file as a row names it."""

    run: int
    path: str
    bytes: int
    sha256: str
    counts: bool  # its run is of those that are looked at


# where the best checkpoint is the last one, both columns hold the same
_FILES = """SELECT id, checkpoint, checkpoint_prev, nullif(checkpoint_best, checkpoint) AS best, {seen} AS counts
            FROM runs WHERE coalesce(checkpoint, checkpoint_prev, checkpoint_best) IS NOT NULL {some}"""
# most artifacts are what the run's row names, too: these are left out
_ARTIFACTS = """SELECT run_id, path, bytes, sha256, {seen} AS counts
                FROM artifacts JOIN runs ON runs.id = artifacts.run_id
                WHERE NOT ({last} OR {best}) {some}"""
_decode = json.JSONDecoder().raw_decode


def _named(connection: Connection, stage: str | None, ids: Sequence[int] | None = None) -> dict[str, File]:
    """Every file that a row names, or that those of some runs do, by its path.

    Raises ValueError for a row that is not as the queue writes it.
    """
    words = db.words(connection)
    some = "" if ids is None else f"AND runs.id IN {words.listed('ids')}"
    parts = {"seen": _of_stage(stage), "some": some}
    parts |= {"last": words.contains("checkpoint", "path"), "best": words.contains("checkpoint_best", "path")}
    values = ({"stage": stage} if stage else {}) | ({"ids": json.dumps(ids)} if ids is not None else {})
    found: dict[str, File] = {}
    for run, *saved, counts in connection.execute(text(_FILES.format(**parts)), values):
        for words in saved:
            if words is not None:
                one = _decode(words)[0]
                found[one["path"]] = File(run, one["path"], one["bytes"], one["sha256"], bool(counts))
    for row in connection.execute(text(_ARTIFACTS.format(**parts)), values):
        found.setdefault(row.path, File(row.run_id, row.path, row.bytes, row.sha256, bool(row.counts)))
    return found


def _on_disk(root: Path, study: str, watch: Watch) -> dict[str, int]:
    """Every file of the study below its folder: path and bytes. Links are not followed."""
    found: dict[str, int] = {}
    folders, looked = [f"checkpoints/{study}", f"logs/{study}"], 0
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(f"{root}/{folder}") as entries:  # words, not Paths: there may be very many
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}/{entry.name}")
                    else:
                        found[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # not there, not ours to read, or just gone: what a row names is looked for once more
        looked += 1
        if looked % 1000 == 0:
            watch("looking at files", looked, 0)
    return found


def _files(engine: Engine, stage: str | None, deep: bool, watch: Watch) -> Iterator[Finding]:
    study, _, root = db.study(engine)
    disk = _on_disk(root, study, watch)
    with db.reading(engine) as connection:
        named = _named(connection, stage)
    looked = [file for file in named.values() if file.counts]
    wrong = _wrong_files(root, looked, disk, deep, watch)
    if wrong:  # rows after files: a worker takes a file away only once no row names it
        with db.reading(engine) as connection:
            still = _named(connection, stage, sorted({file.run for file in wrong}))
        wrong = {file: why for file, why in wrong.items() if still.get(file.path) == file}
    yield _checkpoints(looked, wrong, deep)
    yield _unnamed(_without_row(engine, root, [path for path in disk if path not in named]), disk)


_PLACE = re.compile(r"(?:checkpoints/[^/]+/[^/]+|logs/[^/]+)/(\d{1,18})/\.?a(\d{1,18})[-.].*", re.DOTALL)


def _without_row(engine: Engine, root: Path, paths: Sequence[str]) -> list[str]:
    """The files that no row names, of those that none named when it was read; without the logs of attempts, and without
    what a worker may be about to enter."""
    places = {path: _PLACE.fullmatch(path) for path in paths}
    ids = sorted({int(place[1]) for place in places.values() if place})
    sql = text(f"SELECT id, attempt, state FROM runs WHERE id IN {db.words(engine).listed('ids')}")
    with db.reading(engine) as connection:
        named = _named(connection, None, ids)
        latest = {row.id: (row.attempt, row.state) for row in connection.execute(sql, {"ids": json.dumps(ids)})}
    found = []
    for path, place in places.items():
        attempt, state = latest.get(int(place[1]), (0, "")) if place else (0, "")
        mine = int(place[2]) if place else 1
        expected = mine <= attempt if path.startswith("logs/") else mine == attempt and state == "running"
        if path not in named and not expected and os.path.lexists(f"{root}/{path}"):
            found.append(path)
    return found


def _wrong_files(
    root: Path, files: Sequence[File], disk: Mapping[str, int], deep: bool, watch: Watch
) -> dict[File, str]:
    """What is wrong with files that rows name."""
    total, done, found = sum(file.bytes for file in files), 0, {}
    for file in files:
        if deep or disk.get(file.path) != file.bytes:
            why = _wrong(root, file, deep)
            if why:
                found[file] = why
        if deep:
            done += file.bytes
            watch("comparing sha256", done, total)
    return found


def _wrong(root: Path, file: File, deep: bool) -> str | None:
    if ".." in file.path.split("/") or file.path.startswith("/"):
        return "outside of the study's folder"
    place = f"{root}/{file.path}"
    try:
        if os.stat(place).st_size != file.bytes:  # noqa: PTH116 (there may be very many)
            return "of another size"
        if not deep:
            return None
        with Path(place).open("rb") as opened:
            same = hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:
        return "not readable"
    return None if same else "with other bytes"


def _checkpoints(looked: Sequence[File], wrong: Mapping[File, str], deep: bool) -> Finding:
    kinds = Counter(wrong.values())
    shown = [{"run": file.run, "path": file.path, "is": why} for file, why in list(wrong.items())[:SHOWN]]
    numbers: dict[str, Any] = {
        "named": len(looked),
        "bytes": sum(file.bytes for file in looked),
        "deep": deep,
        "wrong": dict(kinds),
    }
    numbers |= {"files": shown}
    what = f"{_n(len(looked), 'file')} of {_bytes(numbers['bytes'])} that rows name"
    if not wrong:
        how = "with the sha256 that they say" if deep else "of the size that they say"
        return Finding(
            "checkpoints", "ok", f"{what}: all there, {how}" if looked else "no row names a file", None, numbers
        )
    words = ", ".join(f"{n:,} {why}" for why, n in kinds.items())
    says = f"{what}: {words} {_some([f'run {file.run}: {file.path}' for file in list(wrong)[:2]])}"
    hint = "a run that is resumed goes on from the checkpoint before, or begins anew; copies may be in a backup"
    return Finding("checkpoints", "problem", says, hint, numbers)


def _unnamed(unnamed: Sequence[str], disk: Mapping[str, int]) -> Finding:
    size = sum(disk[path] for path in unnamed)
    numbers: dict[str, Any] = {"n": len(unnamed), "bytes": size, "files": list(unnamed[:SHOWN])}
    if not unnamed:
        says = f"{_n(len(disk), 'file')} below checkpoints/ and logs/" + (", each of them of a run" if disk else "")
        return Finding("files", "ok", says, None, numbers)
    says = f"{_n(len(unnamed), 'file')} of {_bytes(size)} on disk that no row names {_some(unnamed[:2])}"
    hint = "they harm nothing: workers that were killed leave such files, and deletes that were interrupted"
    return Finding("files", "note", says, hint, numbers)


def _bytes(n: float) -> str:
    """Bytes for people: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


# ------------------------------------------------------------------------------------------- the database, its place


def _integrity(engine: Engine, deep: bool, watch: Watch) -> Iterator[Finding]:
    yield Finding("schema", "ok", f"schema {db.SCHEMA}, as this program needs it", None, {"schema": db.SCHEMA})
    size = db.size(engine)
    numbers: dict[str, Any] = {"bytes": size, "looked": deep or size <= LARGE}
    if not numbers["looked"]:
        says = f"a database of {_bytes(size)} was not looked through for damage"
        yield Finding("integrity", "note", says, "--deep, or `rnnq db check`, does; it takes a while", numbers)
        return
    watch("looking through the database", 0, 0)
    found = db.check(engine)
    numbers |= {"damages": len(found), "first": found[:SHOWN]}
    if not found:
        yield Finding("integrity", "ok", f"{_bytes(size)} without damage, no row without its parent", None, numbers)
        return
    hint = "stop the workers, keep a copy of the file, and go back to a backup or to `sqlite3 FILE .recover`"
    more = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
    yield Finding("integrity", "problem", f"{found[0]}{more}", hint, numbers)


def _clock(engine: Engine) -> Iterator[Finding]:
    ahead = """SELECT (SELECT count(*) FROM workers WHERE beat_at > :late) AS beats,
                      (SELECT count(*) FROM runs WHERE state = 'running'
                       AND lease_until > :late + (SELECT lease_s FROM study)) AS leases,
                      (SELECT count(*) FROM attempts WHERE started_at > :late) AS begins,
                      (SELECT count(*) FROM attempts WHERE ended_at < started_at - :skew) AS backwards"""
    with db.reading(engine) as connection:
        before = time.time()
        now = db.clock(connection)
        difference = now - (before + time.time()) / 2
        row = connection.execute(text(ahead), {"late": now + SKEW, "skew": SKEW}).one()
    numbers: dict[str, Any] = {"difference_s": difference, **row._mapping}
    words = [
        f"{n:,} {what}"
        for n, what in (
            (row.beats, "heartbeats of workers lie in the future"),
            (row.leases, "leases hold for longer than a lease is"),
            (row.begins, "attempts begin in the future"),
            (row.backwards, "attempts ended before they began"),
        )
        if n
    ]
    says = f"the database's clock and this host's differ by {abs(difference):.3f} s"
    if abs(difference) <= SKEW and not words:
        yield Finding("clock", "ok", says, None, numbers)
        return
    hint = "the clock was set back; leases that lie in the future hold until then: `rnnq cancel --now` frees a run"
    yield Finding("clock", "problem", "; ".join([says, *words]), hint, numbers)


def _place(engine: Engine) -> Iterator[Finding]:
    path = db.file_of(engine)
    if path is None:
        yield _server(engine)
        yield _space(engine, None)
        return
    path = path.resolve()
    kind, network = db.file_system(path), db.on_network(path)
    numbers: dict[str, Any] = {"file_system": kind, "network": network is not None}
    if network is None:
        known = f"the database lies on {kind}" if kind else "the system does not tell what the database lies on"
        yield Finding("file system", "ok", known, None, numbers)
    else:
        says, hint = db.network_warning(path, network)
        yield Finding("file system", "problem", says, hint, numbers)
    yield _journal(engine, path)
    yield _space(engine, path)


def _journal(engine: Engine, path: Path) -> Finding:
    with db.reading(engine) as connection:
        mode = str(connection.execute(text("PRAGMA journal_mode")).scalar_one())
    log = path.with_name(path.name + "-wal")
    size = log.stat().st_size if log.exists() else 0
    numbers: dict[str, Any] = {"journal_mode": mode, "log_bytes": size}
    if mode == "wal":
        return Finding("journal", "ok", f"write-ahead log, {_bytes(size)} at the moment", None, numbers)
    says = f"the journal is {mode}, not wal: whoever reads stops whoever writes"
    hint = f'stop the workers, then `sqlite3 {path.name} "PRAGMA journal_mode = WAL"`; a network file system refuses it'
    return Finding("journal", "problem", says, hint, numbers)


def _server(engine: Engine) -> Finding:
    says = db.server(engine)
    off = [name for name in ("fsync", "full_page_writes") if says[name] == "off"]
    what = f"PostgreSQL {says['server_version']}"
    if not off:
        return Finding("server", "ok", f"{what}, which keeps what it has confirmed", None, says)
    hint = "after a power cut numbers of attempts may repeat, and rows name files that are gone: switch it on"
    return Finding("server", "problem", f"{what} with {' and '.join(off)} off: it may lose what is written", hint, says)


def _space(engine: Engine, path: Path | None) -> Finding:
    _, _, root = db.study(engine)
    free = {}
    for name, place in (("database", path and path.parent), ("root", root)):
        if place is not None and place.is_dir():
            free[name] = shutil.disk_usage(place).free
    least = min(free.values(), default=0)
    words = f"{_bytes(free['database'])} free for the database" if path else "the database is on a server"
    if free.get("root") != free.get("database") or not free:
        words += f", {_bytes(free['root'])} for checkpoints" if "root" in free else f"; the folder {root} is not there"
    numbers: dict[str, Any] = {"free_bytes": free}
    if least >= LITTLE:
        return Finding("disk", "ok", words, None, numbers)
    hint = "workers give back what they cannot save, and stop"
    return Finding("disk", "problem" if least < TOO_LITTLE else "note", words, hint, numbers)
