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

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Blocks
from pallas_kernels.deep_memory.factors import (
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
    split, rough = partial(parts, like=dtype), partial(rounded, like=dtype)

    def gradients_of(head, of):
        q, k, v, do = queries[head], keys[head], values[head], douts[head]
        size = q.shape[0]
        *current, base = (ref[head] for ref in bound_refs)
        dstates = [ref[head] for ref in dstate_refs]
        sources = [*current, *(ref[head] for ref in fresh_ref)]
        # the forward pass again
        found = yield from factors(of, rule.context, dtype)
        errors = -v.astype(jnp.float32)
        known: list = []
        if inverted:
            *known, carried = read(k, map(split, (*sources, base)))
            yield
            wanted = mixed(found.of_bases, known) + found.carried * carried - v
            inverse = split(inverse_ref[0][head])
            errors = dot_in_parts(inverse, split(2 * wanted), 1, 0)
            yield
        written = split(errors)
        ending = [column_of(row) for row in found.last]
        scores = dot(q, k, 1, 1)
        yield
        # back through it
        ends = [split(d) for d in dstates]
        derrors = -dot_in_parts(rough(found.paths * scores), (do,), 0, 0)
        yield
        for column, d in zip(ending, ends, strict=True):
            derrors = derrors - column * dot_in_parts((k,), d, 1, 0)
        yield
        dscores = dot_in_parts((do,), written, 1, 1)
        weights = rough(-dscores * found.paths)
        dq = dot_in_parts(weights, (k,), 1, 0)
        yield
        dk = dot_in_parts(weights, (q,), 0, 0)
        yield
        dpaths = -dscores * scores
        pushed = [-dot_in_parts(written, d, 1, 1) for d in ends]
        yield
        dends = [row_of(summed(k * x)) for x in pushed]
        dk = dk + sum(column * x for column, x in zip(ending, pushed, strict=True))
        dreads = [dot_in_parts((do,), rough(s), 1, 1) for s in sources]
        yield
        dq = dq + mixed(found.coefficients, dreads)
        asked = read(q, map(rough, sources))
        yield
        dcoefficients = jnp.concatenate([summed(do * x) for x in asked], axis=1)
        dof_bases = jnp.zeros_like(dcoefficients)
        dpaths_of_bases = jnp.zeros_like(dpaths)
        dv = -derrors
        if inverted:
            solved = 2 * dot_in_parts(inverse, split(derrors), 0, 0)
            dv = -solved
            yield
            dlower = -dot_in_parts(split(solved), written, 1, 1)
            yield
            dpaths_of_bases = dlower * dot(k, k, 1, 1)
            both = rough(dlower * found.paths_of_bases)
            yield
            dk = dk + dot_in_parts(both, (k,), 1, 0) + dot_in_parts(both, (k,), 0, 0)
            yield
            back = [dot_in_parts(rough(solved), rough(s), 1, 1) for s in (*sources, base)]
            yield
            dk = dk + mixed(found.of_bases, back[:-1]) + found.carried * back[-1]
            dof_bases = jnp.concatenate([summed(solved * x) for x in known], axis=1)
        # of the states in front, and of the last row's factors
        dcurrent, *dmomentum, dbase = dstates
        ends_of = [total(s * dcurrent) for s in sources], [total(s * dbase) for s in sources]
        lasts = (ending_of(jnp.concatenate(x, axis=1), size) for x in ends_of)
        dcoefficients, dof_bases = (
            x + more for x, more in zip((dcoefficients, dof_bases), lasts, strict=True)
        )
        dpaths = dpaths + ending_of(dends[0], size)
        dpaths_of_bases = dpaths_of_bases + ending_of(dends[-1], size)
        final, final_of_bases = last_row(found.coefficients), last_row(found.of_bases)
        new = []
        for n in range(len(sources)):
            columns = found.coefficients[:, n : n + 1], found.of_bases[:, n : n + 1]
            d = final[:, n : n + 1] * dcurrent + final_of_bases[:, n : n + 1] * dbase
            d = d + dot_in_parts((q,), rough(columns[0] * do), 0, 0)
            if inverted:
                d = d + dot_in_parts((k,), rough(columns[1] * solved), 0, 0)
            new.append(d)
            yield
        if rule.momentum:
            new[1] = new[1] + found.mu[:, -1:] * dmomentum[0]
        dbase = last_row(found.carried) * dbase
        if inverted:
            dbase = dbase + dot_in_parts((k,), rough(found.carried * solved), 0, 0)
        if fresh:
            dfresh_ref[0][head] += new.pop()
        for ref, d in zip(dstate_refs, (*new, dbase), strict=True):
            ref[head] = d
        dh = dends[1] if rule.momentum else None
        dmu = total(current[1] * dmomentum[0]) if rule.momentum else None
        dcolumns = yield from factors_back(
            found, dcoefficients, dof_bases, dpaths, dpaths_of_bases, dh, dmu, dtype
        )
        return [x.astype(dtype) for x in (dq, dk, dv)], dcolumns

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
