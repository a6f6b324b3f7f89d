"""The study of defs/stage1.py at a size for two CPU cores: 28 small nets on the source of Python's standard library.

rnnq init defs/demo.py
rnnq worker & rnnq worker & wait
rnnq examine --stage demo
rnnq promote --stage demo --top 10%
rnnq worker
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
    ).where(lambda c: c["use_new_state"] or c["use_residual"] or c["n_layers"] == 1),
    base=dict(use_old_state=True, state_size=64, batch_size=32, window=256, steps=2_000, eval_every=500),
    refine=grow,
)
