"""Which machines a run sees, and what a sequence shows of them. Reaches no torch."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rnnq import config
from rnnq.config import Metric, as_json
from rnnq.errors import DataError

SIZE_LIMIT = 2**31  # steps that all walks of one set of data may have together, and about as many bytes on the disk


class Machines(config.Config):
    """Data of one kind of machine: how many of each split, and how long the walks through them are."""

    states: int = Field(default=5, ge=2, le=8)
    actions: int = Field(default=5, ge=1, le=10)
    absorbing: bool = False  # one state, drawn for each machine, keeps every action to itself
    # demonstrations that a sequence shows, of the `states` that there are
    demos: int = Field(default=3, ge=1, le=8, validate_default=True)
    demo_length: int | None = Field(default=None, ge=1, le=10_000)  # steps; none: int(S A ln(S A))
    query_length: int | None = Field(default=None, ge=1, le=10_000)  # steps; none: the same
    length_variation: float = Field(default=0.2, ge=0, lt=1)  # each length is drawn within this part of it
    data_split: Literal["disjoint", "stream"] = "disjoint"  # stream: as the published study has it; machines recur
    data_seed: int = Field(default=42, ge=0, lt=2**63)  # decides the machines and walks; of the group, unlike `seed`
    n_train: int = Field(default=6000, ge=1, le=1_000_000)  # samples, and so below
    n_val: int = Field(default=2000, ge=1, le=1_000_000)
    n_test: int = Field(default=2000, ge=1, le=1_000_000)
    max_seq_len: int | None = Field(default=None, ge=1)  # tokens; a longer sequence is refused
    permute_tokens: bool = False  # each sample has ids of its own, out of all 8 states and 10 actions

    @field_validator("demos")
    @classmethod
    def _has_so_many_demonstrations(cls, demos: int, info: ValidationInfo) -> int:
        states = info.data.get("states")  # missing when it is wrong itself
        if states is not None and demos > states:
            raise ValueError(f"there is one demonstration for each of the {states} states, and no more")
        return demos

    @model_validator(mode="after")
    def _fits(self) -> Machines:
        problems = [text for text in (self._too_long(), self._too_large()) if text]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _too_long(self) -> str | None:
        least = self.sequence_length(*(self.lengths(base)[0] for base in self.base_lengths()))
        if self.max_seq_len is None or least <= self.max_seq_len:
            return None
        return f"max_seq_len={self.max_seq_len}: by the formula, even the shortest sequence has {least:,} tokens"

    def _too_large(self) -> str | None:
        demo, query = self.base_lengths()
        steps = self.samples() * (self.states * self.lengths(demo)[1] + self.lengths(query)[1])
        if steps <= SIZE_LIMIT:
            return None
        return (
            f"{self.samples():,} samples of {self.states} demonstrations of {demo} steps and a query of {query}: "
            f"up to {steps / 2**30:,.1f} GiB; the limit is {SIZE_LIMIT / 2**30:,.0f} GiB"
        )

    def samples(self) -> int:
        """How many there are, of all splits."""
        return self.n_train + self.n_val + self.n_test

    def base_lengths(self) -> tuple[int, int]:
        """Steps of a demonstration and of a query, before their variation."""
        cells = self.states * self.actions
        automatic = max(1, int(cells * math.log(cells)))
        return self.demo_length or automatic, self.query_length or automatic

    def lengths(self, base: int) -> tuple[int, int]:
        """The smallest and the largest number of steps that the variation makes of a length."""
        low, high = (int(base * (1 + sign * self.length_variation)) for sign in (-1, 1))
        return max(1, low), max(1, high)

    def sequence_length(self, demo: int, query: int) -> int:
        """Tokens of a sequence whose demonstrations have `demo` steps each and whose query has `query`."""
        return self.demos * (2 * demo + 2) + 2 * query + 3

    def longest_possible(self) -> int:
        """Tokens of the longest sequence that the formula allows. Those that are drawn may all be shorter."""
        return self.sequence_length(*(self.lengths(base)[1] for base in self.base_lengths()))

    def content(self) -> dict[str, object]:
        """What decides the data, with the lengths worked out: equal for configs that have the same data."""
        demo, query = self.base_lengths()
        fields = {name: getattr(self, name) for name in Machines.model_fields if name not in config.Config.model_fields}
        del fields["max_seq_len"]  # it changes nothing of the data
        return fields | {"demo_length": demo, "query_length": query}

    def data_name(self) -> str:
        """A name for people: "5s5a 80/80", with what is not as usual behind it."""
        demo, query = self.base_lengths()
        marks = [
            "absorbing" if self.absorbing else "",
            "stream" if self.data_split == "stream" else "",
            "permuted" if self.permute_tokens else "",
        ]
        return " ".join([f"{self.states}s{self.actions}a {demo}/{query}", *filter(None, marks)])

    def datasets(self) -> dict[str, str]:
        """The sha256 of the data, which are made if they are not in the cache.

        Raises DataError when there are too few machines for three splits, when the generator of `stream` cannot go
        on, and when a sequence is longer than max_seq_len.
        """
        from rnnq.families.fsm import data

        made = data.load(self)
        if self.max_seq_len is not None and made.longest > self.max_seq_len:
            raise DataError(
                f"max_seq_len={self.max_seq_len}: the longest sequence of {self.data_name()} has {made.longest:,} "
                f"tokens (of the lengths that occur; the formula allows {self.longest_possible():,})",
                f"max_seq_len={made.longest}, fewer demos, or shorter walks (demo_length, query_length)",
            )
        return {f"fsm:{made.name}": made.sha256}


LEARNERS = ("lstm", "rnn", "rnn_seed", "gru", "transformer")
SHORTCUTS = ("shortcut_u", "shortcut_a", "shortcut_s")
BASELINES = ("solver", *SHORTCUTS)  # they learn nothing: their runs take no steps

_SCORES: tuple[tuple[str, str, Literal["min", "max"]], ...] = (
    ("loss", "nats/token", "min"),  # of what is said with true states before it, mean over all tokens of the split
    ("acc", "", "max"),  # tokens that are right, again with true states before each
    ("seq_acc", "", "max"),  # samples in which all of them are right
    ("open_acc", "", "max"),  # tokens that are right where what was said is fed back in place of the true states
    ("open_seq_acc", "", "max"),  # samples in which all of those are right
    ("outside_acc", "", "max"),  # acc on steps that start outside states which keep every action to themselves
    ("score", "", "max"),  # (acc - shortcut) / (ceiling - shortcut)
)


PARTS = 8  # of a query, for accuracy by position


class Config(Machines):
    """The model and its training. The published study has d_model 256 and 2 layers, or 8 for its deep RNN."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "nats/token"),  # of training: a running mean over batches, with dropout
        *(Metric(f"val_{name}", unit, better, name == "loss") for name, unit, better in _SCORES),
        *(Metric(f"test_{name}", unit, better) for name, unit, better in _SCORES),
        *(Metric(f"test_acc_pos{number}", "", "max") for number in range(PARTS)),  # test_acc by eighths of the query
        Metric("best_step", "steps"),  # of the lowest val_loss: what val_* and test_* of a summary are of
        Metric("val_loss_last", "nats/token"),  # at the last evaluation, and so the next two
        Metric("val_acc_last", "", "max"),
        Metric("val_score_last", "", "max"),
        Metric("val_ceiling", "", "max"),  # acc of the solver that knows the shown demonstrations alone
        Metric("val_shortcut", "", "max"),  # acc of the best of the three shortcuts
        Metric("test_ceiling", "", "max"),
        Metric("test_shortcut", "", "max"),
        Metric("parameters", ""),
        Metric("steps_per_s", "steps/s", "max"),
    )
    best_metric: ClassVar[str | None] = "val_loss"

    model: Literal[
        "lstm",
        "rnn",  # as libraries have it: dropout between layers only
        "rnn_seed",  # as the published study wrote it: dropout on the state that is carried, in all layers but the last
        "gru",
        "transformer",  # causal, normalised before each part, rotary positions
        "solver",  # looks every transition up in the demonstrations
        "shortcut_u",  # next states as often as they came before
        "shortcut_a",  # as often as they came after this action
        "shortcut_s",  # as often as they came after this state
    ] = "lstm"
    head: Literal["all", "states"] = "all"  # classes: all 8 states of the vocabulary, or those that there are
    d_model: int = Field(default=256, ge=1, le=8192)  # width of embedding and of each layer
    n_layers: int = Field(default=2, ge=1, le=64)
    n_heads: int = Field(default=4, ge=1, le=256)  # of the transformer; each has an even share of d_model
    d_ff: int = Field(default=512, ge=1, le=65536)  # inner width of the transformer's second part
    dropout: float = Field(default=0.1, ge=0, lt=1)  # part of the numbers that is dropped
    activation: Literal["tanh", "relu"] = "tanh"  # of the two plain RNNs

    lr: float = Field(default=1e-3, gt=0, le=10)  # of AdamW
    weight_decay: float = Field(default=0.0, ge=0, le=10)  # per step and unit of lr, as AdamW has it
    batch_size: int = Field(default=8, ge=1, le=65536)  # sequences
    clip: float | None = Field(default=1.0, gt=0)  # largest L2 norm of the whole gradient; none: as it is
    epochs: int | None = Field(default=None, ge=1, le=1_000_000)  # passes over the training samples; either these,
    steps: int | None = Field(default=None, ge=1, le=1_000_000_000)  # or optimiser steps
    log_every: int = Field(default=50, ge=1)  # steps
    eval_every: int | None = Field(default=None, ge=1)  # steps; none: at the end of each epoch
    open_samples: int = Field(default=200, ge=0)  # of each split, that are walked through on one's own predictions
    stop_below: float | None = Field(default=None, gt=0)  # nats/token of val_loss; none: no early end
    stop_after: int = Field(default=0, ge=0)  # evaluations since val_loss was below it first, before a run may end

    @model_validator(mode="after")
    def _is_complete(self) -> Config:
        problems = [text for text in (self._of_no_length(), self._without_heads(), self._without_classes()) if text]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _of_no_length(self) -> str | None:
        if self.model in BASELINES or (self.epochs is None) != (self.steps is None):
            return None
        said = "neither epochs nor steps is" if self.epochs is None else "epochs and steps are both"
        return f"{said} given: give one of them"

    def _without_heads(self) -> str | None:
        if self.model != "transformer" or self.d_model % (2 * self.n_heads) == 0:
            return None
        return f"d_model={self.d_model} is no multiple of 2 n_heads={2 * self.n_heads}: each head is turned in pairs"

    def _without_classes(self) -> str | None:
        if self.head == "all" or not self.permute_tokens:
            return None
        return "head=states has no class for most of the tokens that permute_tokens draws: head=all"

    def is_baseline(self) -> bool:
        """Whether there is nothing to learn."""
        return self.model in BASELINES

    def classes(self) -> int:
        """How many next states the model tells apart."""
        return 8 if self.head == "all" else self.states

    def steps_per_epoch(self) -> int:
        """Batches that all training samples make; the last one may be smaller."""
        return -(-self.n_train // self.batch_size)

    def steps_total(self) -> int:
        """Optimiser steps; none of a baseline."""
        if self.is_baseline():
            return 0
        return self.steps if self.steps is not None else (self.epochs or 0) * self.steps_per_epoch()

    def evaluation_interval(self) -> int:
        """Steps between two evaluations: an epoch by default."""
        return self.eval_every or self.steps_per_epoch()

    def label(self) -> str:
        """Model, sizes and data: "lstm d64 L2 5s5a 80/80"."""
        sizes = "" if self.is_baseline() else f" d{self.d_model} L{self.n_layers}"
        return f"{self.model}{sizes} {self.data_name()}"

    def pack_key(self) -> str | None:
        """Equal for plain RNNs of one shape on the same data; the others train alone.

        Of an LSTM the library's own loop over time, for one run, is quicker than a loop for many: docs/fsm.md.
        """
        if self.model not in ("rnn", "rnn_seed"):
            return None
        names = ("model", "head", "d_model", "n_layers", "activation", "batch_size", "open_samples")
        return as_json({"data": self.content(), **{name: getattr(self, name) for name in names}})
