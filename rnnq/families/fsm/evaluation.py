"""How right a model is on held-out samples: per token and per sample, told the true states and on its own.

Every model, learnt or not, is measured by the same tallies. Samples and the demonstrations that they show are fixed:
the same weights give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnnq.families.base import State
from rnnq.families.fsm import baselines, batches
from rnnq.families.fsm.batches import Drawn
from rnnq.families.fsm.config import PARTS, Config
from rnnq.families.fsm.data import PAD, Dataset, Split

Ints = NDArray[np.int64]
Params = dict[str, Tensor]

ELEMENTS = 2**22  # numbers that the states of one layer may have, of one member: what is measured at once
MOST = 256  # sequences at once: more are no quicker


class Net(Protocol):
    """What evaluation needs of a model; see loops.py for the shapes."""

    def logits(self, config: Config, params: Params, tokens: Tensor, places: Tensor) -> Tensor:
        """What is said at some places."""

    def begin(self, config: Config, params: Params, tokens: Tensor, more: int) -> State:
        """What is carried behind a beginning."""

    def step(self, config: Config, state: State, tokens: Tensor) -> Tensor:
        """What is said after one token further."""


@dataclass
class Tally:
    """Sums over samples, of K members: each (K,)."""

    tokens: int = 0
    samples: int = 0
    tokens_outside: int = 0
    right: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    all_right: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    right_outside: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    tokens_at: NDArray[np.int64] = field(default_factory=lambda: np.zeros(PARTS, np.int64))  # by part of the query
    right_at: NDArray[np.float64] = field(default_factory=lambda: np.zeros((PARTS, 1)))

    def add(self, said: Ints, answers: Ints, asked: NDArray[np.bool_], outside: NDArray[np.bool_]) -> None:
        """What was said: (K, B, L), all others (B, L). Only what was asked counts."""
        right = (said == answers) & asked
        self.tokens += int(asked.sum())
        self.samples += len(asked)
        self.tokens_outside += int((asked & outside).sum())
        self.right = self.right + right.sum((1, 2))
        self.all_right = self.all_right + (right | ~asked).all(2).sum(1)
        self.right_outside = self.right_outside + (right & outside).sum((1, 2))
        part = PARTS * np.arange(asked.shape[1]) // np.maximum(1, asked.sum(1, keepdims=True))
        parts = [asked & (part == number) for number in range(PARTS)]
        self.tokens_at = self.tokens_at + np.array([own.sum() for own in parts], np.int64)
        self.right_at = self.right_at + np.stack([(right & own).sum((1, 2)) for own in parts])


def measure(config: Config, net: Net, params: Params, dataset: Dataset, split: str) -> list[dict[str, float]]:
    """The metrics of each member, without the split in their names."""
    part, device = dataset[split], params["embed"].device
    members = len(params["embed"])
    tally, loss = Tally(), torch.zeros(members, dtype=torch.float64, device=device)
    for rows in _chunks(config, dataset, part, part.n):
        found = batches.drawn(part, rows, part.picks(rows))
        said = net.logits(config, params, _tokens(found, device), torch.from_numpy(found.places).to(device))
        answers, asked = (torch.from_numpy(each).to(device) for each in (found.answers, found.asked))
        likely = torch.log_softmax(said, -1).gather(-1, answers.expand(members, -1, -1)[..., None])[..., 0]
        loss -= torch.where(asked, likely, 0.0).sum((1, 2), dtype=torch.float64)
        tally.add(said.argmax(-1).cpu().numpy(), found.answers, found.asked, outside(part, rows))
    measured = _shares(config, tally, dataset, split)
    for metrics, total in zip(measured, loss.tolist(), strict=True):
        metrics["loss"] = total / tally.tokens
    if config.open_samples:
        for metrics, more in zip(measured, _alone(config, net, params, dataset, split), strict=True):
            metrics |= more
    return measured


def measure_baseline(config: Config, dataset: Dataset, split: str) -> dict[str, float]:
    """The same of a model that has nothing to learn.

    The solver says states and no probabilities, so it has no loss; a shortcut that feeds on what it said itself is
    nothing that anybody means.
    """
    part = dataset[split]
    rows = np.arange(part.n)
    picks = part.picks(rows)
    scores = dataset.scores(split)
    if config.model == "solver":
        said = baselines.solver_predictions(part, rows, picks)
        losses = {}
    else:
        name = config.model[-1]
        said = baselines.shortcut_predictions(part, rows, picks, name.upper())  # type: ignore[arg-type]
        losses = {"loss": float(getattr(scores, f"{name}_loss"))}
    [measured] = _shares(config, _tally(part, rows, said), dataset, split)
    if config.model == "solver" and config.open_samples:
        some = rows[: config.open_samples]
        own = baselines.solver_predictions(part, some, picks[: len(some)], open_loop=True)
        measured |= _open_shares(_tally(part, some, own))[0]
    return measured | losses


def _tally(part: Split, rows: Ints, said: Ints) -> Tally:
    tally, query = Tally(), part.query(rows)
    asked = query.next_states != PAD
    tally.add(said[None], query.next_states, asked, outside(part, rows))
    return tally


def _shares(config: Config, tally: Tally, dataset: Dataset, split: str) -> list[dict[str, float]]:
    found = []
    shortcut, ceiling = dataset.shortcut(split), dataset.ceiling(split)
    for k, (right, all_right, right_outside) in enumerate(
        zip(tally.right, tally.all_right, tally.right_outside, strict=True)
    ):
        share = float(right) / tally.tokens
        metrics = {"acc": share, "seq_acc": float(all_right) / tally.samples}
        if ceiling > shortcut:
            metrics["score"] = (share - shortcut) / (ceiling - shortcut)
        if config.absorbing and tally.tokens_outside:
            metrics["outside_acc"] = float(right_outside) / tally.tokens_outside
        if split == "test":
            shares = enumerate(zip(tally.right_at[:, k], tally.tokens_at, strict=True))
            metrics |= {f"acc_pos{number}": float(hits) / int(n) for number, (hits, n) in shares if n}
        found.append(metrics)
    return found


def _open_shares(tally: Tally) -> list[dict[str, float]]:
    return [
        {"open_acc": float(right) / tally.tokens, "open_seq_acc": float(all_right) / tally.samples}
        for right, all_right in zip(tally.right, tally.all_right, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------- what is shown


def _chunks(config: Config, dataset: Dataset, part: Split, n: int) -> Iterator[Ints]:
    """The first n samples, the longest first, as many at once as are quick: a number that no pack changes."""
    rows = np.arange(min(n, part.n))
    lengths, _ = part.walks(rows, part.picks(rows))
    by_length = rows[np.argsort(-lengths.sum(0), kind="stable")]
    size = max(1, min(MOST, ELEMENTS // (dataset.longest * config.d_model)))
    for begin in range(0, len(by_length), size):
        yield by_length[begin : begin + size]


def _tokens(found: Drawn, device: torch.device) -> Tensor:
    """(T, B)."""
    return torch.from_numpy(np.ascontiguousarray(found.inputs.T)).to(device)


def outside(part: Split, rows: Ints) -> NDArray[np.bool_]:
    """Which query steps start in a state that can be left: (B, L)."""
    query = part.query(rows)
    stuck = np.zeros((len(rows), PAD + 1), bool)  # by token
    np.put_along_axis(stuck, part.state_ids[rows].astype(np.int64), part.absorbs(rows), 1)
    return np.asarray(~np.take_along_axis(stuck, query.states, 1))


# --------------------------------------------------------------------------------------------- on what it says itself


def _alone(config: Config, net: Net, params: Params, dataset: Dataset, split: str) -> list[dict[str, float]]:
    """Shares where each state that was said is the next input, in place of the true one."""
    part, tally = dataset[split], Tally()
    for rows in _chunks(config, dataset, part, config.open_samples):
        found = batches.drawn(part, rows, part.picks(rows))
        said = open_loop(config, net, params, found)
        tally.add(said, found.answers, found.asked, np.ones_like(found.asked))
    return _open_shares(tally)


def open_loop(config: Config, net: Net, params: Params, found: Drawn) -> Ints:
    """What each member says at each query step when it is told nothing but the start and the actions: (K, B, L).

    All samples are walked through side by side, each from its own place: up to the first that is asked for in any of
    them what is read is given; from there on a token that some sample has said goes in instead of the true one.
    """
    device, (sequences, length) = params["embed"].device, found.inputs.shape
    places = torch.from_numpy(np.where(found.asked, found.places, length)).to(device)
    asks = torch.zeros(length + 2, sequences, dtype=torch.bool, device=device)
    asks[places.t(), torch.arange(sequences, device=device)] = True
    asks[length] = False  # there went what is not asked for
    tokens, first = _tokens(found, device), int(places.min())
    state = net.begin(config, params, tokens[:first], length - first)
    last = torch.zeros(len(params["embed"]), sequences, dtype=torch.int64, device=device)
    said = []
    for t in range(first, length):
        read = torch.where(asks[t - 1], last, tokens[t])
        last = torch.where(asks[t], net.step(config, state, read).argmax(-1), last)
        said.append(last)
    every = torch.stack(said, -1)  # (K, B, steps)
    at = torch.from_numpy(np.where(found.asked, found.places - first, 0)).to(device)
    return np.asarray(every.gather(-1, at.expand(len(every), -1, -1)).cpu().numpy())
