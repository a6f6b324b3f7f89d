"""A study in Python: `rnnq.load("experiments.db")` gives its runs, groups and curves as pandas data frames.

Everything is read in short transactions that take no lock, so that workers go on beside it.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import sqlalchemy as sa
from pandas import DataFrame, Series
from sqlalchemy import Engine, text

from rnnq import db, frame, runs, status, tables
from rnnq.errors import InputError, nearest
from rnnq.runs import StageInfo

BATCH = 500  # runs whose curves are read at once: a transaction stays short, and memory bounded
STATISTICS = ("mean", "std", "n", "min", "max")

# what a frame of runs has beside config fields and metrics: before them, and after them
HEAD = ("id", "stage", "family", "label", "state", "seed")
TAIL = (
    *("steps_done", "budget", "seconds", "attempt", "failures", "cause", "message", "note", "tags"),
    *("created_at", "started_at", "ended_at", "worker", "checkpoint", "checkpoint_best"),
    *("start_from", "group_key", "fingerprint", "source", "source_sha256"),
)
ADDED = ("seconds", "tags")  # of these, the ones that no column of the table holds
METRIC = "summary."  # before the name of a metric that would hide another column

Row = dict[str, Any]


def load(path: str | Path = "experiments.db") -> Study:
    """Open a study for reading: a database file, or its address. Raises InputError as the command line does."""
    return Study(db.open(str(path)))


# ----------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Selection:
    """The runs that a stage's name and a filter select, by stage in the order in which these were made."""

    parts: list[tuple[StageInfo, list[Row]]]

    @property
    def total(self) -> int:
        """How many runs."""
        return sum(len(rows) for _, rows in self.parts)

    def check_metrics(self, names: Sequence[str], also: Sequence[str] = ()) -> None:
        """Raises InputError for names that no stage here has as a metric; `also` are others that would do."""
        known = {str(metric["name"]) for info, _ in self.parts for metric in info.metrics} | {"loss", *also}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(
                [f"there is no metric {name!r} in {self._names()}" for name in unknown], nearest(unknown[0], known)
            )

    def _names(self) -> str:
        names = [info.name for info, _ in self.parts]
        return f"stage {names[0]}" if len(names) == 1 else "any stage"


def select(engine: Engine, stage: str | None = None, filter: str | None = None) -> Selection:
    """Find runs. A stage without such runs is there, too, with its columns. Raises InputError."""
    rows = runs.find(engine, stage, filter)
    infos = runs.stage_infos(engine)
    by_stage: dict[str, list[Row]] = {name: [] for name in infos if stage in (None, name)}
    for row in rows:
        if row["stage"] in by_stage:  # else it was deleted just now
            by_stage[row["stage"]].append(row)
    return Selection([(infos[name], found) for name, found in by_stage.items()])


# -------------------------------------------------------------------------------------------------------- frames


def runs_of(engine: Engine, selection: Selection, metrics: Sequence[str] = ()) -> DataFrame:
    """Runs, one a row; the columns of all their stages united. `metrics` are the ones wanted; empty: all.

    Columns: HEAD, `config.<field>`, `loss` (the family's primary metric), the other metrics and numbers of a summary,
    TAIL. `seconds` is the time trained, over all attempts that have ended.
    """
    selection.check_metrics(metrics)
    parts = []
    for info, rows in selection.parts:
        found = frame.of_rows(rows, info).rename(columns={name: METRIC + name for name in ADDED})
        seconds = runs.seconds(engine, info.name)
        if metrics:
            others = {_column(info, str(metric["name"])) for metric in info.metrics} | set(_metric_columns(found))
            found = found.drop(columns=list((others - {_column(info, name) for name in metrics}) & {*found.columns}))
        found = found.assign(seconds=[seconds.get(row["id"]) for row in rows])
        parts.append(found.assign(tags=[",".join(row["tags"]) or None for row in rows]))
    loss = () if metrics and not any("loss" in part.columns for part in parts) else ("loss",)
    config, others_of = _config_columns(parts), list(dict.fromkeys(n for part in parts for n in _metric_columns(part)))
    return united(parts, [*HEAD, *config, *loss, *others_of, *TAIL], _kinds(selection))


