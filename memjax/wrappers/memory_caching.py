"""Memory Caching: keeps the memory as it stood at the end of each segment, and reads them all.

    y_t = gamma_t M_t(q_t) + sum_i gamma_t^i M^i(q_t),   M^i the memory behind the i-th past segment
    residual  gamma = 1
    grm       gamma = softmax over i and the running segment of u_t . m^i / sqrt(P), m^i the mean
              of the segment's keys, up to t for the running one
    soup      y_t = (gamma_t M_t + sum_i gamma_t^i M^i)(q_t): the weights are mixed, not the answers
    ssc       grm over the running segment and the k past ones with the largest u_t . m^i

Memory Caching, 2026, arXiv 2602.24281, Eq. 4-17: Residual, Gated Residual Memory, Memory Soup and
Sparse Selective Caching. A segment is L written tokens of a document, and is put away when the
token behind it is written. Logarithmic segmentation keeps blocks of 1, 2, 4, .. segments instead,
those of the binary number of past segments; a block's memory is the sum of its segments' (grm of
linear attention with segments of one token: Log-Linear++).

The paper leaves open, and our choice is: means of keys, a gate per head from a projection of its
own (u), gradients through all that is kept, softmax over the selected segments only. Scores are
rounded to bfloat16 for the selection and the newest of equals goes first, so that rounding does not
decide. Past memories are kept in N slots, the oldest is dropped. A segment goes on with the
memory of the one before ("checkpoint") or begins anew ("independent"; residual, logarithmic).

Reading costs every token N memories, k with ssc. What is stable is the wrapped cell's own business.
"""

import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.cell import MemoryCell, initial_state, run
from memjax.nn.layers import Dense
from memjax.nn.mixer import Mixer
from memjax.recurrence import (
    accumulator_dtype,
    from_chunks,
    memories,
    per_head,
    promote,
    select,
    to_chunks,
)
from memjax.registry import CellSpec, get, register
from memjax.typing import Array, Bool, Field, Float, Int, PyTree, fields

MODES = ("residual", "grm", "soup", "ssc")
STARTS = ("checkpoint", "independent")
SEGMENTATIONS = ("constant", "logarithmic")
BLOCK = 64  # queries that are answered together by one memory

dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def scores(pairs: str, u: Array, keys: Array) -> Array:
    """u . m / sqrt(P), over the axes that `pairs` names."""
    return dot(pairs, u, keys) * u.shape[-1] ** -0.5


@functools.cache
def with_gate(inputs: type) -> Any:
    """The type of a cell's inputs with one more leaf, u [B, T, h, P], which asks for segments."""
    leaves: list[tuple[str, Any]] = [
        (name, Annotated[Array, field]) for name, field in fields(inputs).items()
    ]
    return NamedTuple("Inputs", [*leaves, ("u", Annotated[Array, Field("P", "query")])])


class Caches(NamedTuple):
    """running: the inner cell's state. kept: what can be read of past memories, leaves [N, ...],
    the n-th segment of a document in slot n mod N, or a block of 2^n segments in slot n; keys:
    [N, P], their mean keys; free slots hold the initial memory. total: [P], the sum of the running
    segment's keys; place: its written tokens, 0 to L. number: past segments of the document."""

    running: PyTree
    kept: PyTree
    keys: Float[Array, "N P"]
    total: Float[Array, " P"]
    place: Int[Array, ""]
    number: Int[Array, ""]


class Counts(NamedTuple):
    """total, place, number: as in `Caches`. document: of the sequence, from 0."""

    total: Float[Array, " P"]
    place: Int[Array, ""]
    number: Int[Array, ""]
    document: Int[Array, ""]


class Marks(NamedTuple):
    """Where tokens stand. before: of the segment that runs into their window. number: past segments
    of their document. document: of the sequence, from 0. mean: of the keys of their own segment."""

    before: Bool[Array, " T"]
    number: Int[Array, " T"]
    document: Int[Array, " T"]
    mean: Float[Array, "T P"]


