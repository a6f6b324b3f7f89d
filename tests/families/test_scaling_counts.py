"""Parameters and FLOPs of LSTM language models, against numbers that were reckoned by others."""

from __future__ import annotations

import pytest

from rnnq.families.scaling import counts
from rnnq.families.scaling.config import ScalingConfig

# hidden_size -> all parameters of two layers with layer norm, untied, and those inside the LSTM
COUNTS = {
    16: (1_662_897, 4_352),
    24: (2_472_289, 9_600),
    32: (3_283_729, 16_896),
    48: (4_912_753, 37_632),
    64: (6_549_969, 66_560),
    128: (13_180_753, 264_192),
}


@pytest.mark.parametrize("width", COUNTS)
def test_parameters_are_those_of_the_published_study(width: int) -> None:
    config = ScalingConfig(hidden_size=width)
    inside = sum(_product(shape) for name, shape in counts.shapes(config).items() if name.startswith("lstm."))
    assert (counts.parameters(config), inside) == COUNTS[width]


def test_a_tied_read_out_has_no_weights_of_its_own() -> None:
    untied, tied = ScalingConfig(hidden_size=32), ScalingConfig(hidden_size=32, tie_embeddings=True)
    assert counts.parameters(untied) - counts.parameters(tied) == 50257 * 32


def test_the_read_out_costs_what_a_profiler_counts_of_4096_tokens() -> None:
    for width, counted in ((16, 1.976e10), (64, 7.905e10)):
        config = ScalingConfig(hidden_size=width)
        readout = counts.flops_per_token(config) - counts.flops_per_token(config, readout=False)
        assert readout * 4096 == pytest.approx(counted, rel=1e-3)
        assert counts.flops_per_token(config, readout=False) == 6 * 8 * width**2 * 2


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * _product(shape[1:])
