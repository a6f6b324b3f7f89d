"""A study in Python: what a notebook gets from rnnq.load."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sqlalchemy import Engine

import rnnq
from rnnq import db, queue
from rnnq.errors import InputError
from rnnq.study import Study as Opened
from tests.conftest import address_of, claim_one, new_runs, new_stage
from tests.processes import Study

METRICS = [
    {"name": "accuracy", "unit": "%", "better": "max", "primary": True},
    {"name": "cost", "unit": "s", "better": "min", "primary": False},
]
FIELDS = {"seed": "int", "width": "int", "gate": "bool", "rate": "float", "name": "str"}


def add(engine: Engine, name: str, *configs: str) -> None:
    """A stage of runs with these configs, in groups of two, beside their seed."""
    made = [
        replace(run, config=config, group_key=f"g{run.seed // 2 if run.seed else 0}")
        for run, config in zip(new_runs(len(configs)), configs, strict=True)
    ]
    queue.init(engine, [new_stage(name=name, fields=FIELDS, metrics=METRICS, runs=made)])


def finish(engine: Engine, accuracy: float, points: list[queue.Point] | None = None) -> None:
    queue.finish(engine, claim_one(engine), 10, {"accuracy": accuracy, "cost": 2.0}, "accuracy", points or [])


def config(seed: int, more: str = "") -> str:
    return f'{{"seed":{seed},"width":16,"gate":true,"rate":0.5,"name":"a"{more}}}'


@pytest.fixture
def study(engine: Engine) -> Iterator[Opened]:
    """Two stages: four runs, of which three are done; one run without some fields."""
    add(engine, "first", *(config(seed) for seed in range(4)))
    add(engine, "<second>", '{"seed":0,"rate":null}')
    finish(engine, 0.5, [("accuracy", 0, 0.25), ("accuracy", 10, 0.5), ("cost", 10, math.nan)])
    finish(engine, 0.7, [("accuracy", 0, 0.5)])
    finish(engine, 0.9)
    opened = rnnq.load(address_of(engine))
    yield opened
    opened.close()


@pytest.mark.both
def test_runs_have_the_types_that_their_fields_have(study: Opened) -> None:
    found = study.runs("first")
    kinds = found.dtypes.astype(str)
    assert dict(kinds[["id", "seed", "config.width", "config.gate", "config.rate", "loss", "steps_done"]]) == {
        "id": "int64", "seed": "int64", "config.width": "int64", "config.gate": "bool", "config.rate": "float64",
        "loss": "float64", "steps_done": "int64",
    }  # fmt: skip
    assert found["loss"].tolist()[:3] == [0.5, 0.7, 0.9] and math.isnan(found["loss"][3])
    assert found["started_at"].notna().tolist() == [True, True, True, False]

    united = study.runs()
    kinds = united.dtypes.astype(str)
    assert united["stage"].tolist() == ["first"] * 4 + ["<second>"]
    assert (kinds["config.width"], kinds["config.gate"], kinds["config.rate"]) == ("Int64", "boolean", "float64")
    assert united["config.width"].isna().tolist() == [False] * 4 + [True]
    assert str(study.runs("<second>").dtypes["loss"]) == "float64"  # although none has one
    assert study.runs(filter="loss>0.6")["id"].tolist() == [2, 3]
    none = study.runs(filter="loss>1")
    assert len(none) == 0 and str(none["config.width"].dtype) == "int64"


@pytest.mark.both
def test_groups_come_best_first_and_count_the_whole_group(study: Opened) -> None:
    found = study.groups("first")
    assert found["id"].tolist() == [3, 1]  # high is good
    assert found["mean"].tolist() == [0.9, pytest.approx(0.6)]
    assert found["n"].tolist() == [1, 2] and found["of"].tolist() == [2, 2]
    assert found["std"].tolist()[1] == pytest.approx(0.1 * math.sqrt(2))
    assert "config.seed" not in found and found["config.width"].dtype == "int64"
    assert study.groups("first", by="cost")["mean"].tolist() == [2.0, 2.0]
    assert study.groups(filter="loss>0.6")[["n", "of"]].values.tolist() == [[1, 2], [1, 2]]
    assert study.groups()["stage"].tolist() == ["first", "first", "<second>"]
    with pytest.raises(InputError, match="no metric 'costs'"):
        study.groups(by="costs")


@pytest.mark.both
def test_curves_have_their_runs_names_and_gaps(study: Opened) -> None:
    found = study.curves()
    assert found["run"].tolist() == [1, 1, 1, 2]
    assert found["value"].tolist()[:2] == [0.25, 0.5] and math.isnan(found["value"][2])
    assert dict(found.dtypes.astype(str)[["run", "seed", "step", "value"]]) == {
        "run": "int64", "seed": "int64", "step": "int64", "value": "float64",
    }  # fmt: skip
    assert study.curves("first", names=["loss"])["name"].unique().tolist() == ["accuracy"]
    assert study.curves(names="cost", filter="id = 1")["step"].tolist() == [10]
    assert study.curves("<second>").dtypes.equals(found.dtypes)
    with pytest.raises(InputError, match="no metric 'acc'"):
        study.curves(names=["acc"])


def test_a_run_is_a_dict_with_its_curves(study: Opened) -> None:
    run = study.run(1)
    assert run["config"]["width"] == 16 and run["curves"]["accuracy"] == [(0, 0.25), (10, 0.5)]
    with pytest.raises(InputError, match="there is no run 99"):
        study.run(99)


@pytest.mark.both
def test_a_study_shows_its_stages(study: Opened, engine: Engine) -> None:
    stages = study.stages.set_index("stage")
    assert stages.loc["first", ["family", "runs", "done", "pending", "metric", "best"]].tolist() == [
        "f", 4, 3, 1, "accuracy", 0.9,
    ]  # fmt: skip
    assert pd.isna(stages.loc["<second>", "best"])
    shown = repr(study)
    assert Path(db.shown(engine)).name in shown and "first" in shown and "0.9" in shown
    assert "cancelled" not in shown and "nan" not in shown.lower()
    page = study._repr_html_()
    assert "<table" in page and "&lt;second&gt;" in page and "<second>" not in page


def test_a_closed_study_says_so_and_a_wrong_path_what_the_command_line_says(
    study: Opened,
    tmp_path: Path,
) -> None:
    with study as opened:
        opened.runs()
    assert "(closed)" in repr(study) and "(closed)" in study._repr_html_()
    with pytest.raises(InputError, match="is closed"):
        study.runs()
    with pytest.raises(InputError, match="there is no database"):
        rnnq.load(tmp_path / "nothing.db")
    (tmp_path / "text.db").write_text("a text that is long enough")
    with pytest.raises(InputError, match="is not a database"):
        rnnq.load(tmp_path / "text.db")
    assert not (tmp_path / "nothing.db").exists()


def test_no_lock_is_held_between_questions(engine: Engine, tmp_path: Path) -> None:
    add(engine, "first", config(0))
    study = rnnq.load(tmp_path / "experiments.db")
    study.runs()
    study.curves()
    repr(study)
    other = sqlite3.connect(tmp_path / "experiments.db", timeout=0)
    other.execute("BEGIN EXCLUSIVE")  # a writer that waits for nobody
    other.execute("UPDATE runs SET priority = 7")
    other.execute("COMMIT")
    # a reader that were still in its transaction would hold this back, and see the old rows
    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    other.close()
    assert study.run(1)["priority"] == 7


def test_a_study_is_read_and_exported_while_workers_train(tmp_path: Path) -> None:
    definition = """
        import rnnq

        class ToyConfig(rnnq.Config):
            x: int = 0
            steps: int = 20

        @rnnq.family(ToyConfig)
        def toy(config):
            for step in range(config.steps):
                yield {"loss": config.x + 1 / (1 + step)}

        stage = rnnq.stage("toys", toy, rnnq.grid(x=[1, 2, 3]))
    """
    with Study(tmp_path) as here:
        here.rnnq("init", here.define(textwrap.dedent(definition)))
        worker = here.worker({"at": "claimed", "do": "wait", "run": 2})
        worker.expect("trapped", run=2)  # run 1 is done, run 2 is held, run 3 waits

        study = rnnq.load(tmp_path / "experiments.db")
        assert study.runs()["state"].tolist() == ["done", "running", "pending"]
        assert study.runs()["seconds"].notna().tolist() == [True, False, False]
        assert study.curves()["run"].unique().tolist() == [1]
        assert study.stages["running"].tolist() == [1]
        assert "3 runs to runs.csv" in here.rnnq("export", "--out", "runs.csv")

        worker.go_on()
        worker.end()
        assert study.runs()["state"].tolist() == ["done"] * 3
        assert len(study.curves("toys", names=["loss"])) == 60
        assert db.check(study.engine) == []
        study.close()


def test_importing_rnnq_loads_no_pandas_and_load_warns_of_nothing(engine: Engine, tmp_path: Path) -> None:
    add(engine, "first", config(0))
    program = (
        "import sys, rnnq; assert not {'pandas', 'torch', 'sqlalchemy'} & set(sys.modules)\n"
        "study = rnnq.load('experiments.db'); study.runs(); study.groups(); study.curves(); print(study)\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
