"""Arrays that are made once and kept in the cache folder: a folder of files that is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rnnq import files
from rnnq.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.progress import Progress

_LEFT_OVER = 86_400.0  # seconds after which nobody is still writing to what is called .part
_TOLD_AFTER = 2.0  # seconds; then whoever waits is told, and every 10 s from then on


@dataclass(frozen=True, eq=False)
class Kept:
    """Arrays that lie in files, read when they are looked at; nobody can change them."""

    folder: Path
    sha256: str  # of the content of all arrays
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)


def arrays(folder: Path, what: str, content: Mapping[str, Any], make: Callable[[Path], None]) -> Kept:
    """What the folder holds; made when it is not there, and anew when it is damaged or of another content.

    `content` says what decides the arrays, as JSON has it. `make` writes them with `write` or `Growing` into the folder
    that it is given. Several processes may do so at once: whoever comes first wins, and the others take his. Raises
    DataError, in which the arrays are called `what`, when they cannot be kept.
    """
    try:
        return _read(folder, content) or _made(folder, content, make)
    except OSError as error:
        raise DataError(
            f"{what} cannot be kept in {folder}: {error}", "name a folder that can be written in RNNQ_CACHE"
        ) from error


def write(folder: Path, name: str, array: NDArray[Any]) -> None:
    """Add an array to a folder that is being made."""
    import numpy as np

    with (folder / f"{name}.npy").open("xb") as target:
        np.save(target, array, allow_pickle=False)


class Growing:
    """An array that is added to a folder piece by piece, so that it never is in memory whole."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._file = (folder / f"{name}.npy").open("xb")
        self._dtype = dtype
        self._size = 0
        self._begin = self._head()

    def _head(self) -> int:
        from numpy.lib import format as npy  # whose heads leave room for an array to grow

        self._file.seek(0)
        npy.write_array_header_1_0(self._file, {"descr": self._dtype, "fortran_order": False, "shape": (self._size,)})
        return self._file.tell()

    def append(self, piece: NDArray[Any]) -> None:
        """Add a piece, (n,), at the end."""
        self._file.write(piece.astype(self._dtype, copy=False).data)
        self._size += len(piece)

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if error is None and self._head() != self._begin:
                raise OSError("the head of an array has changed its size")


# --------------------------------------------------------------------------------------------------------- reading


def _read(folder: Path, content: Mapping[str, Any]) -> Kept | None:
    """What the folder holds, if it is whole: every byte is hashed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = {name: _mapped(folder / f"{name}.npy") for name in manifest["arrays"]}
        whole = manifest["content"] == content and manifest["sha256"] == _sha256(found)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return Kept(folder, manifest["sha256"], found) if whole else None


def _mapped(path: Path) -> NDArray[Any]:
    """An array of a file, read when it is looked at. Of the plain type: numpy's memmap is slow to index."""
    import numpy as np

    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # type: ignore[no-any-return]


def _sha256(found: Mapping[str, NDArray[Any]]) -> str:
    """Of names, types, shapes and bytes: the same on every machine."""
    import numpy as np

    digest = hashlib.sha256()
    for name, array in sorted(found.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- making


def _made(folder: Path, content: Mapping[str, Any], make: Callable[[Path], None]) -> Kept:
    """Made, written aside, and renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}.part")
    aside.mkdir()
    try:
        make(aside)
        _seal(aside, content)
        return _settled(aside, folder, content)
    finally:
        _remove(aside)
        for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):  # or another has removed it
                if left.stat().st_mtime < time.time() - _LEFT_OVER:
                    _remove(left)


def _seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Write down what is in the folder, and bring it down to the disk."""
    paths = sorted(folder.glob("*.npy"))
    names = [path.stem for path in paths]
    manifest = {"content": content, "arrays": names, "sha256": _sha256({path.stem: _mapped(path) for path in paths})}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*paths, folder / "manifest.json", folder]:
        files.sync(path)


def _settled(aside: Path, folder: Path, content: Mapping[str, Any]) -> Kept:
    """Give the new folder its name, over a damaged one. Raises OSError when the disk changes what was written."""
    for _ in range(10):  # a few others may do the same just now
        try:
            aside.rename(folder)
            files.sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise
        found = _read(folder, content)
        if found is not None:
            return found
        damaged = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}.damaged")
        try:
            folder.rename(damaged)
        except FileNotFoundError:
            continue
        _remove(damaged)
    raise OSError("what is written there does not come back as it was")


def _remove(path: Path) -> None:
    """A folder or a file, if it is there. What cannot be removed stays: it is in nobody's way."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


class Telling:
    """Says on stderr what is being made, if it takes long: called with the part that is done."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._again = time.monotonic() + _TOLD_AFTER
        self._bar: Progress | None = None

    def __call__(self, done: float) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif time.monotonic() >= self._again and sys.stderr:
            if sys.stderr.isatty():
                self._bar = _bar(self.what)
            else:
                self._again = time.monotonic() + 10.0
                sys.stderr.write(f"{self.what}: {done:.0%}\n")
                sys.stderr.flush()

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(what: str) -> Progress:
    """On a terminal; it goes when it has ended."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    shown.add_task(what.replace("[", r"\["), total=1.0)
    shown.start()
    return shown
