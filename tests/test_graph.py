"""The graph of a study's gates: as it stands, as a picture, and before anything is queued."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from rnnq import costs, db, definitions, gates, graph, plan, queue
from rnnq import status as overview
from rnnq.cli import look, status
from rnnq.cli import plan as command
from rnnq.cli.options import Format
from rnnq.errors import InputError
from rnnq.gates import Gate, Parents
from rnnq.graph import Node
from tests.conftest import Cli, claim_one, new_stage
from tests.studies import ACCURACY, FIELDS, LOSS, finish, new_run
from tests.test_cli import write


def stage(name: str, n: int = 1, after: tuple[Parents, ...] = (), **changes: Any) -> queue.NewStage:
    """A stage of n runs, seeds 0..n-1, behind one gate; a parent with seed -1 is that of the run's own seed."""
    rules = {key: changes.pop(key) for key in ("otherwise", "on_failed") if key in changes}
    also = {key: changes.pop(key) for key in ("priority", "start_from") if key in changes}
    runs = []
    for seed in range(n):
        of = tuple(Parents(**{**vars(p), "seed": seed if p.seed == -1 else p.seed}) for p in after)
        gate = Gate(of, **rules).to_json() if after else None
        runs.append(queue.NewRun(**{**vars(new_run(seed, name, seed)), **also, "gate": gate}))
    return new_stage(name=name, runs=runs, **{"fields": FIELDS, "metrics": [LOSS, ACCURACY]} | changes)


def nodes(engine: Engine) -> dict[str, Node]:
    return {node.stage: node for node in graph.read(engine).nodes}


def fail(engine: Engine) -> queue.Claim:
    claim = claim_one(engine)
    queue.fail(engine, claim, "bug", "as asked", "")
    return claim


GOOD = "mean(accuracy) >= 0.95"


# -------------------------------------------------------------------------------------------------- the order


def test_stages_come_after_what_they_wait_for_then_by_priority_then_as_they_were_made() -> None:
    stages = {"a": (0, []), "b": (5, ["c"]), "c": (1, []), "d": (1, []), "e": (9, ["a"])}
    assert graph.in_order(stages) == ["c", "b", "d", "a", "e"]


def test_a_ring_that_init_would_refuse_hides_no_stage() -> None:
    assert graph.in_order({"a": (0, ["b"]), "b": (0, ["a"]), "c": (0, ["gone"])}) == ["c", "a", "b"]


def test_depth_is_the_longest_way() -> None:
    parents = {"b": ["a"], "c": ["a", "b"], "d": ["nobody"]}
    assert graph.depths(["a", "b", "c", "d"], parents) == {"a": 0, "b": 1, "c": 2, "d": 0}


# ------------------------------------------------------------------------------------------------ as it stands


@pytest.mark.both
def test_a_waiting_stage_says_what_for_and_how_that_stands(engine: Engine) -> None:
    queue.init(engine, [stage("base", 2), stage("next", 1, (Parents("base", when=GOOD),))])
    finish(engine, 1.0, accuracy=0.99)
    found = nodes(engine)["next"]
    assert found.after == (graph.Arrow("base", when=GOOD),)
    [gate] = found.gates
    assert (gate.decision, gate.reason, gate.stale) == (None, "base: 1 of 2 not yet ended", None)
    assert gate.runs == {"waiting": 1}
    assert (found.state, found.depth) == ("waiting", 1)
    assert graph.gate_of(engine, 3) == gate
    assert graph.gate_of(engine, 1) is None


@pytest.mark.both
def test_a_decision_stands_with_the_values_that_it_was_taken_on(engine: Engine) -> None:
    queue.init(engine, [stage("base", 2), stage("next", 3, (Parents("base", when=GOOD),))])
    for value in (0.97, 0.99):
        finish(engine, 1.0, accuracy=value)
    queue.decide(engine)
    found = nodes(engine)["next"]
    [gate] = found.gates
    assert (gate.decision, found.runs) == ("open", {"pending": 3})
    [seen] = found.seen_of(found.after[0])
    assert (seen["values"], seen["done"], seen["of"]) == ({"mean(accuracy)": pytest.approx(0.98)}, 2, 2)


