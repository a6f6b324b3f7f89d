"""Gated RNNs on tokens that are not bytes: the same net with V rows, measured per token and per byte."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rnnq import db, sample, tokens
from rnnq.config import metric_rows, parse
from rnnq.data import Corpus
from rnnq.errors import DataError, InputError
from rnnq.families.base import State
from rnnq.families.dynamics import data, figures, model
from rnnq.families.dynamics.config import DynamicsConfig
from rnnq.families.dynamics.model import Dynamics
from rnnq.sample import Request
from rnnq.tokens import Tokens
from rnnq.train import Every, by_autograd, train
from tests.families.test_dynamics import CPU, Silent, config_of
from tests.processes import Study

torch.set_num_threads(1)

LINE = b"the cat sat on the mat, and the rat sat on the cat: na\xc3\xafve \xff\n"
TEXT = b"".join(LINE.replace(b"cat", word) for word in (b"cat", b"dog", b"bird", b"cat", b"ox")) * 30


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_bytes(TEXT)
    return str(tmp_path / "text")


def small(text: str, kind: str = "bpe:300", **fields: Any) -> DynamicsConfig:
    same = {"state_size": 8, "batch_size": 4, "window": 8, "corpus": text, "tokens": kind}
    return config_of(fields.pop("code", ".F.SN.R"), **(same | fields))


def some_state(config: DynamicsConfig, members: int) -> tuple[State, model.Batch]:
    torch.manual_seed(5)
    state = Dynamics().init([config.model_copy(update={"seed": seed}) for seed in range(members)])
    params = {name: (3 * p.double()).requires_grad_() for name, p in state.params.items()}
    carried = {name: torch.rand_like(c, dtype=torch.float64) for name, c in state.carried.items()}
    x, y = torch.randint(0, config.vocab_size(), (2, members, config.batch_size))
    return State(params, carried), model.Batch(config, x, y, False)


# -------------------------------------------------------------------------------------------------------- the net


@pytest.mark.parametrize("kind", ["bpe:300", "gpt2"])
def test_the_net_has_a_row_for_each_token_and_gradients_in_closed_form_are_those_of_autograd(kind: str) -> None:
    config = small("nowhere", kind, code="IFOSNLR", n_layers=2, state_size=4)
    size = tokens.vocab_size(kind)
    state, batch = some_state(config, 2)
    assert state.params["embed.weight"].shape == (2, size, 4)
    assert state.params["head.weight"].shape == (2, 4, size)
    losses, found, _ = Dynamics().gradients(state, batch)
    expected_losses, expected, _ = by_autograd(Dynamics(), state, batch)

    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    for name, gradient in found.items():
        other = expected[name]
        assert gradient is not None and other is not None
        assert float((gradient - other).abs().max()) < 1e-12 * float(other.abs().max()), name
    assert model.parameter_count(config) == sum(p[0].numel() for p in state.params.values())


def test_bytes_are_as_they_were_and_other_tokens_are_another_run(text: str) -> None:
    """Fingerprints of bytes are held by fingerprints.json."""
    plain, learnt = small(text, "bytes"), small(text)
    assert plain.label() == ".F.SN.R L1 S8"
    assert learnt.label() == ".F.SN.R L1 S8 bpe:300"
    assert plain.pack_key() == f".F.SN.R/1/8/4/8/{text}"
    assert learnt.pack_key() == f".F.SN.R/1/8/4/8/{text}/bpe:300"
    assert plain.datasets() == {text: hashlib.sha256(TEXT).hexdigest()}
    assert learnt.datasets() == plain.datasets() | {f"{text} as bpe:300": tokens.load(text, "bpe:300").sha256}
    with pytest.raises(InputError, match="tokens='gpt' is none of gpt2, bytes, bpe:N; use_new_state and use_old_state"):
        parse(DynamicsConfig, {"tokens": "gpt", "use_new_state": False})


# -------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("kind", ["bytes", "bpe:300", "gpt2"])
def test_parts_are_the_same_text_for_all_kinds_of_tokens_but_for_one_that_a_border_cuts(text: str, kind: str) -> None:
    found = tokens.load(text, kind)
    held_out = len(TEXT) * 5 // 100
    places = [0, len(TEXT) - 2 * held_out, len(TEXT) - held_out, len(TEXT)]
    longest = int(found.lengths.max())
    for split, (first, last) in zip(("train", "val", "test"), itertools.pairwise(places), strict=True):
        part = found.decode(data.part(found, split))
        at = TEXT.find(part, first)
        assert first <= at < first + longest
        assert last - longest < at + len(part) <= last


def test_a_window_is_counted_in_tokens(text: str) -> None:
    config = small(text, window=11)
    found = tokens.load(text, "bpe:300")
    windows = data.training_windows(found, config, 3)
    train_part = found.decode(data.part(found, "train"))
    assert windows.shape == (11, 4)
    assert all(found.decode(window) in train_part for window in windows.t())
    held = data.held_out_windows(found, 11, "val")
    assert held.shape == (11, 64)
    size = sum(len(found.decode(window[1:])) for window in held.t())
    assert data.bytes_per_token(found, 11, "val") == size / 640 > 1.5
    assert data.bytes_per_token(tokens.load(text, "bytes"), 11, "val") == 1.0


def test_a_text_with_too_few_tokens_for_a_window_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"tokens \(bpe:300\) are too few for window=400: val and test have \d+ and"):
        small(text, window=400).datasets()
    assert small(text, "bytes", window=400).datasets()


@pytest.mark.parametrize("large", [False, True])
def test_the_tables_losses_are_those_of_a_slow_count(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table of all pairs, and, above a size, without."""
    monkeypatch.setattr(data, "SMALL", 5 if large else 1024)
    ids = np.random.default_rng(1).integers(0, 290, 6000).astype(np.uint16)
    ids[1::2] = 7  # the last of train, too, which nothing follows
    lengths = np.ones(300, np.int64)
    found = Tokens("bpe:300", Corpus("x", "", np.zeros(6000, np.uint8)), "", ids, lengths)
    train_part, windows = data.part(found, "train").tolist(), data.held_out_windows(found, 6, "val").t().tolist()
    unigram, bigram, count = 0.0, 0.0, 0
    for window in windows:
        for before, after in itertools.pairwise(window):
            follows = [b for a, b in itertools.pairwise(train_part) if a == before]
            unigram -= math.log((train_part.count(after) + 0.1) / (len(train_part) + 30))
            bigram -= math.log((follows.count(after) + 0.1) / (len(follows) + 30))
            count += 1
    data.table_losses.cache_clear()
    assert data.table_losses(found, 6) == pytest.approx((unigram / count, bigram / count), abs=1e-12)


