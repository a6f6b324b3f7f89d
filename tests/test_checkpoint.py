"""Checkpoint files: written once, whole or not at all, opened only for their owner, and never run."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnq import checkpoint
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import CheckpointError

OWNER = Owner("study", "stage1", 7, "f" * 64)


def state(step: int = 10) -> dict[str, Any]:
    return {
        "step": step,
        "members": {"params": {"w": torch.arange(6.0).view(2, 3) + step}},
        "curve": [["loss", 5, 2.5]],
        "best": None,
    }


def save(root: Path, step: int = 10, attempt: int = 1, owner: Owner = OWNER) -> Saved:
    path = checkpoint.relative_path(owner, attempt, step)
    return checkpoint.publish(root, path, checkpoint.write_aside(root, path, owner, state(step)), step)


def named(root: Path, path: str, step: int = 10) -> Saved:
    """A row that names a file as it is now."""
    content = (root / path).read_bytes()
    return Saved(path, step, hashlib.sha256(content).hexdigest(), len(content))


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------- writing


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path)
    loaded = checkpoint.load(tmp_path, saved, OWNER)

    assert saved.path == "checkpoints/study/stage1/7/a1-s10.pt"
    assert saved == named(tmp_path, saved.path)
    assert torch.equal(loaded["members"]["params"]["w"], state()["members"]["params"]["w"])
    assert {name: loaded[name] for name in ("step", "curve", "best")} == {
        "step": 10,
        "curve": [["loss", 5, 2.5]],
        "best": None,
    }


def test_a_file_counts_only_once_it_has_its_name_and_no_file_is_left_aside(tmp_path: Path) -> None:
    path = checkpoint.relative_path(OWNER, 1, 10)
    aside = checkpoint.write_aside(tmp_path, path, OWNER, state())
    assert not (tmp_path / path).exists()
    assert aside.parent == (tmp_path / path).parent

    checkpoint.publish(tmp_path, path, aside, 10)
    assert files(tmp_path) == [path]


def test_the_content_and_then_the_name_go_down_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(number: int) -> None:
        synced.append(os.fstat(number).st_ino)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    path = checkpoint.relative_path(OWNER, 1, 10)
    aside = checkpoint.write_aside(tmp_path, path, OWNER, state())
    assert synced[-1] == aside.stat().st_ino  # before it, the names of new folders

    checkpoint.publish(tmp_path, path, aside, 10)
    target = tmp_path / path
    assert synced[-2:] == [target.stat().st_ino, target.parent.stat().st_ino]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    first = save(tmp_path)
    before = (tmp_path / first.path).read_bytes()

    aside = checkpoint.write_aside(tmp_path, first.path, OWNER, state(99))
    with pytest.raises(CheckpointError, match="could not be put in place"):
        checkpoint.publish(tmp_path, first.path, aside, 99)

    assert (tmp_path / first.path).read_bytes() == before
    assert files(tmp_path) == [first.path]


def test_two_attempts_never_share_a_file(tmp_path: Path) -> None:
    assert save(tmp_path, attempt=1).path != save(tmp_path, attempt=2).path
    assert len(files(tmp_path)) == 2


def test_where_there_are_no_hard_links_a_file_is_renamed_and_still_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError("this file system has no hard links")

    monkeypatch.setattr(os, "link", link)
    saved = save(tmp_path)
    assert checkpoint.load(tmp_path, saved, OWNER)["step"] == 10

    with pytest.raises(CheckpointError, match="could not be put in place"):
        save(tmp_path)
    assert files(tmp_path) == [saved.path]


def test_a_written_file_that_somebody_took_away_cannot_be_published(tmp_path: Path) -> None:
    path = checkpoint.relative_path(OWNER, 1, 10)
    checkpoint.write_aside(tmp_path, path, OWNER, state()).unlink()

    with pytest.raises(CheckpointError, match="could not be put in place"):
        checkpoint.publish(tmp_path, path, tmp_path / path / "gone", 10)


def test_a_folder_that_cannot_be_made_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")

    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path)
    assert files(tmp_path) == ["checkpoints"]


def test_a_state_that_cannot_be_written_leaves_no_file_aside(tmp_path: Path) -> None:
    path = checkpoint.relative_path(OWNER, 1, 10)

    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoint.write_aside(tmp_path, path, OWNER, state() | {"hook": lambda: None})
    assert files(tmp_path) == []


def test_a_full_disk_leaves_the_file_before_it_whole_and_none_aside(tmp_path: Path) -> None:
    """The disk is full at 64 KiB a file, in a process of its own; torch reports it as a RuntimeError or an OSError."""
    before = save(tmp_path)
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from rnnq import checkpoint
        from rnnq.checkpoint import Owner
        from rnnq.errors import CheckpointError

        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        owner = Owner("study", "stage1", 7, "f" * 64)
        path = checkpoint.relative_path(owner, 1, 20)
        try:
            checkpoint.write_aside(Path(sys.argv[1]), path, owner, {"big": torch.zeros(1_000_000)})
        except CheckpointError as error:
            print("refused:", error.message)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: the checkpoint")
    assert "could not be written" in done.stdout
    assert files(tmp_path) == [before.path]
    assert checkpoint.load(tmp_path, before, OWNER)["step"] == 10


# ----------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("damage", ["one bit", "cut short", "empty", "gone", "a folder"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    saved = save(tmp_path)
    path = tmp_path / saved.path
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.touch()
    elif damage == "a folder":
        path.mkdir()

    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        checkpoint.load(tmp_path, saved, OWNER)


@pytest.mark.parametrize("content", [b"", b"this is no zip", b"PK\x03\x04 nor is this"], ids=["empty", "text", "zip"])
def test_bytes_that_are_no_checkpoint_are_refused_even_when_the_row_names_their_hash(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "x.pt").write_bytes(content)

    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path, named(tmp_path, "x.pt"), OWNER)


@pytest.mark.parametrize(
    "content",
    [[1, 2, 3], torch.zeros(3), {"state": {}}, {"format": 2, "owner": vars(OWNER), "state": {}}],
    ids=["a list", "a tensor", "another dict", "another format"],
)
def test_a_torch_file_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")

    with pytest.raises(CheckpointError, match="not a checkpoint of this rnnq"):
        checkpoint.load(tmp_path, named(tmp_path, "x.pt"), OWNER)


@pytest.mark.parametrize(
    "other",
    [
        replace(OWNER, study="another study"),
        replace(OWNER, run=8),
        replace(OWNER, fingerprint="0" * 64),
    ],
    ids=["study", "run", "fingerprint"],
)
def test_a_file_belongs_to_its_study_run_and_config(tmp_path: Path, other: Owner) -> None:
    saved = save(tmp_path, owner=other)

    with pytest.raises(CheckpointError, match="belongs to"):
        checkpoint.load(tmp_path, saved, OWNER)
    assert checkpoint.load(tmp_path, saved, other)["step"] == 10


def test_a_file_is_still_the_runs_when_its_stage_has_another_name(tmp_path: Path) -> None:
    saved = save(tmp_path, owner=OWNER)
    renamed = replace(OWNER, stage="another name")
    assert checkpoint.load(tmp_path, saved, renamed)["step"] == 10
    assert checkpoint.belongs(renamed, saved.path)
    assert not checkpoint.belongs(replace(OWNER, run=8), saved.path)


@pytest.mark.parametrize("path", ["../outside.pt", "checkpoints/../../outside.pt", "/absolute"])
def test_a_path_that_leads_out_of_the_study_is_not_touched(tmp_path: Path, path: str) -> None:
    root = tmp_path / "study"
    root.mkdir()
    outside = save(tmp_path)
    target = tmp_path / "outside.pt"
    (tmp_path / outside.path).rename(target)
    asked = str(target) if path == "/absolute" else path

    with pytest.raises(CheckpointError, match="does not lie below"):
        checkpoint.load(root, replace(outside, path=asked), OWNER)
    with pytest.raises(CheckpointError, match="does not lie below"):
        checkpoint.write_aside(root, asked, OWNER, state())
    checkpoint.remove(root, [asked])
    assert target.exists()


class Payload:
    """A pickle that runs a command when it is opened without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["torch", "legacy torch", "pickle"])
