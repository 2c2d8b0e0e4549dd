"""The rows that kernels walk over, and what each of them learns from.

A token is a row. When a step learns from c > 1 pairs, the c - 1 pairs in front of it have to be in
its tile, with their errors at its own base, W_b. They are rows once more, without a query and
without a step of their own: in front of every tile, and of every token that opens a frozen chunk.
A tile of `rows` rows has `tokens` tokens, behind so many of those rows that all fit, whatever
documents and masks are; frozen chunks lie in it as they come.

The base of a row is one of four: the weights behind a row of the same tile, OPENED at the tile's
start, the base that was CARRIED into the tile, or FRESH, that of a document that begins in it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

OPENED, CARRIED, FRESH = -1, -2, -3  # instead of the number of a row


class Layout(NamedTuple):
    """Integers and masks for h of 1 or H heads. Where tokens are rows, source and slot are None.

    base: [B, R, h], the row in its tile behind which the row's base stands, or one of the four.
    use: [B, R, h], tokens that are written. first: [B, R, h], tokens where a document begins.
    asking, paired: [B, R, h], numbers whose difference is how many pairs a row lies behind another
    one, negative or above 2^11 where it does not learn from it; None for c = 1.
    source: [B, R, h], the place of each row in [c - 1 pairs in front | tokens | zero].
    own: [B, R, h], whether the row is a token. slot: [B, T, h], the row of each token.
    kept: [B, c - 1, h], the places of the last pairs; there: [B, h], their number; None for c = 1.
    place: [B, h], written tokens of the frozen chunk that runs on.
    """

    base: jax.Array
    use: jax.Array
    first: jax.Array
    place: jax.Array
    asking: jax.Array | None = None
    paired: jax.Array | None = None
    source: jax.Array | None = None
    own: jax.Array | None = None
    slot: jax.Array | None = None
    kept: jax.Array | None = None
    there: jax.Array | None = None


class Tokens(NamedTuple):
    """Of the tokens [B, T, h]: before, the number of those written in front of each; rank, that of
    the pairs of its document in front; written; first, where a document begins; opening, where a
    frozen chunk does, but not that of a document's first tokens."""

    before: jax.Array
    rank: jax.Array
    written: jax.Array
    first: jax.Array
    opening: jax.Array


def tokens_of(reset, write, place, number, shape, frozen_chunk: int) -> tuple[Tokens, jax.Array]:
    """(tokens, place behind the last one)."""
    written = jnp.ones(shape, bool) if write is None else jnp.broadcast_to(write, shape)
    first = jnp.zeros(shape, bool)
    if reset is not None:
        first = jnp.broadcast_to(reset[..., None], shape)
    one = written.astype(jnp.int32)
    behind = jnp.cumsum(one, axis=1)
    count = behind - one
    running = jnp.cumsum(first, axis=1) == 0
    origin = lax.cummax(jnp.where(first, count, 0), axis=1)
    phase = count - origin + jnp.where(running, place[:, None], 0)
    rank = count - origin + jnp.where(running, number[:, None], 0)
    opening = written & (phase % frozen_chunk == 0) & (running | (phase > 0))
    after = (phase[:, -1] + one[:, -1]) % frozen_chunk
    return Tokens(count, rank, written, first, opening), after


