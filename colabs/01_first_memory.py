# %% [markdown]
# # 01 First memory
#
# **What is it to write a pair into a matrix, to read it, and to forget it?**
#
# An associative memory holds pairs of a key $k \in \mathbb{R}^K$ and a value
# $v \in \mathbb{R}^V$ in a state of fixed size, here a matrix $S \in \mathbb{R}^{K \times V}$. A
# query $q$ is answered with $y = S^\top q$. Memories differ in what a token writes:
#
# | | a token writes | cell | paper |
# |---|---|---|---|
# | sum | $S \leftarrow S + k v^\top$ | `LinearAttention` | 2006.16236 |
# | decay | $S \leftarrow e^{g} S + k v^\top$ | `SimpleGLA` | 2405.21060 |
# | delta rule | $S \leftarrow S + \beta\, k\,(v - S^\top k)^\top$ | `DeltaNet` | 2102.11174 |
# | both | $S \leftarrow e^{g} S$, then the delta rule | `GatedDeltaNet` | 2412.06464 |

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

import memjax
from memjax.cells.delta_net import DeltaNet
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.simple_gla import SimpleGLA
from memjax.probes import laws, pairs, states

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## One token
#
# Six pairs: keys are random directions, values are letters of 7 x 5 pixels, 1 or -1 each. A cell
# is defined for one memory and one token by `init_state`, `write` and `read`; models call
# `memjax.run`, which takes whole sequences. `pairs.tokens` makes the inputs that a cell takes from
# keys and values, arrays [batch, time, heads, ...]; a query is the token's key, $\beta = 1$.

# %%
PIXELS = {
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
}


def letters(word):
    """[1, letters, 35], of -1 and 1."""
    rows = [PIXELS[letter].replace(" ", "") for letter in word]
    return np.array([[[2.0 * int(pixel) - 1 for pixel in row] for row in rows]])


K, V, N = 16, 35, 6
rng = np.random.default_rng(1)
keys, values = pairs.unit(rng, 1, N, K), letters("MEMORY")
cell = DeltaNet(key_dim=K, value_dim=V, scale=1.0)
xs = pairs.tokens(cell, keys, values)

state = cell.init_state({})
for t in range(N):
    state = cell.write({}, state, cell.inputs(*(leaf[0, t, 0] for leaf in xs)))

y, final = memjax.run(cell, {}, xs)  # y [1, N, 1, V], final [1, 1, K, V]
print("largest difference between both:", float(abs(final[0, 0] - state).max()))

# %% [markdown]
# ## Write and read
#
# Keys are not orthogonal: the sum answers the letter and $\sum_j (k_j^\top k)\, v_j$ of all the
# others, the **crosstalk**. The delta rule writes the difference to what its key already reads:
# the last letter is exact, and each later write takes a little of the older ones.


# %%
def remembered(cell, keys, values, **given):
    """(states [T, K, V] after each write, what each of them answers to all keys [T, T, V])."""
    xs = pairs.tokens(cell, keys, values, **given)
    _, _, held = states.timeline(cell, {}, xs, 1)
    return np.asarray(held[:, 0, 0]), np.asarray(pairs.ask(cell, {}, held, xs))[:, 0, :, 0]


def show_letters(axes, given, titles):
    for ax, pixels, title in zip(axes, given, titles, strict=True):
        ax.imshow(pixels.reshape(7, 5), cmap="gray", vmin=-1.5, vmax=1.5)
        ax.set(title=title, xticks=[], yticks=[])


rules = {"sum": LinearAttention(K, V, scale=1.0), "delta rule": cell}
held, _ = remembered(rules["sum"], keys, values)
figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), sharey=True, layout="constrained")
for ax, n in zip(axes, (1, 3, 6), strict=True):
    image = ax.imshow(held[n - 1], cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
    ax.set(title=f"sum: S after {n} write{'s' if n > 1 else ''}", xlabel="pixel of the value")
axes[0].set_ylabel("channel of the key")
figure.colorbar(image, ax=axes)
plt.show()

figure, axes = plt.subplots(2, N, figsize=(8, 4.2), layout="constrained")
for row, (name, rule) in zip(axes, rules.items(), strict=True):
    answers = remembered(rule, keys, values)[1][-1]
    show_letters(row, answers, [f"key {i + 1}" for i in range(N)])
    row[0].set_ylabel(name)
    error = np.square(answers - values[0]).mean(axis=-1)
    print(f"{name:<10} mean square error of a pixel, key 1 to {N}: {error.round(2)}")
figure.suptitle("answers after six writes")
plt.show()
print(f"law of the sum, (N - 1) / K: {laws.hebbian_error(N, K):.2f}")

# %% [markdown]
# ## Overwrite
#
# The first key is bound again, to an X. The sum answers both letters; the delta rule removes what
# the key reads before it writes.

# %%
keys_again = np.concatenate([keys, keys[:, :1]], axis=1)
values_again = np.concatenate([values, letters("X")], axis=1)
answers = [remembered(rule, keys_again, values_again)[1][-1, 0] for rule in rules.values()]
figure, axes = plt.subplots(1, 4, figsize=(7, 2.5), layout="constrained")
titles = ["old value", "new value", "sum answers", "delta rule answers"]
show_letters(axes, [values[0, 0], values_again[0, -1], *answers], titles)
plt.show()

# %% [markdown]
# ## Forget
#
# 16 keys are bound to random unit values, then bound again, in the same order, to new ones. The
# colour of row $j$ is $v_j^\top y$, how much of the value of pair $j$ the memory answers to its
# key, after each write. A pair is written on the diagonal and lives to the right of it.

# %%
K, N, KEEP = 32, 16, 0.95  # KEEP: e^g of each write
keys = np.tile(pairs.unit(rng, 1, N, K), (1, 2, 1))
values = pairs.unit(rng, 1, 2 * N, K)
cells = {"sum": LinearAttention, f"decay, {KEEP} a write": SimpleGLA}
cells |= {"delta rule": DeltaNet, "both": GatedDeltaNet}
number = 1 + np.arange(2 * N)
figure, axes = plt.subplots(1, 4, figsize=(14, 3.7), sharey=True, layout="constrained")
for ax, (name, make) in zip(axes, cells.items(), strict=True):
    _, answers = remembered(make(K, K, scale=1.0), keys, values, keep=KEEP)
    share = np.einsum("tjv,jv->jt", answers, values[0])
    share[number[:, None] > number] = np.nan  # not written yet
    ax.set_facecolor("0.85")
    image = ax.imshow(share, cmap="RdBu", vmin=-1.2, vmax=1.2, extent=(0.5, 32.5, 32.5, 0.5))
    ax.axhline(N + 0.5, color="black", linewidth=0.8)
    ax.axvline(N + 0.5, color="black", linewidth=0.8)
    ax.set(title=name, xlabel="writes so far")
axes[0].set_ylabel("pair; 17 to 32 bind the keys again")
figure.colorbar(image, ax=axes, label="share of the value in the answer")
plt.show()

# %% [markdown]
# - **sum**: nothing goes away; old values (above the line) are answered beside the new ones.
# - **decay**: every pair fades at the same pace, true or not.
# - **delta rule**: a pair lives until its key is bound again; other writes take a little of it.
# - **both**: what is false goes at once, what is old fades.
#
# Try `K = 128` (keys overlap less), `KEEP = 0.8`, `remembered(..., strength=0.5)` for
# $\beta = 1/2$. Next: `02_add_your_own_cell`; how much a memory holds: `06_capacity_laws`.
