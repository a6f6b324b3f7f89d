"""The models of fsm: their sizes, their gradients, what their metrics mean, and how their runs end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rnnq import families
from rnnq.config import check, parse
from rnnq.errors import InputError
from rnnq.families import denormals
from rnnq.families.base import Parent, State
from rnnq.families.fsm import baselines, batches, data, evaluation, gated, loops
from rnnq.families.fsm.config import Config
from rnnq.families.fsm.data import FIRST_ACTION, N_ACTIONS
from rnnq.families.fsm.model import NETS, Automata, draw, hidden_states, parameter_count
from rnnq.train import Every, Outcome, Point, train
from tests.families.test_contract import CPU, NEVER, Notebook

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "states": 3, "actions": 2, "demos": 2, "demo_length": 6, "query_length": 5, "n_train": 40, "n_val": 30,
    "n_test": 20, "d_model": 8, "d_ff": 12, "n_heads": 2, "batch_size": 4, "steps": 20,
}  # fmt: skip


def small(**fields: Any) -> Config:
    made = parse(Config, SMALL | fields)
    assert isinstance(made, Config)
    return made


def trained(config: Config, every: Every = NEVER) -> Outcome:
    return train(Automata(), config, Notebook(every), CPU, config.steps_total(), every)


def curve_of(outcome: Outcome) -> list[Point]:
    assert outcome.state is not None
    return [tuple(point) for point in outcome.state["curve"]]  # type: ignore[misc]


def refused(**fields: Any) -> str:
    made, problems = check(Config, SMALL | fields)
    assert made is None
    return "; ".join(problems)


# --------------------------------------------------------------------------------------------------------- configs


def test_a_run_is_given_either_epochs_or_steps() -> None:
    assert "neither epochs nor steps" in refused(steps=None)
    assert "both" in refused(epochs=3)
    assert small(steps=None, epochs=3, n_train=41).steps_total() == 3 * 11, "nothing is dropped"
    assert small(model="solver", steps=None).steps_total() == 0


def test_all_that_is_wrong_with_a_config_is_said_at_once() -> None:
    said = refused(model="transformer", d_model=6, steps=None, head="states", permute_tokens=True)
    assert "neither epochs" in said
    assert "no multiple of 2 n_heads=4" in said
    assert "no class for most" in said
    assert "bidirectional" in refused(bidirectional=True), "it would see the answer"


def test_an_epoch_lies_between_two_evaluations_unless_it_is_said_otherwise() -> None:
    assert small().evaluation_interval() == 10
    assert small(eval_every=7).evaluation_interval() == 7
    assert [step for name, step, _ in curve_of(trained(small(open_samples=0))) if name == "val_loss"] == [10, 20]


PUBLISHED = [
    ({"model": "lstm"}, 1_059_328),
    ({"model": "lstm", "states": 3}, 1_058_816),
    ({"model": "lstm", "head": "all"}, 1_060_096),
    ({"model": "lstm", "n_layers": 1}, 532_992),
    ({"model": "lstm", "d_model": 128}, 267_520),
    ({"model": "lstm", "d_model": 64}, 68_224),
    ({"model": "lstm", "d_model": 64, "states": 3}, 68_096),
    ({"model": "lstm", "d_model": 64, "head": "all"}, 68_416),
    ({"model": "rnn_seed"}, 269_312),
    ({"model": "rnn_seed", "n_layers": 8}, 1_057_280),
    ({"model": "rnn", "n_layers": 8}, 1_059_328),
    ({"model": "rnn_seed", "d_model": 64}, 18_176),
    ({"model": "rnn_seed", "d_model": 64, "n_layers": 4}, 34_688),
    ({"model": "rnn", "d_model": 128}, 69_376),
    ({"model": "rnn_seed", "n_layers": 5}, 663_296),
    ({"model": "rnn_seed", "d_model": 1024}, 4_222_976),
    ({"model": "gru"}, 796_160),
    ({"model": "transformer", "d_model": 32, "d_ff": 64, "head": "all"}, 18_088),
    ({"model": "transformer", "d_model": 64, "d_ff": 64, "head": "all"}, 52_424),
    ({"model": "transformer", "d_model": 64, "d_ff": 128, "head": "all"}, 68_936),
    ({"model": "transformer", "d_model": 256, "n_heads": 8, "head": "all"}, 1_062_152),
]


@pytest.mark.parametrize(("fields", "count"), PUBLISHED, ids=lambda value: str(value)[:60])
def test_models_have_the_published_number_of_parameters(fields: dict[str, Any], count: int) -> None:
    config = parse(Config, {"head": "states", "epochs": 1} | fields)
    assert parameter_count(config) == count  # type: ignore[arg-type]


def test_parameters_are_drawn_as_the_published_study_draws_them() -> None:
    lstm = draw(parse(Config, {"model": "lstm", "d_model": 64, "epochs": 1}))  # type: ignore[arg-type]
    torch.testing.assert_close(lstm["1.state"].t() @ lstm["1.state"], torch.eye(64), atol=1e-5, rtol=0)
    assert lstm["0.in"].abs().max() <= (6 / (5 * 64)) ** 0.5
    assert not any(bool(lstm[f"{layer}.{name}"].any()) for layer in (0, 1) for name in ("bias", "bias_state"))
    assert float(lstm["embed"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(lstm["head"].std()) == pytest.approx((2 / (64 + 8)) ** 0.5, rel=0.2)
    seed = draw(parse(Config, {"model": "rnn_seed", "d_model": 64, "epochs": 1}))  # type: ignore[arg-type]
    both = torch.cat((seed["0.in"], seed["0.state"]))
    assert float(both.std()) == pytest.approx((2 / (3 * 64)) ** 0.5, rel=0.05)
    assert not seed["0.bias"].any()


# --------------------------------------------------------------------------------------- models against the library's


@pytest.mark.parametrize("model", ["lstm", "gru", "rnn", "transformer"])
def test_what_a_net_says_after_each_token_is_what_it_says_of_the_whole_sequence(model: str) -> None:
    """Step by step from some place on, as on its own predictions, against all at once."""
    config = small(model=model)
    params = Automata().init([config]).params
    tokens = torch.randint(0, 21, (15, 6), generator=torch.Generator().manual_seed(1))
    net: Any = NETS[model]
    whole = net.logits(config, params, tokens, torch.arange(15).expand(6, -1))
    state = net.begin(config, params, tokens[:4], 11)
    steps = torch.stack([net.step(config, state, token[None]) for token in tokens[4:]], 2)
    torch.testing.assert_close(steps, whole[:, :, 4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["lstm", "gru", "rnn"])
def test_recurrent_nets_are_the_librarys(model: str) -> None:
    config = small(model=model, n_layers=2)
    params = {name: p[0] for name, p in Automata().init([config]).params.items()}
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[model](8, 8, 2)
    turned = model == "rnn"  # weights there are (inputs, outputs)
    names = {"weight_ih": "in", "weight_hh": "state", "bias_ih": "bias", "bias_hh": "bias_state"}
    for name, weight in module.named_parameters():
        mine = params[f"{name[-1]}.{names[name[:-3]]}"]
        weight.data = (mine.t() if turned else mine).reshape(weight.shape).contiguous()
    tokens = torch.randint(0, 21, (5, 15), generator=torch.Generator().manual_seed(1))
    expected, last = module(functional.embedding(tokens.t(), params["embed"]))
    found = hidden_states(config, {name: p[None] for name, p in params.items()}, tokens)
    torch.testing.assert_close(found["h2"], expected.transpose(0, 1), atol=1e-6, rtol=0)
    hidden = last[0] if model == "lstm" else last
    torch.testing.assert_close(found["h1"][:, -1], hidden[0], atol=1e-6, rtol=0)
    if model == "lstm":
        torch.testing.assert_close(found["c1"][:, -1], last[1][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(found["c2"][:, -1], last[1][1], atol=1e-6, rtol=0)


def test_a_transformer_does_not_see_what_comes_later_and_knows_in_which_order_things_came() -> None:
    config = small(model="transformer")
    params = Automata().init([config]).params
    tokens = torch.tensor([[1, 9, 0, 8, 0, 18, 2, 9, 1], [1, 9, 0, 8, 0, 18, 3, 8, 2], [0, 8, 1, 9, 0, 18, 2, 9, 1]])
    found = hidden_states(config, params, tokens)["h2"]
    torch.testing.assert_close(found[0, :6], found[1, :6])
    assert not torch.allclose(found[0, 6:], found[1, 6:])
    assert not torch.allclose(found[0, -1], found[2, -1]), "the same tokens in another order"


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("model", ["rnn", "rnn_seed"])
def test_the_closed_form_is_what_autograd_finds(model: str, activation: str, dropout: float) -> None:
    fields = {"model": model, "activation": activation, "dropout": dropout, "n_layers": 3}
    configs = [small(seed=seed, **fields) for seed in (1, 2)]
    family = Automata()
    state = family.init(configs)
    params = {name: p.requires_grad_() for name, p in state.params.items()}
    batch = family.batch(configs, [3, 9])  # the second is the last of its epoch
    expected, _ = family.loss(State(params), batch)
    theirs = torch.autograd.grad(expected.sum(), list(params.values()))
    with torch.no_grad():
        losses, found, _ = family.gradients(State(params), batch)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-13, rtol=0)
    for (name, gradient), other in zip(found.items(), theirs, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0, msg=name)


@pytest.mark.usefixtures("doubles")
def test_the_seeds_net_carries_the_dropped_state_on() -> None:
    """Against the loop that its description tells of, over time and layers, with the same masks."""
    config = small(model="rnn_seed", n_layers=3, dropout=0.4, head="states")
    family = Automata()
    params = family.init([config]).params
    batch = family.batch([config], [0])
    assert batch is not None
    own = {name: p[0] for name, p in params.items()}
    masks = [batch.mask(number)[0] for number in range(3)]
    states = [torch.zeros(4, 8) for _ in range(3)]
    said = []
    for t, tokens in enumerate(batch.tokens[0]):
        x = own["embed"][tokens] * masks[0][t]
        for layer in range(3):
            both = torch.cat((own[f"{layer}.in"], own[f"{layer}.state"]))
            x = torch.tanh(torch.cat((x, states[layer]), -1) @ both + own[f"{layer}.bias"])
            x = x * masks[layer + 1][t] if layer < 2 else x
            states[layer] = x
        said.append(x)
    column = torch.arange(4)[:, None]
    features = torch.stack(said)[batch.places[0], column].view(-1, 8) * batch.mask(-1)[0]
    losses = functional.cross_entropy(features @ own["head"], batch.answers[0], reduction="none")
    found, _ = loops.gradients(config, params, batch)
    torch.testing.assert_close(found[0], (losses * batch.weights[0]).sum(), atol=1e-13, rtol=0)


def test_dropout_leaves_the_mean_and_is_another_at_each_step_and_seed() -> None:
    config = small(dropout=0.1, d_model=64, batch_size=8)
    family = Automata()
    first, again, later = (family.batch([config], [step]) for step in (5, 5, 6))
    other = family.batch([config.model_copy(update={"seed": 1})], [5])
    assert first is not None and again is not None and later is not None and other is not None
    assert torch.equal(first.mask(0), again.mask(0))
    assert first.masks[0].shape != later.masks[0].shape or not torch.equal(first.masks[0], later.masks[0])
    assert first.masks[0].shape != other.masks[0].shape or not torch.equal(first.masks[0], other.masks[0])
    mask = first.mask(0)
    assert float(mask.mean()) == pytest.approx(1, abs=0.02)
    assert float((mask == 0).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_numbers_too_small_for_a_float_are_zero_inside_and_only_there() -> None:
    tiny = torch.full((1,), 2.0**-130)
    with denormals.flushed():
        assert not bool(tiny * 1.0)
        with denormals.flushed():
            pass
        assert not bool(tiny * 1.0)
    assert bool(tiny * 1.0)


# ----------------------------------------------------------------------------------------------------------- batches


def test_an_epoch_shows_each_sample_once_and_another_one_in_another_order() -> None:
    config = small(n_train=38)
    feed = batches.Feed(config, data.load(config).train, None)
    epochs = [[feed.rows(step).tolist() for step in range(start, start + 10)] for start in (0, 10)]
    assert [len(rows) for rows in epochs[0]] == [4] * 9 + [2], "nothing is dropped"
    flat = [[row for rows in epoch for row in rows] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(38))
    assert flat[0] != flat[1]


def test_a_batch_asks_for_the_next_states_of_the_query_and_for_nothing_else() -> None:
    config = small(model="rnn")
    split = data.load(config).train
    family = Automata()
    for step in (0, 33, 9):  # in this order: blocks are read as they are needed
        batch = family.batch([config], [step])
        assert batch is not None
        rows = batches.Feed(config, split, None).rows(step)
        query = split.query(rows)
        asked = (batch.weights[0] > 0).view(len(batch.places[0]), -1)
        counts = asked.sum(1).tolist()
        assert counts[: len(rows)] == query.lengths.tolist()
        assert not any(counts[len(rows) :]), "rows that only fill up a shape weigh nothing"
        assert float(batch.weights.sum()) == pytest.approx(1)
        answers = batch.answers.view(asked.shape)
        for b, length in enumerate(query.lengths):
            assert answers[b, :length].tolist() == query.next_states[b, :length].tolist()
            places = batch.places[0, b, :length]
            assert batch.tokens[0, places, b].tolist() == query.actions[b, :length].tolist()
            assert batch.tokens[0, places - 1, b].tolist() == query.states[b, :length].tolist()


# ------------------------------------------------------------------------------------------------------------ metrics


class Perfect:
    """A hand-made net that looks every transition up in a table of the sample: it says what the solver would."""

    def __init__(self, tables: Tensor) -> None:
        self.tables = tables  # (B, states, actions): next states

    def said(self, states: Tensor, actions: Tensor, row: Tensor) -> Tensor:
        inside = (states < 8) & (actions >= FIRST_ACTION) & (actions < FIRST_ACTION + N_ACTIONS)
        action = torch.where(inside, actions - FIRST_ACTION, 0)
        found = self.tables[row, torch.where(inside, states, 0), action]
        return functional.one_hot(torch.where(inside, found, 0), 8) * 9.0

    def logits(self, config: Config, params: dict[str, Tensor], tokens: Tensor, places: Tensor) -> Tensor:
        row = torch.arange(tokens.shape[1])[:, None]
        return self.said(tokens[places - 1, row], tokens[places, row], row)[None]

    def begin(self, config: Config, params: dict[str, Tensor], tokens: Tensor, more: int) -> State:
        return State(params, {"before": tokens[-1]})

    def step(self, config: Config, state: State, tokens: Tensor) -> Tensor:
        before, state.carried["before"] = state.carried["before"], tokens[0]
        return self.said(before, tokens[0], torch.arange(tokens.shape[1]))[None]


def solver_tables(config: Config, split: data.Split) -> Tensor:
    """What the solver says in each cell: what the demonstrations show, else the state that they visit most."""
    rows = np.arange(split.n)
    picks = split.picks(rows)
    batch = split.batch(rows, picks)
    tables = np.zeros((split.n, 8, N_ACTIONS), np.int64)
    for row in rows:
        shown = batch.targets[row, : batch.starts[row] - 1].tolist()
        states = [token for token in shown if token < 8]
        tables[row] = max(range(8), key=lambda state: (states.count(state), -states.index(state)) if state in states
                          else (0, -99))  # fmt: skip
        for before, action, after in zip(shown, shown[1:], shown[2:], strict=False):
            if before < 8 and FIRST_ACTION <= action < FIRST_ACTION + N_ACTIONS:
                tables[row, before, action - FIRST_ACTION] = after
    return torch.from_numpy(tables)


@pytest.mark.parametrize("absorbing", [False, True])
def test_a_net_that_says_what_the_solver_says_has_the_solvers_numbers(
    absorbing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, through the very code that measures learnt nets; sequences of all lengths side by side."""
    config = small(n_val=60, absorbing=absorbing, open_samples=60)
    dataset = data.load(config)
    monkeypatch.setattr(evaluation, "_chunks", lambda config, dataset, part, n: iter([np.arange(min(n, part.n))]))
    net: Any = Perfect(solver_tables(config, dataset.val))
    [found] = evaluation.measure(config, net, {"embed": torch.zeros(1, 1, 1)}, dataset, "val")

    solver = small(n_val=60, absorbing=absorbing, open_samples=60, model="solver")
    expected = evaluation.measure_baseline(solver, dataset, "val")
    loss = found.pop("loss")
    assert found == expected
    scores = dataset.scores("val")
    assert found["acc"] == pytest.approx(scores.solver, abs=1e-12)
    assert found["score"] == pytest.approx(1, abs=1e-12)
    assert found["seq_acc"] == pytest.approx(scores.all_right, abs=1e-12)
    assert found["open_acc"] < found["acc"] < 1
    assert loss == pytest.approx(9 * (1 - found["acc"]) + np.log1p(7 * np.exp(-9)), abs=1e-3)
    assert ("outside_acc" in found) == absorbing
    if absorbing:
        assert found["outside_acc"] == pytest.approx(scores.outside_solver or 0.0, abs=1e-12)


