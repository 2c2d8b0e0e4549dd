"""Slots of unit norm on TPU, forward: a walk over tokens, the slots of a group of memories on the
chip.

    h = v - D^T k, w = k  (decoding);  h = v, w = k - D v  (encoding);  h = v, w = k  (similarity)
    a = D h,  p = gamma w,  c = beta - p a;   S <- c S + p h^T;   o = (S / |S|)^T q;   S <- S / |S|

D: the slots in front of the token's frozen chunk; S is divided by its norms |S|, one of each slot,
at the end of one. The slots are not divided but have a scale, which the next token's c and k take
up; a chunk of C tokens ends with scale 1.

One grid step is a chunk of a group, q, k, v and o as they lie in [B, T, H, D]; how slots lie on the
chip, and how sums over them are made, is in tiles.py. Everything on the chip is float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lattice.tiles import LANES, ROWS, Tiles, lane

TINY = 1e-12  # squares of norms below it count as 1
OPENS, BEGINS = 1, 2  # bits of an event


class Rule(NamedTuple):
    """objective: "decoding", "encoding" or "similarity". exact: whether frozen chunks have one
    token, whose base is the slots themselves. fresh: whether documents begin. dim: D."""

    objective: str
    exact: bool
    fresh: bool
    dim: int

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.dim)

    @property
    def names(self) -> tuple[str, ...]:
        """Of a token's scalars."""
        more = () if self.exact else ("ends", "opens")
        return ("keep", "step", "written", *more, *(("first",) if self.fresh else ()))

    @property
    def events(self) -> bool:
        """Whether slots or bases change other than by writing."""
        return self.fresh or not self.exact

    @property
    def states(self) -> int:
        """Arrays of a state: slots, and the base where it is another one."""
        return 1 if self.exact else 2


class Token(NamedTuple):
    """One token of a group, all [8, W]: q, k and v, the scalars in all lanes of their memory; those
    from `written` on are bool, and None where the rule has none."""

    q: Any
    k: Any
    v: Any
    keep: Any
    step: Any
    written: Any
    ends: Any
    opens: Any
    first: Any

    def mask(self, name: str):
        """One of the last, [8, 128]."""
        return getattr(self, name)[:, :LANES]


def token_at(t, rule: Rule, q_ref, k_ref, v_ref, scalars_ref) -> Token:
    """scalars_ref: [n, P, 8, C]."""
    q, k, v = (ref[t].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref))

    def scalar(name):
        if name not in rule.names:
            return None
        rows = scalars_ref[rule.names.index(name)]
        here = jnp.where(lane(rows.shape) == t, rows, 0.0)
        first, *others = jnp.sum(here, axis=-1, keepdims=True)
        found = jnp.broadcast_to(first, k.shape)
        for n, one in enumerate(others):
            found = jnp.where(lane(k.shape) < rule.dim * (n + 1), found, one)
        return found

    keep, step = scalar("keep"), scalar("step")
    masks = (scalar(name) for name in ("written", "ends", "opens", "first"))
    written, ends, opens, first = (None if mask is None else mask > 0.5 for mask in masks)
    return Token(q, k, v, keep, step, written, written if rule.exact else ends, opens, first)


def inverse_norm(square):
    return lax.rsqrt(jnp.where(square < TINY, 1.0, square))


def coefficients(objective: str, along, k, keep, step):
    """(c, p) of every slot, [8, W] as all that is given."""
    added = step * (k - along if objective == "encoding" else k)
    return keep - added * along, added


def over_slots(rule: Rule, blocks, terms):
    """[8, W], the sums over slots of terms(block) [n, I, 8, 128]."""
    return rule.tiles.over_slots(jnp.concatenate([jnp.sum(terms(b), axis=1) for b in blocks]))


