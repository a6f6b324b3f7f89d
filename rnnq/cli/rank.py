"""What each process of `rnnq worker --nproc` runs: the command itself, whose exit code is kept for who started it."""

from __future__ import annotations

import sys

from rnnq import cli


def main() -> None:
    """As `rnnq`; ends with 0 where the worker has an end of its own, good or bad."""
    from rnnq import launch

    sys.argv[0] = "rnnq"
    launch.leave_code(None)
    try:
        cli.main()
    except SystemExit as leaving:
        launch.leave_code(int(leaving.code or 0))


if __name__ == "__main__":
    main()
