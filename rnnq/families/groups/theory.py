"""What is known beforehand of such a run, and what its weights say: power spectra, plateaus, modes of neurons.

Numpy alone; arrays in, arrays out. A *mode* is a frequency (a conjugate pair counts once) of a cyclic group or of a
product of two, and an irreducible representation of another group. Power is normalised so that the powers of all modes
of a vector add up to its squared norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rnnq.families.groups import groups, resolve
from rnnq.families.groups.config import DataConfig
from rnnq.families.groups.groups import Group

TINY = 1e-6  # of the total power: what is below counts as rounding, not as a mode
NEAR = 1.05  # a plateau is reached once the loss is at most so many times its level


# --------------------------------------------------------------------------------------------------- power spectra


def weights(p: int) -> np.ndarray:
    """How often each frequency 0 ... floor(p/2) stands in the full transform: 2, but for those that are real."""
    found = np.full(p // 2 + 1, 2.0)
    found[0] = 1
    if p % 2 == 0:
        found[-1] = 1
    return found


def cyclic_power(x: np.ndarray) -> np.ndarray:
    """The power of each frequency: (..., p) -> (..., floor(p/2) + 1)."""
    p = x.shape[-1]
    found: np.ndarray = weights(p) * np.abs(np.fft.rfft(x)) ** 2 / p
    return found


def product_power(x: np.ndarray) -> np.ndarray:
    """The power of each pair of frequencies: (..., p1, p2) -> (..., p1, floor(p2/2) + 1).

    In the columns 0 and p2/2 the rows u and p1 - u are conjugates: the power stands in the lower one.
    """
    p1, p2 = x.shape[-2:]
    found: np.ndarray = product_weights(p1, p2) * np.abs(np.fft.rfft2(x)) ** 2 / (p1 * p2)
    return found


def product_weights(p1: int, p2: int) -> np.ndarray:
    """How often each entry of the real two-dimensional transform counts: 2, 1 where it is real, 0 where told already"""
    found = np.full((p1, p2 // 2 + 1), 2.0)
    for column in (0, p2 // 2) if p2 % 2 == 0 else (0,):
        found[:, column] = [1 if 2 * u % p1 == 0 else (2 if 2 * u < p1 else 0) for u in range(p1)]
    return found


def group_power(group: Group, x: np.ndarray) -> np.ndarray:
    """The power of each irreducible representation: (..., n) -> (..., representations).

    d tr(F^T F) / n, with F = sum_g x[g] rho(g)^T.
    """
    found = []
    for rho in group.irreps:
        transform = np.einsum("...g,gij->...ji", x, rho)
        found.append(rho.shape[1] * (transform**2).sum((-2, -1)) / group.order)
    return np.stack(found, -1)


def power(data: DataConfig, x: np.ndarray) -> np.ndarray:
    """The power of each mode of `modes(data)`: (..., n) -> (..., modes)."""
    if data.group_name == "cn":
        return cyclic_power(x)
    if data.group_name == "cnxcn":
        p1, p2 = int(data.p1 or 0), int(data.p2 or 0)
        found = product_power(x.reshape(*x.shape[:-1], p1, p2))
        return found[..., product_weights(p1, p2) > 0]
    return group_power(groups.of(data), x)


def modes(data: DataConfig) -> list[tuple[int, ...]]:
    """The names of the modes: (f,), or (u, v) with u of either sign, or the (place, size) of a representation."""
    if data.group_name == "cn":
        return [(f,) for f in range(int(data.p or 0) // 2 + 1)]
    if data.group_name == "cnxcn":
        p1, p2 = int(data.p1 or 0), int(data.p2 or 0)
        every = np.argwhere(product_weights(p1, p2) > 0)
        return [(int(u) if 2 * u <= p1 else int(u) - p1, int(v)) for u, v in every]
    return list(enumerate(resolve.irrep_sizes(data)))


def mean_output_power(data: DataConfig, outputs: np.ndarray) -> np.ndarray:
    """The power of each mode, averaged over samples: (..., samples, n) -> (..., modes)."""
    found: np.ndarray = power(data, outputs).mean(-2)
    return found


# --------------------------------------------------------------------------------------------------------- plateaus


@dataclass(frozen=True)
class Plateau:
    """A level of the loss, and the mode that is learnt when it is reached; None for the first, before any is."""

    level: float
    mode: tuple[int, ...] | None


def plateaus(data: DataConfig, template: np.ndarray, order: str = "power") -> list[Plateau]:
    """The levels at which the loss may rest, from that of a net that outputs 0 down to 0.

    level_j = (sum of the powers of the modes that are not among the first j) / n: with j modes learnt exactly and the
    rest predicted as 0. `order` is "power", the strongest first, or "criterion", see `scores`; the two differ only
    where representations differ in size. The levels do not depend on the model, nor on k but by the order.
    """
    found = power(data, template)
    kept = np.flatnonzero(found > TINY * found.sum())
    by = found if order == "power" else scores(data, template)
    kept = kept[np.argsort(-by[kept], kind="stable")]
    names = modes(data)
    # summed from the last to the first, so that the last level is exactly 0
    levels = np.append(np.cumsum(found[kept][::-1])[::-1], 0.0) / template.shape[-1]
    steps = [None, *(names[mode] for mode in kept)]
    return [Plateau(float(level), mode) for level, mode in zip(levels, steps, strict=True)]


def levels(data: DataConfig, template: np.ndarray, order: str = "power") -> list[float]:
    """The levels of `plateaus`."""
    return [plateau.level for plateau in plateaus(data, template, order)]


def scores(data: DataConfig, template: np.ndarray) -> np.ndarray:
    """What decides which mode is learnt next, (modes,): the largest ||F||_op^(k+1) / (C d)^((k-1)/2) of the unlearnt.

    F is the template's Fourier matrix, d its size, C = 1 for a representation that is real and 2 for a conjugate pair.
    Source: the paper's Theorem 4.1 as others report it, not checked against its text; k = `data.k`.
    """
    k = data.k
    if data.group_name in ("cn", "cnxcn"):
        found = power(data, template)
        count = _conjugates(data)
        # |F|^2 = n P / count; a pair is learnt as a representation of size 1 with C = 2
        norms = np.sqrt(template.shape[-1] * found / count)
        result: np.ndarray = norms ** (k + 1) / count ** ((k - 1) / 2)
        return result
    group = groups.of(data)
    each = []
    for rho in group.irreps:
        norm = np.linalg.norm(np.einsum("g,gij->ji", template, rho), 2)
        each.append(norm ** (k + 1) / rho.shape[1] ** ((k - 1) / 2))
    return np.array(each)


def _conjugates(data: DataConfig) -> np.ndarray:
    """1 for each mode that is its own conjugate, else 2."""
    if data.group_name == "cn":
        return weights(int(data.p or 0))
    found = product_weights(int(data.p1 or 0), int(data.p2 or 0))
    return found[found > 0]


def reached(curve: Sequence[tuple[int, float]], levels: Sequence[float], near: float = NEAR) -> list[int | None]:
    """The first step at which the loss, (step, value) in order, is at most `near` times each level; None: never.

    For the level 0 it is the first at most a thousandth of the first level.
    """
    bounds = [near * level if level > 0 else 1e-3 * levels[0] for level in levels]
    return [next((step for step, value in curve if value <= bound), None) for bound in bounds]


# --------------------------------------------------------------------------------------------- what neurons have learnt


@dataclass(frozen=True)
class Neurons:
    """What each of d neurons is tuned to."""

    mode: np.ndarray  # (d,): the place of its strongest mode in `modes(data)`
    phase: np.ndarray  # (d,): its phase there in radians, from 0 to 2 pi; NaN for a representation above size 1
    share: np.ndarray  # (d,): the part of its power, its mean aside, that the mode has; 0 for a neuron without any
    norm: np.ndarray  # (d,): the L2 norm of its weights


def neurons(data: DataConfig, weights: np.ndarray, tracked: Sequence[int] | None = None) -> Neurons:
    """The frequency and phase of each neuron: weights (d, n), such as rows of W_in or columns of W_out.

    With `tracked`, only these places in `modes(data)` are asked about; the mean, mode 0, never is. A neuron with
    weights cos(2 pi f m / p + a) has the phase a.
    """
    found = power(data, weights)
    found[..., 0] = 0.0  # the mean
    total = found.sum(-1)
    places = np.array(range(1, found.shape[-1]) if tracked is None else [t for t in tracked if t], dtype=int)
    mode = places[found[:, places].argmax(-1)]
    rows = np.arange(len(weights))
    share = np.divide(found[rows, mode], total, out=np.zeros(len(weights)), where=total > 0)
    return Neurons(mode, _phases(data, weights)[rows, mode], share, np.linalg.norm(weights, axis=-1))


def _phases(data: DataConfig, weights: np.ndarray) -> np.ndarray:
    """The phase of each mode of each neuron: (d, n) -> (d, modes)."""
    if data.group_name == "cn":
        transform = np.fft.rfft(weights)
    elif data.group_name == "cnxcn":
        p1, p2 = int(data.p1 or 0), int(data.p2 or 0)
        transform = np.fft.rfft2(weights.reshape(-1, p1, p2))[:, product_weights(p1, p2) > 0]
    else:
        return np.full((len(weights), len(groups.of(data).irreps)), np.nan)
    found: np.ndarray = np.angle(transform) % (2 * np.pi)
    found[found >= 2 * np.pi] = 0.0  # what a tiny negative number comes to
    return found


def by_mode_and_phase(found: Neurons, ranks: np.ndarray, dead: float = 0.1) -> np.ndarray:
    """The order in which a figure shows neurons: by the rank of their mode, then by phase; dead ones last, by norm.

    ranks: of each mode of `modes(data)`, such as the order of the template's powers; dead: norms below it.
    """
    is_dead = found.norm < dead
    phase = np.where(np.isnan(found.phase), 0.0, found.phase)
    within = np.where(is_dead, -found.norm, phase)
    of_group = np.where(is_dead, np.inf, ranks[found.mode])
    return np.lexsort((within, of_group))


def rearranged(matrix: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A square matrix between neurons, such as W_mix, with rows and columns in one order."""
    found: np.ndarray = matrix[np.ix_(order, order)]
    return found
