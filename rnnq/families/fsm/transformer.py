"""A small causal transformer: normalisation before each part, rotary positions, one run at a time, with autograd.

Parameters have the leading axis of one that every run has. B sequences, T steps, D = d_model, N heads of H = D / N.
Dropout falls on the weights of the attention and behind the second part of each layer, from torch's global numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rnnq.families.base import State
from rnnq.families.fsm import batches, readout
from rnnq.families.fsm.batches import Batch
from rnnq.families.fsm.config import Config

Params = dict[str, Tensor]

THETA = 10_000.0  # of the rotary positions (Su et al., 2021)


def draw(config: Config, generator: torch.Generator) -> Params:
    """Parameters of one run; weights, (outputs, inputs), Xavier normal, biases zero."""
    size, inner = config.d_model, config.d_ff
    shapes = {"query": (size, size), "key": (size, size), "value": (size, size), "out": (size, size)}
    shapes |= {"up": (inner, size), "down": (size, inner)}
    params = {"embed": readout.draw_embedding(size, generator)}
    for layer in range(config.n_layers):
        for name, (outputs, inputs) in shapes.items():
            scale = math.sqrt(2 / (inputs + outputs))
            params[f"{layer}.{name}"] = torch.randn(outputs, inputs, generator=generator) * scale
            params[f"{layer}.{name}.bias"] = torch.zeros(outputs)
        params |= {f"{layer}.{name}": value for norm in ("norm1", "norm2") for name, value in _norm(norm, size).items()}
    params |= _norm("norm", size) | {"head": readout.draw_head(config, generator)}
    return params | {"head.bias": torch.zeros(config.classes())}


def _norm(name: str, size: int) -> Params:
    return {name: torch.ones(size), f"{name}.bias": torch.zeros(size)}


def masks(config: Config, shape: tuple[int, int, int], chance: batches.Chance) -> list[Tensor]:
    """None: what attention drops has no shape that could be drawn here at a low price."""
    return []


def losses(config: Config, params: Params, batch: Batch) -> Tensor:
    """The training loss (1,)."""
    own = _alone(params)
    x = functional.embedding(batch.tokens[0].t(), own["embed"])
    turns = _turns(config, 0, x.shape[1], x.device)
    for layer in range(config.n_layers):
        x = _layer(config, own, layer, x, turns, config.dropout)[0]
    features = x[torch.arange(len(x), device=x.device)[:, None], batch.places[0]].flatten(0, 1)
    features = _normalised(own, "norm", features)  # of few places only
    return readout.losses(params["head"], features[None], batch, params["head.bias"][:, None])


def _alone(params: Params) -> Params:
    """Without the axis of members; views, of which the gradients are, too."""
    return {name: tensor.view(tensor.shape[1:]) for name, tensor in params.items()}


def _normalised(own: Params, name: str, x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], own[name], own[f"{name}.bias"])


def _linear(own: Params, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, own[name], own[f"{name}.bias"])


def _turns(config: Config, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each position in [first, last) and pair: (T, H)."""
    width = config.d_model // config.n_heads
    speed = THETA ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.outer(torch.arange(first, last, device=device), speed).repeat(1, 2)
    return angle.cos(), angle.sin()


def _turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair, a number of the first half and its like in the second, turned by its angle: (B, N, T, H)."""
    first, second = x.chunk(2, -1)
    return x * turns[0] + torch.cat((-second, first), -1) * turns[1]


def _heads(config: Config, x: Tensor) -> Tensor:
    """(B, T, D) -> (B, N, T, H)."""
    return x.view(*x.shape[:2], config.n_heads, -1).transpose(1, 2)


def _layer(
    config: Config,
    own: Params,
    layer: int,
    x: Tensor,
    turns: tuple[Tensor, Tensor],
    dropout: float = 0.0,
    before: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output, and the keys and values of these positions: (B, T, D), (B, N, T, H) twice.

    `before` are keys and values which every position sees all of, its own among them.
    """
    y = _normalised(own, f"{layer}.norm1", x)
    query, key, value = (_heads(config, _linear(own, f"{layer}.{name}", y)) for name in ("query", "key", "value"))
    query, key = _turned(query, turns), _turned(key, turns)
    if before is not None:
        before[0][:, :, -1:], before[1][:, :, -1:] = key, value
    seen = before or (key, value)
    attention = functional.scaled_dot_product_attention(query, *seen, dropout_p=dropout, is_causal=before is None)
    x = x + _linear(own, f"{layer}.out", attention.transpose(1, 2).flatten(2))
    y = _linear(own, f"{layer}.up", _normalised(own, f"{layer}.norm2", x))
    y = _linear(own, f"{layer}.down", functional.gelu(y))
    return x + functional.dropout(y, dropout, dropout > 0), key, value


# -------------------------------------------------------------------------------------------------------- measuring


def layers(config: Config, params: Params, tokens: Tensor) -> dict[str, Tensor]:
    """What each layer puts out, "h1" the first: (T, B) -> (1, T, B, D), without dropout; and "embed"."""
    own = _alone(params)
    x = functional.embedding(tokens.t(), own["embed"])
    found, turns = {"embed": x}, _turns(config, 0, len(tokens), x.device)
    for layer in range(config.n_layers):
        x = _layer(config, own, layer, x, turns)[0]
        found[f"h{layer + 1}"] = x
    return {name: each.transpose(0, 1)[None] for name, each in found.items()}


def logits(config: Config, params: Params, tokens: Tensor, places: Tensor) -> Tensor:
    """What is said at some places: (T, B), (B, L) -> (1, B, L, C)."""
    x = layers(config, params, tokens)[f"h{config.n_layers}"][0]
    return _said(_alone(params), x[places, torch.arange(len(places), device=places.device)[:, None]])[None]


def _said(own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return _normalised(dict(own), "norm", x) @ own["head"] + own["head.bias"]


def begin(config: Config, params: Params, tokens: Tensor, more: int) -> State:
    """Keys and values of a beginning, with room for `more` positions: (T, B), T at least 1."""
    own = _alone(params)
    x = functional.embedding(tokens.t(), own["embed"])
    turns = _turns(config, 0, len(tokens), x.device)
    carried = {"at": torch.tensor(len(tokens))}
    for layer in range(config.n_layers):
        x, key, value = _layer(config, own, layer, x, turns)
        carried[f"k{layer}"], carried[f"v{layer}"] = (functional.pad(part, (0, 0, 0, more)) for part in (key, value))
    return State(params, carried)


def step(config: Config, state: State, tokens: Tensor) -> Tensor:
    """One token further: (1, B) -> (1, B, C); what is carried changes."""
    own, carried = _alone(state.params), state.carried
    x = functional.embedding(tokens[0][:, None], own["embed"])
    at = int(carried["at"])
    turns = _turns(config, at, at + 1, x.device)
    for layer in range(config.n_layers):
        seen = carried[f"k{layer}"][:, :, : at + 1], carried[f"v{layer}"][:, :, : at + 1]
        x = _layer(config, own, layer, x, turns, before=seen)[0]
    carried["at"] = carried["at"] + 1
    return _said(own, x[:, 0])[None]
