"""What all models have in common: the embedding before them, and the layer behind them that says the next state."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rnnq.families.fsm.batches import Batch
from rnnq.families.fsm.config import Config
from rnnq.families.fsm.data import VOCABULARY


def draw_embedding(size: int, generator: torch.Generator) -> Tensor:
    """Normal, with a standard deviation of 0.02: (V, D)."""
    return 0.02 * torch.randn(VOCABULARY, size, generator=generator)


def draw_head(config: Config, generator: torch.Generator) -> Tensor:
    """Xavier normal: (D, C)."""
    inputs, outputs = config.d_model, config.classes()
    return torch.randn(inputs, outputs, generator=generator) * math.sqrt(2 / (inputs + outputs))


def losses(head: Tensor, features: Tensor, batch: Batch, bias: Tensor | None = None) -> Tensor:
    """Mean cross entropy over all next states that are asked for: (K, D, C), (K, B L, D) -> (K,).

    Weights are 1/n, or zero where nothing is asked for: so that every batch has one shape.
    """
    if batch.masks:
        features = features * batch.mask(-1)
    said = torch.bmm(features, head)
    said = said if bias is None else said + bias
    likely = functional.log_softmax(said, -1)
    return -(likely.gather(-1, batch.answers[..., None])[..., 0] * batch.weights).sum(1)


def gradients(head: Tensor, features: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The losses (K,), the gradient of the head, and that of the features (K, B L, D); in closed form."""
    if batch.masks:
        features = features * batch.mask(-1)
    likely = functional.log_softmax(torch.bmm(features, head), -1)
    answers = batch.answers[..., None]
    found = -(likely.gather(-1, answers)[..., 0] * batch.weights).sum(1)
    d = likely.exp()
    d.scatter_add_(-1, answers, torch.full_like(answers, -1, dtype=d.dtype))
    d *= batch.weights[..., None]
    back = torch.bmm(d, head.transpose(1, 2))
    if batch.masks:
        back *= batch.mask(-1)
    return found, {"head": torch.bmm(features.transpose(1, 2), d)}, back
