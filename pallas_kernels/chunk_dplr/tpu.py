"""Diagonal plus low rank on TPU, forward: one walk over chunks of C tokens, state on the chip.

    R = (I - A.E.B)^-1 (A.E.K V + (A e^{G'}) S)
    O = scale ((Q e^G) S + Q.D.K V + Q.D.B R)                    .D. in decays.py
    S <- e^{G_C} S + (K e^{G_C - G})^T V + (B e^{G_C - G})^T R

S [K, V] is the state in front of the chunk, float32, G the sums of the log decays since the chunk's
start, R [C, V] what is written at the rows of B. a reads what the token in front of it leaves: G'_i
is G_{i-1}, and A.E.K is Later(A).D.K a token later, Later(A)_i = A_{i+1}. So q and a ask together,
and k and b answer together: the four are one product for each level of `channel_decays.py`. The
inverse is made by doubling blocks (`products.unit_lower_inverse`). One grid step is a chunk of a
group of heads, read as it lies in [B, T, H, D]. Bytes a token and head: those of q, k, a, b, v and
o, 4 K for the decay and, when gradients follow, 4 K V / C + 4 C of the state in front of each chunk
and the inverse.
float32 or bfloat16; products of float32 are exact to float32. With bfloat16, float32 factors are
the sum of two arrays (`products.dot_in_parts`) but where rounding them does not show.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.common import Blocks
from pallas_kernels.products import dot_in_parts, in_step, parts, turned, unit_lower_inverse


def later(x):
    """Of every token what the next one has; of the last zero."""
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])


def earlier(x, first: float = 0.0):
    """Of every token what the one in front of it has; of the first `first`."""
    return jnp.concatenate([jnp.full_like(x[:1], first), x[:-1]])


def kernel(*refs, decaying, keep, scale, lowest):
    """q, k, a, b [C, h, K]; v, o [C, h, V]; `decaying` arrays of decays.py; initial, final and,
    with keep, bounds [h, K, V] and inverses [h, C, C]. The block of the final state carries S along
    the walk. lowest: of `channel_decays.of_heads`."""
    tokens, others = refs[:5], refs[5:]
    initial_ref, o_ref, state_ref, *kept = others[decaying:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    size, heads, _ = tokens[0].shape
    dtype = tokens[0].dtype
    split = partial(parts, like=dtype)
    given = [ref[...] for ref in others[:decaying]]
    decayed = decays.of_heads(given, heads, split, dtype, count=2, lowest=lowest)
    arrays = zip(*(turned(ref[...]) for ref in tokens), strict=True)

    def outputs_of(head, decay, arrays):
        q, k, a, b, v = arrays
        state, a = state_ref[head], a.astype(jnp.float32)
        scores, reads = yield from decay.pairs([q, later(a)], [k, b], split)
        reads = earlier(reads)
        inverse = yield from unit_lower_inverse(-reads[:, size:], dtype)
        if keep:
            kept[0][head], kept[1][head] = state, inverse
        low = split(state)
        asked = decay.across(q, low, decay.since_start)
        known = decay.across(a, low, earlier(decay.since_start, 1.0))
        yield
        wanted = known + dot_in_parts(split(reads[:, :size]), (v,), 1, 0)
        yield
        rows = dot_in_parts(split(inverse), split(wanted), 1, 0)
        yield
        written = split(jnp.concatenate([v.astype(jnp.float32), rows]))
        answer = asked + dot_in_parts(split(scores), written, 1, 0)
        yield
        added = decay.into(k, v, decay.to_end) + decay.into(b, rows, decay.to_end)
        state_ref[head] = decay.over(state) + added
        return (scale * answer).astype(dtype)

    outputs = in_step(map(outputs_of, range(heads), decayed, arrays))
    o_ref[...] = turned(jnp.stack(outputs))


def forward(
    q, k, a, b, v, decaying, initial, *, scale, lowest, chunk, heads, keep, interpret, limit
):
    """(o, final state[, states in front of the chunks [B, N, H, K, V], inverses [B, N, H, C, C],
    both float32]).

    T must be a multiple of chunk and H of heads. decaying: `decays.arrays`. lowest: what no log
    decay is below, or None.
    """
    batch, length, count, width = q.shape
    size = v.shape[-1]
    chunks = length // chunk
    blocks = Blocks(chunk, heads, chunks)
    shape = jax.ShapeDtypeStruct
    kept = [
        (blocks.bounds(*axes), shape((batch, chunks, count, *axes), jnp.float32))
        for axes in ((width, size), (chunk, chunk))
    ]
    return pl.pallas_call(
        partial(kernel, decaying=len(decaying), keep=keep, scale=scale, lowest=lowest),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *[blocks.tokens(width)] * 4,
            blocks.tokens(size),
            *decays.specs(decaying, blocks),
            blocks.state(width, size),
        ],
        out_specs=[
            *(blocks.tokens(size), blocks.state(width, size)),
            *(block for block, _ in kept if keep),
        ],
        out_shape=[
            shape(v.shape, v.dtype),
            shape(initial.shape, jnp.float32),
            *(array for _, array in kept if keep),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="chunk_dplr_forward",
        interpret=interpret,
    )(q, k, a, b, v, *decaying, initial)
