"""Decays for each channel on Hopper, by levels of blocks.

With G the sum of the log decays g since the chunk's start, sum_c x_ic y_jc e^{G_ic - G_jc}, j < i,
is no one product: e^{-G_j} has no bound. Two neighbouring blocks of tokens are joined by one, with
decays E to the end of the first and from the start of the second,

    sum over levels of (X . E) (Y . E)^T,   i in a second block, j in the first one beside it,

over blocks of 1, 2, 4 .. C / 2 tokens. The exponents of a level are N g, N ones within blocks:
N_it for t <= i in second blocks, for t > i in first ones. A product makes them too, exact to
float32, with g as the sum of three bfloat16 arrays. No exponent is above 0 and none is a
difference, whatever the decays are; and what a level has of dg, N^T (x . dx), adds terms that do
not cancel. With E = 1 a level of its own has i = j. The TPU's kernels do the same (`decays.py`).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import (
    HALF,
    SIDE,
    WIDE,
    dots,
    halves,
    in_parts,
    load,
    put,
    store,
    total,
    turned,
    unhoisted,
)

WHOLE = SIDE.bit_length() - 1  # log2 of the tokens of a chunk; levels have less

# ---------------------------------------------------------------- around the kernels


def split(x, count: int):
    """[B, T, count H, D]: `count` arrays of bfloat16 with the sum x, float32 [B, T, H, D], the
    first of all heads before the second. Three are exact."""
    found = []
    for _ in range(count - 1):  # XLA would leave out a conversion there and back
        found.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return jnp.concatenate([part.astype(HALF) for part in (*found, x)], axis=2)


def operands(q, k, logs, scale):
    """scale Q e^G and K e^{G_C - G} [B, T, H, K], both float32 as K e^G, and e^{G_C} [B, H, N, K].

    q, k: [B, T, h, K]. logs: g, [B, T, H, K], H a multiple of h.
    """
    batch, length, heads, width = logs.shape
    q, k = (jnp.repeat(x.astype(WIDE), heads // x.shape[2], axis=2) for x in (q, k))
    chunks = logs.reshape(batch, -1, SIDE, heads, width)
    last = jnp.tril(jnp.ones((SIDE, SIDE), WIDE))
    since, until = (
        jnp.exp(jnp.einsum("ts,bnshk->bnthk", ones, chunks, precision=lax.Precision.HIGHEST))
        for ones in (last, 1 - last)
    )
    through = jnp.moveaxis(since[:, :, -1], 2, 1)
    since, until = since.reshape(logs.shape), until.reshape(logs.shape)
    return scale * q * since, k * since, k * until, through


# ---------------------------------------------------------------- in a kernel


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What the tiles [n, 64, 64] of a kernel are for: 64 channels of q, k and, in three parts, g;
    the ones N of a level; two pairs to work in; and, behind these ten, what `pairs_back` takes."""

    ref: Any

    q = property(lambda self: self.ref.at[0])
    k = property(lambda self: self.ref.at[1])
    logs = property(lambda self: self.ref.at[2:5])
    ones = property(lambda self: self.ref.at[5])
    first = property(lambda self: self.ref.at[6:8])
    second = property(lambda self: self.ref.at[8:10])
    made = property(lambda self: self.ref.at[10:])


def copies(x, tiles, tokens, group: int, column):
    """Those of x.q, x.k and x.logs to their tiles. tokens: (row, tokens, head of H)."""
    row, chunk, head = tokens
    heads = x.logs.shape[2] // 3
    to = Tiles(tiles)
    of_keys = (row, chunk, lax.div(head, group), column)
    parts = [(x.logs.at[row, chunk, n * heads + head, column], to.logs.at[n]) for n in range(3)]
    return [(x.q.at[of_keys], to.q), (x.k.at[of_keys], to.k), *parts]


def joins(bits):
    """[C, C]: i in a second block of 2^bits tokens, j in the first one beside it."""
    i, j = mosaic.places(SIDE)
    return ((i ^ j) >> bits == 1) & (i > j)


def put_ones(x, bits, since=None):
    """N of a level in x.ones; of the whole chunk, up to a token, or behind it, where `since` is 1
    or 0."""
    i, j = mosaic.places(SIDE)
    since = (i >> bits) & 1 if since is None else since
    later = jnp.where(j > i, 1, 0)
    store(x.ones, jnp.where((i >> bits == j >> bits) & (later != since), 1.0, 0.0))


def decay(x, bits, since=None):
    """E of a level, [C, 64]; of the whole chunk the decays since its start, or to its end. N is
    left in x.ones."""
    put_ones(x, bits, since)
    plgpu.commit_smem()
    (exponents,) = dots([(x.ones, x.logs.at[n]) for n in range(3)])
    return jnp.exp(exponents)


