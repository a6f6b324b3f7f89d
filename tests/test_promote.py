"""The best of a stage become the next stage."""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from rnnq import db, definitions, plan, promote, queue, ranking, runs, sweep
from rnnq.errors import InputError
from rnnq.promote import Request
from tests.conftest import PROVENANCE, ROOT, Cli

STUDY = """
    from typing import ClassVar
    from pydantic import Field
    import rnnq

    class ToyConfig(rnnq.Config):
        metrics = (rnnq.Metric("loss", "nats", primary=True), rnnq.Metric("acc", "", "max"))
        x: int = Field(default=0, ge=0, le=99)
        steps: int = 1
        word: str = "a"

    @rnnq.family(ToyConfig)
    def toy(config):
        yield {"loss": float(config.x), "acc": float(config.x)}

    def grow(config):
        yield config | {"steps": 5}
        yield config | {"x": config["x"] // 2, "steps": 5}

    stage = rnnq.stage("toys", toy, rnnq.grid(x=[3, 1, 2, 4]).seeds(2), refine=grow)
"""


def study(engine: Engine, folder: Path, source: str = STUDY) -> Path:
    """Init a definition; returns the folder of definitions."""
    defs = folder / "defs"
    defs.mkdir(exist_ok=True)
    (defs / "toy.py").write_text(textwrap.dedent(source))
    queue.init(engine, plan.from_definitions([definitions.load(defs / "toy.py")], defs))
    return defs


def finish_all(engine: Engine, stage: str, loss: dict[int, float] | None = None, keep: int = 0) -> None:
    """End every pending run of a stage but the last `keep`: loss by run id, or the config's x."""
    worker = f"w-{stage}-{random.random()}"
    queue.register(engine, worker, "cpu", {})
    claims = queue.claim(engine, worker, PROVENANCE, limit=10_000, stage=stage)
    for claim in claims[len(claims) - keep :]:
        queue.release(engine, claim)
    for claim in claims[: len(claims) - keep]:
        value = loss[claim.run] if loss else float(claim.config["x"])
        queue.finish(engine, claim, 1, {"loss": value, "acc": value}, "loss")


def ask(defs: Path, top: str = "50%", stage: str = "toys", **changes: object) -> Request:
    return Request(stage=stage, top=top, defs=defs, **changes)  # type: ignore[arg-type]


def configs_of(made: promote.Promotion) -> list[tuple[int, int, int]]:
    """(x, steps, seed) of each new run."""
    found = [json.loads(run.config) for run in made.stage.runs]
    return [(c["x"], c["steps"], c["seed"]) for c in found]


SHARES = [("10%", 432, 43), ("10%", 28, 2), ("10%", 9, 1), ("0.1%", 10, 1), ("100%", 7, 7), ("29%", 100, 29)]
COUNTS = [("3", 10, 3), ("30", 10, 10), (" 7 %", 100, 7), ("57%", 100, 57), ("12.5%", 8, 1)]


@pytest.mark.parametrize(("top", "n", "expected"), [*SHARES, *COUNTS])
def test_a_share_is_floored_in_exact_arithmetic(top: str, n: int, expected: int) -> None:
    assert ranking.top_count(top, n) == expected


@pytest.mark.parametrize("top", ["0", "-1", "200%", "0%", "abc", "", "%", "1.5", "1/2", "nan", "10%%", "1e400%"])
def test_a_bad_top_is_refused(top: str) -> None:
    with pytest.raises(InputError, match="--top"):
        ranking.top_count(top, 10)


def test_winners_are_grown_by_the_rule_and_equal_children_are_one_with_all_parents(
    engine: Engine, tmp_path: Path
) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")

    made = promote.prepare(engine, ask(defs, "3"))

    assert [group.mean for group in made.chosen] == [1, 2, 3]
    # 1 -> 1, 0; 2 -> 2, 1; 3 -> 3, 1: six configs, of which x=1 comes three times
    assert (made.entries, made.distinct) == (6, 4)
    assert sorted(configs_of(made)) == [(x, 5, seed) for x in (0, 1, 2, 3) for seed in (0, 1)]
    [added] = queue.init(engine, [made.stage])
    assert (added.stage, added.added) == ("toys-2", 8)
    sql = """SELECT count(*) FROM lineage JOIN runs ON runs.id = child
             WHERE config LIKE '%"x"\\:1}' AND runs.seed = 0 AND kind = 'promote'"""
    with db.reading(engine) as connection:
        assert connection.execute(text(sql)).scalar() == 6  # three parents of two seeds each


