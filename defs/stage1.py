"""Stage 1 of the systematic exploration: which of seven switches make a gated RNN learn without BPTT.

All 2^7 settings of the switches x 1, 2 or 3 layers x 32 or 256 states = 768 configs, minus those that cannot be
built or make no sense (see `sensible`) = 432, each trained for 10,000 steps:

    rnnq init defs/stage1.py                 # 432 pending runs; again: 0 added
    rnnq worker --gpu 0                      # as many as the GPU holds, on as many machines as there are
    rnnq status
    rnnq examine --filter "loss<1.9"         # table and figures

Stage 2, the best tenth (43 configs), each trained five times longer and also grown (see `grow`):

    rnnq promote --stage stage1 --top 10%    # makes stage1-2
    rnnq worker --gpu 0

Stage 3, the best ten of these with ten seeds each, to tell differences from noise:

    rnnq promote --stage stage1-2 --top 10 --seeds 10 --set steps=10000 --to stage3
    rnnq worker --gpu 0

`defs/demo.py` is the same study at a size that a CPU trains in minutes.
"""

import rnnq

ON_OFF = [True, False]


def sensible(config):
    """Leave out a layer that reads no state at all, and few states without a way past them.

    With fewer states than there are bytes, a layer without residual cannot pass on what it was given.
    """
    reads_a_state = config["use_new_state"] or config["use_old_state"]
    return reads_a_state and (config["state_size"] >= 256 or config["use_residual"])


def grow(config):
    """Train a winner for 50,000 steps: as it is, with 512 states, and, if it is shallow, with 3 layers too."""
    longer = config | {"steps": 50_000}
    yield longer
    yield longer | {"state_size": 512}
    if config["n_layers"] < 3:
        yield longer | {"n_layers": 3, "state_size": 256}
        yield longer | {"n_layers": 3, "state_size": 512}


stage = rnnq.stage(
    "stage1",
    "dynamics",
    rnnq.grid(
        use_input_gate=ON_OFF,  # gates the layer's input, and what is read of the old state
        use_forget_gate=ON_OFF,  # scales the new state
        use_output_gate=ON_OFF,  # a learned gate on the output in place of SiLU
        use_state_gate=ON_OFF,  # mixes the new state with the old one, as a GRU does
        use_new_state=ON_OFF,  # the output reads the state just made
        use_old_state=ON_OFF,  # the output reads the state before
        use_residual=ON_OFF,  # the output reads the layer's input
        n_layers=[1, 2, 3],
        state_size=[32, 256],
    ).where(sensible),
    base=dict(steps=10_000),
    refine=grow,
)
