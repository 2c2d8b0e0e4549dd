"""How well does each memory read bytes after 500 steps?

    python -m memjax.sweep --sweep=experiments/tiny_text/sweep.py --jobs=2

Every cell as a small model of the standard library's sources, one seed, with activations in float32
and in bfloat16.
"""

from matplotlib.figure import Figure

import memjax
from memjax import results
from memjax.trials import Trial

DTYPES = ("float32", "bfloat16")


def trials():
    return [
        Trial(
            {"cell": cell, "seed": 0, "dtype": dtype},
            f"configs/tiny_text.py:{cell},seed=0",
            {"model.dtype": dtype},
        )
        for dtype in DTYPES
        for cell in memjax.cells.names()
    ]


def tables(rows):
    head = ["cell", *(f"bits per byte, {dtype}" for dtype in DTYPES), "parameters"]
    head += [f"seconds, {dtype}" for dtype in DTYPES]
    lines = []
    for cell, group in sorted(results.grouped(rows, "cell").items()):
        found = [results.select(group, dtype=dtype) for dtype in DTYPES]
        bits = [f"{row[0]['bits_per_byte']:.3f}" if row else "-" for row in found]
        seconds = [f"{row[0]['seconds']:.0f}" if row else "-" for row in found]
        lines.append([f"`{cell}`", *bits, group[0]["parameters"], *seconds])
    return {"bits": (head, lines)}


def draw(rows):
    """A line for each cell: a point for each type, and their mean as a bar."""
    groups = dict(sorted(results.grouped(rows, "cell").items()))
    figure = Figure(figsize=(7, 0.3 * len(groups) + 1.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    results.draw_points(axes, groups, "bits_per_byte")
    axes.set_xlabel("held-out bits per byte, float32 and bfloat16, bar: their mean")
    return figure
