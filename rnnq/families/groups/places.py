"""Where the inputs of a batch stand, and how a table with a row per element meets the rows of a net.

An input is one of n vectors, the orbit of the template, so that W x is a row of the table orbit · W, (n, d). Two ways:
`Rows` has a row for each tuple of the batch, and looks its tables up. `Cells` has one for every tuple that there is,
weighed by how often the batch holds it: where the group is so small that a batch holds most tuples, that is less work,
and nothing is looked up. Shapes: K members, B rows, n elements, d neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnq.families.device import brought


@dataclass(frozen=True)
class Rows:
    """A row for each tuple."""

    elements: Tensor  # (k, K, B): the row of each element in the members' tables, one below the other
    products: Tensor  # (k - 1, K, B): g_1 ... g_t for t = 2 ... k, or (1, K, B): the last alone; rows likewise
    weights: Tensor | None  # (K, B), summing to 1; None: all alike

    def left(self, h: Tensor) -> Tensor:
        """What is known of the elements so far, before the next: as it is."""
        return h

    def onto_left(self, d: Tensor) -> Tensor:
        """The gradient of `left`."""
        return d

    def right(self, table: Tensor, t: int) -> Tensor:
        """The table's row of each tuple's element t: (K, n, d) -> (K, B, d)."""
        return F.embedding(self.elements[t], table.reshape(-1, table.shape[-1]))

    def onto_right(self, d: Tensor, t: int, n: int) -> Tensor:
        """The gradient of `right`: (K, B, d) -> (K, n, d)."""
        return _sum_into(self.elements[t], d, n)

    def target(self, orbit: Tensor, t: int) -> Tensor:
        """What output t is to be: (K, B, n); t counts from the first that there is."""
        return F.embedding(self.products[t], orbit.reshape(-1, orbit.shape[-1]))

    def weight(self, t: int) -> Tensor | None:
        """How much each row of output t counts: (K, B, 1); None: all alike."""
        return None if self.weights is None else self.weights[..., None]

    def to(self, device: torch.device) -> Rows:
        """The same on a device, without waiting for the copy."""
        weights = None if self.weights is None else brought(self.weights, device)
        return Rows(brought(self.elements, device), brought(self.products, device), weights)


@dataclass(frozen=True)
class Cells:
    """A row for every tuple that there is, the last element varying fastest; after t elements there are n^t rows."""

    products: Sequence[Tensor]  # (n^t,) for t = 2 ... k, or the last alone
    weights: Tensor  # (K, n^k), summing to 1

    def left(self, h: Tensor) -> Tensor:
        """What is known of the elements so far, beside each of the next: (K, P, d) -> (K, P, 1, d)."""
        return h[:, :, None]

    def onto_left(self, d: Tensor) -> Tensor:
        """The gradient of `left`: (K, P, n, d) -> (K, P, d)."""
        return d.sum(2)

    def right(self, table: Tensor, t: int) -> Tensor:
        """The table beside each of the elements before: (K, n, d) -> (K, 1, n, d); as it is where there are none."""
        return table[:, None] if t else table

    def onto_right(self, d: Tensor, t: int, n: int) -> Tensor:
        """The gradient of `right`: (K, P, n, d) -> (K, n, d)."""
        return d.sum(1) if t else d

    def target(self, orbit: Tensor, t: int) -> Tensor:
        """What output t is to be: (K, n^(t+2), n)."""
        return orbit.index_select(1, self.products[t])

    def weight(self, t: int) -> Tensor:
        """How much each row of output t counts: (K, n^(t+2), 1)."""
        rows = len(self.products[t])
        return self._sums[rows][..., None]

    @cached_property
    def _sums(self) -> dict[int, Tensor]:
        """The weights of the tuples that begin alike, by how many beginnings there are."""
        members = len(self.weights)
        sizes = [len(products) for products in self.products]
        return {rows: self.weights.view(members, rows, -1).sum(-1) for rows in sizes}

    def to(self, device: torch.device) -> Cells:
        """The same on a device, without waiting for the copy."""
        return Cells([brought(products, device) for products in self.products], brought(self.weights, device))


Places = Rows | Cells


def flat(x: Tensor) -> Tensor:
    """The rows of `left` and `right` together, one below the other: (K, P, n, d) -> (K, P n, d)."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def unflat(d: Tensor, places: Places, t: int, n: int) -> Tensor:
    """What `flat` made flat."""
    return d.view(len(d), -1, n, d.shape[-1]) if t and isinstance(places, Cells) else d


def _sum_into(rows: Tensor, d: Tensor, n: int) -> Tensor:
    found = d.new_zeros(len(d) * n, d.shape[-1])
    found.index_add_(0, rows.reshape(-1), d.reshape(-1, d.shape[-1]))
    return found.view(len(d), n, -1)
