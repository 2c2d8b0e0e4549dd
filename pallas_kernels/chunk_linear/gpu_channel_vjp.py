"""Linear attention with a decay for each channel (GLA) on Hopper, backward.

With the letters of gpu_channel.py and dA = scale dO V^T, j <= i:

    dq_i = scale e^{G_i} . (S dO_i) + sum_{j <= i} dA_ij k_j . e^{G_i - G_j}
    dk_j = e^{G_C - G_j} . (dS v_j) + sum_{i >= j} dA_ij q_i . e^{G_i - G_j}
    dV = A^T dO + (K . e^{G_C - G}) dS,     dS <- e^{G_C} . dS + (scale Q . e^G)^T dO

dg is summed from what each decay, of a level of pairs or from a chunk's bounds, has for a gradient
(`mosaic_channels.py`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels import mosaic_channels as channels
from pallas_kernels.chunk_linear.gpu import states
from pallas_kernels.chunk_linear.gpu_channel import operands, outputs
from pallas_kernels.mosaic import HALF, SIDE, WIDE, copy_in, load, put, span, tile, turned


def keys(q, k, v, do, logs, ends, bounds, dbounds, *, scale, interpret):
    """[dq and dk of each of H heads, dg [B, T, H, K]]. bounds, dbounds: S and dS of each chunk,
    [B, N, H, K, V]; ends: e^{G_C}."""
    batch, length, heads, width = logs.shape
    size, group, chunks = v.shape[-1], heads // q.shape[2], length // SIDE
    steps, across = size // SIDE, width // SIDE
    slots = min(2, steps)

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)
        tokens, columns = (row, span(chunk), head), span(column)

        def operands_of(slot):
            return [x.tiles.at[5 + 4 * slot + n] for n in range(4)]

        def fetch(n, slot):
            sources = [ref.at[*tokens, span(n)] for ref in (x.v, x.do)]
            sources += [ref.at[row, chunk, head, columns, span(n)] for ref in (x.bounds, x.dbounds)]
            copy_in(x.arrived.at[slot], *zip(sources, operands_of(slot), strict=True))

        def use(slot, dscores, dread, dadded):
            v, do, state, dstate = operands_of(slot)
            plgpu.wgmma(dscores, do, turned(v))
            plgpu.wgmma(dread, do, turned(state))
            plgpu.wgmma(dadded, v, turned(dstate))
            return jnp.sum(load(state, WIDE) * load(dstate, WIDE), axis=1)

        copies = channels.copies(x, x.tiles, tokens, group, columns)
        copy_in(x.ready, *copies, (x.ends.at[row, head, chunk, columns], x.numbers.at[0]))
        dscores, dread, dadded, carried = mosaic.sums_over(steps, slots, x.arrived, fetch, use, 3)
        tiles = x.tiles.at[:12]
        put(channels.Tiles(tiles).made, scale * mosaic.lower(dscores, None))
        plgpu.barrier_wait(x.ready)
        given = (scale * dread, dadded, None, carried)
        found = channels.bounds_back(tiles, x.numbers.at[0], x.numbers.at[1], *given)
        found = channels.pairs_back(tiles, *found)
        channels.leave(x, tiles, (*tokens, columns), *found)

    shape = jax.ShapeDtypeStruct
    return mosaic.run(
        body,
        {
            "q": q,
            "k": k,
            "v": v,
            "do": do,
            "logs": channels.split(logs, 3),
            "ends": ends,
            "bounds": bounds,
            "dbounds": dbounds,
        },
        {**dict.fromkeys(("dq", "dk"), shape(logs.shape, HALF)), "dg": shape(logs.shape, WIDE)},
        {
            "tiles": tile(max(12, 5 + 4 * slots)),
            "numbers": plgpu.SMEM((2, SIDE), WIDE),
            "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=slots),
            "ready": plgpu.Barrier(num_arrivals=6),
        },
        name="chunk_linear_backward_keys",
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def backward(q, k, v, decaying, bounds, weights, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dg [B, T, H, K], dinitial) from what `forward` kept."""
    (logs,) = decaying
    asked, written, ends = operands(q, k, logs, scale)
    options = {"backward": True, "interpret": interpret}
    name = "chunk_linear_backward"
    dbounds, dinitial = states(
        asked, do, None, dfinal, ends=ends, scale=1.0, name=f"{name}_states", **options
    )
    dv = outputs(written, weights, do, dbounds, name=f"{name}_values", **options)
    dq, dk, dg = keys(q, k, v, do, logs, ends, bounds, dbounds, scale=scale, interpret=interpret)
    dq, dk = (x.reshape(*q.shape[:3], -1, q.shape[3]).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, dinitial