def over_channels(rule: Rule, blocks, *terms):
    """[8, W] of each of the functions, the sums over channels of its [n, I, 8, 128]."""
    sums: list[Any] = [0.0] * len(terms)
    for block in blocks:
        sums = [x + jnp.sum(term(block), axis=0) for x, term in zip(sums, terms, strict=True)]
    return [rule.tiles.over_channels(x) for x in sums]


def learn(rule: Rule, blocks, x: Token, scale, slots, base, put):
    """Writes a token, if it is: (h, a, the squares of norms behind it, the scale), all [8, W].

    slots, base: functions of a block, [n, I, 8, 128]; those of slots times scale. put: takes a
    block and the slots behind the token.
    """
    tiles, h = rule.tiles, x.v
    of_base = scale if rule.exact else jnp.ones_like(scale)
    if rule.objective == "decoding":
        asked = tiles.of_slots(of_base * x.k)
        h = h - over_slots(rule, blocks, lambda block: asked * base(block))
    moved = tiles.of_channels(h)[:, None]
    (along,) = over_channels(rule, blocks, lambda block: moved[block] * base(block))
    along = of_base * along
    kept, added = coefficients(rule.objective, along, x.k, x.keep, x.step)
    kept = jnp.where(x.written, kept * scale, 1.0)
    kept, added = tiles.of_slots(kept), tiles.of_slots(added)

    def square(block):
        new = kept * slots(block) + added * moved[block]
        put(block, new)
        return new * new

    (squares,) = over_channels(rule, blocks, square)
    scale = jnp.where(x.written, jnp.where(x.ends, inverse_norm(squares), 1.0), scale)
    return h, along, squares, scale


def optional(refs, there: bool) -> tuple[Any, list]:
    """(the first of refs, which is there or is None, the others)."""
    return (refs[0], refs[1:]) if there else (None, refs)


def kernel(*refs, rule, whole):
    """q, k, v, o [C, 8, W]; scalars [n, P, 8, C]; events [2, C], of which the first row is used;
    fresh slots [J, I, 8, 128] where documents begin, and the states; with keep, those in front of
    the chunk. The blocks of the final states carry them along the walk."""
    q_ref, k_ref, v_ref, scalars_ref, *others = refs
    event_ref, others = optional(others, rule.events)
    fresh_ref, others = optional(others, rule.fresh)
    count = rule.states
    initial_refs, o_ref, state_refs = others[:count], others[count], others[count + 1 :][:count]
    kept_refs = others[2 * count + 1 :]
    blocks = rule.tiles.blocks(whole)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for state_ref, initial_ref in zip(state_refs, initial_refs, strict=True):
            state_ref[...] = initial_ref[...]

    for kept_ref, state_ref in zip(kept_refs, state_refs, strict=bool(kept_refs)):
        kept_ref[...] = state_ref[...]
    slots_ref, base_ref = state_refs[0], state_refs[-1]

    def prepare(t, x, scale):
        if rule.fresh:

            @pl.when(event_ref[0, t] & BEGINS > 0)
            def _():
                for block in blocks:
                    fresh = fresh_ref[block]
                    slots_ref[block] = jnp.where(x.mask("first"), fresh, slots_ref[block])

            scale = jnp.where(x.first, 1.0, scale)
        if not rule.exact:

            @pl.when(event_ref[0, t] & OPENS > 0)
            def _():
                factor = rule.tiles.of_slots(scale)
                for block in blocks:
                    now = factor * slots_ref[block]
                    base_ref[block] = jnp.where(x.mask("opens"), now, base_ref[block])

        return scale

    def token(t, scale):
        x = token_at(t, rule, q_ref, k_ref, v_ref, scalars_ref)
        scale = prepare(t, x, scale)
        slots, base = slots_ref.__getitem__, base_ref.__getitem__
        *_, squares, scale = learn(rule, blocks, x, scale, slots, base, slots_ref.__setitem__)
        asked = rule.tiles.of_slots(x.q * inverse_norm(squares))
        o = over_slots(rule, blocks, lambda block: asked * slots_ref[block])
        o_ref[t] = o.astype(o_ref.dtype)
        return scale

    one = jnp.ones((ROWS, rule.tiles.width), jnp.float32)
    scale = rule.tiles.of_slots(lax.fori_loop(0, q_ref.shape[0], token, one))
    for block in blocks:
        slots_ref[block] = scale * slots_ref[block]


