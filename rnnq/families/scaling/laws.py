"""What a FLOP buys: Pareto fronts, power laws in compute, and the parametric form in parameters and tokens. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rnnq.families.scaling import intervals
from rnnq.families.scaling.intervals import Array

EXPONENTS = np.geomspace(2e-3, 3.0, 240)  # of a power law, that are tried before the best is refined
TOGETHER = 0.95  # correlation of log N and log D from which nobody can tell their shares apart


# ------------------------------------------------------------------------------------------------------------ the front


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The places of points that no other point beats: none has less or equal cost and loss, and less of one of them.

    By cost; O(n log n). Of equal points the first one is in it.
    """
    c, y = np.asarray(costs, float), np.asarray(losses, float)
    order = np.lexsort((np.arange(len(c)), y, c))
    best, found = math.inf, []
    for at in order:
        if y[at] < best:
            best = float(y[at])
            found.append(int(at))
    return found


# --------------------------------------------------------------------------------------------- a power law in compute


@dataclass(frozen=True)
class PowerLaw:
    """L = E + A C^alpha, with intervals of 95%."""

    e: float
    a: float
    alpha: float
    r2: float  # of the logarithm: of L - E where E is given, of L where it is fitted
    n: int  # runs
    is_e_given: bool
    alpha_interval: tuple[float, float] | None = None
    e_interval: tuple[float, float] | None = None

    def at(self, costs: Array) -> Array:
        """The loss that the law says."""
        return np.asarray(self.e + self.a * np.asarray(costs, float) ** self.alpha)


class Law(NamedTuple):
    """The numbers of a power law."""

    e: float
    a: float
    alpha: float


def power_law(costs: Sequence[float], losses: Sequence[float], e: float | None = None) -> PowerLaw | str:
    """Fit runs; `e` is the loss that no compute removes, or None to fit it, too. Or a sentence why that cannot be done.

    With E given it is a straight line through log C and log(L - E). Else the sum of squared relative errors of L is the
    least, E and A being at least 0.
    """
    c, y = np.asarray(costs, float), np.asarray(losses, float)
    needed = 3 if e is not None else 4
    if len(np.unique(c)) < needed:
        what = "with E given needs 3" if e is not None else "with E fitted needs 4"
        return f"a power law {what} different amounts of compute, and there are {len(np.unique(c))}"
    if e is not None and y.min() <= e:
        return f"E = {e:g} is no less than the lowest loss, {y.min():.4g}"
    drawn = _draws(c, needed)
    if e is not None:
        found, replicates, spent = _given(np.ones((1, len(c))), c, y, e)[0], _given(drawn, c, y, e), 2
    else:
        found, replicates, spent = _refined_free(c, y), _free(drawn, c, y, EXPONENTS), 3
    law = Law(*map(float, found))
    alpha = intervals.percentile(law.alpha, replicates[:, 2], len(c), spent)
    e_interval = None if e is not None else _not_negative(intervals.percentile(law.e, replicates[:, 0], len(c), spent))
    return PowerLaw(*law, _r2(c, y, law, e), len(c), e is not None, alpha, e_interval)


