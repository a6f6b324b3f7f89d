"""How many parameters a model has, and what a token costs. Reaches no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rnnq.families.scaling.config import ScalingConfig


def shapes(config: ScalingConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and its shape, in the order of the forward pass. Gates are in the order i, f, g, o."""
    h, vocabulary = config.hidden_size, config.vocab_size()
    on_input, on_output = config.norms()
    found: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, h)}
    if on_input:
        found |= {"embedding_norm.weight": (h,), "embedding_norm.bias": (h,)}
    for layer in range(config.num_layers):
        found |= {f"lstm.{layer}.w_ih": (4 * h, h), f"lstm.{layer}.w_hh": (4 * h, h)}
        found |= {f"lstm.{layer}.b_ih": (4 * h,), f"lstm.{layer}.b_hh": (4 * h,)}
        if on_output:
            found |= {f"norm.{layer}.weight": (h,), f"norm.{layer}.bias": (h,)}
    if not config.tie_embeddings:
        found["readout.weight"] = (vocabulary, h)
    found["readout.bias"] = (vocabulary,)
    return found


def parameters(config: ScalingConfig) -> int:
    """Numbers that are learnt: V h + L (8 h² + 8 h) + layer norms + V h, unless tied, + V."""
    total = 0
    for shape in shapes(config).values():
        numbers = 1
        for size in shape:
            numbers *= size
        total += numbers
    return total


def flops_per_token(config: ScalingConfig, readout: bool = True) -> float:
    """FLOPs of training on one token: three times those of a forward pass, 2 (8 h² L) + 2 h V.

    A multiplication and an addition count as two; the backward pass as two forward ones; biases, gates, norms and the
    look-up of the embedding as nothing. Without `readout` the term 2 h V, which is what a profiler that does not see
    into the library's LSTM counts alone, is left out.
    """
    h = config.hidden_size
    forward = 16.0 * h * h * config.num_layers + (2.0 * h * config.vocab_size() if readout else 0.0)
    return 3.0 * forward
