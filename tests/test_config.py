"""Configs: what they accept, what they say when they do not, and what makes two of them the same run.

families/fingerprints.json holds fingerprints that databases out there were made with. A fingerprint that changes makes
every such run new, so the file is never edited by hand:

    python -m tests.test_config        # adds what is not there yet; renews a family only if its `version` was raised

Raise `version` when a default changes, or what a field means; a new field whose default means "as before" needs
neither a new version nor a new file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

import rnnq
from rnnq import families
from rnnq.config import as_json, check, field_types, fingerprint, group_key, metric_rows, parse, to_json
from rnnq.errors import InputError
from rnnq.families.dynamics.config import FLAGS, DynamicsConfig

GOLDEN = Path(__file__).parent / "families" / "fingerprints.json"
SAMPLES: dict[str, list[dict[str, Any]]] = {  # of every built-in family
    "dynamics": [
        {},
        {"seed": 1},
        {"use_forget_gate": True, "use_state_gate": True, "n_layers": 2},
        {"use_new_state": False, "use_old_state": True, "use_residual": False, "state_size": 32},
        dict.fromkeys(FLAGS, True) | {"n_layers": 3, "state_size": 512, "steps": 50_000, "seed": 9},
        {"lr": 3e-4, "corpus": "enwik8", "batch_size": 64, "window": 256, "log_every": 100, "eval_every": 500},
    ],
    "groups": [
        {},
        {"seed": 1, "device": "cuda:1", "description": "in no fingerprint", "analysis": {"checkpoints": [0, 1]}},
        {"data": {"p": 10, "k": 2, "template_type": "fourier", "n_freqs": 3, "seed": 5}, "model": {"hidden_dim": 64}},
        {"data": {"p1": 10, "p2": 10, "k": 5, "seed": 5}, "training": {"mode": "offline", "optimizer": "adam"}},
        {
            "data": {
                "group_name": "octahedral",
                "template_type": "custom_fourier",
                "powers": [0, 0, 0, 300, 500],
                "k": 2,
            },
            "model": {"model_type": "TwoLayerNet", "hidden_dim": 1200, "init_scale": 1e-3},
            "training": {"mode": "offline", "optimizer": "per_neuron", "learning_rate": 0.01},
        },
    ],
    "fsm": [
        {"epochs": 16},
        {"epochs": 16, "seed": 1},
        {"epochs": 32, "model": "rnn_seed", "n_layers": 8, "data_split": "stream", "head": "states"},
        {"steps": 1000, "model": "transformer", "d_model": 64, "d_ff": 128, "states": 3, "actions": 3, "dropout": 0.0},
        {"model": "solver", "states": 8, "actions": 8, "demo_length": 80, "data_seed": 7, "permute_tokens": True},
        {
            "epochs": 9,
            "absorbing": True,
            "demos": 2,
            "query_length": 30,
            "stop_below": 0.05,
            "stop_after": 4,
            "clip": None,
        },
    ],
    "fsm_probe": [
        {},
        {"seed": 1},
        {"target": "table", "model": "gru", "d_model": 64, "n_layers": 1, "layers": "top"},
        {"target": "current_state", "control": "shuffled_labels", "states": 3, "actions": 3, "steps": 100, "lr": 0.01},
    ],
    "scaling": [
        {},
        {"seed": 1},
        {"hidden_size": 32, "use_mup": True, "mup_base_width": 16, "optimizer": "sgd", "learning_rate": 0.1},
        {"tokens": "bytes", "steps": 2000, "tie_embeddings": True, "lr_schedule": "cosine_warmup", "num_layers": 1},
        {"max_characters": 258_600_000, "use_mup": True, "mup_rule": "seed", "use_layer_norm": False, "seed": 123},
        {"token_to_param_ratio": 40.0, "tbptt_length": 32, "batch_size": 128, "adam_beta1": 0.0, "adam_epsilon": 1e-9},
    ],
}


class Cell(BaseModel):
    """A part of a config."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    width: int = 8
    kind: Literal["gru", "lstm"] = "gru"


class Toy(rnnq.Config):
    """A config with a field of every sort."""

    seed_fields: ClassVar[tuple[str, ...]] = ("seed", "data_seed")

    data_seed: int = 0
    lr: float = Field(default=1e-3, gt=0, le=1)
    steps: int = Field(default=100, ge=1)
    gated: bool = False
    corpus: str = "stdlib"
    sizes: tuple[int, ...] = (1, 2)
    cell: Cell = Cell()
    patience: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits(self) -> Toy:
        if self.gated and self.steps < 10:
            raise ValueError("Gates need at least 10 steps")
        return self


