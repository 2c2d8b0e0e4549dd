"""Slots of unit norm on TPU, backward: the slots of a chunk are made again from those in front of
it, then a walk in reverse.

With G, H the gradients of the slots S' behind a token and of its base, F = S' / |S'| what o is read
from, |S'| divided by where a frozen chunk ends (E = 1, otherwise 0):

    X = E G + q do^T,   G' = (1 - E) G + (X - F (F . X)) / |S'|,   dq = F do
    dc = S . G',  dp = h . G',  and by c = beta - p a, p = gamma w: da, dbeta, dgamma, dk
    dh = p G' + da D,   G = c G',   H += da h^T - k dh^T,   dk -= D dh  (decoding),   dv = dh

Products of a letter without ^T are sums over channels, one for each slot, or over slots for dh. H
joins G where the frozen chunk began. The gradients of a token's scalars are jax's, of a function of
[8, W] arrays (`coefficients`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lattice.tiles import ROWS, lane
from pallas_kernels.lattice.tpu import (
    BEGINS,
    OPENS,
    TINY,
    Blocks,
    Rule,
    coefficients,
    inverse_norm,
    learn,
    optional,
    over_channels,
    over_slots,
    token_at,
)


class Chunk(NamedTuple):
    """What is made again of a chunk: slots, bases [C + 1, J, I, 8, 128], the latter one for each
    event; h, scale, squares, along [C, 8, W]: h, the scale in front of a token, the squares of
    norms behind it, and a. bases, events and fresh are None where there are none."""

    rule: Rule
    blocks: list[slice]
    events: Any
    fresh: Any
    slots: Any
    h: Any
    scale: Any
    squares: Any
    along: Any
    bases: Any = None

    def in_front(self, t, x):
        """A function of a block: slots in front of a token, of its document."""
        if not self.rule.fresh:
            return lambda block: self.slots[t, block]
        first = x.mask("first")
        return lambda block: jnp.where(first, self.fresh[block], self.slots[t, block])

    def base_of(self, t, x):
        """The same of its base."""
        if self.rule.exact:
            return self.in_front(t, x)
        number = self.events[1, t]
        return lambda block: self.bases[number, block]

    def make(self, t, x, scale):
        """A token forward; returns the scale behind it."""
        slots, base = self.in_front(t, x), self.base_of(t, x)
        if self.rule.fresh:
            scale = jnp.where(x.first, 1.0, scale)
        if not self.rule.exact:
            number = self.events[1, t]

            @pl.when(self.events[0, t] & OPENS > 0)
            def _():
                factor = self.rule.tiles.of_slots(scale)
                for block in self.blocks:
                    now, before = factor * slots(block), self.bases[number - 1, block]
                    self.bases[number, block] = jnp.where(x.mask("opens"), now, before)

        def put(block, new):
            self.slots[t + 1, block] = new

        self.scale[t] = scale
        found = learn(self.rule, self.blocks, x, scale, slots, base, put)
        self.h[t], self.along[t], self.squares[t], scale = found
        return scale


def through_norms(chunk: Chunk, t, x, do, slopes, given):
    """(dc, dp, dq), having put G' into `slopes`; given: G. do: [8, W]."""
    tiles, blocks = chunk.rule.tiles, chunk.blocks
    scale, squares = chunk.scale[t], chunk.squares[t]
    through, inverse = x.written & x.ends, inverse_norm(squares)
    moved, answered = (tiles.of_channels(a)[:, None] for a in (chunk.h[t], do))
    behind, in_front = lambda block: chunk.slots[t + 1, block], chunk.in_front(t, x)
    of_slots, of_answers = over_channels(
        chunk.rule,
        blocks,
        lambda block: behind(block) * given[block],
        lambda block: behind(block) * answered[block],
    )
    along = jnp.where(through, of_slots, 0.0) + x.q * of_answers
    along = jnp.where(squares < TINY, 0.0, inverse * inverse * inverse * along)
    after = jnp.where(through, inverse, jnp.where(x.written, 1.0, scale))
    after, asked, along = map(tiles.of_slots, (after, inverse * x.q, along))
    for block in blocks:
        slope = after * given[block] + asked * answered[block]
        slopes[block] = slope - along * behind(block)
    dkept, dadded = over_channels(
        chunk.rule,
        blocks,
        lambda block: in_front(block) * slopes[block],
        lambda block: moved[block] * slopes[block],
    )
    return jnp.where(x.written, scale * dkept, 0.0), dadded, inverse * of_answers


