"""The optimiser of a pack: every member has its own learning rate, step count, clip and schedule.

One fused call per member on row views of the stacked parameters: what a member is given does not depend on who is
beside it, and rows of members that have ended are left out at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rnnq.families.base import Adam


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
        self._bind(params)

    def _bind(self, params: Mapping[str, Tensor]) -> None:
        """The views that each member's call is handed, made once: making them costs more than the call."""
        self.params = {name: p.detach() for name, p in params.items()}
        self._rows = [
            [(self.params[n][k], self.first[n][k], self.second[n][k]) for n in self.names]
            for k in range(len(self.specs))
        ]
        self._steps = [self.steps[k] for k in range(len(self.specs))]
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
        self.steps += 1
        for k in range(len(self.specs)) if rows is None else rows:
            spec, views = self.specs[k], self._rows[k]
            call = torch._fused_adamw_ if spec.weight_decay and spec.decoupled else torch._fused_adam_
            call(
                [views[i][0] for i in present],
                [g[k] for g in given],
                [views[i][1] for i in present],
                [views[i][2] for i in present],
                [],
                [self._steps[k]] * len(present),
                lr=spec.lr if spec.schedule is None or done is None else spec.lr * spec.schedule(done[k]),
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

    def select(self, params: Mapping[str, Tensor], keep: Tensor) -> None:
        """Only the members `keep`, an index on the device, go on; `params` are theirs."""
        self.specs = [self.specs[k] for k in keep.tolist()]
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
    norm = torch.stack(squares).sum(0).sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    scale = torch.where(torch.isfinite(norm), scale, 1.0)
    return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
