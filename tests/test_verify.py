"""rnnq verify-resume: families that resume to the bit are told from those that do not, and where they differ."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnq import families, verify
from rnnq.config import parse
from rnnq.errors import InputError

torch.set_num_threads(1)

CPU = torch.device("cpu")

# a small config of each built-in family, with a carried state and evaluations before an interruption
SMALL: dict[str, dict[str, Any]] = {
    "dynamics": {
        "state_size": 8, "batch_size": 4, "window": 6, "steps": 40, "log_every": 3, "eval_every": 10, "n_layers": 2,
        "use_forget_gate": True, "use_old_state": True, "corpus": argparse.__file__,
    },
    "groups": {
        "data": {"p": 6, "k": 2, "template_type": "onehot", "mode": "sampled", "num_samples": 40, "batch_size": 16},
        "model": {"hidden_dim": 8, "init_scale": 0.5},
        "training": {"mode": "offline", "epochs": 14, "eval_every": 10, "optimizer": "hybrid", "scaling_factor": -1.0},
    },
    "fsm_probe": {  # of the net as it is drawn: which one is probed changes nothing here
        "states": 2, "actions": 3, "demos": 2, "demo_length": 6, "query_length": 6, "n_train": 20, "n_val": 18,
        "n_test": 8, "d_model": 8, "batch_size": 4, "steps": 40, "log_every": 3, "eval_every": 10,
    },
    "fsm": {
        "states": 2, "actions": 3, "demos": 2, "demo_length": 4, "query_length": 3, "n_train": 50, "n_val": 10,
        "n_test": 10, "d_model": 8, "batch_size": 4, "steps": 40, "log_every": 3, "eval_every": 10,
    },
    "scaling": {
        "data_path": argparse.__file__, "tokens": "bytes", "hidden_size": 8, "batch_size": 4, "sequence_length": 8,
        "tbptt_length": 4, "gradient_accumulation_steps": 2, "steps": 40, "log_every": 3, "csv_log_interval": 20,
        "fixed_val_tokens": 2000,
    },
}  # fmt: skip

FAMILY = """
import itertools, os, random, time
import torch
from torch import nn
import rnnq

class Config(rnnq.Config):
    best_metric = "val_loss"
    metrics = (rnnq.Metric("loss", primary=True), rnnq.Metric("val_loss"))
    steps: int = 30
    log_every: int = 1
    eval_every: int = 6

ELSEWHERE = itertools.count()
{module}

class Net(rnnq.Family):
    Config = Config
    {members}

    def __init__(self):
        self.calls = 0

    def build(self, config):
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))

    def batch(self, config, step):
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(97 * config.seed + step))

    def loss(self, module, x):
        self.calls += 1
        return (module(x) - x).square().mean(){term}

    def evaluate(self, module, config, split):
        return {{f"{{split}}_loss": random.random()}}

stage = rnnq.stage("net", Net, rnnq.grid(seed=[5, 6]))
"""

GENERATOR = """
import rnnq

class Config(rnnq.Config):
    steps: int = 3

@rnnq.family(Config)
def counted(config):
    for step in range(config.steps):
        yield {"loss": 1.0}

other = rnnq.stage("counted", counted, rnnq.grid(seed=[0]))
"""


def defined(folder: Path, term: str = "", module: str = "", members: str = "") -> Path:
    """A definition file with an ordinary family that is broken, or not, in one place."""
    path = folder / "defs" / "net.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAMILY.format(term=term, module=module, members=members))
    return path


def verdict_of(path: Path, **how: Any) -> verify.Verdict:
    [subject] = verify.of_definition(path, None)
    return verify.verify(subject, CPU, **how)


# ------------------------------------------------------------------------------------------------- what is equal


@pytest.mark.parametrize("name", families.BUILTIN)
def test_every_built_in_family_resumes_to_the_bit(name: str) -> None:
    made = parse(families.find_config(name), SMALL[name])
    subject = verify.Subject(name, name, made, made.steps_total(), lambda: families.find(name))

    verdict = verify.verify(subject, CPU, times=4)

    assert verdict.equal
    assert len({one.step for one in verdict.interruptions}) == 4
    assert not verdict.remarks


def test_a_family_of_ones_own_resumes_to_the_bit_wherever_it_is_interrupted(tmp_path: Path) -> None:
    """With dropout, running means, a best, and evaluations that draw from Python's random numbers."""
    verdict = verdict_of(defined(tmp_path), times=1000)
    assert verdict.equal
    assert [one.step for one in verdict.interruptions] == list(range(1, 30))


# --------------------------------------------------------------------------------------------- what is not equal

