"""What can each memory do of MAD's six tasks, at baseline difficulty?

    python -m memjax.sweep --sweep=experiments/mad/sweep.py --jobs=2

In-context, noisy and fuzzy recall, selective copy, compression and memorisation (arXiv 2403.17844),
with two layers of width 64 and 600 steps of 32 fresh rows.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

CELLS = ("attention", "linear_attention", "mamba2", "gated_delta_net")
TASKS = (
    "in_context_recall", "noisy_recall", "fuzzy_recall", "selective_copy", "compression",
    "memorization",
)  # fmt: skip
SEEDS = (0, 1)
STEPS = 600


def trials():
    return [
        Trial(
            {"task": task, "cell": cell, "seed": seed},
            f"configs/mad.py:{cell},task={task},seed={seed},steps={STEPS}",
        )
        for seed in SEEDS
        for task in TASKS
        for cell in CELLS
    ]


def keep(found):
    """The published measure: the mean over answers of the share that is right."""
    return {"macro_accuracy": found["macro_accuracy"]}


def tables(rows):
    made = {}
    for name in ("query_accuracy", "macro_accuracy"):
        lines = []
        for cell in CELLS:
            groups = [results.select(rows, cell=cell, task=task) for task in TASKS]
            lines.append([f"`{cell}`", *(results.spread(group, name) for group in groups)])
        made[name] = (["cell", *(task.replace("_", " ") for task in TASKS)], lines)
    return made


def draw(rows):
    """A panel for each task: a point a seed."""
    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    for axes, task in zip(figure.subplots(2, 3).flat, TASKS, strict=True):
        groups = results.grouped(results.select(rows, task=task), "cell")
        results.draw_points(axes, groups, "query_accuracy")
        axes.set(title=task.replace("_", " "), xlim=(-0.02, 1.02))
    figure.supxlabel("query accuracy at the last step, a point a seed, bar: mean", fontsize=10)
    return figure
