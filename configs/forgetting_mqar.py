"""Recall of keys that are bound twice: only the last value counts.

    python -m memjax.train --config=configs/forgetting_mqar.py:delta_net --workdir=runs/forgetting

As configs/mqar.py, but all 8 keys are bound a second time before the queries. A memory that only
adds keeps both values and answers at most half of the queries; so does attention without positions,
which cannot tell the two bindings apart. The delta rule removes the first: 0.98 after 500 steps,
half a minute on one CPU core (experiments/forgetting_mqar).
"""

from memjax import cells, defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, cell=("delta_net", cells.named), seed=0, steps=1000, lr=1e-2)
    data = {
        "name": "forgetting_mqar",
        "length": 64,
        "pairs": 8,
        "updates": 8,  # pairs that are bound again
        "vocab": 1024,
        "power": 0.01,
        "noise": True,
        "eval_examples": 3000,
    }
    config = defaults.tiny_recall(data, arg.cell)
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
