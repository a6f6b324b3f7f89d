"""The language model: an embedding, LSTMs one above the other, and a read-out over the vocabulary.

Functions of a config, its parameters by the names of counts.py, without an axis of members, and tokens; the library's
own LSTM does the work. Layers are run with time first: what dropout drops, and what is carried, is then a row a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from rnnq.families.scaling.config import ScalingConfig

Trees = Mapping[str, Tensor]

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")  # of a layer, in the library's order; gates are in the order i, f, g, o


def dropouts(config: ScalingConfig) -> dict[str, float]:
    """Where something is dropped, and which part of it."""
    found = {"input": config.input_dropout}
    found |= {f"hidden.{layer}": config.hidden_dropout for layer in range(config.num_layers - 1)}
    found["output"] = config.output_dropout
    return {place: part for place, part in found.items() if part}


def zero_state(config: ScalingConfig, streams: int) -> dict[str, Tensor]:
    """What is carried where a text begins: h and c of each layer, (1, B, h)."""
    zero = torch.zeros(1, streams, config.hidden_size)
    return {f"{name}.{layer}": zero.clone() for layer in range(config.num_layers) for name in "hc"}


def multipliers(config: ScalingConfig) -> tuple[float, float]:
    """What the read-out's product and its bias are multiplied with.

    A tied matrix under muP says 1/m times its product (Tensor Programs V, table 8), whose bias is no matter of width.
    The published study multiplied all with m.
    """
    if not config.use_mup:
        return 1.0, 1.0
    m = config.width_multiplier()
    if config.mup_rule == "seed":
        return m, m
    return (1.0 / m, 1.0) if config.tie_embeddings else (1.0, 1.0)


def features(
    config: ScalingConfig, params: Trees, tokens: Tensor, carried: Trees, masks: Trees | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the read-out reads of each token, and what is carried behind the last one, detached.

    tokens   (B, T)
    carried  (1, B, h) each   as `zero_state` has them; nothing: a text begins here
    masks    (B, h) each      what is multiplied at each place of `dropouts`, the same at all times; none: no dropout
    returns  (T, B, h), and as carried
    """
    masks = masks or {}
    on_input, on_output = config.norms()
    x = functional.embedding(tokens.t(), params["embedding"])
    if on_input:
        x = _norm(params, "embedding_norm", x)
    x = _dropped(x, masks, "input")
    begin = x.new_zeros(1, x.shape[1], config.hidden_size)
    after: dict[str, Tensor] = {}
    for layer in range(config.num_layers):
        x, h, c = _layer(params, layer, x, carried.get(f"h.{layer}", begin), carried.get(f"c.{layer}", begin))
        after |= {f"h.{layer}": h.detach(), f"c.{layer}": c.detach()}
        if on_output:
            x = _norm(params, f"norm.{layer}", x)
        x = _dropped(x, masks, f"hidden.{layer}")
    return _dropped(x, masks, "output"), after


def _norm(params: Trees, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"])


def _dropped(x: Tensor, masks: Trees, place: str) -> Tensor:
    return x * masks[place] if place in masks else x


def _layer(params: Trees, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All hidden states (T, B, h), and the last hidden state and cell (1, B, h)."""
    weights = [params[f"lstm.{layer}.{name}"] for name in WEIGHTS]
    out, last, cell = torch.lstm(x, (h, c), weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)
    return out, last, cell


def readout(config: ScalingConfig, params: Trees) -> tuple[Tensor, Tensor]:
    """The read-out's matrix (V, h) and bias (V,), without what `multipliers` says."""
    return params["embedding" if config.tie_embeddings else "readout.weight"], params["readout.bias"]


def said(config: ScalingConfig, params: Trees, x: Tensor) -> Tensor:
    """Logits of features: (..., h) -> (..., V)."""
    weight, bias = readout(config, params)
    of_product, of_bias = multipliers(config)
    return functional.linear(x * of_product, weight, bias * of_bias)


def logits(
    config: ScalingConfig, params: Trees, tokens: Tensor, carried: Trees, masks: Trees | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """All logits, (T, B, V), and what is carried on; as `features`. For few tokens: see readout.py for many."""
    x, after = features(config, params, tokens, carried, masks)
    return said(config, params, x), after


def loss(
    config: ScalingConfig, params: Trees, tokens: Tensor, targets: Tensor, carried: Trees, masks: Trees | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross-entropy in nats a token, a scalar, of targets (B, T), and what is carried on; as `logits`."""
    found, after = logits(config, params, tokens, carried, masks)
    return functional.cross_entropy(found.flatten(0, 1), targets.t().reshape(-1)), after