def test_wanted_pairs_are_counted_across_the_borders_of_chunks() -> None:
    ids = np.random.default_rng(0).integers(0, 2000, (1 << 22) + 5).astype(np.uint16)
    before, after = ids[[0, 1, (1 << 22) - 1, 1 << 22, -2]], ids[[1, 2, 1 << 22, (1 << 22) + 1, -1]]
    single, pairs = data._counts(ids, 2000, before, after)
    follows = ids[:-1].astype(np.int64) * 2000 + ids[1:]
    assert np.array_equal(single, np.bincount(ids, minlength=2000))
    assert pairs.tolist() == [
        int((follows == a * 2000 + b).sum()) for a, b in zip(before.astype(int), after, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ what is measured


def test_a_run_is_measured_per_token_and_per_byte(text: str) -> None:
    config = small(text, steps=40, log_every=20, eval_every=20)
    summary = train(Dynamics(), config, Silent(), CPU, 40, Every(None, 1000)).summary

    assert set(summary) == {metric.name for metric in config.measured()}
    for split in ("val", "test"):
        size = data.bytes_per_token(tokens.load(text, "bpe:300"), 8, split)
        assert summary[f"{split}_loss_per_byte"] == summary[f"{split}_loss"] / size
        assert summary[f"{split}_bpb"] == pytest.approx(summary[f"{split}_loss_per_byte"] / math.log(2))
    assert summary["bigram_loss"] < summary["unigram_loss"]


def test_uniform_guesses_of_tokens_cost_what_their_number_says(text: str) -> None:
    """A net whose read-out is zero: ln V nats a token."""
    config = small(text)
    state = Dynamics().init([config])
    state.params["head.weight"].zero_()
    state.params["head.bias"].zero_()
    [found] = Dynamics().evaluate(state, [config], "val")
    size = data.bytes_per_token(tokens.load(text, "bpe:300"), 8, "val")
    assert found["val_loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert found["val_loss_no_state"] == pytest.approx(math.log(300), rel=1e-6)
    assert found["val_bpb"] == pytest.approx(math.log2(300) / size, rel=1e-6)


def test_the_loss_without_states_is_the_same_with_a_table_of_all_tokens_and_without(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(text, code="IFOSNLR", n_layers=2)
    state, _ = some_state(config, 2)
    params = {name: p.detach() for name, p in state.params.items()}
    windows = data.held_out_windows(tokens.load(text, "bpe:300"), 8, "val")
    table = Dynamics._no_state_losses(config, params, windows)
    monkeypatch.setattr(data, "SMALL", 5)
    torch.testing.assert_close(Dynamics._no_state_losses(config, params, windows), table, rtol=1e-12, atol=0)


def units(configs: Sequence[DynamicsConfig]) -> dict[str, str]:
    return {row["name"]: row["unit"] for row in metric_rows(DynamicsConfig, configs)}


def test_a_stage_has_the_units_of_its_runs() -> None:
    plain, learnt = DynamicsConfig(), DynamicsConfig(tokens="bpe:300")
    assert metric_rows(DynamicsConfig, [plain, plain]) == metric_rows(DynamicsConfig)
    assert "val_loss_per_byte" not in units([plain])
    assert units([plain])["val_loss"] == "nats/byte"
    assert (units([learnt])["val_loss"], units([learnt])["val_bpb"]) == ("nats/token", "bits/byte")
    assert units([learnt])["val_loss_per_byte"] == "nats/byte"
    both = units([plain, learnt, plain])
    assert (both["loss"], both["val_loss_per_byte"]) == ("nats/byte or nats/token", "nats/byte")
    primary = [row["name"] for row in metric_rows(DynamicsConfig, [learnt]) if row["primary"]]
    assert primary == ["loss"]


def test_the_figure_of_memory_compares_runs_on_different_tokens_per_byte() -> None:
    runs = pd.DataFrame(
        {
            "stage": "s", "state": "done", "id": [1, 2], "label": ["a", "b"], "loss": [2.0, 6.0],
            "val_loss": [2.0, 6.0], "val_loss_no_state": [2.5, 8.0], "unigram_loss": [3.0, 9.0],
            "bigram_loss": [2.2, 7.0], "val_loss_per_byte": [math.nan, 1.5],
        }
    )  # fmt: skip
    judged = figures.judge(runs)
    assert judged["id"].tolist() == [2, 1]
    assert judged["val_loss"].tolist() == [1.5, 2.0]
    assert judged["bigram_loss"].tolist() == [1.75, 2.2]
    assert judged["passes_bound"].tolist() == [True, False]
    curves = pd.DataFrame({"run": [1, 2, 2], "name": "val_loss", "step": [5, 5, 10], "value": [2.0, 8.0, 6.0]})
    assert figures._curves_of(judged, curves)["val_loss"].tolist() == [2.0, 2.0, 1.5]


# --------------------------------------------------------------------------------------------------- a whole study

DEFINITION = """
import rnnq
stage = rnnq.stage(
    "learnt", "dynamics", rnnq.grid(tokens=["bpe:270"]),
    base=dict(state_size=32, batch_size=16, window=20, steps=600, eval_every=300, lr=1e-2, corpus="abc.txt"),
)
"""


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as study:
        study.environment["RNNQ_CACHE"] = str(tmp_path / "cache")
        (study.folder / "abc.txt").write_text("abac\n" * 900)
        yield study


def test_a_run_on_learnt_tokens_is_trained_and_writes(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """`abac\\n` is learnt as one token or two, so that a few of them are the whole text."""
    monkeypatch.chdir(study.folder)
    study.rnnq("init", study.define(DEFINITION))
    study.rnnq("worker", "--device", "cpu")
    found = sample.sample(study.engine, 1, Request("abac\n", 12, temperature=0), CPU, study.folder / "defs")
    assert isinstance(found.written, bytes)
    assert len(found.written) > 12
    assert ("abac\n" * 30).encode().startswith(found.written)

    with db.reading(study.engine) as connection:
        stage = connection.exec_driver_sql("SELECT metrics, data FROM stages").one()
    assert {row["name"]: row["unit"] for row in json.loads(stage.metrics)}["val_loss"] == "nats/token"
    assert list(json.loads(stage.data)) == ["abc.txt", "abc.txt as bpe:270"]

    (study.folder / "abc.txt").write_text("abcd\n" * 900)
    with pytest.raises(DataError, match=r"abc\.txt has sha256 .* here; run 1 was trained with"):
        sample.sample(study.engine, 1, Request("a", 3), CPU, study.folder / "defs")
