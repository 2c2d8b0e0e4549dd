"""How well does each memory, and each hybrid, read bytes at equal parameters and equal steps?

    python -m memjax.sweep --sweep=experiments/lm_stdlib/sweep.py --jobs=2

Two layers, 150,000 parameters, 300 steps of 4 x 256 bytes of the standard library's sources, three
seeds.
"""

from matplotlib.figure import Figure

import memjax
from memjax import results
from memjax.progress import human
from memjax.trials import Trial

SEEDS = (0, 1, 2)
STEPS = 300
HYBRIDS = {
    "window and gated_delta_net": "hybrid(sliding_window, gated_delta_net)",
    "bmojo(gated_delta_net)": "bmojo(gated_delta_net)",
    "mag: window, titans": "mag(sliding_window, titans)",
    "mal: window, titans": "mal(sliding_window, titans)",
    "mac(titans)": "mac(titans)",
}
SLOW = ("atlas",)  # one seed
MODELS = {cell: cell for cell in memjax.cells.names()} | HYBRIDS


def trials():
    return [
        Trial(
            {"model": model, "seed": seed},
            f"configs/lm_stdlib.py:{mixer},seed={seed},steps={STEPS}",
        )
        for seed in SEEDS
        for model, mixer in MODELS.items()
        if seed == SEEDS[0] or model not in SLOW
    ]


def ordered(rows):
    """The rows of each model, the fewest bits first."""
    groups = results.grouped(rows, "model")
    return dict(sorted(groups.items(), key=lambda item: results.mean(item[1], "bits_per_byte")))


def tables(rows):
    head = ["model", "bits per byte, mean of seeds (sd)", "seeds in order"]
    head += ["parameters", "state bytes", "tokens/s"]
    lines = []
    for model, group in ordered(rows).items():
        each = ", ".join(f"{row['bits_per_byte']:.3f}" for row in group)
        speed = human(max(row["tokens_per_second"] for row in group))
        sizes = [group[0]["parameters"], group[0]["state_bytes"]]
        lines.append([f"`{model}`", results.spread(group, "bits_per_byte"), each, *sizes, speed])
    return {"bits": (head, lines)}


def draw(rows):
    """A line for each model: a point a seed, and their mean as a bar."""
    groups = ordered(rows)
    figure = Figure(figsize=(7, 0.28 * len(groups) + 1.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    results.draw_points(axes, groups, "bits_per_byte")
    axes.set_xlabel(f"held-out bits per byte after {STEPS} steps, a point a seed, bar: mean")
    return figure