def groups_of(engine: Engine, selection: Selection, metrics: Sequence[str] = ()) -> DataFrame:
    """Groups (runs that are equal but for their seeds), one a row, in the order of their first runs.

    Columns: stage, id (of the first run), label, `config.<field>` without seeds, of (runs of the group, whatever the
    filter), group_key; and for each metric its mean, std (n - 1), n, min and max over the finished runs that were
    selected, as `<metric>.mean` and so on. Without `metrics`, those of all metrics.
    """
    selection.check_metrics(metrics)
    parts = [_groups(engine, info, rows, metrics) for info, rows in selection.parts]
    config = _config_columns(parts)
    numbers = [n for p in parts for n in p.columns if n.rpartition(".")[2] in STATISTICS and n not in config]
    names = ["stage", "id", "label", *config, "of", *dict.fromkeys(numbers), "group_key"]
    return united(parts, names, {**_kinds(selection), "of": "int"} | {n: _kind_of(n) for n in numbers})


def _groups(engine: Engine, info: StageInfo, rows: list[Row], metrics: Sequence[str]) -> DataFrame:
    of_runs = frame.of_rows(rows, info)
    declared = [str(metric["name"]) for metric in info.metrics]
    wanted = [info.primary if name == "loss" else name for name in metrics] or declared
    found = frame.groups_frame(of_runs, info, info.primary).drop(columns=[*STATISTICS, "runs"])
    for name in dict.fromkeys(wanted):
        if name in declared:  # another stage's metric has no column here
            numbers = frame.groups_frame(of_runs, info, name)[list(STATISTICS)]
            found = found.join(numbers.add_prefix(f"{frame.column(info, name)}."))
    sizes = _group_sizes(engine, info.name)
    return found.assign(stage=info.name, of=[sizes.get(key, 0) for key in found["group_key"]])


def _kind_of(statistic: str) -> str:
    return "int" if statistic.endswith(".n") else "float"


def curves_of(engine: Engine, selection: Selection, names: Sequence[str] = ()) -> Iterator[tuple[int, DataFrame]]:
    """The curves of runs, BATCH runs at a time: how many runs, and their points. At least one, maybe empty, frame.

    Columns: run, stage, label, seed, name, step, value (NaN where it was not finite). Without `names`, all curves;
    `loss` also means the family's primary metric. Raises InputError for a name that there is not.
    """
    metrics = _metric_ids(engine)
    selection.check_metrics(names, list(metrics))
    return _curve_pieces(engine, selection, metrics, names)


def _curve_pieces(
    engine: Engine, selection: Selection, metrics: Mapping[str, int], names: Sequence[str]
) -> Iterator[tuple[int, DataFrame]]:
    yield 0, _points_frame([], {}, {})
    for info, rows in selection.parts:
        wanted = {*names, *([info.primary] if "loss" in names else [])} or set(metrics)
        chosen = {number: name for name, number in metrics.items() if name in wanted}
        for start in range(0, len(rows), BATCH):
            batch = {row["id"]: row for row in rows[start : start + BATCH]}
            yield len(batch), _points_frame(_points(engine, list(batch), list(chosen)), batch, chosen)


def _points(engine: Engine, ids: list[int], metrics: list[int]) -> Sequence[Any]:
    sql = """SELECT run_id, metric_id, step, value FROM point WHERE run_id IN :ids AND metric_id IN :m
             ORDER BY run_id, metric_id, step"""
    asked = text(sql).bindparams(sa.bindparam("ids", ids, expanding=True), sa.bindparam("m", metrics, expanding=True))
    with db.reading(engine) as connection:
        return connection.execute(asked).all()


def _points_frame(points: Sequence[Any], batch: Mapping[int, Row], names: Mapping[int, str]) -> DataFrame:
    run, metric, step, value = zip(*points, strict=True) if points else ((), (), (), ())
    kinds = {"stage": "str", "label": "str", "seed": "int"}
    of_runs = DataFrame({name: series([row[name] for row in batch.values()], kind) for name, kind in kinds.items()})
    of_runs.index = pd.Index(list(batch), dtype="int64")
    called = Series(list(names.values()), index=pd.Index(list(names), dtype="int64"), dtype="str")
    columns = {"run": Series(run, dtype="int64")}
    columns |= {name: of_runs[name].loc[columns["run"]].reset_index(drop=True) for name in kinds}
    columns["name"] = called.loc[list(metric)].reset_index(drop=True)
    return DataFrame(columns | {"step": Series(step, dtype="int64"), "value": Series(value, dtype=float)})


