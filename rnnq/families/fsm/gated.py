"""LSTM and GRU, one run at a time: the library's own loop over time, layer by layer, with autograd.

Parameters have the leading axis of one that every run has. Shapes as in loops.py, with K = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnnq.families.base import State
from rnnq.families.fsm import readout
from rnnq.families.fsm.batches import Batch
from rnnq.families.fsm.batches import masks as masks
from rnnq.families.fsm.config import Config

Params = dict[str, Tensor]

NAMES = ("in", "state", "bias", "bias_state")  # of a layer, in the library's order


def draw(config: Config, generator: torch.Generator) -> Params:
    """Parameters of one run, weights as the library has them: (gates D, D).

    LSTM: input weights Xavier uniform, those of the state orthogonal as one matrix, biases zero. GRU: the library's
    own, uniform in ±1/sqrt(D).
    """
    size, gates = config.d_model, 4 if config.model == "lstm" else 3
    params = {"embed": readout.draw_embedding(size, generator)}
    for layer in range(config.n_layers):
        shapes = {"in": (gates * size, size), "state": (gates * size, size)}
        drawn = {name: torch.zeros(shapes.get(name, (gates * size,))) for name in NAMES}
        if config.model == "lstm":
            nn.init.xavier_uniform_(drawn["in"], generator=generator)
            nn.init.orthogonal_(drawn["state"], generator=generator)
        else:
            for tensor in drawn.values():
                tensor.uniform_(-1 / math.sqrt(size), 1 / math.sqrt(size), generator=generator)
        params |= {f"{layer}.{name}": tensor for name, tensor in drawn.items()}
    return params | {"head": readout.draw_head(config, generator)}


def losses(config: Config, params: Params, batch: Batch) -> Tensor:
    """The training loss (1,)."""
    x = _embedded(params, batch.tokens[0])
    x = x * batch.mask(0)[0] if batch.masks else x
    for layer in range(config.n_layers):
        x, _ = _run(config, params, layer, x, _zero(config, x))
        if batch.masks and layer + 1 < config.n_layers:
            x = x * batch.mask(layer + 1)[0]
    features = x.reshape(-1, config.d_model).index_select(0, batch.flat_places()[0])
    return readout.losses(params["head"], features[None], batch)


def _embedded(params: Params, tokens: Tensor) -> Tensor:
    return functional.embedding(tokens, _alone(params["embed"]))


def _alone(tensor: Tensor) -> Tensor:
    """Without the axis of members; a view, of which the gradient is one, too."""
    return tensor.view(tensor.shape[1:])


def _zero(config: Config, x: Tensor) -> tuple[Tensor, ...]:
    zero = x.new_zeros(1, x.shape[1], config.d_model)
    return (zero, zero) if config.model == "lstm" else (zero,)


def _run(
    config: Config, params: Params, layer: int, x: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A layer over all steps from a state, hidden and for the LSTM cell, (1, B, D): all hidden states, last state."""
    weights = [_alone(params[f"{layer}.{name}"]) for name in NAMES]
    learns = torch.is_grad_enabled()
    if config.model == "lstm":
        out, hidden, cell = torch.lstm(x, state, weights, True, 1, 0.0, learns, False, False)
        return out, (hidden, cell)
    out, hidden = torch.gru(x, state[0], weights, True, 1, 0.0, learns, False, False)
    return out, (hidden,)


# -------------------------------------------------------------------------------------------------------- measuring


def layers(config: Config, params: Params, tokens: Tensor) -> dict[str, Tensor]:
    """All states of each layer, without dropout: (T, B) -> (1, T, B, D).

    "h1" and "c1" are the hidden state and, of an LSTM, the cell of the first layer; "embed" is its input.
    """
    x = _embedded(params, tokens)
    found = {"embed": x[None]}
    for layer in range(config.n_layers):
        out, _ = _run(config, params, layer, x, _zero(config, x))
        found[f"h{layer + 1}"] = out[None]
        if config.model == "lstm":
            found[f"c{layer + 1}"] = _cells(params, layer, x, out)[None]
        x = out
    return found


def _cells(params: Params, layer: int, x: Tensor, hidden: Tensor) -> Tensor:
    """The cells of all steps (T, B, D), which the library keeps to itself, from what it does tell."""
    w_in, w_state, bias, bias_state = (_alone(params[f"{layer}.{name}"]) for name in NAMES)
    before = torch.cat((torch.zeros_like(hidden[:1]), hidden[:-1]))
    gates = functional.linear(x, w_in, bias) + functional.linear(before, w_state, bias_state)
    take, keep, new, _ = gates.chunk(4, -1)
    cell = torch.sigmoid(take) * torch.tanh(new)
    keep = torch.sigmoid(keep)
    for t in range(1, len(cell)):
        cell[t].addcmul_(keep[t], cell[t - 1])
    return cell


def logits(config: Config, params: Params, tokens: Tensor, places: Tensor) -> Tensor:
    """What is said at some places: (T, B), (B, L) -> (1, B, L, C)."""
    x = _embedded(params, tokens)
    for layer in range(config.n_layers):
        x, _ = _run(config, params, layer, x, _zero(config, x))
    features = x[places, torch.arange(len(places), device=places.device)[:, None]]
    return (features @ params["head"][0])[None]


def begin(config: Config, params: Params, tokens: Tensor, more: int) -> State:
    """What is carried behind a beginning: (T, B), T at least 1; `more` steps are to follow."""
    x = _embedded(params, tokens)
    carried: dict[str, Tensor] = {}
    for layer in range(config.n_layers):
        x, state = _run(config, params, layer, x, _zero(config, x))
        carried |= {f"{name}{layer + 1}": part[0] for name, part in zip("hc", state, strict=False)}
    return State(params, carried)


def step(config: Config, state: State, tokens: Tensor) -> Tensor:
    """One token further: (1, B) -> (1, B, C); what is carried changes."""
    params, carried = state.params, state.carried
    x = _embedded(params, tokens[0])
    for layer in range(config.n_layers):
        weights = [_alone(params[f"{layer}.{name}"]) for name in NAMES]
        hidden, cell = f"h{layer + 1}", f"c{layer + 1}"
        if config.model == "lstm":
            carried[hidden], carried[cell] = torch.lstm_cell(x, (carried[hidden], carried[cell]), *weights)
        else:
            carried[hidden] = torch.gru_cell(x, carried[hidden], *weights)
        x = carried[hidden]
    return (x @ params["head"][0])[None]
