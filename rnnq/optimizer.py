"""The optimiser of a pack: every member has its own learning rate, step count, clip and schedule.

Fused calls on views of the stacked parameters: one for each row of members that stand side by side, have one rate and
are as many steps old, as the seeds of a config do. What a member is given does not depend on who is beside it, and
rows of members that have ended are left out at no cost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rnnq.families.base import Adam

VECTOR = 16  # floats of the widest registers: the numbers of a row beyond whole ones go another way


class FusedAdam:
    """Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019) where a spec decays its weights.

    params: {name: (K, ...)}, contiguous; specs: one a member. A parameter whose gradient is absent is left alone.
    """

    def __init__(self, params: Mapping[str, Tensor], specs: Sequence[Adam]) -> None:
        self.names = list(params)
        self.specs = list(specs)
        self.first = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.second = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        device = next(iter(params.values())).device
        self.steps = torch.zeros(len(specs), dtype=torch.float32, device=device)
        self._taken = [0] * len(specs)  # the same on the host
        self._bind(params)

    def _bind(self, params: Mapping[str, Tensor]) -> None:
        self.params = {name: p.detach() for name, p in params.items()}
        # rows of whole vectors may be walked through in one call and keep their bits; others only one by one
        self._whole = [p[0].numel() % VECTOR == 0 for p in self.params.values()]
        kinds = {spec: number for number, spec in enumerate(dict.fromkeys(self.specs))}
        self._kinds = [kinds[spec] for spec in self.specs]
        # making views costs more than the call
        self._views: dict[tuple[int, int, tuple[int, ...]], tuple[list[Tensor], ...]] = {}
        clips = [math.inf if spec.clip is None else spec.clip for spec in self.specs]
        self._clips = torch.tensor(clips, device=self.steps.device) if min(clips) < math.inf else None

    @torch.no_grad()
    def update(
        self, gradients: Sequence[Tensor | None], rows: Iterable[int] | None = None, done: Sequence[int] | None = None
    ) -> None:
        """One step of the members `rows`, or of all.

        gradients: one per parameter, (K, ...), or None where there is none; done: how many steps each member has
        taken, for its schedule.
        """
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        # the gradient of a transposed use is transposed, that of a plain sum is one number seen many times
        given = [g.contiguous() for g in gradients if g is not None]
        if self._clips is not None:
            given = clipped(given, self._clips)
        chosen = range(len(self.specs)) if rows is None else rows
        self.steps += 1
        whole = [j for j, i in enumerate(present) if self._whole[i]]
        rest = [j for j, i in enumerate(present) if not self._whole[i]]
        for first, last, lr in self._neighbours(chosen, done):
            if whole:
                self._call(first, last, lr, tuple(present[j] for j in whole), [given[j] for j in whole])
            for k in range(first, last) if rest else ():
                self._call(k, k + 1, lr, tuple(present[j] for j in rest), [given[j] for j in rest])
        for k in chosen:
            self._taken[k] += 1

    def _neighbours(self, rows: Iterable[int], done: Sequence[int] | None) -> list[tuple[int, int, float]]:
        """Rows [first, last) that stand side by side with one spec, one rate and as many steps."""
        found: list[tuple[int, int, float]] = []
        before: tuple[int, int, float] | None = None
        for k in rows:
            spec = self.specs[k]
            lr = spec.lr if spec.schedule is None or done is None else spec.lr * spec.schedule(done[k])
            kind = self._kinds[k], self._taken[k], lr
            if found and kind == before and found[-1][1] == k:
                found[-1] = (found[-1][0], k + 1, lr)
            else:
                found.append((k, k + 1, lr))
            before = kind
        return found

    def _call(self, first: int, last: int, lr: float, present: tuple[int, ...], given: list[Tensor]) -> None:
        key = (first, last, present)
        if key not in self._views:
            names = [self.names[i] for i in present]
            trees = (self.params, self.first, self.second)
            views = [[tree[name][first:last] for name in names] for tree in trees]
            self._views[key] = (*views, [self.steps[first]] * len(names))
        params, moments, squares, steps = self._views[key]
        spec = self.specs[first]
        step = torch._fused_adamw_ if spec.weight_decay and spec.decoupled else torch._fused_adam_
        step(
            params,
            given if last - first == len(self.specs) else [g[first:last] for g in given],
            moments,
            squares,
            [],
            steps,
            lr=lr,
            beta1=spec.betas[0],
            beta2=spec.betas[1],
            weight_decay=spec.weight_decay,
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


def clipped(gradients: Sequence[Tensor], most: Tensor) -> list[Tensor]:
    """Each member's gradients, (K, ...), scaled so that their common L2 norm is at most its own bound, (K,).

    The formula is that of torch.nn.utils.clip_grad_norm_. A norm that is not finite scales nothing: the loss of such
    a member says soon enough that it diverged, and infinity times zero would hide where.
    """
    squares = [g.flatten(1).square().sum(1) for g in gradients]
    # one after the other: a sum over an axis adds in another order for one member than for several
    norm = functools.reduce(torch.add, squares).sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    scale = torch.where(torch.isfinite(norm), scale, 1.0)
    return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
