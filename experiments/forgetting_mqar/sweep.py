"""Which memories forget what is no longer true?

    python -m memjax.sweep --sweep=experiments/forgetting_mqar/sweep.py --jobs=2

Every cell on keys that are bound twice, three seeds in float32; table and picture are of these. Of
seed 0 also with activations in bfloat16, for experiments/all_cells.
"""

from matplotlib.figure import Figure

import memjax
from memjax import results
from memjax.trials import Trial

RUNS = (("float32", 0), ("float32", 1), ("float32", 2), ("bfloat16", 0))
# What only adds can tell of 8 keys that are bound twice: half of them, and all of the one that the
# first token binds, which the convolution knows by the zeros in front of it.
SUMS = (7 * 0.5 + 1) / 8
# What the rules reach at best: sums, and attention without positions, hold both values of a key; a
# delta rule of strength 1 holds the last.
ADDS = ("attention", "linear_attention")
ERASES = (
    "comba", "delta_net", "delta_product", "dplr", "gated_delta_net", "kda", "rwkv7",
)  # fmt: skip
THEORY = {**dict.fromkeys(ADDS, SUMS), **dict.fromkeys(ERASES, 1.0)}


def trials():
    return [
        Trial(
            {"cell": cell, "seed": seed, "dtype": dtype},
            f"configs/forgetting_mqar.py:{cell},seed={seed},steps=500",
            {"model.dtype": dtype},
        )
        for dtype, seed in RUNS
        for cell in memjax.cells.names()
    ]


def by_cell(rows):
    """Cell -> its rows in float32, by name."""
    return dict(sorted(results.grouped(results.select(rows, dtype="float32"), "cell").items()))


def tables(rows):
    head = ["cell", "query accuracy, seeds in order", "mean (sd)", "seconds of training", "theory"]
    lines = []
    for cell, group in by_cell(rows).items():
        each = ", ".join(f"{row['query_accuracy']:.4f}" for row in group)
        seconds = ", ".join(f"{row['seconds']:.0f}" for row in group)
        theory = f"{THEORY[cell]:.4f}" if cell in THEORY else "-"
        mean = results.spread(group, "query_accuracy", 4)
        lines.append([f"`{cell}`", each, mean, seconds, theory])
    return {"accuracy": (head, lines)}


def draw(rows):
    """A row of points for each cell, a point a seed, and the mean as a bar; dashed: SUMS."""
    groups = by_cell(rows)
    figure = Figure(figsize=(7, 0.4 * len(groups) + 1.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    results.draw_points(axes, groups, "query_accuracy")
    axes.axvline(SUMS, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlabel("query accuracy at the last step; one point a seed, bar: mean")
    return figure
