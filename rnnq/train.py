"""The only training loop: resume, step, measure, evaluate, checkpoint, stop on divergence or on a wish.

It knows no database: whoever owns the run hands it a `Desk`. It never waits for the device at a step; losses are
gathered there and read at the logging interval.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rnnq.config import Config
from rnnq.errors import Diverged, InputError
from rnnq.families.base import Adam, Family, Generator, State

Point = tuple[str, int, float]  # name, step, value
FIRST = 30.0  # seconds of a run in which no checkpoint by time is made


@dataclass(frozen=True)
class Every:
    """How often to checkpoint: by seconds or by steps."""

    seconds: float | None = 60.0
    steps: int | None = None


class Desk(Protocol):
    """What the loop needs of the owner of a run. A method may raise LeaseLost, which ends the training."""

    def record(self, step: int, points: Sequence[Point]) -> None:
        """New points, up to a step."""

    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None:
        """New points and the whole state, to be kept on disk."""

    def leave_behind(self, points: Sequence[Point]) -> None:
        """Points that were not handed over yet when training ends by an error."""

    def wish(self) -> bool:
        """Whether the owner wishes the loop to checkpoint and stop."""


@dataclass(frozen=True)
class Outcome:
    """How training ended. `state` is None for a family that cannot be resumed."""

    finished: bool
    step: int
    points: list[Point]  # not yet recorded
    summary: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    best: dict[str, Any] | None = None  # step, value, params, carried


def numerics(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on besides its config, its data and the code of its family."""
    cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),  # a plain str: weights_only refuses a checkpoint that holds torch's own class
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": torch.get_float32_matmul_precision() if cuda else "",
        "compile": False,
    }


