"""Families by name: built in, installed by a package (entry point group `rnnq.families`), or in a definition file.

`find_config` reaches no torch for a built-in family; `find` loads the code that trains.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType
from typing import Any

from rnnq.config import Config
from rnnq.definitions import Definition
from rnnq.errors import InputError, nearest
from rnnq.families.base import Family, Generator

# name -> (config, family): the same two names that an entry point gives by its object and its Config
BUILTIN = {
    "dynamics": ("rnnq.families.dynamics.config:DynamicsConfig", "rnnq.families.dynamics.model:Dynamics"),
    "fsm": ("rnnq.families.fsm.config:Config", "rnnq.families.fsm.model:Automata"),
    "fsm_probe": ("rnnq.families.fsm.probe_config:ProbeConfig", "rnnq.families.fsm.probe:Probe"),
    "groups": ("rnnq.families.groups.config:GroupsConfig", "rnnq.families.groups.model:Groups"),
    "scaling": ("rnnq.families.scaling.config:ScalingConfig", "rnnq.families.scaling.model:Scaling"),
}

# name -> the module that draws what only this family has: draw(runs, curves, save), see examine.py
FIGURES = {
    "dynamics": "rnnq.families.dynamics.figures",
    "fsm": "rnnq.families.fsm.figures",
    "fsm_probe": "rnnq.families.fsm.probe_figures",
    "groups": "rnnq.families.groups.figures",
    "scaling": "rnnq.families.scaling.figures",
}

# name -> what a run's CSV has beside its losses: Config, STEP, COLUMNS, micro_batches, cells; see sheets.py
SHEETS = {"scaling": "rnnq.families.scaling.columns"}


def find_config(name: str, definition: Definition | None = None) -> type[Config]:
    """A family's config class, from the definition file when one is given. Raises InputError for an unknown name."""
    if definition is not None:
        return config_of(_in_definition(name, definition))
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


def find_figures(name: str) -> ModuleType | None:
    """What draws a built-in family's own figures, without torch; None for a family that has none."""
    return importlib.import_module(FIGURES[name]) if name in FIGURES else None


def find_columns(name: str) -> ModuleType | None:
    """What a built-in family counts for a run's CSV, without torch; None for a family that counts nothing."""
    return importlib.import_module(SHEETS[name]) if name in SHEETS else None


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
    made = found() if isinstance(found, type) and issubclass(found, Family) else found
    if isinstance(made, Family) and hasattr(made, "build"):
        single: Family = _load("rnnq.families.single:Single")(made)  # an ordinary module: the second level
        return single
    if isinstance(made, (Family, Generator)):
        return made
    raise InputError(f"{found!r} is no family", "subclass rnnq.Family, or decorate a generator with @rnnq.family")


def _in_definition(name: str, definition: Definition) -> Any:
    for family in definition.families():
        if name_of(family) == name:
            return family
    raise InputError(f"{definition.path} has no family {name}", "did its name change since `rnnq init`?")


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _entry_point(name: str) -> Any:
    points = {point.name: point for point in metadata.entry_points(group="rnnq.families")}
    if name not in points:
        raise InputError(f"there is no family {name!r}", nearest(name, [*BUILTIN, *points]))
    point = points[name]
    try:
        return point.load()
    except Exception as error:  # whatever a module of somebody else's can raise when it is imported
        package = point.dist.name if point.dist else "an unknown package"
        raise InputError(
            f"the family {name!r} of {package} ({point.value}) cannot be loaded: {type(error).__name__}: {error}",
            f"mend or reinstall {package}",
        ) from error
