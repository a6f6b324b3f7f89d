"""What a config's keys come to: the value of each that was left out, and null for each that plays no part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rnnq.families.groups.config import DataConfig, ModelConfig, Part, TrainingConfig

P = TypeVar("P", bound="Part")

SNAPSHOTS = 20_000  # of one run, at most
ELEMENTS = 2500  # of a group: its table, and the orbit of a template, have so many squared numbers
LARGEST = 1_000_000  # tuples that an exhaustive set may have
# the templates that there are for a group; of the first a config is that names none
TEMPLATES = {
    "cn": ("mnist", "fourier", "custom_fourier", "gaussian", "onehot"),
    "cnxcn": ("mnist", "fourier", "onehot"),
    "dihedral": ("onehot", "custom_fourier"),
    "octahedral": ("onehot", "custom_fourier"),
    "A5": ("onehot", "custom_fourier"),
}
OPTIMIZERS = {
    "QuadraticRNN": ("adam", "hybrid"),
    "SequentialMLP": ("per_neuron", "adam"),
    "TwoLayerNet": ("adam", "per_neuron"),
}


def resolve(
    data: DataConfig, model: ModelConfig, training: TrainingConfig
) -> tuple[DataConfig, ModelConfig, TrainingConfig]:
    """The three parts with every key at the value that it stands for. Raises ValueError: all that contradicts."""
    data = _group(data)  # what it is about must be known before anything else can be
    problems: list[str] = []

    def attempt(act: Callable[..., P], *parts: Part) -> P:
        try:
            return act(*parts)
        except ValueError as error:
            problems.append(str(error))
            return parts[0]  # type: ignore[return-value]

    if order(data) > ELEMENTS:
        raise ValueError(f"data: a group of {order(data):,} elements is larger than {ELEMENTS:,}")
    data = attempt(_template, data)
    data = attempt(_tuples, data, model, training)
    attempt(_length, data, model)
    model = attempt(_model, model, data)
    training = attempt(_training, training, data, model)
    if problems:
        raise ValueError("; ".join(problems))
    return data, model, training


def order(data: DataConfig) -> int:
    """n, the elements of the group."""
    if data.group_name == "cn":
        return int(data.p or 0)
    if data.group_name == "cnxcn":
        return int(data.p1 or 0) * int(data.p2 or 0)
    return {"dihedral": 2 * int(data.group_n or 0), "octahedral": 24, "A5": 60}[str(data.group_name)]


def irrep_sizes(data: DataConfig) -> tuple[int, ...]:
    """The sizes of the irreducible representations over the reals, in the order of `powers`.

    Of a cyclic group they are the frequencies 0, 1, ..., floor(p / 2), each counted as one.
    """
    if data.group_name == "cn":
        return (1,) * (int(data.p or 0) // 2 + 1)
    if data.group_name == "dihedral":
        n = int(data.group_n or 0)
        return (1, 1, *[2] * ((n - 1) // 2), *[1] * (2 if n % 2 == 0 else 0))
    return {"octahedral": (1, 3, 3, 2, 1), "A5": (1, 3, 5, 3, 4)}[str(data.group_name)]


def frequencies(p1: int, p2: int) -> list[tuple[int, int]]:
    """(row, column) frequencies of a p1 x p2 template, slowest first: one of each conjugate pair, none its own.

    Sorted by squared length, then |row|, then column; where these are equal the positive row frequency is first.
    """

    def signed(u: int) -> int:
        return u if u <= p1 // 2 else u - p1

    def is_own_conjugate(u: int, v: int) -> bool:
        return (2 * u) % p1 == 0 and (2 * v) % p2 == 0

    every = [(u, v) for u in range(p1) for v in range(p2 // 2 + 1) if not is_own_conjugate(u, v)]
    every.sort(key=lambda f: (signed(f[0]) ** 2 + f[1] ** 2, abs(signed(f[0])), f[1]))
    kept: list[tuple[int, int]] = []
    for u, v in every:
        if (2 * v) % p2 or (-u % p1, v) not in kept:  # in these columns u and -u are conjugates
            kept.append((u, v))
    return kept


def _filled(part: P, uses: dict[str, Any], unused: tuple[str, ...] = ()) -> P:
    """The part with these values where it has none, and with none where a key plays no part."""
    found = {name: value for name, value in uses.items() if getattr(part, name) is None}
    return part.model_copy(update={**found, **dict.fromkeys(unused)})


# --------------------------------------------------------------------------------------------------------- data


def _group(data: DataConfig) -> DataConfig:
    """Which group: by its name, else by the dimension, else by which of p and p1, p2 is there."""
    by_dimension = {1: "cn", 2: "cnxcn"}
    name = data.group_name
    if name is None and data.dimension is not None:
        name = by_dimension[data.dimension]  # type: ignore[assignment]
    elif name is None:
        name = "cnxcn" if data.p is None and (data.p1 is not None or data.p2 is not None) else "cn"
    if data.dimension is not None and by_dimension[data.dimension] != name:
        raise ValueError(
            f"data.dimension={data.dimension} is {by_dimension[data.dimension]}, but data.group_name={name}: "
            f"leave one of them out"
        )
    dimension = {"cn": 1, "cnxcn": 2}.get(str(name))
    sizes = {"cn": {"p": 10}, "cnxcn": {"p1": 10, "p2": 10}, "dihedral": {"group_n": 3}}.get(str(name), {})
    unused = tuple(size for size in ("p", "p1", "p2", "group_n") if size not in sizes)
    return _filled(data.model_copy(update={"group_name": name, "dimension": dimension}), sizes, unused)


def _length(data: DataConfig, model: ModelConfig) -> DataConfig:
    if model.model_type == "TwoLayerNet" and data.k != 2:
        raise ValueError(f"data.k={data.k}: a TwoLayerNet composes 2 elements; SequentialMLP takes more")
    return data


def _template(data: DataConfig) -> DataConfig:
    known = TEMPLATES[str(data.group_name)]
    data = _filled(data, {"template_type": known[0]})
    kind = data.template_type
    if kind not in known:
        raise ValueError(
            f"data.template_type={kind}: there is none for the group {data.group_name}, which has {', '.join(known)}"
        )
    own = {"mnist": "mnist_label", "fourier": "n_freqs", "custom_fourier": "powers"}
    uses: dict[str, Any] = {"mnist_label": 4} if kind == "mnist" else {}
    if kind == "fourier":
        uses["n_freqs"] = max(1, min(10, data.p // 4 if data.p else order(data) // 10, _most_frequencies(data)))
    data = _filled(data, uses, tuple(name for other, name in own.items() if other != kind))
    if kind == "fourier" and data.n_freqs is not None and data.n_freqs > _most_frequencies(data):
        raise ValueError(f"data.n_freqs={data.n_freqs}: this group has {_most_frequencies(data)} frequencies")
    if kind == "custom_fourier":
        _check_powers(data)
    return data


def _most_frequencies(data: DataConfig) -> int:
    if data.group_name == "cn":
        return int(data.p or 0) // 2
    return len(frequencies(int(data.p1 or 0), int(data.p2 or 0)))


def _check_powers(data: DataConfig) -> None:
    sizes = irrep_sizes(data)
    found = "missing" if data.powers is None else f"{len(data.powers)} numbers"
    if data.powers is None or len(data.powers) != len(sizes):
        each = "frequency" if data.group_name == "cn" else "irreducible representation"
        raise ValueError(
            f"data.powers: {found}; there are {len(sizes)}, one for each {each} "
            f"(of sizes {', '.join(map(str, sizes[:12]))}{', ...' if len(sizes) > 12 else ''})"
        )


def _tuples(data: DataConfig, model: ModelConfig, training: TrainingConfig) -> DataConfig:
    """Which set of tuples offline training has; online it has none."""
    sets = ("mode", "num_samples", "dataset_fraction", "held_out")
    if training.mode == "online":
        return _filled(data, {}, sets)
    data = _filled(data, {"mode": "sampled"})
    if data.mode == "sampled":
        return _filled(data, {"num_samples": 100_000}, ("dataset_fraction", "held_out"))
    total = order(data) ** data.k
    if total > LARGEST:
        raise ValueError(
            f"data.mode=exhaustive: {order(data)}^{data.k} = {total:,} tuples are more than {LARGEST:,}; use sampled"
        )
    held_out = 0.1 if model.model_type == "TwoLayerNet" else 0.0
    return _filled(data, {"dataset_fraction": 1.0, "held_out": held_out}, ("num_samples",))


# ------------------------------------------------------------------------------------------- model and training


def _model(model: ModelConfig, data: DataConfig) -> ModelConfig:
    kind = model.model_type
    if model.return_all_outputs and kind != "QuadraticRNN":
        raise ValueError(f"model.return_all_outputs: a {kind} has one output; only a QuadraticRNN has one per element")
    uses: dict[str, Any] = {"hidden_dim": 50 * order(data) if kind == "TwoLayerNet" else 36}
    unused = [*["transform_type"] * (kind != "QuadraticRNN")]
    if kind == "QuadraticRNN":
        uses["transform_type"] = "quadratic"
    if kind == "TwoLayerNet":
        uses |= {"nonlinearity": "square", "output_scale": 1.0}
    else:
        unused += ["nonlinearity", "output_scale"]
    return _filled(model, uses, tuple(unused))


def degree(data: DataConfig, model: ModelConfig) -> float | None:
    """The d for which a neuron's parameters times a change its part of the output by a^d; None where there is none."""
    if model.model_type == "SequentialMLP":
        return data.k + 1.0
    if model.model_type == "TwoLayerNet":
        return {"square": 3.0, "relu": 2.0, "linear": 2.0}.get(str(model.nonlinearity))
    return None


