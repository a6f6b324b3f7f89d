"""Gated RNNs without BPTT: against the oracle, against themselves in packs, against slow loops, and on real text."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rnnq import tokens
from rnnq.config import parse
from rnnq.data import Corpus
from rnnq.errors import DataError, Diverged
from rnnq.families.base import Adam, State
from rnnq.families.dynamics import data, model
from rnnq.families.dynamics.config import FLAGS, DynamicsConfig
from rnnq.families.dynamics.model import Dynamics
from rnnq.optimizer import FusedAdam
from rnnq.train import Every, Member, Outcome, Point, Training, by_autograd, train
from tests.families import oracle

torch.set_num_threads(1)

CPU = torch.device("cpu")
CODES = [oracle.as_code(flags) for flags in oracle.every_flags()]
SOME = ["IFOSNLR", ".F.SN.R", ".....L.", "IF...L.", "..O.NL."]  # for what takes longer
SIZE, BATCH = 4, 3
Arrays = dict[str, Any]  # the oracle's: lists of floats


def config_of(code: str, **fields: Any) -> DynamicsConfig:
    return parse(DynamicsConfig, oracle.from_code(code) | fields)  # type: ignore[return-value]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A corpus of 8,000 bytes of every value, in which a byte says something about the next."""
    rng = np.random.default_rng(0)
    content = np.cumsum(rng.integers(0, 40, 8000)) % 256
    path = tmp_path / "text.bin"
    path.write_bytes(content.astype(np.uint8).tobytes())
    return str(path)


def curve_of(outcome: Outcome) -> list[Point]:
    """All points of a run, also those that its owner was handed on the way."""
    assert outcome.state is not None
    return [(name, step, value) for name, step, value in outcome.state["curve"]]


class Silent:
    """The owner of a run that wants nothing."""

    def record(self, step: int, points: Sequence[Point]) -> None: ...
    def save(self, step: int, points: Sequence[Point], state: Mapping[str, Any]) -> None: ...
    def leave_behind(self, points: Sequence[Point]) -> None: ...
    def wish(self) -> bool:
        return False


# ---------------------------------------------------------------------- from the oracle's names and layout to ours


def our_name(name: str) -> str:
    """layers.0.state.weight -> 0.state.weight"""
    return name.removeprefix("layers.")


def ours(arrays: Arrays, dtype: torch.dtype) -> dict[str, Tensor]:
    """The oracle's weights have a row per output, ours a column; our biases are rows; K = 1 goes before all."""
    found = {}
    for name, array in arrays.items():
        tensor = torch.tensor(array, dtype=dtype)
        found[our_name(name)] = (tensor.t().contiguous() if tensor.ndim == 2 else tensor[None])[None]
    return found


def theirs(params: Mapping[str, Tensor], names: Sequence[str]) -> Arrays:
    found = {}
    for name in names:
        tensor = params[our_name(name)][0].detach()
        found[name] = (tensor.t() if name.endswith("weight") else tensor[0]).tolist()
    return found


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert set(found) == set(expected)
    return max(float((found[name].detach().double() - expected[name].detach().double()).abs().max()) for name in found)


# ---------------------------------------------------------------------------------------------- conformance


@pytest.mark.parametrize("code", CODES)
def test_outputs_states_gradients_and_one_step_of_adam_are_the_oracles(code: str) -> None:
    """Three layers, from states that are not zero. Float64 to 1e-9 (of Adam's step, whose slope at a gradient near 0
    is lr / eps = 1e5: 1e-9 too, as our gradients differ by 1e-16); float32 to 1e-5, gradients and all."""
    flags, rng = oracle.from_code(code), oracle.random.Random(code)
    arrays = oracle.draw(flags, 3, SIZE, seed=code)
    states, before, after = oracle.some_batch(3, SIZE, BATCH, rng)
    logits = [oracle.forward(arrays, flags, 3, state, byte)[0] for state, byte in zip(states, before, strict=True)]
    loss, grads, new_states = oracle.loss_and_gradients(arrays, flags, 3, states, before, after)
    stepped, _ = oracle.adam_step(arrays, grads, {}, 1)

    config = config_of(code, n_layers=3, state_size=SIZE, batch_size=BATCH)
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        params = ours(arrays, dtype)
        old = list(torch.tensor(states, dtype=dtype).transpose(0, 1)[:, None])  # a (1, B, S) per layer
        found_logits, found_states = model.step(config, params, torch.tensor([before]), old)
        batch = model.Batch(config, torch.tensor([before]), torch.tensor([after]), False)
        carried = {f"state.{layer}": h for layer, h in enumerate(old)}
        found_loss, found_grads, found_carried = Dynamics().gradients(State(params, carried), batch)

        torch.testing.assert_close(
            found_logits[0].double(), torch.tensor(logits, dtype=torch.float64), atol=close, rtol=0
        )
        new = torch.stack([state[0] for state in found_states], 1)  # (B, layers, S)
        torch.testing.assert_close(new.double(), torch.tensor(new_states, dtype=torch.float64), atol=close, rtol=0)
        assert difference(found_carried, {f"state.{layer}": h for layer, h in enumerate(found_states)}) == 0
        assert abs(float(found_loss) - loss) < close

        present = {name: g for name, g in found_grads.items() if g is not None}
        expected = {name: g for name, g in grads.items() if g is not None}
        assert difference(present, ours(expected, torch.float64)) < close
        _check_adam(config, params, list(found_grads.values()), stepped, present, close)


