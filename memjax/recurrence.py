"""What every recurrence shares: heads, dtypes, chunks, document borders, the time scan."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax import spans
from memjax.axes import platform
from memjax.typing import Array, Bool, DTypeLike, Float, Int, PyTree, Shaped

# Products that touch states and decays; jax's default is narrower on accelerators.
dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def accumulator_dtype(*trees: PyTree) -> DTypeLike:
    """float64 when a leaf is float64, otherwise float32: the dtype of states and decays."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(trees)}
    return jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32


def promote(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating leaves that are narrower than `dtype`; leaves the others alone."""

    def cast(leaf):
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if narrow and leaf.dtype != dtype else leaf

    return jax.tree.map(cast, tree)


def select(condition: Bool[Array, "..."], on_true: PyTree, on_false: PyTree) -> PyTree:
    """`where` over two trees of the same structure, for a condition with fewer axes than a leaf."""

    def choose(a, b):
        return jnp.where(jnp.expand_dims(condition, range(condition.ndim, a.ndim)), a, b)

    return jax.tree.map(choose, on_true, on_false)


def per_head(form: Callable, axis: int = 1) -> Callable:
    """Lifts a sequence form that is written for one head of one sequence to whole batches.

    The form gets `params` of one memory, `state` of one memory or None, `xs` with leaves
    [T, ...], `reset` and `write` [T] or None, and returns (y [T, ...], state). The lifted form
    takes params [H, ...], state [B, H, ...], xs [B, T, h, ...], reset [B, T] and write [B, T] or
    [B, T, h], where every h divides the next larger one and the largest is H. Leaves with fewer
    heads are shared by vmap and never repeated in memory. axis: where the heads stand in the first
    result of one sequence, behind the time of answers or in front of all.
    """

    @functools.wraps(form)
    def lifted(self, params, state, xs, reset, write):
        heads = memories(params, state, xs)
        if write is not None and write.ndim == 2:
            write = write[:, :, None]
        given = {heads, *(leaf.shape[2] for leaf in jax.tree.leaves((xs, write)))}
        counts = sorted(given - {1})  # a leaf with h heads is mapped where counts[level] <= h
        if any(many % few for few, many in zip(counts, counts[1:], strict=False)):
            raise ValueError(f"head counts {counts}: each must divide the next")
        axes = (0, 0, 1, 1)  # of the heads, for one sequence

        def split(tree, axis):
            factors = [b // a for a, b in zip([1, *counts], counts, strict=False)]

            def reshape(leaf):
                mapped = sum(count <= leaf.shape[axis] for count in counts)
                return leaf.reshape(
                    (*leaf.shape[:axis], *factors[:mapped], *leaf.shape[axis + 1 :])
                )

            return jax.tree.map(reshape, tree)

        def merge(tree, axis):
            after = axis + len(counts)
            return jax.tree.map(lambda a: a.reshape(*a.shape[:axis], heads, *a.shape[after:]), tree)

        def mapped_axes(tree, axis, count):
            return jax.tree.map(lambda a: axis if count <= a.shape[axis] else None, tree)

        def one_sequence(state, xs, reset, write):
            def one_head(params, state, xs, write):
                return form(self, params, state, xs, reset, write)

            trees = (params, state, xs, write)
            for count in reversed(counts):
                in_axes = tuple(mapped_axes(t, a, count) for t, a in zip(trees, axes, strict=True))
                one_head = jax.vmap(one_head, in_axes=in_axes, out_axes=(axis, 0))
            y, state = one_head(*(split(t, a) for t, a in zip(trees, axes, strict=True)))
            return merge(y, axis), merge(state, 0)

        return jax.vmap(one_sequence)(state, xs, reset, write)

    return lifted


per_state = functools.partial(per_head, axis=0)  # lifts a fold (see `MemoryCell.fold`)


def memories(params: PyTree, state: PyTree, xs: PyTree) -> int:
    """H, the number of memories of a layer: of its parameters, its state, or its widest input."""
    if jax.tree.leaves(params):
        return jax.tree.leaves(params)[0].shape[0]
    if jax.tree.leaves(state):
        return jax.tree.leaves(state)[0].shape[1]
    return max(leaf.shape[2] for leaf in jax.tree.leaves(xs))


def by_head(tree: PyTree, heads: int) -> PyTree:
    """Leaves [B, T, h, ...], repeated for `heads` memories where several share one."""
    return jax.tree.map(lambda a: jnp.repeat(a, heads // a.shape[2], axis=2), tree)


def written_tokens(
    write: Bool[Array, "B T"] | Bool[Array, "B T h"] | None, batch: int, length: int
) -> Bool[Array, "B T h"]:
    """Which tokens are written, with an axis of heads."""
    if write is None:
        return jnp.ones((batch, length, 1), bool)
    return write[..., None] if write.ndim == 2 else write


def scan_tokens(step, read, fresh, state, xs, reset, write) -> tuple[PyTree, PyTree]:
    """One head, token by token: the definition that all other forms are compared with.

    step(state, x) -> (y, state) and read(state, x) -> y are the cell's; fresh is its initial
    state. A reset token first replaces the state by `fresh`; a token that is not written reads
    the state and leaves it as it is. A single token runs without a loop.
    """

    def token(state, inputs):
        x, first, written = inputs
        if first is not None:
            state = select(first, fresh, state)
        y, new = step(state, x)
        if written is not None:
            y = select(written, y, read(state, x))
            new = select(written, new, state)
        return new, y

    inputs = (xs, reset, write)
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        state, y = token(state, jax.tree.map(lambda a: a[0], inputs))
        return jax.tree.map(lambda a: a[None], y), state
    state, y = lax.scan(token, state, inputs)
    return y, state


def passing(
    g: Float[Array, "T ..."], reset: Bool[Array, " T"] | None, write: Bool[Array, " T"] | None
) -> Float[Array, "..."]:
    """The log decay over all tokens, of their log decays: -inf where a document begins in them."""
    if write is not None:
        g = select(write, g, jnp.zeros_like(g))
    total = jnp.sum(g, axis=0)
    return total if reset is None else jnp.where(jnp.any(reset), -jnp.inf, total)


def to_chunks(tree: PyTree, size: int) -> PyTree:
    """Pads leaves [T, ...] with zeros to a multiple of `size` and splits them into [N, C, ...]."""

    def split(leaf):
        pad = -leaf.shape[0] % size
        leaf = jnp.pad(leaf, ((0, pad),) + ((0, 0),) * (leaf.ndim - 1))
        return leaf.reshape(-1, size, *leaf.shape[1:])

    return jax.tree.map(split, tree)


def from_chunks(y: Shaped[Array, "N C ..."], length: int) -> Shaped[Array, "T ..."]:
    """Joins chunks and drops the padding."""
    return y.reshape(-1, *y.shape[2:])[:length]


def running(
    join: Callable[[PyTree, PyTree], PyTree],
    step: Callable[[PyTree, PyTree], PyTree],
    first: PyTree,
    elements: PyTree,
    size: int | None = None,
) -> PyTree:
    """The states after each element, leaves [T, ...].

    step(state, element) is the next state, join(earlier, later) the one element that does what two
    do; both act on any axes in front. first: the state before the elements, whose leaves are
    [T, ...]. They are joined in chunks of `size`, all chunks at once; a scan over chunks gives the
    states between them, and then all chunks go step by step at once. One chunk is a plain scan:
    that is what None takes on a CPU, where a step of a few hundred numbers costs half a
    microsecond; elsewhere it takes chunks of the root of T, 3 sqrt(T) steps.
    """

    def every(states, element):
        states = step(states, element)
        return states, states

    length = jax.tree.leaves(elements)[0].shape[0]
    if size is None:
        size = length if platform() == "cpu" else power_of_two_at_least(math.isqrt(length))
    if size >= length:
        return lax.scan(every, first, elements)[1]
    across = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), to_chunks(elements, size))  # [C, N]
    begin, rest = (jax.tree.map(lambda a, i=i: a[i], across) for i in (0, slice(1, None)))
    totals, _ = lax.scan(lambda sofar, later: (join(sofar, later), None), begin, rest)
    _, before = lax.scan(lambda state, total: (step(state, total), state), first, totals)
    _, states = lax.scan(every, before, across)
    return jax.tree.map(lambda a: from_chunks(jnp.swapaxes(a, 0, 1), length), states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_scan(
    decay: Float[Array, "T ..."],
    added: Float[Array, "T ..."],
    first: Float[Array, "..."],
    size: int | None = None,
) -> Float[Array, "T ..."]:
    """h_t = decay_t h_{t-1} + added_t elementwise, h_0 = first; all h. size: as in `running`.

    The gradient is the same recurrence, backwards; `jax.jvp` does not go through it.
    """

    def join(earlier, later):
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    def step(h, element):
        return element[0] * h + element[1]

    return running(join, step, first, (decay, added), size)


def shifted(first: Float[Array, "..."], after: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
    """What stands in front of each token, from what stands behind it."""
    return jnp.concatenate([first[None], after[:-1]])


def reverse_scan(
    decay: Float[Array, "T ..."], slope: Float[Array, "T ..."], size: int | None
) -> Float[Array, "T ..."]:
    """g_t = slope_t + decay_{t+1} g_{t+1}, from the end: `linear_scan`'s gradient of `added`."""
    zero = jnp.zeros_like(slope[0])
    return linear_scan(shifted(zero, decay[::-1]), slope[::-1], zero, size)[::-1]


def _linear_scan_forward(decay, added, first, size):
    h = linear_scan(decay, added, first, size)
    return h, (decay, shifted(first, h))


def _linear_scan_backward(size, kept, slope):
    decay, before = kept
    added = reverse_scan(decay, slope, size)
    return added * before, added, decay[0] * added[0]


linear_scan.defvjp(_linear_scan_forward, _linear_scan_backward)


@jax.custom_batching.custom_vmap
def any_of_batch(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the flag is set for any of what `vmap` maps over, sequences and heads.

    On it a `lax.cond` stays one under `vmap`, which makes a computation of both branches of others.
    A batch that is sharded over devices is asked as a whole; inside `shard_map` each shard is.
    """
    return flag


@any_of_batch.def_vmap
def _(size, mapped, flag):
    return any_of_batch(jnp.any(flag)), False


class Phases(NamedTuple):
    """How a window of at most C tokens lies to the frozen chunks of its documents.

    The chunks are C written tokens long and counted from a document's start. The document that runs
    on crosses at most one border of them within the window, and those that begin in it none (but at
    its last token), so that two passes are exact: over `first` with the running chunk's base, then
    over `second` with the base behind the border or, in later documents, the fresh one.

    size: C. document: 0 for the one that runs on, then counted. rank: written tokens of the window
    in front of each. before: tokens up to the border.
    """

    size: int
    document: Int[Array, " C"]
    rank: Int[Array, " C"]
    written: Bool[Array, " C"]
    before: Bool[Array, " C"]

    @property
    def live(self) -> Bool[Array, " C"]:
        """Tokens of the document that runs on."""
        return self.document == 0

    @property
    def first(self) -> Bool[Array, " C"]:
        """Tokens that are written in the first pass."""
        return self.written & self.before

    @property
    def second(self) -> Bool[Array, " C"]:
        """Tokens that are written in the second pass."""
        return self.written & ~self.before

    def with_second_pass(self, run: Callable[..., PyTree], after_first: PyTree) -> PyTree:
        """run(*after_first), or `after_first` itself where no sequence of the batch has a token
        behind a border. The gain was measured on a CPU, where few windows have one; on other
        platforms the condition costs a synchronisation for each window."""
        needed = any_of_batch(~jnp.all(self.before))
        return lax.cond(needed, run, lambda *given: given, *after_first)

    def number(self) -> Int[Array, ""]:
        """Written tokens of the last document in the window."""
        last = self.document == self.document[-1]
        return jnp.sum(self.written & last, dtype=jnp.int32)

    def place(self, place: Int[Array, ""]) -> Int[Array, ""]:
        """Written tokens of the running chunk behind the window; `place`: in front of it."""
        return (jnp.where(self.live[-1], place, 0) + self.number()) % self.size

    def base(self, held: PyTree, opened: PyTree, crossed: PyTree, fresh: PyTree) -> PyTree:
        """The frozen base behind the window: `held` in front of it, `opened` when its first token
        is written, `crossed` behind the border, `fresh` in later documents."""
        base = select(jnp.any(self.first), opened, held)
        base = select(jnp.any(self.second & self.live), crossed, base)
        return select(self.live[-1], base, fresh)


def phase_split(
    size: int,
    place: Int[Array, ""],
    reset: Bool[Array, " C"] | None,
    written: Bool[Array, " C"],
) -> Phases:
    """The phases of a window; size: C. place: written tokens of the chunk that runs on into it."""
    rank = jnp.cumsum(written.astype(jnp.int32)) - written
    document = jnp.zeros_like(rank) if reset is None else jnp.cumsum(reset.astype(jnp.int32))
    return Phases(size, document, rank, written, (document == 0) & (place + rank < size))


def positions(
    reset: Bool[Array, "B T"] | None,
    write: Bool[Array, "B T"] | None,
    start: Int[Array, " B"],
    length: int,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Number of written tokens in front of each token within its document, and after the last.

    start: the same count in front of the first token, carried from earlier calls.
    """
    ones = jnp.ones((start.shape[0], length), jnp.int32)
    count = ones if write is None else write.astype(jnp.int32)
    after = jnp.cumsum(count, axis=1) + start[:, None]
    before = after - count
    if reset is None:
        return before, after[:, -1]
    origin = lax.cummax(jnp.where(reset, before, 0), axis=1)
    return before - origin, after[:, -1] - origin[:, -1]


def lags(
    x: Float[Array, "B T D"],
    tail: Float[Array, "B n D"],
    reset: Bool[Array, "B T"] | None,
    write: Bool[Array, "B T"] | None,
    which: Sequence[int] | None = None,
) -> tuple[list[Float[Array, "B T D"]], Float[Array, "B n D"]]:
    """The n inputs written before each token in its document, nearest first, and the new tail.

    The one memory of short convolutions, token shifts and delays. tail: the last n written inputs
    in front of x, oldest first, zeros where the document is shorter. Inputs of other documents and
    inputs that were not written count as zero and as absent, respectively. which: the lags that
    are wanted, of 1 to n; None for all. Devices that share the sequences exchange tails alone.
    """

    def form(params, state, xs, reset, write):
        return _lags(xs, state, reset, write, which)

    def behind(*given):
        return None, form(*given)[1]

    mesh = spans.sharing((x, reset))
    tokens, rest = divmod(x.shape[1], 1 if mesh is None else mesh.shape[spans.AXIS])
    if mesh is None or write is not None or rest or tokens < tail.shape[1]:
        return form(None, tail, x, reset, write)  # split by the compiler, if at all
    shared = spans.split(form, behind, None, mesh)
    return shared(None, tail, jnp.zeros_like(tail), x, reset, write)


def _lags(x, tail, reset, write, which):
    """`lags` of whole sequences."""
    batch, length, _ = x.shape
    n = tail.shape[1]
    written = jnp.ones((batch, length), bool) if write is None else write
    after = n + jnp.cumsum(written.astype(jnp.int32), axis=1)  # index behind each token in `line`
    before = after - written.astype(jnp.int32)
    line = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    if write is not None:  # written inputs only, in order, behind the tail
        slot = jnp.where(written, before, n + length)
        line = jax.vmap(lambda a, i, b: a.at[i].set(b, mode="drop"))(line, slot, x)
    first = jnp.zeros((batch, length), jnp.int32)  # where each token's document begins in `line`
    if reset is not None:
        first = lax.cummax(jnp.where(reset, before, 0), axis=1)

    def lag(j):
        if write is None:
            past = line[:, n - j : n - j + length]
        else:
            past = jnp.take_along_axis(line, (before - j)[..., None], axis=1)
        if reset is None:  # what the tail does not hold is zero already
            return past
        return jnp.where((before - j >= first)[..., None], past, 0)

    index = after[:, -1:] - n + jnp.arange(n)
    new_tail = jnp.take_along_axis(line, index[..., None], axis=1)
    new_tail = jnp.where((index >= first[:, -1:])[..., None], new_tail, 0)
    return [lag(j) for j in which or range(1, n + 1)], new_tail


def power_of_two_at_least(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, math.ceil(math.log2(n)))
