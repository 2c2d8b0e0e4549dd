"""The windows of a sequence: their rows, and what `windows.coefficients` takes of them.

A window has `tokens` tokens, at most as many as a frozen chunk, and a row for each of them, filled
up to whole tiles with tokens that only read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import common
from pallas_kernels.deep_memory.reference import State
from pallas_kernels.deep_network.network import Memory
from pallas_kernels.deep_network.windows import TILE, Rule, Tokens


class Sizes(NamedTuple):
    """Of windows: tokens, rows; number: of the windows of a sequence."""

    tokens: int
    rows: int
    number: int


def sizes(length: int, frozen_chunk: int, longest: int) -> Sizes:
    """Windows of at most `longest` tokens."""
    tokens = min(frozen_chunk, length, longest)
    return Sizes(tokens, tokens + -tokens % TILE, -(-length // tokens))


class Layout(NamedTuple):
    """q, k, v [B, H, N S, ...]; tokens of windows [B, H, N]; and behind the last token place [B, H]
    and, for c > 1, the number of pairs [B, H], at most c - 1."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: Tokens
    place: jax.Array
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

    places, place = in_front(counted(written, first, state.place), state.place)
    numbers, number, older = jnp.zeros_like(places), None, scalars[-1].shape[-1] - 1
    if older:
        numbers, number = in_front(counted(written, first, state.number), state.number)
        number = jnp.minimum(number, older)
    g, m, rates = jax.tree.map(split, scalars)
    numbers = jnp.minimum(numbers, older)
    tokens = Tokens(g, m, rates, split(written), split(first), places % frozen_chunk, numbers)
    q, k, v = (split(a).reshape(batch, heads, -1, a.shape[-1]) for a in (q, k, v))
    return Layout(q, k, v, tokens, place % frozen_chunk, number)


def memory(state: State, rule: Rule) -> Memory:
    """What a kernel carries of a state."""
    pairs = None
    if rule.front:
        k, v = (common.wider(a, rule.front, a.shape[-1]) for a in (state.k, state.v))
        pairs = k, v
    return Memory(state.weights, state.momentum, state.base, pairs)


def state_of(memory: Memory, place, number, rule: Rule) -> State:
    """The inverse of `memory`."""
    k, v = (a[:, :, : rule.context - 1] for a in memory.pairs) if memory.pairs else (None, None)
    return State(memory.weights, memory.momentum, memory.base, place, k, v, number)
