"""The coordinate check: how large activations are, and how far training moves them, by width.

Under muP the change of every activation in a few steps is as large in a wide model as in a narrow one; where it is not,
no learning rate is right for both (Yang, Hu et al. 2022, "Tensor Programs V", appendix D.1). What is trained is the
family's own net with its own optimiser, on one batch again and again, without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnq import tokens
from rnnq.config import check as check_fields
from rnnq.errors import DataError, InputError, nearest
from rnnq.families.base import Spec
from rnnq.families.scaling import nets, parametrization, text
from rnnq.families.scaling.config import ScalingConfig

Plan = tuple[str, str, int, int]  # optimiser, parametrisation, width, seed
Watch = Callable[[str, int, int], None]  # what, how much is done, of how much
Of = Callable[[Mapping[str, Tensor], Sequence[Spec]], Any]  # rnnq.optimizer.of, which no family may import

PARAMETRIZATIONS: dict[str, dict[str, Any]] = {
    "standard": {"use_mup": False},
    "mup": {"use_mup": True, "mup_rule": "correct"},
    "seed": {"use_mup": True, "mup_rule": "seed"},
}
WIDTHS = (16, 32, 64, 128, 256)
# a small vocabulary, and batches that take milliseconds; muP is the standard parametrisation at the smallest width
SETTINGS: dict[str, Any] = {
    "tokens": "bytes",
    "mup_base_width": WIDTHS[0],
    "batch_size": 8,
    "sequence_length": 32,
    "lr_schedule": "constant",
    "use_gradient_clipping": False,
}
# the config's default, and the published study's of SGD: under muP ten steps bring the loss of all widths from 5.55
# nats to 5.1 and to 4.1
RATES = {"adamw": 0.002, "adam": 0.002, "sgd": 0.1}
OPTIMIZERS = ("adamw", "sgd")
DECIDED = {
    "hidden_size": "--widths",
    "steps": "--steps",
    "seed": "--seeds",
    "use_mup": "all three parametrisations are compared",
    "mup_rule": "all three parametrisations are compared",
    "input_dropout": "there is no dropout",
    "hidden_dropout": "there is no dropout",
    "output_dropout": "there is no dropout",
}
ASKED = (
    "data_path", "tokens", "num_layers", "tie_embeddings", "use_layer_norm", "layer_norm_position", "mup_base_width",
    "readout_init", "batch_size", "sequence_length", "optimizer", "learning_rate", "momentum", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "lr_schedule", "warmup_frac", "min_lr", "min_lr_multiplier",
    "use_gradient_clipping", "gradient_clip_val",
)  # fmt: skip


class Row(NamedTuple):
    """One quantity of one model after one step: over all tokens of the batch and all its coordinates."""

    optimizer: str
    parametrization: str
    width: int
    seed: int
    step: int
    quantity: str  # embedding, layer 1 ..., logits; with its norm, where it has one
    std: float
    mean_abs: float
    change_std: float  # of the difference to step 0
    change_mean_abs: float


class Slope(NamedTuple):
    """Exponents of the width, by least squares through the logarithms of means over seeds; None: one is zero."""

    optimizer: str
    parametrization: str
    step: int
    quantity: str
    std: float | None
    change_std: float | None


def settings(changes: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What all models of a check share, and their optimisers. Raises InputError for fields that have no part in it."""
    named = {ScalingConfig.aliases.get(name, name): value for name, value in changes.items()}
    problems = [f"{name} has no place here: {DECIDED[name]}" for name in named if name in DECIDED]
    unknown = [name for name in named if name not in ASKED and name not in DECIDED]
    problems += [f"{name} is no field that the check reads" for name in unknown]
    if problems:
        raise InputError(problems, nearest(unknown[0], ASKED) if unknown else None)
    found = SETTINGS | named
    chosen = found.pop("optimizer", None)
    return found, OPTIMIZERS if chosen is None else (chosen,)


def compared(common: Mapping[str, Any]) -> tuple[str, ...]:
    """The parametrisations that these settings have: the study's knows no tied embedding."""
    return tuple(name for name in PARAMETRIZATIONS if name != "seed" or not common.get("tie_embeddings"))


def check(
    of: Of,
    common: Mapping[str, Any],
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = (0, 1, 2),
    optimizers: Sequence[str] = OPTIMIZERS,
    parametrizations: Sequence[str] | None = None,
    steps: int = 10,
    watch: Watch = lambda what, done, total: None,
) -> list[Row]:
    """Train each model for some steps and measure it before the first and after each of them.

    of: makes an optimiser, rnnq.optimizer.of; common: fields of the config, and without learning_rate that of RATES
    holds. Raises InputError, with everything that is wrong with them, and DataError.
    """
    if len(set(widths)) < 2:
        raise InputError(f"one width ({', '.join(map(str, widths))}) has no slope", "--widths 16,64,256")
    kinds = compared(common) if parametrizations is None else parametrizations
    plans: list[Plan] = list(product(optimizers, kinds, sorted(set(widths)), seeds))
    configs = _configs(common, plans, steps)
    batch = _batch(configs[0])
    rows: list[Row] = []
    for n, (plan, config) in enumerate(zip(plans, configs, strict=True)):
        watch("checking coordinates", n, len(plans))
        rows += _measured(of, plan, config, batch, steps)
    return rows


