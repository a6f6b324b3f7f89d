"""A study in YAML: base config, experiments or a grid, seeds; and what is said of one that is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from rnnq import db, definitions, families, plan, promote, queue, runs, steer
from rnnq.definitions import sweeps, yaml
from rnnq.errors import InputError
from rnnq.queue import NewStage
from tests.conftest import ROOT, Cli, claim_one


@pytest.fixture(autouse=True)
def nested(monkeypatch: pytest.MonkeyPatch) -> None:
    """`family: nested` in any file, as an installed family would be."""
    monkeypatch.setitem(families.BUILTIN, "nested", ("tests.studies:Nested", "tests.studies:Nested"))


Planned = Callable[..., NewStage]
BASE = "data: {p: 10, k: 3, seed: 5}\nmodel: {hidden_dim: 36, init_scale: 1e-2}\ntraining: {optimizer: adam}\n"


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The stage of a file with this text; base.yaml lies beside it."""
    monkeypatch.chdir(tmp_path)
    Path("defs").mkdir()
    Path("defs/base.yaml").write_text(BASE)

    def make(text: str, name: str = "study.yaml") -> NewStage:
        path = Path("defs") / name
        path.write_text(dedent(text))
        [stage] = plan.from_definitions([definitions.load(path)], Path("defs"))
        return stage

    return make


