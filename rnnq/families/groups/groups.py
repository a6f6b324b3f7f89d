"""Finite groups by their multiplication table, and their irreducible representations over the reals. Numpy alone.

Element 0 is the identity. The regular representation moves a template t so: (rho(g) t)[h] = t[g^-1 h].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rnnq.families.groups.config import DataConfig


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of n elements."""

    name: str
    table: np.ndarray  # (n, n): the product of g and h, in this order
    irreps: tuple[np.ndarray, ...]  # (n, d, d) each, orthogonal matrices; none for groups that have a Fourier transform

    @property
    def order(self) -> int:
        """n."""
        return len(self.table)

    @property
    def inverse(self) -> np.ndarray:
        """The inverse of each element, (n,)."""
        found: np.ndarray = np.argmin(self.table, axis=1)  # the identity is element 0
        return found

    def orbit(self, template: np.ndarray) -> np.ndarray:
        """The template as each element moves it: (n,) -> (n, n), row g is rho(g) t."""
        moved: np.ndarray = template[self.table[self.inverse]]
        return moved

    def products(self, tuples: np.ndarray) -> np.ndarray:
        """g_1 g_2 ... g_t for t = 1 ... k: (..., k) -> (..., k)."""
        found = tuples.copy()
        for t in range(1, tuples.shape[-1]):
            found[..., t] = self.table[found[..., t - 1], tuples[..., t]]
        return found


def of(data: DataConfig) -> Group:
    """The group that a config names."""
    if data.group_name == "cn":
        return cyclic(int(data.p or 0))
    if data.group_name == "cnxcn":
        return product(int(data.p1 or 0), int(data.p2 or 0))
    if data.group_name == "dihedral":
        return dihedral(int(data.group_n or 0))
    return octahedral() if data.group_name == "octahedral" else icosahedral()


@lru_cache(maxsize=8)
def cyclic(p: int) -> Group:
    """C_p: the shifts of p places."""
    shifts = np.arange(p)
    return Group(f"C{p}", (shifts[:, None] + shifts) % p, ())


@lru_cache(maxsize=8)
def product(p1: int, p2: int) -> Group:
    """C_p1 x C_p2: the shifts of a p1 x p2 array, row-major: element e moves rows by e div p2, columns by e mod p2."""
    rows, columns = np.divmod(np.arange(p1 * p2), p2)
    table = (rows[:, None] + rows) % p1 * p2 + (columns[:, None] + columns) % p2
    return Group(f"C{p1}xC{p2}", table, ())


@lru_cache(maxsize=8)
def dihedral(n: int) -> Group:
    """D_n, of order 2n: the rotations by 2 pi r / n, then these after the reflection at the first axis.

    Representations: the trivial one, the sign of a reflection, those of size 2 by their frequency; for even n also the
    parity of r, without and with that sign.
    """
    turn, flip = np.tile(np.arange(n), 2), np.repeat([0, 1], n)
    sign = 1 - 2 * flip
    table = (turn[:, None] + sign[:, None] * turn) % n + n * (flip[:, None] ^ flip)
    angles = 2 * np.pi * turn * np.arange(1, (n - 1) // 2 + 1)[:, None] / n
    planes = [_in_the_plane(angle, sign) for angle in angles]
    parity = 1 - 2 * (turn % 2)
    rest = [parity, parity * sign] if n % 2 == 0 else []
    numbers = [_numbers(values) for values in (np.ones(2 * n), sign, *rest)]
    return Group(f"D{n}", table, (*numbers[:2], *planes, *numbers[2:]))


def _in_the_plane(angle: np.ndarray, sign: np.ndarray) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s * sign], [s, c * sign]]).transpose(2, 0, 1)


def _numbers(values: np.ndarray) -> np.ndarray:
    return values.astype(float)[:, None, None]


@lru_cache(maxsize=1)
def octahedral() -> Group:
    """The 24 rotations of a cube.

    Representations: trivial; as rotations; these times the sign of how the axes are permuted; the permutation of the
    axes without what all have in common; that sign.
    """
    quarter_turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    next_axis = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    rotations = _generated([(quarter_turn,), (next_axis,)])[0]
    permutations = np.abs(rotations)
    sign = np.linalg.det(permutations).round()
    plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # at right angles to (1, 1, 1)
    irreps = (_numbers(np.ones(24)), rotations, rotations * _numbers(sign), plane @ permutations @ plane.T)
    return Group("octahedral", _table(rotations), (*irreps, _numbers(sign)))


@lru_cache(maxsize=1)
def icosahedral() -> Group:
    """The 60 rotations of an icosahedron, which are A5.

    Representations: trivial; as rotations; on symmetric matrices without trace; as rotations with the other root of
    x^2 = x + 1 for the golden ratio; and the one of size 4 in the product of the two.
    """

    def fifth_turn(golden: float) -> np.ndarray:
        return np.array([[1, -golden, golden - 1], [golden, golden - 1, -1], [golden - 1, 1, golden]]) / 2

    root = np.sqrt(5.0)
    next_axis = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    turns = fifth_turn((1 + root) / 2), fifth_turn((1 - root) / 2)
    # a word of generators has an image under each representation
    three, other = _generated([turns, (next_axis, next_axis)])
    five = _part(three, three, lambda a, b: a * a - a - 1)
    four = _part(three, other, lambda a, b: a * b - (a * a - a - 1))
    return Group("A5", _table(three), (_numbers(np.ones(60)), three, five, other, four))


def _part(a: np.ndarray, b: np.ndarray, character: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """The one irreducible part of the product of two representations whose character is a function of theirs."""
    wanted = character(np.trace(a, axis1=1, axis2=2), np.trace(b, axis1=1, axis2=2))
    both = np.einsum("gij,gkl->gikjl", a, b).reshape(len(a), 9, 9)
    projection = np.einsum("g,gij->ij", wanted, both) * wanted[0] / len(a)
    values, vectors = np.linalg.eigh((projection + projection.T) / 2)
    basis = vectors[:, values > 0.5]
    found: np.ndarray = basis.T @ both @ basis
    return found


def _generated(generators: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """All products of generators, each given by its images under some representations, the first of them faithful.

    In the order in which they are found, from the identity on; for each representation (n, d, d).
    """
    found = [tuple(np.eye(len(image)) for image in generators[0])]
    known = {_key(found[0][0])}
    for images in found:  # grows while it is walked through
        for generator in generators:
            further = tuple(a @ b for a, b in zip(images, generator, strict=True))
            if _key(further[0]) not in known:
                known.add(_key(further[0]))
                found.append(further)
    return [np.stack(images) for images in zip(*found, strict=True)]


def _key(matrix: np.ndarray) -> bytes:
    return (matrix * 1e4).round().astype(np.int64).tobytes()  # the elements are much farther apart than rounding


def _table(matrices: np.ndarray) -> np.ndarray:
    """The multiplication table of faithful matrices."""
    places = {_key(matrix): place for place, matrix in enumerate(matrices)}
    every = matrices[:, None] @ matrices[None]
    return np.array([[places[_key(matrix)] for matrix in row] for row in every])
