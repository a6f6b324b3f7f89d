"""Text from checkpoints: what a net learnt it writes, and what cannot be opened is said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnq import checkpoint, queue, runs, sample
from rnnq.checkpoint import Owner, Saved
from rnnq.errors import Damaged, InputError
from rnnq.families.base import State
from rnnq.families.dynamics.config import DynamicsConfig
from rnnq.families.dynamics.model import Dynamics, draw_params
from rnnq.sample import Request, Sampled
from tests.conftest import Cli
from tests.processes import Study

CPU = torch.device("cpu")
SENTENCE = "abac\n"  # what comes after an a is known only to who remembers what was before it

LEARNING = """
import rnnq
stage = rnnq.stage(
    "abc", "dynamics", rnnq.grid(use_old_state=[True]),
    base=dict(state_size=32, batch_size=16, window=50, steps=800, eval_every=200, lr=3e-3, corpus="abc.txt"),
)
"""

# each family writes what it is asked about its module, so that a test sees which tensors it was given
FAMILIES = """
import torch

import rnnq


class Config(rnnq.Config):
    metrics = (rnnq.Metric("loss", "nats", primary=True), rnnq.Metric("val_loss", "nats"))
    best_metric = "val_loss"
    steps: int = 6
    eval_every: int = 1
    lr: float = 0.5


class Counts(rnnq.Family):
    Config = Config
    name = "counts"

    def build(self, config):
        return torch.nn.BatchNorm1d(1)

    def batch(self, config, step):
        return torch.arange(4.0)[:, None]

    def loss(self, module, data):
        return module(data).square().sum()

    def evaluate(self, module, config, split):
        return {f"{split}_loss": abs(int(module.num_batches_tracked) - 3)}     # the third step is the best

    def sample(self, module, config, prompt, length, temperature, seed):
        if prompt == "raw":
            return b"\\x1b[31m\\xff\\n\\t\\x00"
        if prompt == "wrong":
            return 7
        return f"{int(module.num_batches_tracked)} {module.training} {length} {temperature:g} {seed}"


class Mute(Counts):
    name = "mute"
    sample = rnnq.Family.sample


class MuteMembers(rnnq.Family):
    Config = Config
    name = "members"

    def init(self, configs):
        return rnnq.State({"w": torch.zeros(len(configs), 1)})

    def batch(self, configs, steps):
        return torch.zeros(1)

    def loss(self, state, data):
        return (state.params["w"] - 1).square().sum(-1), {}


@rnnq.family(Config)
def yields(config):
    yield {"loss": 1.0}


counts = rnnq.stage("counts", Counts, [{}])
"""

MUTES = """
mute = rnnq.stage("mute", Mute, [{}])
members = rnnq.stage("members", MuteMembers, [{}])
others = rnnq.stage("yields", yields, [{}])
"""


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A net that was trained on one sentence, over and over."""
    with Study(tmp_path_factory.mktemp("learnt")) as study:
        (study.folder / "abc.txt").write_text(SENTENCE * 600)
        study.rnnq("init", study.define(LEARNING))
        study.rnnq("worker", "--device", "cpu")
        yield study


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """One trained run of each family of a definition file: counts, mute, members, yields."""
    with Study(tmp_path_factory.mktemp("others")) as study:
        study.rnnq("init", study.define(FAMILIES + MUTES))
        study.rnnq("worker", "--device", "cpu")
        yield study


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(FAMILIES))
        yield study


def drawn(study: Study, prompt: str = "", length: int = 30, run: int = 1, **how: Any) -> Sampled:
    return sample.sample(study.engine, run, Request(prompt, length, **how), CPU, study.folder / "defs")


# --------------------------------------------------------------------------------------------- what a net writes


def test_a_net_that_learnt_a_sentence_goes_on_with_it(learnt: Study) -> None:
    found = drawn(learnt, "ab", 33, temperature=0)
    assert found.written == ("ac\n" + SENTENCE * 6).encode()
    assert found.metrics["val_loss"] < 0.1


def test_the_state_is_carried_through_the_prompt(learnt: Study) -> None:
    assert drawn(learnt, "c\na", 1, temperature=0).written == b"b"
    assert drawn(learnt, "c\naba", 1, temperature=0).written == b"c"


