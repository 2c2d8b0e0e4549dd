"""The delta rule on Hopper, forward, in two kernels.

    M = (I + L)^-1,  L_ij = beta_i e^{G_i - G_j} k_i . k_j, j < i
    R = M beta (V - e^G . K S)
    O = scale (e^G . Q S + (e^{G_i - G_j} . Q K^T, j <= i) R)
    S <- e^{G_C} S + K^T (e^{G_C - G} . R)

The letters are those of tpu.py, a chunk is 64 tokens. `inverses` has a warpgroup for each chunk and
head; `forward` walks over the chunks, a warpgroup for each head and 64 columns of S, and makes the
outputs on the way. S is float32 in registers, for K 256 the sum of two bfloat16 arrays in shared
memory. bfloat16: a float32 factor is such a sum wherever terms cancel, as in tpu.py. R decays here,
not K, so that Q, K and V enter products as they are. Bytes a token and head: those of q, k, v and
o, 256 for M, which is read for each 64 columns of V, as q and k are, 12 for rates and decays, and
when gradients follow 4 K V / C + 4 V of S in front of each chunk and R.
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
from pallas_kernels.mosaic import (
    HALF,
    NUMBERS,
    SIDE,
    WIDE,
    both,
    copy_in,
    decayed,
    dots,
    halves,
    in_pairs,
    in_parts,
    put,
    span,
    tile,
    total,
    turned,
    unhoisted,
)

IN_REGISTERS = 128  # the largest K whose states a warpgroup keeps in registers


# ---------------------------------------------------------------- inverses


def inverse_of(x, lower):
    """(I + L)^-1, L what is below the diagonal of `lower`. x.work, x.found: tiles to work in.

    As `products.unit_lower_inverse`, with the mask on what is found: X, the inverse of the blocks
    on the diagonal, is zero elsewhere, so that in X L X each pair of blocks stands alone.
    """
    i, j = mosaic.places(SIDE)
    lower = jnp.where(i > j, lower, 0.0)
    put(x.work.at[:2], lower)

    def joins(bits):
        return (i ^ j) >> bits == 1

    def double(bits, found):
        work, parts = unhoisted(x.work, x.found)
        low, inner = in_pairs(work, 2)
        put(parts, found)
        plgpu.commit_smem()
        put(inner, dots(in_parts(halves(low), halves(parts)))[0])
        plgpu.commit_smem()
        return jnp.where(joins(bits), -dots(in_parts(halves(parts), halves(inner)))[0], found)

    found = jnp.where(i == j, 1.0, jnp.where(joins(0), -lower, 0.0))
    return lax.fori_loop(1, SIDE.bit_length() - 1, double, found)


def inverses(k, beta, sums, *, interpret):
    """M of every chunk in two parts, [B, H, N, 2, C, C]. beta: [B, H, N, C]; sums: rows of
    `decays.log_decay_sums`, or None."""
    batch, length, fewer, width = k.shape
    heads, chunks, steps = beta.shape[1], length // SIDE, width // SIDE
    gated = sums is not None

    def body(x):
        chunk, head, row = (lax.axis_index(axis) for axis in ("chunk", "head", "batch"))
        copies = [(x.beta.at[row, head, chunk], x.rates)]
        if gated:
            copies.append((x.sums.at[row, head, chunk], x.decays))
        for n in range(steps):
            of_key = lax.div(head, heads // fewer)
            copies.append((x.k.at[row, span(chunk), of_key, span(n)], x.work.at[n]))
        copy_in(x.ready, *copies)
        plgpu.barrier_wait(x.ready)
        keys = [x.work.at[n] for n in range(steps)]
        (alike,) = dots([(key, turned(key)) for key in keys])
        alike = mosaic.of_rows(x.rates, alike.shape) * mosaic.lower(alike, x.decays)
        put(x.found, inverse_of(x, alike))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x.found, x.inverses.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    (found,) = mosaic.run(
        body,
        {"k": k, "beta": beta, "sums": sums},
        {"inverses": jax.ShapeDtypeStruct((batch, heads, chunks, 2, SIDE, SIDE), HALF)},
        {
            "work": tile(4),
            "found": tile(2),
            "rates": NUMBERS,
            "decays": plgpu.SMEM((2, SIDE), WIDE) if gated else None,
            "ready": plgpu.Barrier(num_arrivals=1 + gated + steps),
        },
        name="chunk_delta_forward_inverses",
        grid={"chunk": chunks, "head": heads, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )
    return found


# ---------------------------------------------------------------- walks


def walk_scratch(width: int, gated: bool) -> dict:
    """What a walk over chunks has in shared memory: keys of two chunks, all else of one. A state in
    registers has its parts in `work` until the chunk has read it; up to K 128 two blocks fit on a
    multiprocessor so."""
    steps, aside = width // SIDE, width > IN_REGISTERS
    return {
        "q_tiles": tile(steps),
        "k_tiles": tile(2, steps),
        "v_tile": tile(1),
        "inverse": tile(2),
        "work": tile(4),
        "aside": tile(2 * steps) if aside else None,
        "rates": NUMBERS,
        "decays": plgpu.SMEM((2, SIDE), WIDE) if gated else None,
        "q_ready": plgpu.Barrier(num_arrivals=steps),
        "k_ready": plgpu.Barrier(num_arrivals=steps, num_barriers=2),
        "v_ready": plgpu.Barrier(num_arrivals=1),
        "inverse_ready": plgpu.Barrier(num_arrivals=1),
        "rates_ready": plgpu.Barrier(num_arrivals=1 + gated),
    }


@dataclasses.dataclass(frozen=True)
class Walk:
    """A warpgroup that walks over chunks with 64 columns of a head's state. x: refs by name."""

    x: SimpleNamespace
    chunks: int
    heads: int
    backward: bool = False
    tiles: ClassVar[tuple[str, ...]] = ("q_tiles", "v_tile", "inverse", "work", "aside")

    @property
    def steps(self) -> int:
        return self.x.q_tiles.shape[0]

    @property
    def inverse(self):
        return self.x.inverse

    @property
    def states(self) -> list:
        """Where the parts of the state's tiles are."""
        return in_pairs(self.x.work if self.x.aside is None else self.x.aside, self.steps)

    def at(self, n):
        """(row, chunk) of step n."""
        return lax.axis_index("batch"), self.chunks - 1 - n if self.backward else n

    def head(self, part=0):
        """The head of an array whose heads are all of the first part, then all of the second."""
        return part * self.heads + lax.axis_index("head")

    def columns(self):
        return span(lax.axis_index("tile"))

    def tokens(self, source, n, columns, part=0):
        """64 columns of the chunk of step n in [B, T, H, D], [B, T, 2 H, D] of parts, or
        [B, T, h, D] of fewer heads."""
        row, chunk = self.at(n)
        head = lax.div(self.head(part), max(1, self.heads // source.shape[2]))
        return source.at[row, span(chunk), head, columns]

    def fetch_keys(self, n, slot):
        for i in range(self.steps):
            place = self.x.k_tiles.at[slot, i]
            copy_in(self.x.k_ready.at[slot], (self.tokens(self.x.k, n, span(i)), place))

    def fetch_queries(self, n):
        for i in range(self.steps):
            copy_in(self.x.q_ready, (self.tokens(self.x.q, n, span(i)), self.x.q_tiles.at[i]))

    def fetch_inverse(self, n):
        row, chunk = self.at(n)
        found = self.x.inverses.at[row, self.head(), chunk]
        copy_in(self.x.inverse_ready, (found, self.inverse))

    def fetch_rates(self, n):
        row, chunk = self.at(n)
        copy_in(self.x.rates_ready, (self.x.beta.at[row, self.head(), chunk], self.x.rates))
        if self.x.sums is not None:
            copy_in(self.x.rates_ready, (self.x.sums.at[row, self.head(), chunk], self.x.decays))

    def fetch_first(self):
        for n in range(min(2, self.chunks)):
            self.fetch_keys(n, n)
        self.fetch_rates(0)
        self.fetch_queries(0)
        self.fetch_inverse(0)

    def put_state(self, state):
        """What is in registers to where products read it."""
        for i, tile_ in enumerate(state):
            put(self.states[i], tile_)
        plgpu.commit_smem()

    def on_state(self, tiles):
        """The products of [C, K] with the state."""
        found = zip(tiles, self.states, strict=True)
        return [product for a, parts in found for product in both(a, halves(parts))]

    def keep_state(self, there, n):
        """Starts copies of the state's parts to [B, N, 2 H, K, V]."""
        row, chunk = self.at(n)
        for i, parts in enumerate(self.states):
            for part in range(2):
                place = there.at[row, chunk, self.head(part), span(i), self.columns()]
                plgpu.copy_smem_to_gmem(parts.at[part], place)

    def keep_rows(self, parts, there, n):
        """Starts copies of the parts of an array [C, 64] to [B, T, 2 H, V]."""
        for part in range(2):
            place = self.tokens(there, n, self.columns(), part)
            plgpu.copy_smem_to_gmem(parts.at[part], place)

    def moved(self, state, move):
        """The state with move(i, tile) in the place of its i-th tile."""
        if state:
            return [move(i, tile_) for i, tile_ in enumerate(state)]
        for i, parts in enumerate(self.states):
            put(parts, move(i, total(parts)))
        return state

    def run(self, step, initial, final):
        """step(walk, n, slot, state) -> the state behind the chunk. A state is a list of tiles,
        empty where they are not in registers; initial, final: [B, H, K, V]."""
        self.fetch_first()
        row, _ = self.at(0)
        places = [(row, self.head(), span(i), self.columns()) for i in range(self.steps)]
        state = [mosaic.load(initial.at[place], shared=False) for place in places]
        if self.x.aside is not None:
            for parts, tile_ in zip(self.states, state, strict=True):
                put(parts, tile_)
            state = []

        def at_chunk(n, state):
            names = [name for name in self.tiles if getattr(self.x, name) is not None]
            tiles = {name: getattr(self.x, name) for name in names}
            moved = dict(zip(tiles, unhoisted(*tiles.values()), strict=True))
            walk = dataclasses.replace(self, x=SimpleNamespace(**vars(self.x) | moved))
            return step(walk, n, lax.rem(n, 2), state)

        state = lax.fori_loop(0, self.chunks, at_chunk, state)
        for place, tile_ in zip(places, state or map(total, self.states), strict=True):
            final[place] = tile_
        plgpu.wait_smem_to_gmem(0)


def forward(q, k, v, beta, sums, initial, *, scale, chunk, heads, keep, interpret):
    """(o, final state[, M, S in front of the chunks [B, N, 2 H, K, V], R [B, T, 2 H, V]]), R and S
    in parts, the first of all heads before the second.

    T must be a multiple of chunk, which is 64. beta: columns [B, H, N, C, 1]. sums:
    `decays.log_decay_sums`' of single heads.
    """
    batch, length, count, size = v.shape
    width, chunks = q.shape[-1], length // chunk
    beta, (_, sums) = beta[..., 0], sums or (None, None)
    found = inverses(k, beta, sums, interpret=interpret)

    def step(walk, n, slot, state):
        x, later = walk.x, n + 1 < chunks
        keys = [x.k_tiles.at[slot, i] for i in range(walk.steps)]
        queries = [x.q_tiles.at[i] for i in range(walk.steps)]
        first, second = in_pairs(x.work, 2)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until what is overwritten has left
        copy_in(x.v_ready, (walk.tokens(x.v, n, walk.columns()), x.v_tile.at[0]))
        walk.put_state(state)
        if keep:
            walk.keep_state(x.bounds, n)
        plgpu.barrier_wait(x.k_ready.at[slot])
        plgpu.barrier_wait(x.q_ready)
        known, asked = dots(walk.on_state(keys), walk.on_state(queries))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_wait(x.v_ready)
        plgpu.barrier_wait(x.rates_ready)
        error = mosaic.load(x.v_tile.at[0], WIDE) - decayed(known, x.decays, since_start=True)
        put(second, mosaic.of_rows(x.rates, error.shape) * error)
        (scores,) = dots([(a, turned(b)) for a, b in zip(queries, keys, strict=True)])
        pl.when(later)(lambda: walk.fetch_queries(n + 1))
        put(first, mosaic.lower(scores, x.decays))
        plgpu.barrier_wait(x.inverse_ready)
        plgpu.commit_smem()
        (rows,) = dots(in_parts(halves(x.inverse), halves(second)))
        pl.when(later)(lambda: walk.fetch_inverse(n + 1))
        put(second, rows)
        plgpu.commit_smem()
        if keep:
            walk.keep_rows(second, x.rows, n)
        (answer,) = dots(in_parts(halves(first), halves(second)))
        asked = decayed(asked, x.decays, since_start=True)
        mosaic.store(x.v_tile.at[0], scale * (asked + answer))
        written = second
        if sums is not None:
            written = first
            put(written, decayed(rows, x.decays, since_start=False))
        through = mosaic.through(1.0, x.decays)
        plgpu.commit_smem()
        pl.when(later)(lambda: walk.fetch_rates(n + 1))
        plgpu.copy_smem_to_gmem(x.v_tile.at[0], walk.tokens(x.o, n, walk.columns()))

        def move(i, tile_):
            return through * tile_ + dots(both(turned(keys[i]), halves(written)))[0]

        state = walk.moved(state, move)
        pl.when(n + 2 < chunks)(lambda: walk.fetch_keys(n + 2, slot))
        return state

    shape = jax.ShapeDtypeStruct
    bounds = shape((batch, chunks, 2 * count, width, size), HALF)
    rows = shape((batch, length, 2 * count, size), HALF)
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "sums": sums, "inverses": found}
    o, final, *kept = mosaic.run(
        lambda x: Walk(x, chunks, count).run(step, x.initial, x.final),
        arrays | {"initial": initial},
        {
            "o": shape(v.shape, v.dtype),
            "final": shape(initial.shape, WIDE),
            "bounds": bounds if keep else None,
            "rows": rows if keep else None,
        },
        walk_scratch(width, sums is not None),
        name="chunk_delta_forward_walk",
        grid={"tile": size // SIDE, "head": count, "batch": batch},
        interpret=interpret,
        by_lane=True,
    )
    return o, final, *((found, *kept) if keep else ())
