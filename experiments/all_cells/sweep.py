"""Every cell on recall and on text, in float32 and bfloat16: one table and one picture.

    python -m memjax.sweep --sweep=experiments/all_cells/sweep.py --jobs=2

Trains what experiments/forgetting_mqar and experiments/tiny_text have not trained yet.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.progress import human

PARTS = RECALL, TEXT = ("forgetting_mqar", "tiny_text")
DTYPES = ("float32", "bfloat16")


def tables(rows):
    head = [
        "cell", "recall, mean of 3 seeds (sd)", "recall, bfloat16", "bits per byte",
        "bits per byte, bfloat16", "tokens/s", "tokens/s, bfloat16", "state bytes",
    ]  # fmt: skip
    lines = []
    for cell, group in sorted(results.grouped(rows, "cell").items()):
        recall, narrow, *text = (
            results.select(group, experiment=part, dtype=dtype)
            for part in PARTS
            for dtype in DTYPES
        )
        lines.append(
            [f"`{cell}`", results.spread(recall, "query_accuracy")]
            + [f"{narrow[0]['query_accuracy']:.3f}" if narrow else "-"]
            + [f"{found[0]['bits_per_byte']:.3f}" if found else "-" for found in text]
            + [human(found[0]["tokens_per_second"]) if found else "-" for found in text]
            + [text[0][0]["state_bytes"] if text[0] else "-"]
        )
    return {"cells": (head, lines)}


def draw(rows):
    """A row for each cell: recall on the left, bits per byte on the right."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    cells = sorted(results.labels(rows, "cell"), reverse=True)
    for axes, part, key, label in (
        (left, RECALL, "query_accuracy", "accuracy on forgetting MQAR, a point a seed"),
        (right, TEXT, "bits_per_byte", "bits per byte after 500 steps"),
    ):
        for dtype, marker in zip(DTYPES, "ox", strict=True):
            found = results.select(rows, experiment=part, dtype=dtype)
            heights = [cells.index(row["cell"]) for row in found]
            axes.plot([row[key] for row in found], heights, marker, alpha=0.7, label=dtype)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    left.set_yticks(range(len(cells)), cells)
    left.legend()
    return figure
