"""Does it help to keep the memories of past segments, and how does the gain depend on their number?

    python -m memjax.sweep --sweep=experiments/memory_caching/sweep.py --jobs=2

Memory Caching in its four modes over two small memories, whose keys have 16 channels, on MQAR with
16 pairs, for several segment lengths; beside each the memory alone.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

CELLS = ("linear_attention", "delta_net")
MODES = ("residual", "grm", "soup", "ssc")
SEGMENTS = (32, 16, 8, 4)  # tokens; 32 bind the pairs
ALONE = "alone"
SEEDS = (0, 1, 2)
STEPS = 600


def trials():
    return [
        trial(cell, mode, segment, seed)
        for seed in SEEDS
        for cell in CELLS
        for mode, segment in ((ALONE, 0), *((m, s) for m in MODES for s in SEGMENTS))
    ]


def trial(cell, mode, segment, seed):
    changes = {"data.pairs": 16, f"model.mixers.{cell}.key_dim": 16}
    mixer = cell
    if mode != ALONE:
        mixer = f"memory_caching({cell})"
        options = "model.mixers.memory_caching."
        changes |= {options + "mode": mode, options + "segment": segment}
    labels = {"cell": cell, "mode": mode, "segment": segment, "seed": seed}
    return Trial(labels, f"configs/mqar.py:{mixer},seed={seed},steps={STEPS}", changes)


def tables(rows):
    head = ["cell", "mode", *(f"segments of {n}, mean of seeds (sd)" for n in SEGMENTS)]
    lines = []
    for cell in CELLS:
        alone = results.select(rows, cell=cell, mode=ALONE)
        lines.append([f"`{cell}`", ALONE, results.spread(alone, "query_accuracy"), "", "", ""])
        for mode in MODES:
            groups = [results.select(rows, cell=cell, mode=mode, segment=n) for n in SEGMENTS]
            lines.append(["", mode, *(results.spread(g, "query_accuracy") for g in groups)])
    return {"accuracy": (head, lines)}


def draw(rows):
    """A panel for each memory: accuracy against the number of segments that bind the pairs."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    for axes, cell in zip(figure.subplots(1, 2, sharey=True), CELLS, strict=True):
        for mode in MODES:
            shown = [n for n in SEGMENTS if results.select(rows, cell=cell, mode=mode, segment=n)]
            groups = [results.select(rows, cell=cell, mode=mode, segment=n) for n in shown]
            across = [32 // n for n in shown]
            (line,) = axes.plot(
                across, [results.mean(g, "query_accuracy") for g in groups], label=mode
            )
            for x, group in zip(across, groups, strict=True):
                ys = [row["query_accuracy"] for row in group]
                axes.plot([x] * len(ys), ys, "o", color=line.get_color(), alpha=0.5, markersize=4)
        for row in results.select(rows, cell=cell, mode=ALONE):
            axes.axhline(row["query_accuracy"], color="0.6", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks([32 // n for n in SEGMENTS], [32 // n for n in SEGMENTS])
        axes.set(
            xlabel="segments that bind the 16 pairs", title=f"{cell}; dashed: alone, a seed each"
        )
        axes.grid(alpha=0.25)
        axes.legend()
    figure.axes[0].set_ylabel("query accuracy, a point a seed")
    return figure
