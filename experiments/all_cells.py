"""Every cell on recall and on text, in float32 and bfloat16: one table and one picture.

    python experiments/all_cells.py --jobs=2

Trains what is not trained yet (see sweep.py: runs that are finished are kept), then prints the
table and draws experiments/all_cells/all_cells.png.
"""

import argparse
import pathlib
import statistics

import sweep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax.progress import human

FOLDER = pathlib.Path(__file__).parent / "all_cells"
RECALL, TEXT = "forgetting_mqar", "tiny_text"
RUNS = (
    (RECALL, "--seeds=0,1,2", "--steps=500"),
    (TEXT, "--seeds=0"),
    (TEXT, "--seeds=0", "--dtype=bfloat16"),
    (RECALL, "--seeds=0", "--steps=500", "--dtype=bfloat16"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="as in sweep.py")
    jobs = f"--jobs={parser.parse_args().jobs}"
    for run in RUNS:
        sweep.main([*run, jobs])
    columns = {
        (task, dtype): select(task, dtype)
        for task in (RECALL, TEXT)
        for dtype in ("float32", "bfloat16")
    }
    print_table(columns)
    draw(columns)


def select(task, dtype):
    """Cell -> its rows of that type, in the order of seeds."""
    found = {}
    for row in sweep.read(task):
        if row["dtype"] == dtype:
            found.setdefault(row["cell"], []).append(row)
    return found


def print_table(columns):
    head = (
        "cell", "recall, mean of 3 seeds (sd)", "recall, bfloat16", "bits per byte",
        "bits per byte, bfloat16", "tokens/s", "tokens/s, bfloat16", "state bytes",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for cell in sorted(columns[RECALL, "float32"]):
        recall, narrow, text, small = (rows.get(cell, []) for rows in columns.values())
        values = [row["query_accuracy"] for row in recall]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        row = [f"`{cell}`", f"{statistics.mean(values):.3f} ({spread:.3f})"]
        row.append("-" if not narrow else f"{narrow[0]['query_accuracy']:.3f}")
        row += ["-" if not rows else f"{rows[0]['bits_per_byte']:.3f}" for rows in (text, small)]
        row += ["-" if not rows else human(rows[0]["tokens_per_second"]) for rows in (text, small)]
        row.append("-" if not text else f"{text[0]['state_bytes']}")
        print("| " + " | ".join(row) + " |")


def draw(columns):
    """A row for each cell: recall on the left, bits per byte on the right."""
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    cells = sorted(columns[RECALL, "float32"], reverse=True)
    for axes, task, key, label in (
        (left, RECALL, "query_accuracy", "accuracy on forgetting MQAR, a point a seed"),
        (right, TEXT, "bits_per_byte", "bits per byte after 500 steps"),
    ):
        for dtype, marker in (("float32", "o"), ("bfloat16", "x")):
            rows = columns[task, dtype]
            points = [(row[key], i) for i, cell in enumerate(cells) for row in rows.get(cell, [])]
            if points:  # a run may have failed
                axes.plot(*zip(*points, strict=True), marker, alpha=0.7, label=dtype)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    left.set_yticks(range(len(cells)), cells)
    left.legend()
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "all_cells.png")


if __name__ == "__main__":
    main()
