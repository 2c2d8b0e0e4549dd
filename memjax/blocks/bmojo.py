"""B'MOJO: one softmax over a window, over a memory's outputs behind it, and over what surprised it.

    F = memory(x);   q_i, k_j, v_j of x;   k'_j, v'_j of F by the same weights, or by their own
    y_i = softmax over  k_j, v_j    of the last W tokens, i included,
                        k'_j, v'_j  of the W tokens in front of them (fading),
                        k_j, v_j    of the older tokens that are stored (eidetic; `bmojo` only)
    e_j = ||F_j - f_j|| / max(||F_j||, ||f_j||), f_j the mean of the p F in front of j, of as many
          as the document has;   a chunk of W tokens stores the m of the largest e_j > tau; of all
          that is stored the M of the largest e stay, or the newest

Zancato et al. 2024, arXiv 2407.06324. Keys of all kinds are normed and rotated by their own
position. A fading token j sums up tokens up to j, none of which is in the exact window: 2 W
positions are exact or nearly so, and what lies behind them is seen through F and the store.

That an innovation test on the memory's output selects what is stored, and that the store is bounded
and read asynchronously, is the paper's; its equations for it are not public, so that the form above
is our choice: predictor, relative error, chunks of W written tokens of a document. A chunk enters
the store when the token behind it is written and is seen from there by tokens 2 W away: selecting
is never on the path of the chunk itself. Selections compare e rounded to bfloat16 and the older of
equals goes first; they have no gradient, stored keys and values have.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.cell import MemoryCell
from memjax.cells._heads import HeadsMixer
from memjax.cells.sliding_window import Line, SlidingWindow, without_sinks
from memjax.nn.layers import widen
from memjax.recurrence import accumulator_dtype, any_of_batch, lags, per_head, promote, select
from memjax.registry import BlockSpec, register
from memjax.typing import Array, Bool, Field, Float, Int, PyTree


class Inputs(NamedTuple):
    """q: [B, T, h, G, K]; k, fading_k: [B, T, h, K]; v, fading_v: [B, T, h, V]. The answer is
    [B, T, H, G, V]."""

    q: Annotated[Array, Field("G K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    fading_k: Annotated[Array, Field("K", "key")]
    fading_v: Annotated[Array, Field("V", "value")]


class Ring(NamedTuple):
    """The n-th written token of a document stands in slot n mod 2 W; free slots are zero. Its own
    key and value are kept as long as the fading ones, though they are seen half as long."""

    k: Float[Array, "2W K"]
    v: Float[Array, "2W V"]
    fading_k: Float[Array, "2W K"]
    fading_v: Float[Array, "2W V"]
    written: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class FadingWindow(SlidingWindow):
    """window: W. A token that has left the window is seen by its fading key and value, as long
    again. There are no sinks."""

    inputs: ClassVar[type] = Inputs

    def __post_init__(self):
        super().__post_init__()
        without_sinks(self)

    @property
    def ages(self):
        return (0, self.window), (self.window, 2 * self.window)

    def leaves(self, x):
        return x.k, x.v, x.fading_k, x.fading_v

    def init_state(self, params):
        k, v, written = super().init_state(params)
        return Ring(k, v, jnp.zeros_like(k), jnp.zeros_like(v), written)


class EideticInputs(NamedTuple):
    """Those of `Inputs`, and innovation: [B, T, h], e >= 0."""

    q: Annotated[Array, Field("G K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    fading_k: Annotated[Array, Field("K", "key")]
    fading_v: Annotated[Array, Field("V", "value")]
    innovation: Annotated[Array, Field("", "rate", 0.0, 2.0)]


class EideticRing(NamedTuple):
    """`Ring`, and e of its tokens."""

    k: Float[Array, "2W K"]
    v: Float[Array, "2W V"]
    fading_k: Float[Array, "2W K"]
    fading_v: Float[Array, "2W V"]
    innovation: Float[Array, " 2W"]
    written: Int[Array, ""]


class Entries(NamedTuple):
    """What is stored of M tokens: e, the token's number in its document, from 1, and what stands
    there, its key and value or where to find them. Free slots are zero."""

    innovation: Float[Array, " M"]
    token: Int[Array, " M"]
    held: Any


class Eidetic(NamedTuple):
    """The ring, and the store of the chunks in front of the last written token's."""

    ring: EideticRing
    store: Entries


