"""The filter language, run on real SQLite and PostgreSQL and held against a slow, obvious evaluator."""

from __future__ import annotations

import fnmatch
import json
import operator
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnq import query, tables
from rnnq.databases import postgres as databases
from rnnq.databases import words
from rnnq.errors import InputError
from rnnq.query import COLUMNS, Scope
from tests import postgres

SCOPE = Scope(
    fields={
        "seed": "int",
        "n_layers": "int",
        "lr": "float",
        "cell": "str",
        "use_gate": "bool",
        "model.width": "int",
        "model.tied": "bool",
        "decay": "float",
        "σ": "float",
        "mean": "float",
    },
    metrics=frozenset({"loss", "val_acc", "val/top-5:all", "decay", "step.time"}),
    # lr and n_layers are fields of some stages, and other names for fields of others
    aliases={"layers": ("n_layers",), "lr": ("σ",), "n_layers": ("mean",), "kind": ("cell", "use_gate")},
)
SQL_TYPES = {"int": "BIGINT", "float": "DOUBLE", "str": "TEXT"}


# ------------------------------------------------------------------------------------------ a small table


class Median:
    function: Callable[[list[float]], float] = staticmethod(statistics.median)
    least = 1

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, value: float | None) -> None:
        if value is not None:
            self.values.append(value)

    def finalize(self) -> float | None:
        return self.function(self.values) if len(self.values) >= self.least else None


class Std(Median):
    function = staticmethod(statistics.stdev)
    least = 2


def run_row(id: int, config: dict[str, Any] | None = None, summary: dict[str, Any] | None = None, **columns: Any):
    defaults = {"stage": "s1", "group_key": "g1", "label": f"run{id}", "state": "done", "family": "dynamics"}
    values = {"config": json.dumps(config or {}), "summary": None if summary is None else json.dumps(summary)}
    return defaults | columns | values | {"id": id}


TYPES = {name: SQL_TYPES[kind] for name, kind in COLUMNS.items()} | {"config": "TEXT", "summary": "TEXT"}


def database(*rows: dict[str, Any]) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.create_aggregate("median", 1, Median)
    connection.create_aggregate("std", 1, Std)
    connection.execute(f"CREATE TABLE runs ({', '.join(f'{name} {kind}' for name, kind in TYPES.items())})")
    connection.execute("CREATE TABLE tags (run_id, tag)")
    connection.execute("CREATE TABLE metrics (id, name)")
    connection.execute("CREATE TABLE point (run_id, metric_id, step, value)")
    for row in rows:
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO runs ({', '.join(row)}) VALUES ({marks})", list(row.values()))
    return connection


def in_sqlite(text: str, *rows: dict[str, Any]) -> list[int]:
    condition = query.compile(text, SCOPE)
    connection = database(*rows)
    try:
        sql = f"SELECT id FROM runs WHERE {condition.sql} ORDER BY id"
        return [id for (id,) in connection.execute(sql, dict(condition.params))]
    finally:
        connection.close()


class Postgres:
    """The same small table there, filled anew for each question."""

    def __init__(self, engine: sa.Engine) -> None:
        self.connection = engine.connect()
        columns = ", ".join(f"{name} {kind}" for name, kind in TYPES.items())
        self.connection.execute(sa.text(f"CREATE TEMP TABLE runs ({columns.replace('DOUBLE', 'DOUBLE PRECISION')})"))
        self.connection.execute(sa.text("CREATE TEMP TABLE tags (run_id BIGINT, tag TEXT)"))
        self.connection.execute(sa.text("CREATE TEMP TABLE metrics (id BIGINT, name TEXT)"))
        self.connection.execute(
            sa.text("CREATE TEMP TABLE point (run_id BIGINT, metric_id BIGINT, step BIGINT, value DOUBLE PRECISION)")
        )
        self.connection.commit()

    def __call__(self, text: str, *rows: dict[str, Any]) -> list[int]:
        condition = query.compile(text, SCOPE, words.OF["postgresql"])
        try:
            for row in rows:
                marks = ", ".join(f":{name}" for name in row)
                self.connection.execute(sa.text(f"INSERT INTO runs ({', '.join(row)}) VALUES ({marks})"), row)
            sql = sa.text(f"SELECT id FROM runs WHERE {condition.sql} ORDER BY id")
            return list(self.connection.execute(sql, dict(condition.params)).scalars())
        finally:
            self.connection.rollback()


@pytest.fixture(scope="module")
def found(kind: str) -> Iterator[Callable[..., list[int]]]:
    """The ids of the rows that a filter finds, among rows that are given with it."""
    if kind == "sqlite":
        yield in_sqlite
        return
    url = postgres.fresh()
    engine = databases.open(url)
    there = Postgres(engine)
    yield there
    there.connection.close()
    engine.dispose()
    postgres.drop(url)


