"""Which memories hold on beyond the length of training?

    python -m memjax.sweep --sweep=experiments/length/sweep.py --jobs=2

Five models on rows of 512 bytes, each on the standard library's sources and on passkeys
(configs/passkey.py), which are learned on short rows first, evaluated on rows of up to 32k.
"""

from matplotlib.figure import Figure

from memjax import results
from memjax.trials import Trial

TASKS = ("passkey", "text")
LENGTHS = (512, 2048, 8192, 32768)
HYBRID = "hybrid(sliding_window, gated_delta_net)"
# name: (mixer, the hybrid's option)
MODELS = {
    "window": ("sliding_window", None),
    "memory": ("gated_delta_net", None),
    "in turn": ("gated_delta_net+sliding_window", None),
    "hybrid, gate": (HYBRID, "gate"),
    "hybrid, window_exit": (HYBRID, "window_exit"),
}
SEEDS = (0,)
KEPT = (
    "length", "bits_per_byte", "by_context", "query_accuracy", "sequence_accuracy", "by_depth",
)  # fmt: skip


def trials():
    return [
        (text if task == "text" else passkey)(model, seed)
        for seed in SEEDS
        for task in TASKS
        for model in MODELS
    ]


def text(model, seed):
    """Two layers on text, evaluated on all of what is held out."""
    mixer, combine = MODELS[model]
    layers = 2 // len(mixer.split("+"))
    config = f"configs/text.py:{mixer},layers={layers},dim=128,steps=1200,seed={seed}"
    changes = {"batch": 4, "optim.lr": 3e-3, "eval.sample": 0, "data.holdout": 0.01}
    if "sliding_window" in mixer:
        changes["model.mixers.sliding_window.window"] = 64
    evaluations = [{"length": length} for length in LENGTHS]
    labels = {"task": "text", "model": model, "seed": seed}
    return Trial(labels, config, changes | option(combine), evaluations=evaluations)


def passkey(model, seed):
    """The same mixers on passkeys, evaluated on enough of them for all depths."""
    mixer, combine = MODELS[model]
    config = f"configs/passkey.py:{mixer},seed={seed}"
    labels = {"task": "passkey", "model": model, "seed": seed}
    short = Trial(labels, f"{config},length=180,steps=800", option(combine))
    changes = {"batch": 16, "optim.lr": 5e-3} | option(combine)
    evaluations = [{"length": n, "rows": 40 * max(1, 8192 // n)} for n in LENGTHS]
    return Trial(labels, f"{config},length=512,steps=600", changes, short, evaluations)


def option(combine):
    return {"model.mixers.hybrid.combine": combine} if combine else {}


def keep(*found):
    """The figures at each of LENGTHS."""
    return {"lengths": [{name: at[name] for name in KEPT if name in at} for at in found]}


def figures(rows, task, model, name):
    """A figure at each of LENGTHS; none where the model was not trained."""
    found = results.select(rows, task=task, model=model)
    return [at[name] for at in found[0]["lengths"]] if found else []


def tables(rows):
    head = ["model", *(f"bits per byte, {n}" for n in LENGTHS), *(f"passkey, {n}" for n in LENGTHS)]
    lines = []
    for model in MODELS:
        bits = [f"{value:.3f}" for value in figures(rows, "text", model, "bits_per_byte")]
        digits, whole = (
            figures(rows, "passkey", model, name)
            for name in ("query_accuracy", "sequence_accuracy")
        )
        keys = [f"{each:.2f} / {all_of:.2f}" for each, all_of in zip(digits, whole, strict=True)]
        none = ["-"] * len(LENGTHS)
        lines.append([model, *(bits or none), *(keys or none)])
    return {"lengths": (head, lines)}


def draw(rows):
    """Text by the length of rows and, in the longest, by context; passkeys by length."""
    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    axes = by_length, by_context, passkeys = figure.subplots(1, 3)
    for i, model in enumerate(MODELS):
        style = dict(color=f"C{i}", marker="o", label=model)
        line(by_length, figures(rows, "text", model, "bits_per_byte"), **style)
        octaves = (figures(rows, "text", model, "by_context") or [[]])[-1]
        across, up = ([octave[key] for octave in octaves] for key in ("from", "bits_per_byte"))
        by_context.plot(across, up, **style)
        line(passkeys, figures(rows, "passkey", model, "sequence_accuracy"), **style)
        style |= dict(linestyle=":", label=None)
        line(passkeys, figures(rows, "passkey", model, "query_accuracy"), **style)
    labels = (
        ("bytes of a row", "bits per byte of all held-out text"),
        (f"bytes of the file seen, rows of {LENGTHS[-1]}", "bits per byte"),
        ("bytes of a row", "whole passkeys right; dotted: digits"),
    )
    for ax, (x, y) in zip(axes, labels, strict=True):
        ax.set(xlabel=x, ylabel=y)
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.25)
    passkeys.set_ylim(-0.02, 1.02)
    by_context.axvline(512, color="0.5", linestyle="--", linewidth=1)  # the rows of training
    by_context.legend(fontsize=8)
    return figure


def line(axes, values, **style):
    axes.plot(LENGTHS[: len(values)], values, **style)
