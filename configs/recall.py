"""Any recall task with a small model: [BaseConv, mixer], one head, no MLP, no positions.

    python -m memjax.train --config=configs/recall.py:gated_delta_net,task=mixture \\
        --workdir=runs/recall
    python -m memjax.train --config=configs/recall.py:delta_net,task=joint_recall,dim=32,seed=1 \\
        --workdir=runs/joint

The first argument is a mixer as it reads, such as `memory_caching(titans)`; the tasks are those of
SMALL below, with sizes for a CPU (`python -m memjax.tasks --show=TASK` shows an example), and each
setting can be changed, e.g. --config.data.cells=64x8,128x16. convolution=4 gives the mixer a short
convolution of its own in place of BaseConv; stacked_mqar reads vectors and has neither. 1000 steps
take about a minute on one CPU core with 64 tokens; experiments/mqar has results.

size=published is the mixture of Based (Arora et al. 2024, arXiv 2402.18668) for an accelerator:
8192 tokens, 32 epochs over 180,000 rows in order, batches of 256, tests up to 1024 tokens and 256
pairs. Theirs has no warm-up and no clipping, and steps down the learning rate once an epoch.
"""

from typing import Any

from memjax import defaults, tasks
from memjax.config import UserError, parse_arg

CELLS = "64x4,64x8,64x16,128x32"
SMALL: dict[str, dict[str, Any]] = {
    "mixture": {"task": "mqar", "cells": CELLS, "settings": "vocab=1024"},
    "mqar": {"vocab": 1024},
    "forgetting_mqar": {"updates": 8, "vocab": 1024},
    "compositional_mqar": {"vocab": 1024},
    "joint_recall": {
        "length": 44, "min_contexts": 3, "max_contexts": 3, "min_keys": 3, "max_keys": 3,
        "num_values": 16,
    },
    "associative_recall": {"num_keys": 512},
    "treecall": {"length": 64},
    "stacked_mqar": {"length": 32, "pairs": 16, "num_values": 1024},
}  # fmt: skip
PUBLISHED: dict[str, Any] = {"task": "mqar", "cells": "based", "order": "published"}


def get_config(arg=None):
    arg = parse_arg(
        arg,
        mixer="delta_net",
        task=("mixture", tuple(SMALL)),
        size=("small", ("small", "published")),
        dim=64,
        convolution=0,
        seed=0,
        steps=0,  # 0 for 1000, or 22,500 of the published size
        lr=1e-2,
    )
    published = arg.size == "published"
    if published and arg.task != "mixture":
        raise UserError(f"size=published is of task=mixture; given task={arg.task}")
    settings = tasks.settings(arg.task) | (PUBLISHED if published else SMALL[arg.task])
    source = tasks.make(arg.task, **settings)
    data = {"name": arg.task, **settings, "eval_examples": 7000 if published else 3000}
    if arg.task == "mixture" and not published:
        data["test"] = {"cells": CELLS + ",256x64"}  # more pairs than in training, too
    layers = arg.mixer.split("+")
    config = defaults.tiny_recall(data, *layers, vocab=source.vocab, dim=arg.dim)
    config.eval.sample = 0
    if source.features:
        config.model.update(features=source.features, tie=False)
    if source.features or arg.convolution:
        config.model.layers = (((*layers,), 1),)
        del config.model.mixers["base_conv"]
    for name in config.model.mixers:
        if "convolution" in config.model.mixers[name]:
            config.model.mixers[name].convolution = arg.convolution
    if published:
        config.batch = 256
    config.seed, config.optim.lr = arg.seed, arg.lr
    config.steps = arg.steps or (22_500 if published else 1000)
    return config
