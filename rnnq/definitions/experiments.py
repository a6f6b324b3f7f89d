"""A study as a list of experiments: groups of labelled runs, each a few changes to one config.

    CONFIG = {"data_path": "stdlib", "tokens": "bytes", "steps": 500}
    EXPERIMENTS = [
        {"name": "widths", "subexperiments": [
            {"label": "lstm_16d", "overrides": {"hidden_size": 16}},
            {"label": "lstm_32d", "overrides": {"hidden_size": 32}},
        ]},
    ]

A group is a stage of its name, and the config of a run is CONFIG with what its overrides say, key by key; groups of one
name are one. `FAMILY` in the same file names the family. The form is that of hansgundlach/Experimental_Progress; what
makes such lists is in variations.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rnnq.errors import InputError, nearest
from rnnq.sweep import Stage, stage

LIST, BASE, FAMILY = "EXPERIMENTS", "CONFIG", "FAMILY"  # the names that a file says it by
DEFAULT_FAMILY = "scaling"
LONGEST = 200  # letters of a label
STEM = 200  # bytes of the name of its file
EXAMPLE = """for example:
EXPERIMENTS = [
    {"name": "widths", "subexperiments": [{"label": "lstm_16d", "overrides": {"hidden_size": 16}}]},
]"""


@dataclass(frozen=True)
class Listed:
    """A run as a list has it. Its place is the file alone: its label says which it is."""

    label: str
    file: str
    shared: frozenset[str]  # the keys that it has from CONFIG

    def place_of(self, path: Sequence[object]) -> str:
        """Where what a path of keys leads to was written: the file, and CONFIG where that alone has it."""
        return f"{self.file}: {BASE}" if self.is_shared(path) else self.file

    def is_shared(self, path: Sequence[object]) -> bool:
        """Whether that stands in CONFIG, and not in the overrides of the run."""
        return bool(path) and path[0] in self.shared


@dataclass
class Found:
    """What a list of experiments defines, and everything that is wrong with how it is written."""

    stages: list[Stage] = field(default_factory=list)
    runs: dict[str, list[Listed]] = field(default_factory=dict)  # stage -> its runs, in its order
    problems: list[str] = field(default_factory=list)


def lists_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of experiments among the names of a module."""
    return {name: value for name, value in names.items() if not name.startswith("_") and _is_list(value)}


def _is_list(value: Any) -> bool:
    groups = value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(group, Mapping) and "subexperiments" in group for group in groups)


def _is_meant(value: Any) -> bool:
    """Whether somebody who names it may take it for a list, and should be told what is wrong with it."""
    if isinstance(value, (list, tuple)):
        return not value or any(isinstance(group, Mapping) for group in value)
    return isinstance(value, Stage) or _is_list([value])


def read(names: Mapping[str, Any], file: str, wanted: str | None = None, needed: bool = False) -> Found:
    """What a list of experiments says, of those that a module, by its names, holds: EXPERIMENTS, or the one wanted.

    Where EXPERIMENTS is needed, other lists in its place are a problem, and none at all is the caller's.
    """
    found, known = Found(), lists_of(names)
    name = wanted or LIST
    if name in names and (wanted is None or _is_meant(names[name])):
        _Reader(found, names.get(BASE, {}), names.get(FAMILY, DEFAULT_FAMILY), file).read(name, names[name])
    elif wanted is not None:
        near = nearest(wanted, known)
        has = "" if near.startswith("it has") or not known else f"; it has {', '.join(known)}"
        found.problems.append(f"there is no list of experiments {wanted} ({near}{has})")
    elif needed and known:
        first = next(iter(known))
        found.problems.append(
            f"has no {LIST}, but {', '.join(known)}: `rnnq init {file}:{first}`, or {LIST} = {first} in the file"
        )
    return found


