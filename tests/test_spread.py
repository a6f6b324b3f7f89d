"""How a mean and its spread are written, and how wide an interval is."""

from __future__ import annotations

import statistics

import pytest
from scipy import stats

from rnnq.spread import Spread, counted, half_width, with_spread


@pytest.mark.parametrize(
    ("mean", "half", "written"),
    [
        (0.98712, 0.00312, "0.9871 ± 0.0031"),
        (2.0, 1.414, "2.0 ± 1.4"),
        (12_345.6, 230.0, "12,346 ± 230"),
        (-0.5, 0.099, "-0.500 ± 0.099"),
        (6.461e-06, 4.685e-06, "6.461e-06 ± 4.7e-06"),
        (1.5, 0.0, "1.500 ± 0.0"),
        (1.5, None, "1.500"),
    ],
)
def test_a_mean_has_as_many_decimals_as_its_spread(mean: float, half: float | None, written: str) -> None:
    assert with_spread(mean, half) == written


def test_how_many_runs_are_missing_is_said_only_where_some_are() -> None:
    assert counted(0.98712, 0.00312, 5, 5) == "0.9871 ± 0.0031 (5)"
    assert counted(0.98712, 0.00312, 4, 5) == "0.9871 ± 0.0031 (4 of 5)"


def test_the_interval_is_that_of_student() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)

    half = half_width(statistics.stdev(values), len(values), Spread.t95)

    assert half == pytest.approx((high - low) / 2)


def test_one_run_has_no_spread() -> None:
    assert half_width(None, 1, Spread.t95) is None
    assert half_width(float("nan"), 1, Spread.std) is None
