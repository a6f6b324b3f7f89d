"""What the family fsm costs, beside an ordinary program that does the same.

    python benchmarks/fsm.py data [ROUNDS]        # making 10,000 samples, and opening them again; default: 3 rounds
    python benchmarks/fsm.py steps [ROUNDS]       # optimiser steps at batch 8, width 64, 2 layers; default: 5 rounds

The ordinary program is the published study's data set as its description has it, in plain Python: machines are dicts,
walks are lists, one number is drawn after the other. `stream` is the same data to the byte, which is checked here;
`disjoint` is what the family makes by default. They are timed in turn, so that a busy machine weighs on all alike, by
the CPU time of this process; printed are medians, and ratios to the ordinary program.
"""

from __future__ import annotations

import itertools
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


# ------------------------------------------------------------------------------------------ an ordinary training step


class Ordinary:
    """A training script as a researcher writes it: modules, all logits, the loss at the mask, `.item()` each step.

    kind: lstm or rnn, the library's; rnn_seed, the published study's loop over time and layers.
    """

    def __init__(self, kind: str, states: int, width: int = 64, layers: int = 2, dropout: float = 0.1) -> None:
        import torch
        from torch import nn

        torch.manual_seed(0)
        self.kind, self.states, self.layers = kind, states, layers
        self.embedding, self.dropout = nn.Embedding(21, width), nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = nn.Linear(width, states, bias=False)
        nn.init.xavier_normal_(self.head.weight)
        if kind == "rnn_seed":
            self.cells = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(layers)])
            for cell in self.cells:
                nn.init.xavier_normal_(cell.weight)
                nn.init.zeros_(cell.bias)
        else:
            made = {"lstm": nn.LSTM, "rnn": nn.RNN}[kind]
            self.cells = made(width, width, layers, batch_first=True, dropout=dropout)
        if kind == "lstm":
            for name, weight in self.cells.named_parameters():
                start = {"weight_ih": nn.init.xavier_uniform_, "weight_hh": nn.init.orthogonal_}
                start.get(name[:9], nn.init.zeros_)(weight)
        modules = (self.embedding, self.cells, self.head)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.0)

    def hidden(self, x: Any) -> Any:
        """(B, T, D) -> (B, T, D)."""
        import torch

        if self.kind != "rnn_seed":
            return self.cells(x)[0]
        states = [x.new_zeros(len(x), x.shape[-1]) for _ in range(self.layers)]
        outputs = []
        for t in range(x.shape[1]):
            at = x[:, t]
            for layer, cell in enumerate(self.cells):
                at = torch.tanh(cell(torch.cat([at, states[layer]], dim=-1)))
                if layer < self.layers - 1:
                    at = self.dropout(at)
                states[layer] = at
            outputs.append(at)
        return torch.stack(outputs, dim=1)

    def step(self, inputs: Any, targets: Any, mask: Any) -> float:
        """One optimiser step; the loss."""
        import torch
        from torch.nn import functional

        self.optimizer.zero_grad()
        logits = self.head(self.dropout(self.hidden(self.dropout(self.embedding(inputs)))))
        flat = mask.view(-1)
        loss = functional.cross_entropy(logits.view(-1, self.states)[flat], targets.view(-1)[flat])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.item())


def ordinary_steps(kind: str, states: int) -> Callable[[], Any]:
    """A step of the ordinary script; its batches lie ready."""
    import numpy as np
    import torch

    from rnnq.families.fsm import data
    from rnnq.families.fsm.config import Machines

    split = data.load(Machines(states=states, actions=states, data_split="stream")).train
    chance, batches = np.random.default_rng(0), []
    for _ in range(16):
        rows = chance.choice(split.n, 8, replace=False)
        batch = split.batch(rows, split.random_picks(rows, chance))
        batches.append([torch.from_numpy(part) for part in (batch.inputs, batch.targets, batch.mask)])
    script, turn = Ordinary(kind, states), itertools.cycle(batches)
    return lambda: script.step(*next(turn))


def family_steps(kind: str, states: int, members: int) -> Callable[[], Any]:
    """A step of so many members side by side, with the drawing of their batches, as a worker does it."""
    import torch

    from rnnq.families.fsm.config import Config
    from rnnq.families.fsm.model import Automata
    from rnnq.train import Member, NoDesk, Training

    fields = {"model": kind, "states": states, "actions": states, "data_split": "stream", "head": "states"}
    configs = [Config(**fields, d_model=64, epochs=1, seed=k) for k in range(members)]
    training = Training(Automata(), [Member(c, NoDesk(), c.steps_total()) for c in configs], torch.device("cpu"))
    return training.update


def measure_steps(rounds: int) -> None:
    """Print how many optimiser steps there are in a second, of one run or of all that stand side by side."""
    import torch

    torch.set_num_threads(1)
    print(f"batch 8, width 64, 2 layers, one thread, {rounds} rounds in turn; load {os.getloadavg()[0]:.1f}")
    for states in (3, 5):
        for kind, packs in (("lstm", (1,)), ("rnn", (1, 8)), ("rnn_seed", (1, 8, 16))):
            ways: dict[str, tuple[int, Callable[[], Any]]] = {"ordinary": (1, ordinary_steps(kind, states))}
            ways["ordinary, no denormals"] = (1, ways["ordinary"][1])
            ways |= {f"rnnq, {n} together": (n, family_steps(kind, states, n)) for n in packs}
            report(f"{states}s{states}a {kind}", ways, rounds, 40 if states == 3 else 12)


def report(what: str, ways: dict[str, tuple[int, Callable[[], Any]]], rounds: int, steps: int) -> None:
    """Time all ways in turn, by the CPU time of this process; print medians and ratios to the first."""
    import torch

    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (members, step) in ways.items():
            torch.set_flush_denormal("denormals" in name)
            each = max(2, steps // members)
            seconds, _ = timed(lambda step=step, each=each: [step() for _ in range(each)])
            if turn:  # the first round warms up
                rates[name].append(members * each / seconds)
    torch.set_flush_denormal(False)
    base = statistics.median(rates["ordinary"])
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"{what:14} {name:24} {rate:7.1f} steps/s  {rate / base:6.1f} times as fast", flush=True)


def main() -> None:
    """Measure and print what the first word says."""
    words = sys.argv[1:] or ["data"]
    parts = {"data": (measure_data, 3), "steps": (measure_steps, 5)}
    if words[0] not in parts:
        sys.exit(__doc__)
    measure, rounds = parts[words[0]]
    measure(int(words[1]) if len(words) > 1 else rounds)


if __name__ == "__main__":
    main()
