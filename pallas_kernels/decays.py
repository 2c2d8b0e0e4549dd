"""Decays of a chunk as the TPU kernels take them: none, one for each head, or one for each channel.

With x.D.y the matrix sum_d x_i[d] e^{G_i - G_j}[d] y_j[d], j <= i, and zero above its diagonal, G
the sum of the log decays since the chunk's start.

A decay for each head has sums G in two numbers (`log_decay_sums`), and D is one matrix. No exponent
is above 0: masks come before exp.

A decay for each channel has no such matrix: `channel_decays`.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import channel_decays
from pallas_kernels.common import Static, by_token
from pallas_kernels.products import dot, dot_in_parts, parts, places, turned

LOWEST = -1e4  # log decays below it are it: exp is zero there, and its sums stay exact
RESET = 2.0**14  # subtracted from the log decay of a document's first token


def arrays(g, reset, static) -> tuple:
    """What a kernel reads: () without decay; the sums' columns and rows for each head; for each
    channel g [B, T, H, K], on GPUs with resets, on TPUs beside them, the tokens where a document
    begins as columns [B, N, C, 1]."""
    if g is None or g.ndim == 3:
        return log_decay_sums(g, reset, static)
    if static.platform == "gpu":
        g = jnp.maximum(g, LOWEST)
        return (g if reset is None else jnp.where(reset[..., None, None], LOWEST, g),)
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
    both = jnp.stack([whole - (0 if reset is None else RESET * reset[..., None]), g - whole])
    both = both.reshape(2, batch, length // chunk, chunk, count // heads, heads)
    last = jnp.tril(jnp.ones((chunk, chunk), jnp.float32))
    sums = [
        jnp.einsum(f"ij,pbnjgh->bgn{axes}", last, both, precision=lax.Precision.HIGHEST)
        for axes in ("iph", "phi")
    ]
    shape = (batch, count // heads, length // chunk)
    return sums[0].reshape(*shape, chunk, 2 * heads), sums[1].reshape(*shape, 2 * heads, chunk)


def clipped(dg, g):
    """The gradient of g from what kernels write: columns of heads, or dg itself by channel. It is
    none where g is taken for a decay to nothing; by channel its terms are zero there."""
    if g is None or g.ndim == 4:
        return dg
    return jnp.where(g < LOWEST, 0, by_token(dg))


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


def of_heads(values, heads: int, split: Callable, like, **channels) -> list:
    """The decay of each head from the blocks of `arrays`.

    split: what makes `parts` of a float32 factor: its precision. like: the dtype of the op.
    channels: count and lowest of `channel_decays.of_heads`.
    """
    if not values:
        return [Decay(split)] * heads
    if values[0].ndim == 3:
        logs = jnp.maximum(turned(values[0]), LOWEST)
        if values[1:]:
            logs = jnp.where(values[1] > 0, LOWEST, logs)
        return channel_decays.of_heads(logs, *values[1:], split=split, like=like, **channels)
    return [by_head(values, head, heads, split) for head in range(heads)]


def stacked(gradients: Sequence, like):
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

    def pairs(self, xs, ys, split) -> Generator[None, None, Any]:
        """x.D.y for each x [C, K], those of each y [C, K] side by side, as all that waits for
        products a generator for `products.in_step`; with one decay for all channels there is one
        y. split: of the factors, where they are not exact."""
        (y,) = ys
        products = dot(jnp.concatenate(xs), y, 1, 1)
        yield
        return [self._lower(x) for x in jnp.split(products, len(xs))]

    def _lower(self, x):
        if self.between is not None:
            return x * self.between
        i, j = places(x.shape[0])
        return jnp.where(i >= j, x, 0)

    def pairs_back(self, xs, ys, pairs, dpairs) -> Generator[None, None, Any]:
        """(dx of each x, dy of each y, what `log_gradient` needs) from what `pairs` gave and its
        gradients, which need not be masked."""
        crossing = sum(d * x for d, x in zip(dpairs, pairs, strict=True))
        yield
        dpairs = [self.split(self._lower(d)) for d in dpairs]
        dxs = [dot_in_parts(d, tuple(ys), 1, 0) for d in dpairs]
        dy = sum(dot(d[0].astype(x.dtype), x, 0, 0) for d, x in zip(dpairs, xs, strict=True))
        return dxs, [dy], crossing

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