@pytest.mark.both
def test_skips_and_their_reasons_go_down_the_graph(engine: Engine) -> None:
    second = stage("third", 2, (Parents("next"),))
    queue.init(engine, [stage("base"), stage("next", 1, (Parents("base", when=GOOD),)), second])
    finish(engine, 1.0, accuracy=0.5)
    queue.decide(engine)
    found = nodes(engine)
    [(reason, n)] = found["next"].skipped.items()
    assert (n, reason) == (1, f"{GOOD} does not hold of base: mean(accuracy) = 0.5 (n = 1)")
    assert found["third"].skipped == {"next: 1 skipped of 1": 2}
    assert (found["third"].state, found["third"].depth) == ("skipped", 2)


@pytest.mark.both
def test_a_gate_for_each_seed_is_one_arrow_and_several_standings(engine: Engine) -> None:
    queue.init(engine, [stage("base", 3), stage("next", 3, (Parents("base", seed=-1),))])
    finish(engine, 1.0)
    fail(engine)
    queue.decide(engine)
    found = nodes(engine)["next"]
    assert found.after == (graph.Arrow("base", same_seed=True),)
    assert [(gate.seed, gate.decision) for gate in found.gates] == [(0, "open"), (1, "shut"), (2, None)]
    assert sum(one["done"] for one in found.seen_of(found.after[0])) == 1
    assert overview.behind(engine) == overview.behind(engine, "next") == (1, 1)
    assert overview.behind(engine, "base") == (0, 0)


@pytest.mark.both
def test_a_decision_that_would_be_another_today_is_stale_and_redecide_takes_it_back(engine: Engine) -> None:
    queue.init(engine, [stage("base"), stage("next", 2, (Parents("base"),))])
    failed = fail(engine)
    queue.decide(engine)
    assert not nodes(engine)["next"].stale
    queue.retry(engine, [failed.run])
    [gate] = nodes(engine)["next"].stale
    assert (gate.stale, gate.movable) == ("today it would be undecided: base: 1 of 1 not yet ended", 2)
    finish(engine, 1.0)
    [gate] = nodes(engine)["next"].stale
    assert gate.stale == "today it would be open: all runs that it waits for have ended"

    assert [one.decision for one in queue.redecide(engine)] == ["open"]
    found = nodes(engine)["next"]
    assert (found.stale, found.runs) == ([], {"pending": 2})


def test_a_stale_decision_whose_runs_have_begun_says_that_none_would_be_taken_back(engine: Engine) -> None:
    queue.init(engine, [stage("base"), stage("next", 1, (Parents("base"),), on_failed="go")])
    failed = fail(engine)
    queue.decide(engine)
    queue.release(engine, claim_one(engine))  # pending again, but it has begun
    queue.retry(engine, [failed.run])
    [gate] = nodes(engine)["next"].stale
    assert gate.movable == 0
    assert queue.redecide(engine) == []


def test_a_quick_look_sees_what_the_queue_sees(engine: Engine) -> None:
    after = (Parents("base", seed=-1), Parents("base"), Parents("base", where="width = 16"))
    queue.init(engine, [stage("base", 3), *(stage(f"n{i}", 2, (one,)) for i, one in enumerate(after))])
    finish(engine, 1.0)
    fail(engine)
    with db.reading(engine) as connection:
        conditions = connection.execute(text("SELECT condition FROM gates ORDER BY id")).scalars().all()
        looks = [gates.look(connection, gates.of_json(condition)) for condition in conditions]
    standings = [gate for name in ("n0", "n1", "n2") for gate in nodes(engine)[name].gates]
    assert [(list(one.seen), one.decision) for one in standings] == [(list(look.seen), None) for look in looks]


@pytest.mark.both
def test_start_from_is_told_with_the_runs_that_were_chosen(engine: Engine) -> None:
    start = json.dumps({"stage": "base", "same_seed": True, "which": "best"})
    after = (Parents("base", seed=-1, start=True),)
    queue.init(engine, [stage("base", 2), stage("next", 2, after, start_from=start)])
    for _ in range(2):
        claim = claim_one(engine)
        saved = {"path": f"{claim.run}.pt", "step": 10, "sha256": "0" * 64, "bytes": 1}
        queue.record(engine, claim, 10, [], saved)
        queue.finish(engine, claim, 10, {"loss": 1.0}, "loss", [], saved)
    queue.decide(engine)
    queue.parent_of(engine, claim_one(engine))
    found = nodes(engine)["next"]
    assert found.start_from == "the best checkpoint of base, same seed"
    assert found.started == ((3, 1),)


