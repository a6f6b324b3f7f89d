"""A study as a list of experiments: how it is read, refused, queued and trained, and what makes lists of others."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import Engine, text

from rnnq import db, definitions, families, plan, queue, runs
from rnnq.config import parse
from rnnq.definitions import (
    NARROW_LR_SWEEP,
    STANDARD_LR_SWEEP,
    create_multi_lr_experiments,
    create_multi_seed_experiments,
    fmt,
    generate_lr_sweep_experiment,
    subset_experiments,
)
from rnnq.definitions.experiments import file_stem, lists_of
from rnnq.errors import InputError
from rnnq.families.scaling.config import ScalingConfig
from tests.conftest import ROOT, Cli

FAMILY = """
    import rnnq

    class ToyConfig(rnnq.Config):
        aliases = {"lr": "learning_rate"}
        ignored = {"print_every": "the worker decides it", "dropout": "nothing ever read it"}
        learning_rate: float = 0.1
        width: int = 16
        steps: int = 2
        name: str = ""

    @rnnq.family(ToyConfig)
    def toy(config):
        for step in range(config.steps):
            yield {"loss": config.learning_rate + 1 / config.width}

    FAMILY = toy
"""
GROUPS = """
    CONFIG = {"width": 8, "steps": 3}
    WIDE = [
        {"name": "wide", "subexperiments": [
            {"label": "w32", "overrides": {"width": 32}},
            {"label": "w64", "config": {"width": 64, "seed": 7}},
        ]},
        {"name": "plain", "subexperiments": [{"label": "w8"}]},
    ]
