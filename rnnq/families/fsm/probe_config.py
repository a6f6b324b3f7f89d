"""What a linear probe reads, of which net, and what it is to say. Reaches no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rnnq.config import Metric, check
from rnnq.errors import DataError, InputError
from rnnq.families.fsm.config import BASELINES, Config, Machines

LAYERS = 8  # of which the accuracies are declared as metrics; deeper ones are measured, too
_SIZES = ("n_train", "n_val", "n_test")

_SCORES: tuple[tuple[str, str, Literal["min", "max"]], ...] = (
    ("loss", "nats/answer", "min"),  # of the probe of the top layer, as all that names no layer
    ("acc", "", "max"),  # answers that are right
    ("control_acc", "", "max"),  # of the same probe of the control
    ("selectivity", "", "max"),  # acc - control_acc
    ("seen_acc", "", "max"),  # of a table: acc on cells that the demonstrations show
    ("ceiling", "", "max"),  # acc of the solver that knows the shown demonstrations alone
    ("floor", "", "max"),  # acc of the best shortcut, or of always saying what is most frequent
)


def places(n_layers: int, cells: bool) -> list[str]:
    """What of a net a probe can read: "embed" before all layers, "h1" the first one's hidden state, "c1" its cell."""
    return ["embed", *(f"{kind}{n}" for kind in ("hc" if cells else "h") for n in range(1, n_layers + 1))]


def _metrics() -> tuple[Metric, ...]:
    every = [Metric("loss", "nats/answer")]
    for split in ("val", "test"):
        every += [Metric(f"{split}_{name}", unit, better, (split, name) == ("val", "loss"))
                  for name, unit, better in _SCORES]  # fmt: skip
        every += [Metric(f"{split}_{name}_{place}", "", "max") for name in ("acc", "control_acc")
                  for place in places(LAYERS, cells=True)]  # fmt: skip
    return (*every, Metric("best_step", "steps"), Metric("parameters", ""), Metric("steps_per_s", "steps/s", "max"))


