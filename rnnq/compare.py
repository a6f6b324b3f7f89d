"""What stages descend from, and in what two runs differ. Text SQL alone, so that it answers at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import db, definitions, runs
from rnnq.errors import InputError
from rnnq.query import STATES

SPEED = "steps_per_s"  # in a summary: of the machine, not of the run

Row = Mapping[str, Any]
Points = Sequence[tuple[int, float | None]]  # step, value; None: it was not finite


# -------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class StageRow:
    """One stage, and where it stands in the tree of stages."""

    stage: str
    family: str
    depth: int  # 0: it descends from none
    parents: dict[str, int]  # stage -> how many of its runs are parents, the most first; it stands under the first
    counts: dict[str, int]
    paused: bool
    made: str  # local time, ISO 8601
    source: str | None  # the definition file, below the definitions' folder
    source_state: str | None  # as it was, changed, missing
    source_sha256: str | None
    defined_as: str | None  # its name in the definition file, where it was given another
    command_line: str

    @property
    def total(self) -> int:
        """All runs of the stage."""
        return sum(self.counts.values())


def stages(engine: Engine, defs: Path) -> list[StageRow]:
    """Every stage; one that descends from another comes below it. Siblings stand in the order they were made in."""
    sql = """SELECT name, family, source, source_sha256, command_line, paused, created_at, defined_as FROM stages
             WHERE EXISTS (SELECT 1 FROM intakes WHERE intakes.stage = stages.name AND complete)
             ORDER BY created_at, name"""
    with db.reading(engine) as connection:
        rows = {row.name: row for row in connection.execute(text(sql))}
        counts = _counts(connection)
        parents = _parents(connection)
    older: dict[str, list[str]] = {}  # each with its parents that were made before it: so the tree has no circle
    for name in rows:
        older[name] = [parent for parent in parents.get(name, {}) if parent in older]
    hashes: dict[str, str | None] = {}
    return [
        StageRow(
            stage=name,
            family=rows[name].family,
            depth=depth,
            parents={parent: n for parent, n in parents.get(name, {}).items() if parent in rows},
            counts={state: counts[name][state] for state in STATES if state in counts.get(name, {})},
            paused=bool(rows[name].paused),
            made=_iso(rows[name].created_at),
            source=rows[name].source,
            source_state=_source_state(rows[name].source, rows[name].source_sha256, defs, hashes),
            source_sha256=rows[name].source_sha256,
            defined_as=rows[name].defined_as,
            command_line=rows[name].command_line,
        )
        for name, depth in _tree(older)
    ]


def _counts(connection: Connection) -> dict[str, dict[str, int]]:
    # grouped in the order of the covering index, so that nothing is sorted
    sql = """SELECT stage, state, count(*) AS n FROM runs WHERE intake IN (SELECT id FROM intakes WHERE complete)
             GROUP BY intake, stage, state"""
    found: dict[str, dict[str, int]] = {}
    for row in connection.execute(text(sql)):
        of = found.setdefault(row.stage, {})
        of[row.state] = of.get(row.state, 0) + row.n
    return found


def _parents(connection: Connection) -> dict[str, dict[str, int]]:
    """Of each stage the stages that its runs descend from, and how many runs of theirs; the most first."""
    sql = """SELECT child.stage AS child, parent.stage AS parent, count(DISTINCT lineage.parent) AS n
             FROM lineage JOIN runs AS child ON child.id = lineage.child
             JOIN runs AS parent ON parent.id = lineage.parent
             WHERE child.stage <> parent.stage GROUP BY child.stage, parent.stage ORDER BY n DESC, parent.stage"""
    found: dict[str, dict[str, int]] = {}
    for row in connection.execute(text(sql)):
        found.setdefault(row.child, {})[row.parent] = row.n
    return found


def _tree(parents: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(stage, depth), each below the first of its parents. Parents stand before their children in the mapping."""
    children: dict[str | None, list[str]] = {}
    for name, above in parents.items():
        children.setdefault(above[0] if above else None, []).append(name)
    found = []
    waiting = [(name, 0) for name in reversed(children.get(None, []))]
    while waiting:
        name, depth = waiting.pop()
        found.append((name, depth))
        waiting += [(child, depth + 1) for child in reversed(children.get(name, []))]
    return found


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(moment))


def _source_state(source: str | None, sha256: str | None, defs: Path, hashes: dict[str, str | None]) -> str | None:
    if source is None:
        return None
    if source not in hashes:
        hashes[source] = _hash(source, defs)
    if hashes[source] is None:
        return "missing"
    return "as it was" if hashes[source] == sha256 else "changed"


def _hash(source: str, defs: Path) -> str | None:
    try:
        path = definitions.resolve_source(source, defs)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except (InputError, OSError):
        return None


# -------------------------------------------------------------------------------------------------- two runs