def refused(text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        query.compile(text, SCOPE)
    return caught.value


LOSSES = [run_row(1, loss=1.0), run_row(2, loss=2.0), run_row(3, loss=3.0), run_row(4, loss=None)]
TEXTS = [
    run_row(1, {"cell": "lstm"}, label="lstm_5s5a_1"),
    run_row(2, {"cell": "gru"}, label="lstm_5s5a"),
    run_row(3, {"cell": "lstm"}, label="LSTM_5s5a*", state="failed"),
    run_row(4, {"cell": None}, label="x y", state="pending"),
]
FLAGS = [run_row(1, {"use_gate": True}), run_row(2, {"use_gate": False}), run_row(3, {"use_gate": None}), run_row(4)]
GROUPS = [
    run_row(1, {"n_layers": 1}, {"val_acc": 0.5}, loss=1.0, group_key="a"),
    run_row(2, {"n_layers": 1}, {"val_acc": 1.0}, loss=2.0, group_key="a"),
    run_row(3, {"n_layers": 1}, None, loss=6.0, group_key="a"),
    run_row(4, {"n_layers": 2}, {"val_acc": None}, loss=9.0, group_key="b"),
    run_row(5, {"n_layers": 2}, None, loss=None, group_key="b"),
    run_row(6, {"n_layers": 3}, {"val_acc": 0.25}, loss=100.0, group_key="a", stage="s2"),
    run_row(7, {"n_layers": 3}, {}, loss=None, group_key="c"),
]


# ------------------------------------------------------------------------------------- what the house asks


def test_the_states_are_those_of_the_table():
    assert query.STATES == tables.STATES


def test_the_columns_and_their_types_are_those_of_the_table():
    real = {column.name: column.type.python_type.__name__ for column in tables.runs.columns}
    assert {name: real[name] for name in COLUMNS} == COLUMNS


def test_the_columns_that_hold_json_or_belong_to_the_machinery_are_not_names():
    hidden = {"intake", "lost", "config", "summary", "checkpoint", "checkpoint_prev", "checkpoint_best"}
    hidden |= {"source", "source_sha256", "gate", "start_from"}
    assert {column.name for column in tables.runs.columns} - set(COLUMNS) == hidden


def test_importing_the_language_loads_nothing_heavy():
    code = "import sys, rnnq.query; print([m for m in ('sqlalchemy', 'pydantic', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("loss = 2", [2]),
        ("loss == 2", [2]),
        ("loss != 2", [1, 3]),
        ("loss < 2", [1]),
        ("loss <= 2", [1, 2]),
        ("loss > 2", [3]),
        ("loss>=2", [2, 3]),
        ("1 < loss < 3", [2]),
        ("1 <= loss <= 2", [1, 2]),
        ("3 > loss >= 1 != loss", [2]),
        ("2 = loss", [2]),
        ("loss in (1, 3)", [1, 3]),
        ("loss IN(1)", [1]),
        ("loss not in (1, 3)", [2]),
        ("not loss in (1, 3)", [2]),
        ("loss\n<\t2", [1]),
    ],
)
def test_numbers_are_compared(found, text, ids):
    assert found(text, *LOSSES) == ids


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("1e-3", 0.001),
        ("-2", -2),
        ("+2", 2),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5E+1", -5.0),
        ("50_000", 50_000),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("9223372036854775808", 2.0**63),
        ("0" * 5000 + "1", 1.0),
    ],
)
def test_numbers_are_read_in_every_form(number, value):
    for text in (f"steps_done={number}", f"steps_done = {number} ", f"{number}=steps_done"):
        bound = query.compile(text, SCOPE).params["q0"]
        assert bound == value
        assert type(bound) is type(value)


def test_the_largest_seed_is_found_exactly(found):
    rows = [run_row(1, seed=2**63 - 1), run_row(2, seed=2**63 - 2)]
    assert found("seed = 9223372036854775807", *rows) == [1]
    assert found("seed < 9223372036854775808", *rows) == [1, 2]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("label = lstm_5s5a", [2]),
        ('label = "lstm_5s5a"', [2]),
        ("label == 'x y'", [4]),
        ("label != lstm_5s5a", [1, 3, 4]),
        ('label ~ "lstm_5s5a*"', [1, 2]),
        ("label ~ lstm_5s5a*", [1, 2]),
        ("label~lstm_?s[0-9]a", [2]),
        ("label !~ lstm*", [3, 4]),
        ("not label ~ lstm*", [3, 4]),
        ("label = LSTM_5s5a*", [3]),
        ("label in (lstm_5s5a, 'x y')", [2, 4]),
        ("state in (done, failed)", [1, 2, 3]),
        ("state not in (done, 'failed')", [4]),
        ("state = pending", [4]),
        ("state != done", [3, 4]),
        ("state ~ *ed", [3]),
        ("'failed' = state", [3]),
        ("cell = lstm", [1, 3]),
        ("config.cell != lstm", [2]),
        ("cell !~ l*", [2]),
    ],
)
def test_texts_and_states_are_compared(found, text, ids):
    assert found(text, *TEXTS) == ids


def test_a_word_may_look_like_a_path_a_host_or_a_date(found):
    rows = [run_row(1, worker="gpu-b/412:7"), run_row(2, worker="2026-01-31"), run_row(3, worker="1.9and")]
    assert found("worker = gpu-b/412:7", *rows) == [1]
    assert found("worker = 2026-01-31", *rows) == [2]
    assert found("worker = 1.9and", *rows) == [3]


def test_either_kind_of_quote_may_hold_the_other(found):
    rows = [run_row(1, label="it's"), run_row(2, label='a "b"'), run_row(3, label="")]
    assert found('label = "it\'s"', *rows) == [1]
    assert found("label = 'a \"b\"'", *rows) == [2]
    assert found("label = ''", *rows) == [3]


