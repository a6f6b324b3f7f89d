"""Whether the best learning rate of a narrow LSTM is that of a wide one: 96 runs, some ten minutes on two cores.

    rnnq init defs/lr_transfer.py
    rnnq worker --processes 2
    rnnq examine

Four widths, four rates half a decade apart, three seeds, under the standard parametrisation and under muP, whose base
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

widths = rnnq.grid(hidden_size=[32, 64, 128, 256])
# the best rate of every width is to lie inside of what is swept
standard = widths * rnnq.grid(use_mup=[False], learning_rate=[10**e for e in (-2.5, -2, -1.5, -1)])
mup = widths * rnnq.grid(use_mup=[True], learning_rate=[10**e for e in (-2, -1.5, -1, -0.5)])

stage = rnnq.stage("lr_transfer", "scaling", rnnq.union(standard, mup).seeds(3), base=base)
