"""How far apart the runs of a group are: what stands behind ±, and how it is written."""

from __future__ import annotations

import math
from enum import StrEnum


class Spread(StrEnum):
    """What ± means."""

    std = "std"  # the sample standard deviation (n - 1): how much one run differs from another
    t95 = "t95"  # half of the 95% confidence interval of the mean, by Student's t: how well the mean is known

    @property
    def words(self) -> str:
        """What it is called in a legend."""
        return "std" if self is Spread.std else "95% interval of the mean"


def half_width(std: float | None, n: int, spread: Spread) -> float | None:
    """What stands behind ±, of n runs with this sample standard deviation; None of one run alone."""
    if std is None or std != std or n < 2:
        return None
    if spread is Spread.std:
        return std
    from scipy.special import stdtrit  # a tenth of a second, which only this needs

    return float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)


def number(value: float | None) -> str:
    """A number with four digits that count."""
    if value is None or value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def with_spread(mean: float, half: float | None) -> str:
    """ "0.9871 ± 0.0031": two digits of the spread, and the mean as far as these; without a spread the mean alone."""
    if half is None or half != half:
        return number(mean)
    if half == 0 or not math.isfinite(half):
        return f"{number(mean)} ± {half:.1f}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if decimals > 6 or abs(mean) >= 1e9:
        return f"{number(mean)} ± {half:.2g}"
    return f"{mean:,.{decimals}f} ± {half:,.{decimals}f}"


def counted(mean: float, half: float | None, n: int, of: int) -> str:
    """ "0.9871 ± 0.0031 (5)", or "(4 of 5)" where runs are missing."""
    return f"{with_spread(mean, half)} ({n if n == of else f'{n} of {of}'})"