def test_a_keyword_in_quotes_is_a_value(found):
    assert found("label = 'and' or label = \"NOT\"", run_row(1, label="and"), run_row(2, label="NOT")) == [1, 2]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("use_gate", [1]),
        ("not use_gate", [2]),
        ("not not use_gate", [1]),
        ("config.use_gate", [1]),
        ("use_gate = true", [1]),
        ("use_gate = False", [2]),
        ("use_gate != true", [2]),
        ("use_gate in (true, false)", [1, 2]),
        ("use_gate not in (true)", [2]),
    ],
)
def test_a_flag_alone_is_a_condition(found, text, ids):
    assert found(text, *FLAGS) == ids


def test_two_names_are_compared_when_both_are_numbers(found):
    rows = [
        run_row(1, {"n_layers": 3}, {"val_acc": 2.0}, steps_done=5, budget=10, loss=1.0),
        run_row(2, {"n_layers": 2}, {"val_acc": 3.0}, steps_done=10, budget=10, loss=4.0),
        run_row(3, {"n_layers": 2}, None, steps_done=10, budget=None, loss=None),
    ]
    assert found("steps_done < budget", *rows) == [1]
    assert found("n_layers > val_acc", *rows) == [1]
    assert found("loss = min(loss)", *rows) == [1]
    assert found("1 < n_layers <= val_acc", *rows) == [2]


# ----------------------------------------------------------------------------------------- and, or, not


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("loss<3 and loss>1", [2]),
        ("loss=1 or loss=3", [1, 3]),
        ("loss=1 or loss=2 and loss=3", [1]),
        ("(loss=1 or loss=2) and loss=2", [2]),
        ("not loss=1 and loss<3", [2]),
        ("not (loss=1 and loss<3)", [2, 3]),
        ("not loss=1 or loss=1", [1, 2, 3]),
        ("not(loss=1)AND NOT(loss=2)", [3]),
        ("loss=1 Or loss=2 oR loss=3", [1, 2, 3]),
    ],
)
def test_or_binds_less_than_and_and_and_less_than_not(found, text, ids):
    assert found(text, *LOSSES) == ids


@pytest.mark.parametrize(
    "text",
    [
        "loss < 2",
        "not loss < 2",
        "loss != 2",
        "not loss = 2",
        "loss in (1, 2)",
        "loss not in (1, 2)",
        "not loss in (1, 2)",
        "not (loss < 2 or n_layers > 7)",
        "not (loss < 2 and n_layers = 1)",
        "1 < loss < 2",
        "not 1 < loss < 2",
        "cause ~ a*",
        "cause !~ a*",
        "not cause !~ a*",
        "cause not in (a, b)",
        "use_gate",
        "not use_gate",
        "model.tied",
        "not model.tied",
        "val_acc < 1",
        "not val_acc < 1",
        "mean(val_acc) < 1",
        "not mean(val_acc) < 1",
        "not std(loss) < 1",
        "not median(loss) < 1",
        "loss != val_acc",
        "loss = 1 or not loss = 1",
    ],
)
def test_a_comparison_with_null_finds_nothing_also_under_not(found, text):
    config = {"n_layers": 1, "use_gate": None, "model": {}}
    for summary in (None, {}, {"val_acc": None}):
        assert found(text, run_row(1, config, summary, loss=None, cause=None)) == []


def test_what_does_not_hang_on_the_null_is_still_found(found):
    row = run_row(1, {"n_layers": 1}, loss=None)
    assert found("loss < 2 or n_layers = 1", row) == [1]
    assert found("not (loss < 2 and n_layers = 2)", row) == [1]


# ------------------------------------------------------------------------------------------------- names


def test_names_of_every_kind_reach_their_value(found):
    config = {"n_layers": 2, "lr": 1e-3, "model": {"width": 64, "tied": True}, "mean": 5.0}
    row = run_row(7, config, {"val_acc": 0.5, "val/top-5:all": 0.9, "step.time": 3.0}, created_at=100.5)
    for text in (
        "n_layers=2",
        "lr=1e-3",
        "model.width=64",
        "config.model.width=64",
        "model.tied",
        "val_acc=.5",
        "summary.val_acc=.5",
        "val/top-5:all=.9",
        "step.time=3",
        "id=7",
        "created_at>100",
        "mean=5",
        "mean(mean)=5",
    ):
        assert found(text, row) == [7], text


def test_a_field_that_is_not_ascii_is_found(found):
    assert found("σ < 1", run_row(1, {"σ": 0.5}), run_row(2, {"σ": 2.0})) == [1]


def test_a_run_column_wins_over_a_field_and_a_metric_of_its_name(found):
    row = run_row(1, {"seed": 8}, {"loss": 2.5}, seed=7, loss=1.5)
    assert found("seed=7 and loss=1.5", row) == [1]
    assert found("config.seed=8 and summary.loss=2.5", row) == [1]


def test_a_prefix_settles_a_clash_of_a_field_and_a_metric(found):
    row = run_row(1, {"decay": 0.1}, {"decay": 0.2})
    assert found("config.decay=.1 and summary.decay=.2", row) == [1]
    assert found("mean(config.decay) < mean(summary.decay)", row) == [1]


