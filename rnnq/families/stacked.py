"""Products and means, (K, ...), of which a member gets the same bits alone as in a pack, on a GPU, too.

There torch gives a product of one matrix to another kernel than a batch of them, and a mean over rows to blocks whose
shape depends on how many rows there are. On a CPU these are torch's own, to the bit.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor


def _is_lone(x: Tensor) -> bool:
    return x.is_cuda and len(x) == 1


def _twice(x: Tensor) -> Tensor:
    return x.expand(2, -1, -1)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm: (K, n, m), (K, m, p) -> (K, n, p)."""
    return torch.bmm(_twice(a), _twice(b))[:1] if _is_lone(a) else torch.bmm(a, b)


def baddbmm(onto: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """torch.baddbmm: `onto`, (K, n or 1, p), added to the product."""
    if _is_lone(a):
        return torch.baddbmm(_twice(onto), _twice(a), _twice(b))[:1]
    return torch.baddbmm(onto, a, b)


def mean(x: Tensor) -> Tensor:
    """The mean of all that each member has: (K, ...) -> (K,)."""
    if not x.is_cuda:
        return x.mean(tuple(range(1, x.dim())))
    found: Tensor = _Mean.apply(x)  # type: ignore[no-untyped-call]
    return found


class _Mean(torch.autograd.Function):
    """By the kernel of layer norms, which gives each row a block of its own; torch has no gradient for this mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        rows = x.reshape(len(x), -1)
        _, found, _ = torch.native_layer_norm(rows, rows.shape[1:], None, None, 1e-5)
        return found.view(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        each: Tensor = (gradients[0] / math.prod(ctx.shape[1:])).view(-1, *[1] * (len(ctx.shape) - 1))
        return each.expand(*ctx.shape)


@functools.lru_cache(maxsize=8)
def numbers(n: int, device: torch.device) -> Tensor:
    """0 to n - 1, made once: (n,)."""
    return torch.arange(n, device=device)
