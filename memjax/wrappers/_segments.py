"""Memory Caching over whole sequences: the running memory first, then what every token reads.

The running memory goes over the tokens in windows of L, in any form of the inner cell, and leaves
the memories at the ends of segments (`Entries`); then all tokens read those that they may see.
`cell` is the `MemoryCaching` of the file beside this one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.cell import initial_state, run
from memjax.recurrence import (
    accumulator_dtype,
    dot,
    from_chunks,
    memories,
    per_head,
    promote,
    select,
    to_chunks,
)
from memjax.typing import Array, Bool, Float, Int, PyTree

BLOCK = 64  # queries that are answered together by one memory


def scores(pairs: str, u: Array, keys: Array) -> Array:
    """u . m / sqrt(P), over the axes that `pairs` names."""
    return dot(pairs, u, keys) * u.shape[-1] ** -0.5


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
    """Where tokens stand. number: past segments of their document. document: of the sequence, from
    0. mean: of the keys of their own segment, up to them."""

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


def chunked(cell, params, state, xs, reset, write):
    """First the running memory, in windows of L tokens, by any form of the inner cell; then
    all tokens read what was kept."""
    dtype, heads = accumulator_dtype(params, state, xs), memories(params, state, xs)
    output, (batch, length) = jax.tree.leaves(xs)[0].dtype, jax.tree.leaves(xs)[0].shape[:2]
    params, xs = promote((params, xs), dtype)
    begin = start = initial_state(cell, params, batch, heads, dtype)
    written = jnp.ones((batch, length, heads), bool)
    if write is not None:
        write = write.reshape(batch, length, -1)
        written = jnp.repeat(write, heads // write.shape[2], axis=2)
    if state is None and reset is None and write is None:
        y, marks, entries, last = aligned(cell, params, start, xs, written)
    else:
        begin = begin if state is None else state
        y, marks, entries, last = windows(cell, params, start, begin, xs, reset, written)
        if state is not None:
            entries = held(cell, state).join(entries)
    slots = begin.kept, begin.keys, begin.number
    _, final = state_behind(cell, params, (last, entries, slots), (marks.document,), None, None)
    y, _ = read_all(cell, params, entries, (xs, y, marks), None, None)
    return y.astype(output), final


def windows(cell, params, start: Caches, state: Caches, xs, reset, written):
    """(y of the running memory, marks, entries, what runs on), in windows of L tokens at most.

    The running document crosses one border of segments in a window at most, and those that
    begin in it none: two runs, up to the border and behind it, are exact.
    """
    length = written.shape[1]
    keys, inner = keys_of(cell, xs)
    parts = split((keys, inner, reset, written), min(cell.segment, length))

    def window(carry, inputs):
        running, counts = carry
        keys, x, reset, written = inputs
        (before, marks), (counts, entry) = mark(cell, {}, counts, keys, reset, written)
        first = run_inner(cell, params, x, running, None, written & before)
        begin = first[1]
        if cell.independent:
            begin = select(entry.size > 0, start.running, begin)
        second = run_inner(cell, params, x, begin, reset, written & ~before)
        y = select(before, first[0], second[0])
        entry = entry._replace(kept=cell.inner.readable(first[1]))
        return (second[1], counts), (y, marks, entry)

    document = jnp.zeros_like(state.place)
    counts = Counts(state.total, state.place, state.number, document)
    last, (y, marks, entries) = lax.scan(window, (state.running, counts), parts)
    entries = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), entries)
    return *join((y, marks), length), entries, last


def aligned(cell, params, start: Caches, xs, written):
    """The same for one document from its start, a window being a segment."""
    length = written.shape[1]
    keys, inner = keys_of(cell, xs)
    keys, inner, written = split((keys, inner, written), min(cell.segment, length))
    heads = start.place.shape[1]
    shape = (len(written), *start.place.shape)
    number = jnp.broadcast_to(jnp.arange(len(written), dtype=jnp.int32)[:, None, None], shape)
    totals = jnp.cumsum(jnp.where(written[..., : keys.shape[3], None], keys, 0), axis=2)
    places = jnp.cumsum(written, axis=2, dtype=jnp.int32)
    each = jnp.broadcast_to(number[:, :, None], written.shape)
    mean = totals / places[..., : keys.shape[3], None].astype(totals.dtype)
    marks = Marks(each, jnp.zeros_like(each), mean)
    total = jnp.repeat(totals[:, :, -1], heads // keys.shape[3], axis=2)
    counts = Counts(total, places[:, :, -1], number, jnp.zeros_like(number))
    padded = None if length % written.shape[2] == 0 else written
    if cell.independent:  # all segments at once
        begin = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(number), *a.shape)), start.running)
        if memories(params, None, inner) == heads:
            begin = None  # the inner cell may have a faster form from its initial state
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (inner, begin, padded))
        y, ends = run_inner(cell, params, flat[0], flat[1], None, flat[2])
        y, ends = jax.tree.map(lambda a: a.reshape(*number.shape[:2], *a.shape[1:]), (y, ends))
    else:

        def segment(running, inputs):
            y, running = run_inner(cell, params, inputs[0], running, None, inputs[1])
            return running, (y, running)

        _, (y, ends) = lax.scan(segment, start.running, (inner, padded))
    past = jax.tree.map(
        lambda a: jnp.moveaxis(a[:-1], 0, 2),
        Entries(
            cell.inner.readable(ends),
            counts.total / cell.segment,
            jnp.zeros_like(number),
            number,
            jnp.ones_like(number),
        ),
    )
    last = jax.tree.map(lambda a: a[-1], (ends, counts))
    return *join((y, marks), length), past, last


def run_inner(cell, params, xs, state, reset, write):
    given = dict(state=state, reset=reset, write=write)
    return run(cell.inner, params, xs, **given, implementation=cell.implementation)


def keys_of(cell, xs):
    """The keys of tokens [B, T, h, P], and the inner cell's inputs."""
    inner = cell.inner.inputs(*xs[:-1])
    key = getattr(inner, cell.key)
    return key.reshape(*key.shape[:3], -1), inner


