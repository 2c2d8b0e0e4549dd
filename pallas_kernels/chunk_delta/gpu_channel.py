"""The delta rule with a decay for each channel (KDA) on Hopper, forward, in two kernels.

    M = (I + L)^-1 beta,  L_ij = beta_i sum_c k_ic k_jc e^{G_ic - G_jc}, j < i
    R = M (V - (K . e^G) S)
    O = (scale Q . e^G) S + A R,  A_ij = scale sum_c q_ic k_jc e^{G_ic - G_jc}, j <= i
    S <- e^{G_C} . S + (K . e^{G_C - G})^T R

The letters are those of gpu.py, G [C, K] and M with the rates. `weights` makes A and M, a warpgroup
for each chunk and head, by the levels of `mosaic_channels.py`; the operands with decays are made
around the kernels. `walk` is that of gpu.py with these for its operands, K in two parts; it serves
both directions (gpu_channel_vjp.py), and those of `chunk_dplr`. Bytes a token and head: those of q
and k once, 6 K for g, 512 for A and M, 10 K for the operands, which are read with A and M for each
64 columns of V, and when gradients follow 4 K V / C + 4 V of S in front of each chunk and R.
"""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels import mosaic_channels as channels
from pallas_kernels.chunk_delta.gpu import IN_REGISTERS, Walk, inverse_of
from pallas_kernels.mosaic import (
    HALF,
    NUMBERS,
    SIDE,
    WIDE,
    copy_in,
    dots,
    halves,
    in_pairs,
    in_parts,
    load,
    put,
    span,
    store,
    tile,
    turned,
)

LEAST = 2.0**-80  # of beta, by whose square its gradient divides


def rates(beta):
    """[B, H, N, C] of columns."""
    return jnp.maximum(beta[..., 0], LEAST)


def operands(q, k, logs, scale):
    """scale Q e^G [B, T, H, K], -K e^G and K e^{G_C - G} [B, T, 2 H, K] in parts, and e^{G_C}
    [B, H, N, K]."""
    asked, seen, written, through = channels.operands(q, k, logs, scale)
    seen, written = (channels.split(x, 2) for x in (-seen, written))
    return asked.astype(HALF), seen, written, through


