"""How fast the family `groups` trains, against an ordinary script for the same nets.

    python benchmarks/groups.py speed [WORK ...]    # steps per CPU second, side by side, medians of rounds
    python benchmarks/groups.py sweep               # a whole sweep, from the first import to the last figure, in turns
    python benchmarks/groups.py --check             # the script and the family, given one start, follow one curve

The script is what a researcher writes: a torch module, autograd, torch's own Adam or a loop over the weights for the
descent by neurons, a fresh batch for each step; with `validation` also the loss of a second batch after each, as the
programs do that this family replaces. Both sides have one thread, and clip the gradient.

The sweep is 2 widths x 2 seeds x 1,000 steps. The script does it as those programs do: one process, one run after the
other, each with validation, snapshots, histories and figures of its own. Ours is `rnnq init`, `rnnq worker --drain`
into a new database, which must also find out how many runs it packs, and `rnnq examine`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnnq.config import parse
from rnnq.families.groups import nets, templates, theory, tuples
from rnnq.families.groups.config import GroupsConfig
from rnnq.families.groups.model import Groups
from rnnq.train import Member, NoDesk, Training

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
    runs = [Member(config_of(work, seed), NoDesk(), 1_000_000) for seed in range(members)]
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


def check(work: str, steps: int = 70) -> float:
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


# -------------------------------------------------------------------------------------------------- a whole sweep

SWEEP = """
base_config: base.yaml
n_seeds: 2
experiments:
  - {name: hidden_32, overrides: {model: {hidden_dim: 32}}}
  - {name: hidden_64, overrides: {model: {hidden_dim: 64}}}
"""
BASE = """
data: {p: 10, k: 3, template_type: fourier, n_freqs: 3, batch_size: 256}
training: {num_steps: 1000, verbose_interval: 10, save_param_interval: 100}
"""
SWEEP_GOAL = 3.0  # times


def ordinary_sweep(folder: Path) -> None:
    """What a researcher's program does: each run trained, stored and drawn, one after the other."""
    for width in (32, 64):
        for seed in (0, 1):
            model = {"hidden_dim": width}
            config = parse(GroupsConfig, WORKS["rnn"] | {"seed": seed, "model": model, "training": {"num_steps": 1000}})
            assert isinstance(config, GroupsConfig)
            place = folder / f"hidden_{width}" / f"seed_{seed}"
            place.mkdir(parents=True)
            script = Script(config, validation=True)
            losses, history = [], []
            for step in range(1000):
                losses.append(script.step().item())
                if step % 100 == 0 or step == 999:
                    history.append({name: w.detach().clone() for name, w in script.net.weights.items()})
            np.save(place / "train_loss_history.npy", np.array(losses))
            torch.save(history, place / "param_history.pt")
            torch.save(script.net.state_dict(), place / "final_model.pt")
            ordinary_figures(place, script, losses, history)


def ordinary_figures(place: Path, script: Script, losses: list[float], history: list[Any]) -> None:
    """The loss with its plateaus, power over training, predictions, W_mix: four files a run, as the programs draw."""
    from matplotlib import pyplot

    levels = theory.levels(script.config.data, templates.draw(script.config))
    power = []
    for weights in history:
        script.net.load_state_dict({f"weights.{name}": w for name, w in weights.items()})
        with torch.no_grad():
            x, y = script.batch()
            found = script.net(x)
        power.append(theory.mean_output_power(script.config.data, found.numpy()))
    figures: dict[str, Callable[[Any], Any]] = {
        "loss": lambda axes: [axes.loglog(losses), *(axes.axhline(level, ls="--") for level in levels[:-1])],
        "power": lambda axes: axes.plot(np.array(power)),
        "predictions": lambda axes: [axes.plot(found[0]), axes.plot(y[0])],
        "wmix": lambda axes: axes.imshow(history[-1]["W_mix"]),
    }
    for name, draw in figures.items():
        figure, axes = pyplot.subplots()
        draw(axes)
        figure.savefig(place / f"{name}.pdf")
        pyplot.close(figure)


def took(*commands: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of some commands, one after the other, from their start to their end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    for words in commands:
        subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    after, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    return ended - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sweep(rounds: int) -> bool:
    """Print both sides' seconds in turn, and the ratio; whether the goal is met."""
    rnnq = [sys.executable, "-m", "rnnq"]
    ratios: list[tuple[float, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            (folder / "base.yaml").write_text(BASE)
            (folder / "sweep.yaml").write_text(SWEEP)
            script = took([sys.executable, str(Path(__file__).resolve()), "script", place], folder=folder)
            train = took([*rnnq, "init", "sweep.yaml"], [*rnnq, "worker", "--drain"], folder=folder)
            draw = took([*rnnq, "examine"], folder=folder)
        ours = train[0] + draw[0], train[1] + draw[1]
        ratios.append((script[0] / ours[0], script[1] / ours[1]))
        print(f"script {script[0]:.1f} s (CPU {script[1]:.1f}); ours {ours[0]:.1f} s (CPU {ours[1]:.1f}), "
              f"of which init and worker {train[0]:.1f} s (CPU {train[1]:.1f}), examine {draw[0]:.1f} s "
              f"(CPU {draw[1]:.1f}); load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    wall, cpu = (statistics.median(each) for each in zip(*ratios, strict=True))
    print(f"script / ours, medians: {wall:.2f} by the clock, {cpu:.2f} by CPU time; goal {SWEEP_GOAL}")
    return cpu >= SWEEP_GOAL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed", "sweep", "script"])
    parser.add_argument("works", nargs="*", help=f"of speed: {', '.join(WORKS)}; by default all. Of script: its folder")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.what == "script":
        ordinary_sweep(Path(words.works[0]) / "script")
        return 0
    if words.what == "sweep":
        return 0 if sweep(words.rounds) else 1
    if wrong := [work for work in words.works if work not in WORKS]:
        parser.error(f"there is no work {', '.join(wrong)}; there are {', '.join(WORKS)}")
    if words.check:
        found = {work: check(work) for work in WORKS}
        print("\n".join(f"{work}: {worst:.1e}" for work, worst in found.items()))
        return 0 if max(found.values()) < 1e-3 else 1
    return 0 if speed(words.works or list(WORKS), words.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
