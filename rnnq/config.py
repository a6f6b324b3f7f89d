"""The base of family configs, and what makes two configs the same.

A config is a frozen pydantic model. It is stored whole as canonical JSON; its *fingerprint* covers only
the fields that differ from their default, so that a new field whose default means "as before" makes no
old run new. Whoever changes a default raises the family's `version`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rnnq.errors import InputError, nearest


@dataclass(frozen=True)
class Metric:
    """A number that a family reports: its name, its unit, and whether low ("min") or high ("max") is good."""

    name: str
    unit: str = ""
    better: Literal["min", "max"] = "min"
    primary: bool = False


class Config(BaseModel):
    """What a run is trained with. Subclasses declare fields with bounds, and what they measure."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    version: ClassVar[int] = 1  # raised when a default, or what a field means, changes
    seed_fields: ClassVar[tuple[str, ...]] = ("seed",)  # what may differ inside a group
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("loss", primary=True),)
    best_metric: ClassVar[str | None] = None  # the evaluated metric whose best step is kept as a checkpoint
    unmarked: ClassVar[tuple[str, ...]] = ()  # fields on which nothing depends that is computed: in no fingerprint

    aliases: ClassVar[Mapping[str, str]] = {}  # what filters may also call a field -> the field
    ignored: ClassVar[Mapping[str, str]] = {}  # keys that a list of experiments may have -> why nothing reads them

    starts_from: ClassVar[str | None] = None  # the family of the runs that its runs start from, where they must

    seed: int = Field(default=0, ge=0, lt=2**63)  # decides initial weights, data order and dropout

    def steps_total(self) -> int | None:
        """Optimiser steps that a run of this config takes; None when only the family's code knows."""
        steps = getattr(self, "steps", None)
        return int(steps) if steps is not None else None

    def evaluation_interval(self) -> int | None:
        """Steps between two evaluations; by default the field `eval_every`. None: only at the end."""
        every = getattr(self, "eval_every", None)
        return int(every) if every is not None else None

    def label(self) -> str:
        """A short name for people: by default the fields that differ from their default."""
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={*self.seed_fields, *self.unmarked})
        return ", ".join(f"{name}={value}" for name, value in fields.items()) or "defaults"

    def measured(self) -> tuple[Metric, ...]:
        """What a run of this config measures, where that depends on its fields: by default `metrics`, each with one
        unit. Names and directions of `metrics` are those of all."""
        return self.metrics

    def pack_key(self) -> str | None:
        """Equal exactly for configs that may train together as one pack; None when they never may."""
        return None

    def snapshot_steps(self) -> Sequence[int]:
        """Steps, ascending, whose weights are kept for figures over training; 0 is before any update."""
        return ()

    def ends_with_steps(self) -> str | None:
        """Why a finished run cannot be trained further, such as a schedule that ends with its steps; None: it can."""
        return None

    def samples_seen(self, step: int) -> int | None:
        """Training samples, repeats included, after so many steps; None where nobody reckons them."""
        return None

    def sample_space(self) -> int | None:
        """How many different samples there are; None where that is no number."""
        return None

    def counted(self, step: int) -> dict[str, float]:
        """What is known after so many steps without measuring; a point of each at every evaluation."""
        return {}

    def misfits(self, family: str, values: Mapping[str, Any]) -> list[str]:
        """Why a run of this config cannot start from one of a family with these values; empty where it can."""
        return []

    def datasets(self) -> dict[str, str]:
        """The sha256 of every corpus that the config reads, by name.

        Raises DataError when one is missing, or too short for the config.
        """
        return {}

    @classmethod
    def primary(cls) -> Metric:
        """The metric that `runs.loss` holds."""
        return next((m for m in cls.metrics if m.primary), cls.metrics[0])


# ---------------------------------------------------------------------------------------------- identity


