"""What runs have cost, in seconds of a worker, and what others will: learnt from those that were trained.

Runs of a pack share the time of their worker: each bears its part, so that the sum over runs is the time for which
workers were busy. A lost attempt counts until the last heartbeat of its worker, not until somebody missed it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from rnnq import db

LIKE = 1000  # groups of a family that an unlike run is compared with: the newest


@dataclass(frozen=True)
class Spent:
    """What the attempts of a stage have cost so far: seconds of a worker, and how many of them in lost attempts."""

    seconds: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True)
class Expected:
    """What so many open runs are expected to cost together, and what that rests on; None: nothing is known."""

    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Left:
    """Open runs of one group that are to be reckoned: `runs` of them, with `steps` left in all (None: unknown)."""

    stage: str
    family: str
    group: str
    shape: str | None
    runs: int
    steps: int | None
    config: Callable[[], Mapping[str, Any]]


@dataclass
class _Pace:
    """Finished attempts of one kind."""

    seconds: float = 0.0
    steps: int = 0
    runs: int = 0

    def add(self, seconds: float, steps: int) -> None:
        self.seconds += seconds
        self.steps += steps
        self.runs += 1

    def of(self, left: Left) -> float:
        """By steps where they are known on both sides, else by runs."""
        if left.steps is not None and self.steps:
            return self.seconds / self.steps * left.steps
        return self.seconds / self.runs * left.runs


@dataclass(frozen=True)
class _Attempt:
    run: int
    stage: str
    family: str
    group: str
    shape: str | None
    worker: str
    device: str
    began: float
    ended: float
    how: str | None
    steps: int


class Costs:
    """All attempts of a study, and the speeds that they tell."""

    def __init__(self, attempts: Sequence[_Attempt] = (), configs: Callable[[str], list[Any]] = lambda family: []):
        self.spent: dict[str, Spent] = {}
        self.devices: dict[str, None] = {}  # that speeds were measured on
        self._paces: dict[tuple[str, ...], _Pace] = {}
        self._configs = configs  # of a family: (stage, group, config) of groups with finished runs
        self._alike: dict[str, list[Any]] = {}
        seconds = shares([(a.worker, a.began, a.ended) for a in attempts])
        for attempt, share in zip(attempts, seconds, strict=True):
            was = self.spent.get(attempt.stage, Spent())
            lost = share if attempt.how == "lost" else 0.0
            self.spent[attempt.stage] = Spent(was.seconds + share, was.lost + lost)
            if attempt.how == "done" and share > 0:
                self._learn(attempt, share)

    def _learn(self, attempt: _Attempt, share: float) -> None:
        self.devices[attempt.device] = None
        keys: list[tuple[str, ...]] = [("group", attempt.group), ("stage", attempt.stage)]
        keys += [("group of", attempt.stage, attempt.group)]
        if attempt.shape is not None:
            keys.append(("shape", attempt.family, attempt.shape))
        for key in keys:
            self._paces.setdefault(key, _Pace()).add(share, attempt.steps)

    def expect(self, left: Left, stated: Callable[[], float | None] = lambda: None) -> Expected:
        """What open runs will cost, from the finished ones that are most like them.

        Those are, in this order: equal but for the seed; of the same shape; of the same stage. Then what the stage
        itself says, `stated`, in seconds; then those of the family whose config differs in the fewest fields.
        """
        for key, words in (
            (("group", left.group), "equal but for the seed"),
            (("shape", left.family, left.shape or ""), "of the same shape"),
            (("stage", left.stage), "of the same stage"),
        ):
            pace = self._paces.get(key)
            if pace is not None:
                return Expected(pace.of(left), f"measured on {_runs(pace.runs)} {words}")
        said = stated()
        if said is not None:
            return Expected(said, "hours= of the stage")
        return self._by_likeness(left)

    def _by_likeness(self, left: Left) -> Expected:
        if left.family not in self._alike:
            self._alike[left.family] = self._configs(left.family)
        config = left.config()
        nearest: tuple[int, list[str], str, _Pace] | None = None
        for stage, group, other in self._alike[left.family]:
            pace = self._paces.get(("group of", stage, group))
            differing = _differing(config, other)
            if pace is not None and (nearest is None or len(differing) < nearest[0]):
                nearest = (len(differing), differing, stage, pace)
        if nearest is None:
            return Expected(None, "unknown: nothing like it was measured")
        n, names, stage, pace = nearest
        which = ", ".join(names[:3]) + (", ..." if n > 3 else "")
        differ = f"{'differs' if pace.runs == 1 else 'differ'} in {which}" if names else "of another version"
        return Expected(pace.of(left), f"measured on {_runs(pace.runs)} of {stage} ({differ})")


def _runs(n: int) -> str:
    return f"{n:,} run{'' if n == 1 else 's'}"


def _differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields that two configs differ in. How long they train is no matter: speeds are by the step."""
    names = dict.fromkeys([*config, *other])
    return [name for name in names if name not in ("seed", "steps") and config.get(name) != other.get(name)]


