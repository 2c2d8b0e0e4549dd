# %% [markdown]
# # 04 Inside a hybrid
#
# **What does the window hold, what does the memory hold, what does B'MOJO store?**
#
# A hybrid layer has a window of attention, exact and short, beside a memory, whose state has a
# fixed size and reaches far. `hybrid` adds them up with a gate per channel (after arXiv 2402.19427
# and 2501.00663):
#
# $$y_t = s_t \odot \mathrm{attention}(x)_t + (1 - s_t) \odot \mathrm{memory}(x)_t, \qquad
#   s_t = \sigma(W x_t + b).$$
#
# We train one on recall with a window of 4 tokens, then take it apart.

# %%
# @title Setup: on Colab a clone of memjax and what else its image lacks; jax stays as it is
import os
import subprocess
import sys

REPOSITORY = ""  # @param {type: "string"}
PACKAGES = ["jaxtyping", "wadler-lindig", "ml-collections"]
if "google.colab" in sys.modules:
    if not os.path.isdir("memjax"):
        assert REPOSITORY, "REPOSITORY: give the address from which git can clone memjax"
        subprocess.run(["git", "clone", "-q", "--depth=1", REPOSITORY, "memjax"], check=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True)
    sys.path.insert(0, os.path.abspath("memjax"))

FAST = os.environ.get("MEMJAX_FAST") == "1"  # smaller sizes, for tests

# %%
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import memjax
from memjax import build, config, evaluate
from memjax.blocks.bmojo import EideticWindow
from memjax.probes import layers, states

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %%
root = pathlib.Path(memjax.__file__).parents[1]
HYBRID, BMOJO = "hybrid(sliding_window, gated_delta_net)", "bmojo(gated_delta_net)"


def trained(mixer, steps):
    """(the run, its parameters) on MQAR: 32 tokens, 4 pairs, queries at any distance."""
    steps = 100 if FAST else steps
    changes = {"steps": steps, "data.eval_examples": 128 if FAST else 2000}
    run = build(config.load(f"{root}/configs/hybrid_recall.py:{mixer}", changes))
    state, history = run.train(steps)
    print(f"{mixer}: accuracy {history['accuracy'][-50:].mean():.3f} in the last 50 steps")
    return run, state.params


# %% [markdown]
# ## Without one of them
#
# Both halves end in a projection to the model's width. With the weights of one projection set to
# zero that half is silent, and the accuracy shows who answers at which distance. Left the gate;
# right `window_exit`, $y_t = \mathrm{attention}(x)_t + \mathrm{memory}(x, \text{delayed})_t$: the
# memory is given exactly the tokens that leave the window (Artificial Hippocampus Networks, arXiv
# 2510.07318).