def test_another_name_of_a_field_is_the_field(found):
    rows = [run_row(1, {"n_layers": 1}), run_row(2, {"n_layers": 2}), run_row(3, {}, stage="s2")]
    assert found("layers > 1", *rows) == [2]
    assert found("config.layers in (1, 3) or mean(layers) > 5", *rows) == [1]
    assert found("layers = n_layers", *rows) == [1, 2]


def test_a_name_that_is_a_field_here_and_another_name_there_means_in_each_run_what_it_has(found):
    rows = [run_row(1, {"lr": 0.1}), run_row(2, {"σ": 0.2}), run_row(3, {"lr": 0.3, "σ": 0.1}), run_row(4, {})]
    assert found("lr < 0.25", *rows) == [1, 2]
    # a whole number in some stages and not in others is compared as a number
    assert found("n_layers >= 1.5", run_row(1, {"n_layers": 2}), run_row(2, {"mean": 1.5}), run_row(3, {})) == [1, 2]


def test_a_name_of_fields_of_different_kinds_is_refused_with_each_of_them():
    error = refused("loss < 1 and kind = lstm")
    assert "kind is another kind of value in some stages than in others: cell (str), use_gate (bool)" in str(error)
    assert error.hint == "choose one by --stage, or write the field's own name"
    assert "layers" in str(refused("layer > 1").hint)
    assert "config.layers" in str(refused("config.layer > 1").hint)


def test_names_are_stored_with_what_they_are_another_name_of():
    stored = query.stored({"learning_rate": "float", "lr": "int"}, {"lr": "learning_rate", "rate": "learning_rate"})
    assert stored == {"rate": "=learning_rate", "learning_rate": "float", "lr": "int"}
    assert query.parted(stored) == ({"learning_rate": "float", "lr": "int"}, {"rate": "learning_rate"})
    assert query.stored({"a": "int"}, {"b": "missing"}) == {"a": "int"}


def test_a_plain_path_is_written_out_so_that_an_index_on_it_serves():
    condition = query.compile("model.width = 3 and val_acc < 1", SCOPE)
    assert """json_extract(runs.config, '$."model"."width"')""" in condition.sql
    assert """json_extract(runs.summary, '$."val_acc"')""" in condition.sql
    assert condition.params == {"q0": 3, "q1": 1}


def test_the_sql_has_no_other_parameters_for_sqlalchemy_than_those_of_the_condition():
    condition = query.compile("val/top-5:all < 1 and model.width=2 and σ=1 and label=':x' and use_gate", SCOPE)
    assert set(sa.text(condition.sql)._bindparams) == set(condition.params) == {f"q{n}" for n in range(7)}


# -------------------------------------------------------------------------------------------- aggregates


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("mean(loss) = 3", [1, 2, 3]),
        ("median(loss) = 2", [1, 2, 3]),
        ("min(loss) = 1", [1, 2, 3]),
        ("MAX(loss) = 6", [1, 2, 3]),
        ("2.6 < std(loss) < 2.7", [1, 2, 3]),
        ("n(loss) >= 3", [1, 2, 3]),
        ("n(loss) = 0", [7]),
        ("n(val_acc) = 2", [1, 2, 3]),
        ("n (val_acc) = 0", [4, 5, 7]),
        ("mean(val_acc) = .75", [1, 2, 3]),
        ("mean(n_layers) = 2", [4, 5]),
        ("mean(loss) = 9", [4, 5]),
        ("mean(loss) = 100", [6]),
        ("std(loss) >= 0", [1, 2, 3]),
        ("not std(loss) >= 0", []),
        ("mean(loss) in (3, 9)", [1, 2, 3, 4, 5]),
        ("mean(loss) < 4 and loss > 1", [2, 3]),
        ("loss = max(loss)", [3, 4, 6]),
        ("3 <= mean(loss) < max(loss)", [1, 2, 3]),
    ],
)
def test_aggregates_are_over_the_runs_of_the_same_stage_and_group(found, text, ids):
    assert found(text, *GROUPS) == ids


# ------------------------------------------------------------------------------------------------ errors


def test_a_wrong_name_has_a_caret_under_it_and_the_nearest_name_as_a_hint():
    error = refused("los<1.9")
    assert str(error) == "filter: los<1.9\n        ^ no such name: los"
    assert error.hint == "did you mean loss?"
    assert error.exit_code == 2