def shares(attempts: Sequence[tuple[str, float, float]]) -> list[float]:
    """The seconds of its worker that each attempt (worker, began, ended) bears: those of a pack bear equal parts."""
    of_worker: dict[str, list[tuple[float, int, int]]] = {}
    for place, (worker, began, ended) in enumerate(attempts):
        # at one moment those that begin come first: none ends before it began
        of_worker.setdefault(worker, []).extend([(began, 0, place), (max(began, ended), 1, place)])
    found = [0.0] * len(attempts)
    for events in of_worker.values():
        active, each, last = 0, 0.0, 0.0  # `each`: what one that was there all the time would bear
        for moment, is_end, place in sorted(events):
            each += (moment - last) / active if active else 0.0
            last = moment
            active += -1 if is_end else 1
            found[place] = each - found[place] if is_end else each
    return found


# ------------------------------------------------------------------------------------------------- from the database


_ATTEMPTS = """SELECT runs.id AS run, runs.stage, runs.family, runs.group_key, runs.pack_key, runs.lease_until,
                      attempts.worker, attempts.device, attempts.started_at, attempts.ended_at, attempts.ended,
                      coalesce(step_to - step_from, 0) AS steps, workers.beat_at
               FROM attempts JOIN runs ON runs.id = attempts.run_id
               JOIN intakes ON intakes.id = runs.intake AND intakes.complete
               JOIN workers ON workers.id = attempts.worker"""

_OPEN = """SELECT runs.stage, runs.family, runs.group_key, runs.pack_key, runs.state, count(*) AS n,
                  min(runs.id) AS first, count(runs.budget) AS known,
                  sum(CASE WHEN budget > steps_done THEN budget - steps_done ELSE 0 END) AS steps
           FROM runs JOIN intakes ON intakes.id = runs.intake AND intakes.complete
           WHERE runs.state IN ('waiting', 'pending', 'running')
           GROUP BY runs.stage, runs.family, runs.group_key, runs.pack_key, runs.state, runs.budget IS NULL"""


def read(connection: Connection, now: float | None = None) -> Costs:
    """What all complete intakes have cost, with the speeds that they tell."""
    moment = db.clock(connection, now)
    attempts = [_attempt(row, moment) for row in connection.execute(text(_ATTEMPTS))]
    return Costs(attempts, lambda family: _configs(connection, family))


def read_all(engine: Engine) -> Costs:
    """As `read`, for as long as the database is open: configs are looked up when they are needed."""
    with db.reading(engine) as connection:
        moment = db.clock(connection)
        attempts = [_attempt(row, moment) for row in connection.execute(text(_ATTEMPTS))]

    def configs(family: str) -> list[Any]:
        with db.reading(engine) as connection:
            return _configs(connection, family)

    return Costs(attempts, configs)


def _attempt(row: Any, now: float) -> _Attempt:
    ended = row.ended_at
    if ended is None:
        ended = min(now, row.lease_until or now)
    elif row.ended == "lost":
        ended = min(ended, max(row.started_at, row.beat_at))
    who = (row.run, row.stage, row.family, row.group_key, row.pack_key, row.worker, row.device)
    return _Attempt(*who, row.started_at, ended, row.ended, max(int(row.steps), 0))


def _configs(connection: Connection, family: str) -> list[Any]:
    sql = """SELECT runs.stage, runs.group_key, min(runs.id) AS first FROM runs
             WHERE runs.family = :family AND runs.state = 'done' GROUP BY runs.stage, runs.group_key
             ORDER BY first DESC LIMIT :like"""
    one = text("SELECT config FROM runs WHERE id = :run")
    return [
        (row.stage, row.group_key, json.loads(connection.execute(one, {"run": row.first}).scalar_one()))
        for row in connection.execute(text(sql), {"family": family, "like": LIKE}).all()
    ]


def open_runs(connection: Connection) -> Iterable[tuple[str, Left]]:
    """The runs that have not ended: their state, and what is left of them, by group."""
    one = text("SELECT config FROM runs WHERE id = :run")

    def config_of(run: int) -> Callable[[], Mapping[str, Any]]:
        return lambda: json.loads(connection.execute(one, {"run": run}).scalar_one())

    for row in connection.execute(text(_OPEN)).all():
        steps = int(row.steps) if row.known else None
        who = (row.stage, row.family, row.group_key, row.pack_key)
        yield row.state, Left(*who, int(row.n), steps, config_of(row.first))
