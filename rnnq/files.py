"""Files that survive a power cut, and never take the place of another."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, down to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def link_once(aside: Path, target: Path) -> None:
    """Give a file its name; unlike a rename, a hard link never replaces a file. Raises OSError, FileExistsError."""
    try:
        os.link(aside, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise
        aside.rename(target)
