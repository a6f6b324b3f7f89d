"""Runs, groups and curves as pandas data frames, for figures and for notebooks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pandas import DataFrame, Series
from sqlalchemy import Engine

from rnnq import runs
from rnnq.config import as_json
from rnnq.runs import StageInfo
from rnnq.tables import runs as table

CHECKPOINTS = ("checkpoint", "checkpoint_prev", "checkpoint_best")
COLUMNS = tuple(name for name in table.columns.keys() if name not in ("config", "summary"))  # noqa: SIM118
CONFIG = "config."  # before the name of a config field
Row = Mapping[str, Any]


def runs_frame(engine: Engine, stage: str, filter: str | None = None) -> DataFrame:
    """The runs of a stage that a filter selects, one a row, by id. Raises InputError.

    Columns: those of the table, checkpoints as paths; `config.<field>`, nested fields with dots; every number of
    the summaries by its name. A metric of the stage has its column even when no run has it yet. See `column` for a
    metric whose name is taken.
    """
    return of_rows(runs.find(engine, stage, filter), runs.stage_info(engine, stage))


def of_rows(rows: Sequence[Row], info: StageInfo) -> DataFrame:
    """The same from rows that `runs.find` has found."""
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in COLUMNS}
    columns |= {name: [saved["path"] if saved else None for saved in columns[name]] for name in CHECKPOINTS}
    columns["start_from"] = [as_json(start) if start else None for start in columns["start_from"]]
    configs = [flat(row["config"]) for row in rows]
    columns |= {CONFIG + name: [config.get(name) for config in configs] for name in _field_names(configs, info)}
    found = DataFrame({name: Series(values, dtype=object).infer_objects() for name, values in columns.items()})
    found["loss"] = found["loss"].astype(float)
    # all at once: a frame to which a hundred columns were added one by one is slow, and says so
    metrics = DataFrame(_metrics([row["summary"] or {} for row in rows], info), index=found.index)
    return pd.concat([found, metrics], axis=1)


def column(info: StageInfo, metric: str) -> str:
    """The column of a metric: `loss` for the primary one, `summary.<name>` where a run has a column of its name."""
    if metric == info.primary:
        return "loss"
    return f"summary.{metric}" if metric in COLUMNS or metric.startswith(CONFIG) else metric


def value(row: Row, info: StageInfo, metric: str) -> float | None:
    """The same metric of one row that `runs.find` has found."""
    return runs.value_of(row, metric, info.primary)


def varying(rows: DataFrame, info: StageInfo) -> list[str]:
    """The config fields that differ between runs, seeds aside."""
    names = [name.removeprefix(CONFIG) for name in rows.columns if name.startswith(CONFIG)]
    return [n for n in names if n not in info.seed_fields and len(set(map(_key, distinct(rows[CONFIG + n])))) > 1]


def distinct(values: Series) -> list[Any]:
    """Each value at least once. For objects it is all of them: pandas would take 1 and True for one."""
    return list(values if values.dtype == object else values.unique().tolist())


def groups_frame(rows: DataFrame, info: StageInfo, metric: str) -> DataFrame:
    """A frame of runs by group: those that are equal but for their seeds, in the order of their first run.

    Columns: group_key, id (of the first run), label, `config.<field>` without seeds, runs (all of the group), and
    n, mean, std (n - 1), min, max of the metric over the finished ones.
    """
    seeds = {CONFIG + name for name in info.seed_fields}
    same = ["id", "label", *(name for name in rows.columns if name.startswith(CONFIG) and name not in seeds)]
    by_group = rows.groupby("group_key", sort=False)
    done = rows[column(info, metric)].where(rows["state"] == "done")
    values = done.groupby(rows["group_key"], sort=False).agg(["count", "mean", "std", "min", "max"])
    first = rows.drop_duplicates("group_key").set_index("group_key")[same]
    return first.assign(runs=by_group.size(), **values.rename(columns={"count": "n"})).reset_index()


def curves_frame(engine: Engine, stage: str, names: Sequence[str], ids: Sequence[int] | None = None) -> DataFrame:
    """The curves of a stage's runs: run, name, step, value (NaN where it was not finite), in this order.

    With `ids`, of these runs alone.
    """
    frame = DataFrame.from_records(runs.points(engine, stage, names, ids), columns=["run", "name", "step", "value"])
    return frame.astype({"run": "int64", "step": "int64", "value": float})


def flat(config: Row, prefix: str = "") -> dict[str, Any]:
    """A config with nested fields named by dots; a list becomes its JSON text."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return found


def _field_names(configs: Sequence[Row], info: StageInfo) -> list[str]:
    """The fields that the stage declares, then those that only older runs have."""
    return list(dict.fromkeys([*info.fields, *(name for config in configs for name in config)]))


def _metrics(summaries: Sequence[Row], info: StageInfo) -> dict[str, Series]:
    """A column for each metric of the stage, then for each other number of a summary; without the primary one."""
    others = {name for summary in summaries for name, value in summary.items() if _number(value) is not None}
    names = dict.fromkeys([*(str(metric["name"]) for metric in info.metrics), *sorted(others)])
    values = {name: [_number(summary.get(name)) for summary in summaries] for name in names if name != info.primary}
    return {column(info, name): Series(found, dtype=float) for name, found in values.items()}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _key(value: Any) -> tuple[str, Any]:
    """What tells config values apart: 1 and 1.0 are one, 1 and True are two."""
    if value is None or value is pd.NA or value != value:
        return ("", "")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ("number", float(value))
    return (type(value).__name__, str(value))
