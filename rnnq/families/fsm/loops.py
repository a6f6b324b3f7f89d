"""Plain recurrent nets, K members side by side, with their gradients through time in closed form.

Two of them: `rnn` as libraries have it, with dropout between the layers; `rnn_seed` as the published study wrote it,
where in all layers but the last the dropped state is what is carried to the next step. Shapes: K members, T steps,
B sequences, D = d_model, L next states of each query that are asked for, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from rnnq.families.base import State
from rnnq.families.fsm import readout
from rnnq.families.fsm.batches import Batch
from rnnq.families.fsm.batches import masks as masks
from rnnq.families.fsm.config import Config
from rnnq.families.fsm.data import VOCABULARY

Params = dict[str, Tensor]


def draw(config: Config, generator: torch.Generator) -> Params:
    """Parameters of one member, weights as (inputs, outputs).

    `rnn_seed` is Xavier normal on [input; state] together, with one bias; `rnn` is the library's own, uniform in
    ±1/sqrt(D), with two.
    """
    size = config.d_model
    params = {"embed": readout.draw_embedding(size, generator)}
    for layer in range(config.n_layers):
        if config.model == "rnn_seed":
            both = torch.randn(2 * size, size, generator=generator) * math.sqrt(2 / (3 * size))
            drawn = {"in": both[:size], "state": both[size:], "bias": torch.zeros(1, size)}
        else:
            shapes = {"in": (size, size), "state": (size, size), "bias": (1, size), "bias_state": (1, size)}
            bound = 1 / math.sqrt(size)
            drawn = {n: torch.empty(s).uniform_(-bound, bound, generator=generator) for n, s in shapes.items()}
        params |= {f"{layer}.{name}": tensor.clone() for name, tensor in drawn.items()}
    return params | {"head": readout.draw_head(config, generator)}


def carries_dropped(config: Config, layer: int) -> bool:
    """Whether dropout falls on the very state that a layer carries on."""
    return config.model == "rnn_seed" and layer + 1 < config.n_layers


# ------------------------------------------------------------------------------------------- one step after another


def embedded(params: Params, tokens: Tensor) -> Tensor:
    """Tokens of each member (T, K, B) -> (T, K, B, D)."""
    weight = params["embed"]
    members = torch.arange(len(weight), device=tokens.device)[:, None]
    return functional.embedding(tokens + VOCABULARY * members, weight.reshape(-1, weight.shape[-1]))


def projected(params: Params, layer: int, x: Tensor) -> Tensor:
    """What a layer's steps add to what they make of the state: (T, K, B, D) -> the same."""
    steps, members, sequences, size = x.shape
    flat = x.transpose(0, 1).reshape(members, steps * sequences, size)
    z = torch.baddbmm(bias(params, layer), flat, params[f"{layer}.in"])
    return z.view(members, steps, sequences, size).transpose(0, 1).contiguous()


def bias(params: Params, layer: int) -> Tensor:
    """All that is added: (K, 1, D)."""
    second = params.get(f"{layer}.bias_state")
    return params[f"{layer}.bias"] if second is None else params[f"{layer}.bias"] + second