def _check_adam(
    config: DynamicsConfig,
    params: dict[str, Tensor],
    grads: Sequence[Tensor | None],
    stepped: Arrays,
    present: Mapping[str, Tensor],
    close: float,
) -> None:
    """Parameters without gradient keep every bit. In float32 a gradient below 1e-4 is not compared: the first step of
    Adam is lr · g / (|g| + eps), nearly a sign, so that the rounding of a tiny g would show whole."""
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = FusedAdam(params, [Dynamics().optimizer(config)])
    optimizer.update(grads)
    expected = ours(stepped, torch.float64)
    for name, p in params.items():
        if name not in present:
            assert torch.equal(p, before[name])
            assert torch.equal(p.double(), expected[name].to(p.dtype).double())
            continue
        error = (p.detach().double() - expected[name]).abs()
        if p.dtype == torch.float32:
            error = error[present[name].abs() > 1e-4]
        assert float(error.max() if error.numel() else 0.0) < close, name


def some_state(config: DynamicsConfig, members: int, dtype: torch.dtype) -> tuple[State, model.Batch]:
    """Members with weights three times as wide as at first, states that are not zero, and bytes; all by chance."""
    torch.manual_seed(members)
    state = Dynamics().init([config.model_copy(update={"seed": seed}) for seed in range(members)])
    params = {name: (3 * p.to(dtype)).requires_grad_() for name, p in state.params.items()}
    carried = {name: torch.rand_like(c, dtype=dtype) * 2 - 1 for name, c in state.carried.items()}
    x, y = torch.randint(0, 256, (2, members, config.batch_size))
    return State(params, carried), model.Batch(config, x, y, False)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_gradients_in_closed_form_are_those_of_autograd(n_layers: int) -> None:
    """Every flag combination, two members. Relative to the largest of each array: in float64 a few roundings (1e-12);
    in float32 1e-5, as sums of some ten products are taken in another order. Where the closed form has none, autograd
    has none either, or the zeros that come of the two input gates' going through one product."""
    for code in CODES:
        config = config_of(code, n_layers=n_layers, state_size=SIZE, batch_size=BATCH)
        for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            state, batch = some_state(config, 2, dtype)
            losses, found, carried = Dynamics().gradients(state, batch)
            expected_losses, expected, expected_carried = by_autograd(Dynamics(), state, batch)

            torch.testing.assert_close(losses, expected_losses, rtol=close, atol=0)
            assert difference(carried, expected_carried) == 0
            assert list(found) == list(expected)
            for name, gradient in found.items():
                other = expected[name]
                if gradient is None:
                    assert other is None or not other.any(), f"{code}: {name}"
                    continue
                assert other is not None, f"{code}: {name}"
                assert gradient.shape == other.shape
                assert float((gradient - other).abs().max()) < close * float(other.abs().max()), f"{code}: {name}"
            assert not any(t is not None and t.requires_grad for t in (losses, *found.values(), *carried.values()))


