"""Which samples a step sees, as tensors: a pure function of (config, step).

An epoch's order comes from (seed, epoch), which demonstrations are shown from (seed, block of steps), what dropout
drops from (seed, step). Built on the raw words of PCG64, which numpy promises to keep.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnnq.families.device import brought
from rnnq.families.fsm.config import Config
from rnnq.families.fsm.data import PAD, Split

Ints = NDArray[np.int64]
Masks = Callable[[Config, tuple[int, int, int], "Chance"], list[Tensor]]  # of one member, for T, B and L

BLOCK = 32  # steps that are read at once


class Chance:
    """Random numbers from a name and some whole numbers."""

    def __init__(self, name: str, *numbers: int) -> None:
        digest = hashlib.sha256(" ".join([f"fsm {name}", *map(str, numbers)]).encode()).digest()
        self.bits = np.random.PCG64(int.from_bytes(digest, "little"))

    def order(self, n: int) -> Ints:
        """The numbers below n, shuffled."""
        found: Ints = np.argsort(self.bits.random_raw(n), kind="stable")
        return found

    def kept(self, shape: tuple[int, ...], dropout: float) -> Tensor:
        """Which numbers dropout leaves: True for a part of 1 - dropout, in whole 65,536ths."""
        count = math.prod(shape)
        words = self.bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        return torch.from_numpy(words >= _dropped(dropout)).view(shape)


def _dropped(dropout: float) -> int:
    return round(dropout * 65536)


@dataclass(frozen=True)
class Batch:
    """Sequences of K members side by side, and what is asked for in them.

    tokens    (K, T, B)        the input of each step
    places    (K, B, L)        after which step each next state is to be said
    answers   (K, B L)         which state it is
    weights   (K, B L)         one over how many are asked for, or zero where there is none
    masks     (K, T, B, D)     what dropout leaves of the embedding and of each layer but the last; and, last,
              (K, B L, D)      of what is read out
    scales    (K,)             what the rest is multiplied with
    """

    config: Config  # the sizes that all members share
    tokens: Tensor
    places: Tensor
    answers: Tensor
    weights: Tensor
    masks: tuple[Tensor, ...]
    scales: Tensor

    def flat_places(self) -> Tensor:
        """The places as rows of (K, T, B), laid flat: (K, B L)."""
        members, steps, sequences = self.tokens.shape
        row = torch.arange(sequences, device=self.places.device)[:, None]
        first = torch.arange(members, device=self.places.device)[:, None, None] * (steps * sequences)
        return (first + self.places * sequences + row).view(members, -1)

    def mask(self, number: int, out: Tensor | None = None) -> Tensor:
        """What dropout multiplies with: zero or the scale, as numbers, in `out` where one is given."""
        mask = self.masks[number]
        found = torch.empty(mask.shape, device=mask.device) if out is None else out
        return found.copy_(mask).mul_(self.scales.view(-1, *[1] * (mask.dim() - 1)))

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for the copy."""
        return Batch(
            self.config,
            brought(self.tokens, device),
            brought(self.places, device),
            brought(self.answers, device),
            brought(self.weights, device),
            tuple(brought(mask, device) for mask in self.masks),
            brought(self.scales, device),
        )


@dataclass(frozen=True)
class Drawn:
    """Sequences of one member as numpy arrays, padded to one length."""

    inputs: Ints  # (B, T)
    places: Ints  # (B, L)
    answers: Ints  # (B, L)
    asked: NDArray[np.bool_]  # (B, L)


def drawn(split: Split, rows: Ints, picks: Ints, queried: int | None = None) -> Drawn:
    """The sequences of some samples, and where their next states are asked for.

    L is `queried`, or the longest query's.
    """
    batch = split.batch(rows, picks)
    lengths = split.lengths[rows, -1].astype(np.int64)
    each = np.arange(queried or int(lengths.max()))
    asked = each < lengths[:, None]
    places = np.where(asked, batch.starts[:, None] + 2 * (each + 1), 0)
    answers = np.where(asked, np.take_along_axis(batch.targets, places, 1), 0)
    return Drawn(batch.inputs, places, answers, asked)


