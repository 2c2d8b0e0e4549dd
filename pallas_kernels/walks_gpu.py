"""Recurrences without products on Hopper: a thread for each channel, which walks over the tokens.

A block is one warpgroup and 128 channels of a row. TMA copies chunks of C tokens as they lie in
[B, T, D] to shared memory, some chunks ahead of the walk, and what is made from there; the state
stays in registers. Backward, a chunk's states are made again in shared memory first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic

WIDTH = 128  # channels of a block, threads of a warpgroup
AHEAD, TOKENS = 2, 64  # chunks on their way, or read; tokens of a chunk, at most
UNROLLED = 8  # tokens that the compiler schedules side by side
ROOM = 112 * 1024  # bytes of shared memory: a multiprocessor has room for two blocks
EACH = plgpu.Layout.WG_STRIDED((WIDTH,), vec_size=1)


def block(rule, arrays, channels: int) -> tuple[int, int]:
    """Tokens and channels of a block."""
    of_token = sum(a.dtype.itemsize for a in arrays)
    of_token = AHEAD * (2 * of_token + arrays[0].dtype.itemsize) + 4 * len(rule.fresh)
    chunk = TOKENS
    while chunk > UNROLLED and (
        chunk * WIDTH * of_token > ROOM or chunk // 2 >= arrays[0].shape[1]
    ):
        chunk //= 2
    return chunk, WIDTH


def load(ref):
    """A row [128] in registers, as float32."""
    return plgpu.load(ref, *mosaic.INDEX, layout=EACH).astype(jnp.float32)


def walk(step, state, given, made, chunk: int, backward: bool = False):
    """The state behind a chunk; step(state, rows of given) -> (state, rows of made).

    Some tokens are loaded before any of them is stored: the compiler moves no load in front of a
    store, and would wait for each.
    """

    def some(n, state):
        places = [n * UNROLLED + m for m in range(UNROLLED)]
        places = [chunk - 1 - t for t in places] if backward else places
        rows = [tuple(load(ref.at[t]) for ref in given) for t in places]
        done = []
        for row in rows:
            state, new = step(state, row)
            done.append(new)
        for t, new in zip(places, done, strict=True):
            for ref, x in zip(made, new, strict=True):
                ref[t] = x.astype(ref.dtype)
        return state

    return lax.fori_loop(0, chunk // UNROLLED, some, state)


def forward(static, tokens, state, *, keep):
    """(y, final state, the states in front of the chunks [B, N, D] where they are kept)."""

    def step(state, token):
        state, y = static.rule.step(state, token)
        return state, (y,)

    def of_chunk(state, in_front, given, made, states):
        return walk(step, state, given, made, static.chunk)

    (y,), final, kept = run(of_chunk, static, "forward", tokens, tokens[:1], state, keep=keep)
    return y, tuple(final), kept


def backward(static, tokens, bounds, dy, dfinal):
    """The gradients of the tokens and of the state in front of them."""
    rule, chunk, count = static.rule, static.chunk, len(tokens)

    def again(state, token):
        return rule.step(state, token)[0], state

    def back(slopes, given):
        token, (dy, *state) = given[:count], given[count:]
        return rule.back(slopes, tuple(state), token, dy)

    def of_chunk(slopes, in_front, given, made, states):
        walk(again, in_front, given[:count], states, chunk)
        return walk(back, slopes, [*given, *states], made, chunk, backward=True)

    given = (*tokens, dy)
    dtokens, dinitial, _ = run(of_chunk, static, "backward", given, tokens, dfinal, bounds=bounds)
    return tuple(dtokens), tuple(dinitial)


class Plan(NamedTuple):
    """chunk: tokens of one. chunks: their number. slots: of them in shared memory, or on their way.
    keep: whether the states in front of them are written. backward: whether the walk is."""

    chunk: int
    chunks: int
    slots: int
    keep: bool
    backward: bool

    def place(self, n):
        """Which chunk is the n-th of the walk."""
        return self.chunks - 1 - n if self.backward else n


def walk_chunks(x, plan: Plan, of_chunk):
    """What a warpgroup does; x: the refs of `run`."""
    tile, row = lax.axis_index("tile"), lax.axis_index("batch")
    lanes = pl.ds(tile * WIDTH, WIDTH)
    arrays, made, states, first, last, kept, tiles, made_tiles = (
        [ref for name, ref in vars(x).items() if name.rstrip("0123456789") == stem]
        for stem in ("given", "made", "states", "state", "last", "kept", "tile", "made_tile")
    )

    def at(n):
        return row, pl.ds(plan.place(n) * plan.chunk, plan.chunk), lanes

    def fetch(n, slot):
        copies = ((a.at[at(n)], tile.at[slot]) for a, tile in zip(arrays, tiles, strict=True))
        mosaic.copy_in(x.arrived.at[slot], *copies)

    for n in range(plan.slots):
        fetch(n, n)

    def step(n, state):
        slot, buffer = lax.rem(n, plan.slots), lax.rem(n, 2)
        if plan.keep:
            for ref, a in zip(kept, state, strict=True):
                ref[row, n, lanes] = a
        in_front = tuple(load(ref.at[row, plan.place(n), lanes]) for ref in kept if plan.backward)
        plgpu.wait_smem_to_gmem(len(made), wait_read_only=True)
        plgpu.barrier_wait(x.arrived.at[slot])
        given, new = [ref.at[slot] for ref in tiles], [ref.at[buffer] for ref in made_tiles]
        state = of_chunk(state, in_front, given, new, states)
        plgpu.commit_smem()
        for ref, there in zip(new, made, strict=True):
            plgpu.copy_smem_to_gmem(ref, there.at[at(n)])

        @pl.when(n + plan.slots < plan.chunks)
        def _():
            fetch(n + plan.slots, slot)

        return state

    start = tuple(load(ref.at[row, lanes]) for ref in first)
    for ref, a in zip(last, lax.fori_loop(0, plan.chunks, step, start), strict=True):
        ref[row, lanes] = a
    plgpu.wait_smem_to_gmem(0)


def numbered(name, arrays):
    return {f"{name}{n}": a for n, a in enumerate(arrays)}


def run(of_chunk, static, direction, given, like, state, *, keep=False, bounds=None):
    """(arrays like `like`, the last state, the states in front of the chunks where they are kept).

    of_chunk(state, state in front, given, made, states) -> state, of a chunk's refs [C, 128] in
    shared memory. Where bounds are given, the states in front of the chunks, the walk is backward
    and states has room for those of the tokens of a chunk.
    """
    chunk, (batch, length, channels) = static.chunk, given[0].shape
    chunks, backward, count = length // chunk, bounds is not None, len(state)
    slots = min(AHEAD, chunks)
    plan = Plan(chunk, chunks, slots, keep, backward)
    shape, room = jax.ShapeDtypeStruct, plgpu.SMEM
    bound = shape((batch, chunks, channels), jnp.float32)
    found = mosaic.run(
        lambda x: walk_chunks(x, plan, of_chunk),
        {
            **numbered("given", given),
            **numbered("state", state),
            **numbered("kept", bounds or ()),
        },
        {
            **numbered("made", [shape(a.shape, a.dtype) for a in like]),
            **numbered("last", [shape(a.shape, a.dtype) for a in state]),
            **numbered("kept", [bound] * count * keep),
        },
        {
            **numbered("tile", [room((slots, chunk, WIDTH), a.dtype) for a in given]),
            **numbered("made_tile", [room((2, chunk, WIDTH), a.dtype) for a in like]),
            **numbered("states", [room((chunk, WIDTH), jnp.float32)] * count * backward),
            "arrived": plgpu.Barrier(num_arrivals=len(given), num_barriers=slots),
        },
        name=f"{static.rule.name}_{direction}",
        grid={"tile": channels // WIDTH, "batch": batch},
        interpret=static.interpret,
        exact=True,
    )
    made, last = found[: len(like)], found[len(like) : len(like) + count]
    return made, last, found[len(like) + count :]
