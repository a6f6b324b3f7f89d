"""The results tree of a stage: a folder for each experiment, one for each seed, and what they come to.

    {stage}_{time}/sweep_metadata.yaml, sweep_summary.yaml
                   configs/{experiment}_config.yaml
                   {experiment}/experiment_summary.yaml
                   {experiment}/seed_0/        a run's folder (see folder.py), and in it
                                               run_summary.yaml, or error_summary.yaml of a run that failed

An experiment is a group of runs, called by its label; its seeds are its runs. The layout is that of the sequential-
composition studies, and any family has it. Everything is written aside and then renamed: there is a whole tree or none.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from rnnq import checkpoint, db, families, folder, runs
from rnnq.checkpoint import Owner, Saved
from rnnq.config import Config, check
from rnnq.definitions import yaml
from rnnq.errors import InputError, RnnqError
from rnnq.folder import Account, moment, number, safe_name
from rnnq.runs import StageInfo

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
RESERVED = ("configs", "sweep_metadata.yaml", "sweep_summary.yaml")  # no experiment's folder is called so
STD = "population: the root of the mean squared distance from the mean, divided by n"


@dataclass
class Experiment:
    """A group of runs, and what is told of them."""

    name: str  # of its folder
    label: str
    rows: list[Row]
    details: list[dict[str, Any]] = field(default_factory=list)  # of runs that have ended


@dataclass(frozen=True)
class Tree:
    """What was written."""

    path: Path
    experiments: int
    runs: int
    unfinished: int  # of them, runs that have not ended: they are counted, and have no folder
    remarks: list[str]


def write(
    engine: Engine,
    stage: str | None,
    filter: str | None,
    into: Path,
    weights: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Tree | None:
    """Write the tree of a stage below a folder; None where no run fulfils the filter.

    Raises InputError for a stage, a filter or a folder that will not do, and RnnqError where the disk or a checkpoint
    fails: then nothing is left.
    """
    info = _stage(engine, stage)
    rows = runs.find(engine, info.name, filter)
    if not rows:
        return None
    experiments = _experiments(runs.groups(rows))
    try:
        into.mkdir(parents=True, exist_ok=True)
        target = folder.made_now(into, safe_name(info.name))
    except OSError as error:
        raise InputError(f"{into}: {error.strerror}", "name a folder that may be written") from error
    # the empty folder holds the name, and the whole tree takes its place
    aside = into / f".{target.name}.{os.getpid()}.part"
    try:
        writer = _Writer(engine, info, aside, weights, progress, sum(len(one.rows) for one in experiments))
        writer.write(experiments)
        aside.rename(target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        target.rmdir()
        if isinstance(error, OSError):
            raise RnnqError(f"{target} could not be written: {error.strerror}", "nothing is left of it") from error
        raise
    return Tree(target, len(experiments), len(rows), writer.unfinished, writer.remarks)


def _stage(engine: Engine, stage: str | None) -> StageInfo:
    if stage is not None:
        return runs.stage_info(engine, stage)
    infos = runs.stage_infos(engine)
    if len(infos) != 1:
        known = ", ".join(infos) or "none: `rnnq init` adds one"
        raise InputError(f"there are {len(infos)} stages ({known}): which one?", "--stage NAME")
    return next(iter(infos.values()))


def _experiments(groups: Mapping[str, Sequence[Row]]) -> list[Experiment]:
    """Groups by names that are good for folders, and differ also where upper and lower case are one."""
    taken = {name.lower() for name in RESERVED}
    found = []
    for rows in groups.values():
        plain = safe_name(rows[0]["label"])
        names = [plain, *(f"{plain}_{again}" for again in range(2, len(groups) + 4))]
        name = next(name for name in names if name.lower() not in taken)
        taken.add(name.lower())
        found.append(Experiment(name, rows[0]["label"], list(rows)))
    return found


def _model(info: StageInfo) -> type[Config] | None:
    """The config class of the family, where it is at hand: one in a definition file is not executed for a tree."""
    if info.family_in_source:
        return None
    try:
        return families.find_config(info.family)
    except InputError:
        return None


class _Writer:
    """Writes a tree, and keeps count."""

    def __init__(
        self, engine: Engine, info: StageInfo, path: Path, weights: bool, progress: Progress, total: int
    ) -> None:
        self.engine, self.info, self.path, self.weights = engine, info, path, weights
        self.progress, self.total, self.done = progress, total, 0
        self.study, _, self.root = db.study(engine)
        self.seconds = runs.seconds(engine, info.name)
        self.model = _model(info)
        self.unfinished = 0
        self.remarks: list[str] = []

    def write(self, experiments: Sequence[Experiment]) -> None:
        """All of it. Raises OSError, CheckpointError."""
        (self.path / "configs").mkdir(parents=True)
        self._yaml("sweep_metadata.yaml", self._metadata(experiments))
        for one in experiments:
            self._experiment(one)
        self._yaml("sweep_summary.yaml", self._summary(experiments))

    def _yaml(self, name: str, content: Mapping[str, Any]) -> None:
        (self.path / name).write_text(yaml.dump(content), encoding="utf-8")

    def _metadata(self, experiments: Sequence[Experiment]) -> dict[str, Any]:
        created = min(row["created_at"] for one in experiments for row in one.rows)
        return {
            "sweep_name": self.info.name,
            "base_config_file": None,  # its values are in each config; the definition names it
            "definition": self.info.source,
            "definition_sha256": self.info.source_sha256,
            "family": self.info.family,
            "study": self.study,
            "n_seeds": max(len(one.rows) for one in experiments),
            "n_experiments": len(experiments),
            "total_runs": sum(len(one.rows) for one in experiments),
            "created_at": moment(created),
            "exported_at": moment(time.time()),
            "experiments": [one.name for one in experiments],
        }

    def _experiment(self, one: Experiment) -> None:
        without = {n: v for n, v in one.rows[0]["config"].items() if n not in self.info.seed_fields}
        self._yaml(f"configs/{one.name}_config.yaml", {"family": self.info.family, **without})
        (self.path / one.name).mkdir()
        seeds: set[str] = set()
        for row in one.rows:
            self._run(one, row["id"], seeds)
            self.done += 1
            self.progress("writing runs", self.done, self.total)
        self._yaml(f"{one.name}/experiment_summary.yaml", self._experiment_summary(one))

    def _run(self, one: Experiment, run: int, seeds: set[str]) -> None:
        """A run's folder. One that has not ended has none, and is only counted."""
        row = runs.show(self.engine, run)
        if row["state"] not in ("done", "failed"):
            self.unfinished += row["state"] not in ("cancelled", "skipped")
            return
        name = f"seed_{row['seed']}"
        name = name if name not in seeds else f"{name}_run_{run}"  # another seed field tells them apart
        seeds.add(name)
        place = self.path / one.name / name
        folder.write(place, self._account(row))
        told = self._told(one, row, f"{one.name}/{name}")
        one.details.append(told)
        kind = "run_summary" if row["state"] == "done" else "error_summary"
        self._yaml(f"{one.name}/{name}/{kind}.yaml", told)
        if self.weights and row["state"] == "done":
            self._weights(place, row)

    def _account(self, row: Row) -> Account:
        points = [(name, step, value) for name, curve in row["curves"].items() for step, value in curve]
        last = row["attempts"][-1] if row["attempts"] else {}
        names = ("device", "host", "git_commit", "git_dirty", "versions", "numerics", "exact")
        more = {
            "status": "completed" if row["state"] == "done" else "failed",
            "run": row["id"],
            "stage": row["stage"],
            "family": row["family"],
            "fingerprint": row["fingerprint"],
            "label": row["label"],
            "final_step": row["steps_done"],
            "budget": row["budget"],
            "attempt": row["attempt"],
            "seconds": self.seconds.get(row["id"]),
            "checkpoint": row["checkpoint"],
            "started_at": moment(row["started_at"]),
            "completed_at": moment(row["ended_at"]),
            **{name: last.get(name) for name in names},
        }
        model = None if self.model is None else check(self.model, row["config"])[0]
        return Account(self.info.family, self.info.primary, row["config"], points, self._final(row), more, model)

    def _final(self, row: Row) -> dict[str, Any]:
        """The numbers that a run is known by. The primary one is the indexed column."""
        summary = dict(row["summary"] or {})
        return summary | ({} if row["loss"] is None else {self.info.primary: row["loss"]})

    def _told(self, one: Experiment, row: Row, place: str) -> dict[str, Any]:
        head = {"experiment_name": one.name, "run": row["id"], "seed": row["seed"]}
        if row["state"] == "failed":
            why = {"error": row["message"], "cause": row["cause"], "failed_at": moment(row["ended_at"])}
            return {**head, "status": "failed", "seed_dir": place, **why}
        final = self._final(row)
        return {
            **head,
            "status": "completed",
            "seed_dir": place,
            "final_train_loss": folder.final_loss(final, self.info.primary),
            "final_val_loss": number(final.get("val_loss")),
            "training_time": self.seconds.get(row["id"]),
            "final_step": row["steps_done"],
            "completed_at": moment(row["ended_at"]),
            "metrics": {name: float(value) for name, value in final.items() if number(value) is not None},
        }

    def _weights(self, place: Path, row: Row) -> None:
        owner = Owner(self.study, row["stage"], row["id"], row["fingerprint"])
        kinds = {"final_model": row["checkpoint"], "best_model": row["checkpoint_best"]}
        for name, saved in kinds.items():
            if saved is None:
                continue
            state = checkpoint.load(self.root, Saved(**saved), owner)
            # the best may be the last, which holds all that training needs
            parts = state["members"] if name == "final_model" or "members" in state else state
            folder.write_weights(place, name, parts["params"], parts.get("carried") or {})
        if row["checkpoint"] is None:
            self.remarks.append(f"run {row['id']} has no checkpoint: its weights are not there")
        for one in row["artifacts"]:
            if one["kind"] == "snapshot":
                saved = Saved(one["path"], one["step"], one["sha256"], one["bytes"])
                folder.write_snapshot(place, one["step"], checkpoint.load(self.root, saved, owner)["params"])
        folder.join_snapshots(place)

    # --------------------------------------------------------------------------------------------- summaries

    def _experiment_summary(self, one: Experiment) -> dict[str, Any]:
        ended = [detail.get("completed_at") or detail.get("failed_at") for detail in one.details]
        return {
            "experiment_name": one.name,
            "label": one.label,
            "experiment_completed_at": max(filter(None, ended), default=None),
            "total_seeds": len(one.rows),
            **_counts(one.details, len(one.rows)),
            **_statistics(one.details),
            "run_details": one.details,
        }

    def _summary(self, experiments: Sequence[Experiment]) -> dict[str, Any]:
        details = [detail for one in experiments for detail in one.details]
        total = sum(len(one.rows) for one in experiments)
        counts = _counts(details, total)
        ended = [detail.get("completed_at") or detail.get("failed_at") for detail in details]
        return {
            "sweep_completed_at": max(filter(None, ended), default=None) if len(details) == total else None,
            "total_experiments": len(experiments),
            "total_runs": total,
            "total_successful_runs": counts["successful_runs"],
            "total_failed_runs": counts["failed_runs"],
            "total_other_runs": counts["other_runs"],
            "overall_success_rate": counts["success_rate"],
            "std": STD,
            "experiment_statistics": {one.name: _in_short(one) for one in experiments},
        }


