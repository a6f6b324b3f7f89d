"""Whether the best learning rate of a narrow LSTM is that of a wide one: 120 runs, a quarter of an hour on two cores.

    rnnq init defs/lr_transfer.py
    rnnq worker --processes 2
    rnnq examine

Four widths, five rates half a decade apart, three seeds, under the standard parametrisation and under muP, whose base
is the narrowest of them; on the bytes of the standard library's own source, so that nothing is downloaded.
"""

import rnnq

base = {
    "data_path": "stdlib",
    "tokens": "bytes",
    "num_layers": 1,
    "use_layer_norm": False,
    "input_dropout": 0.0,
    "output_dropout": 0.0,
    "batch_size": 16,
    "sequence_length": 64,
    "gradient_accumulation_steps": 1,
    "steps": 300,
    "optimizer": "adam",
    "lr_schedule": "cosine",
    "mup_base_width": 32,
    "fixed_val_tokens": 50_000,
    "csv_log_interval": 100,
}

stage = rnnq.stage(
    "lr_transfer",
    "scaling",
    rnnq.grid(
        hidden_size=[32, 64, 128, 256],
        use_mup=[False, True],
        learning_rate=[10**exponent for exponent in (-3, -2.5, -2, -1.5, -1)],
    ).seeds(3),
    base=base,
)
