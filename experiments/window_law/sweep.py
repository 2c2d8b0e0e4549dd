"""Does a window of attention recall just what it can see?

    python -m memjax.sweep --sweep=experiments/window_law/sweep.py --jobs=2

MQAR with 8 pairs in 64 tokens, windows of 8 to 64 tokens, three seeds, beside the share of queries
whose value stands inside the window.
"""

import functools

from matplotlib.figure import Figure

from memjax import results, tasks
from memjax.trials import Trial

WINDOWS = (8, 12, 16, 24, 32, 64)
SEEDS = (0, 1, 2)
CONVOLUTION = 2  # tokens further that BaseConv, three wide, looks back


def trials():
    return [
        Trial(
            {"window": window, "seed": seed},
            f"configs/mqar.py:sliding_window,seed={seed}",
            {"model.mixers.sliding_window.window": window},
        )
        for seed in SEEDS
        for window in WINDOWS
    ]


@functools.cache
def law(window):
    """The share of queries whose value is among the `window` tokens up to the query."""
    source = tasks.make("mqar", length=64, pairs=8, vocab=1024, split="test")
    rows = (source[i] for i in range(3000))  # those of the evaluation
    return sum(int((row["distance"][row["mask"]] < window).sum()) for row in rows) / 3000 / 8


def tables(rows):
    head = ["window", "accuracy, mean of seeds (sd)", "seeds in order", "law"]
    head += [f"law, {CONVOLUTION} tokens more"]
    lines = []
    for window, group in results.grouped(rows, "window").items():
        each = ", ".join(f"{row['query_accuracy']:.4f}" for row in group)
        laws = [f"{law(window):.4f}", f"{law(window + CONVOLUTION):.4f}"]
        lines.append([window, results.spread(group, "query_accuracy", 4), each, *laws])
    return {"accuracy": (head, lines)}


def draw(rows):
    """Accuracy against the window, a point a seed, between the two laws."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    across = range(4, 65)
    for more, style in ((0, "-"), (CONVOLUTION, "--")):
        label = f"law, {more} tokens more" if more else "law"
        axes.plot(across, [law(w + more) for w in across], style, color="0.5", label=label)
    axes.plot([r["window"] for r in rows], [r["query_accuracy"] for r in rows], "o", alpha=0.7)
    axes.set(
        xlabel="tokens of the window", ylabel="query accuracy, a point a seed", ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.25)
    axes.legend()
    return figure
