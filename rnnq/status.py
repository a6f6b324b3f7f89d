"""What is pending, running, done and failed; who works; when it ends. Text SQL alone, so that it answers at once.

What an estimate is learnt from is bounded (LEARN, LOOK), and so is what failures are told apart by (FAILED): a study of
200,000 runs is answered as quickly as their counting takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, bindparam, text

from rnnq import db, host
from rnnq.query import OPEN, STATES

if TYPE_CHECKING:
    from rnnq import eta

RATE_WINDOW = 3600.0  # seconds back from the last end in which finished runs count for the rate
LEARN = 2000  # finished runs that an estimate is learnt from: the newest
LOOK = 2000  # pending runs that it looks at; where there are more, these stand for the others
STOPPED = 86400.0  # seconds for which a worker that stopped itself is told of
SHOWN = 3  # of them
FAILED = 1000  # failed runs of a stage that are told apart by cause and message: the newest

# joined with intakes, SQLite would begin with the runs and visit every row of the stage
_OF_STAGE = "runs.stage = :stage AND runs.intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete)"


@dataclass(frozen=True)
class StageStatus:
    """One stage in numbers. `reckoned` says how the ETA came about.

    From `eta_low_s` to `eta_high_s` the end lies in 80 of 100 cases (see rnnq/eta.py); None where too few runs of like
    config have finished. Waiting runs are not in any of them: nobody knows when, or whether, they may start. A stage
    that is paused has no ETA.
    """

    stage: str
    paused: bool
    counts: dict[str, int]
    runs_per_hour: float | None
    eta_s: float | None
    eta_low_s: float | None
    eta_high_s: float | None
    reckoned: str

    @property
    def total(self) -> int:
        """All runs of the stage."""
        return sum(self.counts.values())

    @property
    def open(self) -> int:
        """Runs that have not ended."""
        return sum(self.counts.get(state, 0) for state in OPEN)


def stages(engine: Engine, stage: str | None = None) -> list[StageStatus]:
    """Every stage in the order in which they were made, or the one that is named."""
    with db.reading(engine) as connection:
        names = _stage_names(connection, stage)
        now = db.clock(connection)
        scopes = _live_scopes(connection, now)
        return [
            _stage_status(connection, row.name, bool(row.paused), sum(s in (None, row.name) for s in scopes), now)
            for row in names
        ]


def behind(engine: Engine, stage: str | None = None) -> tuple[int, int]:
    """How many runs wait behind gates, and behind how many of them. To be asked only where runs wait."""
    sql = f"""SELECT count(*) AS runs, count(DISTINCT gate) AS gates FROM runs
              WHERE {_OF_STAGE} AND state = 'waiting' AND gate IS NOT NULL AND wake_at IS NULL"""
    with db.reading(engine) as connection:
        names = [row.name for row in _stage_names(connection, stage)]
        found = [connection.execute(text(sql), {"stage": name}).one() for name in names]
    return sum(row.runs for row in found), sum(row.gates for row in found)


def _stage_names(connection: Connection, stage: str | None) -> list[Any]:
    sql = """SELECT name, paused FROM stages WHERE (:stage IS NULL OR name = :stage)
             AND EXISTS (SELECT 1 FROM intakes WHERE intakes.stage = stages.name AND complete)
             ORDER BY created_at, name"""
    return list(connection.execute(text(sql), {"stage": stage}).all())


def _live_scopes(connection: Connection, now: float) -> list[str | None]:
    """The stage that each live worker is bound to; None for one that takes any. Those that were asked to leave, and
    those whose process is gone, take nothing more."""
    sql = """SELECT scope, host, pid, pid_start FROM workers
             WHERE state = 'live' AND wish IS NULL AND beat_at > :now - (SELECT lease_s FROM study)"""
    rows = connection.execute(text(sql), {"now": now}).all()
    return [_bound_to(row.scope) for row in rows if not host.is_gone(row.host, row.pid, row.pid_start)]


def _bound_to(scope: str | None) -> str | None:
    stage = json.loads(scope or "{}").get("stage")
    return None if stage is None else str(stage)


def _stage_status(connection: Connection, stage: str, paused: bool, live: int, now: float) -> StageStatus:
    # grouped in the order of the covering index, so that nothing is sorted
    sql = f"SELECT state, count(*) AS n FROM runs WHERE {_OF_STAGE} GROUP BY intake, state"
    found: dict[str, int] = {}
    for row in connection.execute(text(sql), {"stage": stage}):
        found[row.state] = found.get(row.state, 0) + row.n
    counts = {state: found[state] for state in STATES if state in found}
    finished = _finished(connection, stage)
    guess = _guess(connection, stage, counts, finished, live, now)
    low, high = (None, None) if paused else guess.interval
    ends = None if paused and guess.eta_s else guess.eta_s
    reckoned = f"paused: no run of it is claimed; {guess.reckoned}" if paused else guess.reckoned
    return StageStatus(stage, paused, counts, _runs_per_hour(finished), ends, low, high, reckoned)


# ---------------------------------------------------------------------------------------------------- rate, ETA


def _finished(connection: Connection, stage: str) -> list[Any]:
    """The last attempts of the runs that finished last, the newest first."""
    sql = f"""SELECT runs.group_key, runs.pack_key, runs.ended_at AS run_ended_at, attempts.started_at,
                     attempts.ended_at, coalesce(step_to - step_from, 0) AS steps
              FROM runs JOIN attempts ON attempts.run_id = runs.id AND attempts.attempt = runs.attempt
              WHERE {_OF_STAGE} AND runs.state = 'done' AND attempts.ended = 'done'
              ORDER BY runs.ended_at DESC LIMIT :learn"""
    return list(connection.execute(text(sql), {"stage": stage, "learn": LEARN}).all())


def _runs_per_hour(finished: Sequence[Any]) -> float | None:
    """Runs finished in the last hour of work, over the time since the first of their last attempts began."""
    if not finished:
        return None
    last = finished[0].run_ended_at
    lately = [row for row in finished if row.run_ended_at >= last - RATE_WINDOW]
    first = min(row.started_at for row in lately)
    return float(len(lately) / (last - first) * 3600) if last > first else None


@dataclass(frozen=True)
class _Guess:
    eta_s: float | None
    reckoned: str
    interval: tuple[float | None, float | None] = (None, None)


def _guess(
    connection: Connection, stage: str, counts: Mapping[str, int], finished: Sequence[Any], live: int, now: float
) -> _Guess:
    """When the pending and the running runs have ended, from what finished ones took."""
    left, waiting = counts.get("pending", 0) + counts.get("running", 0), counts.get("waiting", 0)
    also = f"; {waiting:,} waiting run{'s' if waiting != 1 else ''} not counted" if waiting else ""
    if not left:
        only = f"{waiting:,} run{'s wait' if waiting != 1 else ' waits'}, and nothing else is left"
        return _Guess(None, only) if waiting else _Guess(0.0, "nothing is left")
    if not finished:
        return _Guess(None, f"no run of the stage has finished yet{also}")
    workers = min(max(live, 1), left)  # one run has one worker
    who = f"{live} worker{'s' if live != 1 else ''}" if live else "if one worker worked"
    n = f"{len(finished):,} finished run{'s' if len(finished) != 1 else ''}"
    of = f"the newest {n}" if len(finished) == LEARN else n
    found, what = _estimate(_open_runs(connection, stage, counts), finished, workers, left, now)
    return _Guess(found.eta_s, f"{what}; {of}, {who}{also}", (found.low_s, found.high_s))


def _open_runs(connection: Connection, stage: str, counts: Mapping[str, int]) -> list[tuple[Any, float]]:
    """Running and pending runs in the order of claims, each with how many it stands for: of very many, some."""
    # told by multiples of the golden ratio, as every n-th run of a grid could well be of one shape alone; of the id,
    # so that what is not looked at is left out in the index
    sql = f"""SELECT runs.id, runs.state, runs.group_key, runs.pack_key, runs.budget, runs.steps_done, runs.priority,
                     (SELECT started_at FROM attempts WHERE run_id = runs.id AND attempts.attempt = runs.attempt
                      AND runs.state = 'running') AS started_at
              FROM runs WHERE {_OF_STAGE} AND runs.state = :state
              AND (runs.id * 2654435761) % 4294967296 < :share"""
    found: list[tuple[Any, float]] = []
    for state in ("running", "pending"):
        n = counts.get(state, 0)
        share = 4294967296 * min(1.0, LOOK / max(n, 1))
        rows = connection.execute(text(sql), {"stage": stage, "state": state, "share": share}).all()
        found += [(row, n / len(rows)) for row in sorted(rows, key=lambda row: (-row.priority, row.id))]
    return found


def _estimate(
    rows: Sequence[tuple[Any, float]], finished: Sequence[Any], workers: int, left: int, now: float
) -> tuple[eta.Estimate, str]:
    """The estimate and what it is made of, in words: by steps where every budget is known, else by runs."""
    from rnnq import eta  # 0.015 s, and only needed where something has finished

    seconds = sum(row.ended_at - row.started_at for row in finished)
    steps = sum(row.steps for row in finished)
    if steps > 0 and seconds > 0 and all(row.budget is not None for row, _ in rows):
        known = [
            eta.Finished(row.group_key, row.pack_key, row.steps, row.ended_at - row.started_at) for row in finished
        ]
        # one past its budget owes nothing
        open_runs = [_left(row, times, max(row.budget - row.steps_done, 0)) for row, times in rows]
        to_go = sum(run.size * run.times for run in open_runs)
        found = eta.estimate(known, open_runs, workers)
        speed = to_go / found.work_s if found.work_s else steps / seconds
        about = "about " if any(times > 1 for _, times in rows) else ""
        return found, f"{about}{round(to_go):,} steps left at {_shown(speed)} steps/s"
    mean = seconds / len(finished)
    words = f"{left:,} runs left at {mean:.1f} s each"
    if seconds <= 0:
        return eta.Estimate(0.0, None, None, 0.0), words
    known = [eta.Finished(row.group_key, row.pack_key, 1, row.ended_at - row.started_at) for row in finished]
    open_runs = [_left(row, times, 1, now - row.started_at if row.started_at else 0.0) for row, times in rows]
    return eta.estimate(known, open_runs, workers), words


def _left(row: Any, times: float, size: float, spent: float = 0.0) -> eta.Left:
    from rnnq import eta

    return eta.Left(row.group_key, row.pack_key, size, row.state == "running", spent, times)


def _shown(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


# ------------------------------------------------------------------------------------------------------ workers


_STOPPED = "stopped itself: "  # how the message of such a worker begins
_WORKER = """workers.id AS worker, workers.host, workers.pid, workers.pid_start, workers.device, workers.state,
             workers.scope, workers.wish, workers.started_at AS since, :now - workers.beat_at AS beat_s_ago,
             workers.message, runs.id AS run, runs.stage, runs.label, runs.attempt, runs.steps_done AS step,
             runs.budget, attempts.step_from, :now - attempts.started_at AS seconds"""
_HOLDING = """workers LEFT JOIN runs ON runs.worker = workers.id AND runs.state = 'running'
              LEFT JOIN attempts ON attempts.run_id = runs.id AND attempts.attempt = runs.attempt"""


def workers(engine: Engine, stage: str | None = None) -> list[dict[str, Any]]:
    """Workers that are live, or were lost in the last hour: what each does, and how long ago it beat.

    A worker that holds several runs comes with each. `scope` is the stage that it is bound to, `since` when it began
    (seconds since 1970), `wish` what it was asked for: stop or drain. Of its run: the newest value of the primary
    metric, else of `loss`, and by the speed of this attempt the seconds until its end.
    """
    sql = f"""SELECT {_WORKER} FROM {_HOLDING}
              WHERE (workers.state = 'live' OR (workers.state = 'lost' AND workers.left_at > :now - 3600))
              AND (:stage IS NULL OR runs.stage IS NULL OR runs.stage = :stage) ORDER BY workers.started_at, runs.id"""
    return _workers(engine, sql, stage)


def all_workers(engine: Engine) -> list[dict[str, Any]]:
    """As `workers`, but every worker there ever was, with how many attempts it ended done, failed and lost."""
    found = _workers(engine, f"SELECT {_WORKER} FROM {_HOLDING} ORDER BY workers.started_at, runs.id", None)
    sql = """SELECT worker, ended, count(*) AS n FROM attempts WHERE ended IN ('done', 'failed', 'lost')
             GROUP BY worker, ended"""
    with db.reading(engine) as connection:
        ended = {(row.worker, row.ended): int(row.n) for row in connection.execute(text(sql))}
    for row in found:
        row |= {how: ended.get((row["worker"], how), 0) for how in ("done", "failed", "lost")}
    return found


def stopped(engine: Engine, stage: str | None = None) -> list[dict[str, Any]]:
    """As `workers`: those that stopped themselves within STOPPED seconds, the newest first; `n` that did so for one
    reason at one place are one, and no more than SHOWN are told. None where another worker has started there since:
    somebody has seen to it. `left_s_ago` is when, `why` the first line of the reason."""
    sql = f"""SELECT {_WORKER}, :now - workers.left_at AS left_s_ago FROM {_HOLDING}
              WHERE workers.state = 'left' AND workers.left_at > :now - :last AND workers.message LIKE :stopped
              AND NOT EXISTS (SELECT 1 FROM workers AS newer WHERE newer.host = workers.host
                              AND newer.device = workers.device AND newer.started_at > workers.left_at)
              ORDER BY workers.left_at DESC LIMIT 100"""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in _workers(engine, sql, None, last=STOPPED, stopped=f"{_STOPPED}%"):
        if stage is None or row["scope"] in (None, stage):
            why = row["message"].removeprefix(_STOPPED).partition("\n")[0]
            group = groups.setdefault((row["host"], row["device"], blank(why)), {**row, "why": why, "n": 0})
            group["n"] += 1
    return list(groups.values())[:SHOWN]


def _workers(engine: Engine, sql: str, stage: str | None, **values: Any) -> list[dict[str, Any]]:
    with db.reading(engine) as connection:
        now = db.clock(connection)
        lease = float(connection.execute(text("SELECT lease_s FROM study")).scalar_one())
        rows = [dict(row._mapping) for row in connection.execute(text(sql), {"now": now, "stage": stage, **values})]
        newest = _newest_values(connection, {row["run"]: row["stage"] for row in rows if row["run"] is not None})
    for row in rows:
        row["state"] = _worker_state(row, row.pop("pid_start"), lease)
        row["host"] = host.short(row["host"])
        row["scope"] = _bound_to(row["scope"])
        row["metric"], row["loss"] = newest.get(row["run"], (None, None))
        row |= _speed(row, row.pop("step_from"), row.pop("seconds"))
    return rows


def _worker_state(row: Mapping[str, Any], start: str | None, lease: float) -> str:
    if row["state"] == "live" and host.is_gone(row["host"], row["pid"], start):
        return "gone"  # its process is no more; whoever reaps next takes back its run
    if row["state"] == "live" and row["beat_s_ago"] > lease:
        return "silent"  # its lease has ended; whoever reaps next decides
    return str(row["state"])


def _speed(row: Mapping[str, Any], step_from: int | None, seconds: float | None) -> dict[str, float | None]:
    """Steps a second of this attempt so far, and how long its run takes yet at that speed."""
    done = 0 if step_from is None else row["step"] - step_from
    if not seconds or seconds <= 0 or done <= 0:
        return {"steps_per_s": None, "run_eta_s": None}
    speed = done / seconds
    left = None if row["budget"] is None else max(row["budget"] - row["step"], 0) / speed
    return {"steps_per_s": speed, "run_eta_s": left}


def _newest_values(connection: Connection, stage_of: Mapping[int, str]) -> dict[int, tuple[str, float | None]]:
    """The newest point of each run's primary metric, else of `loss`: its name and value; None was not finite."""
    primary = _primary_metrics(connection, set(stage_of.values()))
    wanted = {"loss": list(stage_of)}
    for run, stage in stage_of.items():
        wanted.setdefault(primary.get(stage, "loss"), []).append(run)
    sql = """SELECT point.run_id, point.value FROM metrics JOIN runs ON runs.id IN :runs JOIN point
             ON point.run_id = runs.id AND point.metric_id = metrics.id AND point.step = (
                 SELECT max(step) FROM point AS last WHERE last.run_id = runs.id AND last.metric_id = metrics.id)
             WHERE metrics.name = :name"""
    newest = text(sql).bindparams(bindparam("runs", expanding=True))
    found: dict[int, tuple[str, float | None]] = {}
    for name, runs in wanted.items():  # `loss` first: a primary metric takes its place
        for chunk in _chunks(sorted(set(runs))):
            rows = connection.execute(newest, {"name": name, "runs": chunk})
            found |= {row.run_id: (name, row.value) for row in rows}
    return found


