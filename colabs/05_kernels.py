# %% [markdown]
# # 05 Kernels
#
# **What does a chunked form buy, where does it come from, and what would a kernel cost?**
#
# The delta rule is defined token by token, and so is its slow form, `scan`:
#
# $$S_t = S_{t-1} + \beta_t k_t (v_t - S_{t-1}^\top k_t)^\top, \qquad y_t = S_t^\top q_t.$$
#
# Each token waits for the one before it, and moves the whole state for a few operations a number.
# Within a chunk of $C$ tokens the writes can be solved for at once (Yang et al. 2024, arXiv
# 2406.06484): with the state $S$ in front of the chunk and rows $q_i, k_i, v_i$ in $Q, K, V$,
#
# $$R = \left(I + \mathrm{tril}(\mathrm{diag}(\beta) K K^\top, -1)\right)^{-1}
#   \mathrm{diag}(\beta)\, (V - K S), \qquad Y = Q S + \mathrm{tril}(Q K^\top) R, \qquad
#   S' = S + K^\top R.$$
#
# The same numbers, in products of matrices, and $T / C$ steps instead of $T$.

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
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import memjax
import pallas_kernels
from memjax import benchmark, cells, cost, workload
from memjax.cells.delta_net import DeltaNet
from memjax.probes import pairs
from pallas_kernels.ops import PEAKS

device = jax.devices()[0].device_kind
print(f"jax {jax.__version__} on {jax.default_backend()}, {device}")

# %% [markdown]
# ## The chunk, written down
#
# One chunk by the formula, against the definition.

# %%
C, D = 32, 16
rng = np.random.default_rng(0)
K, V = pairs.unit(rng, C, D), pairs.unit(rng, C, D)
beta, S = rng.uniform(size=(C, 1)), rng.normal(size=(D, D))

cell = DeltaNet(D, D, scale=1.0)
xs = pairs.tokens(cell, K[None], V[None], beta=beta[None, :, 0])  # a query is the token's key
y, state = memjax.run(
    cell, {}, xs, state=jnp.asarray(S[None, None], jnp.float32), implementation="scan"
)

R = np.linalg.solve(np.eye(C) + np.tril(beta * (K @ K.T), -1), beta * (V - K @ S))
Y, after = K @ S + np.tril(K @ K.T) @ R, S + K.T @ R
print("answers, largest difference:", float(abs(Y - y[0, :, 0]).max()))
print("state,   largest difference:", float(abs(after - state[0, 0]).max()))

# %% [markdown]
# ## Form against form
#
# `benchmark.measure` compares values and all gradients of each form with `scan` first, and refuses
# to time one that is wrong. Then the forms take turns; figures are medians. `pallas` is in the list
# where this device has a kernel (TPU v4 and later, H100, H200; a T4 has none).

# %%
name = "gated_delta_net"  # @param {type: "string"}
lengths = (64, 256) if FAST else (64, 256, 1024, 4096)
records = []
for length in lengths:
    shape = workload.Shape(length=length, heads=4, dim=64)
    records += benchmark.measure(cells.get(name), shape, repeats=3)
print(benchmark.table(records))

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
panels = {"forward_ms": "forward, µs a token", "both_ms": "forward and backward, µs a token"}
panels |= {"peak_bytes": "temporary memory, both passes, KiB a token"}
for ax, (key, title) in zip(axes, panels.items(), strict=True):
    for form in dict.fromkeys(record["form"] for record in records):
        mine = [record for record in records if record["form"] == form and record[key]]
        scale = 1 / 2**10 if key == "peak_bytes" else 1e3
        ax.plot(
            [record["length"] for record in mine],
            [scale * record[key] / record["length"] for record in mine],
            "o-",
            label=form,
        )
    ax.set(xlabel="tokens", title=title)
    ax.loglog(base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.25)
axes[0].legend()
figure.suptitle(f"{name}, 4 heads of 64 x 64, float32, {device}")
plt.show()

# %% [markdown]
# On a CPU a forward pass alone may be faster in `scan`, as the state stays in the cache; its
# backward pass keeps a state of every token. `implementation=None` takes the form that was measured
# to be fastest at the nearest length (`memjax/forms.json`).
#
# ## Why: arithmetic against memory
#
# Counted, not measured: operations of each form from its jaxpr (`memjax.cost`), and the bytes of
# state that a device moves if the state does not stay on the chip, read and written once a step.
# The chunked form does **more** arithmetic and moves far less.

