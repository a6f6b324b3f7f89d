"""The family `scaling`: the language model, its streams, its read-out, and how it is measured."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rnnq import train
from rnnq.errors import InputError
from rnnq.families.base import State
from rnnq.families.scaling import counts, nets, readout, streams, text
from rnnq.families.scaling.config import ScalingConfig
from rnnq.families.scaling.model import Scaling
from rnnq.families.scaling.streams import Streams, Window

torch.set_num_threads(1)

NEVER = train.Every(None, 10**9)

SMALL: dict[str, Any] = {
    "tokens": "bytes", "hidden_size": 8, "batch_size": 4, "sequence_length": 16, "steps": 8, "streaming_reset_prob": 0.0
}  # fmt: skip


def drawn(config: ScalingConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of every shape, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in counts.shapes(config).items()}


def some_tokens(*shape: int, below: int = 256) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("position", ["input", "output", "both", None])
def test_the_net_is_the_one_that_ordinary_modules_make(position: str | None) -> None:
    norm = {"use_layer_norm": False} if position is None else {"layer_norm_position": position}
    config = ScalingConfig(**SMALL, **norm)
    params, tokens = drawn(config), some_tokens(4, 16)
    on_input, on_output = config.norms()

    x = nn.functional.embedding(tokens, params["embedding"])
    if on_input:
        x = nn.functional.layer_norm(x, (8,), params["embedding_norm.weight"], params["embedding_norm.bias"])
    for layer in range(2):
        lstm = nn.LSTM(8, 8, batch_first=True)
        names = zip(lstm.state_dict(), nets.WEIGHTS, strict=True)
        lstm.load_state_dict({theirs: params[f"lstm.{layer}.{mine}"] for theirs, mine in names})
        x = lstm(x)[0]
        if on_output:
            x = nn.functional.layer_norm(x, (8,), params[f"norm.{layer}.weight"], params[f"norm.{layer}.bias"])
    expected = nn.functional.linear(x, params["readout.weight"], params["readout.bias"])

    found, _ = nets.logits(config, params, tokens, {})
    torch.testing.assert_close(found.transpose(0, 1), expected)


def test_two_carried_windows_are_one_long_window() -> None:
    config = ScalingConfig(**SMALL)
    params, tokens = drawn(config), some_tokens(4, 32)

    whole, last = nets.logits(config, params, tokens, {})
    first, carried = nets.logits(config, params, tokens[:, :16], nets.zero_state(config, 4))
    second, after = nets.logits(config, params, tokens[:, 16:], carried)

    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(after, last)


# ------------------------------------------------------------------------------------------------------ the read-out


def plainly(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss of each position, and the gradients of the mean, by ordinary operations."""
    leaves = [part.detach().clone().requires_grad_() for part in (x, weight, bias)]
    each = nn.functional.cross_entropy(nn.functional.linear(*leaves), targets, reduction="none")
    return each.detach(), *torch.autograd.grad(each.mean(), leaves)


