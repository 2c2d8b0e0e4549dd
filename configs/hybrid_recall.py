"""Recall of pairs that lie beyond a window: hybrids of attention and memory, and their halves.

    python -m memjax.train --config='configs/hybrid_recall.py:mac(titans),seed=1' \\
        --workdir=runs/hybrid_recall

32 tokens bind 4 keys and ask for them at any distance up to 29 tokens; windows see 4 tokens, half
of them fading in B'MOJO, and segments have 4. The first argument is a mixer as it reads;
task=forgetting_mqar binds every key twice. About two minutes on one CPU core;
experiments/hybrid_recall has accuracy against distance.
"""

from memjax import defaults
from memjax.blocks.hybrid import COMBINE
from memjax.blocks.mac import WRITTEN
from memjax.config import UserError, parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="hybrid(sliding_window, gated_delta_net)",
        task=("mqar", ("mqar", "forgetting_mqar")),
        combine=("", ("", *COMBINE)),  # of a hybrid; '' for its default
        written=("", ("", *WRITTEN)),  # into the memory of mac; '' for its default
        stored=0,  # tokens that bmojo keeps; 0 for 8
        seed=0,
        steps=1500,
        lr=1e-2,
    )
    data = {
        "name": arg.task,
        "length": 32,
        "pairs": 4,
        "vocab": 128,
        "power": 1.0,  # queries at any distance, with equal chances
        "noise": True,
        "eval_examples": 3000,
    }
    if arg.task == "forgetting_mqar":
        data["updates"] = 4
    config = defaults.tiny_recall(data, arg.mixer)
    changes = {
        "hybrid": {"combine": arg.combine} if arg.combine else {},
        "sliding_window": {"window": 4},
        "mac": {"segment": 4} | ({"written": arg.written} if arg.written else {}),
        "bmojo_f": {"window": 2},
        "bmojo": {"window": 2, "top": 2, "stored": arg.stored or 8},
    }
    for option, name in (("combine", "hybrid"), ("written", "mac"), ("stored", "bmojo")):
        if arg[option] and name not in config.model.mixers:
            raise UserError(f"{option}={arg[option]} is an option of {name}; given {arg.mixer}")
    for name, options in changes.items():
        if name in config.model.mixers:
            config.model.mixers[name].update(options)
    config.seed, config.steps, config.optim.lr = arg.seed, arg.steps, arg.lr
    return config