FORGOTTEN = {
    "a counter of the instance": {"term": " * (1 + self.calls)"},
    "a counter of the module": {"term": " * (1 + next(ELSEWHERE))"},
    "a counter of the class": {"term": " * (1 + next(self.count))", "members": "count = itertools.count()"},
    "a generator of its own": {"term": " * self.own.random()", "members": "own = random.Random(0)"},
}
UNSEEDED = {
    "os.urandom": {"term": " * (1 + os.urandom(4)[0])"},
    "the clock": {"term": " * (1 + time.perf_counter_ns() % 1000)"},
    "what was drawn when the file was executed": {"term": " * DRAWN", "module": "DRAWN = float(torch.rand(()))"},
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_a_family_keeps_outside_of_its_checkpoint_is_found(tmp_path: Path, what: str) -> None:
    verdict = verdict_of(defined(tmp_path, **FORGOTTEN[what]), times=2)

    assert not verdict.equal
    assert "two trainings without an interruption are equal" in verdict.remarks[-1]
    for one in verdict.interruptions:
        places = {difference.where: difference for difference in one.differences}
        assert places["curve loss"].first_step == one.step + 1, "the first step after the interruption"
        assert places["curve loss"].elements == 30 - one.step
        weights = places["weights 0.weight"]
        assert 0 < weights.elements <= weights.of == 16
        assert weights.largest is not None
        assert weights.largest > 0
        assert {"optimiser first.0.weight", "average of the loss"} <= places.keys()
        assert not any("random numbers" in place for place in places), "it drew as often as it should"


@pytest.mark.parametrize("what", UNSEEDED)
def test_a_source_that_no_seed_decides_is_found_and_told_from_an_interruption(tmp_path: Path, what: str) -> None:
    verdict = verdict_of(defined(tmp_path, **UNSEEDED[what]), times=1)
    assert not verdict.equal
    assert "two trainings without an interruption differ, too" in verdict.remarks[-1]


def test_each_training_finds_the_random_numbers_elsewhere_as_a_fresh_process_does(tmp_path: Path) -> None:
    """After equal trainings they would stand at one place, and what a file draws when it is executed would be equal."""
    [subject] = verify.of_definition(defined(tmp_path, **UNSEEDED["what was drawn when the file was executed"]), None)
    trial = verify.Trial(subject, subject.config, CPU, 5)
    trial.straight()
    assert trial.compare(trial.straight(), trial.straight)


def test_a_training_that_fails_only_when_it_is_resumed_differs(tmp_path: Path) -> None:
    """What batch needs is made at step 0 alone."""
    path = defined(tmp_path)
    seed = "97 * config.seed"
    needy = path.read_text().replace(seed, "(self.made if step else self.__dict__.setdefault('made', 5))")
    assert needy != path.read_text()
    path.write_text(needy)

    verdict = verdict_of(path, times=1)

    [difference] = verdict.interruptions[0].differences
    assert difference.where == "the training"
    assert "AttributeError" in difference.note


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> verify.Result:
    [subject] = verify.of_definition(defined(tmp_path_factory.mktemp("trained")), None)
    return verify.Trial(subject, subject.config, CPU, 30).straight()


def flip(tensor: torch.Tensor) -> None:
    """Change one element in its last bit."""
    tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def first_of(tree: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(tree.values()))


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "weights 0.weight": lambda state: flip(state["members"]["params"]["0.weight"]),
    "optimiser first.0.weight": lambda state: flip(state["members"]["optimizer"]["first.0.weight"]),
    "optimiser steps": lambda state: flip(state["members"]["optimizer"]["steps"]),
    "carried state module.2.running_mean": lambda state: flip(state["members"]["carried"]["module.2.running_mean"]),
    "average of the loss": lambda state: state["members"]["average"].add_(1e-16 + state["members"]["average"] * 1e-15),
    "best value": lambda state: state["best"].update(value=state["best"]["value"] + 1e-12),
    "best params 0.weight": lambda state: flip(state["best"]["params"]["0.weight"]),
    "the checkpoint's curve val_loss": lambda state: state["curve"].pop(6),
    "torch random numbers": lambda state: state["rng"]["torch"][8:9].add_(1),
    "numpy random numbers": lambda state: state["rng"]["numpy"][1].__setitem__(3, 4),
    "python random numbers": lambda state: state["rng"].update(python=(3, (1,) * 625, None)),
    "step": lambda state: state.update(step=31),
    "anything": lambda state: state.update(anything=1),
}


@pytest.mark.parametrize("where", CHANGES)
def test_one_bit_anywhere_in_the_state_is_a_difference_with_its_place(trained: verify.Result, where: str) -> None:
    other = copy.deepcopy(trained)
    assert list(verify.differences(trained, other)) == []
    CHANGES[where](other.state)
    [found] = verify.differences(trained, other)
    assert found.where == where
    assert 1 <= found.elements <= found.of


def test_zeros_of_either_sign_differ_and_what_is_no_number_equals_itself(trained: verify.Result) -> None:
    def with_weight(value: float) -> verify.Result:
        other = copy.deepcopy(trained)
        other.state["members"]["params"]["0.bias"][0, 0] = value
        other.points.append(("extra", 30, value))
        return other

    assert list(verify.differences(with_weight(float("nan")), with_weight(float("nan")))) == []
    found = list(verify.differences(with_weight(0.0), with_weight(-0.0)))
    assert [(one.where, one.elements, one.largest) for one in found] == [
        ("curve extra", 1, 0.0),
        ("weights 0.bias", 1, 0.0),
    ]


