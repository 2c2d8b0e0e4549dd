"""Linear attention with a decay for each channel (GLA) on Hopper, backward.

With the letters of gpu_channel.py and dA = scale dO V^T, j <= i:

    dq_i = scale e^{G_i} . (S dO_i) + sum_{j <= i} dA_ij k_j . e^{G_i - G_j}
    dk_j = e^{G_C - G_j} . (dS v_j) + sum_{i >= j} dA_ij q_i . e^{G_i - G_j}
    dV = A^T dO + (K . e^{G_C - G}) dS,     dS <- e^{G_C} . dS + scale (Q . e^G)^T dO
    dg_t = sum_{i >= t} (q_i . dq_i - k_i . dk_i of pairs) + sum_{j < t} k_j . dk_j of dS
           + e^{G_C} . sum_v S . dS

Pairs of a token with itself are left out of dg, where they cancel; the others are made as A is.
Those wholly behind t cancel to the rounding of their factors, which is what is left of dg_t behind
a strong decay.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_linear.gpu import states
from pallas_kernels.chunk_linear.gpu_channel import (
    BAND,
    STARTS,
    WIDE,
    decayed_operands,
    outputs,
    put_rows,
    rows_of,
    shifted,
    since_block,
    until_block,
    wide_tile,
)
from pallas_kernels.mosaic import SIDE, copy_in, dot, load, store, tile, turned


def keys(q, k, v, do, total, bounds, dbounds, *, scale, interpret):
    """(dq, dk, suffix, prefix, carried): of dg what is summed over later tokens and over earlier
    ones, [B, T, H, K], and what every token has, [B, H, N, K]; float32."""
    batch, length, heads, width = q.shape
    size, chunks = v.shape[-1], length // SIDE
    steps, across = size // SIDE, width // SIDE
    slots = min(2, steps)

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)
        tokens, columns = mosaic.span(chunk), mosaic.span(column)
        there = (row, tokens, head, columns)
        i, j = mosaic.places(SIDE)

        def fetch(n, slot):
            values = mosaic.span(n)
            copy_in(
                x.arrived.at[slot],
                (x.v.at[row, tokens, head, values], x.v_tiles.at[slot]),
                (x.do.at[row, tokens, head, values], x.do_tiles.at[slot]),
                (x.bounds.at[row, chunk, head, columns, values], x.state_tiles.at[slot]),
                (x.dbounds.at[row, chunk, head, columns, values], x.dstate_tiles.at[slot]),
            )

        def use(slot, dscores, dread, dadded):
            v, do = x.v_tiles.at[slot], x.do_tiles.at[slot]
            state, dstate = x.state_tiles.at[slot], x.dstate_tiles.at[slot]
            plgpu.wgmma(dscores, do, turned(v))
            plgpu.wgmma(dread, do, turned(state))
            plgpu.wgmma(dadded, v, turned(dstate))
            return jnp.sum(load(state, WIDE) * load(dstate, WIDE), axis=1)

        pairs = ((x.q, x.q_tile), (x.k, x.k_tile), (x.total, x.total_tile))
        copy_in(x.ready, *((source.at[there], to) for source, to in pairs))
        dscores, dread, dadded, carried = mosaic.sums_over(steps, slots, x.arrived, fetch, use, 3)
        plgpu.barrier_wait(x.ready)
        # What is in registers goes to shared memory, for the registers of what follows.
        store(x.dscores_tile, scale * mosaic.lower(dscores, None))
        for by in range(BAND):
            near = jnp.where(j == i - by, load(x.dscores_tile, WIDE), 0.0)
            x.diagonals[by, pl.ds(BAND, SIDE)] = jnp.sum(near, axis=1)
        for rows, of in ((x.q_rows, x.q_tile), (x.k_rows, x.k_tile), (x.total_rows, x.total_tile)):
            put_rows(rows, load(of))
        last = x.total_rows.at[BAND + SIDE - 1, pl.ds(0, SIDE)]
        x.carried_tile[...] = carried * jnp.exp(mosaic.vector(last))
        total = load(x.total_tile)
        x.dq_tile[...] = scale * dread * jnp.exp(total)
        x.dk_tile[...] = dadded * jnp.exp(mosaic.of_columns(last, total.shape) - total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.carried_tile, x.carried.at[row, head, chunk, columns])

        def of_diagonal(by, ahead=0):
            vector = x.diagonals.at[by, pl.ds(BAND + ahead, SIDE)]
            return mosaic.of_rows(vector, (SIDE, SIDE))

        # Pairs of tokens that are 1 to 15 apart.
        dq = dk = plgpu.layout_cast(jnp.zeros((SIDE, SIDE), WIDE), mosaic.WGMMA)
        for by in range(1, BAND):
            decay = jnp.exp(load(x.total_tile) - shifted(x.total_rows, -by))
            dq = dq + of_diagonal(by) * decay * shifted(x.k_rows, -by)
            decay = jnp.exp(jnp.minimum(shifted(x.total_rows, by) - load(x.total_tile), 0))
            later = jnp.where(i < SIDE - by, of_diagonal(by, by), 0.0)
            dk = dk + later * decay * shifted(x.q_rows, by)
            plgpu.commit_smem()
        # Pairs that are 16 and more apart.
        since = since_block(load(x.total_tile), x.total_rows)
        store(x.since_tile, load(x.q_tile, WIDE) * since)
        far = 0 * dq
        for start in STARTS:
            rows = (i >= start) & (i < start + BAND) & (i - j >= BAND)
            store(x.rows_tile, jnp.where(rows, load(x.dscores_tile, WIDE), 0.0))
            decay = until_block(load(x.total_tile), x.total_rows, start)
            store(x.until_tile, load(x.k_tile, WIDE) * decay)
            plgpu.commit_smem()
            far = far + dot(x.rows_tile, x.until_tile)
            dk = dk + decay * dot(turned(x.rows_tile), x.since_tile)
        dq = dq + since * far
        q, k = load(x.q_tile, WIDE), load(x.k_tile, WIDE)
        dread, dadded = load(x.dq_tile), load(x.dk_tile)
        x.dq_tile[...] = q * (dread + dq) - k * dk
        x.dk_tile[...] = k * dadded
        itself = of_diagonal(0)
        store(x.q_tile, dread + dq + itself * k)
        store(x.k_tile, dadded + dk + itself * q)
        plgpu.commit_smem()
        made = ((x.q_tile, x.dq), (x.k_tile, x.dk), (x.dq_tile, x.suffix), (x.dk_tile, x.prefix))
        for of, to in made:
            plgpu.copy_smem_to_gmem(of, to.at[there])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    numbers = plgpu.SMEM((SIDE,), WIDE)
    return mosaic.run(
        body,
        {
            **dict(q=q, k=k, v=v, do=do, total=total, bounds=bounds, dbounds=dbounds),
        },
        {
            **dict.fromkeys(("dq", "dk"), shape(q.shape, q.dtype)),
            **dict.fromkeys(("suffix", "prefix"), shape(q.shape, WIDE)),
            "carried": shape((batch, heads, chunks, width), WIDE),
        },
        {
            **dict.fromkeys(("v_tiles", "do_tiles", "state_tiles", "dstate_tiles"), tile(slots)),
            **dict.fromkeys(("q_tile", "k_tile", "dscores_tile", "rows_tile"), tile()),
            **dict.fromkeys(("since_tile", "until_tile"), tile()),
            **dict.fromkeys(("total_tile", "dq_tile", "dk_tile"), wide_tile()),
            **dict.fromkeys(("q_rows", "k_rows"), rows_of(q.dtype)),
            "total_rows": rows_of(WIDE),
            "diagonals": plgpu.SMEM((BAND, SIDE + 2 * BAND), WIDE),
            "carried_tile": numbers,
            "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=slots),
            "ready": plgpu.Barrier(num_arrivals=3),
        },
        name="chunk_linear_backward_keys",
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def backward(q, k, v, sums, bounds, weights, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dg [B, T, H, K], dinitial) from what `forward` kept."""
    (total,) = sums
    shared = q.shape
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    asked, written, ends = decayed_operands(q, k, total)
    options = {"backward": True, "interpret": interpret}
    name = "chunk_linear_backward"
    dbounds, dinitial = states(
        asked, do, None, dfinal, ends=ends, scale=scale, name=f"{name}_states", **options
    )
    dv = outputs(written, weights, do, dbounds, scale=1.0, name=f"{name}_values", **options)
    dq, dk, suffix, prefix, carried = keys(
        q, k, v, do, total, bounds, dbounds, scale=scale, interpret=interpret
    )
    dq, dk = (x.reshape(*shared[:3], -1, shared[3]).sum(3) for x in (dq, dk))
    onwards = jnp.triu(jnp.ones((SIDE, SIDE), WIDE))
    before = 1 - onwards

    def summed(over, x):
        x = x.reshape(*x.shape[:1], -1, SIDE, *x.shape[2:])
        return jnp.einsum("ts,bnshk->bnthk", over, x, precision=lax.Precision.HIGHEST)

    dg = summed(onwards, suffix) + summed(before, prefix)
    dg = dg + jnp.moveaxis(carried, 1, 2)[:, :, None]
    return dq, dk, dv, dg.reshape(total.shape), dinitial
