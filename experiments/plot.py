"""Prints the table of a recall task's results.jsonl and draws its picture beside it.

python experiments/plot.py mqar
"""

import pathlib
import statistics
import sys

import sweep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# What only adds can tell of 8 keys that are bound twice: half of them, and all of the one that the
# first token binds, which the convolution knows by the zeros in front of it.
SUMS = (7 * 0.5 + 1) / 8
LINES = {"mqar": 0.99, "forgetting_mqar": SUMS}  # dashed: the aim; what only adds can reach
# What the rules reach at best: sums, and attention without positions, hold both values of a key; a
# delta rule of strength 1 holds the last.
ADDS = ("attention", "linear_attention")
ERASES = (
    "comba", "delta_net", "delta_product", "dplr", "gated_delta_net", "kda", "rwkv7",
)  # fmt: skip
THEORY = {"forgetting_mqar": {**dict.fromkeys(ADDS, SUMS), **dict.fromkeys(ERASES, 1.0)}}


def main(task):
    folder = pathlib.Path(__file__).parent / task
    rows = [row for row in sweep.read(task) if row["dtype"] == "float32"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    runs = {cell: [row for row in rows if row["cell"] == cell] for cell in cells}
    theory = THEORY.get(task, {})
    head = ["cell", "query accuracy, seeds in order", "mean (sd)", "seconds of training"]
    print("|", " | ".join(head + ["theory"] * bool(theory)), "|")
    print("|---" * (len(head) + bool(theory)) + "|")
    for cell, group in runs.items():
        values = [row["query_accuracy"] for row in group]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        each = ", ".join(f"{value:.4f}" for value in values)
        seconds = ", ".join(f"{row['seconds']:.0f}" for row in group)
        row = [f"`{cell}`", each, f"{statistics.mean(values):.4f} ({spread:.4f})", seconds]
        if theory:
            row.append(f"{theory[cell]:.4f}" if cell in theory else "-")
        print("|", " | ".join(row), "|")
    draw(runs, LINES.get(task), folder / f"{task}.png")


def draw(runs, line, path):
    """One row of points per cell: every seed, and the mean as a bar."""
    figure = Figure(figsize=(7, 0.4 * len(runs) + 1.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for height, group in enumerate(runs.values()):
        values = [row["query_accuracy"] for row in group]
        axes.plot(values, [height] * len(values), "o", color="#1f77b4", alpha=0.7)
        axes.plot([statistics.mean(values)], [height], "|", color="black", markersize=16)
    if line is not None:
        axes.axvline(line, color="0.5", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlabel("query accuracy at the last step; one point a seed, bar: mean")
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1])