def _not_negative(found: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if found is None else (max(0.0, found[0]), found[1])


def _draws(c: Array, needed: int) -> Array:
    """How often each run is in a sample that is drawn with replacement, a row for each; of those samples that have
    enough different amounts of compute."""
    rng = intervals.generator()
    drawn = rng.integers(0, len(c), (intervals.DRAWS, len(c)))
    weights = np.stack([_times(row) for row in drawn])
    kinds = np.unique(c, return_inverse=True)[1]
    there = np.stack([(weights[:, kinds == kind].sum(axis=1) > 0) for kind in range(kinds.max() + 1)], -1)
    return np.asarray(weights[there.sum(axis=1) >= needed])


def _given(weights: Array, c: Array, y: Array, e: float) -> Array:
    """E, A and alpha for each row of weights of the runs: a straight line through the logarithms."""
    x, z = np.log(c), np.log(y - e)
    total = weights.sum(axis=1)
    x0, z0 = weights @ x / total, weights @ z / total
    alpha = (weights @ (x * z) / total - x0 * z0) / (weights @ (x * x) / total - x0**2)
    return np.stack([np.full_like(alpha, e), np.exp(z0 - alpha * x0), alpha], -1)


def _free(weights: Array, c: Array, y: Array, exponents: Array) -> Array:
    """E, A and alpha for each row of weights: the best of the exponents, for each of which E and A are linear.

    The best lies between the exponents: where a parabola through the errors beside it is lowest. Of samples that all
    stayed on the grid the spread would be too small where alpha is known better than the grid is fine.
    """
    unit = math.exp(float(np.log(c).mean()))
    u, v = np.broadcast_to((1 / y)[:, None], (len(y), len(exponents))), (c[:, None] / unit) ** -exponents / y[:, None]
    _, _, errors = _linear(weights.sum(axis=1, keepdims=True), *(weights @ sums for sums in _products(u, v)))
    alpha = exponents[0] * (exponents[1] / exponents[0]) ** _lowest(errors)
    u, v = np.broadcast_to(1 / y, weights.shape), (c / unit) ** -alpha[:, None] / y
    e, a, _ = _linear(weights.sum(axis=1), *((weights * sums).sum(axis=1) for sums in _products(u, v)))
    return np.stack([e, a * unit**alpha, -alpha], -1)


def _products(u: Array, v: Array) -> tuple[Array, ...]:
    return u * u, u * v, v * v, u, v


def _linear(total: Array, uu: Array, uv: Array, vv: Array, us: Array, vs: Array) -> tuple[Array, Array, Array]:
    """E and A, which are at least 0, and the sum of squared relative errors, from weighted sums of products."""
    e = np.maximum(0.0, (us * vv - vs * uv) / np.maximum(uu * vv - uv * uv, 1e-300))
    a = np.maximum(0.0, (vs - e * uv) / vv)
    return e, a, total - 2 * (e * us + a * vs) + e * e * uu + 2 * e * a * uv + a * a * vv


def _lowest(errors: Array) -> Array:
    """The place in each row where the errors are lowest, between the numbers, too."""
    best = errors.argmin(axis=1)
    rows, middle = np.arange(len(errors)), best.clip(1, errors.shape[1] - 2)
    left, here, right = (errors[rows, middle + step] for step in (-1, 0, 1))
    bend = left - 2 * here + right
    beside = (left - right) / (2 * np.where(bend > 0, bend, 1.0))
    found: Array = np.where((best == middle) & (bend > 0), middle + beside, best)
    return found


def _refined_free(c: Array, y: Array) -> Array:
    """The same of all runs, by a grid that gets finer twice."""
    tried = EXPONENTS
    for _ in range(2):
        alpha = -float(_free(np.ones((1, len(c))), c, y, tried)[0, 2])
        best = int(np.abs(tried - alpha).argmin())
        tried = np.geomspace(tried[max(0, best - 1)], tried[min(len(tried) - 1, best + 1)], 60)
    return np.asarray(_free(np.ones((1, len(c))), c, y, tried)[0])


def _r2(c: Array, y: Array, law: Law, given: float | None) -> float:
    e, a, alpha = law
    z = np.log(y - (given or 0.0))
    said = np.log(e - (given or 0.0) + a * c**alpha)
    total = float(((z - z.mean()) ** 2).sum())
    return 1 - float(((z - said) ** 2).sum()) / total if total > 0 else math.nan


# ------------------------------------------------------------------------- the parametric form in parameters and tokens


@dataclass(frozen=True)
class Parametric:
    """L = E + A N^-alpha + B D^-beta, of N parameters and D tokens, with intervals of 95%."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float
    r2: float  # of log L
    n: int  # runs
    alpha_interval: tuple[float, float] | None = None
    beta_interval: tuple[float, float] | None = None
    e_interval: tuple[float, float] | None = None

    @property
    def gamma(self) -> float:
        """By what power of compute the reducible loss falls where N and D are shared out best."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    @property
    def share(self) -> float:
        """The best N grows by this power of compute; the best D by the rest to 1."""
        return self.beta / (self.alpha + self.beta)

    def at(self, parameters: Array, tokens: Array) -> Array:
        """The loss that the law says."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return np.asarray(self.e + self.a * n**-self.alpha + self.b * d**-self.beta)


def parametric(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Parametric | str:
    """Fit runs, or a sentence why that cannot be done.

    The form is that of Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", section 3.3. Theirs is
    the Huber loss of the logarithm (appendix D.2); here it is the sum of squared relative errors, for which E, A and B
    are linear, so that no start decides what is found. E, A and B are at least 0.
    """
    n, d, y = (np.asarray(values, float) for values in (parameters, tokens, losses))
    if why := _why_not(n, d):
        return why
    centre = math.exp(np.log(n).mean()), math.exp(np.log(d).mean())
    u, v = n / centre[0], d / centre[1]
    found = _searched(np.ones_like(y), u, v, y)
    if found is None:
        return "the loss does not fall both with parameters and with tokens"
    rng, again = intervals.generator(), []
    for drawn in rng.integers(0, len(y), (intervals.DRAWS // 2, len(y))):
        one = None if _why_not(n[drawn], d[drawn]) else _searched(_times(drawn), u, v, y, found[3:])
        again += [] if one is None else [one]
    replicates = np.array(again, float).reshape(-1, 5)
    around = [intervals.percentile(float(found[i]), replicates[:, i], len(y), 5) for i in (3, 4, 0)]
    e, a, b, alpha, beta = (float(value) for value in found)
    left, z = np.log(e + a * u**-alpha + b * v**-beta) - np.log(y), np.log(y)
    r2 = 1 - float((left**2).sum()) / float(((z - z.mean()) ** 2).sum())
    a, b = a * centre[0] ** alpha, b * centre[1] ** beta
    return Parametric(e, a, alpha, b, beta, r2, len(y), around[0], around[1], _not_negative(around[2]))


def _why_not(n: Array, d: Array) -> str:
    if len(n) < 6:
        return f"L = E + A N^-α + B D^-β has 5 unknowns and needs at least 6 runs, and there are {len(n)}"
    for what, values in (("numbers of parameters", n), ("amounts of tokens", d)):
        if (kinds := len(np.unique(values))) < 3:
            return (
                f"L = E + A N^-α + B D^-β needs 3 different {what}, and there {'is' if kinds == 1 else 'are'} {kinds}"
            )
    r = abs(float(np.corrcoef(np.log(n), np.log(d))[0, 1]))
    if r > TOGETHER:
        return f"parameters and tokens grow together (|r| = {r:.2f} of their logarithms): what each does cannot be told"
    return ""


def _times(drawn: NDArray[np.int64]) -> Array:
    """How often each of n runs is among n that were drawn."""
    return np.bincount(drawn, minlength=len(drawn)).astype(float)


def _searched(weights: Array, n: Array, d: Array, y: Array, near: Array | None = None) -> Array | None:
    """E, A, B, alpha and beta by a grid of exponents that gets finer; None where the loss falls with only one.

    With `near`, two exponents, the search begins around them: for a sample of the runs that gave them.
    """
    alphas = betas = np.geomspace(0.02, 2.0, 20)
    if near is not None:
        alphas, betas = (np.geomspace(middle / 2.5, middle * 2.5, 9) for middle in near)
    ratio, found = float(alphas[1] / alphas[0]), np.zeros(5)
    for _ in range(7 if near is None else 5):
        errors, terms = _projected(weights, n, d, y, alphas, betas)
        best = int(errors.argmin())
        if not math.isfinite(errors[best]):
            return None
        alpha, beta = alphas[best // len(betas)], betas[best % len(betas)]
        found = np.array([*terms[best], alpha, beta])
        alphas, betas = (np.geomspace(middle / ratio, middle * ratio, 7) for middle in (alpha, beta))
        ratio = ratio ** (1 / 2.5)
    return found


def _projected(weights: Array, n: Array, d: Array, y: Array, alphas: Array, betas: Array) -> tuple[Array, Array]:
    """For each pair of exponents the weighted sum of squared relative errors, and E, A and B, which are linear there.

    The sum is infinite where A or B would be negative; where E would, it is 0.
    """
    alpha, beta = (one.ravel() for one in np.meshgrid(alphas, betas, indexing="ij"))
    terms = np.stack(
        [np.broadcast_to(1 / y, (len(alpha), len(y))), n ** -alpha[:, None] / y, d ** -beta[:, None] / y], 1
    )
    products = np.einsum("kim,m,kjm->kij", terms, weights, terms)
    sides = np.einsum("kim,m->ki", terms, weights)
    found = np.linalg.solve(products + 1e-14 * np.eye(3), sides[..., None])[..., 0]
    without = np.linalg.solve(products[:, 1:, 1:] + 1e-14 * np.eye(2), sides[:, 1:, None])[..., 0]
    found = np.where(found[:, :1] < 0, np.pad(without, ((0, 0), (1, 0))), found)
    errors = weights.sum() - 2 * (found * sides).sum(1) + np.einsum("ki,kij,kj->k", found, products, found)
    return np.where((found[:, 1:] < 0).any(axis=1), np.inf, errors), found
