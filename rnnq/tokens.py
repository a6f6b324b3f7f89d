"""Text as numbers: the tokens of a corpus, and how many bytes each of them stands for.

    bytes   each byte is a token: V = 256
    gpt2    the byte-level BPE of GPT-2: V = 50,257
    bpe:N   N tokens of a byte-level BPE, learnt from the first 80 % of the corpus

What was encoded is kept in the cache folder, in `tokens/`, with the vocabulary: who finds it there needs no library.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq import bpe, data, kept, processes
from rnnq.bpe import Vocabulary
from rnnq.data import Corpus
from rnnq.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SMALLEST = 257  # of bpe:N; with 256 there would be none but bytes
LEARNT_FROM = 0.8  # of a corpus, for bpe:N

_BLOCK = 1 << 16  # tokens; at the first of each it is known at which byte it begins
_CHUNK = 1 << 22  # bytes of which characters are counted at once
_FORMAT = 1  # of the cache: raised when what is kept, where text is cut, or how a vocabulary is learnt changes


@dataclass(frozen=True, eq=False)
class Tokens:
    """A corpus as a model reads it."""

    name: str  # bytes, gpt2, bpe:N
    corpus: Corpus
    sha256: str  # of ids and of what they stand for
    ids: NDArray[np.integer] = field(repr=False)  # (n,), read-only
    lengths: NDArray[np.integer] = field(repr=False)  # (V,) bytes of each token
    vocabulary: Vocabulary | None = field(default=None, repr=False)  # None: bytes

    def tokens_in(self, size: int) -> int:
        """How many tokens end within the first `size` bytes."""
        import numpy as np

        block = self._block(size)
        return block * _BLOCK + int(np.searchsorted(self._ends(block), size, "right"))

    def tokens_from(self, place: int) -> int:
        """The first token that begins at byte `place` or after it."""
        import numpy as np

        block = self._block(place)
        ends = self._ends(block)
        begins = ends - self.lengths[self.ids[block * _BLOCK :][: len(ends)]]
        return block * _BLOCK + int(np.searchsorted(begins, place, "left"))

    def bytes_in(self, first: int, last: int) -> int:
        """How many bytes the tokens from `first` to before `last` are."""
        return max(0, self._place(last) - self._place(first))

    def decode(self, ids: Any) -> bytes:
        """The bytes that some ids stand for."""
        import numpy as np

        found = np.asarray(ids)
        if self.vocabulary is None:
            return found.astype(np.uint8).tobytes()
        return self.vocabulary.decode(found.ravel().tolist())

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        """The ids of a text, (n,); of a str its UTF-8, with bytes that are none as os.fsdecode has them.

        Raises DataError when the library for it is not installed.
        """
        import numpy as np

        content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(content, np.uint8) if self.vocabulary is None else self.vocabulary.encode(content)

    @functools.cached_property
    def _begins(self) -> NDArray[np.int64]:
        """The byte at which each block begins, and last the one after the end."""
        import numpy as np

        sizes = [self.lengths[self.ids[at : at + _BLOCK]].sum() for at in range(0, len(self.ids), _BLOCK)]
        return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))

    def _block(self, place: int) -> int:
        """The block in which byte `place` is; the last one for what is behind the end."""
        import numpy as np

        return max(0, min(int(np.searchsorted(self._begins, place, "right")) - 1, len(self._begins) - 2))

    def _ends(self, block: int) -> NDArray[np.int64]:
        """The byte after each token of a block."""
        import numpy as np

        sizes = self.lengths[self.ids[block * _BLOCK :][:_BLOCK]]
        ends: NDArray[np.int64] = self._begins[block] + np.cumsum(sizes, dtype=np.int64)
        return ends

    def _place(self, token: int) -> int:
        """The byte at which a token begins."""
        token = max(0, min(token, len(self.ids)))
        block, rest = divmod(token, _BLOCK)
        return int(self._begins[block]) + int(self.lengths[self.ids[token - rest : token]].sum())


def problem(name: str) -> str | None:
    """What is wrong with the name of a kind of tokens."""
    if name in ("bytes", "gpt2"):
        return None
    found = re.fullmatch(r"bpe:([1-9][0-9]{0,9})", name)
    if found is None:
        return f"tokens={name!r} is none of gpt2, bytes, bpe:N"
    if not SMALLEST <= int(found[1]) <= bpe.LARGEST:
        return f"tokens={name!r}: N of bpe:N is from {SMALLEST} to {bpe.LARGEST:,}"
    return None


def vocab_size(name: str) -> int:
    """V, without loading anything."""
    known = {"bytes": 256, "gpt2": bpe.GPT2_SIZE}
    return known[name] if name in known else int(name.removeprefix("bpe:"))


@functools.lru_cache(maxsize=64)
def bytes_of(corpus: Corpus, characters: int) -> int:
    """How many bytes the first `characters` characters of a corpus are. Raises DataError when it has fewer.

    A character is a byte with those after it that UTF-8 continues it with.
    """
    import numpy as np

    before = 0
    for start in range(0, len(corpus.bytes), _CHUNK):
        begins = corpus.bytes[start : start + _CHUNK] & 0xC0 != 0x80
        count = int(np.count_nonzero(begins))
        if before + count > characters:
            return start + int(np.flatnonzero(begins)[characters - before])
        before += count
    if characters > before:
        raise DataError(
            f"max_characters={characters:,}: {corpus.name} has {before:,} characters",
            "a longer text, or none for all of it",
        )
    return len(corpus.bytes)


def vocabulary(corpus: str, name: str) -> Vocabulary | None:
    """What turns text into ids and back; None for bytes. Of these kinds bpe:N alone needs the corpus.

    Raises DataError when it cannot be had.
    """
    if name == "bytes":
        return None
    return bpe.gpt2() if name == "gpt2" else load(corpus, name).vocabulary


_lock = threading.Lock()


def load(corpus: str, name: str) -> Tokens:
    """The tokens of a corpus: from this process, else from the cache folder, else made.

    Raises DataError when they cannot be had.
    """
    wrong = problem(name)
    if wrong is not None:
        raise DataError(wrong)
    found = data.load(corpus)
    with _lock:
        return _bytes(found) if name == "bytes" else _encoded(found, name, data.cache_folder())


@functools.lru_cache(maxsize=8)
def _bytes(corpus: Corpus) -> Tokens:
    import numpy as np

    return Tokens("bytes", corpus, corpus.sha256, corpus.bytes, np.ones(256, dtype=np.int64))


@functools.lru_cache(maxsize=8)
def _encoded(corpus: Corpus, name: str, cache: Path) -> Tokens:
    import numpy as np

    content = {"format": _FORMAT, "corpus": corpus.sha256, "tokens": name}
    key = hashlib.sha256("{format} {corpus} {tokens}".format(**content).encode()).hexdigest()[:16]
    folder = cache / "tokens" / f"{name.replace(':', '-')}-{key}"

    def make(aside: Path) -> None:
        with kept.Telling(f"reading {corpus.name} as {name} tokens") as tell:
            _make(corpus, name, aside, tell)

    lie = kept.arrays(folder, f"{corpus.name} as {name} tokens", content, make)
    vocabulary = Vocabulary(lie.arrays["merges"], vocab_size(name), bpe.END_OF_TEXT if name == "gpt2" else b"")
    lengths = np.array([len(token) for token in vocabulary.tokens], np.int64)
    return Tokens(name, corpus, lie.sha256, lie.arrays["ids"], lengths, vocabulary)


def _make(corpus: Corpus, name: str, folder: Path, tell: kept.Telling) -> None:
    """Write the vocabulary, and the ids piece by piece."""
    size = len(corpus.bytes)
    learning = 0.3 if name != "gpt2" else 0.0  # about its part of the time
    vocabulary = bpe.gpt2() if name == "gpt2" else _learnt(corpus, vocab_size(name), lambda done: tell(learning * done))
    kept.write(folder, "merges", vocabulary.merges.astype("<u2"))
    with kept.Growing(folder, "ids", "<u2") as ids:
        for done, piece in vocabulary.encode_all(corpus.bytes, _threads()):
            ids.append(piece)
            tell(learning + (1 - learning) * done / size)


def _learnt(corpus: Corpus, size: int, tell: Any) -> Vocabulary:
    """From the beginning of a corpus, up to the end of a line where it has lines."""
    part = corpus.bytes[: int(len(corpus.bytes) * LEARNT_FROM)]
    end = len(part)
    while end > 0:
        start = max(0, end - _CHUNK)
        newline = part[start:end].tobytes().rfind(b"\n")
        if newline >= 0:
            return bpe.learnt(part[: start + newline + 1], size, tell)
        end = start
    return bpe.learnt(part, size, tell)


def _threads() -> int:
    """As many as there are cores for each worker that was started beside this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes.side_by_side())
