"""The YAML form of a study: a base config, and experiments or a grid that override parts of it.

    base_config: configs/base.yaml          # or the config itself
    n_seeds: 3                              # seeds 0, 1, 2 of each experiment
    global_overrides: {training.optimizer: adam}
    experiments:
      - {name: hidden_32, overrides: {model: {hidden_dim: 32}}}

An override is merged into what is before it, mapping by mapping; anything else, a list too, replaces what was there. A
key with dots is nested. Everything remembers the file and the line that it was written on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from rnnq.definitions.yaml import Node, bytes_of, read
from rnnq.errors import InputError, nearest
from rnnq.sweep import Stage, configs, stage

KEYS = {
    "name": str,
    "family": str,
    "base_config": (str, dict),
    "n_seeds": int,
    "global_overrides": dict,
    "experiments": list,
    "parameter_grid": dict,
    "vary_template": bool,
    "keep": str,
}
TYPES: dict[Any, str] = {str: "a text", int: "a whole number", dict: "a mapping", list: "a list", bool: "true or false"}
SHAPE = ("data", "model", "training")  # the sections of a config of sequential group composition
SHORT = {"hidden_dim": "h", "n_freqs": "f", "learning_rate": "lr", "batch_size": "bs"}  # in the names of a grid
LARGEST = 200_000  # runs of one file: each is a nested config of its own
LONGEST = 200  # letters of an experiment's name

EXAMPLE = """base_config: configs/base.yaml
n_seeds: 3
experiments:
  - name: hidden_32
    overrides: {model: {hidden_dim: 32}}"""


@dataclass(frozen=True)
class Written:
    """A run of a stage as its file has it: the experiment's name, and the whole config with its places."""

    label: str
    config: Node
    place: str  # of the experiment

    def place_of(self, path: Sequence[object]) -> str:
        """Where the field that a path leads to was written; of one that was not, the experiment."""
        found = self.config.at(path)
        return self.place if found is self.config else found.place


@dataclass(frozen=True)
class Sweep:
    """What a YAML file defines."""

    stage: Stage
    written: tuple[Written, ...]  # one for each config of the stage, in its order
    remarks: tuple[str, ...]  # what its author should know


def parse(path: Path, content: bytes) -> Sweep:
    """The stage that a YAML file describes. Raises InputError with everything that is wrong, each with its line."""
    top = read(path, content)
    if not isinstance(top.value, dict) or not top.value:
        what = "holds no mapping" if top.value else "is empty"
        raise InputError(f"{path} {what}", f"for example:\n{EXAMPLE}")
    return _Reader(path, top).sweep()


def config(path: Path, content: bytes) -> tuple[str | None, Node]:
    """One config from YAML: the family that it names or that its sections tell, and its fields.

    Raises InputError for what is no config, such as a sweep.
    """
    problems: list[str] = []
    top = _nested(read(path, content), problems)
    if not isinstance(top.value, dict):
        problems.append(f"{path} holds no config: a config is a mapping of fields")
    elif wrong := [name for name in ("base_config", "experiments", "parameter_grid") if name in top.value]:
        problems.append(f"{top.value[wrong[0]].place}: {wrong[0]} belongs to a sweep, and this should be one config")
    if problems:
        raise InputError(problems)
    family, fields = _family(top, problems)
    if problems:
        raise InputError(problems)
    return family, fields


# ----------------------------------------------------------------------------------------------------- a file


