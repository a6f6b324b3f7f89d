"""A CSV for each run, as the scaling study wrote them: a folder for each stage, and what its plots read.

    {stage}/{stem}.csv      step, training_loss, validation_loss, what the family counts, optimizer_step, state
            {stem}.json     what the run was: its whole config, its state, whether it is complete, what columns mean

A stem is the run's label without the signs that the study left out of file names. Everything is written aside and then
renamed: no file is ever half-written.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import Engine

from rnnq import families, folder, runs
from rnnq.config import Config, check
from rnnq.definitions.experiments import file_stem
from rnnq.errors import InputError, RnnqError
from rnnq.runs import StageInfo

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
TRAINING, VALIDATION = "loss", "val_loss"  # the curves of the two losses
MOST = 25  # problems that are listed

MEANING = {
    "step": "steps of the optimiser",  # unless the family counts otherwise
    "training_loss": "the training loss, as it was last logged at or before this step",
    "validation_loss": "on the validation tokens, after this step; empty where it was not measured or not finite",
    "optimizer_step": "steps of the optimiser",
    "state": "of the run when this was written: done, or what it had come to",
}


@dataclass
class Sheets:
    """What was written."""

    paths: list[Path] = field(default_factory=list)  # the folders, one for each stage
    runs: int = 0
    partial: int = 0  # of them, runs that are not done
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Stage:
    """A stage, and its runs that have something to tell, each with the stem of its files."""

    info: StageInfo
    rows: list[tuple[str, Row]]

    @property
    def folder(self) -> str:
        return folder.safe_name(self.info.name)


def write(
    engine: Engine,
    stage: str | None,
    filter: str | None,
    into: Path,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Sheets | None:
    """Write the CSVs of runs below a folder; None where no run fulfils the filter.

    Raises InputError for a stage, a filter or a folder that will not do, for stems that two runs would share, and for
    files that exist unless `force`: then each is replaced, and others beside them stay. Raises RnnqError where the disk
    fails: then no file is half-written.
    """
    rows = runs.find(engine, stage, filter)
    if not rows:
        return None
    infos = runs.stage_infos(engine)
    begun = [row for row in rows if row["state"] == "done" or row["steps_done"]]
    alike = _alike(rows if filter is None else runs.find(engine, stage))
    stages = [_stage_of(infos[name], begun, alike) for name in dict.fromkeys(row["stage"] for row in rows)]
    _refuse(stages, into, force)
    made = Sheets()
    if len(rows) > len(begun):
        made.remarks.append(f"{len(rows) - len(begun):,} of {len(rows):,} runs have no numbers yet: no file")
    aside = into / f".sheets.{os.getpid()}.part"
    try:
        _write_all(engine, [one for one in stages if one.rows], aside, made, progress, len(begun))
        made.paths = _put_in_place(aside, into)
    except OSError as error:
        raise RnnqError(f"{into} could not be written: {error.strerror}", "no file is half-written") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return made


# -------------------------------------------------------------------------------------------------------------- stems


def _alike(every: Sequence[Row]) -> Counter[tuple[str, ...]]:
    """How many runs there are of each group, in each stage, with each label."""
    return Counter(map(_called, every))


def _called(row: Row) -> tuple[str, ...]:
    return row["stage"], row["group_key"], row["label"]


def _stage_of(info: StageInfo, begun: Sequence[Row], alike: Mapping[tuple[str, ...], int]) -> _Stage:
    """Runs of a group that are called alike have their seed behind the label, whichever of them are written."""
    own = [row for row in begun if row["stage"] == info.name]
    return _Stage(info, [(_stem_of(row, alike[_called(row)]), row) for row in own])


def _stem_of(row: Row, alike: int) -> str:
    return file_stem(f"{row['label']}_{row['seed']}" if alike > 1 else str(row["label"]))


def _refuse(stages: Sequence[_Stage], into: Path, force: bool) -> None:
    """Raise InputError with all that speaks against writing."""
    problems = [problem for one in stages for problem in _problems(one)]
    if problems:
        more = len(problems) - MOST
        shown = problems if more <= 0 else [*problems[:MOST], f"... and {more} more"]
        raise InputError(shown, "--stage and --filter choose runs; `rnnq export curves` has all in one table")
    if into.exists() and not into.is_dir():
        raise InputError(f"{into} is a file", "name a folder")
    names = [f"{one.folder}/{name}.csv" for one in stages for name, _ in one.rows]
    there = [name for name in names if (into / name).exists()]
    if there and not force:
        what = there[0] if len(there) == 1 else f"{there[0]} and {len(there) - 1:,} more"
        raise InputError(f"{into} has {what} already", "--force replaces them; or name another folder")


def _problems(stage: _Stage) -> list[str]:
    """Stems that runs share, also where upper and lower case are one; labels of which nothing is left; no losses."""
    by_stem: dict[str, list[Row]] = {}
    for name, row in stage.rows:
        by_stem.setdefault(name.lower(), []).append(row)
    found = [f"stage {stage.info.name}: {_listed(rows)} would share {_stem_of_first(stage, key)}.csv"
             for key, rows in by_stem.items() if len(rows) > 1]  # fmt: skip
    found += [f"stage {stage.info.name}: nothing is left of the label {row['label']!r} of run {row['id']}"
              for name, row in stage.rows if not name.strip("_")]  # fmt: skip
    known = {str(metric["name"]) for metric in stage.info.metrics}
    if not known & {TRAINING, VALIDATION}:
        found.append(f"stage {stage.info.name}: its family measures neither {TRAINING} nor {VALIDATION}")
    return found


def _stem_of_first(stage: _Stage, key: str) -> str:
    return next(name for name, _ in stage.rows if name.lower() == key)


def _listed(rows: Sequence[Row]) -> str:
    shown = [f"run {row['id']} ({row['label']}, seed {row['seed']})" for row in rows[:3]]
    return ", ".join(shown) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")


# ------------------------------------------------------------------------------------------------------------- writing


def _write_all(
    engine: Engine, stages: Sequence[_Stage], aside: Path, made: Sheets, progress: Progress, total: int
) -> None:
    for stage in stages:
        place = aside / stage.folder
        place.mkdir(parents=True)
        columns = None if stage.info.family_in_source else families.find_columns(stage.info.family)
        writer = _Writer(stage.info.primary, columns)
        for name, row in stage.rows:
            _write_run(engine, row["id"], place / name, writer, made)
            made.runs += 1
            progress("writing runs", made.runs, total)


@dataclass(frozen=True)
class _Writer:
    """What a family adds to the columns: nothing, for most."""

    primary: str
    columns: ModuleType | None

    def names(self, config: Config | None) -> list[str]:
        own = [*self.columns.COLUMNS] if self.columns and config is not None else []
        return ["step", "training_loss", "validation_loss", *own, "optimizer_step", "state"]

    def meaning(self, config: Config | None) -> dict[str, str]:
        """What each column means."""
        own = {"step": self.columns.STEP, **self.columns.COLUMNS} if self.columns and config is not None else {}
        known = MEANING | own
        return {name: known[name] for name in self.names(config)}

    def cells(self, config: Config | None, step: int) -> list[Any]:
        """The step that the table counts by, and what the family counts."""
        if self.columns is None or config is None:
            return [step]
        return [self.columns.micro_batches(config, step), *self.columns.cells(config, step)]

    def final(self, row: Row) -> dict[str, Any]:
        """What a finished run is known by. The primary metric is the indexed column."""
        known = dict(row["summary"] or {}) | ({} if row["loss"] is None else {self.primary: row["loss"]})
        return known if row["state"] == "done" else {}

    def config_of(self, row: Row) -> Config | None:
        return None if self.columns is None else check(self.columns.Config, row["config"])[0]


def _write_run(engine: Engine, run: int, path: Path, writer: _Writer, made: Sheets) -> None:
    row = runs.show(engine, run)  # its state and its points are of one moment
    config = writer.config_of(row)
    if writer.columns and config is None:
        made.remarks.append(f"run {run}: its config is not of this version: its steps are the optimiser's")
    with path.with_name(path.name + ".csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(writer.names(config))
        for step, training, validation in rows_of(row["curves"], row["steps_done"] or 0, writer.final(row)):
            first, *counted = writer.cells(config, step)
            table.writerow([first, _loss(training), _loss(validation), *counted, step, row["state"]])
    about = json.dumps(_about(row, path.name, writer, config), indent=2, allow_nan=False)
    path.with_name(path.name + ".json").write_text(about + "\n", encoding="utf-8")
    made.partial += row["state"] != "done"


def rows_of(
    curves: Mapping[str, Sequence[tuple[int, float | None]]], last: int, final: Mapping[str, Any]
) -> list[tuple[int, float | None, float | None]]:
    """Optimiser step, training and validation loss: a row for each evaluation, and always one for the last step.

    A run that has no evaluations has a row for each training loss. `final` is what a finished run is known by: the last
    row's losses where no curve has them.
    """
    training, validation = dict(curves.get(TRAINING, ())), dict(curves.get(VALIDATION, ()))
    last = max([last, *training, *validation])
    logged, at, latest = sorted(training.items()), 0, None
    found: list[tuple[int, float | None, float | None]] = []
    for step in sorted({*(validation or training), last}):
        while at < len(logged) and logged[at][0] <= step:
            latest, at = logged[at][1], at + 1
        found.append((step, latest, validation.get(step)))
    step, trained, measured = found[-1]
    found[-1] = (
        step,
        final.get(TRAINING) if trained is None else trained,
        final.get(VALIDATION) if measured is None else measured,
    )
    return found


def _loss(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _about(row: Row, name: str, writer: _Writer, config: Config | None) -> dict[str, Any]:
    return {
        "run": row["id"],
        "stage": row["stage"],
        "label": row["label"],
        "stem": name,
        "family": row["family"],
        "seed": row["seed"],
        "fingerprint": row["fingerprint"],
        "state": row["state"],
        "complete": row["state"] == "done",
        "steps_done": row["steps_done"],
        "budget": row["budget"],
        "message": row["message"],
        "config": row["config"],
        "summary": row["summary"],
        "columns": writer.meaning(config),
    }


def _put_in_place(aside: Path, into: Path) -> list[Path]:
    """A whole folder at once where there is none yet; else file by file, each of them replaced in one step."""
    made = []
    for stage in sorted(aside.iterdir()) if aside.exists() else []:
        target = into / stage.name
        if not target.exists():
            stage.rename(target)
        else:
            for file in sorted(stage.iterdir()):
                file.replace(target / file.name)
        made.append(target)
    return made
