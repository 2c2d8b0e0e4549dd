"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927), small enough for a CPU.

    python -m memjax.train --config=configs/mqar.py:delta_net --workdir=runs/mqar

The argument names a cell (`memjax.cells.names()`), and may set seed, steps and lr:
`configs/mqar.py:linear_attention,seed=1`.
"""

from memjax import cells, defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, cell=("delta_net", cells.names()), seed=0, steps=1500, lr=3e-3)
    config = defaults.config(
        data={
            "name": "mqar",
            "length": 64,
            "pairs": 8,
            "vocab": 1024,
            "power": 0.01,
            "noise": True,
            "eval_examples": 3000,
        },
        layers=((("base_conv", arg.cell), 1),),
        mixers={arg.cell: recall_options(arg.cell)},
        vocab=1024,
        dim=64,
        mlp=0.0,
        norm="layer",
    )
    config.seed, config.steps, config.batch = arg.seed, arg.steps, 64
    config.optim.update(lr=arg.lr, b2=0.999, final=0.0)
    config.eval.update(every=500, batches=8)
    config.checkpoint.every = 500
    return config


def recall_options(cell):
    """One head of the model's width and nothing but the memory: no convolution, no positions."""
    if cell in ("attention", "sliding_window"):
        return {"heads": 1, "rotary_base": 0.0}
    return {"heads": 1, "convolution": 0, "norm": "layer", "gate": "none"}