class BlockStore(NamedTuple):
    """The store that a block of queries sees.

    entries: as it stands for the first query, whose document begins at `origin` and has `chunks` of
    them in the store. stays: which of them are still there when one more has entered.
    """

    entries: Entries
    origin: Int[Array, ""]
    chunks: Int[Array, ""]
    stays: Bool[Array, " M"]


EVICT = ("smallest", "oldest")


@dataclasses.dataclass(frozen=True)
class EideticWindow(FadingWindow):
    """stored: M. top: m, at most W. threshold: tau. evict: what goes when the store is full,
    "smallest" e or the "oldest"."""

    inputs: ClassVar[type] = EideticInputs

    stored: int = 64
    top: int = 8
    threshold: float = 0.0
    evict: str = "smallest"

    def __post_init__(self):
        super().__post_init__()
        fit = 1 <= self.top <= self.window and self.stored >= 1 and self.evict in EVICT
        if not fit or math.isnan(self.threshold):
            raise ValueError(
                f"bmojo: stored must be at least 1, top from 1 to the window, {self.window}, "
                f"threshold a number, evict {' or '.join(EVICT)}; given stored {self.stored}, top "
                f"{self.top}, threshold {self.threshold}, evict {self.evict!r}"
            )

    fold = MemoryCell.fold  # what a span stores depends on what is stored in front of it

    def leaves(self, x):
        rounded = lax.stop_gradient(x.innovation).astype(jnp.bfloat16)
        return *super().leaves(x), rounded.astype(x.innovation.dtype)

    def init_state(self, params):
        ring, number = super().init_state(params), self.stored
        empty = jnp.zeros((self.reach,), jnp.float32)
        held = tuple(jnp.zeros((number, *a.shape[1:]), a.dtype) for a in (ring.k, ring.v))
        free = jnp.zeros((number,), jnp.int32)
        entries = Entries(jnp.zeros((number,), jnp.float32), free, held)
        kept = ring.k, ring.v, ring.fading_k, ring.fading_v
        return Eidetic(EideticRing(*kept, empty, ring.written), entries)

    def chunks(self, count: Int[Array, "..."]) -> Int[Array, "..."]:
        """How many chunks have entered the store when so many tokens are written."""
        return jnp.maximum(count - 1, 0) // self.window

    def admit(
        self, store: Entries, innovation: Float[Array, " W"], first: Int[Array, ""], held: PyTree
    ) -> tuple[Entries, Int[Array, " M"]]:
        """The store behind a chunk, and where its entries stood: below M in the store, then in the
        chunk. innovation: e of the chunk's tokens; first: the tokens in front of it; held: of
        each, leaves [W, ...]."""
        fit = lax.stop_gradient(jnp.where(innovation > self.threshold, innovation, -jnp.inf))
        best, which = lax.top_k(fit, self.top)
        token = jnp.where(best > -jnp.inf, first + 1 + which, 0)
        worth = lax.stop_gradient(store.innovation)
        tokens = jnp.concatenate([store.token, token])
        order = tokens
        if self.evict == "smallest":
            order = jnp.where(tokens > 0, jnp.concatenate([worth, best]), -jnp.inf)
        _, kept = lax.top_k(order, self.stored)
        there = tokens[kept] > 0

        def gather(old, new):
            chosen = jnp.concatenate([old, new[which].astype(old.dtype)])[kept]
            return select(there, chosen, jnp.zeros_like(chosen))

        entries = Entries(
            gather(store.innovation, innovation),
            tokens[kept],
            jax.tree.map(gather, store.held, held),
        )
        return entries, jnp.concatenate([jnp.arange(self.stored), self.stored + which])[kept]

    def write(self, params, state, x):
        ring, store = state
        full = (ring.written > 0) & (ring.written % self.window == 0)

        def put_away(store):
            first = ring.written - self.window
            slot = self.slot(first + jnp.arange(self.window))
            held = ring.k[slot], ring.v[slot]
            return select(full, self.admit(store, ring.innovation[slot], first, held)[0], store)

        store = lax.cond(any_of_batch(full), put_away, lambda store: store, store)
        return Eidetic(super().write(params, ring, x), store)

    def read(self, params, state, x):
        ring, store = state
        visible = (store.token > 0) & (ring.written - store.token >= self.reach)
        parts = [*self._parts(ring), (*store.held, visible[None])]
        return self._attend(params, x.q[None], parts, ring.written[None])[0]

    def block_size(self, length):
        """At most W, so that the document that runs on fills one chunk in a block at most, and
        those that begin in it none."""
        return min(super().block_size(length), self.window)

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """As for the window, with a scan over blocks that tells which tokens are stored: it moves
        numbers of tokens and e alone. Keys and values are gathered for each block."""
        dtype = accumulator_dtype(state, xs)
        fresh = self.fresh(params, dtype)
        ring, store = fresh if state is None else state
        line = self._line(fresh.ring, None if state is None else ring, xs, reset, write)
        bank = tuple(
            jnp.concatenate([old, new]) for old, new in zip(store.held, line.kept, strict=False)
        )
        stores, last = self._stores(store, line, ring.written)

        def eidetic(more, high, origin):
            index = more.entries.held - 1
            here = (more.entries.token > 0) & (origin == more.origin)[:, None]
            old = (high + 1 - origin)[:, None] - more.entries.token >= self.reach
            entered = (self.chunks(high + 1 - origin) > more.chunks)[:, None]
            return [(bank[0][index], bank[1][index], here & old & (more.stays | ~entered))]

        y = self._blocks(params, promote(xs.q, dtype), line, ring, stores, eidetic)
        held = tuple(
            select(last.held > 0, a[last.held - 1], jnp.zeros_like(a[: self.stored])) for a in bank
        )
        final = Eidetic(self._ring(fresh.ring, ring, line, reset), last._replace(held=held))
        return y.astype(xs.q.dtype), final

    def _stores(
        self, store: Entries, line: Line, written: Int[Array, ""]
    ) -> tuple[BlockStore, Entries]:
        """The store of each block, leaves [N, ...], and the last token's; `held` is where an entry
        stands, counted from 1, in the store that was carried in or behind it on the line, 0 for
        nothing. written: tokens in front, of the document that runs on."""
        length, slots = line.high.shape[0], jnp.arange(self.stored)
        innovation = jnp.pad(line.kept[-1], (0, self.window))
        first = jnp.arange(0, length, self.block_size(length))
        empty = jax.tree.map(jnp.zeros_like, store._replace(held=slots))

        def enter(entries, origin, chunks):
            token = chunks * self.window
            start = jnp.clip(origin + token, 0, len(line.kept[-1]))
            chunk = lax.dynamic_slice_in_dim(innovation, start, self.window)
            where = 1 + self.stored + start + jnp.arange(self.window)
            return self.admit(entries, chunk, token, where)

        def advance(carry, query):
            """The store as that query sees it."""
            entries, origin, chunks = carry
            goes_on = query[0] == origin
            entries = select(goes_on, entries, empty)
            chunks = jnp.where(goes_on, chunks, 0)
            due = self.chunks(query[1]) > chunks
            entries = select(due, enter(entries, origin, chunks)[0], entries)
            return entries, query[0], chunks + due

        def block(carry, query):
            entries, origin, chunks = carry = advance(carry, query)
            stood = enter(*carry)[1]
            stays = jnp.any(stood == slots[:, None], axis=1)
            return carry, BlockStore(entries, origin, chunks, stays)

        start = len(line.kept[0]) - length - written  # of the document that runs on
        begin = store._replace(held=1 + slots), start, self.chunks(written)
        last, stores = lax.scan(block, begin, (line.origin[first], line.seen[first]))
        return stores, advance(last, (line.origin[-1], line.seen[-1]))[0]


