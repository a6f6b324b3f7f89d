"""The family: recurrent nets and a transformer that learn from a few walks how an unknown automaton goes on.

Plain recurrent nets stand side by side in packs, K members in one loop over time; the others train one run at a time
with the library's own operations. The solver and the shortcuts take no steps and are measured as all others are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from rnnq.families.base import Adam, Curve, Family, State
from rnnq.families.fsm import batches, data, evaluation, gated, loops, transformer
from rnnq.families.fsm.batches import Batch, Feed
from rnnq.families.fsm.config import Config as AutomataConfig

NETS: dict[str, ModuleType] = {
    "lstm": gated,
    "gru": gated,
    "rnn": loops,
    "rnn_seed": loops,
    "transformer": transformer,
}

_AT_BEST = ("val_loss", "val_acc", "val_score")  # of which a summary has the last value, too


class Automata(Family):
    """In-context learning of finite automata, after Toba4366/CS182_FinalProject."""

    Config = AutomataConfig
    name: ClassVar[str] = "fsm"
    smoothing: ClassVar[tuple[float, float] | None] = (0.95, math.log(data.N_STATES))
    training_loss: ClassVar[str | None] = "loss"
    tests_best: ClassVar[bool] = True
    flushes_denormals: ClassVar[bool] = True  # a step of the small LSTM on 5s5a was six times slower

    def __init__(self) -> None:
        self._feeds: list[tuple[AutomataConfig, Feed]] = []

    def init(self, configs: Sequence[AutomataConfig]) -> State:
        """Parameters of each member from its own seed; nothing is carried from step to step."""
        drawn = [draw(config) for config in configs]
        return State({name: torch.stack([member[name] for member in drawn]) for name in drawn[0]})

    def batch(self, configs: Sequence[AutomataConfig], steps: Sequence[int]) -> Batch | None:
        """Sequences of each member, and what dropout drops."""
        if configs[0].is_baseline():
            return None
        held = [config for config, _ in self._feeds]
        if len(held) != len(configs) or any(a is not b for a, b in zip(held, configs, strict=True)):
            self._feeds = [(config, self._feed(config)) for config in configs]
        drawn = [feed.at(step) for (_, feed), step in zip(self._feeds, steps, strict=True)]
        return batches.stacked(configs, drawn, steps, NETS[configs[0].model].masks)

    @staticmethod
    def _feed(config: AutomataConfig) -> Feed:
        dataset = data.load(config)
        return Feed(config, dataset.train, dataset.longest if config.pack_key() else None)

    def loss(self, state: State, data: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of each member, by operations that autograd follows. A baseline's is nothing."""
        if data is None:
            return state.params["embed"].sum((1, 2)), {}
        return NETS[data.config.model].losses(data.config, state.params, data), {}

    def gradients(self, state: State, data: Batch | None) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """In closed form for the plain recurrent nets, else autograd's."""
        net = None if data is None else NETS[data.config.model]
        if data is not None and net is loops:
            losses, found = loops.gradients(data.config, state.params, data)
            return losses, dict(found), {}
        with torch.enable_grad():
            losses, _ = self.loss(state, data)
            given = torch.autograd.grad(losses.sum(), list(state.params.values()))
        return losses.detach(), dict(zip(state.params, given, strict=True)), {}

    def evaluate(self, state: State, configs: Sequence[AutomataConfig], split: str) -> list[dict[str, float]]:
        """Loss, accuracies and the score, told the true states; accuracies on what it says itself."""
        config = configs[0]
        dataset = data.load(config)
        if config.is_baseline():
            found = [evaluation.measure_baseline(config, dataset, split)]
        else:
            net: Any = NETS[config.model]
            found = evaluation.measure(config, net, state.params, dataset, split)
        return [{f"{split}_{name}": value for name, value in metrics.items()} for metrics in found]

    def optimizer(self, config: AutomataConfig) -> Adam:
        """AdamW, the gradient of each member clipped by its own norm."""
        return Adam(config.lr, weight_decay=config.weight_decay, decoupled=True, clip=config.clip)

    def is_enough(self, config: AutomataConfig, curve: Curve) -> bool:
        """Below stop_below again, more than stop_after evaluations after it was so first, or then if that is 0."""
        if config.stop_below is None:
            return False
        below = [value < config.stop_below for name, _, value in curve if name == "val_loss"]
        return bool(below) and below[-1] and len(below) - below.index(True) > config.stop_after

    def summary(self, config: AutomataConfig, curve: Curve) -> dict[str, Any]:
        """val_* of the best checkpoint, as test_* are; the last of the most important beside them."""
        found = super().summary(config, curve)
        losses = [(value, step) for name, step, value in curve if name == "val_loss" and math.isfinite(value)]
        if losses:
            best = min(losses)[1]  # of equal ones the first
            found |= {f"{name}_last": found[name] for name in _AT_BEST if name in found}
            found |= {name: value for name, step, value in curve if step == best and name.startswith("val_")}
            found["best_step"] = best
        dataset = data.load(config)
        for split in ("val", "test"):
            found |= {f"{split}_shortcut": dataset.shortcut(split), f"{split}_ceiling": dataset.ceiling(split)}
        return found | {"parameters": parameter_count(config)}


def draw(config: AutomataConfig) -> dict[str, Tensor]:
    """One member's parameters from its seed, without the axis of members. A baseline has one that means nothing."""
    if config.is_baseline():
        return {"embed": torch.zeros(1, 1)}
    drawn: dict[str, Tensor] = NETS[config.model].draw(config, torch.Generator().manual_seed(config.seed))
    return drawn


def parameter_count(config: AutomataConfig) -> int:
    """Numbers that are learnt."""
    return 0 if config.is_baseline() else sum(tensor.numel() for tensor in draw(config).values())


@torch.no_grad()
def hidden_states(config: AutomataConfig, params: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """What a net holds after each token, without dropout: (B, T) -> (B, T, D) each.

    "h1" is the hidden state of the first layer, or what that layer of a transformer puts out, "c1" the cell of an
    LSTM's, "embed" the embedded token. `params` are those of one run, as a checkpoint has them: with a leading axis of
    one. The state that says the token at place t of the targets stands at t.
    """
    found: dict[str, Tensor] = NETS[config.model].layers(config, params, tokens.t())
    return {name: states[0].transpose(0, 1) for name, states in found.items()}
