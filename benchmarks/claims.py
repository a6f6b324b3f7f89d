"""What a claim and a finish cost in a small and in a large study, side by side.

    python benchmarks/claims.py [ROWS ...]        # default: 1000 100000

Each database gets ROWS pending runs and as many finished ones. Claims are taken in turn, one database after the other,
so that a busy machine weighs on all of them alike. Prints the median time of each and its ratio to the first.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import Engine, text

from rnnq import db, queue

ROUNDS = 300
PROVENANCE = dict.fromkeys(("host", "device", "command_line", "versions"), "") | {"git_commit": None, "git_dirty": None}


def study(folder: Path, rows: int) -> Engine:
    """A database with so many pending runs, and as many that are done."""
    path = str(folder / f"{rows}.db")
    db.upgrade(path)
    engine = db.open(path)
    runs = [queue.NewRun(f"r{i}", "{}", f"f{i}", f"g{i}", i, None, 1) for i in range(2 * rows)]
    metrics = [{"name": "loss", "unit": "", "better": "min", "primary": True}]
    stage = queue.NewStage("s", "f", 1, False, False, None, None, {}, metrics, ("seed",), {}, runs)
    queue.init(engine, [stage])
    with db.transaction(engine) as connection:
        sql = "UPDATE runs SET state = 'done', ended_at = 1, started_at = 0 WHERE id % 2 = 0"
        connection.execute(text(sql))
    queue.register(engine, "w", "cpu", {})
    return engine


def pair(engine: Engine) -> float:
    """Seconds for one claim and one finish."""
    began = time.perf_counter()
    [claim] = queue.claim(engine, "w", PROVENANCE)
    queue.finish(engine, claim, 1, {"loss": 1.0}, "loss", [("loss", 1, 1.0)])
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    sizes = [int(word) for word in sys.argv[1:]] or [1_000, 100_000]
    with tempfile.TemporaryDirectory() as folder:
        engines = {rows: study(Path(folder), rows) for rows in sizes}
        times: dict[int, list[float]] = {rows: [] for rows in sizes}
        for _ in range(ROUNDS):
            for rows, engine in engines.items():
                times[rows].append(pair(engine))
    first = statistics.median(times[sizes[0]])
    for rows, taken in times.items():
        median = statistics.median(taken)
        print(f"{rows:>9,} pending: claim + finish {1000 * median:.2f} ms, ratio {median / first:.2f}")


if __name__ == "__main__":
    main()