# %%
T = 256 if FAST else 4096
cell, params, xs = workload.problem(cells.get(name), workload.Shape(length=T, heads=1))
chunk = cell.chunk or (32 if jax.default_backend() == "cpu" else 64)
state_bytes = 4 * cell.key_dim * cell.value_dim  # float32
print(f"{'form':<8} {'kFLOP a token':>14} {'KiB of state a token':>21} {'FLOP a byte':>12}")
for form, tokens in (("scan", 1), ("chunked", chunk)):
    operations = cost.flops(lambda xs, form=form: workload.forward(cell, form, params, xs), xs) / T
    moved = 2 * state_bytes / tokens
    print(f"{form:<8} {operations / 1e3:>14.1f} {moved / 2**10:>21.2f} {operations / moved:>12.1f}")

# %% [markdown]
# ## A kernel, in its interpreter
#
# `pallas_kernels` has the chunk form as kernels for TPUs and GPUs, with the state on the chip. To
# see that one is right no chip is needed: Pallas interprets it.

# %%
D, T = 64, 128
keys, values = pairs.unit(rng, 1, T, D), pairs.unit(rng, 1, T, D)
cell = DeltaNet(D, D)
xs = pairs.tokens(cell, keys, values, strength=0.5)
y, _ = memjax.run(cell, {}, xs, implementation="scan")
with pallas_kernels.interpreted("tpu"):
    z, _ = memjax.run(cell, {}, xs, implementation="pallas")
print("TPU kernel against scan:", float(abs(y - z).max()), "of", float(abs(y).max()))

# %% [markdown]
# ## What would it cost?
#
# `python -m pallas_kernels.cost` compiles every kernel for every TPU generation, without one, and
# reads the cycles from the compiler's own schedule; `compiled.json` keeps them (cycles of one core
# for each token and head, T 4096, 8 heads of 128 x 128, bfloat16, forward and backward). Beside
# them the plain chunked form, read in the same way, and two bounds: the arithmetic of the kernels
# at the chip's peak, and the bytes of their operands and results at the memory's bandwidth. A
# schedule holds no waiting for memory: none of these figures is a measured time.

# %%
root = pathlib.Path(memjax.__file__).parents[1]
compiled = json.loads((root / "pallas_kernels" / "compiled.json").read_text())
print("compiled", compiled["date"], compiled["versions"])


def cycles(rows):
    """(op, decay, TPU) -> its row, of both passes."""
    both = (row for row in rows if row["direction"] == "both")
    return {(row["op"], row["decay"], row["generation"]): row for row in both}


kernels, plain = cycles(compiled["costs"]), cycles(compiled["plain"]["costs"])
ops = [(op, decay) for op, decay, generation in kernels if generation == "v5e"]
figure, axes = plt.subplots(1, 2, figsize=(13, 4), sharey=True, layout="constrained")
for ax, (generation, (peak, bandwidth)) in zip(axes, PEAKS.items(), strict=True):
    rows = [kernels[*case, generation] for case in ops]
    others = [plain.get((*case, generation), {"kernels": np.nan, "rest": 0}) for case in ops]
    bars = {
        "plain form": [row["kernels"] + row["rest"] for row in others],
        "kernels and what is around": [row["kernels"] + row["rest"] for row in rows],
        "bound by arithmetic": [row["flops"] / peak for row in rows],
        "bound by memory": [row["bytes"] / bandwidth for row in rows],
    }
    for i, (label, heights) in enumerate(bars.items()):
        ax.bar(np.arange(len(ops)) + 0.2 * (i - 1.5), heights, 0.2, label=label)
    labels = ["\n".join([*op.split("_"), decay]) for op, decay in ops]
    ax.set_xticks(range(len(ops)), labels, fontsize=9)
    ax.set(yscale="log", title=f"TPU {generation}")
    ax.grid(axis="y", alpha=0.25)
axes[0].set_ylabel("cycles a token and head, both passes")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# Below an op: its decay (none, one a head, one a channel). `chunk_linear` is linear attention and
# its gated forms, `chunk_delta` the delta rules (with a decay a channel: KDA), `chunk_dplr` the
# memory of RWKV-7. `chunk_linear` is near the bound of memory; these also wait for the inverse,
# whose products depend on one another, as does `deep_memory`, which is Titans with a matrix, its
# plain form a walk over frozen chunks of 16 tokens. `linear_scan` (weighted: the RG-LRU) and `wkv4`
# (RWKV-4) have no products, and memory alone bounds them. Missing bars: a plain form that no one
# would train, no arithmetic.
#
# `pallas_kernels/README.md` has the table, how a kernel is written, and what did not pay. Next:
# `06_capacity_laws`.
