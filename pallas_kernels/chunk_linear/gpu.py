"""Decayed linear attention on Hopper, forward: a walk that writes states, then all outputs at once.

    S_n = e^{G_C} S_{n-1} + (K e^{G_C - G})^T V         S [K, V] float32, in registers
    O_n = scale ((Q e^G) S_{n-1} + (e^{G_i - G_j} . Q K^T, j <= i) V)

G is the sum of the log decays since the chunk's start, a chunk 64 tokens. Only the walk is
sequential: a warpgroup keeps 64 x 64 numbers of a head's state and writes the state in front of
each chunk in bfloat16, while the next chunks are on their way. Outputs have a warpgroup for each
chunk and 64 columns. Both kernels also run against time, for gradients (gpu_vjp.py).

q, k, v and o are read and written as they lie, [B, T, H, D], q and k with h heads, of which head i
of H reads i h // H. Bytes a token and head: those of q and o once, of k and v twice, 8 for the
decay, and 4 K V / C for states. bfloat16, with float32 sums; products take the state and the
weights rounded to bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import SIDE, copy_in, decayed, dot, load, store, tile, turned

# Chunks of the walk in shared memory or on their way: a multiprocessor has room for three blocks.
SLOTS = 3


def states(a, b, sums, initial, *, ends=None, scale, backward, name, interpret):
    """[the state in front of each chunk [B, N, H, K, V], the state behind the last] of

        S <- e^{G_C} S + scale (A e^{G_C - G})^T B,     backward: with e^G instead of e^{G_C - G}

    over the chunks in their order, or backward. a: [B, T, h, K]; b: [B, T, H, V]; sums: rows of
    `decays.log_decay_sums`, or None; initial: float32 [B, H, K, V]. ends: [B, H, N, K], the
    e^{G_C} of decays by channel, of which a has the rest.
    """
    batch, length, heads, size = b.shape
    group, width, chunks = heads // a.shape[2], a.shape[3], length // SIDE
    slots, across = min(SLOTS, chunks), size // SIDE
    gated = sums is not None

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        of_a, of_b = (mosaic.span(n) for n in (lax.div(part, across), lax.rem(part, across)))

        def place(n):
            return chunks - 1 - n if backward else n

        def fetch(n, slot):
            tokens = mosaic.span(place(n))
            copies = [
                (x.a.at[row, tokens, lax.div(head, group), of_a], x.a_tiles.at[slot]),
                (x.b.at[row, tokens, head, of_b], x.b_tiles.at[slot]),
            ]
            if gated:
                copies.append((x.sums.at[row, head, place(n)], x.sums_tiles.at[slot]))
            if ends is not None:
                copies.append((x.ends.at[row, head, place(n), of_a], x.ends_tiles.at[slot]))
            copy_in(x.arrived.at[slot], *copies)

        for n in range(slots):
            fetch(n, n)

        def step(n, state):
            slot, buffer = lax.rem(n, slots), lax.rem(n, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            store(x.kept.at[buffer], state)
            plgpu.barrier_wait(x.arrived.at[slot])
            of_chunk = x.sums_tiles.at[slot] if gated else None
            added = x.b_tiles.at[slot]
            if gated:
                store(x.weighted, decayed(load(added, jnp.float32), of_chunk, since_start=backward))
                added = x.weighted
            if ends is not None:
                state = state * mosaic.of_rows(x.ends_tiles.at[slot], state.shape)
            state = mosaic.through(state, of_chunk)
            plgpu.commit_smem()
            there = x.states.at[row, place(n), head, of_a, of_b]
            plgpu.copy_smem_to_gmem(x.kept.at[buffer], there)
            state = state + scale * dot(turned(x.a_tiles.at[slot]), added)

            @pl.when(n + slots < chunks)
            def _():
                fetch(n + slots, slot)

            return state

        start = load(x.initial.at[row, head, of_a, of_b], shared=False)
        x.final[row, head, of_a, of_b] = lax.fori_loop(0, chunks, step, start)
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    return mosaic.run(
        body,
        {"a": a, "b": b, "sums": sums, "ends": ends, "initial": initial},
        {
            "states": shape((batch, chunks, heads, width, size), a.dtype),
            "final": shape(initial.shape, jnp.float32),
        },
        {
            **dict.fromkeys(("a_tiles", "b_tiles"), tile(slots)),
            "kept": tile(2),
            "weighted": tile() if gated else None,
            "sums_tiles": plgpu.SMEM((slots, 2, SIDE), jnp.float32) if gated else None,
            "ends_tiles": None if ends is None else plgpu.SMEM((slots, SIDE), jnp.float32),
            "arrived": plgpu.Barrier(
                num_arrivals=2 + gated + (ends is not None), num_barriers=slots
            ),
        },
        name=name,
        grid={"tile": width // SIDE * across, "head": heads, "batch": batch},
        interpret=interpret,
    )


def outputs(a, b, c, sums, bounds, *, scale, backward, name, interpret):
    """[B, T, H, V], of each chunk with the state S in front of it, or behind it where backward,

        scale (e^G . A S + (e^{G_i - G_j} . A B^T, j <= i) C)
        e^{G_C - G} . A S + scale (e^{G_j - G_i} . A B^T, j >= i) C       backward

    a, b: [B, T, h, K]; c: [B, T, H, V]; bounds: [B, N, H, K, V].
    """
    batch, length, heads, size = c.shape
    group, width, chunks = heads // a.shape[2], a.shape[3], length // SIDE
    steps, across = width // SIDE, size // SIDE
    slots = min(2, steps)
    gated = sums is not None

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk = lax.div(part, across)
        tokens, columns = mosaic.span(chunk), mosaic.span(lax.rem(part, across))

        def fetch(n, slot):
            keys = mosaic.span(n)
            there = (row, tokens, lax.div(head, group), keys)
            copies = [
                (x.a.at[there], x.a_tiles.at[slot]),
                (x.b.at[there], x.b_tiles.at[slot]),
                (x.bounds.at[row, chunk, head, keys, columns], x.state_tiles.at[slot]),
            ]
            copy_in(x.arrived.at[slot], *copies)

        def use(slot, scores, read):
            plgpu.wgmma(scores, x.a_tiles.at[slot], turned(x.b_tiles.at[slot]))
            plgpu.wgmma(read, x.a_tiles.at[slot], x.state_tiles.at[slot])

        copies = [(x.c.at[row, tokens, head, columns], x.c_tile)]
        if gated:
            copies.append((x.sums.at[row, head, chunk], x.sums_tile))
        copy_in(x.ready, *copies)
        scores, read = mosaic.sums_over(steps, slots, x.arrived, fetch, use, 2)
        plgpu.barrier_wait(x.ready)
        store(x.scores_tile, scale * mosaic.lower(scores, x.sums_tile, backward))
        plgpu.commit_smem()
        read = decayed(read if backward else scale * read, x.sums_tile, since_start=not backward)
        store(x.c_tile, read + dot(x.scores_tile, x.c_tile))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.c_tile, x.o.at[row, tokens, head, columns])
        plgpu.wait_smem_to_gmem(0)

    (o,) = mosaic.run(
        body,
        {"a": a, "b": b, "c": c, "sums": sums, "bounds": bounds},
        {"o": jax.ShapeDtypeStruct(c.shape, c.dtype)},
        {
            **dict.fromkeys(("a_tiles", "b_tiles", "state_tiles"), tile(slots)),
            **dict.fromkeys(("c_tile", "scores_tile"), tile()),
            "sums_tile": plgpu.SMEM((2, SIDE), jnp.float32) if gated else None,
            "arrived": plgpu.Barrier(num_arrivals=3, num_barriers=slots),
            "ready": plgpu.Barrier(num_arrivals=1 + gated),
        },
        name=name,
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
    )
    return o


def forward(q, k, v, sums, initial, *, scale, chunk, heads, keep, interpret):
    """(o, final state[, states in front of the chunks [B, N, H, K, V] in the dtype of q]).

    T must be a multiple of chunk, which is 64; heads is 1. sums: `log_decay_sums`'.
    """
    _, rows = sums or (None, None)
    options = {"backward": False, "interpret": interpret}
    name = "chunk_linear_forward"
    bounds, final = states(k, v, rows, initial, scale=1.0, name=f"{name}_states", **options)
    o = outputs(q, k, v, rows, bounds, scale=scale, name=f"{name}_outputs", **options)
    return (o, final, bounds) if keep else (o, final)
