"""What is pending, running, done and failed; who works; when it ends. Text SQL alone, so that it answers at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import db, host
from rnnq.query import OPEN, STATES

RATE_WINDOW = 3600.0  # seconds back from the last end in which finished runs count for the rate

# joined with intakes, SQLite would begin with the runs and visit every row of the stage
_OF_STAGE = "runs.stage = :stage AND runs.intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete)"


@dataclass(frozen=True)
class StageStatus:
    """One stage in numbers. `reckoned` says how the ETA came about."""

    stage: str
    paused: bool
    counts: dict[str, int]
    runs_per_hour: float | None
    eta_s: float | None
    reckoned: str

    @property
    def total(self) -> int:
        """All runs of the stage."""
        return sum(self.counts.values())


def stages(engine: Engine, stage: str | None = None) -> list[StageStatus]:
    """Every stage in the order in which they were made, or the one that is named."""
    with db.reading(engine) as connection:
        names = _stage_names(connection, stage)
        scopes = _live_scopes(connection, db.clock(connection))
        return [
            _stage_status(connection, row.name, bool(row.paused), sum(s in (None, row.name) for s in scopes))
            for row in names
        ]


def _stage_names(connection: Connection, stage: str | None) -> list[Any]:
    sql = """SELECT name, paused FROM stages WHERE (:stage IS NULL OR name = :stage)
             AND EXISTS (SELECT 1 FROM intakes WHERE intakes.stage = stages.name AND complete)
             ORDER BY created_at, name"""
    return list(connection.execute(text(sql), {"stage": stage}).all())


def _live_scopes(connection: Connection, now: float) -> list[str | None]:
    """The stage that each live worker is bound to; None for one that takes any."""
    sql = "SELECT scope FROM workers WHERE state = 'live' AND beat_at > :now - (SELECT lease_s FROM study)"
    return [json.loads(row.scope or "{}").get("stage") for row in connection.execute(text(sql), {"now": now})]


def _stage_status(connection: Connection, stage: str, paused: bool, live: int) -> StageStatus:
    # grouped in the order of the covering index, so that nothing is sorted
    sql = f"SELECT state, count(*) AS n FROM runs WHERE {_OF_STAGE} GROUP BY intake, state"
    found: dict[str, int] = {}
    for row in connection.execute(text(sql), {"stage": stage}):
        found[row.state] = found.get(row.state, 0) + row.n
    counts = {state: found[state] for state in STATES if state in found}
    rate = _runs_per_hour(connection, stage)
    eta, reckoned = _eta(connection, stage, counts, live)
    return StageStatus(stage, paused, counts, rate, eta, reckoned)


def _runs_per_hour(connection: Connection, stage: str) -> float | None:
    """Runs finished in the last hour of work, over the time since the first of their last attempts began."""
    sql = """SELECT count(*) AS n, min(attempts.started_at) AS first, max(runs.ended_at) AS last
             FROM runs JOIN attempts ON attempts.run_id = runs.id AND attempts.attempt = runs.attempt
             WHERE runs.stage = :stage AND runs.state = 'done' AND runs.ended_at >= (
                 SELECT max(ended_at) - :window FROM runs WHERE stage = :stage)"""
    row = connection.execute(text(sql), {"stage": stage, "window": RATE_WINDOW}).one()
    if not row.n or row.last <= row.first:
        return None
    return float(row.n / (row.last - row.first) * 3600)


def _eta(connection: Connection, stage: str, counts: dict[str, int], live: int) -> tuple[float | None, str]:
    """Seconds until the stage is done: the steps that are left at the seconds per step of finished attempts."""
    left = sum(counts.get(state, 0) for state in OPEN)
    if not left:
        return 0.0, "nothing is left"
    sql = f"""SELECT count(*) AS n, sum(attempts.ended_at - attempts.started_at) AS seconds,
                     sum(coalesce(step_to - step_from, 0)) AS steps
              FROM runs JOIN attempts ON attempts.run_id = runs.id AND attempts.attempt = runs.attempt
              WHERE {_OF_STAGE} AND runs.state = 'done' AND attempts.ended = 'done'"""
    done = connection.execute(text(sql), {"stage": stage}).one()
    if not done.n:
        return None, "no run of the stage has finished yet"
    workers = min(max(live, 1), left)  # one run has one worker
    who = f"{live} worker{'s' if live != 1 else ''}" if live else "if one worker worked"
    of = f"{done.n} finished run{'s' if done.n != 1 else ''}, {who}"
    steps_left = _steps_left(connection, stage)
    if steps_left is not None and done.steps and done.seconds > 0:
        speed = done.steps / done.seconds
        shown = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        return steps_left / speed / workers, f"{steps_left:,} steps left at {shown} steps/s; {of}"
    mean = done.seconds / done.n
    return mean * left / workers, f"{left} runs left at {mean:.1f} s each; {of}"


def _steps_left(connection: Connection, stage: str) -> int | None:
    """Steps to go in open runs; None when a budget is not known."""
    left = "CASE WHEN budget > steps_done THEN budget - steps_done ELSE 0 END"  # one past its budget owes nothing
    sql = f"""SELECT sum({left}) AS steps, count(*) AS n, count(budget) AS known FROM runs
              WHERE {_OF_STAGE} AND runs.state IN ('waiting', 'pending', 'running')"""
    row = connection.execute(text(sql), {"stage": stage}).one()
    return int(row.steps) if row.n and row.known == row.n else None


def workers(engine: Engine, stage: str | None = None) -> list[dict[str, Any]]:
    """Workers that are live, or were lost in the last hour: what each does, and how long ago it beat."""
    sql = """SELECT workers.id AS worker, workers.host, workers.pid, workers.pid_start, workers.device, workers.state,
                    :now - workers.beat_at AS beat_s_ago, workers.message,
                    runs.id AS run, runs.stage, runs.label, runs.attempt, runs.steps_done AS step, runs.budget
             FROM workers LEFT JOIN runs ON runs.worker = workers.id AND runs.state = 'running'
             WHERE (workers.state = 'live' OR (workers.state = 'lost' AND workers.left_at > :now - 3600))
             AND (:stage IS NULL OR runs.stage IS NULL OR runs.stage = :stage) ORDER BY workers.started_at, runs.id"""
    with db.reading(engine) as connection:
        now = db.clock(connection)
        lease = float(connection.execute(text("SELECT lease_s FROM study")).scalar_one())
        rows = [dict(row._mapping) for row in connection.execute(text(sql), {"now": now, "stage": stage})]
    for row in rows:
        start = row.pop("pid_start")
        if row["state"] == "live" and host.is_gone(row["host"], row["pid"], start):
            row["state"] = "gone"  # its process is no more; whoever reaps next takes back its run
        elif row["state"] == "live" and row["beat_s_ago"] > lease:
            row["state"] = "silent"  # its lease has ended; whoever reaps next decides
        row["host"] = host.short(row["host"])
    return rows


def failures(engine: Engine, stage: str | None = None) -> list[dict[str, Any]]:
    """Failed runs by stage and cause, the most first: how many, the latest of them, and the last message."""
    failed = f"FROM runs WHERE {_OF_STAGE} AND state = 'failed'"
    causes = f"SELECT cause, count(*) AS n {failed} GROUP BY cause ORDER BY cause"
    latest = f"""SELECT id, message {failed} AND coalesce(cause, '') = coalesce(:cause, '')
                 ORDER BY ended_at DESC, id DESC LIMIT 5"""
    found = []
    with db.reading(engine) as connection:
        for name in [row.name for row in _stage_names(connection, stage)]:
            for row in connection.execute(text(causes), {"stage": name}).all():
                last = connection.execute(text(latest), {"stage": name, "cause": row.cause}).all()
                runs = [item.id for item in last]
                message = last[0].message or ""
                found.append({"stage": name, "cause": row.cause, "n": row.n, "runs": runs, "message": message})
    return sorted(found, key=lambda group: -group["n"])