def in_chunks(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The same by readout.py, and the mean beside them."""
    leaves = [part.detach().clone().requires_grad_() for part in (x, weight, bias)]
    mean = readout.mean_loss(*leaves, targets)
    return readout.losses(x, weight, bias, targets), *torch.autograd.grad(mean, leaves), mean.detach()


def parts_of_a_readout(n: int, vocabulary: int, h: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, weight = (torch.randn(size, h, generator=generator, dtype=dtype) for size in (n, vocabulary))
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    return [x, weight, bias, torch.randint(0, vocabulary, (n,), generator=generator)]


SIZES = [(300, 7, 5), (129, 50257, 8), (128, 50257, 8), (1, 256, 3), (1025, 256, 4), (40, 3000, 16)]


@pytest.mark.parametrize(("n", "vocabulary", "h"), SIZES)
def test_the_loss_in_chunks_is_the_plain_loss(n: int, vocabulary: int, h: int) -> None:
    parts = parts_of_a_readout(n, vocabulary, h)
    each, *gradients = plainly(*parts)
    found, *found_gradients, mean = in_chunks(*parts)

    torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, each.mean(), rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(found_gradients, gradients, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("block", [1, 64, 1000, 1 << 20])
def test_chunks_and_blocks_may_end_anywhere(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readout.BLOCK, "cpu", block)
    monkeypatch.setattr(readout, "LEAST", 7)
    parts = parts_of_a_readout(30, 101, 6, torch.float64)
    torch.testing.assert_close(in_chunks(*parts)[:4], plainly(*parts), rtol=1e-10, atol=1e-12)


def test_logits_of_a_thousand_and_targets_that_nobody_expects_stay_finite() -> None:
    """The blocks' largest logits may be so far apart that one of them counts for nothing, the target's too."""
    x, weight, bias, targets = parts_of_a_readout(50, 5000, 4)
    weight[:2500] *= 300
    for mine, theirs in zip(in_chunks(x, weight, bias, targets), plainly(x, weight, bias, targets), strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_loss_is_scaled_with_what_is_behind_it() -> None:
    x, weight, bias, targets = parts_of_a_readout(20, 11, 3)
    weight.requires_grad_()
    [once] = torch.autograd.grad(readout.mean_loss(x, weight, bias, targets), weight)
    [thrice] = torch.autograd.grad(3 * readout.mean_loss(x, weight, bias, targets), weight)
    torch.testing.assert_close(thrice, 3 * once)


def test_autocast_makes_products_in_bfloat16_and_sums_in_full() -> None:
    parts = parts_of_a_readout(600, 1000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = in_chunks(*parts)
    full = in_chunks(*parts)

    assert [part.dtype for part in low] == [torch.float32] * 5
    assert not torch.equal(low[0], full[0])
    torch.testing.assert_close(low[0], full[0], rtol=0.02, atol=0.1)
    assert abs(float(low[4] - full[4])) < 0.01
    for mine, theirs in zip(low[1:4], full[1:4], strict=True):
        assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_what_is_all_but_certain_loses_nothing_and_teaches_nothing_in_bfloat16() -> None:
    """60.3 is no number of bfloat16, nor are weights and features: rounded here and not there they would differ."""
    x, weight, bias, targets = parts_of_a_readout(300, 5000, 8)
    weight, targets = weight * 0.3, torch.full_like(targets, 3)
    bias = torch.where(torch.arange(5000) == 3, 60.3, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        each, *gradients, mean = in_chunks(x, weight, bias, targets)

    of_x, of_weight, of_bias = (float(gradient.abs().max()) for gradient in gradients)
    assert not each.any() and float(mean) == 0.0
    assert max(of_x, of_bias) < 1e-6
    assert of_weight < 1e-3  # as exact as one product that was rounded


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"tie_embeddings": True, "use_mup": True},
                                    {"use_mup": True, "mup_rule": "seed"}])  # fmt: skip
def test_the_family_loses_what_the_plain_net_does(fields: dict[str, Any]) -> None:
    config = ScalingConfig(**SMALL, **fields, mup_base_width=4)
    params, read = drawn(config), some_tokens(4, 17)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    masks = {name: mask[0] for name, mask in streams.masks(config, 3).items()}
    carried = {name: t + 0.1 for name, t in nets.zero_state(config, 4).items()}
    window = Window(config, read[:, :-1], read[:, 1:], False, masks)

    plain, after = nets.loss(config, leaves, window.tokens, window.targets, carried, masks)
    found, next_carried = Scaling().loss(State({n: p[None] for n, p in leaves.items()}, carried), window)

    torch.testing.assert_close(found, plain[None])
    torch.testing.assert_close(next_carried, after)
    expected = torch.autograd.grad(plain, list(leaves.values()))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), list(leaves.values())), expected)
    assert next_carried["h.0"].requires_grad is next_carried["c.1"].requires_grad is False


def test_what_multiplies_the_logits_is_a_matter_of_the_parametrisation() -> None:
    def said(**fields: Any) -> tuple[Tensor, Tensor]:
        config = ScalingConfig(**SMALL, **fields)
        params = drawn(config)
        params["readout.bias"].zero_()
        return nets.logits(config, params, some_tokens(4, 16), {})[0], params["readout.bias"]

    plain, tied = said()[0], said(tie_embeddings=True)[0]
    torch.testing.assert_close(said(use_mup=True, mup_base_width=2)[0], plain)
    torch.testing.assert_close(said(use_mup=True, mup_base_width=2, mup_rule="seed")[0], 4 * plain)
    torch.testing.assert_close(said(use_mup=True, mup_base_width=2, tie_embeddings=True)[0], tied / 4)


# --------------------------------------------------------------------------------------------------------- streams


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """3,000 bytes that count up to 255 again and again: each byte says where it is."""
    path = tmp_path / "counted.bin"
    path.write_bytes(bytes(range(256)) * 12)
    return str(path)


def test_a_stream_goes_on_where_the_micro_batch_before_ended(corpus: str) -> None:
    """2,457 bytes are trained on: 4 streams of 614, each 38 windows of 16, and another pass."""
    config = ScalingConfig(**SMALL, data_path=corpus, gradient_accumulation_steps=3, num_epochs=2)
    read = Streams(config)
    batches = [read.at(step) for step in range(15)]
    columns = torch.cat([part for batch in batches for part in batch.tokens[:, :, :-1]], 1)
    targets = torch.cat([part for batch in batches for part in batch.tokens[:, :, 1:]], 1)

    assert read.windows == text.windows(config) == 38
    whole = torch.arange(38 * 16)[None] + 614 * torch.arange(4)[:, None]
    assert torch.equal(columns[:, : 38 * 16], whole % 256)
    assert torch.equal(columns[:, 38 * 16 :], whole[:, : 7 * 16] % 256)
    assert torch.equal(targets[:, : 38 * 16], (whole + 1) % 256)
    fresh = [at for at, is_fresh in enumerate(sum((batch.fresh for batch in batches), ())) if is_fresh]
    assert fresh == [0, 38]


def test_nothing_is_carried_to_where_a_pass_over_the_text_begins(corpus: str) -> None:
    """Only the first window of a pass; the one after it, of the same micro-batch, goes on."""
    config = ScalingConfig(**SMALL, data_path=corpus, gradient_accumulation_steps=1, tbptt_length=8)
    family = Scaling()
    first, second = family.micro_batches(family.batch([config], [0]))
    params = {name: p[None] for name, p in drawn(config).items()}
    zero = nets.zero_state(config, 4)
    other = {name: t + 1 for name, t in zero.items()}

    assert (first.fresh, second.fresh) == (True, False)
    assert torch.equal(family.loss(State(params, other), first)[0], family.loss(State(params, zero), first)[0])
    assert not torch.equal(family.loss(State(params, other), second)[0], family.loss(State(params, zero), second)[0])


def test_states_are_zeroed_now_and_then_as_the_seed_and_the_place_say(corpus: str) -> None:
    own = {**SMALL, "data_path": corpus, "gradient_accumulation_steps": 100, "num_epochs": 30}
    config, other = ScalingConfig(**own | {"streaming_reset_prob": 0.3}), ScalingConfig(**own, seed=1)
    fresh = [Streams(config).at(step).fresh for step in range(10)]

    assert fresh == [Streams(config).at(step).fresh for step in range(10)]
    assert 250 < sum(sum(each) for each in fresh) - 1000 // 38 < 350
    assert fresh[3] != Streams(other.model_copy(update={"streaming_reset_prob": 0.3})).at(3).fresh
    assert sum(Streams(other).at(3).fresh) in (2, 3)  # where a pass begins alone


def test_a_mask_is_of_one_window_and_of_no_moment(corpus: str) -> None:
    """Half of the numbers are dropped: each mask is one row a stream, which all moments of its window share."""
    config = ScalingConfig(
        **SMALL, data_path=corpus, input_dropout=0.5, hidden_dropout=0.0, output_dropout=0.25, tbptt_length=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    batch = Streams(config).at(5)
    windows = Scaling().micro_batches(batch)

    assert len(windows) == 8
    assert {name: tuple(mask.shape) for name, mask in windows[0].masks.items()} == {"input": (4, 8), "output": (4, 8)}
    assert sorted(batch.masks["input"].unique().tolist()) == [0.0, 2.0]
    assert abs(float(batch.masks["output"].mean()) - 1) < 0.1
    kinds = {tuple(w.masks["input"].flatten().tolist()) for w in windows}
    assert len(kinds) == 8
    again, other = Streams(config).at(5), Streams(config).at(6)
    assert torch.equal(again.masks["input"], batch.masks["input"])
    assert not torch.equal(other.masks["input"], batch.masks["input"])

    x, _ = nets.features(config, drawn(config), windows[0].tokens, {}, windows[0].masks)
    dropped = windows[0].masks["output"] == 0
    assert torch.equal((x == 0).all(0), dropped)
    assert torch.equal((x == 0).any(0), dropped)


def gradients_of_step(config: ScalingConfig, step: int = 1) -> tuple[Any, ...]:
    family = Scaling()
    params = {name: p[None].requires_grad_() for name, p in drawn(config).items()}
    state = State(params, family.init([config]).carried)
    return train.gradients_of(family, state, family.batch([config], [step]))


NO_DROPOUT: dict[str, Any] = {"input_dropout": 0.0, "hidden_dropout": 0.0, "output_dropout": 0.0}


def test_shorter_windows_lose_the_same_and_learn_over_shorter_times(corpus: str) -> None:
    whole = ScalingConfig(**SMALL, **NO_DROPOUT, data_path=corpus, gradient_accumulation_steps=2)
    losses, gradients, carried = gradients_of_step(whole)
    same = gradients_of_step(whole.model_copy(update={"tbptt_length": 16}))
    short = gradients_of_step(whole.model_copy(update={"tbptt_length": 4}))

    assert torch.equal(same[0], losses)
    assert all(torch.equal(same[1][name], g) for name, g in gradients.items())
    torch.testing.assert_close(short[0], losses)
    torch.testing.assert_close(short[2], carried)
    torch.testing.assert_close(short[1]["readout.weight"], gradients["readout.weight"])
    assert (short[1]["lstm.0.w_hh"] - gradients["lstm.0.w_hh"]).abs().max() > 1e-4


def test_accumulated_micro_batches_are_one_long_one_without_the_gradient_between_them(corpus: str) -> None:
    accumulated = ScalingConfig(**SMALL, **NO_DROPOUT, data_path=corpus, gradient_accumulation_steps=4)
    long = accumulated.model_copy(update={"sequence_length": 64, "tbptt_length": 16, "gradient_accumulation_steps": 1})
    for mine, theirs in zip(gradients_of_step(accumulated), gradients_of_step(long), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_that_share_the_streams_make_the_step_of_one(corpus: str, ranks: int) -> None:
    config = ScalingConfig(**SMALL, data_path=corpus, gradient_accumulation_steps=2, tbptt_length=8)
    family = Scaling()
    params = {name: p[None].requires_grad_() for name, p in drawn(config).items()}
    carried = {name: t + 0.1 * torch.arange(4.0)[None, :, None] for name, t in family.init([config]).carried.items()}
    batch = family.batch([config], [3])
    whole = train.gradients_of(family, State(params, carried), batch)

    shares = [
        train.gradients_of(
            family, State(params, family.carried_share(carried, rank, ranks)), family.share(batch, rank, ranks)
        )
        for rank in range(ranks)
    ]
    torch.testing.assert_close(sum(losses for losses, _, _ in shares) / ranks, whole[0])
    for name in params:
        torch.testing.assert_close(sum(found[name] for _, found, _ in shares) / ranks, whole[1][name])
    torch.testing.assert_close(family.joined([after for _, _, after in shares]), whole[2])


def test_streams_that_cannot_be_shared_evenly_are_refused(corpus: str) -> None:
    config = ScalingConfig(**SMALL, data_path=corpus)
    with pytest.raises(InputError, match="batch_size=4 cannot be parted among 3 processes"):
        Scaling().share(Scaling().batch([config], [0]), 0, 3)


# ------------------------------------------------------------------------------------------------------- measuring


def test_every_held_out_token_but_the_first_counts_once(tmp_path: Path) -> None:
    """A net that says the same always: its loss is the mean over the very tokens, the tail included."""
    path = tmp_path / "text"
    content = bytes((7 * i * i + i // 3) % 91 for i in range(20_000))
    path.write_bytes(content)
    config = ScalingConfig(**SMALL, data_path=str(path), num_layers=1)
    bias = torch.randn(256, generator=torch.Generator().manual_seed(5))
    params = {name: torch.zeros_like(p)[None] for name, p in drawn(config).items()} | {"readout.bias": bias[None]}

    [val], [test] = (Scaling().evaluate(State(params), [config], split) for split in ("val", "test"))

    likely = torch.log_softmax(bias.double(), 0)
    for found, first, last in ((val, 16_000, 18_000), (test, 18_000, 20_000)):
        split = "val" if found is val else "test"
        said = torch.tensor(list(content[first + 1 : last]))
        assert found[f"{split}_loss"] == pytest.approx(-float(likely[said].mean()), rel=1e-6)
        assert found[f"{split}_loss_per_byte"] == pytest.approx(found[f"{split}_loss"])
        assert found[f"{split}_ppl"] == pytest.approx(math.exp(found[f"{split}_loss"]))


def test_a_held_out_part_is_read_in_order_and_what_is_read_is_remembered(tmp_path: Path) -> None:
    """32 streams of 300 tokens: windows of 128 that carry their states are one long window."""
    path = tmp_path / "text"
    path.write_bytes(bytes((i * i) % 251 for i in range(96_010)))
    config = ScalingConfig(**SMALL, data_path=str(path), fixed_val_tokens=9601)
    params = drawn(config)
    held = streams.held_out(config, "val")

    [found] = Scaling().evaluate(State({n: p[None] for n, p in params.items()}), [config], "val")

    assert held.tokens.shape == (32, 300)
    assert found["val_loss"] == pytest.approx(float(nets.loss(config, params, held.tokens, held.targets, {})[0]))


@pytest.mark.parametrize("fields", [{"max_characters": 1500}, {"steps": 1}, {"batch_size": 2}, {"hidden_size": 4},
                                    {"sequence_length": 8}, {"use_mup": True}])  # fmt: skip
def test_held_out_text_is_a_matter_of_the_corpus_alone(corpus: str, fields: dict[str, Any]) -> None:
    one = streams.held_out(ScalingConfig(**SMALL, data_path=corpus), "val")
    other = streams.held_out(ScalingConfig(**SMALL | fields, data_path=corpus), "val")
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.weights, other.weights)
    assert (one.count, one.bytes) == (other.count, other.bytes)


def test_a_loss_beyond_all_numbers_has_an_infinite_perplexity(corpus: str) -> None:
    config = ScalingConfig(**SMALL, data_path=corpus)
    params = {name: p[None] * 1e4 for name, p in drawn(config).items()}
    [found] = Scaling().evaluate(State(params), [config], "val")
    assert found["val_loss"] > 700
    assert found["val_ppl"] == math.inf


# -------------------------------------------------------------------------------------------------------- training


def test_a_small_model_learns_more_than_how_often_each_byte_occurs() -> None:
    """The unigram entropy of Python's argparse is 3.2 nats a byte."""
    counted = np.bincount(np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8)).astype(float)
    unigram = -float(sum(n * math.log(n / counted.sum()) for n in counted if n) / counted.sum())
    config = ScalingConfig(
        data_path=argparse.__file__, tokens="bytes", hidden_size=32, num_layers=1, sequence_length=32, **NO_DROPOUT,
        gradient_accumulation_steps=1, steps=200, num_epochs=9, learning_rate=0.02, fixed_val_tokens=4000,
    )  # fmt: skip
    outcome = train.train(Scaling(), config, train.NoDesk(), torch.device("cpu"), 200, NEVER)

    assert outcome.summary["parameters"] == counts.parameters(config)
    assert outcome.summary["tokens"] == 200 * 32 * 32
    assert outcome.summary["flops"] == outcome.summary["tokens"] * counts.flops_per_token(config)
    assert outcome.summary["val_loss"] < unigram - 0.5
    assert outcome.summary["test_loss"] < unigram - 0.4