class Blocks(NamedTuple):
    """Blocks of a grid [batch, groups of memories, chunks], the last walked forward or backward."""

    tiles: Tiles
    chunk: int
    chunks: int
    backward: bool = False

    def at(self, n):
        return self.chunks - 1 - n if self.backward else n

    def tokens(self):
        """[C, 8, W] of [B, T, H / P, W]."""
        shape = (None, self.chunk, ROWS, self.tiles.width)
        return pl.BlockSpec(shape, lambda b, g, n: (b, self.at(n), g, 0))

    def scalars(self, count: int):
        """[count, P, 8, C] of [B, G, N, count, P, 8, C]."""
        shape = (None, None, None, count, self.tiles.side, ROWS, self.chunk)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, self.at(n), 0, 0, 0, 0))

    def events(self):
        """[2, C] of [B, G, N, 2, C], scalars."""
        at = lambda b, g, n: (b, g, self.at(n), 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, None, 2, self.chunk), at, memory_space=pltpu.SMEM)

    def fresh(self):
        """[J, I, 8, 128] of [G, J, I, 8, 128]."""
        shape = (None, *self.tiles.shape)
        at = lambda b, g, n: (g, 0, 0, 0, 0)  # noqa: E731
        return pl.BlockSpec(shape, at, pipeline_mode=pl.Buffered(1))

    def state(self):
        """[J, I, 8, 128] of [B, G, J, I, 8, 128], the same for all chunks."""
        shape = (None, None, *self.tiles.shape)
        at = lambda b, g, n: (b, g, 0, 0, 0, 0)  # noqa: E731
        return pl.BlockSpec(shape, at, pipeline_mode=pl.Buffered(1))

    def bounds(self):
        """[J, I, 8, 128] of [B, G, N, J, I, 8, 128]."""
        shape = (None, None, None, *self.tiles.shape)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, self.at(n), 0, 0, 0, 0))


def forward(q, k, v, scalars, events, fresh, states, *, rule, chunk, keep, interpret, limit):
    """(o, final states[, states in front of the chunks [B, G, N, J, I, 8, 128], float32]).

    q, k, v: [B, T, H / P, W], T a multiple of chunk and H of 8 P. scalars: [B, G, N, n, P, 8, C];
    events: int32 [B, G, N, 2, C] or None; fresh: [G, J, I, 8, 128] or None; states: [B, G, J, I, 8,
    128].
    """
    batch, length, rows, _ = v.shape
    groups, chunks, tiles = rows // ROWS, length // chunk, rule.tiles
    blocks = Blocks(tiles, chunk, chunks)
    kept = jax.ShapeDtypeStruct((batch, groups, chunks, *tiles.shape), jnp.float32)
    o, *found = pl.pallas_call(
        partial(kernel, rule=rule, whole=bool(interpret)),
        grid=(batch, groups, chunks),
        in_specs=[
            *[blocks.tokens()] * 3,
            blocks.scalars(len(rule.names)),
            *[blocks.events()] * rule.events,
            *[blocks.fresh()] * rule.fresh,
            *(blocks.state() for _ in states),
        ],
        out_specs=[
            blocks.tokens(),
            *(blocks.state() for _ in states),
            *(blocks.bounds() for _ in states if keep),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            *(jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in states),
            *(kept for _ in states if keep),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="lattice_forward",
        interpret=interpret,
    )(q, k, v, scalars, *[events] * rule.events, *[fresh] * rule.fresh, *states)
    return o, tuple(found[: rule.states]), found[rule.states :]
