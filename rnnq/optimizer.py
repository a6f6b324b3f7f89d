"""The optimisers of a pack: every member has its own learning rate, step count, clip and schedule.

Fused calls on views of the stacked parameters: one for each row of members that stand side by side, have one rate and
are as many steps old, as the seeds of a config do. What a member is given does not depend on who is beside it, and
rows of members that have ended are left out at no cost.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from rnnq.errors import InputError, nearest
from rnnq.families.base import SGD, Adam, PerNeuron, Spec

VECTOR = 16  # floats of the widest registers: the numbers of a row beyond whole ones go another way


def of(params: Mapping[str, Tensor], specs: Sequence[Spec]) -> FusedAdam | FusedSGD | NeuronSGD:
    """What updates these parameters. Raises InputError where the members' specs are not of one kind."""
    adam = [spec for spec in specs if isinstance(spec, Adam)]
    descent = [spec for spec in specs if isinstance(spec, SGD)]
    scaled = [spec for spec in specs if isinstance(spec, PerNeuron)]
    if len(adam) == len(specs):
        return FusedAdam(params, adam)
    if len(descent) == len(specs):
        return FusedSGD(params, descent)
    if len(scaled) == len(specs):
        return NeuronSGD(params, scaled)
    kinds = sorted({type(spec).__name__ for spec in specs})
    raise InputError(f"a pack has optimisers of one kind, not {' and '.join(kinds)}", "pack_key is to tell them apart")


Rated = TypeVar("Rated", Adam, SGD)


@dataclass(frozen=True)
class _Part:
    """Parameters that one rate and one weight decay hold for."""

    lr: float  # what a row's rate is multiplied with
    decay: float
    whole: tuple[int, ...]  # their numbers, and those whose rows are not whole vectors
    odd: tuple[int, ...]