def refusal(planned: Planned, text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        planned(text)
    assert caught.value.exit_code == 2
    return caught.value


def configs(stage: NewStage) -> list[dict[str, Any]]:
    return [json.loads(run.config) for run in stage.runs]


# --------------------------------------------------------------------------------------------- what comes of it

STUDY = """\
family: nested
base_config: base.yaml
n_seeds: 2
global_overrides: {model: {hidden_dim: 48}, training.learning_rate: 1e-4}
experiments:
  - name: plain
  - name: wide
    overrides:
      model:
        hidden_dim: 64
  - name: long
    overrides: {data.k: 5, training: {learning_rate: null}}
"""


def test_experiments_times_seeds_become_runs_with_the_experiments_names(planned: Planned) -> None:
    stage = planned(STUDY)

    assert (stage.name, stage.family, stage.source) == ("study", "nested", "study.yaml")
    assert stage.source_sha256 == hashlib.sha256(STUDY.encode()).hexdigest()
    assert (stage.family_in_source, stage.has_rule) == (False, False)
    assert [(run.label, run.seed) for run in stage.runs] == [
        (name, seed) for name in ("plain", "wide", "long") for seed in (0, 1)
    ]
    assert len({run.group_key for run in stage.runs}) == 3  # seeds of an experiment are a group


def test_base_then_global_overrides_then_the_experiments_own_are_merged_mapping_by_mapping(planned: Planned) -> None:
    plain, wide, long = configs(planned(STUDY))[::2]

    assert plain["model"] == {"hidden_dim": 48, "init_scale": 0.01}
    assert plain["data"] == {"p": 10, "k": 3, "seed": 5, "vary_template": False, "powers": []}
    assert plain["training"] == {"optimizer": "adam", "learning_rate": 0.0001}
    assert wide["model"] == {"hidden_dim": 64, "init_scale": 0.01}
    assert long["data"]["k"] == 5
    assert long["training"] == {"optimizer": "adam", "learning_rate": None}  # null replaces, too


def test_a_list_replaces_a_list(planned: Planned) -> None:
    stage = planned(
        """
        family: nested
        base_config: {data: {powers: [1, 2, 3]}}
        experiments: [{name: a}, {name: b, overrides: {data: {powers: [4.5]}}}]
        """
    )

    assert [config["data"]["powers"] for config in configs(stage)] == [[1.0, 2.0, 3.0], [4.5]]


def test_seeds_vary_the_run_and_leave_the_template_unless_it_is_to_vary(planned: Planned) -> None:
    kept = configs(planned(STUDY))
    varied = configs(planned("vary_template: true\n" + STUDY))

    assert [config["seed"] for config in kept] == [config["seed"] for config in varied] == [0, 1] * 3
    assert {(config["data"]["seed"], config["data"]["vary_template"]) for config in kept} == {(5, False)}
    assert {(config["data"]["seed"], config["data"]["vary_template"]) for config in varied} == {(5, True)}


def test_an_experiment_may_keep_its_template_where_the_others_vary_theirs(planned: Planned) -> None:
    stage = planned(
        """
        family: nested
        base_config: base.yaml
        n_seeds: 2
        vary_template: true
        global_overrides: {data: {p: 7}}
        experiments: [{name: a}, {name: b, overrides: {data: {vary_template: false}}}]
        """
    )

    found = [(config["seed"], config["data"]["p"], config["data"]["vary_template"]) for config in configs(stage)]
    assert found == [(0, 7, True), (1, 7, True), (0, 7, False), (1, 7, False)]


def test_a_seed_that_n_seeds_would_silently_replace_is_refused(planned: Planned) -> None:
    with pytest.raises(InputError, match="global_overrides sets seed, and so does n_seeds"):
        planned("family: nested\nn_seeds: 2\nglobal_overrides: {seed: 3}\nexperiments: [{name: a}]\n")


def test_without_n_seeds_there_is_one_run_of_each_with_the_seed_of_the_base(planned: Planned) -> None:
    stage = planned("family: nested\nbase_config: {seed: 7}\nexperiments: [{name: a}]\n")

    assert [run.seed for run in stage.runs] == [7]
    # as `rnnq train` has it: once there was one seed for everything
    stage = planned("family: nested\nbase_config: base.yaml\nexperiments: [{name: a}]\n")
    assert [run.seed for run in stage.runs] == [5]


def test_a_grid_has_its_last_key_fastest_and_names_with_short_keys_sorted_at_each_level(planned: Planned) -> None:
    stage = planned(
        """
        family: nested
        base_config: base.yaml
        parameter_grid:
          model: {hidden_dim: [80, 160]}
          data:
            p: [5, 7]
            k: 2
          training.learning_rate: [1e-3]
        """
    )

    assert [run.label for run in stage.runs] == [
        "k2_p5_h80_lr0.001",
        "k2_p7_h80_lr0.001",
        "k2_p5_h160_lr0.001",
        "k2_p7_h160_lr0.001",
    ]
    assert [(c["model"]["hidden_dim"], c["data"]["p"], c["data"]["k"]) for c in configs(stage)] == [
        (80, 5, 2),
        (80, 7, 2),
        (160, 5, 2),
        (160, 7, 2),
    ]


def test_a_list_as_a_grids_value_stands_in_two_brackets(planned: Planned) -> None:
    stage = planned("family: nested\nbase_config: {}\nparameter_grid: {data.powers: [[1, 2], [3]]}\n")

    assert [config["data"]["powers"] for config in configs(stage)] == [[1.0, 2.0], [3.0]]


def test_a_grid_wins_over_experiments_and_the_author_is_told(cli: Cli, tmp_path: Path) -> None:
    text = "family: dynamics\nbase_config: {steps: 5}\nexperiments: [{name: a}]\nparameter_grid: {n_layers: [1, 2]}\n"
    (tmp_path / "both.yaml").write_text(text)

    done = cli("init", "both.yaml")

    assert "added 2 runs" in done.stderr
    assert "both.yaml: parameter_grid is used, and experiments is not" in done.stderr


def test_a_base_config_is_looked_for_here_first_and_then_beside_the_file(planned: Planned) -> None:
    text = "family: nested\nbase_config: base.yaml\nexperiments: [{name: a}]\n"
    assert configs(planned(text))[0]["data"]["p"] == 10  # beside the file

    Path("base.yaml").write_text("data: {p: 7}\n")
    assert configs(planned(text))[0]["data"]["p"] == 7  # here

    error = refusal(planned, text.replace("base.yaml", "bse.yaml"))
    assert error.message == (
        "defs/study.yaml:2: base_config 'bse.yaml' is not there: looked for bse.yaml and for defs/bse.yaml"
    )
    assert error.hint is not None
    assert "base.yaml" in error.hint


def test_the_family_may_stand_in_the_base_config_and_sections_tell_groups(tmp_path: Path) -> None:
    def family(text: str) -> str:
        return str(sweeps.parse(tmp_path / "s.yaml", text.encode()).stage.family)

    assert family("base_config: {family: nested, seed: 3}\nexperiments: [{name: a}]") == "nested"
    assert family("family: other\nbase_config: {family: nested}\nexperiments: [{name: a}]") == "other"
    assert family("base_config: {model: {hidden_dim: 3}}\nexperiments: [{name: a}]") == "groups"
    assert family("base_config: {data.p: 3}\nexperiments: [{name: a}]") == "groups"
    with pytest.raises(InputError, match="no family: is given, and base_config does not tell it"):
        family("base_config: {steps: 3}\nexperiments: [{name: a}]")


def test_the_stage_is_called_after_its_file_or_as_it_says(planned: Planned) -> None:
    assert planned(STUDY, "my-sweep.yml").name == "my-sweep"
    assert planned("name: other\n" + STUDY).name == "other"
    with pytest.raises(InputError, match="cannot be the name of a stage") as caught:
        planned(STUDY, "my sweep.yaml")
    assert "name:" in str(caught.value.hint)


def test_a_second_init_adds_nothing_and_a_new_experiment_only_itself(planned: Planned, engine: Engine) -> None:
    [first] = queue.init(engine, [planned(STUDY)])
    [again] = queue.init(engine, [planned(STUDY)])
    [more] = queue.init(engine, [planned(STUDY + "  - {name: narrow, overrides: {model.hidden_dim: 8}}\n")])

    assert [(added.added, added.present) for added in (first, again, more)] == [(6, 0), (0, 6), (2, 6)]
    assert [row["label"] for row in runs.find(engine, filter='label ~ "w*"')] == ["wide", "wide"]


def test_a_winner_of_a_yaml_stage_is_promoted_as_it_is_and_the_file_is_not_needed(
    planned: Planned, engine: Engine
) -> None:
    queue.init(engine, [planned(STUDY)])
    for loss in (3.0, 3.0, 1.0, 1.0, 2.0, 2.0):
        queue.finish(engine, claim_one(engine), 10, {"loss": loss}, "loss", [])
    Path("defs/study.yaml").unlink()

    made = promote.prepare(engine, promote.Request("study", "1"))

    assert [json.loads(run.config) for run in made.stage.runs] == configs(planned(STUDY))[2:4]


def test_a_field_inside_a_section_can_be_set_for_promote_and_for_retry(planned: Planned, engine: Engine) -> None:
    queue.init(engine, [planned(STUDY)])
    for loss in (3.0, 3.0, 1.0, 1.0):
        queue.finish(engine, claim_one(engine), 10, {"loss": loss}, "loss", [])
    queue.fail(engine, claim_one(engine), "diverged", "no", "Trace")

    made = promote.prepare(engine, promote.Request("study", "1", changes=["model.hidden_dim=5"], partial=True))
    assert [config["model"] for config in configs(made.stage)] == [{"hidden_dim": 5, "init_scale": 0.01}] * 2

    failed = steer.Choice(filter="state = failed")
    queue.init(engine, steer.retry_with(engine, failed, ["training.learning_rate=1e-5"], Path("defs")))
    [again] = runs.find(engine, filter="training.learning_rate = 1e-5")
    assert again["config"]["training"] == {"optimizer": "adam", "learning_rate": 1e-5}
    assert again["config"]["data"]["k"] == 5
    with pytest.raises(InputError, match=r"has no field data\.pp"):
        promote.prepare(engine, promote.Request("study", "1", changes=["data.pp=5"], partial=True))


# ---------------------------------------------------------------------------------------- what is wrong with it


def test_everything_wrong_with_a_file_is_listed_at_once_with_its_line(planned: Planned) -> None:
    error = refusal(
        planned,
        """\
        famly: nested
        family: nested
        base_config: nowhere.yaml
        n_seeds: 0
        vary_template: yes
        global_overrides: [1]
        experiments:
          - {name: a, override: {}}
          - {name: a}
          - {name: 5}
          - {overrides: {x.: 1}}
          - 7
          - {name: b, overrides: [1]}
          - {name: c, overrides: {data: {p: 1}, data.p: 2}}
          - {name: "", overrides: }
        """,
    )

    assert [problem.removeprefix("defs/study.yaml:") for problem in error.problems] == [
        "1: a sweep has no key famly (did you mean family?)",
        "5: vary_template is true or false, not 'yes'",
        "6: global_overrides is a mapping, not a list",
        "3: base_config 'nowhere.yaml' is not there: looked for nowhere.yaml and for defs/nowhere.yaml",
        "4: n_seeds=0: at least 1, and at most 200,000",
        "8: experiment 1 has no key override (did you mean overrides?)",
        "9: two experiments are called 'a'; the first is at defs/study.yaml:8",
        "10: name is a text, not 5: write it in quotation marks",
        "11: experiment 4 has no name",
        "11: 'x.' is no name of a field",
        "12: experiment 5 is a mapping with name and overrides, not 7",
        "13: overrides of 'b' is a mapping of fields, not a list",
        "14: data.p is set twice; first on line 14",
        "15: '' is no name: 1 to 200 letters, none of them a control code",
    ]


def test_a_wrong_field_is_shown_where_it_was_written_with_the_nearest_name(planned: Planned) -> None:
    Path("defs/base.yaml").write_text("data:\n  pp: 7\nmodel: {hidden_dim: wide}\n")
    error = refusal(
        planned,
        """\
        family: nested
        base_config: base.yaml
        n_seeds: 2
        experiments:
          - name: a
          - name: b
            overrides:
              training: {optimizer: adm}
              model.hidden_dim: 0
        """,
    )

    assert [problem.split(", ")[0] for problem in error.problems] == [
        "defs/base.yaml:2: stage study",
        "defs/base.yaml:3: stage study",
        "defs/study.yaml:9: stage study",
        "defs/study.yaml:8: stage study",
    ]
    assert "has no field data.pp (did you mean data.p" in error.problems[0]
    assert "model.hidden_dim='wide'" in error.problems[1]
    assert "model.hidden_dim=0: input should be greater than or equal to 1" in error.problems[2]
    assert "training.optimizer='adm'" in error.problems[3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("[1]", "holds no mapping"),
        ("data: {p: 3}\nmodel: {}", "has neither experiments nor parameter_grid"),
        ("family: nested\nbase_config: {}\nexperiments: []", "experiments is empty"),
        ("family: nested\nbase_config: {}\nparameter_grid: {}", "parameter_grid is empty"),
        ("family: nested\nbase_config: {}\nparameter_grid: {data: {p: []}}", "data.p is an empty list"),
        ("family: nested\nbase_config: {}\nparameter_grid: {data.k: [2, 2]}", "two experiments are called 'k2'"),
        ("family: nested\nbase_config: 3\nexperiments: [{name: a}]", "base_config is a text or a mapping, not 3"),
        ("experiments: [{name: a}]", "base_config is missing"),
        ("family: nested\nn_seeds: 1e2\nexperiments: [{name: a}]", "n_seeds is a whole number, not 100.0"),
        ("family: nested\nn_seeds: 2\nexperiments: [{name: a, overrides: {seed: 3}}]", "sets seed, and so does"),
        ("family: nestd\nexperiments: [{name: a}]", "there is no family 'nestd'"),
        ("family: nested\nn_seeds: 200000\nparameter_grid: {data.k: [2, 3]}", "at most 200,000"),
        ("family: nested\nkeep: nothing at all\nexperiments: [{name: a}]", "keep=:"),
        ("family: dynamics\nvary_template: true\nexperiments: [{name: a}]", "DynamicsConfig has no field data"),
    ],
)
def test_a_file_that_makes_no_stage_is_refused_in_words(planned: Planned, text: str, said: str) -> None:
    assert said in refusal(planned, text).message


