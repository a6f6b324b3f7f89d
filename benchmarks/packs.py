"""Packs of small runs against the ordinary way: one process per run, two at a time.

    python benchmarks/packs.py                 # everything: some 15 minutes
    python benchmarks/packs.py --quick         # a small version of the same, one minute
    python benchmarks/packs.py speed dynamics-32      # one part, some works
    python benchmarks/packs.py speed dynamics-32 --device cuda:0 --processes 1 --sizes 1 8 64     # on a GPU
    python benchmarks/packs.py --check         # the closed forms against autograd, nothing else

Parts. `speed`: member-steps per second of two processes, each with one thread. Baseline and packs of every K are all
warm and run in turn, so that a busy machine weighs on them alike; ratios are medians over the rounds of wall clock and
of the processes' own CPU time, which a neighbour hardly touches. `sweep`: the wall clock of a whole sweep with every
start-up in it, of rnnq itself. `overhead`: what a worker does besides the steps. `ops`: how many operations torch
dispatches for one step of one member; the optimiser's are counted apart.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ordinary
import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Work:
    """One net at one size, in the words of ordinary.py and of the family's config."""

    ordinary: str
    family: str
    fields: dict[str, Any]
    goal: float  # the least ratio to the baseline


def dynamics(batch: int, state: int, goal: float, gates: bool = False) -> Work:
    """The default flags, or all seven."""
    flags = ["use_input_gate", "use_forget_gate", "use_output_gate", "use_state_gate", "use_old_state"]
    fields = {"batch_size": batch, "state_size": state, "corpus": "stdlib"} | dict.fromkeys(flags, gates)
    return Work(f"dynamics:batch={batch},state={state},gates={int(gates)}", "dynamics", fields, goal)


WORKS = {
    "dynamics-32": dynamics(32, 32, 4.0),
    "dynamics-32-gates": dynamics(32, 32, 4.0, gates=True),
    "dynamics-128": dynamics(256, 128, 1.35),
    "dynamics-256": dynamics(256, 256, 1.25),
    "dynamics-1024": dynamics(256, 1024, 1.0),
    "plain": Work("plain:batch=8,width=16,length=100,layers=2", "plain", {}, 8.0),
    "quadratic": Work("quadratic:batch=1000,inputs=100,width=200", "quadratic", {}, 1.4),
}


# ------------------------------------------------------------------------------------------------ one pack


class Pack:
    """Members stepped side by side: what the training loop does between two logs."""

    def __init__(self, work: Work, seeds: Sequence[int], device: str = "cpu") -> None:
        from rnnq import State
        from rnnq.optimizer import FusedAdam
        from rnnq.worker import prepare

        self.device = torch.device(device)
        prepare(self.device)  # as a worker does: one thread, and on a GPU kernels that repeat
        self.family = find(work.family)
        self.configs = [self.family.Config(seed=seed, **work.fields) for seed in seeds]
        drawn = self.family.init(self.configs)
        self.state = State(
            {name: p.contiguous().to(device) for name, p in drawn.params.items()},
            {name: c.to(device) for name, c in drawn.carried.items()},
        )
        self.optimizer = FusedAdam(self.state.params, [self.family.optimizer(config) for config in self.configs])
        self.steps = 0

    def gradients(self) -> list[torch.Tensor | None]:
        """Everything of a step but the optimiser."""
        from rnnq.train import gradients_of, to_device

        data = to_device(self.family.batch(self.configs, [self.steps] * len(self.configs)), self.device)
        _, found, self.state.carried = gradients_of(self.family, self.state, data)
        self.steps += 1
        return [found[name] for name in self.state.params]

    def step(self) -> None:
        """One step of every member."""
        self.optimizer.update(self.gradients())


def find(family: str) -> Any:
    """The built-in family, or one of recurrent.py."""
    import recurrent

    import rnnq.families

    own = {"plain": recurrent.PlainRNN, "quadratic": recurrent.QuadraticRNN}
    return own[family]() if family in own else rnnq.families.find(family)


