"""How fast the family `groups` trains, against an ordinary script for the same nets.

    python benchmarks/groups.py speed [WORK ...]    # steps per CPU second, side by side, medians of rounds
    python benchmarks/groups.py --check             # the script and the family, given one start, follow one curve

The script is what a researcher writes: a torch module, autograd, torch's own Adam or a loop over the weights for the
descent by neurons, a fresh batch for each step; with `validation` also the loss of a second batch after each, as the
programs do that this family replaces. Both sides have one thread, and clip the gradient.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rnnq.config import parse
from rnnq.families.groups import nets, templates, tuples
from rnnq.families.groups.config import GroupsConfig
from rnnq.families.groups.model import Groups
from rnnq.pack import _Idle
from rnnq.train import Member, Training

CPU = torch.device("cpu")

WORKS: dict[str, dict[str, Any]] = {
    "mlp": {
        "data": {"p": 10, "k": 2, "template_type": "onehot", "batch_size": 256},
        "model": {"model_type": "SequentialMLP", "hidden_dim": 300},
    },
    "rnn": {
        "data": {"p": 10, "k": 3, "template_type": "fourier", "n_freqs": 3, "batch_size": 256},
        "model": {"hidden_dim": 64},
    },
    "all-outputs": {
        "data": {"p": 10, "k": 3, "template_type": "fourier", "n_freqs": 3, "batch_size": 256},
        "model": {"hidden_dim": 64, "return_all_outputs": True},
    },
    "10x10": {
        "data": {"p1": 10, "p2": 10, "k": 3, "template_type": "fourier", "n_freqs": 10, "batch_size": 1000},
        "model": {"hidden_dim": 200},
    },
}
SIZES = {"mlp": (1, 8, 16), "rnn": (1, 8, 16), "all-outputs": (1, 8, 16), "10x10": (1, 2)}
GOALS = {"mlp": 2.0, "rnn": 2.0, "all-outputs": 2.0, "10x10": 1.4}  # times the script's steps, at the best size


class Net(nn.Module):
    """A QuadraticRNN or a SequentialMLP, as usually written."""

    def __init__(self, config: GroupsConfig, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.tensor(w)) for name, w in weights.items()})
        self.recurs = config.model.model_type == "QuadraticRNN"
        self.returns_all = config.model.return_all_outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, k, n) -> (B, n), or all outputs (B, k - 1, n)."""
        w, k = self.weights, x.shape[1]
        if not self.recurs:
            return ((x.flatten(1) @ w["W_in"].T) ** k) @ w["W_out"].T
        h = (x[:, 0] @ w["W_in"].T + x[:, 1] @ w["W_drive"].T) ** 2
        outputs = [h @ w["W_out"].T]
        for t in range(2, k):
            h = (h @ w["W_mix"].T + x[:, t] @ w["W_drive"].T) ** 2
            outputs.append(h @ w["W_out"].T)
        return torch.stack(outputs, 1) if self.returns_all else outputs[-1]


class PerNeuron(torch.optim.Optimizer):
    """Descent by the norm of each neuron, a row of W_in and a column of W_out."""

    def __init__(self, net: Net, lr: float, degree: float) -> None:
        super().__init__(net.parameters(), {"lr": lr})
        self.net, self.lr, self.degree = net, lr, degree

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        w_in, w_out = self.net.weights["W_in"], self.net.weights["W_out"]
        norm = (w_in.pow(2).sum(1) + w_out.pow(2).sum(0) + 1e-12).sqrt()
        factor = norm ** (2 - self.degree)
        w_in.grad *= factor[:, None]
        w_out.grad *= factor
        w_in -= self.lr * w_in.grad
        w_out -= self.lr * w_out.grad


