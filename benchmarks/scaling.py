"""What an LSTM language model costs, beside an ordinary script that trains the same one.

    python benchmarks/scaling.py [ROUNDS [WIDTH TOKENS [SECONDS]]]      # default: 3 32 gpt2 8, that is V = 50,257
    python benchmarks/scaling.py --check                                # both follow one curve from one start; quick

The ordinary script is what one writes first: modules, all logits of a micro-batch, `cross_entropy`, `.item()`. Both
run in processes of their own, in turn, on one thread, SECONDS of CPU time each after a first step; micro-batches are 32
streams of 128 tokens, and a step is four of them, clipping, and AdamW. Printed are medians of the CPU time of a
micro-batch and of the most memory that a process had, and ratios to the ordinary script.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

BATCH, LENGTH, ACCUMULATED = 32, 128, 4  # streams, tokens of each in a micro-batch, micro-batches in a step
DEFAULTS = ("3", "32", "gpt2", "8")
MB = 2**10  # of the kilobytes that the system counts in


def config_of(width: int, tokens: str, **fields: Any) -> Any:
    """The family's config of the benchmark."""
    from rnnq.families.scaling.config import ScalingConfig

    size = {"hidden_size": width, "batch_size": BATCH, "sequence_length": LENGTH}
    rest = {"gradient_accumulation_steps": ACCUMULATED, "steps": 1000, "lr_schedule": "constant"}
    return ScalingConfig(tokens=tokens, **size | rest | fields)


def read(config: Any, step: int) -> Any:
    """What a step reads: tokens that mean nothing, (micro-batches, B, T + 1)."""
    import torch

    shape = (config.gradient_accumulation_steps, config.batch_size, config.sequence_length + 1)
    return torch.randint(0, config.vocab_size(), shape, generator=torch.Generator().manual_seed(step))


# --------------------------------------------------------------------------------------------- the ordinary script


class Ordinary:
    """A training script as a researcher writes it: the published study's model, with what is carried carried."""

    def __init__(self, config: Any, start: dict[str, Any]) -> None:
        import torch
        from torch import nn

        h, vocabulary = config.hidden_size, config.vocab_size()
        self.config, self.state = config, [None] * config.num_layers
        self.model = nn.ModuleDict({
            "embedding": nn.Embedding(vocabulary, h),
            "lstms": nn.ModuleList([nn.LSTM(h, h, batch_first=True) for _ in range(config.num_layers)]),
            "norms": nn.ModuleList([nn.LayerNorm(h) for _ in range(config.num_layers)]),
            "linear": nn.Linear(h, vocabulary),
        })  # fmt: skip
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), _in_its_order(start, config.num_layers), strict=True):
                mine.copy_(theirs)
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, weight_decay=decay)

    def dropped(self, x: Any, part: float) -> Any:
        """One mask for all times."""
        import torch

        if not part:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], 1, x.shape[2]), 1 - part)) / (1 - part)

    def logits(self, x: Any) -> Any:
        """(B, T) -> (B, T, V)."""
        at = self.dropped(self.model["embedding"](x), self.config.input_dropout)
        for layer, (lstm, norm) in enumerate(zip(self.model["lstms"], self.model["norms"], strict=True)):
            at, state = lstm(at, self.state[layer])
            self.state[layer] = tuple(part.detach() for part in state)
            at = norm(at)
            if layer < self.config.num_layers - 1:
                at = self.dropped(at, self.config.hidden_dropout)
        return self.model["linear"](self.dropped(at, self.config.output_dropout))

    def step(self, batch: Any) -> float:
        """One optimiser step; the loss."""
        import torch
        from torch.nn import functional

        self.optimizer.zero_grad()
        total = 0.0
        for part in batch:
            logits = self.logits(part[:, :-1])
            loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1)) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_val)
        self.optimizer.step()
        return total


