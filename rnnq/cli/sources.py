"""What the commands that read definitions share: the files themselves, their stages, hours and questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq.cli import output
from rnnq.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from rnnq.answers import Stage as Askable
    from rnnq.definitions import Definition
    from rnnq.queue import NewStage


def loaded(paths: Sequence[str], later: bool = False) -> list[Definition]:
    """The definitions. Raises InputError with what is wrong in any of them; with `later`, see definitions.load."""
    if not paths:
        return []
    from rnnq import definitions

    files, problems, hints = [], list[str](), list[str]()
    for path in paths:
        try:
            files.append(definitions.load(path, later=later))
        except InputError as error:
            problems += error.problems
            hints += [error.hint] if error.hint else []
    if problems:
        raise InputError(problems, hints[0] if hints else None)
    return files


def stages_of(files: Sequence[Definition], defs: Path) -> list[NewStage]:
    """The stages of definitions, checked whole. Raises InputError with everything that is wrong in them."""
    from rnnq import plan as planning

    return planning.from_definitions(files, defs, lambda items: output.counted(items, "checking configs"))


def stated(files: Sequence[Definition]) -> dict[str, Callable[[Mapping[str, Any]], float]]:
    """By stage: what it says that a run takes, in hours."""
    if not files:
        return {}
    from rnnq import sweep

    def of(stage: sweep.Stage) -> Callable[[Mapping[str, Any]], float]:
        return lambda config: sweep.hours_of(stage, config) or 0.0

    return {stage.name: of(stage) for file in files for stage in file.stages if stage.hours is not None}


def refuse_questions(
    files: Sequence[Definition], stages: Sequence[NewStage], engine: Engine | None
) -> dict[str, Askable]:
    """The stages that questions may name: those of the database, and of the definitions. Raises InputError."""
    from rnnq import answers, runs

    known: dict[str, Askable] = {}
    for info in runs.stage_infos(engine).values() if engine is not None else ():
        known[info.name] = answers.Stage(info.names, info.metrics)
        if info.defined_as is not None:
            known.setdefault(info.defined_as, known[info.name])
    known |= {stage.name: answers.Stage(stage.fields, stage.metrics) for stage in stages}
    answers.refuse([question for file in files for question in file.questions], known)
    return known
