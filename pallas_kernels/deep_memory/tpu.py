"""A matrix trained by gradient steps on TPU, forward: one walk over chunks of C rows, W, Z and W_b
on the chip.

    (I + L) E = 2 (alpha_b K W + f_b K Z + phi_b K W_f + c_b K W_b - V),   L = 2 P_b (K K^T)
    O = alpha Q W + f Q Z + phi Q W_f - (P (Q K^T)) E
    W <- alpha_C W + f_C Z + phi_C W_f - K^T P_C E       Z <- mu_C Z - K^T H_C E

The letters are those of factors.py, with _b for what belongs to a row's base, _C for the last row;
c_b is 1 for a base that was carried into the chunk, and W_b is carried on as W is, with the last
row's factors. P_b is zero where j >= i, since a base stands in front of its frozen chunk; so the
chunk's rows are solved for at once, as a delta rule's (`chunk_delta`), and C has nothing to do with
the length of frozen chunks; where these lie evenly, the inverse begins with blocks within them. For
the loss "dot" E = -V.

One grid step is a chunk of a group of heads, read as it lies in [B, R, H, D] and turned on the
chip. Bytes a row and head: those of q, k, v and o, 4 for each of its scalars and, when gradients
follow, 12 K V / C + 4 C of the states in front of each chunk and the inverse (8 K V / C without
momentum). float32 or bfloat16; products of float32 are exact to float32. With bfloat16, float32
factors are rounded only where that moves less than the rounding of o does (`rounded`); elsewhere a
factor is the sum of two arrays: Z holds errors, which are small differences between alike keys.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Blocks
from pallas_kernels.deep_memory.factors import Columns, column_of, factors, names
from pallas_kernels.products import (
    dot,
    dot_in_parts,
    in_step,
    parts,
    rounded,
    turned,
    unit_lower_inverse,
)


class Rule(NamedTuple):
    """What is learned. momentum: whether steps have it. context: c. fresh: whether documents
    begin. loss: "l2" or "dot". apart: rows of aligned blocks that lie in one frozen chunk, a power
    of two; 1 where they may lie anyhow."""

    momentum: bool
    context: int
    fresh: bool
    loss: str
    apart: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of a row's scalars."""
        return names(self.momentum, self.context, self.fresh)

    @property
    def states(self) -> int:
        """Of W, Z and W_b, those that are there."""
        return 3 if self.momentum else 2


def columns_of(ref, rule: Rule, heads: int) -> list[Columns]:
    """Those of every head."""
    columns = ref[...]
    rows = jnp.swapaxes(columns, 0, 1)
    return [Columns(columns, rows, rule.names, heads, head) for head in range(heads)]


def mixed(factors, arrays):
    """The sum of arrays times columns [C, n], or what the last row has of them."""
    return sum(factors[:, n : n + 1] * x for n, x in enumerate(arrays))


def read(x, sources) -> list:
    """x S for every source S in parts."""
    return [dot_in_parts((x,), source, 1, 0) for source in sources]


def last_row(x):
    """[1, n]."""
    return x[x.shape[0] - 1 :]


def kernel(*refs, rule, keep):
    """q, k [C, h, K]; v, o [C, h, V]; columns [C, n h]; W_f where documents begin and the states
    [h, K, V]; with keep, the states in front and inverses [h, C, C]. The blocks of the final states
    carry them along the walk."""
    q_ref, k_ref, v_ref, columns_ref, *others = refs
    fresh_ref, others = others[: rule.fresh], others[rule.fresh :]
    count = rule.states
    initial_refs, o_ref, state_refs = others[:count], others[count], others[count + 1 :][:count]
    kept = others[2 * count + 1 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for state_ref, initial_ref in zip(state_refs, initial_refs, strict=True):
            state_ref[...] = initial_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    queries, keys, values = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref))
    split, rough = partial(parts, like=dtype), partial(rounded, like=dtype)

    def outputs_of(head, of):
        q, k, v = queries[head], keys[head], values[head]
        states = [ref[head] for ref in state_refs]
        sources, base = [*states[:-1], *(ref[head] for ref in fresh_ref)], states[-1]
        found = yield from factors(of, rule.context, dtype)
        errors, solve = -v.astype(jnp.float32), []
        if rule.loss == "l2":
            alike = dot(k, k, 1, 1)
            yield
            lower = 2 * found.paths_of_bases * alike
            solve = [(yield from unit_lower_inverse(lower, dtype, rule.apart))]
            *known, carried = read(k, map(split, (*sources, base)))
            yield
            wanted = mixed(found.of_bases, known) + found.carried * carried - v
            errors = dot_in_parts(split(solve[0]), split(2 * wanted), 1, 0)
            yield
        for ref, array in zip(kept, [*states, *solve], strict=bool(kept)):
            ref[head] = array
        scores = dot(q, k, 1, 1)
        asked = mixed(found.coefficients, read(q, map(rough, sources)))
        yield
        answer = asked - dot_in_parts(rough(found.paths * scores), rough(errors), 1, 0)
        yield
        beside = jnp.concatenate([column_of(row) * errors for row in found.last], axis=1)
        learnt = jnp.split(dot_in_parts((k,), split(beside), 0, 0), count, axis=1)
        yield
        new = [mixed(last_row(found.coefficients), sources)]
        if rule.momentum:
            new.append(found.mu[:, -1:] * states[1])
        kept_base = last_row(found.carried) * base
        new.append(mixed(last_row(found.of_bases), sources) + kept_base)
        for ref, x, step in zip(state_refs, new, learnt, strict=True):
            ref[head] = x - step
        return answer.astype(dtype)

    outputs = in_step(map(outputs_of, range(heads), columns_of(columns_ref, rule, heads)))
    o_ref[...] = turned(jnp.stack(outputs))


def fresh_block(blocks: Blocks, width: int, size: int):
    """[heads, K, V] of [H, K, V]."""
    shape = (blocks.heads, width, size)
    return pl.BlockSpec(shape, lambda b, g, n: (g, 0, 0), pipeline_mode=pl.Buffered(1))


def forward(q, k, v, columns, fresh, states, *, rule, chunk, heads, keep, interpret, limit):
    """(o, final states[, states in front of the chunks [B, N, H, K, V] and, for the loss "l2",
    inverses [B, N, H, C, C], all float32]).

    R must be a multiple of chunk and H of heads. columns: [B, G, N, C, n heads]. fresh: [H, K, V]
    or None; states: W, Z and W_b [B, H, K, V].
    """
    batch, length, count, width = q.shape
    size = v.shape[-1]
    chunks = length // chunk
    blocks = Blocks(chunk, heads, chunks)
    shape = jax.ShapeDtypeStruct
    axes = [(width, size)] * rule.states + [(chunk, chunk)] * (rule.loss == "l2")
    kept = [(blocks.bounds(*two), shape((batch, chunks, count, *two), jnp.float32)) for two in axes]
    state, given = blocks.state(width, size), [fresh] * rule.fresh
    o, *found = pl.pallas_call(
        partial(kernel, rule=rule, keep=keep),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            blocks.columns(len(rule.names)),
            *(fresh_block(blocks, width, size) for _ in given),
            *(state for _ in states),
        ],
        out_specs=[
            blocks.tokens(size),
            *(state for _ in states),
            *(block for block, _ in kept if keep),
        ],
        out_shape=[
            shape(v.shape, v.dtype),
            *(shape(x.shape, jnp.float32) for x in states),
            *(array for _, array in kept if keep),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="deep_memory_forward",
        interpret=interpret,
    )(q, k, v, columns, *given, *states)
    return o, tuple(found[: rule.states]), found[rule.states :]
