"""Text and passkeys far beyond the length of training: which memories hold on?

    python experiments/length.py --jobs=2

Trains five models on rows of 512 bytes, each on the standard library's sources and on passkeys
(configs/passkey.py), and evaluates them on rows of up to 32k. Runs that are finished and rows of
results.jsonl are kept. Results, table and picture are in experiments/length.
"""

import argparse
import concurrent.futures
import pathlib

import jax
import sweep
from absl import logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax import evaluate
from memjax.train import versions

TASK = "length"
HYBRID = "hybrid(sliding_window, gated_delta_net)"
# name: (mixer, the hybrid's option)
MODELS = {
    "window": ("sliding_window", None),
    "memory": ("gated_delta_net", None),
    "in turn": ("gated_delta_net+sliding_window", None),
    "hybrid, gate": (HYBRID, "gate"),
    "hybrid, window_exit": (HYBRID, "window_exit"),
}
SHORT = 180  # bytes of the rows on which passkeys are learned first
NAMED = ("task", "model", "seed", "steps", "length")
KEPT = (
    "bits_per_byte", "by_context", "query_accuracy", "sequence_accuracy", "by_depth",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=1200, help="on text; of passkeys as many parts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", default="512,2048,8192,32768")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each if > 1")
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    jax.config.update("jax_compilation_cache_dir", str(sweep.ROOT / "runs" / "compiled"))
    rows = {key(row): row for row in sweep.read(TASK)}

    def one(run):
        task, name = run
        workdir = (text if task == "text" else passkey)(name, given)
        for length in lengths if workdir else ():
            named = dict(zip(NAMED, (task, name, given.seed, given.steps, length), strict=True))
            if key(named) not in rows:
                yield named | measure(workdir, task, length)

    runs = [(task, name) for task in ("passkey", "text") for name in MODELS]
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for found in pool.map(lambda run: list(one(run)), runs):
            rows |= {key(row): row for row in found}
            sweep.write(TASK, rows.values())
    shown = {k: row for k, row in rows.items() if k[2:4] == (given.seed, given.steps)}
    shown = {(row["task"], row["model"], row["length"]): row for row in shown.values()}
    sweep.write_table(TASK, *table(shown, lengths))
    draw(shown, lengths, sweep.HERE / TASK / "length.png")


def key(row):
    return tuple(row[name] for name in NAMED)


def text(name, given):
    """The folder of a run on text, which is made unless it is there; None when it fails."""
    mixer, combine = MODELS[name]
    layers = 2 // len(mixer.split("+"))
    settings = [f"--config=configs/text.py:{mixer},layers={layers},dim=128,steps={given.steps}"]
    settings += ["--config.batch=4", "--config.optim.lr=3e-3", "--config.eval.sample=0"]
    settings += ["--config.data.holdout=0.01", f"--config.optim.warmup={min(100, given.steps)}"]
    if "sliding_window" in mixer:
        settings.append("--config.model.mixers.sliding_window.window=64")
    return trained("text", name, given, combine, settings)


def passkey(name, given):
    """The same on passkeys, learned on short rows first."""
    mixer, combine = MODELS[name]
    steps = {SHORT: given.steps * 2 // 3, 512: given.steps // 2}
    workdir, changes = None, []
    for length, count in steps.items():
        settings = [f"--config=configs/passkey.py:{mixer},length={length},steps={count}", *changes]
        settings += [f"--config.optim.warmup={min(100, count)}"]
        workdir = trained(f"passkey-{length}", name, given, combine, settings)
        if workdir is None:
            return None
        changes = [f"--config.init_from={workdir}", "--config.batch=16", "--config.optim.lr=5e-3"]
    return workdir


def trained(task, name, given, combine, settings):
    words = (task, name.replace(",", "").replace(" ", "-"), given.seed, given.steps)
    workdir = sweep.ROOT / "runs" / TASK / "-".join(map(str, words))
    settings = [*settings, f"--config.seed={given.seed}"]
    if combine:
        settings.append(f"--config.model.mixers.hybrid.combine={combine}")
    return workdir if sweep.trained(workdir, *settings, alone=given.jobs == 1) else None


def measure(workdir: pathlib.Path, task, length):
    """Figures on all of the held-out text, or on enough passkeys for all depths."""
    examples = 40 * max(1, 8192 // length) if task == "passkey" else 0
    found = evaluate.evaluate(str(workdir), length=length, rows=examples)
    print(f"{workdir.name}, rows of {length}: evaluated", flush=True)
    return {name: found[name] for name in KEPT if name in found} | {"versions": versions()}


def table(rows, lengths):
    """(head, lines): bits per byte, and digits and whole numbers that are right, by length."""
    head = ["model", *(f"bits per byte, {n}" for n in lengths), *(f"passkey, {n}" for n in lengths)]
    lines = []
    for name in MODELS:
        text, passkey = (
            [rows.get((task, name, n)) for n in lengths] for task in ("text", "passkey")
        )
        line = [name, *("-" if row is None else f"{row['bits_per_byte']:.3f}" for row in text)]
        line += [
            "-" if row is None else f"{row['query_accuracy']:.2f} / {row['sequence_accuracy']:.2f}"
            for row in passkey
        ]
        lines.append(line)
    return head, lines


def draw(rows, lengths, path):
    """Text by the length of rows and, in the longest, by context; passkeys by length."""
    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = by_length, by_context, passkey = figure.subplots(1, 3)
    for i, name in enumerate(MODELS):
        style = dict(color=f"C{i}", marker="o", label=name)
        by_length.plot(*line(rows, "text", name, lengths, "bits_per_byte"), **style)
        octaves = rows.get(("text", name, lengths[-1]), {"by_context": []})["by_context"]
        points = [(row["from"], row["bits_per_byte"]) for row in octaves]
        by_context.plot(*zip(*points, strict=True) if points else ((), ()), **style)
        passkey.plot(*line(rows, "passkey", name, lengths, "sequence_accuracy"), **style)
        style |= dict(linestyle=":", label=None)
        passkey.plot(*line(rows, "passkey", name, lengths, "query_accuracy"), **style)
    labels = (
        ("bytes of a row", "bits per byte of all held-out text"),
        (f"bytes of the file seen, rows of {lengths[-1]}", "bits per byte"),
        ("bytes of a row", "whole passkeys right; dotted: digits"),
    )
    for ax, (x, y) in zip(axes, labels, strict=True):
        ax.set(xlabel=x, ylabel=y)
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.25)
    passkey.set_ylim(-0.02, 1.02)
    by_context.axvline(512, color="0.5", linestyle="--", linewidth=1)  # the rows of training
    by_context.legend(fontsize=8)
    figure.savefig(path)


def line(rows, task, name, lengths, figure):
    """The lengths that are there, and a figure at each."""
    there = [n for n in lengths if (task, name, n) in rows]
    return there, [rows[task, name, n][figure] for n in there]


if __name__ == "__main__":
    main()