def tokens_in(rows: int, context: int, frozen_chunk: int) -> int:
    """The most tokens of a tile, 0 where it is too short."""
    older, tokens = context - 1, rows
    while tokens > 0 and tokens + older * (1 + -(-tokens // frozen_chunk)) > rows:
        tokens -= 1
    return tokens


def layout(reset, write, place, number, shape, *, frozen_chunk, context, rows: int) -> Layout:
    """Of T tokens in tiles of `rows` rows.

    reset: bool [B, T] or None. write: bool [B, T, h] or None. place, number: int32 [B, h]. shape:
    (B, T, h). `tokens_in` must not be 0.
    """
    tokens, after = tokens_of(reset, write, place, number, shape, frozen_chunk)
    older = context - 1
    per_tile = tokens_in(rows, context, frozen_chunk)

    def tiled(a):
        pad = -shape[1] % per_tile
        a = jnp.pad(a, [(0, 0), (0, pad), (0, 0)])
        return a.reshape(shape[0], -1, per_tile, shape[2])

    first, opening = tiled(tokens.first), tiled(tokens.opening)
    place_of = lax.broadcasted_iota(jnp.int32, first.shape, 2)
    if older:
        place_of = older + place_of + older * jnp.cumsum(opening, axis=2)
    event = 2 * (place_of - older) + 1  # odd where a frozen chunk opens, even where a document does
    event = jnp.where(first & ~opening, event - 1, jnp.where(opening, event, -1))
    latest = lax.cummax(event, axis=2)
    base = jnp.where(latest % 2 == 1, (latest >> 1) - 1, FRESH)
    base = jnp.where(latest < 0, CARRIED, base)
    if not older:
        flat = [a.reshape(shape[0], -1, shape[2]) for a in (base, tiled(tokens.written), first)]
        return Layout(flat[0], flat[1], flat[2], after)
    return _with_pairs(tokens, after, base, place_of, tiled, number, older, rows)


def _with_pairs(tokens, after, base, place_of, tiled, number, older, rows) -> Layout:
    """The layout with rows of older pairs."""
    batch, length, heads = tokens.before.shape
    total = older + length
    places = jnp.broadcast_to(jnp.arange(total)[None, :, None], (batch, total, heads))
    # by number: the pairs in front, then the written tokens
    order = jnp.where(tokens.written, older + tokens.before, total)
    put = jax.vmap(jax.vmap(lambda a, i, x: a.at[i].set(x, mode="drop"), 1, 1))
    pairs = put(places, order, places[:, older:])

    def found(number_of, there):
        """The places of pairs by number, the zero behind all where there is none."""
        index = jnp.clip(number_of, 0, total - 1)
        return jnp.where(there, jnp.take_along_axis(pairs, index, axis=1), total)

    # the token of each row, or that which it stands in front of
    row = jnp.arange(rows)
    upto = jnp.sum(place_of[:, :, None] <= row[:, None, None], axis=3)  # [B, N, rows, h]
    per_tile = place_of.shape[2]
    last = jnp.maximum(upto - 1, 0)
    own = (upto > 0) & (jnp.take_along_axis(place_of, last, axis=2) == row[:, None])
    owner = jnp.where(own, upto - 1, upto)
    in_front = owner < per_tile
    owner = jnp.minimum(owner, per_tile - 1)
    gap = jnp.take_along_axis(place_of, owner, axis=2) - row[:, None]

    def of_owner(a):
        return jnp.take_along_axis(tiled(a), owner, axis=2)

    ahead = jnp.where(own, 0, jnp.where(row[:, None] < older, older - row[:, None], gap))
    count, rank = of_owner(tokens.before), of_owner(tokens.rank)
    number_of, use = older + count - ahead, own & of_owner(tokens.written)
    in_front = in_front & ((row[:, None] >= older) | ~of_owner(tokens.opening))
    older_pair = ~own & in_front & (ahead <= jnp.minimum(rank, older))
    flat = lambda a: a.reshape(batch, -1, heads)  # noqa: E731
    source = found(flat(number_of), flat(older_pair))
    numbers = lax.broadcasted_iota(jnp.int32, own.shape, 1) * per_tile + owner + older
    source = jnp.where(flat(own & (numbers < total)), flat(numbers), source)
    # rows in front of a chunk are of its segment, as are its tokens
    opens = tiled(tokens.opening | tokens.first)
    segment = jnp.take_along_axis(jnp.cumsum(opens, axis=2), owner, axis=2)
    asking = (segment << 12) + count - ahead - tiled(tokens.before)[:, :, :1]
    slot = place_of + rows * lax.broadcasted_iota(jnp.int32, place_of.shape, 1)
    end = tokens.before[:, -1] + tokens.written[:, -1]
    there = jnp.minimum(tokens.rank[:, -1] + tokens.written[:, -1], older)
    back = jnp.arange(older, 0, -1)[None, :, None]
    return Layout(
        base=flat(jnp.take_along_axis(base, owner, axis=2)),
        use=flat(use),
        first=flat(own & of_owner(tokens.first)),
        asking=flat(asking),
        paired=flat(jnp.where(use | older_pair, asking, 1 << 20)),
        source=source,
        own=flat(own & (numbers < total)),
        slot=flat(slot)[:, :length],
        kept=found(older + end[:, None] - back, back <= there[:, None]),
        there=there,
        place=after,
    )