NOT_HERE = "a point of a curve cannot stand here"
AS_IN = "a point of a curve is a metric and a step, as in val_loss@5000"


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        # names
        ("loss<2 and n_layer=2", 11, "no such name: n_layer", "n_layers"),
        ("config.n_layer=2", 0, "no such name: config.n_layer", "config.n_layers"),
        ("summary.n_layers=2", 0, "no such name: summary.n_layers", "did you mean summary."),
        ("summary.=2", 0, "no such name: summary.", "val_acc"),
        ("decay<1", 0, "decay is both a config field and a summary metric", "config.decay or summary.decay"),
        ("mean(decay)<1", 5, "decay is both a config field and a summary metric", "config.decay or summary.decay"),
        ("mean(los)<1", 5, "no such name: los", "loss"),
        ("loss < steps", 7, "neither a number nor a name: steps", "steps_done"),
        ("loss = nan", 7, "neither a number nor a name: nan", "it has"),
        ("checkpoint = a", 0, "no such name: checkpoint", None),
        ("config = a", 0, "no such name: config", None),
        ("Loss < 1", 0, "no such name: Loss", "loss"),
        ("true", 0, "no such name: true", None),
        # types
        ('loss < "2"', 7, 'loss is a number, "2" is not', None),
        ("n_layers in (1, two)", 16, "n_layers is a number, two is not", None),
        ("label = 5", 8, "label is text, 5 is not", 'write "5"'),
        ("label in (a, 1e3)", 13, "label is text, 1e3 is not", 'write "1e3"'),
        ("label ~ 5", 8, "label is text, 5 is not", 'write "5"'),
        ("label < b", 6, "< compares numbers; label is text", None),
        ("state >= done", 6, ">= compares numbers; state is text", None),
        ("use_gate > true", 9, "> compares numbers; use_gate is true or false", None),
        ("1 < use_gate", 2, "< compares numbers; use_gate is true or false", None),
        ("use_gate = 1", 11, "use_gate is true or false, 1 is not", None),
        ('use_gate = "true"', 11, 'use_gate is true or false, "true" is not', None),
        ("use_gate = yes", 11, "use_gate is true or false, yes is not", None),
        ("state = dnoe", 8, "no such state: dnoe", "the states are waiting, pending"),
        ("state in (done, 'fail')", 16, "no such state: fail", "skipped"),
        ("state = 1", 8, "state is text, 1 is not", 'write "1"'),
        ("loss ~ 1*", 5, "~ compares text; loss is a number", None),
        ("use_gate !~ t*", 9, "!~ compares text; use_gate is true or false", None),
        ("mean(loss) ~ 1*", 11, "~ compares text; mean(loss) is a number", None),
        ("mean(label) < 1", 5, "mean takes a number; label is text", None),
        ("N(use_gate) < 1", 2, "n takes a number; use_gate is true or false", None),
        ("label = mean(loss)", 8, "label is text, but mean(loss) is a number", None),
        ("loss = label", 7, "loss is a number, but label is text", None),
        ("loss", 0, "loss is a number: compare it with something", None),
        ("not label", 4, "label is text: compare it with something", None),
        ("mean(loss) and use_gate", 0, "mean(loss) is a number: compare it with something", None),
        ("1 < 2", 0, "a name was expected, 1 is a value", None),
        ("'a' ~ b", 0, 'a name was expected, "a" is a value', None),
        ("3 in (1, 2)", 0, "a name was expected, 3 is a value", None),
        ("5", 0, "a name was expected, 5 is a value", None),
        ("mean(5) > 1", 5, "a name was expected, 5 is a value", None),
        ("mean('loss') > 1", 5, 'a name was expected, "loss" is a value', None),
        # not yet
        ("mean(loss@5) < 2", 9, NOT_HERE, "quotes"),
        ("label = a@b", 10, "a step was expected here, not b", None),
        ("val_acc@ < 2", 9, "a step was expected here, not <", None),
        ("val_acc@1.5 < 2", 0, AS_IN, "quotes"),
        ("val_acc@-1 < 2", 0, AS_IN, "quotes"),
        ("5@5 < 2", 0, AS_IN, "quotes"),
        ("n_layers@5 < 2", 0, "no such metric: n_layers", None),
        ("state in (a@5)", 11, NOT_HERE, "quotes"),
        ("val_acc@5", 0, "val_acc@5 is a number: compare it with something", None),
        ("val_acc@5 = done", 12, "neither a number nor a name: done", None),
        ("tag", 0, "tag is text: compare it with something", None),
        ("tag < 5", 4, "< compares numbers; tag is text", None),
        ("tag = 5", 6, "tag is text, 5 is not", 'write "5"'),
        ("all(all(done))", 4, "all(...) cannot stand inside of all(...)", None),
        ("all(mean(loss) < 2)", 4, "mean(...) cannot stand inside of all(...)", None),
        # syntax
        ("", 0, "the filter is empty", "for example"),
        ("  \n ", 0, "the filter is empty", "for example"),
        ("loss <", 6, "a value was expected here, not the end", None),
        ("loss <  ", 6, "a value was expected here, not the end", None),
        ("loss<1 and", 10, "a name was expected here, not the end", None),
        ("not", 3, "a name was expected here, not the end", None),
        ("and loss<1", 0, "a name was expected here, not and", None),
        ("loss < and", 7, "a value was expected here, not and", None),
        ("loss < = 1", 7, "a value was expected here, not =", None),
        ("loss ~", 6, "a pattern was expected here, not the end", None),
        ("loss not 1", 9, "`in` was expected here, not 1", None),
        ("state in done", 9, "`(` was expected here, not done", None),
        ("state in ()", 10, "a value was expected here, not )", None),
        ("state in (done,)", 15, "a value was expected here, not )", None),
        ("state in (done failed)", 15, "`)` was expected here, not failed", None),
        ("state in (done", 9, "this ( is never closed", None),
        ("(loss<1 or (loss>2)", 0, "this ( is never closed", None),
        ("(loss<1 loss>2)", 8, "`)` was expected here, not loss", None),
        ("mean(loss", 4, "this ( is never closed", None),
        ("((loss)=1)", 7, "`)` was expected here, not =", None),
        ("mean() < 1", 5, "a name was expected here, not )", None),
        ("mean(loss, 2) < 1", 9, "`)` was expected here, not ,", None),
        ("loss<1)", 6, "no ( for this )", None),
        ("()", 1, "a name was expected here, not )", None),
        ("loss 1.9", 5, "an operator, `and` or `or` was expected here, not 1.9", None),
        ("loss<1 state=done", 7, "an operator, `and` or `or` was expected here, not state", None),
        ("1 < loss in (2, 3)", 9, "an operator, `and` or `or` was expected here, not in", None),
        ("avg(loss) < 1", 0, "no such function: avg", "mean"),
        ("meen(loss) < 1", 0, "no such function: meen", "mean"),
        ('label = "abc', 8, "this quote is never closed", None),
        ("label = it's", 10, "this quote is never closed", None),
        ("loss<1; DROP TABLE runs", 6, "unexpected ;", "quotes"),
        ("label = “a”", 8, "unexpected “", "quotes"),
        ("label = 'a\x00b'", 10, "unexpected character '\\x00'", None),
        ("label = '\udc80'", 9, "unexpected character '\\udc80'", None),
        ("loss < 1e999", 7, "1e999 is too large", None),
        ("loss<1 && use_gate", 7, "no such operator: &&", "write and"),
        ("loss<1 | use_gate", 7, "no such operator: |", "write or"),
        ("!use_gate", 0, "no such operator: !", "write not"),
        ("loss <> 1", 5, "no such operator: <>", "write !="),
        ("loss => 1", 5, "no such operator: =>", "write >="),
        ("loss === 1", 5, "no such operator: ===", None),
    ],
)
def test_an_error_has_its_caret_under_the_wrong_place(text, column, message, hint):
    error = refused(text)
    assert len(error.problems) == 1
    shown, pointer = error.problems[0].split("\n")
    readable = "".join(c if c.isprintable() else " " for c in text)
    assert shown == f"filter: {readable}"
    assert pointer == " " * (len("filter: ") + column) + f"^ {message}"
    if hint is None:
        assert error.hint is None or error.hint.startswith("it has ")
    else:
        assert hint in error.hint