def test_who_learns_nothing_is_who_the_spec_says() -> None:
    """Spec 1.5 in its own words, for all flag combinations and three depths."""
    for code, n_layers in itertools.product(CODES, (1, 2, 3)):
        config = config_of(code, n_layers=n_layers, state_size=SIZE, batch_size=2)
        _, grads, _ = Dynamics().gradients(*some_state(config, 1, torch.float32))

        silent = {name for name, grad in grads.items() if grad is None}
        names = list(oracle.shapes(oracle.from_code(code), n_layers, SIZE))
        expected = oracle.absent_by_the_spec(oracle.from_code(code), n_layers, names)
        assert silent == {our_name(name) for name in expected}, f"{code} L{n_layers}"


class Double(Dynamics):
    """The same in float64, to compare with the oracle over many steps."""

    def init(self, configs: Sequence[DynamicsConfig]) -> State:
        state = super().init(configs)
        params = {name: p.double() for name, p in state.params.items()}
        return State(params, {name: c.double() for name, c in state.carried.items()})


@pytest.mark.parametrize("code", SOME)
def test_steps_across_window_borders_are_the_oracles(text: str, code: str) -> None:
    """12 steps of the training loop itself, in windows of 5: states zeroed at steps 5 and 10, points every 3 steps."""
    config = config_of(
        code, n_layers=2, state_size=SIZE, batch_size=BATCH, window=6, steps=12, log_every=3, eval_every=100,
        corpus=text, lr=0.01,
    )  # fmt: skip
    [member] = members = [Member(config, Silent(), 12)]
    training = Training(Double(), members, CPU)
    names = list(oracle.shapes(oracle.from_code(code), 2, SIZE))
    arrays = theirs(training.params, names)
    moments: dict[str, Any] = {}
    average, curve = 3.0, []
    for step in range(12):
        index, position = divmod(step, 5)
        windows = data.training_windows(tokens.load(text, "bytes"), config, index).tolist()
        if position == 0:
            states = [oracle.zero_state(2, SIZE) for _ in range(BATCH)]
        loss, grads, states = oracle.loss_and_gradients(
            arrays, oracle.from_code(code), 2, states, windows[position], windows[position + 1]
        )
        average = 0.95 * average + 0.05 * loss
        arrays, moments = oracle.adam_step(arrays, grads, moments, step + 1, lr=0.01)
        if (step + 1) % 3 == 0:
            curve.append(("loss", step + 1, average))

        training.advance()

        found = torch.stack([training.carried[f"state.{layer}"][0] for layer in range(2)], 1)
        torch.testing.assert_close(found, torch.tensor(states, dtype=torch.float64), atol=1e-9, rtol=0)
    assert difference(training.params, ours(arrays, torch.float64)) < 1e-8
    assert [point[:2] for point in member.curve] == [point[:2] for point in curve]
    assert [point[2] for point in member.curve] == pytest.approx([point[2] for point in curve], abs=1e-9)


# --------------------------------------------------------------------------------------- sizes and first weights


def test_parameter_counts_are_those_of_the_spec() -> None:
    assert model.parameter_count(config_of(".F.SN.R", n_layers=2, state_size=256)) == 1_444_352
    assert model.parameter_count(config_of("IFOSN.R", n_layers=2, state_size=512)) == 9_182_976
    assert model.parameter_count(config_of("IFOSNLR", n_layers=3, state_size=512)) == 15_215_872


def test_the_432_configs_of_stage_1_have_the_counts_of_the_formula() -> None:
    counts = []
    for code, n_layers, size in itertools.product(CODES, (1, 2, 3), (32, 256)):
        if size == 256 or code[-1] == "R":
            counts.append(model.parameter_count(config_of(code, n_layers=n_layers, state_size=size)))
            assert counts[-1] == oracle.count_by_the_spec(oracle.from_code(code), n_layers, size)
    assert len(counts) == 432
    assert (min(counts), max(counts)) == (20_832, 3_872_512)


def test_the_arrays_have_as_many_elements_as_are_counted() -> None:
    config = config_of("IFOSNLR", n_layers=2, state_size=8)
    assert sum(p.numel() for p in model.draw_params(config).values()) == model.parameter_count(config)


def test_first_weights_fill_their_bounds_and_no_more() -> None:
    config = config_of("IFOSNLR", n_layers=2, state_size=32)
    params = model.draw_params(config)
    for name, (inputs, outputs) in model.shapes(config).items():
        bound = 1 / math.sqrt(inputs)
        weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        assert weight.shape == (inputs, outputs)
        assert bias.shape == (1, outputs)
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert 0.7 * bound < float(bias.abs().max()) <= bound
        assert float(weight.mean()) == pytest.approx(0, abs=4 * bound / math.sqrt(3 * weight.numel()))


