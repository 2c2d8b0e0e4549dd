"""A matrix trained by gradient steps on TPU, backward: the walk of tpu.py in reverse, the gradients
of W, Z and W_b on the chip.

With the letters of tpu.py, E made again from the states and the inverse N = (I + L)^-1 of the
forward pass, dW, dZ and dW_b the gradients of the states behind the chunk, W_n each source with
columns x_n of O and b_n of the bases, and F_n the columns of what each pair adds to a state S_n:

    dE = -(P (Q K^T))^T dO - sum_n F_n (K dS_n)       D = 2 N^T dE,  dL = -D E^T / 2
    dQ = sum_n x_n dO W_n^T - (dP_o P) K              dP_o = dO E^T
    dK = sum_n b_n D W_n^T + c_b D W_b^T - (dP_o P)^T Q + (dA + dA^T) K - sum_n F_n (E dS_n^T)
    dV = -D                                           dA = 2 dL P_b, of K K^T
    dP = -dP_o (Q K^T), dP_b = 2 dL (K K^T), and in the last row those of F_n, -k (E dS_n^T)
    dW_n <- sums of the final states' factors times dS_n + (x_n Q)^T dO + (b_n K)^T D

`factors_back` goes on from the gradients of the factors.
"""

from collections.abc import Generator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Blocks
from pallas_kernels.deep_memory.factors import (
    Factors,
    column_of,
    factors,
    factors_back,
    gradient_names,
    row_of,
    summed,
)
from pallas_kernels.deep_memory.tpu import (
    Rule,
    columns_of,
    fresh_block,
    last_row,
    mixed,
    read,
)
from pallas_kernels.products import dot, dot_in_parts, in_step, parts, rounded, turned


def total(x):
    """[1, 1]."""
    return jnp.sum(x, keepdims=True)


def ending_of(rows, size: int):
    """Zeros [C, n] but for the last row [1, n]."""
    at = jax.lax.broadcasted_iota(jnp.int32, (size, rows.shape[1]), 0)
    return jnp.where(at == size - 1, rows, 0)


class Chunk(NamedTuple):
    """Of one head. sources: W, Z and W_f, those that are there, in front of the chunk, base: W_b;
    dstates: the gradients of W, Z and W_b behind it; inverse: N in parts, None for the loss
    "dot"."""

    q: Any
    k: Any
    v: Any
    do: Any
    sources: list
    base: Any
    dstates: list
    found: Factors
    inverse: Any

    def split(self, x):
        """x in parts."""
        return parts(x, self.q.dtype)

    def rough(self, x):
        """x rounded."""
        return rounded(x, self.q.dtype)


def errors_again(x: Chunk) -> Generator[None, None, tuple]:
    """E as in the forward pass, and what keys read of the sources."""
    if x.inverse is None:
        return -x.v.astype(jnp.float32), []
    *known, carried = read(x.k, map(x.split, (*x.sources, x.base)))
    yield
    wanted = mixed(x.found.of_bases, known) + x.found.carried * carried - x.v
    errors = dot_in_parts(x.inverse, x.split(2 * wanted), 1, 0)
    yield
    return errors, known


def answers_back(x: Chunk, written) -> Generator[None, None, tuple]:
    """dE, dQ, dK, the rows dF_n [1, C], and the gradients of the coefficients, P and those of the
    bases, from the answers and from what the states take of E (written: E in parts)."""
    found, (q, k, do) = x.found, (x.q, x.k, x.do)
    columns, scores = [column_of(row) for row in found.last], dot(q, k, 1, 1)
    yield
    ends = [x.split(d) for d in x.dstates]
    derrors = -dot_in_parts(x.rough(found.paths * scores), (do,), 0, 0)
    yield
    for column, d in zip(columns, ends, strict=True):
        derrors = derrors - column * dot_in_parts((k,), d, 1, 0)
    yield
    dscores = dot_in_parts((do,), written, 1, 1)
    weights = x.rough(-dscores * found.paths)
    dq = dot_in_parts(weights, (k,), 1, 0)
    yield
    dk = dot_in_parts(weights, (q,), 0, 0)
    yield
    dpaths = -dscores * scores
    pushed = [-dot_in_parts(written, d, 1, 1) for d in ends]
    yield
    dends = [row_of(summed(k * d)) for d in pushed]
    dk = dk + sum(column * d for column, d in zip(columns, pushed, strict=True))
    dreads = [dot_in_parts((do,), x.rough(s), 1, 1) for s in x.sources]
    yield
    dq = dq + mixed(found.coefficients, dreads)
    asked = read(q, map(x.rough, x.sources))
    yield
    dcoefficients = jnp.concatenate([summed(do * a) for a in asked], axis=1)
    zeros = jnp.zeros_like(dcoefficients), jnp.zeros_like(dpaths)
    return derrors, dq, dk, dends, [dcoefficients, dpaths, *zeros]


