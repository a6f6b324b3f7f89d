"""Linear probes on the frozen states of a trained net, each beside its control.

A probe that is right says that what it reads can be read off linearly; whether the net has learnt to put it there, only
the difference to a control tells: the same probe on the net as it was before it learnt, or taught shuffled answers.
Both learn side by side, from equal weights, on equal batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rnnq.families.base import Adam, Curve, Family, Parent, State, taken_over
from rnnq.families.fsm import model
from rnnq.families.fsm.batches import Chance, Ints
from rnnq.families.fsm.features import Nets, Samples
from rnnq.families.fsm.probe_config import ProbeConfig

HEAD = ("head", "head.bias")  # of the net: what it says itself, which no probe reads


@dataclass(frozen=True)
class Step:
    """Samples of one step, by number; `to` a device they go only when their states are read there."""

    config: ProbeConfig
    numbers: Ints

    def to(self, device: torch.device) -> Step:
        """Itself."""
        return replace(self)


class Probe(Family):
    """A linear probe for each layer, after the published study's, and its controls.

    P probes: those of the net, in the order of `ProbeConfig.places`, then as many of the control.
    """

    Config = ProbeConfig
    name: ClassVar[str] = "fsm_probe"
    smoothing: ClassVar[tuple[float, float] | None] = (0.95, math.log(8))
    training_loss: ClassVar[str | None] = "loss"
    tests_best: ClassVar[bool] = True
    stacks: ClassVar[bool] = False

    def __init__(self) -> None:
        self._samples: dict[str, Samples] = {}
        self._order: tuple[ProbeConfig, int, Ints] | None = None  # of which epoch

    def init(self, configs: Sequence[ProbeConfig]) -> State:
        """Probes as torch draws linear layers, those of the control equal to the net's; the net as it is drawn."""
        [config] = configs
        generator = torch.Generator().manual_seed(config.seed)
        bound, outputs = 1 / math.sqrt(config.d_model), config.heads() * config.classes()
        shape = (len(config.places()), config.d_model, outputs)
        weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(shape[0], 1, outputs).uniform_(-bound, bound, generator=generator)
        params = {"weight": torch.cat((weight, weight))[None], "bias": torch.cat((bias, bias))[None]}
        net = _drawn(config, config.seed)
        return State(params, _named("backbone", net) | self._control(config, config.seed))

    def begin(self, config: ProbeConfig, drawn: State, parent: Parent) -> State:
        """The net with the parent's weights, and the control as it was before it learnt. Raises InputError."""
        config.refuse_other_net(parent.run, parent.family, parent.config)
        theirs = {name: tensor for name, tensor in parent.params.items() if name not in HEAD}
        net = taken_over(_net(drawn, "backbone"), theirs, parent.run)
        return State(drawn.params, _named("backbone", net) | self._control(config, int(parent.config["seed"])))

    @staticmethod
    def _control(config: ProbeConfig, seed: int) -> dict[str, Tensor]:
        return _named("control", _drawn(config, seed)) if config.control == "random_weights" else {}

    def batch(self, configs: Sequence[ProbeConfig], steps: Sequence[int]) -> Step:
        """An epoch is an order of all samples that comes from (seed, epoch)."""
        [config], [step] = configs, steps
        epoch, place = divmod(step, config.steps_per_epoch())
        if self._order is None or self._order[:2] != (config, epoch):
            self._order = config, epoch, Chance("probe order", config.seed, epoch).order(config.n_val)
        return Step(config, self._order[2][place * config.batch_size : (place + 1) * config.batch_size])

    def loss(self, state: State, data: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross entropy of the probe of the top layer; its gradient is that of all probes together."""
        samples = self._of(data.config, "train")
        states, places = samples.states(_nets(state), data.numbers)
        said = _said(data.config, state, states)
        losses = functional.cross_entropy(
            said.flatten(0, 2), self._answers(samples, places, said).flatten(), reduction="none"
        )
        each = losses.view(len(said), -1).mean(1)  # no probe shares a parameter with another
        total = each.sum()
        top = data.config.places().index(data.config.top())
        return (each[top].detach() + total - total.detach())[None], state.carried

    def _of(self, config: ProbeConfig, name: str) -> Samples:
        if name not in self._samples or self._samples[name].config != config:
            self._samples[name] = Samples(config, name)
        return self._samples[name]

    @staticmethod
    def _answers(samples: Samples, places: Ints, said: Tensor) -> Tensor:
        """What each probe is to say: (P, N, heads)."""
        right = torch.from_numpy(samples.answers.right[places]).to(said.device)
        own = len(said) // 2
        other = right
        if samples.config.control == "shuffled_labels":
            other = torch.from_numpy(samples.answers.shuffled[places]).to(said.device)
        return torch.cat((right.expand(own, -1, -1), other.expand(own, -1, -1)))

    def evaluate(self, state: State, configs: Sequence[ProbeConfig], split: str) -> list[dict[str, float]]:
        """Accuracies of each probe and of its control, and how much more the former has."""
        [config] = configs
        samples = self._of(config, split)
        top, n = config.places().index(config.top()), len(config.places())
        right, loss, seen = np.zeros(2 * n), 0.0, 0.0
        for states, places in samples.parts(_nets(state)):
            said = _said(config, state, states)
            answers = self._answers(samples, places, said)
            hits = said.argmax(-1) == answers
            right += hits.sum((1, 2)).cpu().numpy()
            lost = functional.cross_entropy(said[top].flatten(0, 1), answers[top].flatten(), reduction="sum")
            loss += float(lost)
            if samples.answers.seen is not None:
                seen += float((hits[top].cpu().numpy() & samples.answers.seen[places]).sum())
        total = samples.answers.right.size
        shares = (right / total).tolist()
        found = {"loss": loss / total, "acc": shares[top], "control_acc": shares[n + top]}
        found["selectivity"] = found["acc"] - found["control_acc"]
        if samples.answers.seen is not None:
            found["seen_acc"] = seen / max(1, int(samples.answers.seen.sum()))
        found |= {"ceiling": samples.baseline.ceiling, "floor": samples.baseline.floor}
        for i, place in enumerate(config.places() if n > 1 else []):
            found |= {f"acc_{place}": shares[i], f"control_acc_{place}": shares[n + i]}
        return [{f"{split}_{name}": value for name, value in found.items()}]

    def optimizer(self, config: ProbeConfig) -> Adam:
        """AdamW on the probes alone."""
        return Adam(config.lr, weight_decay=config.weight_decay, decoupled=True)

    def summary(self, config: ProbeConfig, curve: Curve) -> dict[str, Any]:
        """val_* of the step at which the probe of the top layer has its lowest val_loss, as test_* are."""
        found = super().summary(config, curve)
        losses = [(value, step) for name, step, value in curve if name == "val_loss" and math.isfinite(value)]
        if losses:
            best = min(losses)[1]
            found |= {name: value for name, step, value in curve if step == best and name.startswith("val_")}
            found["best_step"] = best
        return found | {"parameters": config.parameters()}


def _drawn(config: ProbeConfig, seed: int) -> dict[str, Tensor]:
    """A net as `fsm` draws it, without what it says itself; with a leading axis of one."""
    drawn = model.draw(config.backbone(seed))
    return {name: tensor[None] for name, tensor in drawn.items() if name not in HEAD}


def _named(net: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{net}.{name}": tensor for name, tensor in params.items()}


def _net(state: State, net: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{net}."): t for name, t in state.carried.items() if name.startswith(f"{net}.")}


def _nets(state: State) -> Nets:
    control = _net(state, "control")
    return {"backbone": _net(state, "backbone")} | ({"control": control} if control else {})


def _said(config: ProbeConfig, state: State, states: Tensor) -> Tensor:
    """What each probe says: (F, N, D) -> (P, N, heads, classes). Probes of shuffled answers read the same states."""
    weight, bias = state.params["weight"][0], state.params["bias"][0]
    read = states if len(states) == len(weight) else torch.cat((states, states))
    return torch.baddbmm(bias, read, weight).view(len(weight), -1, config.heads(), config.classes())