def _primary_metrics(connection: Connection, stages: set[str]) -> dict[str, str]:
    if not stages:
        return {}
    found = {}
    for row in connection.execute(text("SELECT name, metrics FROM stages")):
        if row.name in stages:
            found[row.name] = next((str(m["name"]) for m in json.loads(row.metrics) if m["primary"]), "loss")
    return found


def _chunks(values: Sequence[int], size: int = 1000) -> Iterable[list[int]]:
    return (list(values[i : i + size]) for i in range(0, len(values), size))


# ------------------------------------------------------------------------------------------------ what has ended


def lately(engine: Engine, stage: str | None = None, limit: int = 5) -> list[dict[str, Any]]:
    """The runs that finished or failed last, the newest first: loss, or cause and message, and how long ago."""
    sql = f"""SELECT id AS run, stage, label, state, loss, cause, message, :now - ended_at AS s_ago
              FROM runs WHERE {_OF_STAGE} AND state IN ('done', 'failed') AND ended_at IS NOT NULL
              ORDER BY ended_at DESC LIMIT :limit"""
    found: list[dict[str, Any]] = []
    with db.reading(engine) as connection:
        now = db.clock(connection)
        for row in _stage_names(connection, stage):
            values = {"stage": row.name, "now": now, "limit": limit}
            found += [dict(one._mapping) for one in connection.execute(text(sql), values)]
    return sorted(found, key=lambda one: (one["s_ago"], -one["run"]))[:limit]