def test_a_stage_both_waited_for_and_started_from_is_one_arrow_but_for_a_condition() -> None:
    both = (Parents("a"), Parents("a", start=True))
    assert graph.arrows_of([Gate(both)]) == (graph.Arrow("a", start=True),)
    held = (Parents("a", when=GOOD), Parents("a", start=True))
    assert graph.arrows_of([Gate(held)]) == (graph.Arrow("a", when=GOOD), graph.Arrow("a", start=True))


def test_runs_of_an_init_that_was_interrupted_are_seen_by_nobody(engine: Engine) -> None:
    queue.init(engine, [stage("base"), stage("next", 1, (Parents("base"),))])
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE intakes SET complete = 0 WHERE stage = 'next'"))
    assert list(nodes(engine)) == ["base"]


def test_phases_come_in_the_order_of_their_stages_and_sum_up_what_they_cost(engine: Engine) -> None:
    queue.init(engine, [stage("a", 2, phase="one"), stage("b", phase="two"), stage("c", phase="one")])
    finish(engine, 1.0)
    with db.transaction(engine) as connection:
        connection.execute(text("UPDATE attempts SET started_at = ended_at - 7200, step_from = 0"))
    found = graph.read(engine)
    assert [(phase, [node.stage for node in of]) for phase, of in found.phases()] == [
        ("one", ["a", "c"]),
        ("two", ["b"]),
    ]
    sums = graph.cost_row(found.nodes)
    # b and c have no run of their own yet: reckoned by a, whose config is like theirs
    assert (round(sums["cost_h"], 2), round(sums["to_go_h"], 2), sums["unknown_runs"]) == (2.0, 6.0, 0)


@pytest.mark.both
def test_what_waits_is_reckoned_apart_from_what_is_certain(engine: Engine) -> None:
    queue.init(engine, [stage("a", 2), stage("b", 3, (Parents("a", when=GOOD),))])
    sums = graph.cost_row(graph.read(engine).nodes)
    assert sums["unknown_runs"] == 5
    sums = graph.cost_row(graph.read(engine, {"a": lambda config: 1.0, "b": lambda config: 2.0}).nodes)
    assert (sums["to_go_h"], sums["waiting_h"], sums["unknown_runs"]) == (2.0, 6.0, 0)


# --------------------------------------------------------------------------------------------- before it is queued


def test_a_stage_behind_a_condition_is_not_certain_nor_is_what_waits_for_it() -> None:
    made = [
        stage("base"),
        stage("well", after=(Parents("base", when=GOOD),)),
        stage("after", after=(Parents("well"),)),
        stage("anyway", after=(Parents("base", when=GOOD),), otherwise="go"),
        stage("without", after=(Parents("well"),), on_failed="go"),
        stage("plain", after=(Parents("base"),)),
    ]
    found = {one.stage: one.condition for one in graph.foresee(made, costs.Costs(), {})}
    conditional = {"well": f"base: {GOOD}", "after": "well is trained"}
    assert found == dict.fromkeys(("base", "anyway", "without", "plain")) | conditional


def test_hours_are_those_that_the_stage_states_and_a_total_says_what_is_unknown() -> None:
    made = [stage("a", 2, priority=1), stage("b", 3, priority=7), stage("c", 1, (Parents("a", when=GOOD),))]
    found = graph.foresee(made, costs.Costs(), {"a": lambda config: 1.5, "c": lambda config: config["seed"] + 4.0})
    assert [one.stage for one in found] == ["b", "a", "c"]
    totals = graph.totals(found)
    assert (totals["certain"]["hours"], totals["certain"]["unknown_runs"]) == (3.0, 3)
    assert (totals["all"]["hours"], totals["all"]["runs"]) == (7.0, 6)


# ----------------------------------------------------------------------------------------------------- the picture