def test_nothing_in_a_file_can_run(tmp_path: Path, how: str) -> None:
    mark = tmp_path / "it ran".replace(" ", "_")
    content = {"format": 1, "owner": vars(OWNER), "state": {"step": 1, "x": Payload(mark)}}
    path = tmp_path / "x.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")

    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path, named(tmp_path, "x.pt"), OWNER)
    assert not mark.exists()

    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the payload is a real one: opened without care it runs"


# ------------------------------------------------------------------------------------- which one to open


def test_the_newest_that_can_be_used_is_taken_and_what_was_wrong_is_said(tmp_path: Path) -> None:
    old, new = save(tmp_path, 10), save(tmp_path, 20)
    saved, found, problems = checkpoint.newest(tmp_path, [new, old], OWNER)
    assert (saved, problems) == (new, [])
    assert found is not None
    assert found["step"] == 20

    (tmp_path / new.path).write_bytes(b"damaged")
    saved, found, problems = checkpoint.newest(tmp_path, [new, old], OWNER)
    assert saved == old
    assert found is not None
    assert found["step"] == 10
    assert len(problems) == 1
    assert new.path in problems[0]
    assert "damaged" in problems[0]


def test_when_none_can_be_used_the_run_starts_again_and_every_reason_is_said(tmp_path: Path) -> None:
    old, new = save(tmp_path, 10), save(tmp_path, 20)
    (tmp_path / new.path).unlink()
    (tmp_path / old.path).write_bytes(b"damaged")

    assert checkpoint.newest(tmp_path, [None, None], OWNER) == (None, None, [])
    saved, found, problems = checkpoint.newest(tmp_path, [new, old], OWNER)
    assert (saved, found) == (None, None)
    assert len(problems) == 2


def test_the_folder_is_never_searched(tmp_path: Path) -> None:
    save(tmp_path, 10)

    assert checkpoint.newest(tmp_path, [None], OWNER) == (None, None, [])


def test_files_that_a_row_no_longer_names_go_and_those_already_gone_are_no_error(tmp_path: Path) -> None:
    old, new = save(tmp_path, 10), save(tmp_path, 20)

    checkpoint.remove(tmp_path, [old.path, old.path, "checkpoints/never/was.pt"])
    assert files(tmp_path) == [new.path]
