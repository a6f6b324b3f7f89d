"""Cross-entropy over a large vocabulary, without ever holding all logits.

All logits of 4,096 tokens are 824 MB at 50,257 tokens of the vocabulary, and as much again for their gradient. Here
positions are gone through in chunks, and what one needs for the gradients of features, matrix and bias is used up as
soon as it is there: the logits of a chunk are made once, and are the only large thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# numbers in a chunk's logits: on a CPU few enough for its cache, on a GPU enough to fill it
AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
LEAST = 32  # positions in a chunk: below it the products are slow


def positions_at_once(vocabulary: int, device: torch.device) -> int:
    """Positions in a chunk."""
    return max(LEAST, AT_ONCE.get(device.type, AT_ONCE["cuda"]) // vocabulary)


def mean_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats, a scalar, of logits x weight' + bias; with a gradient for each of the three.

    x (N, h), weight (V, h), bias (V,), targets (N,). Under autocast products are made in its type, sums are not.
    """
    found: Tensor = _MeanLoss.apply(x, weight, bias, targets)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def losses(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each position, (N,); of the same as `mean_loss`, without gradient."""
    chunks = _Chunks(x, weight, bias, targets)
    return torch.cat([_loss(chunk, *_exp(chunk)[1:]) for chunk in chunks])


class _Chunk:
    """Some positions, and their logits.

    x        (n, h + 1)    features, and a one: so that the bias is a column of the matrix, and needs no pass of its own
    logits   (V, n)        vocabulary first: both products that follow read it row by row
    targets  (1, n)
    """

    def __init__(self, first: int, x: Tensor, logits: Tensor, targets: Tensor) -> None:
        self.first, self.last = first, first + len(x)
        self.x, self.logits, self.targets = x, logits, targets
        self.said = logits.gather(0, targets)  # (1, n)


class _Chunks:
    """The chunks of a batch, one after the other, in one and the same memory."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> None:
        kind = x.device.type
        self.low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        self.x = torch.cat((x, x.new_ones(len(x), 1)), 1)
        self.weight = torch.cat((weight, bias[:, None]), 1)
        self.targets = targets
        self.size = min(len(x), positions_at_once(len(weight), x.device))
        self._memory = x.new_empty(len(weight) * self.size)

    def __iter__(self) -> Iterator[_Chunk]:
        for first in range(0, len(self.x), self.size):
            x = self.x[first : first + self.size]
            logits = self._memory[: len(self.weight) * len(x)].view(-1, len(x))
            self.product(self.weight, x.t(), out=logits)
            yield _Chunk(first, x, logits, self.targets[None, first : first + self.size])

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a b, in `out` where it is given."""
        if self.low == a.dtype:
            return torch.mm(a, b, out=out)
        found = torch.mm(a.to(self.low), b.to(self.low))
        return found.to(a.dtype) if out is None else out.copy_(found)

    def add_product(self, a: Tensor, b: Tensor, onto: Tensor) -> None:
        """onto + a b, in place."""
        if self.low == a.dtype:
            onto.addmm_(a, b)
        else:
            onto += torch.mm(a.to(self.low), b.to(self.low))


def _exp(chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less their largest, exponentiated in place, (V, n); their sums and the largest, (1, n)."""
    largest = chunk.logits.amax(0, keepdim=True)
    powers = chunk.logits.sub_(largest).exp_()
    return powers, powers.sum(0, keepdim=True), largest


def _loss(chunk: _Chunk, sums: Tensor, largest: Tensor) -> Tensor:
    return (sums.log() + largest - chunk.said)[0]


class _MeanLoss(torch.autograd.Function):
    """The gradients are made on the way forward, while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        chunks = _Chunks(x, weight, bias, targets)
        each, back = torch.empty_like(x[:, 0]), torch.empty_like(x)
        onto = torch.zeros_like(chunks.weight)
        for chunk in chunks:
            powers, sums, largest = _exp(chunk)
            each[chunk.first : chunk.last] = _loss(chunk, sums, largest)
            # a softmax is the powers over their sum; in each column the one of the target is less by one. No two
            # columns add to one number, so that a GPU's order of adding is no matter
            powers.scatter_add_(0, chunk.targets, -sums)
            scale = (1 / (sums * len(x))).t()
            back[chunk.first : chunk.last] = chunks.product(powers.t(), weight) * scale
            chunks.add_product(powers, chunk.x * scale, onto)
        ctx.save_for_backward(back, onto)
        return each.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back, onto = ctx.saved_tensors
        [scale] = gradients
        return back * scale, onto[:, :-1] * scale, onto[:, -1] * scale, None
