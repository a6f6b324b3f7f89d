"""The plan of seed 004 as a definition: its table, and its sibling for two cores run whole, with a worker killed."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from rnnq import definitions, gates, plan, queue
from tests.conftest import ROOT
from tests.processes import Study

# node of the plan -> how many runs, and of what: model, width, layers, states, actions, epochs
TABLE = {
    "lstm_5s5a": (5, "lstm", 256, 2, 5, 5, 32),
    "vanilla_rnn_5s5a": (5, "rnn", 256, 2, 5, 5, 21),
    "small_lstm_5s5a": (5, "lstm", 64, 2, 5, 5, 32),
    "small_vanilla_5s5a": (5, "rnn", 64, 2, 5, 5, 32),
    "deep_rnn_5s5a": (5, "rnn", 256, 8, 5, 5, 32),
    "transformer_5s5a": (5, "transformer", 64, 2, 5, 5, 32),
    "lstm_5s8a": (3, "lstm", 256, 2, 5, 8, 48),
    "small_lstm_5s8a": (3, "lstm", 64, 2, 5, 8, 64),
    "lstm_8s8a": (3, "lstm", 256, 2, 8, 8, 100),
    "linear_probe_large_lstm": (3, "lstm", 256, 2, 5, 5, 16),
    "linear_probe_small_lstm": (3, "lstm", 64, 2, 5, 5, 32),
    "linear_probe_large_lstm_5s8a": (3, "lstm", 256, 2, 5, 8, 16),
    "linear_probe_small_lstm_5s8a": (3, "lstm", 64, 2, 5, 8, 16),
    "small_lstm_curriculum_stage1": (1, "lstm", 64, 2, 3, 3, 16),
    "small_lstm_curriculum_stage2": (1, "lstm", 64, 2, 5, 5, 16),
    "small_lstm_curriculum_stage3": (1, "lstm", 64, 2, 5, 8, 32),
    "lstm_curriculum_5s5a_to_5s8a": (1, "lstm", 256, 2, 5, 8, 32),
    "lstm_curriculum_5s8a_to_8s8a": (1, "lstm", 256, 2, 8, 8, 32),
    "lstm_absorption": (3, "lstm", 256, 2, 5, 5, 32),
}
PARENTS = {
    "lstm_5s8a": {"lstm_5s5a", "small_lstm_5s5a", "deep_rnn_5s5a"},
    "small_lstm_5s8a": {"lstm_5s8a", "small_lstm_5s5a"},
    "lstm_8s8a": {"lstm_5s8a"},
    "linear_probe_large_lstm": {"lstm_5s5a"},
    "linear_probe_small_lstm": {"small_lstm_5s5a"},
    "linear_probe_large_lstm_5s8a": {"lstm_5s8a"},
    "linear_probe_small_lstm_5s8a": {"small_lstm_5s8a"},
    "small_lstm_curriculum_stage1": {"small_lstm_5s5a"},
    "small_lstm_curriculum_stage2": {"small_lstm_curriculum_stage1"},
    "small_lstm_curriculum_stage3": {"small_lstm_curriculum_stage2"},
    "lstm_curriculum_5s5a_to_5s8a": {"lstm_5s8a", "lstm_5s5a"},
    "lstm_curriculum_5s8a_to_8s8a": {"lstm_8s8a", "lstm_5s8a"},
}


@functools.cache  # it makes the data of five kinds of automata
def planned(name: str) -> dict[str, queue.NewStage]:
    made = plan.from_definitions([definitions.load(ROOT / "defs" / name)], ROOT / "defs")
    queue.refuse_gates(made)
    return {stage.name: stage for stage in made}


def test_the_plan_has_every_node_of_the_table_with_its_gate() -> None:
    stages = planned("fsm_plan.py")
    assert stages.keys() == TABLE.keys() | {"baselines"}
    for name, (n, model, width, layers, states, actions, epochs) in TABLE.items():
        configs = [json.loads(run.config) for run in stages[name].runs]
        fields = ("model", "d_model", "n_layers", "states", "actions", "epochs")
        assert [tuple(c[f] for f in fields) for c in configs] == [(model, width, layers, states, actions, epochs)] * n
        assert [run.label for run in stages[name].runs] == [f"{name}_run{i + 1}" for i in range(n)]
        assert [run.seed for run in stages[name].runs] == list(range(n))
        found = [gates.of_json(run.gate) for run in stages[name].runs if run.gate]
        assert {parents.stage for gate in found for parents in gate.after} == PARENTS.get(name, set()), name
    assert {json.loads(run.config)["absorbing"] for run in stages["lstm_absorption"].runs} == {True}
    total = sum(len(stage.runs) for name, stage in stages.items() if name != "baselines")
    assert total == 59


def test_probes_are_paired_with_the_run_of_their_own_seed() -> None:
    for run in planned("fsm_plan.py")["linear_probe_large_lstm"].runs:
        [parents] = gates.of_json(str(run.gate)).after
        assert (parents.stage, parents.seed, parents.start) == ("lstm_5s5a", run.seed, True)


def test_the_sibling_for_two_cores_has_the_same_nodes_gates_and_questions() -> None:
    large, small = planned("fsm_plan.py"), planned("fsm_plan_cpu.py")
    assert list(large) == list(small)
    for name, stage in large.items():
        conditions = [{(p.stage, p.when, p.start) for p in gates.of_json(str(s.runs[0].gate)).after}
                      if s.runs[0].gate else set() for s in (stage, small[name])]  # fmt: skip
        assert conditions[0] == conditions[1], name
        assert len(small[name].runs) <= 2 or name == "baselines"
    questions = [definitions.load(ROOT / "defs" / name).questions for name in ("fsm_plan.py", "fsm_plan_cpu.py")]
    assert [q.name for q in questions[0]] == ["H1", "H2", "H3", "H4", "H5"]
    assert questions[0] == questions[1]


@pytest.mark.slow  # about ten minutes on two cores
def test_the_plan_for_two_cores_goes_to_its_end_with_a_worker_killed_in_the_middle(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        shutil.copytree(ROOT / "defs", tmp_path / "defs")
        study.rnnq("init", "defs/fsm_plan_cpu.py")
        doomed, worker = study.start("rnnq", "worker"), study.start("rnnq", "worker")
        while not study.rows("SELECT 1 AS one FROM runs WHERE stage = 'lstm_5s5a' AND steps_done > 500"):
            doomed.wait(0.5)  # until it is in the middle of something: only the database tells
        doomed.send(signal.SIGKILL)
        again = study.start("rnnq", "worker")
        for one in (worker, again):
            one.wait(3600)  # minutes of training
            one.end(0)
        states = Counter((row["stage"], row["state"]) for row in study.rows("SELECT stage, state FROM runs"))
        ended = {stage: {state for name, state in states if name == stage} for stage, _ in states}
        assert all(found in ({"done"}, {"skipped"}) for found in ended.values()), ended
        # the large LSTM has learnt, and what waits for that was trained; the small one has not
        assert ended["lstm_5s8a"] == ended["lstm_8s8a"] == ended["linear_probe_large_lstm_5s8a"] == {"done"}
        assert ended["small_lstm_5s8a"] == {"skipped"}
        assert ended["small_lstm_curriculum_stage3"] == {"done"}
        decided = {row["decision"] for row in study.rows("SELECT decision FROM gates")}
        assert decided == {"open", "shut"}
        assert [row["n"] for row in study.rows("SELECT count(*) AS n FROM attempts WHERE ended = 'lost'")] == [1]
        selectivity = study.rows(
            "SELECT json_extract(summary, '$.test_selectivity') AS s FROM runs WHERE stage = 'linear_probe_large_lstm'"
        )
        assert all(row["s"] > 0.05 for row in selectivity), selectivity
        answers = study.rnnq("plan", "--answers")
        assert all(f"H{i}" in answers for i in range(1, 6))
