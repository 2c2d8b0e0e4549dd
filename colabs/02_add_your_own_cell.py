# %% [markdown]
# # 02 Add your own cell
#
# **How much code is a new memory, and what comes with it?**
#
# A sum of pairs never removes anything; the delta rule removes all that a key reads before it
# writes. We build what lies between them, a memory with two gates, one to erase and one to write:
#
# $$S_t = S_{t-1} - \alpha_t\, k_t\, (S_{t-1}^\top k_t)^\top + \beta_t\, k_t v_t^\top, \qquad
#   y_t = S_t^\top q_t, \qquad \alpha_t, \beta_t \in [0, 1].$$
#
# $\alpha = 0$ is linear attention, $\alpha = \beta$ is DeltaNet. (Erasing and adding apart is old:
# the Neural Turing Machine, arXiv 1410.5401.)

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
import dataclasses
import pathlib
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import memjax
from memjax import build, config, results, trials, workload
from memjax.cells._matrix import MatrixMemory, Terms
from memjax.nn.layers import Dense, widen
from memjax.nn.mixer import ProjectionMixer
from memjax.probes import layers, pairs, recall
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field

print(f"jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## The cell
#
# `Inputs` says what a token hands to the memory; the `Field` of a leaf has its axes, which
# `memjax.run` checks, its kind and its range. `write` is the equation, for one memory and one
# token. `MatrixMemory` brings a matrix of zeros as the initial state, and the read-out.


# %%
class Inputs(NamedTuple):
    """q, k: [B, T, h, K], k of unit norm; v: [B, T, h, V]; beta, alpha: [B, T, h] in [0, 1]."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate", 0.0, 1.0)]
    alpha: Annotated[Array, Field("", "rate", 0.0, 1.0)]


@dataclasses.dataclass(frozen=True)
class EraseWrite(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        read = dot("k,kv->v", x.k, state)
        return state + jnp.outer(x.k, x.beta * x.v - x.alpha * read)

    def terms(self, xs):
        """Diagonal plus low rank: S + b (S^T a)^T + k (beta v)^T with a = k, b = -alpha k."""
        beta, alpha = xs.beta[..., None], xs.alpha[..., None]
        return Terms(xs.q, xs.k, beta * xs.v, a=xs.k, b=-alpha * xs.k)


# %% [markdown]
# That is all of the memory. `terms` is optional: it says the same in the letters of the affine
# family, and buys the chunked form, which is parallel over the tokens of a chunk. Without it there
# is `scan`, token by token. Both take resets at any token, masks, states carried in, and gradients.

# %%
cell = EraseWrite(key_dim=8, value_dim=4)
rng = np.random.default_rng(0)
xs = pairs.tokens(cell, pairs.unit(rng, 2, 100, 8), pairs.unit(rng, 2, 100, 4), strength=0.5)
reset = jnp.zeros((2, 100), bool).at[:, 37].set(True)  # a new document begins

y, _ = memjax.run(cell, {}, xs, reset=reset, implementation="scan")
z, _ = memjax.run(cell, {}, xs, reset=reset, implementation="chunked")
print("chunked against scan, largest difference:", float(abs(y - z).max()))

y, _ = memjax.run(cell, {}, xs)
_, state = memjax.run(cell, {}, jax.tree.map(lambda leaf: leaf[:, :60], xs))
z, _ = memjax.run(cell, {}, jax.tree.map(lambda leaf: leaf[:, 60:], xs), state=state)
print("in two parts against the whole:", float(abs(y[:, 60:] - z).max()))

# %% [markdown]
# ## What does it remember?
#
# Before anything is trained: 128 random pairs are stored in 64 x 64 numbers and asked for, with
# $\beta = 1$ and $\alpha$ from 0 to 1. Once the keys are all different; once there are only 32,
# each bound four times, and the last value is asked for. Right is an answer that is nearer to its
# value than to all others and to 4096 that were never stored.

# %%
study = recall.Study(pairs=64, seeds=2, distractors=256) if FAST else recall.Study(pairs=128)
lists = recall.draw(study)
cell = EraseWrite(study.dim, study.dim)


@jax.jit
def stored_and_asked(xs):
    return pairs.recall(cell, {}, xs, xs)[0]


def top_1(alpha):
    """Top-1 of lists of different keys, and of the last bindings of keys that are bound again."""
    given = np.full(lists.keys.shape[:2], alpha)
    y = np.asarray(stored_and_asked(pairs.tokens(cell, lists.keys, lists.values, alpha=given)))
    y, values = (np.split(a, 2) for a in (y, lists.values))  # different keys; keys bound again
    last = slice(-study.keys, None)
    different = recall.scores(y[0], values[0], values[0], lists.distractors)
    rebound = recall.scores(y[1][:, last], values[1][:, last], values[1], lists.distractors)
    return different.right.mean(), rebound.right.mean()


alphas = np.linspace(0, 1, 3 if FAST else 11)
different, rebound = np.transpose([top_1(alpha) for alpha in alphas])
figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
ax.plot(alphas, different, "o-", label=f"{study.pairs} different keys")
ax.plot(alphas, rebound, "s-", label=f"{study.keys} keys, {study.pairs // study.keys} times each")
ax.set(xlabel="α, what a write erases: 0 is the sum, 1 the delta rule", ylabel="top-1 accuracy")
ax.set(ylim=(-0.02, 1.02), title=f"untrained, K = V = {study.dim}, {study.seeds} lists each")
ax.grid(alpha=0.25)
ax.legend()
plt.show()

# %% [markdown]
# Erasing has a price where nothing has to be erased, and pays where keys come again. The whole
# delta rule erases more than it has to: a gate of its own is worth a layer.
#
# ## The layer
#
# `ProjectionMixer` has the projections, norms and gates that this family shares; the two gates are
# ours. `register` gives the memory a name, by which every config finds it.


# %%
class EraseWriteMixer(ProjectionMixer):
    """q, k of unit norm; beta and alpha are sigmoids of the token, per head."""

    def make_cell(self):
        return EraseWrite(*self.sizes())

    def setup(self):
        super().setup()
        self.gates = Dense((2, self.memories), (None, "heads"), std=self.std, dtype=self.dtype)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        beta, alpha = jnp.moveaxis(jax.nn.sigmoid(widen(self.gates(x))), -2, 0)
        return Inputs(q, k, v, beta, alpha), x, state


spec = CellSpec(
    name="erase_write",
    cell=lambda: EraseWrite(8, 6),
    mixer=EraseWriteMixer,
    paper="this notebook",
    recurrence="S −= α k (Sᵀk)ᵀ, S += β k vᵀ",
)
register(spec)

# %% [markdown]
# What the benchmark asks of a form before it times it, values and all gradients against `scan`:

# %%
shape = workload.Shape(length=64, dim=16)
distance = workload.check(spec, shape, ["scan", "chunked"])["chunked"]
print(f"chunked, values and gradients: relative distance from scan {distance:.1e}")

# %% [markdown]
# ## Train it
#
# Forgetting MQAR: 8 keys are bound, then bound again, and the last value of each is asked for. The
# points are runs of `experiments/forgetting_mqar`, same task and steps, a point a seed; dashed is
# the most that a sum can reach.

# %%
root = pathlib.Path(memjax.__file__).parents[1]
steps = 100 if FAST else 500
changes = {"steps": steps, "data.eval_examples": 100 if FAST else 3000}
run = build(config.load(f"{root}/configs/forgetting_mqar.py:erase_write", changes))
trained, history = run.train(steps)
ours = {"cell": "erase_write", **run.evaluation(trained.params)}
print(f"query accuracy {ours['query_accuracy']:.4f}, {history['loss'][-1]:.3f} nats at the end")

# %%
sweep = trials.Sweep(f"{root}/experiments/forgetting_mqar/sweep.py")
rows = results.select(sweep.shown(), dtype="float32")
names = ("linear_attention", "delta_net", "gated_delta_net", "dplr")
groups = {name: results.select(rows, cell=name) for name in names} | {"erase_write": [ours]}
figure, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
results.draw_points(ax, groups, "query_accuracy")
ax.axvline(sweep.module.SUMS, color="0.5", linestyle="--", linewidth=1)
ax.set(xlabel="query accuracy; bar: mean of the seeds", xlim=(-0.02, 1.02))
plt.show()

# %% [markdown]
# ## What did it learn to erase?
#
# The trained layer, opened on its own data. A binding is two tokens, key and value; the pair is
# written at the value, whose layer sees the key in front of it by a short convolution. Behind 32
# tokens there are only queries and noise.

# %%
batch = next(iter(run.data.evaluation(1)))
(memory,), _ = layers.capture(run.model, trained.params, batch["inputs"])
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for ax, name, title in zip(axes, ("alpha", "beta"), ("α, erase", "β, write"), strict=True):
    gate = np.asarray(getattr(memory.inputs, name)).mean(axis=(0, 2))
    ax.plot(np.arange(0, 64, 2), gate[::2], ".", label="even tokens; keys up to 32")
    ax.plot(np.arange(1, 64, 2), gate[1::2], ".", label="odd tokens; values up to 32")
    ax.axvline(31.5, color="0.5", linewidth=1)
    ax.set(xlabel="token", title=title)
    ax.grid(alpha=0.25)
axes[0].set(ylabel="mean over rows", ylim=(-0.02, 1.02))
axes[1].legend(loc="upper right")
plt.show()

# %% [markdown]
# To keep a memory, copy `memjax/cells/_template.py` and put the same lines there: the contract
# tests, the benchmark, the probes and the tables then find it by themselves (CONTRIBUTING.md, "Add
# a cell"). Next: `03_recall`.
