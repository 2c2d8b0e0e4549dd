# %% [markdown]
# # 03 Recall in five minutes
#
# **How far back does each memory recall?**
#
# Multi-query associative recall (MQAR, Arora et al. 2023, arXiv 2312.04927): a row binds keys to
# values, then asks for each key once; the model has to say its value. We train four mixers on it,
# each in the same small model, and look at the accuracy by the distance between the value and the
# query.

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

import memjax
from memjax import build, config, evaluate, tasks
from memjax.nn.lm import initial_state

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## The task
#
# 64 tokens, 8 pairs of 128 token ids, queries at any distance, random tokens between them.

# %%
TASK = {"length": 64, "pairs": 8, "vocab": 128, "power": 1.0, "noise": True}
source = tasks.make("mqar", **TASK)
print("\n".join(source.show(source[0])))

# %% [markdown]
# ## The models
#
# [short convolution, mixer], width 64, one head, no MLP, no positions (`configs/hybrid_recall.py`):
#
# - `attention` keeps the keys and values of all 64 tokens;
# - `sliding_window` keeps those of the last 32;
# - `retnet` keeps one matrix that fades, $S \leftarrow e^g S + k v^\top$ with a constant $g$;
# - `gated_delta_net` keeps one matrix: a decay that the token sets, then the delta rule.

# %%
steps = 600  # @param {type: "integer"}
names = ("attention", "sliding_window", "retnet", "gated_delta_net")
WINDOW = 32
if FAST:
    steps, names = 100, names[:2]
root = pathlib.Path(memjax.__file__).parents[1]
changes = {f"data.{name}": value for name, value in TASK.items()}
changes |= {"steps": steps, "data.eval_examples": 100 if FAST else 1500}

histories, found = {}, {}
for name in names:
    sizes = {"attention": TASK["length"], "sliding_window": WINDOW}
    window = {f"model.mixers.{name}.window": sizes[name]} if name in sizes else {}
    run = build(config.load(f"{root}/configs/hybrid_recall.py:{name}", changes | window))
    state, histories[name] = run.train(steps)
    scored = evaluate.score_rows(run.model, state.params, run.data, None)
    found[name] = evaluate.of_task(scored, run.data.chance)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(initial_state(run.model, state.params, 1)))
    told = f"query accuracy {found[name]['query_accuracy']:.3f}"
    print(f"{name:<16} {told}, state of one sequence {size:,} bytes")

# %% [markdown]
# ## Learning
#
# Nothing for a hundred steps or more, then nearly all within fifty: a layer has to bind, ask and
# answer at once, and no part pays without the others. (Means of 20 steps.)

# %%
colors = dict(zip(names, ("C0", "C1", "C2", "C3"), strict=False))
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
for name, history in histories.items():
    blocks = history["accuracy"].reshape(-1, 20).mean(axis=1)
    ax.plot(20 * (0.5 + np.arange(len(blocks))), blocks, color=colors[name], label=name)
ax.set(xlabel="step", ylabel="accuracy on new rows", ylim=(-0.02, 1.02))
ax.grid(alpha=0.25)
ax.legend()
plt.show()

# %% [markdown]
# ## Accuracy by distance
#
# Tokens from a value to the query that asks for it, on rows that no training has seen.

# %%
figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
for name, figures in found.items():
    rows = figures["by_distance"]
    across, up = ([row[key] for row in rows] for key in ("distance", "query_accuracy"))
    ax.plot(across, up, "o-", color=colors[name], label=name, markersize=4)
reach = dict(color=colors["sliding_window"], linestyle=":", label=f"reach of {WINDOW} tokens")
ax.axvline(WINDOW - 0.5, **reach)
ax.axhline(source.chance, color="0.5", linewidth=1, label="a guess")
ax.set(xlabel="distance, tokens", ylabel="query accuracy", ylim=(-0.02, 1.02))
ax.grid(alpha=0.25)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# - The window is exact up to its edge and knows nothing beyond it.
# - A fading matrix of the same bytes has no edge: what is old is drowned by what is new.
# - The delta rule with a gate recalls as attention does at any distance here, from a state that
#   does not grow: 8 pairs are few for 64 x 64 numbers, and the gate can stop the noise.
#
# One seed, one learning rate: `experiments/mqar` and `experiments/hybrid_recall` have three seeds
# and more memories, `07_read_a_sweep` reads them. Try `TASK["pairs"] = 16`, or another name of
# `memjax.cells.names()`. Next: `04_inside_a_hybrid`.
