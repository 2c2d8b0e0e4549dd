"""Decayed linear attention on Hopper, backward."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_linear.gpu import read, walk
from pallas_kernels.mosaic import SIDE, copy_in, dot, tile

VECTOR = plgpu.SMEM((SIDE,), jnp.float32)


def asked_and_written(q, k, v, do, sums, states, dstates, *, scale, interpret):
    """(dq, dk, dg [B, H, N, K / 64, C] or None): the gradients of what meets in the scores, dg in a
    part for each 64 columns of K, to be added. A warpgroup for each chunk and 64 columns of K."""
    batch, length, heads, width = q.shape
    size, chunks, gated = v.shape[-1], length // SIDE, bool(sums)
    steps, across = size // SIDE, width // SIDE
    slots = min(2, steps)
    like = jnp.bfloat16

    def body(
        *refs,
        v_tiles,
        do_tiles,
        state_tiles,
        dstate_tiles,
        q_tile,
        k_tile,
        scores_tile,
        arrived,
        ready,
        sums_tile=None,
        asking=None,
        writing=None,
        carrying=None,
        dg_tile=None,
    ):
        q_ref, k_ref, v_ref, do_ref, *sums_ref, states_ref, dstates_ref = refs[: 6 + gated]
        dq_ref, dk_ref, *dg_ref = refs[6 + gated :]
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)
        tokens, columns = (pl.ds(n * SIDE, SIDE) for n in (chunk, column))

        def fetch(n, slot):
            rows = pl.ds(n * SIDE, SIDE)
            copy_in(
                arrived.at[slot],
                (v_ref.at[row, tokens, head, rows], v_tiles.at[slot]),
                (do_ref.at[row, tokens, head, rows], do_tiles.at[slot]),
                (states_ref.at[row, chunk, head, columns, rows], state_tiles.at[slot]),
                (dstates_ref.at[row, chunk, head, columns, rows], dstate_tiles.at[slot]),
            )

        for n in range(slots):
            fetch(n, n)
        copy_in(
            ready,
            (q_ref.at[row, tokens, head, columns], q_tile),
            (k_ref.at[row, tokens, head, columns], k_tile),
            *((ref.at[row, head, chunk], sums_tile) for ref in sums_ref),
        )

        def sum_over_values(dscores, dread, dadded):
            carried = []
            for n in range(steps):
                slot = n % slots
                plgpu.barrier_wait(arrived.at[slot])
                plgpu.wgmma(dscores, do_tiles.at[slot], mosaic.turned(v_tiles.at[slot]))
                plgpu.wgmma(dread, do_tiles.at[slot], mosaic.turned(state_tiles.at[slot]))
                plgpu.wgmma(dadded, v_tiles.at[slot], mosaic.turned(dstate_tiles.at[slot]))
                if gated:
                    state, dstate = (
                        mosaic.load(ref.at[slot], jnp.float32)
                        for ref in (state_tiles, dstate_tiles)
                    )
                    carried.append(jnp.sum(state * dstate, axis=1))
                if n + slots < steps:
                    plgpu.wgmma_wait(0)
                    fetch(n + slots, slot)
            return dscores[...], dread[...], dadded[...], carried

        dscores, dread, dadded, carried = pl.run_scoped(sum_over_values, *[mosaic.SUMS] * 3)
        plgpu.barrier_wait(ready)
        dscores = scale * mosaic.lower(dscores, sums_tile)
        dread = scale * mosaic.decayed(dread, sums_tile, True)
        dadded = mosaic.decayed(dadded, sums_tile, False)
        scores_tile[...] = dscores.astype(like)
        plgpu.commit_smem()
        if gated:
            products = dscores * dot(q_tile, mosaic.turned(k_tile))
            i, j = mosaic.places(SIDE)
            main_tile, rest_tile, onwards = (x.at[0] for x in (v_tiles, do_tiles, state_tiles))
            main = products.astype(like)
            main_tile[...] = main
            rest_tile[...] = (products - main.astype(jnp.float32)).astype(like)
            onwards[...] = jnp.where(j >= i, 1.0, 0.0).astype(like)
            asking[...] = jnp.sum(mosaic.load(q_tile, jnp.float32) * dread, axis=1)
            writing[...] = jnp.sum(mosaic.load(k_tile, jnp.float32) * dadded, axis=1)
            carrying[...] = mosaic.through(functools.reduce(jnp.add, carried), sums_tile)
            plgpu.commit_smem()
            later = dot(onwards, main_tile) + dot(onwards, rest_tile)
            ask, write, carry = (
                mosaic.of_columns(x, (SIDE, SIDE)) for x in (asking, writing, carrying)
            )
            dg_tile[...] = jnp.sum(jnp.where(j < i, later + write, ask) + carry, axis=1)
        dq = dread + dot(scores_tile, k_tile)
        dk = dadded + dot(mosaic.turned(scores_tile), q_tile)
        q_tile[...] = dq.astype(like)
        k_tile[...] = dk.astype(like)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, tokens, head, columns])
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[row, tokens, head, columns])
        if gated:
            plgpu.copy_smem_to_gmem(dg_tile, dg_ref[0].at[row, head, chunk, column])
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        **{name: tile(slots) for name in ("v_tiles", "do_tiles", "state_tiles", "dstate_tiles")},
        **{name: tile() for name in ("q_tile", "k_tile", "scores_tile")},
        "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=slots),
        "ready": plgpu.Barrier(num_arrivals=2 + gated),
    }
    if gated:
        scratch |= dict.fromkeys(("asking", "writing", "carrying", "dg_tile"), VECTOR)
        scratch |= {"sums_tile": plgpu.SMEM((2, SIDE), jnp.float32)}
    shape = jax.ShapeDtypeStruct
    dg = shape((batch, heads, chunks, across, SIDE), jnp.float32)
    dq, dk, *dg = mosaic.kernel(
        body,
        [shape(q.shape, q.dtype), shape(k.shape, k.dtype), *([dg] if gated else [])],
        scratch,
        name="chunk_linear_backward_keys",
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
    )(q, k, v, do, *sums, states, dstates)
    return dq, dk, *(dg or (None,))


def backward(q, k, v, sums, bounds, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dg [B, H, N, C, 1] or None, dinitial) from `forward`'s bounds."""
    options = {"scale": scale, "interpret": interpret}
    rows = sums[1:]
    dstates, dinitial = walk(
        q, do, rows, dfinal, reverse=True, name="chunk_linear_backward_walk", **options
    )
    dv = read(k, q, do, rows, dstates, reverse=True, name="chunk_linear_backward_values", **options)
    dq, dk, dg = asked_and_written(q, k, v, do, rows, bounds, dstates, **options)
    return dq, dk, dv, None if dg is None else dg.sum(3)[..., None], dinitial