class _Fused(Generic[Rated]):
    """What the fused optimisers share: which parameters of which rows one call takes.

    params: {name: (K, ...)}, contiguous; specs: one a member. A parameter whose gradient is absent is left alone.
    Raises InputError where a spec has groups, and a parameter is in none of them or in two.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Sequence[Rated]) -> None:
        self.names = list(params)
        self.specs: list[Rated] = list(specs)
        self._bind(params)

    def _bind(self, params: Mapping[str, Tensor]) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        # rows of whole vectors may be walked through in one call and keep their bits; others only one by one
        self._whole = [p[0].numel() % VECTOR == 0 for p in self.params.values()]
        kinds = {spec: number for number, spec in enumerate(dict.fromkeys(self.specs))}
        self._kinds = [kinds[spec] for spec in self.specs]
        self._rates = [rates(spec, self.names) for spec in kinds]
        self._parts: dict[tuple[int, tuple[int, ...]], list[_Part]] = {}
        # making views costs more than the call
        self._views: dict[tuple[int, int, tuple[int, ...]], tuple[list[Tensor], ...]] = {}
        clips = [math.inf if spec.clip is None else spec.clip for spec in self.specs]
        device = next(iter(self.params.values())).device
        self._clips = torch.tensor(clips, device=device) if min(clips) < math.inf else None

    @torch.no_grad()
    def update(
        self, gradients: Sequence[Tensor | None], rows: Iterable[int] | None = None, done: Sequence[int] | None = None
    ) -> None:
        """One step of the members `rows`, or of all.

        gradients: one per parameter, (K, ...), or None where there is none; done: how many steps each member has
        taken, for its schedule.
        """
        present = tuple(i for i, gradient in enumerate(gradients) if gradient is not None)
        # the gradient of a transposed use is transposed, that of a plain sum is one number seen many times
        contiguous = [g.contiguous() for g in gradients if g is not None]
        if self._clips is not None:
            contiguous = clipped(contiguous, self._clips)
        given = dict(zip(present, contiguous, strict=True))
        chosen = range(len(self.specs)) if rows is None else rows
        self._count(chosen)
        for first, last, lr in self._neighbours(chosen, done):
            for part in self._parts_of(first, present):
                if part.whole:
                    self._call(first, last, part, part.whole, lr * part.lr, given)
                for k in range(first, last) if part.odd else ():
                    self._call(k, k + 1, part, part.odd, lr * part.lr, given)

    def _count(self, rows: Iterable[int]) -> None:
        """The members `rows` are a step older."""

    def _age(self, k: int) -> int:
        """What members have to share for one call besides their spec and their rate."""
        return 0

    def _parts_of(self, k: int, present: tuple[int, ...]) -> list[_Part]:
        """Those of the parameters `present` that member k updates in one call, with their rate and decay."""
        key = self._kinds[k], present
        if key not in self._parts:
            found: dict[tuple[float, float], list[int]] = {}
            for i in present:
                found.setdefault(self._rates[key[0]][i], []).append(i)
            whole = [[i for i in own if self._whole[i]] for own in found.values()]
            odd = [[i for i in own if not self._whole[i]] for own in found.values()]
            self._parts[key] = [_Part(*rate, tuple(w), tuple(o)) for rate, w, o in zip(found, whole, odd, strict=True)]
        return self._parts[key]

    def _neighbours(self, rows: Iterable[int], done: Sequence[int] | None) -> list[tuple[int, int, float]]:
        """Rows [first, last) that stand side by side with one spec, one rate and as many steps."""
        found: list[tuple[int, int, float]] = []
        before: tuple[int, int, float] | None = None
        for k in rows:
            spec = self.specs[k]
            lr = spec.lr if spec.schedule is None or done is None else spec.lr * spec.schedule(done[k])
            kind = self._kinds[k], self._age(k), lr
            if found and kind == before and found[-1][1] == k:
                found[-1] = (found[-1][0], k + 1, lr)
            else:
                found.append((k, k + 1, lr))
            before = kind
        return found

    def _call(
        self, first: int, last: int, part: _Part, chosen: tuple[int, ...], lr: float, given: Mapping[int, Tensor]
    ) -> None:
        key = (first, last, chosen)
        if key not in self._views:
            self._views[key] = self._view(first, last, [self.names[i] for i in chosen])
        all_rows = last - first == len(self.specs)
        gradients = [given[i] if all_rows else given[i][first:last] for i in chosen]
        self._step(self.specs[first], lr, part.decay, gradients, *self._views[key])

    def _view(self, first: int, last: int, names: Sequence[str]) -> tuple[list[Tensor], ...]:
        """Rows [first, last) of the parameters `names` and of what is kept of them."""
        raise NotImplementedError

    def _step(self, spec: Rated, lr: float, decay: float, gradients: list[Tensor], *views: list[Tensor]) -> None:
        """The call itself."""
        raise NotImplementedError


def rates(spec: Adam | SGD, names: Sequence[str]) -> list[tuple[float, float]]:
    """Of each parameter what its rate is multiplied with, and its weight decay.

    Raises InputError where the spec has groups, and a parameter is in none of them or in two, or unknown.
    """
    if not spec.groups:
        return [(1.0, spec.weight_decay)] * len(names)
    found = Counter(name for group in spec.groups for name in group.names)
    problems = [f"the parameter {name} is in no group" for name in names if name not in found]
    problems += [f"the parameter {name} is in groups {n} times" for name, n in found.items() if n > 1]
    unknown = [name for name in found if name not in {*names}]
    problems += [f"a group names {name!r}, and no parameter is called so" for name in unknown]
    if problems:
        hint = nearest(unknown[0], names) if unknown else "each parameter is in exactly one group of the optimiser"
        raise InputError(problems, hint)
    own = {name: (group.lr, group.weight_decay) for group in spec.groups for name in group.names}
    return [own[name] for name in names]


class FusedAdam(_Fused[Adam]):
    """Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019) where a spec decays its weights.

    params: {name: (K, ...)}, contiguous; specs: one a member. A parameter whose gradient is absent is left alone.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Sequence[Adam]) -> None:
        self.first = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.second = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        device = next(iter(params.values())).device
        self.steps = torch.zeros(len(specs), dtype=torch.float32, device=device)
        self._taken = [0] * len(specs)  # the same on the host
        super().__init__(params, specs)

    def _count(self, rows: Iterable[int]) -> None:
        self.steps += 1
        for k in rows:
            self._taken[k] += 1

    def _age(self, k: int) -> int:
        return self._taken[k]

    def _view(self, first: int, last: int, names: Sequence[str]) -> tuple[list[Tensor], ...]:
        trees = (self.params, self.first, self.second)
        return (*([tree[name][first:last] for name in names] for tree in trees), [self.steps[first]] * len(names))

    def _step(self, spec: Adam, lr: float, decay: float, gradients: list[Tensor], *views: list[Tensor]) -> None:
        params, moments, squares, steps = views
        step = torch._fused_adamw_ if decay and spec.decoupled else torch._fused_adam_
        step(
            params,
            gradients,
            moments,
            squares,
            [],
            steps,
            lr=lr,
            beta1=spec.betas[0],
            beta2=spec.betas[1],
            weight_decay=decay,
            eps=spec.eps,
            amsgrad=False,
            maximize=False,
        )

    def state(self, k: int) -> dict[str, Tensor]:
        """Moments, (1, ...), and step count, (1,), of a member, on the CPU."""
        moments = {f"first.{n}": t[k : k + 1].to("cpu", copy=True) for n, t in self.first.items()}
        moments |= {f"second.{n}": t[k : k + 1].to("cpu", copy=True) for n, t in self.second.items()}
        return moments | {"steps": self.steps[k : k + 1].to("cpu", copy=True)}

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Member k goes on from a state."""
        for n in self.names:
            self.first[n][k : k + 1].copy_(state[f"first.{n}"])
            self.second[n][k : k + 1].copy_(state[f"second.{n}"])
        self.steps[k : k + 1].copy_(state["steps"])
        self._taken[k] = int(state["steps"])

    def select(self, params: Mapping[str, Tensor], keep: Tensor) -> None:
        """Only the members `keep`, an index on the device, go on; `params` are theirs."""
        kept = keep.tolist()
        self.specs, self._taken = [self.specs[k] for k in kept], [self._taken[k] for k in kept]
        self.first = {n: t.index_select(0, keep) for n, t in self.first.items()}
        self.second = {n: t.index_select(0, keep) for n, t in self.second.items()}
        self.steps = self.steps.index_select(0, keep)
        self._bind(params)


class FusedSGD(_Fused[SGD]):
    """Gradient descent with momentum and weight decay, as torch.optim.SGD has it without dampening.

    params: {name: (K, ...)}, contiguous; specs: one a member. A parameter whose gradient is absent is left alone.
    The buffers begin at zero, so that after the first step one is the gradient, as torch has it.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Sequence[SGD]) -> None:
        kept = params if any(spec.momentum for spec in specs) else {}
        self.buffers = {name: torch.zeros_like(p, requires_grad=False) for name, p in kept.items()}
        super().__init__(params, specs)

    def _view(self, first: int, last: int, names: Sequence[str]) -> tuple[list[Tensor], ...]:
        buffers = [self.buffers[name][first:last] for name in names] if self.specs[first].momentum else []
        return [self.params[name][first:last] for name in names], buffers

    def _step(self, spec: SGD, lr: float, decay: float, gradients: list[Tensor], *views: list[Tensor]) -> None:
        params, buffers = views
        torch._fused_sgd_(
            params,
            gradients,
            buffers,
            weight_decay=decay,
            momentum=spec.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    def state(self, k: int) -> dict[str, Tensor]:
        """Momentum buffers, (1, ...), of a member, on the CPU; nothing without momentum."""
        if not self.specs[k].momentum:
            return {}
        return {f"momentum.{n}": t[k : k + 1].to("cpu", copy=True) for n, t in self.buffers.items()}

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Member k goes on from a state."""
        for n in self.names if self.specs[k].momentum else ():
            self.buffers[n][k : k + 1].copy_(state[f"momentum.{n}"])

    def select(self, params: Mapping[str, Tensor], keep: Tensor) -> None:
        """Only the members `keep`, an index on the device, go on; `params` are theirs."""
        self.specs = [self.specs[k] for k in keep.tolist()]
        self.buffers = {n: t.index_select(0, keep) for n, t in self.buffers.items()}
        self._bind(params)


def clipped(gradients: Sequence[Tensor], most: Tensor) -> list[Tensor]:
    """Each member's gradients, (K, ...), scaled so that their common L2 norm is at most its own bound, (K,).

    The formula is that of torch.nn.utils.clip_grad_norm_. A norm that is not finite scales nothing: the loss of such
    a member says soon enough that it diverged, and infinity times zero would hide where.
    """
    scale = clip_scale(gradients, most)
    return [_times(g, scale) for g in gradients]


def clip_scale(gradients: Sequence[Tensor], most: Tensor) -> Tensor:
    """What each member's gradients, (K, ...), are multiplied with by `clipped`, (K,)."""
    squares = [g.flatten(1).square().sum(1) for g in gradients]
    # one after the other: a sum over an axis adds in another order for one member than for several
    norm = functools.reduce(torch.add, squares).sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    return scale.masked_fill(~torch.isfinite(norm), 1.0)  # torch.where would wait until a GPU has its 1.0


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    return gradient * scale.view(-1, *[1] * (gradient.dim() - 1))


class NeuronSGD:
    """Gradient descent with a rate for each neuron, and Adam for what no neuron owns.

    params: {name: (K, ...)}; specs: one a member, of the same axes. A parameter whose gradient is absent is left alone.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Sequence[PerNeuron]) -> None:
        self.names = list(params)
        self.axes = dict(specs[0].axes)
        unowned = [name for name in self.names if name not in self.axes]
        problems = [f"no parameter is called {name}, whose neurons are named" for name in self.axes.keys() - {*params}]
        if any(dict(spec.axes) != self.axes or (spec.rest is None) is not (not unowned) for spec in specs):
            problems.append(f"{', '.join(unowned) or 'no parameter'} is without neurons: `rest` says how it learns")
        if problems:
            raise InputError(problems)
        rests = [replace(spec.rest, clip=None) for spec in specs if spec.rest is not None]  # clipped with all others
        self.rest = FusedAdam({name: params[name] for name in unowned}, rests) if unowned else None
        self._bind(params, list(specs))

    def _bind(self, params: Mapping[str, Tensor], specs: list[PerNeuron]) -> None:
        self.specs = specs
        self.params = {name: p.detach() for name, p in params.items()}
        device = next(iter(params.values())).device
        self._rates = torch.tensor([spec.lr for spec in specs], dtype=torch.float64, device=device)
        self._halves = torch.tensor([[spec.exponent / 2] for spec in specs], device=device)
        self._eps = torch.tensor([[spec.eps] for spec in specs], device=device)
        clips = [math.inf if spec.clip is None else spec.clip for spec in specs]
        self._clips = torch.tensor(clips, device=device) if min(clips) < math.inf else None

    @torch.no_grad()
    def update(
        self, gradients: Sequence[Tensor | None], rows: Iterable[int] | None = None, done: Sequence[int] | None = None
    ) -> None:
        """One step of the members `rows`, or of all; see `FusedAdam.update`."""
        given = {name: g for name, g in zip(self.names, gradients, strict=True) if g is not None}
        rows = range(len(self.specs)) if rows is None else list(rows)
        rates = self._rates
        if len(rows) < len(self.specs):
            rates = torch.zeros_like(rates).index_copy_(0, torch.tensor(rows, device=rates.device), rates[rows])
        rates = rates.to(next(iter(self.params.values())).dtype)
        scale = None if self._clips is None else clip_scale(list(given.values()), self._clips)
        if self.rest is not None:
            parts = [given.get(name) for name in self.rest.names]
            self.rest.update([p if p is None or scale is None else _times(p, scale) for p in parts], rows, done)
        if scale is not None:
            rates = rates * scale
        step = self._norms().pow(self._halves.to(rates.dtype)).mul_(-rates[:, None])
        for name, axis in self.axes.items():
            if name in given:
                p = self.params[name]
                p.addcmul_(given[name], step.view(len(p), *(-1 if at == axis else 1 for at in range(1, p.dim()))))

    def _norms(self) -> Tensor:
        """The squared norm of each neuron, (K, neurons)."""
        found: Tensor | None = None
        for name, axis in self.axes.items():
            p = self.params[name]
            squares = p.square().sum([at for at in range(1, p.dim()) if at != axis])
            found = squares if found is None else found.add_(squares)
        assert found is not None
        return found.add_(self._eps.to(found.dtype))

    def state(self, k: int) -> dict[str, Tensor]:
        """Moments and step count of a member, as FusedAdam has them; nothing where all parameters have neurons."""
        return {} if self.rest is None else self.rest.state(k)

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Member k goes on from a state."""
        if self.rest is not None:
            self.rest.load(k, state)

    def select(self, params: Mapping[str, Tensor], keep: Tensor) -> None:
        """Only the members `keep`, an index on the device, go on; `params` are theirs."""
        if self.rest is not None:
            self.rest.select({name: params[name] for name in self.rest.names}, keep)
        self._bind(params, [self.specs[k] for k in keep.tolist()])
