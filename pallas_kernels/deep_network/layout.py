"""The windows of a sequence: their rows, and what `windows.coefficients` takes of them.

A window has `tokens` tokens, at most as many as a frozen chunk, and a row for each of them. When a
step learns from c > 1 pairs, the last c - 1 written pairs in front of a window are rows of its
pairs too. Rows are filled up to whole tiles with tokens that only read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.deep_memory.reference import State
from pallas_kernels.deep_network.windows import Tokens

TILE = 16  # rows of bfloat16


class Sizes(NamedTuple):
    """Of windows: tokens, rows of tokens and of pairs; number: of the windows of a sequence."""

    tokens: int
    rows: int
    pairs: int
    number: int


def sizes(length: int, context: int, frozen_chunk: int, longest: int) -> Sizes:
    """Windows of at most `longest` tokens."""
    tokens = min(frozen_chunk, length, longest)
    rows, pairs = (n + -n % TILE for n in (tokens, tokens + context - 1))
    return Sizes(tokens, rows, max(rows, pairs), -(-length // tokens))


class Layout(NamedTuple):
    """q [B, H, N S, K]; k, v [B, H, N P, ...]; tokens of windows [B, H, N]; and behind the last
    token place [B, H] and, for c > 1, the last pairs [B, H, c - 1, ...] and their number [B, H]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: Tokens
    place: jax.Array
    last: Any
    number: Any


def counted(written, first, start):
    """[B, T, H], the written tokens of a document up to each token; `start` [B, H]: of the one that
    runs on, in front of all."""
    one = written.astype(jnp.int32)
    behind = jnp.cumsum(one, axis=1)
    origin = lax.cummax(jnp.where(first, behind - one, 0), axis=1)
    running = jnp.cumsum(first, axis=1) == 0
    return behind - origin + jnp.where(running, start[:, None], 0)


def layout(q, k, v, scalars, reset, write, state: State, frozen_chunk: int, size: Sizes) -> Layout:
    """Of tokens [B, T, H, ...]; scalars: (g, m, rates); reset: bool [B, T] or None, write: bool [B,
    T, H] or None."""
    batch, length, heads = k.shape[:3]
    written = jnp.ones((batch, length, heads), bool) if write is None else write
    first = jnp.zeros_like(written)
    if reset is not None:
        first = jnp.broadcast_to(reset[..., None], first.shape)

    def split(a):
        """[B, T, H, ...] -> [B, H, N, S, ...]."""
        rest = [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, [(0, 0), (0, size.number * size.tokens - length), *rest])
        a = a.reshape(batch, size.number, size.tokens, *a.shape[2:])
        a = jnp.pad(a, [(0, 0), (0, 0), (0, size.rows - size.tokens), *rest])
        return jnp.moveaxis(a, 3, 1)

    def in_front(behind, start):
        """[B, H, N] of each window, and [B, H] behind all."""
        last = jnp.minimum(size.tokens * jnp.arange(1, size.number), length) - 1
        inner = jnp.concatenate([start[:, None], behind[:, last]], axis=1)
        return jnp.moveaxis(inner, 1, 2), behind[:, -1]

    def whole(a):
        """[B, H, N, rows, D] -> [B, H, N rows, D]."""
        return a.reshape(*a.shape[:2], -1, a.shape[-1])

    places, place = in_front(counted(written, first, state.place), state.place)
    numbers, last, number = jnp.zeros_like(places), None, None
    pairs = [split(k), split(v)]
    older = scalars[-1].shape[-1] - 1
    if older:
        numbers, number = in_front(counted(written, first, state.number), state.number)
        number = jnp.minimum(number, older)
        found = [_older(a, p, write, older, size) for a, p in ((k, state.k), (v, state.v))]
        there = jnp.arange(older, 0, -1)[:, None] <= number[:, :, None, None]
        last = [jnp.where(there, a.astype(jnp.float32), 0) for _, a in found]
        pairs = [jnp.concatenate([f, a], axis=3) for (f, _), a in zip(found, pairs, strict=True)]
        more = [(0, 0)] * 3 + [(0, max(0, size.pairs - older - size.rows)), (0, 0)]
        pairs = [jnp.pad(a, more)[:, :, :, : size.pairs] for a in pairs]
    g, m, rates = jax.tree.map(split, scalars)
    number_of_pairs = jnp.minimum(numbers, older)
    tokens = Tokens(
        g, m, rates, split(written), split(first), places % frozen_chunk, number_of_pairs
    )
    k, v = map(whole, pairs)
    return Layout(whole(split(q)), k, v, tokens, place % frozen_chunk, last, number)


def _older(a, past, write, older: int, size: Sizes):
    """The last pairs in front of each window [B, H, N, c - 1, D], and behind all [B, H, c - 1, D];
    of tokens [B, T, H, D] and what was carried in, [B, H, c - 1, D]."""
    batch, length, heads = a.shape[:3]
    line = jnp.concatenate([jnp.swapaxes(past, 1, 2).astype(a.dtype), a], axis=1)
    starts = jnp.minimum(size.tokens * jnp.arange(size.number + 1), length)
    before = jnp.broadcast_to(starts[None, :, None], (batch, size.number + 1, heads))
    places = jnp.broadcast_to(
        jnp.arange(older + length)[None, :, None], (batch, older + length, heads)
    )
    if write is not None:  # pairs by number: those in front, then the written tokens
        behind = jnp.cumsum(write, axis=1)
        order = jnp.where(write, older + behind - 1, older + length)
        put = jax.vmap(jax.vmap(lambda a, i, x: a.at[i].set(x, mode="drop"), 1, 1))
        places = put(places, order, places[:, older:])
        behind = jnp.pad(behind, [(0, 0), (1, 0), (0, 0)])
        before = jnp.take_along_axis(behind, before, axis=1)
    numbers = before[:, :, None] + jnp.arange(older)[:, None]
    index = jnp.take_along_axis(places, numbers.reshape(batch, -1, heads), axis=1)
    found = jnp.take_along_axis(line, index[..., None], axis=1)
    found = jnp.moveaxis(found.reshape(batch, -1, older, heads, a.shape[-1]), 3, 1)
    return found[:, :, :-1], found[:, :, -1]