def test_first_weights_are_those_that_the_librarys_layers_draw_in_the_order_of_the_spec() -> None:
    """nn.Linear reckons its bound in two square roots, so the last bit may differ."""
    config = config_of("IFOSN.R", n_layers=2, state_size=8, seed=5)
    params = model.draw_params(config)
    order = [name.removeprefix("layers.") for name in oracle.linears(oracle.from_code("IFOSN.R"), 2, 8)]
    assert list(model.shapes(config)) == order

    torch.manual_seed(5)
    for name, (inputs, outputs) in model.shapes(config).items():
        layer = nn.Linear(inputs, outputs)
        torch.testing.assert_close(params[f"{name}.weight"].t(), layer.weight.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(params[f"{name}.bias"][0], layer.bias.detach(), rtol=1e-6, atol=0)


def test_first_weights_of_a_member_are_its_own_whoever_trains_beside_it() -> None:
    configs = [config_of(".F.SN.R", state_size=8, batch_size=2, seed=seed) for seed in (3, 1, 4)]
    together = Dynamics().init(configs)
    torch.manual_seed(99)  # the global numbers have no say
    for k, config in enumerate(configs):
        alone = Dynamics().init([config])
        for name, p in together.params.items():
            assert torch.equal(p[k], alone.params[name][0])
        assert not any(c.any() for c in alone.carried.values())
    assert not torch.equal(together.params["embed.weight"][0], together.params["embed.weight"][1])


# ------------------------------------------------------------------------------------------------- in packs


class Pack:
    """Members trained side by side by hand, as a pack would be."""

    def __init__(self, configs: Sequence[DynamicsConfig], first_steps: Sequence[int]) -> None:
        self.family, self.configs, self.steps = Dynamics(), configs, list(first_steps)
        state = self.family.init(configs)
        self.params = state.params
        generator = torch.Generator().manual_seed(0)
        self.carried = {name: torch.rand(c.shape[1:], generator=generator).expand_as(c) for name, c in
                        state.carried.items()}  # fmt: skip
        self.optimizer = FusedAdam(self.params, [self.family.optimizer(config) for config in configs])

    def step(self) -> Tensor:
        batch = self.family.batch(self.configs, self.steps)
        losses, gradients, self.carried = self.family.gradients(State(self.params, self.carried), batch)
        self.optimizer.update(list(gradients.values()))
        self.steps = [step + 1 for step in self.steps]
        return losses

    def differs(self, k: int, single: Pack) -> list[str]:
        """What of member k is not to the bit what it is alone."""
        pairs = {f"carried {name}": (c, single.carried[name]) for name, c in self.carried.items()}
        for name, p in self.params.items():
            pairs[name] = p, single.params[name]
            pairs[f"moment of {name}"] = self.optimizer.second[name], single.optimizer.second[name]
        return [name for name, (mine, alone) in pairs.items() if not torch.equal(mine[k], alone[0])]


@pytest.mark.parametrize("code", CODES)
def test_a_member_has_the_bits_that_it_has_alone_with_any_flags(text: str, code: str) -> None:
    """20 steps of 2, 3 and 8 members, at a state of 32 and a batch of 32."""
    configs = [
        config_of(code, state_size=32, batch_size=32, window=12, corpus=text, seed=seed, lr=1e-3 * (1 + seed % 3))
        for seed in range(8)
    ]
    singles = {k: Pack([configs[k]], [0]) for k in (0, 2, 7)}
    alone = {k: torch.stack([single.step() for _ in range(20)]) for k, single in singles.items()}
    for members in (2, 3, 8):
        pack = Pack(configs[:members], [0] * members)
        losses = torch.stack([pack.step() for _ in range(20)])
        for k in [k for k in singles if k < members]:
            assert torch.equal(losses[:, k], alone[k][:, 0])
            assert pack.differs(k, singles[k]) == []


@pytest.mark.parametrize("code", SOME)
def test_three_members_of_a_pack_are_three_singles_to_the_bit(text: str, code: str) -> None:
    """At even shapes (batch and state a multiple of 32); each with its own seed, lr, and place in its window."""
    configs = [
        config_of(code, n_layers=2, state_size=32, batch_size=32, window=8, corpus=text, seed=seed, lr=lr)
        for seed, lr in ((0, 1e-3), (1, 1e-2), (2, 3e-4))
    ]
    starts = [0, 3, 5]
    pack = Pack(configs, starts)
    singles = [Pack([config], [start]) for config, start in zip(configs, starts, strict=True)]
    before = {name: p.clone() for name, p in pack.params.items()}
    for _ in range(10):
        losses = pack.step()
        assert torch.equal(losses, torch.cat([single.step() for single in singles]))
    for k, single in enumerate(singles):
        assert pack.differs(k, single) == []
    assert not torch.equal(before["head.weight"], pack.params["head.weight"])

    together = pack.family.evaluate(State(pack.params), configs, "val")
    for single, metrics in zip(singles, together, strict=True):
        assert single.family.evaluate(State(single.params), single.configs, "val") == [metrics]


def test_the_pack_key_is_equal_for_configs_whose_tensors_stack_and_whose_data_are_one() -> None:
    base = config_of(".F.SN.R", n_layers=2, state_size=8)
    same = [{"seed": 1}, {"lr": 0.1}, {"steps": 7}, {"log_every": 1}, {"eval_every": 1}]
    other = [{"state_size": 9}, {"n_layers": 3}, {"batch_size": 2}, {"window": 9}, {"corpus": "enwik8"}]
    other += [{flag: not getattr(base, flag)} for flag in FLAGS if flag != "use_new_state"]

    for change in same:
        assert base.model_copy(update=change).pack_key() == base.pack_key()
    keys = [base.model_copy(update=change).pack_key() for change in other]
    assert len({base.pack_key(), *keys}) == len(keys) + 1


# ---------------------------------------------------------------------------------------------- the optimiser


def test_the_fused_adam_is_torchs_adam() -> None:
    """Twenty steps of three members, each with its own lr, betas and eps; one parameter never has a gradient. Torch's
    own loop does the same operations in another order: 1e-6, some roundings of a float32."""
    generator = torch.Generator().manual_seed(0)
    specs = [Adam(1e-3), Adam(1e-2, (0.8, 0.99)), Adam(0.3, eps=1e-4)]
    start = {"a": torch.randn(3, 5, 7, generator=generator), "b": torch.randn(3, 1, 7, generator=generator)}
    start["still"] = torch.randn(3, 2, generator=generator)
    params = {name: p.clone() for name, p in start.items()}
    fused = FusedAdam(params, specs)
    plain = [{name: p[k].clone().requires_grad_() for name, p in start.items()} for k in range(3)]
    others = [
        torch.optim.Adam(plain[k].values(), lr=spec.lr, betas=spec.betas, eps=spec.eps) for k, spec in enumerate(specs)
    ]
    for _ in range(20):
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in params.items() if name != "still"}
        fused.update([grads.get(name) for name in params])
        for k, other in enumerate(others):
            for name, grad in grads.items():
                plain[k][name].grad = grad[k].clone()
            other.step()
    for name, p in params.items():
        expected = torch.stack([plain[k][name].detach() for k in range(3)])
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(params["still"], start["still"])


