"""What a probe reads: the states of a frozen net at some places of the sequences, and the right answers there.

The net neither learns nor drops anything, so its states are the same at every step: they are worked out once and kept,
where they take no more memory than LIMIT, and else again for each batch. Every sample shows the demonstrations that
evaluation shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnnq.families.fsm import baselines, batches, data, model
from rnnq.families.fsm.batches import Chance
from rnnq.families.fsm.data import PAD, Split
from rnnq.families.fsm.probe_config import ProbeConfig

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Nets = Mapping[str, Mapping[str, Tensor]]  # "backbone", and "control" where it is another net: their parameters

LIMIT = 2**31  # bytes that the states of one split may take
ELEMENTS = 2**22  # numbers that the states of one layer may have of the sequences that are read at once
MOST = 256  # sequences


@dataclass(frozen=True)
class Answers:
    """Of all samples of a split, one place after the other."""

    begins: Ints  # (n + 1,): where the places of each sample begin
    right: Ints  # (N, heads)
    shuffled: Ints  # the same in another order
    seen: Flags | None  # (N, heads) of a table: which cells the demonstrations show


@dataclass(frozen=True)
class Baseline:
    """What can be had with nothing but the demonstrations, and without them."""

    ceiling: float
    floor: float


class Samples:
    """The samples of one of the probe's own splits: "train", "val" or "test"."""

    def __init__(self, config: ProbeConfig, name: str) -> None:
        self.config, self.name = config, name
        split, self.rows = config.own_samples(name)
        self.split = data.load(config)[split]
        self._kept: tuple[Tensor, Tensor] | None = None  # a parameter of the net, and the states (N, F, D)

    @cached_property
    def answers(self) -> Answers:
        """What is right at each place."""
        right = [self._right(rows) for rows in self._chunks(1000)]
        counts = np.concatenate([count for count, _ in right])
        begins = np.concatenate(([0], np.cumsum(counts)))
        flat = np.concatenate([found for _, found in right])
        order = Chance(f"shuffled {self.name}", self.config.seed).order(len(flat))
        seen = np.concatenate([self._seen(rows) for rows in self._chunks(1000)]) if self._is_table() else None
        return Answers(begins, flat, flat[order], seen)

    def _is_table(self) -> bool:
        return self.config.target == "table"

    def _right(self, rows: Ints) -> tuple[Ints, Ints]:
        """How many places each sample has, and what is right there: (B,), (places, heads)."""
        if self._is_table():
            return np.ones(len(rows), np.int64), self.split.tables[rows].reshape(len(rows), -1).astype(np.int64)
        query = self.split.query(rows)
        tokens = query.next_states if self.config.target == "next_state" else query.states
        return query.lengths, tokens[tokens != PAD][:, None]

    def _seen(self, rows: Ints) -> Flags:
        return shown(self.split, rows)[0].reshape(len(rows), -1)

    @cached_property
    def baseline(self) -> Baseline:
        """Measured on the very places that the probe is measured on."""
        right = self.answers.right
        share = np.apply_along_axis(np.bincount, 0, right, minlength=self.config.classes()) / len(right)
        constant = float(share.max(0).mean())
        if self.config.target == "current_state":
            return Baseline(1.0, constant)
        if self._is_table():
            solved = [self.split.tables[rows] == _guesses(self.split, rows) for rows in self._chunks(1000)]
            return Baseline(float(np.concatenate(solved).mean()), constant)
        said: dict[str, int] = dict.fromkeys(("solver", *baselines.SHORTCUTS), 0)
        for rows in self._chunks(1000):
            picks, answers = self.split.picks(rows), self.split.query(rows).next_states
            asked = answers != PAD
            said["solver"] += _right_of(baselines.solver_predictions(self.split, rows, picks), answers, asked)
            for name in baselines.SHORTCUTS:
                found = baselines.shortcut_predictions(self.split, rows, picks, name)
                said[name] += _right_of(found, answers, asked)
        shares = {name: count / len(right) for name, count in said.items()}
        return Baseline(shares.pop("solver"), max(shares.values()))

    # ------------------------------------------------------------------------------------------------- states

    def states(self, nets: Nets, numbers: Ints) -> tuple[Tensor, Ints]:
        """At all places of some of the samples, by number: (F, N, D), and which places these are."""
        begins = self.answers.begins
        places = np.concatenate([np.arange(begins[i], begins[i + 1]) for i in numbers])
        if not self._fits():
            return self._read(nets, self.rows[numbers]).transpose(0, 1), places
        kept = self._all(nets)
        return kept.index_select(0, torch.from_numpy(places).to(kept.device)).transpose(0, 1), places

    def parts(self, nets: Nets) -> Iterator[tuple[Tensor, Ints]]:
        """The same of all samples, some at a time."""
        size = self._at_once()
        for begin in range(0, len(self.rows), size):
            yield self.states(nets, np.arange(begin, min(begin + size, len(self.rows))))

    def _fits(self) -> bool:
        nets = 1 + (self.config.control == "random_weights")
        return len(self.answers.right) * nets * len(self.config.places()) * self.config.d_model * 4 <= LIMIT

    def _all(self, nets: Nets) -> Tensor:
        """All of them, kept as long as the net is the same one: nobody ever writes into its tensors."""
        mark = nets["backbone"]["embed"]
        if self._kept is None or self._kept[0].data_ptr() != mark.data_ptr() or self._kept[0].device != mark.device:
            self._kept = None
            self._kept = mark, torch.cat([self._read(nets, rows) for rows in self._chunks(self._at_once())])
        return self._kept[1]

    def _at_once(self) -> int:
        longest = data.load(self.config).longest
        return max(1, min(MOST, ELEMENTS // (longest * self.config.d_model)))

    def _chunks(self, size: int) -> Iterator[Ints]:
        for begin in range(0, len(self.rows), size):
            yield self.rows[begin : begin + size]

    @torch.no_grad()
    def _read(self, nets: Nets, rows: Ints) -> Tensor:
        """The states of all nets at all places of some samples: (places, F, D), F over nets and what is read."""
        found = batches.drawn(self.split, rows, self.split.picks(rows))
        device = nets["backbone"]["embed"].device
        row, place = self._where(rows, found)
        at = torch.from_numpy(row).to(device), torch.from_numpy(place).to(device)
        tokens = torch.from_numpy(found.inputs).to(device)
        read = []
        for params in nets.values():
            every = model.hidden_states(self.config.backbone(0), dict(params), tokens)
            read += [every[name][at] for name in self.config.places()]
        return torch.stack(read, 1)

    def _where(self, rows: Ints, found: batches.Drawn) -> tuple[Ints, Ints]:
        """After which tokens the net is read: (places,) each."""
        if self._is_table():
            return np.arange(len(rows)), found.places[:, 0] - 2  # after the token that announces the query
        row, step = np.nonzero(found.asked)
        return row, found.places[row, step] - (self.config.target == "current_state")


def _right_of(said: Ints, answers: Ints, asked: Flags) -> int:
    return int(((said == answers) & asked).sum())


def shown(split: Split, rows: Ints) -> tuple[Flags, Ints]:
    """Which cells the demonstrations show, (B, S, A), and how often each state is visited, (B, S)."""
    picks = split.picks(rows)
    lengths, begins = split.walks(rows, picks)
    seen = np.zeros((len(rows), split.states, split.actions), bool)
    visits = np.zeros((len(rows), split.states), np.int64)
    for steps, begin, start in zip(lengths[:-1], begins[:-1], picks.T, strict=True):
        action, after = split.steps(steps, begin)
        row = np.repeat(np.arange(len(rows)), steps)
        before = np.concatenate((after[:1], after[:-1]))
        before[np.cumsum(steps) - steps] = start
        seen[row, before, action] = True
        np.add.at(visits, (row, after), 1)
        np.add.at(visits, (np.arange(len(rows)), start), 1)
    return seen, visits


def _guesses(split: Split, rows: Ints) -> Ints:
    """The table as the demonstrations show it; where they do not, the state that they visit most often."""
    seen, visits = shown(split, rows)
    return np.where(seen, split.tables[rows].astype(np.int64), visits.argmax(1)[:, None, None])
