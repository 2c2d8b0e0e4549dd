"""Diagonal plus low rank on Hopper, backward, from what gpu.py kept: M, the pairs, S and R.

    walk    dW = M^T ((Q^ B^^T)^T dO + B^ dS),  dS <- e^{..} . (dS + Q^^T dO + A^^T dW)
    values  dV = K^ dS + (Q^ K^^T)^T dO + P^T dW
    keys    of Q^ K^^T: dO V^T     of Q^ B^^T: dO R^T     of A^ K^^T: dW V^T     of A^ B^^T: dW R^T
            dQ^ = theirs + dO S^T       dA^ = theirs + dW S^T
            dK^ = theirs + V dS^T       dB^ = theirs + R dS^T

With the letters of gpu.py, dS that of what tokens are added to. `walk` is the forward one and
`values` is `outputs` there, both against time; `keys` has a warpgroup for each chunk and 64
channels. What the four are to q, k, a, b and g is left to jax (`operands`), with d e^{..} the sums
of S dS: terms of dg that cancel are each a pair's that dg has of other tokens too.
Bytes a token and head: 16 K for the four gradients besides what the forward pass has.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_delta.gpu_channel import walk
from pallas_kernels.chunk_dplr.gpu import (
    asking,
    copies,
    documents_of,
    factors,
    lower,
    operands,
    outputs,
    strictly,
    writing,
)
from pallas_kernels.mosaic import (
    NUMBERS,
    SIDE,
    WIDE,
    both,
    copy_in,
    dots,
    halves,
    in_pairs,
    in_parts,
    put,
    span,
    tile,
    turned,
)
from pallas_kernels.mosaic_channels import split


def keys(made, documents, v, do, bounds, dbounds, rows, wanted, *, interpret):
    """[dQ^, dK^, dA^ and dB^, float32 [B, T, H, K]]. made: Q^, K^, A^ and B^; bounds, dbounds,
    rows, wanted: S, dS, R and dW, all of them in parts; documents: [B, N, C] or None."""
    batch, length, heads, size = v.shape
    asked, written, seen, placed = made
    width, chunks = asked.shape[-1], length // SIDE
    across, steps = width // SIDE, size // SIDE

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        there = row, lax.div(part, across), head
        of_v, of_do = x.tiles.at[7:10], x.tiles.at[10:]

        def fetch(n, slot):
            copy_in(x.arrived.at[slot], *values(x.v, x.rows, there, n, of_v))
            copy_in(x.arrived.at[slot], *values(x.do, x.wanted, there, n, of_do))

        def use(slot, *sums):
            v, rows = turned(of_v.at[0]), halves(of_v.at[1:], turn=True)
            do, wanted = of_do.at[0], halves(of_do.at[1:])
            products = [(do, v)], both(do, rows), [(a, v) for a in wanted], in_parts(wanted, rows)
            add(sums, products)

        if documents is not None:
            copy_in(x.ready, (x.documents.at[row, there[1]], x.document))
        scores, answers, wanted, removed = mosaic.sums_over(steps, 1, x.arrived, fetch, use, 4)
        if documents is not None:
            plgpu.barrier_wait(x.ready)
        found = [lower(each, x.document) for each in (scores, answers)]
        found += [strictly(each, x.document) for each in (wanted, removed)]
        for parts, of_pairs in zip(in_pairs(x.tiles, 4), found, strict=True):
            put(parts, of_pairs)
        plgpu.commit_smem()
        for backward in (False, True):
            half(x, there, span(lax.rem(part, across)), steps, backward)

    given = {"asked": asked, "written": written, "seen": seen, "placed": placed}
    given |= {"documents": documents, "v": v, "do": do, "bounds": bounds, "dbounds": dbounds}
    gradient = jax.ShapeDtypeStruct((batch, length, heads, width), WIDE)
    return mosaic.run(
        body,
        given | {"rows": rows, "wanted": wanted},
        dict.fromkeys(("dasked", "dwritten", "dseen", "dplaced"), gradient),
        {
            "tiles": tile(13),
            "document": None if documents is None else NUMBERS,
            "ready": None if documents is None else plgpu.Barrier(num_arrivals=1),
            "arrived": plgpu.Barrier(num_arrivals=6, num_barriers=1),
            "operands_ready": plgpu.Barrier(num_arrivals=4),
            "states_arrived": plgpu.Barrier(num_arrivals=5, num_barriers=1),
        },
        name="chunk_dplr_backward_keys",
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def values(single, parts, there, n, tiles):
    """Copies of the n-th 64 columns of V and R, or of dO and dW, to three tiles."""
    row, chunk, head = there
    place = row, span(chunk), head, span(n)
    return [(single.at[place], tiles.at[0]), *copies(parts, place, tiles.at[1:])]


def add(sums, products):
    """Starts products, a list for each sum."""
    for found, pairs in zip(sums, products, strict=True):
        for a, b in pairs:
            plgpu.wgmma(found, a, b)


def half(x, there, channels, steps, backward):
    """Writes 64 channels of dQ^ and dA^, or, where backward, of dK^ and dB^. x.tiles: first the
    gradients of the pairs in the order of `weights`, in parts, then five to work in."""
    row, chunk, head = there
    scores, answers, wanted, removed = (
        halves(parts, turn=backward) for parts in in_pairs(x.tiles, 4)
    )
    if backward:
        given, made, answers, wanted = (x.asked, x.seen), (x.dwritten, x.dplaced), wanted, answers
        single, parts, states = x.v, x.rows, x.dbounds
    else:
        given, made = (x.written, x.placed), (x.dasked, x.dseen)
        single, parts, states = x.do, x.wanted, x.bounds
    tiles = x.tiles.at[8:]
    operands, state = in_pairs(tiles, 2), tiles.at[3:]
    place = row, span(chunk), head, channels
    for source, operand in zip(given, operands, strict=True):
        copy_in(x.operands_ready, *copies(source, place, operand))
    plgpu.barrier_wait(x.operands_ready)
    first, second = (halves(operand) for operand in operands)
    of_pairs = dots(
        [*in_parts(scores, first), *in_parts(answers, second)],
        [*in_parts(wanted, first), *in_parts(removed, second)],
    )

    def fetch(n, slot):
        copy_in(
            x.states_arrived.at[slot],
            *values(single, parts, there, n, tiles.at[:3]),
            *copies(states, (row, chunk, head, channels, span(n)), state),
        )

    def use(slot, *sums):
        across = halves(state, turn=True)
        add(sums, (both(tiles.at[0], across), in_parts(halves(tiles.at[1:3]), across)))

    of_state = mosaic.sums_over(steps, 1, x.states_arrived, fetch, use, 2)
    for to, one, other in zip(made, of_pairs, of_state, strict=True):
        if x.document is not None:
            document = mosaic.of_rows(x.document, other.shape)
            own = document == (x.document[SIDE - 1] if backward else 0.0)
            other = jnp.where(own, other, 0.0)
        to[place] = one + other


def passed_on(bounds, dbounds, final, dfinal, dfirst, through):
    """Of the log decays `through` the gradients [B, H, N + 1, K]: sums over V of the state in front
    of each chunk times its gradient, of the last the state behind it. bounds, dbounds: S and dS."""
    state, dstate = (
        jnp.moveaxis(x.reshape(*x.shape[:2], 2, -1, *x.shape[3:]).astype(WIDE).sum(2), 1, 2)
        for x in (bounds, dbounds)
    )
    state = jnp.concatenate([state, final[:, :, None]], axis=2)
    dstate = dstate[:, :, :-1] * jnp.exp(-through[:, :, 1:-1, :, None])
    dstate = jnp.concatenate([dfirst[:, :, None], dstate, dfinal[:, :, None]], axis=2)
    return jnp.sum(state * dstate, axis=-1)


def backward(q, k, a, b, v, decaying, kept, do, dfinal, *, scale, lowest, chunk, heads, interpret):
    """(dq, dk, da, db, dv, dg [B, T, H, K], dinitial) from what `forward` kept."""
    g, reset = decaying
    scores, answers, wanted, inverses, bounds, rows, final = kept

    def prepared(q, k, a, b, g):
        return operands(q, k, a, b, g, reset, scale)

    (*made, through), back = jax.vjp(prepared, q, k, a, b, g)
    made, documents = [split(x, 2) for x in made], documents_of(reset)
    asked, written, seen, placed = made
    before = through[:, :, :-1].at[:, :, 0].set(0)  # the first is that of the initial state
    dfirst, dbounds, dwanted = walk(
        writing(placed, documents),
        asking(seen, documents),
        asking(asked, documents),
        *(answers, inverses, do),
        factors(before, documents),
        jnp.exp(through[:, :, -1, :, None]) * dfinal,
        answers=False,
        backward=True,
        keep=True,
        name="chunk_dplr_backward_walk",
        interpret=interpret,
    )
    dv = outputs(
        *(writing(written, documents), scores, wanted, do, dwanted, dbounds),
        backward=True,
        name="chunk_dplr_backward_values",
        interpret=interpret,
    )
    gradients = keys(made, documents, v, do, bounds, dbounds, rows, dwanted, interpret=interpret)
    dthrough = passed_on(bounds, dbounds, final, dfinal, dfirst, through)
    dinitial = jnp.exp(through[:, :, 0, :, None]) * dfirst
    *found, dg = back((*gradients, dthrough))
    return *found, dv, dg, dinitial
