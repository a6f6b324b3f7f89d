"""What weights begin with and how fast each learns: the tables of docs/mup.md, and muP at the base width."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnnq.families.base import SGD, Adam
from rnnq.families.scaling import counts, parametrization
from rnnq.families.scaling.config import ScalingConfig
from rnnq.optimizer import of

torch.set_num_threads(1)

BASE = 16


def config(**fields: Any) -> ScalingConfig:
    return ScalingConfig(**{"tokens": "bytes", "hidden_size": 64, "mup_base_width": BASE, "steps": 100} | fields)


def drawn(of_config: ScalingConfig, seed: int = 0) -> dict[str, Tensor]:
    return parametrization.draw(of_config, torch.Generator().manual_seed(seed))


def rates_by_class(of_config: ScalingConfig) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of each class; fails where a class has several."""
    own = {name: (g.lr, g.weight_decay) for g in parametrization.spec(of_config).groups for name in g.names}
    kinds = parametrization.classes(of_config)
    found = {kind: {own[name] for name, k in kinds.items() if k == kind} for kind in kinds.values()}
    assert all(len(pairs) == 1 for pairs in found.values()), found
    return {kind: pairs.pop() for kind, pairs in found.items()}


CONFIGS = st.builds(
    config,
    hidden_size=st.integers(1, 24),
    num_layers=st.integers(1, 3),
    layer_norm_position=st.sampled_from(["input", "output", "both"]),
    use_layer_norm=st.booleans(),
    use_mup=st.booleans(),
    optimizer=st.sampled_from(["adam", "adamw", "sgd"]),
    readout_init=st.sampled_from(["auto", "random"]),
    learning_rate=st.floats(1e-6, 1),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
    momentum=st.sampled_from([0.0, 0.9]),
)
RULES = st.one_of(
    st.tuples(CONFIGS, st.fixed_dictionaries({"mup_rule": st.sampled_from(["correct", "seed"])})),
    st.tuples(CONFIGS, st.just({"tie_embeddings": True})),
)


@settings(max_examples=60, deadline=None)
@given(RULES)
def test_every_parameter_is_drawn_and_is_in_exactly_one_group(given_: tuple[ScalingConfig, dict[str, Any]]) -> None:
    changed = config(**given_[0].model_dump() | given_[1])
    shapes = counts.shapes(changed)
    found = drawn(changed)
    assert {name: tuple(p.shape) for name, p in found.items()} == shapes
    assert list(found) == list(parametrization.classes(changed)) == list(shapes)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in found.values())
    spec = parametrization.spec(changed)
    grouped = Counter(name for group in spec.groups for name in group.names)
    assert grouped == dict.fromkeys(shapes, 1)
    assert len({(group.lr, group.weight_decay) for group in spec.groups}) == len(spec.groups)
    of({name: p[None] for name, p in found.items()}, [spec])  # refuses parameters in none or in two


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_at_the_base_width_mup_is_the_standard_parametrisation_to_the_bit(optimizer: str, tied: bool) -> None:
    """The weights at the start, the optimiser, and so what ten steps make of them."""
    fields = {"optimizer": optimizer, "tie_embeddings": tied, "hidden_size": BASE, "learning_rate": 0.1}
    plain, mup = config(**fields), config(**fields, use_mup=True, readout_init="random")
    states = []
    for chosen in (plain, mup):
        params = {name: p[None].clone() for name, p in drawn(chosen).items()}
        updates = of(params, [parametrization.spec(chosen)])
        for step in range(10):
            chance = torch.Generator().manual_seed(step)
            found = [torch.randn(p.shape, generator=chance) for p in params.values()]
            updates.update(found, done=[step])
        states.append(params)
    assert parametrization.groups(mup) == parametrization.groups(plain)
    assert all(torch.equal(drawn(mup)[name], p) for name, p in drawn(plain).items())
    assert all(torch.equal(states[1][name], p) for name, p in states[0].items())


def test_a_read_out_of_zeros_changes_nothing_else() -> None:
    zero, other = drawn(config(use_mup=True)), drawn(config(use_mup=True, readout_init="random"))
    assert not zero["readout.weight"].any()
    assert [name for name, p in zero.items() if not torch.equal(p, other[name])] == ["readout.weight"]
    assert not drawn(config(readout_init="zero"))["readout.weight"].any(), "the standard one may have it, too"


