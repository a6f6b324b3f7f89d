"""Linear probes: what they read, what is right, which samples are theirs, and that they beat their control."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rnnq import families
from rnnq.config import check, parse
from rnnq.errors import DataError, InputError
from rnnq.families.base import Parent, State
from rnnq.families.fsm import baselines, data, evaluation, features, machines, model
from rnnq.families.fsm.config import Config
from rnnq.families.fsm.features import Samples
from rnnq.families.fsm.probe import Probe
from rnnq.families.fsm.probe_config import ProbeConfig
from rnnq.train import Every, Member, Outcome, together
from tests.conftest import Cli
from tests.families.test_contract import Notebook

torch.set_num_threads(1)

CPU = torch.device("cpu")
NEVER = Every(seconds=None, steps=10**9)
DATA = {"states": 2, "actions": 3, "demos": 2, "demo_length": 12, "query_length": 12, "n_train": 4000, "n_val": 200,
        "n_test": 200}  # fmt: skip
NET = DATA | {"model": "lstm", "d_model": 32, "n_layers": 1}


def net(**fields: Any) -> Config:
    made = parse(Config, NET | {"steps": 1} | fields)
    assert isinstance(made, Config)
    return made


def probe(**fields: Any) -> ProbeConfig:
    made = parse(ProbeConfig, NET | {"steps": 150, "lr": 0.01} | fields)
    assert isinstance(made, ProbeConfig)
    return made


def drawn(config: Config) -> Parent:
    """A run that has learnt nothing yet."""
    params = families.find("fsm").init([config]).params  # type: ignore[union-attr]
    return Parent(7, "fsm", config.model_dump(mode="json"), 0, params, {})


def begun(config: ProbeConfig, parent: Parent) -> tuple[Probe, State]:
    family = Probe()
    return family, family.begin(config, family.init([config]), parent)


def trained(config: ProbeConfig, parent: Parent) -> Outcome:
    member = Member(config, Notebook(), config.steps_total(), None, parent)
    [(_, outcome)] = together(Probe(), [member], CPU, NEVER)
    return outcome


@cache
def learnt() -> Parent:
    """A small LSTM after some seconds: not perfect, and far from where it began."""
    config = net(lr=0.01, batch_size=16, steps=1250, open_samples=0, eval_every=1250, seed=1)
    [(_, outcome)] = together(families.find("fsm"), [Member(config, Notebook(), 1250)], CPU, NEVER)
    assert outcome.best is not None
    return Parent(7, "fsm", config.model_dump(mode="json"), 1250, outcome.best["params"], {})


# --------------------------------------------------------------------------------------------------- the probe itself


@pytest.mark.parametrize(("d_model", "count"), [(256, 1285), (64, 325)])
def test_a_probe_has_the_published_number_of_parameters(d_model: int, count: int) -> None:
    config = ProbeConfig(d_model=d_model, layers="top", control="random_weights")

    state = Probe().init([config])

    assert config.parameters() == count
    assert sum(p.numel() for p in state.params.values()) == 2 * count  # and as many of the control
    assert config.steps_total() == 20 * 250


def test_there_is_a_probe_for_each_layer_each_cell_and_the_embedding() -> None:
    assert probe(n_layers=2).places() == ["embed", "h1", "h2", "c1", "c2"]
    assert probe(n_layers=2, model="gru").places() == ["embed", "h1", "h2"]
    assert probe(n_layers=2, layers="top").places() == ["h2"]
    table = Probe().init([probe(target="table", layers="top")])
    assert table.params["weight"].shape == (1, 2, 32, 2 * 3 * 2)


def test_what_a_probe_can_not_be_is_said_at_once() -> None:
    _, problems = check(ProbeConfig, NET | {"target": "table", "permute_tokens": True, "n_test": 1})

    assert "n_test=1: a probe needs a sample" in problems[0]
    assert "target=table: under permute_tokens" in problems[0]


# ------------------------------------------------------------------------------------------- what is read, and right


@pytest.mark.parametrize(
    ("target", "permuted"),
    [("next_state", False), ("next_state", True), ("current_state", False), ("current_state", True), ("table", False)],
)
def test_the_net_is_read_where_it_has_just_seen_what_the_answer_follows_from(target: str, permuted: bool) -> None:
    """With an embedding that is the token itself."""
    config = probe(target=target, permute_tokens=permuted, control="shuffled_labels")
    _, state = begun(config, drawn(net(permute_tokens=permuted)))
    state.carried["backbone.embed"] = torch.eye(21, 32)[None]
    samples = Samples(config, "train")
    read, places = samples.states({"backbone": _net(state)}, np.arange(5))
    tokens = read[config.places().index("embed")].argmax(1).numpy()
    answers = samples.answers.right[places]
    split, rows = data.load(config).val, np.arange(5)
    query = split.query(rows)
    asked = query.next_states != data.PAD

    if target == "next_state":
        assert (tokens == query.actions[asked]).all()
        assert (answers[:, 0] == query.next_states[asked]).all()
    elif target == "current_state":
        assert (tokens == query.states[asked]).all() and (answers[:, 0] == tokens).all()
    else:
        assert (tokens == data.QUERY).all()
        assert (answers.reshape(5, 2, 3) == split.tables[rows]).all()


def _net(state: State) -> dict[str, torch.Tensor]:
    return {n.removeprefix("backbone."): t for n, t in state.carried.items() if n.startswith("backbone.")}


def test_a_probe_with_the_nets_own_head_is_as_right_as_the_net() -> None:
    """The states are those of the net in evaluation: without dropout, and on the same samples."""
    config, parent = probe(layers="top"), learnt()
    family, state = begun(config, parent)
    head = parent.params["head"][0, :, :2]
    state.params["weight"][0, 0], state.params["bias"][0, 0] = head, 0.0
    [found] = family.evaluate(state, [config], "test")

    split, rows = config.own_samples("test")
    part = data.load(config)[split]
    shown = evaluation.batches.drawn(part, rows, part.picks(rows))
    params, whole = dict(parent.params), net(head="states")
    params["head"] = head[None]
    places = torch.from_numpy(shown.places)
    said = model.NETS["lstm"].logits(whole, params, torch.from_numpy(shown.inputs.T.copy()), places)[0]
    right = (said.argmax(-1).numpy() == shown.answers)[shown.asked]
    assert found["test_acc"] == pytest.approx(right.mean(), abs=1e-9)


def test_states_that_are_kept_are_those_that_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    config = probe(steps=20)
    kept = trained(config, learnt())
    monkeypatch.setattr(features, "LIMIT", 0)
    anew = trained(config, learnt())

    assert kept.state is not None and anew.state is not None
    for name, values in kept.state["members"]["params"].items():
        assert torch.allclose(values, anew.state["members"]["params"][name], atol=1e-5), name


def test_the_net_stays_as_it_is_and_the_control_is_the_net_before_it_learnt() -> None:
    parent = learnt()
    outcome = trained(probe(steps=10, seed=5), parent)

    assert outcome.state is not None
    carried = outcome.state["members"]["carried"]
    before = model.draw(parse(Config, parent.config))  # type: ignore[arg-type]
    for name in ("embed", "0.in", "0.state"):
        assert torch.equal(carried[f"backbone.{name}"], parent.params[name])
        assert torch.equal(carried[f"control.{name}"][0], before[name])
        assert not torch.equal(carried[f"control.{name}"], parent.params[name])


def test_the_cells_that_demonstrations_show_are_those_that_they_walk_through() -> None:
    split, rows = data.load(probe()).val, np.arange(30)
    seen, visits = features.shown(split, rows)
    batch = split.batch(rows, split.picks(rows))

    for i in rows:
        walk = batch.targets[i, : batch.starts[i]].tolist()
        cells = {(a, b) for a, b in itertools.pairwise(walk) if a < 8 <= b < 18}
        assert {(s, a + 8) for s, a in zip(*np.nonzero(seen[i]), strict=True)} == cells
        assert visits[i].tolist() == [walk.count(state) for state in range(2)]


def test_ceiling_and_floor_are_those_of_the_samples_that_are_measured() -> None:
    own = Samples(probe(), "test")
    scores = baselines.scores(data.load(probe()).test)

    assert own.baseline.ceiling == pytest.approx(scores.ceiling, abs=0.03)  # half of the same samples
    assert own.baseline.floor == pytest.approx(scores.shortcut, abs=0.03)
    table = Samples(probe(target="table"), "test")
    seen = float(table.answers.seen.mean()) if table.answers.seen is not None else 0
    assert seen < table.baseline.ceiling < 1 and 0.5 < table.baseline.floor < table.baseline.ceiling
    assert Samples(probe(target="current_state"), "val").baseline.ceiling == 1


# -------------------------------------------------------------------------------------------- whose samples they are


@pytest.mark.parametrize("split", ["disjoint", "stream"])
def test_no_machine_that_a_probe_is_measured_on_was_learnt_from_by_it_or_its_net(split: str) -> None:
    config = probe(states=3, n_train=300, data_split=split)
    whole = data.load(config)
    kinds = {name: set(machines.kinds(whole[name].tables).tolist()) for name in data.SPLITS}
    train, measured = config.own_samples("train"), [config.own_samples(name) for name in ("val", "test")]

    assert train[0] == "val" and len(train[1]) == 200
    rows = np.concatenate([rows for _, rows in measured])
    assert len(rows) == len(set(rows.tolist()))
    theirs = set(machines.kinds(whole.test.tables[rows]).tolist())
    assert not theirs & (kinds["train"] | kinds["val"])
    if split == "stream":
        assert len(rows) < 200 and kinds["test"] & kinds["train"]


def test_where_every_machine_was_learnt_from_nothing_can_be_measured() -> None:
    config = probe(actions=2, data_split="stream")

    with pytest.raises(DataError, match="of 200 machines of test, 0 are neither in train nor in val"):
        config.datasets()


# --------------------------------------------------------------------------------------------------- whose net it is


def test_a_net_other_than_the_one_named_is_refused_with_every_field_that_differs() -> None:
    parent = drawn(net(model="gru", n_layers=2, data_seed=1, n_val=300, lr=0.5))

    with pytest.raises(InputError) as error:
        begun(probe(), parent)

    assert error.value.problems == [
        "run 7 is no net for this probe: data_seed is 42 here and 1 there, "
        "model is 'lstm' here and 'gru' there, n_layers is 1 here and 2 there",
    ]
    with pytest.raises(InputError, match="n_val is 200 here and 300 there"):
        begun(probe(data_split="stream"), drawn(net(data_split="stream", n_val=300)))


def test_only_a_net_of_fsm_can_be_probed() -> None:
    with pytest.raises(InputError, match="its family is dynamics, and a probe reads a net of fsm"):
        begun(probe(), Parent(7, "dynamics", {}, 0, {}, {}))
    with pytest.raises(InputError, match="a solver has no states"):
        begun(probe(), Parent(7, "fsm", parse(Config, DATA | {"model": "solver"}).model_dump(mode="json"), 0, {}, {}))


def test_lengths_may_be_named_or_left_to_the_formula() -> None:
    automatic = net(demo_length=None, query_length=None)
    demo, query = automatic.base_lengths()

    begun(probe(demo_length=demo, query_length=query), drawn(automatic))


def test_a_stage_of_probes_without_a_net_is_refused_at_init(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "defs" / "probe.py"
    path.parent.mkdir()
    path.write_text("import rnnq\nstage = rnnq.stage('probe', 'fsm_probe', rnnq.grid(lr=[0.01]))\n")

    result = cli("init", str(path), code=2)

    assert "stage probe: a run of fsm_probe starts from one of fsm" in result.stderr


def test_a_probe_that_no_run_of_its_stage_fits_is_refused_at_init(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "defs" / "probe.py"
    path.parent.mkdir()
    path.write_text(
        f"""import rnnq
