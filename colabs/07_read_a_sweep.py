# %% [markdown]
# # 07 Read a sweep
#
# **Is the difference larger than the spread between seeds?**
#
# An experiment of memjax is a folder: `sweep.py` lists what is trained, `results.jsonl` has a row
# for every run, with its settings and a hash of them. Here we read rows that are committed; nothing
# is trained.

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
import itertools
import pathlib
import statistics

import jax
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from IPython.display import Markdown, display

import memjax
from memjax import results, trials

print(f"jax {jax.__version__} on {jax.default_backend()}")
root = pathlib.Path(memjax.__file__).parents[1]


def sweep(name):
    return trials.Sweep(f"{root}/experiments/{name}/sweep.py")


# %% [markdown]
# ## A row
#
# What a row says of a run: labels, the config and its changes, the figures of the last step, the
# versions that it was made with.

# %%
eight_pairs = sweep("eight_pairs")
rows = eight_pairs.shown()
print(f"{len(rows)} rows of {len(eight_pairs.trials)} trials; the first:")
for name, value in rows[0].items():
    print(f"  {name:<18} {value}")

# %% [markdown]
# ## Seeds first
#
# MQAR with 8 pairs, three seeds of each cell. All four solve it; is their order real? An interval
# of 95 % for the mean of $n$ seeds is $\bar x \pm t_{0.975,\,n-1}\, s / \sqrt{n}$, and with three
# seeds
# $t$ is 4.3, not 2.

# %%
groups = results.grouped(rows, "cell")
FIGURE = "query_accuracy"


def half_width(group):
    """Of the interval of 95 % for the mean of a group's figure."""
    values = [row[FIGURE] for row in group]
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return quantile * statistics.stdev(values) / len(values) ** 0.5


figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
results.draw_points(ax, groups, FIGURE)
for height, group in enumerate(groups.values()):
    ax.errorbar(results.mean(group, FIGURE), height, xerr=half_width(group), color="0.4", capsize=4)
ax.set_xlabel("query accuracy; dots: seeds, lines: 95 % for the mean")
plt.show()

# %% [markdown]
# Welch's test of each pair of cells; with $m$ pairs the smallest $p$ has to be below $0.05 / m$ to
# stand (Bonferroni).

# %%
combinations = list(itertools.combinations(groups, 2))
lines = []
for a, b in combinations:
    x, y = ([row[FIGURE] for row in groups[name]] for name in (a, b))
    p = scipy.stats.ttest_ind(x, y, equal_var=False).pvalue
    stands = "yes" if p < 0.05 / len(combinations) else "no"
    lines.append([a, b, f"{np.mean(x) - np.mean(y):+.4f}", f"{p:.3f}", stands])
head = ["", "", "difference", "p", f"below 0.05 / {len(combinations)}"]
display(Markdown(results.markdown((head, lines))))

# %% [markdown]
# ## A difference that needs no test
#
# Forgetting MQAR: keys are bound twice, the last value counts. Dashed: what a memory that only
# adds can reach. Look for groups that do not overlap, and for cells whose seeds are far apart:
# there three seeds say that learning is a lottery, not how good the memory is.

# %%
forgetting = sweep("forgetting_mqar")
cells = forgetting.module.by_cell(forgetting.shown())
cells = dict(sorted(cells.items(), key=lambda item: results.mean(item[1], FIGURE)))
figure, ax = plt.subplots(figsize=(7, 5.4), layout="constrained")
results.draw_points(ax, cells, FIGURE)
ax.axvline(forgetting.module.SUMS, color="0.5", linestyle="--", linewidth=1)
ax.set_xlabel("query accuracy; dots: seeds, bar: mean")
plt.show()
spread = {name: statistics.stdev(row[FIGURE] for row in group) for name, group in cells.items()}
name = max(spread, key=spread.get)
print(f"largest spread: {name}, {', '.join(f'{row[FIGURE]:.3f}' for row in cells[name])}")

# %% [markdown]
# ## Against a law
#
# Better than a comparison with other runs is one with what must come out. A window of attention can
# answer a query when the value is inside the window; how often it is, follows from the task's
# generator alone.

# %%
window = sweep("window_law")
rows, law = window.shown(), window.module.law
across = range(4, 65, 12 if FAST else 3)
figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.plot(across, [law(tokens) for tokens in across], color="0.5", label="law")
ax.plot(
    [row["window"] for row in rows], [row[FIGURE] for row in rows], "o", alpha=0.6, label="runs"
)
ax.set(xlabel="tokens of the window", ylabel="query accuracy", ylim=(-0.02, 1.02))
ax.grid(alpha=0.25)
ax.legend()
plt.show()
for tokens, group in results.grouped(rows, "window").items():
    print(f"{tokens:>3} tokens: mean {results.mean(group, FIGURE):.4f}, law {law(tokens):.4f}")

# %% [markdown]
# The negative result is in the picture: a window of 8 tokens learns nothing in the steps given,
# though 8 % of the queries can be answered.
#
# ## What it costs
#
# A sweep draws its own picture and makes its own tables, by the functions that its README is made
# with. Recall against the bytes of state of one sequence:

# %%
mqar = sweep("mqar")
rows = mqar.shown()
print(f"{len(rows)} of {len(mqar.trials)} trials are run")
display(mqar.module.draw(rows))
display(Markdown(results.markdown(mqar.tables()["rates"])))

# %% [markdown]
# Two things to ask of such a picture. Who had the learning rate chosen: each memory its own, the
# better of the table's two, on the same rows that are shown, which favours all a little. And what
# differs besides the memory: here nothing but the mixer; attention's state grows with the row.
#
# ## Your own
#
# A trial is labels, a config, and changes; its hash is that of all settings, so that a row is never
# taken for one of other settings. `python -m memjax.sweep --sweep=experiments/mine/sweep.py` trains
# what has no row yet.

# %%
mine = [
    trials.Trial(
        {"cell": cell, "pairs": pairs, "seed": seed},
        f"{root}/configs/mqar.py:{cell},seed={seed}",
        {"data.pairs": pairs},
    )
    for cell in ("delta_net", "linear_attention")
    for pairs in (4, 8)
    for seed in range(3)
]
print(len(mine), "trials; the first:", mine[0].name, mine[0].hash)
print(*mine[0].command("runs/mine")[1:])
