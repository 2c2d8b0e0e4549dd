"""Slots of unit norm in plain JAX, one token at a time and in frozen chunks.

    h = v - D^T k, w = k  (decoding);  h = v, w = k - D v  (encoding);  h = v, w = k  (similarity)
    s_i <- beta s_i + gamma w_i (h - s_i (d_i . h));   o = sum_i q_i s_i / |s_i|

The slots s_i are the rows of S [K, V]; D, with rows d_i, is S in front of the first token of the
frozen chunk that the token lies in. Frozen chunks have `frozen_chunk` written tokens, counted from
the start of a document; behind the last of them slots are divided by their norms. A document begins
with the slots `start`. A token that is not written reads alone. Norms below 1e-6 count as 1.

Lattice (Karami & Mirrokni 2025, arXiv 2504.05646): one step of gradient descent on the sphere of
||v - S^T k||^2 / 2, ||k - S v||^2 / 2 or -<v, S^T k>. In frozen chunks of one token it is exact.

q, k: [B, T, H, K]. v: [B, T, H, V]. beta: log of what is kept, <= 0, and gamma: the step >= 0, both
[B, T, H]. start: [H, K, V], slots of unit norm. reset: bool [B, T], write: bool [B, T, H], either
None. state: `State` or None for the initial one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

OBJECTIVES = ("decoding", "encoding", "similarity")
dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class State(NamedTuple):
    """slots: S [B, H, K, V]. base: D, the same shape, None in frozen chunks of one token. place:
    written tokens of the running frozen chunk, 0 to frozen_chunk - 1, int32 [B, H]."""

    slots: Any
    base: Any
    place: Any


def initial_state(batch: int, start, frozen_chunk: int) -> State:
    """The state in front of a document, of every sequence."""
    slots = jnp.broadcast_to(start, (batch, *start.shape))
    place = jnp.zeros((batch, len(start)), jnp.int32)
    return State(slots, None if frozen_chunk == 1 else slots, place)


def unit(slots):
    """Slots of unit norm."""
    square = jnp.sum(jnp.square(slots), axis=-1, keepdims=True)
    return slots * lax.rsqrt(jnp.where(square < 1e-12, 1.0, square))


def select(mask, on_true, on_false):
    """`where` over states, mask [B, H]."""
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.expand_dims(mask, range(2, a.ndim)), a, b), on_true, on_false
    )


def changes(base, k, v, beta, gamma, objective: str):
    """(kept, added, h) of tokens [..., K], [..., K] and [..., V]: slot i becomes kept_i s_i +
    added_i h. base: [..., K, V]; k, v: [..., n, K] and [..., n, V]; beta, gamma: [..., n]."""
    h, w = v, k
    if objective == "decoding":
        h = v - dot("...nk,...kv->...nv", k, base)
    along = dot("...nv,...kv->...nk", h, base)
    if objective == "encoding":
        w = k - along
    added = gamma[..., None] * w
    return jnp.exp(beta)[..., None] - added * along, added, h


def sequential(
    q, k, v, beta, gamma, start, state=None, reset=None, write=None, *, frozen_chunk=1,
    objective="decoding",
):  # fmt: skip
    """The definition, with sums in the dtype of `start`: float64 to compare with."""
    output, wide = v.dtype, start.dtype
    q, k, v = (a.astype(wide) for a in (q, k, v))
    fresh = initial_state(len(q), start, frozen_chunk)

    def learnt(state, k, v, beta, gamma):
        base = state.slots
        if frozen_chunk > 1:
            base = select(state.place == 0, base, state.base)
        kept, added, h = (a[..., 0, :] for a in changes(base, k, v, beta, gamma, objective))
        slots = kept[..., None] * state.slots + dot("bhk,bhv->bhkv", added, h)
        place = (state.place + 1) % frozen_chunk
        slots = select(place == 0, unit(slots), slots)
        return State(slots, None if frozen_chunk == 1 else base, place)

    def token(state, x):
        q, tokens, first, written = x
        if first is not None:
            state = select(jnp.broadcast_to(first[:, None], state.place.shape), fresh, state)
        new = learnt(state, *(a[:, :, None] for a in tokens))
        state = new if written is None else select(written, new, state)
        return state, dot("bhk,bhkv->bhv", q, unit(state.slots))

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, (k, v, beta, gamma), reset, write))
    state, o = lax.scan(token, fresh if state is None else state, xs)
    return jnp.moveaxis(o, 0, 1).astype(output), state


def chunked(q, k, v, beta, gamma, start, *, frozen_chunk, objective="decoding"):
    """The same by a walk over frozen chunks from the initial state, T a multiple of their length;
    no resets, and every token is written. Products of float32 are exact to float32.

    A slot behind a token is a sum of itself and of the h of the chunk's tokens. The plain form that
    the cost of the kernel is compared with.
    """
    batch, length, heads, _ = q.shape
    output, wide = v.dtype, jnp.promote_types(q.dtype, jnp.float32)
    fresh = initial_state(batch, start.astype(wide), frozen_chunk)
    i = jnp.arange(frozen_chunk)[:, None]

    def split(a):
        """[B, T, H, ...] -> [N, B, H, C, ...]."""
        a = a.astype(wide).reshape(batch, length // frozen_chunk, frozen_chunk, *a.shape[2:])
        return jnp.moveaxis(a, (1, 3), (0, 2))

    def chunk(slots, x):
        q, k, v, beta, gamma = x
        kept, added, h = changes(slots, k, v, beta, gamma, objective)
        later = (i > i.T)[..., None]  # t > j
        fading = jnp.cumprod(jnp.where(later, kept[:, :, :, None], 1), axis=2)
        share = jnp.where((i >= i.T)[..., None], fading, 0) * added[:, :, None]
        behind = jnp.cumprod(kept, axis=2)[..., None] * slots[:, :, None]
        behind = behind + dot("bhtjk,bhjv->bhtkv", share, h)
        return unit(behind[:, :, -1]), dot("bhtk,bhtkv->bhtv", q, unit(behind))

    xs = jax.tree.map(split, (q, k, v, beta, gamma))
    slots, o = lax.scan(jax.checkpoint(chunk), fresh.slots, xs)
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(batch, length, heads, -1)
    return o.astype(output), State(slots, slots, fresh.place)
