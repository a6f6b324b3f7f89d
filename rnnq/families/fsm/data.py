"""Sequences of in-context automata: vocabulary, layout, splits, and the cache that keeps what was made.

A sample is a machine, one demonstration walk from each of its states, and a query walk. A sequence shows some of the
demonstrations and then the query, whose next states are what a model has to say:

    demo eos demo eos demo eos query walk eos        a walk: s0 a0 s1 a1 ... sL

The cache folder of the data has a folder for each set of data, named by a hash of everything that decides them.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rnnq import data, kept
from rnnq.config import as_json
from rnnq.errors import DataError
from rnnq.families.fsm import machines
from rnnq.families.fsm.config import Machines
from rnnq.families.fsm.machines import SHIFT, Bytes, Ints, Stream, Tell
from rnnq.kept import Kept, Telling

if TYPE_CHECKING:
    from rnnq.families.fsm.baselines import Scores

VOCABULARY = 21
N_STATES = 8  # tokens 0 to 7
FIRST_ACTION = 8  # tokens 8 to 17
N_ACTIONS = 10
EOS, QUERY, PAD = 18, 19, 20

SPLITS = ("train", "val", "test")

_STATE = (1 << SHIFT) - 1  # the bits of a step that hold its next state
_FORMAT = 1  # of the cache: raised when its files, or what `disjoint` draws, change


@dataclass(frozen=True)
class Batch:
    """Sequences side by side, padded at the right to the longest. T is counted from 0."""

    inputs: Ints  # (B, T): the targets one place later, the first of them twice
    targets: Ints  # (B, T)
    mask: NDArray[np.bool_]  # (B, T): where a next state of the query is to be said, which is all that counts
    starts: Ints  # (B,): where in targets the first state of the query stands; its next states are at +2, +4, ...
    lengths: Ints  # (B,): tokens without padding


@dataclass(frozen=True)
class Query:
    """The query walks of some samples, as tokens; PAD behind the end of each."""

    states: Ints  # (B, L): in which state each step starts
    actions: Ints  # (B, L)
    next_states: Ints  # (B, L)
    lengths: Ints  # (B,)


class Split:
    """Samples in a fixed order. Its arrays are read-only, and most lie in files; those of a batch are new."""

    def __init__(self, name: str, arrays: Mapping[str, NDArray[Any]], rows: slice, bounds: Ints, demos: int) -> None:
        self.name = name
        self.demos = demos
        self.tables: Bytes = arrays["tables"][rows]  # (n, S, A): next states, by number and not by token
        self.lengths = arrays["lengths"][rows]  # (n, S + 1): steps of the demonstrations and of the query
        self.query_starts: Bytes = arrays["starts"][rows]  # (n,)
        self._fixed_picks = arrays["picks"][rows]
        self._steps: Bytes = arrays["steps"]  # of all splits
        self._bounds = bounds[rows]  # (n, S + 1): where in _steps each walk begins
        n, self.states, self.actions = self.tables.shape
        ids = arrays.get("ids")
        self._renamed = ids is not None
        usual = np.concatenate((np.arange(self.states), FIRST_ACTION + np.arange(self.actions))).astype(np.uint8)
        ids = np.broadcast_to(usual, (n, len(usual))) if ids is None else ids[rows]
        self.state_ids: Bytes = ids[:, : self.states]  # (n, S): the token of each state
        self.action_ids: Bytes = ids[:, self.states :]  # (n, A)

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def n(self) -> int:
        """How many samples."""
        return len(self.tables)

    def picks(self, rows: Ints) -> Ints:
        """The demonstrations (B, demos) that evaluation shows: drawn once for each sample."""
        return self._fixed_picks[rows].astype(np.int64)

    def random_picks(self, rows: Ints, rng: np.random.Generator) -> Ints:
        """Demonstrations (B, demos) in a random order, none twice."""
        keys = rng.random((len(rows), self.states))
        return np.argsort(keys, axis=1, kind="stable")[:, : self.demos]

    def batch(self, rows: Ints, picks: Ints) -> Batch:
        """The sequences of these samples with these demonstrations."""
        size, demos = picks.shape
        lengths, source = self.walks(rows, picks)
        query = lengths[-1]
        place = np.zeros((demos + 1, size), np.int64)  # of each walk's first state
        np.cumsum(2 * lengths[:-1] + 2, axis=0, out=place[1:])
        place[-1] += 1  # the token that announces the query
        total = place[-1] + 2 * query + 2
        longest = int(total.max())
        column = np.arange(size)
        targets = np.full((size, longest), PAD, np.int64)
        first = np.vstack((picks.T, self.query_starts[rows][None]))
        targets[column, place] = self.state_ids[rows, first]
        targets[column, place + 2 * lengths + 1] = EOS
        targets[column, place[-1] - 1] = QUERY
        target = _places(column * longest + place + 1, lengths, 2)  # in all sequences, one after the other
        action, after = self.steps(lengths, source)
        if self._renamed:
            row = np.repeat(np.tile(rows, demos + 1), lengths.ravel())
            action = self.action_ids[row, action].astype(np.int64)
            after = self.state_ids[row, after].astype(np.int64)
        else:
            action = action + FIRST_ACTION
        flat = targets.reshape(-1)
        flat[target] = action
        flat[target + 1] = after
        mask = np.zeros(targets.shape, bool)
        mask.reshape(-1)[target[len(target) - int(query.sum()) :] + 1] = True
        inputs = np.concatenate((targets[:, :1], targets[:, :-1]), axis=1)
        inputs[np.arange(longest) >= total[:, None]] = PAD
        return Batch(inputs, targets, mask, place[-1], total)

    def walks(self, rows: Ints, picks: Ints) -> tuple[Ints, Ints]:
        """Of the demonstrations shown and, last, the query: their steps and where these begin, both (demos + 1, B)."""
        which = np.vstack((picks.T, np.full(len(rows), self.states)))
        return self.lengths[rows, which].astype(np.int64), self._bounds[rows, which]

    def steps(self, lengths: Ints, begins: Ints) -> tuple[Ints, Ints]:
        """Actions and next states of walks, by number: flat, one walk after the other."""
        code = self._steps[_places(begins, lengths, 1)].astype(np.int64)
        return code >> SHIFT, code & _STATE

    def query(self, rows: Ints) -> Query:
        """Every step of the query walks."""
        lengths, begins = self.lengths[rows, -1].astype(np.int64), self._bounds[rows, -1]
        action, after = self.steps(lengths, begins)
        row = np.repeat(rows, lengths)
        shape = (len(rows), int(lengths.max()))
        inside = np.arange(shape[1]) < lengths[:, None]
        states, actions, next_states = (np.full(shape, PAD, np.int64) for _ in range(3))
        actions[inside] = self.action_ids[row, action]
        next_states[inside] = self.state_ids[row, after]
        states[:, 1:] = next_states[:, :-1]
        states[:, 0] = self.state_ids[rows, self.query_starts[rows]]
        states[~inside] = PAD
        return Query(states, actions, next_states, lengths)

    def next_tokens(self, rows: Ints) -> Ints:
        """Which state follows, all as tokens: (B, N_STATES, N_ACTIONS), at [state, action - FIRST_ACTION].

        PAD where the machine has no such state or action. It lets a model run on what it says itself.
        """
        found = np.full((len(rows), N_STATES, N_ACTIONS), PAD, np.int64)
        sample = np.arange(len(rows))[:, None, None]
        state, action = self.state_ids[rows][:, :, None], self.action_ids[rows][:, None, :] - FIRST_ACTION
        after = np.take_along_axis(self.state_ids[rows], self.tables[rows].reshape(len(rows), -1).astype(np.int64), 1)
        found[sample, state, action] = after.reshape(self.tables[rows].shape)
        return found

    def absorbs(self, rows: Ints) -> NDArray[np.bool_]:
        """Which states keep every action to themselves, by number: (B, S). In any machine one may by accident."""
        found: NDArray[np.bool_] = np.all(self.tables[rows] == np.arange(self.states)[:, None], axis=2)
        return found


def _places(begins: Ints, lengths: Ints, stride: int) -> Ints:
    """begin, begin + stride, ... of so many elements: one walk after the other, in the order of `lengths`, flat."""
    flat = lengths.ravel()
    before = np.cumsum(flat) - flat
    places: Ints = stride * np.arange(int(flat.sum())) + np.repeat(begins.ravel() - stride * before, flat)
    return places


class Dataset:
    """The three splits of one set of data, as they lie in the cache."""

    def __init__(self, name: str, found: Kept, content: Mapping[str, Any]) -> None:
        arrays = found.arrays
        self.name = name
        self.folder = found.folder
        self.sha256 = found.sha256  # of the content of all arrays
        lengths = arrays["lengths"].ravel().astype(np.int64)
        bounds = (np.cumsum(lengths) - lengths).reshape(arrays["lengths"].shape)
        self._scores: dict[str, Scores] = {}
        self._splits, begin = {}, 0
        for split in SPLITS:
            rows = slice(begin, begin + content[f"n_{split}"])
            self._splits[split] = Split(split, arrays, rows, bounds, content["demos"])
            begin = rows.stop
        self.longest = _longest(arrays["lengths"], content["demos"])  # tokens of the longest sequence that can occur

    def __getitem__(self, split: str) -> Split:
        return self._splits[split]

    @property
    def train(self) -> Split:
        """What is trained on."""
        return self._splits["train"]

    @property
    def val(self) -> Split:
        """What the best checkpoint is chosen by."""
        return self._splits["val"]

    @property
    def test(self) -> Split:
        """What nothing is chosen by."""
        return self._splits["test"]

    def scores(self, split: str) -> Scores:
        """What shortcuts and the solver reach with the picks that evaluation shows; kept beside the data."""
        from rnnq.families.fsm import baselines

        if split not in self._scores:
            self._scores[split] = baselines.kept_scores(self[split], self.folder)
        return self._scores[split]

    def ceiling(self, split: str) -> float:
        """The accuracy of the teacher-forced solver that knows the demonstrations only."""
        return self.scores(split).ceiling

    def shortcut(self, split: str) -> float:
        """The accuracy of the best of the shortcuts U, A and S."""
        return self.scores(split).shortcut


def _longest(lengths: NDArray[Any], demos: int) -> int:
    shown = np.sort(lengths[:, :-1].astype(np.int64), axis=1)[:, -demos:].sum(1)
    return int((2 * (shown + lengths[:, -1])).max()) + 2 * demos + 3


def max_length(config: Machines) -> int:
    """Tokens of the longest sequence that can occur, whichever demonstrations are shown. Makes the data if need be."""
    return load(config).longest


# --------------------------------------------------------------------------------------------------- the cache

_lock = threading.Lock()
_loaded: dict[str, Dataset] = {}  # by their key and the cache folder


def load(config: Machines) -> Dataset:
    """The data of a config: from this process, else from the cache folder, else made. Raises DataError."""
    with _lock:
        where = _folder(config)
        if str(where) not in _loaded:
            _loaded[str(where)] = _opened(config, where)
        return _loaded[str(where)]


@functools.lru_cache(maxsize=4096)  # `init` asks for each of its configs
def _key(content: str) -> str:
    return hashlib.sha256(f"fsm {_FORMAT} {content}".encode()).hexdigest()[:16]


def _folder(config: Machines) -> Path:
    name = config.data_name().replace(" ", "-").replace("/", "-")
    return data.cache_folder() / "fsm" / f"{name}-{_key(as_json(config.content()))}"


def _opened(config: Machines, folder: Path) -> Dataset:
    """From the folder; made anew when it is not there, or damaged."""
    what = f"the data {config.data_name()}"

    def make(aside: Path) -> None:
        with Telling(f"making {what} ({config.samples():,} samples) in {folder}") as tell:
            for name, array in build(config, tell).items():
                kept.write(aside, name, array)

    content = config.content()
    return Dataset(f"{config.data_name()} {folder.name[-8:]}", kept.arrays(folder, what, content, make), content)


# ---------------------------------------------------------------------------------------------------- making


def build(config: Machines, tell: Tell = lambda done: None) -> dict[str, NDArray[Any]]:
    """All arrays of a set of data, the splits one after the other. Raises DataError when there is no such set."""
    made = _stream(config, tell) if config.data_split == "stream" else _disjoint(config, tell)
    if config.permute_tokens:
        made["ids"] = np.concatenate([_ids(config, split) for split in SPLITS])
    return made


def _stream(config: Machines, tell: Tell) -> dict[str, NDArray[Any]]:
    """As the published study makes them: three Mersenne twisters, one seed, the splits one after the other."""
    seed, n, states, actions = config.data_seed, config.samples(), config.states, config.actions
    tables, order = machines.stream_machines(seed, n, states, actions, config.absorbing, _between(tell, 0.0, 0.4))
    lengths, starts = machines.stream_lengths(seed, n, states, config.base_lengths(), config.length_variation)
    choices = machines.Mersenne(seed).below(actions, int(lengths.sum()))
    steps = machines.walk(tables, order, lengths, starts, choices, _between(tell, 0.4, 1.0))
    picks = [machines.stream_picks(seed, _n(config, split), states, config.demos) for split in SPLITS]
    return _arrays(tables, lengths, starts, steps, np.concatenate(picks))


def _disjoint(config: Machines, tell: Tell) -> dict[str, NDArray[Any]]:
    """Machines by splits, then walks, each split from streams of its own."""
    tables = machine_splits(config, _between(tell, 0.0, 0.4))
    made = []
    for number, split in enumerate(SPLITS):
        made.append(_walked(config, split, tables[split], _between(tell, 0.4 + 0.2 * number, 0.6 + 0.2 * number)))
    return {name: np.concatenate([one[name] for one in made]) for name in made[0]}


def _between(tell: Tell, low: float, high: float) -> Tell:
    """Tells of a part of the work as of a part of the whole."""
    return lambda done: tell(low + done * (high - low))


def _walked(config: Machines, split: str, tables: Bytes, tell: Tell) -> dict[str, NDArray[Any]]:
    n, states, actions = tables.shape
    stream = Stream(f"fsm walks {config.data_seed} {split} {_structure(config)}")
    lengths = machines.random_lengths(stream, n, states, config.base_lengths(), config.length_variation)
    starts = stream.below(states, n)
    picks = stream.orders(n, states)[:, : config.demos]
    choices = stream.below(actions, int(lengths.sum()))
    order = np.broadcast_to(np.arange(actions, dtype=np.uint8), tables.shape)
    steps = machines.walk(tables, order, lengths, starts, choices, tell)
    return _arrays(tables, lengths, starts, steps, picks)


def _arrays(tables: Bytes, lengths: Ints, starts: Bytes, steps: Bytes, picks: Bytes) -> dict[str, NDArray[Any]]:
    found = {"tables": tables, "lengths": lengths.astype(np.uint16), "starts": starts, "steps": steps, "picks": picks}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def _n(config: Machines, split: str) -> int:
    return {"train": config.n_train, "val": config.n_val, "test": config.n_test}[split]


def _structure(config: Machines) -> str:
    """What decides which machines there are, whatever their number and their walks."""
    return f"{config.states} {config.actions} {config.absorbing} {config.permute_tokens}"


def _ids(config: Machines, split: str) -> Bytes:
    """State and action tokens (n, S + A) of each sample, out of all that the vocabulary has. Row by row."""
    stream = Stream(f"fsm ids {config.data_seed} {split} {_structure(config)}")
    keys = stream.random(_n(config, split), N_STATES + N_ACTIONS)
    states = np.argsort(keys[:, :N_STATES], axis=1, kind="stable")[:, : config.states]
    actions = np.argsort(keys[:, N_STATES:], axis=1, kind="stable")[:, : config.actions] + FIRST_ACTION
    return np.concatenate((states, actions), axis=1).astype(np.uint8)


# ---------------------------------------------------------------------------------- no machine in two splits

_CANDIDATES = 4096  # machines drawn at once
_FEW = 256  # kinds of machine among the first candidates; fewer are shared out one by one
_HELD_OUT = 0.2  # of all kinds, for val and for test each


def machine_splits(config: Machines, tell: Tell = lambda done: None) -> dict[str, Bytes]:
    """The tables (n, S, A) of each split. Machines that renaming makes equal are in one split, whatever their number.

    Which one depends on data_seed and on the structure alone, not on lengths and sizes: sets of data that differ in
    these share no machine across splits either. Raises DataError when a split would have none.
    """
    seed = f"{config.data_seed} {_structure(config)}"
    stream = Stream(f"fsm machines {seed}")
    key = int.from_bytes(hashlib.sha256(f"fsm kinds {seed}".encode()).digest()[:8], "little")
    first = _candidates(stream, config)
    found, which = np.unique(machines.kinds(first, config.permute_tokens), return_inverse=True)
    if len(found) <= _FEW:
        return _shared_out(config, first, machines.parts(found, key), which)
    kept: dict[str, list[Bytes]] = {split: [] for split in SPLITS}
    tables = first
    while missing := [split for split in SPLITS if sum(map(len, kept[split])) < _n(config, split)]:
        tell(min(sum(map(len, kept[split])) / _n(config, split) for split in missing))
        part = machines.parts(machines.kinds(tables, config.permute_tokens), key)
        belongs = np.searchsorted([1 - 2 * _HELD_OUT, 1 - _HELD_OUT], part, side="right")
        for split in missing:
            kept[split].append(tables[belongs == SPLITS.index(split)])
        tables = _candidates(stream, config)
    return {split: np.concatenate(kept[split])[: _n(config, split)] for split in SPLITS}


def _candidates(stream: Stream, config: Machines) -> Bytes:
    return machines.random_machines(stream, _CANDIDATES, config.states, config.actions, config.absorbing)


def _shared_out(config: Machines, tables: Bytes, rank: NDArray[np.float64], which: Ints) -> dict[str, Bytes]:
    """Where kinds are few: a fifth of them for val, as many for test, at least one; samples draw among those."""
    count = len(rank)
    held_out = max(1, round(_HELD_OUT * count))
    if count < len(SPLITS):
        raise DataError(
            f"data_split=disjoint, {config.data_name()}: there are only {count} machines that renaming does not make "
            f"equal, too few for three splits",
            "more states or actions, or data_split=stream, where machines of training come again in val and test",
        )
    place = np.argsort(np.argsort(rank))[which]  # of each table's kind
    belongs = np.searchsorted([held_out, 2 * held_out], place, side="right")
    pools = {split: tables[belongs == number] for number, split in enumerate(("val", "test", "train"))}
    return {split: _drawn(config, split, pools[split]) for split in SPLITS}


def _drawn(config: Machines, split: str, pool: Bytes) -> Bytes:
    stream = Stream(f"fsm draws {config.data_seed} {split} {_structure(config)}")
    return pool[(stream.random(_n(config, split)) * len(pool)).astype(np.int64)]
