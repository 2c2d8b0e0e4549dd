"""Byte models of the standard library with equal parameters, of any memory or hybrid.

    python -m memjax.train --config=configs/lm_stdlib.py:gated_delta_net --workdir=runs/lm
    python -m memjax.train --workdir=runs/lm_hybrid \\
        --config='configs/lm_stdlib.py:hybrid(sliding_window, gated_delta_net)'

Two layers of width 64 at the mixer's default options, windows and segments of 64 bytes, 500 steps
of 4 x 256 bytes; a minute on a CPU core for most. The MLPs are as wide as it takes for the whole
model to have the `parameters` asked for, to the nearest multiple of 8 channels.
experiments/lm_stdlib has all memories.
"""

from memjax import defaults
from memjax.config import parse_arg

SPAN = 64  # bytes of a window or a segment; rows have 256


def get_config(arg=None):
    arg = parse_arg(
        arg, mixer="gated_delta_net", parameters=150_000, dim=64, seed=0, steps=500, lr=3e-3
    )
    config = defaults.config(
        data={
            "name": "text",
            "glob": "",
            "length": 256,
            "holdout": 0.01,
            "shuffle": 1024,
            "workers": 0,
        },
        layers=(((arg.mixer,), 2),),
        dim=arg.dim,
        std=arg.dim**-0.5,
    )
    for name, mixer in config.model.mixers.items():
        for option in {"window", "segment"} & set(mixer) if name != "attention" else ():
            mixer[option] = SPAN  # by default those of bmojo and memory_caching hold a whole row
    config.model.mlp = defaults.mlp(config.model, arg.parameters)
    config.batch = 4
    config.eval.sample = 0  # takes longer to compile than most of these models to train
    config.checkpoint.every = 250
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
