"""From a path to the stages of a definition, and from what a database names to a path that may be opened.

A .py is executed; a .yaml is data, holds no family and no rule, and is opened only when a user names it. `FILE.py:NAME`
is one list of experiments of a file, in place of all that it defines.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rnnq.definitions import experiments, python
from rnnq.errors import InputError, nearest
from rnnq.questions import Question
from rnnq.sweep import EXAMPLE, Stage

if TYPE_CHECKING:
    from rnnq.definitions.experiments import Found, Listed
    from rnnq.definitions.sweeps import Written

YAML = (".yaml", ".yml")
FORMS = "a definition is a .py or a .yaml file"

# -------------------------------------------------------------------------------------------- definitions


@dataclass(frozen=True, eq=False)
class Definition:
    """A definition file as it was executed, or read."""

    path: Path
    sha256: str  # of the very bytes that were
    stages: tuple[Stage, ...]  # those with runs of their own, in the order of the file
    declared: tuple[Stage, ...]  # also those that are only the `next=` of another
    module: ModuleType | None = None  # None: it is in YAML
    # stage -> its runs as YAML or a list of experiments has them
    written: Mapping[str, Sequence[Written | Listed]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # what its author should know
    questions: tuple[Question, ...] = ()  # that its runs shall answer
    problems: tuple[str, ...] = ()  # what is wrong with its list of experiments, where that is to be said later

    def families(self) -> list[Any]:
        """The families that are its own: those of its stages, and FAMILY."""
        found = [stage.family for stage in self.stages]
        if self.module is not None:
            found.append(getattr(self.module, experiments.FAMILY, None))
        return [family for family in found if hasattr(family, "Config")]

    def rule(self, stage_name: str) -> Stage | None:
        """The stage of that name, also where it is only the `next=` of another; None when there is none."""
        return next((stage for stage in _reachable(self.declared) if stage.name == stage_name), None)


def load(path: str | Path, later: bool = False) -> Definition:
    """Execute or read a definition file and find its stages. Raises InputError with everything that is wrong.

    With `later` what is wrong with a list of experiments is left in `problems`: to be said together with what is wrong
    with its configs, of which only the family knows.
    """
    path, name = _parted(Path(path))
    content = _read(path)
    if path.suffix in YAML:
        if name is not None:
            raise InputError(f"{path}:{name}: a study in YAML has no lists to choose from", f"rnnq init {path}")
        return _of_yaml(path, content)
    return _definition(path, content, name, later)


def _parted(path: Path) -> tuple[Path, str | None]:
    """The file, and the list of experiments of it that `FILE.py:NAME` names. A file that has a colon is one."""
    file, colon, name = path.name.rpartition(":")
    if not colon or not file.endswith((".py", *YAML)) or os.path.lexists(path):
        return path, None
    if not name.isidentifier():
        raise InputError(f"{path}: {name!r} is no name of a list", f"{path.with_name(file)}:{experiments.LIST}")
    return path.with_name(file), name


def _read(path: Path) -> bytes:
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        beside = sorted(file.name for end in (".py", *YAML) for file in path.parent.glob(f"*{end}"))
        raise InputError(f"{path} does not exist", nearest(path.name, beside) if beside else None) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened: {error}") from error
    if not is_file:
        raise InputError(f"{path} is not a file", FORMS)
    if path.suffix not in (".py", *YAML):
        raise InputError(f"{path} is not a definition", FORMS)
    try:
        if path.suffix == ".py":
            return path.read_bytes()
        from rnnq.definitions import yaml  # 0.02 s that only YAML is worth

        return yaml.bytes_of(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _definition(path: Path, content: bytes, name: str | None = None, later: bool = False) -> Definition:
    """What `content`, the bytes of `path`, defines. They are read once, so that the hash is of what was executed.

    With a name that list of experiments alone; else all stages of the file, and then its EXPERIMENTS.
    """
    module = python.execute(path, content)
    declared, questions = ([], []) if name is not None else (_declared(module), _questions(module))
    listed = experiments.read(vars(module), str(path), name, needed=not declared)
    listed.problems += _named_alike(declared, listed)
    found = [*_problems(declared, listed), *_asked_twice(questions)]
    if not later:
        found += listed.problems
    if found:
        sys.modules.pop(module.__name__, None)
        hint = (
            experiments.EXAMPLE if listed.problems else f"a definition has at least one stage, for example: {EXAMPLE}"
        )
        raise InputError([f"{path}: {problem}" for problem in found], hint)
    return Definition(
        path,
        hashlib.sha256(content).hexdigest(),
        (*(stage for stage in declared if stage.sweep is not None), *listed.stages),
        (*declared, *listed.stages),
        module,
        listed.runs,
        questions=tuple(questions),
        problems=tuple(f"{path}: {problem}" for problem in listed.problems),
    )


def _of_yaml(path: Path, content: bytes) -> Definition:
    from rnnq.definitions import sweeps

    found = sweeps.parse(path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    written = {found.stage.name: found.written}
    return Definition(path, sha256, (found.stage,), (found.stage,), written=written, remarks=found.remarks)


def _declared(module: ModuleType) -> list[Stage]:
    """The stages of a module's namespace in order, each once however many names it has."""
    return list({id(value): value for value in vars(module).values() if isinstance(value, Stage)}.values())