class Entries(NamedTuple):
    """Past memories that tokens of a sequence may read.

    kept, keys: what can be read of each, and its mean key. document: of the sequence. first: the
    first segment that it holds, counted in its document. size: how many it holds, 0 for none.
    """

    kept: PyTree
    keys: Float[Array, "E P"]
    document: Int[Array, " E"]
    first: Int[Array, " E"]
    size: Int[Array, " E"]

    def join(self, other: "Entries") -> "Entries":
        """Both, leaves [B, H, E, ...]."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), self, other)


@dataclasses.dataclass(frozen=True)
class MemoryCaching(MemoryCell):
    """inner: the cell whose memories are kept. mode: "residual", "grm", "soup" or "ssc". segment:
    L, written tokens. slots: N, the past memories that are kept. top: k of ssc. start:
    "checkpoint", "independent", or None for that of the mode. segmentation: "constant" or
    "logarithmic" (grm or residual of a linear memory with start "independent"). implementation:
    the form of the inner cell, as in `memjax.run`; changes speed only.
    """

    inner: MemoryCell
    mode: str = "grm"
    segment: int = 256
    slots: int = 16
    top: int = 2
    start: str | None = None
    segmentation: str = "constant"
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for name, allowed in (
            ("mode", MODES),
            ("start", (*STARTS, None)),
            ("segmentation", SEGMENTATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"memory_caching: {name} {getattr(self, name)!r}: allowed are "
                    f"{', '.join(map(str, allowed))}"
                )
        if min(self.segment, self.slots, self.top) < 1:
            raise ValueError(f"memory_caching: segment, slots and top must be >= 1; given {self}")
        kind = type(self.inner)
        if kind is MemoryCaching:
            raise ValueError("memory_caching cannot wrap itself; take more slots")
        if self.mode == "soup" and (kind.step is not MemoryCell.step or not self._mixes()):
            raise ValueError(
                f"memory_caching: soup mixes weights, and {kind.__name__} is not read from weights "
                "alone; use grm"
            )
        if self.segmentation == "logarithmic" and (
            self.mode not in ("grm", "residual")
            or not self.inner.linear
            or not self.independent
            or self.slots > 30
        ):
            raise ValueError(
                "memory_caching: logarithmic segments are for mode grm or residual, a cell that is "
                f"read linearly, start 'independent' and at most 30 slots; given {self}"
            )

    def _mixes(self) -> bool:
        """Whether all that `read` needs are floating-point leaves."""
        cell = self.inner
        params = jax.eval_shape(lambda: cell.init_params(jax.random.key(0), 1))
        one = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), params)
        state = jax.eval_shape(lambda: cell.readable(cell.init_state(one)))
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(state))

    @property
    def inputs(self) -> Any:  # type: ignore[override]  # of this cell, not of the class
        """Those of the inner cell, and u [B, T, h, P]."""
        return with_gate(self.inner.inputs)

    @property
    def independent(self) -> bool:
        """Whether a segment begins with the initial memory."""
        return (self.start or STARTS[self.mode == "residual"]) == "independent"

    @property
    def key(self) -> str:
        """The leaf of the inner inputs whose mean stands for a segment: the keys, or what comes
        nearest."""
        leaves = fields(self.inner.inputs).items()
        order = ("key", "exponent", "value")
        found = [name for kind in order for name, field in leaves if field.kind == kind]
        return found[0]

    def axis(self, letter):
        """P: the channels of a key, all micro-steps or memories together."""
        if letter != "P":
            return self.inner.axis(letter)
        axes = fields(self.inner.inputs)[self.key].shape.split()
        return math.prod(self.inner.axis(a) or 1 for a in axes)

    def init_params(self, key, heads):
        return self.inner.init_params(key, heads)

    def init_state(self, params):
        """The inner cell's, and free slots."""
        state, width = self.inner.init_state(params), self.axis("P")
        kept = jax.tree.map(
            lambda a: jnp.broadcast_to(a, (self.slots, *a.shape)), self.inner.readable(state)
        )
        zero, floating = jnp.zeros((), jnp.int32), jnp.zeros((width,), jnp.float32)
        keys = jnp.zeros((self.slots, width), jnp.float32)
        return Caches(state, kept, keys, floating, zero, zero)

    def sizes(self, number: Int[Array, ""]) -> Int[Array, " N"]:
        """How many segments each slot holds when there are `number` past ones."""
        slot = jnp.arange(self.slots)
        if self.segmentation == "constant":
            return (slot < number).astype(jnp.int32)
        above = number >> slot  # the last slot takes all that is left
        return jnp.where(slot < self.slots - 1, above & 1, above) << slot

    def firsts(self, number: Int[Array, ""]) -> Int[Array, " N"]:
        """The first segment in each slot, counted in the document; any number where it is free."""
        slot = jnp.arange(self.slots)
        if self.segmentation == "constant":
            return number - 1 - (number - 1 - slot) % self.slots
        return jnp.where(slot < self.slots - 1, (number >> (slot + 1)) << (slot + 1), 0)

    # ------------------------------------------------------------ token by token

    def step(self, params, state, x):
        inner, fresh = self.inner.inputs(*x[:-1]), self.inner.init_state(params)
        full = state.place == self.segment
        kept, keys = self._put_away(fresh, state, full)
        running = state.running
        if self.independent:
            running = select(full, fresh, running)
        y, running = self.inner.step(params, running, inner)
        key = getattr(inner, self.key).reshape(-1)
        total = jnp.where(full, 0, state.total) + key.astype(state.total.dtype)
        place = jnp.where(full, 0, state.place) + 1
        state = Caches(running, kept, keys, total, place, state.number + full)
        return self._answer(params, state, x, y), state

    def write(self, params, state, x):
        return self.step(params, state, x)[1]

    def read(self, params, state, x):
        y = self.inner.read(params, state.running, self.inner.inputs(*x[:-1]))
        return self._answer(params, state, x, y)

    def _put_away(self, fresh, state: Caches, full: Bool[Array, ""]):
        """The slots, and their keys, behind a segment that is put away when it is full."""
        held = (state.kept, state.keys)
        one = (self.inner.readable(state.running), state.total / self.segment)
        if self.segmentation == "constant":
            slot = state.number % self.slots
            return jax.tree.map(lambda a, b: a.at[slot].set(jnp.where(full, b, a[slot])), held, one)
        # blocks of 1, 2, .. 2^(j-1) segments and the new one become one of 2^j, as bits carry
        sizes, slot = self.sizes(state.number), jnp.arange(self.slots)
        ones = lax.population_count(state.number ^ (state.number + 1)) - 1
        target = jnp.minimum(ones, self.slots - 1)
        joined = (sizes * (slot <= target)).astype(state.keys.dtype)
        share = jnp.minimum(joined, 1)  # memories are summed, keys averaged
        empty = (self.inner.readable(fresh), jnp.zeros_like(state.total))

        def put(all, one, empty, weights, norm):
            merged = (one + dot("n,n...->...", weights, all)) / norm
            new = jnp.where(jnp.expand_dims(slot == target, range(1, all.ndim)), merged, all)
            new = jnp.where(jnp.expand_dims(slot < target, range(1, all.ndim)), empty, new)
            return jnp.where(full, new, all)

        kept = jax.tree.map(lambda a, b, c: put(a, b, c, share, 1), held[0], one[0], empty[0])
        return kept, put(held[1], one[1], empty[1], joined, 1 + jnp.sum(joined))

    def _answer(self, params, state: Caches, x, y):
        """The answer of one token, y being that of the running memory."""
        x, u = self.inner.inputs(*x[:-1]), x.u
        mean = state.total / jnp.maximum(state.place, 1)
        there, kept, keys = self.sizes(state.number) > 0, state.kept, state.keys
        if self.mode == "ssc":
            chosen = self._select(scores("p,np->n", u, keys), there, self.firsts(state.number))
            there, kept, keys = jax.tree.map(lambda a: a[chosen], (there, kept, keys))
        gates, own = self._gates(scores("p,np->n", u, keys), there, scores("p,p->", u, mean))
        if self.mode == "soup":
            mixed = jax.tree.map(
                lambda a, b: own * a + dot("n,n...->...", gates, b),
                self.inner.readable(state.running),
                kept,
            )
            return self.inner.read(params, mixed, x)
        answers = jax.vmap(self.inner.read, (None, 0, None))(params, kept, x)
        return own * y + dot("n,n...->...", gates, answers)

    def _gates(self, logits, there, own):
        """gamma of past memories [..., N] and of the running one [...]."""
        if self.mode == "residual":
            return there.astype(logits.dtype), jnp.ones_like(own)
        logits = jnp.where(there, logits, -jnp.inf)
        gates = jax.nn.softmax(jnp.concatenate([logits, own[..., None]], axis=-1), axis=-1)
        return gates[..., :-1], gates[..., -1]

    def _select(self, logits, there, first):
        """The k memories of the largest scores, the newest of equals first: [..., k]."""
        rounded = jnp.where(there, logits, -jnp.inf).astype(jnp.bfloat16).astype(jnp.float32)
        first = jnp.broadcast_to(first, logits.shape)
        index = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
        order = lax.sort((-lax.stop_gradient(rounded), -first, index), num_keys=2)[2]
        return order[..., : self.top]

    # ------------------------------------------------------------ segment by segment

    def chunked(self, params, state, xs, reset, write):
        """First the running memory, in windows of L tokens, by any form of the inner cell; then
        all tokens read what was kept."""
        if self.mode == "soup" and not self.inner.linear:
            raise NotImplementedError(
                f"soup of {type(self.inner).__name__} mixes weights for every token; use 'scan', "
                "or grm"
            )
        dtype, heads = accumulator_dtype(params, state, xs), memories(params, state, xs)
        output, (batch, length) = jax.tree.leaves(xs)[0].dtype, jax.tree.leaves(xs)[0].shape[:2]
        params, xs = promote((params, xs), dtype)
        start = initial_state(self, params, batch, heads, dtype)
        written = jnp.ones((batch, length, 1), bool)
        if write is not None:
            written = write[..., None] if write.ndim == 2 else write
        written = jnp.broadcast_to(written, (batch, length, heads))
        if state is None and reset is None and write is None:
            y, marks, entries, last = self._aligned(params, start, xs, written)
        else:
            begin = start if state is None else state
            y, marks, entries, last = self._windows(params, start, begin, xs, reset, written)
            if state is not None:
                entries = self._held(state).join(entries)
        _, final = self._final(params, (last, entries), (marks.document,), None, None)
        y, _ = self._read_all(params, entries, (xs, y, marks), None, None)
        return y.astype(output), final

    def _windows(self, params, start: Caches, state: Caches, xs, reset, written):
        """(y of the running memory, marks, entries, what runs on), in windows of L tokens at most.

        The running document crosses one border of segments in a window at most, and those that
        begin in it none: two runs, up to the border and behind it, are exact.
        """
        length = written.shape[1]
        keys, inner = self._keys(xs)
        windows = split((keys, inner, reset, written), min(self.segment, length))

        def window(carry, inputs):
            running, counts = carry
            keys, x, reset, written = inputs
            marks, (counts, entry) = self._mark({}, counts, keys, reset, written)
            first = self._run(params, x, running, None, written & marks.before)
            begin = first[1]
            if self.independent:
                begin = select(entry.size > 0, start.running, begin)
            second = self._run(params, x, begin, reset, written & ~marks.before)
            y = select(marks.before, first[0], second[0])
            entry = entry._replace(kept=self.inner.readable(first[1]))
            return (second[1], counts), (y, marks, entry)

        document = jnp.zeros_like(state.place)
        counts = Counts(state.total, state.place, state.number, document)
        last, (y, marks, entries) = lax.scan(window, (state.running, counts), windows)
        entries = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), entries)
        return *join((y, marks), length), entries, last

    def _aligned(self, params, start: Caches, xs, written):
        """The same for one document from its start, a window being a segment."""
        length = written.shape[1]
        keys, inner = self._keys(xs)
        keys, inner, written = split((keys, inner, written), min(self.segment, length))
        zero, windows = jnp.zeros_like(start.place), len(written)
        number = jnp.broadcast_to(
            jnp.arange(windows, dtype=jnp.int32)[:, None, None], (windows, *zero.shape)
        )

        def mark(keys, number, written):
            counts = Counts(start.total, zero, number, zero)
            marks, (counts, _) = self._mark({}, counts, keys, None, written)
            return marks, counts

        marks, counts = jax.vmap(mark)(keys, number, written)
        padded = None if length % written.shape[2] == 0 else written
        if self.independent:  # all segments at once
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (inner, padded))
            y, ends = self._run(params, flat[0], None, None, flat[1])
            y, ends = jax.tree.map(lambda a: a.reshape(*number.shape[:2], *a.shape[1:]), (y, ends))
        else:

            def segment(running, inputs):
                y, running = self._run(params, inputs[0], running, None, inputs[1])
                return running, (y, running)

            _, (y, ends) = lax.scan(segment, start.running, (inner, padded))
        past = jax.tree.map(
            lambda a: jnp.moveaxis(a[:-1], 0, 2),
            Entries(
                self.inner.readable(ends),
                counts.total / self.segment,
                jnp.zeros_like(number),
                number,
                jnp.ones_like(number),
            ),
        )
        last = jax.tree.map(lambda a: a[-1], (ends, counts))
        return *join((y, marks), length), past, last

    def _run(self, params, xs, state, reset, write):
        given = dict(state=state, reset=reset, write=write)
        return run(self.inner, params, xs, **given, implementation=self.implementation)

    def _keys(self, xs):
        """The keys of tokens [B, T, h, P], and the inner cell's inputs."""
        inner = self.inner.inputs(*xs[:-1])
        key = getattr(inner, self.key)
        return key.reshape(*key.shape[:3], -1), inner

    def _held(self, state: Caches) -> Entries:
        """The slots in front of a sequence, leaves [B, H, N, ...]."""
        every = jax.vmap(jax.vmap(lambda n: (self.firsts(n), self.sizes(n))))
        first, size = every(state.number)
        return Entries(state.kept, state.keys, jnp.zeros_like(size), first, size)

    @per_head
    def _mark(self, params, counts: Counts, keys, reset, written):
        """Marks of a window's tokens, the counts behind it, and the entry that a segment leaves
        which ends in it, without its memory."""
        del params
        document = jnp.zeros(len(written), jnp.int32)
        if reset is not None:
            document = jnp.cumsum(reset.astype(jnp.int32))
        live, number = document == 0, jnp.cumsum(written.astype(jnp.int32))
        before = live & (counts.place + number <= self.segment)
        segment = jnp.where(before, 0, document + 1)
        keys = jnp.where(written[:, None], keys, 0)  # what is not written may be NaN
        same = jnp.tril(segment[:, None] == segment).astype(keys.dtype)
        totals = dot("ts,sp->tp", same, keys) + jnp.where(before[:, None], counts.total, 0)
        same = jnp.tril(segment[:, None] == segment) & written
        places = jnp.sum(same, axis=1, dtype=jnp.int32) + jnp.where(before, counts.place, 0)
        numbers = jnp.where(live, counts.number + ~before, 0)
        marks = Marks(
            before,
            numbers,
            counts.document + document,
            totals / jnp.maximum(places, 1)[:, None].astype(totals.dtype),
        )
        ending = counts.total + jnp.sum(jnp.where(before[:, None], keys, 0), axis=0)
        size = jnp.any(live & ~before).astype(jnp.int32)
        entry = Entries(None, ending / self.segment, counts.document, counts.number, size)
        last = Counts(totals[-1], places[-1], numbers[-1], marks.document[-1])
        return marks, (last, entry)

    @per_head
    def _final(self, params, given, document, reset, write):
        """The state behind the sequence."""
        (running, counts), entries = given
        fresh = self.fresh(params, counts.total.dtype)
        there = (entries.size > 0) & (entries.document == counts.document)
        held, free = (entries.kept, entries.keys), (fresh.kept, fresh.keys)
        if self.segmentation == "constant":
            wanted = self.firsts(counts.number)[:, None]
            take = there & (entries.first == wanted) & (wanted >= 0)
            index = jnp.argmax(jnp.pad(take, ((0, 0), (0, 1)), constant_values=True), axis=1)
            kept, keys = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:1]])[index], held, free)
        else:
            level = self._level(counts.number, entries.first)
            take = there & (level == jnp.arange(self.slots)[:, None])
            size = (take * entries.size).astype(entries.keys.dtype)
            number = jnp.maximum(jnp.sum(size, axis=1, keepdims=True), 1)
            kept, keys = jax.tree.map(
                lambda a, b, weight: select(
                    jnp.any(take, axis=1), dot("ne,e...->n...", weight, a), b
                ),
                held,
                free,
                (jax.tree.map(lambda a: take.astype(a.dtype), held[0]), size / number),
            )
        return document, Caches(running, kept, keys, counts.total, counts.place, counts.number)

    def _level(self, number, first):
        """The slot of a segment among `number` past ones, for logarithmic segments."""
        return jnp.minimum(31 - lax.clz(number ^ first), self.slots - 1)

    @per_head
    def _read_all(self, params, entries: Entries, tokens, reset, write):
        """The answers of all tokens, of which those of the running memory are given."""
        xs, y, marks = tokens
        if not len(entries.size) or not len(y):
            return y, entries
        if self.mode == "ssc":
            return self._read_selected(params, entries, xs, y, marks), entries

        @jax.checkpoint
        def block(inputs):
            xs, y, marks = inputs
            gates, own = self._gates_of(entries, xs.u, marks)
            one = jax.vmap(self.inner.read, (None, 0, None))
            answers = jax.vmap(one, (None, None, 0))(
                params, entries.kept, self.inner.inputs(*xs[:-1])
            )
            return dot("t,t...->t...", own, y) + dot("te,te...->t...", gates, answers)

        blocks = to_chunks(tokens, min(BLOCK, len(y)))
        return from_chunks(lax.map(block, blocks), len(y)), entries

    def _seen(self, entries: Entries, marks: Marks) -> Bool[Array, "T E"]:
        """Whether a token may read an entry."""
        number = marks.number[:, None]
        seen = (entries.size > 0) & (entries.document == marks.document[:, None])
        seen = seen & (entries.first < number)
        if self.segmentation == "constant":
            seen = seen & (entries.first >= number - self.slots)
        return seen

    def _gates_of(self, entries: Entries, u, marks: Marks):
        """gamma of entries [T, E] and of the running memory [T]."""
        seen, own = self._seen(entries, marks), scores("tp,tp->t", u, marks.mean)
        if self.segmentation == "constant" or self.mode == "residual":
            return self._gates(scores("tp,ep->te", u, entries.keys), seen, own)
        level = self._level(marks.number[:, None], entries.first)
        member = (seen[..., None] & (level[..., None] == jnp.arange(self.slots))).astype(u.dtype)
        sizes = member * entries.size[:, None].astype(u.dtype)
        number = jnp.sum(sizes, axis=1)
        keys = dot("ten,ep->tnp", sizes / jnp.maximum(number, 1)[:, None], entries.keys)
        gates, own = self._gates(scores("tp,tnp->tn", u, keys), number > 0, own)
        return dot("tn,ten->te", gates, member), own

    def _read_selected(self, params, entries: Entries, xs, y, marks: Marks):
        """The same for ssc: (token, memory) pairs are sorted by memory, and a block of them is
        answered by one memory."""
        seen, u = self._seen(entries, marks), xs.u
        logits = scores("tp,ep->te", u, entries.keys)
        chosen = self._select(logits, seen, entries.first)
        logits, there = (jnp.take_along_axis(a, chosen, axis=1) for a in (logits, seen))
        gates, own = self._gates(logits, there, scores("tp,tp->t", u, marks.mean))
        length, top = chosen.shape
        number, size = len(entries.size), min(BLOCK, length)
        pair = jnp.where(there, chosen, number).reshape(-1)
        order = jnp.argsort(pair, stable=True)
        owners = pair[order]
        counts = jnp.bincount(pair, length=number)
        room = -(-counts // size) * size
        rank = jnp.arange(pair.size) - (jnp.cumsum(counts) - counts)[owners]
        blocks = pair.size // size + number
        end = blocks * size
        slot = jnp.where(owners < number, (jnp.cumsum(room) - room)[owners] + rank, end)
        slot = jnp.zeros_like(slot).at[order].set(slot)
        token = jnp.zeros(end, slot.dtype).at[slot].set(jnp.arange(pair.size) // top, mode="drop")
        owner = jnp.searchsorted(jnp.cumsum(room), jnp.arange(blocks) * size, side="right")
        kept = jax.tree.map(lambda a: a[jnp.minimum(owner, number - 1)], entries.kept)
        queries = jax.tree.map(
            lambda a: a[token].reshape(blocks, size, *a.shape[1:]), self.inner.inputs(*xs[:-1])
        )
        read = jax.vmap(jax.vmap(self.inner.read, (None, None, 0)), (None, 0, 0))
        answers = read(params, kept, queries)
        answers = answers.reshape(end, *answers.shape[2:])
        answers = answers.at[slot].get(mode="fill", fill_value=0).reshape(length, top, *y.shape[1:])
        return dot("t,t...->t...", own, y) + dot("te,te...->t...", gates, answers)


def split(tree: PyTree, size: int) -> PyTree:
    """Leaves [B, T, ...] as windows [W, B, size, ...], padded with zeros."""

    def one(leaf):
        chunks = to_chunks(jnp.moveaxis(leaf, 1, 0), size)
        return jnp.moveaxis(chunks, 1, 2)

    return jax.tree.map(one, tree)


def join(tree: PyTree, length: int) -> PyTree:
    """Windows [W, B, size, ...] as leaves [B, T, ...], without the padding."""

    def one(leaf):
        return jnp.moveaxis(from_chunks(jnp.moveaxis(leaf, 2, 1), length), 0, 1)

    return jax.tree.map(one, tree)


class MemoryCachingMixer(Mixer):
    """Any mixer with its memory cached; u = W_u x. The options are those of the cell."""

    inner: tuple[Any, ...] = ()
    mode: str = "grm"
    segment: int = 256
    slots: int = 16
    top: int = 2
    start: str | None = None
    segmentation: str = "constant"

    @property
    def template(self) -> Mixer:
        """The inner mixer, without parameters."""
        return self.inner[0](parent=None)

    def make_cell(self):
        return MemoryCaching(
            self.template.make_cell(),
            self.mode,
            self.segment,
            self.slots,
            self.top,
            self.start,
            self.segmentation,
            self.template.implementation,
        )

    def setup(self):
        self.cell, self.wrapped = self.make_cell(), self.inner[0]()
        shape = self.memories, self.cell.axis("P")
        self.ask = Dense(shape, ("heads", None), std=self.std, dtype=self.dtype)

    @property
    def memories(self):
        return self.template.memories

    def inputs(self, x, state, ctx):
        xs, kept, new = self.wrapped.inputs(x, state, ctx)
        return self.cell.inputs(*xs, self.ask(x)), kept, new

    def weights(self, kept):
        return self.wrapped.weights(kept)

    def outputs(self, y, kept):
        return self.wrapped.outputs(y, kept)

    def publish(self, kept, ctx):
        return self.wrapped.publish(kept, ctx)


def example(inner: str = "gated_delta_net", **options: Any) -> MemoryCaching:
    """A small cell for tests, around the one that `inner` is tested with."""
    return MemoryCaching(get(inner).cell(), **{"segment": 5, "slots": 3, **options})


register(
    CellSpec(
        name="memory_caching",
        cell=example,
        mixer=MemoryCachingMixer,
        paper="Memory Caching, 2026, arXiv 2602.24281",
        recurrence="y = Σ γᵢ Mᵢ(q) over the memories at the ends of past segments and the last one",
        arguments=(1,),
        defaults=("gated_delta_net",),
        variants={
            "residual": lambda: example("linear_attention", mode="residual"),
            "soup": lambda: example("titans", mode="soup"),
            "ssc": lambda: example(mode="ssc", top=2),
            "logarithmic": lambda: example(
                "linear_attention", start="independent", segmentation="logarithmic", segment=2
            ),
            "titans": lambda: example("titans", start="independent"),
        },
    )
)
