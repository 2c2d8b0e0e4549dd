"""The delta rule in plain JAX, one token at a time and in chunks: what kernels equal.

    P_t = exp(g_t) S_{t-1}                   P = 0 for a token with reset, whatever g is
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    o_t = scale S_t^T q_t

q, k: [B, T, H, K]. v: [B, T, H, V]. beta: [B, T, H]. g: log decay <= 0, [B, T, H] or for each row
of S [B, T, H, K], or None for no decay. reset: bool [B, T] or None. initial_state: [B, H, K, V] or
None for zero. Returns o [B, T, H, V] and the last state [B, H, K, V].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def sequential(q, k, v, beta, g=None, reset=None, initial_state=None, scale=None):
    """The definition, in the dtype of q: float64 to compare with."""
    batch, _, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width, v.shape[-1]), q.dtype)
    dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def token(state, x):
        q, k, v, beta, g, reset = x
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        if g is not None:
            state = jnp.exp(g.reshape(batch, heads, -1, 1)) * state
        error = beta[..., None] * (v - dot("bhk,bhkv->bhv", k, state))
        state = state + k[..., :, None] * error[..., None, :]
        return state, scale * dot("bhk,bhkv->bhv", q, state)

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, beta, g, reset))
    state, o = lax.scan(token, initial_state.astype(q.dtype), xs)
    return jnp.moveaxis(o, 0, 1), state


def chunked(q, k, v, beta, g=None, reset=None, initial_state=None, scale=None, chunk=64):
    """The same over chunks, T a multiple of `chunk`, a power of two; products of float32 are exact
    to float32.

    The plain form that the cost of the kernel is compared with.
    """
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    dot = functools.partial(jnp.einsum, **precise)

    def split(a):
        a = a.reshape(batch, length // chunk, chunk, *a.shape[2:]).swapaxes(0, 1)
        return a if a.ndim < 4 else a.swapaxes(2, 3)  # [N, B, H, C, ...]

    def products(a, b):
        if pairs.shape[-1] == 1:
            return dot("...ik,...jk->...ij", a, b) * pairs[..., 0]
        return dot("...ik,...jk,...ijk->...ij", a, b, pairs)

    def exp(mask, exponent):
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    state = initial_state
    if state is None:
        state = jnp.zeros((batch, heads, width, v.shape[-1]), wide)
    g = jnp.zeros(beta.shape, wide) if g is None else g
    q, k, v, beta, g = (split(a) for a in (q, k, v, beta, g.reshape(batch, length, heads, -1)))
    last = jnp.tril(jnp.ones((chunk, chunk), bool))
    same = first = ending = jnp.array(True)
    if reset is not None:
        document = jnp.cumsum(split(reset), axis=2)[:, :, None]
        same = document[..., :, None] == document[..., None, :]
        first, ending = (
            mask[..., None] for mask in (document == 0, document == document[..., -1:])
        )
    total = jnp.cumsum(g, axis=-2)
    visible = (last & same)[..., None]
    pairs = exp(visible, total[..., :, None, :] - total[..., None, :, :])  # [..., C, C, 1 or K]
    since_start, to_end = exp(first, total), exp(ending, total[..., -1:, :] - total)
    seen = since_start * k
    solve = inverse(beta[..., None] * jnp.tril(products(k, k), -1))
    solve = solve * beta[..., None, :]

    def walk(state, x):
        solve, v, seen, written, through = x
        rows = dot("...ij,...jv->...iv", solve, v - dot("...ik,...kv->...iv", seen, state))
        new = through[..., None] * state + dot("...ik,...iv->...kv", written, rows)
        return new, (state, rows)

    xs = solve, v, seen, k * to_end, since_start[..., -1, :]
    final, (starts, rows) = lax.scan(walk, state, xs)
    o = dot("...ij,...jv->...iv", products(q, k), rows)
    o = o + dot("...ik,...kv->...iv", q * since_start, starts)
    o = scale * o.transpose(1, 0, 3, 2, 4).reshape(batch, length, heads, -1)
    return o.astype(v.dtype), final


def inverse(lower):
    """(I + L)^-1 of strictly lower L, blocks doubling."""
    size = lower.shape[-1]
    i, j = jnp.arange(size)[:, None], jnp.arange(size)
    dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    found = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for bits in range(size.bit_length() - 1):
        joins = (i >> (bits + 1) == j >> (bits + 1)) & (i >> bits != j >> bits)
        found = found - dot(found, dot(jnp.where(joins, lower, 0), found))
    return found