def through_writing(chunk: Chunk, t, x, dkept, dadded, slopes, dslots, dbase):
    """(dk, dv, those of keep and step in all slots), each [8, W], having put G and H into `dslots`
    and `dbase`, refs."""
    rule, tiles, scale = chunk.rule, chunk.rule.tiles, chunk.scale[t]
    write = partial(coefficients, rule.objective)
    (kept, added), pull = jax.vjp(write, chunk.along[t], x.k, x.keep, x.step)
    dalong, dk, dkeep, dstep = pull((dkept, dadded))
    kept = jnp.where(x.written, kept, 1 / scale)
    of_base = scale if rule.exact else jnp.ones_like(scale)
    kept, added, of_directions, along, asked = map(
        tiles.of_slots, (kept, added, of_base * dalong, dalong, x.k)
    )
    base = chunk.base_of(t, x)
    dh = over_slots(
        rule, chunk.blocks, lambda block: added * slopes[block] + of_directions * base(block)
    )
    moved, back = (tiles.of_channels(a)[:, None] for a in (chunk.h[t], dh))
    for block in chunk.blocks:
        change = along * moved[block]
        if rule.objective == "decoding":
            change = change - asked * back[block]
        if rule.exact:
            dslots[block] = kept * slopes[block] + change
        else:
            dslots[block] = kept * slopes[block]
            dbase[block] = dbase[block] + change
    if rule.objective == "decoding":
        (of_error,) = over_channels(rule, chunk.blocks, lambda block: base(block) * back[block])
        dk = dk - of_base * of_error
    return dk, dh, dkeep, dstep


def unprepare(chunk: Chunk, t, x, dslots, dbase, dfresh):
    """Gradients, in refs, in front of what `tpu.kernel` does before a token is written."""
    if not chunk.rule.exact:

        @pl.when(chunk.events[0, t] & OPENS > 0)
        def join():
            opens = x.mask("opens")
            for block in chunk.blocks:
                slope = dbase[block]
                dslots[block] = dslots[block] + jnp.where(opens, slope, 0.0)
                dbase[block] = jnp.where(opens, 0.0, slope)

    if chunk.rule.fresh:

        @pl.when(chunk.events[0, t] & BEGINS > 0)
        def begin():
            first = x.mask("first")
            for block in chunk.blocks:
                slope = dslots[block]
                dfresh[block] = dfresh[block] + jnp.where(first, slope, 0.0)
                dslots[block] = jnp.where(first, 0.0, slope)


def put_scalar(ref, t, x, dim: int):
    """Sums of x [8, W] over the slots of each memory, into token t of ref [P, 8, C]."""
    at = lane(x.shape)
    for n in range(ref.shape[0]):
        mine = x if ref.shape[0] == 1 else jnp.where((at >= n * dim) & (at < (n + 1) * dim), x, 0.0)
        one = jnp.sum(mine, axis=1, keepdims=True)
        ref[n] = jnp.where(lane(ref.shape[1:]) == t, one, ref[n])


