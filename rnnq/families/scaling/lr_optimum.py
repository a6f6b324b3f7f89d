"""The learning rate at which a width does best, and whether it carries over from width to width. Pure.

The rules are those of hansgundlach/Experimental_Progress: the lowest loss of the sweep, and a parabola through the loss
over the logarithm of the rate, which is taken where it deserves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnnq.families.scaling import intervals
from rnnq.families.scaling.intervals import Array

NEAR = 1.0  # nats above the lowest loss up to which a point is part of the parabola
LEAST_R2 = 0.9
INSIDE = 0.1  # decades from either end of the sweep that the parabola's lowest point keeps
STEP = 0.5  # decades: what may lie between the best rates of two widths where a rate is said to carry over
ROUNDED = 1e-6  # of a step: rates are rounded when they are written


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one width."""

    rate: float  # the parabola's where it may be taken, else that of the lowest loss
    lowest: float  # the rate of the sweep with the lowest loss
    parabola: float | None  # where the parabola is lowest, whether or not it is taken
    r2: float | None
    why_not: str  # why the parabola is not taken; empty where it is
    edge: int  # -1, 1: the lowest loss is that of the lowest, highest rate, so that the best may lie beyond; else 0
    rates: int  # that have a loss

    @property
    def is_parabola(self) -> bool:
        """Whether `rate` is the parabola's."""
        return not self.why_not


def find(rates: Sequence[float], losses: Sequence[float]) -> Optimum | None:
    """The best of a sweep; None where no loss is finite.

    rates   different ones, positive
    losses  nats; not finite where training diverged: such a rate bounds the sweep, and is never the best
    """
    x, y = _sorted(rates, losses)
    known = np.isfinite(y)
    if not known.any():
        return None
    vertex, r2, refused = _parabolas(x[known], y[known][None])
    at = int(np.where(known, y, np.inf).argmin())
    why_not = refused[0]
    edge = -1 if at == 0 else 1 if at == len(x) - 1 else 0
    best = x[at] if why_not else vertex[0]
    has = math.isfinite(vertex[0])
    return Optimum(float(10**best), float(10 ** x[at]), float(10 ** vertex[0]) if has else None,
                   float(r2[0]) if has else None, why_not, edge, int(known.sum()))  # fmt: skip


def _sorted(rates: Sequence[float], losses: Sequence[float]) -> tuple[Array, Array]:
    x, y = np.log10(np.asarray(rates, float)), np.asarray(losses, float)
    order = np.argsort(x)
    return x[order], y[order]


def _parabolas(x: Array, y: Array) -> tuple[Array, Array, list[str]]:
    """Of each row of losses: where its parabola is lowest (NaN: nowhere), its R², and why it is not taken."""
    with np.errstate(all="ignore"):
        kept = y <= y.min(axis=1, keepdims=True) + NEAR
        u = x - x.mean()
        powers = np.stack([np.ones_like(u), u, u * u], -1)  # (rates, 3)
        products = np.einsum("br,rp,rq->bpq", kept, powers, powers)
        is_enough = kept.sum(axis=1) >= 3
        products[~is_enough] = np.eye(3)
        beta = np.linalg.solve(products, np.einsum("br,br,rp->bp", kept, y, powers)[..., None])[..., 0]
        left = np.where(kept, y - beta @ powers.T, 0.0)
        mean = (y * kept).sum(axis=1, keepdims=True) / kept.sum(axis=1, keepdims=True)
        r2 = 1 - (left**2).sum(axis=1) / (np.where(kept, y - mean, 0.0) ** 2).sum(axis=1)
        vertex = np.where(is_enough & (beta[:, 2] > 0), x.mean() - beta[:, 1] / (2 * beta[:, 2]), np.nan)
    return vertex, r2, [_refusal(*one, x) for one in zip(is_enough, vertex, r2, strict=True)]


def _refusal(is_enough: bool, vertex: float, r2: float, x: Array) -> str:
    if not is_enough:
        return f"fewer than 3 rates within {NEAR:g} nat of the best"
    if not math.isfinite(vertex):
        return "the parabola has no lowest point"
    if not r2 >= LEAST_R2:
        return f"the parabola has R² {r2:.2f} < {LEAST_R2}"
    if not x.min() + INSIDE - ROUNDED <= vertex <= x.max() - INSIDE + ROUNDED:
        return f"the parabola is lowest less than {INSIDE} decades inside the sweep, or outside"
    return ""


