"""Which ways of joining a window and a memory recall what lies beyond the window?

    python -m memjax.sweep --sweep=experiments/hybrid_recall/sweep.py --jobs=2

Three seeds of each model of MODELS on MQAR and forgetting MQAR, and B'MOJO with stores of several
sizes on MQAR.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

TASKS = ("mqar", "forgetting_mqar")
SEEDS = (0, 1, 2)
HYBRID = "hybrid(sliding_window, gated_delta_net),combine="
MODELS = {
    "window": "sliding_window",
    "memory": "gated_delta_net",
    "gate": HYBRID + "gate",
    "parallel": HYBRID + "parallel",
    "sequential": HYBRID + "sequential",
    "window_exit": HYBRID + "window_exit",
    "cached": "hybrid(sliding_window, memory_caching(gated_delta_net))",
    "bmojo_f": "bmojo_f(gated_delta_net)",
    "bmojo": "bmojo(gated_delta_net)",
    "mac": "mac(titans)",
    "mac, tokens": "mac(titans),written=tokens",
    "mag": "mag(sliding_window, titans)",
    "mal": "mal(sliding_window, titans)",
}
SIZES = (2, 4, 8, 16, 32)
# model: (tokens that it may store, the argument of its config)
STORES = {"store 0": (0, "bmojo_f(mamba2)")}
STORES |= {f"store {n}": (n, f"bmojo(mamba2),stored={n}") for n in SIZES}
WINDOW = 4  # tokens that a window sees
BORDERS = range(0, 33, WINDOW)  # of distances in tokens
FAR = 20


def trials():
    return [
        trial(model, argument, task, seed)
        for seed in SEEDS
        for task in TASKS
        for model, argument in MODELS.items()
    ] + [
        trial(model, argument, TASKS[0], seed)
        for seed in SEEDS
        for model, (_, argument) in STORES.items()
    ]


def trial(model, argument, task, seed):
    config = f"configs/hybrid_recall.py:{argument},task={task},seed={seed}"
    return Trial({"model": model, "task": task, "seed": seed}, config)


def keep(found):
    """Accuracy between each two of BORDERS, None where no query is."""
    distance, accuracy, count = (
        np.array([line[name] for line in found["by_distance"]])
        for name in ("distance", "query_accuracy", "queries")
    )
    bins = []
    for low, high in itertools.pairwise(BORDERS):
        inside = (distance > low) & (distance <= high)
        known = inside.any()
        mean = np.average(accuracy[inside], weights=count[inside]) if known else np.nan
        bins.append(round(float(mean), 4) if known else None)
    return {"by_distance": bins}


def by_distance(rows):
    """Mean over the seeds of each of BORDERS' bins; NaN where no query is."""
    return np.array([row["by_distance"] for row in rows], float).mean(axis=0)


def tables(rows):
    head = ["model", *(f"{task}, mean of seeds (sd)" for task in TASKS)]
    head += [f"mqar, distance <= {WINDOW}", f"mqar, > {FAR}", "parameters", "state bytes"]
    lines = []
    for model in MODELS:
        groups = [results.select(rows, model=model, task=task) for task in TASKS]
        if groups[0]:
            near, first = by_distance(groups[0]), groups[0][0]
            far = np.nanmean(near[BORDERS.index(FAR) :])
            accuracies = [results.spread(group, "query_accuracy") for group in groups]
            lines.append(
                [f"`{model}`", *accuracies, f"{near[0]:.3f}", f"{far:.3f}"]
                + [first["parameters"], first["state_bytes"]]
            )
    stores = [
        [stored, results.spread(results.select(rows, model=model), "query_accuracy")]
        for model, (stored, _) in STORES.items()
    ]
    return {
        "accuracy": (head, lines),
        "stores": (["stored", "mqar, mean of seeds (sd)"], stores),
    }


def draw(rows):
    """Accuracy against distance for each task, and against the size of the store."""
    figure = Figure(figsize=(13, 4.6), dpi=120, layout="constrained")
    *panels, last = figure.subplots(1, 3)
    middle = [(low + high) / 2 for low, high in itertools.pairwise(BORDERS)]
    for axes, task in zip(panels, TASKS, strict=True):
        for i, model in enumerate(MODELS):
            group = results.select(rows, model=model, task=task)
            if group:
                style = "o-" if i < 2 else ("^--", "s-.", "v:")[i % 3]
                axes.plot(middle, by_distance(group), style, color=f"C{i % 10}", label=model, ms=4)
        axes.axvline(WINDOW, color="0.6", linewidth=1)
        axes.set(xlabel="tokens since the value", ylim=(-0.02, 1.02), title=task)
    panels[0].set_ylabel("query accuracy, mean of seeds")
    panels[1].legend(fontsize=7, ncols=2)
    for seed in SEEDS:
        found = [row for row in results.select(rows, seed=seed) if row["model"] in STORES]
        sizes = [STORES[row["model"]][0] for row in found]
        accuracy = [row["query_accuracy"] for row in found]
        last.plot(sizes, accuracy, "o-", alpha=0.7, label=f"seed {seed}")
    last.set(xlabel="tokens in the store", ylim=(-0.02, 1.02), title="bmojo(mamba2), mqar")
    last.legend()
    return figure
