"""Out and in: what an export holds to the bit, and results from elsewhere that become runs."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest
from sqlalchemy import Engine, text

from rnnq import db, definitions, examine, exchange, queue, runs, study
from rnnq.errors import InputError, RnnqError
from tests.conftest import ROOT, Cli, claim_one, new_stage
from tests.processes import Study

TOY = """
    from typing import Literal
    import rnnq
    from pydantic import BaseModel

    class Optimizer(BaseModel):
        model_config = {"frozen": True, "extra": "forbid"}
        name: str = "adam"
        betas: list[float] = [0.9, 0.99]

    class ToyConfig(rnnq.Config):
        metrics = (rnnq.Metric("score", "", "max", primary=True), rnnq.Metric("cost", "s"))
        x: int = 0
        rate: float | None = 1.5
        gated: bool = False
        mode: Literal["fast", "slow"] = "fast"
        optimizer: Optimizer = Optimizer()
        steps: int = 3

    @rnnq.family(ToyConfig)
    def toy(config):
        for step in range(config.steps):
            yield {"score": config.x + 1 / (1 + step), "cost": 0.5}

    def grow(config):
        yield config | {"steps": 2 * config["steps"]}

    stage = rnnq.stage("toys", toy, rnnq.grid(x=[1, 2, 3]), refine=grow)