# ------------------------------------------------------------------------------------------------- how well it is known


def replicates(rates: Sequence[float], losses: Sequence[Array], paired: bool, rng: np.random.Generator) -> Array:
    """log10 of the best rate, by means over runs that are drawn with replacement, DRAWS times.

    losses  of each rate those of its seeds, finite
    paired  the seeds of all rates are the same, in the same order: then seeds are drawn, not runs, as one seed's luck
            is the same at every rate
    """
    order = np.argsort(np.asarray(rates, float))
    x = np.log10(np.asarray(rates, float))[order]
    sizes = [len(own) for own in losses]
    if paired:
        drawn = rng.integers(0, sizes[0], (intervals.DRAWS, sizes[0]))
        means = [np.asarray(losses[at])[drawn].mean(axis=1) for at in order]
    else:
        means = [
            np.asarray(losses[at])[rng.integers(0, sizes[at], (intervals.DRAWS, sizes[at]))].mean(axis=1)
            for at in order
        ]
    y = np.stack(means, -1)
    vertex, _, refused = _parabolas(x, y)
    return np.where(np.array(refused) == "", vertex, x[y.argmin(axis=1)])


# ------------------------------------------------------------------------------------------------- from width to width


@dataclass(frozen=True)
class Shift:
    """log10 of the best rate is `intercept + slope log10(width)`."""

    intercept: float
    slope: float
    low: float | None  # of the slope: by Student's t, from how far the widths are from the line; from 3 widths on
    high: float | None
    r2: float
    widths: int

    @property
    def factor(self) -> float:
        """The same as a law: rate = factor width^slope."""
        return float(10**self.intercept)


def shift(widths: Sequence[float], rates: Sequence[float]) -> Shift | None:
    """How the best rate changes with width; None for a single width."""
    x, y = np.log10(np.asarray(widths, float)), np.log10(np.asarray(rates, float))
    spread = float(((x - x.mean()) ** 2).sum())
    if spread == 0:
        return None
    slope = float(((x - x.mean()) * y).sum()) / spread
    left = y - y.mean() - slope * (x - x.mean())
    total = float(((y - y.mean()) ** 2).sum())
    free = len(x) - 2
    found = intervals.student(slope, math.sqrt(float((left**2).sum()) / free / spread) if free > 0 else 0.0, free)
    low, high = found if found else (None, None)
    r2 = 1 - float((left**2).sum()) / total if total > 0 else math.nan
    return Shift(float(y.mean() - slope * x.mean()), slope, low, high, r2, len(x))


@dataclass(frozen=True)
class Transfer:
    """Whether the best rate of one width will do for another."""

    answer: str  # yes, no, cannot say
    steps: float  # of half a decade, between the lowest and the highest of the best rates
    why: str  # of "cannot say", and of "no" where it holds of bounds alone


def transfer(optima: Sequence[tuple[int, Optimum]]) -> Transfer:
    """Judge the optima of several widths: yes where all lie within half a decade.

    A best rate at the end of its sweep is a bound alone. Where even the bounds are too far apart it is a no.
    """
    if not optima:
        return Transfer("cannot say", 0.0, "no width has a finite loss")
    at = np.log10([one.rate for _, one in optima])
    steps = float(at.max() - at.min()) / STEP
    if len(optima) < 2:
        return Transfer("cannot say", steps, f"there is one width, {optima[0][0]}")
    few = [width for width, one in optima if one.rates < 2]
    if few:
        return Transfer("cannot say", steps, f"one learning rate at width {_listed(few)}")
    low = max(-math.inf if one.edge < 0 else x for x, (_, one) in zip(at, optima, strict=True))
    high = min(math.inf if one.edge > 0 else x for x, (_, one) in zip(at, optima, strict=True))
    at_edge = [width for width, one in optima if one.edge]
    if not at_edge:
        return Transfer("yes" if steps <= 1 + ROUNDED else "no", steps, "")
    if (low - high) / STEP > 1 + ROUNDED:
        return Transfer("no", steps, f"at least: the optimum lies at the edge of the sweep at width {_listed(at_edge)}")
    return Transfer("cannot say", steps, f"the optimum lies at the edge of the sweep at width {_listed(at_edge)}")


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))
