"""Text as numbers: the tokens of a corpus, and how many bytes each of them stands for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rnnq import data
from rnnq.data import Corpus
from rnnq.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Tokens:
    """A corpus as a model reads it."""

    name: str  # bytes, gpt2, bpe:N
    corpus: Corpus
    sha256: str  # of ids and of what they stand for
    ids: NDArray[np.integer] = field(repr=False)  # (n,), read-only
    lengths: NDArray[np.integer] = field(repr=False)  # (V,) bytes of each token

    def tokens_in(self, size: int) -> int:
        """How many tokens end within the first `size` bytes."""
        return min(size, len(self.ids))

    def tokens_from(self, place: int) -> int:
        """The first token that begins at byte `place` or after it."""
        return min(place, len(self.ids))


def problem(name: str) -> str | None:
    """What is wrong with the name of a kind of tokens."""
    return None if name in ("bytes", "gpt2") else f"tokens={name!r} is none of gpt2, bytes, bpe:N"


def vocab_size(name: str) -> int:
    """V, without loading anything."""
    return {"bytes": 256, "gpt2": 50257}[name]


def bytes_of(corpus: Corpus, characters: int) -> int:
    """How many bytes the first `characters` characters of a corpus are. Raises DataError when it has fewer."""
    size = len(corpus.bytes)
    if characters > size:
        raise DataError(f"max_characters={characters:,}: {corpus.name} has {size:,} characters")
    return characters


@functools.lru_cache(maxsize=8)
def load(corpus: str, name: str) -> Tokens:
    """The tokens of a corpus. Raises DataError when they cannot be had."""
    import numpy as np

    found = data.load(corpus)
    return Tokens(name, found, found.sha256, found.bytes, np.ones(256, dtype=np.int64))
