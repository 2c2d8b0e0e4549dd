"""Softmax attention over a window: its state is a ring of the last W written keys and values.

    y_t = sum_s softmax_s(scale q_t . k_s) v_s,   s the last W written tokens of the document, t
                                                  included; its first ones, `sinks` of them; and
                                                  `persistent` learned ones      scale = K^-1/2

Child et al. 2019, arXiv 1904.10509, Beltagy et al. 2020, arXiv 2004.05150; sinks: Xiao et al. 2023,
arXiv 2309.17453; persistent keys and values: Sukhbaatar et al. 2019, arXiv 1907.01470. G queries
may share one memory (grouped queries: Ainslie et al. 2023, arXiv 2305.13245).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform
from memjax.cell import MemoryCell
from memjax.cells._heads import HeadsMixer, Inputs
from memjax.recurrence import (
    accumulator_dtype,
    dot,
    from_chunks,
    per_head,
    per_state,
    promote,
    select,
    to_chunks,
)
from memjax.registry import CellSpec, register
from memjax.typing import Array, Bool, DTypeLike, Float, Int, PyTree


class Ring(NamedTuple):
    """The first S written tokens of a document, its sinks, then a ring of the last W of the others.

    k: [S + W, K]; v: [S + W, V]; written: number of tokens written since the document's start.
    Token n stands in slot n, or S + (n - S) mod W; free slots are zero.
    """

    k: Float[Array, "S+W K"]
    v: Float[Array, "S+W V"]
    written: Int[Array, ""]


class Line(NamedTuple):
    """All that is kept of tokens on one line: the ring, oldest first, then the written tokens.

    kept: leaves [R + T, ...]. high: [T], where each token's last written one stands on the line,
    itself when it is written. origin: [T], where its document begins; below zero when that lies in
    front of the ring.
    """

    kept: tuple[Array, ...]
    high: Int[Array, " T"]
    origin: Int[Array, " T"]

    @property
    def seen(self) -> Int[Array, " T"]:
        """Written tokens of the document up to each token."""
        return self.high + 1 - self.origin


@dataclasses.dataclass(frozen=True)
class SlidingWindow(MemoryCell):
    """Attention to the last `window` written tokens, the present one included, and to the sinks.

    key_dim, value_dim: K and V of one head. window: W. sinks: S, first tokens of a document that
    are seen for ever. persistent: learned keys and values, without a position, that every token of
    every document sees; they start as normal vectors of mean square norm 1. scale: None for
    K ** -0.5.
    store_dtype: of the keys and values in the ring. block: queries that are handled together in
    the chunked form, None for the window's length but 128 at most; changes speed only.
    """

    inputs: ClassVar[type] = Inputs

    key_dim: int
    value_dim: int
    window: int
    scale: float | None = None
    store_dtype: DTypeLike = jnp.float32
    block: int | None = None
    sinks: int = 0
    persistent: int = 0

    def __post_init__(self):
        sizes = (self.key_dim, self.value_dim, self.window, 1 if self.block is None else self.block)
        if min(*sizes, self.sinks + 1, self.persistent + 1) < 1:
            raise ValueError(
                f"{type(self).__name__}: key_dim, value_dim, window and block must be at least 1, "
                f"sinks and persistent at least 0; given {self}"
            )

    def init_params(self, key, heads):
        if not self.persistent:
            return {}
        sizes = {"k": self.key_dim, "v": self.value_dim}
        seeds = jax.random.split(key)
        return {
            name: jax.random.normal(seed, (heads, self.persistent, size)) * size**-0.5
            for seed, (name, size) in zip(seeds, sizes.items(), strict=True)
        }

    def preferred(self, length, differentiate):
        """For one token `scan`, which writes into the ring where it stands; the chunked form puts
        it in order first. The table's figures of one token are without a state."""
        found = super().preferred(length, differentiate)
        return tuple(dict.fromkeys(("scan", *found))) if length == 1 else found

    @property
    def ages(self) -> tuple[tuple[int, int], ...]:
        """How many tokens old, from and to (exclusive), each pair of keys and values in `leaves` is
        when it is seen; the present token is 0 old."""
        return ((0, self.window),)

    def leaves(self, x: PyTree) -> tuple[Array, ...]:
        """What is kept of tokens in the order of the state: keys and values for each of `ages`."""
        return x.k, x.v

    @property
    def reach(self) -> int:
        """Tokens that are kept besides the sinks."""
        return self.ages[-1][1]

    def lowest(self, high: Int[Array, "C"], origin: Int[Array, "C"]) -> Int[Array, "C"]:
        """The oldest token in sight, sinks apart, when `high` is the last written one of a document
        that begins at `origin`."""
        return jnp.maximum(high - self.reach + 1, jnp.maximum(origin, 0))

    @property
    def slots(self) -> int:
        """Tokens that are kept."""
        return self.sinks + self.reach

    def slot(self, token: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where a token of the document is kept."""
        return jnp.where(token < self.sinks, token, self.sinks + (token - self.sinks) % self.reach)

    def tokens(self, count: Int[Array, ""]) -> Int[Array, " S+W"]:
        """The token in each slot after `count` of them; below zero where there is none."""
        slot = jnp.arange(self.slots)
        newest = count - 1 - (count - 1 - slot) % self.reach
        token = jnp.where(slot < self.sinks, slot, newest)
        return jnp.where((token >= jnp.minimum(slot, self.sinks)) & (token < count), token, -1)

    def init_state(self, params) -> Ring:
        """An empty ring."""
        k = jnp.zeros((self.slots, self.key_dim), self.store_dtype)
        v = jnp.zeros((self.slots, self.value_dim), self.store_dtype)
        return Ring(k, v, jnp.zeros((), jnp.int32))

    def write(self, params, state, x):
        *kept, written = state
        slot = self.slot(written)
        kept = (
            old.at[slot].set(new.astype(old.dtype))
            for old, new in zip(kept, self.leaves(x), strict=True)
        )
        return type(state)(*kept, written + 1)

    def read(self, params, state, x):
        return self._attend(params, x.q[None], self._parts(state), state.written[None])[0]

    def _parts(self, state: PyTree) -> list[tuple[Array, Array, Bool[Array, "1 n"]]]:
        """What the token after the last written one sees, see `_attend`."""
        *kept, written = state
        high = written[None] - 1
        low = self.lowest(high, jnp.zeros_like(high))
        tokens, parts = self.tokens(written), []
        for i, (youngest, oldest) in enumerate(self.ages):
            visible = self._visible(tokens, low, high, youngest, oldest)
            if self.sinks and youngest == 0:
                visible = visible | self._sinks(tokens, jnp.zeros_like(low), high)
            parts.append((kept[2 * i], kept[2 * i + 1], visible))
        return parts

    def _visible(self, index, low, high, youngest, oldest):
        """[C, n]: whether tokens `index` lie in a query's interval [low, high] and are, at `high`,
        at least `youngest` and less than `oldest` tokens old."""
        age = high[:, None] - index
        return (low[:, None] <= index) & (youngest <= age) & (age < oldest)

    def _sinks(self, index, origin, high):
        """[C, n]: whether tokens `index` are sinks of the document that begins at `origin`."""
        rank = index - origin[:, None]
        return (rank >= 0) & (rank < self.sinks) & (index <= high[:, None])

    def _attend(self, params, q, parts, count):
        """One softmax of q [C, G, K] over parts (k [n, K], v [n, V], visible [C, n]) and over the
        persistent tokens. Zero when nothing is visible."""
        scale = self.key_dim**-0.5 if self.scale is None else self.scale
        if self.persistent:
            always = jnp.ones((len(q), self.persistent), bool)
            parts = [*parts, (params["k"], params["v"], always)]
        scores = []
        for k, _, visible in parts:
            product = scale * dot("cgk,sk->cgs", q, k.astype(q.dtype))
            scores.append(jnp.where(visible[:, None], product, -jnp.inf))
        tops = [jnp.max(score, axis=-1, keepdims=True) for score in scores]
        top = lax.stop_gradient(functools.reduce(jnp.maximum, tops))
        weights = [jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0)) for score in scores]
        total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
        total = jnp.where(total == 0, 1, total)
        shares = (
            dot("cgs,sv->cgv", weight / total, v.astype(q.dtype))
            for weight, (_, v, _) in zip(weights, parts, strict=True)
        )
        return self._given(functools.reduce(jnp.add, shares), count)

    def _given(self, y: Float[Array, "*n G V"], count: Int[Array, "*n"]) -> Float[Array, "*n G V"]:
        """Answers to queries behind `count` written tokens of their document."""
        return y

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """Blocks of queries over the slab of keys that they can see: O(T (W + block))."""
        dtype = accumulator_dtype(state, xs)
        fresh = self.fresh(params, dtype)
        line = self._line(fresh, state, xs, reset, write)
        carried = fresh if state is None else state
        y = self._blocks(params, promote(xs.q, dtype), line, carried)
        return y.astype(xs.q.dtype), self._ring(fresh, carried, line, reset)

    def pallas(self, params, state, xs, reset, write):
        """`pallas_kernels.window_attention`, for the window alone, the ring in front of the tokens.

        Memories of one sequence may have written different numbers of tokens: behind a ring each is
        a sequence of its own.
        """
        from pallas_kernels import window_attention

        name = type(self).__name__
        if self.sinks or self.persistent or self.ages != ((0, self.window),):
            raise NotImplementedError(f"{name} has a kernel for a window alone; use 'chunked'")
        if write is not None:
            raise NotImplementedError(f"{name} has no kernel for a write mask; use 'chunked'")
        (line, first), ring = self._lines(params, state, xs, reset, write)
        batch, length, heads = line.high.shape
        alone = 1 if state is None else heads  # memories that are sequences of their own
        q = jnp.repeat(xs.q, heads // xs.q.shape[2], axis=2)
        dtype = jnp.promote_types(q.dtype, line.kept[0].dtype)

        def sequences(a):  # [B, n, H, *more, D] -> [B alone, n, H / alone * more, D]
            a = jnp.moveaxis(a.reshape(batch, a.shape[1], alone, -1, a.shape[-1]), 2, 1)
            return a.reshape(-1, *a.shape[2:]).astype(dtype)

        if state is not None:
            reset = jnp.moveaxis(first, 2, 1).reshape(batch * heads, -1)
        y = window_attention(
            *map(sequences, (q, *line.kept)),
            window=self.window,
            reset=reset,
            scale=self.scale,
            plain=False,
            platform=mesh_platform(),
        )
        y = jnp.moveaxis(y.reshape(batch, alone, length, -1, self.value_dim), 1, 2)
        y = self._given(y.reshape(*q.shape[:-1], -1), line.seen)
        return y.astype(xs.q.dtype), ring

    @per_state
    def fold(self, params, state, xs, reset, write):
        """Whether the document in front of the tokens goes on behind them, beside the ring."""
        fresh = self.fresh(params, accumulator_dtype(state, xs))
        carried = fresh if state is None else state
        line = self._line(fresh, state, xs, reset, write)
        goes_on = jnp.ones((), bool) if reset is None else ~jnp.any(reset)
        return goes_on, self._ring(fresh, carried, line, reset)

    def compose(self, later, earlier):
        """The earlier ring, with the tokens of the later one written into it."""
        (through, new), (before, old) = later, earlier
        *kept, written = old
        written = jnp.where(through, written, 0)
        token = self.tokens(written + new.written)
        late = jnp.where(token < 0, ~through, token >= written)

        def slot(token, free):
            return jnp.where(free, jnp.arange(self.slots), self.slot(jnp.maximum(token, 0)))

        here, there = slot(token - written, token < 0), slot(token, token < 0)
        rows = (select(late, b[here], a[there]) for a, b in zip(kept, new[:-1], strict=True))
        return through & before, type(new)(*rows, written + new.written)

    @per_head
    def _lines(self, params, state, xs, reset, write):
        """The line, which tokens on it are the first of a document, and the final ring."""
        fresh = self.fresh(params, accumulator_dtype(state, xs))
        line = self._line(fresh, state, xs, reset, write)
        carried = fresh if state is None else state
        place = jnp.arange(len(line.kept[0]))
        front = len(place) - len(line.high)
        first = place == front - carried.written
        if reset is not None:
            first = first.at[front:].max(reset)
        return (line, first), self._ring(fresh, carried, line, reset)

    def _line(self, fresh: PyTree, state: PyTree | None, xs, reset, write) -> Line:
        """Lays the ring and the written tokens out; fresh: an empty ring."""
        length = xs.q.shape[0]
        kept = tuple(
            new.astype(old.dtype) for new, old in zip(self.leaves(xs), fresh[:-1], strict=True)
        )
        ring = 0 if state is None else self.reach
        start = jnp.zeros((), jnp.int32) if state is None else state.written
        written = jnp.ones(length, bool) if write is None else write
        high = ring - 1 + jnp.cumsum(written.astype(jnp.int32))
        before = high + 1 - written.astype(jnp.int32)
        if write is not None:  # written tokens only, in order
            place = jnp.where(written, before - ring, length)
            kept = tuple(jnp.zeros_like(a).at[place].set(a, mode="drop") for a in kept)
        if state is not None:
            oldest_first = self.slot(jnp.maximum(start + jnp.arange(-ring, 0), 0))
            kept = tuple(
                jnp.concatenate([old[oldest_first], new])
                for old, new in zip(state[:-1], kept, strict=True)
            )
        origin = jnp.full((length,), ring - start)
        if reset is not None:
            origin = lax.cummax(jnp.where(reset, before, origin))
        return Line(kept, high, origin)

    def block_size(self, length: int) -> int:
        """Queries that are handled together."""
        return min(self.block or min(self.window, 128), length)

    def _blocks(
        self,
        params: PyTree,
        q: Float[Array, "T G K"],
        line: Line,
        carried: PyTree,
        more: PyTree = None,
        more_parts: Callable[..., list] = lambda more, high, origin: [],
    ) -> Float[Array, "T G V"]:
        """Answers to all queries. carried: the ring in front. more: leaves [N, ...], one for each
        block, of which `more_parts` makes further parts of what its queries see."""
        length, size = q.shape[0], line.kept[0].shape[0]
        block = self.block_size(length)

        @jax.checkpoint
        def answer(inputs):
            (q, high, origin), more = inputs
            low = self.lowest(high, origin)
            parts = more_parts(more, high, origin)
            for i, (youngest, oldest) in enumerate(self.ages):
                slab = min(oldest - youngest + block, size)
                start = jnp.clip(high[0] - oldest + 1, 0, size - slab)
                index = start + jnp.arange(slab)
                visible = self._visible(index, low, high, youngest, oldest)
                pair = line.kept[2 * i : 2 * i + 2]
                if self.sinks and youngest == 0:
                    visible = visible | self._sinks(index, origin, high)
                    parts.append(self._sinks_in_front(pair, carried, origin, start))
                k, v = (lax.dynamic_slice_in_dim(a, start, slab) for a in pair)
                parts.append((k, v, visible))
            return self._attend(params, q, parts, high + 1 - origin)

        queries = to_chunks((q, line.high, line.origin), block)
        return from_chunks(lax.map(answer, (queries, more)), length)

    def _sinks_in_front(self, line, carried, origin, start):
        """The sinks in front of a block's slab, as a part: those of the document of its first
        query. Documents that begin later begin in the slab."""
        index = origin[0] + jnp.arange(self.sinks)
        held, here = (index < 0)[:, None], jnp.clip(index, 0, len(line[0]) - 1)  # carried in
        k, v = (
            jnp.where(held, old[: self.sinks], new[here])
            for old, new in zip(carried[:2], line, strict=True)
        )
        return k, v, (origin == origin[0])[:, None] & (index < start)

    def _ring(self, fresh: PyTree, carried: PyTree, line: Line, reset) -> PyTree:
        """The ring after the last token. Slots that stay free are those that were carried in."""
        empty = carried if reset is None else select(reset.any(), fresh, carried)
        origin, count = line.origin[-1], line.seen[-1]
        token = self.tokens(count)
        index = origin + token  # < 0: a sink that was carried in
        there = (token >= 0) & (index >= 0)
        index = jnp.clip(index, 0, line.kept[0].shape[0] - 1)
        new = tuple(a[index] for a in line.kept)
        return type(fresh)(*select(there, new, tuple(empty[:-1])), count)


def without_sinks(cell: SlidingWindow) -> None:
    """ValueError when a cell that sees all it keeps is given sinks."""
    if cell.sinks:
        raise ValueError(f"{type(cell).__name__} has no sinks; given {cell}")


class SlidingWindowMixer(HeadsMixer):
    """Over the last `window` tokens, the first `sinks` of the document, and `persistent` learned
    keys and values."""

    sinks: int = 0
    persistent: int = 0

    def make_cell(self):
        sizes = self.size, self.size, self.window
        others = dict(sinks=self.sinks, persistent=self.persistent)
        return SlidingWindow(*sizes, store_dtype=self.dtype, **others)


register(
    CellSpec(
        name="sliding_window",
        cell=lambda: SlidingWindow(8, 6, window=5, block=4),
        variants={
            "wide": lambda: SlidingWindow(8, 6, window=40, block=16),
            "sinks": lambda: SlidingWindow(8, 6, window=5, block=4, sinks=3, persistent=2),
        },
        mixer=SlidingWindowMixer,
        paper="Beltagy et al. 2020, arXiv 2004.05150",
        recurrence="softmax over the last W tokens, O(T W)",
    )
)
