"""The plain form that the cost of the kernels is compared with: windows one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.deep_network.layout import layout, sizes
from pallas_kernels.deep_network.network import Memory, answered, flat, memory_of
from pallas_kernels.deep_network.reference import initial_state
from pallas_kernels.deep_network.windows import Rule, coefficients


def chunked(q, k, v, g, rates, start, m=None, *, frozen_chunk, loss="l2"):
    """`deep_network` by a walk over frozen chunks from the initial state, in float32; no resets,
    and every token is written."""
    batch, length, heads, _ = q.shape
    rule = Rule(m is not None, loss, q.shape[-1] == v.shape[-1], 1)
    size = sizes(length, rates.shape[-1], frozen_chunk, frozen_chunk)
    g, m, rates, start = jax.tree.map(lambda a: a.astype(jnp.float32), (g, m, rates, start))
    state = initial_state(batch, start, rates, rule.momentum)
    rows = layout(q, k, v, (g, m, rates), None, None, state, frozen_chunk, size)
    numbers = coefficients(rows.tokens, rule, frozen_chunk, size.pairs)

    def split(a, count):
        """[B, H, N count, D] -> [N, B, H, count, D]."""
        return jnp.moveaxis(a.reshape(batch, heads, size.number, count, -1), 2, 0)

    @jax.checkpoint
    def window(layers, x):
        q, k, v = (a.astype(jnp.float32) for a in x[:3])
        run = partial(answered, start=None, rule=rule, like=jnp.dtype(jnp.float32))
        o, layers = jax.vmap(run)(layers, q, k, v, x[3])
        return layers, o

    arrays = split(rows.q, size.rows), split(rows.k, size.pairs), split(rows.v, size.pairs)
    layers = flat(Memory(state.weights, state.momentum, state.base))
    layers, o = lax.scan(window, layers, (*arrays, jnp.moveaxis(numbers, 2, 0)))
    o = jnp.moveaxis(o[..., : size.tokens, :], (0, 3), (1, 2)).reshape(
        batch, -1, heads, v.shape[-1]
    )
    found = memory_of(layers, rule)
    pairs = rows.last or (None, None)
    return o[:, :length].astype(v.dtype), state._replace(
        **found._asdict(), place=rows.place, k=pairs[0], v=pairs[1], number=rows.number
    )
