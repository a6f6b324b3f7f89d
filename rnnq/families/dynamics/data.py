"""Which bytes a run sees: training windows, held-out windows, and what tables of bytes alone would lose on these."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rnnq.data import Corpus
from rnnq.families.dynamics.config import HELD_OUT, DynamicsConfig

HELD_OUT_WINDOWS = 64
ADD = 0.1  # pseudo-count of each byte in the unigram and bigram tables


def part(corpus: np.ndarray, split: str) -> np.ndarray:
    """Train, val or test: the first 90, the next 5, the last 5 per cent of the bytes. A view."""
    held_out = int(len(corpus) * HELD_OUT)
    start = len(corpus) - 2 * held_out
    bounds = {"train": (0, start), "val": (start, start + held_out), "test": (start + held_out, len(corpus))}
    first, last = bounds[split]
    return corpus[first:last]


def training_windows(corpus: Corpus, config: DynamicsConfig, index: int) -> Tensor:
    """The windows that a run reads from step index · (window - 1) on: (window, batch) byte values.

    Start positions are uniform over the train part, with replacement; (seed, index) alone decides them.
    """
    train = part(corpus.bytes, "train")
    digest = hashlib.sha256(f"dynamics windows {config.seed} {index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    starts = torch.randint(0, len(train) - config.window + 1, (config.batch_size,), generator=generator)
    return _windows(train, starts.numpy(), config.window)


@lru_cache(maxsize=8)
def held_out_windows(corpus: Corpus, window: int, split: str) -> Tensor:
    """64 fixed windows, evenly spread over a held-out part: (window, 64) byte values."""
    held_out = part(corpus.bytes, split)
    starts = np.linspace(0, len(held_out) - window, HELD_OUT_WINDOWS).astype(np.int64)
    return _windows(held_out, starts, window)


def _windows(corpus: np.ndarray, starts: np.ndarray, window: int) -> Tensor:
    positions = np.arange(window)[:, None] + starts[None, :]
    return torch.from_numpy(corpus[positions]).long()


@lru_cache(maxsize=8)
def table_losses(corpus: Corpus, window: int) -> tuple[float, float]:
    """Loss in nats per byte of a unigram and of a bigram table on the very bytes that val_loss is measured on.

    The tables are counted on the train part; 0.1 is added to each count.
    """
    train = part(corpus.bytes, "train")
    pairs = _count_pairs(train)
    bigram = np.log(pairs + ADD) - np.log(pairs.sum(1, keepdims=True) + 256 * ADD)
    single = _count_bytes(pairs, train)
    unigram = np.log(single + ADD) - np.log(single.sum() + 256 * ADD)
    windows = held_out_windows(corpus, window, "val").numpy()
    before, after = windows[:-1], windows[1:]
    return -float(unigram[after].mean()), -float(bigram[before, after].mean())


def _count_bytes(pairs: np.ndarray, train: np.ndarray) -> np.ndarray:
    """How often each byte occurs: as the first of a pair, and the last of all."""
    single: np.ndarray = pairs.sum(1)
    single[train[-1]] += 1
    return single


def _count_pairs(train: np.ndarray) -> np.ndarray:
    """How often each byte follows each: (256, 256). By chunks, so that a large corpus needs little memory."""
    pairs = np.zeros(65536, np.int64)
    for start in range(0, len(train) - 1, 1 << 22):
        chunk = train[start : start + (1 << 22) + 1].astype(np.int64)
        pairs += np.bincount(chunk[:-1] * 256 + chunk[1:], minlength=65536)
    return pairs.reshape(256, 256)
