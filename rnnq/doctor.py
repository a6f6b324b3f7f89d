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
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import db, host, runs, stored
from rnnq.errors import RnnqError
from rnnq.query import STATES
from rnnq.stored import File, Watch, of_stage

SHOWN = 20  # runs or files that a finding names; it counts all of them
SKEW = 1.0  # seconds by which clocks may differ before anybody is told
LARGE = 128 * 2**20  # bytes of a database that is looked through only when asked: it takes seconds
LITTLE = 2**30  # bytes of free disk below which a note is made, and
TOO_LITTLE = 64 * 2**20  # a problem


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
    with stored.looking(engine) as disk:
        return _examine(engine, stage, deep, patient, lambda: disk(patient))


def _examine(
    engine: Engine, stage: str | None, deep: bool, patient: Watch, disk: Callable[[], Mapping[str, int]]
) -> list[Finding]:
    parts: Sequence[tuple[str, Callable[[], Iterable[Finding]]]] = (
        ("attempts", lambda: _history(engine, stage)),
        ("points", lambda: _points(engine, stage)),
        ("workers", lambda: _workers(engine)),
        ("intakes", lambda: _intakes(engine)),
        ("invariants", lambda: _invariants(engine, stage)),
        ("files", lambda: _files(engine, stage, deep, patient, disk())),
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


def _n(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 run", "2 runs", "12,000 runs"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _some(values: Sequence[object]) -> str:
    """The first few of a list, in brackets."""
    return f"({', '.join(map(str, values[:5]))}{', ...' if len(values) > 5 else ''})"


# ------------------------------------------------------------------------------------------- replaying the attempts


@dataclass
class Repeated:
    """Steps beyond the one from which the next attempt began: done again, at the speed of those that came first."""

    attempts: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Replay:
    """What the attempts of all runs came to."""

    per_run: Counter[int] = field(default_factory=Counter)  # attempts of a run -> runs
    ended: Counter[tuple[str, str | None]] = field(default_factory=Counter)  # how, cause -> attempts
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
    twice: dict[str, Repeated] = field(default_factory=dict)  # by how the attempt ended


# attempts first: in the order of their key nothing is sorted
_TRIES = """SELECT run_id, attempts.attempt, attempts.started_at, attempts.ended_at, attempts.ended, attempts.cause,
                   step_from, coalesce(step_to, step_from), runs.state, runs.attempt
            FROM attempts CROSS JOIN runs WHERE runs.id = attempts.run_id AND {seen} ORDER BY 1, 2"""

Try = Sequence[Any]  # a row of it
_RUN, _ATTEMPT, _STARTED, _UNTIL, _ENDED, _CAUSE, _FROM, _TO, _STATE, _LATEST = range(10)


def replay(connection: Connection, stage: str | None = None) -> Replay:
    """Go through all attempts of all runs, in their order."""
    found, extended = Replay(), _extensions(connection)
    found_rows = connection.execute(text(_TRIES.format(seen=of_stage(stage))), {"stage": stage} if stage else {})
    # as plain tuples: there may be very many, and what they hold is asked for several times
    rows = (tuple(row) for part in found_rows.partitions(10_000) for row in part)
    for run, tries in groupby(rows, itemgetter(_RUN)):
        _replay_run(found, run, list(tries), extended.get(run, ()))
    found.twice = dict(sorted(found.twice.items(), key=lambda item: -item[1].steps))
    return found


def _replay_run(found: Replay, run: int, tries: Sequence[Try], extended: Sequence[float]) -> None:
    lost = False
    for _, _, started, until, ended, cause, first, last, _, _ in tries:
        found.ended[ended or "running", cause] += 1
        if first is not None and last > first:
            found.steps += last - first
        if until is not None:
            found.seconds += until - started
        lost = lost or ended == "lost"
    found.per_run[len(tries)] += 1
    if lost:
        found.lost_runs += 1
        found.lost_but_done += tries[0][_STATE] == "done"
    _replay_order(found, run, tries)
    if len(tries) > 1:
        _replay_pairs(found, run, tries, extended)
        _replay_steps(found, tries)


def _replay_order(found: Replay, run: int, tries: Sequence[Try]) -> None:
    state, latest, n = tries[0][_STATE], tries[0][_LATEST], len(tries)
    last = tries[-1][_ENDED] if tries[-1][_ATTEMPT] == latest else None
    if n != tries[-1][_ATTEMPT] or n != latest:
        found.misnumbered.append(run)
    if state == "done" and last != "done":
        found.not_done.append(run)
    unended = sum([one[_ENDED] is None for one in tries])
    if unended != (state == "running") or (state == "running" and last is not None):
        found.unended.append(run)


# Only an extension makes a done run pending, and each leaves a row. So an attempt after an end without one between them
# proves that the run was trained once more; that both have a summary proves nothing, as every extended run has several.
def _replay_pairs(found: Replay, run: int, tries: Sequence[Try], extended: Sequence[float]) -> None:
    latest = -math.inf  # end of all attempts before
    overlap, again = 0.0, False
    for one, after in pairwise(tries):
        until = math.inf if one[_UNTIL] is None else one[_UNTIL]
        latest = max(latest, until)
        overlap = max(overlap, min(math.inf if after[_UNTIL] is None else after[_UNTIL], latest) - after[_STARTED])
        again = again or (one[_ENDED] == "done" and not any(until <= at <= after[_STARTED] for at in extended))
    if overlap > 0:
        found.overlapping.append(run)
        found.overlap_s = max(found.overlap_s, overlap)
    if again:
        found.again.append(run)
        if sum(one[_ENDED] == "done" for one in tries) > 1:
            found.done_twice.append(run)


def _replay_steps(found: Replay, tries: Sequence[Try]) -> None:
    for one, after in pairwise(one for one in tries if one[_FROM] is not None):
        steps, more = one[_TO] - one[_FROM], one[_TO] - after[_FROM]
        if more > 0:
            repeated = found.twice.setdefault(one[_ENDED] or "running", Repeated())
            repeated.attempts += 1
            repeated.steps += more
            if steps > 0 and one[_UNTIL] is not None:
                repeated.seconds += (one[_UNTIL] - one[_STARTED]) * more / steps


def _extensions(connection: Connection) -> dict[int, list[float]]:
    """When each run was given more steps."""
    found: dict[int, list[float]] = {}
    for row in connection.execute(text("SELECT at, detail FROM changes WHERE verb = 'extend' ORDER BY id")):
        for run in json.loads(row.detail)["runs"]:
            found.setdefault(int(run), []).append(row.at)
    return found


# ----------------------------------------------------------------------------------------------- what they came to


def _history(engine: Engine, stage: str | None) -> Iterator[Finding]:
    sql = f"SELECT state, count(*) AS n FROM runs WHERE {of_stage(stage)} GROUP BY state"
    with db.reading(engine) as connection:
        states = {row.state: row.n for row in connection.execute(text(sql), {"stage": stage} if stage else {})}
        found = replay(connection, stage)
        refused = _refused_writes(connection, stage)
    yield _states(states)
    yield _attempts(found)
    yield _ends(found)
    yield _losses(found)
    yield _refusals(refused)
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
    ends = sorted(found.ended.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or ""))
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
    return Finding("leases", "note", says, "what such a worker writes later is refused: see `refused`", numbers)


def _refused_writes(connection: Connection, stage: str | None) -> list[dict[str, Any]]:
    """Writes that came after the run had gone to another: run, attempt, worker, what."""
    sql = text("SELECT detail FROM changes WHERE verb = 'refused' ORDER BY id")
    found = [json.loads(words) for words in connection.execute(sql).scalars()]
    if stage is None or not found:
        return found
    ids = {one["run"] for one in found}
    mine = {run for run, latest in stored.latest(connection, ids).items() if latest.stage == stage}
    return [one for one in found if one["run"] in mine]


def _refusals(refused: Sequence[Mapping[str, Any]]) -> Finding:
    by_run, by_kind = Counter(one["run"] for one in refused), Counter(one["what"] for one in refused)
    numbers: dict[str, Any] = {"writes": len(refused), "runs": len(by_run), "by_kind": dict(by_kind)}
    numbers |= {"by_run": dict(by_run.most_common(SHOWN))}
    if not refused:
        return Finding("refused", "ok", "no late write of a lost worker is on record", None, numbers)
    kinds = ", ".join(f"{n:,} {what}" for what, n in by_kind.most_common())
    some = _some([f"run {run}: {n:,}" for run, n in by_run.most_common()])
    says = f"{_n(len(refused), 'late write')} to {_n(len(by_run), 'run')} rejected: {kinds} {some}"
    hint = "as it must be: these runs had gone to others, and nothing of these writes is in them"
    return Finding("refused", "note", says, hint, numbers)


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
    by = {how: vars(repeated) for how, repeated in found.twice.items()}
    steps, seconds = sum(one["steps"] for one in by.values()), sum(one["seconds"] for one in by.values())
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
              AND runs.state IN ('pending', 'waiting') AND runs.attempt > 0 AND {of_stage(stage)} GROUP BY runs.id"""
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
    sql = f"SELECT id, {marks} FROM runs WHERE ({broken}) AND {of_stage(stage)} ORDER BY id"
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


def _files(engine: Engine, stage: str | None, deep: bool, watch: Watch, disk: Mapping[str, int]) -> Iterator[Finding]:
    _, _, root = db.study(engine)
    with db.reading(engine) as connection:
        named = stored.named(connection, stage)
    looked = [file for file in named.values() if file.counts]
    wrong = _wrong_files(root, looked, disk, deep, watch)
    if wrong:  # rows after files: a worker takes a file away only once no row names it
        with db.reading(engine) as connection:
            still = stored.named(connection, stage, {file.run for file in wrong})
        wrong = {file: why for file, why in wrong.items() if still.get(file.path) == file}
    yield _checkpoints(looked, wrong, deep)
    yield _unnamed(stored.without_row(engine, root, [path for path in disk if path not in named]), disk)


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
