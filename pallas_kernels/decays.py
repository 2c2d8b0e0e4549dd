"""Decays of a chunk as the TPU kernels take them: none, one for each head, or one for each channel.

With x.D.y the matrix sum_d x_i[d] e^{G_i - G_j}[d] y_j[d], j <= i, and zero above its diagonal, G
the sum of the log decays since the chunk's start. No exponent is above 0: masks come before exp.

A decay for each head has sums G in two numbers (`log_decay_sums`), and D is one matrix.

A decay for each channel has no such matrix. Two neighbouring blocks of `half` tokens are joined by
the decays from the first one's tokens to its end and from the second one's start to its tokens;
blocks double from 1 to C. Their log decays E come from those of the level before: with P the sum
from a block's start to a token, S that from behind the token to the block's end, and W = P + S of
the neighbour,

    E = P in second blocks, S in first ones;      P += W in second blocks, S += W in first ones

dg is what the transposed steps make of dE = x dx (y dy in first blocks): additions alone, so that
no terms cancel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Static, by_token
from pallas_kernels.products import dot, dot_in_parts, parts, places, turned

LOWEST = -1e4  # log decays below it are it: exp is zero there, and its sums stay exact
_RESET = 2.0**14  # subtracted from the log decay of a document's first token
NEAR = 8  # tokens
NEAREST = -18.0  # between near tokens log decays below it are it: e^-18 is below what float32 rounds
CHANNEL_LOWEST = -100.0  # that of decays by channel on GPUs, whose sums have one part


def arrays(g, reset, static) -> tuple:
    """What a kernel reads: () without decay; the sums' columns and rows for each head; for each
    channel the sums on GPUs, on TPUs g [B, T, H, K] and, with reset, the tokens where a document
    begins as columns [B, N, C, 1]."""
    if g is None or g.ndim == 3:
        return log_decay_sums(g, reset, static)
    if static.platform == "gpu":
        return (channel_log_decay_sums(g, reset, static),)
    if reset is None:
        return (g,)
    batch, length = reset.shape
    return g, reset.astype(jnp.float32).reshape(batch, length // static.chunk, static.chunk, 1)


def log_decay_sums(g, reset, static: Static):
    """Sums of log decays since the start of each token's chunk, as columns [B, G, N, C, 2 heads]
    and as rows [B, G, N, 2 heads, C] of G groups of heads.

    g: [B, T, H] float32; None gives (). reset: bool [B, T] or None; it acts as a decay to nothing.

    A sum has two numbers, of whole parts and of the rest, heads of the first before heads of the
    second: whole numbers add without error, so that the difference of two sums is as exact after a
    strong decay, or a reset, as elsewhere.
    """
    if g is None:
        return ()
    chunk, heads = static.chunk, static.heads
    batch, length, count = g.shape
    g = jnp.maximum(g, LOWEST)
    whole = jnp.round(g)
    both = jnp.stack([whole - (0 if reset is None else _RESET * reset[..., None]), g - whole])
    both = both.reshape(2, batch, length // chunk, chunk, count // heads, heads)
    last = jnp.tril(jnp.ones((chunk, chunk), jnp.float32))
    sums = [
        jnp.einsum(f"ij,pbnjgh->bgn{axes}", last, both, precision=lax.Precision.HIGHEST)
        for axes in ("iph", "phi")
    ]
    shape = (batch, count // heads, length // chunk)
    return sums[0].reshape(*shape, chunk, 2 * heads), sums[1].reshape(*shape, 2 * heads, chunk)


def channel_log_decay_sums(g, reset, static: Static):
    """Sums of log decays by channel since the start of each token's chunk, [B, T, H, K]. A reset is
    a decay of e^-100, which is zero in float32 beside anything."""
    batch, length, *axes = g.shape
    g = jnp.maximum(g, CHANNEL_LOWEST)
    g = g if reset is None else jnp.where(reset[..., None, None], CHANNEL_LOWEST, g)
    chunks = g.reshape(batch, -1, static.chunk, *axes)
    last = jnp.tril(jnp.ones((static.chunk, static.chunk), jnp.float32))
    sums = jnp.einsum("ts,bnshk->bnthk", last, chunks, precision=lax.Precision.HIGHEST)
    return sums.reshape(g.shape)


def clipped(dg, g, reset, platform: str):
    """The gradient of g from what kernels write: columns of heads, or dg itself; none where g, or a
    reset, is taken for a decay to nothing."""
    if g is None:
        return None
    if g.ndim == 3:
        return jnp.where(g < LOWEST, 0, by_token(dg))
    if platform == "tpu":  # its terms are zero there
        return dg
    dg = jnp.where(g < CHANNEL_LOWEST, 0, dg)
    return dg if reset is None else jnp.where(reset[..., None, None], 0, dg)


def specs(arrays, blocks) -> tuple:
    """Blocks of `arrays`."""
    if not arrays:
        return ()
    if arrays[0].ndim == 4:
        first = blocks.tokens(arrays[0].shape[-1])
        return (first, blocks.marks()) if arrays[1:] else (first,)
    return blocks.columns(), blocks.rows()


def gradient_specs(arrays, blocks) -> tuple:
    """The block of dg, if any: columns of heads, or tokens."""
    if not arrays:
        return ()
    by_channel = arrays[0].ndim == 4
    return (blocks.tokens(arrays[0].shape[-1]) if by_channel else blocks.columns(1),)


def gradient_shapes(arrays) -> tuple:
    """The shape of dg, if any."""
    if not arrays:
        return ()
    shape = arrays[0].shape
    return (shape if len(shape) == 4 else (*shape[:-1], shape[-1] // 2),)


def of_heads(values, heads: int, split: Callable, like) -> list:
    """The decay of each head from the blocks of `arrays`.

    split: what makes `parts` of a float32 factor: its precision.
    """
    if not values:
        return iter([Decay(split)] * heads)
    if values[0].ndim == 3:
        given = turned(values[0])
        size = given.shape[1]
        i, j = places(size)
        together = (i >> 3 == j >> 3) & (j <= i)
        logs = jnp.maximum(given, LOWEST)
        if values[1:]:
            logs = jnp.where(values[1] > 0, LOWEST, logs)
            together = together & documents(values[1], size)
        near, sums = jnp.maximum(given, NEAREST), near_sums(size, like)
        return (
            by_channel(logs[head], near[head], split, sums, together) for head in range(heads)
        )
    return (by_head(values, head, heads, split) for head in range(heads))


def stacked(gradients: list, like):
    """The block of dg from `log_gradient` of all heads."""
    if isinstance(gradients[0], tuple):
        return log_decay_gradient(*zip(*gradients, strict=True), like=like)
    return turned(jnp.stack(gradients))


def log_decay_gradient(products, asking, writing, carrying, *, like):
    """dg of a chunk, [C, heads], from what each head has of it.

        dg_t = sum_{j < t <= i} products_ij + sum_{i >= t} asking_i + sum_{j < t} writing_j
               + carrying

    products [C, C]; asking, writing [C, 1]; carrying [1, 1]; like: of the op. No two
    terms cancel: as differences of two cumulative sums they would lose what a strong decay leaves.
    """
    i, j = places(products[0].shape[0])
    onwards, before = (jnp.where(mask, 1.0, 0.0) for mask in (j >= i, j < i))
    crossing = []
    for array in products:
        later = dot_in_parts((onwards.astype(like),), parts(array, like), 1, 0)
        crossing.append(jnp.sum(jnp.where(j < i, later, 0), 1, keepdims=True))
    beside = [jnp.concatenate(x, axis=1) for x in (crossing, asking, writing, carrying)]
    return beside[0] + dot(onwards, beside[1], 1, 0) + dot(before, beside[2], 1, 0) + beside[3]


def times(x, factor):
    """x times what may be None for 1."""
    return x if factor is None else x * factor


@dataclasses.dataclass(frozen=True)
class Decay:
    """Of one head in one chunk: one for all channels, or none.

    since_start [C, 1] from the chunk's start to a token, that included; to_end [C, 1] from behind
    a token; through [1, 1] over the chunk; between [C, C], zero where j > i. None is 1.
    """

    split: Callable
    since_start: Any = None
    to_end: Any = None
    through: Any = None
    between: Any = None

    def pairs(self, xs, y, split) -> list:
        """x.D.y for each x [C, K]; y [C, K]; split: of the factors, where they are not exact."""
        products = dot(jnp.concatenate(xs), y, 1, 1)
        yield
        return [self._lower(x) for x in jnp.split(products, len(xs))]

    def _lower(self, x):
        if self.between is not None:
            return x * self.between
        i, j = places(x.shape[0])
        return jnp.where(i >= j, x, 0)

    def pairs_back(self, xs, y, pairs, dpairs) -> tuple:
        """(dx of each x, dy, what `log_gradient` needs) from what `pairs` gave and its gradients,
        which need not be masked."""
        crossing = sum(d * x for d, x in zip(dpairs, pairs, strict=True))
        yield
        dpairs = [self.split(self._lower(d)) for d in dpairs]
        dxs = [dot_in_parts(d, (y,), 1, 0) for d in dpairs]
        dy = sum(dot(d[0], x, 0, 0) for d, x in zip(dpairs, xs, strict=True))
        return dxs, dy, crossing

    def across(self, x, state, factor):
        """(x factor) S [C, V]; x [C, K], S [K, V] in parts; factor: since_start or to_end."""
        return times(dot_in_parts((x,), state, 1, 0), factor)

    def into(self, x, rows, factor):
        """(x factor)^T rows [K, V]; rows [C, V] float32, or exact."""
        return dot_in_parts((x,), self.split(times(rows, factor)), 0, 0)

    def over(self, state):
        """S behind the chunk of what was in front of it."""
        return times(state, self.through)

    def log_gradient(self, crossing, asking, writing, carried):
        """What `stacked` takes for dg: crossing from `pairs_back`; asking, writing [C, K]: x dx of
        what is scaled by since_start and by to_end; carried [K, V]: the state times the gradient
        of that behind the chunk."""
        asking, writing = (jnp.sum(x, axis=1, keepdims=True) for x in (asking, writing))
        return crossing, asking, writing, jnp.sum(self.through * carried, keepdims=True)


def by_head(sums, head: int, heads: int, split: Callable) -> Decay:
    """From the sums of a chunk: columns [C, 2 heads] and rows [2 heads, C]."""
    columns, rows = sums
    whole, part = (columns[:, i : i + 1] for i in (head, heads + head))
    whole_row, part_row = (rows[i : i + 1] for i in (head, heads + head))
    exponent = (whole - whole_row) + (part - part_row)
    i, j = places(exponent.shape[0])
    return Decay(
        split,
        since_start=jnp.exp(whole + part),
        to_end=jnp.exp((whole[-1:] - whole) + (part[-1:] - part)),
        through=jnp.exp(whole[-1:] + part[-1:]),
        between=jnp.exp(jnp.where(i >= j, exponent, -jnp.inf)),
    )


# ---------------------------------------------------------------- one for each channel


@dataclasses.dataclass(frozen=True)
class ChannelDecay:
    """The same where each channel has its own: since_start, to_end [C, K]; through [K, 1]; levels:
    of blocks of NEAR, 2 NEAR ... C / 2 tokens, what joins two neighbours, [C, K]; near [C, K]: from
    the middle of a token's NEAR ones to it, and from it to the middle; together [C, C]: j <= i, both
    among the same NEAR and in one document; sums: of `near_sums`."""

    split: Callable
    since_start: Any
    to_end: Any
    through: Any
    levels: list
    near: tuple
    together: Any
    sums: Any

    def pairs(self, xs, y, split) -> list:
        size = y.shape[0]
        up, down = self.near
        beside = split(jnp.concatenate([x * up for x in xs]))
        products = dot_in_parts(beside, split(y * down), 1, 1)
        yield
        found = [jnp.where(self.together, x, 0) for x in jnp.split(products, len(xs))]
        for half, level in zip(halves(size), self.levels, strict=True):
            seconds = split(jnp.concatenate([second(x * level, half) for x in xs]))
            products = dot_in_parts(seconds, split(y * level), 1, 1)
            yield
            found = [
                changed(x, jnp.where(joined(size, half), part, second(x, half)), half)
                for x, part in zip(found, jnp.split(products, len(xs)), strict=True)
            ]
        return found

    def pairs_back(self, xs, y, pairs, dpairs) -> tuple:
        size, count = y.shape[0], len(xs)
        i, j = places(size)
        own = [jnp.sum(jnp.where(i == j, d, 0), axis=1, keepdims=True) for d in dpairs]
        dxs = [d * y for d in own]
        dy = sum(d * x for d, x in zip(own, xs, strict=True))
        up, down = self.near
        beside = jnp.concatenate([jnp.where(self.together & (i > j), d, 0) for d in dpairs])
        beside = self.split(beside)
        after = jnp.concatenate([x * up for x in xs]).astype(y.dtype)
        before = (y * down).astype(y.dtype)
        dafter = dot_in_parts(beside, (before,), 1, 0)
        yield
        dbefore = dot_in_parts(beside, (after,), 0, 0)
        yield
        dnear = sum(jnp.split(after * dafter, count)) - before * dbefore
        dxs = [d + up * x for d, x in zip(dxs, jnp.split(dafter, count), strict=True)]
        dy = dy + down * dbefore
        dlevels = []
        for half, level in zip(halves(size), self.levels, strict=True):
            mask = joined(size, half)
            dproducts = [jnp.where(mask, second(d, half), 0) for d in dpairs]
            dproducts = self.split(jnp.concatenate(dproducts))
            seconds = [second(x * level, half) for x in xs]
            after = jnp.concatenate(seconds).astype(y.dtype)
            dafter = dot_in_parts(dproducts, ((y * level).astype(y.dtype),), 1, 0)
            yield
            dbefore = level * dot_in_parts(dproducts, (after,), 0, 0)
            yield
            factor = second(level, half)
            dseconds = [factor * d for d in jnp.split(dafter, count)]
            dxs = [
                changed(d, second(d, half) + more, half)
                for d, more in zip(dxs, dseconds, strict=True)
            ]
            dy = dy + dbefore
            asked = sum(second(x, half) * d for x, d in zip(xs, dseconds, strict=True))
            dlevels.append(changed(y * dbefore, asked, half))
        return dxs, dy, (dnear, dlevels)

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
        for half, dlevel in reversed(list(zip(halves(size), dlevels, strict=True))):
            dps, dss = [], []
            for n in range(0, size, 2 * half):
                one, two = slice(n, n + half), slice(n + half, n + 2 * half)
                dps += [dp[one] + dp[two], dp[two] + ds[one] + dlevel[two]]
                dss += [ds[one] + dp[two] + dlevel[one], ds[two] + ds[one]]
            dp, ds = jnp.concatenate(dps), jnp.concatenate(dss)
        return near_gradient(self.sums, dp + dnear, ds)


def near_sums(size: int, like):
    """Matrices [C, C] of sums of a token's neighbours among NEAR: up to it, behind it, and from the middle to
    it, those before the middle negative."""
    i, j = places(size)
    same, half = i >> 3 == j >> 3, i >> 2 == j >> 2
    second = (i & 4) != 0
    middle = jnp.where(half & second & (j <= i), 1.0, 0.0) - jnp.where(
        half & ~second & (j > i), 1.0, 0.0
    )
    to, behind = (jnp.where(same & mask, 1.0, 0.0) for mask in (j <= i, j > i))
    return tuple(x.astype(like) for x in (to, behind, middle))


def near_gradient(sums, dp, ds):
    like = sums[0].dtype
    to, behind, _ = sums
    both = parts(jnp.concatenate([dp, ds]), like)
    return dot_in_parts((jnp.concatenate([to, behind]),), both, 0, 0)


def by_channel(logs, near, split: Callable, sums, together) -> ChannelDecay:
    """From log decays [C, K], none below LOWEST."""
    size = logs.shape[0]
    like = sums[0].dtype
    both = dot_in_parts((jnp.concatenate(sums[:2]),), parts(logs, like), 1, 0)
    since, until = jnp.split(both, 2)
    middle = dot_in_parts((sums[2],), parts(near, like), 1, 0)
    levels = []
    for half in halves(size):
        levels.append(jnp.exp(changed(until, second(since, half), half)))
        both = since + until
        sinces, untils = [], []
        for n in range(0, size, 2 * half):
            one, two = slice(n, n + half), slice(n + half, n + 2 * half)
            sinces += [since[one], since[two] + both[one]]
            untils += [until[one] + both[two], until[two]]
        since, until = jnp.concatenate(sinces), jnp.concatenate(untils)
    since_start = jnp.exp(since)
    through = jnp.swapaxes(since_start[-8:], 0, 1)[:, 7:]
    return ChannelDecay(
        split,
        since_start,
        jnp.exp(until),
        through,
        levels,
        (jnp.exp(middle), jnp.exp(-middle)),
        together,
        sums,
    )


def halves(size: int) -> list:
    return [NEAR << n for n in range((size // NEAR).bit_length() - 1)]


def joined(size: int, half: int):
    """[C / 2, C]: of rows of second blocks, j in the first one beside it."""
    i, j = (lax.broadcasted_iota(jnp.int32, (size // 2, size), axis) for axis in (0, 1))
    bits = half.bit_length() - 1
    return j >> bits == (i >> bits) * 2


def second(x, half: int):
    """The rows of second blocks."""
    return jnp.concatenate([x[n : n + half] for n in range(half, x.shape[0], 2 * half)])


def changed(x, rows, half: int):
    """x with other rows in second blocks."""
    pieces = []
    for n in range(0, x.shape[0] // 2, half):
        pieces += [x[2 * n : 2 * n + half], rows[n : n + half]]
    return jnp.concatenate(pieces)


def documents(marks, size):
    """[C, C]: no document begins behind j up to i."""
    i, j = places(size)
    marks = jnp.broadcast_to(marks, (size, size)).astype(jnp.bfloat16)
    ones = jnp.where(j <= i, 1.0, 0.0).astype(jnp.bfloat16)
    return dot(ones, marks, 1, 0) == dot(marks, ones, 0, 1)
