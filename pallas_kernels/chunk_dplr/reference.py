"""The generalised delta rule in plain JAX, one token at a time and in chunks: what kernels equal.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T
    o_t = scale S_t^T q_t                S_{t-1} = 0 for a token with reset, whatever g is

q, k, a, b: [B, T, H, K]. v: [B, T, H, V]. g: log decay <= 0, [B, T, H, K]. reset: bool [B, T] or
None. initial_state: [B, H, K, V] or None for zero. Returns o [B, T, H, V] and the last state
[B, H, K, V].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunk_delta.reference import inverse


def sequential(q, k, v, a, b, g, reset=None, initial_state=None, scale=None):
    """The definition, in the dtype of q: float64 to compare with."""
    batch, _, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width, v.shape[-1]), q.dtype)
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def token(state, x):
        q, k, v, a, b, g, reset = x
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        erased = dot("bhk,bhkv->bhv", a, state)
        state = jnp.exp(g)[..., None] * state
        state = state + b[..., :, None] * erased[..., None, :] + k[..., :, None] * v[..., None, :]
        return state, scale * dot("bhk,bhkv->bhv", q, state)

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, a, b, g, reset))
    state, o = lax.scan(token, initial_state.astype(q.dtype), xs)
    return jnp.moveaxis(o, 0, 1), state


def chunked(q, k, v, a, b, g, reset=None, initial_state=None, scale=None, chunk=64):
    """The same over chunks, T a multiple of `chunk`, a power of two; products of float32 are exact
    to float32. Decays of each channel join blocks of tokens that double, as in the kernels.

    The plain form that the cost of the kernel is compared with.
    """
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    dot = functools.partial(jnp.einsum, **precise)

    def divided(x):
        x = x.reshape(batch, length // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.swapaxes(2, 3) if x.ndim > 3 else x[:, :, None]  # [N, B, H or 1, C, ...]

    state = initial_state
    if state is None:
        state = jnp.zeros((batch, heads, width, v.shape[-1]), wide)
    g = jnp.maximum(g.astype(wide), -1e4)  # exp is zero there
    q, k, v, a, b, g = (divided(x) for x in (q, k, v, a, b, g))
    last = jnp.tril(jnp.ones((chunk, chunk), wide))
    visible = first = ending = jnp.array(True)
    if reset is not None:
        marks = divided(reset)
        document = jnp.cumsum(marks, axis=-1)
        visible = document[..., :, None] == document[..., None, :]
        first, ending = (x[..., None] for x in (document == 0, document == document[..., -1:]))
        a = jnp.where(marks[..., None], 0, a)
    since_start = jnp.exp(dot("ts,...sk->...tk", last, g)) * first
    to_end = jnp.exp(dot("ts,...sk->...tk", 1 - last, g)) * ending
    before = jnp.concatenate([jnp.ones_like(since_start[..., :1, :]), since_start], -2)[..., :-1, :]
    # a sees what the token in front of it leaves
    asking = jnp.stack([q, jnp.concatenate([a[..., 1:, :], 0 * a[..., :1, :]], -2)])
    scores, later = _pairs(asking[:, None], jnp.stack([k, b]), g, dot) * visible
    reads = jnp.concatenate([0 * later[..., :1, :], later], -2)[..., :-1, :]
    wanted = dot("...ij,...jv->...iv", reads[0], v)

    def walk(state, x):
        solve, wanted, seen, v, keys, through = x
        rows = dot("...ij,...jv->...iv", solve, wanted + dot("...ik,...kv->...iv", seen, state))
        added = dot("...ik,...iv->...kv", keys, jnp.concatenate([v.astype(wide), rows], -2))
        return through[..., None] * state + added, (state, rows)

    keys = jnp.concatenate([k * to_end, b * to_end], -2)
    xs = inverse(-reads[1]), wanted, a * before, v, keys, since_start[..., -1, :]
    final, (starts, rows) = lax.scan(walk, state, xs)
    o = dot("...ij,...jv->...iv", scores[0], v) + dot("...ij,...jv->...iv", scores[1], rows)
    o = scale * (o + dot("...ik,...kv->...iv", q * since_start, starts))
    return o.transpose(1, 0, 3, 2, 4).reshape(batch, length, heads, -1).astype(v.dtype), final


def _pairs(x, y, g, dot):
    """sum_k x_i y_j exp(g_{j+1} + ... + g_i), j <= i, [..., C, C]."""
    size = g.shape[-2]
    found = jnp.sum(x * y, axis=-1, dtype=g.dtype)[..., None, None]  # [..., blocks, half, half]
    for half in (2**n for n in range(size.bit_length() - 1)):
        x2, y1, g1, g2 = (
            z.reshape(*z.shape[:-2], -1, 2, half, z.shape[-1])[..., n, :, :]
            for z, n in ((x, 1), (y, 0), (g, 0), (g, 1))
        )
        last = jnp.tril(jnp.ones((half, half), g.dtype))
        x2 = x2 * jnp.exp(dot("ts,...sk->...tk", last, g2))
        y1 = y1 * jnp.exp(dot("ts,...sk->...tk", 1 - last, g1))
        joined = dot("...ik,...jk->...ij", x2, y1)
        one, two = found[..., 0::2, :, :], found[..., 1::2, :, :]
        above = jnp.concatenate([one, jnp.zeros_like(one)], -1)
        found = jnp.concatenate([above, jnp.concatenate([joined, two], -1)], -2)
    return found[..., 0, :, :]