@pytest.mark.parametrize(
    ("tied", "optimizer", "expected"),
    [
        (False, "adamw", {"vector": 1, "hidden": 1 / 4, "readout": 1 / 4, "bias": 1}),
        (False, "sgd", {"vector": 4, "hidden": 1, "readout": 1 / 4, "bias": 1}),
        (True, "adamw", {"vector": 1, "hidden": 1 / 4, "tied": 1, "bias": 1}),
        (True, "sgd", {"vector": 4, "hidden": 1, "tied": 4, "bias": 1}),
    ],
)
def test_rates_are_those_of_tensor_programs_v_and_rate_times_decay_is_the_same_for_all(
    tied: bool, optimizer: str, expected: dict[str, float]
) -> None:
    """Four times the base width."""
    found = rates_by_class(config(use_mup=True, tie_embeddings=tied, optimizer=optimizer, weight_decay=0.1))
    assert {kind: rate for kind, (rate, _) in found.items()} == expected
    assert {rate * decay for rate, decay in found.values()} == {0.1}


def test_the_optimiser_is_the_one_that_the_config_names() -> None:
    sgd = parametrization.spec(config(optimizer="sgd", momentum=0.7, learning_rate=0.5, lr_schedule="constant"))
    assert isinstance(sgd, SGD)
    assert (sgd.lr, sgd.momentum, sgd.clip, sgd.schedule) == (0.5, 0.7, 1.0, None)
    adamw = parametrization.spec(config(adam_beta1=0.1, adam_beta2=0.2, adam_epsilon=1e-5, use_gradient_clipping=False))
    assert isinstance(adamw, Adam) and adamw.decoupled and adamw.schedule is not None
    assert (adamw.betas, adamw.eps, adamw.clip) == ((0.1, 0.2), 1e-5, None)
    assert [group.weight_decay for group in adamw.groups] == [0.01]
    adam = parametrization.spec(config(optimizer="adam", weight_decay=0.3, use_mup=True))
    assert {group.weight_decay for group in adam.groups} == {0.0}


def test_adams_epsilon_is_as_small_beside_the_gradients_at_every_width() -> None:
    found = [parametrization.spec(config(use_mup=True, hidden_size=h, adam_epsilon=1e-6)) for h in (4, 16, 64)]
    assert [spec.eps for spec in found if isinstance(spec, Adam)] == [4e-6, 1e-6, 2.5e-7]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_published_rule_is_the_published_rule(optimizer: str) -> None:
    """One for Adam and SGD; embedding and LSTM at 1/m, biases included; norms never learn; decay the same for all."""
    published = config(use_mup=True, mup_rule="seed", optimizer=optimizer, layer_norm_position="both")
    found = parametrization.rates(published)
    for name, rate in found.items():
        expected = 1 / 4 if name.startswith(("lstm", "embedding")) and "norm" not in name else 0.0
        assert rate == (1.0 if name.startswith("readout") else expected), name
    assert {group.weight_decay for group in parametrization.groups(published)} == {0.01}
    spec = parametrization.spec(published)
    assert isinstance(spec, SGD) or spec.eps == 1e-8


# -------------------------------------------------------------------------------------------------- at the start


@pytest.mark.parametrize("width", [16, 64, 256])
@pytest.mark.parametrize("rule", ["standard", "mup", "seed"])
def test_the_spread_of_weights_at_the_start_is_that_of_the_table(rule: str, width: int) -> None:
    """Uniform numbers: standard deviation and bound to 4 % of what is expected of 4,096 of them or more."""
    fields: dict[str, Any] = {"use_mup": rule != "standard", "mup_rule": "seed" if rule == "seed" else "correct"}
    found = drawn(config(hidden_size=width, readout_init="random", **fields))
    v, glorot = 256, math.sqrt(2)
    bounds = {
        "standard": (glorot * (v + width) ** -0.5, glorot * (5 * width) ** -0.5, glorot * (v + width) ** -0.5),
        "mup": (glorot * (v + BASE) ** -0.5, glorot * (5 * width) ** -0.5, glorot * (v + BASE) ** -0.5 * BASE / width),
        "seed": (width**-0.5, width**-0.5, 1 / width),
    }[rule]
    for name, expected in zip(("embedding", "lstm.1.w_ih", "readout.weight"), bounds, strict=True):
        assert float(found[name].std()) == pytest.approx(expected, rel=0.04), name
        assert float(found[name].abs().max()) == pytest.approx(math.sqrt(3) * expected, rel=0.04), name
    recurrent = found["lstm.0.w_hh"]
    torch.testing.assert_close(recurrent.t() @ recurrent, torch.eye(width), rtol=0, atol=1e-5)


def test_biases_are_zero_but_for_the_forget_gates_and_norms_are_the_identity() -> None:
    found = drawn(config(hidden_size=4, layer_norm_position="both", use_mup=True))
    for name, p in found.items():
        if "norm" in name:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif ".b_" in name:
            assert p.tolist() == [0] * 4 + [1] * 4 + [0] * 8, name
    assert not found["readout.bias"].any()


def test_the_same_numbers_are_drawn_from_the_same_seed_and_others_from_another() -> None:
    first, again, other = drawn(config()), drawn(config()), drawn(config(), seed=1)
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert not torch.equal(first["lstm.0.w_hh"], other["lstm.0.w_hh"])