def _training(training: TrainingConfig, data: DataConfig, model: ModelConfig) -> TrainingConfig:
    known = OPTIMIZERS[model.model_type]
    name = known[0] if training.optimizer == "auto" else training.optimizer
    if name not in known:
        other = "SequentialMLP or TwoLayerNet" if name == "per_neuron" else "QuadraticRNN"
        raise ValueError(f"training.optimizer={name} is for a {other}; a {model.model_type} has {' and '.join(known)}")
    lengths = {"online": {"num_steps": 20_000}, "offline": {"epochs": 200}}
    unused = ["epochs" if training.mode == "online" else "num_steps"]
    uses: dict[str, Any] = {**lengths[training.mode], "learning_rate": 1.0 if name == "per_neuron" else 1e-3}
    own: dict[str, dict[str, Any]] = {
        "adam": {"betas": (0.9, 0.999), "weight_decay": 0.0},
        "hybrid": {"betas": (0.9, 0.999), "scaling_factor": -3.0, "sgd_learning_rate": 1.0},
        "per_neuron": {"degree": degree(data, model)},
    }
    uses |= own[name]
    if name != "adam" and training.weight_decay:
        raise ValueError(f"training.weight_decay={training.weight_decay}: only adam decays weights, {name} does not")
    if name == "per_neuron" and training.degree is None and uses["degree"] is None:
        raise ValueError(
            f"training.degree is missing: {model.nonlinearity} is not homogeneous, so that per_neuron has none"
        )
    unused += [key for keys in own.values() for key in keys if key not in uses]
    if training.degree is not None and not math.isfinite(training.degree):
        raise ValueError(f"training.degree={training.degree} is not finite")
    return _filled(training.model_copy(update={"optimizer": name}), uses, tuple(unused))