class _Reader:
    """Makes a stage of a sweep's file, and notes what is wrong with it."""

    def __init__(self, path: Path, top: Node) -> None:
        self.path, self.top = path, top
        self.problems: list[str] = []
        self.hints: list[str] = []

    def sweep(self) -> Sweep:
        """The whole file. Raises InputError."""
        self._check_keys()
        family, base = self._base()
        overall = merge(self._mapping("global_overrides"), self._varied())
        seeds, experiments = self._seeds(), list(self._experiments())
        if self._get("n_seeds") is not None and "seed" in overall.value:
            self._note(overall.value["seed"], "global_overrides sets seed, and so does n_seeds")
        if not self.problems and len(experiments) * len(seeds) > LARGEST:
            self._note(self.top, f"{len(experiments):,} experiments times {len(seeds):,} seeds: at most {LARGEST:,}")
        if self.problems:
            raise InputError(self.problems, self.hints[0] if self.hints else None)
        written = tuple(
            Written(name, seeded(merge(merge(merge(base, overall), overrides), seed)), overrides.place)
            for name, overrides in experiments
            for seed in seeds
        )
        return Sweep(self._stage(family, written), written, self._remarks())

    def _note(self, node: Node, problem: str) -> None:
        self.problems.append(f"{node.place}: {problem}")

    def _check_keys(self) -> None:
        entries = self.top.value
        for name, node in entries.items():
            if name not in KEYS:
                self._note(node, f"a sweep has no key {name} ({nearest(name, KEYS)})")
            elif not _is(node.value, KEYS[name]):
                self._note(node, f"{name} is {_typed(KEYS[name])}, not {_said(node)}")
        if not set(entries) & {"experiments", "parameter_grid"}:
            self.problems.append(f"{self.path} has neither experiments nor parameter_grid")
            one = set(entries) & set(SHAPE)
            self.hints.append("`rnnq train` trains one config" if one else f"for example:\n{EXAMPLE}")

    def _get(self, name: str) -> Node | None:
        """An entry that is there, and of the right type."""
        node = self.top.value.get(name)
        return node if node is not None and _is(node.value, KEYS[name]) else None

    def _mapping(self, name: str) -> Node:
        node = self._get(name)
        return Node({}, str(self.path), 1) if node is None else _nested(node, self.problems)

    def _base(self) -> tuple[str, Node]:
        """The family, and the fields that all runs share."""
        told, node = self._get("family"), self._get("base_config")
        base = Node({}, str(self.path), 1)
        if node is not None:
            base = self._named_base(node) if isinstance(node.value, str) else _nested(node, self.problems)
        elif "base_config" not in self.top.value and told is None:
            self.problems.append(f"{self.path}: base_config is missing")
            self.hints.append("a path or a mapping; with family: NAME it may be left out, for the family's defaults")
        family, base = _family(base, self.problems)
        name = told.value if told is not None else family
        if name is None and node is not None and not self.problems:
            self._note(node, "no family: is given, and base_config does not tell it")
            self.hints.append("family: dynamics")
        return str(name), base

    def _named_base(self, node: Node) -> Node:
        nothing = Node({}, node.file, node.line)
        try:
            path, content = _found(node, self.path)
            base = read(path, content)
        except InputError as error:
            self.problems += error.problems
            self.hints += [error.hint] if error.hint else []
            return nothing
        if not isinstance(base.value, dict):
            self._note(base, f"base_config is a mapping of fields, not {_said(base)}")
            return nothing
        if "base_config" in base.value or "experiments" in base.value:
            self._note(base, "this is a sweep itself; base_config is one config")
            return nothing
        return _nested(base, self.problems)

    def _varied(self) -> Node:
        """What `vary_template` sets for all experiments that do not say otherwise."""
        vary = self._get("vary_template")
        found = {} if vary is None else {"data": Node({"vary_template": vary}, vary.file, vary.line)}
        return Node(found, self.top.file, self.top.line)

    def _seeds(self) -> list[Node]:
        """For each seed what it sets."""
        node = self._get("n_seeds")
        if node is not None and not 1 <= node.value <= LARGEST:
            self._note(node, f"n_seeds={node.value}: at least 1, and at most {LARGEST:,}")
            return []
        if node is None:  # a seed that the base names is kept
            return [Node({}, self.top.file, self.top.line)]
        return [Node({"seed": Node(seed, node.file, node.line)}, node.file, node.line) for seed in range(node.value)]

    def _experiments(self) -> Iterator[tuple[str, Node]]:
        """Names and overrides. A grid wins over a list."""
        grid, listed = self._get("parameter_grid"), self._get("experiments")
        found: Iterable[tuple[str, Node]] = ()
        if grid is not None:
            found = self._of_grid(_nested(grid, self.problems))
        elif listed is not None and "parameter_grid" not in self.top.value:
            found = self._of_list(listed)
        names: dict[str, Node] = {}
        for name, overrides in found:
            if name in names:
                self._note(overrides, f"two experiments are called {name!r}; the first is at {names[name].place}")
            names.setdefault(name, overrides)
            if self._get("n_seeds") is not None and "seed" in overrides.value:
                self._note(overrides.value["seed"], "an experiment sets seed, and so does n_seeds")
            yield name, overrides

    def _of_list(self, listed: Node) -> Iterator[tuple[str, Node]]:
        if not listed.value:
            self._note(listed, "experiments is empty")
        for number, node in enumerate(listed.value, start=1):
            if not isinstance(node.value, dict):
                self._note(node, f"experiment {number} is a mapping with name and overrides, not {_said(node)}")
                continue
            for key in set(node.value) - {"name", "overrides"}:
                hint = nearest(key, ("name", "overrides"))
                self._note(node.value[key], f"experiment {number} has no key {key} ({hint})")
            name, overrides = self._name(number, node), node.value.get("overrides")
            if overrides is None or overrides.value is None:
                yield name, Node({}, node.file, node.line)
            elif not isinstance(overrides.value, dict):
                self._note(overrides, f"overrides of {name!r} is a mapping of fields, not {_said(overrides)}")
            else:
                # its place is that of the whole entry, as the errors of a config as such have it
                yield name, Node(_nested(overrides, self.problems).value, node.file, node.line)

    def _name(self, number: int, node: Node) -> str:
        name = node.value.get("name")
        if name is None:
            self._note(node, f"experiment {number} has no name")
        elif not isinstance(name.value, str):
            self._note(name, f"name is a text, not {_said(name)}: write it in quotation marks")
        elif not 1 <= len(name.value.strip()) <= LONGEST or not name.value.isprintable():
            self._note(name, f"{name.value[:60]!r} is no name: 1 to {LONGEST} letters, none of them a control code")
        else:
            return str(name.value)
        return f"experiment {number}"

    def _of_grid(self, grid: Node) -> Iterator[tuple[str, Node]]:
        axes = list(self._axes(grid, ()))
        if not axes and not self.problems:
            self._note(grid, "parameter_grid is empty")
        count = math.prod(len(values) for _, values in axes)
        if count > LARGEST:
            self._note(grid, f"a grid of {count:,} experiments: at most {LARGEST:,}")
        elif axes:
            for values in itertools.product(*(values for _, values in axes)):
                paths = zip((path for path, _ in axes), values, strict=True)
                made = reduce(merge, [_at(path, value) for path, value in paths])
                yield _grid_name(made), Node(made.value, grid.file, grid.line)

    def _axes(self, node: Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Node]]]:
        """Each leaf and its values; one that is no list is the only value."""
        for name, child in node.value.items():
            here = (*path, name)
            if isinstance(child.value, dict):
                yield from self._axes(child, here)
            elif child.value == []:
                self._note(child, f"{'.'.join(here)} is an empty list")
            else:
                yield here, child.value if isinstance(child.value, list) else [child]

    def _stage(self, family: str, written: Sequence[Written]) -> Stage:
        told, keep = self._get("name"), self._get("keep")
        name = told.value if told is not None else self.path.stem
        rows = configs([one.config.plain() for one in written])
        try:
            return stage(name, family, rows, keep=None if keep is None else keep.value)
        except InputError as error:
            hint = None if told is not None else "name: gives the stage another name than that of its file"
            raise InputError([f"{self.path}: {problem}" for problem in error.problems], hint) from error

    def _remarks(self) -> tuple[str, ...]:
        both = {"experiments", "parameter_grid"} <= set(self.top.value)
        return (f"{self.path}: parameter_grid is used, and experiments is not",) if both else ()


