"""Given keys and values as the inputs of any cell: stored through `memjax.run`, then asked for.

What else a cell takes has its plain value (`memjax.typing.Field`): rates of 1, or what is nearest
to it, and no decay, so that a token stores its pair and forgets nothing. A cell without queries
answers whatever it is asked with the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.cell import MemoryCell, run
from memjax.typing import Array, Field, Float, PyTree, fields

ROUTER = "gates"  # the leaf that sends a token to some of several memories


def unit(rng: np.random.Generator, *shape: int) -> Float[np.ndarray, "..."]:
    """Independent vectors, uniform on the unit sphere of the last axis; float32."""
    normal = rng.normal(size=shape)
    return (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)


def has_queries(cell: MemoryCell) -> bool:
    """Whether what the cell answers depends on what it is asked."""
    return any(field.kind == "query" for field in fields(cell.inputs).values())


def tokens(
    cell: MemoryCell,
    keys: Float[np.ndarray, "B T K"],
    values: Float[np.ndarray, "B T V"],
    *,
    strength: float = 1.0,
    keep: float = 1.0,
    **given: Float[np.ndarray, "B T ..."],
) -> Any:
    """The inputs of `cell`, float32 leaves [B, T, 1, ...], of one memory that is given these pairs.

    A query is the token's key. Micro-steps, memories and queries of a group are given the same. A
    router sends a token to the memory that is largest among the first channels of its key, as an
    untrained one would. strength: of all rates, within their ranges. keep: the factor per token of
    what fades. given: leaves [B, T, ...] by name, instead of these.
    """
    leaves: dict[str, np.ndarray] = {}
    for name, field in sorted(fields(cell.inputs).items(), key=lambda item: item[1].of):
        if name in given:
            leaf = given[name][:, :, None]
        elif name == ROUTER:
            number = cell.axis(field.shape) or 1
            leaf = np.eye(number)[np.argmax(keys[..., :number], axis=-1)][:, :, None]
        else:
            leaf = _leaf(cell, field, keys, values, strength, keep)
        leaves[name] = leaf * leaves[field.of] if field.of else leaf
    return cell.inputs(**{name: leaf.astype(np.float32) for name, leaf in leaves.items()})


def _leaf(cell, field: Field, keys, values, strength: float, keep: float) -> np.ndarray:
    axes = field.shape.split()
    sizes = [cell.axis(letter) or 1 for letter in axes]
    shape = *keys.shape[:2], 1, *sizes
    if field.kind in ("query", "key", "value"):
        vector = values if field.kind == "value" else keys
        vector = vector.reshape(*keys.shape[:2], *(1,) * len(axes), -1)
        repeats = sizes[-1] // vector.shape[-1]  # all keys of a token in one axis
        return np.broadcast_to(np.tile(vector, repeats), shape)
    return np.full(shape, plain(field, strength, keep))


def plain(field: Field, strength: float = 1.0, keep: float = 1.0) -> float:
    """The value of a leaf that is neither a key nor a value nor a query."""
    if field.plain is not None:
        return field.plain
    if field.kind == "multiple":  # all of it, with its sign
        return max(field.low, field.high, key=abs)
    if field.kind in ("rate", "query_rate"):
        return float(np.clip(strength, field.low, field.high))
    return float(np.log(keep)) if field.kind == "log_decay" else 0.0


def recall(
    cell: MemoryCell,
    params: PyTree,
    pairs: Any,
    questions: Any,
    *,
    state: PyTree | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B n V"], PyTree]:
    """(answers, state): stores pairs, then asks; one call of `memjax.run`, in any of its forms.

    pairs, questions: inputs of one memory as `tokens` makes them, leaves [B, T, 1, ...] and
    [B, n, 1, ...]. Questions are tokens that are not written.
    """
    stored, count = (jax.tree.leaves(xs)[0].shape[1] for xs in (pairs, questions))
    xs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), pairs, questions)
    write = jnp.broadcast_to(jnp.arange(stored + count) < stored, (len(xs[0]), stored + count))
    y, state = run(
        cell, params, xs, state=state, write=write, implementation=implementation,
        differentiate=False,
    )  # fmt: skip
    return y[:, stored:].reshape(len(y), count, -1), state


@functools.partial(jax.jit, static_argnums=0)
def ask(cell: MemoryCell, params: PyTree, states: PyTree, questions: Any) -> Array:
    """What each of several states answers, [n, B, m, H, V]; states [n, B, H, ...], questions leaves
    [B, m, h, ...]."""

    def one(state):
        y, _ = cell.ask(params, state, questions, None, None)
        return y.reshape(*y.shape[:3], -1)

    return jax.lax.map(one, states)


def gain(cell: MemoryCell, params: PyTree, pair: Any, values: Float[np.ndarray, "B 1 V"]) -> float:
    """The mean of v . answer to a pair of unit vectors that is alone in the memory, over B of them,
    given as inputs of one token. In units of it the answers of all cells, whatever scale and step
    they have, can be compared."""
    answers, _ = recall(cell, params, pair, pair)
    return float(jnp.mean(jnp.sum(answers * values, axis=-1)))