@pytest.mark.parametrize("layout", ["transposed", "one number seen many times"])
def test_the_fused_adam_reads_gradients_of_any_layout(layout: str) -> None:
    """Autograd gives such gradients for a weight used transposed, and for a plain sum; the kernel reads raw memory."""
    start = torch.randn(2, 3, 4)
    grad = torch.randn(2, 4, 3).transpose(1, 2) if layout == "transposed" else torch.ones(()).expand(2, 3, 4)
    assert not grad.is_contiguous()
    params, copied = {"w": start.clone()}, {"w": start.clone()}
    FusedAdam(params, [Adam(0.1)] * 2).update([grad])
    FusedAdam(copied, [Adam(0.1)] * 2).update([grad.clone(memory_format=torch.contiguous_format)])

    assert torch.equal(params["w"], copied["w"])


# --------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("size", [20, 100, 999, 1001, 12_345])
def test_the_corpus_is_split_90_5_5_in_order_with_nothing_lost(size: int) -> None:
    corpus = np.arange(size)
    found = tokens.Tokens("bytes", Corpus("x", "", corpus), "", corpus, np.ones(size, np.int64))
    parts = [data.part(found, split) for split in ("train", "val", "test")]

    assert np.array_equal(np.concatenate(parts), corpus)
    assert len(parts[1]) == len(parts[2]) == size * 5 // 100