def test_a_seed_draws_the_same_text_every_time_and_another_one_another(learnt: Study) -> None:
    torch.rand(3)  # what others draw is nothing to it
    first = drawn(learnt, length=200, temperature=2, seed=5).written
    torch.rand(3)
    assert drawn(learnt, length=200, temperature=2, seed=5).written == first
    assert drawn(learnt, length=200, temperature=2, seed=6).written != first
    cold = drawn(learnt, length=40, temperature=1e-300, seed=6).written
    assert cold == drawn(learnt, length=40, temperature=0).written


def test_an_empty_prompt_begins_after_a_newline(learnt: Study) -> None:
    assert drawn(learnt, "", 40, seed=1).written == drawn(learnt, "\n", 40, seed=1).written


def test_bytes_that_are_no_text_may_be_a_prompt(learnt: Study) -> None:
    odd = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert len(drawn(learnt, odd, 5).written) == 5


def test_members_side_by_side_write_what_each_writes_alone() -> None:
    configs = [DynamicsConfig(state_size=8, n_layers=2, seed=seed) for seed in (1, 2)]
    params = [draw_params(config) for config in configs]
    both = State({name: torch.stack([p[name] for p in params]) for name in params[0]})
    together = Dynamics().sample(both, configs, ["a", "bc"], 20, 1.0, [3, 4])
    for k, (config, prompt, seed) in enumerate(zip(configs, ["a", "bc"], [3, 4], strict=True)):
        alone = State({name: p[None] for name, p in params[k].items()})
        assert Dynamics().sample(alone, [config], [prompt], 20, 1.0, [seed]) == [together[k]]


# ----------------------------------------------------------------------------------------------- best, last, none


def test_the_best_checkpoint_has_the_buffers_of_its_step(others: Study) -> None:
    best = drawn(others, length=7, temperature=0.5, seed=9)
    assert (best.checkpoint, best.step, best.metrics["val_loss"]) == ("best", 3, 0)
    assert best.written == "3 False 7 0.5 9"
    last = drawn(others, length=7, temperature=0.5, seed=9, which="last")
    assert (last.checkpoint, last.step, last.metrics["val_loss"]) == ("last", 6, 3)
    assert last.written == "6 False 7 0.5 9"


def test_a_best_checkpoint_without_buffers_is_not_used_and_that_is_said(study: Study) -> None:
    study.rnnq("worker", "--device", "cpu")
    row = study.run()
    owner = Owner(row["checkpoint"]["path"].split("/")[1], row["stage"], 1, row["fingerprint"])
    state = checkpoint.load(study.folder, Saved(**row["checkpoint_best"]), owner)
    del state["carried"]  # as older versions wrote it
    aside = checkpoint.write_aside(study.folder, "checkpoints/old.pt", owner, state)
    saved = checkpoint.publish(study.folder, "checkpoints/old.pt", aside, 3)
    study.write("UPDATE runs SET checkpoint_best = :saved", saved=json.dumps(vars(saved)))
    found = drawn(study)
    assert (found.checkpoint, found.step) == ("last", 6)
    assert "took the last" in found.remarks[0]


def test_a_run_in_training_writes_from_its_newest_checkpoint_and_from_the_best_so_far(study: Study) -> None:
    worker = study.worker({"at": "saved", "do": "wait", "step": 5}, every=1)
    worker.expect("trapped")
    assert study.states() == {1: "running"}
    last, best = drawn(study, which="last"), drawn(study)
    assert (last.checkpoint, last.step, last.written[0]) == ("last", 5, "5")
    assert (best.checkpoint, best.step, best.written[0]) == ("best", 3, "3")
    worker.go_on()
    worker.end()


def test_a_cancelled_run_writes_too_and_one_without_checkpoint_says_so(study: Study) -> None:
    with pytest.raises(InputError, match="run 1 is pending and has no checkpoint"):
        drawn(study)
    worker = study.worker({"at": "saved", "do": "kill", "step": 2}, every=2)
    worker.end(-9)
    queue.reap(study.engine)
    queue.cancel(study.engine, [1])
    assert study.states() == {1: "cancelled"}
    assert drawn(study).step == 2


def test_a_run_without_a_best_checkpoint_has_only_a_last_one(learnt: Study, others: Study) -> None:
    row = others.run(3)
    assert row["checkpoint_best"] is None
    with pytest.raises(InputError, match="run 3 has no best checkpoint"):
        drawn(others, run=3, which="best")