def solution_back(x: Chunk, written, derrors, known) -> Generator[None, None, tuple]:
    """D, dK and the gradients of the bases' coefficients and P, through the solution for E."""
    k, found = x.k, x.found
    solved = 2 * dot_in_parts(x.inverse, x.split(derrors), 0, 0)
    yield
    dlower = -dot_in_parts(x.split(solved), written, 1, 1)
    yield
    dpaths_of_bases = dlower * dot(k, k, 1, 1)
    both = x.rough(dlower * found.paths_of_bases)
    yield
    dk = dot_in_parts(both, (k,), 1, 0) + dot_in_parts(both, (k,), 0, 0)
    yield
    *back, carried = (dot_in_parts(x.rough(solved), x.rough(s), 1, 1) for s in (*x.sources, x.base))
    yield
    dk = dk + mixed(found.of_bases, back) + found.carried * carried
    dof_bases = jnp.concatenate([summed(solved * a) for a in known], axis=1)
    return solved, dk, dof_bases, dpaths_of_bases


def ends_of(x: Chunk, dends) -> list:
    """The last rows that the states behind the chunk add to the gradients of the coefficients, P
    and those of the bases."""
    of_weights, of_base = (
        jnp.concatenate([total(source * d) for source in x.sources], axis=1)
        for d in (x.dstates[0], x.dstates[-1])
    )
    return [of_weights, dends[0], of_base, dends[-1]]


def states_back(x: Chunk, solved) -> Generator[None, None, tuple[list, Any]]:
    """(The gradients of the sources but what Z hands on to itself, that of W_b)."""
    found, new = x.found, []
    final, final_of_bases = last_row(found.coefficients), last_row(found.of_bases)
    for n in range(len(x.sources)):
        here, of_bases = found.coefficients[:, n : n + 1], found.of_bases[:, n : n + 1]
        d = final[:, n : n + 1] * x.dstates[0] + final_of_bases[:, n : n + 1] * x.dstates[-1]
        d = d + dot_in_parts((x.q,), x.rough(here * x.do), 0, 0)
        if solved is not None:
            d = d + dot_in_parts((x.k,), x.rough(of_bases * solved), 0, 0)
        new.append(d)
        yield
    dbase = last_row(found.carried) * x.dstates[-1]
    if solved is not None:
        dbase = dbase + dot_in_parts((x.k,), x.rough(found.carried * solved), 0, 0)
    return new, dbase


