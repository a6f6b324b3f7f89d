"""What training reads at a step, and what held-out loss is measured on: tokens cut out of the corpus' array.

The training text is cut in batch_size streams of equal length. Micro-batch j of a pass reads columns jT to (j + 1) T of
all of them: so what is carried from one to the next belongs to the text that follows. A pass over, the next begins at
the beginning, and with zero states. Now and then states are zeroed in between (streaming_reset_prob): a net that never
meets zero states again after its first step may come to need cells that have counted for thousands of tokens, and is
then lost on a text that begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rnnq import tokens
from rnnq.families import chance
from rnnq.families.device import brought
from rnnq.families.scaling import nets, text

if TYPE_CHECKING:
    from rnnq.families.scaling.config import ScalingConfig
    from rnnq.tokens import Tokens

WINDOW = 128  # tokens of each stream that an evaluation reads at once


@dataclass(frozen=True)
class Window:
    """What a gradient goes back through: W tokens of each stream, and which follow each."""

    config: ScalingConfig
    tokens: Tensor  # (B, W)
    targets: Tensor  # (B, W)
    fresh: bool  # nothing is carried to here
    masks: dict[str, Tensor]  # (B, h) each; see nets.features


@dataclass(frozen=True)
class Batch:
    """All micro-batches of one optimiser step."""

    config: ScalingConfig
    tokens: Tensor  # (micro-batches, B, T + 1): the last one of each is only a target
    fresh: tuple[bool, ...]  # of each micro-batch
    masks: dict[str, Tensor]  # (windows, B, h) each

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for the copy."""
        masks = {name: brought(mask, device) for name, mask in self.masks.items()}
        return replace(self, tokens=brought(self.tokens, device), masks=masks)

    def share(self, rank: int, ranks: int) -> Batch:
        """The rows that one process of several reads."""
        mine = rows(self.tokens.shape[1], rank, ranks)
        return replace(self, tokens=self.tokens[:, mine], masks={name: m[:, mine] for name, m in self.masks.items()})

    def windows(self) -> Iterator[Window]:
        """The parts that are gone through one after the other."""
        width = width_of(self.config)
        number = 0
        for read, is_fresh in zip(self.tokens, self.fresh, strict=True):
            for first in range(0, read.shape[1] - 1, width):
                seen = read[:, first : first + width + 1]
                masks = {name: mask[number] for name, mask in self.masks.items()}
                yield Window(self.config, seen[:, :-1], seen[:, 1:], is_fresh and first == 0, masks)
                number += 1


def width_of(config: ScalingConfig) -> int:
    """W: how many tokens a gradient goes back."""
    return config.tbptt_length or config.sequence_length


def rows(streams: int, rank: int, ranks: int) -> slice:
    """Which streams are those of one process of several; they are equally many."""
    each = streams // ranks
    return slice(rank * each, (rank + 1) * each)


class Streams:
    """The training text of a config, as rows: (B, n), a view of what the corpus' file holds."""

    def __init__(self, config: ScalingConfig) -> None:
        found = tokens.load(config.data_path, config.tokens)
        first, last = text.parts(config, found).train
        length = (last - first) // config.batch_size
        self.config = config
        self.rows = found.ids[first : first + length * config.batch_size].reshape(config.batch_size, length)
        self.windows = text.windows_of(config, last - first)

    def at(self, step: int) -> Batch:
        """What an optimiser step reads, and what it drops: a function of (config, step)."""
        config = self.config
        first = step * config.gradient_accumulation_steps
        places = [j % self.windows for j in range(first, first + config.gradient_accumulation_steps)]
        width = config.sequence_length
        read = [self.rows[:, place * width : (place + 1) * width + 1] for place in places]
        ids = torch.from_numpy(np.stack(read).astype(np.int64))
        fresh = tuple(place == 0 or is_reset(config, first + k) for k, place in enumerate(places))
        return Batch(config, ids, fresh, masks(config, step))


def is_reset(config: ScalingConfig, micro_batch: int) -> bool:
    """Whether all states are zeroed before a micro-batch, of all of the run; from (seed, micro_batch) alone."""
    digest = hashlib.sha256(f"scaling reset {config.seed} {micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < config.streaming_reset_prob * 2**64


def masks(config: ScalingConfig, step: int) -> dict[str, Tensor]:
    """What is kept in each window of a step, (windows, B, h): zero, or one over the part that is kept.

    From (seed, step) alone, and for all streams, whoever reads which of them.
    """
    generator = chance.generator(f"scaling dropout {config.seed} {step}")
    number = config.gradient_accumulation_steps * config.sequence_length // width_of(config)
    shape = (number, config.batch_size, config.hidden_size)
    return {
        place: (torch.rand(shape, generator=generator) >= part).float().div_(1 - part)
        for place, part in nets.dropouts(config).items()
    }


# ------------------------------------------------------------------------------------------------------- held-out text


@dataclass(frozen=True)
class HeldOut:
    """All tokens of a held-out part but its first, to be said by the one before: 32 streams side by side.

    Streams are equally long but for one token, of which the weight is zero where there is none.
    """

    tokens: Tensor  # (S, L)
    targets: Tensor  # (S, L)
    weights: Tensor  # (S, L), float64
    count: int  # tokens that are said
    bytes: int  # that they stand for

    def to(self, device: torch.device) -> HeldOut:
        """The same on a device."""
        tokens, targets, weights = (part.to(device) for part in (self.tokens, self.targets, self.weights))
        return replace(self, tokens=tokens, targets=targets, weights=weights)

    def windows(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, targets and weights, some columns at a time."""
        for first in range(0, self.tokens.shape[1], WINDOW):
            columns = slice(first, first + WINDOW)
            yield self.tokens[:, columns], self.targets[:, columns], self.weights[:, columns]


def held_out(config: ScalingConfig, split: str) -> HeldOut:
    """Val or test: a function of corpus and tokens, and of where the config cuts them."""
    found = tokens.load(config.data_path, config.tokens)
    first, last = getattr(text.parts(config, found), split)
    return _in_streams(found, first, last)


def _in_streams(found: Tokens, first: int, last: int) -> HeldOut:
    count = last - first - 1
    begins = np.linspace(first, last - 1, text.STREAMS + 1).astype(np.int64)
    lengths = np.diff(begins)
    column = np.arange(lengths.max())
    weights = column < lengths[:, None]
    places = np.where(weights, begins[:-1, None] + column, first)

    def read(at: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(found.ids[at].astype(np.int64))

    size = int(np.asarray(found.lengths)[found.ids[first + 1 : last]].sum())
    return HeldOut(read(places), read(places + 1), torch.from_numpy(weights.astype(np.float64)), count, size)
