"""The plain form that the cost of the kernels is compared with: windows one after the other."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.deep_network.layout import layout, memory, sizes, state_of
from pallas_kernels.deep_network.network import answered, flat, memory_of
from pallas_kernels.deep_network.reference import initial_state
from pallas_kernels.deep_network.windows import Rule, coefficients


def chunked(q, k, v, g, rates, start, m=None, *, frozen_chunk, loss="l2"):
    """`deep_network` by a walk over frozen chunks from the initial state, in float32; no resets,
    and every token is written."""
    batch, length, heads, _ = q.shape
    rule = Rule(m is not None, rates.shape[-1], loss, q.shape[-1] == v.shape[-1], 1)
    size = sizes(length, frozen_chunk, frozen_chunk)
    g, m, rates, start = jax.tree.map(lambda a: a.astype(jnp.float32), (g, m, rates, start))
    state = initial_state(batch, start, rates, rule.momentum)
    rows = layout(q, k, v, (g, m, rates), None, None, state, frozen_chunk, size)
    numbers = coefficients(rows.tokens, rule, frozen_chunk)

    @jax.checkpoint
    def window(layers, x):
        q, k, v = (a.astype(jnp.float32) for a in x[:3])
        run = partial(answered, start=None, rule=rule, like=jnp.dtype(jnp.float32))
        o, layers = jax.vmap(run)(layers, q, k, v, x[3])
        return layers, o

    def split(a):
        """[B, H, N S, D] -> [N, B, H, S, D]."""
        return jnp.moveaxis(a.reshape(batch, heads, size.number, size.rows, -1), 2, 0)

    arrays = (*map(split, (rows.q, rows.k, rows.v)), jnp.moveaxis(numbers, 2, 0))
    layers, o = lax.scan(window, flat(memory(state, rule)), arrays)
    o = jnp.moveaxis(o[..., : size.tokens, :], (0, 3), (1, 2))
    o = o.reshape(batch, -1, heads, v.shape[-1])[:, :length]
    new = state_of(memory_of(layers, rule), rows.place, rows.number, rule)
    return o.astype(v.dtype), new
