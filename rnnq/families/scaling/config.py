"""What an LSTM language model is trained with. Reaches no torch.

The fields go by the names that hansgundlach/Experimental_Progress gives them; what its program never read, or what a
worker decides here, is in `ignored`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rnnq import tokens
from rnnq.config import Config, Metric
from rnnq.families.scaling import counts, text

EVALUATIONS = 20  # of a run whose csv_log_interval is left out

_WORKER = "the worker decides it"
_STREAMS = "training reads contiguous streams, whose windows do not overlap"


def _whole(value: Any) -> Any:
    """A whole number that was written as 258e6."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole)]


class ScalingConfig(Config):
    """Width of the embedding and of each layer's state are both `hidden_size`."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("val_loss", "nats/token", primary=True),
        Metric("loss", "nats/token"),  # of training: the mean over a step's tokens, with dropout
        Metric("val_loss_per_byte", "nats/byte"),  # equal for all kinds of tokens: what may be compared between them
        Metric("val_ppl", ""),  # exp(val_loss)
        Metric("test_loss", "nats/token"),
        Metric("test_loss_per_byte", "nats/byte"),
        Metric("test_ppl", ""),
        Metric("tokens", "tokens"),  # that training has read
        Metric("flops", "FLOP"),  # of training, read-out included; see counts.py
        Metric("flops_lstm", "FLOP"),  # without the read-out
        Metric("parameters", ""),
        Metric("steps_per_s", "steps/s", "max"),
    )
    best_metric: ClassVar[str | None] = "val_loss"
    aliases: ClassVar[Mapping[str, str]] = {
        "lr": "learning_rate",
        "hidden_dim": "hidden_size",
        "n_layers": "num_layers",
    }
    ignored: ClassVar[Mapping[str, str]] = {
        "dropout": "nothing ever read it: input_dropout, hidden_dropout and output_dropout are what drops",
        "amp_opt_level": "nothing ever read it: use_amp is bfloat16",
        "tokenizer_path": "tokens='gpt2' brings its vocabulary along",
        "stride": _STREAMS,
        "device": f"{_WORKER}: rnnq worker --gpu",
        "use_compile": f"{_WORKER}: rnnq worker --compile",
        "results_folder": "results are in the database: rnnq export --layout csv",
        "print_every": f"{_WORKER}; log_every says how often the training loss is a point",
        "wandb_project": "results are in the database",
        "wandb_offline": "results are in the database",
        "num_workers": "batches are cut out of an array, without processes of their own",
        "pin_memory": _WORKER,
        "persistent_workers": "batches are cut out of an array, without processes of their own",
        "prefetch_factor": "batches are cut out of an array, without processes of their own",
    }

    # the text
    data_path: str = Field(default="stdlib", min_length=1)  # a corpus: stdlib, enwik8, or the path of a file
    tokens: str = "gpt2"  # gpt2, bytes, or bpe:N, N tokens learnt from the corpus
    max_characters: Count | None = Field(default=None, ge=1)  # train_split of so many is trained on; none: the corpus
    train_split: float = Field(default=0.8, gt=0, lt=1)  # of the corpus, from its beginning
    val_split: float = Field(default=0.1, gt=0, lt=1)
    test_split: float = Field(default=0.1, gt=0, lt=1)
    fixed_val_tokens: Count = Field(default=500_000, ge=1)  # of val and of test at most, from their beginning

    # the model
    hidden_size: int = Field(default=16, ge=1, le=16384)
    num_layers: int = Field(default=2, ge=1, le=64)
    tie_embeddings: bool = False  # the read-out is the embedding; its bias stays
    input_dropout: float = Field(default=0.2, ge=0, lt=1)  # one mask for all steps of a window, and so below
    hidden_dropout: float = Field(default=0.1, ge=0, lt=1)  # between layers
    output_dropout: float = Field(default=0.2, ge=0, lt=1)
    use_layer_norm: bool = True
    layer_norm_position: Literal["input", "output", "both"] = "output"  # of the embedding; of each layer's output
    use_mup: bool = False
    mup_base_width: int = Field(default=64, ge=1, le=16384)  # where muP is the standard parametrisation
    mup_rule: Literal["correct", "seed"] = "correct"  # seed: as the published study had it, for comparison
    readout_init: Literal["auto", "zero", "random"] = "auto"  # auto: zero under muP where the embedding is not tied

    # the training
    batch_size: int = Field(default=32, ge=1, le=65536)  # streams side by side
    sequence_length: int = Field(default=128, ge=1, le=65536)  # tokens that a micro-batch reads of each stream
    streaming_reset_prob: float = Field(default=0.01, ge=0, le=1)  # that a micro-batch begins with zero states
    tbptt_length: int | None = Field(default=None, ge=1)  # tokens that a gradient goes back; none: sequence_length
    gradient_accumulation_steps: int = Field(default=16, ge=1, le=65536)  # micro-batches in an optimiser step
    num_epochs: int = Field(default=1, ge=1, le=1_000_000)  # how often the text is read, at most
    steps: Count | None = Field(default=None, ge=1, le=1_000_000_000)  # optimiser steps; a budget, as the next two
    max_tokens_training: Count | None = Field(default=None, ge=1)
    token_to_param_ratio: float | None = Field(default=None, gt=0)  # training tokens per parameter
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(default=0.002, gt=0, le=1000)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)  # of adamw and sgd; adam has none
    lr_schedule: Literal["constant", "cosine", "cosine_warmup", "linear_warmup", "inverse_sqrt", "step"] = "cosine"
    warmup_frac: float = Field(default=0.1, ge=0, lt=1)  # of all steps
    min_lr: float = Field(default=0.0, ge=0)  # where cosine and cosine_warmup end
    min_lr_multiplier: float | None = Field(default=None, ge=0, le=1)  # the same as a part of learning_rate
    step_size: int = Field(default=10, ge=1)  # epochs after which `step` multiplies with gamma
    gamma: float = Field(default=0.1, gt=0, le=1)
    use_gradient_clipping: bool = True
    gradient_clip_val: float = Field(default=1.0, gt=0)  # the largest L2 norm of all gradients together
    use_amp: bool = False  # products in bfloat16
    log_every: int = Field(default=10, ge=1)  # optimiser steps
    csv_log_interval: int | None = Field(default=None, ge=1)  # micro-batches between two evaluations; none: 20 of a run

    @model_validator(mode="after")
    def _fits(self) -> ScalingConfig:
        problems = [*self._shape_problems(), *self._budget_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _shape_problems(self) -> list[str]:
        problems = [problem] if (problem := tokens.problem(self.tokens)) else []
        if self.train_split + self.val_split + self.test_split > 1 + 1e-9:
            problems.append("train_split, val_split and test_split are more than the whole text together")
        if self.tbptt_length and self.sequence_length % self.tbptt_length:
            problems.append(
                f"sequence_length={self.sequence_length} is no multiple of tbptt_length={self.tbptt_length}"
            )
        if self.tie_embeddings and self.readout_init == "zero":
            problems.append("tie_embeddings and readout_init='zero': the embedding would be zero, too")
        if self.tie_embeddings and self.use_mup and self.mup_rule == "seed":
            problems.append("mup_rule='seed' has no rule for tie_embeddings")
        return problems

    def _budget_problems(self) -> list[str]:
        budgets = [f for f in ("steps", "max_tokens_training", "token_to_param_ratio") if getattr(self, f) is not None]
        problems = [f"{' and '.join(budgets)} are each a budget; give one"] if len(budgets) > 1 else []
        if self.min_lr_multiplier is None and self.min_lr > self.learning_rate:
            problems.append(f"min_lr={self.min_lr:g} is above learning_rate={self.learning_rate:g}: it would rise")
        return problems

    # ------------------------------------------------------------------------------------------------ reckoned

    def vocab_size(self) -> int:
        """V, the number of different tokens."""
        return tokens.vocab_size(self.tokens)

    def width_multiplier(self) -> float:
        """m of muP: hidden_size / mup_base_width; 1 without muP."""
        return self.hidden_size / self.mup_base_width if self.use_mup else 1.0

    def has_zero_readout(self) -> bool:
        """Whether the read-out's weights begin at zero."""
        is_mup = self.use_mup and self.mup_rule == "correct" and not self.tie_embeddings
        return self.readout_init == "zero" or (self.readout_init == "auto" and is_mup)

    def norms(self) -> tuple[bool, bool]:
        """Whether there is layer norm on the embedding, and on each layer's output."""
        at = self.layer_norm_position
        return self.use_layer_norm and at != "output", self.use_layer_norm and at != "input"

    def tokens_per_step(self) -> int:
        """Tokens that an optimiser step reads."""
        return self.batch_size * self.sequence_length * self.gradient_accumulation_steps

    def steps_total(self) -> int:
        """Optimiser steps of the budget, whole ones, and one at least. Raises DataError as `datasets`."""
        if self.steps is not None:
            return self.steps
        return max(1, self.budget_in_tokens() // self.tokens_per_step())

    def budget_in_tokens(self) -> int:
        """Training tokens that the budget allows; by default as many as num_epochs passes over the text have."""
        if self.steps is not None:
            return self.steps * self.tokens_per_step()
        if self.max_tokens_training is not None:
            return self.max_tokens_training
        if self.token_to_param_ratio is not None:
            return int(self.token_to_param_ratio * counts.parameters(self))
        return self.num_epochs * text.windows(self) * self.batch_size * self.sequence_length

    def evaluation_interval(self) -> int:
        """Optimiser steps between two evaluations."""
        if self.csv_log_interval is None:
            return max(1, self.steps_total() // EVALUATIONS)
        return max(1, round(self.csv_log_interval / self.gradient_accumulation_steps))

    def counted(self, step: int) -> dict[str, float]:
        """Tokens read and FLOPs spent after so many optimiser steps."""
        read = step * self.tokens_per_step()
        return {
            "tokens": float(read),
            "flops": read * counts.flops_per_token(self),
            "flops_lstm": read * counts.flops_per_token(self, readout=False),
        }

    def ends_with_steps(self) -> str | None:
        """A schedule that ends with its steps."""
        if self.lr_schedule in ("constant", "step"):
            return None
        return f"lr_schedule={self.lr_schedule} ends with the steps that it was made for"

    def label(self) -> str:
        """Width, depth, optimiser and rate: "32d L2 sgd lr 0.1 mup"."""
        mup = {True: " mup" if self.mup_rule == "correct" else " mup-seed", False: ""}[self.use_mup]
        return f"{self.hidden_size}d L{self.num_layers} {self.optimizer} lr {self.learning_rate:g}{mup}"

    def datasets(self) -> dict[str, str]:
        """The sha256 of the corpus and of its tokens. Raises DataError where it is too short for the config."""
        return text.check(self)
