"""The gradient of one step of the gated RNN in closed form, for any flags: less work than a tape.

h is detached, so that nothing flows through time, and of every product only the columns are formed that lead to a
parameter: the part of an input that was the old state is left out. A parameter that the loss does not depend on gets
no gradient at all, as from autograd. Shapes: K members, B windows, S = state_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rnnq.families import stacked
from rnnq.families.dynamics.config import DynamicsConfig

Tensors = dict[str, Tensor]

# what autograd itself calls: one pass over memory where the formula written out takes four
_sigmoid_backward = torch.ops.aten.sigmoid_backward  # d · s · (1 - s)
_tanh_backward = torch.ops.aten.tanh_backward  # d · (1 - t²)
_silu_backward = torch.ops.aten.silu_backward


@dataclass(frozen=True, slots=True)
class Trace:
    """What one layer computed, (K, B, ...) each; None where its flag is off."""

    x: Tensor
    h: Tensor
    both: Tensor  # [x; h]
    gates: Tensor | None  # what is let through of x and of h, side by side
    read: Tensor  # [x; h] after these gates
    candidate: Tensor
    with_candidate: Tensor | None  # [read; candidate]
    state_gate: Tensor | None
    mixed: Tensor  # the candidate after the state gate
    with_mixed: Tensor | None  # [read; mixed]
    forget_gate: Tensor | None
    new: Tensor
    z: Tensor  # what the output reads
    out: Tensor
    with_out: Tensor | None  # [out; z]
    output_gate: Tensor | None
    y: Tensor


class Parts(NamedTuple):
    """The gradient of what the output read."""

    new: Tensor | None
    old: Tensor | None
    x: Tensor | None


def head(params: Tensors, hidden: Tensor, logits: Tensor, y: Tensor, found: Tensors) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of each member, (K,), and the gradient of `hidden`; those of the head go into `found`."""
    at = y[..., None]
    log_p = torch.log_softmax(logits, -1)
    right = log_p.gather(-1, at)
    # in place, as (K, B, V) is by far the largest tensor of a small net: p, less one where the token was
    d = _put(log_p.exp_(), at, torch.expm1(right)).mul_(1 / y.shape[1])
    found["head.weight"] = stacked.bmm(hidden.transpose(1, 2), d)
    found["head.bias"] = d.sum(1, keepdim=True)
    return stacked.mean(right).neg_(), stacked.bmm(d, params["head.weight"].transpose(1, 2))


