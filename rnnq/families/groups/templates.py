"""The vector that a group moves: one real number for each element, with mean 0. Numpy and scipy alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rnnq.families.groups import digits, groups, theory
from rnnq.families.groups.config import DataConfig, GroupsConfig
from rnnq.families.groups.resolve import frequencies

FIRST, LAST = 100.0, 10.0  # squared amplitudes of the strongest and of the weakest mode of a fourier template
HEIGHT = 10.0  # of a one-hot template of a group that is no product of cyclic ones


def draw(config: GroupsConfig) -> np.ndarray:
    """The template of a config, (n,), from its template's seed alone. Raises DataError when there are no digits."""
    found: np.ndarray = _draw(config.data, config.template_seed()).copy()
    return found


@lru_cache(maxsize=64)
def _draw(data: DataConfig, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = data.template_type
    if kind == "custom_fourier":
        found = custom_fourier(data)
    elif kind == "onehot":
        found = onehot(data)
    elif kind == "mnist":
        found = _digit(data, rng)
    elif kind == "gaussian":
        found = gaussian(int(data.p or 0), rng)
    elif data.group_name == "cn":
        found = fourier(int(data.p or 0), int(data.n_freqs or 0), rng)
    else:
        found = fourier_2d(int(data.p1 or 0), int(data.p2 or 0), int(data.n_freqs or 0), rng)
    centred: np.ndarray = found - found.mean()
    return centred


def fourier(p: int, modes: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct frequencies with squared amplitudes from 100 down to 10, random phases; standard deviation 1.

    At the frequency p / 2 only the real part survives, so that its power depends on the phase.
    """
    chosen = rng.choice(np.arange(1, p // 2 + 1), size=modes, replace=False)
    spectrum = np.zeros(p, complex)
    for f, value in zip(chosen, _amplitudes(modes) * _phases(modes, rng), strict=True):
        spectrum[f], spectrum[-f] = value, np.conj(value)
    return _standard(np.fft.ifft(spectrum).real)


def fourier_2d(p1: int, p2: int, modes: int, rng: np.random.Generator) -> np.ndarray:
    """The slowest frequencies, with squared amplitudes from 100 down to 10, random phases; standard deviation 1."""
    spectrum = np.zeros((p1, p2), complex)
    chosen = frequencies(p1, p2)[:modes]
    for (u, v), value in zip(chosen, _amplitudes(modes) * _phases(modes, rng), strict=True):
        spectrum[u, v], spectrum[-u, -v] = value, np.conj(value)
    found: np.ndarray = _standard(np.fft.ifft2(spectrum).real).ravel()
    return found


def _amplitudes(modes: int) -> np.ndarray:
    return np.sqrt(np.linspace(FIRST, LAST, modes))


def _phases(modes: int, rng: np.random.Generator) -> np.ndarray:
    found: np.ndarray = np.exp(1j * rng.uniform(0, 2 * np.pi, modes))
    return found


def _standard(values: np.ndarray) -> np.ndarray:
    centred: np.ndarray = values - values.mean()
    scaled: np.ndarray = centred / (centred.std() or 1.0)
    return scaled


def gaussian(p: int, rng: np.random.Generator) -> np.ndarray:
    """Three bumps on a circle, each with its centre, width (0.5 to 2) and height (0.5 to 1); standard deviation 1."""
    places = np.arange(p)
    found = np.zeros(p)
    for _ in range(3):
        centre, width, height = rng.uniform(0, p), rng.uniform(0.5, 2), rng.uniform(0.5, 1)
        far = np.abs(places - centre)
        found += height * np.exp(-(np.minimum(far, p - far) ** 2) / (2 * width**2))
    return _standard(found)


def onehot(data: DataConfig) -> np.ndarray:
    """One element above all others: 1 at the identity of a product of cyclic groups, else 10 at element 1."""
    group = groups.of(data)
    found = np.zeros(group.order)
    found[1 if group.irreps else 0] = HEIGHT if group.irreps else 1.0
    return found


def custom_fourier(data: DataConfig) -> np.ndarray:
    """The template whose power spectrum is `powers`; each Fourier matrix is a multiple of the identity."""
    powers = np.array(data.powers)
    if data.group_name == "cn":
        p = int(data.p or 0)
        of_frequencies: np.ndarray = np.fft.irfft(np.sqrt(powers * p / theory.weights(p)), p)
        return of_frequencies
    group = groups.of(data)
    # (1/n) d tr(rho(g) c 1) with c = sqrt(n P / d^2)
    characters = np.stack([np.trace(rho, axis1=1, axis2=2) for rho in group.irreps])
    found: np.ndarray = np.sqrt(powers / group.order) @ characters
    return found


def _digit(data: DataConfig, rng: np.random.Generator) -> np.ndarray:
    images = digits.of_class(4 if data.mnist_label is None else data.mnist_label)
    image = images[rng.integers(len(images))].astype(float)
    if data.group_name == "cnxcn":
        return resized(image, int(data.p1 or 0), int(data.p2 or 0)).ravel()
    from scipy.interpolate import interp1d  # most templates can do without, and it takes a second

    rows = image.mean(1)
    places = np.linspace(0, 1, len(rows))
    found: np.ndarray = interp1d(places, rows, kind="cubic")(np.linspace(0, 1, int(data.p or 0)))
    return found


def resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """An image at another size: bilinear, pixels seen as areas (corners are not aligned)."""
    found: np.ndarray = _bilinear(image.shape[0], rows) @ image @ _bilinear(image.shape[1], columns).T
    return found


def _bilinear(before: int, after: int) -> np.ndarray:
    """Which part each old pixel has in each new one: (after, before)."""
    places = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    low = np.minimum(places.astype(int), before - 1)
    high = np.minimum(low + 1, before - 1)
    found = np.zeros((after, before))
    np.add.at(found, (np.arange(after), low), 1 - (places - low))
    np.add.at(found, (np.arange(after), high), places - low)
    return found
