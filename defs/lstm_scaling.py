"""Width scaling of LSTM language models with and without muP, after hansgundlach/Experimental_Progress.

    rnnq init defs/lstm_scaling.py                                # LSTM_SGD_MUP_SCALING: five widths
    rnnq init defs/lstm_scaling.py:LSTM_OPTIMAL_SCALING           # another list of this file
    rnnq init defs/lstm_scaling.py --only lstm_16d_sgd_mup
    rnnq worker --gpu 0

The text is a file of your own: `DATA` below, a path or one from the working directory. The published study read C4,
which is not shipped. With `pip install datasets`, this writes enough of it for the widest run, 1.04e9 characters:

    from datasets import load_dataset
    with open("c4_subset.txt", "w", encoding="utf-8") as file:
        written = 0
        for document in load_dataset("allenai/c4", "en", split="train", streaming=True):
            written += file.write(document["text"] + "\\n")
            if written > 1.05e9:
                break

defs/lstm_scaling_cpu.py is a small sibling that needs neither a download nor a GPU. What differs from the published
study stands at each line; docs/definitions.md tells how such a list is made and changed.
"""

from __future__ import annotations

from rnnq.definitions import (
    NARROW_LR_SWEEP,
    create_multi_lr_experiments,
    create_multi_seed_experiments,
    subset_experiments,
)

DATA = "c4_subset.txt"

CONFIG = {
    "data_path": DATA,
    "tokens": "gpt2",  # there a folder, tokenizer_path
    "max_characters": 5e7,
    "train_split": 0.8,
    "val_split": 0.1,  # of the whole file: all runs are measured on one text; there it was of each run's own
    "test_split": 0.1,
    "hidden_size": 16,
    "num_layers": 2,
    "input_dropout": 0.2,
    "hidden_dropout": 0.1,
    "output_dropout": 0.2,
    "use_layer_norm": True,
    "layer_norm_position": "output",
    "use_mup": False,  # there True, so that its standard baselines were not
    "mup_base_width": 16,
    "batch_size": 32,  # on each of two GPUs: twice as many were read in a step
    "sequence_length": 128,
    "gradient_accumulation_steps": 16,
    "num_epochs": 1,
    "optimizer": "adamw",
    "learning_rate": 0.002,
    "weight_decay": 0.01,
    "lr_schedule": "cosine",  # over the steps; there over epochs, of which there is one, so that no rate ever changed
    "step_size": 10,
    "gamma": 0.1,
    "use_gradient_clipping": True,
    "gradient_clip_val": 1.0,
    "use_amp": False,
    "csv_log_interval": 320,  # every 20 optimiser steps; there every 20 micro-batches, and most time went into it
    "seed": 123,
}

WIDTHS = (16, 24, 32, 48, 64)
CHARACTERS = dict(
    zip(WIDTHS, (258e6, 387.4e6, 517.2e6, 777.6e6, 1039.8e6), strict=True)
)  # 40 tokens a parameter, of 4 characters each
ROUNDED = dict(zip(WIDTHS, (258e6, 386e6, 516e6, 776e6, 1038e6), strict=True))
BEST_LR = {16: 10**-1.5, 24: 10**-1.5, 32: 10**-1.5, 48: 10**-2, 64: 10**-2}
SGD = {"optimizer": "sgd"}
MUP = {"use_mup": True, "mup_base_width": 16}  # as it should be: Adam and SGD have rules of their own; there one, wrong


def group(name, runs):
    """A group of runs from their labels and overrides."""
    return [{"name": name, "subexperiments": [{"label": label, "overrides": found} for label, found in runs.items()]}]


def width(hidden_size, learning_rate, max_characters, **more):
    """The overrides of a run of one width."""
    return {"learning_rate": learning_rate, "hidden_size": hidden_size, "max_characters": max_characters, **more}


TEST_EXPERIMENTS = group("LSTM_benchmark", {"LSTM_1.6M_Benchmark": width(16, 0.002, 5e7)})

LSTM_OPTIMAL_SCALING = group("lstm_optimal_scaling", {f"lstm_{h}d": width(h, BEST_LR[h], ROUNDED[h]) for h in WIDTHS})
LSTM_SGD_OPTIMAL_SCALING = group(
    "lstm_sgd_optimal_scaling", {f"lstm_{h}d_sgd": width(h, 0.1, CHARACTERS[h], **SGD) for h in WIDTHS}
)
LSTM_SGD_MUP_SCALING = group(  # its name began with `lsmt` there
    "lstm_sgd_mup_scaling", {f"lstm_{h}d_sgd_mup": width(h, 0.1, CHARACTERS[h], **SGD, **MUP) for h in WIDTHS}
)
LSTM_MUP_SCALING_EXPERIMENTS = group(
    "muP_scaling_experiments", {f"lstm_{h}d_mup": width(h, 10**-1.5, CHARACTERS[h], **MUP) for h in WIDTHS}
)
MUP_SCALING_EXPERIMENTS = LSTM_MUP_SCALING_EXPERIMENTS  # as its README calls them

LSTM_LR_EXPERIMENTS = group(
    "lstm_lr_experiments",
    {
        f"24d_lstm_lr_1e{exponent}": width(24, 10 ** float(exponent), 193.7e6)
        for exponent in ("-1", "-1.5", "-2", "-2.5", "-3", "-3.5", "-4")
    },
)

LSTM_VARIATIONS = group(
    "lstm_variations",
    {
        "lstm_24d_layernorm": width(24, 10**-1.5, 193.7e6),
        "lstm_24d_3_layers": width(24, 10**-1.5, 193.7e6, num_layers=3),
        "lstm_24d_no_layer_norm": width(24, 10**-1.5, 193.7e6, use_layer_norm=False),
        "lstm_24d_cosine_warmup": width(24, 10**-1.5, 193.7e6, lr_schedule="cosine_warmup"),  # there without effect
        "lstm_24d_inverse_sqrt": width(24, 10**-1.5, 193.7e6, lr_schedule="inverse_sqrt"),  # there without effect
    },
)

# each width with each rate on the text of one budget: what a rate that is tuned at 16d is worth at 64d
LSTM_LR_SWEEPS = create_multi_lr_experiments(LSTM_OPTIMAL_SCALING, NARROW_LR_SWEEP)
LSTM_SGD_MUP_LR_SWEEPS = create_multi_lr_experiments(LSTM_SGD_MUP_SCALING, NARROW_LR_SWEEP)
# error bars for the narrow ones
LSTM_SGD_MUP_SEEDS = create_multi_seed_experiments(
    subset_experiments(LSTM_SGD_MUP_SCALING, {"lstm_16d_sgd_mup", "lstm_24d_sgd_mup"}), [123, 124, 125]
)

EXPERIMENTS = LSTM_SGD_MUP_SCALING
