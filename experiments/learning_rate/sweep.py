"""Which learning rate does each memory want for recall in 400 steps?

    make sweep-demo
    python -m memjax.sweep --sweep=experiments/learning_rate/sweep.py --jobs=2

Eight pairs of MQAR. Optuna chooses the memory and its rate, twelve times.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.sweeps.search import Range, Search
from memjax.trials import Trial

CELLS = ("delta_net", "gated_delta_net", "linear_attention")
RATES = Range(1e-3, 1e-1, log=True)


def search():
    return Search({"cell": CELLS, "lr": RATES}, trial, count=12, goal="query_accuracy")


def trial(cell, lr):
    config = f"configs/mqar.py:{cell},seed=0,steps=400"
    return Trial({"cell": cell, "lr": lr, "seed": 0}, config, {"optim.lr": lr})


def tables(rows):
    head = ["cell", "trials", "best query accuracy", "at lr", "seconds of each"]
    lines = []
    for cell in CELLS:
        group = results.select(rows, cell=cell)
        best = max(group, key=lambda row: row["query_accuracy"], default=None)
        if best:
            seconds = f"{results.mean(group, 'seconds'):.0f}"
            figure = f"{best['query_accuracy']:.4f}"
            lines.append([f"`{cell}`", len(group), figure, best["lr"], seconds])
    return {"best": (head, lines)}


def draw(rows):
    """Accuracy against the rate, a point a trial."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for cell, group in results.grouped(rows, "cell").items():
        group = sorted(group, key=lambda row: row["lr"])
        rates, found = ([row[name] for row in group] for name in ("lr", "query_accuracy"))
        axes.plot(rates, found, "o-", label=cell, alpha=0.8)
    axes.set(xscale="log", xlabel="learning rate", ylabel="query accuracy", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    axes.legend()
    return figure