"""
FAMILY = "defs/toy.py:toy"
UGLY = 0.1 + 0.2  # needs all of its digits


def define(folder: Path, content: str = TOY) -> None:
    """A definition file of a family of its own."""
    (folder / "defs").mkdir(exist_ok=True)
    (folder / "defs" / "toy.py").write_text(textwrap.dedent(content))


def rows_of(content: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content, newline="")))


def table(engine: Engine, what: Any, *asked: Any) -> list[dict[str, str]]:
    """The rows of an export as CSV."""
    written = io.StringIO()
    exchange.write_csv((frame for _, frame in exchange.export(engine, what, *asked).pieces), written)
    return rows_of(written.getvalue())


def finish(engine: Engine, summary: dict[str, Any], points: list[queue.Point] | None = None) -> None:
    queue.finish(engine, claim_one(engine), 10, summary, "loss", points or [])


def add(engine: Engine, n: int, name: str = "s", **changes: Any) -> None:
    """A stage with config fields beside the seed, in groups of two."""
    made = [
        replace(
            run,
            config=json.dumps({"seed": run.seed, "width": 16 * (1 + i // 2), "gate": i < 2}),
            group_key=f"g{i // 2}",
        )
        for i, run in enumerate(new_stage(n).runs)
    ]
    fields = {"seed": "int", "width": "int", "gate": "bool"}
    queue.init(engine, [new_stage(name=name, fields=fields, runs=made, **changes)])


# ---------------------------------------------------------------------------------------------------------- out


def test_a_table_of_runs_is_exact(engine: Engine, cli: Cli) -> None:
    add(engine, 3)
    finish(engine, {"loss": UGLY, "val": 1e-300})
    finish(engine, {"loss": 12345678.9})
    note = 'she said "no",\nand left; ünïcode'
    queue.note(engine, [1], note)
    queue.tag(engine, [1], "good")
    queue.tag(engine, [1], "odd")

    done = cli("export")

    first, second, third = rows_of(done.stdout)
    assert first["note"] == note
    assert first["tags"] == "good,odd"
    assert float(first["loss"]) == UGLY and float(first["val"]) == 1e-300
    assert second["loss"] == "12345678.9" and second["val"] == ""
    assert (first["config.width"], first["config.gate"], third["config.gate"]) == ("16", "True", "False")
    assert (third["state"], third["loss"], third["seconds"], third["started_at"]) == ("pending", "", "", "")
    assert float(first["seconds"]) >= 0
    assert done.stderr == ""


@pytest.mark.both
def test_stages_are_united_and_integers_stay_integers(engine: Engine) -> None:
    add(engine, 1)
    queue.init(engine, [new_stage(1, "other", fields={"seed": "int", "depth": "int"})])

    both = table(engine, "runs")

    assert [(row["stage"], row["config.width"]) for row in both] == [("s", "16"), ("other", "")]
    assert "config.depth" in both[0]
    assert "config.width" not in table(engine, "runs", "other")[0]


def test_groups_say_how_many_of_how_many(engine: Engine) -> None:
    add(engine, 4)
    for loss in (1.0, 2.0, 4.0):
        finish(engine, {"loss": loss})

    first, second = table(engine, "groups")
    [low] = table(engine, "groups", None, "loss<1.5")

    assert (first["id"], first["of"], first["loss.n"]) == ("1", "2", "2")
    assert (float(first["loss.mean"]), float(first["loss.std"])) == (1.5, statistics.stdev([1.0, 2.0]))
    assert (first["loss.min"], first["loss.max"]) == ("1.0", "2.0")
    assert (second["of"], second["loss.n"], second["loss.std"]) == ("2", "1", "")
    assert (low["loss.n"], low["of"]) == ("1", "2")
    assert "config.seed" not in first


def test_a_curve_has_a_row_for_each_point(engine: Engine, cli: Cli) -> None:
    add(engine, 2)
    finish(engine, {"loss": 1.0}, [("loss", 0, UGLY), ("loss", 5, math.nan), ("val", 5, 3.0)])

    everything = table(engine, "curves")
    one = rows_of(cli("export", "curves", "--metric", "val").stdout)

    assert [(row["name"], row["step"], row["value"]) for row in everything] == [
        ("loss", "0", repr(UGLY)), ("loss", "5", ""), ("val", "5", "3.0"),
    ]  # fmt: skip
    assert [(row["run"], row["stage"], row["label"], row["seed"]) for row in one] == [("1", "s", "run0", "0")]


def test_metrics_are_chosen_by_name_and_loss_is_the_primary_one(engine: Engine) -> None:
    metrics = [
        {"name": "accuracy", "unit": "", "better": "max", "primary": True},
        {"name": "seconds", "unit": "s", "better": "min", "primary": False},
        {"name": "size", "unit": "", "better": "min", "primary": False},
    ]
    add(engine, 1, metrics=metrics)
    queue.finish(engine, claim_one(engine), 10, {"accuracy": 0.5, "seconds": 7.0, "size": 3, "extra": 1}, "accuracy")
    found = study.select(engine)

    assert study.runs_of(engine, found)["summary.seconds"].tolist() == [7.0]
    chosen = study.runs_of(engine, found, ["size"])
    assert {"accuracy", "loss", "summary.seconds", "extra"} & set(chosen.columns) == set()
    assert chosen["size"].tolist() == [3.0] and "seconds" in chosen.columns
    assert study.runs_of(engine, found, ["loss"])["loss"].tolist() == [0.5]
    assert "size.mean" not in study.groups_of(engine, found, ["accuracy"]).columns
    with pytest.raises(InputError, match="there is no metric 'siz'") as raised:
        exchange.export(engine, "groups", metrics=["siz"])
    assert raised.value.hint == "did you mean size?"
    with pytest.raises(InputError, match="there is no metric 'acuracy'"):
        exchange.export(engine, "curves", metrics=["acuracy"])


def test_parquet_has_real_types_and_the_same_values(engine: Engine, cli: Cli, tmp_path: Path) -> None:
    add(engine, 2)
    queue.init(engine, [new_stage(1, "other", fields={"seed": "int"})])
    finish(engine, {"loss": UGLY}, [("loss", 0, UGLY)])

    done = cli("export", "--out", "runs.parquet")
    pieces = exchange.export(engine, "curves").pieces
    exchange.write_file((frame for _, frame in pieces), tmp_path / "curves.parquet")

    assert done.stderr == "3 runs to runs.parquet\n"
    table = pyarrow.parquet.read_table(tmp_path / "runs.parquet")
    kinds = {name: str(table.schema.field(name).type) for name in ("id", "config.width", "config.gate", "loss", "note")}
    assert kinds == {"id": "int64", "config.width": "int64", "config.gate": "bool", "loss": "double", "note": "string"}
    assert table["config.width"].to_pylist() == [16, 16, None]
    assert table["loss"].to_pylist() == [UGLY, None, None]
    assert pyarrow.parquet.read_table(tmp_path / "curves.parquet")["value"].to_pylist() == [UGLY]


def test_an_export_of_nothing_has_a_header_and_says_so(engine: Engine, cli: Cli, tmp_path: Path) -> None:
    add(engine, 1)
    done = cli("export", "--filter", "loss<0")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == "no run fulfils loss<0\n"
    for what in ("groups", "curves"):
        exchange.write_file(
            (f for _, f in exchange.export(engine, what, None, "loss<0").pieces), tmp_path / "0.csv", True
        )
        assert len((tmp_path / "0.csv").read_text().splitlines()) == 1
    exchange.write_file((f for _, f in exchange.export(engine, "curves").pieces), tmp_path / "0.parquet")
    empty = pyarrow.parquet.read_table(tmp_path / "0.parquet")
    assert empty.num_rows == 0 and str(empty.schema.field("value").type) == "double"


def test_a_wrong_export_is_refused(engine: Engine, cli: Cli, tmp_path: Path) -> None:
    add(engine, 1)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    assert "--force overwrites it" in cli("export", "--out", "there.csv", code=2).stderr
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert "did you mean s?" in cli("export", "curves", "--stage", "ss", code=2).stderr
    for name, why in (
        ("runs.txt", "neither CSV nor Parquet"),
        ("nowhere/runs.csv", "does not exist"),
        ("folder.csv", "is a folder"),
    ):
        with pytest.raises(InputError, match=why):
            exchange.check_target(tmp_path / name)


def test_force_overwrites_and_what_is_interrupted_leaves_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "runs.csv"
    exchange.write_file([pd.DataFrame({"a": [1]})], target)

    def interrupted() -> Iterator[pd.DataFrame]:
        yield pd.DataFrame({"a": [2]})
        raise KeyboardInterrupt

    for path in (target, tmp_path / "new.csv", tmp_path / "new.parquet"):
        with pytest.raises(KeyboardInterrupt):
            exchange.write_file(interrupted(), path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert target.read_text() == "a\n1\n"
    exchange.write_file([pd.DataFrame({"a": [3]})], target, force=True)
    assert target.read_text() == "a\n3\n"


def test_a_full_disk_is_the_worlds_fault(tmp_path: Path) -> None:
    def failing() -> Iterator[pd.DataFrame]:
        yield pd.DataFrame({"a": [1]})
        raise OSError(28, "No space left on device")

    with pytest.raises(RnnqError, match="No space left") as raised:
        exchange.write_file(failing(), tmp_path / "runs.csv")
    assert raised.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_is_no_error(engine: Engine, tmp_path: Path) -> None:
    add(engine, 1000)  # more than a pipe holds
    words = [sys.executable, "-m", "rnnq", "export"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("id,stage,")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


# ------------------------------------------------------------------------------------------- in: a study's table


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as made:
        made.define(textwrap.dedent(TOY), "toy.py")
        yield made


@pytest.fixture
def results(tmp_path: Path) -> list[dict[str, Any]]:
    """results.csv: the 432 configs of the published study with losses, as somebody's spreadsheet has them."""
    [stage] = definitions.load(ROOT / "defs" / "stage1.py").stages
    chance = random.Random(5)
    table = []
    for config in stage.configs():
        better = 0.3 * config["use_forget_gate"] + 0.1 * config["n_layers"]
        table.append(config | {"Loss": 2.2 - better + 0.5 * chance.random()})
    write(tmp_path / "results.csv", table)
    return table


