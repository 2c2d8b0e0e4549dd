"""A decay for each channel, in a chunk of a TPU kernel: x.D.y of decays.py without a matrix D.

Among the tokens of a block, NEAR or more where decays are known to be slow, D is e^{U_i} times
e^{-U_j}, U the sum of the log decays from their middle to a token, negative in front of it: one
product for all pairs. Log decays below -144 / tokens, which is -18 or promised not to occur, are
that there, so that both factors, of at most e^72, and the parts of their products stay in float32's
range.

Of two neighbouring blocks of `half` tokens, second rows and first columns are joined by the decays
from the first one's tokens to its end and from the second one's start to its tokens; blocks double
from these to C. Their log decays E come from those of the level before: with P the sum from a
block's start to a token, S that from behind the token to the block's end, and W = P + S of the
neighbour,

    E = P in second blocks, S in first ones;      P += W in second blocks, S += W in first ones

No exponent of those is above 0 and none is a difference. dg is what the transposed steps make of
dE = x dx (y dy in first blocks), and sums over the near tokens: P, S and U are products of the log
decays with matrices of 0, 1 and -1. Terms that cancel in it, x dx - y dy of U, are each a pair's
that dg has of another token too.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Generator
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import dot, dot_in_parts, parts, places

NEAR = 8  # tokens, the rows of a tile: fewer cost as much
_RANGE = 144.0  # NEAR times 18: e^-18 is less than what float32 rounds


@dataclasses.dataclass(frozen=True)
class ChannelDecay:
    """`decays.Decay` where each channel has its own: since_start, to_end [C, K]; through [K, 1].

    levels: for each of `halves`, what joins two neighbours, [C, K]. near: e^U and e^-U. together
    [C, C]: j <= i, both among the same NEAR and in one document. sums: of `near_sums`.
    """

    split: Callable
    block: int
    since_start: Any
    to_end: Any
    through: Any
    levels: list
    near: tuple
    together: Any
    sums: tuple

    def pairs(self, xs, ys, split) -> Generator[None, None, Any]:
        size = ys[0].shape[0]
        up, down = self.near
        asking = split(jnp.concatenate([x * up for x in xs]))
        written = split(jnp.concatenate([y * down for y in ys]))
        products = dot_in_parts(asking, written, 1, 1)
        yield
        found = [jnp.where(self.together, x, 0) for x in jnp.split(products, len(xs))]
        for half, level in zip(halves(size, self.block), self.levels, strict=True):
            asking = split(jnp.concatenate([seconds(x * level, half) for x in xs]))
            written = split(jnp.concatenate([y * level for y in ys]))
            products = dot_in_parts(asking, written, 1, 1)
            yield
            mask = joined(size, half, len(ys))
            found = [
                replaced(x, jnp.where(mask, part, seconds(x, half)), half)
                for x, part in zip(found, jnp.split(products, len(xs)), strict=True)
            ]
        return found

    def pairs_back(self, xs, ys, pairs, dpairs) -> Generator[None, None, Any]:
        size = ys[0].shape[0]
        i, j = places(size)
        own = [
            [
                jnp.sum(jnp.where(i == j, of_y, 0), axis=1, keepdims=True)
                for of_y in apart(d, len(ys), axis=1)
            ]
            for d in dpairs
        ]
        dnear, dxs, dys = yield from self._near_back(xs, ys, dpairs)
        for n, y in enumerate(ys):
            dxs = [of_x[n] * y + dx for of_x, dx in zip(own, dxs, strict=True)]
            dys[n] = sum((of_x[n] * x for of_x, x in zip(own, xs, strict=True)), dys[n])
        dlevels = []
        for half, level in zip(halves(size, self.block), self.levels, strict=True):
            mask = joined(size, half, len(ys))
            dproducts = [jnp.where(mask, seconds(d, half), 0) for d in dpairs]
            dproducts = self.split(jnp.concatenate(dproducts))
            asking = jnp.concatenate([seconds(x * level, half) for x in xs]).astype(ys[0].dtype)
            written = jnp.concatenate([(y * level).astype(y.dtype) for y in ys])
            answer = dot_in_parts(dproducts, (written,), 1, 0)
            yield
            dwritten = apart(dot_in_parts(dproducts, (asking,), 0, 0), len(ys))
            writings = [firsts(d, half) * firsts(level, half) for d in dwritten]
            yield
            answers = [seconds(level, half) * d for d in jnp.split(answer, len(xs))]
            dxs = [
                replaced(d, seconds(d, half) + more, half)
                for d, more in zip(dxs, answers, strict=True)
            ]
            dys = [
                replaced(firsts(d, half) + more, seconds(d, half), half)
                for d, more in zip(dys, writings, strict=True)
            ]
            asked = sum(seconds(x, half) * d for x, d in zip(xs, answers, strict=True))
            given = (firsts(y, half) * d for y, d in zip(ys, writings, strict=True))
            dlevels.append(replaced(functools.reduce(operator.add, given), asked, half))
        return dxs, dys, (dnear, dlevels)

    def _near_back(self, xs, ys, dpairs) -> Generator[None, None, Any]:
        """(dU, dx of each x, dy of each y) of the pairs in a block, but those of a token
        with itself, which have no dU. Both terms of dU are made of the same rounded factors: what
        cancels is equal."""
        size = ys[0].shape[0]
        up, down = self.near
        i, j = wide_places(size, size, len(ys))
        near = self.together & (i > j)
        dproducts = self.split(jnp.concatenate([jnp.where(near, d, 0) for d in dpairs]))
        asking = jnp.concatenate([x * up for x in xs]).astype(ys[0].dtype)
        written = jnp.concatenate([(y * down).astype(y.dtype) for y in ys])
        dasking = dot_in_parts(dproducts, (written,), 1, 0)
        yield
        dwritten = dot_in_parts(dproducts, (asking,), 0, 0)
        yield
        dnear = sum(jnp.split(asking * dasking, len(xs)))
        dnear = functools.reduce(operator.sub, apart(written * dwritten, len(ys)), dnear)
        dxs = [up * d for d in jnp.split(dasking, len(xs))]
        return dnear, dxs, [down * d for d in apart(dwritten, len(ys))]

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
        backwards = reversed(halves(size, self.block)), reversed(dlevels)
        for half, dlevel in zip(*backwards, strict=True):
            (dp1, dp2), (ds1, ds2), (one, two) = (
                (firsts(x, half), seconds(x, half)) for x in (dp, ds, dlevel)
            )
            dp = replaced(dp1 + dp2, dp2 + ds1 + two, half)
            ds = replaced(ds1 + dp2 + one, ds2 + ds1, half)
        to, behind, _ = self.sums
        both = parts(jnp.concatenate([dp + dnear, ds]), to.dtype)
        return dot_in_parts((jnp.concatenate([to, behind]),), both, 0, 0)


def of_heads(
    logs, marks=None, *, split: Callable, like, count: int = 1, lowest: float | None = None
) -> list:
    """The decay of each head from log decays [heads, C, K], and the tokens [C, 1] where a document
    begins. count: of the ys of `pairs`. lowest: below all log decays; None for any."""
    size = logs.shape[1]
    block = NEAR
    while lowest is not None and block < size and 2 * block * -lowest <= _RANGE:
        block *= 2
    bits = block.bit_length() - 1
    i, j = wide_places(size, size, count)
    together = (i >> bits == j >> bits) & (j <= i)
    if marks is not None:
        together = together & same_document(marks, size, count)
    sums = near_sums(size, block, like)
    return [of_head(head, block, sums, together, split) for head in logs]


def of_head(logs, block: int, sums, together, split: Callable) -> ChannelDecay:
    """From log decays [C, K]."""
    size, like = logs.shape[0], sums[0].dtype
    both = dot_in_parts((jnp.concatenate(sums[:2]),), parts(logs, like), 1, 0)
    nearest = jnp.maximum(logs, -_RANGE / block)
    middle = dot_in_parts((sums[2],), parts(nearest, like), 1, 0)
    since, until = jnp.split(both, 2)
    levels = []
    for half in halves(size, block):
        levels.append(jnp.exp(replaced(until, seconds(since, half), half)))
        both = since + until
        since = replaced(since, seconds(since, half) + firsts(both, half), half)
        until = replaced(firsts(until, half) + seconds(both, half), seconds(until, half), half)
    since_start = jnp.exp(since)
    return ChannelDecay(
        split,
        block=block,
        since_start=since_start,
        to_end=jnp.exp(until),
        through=jnp.swapaxes(since_start[-8:], 0, 1)[:, 7:],
        levels=levels,
        near=(jnp.exp(middle), jnp.exp(-middle)),
        together=together,
        sums=sums,
    )


def near_sums(size: int, block: int, like) -> tuple:
    """Matrices [C, C] of 0, 1 and -1 that make P, S and U of log decays within blocks."""
    i, j = places(size)
    bits = block.bit_length() - 1
    same, beside = i >> bits == j >> bits, i >> (bits - 1) == j >> (bits - 1)
    second = (i & block // 2) != 0
    to, behind = j <= i, j > i
    onwards, back = beside & second & to, beside & ~second & behind
    ones = (jnp.where(mask, 1.0, 0.0) for mask in (same & to, same & behind, onwards, back))
    since, until, plus, minus = ones
    return tuple(x.astype(like) for x in (since, until, plus - minus))


def same_document(marks, size: int, count: int):
    """[C, count C]: whether i and j lie in one document; marks: [C, 1], 1 where one begins."""
    t, j = wide_places(size, size, count)
    marks = jnp.broadcast_to(marks, t.shape).astype(jnp.bfloat16)
    upto = jnp.where(t <= j, 1.0, 0.0).astype(jnp.bfloat16)
    return dot(upto[:, :size], marks, 0, 0) == dot(marks[:, :size], upto, 0, 0)


def halves(size: int, block: int) -> list[int]:
    """The blocks of the levels, the first of `block` tokens."""
    return [block << n for n in range((size // block).bit_length() - 1)]


def apart(x, count: int, axis: int = 0) -> list:
    """The `count` arrays that x has side by side."""
    return jnp.split(x, count, axis) if count > 1 else [x]


def wide_places(rows: int, size: int, count: int):
    """Row, and column within its [rows, size], of every place of `count` of these side by side."""
    i, j = (lax.broadcasted_iota(jnp.int32, (rows, count * size), axis) for axis in (0, 1))
    return i, j & (size - 1) if count > 1 else j


def joined(size: int, half: int, count: int):
    """[C / 2, count C], of rows in second blocks: whether j lies in the first one beside it."""
    i, j = wide_places(size // 2, size, count)
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