# ------------------------------------------------------------------------------------------------ identity


def entries(family: str) -> list[dict[str, Any]]:
    model = families.find_config(family)
    return [
        {
            "config": values,
            "fingerprint": fingerprint(family, parse(model, values)),
            "group_key": group_key(family, parse(model, values)),
        }
        for values in SAMPLES[family]
    ]


@pytest.mark.parametrize("family", families.BUILTIN)
def test_fingerprints_are_those_of_the_databases_out_there(family: str) -> None:
    golden = json.loads(GOLDEN.read_text())[family]
    version = families.find_config(family).version
    assert golden["version"] == version, f"the version is {version} now: `python -m tests.test_config` renews the file"
    assert golden["entries"] == entries(family), f"raise the version of {family}: its old runs are other runs now"


def renew(path: Path = GOLDEN) -> None:
    """Write the golden file anew, but for families that changed without a new version."""
    golden = json.loads(path.read_text()) if path.exists() else {}
    for family in families.BUILTIN:
        version, found = families.find_config(family).version, entries(family)
        old = golden.get(family, {"version": None, "entries": []})
        if old["version"] == version and any(entry not in found for entry in old["entries"]):
            raise SystemExit(f"{family}: fingerprints differ, but the version is still {version}: raise it")
        golden[family] = {"version": version, "entries": found}
    path.write_text(json.dumps(golden, indent=1) + "\n")


def test_the_golden_file_is_not_renewed_while_the_version_is_the_same(tmp_path: Path) -> None:
    copy = tmp_path / "fingerprints.json"
    golden = json.loads(GOLDEN.read_text())
    golden["dynamics"]["entries"][0]["fingerprint"] = "0" * 64
    copy.write_text(json.dumps(golden))

    with pytest.raises(SystemExit, match="raise it"):
        renew(copy)

    golden["dynamics"]["version"] = 0
    copy.write_text(json.dumps(golden))
    renew(copy)
    assert copy.read_text() == GOLDEN.read_text()


def test_a_new_field_whose_default_means_as_before_changes_no_fingerprint() -> None:
    class Grown(Toy):
        clip: float | None = None
        warmup: list[int] = Field(default_factory=list)

    for values in ({}, {"seed": 3}, {"lr": 0.5, "cell": {"width": 9}, "sizes": [3]}):
        old, new = parse(Toy, values), parse(Grown, values)
        assert fingerprint("toy", new) == fingerprint("toy", old)
        assert group_key("toy", new) == group_key("toy", old)
    assert fingerprint("toy", Grown(clip=1.0)) != fingerprint("toy", Toy())


def test_every_field_the_family_its_version_and_the_start_make_a_run_another_run() -> None:
    class Later(Toy):
        version: ClassVar[int] = 2

    changes = [{"seed": 1}, {"data_seed": 1}, {"lr": 0.5}, {"steps": 7}, {"gated": True}, {"corpus": "x"}]
    changes += [{"sizes": [2, 1]}, {"cell": {"kind": "lstm"}}, {"patience": 1}]
    found = [fingerprint("toy", parse(Toy, values)) for values in [{}, *changes]]
    found += [fingerprint("other", Toy()), fingerprint("toy", Later()), fingerprint("toy", Toy(), "run 3 of s")]

    assert len(set(found)) == len(found)
    assert all(len(key) == 64 for key in found)


def test_the_group_key_leaves_out_the_declared_seed_fields_and_nothing_else() -> None:
    key = group_key("toy", Toy())

    assert group_key("toy", Toy(seed=5, data_seed=6)) == key
    assert group_key("toy", Toy(seed=5, lr=0.5)) != key
    assert group_key("toy", Toy(steps=99)) != key
    assert group_key("toy", Toy(), "run 3 of s") != key


def test_a_default_that_is_written_out_makes_no_other_run() -> None:
    assert fingerprint("toy", parse(Toy, {"lr": 0.001, "sizes": [1, 2], "cell": {}})) == fingerprint("toy", Toy())


def test_an_int_for_a_float_field_is_the_same_run_as_the_float() -> None:
    assert fingerprint("toy", parse(Toy, {"lr": 1})) == fingerprint("toy", parse(Toy, {"lr": 1.0}))
    assert to_json(parse(Toy, {"lr": 1})) == to_json(parse(Toy, {"lr": 1.0}))