def _in_its_order(params: dict[str, Any], layers: int) -> list[Any]:
    names = [f"lstm.{layer}.{name}" for layer in range(layers) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    names += [f"norm.{layer}.{name}" for layer in range(layers) for name in ("weight", "bias")]
    return [params[name] for name in ("embedding", *names, "readout.weight", "readout.bias")]


# ------------------------------------------------------------------------------------------------------- the family


def training_of(config: Any) -> Any:
    """The family's training loop, which reads what the ordinary script does."""
    import torch

    from rnnq.families.scaling.model import Scaling
    from rnnq.families.scaling.streams import Batch, masks
    from rnnq.train import Member, NoDesk, Training

    class Fed(Scaling):
        def batch(self, configs: Any, steps: Any) -> Any:
            return Batch(config, read(config, steps[0]), (False,) * ACCUMULATED, masks(config, steps[0]))

    return Training(Fed(), [Member(config, NoDesk(), config.steps_total())], torch.device("cpu"))


# -------------------------------------------------------------------------------------------------------- measuring


def measure(way: str, width: int, tokens: str, seconds: float) -> None:
    """In a process of its own: print the CPU seconds of a micro-batch, and the most memory there was."""
    import resource

    import torch

    torch.set_num_threads(1)
    config = config_of(width, tokens)
    step: Callable[[], Any]
    if way == "ordinary":
        from rnnq.families.scaling import parametrization

        script = Ordinary(config, parametrization.draw(config, torch.Generator().manual_seed(0)))
        batches = [read(config, number) for number in range(4)]

        def step() -> float:
            batches.append(batches.pop(0))
            return script.step(batches[-1])
    else:
        step = training_of(config).update
    step()  # warms up
    began, steps = time.process_time(), 0
    while time.process_time() - began < seconds or steps < 1:
        step()
        steps += 1
    taken = (time.process_time() - began) / steps / ACCUMULATED
    print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB]))


def compare(rounds: int, width: int, tokens: str, seconds: float) -> None:
    """Print both ways' time and memory, and the ratios."""
    what = f"{tokens}, width {width}, micro-batches of {BATCH} x {LENGTH}, one thread"
    print(f"{what}; {rounds} rounds in turn; load {os.getloadavg()[0]:.1f}", flush=True)
    found: dict[str, list[list[float]]] = {"ordinary": [], "rnnq": []}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(rounds):
        for way, rows in found.items():
            words = [sys.executable, __file__, "--measure", way, str(width), tokens, str(seconds)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
            rows.append(json.loads(done.stdout))
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    base = medians["ordinary"]
    for way, (taken, memory) in medians.items():
        ratios = f"{base[0] / taken:5.2f} times as fast  {base[1] / memory:5.2f} times less memory"
        print(f"{way:10} {taken:8.4f} s a micro-batch  {memory:7.0f} MB  {ratios}", flush=True)


def check() -> None:
    """Stop where the ordinary script and the family do not lose the same from one start."""
    import torch

    torch.set_num_threads(1)
    config = config_of(
        8, "bytes", batch_size=4, sequence_length=12, input_dropout=0, hidden_dropout=0, output_dropout=0,
        learning_rate=0.01,
    )  # fmt: skip
    training = training_of(config)
    script = Ordinary(config, {name: p.detach()[0] for name, p in training.params.items()})
    for step in range(10):
        expected = script.step(read(config, step))
        training.update()
        found = float(training.average)
        if not abs(found - expected) < 1e-4 * expected:
            sys.exit(f"step {step}: the ordinary script loses {expected:.6f}, the family {found:.6f}")
    print(f"10 steps: both lose {found:.4f}")


def main() -> None:
    """Do what the words say."""
    words = sys.argv[1:]
    if words == ["--check"]:
        check()
    elif words[:1] == ["--measure"]:
        measure(words[1], int(words[2]), words[3], float(words[4]))
    elif len(words) <= 4:
        rounds, width, tokens, seconds = (*words, *DEFAULTS[len(words) :])
        compare(int(rounds), int(width), tokens, float(seconds))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
