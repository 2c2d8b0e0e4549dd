# %% [markdown]
# # 06 Capacity laws
#
# **How many pairs does a matrix of d x d numbers hold?**
#
# $N$ pairs of independent keys and values, uniform on unit spheres of $\mathbb{R}^d$, are written
# once and asked for by their keys. The expected squared error of an answer has a closed form for
# several rules (`memjax.probes.laws`; the age $a$ of a pair counts the writes behind it):
#
# | rule | expected error |
# |---|---|
# | sum, $S \leftarrow S + k v^\top$ | $(N - 1) / d$ |
# | decay, $S \leftarrow c S + k v^\top$ | $(1 - c^a)^2 + [(1 - c^{2N}) / (1 - c^2) - c^{2a}] / d$ |
# | delta rule, step $\beta$ | $1 - 2 \beta (1 - \beta/d)^a + \ldots$ (`laws.delta_error`) |
#
# The first is the inverse of the signal-to-noise ratio of Zhong et al. 2025 (arXiv 2505.19488), the
# last is the misadjustment of a least-mean-squares filter. We hold them to what memories do.

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
import jax
import matplotlib.pyplot as plt
import numpy as np

from memjax.cells.delta_net import DeltaNet
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.simple_gla import SimpleGLA
from memjax.probes import laws, recall

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## Error by the number of pairs
#
# `recall.measure` writes lists of pairs into a cell, asks for all of them after every few writes,
# and puts the law beside the error, in units of what a pair is answered with that is alone in the
# memory ($\beta$ for a step $\beta$). Points: means of the lists, bars: two standard errors.
# Lines: laws.

# %%
DIMS = (32, 64) if FAST else (32, 64, 128)
SEEDS, PAIRS = (2, 64) if FAST else (8, 256)
RULES = {  # cell, settings of the study
    "sum": (LinearAttention, {}),
    "decay, 0.98 a write": (SimpleGLA, {"keep": 0.98}),
    "delta rule, β = 1": (DeltaNet, {}),
    "delta rule, β = 1/2": (DeltaNet, {"strength": 0.5}),
}
found = {}
for rule, (cell, settings) in RULES.items():
    for dim in DIMS:
        study = recall.Study(dim=dim, seeds=SEEDS, pairs=PAIRS, **settings)
        found[rule, dim] = recall.measure(cell(dim, dim), study, recall.draw(study))

# %%
figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), sharey=True, layout="constrained")
for ax, rule in zip(axes, RULES, strict=True):
    for i, dim in enumerate(DIMS):
        rows = found[rule, dim]["capacity"]
        ratio = [row["pairs"] / dim for row in rows]
        bars = [2 * row["error_sd"] / SEEDS**0.5 for row in rows]
        ax.errorbar(ratio, [row["error"] for row in rows], bars, fmt="o", color=f"C{i}", ms=4)
        ax.plot(ratio, [row["theory"] for row in rows], color=f"C{i}", label=f"d = {dim}")
    ax.loglog(base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="pairs / d", title=rule)
    ax.grid(alpha=0.25)
axes[0].set_ylabel("error")
axes[0].yaxis.set_major_formatter("{x:g}")
axes[0].legend()
plt.show()

apart = [
    abs(row["error"] - row["theory"]) / (row["error_sd"] / SEEDS**0.5)
    for measured in found.values()
    for row in measured["capacity"]
]
print(f"{len(apart)} points, distance from the law in standard errors: "
      f"median {np.median(apart):.1f}, largest {max(apart):.1f}")  # fmt: skip

# %% [markdown]
# All rules lie on one curve for all $d$ but the decay, which has a length of its own, $1 / (1 - c)$
# writes.
#
# ## Who is forgotten
#
# The same memories after half of the pairs, by the age of a pair. The sum treats all alike; a whole
# step of the delta rule knows the last pair exactly and the first ones hardly.

# %%
dim = 64
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for i, rule in enumerate(RULES):
    rows = found[rule, dim]["by_age"]
    age = [(row["from"] + row["to"]) / 2 for row in rows]
    bars = [2 * row["error_sd"] / SEEDS**0.5 for row in rows]
    ax.errorbar(age, [row["error"] for row in rows], bars, fmt="o", color=f"C{i}", ms=4)
    ax.plot(age, [row["theory"] for row in rows], color=f"C{i}", label=rule)
ax.set_xscale("symlog", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set(xlabel="age of a pair, writes", ylabel="error", title=f"{PAIRS // 2} pairs, d = {dim}")
ax.set_ylim(-0.1, 3.4)
ax.grid(alpha=0.25)
ax.legend(ncols=2, loc="upper center")
plt.show()

# %% [markdown]
# ## How many are right
#
# An error is not a mistake: an answer is right when its value is the nearest of all that were
# stored and of 4096 others. Crosstalk of squared length $N / d$ is spread over $d$ directions, so
# that a sum names half of the pairs right up to $N \approx d^2 / (2 \ln n)$ among $n$ candidates
# (`laws.hebbian_half`, dotted), where its error is far above 1. The whole step has the smaller
# error and fewer right: it can name about $(d / 2) \ln(1 + d / (2 \ln n))$ of the last pairs
# (`laws.delta_half`), and no more of them when more are written.

# %%
candidates = study.distractors + PAIRS
figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for i, rule in enumerate(RULES):
    rows = found[rule, dim]["capacity"]
    number = np.array([row["pairs"] for row in rows])
    right = number * np.array([row["right"] for row in rows])
    ax.plot(number, right, "o-", color=f"C{i}", ms=4, label=rule)
    print(
        f"{rule:<22}" + "".join(f"{n:>5}: {r / n:.2f}" for n, r in zip(number, right, strict=True))
    )
ax.plot(number, number, color="0.6", linewidth=1, label="all")
ax.axhline(laws.delta_half(dim, dim, candidates), color="C2", linestyle=":")
ax.axvline(laws.hebbian_half(dim, dim, candidates), color="C0", linestyle=":")
ax.loglog(base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.yaxis.set_major_formatter("{x:g}")
ax.set(xlabel="pairs written", ylabel="pairs named right", title=f"d = {dim}")
ax.grid(alpha=0.25)
ax.legend()
plt.show()

# %% [markdown]
# - For random pairs that are never bound again a sum holds most; the delta rule pays for being able
#   to overwrite (`02_add_your_own_cell`), and half a step pays less.
# - None of this is trained: a model can choose keys that are nearly orthogonal, up to $d$ of them.
# - `experiments/capacity` has all cells; `tests/test_laws.py` holds these laws in the test suite.
#
# Next: `07_read_a_sweep`.
