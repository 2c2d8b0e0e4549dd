"""How a state changes while tokens are written: norms, effective rank, how long a read stays.

The inputs of a cell are those of whole batches, leaves [B, T, h, ...], drawn or captured from a
trained layer; H counts the memories of a sequence.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.cell import MemoryCell, initial_state, run
from memjax.probes import pairs
from memjax.recurrence import memories
from memjax.typing import Array, Bool, Float, PyTree, fields


def norm(cell: MemoryCell, state: PyTree) -> Float[Array, "B H"]:
    """||S||_F over all that `read` needs of each state, leaves [B, H, ...]."""
    kept = jax.vmap(jax.vmap(cell.readable))(state)
    floats = [a for a in jax.tree.leaves(kept) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(a), axis=tuple(range(2, a.ndim))) for a in floats))


def _fresh(cell: MemoryCell, params: PyTree, xs: Any) -> PyTree:
    batch, heads = xs[0].shape[0], memories(params, None, xs)
    return initial_state(cell, params, batch, heads)


def _in_time(xs: Any, reset: Bool[Array, "B T"] | None) -> tuple[Any, Array]:
    """Leaves [T, B, 1, ...] of one token each, and resets [T, B, 1]."""
    reset = jnp.zeros(xs[0].shape[:2], bool) if reset is None else jnp.asarray(reset)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], (xs, reset))


@functools.partial(jax.jit, static_argnums=(0, 3))
def timeline(
    cell: MemoryCell,
    params: PyTree,
    xs: Any,
    every: int,
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "T B H"], Float[Array, "T B H"], PyTree]:
    """Writes token by token: (norms, write norms, states).

    norms: ||S_t||_F. write norms: ||S_t - S_{t-1}||_F / ||S_t||_F. states: leaves [T / every, B, H,
    ...], after each `every` tokens; every divides T.
    """

    def token(state, given):
        x, first = given
        _, new = run(cell, params, x, state=state, reset=first, implementation="scan")
        change = jax.tree.map(lambda a, b: a - b, new, state)
        size = norm(cell, new)
        return new, (size, norm(cell, change) / size)

    def block(state, given):
        state, sizes = jax.lax.scan(token, state, given)
        return state, (*sizes, state)

    blocks = jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), _in_time(xs, reset))
    _, (norms, writes, states) = jax.lax.scan(block, _fresh(cell, params, xs), blocks)
    return *(a.reshape(-1, *a.shape[2:]) for a in (norms, writes)), states


def read_map(cell: MemoryCell, params: PyTree, states: PyTree) -> Float[Array, "n B H K V"]:
    """What the memories answer to the unit vectors of the key space; the state itself, up to its
    scale, where that is a matrix. states: leaves [n, B, H, ...]."""
    batch = jax.tree.leaves(states)[0].shape[1]
    size = key_size(cell)
    basis = np.broadcast_to(np.eye(size, dtype=np.float32), (batch, size, size))
    questions = pairs.tokens(cell, basis, np.zeros((batch, size, cell.axis("V")), np.float32))
    return jnp.moveaxis(pairs.ask(cell, params, states, questions), 2, 3)


def key_size(cell: MemoryCell) -> int:
    """K; V where the cell has no keys."""
    letters = {letter for field in fields(cell.inputs).values() for letter in field.shape.split()}
    return cell.axis("K" if "K" in letters else "V") or 1


def effective_rank(matrices: Float[Array, "... K V"]) -> Float[np.ndarray, "..."]:
    """exp(- sum p ln p) with p = s / sum s of the singular values s, from 1 to min(K, V); 0 of a
    matrix of zeros (Roy & Vetterli 2007, "The effective rank")."""
    singular = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    total = singular.sum(axis=-1, keepdims=True)
    share = singular / np.where(total > 0, total, 1)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def by_own_key(cell: MemoryCell, xs: Any) -> Any:
    """The inputs with each token's key for its query, the last one of several micro-steps; what
    else a question has (gates, a query for segments) is the token's own."""
    kinds = fields(cell.inputs)
    key = next((name for name, field in kinds.items() if field.kind == "key"), "")
    asked = {}
    for name, field in kinds.items():
        if field.kind != "query" or not field.shape.endswith("K"):
            continue
        leaf, axes = getattr(xs, key), kinds[key].shape.split()
        if "M" in axes:
            leaf = jnp.take(leaf, -1, axis=3 + axes.index("M"))
        if "G" in field.shape:
            leaf = jnp.broadcast_to(
                leaf[..., None, :], (*leaf.shape[:-1], *getattr(xs, name).shape[-2:])
            )
        asked[name] = leaf
    return xs._replace(**asked)


@functools.partial(jax.jit, static_argnums=(0, 3))
def later_reads(
    cell: MemoryCell,
    params: PyTree,
    xs: Any,
    lags: tuple[int, ...],
    reset: Bool[Array, "B T"] | None = None,
) -> Float[Array, "T n B H V"]:
    """What the memory at token t answers to the key of token t - m, for each lag m; t - m below 0
    counts as 0."""
    questions = by_own_key(cell, xs)

    def token(state, given):
        (x, first), time = given
        _, state = run(cell, params, x, state=state, reset=first, implementation="scan")
        at = jnp.maximum(time - jnp.array(lags), 0)
        y, _ = cell.ask(params, state, jax.tree.map(lambda a: a[:, at], questions), None, None)
        return state, jnp.moveaxis(y.reshape(*y.shape[:3], -1), 1, 0)

    times = jnp.arange(xs[0].shape[1])
    given = _in_time(xs, reset), times
    return jax.lax.scan(token, _fresh(cell, params, xs), given)[1]


def cosine(a: Float[np.ndarray, "... V"], b: Float[np.ndarray, "... V"]) -> np.ndarray:
    """Of the angle between vectors; 0 where one of them is 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.where(lengths > 0, lengths, 1)


def fidelity(
    cell: MemoryCell,
    params: PyTree,
    xs: Any,
    lags: tuple[int, ...],
    reset: Bool[np.ndarray, "B T"] | None = None,
) -> Float[np.ndarray, "n"]:
    """The mean cosine between the read of a token's key right after its write and m tokens later,
    for each lag m, over tokens of the same document, sequences and memories.

    Within a layer (the idea of MemMamba's fidelity, 2025; the formula is ours).
    """
    length = xs[0].shape[1]
    starts = np.zeros(xs[0].shape[:2], bool) if reset is None else np.asarray(reset)
    document = np.cumsum(starts, axis=1).T  # [T, B]
    reads = np.asarray(later_reads(cell, params, xs, (0, *lags), reset), np.float64)
    found = []
    for i, lag in enumerate(lags, 1):
        same = document[lag:] == document[: length - lag]
        angles = cosine(reads[lag:, i], reads[: length - lag, 0])  # [T - m, B, H]
        found.append(angles[same].mean() if same.any() else np.nan)
    return np.array(found)
