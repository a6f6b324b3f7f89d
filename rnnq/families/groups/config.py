"""What a net that composes a sequence of group elements is trained with. Reaches no torch.

The keys are those of a study's YAML files: `data`, `model`, `training`, `analysis`, `device`, `description`. A key that
is left out gets the value that the rest calls for, and the value is recorded; one that plays no part, such as `p1` for
a cyclic group, is recorded as null. So configs that mean the same are the same.

Four seeds: `data.seed` draws the template, `model.seed` the weights, `training.seed` the tuples; the last two are
`seed` where they are null. A sweep's seeds are `seed`: they vary weights and tuples. With `data.vary_template` they
draw the template, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rnnq.config import Config, Metric


class Part(BaseModel):
    """A nested mapping of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class DataConfig(Part):
    """The group, the template, and which tuples are seen."""

    dimension: Literal[1, 2] | None = None  # 1: cn, 2: cnxcn; `group_name` says it, too
    group_name: Literal["cn", "cnxcn", "dihedral", "octahedral", "A5"] | None = None
    group_n: int | None = Field(default=None, ge=2, le=1000)  # the n of D_n, of order 2n; else 3
    p: int | None = Field(default=None, ge=2, le=2500)  # order of a cyclic group; else 10
    p1: int | None = Field(default=None, ge=2, le=512)  # orders of the factors of a product; else 10
    p2: int | None = Field(default=None, ge=2, le=512)
    k: int = Field(default=3, ge=2, le=64)  # elements in a sequence
    batch_size: int = Field(default=1000, ge=1, le=1_000_000)  # tuples
    seed: int = Field(default=0, ge=0, lt=2**63)  # of the template
    vary_template: bool = False  # the template is drawn from the run's `seed` instead
    template_type: Literal["mnist", "fourier", "custom_fourier", "gaussian", "onehot"] | None = None
    mnist_label: int | None = Field(default=None, ge=0, le=9)  # the digit; else 4
    n_freqs: int | None = Field(default=None, ge=1)  # modes of a fourier template; else at most 10
    powers: tuple[float, ...] | None = None  # of a custom_fourier template: one per irreducible representation
    mode: Literal["sampled", "exhaustive"] | None = None  # of offline training; else sampled
    num_samples: int | None = Field(default=None, ge=1, le=10_000_000)  # tuples in a sampled set; else 100,000
    dataset_fraction: float | None = Field(default=None, gt=0, le=1)  # of all tuples, of an exhaustive set; else 1
    held_out: float | None = Field(default=None, ge=0, le=0.9)  # of an exhaustive set, for validation; else 0 or 0.1

    @field_validator("powers")
    @classmethod
    def _are_powers(cls, powers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if powers is not None and (min(powers, default=0.0) < 0 or not any(powers[1:])):
            raise ValueError("powers are at least 0, and one beyond the first (which is the mean) is above it")
        return powers


class ModelConfig(Part):
    """The net."""

    model_type: Literal["QuadraticRNN", "SequentialMLP", "TwoLayerNet"] = "QuadraticRNN"
    hidden_dim: int | None = Field(default=None, ge=1, le=1_000_000)  # neurons; else 36, of a TwoLayerNet 50 n
    init_scale: float = Field(default=0.01, gt=0, le=1000)  # of the initial weights
    return_all_outputs: bool = False  # sequence-to-sequence: an output after 2, 3, ..., k elements
    transform_type: Literal["quadratic", "multiplicative"] | None = None  # of a QuadraticRNN; else quadratic
    nonlinearity: Literal["square", "relu", "linear", "tanh", "gelu"] | None = None  # of a TwoLayerNet; else square
    output_scale: float | None = Field(default=None, gt=0)  # of a TwoLayerNet; else 1
    seed: int | None = Field(default=None, ge=0, lt=2**63)  # of the weights; null: the run's `seed`


class TrainingConfig(Part):
    """How long, and by which steps."""

    mode: Literal["online", "offline"] = "online"
    epochs: int | None = Field(default=None, ge=1, le=1_000_000_000)  # offline; else 200
    num_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)  # online; else 20,000
    optimizer: Literal["auto", "adam", "hybrid", "per_neuron"] = "auto"  # recorded is what auto comes to
    learning_rate: float | None = Field(default=None, gt=0, le=10_000)  # else 1e-3; of per_neuron 1
    sgd_learning_rate: float | None = Field(default=None, gt=0, le=10_000)  # of hybrid's neurons; else 1
    betas: tuple[float, float] | None = None  # of adam, and of hybrid's; else 0.9, 0.999
    weight_decay: float | None = Field(default=None, ge=0)  # L2, of adam; else 0
    scaling_factor: float | None = None  # the exponent of a neuron's norm, of hybrid; else -3
    degree: float | None = None  # of homogeneity, of per_neuron: the exponent is 2 - degree; else the model's
    grad_clip: float | None = Field(default=0.1, gt=0)  # L2 norm of the raw gradient; null: none
    verbose_interval: int = Field(default=10, ge=1)  # steps, or epochs
    save_param_interval: int | None = Field(default=None, ge=1)  # steps, or epochs; null: the first and the last
    reduction_threshold: float | None = Field(default=None, gt=0, le=1)  # ends once 1 - loss / first loss is that
    loss_threshold: float | None = Field(default=None, gt=0)  # ends once the loss is at most that
    log_every: int | None = Field(default=None, ge=1)  # steps; null: verbose_interval, offline an epoch
    eval_every: int | None = Field(default=None, ge=1)  # steps; null: every tenth logged one
    seed: int | None = Field(default=None, ge=0, lt=2**63)  # of the tuples; null: the run's `seed`

    @field_validator("betas")
    @classmethod
    def _are_betas(cls, betas: tuple[float, float] | None) -> tuple[float, float] | None:
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both are from 0 to less than 1")
        return betas