def united(parts: Sequence[DataFrame], names: Sequence[str], kinds: Mapping[str, str]) -> DataFrame:
    """Frames one below the other. `names` are the columns; where a frame lacks one, its rows are empty there.

    pandas.concat would make floats of the integers of a column that another frame lacks.
    """
    columns: dict[str, list[Any]] = {name: [] for name in dict.fromkeys(names)}
    for part in parts:
        for name, values in columns.items():
            values += _values(part[name]) if name in part.columns else [None] * len(part)
    return DataFrame({name: series(values, kinds.get(name, "str")) for name, values in columns.items()})


def _values(column: Series) -> list[Any]:
    return [None if missing else value for value, missing in zip(column.tolist(), column.isna().tolist(), strict=True)]


def series(values: Sequence[Any], kind: str) -> Series:
    """A column whose type is that of its values; `kind` is what it was declared as, for one without values.

    Integers stay integers and booleans booleans: with a gap in them, they are of pandas' nullable types.
    """
    if not values and kind == "str":
        return Series([], dtype="str")
    present = {type(value) for value in values if value is not None}
    gaps = any(value is None for value in values)
    if not present:
        present = {{"int": int, "float": float, "bool": bool}.get(kind, str)}
    if present == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return Series(values, dtype="Int64" if gaps else "int64")
    if present == {bool}:
        return Series(values, dtype="boolean" if gaps else "bool")
    if float in present and present <= {int, float}:
        return Series(values, dtype=float)
    return Series(values, dtype=object).infer_objects()


def _column(info: StageInfo, metric: str) -> str:
    """The column of a metric in a frame of runs."""
    name = frame.column(info, metric if metric != "loss" else info.primary)
    return METRIC + name if name in ADDED else name


def _config_columns(parts: Sequence[DataFrame]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part.columns if name.startswith(frame.CONFIG)))


def _metric_columns(part: DataFrame) -> list[str]:
    """All metrics and numbers of summaries but the primary metric."""
    known = {*frame.COLUMNS, *HEAD, *TAIL}
    return [name for name in part.columns if name not in known and not name.startswith(frame.CONFIG)]


def _kinds(selection: Selection) -> dict[str, str]:
    """What each column was declared as."""
    found = {"seconds": "float", "tags": "str"}
    for name, column in tables.runs.columns.items():
        number = "int" if isinstance(column.type, sa.Integer) else "float" if isinstance(column.type, sa.Double) else ""
        found[name] = number or "str"
    for info, _ in selection.parts:
        found |= {frame.CONFIG + name: kind for name, kind in info.fields.items()}
        found |= {_column(info, str(metric["name"])): "float" for metric in info.metrics}
    return found


# ----------------------------------------------------------------------------------------------------------- SQL


def _group_sizes(engine: Engine, stage: str) -> dict[str, int]:
    sql = """SELECT group_key, count(*) AS n FROM runs WHERE stage = :stage
             AND intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete) GROUP BY group_key"""
    with db.reading(engine) as connection:
        return {row.group_key: row.n for row in connection.execute(text(sql), {"stage": stage})}


def _metric_ids(engine: Engine) -> dict[str, int]:
    with db.reading(engine) as connection:
        return {row.name: row.id for row in connection.execute(text("SELECT id, name FROM metrics ORDER BY id"))}


def _best(engine: Engine, info: StageInfo) -> float | None:
    best = "max" if info.metric(info.primary)["better"] == "max" else "min"
    sql = f"""SELECT {best}(loss) FROM runs WHERE stage = :stage AND state = 'done'
              AND intake IN (SELECT id FROM intakes WHERE stage = :stage AND complete)"""
    with db.reading(engine) as connection:
        found = connection.execute(text(sql), {"stage": info.name}).scalar()
    return None if found is None else float(found)


# --------------------------------------------------------------------------------------------------------- Study


