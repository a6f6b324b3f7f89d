"""Every file below some folders. It needs nothing of rnnq, so that a process of its own can look while others count.

python walk.py ROOT FOLDER...     the files below ROOT/FOLDER, marshalled, on standard output
"""

from __future__ import annotations

import marshal
import os
import sys
from collections.abc import Callable, Sequence


def files(root: str, folders: Sequence[str], watch: Callable[[int], None] = lambda looked: None) -> dict[str, int]:
    """Paths below the root, and their bytes. Links are not followed; `watch` hears of every thousandth folder."""
    found: dict[str, int] = {}
    left, looked, base = list(folders), 0, f"{root}/"
    while left:
        folder = left.pop()
        try:
            with os.scandir(base + folder) as entries:  # words, not Paths: there may be very many
                for entry in entries:
                    path = f"{folder}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        left.append(path)
                    else:
                        found[path] = entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # not there, not ours to read, or just gone: what a row names is looked for once more
        looked += 1
        if looked % 1000 == 0:
            watch(looked)
    return found


if __name__ == "__main__":
    sys.stdout.buffer.write(marshal.dumps(files(sys.argv[1], sys.argv[2:])))
