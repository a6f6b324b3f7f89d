"""What a plateau means: what can be had without learning, and what is the most that can be had.

Three shortcuts look at frequencies of next states in the context, the demonstrations and the query so far: at all of
them (U), at those that followed this action (A), or this state (S). The perfect solver reads the table off the
demonstrations; where these do not show a cell, it says the state that they visit most often.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rnnq.families.fsm.data import PAD, Split
from rnnq.families.fsm.machines import Ints

Shortcut = Literal["U", "A", "S"]
SHORTCUTS: tuple[Shortcut, ...] = ("U", "A", "S")
Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]

_PSEUDO = 0.5  # count added to each state by a shortcut
_AT_ONCE = 1000  # samples, so that a large split needs little memory
_FORMAT = 1  # of the scores' file: raised when a number is reckoned otherwise


@dataclass(frozen=True)
class Scores:
    """With the picks that evaluation shows. Shares are of query steps of all samples together, unless it says so."""

    samples: int
    steps: int  # of all queries
    u_accuracy: float  # next-state frequencies in the context
    u_loss: float  # nats per step, and so below
    a_accuracy: float  # the same given the action
    a_loss: float
    s_accuracy: float  # the same given the state
    s_loss: float
    solver: float  # teacher-forced: it is told the true state before each step; demonstrations only
    solver_online: float  # the same, reading the query steps so far, too
    solver_open: float  # it goes on from the state that it said itself; a mean over samples of their shares
    all_right: float  # share of samples in which the teacher-forced solver is right at every step
    cells_seen: float  # share of the cells of a table that the demonstrations show; a mean over samples
    covered: float  # share of query steps whose cell the demonstrations show
    outside: float | None  # share of steps that start outside the absorbing state; none: no absorbing states
    outside_solver: float | None  # accuracy on these, teacher-forced, and so below
    outside_u: float | None
    outside_a: float | None
    outside_s: float | None

    @property
    def shortcut(self) -> float:
        """The accuracy of the best of the shortcuts."""
        return max(self.u_accuracy, self.a_accuracy, self.s_accuracy)

    @property
    def ceiling(self) -> float:
        """The accuracy of the teacher-forced solver that knows the demonstrations only."""
        return self.solver


# ----------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class _Steps:
    """Steps of walks, flat: one walk after the other. Numbers, not tokens."""

    sample: Ints  # which of the rows that were asked for
    state: Ints  # where the step starts
    action: Ints
    after: Ints


@dataclass(frozen=True)
class _Shown:
    """What the sequences of some rows show."""

    split: Split
    rows: Ints
    picks: Ints  # (B, demos)
    demos: _Steps
    query: _Steps
    lengths: Ints  # (B,): of the queries

    def laid(self, flat: Ints) -> Ints:
        """A number of a state for each query step, as tokens in rows: (B, L), PAD behind the end of each."""
        found = np.full((len(self.rows), int(self.lengths.max())), PAD, np.int64)
        inside = np.arange(found.shape[1]) < self.lengths[:, None]
        found[inside] = self.split.state_ids[self.rows[self.query.sample], flat]
        return found


def _shown(split: Split, rows: Ints, picks: Ints) -> _Shown:
    lengths, begins = split.walks(rows, picks)
    demos = _steps(split, lengths[:-1], begins[:-1], picks.T)
    query = _steps(split, lengths[-1:], begins[-1:], split.query_starts[rows][None].astype(np.int64))
    return _Shown(split, rows, picks, demos, query, lengths[-1])


def _steps(split: Split, lengths: Ints, begins: Ints, starts: Ints) -> _Steps:
    action, after = split.steps(lengths, begins)
    flat = lengths.ravel()
    state = np.empty_like(after)
    state[1:] = after[:-1]
    state[np.cumsum(flat) - flat] = starts.ravel()
    walks, size = lengths.shape
    return _Steps(np.repeat(np.tile(np.arange(size), walks), flat), state, action, after)


# ------------------------------------------------------------------------------------------------- the solver


def _known(shown: _Shown) -> Flags:
    """Which cells of each table the demonstrations show: (B, S, A)."""
    known = np.zeros((len(shown.rows), shown.split.states, shown.split.actions), bool)
    known[shown.demos.sample, shown.demos.state, shown.demos.action] = True
    return known


def _most_visited(shown: _Shown) -> Ints:
    """The state that the demonstrations of each sample visit most often; of several the one that they show first."""
    size, states = len(shown.rows), shown.split.states
    # all states in the order of the sequence: the walks' starts are put before their steps
    lengths, _ = shown.split.walks(shown.rows, shown.picks)
    walk = np.repeat(np.arange(lengths[:-1].size), lengths[:-1].ravel())
    sample = np.concatenate((np.tile(np.arange(size), len(lengths) - 1), shown.demos.sample))
    visited = np.concatenate((shown.picks.T.ravel(), shown.demos.after))
    order = np.argsort(np.concatenate((np.arange(lengths[:-1].size), walk)), kind="stable")
    cell = (sample * states + visited)[order]
    count = np.bincount(cell, minlength=size * states)
    first = np.full(size * states, len(cell))
    first[cell[::-1]] = np.arange(len(cell))[::-1]  # of several values for a place the last one stays
    most: Ints = np.argmax((count * (len(cell) + 1) - first).reshape(size, states), axis=1)
    return most


def _guesses(shown: _Shown, known: Flags, most: Ints) -> Ints:
    """What the solver would say in each cell of each table: (B, S, A)."""
    return np.where(known, shown.split.tables[shown.rows], most[:, None, None])


def _open_loop(shown: _Shown, guesses: Ints) -> Ints:
    """What the solver says when it goes on from what it said itself, for each query step."""
    said = np.empty_like(shown.query.after)
    begins = np.cumsum(shown.lengths) - shown.lengths
    state = shown.split.query_starts[shown.rows].astype(np.int64)
    for step in range(int(shown.lengths.max())):
        alive = np.flatnonzero(shown.lengths > step)
        place = begins[alive] + step
        state[alive] = guesses[alive, state[alive], shown.query.action[place]]
        said[place] = state[alive]
    return said


def _again(shown: _Shown) -> Flags:
    """Whether the query itself has shown a step's cell before."""
    query, split = shown.query, shown.split
    cells = (query.sample * split.states + query.state) * split.actions + query.action
    again = np.ones(len(cells), bool)
    again[np.unique(cells, return_index=True)[1]] = False
    return again