# ------------------------------------------------------------------------------------------------------ nodes


def merge(base: Node, over: Node) -> Node:
    """What an override makes of a value: mappings are merged, anything else takes the place of what was there."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    both = {name: merge(base.value[name], node) if name in base.value else node for name, node in over.value.items()}
    return Node(base.value | both, over.file, over.line)


def seeded(config: Node) -> Node:
    """A config whose `seed` is its `data.seed` where it has no other: once there was just this one, for everything."""
    seed = config.at(["data", "seed"])
    if "seed" in config.value or not _is(seed.value, int):
        return config
    return Node({**config.value, "seed": seed}, config.file, config.line)


def nested(values: Mapping[str, Any], place: str) -> Node:
    """Fields by names that may have dots, such as those of --set. Raises InputError."""
    problems: list[str] = []
    found = _nested(Node({name: _node(value, place) for name, value in values.items()}, place, 1), problems)
    if problems:
        raise InputError([problem.replace(f"{place}:1: ", f"{place}: ") for problem in problems])
    return found


def _node(value: Any, place: str) -> Node:
    if isinstance(value, dict):
        return Node({str(name): _node(part, place) for name, part in value.items()}, place, 1)
    return Node([_node(part, place) for part in value] if isinstance(value, list) else value, place, 1)


def _at(path: Sequence[str], node: Node) -> Node:
    for name in reversed(path):
        node = Node({name: node}, node.file, node.line)
    return node


def _nested(node: Node, problems: list[str]) -> Node:
    """A mapping whose keys with dots are mappings, at every level; not inside lists."""
    if not isinstance(node.value, dict):
        return node
    found: dict[str, Node] = {}
    for key, child in node.value.items():
        parts = key.split(".")
        if not all(parts):
            problems.append(f"{child.place}: {key!r} is no name of a field")
            continue
        # of the key's own line, also where the value's parts stand further down
        made = _at(parts[1:], _nested(child, problems))
        _join(found, parts[0], made, problems, parts[:1])
    return Node(found, node.file, node.line)


def _join(found: dict[str, Node], name: str, node: Node, problems: list[str], path: Sequence[str]) -> None:
    """Put an entry beside others; one that is there is joined where both are mappings, else it is set twice."""
    there = found.get(name)
    if there is None:
        found[name] = node
    elif isinstance(there.value, dict) and isinstance(node.value, dict):
        inner = dict(there.value)
        for key, child in node.value.items():
            _join(inner, key, child, problems, [*path, key])
        found[name] = Node(inner, there.file, there.line)
    else:
        problems.append(f"{node.place}: {'.'.join(path)} is set twice; first on line {there.line}")


def _family(base: Node, problems: list[str]) -> tuple[str | None, Node]:
    """The family that a config names or that its sections tell, and the config without it."""
    rest = {name: node for name, node in base.value.items() if name != "family"}
    told = base.value.get("family")
    if told is not None and not isinstance(told.value, str):
        problems.append(f"{told.place}: family is a text, not {_said(told)}")
    if told is not None:
        return str(told.value), Node(rest, base.file, base.line)
    is_groups = any(isinstance(rest[name].value, dict) for name in SHAPE if name in rest)
    return "groups" if is_groups else None, base


def _found(node: Node, sweep: Path) -> tuple[Path, bytes]:
    """The file that base_config names: from the working directory, else from beside the sweep. Raises InputError."""
    tried = list(dict.fromkeys([Path(node.value), sweep.parent / node.value]))
    for path in tried:
        try:
            if path.is_file():
                return path, bytes_of(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{node.place}: base_config {node.value!r} cannot be read: {error}") from error
    beside = {str(file) for path in tried for end in ("*.yaml", "*.yml") for file in path.parent.glob(end)}
    what = f"{node.place}: base_config {node.value!r} is not there: looked for {' and for '.join(map(str, tried))}"
    raise InputError(what, nearest(str(tried[0]), beside) if beside else None)


def _grid_name(made: Node) -> str:
    """The name of a grid's experiment: k2_p5_h80, the keys sorted at each level, some of them shortened."""
    words = []
    for name in sorted(made.value):
        child = made.value[name]
        if isinstance(child.value, dict):
            words.append(_grid_name(child))
        else:
            words.append(f"{SHORT.get(name, name)}{child.plain()}")
    return "_".join(words)


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _typed(kind: Any) -> str:
    return " or ".join(TYPES[one] for one in (kind if isinstance(kind, tuple) else (kind,)))


def _said(node: Node) -> str:
    """A value for people, cut short."""
    if isinstance(node.value, (dict, list)):
        return TYPES[type(node.value)]
    return "nothing" if node.value is None else repr(node.value)[:60]
