"""What the CSV of a run has beside its losses, by the names of the published study. Reaches no torch."""

from __future__ import annotations

from rnnq.families.scaling import counts
from rnnq.families.scaling.config import ScalingConfig

Config = ScalingConfig
STEP = "micro-batches read"  # what `step` counts
COLUMNS = {  # after step and the losses, and what each of them means
    "total_flops_profiler": "6 h V FLOPs a token: what a profiler counts that does not see into the library's LSTM",
    "theoretical_flops": "6 N FLOPs a token, N all parameters that are trained",
    "tokens": "training tokens read",
}


def micro_batches(config: ScalingConfig, step: int) -> int:
    """What the study calls a step: micro-batches read after so many optimiser steps."""
    return step * config.gradient_accumulation_steps


def cells(config: ScalingConfig, step: int) -> list[str]:
    """COLUMNS after so many optimiser steps; each micro-batch is counted once."""
    read = step * config.tokens_per_step()
    profiler = 6.0 * config.hidden_size * config.vocab_size() * read
    return [f"{profiler:.2e}", f"{6.0 * counts.parameters(config) * read:.2e}", str(read)]
