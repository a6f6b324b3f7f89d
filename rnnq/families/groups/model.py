"""Sequential group composition as a family: K members side by side, each with its group's orbit of a template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rnnq.families.base import Adam, Curve, Family, PerNeuron, Spec, State
from rnnq.families.device import brought
from rnnq.families.groups import groups, nets, templates, theory, tuples
from rnnq.families.groups.config import GroupsConfig
from rnnq.families.groups.places import Cells, Places, Rows


class Orbits:
    """The orbits of the members' templates, (K, n, n), row g of a member as element g moves it; on every device."""

    def __init__(self, configs: Sequence[GroupsConfig]) -> None:
        found = [groups.of(config.data).orbit(templates.draw(config)) for config in configs]
        self._on = {torch.device("cpu"): torch.from_numpy(np.stack(found)).float()}

    def on(self, device: torch.device) -> Tensor:
        """The tensor, which is copied once for each device."""
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device)
        return self._on[device]


@dataclass(frozen=True)
class Batch:
    """The tuples of one step, and which members begin an epoch; None online, where there are none."""

    config: GroupsConfig  # the sizes that all members share
    places: Places
    orbits: Orbits
    fresh: tuple[bool, ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def orbit(self) -> Tensor:
        """(K, n, n), where the batch is."""
        return self.orbits.on(self.device)

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for the copy."""
        return Batch(self.config, self.places.to(device), self.orbits, self.fresh, device)


def is_small(config: GroupsConfig) -> bool:
    """Whether a batch has as many rows as there are tuples: then it is cheaper to weigh these."""
    return config.tuples() <= config.data.batch_size


@lru_cache(maxsize=8)
def _products(config: GroupsConfig) -> tuple[Tensor, ...]:
    """g_1 ... g_t of every beginning of t elements, (n^t,), for the t that there are outputs for."""
    found = []
    for t in range(2, config.data.k + 1):
        every = np.indices((config.order(),) * t).reshape(t, -1).T
        found.append(torch.from_numpy(groups.of(config.data).products(every)[:, -1].copy()))
    return tuple(found if config.model.return_all_outputs else found[-1:])


@lru_cache(maxsize=8)
def _table(config: GroupsConfig) -> Tensor:
    return torch.from_numpy(groups.of(config.data).table)


def products_of(config: GroupsConfig, elements: Tensor) -> Tensor:
    """g_1 ... g_t of tuples (..., k) for the t that there are outputs for: (..., k - 1), or (..., 1)."""
    table, found = _table(config), [elements[..., 0]]
    for t in range(1, config.data.k):
        found.append(table[found[-1], elements[..., t]])
    return torch.stack(found[1:] if config.model.return_all_outputs else found[-1:], -1)


def rows_of(config: GroupsConfig, elements: Tensor) -> Rows:
    """The places of one member's tuples, (B, k)."""
    return Rows(
        elements.T[:, None].contiguous(),
        products_of(config, elements).T[:, None].contiguous(),
        None,
    )


class Drawn:
    """What one member reads for some steps, made ready: by the step among these."""

    def __init__(self, config: GroupsConfig, index: int) -> None:
        self.index = index
        elements, counts = tuples.block(config, index)
        self.weights = None if counts is None else counts / counts.sum(1, keepdim=True)
        if is_small(config):
            self.weights = self._weigh(config, elements)
        else:
            self.elements = elements.transpose(1, 2).contiguous()  # (steps, k, B)
            self.products = products_of(config, elements).transpose(1, 2).contiguous()  # (steps, outputs, B)

    def _weigh(self, config: GroupsConfig, elements: Tensor) -> Tensor:
        """How much each tuple that there is counts at each step: (steps, n^k)."""
        n, cells = config.order(), config.tuples()
        place = elements[..., 0]
        for t in range(1, config.data.k):
            place = place * n + elements[..., t]
        steps, batch = place.shape
        at = (place + cells * torch.arange(steps)[:, None]).view(-1)
        each = None if self.weights is None else self.weights.reshape(-1)
        found = torch.bincount(at, each, steps * cells).view(steps, cells).float()
        return found / batch if each is None else found


@dataclass(frozen=True)
class Sizes:
    """What all members of a pack share, reckoned once."""

    n: int
    span: int  # steps that are drawn at once
    epoch: int | None  # steps; None online
    products: tuple[Tensor, ...] | None  # of every tuple, where these are weighed

    @classmethod
    def of(cls, config: GroupsConfig) -> Sizes:
        """Those of a config."""
        epoch = config.steps_an_epoch() if config.training.mode == "offline" else None
        products = _products(config) if is_small(config) else None
        return cls(config.order(), tuples.block_steps(config), epoch, products)


class Groups(Family):
    """Nets that compose a sequence of elements of a finite group, learnt from one orbit of a template."""

    Config = GroupsConfig
    name: ClassVar[str] = "groups"

    def __init__(self) -> None:
        self._drawn: list[Drawn | None] = []
        self._configs: list[GroupsConfig] = []  # whose
        self._orbits: Orbits | None = None
        self._sizes = Sizes(0, 1, None, None)
        self._together: tuple[Tensor, ...] | None = None  # what is drawn, stacked, where all stand at one step

    def init(self, configs: Sequence[GroupsConfig]) -> State:
        """Parameters of each member from its own seed. Offline the mean of the losses of an epoch is carried."""
        drawn = [nets.draw(config) for config in configs]
        params = {name: torch.cat([member[name] for member in drawn]) for name in drawn[0]}
        if configs[0].training.mode == "online":
            return State(params)
        return State(params, {name: torch.zeros(len(configs)) for name in ("epoch.sum", "epoch.batches")})

    # ---------------------------------------------------------------------------------------------------- data

    def batch(self, configs: Sequence[GroupsConfig], steps: Sequence[int]) -> Batch:
        """The tuples of each member's step."""
        self._hold(configs, steps)
        span, epoch = self._sizes.span, self._sizes.epoch
        fresh = None if epoch is None else tuple(step % epoch == 0 for step in steps)
        assert self._orbits is not None
        return Batch(configs[0], self._places([step % span for step in steps]), self._orbits, fresh)

    def _hold(self, configs: Sequence[GroupsConfig], steps: Sequence[int]) -> None:
        """Each member's block of steps, drawn only where it is another one than before."""
        same = len(configs) == len(self._configs) and all(a is b for a, b in zip(configs, self._configs, strict=True))
        if not same:
            self._configs, self._drawn, self._orbits = list(configs), [None] * len(configs), Orbits(configs)
            self._sizes = Sizes.of(configs[0])
        span = self._sizes.span
        for k, (config, step) in enumerate(zip(configs, steps, strict=True)):
            held = self._drawn[k]
            if held is None or held.index != step // span:
                self._drawn[k] = Drawn(config, step // span)
                self._together = None

    def _places(self, at: Sequence[int]) -> Places:
        drawn = [one for one in self._drawn if one is not None]
        if min(at) == max(at):
            if self._together is None:
                self._together = self._stacked(drawn, None)
            parts = tuple(part[at[0]] for part in self._together)
        else:
            parts = self._stacked(drawn, at)
        if self._sizes.products is not None:
            return Cells(self._sizes.products, parts[0])
        return Rows(parts[0], parts[1], parts[2] if len(parts) > 2 else None)

    def _stacked(self, drawn: Sequence[Drawn], at: Sequence[int] | None) -> tuple[Tensor, ...]:
        """All members' parts of one step each, or (steps, ...) of all: rows of members lie one below the other."""
        n = self._sizes.n

        def stack(parts: Sequence[Tensor], axis: int, offset: int) -> Tensor:
            chosen = parts if at is None else [part[place] for part, place in zip(parts, at, strict=True)]
            shifted = [part + k * offset if offset else part for k, part in enumerate(chosen)]
            return torch.stack(shifted, axis + (at is None))

        weights = [one.weights for one in drawn if one.weights is not None]
        if self._sizes.products is not None:
            return (stack(weights, 0, 0),)
        found = [stack([one.elements for one in drawn], 1, n), stack([one.products for one in drawn], 1, n)]
        return tuple([*found, stack(weights, 0, 0)] if weights else found)

    # ---------------------------------------------------------------------------------------------------- steps

    def loss(self, state: State, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error over all entries of all outputs."""
        outputs, _ = nets.forward(batch.config, state.params, batch.places, batch.orbit)
        losses = sum(_squares(batch, y, t)[0] for t, y in enumerate(outputs))
        assert isinstance(losses, Tensor)
        return losses, self._carry(state, batch, losses.detach())[1]

    @torch.no_grad()
    def gradients(self, state: State, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """In closed form. Told of the losses is, offline, their mean over the epoch so far."""
        config, params, places, orbit = batch.config, state.params, batch.places, batch.orbit
        outputs, trace = nets.forward(config, params, places, orbit)
        found = [_squares(batch, y, t) for t, y in enumerate(outputs)]
        losses = found[0][0]
        for more, _ in found[1:]:
            losses = losses + more
        learnt = nets.backward(config, params, places, orbit, trace, [d for _, d in found])
        told, carried = self._carry(state, batch, losses)
        return told, {name: learnt.get(name) for name in params}, carried

    @staticmethod
    def _carry(state: State, batch: Batch, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the losses of this epoch so far, and what it is made of."""
        if batch.fresh is None:
            return losses, {}
        total, batches = state.carried["epoch.sum"], state.carried["epoch.batches"]
        if any(batch.fresh):
            # neither this copy nor a plain 0.0 in `where` may make the step wait for the device
            keep = brought(torch.tensor([not fresh for fresh in batch.fresh]), total.device)
            nothing = torch.zeros_like(total)
            total, batches = torch.where(keep, total, nothing), torch.where(keep, batches, nothing)
        total, batches = total + losses, batches + 1
        return total / batches, {"epoch.sum": total, "epoch.batches": batches}

    def optimizer(self, config: GroupsConfig) -> Spec:
        """Adam, descent by the norms of neurons, or, for the hybrid, the one for W_mix and the other for the rest."""
        training = config.training
        adam = Adam(
            lr=float(training.learning_rate or 0.0),
            betas=training.betas or (0.9, 0.999),
            weight_decay=training.weight_decay or 0.0,
            decoupled=False,
            clip=training.grad_clip,
        )
        if training.optimizer == "adam":
            return adam
        axes = nets.neuron_axes(config)
        if training.optimizer == "hybrid":
            exponent = -3.0 if training.scaling_factor is None else training.scaling_factor
            return PerNeuron(float(training.sgd_learning_rate or 0.0), exponent, axes, adam, training.grad_clip)
        return PerNeuron(adam.lr, 2.0 - float(training.degree or 0.0), axes, None, training.grad_clip)

    # ------------------------------------------------------------------------------------------------- measuring

    def evaluate(self, state: State, configs: Sequence[GroupsConfig], split: str) -> list[dict[str, float]]:
        """Loss, and the share of outputs that are nearest to the right element; on held-out tuples where some are."""
        return [self._measure(config, state.params, k, split) for k, config in enumerate(configs)]

    @staticmethod
    def _measure(config: GroupsConfig, params: dict[str, Tensor], k: int, split: str) -> dict[str, float]:
        alone = {name: p[k : k + 1] for name, p in params.items()}
        device = next(iter(alone.values())).device
        elements, orbits = tuples.measured(config, split), Orbits([config])
        batch = Batch(config, rows_of(config, elements), orbits).to(device)
        outputs, _ = nets.forward(config, alone, batch.places, batch.orbit)
        losses = [_squares(batch, y, t)[0] for t, y in enumerate(outputs)]
        right = [_are_nearest(batch, y, t) for t, y in enumerate(outputs)]
        return {
            f"{split}_loss": float(torch.stack(losses).sum()),
            f"{split}_accuracy": float(torch.stack(right).float().mean()),
        }

    def is_enough(self, config: GroupsConfig, curve: Curve) -> bool:
        """Whether the loss is down to the threshold, or by the share, that the config names."""
        training = config.training
        if training.loss_threshold is None and training.reduction_threshold is None:
            return False
        loss = next((value for name, _, value in reversed(curve) if name == "loss"), None)
        if loss is None:
            return False
        if training.loss_threshold is not None and loss <= training.loss_threshold:
            return True
        most = training.reduction_threshold
        return most is not None and 1 - loss / initial_loss(config) >= most

    def summary(self, config: GroupsConfig, curve: Curve) -> dict[str, Any]:
        """The last value of each metric, and what is known without training."""
        template = templates.draw(config)
        known = {
            "zero_loss": theory.levels(config.data, template)[0],
            "initial_loss": initial_loss(config),
            "parameters": nets.parameter_count(config),
        }
        return super().summary(config, curve) | known


def predictions(config: GroupsConfig, params: dict[str, Tensor], elements: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What one member's net outputs for tuples (V, k), and what it should: (V, outputs, n) each.

    params: (1, ...), as in a checkpoint or a snapshot. `tuples.measured(config, "val")` gives tuples.
    """
    batch = Batch(config, rows_of(config, elements), Orbits([config]))
    with torch.no_grad():
        outputs, _ = nets.forward(config, params, batch.places, batch.orbit)
    targets = [batch.places.target(batch.orbit, t)[0] for t in range(len(outputs))]
    return torch.stack([y[0] for y in outputs], 1).numpy(), torch.stack(targets, 1).numpy()


@lru_cache(maxsize=64)
def initial_loss(config: GroupsConfig) -> float:
    """The loss of the untrained net on the tuples for validation."""
    family = Groups()
    with torch.no_grad():
        [found] = family.evaluate(family.init([config]), [config], "val")
    return found["val_loss"]


def _squares(batch: Batch, y: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """What output t adds to the losses, (K,), and the gradient of y, (K, P, n)."""
    n = y.shape[-1]
    outputs = batch.config.data.k - 1 if batch.config.model.return_all_outputs else 1
    error = y - batch.places.target(batch.orbit, t)
    weight = batch.places.weight(t)
    share = 1 / (n * outputs)
    if weight is None:
        share /= y.shape[1]
        return error.square().sum((1, 2)) * share, error * (2 * share)
    weighed = error * weight
    return (error * weighed).sum((1, 2)) * share, weighed * (2 * share)


def _are_nearest(batch: Batch, y: Tensor, t: int) -> Tensor:
    """Whether no element of the orbit is nearer to an output than the right one: (K, P). All have one norm."""
    scores = torch.bmm(y, batch.orbit.transpose(1, 2))
    right = batch.places.target(batch.orbit, t)
    best = (y * right).sum(-1)
    return best >= scores.amax(-1) - 1e-6 * right.square().sum(-1)
