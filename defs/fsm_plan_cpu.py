"""The plan of `fsm_plan.py` on two cores in minutes: its phases, gates, thresholds and questions on small automata.

    rnnq init defs/fsm_plan_cpu.py
    rnnq worker --processes 2
    rnnq plan --save figures

Two or three states instead of five to eight: an LSTM learns them in a minute, and then all at once, as it does the
large ones. (Machines of two states and two actions are of nine kinds, too few to learn the rule from; more actions make
more kinds.) Both sorts of branch are taken, by what the models really do: those that lead on because the large LSTM has
learnt, and the curriculum of the small one because it has not.
"""

from __future__ import annotations

from fsm_plan import plan

SPLITS = dict(n_train=4000, n_val=500, n_test=500)
EASY = dict(states=2, actions=3, demos=2, demo_length=12, query_length=12, **SPLITS)
STANDARD = dict(states=2, actions=4, demos=2, demo_length=16, query_length=16, **SPLITS)
HARD = dict(states=3, actions=3, demos=3, demo_length=20, query_length=20, **SPLITS)
HARDEST = dict(states=3, actions=4, demos=3, demo_length=25, query_length=25, **SPLITS)

MODELS = {
    "large": dict(model="lstm", d_model=64, n_layers=1, lr=5e-3),
    "small": dict(model="lstm", d_model=16, n_layers=1, lr=0.01),
    "vanilla": dict(model="rnn", d_model=32, n_layers=2, lr=3e-3),
    "small_vanilla": dict(model="rnn", d_model=16, n_layers=2, lr=3e-3),
    "deep": dict(model="rnn", d_model=32, n_layers=4, lr=3e-3),
    "transformer": dict(model="transformer", d_model=16, n_layers=2, n_heads=2, d_ff=32, lr=3e-3),
}
EPOCHS = {
    "lstm_5s5a": 16, "vanilla_rnn_5s5a": 6, "small_lstm_5s5a": 10, "small_vanilla_5s5a": 6, "deep_rnn_5s5a": 6,
    "transformer_5s5a": 5, "lstm_5s8a": 16, "small_lstm_5s8a": 16, "lstm_8s8a": 14,
    "linear_probe_large_lstm": 16, "linear_probe_small_lstm": 16, "linear_probe_large_lstm_5s8a": 16,
    "linear_probe_small_lstm_5s8a": 16, "small_lstm_curriculum_stage1": 10, "small_lstm_curriculum_stage2": 10,
    "small_lstm_curriculum_stage3": 10, "lstm_curriculum_5s5a_to_5s8a": 10, "lstm_curriculum_5s8a_to_8s8a": 10,
    "lstm_absorption": 8,
}  # fmt: skip
HOUR = 3600
HOURS = {"easy": 4 / HOUR, "standard": 5 / HOUR, "hard": 7 / HOUR, "hardest": 9 / HOUR, "absorbing": 5 / HOUR}

globals().update(
    plan(
        {
            "easy": EASY,
            "standard": STANDARD,
            "hard": HARD,
            "hardest": HARDEST,
            "absorbing": STANDARD | {"absorbing": True},
        },
        MODELS,
        EPOCHS,
        seeds=(2, 2, 1),
        hours=HOURS,
        probe_hours=1 / HOUR,
        batch_size=16,
        stop_below=0.04,
        open_samples=100,
    )
)
