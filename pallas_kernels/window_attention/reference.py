"""Softmax attention over a window in plain JAX, the definition and in blocks: what kernels equal.

    o_t = sum_s softmax_s(scale q_t . k_s) v_s,   s the last W tokens of t's document, t included

Child et al. 2019, arXiv 1904.10509; Beltagy et al. 2020, arXiv 2004.05150. q: [B, T, H, K]. k:
[B, S, h, K], v: [B, S, h, V], h dividing H; query t stands at key F + t, with F = S - T tokens in
front of the first query. reset: bool [B, S], True at a document's first token, or None. Returns o
[B, T, H, V].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

LONGEST = 128  # queries of a block


def definition(q, k, v, *, window, reset=None, scale=None):
    """All pairs of tokens, O(T S), in the dtype of q: float64 to compare with."""
    length, total = q.shape[1], k.shape[1]
    document = _documents(k, reset)
    query, key = total - length + jnp.arange(length)[:, None], jnp.arange(total)
    seen = (key <= query) & (query - key < window)
    seen = seen & (document[:, total - length :, None] == document[:, None, :])
    return _attend(q, k, v, seen, scale)


def blocked(q, k, v, *, window, reset=None, scale=None, block=None):
    """The same over blocks of queries, O(T (W + block)); products of float32 are exact to float32.

    Its gradients need no more memory than its arguments and one block: each block is computed
    again. block: queries of a block, None for the window's length but 128 at most.
    """
    batch, length = q.shape[:2]
    front = k.shape[1] - length
    reach = min(window, k.shape[1]) - 1  # tokens in front of a query that it may see
    size = min(block or min(window, LONGEST), length)
    document = _documents(k, reset)
    more = -length % size

    def beside(a, rest):  # `reach` tokens in front of the first query, whole blocks behind it
        a = a[:, max(front - reach, 0) :]
        width = [(0, 0), (max(reach - front, 0), more)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a, width, constant_values=rest)

    keys, values, documents = beside(k, 0), beside(v, 0), beside(document, -1)
    queries = jnp.pad(q, [(0, 0), (0, more), (0, 0), (0, 0)])
    queries = jnp.moveaxis(queries.reshape(batch, -1, size, *q.shape[2:]), 1, 0)

    @jax.checkpoint
    def answer(inputs):
        number, q = inputs
        here = (
            lax.dynamic_slice_in_dim(a, number * size, reach + size, axis=1)
            for a in (keys, values, documents)
        )
        k, v, document = here
        age = reach + jnp.arange(size)[:, None] - jnp.arange(reach + size)
        seen = (age >= 0) & (age <= reach)
        seen = seen & (document[:, reach:, None] == document[:, None, :])
        return _attend(q, k, v, seen, scale)

    o = lax.map(answer, (jnp.arange(len(queries)), queries))
    return jnp.moveaxis(o, 0, 1).reshape(batch, -1, *o.shape[3:])[:, :length]


def _documents(k, reset):
    """The number of each token's document, [B, S]."""
    if reset is None:
        return jnp.zeros(k.shape[:2], jnp.int32)
    return jnp.cumsum(reset, axis=1, dtype=jnp.int32)


def _attend(q, k, v, seen, scale):
    """Softmax attention; seen: [B, T, S], which keys a query sees, itself at least."""
    batch, length, heads, width = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    dot = functools.partial(jnp.einsum, **precise)
    q = q.reshape(batch, length, k.shape[2], -1, width)
    scores = (width**-0.5 if scale is None else scale) * dot("bthgk,bshk->bhgts", q, k)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    o = dot("bhgts,bshv->bthgv", weights, v)
    return o.reshape(batch, length, heads, -1).astype(v.dtype)
