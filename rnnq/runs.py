"""Runs as plain rows: found by a filter, or shown whole. Reads only runs whose intake is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, bindparam, text

from rnnq import db, query
from rnnq.errors import InputError, nearest

_PARSED = ("config", "summary", "checkpoint", "checkpoint_prev", "checkpoint_best", "versions", "numerics", "detail",
           "start_from")  # fmt: skip


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
    defined_as: str | None = None  # its name in the definition file, where it was renamed
    keep: str | None = None  # its rule of which checkpoints stay; None: the default
    aliases: dict[str, str] = field(default_factory=dict)  # what filters may also call a field -> the field

    @property
    def names(self) -> dict[str, str]:
        """Fields and aliases, as the database holds them."""
        return query.stored(self.fields, self.aliases)

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
    sql = """SELECT name, family, family_in_source, has_rule, source, source_sha256, fields, metrics, seed_fields,
                    defined_as, keep
             FROM stages WHERE EXISTS (SELECT 1 FROM intakes WHERE stage = stages.name AND complete)
             ORDER BY created_at, name"""
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql)).all()
    return {row.name: _info(row) for row in rows}


def _info(row: Any) -> StageInfo:
    fields, aliases = query.parted(json.loads(row.fields))
    read = {"fields": fields, "aliases": aliases} | {n: json.loads(getattr(row, n)) for n in ("metrics", "seed_fields")}
    return StageInfo(**{**row._mapping, **read})


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
    aliases: dict[str, tuple[str, ...]] = {}
    for info in infos:
        fields |= info.fields
        for name, of in info.aliases.items():
            aliases[name] = tuple(dict.fromkeys([*aliases.get(name, ()), of]))
    return query.Scope(fields, frozenset(str(m["name"]) for info in infos for m in info.metrics), aliases)


def compile_filter(engine: Engine, stage: str | None, filter: str | None) -> query.Condition:
    """A filter as bound SQL over `runs`; without one, a condition that holds for every run. Raises InputError."""
    if filter is None:
        return query.Condition("1 = 1", {})
    infos = stage_infos(engine)
    chosen = [infos[stage]] if stage is not None and stage in infos else list(infos.values())
    return query.compile(filter, scope(chosen), db.words(engine))


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
    with _sized(filter), db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"stage": stage, "state": state, **condition.params}).all()
        tags = _tags(connection)
    return [_parsed(row) | {"tags": tags.get(row.id, [])} for row in rows]


@contextmanager
def _sized(filter: str | None) -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise InputError(f"a number in {filter!r} is too large for the database") from error


def _tags(connection: Connection, run: int | None = None) -> dict[int, list[str]]:
    """The tags of each run that has some."""
    found: dict[int, list[str]] = {}
    sql = "SELECT run_id, tag FROM tags WHERE :run IS NULL OR run_id = :run ORDER BY run_id, tag"
    for row in connection.execute(text(sql), {"run": run}):
        found.setdefault(row.run_id, []).append(row.tag)
    return found


def pick(engine: Engine, ids: Sequence[int], stage: str | None = None, filter: str | None = None) -> list[Any]:
    """The runs that are named by their ids, or that a filter selects: id, stage, label, state and a little more.

    Raises InputError for a stage, a filter or ids that are unknown.
    """
    if ids:
        return _named(engine, ids)
    if stage is not None:
        stage_info(engine, stage)
    condition = compile_filter(engine, stage, filter)
    sql = f"""{_PICKED} WHERE (:stage IS NULL OR runs.stage = :stage) AND ({condition.sql}) ORDER BY runs.id"""
    with _sized(filter), db.reading(engine) as connection:
        return list(connection.execute(text(sql), {"stage": stage, **condition.params}))


_PICKED = """SELECT runs.id, runs.stage, runs.label, runs.state, runs.priority, runs.budget, runs.steps_done, runs.note,
                    runs.checkpoint IS NOT NULL AS has_checkpoint,
                    runs.attempt = 0 AND EXISTS (
                        SELECT 1 FROM gates WHERE gates.id = runs.gate AND gates.decision IS NULL) AS behind
             FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete"""


def configs(engine: Engine, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Runs by their ids: id, stage, config and what they start from alone."""
    one = text("SELECT id, stage, config, start_from FROM runs WHERE id = :run")
    with db.reading(engine) as connection:
        return [_parsed(row) for run in ids for row in connection.execute(one, {"run": run})]


def _named(engine: Engine, ids: Sequence[int]) -> list[Any]:
    wanted = sorted(set(ids))
    with db.reading(engine) as connection:
        one = text(f"{_PICKED} WHERE runs.id = :run")
        found = [row for run in wanted for row in connection.execute(one, {"run": run})]
    missing = [str(run) for run in set(wanted) - {row.id for row in found}]
    if missing:
        raise InputError(f"there is no run {', '.join(sorted(missing, key=int))}", "`rnnq ls` lists them")
    return found


def _parsed(row: Any) -> dict[str, Any]:
    values = dict(row._mapping)
    for name in _PARSED:
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    return values


def newest(engine: Engine, limit: int, prefix: str = "") -> list[Any]:
    """The runs made last, the newest first: id, stage, label, state. With a prefix, those whose id begins with it."""
    # asked for each run: so SQLite walks back over the ids and stops at the limit, where it would else sort them all
    sql = """SELECT id, stage, label, state FROM runs WHERE cast(id AS TEXT) LIKE :prefix || '%'
             AND EXISTS (SELECT 1 FROM intakes WHERE intakes.id = runs.intake AND complete)
             ORDER BY id DESC LIMIT :limit"""
    with db.reading(engine) as connection:
        return list(connection.execute(text(sql), {"limit": limit, "prefix": prefix}))


