"""The delta rule on TPU, backward: the walk of tpu.py in reverse, dS on the chip.

With the letters of tpu.py, M = (I + L)^-1 and S from the forward pass, E = V - (K e^G) S,
Y = beta E and R = M Y made again, A the scores that o has of R, dS that of the state behind:

    dR = A^T dO + (K e^{G_C - G}) dS       dY = M^T dR       dL = -dY R^T, j < i       dE = beta dY
    dA = scale e^{G_i - G_j} . dO R^T, j <= i                dB = beta_i e^{G_i - G_j} . dL
    dQ = dA K + scale e^G . dO S^T         dV = dE
    dK = dA^T Q + (dB + dB^T) K + e^{G_C - G} . R dS^T - e^G . dE S^T
    dS <- e^{G_C} dS + scale (Q e^G)^T dO - (K e^G)^T dE
    dbeta_i = dY_i . R_i / beta_i
    dg as in chunk_linear, from the products dA . Q K^T + dB . K K^T
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_delta.tpu import on_keys, strictly_lower
from pallas_kernels.common import (
    Blocks,
    decays,
    dot,
    dot_in_parts,
    log_decay_gradient,
    lower,
    parts,
    times,
    turned,
)


def kernel(*refs, gated, scale):
    """Tokens' arrays [C, h, K or V]; beta, dbeta, dg [C, h]; sums as in tpu.py; states [h, K, V],
    inverses [h, C, C]. The block of the initial state's gradient carries dS along the walk."""
    q_ref, k_ref, v_ref, do_ref, beta_ref, *others = refs
    sums_refs, others = others[: 2 * gated], others[2 * gated :]
    bounds_ref, inverses_ref, dfinal_ref, *outputs = others
    dq_ref, dk_ref, dv_ref, dbeta_ref, *dg_ref, dstate_ref = outputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    queries, keys, values, douts = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref, do_ref))
    betas = beta_ref[...]
    sums = [ref[...] for ref in sums_refs]
    split = partial(parts, like=dtype)
    sum_of = partial(jnp.sum, axis=1, keepdims=True)
    made, dbetas, of_decay = [], [], []
    for head in range(heads):
        q, k, v, do = queries[head], keys[head], values[head], douts[head]
        state, dstate, beta = bounds_ref[head], dstate_ref[head], betas[:, head : head + 1]
        low, dlow, inverse = (split(x) for x in (state, dstate, inverses_ref[head]))
        decay = decays(sums, head, heads)
        # the forward pass again
        error = v - times(dot(k, low[0], 1, 0), decay.since_start)
        rows = dot_in_parts(inverse, split(beta * error), 1, 0)
        written = split(rows)
        asked_keys, alike = on_keys(q, k)
        # back through it
        scores = split(scale * lower(asked_keys, decay.pairs))
        dscores = scale * lower(dot_in_parts((do,), written, 1, 1), decay.pairs)
        carried = times(dot_in_parts((k,), dlow, 1, 0), decay.to_end)
        drows = dot_in_parts(scores, (do,), 0, 0) + carried
        dwanted = dot_in_parts(inverse, split(drows), 0, 0)
        dlower = dot_in_parts(split(dwanted), written, 1, 1)
        dlower = strictly_lower(times(dlower, decay.pairs))
        dbetas.append(sum_of(dwanted * (rows / beta)))
        dalike, dv = -beta * dlower, beta * dwanted
        dread = scale * times(dot_in_parts((do,), low, 1, 1), decay.since_start)
        dadded = times(dot_in_parts(written, dlow, 1, 1), decay.to_end)
        dseen = times(dot_in_parts(split(dv), low, 1, 1), decay.since_start)
        asked = (scale * times(q, decay.since_start)).astype(dtype)
        seen = split(times(dv, decay.since_start))
        new = times(dstate, decay.through) + dot(asked, do, 0, 0)
        dstate_ref[head] = new - dot_in_parts((k,), seen, 0, 0)
        if gated:
            products = dscores * asked_keys + dalike * alike
            through = jnp.sum(decay.through * (state * dstate), keepdims=True)
            reads = sum_of(q * dread - k * dseen)
            of_decay.append((products, reads, sum_of(k * dadded), through))
        dq = dread + dot_in_parts(split(dscores), (k,), 1, 0)
        dscores, dalike = dscores.astype(dtype), dalike.astype(dtype)
        dk = dot(dscores, q, 0, 0) + dot(dalike, k, 1, 0) + dot(dalike, k, 0, 0) + dadded - dseen
        made.append([x.astype(dtype) for x in (dq, dk, dv)])
    dbeta_ref[...] = jnp.concatenate(dbetas, axis=1)
    if gated:
        dg_ref[0][...] = log_decay_gradient(*zip(*of_decay, strict=True), like=dtype)
    for ref, arrays in zip((dq_ref, dk_ref, dv_ref), zip(*made, strict=True), strict=True):
        ref[...] = turned(jnp.stack(arrays))


def backward(q, k, v, beta, sums, kept, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dbeta, dg or None, dinitial) from `forward`'s bounds and inverses; dbeta and dg
    are columns [B, G, N, C, heads]."""
    batch, length, count, width = q.shape
    size = v.shape[-1]
    chunks = length // chunk
    blocks = Blocks(chunk, heads, chunks, backward=True)
    shape = jax.ShapeDtypeStruct
    gated = bool(sums)
    columns = 2 if gated else 1
    *found, dinitial = pl.pallas_call(
        partial(kernel, gated=gated, scale=scale),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size, size)),
            blocks.columns(1),
            *((blocks.columns(), blocks.rows()) if gated else ()),
            *(blocks.bounds(width, size), blocks.bounds(chunk, chunk), blocks.state(width, size)),
        ],
        out_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            *[blocks.columns(1)] * columns,
            blocks.state(width, size),
        ],
        out_shape=[
            *(shape(a.shape, a.dtype) for a in (q, k, v)),
            *[shape(beta.shape, jnp.float32)] * columns,
            shape(dfinal.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="chunk_delta_backward",
        interpret=interpret,
    )(q, k, v, do, beta, *sums, *kept, dfinal)
    return *found, *(() if gated else (None,)), dinitial