class AnalysisConfig(Part):
    """What figures show; nothing that is trained depends on it."""

    checkpoints: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # places among the snapshots, from 0 to 1

    @field_validator("checkpoints")
    @classmethod
    def _are_places(cls, places: tuple[float, ...]) -> tuple[float, ...]:
        if not places or not all(0 <= place <= 1 for place in places):
            raise ValueError("places are from 0 to 1, and there is one at least")
        return places


class GroupsConfig(Config):
    """Sequential group composition."""

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "MSE", primary=True),  # of the training batch; offline the mean over the epoch
        Metric("val_loss", "MSE"),
        Metric("val_accuracy", "", "max"),  # share of outputs that are nearest to the right element of the orbit
        Metric("test_loss", "MSE"),
        Metric("test_accuracy", "", "max"),
        Metric("zero_loss", "MSE"),  # of a net that outputs 0: the first of the predicted plateaus
        Metric("parameters", ""),
        Metric("steps_per_s", "steps/s", "max"),
    )
    best_metric: ClassVar[str | None] = "val_loss"
    unmarked: ClassVar[tuple[str, ...]] = ("device", "description", "analysis")

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d+)?)$")  # --gpu beats it
    description: str | None = None

    @model_validator(mode="after")
    def _resolve(self) -> GroupsConfig:
        from rnnq.families.groups import resolve

        found = resolve.resolve(self.data, self.model, self.training)
        for name, part in zip(("data", "model", "training"), found, strict=True):
            object.__setattr__(self, name, part)  # frozen for everyone else
        snapshots = self.steps_total() // self._snapshots_every() + 1
        if snapshots > resolve.SNAPSHOTS:
            raise ValueError(
                f"training.save_param_interval={self.training.save_param_interval}: "
                f"{snapshots:,} snapshots are more than {resolve.SNAPSHOTS:,}"
            )
        return self

    # ------------------------------------------------------------------------------------------------ its sizes

    def order(self) -> int:
        """n: the elements of the group, which are the numbers of a template, of an input and of an output."""
        from rnnq.families.groups import resolve

        return resolve.order(self.data)

    def tuples(self) -> int:
        """How many tuples there are: n to the power of k."""
        return int(self.order() ** self.data.k)

    def training_tuples(self) -> int:
        """Offline: in the training set, repeats included. Raises ValueError online, where there is no set."""
        if self.training.mode == "online":
            raise ValueError("online training has no set of tuples")
        if self.data.mode == "sampled":
            return int(self.data.num_samples or 0)
        return self.chosen_tuples() - self.held_out_tuples()

    def chosen_tuples(self) -> int:
        """Of an exhaustive set: those of the fraction, held out or not."""
        return max(2, math.ceil(self.tuples() * (self.data.dataset_fraction or 1.0)))

    def held_out_tuples(self) -> int:
        """Of an exhaustive set: those that are never trained on."""
        share = self.data.held_out or 0.0
        return max(1, int(self.chosen_tuples() * share)) if share else 0

    def steps_an_epoch(self) -> int:
        """Offline: batches in the training set, the last of which may be short. 1 online."""
        if self.training.mode == "online":
            return 1
        return -(-self.training_tuples() // self.data.batch_size)

    def steps_total(self) -> int:
        """Optimiser steps."""
        if self.training.mode == "online":
            return int(self.training.num_steps or 0)
        return int(self.training.epochs or 0) * self.steps_an_epoch()

    def samples_seen(self, step: int) -> int:
        """Tuples, repeats included, after so many steps; a short batch counts its own."""
        if self.training.mode == "online":
            return step * self.data.batch_size
        epochs, batches = divmod(step, self.steps_an_epoch())
        return epochs * self.training_tuples() + min(batches * self.data.batch_size, self.training_tuples())

    def sample_space(self) -> int:
        """How many different tuples there are."""
        return self.tuples()

    # ------------------------------------------------------------------------------------- what the loop asks for

    @property
    def log_every(self) -> int:
        """Steps from point to point of the loss: whole epochs offline."""
        if self.training.log_every is not None:
            return self.training.log_every
        return self.training.verbose_interval if self.training.mode == "online" else self.steps_an_epoch()

    @property
    def eval_every(self) -> int:
        """Steps from evaluation to evaluation."""
        return self.training.eval_every or 10 * self.log_every

    def snapshot_steps(self) -> Sequence[int]:
        """Step 0, every `save_param_interval`, and the last."""
        last = self.steps_total()
        return sorted({*range(0, last, self._snapshots_every()), last})

    def _snapshots_every(self) -> int:
        interval = self.training.save_param_interval
        return self.steps_total() if interval is None else interval * self.steps_an_epoch()

    def template_seed(self) -> int:
        """What the template is drawn from."""
        return self.seed if self.data.vary_template else self.data.seed

    def weights_seed(self) -> int:
        """What the initial weights are drawn from."""
        return self.seed if self.model.seed is None else self.model.seed

    def tuples_seed(self) -> int:
        """What the tuples, and their order, are drawn from."""
        return self.seed if self.training.seed is None else self.training.seed

    def datasets(self) -> dict[str, str]:
        """The sha256 of the digits, where the template is one. Raises DataError when they are not installed."""
        if self.data.template_type != "mnist":
            return {}
        from rnnq.families.groups import digits

        return {"mnist_5k": digits.sha256()}

    # --------------------------------------------------------------------------------------------------- its names

    def group(self) -> str:
        """The group by its name and size: C10, C10xC10, D3, octahedral, A5."""
        data = self.data
        names = {"cn": f"C{data.p}", "cnxcn": f"C{data.p1}xC{data.p2}", "dihedral": f"D{data.group_n}"}
        return names.get(str(data.group_name), str(data.group_name))

    def label(self) -> str:
        """Group, length, model and width: "C10 k=3 QuadraticRNN d=64 adam 0.001"."""
        model, training = self.model, self.training
        parts = [self.group(), f"k={self.data.k}", model.model_type, f"d={model.hidden_dim}"]
        parts += ["all outputs"] * model.return_all_outputs
        parts += [] if model.transform_type in (None, "quadratic") else [model.transform_type]
        return " ".join([*parts, str(training.optimizer), f"{training.learning_rate:g}"])

    def pack_key(self) -> str:
        """Equal for configs whose tensors have equal shapes and whose steps are by one rule."""
        data, model, training = self.data, self.model, self.training
        sets = (training.mode, data.mode, self.steps_an_epoch(), self.training_tuples() if data.mode else 0)
        net = (
            model.model_type, model.hidden_dim, model.return_all_outputs, model.transform_type, model.nonlinearity,
            model.output_scale,
        )  # fmt: skip
        shape: tuple[Any, ...] = (self.group(), data.k, data.batch_size, *sets, *net, training.optimizer)
        return "/".join(map(str, shape))