def _put(p: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """Values, (K, B, 1), put where they belong in each row; into p itself, but for a GPU."""
    if not p.is_cuda:
        return p.scatter_(-1, at, value)
    # a scatter whose result is the same each time sorts there: some twenty kernels
    return torch.where(stacked.numbers(p.shape[-1], p.device) == at, value, p)


class Layer:
    """The way back through one layer; the gradients of its parameters go into `found`."""

    def __init__(self, config: DynamicsConfig, params: Tensors, layer: int, trace: Trace, found: Tensors) -> None:
        self.config, self.params, self.trace, self.found = config, params, trace, found
        self.prefix = f"{layer}."
        self.size = config.state_size

    def back(self, dy: Tensor) -> Tensor | None:
        """The gradient of x from that of y; None where the output does not depend on x."""
        of = self._output(dy)
        if self.config.use_input_gate:
            return self._input_gate(self._state(of.new, None), of)
        return self._state(of.new, of.x)

    # ---------------------------------------------------------------------------------------- the two products

    def _learn(self, name: str, inputs: Tensor, d: Tensor) -> None:
        """The gradients of one affine map, from its inputs and the gradient of its outputs."""
        self.found[f"{self.prefix}{name}.weight"] = stacked.bmm(inputs.transpose(1, 2), d)
        self.found[f"{self.prefix}{name}.bias"] = d.sum(1, keepdim=True)

    def _through(self, name: str, d: Tensor, start: int, stop: int, onto: Tensor | None = None) -> Tensor:
        """The gradient of inputs start to stop (in units of S) of one affine map, added to another."""
        weight = self.params[f"{self.prefix}{name}.weight"][:, start * self.size : stop * self.size].transpose(1, 2)
        return stacked.bmm(d, weight) if onto is None else stacked.baddbmm(onto, d, weight)

    # ---------------------------------------------------------------------------------------------- the layer

    def _output(self, dy: Tensor) -> Parts:
        trace = self.trace
        if trace.output_gate is None or trace.with_out is None:
            do, gate = _silu_backward(dy, trace.out), None
        else:
            gate = _sigmoid_backward(dy * trace.out, trace.output_gate)
            self._learn("output_gate", trace.with_out, gate)
            do = torch.addcmul(self._through("output_gate", gate, 0, 1), dy, trace.output_gate)
        self._learn("out", trace.z, do)
        found: dict[str, Tensor] = {}
        for names, start in wanted(self.config):
            stop = start + len(names)
            onto = None if gate is None else self._through("output_gate", gate, 1 + start, 1 + stop)
            d = self._through("out", do, start, stop, onto)
            found |= zip(names, d.chunk(len(names), -1), strict=True)
        return Parts(found.get("new"), found.get("old"), found.get("x"))

    def _state(self, d: Tensor | None, onto: Tensor | None) -> Tensor | None:
        """From the new state to what was read for it: [x; h] behind an input gate, else x alone. Added to `onto`."""
        if d is None:
            return onto
        trace, width = self.trace, 2 if self.config.use_input_gate else 1
        if trace.forget_gate is not None and trace.with_mixed is not None:
            gate = _sigmoid_backward(d * trace.mixed, trace.forget_gate)
            self._learn("forget_gate", trace.with_mixed, gate)
            onto = self._through("forget_gate", gate, 0, width, onto)
            d = torch.addcmul(self._through("forget_gate", gate, 2, 3), d, trace.forget_gate)
        if trace.state_gate is not None and trace.with_candidate is not None:
            gate = _sigmoid_backward(d * (trace.candidate - trace.h), trace.state_gate)
            self._learn("state_gate", trace.with_candidate, gate)
            onto = self._through("state_gate", gate, 0, width, onto)
            d = torch.addcmul(self._through("state_gate", gate, 2, 3), d, trace.state_gate)
        d = _tanh_backward(d, trace.candidate)
        self._learn("state", trace.read, d)
        return self._through("state", d, 0, width, onto)

    def _input_gate(self, dread: Tensor | None, of: Parts) -> Tensor | None:
        """From what the two gates let through to x."""
        trace, size, dx = self.trace, self.size, of.x
        assert trace.gates is not None
        if dread is None:  # the output reads the old state alone
            if of.old is None:
                return dx
            old = _sigmoid_backward(of.old * trace.h, trace.gates[..., size:])
        else:
            if of.old is not None:
                dread[..., size:] += of.old
            gates = _sigmoid_backward(dread * trace.both, trace.gates)
            new, old = gates.chunk(2, -1)
            let_through = dread[..., :size], trace.gates[..., :size]
            dx = torch.mul(*let_through) if dx is None else torch.addcmul(dx, *let_through)
            self._learn("input_gate", trace.both, new)
            dx = self._through("input_gate", new, 0, 1, dx)
        self._learn("state_input_gate", trace.both, old)
        return self._through("state_input_gate", old, 0, 1, dx)


def wanted(config: DynamicsConfig) -> list[tuple[list[str], int]]:
    """The parts of what the output reads that lead to a parameter, in runs of neighbours, and where each run begins.

    The old state does only behind an input gate.
    """
    parts = {"new": config.use_new_state, "old": config.use_old_state, "x": config.use_residual}
    runs: list[tuple[list[str], int]] = []
    joined = False
    for place, name in enumerate(name for name, is_read in parts.items() if is_read):
        leads = name != "old" or config.use_input_gate
        if leads and joined:
            runs[-1][0].append(name)
        elif leads:
            runs.append(([name], place))
        joined = leads
    return runs


def embedding(rows: Tensor, dx: Tensor, shape: torch.Size, found: Tensors) -> None:
    """The gradients of the embedding (K, V, S), whose rows were read, from that of the embedded tokens."""
    found["embed.weight"] = _gathered(rows, dx, shape)
    found["embed.bias"] = dx.sum(1, keepdim=True)


def _gathered(rows: Tensor, dx: Tensor, shape: torch.Size) -> Tensor:
    """The sum of what came to each row: (K, B), (K, B, S) -> (K, V, S)."""
    if dx.is_cuda:  # as a product: a sum by index whose order is the same each time sorts there
        every = stacked.numbers(shape[0] * shape[1], dx.device).view(*shape[:2], 1)
        return stacked.bmm((every == rows[:, None]).to(dx.dtype), dx)
    weight = dx.new_zeros(shape)
    weight.view(-1, shape[-1]).index_add_(0, rows.view(-1), dx.reshape(-1, shape[-1]))
    return weight