class ProbeConfig(Machines):
    """A linear probe on the frozen states of a run of `fsm`, whose data and model these fields repeat.

    It learns on samples of the split val, of machines that the net never learnt from, and is measured on those of
    test: the first half of them is its own val, the second its own test.
    """

    metrics: ClassVar[tuple[Metric, ...]] = _metrics()
    best_metric: ClassVar[str | None] = "val_loss"
    starts_from: ClassVar[str | None] = "fsm"

    model: Literal["lstm", "rnn", "rnn_seed", "gru", "transformer"] = "lstm"
    d_model: int = Field(default=256, ge=1, le=8192)
    n_layers: int = Field(default=2, ge=1, le=64)
    n_heads: int = Field(default=4, ge=1, le=256)
    d_ff: int = Field(default=512, ge=1, le=65536)
    activation: Literal["tanh", "relu"] = "tanh"

    target: Literal[
        "next_state",  # after each action of the query: what the net itself was taught, so its head anew
        "current_state",  # after each state of the query: the token just read
        "table",  # at the token that announces the query: the next state of every state and action, each a head
    ] = "next_state"
    layers: Literal["all", "top"] = "all"  # a probe for each layer, for each cell of an LSTM, and for the embedding
    control: Literal[
        "random_weights",  # the same probes on the net as it was before it learnt
        "shuffled_labels",  # the same probes, taught answers of other places
    ] = "random_weights"
    lr: float = Field(default=1e-3, gt=0, le=10)  # of AdamW
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    batch_size: int = Field(default=8, ge=1, le=65536)  # samples
    epochs: int = Field(default=20, ge=1, le=1_000_000)  # passes over the samples of val
    steps: int | None = Field(default=None, ge=1, le=1_000_000_000)  # optimiser steps in place of epochs
    log_every: int = Field(default=50, ge=1)  # steps
    eval_every: int | None = Field(default=None, ge=1)  # steps; none: at the end of each epoch

    @model_validator(mode="after")
    def _can_be_probed(self) -> ProbeConfig:
        problems = []
        if self.n_test < 2:
            problems.append("n_test=1: a probe needs a sample for its own val and one for its test")
        if self.target == "table" and self.permute_tokens:
            problems.append("target=table: under permute_tokens a cell of the table has no place of its own")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def classes(self) -> int:
        """How many answers there are."""
        return 8 if self.permute_tokens else self.states

    def heads(self) -> int:
        """Answers that a probe gives at each place."""
        return self.states * self.actions if self.target == "table" else 1

    def places(self) -> list[str]:
        """What is read, each by a probe of its own."""
        return places(self.n_layers, self.model == "lstm") if self.layers == "all" else [self.top()]

    def top(self) -> str:
        """What the metrics that name no layer are of: what the net's own head reads."""
        return f"h{self.n_layers}"

    def parameters(self) -> int:
        """Of one probe: weights and biases."""
        return (self.d_model + 1) * self.heads() * self.classes()

    def steps_per_epoch(self) -> int:
        """Batches that all samples make; the last one may be smaller."""
        return -(-self.n_val // self.batch_size)

    def steps_total(self) -> int:
        """Optimiser steps."""
        return self.steps if self.steps is not None else self.epochs * self.steps_per_epoch()

    def evaluation_interval(self) -> int:
        """Steps between two evaluations: an epoch by default."""
        return self.eval_every or self.steps_per_epoch()

    def label(self) -> str:
        """ "probe next_state, lstm d64 L2 5s5a 80/80"."""
        control = ", shuffled" if self.control == "shuffled_labels" else ""
        return f"probe {self.target}{control}, {self.model} d{self.d_model} L{self.n_layers} {self.data_name()}"

    def datasets(self) -> dict[str, str]:
        """As of the net. Raises DataError also when no machine is left that the net did not learn from."""
        found = super().datasets()
        self.own_samples("test")
        return found

    def own_samples(self, name: str) -> tuple[str, NDArray[np.int64]]:
        """Which samples of which split of the data are the probe's own "train", "val" or "test".

        train: all of val. val and test: the halves of test, without machines that are, but for the names of their
        states, in train or val, of which data_split=disjoint has none. Raises DataError when nothing is left.
        """
        from rnnq.families.fsm import data, machines

        if name == "train":
            return "val", np.arange(self.n_val)
        rows = np.arange(self.n_test)
        if self.data_split == "stream":
            splits = data.load(self)
            kinds = [machines.kinds(splits[split].tables, self.permute_tokens) for split in data.SPLITS]
            rows = rows[~np.isin(kinds[2], np.concatenate(kinds[:2]))]
        if len(rows) < 2:
            raise DataError(
                f"a probe on {self.data_name()}: of {self.n_test:,} machines of test, {len(rows)} are neither in train "
                "nor in val",
                "data_split=disjoint, of the net, too; or machines of more states and actions",
            )
        half = len(rows) // 2
        return "test", rows[:half] if name == "val" else rows[half:]

    def backbone(self, seed: int) -> Config:
        """The net whose states are read, without dropout."""
        fields = {name: getattr(self, name) for name in Machines.model_fields} | {"seed": seed, "max_seq_len": None}
        return Config(**fields, **{name: getattr(self, name) for name in self._shape()}, dropout=0.0, steps=1)

    def _shape(self) -> list[str]:
        """The fields that decide what the net is."""
        own = {"transformer": ["n_heads", "d_ff"], "rnn": ["activation"], "rnn_seed": ["activation"]}
        return ["model", "d_model", "n_layers", *own.get(self.model, [])]

    def misfits(self, family: str, values: Mapping[str, Any]) -> list[str]:
        """In what the net of a run is another one than this config names: a sentence for each field."""
        if family != "fsm":
            return [f"its family is {family}, and a probe reads a net of fsm"]
        config, problems = check(Config, values)
        if not isinstance(config, Config):
            return [f"its config is none of fsm: {problem}" for problem in problems]
        if config.model in BASELINES:
            return [f"a {config.model} has no states"]
        mine, theirs = self.content(), config.content()
        free = _SIZES if self.data_split == "disjoint" else ()  # there the machines of a split do not depend on them
        differing = [(name, mine[name], theirs[name]) for name in mine if name not in free]
        differing += [(name, getattr(self, name), getattr(config, name)) for name in self._shape()]
        return [f"{name} is {here!r} here and {there!r} there" for name, here, there in differing if here != there]

    def refuse_other_net(self, run: int, family: str, values: Mapping[str, Any]) -> None:
        """Raise InputError, with every field in which the net of a run differs from the one that this config names."""
        wrong = self.misfits(family, values)
        if wrong:
            hint = "a probe repeats the data and the model of the run that it starts from: one dict as base= of both"
            raise InputError(f"run {run} is no net for this probe: {', '.join(wrong)}", hint)