# %%
def silenced(params, half):
    """The parameters with the output of the hybrid's half, if it is one of the two, set to zero."""

    def zero(path, leaf):
        return leaf * (f"['{half}']['output']" not in jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(zero, params)


lines = {"": ("both", "-", 5), "attention": ("without the window", "o--", 1.5)}
lines |= {"memory": ("without the memory", "s:", 1.5)}
models = {}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
for ax, (combine, steps) in zip(axes, (("gate", 1000), ("window_exit", 600)), strict=True):
    run, params = models[combine] = trained(f"{HYBRID},combine={combine}", steps)
    for half, (label, style, width) in lines.items():
        given = silenced(params, half)
        scored = evaluate.score_rows(run.model, given, run.data, None)
        rows = evaluate.of_task(scored, run.data.chance)["by_distance"]
        across, up = ([row[key] for row in rows] for key in ("distance", "query_accuracy"))
        alpha = 0.35 if half == "" else 1
        ax.plot(across, up, style, label=label, linewidth=width, alpha=alpha, markersize=4)
    ax.axvline(3.5, color="0.5", linewidth=1, label="reach of the window")
    ax.set(xlabel="distance, tokens", ylim=(-0.02, 1.02), title=combine)
    ax.grid(alpha=0.25)
axes[0].set_ylabel("query accuracy")
axes[1].legend()
plt.show()

# %% [markdown]
# With the gate the memory is written with every token, so that it can answer alone, and on this
# task it does: the trained window may be cut off. Where the memory is written behind the window,
# the window has to answer what is near.
#
# ## What each holds of one row
#
# The model with the gate: `layers.capture` runs it on a batch and keeps, for each memory in it, the
# cell and what the layer hands to it. Left: the weights of the window's softmax, a row for each
# token that asks. Right: how much the memory still knows of token $j$ at time $t$, the cosine
# between what it answers to the key $k_j$ right after the write and at time $t$. The bars are what
# the memory is told to write, $\beta_j$.

# %%
batch = next(iter(run.data.evaluation(1)))
ROW, T = 0, batch["inputs"].shape[1]
row = zip(batch["inputs"][ROW], batch["mask"][ROW], strict=True)
labels = [f"[{number}]" if asked else f"{number}" for number, asked in row]
run, params = models["gate"]
held = {m.name.split("/")[-1]: m for m in layers.capture(run.model, params, batch["inputs"])[0]}
window, memory = held["attention"], held["memory"]

q, k = (np.asarray(a)[ROW].reshape(T, -1) for a in (window.inputs.q, window.inputs.k))
age = np.arange(T)[:, None] - np.arange(T)
seen = (age >= 0) & (age < window.cell.window)
weights = np.asarray(jax.nn.softmax(np.where(seen, q @ k.T * window.cell.key_dim**-0.5, -np.inf)))

one = jax.tree.map(lambda leaf: leaf[ROW : ROW + 1], memory.inputs)
reads = np.asarray(states.later_reads(memory.cell, memory.weights, one, tuple(range(T))))[
    :, :, 0, 0
]
known = np.full((T, T), np.nan)
for t in range(T):
    for lag in range(t + 1):
        known[t, t - lag] = states.cosine(reads[t, lag], reads[t - lag, 0])

figure, axes = plt.subplots(
    2, 2, figsize=(12, 6.6), height_ratios=(1, 6), sharex=True, layout="constrained"
)
axes[0, 0].set_axis_off()
axes[0, 1].bar(np.arange(T), np.asarray(one.beta)[0, :, 0], color="0.4")
axes[0, 1].set_ylabel("β")
titles = ("window: weight of the softmax", "memory: cosine with its answer right after the write")
for ax, shown, title in zip(axes[1], (np.where(seen, weights, np.nan), known), titles, strict=True):
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_facecolor("0.88")
    ax.set_title(title, fontsize=11)
    ax.set_xticks(range(T), labels, rotation=90, fontsize=7)
    ax.set_yticks(range(T), labels, fontsize=7)
    ax.set(xlabel="token; the first 8 bind 4 keys", ylabel="at this token; [queries]")
    figure.colorbar(image, ax=ax)
plt.show()

# %% [markdown]
# ## What B'MOJO stores
#
# B'MOJO (arXiv 2407.06324) is one softmax over three kinds of tokens: the last $W$ as they are; the
# $W$ in front of them as the memory sees them (fading); and of all older ones those that the memory
# foresaw worst (eidetic). Here $W = 2$, 8 places in the store, and of each chunk of $W$ tokens both
# may be stored: by their error of prediction
# $e_j = \|F_j - f_j\| / \max(\|F_j\|, \|f_j\|)$, $F_j$ the memory's output, $f_j$ the mean of
# those in front of it; the smallest goes when the store is full. (The test on the memory's output
# and the bounded store are the paper's, these equations are memjax's.)

# %%
run, params = trained(BMOJO, 600)
found, _ = layers.capture(run.model, params, batch["inputs"])
memory = next(each for each in found if isinstance(each.cell, EideticWindow))
_, _, (_, store) = states.timeline(memory.cell, memory.weights, memory.inputs, 1)
token = np.asarray(store.token)[:, :, 0]  # [T, B, stored], numbered from 1, 0 where free

kind = np.zeros((T, T), int)  # of column j at time t: 0 out of sight, 1 exact, 2 fading, 3 stored
for number, (youngest, oldest) in enumerate(memory.cell.ages, 1):
    kind[(age >= youngest) & (age < oldest)] = number
for t in range(T):
    for j in token[t, ROW] - 1:
        if j >= 0 and age[t, j] >= memory.cell.reach:
            kind[t, j] = 3
figure, axes = plt.subplots(
    2, 1, figsize=(7, 6.6), height_ratios=(1, 6), sharex=True, layout="constrained"
)
axes[0].bar(np.arange(T), np.asarray(memory.inputs.innovation)[ROW, :, 0], color="0.4")
axes[0].set_ylabel("e")
colors = ("0.93", "tab:blue", "tab:cyan", "tab:orange")
axes[1].imshow(kind, cmap=ListedColormap(colors), vmin=-0.5, vmax=3.5, aspect="auto")
axes[1].set_xticks(range(T), labels, rotation=90, fontsize=7)
axes[1].set_yticks(range(T), labels, fontsize=7)
axes[1].set(xlabel="token; the first 8 bind 4 keys", ylabel="at this token; [queries]")
names = ("out of sight", "exact", "fading", "stored")
handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
axes[1].legend(handles, names, loc="upper right")
plt.show()

# %% [markdown]
# Is that this row alone? The share of tokens of each kind that are in the store at the end of a
# row, over a batch.

# %%
place = np.broadcast_to(np.arange(T), batch["mask"].shape)
bound = place < 2 * 4
kinds = {"key of a pair": bound & (place % 2 == 0), "value of a pair": bound & (place % 2 == 1)}
kinds |= {"query": batch["mask"], "noise": ~bound & ~batch["mask"]}
stored = np.zeros(batch["mask"].shape, bool)
for row, numbers in zip(stored, token[-1], strict=True):
    row[numbers[numbers > 0] - 1] = True
for name, which in kinds.items():
    print(f"{name:<16} {stored[which].mean():.2f} stored of {which.sum()}")

# %% [markdown]
# - The window forgets by position, the memory by what is written over it, the store by surprise.
# - Nothing told the store what a pair is: the memory foresees queries and noise better than values.
# - One seed on a small task: `experiments/hybrid_recall` has three seeds, thirteen ways of joining
#   a window and a memory, and stores of several sizes.
#
# Try `trained(f"{HYBRID},combine=sequential", 1000)`, another `ROW`, `task=forgetting_mqar`. Next:
# `05_kernels`.