def train(
    family: Family | Generator,
    config: Config,
    desk: Desk,
    device: torch.device,
    budget: int | None,
    every: Every,
    resumed: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train one run to its budget, or until the desk wishes otherwise.

    `resumed` is the state of a checkpoint. Raises Diverged, and whatever the family or the desk raises.
    """
    seed_everything(config.seed)
    if isinstance(family, Generator):
        return _consume(family, config, desk)
    if budget is None:
        raise InputError(
            f"{type(config).__name__} does not say how many steps a run takes",
            "give it a field `steps`, or a steps_total() of its own",
        )
    training = Training(family, config, device)
    if resumed is not None:
        training.load(resumed)
    return _run(training, desk, budget, Pace(every))


def to_device(data: Any, device: torch.device) -> Any:
    """A tensor, a tree of them in tuples, lists and dicts, or anything with a `.to`, without waiting for the copy."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, dict):
        return {name: to_device(part, device) for name, part in data.items()}
    if isinstance(data, (tuple, list)):
        parts = [to_device(part, device) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return data.to(device) if hasattr(data, "to") else data


def seed_everything(seed: int) -> None:
    """The global random numbers, for families that draw from them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the global random numbers stand, without anything that weights_only would refuse to load."""
    numpy: Any = np.random.get_state()  # its kind, 624 numbers, and where among them it stands
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing from where `random_state` stood."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


# ------------------------------------------------------------------------------------------ the first level


def _consume(family: Generator, config: Config, desk: Desk) -> Outcome:
    """Drive a generator: each dict that it yields is one step."""
    waiting: list[Point] = []
    try:
        return _consume_all(family, config, desk, waiting)
    except Exception:
        desk.leave_behind(waiting)
        raise


def _consume_all(family: Generator, config: Config, desk: Desk, waiting: list[Point]) -> Outcome:
    log_every = max(1, int(getattr(config, "log_every", 1)))
    latest: dict[str, float] = {}
    points: list[Point] = []  # of the last step
    step = 0
    recorded = time.monotonic()
    for step, measured in enumerate(family(config), start=1):
        points = _points(step, measured)
        latest |= {name: value for name, _, value in points}
        if step % log_every == 0:
            waiting += points
        _refuse_divergence(config, step, latest)
        if desk.wish():
            return Outcome(False, step, list(waiting))
        if time.monotonic() - recorded > 1.0:
            desk.record(step, list(waiting))
            waiting.clear()
            recorded = time.monotonic()
    if step and step % log_every:
        waiting += points
    return Outcome(True, step, list(waiting), latest)


def _points(step: int, measured: Any) -> list[Point]:
    if not isinstance(measured, Mapping) or not all(isinstance(name, str) for name in measured):
        raise InputError(f"step {step:,} yielded {measured!r}", 'a generator yields dicts of numbers: {"loss": 1.5}')
    return [(name, step, float(value)) for name, value in measured.items()]


def _refuse_divergence(config: Config, step: int, measured: Mapping[str, float]) -> None:
    value = measured.get(config.primary().name)
    if value is not None and not math.isfinite(value):
        raise Diverged(f"{config.primary().name} is {value} at step {step:,}", "a lower lr?")


# ---------------------------------------------------------------------------------- the second and third level


def _run(training: Training, desk: Desk, budget: int, pace: Pace) -> Outcome:
    try:
        return _train_to(training, desk, budget, pace)
    except Exception:
        desk.leave_behind(training.take_points())
        raise


def _train_to(training: Training, desk: Desk, budget: int, pace: Pace) -> Outcome:
    while training.step < budget:
        training.advance(budget)
        if training.step == budget:
            break
        if desk.wish():
            return Outcome(False, training.step, training.take_points(), state=training.state())
        if pace.is_due(training.step):
            desk.save(training.step, training.take_points(), training.state())
            pace.saved()
        elif training.has_points():
            desk.record(training.step, training.take_points())
    training.close(budget)
    summary = training.summary()
    return Outcome(True, training.step, training.take_points(), summary, training.state(), training.best)


class Pace:
    """When the next checkpoint is due."""

    def __init__(self, every: Every) -> None:
        self.every = every
        self.due = time.monotonic() + max(every.seconds or 0.0, FIRST)

    def is_due(self, step: int) -> bool:
        """By steps: at every multiple. By time: when the interval has passed, and never in the first 30 s."""
        if self.every.steps is not None:
            return step % self.every.steps == 0
        return time.monotonic() >= self.due

    def saved(self) -> None:
        """A checkpoint was made."""
        self.due = time.monotonic() + (self.every.seconds or 0.0)


class Training:
    """One run in training, as a pack of one: everything that changes has a leading axis of members, K = 1."""

    def __init__(self, family: Family, config: Config, device: torch.device) -> None:
        self.family, self.config, self.device = family, config, device
        self.configs = [config]
        drawn = family.init(self.configs)
        # contiguous, as the fused optimiser walks through the memory of a row from its first element to its last
        self.params = {name: p.to(device).contiguous().requires_grad_() for name, p in drawn.params.items()}
        self.carried = {name: c.to(device) for name, c in drawn.carried.items()}
        # what begins without an infinity has none later: a mask of a module's own may hold some
        self._finite = [name for name, c in self.carried.items() if bool(torch.isfinite(c).all())]
        self.optimizer = FusedAdam(self.params, [family.optimizer(config)])
        decay, start = family.smoothing or (0.0, 0.0)
        self.decay = decay
        self.average = torch.full((1,), start, dtype=torch.float64, device=device)  # of the training loss
        self.step = 0
        self.curve: list[Point] = []
        self.best: dict[str, Any] | None = None
        self.busy = 0.0  # seconds spent in steps of this attempt
        self._started_at_step = 0
        self._recorded = 0
        self.log_every = max(1, int(getattr(config, "log_every", 50)))
        self.eval_every: int | None = getattr(config, "eval_every", None)
        self.loss_name = config.primary().name

    # ------------------------------------------------------------------------------------------------ stepping

    def advance(self, budget: int) -> None:
        """One optimiser step, and what is due after it: logging, evaluation."""
        began = time.perf_counter()
        self._update()
        due = self.step % self.log_every == 0 or self.step == budget
        if due:
            self._log()
        self.busy += time.perf_counter() - began
        if self.eval_every and self.step % self.eval_every == 0 and self.step < budget:
            self._evaluate("val")

    def _update(self) -> None:
        data = to_device(self.family.batch(self.configs, [self.step]), self.device)
        losses, gradients, carried = self.family.gradients(State(self.params, self.carried), data)
        self.optimizer.update([gradients[name] for name in self.params])
        self.average.mul_(self.decay).add_(losses, alpha=1 - self.decay)
        self.carried = carried
        self.step += 1

    def _log(self) -> None:
        value = float(self.average)  # the only place where the host waits for the device
        self.curve.append((self.loss_name, self.step, value))
        if not math.isfinite(value) or value > self.family.loss_bound:
            raise Diverged(f"the training loss is {value:g} at step {self.step:,}", "a lower lr?")

    # --------------------------------------------------------------------------------------------- measuring

    @torch.no_grad()
    def _evaluate(self, split: str) -> None:
        [found] = self.family.evaluate(State(self.params, self.carried), self.configs, split)
        twice = sorted({name for name, step, _ in self.curve if step == self.step} & set(found))
        if twice:
            raise InputError(
                f"evaluate() for {split} measures {', '.join(twice)}, of which step {self.step:,} has a value already",
                f"a metric belongs to one split: {split}_{twice[0]}?",
            )
        self.curve += [(name, self.step, float(value)) for name, value in found.items()]
        if self.config.best_metric in found:
            self._keep_best(float(found[self.config.best_metric]))

    def _keep_best(self, value: float) -> None:
        direction = next((m.better for m in self.config.metrics if m.name == self.config.best_metric), "min")
        sign = 1 if direction == "min" else -1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best["value"]):
            params = {name: p.detach().cpu().clone() for name, p in self.params.items()}
            carried = {name: c.detach().cpu().clone() for name, c in self.carried.items()}  # such as running means
            self.best = {"step": self.step, "value": value, "params": params, "carried": carried}

    def close(self, budget: int) -> None:
        """The last evaluation, also on test data."""
        if not any(step == budget and name != self.loss_name for name, step, _ in self.curve):
            self._evaluate("val")
            self._evaluate("test")

    def summary(self) -> dict[str, Any]:
        """The family's summary and the speed of this attempt in steps per second, evaluations aside."""
        speed = (self.step - self._started_at_step) / self.busy if self.busy else None
        found = self.family.summary(self.config, self.curve)
        return found | ({"steps_per_s": speed} if speed else {})

    # ------------------------------------------------------------------------------------------------- points

    def has_points(self) -> bool:
        """Whether there are points that were not yet handed over."""
        return self._recorded < len(self.curve)

    def take_points(self) -> list[Point]:
        """The points that were not yet handed over."""
        points = self.curve[self._recorded :]
        self._recorded = len(self.curve)
        return points

    # -------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """All that is needed to go on as if nothing had happened. Raises Diverged rather than keep a bad state."""
        members = {
            "params": {name: p.detach().cpu() for name, p in self.params.items()},
            "carried": {name: c.cpu() for name, c in self.carried.items()},
            "optimizer": self.optimizer.state(),
            "average": self.average.cpu(),
        }
        carried = {name: c for name, c in self.carried.items() if name in self._finite}
        _refuse_nonfinite([self.params, carried, self.optimizer.first, self.optimizer.second], self.step)
        return {
            "step": self.step,
            "members": members,
            "best": self.best,
            "curve": [list(point) for point in self.curve],
            "rng": random_state(self.device),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        members = state["members"]
        for name, p in self.params.items():
            p.data.copy_(members["params"][name])
        self.carried = {name: c.to(self.device) for name, c in members["carried"].items()}
        self.optimizer.load(members["optimizer"])
        self.average.copy_(members["average"])
        self.step = self._started_at_step = state["step"]
        self.best = state["best"]
        self.curve = [(name, step, value) for name, step, value in state["curve"]]
        self._recorded = len(self.curve)
        set_random_state(state["rng"], self.device)


def _refuse_nonfinite(trees: Sequence[Mapping[str, Tensor]], step: int) -> None:
    """One look at the device for all of them."""
    tensors = [t for tree in trees for t in tree.values() if t.is_floating_point()]
    if not bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all()):
        raise Diverged(f"the state is not finite at step {step:,}", "a lower lr?")


class FusedAdam:
    """One fused Adam call per member, on row views of the stacked parameters.

    Each member has its own learning rate and step count, at no cost over one call for all. A parameter whose
    gradient is absent is left alone.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Sequence[Adam]) -> None:
        self.names = list(params)
        self.specs = list(specs)
        self.first = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.second = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        device = next(iter(params.values())).device
        self.steps = torch.zeros(len(specs), dtype=torch.float32, device=device)
        self._rows = [
            [(params[n].detach()[k], self.first[n][k], self.second[n][k]) for n in self.names]
            for k in range(len(specs))
        ]

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """One step of every member. gradients: one per parameter, (K, ...), or None where there is none."""
        self.steps += 1
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        for k, spec in enumerate(self.specs):
            rows = [self._rows[k][i] for i in present]
            torch._fused_adam_(
                [row[0] for row in rows],
                # the gradient of a transposed use is transposed, that of a plain sum is one number seen many times
                [g[k].contiguous() for g in gradients if g is not None],
                [row[1] for row in rows],
                [row[2] for row in rows],
                [],
                [self.steps[k]] * len(rows),
                lr=spec.lr,
                beta1=spec.betas[0],
                beta2=spec.betas[1],
                weight_decay=0.0,
                eps=spec.eps,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, on the CPU."""
        moments = {f"first.{n}": t.cpu() for n, t in self.first.items()}
        moments |= {f"second.{n}": t.cpu() for n, t in self.second.items()}
        return moments | {"steps": self.steps.cpu()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for n in self.names:
            self.first[n].copy_(state[f"first.{n}"])
            self.second[n].copy_(state[f"second.{n}"])
        self.steps.copy_(state["steps"])