"""
STUDY = FAMILY + GROUPS + "    EXPERIMENTS = WIDE\n"


def write(folder: Path, content: str = STUDY, name: str = "study.py") -> Path:
    """A definition file."""
    path = folder / name
    path.write_text(dedent(content))
    return path


def listed(folder: Path, experiments: str) -> Path:
    """A definition file with that list of experiments of the toy family."""
    return write(folder, f"{dedent(FAMILY)}\n{dedent(experiments)}")


def stages(path: Path | str) -> list[queue.NewStage]:
    """What `rnnq init` would put into the database."""
    found = definitions.load(path, later=True)
    return plan.from_definitions([found], found.path.parent)


def problems(path: Path | str) -> list[str]:
    """What `rnnq init` says is wrong."""
    with pytest.raises(InputError) as caught:
        stages(path)
    return [problem.removeprefix(f"{str(path).partition(':')[0]}: ") for problem in caught.value.problems]


def labels(made: list[queue.NewStage]) -> dict[str, list[str]]:
    return {stage.name: [run.label for run in stage.runs] for stage in made}


def fields(run: queue.NewRun) -> dict[str, object]:
    return {name: value for name, value in json.loads(run.config).items() if name in ("width", "steps", "seed")}


# ------------------------------------------------------------------------------------------------------- how it is read


def test_a_group_is_a_stage_and_a_run_is_config_with_its_overrides(tmp_path):
    made = stages(write(tmp_path))

    assert labels(made) == {"wide": ["w32", "w64"], "plain": ["w8"]}
    assert [fields(run) for stage in made for run in stage.runs] == [
        {"width": 32, "steps": 3, "seed": 0},
        {"width": 64, "steps": 3, "seed": 7},
        {"width": 8, "steps": 3, "seed": 0},
    ]
    assert [(stage.family, stage.family_in_source, stage.source) for stage in made] == [("toy", True, "study.py")] * 2


def test_nothing_of_a_list_is_changed_where_its_runs_share_a_dict(tmp_path):
    path = listed(
        tmp_path,
        """
        shared = {"width": 32}
        one = {"label": "a", "overrides": shared}
        EXPERIMENTS = [{"name": "s", "subexperiments": [one, one | {"label": "b", "overrides": {"seed": 1} | shared}]}]
        before = repr(EXPERIMENTS)
        """,
    )
    found = definitions.load(path)
    plan.from_definitions([found], tmp_path)

    assert repr(found.module.EXPERIMENTS) == found.module.before
    assert found.module.shared == {"width": 32}


def test_without_config_and_family_the_family_is_scaling_with_its_defaults(tmp_path):
    path = write(tmp_path, 'EXPERIMENTS = [{"name": "s", "subexperiments": [{"label": "a"}]}]')
    [stage] = definitions.load(path).stages
    assert (stage.family, list(stage.configs())) == ("scaling", [{}])


def test_groups_of_one_name_are_one_stage(tmp_path):
    path = listed(
        tmp_path,
        """
        def generated(width):
            run = {"label": f"w{width}", "overrides": {"width": width}}
            return [{"name": "made", "subexperiments": [run]}]

        EXPERIMENTS = generated(8) + generated(16)
        """,
    )
    assert labels(stages(path)) == {"made": ["w8", "w16"]}


def test_groups_of_other_names_may_hold_the_same_config_under_the_same_label(tmp_path):
    run = '{"label": "a", "overrides": {"width": 8}}'
    path = listed(tmp_path, f'EXPERIMENTS = [{{"name": n, "subexperiments": [{run}]}} for n in ("one", "two")]')
    assert labels(stages(path)) == {"one": ["a"], "two": ["a"]}


def test_stages_of_a_file_come_before_its_groups_and_must_have_other_names(tmp_path):
    stage = 'first = rnnq.stage("NAME", toy, [{"width": 4}])'
    path = write(tmp_path, dedent(STUDY) + stage.replace("NAME", "first"))
    assert list(labels(stages(path))) == ["first", "wide", "plain"]

    path = write(tmp_path, dedent(STUDY) + stage.replace("NAME", "plain"))
    assert "a stage and a group of EXPERIMENTS are both named plain" in problems(path)


# ------------------------------------------------------------------------------------------------ FILE:NAME, and --only


def test_file_and_name_take_another_list_of_the_file_and_no_stage(tmp_path):
    more = """
    OTHER = [{"name": "other", "subexperiments": [{"label": "x"}]}]
    stage = rnnq.stage("staged", toy, [{"width": 4}])
    """
    path = write(tmp_path, STUDY + more)

    assert list(labels(stages(path))) == ["staged", "wide", "plain"]
    assert list(labels(stages(f"{path}:OTHER"))) == ["other"]
    assert stages(f"{path}:OTHER")[0].source == "study.py"
    assert labels(stages(f"{path}:EXPERIMENTS")) == labels(stages(f"{path}:WIDE"))


def test_a_name_that_is_no_list_is_refused_with_the_lists_that_there_are(tmp_path):
    path = write(tmp_path, STUDY + '    stage = rnnq.stage("staged", toy, [{"width": 4}])\n')
    said = "there is no list of experiments WIDTH (did you mean WIDE?; it has WIDE, EXPERIMENTS)"
    assert problems(f"{path}:WIDTH") == [said]
    assert "there is no list of experiments ToyConfig (it has EXPERIMENTS, WIDE)" in problems(f"{path}:ToyConfig")
    assert "there is no list of experiments CONFIG (it has EXPERIMENTS, WIDE)" in problems(f"{path}:CONFIG")
    assert problems(f"{path}:stage")[0].startswith("stage is a stage, and no list of experiments")
    for name in ("", "12", "a b"):
        with pytest.raises(InputError, match="is no name of a list") as caught:
            definitions.load(f"{path}:{name}")
        assert caught.value.hint == f"{path}:EXPERIMENTS"
    (tmp_path / "sweep.yaml").write_text("family: dynamics\nexperiments: [{name: a}]\n")
    with pytest.raises(InputError, match="a study in YAML has no lists to choose from"):
        definitions.load(f"{tmp_path / 'sweep.yaml'}:WIDE")


def test_a_file_of_lists_without_experiments_asks_which(tmp_path):
    path = write(tmp_path, FAMILY + GROUPS)
    assert problems(path) == [
        f"has no EXPERIMENTS, but WIDE: `rnnq init {path}:WIDE`, or EXPERIMENTS = WIDE in the file"
    ]


def test_a_drive_and_a_file_with_a_colon_are_not_taken_for_a_list(tmp_path):
    with pytest.raises(InputError, match=r"C:study\.py does not exist"):
        definitions.load(tmp_path / "C:study.py")
    with pytest.raises(InputError, match=r"study\.py does not exist"):
        definitions.load(tmp_path / "study.py:WIDE")
    odd = write(tmp_path, STUDY, "odd.py:WIDE")
    with pytest.raises(InputError, match=r"odd\.py:WIDE is not a definition"):
        definitions.load(odd)  # there is a file of that very name, and it does not end as one


def test_only_adds_these_runs_and_all_later_adds_the_rest(engine: Engine, tmp_path):
    made = stages(write(tmp_path))

    assert labels(plan.only(made, ["w64,w8"])) == {"wide": ["w64"], "plain": ["w8"]}
    first = queue.init(engine, plan.only(made, ["w64"]))
    again = queue.init(engine, plan.only(made, ["w32", "wide/w64"]))
    rest = queue.init(engine, made)

    assert [(item.stage, item.added, item.present, item.left) for item in first] == [("wide", 1, 0, ())]
    assert [(item.stage, item.added, item.present, item.left) for item in again] == [("wide", 1, 1, ())]
    assert [(item.stage, item.added, item.present, item.left) for item in rest] == [
        ("wide", 0, 2, ()),
        ("plain", 1, 0, ()),
    ]
    # a part of a definition is no word on the runs that it leaves out
    assert queue.init(engine, plan.only(made, ["w32"]))[0].left == ()


def test_only_refuses_what_no_run_is_called_and_takes_a_label_with_commas_whole(tmp_path):
    made = stages(write(tmp_path))
    with pytest.raises(InputError) as caught:
        plan.only(made, ["w32,w46", "wide/w8"])
    assert caught.value.problems == [
        "no run has the label 'w46' (did you mean w64?)",
        "no run has the label 'wide/w8' (did you mean wide/w64 or wide/w32?)",
    ]
    with pytest.raises(InputError, match="names no label"):
        plan.only(made, [","])

    path = listed(tmp_path, 'stage = rnnq.stage("s", toy, rnnq.grid(width=[4, 8], steps=[1]))')
    assert labels(plan.only(stages(path), ["width=4, steps=1"])) == {"s": ["width=4, steps=1"]}


def test_only_takes_the_experiments_of_a_study_in_yaml(tmp_path):
    path = tmp_path / "sweep.yaml"
    two = "[{name: a, overrides: {n_layers: 1}}, {name: b, overrides: {n_layers: 2}}]"
    path.write_text(f"family: dynamics\nn_seeds: 2\nexperiments: {two}\n")
    assert labels(plan.only(stages(path), ["b"])) == {"sweep": ["b", "b"]}


def test_init_says_what_it_would_add_by_label_and_how_many(cli: Cli, tmp_path):
    write(tmp_path)
    done = cli("init", "study.py", "--dry-run", "--only", "w64,w8")
    assert done.stderr.splitlines() == ["would add 2 runs", "wide: w64", "plain: w8"]
    found = json.loads(cli("init", "study.py:WIDE", "--dry-run", "--format", "json").stdout)
    assert found["stages"][0] == {"stage": "wide", "added": 2, "present": 0, "labels": ["w32", "w64"]}
    refused = cli("init", "study.py", "--only", "w46", code=2)
    assert "did you mean w64?" in refused.stderr
    assert not (tmp_path / "experiments.db").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


def test_everything_wrong_with_a_list_is_said_at_once_by_group_and_label(tmp_path):
    path = listed(
        tmp_path,
        """
        CONFIG = {"stepz": 3}
        EXPERIMENTS = [
            {"name": "a", "subexperiments": [
                {"label": "typo", "overrides": {"widht": 8}},
                {"label": "range", "overrides": {"seed": -1}},
                {"label": "twice"}, {"label": "twice", "overrides": {"width": 3}},
                {"label": "lr 0.1", "overrides": {"width": 4}}, {"label": "LR 01", "overrides": {"width": 5}},
                {"label": "both", "overrides": {}, "config": {}},
                {"label": "loose", "width": 8},
                {"label": "list", "overrides": [1]},
                {"label": 3},
                {"overrides": {}},
                {"label": "_._"},
                "w32",
            ]},
            {"name": "b", "subexperiments": []},
            {"name": "c"},
            {"name": 4, "subexperiments": [{"label": "x"}]},
            {"name": "no/name", "subexperiments": [{"label": "x"}]},
            {"subexperiments": [{"label": "x"}], "labels": []},
            7,
        ]
        """,
    )
    found = problems(path)

    assert found == [
        "group a, both has overrides and config, which are two words for one thing",
        "group a, loose has no key width (it has config, label, overrides; a field of the config goes into overrides)",
        "group a, list: overrides is a dict of fields, not a list",
        "group a, run 10: label is a text, not 3",
        "group a, run 11 has no label",
        "group a, run 12: '_._' is no label: nothing of it can be in the name of a file",
        "group a, run 13 is a dict with label and overrides, not 'w32'",
        "group b is empty",
        "group c: subexperiments is missing",
        "group 4: name is a text, not 4",
        "group 5: 'no/name' cannot be the name of a stage: a name has 1 to 64 letters, digits, _, - or ., and begins "
        "with a letter or a digit",
        "group 6 has no key labels (it has name, subexperiments)",
        "group 6 has no name",
        "group 7 of EXPERIMENTS is a dict with name and subexperiments, not 7",
        "group a: 2 runs have the label 'twice'",
        "group a: 'lr 0.1' and 'LR 01' are the same as the name of a file, LR_01.csv",
        "CONFIG: ToyConfig has no field stepz (did you mean steps?)",
        "stage a, typo: ToyConfig has no field widht (did you mean width?)",
        "stage a, range: seed=-1: input should be greater than or equal to 0",
    ]


def test_what_is_wrong_in_config_is_said_once_for_all_groups(tmp_path):
    config = 'CONFIG = {"lr": 0.1, "steps": "many"}\n'
    groups = (
        '[{"name": n, "subexperiments": [{"label": "x"}, {"label": "y", "overrides": {"seed": 1}}]} for n in "abc"]'
    )
    found = problems(listed(tmp_path, f"{config}EXPERIMENTS = {groups}"))
    assert found == [
        "CONFIG: steps='many': input should be a valid integer",
        "CONFIG: ToyConfig has no field lr (it is learning_rate)",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("EXPERIMENTS = []", "EXPERIMENTS is empty"),
        ("EXPERIMENTS = None", "EXPERIMENTS is a list of groups, not nothing"),
        (
            'EXPERIMENTS = {"name": "a", "subexperiments": [{"label": "x"}]}',
            "EXPERIMENTS is a list of groups, not a dict: put it into a list, [EXPERIMENTS]",
        ),
        ("CONFIG = [1]\nEXPERIMENTS = []", "CONFIG is a dict of fields, not a list"),
        ("CONFIG = {3: 1}\nEXPERIMENTS = []", "CONFIG is a dict of fields, not a dict with keys that are no texts"),
    ],
)
def test_what_is_no_list_of_groups_is_refused(tmp_path, content, said):
    path = listed(tmp_path, content)
    assert said in problems(path)
    with pytest.raises(InputError) as caught:
        definitions.load(path)  # as commands do that know nothing of configs
    assert f"{path}: {said}" in caught.value.problems
    assert "for example" in str(caught.value.hint)


def test_two_labels_for_one_config_of_a_group_are_refused(tmp_path):
    runs = '[{"label": "a", "overrides": {"print_every": 1}}, {"label": "b", "overrides": {"print_every": 2}}]'
    found = problems(listed(tmp_path, f'EXPERIMENTS = [{{"name": "s", "subexperiments": {runs}}}]'))
    assert found == ["stage s, b: experiment 'b' has the same config as 'a': it would be trained once, under one name"]


def test_a_family_that_is_none_is_refused_once(tmp_path):
    groups = '[{"name": n, "subexperiments": [{"label": "x"}]} for n in "abc"]'
    assert problems(write(tmp_path, f'FAMILY = "scalin"\nEXPERIMENTS = {groups}'))[0].startswith("there is no family")
    assert len(problems(write(tmp_path, f"FAMILY = 5\nEXPERIMENTS = {groups}"))) == 1


# ---------------------------------------------------------------------------------------------- keys that nothing reads


def test_keys_that_the_family_ignores_are_left_out_with_one_warning_each(tmp_path):
    path = listed(
        tmp_path,
        """
        CONFIG = {"print_every": 100}
        run = {"label": "b", "overrides": {"dropout": 0.1, "width": 4}}
        EXPERIMENTS = [{"name": n, "subexperiments": [{"label": "a"}, run]} for n in ("one", "two")]
        """,
    )
    made = stages(path)

    assert plan.ignored(made) == [
        "dropout, in 2 runs of the list, is ignored: nothing ever read it",
        "print_every, in 4 runs of the list, is ignored: the worker decides it",
    ]
    assert "print_every" not in json.loads(made[0].runs[0].config)


def test_elsewhere_such_a_key_is_an_error(tmp_path):
    path = listed(tmp_path, 'stage = rnnq.stage("s", toy, [{"print_every": 1}])')
    assert "has no field print_every" in problems(path)[0]


def test_every_command_that_reads_definitions_leaves_them_out(cli: Cli, tmp_path):
    listed(tmp_path, 'CONFIG = {"dropout": 0}\nLIST = [{"name": "s", "subexperiments": [{"label": "a"}]}]')
    warning = "dropout, in 1 run of the list, is ignored: nothing ever read it"
    assert warning in cli("plan", "--dry-run", "study.py:LIST").stderr
    assert warning in cli("init", "study.py:LIST").stderr
    assert "toy is a generator" in cli("verify-resume", "study.py:LIST").stderr


# --------------------------------------------------------------------------------------------------- from there to runs


def test_a_worker_finds_the_family_of_a_list_that_only_its_name_chose(cli: Cli, tmp_path):
    (tmp_path / "defs").mkdir()
    write(tmp_path / "defs", FAMILY + GROUPS)  # no EXPERIMENTS: nothing says which list it was
    cli("init", "defs/study.py:WIDE")
    cli("worker", "--device", "cpu")

    found = json.loads(cli("ls", "--format", "json", "--filter", "lr = 0.1 and state = done").stdout)
    assert [(row["stage"], row["label"], row["state"]) for row in found] == [
        ("wide", "w32", "done"),
        ("wide", "w64", "done"),
        ("plain", "w8", "done"),
    ]
    grown = cli("promote", "--stage", "wide", "--top", "1", "--set", "lr=0.05", "--format", "json")
    assert "wide-2" in grown.stdout
    assert len(json.loads(cli("ls", "--format", "json", "--filter", "lr = 0.05").stdout)) == 1


def test_a_list_with_a_fault_does_not_hinder_the_runs_of_another(tmp_path):
    path = write(tmp_path, FAMILY + GROUPS + '    EXPERIMENTS = [{"name": "broken"}]\n')
    [wide, _] = stages(f"{path}:WIDE")
    recorded = definitions.load_source(wide.source, wide.source_sha256, tmp_path)
    assert families.find_config("toy", recorded).__name__ == "ToyConfig"


# ------------------------------------------------------------------------------------------- what makes lists of others

GROUP = {
    "name": "g",
    "subexperiments": [
        {"label": "a", "overrides": {"hidden_size": 16, "max_characters": 5e8}},
        {"label": "b", "config": {"hidden_size": 24}},
        {"label": "c"},
    ],
}


def taken(groups: list[dict]) -> list[tuple[str, str, dict]]:
    """Group, label and overrides of each run."""
    return [
        (group["name"], run["label"], run.get("overrides", run.get("config")))
        for group in groups
        for run in group["subexperiments"]
    ]


@pytest.mark.parametrize(
    ("lr", "label"),
    [
        (10**-4, "1.0em04"),
        (10**-3.5, "3.2em04"),
        (10**-3, "1.0em03"),
        (10**-2.5, "3.2em03"),
        (10**-2, "0.01"),
        (10**-1.5, "0.032"),
        (0.1, "0.1"),
        (0.002, "2.0em03"),
        (1.0, "1"),
        (1.5, "2"),
        (2.5, "2"),
        (10, "10"),
    ],
)
def test_a_rate_is_called_as_the_published_study_has_it(lr, label):
    assert fmt(lr) == label


@pytest.mark.parametrize(
    ("label", "stem"),
    [
        ("lstm_16d_lr_1.0em04", "lstm_16d_lr_10em04"),
        ("lstm_16d_lr_0.032", "lstm_16d_lr_0032"),
        ("LSTM_1.6M_Benchmark", "LSTM_16M_Benchmark"),
        ("24d_lstm_lr_1e-1.5 ", "24d_lstm_lr_1e15"),
        ("64d L2 adamw lr 0.032 ", "64d_L2_adamw_lr_0032"),
        ("64d_lr_-1.25", "64d_lr_125"),
        ("../x", "x"),
        ("a b", "a_b"),
        ("\u00e4" * 150, "\u00e4" * 100),  # of two bytes each
    ],
)
def test_a_label_makes_the_name_of_a_file_as_there(label, stem):
    assert file_stem(label) == stem


def test_the_sweeps_are_half_decades():
    assert pytest.approx([10 ** (-4 + i / 2) for i in range(7)]) == STANDARD_LR_SWEEP
    assert pytest.approx([10 ** (-3 + i / 2) for i in range(5)]) == NARROW_LR_SWEEP


def test_a_sweep_of_rates_is_one_group_of_its_own():
    base = {"hidden_size": 16, "nested": [1]}
    made = generate_lr_sweep_experiment("lstm_16d", [10**-3, 0.1], base)
    assert made == {
        "name": "lstm_16d_lr_sweep",
        "subexperiments": [
            {"label": "lstm_16d_lr_1.0em03", "overrides": {**base, "learning_rate": 10**-3}},
            {"label": "lstm_16d_lr_0.1", "overrides": {**base, "learning_rate": 0.1}},
        ],
    }
    made["subexperiments"][0]["overrides"]["nested"].append(2)
    assert base == {"hidden_size": 16, "nested": [1]}
    assert made["subexperiments"][1]["overrides"]["nested"] == [1]
    assert generate_lr_sweep_experiment("d", [0.1], key="lr")["subexperiments"][0]["overrides"] == {"lr": 0.1}


def test_each_run_with_each_rate_reads_one_budget_of_text_unless_told_otherwise():
    assert taken(create_multi_lr_experiments([GROUP], [0.01, 0.1]))[:3] == [
        ("g_lr_sweep", "a_lr_0.01", {"hidden_size": 16, "max_characters": 129e6, "learning_rate": 0.01}),
        ("g_lr_sweep", "a_lr_0.1", {"hidden_size": 16, "max_characters": 129e6, "learning_rate": 0.1}),
        ("g_lr_sweep", "b_lr_0.01", {"hidden_size": 24, "max_characters": 129e6, "learning_rate": 0.01}),
    ]
    assert taken(create_multi_lr_experiments([GROUP], [0.1], None)) == [
        ("g_lr_sweep", "a_lr_0.1", {"hidden_size": 16, "max_characters": 5e8, "learning_rate": 0.1}),
        ("g_lr_sweep", "b_lr_0.1", {"hidden_size": 24, "learning_rate": 0.1}),
        ("g_lr_sweep", "c_lr_0.1", {"learning_rate": 0.1}),
    ]


def test_each_run_with_each_seed_is_called_after_it_in_a_group_of_the_same_name():
    made = taken(create_multi_seed_experiments([GROUP], [3, 0]))
    assert [(name, label, found["seed"]) for name, label, found in made] == [
        ("g", "a_3", 3), ("g", "a_0", 0), ("g", "b_3", 3), ("g", "b_0", 0), ("g", "c_3", 3), ("g", "c_0", 0),
    ]  # fmt: skip


def test_a_subset_keeps_the_order_and_drops_groups_that_are_left_empty():
    other = {"name": "h", "subexperiments": [{"label": "z", "overrides": {}}]}
    made = subset_experiments([GROUP, other], {"c", "a"})
    assert [(group["name"], [run["label"] for run in group["subexperiments"]]) for group in made] == [("g", ["a", "c"])]
    with pytest.raises(InputError) as caught:
        subset_experiments([GROUP], ["a", "bb"])
    assert caught.value.problems == ["no run has the label 'bb' (did you mean b?)"]


def test_what_is_made_shares_nothing_with_what_it_was_made_of():
    group = {"name": "g", "subexperiments": [{"label": "a", "overrides": {"nested": [1]}}]}
    before = deepcopy(group)
    for made in (
        subset_experiments([group], ["a"]),
        create_multi_lr_experiments([group], [0.1, 0.01]),
        create_multi_seed_experiments([group], [1, 2]),
    ):
        first, *rest = [run["overrides"] for run in made[0]["subexperiments"]]
        first["nested"].append(2)
        made[0]["name"] = "changed"
        assert before == group
        assert all(run["nested"] == [1] for run in rest)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: create_multi_lr_experiments([GROUP], [1.5, 2.0]), "learning rates 1.5 and 2 are all called 2"),
        (lambda: generate_lr_sweep_experiment("a", [0.1, 0.1]), "learning rates 0.1 and 0.1 are all called 0.1"),
        (lambda: create_multi_lr_experiments([GROUP], 0.1), "learning rates are a list, not 0.1"),
        (lambda: create_multi_lr_experiments([GROUP], []), "there are no learning rates"),
        (
            lambda: generate_lr_sweep_experiment("a", [0.1, -1, True]),
            "-1 is no learning rate\nTrue is no learning rate",
        ),
        (lambda: create_multi_seed_experiments([GROUP], [1, 1]), "seed 1 is listed twice"),
        (lambda: create_multi_seed_experiments([GROUP], [-1, "a"]), "-1 is no seed: a whole number, at least 0"),
        (lambda: create_multi_seed_experiments([GROUP], 3), "seeds are a list, not 3"),
        (lambda: create_multi_seed_experiments(GROUP, [1]), "a list of groups was expected, not dict"),
        (lambda: create_multi_seed_experiments([{"name": "g"}], [1]), "group g has no list of subexperiments"),
        (
            lambda: create_multi_seed_experiments([{"name": "g", "subexperiments": [{"overrides": {}}]}], [1]),
            "group g: run 1 is no dict with a label",
        ),
        (lambda: subset_experiments([GROUP], "abc"), "labels are a set or a list, not 'abc'"),
    ],
)
def test_what_cannot_be_made_is_refused(call, said):
    with pytest.raises(InputError) as caught:
        call()
    assert said in "\n".join(caught.value.problems)


def test_in_a_file_the_refusal_has_its_line(tmp_path):
    content = (
        "from rnnq.definitions import create_multi_lr_experiments\nX = create_multi_lr_experiments([], [1.5, 2])\n"
    )
    assert problems(write(tmp_path, content)) == [f"{tmp_path}/study.py:2: learning rates 1.5 and 2 are all called 2"]


# -------------------------------------------------------------------------------------------------- the published study

BUDGETS = {16: 258_000_000, 24: 387_400_000, 32: 517_200_000, 48: 777_600_000, 64: 1_039_800_000}
OPTIMAL = {16: 258_000_000, 24: 386_000_000, 32: 516_000_000, 48: 776_000_000, 64: 1_038_000_000}
PUBLISHED = {
    "TEST_EXPERIMENTS": ("LSTM_benchmark", {"LSTM_1.6M_Benchmark": (16, 50_000_000, 0.002, "adamw", False, {})}),
    "LSTM_OPTIMAL_SCALING": (
        "lstm_optimal_scaling",
        {f"lstm_{h}d": (h, OPTIMAL[h], 10**-1.5 if h < 48 else 0.01, "adamw", False, {}) for h in OPTIMAL},
    ),
    "LSTM_SGD_OPTIMAL_SCALING": (
        "lstm_sgd_optimal_scaling",
        {f"lstm_{h}d_sgd": (h, BUDGETS[h], 0.1, "sgd", False, {}) for h in BUDGETS},
    ),
    "LSTM_SGD_MUP_SCALING": (
        "lstm_sgd_mup_scaling",
        {f"lstm_{h}d_sgd_mup": (h, BUDGETS[h], 0.1, "sgd", True, {}) for h in BUDGETS},
    ),
    "LSTM_MUP_SCALING_EXPERIMENTS": (
        "muP_scaling_experiments",
        {f"lstm_{h}d_mup": (h, BUDGETS[h], 10**-1.5, "adamw", True, {}) for h in BUDGETS},
    ),
    "LSTM_LR_EXPERIMENTS": (
        "lstm_lr_experiments",
        {f"24d_lstm_lr_1e-{e:g}": (24, 193_700_000, 10**-e, "adamw", False, {}) for e in (1, 1.5, 2, 2.5, 3, 3.5, 4)},
    ),
    "LSTM_VARIATIONS": (
        "lstm_variations",
        {
            f"lstm_24d_{name}": (24, 193_700_000, 10**-1.5, "adamw", False, more)
            for name, more in {
                "layernorm": {"use_layer_norm": True},
                "3_layers": {"num_layers": 3},
                "no_layer_norm": {"use_layer_norm": False},
                "cosine_warmup": {"lr_schedule": "cosine_warmup"},
                "inverse_sqrt": {"lr_schedule": "inverse_sqrt"},
            }.items()
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_groups_of_the_published_study_have_its_labels_and_values(name):
    found = definitions.load(f"{ROOT / 'defs' / 'lstm_scaling.py'}:{name}")
    [stage] = found.stages
    group, expected = PUBLISHED[name]

    assert stage.name == group
    assert [run.label for run in found.written[group]] == list(expected)
    for values, (h, characters, lr, optimizer, use_mup, more) in zip(stage.configs(), expected.values(), strict=True):
        config = parse(ScalingConfig, values)
        assert (config.hidden_size, config.max_characters, config.optimizer) == (h, characters, optimizer)
        assert config.learning_rate == pytest.approx(lr, rel=1e-12)
        assert (config.use_mup, config.mup_base_width, config.mup_rule) == (use_mup, 16, "correct")
        assert (config.seed, config.tokens, config.num_epochs, config.sequence_length) == (123, "gpt2", 1, 128)
        assert all(getattr(config, field) == value for field, value in more.items())


def test_the_names_that_its_readme_promises_are_there_and_the_first_is_the_default():
    module = definitions.load(ROOT / "defs" / "lstm_scaling.py").module
    assert module.EXPERIMENTS is module.LSTM_SGD_MUP_SCALING
    assert module.MUP_SCALING_EXPERIMENTS is module.LSTM_MUP_SCALING_EXPERIMENTS
    assert lists_of(vars(module)).keys() >= {*PUBLISHED, "MUP_SCALING_EXPERIMENTS", "EXPERIMENTS"}
    for name in lists_of(vars(module)):
        for stage in definitions.load(f"{ROOT / 'defs' / 'lstm_scaling.py'}:{name}").stages:
            assert all(parse(ScalingConfig, values) for values in stage.configs())


def test_the_small_sibling_sweeps_both_parametrisations_with_two_seeds():
    found = definitions.load(ROOT / "defs" / "lstm_scaling_cpu.py")
    standard, mup = [[parse(ScalingConfig, values) for values in stage.configs()] for stage in found.stages]

    assert len(standard) == len(mup) == 24
    assert {(c.use_mup, c.tokens, c.data_path) for c in standard} == {(False, "bytes", "stdlib")}
    assert {(c.use_mup, c.mup_base_width) for c in mup} == {(True, 16)}
    assert {c.hidden_size for c in standard} == {16, 32, 64}
    assert {c.seed for c in mup} == {0, 1}


# ------------------------------------------------------------------------------------------ what a field is also called

CLASHING = (
    FAMILY
    + """
    class OtherConfig(rnnq.Config):
        lr: float = 0.5
        steps: int = 1

    @rnnq.family(OtherConfig)
    def other(config):
        yield {"loss": config.lr}

    own = rnnq.stage("own", other, [{"lr": 0.5}, {"lr": 0.001}])
    also = rnnq.stage("also", toy, [{"learning_rate": 0.5}, {"learning_rate": 0.002}])