def _questions(module: ModuleType) -> list[Question]:
    """The questions of a module's namespace in order, each once; also those in a list, a tuple or a dict."""
    found: dict[int, Question] = {}
    for value in vars(module).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found |= {id(one): one for one in inside if isinstance(one, Question)}
    return list(found.values())


def _asked_twice(questions: Iterable[Question]) -> list[str]:
    names = Counter(question.name for question in questions)
    return [f"{count} questions are named {name}" for name, count in names.items() if count > 1]


def _reachable(stages: Iterable[Stage]) -> list[Stage]:
    """The stages and those that follow them through `next=`, each once."""
    found: dict[int, Stage] = {}
    for first in stages:
        here: str | Stage | None = first
        while isinstance(here, Stage) and id(here) not in found:
            found[id(here)] = here
            here = here.next
    return list(found.values())


def _problems(declared: list[Stage], listed: Found) -> list[str]:
    if not declared:
        return [] if listed.stages or listed.problems else ["lacks `stage`: no name in it holds a stage"]
    reachable = _reachable(declared)
    follows = [stage.next for stage in reachable if stage.next is not None]
    names = Counter(stage.name for stage in reachable)
    problems = [f"{count} stages are named {name}" for name, count in names.items() if count > 1]
    for stage in reachable:
        is_next = any(other is stage or other == stage.name for other in follows)
        problems += [f"stage {stage.name} {problem}" for problem in _stage_problems(stage, is_next)]
        if stage.sweep is not None and all(stage is not other for other in declared):
            problems.append(f"stage {stage.name} is only the next= of another, and its sweep would never be used")
    has_runs = any(stage.sweep is not None for stage in declared) or listed.stages or listed.problems
    if not has_runs and not problems:
        problems.append("no stage has a sweep")
    return problems


def _named_alike(declared: Iterable[Stage], listed: Found) -> list[str]:
    both = {stage.name for stage in _reachable(declared)} & {stage.name for stage in listed.stages}
    return [f"a stage and a group of {experiments.LIST} are both named {name}" for name in sorted(both)]


def _stage_problems(stage: Stage, is_next: bool) -> list[str]:
    if stage.sweep is None:
        if not is_next:
            return ["lacks its family and its sweep" if stage.family is None else "lacks its sweep"]
        return ["has base= but no sweep that it could apply to"] if stage.base else []
    problems = ["lacks its family"] if stage.family is None else []
    return problems + (["is empty: its sweep has no configs"] if len(stage.sweep) == 0 else [])


# ---------------------------------------------------------------------------- definitions that a row names


def relative_source(path: str | Path, defs_dir: str | Path) -> str:
    """How a database names a definition: its path below the definitions' folder, else just the file's name."""
    real, home = Path(path).resolve(), Path(defs_dir).resolve()
    return real.relative_to(home).as_posix() if real.is_relative_to(home) else Path(path).name


def resolve_source(source: str, defs_dir: str | Path) -> Path:
    """The file that a database names, which must lie below the definitions' folder.

    A database may come from anywhere: absolute paths, `..` and links that lead out of the folder are refused.
    """
    # Windows' reading is the stricter one: it knows both separators, drives, and a leading slash
    asked = PureWindowsPath(source)
    if not asked.parts or asked.anchor or ".." in asked.parts or "\0" in source:
        raise InputError(f"{source!r} cannot be a definition: only a path below {defs_dir} is opened", _source_hint())
    path = Path(defs_dir) / source
    try:
        inside = path.resolve().is_relative_to(Path(defs_dir).resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        inside = False
    if not inside:
        raise InputError(f"{path} does not lead to a place below {defs_dir}, and is not opened", _source_hint())
    return path


def load_source(source: str, sha256: str, defs_dir: str | Path) -> Definition:
    """The definition that a database names; it is executed only if its hash is the recorded one.

    One in YAML holds no code, so nothing of it is ever needed: a database that asks for it is refused.
    """
    path = resolve_source(source, defs_dir)
    if path.suffix in YAML:
        raise InputError(f"{path} is data: a definition in YAML holds neither a family nor a rule")
    try:
        content = _read(path)
    except InputError as error:
        raise InputError(error.problems, _source_hint()) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(
            f"{path} has changed since the stage was made: its sha256 is {found[:12]}, recorded is {sha256[:12]}",
            _source_hint(),
        )
    # a list may be at fault that `init` was not asked for, and of the one that it was only FAMILY is needed
    return _definition(path, content, later=True)


def _source_hint() -> str:
    return (
        "`rnnq init` again accepts the file as it is now; `--defs DIR` names the folder that has it as it was; "
        "`promote --rules DEF` takes another file's rule"
    )