def test_training_windows_are_a_pure_function_of_seed_and_index(text: str) -> None:
    corpus, config = tokens.load(text, "bytes"), config_of("....N.R", window=16, batch_size=8, corpus=text)
    first = data.training_windows(corpus, config, 0)
    torch.manual_seed(123)
    torch.rand(7)
    other_fields = config.model_copy(update={"lr": 0.5, "n_layers": 3, "state_size": 8, "use_forget_gate": True})

    assert first.shape == (16, 8)
    assert torch.equal(data.training_windows(corpus, config, 0), first)
    assert torch.equal(data.training_windows(corpus, other_fields, 0), first)
    assert not torch.equal(data.training_windows(corpus, config, 1), first)
    assert not torch.equal(data.training_windows(corpus, config.model_copy(update={"seed": 1}), 0), first)


def test_training_windows_are_pieces_of_the_train_part_and_reach_both_its_ends(tmp_path: Path) -> None:
    """Bytes that occur once each: position and value are one. 180 bytes of train hold 171 windows of 10."""
    content = bytes(range(200))
    held = np.frombuffer(content, np.uint8)
    corpus = tokens.Tokens("bytes", Corpus("x", "", held), "", held, np.ones(256, np.int64))
    config = config_of("....N.R", window=10, batch_size=500)
    windows = torch.cat([data.training_windows(corpus, config, index) for index in range(10)], 1)

    assert torch.equal(windows, windows[0] + torch.arange(10)[:, None])
    assert int(windows.min()) == 0
    assert int(windows.max()) == 179  # 180 and above are held out
    assert len(windows[0].unique()) == 171


def test_batches_walk_through_the_windows_byte_by_byte_and_in_any_order(text: str) -> None:
    config = config_of("....N.R", window=5, batch_size=3, corpus=text)
    family = Dynamics()
    for step in (0, 1, 2, 3, 4, 5, 11, 6, 0):
        index, position = divmod(step, 4)
        windows = data.training_windows(tokens.load(text, "bytes"), config, index)
        batch = family.batch([config], [step])
        assert torch.equal(batch.x, windows[position][None])
        assert torch.equal(batch.y, windows[position + 1][None])
        assert batch.fresh is (position == 0)


def test_held_out_windows_are_64_evenly_spread_from_the_first_byte_to_the_last(text: str) -> None:
    corpus = tokens.load(text, "bytes")
    for split, start in (("val", 7200), ("test", 7600)):
        windows = data.held_out_windows(corpus, 10, split)
        held_out = corpus.ids[start : start + 400]
        assert windows.shape == (10, 64)
        assert windows[:, 0].tolist() == held_out[:10].tolist()
        assert windows[:, -1].tolist() == held_out[-10:].tolist()
        starts = [round(i * 390 / 63 - 0.5 + 1e-9) for i in range(64)]  # the floor
        assert windows.t().tolist() == [held_out[at : at + 10].tolist() for at in starts]


def test_a_corpus_too_short_for_a_window_is_refused_and_the_hint_names_a_size_that_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(b"x" * 1979)
    config = config_of("....N.R", window=99, corpus=str(path))

    with pytest.raises(DataError, match="too few for window=99: val and test have 98 each") as caught:
        config.datasets()
    assert caught.value.hint is not None
    size = int("".join(c for c in caught.value.hint.split(" bytes")[0] if c.isdigit()))
    path.write_bytes(b"x" * size)
    assert config.datasets() == {str(path): hashlib.sha256(b"x" * size).hexdigest()}


@pytest.mark.parametrize("change", ["rewritten", "deleted"])
def test_a_corpus_that_is_changed_while_a_run_trains_does_not_change_the_run(text: str, change: str) -> None:
    config = config_of(
        "....N.R", state_size=8, batch_size=4, window=6, steps=20, log_every=5, eval_every=10, corpus=text
    )
    undisturbed = train(Dynamics(), config, Silent(), CPU, 20, Every(None, 1000))

    class Vandal(Silent):
        def record(self, step: int, points: Sequence[Point]) -> None:
            path = Path(text)
            path.unlink(missing_ok=True)
            if change == "rewritten":
                path.write_bytes(bytes(8000))

    disturbed = train(Dynamics(), config, Vandal(), CPU, 20, Every(None, 1000))

    timeless = [{k: v for k, v in o.summary.items() if k != "steps_per_s"} for o in (undisturbed, disturbed)]
    assert timeless[0] == timeless[1]
    assert undisturbed.state is not None
    assert disturbed.state is not None
    assert undisturbed.state["curve"] == disturbed.state["curve"]


