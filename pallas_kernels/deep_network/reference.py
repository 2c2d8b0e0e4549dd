"""A network trained by gradient steps, in plain JAX, one token at a time.

    M(x; W) = (x +) gelu(.. gelu(x W_1) ..) W_L         with x where K = V
    U_t = sum_{j < c} rates_t[j] grad_W loss(W_b; k_{t-j}, v_{t-j})     the last c pairs
    Z_t = exp(m_t) Z_{t-1} - U_t                        Z_t = -U_t without momentum
    W_t = exp(g_t) W_{t-1} + Z_t;   o_t = M(q_t; W_t)
    loss ||M(k) - v||^2 ("l2") or -<M(k), v> ("dot")

The names, and what is frozen for how long, are those of `deep_memory.reference`, whose `State` has
layers here: weights, momentum and base are tuples of W_l, [B, H, m, n]. start: a tuple of [H, m,
n]. gelu is the approximation by tanh. Titans (Behrouz et al. 2024, arXiv 2501.00663, Eq. 9-16) with
the network of 2505.23735, App. E; OmegaNet, DLA, and ATLAS without Newton-Schulz.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.deep_memory.reference import State, dot

Layers = tuple[jax.Array, ...]


def answer(weights: Layers, x):
    """M(x; W), x [..., K]."""
    hidden = x
    for layer in weights[:-1]:
        hidden = jax.nn.gelu(dot("...m,mn->...n", hidden, layer))
    y = dot("...m,mn->...n", hidden, weights[-1])
    return x + y if x.shape[-1] == y.shape[-1] else y


def initial_state(batch: int, start: Layers, rates, momentum: bool) -> State:
    """The state in front of a document, of every sequence."""
    heads, older = start[0].shape[0], rates.shape[-1] - 1
    weights = tuple(jnp.broadcast_to(layer, (batch, *layer.shape)) for layer in start)
    number = jnp.zeros((batch, heads), jnp.int32)
    pairs: tuple = (None, None, None)
    if older:
        axes = start[0].shape[1], start[-1].shape[2]
        k, v = (jnp.zeros((batch, heads, older, n), start[0].dtype) for n in axes)
        pairs = k, v, number
    zeros = tuple(map(jnp.zeros_like, weights)) if momentum else None
    return State(weights, zeros, weights, number, *pairs)


def sequential(
    q, k, v, g, rates, start, m=None, state=None, reset=None, write=None, *, frozen_chunk,
    loss="l2",
):  # fmt: skip
    """The definition, with sums in the dtype of `start`: float64 to compare with."""
    output, wide = v.dtype, start[0].dtype
    q, k, v = (a.astype(wide) for a in (q, k, v))
    fresh = initial_state(q.shape[0], start, rates, m is not None)
    age = jnp.arange(rates.shape[-1])[::-1]

    def learnt(state, k, v, g, rates, m):
        """The state of one memory behind a token."""
        base = jax.tree.map(lambda a, b: jnp.where(state.place == 0, a, b), *state[:3:2])
        keys, values, number = k[None], v[None], state.number
        if number is not None:
            keys, values = jnp.concatenate([state.k, keys]), jnp.concatenate([state.v, values])
            rates = jnp.where(age <= number, rates[age], 0)
            number = jnp.minimum(number + 1, len(age) - 1)

        def weighted(weights):
            y = answer(weights, keys)
            losses = -y * values if loss == "dot" else (y - values) ** 2
            return dot("i,iv->", rates, losses)

        z = jax.tree.map(jnp.negative, jax.grad(weighted)(base))
        if m is not None:
            z = jax.tree.map(lambda z, step: jnp.exp(m) * z + step, state.momentum, z)
        weights = jax.tree.map(lambda w, z: jnp.exp(g) * w + z, state.weights, z)
        past, seen = (None if number is None else a[1:] for a in (keys, values))
        place = (state.place + 1) % frozen_chunk
        return State(weights, None if m is None else z, base, place, past, seen, number)

    def memory(x, written, reset, state, fresh):
        """All tokens of one memory."""

        def token(state, inputs):
            (q, *pair), first, written = inputs
            choose = lambda mask, *trees: jax.tree.map(functools.partial(jnp.where, mask), *trees)  # noqa: E731
            state = state if first is None else choose(first, fresh, state)
            new = learnt(state, *pair)
            state = new if written is None else choose(written, new, state)
            return state, answer(state.weights, q)

        return lax.scan(token, state, (x, reset, written))

    if write is not None and write.ndim == 2:
        write = jnp.broadcast_to(write[..., None], v.shape[:3])
    heads = jax.vmap(memory, (1, 1, None, 0, 0), (0, 1))
    given = (q, k, v, g, rates, m), write, reset
    state, o = jax.vmap(heads)(*given, fresh if state is None else state, fresh)
    return o.astype(output), state
