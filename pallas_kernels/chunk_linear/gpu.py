"""Decayed linear attention on Hopper, forward."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import SIDE, copy_in, dot, tile

SLOTS = 4  # chunks that the walk has in flight


def walk(a, b, sums, initial, *, scale, reverse, name, interpret):
    """(states in front of the chunks [B, N, H, K, V], state behind the last) of

        S <- e^{G_C} S + scale (A w)^T B,   w the decay to the end; in reverse that since the start

    a: [B, T, H, K]; b: [B, T, H, V]; initial: [B, H, K, V] float32. One tile of S for a warpgroup,
    in registers.
    """
    batch, length, heads, width = a.shape
    size, chunks, gated = b.shape[-1], length // SIDE, bool(sums)
    slots, across = min(SLOTS, chunks), size // SIDE

    def body(*refs, a_tiles, b_tiles, kept, arrived, weighted=None, sums_tiles=None):
        a_ref, b_ref, *sums_ref, initial_ref, states_ref, final_ref = refs
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        of_a, of_b = (pl.ds(n * SIDE, SIDE) for n in (lax.div(part, across), lax.rem(part, across)))

        def place(n):
            return chunks - 1 - n if reverse else n

        def fetch(n, slot):
            tokens = pl.ds(place(n) * SIDE, SIDE)
            copy_in(
                arrived.at[slot],
                (a_ref.at[row, tokens, head, of_a], a_tiles.at[slot]),
                (b_ref.at[row, tokens, head, of_b], b_tiles.at[slot]),
                *((ref.at[row, head, place(n)], sums_tiles.at[slot]) for ref in sums_ref),
            )

        for n in range(slots):
            fetch(n, n)

        def step(n, state):
            slot, buffer = lax.rem(n, slots), lax.rem(n, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            kept[buffer] = state.astype(jnp.bfloat16)
            plgpu.barrier_wait(arrived.at[slot])
            of_chunk, written = None, b_tiles.at[slot]
            if gated:
                of_chunk = sums_tiles.at[slot]
                scaled = mosaic.decayed(mosaic.load(written, jnp.float32), of_chunk, reverse)
                weighted[...] = scaled.astype(jnp.bfloat16)
                written = weighted
            plgpu.commit_smem()
            there = states_ref.at[row, place(n), head, of_a, of_b]
            plgpu.copy_smem_to_gmem(kept.at[buffer], there)
            added = dot(mosaic.turned(a_tiles.at[slot]), written)
            state = mosaic.through(state, of_chunk) + scale * added

            @pl.when(n + slots < chunks)
            def _():
                fetch(n + slots, slot)

            return state

        start = mosaic.load(initial_ref.at[row, head, of_a, of_b])
        final_ref[row, head, of_a, of_b] = lax.fori_loop(0, chunks, step, start)
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "a_tiles": tile(slots),
        "b_tiles": tile(slots),
        "kept": tile(2),
        "arrived": plgpu.Barrier(num_arrivals=2 + gated, num_barriers=slots),
    }
    if gated:
        scratch |= {"weighted": tile(), "sums_tiles": plgpu.SMEM((slots, 2, SIDE), jnp.float32)}
    shape = jax.ShapeDtypeStruct
    return mosaic.kernel(
        body,
        [
            shape((batch, chunks, heads, width, size), a.dtype),
            shape(initial.shape, jnp.float32),
        ],
        scratch,
        name=name,
        grid={"tile": width // SIDE * across, "head": heads, "batch": batch},
        interpret=interpret,
    )(a, b, *sums, initial)


def read(a, b, c, sums, states, *, scale, reverse, name, interpret):
    """[B, T, H, V]: what the tokens of each chunk read,

        scale (e^G . A S + (e^{G_i - G_j} . A B^T, j <= i) C)
        e^{G_C - G} . A S + scale (e^{G_j - G_i} . A B^T, j >= i) C        in reverse

    a, b: [B, T, H, K]; c: [B, T, H, V]; states: [B, N, H, K, V], a warpgroup for each chunk and 64
    columns of V.
    """
    batch, length, heads, width = a.shape
    size, chunks, gated = c.shape[-1], length // SIDE, bool(sums)
    steps, across = width // SIDE, size // SIDE
    slots = min(2, steps)

    def body(
        *refs, a_tiles, b_tiles, state_tiles, c_tile, scores_tile, arrived, ready, sums_tile=None
    ):
        a_ref, b_ref, c_ref, *sums_ref, states_ref, o_ref = refs
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)
        tokens, columns = (pl.ds(n * SIDE, SIDE) for n in (chunk, column))

        def fetch(n, slot):
            rows = pl.ds(n * SIDE, SIDE)
            copy_in(
                arrived.at[slot],
                (a_ref.at[row, tokens, head, rows], a_tiles.at[slot]),
                (b_ref.at[row, tokens, head, rows], b_tiles.at[slot]),
                (states_ref.at[row, chunk, head, rows, columns], state_tiles.at[slot]),
            )

        for n in range(slots):
            fetch(n, n)
        copy_in(
            ready,
            (c_ref.at[row, tokens, head, columns], c_tile),
            *((ref.at[row, head, chunk], sums_tile) for ref in sums_ref),
        )

        def sum_over_keys(scores, asked):
            for n in range(steps):
                slot = n % slots
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.wgmma(scores, a_tiles.at[slot], mosaic.turned(b_tiles.at[slot]))
                plgpu.wgmma(asked, a_tiles.at[slot], state_tiles.at[slot])
                if n + slots < steps:
                    plgpu.wgmma_wait(0)
                    fetch(n + slots, slot)
            return scores[...], asked[...]

        scores, asked = pl.run_scoped(sum_over_keys, mosaic.SUMS, mosaic.SUMS)
        plgpu.barrier_wait(ready)
        scores_tile[...] = (scale * mosaic.lower(scores, sums_tile, reverse)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        asked = mosaic.decayed(asked if reverse else scale * asked, sums_tile, not reverse)
        o = asked + dot(scores_tile, c_tile)
        c_tile[...] = o.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(c_tile, o_ref.at[row, tokens, head, columns])
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "a_tiles": tile(slots),
        "b_tiles": tile(slots),
        "state_tiles": tile(slots),
        "c_tile": tile(),
        "scores_tile": tile(),
        "arrived": plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=1 + gated),
    }
    if gated:
        scratch |= {"sums_tile": plgpu.SMEM((2, SIDE), jnp.float32)}
    return mosaic.kernel(
        body,
        jax.ShapeDtypeStruct(c.shape, c.dtype),
        scratch,
        name=name,
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
    )(a, b, c, *sums, states)


def forward(q, k, v, sums, initial, *, scale, chunk, heads, keep, interpret):
    """(o, final state[, states in front of the chunks [B, N, H, K, V] in the dtype of q]).

    T must be a multiple of chunk, which is 64; heads is 1. sums: `log_decay_sums`'.
    """
    options = {"reverse": False, "interpret": interpret}
    rows = sums[1:]
    states, final = walk(
        k, v, rows, initial, scale=1.0, name="chunk_linear_forward_walk", **options
    )
    o = read(q, k, v, rows, states, scale=scale, name="chunk_linear_forward", **options)
    return (o, final, states) if keep else (o, final)
