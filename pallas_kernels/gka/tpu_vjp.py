"""Chebyshev's iteration on TPU, backward: the walk of tpu.py in reverse, dH on the chip.

With the letters of tpu.py, x_r the iterates made again and kept, y that of dX / n in reverse:

    u = w_r y_{r+1};  y_r = u - s M u - (w_{r+1} - 1) y_{r+2}            M is symmetric
    dM = -s sum_r u_r x_r^T, of which H, W / n, k and e^G / n have theirs
    dq = s (y_0 + sum_r u_r)
    d(1/n) = dX . x_R + d(e^G / n) . e^G + d(W / n) . W;   d(n^2) = -d(1/n) / 2 n^3
    dH <- e^{G_C} dH + what M and n have of it
    dbeta^2, dk, dg: of W, n and of what H takes

The sums over r are in scratch. They are differences: in bfloat16 all factors have two parts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.common import Blocks
from pallas_kernels.gka.reference import step_of
from pallas_kernels.gka.tpu import Moments, Solver, inverse_norm, moments, sides
from pallas_kernels.products import dot, dot_in_parts, in_step, parts, places, turned


def kernel(*refs, decaying, ridge):
    """q, k, dx, dq, dk [C, h, K]; rates and their gradients as rows [h, C] and columns [C, h];
    `decaying` arrays and dg of decays.py; states [h, K, K]. The block of the initial state's
    gradient carries dH along the walk."""
    weight_ref, q_ref, k_ref, dx_ref, row_ref, column_ref, *others = refs
    bounds_ref, dfinal_ref, *others = others[decaying:]
    dq_ref, dk_ref, drow_ref, dcolumn_ref, dg_ref, dstate_ref, *scratch = others
    xs_ref, ys_ref, sums, solver_refs = scratch[0], scratch[1], scratch[2:7], scratch[7:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    iterations, step = weight_ref.shape[0], step_of(ridge)
    split = partial(parts, like=dtype)
    queries, keys = turned(q_ref[...]), turned(k_ref[...])
    cotangents = turned(dx_ref[...])
    rows, columns = row_ref[...], column_ref[...]
    decayed = decays.of_heads([ref[...] for ref in refs[6 : 6 + decaying]], heads, split, dtype)
    solver = Solver(solver_refs, queries, dtype, ridge)

    def prepare(head, decay):
        k, state = keys[head], bounds_ref[head]
        found = yield from moments(k, state, decay, rows[head : head + 1], split)
        inverse, empty = inverse_norm(found.square)
        solver.put(head, k, state, decay.since_start, found.weights, inverse)
        xs_ref[0, head] = jnp.zeros(xs_ref.shape[2:], jnp.float32)
        xs_ref[1, head] = step * queries[head].astype(jnp.float32)
        ys_ref[0, head] = jnp.where(empty, 0, cotangents[head] * inverse)
        ys_ref[1, head] = jnp.zeros(ys_ref.shape[2:], jnp.float32)

    in_step(map(prepare, range(heads), decayed))
    for ref in sums:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def iterate(n, _):
        def advance(head):
            weight, x, before = weight_ref[n], xs_ref[n + 1, head], xs_ref[n, head]
            xs_ref[n + 2, head] = yield from solver.ahead(head, weight, x, before)

        in_step(map(advance, range(heads)))
        return 0

    lax.fori_loop(0, iterations, iterate, 0)

    def back(m, _):
        n, now = iterations - 1 - m, m % 2
        in_step(
            retreat(solver, head, weight_ref[n], xs_ref[n + 1, head], ys_ref, now, sums, split)
            for head in range(heads)
        )
        return 0

    lax.fori_loop(0, iterations, back, 0)

    def gradients_of(head, decay):
        k, state, dstate = keys[head], bounds_ref[head], dstate_ref[head]
        since, rates = decay.since_start, columns[:, head : head + 1]
        taken, *products = (ref[head] for ref in sums)
        dpast, dpairs, dheld, dk = (-step * a for a in products)
        dpast = jnp.sum(dpast, axis=1, keepdims=True)
        found = yield from moments(k, state, decay, rows[head : head + 1], split)
        inverse, empty = inverse_norm(found.square)
        dx, last = cotangents[head], xs_ref[iterations + 1, head]
        dinverse = dpast * since + jnp.sum(dx * last, axis=1, keepdims=True)
        dinverse = dinverse + jnp.sum(dpairs * found.weights, axis=1, keepdims=True)
        norm = of_norm(found, decay, k, state, jnp.where(empty, 0, dinverse), inverse, split)
        dweights, dsince, dkeys, dstates = yield from norm
        dweights, dsince = dweights + dpairs * inverse, dsince + dpast * inverse
        dk, dheld = dk + dkeys, dheld + dstates
        yield
        # of what the state takes
        low = split(dstate)
        taking = dot_in_parts((k,), low, 1, 0)
        dk = dk + decay.to_end * rates * (taking + dot_in_parts((k,), low, 1, 1))
        yield
        writing = decay.to_end * jnp.sum(taking * k.astype(jnp.float32), axis=1, keepdims=True)
        asking, carried = since * dsince, state * dstate
        dlog = decay.log_gradient(dweights * found.weights, asking, rates * writing, carried)
        dstate_ref[head] = decay.over(dstate) + dheld
        dq = step * (taken + ys_ref[iterations % 2, head]) + jnp.where(empty, dx, 0)
        drow = jnp.sum(dweights * decay.between, axis=0, keepdims=True)
        return (dq, dk), (drow, writing), dlog

    made, drates, dlogs = zip(*in_step(map(gradients_of, range(heads), decayed)), strict=True)
    for ref, arrays in zip((dq_ref, dk_ref), zip(*made, strict=True), strict=True):
        ref[...] = turned(jnp.stack(arrays))
    drows, dcolumns = zip(*drates, strict=True)
    drow_ref[...] = jnp.concatenate(drows, axis=0)
    dcolumn_ref[...] = jnp.concatenate(dcolumns, axis=1)
    dg_ref[...] = decays.stacked(dlogs, like=dtype)


def retreat(solver, head: int, weight, x, ys_ref, now, sums, split):
    """One step of the adjoint iteration, a generator. ys_ref [2, h, C, K]: y_{r+1} at `now`, and at
    the other place what y_r has so far. sums: of u, u H . x, (u k^T) . (x k^T), and the products
    that H and k have of them."""
    like, y = solver.dtype, ys_ref[now, head]
    u = weight * y
    crossing, known = yield from solver.products(head, u)
    asked = dot(sides(x, like, True), solver.wide[head], 1, 1)
    yield
    made = solver.multiplied(head, u, crossing, known)
    yield
    ys_ref[1 - now, head] = ys_ref[1 - now, head] + u - step_of(solver.ridge) * made
    ys_ref[now, head] = (1 - weight) * y
    pairs, answers, rows = solver.pairs[head], split(x), split(u)
    changes = (
        u,
        known * x,
        crossing * asked,
        dot_in_parts(answers, split(solver.past[head] * u), 0, 0),
        dot_in_parts(split(pairs * asked), rows, 0, 0)
        + dot_in_parts(split(pairs * crossing), answers, 0, 0),
    )
    yield
    for ref, change in zip(sums, changes, strict=True):
        ref[head] = ref[head] + change


def of_norm(found: Moments, decay, k, state, dinverse, inverse, split):
    """(dW, d e^G, dk, dH) of the gradient of 1 / n, a generator."""
    weights, since = found.weights, decay.since_start
    dsquare = -0.5 * (dinverse * inverse * inverse * inverse)  # 1 / n^3 may be infinite
    dweights = 2 * dsquare * (since * found.seen + found.near)
    crossing = jnp.sum(weights * found.seen, axis=1, keepdims=True)
    dsince = 2 * dsquare * (since * found.size + crossing)
    dseen = jnp.sum(2 * dsquare * since * weights, axis=0, keepdims=True)
    i, j = places(k.shape[0])
    dseen = jnp.sum(jnp.where(i == j, dseen, 0), axis=1, keepdims=True)
    dalike = dot_in_parts(split(weights), split(dsquare * weights), 0, 0)
    yield
    dk = 4 * dot_in_parts(split(dalike * found.alike), (k,), 1, 0) + 2 * dseen * found.known
    dstate = decay.into(k, dseen * k.astype(jnp.float32), None)
    dstate = dstate + 2 * jnp.sum(dsquare * since * since, keepdims=True) * state
    return dweights, dsince, dk, dstate


def backward(
    q, k, rows, columns, decaying, weights, bounds, dx, dfinal, *, ridge, chunk, heads, interpret,
    limit,
):  # fmt: skip
    """(dq, dk, drows, dcolumns, dg of decays.py, dinitial) from `forward`'s bounds, float32."""
    batch, length, count, width = q.shape
    blocks = Blocks(chunk, heads, length // chunk, backward=True)
    shape, tokens = jax.ShapeDtypeStruct, blocks.tokens(width)
    scratch = partial(pltpu.VMEM, dtype=jnp.float32)
    rates = blocks.rows(1), blocks.columns(1)
    return pl.pallas_call(
        partial(kernel, decaying=len(decaying), ridge=ridge),
        grid=(batch, count // heads, length // chunk),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(tokens, tokens, tokens, *rates),
            *decays.specs(decaying, blocks),
            *(blocks.bounds(width, width), blocks.state(width, width)),
        ],
        out_specs=[
            *(tokens, tokens, *rates),
            *decays.gradient_specs(decaying, blocks),
            blocks.state(width, width),
        ],
        out_shape=[
            *(shape(a.shape, jnp.float32) for a in (q, k, rows, columns)),
            *(shape(axes, jnp.float32) for axes in decays.gradient_shapes(decaying)),
            shape(dfinal.shape, jnp.float32),
        ],
        scratch_shapes=[
            scratch((weights.shape[0] + 2, heads, chunk, width)),
            scratch((2, heads, chunk, width)),
            *(scratch((heads, chunk, n)) for n in (width, width, chunk)),
            *(scratch((heads, n, width)) for n in (width, chunk)),
            *Solver.scratch(heads, chunk, width, q.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="gka_backward",
        interpret=interpret,
    )(weights, q, k, dx, rows, columns, *decaying, bounds, dfinal)