def held(cell, state: Caches) -> Entries:
    """The slots in front of a sequence, leaves [B, H, N, ...]."""
    every = jax.vmap(jax.vmap(lambda n: (cell.firsts(n), cell.sizes(n))))
    first, size = every(state.number)
    return Entries(state.kept, state.keys, jnp.zeros_like(size), first, size)


@per_head
def mark(cell, params, counts: Counts, keys, reset, written):
    """Whether each token of a window is of the segment that runs into it, and its marks; the counts
    behind the window, and the entry that a segment leaves which ends in it, without its memory."""
    del params
    document = jnp.zeros(len(written), jnp.int32)
    if reset is not None:
        document = jnp.cumsum(reset.astype(jnp.int32))
    live, number = document == 0, jnp.cumsum(written.astype(jnp.int32))
    before = live & (counts.place + number <= cell.segment)
    segment = jnp.where(before, 0, document + 1)
    keys = jnp.where(written[:, None], keys, 0)  # what is not written may be NaN
    same = jnp.tril(segment[:, None] == segment).astype(keys.dtype)
    totals = dot("ts,sp->tp", same, keys) + jnp.where(before[:, None], counts.total, 0)
    same = jnp.tril(segment[:, None] == segment) & written
    places = jnp.sum(same, axis=1, dtype=jnp.int32) + jnp.where(before, counts.place, 0)
    numbers = jnp.where(live, counts.number + ~before, 0)
    marks = Marks(
        numbers,
        counts.document + document,
        totals / jnp.maximum(places, 1)[:, None].astype(totals.dtype),
    )
    ending = counts.total + jnp.sum(jnp.where(before[:, None], keys, 0), axis=0)
    size = jnp.any(live & ~before).astype(jnp.int32)
    entry = Entries(None, ending / cell.segment, counts.document, counts.number, size)
    last = Counts(totals[-1], places[-1], numbers[-1], marks.document[-1])
    return (before, marks), (last, entry)


@per_head
def state_behind(cell, params, given, document, reset, write):
    """The state behind the sequence."""
    (running, counts), entries, (*slots, number) = given
    fresh = cell.fresh(params, counts.total.dtype)
    there = (entries.size > 0) & (entries.document == counts.document)
    untouched = untouched_slots(cell, number, counts)
    held = entries.kept, entries.keys
    free = select(untouched, tuple(slots), (fresh.kept, fresh.keys))
    if cell.segmentation == "constant":
        wanted = cell.firsts(counts.number)[:, None]
        take = there & (entries.first == wanted) & (wanted >= 0)
        ones = jnp.eye(cell.slots, dtype=bool)  # the free slots stand behind all entries
        index = jnp.argmax(jnp.concatenate([take, ones], axis=1), axis=1)
        kept, keys = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[index], held, free)
    else:
        level = level_of(cell, counts.number, entries.first)
        take = there & (level == jnp.arange(cell.slots)[:, None])
        size = (take * entries.size).astype(entries.keys.dtype)
        number = jnp.maximum(jnp.sum(size, axis=1, keepdims=True), 1)
        kept, keys = jax.tree.map(
            lambda a, b, weight: select(jnp.any(take, axis=1), dot("ne,e...->n...", weight, a), b),
            held,
            free,
            (jax.tree.map(lambda a: take.astype(a.dtype), held[0]), size / number),
        )
    return document, Caches(running, kept, keys, counts.total, counts.place, counts.number)


