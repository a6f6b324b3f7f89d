"""Runs that several processes train together: the numbers, what is done when one of them dies, and how all end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rnnq import host, launch
from rnnq.config import Config
from rnnq.errors import InputError
from rnnq.families.base import Family
from rnnq.families.single import Single
from rnnq.ranks import AGAIN, AGAIN_SOUND
from tests.processes import Study, pseudo_text

# A recurrent net over carried streams, with dropout's masks in its batch and a parameter that no loss depends on. In
# the file `plan.json` stands what one of the processes does when it makes a batch: {"stage": {"rank", "step", "do"}}.
STREAMS = """
import json, os, signal
from pathlib import Path

import torch

import rnnq
from rnnq.errors import InputError

LONG, WIDTH = 5, 6


class Config(rnnq.Config):
    metrics = (rnnq.Metric("val_loss", primary=True), rnnq.Metric("loss"))
    best_metric = "val_loss"
    who: str = ""
    steps: int = 20
    lr: float = 0.01
    batch_size: int = 8
    parts: int = 2
    eval_every: int = 10
    log_every: int = 1


def act(config, step):
    plan = json.loads(Path("plan.json").read_text()).get(config.who)
    rank = os.environ.get("RANK", "0")
    Path(f"pid-{os.getpid()}").touch()
    if plan is None or (str(plan["rank"]), plan["step"]) != (rank, step) or Path(f"acted-{config.who}").exists():
        return
    Path(f"acted-{config.who}").touch()
    if plan["do"] == "raise":
        raise KeyError(f"of process {rank}")
    if plan["do"] == "leave":
        raise SystemExit(3)
    leader = int(os.environ["RNNQ_LEADER"].partition(":")[0])
    number, pid = {
        "die": (signal.SIGKILL, os.getpid()), "leader dies": (signal.SIGKILL, leader), "ask": (signal.SIGTERM, leader)
    }[plan["do"]]
    os.kill(pid, number)


