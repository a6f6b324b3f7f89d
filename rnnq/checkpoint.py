"""State to disk: written once, aside, fsynced, then linked into place; never overwritten, never searched for.

A file's name holds its attempt, so that two attempts can never write the same one, however long a worker was
stopped between two lines. A file counts only once a fenced write has put its path and sha256 into the run's row.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnnq import files
from rnnq.errors import CheckpointError, Damaged, is_out_of_memory

FORMAT = 1  # raised when what a file holds is arranged in another way


@dataclass(frozen=True)
class Saved:
    """A checkpoint file as the run's row names it."""

    path: str  # below the study's root folder, with forward slashes
    step: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Owner:
    """Whose state it is. Written into each file; all but the stage, which may be renamed, is compared on opening."""

    study: str
    stage: str
    run: int
    fingerprint: str


def relative_path(owner: Owner, attempt: int, step: int, kind: str = "") -> str:
    """Where a checkpoint lies: checkpoints/<study id>/<stage>/<run>/a<attempt>-s<step>.pt."""
    return f"checkpoints/{owner.study}/{owner.stage}/{owner.run}/a{attempt}-s{step}{kind}.pt"


def _place(root: Path, path: str) -> Path:
    """Where a path that the database names lies: below the study's folder, or nowhere."""
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise Damaged(f"{path} does not lie below the study's folder")
    return root / path


def write_aside(root: Path, path: str, owner: Owner, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint beside its final place, down to the disk. Returns the temporary file.

    Raises CheckpointError when the disk refuses; what was there before is untouched. That memory is short is raised
    as it is.
    """
    target = _place(root, path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _make_folder(target.parent)
        with aside.open("wb") as file:
            torch.save({"format": FORMAT, "owner": vars(owner), "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        _unlink(aside)
        if is_out_of_memory(error) or not isinstance(error, (OSError, RuntimeError)):
            raise
        raise _refused(target, state, error) from error
    return aside


def _refused(target: Path, state: Mapping[str, Any], error: BaseException) -> CheckpointError:
    """What the disk said: torch closes its file once more after a write has failed, and raises what comes of that."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    why = (isinstance(found, OSError) and found.strerror) or str(error)
    room = ""
    with contextlib.suppress(OSError):
        room = f" ({shutil.disk_usage(target.parent).free:,} bytes are free there)"
    return CheckpointError(
        f"the checkpoint {target} of about {_bytes_of(state):,} bytes could not be written: {why}{room}",
        "make room there; the checkpoint before it is whole, and the next worker goes on from it",
    )


def _bytes_of(tree: Any) -> int:
    """What the tensors of a tree take; the rest is small beside them."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(_bytes_of, parts))


def _make_folder(path: Path) -> None:
    """A folder and its parents; the name of each new one is brought down to the disk, too."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    files.sync(path.parent)


def publish(root: Path, path: str, aside: Path, step: int) -> Saved:
    """Give a written file its name. Raises CheckpointError when the name is taken."""
    target = _place(root, path)
    try:
        digest, size = _digest(aside)
        files.link_once(aside, target)
        files.sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {target} could not be put in place: {error}") from error
    finally:
        _unlink(aside)
    return Saved(path, step, digest, size)


def _unlink(path: Path) -> None:
    """Delete what may not even be there; that it stays must not hide a worse error."""
    with contextlib.suppress(OSError):
        path.unlink()


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def load(root: Path, saved: Saved, owner: Owner) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU.

    Raises Damaged when the file is missing, holds other bytes than the row says, or belongs to another run, config or
    study; CheckpointError when it cannot be read just now. Nothing in it can run code (weights_only).
    """
    path = _place(root, saved.path)
    try:
        digest, _ = _digest(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read just now: {error}", "is its disk there, and open to us?"
        ) from error
    if digest != saved.sha256:
        raise Damaged(f"{path} is damaged: sha256 {digest[:12]}, the row says {saved.sha256[:12]}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file can hold that torch cannot read
        if is_out_of_memory(error):
            raise  # the file is whole: it must not be given up for an older one
        raise Damaged(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Damaged(f"{path} is not a checkpoint of this rnnq (format {FORMAT})")
    found = content.get("owner")
    if not isinstance(found, dict) or {**found, "stage": owner.stage} != vars(owner):
        raise Damaged(f"{path} belongs to {found}, not to {vars(owner)}")
    state: dict[str, Any] = content["state"]
    return state


def newest(
    root: Path, candidates: Sequence[Saved | None], owner: Owner
) -> tuple[Saved | None, dict[str, Any] | None, list[str]]:
    """The first candidate that can be used, its state, and what was wrong with those before it.

    Raises CheckpointError when one cannot be read just now: it is not given up for an older one.
    """
    problems: list[str] = []
    for saved in candidates:
        if saved is None:
            continue
        try:
            return saved, load(root, saved, owner), problems
        except Damaged as error:
            problems.append(error.message)
    return None, None, problems


def belongs(owner: Owner, path: str) -> bool:
    """Whether a path is that of a file of this run, whatever its stage was called when it was written."""
    parts = Path(path).parts
    return len(parts) == 5 and (parts[0], parts[1], parts[3]) == ("checkpoints", owner.study, str(owner.run))


def remove(root: Path, paths: Sequence[str]) -> None:
    """Delete files that a row no longer names. A file that stays is garbage, not an error."""
    for path in paths:
        with contextlib.suppress(CheckpointError):
            _unlink(_place(root, path))
