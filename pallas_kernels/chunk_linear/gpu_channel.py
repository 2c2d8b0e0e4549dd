"""Linear attention with a decay for each channel (GLA) on Hopper, forward.

    S_n = e^{G_C} . S_{n-1} + (K . e^{G_C - G})^T V
    O_n = scale (Q . e^G) S_{n-1} + A V,   A_ij = scale sum_c q_ic k_jc e^{G_ic - G_jc}, j <= i

G [C, K] is the sum of the log decays since the chunk's start. The walk is that of gpu.py; Q e^G and
K e^{G_C - G} are made around the kernels. A has a kernel, a block for each chunk (Yang et al. 2023,
arXiv 2312.06635, Sec. 4.2, says why it is not one product: e^{-G_j} has no bound). Pairs of tokens
that are 16 and more apart are products of factors with decays to and from a token between them,
the one in front of the later token's block of 16; nearer ones are sums over channels of rows that
are shifted by 0 to 15 tokens. All exponents are at most 0.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_linear.gpu import states
from pallas_kernels.mosaic import SIDE, copy_in, dot, load, store, tile, turned

BAND = 16  # tokens; pairs that are nearer are made one by one
WIDE = jnp.float32
STARTS = tuple(range(BAND, SIDE, BAND))  # of the blocks of rows behind the first


def decayed_operands(q, k, total):
    """Q e^G and K e^{G_C - G} in bfloat16, and G_C [B, H, N, K]. total: G, [B, T, H, K]."""
    batch, length, heads, width = total.shape
    chunks = total.reshape(batch, -1, SIDE, heads, width)
    ends = chunks[:, :, -1:]
    to_end = jnp.exp(ends - chunks).reshape(total.shape)
    asked, written = (
        (x.astype(WIDE) * decay).astype(x.dtype) for x, decay in ((q, jnp.exp(total)), (k, to_end))
    )
    return asked, written, jnp.moveaxis(ends[:, :, 0], 2, 1)


def wide_tile():
    """[64, 64] of float32 in shared memory."""
    tiling = plgpu.TilingTransform((8, SIDE // 2))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(2 * SIDE)  # type: ignore[abstract]
    return plgpu.SMEM((SIDE, SIDE), WIDE, transforms=(tiling, swizzle))


def rows_of(dtype):
    """Rows of a tile with BAND rows on both sides; wider, so that rows begin in other banks."""
    return plgpu.SMEM((SIDE + 2 * BAND, SIDE + 8), dtype)


def shifted(ref, by):
    """Row i + by of a tile in `rows_of` in the place of row i, in float32; zero beyond the tile."""
    return load(ref.at[pl.ds(BAND + by, SIDE), pl.ds(0, SIDE)], WIDE, shared=False)


def put_rows(ref, x):
    """x [64, 64], zeros around it."""
    for start, rows in ((0, 0 * x), (2 * BAND, 0 * x), (BAND, x)):
        ref[pl.ds(start, SIDE), pl.ds(0, SIDE)] = rows.astype(ref.dtype)


def sums_before(rows, start):
    """G of the token in front of a block of rows, a number for each column."""
    before = rows.at[BAND + start - 1, pl.ds(0, SIDE)]
    return mosaic.of_columns(before, (SIDE, SIDE))


def since_block(total, rows):
    """e^{G_i - G} since the token in front of the block of row i; 0 in the first block."""
    i, _ = mosaic.places(SIDE)
    before = sums_before(rows, STARTS[0])
    for start in STARTS[1:]:
        before = jnp.where(i >= start, sums_before(rows, start), before)
    return jnp.exp(jnp.where(i >= BAND, total - before, -jnp.inf))


def until_block(total, rows, start):
    """e^{G - G_j} until the token in front of a block; 0 for later tokens."""
    i, _ = mosaic.places(SIDE)
    return jnp.exp(jnp.where(i < start, sums_before(rows, start) - total, -jnp.inf))


def scores(q, k, total, *, scale, interpret):
    """scale sum_c q_ic k_jc e^{G_ic - G_jc}, j <= i: [B, H, N, C, C]."""
    batch, length, heads, width = q.shape
    chunks = length // SIDE

    def body(x):
        chunk, head, row = (lax.axis_index(axis) for axis in ("chunk", "head", "batch"))
        i, j = mosaic.places(SIDE)

        def add(n, found):
            there = (row, mosaic.span(chunk), head, mosaic.span(n))
            pairs = ((x.q, x.q_tile), (x.k, x.k_tile), (x.total, x.total_tile))
            copy_in(x.ready, *((source.at[there], to) for source, to in pairs))
            plgpu.barrier_wait(x.ready)
            put_rows(x.k_rows, load(x.k_tile))
            put_rows(x.total_rows, load(x.total_tile))
            for by in range(BAND):
                decay = jnp.exp(load(x.total_tile) - shifted(x.total_rows, -by))
                near = jnp.sum(load(x.q_tile, WIDE) * shifted(x.k_rows, -by) * decay, axis=1)
                near = lax.broadcast_in_dim(near, (SIDE, SIDE), [0])
                found = found + jnp.where(j == i - by, near, 0.0)
                plgpu.commit_smem()
            store(x.q_tile, load(x.q_tile, WIDE) * since_block(load(x.total_tile), x.total_rows))
            for start in STARTS:
                decay = until_block(load(x.total_tile), x.total_rows, start)
                store(x.until_tile, load(x.k_tile, WIDE) * decay)
                plgpu.commit_smem()
                far = (i >= start) & (i < start + BAND) & (i - j >= BAND)
                found = found + jnp.where(far, dot(x.q_tile, turned(x.until_tile)), 0.0)
            plgpu.commit_smem()
            return found

        nothing = plgpu.layout_cast(jnp.zeros((SIDE, SIDE), WIDE), mosaic.WGMMA)
        store(x.q_tile, scale * lax.fori_loop(0, width // SIDE, add, nothing))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.q_tile, x.scores.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    (found,) = mosaic.run(
        body,
        {"q": q, "k": k, "total": total},
        {"scores": jax.ShapeDtypeStruct((batch, heads, chunks, SIDE, SIDE), q.dtype)},
        {
            **dict.fromkeys(("q_tile", "k_tile", "until_tile"), tile()),
            "total_tile": wide_tile(),
            "k_rows": rows_of(q.dtype),
            "total_rows": rows_of(WIDE),
            "ready": plgpu.Barrier(num_arrivals=3),
        },
        name="chunk_linear_forward_scores",
        grid={"chunk": chunks, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )
    return found


def outputs(a, scores, c, bounds, *, scale, backward, name, interpret):
    """scale A S + scores C, or A S + scores^T C where backward: [B, T, H, V]."""
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
        store(x.c_tile, (read if backward else scale * read) + dot(weights, x.c_tile))
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


def forward(q, k, v, sums, initial, *, scale, chunk, heads, keep, interpret):
    """(o, final state[, states in front of the chunks, scores])."""
    (total,) = sums
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    asked, written, ends = decayed_operands(q, k, total)
    options = {"backward": False, "interpret": interpret}
    name = "chunk_linear_forward"
    bounds, final = states(
        written, v, None, initial, ends=ends, scale=1.0, name=f"{name}_states", **options
    )
    weights = scores(q, k, total, scale=scale, interpret=interpret)
    o = outputs(asked, weights, v, bounds, scale=scale, name=f"{name}_outputs", **options)
    return (o, final, bounds, weights) if keep else (o, final)
