"""The family `scaling`: the language model, its streams, its read-out, and how it is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnnq.families.scaling import counts, nets
from rnnq.families.scaling.config import ScalingConfig

SMALL: dict[str, Any] = {"tokens": "bytes", "hidden_size": 8, "batch_size": 4, "sequence_length": 16, "steps": 8}


def drawn(config: ScalingConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of every shape, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in counts.shapes(config).items()}


def some_tokens(*shape: int, below: int = 256) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", ["input", "output", "both", None])
def test_the_net_is_the_one_that_ordinary_modules_make(position: str | None) -> None:
    norm = {"use_layer_norm": False} if position is None else {"layer_norm_position": position}
    config = ScalingConfig(**SMALL, **norm)
    params, tokens = drawn(config), some_tokens(4, 16)
    on_input, on_output = config.norms()

    x = nn.functional.embedding(tokens, params["embedding"])
    if on_input:
        x = nn.functional.layer_norm(x, (8,), params["embedding_norm.weight"], params["embedding_norm.bias"])
    for layer in range(2):
        lstm = nn.LSTM(8, 8, batch_first=True)
        names = zip(lstm.state_dict(), nets.WEIGHTS, strict=True)
        lstm.load_state_dict({theirs: params[f"lstm.{layer}.{mine}"] for theirs, mine in names})
        x = lstm(x)[0]
        if on_output:
            x = nn.functional.layer_norm(x, (8,), params[f"norm.{layer}.weight"], params[f"norm.{layer}.bias"])
    expected = nn.functional.linear(x, params["readout.weight"], params["readout.bias"])

    found, _ = nets.logits(config, params, tokens, {})
    torch.testing.assert_close(found.transpose(0, 1), expected)


def test_two_carried_windows_are_one_long_window() -> None:
    config = ScalingConfig(**SMALL)
    params, tokens = drawn(config), some_tokens(4, 32)

    whole, last = nets.logits(config, params, tokens, {})
    first, carried = nets.logits(config, params, tokens[:, :16], nets.zero_state(config, 4))
    second, after = nets.logits(config, params, tokens[:, 16:], carried)

    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(after, last)
