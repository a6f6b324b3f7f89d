"""Random numbers that a text decides, so that a batch is a pure function of what its text names."""

from __future__ import annotations

import hashlib

import torch


def generator(text: str) -> torch.Generator:
    """Random numbers of torch's, on the CPU, that no other text has."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