# ---------------------------------------------------------------------------------------------- the shortcuts


def _frequencies(shown: _Shown, shortcut: Shortcut) -> Reals:
    """What a shortcut says before each query step: probabilities of the states, (steps, S)."""
    states = shown.split.states
    demo, query = (_condition(shown, steps, shortcut) for steps in (shown.demos, shown.query))
    groups = len(shown.rows) * max(states, shown.split.actions)
    counts = np.bincount(demo * states + shown.demos.after, minlength=groups * states).reshape(groups, states)
    order = np.argsort(query, kind="stable")
    ranked = query[order]
    so_far = np.zeros((len(order) + 1, states), np.int64)
    np.cumsum(shown.query.after[order][:, None] == np.arange(states), axis=0, out=so_far[1:])
    begins = np.searchsorted(ranked, ranked)  # where the group of each step begins
    found = np.empty((len(order), states))
    found[order] = so_far[:-1] - so_far[begins] + counts[ranked] + _PSEUDO
    found /= found.sum(axis=1, keepdims=True)
    return found


def _condition(shown: _Shown, steps: _Steps, shortcut: Shortcut) -> Ints:
    """The group of steps that a shortcut counts a step with."""
    if shortcut == "U":
        return steps.sample
    if shortcut == "A":
        return np.asarray(steps.sample * shown.split.actions + steps.action)
    return np.asarray(steps.sample * shown.split.states + steps.state)


# ------------------------------------------------------------------------------------------------- for figures


def solver_predictions(split: Split, rows: Ints, picks: Ints, open_loop: bool = False) -> Ints:
    """What the solver says at each query step, as tokens: (B, L), PAD behind the end of each query."""
    shown = _shown(split, rows, picks)
    guesses = _guesses(shown, _known(shown), _most_visited(shown))
    said = _open_loop(shown, guesses) if open_loop else _at_query(shown, guesses)
    return shown.laid(said)