def test_a_run_on_a_file_that_was_rewritten_is_measured_on_the_new_bytes(text: str) -> None:
    """In one process: nothing that was made of the old bytes is kept under the file's name."""
    config = config_of("....N.R", state_size=8, batch_size=4, window=6, steps=1, corpus=text)
    old = train(Dynamics(), config, Silent(), CPU, 1, Every(None, 1000)).summary
    Path(text).write_bytes(bytes(8000))
    new = train(Dynamics(), config, Silent(), CPU, 1, Every(None, 1000)).summary

    assert old["bigram_loss"] > 1
    assert new["bigram_loss"] < 0.01
    assert new["val_loss"] != old["val_loss"]


# ---------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("code", SOME)
def test_held_out_losses_are_those_of_a_slow_loop(text: str, code: str) -> None:
    """The oracle, one window and one byte at a time: with its state carried on, and with zeros before every byte."""
    config = config_of(code, n_layers=2, state_size=SIZE, window=5, batch_size=2, corpus=text)
    flags = oracle.from_code(code)
    state = Double().init([config])
    arrays = theirs(state.params, list(oracle.shapes(flags, 2, SIZE)))
    zero = oracle.zero_state(2, SIZE)
    for split in ("val", "test"):
        total, without, count = 0.0, 0.0, 0
        for window in data.held_out_windows(tokens.load(text, "bytes"), 5, split).t().tolist():
            h = zero
            for before, after in itertools.pairwise(window):
                logits, h, _ = oracle.forward(arrays, flags, 2, h, before)
                total += oracle.cross_entropy(logits, after)[0]
                without += oracle.cross_entropy(oracle.forward(arrays, flags, 2, zero, before)[0], after)[0]
                count += 1
        [found] = Double().evaluate(state, [config], split)
        assert count == 64 * 4
        assert found[f"{split}_loss"] == pytest.approx(total / count, abs=1e-12)
        assert found[f"{split}_bpb"] == pytest.approx(total / count / math.log(2), abs=1e-12)
        assert ("val_loss_no_state" in found) == (split == "val")
        if split == "val":
            assert found["val_loss_no_state"] == pytest.approx(without / count, abs=1e-12)
            assert abs(total - without) / count > 1e-4, "the states have no say, so the test says nothing"


def test_measuring_changes_nothing_of_the_run(text: str) -> None:
    config = config_of(".F.SN.R", state_size=8, batch_size=4, window=6, steps=20, log_every=5, corpus=text)
    often = train(Dynamics(), config.model_copy(update={"eval_every": 1}), Silent(), CPU, 20, Every(None, 1000))
    never = train(Dynamics(), config.model_copy(update={"eval_every": 100}), Silent(), CPU, 20, Every(None, 1000))

    assert often.state is not None
    assert never.state is not None
    for name, p in often.state["members"]["params"].items():
        assert torch.equal(p, never.state["members"]["params"][name])


def test_the_tables_losses_are_those_of_a_slow_count(tmp_path: Path) -> None:
    """Unigram and bigram counted on train, add-0.1 over 256 values, on the very byte pairs of val_loss."""
    content = (b"the cat sat on the mat; " * 60)[:1300] + bytes(range(100))
    path = tmp_path / "small.txt"
    path.write_bytes(content)
    train_part = content[:1260]
    corpus = tokens.load(str(path), "bytes")
    unigram, bigram, pairs = 0.0, 0.0, 0
    for window in data.held_out_windows(corpus, 7, "val").t().tolist():
        for before, after in itertools.pairwise(window):
            follows = [b for a, b in itertools.pairwise(train_part) if a == before]
            unigram -= math.log((train_part.count(after) + 0.1) / (len(train_part) + 25.6))
            bigram -= math.log((follows.count(after) + 0.1) / (len(follows) + 25.6))
            pairs += 1

    assert data.table_losses(corpus, 7) == pytest.approx((unigram / pairs, bigram / pairs), abs=1e-12)


def test_pairs_are_counted_across_the_borders_of_chunks() -> None:
    train_part = np.random.default_rng(0).integers(0, 256, (1 << 22) + 5, dtype=np.uint8)
    expected = np.zeros((256, 256), np.int64)
    np.add.at(expected, (train_part[:-1], train_part[1:]), 1)

    assert np.array_equal(data._count_pairs(train_part), expected)