@dataclass(frozen=True)
class Curves:
    """One metric of two runs, step by step. Steps and differences are None when there is none."""

    points: tuple[int, int]  # how many each run has
    common: int  # steps that both have
    first: int | None  # the first step of both at which they differ
    largest: float | None  # the largest difference at a step of both, second minus first
    at: int | None  # its step

    @property
    def same(self) -> bool:
        """Equal to the bit, at the same steps."""
        return self.points == (self.common, self.common) and self.first is None


@dataclass(frozen=True)
class Difference:
    """In what two runs differ. Each pair is the first run's value and the second's; None where it has none."""

    runs: tuple[dict[str, Any], dict[str, Any]]  # run, stage, label, state, step, attempt
    config: dict[str, tuple[Any, Any]]
    definition: dict[str, tuple[Any, Any]]  # the file and its hash
    attempt: dict[str, tuple[Any, Any]]  # of the last attempts: git, device, versions, numerics
    summary: dict[str, tuple[Any, Any]]
    curves: dict[str, Curves] = field(default_factory=dict)  # every metric, also those that are equal
    metrics: int = 0  # in either summary

    @property
    def identical(self) -> bool:
        """Whether there are results, equal to the bit: all curves, and all of the summary but the speed."""
        equal = all(curve.same for curve in self.curves.values()) and not self.summary.keys() - {SPEED}
        return equal and bool(self.curves or self.metrics)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers of a summary with their difference."""
        curves = {name: {"same": curve.same, **asdict(curve)} for name, curve in self.curves.items()}
        summary = {name: {"values": pair, "difference": minus(*pair)} for name, pair in self.summary.items()}
        return {**asdict(self), "summary": summary, "curves": curves, "identical": self.identical}


def diff(engine: Engine, first: int, second: int) -> Difference:
    """In what two runs differ. Raises InputError for one run twice, and for runs that are not there."""
    if first == second:
        raise InputError(f"run {first} and run {second} are one and the same", "name two runs")
    a, b = _both(engine, first, second)
    last_a, last_b = (row["attempts"][-1] if row["attempts"] else {} for row in (a, b))
    summaries = a["summary"] or {}, b["summary"] or {}
    names = sorted({*a["curves"], *b["curves"]})
    return Difference(
        runs=(_head(a), _head(b)),
        config=_unequal(_flat(a["config"]), _flat(b["config"])),
        definition=_unequal(_definition(a, last_a), _definition(b, last_b)),
        attempt=_unequal(_provenance(last_a), _provenance(last_b)),
        summary=_unequal(*summaries),
        curves={name: _compared(a["curves"].get(name, ()), b["curves"].get(name, ())) for name in names},
        metrics=len({*summaries[0], *summaries[1]}),
    )


def _both(engine: Engine, *ids: int) -> list[dict[str, Any]]:
    found, problems = [], []
    for run in ids:
        try:
            found.append(runs.show(engine, run))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems, "`rnnq ls` lists them")
    return found


def _head(row: Row) -> dict[str, Any]:
    same = {name: row[name] for name in ("stage", "label", "state", "attempt")}
    return {"run": row["id"], **same, "step": row["steps_done"]}


def _definition(row: Row, attempt: Row) -> dict[str, Any]:
    return {
        "family": row["family"],
        "file": row["source"],
        "sha256": attempt.get("source_sha256") or row["source_sha256"],
    }


def _provenance(attempt: Row) -> dict[str, Any]:
    """What an attempt's bits may depend on. Its numerics repeat the hash of the definition."""
    same = {name: attempt.get(name) for name in ("git_commit", "git_dirty", "device", "exact") if name in attempt}
    numerics = {name: value for name, value in (attempt.get("numerics") or {}).items() if name != "definition"}
    return same | _flat({"versions": attempt.get("versions") or {}, "numerics": numerics})


def _flat(values: Row, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _unequal(a: Row, b: Row) -> dict[str, tuple[Any, Any]]:
    """The names whose values differ; 1 and 1.0 are one, 1 and True are two."""
    names = dict.fromkeys([*a, *b])
    pairs = {name: (a.get(name), b.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or _is_bool(pair[0]) != _is_bool(pair[1])}


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def minus(a: Any, b: Any) -> float | None:
    """Second minus first, of two numbers."""
    numbers = all(isinstance(value, (int, float)) and not _is_bool(value) for value in (a, b))
    return b - a if numbers else None


def _compared(a: Points, b: Points) -> Curves:
    first, second = dict(a), dict(b)
    common = [step for step in first if step in second]
    unequal = [step for step in common if first[step] != second[step]]
    differences = {step: minus(first[step], second[step]) for step in unequal}
    sizes = {step: abs(value) for step, value in differences.items() if value is not None}
    at = max(sizes, key=lambda step: sizes[step], default=None)
    return Curves(
        points=(len(first), len(second)),
        common=len(common),
        first=min(unequal, default=None),
        largest=None if at is None else differences[at],
        at=at,
    )
