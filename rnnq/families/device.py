"""What a batch is made of, on the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for the copy; what is there already stays."""
    # only from pinned memory does a copy to a GPU not wait
    goes = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if goes else tensor).to(device, non_blocking=True)