# --------------------------------------------------------------------------------------------------- speed


def stepper(name: str, members: int, seed: int, device: str) -> Callable[[], Any]:
    """One step of the baseline (no members) or of a pack."""
    work = WORKS[name]
    if not members:
        return ordinary.make(work.ordinary, seed, device)
    return Pack(work, range(seed, seed + members), device).step


def child(connection: Connection, name: str, members: int, seed: int, device: str) -> None:
    """Step for as many seconds as are asked for, each time; answers (member-steps, wall, CPU seconds)."""
    step = stepper(name, members, seed, device)
    # a GPU is waited for as often as the loop does by default, to log; what was handed over by then counts as done
    every, wait = (1, int) if device == "cpu" else (50, torch.cuda.synchronize)
    for _ in range(5):
        step()
    wait()
    connection.send("warm")
    while seconds := connection.recv():
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            for _ in range(every):
                step()
            wait()
            done += every * max(1, members)
        connection.send((done, time.perf_counter() - began, time.process_time() - cpu))


class Side:
    """Processes of one kind, side by side."""

    def __init__(self, name: str, members: int, processes: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = [], []
        for place in range(processes):
            mine, its = context.Pipe()
            words = (its, name, members, 1000 * place, device)
            self.processes.append(context.Process(target=child, args=words, daemon=True))
            self.processes[-1].start()
            self.ends.append(mine)

    def warm(self) -> None:
        """Wait until all have made some steps."""
        for end in self.ends:
            end.recv()

    def run(self, seconds: float) -> tuple[float, float]:
        """Member-steps per second of wall clock, all together, and per second of CPU time, of one."""
        for end in self.ends:
            end.send(seconds)
        found = [end.recv() for end in self.ends]
        wall = sum(done / wall for done, wall, _ in found)
        return wall, sum(done for done, _, _ in found) / sum(cpu for _, _, cpu in found)

    def close(self) -> None:
        """All leave."""
        for end, process in zip(self.ends, self.processes, strict=True):
            end.send(0)
            process.join()


def speed(names: Iterable[str], sizes: Sequence[int], rounds: int, seconds: float, processes: int, device: str) -> None:
    """The table of member-steps per second."""
    for name in names:
        sides = {members: Side(name, members, processes, device) for members in (0, *sizes)}
        for side in sides.values():
            side.warm()
        found: dict[int, list[tuple[float, float]]] = {members: [] for members in sides}
        for _ in range(rounds):
            for members, side in sides.items():
                found[members].append(side.run(seconds))
        for side in sides.values():
            side.close()
        base = found.pop(0)
        rate, cpu_rate = (statistics.median(values) for values in zip(*base, strict=True))
        print(f"\n{name}: {processes} ordinary processes {rate:,.0f} steps/s, {cpu_rate:,.0f} per CPU second")
        print("     K   member-steps/s   ratio    per CPU second   ratio")
        best = 0.0
        for members, values in found.items():
            rate, cpu_rate = (statistics.median(side) for side in zip(*values, strict=True))
            wall, cpu = (ratio(values, base, side) for side in (0, 1))
            best = max(best, cpu)
            print(f"  {members:4d}   {rate:14,.0f}   {wall:5.2f}   {cpu_rate:15,.0f}   {cpu:5.2f}", flush=True)
        print(f"  best by CPU time {best:.2f}, goal {WORKS[name].goal}: {verdict(best, WORKS[name].goal)}")


def ratio(values: Sequence[Sequence[float]], base: Sequence[Sequence[float]], side: int) -> float:
    """The median over the rounds."""
    return statistics.median(mine[side] / other[side] for mine, other in zip(values, base, strict=True))


def verdict(found: float, goal: float) -> str:
    """Whether a goal is met."""
    return "met" if found >= goal else "MISSED"


# ---------------------------------------------------------------------------------------------- whole sweep


DEFINITION = """
import rnnq

stage = rnnq.stage("sweep", "dynamics", rnnq.grid(lr=[0.0003, 0.001, 0.003, 0.01]).seeds({seeds}),
                   base={base})
"""


def sweep(name: str, runs: int, steps: int, goal: float = 6.0) -> None:
    """`runs` runs from the first process's start to the last one's end: one process each, and `rnnq worker`.

    rnnq's side does more: it finds the size of packs by trial, measures each run on held-out data at its end, writes
    its checkpoint, curve and result.
    """
    program = [sys.executable, str(HERE / "ordinary.py"), WORKS[name].ordinary]
    found = {"one process per run": timed([[*program, str(seed), str(steps)] for seed in range(runs)])}
    for pack in ("off", "auto"):
        found[f"rnnq worker --processes 2 --pack {pack}"] = with_rnnq(name, runs, steps, pack)
    print(f"\n{name}: a sweep of {runs} runs of {steps:,} steps, start-up and all")
    base = found["one process per run"]
    for what, (wall, cpu) in found.items():
        shown = f"{wall:8.1f} s   CPU {cpu:8.1f} s   {runs * steps / wall:10,.0f} member-steps/s"
        print(f"  {what:38s} {shown}   ratio {base[0] / wall:5.2f}, by CPU time {base[1] / cpu:5.2f}")
    best = base[0] / wall
    print(f"  ratio of the last {best:.2f}, goal {goal}: {verdict(best, goal)}")


def with_rnnq(name: str, runs: int, steps: int, pack: str) -> tuple[float, float]:
    """Wall and CPU seconds of a study of its own, from `rnnq init` to the end of the workers."""
    base = WORKS[name].fields | {"steps": steps, "eval_every": steps, "window": 250}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "defs").mkdir()
        (Path(folder) / "defs/sweep.py").write_text(DEFINITION.format(seeds=runs // 4, base=base))
        program = [sys.executable, "-m", "rnnq"]
        began, cpu = timed([[*program, "init", "defs/sweep.py"]], folder)
        wall, more = timed([[*program, "worker", "--processes", "2", "--no-bar", "--pack", pack]], folder)
        shown = subprocess.run([*program, "ls", "--format", "csv", "--filter", "state = done"], cwd=folder, check=True,
                               capture_output=True, text=True).stdout  # fmt: skip
        if len(shown.splitlines()) != runs + 1:
            sys.exit(f"of {runs} runs {len(shown.splitlines()) - 1} are done")
    return began + wall, cpu + more


def timed(commands: Sequence[Sequence[str]], folder: str | None = None) -> tuple[float, float]:
    """Wall and CPU seconds of all commands, two at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began, cpu = time.perf_counter(), os.times()
    with ThreadPoolExecutor(2) as pool:
        quiet = {"check": True, "env": environment, "cwd": folder, "stdout": subprocess.DEVNULL}
        list(pool.map(lambda c: subprocess.run(c, stderr=subprocess.DEVNULL, **quiet), commands))
    now = os.times()
    spent = now.children_user + now.children_system - cpu.children_user - cpu.children_system
    return time.perf_counter() - began, spent


# --------------------------------------------------------------------------------------------------- overhead

TEN_MS = """
import torch

import rnnq


class Config(rnnq.Config):
    steps: int = 1000
    size: int = 700
    times: int = 1

    def pack_key(self):
        return "all"


class Products(rnnq.Family):
    Config = Config
    name = "products"

    def init(self, configs):
        return rnnq.State({{"w": torch.zeros(len(configs), 1, 32)}}, {{}})

    def batch(self, configs, steps):
        return configs[0]

    def loss(self, state, config):
        x = torch.ones(config.size, config.size)
        for _ in range(config.times):
            x = x @ x * 1e-3
        return state.params["w"].square().mean((1, 2)) + x.mean() * 0, {{}}


stage = rnnq.stage("s", Products(), rnnq.grid(size=[{size}]).seeds({runs}), base=dict(times={times}, steps={steps}))
"""


def overhead(steps: int) -> None:
    """The part of a run's time, from its claim to its end, that is not its steps; of some 10 ms each."""
    print("\nworker overhead: everything but the steps, from the claim to the end")
    torch.set_num_threads(1)
    x = torch.ones(700, 700)
    for _ in range(5):
        x @ x
    began = time.perf_counter()
    for _ in range(20):
        x @ x
    times = max(1, round(0.010 / ((time.perf_counter() - began) / 20)))
    for runs in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "defs").mkdir()
            words = TEN_MS.format(size=700, runs=runs, times=times, steps=steps)
            (Path(folder) / "defs/s.py").write_text(words)
            program = [sys.executable, "-m", "rnnq"]
            timed([[*program, "init", "defs/s.py"]], folder)
            timed([[*program, "worker", "--no-bar", "--pack", str(runs)]], folder)
            shown = subprocess.run([*program, "show", str(runs), "--format", "json"], cwd=folder, check=True,
                                   capture_output=True, text=True).stdout  # fmt: skip
        row = json.loads(shown)
        row = row[0] if isinstance(row, list) else row
        took, [attempt] = row["summary"]["steps_per_s"], row["attempts"]
        whole, inside = attempt["ended_at"] - attempt["started_at"], steps / took
        print(f"  pack of {runs}: {1000 / took:.1f} ms a step, {steps:,} steps in {whole:.1f} s, "
              f"of which {100 * (1 - inside / whole):.1f} % is not a step")  # fmt: skip


# ------------------------------------------------------------------------------------------------ operations


def ops(names: Iterable[str], sizes: Sequence[int]) -> None:
    """Operations that torch dispatches for one step of one member."""
    print("\noperations per member-step                  K     step   of K = 1    optimiser")
    for name in names:
        alone = 0.0
        for members in sizes:
            pack = Pack(WORKS[name], range(members))
            pack.step()
            found = pack.gradients()
            step, update = (count(f) / members for f in (pack.gradients, lambda f=found, p=pack: p.optimizer.update(f)))
            alone = alone or step
            share = step / alone * members
            print(f"  {name:36s} {members:6d}  {step:7.1f}   {share:5.2f}/K    {update:8.1f}  {verdict(1.1, share)}")


def count(act: Callable[[], Any]) -> int:
    """How many operations are dispatched, those inside of others too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        act()
    return sum(event.name.startswith("aten::") for event in profiler.events())


# ------------------------------------------------------------------------------------------------------ main


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="?", choices=["all", "speed", "sweep", "overhead", "ops"], default="all")
    parser.add_argument("works", nargs="*", help=f"some of {', '.join(WORKS)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--runs", type=int, default=96, help="of the sweep; a multiple of 4")
    parser.add_argument("--device", default="cpu", help="of the speed: cpu or cuda:N")
    parser.add_argument("--processes", type=int, default=2, help="of the speed: side by side, of each kind")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the speed: members of the packs")
    given = parser.parse_args()
    names = given.works or [name for name in WORKS if name != "dynamics-1024"]  # that one is for a GPU
    if given.check:
        import recurrent

        sys.exit("\n".join(recurrent.check()) or 0)
    print(machine(given.device), flush=True)
    if given.part in ("all", "speed"):
        sizes = given.sizes or ((1, 8) if given.quick else (1, 4, 8, 16, 32))
        speed(names, sizes, *((2, 0.5) if given.quick else (5, 1.5)), given.processes, given.device)
    if given.part in ("all", "sweep"):
        sweep("dynamics-32", *((8, 200) if given.quick else (given.runs, 2000)))
    if given.part in ("all", "overhead"):
        overhead(100 if given.quick else 1500)
    if given.part in ("all", "ops"):
        ops(names, (1, 8))
    return


def machine(device: str) -> str:
    """What all figures depend on."""
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
        return f"{name}, {os.cpu_count()} CPUs, one thread a process, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{model}, {os.cpu_count()} CPUs, one thread a process, torch {torch.__version__}, load {load} at the start"


if __name__ == "__main__":
    main()