def innovation(
    made: Float[Array, "B T D"], foreseen: Float[Array, "B T D"]
) -> Float[Array, "B T 1"]:
    """e, from 0 to 2."""
    error, *sizes = (
        jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (made - foreseen, made, foreseen)
    )
    return error / jnp.maximum(jnp.maximum(*sizes), 1e-30)


class BMojoF(HeadsMixer):
    """A window over tokens and over what a mixer makes of them; the state has that mixer's own,
    "fading".

    inner: one maker of that mixer, called without a name. tie: one set of weights for the keys and
    values of tokens and of F; otherwise F has its own. qk_norm: without it the fading keys, whose
    scale nothing bounds, may take the whole softmax while the memory is not trained yet.
    """

    inner: tuple[Callable[..., Any], ...] = ()
    tie: bool = True
    qk_norm: bool = True

    def make_cell(self):
        return FadingWindow(self.size, self.size, self.window, store_dtype=self.dtype)

    def setup(self):
        super().setup()
        self.fading = self.inner[0](out_scale=1.0)  # F does not join the residual stream
        if not self.tie:
            self.fading_key, self.fading_value = self.projection(), self.projection()

    def fade(self, x, state, ctx):
        """(the cell's inputs, F, the new state, ctx)"""
        xs, _, new = super().inputs(x, state, ctx)
        made, new["fading"], ctx = self.fading(x, state.get("fading"), ctx)
        key, value = (self.key, self.value) if self.tie else (self.fading_key, self.fading_value)
        return Inputs(xs.q, xs.k, xs.v, self.keys(key(made), ctx), value(made)), made, new, ctx

    def inputs(self, x, state, ctx):
        xs, _, new, ctx = self.fade(x, state, ctx)
        return xs, ctx, new

    def publish(self, kept, ctx):
        """What the mixer inside has published."""
        return kept


