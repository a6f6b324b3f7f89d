"""The tree of stages, and in what two runs differ."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from rnnq import compare, db, queue, runs
from rnnq.errors import InputError
from tests.conftest import Cli, claim_one, new_runs, new_stage
from tests.processes import Study


def add(engine: Engine, name: str, n: int = 1, parents: dict[int, list[int]] | None = None, **changes: Any) -> None:
    """A stage of n runs; of run k (from 0) the ids of the runs that it was promoted from."""
    links = {k: tuple((run, "promote", "{}") for run in of) for k, of in (parents or {}).items()}
    made = [replace(run, parents=links.get(k, ())) for k, run in enumerate(new_runs(n))]
    queue.init(engine, [new_stage(0, name, runs=made, **changes)])


def tree(engine: Engine, defs: Path = Path("defs")) -> list[tuple[str, int]]:
    return [(row.stage, row.depth) for row in compare.stages(engine, defs)]


# -------------------------------------------------------------------------------------------------------- stages


def test_a_stage_stands_below_the_one_it_was_promoted_from(engine: Engine) -> None:
    add(engine, "first", 3)
    add(engine, "other")
    add(engine, "second", 2, {0: [1], 1: [2]})
    add(engine, "third", 1, {0: [5]})
    add(engine, "sibling", 1, {0: [1]})
    assert tree(engine) == [("first", 0), ("second", 1), ("third", 2), ("sibling", 1), ("other", 0)]


@pytest.mark.both
def test_a_stage_with_several_parents_stands_below_that_of_most_parents_and_names_the_others(engine: Engine) -> None:
    add(engine, "a", 2)  # runs 1, 2
    add(engine, "b", 3)  # 3 to 5
    add(engine, "child", 3, {0: [1, 3], 1: [1, 4], 2: [1, 3]})  # one run of a, again and again; two of b
    child = compare.stages(engine, Path("defs"))[-1]
    assert tree(engine) == [("a", 0), ("b", 0), ("child", 1)]
    assert list(child.parents.items()) == [("b", 2), ("a", 1)]


def test_stages_that_descend_from_each_other_are_each_shown_once(engine: Engine) -> None:
    add(engine, "a", 2)
    add(engine, "b", 1, {0: [1]})
    with db.transaction(engine) as connection:
        connection.execute(text("INSERT INTO lineage VALUES (2, 3, 'promote', NULL)"))  # promoted into the older one
    assert tree(engine) == [("a", 0), ("b", 1)]


def test_links_inside_a_stage_and_stages_that_are_being_made_are_no_part_of_the_tree(engine: Engine) -> None:
    add(engine, "a", 2)
    with db.transaction(engine) as connection:
        connection.execute(text("INSERT INTO lineage VALUES (2, 1, 'retry', NULL)"))
    queue._open_intakes(engine, [new_stage(1, "unfinished")])
    [row] = compare.stages(engine, Path("defs"))
    assert (row.stage, row.parents) == ("a", {})


def test_counts_are_those_of_the_states_and_only_of_complete_intakes(engine: Engine) -> None:
    add(engine, "a", 5)
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0}, "loss")
    queue.cancel(engine, [5])
    intakes = queue._open_intakes(engine, [new_stage(0, "a")])
    queue._insert_runs(engine, intakes, new_stage(0, "a", runs=new_runs(2, first=50)))
    [row] = compare.stages(engine, Path("defs"))
    assert row.counts == {"pending": 3, "done": 1, "cancelled": 1}
    assert row.total == 5


def test_a_definition_file_is_as_it_was_or_changed_or_missing(engine: Engine, tmp_path: Path) -> None:
    import hashlib

    content = b"# a definition"
    (tmp_path / "here.py").write_bytes(content)
    (tmp_path / "folder").mkdir()
    sha256 = hashlib.sha256(content).hexdigest()
    for name, source in (("ok", "here.py"), ("gone", "gone.py"), ("out", "../here.py"), ("folder", "folder")):
        add(engine, name, source=source, source_sha256=sha256)
    add(engine, "older", source="here.py", source_sha256="0" * 64)
    add(engine, "none")
    found = {row.stage: row.source_state for row in compare.stages(engine, tmp_path)}
    assert found == {
        "ok": "as it was", "gone": "missing", "out": "missing", "folder": "missing", "older": "changed", "none": None
    }  # fmt: skip


def test_a_renamed_stage_says_what_it_is_called_in_its_file(engine: Engine, tmp_path: Path, cli: Cli) -> None:
    add(engine, "a")
    queue.rename(engine, "a", "b")
    queue.pause(engine, "b")
    [row] = compare.stages(engine, Path("defs"))
    assert (row.stage, row.defined_as, row.paused) == ("b", "a", True)
    assert "b (paused, made as a)" in cli("stages").stdout


def test_stages_are_read_by_their_indexes(engine: Engine) -> None:
    add(engine, "a", 3)
    add(engine, "b", 2, {0: [1]})
    said: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: said.append(args[2]))
    compare.stages(engine, Path("defs"))
    asked = [sql for sql in said if sql.lstrip().startswith("SELECT")]
    with db.reading(engine) as connection:
        plans = {sql: [row.detail for row in connection.execute(text(f"EXPLAIN QUERY PLAN {sql}"))] for sql in asked}
    steps = [step for plan in plans.values() for step in plan]
    assert any("COVERING INDEX ix_runs_count" in step for step in steps)
    assert not [step for step in steps if step.startswith(("SCAN runs", "SCAN child", "SCAN parent"))], plans


def test_the_tree_is_printed_as_table_json_and_csv(engine: Engine, cli: Cli) -> None:
    add(engine, "first", 2)
    add(engine, "second", 1, {0: [1]})
    lines = cli("stages").stdout.splitlines()
    assert lines[1].startswith("first   ")
    assert lines[2].startswith("  second ")
    assert "1 pending" in lines[2]
    found = json.loads(cli("stages", "--format", "json").stdout)
    assert [(row["stage"], row["depth"], row["parents"]) for row in found] == [
        ("first", 0, {}),
        ("second", 1, {"first": 1}),
    ]
    assert found[0]["command_line"]
    assert found[0]["made"][10] == "T"
    rows = list(csv.DictReader(io.StringIO(cli("stages", "--format", "csv").stdout)))
    assert [(row["stage"], row["runs"]) for row in rows] == [("first", "2"), ("second", "1")]


def test_a_study_without_stages_has_none(engine: Engine, cli: Cli) -> None:
    assert cli("stages").stderr == "0 stages\n"
    assert json.loads(cli("stages", "--format", "json").stdout) == []


# ---------------------------------------------------------------------------------------------------------- diff


def trained(engine: Engine, curve: list[tuple[str, int, float]], summary: dict[str, Any], **numerics: Any) -> int:
    """Train the next run: these points, this summary."""
    claim = claim_one(engine)
    queue.restore(engine, claim, queue.Start(0, [], {"threads": 1, **numerics}, True, None, []))
    queue.finish(engine, claim, 10, summary, "loss", curve)
    return claim.run


CURVE = [("loss", 1, 3.0), ("loss", 2, 2.0), ("loss", 3, 1.0), ("val_loss", 3, 1.5)]


def test_equal_results_are_identical_to_the_bit_whatever_their_speed(engine: Engine, cli: Cli) -> None:
    add(engine, "a", 2)
    trained(engine, CURVE, {"loss": 1.0, "steps_per_s": 10.0})
    trained(engine, CURVE, {"loss": 1.0, "steps_per_s": 20.0})
    found = compare.diff(engine, 1, 2)
    assert found.identical
    assert found.config == {"seed": (0, 1)}
    assert found.summary == {"steps_per_s": (10.0, 20.0)}
    assert "identical to the bit: 2 curves with 4 points, and the summary" in cli("diff", "1", "2").stdout


def test_one_bit_in_one_point_or_in_the_summary_is_a_difference(engine: Engine) -> None:
    add(engine, "a", 3)
    trained(engine, CURVE, {"loss": 1.0})
    trained(engine, [("loss", 1, 3.0 + 2**-51), *CURVE[1:]], {"loss": 1.0})
    trained(engine, CURVE, {"loss": 1.0 + 2**-52})
    assert not compare.diff(engine, 1, 2).identical
    assert compare.diff(engine, 1, 2).curves["loss"].first == 1
    third = compare.diff(engine, 1, 3)
    assert not third.identical
    assert all(curve.same for curve in third.curves.values())


def test_curves_differ_from_a_step_on_and_most_at_another(engine: Engine, cli: Cli) -> None:
    add(engine, "a", 2)
    trained(engine, CURVE, {"loss": 1.0})
    trained(engine, [("loss", 1, 3.0), ("loss", 2, 2.25), ("loss", 3, 0.25), ("loss", 4, 9.0)], {"loss": 0.25})
    found = compare.diff(engine, 1, 2)
    loss = found.curves["loss"]
    assert (loss.first, loss.largest, loss.at, loss.points, loss.common) == (2, -0.75, 3, (3, 4), 3)
    assert found.curves["val_loss"].points == (1, 0)
    shown = cli("diff", "1", "2").stdout
    assert "loss: differs from step 2 on, by up to 0.7500 at step 3; 3 and 4 points, 3 at the same steps" in shown
    assert "val_loss: 1 and 0 points, none of them at the same step" in shown
    assert "identical" not in shown
    said = json.loads(cli("diff", "1", "2", "--format", "json").stdout)
    assert said["identical"] is False
    assert said["summary"]["loss"] == {"values": [1.0, 0.25], "difference": -0.75}
    assert said["curves"]["loss"]["largest"] == -0.75
    rows = {row["what"]: row for row in csv.DictReader(io.StringIO(cli("diff", "1", "2", "--format", "csv").stdout))}
    assert rows["summary.loss"]["difference"] == "-0.75"
    assert rows["curve.loss"]["at_step"] == "3"


def test_a_value_that_was_not_finite_equals_only_its_like(engine: Engine) -> None:
    add(engine, "a", 3)
    for value in (float("nan"), float("inf"), 1.0):
        trained(engine, [("loss", 1, value)], {})
    assert compare.diff(engine, 1, 2).curves["loss"].same
    unlike = compare.diff(engine, 1, 3).curves["loss"]
    assert (unlike.same, unlike.first, unlike.largest) == (False, 1, None)


@pytest.mark.both
def test_the_last_attempts_are_compared_with_their_numerics_and_code(engine: Engine) -> None:
    add(engine, "a", 2)
    trained(engine, CURVE, {}, threads=1)
    trained(engine, CURVE, {}, threads=2)
    with db.transaction(engine) as connection:
        values = {"v": '{"torch": "2.13"}', "c": "ab" * 20, "s": "f" * 64}
        sql = "UPDATE attempts SET versions = :v, git_commit = :c, source_sha256 = :s WHERE run_id = 2"
        connection.execute(text(sql), values)
    found = compare.diff(engine, 1, 2)
    assert found.attempt["numerics.threads"] == (1, 2)
    assert found.attempt["versions.torch"] == (None, "2.13")
    assert found.attempt["git_commit"] == (None, "ab" * 20)
    assert found.definition == {"sha256": (None, "f" * 64)}


def test_nested_fields_and_their_types_are_compared(engine: Engine) -> None:
    configs = ['{"net": {"gate": true, "size": 1}, "lr": 1.0}', '{"net": {"gate": 1, "size": 2}, "lr": 1}']
    made = [replace(run, config=config) for run, config in zip(new_runs(2), configs, strict=True)]
    queue.init(engine, [new_stage(0, runs=made)])
    assert compare.diff(engine, 1, 2).config == {"net.gate": (True, 1), "net.size": (1, 2)}


def test_runs_that_have_not_begun_have_no_results(engine: Engine, cli: Cli) -> None:
    add(engine, "a", 2)
    assert not compare.diff(engine, 1, 2).identical
    shown = cli("diff", "1", "2").stdout
    assert "neither has results yet" in shown
    assert "the first has not been tried yet" in shown


def test_one_run_twice_and_runs_that_are_not_there_are_refused(engine: Engine, cli: Cli) -> None:
    add(engine, "a", 1)
    with pytest.raises(InputError, match="run 1 and run 1 are one and the same"):
        compare.diff(engine, 1, 1)
    with pytest.raises(InputError) as refused:
        compare.diff(engine, 8, 9)
    assert refused.value.problems == ["there is no run 8", "there is no run 9"]
    assert cli("diff", "1", code=2).stderr.startswith("error: ")
    assert cli("diff", "1", "-2", code=2).stderr.startswith("error: ")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """The same net trained twice, in two stages."""
    with Study(tmp_path_factory.mktemp("twins")) as study:
        (study.folder / "t.txt").write_text("to be or not to be\n" * 100)
        fields = "dict(state_size=8, batch_size=4, window=20, steps=60, eval_every=20, corpus='t.txt')"
        stages = [f"s{i} = rnnq.stage('s{i}', 'dynamics', rnnq.grid(n_layers=[1]), base={fields})" for i in (1, 2)]
        study.rnnq("init", study.define("import rnnq\n" + "\n".join(stages)))
        study.rnnq("worker", "--device", "cpu")
        yield study


def test_a_config_that_was_trained_twice_is_identical_to_the_bit(twins: Study) -> None:
    found = compare.diff(twins.engine, 1, 2)
    assert runs.show(twins.engine, 1)["stage"] != runs.show(twins.engine, 2)["stage"]
    assert found.identical
    assert not (found.config or found.definition or found.attempt)
    shown = twins.rnnq("diff", "1", "2")
    assert "config: equal" in shown
    assert "the results are identical to the bit" in shown