# --------------------------------------------------------------------------------------------- what is not there


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_two_are_an_error(study: Study) -> None:
    worker = study.worker({"at": "saved", "do": "kill", "step": 4}, every=2)
    worker.end(-9)
    files = study.named()
    newest, before = (study.folder / files[name]["path"] for name in ("checkpoint", "checkpoint_prev"))
    newest.write_bytes(newest.read_bytes()[:-1])
    found = drawn(study, which="last")
    assert found.step == 2
    assert "is damaged" in found.remarks[0]
    before.unlink()
    with pytest.raises(Damaged, match=r"is damaged[^\0]*cannot be read"):
        drawn(study)


def test_a_checkpoint_that_was_replaced_meanwhile_is_looked_up_anew(study: Study) -> None:
    study.rnnq("worker", "--device", "cpu")
    row = runs.show(study.engine, 1)
    gone = {**row["checkpoint"], "path": row["checkpoint"]["path"].replace("s6", "s1")}
    older = {**row, "checkpoint": gone, "checkpoint_best": None}
    assert sample._open(study.engine, older, "last", True).step == 6


def test_the_code_of_a_run_is_the_code_it_was_made_with(study: Study) -> None:
    study.rnnq("worker", "--device", "cpu")
    study.define(FAMILIES + "\n# changed\n")
    with pytest.raises(InputError, match="has changed since the stage was made"):
        drawn(study)
    (study.folder / "defs" / "study.py").unlink()
    with pytest.raises(InputError, match=r"study\.py"):
        drawn(study)


@pytest.mark.parametrize(
    ("run", "says", "hint"),
    [
        (2, "the family mute cannot be sampled from", "sample(self, module, config, prompt"),
        (3, "the family members cannot be sampled from", "sample(self, state, configs, prompts"),
        (4, "the family yields is a generator", "a class with build and sample"),
        (99, "there is no run 99", "rnnq ls"),
    ],
)
def test_a_family_that_cannot_write_is_named_with_what_it_lacks(others: Study, run: int, says: str, hint: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        drawn(others, run=run)
    assert hint in (refused.value.hint or "")


def test_a_family_that_gives_no_text_is_named(others: Study) -> None:
    with pytest.raises(InputError, match=r"sample\(\) of the family counts gave int"):
        drawn(others, "wrong")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"length": 0}, "--length 0"),
        ({"length": 10**9}, "--length 1000000000"),
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(learnt: Study, how: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        drawn(learnt, **how)


# -------------------------------------------------------------------------------------------------- the command


def test_control_characters_reach_the_file_but_never_the_terminal(others: Study) -> None:
    shown = others.rnnq("sample", "1", "--prompt", "raw")
    assert "raw\\x1b[31m\ufffd\n\t\\x00\n" in shown
    assert "best checkpoint, step 3" in shown
    said = others.rnnq("sample", "1", "--prompt", "raw", "--out", "raw.bin")
    assert "wrote 9 bytes to raw.bin" in said
    assert "[31m" not in said
    assert (others.folder / "raw.bin").read_bytes() == b"\x1b[31m\xff\n\t\x00"


def test_the_command_says_as_json_what_was_drawn_and_from_what(others: Study) -> None:
    said = others.rnnq("sample", "1", "--length", "7", "--checkpoint", "last", "--format", "json")
    found = json.loads(said)
    assert found["text"] == "6 False 7 1 0"
    assert (found["run"], found["step"], found["checkpoint"], found["prompt"]) == (1, 6, "last", "")
    assert found["metrics"]["val_loss"] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "nowhere/x"), "nowhere"),
        (("--out", "."), "--out ."),
        (("--device", "tpu"), "no such device"),
        (("--checkpoint", "first"), "'first' is not one of"),
        (("--temperature", "nan"), "--temperature nan"),
    ],
)
def test_bad_options_are_refused(others: Study, words: tuple[str, ...], says: str) -> None:
    assert says in others.rnnq("sample", "1", *words, code=2)


def test_the_same_command_gives_the_same_text_twice(learnt: Study, cli: Cli) -> None:
    words = ("sample", "1", "--prompt", "é", "--length", "60", "--temperature", "3", "--format", "json")
    words = (*words, "--db", str(learnt.folder / "experiments.db"))
    first = cli(*words).stdout
    assert cli(*words).stdout == first
    assert json.loads(first)["prompt"] == "é"
