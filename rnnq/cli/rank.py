"""What each process of `rnnq worker --nproc` runs: the command itself, whose exit code is kept for who started it."""

from __future__ import annotations

import os
import sys

from rnnq import cli


def main() -> None:
    """As `rnnq`; the first process ends with 0 where the worker has an end of its own, good or bad."""
    from rnnq import launch

    sys.argv[0] = "rnnq"
    launch.begin()
    try:
        cli.main()
    except SystemExit as leaving:
        if os.environ["RANK"] != "0":
            raise
        launch.leave_code(int(leaving.code or 0))


if __name__ == "__main__":
    main()
