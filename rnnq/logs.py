"""What runs print: one file for each attempt, logs/<study id>/<run>/a<attempt>.txt below the study's folder.

The name holds no stage, so that a renamed one keeps its logs, and needs no row in the database.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def path(root: Path, study: str, run: int, attempt: int) -> Path:
    """Where an attempt's log lies."""
    return folder(root, study, run) / f"a{attempt}.txt"


def folder(root: Path, study: str, run: int) -> Path:
    """Where all logs of a run lie."""
    return root / "logs" / study / str(run)


@contextlib.contextmanager
def kept(root: Path, study: str, attempts: Sequence[tuple[int, int]], keep: bool = True) -> Iterator[None]:
    """What is printed meanwhile goes into the log of (run, attempt), whoever prints it: Python, C, or a process of the
    run's. Runs that are trained together have one log between them, under the name of each.

    A log without a word is removed. One that cannot be written must not fail a run: then the terminal has the words.
    """
    place, *others = [path(root, study, run, attempt) for run, attempt in attempts]
    file = _open(place) if keep else None
    if file is None:
        yield
        return
    for other in others:
        with contextlib.suppress(OSError):  # a file system without links: then the first has it alone
            other.parent.mkdir(parents=True, exist_ok=True)
            other.hardlink_to(place)
    try:
        with _to(file):
            yield
    finally:
        os.close(file)
        for each in (place, *others):
            _remove_if_empty(each)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What is printed meanwhile is nobody's."""
    file = os.open(os.devnull, os.O_WRONLY)
    try:
        with _to(file):
            yield
    finally:
        os.close(file)


def _open(place: Path) -> int | None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:
        return None


@contextlib.contextmanager
def _to(file: int) -> Iterator[None]:
    """Both streams of the process, and Python's objects for them, lead to a file."""
    _flush()
    before = {number: os.dup(number) for number in (1, 2)}
    out, err = (_words(number) for number in before)
    try:
        for number in before:
            os.dup2(file, number)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        # what was written without a newline still goes into the log, also when the run has put others in their place
        for words in (out, err):
            with contextlib.suppress(OSError, ValueError):  # it may have closed them
                words.flush()
        _flush()
        for number, original in before.items():
            os.dup2(original, number)
            os.close(original)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _words(number: int) -> io.TextIOWrapper:
    patient: Any = _Patient(number)
    return io.TextIOWrapper(patient, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class _Patient(io.RawIOBase):
    """Writes to a stream of the process; what a full disk refuses is lost, and fails no run.

    Whoever keeps it beyond the run (a handler of `logging`) goes on writing to that stream, wherever it leads then;
    a file of its own would be closed, and its number given to another file.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        """It is for writing."""
        return True

    def fileno(self) -> int:
        """The number of the stream."""
        return self.number

    def write(self, words: Any) -> int:
        """All of it, or as much as the disk takes."""
        rest = memoryview(words).cast("B")
        size = rest.nbytes
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self.number, rest) :]
        return size

    def close(self) -> None:
        """Nothing: the stream is the process's."""


def _remove_if_empty(place: Path) -> None:
    with contextlib.suppress(OSError):
        if place.stat().st_size == 0:
            place.unlink()
            place.parent.rmdir()  # unless an earlier attempt has printed


def read(place: Path, start: int = 0) -> tuple[str, int]:
    """What a log holds from a byte on, and where it ends now; nothing for one that is not there."""
    try:
        with place.open("rb") as file:
            file.seek(start)
            words = file.read()
    except OSError:
        return "", start
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = decoder.decode(words)
    return shown, start + len(words) - len(decoder.getstate()[0])  # a letter that is half written waits for its rest
