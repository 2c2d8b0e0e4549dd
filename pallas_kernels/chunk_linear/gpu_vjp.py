"""Decayed linear attention on Hopper, backward, from the states that gpu.py wrote.

With the letters of gpu.py, S the state in front of the chunk and dS the gradient of that behind it:

    A = scale e^{G_i - G_j} . Q K^T, j <= i             dA = scale e^{G_i - G_j} . dO V^T, j <= i
    dQ = dA K + scale e^G . dO S^T                      dV = A^T dO + (K e^{G_C - G}) dS
    dK = dA^T Q + e^{G_C - G} . V dS^T                  dS <- e^{G_C} dS + scale (Q e^G)^T dO
    dg_t = sum_{j < t <= i} (dA . Q K^T)_ij + sum_{i >= t} q_i e^{G_i} . (dO S^T)_i
           + sum_{j < t} k_j e^{G_C - G_j} . (V dS^T)_j + e^{G_C} <S, dS>

dS is the state of the walk against time, where Q writes dO, and dV what K reads there: the kernels
of gpu.py. One kernel more has a warpgroup for each chunk and 64 columns of K. It makes dQ, dK and
those columns' part of dg, whose terms do not cancel (`decays.log_decay_gradient`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_linear.gpu import outputs, states
from pallas_kernels.mosaic import SIDE, copy_in, decayed, dot, load, store, tile, turned


def keys(q, k, v, do, sums, bounds, dbounds, *, scale, name, interpret):
    """(dq, dk of each of H heads, dg [B, H, N, K / 64, C] in parts to be added, or None). bounds,
    dbounds: S and dS of each chunk, [B, N, H, K, V]."""
    batch, length, heads, size = v.shape
    group, width, chunks = heads // q.shape[2], q.shape[3], length // SIDE
    steps, across = size // SIDE, width // SIDE
    slots = min(2, steps)
    gated = sums is not None

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)
        tokens, columns = mosaic.span(chunk), mosaic.span(column)

        def fetch(n, slot):
            values = mosaic.span(n)
            copies = [
                (x.v.at[row, tokens, head, values], x.v_tiles.at[slot]),
                (x.do.at[row, tokens, head, values], x.do_tiles.at[slot]),
                (x.bounds.at[row, chunk, head, columns, values], x.state_tiles.at[slot]),
                (x.dbounds.at[row, chunk, head, columns, values], x.dstate_tiles.at[slot]),
            ]
            copy_in(x.arrived.at[slot], *copies)

        def use(slot, dscores, dread, dadded):
            v, do = x.v_tiles.at[slot], x.do_tiles.at[slot]
            state, dstate = x.state_tiles.at[slot], x.dstate_tiles.at[slot]
            plgpu.wgmma(dscores, do, turned(v))
            plgpu.wgmma(dread, do, turned(state))
            plgpu.wgmma(dadded, v, turned(dstate))
            if gated:
                return jnp.sum(load(state, jnp.float32) * load(dstate, jnp.float32), axis=1)
            return None

        there = (row, tokens, lax.div(head, group), columns)
        copies = [(x.q.at[there], x.q_tile), (x.k.at[there], x.k_tile)]
        if gated:
            copies.append((x.sums.at[row, head, chunk], x.sums_tile))
        copy_in(x.ready, *copies)
        dscores, dread, dadded, *carried = mosaic.sums_over(steps, slots, x.arrived, fetch, use, 3)
        plgpu.barrier_wait(x.ready)
        dscores = scale * mosaic.lower(dscores, x.sums_tile)
        dread = scale * decayed(dread, x.sums_tile, since_start=True)
        dadded = decayed(dadded, x.sums_tile, since_start=False)
        store(x.scores_tile, dscores)
        plgpu.commit_smem()
        if gated:
            products = dscores * dot(x.q_tile, turned(x.k_tile))
            of_decay(x, products, dread, dadded, *carried)
        dq = dread + dot(x.scores_tile, x.k_tile)
        dk = dadded + dot(turned(x.scores_tile), x.q_tile)
        store(x.q_tile, dq)
        store(x.k_tile, dk)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.q_tile, x.dq.at[row, tokens, head, columns])
        plgpu.copy_smem_to_gmem(x.k_tile, x.dk.at[row, tokens, head, columns])
        if gated:
            plgpu.copy_smem_to_gmem(x.dg_tile, x.dg.at[row, head, chunk, column])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    numbers = plgpu.SMEM((SIDE,), jnp.float32) if gated else None
    dg = shape((batch, heads, chunks, across, SIDE), jnp.float32) if gated else None
    given = {"q": q, "k": k, "v": v, "do": do, "sums": sums, "bounds": bounds, "dbounds": dbounds}
    dq, dk, *dg = mosaic.run(
        body,
        given,
        {**dict.fromkeys(("dq", "dk"), shape((batch, length, heads, width), q.dtype)), "dg": dg},
        {
            **dict.fromkeys(("v_tiles", "do_tiles", "state_tiles", "dstate_tiles"), tile(slots)),
            **dict.fromkeys(("q_tile", "k_tile", "scores_tile"), tile()),
            **dict.fromkeys(("asking", "writing", "carrying", "dg_tile"), numbers),
            "sums_tile": plgpu.SMEM((2, SIDE), jnp.float32) if gated else None,
            "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=slots),
            "ready": plgpu.Barrier(num_arrivals=2 + gated),
        },
        name=name,
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
    )
    return dq, dk, *(dg or (None,))


def of_decay(x, products, dread, dadded, carried):
    """dg of a chunk, as in `decays.log_decay_gradient`, into `x.dg_tile`. carried: e^{G_C} <S, dS>
    without its decay, a number for each row of S. Tiles that are read no more hold the parts of the
    products and the triangle of ones."""
    main, rest, onwards = (tiles.at[0] for tiles in (x.v_tiles, x.do_tiles, x.state_tiles))
    i, j = mosaic.places(SIDE)
    store(main, products)
    store(rest, products - products.astype(jnp.bfloat16).astype(jnp.float32))
    store(onwards, jnp.where(j >= i, 1.0, 0.0))
    x.asking[...] = jnp.sum(load(x.q_tile, jnp.float32) * dread, axis=1)
    x.writing[...] = jnp.sum(load(x.k_tile, jnp.float32) * dadded, axis=1)
    x.carrying[...] = mosaic.through(carried, x.sums_tile)
    plgpu.commit_smem()
    later = dot(onwards, main) + dot(onwards, rest)
    asking, writing, carrying = (
        mosaic.of_columns(ref, later.shape) for ref in (x.asking, x.writing, x.carrying)
    )
    x.dg_tile[...] = jnp.sum(jnp.where(j < i, later + writing, asking) + carrying, axis=1)


def backward(q, k, v, sums, bounds, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dg [B, H, N, C, 1] or None, dinitial) from `forward`'s bounds."""
    _, rows = sums or (None, None)
    options = {"scale": scale, "interpret": interpret}
    name, against = "chunk_linear_backward", {"backward": True}
    dbounds, dinitial = states(q, do, rows, dfinal, name=f"{name}_states", **options, **against)
    dv = outputs(k, q, do, rows, dbounds, name=f"{name}_values", **options, **against)
    dq, dk, dg = keys(q, k, v, do, rows, bounds, dbounds, name=f"{name}_keys", **options)
    dq, dk = (x.reshape(*q.shape[:3], -1, q.shape[3]).sum(3) for x in (dq, dk))
    return dq, dk, dv, None if dg is None else dg.sum(3)[..., None], dinitial