def test_no_two_boxes_of_the_picture_stand_on_each_other_and_bands_do_not_cross(engine: Engine) -> None:
    from rnnq.figures import graph as picture

    made = [stage(f"a{i}", phase="one") for i in range(4)]
    made += [stage(f"b{i}", 1, (Parents(f"a{i % 2}", when=GOOD),), phase="two") for i in range(4)]
    made += [stage("c", 1, (Parents("b3"), Parents("a0", start=True)), phase="one")]
    queue.init(engine, made)
    places, bands = picture.layout(graph.read(engine).nodes)
    assert len(set(places.values())) == len(places) == 9
    assert all(places[f"b{i}"].column == 1 for i in range(4))
    assert places["c"].column == 2
    assert bands == [("one", 0, 3), ("two", 4, 7)]


# ------------------------------------------------------------------------------------------------ the command line


STUDY = """
    import rnnq

    class ToyConfig(rnnq.Config):
        metrics = (rnnq.Metric("loss", "nats", primary=True), rnnq.Metric("acc", "", "max"))
        level: float = 0.5
        steps: int = 3

    @rnnq.family(ToyConfig)
    def toy(config):
        for step in range(config.steps):
            yield {"loss": 1 - config.level, "acc": config.level + 0.001 * config.seed}

    good = rnnq.stage("good", toy, rnnq.grid(level=0.98).seeds(3), phase="first", priority=5)
    bad = rnnq.stage("bad", toy, rnnq.grid(level=0.3).seeds(3), phase="first", hours=lambda c: c["steps"] / 2)
    big = rnnq.stage("big", toy, rnnq.grid(steps=5).seeds(2), phase="second", after=good, when="mean(acc) >= 0.95")
    rescue = rnnq.stage("rescue", toy, rnnq.grid(steps=7), phase="second", after=good, when="mean(acc) < 0.95")

    asked = rnnq.question("H1", "Do both match?", of=good, against=bad, by="acc", margin=0.1)
"""


