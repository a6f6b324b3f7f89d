"""The three nets, K members side by side, and their gradients in closed form.

No biases. Parameters have the members first and end with (inputs, outputs); `matrices` gives them as they are usually
written. Shapes: K members, P rows, n elements, d neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rnnq.families.groups.config import GroupsConfig
from rnnq.families.groups.places import Places, Rows, flat, unflat

Params = dict[str, Tensor]

# what autograd itself calls
_tanh_backward = torch.ops.aten.tanh_backward
_gelu_backward = torch.ops.aten.gelu_backward


@dataclass(frozen=True)
class Trace:
    """What a forward pass leaves for the way back, by step of the sequence."""

    hidden: Sequence[Tensor]  # (K, P, d): what each output was read from, and each further step
    inner: Sequence[Any]  # what was computed before these


def draw(config: GroupsConfig) -> Params:
    """Independent normal numbers times init_scale over the root of the inputs, from the weights' seed alone."""
    generator = torch.Generator().manual_seed(config.weights_seed())
    model, n, k = config.model, config.order(), config.data.k
    d = int(model.hidden_dim or 0)

    def normal(inputs: int, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator) * (model.init_scale / math.sqrt(inputs))

    if model.model_type == "QuadraticRNN":
        return {
            "W_in": normal(n, n, d),
            "W_mix": normal(d, d, d),
            "W_drive": normal(n, n, d),
            "W_out": normal(d, d, n),
        }
    if model.model_type == "SequentialMLP":
        return {"W_in": normal(k * n, n, k, d), "W_out": normal(d, d, n)}
    return {"U": normal(2 * n, n, d), "V": normal(2 * n, n, d), "W": normal(n, d, n)}


def neuron_axes(config: GroupsConfig) -> tuple[tuple[str, int], ...]:
    """Which axis of each parameter counts neurons; W_mix belongs to pairs of them, and so to none."""
    return {
        "QuadraticRNN": (("W_in", 2), ("W_drive", 2), ("W_out", 1)),
        "SequentialMLP": (("W_in", 3), ("W_out", 1)),
        "TwoLayerNet": (("U", 2), ("V", 2), ("W", 1)),
    }[config.model.model_type]


def matrices(config: GroupsConfig, params: Params) -> dict[str, np.ndarray]:
    """The weights of one member as they are usually written: of outputs times inputs; a TwoLayerNet's W is (d, n).

    params: (1, ...), as in a checkpoint. W_in of a SequentialMLP is (d, k n), a block for each element in order.
    """
    found = {name: p.detach().cpu()[0] for name, p in params.items()}
    if config.model.model_type == "SequentialMLP":
        found["W_in"] = found["W_in"].permute(1, 0, 2).flatten(0, 1)
    return {name: (p if name == "W" else p.T).contiguous().numpy() for name, p in found.items()}


def parameter_count(config: GroupsConfig) -> int:
    """Weights."""
    n, k, d = config.order(), config.data.k, int(config.model.hidden_dim or 0)
    return {"QuadraticRNN": 3 * d * n + d * d, "SequentialMLP": (k + 1) * d * n, "TwoLayerNet": 3 * d * n}[
        config.model.model_type
    ]


def forward(config: GroupsConfig, params: Params, places: Places, orbit: Tensor) -> tuple[list[Tensor], Trace]:
    """The outputs, (K, P, n) each, in order; without `return_all_outputs` the last alone. orbit: (K, n, n)."""
    if config.model.model_type == "QuadraticRNN":
        return _recur(config, params, places, orbit)
    return _add_up(config, params, places, orbit)


def backward(
    config: GroupsConfig, params: Params, places: Places, orbit: Tensor, trace: Trace, d: Sequence[Tensor]
) -> Params:
    """The gradient of each parameter from that of each output; may overwrite what it is given."""
    if config.model.model_type == "QuadraticRNN":
        return _recur_back(config, params, places, orbit, trace, d)
    return _add_up_back(config, params, places, orbit, trace, d)


# ------------------------------------------------------------------------------------------------- QuadraticRNN


def _recur(config: GroupsConfig, params: Params, places: Places, orbit: Tensor) -> tuple[list[Tensor], Trace]:
    """h_2 = phi(W_in x_1, W_drive x_2), h_t = phi(W_mix h_(t-1), W_drive x_t), y_t = W_out h_t.

    phi(a, b) is (a + b)^2, or a b for a multiplicative net, for each neuron.
    """
    k = config.data.k
    drive = torch.bmm(orbit, params["W_drive"])
    h = places.right(torch.bmm(orbit, params["W_in"]), 0)
    hidden: list[Tensor] = []
    inner: list[Any] = []
    for t in range(1, k):
        right = places.right(drive, t)
        if config.model.transform_type == "multiplicative":
            left = places.left(h if t == 1 else torch.bmm(h, params["W_mix"]))
            inner.append((left, right))
            h = flat(left * right)
        else:
            s = _mixed(h, right, places, None if t == 1 else params["W_mix"])
            inner.append(s)
            h = s * s
        hidden.append(h)
    read = hidden if config.model.return_all_outputs else hidden[-1:]
    return [torch.bmm(h, params["W_out"]) for h in read], Trace(hidden, inner)


def _mixed(h: Tensor, right: Tensor, places: Places, mix: Tensor | None) -> Tensor:
    """W_mix h + W_drive x."""
    if mix is not None and isinstance(places, Rows):
        return torch.baddbmm(right, h, mix)
    return flat(places.left(h if mix is None else torch.bmm(h, mix)) + right)