def test_a_point_too_many_is_a_difference(trained: verify.Result) -> None:
    other = copy.deepcopy(trained)
    other.points.append(("loss", 31, 1.0))
    [found] = verify.differences(trained, other)
    assert (found.where, found.elements, found.first_step) == ("curve loss", 1, 31)


# ----------------------------------------------------------------------------------------------- what is compared


def test_a_long_run_is_cut_short_and_still_evaluated_before_the_interruption(tmp_path: Path) -> None:
    path = defined(tmp_path)
    path.write_text(path.read_text().replace("steps: int = 30", "steps: int = 900").replace("= 6", "= 500"))
    verdict = verdict_of(path, times=1)
    assert verdict.steps == verify.STEPS
    assert verdict.remarks == ["trained for 300 of its 900 steps", "with eval_every=75, not 500"]
    assert verdict_of(path, steps=5, times=1).steps == 5


def test_the_same_seed_interrupts_at_the_same_steps(tmp_path: Path) -> None:
    path = defined(tmp_path)
    steps = [[one.step for one in verdict_of(path, seed=seed).interruptions] for seed in (1, 1, 2)]
    assert steps[0] == steps[1] != steps[2]


def test_a_generator_restarts_at_step_0_and_a_stage_may_be_chosen(tmp_path: Path) -> None:
    path = defined(tmp_path)
    path.write_text(path.read_text() + GENERATOR)
    assert [subject.name for subject in verify.of_definition(path, None)] == ["stage net", "stage counted"]
    [subject] = verify.of_definition(path, "counted")
    verdict = verify.verify(subject, CPU)
    assert verdict.equal
    assert not verdict.interruptions
    assert "restarts at step 0" in verdict.remarks[0]
    with pytest.raises(InputError, match="no stage 'cuonted'") as refused:
        verify.of_definition(path, "cuonted")
    assert "counted" in str(refused.value.hint)


def test_a_family_that_fails_without_any_interruption_says_so_with_its_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stage net cannot be trained: KeyError: 'gone'") as refused:
        verdict_of(defined(tmp_path, term=" * {}['gone']"))
    assert "net.py" in str(refused.value.hint)


# ---------------------------------------------------------------------------------------------------- the command


def test_a_run_is_verified_without_a_trace_in_its_study(tmp_path: Path, cli: Any) -> None:
    defined(tmp_path, **FORGOTTEN["a counter of the instance"])
    cli("init", "defs/net.py")
    before = hashlib.sha256((tmp_path / "experiments.db").read_bytes()).hexdigest()

    done = cli("verify-resume", "2", "--times", "1", "--format", "json", code=1)

    [document] = json.loads(done.stdout)
    assert (document["what"], document["steps"], document["equal"]) == ("run 2", 30, False)
    [one] = document["interruptions"]
    assert one["differences"][0] == one["differences"][0] | {"where": "curve loss", "first_step": one["step"] + 1}
    assert "run 2: two trainings without an interruption are equal" in done.stderr
    assert hashlib.sha256((tmp_path / "experiments.db").read_bytes()).hexdigest() == before
    assert not (tmp_path / "checkpoints").exists()


def test_a_definition_is_verified_without_any_study(tmp_path: Path, cli: Any) -> None:
    path = defined(tmp_path)
    path.write_text(path.read_text() + GENERATOR)
    done = cli("verify-resume", "defs/net.py", "--format", "csv")
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert rows[0][:3] == ["what", "interrupted", "equal"]
    assert [(row[0], row[2]) for row in rows[1:]] == [("stage net", "True")] * 3
    assert "stage counted: counted is a generator" in done.stderr
    assert not (tmp_path / "experiments.db").exists()


def test_differences_are_said_in_words(tmp_path: Path, cli: Any) -> None:
    defined(tmp_path, **FORGOTTEN["a counter of the instance"])
    done = cli("verify-resume", "defs/net.py", "--times", "1", "--seed", "3", code=1)
    first, second, *rest = done.stdout.splitlines()
    found = re.fullmatch(r"stage net, interrupted after step (\d+): differs", first)
    assert found
    step = int(found[1])
    assert re.fullmatch(rf"  curve loss: {30 - step} of 30, by up to \S+, from step {step + 1}", second)
    assert len(rest) == 12
    assert re.fullmatch(r"  and \d+ more places: see --format json", rest[-1])


def test_what_cannot_be_verified_is_refused(tmp_path: Path, cli: Any) -> None:
    assert "there is no database" in cli("verify-resume", "7", code=2).stderr
    assert "there is no run" in cli("verify-resume", "9" * 30, code=2).stderr
    assert "--stage s chooses among" in cli("verify-resume", "7", "--stage", "s", code=2).stderr