def write(path: Path, table: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


THEIRS = ("import", "results.csv", "--stage", "theirs", "--family", "dynamics", "--loss", "Loss")


def test_a_studys_table_is_examined_as_a_spreadsheet_would(
    here: Study, cli: Cli, tmp_path: Path, results: list[dict[str, Any]]
) -> None:
    assert "added 432 runs" in here.rnnq(*THEIRS)
    assert '"added": 0,\n    "present": 432,' in here.rnnq(*THEIRS, "--format", "json")

    examined = cli("examine", "--filter", "loss<1.9", "--format", "csv", "--limit", "1000", "--save", "figures")

    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    below = sorted(float(row["Loss"]) for row in table if float(row["Loss"]) < 1.9)
    assert 50 < len(below) < 432
    assert [float(row["loss"]) for row in rows_of(examined.stdout)] == below
    shown = {
        (row["hyperparameter"], row["value"]): float(row["mean"])
        for row in rows_of((tmp_path / "figures" / "hyperparameters.csv").read_text())
    }
    varied = [name for name in table[0] if name not in ("Loss", "steps")]
    expected = {
        (name, value): statistics.fmean(float(row["Loss"]) for row in table if row[name] == value)
        for name in varied
        for value in {row[name] for row in table}
    }
    assert shown == pytest.approx(expected, rel=1e-14)

    here.rnnq("promote", "--stage", "theirs", "--top", "10%")
    parents = here.rows("SELECT DISTINCT loss FROM lineage JOIN runs ON runs.id = parent ORDER BY loss")
    assert [row["loss"] for row in parents] == sorted(float(row["Loss"]) for row in table)[:43]
    run = here.run(1)
    assert (run["state"], run["steps_done"], run["attempt"]) == ("done", 10_000, 0)
    assert run["message"] == "imported from results.csv, line 2"


def test_results_that_changed_are_named(
    tmp_path: Path, results: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    db.upgrade("experiments.db")
    engine = db.open("experiments.db")
    asked = exchange.Request(Path("results.csv"), "theirs", "dynamics", "Loss")
    queue.init(engine, [exchange.prepare(engine, asked).stage])
    changed = [dict(row) for row in results]
    changed[3]["Loss"] = 9.0
    changed[4]["lr"] = 0.5
    write(tmp_path / "results.csv", [{"lr": "", **row} for row in changed])
    with pytest.raises(InputError) as raised:
        exchange.prepare(engine, asked)
    assert raised.value.problems == [f"line 5: run 4 has loss={results[3]['Loss']}, the file 9.0"]


def test_an_export_makes_the_same_study_elsewhere(here: Study, results: list[dict[str, Any]]) -> None:
    here.rnnq(*THEIRS)
    for file in ("out.csv", "out.parquet"):
        here.rnnq("export", "--stage", "theirs", "--out", file)
        here.rnnq("import", file, "--stage", "theirs", "--family", "dynamics", "--db", f"{file}.db")
        examined = []
        for engine in (here.engine, db.open(str(here.folder / f"{file}.db"))):
            found = examine.examine(engine, "theirs")
            examined.append((examine.table(found, 1000), examine.records(found, 1000)))
        assert examined[0] == examined[1]
        assert len(examined[0][1]) == 432


# ----------------------------------------------------------------------------------------------- in: other files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy family, and this process in it."""
    define(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(content: str | bytes, engine: Engine | None = None, **asked: Any) -> exchange.Import:
    """What an import of a file with this content would do, here."""
    file = Path("t.csv")
    file.write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
    values = {"stage": "s", "family": FAMILY, "loss": "score", "path": file} | asked
    return exchange.prepare(engine, exchange.Request(**values))


def refused(content: str | bytes, engine: Engine | None = None, **asked: Any) -> list[str]:
    with pytest.raises(InputError) as raised:
        prepared(content, engine, **asked)
    return [*raised.value.problems, raised.value.hint or ""]


def configs(made: exchange.Import) -> list[dict[str, Any]]:
    return [json.loads(run.config) for run in made.stage.runs]


def test_text_becomes_values_of_the_fields_types(folder: Path) -> None:
    made = prepared("""\
        x,rate,gated,mode,optimizer.name,optimizer.betas,seed,score
        256,1e-3,yes,slow,sgd,"[0.5, 0.6]",1,0.5
        256.0,2,OFF,fast,,,2,1
        2.56e2,null,1,,adam,,3,-1.5e2
        ,,,,,,4,nan
    """)
    expected = {"gated": True, "mode": "slow", "optimizer": {"betas": [0.5, 0.6], "name": "sgd"}, "rate": 0.001}
    first, second, third, fourth = configs(made)
    assert first == expected | {"x": 256, "seed": 1, "steps": 3}
    assert (second["x"], second["rate"], second["gated"]) == (256, 2.0, False)
    assert (third["x"], third["rate"], third["gated"], third["mode"]) == (256, None, True, "fast")
    assert (fourth["x"], fourth["rate"]) == (0, 1.5)
    assert [run.summary for run in made.stage.runs][:3] == [{"score": 0.5}, {"score": 1.0}, {"score": -150.0}]
    assert made.without_loss == 1


@pytest.mark.both
def test_a_loss_that_is_not_finite_is_imported_as_none(folder: Path, engine: Engine) -> None:
    made = prepared("x,score\n1,nan\n2,-inf\n3,Infinity\n4,1\n", engine)
    queue.init(engine, [made.stage])
    assert made.without_loss == 3
    assert [row["loss"] for row in runs.find(engine, "s", state="done")] == [None, None, None, 1.0]
    [again] = queue.preview(engine, [prepared("x,score\n1,nan\n2,-inf\n3,Infinity\n4,1\n", engine).stage])
    assert (again.added, again.present) == (0, 4)


def test_all_that_is_wrong_is_said_at_once_with_line_and_column(folder: Path) -> None:
    problems = refused("""\
        x,gated,rate,mode,score
        1,true,1,fast,
        2,maybe,1,fast,1
        x,true,"1,5",fast,1
        3.5,true,1,quick,z
        4,true,1,fast,1

        4,true,1,fast,2
        5,true,1
        x,gated,rate,mode,score
    """)
    assert problems == [
        "line 9: 3 cells, the header has 5",
        "line 10: the header stands there again",
        "line 2, column score: the loss is missing; nan says that there is none",
        "line 3, column gated: 'maybe' is neither true nor false",
        "line 4, column x: 'x' is no number",
        "line 4, column rate: '1,5' is no number (a comma stands in it)",
        "line 5, column x: '3.5' is no whole number",
        "line 5, column score: 'z' is no number",
        "line 5, column mode: mode='quick': input should be 'fast' or 'slow'",
        "line 8: the same config as line 6",
        "a column that tells them apart may be the seed: --field COLUMN=seed",
    ]


def test_columns_that_mean_nothing_are_named(folder: Path) -> None:
    problems = refused("Y,rat,cost,,score,score\n1,2,3,4,5,6\n")
    assert problems[:-1] == [
        "line 1: two columns are called 'score'",
        "line 1, column Y: the family has no such field",
        "line 1, column rat: the family has no such field (did you mean rate?)",
        "line 1, column cost: no field, but a metric: --metric cost",
        "line 1, column without a name: the family has no such field",
    ]
    assert "--field COLUMN=FIELD" in problems[-1] and "optimizer.name" in problems[-1]


def test_options_that_name_what_is_not_there_are_refused(folder: Path) -> None:
    problems = refused(
        "a,b,c,score\n1,2,3,4\n",
        loss="scor",
        metrics=["a=cots", "b=score"],
        fields=["c=xs", "c", "zz=x"],
        ignore=["score", "score"],
    )
    assert [problem.split(":")[0] for problem in problems[:-1]] == [
        "--ignore score", "--loss scor", "--metric a=cots", "--metric b=score",
        "--field c=xs", "--field c", "--field zz", "line 1, column c",
    ]  # fmt: skip
    assert "did you mean cost?" in problems[2] and "a=cots:min, or :max" in problems[2]
    assert "did you mean score?" in problems[1]


def test_columns_get_other_names_and_a_new_metric_says_which_way_is_good(folder: Path, engine: Engine) -> None:
    asked = {"metrics": ["Time=cost", "acc=acc:max"], "fields": ["size=x"], "ignore": ["who"]}
    made = prepared("size,Points,Time,acc,who\n1,0.5,3,0.9,me\n2,0.7,4,0.8,you\n", loss="Points", **asked)
    queue.init(engine, [made.stage])
    best = examine.examine(engine, "s", by="acc").best
    assert [(row["id"], row["loss"], row["config"]["x"], row["summary"]) for row in best] == [
        (1, 0.5, 1, {"score": 0.5, "cost": 3.0, "acc": 0.9}),
        (2, 0.7, 2, {"score": 0.7, "cost": 4.0, "acc": 0.8}),
    ]
    assert [row["id"] for row in runs.find(engine, "s", "cost>3 and acc<1")] == [2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "t.csv is empty"),
        (b"x,score\n", "a header and no rows"),
        (b"x;score\n1;0,5\n", "separated by semicolons"),
        (b"x\tscore\n1\t2\n", "separated by tabs"),
        (b"x,score\n1,2\n2,\xe4\n", "t.csv, line 3: byte 0xe4 is not UTF-8"),
        ("x,score\n1,2\n".encode("utf-16"), "UTF-16"),
        (b'x,score\n1,2\n2,"3\n4,5\n', "t.csv, line 3: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(folder: Path, content: bytes, says: str) -> None:
    assert says in refused(content)[0]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(folder: Path) -> None:
    made = prepared(b'\xef\xbb\xbfx,score\r\n"1",2.5\r\n\r\n2,3\r\n')
    assert [(config["x"], run.message) for config, run in zip(configs(made), made.stage.runs, strict=True)] == [
        (1, "imported from t.csv, line 2"),
        (2, "imported from t.csv, line 4"),
    ]


def test_a_missing_file_an_unknown_family_and_a_bad_name_are_said_together(folder: Path) -> None:
    (folder / "results.csv").touch()
    problems = refused("", path=Path("result.csv"), family="dynamic", stage="a/b")
    assert "'a/b' cannot be the name of a stage" in problems[0]
    assert problems[1:] == [
        "there is no family 'dynamic'",
        "result.csv does not exist",
        "--stage NAME; did you mean dynamics?; did you mean results.csv or t.csv?",
    ]
    assert "its own: toy" in refused("x,score\n1,2\n", family="defs/toy.py:tow")[0]
    assert "neither CSV nor Parquet" in refused("", path=Path("t.xlsx"))[0]


def test_many_problems_are_counted(folder: Path) -> None:
    problems = refused("x,score\n" + "".join(f"a{n},1\n" for n in range(60)))
    assert len(problems) == exchange.SHOWN + 2
    assert problems[exchange.SHOWN] == f"... and {60 - exchange.SHOWN} more"
    assert refused("x,rate,score\n" + "1,a,1\n" * 60)[0] == "all 60 lines, column rate: 'a' is no number"


def test_parquet_is_read_with_its_types(folder: Path) -> None:
    table = pd.DataFrame({"x": [1.0, None], "gated": [1, 0], "rate": [2, 3], "mode": ["slow", None], "score": [0.5, 2]})
    table.to_parquet("t.parquet")
    made = exchange.prepare(None, exchange.Request(Path("t.parquet"), "s", FAMILY, "score"))
    first, second = configs(made)
    assert (first["x"], first["gated"], first["rate"], first["mode"]) == (1, True, 2.0, "slow")
    assert (second["x"], second["gated"], second["mode"]) == (0, False, "fast")
    assert made.stage.runs[1].message == "imported from t.parquet, row 2"
    Path("t.parquet").write_bytes(b"PAR1 of a kind")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        exchange.prepare(None, exchange.Request(Path("t.parquet"), "s", FAMILY, "score"))


# --------------------------------------------------------------------------------- in: stages that are there, and on


def test_a_stage_keeps_its_definition_and_its_pending_runs_are_not_overrun(here: Study) -> None:
    here.rnnq("init", "defs/toy.py")
    words = ("import", "t.csv", "--family", FAMILY, "--loss", "score", "--stage")
    (here.folder / "t.csv").write_text("x,score\n2,0.5\n7,0.6\n")
    refusal = here.rnnq(*words, "toys", code=2)
    assert "line 2: run 2 of stage toys has this config and is pending" in refusal
    assert "give another --stage" in refusal

    (here.folder / "t.csv").write_text("x,score\n7,0.6\n")
    here.rnnq(*words, "toys")
    here.rnnq("promote", "--stage", "toys", "--top", "1", "--partial")
    here.rnnq("worker", "--device", "cpu", "--drain", "--stage", "toys-2")
    [child] = runs.find(here.engine, "toys-2")
    # grown by the rule of the file, and trained by its code
    assert (child["config"]["x"], child["config"]["steps"], child["state"]) == (7, 6, "done")

    other = ("import", "t.csv", "--stage", "toys", "--family", "dynamics", "--loss", "score", "--ignore", "x")
    assert "stage toys exists with family toy, not dynamics" in here.rnnq(*other, code=2)


def test_a_built_in_familys_stage_keeps_its_rule(here: Study, results: list[dict[str, Any]]) -> None:
    here.define(
        "import rnnq\n"
        "def grow(config):\n    yield config | {'steps': 77}\n"
        "stage = rnnq.stage('theirs', 'dynamics', rnnq.grid(lr=[0.5]), refine=grow)\n"
    )
    here.rnnq("init", "defs/study.py")
    here.rnnq(*THEIRS)
    here.rnnq("promote", "--stage", "theirs", "--top", "1", "--partial")
    [child] = runs.find(here.engine, "theirs-2")
    assert child["budget"] == 77


def test_without_the_corpus_runs_are_promoted_and_a_worker_says_what_it_lacks(here: Study) -> None:
    header = "corpus,state_size,batch_size,window,steps,loss"
    (here.folder / "t.csv").write_text(f"{header}\nmine.txt,8,2,8,10,2.5\nmine.txt,16,2,8,10,2.0\n")
    here.rnnq("import", "t.csv", "--stage", "s", "--family", "dynamics")
    here.rnnq("promote", "--top", "1", "--set", "steps=4")
    assert "corpus 'mine.txt': there is no file" in here.rnnq("worker", "--device", "cpu", code=2)
    (here.folder / "mine.txt").write_text("the quick brown fox " * 100)
    here.rnnq("worker", "--device", "cpu")
    [child] = runs.find(here.engine, "s-2")
    assert (child["state"], child["budget"]) == ("done", 4)


def test_runs_whose_steps_the_text_decides_are_imported_and_promoted_without_it(here: Study) -> None:
    header = "data_path,tokens,hidden_size,batch_size,sequence_length,gradient_accumulation_steps,loss"
    (here.folder / "t.csv").write_text(f"{header}\nmine.txt,bytes,4,2,8,4,2.5\nmine.txt,bytes,8,2,8,4,2.0\n")
    here.rnnq("import", "t.csv", "--stage", "s", "--family", "scaling")
    here.rnnq("promote", "--top", "1")
    assert [row["budget"] for row in runs.find(here.engine, "s-2")] == [None]
    (here.folder / "mine.txt").write_text("the quick brown fox " * 40)
    here.rnnq("worker", "--device", "cpu")
    [child] = runs.find(here.engine, "s-2")
    assert (child["state"], child["steps_done"]) == ("done", 640 // 2 // 8 // 4 - 1)  # one pass over 80 % of 800 bytes


def test_a_dry_run_writes_nothing(here: Study) -> None:
    (here.folder / "t.csv").write_text("x,score\n7,0.6\n8,inf\n")
    words = ("import", "t.csv", "--family", FAMILY, "--loss", "score", "--stage", "s", "--dry-run")
    said = here.rnnq(*words)
    assert "would add 2 runs" in said and "1 run without a loss" in said
    assert not (here.folder / "experiments.db").exists()
    here.make()
    here.rnnq(*words)
    assert runs.find(here.engine) == []


def test_of_an_export_what_is_finished_is_imported_with_nulls_and_lists(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(
        'x,rate,optimizer.betas,score,cost,acc\n1,null,"[0.5, 0.6]",0.5,1,0.25\n2,,,nan,,\n',
        engine,
        metrics=["cost", "acc=acc:max"],
    )
    queue.init(engine, [made.stage])
    queue.init(engine, [replace(made.stage, runs=[replace(made.stage.runs[0], fingerprint="pending", summary=None)])])
    exported = io.StringIO()
    exchange.write_csv((frame for _, frame in exchange.export(engine, "runs").pieces), exported)

    again = prepared(exported.getvalue(), loss="loss")

    assert (len(again.stage.runs), again.left_out, again.without_loss) == (2, 1, 1)
    for name in ("config", "fingerprint", "group_key", "seed", "label"):
        assert [getattr(run, name) for run in again.stage.runs] == [getattr(run, name) for run in made.stage.runs]
    assert again.stage.runs[0].summary == {"score": 0.5, "cost": 1.0, "acc": 0.25}

    define(folder, TOY.replace("steps: int = 3", "steps: int = 4"))
    problems = refused(exported.getvalue(), loss="loss")
    assert "lines 2, 3, column fingerprint: the family makes another config of it" in problems[0]
    assert prepared(exported.getvalue(), loss="loss", ignore=["fingerprint"]).stage.runs[0].fingerprint


@pytest.mark.both
def test_an_import_that_was_not_completed_is_not_exported(engine: Engine) -> None:
    add(engine, 1)
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE intakes SET complete = false"))
    assert exchange.export(engine, "runs").runs == 0