def as_json(values: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_json(config: Config) -> str:
    """The whole config, defaults included, as canonical JSON."""
    return as_json(config.model_dump(mode="json"))


def _digest(family: str, config: Config, without: tuple[str, ...], start_from: str | None) -> str:
    fields = config.model_dump(mode="json", exclude_defaults=True, exclude={*without, *config.unmarked})
    content = {"family": family, "version": config.version, "config": fields, "start_from": start_from}
    return hashlib.sha256(as_json(content).encode()).hexdigest()


def fingerprint(family: str, config: Config, start_from: str | None = None) -> str:
    """What makes a run the same run: family, its version, the fields that differ from their default."""
    return _digest(family, config, (), start_from)


def group_key(family: str, config: Config, start_from: str | None = None) -> str:
    """The fingerprint without the declared seed fields: equal for repeats of one config."""
    return _digest(family, config, config.seed_fields, start_from)


def start_key(start_from: Mapping[str, Any] | None) -> str | None:
    """What a fingerprint knows of `start_from`: a stage that was renamed since goes by the name that it had."""
    if start_from is None:
        return None
    before = {"stage": start_from["defined_as"]} if "defined_as" in start_from else {}
    return as_json({name: value for name, value in {**start_from, **before}.items() if name != "defined_as"})


# -------------------------------------------------------------------------------------------- validation


def check(model: type[Config], values: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """A config from plain values, or a sentence for each thing that is wrong with them."""
    config, problems = check_places(model, values)
    return config, [sentence for _, sentence in problems]


def check_places(
    model: type[Config], values: Mapping[str, Any]
) -> tuple[Config | None, list[tuple[tuple[object, ...], str]]]:
    """As `check`; before each sentence the keys that lead to what is wrong, none where it is the whole."""
    try:
        return _validated(model, {name: _plain(value) for name, value in values.items()}), []
    except ValidationError as error:
        return None, [(tuple(item["loc"]), _sentence(model, item)) for item in error.errors(include_url=False)]


def parse(model: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from plain values. Raises InputError with everything that is wrong with them."""
    config, problems = check(model, values)
    if config is None:
        raise InputError(problems)
    return config


def known_keys(model: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without those that the config names in `ignored`: what a list of experiments may have besides."""
    return {name: value for name, value in values.items() if name in model.model_fields or name not in model.ignored}


def _validated(model: type[Config], values: Mapping[str, Any]) -> Config:
    """Read as JSON, so that what a database gives back is what went in: there a tuple is a list."""
    try:
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):  # something that JSON has no word for; the model says what it thinks of it
        return model.model_validate(values)
    return model.model_validate_json(text)


def _plain(value: Any) -> Any:
    """Numbers from numpy become Python's own, however deep, so that a grid may come from numpy.linspace."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _sentence(model: type[Config], item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = {*model.model_fields, *field_types(model)}
        alias = model.aliases.get(name) if issubclass(model, Config) else None
        return f"{model.__name__} has no field {name} ({f'it is {alias}' if alias in known else nearest(name, known)})"
    if item["type"] == "missing":
        return f"{name} is missing"
    own = item["type"] == "value_error"  # the words of a validator, after a prefix of pydantic's
    text = item["msg"].removeprefix("Value error, ") if own else item["msg"][:1].lower() + item["msg"][1:]
    if item["type"] == "literal_error":
        text += _did_you_mean(item)
    return f"{name}={item['input']!r}: {text}" if name else text


def _did_you_mean(item: Any) -> str:
    """The nearest of the words that a field may hold, where one is near."""
    hint = nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"; {hint}" if hint.startswith("did") else ""


# ------------------------------------------------------------------------------------ what a stage stores


def field_types(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Fields and their types, nested ones with dots: what the filter language knows.

    A type is bool, int, float, str, or json for what has parts (a list, a tuple, a dict).
    """
    types: dict[str, str] = {}
    for name, field in model.model_fields.items():
        options = _options(field.annotation)
        nested = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if nested is not None:
            types |= field_types(nested, f"{prefix}{name}.")
        else:
            types[prefix + name] = _type_name(options)
    return types


def _options(annotation: Any) -> list[Any]:
    """The types that a value may have: those of a union and of a Literal's values, without None."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _options(args[0])
    if origin in (Union, UnionType):
        return [option for arg in args for option in _options(arg)]
    found = [type(value) for value in args] if origin is Literal else [origin or annotation]
    return [option for option in found if option is not type(None)]


def _type_name(options: Sequence[Any]) -> str:
    """The narrowest of the known types that holds all options."""
    kinds = [option for option in options if isinstance(option, type)]
    if any(issubclass(kind, (list, tuple, dict, set, frozenset)) for kind in kinds):
        return "json"
    for known in (bool, int, float):  # bool is an int here as in Python, and an int fits a float field
        if kinds and all(issubclass(kind, known) or (known is float and issubclass(kind, int)) for kind in kinds):
            return known.__name__
    return "str"


def metric_rows(model: type[Config], configs: Iterable[Config] = ()) -> list[dict[str, Any]]:
    """The metrics of a config class as plain values; with configs, those that runs of these measure."""
    primary = model.primary().name
    kinds = {id(kind): kind for kind in (config.measured() for config in configs)} or {0: model.metrics}
    found: dict[str, dict[str, Any]] = {}
    for metric in (metric for kind in kinds.values() for metric in kind):
        row = found.setdefault(metric.name, asdict(metric) | {"primary": metric.name == primary})
        if metric.unit not in row["unit"].split(" or "):
            row["unit"] += f" or {metric.unit}"
    return list(found.values())
