"""Diagonal plus low rank on Hopper, forward, in three kernels, for slow decays.

    M = (I - A^ B^^T)^-1,  P = A^ K^^T, both j < i
    R = M (P V + A^ S)
    O = Q^ S + (Q^ K^^T) V + (Q^ B^^T) R, j <= i
    S <- e^{..} . (S + K^^T V + B^^T R)

The letters are those of tpu.py; a chunk is 64 tokens. With U the sums of log decays from a chunk's
middle to its tokens, negative in front of it, Q^ is scale Q e^U, K^ is K e^-U and B^ is B e^-U; A^
has e^U of the token in front. Where no log decay is below LEAST they grow to e^36, and pairs of a
kind are one product. S is decayed to the middle of the chunk, and e^{..} is from there to the next.

`weights` makes M and the pairs, a warpgroup for each chunk and head; the walk is that of
`chunk_delta` with decays of each channel; `outputs` has a warpgroup for each chunk and 64 columns
of V. Time reversed the rule is itself, with k for q, b for a: walk and `outputs` also run against
time (gpu_vjp.py). Pairs of two documents are masked; the arrays that the state is read and written
by then have rows of zeros. All factors have two parts. Bytes a token and head, each written and
read: 16 K for the arrays with decays, 1024 for the matrices, 4 K V / C + 4 V for S and R.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.chunk_delta.gpu import inverse_of
from pallas_kernels.chunk_delta.gpu_channel import walk
from pallas_kernels.chunk_dplr.api import LEAST
from pallas_kernels.mosaic import (
    HALF,
    NUMBERS,
    SIDE,
    WIDE,
    copy_in,
    dots,
    halves,
    in_pairs,
    in_parts,
    put,
    span,
    store,
    tile,
)
from pallas_kernels.mosaic_channels import split

# ---------------------------------------------------------------- around the kernels


def operands(q, k, a, b, g, reset, scale):
    """Q^, K^, A^ and B^, float32 [B, T, H, K], and the log decays from each chunk's middle to the
    next one's, the first from the start of the sequence, the last to its end, [B, H, N + 1, K]."""
    batch, _, heads, width = g.shape
    g = jnp.where(g < LEAST, LEAST, g)
    if reset is not None:
        g = jnp.where(reset[..., None, None], 0, g)
    chunks = g.reshape(batch, -1, SIDE, heads, width)
    i, j = jnp.indices((SIDE, SIDE))
    late = j >= SIDE // 2
    signs = jnp.where(late & (j <= i), 1.0, 0.0) - jnp.where(~late & (j > i), 1.0, 0.0)
    upto = jnp.einsum("ts,bnshk->bnthk", signs, chunks, precision=lax.Precision.HIGHEST)
    before = upto - chunks
    edge = jnp.zeros((batch, 1, heads, width))
    first, last = -before[:, :, 0], upto[:, :, -1]
    through = jnp.concatenate([first, edge], 1) + jnp.concatenate([edge, last], 1)
    q, k, a, b = (jnp.repeat(x.astype(WIDE), heads // x.shape[2], axis=2) for x in (q, k, a, b))
    upto, before = (x.reshape(g.shape) for x in (upto, before))
    down = jnp.exp(-upto)
    made = scale * q * jnp.exp(upto), k * down, a * jnp.exp(before), b * down
    return *made, jnp.moveaxis(through, 2, 1)


def documents_of(reset):
    """Of every token the number of its document in its chunk, float32 [B, N, C]; None of None."""
    if reset is None:
        return None
    return jnp.cumsum(reset.reshape(len(reset), -1, SIDE), axis=-1).astype(WIDE)


def asking(x, documents):
    """Rows [B, T, ..] of zeros where a document began in the chunk: they do not see its state."""
    return x if documents is None else _kept(x, documents == 0)


def writing(x, documents):
    """Rows of zeros where another document ends the chunk."""
    return x if documents is None else _kept(x, documents == documents[..., -1:])


def _kept(x, where):
    return jnp.where(where.reshape(*x.shape[:2], 1, 1), x, jnp.zeros_like(x))


def factors(through, documents):
    """What `walk` multiplies the rows of S by, [B, H, N, 2, K]: before a chunk's tokens are added
    by 1, or 0 where another document ends it, then by the decay. through: its log, [B, H, N, K].
    """
    before = jnp.ones_like(through)
    if documents is not None:
        before = before * (documents[:, None, :, -1:] == 0)
    return jnp.stack([before, jnp.exp(through)], axis=3)


# ---------------------------------------------------------------- in a kernel


def lower(x, documents):
    """x [C, C] where j <= i and both are in one document, zero elsewhere."""
    i, j = mosaic.places(SIDE)
    together = i >= j
    if documents is not None:
        of_i, of_j = (make(documents, x.shape) for make in (mosaic.of_rows, mosaic.of_columns))
        together = together & (of_i == of_j)
    return jnp.where(together, x, 0.0)


def strictly(x, documents):
    """The same where j < i."""
    i, j = mosaic.places(SIDE)
    return jnp.where(i == j, 0.0, lower(x, documents))


def copies(source, place, tiles):
    """Those of both parts of an array [B, .., 2 H, ..] to two tiles. place: that of the first."""
    row, where, head, *others = place
    heads = source.shape[2] // 2
    there = [source.at[row, where, part * heads + head, *others] for part in range(2)]
    return zip(there, halves(tiles), strict=True)


# ---------------------------------------------------------------- kernels


def weights(asked, written, seen, placed, documents, *, interpret):
    """[Q^ K^^T, Q^ B^^T, P and M of every chunk, [B, H, N, 2, C, C]]. asked, written, seen, placed:
    Q^, K^, A^ and B^, [B, T, 2 H, K]; all in parts. documents: [B, N, C] or None."""
    batch, length, twice, width = asked.shape
    heads, chunks = twice // 2, length // SIDE

    def body(x):
        chunk, head, row = (lax.axis_index(axis) for axis in ("chunk", "head", "batch"))
        asked, seen, written, placed = in_pairs(x.tiles, 4)

        def fetch(n, slot):
            place = row, span(chunk), head, span(n)
            sources = x.asked, x.seen, x.written, x.placed
            for source, parts in zip(sources, in_pairs(x.tiles, 4), strict=True):
                copy_in(x.arrived.at[slot], *copies(source, place, parts))

        def use(slot, *sums):
            each = [(a, b) for a in (asked, seen) for b in (written, placed)]
            for found, (a, b) in zip(sums, each, strict=True):
                for one, other in in_parts(halves(a), halves(b, turn=True)):
                    plgpu.wgmma(found, one, other)

        if documents is not None:
            copy_in(x.ready, (x.documents.at[row, chunk], x.document))
        scores, answers, wanted, removed = mosaic.sums_over(
            width // SIDE, 1, x.arrived, fetch, use, 4
        )
        if documents is not None:
            plgpu.barrier_wait(x.ready)
        made = lower(scores, x.document), lower(answers, x.document), strictly(wanted, x.document)
        pairs, (found,), work = in_pairs(x.tiles, 3), in_pairs(x.tiles.at[6:], 1), x.tiles.at[8:]
        for parts, of_pairs in zip(pairs, made, strict=True):
            put(parts, of_pairs)
        plgpu.commit_smem()
        for parts, there in zip(pairs, (x.scores, x.answers, x.wanted), strict=True):
            plgpu.copy_smem_to_gmem(parts, there.at[row, head, chunk])
        removed = -strictly(removed, x.document)
        put(found, inverse_of(SimpleNamespace(work=work, found=found), removed))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(found, x.inverses.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    made = jax.ShapeDtypeStruct((batch, heads, chunks, 2, SIDE, SIDE), HALF)
    return mosaic.run(
        body,
        {
            "asked": asked,
            "written": written,
            "seen": seen,
            "placed": placed,
            "documents": documents,
        },
        dict.fromkeys(("scores", "answers", "wanted", "inverses"), made),
        {
            "tiles": tile(12),
            "document": None if documents is None else NUMBERS,
            "arrived": plgpu.Barrier(num_arrivals=8, num_barriers=1),
            "ready": None if documents is None else plgpu.Barrier(num_arrivals=1),
        },
        name="chunk_dplr_forward_weights",
        grid={"chunk": chunks, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def outputs(x, first, second, single, parts, bounds, *, backward, name, interpret):
    """X S + F V + G R of each chunk, [B, T, H, V]; of the transposes of F and G where backward.

    x: X, [B, T, 2 H, K]; first, second: F and G, [B, H, N, 2, C, C]; parts: R, [B, T, 2 H, V];
    bounds: S, [B, N, 2 H, K, V]; all five in parts. single: V, [B, T, H, V].
    """
    batch, length, heads, size = single.shape
    width, chunks, across = x.shape[-1], length // SIDE, size // SIDE

    def body(x):
        part, head, row = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        chunk, columns = lax.div(part, across), span(lax.rem(part, across))
        queries, state, first, second, rows = in_pairs(x.tiles, 5)

        def fetch(n, slot):
            copy_in(
                x.arrived.at[slot],
                *copies(x.x, (row, span(chunk), head, span(n)), queries),
                *copies(x.bounds, (row, chunk, head, span(n), columns), state),
            )

        def use(slot, found):
            for a, b in in_parts(halves(queries), halves(state)):
                plgpu.wgmma(found, a, b)

        there = row, span(chunk), head, columns
        copy_in(
            x.ready,
            (x.first.at[row, head, chunk], first),
            (x.second.at[row, head, chunk], second),
            (x.single.at[there], x.given),
            *copies(x.parts, there, rows),
        )
        (read,) = mosaic.sums_over(width // SIDE, 1, x.arrived, fetch, use, 1)
        plgpu.barrier_wait(x.ready)
        single = [(a, x.given) for a in halves(first, turn=backward)]
        (answer,) = dots([*single, *in_parts(halves(second, turn=backward), halves(rows))])
        store(x.given, read + answer)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.given, x.made.at[there])
        plgpu.wait_smem_to_gmem(0)

    given = {"x": x, "first": first, "second": second, "single": single, "parts": parts}
    (made,) = mosaic.run(
        body,
        given | {"bounds": bounds},
        {"made": jax.ShapeDtypeStruct(single.shape, single.dtype)},
        {
            "tiles": tile(10),
            "given": tile(),
            "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=1),
            "ready": plgpu.Barrier(num_arrivals=5),
        },
        name=name,
        grid={"tile": chunks * across, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )
    return made


def forward(q, k, a, b, v, decaying, initial, *, scale, lowest, chunk, heads, keep, interpret):
    """(o, final state[, the four of `weights`, S in front of the chunks, R, the final state]).

    T must be a multiple of chunk, which is 64. decaying: g, and reset or None; lowest: at least
    LEAST.
    """
    g, reset = decaying
    *made, through = operands(q, k, a, b, g, reset, scale)
    asked, written, seen, placed = (split(x, 2) for x in made)
    documents = documents_of(reset)
    scores, answers, wanted, inverses = weights(
        asked, written, seen, placed, documents, interpret=interpret
    )
    final, bounds, rows = walk(
        asking(seen, documents),
        writing(placed, documents),
        writing(written, documents),
        *(wanted, inverses, v),
        factors(through[:, :, 1:], documents),
        jnp.exp(through[:, :, 0, :, None]) * initial,
        answers=False,
        backward=False,
        keep=True,
        name="chunk_dplr_forward_walk",
        interpret=interpret,
    )
    o = outputs(
        *(asking(asked, documents), scores, answers, v, rows, bounds),
        backward=False,
        name="chunk_dplr_forward_outputs",
        interpret=interpret,
    )
    kept = (scores, answers, wanted, inverses, bounds, rows, final)
    return o, final, *(kept if keep else ())