def failures(engine: Engine, stage: str | None = None) -> list[dict[str, Any]]:
    """Failed runs by stage, cause and message, the most first: how many, the latest of them, and the last message.

    Messages that differ in numbers alone are the same. Of very many failed runs of a stage it looks at the newest.
    """
    # sorted by an expression: else SQLite may walk over all runs in the order of their ends to find the failed ones
    sql = f"""SELECT id, cause, substr(message, 1, 1000) AS message FROM runs WHERE {_OF_STAGE} AND state = 'failed'
              ORDER BY ended_at + 0 DESC, id DESC LIMIT :failed"""
    found: dict[tuple[str, str | None, str], dict[str, Any]] = {}
    with db.reading(engine) as connection:
        for name in [row.name for row in _stage_names(connection, stage)]:
            for row in connection.execute(text(sql), {"stage": name, "failed": FAILED}):
                message = row.message or ""
                group = found.setdefault(
                    (name, row.cause, blank(message)),
                    {"stage": name, "cause": row.cause, "n": 0, "runs": [], "message": message},
                )
                group["n"] += 1
                group["runs"] += [row.id] if len(group["runs"]) < 5 else []
    return sorted(found.values(), key=lambda group: -group["n"])


# compiled where the first message is met: most looks have none
_NUMBER = r"(?i)0x[0-9a-f]+|\b(?=[0-9a-f]*[0-9])[0-9a-f]{8,}\b|[-+]?[0-9]+(?:[.,_][0-9]+)*(?:e[-+]?[0-9]+)?"


def blank(message: str) -> str:
    """A message with # for each number, address and hash in it."""
    return re.sub(_NUMBER, "#", message)