def run(config: Config, params: Params, layer: int, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A layer over all steps: its states (T, K, B, D) and what of them is carried on, which may be the same tensor."""
    z = projected(params, layer, x)
    states = torch.empty_like(z)
    drops = mask is not None and carries_dropped(config, layer)
    carried = torch.empty_like(z) if drops else states
    weight = params[f"{layer}.state"]
    act = torch.tanh if config.activation == "tanh" else _relu
    # lists of views: to cut a slice off at each step would take as long as the step itself
    kept = mask.unbind(0) if mask is not None and drops else ()
    before: Tensor | None = None
    for t, (at, state, carry) in enumerate(zip(z.unbind(0), states.unbind(0), carried.unbind(0), strict=True)):
        if before is not None:
            at.baddbmm_(before, weight)
        act(at, out=state)
        if kept:
            torch.mul(state, kept[t], out=carry)
        before = carry
    return states, carried


def _relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0.0, out=out)


def forward(
    config: Config, params: Params, tokens: Tensor, dropped: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The input of each layer, and last what is read out; the states of each layer; what each of them carries on."""
    x = embedded(params, tokens)
    inputs, states, carried = [x * dropped[0] if dropped else x], [], []
    for layer in range(config.n_layers):
        mask = dropped[layer + 1] if dropped and layer + 1 < config.n_layers else None
        state, carry = run(config, params, layer, inputs[-1], mask)
        states.append(state)
        carried.append(carry)
        between = mask is not None and not carries_dropped(config, layer)
        inputs.append(state * mask if between and mask is not None else carry)
    return inputs, states, carried


def gradients(config: Config, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """The losses (K,) and the gradient of every parameter."""
    dropped = batch.masks[:-1]
    inputs, states, carried = forward(config, params, batch.tokens, dropped)
    places = batch.flat_places()
    top = inputs[-1].view(-1, config.d_model)
    features = top.index_select(0, places.view(-1)).view(*places.shape, config.d_model)
    losses, found, d_features = readout.gradients(params["head"], features, batch)
    d = torch.zeros_like(top).index_add_(0, places.view(-1), d_features.reshape(-1, config.d_model))
    d = d.view_as(inputs[-1])
    for layer in reversed(range(config.n_layers)):
        mask = dropped[layer + 1] if dropped and layer + 1 < config.n_layers else None
        d = _back(config, params, layer, d, mask, (inputs[layer], states[layer], carried[layer]), found)
    if dropped:
        d *= dropped[0]
    found["embed"] = _embedding_gradient(batch.tokens, d)
    return losses, {name: found[name] for name in params}


def _back(
    config: Config,
    params: Params,
    layer: int,
    d: Tensor,
    mask: Tensor | None,
    trace: tuple[Tensor, Tensor, Tensor],
    found: Params,
) -> Tensor:
    """From the gradient of a layer's output to that of its input; those of its parameters go into `found`.

    `d` is overwritten with the gradient of what the activation is applied to.
    """
    x, states, carried = trace
    slope = 1 - states * states if config.activation == "tanh" else (states > 0).to(states.dtype)
    if mask is not None and carries_dropped(config, layer):
        slope *= mask
    elif mask is not None:
        d *= mask
    back = params[f"{layer}.state"].transpose(1, 2).contiguous()
    after: Tensor | None = None
    for at, factor in zip(reversed(d.unbind(0)), reversed(slope.unbind(0)), strict=True):
        if after is not None:
            at.baddbmm_(after, back)
        at.mul_(factor)
        after = at
    steps, members, sequences, size = d.shape
    flat = d.transpose(0, 1).reshape(members, steps * sequences, size)
    flat_x = x.transpose(0, 1).reshape(members, steps * sequences, size)
    flat_h = carried.transpose(0, 1).reshape(members, steps * sequences, size)
    found[f"{layer}.in"] = torch.bmm(flat_x.transpose(1, 2), flat)
    # the state before the first step is zero
    before, later = flat_h[:, : -sequences or None], flat[:, sequences:]
    found[f"{layer}.state"] = torch.bmm(before.transpose(1, 2), later)
    found[f"{layer}.bias"] = flat.sum(1, keepdim=True)
    if f"{layer}.bias_state" in params:
        found[f"{layer}.bias_state"] = found[f"{layer}.bias"]
    d_x = torch.bmm(flat, params[f"{layer}.in"].transpose(1, 2))
    return d_x.view(members, steps, sequences, size).transpose(0, 1).contiguous()


def _embedding_gradient(tokens: Tensor, d: Tensor) -> Tensor:
    """(T, K, B), (T, K, B, D) -> (K, V, D), as a product, which adds in one order on every device."""
    steps, members, sequences, size = d.shape
    flat = tokens.transpose(0, 1).reshape(members, 1, steps * sequences)
    every = torch.arange(VOCABULARY, device=tokens.device)[None, :, None]
    return torch.bmm((flat == every).to(d.dtype), d.transpose(0, 1).reshape(members, steps * sequences, size))


def losses(config: Config, params: Params, batch: Batch) -> Tensor:
    """The losses (K,) by operations that autograd follows: slow, and what the closed form is held to."""
    x = embedded(params, batch.tokens)
    x = x * batch.masks[0] if batch.masks else x
    act = torch.tanh if config.activation == "tanh" else torch.relu
    for layer in range(config.n_layers):
        mask = batch.masks[layer + 1] if batch.masks and layer + 1 < config.n_layers else None
        outputs: list[Tensor] = []
        for t, at in enumerate(projected(params, layer, x).unbind(0)):
            h = act(torch.baddbmm(at, outputs[-1], params[f"{layer}.state"]) if outputs else at)
            outputs.append(h * mask[t] if mask is not None and carries_dropped(config, layer) else h)
        x = torch.stack(outputs)
        x = x * mask if mask is not None and not carries_dropped(config, layer) else x
    places = batch.flat_places()
    features = x.reshape(-1, config.d_model).index_select(0, places.view(-1)).view(*places.shape, config.d_model)
    return readout.losses(params["head"], features, batch)


# -------------------------------------------------------------------------------------------------------- measuring


def layers(config: Config, params: Params, tokens: Tensor) -> dict[str, Tensor]:
    """All states of each layer, "h1" of the first: (T, B) -> (T, K, B, D), without dropout; and "embed"."""
    members = len(params["embed"])
    inputs, states, _ = forward(config, params, tokens[:, None].expand(-1, members, -1), ())
    return {"embed": inputs[0], **{f"h{number}": state for number, state in enumerate(states, start=1)}}


def logits(config: Config, params: Params, tokens: Tensor, places: Tensor) -> Tensor:
    """What is said at some places: (T, B), (B, L) -> (K, B, L, C)."""
    top = layers(config, params, tokens)[f"h{config.n_layers}"]
    members, (sequences, queried) = top.shape[1], places.shape
    column = torch.arange(sequences, device=places.device)[:, None]
    features = top.transpose(0, 1)[:, places, column]
    said = torch.bmm(features.reshape(members, sequences * queried, -1), params["head"])
    return said.view(members, sequences, queried, -1)


def begin(config: Config, params: Params, tokens: Tensor, more: int) -> State:
    """What is carried behind a beginning that all members share: (T, B), T at least 1; `more` steps are to follow."""
    found = layers(config, params, tokens)
    last = {f"h{number}": found[f"h{number}"][-1] for number in range(1, config.n_layers + 1)}
    return State(params, last)


def step(config: Config, state: State, tokens: Tensor) -> Tensor:
    """One token further: (K, B) -> (K, B, C); what is carried changes."""
    x = embedded(state.params, tokens[None])[0]
    act = torch.tanh if config.activation == "tanh" else torch.relu
    for layer in range(config.n_layers):
        z = torch.baddbmm(bias(state.params, layer), x, state.params[f"{layer}.in"])
        x = act(torch.baddbmm(z, state.carried[f"h{layer + 1}"], state.params[f"{layer}.state"]))
        state.carried[f"h{layer + 1}"] = x
    return torch.bmm(x, state.params["head"])
