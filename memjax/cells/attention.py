"""Softmax attention as a memory: its state is a ring of the last W written keys and values.

    y_t = sum_s softmax_s(scale q_t . k_s) v_s,   s the last W written tokens of the document, t
                                                  included                      scale = K^-1/2

Vaswani et al. 2017, arXiv 1706.03762; the window: Child et al. 2019, arXiv 1904.10509, Beltagy et
al. 2020, arXiv 2004.05150. G queries may share one memory (grouped queries: Ainslie et al. 2023,
arXiv 2305.13245). `sliding_window` keeps W tokens and forgets older ones; `attention` is the same
ring with room for all tokens, and tells when they do not fit.
"""

import dataclasses
import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.cell import MemoryCell
from memjax.nn.layers import Dense, rotary
from memjax.nn.mixer import Mixer
from memjax.recurrence import (
    accumulator_dtype,
    dot,
    from_chunks,
    per_head,
    promote,
    select,
    to_chunks,
)
from memjax.registry import CellSpec, register
from memjax.typing import Array, DTypeLike, Field, Float, Int


class Inputs(NamedTuple):
    """q: [B, T, h, G, K]; k: [B, T, h, K]; v: [B, T, h, V]. The answer is [B, T, H, G, V]."""

    q: Annotated[Array, Field("G K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]


class Ring(NamedTuple):
    """The n-th written token of a document stands in slot n mod W; free slots are zero.

    k: [W, K]; v: [W, V]; written: number of tokens written since the document's start.
    """

    k: Float[Array, "W K"]
    v: Float[Array, "W V"]
    written: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class SlidingWindow(MemoryCell):
    """Attention to the last `window` written tokens, the present one included.

    key_dim, value_dim: K and V of one head. window: W. scale: None for K ** -0.5.
    store_dtype: of the keys and values in the ring. block: queries that are handled together in
    the chunked form, None for the window's length but 128 at most; changes speed only.
    """

    inputs = Inputs

    key_dim: int
    value_dim: int
    window: int
    scale: float | None = None
    store_dtype: DTypeLike = jnp.float32
    block: int | None = None

    def __post_init__(self):
        sizes = (self.key_dim, self.value_dim, self.window, 1 if self.block is None else self.block)
        if min(sizes) < 1:
            raise ValueError(
                f"{type(self).__name__}: key_dim, value_dim, window and block must be at least 1; "
                f"given {self}"
            )

    def init_state(self, params) -> Ring:
        """An empty ring."""
        k = jnp.zeros((self.window, self.key_dim), self.store_dtype)
        v = jnp.zeros((self.window, self.value_dim), self.store_dtype)
        return Ring(k, v, jnp.zeros((), jnp.int32))

    def write(self, params, state, x):
        slot = state.written % self.window
        return Ring(
            state.k.at[slot].set(x.k.astype(state.k.dtype)),
            state.v.at[slot].set(x.v.astype(state.v.dtype)),
            state.written + 1,
        )

    def read(self, params, state, x):
        present = jnp.arange(self.window) < state.written
        return self._attend(x.q[None], state.k, state.v, present[None], state.written[None])[0]

    def _attend(self, q, k, v, visible, count):
        """q [C, G, K] over k, v [S, ...] where visible [C, S]; zero when nothing is visible."""
        scale = self.key_dim**-0.5 if self.scale is None else self.scale
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        scores = scale * dot("cgk,sk->cgs", q, k)
        scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
        top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return dot("cgs,sv->cgv", weights / jnp.where(total == 0, 1, total), v)

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """Blocks of queries over the slab of keys that they can see: O(T (W + block)).

        All keys stand on one line: the ring, oldest first, then the written tokens. A token sees
        the interval [low, high] of that line.
        """
        dtype = accumulator_dtype(state, xs)
        length = xs.q.shape[0]
        q = promote(xs.q, dtype)
        store = self.fresh(params, dtype)
        k, v = xs.k.astype(store.k.dtype), xs.v.astype(store.v.dtype)
        ring = 0 if state is None else self.window
        start = jnp.zeros((), jnp.int32) if state is None else state.written
        written = jnp.ones(length, bool) if write is None else write
        high = ring - 1 + jnp.cumsum(written.astype(jnp.int32))
        before = high + 1 - written.astype(jnp.int32)
        if write is not None:  # written tokens only, in order
            slot = jnp.where(written, before - ring, length)
            k, v = (jnp.zeros_like(a).at[slot].set(a, mode="drop") for a in (k, v))
        if state is not None:
            oldest_first = (start + jnp.arange(self.window)) % self.window
            k = jnp.concatenate([state.k[oldest_first], k])
            v = jnp.concatenate([state.v[oldest_first], v])
        origin = jnp.full((length,), ring - start)  # where each token's document begins
        if reset is not None:
            origin = lax.cummax(jnp.where(reset, before, origin))
        low = jnp.maximum(high - self.window + 1, jnp.maximum(origin, 0))
        y = self._blocks(q, k, v, low, high, high + 1 - origin)
        if state is not None:  # slots that stay free are those that were carried in
            store = state if reset is None else select(reset.any(), store, state)
        final = self._ring(store, k, v, origin[-1], high[-1] + 1 - origin[-1])
        return y.astype(xs.q.dtype), final

    def _blocks(self, q, k, v, low, high, count):
        length, line = q.shape[0], k.shape[0]
        size = min(self.block or min(self.window, 128), length)
        slab = min(self.window + size, line)

        @jax.checkpoint
        def block(inputs):
            q, low, high, count = inputs
            start = jnp.clip(high[0] - self.window + 1, 0, line - slab)
            keys, values = (lax.dynamic_slice_in_dim(a, start, slab) for a in (k, v))
            index = start + jnp.arange(slab)
            visible = (low[:, None] <= index) & (index <= high[:, None])
            return self._attend(q, keys, values, visible, count)

        return from_chunks(lax.map(block, to_chunks((q, low, high, count), size)), length)

    def _ring(self, empty: Ring, k, v, origin, count) -> Ring:
        """The ring after the last token, from the line of keys and values."""
        slot = jnp.arange(self.window)
        rank = count - 1 - (count - 1 - slot) % self.window  # newest token of each slot
        index = jnp.clip(origin + rank, 0, k.shape[0] - 1)
        present = ((rank >= 0) & (count > 0))[:, None]
        return Ring(
            jnp.where(present, k[index], empty.k), jnp.where(present, v[index], empty.v), count
        )


@dataclasses.dataclass(frozen=True)
class Attention(SlidingWindow):
    """Attention to all written tokens of the document; `window` is the most that fit.

    A longer sequence raises ValueError. Where the count is known at run time only (decoding under
    jit), answers past the capacity are NaN.
    """

    def scan(self, params, state, xs, reset, write):
        self._check(xs)
        return super().scan(params, state, xs, reset, write)

    def chunked(self, params, state, xs, reset, write):
        self._check(xs)
        return super().chunked(params, state, xs, reset, write)

    def _check(self, xs):
        if xs.q.shape[1] > self.window:
            raise ValueError(
                f"attention: {xs.q.shape[1]} tokens do not fit its capacity of {self.window}; "
                "raise the capacity, or use sliding_window"
            )

    def _attend(self, q, k, v, visible, count):
        y = super()._attend(q, k, v, visible, count)
        return jnp.where((count > self.window)[:, None, None], jnp.nan, y)


class SlidingWindowMixer(Mixer):
    """Multi-head attention with rotary positions and grouped queries, bias-free.

    heads: of queries. kv_heads: of keys and values, a divisor of heads; None for as many.
    head_dim: per head; None for dim / heads. window: W. rotary_base: theta of the rotary
    embedding (Su et al. 2021), 0 for no positions.
    """

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 256
    rotary_base: float = 1e4

    def make_cell(self):
        return SlidingWindow(self.size, self.size, self.window, store_dtype=self.dtype)

    @property
    def memories(self):
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """Width of one head; ValueError when dim does not divide into heads."""
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"attention: dim {self.dim} does not divide into {self.heads} heads; "
                "change heads, or set head_dim"
            )
        return self.head_dim or self.dim // self.heads

    def setup(self):
        super().setup()
        kv_heads, size = self.memories, self.size
        if self.heads % kv_heads:
            raise ValueError(
                f"attention: heads {self.heads} must be a multiple of kv_heads {kv_heads}"
            )
        axes, grouped = ("heads", "head_dim"), ("heads", None, "head_dim")
        dense = functools.partial(Dense, dtype=self.dtype)
        self.query = dense((kv_heads, self.heads // kv_heads, size), grouped, std=self.std)
        self.key = dense((kv_heads, size), axes, std=self.std)
        self.value = dense((kv_heads, size), axes, std=self.std)
        std = self.std * self.out_scale
        self.output = dense((self.dim,), ("embed",), grouped, std=std)

    def inputs(self, x, state, ctx):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary_base:
            q, k = (rotary(a, ctx.position, self.rotary_base) for a in (q, k))
        return Inputs(q, k, v), None, {}

    def outputs(self, y, kept):
        return self.output(y)


class AttentionMixer(SlidingWindowMixer):
    """The same over all tokens. window: the capacity, the longest context that can be held."""

    window: int = 2048

    @property
    def capacity(self) -> int:
        """The most tokens of a document that this layer can hold."""
        return self.window

    def make_cell(self):
        return Attention(self.size, self.size, self.window, store_dtype=self.dtype)


register(
    CellSpec(
        name="sliding_window",
        cell=lambda: SlidingWindow(8, 6, window=5, block=4),
        variants={"wide": lambda: SlidingWindow(8, 6, window=40, block=16)},
        mixer=SlidingWindowMixer,
        paper="Beltagy et al. 2020, arXiv 2004.05150",
        recurrence="softmax over the last W tokens, O(T W)",
    )
)
register(
    CellSpec(
        name="attention",
        cell=lambda: Attention(8, 6, window=512, block=16),
        mixer=AttentionMixer,
        paper="Vaswani et al. 2017, arXiv 1706.03762",
        recurrence="softmax over all tokens; the state is a ring of keys and values",
    )
)
