"""Does it matter what a memory can see before it is trained?

    python -m memjax.sweep --sweep=experiments/first_decay/sweep.py --jobs=2

Memories with one decay per head, one head, that start with a half-life of 4 to 256 tokens, on the
mixed MQAR of experiments/mqar.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

CELLS = ("gated_delta_net", "mamba2")
HALF_LIVES = (4, 16, 64, 256)
SEEDS = (0, 1, 2)
PAIRS = (4, 8, 16, 32)


def trials():
    return [
        Trial(
            {"cell": cell, "half_life": tokens, "seed": seed},
            f"configs/recall.py:{cell},task=mixture,lr=0.01,seed={seed}",
            {f"model.mixers.{cell}.half_life": float(tokens)},
        )
        for seed in SEEDS
        for tokens in HALF_LIVES
        for cell in CELLS
    ]


def keep(found):
    """Accuracy by the number of pairs; the mean over those of training is the score."""
    by = {line["pairs"]: line["query_accuracy"] for line in found["by_pairs"]}
    return {"score": sum(by[n] for n in PAIRS) / len(PAIRS)} | {f"pairs_{n}": by[n] for n in PAIRS}


def tables(rows):
    lines = []
    for cell in CELLS:
        for tokens in HALF_LIVES:
            group = results.select(rows, cell=cell, half_life=tokens)
            figures = (results.spread(group, f"pairs_{n}") for n in PAIRS)
            each = ", ".join(f"{row['score']:.3f}" for row in group) or "-"
            lines.append([f"`{cell}`", tokens, *figures, each])
    head = ["cell", "half-life", *(f"{n} pairs" for n in PAIRS), "score of each seed"]
    return {"accuracy": (head, lines)}


def draw(rows):
    """Score against half-life: a point a seed, a line through the means."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for cell, found in results.grouped(rows, "cell").items():
        groups = results.grouped(found, "half_life")
        middle = [results.mean(group, "score") for group in groups.values()]
        (line,) = axes.plot(list(groups), middle, label=cell)
        points = [(row["half_life"], row["score"]) for row in found]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), alpha=0.5, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(HALF_LIVES, HALF_LIVES)
    axes.set(xlabel="half-life before training, tokens", ylabel="accuracy, mean of 4 to 32 pairs")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure
