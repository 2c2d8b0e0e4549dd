"""A decay for each channel, in a chunk of a TPU kernel: x.D.y of decays.py without a matrix D.

Among NEAR tokens, D is e^{U_i} times e^{-U_j}, U the sum of the log decays from their middle to a
token, negative in front of it: one product for all pairs. Log decays below NEAREST are it there, so
that both factors, of at most e^72, and the parts of their products stay in float32's range.

Of two neighbouring blocks of `half` tokens, second rows and first columns are joined by the decays
from the first one's tokens to its end and from the second one's start to its tokens; blocks double
from NEAR to C. Their log decays E come from those of the level before: with P the sum from a
block's start to a token, S that from behind the token to the block's end, and W = P + S of the
neighbour,

    E = P in second blocks, S in first ones;      P += W in second blocks, S += W in first ones

No exponent of those is above 0 and none is a difference. dg is what the transposed steps make of
dE = x dx (y dy in first blocks), and sums over the NEAR tokens: P, S and U are products of the log
decays with matrices of 0, 1 and -1. Terms that cancel in it, x dx - y dy of U, are each a pair's
that dg has of another token too.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import dot, dot_in_parts, parts, places

NEAR = 8  # tokens, the rows of a tile
NEAREST = -18.0  # e^-18 is less than what float32 rounds


@dataclasses.dataclass(frozen=True)
class ChannelDecay:
    """`decays.Decay` where each channel has its own: since_start, to_end [C, K]; through [K, 1].

    levels: for each of `halves`, what joins two neighbours, [C, K]. near: e^U and e^-U. together
    [C, C]: j <= i, both among the same NEAR and in one document. sums: of `near_sums`.
    """

    split: Callable
    since_start: Any
    to_end: Any
    through: Any
    levels: list
    near: tuple
    together: Any
    sums: tuple

    def pairs(self, xs, y, split) -> Generator[None, None, Any]:
        size = y.shape[0]
        up, down = self.near
        asking = split(jnp.concatenate([x * up for x in xs]))
        products = dot_in_parts(asking, split(y * down), 1, 1)
        yield
        found = [jnp.where(self.together, x, 0) for x in jnp.split(products, len(xs))]
        for half, level in zip(halves(size), self.levels, strict=True):
            asking = split(jnp.concatenate([seconds(x * level, half) for x in xs]))
            products = dot_in_parts(asking, split(y * level), 1, 1)
            yield
            mask = joined(size, half)
            found = [
                replaced(x, jnp.where(mask, part, seconds(x, half)), half)
                for x, part in zip(found, jnp.split(products, len(xs)), strict=True)
            ]
        return found

    def pairs_back(self, xs, y, pairs, dpairs) -> Generator[None, None, Any]:
        size = y.shape[0]
        i, j = places(size)
        own = [jnp.sum(jnp.where(i == j, d, 0), axis=1, keepdims=True) for d in dpairs]
        dnear, dxs, dy = yield from self._near_back(xs, y, dpairs)
        dxs = [d * y + dx for d, dx in zip(own, dxs, strict=True)]
        dy = sum((d * x for d, x in zip(own, xs, strict=True)), dy)
        dlevels = []
        for half, level in zip(halves(size), self.levels, strict=True):
            mask = joined(size, half)
            dproducts = [jnp.where(mask, seconds(d, half), 0) for d in dpairs]
            dproducts = self.split(jnp.concatenate(dproducts))
            asking = jnp.concatenate([seconds(x * level, half) for x in xs]).astype(y.dtype)
            answer = dot_in_parts(dproducts, ((y * level).astype(y.dtype),), 1, 0)
            yield
            written = firsts(dot_in_parts(dproducts, (asking,), 0, 0), half) * firsts(level, half)
            yield
            answers = [seconds(level, half) * d for d in jnp.split(answer, len(xs))]
            dxs = [
                replaced(d, seconds(d, half) + more, half)
                for d, more in zip(dxs, answers, strict=True)
            ]
            dy = replaced(firsts(dy, half) + written, seconds(dy, half), half)
            asked = sum(seconds(x, half) * d for x, d in zip(xs, answers, strict=True))
            dlevels.append(replaced(firsts(y, half) * written, asked, half))
        return dxs, dy, (dnear, dlevels)

    def _near_back(self, xs, y, dpairs) -> Generator[None, None, Any]:
        """(dU, dx of each x, dy) of the pairs among NEAR tokens, but those of a token with itself,
        which have no dU. Both terms of dU are made of the same rounded factors: what cancels is
        equal."""
        up, down = self.near
        i, j = places(y.shape[0])
        near = self.together & (i > j)
        dproducts = self.split(jnp.concatenate([jnp.where(near, d, 0) for d in dpairs]))
        asking = jnp.concatenate([x * up for x in xs]).astype(y.dtype)
        written = (y * down).astype(y.dtype)
        dasking = dot_in_parts(dproducts, (written,), 1, 0)
        yield
        dwritten = dot_in_parts(dproducts, (asking,), 0, 0)
        yield
        dnear = sum(jnp.split(asking * dasking, len(xs))) - written * dwritten
        return dnear, [up * d for d in jnp.split(dasking, len(xs))], down * dwritten

    def across(self, x, state, factor):
        return dot_in_parts(self.split(x * factor), state, 1, 0)

    def into(self, x, rows, factor):
        return dot_in_parts(self.split(x * factor), self.split(rows), 0, 0)

    def over(self, state):
        return state * self.through

    def log_gradient(self, crossing, asking, writing, carried):
        size = asking.shape[0]
        row = jnp.sum(jnp.swapaxes(self.through * carried, 0, 1), axis=0, keepdims=True)
        last = lax.broadcasted_iota(jnp.int32, asking.shape, 0) == size - 1
        dp, ds = asking + jnp.where(last, row, 0), writing
        dnear, dlevels = crossing
        for half, dlevel in zip(reversed(halves(size)), reversed(dlevels), strict=True):
            (dp1, dp2), (ds1, ds2), (one, two) = (
                (firsts(x, half), seconds(x, half)) for x in (dp, ds, dlevel)
            )
            dp = replaced(dp1 + dp2, dp2 + ds1 + two, half)
            ds = replaced(ds1 + dp2 + one, ds2 + ds1, half)
        to, behind, _ = self.sums
        both = parts(jnp.concatenate([dp + dnear, ds]), to.dtype)
        return dot_in_parts((jnp.concatenate([to, behind]),), both, 0, 0)


def of_heads(logs, marks=None, *, split: Callable, like) -> list:
    """The decay of each head from log decays [heads, C, K], and the tokens [C, 1] where a document
    begins."""
    size = logs.shape[1]
    i, j = places(size)
    together = (i >> 3 == j >> 3) & (j <= i)
    if marks is not None:
        together = together & same_document(marks, size)
    sums = near_sums(size, like)
    return [of_head(head, sums, together, split) for head in logs]


def of_head(logs, sums, together, split: Callable) -> ChannelDecay:
    """From log decays [C, K]."""
    size, like = logs.shape[0], sums[0].dtype
    both = dot_in_parts((jnp.concatenate(sums[:2]),), parts(logs, like), 1, 0)
    middle = dot_in_parts((sums[2],), parts(jnp.maximum(logs, NEAREST), like), 1, 0)
    since, until = jnp.split(both, 2)
    levels = []
    for half in halves(size):
        levels.append(jnp.exp(replaced(until, seconds(since, half), half)))
        both = since + until
        since = replaced(since, seconds(since, half) + firsts(both, half), half)
        until = replaced(firsts(until, half) + seconds(both, half), seconds(until, half), half)
    since_start = jnp.exp(since)
    return ChannelDecay(
        split,
        since_start=since_start,
        to_end=jnp.exp(until),
        through=jnp.swapaxes(since_start[-8:], 0, 1)[:, 7:],
        levels=levels,
        near=(jnp.exp(middle), jnp.exp(-middle)),
        together=together,
        sums=sums,
    )


def near_sums(size: int, like) -> tuple:
    """Matrices [C, C] of 0, 1 and -1 that make P, S and U of log decays among NEAR tokens."""
    i, j = places(size)
    same, beside, second = i >> 3 == j >> 3, i >> 2 == j >> 2, (i & 4) != 0
    to, behind = j <= i, j > i
    onwards, back = beside & second & to, beside & ~second & behind
    ones = (jnp.where(mask, 1.0, 0.0) for mask in (same & to, same & behind, onwards, back))
    since, until, plus, minus = ones
    return tuple(x.astype(like) for x in (since, until, plus - minus))


def same_document(marks, size: int):
    """[C, C]: whether i and j lie in one document; marks: [C, 1], 1 where one begins."""
    i, j = places(size)
    marks = jnp.broadcast_to(marks, (size, size)).astype(jnp.bfloat16)
    upto = jnp.where(j <= i, 1.0, 0.0).astype(jnp.bfloat16)
    return dot(upto, marks, 1, 0) == dot(marks, upto, 0, 1)


def halves(size: int) -> list[int]:
    """The blocks of the levels."""
    return [NEAR << n for n in range((size // NEAR).bit_length() - 1)]


def joined(size: int, half: int):
    """[C / 2, C], of rows in second blocks: whether j lies in the first one beside it."""
    i, j = (lax.broadcasted_iota(jnp.int32, (size // 2, size), axis) for axis in (0, 1))
    bits = half.bit_length() - 1
    return j >> bits == (i >> bits) * 2


def firsts(x, half: int):
    """The rows of first blocks of `half`."""
    return jnp.concatenate([x[n : n + half] for n in range(0, x.shape[0], 2 * half)])


def seconds(x, half: int):
    """The rows of second blocks."""
    return firsts(x[half:], half)


def replaced(first, second, half: int):
    """first, of all rows or of first blocks alone, with other rows in second blocks."""
    size = 2 * second.shape[0]
    first = firsts(first, half) if first.shape[0] == size else first
    starts = range(0, size // 2, half)
    return jnp.concatenate([x[n : n + half] for n in starts for x in (first, second)])
