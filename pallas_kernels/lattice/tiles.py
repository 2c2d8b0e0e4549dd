"""How the slots of a group of memories lie on a TPU, and sums over slots and channels.

8 P memories of D slots of D channels are a group, P = 128 / D where D < 128, otherwise 1. What a
token has for each slot, or each channel, of a group is [8, W], W = max(D, 128), just as heads lie
in [B, T, H, D]: rows are 8 memories, or pairs of memories side by side in lanes. The slots
themselves are tiles [8, 128] in an array [J, I, 8, 128]. A row of a tile has the same memories; its
lanes are (memory, g, s) for 8 values of s:

    slot 8 g + i % 8 of the i // 8-th 128,  channel 8 (j % G) + s of the j // G-th 128,  G of g

A sum over slots, or channels, is first one of tiles; what is left is a sum over g, or s, in lanes,
of J, or I, tiles at once, which are halved at every step (`fold`). Its result is [8, W].
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

LANES, ROWS = 128, 8  # of a tile
INNER = 8  # values of s
TURNED = (0, 1, 7, 8, 4, 6, 2, 3, 5, 9)  # axes of `Tiles._split` in the order of tiles


def lane(shape):
    """The number of every lane."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def permuted(x, source):
    """Lanes of x [8, 128] from those with the numbers `source`."""
    return jnp.take_along_axis(x, source, axis=1, mode="promise_in_bounds")


def fold(x, first: int):
    """Sums over bits of the lanes of x [n, 8, 128], [8, 128]: n - 1 of the bits below `first`,
    downwards, whose place tells which of the n arrays is summed."""
    bit, at = first, lane((ROWS, LANES))
    while len(x) > 1:
        bit, half = bit // 2, len(x) // 2
        low = at & bit == 0
        mine, other = jnp.where(low, x[:half], x[half:]), jnp.where(low, x[half:], x[:half])
        x = mine + jnp.stack([permuted(a, at ^ bit) for a in other])
    return x[0]


class Tiles(NamedTuple):
    """dim: D, 64, 128 or 256."""

    dim: int

    @property
    def side(self) -> int:
        """P, memories in a row."""
        return max(1, LANES // self.dim)

    @property
    def memories(self) -> int:
        return ROWS * self.side

    @property
    def width(self) -> int:
        """W."""
        return max(self.dim, LANES)

    @property
    def outer(self) -> int:
        """G."""
        return min(self.dim, LANES) // INNER

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[J, I, 8, 128]."""
        return self.dim // INNER, self.dim // self.outer, ROWS, LANES

    def _parts(self, x):
        return [x[:, n : n + LANES] for n in range(0, self.width, LANES)]

    def of_slots(self, x):
        """[8, W] -> [I, 8, 128], in all channels."""
        here = lane((ROWS, LANES)) & -INNER
        return jnp.stack([permuted(a, here + i) for a in self._parts(x) for i in range(INNER)])

    def of_channels(self, x):
        """[8, W] -> [J, 8, 128], in all slots."""
        at = lane((ROWS, LANES))
        here = (at & -(INNER * self.outer)) + (at & (INNER - 1))
        places = range(0, INNER * self.outer, INNER)
        return jnp.stack([permuted(a, here + n) for a in self._parts(x) for n in places])

    def over_channels(self, x):
        """The rest of a sum over channels, [I, 8, 128] -> [8, W]."""
        return _beside([fold(x[n : n + INNER], INNER) for n in range(0, len(x), INNER)])

    def over_slots(self, x):
        """The rest of a sum over slots, [J, 8, 128] -> [8, W]."""
        count = self.outer
        return _beside([fold(x[n : n + count], INNER * count) for n in range(0, len(x), count)])

    def blocks(self, whole: bool) -> list[slice]:
        """Of tiles [J]: one at a time, or all."""
        count = self.shape[0]
        return [slice(0, count)] if whole else [slice(n, n + 1) for n in range(count)]

    def tiled(self, states):
        """[B, H, D, D] -> [B, H / 8P, J, I, 8, 128]."""
        split, _ = self._split(*states.shape[:2])
        turned = states.reshape(split).transpose(TURNED)
        return turned.reshape(*split[:2], *self.shape)

    def untiled(self, tiles):
        """The way back."""
        split, whole = self._split(tiles.shape[0], tiles.shape[1] * self.memories)
        turned = tiles.reshape([split[axis] for axis in TURNED])
        return turned.transpose([TURNED.index(axis) for axis in range(len(TURNED))]).reshape(whole)

    def _split(self, batch: int, heads: int):
        """[B, group, row, memory, 128s, g, i of slots, 128s, j, s of channels] and [B, H, D, D]."""
        axes = (self.width // LANES, self.outer, INNER)
        split = (batch, heads // self.memories, ROWS, self.side, *axes, *axes)
        return split, (batch, heads, self.dim, self.dim)


def _beside(parts):
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
