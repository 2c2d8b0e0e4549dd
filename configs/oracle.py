"""Sources whose best possible loss is known, so that the model's can be seen beside it.

    python -m memjax.train --config=configs/oracle.py:gated_delta_net --workdir=runs/piecewise
    python -m memjax.train --config=configs/oracle.py:attention,task=bigrams --workdir=runs/bigrams
    python -m memjax.evaluate --workdir=runs/piecewise    # loss and oracle by position

piecewise: binary symbols whose law switches at unseen places, and Bayes' rule for just that
(Genewein et al. 2023, arXiv 2302.03067). bigrams: a language of bigrams in which some tokens are
always followed by one token of the row's own (Bietti et al. 2023, arXiv 2306.00802). The first
argument is a mixer as it reads, two layers of it with SwiGLU, width 64, no positions.
"""

from memjax import defaults, tasks
from memjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="gated_delta_net",
        task=("piecewise", ("piecewise", "bigrams")),
        seed=0,
        steps=1000,
        lr=3e-3,
    )
    settings = tasks.settings(arg.task)
    config = defaults.config(
        {"name": arg.task, **settings, "eval_examples": 1000},
        layers=(((arg.mixer,), 2),),
        vocab=tasks.make(arg.task, **settings).vocab,
        dim=64,
        tie=False,
        std=0.125,  # 1 / sqrt(width)
    )
    config.batch = 32
    config.optim.update(final=0.0, b2=0.999)
    config.eval.update(batches=8, sample=0)
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
