"""Two families of the third level whose gradients are in closed form: a plain RNN with BPTT, and a quadratic RNN.

They are the works "plain" and "quadratic" of packs.py, and the same nets as in ordinary.py. Shapes: K members, B
sequences, T places of time, H = width. `check` holds them against autograd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from ordinary import VOCABULARY, products, tokens
from torch import Tensor

from rnnq import Config, Family, Metric, State
from rnnq.train import by_autograd

Params = dict[str, Tensor]
Found = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]

_tanh_backward = torch.ops.aten.tanh_backward
_tokens = functools.cache(tokens)
_products = functools.cache(products)


def draw(seeds: Sequence[int], shapes: dict[str, tuple[int, int, int]]) -> Params:
    """Each member from its own seed, uniform in ±1/sqrt(fan_in); shapes: (rows, columns, fan_in)."""
    members = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        members.append([(2 * torch.rand(a, b, generator=generator) - 1) / math.sqrt(c) for a, b, c in shapes.values()])
    return {name: torch.stack(drawn) for name, drawn in zip(shapes, zip(*members, strict=True), strict=True)}


def turned(x: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return x.transpose(-1, -2)


# ------------------------------------------------------------------------------------------------- plain RNN


class PlainConfig(Config):
    """A language model of tanh layers on the tokens of ordinary.py."""

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("loss", "nats", primary=True),)
    batch_size: int = 8
    width: int = 16
    length: int = 100  # places of time
    n_layers: int = 2
    lr: float = 1e-3
    steps: int = 1000
    log_every: int = 50

    def pack_key(self) -> str:
        """Equal shapes."""
        return f"{self.batch_size}/{self.width}/{self.length}/{self.n_layers}"


class PlainRNN(Family):
    """Backpropagation through time by hand: one product and one activation at each place, for all members at once.

    Time leads within a layer, (T, K, B, H), so that what belongs to one place is one piece of memory.
    """

    Config = PlainConfig
    name = "plain"

    def init(self, configs: Sequence[PlainConfig]) -> State:
        """The distribution of torch's own layers."""
        width = configs[0].width
        shapes = {"embed": (VOCABULARY, width, 1), "head": (width, VOCABULARY, width)}
        shapes["head_bias"] = (1, VOCABULARY, width)
        for layer in range(configs[0].n_layers):
            for side in ("input", "state"):  # two biases, as torch.nn.RNN has
                shapes |= {f"{layer}.{side}": (width, width, width), f"{layer}.{side}_bias": (1, width, width)}
        return State(draw([config.seed for config in configs], shapes))

    def batch(self, configs: Sequence[PlainConfig], steps: Sequence[int]) -> Tensor:
        """A window of the stream for each member, (K, T + 1, B): what is read, and one place later what is told."""
        table = _tokens(configs[0].length + 1, configs[0].batch_size)
        starts = [(config.seed + 7919 * step) % len(table) for config, step in zip(configs, steps, strict=True)]
        return table[torch.tensor(starts)]

    def loss(self, state: State, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of each member."""
        params, hidden = state.params, self._embed(state.params, data)[0]
        for layer in range(self._depth(params)):
            h, states = torch.zeros_like(hidden[:, 0]), []
            for x in hidden.unbind(1):
                pre = torch.baddbmm(params[f"{layer}.input_bias"], x, params[f"{layer}.input"])
                h = torch.tanh(pre + torch.baddbmm(params[f"{layer}.state_bias"], h, params[f"{layer}.state"]))
                states.append(h)
            hidden = torch.stack(states, 1)
        logits = torch.baddbmm(params["head_bias"], hidden.flatten(1, 2), params["head"])
        losses = F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten(), reduction="none")
        return losses.view(len(data), -1).mean(1), {}

    @torch.no_grad()
    def gradients(self, state: State, data: Tensor) -> Found:
        """In closed form."""
        params, found = state.params, {}
        embedded, rows = self._embed(params, data)
        inputs, layers = embedded.flatten(1, 2), []  # (K, T · B, H)
        for layer in range(self._depth(params)):
            states = self._forward(params, layer, inputs, embedded.shape)
            flat = states.transpose(0, 1).flatten(1, 2)
            layers.append((inputs, states, flat))
            inputs = flat
        losses, d = self._head(params, inputs, data[:, 1:].flatten(1)[..., None], found)
        for layer in reversed(range(len(layers))):
            d = self._back(params, layer, *layers[layer], d, found)
        weight = torch.zeros_like(params["embed"])
        weight.view(-1, weight.shape[-1]).index_add_(0, rows.flatten(), d.flatten(0, 1))
        found["embed"] = weight
        return losses, {name: found[name] for name in params}, {}

    @staticmethod
    def _depth(params: Params) -> int:
        return (len(params) - 3) // 4

    @staticmethod
    def _embed(params: Params, data: Tensor) -> tuple[Tensor, Tensor]:
        """What was read, (K, T, B, H), and the rows of the embeddings, one below the other, that hold it."""
        rows = data[:, :-1] + VOCABULARY * torch.arange(len(data))[:, None, None]
        return F.embedding(rows, params["embed"].flatten(0, 1)), rows

    @staticmethod
    def _forward(params: Params, layer: int, inputs: Tensor, shape: torch.Size) -> Tensor:
        """All states, (T, K, B, H)."""
        bias = params[f"{layer}.input_bias"] + params[f"{layer}.state_bias"]
        projected = torch.baddbmm(bias, inputs, params[f"{layer}.input"]).view(shape)
        states = projected.transpose(0, 1).contiguous()
        weight, before = params[f"{layer}.state"], None
        for h in states.unbind(0):
            if before is not None:
                h.baddbmm_(before, weight)
            before = h.tanh_()
        return states

    @staticmethod
    def _head(params: Params, hidden: Tensor, y: Tensor, found: Params) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(torch.baddbmm(params["head_bias"], hidden, params["head"]), -1)
        right = log_p.gather(-1, y)
        d = log_p.exp_().scatter_(-1, y, torch.expm1(right)).mul_(1 / y.shape[1])
        found["head"], found["head_bias"] = torch.bmm(turned(hidden), d), d.sum(1, keepdim=True)
        return right.mean((1, 2)).neg_(), torch.bmm(d, turned(params["head"]))

    @staticmethod
    def _back(params: Params, layer: int, inputs: Tensor, states: Tensor, flat: Tensor, d: Tensor, found: Params
              ) -> Tensor:  # fmt: skip
        """From the gradient of the states' readers, (K, T · B, H), to that of the inputs."""
        length, members, batch, _ = states.shape
        ds = d.view(members, length, batch, -1).transpose(0, 1).contiguous()
        weight, after = turned(params[f"{layer}.state"]), None
        for h, dh in zip(reversed(states.unbind(0)), reversed(ds.unbind(0)), strict=True):
            if after is not None:
                dh.baddbmm_(after, weight)
            after = _tanh_backward.grad_input(dh, h, grad_input=dh)
        d = ds.transpose(0, 1).flatten(1, 2)
        found[f"{layer}.state"] = torch.bmm(turned(flat[:, :-batch]), d[:, batch:])
        found[f"{layer}.input"] = torch.bmm(turned(inputs), d)
        found[f"{layer}.input_bias"] = found[f"{layer}.state_bias"] = d.sum(1, keepdim=True)
        return torch.bmm(d, turned(params[f"{layer}.input"]))


# --------------------------------------------------------------------------------------------- quadratic RNN


class QuadraticConfig(Config):
    """Squared states on the table of ordinary.py."""

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("loss", "", primary=True),)
    batch_size: int = 1000
    inputs: int = 100
    width: int = 200
    length: int = 3  # places of time
    lr: float = 1e-3
    steps: int = 1000
    log_every: int = 50

    def pack_key(self) -> str:
        """Equal shapes."""
        return f"{self.batch_size}/{self.inputs}/{self.width}/{self.length}"


