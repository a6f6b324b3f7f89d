"""The study of defs/lstm_scaling.py at a size for two CPU cores: does muP keep the best learning rate where it is?

    rnnq init defs/lstm_scaling_cpu.py
    rnnq worker --processes 2
    rnnq examine --across

Three widths in the standard parametrisation and in muP, each at four learning rates with two seeds, on the bytes of
Python's standard library: no download, about two minutes.
"""

from __future__ import annotations

from rnnq.definitions import create_multi_lr_experiments, create_multi_seed_experiments

CONFIG = {
    "data_path": "stdlib",
    "tokens": "bytes",
    "fixed_val_tokens": 16_384,
    "num_layers": 1,
    "input_dropout": 0.0,
    "hidden_dropout": 0.0,
    "output_dropout": 0.0,
    "mup_base_width": 16,
    "batch_size": 16,
    "sequence_length": 64,
    "gradient_accumulation_steps": 1,
    "steps": 300,
    "lr_schedule": "cosine_warmup",
    "csv_log_interval": 60,
}
RATES = [10**-2, 10**-1.5, 10**-1, 10**-0.5]


def widths(name, ending, **more):
    """A group with a run for each width."""
    runs = [{"label": f"lstm_{h}d{ending}", "overrides": {"hidden_size": h, **more}} for h in (16, 32, 64)]
    return {"name": name, "subexperiments": runs}


STANDARD = widths("lstm_cpu", "")
MUP = widths("lstm_cpu_mup", "_mup", use_mup=True)

EXPERIMENTS = create_multi_seed_experiments(
    create_multi_lr_experiments([STANDARD, MUP], RATES, max_characters=None), [0, 1]
)
