"""What a gated RNN on bytes, or on other tokens, is trained with. Reaches no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field, model_validator

from rnnq import data, tokens
from rnnq.config import Config, Metric
from rnnq.errors import DataError

FLAGS = (
    "use_input_gate",
    "use_forget_gate",
    "use_output_gate",
    "use_state_gate",
    "use_new_state",
    "use_old_state",
    "use_residual",
)
LETTERS = "IFOSNLR"  # one for each flag, as the study's tables write them

HELD_OUT = 0.05  # val and test each get this part of the corpus' bytes, at its end; train gets what is before


class DynamicsConfig(Config):
    """Width of the embedding, of each layer and of each state are all `state_size`."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "nats/byte", primary=True),  # lowest logged average of the training loss
        Metric("val_loss", "nats/byte"),
        Metric("val_bpb", "bits/byte"),
        Metric("val_loss_no_state", "nats/byte"),  # every state zeroed before each byte
        Metric("test_loss", "nats/byte"),
        Metric("test_bpb", "bits/byte"),
        Metric("unigram_loss", "nats/byte"),  # of a table counted on train, on the bytes of val
        Metric("bigram_loss", "nats/byte"),
        Metric("parameters", ""),
        Metric("steps_per_s", "steps/s", "max"),
    )
    best_metric: ClassVar[str | None] = "val_loss"

    use_input_gate: bool = False  # gates the input and the read of the old state
    use_forget_gate: bool = False  # scales the whole new state
    use_output_gate: bool = False  # a learned gate on the layer's output, in place of SiLU
    use_state_gate: bool = False  # mixes the candidate with the raw old state
    use_new_state: bool = True  # the output reads the state of this step
    use_old_state: bool = False  # the output reads the state of the step before
    use_residual: bool = True  # the output reads the layer's input
    n_layers: int = Field(default=1, ge=1, le=64)
    state_size: int = Field(default=256, ge=1, le=16384)

    lr: float = Field(default=1e-3, gt=0, le=10)  # of Adam
    batch_size: int = Field(default=256, ge=1, le=65536)  # windows side by side
    window: int = Field(default=1000, ge=2, le=1_000_000)  # tokens; states are zeroed at its start
    steps: int = Field(default=10_000, ge=1, le=1_000_000_000)  # optimiser steps, one for each place in a window
    log_every: int = Field(default=50, ge=1)  # steps
    eval_every: int = Field(default=1000, ge=1)  # steps
    corpus: str = Field(default="stdlib", min_length=1)  # stdlib, enwik8, or the path of a file
    tokens: str = "bytes"  # bytes, gpt2, or bpe:N, N tokens learnt from the corpus

    @model_validator(mode="after")
    def _fits(self) -> DynamicsConfig:
        problems = [problem] if (problem := tokens.problem(self.tokens)) else []
        if not (self.use_new_state or self.use_old_state):
            problems.append("use_new_state and use_old_state are both off: the output would read neither state")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def vocab_size(self) -> int:
        """V, the number of different tokens."""
        return tokens.vocab_size(self.tokens)

    def measured(self) -> tuple[Metric, ...]:
        """Of tokens that are not bytes, nats per token, and nats per byte beside them."""
        return self.metrics if self.tokens == "bytes" else _OF_TOKENS

    def flags(self) -> str:
        """The seven flags as letters, a dot for one that is off: ".F.SN.R"."""
        return "".join(c if getattr(self, flag) else "." for c, flag in zip(LETTERS, FLAGS, strict=True))

    def label(self) -> str:
        """Flags, depth and width: ".F.SN.R L2 S256"; then the tokens, unless they are bytes."""
        return f"{self.flags()} L{self.n_layers} S{self.state_size}{self._unless_bytes(' ')}"

    def pack_key(self) -> str:
        """Equal for configs whose tensors have equal shapes and whose data have one source."""
        shape = (self.flags(), self.n_layers, self.state_size, self.batch_size, self.window, self.corpus)
        return "/".join(map(str, shape)) + self._unless_bytes("/")

    def _unless_bytes(self, sign: str) -> str:
        return "" if self.tokens == "bytes" else sign + self.tokens

    def datasets(self) -> dict[str, str]:
        """The sha256 of the corpus, and of its tokens. Raises DataError when a part of it is shorter than a window."""
        corpus = data.load(self.corpus)
        if self.tokens != "bytes":
            return {self.corpus: corpus.sha256, f"{self.corpus} as {self.tokens}": self._sha256_of_tokens()}
        held_out = int(len(corpus.bytes) * HELD_OUT)
        if held_out < self.window:
            need = int(self.window / HELD_OUT) + 1
            raise DataError(
                f"corpus={self.corpus}: {len(corpus.bytes):,} bytes are too few for window={self.window}: "
                f"val and test have {held_out:,} each",
                f"a corpus of at least {need:,} bytes, or a shorter window",
            )
        return {self.corpus: corpus.sha256}

    def _sha256_of_tokens(self) -> str:
        found = tokens.load(self.corpus, self.tokens)
        held_out = [last - first for first, last in (bounds(found, split) for split in ("val", "test"))]
        if min(held_out) < self.window:
            raise DataError(
                f"corpus={self.corpus}: {len(found.ids):,} tokens ({self.tokens}) are too few for "
                f"window={self.window}: val and test have {held_out[0]:,} and {held_out[1]:,}",
                "a longer corpus, or a shorter window",
            )
        return found.sha256


_IN_TOKENS = tuple(
    replace(one, unit="nats/token") if one.unit == "nats/byte" else one for one in DynamicsConfig.metrics
)
_OF_TOKENS = (*_IN_TOKENS, Metric("val_loss_per_byte", "nats/byte"), Metric("test_loss_per_byte", "nats/byte"))


def bounds(found: tokens.Tokens, split: str) -> tuple[int, int]:
    """The tokens of train, val or test, from first to before last: of the first 90, the next 5, the last 5 per cent of
    the bytes, whatever the tokens. One that a border cuts is in none."""
    size = len(found.corpus.bytes)
    held_out = int(size * HELD_OUT)
    start = size - 2 * held_out
    places = {"train": (0, start), "val": (start, start + held_out), "test": (start + held_out, size)}
    first, last = places[split]
    return found.tokens_from(first), found.tokens_in(last)
