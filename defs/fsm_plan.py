"""In-context automata: a compute plan of seven phases, run from one file.

A model reads a few walks through an automaton that it has never seen, and says how the next one goes on. Which
architectures learn to look that up, at which size, and what do their states hold? The plan is that of seed 004: five
seeds for what everything else rests on, three elsewhere, one for what is tried only where the direct way fails.

    rnnq plan --dry-run defs/fsm_plan.py      # what it will cost, and in which order
    rnnq init defs/fsm_plan.py
    rnnq worker --gpu 0                       # as many as there are GPUs
    rnnq plan                                 # where it stands; why a branch was taken or left out
    rnnq plan --answers                       # the five hypotheses, as far as the runs decide them

`defs/fsm_plan_cpu.py` runs the same plan on small automata in minutes.
"""

from __future__ import annotations

from typing import Any

import rnnq

# val_score: how far a model is from the best shortcut (0) to what the demonstrations tell at all (1), at the best
# checkpoint; for a condition the median over seeds counts
LEARNS_WELL = 0.95
WELL, NOT_WELL = (f"median(val_score) {sign} {LEARNS_WELL}" for sign in (">=", "<"))
ALIKE = 0.02  # accuracies that lie no further apart are called equal

FIRST, PROBES, SCALING, FALLBACK, BONUS = 50, 40, 30, 20, 10  # priorities, in the order that the plan recommends

EASY = dict(states=3, actions=3)
STANDARD = dict(states=5, actions=5)
# with demonstrations of this length three of them do not tell all: no model can be right more often than 99.1 %,
# and on 8s8a than 97.4 %. So branches go by val_score, which knows that, and not by accuracy
HARD = dict(states=5, actions=8, demo_length=70)
HARDEST = dict(states=8, actions=8, demo_length=80)
ABSORBING = dict(states=5, actions=5, demo_length=60, absorbing=True)

LARGE = dict(model="lstm", d_model=256, n_layers=2)
SMALL = dict(model="lstm", d_model=64, n_layers=2)
MODELS = {
    "large": LARGE,
    "small": SMALL,
    "vanilla": dict(model="rnn", d_model=256, n_layers=2),
    "small_vanilla": dict(model="rnn", d_model=64, n_layers=2),
    "deep": dict(model="rnn", d_model=256, n_layers=8),
    "transformer": dict(model="transformer", d_model=64, n_layers=2, n_heads=4, d_ff=128),  # as large as `small`
}
EPOCHS = {
    "lstm_5s5a": 32, "vanilla_rnn_5s5a": 21, "small_lstm_5s5a": 32, "small_vanilla_5s5a": 32, "deep_rnn_5s5a": 32,
    "transformer_5s5a": 32, "lstm_5s8a": 48, "small_lstm_5s8a": 64, "lstm_8s8a": 100,
    "linear_probe_large_lstm": 16, "linear_probe_small_lstm": 32, "linear_probe_large_lstm_5s8a": 16,
    "linear_probe_small_lstm_5s8a": 16, "small_lstm_curriculum_stage1": 16, "small_lstm_curriculum_stage2": 16,
    "small_lstm_curriculum_stage3": 32, "lstm_curriculum_5s5a_to_5s8a": 32, "lstm_curriculum_5s8a_to_8s8a": 32,
    "lstm_absorption": 32,
}  # fmt: skip
# hours of an epoch on a GPU, as the plan guessed them; its guess for a probe is an hour for 16 epochs
HOURS = {"easy": 1 / 32, "standard": 3 / 32, "hard": 5 / 48, "hardest": 7 / 64, "absorbing": 3 / 32}
PROBE_HOURS = 1 / 16


