"""MAD's six tasks (Poli et al. 2024, arXiv 2403.17844) at baseline difficulty, with a small model.

    python -m memjax.train --config=configs/mad.py:gated_delta_net,task=selective_copy \\
        --workdir=runs/copy

The first argument is a mixer as it reads: two layers of it with SwiGLU, RMSNorm in front of each,
as theirs; width 64 instead of 128, fresh examples at every step instead of 12,800 for 200 epochs,
and 1000 steps of 32 rows, one to two minutes on a CPU core. `macro_accuracy` of memjax.evaluate is
the published measure, a mean over answers; `query_accuracy` is the mean over positions.
memorization keeps MAD's 256 training rows with `--config.data.train_examples=256`.
"""

from memjax import defaults, tasks
from memjax.config import parse_arg

TASKS = (
    "in_context_recall", "noisy_recall", "fuzzy_recall", "selective_copy", "compression",
    "memorization",
)  # fmt: skip


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="gated_delta_net",
        task=("in_context_recall", TASKS),
        dim=64,
        seed=0,
        steps=1000,
        lr=3e-3,
    )
    settings = tasks.settings(arg.task)
    config = defaults.config(
        {"name": arg.task, **settings, "eval_examples": 1280, "train_examples": 0},
        layers=(((arg.mixer,), 2),),
        dim=arg.dim,
        vocab=tasks.make(arg.task, **settings).vocab,
        tie=False,
        std=arg.dim**-0.5,
    )
    config.batch = 32
    config.optim.update(final=0.0, b2=0.999)
    config.eval.update(batches=8, sample=0)
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
