"""What a person does to runs and stages: choose them, say what would become of them, and have the queue do it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from rnnq import config, db, definitions, families, logs, plan, query, queue, runs, stored, sweep
from rnnq.errors import InputError, nearest
from rnnq.query import OPEN
from rnnq.runs import StageInfo

AGAIN = ("failed", "cancelled", "skipped")  # what may be retried
MOST = 1_000_000  # the highest priority, and, negative, the lowest
TAG = re.compile(r"(?!(and|or|not|in)$)[^\W\d][\w.:+/-]{0,99}", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """Runs by their ids, or by a stage and a filter."""

    ids: Sequence[int] = ()
    stage: str | None = None
    filter: str | None = None

    def rows(self, engine: Engine) -> list[Any]:
        """The runs. Raises InputError for a choice that is none, or says two things."""
        if self.ids and (self.stage is not None or self.filter is not None):
            other = "--stage" if self.stage is not None else "--filter"
            raise InputError(f"ids of runs and {other} exclude each other", "name runs, or choose them")
        if not self.ids and self.stage is None and self.filter is None:
            raise InputError("no runs are named", "give their ids, or choose them by --filter or --stage")
        return runs.pick(engine, self.ids, self.stage, self.filter)


@dataclass
class Steered:
    """What became of the runs that were chosen, or would."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # run, stage, label, was, now
    left: dict[str, list[int]] = field(default_factory=dict)  # why they were left alone -> runs

    def leave(self, why: str, run: int) -> None:
        """A run that is left alone."""
        self.left.setdefault(why, []).append(run)

    def put(self, row: Any, was: Any, now: Any) -> None:
        """A run that is changed."""
        self.rows.append({"run": row.id, "stage": row.stage, "label": row.label, "was": was, "now": now})

    def keep(self, changed: Iterable[int]) -> Steered:
        """What really changed: meanwhile a worker may have been faster with some of them."""
        done = set(changed)
        for row in self.rows:
            if row["run"] not in done:
                self.leave("changed meanwhile", row["run"])
        self.rows = [row for row in self.rows if row["run"] in done]
        return self

    @property
    def ids(self) -> list[int]:
        """The runs that are to change."""
        return [row["run"] for row in self.rows]


def _sorted(rows: Iterable[Any], legal: Sequence[str], now: Callable[[Any], str]) -> Steered:
    """Runs in a legal state are to change, the others are left alone."""
    found = Steered()
    for row in rows:
        if row.state in legal:
            found.put(row, row.state, now(row))
        else:
            found.leave(row.state, row.id)
    return found


# --------------------------------------------------------------------------------------------------- states


def retry(engine: Engine, choice: Choice, dry_run: bool = False) -> Steered:
    """Failed runs are pending again; cancelled and skipped ones where an id, or a filter with `state`, names them.

    Those behind a gate that is not decided on wait for it again.
    """
    found = _sorted(choice.rows(engine), _retried(choice), lambda row: "waiting" if row.behind else "pending")
    return found if dry_run else found.keep(queue.retry(engine, found.ids))


def _retried(choice: Choice) -> Sequence[str]:
    named = bool(choice.ids) or (choice.filter is not None and query.mentions(choice.filter, "state"))
    return AGAIN if named else ("failed",)


def retry_with(engine: Engine, choice: Choice, changes: Sequence[str], defs: Path) -> list[queue.NewStage]:
    """The same runs with changed fields, as new runs of their stages; the old ones stay as they are.

    Nothing is written: queue.init does that. Raises InputError with all that is wrong with the changed configs.
    """
    wanted = {row.id for row in choice.rows(engine) if row.state in _retried(choice)}
    infos = runs.stage_infos(engine)
    made, problems = [], []
    for stage, rows in _by_stage(engine, wanted).items():
        try:
            made.append(_changed_stage(infos[stage], rows, changes, defs))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems, "--set key=value")
    return made


