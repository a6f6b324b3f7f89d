"""From a path to the stages of a definition, and from what a database names to a path that may be opened.

A .py is executed; a .yaml is data, holds no family and no rule, and is opened only when a user names it.
"""

from __future__ import annotations

import hashlib
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import TYPE_CHECKING

from rnnq.definitions import python
from rnnq.errors import InputError, nearest
from rnnq.questions import Question
from rnnq.sweep import EXAMPLE, Stage

if TYPE_CHECKING:
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
    written: Mapping[str, Sequence[Written]] = field(default_factory=dict)  # stage -> its runs as YAML has them
    remarks: tuple[str, ...] = ()  # what its author should know
    questions: tuple[Question, ...] = ()  # that its runs shall answer

    def rule(self, stage_name: str) -> Stage | None:
        """The stage of that name, also where it is only the `next=` of another; None when there is none."""
        return next((stage for stage in _reachable(self.declared) if stage.name == stage_name), None)


def load(path: str | Path) -> Definition:
    """Execute or read a definition file and find its stages. Raises InputError with everything that is wrong."""
    path = Path(path)
    content = _read(path)
    return _of_yaml(path, content) if path.suffix in YAML else _definition(path, content)


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


def _definition(path: Path, content: bytes) -> Definition:
    """What `content`, the bytes of `path`, defines. They are read once, so that the hash is of what was executed."""
    module = python.execute(path, content)
    declared, questions = _declared(module), _questions(module)
    problems = [f"{path}: {problem}" for problem in [*_problems(declared), *_asked_twice(questions)]]
    if problems:
        sys.modules.pop(module.__name__, None)
        raise InputError(problems, f"a definition has at least one stage, for example: {EXAMPLE}")
    stages = tuple(stage for stage in declared if stage.sweep is not None)
    sha256 = hashlib.sha256(content).hexdigest()
    return Definition(path, sha256, stages, tuple(declared), module, questions=tuple(questions))


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


def _problems(declared: list[Stage]) -> list[str]:
    if not declared:
        return ["lacks `stage`: no name in it holds a stage"]
    reachable = _reachable(declared)
    follows = [stage.next for stage in reachable if stage.next is not None]
    names = Counter(stage.name for stage in reachable)
    problems = [f"{count} stages are named {name}" for name, count in names.items() if count > 1]
    for stage in reachable:
        is_next = any(other is stage or other == stage.name for other in follows)
        problems += [f"stage {stage.name} {problem}" for problem in _stage_problems(stage, is_next)]
        if stage.sweep is not None and all(stage is not other for other in declared):
            problems.append(f"stage {stage.name} is only the next= of another, and its sweep would never be used")
    if not any(stage.sweep is not None for stage in declared) and not problems:
        problems.append("no stage has a sweep")
    return problems


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
    return _definition(path, content)


def _source_hint() -> str:
    return (
        "`rnnq init` again accepts the file as it is now; `--defs DIR` names the folder that has it as it was; "
        "`promote --rules DEF` takes another file's rule"
    )
