"""Decayed linear attention on TPU, backward: the walk of tpu.py in reverse, dS on the chip.

With the letters of tpu.py, S the state in front of the chunk and dS the gradient of that behind it:

    A = scale e^{G_i - G_j} . Q K^T, j <= i             dA = scale e^{G_i - G_j} . dO V^T, j <= i
    dQ = dA K + scale e^G . dO S^T                      dV = A^T dO + (K e^{G_C - G}) dS
    dK = dA^T Q + e^{G_C - G} . V dS^T                  dS <- e^{G_C} dS + scale (Q e^G)^T dO
    dg_t = sum_{j < t <= i} (dA . Q K^T)_ij + sum_{i >= t} q_i e^{G_i} . (dO S^T)_i
           + sum_{j < t} k_j e^{G_C - G_j} . (V dS^T)_j + e^{G_C} <S, dS>

The chunk's states are those that the forward pass kept; all else is made again. dO is read in its
own dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import (
    Blocks,
    decays,
    dot,
    log_decay_gradient,
    lower,
    times,
    turned,
)


def kernel(*refs, gated, scale):
    """Tokens' arrays [C, h, K or V]; states [h, K, V]; sums as in tpu.py; dg [C, h]. The block of
    the initial state's gradient carries dS along the walk."""
    q_ref, k_ref, v_ref, do_ref, *others = refs
    sums_refs, (bounds_ref, dfinal_ref, *outputs) = others[: 2 * gated], others[2 * gated :]
    dq_ref, dk_ref, dv_ref, *dg_ref, dstate_ref = outputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    queries, keys, values, douts = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref, do_ref))
    sums = [ref[...] for ref in sums_refs]
    made, of_decay = [], []
    for head in range(heads):
        q, k, v, do = queries[head], keys[head], values[head], douts[head]
        state, dstate = bounds_ref[head], dstate_ref[head]
        decay = decays(sums, head, heads)
        products = dot(q, k, 1, 1)
        scores = (scale * lower(products, decay.pairs)).astype(dtype)
        dscores = scale * lower(dot(do, v, 1, 1), decay.pairs)
        dread = scale * times(dot(do, state, 1, 1), decay.since_start)
        dadded = times(dot(v, dstate.astype(dtype), 1, 1), decay.to_end)
        asked = (scale * times(q, decay.since_start)).astype(dtype)
        written = times(k, decay.to_end).astype(dtype)
        dstate_ref[head] = times(dstate, decay.through) + dot(asked, do, 0, 0)
        if gated:
            sum_of = partial(jnp.sum, axis=1, keepdims=True)
            carried = jnp.sum(decay.through * (state * dstate), keepdims=True)
            of_decay.append((dscores * products, sum_of(q * dread), sum_of(k * dadded), carried))
        dscores = dscores.astype(dtype)
        dq = dot(dscores, k, 1, 0) + dread
        dk = dot(dscores, q, 0, 0) + dadded
        dv = dot(scores, do, 0, 0) + dot(written, dstate.astype(dtype), 1, 0)
        made.append([x.astype(dtype) for x in (dq, dk, dv)])
    if gated:
        dg_ref[0][...] = log_decay_gradient(*zip(*of_decay, strict=True), like=dtype)
    for ref, arrays in zip((dq_ref, dk_ref, dv_ref), zip(*made, strict=True), strict=True):
        ref[...] = turned(jnp.stack(arrays))


def backward(q, k, v, sums, bounds, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dg [B, G, N, C, heads] or None, dinitial) from `forward`'s bounds."""
    batch, length, count, width = q.shape
    size = v.shape[-1]
    groups, chunks = count // heads, length // chunk
    blocks = Blocks(chunk, heads, chunks, backward=True)
    shape = jax.ShapeDtypeStruct
    gated = bool(sums)
    dg = shape((batch, groups, chunks, chunk, heads), jnp.float32)
    dq, dk, dv, *dg, dinitial = pl.pallas_call(
        partial(kernel, gated=gated, scale=scale),
        grid=(batch, groups, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size, size)),
            *((blocks.columns(), blocks.rows()) if gated else ()),
            *(blocks.bounds(width, size), blocks.state(width, size)),
        ],
        out_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            *((blocks.columns(1),) if gated else ()),
            blocks.state(width, size),
        ],
        out_shape=[
            *(shape(a.shape, a.dtype) for a in (q, k, v)),
            *((dg,) if gated else ()),
            shape(dfinal.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="chunk_linear_backward",
        interpret=interpret,
    )(q, k, v, do, *sums, bounds, dfinal)
    return dq, dk, dv, *(dg or (None,)), dinitial
