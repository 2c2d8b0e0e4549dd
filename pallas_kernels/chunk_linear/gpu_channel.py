"""Linear attention with a decay for each channel (GLA) on Hopper, forward.

    S_n = e^{G_C} . S_{n-1} + (K . e^{G_C - G})^T V
    O_n = (scale Q . e^G) S_{n-1} + A V,  A_ij = scale sum_c q_ic k_jc e^{G_ic - G_jc}, j <= i

G [C, K] is the sum of the log decays since the chunk's start. The walk is that of gpu.py; Q e^G and
K e^{G_C - G} are made around the kernels, A in one of its own, a block for each chunk, by the
levels of `mosaic_channels.py` (Yang et al. 2023, arXiv 2312.06635, Sec. 4.2, has two such levels).
"""

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels import mosaic_channels as channels
from pallas_kernels.chunk_linear.gpu import states
from pallas_kernels.mosaic import HALF, SIDE, copy_in, dot, span, store, tile, turned


def operands(q, k, logs, scale):
    """scale Q e^G and K e^{G_C - G} [B, T, H, K], and e^{G_C} [B, H, N, K]."""
    asked, _, written, through = channels.operands(q, k, logs, scale)
    return asked.astype(HALF), written.astype(HALF), through


def scores(q, k, logs, *, scale, interpret):
    """A of every chunk, [B, H, N, C, C]. logs: g, [B, T, H, K]."""
    batch, length, heads, width = logs.shape
    group, chunks = heads // q.shape[2], length // SIDE

    def body(x):
        chunk, head, row = (lax.axis_index(axis) for axis in ("chunk", "head", "batch"))

        def fetch(n):
            tokens = (row, span(chunk), head)
            copy_in(x.ready, *channels.copies(x, x.tiles, tokens, group, span(n)))
            plgpu.barrier_wait(x.ready)

        (found,) = channels.pairs(x.tiles, width // SIDE, fetch, alike=False)
        made = channels.Tiles(x.tiles).q
        store(made, scale * found)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(made, x.scores.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    (found,) = mosaic.run(
        body,
        {"q": q, "k": k, "logs": channels.split(logs, 3)},
        {"scores": jax.ShapeDtypeStruct((batch, heads, chunks, SIDE, SIDE), HALF)},
        {"tiles": tile(10), "ready": plgpu.Barrier(num_arrivals=5)},
        name="chunk_linear_forward_scores",
        grid={"chunk": chunks, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )
    return found


def outputs(a, scores, c, bounds, *, backward, name, interpret):
    """A S + scores C, or A S + scores^T C where backward: [B, T, H, V]."""
    batch, length, heads, width = a.shape
    size, chunks = c.shape[-1], length // SIDE
    steps, across = width // SIDE, size // SIDE
    slots = min(2, steps)

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk = lax.div(part, across)
        tokens, columns = mosaic.span(chunk), mosaic.span(lax.rem(part, across))

        def fetch(n, slot):
            keys = mosaic.span(n)
            copy_in(
                x.arrived.at[slot],
                (x.a.at[row, tokens, head, keys], x.a_tiles.at[slot]),
                (x.bounds.at[row, chunk, head, keys, columns], x.state_tiles.at[slot]),
            )

        def use(slot, read):
            plgpu.wgmma(read, x.a_tiles.at[slot], x.state_tiles.at[slot])

        copy_in(
            x.ready,
            (x.c.at[row, tokens, head, columns], x.c_tile),
            (x.scores.at[row, head, chunk], x.scores_tile),
        )
        (read,) = mosaic.sums_over(steps, slots, x.arrived, fetch, use, 1)
        plgpu.barrier_wait(x.ready)
        weights = turned(x.scores_tile) if backward else x.scores_tile
        store(x.c_tile, read + dot(weights, x.c_tile))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.c_tile, x.o.at[row, tokens, head, columns])
        plgpu.wait_smem_to_gmem(0)

    (o,) = mosaic.run(
        body,
        {"a": a, "scores": scores, "c": c, "bounds": bounds},
        {"o": jax.ShapeDtypeStruct(c.shape, c.dtype)},
        {
            **dict.fromkeys(("a_tiles", "state_tiles"), tile(slots)),
            **dict.fromkeys(("c_tile", "scores_tile"), tile()),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            "ready": plgpu.Barrier(num_arrivals=2),
        },
        name=name,
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
    )
    return o


def forward(q, k, v, decaying, initial, *, scale, chunk, heads, keep, interpret):
    """(o, final state[, states in front of the chunks, scores])."""
    (logs,) = decaying
    asked, written, ends = operands(q, k, logs, scale)
    options = {"backward": False, "interpret": interpret}
    name = "chunk_linear_forward"
    bounds, final = states(
        written, v, None, initial, ends=ends, scale=1.0, name=f"{name}_states", **options
    )
    weights = scores(q, k, logs, scale=scale, interpret=interpret)
    o = outputs(asked, weights, v, bounds, name=f"{name}_outputs", **options)
    return (o, final, bounds, weights) if keep else (o, final)