def slopes(rows: Sequence[Row], steps: Iterable[int] | None = None) -> list[Slope]:
    """A slope for each optimiser, parametrisation, step and quantity, in the order of the rows; of `steps` or all."""
    chosen = None if steps is None else set(steps)
    found: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        if chosen is None or row.step in chosen:
            found.setdefault((row.optimizer, row.parametrization, row.step, row.quantity), []).append(row)
    return [
        Slope(*key, *(_slope([(row.width, getattr(row, name)) for row in own]) for name in ("std", "change_std")))
        for key, own in found.items()
    ]


def means(points: Iterable[tuple[int, float]]) -> dict[int, float]:
    """The mean of the values of each width."""
    found: dict[int, list[float]] = {}
    for width, value in points:
        found.setdefault(width, []).append(value)
    return {width: math.fsum(values) / len(values) for width, values in found.items()}


def _slope(points: Iterable[tuple[int, float]]) -> float | None:
    of_width = means(points)
    if not all(math.isfinite(value) and value > 0 for value in of_width.values()):
        return None
    x, y = ([math.log(n) for n in numbers] for numbers in (of_width, of_width.values()))
    at, centre = math.fsum(x) / len(x), math.fsum(y) / len(y)
    return math.fsum((a - at) * (b - centre) for a, b in zip(x, y, strict=True)) / math.fsum((a - at) ** 2 for a in x)


def _configs(common: Mapping[str, Any], plans: Sequence[Plan], steps: int) -> list[ScalingConfig]:
    """A config for each plan. Raises InputError with all that is wrong, each thing once."""
    found, problems = [], []
    for name, kind, width, seed in plans:
        still = {"input_dropout": 0.0, "hidden_dropout": 0.0, "output_dropout": 0.0}
        fixed = {"optimizer": name, "hidden_size": width, "seed": seed, "steps": max(1, steps)} | still
        rate = {"learning_rate": RATES.get(name, 0.002)}
        config, wrong = check_fields(ScalingConfig, rate | dict(common) | fixed | PARAMETRIZATIONS[kind])
        problems += [problem for problem in wrong if problem not in problems]
        if isinstance(config, ScalingConfig):
            found.append(config)
    if problems:
        raise InputError(problems)
    return found


def _batch(config: ScalingConfig) -> tuple[Tensor, Tensor]:
    """Tokens and those that follow them, (B, T): the beginnings of batch_size streams. Raises DataError."""
    found = tokens.load(config.data_path, config.tokens)
    first, last = text.parts(config, found).train
    apart = (last - first) // config.batch_size
    if apart <= config.sequence_length:
        least = config.batch_size * (config.sequence_length + 1)
        raise DataError(f"the training text has {last - first:,} tokens; the batch of the check needs {least:,}")
    starts = [first + row * apart for row in range(config.batch_size)]
    rows = [torch.as_tensor(found.ids[at : at + config.sequence_length + 1].astype("int64")) for at in starts]
    streams = torch.stack(rows)
    return streams[:, :-1], streams[:, 1:]


def _measured(of: Of, plan: Plan, config: ScalingConfig, batch: tuple[Tensor, Tensor], steps: int) -> list[Row]:
    """The rows of one model."""
    drawn = parametrization.draw(config, torch.Generator().manual_seed(config.seed))
    params = {name: p[None].requires_grad_() for name, p in drawn.items()}  # the optimiser has an axis of members
    updates = of(params, [parametrization.spec(config)])
    rows: list[Row] = []
    start: dict[str, Tensor] = {}
    for step in range(steps + 1):
        alone = {name: p[0] for name, p in params.items()}
        now = _activations(config, alone, batch[0])
        start = start or now
        rows += [Row(*plan, step, name, *_sizes(x), *_sizes(x - start[name])) for name, x in now.items()]
        if step < steps:
            loss, _ = nets.loss(config, alone, *batch, {})
            gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            updates.update(gradients, done=[step])
    return rows


@torch.no_grad()
def _activations(config: ScalingConfig, params: Mapping[str, Tensor], read: Tensor) -> dict[str, Tensor]:
    """What each layer says of each token, and the logits. A layer is seen by a net that ends there."""
    found: dict[str, Tensor] = {}
    x = read
    for layer in range(config.num_layers + 1):
        x, _ = nets.features(config.model_copy(update={"num_layers": layer}), params, read, {})
        found[f"layer {layer}" if layer else "embedding"] = x
    return found | {"logits": nets.said(config, params, x)}


def _sizes(x: Tensor) -> tuple[float, float]:
    """Standard deviation and mean absolute value."""
    return float(x.std(correction=0)), float(x.abs().mean())