def _recur_back(
    config: GroupsConfig, params: Params, places: Places, orbit: Tensor, trace: Trace, d: Sequence[Tensor]
) -> Params:
    k, n = config.data.k, orbit.shape[1]
    outputs = dict(zip(range(k - 1, 0, -1), reversed(d), strict=False))  # by the step that they were read at
    learnt: dict[str, Tensor] = {}
    drive: Tensor | None = None
    dh: Tensor | None = None
    for t in range(k - 1, 0, -1):
        dh = _read_back(params, trace.hidden[t - 1], outputs.get(t), dh, learnt)
        left, right = _phi_back(config, trace.inner[t - 1], dh, places, t, n)
        d_left = places.onto_left(left)
        d_drive = places.onto_right(right, t, n)
        drive = d_drive if drive is None else drive.add_(d_drive)
        if t > 1:
            _learn(learnt, "W_mix", trace.hidden[t - 2], d_left)
            dh = torch.bmm(d_left, params["W_mix"].transpose(1, 2))
        else:
            dh = d_left
    assert dh is not None
    assert drive is not None
    turned = orbit.transpose(1, 2)
    learnt["W_in"] = torch.bmm(turned, places.onto_right(dh, 0, n))
    learnt["W_drive"] = torch.bmm(turned, drive)
    return learnt


def _read_back(params: Params, h: Tensor, d: Tensor | None, dh: Tensor | None, learnt: Params) -> Tensor:
    """The gradient of a hidden state: from the output that was read from it, and from the next state."""
    if d is None:
        assert dh is not None
        return dh
    _learn(learnt, "W_out", h, d)
    back = params["W_out"].transpose(1, 2)
    return torch.bmm(d, back) if dh is None else torch.baddbmm(dh, d, back)


def _learn(learnt: Params, name: str, inputs: Tensor, d: Tensor) -> None:
    turned = inputs.transpose(1, 2)
    learnt[name] = torch.baddbmm(learnt[name], turned, d) if name in learnt else torch.bmm(turned, d)


def _phi_back(config: GroupsConfig, inner: Any, dh: Tensor, places: Places, t: int, n: int) -> tuple[Tensor, Tensor]:
    """From the gradient of phi(left, right) to those of both, as wide as the two together."""
    if config.model.transform_type == "multiplicative":
        left, right = inner
        wide = unflat(dh, places, t, n)
        return wide * right, wide * left
    ds = unflat(dh.mul_(inner).mul_(2), places, t, n)
    return ds, ds


# ---------------------------------------------------------------------------------- SequentialMLP and TwoLayerNet


def _add_up(config: GroupsConfig, params: Params, places: Places, orbit: Tensor) -> tuple[list[Tensor], Trace]:
    """y = W_out sigma(sum over t of W_t x_t), sigma the k-th power, or the TwoLayerNet's nonlinearity."""
    tables = _tables(config, params, orbit)
    s = places.right(tables[0], 0)
    for t in range(1, len(tables)):
        s = flat(places.left(s) + places.right(tables[t], t))
    if config.model.model_type == "SequentialMLP":
        root = s
        for _ in range(config.data.k - 2):
            root = root * s
        h = root * s
        return [torch.bmm(h, params["W_out"])], Trace([h], [root])
    h = SIGMA[str(config.model.nonlinearity)](s)
    return [torch.bmm(h, params["W"]) * float(config.model.output_scale or 1.0)], Trace([h], [s])


SIGMA = {"square": torch.square, "relu": torch.relu, "linear": torch.clone, "tanh": torch.tanh, "gelu": F.gelu}


def _tables(config: GroupsConfig, params: Params, orbit: Tensor) -> list[Tensor]:
    """For each element of the sequence what it adds to each neuron: (K, n, d)."""
    if config.model.model_type == "TwoLayerNet":
        return [torch.bmm(orbit, params["U"]), torch.bmm(orbit, params["V"])]
    w = params["W_in"]  # (K, n, k, d)
    return list(torch.bmm(orbit, w.flatten(2)).view(len(w), -1, *w.shape[2:]).unbind(2))


def _add_up_back(
    config: GroupsConfig, params: Params, places: Places, orbit: Tensor, trace: Trace, d: Sequence[Tensor]
) -> Params:
    k, n = config.data.k, orbit.shape[1]
    [dy], [h], [inner] = d, trace.hidden, trace.inner
    name = "W" if config.model.model_type == "TwoLayerNet" else "W_out"
    if config.model.output_scale not in (None, 1.0):
        dy = dy * float(config.model.output_scale or 1.0)
    learnt: Params = {name: torch.bmm(h.transpose(1, 2), dy)}
    ds = _sigma_back(config, torch.bmm(dy, params[name].transpose(1, 2)), inner, h)
    tables: list[Tensor] = []
    for t in range(k - 1, 0, -1):
        wide = unflat(ds, places, t, n)
        tables.append(places.onto_right(wide, t, n))
        ds = places.onto_left(wide)
    tables.append(places.onto_right(ds, 0, n))
    turned = orbit.transpose(1, 2)
    if config.model.model_type == "TwoLayerNet":
        return learnt | {"U": torch.bmm(turned, tables[1]), "V": torch.bmm(turned, tables[0])}
    every = torch.stack(tables[::-1], 2)  # (K, n, k, d)
    return learnt | {"W_in": torch.bmm(turned, every.flatten(2)).view(len(every), -1, *every.shape[2:])}


def _sigma_back(config: GroupsConfig, dh: Tensor, inner: Tensor, h: Tensor) -> Tensor:
    if config.model.model_type == "SequentialMLP":
        return dh.mul_(inner).mul_(config.data.k)
    kind = config.model.nonlinearity
    if kind == "square":
        return dh.mul_(inner).mul_(2)
    if kind == "relu":
        return dh.mul_(inner > 0)
    if kind == "tanh":
        dh = _tanh_backward(dh, h)
    elif kind == "gelu":
        dh = _gelu_backward(dh, inner)
    return dh