def untouched_slots(cell, number, counts: Counts) -> Bool[Array, " N"]:
    """Those that the sequence did not empty, when it began behind `number` segments."""
    running = counts.document == 0
    if cell.segmentation == "constant":
        return jnp.full(cell.slots, running)
    carries = jnp.arange(1, cell.slots + 1)  # out of a slot: what empties it
    return running & (counts.number >> carries == number >> carries)


def level_of(cell, number, first):
    """The slot of a segment among `number` past ones, for logarithmic segments."""
    differ = (number ^ first).astype(jnp.int32)  # `first` is wider where float64 is allowed
    return jnp.minimum(31 - lax.clz(differ), cell.slots - 1)


@per_head
def read_all(cell, params, entries: Entries, tokens, reset, write):
    """The answers of all tokens, of which those of the running memory are given."""
    xs, y, marks = tokens
    if not len(entries.size) or not len(y):
        return y, entries
    if cell.mode == "ssc":
        return read_selected(cell, params, entries, xs, y, marks), entries

    size = min(BLOCK, len(y))
    most = len(entries.size)  # that the tokens of a block may see
    if cell.segmentation == "constant":
        most = min(most, cell.slots + size // cell.segment + 2)

    @jax.checkpoint
    def block(inputs):
        xs, y, marks = inputs
        useless = ~jnp.any(visible(cell, entries, marks), axis=0)
        some = jax.tree.map(lambda a: a[jnp.argsort(useless, stable=True)[:most]], entries)
        gates, own = gates_of(cell, some, xs.ask, marks)
        one = jax.vmap(cell.inner.read, (None, 0, None))
        answers = jax.vmap(one, (None, None, 0))(params, some.kept, cell.inner.inputs(*xs[:-1]))
        seen = visible(cell, some, marks)  # a memory that is not seen may have overflown
        answers = jnp.where(jnp.expand_dims(seen, range(2, answers.ndim)), answers, 0)
        return dot("t,t...->t...", own, y) + dot("te,te...->t...", gates, answers)

    blocks = to_chunks(tokens, size)
    return from_chunks(lax.map(block, blocks), len(y)), entries


def visible(cell, entries: Entries, marks: Marks) -> Bool[Array, "T E"]:
    """Whether a token may read an entry."""
    number = marks.number[:, None]
    seen = (entries.size > 0) & (entries.document == marks.document[:, None])
    seen = seen & (entries.first < number)
    if cell.segmentation == "constant":
        seen = seen & (entries.first >= number - cell.slots)
    return seen


def gates_of(cell, entries: Entries, u, marks: Marks):
    """gamma of entries [T, E] and of the running memory [T]."""
    seen, own = visible(cell, entries, marks), scores("tp,tp->t", u, marks.mean)
    if cell.segmentation == "constant" or cell.mode == "residual":
        return cell.gates(scores("tp,ep->te", u, entries.keys), seen, own)
    level = level_of(cell, marks.number[:, None], entries.first)
    member = (seen[..., None] & (level[..., None] == jnp.arange(cell.slots))).astype(u.dtype)
    sizes = member * entries.size[:, None].astype(u.dtype)
    number = jnp.sum(sizes, axis=1)
    keys = dot("ten,ep->tnp", sizes / jnp.maximum(number, 1)[:, None], entries.keys)
    gates, own = cell.gates(scores("tp,tnp->tn", u, keys), number > 0, own)
    return dot("tn,ten->te", gates, member), own


def read_selected(cell, params, entries: Entries, xs, y, marks: Marks):
    """The same for ssc: (token, memory) pairs are sorted by memory, and a block of them is
    answered by one memory."""
    seen, u = visible(cell, entries, marks), xs.ask
    logits = scores("tp,ep->te", u, entries.keys)
    chosen = cell.choose(logits, seen, entries.first)
    logits, there = (jnp.take_along_axis(a, chosen, axis=1) for a in (logits, seen))
    gates, own = cell.gates(logits, there, scores("tp,tp->t", u, marks.mean))
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
        lambda a: a[token].reshape(blocks, size, *a.shape[1:]), cell.inner.inputs(*xs[:-1])
    )
    read = jax.vmap(jax.vmap(cell.inner.read, (None, None, 0)), (None, 0, 0))
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