def _in_short(one: Experiment) -> dict[str, Any]:
    losses = {name: stats for name, stats in _statistics(one.details).items() if name != "metric_stats"}
    return {"total_runs": len(one.rows), **_counts(one.details, len(one.rows)), **losses}


def _counts(details: Sequence[Mapping[str, Any]], total: int) -> dict[str, Any]:
    done = sum(detail["status"] == "completed" for detail in details)
    return {
        "successful_runs": done,
        "failed_runs": len(details) - done,
        "other_runs": total - len(details),  # not ended yet, cancelled, or skipped
        "success_rate": done / total,
    }


def _statistics(details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the finished seeds, of the two losses and of every metric; nothing of what none has."""
    done = [detail for detail in details if detail["status"] == "completed"]
    found = {
        "train_loss_stats": _stats([one["final_train_loss"] for one in done]),
        "val_loss_stats": _stats([one["final_val_loss"] for one in done]),
    }
    names = dict.fromkeys(name for one in done for name in one["metrics"])
    every = {name: _stats([one["metrics"].get(name) for one in done]) for name in names}
    return {name: stats for name, stats in found.items() if stats} | ({"metric_stats": every} if every else {})


def _stats(values: Sequence[float | None]) -> dict[str, Any] | None:
    """n is how many seeds have the number; std is that of the population, as in the original summaries."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {
        "n": len(known),
        "mean": statistics.fmean(known),
        "std": statistics.pstdev(known),
        "std_sample": statistics.stdev(known) if len(known) > 1 else None,
        "min": min(known),
        "max": max(known),
        "median": statistics.median(known),
    }