def test_all_wrong_names_and_types_are_listed_at_once_in_the_order_of_the_text():
    error = refused("los<1 and label=3 and (state=dnoe or not mean(cell)<2) and 1 < lsso < 2 and los = mean(n_layer)")
    assert [problem.split("^ ")[1] for problem in error.problems] == [
        "no such name: los",
        "label is text, 3 is not",
        "no such state: dnoe",
        "mean takes a number; cell is text",
        "no such name: lsso",
        "no such name: los",
        "no such name: n_layer",
    ]
    assert "los: did you mean loss?" in error.hint
    assert 'write "3"' in error.hint
    assert "the states are waiting" in error.hint


def test_of_a_long_filter_only_what_is_near_the_error_is_shown():
    before = " and ".join(["loss<1"] * 100)
    error = refused(f"{before} and nothing=1 and {before}")
    shown, pointer = str(error).split("\n")
    column = pointer.index("^")
    assert shown[column:].startswith("nothing=1")
    assert shown.startswith("filter: ...")
    assert shown.endswith("...")
    assert len(shown) < 220


# ------------------------------------------------------------------------------------------------ limits


def test_a_very_long_filter_is_refused():
    assert "the filter is longer than 10,000 characters" in str(refused("loss<1 or " * 1_000 + "loss<1"))
    assert "longer than" in str(refused("(" * 1_000_000))


@pytest.mark.parametrize("text", ["(" * 9 + "loss<1" + ")" * 9, "not " * 9 + "loss<1", "(" * 9_000, "not(" * 2_000])
def test_very_deep_nesting_is_an_error_and_no_recursion(text):
    assert "nested deeper than 8 levels" in str(refused(text))


def test_more_than_500_conditions_are_refused():
    assert "more than 500 conditions" in str(refused(" or ".join(["loss<1"] * 501)))
    assert "more than 500 conditions" in str(refused("seed" + "<seed" * 501))
    assert "more than 500 conditions" in str(refused(" or ".join(["use_gate"] * 501)))


DEEPEST = "model.width in (5) or n_layers in (2) and 0 < median(val/top-5:all) <= 2"


@pytest.mark.parametrize(
    "text",
    [
        " or ".join(["loss<=1"] * 500),
        " and ".join(["min(loss)=1"] * 500),
        "loss" + "<=loss" * 500,
        f"id in ({','.join(['1'] * 4_000)})",
        "loss<0 or use_gate and (" * 8 + DEEPEST + ")" * 8,
        "loss<0 or use_gate and not (" * 4 + DEEPEST + ")" * 4,
        "not " * 8 + "mean(val_acc) not in (1)",
    ],
)
def test_sqlite_takes_the_largest_filters_also_inside_a_larger_statement(text):
    in_postgres = query.compile(text, SCOPE, words.OF["postgresql"])
    assert len(in_postgres.sql) < 400_000
    connection = database(*GROUPS)
    condition = query.compile(text, SCOPE)
    sql = f"SELECT count(*) FROM (SELECT id FROM runs JOIN (SELECT 1) ON (1 AND NOT (NOT ({condition.sql}))))"
    assert connection.execute(sql, dict(condition.params)).fetchall()
    connection.close()


# --------------------------------------------------------------------------------------------- injection


