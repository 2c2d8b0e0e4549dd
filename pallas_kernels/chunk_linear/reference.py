"""Decayed linear attention in plain JAX, one token at a time and in chunks: what kernels equal.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T       S = 0 before a token with reset, whatever g is
    o_t = scale S_t^T q_t

q, k: [B, T, H, K]. v: [B, T, H, V]. g: [B, T, H] or, for a decay of each channel, [B, T, H, K], log
decay <= 0, or None for no decay. reset: bool [B, T] or None. initial_state: [B, H, K, V] or None
for zero. Returns o [B, T, H, V] and the last state [B, H, K, V].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def sequential(q, k, v, g=None, reset=None, initial_state=None, scale=None):
    """The definition, in the dtype of q: float64 to compare with."""
    batch, _, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width, v.shape[-1]), q.dtype)

    def token(state, x):
        q, k, v, g, reset = x
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        if g is not None:
            state = jnp.exp(g if g.ndim == 3 else g[..., None])[..., None] * state
        state = state + k[..., :, None] * v[..., None, :]
        o = jnp.einsum("bhk,bhkv->bhv", q, state, precision=lax.Precision.HIGHEST)
        return state, scale * o

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, g, reset))
    state, o = lax.scan(token, initial_state.astype(q.dtype), xs)
    return jnp.moveaxis(o, 0, 1), state


def chunked(q, k, v, g=None, reset=None, initial_state=None, scale=None, chunk=128):
    """The same over chunks, T a multiple of `chunk`; products of float32 are exact to float32.

    The plain form that the cost of the kernel is compared with.
    """
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precise = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
    dot = functools.partial(jnp.einsum, **precise)

    def split(a):
        return a.reshape(batch, length // chunk, chunk, *a.shape[2:]).swapaxes(0, 1)

    def exp(mask, exponent):
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    state = initial_state
    if state is None:
        state = jnp.zeros((batch, heads, width, v.shape[-1]), wide)
    q, k, v = (split(a) for a in (q, k, v))
    g = jnp.zeros(q.shape[:-1], wide) if g is None else split(g)
    g = g[..., None] if g.ndim == 4 else g
    last = jnp.tril(jnp.ones((chunk, chunk), bool))[:, :, None, None]
    same = first = ending = jnp.array(True)
    if reset is not None:
        document = jnp.cumsum(split(reset), axis=2)
        document = document[..., None, None]
        same = document[:, :, :, None] == document[:, :, None]
        first, ending = document == 0, document == document[:, :, -1:]
    total = jnp.cumsum(g, axis=2)
    pairs = exp(last & same, total[:, :, :, None] - total[:, :, None])  # [N, B, C, C, H, 1 or K]
    since_start, to_end = exp(first, total), exp(ending, total[:, :, -1:] - total)
    if pairs.shape[-1] == 1:
        within = dot("nbihk,nbjhk->nbijh", q, k) * pairs[..., 0]
    else:
        within = dot("nbihk,nbjhk,nbijhk->nbijh", q, k, pairs)
    added = dot("nbjhk,nbjhv->nbhkv", k * to_end, v)

    def walk(state, x):
        through, added = x
        return through[..., None] * state + added, state

    final, starts = lax.scan(walk, state, (since_start[:, :, -1], added))
    o = dot("nbijh,nbjhv->nbihv", within, v)
    o = o + dot("nbihk,nbhkv->nbihv", q * since_start, starts)
    o = scale * o.swapaxes(0, 1).reshape(batch, length, heads, -1)
    return o.astype(v.dtype), final
