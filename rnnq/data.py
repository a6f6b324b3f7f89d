"""Corpora: raw bytes, and the sha256 that says which.

    stdlib     the running Python's own standard library source: needs nothing, differs by version
    enwik8     the first 100,000,000 bytes of a Wikipedia dump: downloaded once into the cache folder
    any other  the path of a file, raw; a file that is really called stdlib is ./stdlib

The cache folder is $RNNQ_CACHE, else the user's own (~/.cache/rnnq on Linux). $RNNQ_ENWIK8_URL names a mirror
of enwik8.zip; the checksums stay.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rnnq.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress, TaskID

CONNECT_S = 10.0  # seconds to wait for a connection: a machine without a network should say so soon
READ_S = 60.0  # seconds without a byte
RETRY_S = 60.0  # seconds before a failed download is tried again

FILE_HINT = "a corpus is stdlib, enwik8, or the path of a file that holds text"


@dataclass(frozen=True)
class Corpus:
    """Text as a model reads it: bytes that nobody can change, and their sha256."""

    name: str  # as the config names it
    sha256: str  # of `bytes`
    bytes: NDArray[np.uint8] = field(repr=False, compare=False)  # (n,), read-only


@dataclass(frozen=True)
class _Download:
    """A file that a zip on the net holds."""

    url: str  # of the zip
    zip_sha256: str
    member: str  # the file's name, in the zip and in the cache folder
    file_sha256: str


_ENWIK8 = _Download(
    url="https://mattmahoney.net/dc/enwik8.zip",
    zip_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    member="enwik8",
    file_sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
)

_lock = threading.Lock()
_loaded: dict[str, tuple[object, Corpus]] = {}  # name -> what the file looked like then, the corpus
_failed: dict[tuple[str, Path], tuple[float, DataError]] = {}  # url, file -> when to try again, why it failed


def load(name: str) -> Corpus:
    """The corpus of that name. Raises DataError when it cannot be had.

    A process reads a corpus once, and a file again when it has changed. The whole corpus is read into memory
    and hashed there, not mapped: a file that somebody rewrites cannot change under a run.
    """
    with _lock:
        built_in = _BUILT_IN.get(name)
        path, stamp = (Path(name), None) if built_in else _find(name)
        if name not in _loaded or _loaded[name][0] != (path, stamp):
            corpus = built_in() if built_in else _corpus(name, _read(name, path))
            _loaded[name] = ((path, stamp), corpus)
        return _loaded[name][1]


def cache_folder() -> Path:
    """Where downloads are kept: $RNNQ_CACHE, else the folder that the operating system has for it."""
    chosen = os.environ.get("RNNQ_CACHE")
    if chosen:
        return _full_path(chosen)
    import pooch  # type: ignore[import-untyped]

    return Path(pooch.os_cache("rnnq"))


def _corpus(name: str, content: bytes) -> Corpus:
    import hashlib

    import numpy as np

    return Corpus(name, hashlib.sha256(content).hexdigest(), np.frombuffer(content, dtype=np.uint8))


# ------------------------------------------------------------------------------------------------- files


def _full_path(name: str) -> Path:
    """A path with ~ expanded, below the working directory when it is relative."""
    try:
        return Path(name).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # the working directory is gone; no such user
        raise DataError(f"{name!r} cannot be made a full path: {error}", FILE_HINT) from error


def _find(name: str) -> tuple[Path, tuple[int, ...]]:
    """A file's full path, and what changes when its bytes do."""
    path = _full_path(name)
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"corpus {name!r}: there is no file {path}", _hint(name)) from error
    except (OSError, ValueError) as error:  # a loop of links, a folder that is closed to us; a NUL in the name
        raise DataError(f"corpus {name!r} cannot be read: {error}", FILE_HINT) from error
    return path, (found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _read(name: str, path: Path) -> bytes:
    """All bytes of a file, which must be a plain one that holds some."""
    try:
        mode = path.stat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise DataError(f"corpus {name!r} cannot be read: {error}", FILE_HINT) from error
    if stat.S_ISDIR(mode):
        raise DataError(f"corpus {name!r}: {path} is a directory", FILE_HINT)
    if not stat.S_ISREG(mode):
        raise DataError(f"corpus {name!r}: {path} is not a plain file, so it cannot be read twice", FILE_HINT)
    if not content:
        raise DataError(f"corpus {name!r}: {path} is empty (0 bytes)", FILE_HINT)
    return content


def _hint(name: str) -> str:
    """What to write instead of a name that is no file: a built-in corpus, if it looks like one."""
    import difflib

    close = difflib.get_close_matches(Path(name).name.lower(), _BUILT_IN, n=1)
    return f"did you mean {close[0]}? {FILE_HINT}" if close else FILE_HINT


# ---------------------------------------------------------------------------------- the standard library

# tests and bundled programs are left out, and what people install; config-* and _sysconfigdata* differ per build
_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def _stdlib(folder: Path | None = None) -> Corpus:
    """Every .py file of the standard library, one after the other in the order of their paths."""
    if folder is None:
        import sysconfig

        folder = Path(sysconfig.get_path("stdlib"))
    try:
        content = b"".join((folder / name).read_bytes() for name in sorted(_sources(folder)))
    except OSError as error:
        raise DataError(f"corpus 'stdlib' cannot be read: {error}", FILE_HINT) from error
    if not content:
        raise DataError(
            f"corpus 'stdlib': {folder}, where this Python has its standard library, holds no .py files",
            "use a Python whose library is not packed, or name a text of your own: corpus=path/to/file",
        )
    return _corpus("stdlib", content)


def _sources(folder: Path) -> Iterator[str]:
    """The posix paths, relative to the folder, of the .py files that count."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        for path in (Path(place, name) for name in files):
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata") and path.is_file():
                yield path.relative_to(folder).as_posix()


# --------------------------------------------------------------------------------------------- downloads


def _enwik8() -> Corpus:
    mirror = os.environ.get("RNNQ_ENWIK8_URL")
    return _downloaded("enwik8", replace(_ENWIK8, url=mirror) if mirror else _ENWIK8)


def _downloaded(name: str, download: _Download) -> Corpus:
    """A corpus from the cache folder, fetched first when it is not there.

    A file with other bytes is refused, not replaced: somebody may have put it there.
    """
    path = cache_folder() / download.member
    _fetch(name, download, path)
    corpus = _corpus(name, _read(name, path))
    if corpus.sha256 != download.file_sha256:
        raise DataError(
            f"corpus {name!r}: {path} holds other text: {corpus.bytes.size:,} bytes with sha256 {corpus.sha256},"
            f" not {download.file_sha256}",
            f"move it away and it is downloaded anew; if it is the text that you want, name it: corpus={path}",
        )
    return corpus


def _fetch(name: str, download: _Download, path: Path) -> None:
    """Bring a file into the cache folder unless it is there. Raises DataError with what was tried.

    A failure is remembered for a while: `init` asks once for each of its configs, and a network that swallows
    packets takes CONNECT_S to say no.
    """
    import zipfile

    again, failure = _failed.get((download.url, path), (0.0, None))
    try:
        if path.exists():
            return
        if failure and time.monotonic() < again:
            raise DataError(failure.message, failure.hint)
        _unpack(_archive(download, path.parent), download.member, path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # requests' errors are OSErrors, pooch's ValueErrors
        problem = _unavailable(name, download, path, error)
        _failed[download.url, path] = (time.monotonic() + RETRY_S, problem)
        raise problem from error


def _unavailable(name: str, download: _Download, path: Path, error: Exception) -> DataError:
    """What was tried and why it failed; where the file belongs; what else would do."""
    return DataError(
        f"corpus {name!r}: there is no file {path}, and it could not be downloaded from {download.url}:"
        f" {_reason(error)}",
        f"put the unpacked file at {path} (its sha256 is {download.file_sha256}), name a mirror of the zip in"
        f" RNNQ_{name.upper()}_URL, or name a text of your own: corpus=path/to/file",
    )


def _reason(error: Exception) -> str:
    """The sentence that matters: requests wraps urllib3's error, which has the system's words in it."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    return str(inner.args[-1]) if isinstance(inner, Exception) and inner.args else str(error)


def _archive(download: _Download, folder: Path) -> Path:
    """The zip, downloaded unless it is there: pooch writes it aside, compares its sha256, then renames it.

    It stays beside the file that is taken out of it: another worker may just be reading it.
    """
    import pooch

    logger = pooch.get_logger()  # pooch's own, with its own way to stderr
    level = logger.level
    logger.setLevel("WARNING")
    try:
        with _progress(f"{download.member}.zip") as bar:
            http = pooch.HTTPDownloader(progressbar=bar or False, chunk_size=2**16, timeout=(CONNECT_S, READ_S))
            checksum = f"sha256:{download.zip_sha256}"
            return Path(pooch.retrieve(download.url, checksum, f"{download.member}.zip", folder, downloader=http))
    finally:
        logger.setLevel(level)


def _unpack(archive: Path, member: str, path: Path) -> None:
    """Take a file out of a zip: written aside, synced, renamed, so that it is there whole or not at all."""
    import shutil
    import zipfile

    aside = path.with_name(f"{path.name}.{os.urandom(8).hex()}.part")  # several workers may unpack at once
    try:
        with zipfile.ZipFile(archive) as held, held.open(member) as source, aside.open("xb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class _Bar:
    """A download drawn by rich, in pooch's words: it sets `total`, then calls update, reset and close."""

    total = 0  # bytes; 0 when the server does not say

    def __init__(self, shown: Progress, task: TaskID) -> None:
        self.shown = shown
        self.task = task

    def update(self, count: int) -> None:
        """So many bytes more."""
        self.shown.update(self.task, advance=count, total=self.total or None)

    def reset(self) -> None:
        """From the beginning: pooch does so at the end, to show the exact total."""
        self.shown.update(self.task, completed=0)

    def close(self) -> None:
        """Nothing: the bar goes when its context ends, also after an error."""


@contextmanager
def _progress(label: str) -> Iterator[_Bar | None]:
    """A progress bar on stderr; None when stderr is no terminal."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as shown:
        yield _Bar(shown, shown.add_task(label, total=None))


_BUILT_IN: dict[str, Callable[[], Corpus]] = {"stdlib": _stdlib, "enwik8": _enwik8}
