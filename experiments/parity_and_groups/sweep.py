"""Which memories track a state, and over more symbols than in training?

    python -m memjax.sweep --sweep=experiments/parity_and_groups/sweep.py --jobs=2

Parity, and words over S3 and the swaps of S5, with steps of the delta rule up to 1 (eigenvalues in
[0, 1]) and up to 2 ([-1, 1]), and with one or two steps a token.
"""

import math

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

SEEDS = (0, 1, 2)
DELTAS = {
    f"{cell}, beta <= {beta}": (f"{cell},beta_max={beta}", {})
    for cell in ("delta_net", "gated_delta_net")
    for beta in (1, 2)
}
PRODUCTS = {
    f"delta_product, {steps} step{'s' * (steps > 1)}, beta <= {beta}": (
        f"delta_product,beta_max={beta}",
        {"steps": steps, "decay": False},
    )
    for steps in (1, 2)
    for beta in (1, 2)
}
OTHERS = {cell: (cell, {}) for cell in ("attention", "linear_attention", "gla", "mamba2", "rwkv7")}
# Task -> the rest of the config's argument, changes, and models.
TASKS = {
    "parity": ("task=parity,dim=32,steps=1000", {}, {**DELTAS, **OTHERS}),
    "S3": ("task=group_words,steps=2000", {}, {**PRODUCTS, "rwkv7": OTHERS["rwkv7"]}),
    "S5, swaps": (
        "task=group_words,group=S5,steps=2000",
        {"data.moves": 2},
        {name: PRODUCTS[name] for name in PRODUCTS if "1 step," in name},
    ),
}
WORDS = ("S3", "S5, swaps")
LENGTHS = (32, 64, 128)  # of words; 32 in training
BINS = {32: "40 to 63", 64: "64 to 127", 128: "128 to 255"}  # sizes; up to 40 in training


def trials():
    return [
        trial(task, model, seed) for seed in SEEDS for task in TASKS for model in TASKS[task][2]
    ]


def trial(task, model, seed):
    rest, changes, models = TASKS[task]
    mixer, options = models[model]
    name = mixer.partition(",")[0]
    changes = changes | {f"model.mixers.{name}.{key}": value for key, value in options.items()}
    config = f"configs/formal.py:{mixer},{rest},seed={seed}"
    return Trial({"task": task, "model": model, "seed": seed}, config, changes)


def keep(found):
    """Accuracy by the size of expressions, scaled so that a guess has 0; of words, of a position
    and of all up to it."""
    if "by_size" in found:
        chance = found["chance"]
        by = {
            2 ** int(math.log2(line["size"])): line["query_accuracy"] for line in found["by_size"]
        }
        return {f"from_{n}": (by[n] - chance) / (1 - chance) for n in BINS}
    at = {line["to"]: line for line in found["by_position"]}
    return {f"token_{n}": at[n]["query_accuracy"] for n in LENGTHS} | {
        f"whole_{n}": at[n]["sequence_accuracy"] for n in LENGTHS
    }


def each(group, name):
    """A figure of every seed, in order."""
    return ", ".join(f"{row[name]:.2f}" for row in group) or "-"


def tables(rows):
    made = {}
    for task, (_, _, models) in TASKS.items():
        if task in WORDS:
            names = [f"{kind}_{n}" for kind in ("token", "whole") for n in LENGTHS]
            head = [f"{n // 2 + 1} to {n}" for n in LENGTHS] + [f"all up to {n}" for n in LENGTHS]
        else:
            names, head = [f"from_{n}" for n in BINS], list(BINS.values())
        groups = {model: results.select(rows, task=task, model=model) for model in models}
        lines = [[model, *(each(group, name) for name in names)] for model, group in groups.items()]
        made[task] = (["model", *head], lines)
    return made


def draw(rows):
    """A panel for each task: the longest rows, a point a seed."""
    figure = Figure(figsize=(15, 3.6), dpi=120, layout="constrained")
    for axes, task in zip(figure.subplots(1, 3), TASKS, strict=True):
        groups = results.grouped(results.select(rows, task=task), "model")
        if task in WORDS:
            name, what = f"token_{LENGTHS[-1]}", "accuracy of products 65 to 128"
        else:
            name, what = "from_128", "scaled accuracy, sizes 128 to 255"
        results.draw_points(axes, groups, name)
        axes.set(title=task, xlabel=what, xlim=(-0.1, 1.05))
    return figure