NET = {NET}
nets = rnnq.stage("nets", "fsm", rnnq.grid(n_layers=[1, 3], seed=[0, 1]), base=NET | dict(steps=1))
fits = rnnq.stage("fits", "fsm_probe", rnnq.grid(seed=[0, 1]), base=NET, start_from=rnnq.best("nets"))
not_so = rnnq.stage("not_so", "fsm_probe", rnnq.grid(n_layers=[1, 2]), base=NET | dict(actions=3, d_model=16),
                    start_from=rnnq.best("nets"))
"""
    )

    said = cli("init", str(path), code=2).stderr

    assert "stage not_so, probe next_state, lstm d16 L2 2s3a 12/12: it can start from no run of nets: " in said
    assert "d_model is 16 here and 32 there, n_layers is 2 here and 1 there" in said
    assert "stage fits" not in said and not (tmp_path / "experiments.db").exists()


# ------------------------------------------------------------------------------------------------------ the control


@pytest.mark.parametrize("control", ["random_weights", "shuffled_labels"])
def test_a_probe_beats_its_control(control: str) -> None:
    found = trained(probe(control=control), learnt()).summary

    assert found["test_selectivity"] == found["test_acc"] - found["test_control_acc"]
    assert found["test_selectivity"] > 0.1
    assert found["test_acc"] > found["test_acc_embed"] + 0.1
    assert found["test_control_acc"] < found["test_floor"]


def test_a_net_that_has_not_learnt_is_no_better_than_its_control() -> None:
    found = trained(probe(steps=30), drawn(net())).summary

    assert found["test_selectivity"] == 0
    assert found["test_acc_h1"] == found["test_control_acc_h1"] == found["test_acc"]


def test_the_token_just_read_tells_the_current_state_whatever_the_net_has_learnt() -> None:
    found = trained(probe(target="current_state"), learnt()).summary

    assert found["test_acc_embed"] == found["test_control_acc_embed"] == found["test_ceiling"] == 1


def test_a_table_has_an_accuracy_on_the_cells_that_were_shown() -> None:
    found: Mapping[str, Any] = trained(probe(target="table"), learnt()).summary

    assert found["test_seen_acc"] > found["test_control_acc"]
    assert found["parameters"] == 33 * 12
