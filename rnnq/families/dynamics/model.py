"""The gated RNN, one token at a time, K members side by side; no gradient flows through time. A token is a byte, or
whatever the config says.

Source: SLMfun, SystematicRNNExploration. Shapes: K members, B windows, S = state_size, V tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnq import tokens
from rnnq.families import stacked
from rnnq.families.base import Curve, Family, State
from rnnq.families.device import brought
from rnnq.families.dynamics import closed, data
from rnnq.families.dynamics.closed import Trace
from rnnq.families.dynamics.config import DynamicsConfig
from rnnq.tokens import Tokens

Params = dict[str, Tensor]


def shapes(config: DynamicsConfig) -> dict[str, tuple[int, int]]:
    """Every affine map of the net and its (inputs, outputs), in the order in which their weights are drawn."""
    size = config.state_size
    read = size * (config.use_new_state + config.use_old_state + config.use_residual)
    found = {"embed": (config.vocab_size(), size), "head": (size, config.vocab_size())}
    for layer in range(config.n_layers):
        maps = {"state": (2 * size, size), "out": (read, size)}
        if config.use_input_gate:
            maps |= {"input_gate": (2 * size, size), "state_input_gate": (2 * size, size)}
        if config.use_state_gate:
            maps["state_gate"] = (3 * size, size)
        if config.use_forget_gate:
            maps["forget_gate"] = (3 * size, size)
        if config.use_output_gate:
            maps["output_gate"] = (size + read, size)
        found |= {f"{layer}.{name}": shape for name, shape in maps.items()}
    return found


def parameter_count(config: DynamicsConfig) -> int:
    """Weights and biases together."""
    return sum(inputs * outputs + outputs for inputs, outputs in shapes(config).values())


def draw_params(config: DynamicsConfig) -> Params:
    """Weights (inputs, outputs) and biases (1, outputs), each uniform in ±1/sqrt(inputs), from the seed alone."""
    generator = torch.Generator().manual_seed(config.seed)
    params = {}
    for name, (inputs, outputs) in shapes(config).items():
        bound = 1 / math.sqrt(inputs)
        # drawn as (outputs, inputs): the order in which an affine layer of the library draws
        weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        params[f"{name}.weight"] = weight.t().contiguous()
        params[f"{name}.bias"] = torch.empty(1, outputs).uniform_(-bound, bound, generator=generator)
    return params


@functools.lru_cache(maxsize=64)
def _offsets(members: int, size: int, device: torch.device) -> Tensor:
    """Where each member's embedding begins when all lie one below the other: (K, 1)."""
    return size * torch.arange(members, device=device)[:, None]


def embed(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """The embedded tokens and the rows that hold them: (K, B) -> (K, B, S), (K, B)."""
    weight = params["embed.weight"]
    rows = x + _offsets(*weight.shape[:2], x.device)
    return F.embedding(rows, weight.view(-1, weight.shape[-1])) + params["embed.bias"], rows


def affine(params: Params, name: str, x: Tensor) -> Tensor:
    """x · W + b for each member: (K, B, inputs) -> (K, B, outputs)."""
    return stacked.baddbmm(params[f"{name}.bias"], x, params[f"{name}.weight"])


def layer_step(config: DynamicsConfig, params: Params, layer: int, x: Tensor, h: Tensor) -> Trace:
    """One layer, one token further.

    x        (K, B, S)    the layer's input
    h        (K, B, S)    its state, detached: no gradient flows through time
    returns  all that was computed; `y` is the output and `new` the new state, which is still attached

    The state gate mixes with the raw old state, not with the one that the read gate let through; the forget gate
    scales the new state, after the state gate; the residual is the raw input, concatenated.
    """

    def lin(name: str, inputs: Tensor) -> Tensor:
        return affine(params, f"{layer}.{name}", inputs)

    read = both = torch.cat((x, h), -1)
    old, gates = h, None
    if config.use_input_gate:
        gates = torch.sigmoid(torch.cat((lin("input_gate", both), lin("state_input_gate", both)), -1))
        read = gates * both
        old = read[..., config.state_size :]
    new = candidate = torch.tanh(lin("state", read))
    with_candidate = state_gate = with_mixed = forget_gate = with_out = output_gate = None
    if config.use_state_gate:
        with_candidate = torch.cat((read, candidate), -1)
        state_gate = torch.sigmoid(lin("state_gate", with_candidate))
        new = torch.lerp(h, candidate, state_gate)
    mixed = new
    if config.use_forget_gate:
        with_mixed = torch.cat((read, mixed), -1)
        forget_gate = torch.sigmoid(lin("forget_gate", with_mixed))
        new = forget_gate * mixed

    parts = [new] * config.use_new_state + [old] * config.use_old_state + [x] * config.use_residual
    z = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    out = lin("out", z)
    if config.use_output_gate:
        with_out = torch.cat((out, z), -1)
        output_gate = torch.sigmoid(lin("output_gate", with_out))
        y = out * output_gate
    else:
        y = F.silu(out)
    return Trace(
        x, h, both, gates, read, candidate, with_candidate, state_gate, mixed, with_mixed, forget_gate, new,
        z, out, with_out, output_gate, y,
    )  # fmt: skip


def forward(
    config: DynamicsConfig, params: Params, x: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Trace]]:
    """One token through the whole net: logits (K, B, V), the embedding's rows that were read, what each layer did."""
    hidden, rows = embed(params, x)
    traces = []
    for layer, h in enumerate(states):
        traces.append(layer_step(config, params, layer, hidden, h))
        hidden = traces[-1].y
    return affine(params, "head", hidden), rows, traces


