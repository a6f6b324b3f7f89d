"""Runs as plain rows: found by a filter, or shown whole. Reads only runs whose intake is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import db, query
from rnnq.errors import InputError, nearest

_PARSED = ("config", "summary", "checkpoint", "checkpoint_prev", "checkpoint_best", "versions", "numerics", "detail")


@dataclass(frozen=True)
class StageInfo:
    """What a stage says of itself."""

    name: str
    family: str
    family_in_source: bool
    has_rule: bool
    source: str | None
    source_sha256: str | None
    fields: dict[str, str]  # config field -> type
    metrics: list[dict[str, Any]]  # name, unit, better, primary
    seed_fields: list[str]

    @property
    def primary(self) -> str:
        """The metric that `runs.loss` holds."""
        return next((str(m["name"]) for m in self.metrics if m["primary"]), "loss")

    def metric(self, name: str) -> dict[str, Any]:
        """A metric by name; `loss` always means the primary one, as in a filter. Raises InputError."""
        known = {str(m["name"]): m for m in self.metrics}
        if name == "loss":
            name = self.primary
        if name not in known:
            raise InputError(f"stage {self.name} has no metric {name!r}", nearest(name, known))
        return known[name]


def stage_info(engine: Engine, name: str) -> StageInfo:
    """A stage by name. Raises InputError for one that is not there."""
    infos = stage_infos(engine)
    if name not in infos:
        raise InputError(f"there is no stage {name!r}", nearest(name, infos) if infos else "`rnnq init` adds one")
    return infos[name]


def stage_infos(engine: Engine) -> dict[str, StageInfo]:
    """Every stage that has runs, oldest first."""
    sql = """SELECT name, family, family_in_source, has_rule, source, source_sha256, fields, metrics, seed_fields
             FROM stages WHERE EXISTS (SELECT 1 FROM intakes WHERE stage = stages.name AND complete)
             ORDER BY created_at, name"""
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql)).all()
    parsed = ("fields", "metrics", "seed_fields")
    return {
        row.name: StageInfo(**{**row._mapping, **{name: json.loads(getattr(row, name)) for name in parsed}})
        for row in rows
    }


def newest_finished_stage(engine: Engine) -> str:
    """The stage made last among those with finished runs. Raises InputError when there is none."""
    sql = """SELECT name FROM stages WHERE EXISTS (
                 SELECT 1 FROM runs WHERE runs.stage = stages.name AND runs.state = 'done'
                 AND runs.intake IN (SELECT id FROM intakes WHERE intakes.stage = stages.name AND complete))
             ORDER BY created_at DESC, name DESC LIMIT 1"""
    with db.reading(engine) as connection:
        found = connection.execute(text(sql)).scalar()
    if found is None:
        raise InputError("no stage has finished runs yet", "`rnnq worker` trains what is pending; see `rnnq status`")
    return str(found)


def scope(infos: Sequence[StageInfo]) -> query.Scope:
    """The names that a filter over these stages may use."""
    fields: dict[str, str] = {}
    for info in infos:
        fields |= info.fields
    return query.Scope(fields, frozenset(str(m["name"]) for info in infos for m in info.metrics))


def compile_filter(engine: Engine, stage: str | None, filter: str | None) -> query.Condition:
    """A filter as bound SQL over `runs`; without one, a condition that holds for every run. Raises InputError."""
    if filter is None:
        return query.Condition("1 = 1", {})
    infos = stage_infos(engine)
    chosen = [infos[stage]] if stage is not None and stage in infos else list(infos.values())
    return query.compile(filter, scope(chosen))


def find(
    engine: Engine, stage: str | None = None, filter: str | None = None, state: str | None = None
) -> list[dict[str, Any]]:
    """The runs that a filter selects, by id; config, summary and checkpoints as values. Raises InputError."""
    if stage is not None:
        stage_info(engine, stage)
    condition = compile_filter(engine, stage, filter)
    sql = f"""SELECT runs.* FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
              WHERE (:stage IS NULL OR runs.stage = :stage) AND (:state IS NULL OR runs.state = :state)
              AND ({condition.sql}) ORDER BY runs.id"""
    try:
        with db.reading(engine) as connection:
            rows = connection.execute(text(sql), {"stage": stage, "state": state, **condition.params}).all()
    except OverflowError as error:
        raise InputError(f"a number in {filter!r} is too large for the database") from error
    return [_parsed(row) for row in rows]


def _parsed(row: Any) -> dict[str, Any]:
    values = dict(row._mapping)
    for name in _PARSED:
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    return values


def show(engine: Engine, run: int) -> dict[str, Any]:
    """One run whole: its row, attempts, lineage, artifacts and the curves of its metrics. Raises InputError."""
    with db.reading(engine) as connection:
        sql = (
            "SELECT runs.* FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete WHERE runs.id = :run"
        )
        row = connection.execute(text(sql), {"run": run}).one_or_none()
        if row is None:
            raise InputError(f"there is no run {run}", "`rnnq ls` lists them")
        found = _parsed(row)
        found["attempts"] = _all(connection, "SELECT * FROM attempts WHERE run_id = :run ORDER BY attempt", run)
        found["parents"] = _all(
            connection,
            """SELECT parent AS run, kind, detail, stage, label FROM lineage
               JOIN runs ON runs.id = parent WHERE child = :run ORDER BY parent""",
            run,
        )
        found["children"] = _all(
            connection,
            """SELECT child AS run, kind, detail, stage, label FROM lineage
               JOIN runs ON runs.id = child WHERE parent = :run ORDER BY child""",
            run,
        )
        found["artifacts"] = _all(connection, "SELECT * FROM artifacts WHERE run_id = :run ORDER BY id", run)
        points = _all(connection, "SELECT name, step, value FROM points WHERE run_id = :run ORDER BY name, step", run)
    curves: dict[str, list[tuple[int, float | None]]] = {}
    for point in points:
        curves.setdefault(point["name"], []).append((point["step"], point["value"]))
    found["curves"] = curves
    return found


def _all(connection: Connection, sql: str, run: int) -> list[dict[str, Any]]:
    return [_parsed(row) for row in connection.execute(text(sql), {"run": run})]


def points(engine: Engine, stage: str, names: Sequence[str]) -> list[tuple[int, str, int, float | None]]:
    """The curves of a stage: (run, metric, step, value), ordered."""
    sql = """SELECT point.run_id, metrics.name, point.step, point.value
             FROM runs JOIN point ON point.run_id = runs.id JOIN metrics ON metrics.id = point.metric_id
             WHERE runs.stage = :stage AND metrics.name = :name
             AND runs.intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete)
             ORDER BY point.run_id, point.step"""
    found: list[tuple[int, str, int, float | None]] = []
    with db.reading(engine) as connection:
        for name in names:
            rows = connection.execute(text(sql), {"stage": stage, "name": name})
            found += [(row.run_id, row.name, row.step, row.value) for row in rows]
    return found


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by group: those that are equal but for their seed fields, in the order of their first member."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group_key"], []).append(row)
    return found


def value_of(row: Mapping[str, Any], metric: str, primary: str) -> float | None:
    """A run's metric: the indexed column for the primary one, else what its summary holds."""
    value = row["loss"] if metric == primary else (row["summary"] or {}).get(metric)
    return float(value) if isinstance(value, (int, float)) else None
