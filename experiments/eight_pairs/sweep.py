"""Which memories recall eight pairs?

    python -m memjax.sweep --sweep=experiments/eight_pairs/sweep.py --jobs=2

MQAR at its smallest, for a look at the learning of attention and three memories.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

CELLS = ("attention", "delta_net", "gated_delta_net", "linear_attention")
SEEDS = (0, 1, 2)
AIM = 0.99


def trials():
    return [
        Trial({"cell": cell, "seed": seed}, f"configs/mqar.py:{cell},seed={seed}")
        for cell in CELLS
        for seed in SEEDS
    ]


def tables(rows):
    head = ["cell", "query accuracy, seeds in order", "mean (sd)", "seconds of training"]
    lines = []
    for cell, group in results.grouped(rows, "cell").items():
        each = ", ".join(f"{row['query_accuracy']:.4f}" for row in group)
        seconds = ", ".join(f"{row['seconds']:.0f}" for row in group)
        lines.append([f"`{cell}`", each, results.spread(group, "query_accuracy", 4), seconds])
    return {"accuracy": (head, lines)}


def draw(rows):
    """A row of points for each cell, a point a seed, and the mean as a bar."""
    figure = Figure(figsize=(7, 3), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    results.draw_points(axes, results.grouped(rows, "cell"), "query_accuracy")
    axes.axvline(AIM, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlabel("query accuracy at the last step; one point a seed, bar: mean")
    return figure
