"""Gates: what a run waits for, when that is decided, and what becomes of it; and whose weights a run starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.event import listen
from sqlalchemy.exc import IntegrityError

import rnnq
from rnnq import db, definitions, gates, plan, queue, runs, steer
from rnnq.config import as_json
from rnnq.errors import InputError, LeaseLost
from rnnq.gates import Gate, Parents
from tests.conftest import PROVENANCE, claim_one, new_runs, new_stage
from tests.processes import Study

METRICS = [
    {"name": "loss", "unit": "nats", "better": "min", "primary": True},
    {"name": "val_score", "unit": "", "better": "max", "primary": False},
]
FIELDS = {"seed": "int", "width": "int"}
FILE = {"path": "checkpoints/x/parent/1/a1-s10.pt", "step": 10, "sha256": "x", "bytes": 1}


MEASURED = "UPDATE runs SET summary = :summary WHERE id = 1"


def stage(name: str, n: int = 1, gate: Gate | None = None, **changes: Any) -> queue.NewStage:
    """A stage of n runs, seeds 0 to n-1, all behind one gate."""
    behind = gate.to_json() if gate is not None else None
    made = [replace(run, gate=behind, fingerprint=f"{name}{run.seed}") for run in new_runs(n)]
    return new_stage(name=name, **{"runs": made, "fields": FIELDS, "metrics": METRICS} | changes)


def after(stage: str, when: str | None = None, **more: Any) -> Gate:
    kept = {name: more.pop(name) for name in ("otherwise", "on_failed") if name in more}
    return Gate((Parents(stage, when=when, **more),), **kept)


def finish(engine: Engine, score: float | None, n: int = 1, **files: Any) -> None:
    """The next n runs are done with a score."""
    for _ in range(n):
        claim = claim_one(engine)
        summary = {"loss": 1.0} | ({} if score is None else {"val_score": score})
        queue.finish(engine, claim, 10, summary, "loss", **files)


def states(engine: Engine, stage: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for run in runs.find(engine, stage):
        found[run["state"]] = found.get(run["state"], 0) + 1
    return found


def messages(engine: Engine, stage: str) -> set[str | None]:
    return {run["message"] for run in runs.find(engine, stage)}


def change(engine: Engine, sql: str, **values: object) -> None:
    with db.transaction(engine) as connection:
        connection.execute(text(sql), values)


def rows(engine: Engine, sql: str) -> list[Mapping[str, Any]]:
    with db.reading(engine) as connection:
        return [row._mapping for row in connection.execute(text(sql)).all()]


# ------------------------------------------------------------------------------------------------ what is decided


def test_a_run_behind_a_gate_waits_and_nobody_can_claim_it(engine: Engine) -> None:
    [parent, child] = queue.init(engine, [stage("parent", 2), stage("child", 3, after("parent"))])
    assert (parent.waiting, child.waiting) == (0, 3)
    assert states(engine, "child") == {"waiting": 3}
    finish(engine, 1.0)
    assert queue.decide(engine) == []
    assert states(engine, "child") == {"waiting": 3}
    assert queue.has_open(engine, "child")  # a parent may yet end
    finish(engine, 1.0)
    assert queue.claim(engine, "w", PROVENANCE) == []
    [decided] = queue.decide(engine)
    assert (decided.stage, decided.decision, decided.runs) == ("child", "open", (3, 4, 5))
    assert states(engine, "child") == {"pending": 3}
    assert queue.decide(engine) == []


@pytest.mark.parametrize(
    ("when", "scores", "decision"),
    [
        ("mean(val_score) >= 0.95", [0.94, 0.96], "open"),
        ("mean(val_score) >= 0.95", [0.93, 0.96], "shut"),
        ("max(val_score) < 0.5", [0.4, 0.49], "open"),
        ("median(val_score) >= 0.9 and n(val_score) = 3", [0.1, 0.9, 1.0], "open"),
        ("all(done)", [0.1], "open"),
        ("all(val_score > 0.5)", [0.6, 0.4], "shut"),
        ("all(val_score > 0.5 or width = 3)", [0.6, 0.7], "open"),
        ("not mean(val_score) >= 0.95", [0.5], "open"),
        ("mean(val_score) >= 0.95", [None], "shut"),
        ("not mean(val_score) >= 0.95", [None], "shut"),  # null is neither true nor false
        ("std(val_score) < 0.1", [0.5], "shut"),  # of one there is none
        ("mean(loss) = 1 and max(seed) = 1", [0.5, 0.5], "open"),
    ],
)
def test_a_condition_is_on_all_the_runs_together(
    engine: Engine, when: str, scores: list[float | None], decision: str
) -> None:
    queue.init(engine, [stage("parent", len(scores)), stage("child", 2, after("parent", when))])
    for score in scores:
        finish(engine, score)
    [decided] = queue.decide(engine)
    assert decided.decision == decision
    assert states(engine, "child") == ({"pending": 2} if decision == "open" else {"skipped": 2})


def test_what_was_decided_is_kept_with_the_values_it_was_decided_on(engine: Engine) -> None:
    gate = after("parent", "mean(val_score) >= 0.95")
    queue.init(engine, [stage("parent", 3), stage("child", 1, gate)])
    finish(engine, 0.5, 3)
    queue.decide(engine)
    reason = "mean(val_score) >= 0.95 does not hold of parent: mean(val_score) = 0.5 (n = 3)"
    assert messages(engine, "child") == {reason}
    [row] = rows(engine, "SELECT decision, seen, decided_at FROM gates")
    assert row["decision"] == "shut" and row["decided_at"] is not None
    seen = json.loads(row["seen"])
    assert seen["reason"] == reason
    assert seen["parents"][0]["values"] == {"mean(val_score)": 0.5}
    [run] = runs.find(engine, "child")
    assert run["ended_at"] is not None and run["attempt"] == 0


def test_one_that_failed_skips_what_waits_for_it_unless_the_plan_says_go(engine: Engine) -> None:
    when = "mean(val_score) >= 0.95"
    children = [
        stage("strict", 1, after("parent", when)),
        stage("lenient", 1, after("parent", when, on_failed="go")),
    ]
    queue.init(engine, [stage("parent", 3), *children])
    queue.fail(engine, claim_one(engine), "bug", "x", heals=False)
    finish(engine, 1.0, 2)
    decided = {one.stage: one for one in queue.decide(engine)}
    assert (decided["strict"].decision, decided["strict"].reason) == ("shut", "parent: 1 failed of 3")
    assert decided["lenient"].decision == "open"
    assert "(n = 2 of 3)" in decided["lenient"].reason


def test_without_any_result_no_condition_holds(engine: Engine) -> None:
    gate = after("parent", "mean(val_score) < 0.5", on_failed="go")
    queue.init(engine, [stage("parent", 1), stage("child", 1, gate)])
    queue.fail(engine, claim_one(engine), "bug", "x", heals=False)
    [decided] = queue.decide(engine)
    assert decided.decision == "shut"
    assert "mean(val_score) = null (n = 0 of 1)" in decided.reason


def test_otherwise_go_lets_the_runs_go_on_and_says_why(engine: Engine) -> None:
    gate = after("parent", "mean(val_score) > 0.5", otherwise="go")
    queue.init(engine, [stage("parent", 1), stage("child", 1, gate)])
    finish(engine, 0.1)
    [decided] = queue.decide(engine)
    assert decided.decision == "open"
    assert "does not hold" in decided.reason


def test_a_gate_may_wait_for_some_runs_of_a_stage_and_for_several_stages(engine: Engine) -> None:
    both = Gate((Parents("a", where="seed = 1", when="max(val_score) > 0.5"), Parents("b", seed=0)))
    queue.init(engine, [stage("a", 2), stage("b", 2), stage("child", 1, both)])
    finish(engine, 0.0)  # a, seed 0: not asked about
    finish(engine, 1.0)  # a, seed 1
    assert queue.decide(engine) == []
    finish(engine, 0.0)  # b, seed 0
    [decided] = queue.decide(engine)
    assert decided.decision == "open"
    assert decided.reason == "max(val_score) > 0.5 holds of a (seed = 1): max(val_score) = 1 (n = 1)"


def test_a_filter_that_selects_no_run_shuts_the_gate(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent", where="seed = 7"))])
    assert messages(engine, "child") == {"there is no run of parent (seed = 7)"}
    assert states(engine, "child") == {"skipped": 1}


def test_skips_go_down_a_chain_in_one_transaction(engine: Engine) -> None:
    chain = [stage("b", 1, after("a", "mean(val_score) > 0.9")), stage("c", 2, after("b")), stage("d", 1, after("c"))]
    rescue = stage("e", 1, after("d", on_failed="go"))
    queue.init(engine, [stage("a", 1), *chain, rescue])
    finish(engine, 0.1)
    decided = queue.decide(engine)
    assert [(one.stage, one.decision) for one in decided] == [
        ("b", "shut"), ("c", "shut"), ("d", "shut"), ("e", "open"),
    ]  # fmt: skip
    assert messages(engine, "c") == {"b: 1 skipped of 1"}
    assert states(engine, "e") == {"pending": 1}
    # one transaction: all of them have one moment but for the clock's own ticks, and no state between was to be seen
    ended = [row["ended_at"] for row in rows(engine, "SELECT ended_at FROM runs WHERE state = 'skipped'")]
    assert max(ended) - min(ended) < 5.0


def test_a_parent_that_is_cancelled_counts_as_one_that_did_not_end_well(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent"))])
    queue.cancel(engine, [1])
    [decided] = queue.decide(engine)
    assert (decided.decision, decided.reason) == ("shut", "parent: 1 cancelled of 1")


def test_a_parent_that_is_tried_again_has_not_ended(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent"))])
    assert queue.fail(engine, claim_one(engine), "oom", "x") == "waiting"
    assert queue.decide(engine) == []
    assert queue.has_open(engine, "child")


def test_a_child_that_comes_when_its_parents_have_ended_is_decided_on_at_once(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1)])
    finish(engine, 1.0)
    queue.init(engine, [stage("child", 1, after("parent", "mean(val_score) > 0.5"))])
    assert states(engine, "child") == {"pending": 1}


def test_runs_that_come_when_their_gate_is_decided_on_follow_the_decision(engine: Engine) -> None:
    well, badly = "mean(val_score) >= 0.5", "mean(val_score) < 0.5"
    queue.init(
        engine, [stage("parent"), stage("go", 1, after("parent", well)), stage("left", 1, after("parent", badly))]
    )
    finish(engine, 0.9)
    queue.decide(engine)
    queue.init(engine, [stage("go", 3, after("parent", well)), stage("left", 3, after("parent", badly))])
    assert states(engine, "go") == {"pending": 3}
    assert states(engine, "left") == {"skipped": 3}
    assert messages(engine, "left") == {f"{badly} does not hold of parent: mean(val_score) = 0.9 (n = 1)"}


def test_a_worker_has_nothing_to_wait_for_where_nothing_goes_on(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent"))])
    assert queue.has_open(engine, "child")
    queue.pause(engine, "parent")
    assert not queue.has_open(engine)  # until somebody resumes it
    queue.resume(engine, "parent")
    claim = claim_one(engine)
    assert queue.has_open(engine, "child")  # it runs, here or elsewhere
    queue.finish(engine, claim, 10, {"loss": 1.0}, "loss")
    queue.decide(engine)
    assert queue.has_open(engine, "child")


# ---------------------------------------------------------------------------------------------- what is refused


def refused(engine: Engine, *stages: queue.NewStage) -> list[str]:
    with pytest.raises(InputError) as caught:
        queue.init(engine, list(stages))
    assert rows(engine, "SELECT * FROM stages") == []
    return caught.value.problems


def test_everything_that_a_gate_names_wrongly_is_said_at_once(engine: Engine) -> None:
    gate = Gate(
        (
            Parents("paren"),
            Parents("parent", seed=9),
            Parents("parent", when="mean(val_scor) > 0.5"),
            Parents("parent", when="val_score > 0.5"),
            Parents("parent", where="val_score > 0.5"),
            Parents("parent", where="state = done"),
        )
    )
    problems = refused(engine, stage("parent", 2), stage("child", 2, gate))
    assert problems[0] == "stage child: waits for paren, which is no stage (did you mean parent?)"
    assert problems[1] == "stage child: waits for the run of parent with seed 9, and there is none"
    assert "no such name: val_scor" in problems[2]
    assert "val_score is of one run" in problems[3] and "mean(val_score)" in problems[3]
    assert "asks for val_score, which changes as a run goes on" in problems[4]
    assert "asks for state, which changes as a run goes on" in problems[5]
    assert len(problems) == 6


def test_stages_that_wait_for_each_other_are_refused(engine: Engine) -> None:
    ring = [stage("a", 1, after("c")), stage("b", 1, after("a")), stage("c", 1, after("b"))]
    assert refused(engine, *ring) == ["stages wait for each other: a after c after b after a"]


def test_a_ring_that_closes_through_the_database_is_refused_too(engine: Engine) -> None:
    queue.init(engine, [stage("a", 1), stage("b", 1, after("a"))])
    with pytest.raises(InputError, match="wait for each other"):
        queue.init(engine, [stage("a", 2, after("b"))])
    assert states(engine, "a") == {"pending": 1}


def test_a_ring_that_closes_through_runs_that_a_definition_has_left_is_refused_too(engine: Engine) -> None:
    queue.init(engine, [stage("a", 1), stage("b", 1, after("a"))])
    other = stage("b", runs=new_runs(1, first=7))  # without a gate; run 0 of b stays, and waits for a
    with pytest.raises(InputError, match="wait for each other"):
        queue.init(engine, [stage("a", 1, after("b")), other])
    queue.init(engine, [stage("a", 1, after("b")), stage("b", 1)])  # turned round: nothing waits for a any more
    assert (states(engine, "a"), states(engine, "b")) == ({"waiting": 1}, {"pending": 1})


def test_an_init_that_ended_half_way_leaves_nobody_waited_for(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1)])
    [run] = stage("child", 1, after("parent")).runs
    with pytest.raises(IntegrityError):  # by a row that no database takes
        queue.init(engine, [stage("child", runs=[run, replace(run, fingerprint="x", label=None)])])  # type: ignore[arg-type]
    assert rows(engine, "SELECT id FROM gates") == []
    assert queue.delete(engine, "parent") == [1]


def test_a_stage_that_open_runs_are_to_start_from_cannot_be_deleted(engine: Engine) -> None:
    child = stage("child", 1, Gate((Parents("parent", start=True),)))
    start = as_json(rnnq.best("parent").shown())
    queue.init(engine, [stage("parent", 1), replace(child, runs=[replace(r, start_from=start) for r in child.runs])])
    finish(engine, 1.0, checkpoint=FILE)
    queue.decide(engine)
    with pytest.raises(InputError, match="runs of child start from stage parent"):
        queue.delete(engine, "parent")
    finish(engine, 1.0)
    assert queue.delete(engine, "parent") == [1]


def test_a_stage_that_others_wait_for_cannot_be_deleted(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent"))])
    with pytest.raises(InputError, match="is waited for by child"):
        queue.delete(engine, "parent")
    queue.delete(engine, "child")
    assert rows(engine, "SELECT * FROM gates") == []
    queue.delete(engine, "parent")


# ------------------------------------------------------------------------------------ what changes afterwards


def test_a_definition_that_says_otherwise_changes_the_gate_of_runs_that_still_wait(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent", "mean(val_score) > 0.9"))])
    [again] = queue.init(engine, [stage("child", 1, after("parent", "mean(val_score) > 0.1"))])
    assert (again.added, again.present) == (0, 1)
    assert len(rows(engine, "SELECT * FROM gates")) == 1
    finish(engine, 0.5)
    [decided] = queue.decide(engine)
    assert decided.decision == "open"


def test_a_definition_can_give_and_take_a_gate_while_nothing_has_begun(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1)])
    queue.init(engine, [stage("child", 1, after("parent"))])
    assert states(engine, "child") == {"waiting": 1}
    queue.init(engine, [stage("child", 1)])
    assert states(engine, "child") == {"pending": 1}
    assert rows(engine, "SELECT * FROM gates") == []


def test_runs_that_no_definition_adds_say_nothing_of_what_the_others_wait_for(engine: Engine) -> None:
    queue.init(engine, [stage("parent"), stage("child", 2, after("parent"), phase="second")])
    queue.init(engine, [stage("child", 3, defined=False)])  # as `rnnq retry --set`: one of them is there already
    assert states(engine, "child") == {"waiting": 2, "pending": 1}
    assert rows(engine, "SELECT phase FROM stages WHERE name = 'child'") == [{"phase": "second"}]


def test_a_decision_stands_until_it_is_taken_again(engine: Engine) -> None:
    when = after("parent", "mean(val_score) > 0.9")
    queue.init(engine, [stage("parent", 1), stage("child", 1, when), stage("grandchild", 1, after("child"))])
    finish(engine, 0.1)
    queue.decide(engine)
    change(engine, MEASURED, summary='{"val_score":0.95}')  # as after an extend
    assert queue.decide(engine) == []
    assert states(engine, "child") == {"skipped": 1}
    made = queue.redecide(engine)
    assert [(one.stage, one.decision) for one in made] == [("child", "open")]
    assert states(engine, "child") == {"pending": 1}
    assert states(engine, "grandchild") == {"waiting": 1}
    assert queue.redecide(engine) == []


def test_taking_a_decision_again_leaves_alone_what_has_begun(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 2, after("parent", "mean(val_score) > 0.9"))])
    finish(engine, 1.0)
    queue.decide(engine)
    claim = claim_one(engine)
    change(engine, MEASURED, summary='{"val_score":0.2}')
    [decided] = queue.redecide(engine)
    assert (decided.decision, decided.runs) == ("shut", (3,))
    assert states(engine, "child") == {"running": 1, "skipped": 1}
    queue.finish(engine, claim, 10, {"loss": 1.0}, "loss")


def test_a_parent_that_is_trained_again_reopens_the_question(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent"))])
    queue.fail(engine, claim_one(engine), "bug", "x", heals=False)
    queue.decide(engine)
    assert states(engine, "child") == {"skipped": 1}
    queue.retry(engine, [1])
    assert queue.redecide(engine) == []  # it waits again
    assert states(engine, "child") == {"waiting": 1}
    finish(engine, 1.0)
    queue.decide(engine)
    assert states(engine, "child") == {"pending": 1}


def test_a_run_that_was_left_out_can_be_retried_against_its_gate(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent", "mean(val_score) > 0.9"))])
    finish(engine, 0.1)
    queue.decide(engine)
    assert queue.retry(engine, [2]) == [2]
    assert states(engine, "child") == {"pending": 1}


def test_a_stage_cannot_take_the_name_of_one_that_gates_were_decided_on(engine: Engine) -> None:
    queue.init(engine, [stage("a"), stage("b"), stage("child", 1, after("a"))])
    finish(engine, 1.0, 2)
    queue.decide(engine)
    queue.delete(engine, "a")
    queue.init(engine, [stage("child", 2, after("b"))])  # renamed, the two gates would be one
    with pytest.raises(InputError, match="gates of child were decided on an earlier stage a"):
        queue.rename(engine, "b", "a")
    queue.rename(engine, "b", "c")


def test_a_run_that_was_cancelled_while_it_waited_waits_again_when_it_is_retried(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 2, after("parent"))])
    assert queue.cancel(engine, [2, 3]) == ([2, 3], [])
    assert steer.retry(engine, steer.Choice([2]), dry_run=True).rows[0]["now"] == "waiting"
    assert queue.retry(engine, [2]) == [2]
    assert states(engine, "child") == {"waiting": 1, "cancelled": 1}
    finish(engine, 1.0)
    queue.decide(engine)
    assert states(engine, "child") == {"pending": 1, "cancelled": 1}
    assert queue.retry(engine, [3]) == [3]  # decided meanwhile
    assert states(engine, "child") == {"pending": 2}


def test_a_stage_that_is_renamed_is_still_waited_for(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), stage("child", 1, after("parent"))])
    queue.rename(engine, "parent", "base")
    finish(engine, 1.0)
    [decided] = queue.decide(engine)
    assert decided.decision == "open"


# ------------------------------------------------------------------------------------------- whose weights it has

START = {"stage": "parent", "which": "best"}


def starting(spec: Mapping[str, Any], n: int = 1, **changes: Any) -> queue.NewStage:
    """A stage whose runs start from the weights of others, and wait for nothing."""
    made = [replace(run, fingerprint=f"c{run.seed}", start_from=as_json(spec)) for run in new_runs(n)]
    return new_stage(name="child", runs=made, fields=FIELDS, metrics=METRICS, **changes)


def with_file(engine: Engine, loss: float, number: int) -> None:
    file = FILE | {"path": f"last{number}.pt"}
    queue.finish(engine, claim_one(engine), 10, {"loss": loss}, "loss", (), file, FILE | {"path": f"best{number}.pt"})


@pytest.mark.parametrize(
    ("spec", "better", "expected"),
    [
        (START, "min", "best2.pt"),
        (START | {"which": "last"}, "min", "last2.pt"),
        (START, "max", "best3.pt"),
        (START | {"same_seed": True}, "min", "best1.pt"),
        (START | {"where": "seed >= 2"}, "min", "best3.pt"),
    ],
)
def test_a_run_starts_from_the_best_of_the_runs_that_are_done(
    engine: Engine, spec: dict[str, Any], better: str, expected: str
) -> None:
    metrics = [METRICS[0] | {"better": better}, METRICS[1]]
    queue.init(engine, [stage("parent", 4, metrics=metrics), starting(spec)])
    for number, loss in enumerate((2.0, 1.0, 3.0), start=1):
        with_file(engine, loss, number)
    queue.fail(engine, claim_one(engine), "bug", "x", heals=False)
    claim = claim_one(engine)
    found = queue.parent_of(engine, claim)
    assert found.file["path"] == expected
    [row] = rows(engine, "SELECT * FROM lineage")
    assert (row["child"], row["parent"], row["kind"]) == (claim.run, found.run, "continue")
    assert json.loads(row["detail"])["path"] == expected


def test_the_choice_stays_the_same_until_its_file_is_gone(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 2), starting(START)])
    with_file(engine, 2.0, 1)
    with_file(engine, 3.0, 2)
    claim = claim_one(engine)
    assert queue.parent_of(engine, claim).run == 1
    queue.release(engine, claim)
    change(engine, "UPDATE runs SET loss = 1.0 WHERE id = 2")
    again = claim_one(engine)
    assert queue.parent_of(engine, again).run == 1
    change(engine, "UPDATE runs SET checkpoint = NULL, checkpoint_best = NULL WHERE id = 1")
    assert queue.parent_of(engine, again).run == 2
    assert [row["parent"] for row in rows(engine, "SELECT parent FROM lineage")] == [2]


def test_a_parent_that_is_trained_further_is_still_started_from(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), starting(START)])
    with_file(engine, 2.0, 1)
    assert queue.extend(engine, {1: 20}) == [1]
    parent = claim_one(engine)
    assert parent.run == 1
    assert queue.parent_of(engine, claim_one(engine)).file["path"] == "best1.pt"


def test_a_run_of_another_family_is_a_probe(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), starting(START, family="probe")])
    with_file(engine, 1.0, 1)
    queue.parent_of(engine, claim_one(engine))
    assert [row["kind"] for row in rows(engine, "SELECT kind FROM lineage")] == ["probe"]


def test_where_there_is_nothing_to_start_from_that_is_said(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 1), starting(START | {"same_seed": True})])
    finish(engine, 1.0)  # without a checkpoint
    claim = claim_one(engine)
    with pytest.raises(InputError, match="run 1 of parent has no checkpoint"):
        queue.parent_of(engine, claim)
    change(engine, "UPDATE runs SET seed = 5 WHERE id = 1")
    with pytest.raises(InputError, match="no run of parent with seed 0 is done, whose weights run 2 would start from"):
        queue.parent_of(engine, claim)
    queue.cancel(engine, [claim.run], at_once=True)
    with pytest.raises(LeaseLost):
        queue.parent_of(engine, claim)


def test_gc_lets_nothing_go_that_a_run_may_yet_start_from(engine: Engine) -> None:
    queue.init(engine, [stage("parent", 2), starting(START)])
    with_file(engine, 1.0, 1)
    with_file(engine, 2.0, 2)
    leaving = [queue.Leaving(run, 1, ("checkpoint",), (f"last{run}.pt",), 1) for run in (1, 2)]
    assert queue.let_go(engine, leaving, {}) == []
    queue.finish(engine, claim_one(engine), 10, {"loss": 1.0}, "loss")
    assert [one.run for one in queue.let_go(engine, leaving, {})] == [1, 2]


# ------------------------------------------------------------------------------------------- as a definition says it

STUDY = """
import rnnq

