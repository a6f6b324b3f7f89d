"""Everything that rnnq raises on purpose.

    RnnqError                 exit 1: the world's fault (a disk, a lock, a lease)
    ├── InputError            exit 2: the user's input; lists everything that is wrong at once
    │   └── DataError         a corpus that is missing, too short, or not the one of the stage
    ├── DatabaseError         the database could not be opened, locked or written
    │   └── Conflict          it undid a transaction that another one was in the way of
    ├── LeaseLost             somebody else owns the run now
    ├── WorkerBroken          several different runs failed at once on this worker: it is to blame, or may be
    ├── CheckpointError       a checkpoint file that cannot be written, or not be read just now
    │   └── Damaged           one that never can be: it is missing, holds other bytes, or is another run's
    └── Diverged              a loss that is not finite, or above the family's bound

An error says what happened, with the values; its hint says what to do. `cli.main` is the only place
that prints one. `cause` is the id under which a run fails when the error ends it.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


class RnnqError(Exception):
    """Something that a person can mend."""

    exit_code = 1
    cause = "bug"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(RnnqError):
    """The user's input is wrong. `problems` holds a line for each thing that is."""

    exit_code = 2

    def __init__(self, message: str | Sequence[str], hint: str | None = None) -> None:
        self.problems = [message] if isinstance(message, str) else list(message)
        super().__init__("\n".join(self.problems), hint)


class DataError(InputError):
    """A corpus is missing, too short, or holds other bytes than the stage was made with."""

    cause = "data"


class DatabaseError(RnnqError):
    """The database could not be opened, locked, read or written."""

    cause = "database"


class Conflict(DatabaseError):
    """Two writers met, and the database undid the transaction of one; it may be run again from its start."""


class LeaseLost(RnnqError):
    """A write was refused because the run is no longer ours. The run goes on elsewhere; nothing is lost."""

    cause = "lost"


class WorkerBroken(RnnqError):
    """Several different runs failed at once on one worker; it leaves, and hands them back."""


class CheckpointError(RnnqError):
    """A checkpoint file cannot be written, or not be read just now: the disk, not the file, is to blame."""


class Damaged(CheckpointError):
    """A checkpoint file is missing, holds other bytes than the row says, or belongs to another run or study."""


class Diverged(RnnqError):
    """The loss is not finite, or above the bound that the family states."""

    cause = "diverged"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on the host or on a device. Of the host's, torch and the system say so in words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in text_of(error) for words in _NO_MEMORY)


_NO_MEMORY = (
    "can't allocate memory",
    "std::bad_alloc",
    "can't start new thread",
    "CUDA error: out of memory",  # of what CUDA itself needs, as for its first kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def text_of(error: BaseException) -> str:
    """What an error says. One of a run's code may not even be able to."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be had)"


def cause_of(error: BaseException) -> str:
    """The id of why a run failed by an error, also by one that is not ours: oom, or bug."""
    if isinstance(error, RnnqError):
        return error.cause
    return "oom" if is_out_of_memory(error) else "bug"


def message_of(error: BaseException) -> str:
    """What is kept of an error in a line; of one that is not ours with its kind."""
    return error.message if isinstance(error, RnnqError) else f"{type(error).__name__}: {text_of(error)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest right ones first, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "it has " + ", ".join(names) if names else "there are none"
