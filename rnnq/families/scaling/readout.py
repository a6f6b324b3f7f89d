"""Cross-entropy over a large vocabulary, without ever holding all logits.

All logits of 4,096 tokens are 824 MB at a vocabulary of 50,257, and as much again for their gradient. Here positions
are gone through in chunks, and a chunk's logits in blocks of the vocabulary, which stay in a CPU's cache while they are
worked on. Logits are made once: what they mean for the gradients is reckoned while they are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 27}  # logits in a block: few enough for a CPU's cache, many enough to fill a GPU
LEAST = 128  # positions in a chunk, where there are so many: with fewer the products are slow


def mean_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats, a scalar, of logits x weight' + bias; with a gradient for each of the three.

    x (N, h), weight (V, h), bias (V,), targets (N,). Under autocast products are made in its type, sums are not.
    """
    found: Tensor = _MeanLoss.apply(x, weight, bias, targets)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def losses(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each position, (N,), as `mean_loss` has it, without gradient."""
    said = _Said(x, weight, bias, is_kept=False)
    return torch.cat([chunk.log_sum for chunk in said.chunks()]) - said.of_targets(said.matrix[targets])


def sizes(positions: int, vocabulary: int, kind: str) -> tuple[int, int]:
    """Positions in a chunk, and tokens of the vocabulary in a block, on a kind of device."""
    block = BLOCK.get(kind, BLOCK["cuda"])
    chunk = min(positions, max(LEAST, block // vocabulary))
    return chunk, max(1, block // chunk)


@dataclass
class _Chunk:
    """Some positions, n of them, and what is said there."""

    places: slice
    x: Tensor  # (n, h + 1): the features, and a one
    powers: Sequence[Tensor]  # (block, n) each: exp(logit - the largest of the block)
    scales: Tensor  # (blocks, n): what makes of these a softmax
    log_sum: Tensor  # (n,): of all exp(logit)


class _Said:
    """What is said at each position, chunk by chunk, in one and the same memory.

    The bias is a column of the matrix, so that it needs no pass of its own. Vocabulary comes first: the products that
    follow read it row by row. Under autocast both factors are in its type, for the targets' logits, too: were these
    more exact than the others, the loss of what is all but certain would be below zero.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, is_kept: bool) -> None:
        kind = x.device.type
        self.full = x.dtype
        self.low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.full
        self.x = torch.cat((x, x.new_ones(len(x), 1)), 1).to(self.low)
        self.size, self.block = sizes(len(x), len(weight), kind)
        self.matrix = torch.cat((weight, bias[:, None]), 1).to(self.low)
        self.matrices = self.matrix.split(self.block)  # type: ignore[no-untyped-call]
        # what a gradient needs of a chunk is all its blocks; a loss alone is done with one after the other
        self.is_kept = is_kept
        self._memory = x.new_empty((len(weight) if is_kept else len(self.matrices[0])) * self.size)

    def chunks(self) -> Iterator[_Chunk]:
        for first in range(0, len(self.x), self.size):
            x = self.x[first : first + self.size]
            powers, largest, sums = [], [], []
            for matrix, block in zip(self.matrices, self._blocks(len(x)), strict=True):
                self.product(matrix, x.t(), out=block)
                largest.append(block.amax(0))
                powers.append(block.sub_(largest[-1]).exp_())
                sums.append(block.sum(0))
            tops = torch.stack(largest)
            top = tops.amax(0)
            scales = tops.sub_(top).exp_()
            total = (torch.stack(sums) * scales).sum(0)
            yield _Chunk(slice(first, first + len(x)), x, powers, scales / total, total.log() + top)

    def _blocks(self, n: int) -> Iterator[Tensor]:
        first = 0
        for matrix in self.matrices:
            numbers = len(matrix) * n
            yield self._memory[first : first + numbers].view(-1, n)
            first += numbers if self.is_kept else 0

    def of_targets(self, aimed: Tensor) -> Tensor:
        """The logit of each position's target, (N,), of which `aimed`, (N, h + 1), are the rows of the matrix."""
        each = (self.x.to(self.full) * aimed).sum(1)
        return each.to(self.low).to(self.full)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a b, in `out` where it is given."""
        if self.low == self.full:
            return torch.mm(a, b, out=out)
        found = torch.mm(a.to(self.low), b.to(self.low))
        return found.to(self.full) if out is None else out.copy_(found)

    def add_product(self, onto: Tensor, a: Tensor, b: Tensor) -> None:
        """onto + a b, in place."""
        if self.low == self.full:
            onto.addmm_(a, b)
        else:
            onto += torch.mm(a.to(self.low), b.to(self.low))


class _MeanLoss(torch.autograd.Function):
    """The gradients are made on the way forward, while a chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        said = _Said(x, weight, bias, is_kept=True)
        aimed = said.matrix[targets].to(said.full)
        each, back = -said.of_targets(aimed), -aimed[:, :-1]
        # the kernel that an embedding's gradient has: index_add_ adds up in another order each time on a GPU
        ones = said.x.to(said.full)
        onto = torch.ops.aten.embedding_dense_backward(ones, targets, len(weight), -1, False).neg_()
        blocks = [part.split(said.block) for part in (weight, onto)]
        for chunk in said.chunks():
            each[chunk.places] += chunk.log_sum
            for powers, scale, matrix, its in zip(chunk.powers, chunk.scales[:, :, None], *blocks, strict=True):
                back[chunk.places] += said.product(powers.t(), matrix) * scale
                said.add_product(its, powers, chunk.x * scale)
        ctx.save_for_backward(back.div_(len(x)), onto.div_(len(x)))
        return each.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back, onto = ctx.saved_tensors
        [scale] = gradients
        return back * scale, onto[:, :-1] * scale, onto[:, -1] * scale, None