def test_a_huge_grid_is_refused_before_it_fills_the_memory(planned: Planned) -> None:
    axes = "".join(f"  x{number}: [{', '.join(map(str, range(100)))}]\n" for number in range(8))

    assert "at most 200,000" in refusal(planned, f"family: nested\nparameter_grid:\n{axes}").message


def test_a_single_config_is_told_from_a_sweep(planned: Planned) -> None:
    assert refusal(planned, BASE).hint == "`rnnq train` trains one config"
    Path("defs/sweep.yaml").write_text(STUDY)
    error = refusal(planned, STUDY.replace("base.yaml", "sweep.yaml"))
    assert "this is a sweep itself; base_config is one config" in error.message


def test_two_names_of_one_config_are_refused_as_one_of_them_would_never_be_trained(planned: Planned) -> None:
    # as where the base has the very value, or a stale key plays no part: 20 names of one and the same training
    error = refusal(
        planned,
        """\
        family: nested
        base_config: base.yaml
        n_seeds: 3
        experiments:
          - name: as it is
          - name: hidden_36
            overrides: {model.hidden_dim: 36}
        """,
    )

    assert error.problems == [
        "defs/study.yaml:6: stage study, 3 entries, the first is 4: experiment 'hidden_36' has the same config as "
        "'as it is': it would be trained once, under one name"
    ]