def _by_stage(engine: Engine, wanted: set[int]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in runs.configs(engine, sorted(wanted)):
        found.setdefault(row["stage"], []).append(row)
    return found


def _changed_stage(
    info: StageInfo, rows: Sequence[Mapping[str, Any]], changes: Sequence[str], defs: Path
) -> queue.NewStage:
    model = _model(info, defs)
    values = plan.parse_changes(changes, model)
    detail = json.dumps({"set": values}, sort_keys=True)
    entries = [
        plan.Entry(plan.changed(row["config"], values), ((row["id"], "retry", detail),), start_from=row["start_from"])
        for row in rows
    ]
    kept = {name: getattr(info, name) for name in ("family", "family_in_source", "has_rule", "source", "source_sha256")}
    return plan.new_stage(info.name, plan.Origin(config=model, **kept), entries)


def _model(info: StageInfo, defs: Path) -> type[config.Config]:
    """The config class of a stage. Raises InputError when its definition file is not there as it was."""
    definition = None
    if info.family_in_source and info.source and info.source_sha256:
        definition = definitions.load_source(info.source, info.source_sha256, defs)
    return families.find_config(info.family, definition)


def cancel(engine: Engine, choice: Choice, at_once: bool = False, dry_run: bool = False) -> Steered:
    """Open runs are cancelled; the worker of one that is running checkpoints first, unless it is `at_once`."""

    def now(row: Any) -> str:
        return "asked to stop" if row.state == "running" and not at_once else "cancelled"

    if not dry_run:
        queue.reap(engine, by_clock=False)  # what a dead process of this host held nobody would stop
    found = _sorted(choice.rows(engine), OPEN, now)
    if dry_run:
        return found
    ended, asked = queue.cancel(engine, found.ids, at_once)
    return found.keep([*ended, *asked])


def extend(engine: Engine, choice: Choice, steps: str, defs: Path, dry_run: bool = False) -> Steered:
    """Finished runs are trained further, from their last checkpoints.

    `steps` is what they shall come to ("20000"), or how many more ("+5000"). Raises InputError.
    """
    budget = _budget(steps)
    infos = runs.stage_infos(engine)
    found, budgets = Steered(), {}
    rows = choice.rows(engine)
    collected = _collected(engine, rows)
    for row in rows:
        why = _why_not_further(row, budget, collected)
        if why is None:
            budgets[row.id] = budget(row.budget)
            found.put(row, row.budget, budgets[row.id])
        else:
            found.leave(why, row.id)
    _refuse_schedules(engine, infos, found, defs)
    return found if dry_run else found.keep(queue.extend(engine, {run: budgets[run] for run in found.ids}))


def _budget(steps: str) -> Callable[[int], int]:
    if re.fullmatch(r"\+?[1-9][0-9]{0,2}(_?[0-9]{3}){0,4}|\+?[1-9][0-9]{0,14}", steps) is None:
        raise InputError(f"--steps {steps}: not a number of steps", "--steps 20000 in all, or --steps +5000 more")
    number = int(steps)
    return (lambda before: before + number) if steps.startswith("+") else (lambda before: number)


def _collected(engine: Engine, rows: Iterable[Any]) -> Mapping[int, str]:
    """The runs whose checkpoints may have gone by `rnnq gc`, and by which rule."""
    if all(row.has_checkpoint or row.state != "done" for row in rows):
        return {}
    with db.reading(engine) as connection:
        return stored.let_go(connection)


def _why_not_further(row: Any, budget: Callable[[int], int], collected: Mapping[int, str]) -> str | None:
    if row.state != "done":
        return str(row.state)
    if not row.has_checkpoint and row.id in collected:
        return f"without a last checkpoint: `rnnq gc` deleted it (its rule: {collected[row.id]})"
    if row.budget is None or not row.has_checkpoint:
        return "without a checkpoint to go on from"
    if budget(row.budget) <= row.budget:
        return f"trained for {row.budget:,} steps already"
    return None


def _refuse_schedules(engine: Engine, infos: Mapping[str, StageInfo], found: Steered, defs: Path) -> None:
    """Leave out runs whose schedule ends with their steps."""
    reasons: dict[int, str] = {}
    for stage in {row["stage"] for row in found.rows}:
        model = _model(infos[stage], defs)
        if model.ends_with_steps is config.Config.ends_with_steps:
            continue
        for row in runs.configs(engine, [row["run"] for row in found.rows if row["stage"] == stage]):
            why = config.parse(model, row["config"]).ends_with_steps()
            reasons |= {row["id"]: why} if why else {}
    for run, why in reasons.items():
        found.leave(why, run)
    found.rows = [row for row in found.rows if row["run"] not in reasons]


# -------------------------------------------------------------------------------------- order, notes and tags


def prioritise(engine: Engine, choice: Choice, priority: int, dry_run: bool = False) -> Steered:
    """Open runs get a priority; the highest is claimed first, 0 is where all begin."""
    found = Steered()
    for row in choice.rows(engine):
        if row.state not in OPEN:
            found.leave(row.state, row.id)
        elif row.priority == priority:
            found.leave(f"of priority {priority} already", row.id)
        else:
            found.put(row, row.priority, priority)
    return found if dry_run else found.keep(queue.prioritise(engine, found.ids, priority))


def note(engine: Engine, choice: Choice, words: str, dry_run: bool = False) -> Steered:
    """Say something of runs, in place of what was said before; nothing at all takes it away."""
    found = Steered()
    for row in choice.rows(engine):
        if (row.note or "") == queue.clean_text(words):
            found.leave("with this note already", row.id)
        else:
            found.put(row, row.note or "", words)
    return found if dry_run else found.keep(queue.note(engine, found.ids, words))


def tag(engine: Engine, choice: Choice, name: str, remove: bool = False, dry_run: bool = False) -> Steered:
    """Give runs a tag, or take it away. Raises InputError for a name that no filter could say bare."""
    if TAG.fullmatch(name) is None:
        raise InputError(f"{name!r} is no tag", "a word of letters, digits and . : + / - _, of up to 100 characters")
    rows = choice.rows(engine)
    with db.reading(engine) as connection:
        sql = text("SELECT run_id FROM tags WHERE tag = :tag")
        has = set(connection.execute(sql, {"tag": name}).scalars())
    found = Steered()
    for row in rows:
        if (row.id in has) == remove:
            found.put(row, name if remove else "", "" if remove else name)
        else:
            found.leave("without this tag" if remove else "with this tag already", row.id)
    if dry_run:
        return found
    return found.keep((queue.untag if remove else queue.tag)(engine, found.ids, name))


# -------------------------------------------------------------------------------------------------- stages


def refuse_unknown(engine: Engine, stages: Iterable[str]) -> None:
    """Raises InputError for stages that are not there, all of them at once."""
    known = runs.stage_infos(engine)
    missing = [stage for stage in stages if stage not in known]
    if missing:
        hint = nearest(missing[0], known) if known else "`rnnq init` adds one"
        raise InputError([f"there is no stage {stage!r}" for stage in missing], hint)


def pause(engine: Engine, stages: Sequence[str], dry_run: bool = False) -> int:
    """No run of the stages is claimed any more; returns how many running ones are to be given back."""
    refuse_unknown(engine, stages)
    if dry_run:
        return 0
    queue.reap(engine, by_clock=False)
    return sum(len(queue.pause(engine, stage)) for stage in stages)


def resume(engine: Engine, stages: Sequence[str], dry_run: bool = False) -> None:
    """Runs of the stages may be claimed again."""
    refuse_unknown(engine, stages)
    for stage in [] if dry_run else stages:
        queue.resume(engine, stage)


def rename(engine: Engine, stage: str, to: str) -> None:
    """Give a stage another name. Raises InputError for one that is taken or cannot be a folder's name."""
    refuse_unknown(engine, [stage])
    sweep.stage(to)
    queue.reap(engine, by_clock=False)  # what a dead process of this host held is running no more
    queue.rename(engine, stage, to)


@dataclass(frozen=True)
class Doomed:
    """What `delete` would take away."""

    stage: str
    runs: int
    points: int
    files: int
    bytes: int
    children: int  # runs of other stages that descend from this one's


def doomed(engine: Engine, stage: str) -> Doomed:
    """What there is of a stage. Raises InputError for one that is not there."""
    with db.reading(engine) as connection:
        sql = """SELECT (SELECT count(*) FROM runs WHERE stage = :stage) AS runs,
                        (SELECT count(*) FROM intakes WHERE stage = :stage) AS intakes,
                        (SELECT count(*) FROM point JOIN runs ON runs.id = point.run_id WHERE stage = :stage) AS points,
                        (SELECT count(DISTINCT child) FROM lineage JOIN runs AS old ON old.id = parent
                         JOIN runs AS young ON young.id = child
                         WHERE old.stage = :stage AND young.stage != :stage) AS children"""
        row = connection.execute(text(sql), {"stage": stage}).one()
        ids = set(connection.execute(text("SELECT id FROM runs WHERE stage = :stage"), {"stage": stage}).scalars())
    if not row.intakes:  # those of an interrupted delete are still there
        refuse_unknown(engine, [stage])
    files = [file for folder in _folders(engine, ids) for file in folder.rglob("*") if file.is_file()]
    return Doomed(stage, row.runs, row.points, len(files), sum(file.stat().st_size for file in files), row.children)


def delete(engine: Engine, stage: str) -> int:
    """Delete a stage with its rows and files; returns how many runs went. Raises InputError while one is running."""
    queue.reap(engine, by_clock=False)

    def remove_files(gone: list[int]) -> None:
        for folder in _folders(engine, set(gone)):
            shutil.rmtree(folder, ignore_errors=True)

    return len(queue.delete(engine, stage, remove_files))


def _folders(engine: Engine, ids: set[int]) -> list[Path]:
    """The folders of runs: named by ids that are given once, below this study's own."""
    study, _, root = db.study(engine)
    places = [*(root / "checkpoints" / study).glob("*"), logs.folder(root, study, 0).parent]
    named = {str(run) for run in ids}
    return [folder for place in places if place.is_dir() for folder in place.iterdir() if folder.name in named]
