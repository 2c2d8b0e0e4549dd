"""What does it cost a memory that learns by gradients to freeze them for a chunk of tokens?

    python -m memjax.sweep --sweep=experiments/chunk_length/sweep.py --jobs=2

Titans, OmegaNet and Atlas on forgetting MQAR and on bytes of the standard library's sources, for
several lengths of the chunk within which all gradients are taken at the memory as it stood in front
of it.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

CELLS = ("titans", "omega_net", "atlas")
CHUNKS = {"forgetting_mqar": (1, 4, 16, 32), "tiny_text": (1, 4, 16, 64)}
FIGURE = {"forgetting_mqar": "query_accuracy", "tiny_text": "bits_per_byte"}
TEXT_CELLS = ("titans", "omega_net")
SEEDS = (0, 1, 2)


def trials():
    return [
        trial(task, cell, chunk, seed)
        for task, chunks in CHUNKS.items()
        for seed in SEEDS
        for cell in (CELLS if task == "forgetting_mqar" else TEXT_CELLS)
        for chunk in chunks
    ]


def trial(task, cell, chunk, seed):
    labels = {"task": task, "cell": cell, "chunk": chunk, "seed": seed}
    changes = {f"model.mixers.{cell}.frozen_chunk": chunk}
    return Trial(labels, f"configs/{task}.py:{cell},seed={seed},steps=500", changes)


def tables(rows):
    made = {}
    for task, chunks in CHUNKS.items():
        head = ["cell", *(f"chunk {n}" for n in chunks)]
        lines = []
        for cell in CELLS:
            groups = [results.select(rows, task=task, cell=cell, chunk=n) for n in chunks]
            if any(groups):
                lines.append([f"`{cell}`", *(results.spread(g, FIGURE[task]) for g in groups)])
        made[task] = (head, lines)
    return made


def draw(rows):
    """A panel for each task: the figure against the chunk's length, a point a seed."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    for axes, task in zip(figure.subplots(1, 2), CHUNKS, strict=True):
        for cell in CELLS:
            found = results.select(rows, task=task, cell=cell)
            if not found:
                continue
            shown = [n for n in CHUNKS[task] if results.select(found, chunk=n)]
            middle = [results.mean(results.select(found, chunk=n), FIGURE[task]) for n in shown]
            (line,) = axes.plot(shown, middle, label=cell)
            points = [(row["chunk"], row[FIGURE[task]]) for row in found]
            axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), alpha=0.5, ms=4)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens of a chunk", ylabel=FIGURE[task].replace("_", " "), title=task)
        axes.grid(alpha=0.25)
        axes.legend()
    return figure
