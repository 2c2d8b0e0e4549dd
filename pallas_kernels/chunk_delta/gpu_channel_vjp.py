"""The delta rule with a decay for each channel (KDA) on Hopper, backward, from what gpu_channel.py
kept: A, M, S in front of each chunk and R.

    walk    dV = M^T (A^T dO + (K . e^{G_C - G}) dS)
            dS <- e^{G_C} . dS + (scale Q . e^G)^T dO - (K . e^G)^T dV
    pairs   dA = scale dO R^T, dB = -dV R^T (of B, L without beta), dbeta_i = dV_i . R_i / beta_i^2
    keys    dQ, dK and dg, 64 columns of K at a time

`walk` is that of gpu_channel.py, `pairs` that of gpu_vjp.py without rates. `keys` has sums over all
of V of what is scaled by the decays from a chunk's bounds, and what pairs of tokens have by levels
(`mosaic_channels.py`).
"""

from types import SimpleNamespace

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels import mosaic_channels as channels
from pallas_kernels.chunk_delta.gpu_channel import operands, rates, walk
from pallas_kernels.chunk_delta.gpu_vjp import LARGE, pairs, sums_of_values
from pallas_kernels.mosaic import (
    HALF,
    SIDE,
    WIDE,
    copy_in,
    span,
    tile,
)


def keys(q, k, do, logs, through, bounds, dbounds, rows, wanted, dpairs, *, scale, interpret):
    """[dq and dk of each of H heads, dg [B, T, H, K]]. bounds, dbounds, rows, wanted: S, dS, R and
    dV in parts; dpairs: dA in parts, dB; through: e^{G_C}."""
    batch, length, heads, _ = do.shape
    group, width, chunks = heads // q.shape[2], q.shape[3], length // SIDE
    across = width // SIDE
    logs = channels.split(logs, 3)

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)
        tokens = (row, span(chunk), head)
        copies = channels.copies(x, x.tiles, tokens, group, span(column))
        through = x.through.at[row, head, chunk, span(column)]
        copy_in(x.ready, *copies, (through, x.numbers.at[0]))
        values = SimpleNamespace(**vars(x) | {"tiles": x.tiles.at[5:]})
        dread, dadded, dseen, carried = sums_of_values(values, row, chunk, head, column, True)
        plgpu.commit_smem()
        copy_in(x.last_ready, (x.dpairs.at[row, head, chunk], x.tiles.at[10:]))
        plgpu.barrier_wait(x.ready)
        given = (scale * dread, dadded, -dseen, carried)
        found = channels.bounds_back(x.tiles, x.numbers.at[0], x.numbers.at[1], *given)
        plgpu.barrier_wait(x.last_ready)
        found = channels.pairs_back(x.tiles, *found)
        channels.leave(x, x.tiles, (*tokens, span(column)), *found)

    shape = jax.ShapeDtypeStruct
    tokens = (batch, length, heads, width)
    return mosaic.run(
        body,
        {
            "q": q,
            "k": k,
            "do": do,
            "logs": logs,
            "through": through,
            "bounds": bounds,
            "dbounds": dbounds,
            "rows": rows,
            "wanted": wanted,
            "dpairs": dpairs,
        },
        {**dict.fromkeys(("dq", "dk"), shape(tokens, HALF)), "dg": shape(tokens, WIDE)},
        {
            "tiles": tile(14),
            "numbers": plgpu.SMEM((2, SIDE), WIDE),
            "ready": plgpu.Barrier(num_arrivals=6),
            "arrived": plgpu.Barrier(num_arrivals=9, num_barriers=1),
            "last_ready": plgpu.Barrier(num_arrivals=1),
        },
        name="chunk_delta_backward_keys",
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def backward(q, k, v, beta, decaying, kept, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dbeta, dg [B, T, H, K], dinitial) from what `forward` kept; dbeta is columns
    [B, H, N, C, 1]."""
    (logs,), beta = decaying, rates(beta)
    scores, inverses, bounds, rows = kept
    asked, seen, written, through = operands(q, k, logs, scale)
    dinitial, dbounds, wanted = walk(
        *(written, seen, asked, scores, inverses, do, through[:, :, :, None], dfinal),
        answers=False,
        backward=True,
        keep=True,
        name="chunk_delta_backward_walk",
        interpret=interpret,
    )
    options = {"scale": scale, "interpret": interpret}
    dpairs, dbeta = pairs(q, k, do, None, None, rows, wanted, **options)
    given = q, k, do, logs, through, bounds, dbounds, rows, wanted, dpairs
    dq, dk, dg = keys(*given, **options)
    dq, dk = (x.reshape(*q.shape[:3], -1, q.shape[3]).sum(3) for x in (dq, dk))
    dbeta = ((dbeta / beta) * (1 / LARGE / beta))[..., None]
    return dq, dk, wanted[:, :, : do.shape[2]], dbeta, dg, dinitial
