"""What the family fsm costs, beside an ordinary program that does the same.

    python benchmarks/fsm.py data [ROUNDS]        # making 10,000 samples, and opening them again; default: 3 rounds

The ordinary program is the published study's data set as its description has it, in plain Python: machines are dicts,
walks are lists, one number is drawn after the other. `stream` is the same data to the byte, which is checked here;
`disjoint` is what the family makes by default. They are timed in turn, so that a busy machine weighs on all alike, by
the CPU time of this process; printed are medians, and ratios to the ordinary program.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

Machine = list[dict[int, int]]  # for each state: action token -> next state
Sample = tuple[Machine, list[list[int]], list[int]]  # a machine, a walk from each state, a query walk


# --------------------------------------------------------------------------------------- the ordinary program


def machine(chance: random.Random, states: int, actions: int, absorbing: bool) -> Machine:
    """A random machine: a random tree from state 0, and all other transitions uniform."""
    tokens = range(8, 8 + actions)
    table: Machine = [{} for _ in range(states)]
    connected, remaining = [0], list(range(1, states))
    while remaining:
        source, target = chance.choice(connected), chance.choice(remaining)
        remaining.remove(target)
        table[source][chance.choice([a for a in tokens if a not in table[source]])] = target
        connected.append(target)
    for state in range(states):
        for action in tokens:
            if action not in table[state]:
                table[state][action] = chance.choice(range(states))
    if absorbing:
        kept = chance.choice(range(states))
        for action in table[kept]:
            table[kept][action] = kept
    return table


def walk(chance: random.Random, table: Machine, steps: int, start: int) -> list[int]:
    """States and actions in turn, as tokens."""
    tokens = [start]
    for _ in range(steps):
        state = tokens[-1]
        action = chance.choice(list(table[state]))
        tokens += [action, table[state][action]]
    return tokens


def ordinary(
    states: int,
    actions: int,
    demo: int | None = None,
    query: int | None = None,
    samples: int = 10_000,
    seed: int = 42,
    absorbing: bool = False,
    variation: float = 0.2,
) -> list[Sample]:
    """The published data set."""
    machines, walks, rest = (random.Random(seed) for _ in range(3))
    cells = states * actions
    automatic = max(1, int(cells * math.log(cells)))

    def steps(base: int | None) -> int:
        return max(1, int((base or automatic) * (1 + rest.uniform(-variation, variation))))

    machine(machines, states, actions, absorbing)  # the study makes one and throws it away
    made = []
    for _ in range(samples):
        table = machine(machines, states, actions, absorbing)
        demos = [walk(walks, table, steps(demo), state) for state in range(states)]
        start = rest.choice(range(states))
        made.append((table, demos, walk(walks, table, steps(query), start)))
    return made


# -------------------------------------------------------------------------------------------------- measuring


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came out."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def measured(states: int, actions: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way for one kind of machine. Stops when the data differ."""
    from rnnq.families.fsm import data
    from rnnq.families.fsm.config import Machines

    configs = {
        split: Machines(states=states, actions=actions, data_split=split)  # type: ignore[arg-type]
        for split in ("stream", "disjoint")
    }
    for config in configs.values():
        data.load(config)  # into the cache, for the last line
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        seconds, samples = timed(lambda: ordinary(states, actions))
        taken.setdefault("ordinary", []).append(seconds)
        for split, config in configs.items():
            seconds, made = timed(lambda config=config: data.build(config))
            taken.setdefault(f"rnnq, {split}", []).append(seconds)
            if split == "stream" and not same(samples, made):
                sys.exit(f"{states}s{actions}a: the data differ")
        data._loaded.clear()
        taken.setdefault("rnnq, opened from the cache", []).append(timed(lambda: data.load(configs["stream"]))[0])
    return {name: statistics.median(values) for name, values in taken.items()}


def same(samples: list[Sample], made: dict[str, Any]) -> bool:
    """Whether the arrays hold the samples."""
    tables = bytes(row[a] for table, _, _ in samples for row in table for a in sorted(row))
    walks = [w for _, demos, query in samples for w in (*demos, query)]
    steps = bytes((w[i] - 8) << 3 | w[i + 1] for w in walks for i in range(1, len(w), 2))
    lengths = [len(w) // 2 for w in walks]
    starts = bytes(query[0] for _, _, query in samples)
    return (
        made["tables"].tobytes() == tables
        and made["steps"].tobytes() == steps
        and made["lengths"].ravel().tolist() == lengths
        and made["starts"].tobytes() == starts
    )


def measure_data(rounds: int) -> None:
    """Print how long data take."""
    print(f"10,000 samples, {rounds} rounds in turn, CPU seconds; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["RNNQ_CACHE"] = cache
        for states, actions in ((3, 3), (5, 5)):
            medians = measured(states, actions, rounds)
            base = medians["ordinary"]
            for name, seconds in medians.items():
                print(f"{states}s{actions}a  {name:28} {seconds:7.3f} s  {base / seconds:6.1f} times as fast")


def main() -> None:
    """Measure and print what the first word says."""
    words = sys.argv[1:] or ["data"]
    if words[0] != "data":
        sys.exit(__doc__)
    measure_data(int(words[1]) if len(words) > 1 else 3)


if __name__ == "__main__":
    main()