def test_data_that_are_missing_are_said_with_the_experiment_that_wants_them(planned: Planned) -> None:
    text = "family: dynamics\nexperiments:\n  - name: a\n  - {name: b, overrides: {corpus: nowhere.txt}}\n"

    [problem] = refusal(planned, text).problems

    assert problem.startswith("defs/study.yaml:4: stage study, entry 2: corpus 'nowhere.txt': there is no file")


def test_the_database_is_untouched_by_a_file_that_is_wrong(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("family: dynamics\nexperiments: [{name: a, overrides: {n_layrs: 2}}]\n")

    done = cli("init", "s.yaml", code=2)

    assert "s.yaml:2: stage s, entry 1: DynamicsConfig has no field n_layrs (did you mean n_layers?)" in done.stderr
    assert not (tmp_path / "experiments.db").exists()


@pytest.mark.parametrize(
    ("name", "experiments", "seeds"),
    [
        ("hidden_dim", ["hidden_dim_32", "hidden_dim_64"], 3),
        ("learning_rate", ["adam_1e-2", "adam_1e-3", "adam_1e-4", *(f"hybrid_scaling_-{n}" for n in (2, 3, 4))], 5),
        ("model_size", ["k3_8x8_h24", "k5_10x10_h36", "k7_12x12_h64", "k7_14x14_h128"], 3),
        ("onehot_scaling", 1200, 1),
        ("demo", ["recurrent", "mlp", "triples"], 3),
    ],
)
def test_the_example_sweeps_are_read_and_have_no_wrong_field(
    monkeypatch: pytest.MonkeyPatch, name: str, experiments: list[str] | int, seeds: int
) -> None:
    monkeypatch.chdir(ROOT)  # as a user types it

    definition = definitions.load(Path("defs/groups") / f"{name}.yaml")

    [stage] = definition.stages
    assert stage.family == "groups"
    labels = list(dict.fromkeys(one.label for one in definition.written[stage.name]))
    assert (len(labels) if isinstance(experiments, int) else labels) == experiments
    assert len(definition.written[stage.name]) == len(labels) * seeds
    if "groups" in families.BUILTIN:
        [made] = plan.from_definitions([definition], Path("defs"))
        assert len(made.runs) == len(labels) * seeds


def test_the_grid_of_one_hot_scaling_is_named_as_the_original_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [first, second, *_, last] = definitions.load("defs/groups/onehot_scaling.yaml").written["onehot_scaling"]

    assert [one.label for one in (first, second, last)] == ["k2_p5_h80", "k2_p5_h160", "k4_p100_h1600"]


# ------------------------------------------------------------------------------------------------------- fuzz

# what may stand where a study has something else
WORDS = st.sampled_from(
    """
    null | true | 3 | -1 | 0 | 1e400 | .nan | 999999999999999999999999 | "" | "\\0" | '../x' | a/b | [] | {}
    | [1] | [{}] | {a: {b: {c: 1}}} | {name: a} | !!str 5 | !!python/name:os.system | &a [*a] | *b | *nowhere
    | base.yaml | study.yaml | /dev/null | . | "\\ud800" | "\\e[2J" | {<<: {a: 1}} | ? | -
    | [[[[[[[[[[1]]]]]]]]]] | 2024-01-01 | no | ~ | {1: 2} | {a.b: 1, a: 2} | {..: 1} | {[1]: 2} | 'x: y' | |
    | > | %TAG | @x | `x` | {"": 1} | 1_0 | 0x | {seed: -1} | {seed: 1}
    """.replace("\n", " ").split(" | ")
)  # fmt: skip
TOKENS = ["nested", "base.yaml", "2", "{model: {hidden_dim: 48}, training.learning_rate: 1e-4}", "plain", "64", "1e-4",
          "{data.k: 5, training: {learning_rate: null}}", "data.k", "experiments", "overrides", "name", "n_seeds",
          "hidden_dim", "base_config", "family", "global_overrides", "- name: wide", "null"]  # fmt: skip
GRID = (
    "family: nested\nbase_config: base.yaml\nn_seeds: 2\nparameter_grid:\n  data: {k: [2, 3]}\n  model.hidden_dim: 64\n"
)


@st.composite
def near_misses(draw: st.DrawFn) -> str:
    """A study in which a few things are others."""
    text = draw(st.sampled_from([STUDY, GRID]))
    for _ in range(draw(st.integers(1, 3))):
        text = text.replace(draw(st.sampled_from(TOKENS)), draw(WORDS), 1)
    return text


@st.composite
def torn(draw: st.DrawFn) -> str:
    """A study with a piece cut out, and something else in its place."""
    text = draw(st.sampled_from([STUDY, GRID]))
    begin = draw(st.integers(0, len(text)))
    end = draw(st.integers(begin, min(len(text), begin + 40)))
    return text[:begin] + draw(WORDS | st.text(st.characters(codec="utf-8"), max_size=20)) + text[end:]


CONTENTS = st.one_of(near_misses(), near_misses(), torn()).map(
    lambda text: text.encode("utf-8", "surrogatepass")
) | st.binary(max_size=100)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine]]:
    """A study's place and a database."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "base.yaml").write_text(BASE)
    db.upgrade(str(folder / "experiments.db"))
    engine = db.open(str(folder / "experiments.db"))
    yield folder / "study.yaml", engine
    engine.dispose()


def everything(engine: Engine) -> list[Any]:
    with db.reading(engine) as connection:
        rows = [connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1").all() for name in ("stages", "runs")]
        return [tuple(row) for table in rows for row in table]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(CONTENTS)
def test_any_yaml_is_taken_or_refused_in_words_and_then_the_database_is_as_it_was(
    fuzzed: tuple[Path, Engine], content: bytes
) -> None:
    path, engine = fuzzed
    path.write_bytes(content)
    before = everything(engine)
    try:
        stages = plan.from_definitions([definitions.load(path)], path.parent)
        queue.init(engine, stages)
    except InputError as error:
        assert error.problems
        assert all(isinstance(problem, str) and problem for problem in error.problems)
        assert everything(engine) == before
        return
    assert [run for stage in stages for run in stage.runs]
    with db.transaction(engine) as connection:  # so that the next one finds no stage of another family
        for table in ("runs", "intakes", "stages"):
            connection.exec_driver_sql(f"DELETE FROM {table}")


def test_one_config_is_read_with_its_family_and_its_places() -> None:
    family, fields = sweeps.config(Path("c.yaml"), b"family: nested\ndata.p: 7\nmodel: {hidden_dim: 3}\n")

    assert family == "nested"
    assert fields.plain() == {"data": {"p": 7}, "model": {"hidden_dim": 3}}
    assert fields.at(["data", "p"]).place == "c.yaml:2"
    with pytest.raises(InputError, match=r"c\.yaml:1: base_config belongs to a sweep"):
        sweeps.config(Path("c.yaml"), b"base_config: x\n")
    with pytest.raises(InputError, match="a config is a mapping of fields"):
        sweeps.config(Path("c.yaml"), b"- 1\n")


def test_merging_changes_neither_of_the_two() -> None:
    base = yaml.read("a", b"x: {y: 1}\n")
    over = yaml.read("b", b"x: {z: 2}\n")

    assert sweeps.merge(base, over).plain() == {"x": {"y": 1, "z": 2}}
    assert (base.plain(), over.plain()) == ({"x": {"y": 1}}, {"x": {"z": 2}})