class Streams(rnnq.Family):
    Config = Config
    name = "streams"
    training_loss = "loss"

    def init(self, configs):
        [config] = configs
        chance = torch.Generator().manual_seed(config.seed)

        def draw(*shape):
            return torch.randn(1, *shape, generator=chance) / 3

        params = {"cell.w": draw(WIDTH, 2 * WIDTH), "cell.b": draw(WIDTH), "out.w": draw(WIDTH), "idle": draw(3)}
        return rnnq.State(params, {"h": torch.zeros(1, config.batch_size, WIDTH)})

    def batch(self, configs, steps):
        [config], [step] = configs, steps
        act(config, step)
        chance = torch.Generator().manual_seed(1000 * config.seed + step)
        x = torch.randn(config.parts, config.batch_size, LONG, WIDTH, generator=chance)
        mask = (torch.rand(config.parts, config.batch_size, 1, WIDTH, generator=chance) > 0.2) / 0.8
        return {"x": x, "mask": mask}

    def micro_batches(self, data):
        return [{name: tensor[i] for name, tensor in data.items()} for i in range(len(data["x"]))]

    def share(self, data, rank, ranks):
        rows = data["x"].shape[1]
        if rows % ranks:
            raise InputError(f"batch_size={rows} is no multiple of {ranks} processes")
        own = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
        return {name: tensor[:, own] for name, tensor in data.items()}

    def carried_share(self, carried, rank, ranks):
        rows = carried["h"].shape[1]
        return {"h": carried["h"][:, rank * rows // ranks : (rank + 1) * rows // ranks]}

    def joined(self, parts):
        return {"h": torch.cat([part["h"] for part in parts], 1)}

    def loss(self, state, data):
        with open(f"rows-{os.environ.get('RANK', '0')}", "a") as file:
            file.write(f"{len(data['x'])}\\n")
        p, h, total = {name: t[0] for name, t in state.params.items()}, state.carried["h"][0], 0.0
        for t in range(LONG):
            x = data["x"][:, t] * data["mask"][:, 0]
            h = torch.tanh(torch.cat([x, h], 1) @ p["cell.w"].T + p["cell.b"])
            total = total + (h @ p["out.w"] - x.sum(1)).square().mean()
        return (total / LONG)[None], {"h": h.detach()[None]}

    def evaluate(self, state, configs, split):
        h = state.carried["h"]
        assert h.shape[1] == configs[0].batch_size  # of all processes
        return [{f"{split}_loss": float(h.square().mean() + state.params["out.w"].square().mean())}]


for name, more in NAMES_HERE.items():
    globals()[f"stage_{name}"] = rnnq.stage(name, Streams, [{"seed": 1, "who": name, **more}])
"""
HALF_A_SECOND = 0.5
PATIENCE = 60.0  # seconds within which processes that nobody leads end


class Group(Study):
    """A study of runs that are trained by several processes, each of a stage of its own, alike but for its name."""

    def plan(self, **stages: Any) -> None:
        """A stage of one run each: what is done in it, {"rank", "step", "do"}, and other fields of its config."""
        does = {name: plan for name, plan in stages.items() if "do" in plan}
        (self.folder / "plan.json").write_text(json.dumps(does))
        more = {
            name: {k: v for k, v in plan.items() if k not in ("do", "rank", "step")} for name, plan in stages.items()
        }
        self.rnnq("init", self.define(STREAMS.replace("NAMES_HERE", repr(more))))
        self.runs = {name: run for run, name in enumerate(stages, start=1)}

    def train(self, *words: str, n: int = 2, code: int | None = 0) -> str:
        """A worker of n processes, to its end; returns what it wrote."""
        process = self.start("rnnq", "worker", "--nproc", str(n), "--device", "cpu", "--checkpoint-every", "5", *words)
        process.end(code)
        return process.output

    def losses(self, name: str) -> list[tuple[int, float]]:
        """The curve of the training loss."""
        return self.run(self.runs[name])["curves"]["loss"]

    def attempts(self, name: str) -> list[tuple[str, int, int | None]]:
        """How each attempt ended, and from where it began."""
        attempts = self.run(self.runs[name])["attempts"]
        return [(attempt["ended"], attempt["step_from"]) for attempt in attempts]

    def numbers(self, name: str) -> dict[str, Any]:
        """All that a finished run has to show, but for its config and the machine."""
        found = self.result(self.runs[name])
        same = ("curves", "summary", "params", "optimizer", "carried", "average")
        return {name: found[name] for name in same}

    def leaves_nobody(self) -> None:
        """Every process that ever made a batch is gone, or goes soon."""
        pids = [int(path.name.removeprefix("pid-")) for path in self.folder.glob("pid-*")]
        until = time.monotonic() + PATIENCE
        while any(host.process_start(pid) for pid in pids):
            assert time.monotonic() < until, [pid for pid in pids if host.process_start(pid)]
            time.sleep(HALF_A_SECOND)  # they are no children of ours: nothing else tells when they end
        assert pids


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Group, str]]:
    """A group of two trains a run, loses one of its processes in the next, starts anew, and is asked to leave in the
    third, which a worker without others then ends. The fourth is trained by that worker alone."""
    with Group(tmp_path_factory.mktemp("ranks")) as study:
        study.plan(
            calm={},
            killed={"rank": 1, "step": 12, "do": "die"},
            asked={"rank": 1, "step": 13, "do": "ask", "steps": 4000, "log_every": 100, "eval_every": 1000},
            alone={},
        )
        said = study.train()
        study.leaves_nobody()
        yield study, said


def test_two_processes_compute_what_one_does_and_each_goes_through_half_of_every_batch(story):
    study, said = story
    assert "on 2 x cpu" in said
    for rank in (0, 1):
        rows = (study.folder / f"rows-{rank}").read_text().split()
        assert set(rows) == {"4"}
        assert len(rows) >= 2 * 20
    study.rnnq("worker", "--stage", "alone")
    assert {*(study.folder / "rows-0").read_text().split()} == {"4", "8"}
    calm, alone = study.losses("calm"), study.losses("alone")
    assert [step for step, _ in calm] == [step for step, _ in alone] == list(range(1, 21))
    assert max(abs(a - b) for (_, a), (_, b) in zip(calm, alone, strict=True)) < 1e-5
    assert abs(study.run(1)["loss"] - study.run(4)["loss"]) < 1e-5
    assert study.numbers("calm")["params"] != study.numbers("alone")["params"], "or it was not trained by two"


def test_a_run_whose_group_lost_a_process_goes_on_from_its_checkpoint_and_ends_with_the_same_bits(story):
    study, said = story
    assert study.attempts("killed") == [("lost", 0), ("done", 10)]
    assert "process 1 of 2 is gone" in said
    assert study.numbers("killed") == study.numbers("calm")


def test_a_group_that_is_asked_to_leave_saves_its_run_and_another_number_of_processes_ends_it(story):
    study, said = story
    [(ended, _)] = study.attempts("asked")
    assert ended == "released"
    saved = study.named(3)["checkpoint"]["step"]
    assert 13 <= saved < 4000
    assert f"given back at step {saved:,}" in said
    workers = study.rows("SELECT state FROM workers WHERE device = '2 x cpu' ORDER BY started_at")
    assert [row["state"] for row in workers] == ["lost", "left"]
    study.write("UPDATE runs SET budget = :budget WHERE id = 3", budget=saved + 5)
    said = study.rnnq("worker", "--stage", "asked")
    assert f"resumed at step {saved:,}, under other numerics" in said
    assert study.run(3)["state"] == "done"


# a language model whose processes write down how many streams they read
SCALING = """
import os

import rnnq
from rnnq.families.scaling.model import Scaling


class Watched(Scaling):
    name = "watched"

    def loss(self, state, data):
        with open(f"rows-{os.environ.get('RANK', 'alone')}", "a") as file:
            file.write(f"{len(data.tokens)}\\n")
        return super().loss(state, data)


small = dict(data_path="text", tokens="bytes", hidden_size=8, batch_size=6, sequence_length=16, tbptt_length=8,
             gradient_accumulation_steps=2, steps=20, log_every=1, fixed_val_tokens=500, use_mup=True)
two = rnnq.stage("two", Watched, [{}], base=small)
one = rnnq.stage("one", Watched, [{}], base=small)
"""


def test_a_language_model_is_the_same_for_two_processes_that_read_half_of_its_streams_each(tmp_path):
    with Group(tmp_path) as study:
        (study.folder / "text").write_bytes(pseudo_text(40_000))
        study.rnnq("init", study.define(SCALING))
        study.train("--stage", "two")
        study.rnnq("worker", "--stage", "one", "--device", "cpu")
        two, one = (study.run(run)["curves"] for run in (1, 2))
        for rank, streams in (("0", "3"), ("1", "3"), ("alone", "6")):
            assert set((study.folder / f"rows-{rank}").read_text().split()) == {streams}
        assert [step for step, _ in two["loss"]] == list(range(1, 21))
        for metric in ("loss", "val_loss"):
            assert max(abs(a - b) for (_, a), (_, b) in zip(two[metric], one[metric], strict=True)) < 1e-5
        assert two["loss"][-1][1] < two["loss"][0][1] - 0.02, "it learns"


# -------------------------------------------------------------------------------------- what cannot be trained so


UNSHARED = """
import torch

import rnnq


class Config(rnnq.Config):
    steps: int = 3


@rnnq.family(Config)
def yields(config):
    yield {"loss": 1.0}


class Module(rnnq.Family):
    Config = Config
    name = "module"

    def build(self, config):
        return torch.nn.Linear(2, 1)

    def batch(self, config, step):
        return torch.ones(4, 2)

    def loss(self, module, data):
        return module(data).square().mean()


class Shared(Module):
    name = "shared"

    def share(self, data, rank, ranks):
        return data.chunk(ranks)[rank]


one = rnnq.stage("function", yields, [{}])
two = rnnq.stage("module", Module, [{}])
three = rnnq.stage("shared", Shared, [{}])
"""


def test_families_without_shares_are_handed_back_and_the_others_are_trained(tmp_path):
    with Group(tmp_path) as study:
        study.plan(good={}, odd={"batch_size": 7})
        study.rnnq("init", study.define(UNSHARED, "unshared.py"))
        said = study.train(code=2)
        assert study.states() == {1: "done", 2: "pending", 3: "pending", 4: "pending", 5: "done"}
        assert study.rows("SELECT DISTINCT failures FROM runs") == [{"failures": 0}]
        assert "batch_size=7 is no multiple of 2 processes" in said
        assert "yields is a function that yields its numbers" in said
        assert "the family module cannot be trained by several processes: it has no method share" in said
        study.leaves_nobody()


def test_buffers_that_came_to_depend_on_a_share_are_refused():
    family = Single(Norm())
    parts = [{"module.mean": torch.zeros(1, 2), "module.mask": torch.full((1, 2), -torch.inf)} for _ in range(2)]
    assert family.joined(parts) is parts[0]
    parts[1]["module.mean"] += 1
    with pytest.raises(InputError, match="depend on the share that a process goes through: mean"):
        family.joined(parts)


class Norm(Family):
    """A second-level family in name; nothing of it is built."""

    Config = Config
    name = "norm"


def test_bad_options_are_refused_before_anything_starts(tmp_path):
    with Group(tmp_path) as study:
        study.plan(good={})
        for words, problem in {
            ("--nproc", "2", "--processes", "2"): "--nproc 2 and --processes 2 exclude each other",
            ("--nproc", "2", "--pack", "4"): "--nproc 2 and --pack 4 exclude each other",
            ("--nproc", "2", "--gpu", "0"): "--gpu 0 is not one GPU for each of 2",
            ("--nproc", "2", "--gpu", "0,0"): "--gpu 0,0 is not one GPU for each of 2",
            ("--nproc", "2", "--gpu", "0,1"): "there is no GPU 0: no GPU here",
            ("--nproc", "2", "--device", "cuda:0"): "--device cuda:0 is one device",
            ("--gpu", "0,1"): "--gpu 0,1 is not one GPU for each of 1",
            ("--gpu", "x"): "--gpu x: neither the number of a GPU nor several",
        }.items():
            said = study.rnnq("worker", *words, code=2)
            assert problem in said
            assert "hint: " in said or "exclude" in said
        assert study.rows("SELECT id FROM workers") == []


# --------------------------------------------------------------------------------------------------- all that can die


@pytest.mark.slow
def test_a_run_whose_worker_died_is_taken_back_by_the_group_that_takes_its_place(tmp_path):
    with Group(tmp_path) as study:
        study.plan(calm={}, killed={"rank": 0, "step": 12, "do": "die"}, after={})
        study.train()
        study.leaves_nobody()
        assert study.attempts("killed") == [("lost", 0), ("done", 10)]
        assert study.numbers("killed") == study.numbers("calm") == study.numbers("after")


@pytest.mark.slow
def test_an_error_of_a_runs_code_in_any_process_is_the_runs_and_ends_no_other(tmp_path):
    with Group(tmp_path) as study:
        plans = {"its": {"rank": 1, "step": 7, "do": "raise"}, "mine": {"rank": 0, "step": 7, "do": "raise"}}
        study.plan(**plans, left={"rank": 1, "step": 7, "do": "leave"}, after={"steps": 5})
        said = study.train(code=1)
        study.leaves_nobody()
        assert study.states() == {1: "failed", 2: "failed", 3: "failed", 4: "done"}
        for run, rank in ((1, 1), (2, 0)):
            row = study.run(run)
            assert (row["cause"], row["message"]) == ("bug", f"KeyError: 'of process {rank}'")
            assert "in act" in row["attempts"][0]["traceback"]
        assert study.run(3)["message"] == "SystemExit: 3"
        assert said.count("FAILED (bug)") == 3


@pytest.mark.slow
def test_a_group_that_may_train_one_run_is_not_started_anew_when_that_fails(tmp_path):
    with Group(tmp_path) as study:
        study.plan(its={"rank": 1, "step": 3, "do": "raise"}, after={})
        said = study.train("--runs", "1", code=1)
        assert study.states() == {1: "failed", 2: "pending"}
        assert said.count("worker ") == 1


def test_only_groups_that_fail_at_once_and_in_a_row_are_suspected():
    count = 0
    for code, seconds, expected in (
        (AGAIN, 9.0, 1),
        (AGAIN, 9.0, 2),
        (AGAIN_SOUND, 9.0, 1),  # a run had ended well before the one that failed
        (AGAIN, 9.0, 2),
        (AGAIN, 61.0, 0),
        (AGAIN_SOUND, 61.0, 0),
    ):
        count = launch._quick(count, code, seconds)
        assert count == expected


@pytest.mark.slow
def test_a_group_whose_leader_is_killed_gives_its_run_back_and_leaves_nobody(tmp_path):
    with Group(tmp_path) as study:
        study.plan(orphan={"rank": 1, "step": 12, "do": "leader dies", "steps": 100_000, "log_every": 1000})
        study.train(code=-9)
        study.leaves_nobody()
        assert study.attempts("orphan") == [("released", 0)]
        assert study.named(1)["checkpoint"]["step"] >= 12


@pytest.mark.slow
def test_three_processes_resume_to_the_bit_though_their_sums_have_an_order(tmp_path):
    with Group(tmp_path) as study:
        study.plan(
            calm={"batch_size": 6},
            killed={"batch_size": 6, "rank": 2, "step": 12, "do": "die"},
        )
        study.train(n=3)
        assert study.attempts("killed") == [("lost", 0), ("done", 10)]
        assert study.numbers("killed") == study.numbers("calm")