"""
)


def found_by(engine: Engine, filter: str, stage: str | None = None) -> list[int]:
    return [row["id"] for row in runs.find(engine, stage, filter)]


def test_a_filter_takes_what_a_family_also_calls_a_field(engine: Engine, tmp_path):
    queue.init(engine, stages(write(tmp_path, CLASHING)))

    assert found_by(engine, "lr < 0.01") == [2, 4]
    assert found_by(engine, "lr = learning_rate", "also") == [3, 4]
    assert found_by(engine, "config.lr >= 0.5", "also") == [3]
    assert found_by(engine, "lr >= 0.5", "own") == [1]
    with pytest.raises(InputError, match="no such name: learning_rate"):
        found_by(engine, "learning_rate < 1", "own")
    assert runs.stage_info(engine, "also").aliases == {"lr": "learning_rate"}
    assert "lr" not in runs.stage_info(engine, "also").fields


def test_a_gate_takes_it_too(engine: Engine, tmp_path):
    after = '    next = rnnq.stage("next", toy, [{}], after=rnnq.runs_of("also", "lr < 0.01", when="mean(loss) < 1"))\n'
    queue.init(engine, stages(write(tmp_path, CLASHING + after)))
    assert runs.find(engine, "next")[0]["state"] == "waiting"
    wrong = write(tmp_path, CLASHING + after.replace("lr <", "lrr <"))
    with pytest.raises(InputError, match="no such name: lrr"):
        queue.init(engine, stages(wrong))


def test_a_stage_that_was_made_before_has_no_other_names_and_works(engine: Engine, tmp_path):
    queue.init(engine, stages(write(tmp_path)))
    with db.transaction(engine) as connection:
        before = {"learning_rate": "float", "width": "int", "steps": "int", "name": "str", "seed": "int"}
        connection.execute(text("UPDATE stages SET fields = :fields"), {"fields": json.dumps(before)})

    assert found_by(engine, "width = 32 and learning_rate = 0.1") == [1]
    with pytest.raises(InputError, match="no such name: lr"):
        found_by(engine, "lr = 0.1")
    queue.init(engine, stages(tmp_path / "study.py"))  # the next init brings them
    assert found_by(engine, "lr = 0.1 and width = 32") == [1]


def test_set_takes_it_too(tmp_path):
    family = definitions.load(write(tmp_path)).module.ToyConfig
    assert plan.parse_changes(["lr=0.5", "name=12"], family) == {"learning_rate": 0.5, "name": "12"}


def test_everything_for_which_a_text_is_too_short_is_said_of_its_run(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    base = f"{{'data_path': {str(tmp_path / 'text.txt')!r}, 'tokens': 'bytes', 'batch_size': 2, 'sequence_length': 8}}"
    tiny = "{'val_split': 1e-9, 'test_split': 1e-9, 'steps': 1}"
    run = f"{{'label': 'tiny', 'overrides': {tiny}}}"
    path = write(tmp_path, f"CONFIG = {base}\nEXPERIMENTS = [{{'name': 'g', 'subexperiments': [{run}]}}]")

    lines = [line for line in cli("init", str(path), code=2).stderr.splitlines() if "has 0 tokens" in line]

    assert len(lines) == 2 and all(f"{path}: stage g, tiny: " in line for line in lines)


def test_more_epochs_than_can_be_counted_are_refused_like_any_value(tmp_path: Path, cli: Cli) -> None:
    run = "{'label': 'long', 'overrides': {'tokens': 'bytes', 'num_epochs': 10**18}}"
    path = write(tmp_path, f"EXPERIMENTS = [{{'name': 'g', 'subexperiments': [{run}]}}]")
    assert f"{path}: stage g, long: num_epochs=1" in cli("init", str(path), code=2).stderr
