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
import pathlib
import statistics

import numpy as np
import sweep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FOLDER = pathlib.Path(__file__).parent / "hybrid_recall"
RESULTS = FOLDER / "results.jsonl"
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
    "mag": "mag(sliding_window, titans)",
    "mal": "mal(sliding_window, titans)",
}
SIZES = (4, 8, 16, 32, 64)
STORES = {0: "bmojo_f(mamba2)"} | {n: f"bmojo(mamba2),stored={n}" for n in SIZES}
BORDERS = (0, 8, 16, 24, 32, 40, 48, 56, 64)  # of distances in tokens; windows see 8
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
    FOLDER.mkdir(exist_ok=True)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        made = pool.map(lambda run: one(given, models[run[0]], *run), runs)
        for row in filter(None, made):
            rows.append(row)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            RESULTS.write_text(lines, encoding="utf-8")
    show(rows)


def one(given, text, model, task, seed):
    """The row of one run, which is made unless it is there; None when it fails."""
    steps = f",steps={given.steps}" if given.steps else ""
    name = f"{model.replace(' ', '')}-{task}-{seed}{steps.replace(',steps=', '-')}"
    workdir = sweep.ROOT / "runs" / "hybrid_recall" / name
    if not sweep.finished(workdir):
        config = f"configs/hybrid_recall.py:{text},task={task},seed={seed}{steps}"
        if not sweep.run(("memjax.train", f"--config={config}"), workdir, given.jobs):
            return None
    if not (workdir / "evaluation.json").exists():
        if not sweep.run(("memjax.evaluate",), workdir, given.jobs):
            return None
    summary, found = (
        json.loads((workdir / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("summary", "evaluation")
    )
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


def mean(values):
    """(mean, standard deviation) over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def by_distance(rows):
    """Mean over the seeds of each of BORDERS' bins; NaN where no query is."""
    every = np.array([row["by_distance"] for row in rows], float)
    return every.mean(axis=0)


def show(rows):
    head = ["model", *(f"{task}, mean of seeds (sd)" for task in TASKS)]
    head += ["mqar, distance <= 8", "mqar, > 48", "seconds", "parameters", "state bytes"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for model in MODELS:
        groups = [select(rows, model, task) for task in TASKS]
        if not all(groups):
            continue
        line = [f"`{model}`"]
        line += ["{:.3f} ({:.3f})".format(*mean([r["query_accuracy"] for r in g])) for g in groups]
        far = by_distance(groups[0])
        line += [f"{far[0]:.3f}", f"{np.nanmean(far[6:]):.3f}"]
        line += [f"{statistics.median(r['seconds'] for r in groups[0]):.0f}"]
        line += [str(groups[0][0][name]) for name in ("parameters", "state_bytes")]
        print("| " + " | ".join(line) + " |")
    print("\n| stored | mqar, mean of seeds (sd) |\n|---|---|")
    for size in STORES:
        group = select(rows, f"store {size}", TASKS[0])
        if group:
            print(
                f"| {size} | {{:.3f}} ({{:.3f}}) |".format(
                    *mean([r["query_accuracy"] for r in group])
                )
            )
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
        axes.axvline(8, color="0.6", linewidth=1)
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
    figure.savefig(FOLDER / "hybrid_recall.png")


if __name__ == "__main__":
    main()
