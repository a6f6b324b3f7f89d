"""Families by name: built in, installed by a package (entry point group `rnnq.families`), or in a definition file.

`find_config` reaches no torch for a built-in family; `find` loads the code that trains.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from rnnq.config import Config
from rnnq.errors import InputError, nearest
from rnnq.families.base import Family, Generator
from rnnq.sweep import Definition

# name -> (config, family): the same two names that an entry point gives by its object and its Config
BUILTIN = {
    "dynamics": ("rnnq.families.dynamics.config:DynamicsConfig", "rnnq.families.dynamics.model:Dynamics"),
}


def find_config(name: str) -> type[Config]:
    """The config class of a built-in or installed family. Raises InputError for a name that nobody has."""
    if name in BUILTIN:
        return _load(BUILTIN[name][0])  # type: ignore[no-any-return]
    return config_of(_entry_point(name))


def find(name: str, definition: Definition | None = None) -> Family | Generator:
    """A family, ready to train: from the definition file when one is given, else by name."""
    if definition is not None:
        return as_family(_in_definition(name, definition))
    if name in BUILTIN:
        return as_family(_load(BUILTIN[name][1]))
    return as_family(_entry_point(name))


def name_of(found: Any) -> str:
    """The name that a family of a definition file is stored under."""
    return str(getattr(found, "name", None) or getattr(found, "__name__", type(found).__name__))


def config_of(found: Any) -> type[Config]:
    """The config class of a family object. Raises InputError when it has none."""
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise InputError(
            f"{found!r} is no family: its Config is {config!r}", "decorate a generator with @rnnq.family(MyConfig)"
        )
    return config


def as_family(found: Any) -> Family | Generator:
    """An instance that the loop can train, of whichever level."""
    made = found() if isinstance(found, type) else found
    if isinstance(made, (Family, Generator)):
        return made
    raise InputError(f"{found!r} is no family", "subclass rnnq.Family, or decorate a generator with @rnnq.family")


def _in_definition(name: str, definition: Definition) -> Any:
    for stage in definition.stages:
        if not isinstance(stage.family, str) and name_of(stage.family) == name:
            return stage.family
    raise InputError(f"{definition.path} has no family {name}", "did its name change since `rnnq init`?")


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _entry_point(name: str) -> Any:
    points = {point.name: point for point in metadata.entry_points(group="rnnq.families")}
    if name not in points:
        raise InputError(f"there is no family {name!r}", nearest(name, [*BUILTIN, *points]))
    return points[name].load()