def test_the_loss_of_a_run_is_its_lowest_average_from_step_50_on(text: str) -> None:
    """The average begins at 3.0, which can be below what the net will ever reach."""
    config = config_of("....N.R", corpus=text, window=6)
    curve = [("loss", 10, 3.1), ("loss", 49, 3.05), ("loss", 50, 3.9), ("val_loss", 50, 0.5), ("loss", 60, 4.0)]
    curve += [("loss", 70, 3.95), ("val_loss", 70, 0.7)]
    summary = Dynamics().summary(config, curve)

    assert summary["loss"] == 3.9
    assert summary["val_loss"] == 0.7  # the last, not the best
    assert summary["parameters"] == model.parameter_count(config)
    assert Dynamics().summary(config, curve[:2])["loss"] == 3.05  # a run of fewer steps has only these


def test_a_finished_run_has_every_metric_that_the_family_declares(text: str) -> None:
    config = config_of("....N.R", state_size=8, batch_size=4, window=6, steps=60, log_every=20, corpus=text)
    outcome = train(Dynamics(), config, Silent(), CPU, 60, Every(None, 1000))

    assert set(outcome.summary) == {metric.name for metric in config.metrics}
    assert outcome.summary["val_bpb"] == pytest.approx(outcome.summary["val_loss"] / math.log(2))
    assert [point[:2] for point in curve_of(outcome) if point[0] == "loss"] == [
        ("loss", 20),
        ("loss", 40),
        ("loss", 60),
    ]


def test_the_best_held_out_loss_is_kept_with_its_parameters(text: str) -> None:
    config = config_of(
        ".F.SN.R", state_size=8, batch_size=8, window=6, steps=90, log_every=10, eval_every=10, corpus=text, lr=1.0
    )
    outcome = train(Dynamics(), config, Silent(), CPU, 90, Every(None, 1000))
    measured = {step: value for name, step, value in curve_of(outcome) if name == "val_loss"}

    assert list(measured) == list(range(10, 91, 10))
    assert outcome.best is not None
    assert outcome.best["value"] == min(measured.values()) == measured[outcome.best["step"]]
    assert outcome.best["step"] != 90, "a best step at the end would prove nothing; an lr of 1 gets worse"
    [again] = Dynamics().evaluate(State(outcome.best["params"]), [config], "val")
    assert again["val_loss"] == outcome.best["value"]


# --------------------------------------------------------------------------------------- blowing up, and learning


def test_a_run_that_blows_up_is_stopped(text: str) -> None:
    config = config_of(
        "....N.R", state_size=16, batch_size=8, window=16, steps=2000, log_every=50, corpus=text, lr=10.0
    )
    with pytest.raises(Diverged, match="the training loss is"):
        train(Dynamics(), config, Silent(), CPU, 2000, Every(None, 1000))


def test_a_net_that_is_not_finite_is_never_handed_over_to_be_saved(text: str) -> None:
    config = config_of("....N.R", state_size=8, batch_size=2, window=6, corpus=text)
    [member] = members = [Member(config, Silent(), 100)]
    training = Training(Dynamics(), members, CPU)
    training.advance()
    assert training.state(member)["step"] == 1
    for tensor in (
        training.params["embed.bias"].data,
        training.carried["state.0"],
        training.optimizer.first["head.bias"],
    ):
        kept = tensor.clone()
        tensor.view(-1)[0] = math.inf
        with pytest.raises(Diverged, match="not finite at step 1"):
            training.state(member)
        tensor.copy_(kept)
    assert training.state(member)["step"] == 1


def test_a_small_net_learns_real_text_and_uses_its_state() -> None:
    """1,500 steps on the source of the standard library. Seeds alone move a loss by 0.05, so the margin is 0.1; it is
    0.5 here. Without its states the same net must do worse; it must beat the table of single bytes too."""
    config = config_of(
        ".F.SN.R", state_size=64, batch_size=32, window=256, steps=1500, eval_every=1500, log_every=50, lr=3e-3
    )
    summary = train(Dynamics(), config, Silent(), CPU, 1500, Every(None, 10_000)).summary

    assert summary["val_loss"] < summary["val_loss_no_state"] - 0.1
    assert summary["val_loss"] < summary["unigram_loss"] - 0.1
    assert summary["test_loss"] < summary["unigram_loss"] - 0.1
    assert summary["loss"] < 2.6