_ONE = "SELECT runs.{} FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete WHERE runs.id = :run"
_ATTEMPTS = "SELECT * FROM attempts WHERE run_id = :run ORDER BY attempt"


def attempts(engine: Engine, run: int) -> tuple[str, list[dict[str, Any]]]:
    """A run's state, and its attempts. Raises InputError."""
    with db.reading(engine) as connection:
        return _one(connection, run, "state").state, _all(connection, _ATTEMPTS, run)


def _one(connection: Connection, run: int, columns: str) -> Any:
    row = connection.execute(text(_ONE.format(columns)), {"run": run}).one_or_none()
    if row is None:
        raise InputError(f"there is no run {run}", "`rnnq ls` lists them")
    return row


def show(engine: Engine, run: int) -> dict[str, Any]:
    """One run whole: its row, attempts, lineage, artifacts and the curves of its metrics. Raises InputError."""
    with db.reading(engine) as connection:
        found = _parsed(_one(connection, run, "*"))
        found["attempts"] = _all(connection, _ATTEMPTS, run)
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
        found["tags"] = _tags(connection, run).get(run, [])
        found["artifacts"] = _all(connection, "SELECT * FROM artifacts WHERE run_id = :run ORDER BY id", run)
        points = _all(connection, "SELECT name, step, value FROM points WHERE run_id = :run ORDER BY name, step", run)
    curves: dict[str, list[tuple[int, float | None]]] = {}
    for point in points:
        curves.setdefault(point["name"], []).append((point["step"], point["value"]))
    found["curves"] = curves
    return found


def _all(connection: Connection, sql: str, run: int) -> list[dict[str, Any]]:
    return [_parsed(row) for row in connection.execute(text(sql), {"run": run})]


def snapshots(engine: Engine, run: int) -> list[dict[str, Any]]:
    """The files of a run's snapshots, by step: path, step, sha256, bytes."""
    sql = """SELECT path, step, sha256, bytes FROM artifacts
             WHERE run_id = :run AND kind = 'snapshot' ORDER BY step"""
    with db.reading(engine) as connection:
        return _all(connection, sql, run)


def ancestry(engine: Engine, stage: str) -> list[dict[str, Any]]:
    """Which runs those of a stage went on from, and these from, back to the first: oldest last.

    Each with child, parent, the stages of both (stage, parent_stage), and the step of the checkpoint.
    """
    sql = """WITH RECURSIVE line(child, parent) AS (
                 SELECT lineage.child, lineage.parent FROM lineage JOIN runs ON runs.id = lineage.child
                 WHERE runs.stage = :stage AND lineage.kind = 'continue'
                 AND runs.intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete)
                 UNION SELECT lineage.child, lineage.parent FROM lineage JOIN line ON lineage.child = line.parent
                 WHERE lineage.kind = 'continue')
             SELECT line.child, line.parent, young.stage, old.stage AS parent_stage, lineage.detail
             FROM line JOIN lineage ON lineage.child = line.child AND lineage.parent = line.parent
             AND lineage.kind = 'continue'
             JOIN runs AS young ON young.id = line.child JOIN runs AS old ON old.id = line.parent
             ORDER BY line.child DESC, line.parent"""
    with db.reading(engine) as connection:
        rows = connection.execute(text(sql), {"stage": stage}).mappings().all()
    return [
        {name: row[name] for name in ("child", "parent", "stage", "parent_stage")}
        | {"step": (json.loads(row["detail"]) or {}).get("step") if row["detail"] else None}
        for row in rows
    ]


def points(
    engine: Engine, stage: str, names: Sequence[str], ids: Sequence[int] | None = None
) -> list[tuple[int, str, int, float | None]]:
    """The curves of a stage, or of some of its runs: (run, metric, step, value), ordered."""
    some = "" if ids is None else "AND runs.id IN :ids"
    sql = f"""SELECT point.run_id, metrics.name, point.step, point.value
             FROM runs JOIN point ON point.run_id = runs.id JOIN metrics ON metrics.id = point.metric_id
             WHERE runs.stage = :stage AND metrics.name = :name
             AND runs.intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete) {some}
             ORDER BY point.run_id, point.step"""
    query = text(sql) if ids is None else text(sql).bindparams(bindparam("ids", list(ids), expanding=True))
    found: list[tuple[int, str, int, float | None]] = []
    with db.reading(engine) as connection:
        for name in names:
            rows = connection.execute(query, {"stage": stage, "name": name})
            found += map(tuple, rows)  # a row's attributes would take twice the time
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


def seconds(engine: Engine, stage: str) -> dict[int, float]:
    """How long each run of a stage has been trained: seconds, over all its attempts that have ended."""
    sql = """SELECT attempts.run_id AS run, sum(attempts.ended_at - attempts.started_at) AS seconds
             FROM runs JOIN attempts ON attempts.run_id = runs.id
             WHERE runs.stage = :stage AND attempts.ended_at IS NOT NULL
             AND runs.intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete)
             GROUP BY attempts.run_id ORDER BY attempts.run_id"""
    with db.reading(engine) as connection:
        return {row.run: float(row.seconds) for row in connection.execute(text(sql), {"stage": stage})}