def shortcut_predictions(split: Split, rows: Ints, picks: Ints, shortcut: Shortcut) -> Ints:
    """The likeliest next state after a shortcut at each query step, as tokens: (B, L), PAD as above."""
    shown = _shown(split, rows, picks)
    return shown.laid(np.argmax(_frequencies(shown, shortcut), axis=1))


def _at_query(shown: _Shown, cells: Ints) -> Ints:
    """The values of the cells (B, S, A) that the query steps go through."""
    found: Ints = cells[shown.query.sample, shown.query.state, shown.query.action]
    return found


# ----------------------------------------------------------------------------------------------------- scores


def scores(split: Split, picks: Ints | None = None) -> Scores:
    """How well the shortcuts and the solver do on a split, with the picks that evaluation shows or others."""
    rows = np.arange(len(split))
    chosen = split.picks(rows) if picks is None else picks
    sums = _Sums()
    for begin in range(0, len(rows), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        _add(sums, _shown(split, rows[part], chosen[part]))
    return sums.scores(absorbing=bool(split.absorbs(rows).any(axis=1).all()))


class _Sums:
    """Sums of what the scores are shares of."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def add(self, name: str, values: NDArray[np.generic]) -> None:
        """Sum up, and count."""
        self.of[name] = self.of.get(name, 0.0) + float(np.sum(values, dtype=np.float64))
        self.of[f"n {name}"] = self.of.get(f"n {name}", 0.0) + values.size

    def scores(self, absorbing: bool) -> Scores:
        """The means of everything that was added."""
        means: dict[str, float | None] = {}
        for field in fields(Scores):
            count = self.of.get(f"n {field.name}", 0.0)
            means[field.name] = self.of[field.name] / count if count else None
            if field.name.startswith("outside") and not absorbing:
                means[field.name] = None
        counts = {"samples": int(self.of["n all_right"]), "steps": int(self.of["n solver"])}
        return Scores(**(means | counts))  # type: ignore[arg-type]


def _add(sums: _Sums, shown: _Shown) -> None:
    query = shown.query
    outside = ~shown.split.absorbs(shown.rows)[query.sample, query.state]
    sums.add("outside", outside)
    _add_solver(sums, shown, outside)
    for shortcut in SHORTCUTS:
        name = shortcut.lower()
        chances = _frequencies(shown, shortcut)
        right = np.argmax(chances, axis=1) == query.after
        sums.add(f"{name}_accuracy", right)
        sums.add(f"{name}_loss", -np.log(chances[np.arange(len(right)), query.after]))
        sums.add(f"outside_{name}", right[outside])


def _add_solver(sums: _Sums, shown: _Shown, outside: Flags) -> None:
    query, size = shown.query, len(shown.rows)
    known = _known(shown)
    guesses = _guesses(shown, known, _most_visited(shown))
    right = _at_query(shown, guesses) == query.after
    sums.add("solver", right)
    sums.add("outside_solver", right[outside])
    sums.add("solver_online", right | _again(shown))
    sums.add("all_right", np.bincount(query.sample, ~right, minlength=size) == 0)
    sums.add("solver_open", np.bincount(query.sample, _open_loop(shown, guesses) == query.after) / shown.lengths)
    sums.add("cells_seen", known.mean(axis=(1, 2)))
    sums.add("covered", known[query.sample, query.state, query.action])


# ---------------------------------------------------------------------------------------------------- kept


def kept_scores(split: Split, folder: Path) -> Scores:
    """The scores of a split, from a file beside its data; reckoned and written there when it has none."""
    path = folder / f"scores-{_FORMAT}-{split.name}.json"
    try:
        kept = Scores(**json.loads(path.read_text()))
        if all(value is None or isinstance(value, (int, float)) for value in asdict(kept).values()):
            return kept
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged, or has other fields
        pass
    found = scores(split)
    _keep(path, found)
    return found


def _keep(path: Path, found: Scores) -> None:
    """Written aside and renamed. A folder that cannot be written costs the time to reckon again, and no more."""
    aside = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        aside.write_text(json.dumps(asdict(found), indent=2) + "\n")
        aside.replace(path)
    except OSError:
        pass
