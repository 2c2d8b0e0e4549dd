"""The delta rule on TPU, forward: one walk over chunks of C tokens, state on the chip.

    (I + L) R = beta (V - (K e^G) S),  L = beta (K.D.K), j < i       .D. in decays.py
    O = scale ((Q e^G) S + (Q.D.K) R)
    S <- e^{G_C} S + (K e^{G_C - G})^T R

S [K, V] is the state in front of the chunk, float32, G the sum of the log decays since the chunk's
start, one for each head or channel (0 without decay), R [C, V] what is written at the tokens' keys.
(I + L)^-1 is made by doubling blocks (`products.unit_lower_inverse`). One grid step is a chunk of a
group of heads, read as it lies in [B, T, H, D] and turned to [heads, C, D] on the chip. Bytes a
token and head: those of q, k, v and o, 4 for beta, 16 or 4 K for the decay and, when gradients
follow, 4 K V / C + 4 C of the state in front of each chunk and the inverse.
float32 or bfloat16; products of float32 are exact to float32. With bfloat16, float32 factors are
rounded only where that moves less than the rounding of o does; elsewhere a factor is the sum of two
arrays (`products.dot_in_parts`): between alike keys R holds differences of values and S sums of
them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.common import Blocks
from pallas_kernels.products import (
    dot_in_parts,
    in_step,
    parts,
    places,
    turned,
    unit_lower_inverse,
)


def strictly_lower(x):
    """x [C, C] below its diagonal."""
    i, j = places(x.shape[0])
    return jnp.where(i > j, x, 0)


def kernel(*refs, decaying, keep, scale):
    """q, k [C, h, K]; v, o [C, h, V]; beta [C, h]; `decaying` arrays of decays.py; initial, final
    and, with keep, bounds [h, K, V] and inverses [h, C, C]. The block of the final state carries S
    along the walk."""
    q_ref, k_ref, v_ref, beta_ref, *others = refs
    initial_ref, o_ref, state_ref, *kept = others[decaying:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    queries, keys, values = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref))
    split = partial(parts, like=dtype)
    beta = beta_ref[...]
    decayed = decays.of_heads([ref[...] for ref in others[:decaying]], heads, split, dtype)

    def outputs_of(head, decay):
        q, k, v, state = queries[head], keys[head], values[head], state_ref[head]
        rates, low = beta[:, head : head + 1], (state.astype(dtype),)
        scores, alike = yield from decay.pairs([q, k], [k], split)
        inverse = yield from unit_lower_inverse(strictly_lower(rates * alike), dtype)
        if keep:
            kept[0][head], kept[1][head] = state, inverse
        asked, known = (decay.across(x, low, decay.since_start) for x in (q, k))
        yield
        wanted = rates * (v - known)
        rows = dot_in_parts(split(inverse), (wanted.astype(dtype),), 1, 0)
        yield
        answer = asked + dot_in_parts(split(scores), split(rows), 1, 0)
        yield
        state_ref[head] = decay.over(state) + decay.into(k, rows, decay.to_end)
        return (scale * answer).astype(dtype)

    outputs = in_step(map(outputs_of, range(heads), decayed))
    o_ref[...] = turned(jnp.stack(outputs))


def forward(q, k, v, beta, decaying, initial, *, scale, chunk, heads, keep, interpret, limit):
    """(o, final state[, states in front of the chunks [B, N, H, K, V], inverses [B, N, H, C, C],
    both float32]).

    T must be a multiple of chunk and H of heads. beta: columns [B, G, N, C, heads].
    decaying: `decays.arrays`.
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
        partial(kernel, decaying=len(decaying), keep=keep, scale=scale),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            blocks.columns(1),
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
        name="chunk_delta_forward",
        interpret=interpret,
    )(q, k, v, beta, *decaying, initial)
