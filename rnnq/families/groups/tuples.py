"""Which tuples of elements a run sees at a step: a pure function of its config, its seed and the step.

Online, each step draws its own. Offline, there is a set, of which each epoch sees all in an order of its own. A last
batch that is short is filled up with tuples that count nothing, so that members of a pack need not keep step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rnnq.families import chance
from rnnq.families.groups.config import GroupsConfig

NUMBERS = 1 << 16  # elements that are drawn at once: to begin a generator costs more than to draw from it
BLOCK = 64  # steps that are drawn at once, at most
EVERY = 4096  # tuples: where there are no more, a net is measured on all of them
HELD_OUT = 1024  # else on so many


def generator(config: GroupsConfig, what: str, index: int) -> torch.Generator:
    """Random numbers for one purpose of one run, of which none else has any."""
    return chance.generator(f"groups {what} {config.tuples_seed()} {index}")


def block_steps(config: GroupsConfig) -> int:
    """Steps whose tuples are drawn at once."""
    return max(1, min(BLOCK, NUMBERS // (config.data.batch_size * config.data.k)))


def block(config: GroupsConfig, index: int) -> tuple[Tensor, Tensor | None]:
    """The tuples of steps index · s ... (index + 1) · s - 1, with s = block_steps: (s, B, k).

    And which of them count, (s, B), 1 or 0, where not all do.
    """
    steps, batch, k = block_steps(config), config.data.batch_size, config.data.k
    if config.training.mode == "online":
        drawn = generator(config, "tuples", index)
        return torch.randint(0, config.order(), (steps, batch, k), generator=drawn), None
    found = [_of_an_epoch(config, step) for step in range(index * steps, (index + 1) * steps)]
    places, counts = (torch.stack(parts) for parts in zip(*found, strict=True))
    every = training_set(config)[places]
    return every, None if config.training_tuples() % batch == 0 else counts


def _of_an_epoch(config: GroupsConfig, step: int) -> tuple[Tensor, Tensor]:
    """Places in the training set, (B,), and which of them count."""
    epoch, at = divmod(step, config.steps_an_epoch())
    batch = config.data.batch_size
    places = _order(config, epoch)[at * batch : (at + 1) * batch]
    counts = torch.zeros(batch)
    counts[: len(places)] = 1
    return torch.cat((places, places.new_zeros(batch - len(places)))), counts


@lru_cache(maxsize=64)
def _order(config: GroupsConfig, epoch: int) -> Tensor:
    return torch.randperm(config.training_tuples(), generator=generator(config, "order", epoch))


@lru_cache(maxsize=64)
def training_set(config: GroupsConfig) -> Tensor:
    """The tuples of an offline run, (N, k)."""
    if config.data.mode == "sampled":
        size = (config.training_tuples(), config.data.k)
        return torch.randint(0, config.order(), size, generator=generator(config, "set", 0))
    return _every(config.order(), config.data.k)[_chosen(config)[config.held_out_tuples() :]]


@lru_cache(maxsize=64)
def _chosen(config: GroupsConfig) -> Tensor:
    """Places among all tuples: first those that are held out, then those to train on."""
    total = config.tuples()
    if config.chosen_tuples() == total and not config.held_out_tuples():
        return torch.arange(total)
    return torch.randperm(total, generator=generator(config, "held out", 0))[: config.chosen_tuples()]


@lru_cache(maxsize=8)
def _every(n: int, k: int) -> Tensor:
    """All tuples, the last element varying fastest: (n^k, k)."""
    places = np.indices((n,) * k).reshape(k, -1).T
    return torch.from_numpy(np.ascontiguousarray(places))


@lru_cache(maxsize=64)
def measured(config: GroupsConfig, split: str) -> Tensor:
    """The tuples that a net is measured on, (V, k), the same at every step.

    Those that are held out, where some are; else all, where they are few; else a sample of all, "val" and "test" each
    its own. Of many that are held out it is a sample, too.
    """
    n, k = config.order(), config.data.k
    held_out = config.held_out_tuples() if config.data.mode == "exhaustive" else 0
    if held_out:
        places = _chosen(config)[:held_out]
        if held_out > EVERY:
            places = places[torch.randperm(held_out, generator=generator(config, split, 0))[:HELD_OUT]]
        return _every(n, k)[places]
    if config.tuples() <= EVERY:
        return _every(n, k)
    return torch.randint(0, n, (HELD_OUT, k), generator=generator(config, split, 0))
