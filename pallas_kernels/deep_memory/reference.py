"""A matrix trained by gradient steps, in plain JAX, one token at a time and in chunks.

    U_t = sum_{j < c} rates_t[j] k_{t-j} e_{t-j}^T      the last c pairs of the document
    Z_t = exp(m_t) Z_{t-1} - U_t                        Z_t = -U_t without momentum
    W_t = exp(g_t) W_{t-1} + Z_t;   o_t = W_t^T q_t
    e_i = 2 (W_b^T k_i - v_i) for the loss ||W^T k - v||^2, -v_i for the loss -<W^T k, v> ("dot")

W_b: the weights in front of the first token of the frozen chunk that t lies in. Frozen chunks have
`frozen_chunk` written tokens and are counted from the start of a document, which begins with W =
`start`, Z = 0 and no pairs. A token that is not written reads alone. Titans (Behrouz et al. 2024,
arXiv 2501.00663, Eq. 9-16) has c = 1; OmegaNet, and ATLAS without Newton-Schulz, (2505.23735, Eq.
9-16) more.

q, k: [B, T, H, K]. v: [B, T, H, V]. g, m: log decays <= 0 [B, T, H]; m None without momentum.
rates: [B, T, H, c], of a token's own pair first. start: [H, K, V]. reset: bool [B, T], write: bool
[B, T, H], either None. state: `State` or None for the initial one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOSSES = ("l2", "dot")
dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class State(NamedTuple):
    """weights, momentum, base: W, Z and W_b [B, H, K, V]; momentum None without. place: written
    tokens of the running frozen chunk, 0 to frozen_chunk - 1, int32 [B, H]. k, v: the last c - 1
    pairs [B, H, c - 1, K or V], newest last, zero where there are fewer; number: how many are
    there, int32 [B, H]; all three None when c = 1."""

    weights: Any
    momentum: Any
    base: Any
    place: Any
    k: Any
    v: Any
    number: Any


def initial_state(k, v, rates, start, momentum: bool) -> State:
    """The state in front of a document, of every sequence."""
    batch, (heads, width, size), older = k.shape[0], start.shape, rates.shape[-1] - 1
    weights = jnp.broadcast_to(start, (batch, *start.shape))
    number = jnp.zeros((batch, heads), jnp.int32)
    pairs: tuple = (None, None, None)
    if older:
        k, v = (jnp.zeros((batch, heads, older, n), start.dtype) for n in (width, size))
        pairs = k, v, number
    return State(weights, jnp.zeros_like(weights) if momentum else None, weights, number, *pairs)


def shapes_of(weights, heads, pairs, momentum: bool) -> State:
    """The shapes of a state with weights of these; heads: (B, H); pairs: those of k and v, (c - 1,
    K) and (c - 1, V)."""
    carried: tuple = (None, None, None)
    if pairs[0][0]:
        carried = *((*heads, *axes) for axes in pairs), heads
    return State(weights, weights if momentum else None, weights, heads, *carried)


def select(mask, on_true, on_false):
    """`where` over states, mask [B, H]."""
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.expand_dims(mask, range(2, a.ndim)), a, b), on_true, on_false
    )


def sequential(
    q, k, v, g, rates, start, m=None, state=None, reset=None, write=None, *, frozen_chunk,
    loss="l2",
):  # fmt: skip
    """The definition, with sums in the dtype of `start`: float64 to compare with."""
    output, wide = v.dtype, start.dtype
    q, k, v = (a.astype(wide) for a in (q, k, v))
    fresh = initial_state(k, v, rates, start, m is not None)
    age = jnp.arange(rates.shape[-1])[::-1]

    def learnt(state, k, v, g, rates, m):
        base = select(state.place == 0, state.weights, state.base)
        keys, values, number = k[:, :, None], v[:, :, None], state.number
        if number is not None:
            keys = jnp.concatenate([state.k, keys], axis=2)
            values = jnp.concatenate([state.v, values], axis=2)
            rates = jnp.where(age <= number[..., None], rates[..., age], 0)
            number = jnp.minimum(number + 1, len(age) - 1)
        errors = -values
        if loss == "l2":
            errors = 2 * (dot("bhik,bhkv->bhiv", keys, base) - values)
        z = -dot("bhi,bhik,bhiv->bhkv", rates, keys, errors)
        if m is not None:
            z = jnp.exp(m)[..., None, None] * state.momentum + z
        weights = jnp.exp(g)[..., None, None] * state.weights + z
        place = (state.place + 1) % frozen_chunk
        past, seen = (None if number is None else a[:, :, 1:] for a in (keys, values))
        return State(weights, None if m is None else z, base, place, past, seen, number)

    def token(state, x):
        (q, k, v, g, rates, m), first, written = x
        if first is not None:
            state = select(jnp.broadcast_to(first[:, None], state.place.shape), fresh, state)
        new = learnt(state, k, v, g, rates, m)
        state = new if written is None else select(written, new, state)
        return state, dot("bhk,bhkv->bhv", q, state.weights)

    given = ((q, k, v, g, rates, m), reset, write)
    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), given)
    state, o = lax.scan(token, fresh if state is None else state, xs)
    return jnp.moveaxis(o, 0, 1).astype(output), state


def chunked(q, k, v, g, rates, start, m=None, *, frozen_chunk, loss="l2"):
    """The same by a walk over frozen chunks from the initial state, T a multiple of their length;
    no resets, and every token is written. Products of float32 are exact to float32.

    The plain form that the cost of the kernel is compared with.
    """
    batch, length, heads, _ = q.shape
    context = rates.shape[-1]
    output, wide = v.dtype, jnp.promote_types(q.dtype, jnp.float32)
    fresh = initial_state(k, v, rates, start.astype(wide), m is not None)

    def split(a):
        """[B, T, H, ...] -> [N, B, H, C, ...]."""
        a = a.astype(wide).reshape(batch, length // frozen_chunk, frozen_chunk, *a.shape[2:])
        return jnp.moveaxis(a, (1, 3), (0, 2))

    i = jnp.arange(frozen_chunk)[:, None]
    lower = i >= i.T
    age = i - jnp.arange(1 - context, frozen_chunk)  # of every pair, for every token

    def through(g):
        after = jnp.where(i > i.T, g[..., None], 0)  # g_l where l > j
        terms = dot("tl,bhlj->bhtj", lower.astype(wide), after)
        return jnp.exp(jnp.where(lower, terms, -jnp.inf))

    def chunk(state, x):
        q, k, v, g, rates, m = x
        weights, (pairs, seen) = state.weights, (k, v)
        if context > 1:
            pairs = jnp.concatenate([state.k, k], axis=2)
            seen = jnp.concatenate([state.v, v], axis=2)
        errors = -seen
        if loss == "l2":
            errors = 2 * (dot("bhik,bhkv->bhiv", pairs, weights) - seen)
        there = (0 <= age) & (age < context)
        there = there & (age <= i + (0 if state.number is None else state.number[..., None, None]))
        near = jnp.broadcast_to(jnp.clip(age, 0, context - 1), (*g.shape[:2], *age.shape))
        push = jnp.where(there, jnp.take_along_axis(rates, near, axis=-1), 0)
        fading, sofar = through(g), jnp.exp(jnp.cumsum(g, axis=-1))
        z = None
        if m is not None:
            push = dot("bhij,bhjp->bhip", through(m), push)
            pushed = jnp.exp(jnp.cumsum(m, axis=-1))
            z = pushed[..., -1, None, None] * state.momentum
            z = z - dot("bhp,bhpk,bhpv->bhkv", push[:, :, -1], pairs, errors)
            carried = dot("bhij,bhj->bhi", fading, pushed)
        step = dot("bhij,bhjp->bhip", fading, push)
        scores = step * dot("bhik,bhpk->bhip", q, pairs)
        o = sofar[..., None] * dot("bhik,bhkv->bhiv", q, weights)
        o = o - dot("bhip,bhpv->bhiv", scores, errors)
        new = sofar[..., -1, None, None] * weights
        new = new - dot("bhp,bhpk,bhpv->bhkv", step[:, :, -1], pairs, errors)
        if m is not None:
            o = o + carried[..., None] * dot("bhik,bhkv->bhiv", q, state.momentum)
            new = new + carried[..., -1, None, None] * state.momentum
        kept: tuple = (None, None, None)
        if context > 1:
            number = jnp.minimum(state.number + frozen_chunk, context - 1)
            kept = pairs[:, :, frozen_chunk:], seen[:, :, frozen_chunk:], number
        return State(new, z, weights, state.place, *kept), o

    final, o = lax.scan(jax.checkpoint(chunk), fresh, jax.tree.map(split, (q, k, v, g, rates, m)))
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(batch, length, heads, -1)
    return o.astype(output), final