NASTY = ["x' OR '1'='1", "'; DROP TABLE runs; --", '" OR 1=1 --', ":q0", "$.a", "%s", "\\", "a' UNION SELECT 1", "\n--"]


@pytest.mark.parametrize("word", NASTY)
def test_a_value_is_bound_and_never_pasted(found, word):
    quote = "'" if '"' in word else '"'
    assert quote not in word
    for text in (f"label = {quote}{word}{quote}", f"cell in ({quote}{word}{quote})", f"label ~ {quote}{word}{quote}"):
        condition = query.compile(text, SCOPE)
        assert list(condition.params.values()) == [word]
        assert condition.sql in (
            "runs.label = :q0",
            "runs.label GLOB :q0",
            """json_extract(runs.config, '$."cell"') IN (:q0)""",
        )
    assert found(f"label = {quote}{word}{quote}", run_row(1, label=word), run_row(2)) == [1]


@pytest.mark.parametrize(
    "text",
    [
        "'loss' = 1",
        '"1=1"',
        "config.'cell' = a",
        "config.x') OR 1=1 -- = a",
        "loss) OR (1=1",
        "runs.loss < 1",
        "mean(loss) FROM runs",
        "std(loss) < (SELECT 1)",
        "1=1",
        "loss < 1 -- and",
        "loss /* */ < 1",
        "rowid = 1",
        "label = a; DELETE FROM runs",
    ],
)
def test_sql_is_not_a_filter(text):
    refused(text)


def test_a_metric_with_a_quote_in_its_name_cannot_be_written():
    scope = Scope({"a'b": "int", 'c"d': "int"}, frozenset({"x') OR 1=1 --"}))
    for name in ("a'b", 'c"d', "x') OR 1=1 --"):
        with pytest.raises(InputError):
            query.compile(f"{name} = 1", scope)


WORDS_AND_SIGNS = """
    loss label state use_gate n_layers decay model.width config. summary.val_acc tag val/top-5:all los true done 1 -2
    1e-3 .5 1e999 lstm* 'a' "b" ' " ( ) , @ ; = == != < <= > >= ~ !~ <> ! && and or not in NOT mean( n( all( mean
    val_acc@5 val_acc@ std( (done) (1,2) \0 σ -- /*
"""
PIECES = st.sampled_from(WORDS_AND_SIGNS.split())


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=14), st.sampled_from(["", " "]))
def test_any_text_is_refused_with_a_caret_or_runs(found, pieces, between):
    try:
        found(between.join(pieces), *GROUPS)
    except InputError as error:
        assert all("\n" in problem and "^ " in problem for problem in error.problems)


# ------------------------------------------------- against a slow, obvious evaluator, with null as None

HALVES = st.integers(-2, 4).map(lambda n: n / 2)  # sums of them are exact
NAMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "loss": lambda row: row["loss"],
    "seed": lambda row: row["seed"],
    "n_layers": lambda row: row["config"].get("n_layers"),
    "config.model.width": lambda row: row["config"].get("model", {}).get("width"),
    "val_acc": lambda row: (row["summary"] or {}).get("val_acc"),
    "summary.decay": lambda row: (row["summary"] or {}).get("decay"),
}
TEXT_NAMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "label": lambda row: row["label"],
    "cause": lambda row: row["cause"],
    "cell": lambda row: row["config"].get("cell"),
}
FLAG_NAMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "use_gate": lambda row: row["config"].get("use_gate"),
    "model.tied": lambda row: row["config"].get("model", {}).get("tied"),
}
OPERATORS = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
AGGREGATES: dict[str, Callable[[list[float]], Any]] = {
    "mean": lambda values: sum(values) / len(values) if values else None,
    "median": lambda values: statistics.median(values) if values else None,
    "std": lambda values: statistics.stdev(values) if len(values) > 1 else None,
    "min": lambda values: min(values, default=None),
    "max": lambda values: max(values, default=None),
    "n": len,
}


def maybe(strategy):
    return st.none() | strategy


def partly(**strategies):
    return st.fixed_dictionaries({}, optional={name: maybe(strategy) for name, strategy in strategies.items()})


