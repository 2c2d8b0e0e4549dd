"""State tracking: parity, arithmetic modulo 5, and words over groups, in rows longer than trained.

    python -m memjax.train --config=configs/formal.py:delta_net,beta_max=2 --workdir=runs/parity
    python -m memjax.train --config=configs/formal.py:delta_product,task=group_words,beta_max=2 \\
        --workdir=runs/s3

The first argument is a mixer as it reads. Layers of it without MLPs, positions or convolutions,
fresh examples at every step. Training has expressions of 3 to 40 symbols and words of 32 elements,
evaluation up to 256 and 128 (xLSTM, Beck et al. 2024, arXiv 2405.04517; Grazzi et al. 2024, arXiv
2411.12537; DeltaProduct, Siems et al. 2025, arXiv 2502.10297). beta_max sets the upper end of a
delta rule's step: 1 keeps eigenvalues of the transition in [0, 1], 2 in [-1, 1]. A parity run takes
about two minutes on a CPU core; experiments/parity_and_groups has results.

    python -m memjax.evaluate --workdir=runs/parity      # accuracy by the size of the expression
"""

from memjax import defaults, tasks
from memjax.config import UserError, parse_arg
from memjax.tasks.group_words import GROUPS

SIZES = {"length": 40, "min_size": 3, "max_size": 40}
LONGER = {"length": 256, "min_size": 40, "max_size": 256}
TASKS = {
    "parity": (SIZES, LONGER),
    "modular_arithmetic": (SIZES, LONGER),
    "bracket_arithmetic": (SIZES, LONGER),
    "group_words": ({"length": 33}, {"length": 129}),
}


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="delta_net",
        task=("parity", tuple(TASKS)),
        group=("S3", tuple(GROUPS)),
        beta_max=0.0,  # 0: the mixer's default
        dim=64,
        heads=4,
        layers=1,
        seed=0,
        steps=2000,
        lr=3e-3,
    )
    trained, tested = TASKS[arg.task]
    settings = tasks.settings(arg.task) | trained
    if arg.task == "group_words":
        settings["group"] = arg.group
    source = tasks.make(arg.task, **settings)
    config = defaults.config(
        {"name": arg.task, **settings, "eval_examples": 2000, "test": tested},
        layers=(((arg.mixer,), arg.layers),),
        dim=arg.dim,
        vocab=source.vocab,
        mlp=0.0,
        std=arg.dim**-0.5,
    )
    for mixer in config.model.mixers.values():
        mixer.update({k: v for k, v in plain(arg).items() if k in mixer})
    if arg.beta_max:
        having = [mixer for mixer in config.model.mixers.values() if "beta_max" in mixer]
        if not having:
            raise UserError(f"beta_max={arg.beta_max}: {arg.mixer} has no such option")
        for mixer in having:
            mixer.beta_max = arg.beta_max
    config.batch = 64
    config.optim.update(final=0.0, weight_decay=0.0, b2=0.999)
    config.eval.update(batches=8, sample=0)
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config


def plain(arg):
    """Options of a mixer that remember nothing beside its memory."""
    return {"heads": arg.heads, "rotary_base": 0.0, "convolution": 0, "gate": "none"}
