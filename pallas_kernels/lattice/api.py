"""Slots of unit norm, by a kernel: checks, how memories are grouped, and the choice of chunks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common
from pallas_kernels.lattice import tpu, tpu_vjp
from pallas_kernels.lattice.reference import OBJECTIVES, State, initial_state
from pallas_kernels.lattice.tpu import BEGINS, OPENS

NAME = "lattice"
CHUNKS = (32, 16, 8, 4)  # tokens whose slots are on the chip at once, backward
ROOM = 52 * common.MIB  # of VMEM for them, where it is large


class Static(NamedTuple):
    """What a kernel is compiled for. limit: bytes of VMEM; None for the compiler's own."""

    rule: tpu.Rule
    chunk: int
    interpret: Any
    limit: int | None


def lattice(
    q, k, v, beta, gamma, start, *, frozen_chunk=1, objective="decoding", state=None, reset=None,
    write=None, chunk=None, platform=None,
):  # fmt: skip
    """s_i = e^beta s_i + gamma w_i (h - s_i (d_i . h)), slots of unit norm; o = S^T q.

    Lattice (Karami & Mirrokni 2025, arXiv 2504.05646), with h, w and d_i of the slots in front of a
    frozen chunk: exact in frozen chunks of one token. `reference` has the definition.

    Args:
      q, k: [B, T, H, K], over slots. v: [B, T, H, V]. K and V at most 256; both become the next
        of 64, 128 and 256 that holds them, with zeros behind. All three float32 or all bfloat16.
      beta: log of what is kept <= 0, and gamma: the step >= 0, [B, T, H], taken as float32. In long
        frozen chunks large steps make slots grow (memjax's `cells/lattice.py`): squares of their
        norms have to be finite.
      start: [H, K, V], slots of unit norm in front of a document.
      frozen_chunk: written tokens of a frozen chunk, from a document's start; at least 1.
      objective: "decoding", "encoding" or "similarity".
      state: `State`, finite, or None for the initial one.
      reset: bool [B, T], True where a document begins. write: bool [B, T] or [B, T, H], False
        where a token only reads: its other arrays may hold anything.
      chunk: tokens in a chunk, 4, 8, 16 or 32; None chooses. Changes speed only.
      platform: "tpu", or with its generation, such as "tpu v5e"; None for the default backend.

    Returns:
      o [B, T, H, V] in the dtype of v, and the last `State`, float32. Both, and the gradients, are
      those of `reference.sequential`, exact to float32 up to the rounding of o and of the gradients
      of q, k and v. Under `jax.checkpoint` the names "memory_out" (what is returned) and
      "memory_state" (what the backward pass needs) can be saved, so that the forward kernel runs
      once. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape or chunk.
      ValueError: shapes that do not fit together, or another objective.
    """
    _check(q, k, v, beta, gamma, start, frozen_chunk, objective, state, reset, write)
    (batch, length, heads, channels), slots = v.shape, q.shape[-1]
    interpret, _, generation = common.only_on(NAME, ("tpu",), platform)
    dim = next((n for n in common.WIDTHS if max(slots, channels) <= n), max(slots, channels))
    q, k, v = (common.wider(a, dim) for a in (q, k, v))
    common.check_served(NAME, {"q": q, "k": k}, v)
    rule = tpu.Rule(objective, frozen_chunk == 1, reset is not None, dim)
    static = _plan(rule, length, chunk, generation, interpret)
    start = start.astype(jnp.float32)
    if state is None:
        state = initial_state(batch, start, frozen_chunk)
    masks, place = _masks(reset, write, state.place, (batch, length, heads), frozen_chunk)
    if write is not None:  # what is not written, even NaN, must not matter
        k, v, beta, gamma = (
            jnp.where(jnp.expand_dims(masks["written"], range(3, a.ndim)), a, 0)
            for a in (k, v, beta, gamma)
        )
    beta, gamma = (a.astype(jnp.float32) for a in (beta, gamma))
    scalars = jnp.exp(beta), jnp.where(masks["written"], gamma, 0)
    states = tuple(common.wider(a.astype(jnp.float32), dim, dim) for a in state[: rule.states])
    start = common.wider(start, dim, dim)
    groups = _Groups(batch, heads, rule.tiles.memories)
    tokens = groups.of_tokens((q, k, v, *scalars, masks))
    given = common.padded(tokens, static.chunk)
    o, found = _op(static, *given, groups.of_start(start), groups.of_states(states))
    o = groups.tokens(o[:, :length])[..., :channels]
    found = [a[:, :, :slots, :channels] for a in groups.states(found)]
    new = State(found[0], None if rule.exact else found[1], place)
    return checkpoint_name((o, new), "memory_out")


