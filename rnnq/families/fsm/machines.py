"""Random machines, and random walks through them.

A machine is a total transition table: (states, actions) -> next state, every state within reach of state 0 unless one
was made absorbing. Two ways to the same distribution: that of the published study, which draws one number after the
other from Python's own generators (here in bulk, with the same results), and one that draws whole arrays.

Source of the generator and of the order of its draws: Toba4366/CS182_FinalProject, as its description says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rnnq.errors import DataError

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Tell = Callable[[float], None]  # is told which part of the work is done

SHIFT = 3  # a step is one byte: its action above these bits, the state that it leads to in them
# drawn at once, so that long streams need little memory
_CHUNK = 1 << 20  # words
_MACHINES = 16384

_TOGETHER = 1024  # samples that walk at once: what they read and write fits into a processor's cache


def walk(tables: Bytes, order: Bytes, lengths: Ints, starts: Bytes, choices: Bytes, tell: Tell) -> Bytes:
    """All steps of all walks, one walk after the other: bytes of action << SHIFT | next state.

    tables, order   (n, S, A)     next states; which action a choice means in a state
    lengths         (n, S + 1)    steps of the demonstrations, which start in states 0 to S-1, and of the query
    starts          (n,)          where the query starts
    choices         (steps,)      below A; for each step, in the order in which the steps are returned
    """
    n = len(tables)
    begins = np.concatenate(([0], np.cumsum(lengths.sum(axis=1))))
    steps = np.empty(int(begins[-1]), np.uint8)
    for begin in range(0, n, _TOGETHER):
        some = slice(begin, min(begin + _TOGETHER, n))
        part = slice(int(begins[some.start]), int(begins[some.stop]))
        steps[part] = _walk(tables[some], order[some], lengths[some], starts[some], choices[part])
        tell(some.stop / n)
    return steps


def _walk(tables: Bytes, order: Bytes, lengths: Ints, starts: Bytes, choices: Bytes) -> Bytes:
    """All walks a step further at once, again and again. The longest come first, so that those that go on do, too."""
    n, states, actions = tables.shape
    chosen = np.take_along_axis(tables, order.astype(np.int64), 2)
    codes = (order << SHIFT | chosen).ravel()
    flat = lengths.ravel()
    longest_first = np.argsort(-flat, kind="stable")
    first = (np.cumsum(flat) - flat)[longest_first]
    table = np.repeat(np.arange(n) * (states * actions), states + 1)[longest_first]
    state = np.column_stack((np.broadcast_to(np.arange(states, dtype=np.uint8), (n, states)), starts))
    state = state.ravel()[longest_first].astype(np.int64)
    steps = np.empty_like(choices)
    alive = len(flat) - np.searchsorted(np.sort(flat), np.arange(flat.max()), side="right")  # walks longer than t
    for t, count in enumerate(alive.tolist()):
        place = first[:count] + t
        code = codes[table[:count] + state[:count] * actions + choices[place]]
        steps[place] = code
        state = (code & (1 << SHIFT) - 1).astype(np.int64)
    return steps


# ------------------------------------------------------------------- as the published study: Mersenne twisters


class Mersenne:
    """The 32-bit words behind random.Random(seed), in bulk."""

    def __init__(self, seed: int) -> None:
        *key, position = random.Random(seed).getstate()[1]
        self._bits = np.random.MT19937()
        self._bits.state = {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, np.uint32), "pos": position},
        }

    def words(self, count: int) -> Words:
        """The next so many."""
        return self._bits.random_raw(count)

    def below(self, n: int, count: int) -> Bytes:
        """What so many calls of choice() over n things would choose: numbers below n."""
        shift, parts, missing = 32 - n.bit_length(), [], count
        while missing > 0:
            drawn = (self.words(min(_CHUNK, _enough(missing))) >> shift).astype(np.uint8)
            parts.append(drawn[drawn < n])
            missing -= len(parts[-1])
        return np.concatenate(parts)[:count]


def _enough(draws: int) -> int:
    """Words for so many draws: each word does with a probability of at least a half. Fourteen standard deviations."""
    return 2 * draws + 20 * math.isqrt(draws) + 100


def stream_machines(seed: int, n: int, states: int, actions: int, absorbing: bool, tell: Tell) -> tuple[Bytes, Bytes]:
    """The tables (n, S, A) that the study's generator makes, and the order of each state's actions (n, S, A).

    The order is that in which they were added, which decides what a choice among them means. Raises DataError where
    the generator itself would fail: it came upon a state without a free action (only with A < S - 1).
    """
    fills = states * actions - states + 1 + absorbing
    twister, words, grown = Mersenne(seed), np.empty(0, np.uint64), []
    for begin in range(0, n + 1, _MACHINES):
        count = min(_MACHINES, n + 1 - begin)
        words = np.concatenate((words, twister.words(_enough(count * (3 * (states - 1) + fills)))))
        edges, filled, used = _grow(words, begin, count, states, actions, fills)
        grown.append(_assembled(edges, filled, states, actions, absorbing))
        words = words[used:]
        tell(begin / (n + 1))
    # the study makes a machine when it sets out and throws it away
    tables, order = (np.concatenate(arrays)[1:] for arrays in zip(*grown, strict=True))
    return tables, order


def _assembled(edges: list[Edge], filled: Bytes, states: int, actions: int, absorbing: bool) -> tuple[Bytes, Bytes]:
    """Tables and orders from the trees and the fillings of machines."""
    source, action, target, rank = np.array(edges, np.int64).T
    machine = np.repeat(np.arange(len(filled)), states - 1)
    tables = np.full((len(filled), states, actions), 255, np.uint8)
    tables[machine, source, action] = target
    order = np.broadcast_to(actions + np.arange(actions), tables.shape).copy()
    order[machine, source, action] = rank
    tables[tables == 255] = filled[:, : filled.shape[1] - absorbing].ravel()  # state by state, action by action
    if absorbing:
        _absorb(tables, filled[:, -1])
    return tables, np.argsort(order, axis=2, kind="stable").astype(np.uint8)


def _absorb(tables: Bytes, absorbing: Bytes) -> None:
    """Lead all transitions of one state of each machine to itself."""
    rows = np.arange(len(tables))
    tables[rows, absorbing] = absorbing[:, None]


Edge = tuple[int, int, int, int]  # state, action, next state, how many actions the state had before


def _grow(words: Words, begin: int, count: int, states: int, actions: int, fills: int) -> tuple[list[Edge], Bytes, int]:
    """The trees of some machines, edge by edge; what their other cells are filled with (count, fills); words used."""
    drawn = words.tolist()
    fits: NDArray[np.bool_] = words >> np.uint64(32 - states.bit_length()) < states
    accepted = np.flatnonzero(fits)
    before = np.concatenate(([0], np.cumsum(fits))).tolist()
    where = 0
    places: list[int] = []
    edges: list[Edge] = []

    def below(n: int) -> int:
        nonlocal where
        shift = 32 - n.bit_length()
        while True:
            value: int = drawn[where] >> shift
            where += 1
            if value < n:
                return value

    for number in range(begin, begin + count):
        connected, remaining = [0], list(range(1, states))
        free = [list(range(actions)) for _ in range(states)]
        while remaining:
            source = connected[below(len(connected))]
            target = remaining.pop(below(len(remaining)))
            if not free[source]:
                raise _stuck(number, source, states, actions)
            rank = actions - len(free[source])
            edges.append((source, free[source].pop(below(len(free[source]))), target, rank))
            connected.append(target)
        places.append(before[where])
        where = int(accepted[places[-1] + fills - 1]) + 1
    values = (words[accepted] >> (32 - states.bit_length())).astype(np.uint8)
    return edges, values[np.array(places)[:, None] + np.arange(fills)], where


def _stuck(number: int, state: int, states: int, actions: int) -> DataError:
    which = f"machine {number - 1}" if number else "the machine that is drawn first and thrown away"
    return DataError(
        f"data_split=stream, states={states}, actions={actions}: at {which} the generator draws state {state}, which "
        f"has no free action, and stops, as the published one does",
        f"actions of at least states - 1 = {states - 1}, another data_seed, or data_split=disjoint, which draws among "
        "the states that have one",
    )


def stream_lengths(seed: int, n: int, states: int, base: tuple[int, int], variation: float) -> tuple[Ints, Bytes]:
    """Steps of all walks (n, S + 1) and the states that the queries start in (n,), as the study draws them."""
    words = Mersenne(seed).words(2 * n * (states + 1) + _enough(n))
    found = words >> np.uint64(32 - states.bit_length())
    fits = (found < states).tobytes()  # quick to look at, one by one
    places, starts, where = [], [], 0
    for _ in range(n):
        places.append(where)
        where += 2 * states  # two words for each variation
        while not fits[where]:
            where += 1
        starts.append(where)
        where += 3
    pairs = np.column_stack((np.array(places)[:, None] + 2 * np.arange(states), np.array(starts) + 1))
    high, low = words[pairs] >> 5, words[pairs + 1] >> 6
    uniform = (high * 67108864.0 + low) / 9007199254740992.0  # random.random()
    drawn = -variation + (variation + variation) * uniform
    return _varied(base, drawn), found[starts].astype(np.uint8)


def _varied(base: tuple[int, int], drawn: NDArray[np.float64]) -> Ints:
    """Lengths of demonstrations and, in the last column, of the query."""
    bases = np.full(drawn.shape[1], base[0])
    bases[-1] = base[1]
    return np.maximum(1, (bases * (1 + drawn)).astype(np.int64))


def stream_picks(seed: int, n: int, states: int, demos: int) -> Bytes:
    """Which demonstrations each of n sequences shows: sample() over the states, one sequence after the other."""
    chance = random.Random(seed)
    return np.array([chance.sample(range(states), demos) for _ in range(n)], np.uint8)


# ------------------------------------------------------------------------------------------- arrays at once


class Stream:
    """Numbers from a name: the same on every machine, with every version of numpy.

    Built on the words of PCG64, which numpy promises to keep; what its Generator makes of them it does not.
    """

    def __init__(self, name: str) -> None:
        import hashlib

        digest = hashlib.sha256(name.encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest, "little"))

    def random(self, *shape: int) -> NDArray[np.float64]:
        """Uniform in [0, 1)."""
        return _uniform(self._bits.random_raw(math.prod(shape))).reshape(shape)

    def below(self, n: int, count: int) -> Bytes:
        """Numbers below n, uniform but for n in 2**32."""
        parts = []
        for start in range(0, count, 2 * _CHUNK):
            wanted = min(2 * _CHUNK, count - start)
            halves = self._bits.random_raw(-(-wanted // 2)).astype("<u8", copy=False).view("<u4")[:wanted]
            parts.append((halves * np.uint64(n) >> np.uint64(32)).astype(np.uint8))
        return np.concatenate(parts)

    def orders(self, n: int, size: int) -> Bytes:
        """n random orders of 0 to size-1: (n, size)."""
        return np.argsort(self.random(n, size), axis=1, kind="stable").astype(np.uint8)

    def one_of(self, allowed: NDArray[np.bool_]) -> Ints:
        """In each row, the number of a column that is allowed."""
        keys = np.where(allowed, self.random(*allowed.shape), -1.0)
        columns: Ints = np.argmax(keys, axis=1)
        return columns


def random_machines(stream: Stream, n: int, states: int, actions: int, absorbing: bool) -> Bytes:
    """Tables (n, S, A) of the same distribution as the study's.

    But for A < S - 1: a new edge starts at one of those states that have a free action, so that none ever fails.
    """
    rows = np.arange(n)
    tables = np.full((n, states, actions), 255, np.uint8)
    connected = np.zeros((n, states), bool)
    connected[:, 0] = True
    for target in (stream.orders(n, states - 1) + 1).T:
        free = tables == 255
        source = stream.one_of(connected & free.any(2))
        tables[rows, source, stream.one_of(free[rows, source])] = target
        connected[rows, target] = True
    unset = tables == 255
    tables[unset] = stream.below(states, int(unset.sum()))
    if absorbing:
        _absorb(tables, stream.below(states, n))
    return tables


def random_lengths(stream: Stream, n: int, states: int, base: tuple[int, int], variation: float) -> Ints:
    """Steps of all walks (n, S + 1)."""
    return _varied(base, variation * (2 * stream.random(n, states + 1) - 1))


# --------------------------------------------------------------------------------- equal up to renaming

_ODD = [
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB)
]


def kinds(tables: Bytes, any_actions: bool = False) -> Words:
    """A number for each machine that renaming its states leaves as it is, and with any_actions its actions, too.

    Machines that differ may have the same number; that is rare. Colour refinement: the colour of a state is mixed,
    round by round, with those of its neighbours, and what is summed over states has no order.
    """
    n, states, actions = tables.shape
    own = np.arange(states)
    one_hot = tables[..., None] == own
    state = np.ones((n, states), np.uint64)
    action = np.ones((n, actions), np.uint64)
    if not any_actions:
        action *= _mixed(np.arange(1, actions + 1, dtype=np.uint64))
    loops = (tables == own[:, None]) * _ODD[0]
    targets = tables.astype(np.int64).reshape(n, -1)
    for _ in range(states if actions == 1 else 3):  # how far a colour is told; more than three tell no more apart
        reached = np.take_along_axis(state, targets, 1).reshape(tables.shape)
        edges = _mixed(state[:, :, None] * _ODD[1] + reached * _ODD[2] + loops + action[:, None, :])
        arriving = np.where(one_hot, edges[..., None], np.uint64(0)).sum((1, 2))
        state, action = _mixed(state + edges.sum(2) * _ODD[3] + _mixed(arriving)), _mixed(action + edges.sum(1))
    return _mixed(state.sum(1) + action.sum(1) * _ODD[3])


def _mixed(value: Words) -> Words:
    """Bits well spread; of equal numbers equal."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _uniform(words: Words) -> NDArray[np.float64]:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def parts(found: Words, key: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each kind of machine: which one, the key decides."""
    return _uniform(_mixed(found ^ _mixed(np.array([key], np.uint64))))