def kernel(*refs, rule, inverted):
    """Rows' arrays [C, h, K or V]; columns [C, n h]; W_f, the states in front, inverses [h, C, C];
    the gradients. The blocks of the states' gradients, that of W_f too, carry them along the
    walk."""
    q_ref, k_ref, v_ref, do_ref, columns_ref, *others = refs
    count, fresh = rule.states, rule.fresh
    fresh_ref, others = others[:fresh], others[fresh:]
    bound_refs, others = others[:count], others[count:]
    inverse_ref, others = others[:inverted], others[inverted:]
    dfinal_refs, (dq_ref, dk_ref, dv_ref, dcolumns_ref, *carried) = others[:count], others[count:]
    dstate_refs, dfresh_ref = carried[:count], carried[count:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, final in zip(dstate_refs, dfinal_refs, strict=True):
            ref[...] = final[...]
        for ref in dfresh_ref:
            ref[...] = jnp.zeros_like(ref)

    heads, dtype = q_ref.shape[1], q_ref.dtype
    queries, keys, values, douts = (turned(ref[...]) for ref in (q_ref, k_ref, v_ref, do_ref))
    split = partial(parts, like=dtype)

    def gradients_of(head, of):
        *current, base = (ref[head] for ref in bound_refs)
        x = Chunk(
            queries[head],
            keys[head],
            values[head],
            douts[head],
            [*current, *(ref[head] for ref in fresh_ref)],
            base,
            [ref[head] for ref in dstate_refs],
            (yield from factors(of, rule.context, dtype)),
            split(inverse_ref[0][head]) if inverted else None,
        )
        errors, known = yield from errors_again(x)
        written = split(errors)
        derrors, dq, dk, dends, made = yield from answers_back(x, written)
        dv, solved = -derrors, None
        if inverted:
            solved, more, *of_bases = yield from solution_back(x, written, derrors, known)
            dk, dv, made = dk + more, -solved, [*made[:2], *of_bases]
        dcoefficients, dpaths, dof_bases, dpaths_of_bases = (
            d + ending_of(end, d.shape[0]) for d, end in zip(made, ends_of(x, dends), strict=True)
        )
        new, dbase = yield from states_back(x, solved)
        dh = dmu = None
        if rule.momentum:
            new[1] = new[1] + x.found.mu[:, -1:] * x.dstates[1]
            dh, dmu = dends[1], total(x.sources[1] * x.dstates[1])
        if fresh:
            dfresh_ref[0][head] += new.pop()
        for ref, d in zip(dstate_refs, (*new, dbase), strict=True):
            ref[head] = d
        dcolumns = yield from factors_back(
            x.found, dcoefficients, dof_bases, dpaths, dpaths_of_bases, dh, dmu, dtype
        )
        return [d.astype(dtype) for d in (dq, dk, dv)], dcolumns

    made = in_step(map(gradients_of, range(heads), columns_of(columns_ref, rule, heads)))
    arrays, dcolumns = zip(*made, strict=True)
    by_name = zip(*dcolumns, strict=True)
    dcolumns_ref[...] = jnp.concatenate([x for of in by_name for x in of], axis=1)
    for ref, of in zip((dq_ref, dk_ref, dv_ref), zip(*arrays, strict=True), strict=True):
        ref[...] = turned(jnp.stack(of))


def backward(
    q, k, v, columns, fresh, kept, do, dfinals, *, rule: Rule, chunk, heads, interpret, limit
):  # fmt: skip
    """(dq, dk, dv, the columns of `gradient_names` [B, G, N, C, n heads], dstates, dfresh [B, H, K,
    V] or None) from what `forward` kept."""
    batch, length, count, width = q.shape
    size = v.shape[-1]
    chunks, states = length // chunk, rule.states
    blocks = Blocks(chunk, heads, chunks, backward=True)
    shape, inverses = jax.ShapeDtypeStruct, kept[states:]
    state, given = blocks.state(width, size), [fresh] * rule.fresh
    gradients = len(gradient_names(rule.momentum, rule.context))
    carried = [shape(x.shape, jnp.float32) for x in (*dfinals, *dfinals[: rule.fresh])]
    dq, dk, dv, dcolumns, *found = pl.pallas_call(
        partial(kernel, rule=rule, inverted=len(inverses)),
        grid=(batch, count // heads, chunks),
        in_specs=[
            *(blocks.tokens(n) for n in (width, width, size, size)),
            blocks.columns(len(rule.names)),
            *(fresh_block(blocks, width, size) for _ in given),
            *(blocks.bounds(width, size) for _ in range(states)),
            *(blocks.bounds(chunk, chunk) for _ in inverses),
            *(state for _ in dfinals),
        ],
        out_specs=[
            *(blocks.tokens(n) for n in (width, width, size)),
            blocks.columns(gradients),
            *(state for _ in carried),
        ],
        out_shape=[
            *(shape(a.shape, a.dtype) for a in (q, k, v)),
            shape((*columns.shape[:-1], gradients * heads), jnp.float32),
            *carried,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="deep_memory_backward",
        interpret=interpret,
    )(q, k, v, do, columns, *given, *kept, *dfinals)
    return dq, dk, dv, dcolumns, tuple(found[:states]), found[states] if rule.fresh else None