def test_promoting_twice_adds_nothing(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    queue.init(engine, [promote.prepare(engine, ask(defs)).stage])

    [added] = queue.init(engine, [promote.prepare(engine, ask(defs)).stage])

    assert (added.added, added.present) == (0, 6)


def test_a_metric_of_which_high_is_good_ranks_from_the_top(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    assert [group.mean for group in promote.prepare(engine, ask(defs, "2", by="acc")).chosen] == [4, 3]


def test_an_unknown_metric_names_the_nearest(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    with pytest.raises(InputError) as error:
        promote.prepare(engine, ask(defs, by="los"))
    assert "loss" in (error.value.hint or "")


def test_ties_go_to_the_lower_id(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys", loss={i: 1.0 for i in range(1, 9)})
    assert [group.runs for group in promote.prepare(engine, ask(defs, "2")).chosen] == [(1, 2), (3, 4)]


def test_groups_are_ranked_by_their_mean_with_std_and_n(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    losses = {1: 1.0, 2: 9.0, 3: 3.0, 4: 4.0, 5: 8.0, 6: 8.0, 7: 9.0, 8: 9.0}
    finish_all(engine, "toys", loss=losses)
    first, second = promote.prepare(engine, ask(defs, "2")).chosen
    assert (first.mean, first.std, first.n, first.of) == (3.5, pytest.approx(0.5**0.5), 2, 2)
    assert second.mean == 5.0


def test_a_stage_with_open_runs_is_refused_unless_partial(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys", keep=1)

    with pytest.raises(InputError, match="still has 1 open run of 8"):
        promote.prepare(engine, ask(defs))

    made = promote.prepare(engine, ask(defs, "100%", partial=True))
    assert [group.mean for group in made.ranked] == [1, 2, 3]  # x=4 still lacks a seed
    assert made.left_out == ["x=4: 1 of 2 seeds (1 pending)"]


def test_a_group_with_a_failed_seed_is_named_and_left_out_unless_allowed(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    queue.register(engine, "w", "cpu", {})
    [bad] = queue.claim(engine, "w", PROVENANCE)
    queue.fail(engine, bad, "bug", "x")
    finish_all(engine, "toys")

    made = promote.prepare(engine, ask(defs, "100%"))
    assert made.left_out == ["x=3: 1 of 2 seeds (1 failed)"]
    assert [group.mean for group in made.ranked] == [1, 2, 4]

    allowed = promote.prepare(engine, ask(defs, "100%", allow_missing=True))
    assert [(group.mean, group.n, group.of) for group in allowed.ranked] == [(1, 2, 2), (2, 2, 2), (3, 1, 2), (4, 2, 2)]


def test_a_filter_that_leaves_out_a_seed_leaves_out_its_group(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    made = promote.prepare(engine, ask(defs, "100%", filter="loss > 1 and not (x = 2 and seed = 1)"))
    assert [group.mean for group in made.ranked] == [3, 4]
    assert made.left_out == ["x=2: 1 of 2 seeds (the filter leaves out the rest)"]


def test_children_start_from_the_weights_that_their_parents_started_from(engine: Engine, tmp_path: Path) -> None:
    more = """
    more = rnnq.stage("more", toy, rnnq.grid(x=[1, 2]).seeds(2), start_from=rnnq.best("toys", same_seed=True))
    """
    defs = study(engine, tmp_path, STUDY + more)
    finish_all(engine, "toys")
    queue.decide(engine)
    finish_all(engine, "more")
    made = promote.prepare(engine, ask(defs, stage="more", changes=["steps=9"]))
    assert configs_of(made) == [(1, 9, 0), (1, 9, 1)]
    assert {run.start_from for run in made.stage.runs} == {'{"same_seed":true,"stage":"toys","which":"best"}'}
    assert {run.gate for run in made.stage.runs} == {None}  # these have ended
    own = promote.prepare(engine, ask(defs, stage="toys", to="own", changes=["steps=9"]))
    assert {run.start_from for run in own.stage.runs} == {None}


def test_set_and_seeds_change_every_child(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    made = promote.prepare(engine, ask(defs, "1", changes=["steps=7", "word=1e3"], seeds=3, to="big"))
    assert sorted(configs_of(made)) == [(x, 7, seed) for x in (0, 1) for seed in (0, 1, 2)]
    assert made.stage.name == "big"
    assert json.loads(made.stage.runs[0].config)["word"] == "1e3"


def test_everything_wrong_with_set_is_said_at_once(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    with pytest.raises(InputError) as error:
        promote.prepare(engine, ask(defs, changes=["stepz=7", "x=1000"]))
    assert "stepz" in error.value.message
    assert "x=1000" in error.value.message
    with pytest.raises(InputError, match="key=value"):
        promote.prepare(engine, ask(defs, changes=["steps"]))


def test_the_next_stage_is_called_and_grown_as_the_definition_says(engine: Engine, tmp_path: Path) -> None:
    source = STUDY.replace("refine=grow)", "refine=grow, next=rnnq.stage('big', refine=tiny))")
    source += """
    """.replace("    ", "")
    source = source.replace("    stage = ", "    def tiny(config):\n        yield config | {'x': 42}\n\n    stage = ")
    defs = study(engine, tmp_path, source)
    finish_all(engine, "toys")

    queue.init(engine, [promote.prepare(engine, ask(defs, "1")).stage])
    finish_all(engine, "big")
    second = promote.prepare(engine, ask(defs, "1", stage="big"))

    assert second.stage.name == "big-2"
    assert {x for x, _, _ in configs_of(second)} == {42}


def test_a_promoted_stage_keeps_its_winners_as_they_are(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    queue.init(engine, [promote.prepare(engine, ask(defs, "1")).stage])
    finish_all(engine, "toys-2")
    made = promote.prepare(engine, ask(defs, "1", stage="toys-2"))
    assert (made.stage.name, configs_of(made)) == ("toys-2-2", [(0, 5, 0), (0, 5, 1)])


def test_a_definition_that_has_changed_is_never_executed(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    (defs / "toy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError) as error:
        promote.prepare(engine, ask(defs))
    said = error.value.message + (error.value.hint or "")
    assert all(word in said for word in ("toy.py", "--defs", "--rules"))
    assert not (tmp_path / "ran").exists()


def test_rules_of_another_file_replace_the_rule(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    rules = tmp_path / "rules.py"
    rules.write_text(
        "from rnnq import grid, stage\n"
        "def up(config): return config | {'x': 77}\n"
        "a = stage('other', 'dynamics', grid(n_layers=[1]), refine=up)\n"
    )
    made = promote.prepare(engine, ask(defs, "2", rules=rules))
    assert {x for x, _, _ in configs_of(made)} == {77}
    assert (made.entries, made.distinct) == (2, 1)


def test_a_stage_is_not_promoted_into_itself(engine: Engine, tmp_path: Path) -> None:
    defs = study(engine, tmp_path)
    finish_all(engine, "toys")
    with pytest.raises(InputError, match="into itself"):
        promote.prepare(engine, ask(defs, to="toys"))


def parents_of_the_seed(random_source: random.Random) -> list[dict[str, object]]:
    """43 winners like those of the study: 22 of one layer, 13 of two, 8 of three, all with 256 states."""
    definition = definitions.load(ROOT / "defs" / "stage1.py")
    wide = [config for config in definition.stages[0].configs() if config["state_size"] == 256]
    chosen = []
    for layers, n in ((1, 22), (2, 13), (3, 8)):
        chosen += random_source.sample([config for config in wide if config["n_layers"] == layers], n)
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_the_seeds_growth_makes_156_entries_of_43_parents(engine: Engine, seed: int) -> None:
    """A synthetic ranking of the 432 runs whose top tenth has 22 / 13 / 8 parents of 1 / 2 / 3 layers."""
    definition = definitions.load(ROOT / "defs" / "stage1.py")
    queue.init(engine, plan.from_definitions([definition], ROOT / "defs"))
    winners = parents_of_the_seed(random.Random(seed))
    rows = runs.find(engine, "stage1")
    assert len(rows) == 432
    best = [row["id"] for row in rows if any(winner.items() <= row["config"].items() for winner in winners)]
    assert len(best) == 43
    finish_all(engine, "stage1", loss={row["id"]: 1.5 if row["id"] in best else 2.0 for row in rows})

    made = promote.prepare(engine, Request(stage="stage1", top="10%", defs=ROOT / "defs"))

    assert (len(made.chosen), made.entries) == (43, 156)
    slow = []  # the distinct ones, counted without keys or sets
    for winner in winners:
        for child in sweep.refined(definition.stages[0], winner):
            if not any(child == other for other in slow):
                slow.append(child)
    assert made.distinct == len(slow) == len(made.stage.runs)
    assert {json.loads(run.config)["steps"] for run in made.stage.runs} == {50_000}


def test_the_command_says_what_it_made(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "defs").mkdir()
    (tmp_path / "defs" / "toy.py").write_text(textwrap.dedent(STUDY))
    cli("init", "defs/toy.py")
    refused = cli("promote", "--top", "50%", "--stage", "toys", code=2)
    assert "still has 8 open runs" in refused.stderr
    cli("worker", "--device", "cpu")

    dry = cli("promote", "--top", "50%", "--dry-run", "--format", "json")
    assert json.loads(dry.stdout)["added"] == 6
    done = cli("promote", "--top", "50%")
    assert "toys -> toys-2: 2 parents of 4, 4 entries, 3 distinct configs, added 6 runs" in done.stderr
    assert json.loads(cli("ls", "--stage", "toys-2", "--format", "json").stdout)[0]["state"] == "pending"

    for bad in ("0", "200%", "abc"):
        assert cli("promote", "--top", bad, code=2).stderr.startswith(f"error: --top {bad}")
