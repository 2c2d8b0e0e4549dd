"""The delta rule on TPU, backward: the walk of tpu.py in reverse, dS on the chip.

With the letters of tpu.py, M = (I + L)^-1 and S from the forward pass, E = V - (K e^G) S,
Y = beta E and R = M Y made again, A the scores that o has of R, dS that of the state behind:

    dR = A^T dO + (K e^{G_C - G}) dS       dY = M^T dR       dL = -dY R^T, j < i       dE = beta dY
    dA = scale dO R^T                      dB = beta dL, of B = K.D.K
    dQ = dQ of A + scale e^G . dO S^T      dV = dE
    dK = dK of A and of B + e^{G_C - G} . R dS^T - e^G . dE S^T
    dS <- e^{G_C} dS + scale (Q e^G)^T dO - (K e^G)^T dE
    dbeta_i = dY_i . R_i / beta_i          dg as in chunk_linear, from A and B
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.chunk_delta.tpu import strictly_lower
from pallas_kernels.common import Blocks
from pallas_kernels.products import dot_in_parts, in_step, parts, rounded, turned


def kernel(*refs, decaying, scale):
    """Tokens' arrays [C, h, K or V]; beta, dbeta [C, h]; `decaying` arrays and dg of decays.py;
    states [h, K, V], inverses [h, C, C]. The block of the initial state's gradient carries dS along
    the walk."""
    q_ref, k_ref, v_ref, do_ref, beta_ref, *others = refs
    bounds_ref, inverses_ref, dfinal_ref, *outputs = others[decaying:]
    dq_ref, dk_ref, dv_ref, dbeta_ref, *dg_ref, dstate_ref = outputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    queries, keys, values, douts = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref, do_ref))
    betas = beta_ref[...]
    split = partial(parts, like=dtype)
    decayed = decays.of_heads([ref[...] for ref in others[:decaying]], heads, split, dtype)

    def gradients_of(head, decay):
        q, k, v, do = queries[head], keys[head], values[head], douts[head]
        state, dstate, beta = bounds_ref[head], dstate_ref[head], betas[:, head : head + 1]
        low, dlow, inverse = (split(x) for x in (state, dstate, inverses_ref[head]))
        # the forward pass again
        error = v - decay.across(k, (state.astype(dtype),), decay.since_start)
        yield
        rows = dot_in_parts(inverse, split(beta * error), 1, 0)
        yield
        written = split(rows)
        rough = partial(rounded, like=dtype)
        (scores,) = yield from decay.pairs([q], [k], rough)
        (alike,) = yield from decay.pairs([k], [k], rough)
        # back through it
        answered = scale * dot_in_parts(split(scores), (do,), 0, 0)
        drows = answered + decay.across(k, dlow, decay.to_end)
        yield
        dwanted = dot_in_parts(inverse, split(drows), 0, 0)
        yield
        dlower = dot_in_parts(split(dwanted), written, 1, 1)
        yield
        dbeta = jnp.sum(dwanted * (rows / beta), axis=1, keepdims=True)
        dpairs = [
            scale * dot_in_parts((do,), written, 1, 1),
            -beta * strictly_lower(dlower),
        ]
        yield
        made = decay.pairs_back([q, k], [k], [scores, alike], dpairs)
        (dq, dk), (dy,), crossing = yield from made
        dv = beta * dwanted
        dread = scale * decays.times(dot_in_parts((do,), low, 1, 1), decay.since_start)
        yield
        dadded = decays.times(dot_in_parts(written, dlow, 1, 1), decay.to_end)
        yield
        dseen = decays.times(dot_in_parts(split(dv), low, 1, 1), decay.since_start)
        yield
        asked = scale * decay.into(q, do, decay.since_start)
        yield
        new = decay.over(dstate) + asked
        dstate_ref[head] = new - decay.into(k, dv, decay.since_start)
        yield
        dlog = None
        if decaying:
            reads = q * dread - k * dseen
            dlog = decay.log_gradient(crossing, reads, k * dadded, state * dstate)
        made = (dq + dread, dk + dy + dadded - dseen, dv)
        return [x.astype(dtype) for x in made], dbeta, dlog

    found = in_step(map(gradients_of, range(heads), decayed))
    made, dbetas, dlogs = zip(*found, strict=True)
    dbeta_ref[...] = jnp.concatenate(dbetas, axis=1)
    if decaying:
        dg_ref[0][...] = decays.stacked(dlogs, like=dtype)
    for ref, arrays in zip((dq_ref, dk_ref, dv_ref), zip(*made, strict=True), strict=True):
        ref[...] = turned(jnp.stack(arrays))


def backward(q, k, v, beta, decaying, kept, do, dfinal, *, scale, chunk, heads, interpret, limit):
    """(dq, dk, dv, dbeta, dg of decays.py or None, dinitial) from `forward`'s bounds and inverses;
    dbeta is columns [B, G, N, C, heads]."""
    batch, length, count, width = q.shape
    size = v.shape[-1]
    chunks = length // chunk
    blocks = Blocks(chunk, heads, chunks, backward=True)
    shape = jax.ShapeDtypeStruct
    *found, dinitial = pl.pallas_call(
        partial(kernel, decaying=len(decaying), scale=scale),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size, size)),
            blocks.columns(1),
            *decays.specs(decaying, blocks),
            *(blocks.bounds(width, size), blocks.bounds(chunk, chunk), blocks.state(width, size)),
        ],
        out_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            blocks.columns(1),
            *decays.gradient_specs(decaying, blocks),
            blocks.state(width, size),
        ],
        out_shape=[
            *(shape(a.shape, a.dtype) for a in (q, k, v)),
            shape(beta.shape, jnp.float32),
            *(shape(axes, jnp.float32) for axes in decays.gradient_shapes(decaying)),
            shape(dfinal.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="chunk_delta_backward",
        interpret=interpret,
    )(q, k, v, do, beta, *decaying, *kept, dfinal)
    return *found, *(() if decaying else (None,)), dinitial