def _check(q, k, v, beta, gamma, start, frozen_chunk, objective, state, reset, write):
    """ValueError for what does not fit together."""
    common.check_shapes(NAME, {"q": q, "k": k}, v, beta, None, None, reset, False)
    (batch, length, heads, size), slots = v.shape, q.shape[-1]
    one, whole = (batch, length, heads), (batch, heads, slots, size)
    wanted = {
        "q": (q, (*one, slots)),
        "gamma": (gamma, one),
        "start": (start, whole[1:]),
    }
    for name, (array, axes) in wanted.items():
        if array is not None and array.shape != axes:
            raise ValueError(f"{NAME}: {name} must be {list(axes)}; given {list(array.shape)}")
    common.check_frozen(NAME, frozen_chunk, objective, OBJECTIVES, write, one, "objective")
    if state is not None:
        base = whole if frozen_chunk > 1 else None
        common.check_state(NAME, state, State(whole, base, whole[:2]))


def _plan(rule: tpu.Rule, length: int, chunk, generation: str, interpret) -> Static:
    """The longest chunk that fits a TPU; NotImplementedError where none does."""
    if chunk is not None and chunk not in CHUNKS:
        raise NotImplementedError(f"{NAME} takes chunks of {CHUNKS}; given {chunk}")
    small = common.has_small_memory(generation)
    room, limit = (common.SMALL, None) if small else (ROOM, common.LIMIT)
    slots, token = (4 * rule.tiles.memories * rule.dim * n for n in (rule.dim, 1))  # bytes
    for tokens in (chunk,) if chunk else CHUNKS:
        # Backward: states of tokens and in front of them, two blocks of those kept, one each of the
        # gradients behind and in front; G'; fresh slots and their gradients; seven arrays of tokens
        # in two blocks, and four that are made again.
        count = rule.states * (tokens + 1 + 4) + 1 + 2 * rule.fresh
        fits = count * slots + 18 * tokens * token <= room
        if fits and (chunk or tokens < 2 * max(length, CHUNKS[-1])):
            return Static(rule, tokens, interpret, limit)
    raise NotImplementedError(
        f"{NAME} does not fit {room // common.MIB} MiB of a TPU core: {rule.tiles.memories} "
        f"memories of {rule.dim} slots of {rule.dim} channels at once"
        + (f" in chunks of {chunk}" if chunk else "")
        + "; use fewer slots and channels, or a plain form"
    )


def _masks(reset, write, place, shape, frozen_chunk: int):
    """(masks of tokens [B, T, H] by name, place behind the last one)."""
    write = write[..., None] if write is not None and write.ndim == 2 else write
    written = jnp.ones(shape, bool) if write is None else jnp.broadcast_to(write, shape)
    first = jnp.zeros(shape, bool)
    if reset is not None:
        first = jnp.broadcast_to(reset[..., None], shape)
    one = written.astype(jnp.int32)
    count = jnp.cumsum(one, axis=1) - one  # written in front
    origin = lax.cummax(jnp.where(first, count, -place[:, None]), axis=1)
    phase = (count - origin) % frozen_chunk
    masks = {"written": written, "first": first}
    masks["ends"] = written & (phase == frozen_chunk - 1)
    masks["opens"] = (written & (phase == 0)) | first
    return masks, (phase[:, -1] + one[:, -1]) % frozen_chunk


class _Groups(NamedTuple):
    """Memories in groups of n: the heads of a sequence as they are where n divides them; otherwise
    all memories of all sequences, with empty ones behind, as the heads of one."""

    batch: int
    heads: int
    n: int

    @property
    def aligned(self) -> bool:
        return self.heads % self.n == 0

    @property
    def more(self) -> int:
        """Empty memories."""
        return 0 if self.aligned else -self.batch * self.heads % self.n

    def _folded(self, a, axis: int):
        """[B, .., H, ..] with heads at `axis` -> [1, .., B H and more, ..]."""
        if self.aligned:
            return a
        a = jnp.moveaxis(a, 0, axis - 1)
        a = a.reshape(*a.shape[: axis - 1], self.batch * self.heads, *a.shape[axis + 1 :])
        pads = [(0, 0)] * a.ndim
        pads[axis - 1] = (0, self.more)
        return jnp.pad(a, pads)[None]

    def _unfolded(self, a, axis: int):
        if self.aligned:
            return a
        a = lax.slice_in_dim(a[0], 0, self.batch * self.heads, axis=axis - 1)
        a = a.reshape(*a.shape[: axis - 1], self.batch, self.heads, *a.shape[axis:])
        return jnp.moveaxis(a, axis - 1, 0)

    def of_tokens(self, tree):
        """Leaves [B, T, H, ...]."""
        return jax.tree.map(lambda a: self._folded(a, 2), tree)

    def tokens(self, a):
        return self._unfolded(a, 2)

    def of_states(self, states):
        """Leaves [B, H, ...]."""
        return jax.tree.map(lambda a: self._folded(a, 1), states)

    def states(self, states):
        return jax.tree.map(lambda a: self._unfolded(a, 1), states)

    def of_start(self, start):
        """[H, ...] -> that of every memory of a sequence, or of all."""
        if self.aligned:
            return start
        return self.of_states(jnp.broadcast_to(start, (self.batch, *start.shape)))[0]


