"""Which tokens a run sees: training windows, held-out windows, and what tables of tokens would lose on these."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rnnq.families import chance
from rnnq.families.dynamics.config import DynamicsConfig, bounds
from rnnq.tokens import Tokens

HELD_OUT_WINDOWS = 64
ADD = 0.1  # pseudo-count of each token in the unigram and bigram tables
SMALL = 1024  # tokens of a vocabulary of which a table of all pairs is held


@lru_cache(maxsize=32)
def part(found: Tokens, split: str) -> np.ndarray:
    """The ids of train, val or test. A view."""
    first, last = bounds(found, split)
    return found.ids[first:last]


def training_windows(found: Tokens, config: DynamicsConfig, index: int) -> Tensor:
    """The windows that a run reads from step index · (window - 1) on: (window, batch) ids.

    Start positions are uniform over the train part, with replacement; (seed, index) alone decides them.
    """
    train = part(found, "train")
    generator = chance.generator(f"dynamics windows {config.seed} {index}")
    starts = torch.randint(0, len(train) - config.window + 1, (config.batch_size,), generator=generator)
    return _windows(train, starts.numpy(), config.window)


@lru_cache(maxsize=8)
def held_out_windows(found: Tokens, window: int, split: str) -> Tensor:
    """64 fixed windows, evenly spread over a held-out part: (window, 64) ids."""
    held_out = part(found, split)
    starts = np.linspace(0, len(held_out) - window, HELD_OUT_WINDOWS).astype(np.int64)
    return _windows(held_out, starts, window)


@lru_cache(maxsize=8)
def bytes_per_token(found: Tokens, window: int, split: str) -> float:
    """Of the tokens that are predicted in the held-out windows; exactly 1 of bytes."""
    predicted = held_out_windows(found, window, split)[1:].numpy()
    return float(found.lengths[predicted].sum()) / predicted.size


def _windows(ids: np.ndarray, starts: np.ndarray, window: int) -> Tensor:
    positions = np.arange(window)[:, None] + starts[None, :]
    return torch.from_numpy(ids[positions]).long()


@lru_cache(maxsize=8)
def table_losses(found: Tokens, window: int) -> tuple[float, float]:
    """Loss in nats per token of a unigram and of a bigram table on the very tokens that val_loss is measured on.

    The tables are counted on the train part; 0.1 is added to each count.
    """
    train, size = part(found, "train"), len(found.lengths)
    windows = held_out_windows(found, window, "val").numpy()
    before, after = windows[:-1], windows[1:]
    single, pairs = _counts(train, size, before, after)
    unigram = np.log(single + ADD) - np.log(single.sum() + size * ADD)
    followed = single.copy()
    followed[train[-1]] -= 1  # nothing comes after the last
    bigram = np.log(pairs + ADD) - np.log(followed + size * ADD)[before]
    return -float(unigram[after].mean()), -float(bigram.mean())


def _counts(train: np.ndarray, size: int, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each token occurs, (V,), and how often `after` follows `before`, of their shape."""
    if size <= SMALL:
        pairs = _count_pairs(train, size)
        single: np.ndarray = pairs.sum(1)
        single[train[-1]] += 1
        return single, pairs[before, after]
    wanted, where = np.unique(before.astype(np.int64) * size + after, return_inverse=True)
    return _count_wanted(train, size, wanted, where.reshape(before.shape))


def _chunks(train: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in chunks that begin with the last of the one before: a large corpus needs little memory."""
    for start in range(0, len(train) - 1, 1 << 22):
        yield train[start : start + (1 << 22) + 1].astype(np.int64)


def _count_pairs(train: np.ndarray, size: int = 256) -> np.ndarray:
    """How often each token follows each: (V, V)."""
    pairs = np.zeros(size * size, np.int64)
    for chunk in _chunks(train):
        pairs += np.bincount(chunk[:-1] * size + chunk[1:], minlength=size * size)
    return pairs.reshape(size, size)


def _count_wanted(train: np.ndarray, size: int, wanted: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same without a table of all pairs: `wanted` are first · V + second of some, ascending, `where` theirs."""
    single, found = np.bincount(train[:1], minlength=size), np.zeros(len(wanted), np.int64)
    for chunk in _chunks(train):
        single += np.bincount(chunk[1:], minlength=size)
        pairs = chunk[:-1] * size + chunk[1:]
        at = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
        found += np.bincount(at[wanted[at] == pairs], minlength=len(wanted))
    return single, found[where]
