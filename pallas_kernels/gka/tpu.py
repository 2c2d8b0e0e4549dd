"""Chebyshev's iteration against the moment of keys on TPU, forward: all tokens of a chunk at once.

    H_t = e^{G_t} H + sum_{j <= t} W_tj k_j k_j^T        W_tj = e^{G_t - G_j} beta_j^2
    M x = e^{G_t} x H / n + ((x k^T) . W / n) k + a x    for the rows x of all t, n_t = ||H_t||_F
    n_t^2 = e^{2 G_t} ||H||^2 + sum_j W_tj (2 e^{G_t} k_j H k_j + sum_l W_tl (k_j . k_l)^2)
    x <- w (x - s (M x - q)) - (w - 1) x'                from x = s q, x' = 0; X = x / n
    H <- e^{G_C} H + K^T (e^{G_C - G} beta^2 K)

H [K, K] is the state in front of the chunk, float32 and on the chip along the walk. One grid step
is a chunk of a group of heads, all in step in each iteration. X leaves in float32: it is as large
as H is small, so that what reads H's fellow U with it cannot take it rounded. Products of float32
are exact to float32; with bfloat16 a float32 factor is the sum of two arrays, side by side in one
product (`wide`, `tall`). Bytes a token and head: those of q and k, 4 K for X, 24 for the decay and
beta and, when gradients follow, 4 K^2 / C.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import decays
from pallas_kernels.common import Blocks
from pallas_kernels.gka.reference import step_of
from pallas_kernels.products import dot, dot_in_parts, in_step, parts, places, turned


def sides(x, like, exact: bool):
    """x [C, n] as the left factor of one product with `wide` or `tall` of a factor that is exact or
    has parts."""
    if like == jnp.float32:
        return x
    main, rest = (part.astype(like) for part in parts(x, like))
    return jnp.concatenate([main, rest] if exact else [main, main, rest], axis=1)


def tall(y, like):
    """y as the right factor that rows of `sides` are multiplied with."""
    if like == jnp.float32:
        return y
    terms = [y, y] if y.dtype == like else _terms(y, like)
    return jnp.concatenate(terms, axis=0)


def wide(y, like):
    """An exact y as the right factor of products over its columns."""
    return y if like == jnp.float32 else jnp.concatenate([y, y], axis=1)


def _terms(y, like):
    main, rest = (part.astype(like) for part in parts(y, like))
    return [main, rest, main]


class Moments(NamedTuple):
    """What n and its gradient are made of, for one head: weights W [C, C]; alike [C, C], k_j . k_l;
    known [C, K], k_j H; seen [1, C], k_j H k_j; near [C, C], sum_l W_tl (k_j . k_l)^2; size,
    ||H||^2; square [C, 1], n^2."""

    weights: Any
    alike: Any
    known: Any
    seen: Any
    near: Any
    size: Any
    square: Any


def moments(k, state, decay, rates, split):
    """A generator for `products.in_step`. rates: beta^2 [1, C]."""
    alike = dot(k, k, 1, 1)
    known = dot_in_parts((k,), split(state), 1, 0)
    yield
    i, j = places(k.shape[0])
    seen = jnp.sum(known * k.astype(jnp.float32), axis=1, keepdims=True)
    seen = jnp.sum(jnp.where(i == j, seen, 0), axis=0, keepdims=True)
    weights = decay.between * rates
    near = dot_in_parts(split(weights), split(alike * alike), 1, 0)
    yield
    size = jnp.sum(state * state, keepdims=True)
    crossing = jnp.sum(weights * (2 * decay.since_start * seen + near), axis=1, keepdims=True)
    square = decay.since_start * decay.since_start * size + crossing
    return Moments(weights, alike, known, seen, near, size, square)


def inverse_norm(square):
    """(1 / n, 1 where H = 0; where that is)."""
    empty = square == 0
    return 1 / jnp.sqrt(jnp.where(empty, 1, square)), empty


class Solver:
    """The iteration of one grid step: its operands, in scratch, and its products.

    past [h, C, 1], e^G / n; pairs [h, C, C], W / n; tall [h, 3 K, K] of H; keys [h, 2 C, K] and
    [h, C, 2 K]; with float32 one copy each instead of 3 or 2.
    """

    def __init__(self, refs, queries, dtype, ridge: float):
        self.past, self.pairs, self.state, self.tall, self.wide = refs
        self.queries, self.dtype, self.ridge = queries, dtype, ridge

    @staticmethod
    def scratch(heads: int, chunk: int, width: int, dtype) -> tuple:
        many, twice = (3, 2) if dtype == jnp.bfloat16 else (1, 1)
        shapes = (chunk, 1), (chunk, chunk)
        factors = (many * width, width), (twice * chunk, width), (chunk, twice * width)
        return (
            *(pltpu.VMEM((heads, *axes), jnp.float32) for axes in shapes),
            *(pltpu.VMEM((heads, *axes), dtype) for axes in factors),
        )

    def put(self, head: int, k, state, since, weights, inverse) -> None:
        self.past[head], self.pairs[head] = since * inverse, weights * inverse
        self.state[head] = tall(state, self.dtype)
        self.tall[head], self.wide[head] = tall(k, self.dtype), wide(k, self.dtype)

    def products(self, head: int, x):
        """(x k^T, x H), a generator."""
        crossing = dot(sides(x, self.dtype, True), self.wide[head], 1, 1)
        known = dot(sides(x, self.dtype, False), self.state[head], 1, 0)
        yield
        return crossing, known

    def multiplied(self, head: int, x, crossing, known):
        """M x."""
        near = sides(self.pairs[head] * crossing, self.dtype, True)
        near = dot(near, self.tall[head], 1, 0)
        return self.past[head] * known + near + self.ridge * x

    def ahead(self, head: int, weight, x, before):
        """The next x, a generator."""
        made = yield from self.products(head, x)
        error = self.multiplied(head, x, *made) - self.queries[head].astype(jnp.float32)
        yield
        return weight * (x - step_of(self.ridge) * error) - (weight - 1) * before


def kernel(*refs, decaying, keep, ridge):
    """q, k, x [C, h, K]; rates, beta^2, as rows [h, C] and columns [C, h]; `decaying` arrays of
    decays.py; initial, final and, with keep, bounds [h, K, K]; weights of the iterations in scalar
    memory. The block of the final state carries H along the walk."""
    weight_ref, q_ref, k_ref, row_ref, column_ref, *others = refs
    initial_ref, x_ref, state_ref, *others = others[decaying:]
    bounds_ref, (xs_ref, *scratch) = others[:keep], others[keep:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    heads, dtype = q_ref.shape[1], q_ref.dtype
    split = partial(parts, like=dtype)
    queries, keys = turned(q_ref[...]), turned(k_ref[...])
    rows, columns = row_ref[...], column_ref[...]
    decayed = decays.of_heads([ref[...] for ref in refs[5 : 5 + decaying]], heads, split, dtype)
    solver = Solver(scratch, queries, dtype, ridge)

    def prepare(head, decay):
        k, state = keys[head], state_ref[head]
        if keep:
            bounds_ref[0][head] = state
        found = yield from moments(k, state, decay, rows[head : head + 1], split)
        inverse, empty = inverse_norm(found.square)
        solver.put(head, k, state, decay.since_start, found.weights, inverse)
        xs_ref[0, head] = step_of(ridge) * queries[head].astype(jnp.float32)
        xs_ref[1, head] = jnp.zeros(xs_ref.shape[2:], jnp.float32)
        added = decay.into(k, columns[:, head : head + 1] * k.astype(jnp.float32), decay.to_end)
        yield
        state_ref[head] = decay.over(state) + added
        return inverse, empty

    prepared = in_step(map(prepare, range(heads), decayed))

    def iterate(n, _):
        now, before = n % 2, (n + 1) % 2

        def step(head):
            found = yield from solver.ahead(
                head, weight_ref[n], xs_ref[now, head], xs_ref[before, head]
            )
            xs_ref[before, head] = found

        in_step(map(step, range(heads)))
        return 0

    iterations = weight_ref.shape[0]
    lax.fori_loop(0, iterations, iterate, 0)
    last = xs_ref[iterations % 2]
    x_ref[...] = turned(
        jnp.stack(
            [
                jnp.where(empty, queries[head].astype(jnp.float32), last[head] * inverse)
                for head, (inverse, empty) in enumerate(prepared)
            ]
        )
    )


def forward(
    q, k, rows, columns, decaying, weights, initial, *, ridge, chunk, heads, keep, interpret, limit
):
    """(x, final state[, states in front of the chunks [B, N, H, K, K]]), all float32.

    T must be a multiple of chunk and H of heads. rows, columns: beta^2 as [B, G, N, heads, C] and
    [B, G, N, C, heads]. decaying: `decays.arrays`. weights: [iterations] float32.
    """
    batch, length, count, width = q.shape
    blocks = Blocks(chunk, heads, length // chunk)
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    bounds = shape((batch, length // chunk, count, width, width))
    return pl.pallas_call(
        partial(kernel, decaying=len(decaying), keep=keep, ridge=ridge),
        grid=(batch, count // heads, length // chunk),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(blocks.tokens(width), blocks.tokens(width), blocks.rows(1), blocks.columns(1)),
            *decays.specs(decaying, blocks),
            blocks.state(width, width),
        ],
        out_specs=[
            *(blocks.tokens(width), blocks.state(width, width)),
            *((blocks.bounds(width, width),) if keep else ()),
        ],
        out_shape=[shape(q.shape), shape(initial.shape), *((bounds,) if keep else ())],
        scratch_shapes=[
            pltpu.VMEM((2, heads, chunk, width), jnp.float32),
            *Solver.scratch(heads, chunk, width, q.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="gka_forward",
        interpret=interpret,
    )(weights, q, k, rows, columns, *decaying, initial)
