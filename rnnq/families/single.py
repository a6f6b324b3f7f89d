"""The second level seen as the third: an ordinary torch module as a pack of one, the members axis hidden from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rnnq.families.base import Adam, Curve, Family, State

BUFFER = "buffer."


class Single(Family):
    """Drives a family that has `build`: its module's parameters and buffers, each with a leading axis of one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.Config, self.name = inner.Config, inner.name  # type: ignore[misc]
        self.smoothing, self.loss_bound = inner.smoothing, inner.loss_bound  # type: ignore[misc]
        self.module = nn.Module()  # until init has built the run's own

    def init(self, configs: Sequence[Any]) -> State:
        """Build the module under the run's seed."""
        [config] = configs
        torch.manual_seed(config.seed)
        self.module = self.inner.build(config)
        self.module.train()
        params = {name: p.detach().clone()[None] for name, p in self.module.named_parameters() if p.requires_grad}
        carried = {BUFFER + name: b.detach().clone()[None] for name, b in self.module.named_buffers()}
        return State(params, carried)

    def batch(self, configs: Sequence[Any], steps: Sequence[int]) -> Any:
        """The data of one step."""
        return self.inner.batch(configs[0], steps[0])

    def loss(self, state: State, data: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The family's loss of its module with these parameters; buffers that it changes are carried on."""
        buffers = {name.removeprefix(BUFFER): c[0].clone() for name, c in state.carried.items()}
        loss = self._call(state, buffers, self.inner.loss, data)
        return loss.reshape(1), {BUFFER + name: b.detach()[None] for name, b in buffers.items()}

    def evaluate(self, state: State, configs: Sequence[Any], split: str) -> list[dict[str, float]]:
        """The family's own evaluation, with the module in eval mode."""
        buffers = {name.removeprefix(BUFFER): c[0].clone() for name, c in state.carried.items()}
        self.module.eval()
        try:
            found: dict[str, float] = self._call(state, buffers, self._evaluate, configs[0], split)
            return [found]
        finally:
            self.module.train()

    def _evaluate(self, module: nn.Module, config: Any, split: str) -> dict[str, float]:
        if type(self.inner).evaluate is Family.evaluate:
            return {}  # it has none of its own
        return dict(self.inner.evaluate(module, config, split))

    def _call(self, state: State, buffers: dict[str, Tensor], method: Any, *rest: Any) -> Any:
        tensors = {name: p[0] for name, p in state.params.items()} | buffers
        held = {f"module.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(_Method(self.module, method), held, rest)

    def optimizer(self, config: Any) -> Adam:
        """The family's own."""
        spec: Adam = self.inner.optimizer(config)
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

    def forward(self, *rest: Any) -> Any:
        return self.method(self.module, *rest)
