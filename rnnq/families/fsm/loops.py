"""Plain recurrent nets, K members side by side, with their gradients through time in closed form.

Two of them: `rnn` as libraries have it, with dropout between the layers; `rnn_seed` as the published study wrote it,
where in all layers but the last the dropped state is what is carried to the next step. Shapes: K members, T steps,
B sequences, D = d_model, L next states of each query that are asked for, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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

Steps = list[Tensor]  # views of a tensor (K, T, B, D), one for each step


class Room:
    """Tensors of one shape to work in, kept from one training step to the next, with views of their steps.

    To make them anew, with some hundreds of views each, would cost as much as the steps themselves.
    """

    def __init__(self) -> None:
        self._kind: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self._held: dict[str, tuple[Tensor, Steps]] = {}

    def of(self, name: str, shape: torch.Size, device: torch.device) -> tuple[Tensor, Steps]:
        """The tensor of that name, with what was left in it, and its steps."""
        kind = shape, torch.get_default_dtype(), device
        if self._kind != kind:
            self._kind, self._held = kind, {}
        if name not in self._held:
            made = torch.empty(shape, device=device)
            self._held[name] = made, list(made.unbind(1))
        return self._held[name]


_room = Room()


def embedded(params: Params, tokens: Tensor, out: Tensor | None = None) -> Tensor:
    """Tokens of each member (K, T, B) -> (K, T, B, D)."""
    weight = params["embed"]
    members = torch.arange(len(weight), device=tokens.device)[:, None, None]
    rows = (tokens + VOCABULARY * members).view(-1)
    table = weight.view(-1, weight.shape[-1])
    found = None if out is None else flat(out).view(-1, weight.shape[-1])
    return torch.index_select(table, 0, rows, out=found).view(*tokens.shape, -1)


def bias(params: Params, number: int) -> Tensor:
    """All that a layer adds: (K, 1, D)."""
    second = params.get(f"{number}.bias_state")
    return params[f"{number}.bias"] if second is None else params[f"{number}.bias"] + second


def flat(x: Tensor) -> Tensor:
    """(K, T, B, D) -> (K, T B, D), a view."""
    return x.view(len(x), -1, x.shape[-1])


@dataclass(frozen=True)
class Layer:
    """One layer over all steps: its input, its states, and what of them is carried on; (K, T, B, D) each.

    In layers that carry what dropout leaves, `carried` is another tensor than `states`.
    """

    x: Tensor
    states: Tensor
    carried: Tensor


def run(config: Config, params: Params, number: int, x: Tensor, batch: Batch | None = None) -> Layer:
    """A layer over all steps from a zero state. Its tensors are those of the room, where there is a batch."""
    room = _room if batch else Room()
    size, device = x.shape, x.device
    z, at = room.of("z", size, device)
    torch.baddbmm(bias(params, number), flat(x), params[f"{number}.in"], out=flat(z))
    states, state_at = room.of(f"states {number}", size, device)
    weight, act = params[f"{number}.state"], torch.tanh if config.activation == "tanh" else _relu
    before, added = None, _adding(len(x))
    if batch is None or not batch.masks or not carries_dropped(config, number):
        for now, state in zip(at, state_at, strict=True):
            act(now if before is None else added(now, before, weight), out=state)
            before = state
        return Layer(x, states, states)
    carried, carried_at = room.of(f"carried {number}", size, device)
    mask, mask_at = room.of(f"mask {number}", size, device)
    batch.mask(number + 1, mask)
    for now, state, carry, kept in zip(at, state_at, carried_at, mask_at, strict=True):
        act(now if before is None else added(now, before, weight), out=state)
        before = torch.mul(state, kept, out=carry)
    return Layer(x, states, carried)


def _adding(members: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """now + before · W, (K, B, D): in place for one member; the steps of several do not lie side by side."""
    return Tensor.baddbmm_ if members == 1 else torch.baddbmm


def _relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0.0, out=out)


def forward(config: Config, params: Params, tokens: Tensor, batch: Batch | None = None) -> tuple[list[Layer], Tensor]:
    """All layers, and what is read out, which is of the last of them; with dropout where there is a batch."""
    room = _room if batch else Room()
    shape, device = torch.Size((*tokens.shape, config.d_model)), tokens.device
    x = embedded(params, tokens, room.of("x", shape, device)[0])
    if batch is None or not batch.masks:
        layers = []
        for number in range(config.n_layers):
            layers.append(run(config, params, number, x, batch))
            x = layers[-1].states
        return layers, x
    x.mul_(batch.mask(0, room.of("mask", shape, device)[0]))
    layers = []
    for number in range(config.n_layers):
        layers.append(run(config, params, number, x, batch))
        x = layers[-1].carried
        if number + 1 < config.n_layers and not carries_dropped(config, number):
            mask = batch.mask(number + 1, room.of(f"mask {number}", shape, device)[0])
            x = torch.mul(x, mask, out=room.of(f"x {number}", shape, device)[0])
    return layers, x


def gradients(config: Config, params: Params, batch: Batch) -> tuple[Tensor, Params]:
    """The losses (K,) and the gradient of every parameter."""
    layers, top = forward(config, params, batch.tokens, batch)
    places, size = batch.flat_places(), config.d_model
    features = top.view(-1, size).index_select(0, places.view(-1)).view(*places.shape, size)
    losses, found, d_features = readout.gradients(params["head"], features, batch)
    d, d_at = _room.of("d", top.shape, top.device)
    d.zero_().view(-1, size).index_add_(0, places.view(-1), d_features.view(-1, size))
    below, below_at = _room.of("below", top.shape, top.device)
    for number in reversed(range(config.n_layers)):
        _back(config, params, number, layers[number], (d, d_at), bool(batch.masks), found)
        torch.bmm(flat(d), params[f"{number}.in"].transpose(1, 2), out=flat(below))
        d, d_at, below, below_at = below, below_at, d, d_at
    if batch.masks:
        d *= _room.of("mask", d.shape, d.device)[0]
    # a product, which adds in one order on every device
    every = torch.arange(VOCABULARY, device=d.device)[None, :, None]
    tokens = batch.tokens.view(len(d), 1, -1)
    found["embed"] = torch.bmm((tokens == every).to(d.dtype), flat(d))
    return losses, {name: found[name] for name in params}


def _back(
    config: Config, params: Params, number: int, layer: Layer, d: tuple[Tensor, Steps], drops: bool, found: Params
) -> None:
    """From the gradient of what the next layer reads to that of what the activation is applied to, both in `d`.

    Those of the layer's parameters go into `found`.
    """
    whole, at = d
    shape, device = whole.shape, whole.device
    slope, slope_at = _room.of("slope", shape, device)
    if config.activation == "tanh":
        torch.mul(layer.states, layer.states, out=slope).neg_().add_(1.0)
    else:
        torch.gt(layer.states, 0.0, out=slope)
    if drops and number + 1 < config.n_layers:
        mask, _ = _room.of(f"mask {number}", shape, device)
        (slope if carries_dropped(config, number) else whole).mul_(mask)
    back = params[f"{number}.state"].transpose(1, 2).contiguous()
    after, added = None, _adding(len(whole))
    for now, factor in zip(reversed(at), reversed(slope_at), strict=True):
        after = torch.mul(now if after is None else added(now, after, back), factor, out=now)
    # the state before the first step is zero
    sequences = shape[2]
    before, later = flat(layer.carried)[:, :-sequences], flat(whole)[:, sequences:]
    found[f"{number}.in"] = torch.bmm(flat(layer.x).transpose(1, 2), flat(whole))
    found[f"{number}.state"] = torch.bmm(before.transpose(1, 2), later)
    found[f"{number}.bias"] = flat(whole).sum(1, keepdim=True)
    if f"{number}.bias_state" in params:
        found[f"{number}.bias_state"] = found[f"{number}.bias"].clone()


def losses(config: Config, params: Params, batch: Batch) -> Tensor:
    """The losses (K,) by operations that autograd follows: slow, and what the closed form is held to."""
    x = embedded(params, batch.tokens)
    x = x * batch.mask(0) if batch.masks else x
    act = torch.tanh if config.activation == "tanh" else torch.relu
    for number in range(config.n_layers):
        mask = batch.mask(number + 1) if batch.masks and number + 1 < config.n_layers else None
        z = torch.baddbmm(bias(params, number), flat(x), params[f"{number}.in"]).view_as(x)
        outputs: list[Tensor] = []
        for t, now in enumerate(z.unbind(1)):
            h = act(torch.baddbmm(now, outputs[-1], params[f"{number}.state"]) if outputs else now)
            outputs.append(h * mask[:, t] if mask is not None and carries_dropped(config, number) else h)
        x = torch.stack(outputs, 1)
        x = x * mask if mask is not None and not carries_dropped(config, number) else x
    places = batch.flat_places()
    features = x.view(-1, config.d_model).index_select(0, places.view(-1)).view(*places.shape, config.d_model)
    return readout.losses(params["head"], features, batch)


# -------------------------------------------------------------------------------------------------------- measuring


def layers(config: Config, params: Params, tokens: Tensor) -> dict[str, Tensor]:
    """All states of each layer, "h1" of the first: (T, B) -> (K, T, B, D), without dropout; and "embed"."""
    found, _ = forward(config, params, tokens.expand(len(params["embed"]), *tokens.shape).contiguous())
    return {"embed": found[0].x, **{f"h{number}": layer.states for number, layer in enumerate(found, start=1)}}


def logits(config: Config, params: Params, tokens: Tensor, places: Tensor) -> Tensor:
    """What is said at some places: (T, B), (B, L) -> (K, B, L, C)."""
    top = layers(config, params, tokens)[f"h{config.n_layers}"]
    members, (sequences, queried) = len(top), places.shape
    features = top[:, places, torch.arange(sequences, device=places.device)[:, None]]
    said = torch.bmm(features.view(members, sequences * queried, -1), params["head"])
    return said.view(members, sequences, queried, -1)


def begin(config: Config, params: Params, tokens: Tensor, more: int) -> State:
    """What is carried behind a beginning that all members share: (T, B), T at least 1; `more` steps are to follow."""
    found = layers(config, params, tokens)
    last = {f"h{number}": found[f"h{number}"][:, -1] for number in range(1, config.n_layers + 1)}
    return State(params, last)


def step(config: Config, state: State, tokens: Tensor) -> Tensor:
    """One token further: (K, B) -> (K, B, C); what is carried changes."""
    x = embedded(state.params, tokens[:, None])[:, 0]
    act = torch.tanh if config.activation == "tanh" else torch.relu
    for number in range(config.n_layers):
        z = torch.baddbmm(bias(state.params, number), x, state.params[f"{number}.in"])
        x = act(torch.baddbmm(z, state.carried[f"h{number + 1}"], state.params[f"{number}.state"]))
        state.carried[f"h{number + 1}"] = x
    return torch.bmm(x, state.params["head"])
