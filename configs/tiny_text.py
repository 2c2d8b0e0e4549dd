"""A small byte model of any cell on Python's standard library, a few minutes on one CPU core.

    python -m memjax.train --config=configs/tiny_text.py:gated_delta_net --workdir=runs/tiny_text

One layer of the cell at its default options and one MLP, width 64, 500 steps of 2 x 256 bytes. The
argument names a cell as in configs/mqar.py. experiments/tiny_text has all cells.
"""

from memjax import cells, defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, cell=("gated_delta_net", cells.named), seed=0, steps=500, lr=3e-3)
    config = defaults.config(
        data={
            "name": "text",
            "glob": "",
            "length": 256,
            "holdout": 0.01,
            "shuffle": 1024,
            "workers": 0,
        },
        layers=(((arg.cell,), 1),),
        dim=64,
        std=0.125,  # 1 / sqrt(width)
    )
    config.batch = 2
    config.eval.sample = 0  # takes longer to compile than most of these models to train
    config.checkpoint.every = 250
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