# ---------------------------------------------------------------- the op


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, q, k, v, keep, step, masks, start, states):
    return _forward(static, (q, k, v, keep, step, masks, start, states), keep=False)[:2]


def _rows(a, static: Static):
    """[B, T, H, D] <-> [B, T, H / P, W]."""
    side = static.rule.tiles.side
    return a.reshape(*a.shape[:2], a.shape[2] // side, a.shape[3] * side)


def _by_chunk(a, static: Static):
    """[B, T, H] -> [B, G, N, P, 8, C]."""
    tiles = static.rule.tiles
    batch, length, heads = a.shape
    groups = heads // tiles.memories
    a = a.reshape(batch, length // static.chunk, static.chunk, groups, 8, tiles.side)
    return a.transpose(0, 3, 1, 5, 4, 2)


def _by_token(a):
    """[B, G, N, P, 8, C] -> [B, T, H]."""
    batch, groups, chunks, side, rows, chunk = a.shape
    return a.transpose(0, 2, 5, 1, 4, 3).reshape(batch, chunks * chunk, groups * rows * side)


def _inputs(static: Static, q, k, v, keep, step, masks, start):
    """What kernels take besides states."""
    rule, given = static.rule, {"keep": keep, "step": step, **masks}
    named = [_by_chunk(given[name], static).astype(jnp.float32) for name in rule.names]
    scalars = jnp.stack(named, axis=3)
    events = None
    if rule.events:
        opens, first = (
            jnp.any(_by_chunk(masks[name], static), axis=(3, 4)) for name in ("opens", "first")
        )
        events = jnp.stack([OPENS * opens + BEGINS * first, jnp.cumsum(opens, axis=-1)], axis=3)
    fresh = rule.tiles.tiled(start[None])[0] if rule.fresh else None
    rows = (_rows(a, static) for a in (q, k, v))
    return (*rows, scalars, None if events is None else events.astype(jnp.int32), fresh)


def _forward(static, given, keep):
    *given, states = given
    tiled = tuple(map(static.rule.tiles.tiled, states))
    q, k, v, scalars, events, fresh = _inputs(static, *given)
    o, found, kept = tpu.forward(
        q, k, v, scalars, events, fresh, tiled, keep=keep, **static._asdict()
    )
    return o.reshape(given[2].shape), tuple(map(static.rule.tiles.untiled, found)), kept


def _op_forward(static, *given):
    o, final, kept = _forward(static, given, keep=True)
    kept = [checkpoint_name(a, "memory_state") for a in kept]
    return (o, final), (given[:-1], kept)


def _op_backward(static, saved, cotangents):
    (given, kept), (do, dstates), tiles = saved, cotangents, static.rule.tiles
    q, k, v, scalars, events, fresh = _inputs(static, *given)
    do, dstates = _rows(do, static), tuple(map(tiles.tiled, dstates))
    *found, dscalars, dfresh, dstates = tpu_vjp.backward(
        q, k, v, scalars, events, fresh, kept, do, dstates, **static._asdict()
    )
    dq, dk, dv = (a.reshape(b.shape) for a, b in zip(found, given[:3], strict=True))
    dkeep, dstep = (_by_token(dscalars[:, :, :, n]) for n in (0, 1))
    dstart = jnp.zeros_like(given[-1])
    if dfresh is not None:
        dstart = jnp.sum(tiles.untiled(dfresh), axis=0)
    return dq, dk, dv, dkeep, dstep, None, dstart, tuple(map(tiles.untiled, dstates))


_op.defvjp(_op_forward, _op_backward)
