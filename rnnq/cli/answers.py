"""rnnq plan --answers: what the runs say to the questions of the definitions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnq.cli import fit, output
from rnnq.cli.options import Format
from rnnq.cli.sources import loaded, refuse_questions, stages_of
from rnnq.errors import InputError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from rnnq.answers import Answer, Answered, Side
    from rnnq.definitions import Definition


def answer(names: Sequence[str], db: str, defs: Path, format: Format) -> None:
    """Print it. Raises InputError for definitions that cannot be read, and questions that cannot be asked."""
    from rnnq import answers
    from rnnq import db as database

    engine = database.open(db)
    if names:
        files = loaded(names)
        stages = stages_of(files, defs)
    else:
        files, stages = _recorded(engine, defs), []
    questions = [question for file in files for question in file.questions]
    if not questions:
        of = ", ".join(names) if names else "the definitions of the stages"
        output.remark(f"{of}: no question is asked; `rnnq.question(...)` in a definition asks one")
    known = refuse_questions(files, stages, engine)
    found = answers.answer(engine, questions, known)
    if format is Format.json:
        output.as_json([one.as_row() for one in found])
    elif format is Format.csv:
        rows = [_flat(one, part) for one in found for part in one.parts]
        output.rows(format, rows, list(rows[0]) if rows else ["question"])
    else:
        for one in found:
            _show_answer(one)


def _recorded(engine: Engine, defs: Path) -> list[Definition]:
    """The definitions that the stages were made of, opened below --defs and while their hash is the recorded one."""
    from rnnq import definitions, runs

    named = {(info.source, info.source_sha256) for info in runs.stage_infos(engine).values()}
    files, problems, hint = list["Definition"](), list[str](), None
    for source, sha256 in sorted((a, b) for a, b in named if a is not None and b is not None):
        if source.endswith((".yaml", ".yml")):
            continue  # data: it asks nothing
        try:
            files.append(definitions.load_source(source, sha256, defs))
        except InputError as error:
            problems += error.problems
            hint = error.hint
    if problems and not files:
        raise InputError(problems, hint)
    for problem in problems:
        output.remark(f"warning: {problem}; its questions are left out")
    return files


def _show_answer(one: Answered) -> None:
    fit.say(f"{one.question.name}: {one.verdict}. {one.question.text}", "    ")
    for part in one.parts:
        own = f"{part.verdict}: " if len(one.parts) > 1 else ""
        fit.say(f"{own}{_comparison(part)}", "    ", "  ")
        fit.say(part.why, "    ", "    ")
    fit.say(f"rule: {one.rule}", "    ", "  ")


def _comparison(part: Answer) -> str:
    against = f" against {_side_words(part.against)}" if part.against else ""
    words = f"{part.by} of {_side_words(part.of)}{against}"
    if part.estimate is None:
        return words
    what = "difference" if part.against else "mean"
    interval = f"95 % interval {part.low:.4g} to {part.high:.4g}"
    return f"{words}; {what} {part.estimate:.4g}, {interval} ({part.how})"


def _side_words(side: Side) -> str:
    row = side.as_row()
    mean = "" if row["mean"] is None else f" {row['mean']:.4g}"
    spread = "" if row["std"] is None else f" ± {row['std']:.2g}"
    so_far = f", {side.open} not yet ended" if side.open else ""
    return f"{side.words}{mean}{spread} (n = {side.n} of {side.of}{so_far})"


def _flat(one: Answered, part: Answer) -> dict[str, Any]:
    """A part of a question as a row of CSV."""
    row: dict[str, Any] = {
        "question": one.question.name,
        "text": one.question.text,
        "verdict": part.verdict,
        "why": part.why,
    }
    row |= {"by": part.by, "rule": one.rule, "estimate": part.estimate, "low": part.low, "high": part.high}
    for name, side in (("of", part.of), ("against", part.against)):
        values = side.as_row() if side is not None else {}
        row |= {f"{name}_{key}": values.get(key) for key in ("runs", "mean", "std", "n", "of")}
    return {**row, "how": part.how}