class Script:
    """The ordinary script, one run."""

    def __init__(self, config: GroupsConfig, validation: bool = False) -> None:
        self.config, self.validation = config, validation
        self.net = Net(config, nets.matrices(config, nets.draw(config)))
        training = config.training
        if training.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.net.parameters(), lr=training.learning_rate)
        else:
            self.optimizer = PerNeuron(self.net, training.learning_rate, training.degree)
        self.shape = (config.data.p1, config.data.p2) if config.data.p1 else (config.data.p,)
        self.template = torch.from_numpy(templates.draw(config)).float()
        self.grid = [torch.arange(size) for size in self.shape]
        self.generator = torch.Generator().manual_seed(config.seed)

    def moved(self, shifts: list[Tensor]) -> Tensor:
        """The template after shifts, one tensor for each axis: (...) -> (..., n)."""
        if len(shifts) == 1:
            return self.template[(self.grid[0] - shifts[0][..., None]) % self.shape[0]]
        rows = (self.grid[0] - shifts[0][..., None]) % self.shape[0]
        columns = (self.grid[1] - shifts[1][..., None]) % self.shape[1]
        return self.template[(rows[..., :, None] * self.shape[1] + columns[..., None, :]).flatten(-2)]

    def batch(self, elements: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of tuples, which are drawn where none are given."""
        size = (self.config.data.batch_size, self.config.data.k)
        if elements is None:
            shifts = [torch.randint(0, p, size, generator=self.generator) for p in self.shape]
        else:
            shifts = [elements] if len(self.shape) == 1 else [elements // self.shape[1], elements % self.shape[1]]
        sums = [shift.cumsum(1)[:, 1:] % p for shift, p in zip(shifts, self.shape, strict=True)]
        targets = self.moved(sums)
        return self.moved(shifts), targets if self.config.model.return_all_outputs else targets[:, -1]

    def step(self, elements: Tensor | None = None) -> Tensor:
        """One update; the loss before it."""
        x, y = self.batch(elements)
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.net(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.training.grad_clip)
        self.optimizer.step()
        if self.validation:
            with torch.no_grad():
                x, y = self.batch()
                nn.functional.mse_loss(self.net(x), y).item()
        return loss.detach()


def config_of(work: str, seed: int = 0) -> GroupsConfig:
    """A work as the family's config."""
    return parse(GroupsConfig, WORKS[work] | {"seed": seed, "training": {"num_steps": 1_000_000}})  # type: ignore[return-value]


def pack_of(work: str, members: int) -> Training:
    """A pack of so many runs."""
    runs = [Member(config_of(work, seed), _Idle(), 1_000_000) for seed in range(members)]
    return Training(Groups(), runs, CPU)


def seconds(act: Callable[[], Any], least: float = 0.3) -> float:
    """CPU seconds of one call, over some tenths of a second."""
    act()
    began, calls = time.process_time(), 0
    while time.process_time() - began < least or calls < 3:
        act()
        calls += 1
    return (time.process_time() - began) / calls


def speed(works: list[str], rounds: int) -> bool:
    """Print the table; whether all goals are met."""
    print(f"{'work':12} {'side':22} {'steps/CPU s':>11} {'ratio':>6}   to the script without validation")
    met = True
    for work in works:
        script, validated = Script(config_of(work)), Script(config_of(work), validation=True)
        sides: dict[str, tuple[Callable[[], Any], int]] = {
            "script": (script.step, 1),
            "script, validation": (validated.step, 1),
        }
        sides |= {f"pack of {n}": (pack_of(work, n).update, n) for n in SIZES[work]}
        found = [{side: n / seconds(act) for side, (act, n) in sides.items()} for _ in range(rounds)]
        ratios = {side: statistics.median(each[side] / each["script"] for each in found) for side in sides}
        for side, ratio in ratios.items():
            print(f"{work:12} {side:22} {statistics.median(each[side] for each in found):11,.0f} {ratio:6.2f}")
        best = max(ratio for side, ratio in ratios.items() if side.startswith("pack"))
        met &= best >= GOALS[work]
        print(f"{work:12} best {best:.2f}, goal {GOALS[work]}: {'met' if best >= GOALS[work] else 'MISSED'}")
    return met


def check(work: str, steps: int = 150) -> float:
    """The largest relative difference of the losses of the script and the family, from one start on one data."""
    config = config_of(work)
    script, training = Script(config), pack_of(work, 1)
    worst = 0.0
    with torch.random.fork_rng():
        for step in range(steps):
            block, place = divmod(step, tuples.block_steps(config))
            loss = float(script.step(tuples.block(config, block)[0][place]))
            training.update()
            worst = max(worst, abs(float(training.average[0]) - loss) / loss)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed"])
    parser.add_argument("works", nargs="*", choices=[*WORKS, []], help="by default all")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.check:
        found = {work: check(work) for work in WORKS}
        print("\n".join(f"{work}: {worst:.1e}" for work, worst in found.items()))
        return 0 if max(found.values()) < 1e-3 else 1
    return 0 if speed(words.works or list(WORKS), words.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
