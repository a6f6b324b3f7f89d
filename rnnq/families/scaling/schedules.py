"""How a learning rate changes over a run: factors of it, each a function of the optimiser steps done.

They multiply the rate of every group of parameters, so that a floor is the same part of each. Reaches no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rnnq.families.scaling import text

if TYPE_CHECKING:
    from rnnq.families.scaling.config import ScalingConfig


def factor(config: ScalingConfig) -> Callable[[int], float]:
    """What the learning rate is multiplied with after so many optimiser steps.

    Making it costs nothing. The first call may load the corpus and its tokens, where they say how long the run or an
    epoch is; then it raises DataError as `text.check` does.
    """
    return Factor(config)


@dataclass(frozen=True)
class Factor:
    """With S steps in all, the first w of them a warm-up, and r the floor as a part of the rate:

    cosine         r + (1 - r) (1 + cos(pi t / S)) / 2
    cosine_warmup  t / w up to w = max(1, int(S warmup_frac)); then as cosine from w to S
    linear_warmup  t / w up to w = int(S warmup_frac); then on a line to 0 at S
    inverse_sqrt   t / w up to that w, then sqrt(w / t); constant where w is 0
    step           gamma ** (epochs done // step_size)

    The first step of a warm-up has the rate of the second: at t = 0 it would change nothing.
    Source: hansgundlach/Experimental_Progress.
    """

    config: ScalingConfig

    def __call__(self, done: int) -> float:
        """The factor after so many steps."""
        match self.config.lr_schedule:
            case "cosine":
                return self._cosine(done, 0)
            case "cosine_warmup":
                w = max(1, self._warmup)
                return max(1, done) / w if done < w else self._cosine(done, w)
            case "linear_warmup":
                w = self._warmup
                return max(1, done) / w if done < w else 1 - self._part(done, w)
            case "inverse_sqrt":
                w = self._warmup
                return max(1, done) / w if done < w else math.sqrt(w / done) if w else 1.0
            case "step":
                return self.config.gamma ** (self._epochs(done) // self.config.step_size)
        return 1.0

    def _cosine(self, done: int, warmup: int) -> float:
        return self._floor + (1 - self._floor) * 0.5 * (1 + math.cos(math.pi * self._part(done, warmup)))

    def _part(self, done: int, warmup: int) -> float:
        """How much is behind of the steps after the warm-up."""
        return min(1.0, (done - warmup) / max(1, self._total - warmup))

    def _epochs(self, done: int) -> int:
        return done * self.config.gradient_accumulation_steps // self._windows

    @cached_property
    def _total(self) -> int:
        return self.config.steps_total()

    @cached_property
    def _windows(self) -> int:
        return max(1, text.windows(self.config))

    @property
    def _warmup(self) -> int:
        return int(self._total * self.config.warmup_frac)

    @property
    def _floor(self) -> float:
        part = self.config.min_lr_multiplier
        return self.config.min_lr / self.config.learning_rate if part is None else part
