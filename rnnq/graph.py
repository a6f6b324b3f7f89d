"""A study as a graph: its stages, the gates between them, how these were decided, what it has cost and will cost.

Read from rows, or foretold from definitions before there are any. Nothing is changed here: what `queue.redecide` would
take back is called stale.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import costs, db, gates
from rnnq.costs import Costs, Left, Spent
from rnnq.gates import Gate, Look
from rnnq.query import STATES
from rnnq.queue import NewRun, NewStage

Row = dict[str, Any]
HoursOf = Callable[[Mapping[str, Any]], float]  # of a run with such a config
Hours = Mapping[str, HoursOf]  # by stage
_TELLING = ("running", "pending", "waiting", "failed", "done", "skipped", "cancelled")


# ----------------------------------------------------------------------------------------------------------- arrows


@dataclass(frozen=True)
class Arrow:
    """What the runs of a stage wait for: runs of another one."""

    stage: str
    where: str | None = None
    same_seed: bool = False  # each waits only for those of its own seed
    when: str | None = None
    start: bool = False  # they take over the weights of one of them

    def shown(self) -> str:
        """In words: "lstm_5s5a (same seed): mean(val_score) >= 0.95"."""
        which = [*([self.where] if self.where else []), *(["same seed"] if self.same_seed else [])]
        return self.stage + (f" ({', '.join(which)})" if which else "") + (f": {self.when}" if self.when else "")


def arrows_of(found: Iterable[Gate]) -> tuple[Arrow, ...]:
    """What several gates of one stage wait for, those told apart by their seed once. A stage that runs both wait for
    and start from is one arrow: it is the second that matters."""
    made: dict[Arrow, None] = {}
    for gate in found:
        for of in gate.after:
            made[_arrow(of)] = None
    started = {arrow.stage for arrow in made if arrow.start}
    plain = [arrow for arrow in made if not (arrow.stage in started and arrow == Arrow(arrow.stage))]
    return tuple(plain)


def _arrow(of: gates.Parents) -> Arrow:
    return Arrow(of.stage, of.where, of.seed is not None, of.when, of.start)


@dataclass(frozen=True)
class Standing:
    """A gate as it stands: how it was decided and on what, and what it would be today."""

    condition: str  # in words
    seed: int | None  # the one seed whose runs it waits for, if there is one
    decision: str | None  # open, shut; None: not decided yet
    reason: str  # of the decision; of one not taken, what it waits for
    seen: Sequence[Mapping[str, Any]]  # for each of its parents: n of N, the values; of the decision, or of today
    parents: tuple[Arrow, ...]  # these
    runs: Mapping[str, int]  # those behind it, by state
    stale: str | None = None  # where the decision would be another today: which, and why
    movable: int = 0  # runs that `rnnq plan --redecide` would take back


# ----------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Node:
    """A stage of the graph. Costs are in seconds of a worker."""

    stage: str
    family: str
    phase: str | None
    depth: int  # stages that come before it, one behind the other
    priority: tuple[int, int]  # the lowest and the highest of its runs
    runs: Mapping[str, int]  # by state
    paused: bool
    after: tuple[Arrow, ...]
    otherwise: str
    on_failed: str
    gates: tuple[Standing, ...]
    skipped: Mapping[str, int]  # why, and how many runs
    start_from: str | None  # in words
    started: tuple[tuple[int, int], ...]  # (run, the run whose weights it took over), by id
    spent: Spent
    to_go_s: float  # of pending and running runs, as far as it is known
    waiting_s: float  # of waiting runs, should they all be let go on
    unknown: int  # open runs of which nothing is known
    basis: tuple[str, ...]  # what the expectation rests on

    @property
    def total(self) -> int:
        """All runs of the stage."""
        return sum(self.runs.values())

    @property
    def state(self) -> str:
        """The state that says most of the stage: what goes on in it, then what went wrong, then how it ended."""
        return next((state for state in _TELLING if self.runs.get(state)), "done")

    def seen_of(self, arrow: Arrow) -> list[Mapping[str, Any]]:
        """What the gates have seen, or see, of those runs: one entry, or one for each seed."""
        pairs = [pair for gate in self.gates for pair in zip(gate.parents, gate.seen, strict=False)]
        return list({str(one["parents"]): one for of, one in pairs if of == arrow}.values())

    @property
    def stale(self) -> list[Standing]:
        """Gates that would be decided in another way today."""
        return [gate for gate in self.gates if gate.stale]

    def as_row(self) -> Row:
        """For JSON and CSV; costs in hours."""
        return {
            "stage": self.stage,
            "family": self.family,
            "phase": self.phase,
            "depth": self.depth,
            "priority": self.priority[1],
            "runs": self.total,
            **{state: self.runs.get(state, 0) for state in STATES},
            "paused": self.paused,
            "after": [asdict(arrow) for arrow in self.after],
            "otherwise": self.otherwise,
            "on_failed": self.on_failed,
            "gates": [asdict(gate) for gate in self.gates],
            "stale": len(self.stale),
            "skipped_because": dict(self.skipped),
            "start_from": self.start_from,
            "started": [list(pair) for pair in self.started],
            **cost_row([self]),
            "basis": list(self.basis),
        }


def cost_row(nodes: Iterable[Node]) -> Row:
    """What some stages have cost and will cost, in hours of a worker."""
    found = list(nodes)
    return {
        "cost_h": sum(node.spent.seconds for node in found) / 3600,
        "lost_h": sum(node.spent.lost for node in found) / 3600,
        "to_go_h": sum(node.to_go_s for node in found) / 3600,
        "waiting_h": sum(node.waiting_s for node in found) / 3600,
        "unknown_runs": sum(node.unknown for node in found),
    }


@dataclass(frozen=True)
class Graph:
    """The stages in the order in which they can be trained: what others wait for before these, then by priority."""

    nodes: tuple[Node, ...]
    devices: tuple[str, ...] = ()  # that speeds were measured on

    def gates(self) -> dict[tuple[str, str], Standing]:
        """The gates, by the stage that is behind each and its condition."""
        return {(node.stage, gate.condition): gate for node in self.nodes for gate in node.gates}

    def phases(self) -> list[tuple[str | None, list[Node]]]:
        """The nodes by phase, in the order of the first stage of each."""
        return by_phase(self.nodes)


def by_phase(nodes: Sequence[Any]) -> list[tuple[str | None, list[Any]]]:
    """Stages by phase: the phases in the order in which their first stage comes."""
    found: dict[str | None, list[Any]] = {}
    for node in nodes:
        found.setdefault(node.phase, []).append(node)
    return list(found.items())


def in_order(stages: Mapping[str, tuple[int, Iterable[str]]]) -> list[str]:
    """Stages, each with its priority and what it waits for, in the order in which a worker would come to them."""
    children: dict[str, list[str]] = {}
    lacking: dict[str, int] = {}
    for name, (_, parents) in stages.items():
        known = {parent for parent in parents if parent in stages and parent != name}
        lacking[name] = len(known)
        for parent in known:
            children.setdefault(parent, []).append(name)
    place = {name: i for i, name in enumerate(stages)}
    ready = [(-stages[name][0], place[name], name) for name, n in lacking.items() if n == 0]
    heapq.heapify(ready)
    found: list[str] = []
    while ready:
        name = heapq.heappop(ready)[2]
        found.append(name)
        for child in children.get(name, ()):
            lacking[child] -= 1
            if lacking[child] == 0:
                heapq.heappush(ready, (-stages[child][0], place[child], child))
    seen = set(found)
    return found + [name for name in stages if name not in seen]  # a ring, which init refuses


def depths(order: Iterable[str], parents: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """How many stages come before each, one behind the other."""
    found: dict[str, int] = {}
    for name in order:
        found[name] = 1 + max((found[parent] for parent in parents.get(name, ()) if parent in found), default=-1)
    return found


# --------------------------------------------------------------------------------------------------------- from rows


_STAGES = """SELECT stages.name, stages.family, stages.phase, stages.paused, min(intakes.id) AS first
             FROM stages JOIN intakes ON intakes.stage = stages.name AND intakes.complete
             GROUP BY stages.name, stages.family, stages.phase, stages.paused ORDER BY first"""
_RUNS = """SELECT runs.stage, runs.state, count(*) AS n, min(priority) AS low, max(priority) AS high
           FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete GROUP BY runs.stage, runs.state"""
_GATES = """SELECT id, stage, condition, decision, seen FROM gates
            WHERE EXISTS (SELECT 1 FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
                          WHERE runs.gate = gates.id) ORDER BY id"""
_BEHIND = """SELECT runs.gate, runs.state, runs.attempt > 0 OR runs.wake_at IS NOT NULL AS begun, count(*) AS n
             FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
             WHERE runs.gate IS NOT NULL GROUP BY runs.gate, runs.state, begun"""
_BY_SEED = """SELECT runs.stage, runs.seed, runs.state, count(*) AS n
              FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
              GROUP BY runs.stage, runs.seed, runs.state"""
_SKIPPED = """SELECT runs.stage, runs.message, count(*) AS n
              FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
              WHERE runs.state = 'skipped' GROUP BY runs.stage, runs.message ORDER BY n DESC, runs.message"""
_STARTS = """SELECT DISTINCT stage, start_from FROM runs WHERE start_from IS NOT NULL"""
_STARTED = """SELECT child.stage, lineage.child, lineage.parent
              FROM lineage JOIN runs AS child ON child.id = lineage.child AND child.start_from IS NOT NULL
              WHERE lineage.kind IN ('continue', 'probe') ORDER BY lineage.child"""


def read(engine: Engine, hours: Hours = MappingProxyType({})) -> Graph:
    """The graph of all stages of a database.

    hours  of a run with such a config, by stage, as definitions state it; used where nothing like it was measured
    """
    with db.reading(engine) as connection:
        found = costs.read(connection)
        rows = {row.name: row for row in connection.execute(text(_STAGES))}
        asked = _Asked(connection)
        priorities = asked.priorities()
        parents = {name: [arrow.stage for arrow in asked.arrows(name)] for name in rows}
        order = in_order({name: (priorities.get(name, (0, 0))[1], parents[name]) for name in rows})
        depth = depths(order, parents)
        left = _left(connection, found, hours)
        nodes = tuple(_node(rows[name], depth[name], asked, found, left.get(name, _Left())) for name in order)
    return Graph(nodes, tuple(found.devices))


@dataclass
class _Left:
    to_go: float = 0.0
    waiting: float = 0.0
    unknown: int = 0
    basis: dict[str, None] = field(default_factory=dict)


def _left(connection: Connection, found: Costs, hours: Hours) -> dict[str, _Left]:
    made: dict[str, _Left] = {}
    for state, left in costs.open_runs(connection):
        of = made.setdefault(left.stage, _Left())
        expected = found.expect(left, _stated(left, hours.get(left.stage)))
        of.basis[expected.basis] = None
        if expected.seconds is None:
            of.unknown += left.runs
        elif state == "waiting":
            of.waiting += expected.seconds
        else:
            of.to_go += expected.seconds
    return made


def _stated(left: Left, hours: HoursOf | None) -> Callable[[], float | None]:
    """What the stage says that these runs take: seconds."""
    return lambda: None if hours is None else hours(left.config()) * 3600 * left.runs


def _node(row: Any, depth: int, asked: _Asked, found: Costs, left: _Left) -> Node:
    name = row.name
    after = asked.arrows(name)
    rules = asked.rules(name)
    return Node(
        stage=name,
        family=row.family,
        phase=row.phase,
        depth=depth,
        priority=asked.priorities().get(name, (0, 0)),
        runs=asked.counts(name),
        paused=bool(row.paused),
        after=after,
        otherwise=rules[0],
        on_failed=rules[1],
        gates=tuple(asked.standing(name)),
        skipped=asked.skipped.get(name, {}),
        start_from=asked.starts.get(name),
        started=tuple(asked.started.get(name, ())),
        spent=found.spent.get(name, Spent()),
        to_go_s=left.to_go,
        waiting_s=left.waiting,
        unknown=left.unknown,
        basis=tuple(left.basis),
    )


class _Asked:
    """What the rows say of all stages, each question asked once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._runs = connection.execute(text(_RUNS)).all()
        self._gates: dict[str, list[tuple[Any, Gate]]] = {}
        for row in connection.execute(text(_GATES)):
            self._gates.setdefault(row.stage, []).append((row, gates.of_json(row.condition)))
        self._behind: dict[int, list[Any]] = {}
        for row in connection.execute(text(_BEHIND)):
            self._behind.setdefault(row.gate, []).append(row)
        self._looks: dict[str, Look] = {}  # by condition: stages may share one
        self._by_seed: dict[tuple[str, int | None], Counter[str]] | None = None  # None: of all seeds
        self.skipped: dict[str, dict[str, int]] = {}
        for row in connection.execute(text(_SKIPPED)):
            self.skipped.setdefault(row.stage, {})[row.message or "no reason is on record"] = int(row.n)
        self.starts = {row.stage: start_words(json.loads(row.start_from)) for row in connection.execute(text(_STARTS))}
        self.started: dict[str, list[tuple[int, int]]] = {}
        for row in connection.execute(text(_STARTED)):
            self.started.setdefault(row.stage, []).append((row.child, row.parent))

    def counts(self, stage: str) -> dict[str, int]:
        found = {row.state: int(row.n) for row in self._runs if row.stage == stage}
        return {state: found[state] for state in STATES if state in found}

    def priorities(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for row in self._runs:
            low, high = found.get(row.stage, (row.low, row.high))
            found[row.stage] = (min(low, row.low), max(high, row.high))
        return found

    def arrows(self, stage: str) -> tuple[Arrow, ...]:
        return arrows_of(gate for row, gate in self._gates.get(stage, ()) if row.id in self._behind)

    def rules(self, stage: str) -> tuple[str, str]:
        return next(((gate.otherwise, gate.on_failed) for _, gate in self._gates.get(stage, ())), ("skip", "skip"))

    def standing(self, stage: str) -> Iterable[Standing]:
        for row, gate in self._gates.get(stage, ()):
            behind = self._behind.get(row.id)
            if behind:
                yield _standing(row, gate, behind, self._look(row.condition, gate))

    def _look(self, condition: str, gate: Gate) -> Look:
        if condition not in self._looks:
            plain = all(of.where is None and of.when is None for of in gate.after)
            self._looks[condition] = self._quick_look(gate) if plain else gates.look(self._connection, gate)
        return self._looks[condition]

    def _quick_look(self, gate: Gate) -> Look:
        """Of a gate without conditions: a stage may have one for each seed, and all are counted at once."""
        if self._by_seed is None:
            self._by_seed = {}
            for row in self._connection.execute(text(_BY_SEED)):
                for key in {(row.stage, row.seed), (row.stage, None)}:
                    states = self._by_seed.setdefault(key, Counter())
                    states[row.state] += int(row.n)
        nothing: Counter[str] = Counter()
        return gates.judged(
            gate, [gates.counted(of, self._by_seed.get((of.stage, of.seed), nothing)) for of in gate.after]
        )


def _standing(row: Any, gate: Gate, behind: Sequence[Any], now: Look) -> Standing:
    runs: Counter[str] = Counter()
    for one in behind:
        runs[one.state] += int(one.n)
    seeds = {of.seed for of in gate.after if of.seed is not None}
    seed = seeds.pop() if len(seeds) == 1 else None
    parents = tuple(map(_arrow, gate.after))
    if row.decision is None:
        return Standing(gate.shown(), seed, None, _not_yet(now), now.seen, parents, dict(runs))
    was = json.loads(row.seen or "{}")
    stale, movable = None, 0
    if now.decision != row.decision:
        # as queue.redecide has it: runs that have begun, or that a person has retried, stay as they are
        back = "skipped" if row.decision == gates.SHUT else "pending"
        movable = sum(int(one.n) for one in behind if one.state == back and not one.begun)
        stale = f"today it would be {now.decision or 'undecided'}: {now.reason}"
    reason, seen = was.get("reason", ""), was.get("parents", ())
    return Standing(gate.shown(), seed, row.decision, reason, seen, parents, dict(runs), stale, movable)


def _not_yet(now: Look) -> str:
    return now.reason if now.decision is None else f"{now.reason} (to be decided by the next worker that looks)"


def start_words(spec: Mapping[str, Any]) -> str:
    """What runs start from: "the best checkpoint of lstm_5s5a, same seed"."""
    which = [*([spec["where"]] if spec.get("where") else []), *(["same seed"] if spec.get("same_seed") else [])]
    return ", ".join([f"the {spec.get('which', 'best')} checkpoint of {spec['stage']}", *which])


# ----------------------------------------------------------------------------------------------------- one run's gate


def gate_of(engine: Engine, run: int) -> Standing | None:
    """The gate that a run waits behind, or did, as it stands; None for a run that has none."""
    sql = """SELECT gates.id, gates.condition, gates.decision, gates.seen FROM runs JOIN gates ON gates.id = runs.gate
             WHERE runs.id = :run"""
    behind = f"{_BEHIND.partition(' GROUP BY')[0]} AND runs.gate = :gate GROUP BY runs.gate, runs.state, begun"
    with db.reading(engine) as connection:
        row = connection.execute(text(sql), {"run": run}).one_or_none()
        if row is None:
            return None
        gate = gates.of_json(row.condition)
        rows = connection.execute(text(behind), {"gate": row.id}).all()
        return _standing(row, gate, rows, gates.look(connection, gate))


def gate_row(engine: Engine, run: int) -> Row | None:
    """As `gate_of`, as plain values."""
    found = gate_of(engine, run)
    return None if found is None else asdict(found)


# ---------------------------------------------------------------------------------------------- before there are rows


@dataclass(frozen=True)
class Foreseen:
    """A stage of definitions, as it will be trained."""

    stage: str
    family: str
    phase: str | None
    depth: int
    priority: int
    runs: int
    steps: int | None  # None: only the family's code knows
    seconds: float | None  # of a worker, for the runs of which something is known; None where it is of none
    unknown: int  # runs of which nothing is known
    basis: tuple[str, ...]
    after: tuple[Arrow, ...]
    condition: str | None  # what must hold that its runs are trained; None: they are, whatever happens

    def as_row(self) -> Row:
        """For JSON and CSV."""
        row = asdict(self)
        seconds = row.pop("seconds")
        return row | {"hours": None if seconds is None else seconds / 3600, "certain": self.condition is None}


def foresee(
    stages: Sequence[NewStage],
    known: Costs,
    hours: Hours,
) -> list[Foreseen]:
    """Stages of definitions in the order in which they will be trained: by their gates, then by priority.

    hours  of a run with such a config, as the stage states it; used where nothing like it was measured
    """
    found = {stage.name: arrows_of(_gates_of(stage)) for stage in stages}
    parents = {name: [arrow.stage for arrow in after] for name, after in found.items()}
    named = {stage.name: stage for stage in stages}
    order = in_order({stage.name: (_priority(stage), parents[stage.name]) for stage in stages})
    depth = depths(order, parents)
    made: dict[str, Foreseen] = {}
    for name in order:
        stage = named[name]
        made[name] = _foreseen(stage, depth[name], found[name], known, hours.get(name), made)
    return list(made.values())


def _gates_of(stage: NewStage) -> list[Gate]:
    return [gates.of_json(content) for content in dict.fromkeys(run.gate for run in stage.runs) if content]


def _priority(stage: NewStage) -> int:
    return max((run.priority for run in stage.runs), default=0)


def _foreseen(
    stage: NewStage,
    depth: int,
    after: tuple[Arrow, ...],
    known: Costs,
    hours: HoursOf | None,
    before: Mapping[str, Foreseen],
) -> Foreseen:
    seconds, unknown, basis = 0.0, 0, dict[str, None]()
    for run in stage.runs:
        left = _left_of(stage, run)
        expected = known.expect(left, _stated(left, hours))
        basis[expected.basis] = None
        seconds += expected.seconds or 0.0
        unknown += expected.seconds is None
    budgets = [run.budget for run in stage.runs]
    steps = None if None in budgets else sum(budget or 0 for budget in budgets)
    shown = None if unknown == len(stage.runs) else seconds
    who = (stage.name, stage.family, stage.phase, depth, _priority(stage))
    condition = _condition(_gates_of(stage), before)
    return Foreseen(*who, len(stage.runs), steps, shown, unknown, tuple(basis), after, condition)


def _left_of(stage: NewStage, run: NewRun) -> Left:
    def config() -> Mapping[str, Any]:
        return dict(json.loads(run.config))

    return Left(stage.name, stage.family, run.group_key, run.pack_key, 1, run.budget, config)


def _condition(found: Iterable[Gate], before: Mapping[str, Foreseen]) -> str | None:
    """What must hold that the runs behind some gates are trained, apart from what goes wrong on the way."""
    needed: dict[str, None] = {}
    for gate in found:
        for of in gate.after:
            if of.when is not None and gate.otherwise == "skip":
                needed[f"{of.stage}: {of.when}"] = None
            parent = before.get(of.stage)
            if parent is not None and parent.condition is not None and (gate.on_failed == "skip" or of.start):
                needed[f"{of.stage} is trained"] = None
    # that a stage holds a condition says that it was trained
    also = [one for one in needed if not (one.endswith(" is trained") and _is_said(one, needed))]
    return " and ".join(also) or None


def _is_said(trained: str, needed: Iterable[str]) -> bool:
    stage = trained.removesuffix(" is trained")
    return any(other.startswith(f"{stage}: ") for other in needed)


def totals(foreseen: Sequence[Foreseen]) -> dict[str, Row]:
    """Runs, steps and hours of the stages that are certain, and of all: as if every condition held."""
    return {
        "certain": _total([stage for stage in foreseen if stage.condition is None]),
        "all": _total(foreseen),
    }


def _total(foreseen: Sequence[Foreseen]) -> Row:
    return {
        "stages": len(foreseen),
        "runs": sum(stage.runs for stage in foreseen),
        "steps": sum(stage.steps or 0 for stage in foreseen),
        "hours": sum(stage.seconds or 0.0 for stage in foreseen) / 3600,
        "unknown_runs": sum(stage.unknown for stage in foreseen),
    }