class _Reader:
    """Makes stages of groups, and notes what is wrong with them."""

    def __init__(self, found: Found, base: Any, family: Any, file: str) -> None:
        self.found, self.family, self.file = found, family, file
        self.base: dict[str, Any] = {}
        if _has_words(base):
            self.base = dict(base)
        else:
            self._note(f"{BASE} is a dict of fields, not {_said(base)}")

    def _note(self, problem: str) -> None:
        self.found.problems.append(problem)

    def read(self, name: str, groups: Any) -> None:
        """All groups of a list."""
        if isinstance(groups, Stage):
            self._note(
                f"{name} is a stage, and no list of experiments: without :{name} all stages of the file are meant"
            )
            return
        if not isinstance(groups, (list, tuple)):
            one = f": put it into a list, [{name}]" if isinstance(groups, Mapping) else ""
            self._note(f"{name} is a list of groups, not {_said(groups)}{one}")
            return
        if not groups:
            self._note(f"{name} is empty")
        runs: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for number, group in enumerate(groups, start=1):
            if not isinstance(group, Mapping):
                self._note(f"group {number} of {name} is a dict with name and subexperiments, not {_said(group)}")
                continue
            called = self._name(number, group)
            made = list(self._runs(called or f"group {number}", group))
            if called is not None and made:
                runs.setdefault(called, []).extend(made)
        for called, made in runs.items():
            self._refuse_clashes(called, [label for label, _ in made])
            self._make(called, made)

    def _name(self, number: int, group: Mapping[Any, Any]) -> str | None:
        name = group.get("name")
        known = ("name", "subexperiments")
        for key in group:
            if key not in known:
                shown = name if isinstance(name, str) else number
                self._note(f"group {shown} has no key {key} ({nearest(str(key), known)})")
        if "name" not in group:
            self._note(f"group {number} has no name")
        elif not isinstance(name, str):
            self._note(f"group {number}: name is a text, not {_said(name)}")
        else:
            try:
                stage(name)  # refuses what cannot be the name of a stage
                return name
            except InputError as error:
                self.found.problems += [f"group {number}: {problem}" for problem in error.problems]
        return None

    def _runs(self, group: str, of: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The labels and overrides of a group's runs."""
        listed = of.get("subexperiments")
        if not isinstance(listed, (list, tuple)):
            what = _said(listed) if "subexperiments" in of else "missing"
            self._note(f"group {group}: subexperiments is {'a list, not ' if what != 'missing' else ''}{what}")
            return
        if not listed:
            self._note(f"group {group} is empty")
        for number, one in enumerate(listed, start=1):
            if not isinstance(one, Mapping):
                self._note(f"group {group}, run {number} is a dict with label and overrides, not {_said(one)}")
                continue
            label = self._label(f"group {group}, run {number}", one)
            overrides = self._overrides(f"group {group}, {label if label is not None else f'run {number}'}", one)
            if label is not None and overrides is not None:
                yield label, overrides

    def _label(self, place: str, one: Mapping[Any, Any]) -> str | None:
        label = one.get("label")
        if "label" not in one:
            self._note(f"{place} has no label")
        elif not isinstance(label, str):
            self._note(f"{place}: label is a text, not {_said(label)}")
        elif not 1 <= len(label.strip()) <= LONGEST or not label.isprintable():
            self._note(f"{place}: {label[:60]!r} is no label: 1 to {LONGEST} letters, none of them a control code")
        elif not file_stem(label).strip("_"):
            self._note(f"{place}: {label!r} is no label: nothing of it can be in the name of a file")
        else:
            return label
        return None

    def _overrides(self, place: str, one: Mapping[Any, Any]) -> dict[str, Any] | None:
        known = ("label", "overrides", "config")
        for key in one:
            if key not in known:
                field_of = "; a field of the config goes into overrides" if "overrides" not in one else ""
                self._note(f"{place} has no key {key} ({nearest(str(key), known)}{field_of})")
        given = [key for key in known[1:] if key in one]
        if len(given) > 1:
            self._note(f"{place} has overrides and config, which are two words for one thing")
            return None
        found = one[given[0]] if given else {}
        if not _has_words(found):
            self._note(f"{place}: {given[0]} is a dict of fields, not {_said(found)}")
            return None
        return dict(found)

    def _refuse_clashes(self, group: str, labels: Sequence[str]) -> None:
        """Note labels of one group that are equal, or that would be the name of one file."""
        stems: dict[str, str] = {}
        for label, count in Counter(labels).items():
            first = stems.setdefault(file_stem(label).lower(), label)  # some disks know no upper case
            if count > 1:
                self._note(f"group {group}: {count} runs have the label {label!r}")
            if first != label:
                same = f"{first!r} and {label!r} are the same as the name of a file"
                self._note(f"group {group}: {same}, {file_stem(label)}.csv")

    def _make(self, name: str, runs: Sequence[tuple[str, dict[str, Any]]]) -> None:
        configs = [{**self.base, **overrides} for _, overrides in runs]
        self.found.stages.append(replace(stage(name, self.family, configs), listed=True))
        shared = [frozenset(self.base.keys() - overrides.keys()) for _, overrides in runs]
        self.found.runs[name] = [Listed(label, self.file, keys) for (label, _), keys in zip(runs, shared, strict=True)]


def file_stem(label: str) -> str:
    """What is left of a label in the name of a file: letters, digits and underscores; a space becomes one.

    The rule of the program that the form is from, so that its figures find the files. `lstm_16d_lr_1.0em04` becomes
    `lstm_16d_lr_10em04`. File systems take 255 bytes: what is longer than 200 is cut.
    """
    return re.sub(r"[^\w ]", "", label).rstrip().replace(" ", "_").encode()[:STEM].decode(errors="ignore")


def _has_words(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _said(value: Any) -> str:
    """A value for people, cut short."""
    if isinstance(value, Mapping):
        return "a dict" if _has_words(value) else "a dict with keys that are no texts"
    kinds: dict[Any, str] = {list: "a list", tuple: "a tuple", set: "a set"}
    return kinds.get(type(value)) or ("nothing" if value is None else repr(value)[:60])