class Config(rnnq.Config):
    metrics = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_score", better="max"))
    steps: int = 2

@rnnq.family(Config)
def simple(config):
    yield {"loss": 1.0, "val_score": 0.9}

base = rnnq.stage("base", simple, rnnq.grid(steps=[2]).seeds(2), priority=3, phase="1 base")
more = rnnq.stage("more", simple, rnnq.grid(steps=[3]).seeds(2), after=base, when="mean(val_score) > 0.5",
                  start_from=rnnq.best("base", same_seed=True))
both = rnnq.stage("both", simple, rnnq.grid(steps=[3]),
                  after=[rnnq.runs_of("base", when="all(done)"), rnnq.runs_of("more", "seed = 1")], on_failed="go")
"""


def planned(folder: Path, content: str = STUDY) -> list[queue.NewStage]:
    path = folder / "study.py"
    path.write_text(content)
    return plan.from_definitions([definitions.load(path)], folder)


def test_a_definition_says_what_waits_for_what(tmp_path: Path) -> None:
    base, more, both = planned(tmp_path)
    assert [run.gate for run in base.runs] == [None, None]
    assert [run.priority for run in base.runs] == [3, 3]
    assert base.phase == "1 base"
    first, second = (gates.of_json(str(run.gate)) for run in more.runs)
    assert first.after == (Parents("base", when="mean(val_score) > 0.5"), Parents("base", seed=0, start=True))
    assert second.after[1] == Parents("base", seed=1, start=True)
    assert more.runs[0].start_from == '{"same_seed":true,"stage":"base","which":"best"}'
    assert gates.of_json(str(both.runs[0].gate)) == Gate(
        (Parents("base", when="all(done)"), Parents("more", where="seed = 1")), on_failed="go"
    )
    assert both.runs[0].start_from is None


def test_whose_weights_a_run_starts_from_is_a_part_of_what_it_is(tmp_path: Path) -> None:
    _, more, both = planned(tmp_path)
    assert more.runs[0].fingerprint != both.runs[0].fingerprint  # the same config
    assert more.runs[0].group_key == more.runs[1].group_key != both.runs[0].group_key


def test_gates_are_equal_exactly_for_what_they_say() -> None:
    gate = Gate((Parents("a", seed=0), Parents("b", where="x = 1", when="all(done)", start=True)), "go", "go")
    assert gates.of_json(gate.to_json()) == gate
    assert Gate((Parents("a", seed=0),)).to_json() != Gate((Parents("a"),)).to_json()
    assert gate.shown() == "a (seed 0); b (x = 1): all(done)"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"after": ["a", "c"], "when": "all(done)"}, "would be said of more than one"),
        ({"when": "all(done)"}, "is about the one stage of after=, which is missing"),
        ({"after": "b"}, "waits for itself"),
        ({"after": "a", "on_failed": "no"}, "on_failed= is one of skip, go; not 'no'"),
        ({"after": "a", "otherwise": "wait"}, "otherwise= is one of skip, go; not 'wait'"),
        ({"start_from": "a"}, "start_from= takes rnnq.best(...)"),
        ({"after": 3}, "after= takes the names of stages"),
        ({"after": "a b"}, "cannot be the name of a stage"),
        ({"priority": 1.5}, "priority= takes a whole number"),
        ({"phase": ""}, "phase= takes words"),
        ({"otherwise": "go"}, "waits for nothing"),
        ({"after": "a", "when": 3}, "when= takes a condition"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_the_stage_is_made(words: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        rnnq.stage("b", "dynamics", rnnq.grid(seed=[1]), **words)
    assert problem in "\n".join(caught.value.problems)


def each_its_own(n: int, **more: Any) -> queue.NewStage:
    """A stage of n runs, each behind a gate of its own seed."""
    found = stage("child", n)
    made = [replace(run, gate=Gate((Parents("parent", seed=run.seed, **more),)).to_json()) for run in found.runs]
    return replace(found, runs=made)


@pytest.mark.parametrize("where", [None, "seed >= 0"])
def test_a_look_at_many_gates_asks_for_the_runs_of_a_stage_once(engine: Engine, where: str | None) -> None:
    queue.init(engine, [stage("parent", 40), each_its_own(40, where=where)])
    asked: list[str] = []
    listen(engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    assert queue.decide(engine) == []
    assert len(asked) < 10, asked


def test_gates_that_are_ripe_in_great_numbers_are_decided_on_in_several_transactions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "LONG", 0.0)
    queue.init(engine, [stage("parent", 4), each_its_own(4), stage("grandchild", 1, after("child"))])
    queue.cancel(engine, [1, 2, 3, 4])
    commits: list[object] = []
    listen(engine, "commit", commits.append)
    assert [decided.decision for decided in queue.decide(engine)] == ["shut"] * 5
    assert len(commits) > 4
    assert states(engine, "grandchild") == {"skipped": 1}


# ---------------------------------------------------------------------------------------- with workers at work

WEIGHTS = """
import torch
import rnnq