def test_the_plan_of_a_study_from_before_it_is_queued_to_its_end(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # so that our own process sees what the real ones do
    file = write(tmp_path, STUDY)

    def shown(command: Callable[..., None], *words: Any, **options: Any) -> str:
        command(*words, **options)
        return capsys.readouterr().out

    first = shown(command.plan, [file], dry_run=True)
    assert "certain: 2 stages, 6 runs, 18 steps, 4 h 30 min and 3 runs of unknown cost" in first
    assert "3. if good: mean(acc) >= 0.95" in first
    assert not (tmp_path / "experiments.db").exists()

    cli("init", file)
    waits = shown(command.plan)
    assert "◌ big: 2 waiting (toy, priority 0)\n    after good: mean(acc) >= 0.95 [0 of 3 ended]" in waits
    assert "3 runs wait behind 2 gates" in shown(status.status)
    waiting = shown(look.show, 7)
    assert "waits:   for good: mean(acc) >= 0.95\n         not yet: good: 3 of 3 not yet ended" in waiting

    cli("worker", "--device", "cpu")
    done = shown(command.plan)
    assert "after good: mean(acc) >= 0.95 [0.9810; n = 3 of 3]\n    gate open" in done
    assert "gate shut: mean(acc) < 0.95 does not hold of good: mean(acc) = 0.981 (n = 3)" in done
    assert "wait behind" not in shown(status.status)
    skipped = shown(look.show, 9)
    assert "message: mean(acc) < 0.95 does not hold of good" in skipped
    assert "waited:  for good: mean(acc) < 0.95\n         gate shut\n" in skipped
    again = json.loads(shown(command.plan, [file], dry_run=True, format=Format.json))
    assert again["stages"][0]["basis"] == ["measured on 3 runs equal but for the seed"]

    command.plan(redecide=True)
    said = capsys.readouterr()
    assert (said.out, "nothing was decided anew" in said.err) == ("", True)
    assert shown(command.plan, answers=True).startswith("H1: no. Do both match?")


def test_a_run_that_will_be_tried_again_waits_for_its_time_and_behind_no_gate(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.init(engine, [stage("base"), stage("next", 1, (Parents("base"),))])
    queue.fail(engine, claim_one(engine), "oom", "no memory", "")
    address = str(tmp_path / "experiments.db")
    look.show(1, address)
    assert "waits:   is tried again at " in capsys.readouterr().out
    status.status(address)
    assert "1 run waits behind 1 gate: `rnnq plan`" in capsys.readouterr().out
    look.ls(address)
    assert "`rnnq show RUN` says what a run waits for" in capsys.readouterr().err


def test_redecide_says_what_changed(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue.init(engine, [stage("base"), stage("next", 2, (Parents("base"),))])
    failed = fail(engine)
    queue.decide(engine)
    queue.retry(engine, [failed.run])
    finish(engine, 1.0)
    command.plan(["next"], str(tmp_path / "experiments.db"), redecide=True)
    said = capsys.readouterr().out
    assert said == "next: now open, 2 runs may be trained: all runs that it waits for have ended\n"


def test_redecide_tells_of_decisions_that_are_taken_back_and_cannot_be_taken_yet(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.init(engine, [stage("base"), stage("next", 2, (Parents("base"),))])
    failed = fail(engine)
    queue.decide(engine)
    queue.retry(engine, [failed.run])
    command.plan([], str(tmp_path / "experiments.db"), redecide=True)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("next: now undecided, 2 runs waiting: base: 1 of 1 not yet ended\n", "")


def test_rows_of_the_plan_have_costs_in_hours_and_the_picture_its_numbers_beside_it(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / write(tmp_path, STUDY)
    stages = plan.from_definitions([definitions.load(file)], tmp_path / "defs")
    queue.init(engine, stages)
    address = str(tmp_path / "experiments.db")

    command.plan([], address, save=tmp_path / "drawn", format=Format.json)
    found = json.loads(capsys.readouterr().out)
    assert [one["stage"] for one in found["stages"]] == ["good", "bad", "big", "rescue"]
    assert {one["phase"] for one in found["phases"]} == {"first", "second"}
    assert found["total"] == {"cost_h": 0, "lost_h": 0, "to_go_h": 0, "waiting_h": 0, "unknown_runs": 9}
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"plan.png", "plan.svg", "plan.csv"}
    rows = list(csv.DictReader((tmp_path / "drawn" / "plan.csv").read_text().splitlines()))
    assert [(row["stage"], row["waits_for"], row["when"]) for row in rows][2] == ("big", "good", "mean(acc) >= 0.95")
    assert "mean(acc) &gt;= 0.95" in (tmp_path / "drawn" / "plan.svg").read_text()

    command.plan([], address, format=Format.csv)
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["waiting"] for row in rows] == ["0", "0", "2", "1"]
    command.plan([str(file)], address, format=Format.json)
    hours = json.loads(capsys.readouterr().out)["total"]
    assert (hours["to_go_h"], hours["unknown_runs"]) == (4.5, 6)


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["x.py"], {"dry_run": True, "answers": True}, "--dry-run and --answers are different questions"),
        ([], {"dry_run": True}, "--dry-run needs a definition file"),
        (["x.py", "y.py"], {"dry_run": True}, "x.py does not exist\ny.py does not exist"),
        (["a", "b"], {"redecide": True}, "--redecide takes one stage"),
        (["bse"], {"redecide": True}, "there is no stage 'bse'"),
        ([], {"answers": True, "save": Path("x")}, "--save draws the graph of the database"),
        (["base"], {}, "base does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_meant_is_refused(
    engine: Engine, tmp_path: Path, names: list[str], options: dict[str, Any], says: str
) -> None:
    queue.init(engine, [stage("base")])
    with pytest.raises(InputError) as error:
        command.plan(names, str(tmp_path / "experiments.db"), **options)
    assert says in error.value.message


def test_an_empty_database_has_an_empty_plan(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.plan([], str(tmp_path / "experiments.db"), save=tmp_path / "drawn")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "there is no stage yet; `rnnq init DEFINITION` adds one\n")
    assert not (tmp_path / "drawn").exists()


def test_the_text_of_a_plan_needs_neither_torch_nor_pandas_nor_matplotlib(cli: Cli, tmp_path: Path) -> None:
    from tests.test_house import imported_by

    cli("init", write(tmp_path, STUDY))
    loaded = imported_by("plan", folder=tmp_path)
    assert "rnnq.graph" in loaded
    assert not loaded & {"torch", "pandas", "matplotlib", "pydantic", "scipy"}