def test_bfloat16_learns_as_well() -> None:
    fields: dict[str, Any] = {
        "data_path": argparse.__file__,
        "tokens": "bytes",
        "sequence_length": 16,
        "steps": 40,
        "num_layers": 1,
    }
    fields |= {"gradient_accumulation_steps": 1, "learning_rate": 0.02, "fixed_val_tokens": 2000} | NO_DROPOUT
    found = [
        train.train(Scaling(), ScalingConfig(**fields, use_amp=low), train.NoDesk(), torch.device("cpu"), 40, NEVER)
        for low in (False, True)
    ]
    full, low = (outcome.summary["val_loss"] for outcome in found)
    assert low != full
    assert low == pytest.approx(full, abs=0.05)


@pytest.mark.parametrize("norm", [True, False])
def test_what_bfloat16_makes_is_kept_in_full(corpus: str, norm: bool) -> None:
    config = ScalingConfig(**SMALL, data_path=corpus, use_amp=True, use_layer_norm=norm)
    losses, gradients, carried = gradients_of_step(config)
    assert {part.dtype for part in (losses, *gradients.values(), *carried.values())} == {torch.float32}


def test_a_model_writes_what_it_finds_likely(corpus: str) -> None:
    """A read-out that says 'b' after anything; and one that depends on the prompt and the seed."""
    config = ScalingConfig(**SMALL, data_path=corpus)
    params = drawn(config)
    params["readout.bias"][ord("b")] = 50
    state = State({name: p[None] for name, p in params.items()})
    assert Scaling().sample(state, [config], [""], 5, 0.0, [0]) == [b"bbbbb"]

    params["readout.bias"][ord("b")] = 0
    params["embedding"] *= 30
    texts = [
        Scaling().sample(state, [config], [prompt], 30, 1.0, [seed])[0]
        for prompt, seed in [("x", 1)] * 2 + [("x", 2), ("y", 1)]
    ]
    assert texts[0] == texts[1]
    assert len({*texts}) == 3
    assert len(texts[0]) == 30
