"""The family: LSTM language models that read a text as streams, one run at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rnnq import tokens
from rnnq.errors import InputError
from rnnq.families.base import Curve, Family, Spec, State
from rnnq.families.dynamics.model import draw
from rnnq.families.scaling import counts, nets, parametrization, readout, streams
from rnnq.families.scaling.config import ScalingConfig
from rnnq.families.scaling.streams import Batch, HeldOut, Streams, Window


class Scaling(Family):
    """LSTM language models of several widths, after hansgundlach/Experimental_Progress."""

    Config = ScalingConfig
    name: ClassVar[str] = "scaling"
    training_loss: ClassVar[str | None] = "loss"
    flushes_denormals: ClassVar[bool] = True  # at a rate that shuts gates a step took 10 to 25 times as long
    stacks: ClassVar[bool] = False

    def __init__(self) -> None:
        self._streams: Streams | None = None
        self._held_out: dict[str, tuple[ScalingConfig, HeldOut]] = {}

    def init(self, configs: Sequence[ScalingConfig]) -> State:
        """Parameters from the seed; states are zero."""
        [config] = configs
        drawn = parametrization.draw(config, torch.Generator().manual_seed(config.seed))
        return State({n: p[None] for n, p in drawn.items()}, nets.zero_state(config, config.batch_size))

    def batch(self, configs: Sequence[ScalingConfig], steps: Sequence[int]) -> Batch:
        """All that an optimiser step reads."""
        [config], [step] = configs, steps
        if self._streams is None or self._streams.config is not config:
            self._streams = Streams(config)
        return self._streams.at(step)

    def micro_batches(self, data: Batch) -> Sequence[Window]:
        """Windows that a gradient goes back through; equally long, so that the mean of their losses is that of all."""
        return list(data.windows())

    def loss(self, state: State, data: Window) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of a window in nats a token, (1,), and the states behind it."""
        config, params = data.config, alone(state.params)
        carried = {} if data.fresh else state.carried
        with _products(config, data.tokens.device):
            x, after = nets.features(config, params, data.tokens, carried, data.masks)
            found = readout.mean_loss(*said(config, params, x), data.targets.t().reshape(-1))
        return found[None], after

    def evaluate(self, state: State, configs: Sequence[ScalingConfig], split: str) -> list[dict[str, float]]:
        """Loss a token, loss a byte, and perplexity on a held-out part, without dropout, from zero states."""
        [config] = configs
        held = self._held(config, split)
        total = _held_out_loss(config, alone(state.params), held)
        loss = total / held.count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return [{f"{split}_loss": loss, f"{split}_loss_per_byte": total / held.bytes, f"{split}_ppl": perplexity}]

    def _held(self, config: ScalingConfig, split: str) -> HeldOut:
        if split not in self._held_out or self._held_out[split][0] is not config:
            self._held_out[split] = config, streams.held_out(config, split)
        return self._held_out[split][1]

    def optimizer(self, config: ScalingConfig) -> Spec:
        """As the parametrisation has it."""
        return parametrization.spec(config)

    def sample(
        self,
        state: State,
        configs: Sequence[ScalingConfig],
        prompts: Sequence[str],
        length: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[bytes | str]:
        """One token at a time, from zero states before the prompt; an empty prompt begins after a newline."""
        [config], [prompt], [seed] = configs, prompts, seeds
        known = tokens.vocabulary(config.data_path, config.tokens)
        content = prompt.encode("utf-8", "surrogateescape") or b"\n"
        ids = content if known is None else known.encode(content).tolist()
        written = write(config, alone(state.params), ids, length, temperature, seed)
        return [bytes(written) if known is None else known.decode(written)]

    def summary(self, config: ScalingConfig, curve: Curve) -> dict[str, Any]:
        """Of each metric the last value, and how many numbers are learnt."""
        return super().summary(config, curve) | {"parameters": counts.parameters(config)}

    # --------------------------------------------------------------------------------------- several processes

    def share(self, data: Batch, rank: int, ranks: int) -> Batch:
        """The streams that one process of several reads. Raises InputError where they cannot be parted evenly."""
        streams_read = data.tokens.shape[1]
        if streams_read % ranks:
            raise InputError(
                f"batch_size={streams_read} cannot be parted among {ranks} processes",
                f"a multiple of {ranks}, or a number of processes that divides it",
            )
        return data.share(rank, ranks)

    def carried_share(self, carried: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
        """What is carried of the streams of one process."""
        return {name: t[:, streams.rows(t.shape[1], rank, ranks)].contiguous() for name, t in carried.items()}

    def joined(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What is carried of all streams, from what each process carries."""
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def alone(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the axis of members; views, of which the gradients are, too."""
    return {name: t.view(t.shape[1:]) for name, t in tree.items()}


def said(config: ScalingConfig, params: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What readout.py takes: features as rows, with what multiplies them, matrix, and bias."""
    weight, bias = nets.readout(config, params)
    of_product, of_bias = nets.multipliers(config)
    x = x.flatten(0, 1)
    return x * of_product if of_product != 1 else x, weight, bias * of_bias if of_bias != 1 else bias


def write(
    config: ScalingConfig,
    params: Mapping[str, Tensor],
    prompt: Sequence[int],
    length: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """`length` ids after those of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    device = params["embedding"].device
    carried: dict[str, Tensor] = {}
    written: list[int] = []
    read = list(prompt)
    while len(written) < length:
        x, carried = nets.features(config, params, torch.tensor([read], device=device), carried)
        read = [draw(nets.said(config, params, x[-1, 0]), temperature, generator)]
        written += read
    return written


def _products(config: ScalingConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.use_amp)


@torch.no_grad()
def _held_out_loss(config: ScalingConfig, params: Mapping[str, Tensor], held: HeldOut) -> float:
    """The sum over all tokens, in nats."""
    device = params["embedding"].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    carried: dict[str, Tensor] = {}
    with _products(config, device):
        for read, targets, weights in held.to(device).windows():
            x, carried = nets.features(config, params, read, carried)
            each = readout.losses(*said(config, params, x), targets.t().reshape(-1))
            total += (each.double() * weights.t().reshape(-1)).sum()
    return float(total)
