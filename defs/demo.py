"""The study of defs/stage1.py at a size for two CPU cores: 32 small nets on the source of Python's standard library.

rnnq init defs/demo.py
workers/local.sh 2 --stage demo
rnnq examine --stage demo
rnnq promote --stage demo --top 10%
workers/local.sh 2 --stage demo-2
"""

import rnnq


def grow(config):
    """A winner trains twice as long; wider; and, if it is shallow, deeper."""
    longer = config | {"steps": 2 * config["steps"]}
    yield longer
    yield longer | {"state_size": 2 * config["state_size"]}
    if config["n_layers"] == 1:
        yield longer | {"n_layers": 2}


stage = rnnq.stage(
    "demo",
    "dynamics",
    rnnq.grid(
        use_forget_gate=[True, False],
        use_state_gate=[True, False],
        use_new_state=[True, False],
        use_residual=[True, False],
        n_layers=[1, 2],
    ),
    base=dict(use_old_state=True, state_size=64, batch_size=32, window=256, steps=1_500, eval_every=500),
    refine=grow,
)
