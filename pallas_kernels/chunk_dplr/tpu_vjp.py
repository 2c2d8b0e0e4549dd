"""Diagonal plus low rank on TPU, backward: the walk of tpu.py in reverse, dS on the chip.

With the letters of tpu.py, M the inverse and S from the forward pass, R = M W made again, dS that
of the state behind, W = A.E.K V + (A e^{G'}) S:

    dR = scale (Q.D.B)^T dO + (B e^{G_C - G}) dS                        dW = M^T dR
    dV = scale (Q.D.K)^T dO + (K e^{G_C - G}) dS + (A.E.K)^T dW
    of Q.D.K and Q.D.B: scale dO V^T, scale dO R^T       of A.E.K and A.E.B: dW V^T, dW R^T
    dQ = theirs + scale e^G . dO S^T                     dA = theirs + e^{G'} . dW S^T
    dK = theirs + e^{G_C - G} . V dS^T                   dB = theirs + e^{G_C - G} . R dS^T
    dS <- e^{G_C} dS + scale (Q e^G)^T dO + (A e^{G'})^T dW
    dg as in chunk_linear, with Later(A) beside Q and B beside K
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.chunk_dplr.tpu import earlier, later
from pallas_kernels.common import Blocks
from pallas_kernels.products import dot_in_parts, in_step, parts, turned


def kernel(*refs, decaying, scale, lowest):
    """Tokens' arrays [C, h, K or V]; `decaying` arrays and dg of decays.py; states [h, K, V],
    inverses [h, C, C]. The block of the initial state's gradient carries dS along the walk."""
    tokens, others = refs[:6], refs[6:]
    bounds_ref, inverses_ref, dfinal_ref, *outputs = others[decaying:]
    *made_refs, dg_ref, dstate_ref = outputs

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[...]

    size, heads, _ = tokens[0].shape
    dtype = tokens[0].dtype
    split = partial(parts, like=dtype)
    given = [ref[...] for ref in others[:decaying]]
    decayed = decays.of_heads(given, heads, split, dtype, count=2, lowest=lowest)
    arrays = zip(*(turned(ref[...]) for ref in tokens), strict=True)

    def gradients_of(head, decay, arrays):
        q, k, a, b, v, do = arrays
        state, dstate, a = bounds_ref[head], dstate_ref[head], a.astype(jnp.float32)
        low, dlow, inverse = (split(x) for x in (state, dstate, inverses_ref[head]))
        before, to_end = earlier(decay.since_start, 1.0), decay.to_end
        # the forward pass again
        known = decay.across(a, low, before)
        pairs = yield from decay.pairs([q, later(a)], [k, b], split)
        scores, reads = split(pairs[0]), split(earlier(pairs[1])[:, :size])
        wanted = known + dot_in_parts(reads, (v,), 1, 0)
        yield
        rows = dot_in_parts(inverse, split(wanted), 1, 0)
        yield
        written = split(jnp.concatenate([v.astype(jnp.float32), rows]))
        # back through it
        answered = scale * dot_in_parts(scores, (do,), 0, 0)
        drows = answered[size:] + decay.across(b, dlow, to_end)
        yield
        dwanted = split(dot_in_parts(inverse, split(drows), 0, 0))
        yield
        dv = answered[:size] + decay.across(k, dlow, to_end)
        dv = dv + dot_in_parts(reads, dwanted, 0, 0)
        yield
        dpairs = [
            scale * dot_in_parts((do,), written, 1, 1),
            later(dot_in_parts(dwanted, written, 1, 1)),
        ]
        yield
        found = decay.pairs_back([q, later(a)], [k, b], pairs, dpairs)
        (dq, da), (dk, db), crossing = yield from found
        dread = scale * dot_in_parts((do,), low, 1, 1) * decay.since_start
        dseen = dot_in_parts(dwanted, low, 1, 1) * before
        yield
        dadded = dot_in_parts(written, dlow, 1, 1)
        dkept, dplaced = dadded[:size] * to_end, dadded[size:] * to_end
        yield
        asked = scale * decay.into(q, do, decay.since_start)
        asked = asked + dot_in_parts(split(a * before), dwanted, 0, 0)
        dstate_ref[head] = decay.over(dstate) + asked
        yield
        asking, writing = q * dread + later(a * dseen), k * dkept + b * dplaced
        dlog = decay.log_gradient(crossing, asking, writing, state * dstate)
        made = (dq + dread, dk + dkept, earlier(da) + dseen, db + dplaced, dv)
        return [x.astype(dtype) for x in made], dlog

    found = in_step(map(gradients_of, range(heads), decayed, arrays))
    made, dlogs = zip(*found, strict=True)
    dg_ref[...] = decays.stacked(dlogs, like=dtype)
    for ref, of_heads in zip(made_refs, zip(*made, strict=True), strict=True):
        ref[...] = turned(jnp.stack(of_heads))


def backward(
    q, k, a, b, v, decaying, kept, do, dfinal, *, scale, lowest, chunk, heads, interpret, limit
):
    """(dq, dk, da, db, dv, dg, dinitial) from `forward`'s bounds and inverses."""
    batch, length, count, width = q.shape
    size = v.shape[-1]
    chunks = length // chunk
    blocks = Blocks(chunk, heads, chunks, backward=True)
    shape = jax.ShapeDtypeStruct
    keys, values = [blocks.tokens(width)] * 4, blocks.tokens(size)
    return pl.pallas_call(
        partial(kernel, decaying=len(decaying), scale=scale, lowest=lowest),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *(*keys, values, values),
            *decays.specs(decaying, blocks),
            *(blocks.bounds(width, size), blocks.bounds(chunk, chunk), blocks.state(width, size)),
        ],
        out_specs=[
            *(*keys, values),
            *decays.gradient_specs(decaying, blocks),
            blocks.state(width, size),
        ],
        out_shape=[
            *(shape(x.shape, x.dtype) for x in (q, k, a, b, v)),
            *(shape(axes, jnp.float32) for axes in decays.gradient_shapes(decaying)),
            shape(dfinal.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="chunk_dplr_backward",
        interpret=interpret,
    )(q, k, a, b, v, do, *decaying, *kept, dfinal)
