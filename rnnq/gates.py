"""What a run waits for: a condition on other runs, looked at and never changed here; queue.py takes the decisions.

A gate is decided once all the runs that it waits for have ended. Until then it is shut; evaluated only by the parent
that ends last, two parents that end at the same moment would each see the other running and leave it shut for ever, so
it is looked at again and again, by every worker that seeks work.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, text

from rnnq import db, query
from rnnq.databases.words import OF
from rnnq.errors import InputError, nearest

OPEN, SHUT = "open", "shut"
NO_NAMES = query.Scope({}, frozenset())


@dataclass(frozen=True)
class Parents:
    """Runs of one stage that a gate waits for."""

    stage: str
    where: str | None = None  # a filter on their configs
    seed: int | None = None  # only those of this seed
    when: str | None = None  # a condition over them
    start: bool = False  # the run takes over the weights of one of them

    def shown(self) -> str:
        """In words: "lstm_5s5a (seed 3)"."""
        which = [*([self.where] if self.where else []), *([f"seed {self.seed}"] if self.seed is not None else [])]
        return self.stage + (f" ({', '.join(which)})" if which else "")


@dataclass(frozen=True)
class Gate:
    """What runs wait for, and what then."""

    after: tuple[Parents, ...]
    otherwise: str = "skip"
    on_failed: str = "skip"

    def shown(self) -> str:
        """In words, such as "lstm_5s5a: mean(val_score) >= 0.95"."""
        return "; ".join(p.shown() + (f": {p.when}" if p.when else "") for p in self.after)

    def to_json(self) -> str:
        """As the database holds it; equal exactly for equal gates."""
        parents = [{k: v for k, v in asdict(p).items() if v is not None and v is not False} for p in self.after]
        content = {"after": parents, "otherwise": self.otherwise, "on_failed": self.on_failed}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))


@functools.lru_cache(8192)  # idle workers ask for all that are undecided, again and again
def of_json(content: str) -> Gate:
    """A gate as the database holds it."""
    found = json.loads(content)
    parents = tuple(Parents(**parents) for parents in found.pop("after", ()))
    return Gate(parents, **found)


@dataclass(frozen=True)
class Look:
    """What a gate sees now. `decision` is None while a run that it waits for has not ended."""

    decision: str | None
    reason: str
    seen: Sequence[Mapping[str, Any]]  # for each of its parents: how many of how many are done, the values

    def to_json(self) -> str:
        """As the database holds it."""
        return json.dumps({"reason": self.reason, "parents": list(self.seen)}, sort_keys=True, allow_nan=False)


def ripe(connection: Connection, undecided: Mapping[int, Gate]) -> list[int]:
    """Those of many gates that may be decided on now; runs that several wait for are looked at once."""
    seeds: dict[tuple[str, str | None], set[int | None]] = {}
    for gate in undecided.values():
        for parents in gate.after:
            if (parents.stage, parents.where) not in seeds:
                seeds[parents.stage, parents.where] = _open_seeds(connection, parents)

    def is_open(parents: Parents) -> bool:
        found = seeds[parents.stage, parents.where]
        return bool(found) if parents.seed is None else parents.seed in found

    return [id for id, gate in undecided.items() if not any(is_open(parents) for parents in gate.after)]


def _open_seeds(connection: Connection, parents: Parents) -> set[int | None]:
    """The seeds of the runs that have not ended, of those that a gate waits for, whatever seed it asks for."""
    sql = """SELECT DISTINCT runs.seed FROM intakes JOIN runs ON runs.intake = intakes.id AND runs.stage = intakes.stage
             WHERE intakes.stage = :stage AND intakes.complete AND runs.state IN ('waiting', 'pending', 'running')"""
    params: dict[str, Any] = {"stage": parents.stage}
    found = set(connection.execute(text(sql), params).scalars())
    if parents.where is None or not found:
        return found
    try:
        sql += f" AND runs.id IN ({selected(connection, parents.stage, parents.where, params)})"
    except InputError:  # it asks for what is no longer there: to be said by whoever looks at the gate
        return set()
    return set(connection.execute(text(sql), params).scalars())


def look(connection: Connection, gate: Gate) -> Look:
    """Evaluate a gate on the runs as they are. One that asks for what is no longer there can never open."""
    try:
        seen = [_look_at(connection, parents) for parents in gate.after]
    except InputError as error:
        return Look(SHUT, f"it cannot be evaluated: {error.message}", ())
    return judged(gate, seen)


def judged(gate: Gate, seen: Sequence[Mapping[str, Any]]) -> Look:
    """What follows for a gate from what it sees of each of its parents."""
    left = [f"{one['parents']}: {one['open']} of {one['of']} not yet ended" for one in seen if one["open"]]
    if left:
        return Look(None, "; ".join(dict.fromkeys(left)), seen)  # one stage may be waited for twice
    reasons: dict[str, str] = {}
    for parents, one in zip(gate.after, seen, strict=True):
        reason = _against(gate, parents, one)
        if reason is not None:
            reasons.setdefault(parents.stage, reason)  # one for each stage: some of its runs say no more than all
    if reasons:
        return Look(SHUT, "; ".join(reasons.values()), seen)
    lets = [one["said"] for one in seen if one.get("said")]
    return Look(OPEN, "; ".join(lets) or "all runs that it waits for have ended", seen)


def _against(gate: Gate, parents: Parents, one: Mapping[str, Any]) -> str | None:
    """Why what a gate sees of some parents keeps it shut for good; None when it does not."""
    if one["of"] == 0:
        return f"there is no run of {parents.shown()}"
    if one["ended_badly"] and gate.on_failed == "skip":
        return f"{parents.shown()}: {one['ended_badly']}"
    if parents.start and not one["done"]:
        return f"no run of {parents.shown()} is done, whose weights it would start from"
    if parents.when is not None and not one["holds"] and gate.otherwise == "skip":
        return str(one["said"])
    return None


def _look_at(connection: Connection, parents: Parents) -> dict[str, Any]:
    """The runs that a gate waits for: how they stand, and the values of the condition."""
    members, params = _members(connection, parents)
    sql = f"SELECT g.state, count(*) AS n FROM runs AS g WHERE {members} GROUP BY g.state"
    states = {row.state: int(row.n) for row in connection.execute(text(sql), params)}
    found = counted(parents, states)
    if parents.when is not None and not found["open"]:
        found |= _verdict(connection, parents, members, params, found["done"], found["of"])
    return found


def counted(parents: Parents, states: Mapping[str, int]) -> dict[str, Any]:
    """How the runs that a gate waits for stand, by their number in each state."""
    still_open = sum(n for state, n in states.items() if state in query.OPEN)
    badly = [f"{n} {state}" for state, n in sorted(states.items()) if state not in (*query.OPEN, "done")]
    total = sum(states.values())
    found: dict[str, Any] = {"parents": parents.shown(), "of": total, "done": states.get("done", 0), "open": still_open}
    found["ended_badly"] = f"{', '.join(badly)} of {total}" if badly else ""
    return found


def _verdict(
    connection: Connection, parents: Parents, members: str, params: Mapping[str, Any], done: int, total: int
) -> dict[str, Any]:
    assert parents.when is not None
    verdict = query.over(parents.when, scope_of(connection, parents.stage), db.words(connection), members)
    marks = [f"{sql} AS v{place}" for place, sql in enumerate(verdict.values.values())]
    sql = f"SELECT {', '.join([f'CASE WHEN {verdict.sql} THEN 1 ELSE 0 END AS holds', *marks])}"
    row = connection.execute(text(sql), {**params, **verdict.params}).one()
    values = {name: None if row[i] is None else float(row[i]) for i, name in enumerate(verdict.values, start=1)}
    shown = ", ".join(f"{name} = {'null' if value is None else f'{value:.4g}'}" for name, value in values.items())
    count = f"n = {done}" if done == total else f"n = {done} of {total}"
    said = f"{parents.when} {'holds' if row.holds else 'does not hold'} of {parents.shown()}"
    return {
        "when": parents.when,
        "holds": bool(row.holds),
        "values": values,
        "said": f"{said}: {shown or 'runs'} ({count})",
    }


def _members(connection: Connection, parents: Parents) -> tuple[str, dict[str, Any]]:
    """The runs that a gate waits for, as SQL over the alias g."""
    sql = """g.stage = :of_stage
             AND g.intake IN (SELECT id FROM intakes WHERE intakes.stage = :of_stage AND intakes.complete)"""
    params: dict[str, Any] = {"of_stage": parents.stage}
    if parents.seed is not None:
        sql += " AND g.seed = :of_seed"
        params["of_seed"] = parents.seed
    if parents.where is not None:
        sql += f" AND g.id IN ({selected(connection, parents.stage, parents.where, params)})"
    return sql, params


def selected(connection: Connection, stage: str, where: str, params: dict[str, Any]) -> str:
    """The ids of the runs of a stage that a filter selects, as SQL; its parameters are added to `params`."""
    condition = query.compile(where, scope_of(connection, stage), db.words(connection))
    # names of their own: the condition over the runs has q0, q1, ... too
    sql = condition.sql
    for name in sorted(condition.params, key=len, reverse=True):
        sql = sql.replace(f":{name}", f":where_{name}")
    params |= {f"where_{name}": value for name, value in condition.params.items()} | {"of_stage": stage}
    return f"SELECT runs.id FROM runs WHERE runs.stage = :of_stage AND ({sql})"


def scope_of(connection: Connection, stage: str) -> query.Scope:
    """The names that a condition on the runs of a stage may use."""
    row = connection.execute(text("SELECT fields, metrics FROM stages WHERE name = :stage"), {"stage": stage}).first()
    return NO_NAMES if row is None else scope(json.loads(row.fields), json.loads(row.metrics))


def scope(names: Mapping[str, str], metrics: Iterable[Mapping[str, Any]]) -> query.Scope:
    """The names of config fields and metrics, as a stage stores them."""
    fields, aliases = query.parted(names)
    found = frozenset(str(metric["name"]) for metric in metrics)
    return query.Scope(fields, found, {name: (of,) for name, of in aliases.items()})


# --------------------------------------------------------------------------------------- checked before it is kept


@dataclass(frozen=True)
class Known:
    """A stage that a gate may name: the names of its fields and metrics, and what it waits for in turn."""

    scope: query.Scope
    seeds: frozenset[int | None]
    after: frozenset[str]


def known(connection: Connection) -> dict[str, Known]:
    """The stages of the database."""
    after: dict[str, set[str]] = {}
    sql = """SELECT stage, condition FROM gates WHERE EXISTS (
                 SELECT 1 FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
                 WHERE runs.gate = gates.id)"""
    for row in connection.execute(text(sql)):
        after.setdefault(row.stage, set()).update(parents.stage for parents in of_json(row.condition).after)
    sql = """SELECT DISTINCT runs.stage, runs.seed FROM runs
             JOIN intakes ON intakes.id = runs.intake AND intakes.complete"""
    seeds: dict[str, set[int | None]] = {}
    for row in connection.execute(text(sql)):
        seeds.setdefault(row.stage, set()).add(row.seed)
    return {
        stage: Known(scope_of(connection, stage), frozenset(of), frozenset(after.get(stage, ())))
        for stage, of in seeds.items()
    }


def problems(stage: str, gates: Iterable[Gate], stages: Mapping[str, Known]) -> list[str]:
    """What is wrong with the gates of a stage, each sentence once."""
    found: dict[str, None] = {}
    seen: set[tuple[str, str | None, str | None]] = set()
    for gate in gates:
        for parents in gate.after:
            sentences = _wrong_seed(parents, stages.get(parents.stage))
            asked = parents.stage, parents.where, parents.when
            if asked not in seen:  # once for all seeds
                seen.add(asked)
                sentences += _problems_of(parents, stages)
            found |= dict.fromkeys(f"stage {stage}: {sentence}" for sentence in sentences)
    return list(found)


def _wrong_seed(parents: Parents, known: Known | None) -> list[str]:
    if known is None or parents.seed is None or parents.seed in known.seeds:
        return []
    return [f"waits for the run of {parents.stage} with seed {parents.seed}, and there is none"]


def _problems_of(parents: Parents, stages: Mapping[str, Known]) -> list[str]:
    known = stages.get(parents.stage)
    if known is None:
        hint = nearest(parents.stage, stages) if stages else ""
        return [f"waits for {parents.stage}, which is no stage{f' ({hint})' if hint else ''}"]
    found = []
    try:
        if parents.where is not None:
            query.compile(parents.where, known.scope)
            found += [
                f"where={parents.where!r} asks for {name}, which changes as a run goes on: only for config fields"
                for name in sorted(known.scope.metrics | _CHANGING)
                if query.mentions(parents.where, name) and name not in known.scope.fields
            ]
        if parents.when is not None:
            query.over(parents.when, known.scope, OF["sqlite"], "1 = 1")
    except InputError as error:
        hint = f" ({error.hint})" if error.hint else ""
        found += [f"waits for {parents.stage}: {problem}{hint}" for problem in error.problems]
    return found


# what a filter may name that is not settled when a run is made
_CHANGING = frozenset(query.COLUMNS) - {"id", "stage", "family", "label", "fingerprint", "group_key", "seed", "budget"}


def cycle(stages: Mapping[str, Iterable[str]]) -> list[str]:
    """Stages that wait for each other in a ring, the first one again at the end; empty when there is none."""
    done: set[str] = set()
    for first in stages:
        path: list[str] = []
        found = _ring(first, stages, path, done)
        if found:
            return found
    return []


def _ring(stage: str, stages: Mapping[str, Iterable[str]], path: list[str], done: set[str]) -> list[str]:
    if stage in path:
        return [*path[path.index(stage) :], stage]
    if stage in done:
        return []
    path.append(stage)
    for parent in stages.get(stage, ()):
        found = _ring(parent, stages, path, done)
        if found:
            return found
    path.pop()
    done.add(stage)
    return []
