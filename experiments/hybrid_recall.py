"""Recall by distance of hybrids of a window and a memory, and of their halves.

    python experiments/hybrid_recall.py --jobs=2

Trains three seeds of each model of MODELS on MQAR and forgetting MQAR, and B'MOJO with stores of
several sizes on MQAR, evaluates each, writes experiments/hybrid_recall/results.jsonl, a row for
each run, prints the tables and draws the pictures. Runs that are finished are kept, interrupted
ones continue; one that fails is named and left out.
"""

import argparse
import concurrent.futures
import itertools
import json
import statistics

import numpy as np
import sweep
from absl import logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax import evaluate, metrics

TASK = "hybrid_recall"
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
STORES = {0: "bmojo_f(mamba2)"} | {n: f"bmojo(mamba2),stored={n}" for n in SIZES}
WINDOW = 4  # tokens that a window sees
BORDERS = range(0, 33, WINDOW)  # of distances in tokens
FAR = 20
KEPT = ("steps", "query_accuracy", "seconds", "tokens_per_second", "parameters", "state_bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each if > 1")
    parser.add_argument("--steps", type=int, help="default: the config's")
    given = parser.parse_args()
    models = {**MODELS, **{f"store {n}": text for n, text in STORES.items()}}
    runs = [(model, task, seed) for seed in SEEDS for task in TASKS for model in MODELS]
    runs += [(f"store {n}", TASKS[0], seed) for seed in SEEDS for n in STORES]
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    rows = []
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        made = pool.map(lambda run: one(given, models[run[0]], *run), runs)
        for row in filter(None, made):
            rows.append(row)
            sweep.write(TASK, rows)
    show(rows)


def one(given, text, model, task, seed):
    """The row of one run, which is made unless it is there; None when it fails."""
    steps = f",steps={given.steps}" if given.steps else ""
    words = [*model.split(), task, str(seed), *([str(given.steps)] if given.steps else [])]
    name = "-".join(words).replace(",", "")
    workdir = sweep.ROOT / "runs" / "hybrid_recall" / name
    config = f"--config=configs/hybrid_recall.py:{text},task={task},seed={seed}{steps}"
    summary = sweep.trained(workdir, config, alone=given.jobs == 1)
    if summary is None:
        return None
    figures = workdir / "evaluation.json"
    if not figures.exists():
        metrics.write_json(str(figures), evaluate.evaluate(str(workdir)))
    found = json.loads(figures.read_text(encoding="utf-8"))
    named = {"model": model, "task": task, "seed": seed}
    return named | {name: summary[name] for name in KEPT} | {"by_distance": binned(found)}


def binned(found):
    """Accuracy between each two of BORDERS, None where no query is."""
    distance, accuracy, count = (
        np.array([row[name] for row in found["by_distance"]])
        for name in ("distance", "query_accuracy", "queries")
    )
    rows = []
    for low, high in itertools.pairwise(BORDERS):
        inside = (distance > low) & (distance <= high)
        rows.append(
            round(float(np.average(accuracy[inside], weights=count[inside])), 4)
            if inside.any()
            else None
        )
    return rows


def select(rows, model, task):
    return [row for row in rows if (row["model"], row["task"]) == (model, task)]


def accuracy(rows):
    """Mean and standard deviation over seeds, as text."""
    values = [row["query_accuracy"] for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ({spread:.3f})"


def by_distance(rows):
    """Mean over the seeds of each of BORDERS' bins; NaN where no query is."""
    every = np.array([row["by_distance"] for row in rows], float)
    return every.mean(axis=0)


def show(rows):
    """Writes the tables into the README and draws the picture."""
    head = ["model", *(f"{task}, mean of seeds (sd)" for task in TASKS)]
    head += [f"mqar, distance <= {WINDOW}", f"mqar, > {FAR}", "parameters", "state bytes"]
    lines = []
    for model in MODELS:
        groups = [select(rows, model, task) for task in TASKS]
        if all(groups):
            far, first = by_distance(groups[0]), groups[0][0]
            lines.append(
                [
                    f"`{model}`",
                    *map(accuracy, groups),
                    f"{far[0]:.3f}",
                    f"{np.nanmean(far[BORDERS.index(FAR) :]):.3f}",
                ]
                + [first["parameters"], first["state_bytes"]]
            )
    sweep.write_table(TASK, head, lines)
    print("| stored | mqar, mean of seeds (sd) |\n|---|---|")
    for size in STORES:
        group = select(rows, f"store {size}", TASKS[0])
        if group:
            print(f"| {size} | {accuracy(group)} |")
    draw(rows)


def draw(rows):
    """Accuracy against distance for each task, and against the size of the store."""
    figure = Figure(figsize=(13, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    *panels, last = figure.subplots(1, 3)
    middle = [(low + high) / 2 for low, high in itertools.pairwise(BORDERS)]
    for axes, task in zip(panels, TASKS, strict=True):
        for i, model in enumerate(MODELS):
            group = select(rows, model, task)
            if group:
                style = "o-" if i < 2 else ("^--", "s-.", "v:")[i % 3]
                axes.plot(middle, by_distance(group), style, color=f"C{i % 10}", label=model, ms=4)
        axes.axvline(WINDOW, color="0.6", linewidth=1)
        axes.set(xlabel="tokens since the value", ylim=(-0.02, 1.02), title=task)
    panels[0].set_ylabel("query accuracy, mean of seeds")
    panels[1].legend(fontsize=7, ncols=2)
    for seed in SEEDS:
        points = [
            (size, row["query_accuracy"])
            for size in STORES
            for row in select(rows, f"store {size}", TASKS[0])
            if row["seed"] == seed
        ]
        if points:
            last.plot(*zip(*points, strict=True), "o-", alpha=0.7, label=f"seed {seed}")
    last.set(xlabel="tokens in the store", ylim=(-0.02, 1.02), title="bmojo(mamba2), mqar")
    last.legend()
    figure.savefig(sweep.HERE / TASK / "hybrid_recall.png")


if __name__ == "__main__":
    main()
