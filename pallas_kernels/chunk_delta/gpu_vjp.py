"""The delta rule on Hopper, backward, from what gpu.py kept: M, S in front of each chunk and R.

The letters and equations are those of tpu_vjp.py, in three kernels:

    walk    dR = A^T dO + e^{G_C - G} . K dS,  dY = M^T dR,  dV = beta dY
            dS <- e^{G_C} dS + scale Q^T (e^G . dO) - K^T (e^G . dV)
    pairs   dA and dB from sums over all of V;  dbeta_i = (dY R^T)_ii / beta_i
    keys    dQ, dK and their part of dg, 64 columns of K at a time

`walk` runs over the chunks in reverse, a warpgroup for each head and 64 columns of dS, and leaves
dS behind each chunk and dY. The others have a warpgroup for each chunk (and 64 columns of K). dQ
takes dA in two parts, since between equal keys its terms cancel.
Bytes a token and head: 4 K V / C each for S and dS, 4 V each for R and dY, which `pairs` reads once
and `keys` for each 64 columns of K, and those of q, k, do, dq, dk and dv.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_delta.gpu import Walk, walk_scratch
from pallas_kernels.mosaic import (
    HALF,
    NUMBERS,
    SIDE,
    WIDE,
    both,
    copy_in,
    decayed,
    dots,
    halves,
    in_pairs,
    in_parts,
    load,
    of_rows,
    put,
    span,
    store,
    tile,
    total,
    turned,
    unhoisted,
)

LARGE = 2.0**64  # times what is as small as the square of a rate


def walk(q, k, do, beta, sums, found, dfinal, *, scale, interpret):
    """(dv, dinitial, dS behind the chunks [B, N, 2 H, K, V], dY [B, T, 2 H, V]), the latter two in
    parts. beta: [B, H, N, C]; sums: rows of `decays.log_decay_sums`, or None; found: M."""
    batch, length, heads, size = do.shape
    width, chunks = q.shape[-1], length // SIDE

    def step(walk, n, slot, state):
        x, later = walk.x, n + 1 < chunks
        keys = [x.k_tiles.at[slot, i] for i in range(walk.steps)]
        queries = [x.q_tiles.at[i] for i in range(walk.steps)]
        first, second = in_pairs(x.work, 2)
        do = x.v_tile.at[0]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until what is overwritten has left
        copy_in(x.v_ready, (walk.tokens(x.v, n, walk.columns()), do))
        walk.put_state(state)
        walk.keep_state(x.dbounds, n)
        plgpu.barrier_wait(x.k_ready.at[slot])
        plgpu.barrier_wait(x.q_ready)
        written, scores = dots(
            walk.on_state(keys), [(a, turned(b)) for a, b in zip(queries, keys, strict=True)]
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_wait(x.rates_ready)
        put(first, mosaic.lower(scores, x.decays))
        written = decayed(written, x.decays, since_start=False)
        plgpu.barrier_wait(x.v_ready)
        asking = [do]
        if sums is not None:
            put(second, decayed(load(do, WIDE), x.decays, since_start=True))
            asking = halves(second)
        plgpu.commit_smem()
        (answered,) = dots([(a, do) for a in halves(first, turn=True)])
        put(first, written + scale * answered)
        through = mosaic.through(1.0, x.decays)

        def read(i, tile_):
            return through * tile_ + scale * dots(both(turned(queries[i]), asking))[0]

        state = walk.moved(state, read)
        pl.when(later)(lambda: walk.fetch_queries(n + 1))
        plgpu.barrier_wait(x.inverse_ready)
        plgpu.commit_smem()
        (wanted,) = dots(in_parts(halves(x.inverse, turn=True), halves(first)))
        pl.when(later)(lambda: walk.fetch_inverse(n + 1))
        put(first, wanted)
        dv = of_rows(x.rates, wanted.shape) * wanted
        store(do, dv)
        put(second, decayed(dv, x.decays, since_start=True))
        plgpu.commit_smem()
        pl.when(later)(lambda: walk.fetch_rates(n + 1))
        walk.keep_rows(first, x.wanted, n)
        plgpu.copy_smem_to_gmem(do, walk.tokens(x.dv, n, walk.columns()))

        def wrote(i, tile_):
            return tile_ - dots(both(turned(keys[i]), halves(second)))[0]

        state = walk.moved(state, wrote)
        pl.when(n + 2 < chunks)(lambda: walk.fetch_keys(n + 2, slot))
        return state

    shape = jax.ShapeDtypeStruct
    return mosaic.run(
        lambda x: Walk(x, chunks, heads, backward=True).run(step, x.dfinal, x.dinitial),
        {"q": q, "k": k, "v": do, "beta": beta, "sums": sums, "inverses": found, "dfinal": dfinal},
        {
            "dv": shape(do.shape, HALF),
            "dinitial": shape(dfinal.shape, WIDE),
            "dbounds": shape((batch, chunks, 2 * heads, width, size), HALF),
            "wanted": shape((batch, length, 2 * heads, size), HALF),
        },
        walk_scratch(width, sums is not None),
        name="chunk_delta_backward_walk",
        grid={"tile": size // SIDE, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def values_of(x, heads, row, chunk, head, columns):
    """64 columns of the chunk's tokens of dO, and both parts of R and dY."""
    found = [x.do.at[row, span(chunk), head, columns]]
    for ref in (x.rows, x.wanted):
        found += [ref.at[row, span(chunk), part * heads + head, columns] for part in range(2)]
    return found


