"""The second level seen as the third: an ordinary torch module as a pack of one, the members axis hidden from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rnnq.errors import InputError
from rnnq.families.base import Curve, Family, Parent, Spec, State, cannot_sample, cannot_share, taken_over

HELD = "module."  # before a name of the module, in what is carried: its buffers, its frozen parameters


class Single(Family):
    """Drives a family that has `build`: its module's parameters and buffers, each with a leading axis of one."""

    stacks = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.Config = inner.Config  # type: ignore[misc]
        self.name = getattr(inner, "name", type(inner).__name__)  # type: ignore[misc]
        self.smoothing, self.loss_bound = inner.smoothing, inner.loss_bound  # type: ignore[misc]
        self.training_loss, self.tests_best = inner.training_loss, inner.tests_best  # type: ignore[misc]
        self.flushes_denormals = inner.flushes_denormals  # type: ignore[misc]
        self.module = nn.Module()  # until init has built the run's own

    def init(self, configs: Sequence[Any]) -> State:
        """Build the module under the run's seed."""
        [config] = configs
        torch.manual_seed(config.seed)
        self.module = self.inner.build(config)
        self.module.train()
        return self._state()

    def _state(self) -> State:
        """Copies of the module's tensors."""
        params = {name: p.detach().clone()[None] for name, p in self.module.named_parameters() if p.requires_grad}
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        carried = {**dict(self.module.named_buffers()), **frozen}
        return State(params, {HELD + name: c.detach().clone()[None] for name, c in carried.items()})

    def begin(self, config: Any, drawn: State, parent: Parent) -> State:
        """As the family's own says; else parameters, buffers and frozen parameters are all the parent's."""
        if type(self.inner).begin is Family.begin:
            params = taken_over(drawn.params, parent.params, parent.run)
            return State(params, taken_over(drawn.carried, parent.carried, parent.run))
        params = {name: p[0] for name, p in parent.params.items()}
        carried = {name.removeprefix(HELD): c[0] for name, c in parent.carried.items()}
        with torch.no_grad():
            self.inner.begin(self.module, config, replace(parent, params=params, carried=carried))
        return self._state()

    def is_enough(self, config: Any, curve: Curve) -> bool:
        """The family's own."""
        return bool(self.inner.is_enough(config, curve))

    def batch(self, configs: Sequence[Any], steps: Sequence[int]) -> Any:
        """The data of one step."""
        return self.inner.batch(configs[0], steps[0])

    def micro_batches(self, data: Any) -> Sequence[Any]:
        """The family's own."""
        parts: Sequence[Any] = self.inner.micro_batches(data)
        return parts

    def loss(self, state: State, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss of its module with these parameters.

        Buffers and frozen parameters that it changes, in place or by assignment, are carried on.
        """
        loss, held = self._call(state, self.inner.loss, data)
        return loss.reshape(1), {name: held[name].detach()[None] for name in state.carried}

    def share(self, data: Any, rank: int, ranks: int) -> Any:
        """The family's own."""
        if type(self.inner).share is Family.share:
            raise cannot_share(self.name, "share(self, data, rank, ranks)")
        return self.inner.share(data, rank, ranks)

    def carried_share(self, carried: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
        """All of it: buffers and frozen parameters belong to the module, not to rows of the batch."""
        return carried

    def joined(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What each process has. Raises InputError for buffers that came to depend on a process's share."""
        first = parts[0]
        changed = [name for name in first if any(not torch.equal(first[name], part[name]) for part in parts[1:])]
        if changed:
            names = ", ".join(name.removeprefix(HELD) for name in changed)
            raise InputError(
                f"buffers of the family {self.name} depend on the share that a process goes through: {names}",
                "`rnnq worker` without --nproc trains it; or a third-level family with carried_share and joined",
            )
        return first

    def evaluate(self, state: State, configs: Sequence[Any], split: str) -> list[dict[str, float]]:
        """The family's own evaluation, with the module in eval mode."""
        return [self._in_eval_mode(state, self._evaluate, configs[0], split)]

    def sample(
        self,
        state: State,
        configs: Sequence[Any],
        prompts: Sequence[str],
        length: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[bytes | str]:
        """What the family's own writes, with the module in eval mode."""
        if type(self.inner).sample is Family.sample:
            raise cannot_sample(self.name, "sample(self, module, config, prompt, length, temperature, seed)")
        rest = (configs[0], prompts[0], length, temperature, seeds[0])
        return [self._in_eval_mode(state, self.inner.sample, *rest)]

    def _in_eval_mode(self, state: State, method: Any, *rest: Any) -> Any:
        self.module.eval()
        try:
            return self._call(state, method, *rest)[0]
        finally:
            self.module.train()

    def _evaluate(self, module: nn.Module, config: Any, split: str) -> dict[str, float]:
        if type(self.inner).evaluate is Family.evaluate:
            return {}  # it has none of its own
        return dict(self.inner.evaluate(module, config, split))

    def _call(self, state: State, method: Any, *rest: Any) -> tuple[Any, dict[str, Tensor]]:
        """What a method of the family makes of the module with these tensors, and the tensors that it leaves."""
        method_of = _Method(self.module, method)
        held = {HELD + name: p[0] for name, p in state.params.items()}
        held |= {name: c[0].clone() for name, c in state.carried.items()}
        found = functional_call(method_of, held, rest)
        return found, held | method_of.left

    def optimizer(self, config: Any) -> Spec:
        """The family's own."""
        spec: Spec = self.inner.optimizer(config)
        return spec

    def summary(self, config: Any, curve: Curve) -> dict[str, Any]:
        """The family's own."""
        return dict(self.inner.summary(config, curve))


class _Method(nn.Module):
    """Calls a family's method on a module while the module's tensors are replaced."""

    def __init__(self, module: nn.Module, method: Any) -> None:
        super().__init__()
        self.module = module
        self.method = method
        self.left: dict[str, Tensor] = {}

    def forward(self, *rest: Any) -> Any:
        found = self.method(self.module, *rest)
        # a buffer may have been assigned anew, as a stateful net does with its state: what counts is what is there now
        self.left = {HELD + name: b for name, b in self.module.named_buffers()}
        return found
