"""What a FLOP buys: Pareto fronts, power laws in compute, and the parametric form in parameters and tokens. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rnnq.families.scaling import intervals
from rnnq.families.scaling.intervals import Array

EXPONENTS = np.geomspace(2e-3, 3.0, 240)  # of a power law, that are tried before the best is refined
HUBER = 1e-3  # of the logarithm of the loss: beyond it an error counts by its size, not its square
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
    weights = np.stack([np.bincount(row, minlength=len(c)) for row in drawn]).astype(float)
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
    """E, A and alpha for each row of weights: the best of the exponents, for each of which E and A are linear."""
    unit = math.exp(float(np.log(c).mean()))
    u, v = np.broadcast_to((1 / y)[:, None], (len(y), len(exponents))), (c[:, None] / unit) ** -exponents / y[:, None]
    uu, uv, vv, us, vs = (weights @ (p * q) for p, q in ((u, u), (u, v), (v, v), (u, 1.0), (v, 1.0)))
    e = np.maximum(0.0, (us * vv - vs * uv) / np.maximum(uu * vv - uv * uv, 1e-300))
    a = np.maximum(0.0, (vs - e * uv) / vv)
    errors = weights.sum(axis=1, keepdims=True) - 2 * (e * us + a * vs) + e * e * uu + 2 * e * a * uv + a * a * vv
    best = errors.argmin(axis=1)
    rows = np.arange(len(weights))
    alpha = exponents[best]
    return np.stack([e[rows, best], a[rows, best] * unit**alpha, -alpha], -1)


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

    The form, and the Huber loss of the logarithm, are those of Hoffmann et al. 2022, "Training Compute-Optimal Large
    Language Models", section 3.3 and appendix D.2. E, A and B are at least 0.
    """
    n, d, y = (np.asarray(values, float) for values in (parameters, tokens, losses))
    if why := _why_not(n, d):
        return why
    centre = math.exp(np.log(n).mean()), math.exp(np.log(d).mean())
    scaled = n / centre[0], d / centre[1]
    best = _refined(*scaled, y, _started(*scaled, y))
    rng, found = intervals.generator(), []
    for drawn in rng.integers(0, len(y), (intervals.DRAWS // 3, len(y))):
        if not _why_not(n[drawn], d[drawn]):
            found.append(_refined(scaled[0][drawn], scaled[1][drawn], y[drawn], best, 60))
    replicates = np.array(found, float).reshape(-1, 5)
    around = [intervals.percentile(float(best[i]), replicates[:, i], len(y), 5) for i in (3, 4, 0)]
    left, z = _left(best, *scaled, y), np.log(y)
    r2 = 1 - float((left**2).sum()) / float(((z - z.mean()) ** 2).sum())
    e, a, b, alpha, beta = (float(value) for value in best)
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


def _started(n: Array, d: Array, y: Array) -> Array:
    """The best of a grid of exponents, for which E, A and B are linear."""
    from scipy.optimize import nnls

    best, found = math.inf, np.zeros(5)
    for alpha in np.geomspace(0.03, 1.5, 12):
        for beta in np.geomspace(0.03, 1.5, 12):
            terms = np.stack([np.ones_like(y), n**-alpha, d**-beta], -1) / y[:, None]
            (e, a, b), error = nnls(terms, np.ones_like(y))
            if error < best:
                best, found = error, np.array([e, a, b, alpha, beta])
    return found


def _left(law: Array, n: Array, d: Array, y: Array) -> Array:
    e, a, b, alpha, beta = law
    return np.asarray(np.log(np.maximum(e + a * n**-alpha + b * d**-beta, 1e-300)) - np.log(y))


def _refined(n: Array, d: Array, y: Array, start: Array, most: int = 400) -> Array:
    from scipy.optimize import least_squares

    bounds = ([0, 0, 0, 1e-3, 1e-3], [float(y.min()), np.inf, np.inf, 3, 3])
    inside = np.clip(start, np.array(bounds[0]) + 1e-9, np.array([0.999 * y.min(), 1e9, 1e9, 2.9, 2.9]))
    made = least_squares(_left, inside, bounds=bounds, args=(n, d, y), loss="huber", f_scale=HUBER, x_scale="jac",
                         max_nfev=most)  # fmt: skip
    return np.asarray(made.x)