def weights(q, k, beta, logs, *, scale, interpret):
    """[A and M of every chunk, both in parts, [B, H, N, 2, C, C]]. beta: [B, H, N, C]."""
    batch, length, fewer, width = q.shape
    heads, chunks = beta.shape[1], length // SIDE
    logs = channels.split(logs, 3)

    def body(x):
        chunk, head, row = (lax.axis_index(axis) for axis in ("chunk", "head", "batch"))
        copy_in(x.rates_ready, (x.beta.at[row, head, chunk], x.rates))

        def fetch(n):
            tokens = (row, span(chunk), head)
            copies = channels.copies(x, x.tiles, tokens, heads // fewer, span(n))
            copy_in(x.ready, *copies)
            plgpu.barrier_wait(x.ready)

        asked, alike = channels.pairs(x.tiles, width // SIDE, fetch, alike=True)
        found, scores, work = (x.tiles.at[a:b] for a, b in ((0, 2), (2, 4), (6, 10)))
        put(scores, scale * asked)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores, x.scores.at[row, head, chunk])
        plgpu.barrier_wait(x.rates_ready)
        lower = mosaic.of_rows(x.rates, alike.shape) * alike
        inverse = inverse_of(SimpleNamespace(work=work, found=found), lower)
        put(found, inverse * mosaic.of_columns(x.rates, inverse.shape))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(found, x.inverses.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    made = jax.ShapeDtypeStruct((batch, heads, chunks, 2, SIDE, SIDE), HALF)
    return mosaic.run(
        body,
        {"q": q, "k": k, "beta": beta, "logs": logs},
        {"scores": made, "inverses": made},
        {
            "tiles": tile(10),
            "rates": NUMBERS,
            "rates_ready": plgpu.Barrier(num_arrivals=1),
            "ready": plgpu.Barrier(num_arrivals=5),
        },
        name="chunk_delta_forward_weights",
        grid={"chunk": chunks, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


@dataclasses.dataclass(frozen=True)
class ChannelWalk(Walk):
    """Where states are in shared memory, `after` has the place of `before`. Where queries have two
    parts, what is written has the place of the scores, and beside states in shared memory the
    inverse that of queries, which come when it has been used. Where there are no answers, the place
    of the values is free for the next ones."""

    tiles: ClassVar[tuple[str, ...]] = (
        *Walk.tiles,
        "before_tiles",
        "after_tiles",
        "scores_tile",
        "rows_tile",
    )

    @property
    def steps(self) -> int:
        return self.x.before_tiles.shape[0] // 2

    @property
    def in_turn(self) -> bool:
        return self.x.after_tiles is None

    @property
    def after_tiles(self):
        return self.x.before_tiles if self.in_turn else self.x.after_tiles

    @property
    def rows(self):
        return self.x.scores_tile if self.x.rows_tile is None else self.x.rows_tile

    @property
    def inverse(self):
        return self.x.q_tiles.at[:2] if self.x.inverse is None else self.x.inverse

    @property
    def queries(self) -> list:
        """The parts of the tiles of queries, one or two."""
        count = self.x.q_tiles.shape[0] // self.steps
        return [
            [self.x.q_tiles.at[count * i + part] for part in range(count)]
            for i in range(self.steps)
        ]

    def fetch_parts(self, n, source, tiles, ready):
        count = tiles.shape[0] // self.steps
        for i in range(self.steps):
            for part in range(count):
                there = tiles.at[count * i + part]
                copy_in(ready, (self.tokens(source, n, span(i), part), there))

    def fetch_queries(self, n):
        self.fetch_parts(n, self.x.q, self.x.q_tiles, self.x.q_ready)

    def fetch_values(self, n):
        copy_in(self.x.v_ready, (self.tokens(self.x.v, n, self.columns()), self.x.v_tile.at[0]))

    def fetch_before(self, n):
        self.fetch_parts(n, self.x.before, self.x.before_tiles, self.x.before_ready)

    def fetch_after(self, n):
        self.fetch_parts(n, self.x.after, self.after_tiles, self.x.after_ready)

    def fetch_scores(self, n):
        row, chunk = self.at(n)
        scores = self.x.scores.at[row, self.head(), chunk]
        copy_in(self.x.scores_ready, (scores, self.x.scores_tile))

    def fetch_through(self, n):
        row, chunk = self.at(n)
        through = self.x.through.at[row, self.head(), chunk]
        copy_in(self.x.through_ready, (through, self.x.through_rows))

    def fetch_first(self):
        self.fetch_before(0)
        if self.x.inverse is not None:
            self.fetch_queries(0)
        self.fetch_scores(0)
        self.fetch_inverse(0)
        if not self.in_turn:
            self.fetch_after(0)
        if self.x.o is None:
            self.fetch_values(0)
        self.fetch_through(0)

    def seen(self):
        """The products of `before` with the state."""
        parts = zip(in_pairs(self.x.before_tiles, self.steps), self.states, strict=True)
        return [pair for a, b in parts for pair in in_parts(halves(a), halves(b))]


def channel_scratch(width: int, parts: int, factors: int) -> dict:
    """What `walk` has in shared memory. parts: of the queries; factors: for each row of S."""
    steps, in_registers, dual = width // SIDE, width <= IN_REGISTERS, parts == 2
    one = plgpu.Barrier(num_arrivals=1)
    return {
        "before_tiles": tile(2 * steps),
        "after_tiles": tile(2 * steps) if in_registers else None,
        "q_tiles": tile(parts * steps),
        "v_tile": tile(1),
        "scores_tile": tile(2),
        "inverse": tile(2) if in_registers or not dual else None,
        "rows_tile": None if dual else tile(2),
        "work": tile(2 * steps) if in_registers else None,
        "aside": None if in_registers else tile(2 * steps),
        "through_rows": plgpu.SMEM((factors, width), WIDE),
        **dict.fromkeys(("before_ready", "after_ready"), plgpu.Barrier(num_arrivals=2 * steps)),
        "q_ready": plgpu.Barrier(num_arrivals=parts * steps),
        **dict.fromkeys(("v_ready", "scores_ready", "inverse_ready", "through_ready"), one),
    }


def walk(
    before,
    after,
    q,
    scores,
    inverses,
    v,
    through,
    initial,
    *,
    answers,
    backward,
    keep,
    name,
    interpret,
):
    """Over the chunks in their order, or backward: ([o,] S behind the last[, S in front of each
    chunk [B, N, 2 H, K, V], R [B, T, 2 H, V], both in parts]). With answers,

        R = M (V + X S),  O = Q S + A R,  S <- through . S + Y^T R

    and without, of the transposes of M and A where backward,

        R = M (A V + X S),  S <- through . S + Q^T V + Y^T R

    before, after: X and Y, [B, T, 2 H, K] in parts; q: [B, T, H, K], without answers in parts too;
    scores, inverses: A and M, [B, H, N, 2, C, C]; through: [B, H, N, 1, K], or two factors, of
    which the second is of the new S, all of it.
    """
    batch, length, count, size = v.shape
    width, chunks = q.shape[-1], length // SIDE

    def step(walk, n, slot, state):
        x, rows, given = walk.x, walk.rows, walk.x.v_tile.at[0]

        def then(fetch):
            pl.when(n + 1 < chunks)(lambda: fetch(n + 1))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until what is overwritten has left
        if answers:
            walk.fetch_values(n)
        walk.put_state(state)
        if keep:
            walk.keep_state(x.bounds, n)
        plgpu.barrier_wait(x.before_ready)
        if answers:
            plgpu.barrier_wait(x.q_ready)
            seen, asked = dots(walk.seen(), walk.on_state([query for (query,) in walk.queries]))
            then(walk.fetch_queries)
            plgpu.barrier_wait(x.v_ready)
            wanted = load(given, WIDE) + seen
        else:
            plgpu.barrier_wait(x.scores_ready)
            plgpu.barrier_wait(x.v_ready)
            answered = [(a, given) for a in halves(x.scores_tile, turn=backward)]
            (wanted,) = dots([*walk.seen(), *answered])
            if x.rows_tile is not None:
                then(walk.fetch_scores)
        walk.fetch_after(n) if walk.in_turn else then(walk.fetch_before)
        put(rows, wanted)
        plgpu.barrier_wait(x.inverse_ready)
        plgpu.commit_smem()
        put(rows, dots(in_parts(halves(walk.inverse, turn=backward), halves(rows)))[0])
        walk.fetch_queries(n) if x.inverse is None else then(walk.fetch_inverse)
        plgpu.commit_smem()
        if keep:
            walk.keep_rows(rows, x.rows, n)
        if answers:
            plgpu.barrier_wait(x.scores_ready)
            store(given, asked + dots(in_parts(halves(x.scores_tile), halves(rows)))[0])
            then(walk.fetch_scores)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(given, walk.tokens(x.o, n, walk.columns()))
        plgpu.barrier_wait(x.after_ready)
        plgpu.barrier_wait(x.through_ready)
        if not answers:
            plgpu.barrier_wait(x.q_ready)
        if x.work is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def move(i, tile_):
            after = halves(in_pairs(walk.after_tiles, walk.steps)[i], turn=True)
            added = in_parts(after, halves(rows))
            if not answers:
                added += [(turned(part), given) for part in walk.queries[i]]
            of_rows = [
                mosaic.of_rows(x.through_rows.at[part, span(i)], tile_.shape)
                for part in range(through.shape[3])
            ]
            moved = of_rows[0] * tile_ + dots(added)[0]
            return moved if len(of_rows) == 1 else of_rows[1] * moved

        state = walk.moved(state, move)
        plgpu.commit_smem()  # what `move` has loaded too
        then(walk.fetch_before if walk.in_turn else walk.fetch_after)
        then(walk.fetch_through)
        if not answers:
            then(walk.fetch_values)
            then(walk.fetch_inverse if x.inverse is None else walk.fetch_queries)
        if x.rows_tile is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            then(walk.fetch_scores)
        return state

    shape = jax.ShapeDtypeStruct
    return mosaic.run(
        lambda x: ChannelWalk(x, chunks, count, backward).run(step, x.initial, x.final),
        {
            "before": before,
            "after": after,
            "q": q,
            "v": v,
            "scores": scores,
            "inverses": inverses,
            "through": through,
            "initial": initial,
        },
        {
            "o": shape(v.shape, v.dtype) if answers else None,
            "final": shape(initial.shape, WIDE),
            "bounds": shape((batch, chunks, 2 * count, width, size), HALF) if keep else None,
            "rows": shape((batch, length, 2 * count, size), HALF) if keep else None,
        },
        channel_scratch(width, q.shape[2] // count, through.shape[3]),
        name=name,
        grid={"tile": size // SIDE, "head": count, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )


def forward(q, k, v, beta, decaying, initial, *, scale, chunk, heads, keep, interpret):
    """(o, final state[, A, M, S in front of the chunks, R]), the latter four in parts."""
    (logs,) = decaying
    made = weights(q, k, rates(beta), logs, scale=scale, interpret=interpret)
    asked, seen, written, through = operands(q, k, logs, scale)
    o, final, *kept = walk(
        *(seen, written, asked, *made, v, through[:, :, :, None], initial),
        answers=True,
        backward=False,
        keep=keep,
        name="chunk_delta_forward_walk",
        interpret=interpret,
    )
    return o, final, *((*made, *kept) if keep else ())