def test_on_its_own_a_net_goes_on_from_what_it_said_and_not_from_what_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows the machine is never wrong; one that errs in a cell errs for longer on its own."""
    config = small(n_val=40, open_samples=40)
    dataset = data.load(config)
    true = torch.from_numpy(dataset.val.next_tokens(np.arange(40)))
    monkeypatch.setattr(evaluation, "_chunks", lambda config, dataset, part, n: iter([np.arange(min(n, part.n))]))

    def measured(tables: Tensor) -> dict[str, float]:
        net: Any = Perfect(tables)
        return evaluation.measure(config, net, {"embed": torch.zeros(1, 1, 1)}, dataset, "val")[0]

    right = measured(true)
    assert [right[name] for name in ("acc", "seq_acc", "open_acc", "open_seq_acc")] == [1, 1, 1, 1]
    wrong = true.clone()
    wrong[:, 1, 0] = (wrong[:, 1, 0] + 1) % 3
    found = measured(wrong)
    assert found["open_acc"] < found["acc"] < 1
    assert found["open_seq_acc"] == found["seq_acc"], "the first error is the same"


@pytest.mark.parametrize("model", ["solver", "shortcut_u", "shortcut_a", "shortcut_s"])
def test_baselines_take_no_steps_and_are_measured_as_learners_are(model: str) -> None:
    config = small(model=model, steps=None)
    outcome = trained(config)
    scores = data.load(config).scores("val")
    expected = scores.solver if model == "solver" else getattr(scores, f"{model[-1]}_accuracy")
    assert (outcome.finished, outcome.step) == (True, 0)
    assert outcome.summary["val_acc"] == pytest.approx(expected, abs=1e-12)
    assert outcome.summary["parameters"] == 0
    assert {"test_acc", "test_seq_acc", "val_score"} <= set(outcome.summary)
    if model == "solver":
        assert outcome.summary["val_score"] == 1
        assert "val_loss" not in outcome.summary, "it says states, no probabilities"
    else:
        assert outcome.summary["val_loss"] == pytest.approx(getattr(scores, f"{model[-1]}_loss"))
        assert outcome.summary["val_score"] <= 1e-12


# --------------------------------------------------------------------------------------------------------- training


def test_a_small_lstm_learns_eight_sequences_by_heart() -> None:
    sizes = {"n_train": 8, "batch_size": 8, "demo_length": 3, "query_length": 3, "n_val": 2, "n_test": 2}
    config = small(**sizes, n_layers=1, d_model=32, lr=0.01, steps=200, eval_every=200, dropout=0.0, log_every=5)
    losses = [value for name, _, value in curve_of(trained(config)) if name == "loss"]
    assert losses[0] > 1
    assert losses[-1] < 0.05


def test_a_summary_is_of_the_best_checkpoint_and_so_is_the_test() -> None:
    config = small(model="rnn", lr=0.05, steps=60, eval_every=10, d_model=16)
    outcome = trained(config)
    found, best = outcome.summary, outcome.best
    assert best is not None
    assert outcome.state is not None
    losses = {step: value for name, step, value in curve_of(outcome) if name == "val_loss"}
    assert found["best_step"] == best["step"] == min(losses, key=lambda step: losses[step]) < 60, "not the last one"
    assert found["val_loss"] == best["value"] == min(losses.values())
    assert found["val_loss_last"] == losses[60] > found["val_loss"]
    at_best = {name: value for name, step, value in curve_of(outcome) if step == best["step"]}
    assert found["val_score"] == at_best["val_score"]

    family = Automata()
    [of_best] = family.evaluate(State(best["params"]), [config], "test")
    [of_last] = family.evaluate(State(outcome.state["members"]["params"]), [config], "test")
    assert {name: found[name] for name in of_best} == of_best
    assert of_best != of_last


def points(*losses: float) -> list[Point]:
    return [("val_loss", step, value) for step, value in enumerate(losses, start=1)]


def test_a_run_ends_early_when_it_is_below_again_long_enough_after_it_was_so_first() -> None:
    """A loss that rises back above goes on counting, but never ends a run."""
    family = Automata()

    def ends(after: int, *losses: float) -> bool:
        return family.is_enough(small(stop_below=0.1, stop_after=after), points(*losses))

    assert not ends(0, 0.3, 0.2)
    assert ends(0, 0.3, 0.05)
    assert not ends(2, 0.3, 0.05, 0.05)
    assert ends(2, 0.3, 0.05, 0.05, 0.05)
    assert not ends(2, 0.05, 0.2, 0.2, 0.2)
    assert ends(2, 0.05, 0.2, 0.2, 0.2, 0.05)
    assert not family.is_enough(small(), points(0.0, 0.0))


def test_a_run_that_is_good_enough_takes_no_further_steps() -> None:
    outcome = trained(small(n_train=4, n_val=4, stop_below=100.0, stop_after=2, steps=50, open_samples=0))
    assert (outcome.finished, outcome.step) == (True, 3)
    assert "test_acc" in outcome.summary


# -------------------------------------------------------------------------------------------------------- curriculum


def parent(config: Config) -> Parent:
    outcome = trained(config)
    assert outcome.state is not None
    members = outcome.state["members"]
    return Parent(7, "fsm", config.model_dump(), outcome.step, members["params"], members["carried"])


@pytest.mark.parametrize("model", ["lstm", "transformer", "rnn"])
def test_a_curriculum_goes_from_small_machines_to_large_ones_with_all_weights(model: str) -> None:
    fields = {"model": model, "steps": 2, "demo_length": 5, "query_length": 4, "open_samples": 2, "n_train": 8}
    sizes = [(3, 3), (5, 5), (5, 8), (8, 8)]
    earlier = parent(small(states=3, actions=3, **fields))
    for states, actions in sizes[1:]:
        config = small(states=states, actions=actions, seed=5, **fields)
        family = Automata()
        begun = family.begin(config, family.init([config]), earlier)
        assert all(torch.equal(begun.params[name], earlier.params[name]) for name in earlier.params)
        earlier = parent(config)


def test_with_a_head_for_each_number_of_states_a_curriculum_is_refused() -> None:
    earlier = parent(small(head="states", steps=2))
    config = small(head="states", states=4)
    with pytest.raises(InputError, match=r"head is of shape \[8, 4\] here and of shape \[8, 3\] in run 7"):
        Automata().begin(config, Automata().init([config]), earlier)


# ------------------------------------------------------------------------------------------------------------- packs


def test_only_plain_nets_on_the_same_data_stand_side_by_side() -> None:
    base = small(model="rnn")
    keys = {
        name: base.model_copy(update=fields).pack_key()
        for name, fields in {
            "lr": {"lr": 0.1, "seed": 3, "dropout": 0.0, "clip": None, "weight_decay": 0.1, "steps": 9},
            "model": {"model": "rnn_seed"},
            "width": {"d_model": 16},
            "data": {"data_seed": 1},
            "activation": {"activation": "relu"},
        }.items()
    }
    assert keys["lr"] == base.pack_key()
    assert len({base.pack_key(), *keys.values()}) == 5
    assert all(small(model=model).pack_key() is None for model in ("lstm", "gru", "transformer", "solver"))
    assert json.loads(base.pack_key() or "")["d_model"] == 8


def test_a_member_without_dropout_keeps_its_bits_beside_one_that_has_some() -> None:
    configs = [small(model="rnn_seed", d_model=32, batch_size=8, dropout=p, seed=3) for p in (0.0, 0.5)]
    family = Automata()
    _, together, _ = family.gradients(family.init(configs), family.batch(configs, [4, 4]))
    for k, config in enumerate(configs):
        _, alone, _ = family.gradients(family.init([config]), family.batch([config], [4]))
        for name, gradient in alone.items():
            assert gradient is not None and together[name] is not None
            assert torch.equal(gradient[0], together[name][k]), (k, name)  # type: ignore[index]


def test_the_family_is_built_in_and_its_nets_share_one_face() -> None:
    assert isinstance(families.find("fsm"), Automata)
    needed = ("draw", "masks", "losses", "logits", "begin", "step", "layers")
    assert all(callable(getattr(net, name, None)) for net in NETS.values() for name in needed)
    assert set(gated.NAMES) == {"in", "state", "bias", "bias_state"}
    assert set(baselines.SHORTCUTS) == {"U", "A", "S"}
