"""A hybrid byte model on the Python standard library's sources.

    make quickstart
    python -m memjax.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from memjax import defaults


def get_config():
    config = defaults.config(
        data={"name": "text", "glob": "", "length": 256, "holdout": 0.05, "workers": 0},
        layers=((("hybrid(sliding_window, gated_delta_net)",), 3),),
        mixers={"sliding_window": {"window": 64}},
        dim=192,
    )
    config.steps = 600
    config.batch = 8
    config.optim.lr = 2e-3
    config.eval.every = 100
    config.checkpoint.every = 100
    return config
