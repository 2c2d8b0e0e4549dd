"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927), small enough for a CPU.

    python -m memjax.train --config=configs/mqar.py:delta_net --workdir=runs/mqar

64 tokens hold 8 pairs of 1024 token ids, then ask for each of them; the rest is noise. The argument
names a cell (`memjax.cells.names()`), as it is or in a wrapper, and may set seed, steps and lr, as
in `configs/mqar.py:memory_caching(titans),seed=1`. Attention and the delta rules take about a
minute on one CPU core; query accuracy 0.993 or more (experiments/eight_pairs).
"""

from memjax import cells, defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, cell=("delta_net", cells.named), seed=0, steps=1000, lr=1e-2)
    data = {
        "name": "mqar",
        "length": 64,
        "pairs": 8,
        "vocab": 1024,
        "power": 0.01,  # of the power law that draws queries; smaller: nearer to their pairs
        "noise": True,  # random tokens between the queries
        "eval_examples": 3000,
    }
    config = defaults.tiny_recall(data, arg.cell)
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