def plan(
    data: dict[str, dict[str, Any]],
    models: dict[str, dict[str, Any]],
    epochs: dict[str, int],
    seeds: tuple[int, int, int],
    hours: dict[str, float],
    probe_hours: float,
    **base: Any,
) -> dict[str, rnnq.Stage | rnnq.Question]:
    """The stages and questions of the plan, by their names.

    data     automata by how hard they are: easy, standard, hard, hardest, absorbing
    seeds    how many for the first priority, elsewhere, and for fallbacks
    hours    that an epoch is guessed to take, by data;  probe_hours: an epoch of a probe
    base     fields of all that is trained
    """
    first, others, single = seeds
    made: dict[str, rnnq.Stage | rnnq.Question] = {}

    def train(name: str, on: str, model: str, n: int, phase: str, priority: int, **gate: Any) -> rnnq.Stage:
        fields = {**base, **data[on], **models[model], "epochs": epochs[name]}
        return add(name, "fsm", fields, n, phase, priority, {**gate, "hours": epochs[name] * hours[on]})

    def decode(name: str, parent: str, on: str, model: str, n: int, **gate: Any) -> rnnq.Stage:
        sizes = {name: value for name, value in models[model].items() if name in ("model", "d_model", "n_layers")}
        fields = {**data[on], **sizes, "epochs": epochs[name]}
        gate |= {"start_from": rnnq.best(parent, same_seed=True), "hours": epochs[name] * probe_hours}
        return add(name, "fsm_probe", fields, n, "5 probes", PROBES, gate)

    def add(
        name: str, family: str, fields: dict[str, Any], n: int, phase: str, priority: int, gate: dict[str, Any]
    ) -> rnnq.Stage:
        stage = rnnq.stage(
            name, family, rnnq.configs([{}]).seeds(n), base=fields, phase=phase, priority=priority,
            label=lambda config: f"{name}_run{config['seed'] + 1}", **gate,
        )  # fmt: skip
        made[name] = stage
        return stage

    one = "seed = 0"  # a fallback starts from one run

    # what can be known at all, and what can be had without looking anything up: beside the learners in every table
    baselines = [{**d, "model": m} for d in data.values() for m in ("solver", "shortcut_u", "shortcut_a", "shortcut_s")]
    made["baselines"] = rnnq.stage(
        "baselines", "fsm", baselines, phase="0 ceilings and floors", priority=FIRST, hours=0.0
    )

    train("lstm_5s5a", "standard", "large", first, "1 baselines", FIRST)
    train("vanilla_rnn_5s5a", "standard", "vanilla", first, "1 baselines", BONUS)
    train("small_lstm_5s5a", "standard", "small", first, "2 equal parameters", FIRST)
    train("small_vanilla_5s5a", "standard", "small_vanilla", first, "2 equal parameters", BONUS)
    train("transformer_5s5a", "standard", "transformer", first, "2 equal parameters", FIRST)
    train("deep_rnn_5s5a", "standard", "deep", first, "3 capacity or architecture", FIRST)

    # the small one and the deep one need only have ended: that they fail is a result, and no reason to stop
    baselines_work = [rnnq.runs_of("lstm_5s5a", when=WELL), "small_lstm_5s5a", "deep_rnn_5s5a"]
    scaling = "4 harder automata"
    train("lstm_5s8a", "hard", "large", others, scaling, SCALING, after=baselines_work, on_failed="go")
    both_well = [rnnq.runs_of("lstm_5s8a", when=WELL), rnnq.runs_of("small_lstm_5s5a", when=WELL)]
    train("small_lstm_5s8a", "hard", "small", others, scaling, SCALING, after=both_well)
    train("lstm_8s8a", "hardest", "large", others, scaling, SCALING, after="lstm_5s8a", when=WELL)

    decode("linear_probe_large_lstm", "lstm_5s5a", "standard", "large", others)
    decode("linear_probe_small_lstm", "small_lstm_5s5a", "standard", "small", others)
    decode("linear_probe_large_lstm_5s8a", "lstm_5s8a", "hard", "large", others, after="lstm_5s8a", when=WELL)
    decode("linear_probe_small_lstm_5s8a", "small_lstm_5s8a", "hard", "small", others,
           after="small_lstm_5s8a", when=WELL)  # fmt: skip

    fallback = "6 curriculum"
    train("small_lstm_curriculum_stage1", "easy", "small", single, fallback, FALLBACK,
          after="small_lstm_5s5a", when=NOT_WELL)  # fmt: skip
    train("small_lstm_curriculum_stage2", "standard", "small", single, fallback, FALLBACK,
          start_from=rnnq.best("small_lstm_curriculum_stage1"))  # fmt: skip
    train("small_lstm_curriculum_stage3", "hard", "small", single, fallback, FALLBACK,
          start_from=rnnq.best("small_lstm_curriculum_stage2"))  # fmt: skip
    train("lstm_curriculum_5s5a_to_5s8a", "hard", "large", single, fallback, FALLBACK,
          after="lstm_5s8a", when=NOT_WELL, start_from=rnnq.best("lstm_5s5a", one))  # fmt: skip
    train("lstm_curriculum_5s8a_to_8s8a", "hardest", "large", single, fallback, FALLBACK,
          after="lstm_8s8a", when=NOT_WELL, start_from=rnnq.best("lstm_5s8a", one))  # fmt: skip

    train("lstm_absorption", "absorbing", "large", others, "7 absorbing states", BONUS)

    return made | questions()


def questions() -> dict[str, rnnq.Question]:
    """The five hypotheses of the plan."""
    direct = ["small_lstm_5s5a", "lstm_5s8a", "lstm_8s8a"]
    curriculum = ["small_lstm_curriculum_stage2", "lstm_curriculum_5s5a_to_5s8a", "lstm_curriculum_5s8a_to_8s8a"]
    found = [
        rnnq.question(
            "H1", "Is a small LSTM as good as a transformer of as many parameters?",
            of="small_lstm_5s5a", against="transformer_5s5a", by="test_acc", margin=ALIKE,
        ),
        rnnq.question(
            "H2", "Is a deep vanilla RNN as good as an LSTM of as many parameters?",
            of="deep_rnn_5s5a", against="lstm_5s5a", by="test_acc", margin=ALIKE,
        ),
        rnnq.question(
            "H3", "Can the next state be read from a small model's states as well as from a large one's?",
            of="linear_probe_small_lstm", against="linear_probe_large_lstm", by="test_acc", margin=ALIKE,
        ),
        rnnq.question(
            "H4", "Do models learn harder automata?",
            of=["lstm_5s8a", "lstm_8s8a"], by="val_score", at_least=LEARNS_WELL,
        ),
        rnnq.question(
            "H5", "Does a curriculum help?", of=curriculum, against=direct, by="test_score", claim="better",
        ),
    ]  # fmt: skip
    return {question.name: question for question in found}


globals().update(  # the names of a definition hold its stages and questions
    plan(
        {"easy": EASY, "standard": STANDARD, "hard": HARD, "hardest": HARDEST, "absorbing": ABSORBING},
        MODELS,
        EPOCHS,
        seeds=(5, 3, 1),
        hours=HOURS,
        probe_hours=PROBE_HOURS,
    )
)