def pairs(q, k, do, beta, sums, rows, wanted, *, scale, interpret):
    """[both parts of dA, and dB, [B, H, N, 3, C, C], dbeta [B, H, N, C], and if there are decays,
    what dg has from pairs of tokens, [B, H, N, C]]. rows, wanted: R and dY in parts. Without rates
    that is dV for dY, dB has two parts too, and dbeta is LARGE R . dV."""
    batch, length, heads, size = do.shape
    group, width, chunks = heads // q.shape[2], q.shape[3], length // SIDE
    across, steps = size // SIDE, width // SIDE
    slots = 2
    rated, gated = beta is not None, sums is not None

    def body(x):
        chunk, head, row = (lax.axis_index(axis) for axis in ("chunk", "head", "batch"))

        def fetch_values(n, slot):
            sources = values_of(x, heads, row, chunk, head, span(n))
            copy_in(x.arrived.at[slot], *zip(sources, each(x.tiles.at[slot]), strict=True))

        def use_values(slot, dscores, dlower):
            written, asking = in_pairs(x.tiles.at[slot, 1:], 2)
            for a, b in both(x.tiles.at[slot, 0], halves(written, turn=True)):
                plgpu.wgmma(dscores, a, b)
            for a, b in in_parts(halves(asking), halves(written, turn=True)):
                plgpu.wgmma(dlower, a, b)
            return None if rated else jnp.sum(LARGE * total(written) * total(asking), axis=1)

        def fetch_keys(n, slot):
            there = (row, span(chunk), lax.div(head, group), span(n))
            sources = [ref.at[there] for ref in (x.q, x.k)]
            copy_in(x.keys_arrived.at[slot], *zip(sources, each(x.tiles.at[slot, :2]), strict=True))

        def use_keys(slot, asked, alike):
            q, k = each(x.tiles.at[slot, :2])
            plgpu.wgmma(asked, q, turned(k))
            plgpu.wgmma(alike, k, turned(k))

        if rated:
            copy_in(x.ready, (x.beta.at[row, head, chunk], x.rates))
        if gated:
            copy_in(x.ready, (x.sums.at[row, head, chunk], x.decays))
        dscores, dlower, *dbeta = mosaic.sums_over(
            across, min(slots, across), x.arrived, fetch_values, use_values, 2
        )
        if rated:
            plgpu.barrier_wait(x.ready)
        i, j = mosaic.places(SIDE)
        rates = of_rows(x.rates, dlower.shape) if rated else 1.0
        if rated:
            dbeta = [jnp.sum(jnp.where(i == j, dlower / rates, 0.0), axis=1)]
        (x.dbeta_row[...],) = dbeta
        dscores = scale * mosaic.lower(dscores, x.decays)
        dalike = jnp.where(i > j, -rates * mosaic.lower(dlower, x.decays), 0.0)
        put(x.made.at[:2], dscores)
        store(x.made.at[2], dalike) if rated else put(x.made.at[2:], dalike)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.made, x.dpairs.at[row, head, chunk])
        plgpu.copy_smem_to_gmem(x.dbeta_row, x.dbeta.at[row, head, chunk])
        if gated:
            asked, alike = mosaic.sums_over(
                steps, min(slots, steps), x.keys_arrived, fetch_keys, use_keys, 2
            )
            products, onwards = x.tiles.at[0, :2], x.tiles.at[0, 2]
            put(products, dscores * asked + dalike * alike)
            store(onwards, jnp.where(j >= i, 1.0, 0.0))
            plgpu.commit_smem()
            (later,) = dots(both(onwards, halves(products)))
            x.dg_row[...] = jnp.sum(jnp.where(j < i, later, 0.0), axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x.dg_row, x.dg.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    numbers, made = shape((batch, heads, chunks, SIDE), WIDE), 3 if rated else 4
    return mosaic.run(
        body,
        {"q": q, "k": k, "do": do, "beta": beta, "sums": sums, "rows": rows, "wanted": wanted},
        {
            "dpairs": shape((batch, heads, chunks, made, SIDE, SIDE), HALF),
            "dbeta": numbers,
            "dg": numbers if gated else None,
        },
        {
            "tiles": tile(slots, 5),
            "made": tile(made),
            "rates": NUMBERS if rated else None,
            "dbeta_row": NUMBERS,
            "dg_row": NUMBERS if gated else None,
            "decays": plgpu.SMEM((2, SIDE), WIDE) if gated else None,
            "ready": plgpu.Barrier(num_arrivals=1 + gated) if rated else None,
            "arrived": plgpu.Barrier(num_arrivals=5, num_barriers=slots),
            "keys_arrived": plgpu.Barrier(num_arrivals=2, num_barriers=slots) if gated else None,
        },
        name="chunk_delta_backward_pairs",
        grid={"chunk": chunks, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def sums_of_values(x, row, chunk, head, column, carried: bool) -> list:
    """Of a chunk and 64 columns of K the sums over all of V of dO S^T, R dS^T and dY S^T, [C, 64],
    and, if it is wanted, of S . dS, [64]. x.tiles: nine; x.bounds, x.dbounds: S and dS."""
    heads, size = x.do.shape[2:]

    def fetch(n, slot):
        sources = values_of(x, heads, row, chunk, head, span(n))
        for ref in (x.bounds, x.dbounds):
            for part in range(2):
                sources.append(ref.at[row, chunk, part * heads + head, span(column), span(n)])
        copy_in(x.arrived.at[slot], *zip(sources, each(x.tiles), strict=True))

    def use(slot, dread, dadded, dseen):
        (tiles,) = unhoisted(x.tiles)
        do, (rows, wanted, state, dstate) = tiles.at[0], in_pairs(tiles.at[1:], 4)
        for a, b in both(do, halves(state, turn=True)):
            plgpu.wgmma(dread, a, b)
        for a, b in in_parts(halves(rows), halves(dstate, turn=True)):
            plgpu.wgmma(dadded, a, b)
        for a, b in in_parts(halves(wanted), halves(state, turn=True)):
            plgpu.wgmma(dseen, a, b)
        return jnp.sum(total(state) * total(dstate), axis=1) if carried else None

    return mosaic.sums_over(size // SIDE, 1, x.arrived, fetch, use, 3)


def keys(q, k, do, beta, sums, bounds, dbounds, rows, wanted, dpairs, *, scale, interpret):
    """[dq and dk of each of H heads, and if there are decays, what dg has from 64 columns of K,
    [B, H, N, K / 64, C]]. bounds, dbounds, rows, wanted: S, dS, R and dY in parts; dpairs: dA, dB.
    """
    batch, length, heads, size = do.shape
    group, width = heads // q.shape[2], q.shape[3]
    chunks, across = length // SIDE, width // SIDE
    gated = sums is not None

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, column = lax.div(part, across), lax.rem(part, across)

        there = (row, span(chunk), lax.div(head, group), span(column))
        tokens = [ref.at[there] for ref in (x.q, x.k)]
        copies = [
            *zip(tokens, (x.q_tile, x.k_tile), strict=True),
            (x.dpairs.at[row, head, chunk, 1:], x.made),
            (x.beta.at[row, head, chunk], x.rates),
        ]
        if gated:
            copies.append((x.sums.at[row, head, chunk], x.decays))
        copy_in(x.ready, *copies)
        found = sums_of_values(x, row, chunk, head, column, gated)
        dread, dadded, dseen, *carried = found
        main, (rest, dalike) = x.tiles.at[0], each(x.made)
        plgpu.commit_smem()
        copy_in(x.last_ready, (x.dpairs.at[row, head, chunk, 0], main))
        plgpu.barrier_wait(x.ready)
        dread = scale * decayed(dread, x.decays, since_start=True)
        dadded = decayed(dadded, x.decays, since_start=False)
        dseen = of_rows(x.rates, dseen.shape) * decayed(dseen, x.decays, since_start=True)
        if gated:
            q, k = load(x.q_tile, WIDE), load(x.k_tile, WIDE)
            x.asking[...] = jnp.sum(q * dread - k * dseen, axis=1)
            x.writing[...] = jnp.sum(k * dadded, axis=1)
            x.carrying[...] = mosaic.through(carried[0], x.decays)
            plgpu.commit_smem()
            i, j = mosaic.places(SIDE)
            asking, writing, carrying = (
                mosaic.of_columns(ref, i.shape) for ref in (x.asking, x.writing, x.carrying)
            )
            x.dg_row[...] = jnp.sum(jnp.where(j < i, writing, asking) + carrying, axis=1)
        plgpu.barrier_wait(x.last_ready)
        dq, dk = dots(
            [(main, x.k_tile), (rest, x.k_tile)],
            [(turned(main), x.q_tile), (dalike, x.k_tile), (turned(dalike), x.k_tile)],
        )
        store(x.q_tile, dq + dread)
        store(x.k_tile, dk + dadded - dseen)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.q_tile, x.dq.at[row, span(chunk), head, span(column)])
        plgpu.copy_smem_to_gmem(x.k_tile, x.dk.at[row, span(chunk), head, span(column)])
        if gated:
            plgpu.copy_smem_to_gmem(x.dg_row, x.dg.at[row, head, chunk, column])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct
    given = {"q": q, "k": k, "do": do, "beta": beta, "sums": sums, "bounds": bounds}
    given |= {"dbounds": dbounds, "rows": rows, "wanted": wanted, "dpairs": dpairs}
    numbers = NUMBERS if gated else None
    return mosaic.run(
        body,
        given,
        {
            **dict.fromkeys(("dq", "dk"), shape((batch, length, heads, width), HALF)),
            "dg": shape((batch, heads, chunks, across, SIDE), WIDE) if gated else None,
        },
        {
            "tiles": tile(9),
            "made": tile(2),
            **dict.fromkeys(("q_tile", "k_tile"), tile()),
            "rates": NUMBERS,
            **dict.fromkeys(("asking", "writing", "carrying", "dg_row"), numbers),
            "decays": plgpu.SMEM((2, SIDE), WIDE) if gated else None,
            "ready": plgpu.Barrier(num_arrivals=4 + gated),
            "arrived": plgpu.Barrier(num_arrivals=9, num_barriers=1),
            "last_ready": plgpu.Barrier(num_arrivals=1),
        },
        name="chunk_delta_backward_keys",
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def each(tiles):
    """The tiles of [n, 64, 64]."""
    return [tiles.at[n] for n in range(tiles.shape[0])]


def backward(q, k, v, beta, sums, kept, do, dfinal, *, scale, chunk, heads, interpret):
    """(dq, dk, dv, dbeta, dg or None, dinitial) from what `forward` kept; dbeta and dg are columns
    [B, H, N, C, 1]."""
    beta, (_, sums) = beta[..., 0], sums or (None, None)
    found, bounds, rows = kept
    options = {"scale": scale, "interpret": interpret}
    dv, dinitial, dbounds, wanted = walk(q, k, do, beta, sums, found, dfinal, **options)
    dpairs, dbeta, *of_pairs = pairs(q, k, do, beta, sums, rows, wanted, **options)
    given = q, k, do, beta, sums, bounds, dbounds, rows, wanted, dpairs
    dq, dk, *of_keys = keys(*given, **options)
    dq, dk = (x.reshape(*q.shape[:3], -1, q.shape[3]).sum(3) for x in (dq, dk))
    dg = (of_pairs[0] + of_keys[0].sum(3))[..., None] if of_keys else None
    return dq, dk, dv, dbeta[..., None], dg, dinitial
