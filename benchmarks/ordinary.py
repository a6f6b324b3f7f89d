"""The ordinary way: one process per run, a torch module of linear layers, torch's own Adam, one step after the other.

    python benchmarks/ordinary.py WORK SEED STEPS     # one run; prints the seconds of its steps and its last loss

Nothing of rnnq is used here, as this is what packs are measured against. WORK is `name:key=value,...`, such as
`dynamics:batch=32,state=32`.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], Tensor]  # one optimiser step; returns its loss


class Gated(nn.Module):
    """One layer of the family `dynamics`: flags ....N.R, or with `gates` all seven."""

    def __init__(self, state: int, gates: bool) -> None:
        super().__init__()
        self.gates = gates
        read = (3 if gates else 2) * state
        self.embed, self.head = nn.Embedding(256, state), nn.Linear(state, 256)
        self.state, self.out = nn.Linear(2 * state, state), nn.Linear(read, state)
        if gates:
            self.input_gate, self.state_input_gate = nn.Linear(2 * state, state), nn.Linear(2 * state, state)
            self.state_gate, self.forget_gate = nn.Linear(3 * state, state), nn.Linear(3 * state, state)
            self.output_gate = nn.Linear(state + read, state)

    def forward(self, byte: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the new state."""
        x = self.embed(byte)
        if self.gates:
            out, new = self._gated(x, h)
        else:
            new = torch.tanh(self.state(torch.cat((x, h), -1)))
            out = F.silu(self.out(torch.cat((new, x), -1)))
        return self.head(out), new

    def _gated(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((x, h), -1)
        u = torch.sigmoid(self.input_gate(both)) * x
        old = torch.sigmoid(self.state_input_gate(both)) * h
        new = torch.tanh(self.state(torch.cat((u, old), -1)))
        gate = torch.sigmoid(self.state_gate(torch.cat((u, old, new), -1)))
        new = gate * new + (1 - gate) * h
        new = torch.sigmoid(self.forget_gate(torch.cat((u, old, new), -1))) * new
        read = torch.cat((new, old, x), -1)
        out = self.out(read)
        return out * torch.sigmoid(self.output_gate(torch.cat((out, read), -1))), new


class Plain(nn.Module):
    """A language model of tanh layers."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.rnn = nn.RNN(width, width, layers)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B) -> (T, B, vocabulary)."""
        return self.head(self.rnn(self.embed(x))[0])


class Quadratic(nn.Module):
    """h <- (mix · h + drive · x_t)² from h = 0, and a linear map to one number."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.drive, self.mix = nn.Linear(inputs, width, bias=False), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, inputs) -> (B,)."""
        h = x.new_zeros(x.shape[1], self.mix.in_features)
        for part in x:
            h = (self.mix(h) + self.drive(part)).square()
        return self.head(h)[:, 0]


def updates(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A step with torch's own loop of Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def dynamics(seed: int, device: str, batch: int, state: int, gates: int = 0, window: int = 1000) -> Step:
    """One update for each byte position; the state goes on, detached. A window is brought to the device at once."""
    module = Gated(state, bool(gates)).to(device)
    drawn = (window.to(device) for window in windows(batch, window, seed))
    pairs = ((at == 0, text[at], text[at + 1]) for text in drawn for at in range(window - 1))
    h = torch.zeros(batch, state, device=device)

    def loss() -> Tensor:
        nonlocal h
        fresh, x, y = next(pairs)
        logits, h = module(x, torch.zeros_like(h) if fresh else h)
        h = h.detach()
        return F.cross_entropy(logits, y)

    return updates(module, loss)


def windows(batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random pieces of the standard library's source, (length, batch) each."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    corpus = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(corpus) - length, (batch,), generator=generator)
        yield corpus[starts + torch.arange(length)[:, None]]


VOCABULARY, TOKENS = 30, 1 << 16


def tokens(length: int, batch: int) -> Tensor:
    """Every window of a noisy walk over the vocabulary, as a view: (starts, length, batch)."""
    generator = torch.Generator().manual_seed(0)
    stream = (torch.randint(4, (TOKENS,), generator=generator).cumsum(0) % VOCABULARY).contiguous()
    between = (TOKENS - length) // (2 * batch)  # from one sequence of a batch to the next
    return stream.as_strided((TOKENS // 2, length, batch), (1, 1, between))


def plain(seed: int, device: str, batch: int, width: int, length: int, layers: int = 2) -> Step:
    """The next token at each place of a sequence, with backpropagation through time."""
    module = Plain(VOCABULARY, width, layers).to(device)
    drawn = tokens(length + 1, batch)
    at = seed

    def loss() -> Tensor:
        nonlocal at
        at = (at * 5 + 7) % len(drawn)
        text = drawn[at].to(device)
        return F.cross_entropy(module(text[:-1]).view(-1, VOCABULARY), text[1:].reshape(-1))

    return updates(module, loss)


def products(inputs: int, length: int, rows: int) -> tuple[Tensor, Tensor]:
    """Random inputs (rows, length, inputs) and a target that is a product of parts of them."""
    x = torch.randn(rows, length, inputs, generator=torch.Generator().manual_seed(0))
    return x, x[..., :4].mean(-1).prod(-1)


def quadratic(seed: int, device: str, batch: int, inputs: int, width: int, length: int = 3) -> Step:
    """Squared error on batches from a fixed table."""
    module = Quadratic(inputs, width).to(device)
    x, y = products(inputs, length, 8 * batch)
    x = x.view(8, batch, length, inputs).transpose(1, 2).contiguous().to(device)
    y = y.view(8, batch).to(device)
    at = seed

    def loss() -> Tensor:
        nonlocal at
        at = (at + 1) % 8
        return F.mse_loss(module(x[at]), y[at])

    return updates(module, loss)


WORKS: dict[str, Callable[..., Step]] = {"dynamics": dynamics, "plain": plain, "quadratic": quadratic}


def make(work: str, seed: int, device: str = "cpu") -> Step:
    """The step of a work, with fresh weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    name, _, sizes = work.partition(":")
    return WORKS[name](
        seed, device, **{key: int(value) for key, value in (pair.split("=") for pair in sizes.split(","))}
    )


def main() -> None:
    """One run."""
    work, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    step = make(work, seed)
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    print(f"{time.perf_counter() - began:.3f} s, loss {float(loss):.4f}")


if __name__ == "__main__":
    main()