class Study:
    """A study, open for reading. Use it with `with`, or close it; a notebook may simply keep it.

    A frame has config fields as `config.<field>`, `loss` for the family's primary metric, and other metrics by name.
    Without a stage's name it has the runs of all stages. Filters are those of the command line.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._path = db.shown(engine)

    @property
    def engine(self) -> Engine:
        """The database, for SQL of one's own. Raises InputError when the study is closed."""
        if self._engine is None:
            raise InputError(f"the study {self._path} is closed", "rnnq.load opens it again")
        return self._engine

    def close(self) -> None:
        """Let go of the database file."""
        if self._engine is not None:
            self._engine.dispose()
        self._engine = None

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stages(self) -> DataFrame:
        """Stages, oldest first: family, runs in each state, the primary metric with its unit, and the best of it."""
        infos = runs.stage_infos(self.engine)
        rows = []
        for found in status.stages(self.engine):
            if found.stage in infos:  # else it was added just now
                rows.append(_stage_row(self.engine, infos[found.stage], found))
        names = ["stage", "family", "runs", *tables.STATES, "metric", "unit", "better", "best"]
        kinds = dict.fromkeys(["runs", *tables.STATES], "int") | {"best": "float"}
        return DataFrame({name: series([row[name] for row in rows], kinds.get(name, "str")) for name in names})

    def runs(self, stage: str | None = None, filter: str | None = None) -> DataFrame:
        """Runs, one a row, by stage and id: see `runs_of`. Raises InputError."""
        return runs_of(self.engine, select(self.engine, stage, filter))

    def groups(self, stage: str | None = None, filter: str | None = None, by: str | None = None) -> DataFrame:
        """Groups of runs that are equal but for their seeds, the best mean first, stage by stage.

        `mean`, `std`, `n`, `min` and `max` are of the metric `by` (default: the family's primary one) over the
        finished runs that the filter selects; `of` counts all runs of the group. Raises InputError.
        """
        selection = select(self.engine, stage, filter)
        selection.check_metrics([by or "loss"])
        parts = [part for info, rows in selection.parts if (part := self._ranked(info, rows, by)) is not None]
        names = ["stage", "id", "label", *_config_columns(parts), "of", "n", "mean", "std", "min", "max", "group_key"]
        numbers = {"of": "int", "n": "int"} | dict.fromkeys(["mean", "std", "min", "max"], "float")
        return united(parts, names, _kinds(selection) | numbers)

    def _ranked(self, info: StageInfo, rows: list[Row], by: str | None) -> DataFrame | None:
        """The groups of a stage, best first; None where the stage has no such metric."""
        name = info.primary if by in (None, "loss") else by
        metric = next((metric for metric in info.metrics if metric["name"] == name), None)
        if metric is None:
            return None
        found = _groups(self.engine, info, rows, [str(name)])
        found = found.rename(columns={f"{frame.column(info, str(name))}.{word}": word for word in STATISTICS})
        return found.sort_values(["mean", "id"], ascending=[metric["better"] == "min", True])

    def curves(
        self, stage: str | None = None, names: Sequence[str] | None = None, filter: str | None = None
    ) -> DataFrame:
        """Points of curves, one a row: run, stage, label, seed, name, step, value (NaN where it was not finite).

        `names` are the curves wanted; without it, all. Raises InputError.
        """
        wanted = [names] if isinstance(names, str) else list(names or ())
        selection = select(self.engine, stage, filter)
        return pd.concat([part for _, part in curves_of(self.engine, selection, wanted)], ignore_index=True)

    def run(self, run: int) -> dict[str, Any]:
        """One run whole: its row, config, summary, attempts, lineage and curves, as plain values. Raises InputError."""
        return runs.show(self.engine, run)

    def __repr__(self) -> str:
        if self._engine is None:
            return f"{self._path} (closed)"
        return f"{self._title()}\n{self._overview().to_string(index=False, na_rep='')}"

    def _repr_html_(self) -> str:
        if self._engine is None:
            return f"<p>{html.escape(repr(self))}</p>"
        table = self._overview().to_html(index=False, na_rep="", border=0, escape=True)
        return f"<p>{html.escape(self._title())}</p>\n{table}"

    def _title(self) -> str:
        return f"study {self._path}"

    def _overview(self) -> DataFrame:
        """The stages, without states that no run is in."""
        found = self.stages
        empty = [state for state in tables.STATES if not found[state].any()]
        return found.drop(columns=[*empty, "better"])


def _stage_row(engine: Engine, info: StageInfo, found: status.StageStatus) -> Row:
    metric = info.metric(info.primary)
    counts = {state: found.counts.get(state, 0) for state in tables.STATES}
    same = {"stage": info.name, "family": info.family, "runs": found.total, **counts, "best": _best(engine, info)}
    return {**same, "metric": metric["name"], "unit": metric["unit"], "better": metric["better"]}