def test_json_is_canonical_whole_and_without_nan() -> None:
    text = to_json(Toy(steps=7))

    assert text == as_json(dict(reversed(json.loads(text).items())))
    assert text.startswith('{"cell":{"kind":"gru","width":8},"corpus":"stdlib","data_seed":0,')
    assert set(json.loads(text)) == set(Toy.model_fields)
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json({"loss": float("nan")})


@settings(max_examples=200, deadline=None)
@given(
    lr=st.floats(min_value=1e-300, max_value=1),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    corpus=st.text(),
    sizes=st.lists(st.integers()),
    width=st.integers(),
)
def test_a_config_survives_json_and_back_unchanged(
    lr: float, seed: int, corpus: str, sizes: list[int], width: int
) -> None:
    values = {"lr": lr, "seed": seed, "corpus": corpus, "sizes": tuple(sizes), "cell": {"width": width}}
    config = parse(Toy, values)

    assert config == Toy(lr=lr, seed=seed, corpus=corpus, sizes=tuple(sizes), cell=Cell(width=width))
    assert parse(Toy, json.loads(to_json(config))) == config
    assert to_json(parse(Toy, json.loads(to_json(config)))) == to_json(config)


# ---------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seed": True}, "seed=True: input should be a valid integer"),
        ({"seed": "3"}, "seed='3': input should be a valid integer"),
        ({"seed": 3.0}, "seed=3.0: input should be a valid integer"),
        ({"seed": -1}, "seed=-1: input should be greater than or equal to 0"),
        ({"seed": 2**63}, f"seed={2**63}: input should be less than {2**63}"),
        ({"lr": "0.1"}, "lr='0.1': input should be a valid number"),
        ({"lr": True}, "lr=True: input should be a valid number"),
        ({"lr": float("nan")}, "lr=nan: input should be a finite number"),
        ({"lr": float("inf")}, "lr=inf: input should be a finite number"),
        ({"gated": 1}, "gated=1: input should be a valid boolean"),
        ({"corpus": None}, "corpus=None: input should be a valid string"),
        ({"corpus": b"x"}, "corpus=b'x': input should be a valid string"),
        ({"sizes": [1, "2"]}, "sizes.1='2': input should be a valid integer"),
        ({"cell": {"kind": "rnn"}}, "cell.kind='rnn': input should be 'gru' or 'lstm'"),
        ({"cell": {"widht": 3}}, "Toy has no field cell.widht (did you mean cell.width or cell.kind?)"),
        ({"patience": 0}, "patience=0: input should be greater than 0"),
        ({"step": 3}, "Toy has no field step (did you mean steps?)"),
        ({"gated": True, "steps": 3}, "Gates need at least 10 steps"),
    ],
)
def test_what_is_wrong_is_a_sentence(values: dict[str, Any], sentence: str) -> None:
    config, problems = check(Toy, values)

    assert config is None
    assert problems == [sentence]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse(Toy, {"seed": -1, "lr": 2.0, "stepz": 3, "gated": "yes"})

    assert len(caught.value.problems) == 4
    assert caught.value.exit_code == 2


def test_a_field_without_a_default_must_be_given() -> None:
    class Strict(rnnq.Config):
        width: int

    assert check(Strict, {}) == (None, ["width is missing"])


def test_a_name_that_is_like_none_gets_the_list_of_all() -> None:
    class Small(rnnq.Config):
        lr: float = 1.0

    assert check(Small, {"zzz": 1})[1] == ["Small has no field zzz (it has lr, seed)"]


def test_a_whole_number_is_a_float_where_a_float_is_asked_for() -> None:
    class Wide(rnnq.Config):
        lr: float = 1.0

    config = parse(Wide, {"lr": 3})
    assert isinstance(config.lr, float)  # type: ignore[attr-defined]
    assert json.loads(to_json(config))["lr"] == 3.0


def test_numbers_of_numpy_are_taken_as_pythons_own() -> None:
    values = {
        "lr": np.float64(0.5),
        "seed": np.int64(7),
        "gated": np.bool_(True),
        "corpus": np.str_("x"),
        "data_seed": np.array(4),
    }
    config = parse(Toy, values)

    assert config == Toy(lr=0.5, seed=7, gated=True, corpus="x", data_seed=4)
    assert to_json(config) == to_json(Toy(lr=0.5, seed=7, gated=True, corpus="x", data_seed=4))
    assert check(Toy, {"steps": np.float64(3.0)})[1] == ["steps=3.0: input should be a valid integer"]


def test_a_tuple_field_takes_a_list_too_since_json_has_no_tuples() -> None:
    assert parse(Toy, {"sizes": [3, 4]}) == parse(Toy, {"sizes": (3, 4)}) == Toy(sizes=(3, 4))


