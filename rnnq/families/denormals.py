"""Numbers so small that a CPU takes a hundred times as long for each operation on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed() -> Iterator[None]:
    """Numbers below 1e-38 are zero on the CPU inside.

    A gradient that fades through hundreds of steps, or through gates that are shut, ends among them.
    """
    was = not bool(torch.full((1,), 2.0**-130) * 1.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was)
