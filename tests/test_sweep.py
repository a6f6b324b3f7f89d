"""Sweeps, stages, the rule of a winner, and what becomes of a definition file."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnq
from rnnq import sweep
from rnnq.definitions import load
from rnnq.errors import InputError
from rnnq.sweep import configs, grid, refined, stage, union

STAGE1 = Path(__file__).parents[1] / "defs" / "stage1.py"


# ------------------------------------------------------------------------------------------------- sweeps


def test_a_grid_walks_its_last_axis_fastest():
    assert list(grid(a=[2, 1], b=["x", "y"])) == [
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
    ]


def test_a_scalar_a_string_a_dict_and_none_are_one_value_each():
    assert list(grid(a=3, b="text", c={"k": 1}, d=None, e=b"raw")) == [
        {"a": 3, "b": "text", "c": {"k": 1}, "d": None, "e": b"raw"}
    ]


def test_a_grid_without_axes_is_one_config_without_fields():
    assert list(grid()) == [{}]
    assert list(grid().seeds(2)) == [{"seed": 0}, {"seed": 1}]


def test_an_axis_may_be_a_range_a_generator_or_an_array_whose_numbers_become_pythons_own():
    made = list(grid(a=range(2), b=(x for x in "p"), c=np.array([0.5]), d=np.float64(2.0)))

    assert made == [{"a": a, "b": "p", "c": 0.5, "d": 2.0} for a in (0, 1)]
    assert type(made[0]["c"]) is float
    assert type(made[0]["d"]) is float


def test_all_axes_that_cannot_be_used_are_named_at_once():
    with pytest.raises(InputError) as caught:
        grid(lr=[], size=[1], mode={"a", "b"})

    assert caught.value.problems == ["axis lr is empty", "axis mode is a set, which has no order; give a list"]


def test_zip_walks_its_axes_together():
    assert list(rnnq.zip(a=[1, 2], b=["x", "y"])) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert list(rnnq.zip(a=1, b="xy")) == [{"a": 1, "b": "xy"}]


def test_zip_with_axes_of_unequal_length_names_the_lengths():
    with pytest.raises(InputError, match="a has 3, b has 2, c has 1"):
        sweep.zip(a=[1, 2, 3], b=[1, 2], c=5)
    with pytest.raises(InputError, match="at least one axis"):
        sweep.zip()


def test_a_union_puts_one_sweep_after_the_other_and_drops_nothing():
    first, second = grid(a=[1, 2]), grid(a=[2], b=[3])

    assert list(first + second) == list(union(first, second)) == [{"a": 1}, {"a": 2}, {"a": 2, "b": 3}]
    assert len(union()) == 0


def test_a_union_takes_sweeps_only():
    with pytest.raises(InputError, match="union\\(\\) takes sweeps, not a list"):
        union(grid(a=1), [{"a": 2}])
    with pytest.raises(TypeError):
        grid(a=1) + 3
    with pytest.raises(TypeError):
        grid(a=1) * 3


def test_a_product_of_sweeps_has_each_with_each():
    assert list(configs([{"a": 1}, {"a": 2, "b": 0}]) * grid(c=[5, 6])) == [
        {"a": 1, "c": 5},
        {"a": 1, "c": 6},
        {"a": 2, "b": 0, "c": 5},
        {"a": 2, "b": 0, "c": 6},
    ]


def test_a_product_of_sweeps_that_share_a_field_is_refused():
    # the field is in one config of each only
    with pytest.raises(InputError, match="both have b"):
        configs([{"a": 1}, {"b": 0}]) * configs([{"c": 1}, {"c": 1, "b": 2}])


def test_override_sets_a_field_on_every_config_and_takes_a_list_as_one_value():
    assert list(grid(a=[1, 2]).override(a=7, widths=[3, 4])) == [{"a": 7, "widths": [3, 4]}] * 2


def test_seeds_repeat_each_config_with_the_seed_fastest():
    assert [(c["a"], c["seed"]) for c in grid(a=[1, 2]).seeds(2)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [c["seed"] for c in grid(a=1).seeds([3, 5])] == [3, 5]


@pytest.mark.parametrize("seeds", [0, -1, True, 2.0, []])
def test_less_than_one_seed_is_refused(seeds):
    with pytest.raises(InputError):
        grid(a=1).seeds(seeds)


def test_seeds_are_refused_twice_over():
    with pytest.raises(InputError, match="lists twice: 3"):
        grid(a=1).seeds([3, 4, 3])
    with pytest.raises(InputError, match="both have seed"):
        grid(a=1).seeds(2).seeds(2)


def test_a_list_of_dicts_is_a_sweep_and_everything_else_in_it_is_named():
    assert list(configs([{"a": 1}, {"b": 2}])) == [{"a": 1}, {"b": 2}]
    with pytest.raises(InputError) as caught:
        configs([{"a": 1}, 5, {6: 7}])
    assert [problem[:8] for problem in caught.value.problems] == ["config 1", "config 2"]
    for wrong in ({"a": 1}, 5):
        with pytest.raises(InputError, match="takes a list of dicts"):
            configs(wrong)


def test_nothing_changes_a_sweep():
    rows = [{"a": 1}]
    made = configs(rows)
    rows[0]["a"] = 2
    next(iter(made))["a"] = 3
    made.where(lambda c: c.update(a=4) or True)

    assert list(made) == [{"a": 1}]
    with pytest.raises(AttributeError):
        made._configs = ()
    assert repr(made) == "<Sweep of 1 configs>"


def test_where_keeps_what_the_predicate_holds_for():
    kept = grid(a=[1, 2, 3], b=[0, 1]).where(lambda c: c["a"] == 2 or c["b"])

    assert [tuple(c.values()) for c in kept] == [(1, 1), (2, 0), (2, 1), (3, 1)]


def test_a_predicate_that_asks_for_a_misspelt_field_is_told_the_nearest():
    with pytest.raises(InputError) as caught:
        grid(n_layers=[1, 2], lr=[0.1]).where(lambda c: c["n_layer"] > 1)

    assert "asks for n_layer, which is no field of n_layers=1, lr=0.1" in caught.value.message
    assert "did you mean n_layers?" in caught.value.hint
    assert "base=" in caught.value.hint


def test_a_key_error_of_the_predicates_own_table_is_not_taken_for_a_misspelt_field():
    table = {"small": 1}

    with pytest.raises(InputError, match="fails on size='large': KeyError: 'large'"):
        grid(size=["small", "large"]).where(lambda c: table[c["size"]])


def test_a_predicate_that_raises_is_named_with_the_config_and_its_trace():
    with pytest.raises(InputError) as caught:
        grid(a=[2, 0]).where(lambda c: 1 / c["a"])

    assert "<lambda> (" in caught.value.message
    assert "test_sweep.py:" in caught.value.message
    assert caught.value.message.endswith("fails on a=0: ZeroDivisionError: division by zero")
    assert "Traceback" in caught.value.hint
    with pytest.raises(InputError, match="takes a function"):
        grid(a=1).where("a<1")


def test_a_predicate_may_use_get_and_in_for_fields_that_some_configs_lack():
    both = configs([{"a": 1}, {"b": 2}])

    assert list(both.where(lambda c: "a" in c)) == [{"a": 1}]
    assert list(both.where(lambda c: c.get("b") == 2)) == [{"b": 2}]


def test_a_slip_that_would_fill_the_memory_is_refused_before_it_does():
    axis = range(2_000)
    for make in (
        lambda: grid(a=axis, b=axis, c=axis),
        lambda: grid(a=axis) * grid(c=axis),
        lambda: grid(a=axis).seeds(10**12),
        lambda: grid(a=itertools.count()),
    ):
        with pytest.raises(InputError, match="at most 2,000,000 configs"):
            make()


def test_two_hundred_thousand_configs_are_made_and_filtered_in_a_moment():
    start = time.process_time()  # of the processor: a busy machine must not fail this
    made = grid(a=range(20), b=range(10), c=range(10), d=range(10), e=range(10), f="x", g=1, h=2.0, i=True)
    made_s = time.process_time() - start
    kept = made.where(lambda c: c["a"] != 3)
    both_s = time.process_time() - start

    assert (len(made), len(kept)) == (200_000, 190_000)
    assert made_s < 1.0
    assert both_s < 2.0


def test_sweeps_need_nothing_but_the_standard_library():
    code = "import sys, rnnq.sweep; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "numpy", "pydantic", "sqlalchemy", "pandas", "typer"} & set(loaded)


# ------------------------------------------------------------------------------------------------- stages


def test_the_entry_of_a_sweep_wins_over_the_base():
    made = stage("s", "dynamics", grid(a=[1, 2]), base=dict(a=0, steps=10))

    assert list(made.configs()) == [{"a": 1, "steps": 10}, {"a": 2, "steps": 10}]


def test_a_stage_takes_a_plain_list_of_dicts_too():
    assert list(stage("s", "dynamics", [{"a": 1}]).configs()) == [{"a": 1}]


@pytest.mark.parametrize("name", ["stage1", "1", "a" * 64, "A-b_c.d"])
def test_names_that_can_be_folders_are_taken(name):
    assert stage(name).name == name


@pytest.mark.parametrize("name", ["", "a" * 65, ".hidden", "-x", "_x", "a/b", "a b", "ä", "..", "a\n", None])
def test_names_that_cannot_be_folders_are_refused(name):
    with pytest.raises(InputError, match="cannot be the name of a stage"):
        stage(name)
    with pytest.raises(InputError):
        stage("s", next=name if name is not None else 5)


def test_everything_wrong_with_a_stage_is_said_at_once():
    with pytest.raises(InputError) as caught:
        stage("a b", grid(a=1), 5, base=[1], refine="grow", next=3)

    said = " | ".join(caught.value.problems)
    for word in ("cannot be the name", "family is missing", "list of dicts", "base=", "refine=", "next="):
        assert word in said
    assert "rnnq.stage(" in caught.value.hint


def test_a_stage_does_not_follow_itself():
    for follows in ("s", stage("s")):
        with pytest.raises(InputError, match="names the stage itself"):
            stage("s", "dynamics", grid(a=1), next=follows)


# --------------------------------------------------------------------------------------- what becomes of a winner


def test_a_rule_may_yield_dicts_return_a_list_or_return_one_dict():
    for rule in (
        lambda c: c | {"steps": 5},
        lambda c: [c | {"steps": 5}],
        lambda c: (c | {"steps": 5} for _ in range(1)),
    ):
        assert refined(rule, {"a": 1}) == [{"a": 1, "steps": 5}]
        assert refined(stage("s", refine=rule), {"a": 1}) == [{"a": 1, "steps": 5}]


def test_without_a_rule_the_winner_goes_on_as_it_is():
    config = {"a": 1}

    for rule in (None, stage("s")):
        assert refined(rule, config) == [config]
        assert refined(rule, config)[0] is not config


def test_a_rule_that_changes_one_dict_and_yields_it_twice_makes_two_configs():
    def grow(config):
        config["steps"] = 5
        yield config
        config["size"] = 9
        yield config

    winner = {"a": 1}

    assert refined(grow, winner) == [{"a": 1, "steps": 5}, {"a": 1, "steps": 5, "size": 9}]
    assert winner == {"a": 1}
    assert all(type(child) is dict for child in refined(grow, winner))


def test_a_rule_that_fails_is_named_with_the_config():
    def grow(config):
        yield config
        yield config | {"size": 1 // config["a"]}

    with pytest.raises(InputError, match=r"grow \(.*test_sweep.py:\d+\) fails on a=0: ZeroDivisionError") as caught:
        refined(grow, {"a": 0})
    assert '1 // config["a"]' in caught.value.hint


def test_a_rule_that_asks_for_a_misspelt_field_is_told_the_nearest():
    def grow(config):
        return config | {"n_layers": config["n_layer"] + 1}

    with pytest.raises(InputError, match="asks for n_layer, which is no field of n_layers=1") as caught:
        refined(grow, {"n_layers": 1})
    assert caught.value.hint == "did you mean n_layers?"


@pytest.mark.parametrize("made", [None, [], (), iter(())])
def test_a_rule_that_makes_nothing_is_refused(made):
    with pytest.raises(InputError, match="makes nothing of a=1"):
        refined(lambda c: made, {"a": 1})


@pytest.mark.parametrize("made", [5, "steps", [{"a": 2}, 6], {7: 8}, [["a", 1]]])
def test_a_rule_that_makes_something_else_than_dicts_is_refused(made):
    with pytest.raises(InputError, match="of a=1: not a dict of fields"):
        refined(lambda c: made, {"a": 1})


# ------------------------------------------------------------------------------------------ the seed's study

FLAGS = ["input_gate", "forget_gate", "output_gate", "state_gate", "new_state", "old_state", "residual"]


def the_seeds_configs():
    """Stage 1 by plain loops, as specs/dynamics.md 1.6 tells it."""
    for flags in itertools.product([True, False], repeat=7):
        for n_layers in (1, 2, 3):
            for state_size in (32, 256):
                new, old, residual = flags[4:]
                if not new and not old:
                    continue
                if state_size < 256 and not residual:
                    continue
                named = {f"use_{name}": flag for name, flag in zip(FLAGS, flags, strict=True)}
                yield named | {"n_layers": n_layers, "state_size": state_size, "steps": 10_000}


def test_stage1_is_the_432_configs_of_the_seed_in_its_order():
    (stage1,) = load(STAGE1).stages
    made = [dict(sorted(config.items())) for config in stage1.configs()]

    assert (stage1.name, stage1.family) == ("stage1", "dynamics")
    assert made == [dict(sorted(config.items())) for config in the_seeds_configs()]
    assert len(made) == len(stage1.sweep) == 432
    assert sum(config["state_size"] == 256 for config in made) == 288


def test_the_head_of_stage1_has_the_line_for_the_ten_seeds_stage():
    line = "rnnq promote --stage stage1-2 --top 10 --seeds 10 --set steps=10000 --to stage3"

    assert line in load(STAGE1).module.__doc__


def winners(stage1, begins):
    """22 / 13 / 8 configs of 1 / 2 / 3 layers with 256 states; `begins` shifts each choice among the settings."""
    best = []
    for n_layers, count, begin in zip((1, 2, 3), (22, 13, 8), begins, strict=True):
        fit = [c for c in stage1.configs() if c["n_layers"] == n_layers and c["state_size"] == 256]
        best += fit[begin : begin + count]
    return best


@pytest.mark.parametrize(
    ("begins", "distinct"),
    [
        ((0, 0, 0), 114),  # the deeper winners have settings that a shallower one has: most of the growth coincides
        ((0, 17, 17), 130),  # 30 different settings among the 43, as in the seed's own ranking
        ((0, 22, 35), 156),  # 43 different settings: nothing coincides
    ],
)
def test_43_winners_grow_into_156_entries_and_the_distinct_ones_are_counted_right(begins, distinct):
    (stage1,) = load(STAGE1).stages
    parents = winners(stage1, begins)
    entries = [child for parent in parents for child in refined(stage1, parent)]

    by_set = {tuple(sorted(child.items())) for child in entries}
    one_by_one = []
    for child in entries:
        if not any(child == other for other in one_by_one):
            one_by_one.append(child)

    assert (len(parents), len(entries)) == (43, 156)
    assert len(by_set) == len(one_by_one) == distinct
    assert all(child["steps"] == 50_000 for child in entries)


def test_a_winner_grows_as_the_seed_says():
    (stage1,) = load(STAGE1).stages

    def sizes(n_layers):
        winner = {"n_layers": n_layers, "state_size": 256, "use_residual": True, "steps": 10_000}
        return [(c["n_layers"], c["state_size"], c["steps"]) for c in refined(stage1, winner)]

    deeper = [(3, 256, 50_000), (3, 512, 50_000)]
    assert sizes(1) == [(1, 256, 50_000), (1, 512, 50_000), *deeper]
    assert sizes(2) == [(2, 256, 50_000), (2, 512, 50_000), *deeper]
    assert sizes(3) == deeper


# ----------------------------------------------------------------------------------------------------- hours


def test_hours_are_a_number_or_follow_from_the_config() -> None:
    config = {"steps": 2_000}
    assert sweep.hours_of(sweep.stage("s", "f", [{}], hours=3), config) == 3
    assert sweep.hours_of(sweep.stage("s", "f", [{}], hours=lambda c: c["steps"] / 1000), config) == 2.0
    assert sweep.hours_of(sweep.stage("s", "f", [{}]), config) is None


@pytest.mark.parametrize("hours", [-1, float("inf"), float("nan"), True, "3"])
def test_hours_that_are_none_are_refused(hours: Any) -> None:
    with pytest.raises(InputError, match="hours= takes a number of hours"):
        sweep.stage("s", "f", [{}], hours=hours)


def guess(config: dict[str, Any]) -> Any:
    return config["stepz"] if "width" in config else config["steps"] and "three"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"steps": 1, "width": 2}, "asks for stepz, which is no field of"),
        ({"steps": 1}, "gives 'three' for steps=1: no number of hours"),
        ({}, "asks for steps, which is no field of"),
    ],
)
def test_a_function_of_hours_that_fails_is_named_with_the_config(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        sweep.hours_of(sweep.stage("s", "f", [{}], hours=guess), config)
    assert "guess (" in error.value.message


def test_a_stage_may_say_what_its_runs_are_called() -> None:
    named = stage("s", "dynamics", grid(lr=[0.1]).seeds(2), label=lambda config: f"s_run{config['seed'] + 1}")
    assert [sweep.label_of(named, config) for config in named.configs()] == ["s_run1", "s_run2"]
    assert sweep.label_of(stage("s", "dynamics", grid(lr=[0.1]), label="all alike"), {}) == "all alike"
    assert sweep.label_of(stage("s", "dynamics", grid(lr=[0.1])), {}) is None
    with pytest.raises(InputError, match="label= takes words"):
        stage("s", "dynamics", grid(lr=[0.1]), label=3)
    with pytest.raises(InputError, match="no words"):
        sweep.label_of(stage("s", "dynamics", grid(lr=[0.1]), label=lambda config: ""), {})
    with pytest.raises(InputError, match="widht"):
        sweep.label_of(stage("s", "dynamics", grid(lr=[0.1]), label=lambda config: config["widht"]), {"width": 1})