def kernel(*refs, rule, whole):
    """q, k, v, do, dq, dk, dv [C, 8, W]; scalars [n, P, 8, C], of which keep and step have
    gradients; events [2, C]: what happens, and the number of the base of each token. The blocks of
    the gradients of the first states carry them along the walk."""
    q_ref, k_ref, v_ref, do_ref, scalars_ref, *others = refs
    event_ref, others = optional(others, rule.events)
    fresh_ref, others = optional(others, rule.fresh)
    count = rule.states
    front_refs, final_refs, others = others[:count], others[count : 2 * count], others[2 * count :]
    dq_ref, dk_ref, dv_ref, dscalars_ref, *others = others
    dfresh_ref, others = optional(others, rule.fresh)
    dstate_refs, (slopes, *made) = others[:count], others[count:]
    dslots_ref, dbase_ref = dstate_refs[0], dstate_refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for dstate_ref, final_ref in zip(dstate_refs, final_refs, strict=True):
            dstate_ref[...] = final_ref[...]
        if rule.fresh:
            dfresh_ref[...] = jnp.zeros_like(dfresh_ref)

    chunk = Chunk(rule, rule.tiles.blocks(whole), event_ref, fresh_ref, *made)
    for made_ref, front_ref in zip((chunk.slots, chunk.bases), front_refs, strict=False):
        made_ref[0] = front_ref[...]
    dscalars_ref[...] = jnp.zeros_like(dscalars_ref)

    def at(t):
        return token_at(t, rule, q_ref, k_ref, v_ref, scalars_ref)

    def back(n, _):
        t = q_ref.shape[0] - 1 - n
        x, do = at(t), do_ref[t].astype(jnp.float32)
        dkept, dadded, dq = through_norms(chunk, t, x, do, slopes, dslots_ref)
        dk, dv, *dscalars = through_writing(
            chunk, t, x, dkept, dadded, slopes, dslots_ref, dbase_ref
        )
        for ref, gradient in ((dq_ref, dq), (dk_ref, dk), (dv_ref, dv)):
            ref[t] = gradient.astype(ref.dtype)
        for row, gradient in enumerate(dscalars):
            put_scalar(dscalars_ref.at[row], t, gradient, rule.dim)
        unprepare(chunk, t, x, dslots_ref, dbase_ref, dfresh_ref)
        return 0

    one = jnp.ones(chunk.scale.shape[1:], jnp.float32)
    lax.fori_loop(0, q_ref.shape[0], lambda t, scale: chunk.make(t, at(t), scale), one)
    lax.fori_loop(0, q_ref.shape[0], back, 0)


def backward(
    q, k, v, scalars, events, fresh, kept, do, dstates, *, rule, chunk, interpret, limit
):  # fmt: skip
    """(dq, dk, dv, those of keep and step [B, G, N, 2, P, 8, C], of fresh for each sequence [B, G,
    J, I, 8, 128] or None, and of the first states), of what `tpu.forward` takes. kept: the states
    in front of the chunks. dq, dk and dv have the dtypes of q, k and v."""
    batch, length, rows, _ = v.shape
    groups, chunks, tiles = rows // ROWS, length // chunk, rule.tiles
    blocks = Blocks(tiles, chunk, chunks, backward=True)
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
    state = jax.ShapeDtypeStruct((batch, groups, *tiles.shape), jnp.float32)
    dscalars = jax.ShapeDtypeStruct((*scalars.shape[:3], 2, *scalars.shape[4:]), jnp.float32)
    small = pltpu.VMEM((chunk, ROWS, tiles.width), jnp.float32)
    history = pltpu.VMEM((chunk + 1, *tiles.shape), jnp.float32)
    dq, dk, dv, dscalars, *found = pl.pallas_call(
        partial(kernel, rule=rule, whole=bool(interpret)),
        grid=(batch, groups, chunks),
        in_specs=[
            *[blocks.tokens()] * 4,
            blocks.scalars(len(rule.names)),
            *[blocks.events()] * rule.events,
            *[blocks.fresh()] * rule.fresh,
            *(blocks.bounds() for _ in kept),
            *(blocks.state() for _ in dstates),
        ],
        out_specs=[
            *[blocks.tokens()] * 3,
            blocks.scalars(2),
            *[blocks.state()] * rule.fresh,
            *(blocks.state() for _ in dstates),
        ],
        out_shape=[*map(like, (q, k, v)), dscalars, *[state] * (rule.states + rule.fresh)],
        scratch_shapes=[
            pltpu.VMEM(tiles.shape, jnp.float32),
            history,
            *[small] * 4,
            *[history] * (not rule.exact),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="lattice_backward",
        interpret=interpret,
    )(
        *(q, k, v, do, scalars),
        *[events] * rule.events,
        *[fresh] * rule.fresh,
        *kept,
        *dstates,
    )
    dfresh = found.pop(0) if rule.fresh else None
    return dq, dk, dv, dscalars, dfresh, tuple(found)
