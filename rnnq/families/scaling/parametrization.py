"""What a model's weights begin with, and how fast each of them learns: three parametrisations.

standard   one rate for all; Glorot's uniform weights, orthogonal recurrent ones
muP        the maximal-update parametrisation: Yang, Hu et al. 2022, "Tensor Programs V", tables 3 (untied) and 8 (tied)
seed       what the published study called muP, as it was; for comparison. It is not muP: see docs/mup.md

With m = hidden_size / mup_base_width muP is, relative to the standard parametrisation of the base width:

    class      parameters                        scale at the start     Adam's rate   SGD's rate
    vector     embedding, gate biases, norms     as at the base width   1             m
    hidden     w_ih, w_hh                        as standard            1 / m         1
    readout    read-out's weights, untied        1 / m, or zero         1 / m         1 / m
    tied       embedding that is the read-out    as at the base width   1             m
    bias       the read-out's bias               zero                   1             1

where a tied read-out's product is multiplied with 1 / m by the net. Weight decay is divided by the rate, so that rate
times decay is the same for every class at every width: of AdamW, whose decay is multiplied with the rate, and of SGD,
where it is a part of the gradient. Adam's epsilon is divided by m, as gradients of all classes but the read-out's are
in proportion to 1 / m, and the read-out's far above it. At m = 1 all is the standard parametrisation to the bit, but
for a read-out of zeros where none was asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rnnq.families.base import SGD, Adam, Group
from rnnq.families.scaling import counts, schedules

if TYPE_CHECKING:
    from rnnq.families.scaling.config import ScalingConfig

# of muP: what a class' rate is multiplied with, as a power of m
POWERS = {
    "adam": {"vector": 0, "hidden": -1, "readout": -1, "tied": 0, "bias": 0},
    "sgd": {"vector": 1, "hidden": 0, "readout": -1, "tied": 1, "bias": 0},
}
# of the published study's rule, whatever the optimiser; its optimiser did not know the norms
SEED_POWERS = {"embedding": -1, "lstm": -1, "readout": 0}


def classes(config: ScalingConfig) -> dict[str, str]:
    """The class of each parameter: vector, hidden, readout, tied, or bias (of the read-out)."""
    return {name: _class(name, config.tie_embeddings) for name in counts.shapes(config)}


def _class(name: str, is_tied: bool) -> str:
    match name.split("."):
        case ["embedding"]:
            return "tied" if is_tied else "vector"
        case ["lstm", _, "w_ih" | "w_hh"]:
            return "hidden"
        case ["readout", "weight"]:
            return "readout"
        case ["readout", "bias"]:
            return "bias"
    return "vector"


def rates(config: ScalingConfig) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied with."""
    if not config.use_mup:
        return dict.fromkeys(counts.shapes(config), 1.0)
    m = config.width_multiplier()
    if config.mup_rule == "seed":
        parts = {name: name.partition(".")[0] for name in counts.shapes(config)}
        return {name: m ** SEED_POWERS[part] if part in SEED_POWERS else 0.0 for name, part in parts.items()}
    powers = POWERS["sgd" if config.optimizer == "sgd" else "adam"]
    return {name: m ** powers[kind] for name, kind in classes(config).items()}


def decays(config: ScalingConfig) -> dict[str, float]:
    """The weight decay of each parameter. Adam has none; under muP it times the rate is the same for all."""
    decay = 0.0 if config.optimizer == "adam" else config.weight_decay
    is_mup = config.use_mup and config.mup_rule == "correct"
    return {name: decay / rate if is_mup else decay for name, rate in rates(config).items()}


def groups(config: ScalingConfig) -> tuple[Group, ...]:
    """All parameters, each in the one group of its rate and its decay.

    The norms of mup_rule="seed" are in one of rate 0: the study's optimiser did not know them.
    """
    found: dict[tuple[float, float], list[str]] = {}
    own = decays(config)
    for name, rate in rates(config).items():
        found.setdefault((rate, own[name]), []).append(name)
    return tuple(Group(tuple(names), rate, decay) for (rate, decay), names in found.items())


def spec(config: ScalingConfig) -> Adam | SGD:
    """The optimiser of a run, with its groups, its schedule and its clip."""
    schedule = None if config.lr_schedule == "constant" else schedules.factor(config)
    clip = config.gradient_clip_val if config.use_gradient_clipping else None
    if config.optimizer == "sgd":
        return SGD(config.learning_rate, config.momentum, 0.0, clip, schedule, groups(config))
    is_mup = config.use_mup and config.mup_rule == "correct"
    eps = config.adam_epsilon / (config.width_multiplier() if is_mup else 1.0)
    betas = (config.adam_beta1, config.adam_beta2)
    return Adam(config.learning_rate, betas, eps, 0.0, True, clip, schedule, groups(config))


# ------------------------------------------------------------------------------------------- what a model begins with


def draw(config: ScalingConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Every parameter of counts.shapes at the start, without an axis of members, on the CPU.

    Norms begin as the identity, biases at zero, but for the forget gate's: 1 in each of the two that are added up.
    """
    return {name: _draw(config, name, shape, generator) for name, shape in counts.shapes(config).items()}


def _draw(config: ScalingConfig, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    match name.split("."):
        case ["lstm", _, "w_hh"]:
            return torch.nn.init.orthogonal_(torch.empty(shape), generator=generator)
        case ["lstm", _, "b_ih" | "b_hh"]:
            bias = torch.zeros(shape)
            bias[config.hidden_size : 2 * config.hidden_size] = 1.0
            return bias
        case ["readout", "weight"] if config.has_zero_readout():
            return torch.zeros(shape)
        case ["embedding"] | ["lstm", _, "w_ih"] | ["readout", "weight"]:
            bound = _bound(config, name.rpartition(".")[2])
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)
        case [*_, "weight"]:  # of a norm
            return torch.ones(shape)
    return torch.zeros(shape)


def _bound(config: ScalingConfig, kind: str) -> float:
    """b of the embedding, of w_ih, or of the read-out's weight, which are uniform from -b to b: b / sqrt(3) is their
    standard deviation. Glorot's b is sqrt(6 / (rows + columns)).
    """
    h, vocabulary = config.hidden_size, config.vocab_size()
    if config.use_mup and config.mup_rule == "seed":
        return math.sqrt(3) / h if kind == "weight" else math.sqrt(3 / h)
    if kind == "w_ih":
        return math.sqrt(6 / (4 * h + h))
    of_base = math.sqrt(6 / (vocabulary + (config.mup_base_width if config.use_mup else h)))
    return of_base / config.width_multiplier() if kind == "weight" else of_base
