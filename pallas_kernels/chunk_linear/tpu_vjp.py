"""Decayed linear attention on TPU, backward: the walk of tpu.py in reverse, dS on the chip.

With the letters of tpu.py, S the state in front of the chunk and dS the gradient of that behind it:

    A = scale Q.D.K                                     dA = scale dO V^T
    dQ = dQ of A + scale e^G . dO S^T                   dV = A^T dO + (K e^{G_C - G}) dS
    dK = dK of A + e^{G_C - G} . V dS^T                 dS <- e^{G_C} dS + scale (Q e^G)^T dO
    dg_t = what A has of it + sum_{i >= t} q_i e^{G_i} . (dO S^T)_i
           + sum_{j < t} k_j e^{G_C - G_j} . (V dS^T)_j + e^{G_C} <S, dS>

For a decay of each head A has sum_{j < t <= i} (dA . A)_ij of dg_t, <,> are sums over K and V; for
one of each channel decays.py says it, and the sums are over V. The chunk's states are those that
the forward pass kept; all else is made again. dO is read in its own dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.common import Blocks
from pallas_kernels.products import dot, dot_in_parts, in_step, rounded, turned


def kernel(*refs, decaying, scale):
    """Tokens' arrays [C, h, K or V]; states [h, K, V]; `decaying` arrays and dg of decays.py. The
    block of the initial state's gradient carries dS along the walk."""
    q_ref, k_ref, v_ref, do_ref, *others = refs
    bounds_ref, dfinal_ref, *outputs = others[decaying:]
    dq_ref, dk_ref, dv_ref, *dg_ref, dstate_ref = outputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    split = partial(rounded, like=dtype)
    queries, keys, values, douts = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref, do_ref))
    decayed = decays.of_heads([ref[...] for ref in others[:decaying]], heads, split, dtype)

    def gradients_of(head, decay):
        q, k, v, do = queries[head], keys[head], values[head], douts[head]
        state, dstate = bounds_ref[head], dstate_ref[head]
        low = split(dstate)
        scores = yield from decay.pairs([q], [k], split)
        dscores = [scale * dot(do, v, 1, 1)]
        yield
        (dq,), (dk,), crossing = yield from decay.pairs_back([q], [k], scores, dscores)
        answered = scale * dot(scores[0].astype(dtype), do, 0, 0)
        dv = answered + decay.across(k, low, decay.to_end)
        yield
        dread = scale * decays.times(dot(do, state, 1, 1), decay.since_start)
        dadded = decays.times(dot_in_parts((v,), low, 1, 1), decay.to_end)
        yield
        asked = scale * decay.into(q, do, decay.since_start)
        dstate_ref[head] = decay.over(dstate) + asked
        yield
        dlog = None
        if decaying:
            carried = state * dstate
            dlog = decay.log_gradient(crossing, q * dread, k * dadded, carried)
        return [x.astype(dtype) for x in (dq + dread, dk + dadded, dv)], dlog

    found = in_step(map(gradients_of, range(heads), decayed))
    made, dlogs = zip(*found, strict=True)
    if decaying:
        dg_ref[0][...] = decays.stacked(dlogs, like=dtype)
    for ref, arrays in zip((dq_ref, dk_ref, dv_ref), zip(*made, strict=True), strict=True):
        ref[...] = turned(jnp.stack(arrays))


def backward(q, k, v, decaying, bounds, do, dfinal, *, scale, chunk, heads, interpret, limit):
    """(dq, dk, dv, dg of decays.py or None, dinitial) from `forward`'s bounds."""
    batch, length, count, width = q.shape
    size = v.shape[-1]
    groups, chunks = count // heads, length // chunk
    blocks = Blocks(chunk, heads, chunks, backward=True)
    shape = jax.ShapeDtypeStruct
    dq, dk, dv, *dg, dinitial = pl.pallas_call(
        partial(kernel, decaying=len(decaying), scale=scale),
        grid=(batch, groups, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size, size)),
            *decays.specs(decaying, blocks),
            *(blocks.bounds(width, size), blocks.state(width, size)),
        ],
        out_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            *decays.gradient_specs(decaying, blocks),
            blocks.state(width, size),
        ],
        out_shape=[
            *(shape(a.shape, a.dtype) for a in (q, k, v)),
            *(shape(axes, jnp.float32) for axes in decays.gradient_shapes(decaying)),
            shape(dfinal.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="chunk_linear_backward",
        interpret=interpret,
    )(q, k, v, do, *decaying, bounds, dfinal)
    return dq, dk, dv, *(dg or (None,)), dinitial