WORDS = st.sampled_from(["a", "ab", "abc", "b", "B", "a b"])
CONFIGS = st.builds(
    lambda outer, model: outer | model,
    partly(n_layers=st.integers(0, 3), cell=WORDS, use_gate=st.booleans()),
    st.just({}) | partly(width=st.integers(0, 3), tied=st.booleans()).map(lambda model: {"model": model}),
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "stage": st.sampled_from(["s", "t"]),
            "group_key": st.sampled_from(["g", "h"]),
            "state": st.sampled_from(query.STATES),
            "label": WORDS,
            "cause": maybe(WORDS),
            "loss": maybe(HALVES),
            "seed": maybe(st.integers(0, 3)),
            "config": CONFIGS,
            "summary": maybe(partly(val_acc=HALVES, decay=HALVES)),
        }
    ),
    min_size=1,
    max_size=6,
)
NUMBER_NAMES = st.sampled_from(sorted(NAMES)).map(lambda name: ("name", name))
NUMBER_TERMS = NUMBER_NAMES | st.tuples(
    st.just("over"), st.sampled_from(sorted(AGGREGATES)), st.sampled_from(sorted(NAMES))
)
NUMBER_SIDES = NUMBER_TERMS | st.tuples(st.just("value"), HALVES | st.integers(0, 3))
SIGNS = st.sampled_from(sorted(OPERATORS))
EQUAL = st.sampled_from(["=", "==", "!="])
TEXT_TERMS = st.sampled_from(sorted(TEXT_NAMES)).map(lambda name: ("name", name))
STATE_VALUES = st.tuples(st.just("value"), st.sampled_from(query.STATES))
LEAVES = st.one_of(
    st.tuples(st.just("chain"), NUMBER_TERMS, st.lists(st.tuples(SIGNS, NUMBER_TERMS), min_size=1, max_size=3)),
    st.tuples(st.just("chain"), NUMBER_SIDES, st.tuples(SIGNS, NUMBER_TERMS).map(lambda pair: [pair])),
    st.tuples(st.just("chain"), NUMBER_TERMS, st.tuples(SIGNS, NUMBER_SIDES).map(lambda pair: [pair])),
    st.tuples(st.just("chain"), TEXT_TERMS, st.tuples(EQUAL, st.tuples(st.just("value"), WORDS)).map(lambda p: [p])),
    st.tuples(st.just("chain"), st.just(("name", "state")), st.tuples(EQUAL, STATE_VALUES).map(lambda pair: [pair])),
    st.tuples(st.just("in"), NUMBER_TERMS, st.booleans(), st.lists(HALVES, min_size=1, max_size=3)),
    st.tuples(st.just("in"), TEXT_TERMS, st.booleans(), st.lists(WORDS, min_size=1, max_size=3)),
    st.tuples(st.just("glob"), TEXT_TERMS, st.booleans(), st.sampled_from(["a*", "*b", "a?", "[ab]*", "*", "B"])),
    st.sampled_from(sorted(FLAG_NAMES)).map(lambda name: ("flag", name)),
)


def trees(depth: int):
    if depth == 0:
        return LEAVES
    smaller = trees(depth - 1)
    several = st.lists(smaller, min_size=2, max_size=3)
    return LEAVES | st.tuples(st.just("not"), smaller) | st.tuples(st.sampled_from(["and", "or"]), several)


def written(tree, binding: int = 0) -> str:
    """The filter's text, with no more parentheses than the grammar asks for."""
    kind = tree[0]
    if kind in ("and", "or"):
        mine = 1 if kind == "or" else 2
        text = f" {kind} ".join(written(item, mine + 1) for item in tree[1])
        return f"({text})" if binding > mine else text
    if kind == "not":
        return f"NOT {written(tree[1], 3)}"
    return written_leaf(tree)


def written_leaf(tree) -> str:
    match tree:
        case ("flag", name) | ("name", name):
            return name
        case ("value", value):
            return f'"{value}"' if isinstance(value, str) else str(value)
        case ("over", function, name):
            return f"{function}({name})"
        case ("chain", first, pairs):
            return written_leaf(first) + "".join(f"{sign}{written_leaf(side)}" for sign, side in pairs)
        case ("in", term, negated, values):
            listed = ", ".join(written_leaf(("value", value)) for value in values)
            return f"{written_leaf(term)}{' not' if negated else ''} in ({listed})"
        case ("glob", term, negated, pattern):
            return f"{written_leaf(term)} {'!~' if negated else '~'} {pattern}"
    raise AssertionError(tree)


def opposite(value):
    return None if value is None else not value


def all_of(values):
    values = list(values)
    if False in values:
        return False
    return None if None in values else True


def holds(tree, row, rows):
    """True, False, or None where a null keeps it from being either."""
    match tree:
        case ("and", items):
            return all_of(holds(item, row, rows) for item in items)
        case ("or", items):
            return opposite(all_of(opposite(holds(item, row, rows)) for item in items))
        case ("not", item):
            return opposite(holds(item, row, rows))
        case ("flag", name):
            return FLAG_NAMES[name](row)
        case ("chain", first, pairs):
            sides = [value_of(side, row, rows) for side in (first, *(side for _, side in pairs))]
            known = [None if a is None or b is None else OPERATORS[sign](a, b) for a, b, (sign, _) in
                     zip(sides, sides[1:], pairs, strict=False)]  # fmt: skip
            return all_of(known)
        case (kind, term, negated, wanted):
            value = value_of(term, row, rows)
            if value is None:
                return None
            hit = value in wanted if kind == "in" else fnmatch.fnmatchcase(value, wanted)
            return hit != negated
    raise AssertionError(tree)


def value_of(side, row, rows):
    match side:
        case ("value", value):
            return value
        case ("name", name):
            return row["state"] if name == "state" else (NAMES | TEXT_NAMES)[name](row)
        case ("over", function, name):
            same = [other for other in rows if (other["stage"], other["group_key"]) == (row["stage"], row["group_key"])]
            return AGGREGATES[function]([value for other in same if (value := NAMES[name](other)) is not None])
    raise AssertionError(side)


@settings(max_examples=300, deadline=None)
@given(trees(3), ROWS)
def test_the_database_finds_what_the_slow_evaluator_finds(found, tree, rows):
    expected = [id for id, row in enumerate(rows) if holds(tree, row, rows) is True]
    assert found(written(tree), *(run_row(id, **row) for id, row in enumerate(rows))) == expected
