"""How much does a memory recall, for the bytes of state that it takes?

    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --jobs=2

MQAR with 4 to 32 pairs mixed, tested with 64 pairs too: each memory at two widths and two learning
rates with three seeds. Every figure is that of the last step.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

CELLS = ("attention", "linear_attention", "gla", "mamba2", "delta_net", "gated_delta_net")
DIMS = (32, 64)
RATES = (1e-2, 2e-2)
SEEDS = (0, 1, 2)
PAIRS = (4, 8, 16, 32, 64)  # 64: not in training
TRAINED = PAIRS[:-1]
LONGEST = 256  # tokens of a row, for which attention has room


def trials():
    return [
        Trial(
            {"cell": cell, "dim": dim, "lr": lr, "seed": seed},
            f"configs/recall.py:{cell},task=mixture,dim={dim},lr={lr},seed={seed}",
            {"model.mixers.attention.window": LONGEST} if cell == "attention" else {},
        )
        for seed in SEEDS
        for dim in DIMS
        for lr in RATES
        for cell in CELLS
    ]


def keep(found):
    """Accuracy by the number of pairs; the mean over those of training is the score."""
    by = {line["pairs"]: line["query_accuracy"] for line in found["by_pairs"]}
    whole = {f"whole_{line['pairs']}": line["sequence_accuracy"] for line in found["by_pairs"]}
    score = sum(by[n] for n in TRAINED) / len(TRAINED)
    return {"score": score, **{f"pairs_{n}": by[n] for n in PAIRS}, **whole}


def best(rows, cell, dim):
    """The rows of the learning rate whose mean score is higher."""
    return results.best(results.select(rows, cell=cell, dim=dim), "lr", "score")


def tables(rows):
    head = ["cell", "width", "state bytes", "lr", *(f"{n} pairs" for n in PAIRS), "rows of 32"]
    lines, rates = [], []
    for cell in CELLS:
        for dim in DIMS:
            group = best(rows, cell, dim)
            if group:
                figures = [results.spread(group, f"pairs_{n}") for n in PAIRS]
                lines.append(
                    [f"`{cell}`", dim, group[0]["state_bytes"], group[0]["lr"], *figures]
                    + [results.spread(group, "whole_32")]
                )
                scores = [
                    results.spread(results.select(rows, cell=cell, dim=dim, lr=lr), "score")
                    for lr in RATES
                ]
                rates.append([f"`{cell}`", dim, *scores])
    return {
        "accuracy": (head, lines),
        "rates": (["cell", "width", *(f"lr {lr}" for lr in RATES)], rates),
    }


def draw(rows):
    """Left: score against state bytes, a point a seed. Right: accuracy against pairs, width 32."""
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, cell in enumerate(CELLS):
        groups = [best(rows, cell, dim) for dim in DIMS]
        shown = [group for group in groups if group]
        middle = [(group[0]["state_bytes"], results.mean(group, "score")) for group in shown]
        left.plot(*zip(*middle, strict=True), color=f"C{i}", label=cell)
        points = [(row["state_bytes"], row["score"]) for group in shown for row in group]
        left.plot(*zip(*points, strict=True), "o", color=f"C{i}", alpha=0.6, markersize=5)
        if groups[0]:
            curve = [results.mean(groups[0], f"pairs_{n}") for n in PAIRS]
            right.plot(PAIRS, curve, "o-", color=f"C{i}", label=cell)
    left.set_xscale("log", base=2)
    left.set(
        xlabel="bytes of state of one sequence", ylabel="query accuracy, mean over 4 to 32 pairs"
    )
    right.set_xscale("log", base=2)
    right.set(xlabel="pairs (64: not in training)", title=f"width {DIMS[0]}, mean of seeds")
    left.set_title("widths 32 and 64, a point a seed")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(*right.get_legend_handles_labels(), fontsize=8, loc="lower right")
    return figure