class QuadraticRNN(Family):
    """h <- (h · mix + x_t · drive)² from h = 0; the first product with `mix` is left out."""

    Config = QuadraticConfig
    name = "quadratic"

    def init(self, configs: Sequence[QuadraticConfig]) -> State:
        """The distribution of torch's own layers."""
        inputs, width = configs[0].inputs, configs[0].width
        shapes = {"drive": (inputs, width, inputs), "mix": (width, width, width), "head": (1, width, width)}
        return State(draw([config.seed for config in configs], shapes))

    def batch(self, configs: Sequence[QuadraticConfig], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The part of the table that the step names, for all members one: x (T, K, B, inputs), y (K, B)."""
        first, members = configs[0], len(configs)
        x, y = _parts(first.inputs, first.length, first.batch_size)
        if min(steps) == max(steps):
            at = steps[0] % 8
            return x[:, at : at + 1].expand(-1, members, -1, -1), y[at : at + 1].expand(members, -1)
        parts = torch.tensor([step % 8 for step in steps])
        return x.index_select(1, parts), y.index_select(0, parts)

    def loss(self, state: State, data: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error of each member."""
        (x, y), params = data, state.params
        h = torch.bmm(x[0], params["drive"]).square()
        for part in x[1:]:
            h = torch.baddbmm(torch.bmm(part, params["drive"]), h, params["mix"]).square()
        return ((h * params["head"]).sum(-1) - y).square().mean(1), {}

    @torch.no_grad()
    def gradients(self, state: State, data: tuple[Tensor, Tensor]) -> Found:
        """In closed form; twos that belong to large tensors are put into products."""
        (x, y), params = data, state.params
        drive, mix, head = params["drive"], params["mix"], params["head"]
        sums, states = [torch.bmm(x[0], drive)], []
        for part in x[1:]:
            states.append(sums[-1] * sums[-1])
            sums.append(torch.bmm(part, drive).baddbmm_(states[-1], mix))
        last = sums[-1] * sums[-1]
        back = turned(mix * 2)
        # not a product with (K, H, 1): of width 1 its bits depend on K
        error = (last * head).sum(-1).sub_(y)
        dy = (error * (2 / y.shape[1]))[..., None]
        d = dy * head
        found: Params = {"head": last.mul_(dy).sum(1, keepdim=True)}
        for at in reversed(range(len(x))):
            d.mul_(sums[at])  # half of the gradient of that sum
            self._learn(found, "drive", x[at], d)
            if at:
                self._learn(found, "mix", states[at - 1], d)
                d = torch.bmm(d, back)
        return error.square_().mean(1), {name: found[name] for name in params}, {}

    @staticmethod
    def _learn(found: Params, name: str, inputs: Tensor, half: Tensor) -> None:
        if name in found:
            found[name].baddbmm_(turned(inputs), half, alpha=2)
        else:
            found[name] = torch.bmm(turned(inputs), half).mul_(2)


@functools.cache
def _parts(inputs: int, length: int, batch: int) -> tuple[Tensor, Tensor]:
    x, y = _products(inputs, length, 8 * batch)
    return x.view(8, batch, length, inputs).permute(2, 0, 1, 3).contiguous(), y.view(8, batch)


def check() -> list[str]:
    """What of the closed forms is further than 1e-10 from autograd, in float64: nothing, if all is well."""
    wrong = []
    plain = [PlainConfig(batch_size=3, width=5, length=7, seed=seed) for seed in range(2)]
    quadratic = [QuadraticConfig(batch_size=6, inputs=4, width=5, seed=seed) for seed in range(2)]
    for family, configs in ((PlainRNN(), plain), (QuadraticRNN(), quadratic)):
        drawn = family.init(configs).params
        state = State({name: p.double().requires_grad_() for name, p in drawn.items()})
        data = family.batch(configs, [3, 4])
        data = tuple(part.double() for part in data) if isinstance(data, tuple) else data
        losses, found, _ = family.gradients(state, data)
        expected_losses, expected, _ = by_autograd(family, state, data)
        pairs = {"loss": (losses, expected_losses)} | {name: (found[name], expected[name]) for name in expected}
        wrong += [f"{family.name}: {name}" for name, (a, b) in pairs.items() if not torch.allclose(a, b, 1e-10, 1e-12)]
    return wrong