def pairs(tiles, steps: int, fetch, alike: bool) -> list:
    """[sum_c q_ic k_jc e^{G_ic - G_jc}, j <= i, and, with alike, the same of k and k, j < i].

    tiles: ten. fetch(n): has the n-th 64 of `steps` times 64 channels in them.
    """
    i, j = mosaic.places(SIDE)

    def join(bits, found):
        x = Tiles(*unhoisted(tiles))
        of_level = decay(x, bits)
        put(x.first, load(x.k, WIDE) * of_level)
        put(x.second, load(x.q, WIDE) * of_level)
        plgpu.commit_smem()
        first = halves(x.first, turn=True)
        second = [x.second, x.first][: len(found)]
        products = dots(*(in_parts(halves(parts), first) for parts in second))
        joined = joins(bits)
        return [a + jnp.where(joined, b, 0.0) for a, b in zip(found, products, strict=True)]

    def add(n, found):
        fetch(n)
        x = Tiles(tiles)
        (itself,) = dots([(x.q, turned(x.k))])
        found[0] = found[0] + jnp.where(i == j, itself, 0.0)
        return lax.fori_loop(0, WHOLE, join, found)

    nothing = plgpu.layout_cast(jnp.zeros((SIDE, SIDE), WIDE), mosaic.WGMMA)
    return lax.fori_loop(0, steps, add, [nothing] * (1 + alike))


def bounds_back(tiles, through, carrying, dasked, dwritten, dseen, carried):
    """dq, dk and dg [C, 64] from the gradients of Q e^G, of K e^{G_C - G}, and of K e^G or None,
    and from that of e^{G_C}, a number for each channel. through: e^{G_C}; carrying: room for as
    many."""
    x = Tiles(tiles)
    since = decay(x, WHOLE, since=1)
    dq = since * dasked
    dsince = load(x.q, WIDE) * dq
    dk = 0.0
    if dseen is not None:
        dk = since * dseen
        dsince = dsince + load(x.k, WIDE) * dk
    put(x.first, dsince)
    carrying[...] = carried * mosaic.vector(through)
    dg = summed(x) + mosaic.of_columns(carrying, dq.shape)
    dwritten = decay(x, WHOLE, since=0) * dwritten
    put(x.first, load(x.k, WIDE) * dwritten)
    return dq, dk + dwritten, dg + summed(x)


def pairs_back(tiles, dq, dk, dg):
    """dq, dk and dg [C, 64] with what pairs of tokens add. tiles: ten, and both parts of the
    gradients of what `pairs` has made, one matrix or two."""
    i, j = mosaic.places(SIDE)
    x = Tiles(tiles)
    itself = jnp.sum(jnp.where(i == j, total(x.made.at[:2]), 0.0), axis=1)
    itself = lax.broadcast_in_dim(itself, (SIDE, SIDE), [0])
    dq, dk = dq + itself * load(x.k, WIDE), dk + itself * load(x.q, WIDE)

    def join(bits, found):
        dq, dk, dg = found
        x = Tiles(*unhoisted(tiles))
        of_level = decay(x, bits)
        asking, keys, masked = x.ones, halves(x.first), halves(x.second)  # N is made again
        store(asking, load(x.q, WIDE) * of_level)
        put(x.first, load(x.k, WIDE) * of_level)

        def mask(n):
            for part in range(2):
                made = load(x.made.at[2 * n + part], WIDE)
                store(masked[part], jnp.where(joins(bits), made, 0.0))
            plgpu.commit_smem()

        def of_keys(sums):
            for a in masked:
                plgpu.wgmma(sums, turned(a), asking)
            if x.made.shape[0] > 2:
                plgpu.wgmma_wait(0)
                mask(1)
                for a, b in (*in_parts(masked, keys), *in_parts(halves(x.second, True), keys)):
                    plgpu.wgmma(sums, a, b)
            return sums[...]

        mask(0)
        dasking = of_level * dots(in_parts(masked, keys))[0]
        dkeys = of_level * pl.run_scoped(of_keys, mosaic.SUMS)
        put(x.first, load(x.q, WIDE) * dasking + load(x.k, WIDE) * dkeys)
        put_ones(x, bits)
        return dq + dasking, dk + dkeys, dg + summed(x)

    return lax.fori_loop(0, WHOLE, join, (dq, dk, dg))


def summed(x):
    """What dg has of exponents N g whose gradients are in x.first, in parts."""
    plgpu.commit_smem()
    return dots([(turned(x.ones), part) for part in halves(x.first)])[0]


def leave(x, tiles, there, dq, dk, dg):
    """Writes 64 channels of a chunk's gradients to x.dq, x.dk and x.dg."""
    made = Tiles(tiles)
    for to, tile_, gradient in ((x.dq, made.q, dq), (x.dk, made.k, dk)):
        store(tile_, gradient)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile_, to.at[there])
    x.dg[there] = dg
    plgpu.wait_smem_to_gmem(0)
