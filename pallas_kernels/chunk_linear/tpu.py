"""Decayed linear attention on TPU, forward: one walk over chunks of C tokens, state on the chip.

    S_n = e^{G_C} S_{n-1} + (K e^{G_C - G})^T V         S [K, V] float32, in VMEM for all heads
    O_n = scale ((Q e^G) S_{n-1} + (Q.D.K) V)           Q.D.K in decays.py

G is the sum of the log decays since the chunk's start, one for each head or channel. One grid step
is a chunk of a group of heads, read as it lies in [B, T, H, D] and turned to [heads, C, D] on the
chip: no layout change around the kernel. Bytes a token and head: those of q, k, v and o, 16 or 4 K
for the decay and, when gradients follow, K V / C numbers of the state in front of each chunk.
float32 or bfloat16; products of float32 are exact to float32, those of bfloat16 take the state and
the weights rounded to it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.common import Blocks
from pallas_kernels.products import dot, in_step, rounded, turned


def kernel(*refs, decaying, keep, scale):
    """q, k [C, h, K]; v, o [C, h, V]; `decaying` arrays of decays.py; initial, final and, with
    keep, bounds [h, K, V]. The block of the final state carries S along the walk."""
    q_ref, k_ref, v_ref, *others = refs
    initial_ref, o_ref, state_ref, *bounds_ref = others[decaying:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    split = functools.partial(rounded, like=dtype)
    queries, keys, values = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref))
    decayed = decays.of_heads([ref[...] for ref in others[:decaying]], heads, split, dtype)

    def outputs_of(head, decay):
        q, k, v, state = queries[head], keys[head], values[head], state_ref[head]
        if keep:
            bounds_ref[0][head] = state.astype(dtype)
        read = decay.across(q, split(state), decay.since_start)
        yield
        (scores,) = yield from decay.pairs([q], [k], split)
        answer = read + dot(scores.astype(dtype), v, 1, 0)
        yield
        state_ref[head] = decay.over(state) + decay.into(k, v, decay.to_end)
        return (scale * answer).astype(dtype)

    outputs = in_step(map(outputs_of, range(heads), decayed))
    o_ref[...] = turned(jnp.stack(outputs))


def forward(q, k, v, decaying, initial, *, scale, chunk, heads, keep, interpret, limit):
    """(o, final state[, states in front of the chunks [B, N, H, K, V] in the dtype of q]).

    T must be a multiple of chunk and H of heads. decaying: `decays.arrays`.
    """
    batch, length, count, width = q.shape
    size = v.shape[-1]
    blocks = Blocks(chunk, heads, length // chunk)
    shape = jax.ShapeDtypeStruct
    state = shape((batch, count, width, size), jnp.float32)
    bounds = shape((batch, length // chunk, count, width, size), q.dtype)
    return pl.pallas_call(
        functools.partial(kernel, decaying=len(decaying), keep=keep, scale=scale),
        grid=(batch, count // heads, length // chunk),
        in_specs=[
            *(blocks.tokens(width), blocks.tokens(width), blocks.tokens(size)),
            *decays.specs(decaying, blocks),
            blocks.state(width, size),
        ],
        out_specs=[
            *(blocks.tokens(size), blocks.state(width, size)),
            *((blocks.bounds(width, size),) if keep else ()),
        ],
        out_shape=[shape(v.shape, v.dtype), state, *((bounds,) if keep else ())],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="chunk_linear_forward",
        interpret=interpret,
    )(q, k, v, *decaying, initial)