def step(config: DynamicsConfig, params: Params, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One token through the whole net: (K, B) ids, a state per layer -> logits (K, B, V), new states, detached."""
    logits, _, traces = forward(config, params, x, states)
    return logits, [trace.new.detach() for trace in traces]


def member_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each member in nats: (K, B, V), (K, B) -> (K,)."""
    members, batch = y.shape
    losses = F.cross_entropy(logits.reshape(members * batch, -1), y.reshape(-1), reduction="none")
    return stacked.mean(losses.view(members, batch))


def write(
    config: DynamicsConfig, params: Params, prompt: Sequence[int], length: int, temperature: float, seed: int
) -> list[int]:
    """`length` ids after those of a prompt, by one member."""
    device = params["embed.weight"].device
    generator = torch.Generator().manual_seed(seed)
    states: Sequence[Tensor] = [torch.zeros(1, 1, config.state_size, device=device)] * config.n_layers

    def read(token: int) -> Tensor:
        nonlocal states
        logits, states = step(config, params, torch.tensor([[token]], device=device), states)
        return logits[0, 0]

    for token in prompt:
        logits = read(token)
    written = [draw(logits, temperature, generator)]
    while len(written) < length:
        written.append(draw(read(written[-1]), temperature, generator))
    return written


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One index by its logits, (V,); on the CPU, so that a seed means the same everywhere."""
    shifted = logits.cpu().double()
    shifted = shifted - shifted.max()
    if temperature == 0:
        return int(shifted.argmax())
    return int(torch.multinomial(torch.softmax(shifted / temperature, 0), 1, generator=generator))


@dataclass(frozen=True)
class Batch:
    """One place in a window: the token, the one after it, and whether a window begins there."""

    config: DynamicsConfig  # the flags and sizes that all members share
    x: Tensor  # (K, B)
    y: Tensor  # (K, B)
    fresh: bool | Tensor  # for all members alike, or for each: (K, 1, 1)

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for the copy."""
        fresh = brought(self.fresh, device) if isinstance(self.fresh, Tensor) else self.fresh
        return Batch(self.config, brought(self.x, device), brought(self.y, device), fresh)


def _losses_one_by_one(config: DynamicsConfig, params: Params, windows: Tensor) -> Tensor:
    """The mean loss of each member where every state is zeroed before each token: (T, B) -> (K,)."""
    members, batch = len(params["embed.weight"]), windows.shape[1]
    zero = [params["embed.weight"].new_zeros(members, batch, config.state_size)] * config.n_layers
    total = torch.zeros(members, dtype=torch.float64, device=windows.device)
    for x, y in itertools.pairwise(windows):
        logits, _ = step(config, params, x.expand(members, -1), zero)
        total += member_losses(logits, y.expand(members, -1))
    return total / (len(windows) - 1)


class Dynamics(Family):
    """Gated RNNs on bytes or other tokens without backpropagation through time: one update per place in a window."""

    Config = DynamicsConfig
    name: ClassVar[str] = "dynamics"
    smoothing: ClassVar[tuple[float, float] | None] = (0.95, 3.0)
    loss_bound: ClassVar[float] = 1e3

    def __init__(self) -> None:
        self._held: list[tuple[DynamicsConfig, int]] = []  # whose windows, and which of theirs, are in _windows
        self._windows = torch.empty(0)  # (window, K, B)
        self._found: dict[tuple[str, str], Tokens] = {}  # by corpus and kind

    def init(self, configs: Sequence[DynamicsConfig]) -> State:
        """Parameters of each member from its own seed; states are zero."""
        drawn = [draw_params(config) for config in configs]
        params = {name: torch.stack([member[name] for member in drawn]) for name in drawn[0]}
        first = configs[0]
        zero = torch.zeros(len(configs), first.batch_size, first.state_size)
        return State(params, {f"state.{layer}": zero.clone() for layer in range(first.n_layers)})

    def batch(self, configs: Sequence[DynamicsConfig], steps: Sequence[int]) -> Batch:
        """Token j and token j + 1 of each window, where step = window index · (window - 1) + j."""
        places = [divmod(at, config.window - 1) for config, at in zip(configs, steps, strict=True)]
        self._hold(configs, [index for index, _ in places])
        positions = [position for _, position in places]
        if min(positions) == max(positions):
            x, y = self._windows[positions[0]], self._windows[positions[0] + 1]
        else:
            at, members = torch.tensor(positions), torch.arange(len(configs))
            x, y = self._windows[at, members], self._windows[at + 1, members]
        fresh = [position == 0 for position in positions]
        alike = all(fresh) or not any(fresh)
        return Batch(configs[0], x, y, fresh[0] if alike else torch.tensor(fresh)[:, None, None])

    def _hold(self, configs: Sequence[DynamicsConfig], indices: Sequence[int]) -> None:
        """Each member's window of that index, read only where it is another one than before."""
        held = self._held
        same = len(held) == len(configs) and all(h[0] is config for h, config in zip(held, configs, strict=True))
        stale = [k for k, index in enumerate(indices) if not same or held[k][1] != index]
        if not stale:
            return
        read = [self._read(configs[k], indices[k]) for k in stale]
        if len(stale) == len(configs):  # a new tensor: the old one may still be in use
            self._windows = torch.stack(read, 1)
        else:
            self._windows[:, stale] = torch.stack(read, 1)
        self._held = list(zip(configs, indices, strict=True))

    def _read(self, config: DynamicsConfig, index: int) -> Tensor:
        return data.training_windows(self._tokens(config), config, index)

    def _tokens(self, config: DynamicsConfig) -> Tokens:
        """Loaded once: a file that somebody rewrites or deletes must not change under a run."""
        key = config.corpus, config.tokens
        if key not in self._found:
            self._found[key] = tokens.load(*key)
        return self._found[key]

    def loss(self, state: State, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses before the update, and the states after this token."""
        states = self._states(state.carried, batch.fresh)
        logits, new_states = step(batch.config, state.params, batch.x, states)
        carried = {f"state.{layer}": new for layer, new in enumerate(new_states)}
        return member_losses(logits, batch.y), carried

    @torch.no_grad()
    def gradients(self, state: State, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
        """In closed form: the same as autograd's up to rounding, and quicker: most where steps are small."""
        config, params = batch.config, state.params
        logits, rows, traces = forward(config, params, batch.x, self._states(state.carried, batch.fresh))
        found: Params = {}
        losses, d = closed.head(params, traces[-1].y, logits, batch.y, found)
        way: Tensor | None = d
        for layer in reversed(range(config.n_layers)):
            if way is not None:
                way = closed.Layer(config, params, layer, traces[layer], found).back(way)
        if way is not None:
            closed.embedding(rows, way, params["embed.weight"].shape, found)
        carried = {f"state.{layer}": trace.new for layer, trace in enumerate(traces)}
        return losses, {name: found.get(name) for name in params}, carried

    @staticmethod
    def _states(carried: dict[str, Tensor], fresh: bool | Tensor) -> list[Tensor]:
        states = [carried[f"state.{layer}"] for layer in range(len(carried))]
        if isinstance(fresh, Tensor):
            # not torch.where: it would bring its zero to a GPU, and wait until it is there
            return [h.masked_fill(fresh, 0.0) for h in states]
        return [torch.zeros_like(h) for h in states] if fresh else states

    def evaluate(self, state: State, configs: Sequence[DynamicsConfig], split: str) -> list[dict[str, float]]:
        """Held-out loss from zero states with frozen weights; for val also with every state zeroed at each token.

        `bpb` is in bits per byte of the text, whatever the tokens; so is `loss_per_byte`, in nats.
        """
        config = configs[0]
        device = state.params["embed.weight"].device
        windows = data.held_out_windows(self._tokens(config), config.window, split).to(device)
        size = data.bytes_per_token(self._tokens(config), config.window, split)
        losses = self._held_out_losses(config, state.params, windows).tolist()
        found = [{f"{split}_loss": loss, f"{split}_bpb": loss / size / math.log(2)} for loss in losses]
        if config.tokens != "bytes":
            for metrics, loss in zip(found, losses, strict=True):
                metrics[f"{split}_loss_per_byte"] = loss / size
        if split == "val":
            for metrics, loss in zip(found, self._no_state_losses(config, state.params, windows).tolist(), strict=True):
                metrics["val_loss_no_state"] = loss
        return found

    @staticmethod
    def _held_out_losses(config: DynamicsConfig, params: Params, windows: Tensor) -> Tensor:
        members, batch = params["embed.weight"].shape[0], windows.shape[1]
        states = [params["embed.weight"].new_zeros(members, batch, config.state_size)] * config.n_layers
        total = torch.zeros(members, dtype=torch.float64, device=windows.device)
        for x, y in itertools.pairwise(windows):
            logits, states = step(config, params, x.expand(members, -1), states)
            total += member_losses(logits, y.expand(members, -1))
        return total / (len(windows) - 1)

    @staticmethod
    def _no_state_losses(config: DynamicsConfig, params: Params, windows: Tensor) -> Tensor:
        """With zero states the prediction depends on one token alone: a table of V rows holds all, if V is small."""
        members, size = params["embed.weight"].shape[:2]
        if size > data.SMALL:
            return _losses_one_by_one(config, params, windows)
        every = torch.arange(size, device=windows.device).expand(members, -1)
        zero = [params["embed.weight"].new_zeros(members, size, config.state_size)] * config.n_layers
        logits, _ = step(config, params, every, zero)
        table = torch.log_softmax(logits.double(), -1)  # (K, before, after)
        return -stacked.mean(table[:, windows[:-1], windows[1:]])

    def sample(
        self,
        state: State,
        configs: Sequence[DynamicsConfig],
        prompts: Sequence[str],
        length: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[bytes | str]:
        """One token at a time from a zero state, which is carried through the prompt and what is written after it.

        An empty prompt begins after a newline.
        """
        found: list[bytes | str] = []
        for k, (config, prompt, seed) in enumerate(zip(configs, prompts, seeds, strict=True)):
            params = {name: p[k : k + 1] for name, p in state.params.items()}
            known = tokens.vocabulary(config.corpus, config.tokens)
            content = prompt.encode("utf-8", "surrogateescape") or b"\n"
            ids = content if known is None else known.encode(content).tolist()
            written = write(config, params, ids, length, temperature, seed)
            found.append(bytes(written) if known is None else known.decode(written))
        return found

    def summary(self, config: DynamicsConfig, curve: Curve) -> dict[str, Any]:
        """`loss` is the lowest logged average from step 50 on: it starts at 3.0, which weighs on the first points."""
        found = super().summary(config, curve)
        losses = [value for name, at, value in curve if name == "loss" and at >= 50 and math.isfinite(value)]
        unigram, bigram = data.table_losses(self._tokens(config), config.window)
        found |= {"unigram_loss": unigram, "bigram_loss": bigram, "parameters": parameter_count(config)}
        return found | ({"loss": min(losses)} if losses else {})