class Feed:
    """The training batches of one member."""

    def __init__(self, config: Config, split: Split, longest: int | None) -> None:
        self.config, self.split = config, split
        # with a width: all batches have one shape, so that members of a pack have the bits that they have alone
        self.longest = longest
        self.queried = config.lengths(config.base_lengths()[1])[1]
        self._order: tuple[int, Ints] | None = None  # of which epoch
        self._block: tuple[int, list[Drawn]] | None = None  # of which number

    def rows(self, step: int) -> Ints:
        """The samples of a step; the last batch of an epoch may be smaller."""
        epoch, place = divmod(step, self.config.steps_per_epoch())
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Chance("order", self.config.seed, epoch).order(self.split.n)
        size = self.config.batch_size
        return self._order[1][place * size : (place + 1) * size]

    def at(self, step: int) -> Drawn:
        """The sequences of a step."""
        number, place = divmod(step, BLOCK)
        if self._block is None or self._block[0] != number:
            self._block = number, self._read(number)
        return self._block[1][place]

    def _read(self, number: int) -> list[Drawn]:
        """A block of steps at once: to lay sequences out costs by the call more than by the sequence."""
        rows = [self.rows(step) for step in range(number * BLOCK, (number + 1) * BLOCK)]
        every = np.concatenate(rows)
        chance = Chance("picks", self.config.seed, number)
        picks = self.split.random_picks(every, np.random.Generator(chance.bits))
        whole = drawn(self.split, every, picks, self.queried)
        ends = np.cumsum([len(one) for one in rows]).tolist()
        return [self._cut(whole, end - len(one), end) for one, end in zip(rows, ends, strict=True)]

    def _cut(self, whole: Drawn, first: int, last: int) -> Drawn:
        """One batch of a block: as long as its longest sequence, or of the one shape that all have."""
        inputs, asked = whole.inputs[first:last], whole.asked[first:last]
        if self.longest is None:
            inputs = inputs[:, : int((inputs != PAD).sum(1).max())]
            return Drawn(inputs, whole.places[first:last], whole.answers[first:last], asked)
        more = ((0, self.config.batch_size - (last - first)), (0, 0))
        width = (0, max(0, self.longest - inputs.shape[1]))
        return Drawn(
            np.pad(inputs, (more[0], width), constant_values=PAD)[:, : self.longest],
            np.pad(whole.places[first:last], more),
            np.pad(whole.answers[first:last], more),
            np.pad(asked, more),
        )


def stacked(configs: Sequence[Config], drawn: Sequence[Drawn], steps: Sequence[int], masks: Masks) -> Batch:
    """One batch of all members, and what each of them drops at its step."""
    asked = torch.from_numpy(np.stack([one.asked.ravel() for one in drawn]))
    (sequences, queried), steps_read = drawn[0].places.shape, drawn[0].inputs.shape[1]
    shape = steps_read, sequences, queried
    kept = [
        masks(config, shape, Chance("dropout", config.seed, step)) for config, step in zip(configs, steps, strict=True)
    ]
    most = max(kept, key=len)  # a member without dropout, beside others, keeps all
    kept = [each or [torch.ones_like(mask) for mask in most] for each in kept]
    return Batch(
        configs[0],
        torch.from_numpy(np.ascontiguousarray(np.stack([one.inputs for one in drawn]).transpose(0, 2, 1))),
        torch.from_numpy(np.stack([one.places for one in drawn])),
        torch.from_numpy(np.stack([one.answers.ravel() for one in drawn])),
        asked / asked.sum(1, keepdim=True),
        tuple(torch.stack(parts) for parts in zip(*kept, strict=True)),
        torch.tensor([65536 / (65536 - _dropped(config.dropout)) for config in configs]),
    )


def masks(config: Config, shape: tuple[int, int, int], chance: Chance) -> list[Tensor]:
    """What one member of a recurrent net drops: of the embedding, of each layer but the last, of what is read out."""
    if config.dropout == 0:
        return []
    steps, sequences, queried = shape
    inner = [chance.kept((steps, sequences, config.d_model), config.dropout) for _ in range(config.n_layers)]
    return [*inner, chance.kept((sequences * queried, config.d_model), config.dropout)]
