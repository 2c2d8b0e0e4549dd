"""A byte language model of any mixer on your own text files.

    python -m memjax.train --config='configs/text.py:gated_delta_net,glob=~/books/**/*.txt' \\
        --workdir=runs/books

The first argument is a cell or a block as it reads, such as `hybrid(sliding_window, delta_net)`;
`layers`, `dim`, `length`, `steps` and `seed` may follow. Without `glob` the text is the Python
standard library's sources.
"""

from memjax import defaults
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="hybrid(sliding_window, gated_delta_net)",
        glob="",
        layers=6,
        dim=256,
        length=512,
        steps=5000,
        seed=0,
    )
    config = defaults.config(
        data={
            "name": "text",
            "glob": arg.glob,  # '' for the standard library's sources
            "length": arg.length,
            "holdout": 0.05,  # of the files
            "shuffle": 1024,  # rows of a window within which rows are shuffled
            "workers": 0,
        },
        layers=(((arg.mixer,), arg.layers),),
        dim=arg.dim,
    )
    config.seed, config.steps = arg.seed, arg.steps
    config.eval.every = config.checkpoint.every = 500
    return config