def test_a_value_that_json_has_no_word_for_is_still_checked() -> None:
    assert parse(Toy, {"cell": Cell(width=3)}) == Toy(cell=Cell(width=3))
    assert check(Toy, {"corpus": Path("x")})[1] == ["corpus=" + repr(Path("x")) + ": input should be a valid string"]


def test_a_config_never_changes() -> None:
    config = Toy()

    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 0.5  # type: ignore[misc]


# ----------------------------------------------------------------------------------- what a stage stores


def test_the_types_of_fields_are_what_the_filter_language_needs() -> None:
    class Rich(Toy):
        optional_flag: bool | None = None
        number: int | float = 1
        count: Annotated[int, Field(ge=0)] = 0
        level: Literal[1, 2] | None = None
        switch: Literal[True] = True
        word: Literal["a", "b"] | None = None
        maybe: Cell | None = None
        names: list[str] = Field(default_factory=list)
        table: dict[str, int] | None = None
        mixed: int | str = 1
        anything: Any = None

    assert field_types(Rich) == {
        "seed": "int",
        "data_seed": "int",
        "lr": "float",
        "steps": "int",
        "gated": "bool",
        "corpus": "str",
        "sizes": "json",
        "cell.width": "int",
        "cell.kind": "str",
        "patience": "int",
        "optional_flag": "bool",
        "number": "float",
        "count": "int",
        "level": "int",
        "switch": "bool",
        "word": "str",
        "maybe.width": "int",
        "maybe.kind": "str",
        "names": "json",
        "table": "json",
        "mixed": "str",
        "anything": "str",
    }


def test_the_primary_metric_is_the_one_that_says_so_else_the_first() -> None:
    class Two(rnnq.Config):
        metrics = (rnnq.Metric("loss"), rnnq.Metric("accuracy", "%", "max", primary=True))

    class Neither(rnnq.Config):
        metrics = (rnnq.Metric("loss"), rnnq.Metric("accuracy", "%", "max"))

    assert Two.primary().name == "accuracy"
    assert Neither.primary().name == "loss"
    assert metric_rows(Neither) == [
        {"name": "loss", "unit": "", "better": "min", "primary": True},
        {"name": "accuracy", "unit": "%", "better": "max", "primary": False},
    ]
    assert [row["primary"] for row in metric_rows(Two)] == [False, True]


def test_a_label_names_what_differs_from_the_defaults_but_not_the_seeds() -> None:
    assert Toy().label() == "defaults"
    assert Toy(seed=3, data_seed=4).label() == "defaults"
    assert Toy(lr=0.5, gated=True, seed=3).label() == "lr=0.5, gated=True"


def test_steps_total_is_the_field_steps_where_there_is_one() -> None:
    assert Toy(steps=7).steps_total() == 7
    assert rnnq.Config().steps_total() is None


# ------------------------------------------------------------------------------------------------ dynamics


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"use_new_state": False}, "use_new_state and use_old_state are both off"),
        ({"n_layers": 0}, "n_layers=0: input should be greater than or equal to 1"),
        ({"n_layers": 65}, "n_layers=65: input should be less than or equal to 64"),
        ({"state_size": 0}, "state_size=0"),
        ({"lr": 0.0}, "lr=0.0: input should be greater than 0"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"lr": 10.5}, "lr=10.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"window": 1}, "window=1: input should be greater than or equal to 2"),
        ({"steps": 0}, "steps=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"corpus": ""}, "corpus='': string should have at least 1 character"),
        ({"use_forget_gate": "on"}, "use_forget_gate='on': input should be a valid boolean"),
        ({"stat_size": 3}, "DynamicsConfig has no field stat_size (did you mean state_size"),
        ({"use_forget_gates": True}, "DynamicsConfig has no field use_forget_gates (did you mean use_forget_gate"),
    ],
)
def test_each_bad_field_of_a_gated_rnn_gets_its_sentence(values: dict[str, Any], sentence: str) -> None:
    config, problems = check(DynamicsConfig, values)

    assert config is None
    assert len(problems) == 1
    assert problems[0].startswith(sentence)


def test_the_defaults_of_a_gated_rnn_are_those_of_the_study() -> None:
    config = DynamicsConfig()

    assert config.label() == "....N.R L1 S256"
    assert (config.steps, config.batch_size, config.window, config.lr) == (10_000, 256, 1000, 1e-3)
    assert (config.log_every, config.eval_every, config.corpus) == (50, 1000, "stdlib")


if __name__ == "__main__":
    renew()
