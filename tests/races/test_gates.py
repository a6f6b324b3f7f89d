"""Two parents that end at the same moment open their gate, whoever looks; and a plan survives its workers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from rnnq import db, gates, queue
from tests.conftest import ROOT, address_of, new_runs, new_stage
from tests.processes import Study

ROUNDS = 200

# Ends one run of each round at a moment that all processes are told, and looks at the gates as a worker does then.
PARENT = """
import json, sys, time
from rnnq import db, queue
from tests.conftest import PROVENANCE

engine = db.open(sys.argv[1])
name, rounds = sys.argv[2], int(sys.argv[3])
queue.register(engine, name, "cpu", {})
claims = queue.claim(engine, name, PROVENANCE, limit=rounds, stage=name)
print(json.dumps([claim.config["seed"] for claim in claims]), flush=True)
for claim in claims:
    moment = float(sys.stdin.readline())
    while time.monotonic() < moment:  # the clock is one for all processes
        pass
    queue.finish(engine, claim, 10, {"loss": 1.0}, "loss")
    found = queue.decide(engine)
    print(json.dumps([run for decided in found for run in decided.runs]), flush=True)
queue.leave(engine, name, "done")
"""


@pytest.mark.both
def test_two_parents_that_end_at_the_same_moment_open_their_gate_200_times_of_200(engine: Engine) -> None:
    def behind(seed: int) -> str:
        return gates.Gate((gates.Parents("left", seed=seed), gates.Parents("right", seed=seed))).to_json()

    parents = [new_stage(name=name, runs=new_runs(ROUNDS)) for name in ("left", "right")]
    children = [replace(run, gate=behind(run.seed or 0)) for run in new_runs(ROUNDS)]
    queue.init(engine, [*parents, new_stage(name="child", runs=children)])
    command = [sys.executable, "-c", PARENT, address_of(engine)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(subprocess.Popen([*command, n, str(ROUNDS)], **pipes)) for n in ("left", "right")]
        for one in both:
            stack.callback(one.kill)
        seeds = [json.loads(one.stdout.readline()) for one in both]
        assert seeds[0] == seeds[1] == list(range(ROUNDS))
        opened_by = [0, 0]
        for _ in range(ROUNDS):
            moment = time.monotonic() + 0.005
            for one in both:
                one.stdin.write(f"{moment}\n")
                one.stdin.flush()
            opened = [json.loads(one.stdout.readline()) for one in both]
            assert sum(map(len, opened)) == 1, "one of the two saw that both had ended, and one alone"
            opened_by[0 if opened[0] else 1] += 1
        assert [one.wait(60) for one in both] == [0, 0]
    print(f"opened by the left one: {opened_by[0]}, by the right one: {opened_by[1]}")
    with db.reading(engine) as connection:
        found = connection.execute(text("SELECT state, count(*) AS n FROM runs WHERE stage = 'child' GROUP BY state"))
        assert [tuple(row) for row in found] == [("pending", ROUNDS)]


CHAIN = """
import os
import rnnq

class Config(rnnq.Config):
    metrics = (rnnq.Metric("loss", primary=True), rnnq.Metric("score", better="max"))
    steps: int = 3

@rnnq.family(Config)
def kills(config):
    for step in range(config.steps):
        if step == 1 and not os.path.exists(f"killed{config.seed}"):
            open(f"killed{config.seed}", "w").close()
            os.kill(os.getpid(), 9)
        yield {"loss": 1.0 - config.seed, "score": 0.9}

base = rnnq.stage("base", kills, rnnq.grid(steps=[3]).seeds(2))
well = rnnq.stage("well", kills, rnnq.grid(steps=[4]).seeds(2), after="base", when="mean(score) >= 0.9")
badly = rnnq.stage("badly", kills, rnnq.grid(steps=[5]).seeds(2), after="base", when="mean(score) < 0.9")
last = rnnq.stage("last", kills, rnnq.grid(steps=[6]).seeds(2), after=["well", "badly"], on_failed="go")
"""


def test_a_plan_goes_on_to_its_end_when_the_workers_of_its_parents_are_killed(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        study.rnnq("init", study.define(CHAIN))
        killed = [study.start("rnnq", "worker") for _ in range(2)]
        for worker in killed:
            worker.end(-9)
        workers = [study.start("rnnq", "worker") for _ in range(2)]
        for worker in workers:
            worker.end(0)
        found = study.rows("SELECT stage, state, count(*) AS n FROM runs GROUP BY stage, state ORDER BY stage")
        assert [tuple(row.values()) for row in found] == [
            ("badly", "skipped", 2), ("base", "done", 2), ("last", "done", 2), ("well", "done", 2),
        ]  # fmt: skip
        decided = study.rows("SELECT stage, decision FROM gates ORDER BY id")
        assert [tuple(row.values()) for row in decided] == [("well", "open"), ("badly", "shut"), ("last", "open")]
        reasons = {row["message"] for row in study.rows("SELECT message FROM runs WHERE stage = 'badly'")}
        assert reasons == {"mean(score) < 0.9 does not hold of base: mean(score) = 0.9 (n = 2)"}