class BMojo(BMojoF):
    """The same with a store of tokens that F did not foresee; stored, top, threshold, evict: M, m,
    tau and what goes, see `EideticWindow`. predictor: p. The state has the last p F, "predictor".
    """

    stored: int = 64
    top: int = 8
    threshold: float = 0.0
    evict: str = "smallest"
    predictor: int = 4

    def make_cell(self):
        if self.predictor < 1:
            raise ValueError(f"bmojo: predictor must be at least 1; given {self.predictor}")
        return EideticWindow(
            self.size,
            self.size,
            self.window,
            store_dtype=self.dtype,
            stored=self.stored,
            top=self.top,
            threshold=self.threshold,
            evict=self.evict,
        )

    def inputs(self, x, state, ctx):
        xs, made, new, ctx = self.fade(x, state, ctx)
        made = lax.stop_gradient(widen(made))
        tail = state.get("predictor")
        if tail is None:
            tail = jnp.zeros((x.shape[0], self.predictor, self.dim), made.dtype)
        past, new["predictor"] = lags(made, tail, ctx.reset, ctx.write)
        number = jnp.clip(ctx.position, 1, self.predictor)[..., None]
        return (
            EideticInputs(**xs._asdict(), innovation=innovation(made, sum(past) / number)),
            ctx,
            new,
        )


register(
    BlockSpec(
        name="bmojo_f",
        mixer=BMojoF,
        arguments=(1,),
        defaults=("gated_delta_net",),
        paper="Zancato et al. 2024, arXiv 2407.06324",
        cell=lambda: FadingWindow(8, 6, window=3, block=4),
    )
)
register(
    BlockSpec(
        name="bmojo",
        mixer=BMojo,
        arguments=(1,),
        defaults=("gated_delta_net",),
        paper="Zancato et al. 2024, arXiv 2407.06324",
        cell=lambda: EideticWindow(8, 6, window=3, block=2, stored=3, top=2),
        variants={
            "threshold": lambda: EideticWindow(
                8, 6, window=4, stored=3, top=4, threshold=1.0, evict="oldest"
            ),
        },
    )
)