class Config(rnnq.Config):
    metrics = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    best_metric = "val_loss"
    steps: int = 20
    width: int = 3
    eval_every: int = 5

class Line(rnnq.Family):
    Config = Config
    name = "line"

    def build(self, config):
        return torch.nn.Linear(config.width, 1)

    def batch(self, config, step):
        x = torch.randn(8, config.width, generator=torch.Generator().manual_seed(config.seed * 1000 + step))
        return x, x.sum(1, keepdim=True)

    def loss(self, module, data):
        return (module(data[0]) - data[1]).square().mean()

    def evaluate(self, module, config, split):
        return {f"{split}_loss": float((module.weight - 1).square().mean())}

base = rnnq.stage("base", Line, rnnq.grid(steps=[200]).seeds(2))
more = rnnq.stage("more", Line, rnnq.grid(steps=[10]).seeds(2), start_from=rnnq.best("base", same_seed=True))
wide = rnnq.stage("wide", Line, rnnq.grid(width=[4]), start_from=rnnq.best("base"))
"""


def test_workers_start_runs_from_the_weights_that_their_stage_names(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(WEIGHTS))
        study.rnnq("worker", code=1)  # the wide one fails
        losses = {(row["stage"], row["seed"]): row["loss"] for row in study.rows("SELECT stage, seed, loss FROM runs")}
        assert all(losses["more", seed] < 2 * losses["base", seed] for seed in (0, 1)), losses
        best = min((1, 2), key=lambda run: losses["base", run - 1])
        lineage = study.rows("SELECT child, parent, kind FROM lineage ORDER BY child")
        assert [tuple(row.values()) for row in lineage] == [
            (3, 1, "continue"),
            (4, 2, "continue"),
            (5, best, "continue"),
        ]
        [wide] = study.rows("SELECT state, message FROM runs WHERE stage = 'wide'")
        assert wide["state"] == "failed"
        assert "weight is of shape [1, 4] here and of shape [1, 3] in run" in wide["message"]


def test_an_export_of_runs_that_started_from_others_makes_the_same_runs_elsewhere(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(WEIGHTS))
        study.rnnq("worker", "--stage", "base")
        study.rnnq("worker", "--stage", "more")
        asked = (
            "SELECT label, config, fingerprint, group_key, start_from, loss FROM runs WHERE stage = '{}' ORDER BY id"
        )
        for file in ("more.csv", "more.parquet"):
            stage = f"of-{file}"
            study.rnnq("export", "--stage", "more", "--out", file)
            study.rnnq("import", file, "--stage", stage, "--family", "defs/study.py:line")
            assert study.rows(asked.format(stage)) == study.rows(asked.format("more"))
        assert "starts from the best checkpoint of base" in study.rnnq("plan")
        wrong = (tmp_path / "more.csv").read_text().replace('""stage""', '""stag""')
        (tmp_path / "wrong.csv").write_text(wrong)
        said = study.rnnq("import", "wrong.csv", "--stage", "x", "--family", "defs/study.py:line", code=2)
        assert "column start_from" in said and "says of no stage" in said


def test_a_parent_whose_file_is_gone_fails_its_child_and_nothing_else(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(WEIGHTS.rpartition("wide =")[0]))
        study.rnnq("worker", "--runs", "2")
        for file in (tmp_path / "checkpoints").glob("*/base/1/*"):
            file.unlink()
        study.rnnq("worker", code=1)
        found = study.rows("SELECT id, state, cause, message FROM runs WHERE stage = 'more' ORDER BY id")
        assert [(row["state"], row["cause"]) for row in found] == [("failed", "data"), ("done", None)]
        assert "run 3 starts from run 1 of base, and " in found[0]["message"]
        assert "cannot be read" in found[0]["message"]


# ------------------------------------------------------------------------------ failures that were the worker's own


def test_what_was_decided_on_failures_that_were_handed_back_is_open_again(engine: Engine) -> None:
    chain = [stage("child", 1, after("parent")), stage("grandchild", 1, after("child"))]
    queue.init(engine, [stage("parent", 1), *chain, stage("other", 1)])
    claim = claim_one(engine)
    queue.fail(engine, claim, "bug", "x", heals=False)
    queue.decide(engine)
    assert states(engine, "grandchild") == {"skipped": 1}
    assert queue.hand_back(engine, [claim], "it was this machine") == [claim.run]
    assert (states(engine, "child"), states(engine, "grandchild")) == ({"waiting": 1}, {"waiting": 1})
    assert queue.decide(engine) == []
    finish(engine, 1.0)
    queue.decide(engine)
    assert states(engine, "child") == {"pending": 1}
