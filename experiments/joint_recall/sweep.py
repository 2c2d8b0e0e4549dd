"""Which memories bind a value to a key and its context together?

    python -m memjax.sweep --sweep=experiments/joint_recall/sweep.py --jobs=2

Joint recall with three contexts, three keys and 16 values (HAX, arXiv 2507.00449, made small).
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.tasks.joint_recall import counted
from memjax.trials import Trial

CELLS = (
    "attention", "sliding_window", "linear_attention", "mamba2", "delta_net", "gated_delta_net",
    "rwkv7",
)  # fmt: skip
RATES = (2e-3, 5e-3)
SEEDS = (0, 1, 2)
STEPS = 2000
CHANCE, COUNTED = 1 / 16, counted(3, 16)


def trials():
    return [
        Trial(
            {"cell": cell, "lr": lr, "seed": seed},
            f"configs/recall.py:{cell}+{cell},task=joint_recall,lr={lr},seed={seed},steps={STEPS}",
        )
        for seed in SEEDS
        for lr in RATES
        for cell in CELLS
    ]


def tables(rows):
    head = ["cell", *(f"lr {lr}, mean of seeds (sd)" for lr in RATES), "whole rows, better lr"]
    lines = []
    for cell in CELLS:
        group = results.select(rows, cell=cell)
        if group:
            accuracies = [
                results.spread(results.select(group, lr=lr), "query_accuracy") for lr in RATES
            ]
            best = results.best(group, "lr", "query_accuracy")
            lines.append([f"`{cell}`", *accuracies, results.spread(best, "sequence_accuracy")])
    return {"accuracy": (head, lines)}


def draw(rows):
    """A row for each memory: a point a seed, a colour for each learning rate."""
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, lr in enumerate(RATES):
        points = [
            (row["query_accuracy"], CELLS.index(row["cell"]) + 0.16 * (i - 0.5))
            for row in results.select(rows, lr=lr)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", alpha=0.7, label=f"lr {lr}")
    axes.axvline(CHANCE, color="0.5", linestyle="--", linewidth=1)
    axes.axvline(COUNTED, color="0.5", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(CELLS)), CELLS)
    axes.set_ylim(len(CELLS) - 0.5, -0.5)
    axes.set(
        xlabel="query accuracy, a point a seed; dashed: a guess, dotted: counts", xlim=(0, 1.02)
    )
    axes.grid(axis="x", alpha=0.25)
    axes.legend()
    return figure
