"""Gated KalmaNet: ridge regression over all past pairs, with weights that fade.

    H_t = e^(g_t) H_{t-1} + beta_t^2 k_t k_t^T;   U_t = e^(g_t) U_{t-1} + beta_t^2 k_t v_t^T
    x_t = (H_t + a ||H_t||_F I)^-1 q_t;   y_t = scale U_t^T (q_t + alpha_t (x_t - q_t))

Peng et al. 2025, arXiv 2511.21016: the gain of a Kalman filter in its steady state. g <= 0; alpha,
beta in [0, 1]; scale = K^-1/2. x_t is what `iterations` steps of Chebyshev's iteration give, for
eigenvalues between a ||H|| and (1 + a) ||H||. Its relative error after r steps is at most
2 ((s - 1) / (s + 1))^(r + 1) with s^2 = (1 + a) / a; gradients are those of the iteration. An empty
memory (H = 0) answers zero. Stable for all inputs within their ranges: the ridge bounds the
condition number by (1 + a) / a. Where ||H||^2 underflows (beta below 1e-9) H counts as 0.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform
from memjax.cell import MemoryCell
from memjax.cells._matrix import Terms, decay_to_end, decays
from memjax.cells.delta_net import DeltaNetMixer
from memjax.cells.simple_gla import SimpleGLA
from memjax.nn.layers import Gate, LogDecay
from memjax.recurrence import (
    accumulator_dtype,
    dot,
    from_chunks,
    memories,
    per_head,
    per_state,
    power_of_two_at_least,
    promote,
    select,
    to_chunks,
)
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field, Float, PyTree


class Inputs(NamedTuple):
    """q, k: [B, T, h, K], k of unit norm; v: [B, T, h, V]; beta: [B, T, h] in [0, 1]; g: [B, T, h],
    log decay <= 0; alpha: [B, T, h] in [0, 1], the share of the solution in what is asked."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate")]
    g: Annotated[Array, Field("", "log_decay")]
    alpha: Annotated[Array, Field("", "query_rate")]


class Moments(NamedTuple):
    """h: [K, K], of keys; u: [K, V], of keys and values."""

    h: Float[Array, "K K"]
    u: Float[Array, "K V"]


@dataclasses.dataclass(frozen=True)
class GatedKalmaNet(MemoryCell):
    """key_dim, value_dim: K and V. ridge: a. iterations: of the solver, 0 for none (x = q). chunk:
    tokens in a chunk of the chunked form, None for 64; changes speed only."""

    inputs = Inputs

    key_dim: int
    value_dim: int
    ridge: float = 0.02
    iterations: int = 30
    chunk: int | None = None

    def __post_init__(self):
        sizes = (self.key_dim, self.value_dim, 1 if self.chunk is None else self.chunk)
        if min(sizes) < 1 or self.iterations < 0 or self.ridge <= 0:
            raise ValueError(
                "GatedKalmaNet: key_dim, value_dim and chunk must be at least 1, iterations 0, "
                f"ridge above 0; given {self}"
            )

    def init_state(self, params: PyTree) -> Moments:
        """Zero."""
        key, value = self.key_dim, self.value_dim
        return Moments(jnp.zeros((key, key), jnp.float32), jnp.zeros((key, value), jnp.float32))

    def write(self, params, state, x):
        decay, k = jnp.exp(x.g), x.beta * x.k
        return Moments(
            decay * state.h + jnp.outer(k, k), decay * state.u + jnp.outer(k, x.beta * x.v)
        )

    def read(self, params, state, x):
        asked = self._solve(
            lambda y: dot("...k,kj->...j", y, state.h), jnp.sum(jnp.square(state.h)), x.q
        )
        return self._answer(dot("k,kv->v", x.q + x.alpha * (asked - x.q), state.u))

    def _answer(self, y):
        return self.key_dim**-0.5 * y

    def _solve(self, multiply, square: Float[Array, "..."], q: Float[Array, "... K"]):
        """(H + a ||H|| I)^-1 q; multiply(x) is H x, square is ||H||^2. q itself where H = 0."""
        empty = square == 0
        norm = jnp.sqrt(jnp.where(empty, 1.0, square))
        ridge = jnp.where(empty, 1.0, self.ridge * norm)[..., None]
        norm = jnp.where(empty, 0.0, norm)[..., None]
        step = 2 / (2 * ridge + norm)
        quarter = jnp.square(norm / (2 * ridge + norm)) / 4

        @jax.checkpoint
        def iterate(carry, _):
            x, before, omega = carry
            omega = 1 / (1 - quarter * omega)
            ahead = omega * (x - step * (multiply(x) + ridge * x - q)) - (omega - 1) * before
            return (ahead, x, omega), None

        if self.iterations == 0:
            return q
        start = step * q, jnp.zeros_like(q), jnp.full_like(step, 2.0)
        (x, *_), _ = lax.scan(iterate, start, None, length=self.iterations)
        return x

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """All tokens of a chunk are solved for at once; H_t x_t = f_t x_t H + ((x k^T) . D) k, with
        the decays D and f of `memjax.cells._matrix`, and no H_t is formed."""
        dtype, length = accumulator_dtype(state, xs), xs.q.shape[0]
        output, xs = xs.q.dtype, promote(xs, dtype)
        if write is not None:  # what an unwritten token holds, even NaN, must not matter
            zeroed = select(write, xs, jax.tree.map(jnp.zeros_like, xs))
            xs = zeroed._replace(q=xs.q, alpha=xs.alpha)
        beta, g = xs.beta[:, None], jnp.maximum(xs.g, -1e4)
        tokens = xs.q, beta * xs.k, beta * xs.v, g[:, None], xs.alpha[:, None], reset
        state = self.fresh(params, dtype) if state is None else state
        size = min(self.chunk or 64, power_of_two_at_least(length))

        @jax.checkpoint
        def chunk(state, tokens):
            *tokens, reset = tokens
            first = None if reset is None else reset[None]
            q, k, v, g, alpha = tokens
            decay, ending = (
                decays(g[None], first, q[None]),
                decay_to_end(g[None], first, q[None])[0],
            )
            since = decay.since_start[0]
            ones = jnp.ones((1, size, 1), q.dtype)
            between = decay.pairs(ones, ones)[0]  # D

            def multiply(x):
                return since * dot("ik,kj->ij", x, state.h) + dot(
                    "ij,jk->ik", between * dot("ik,jk->ij", x, k), k
                )

            # ||H_t||^2 = e^2g ||H_{t-1}||^2 + added, which is 2 e^g k H_{t-1} k + |k|^4. Without a
            # barrier XLA for TPU v6e and v7x ends in an internal error.
            asked = lax.optimization_barrier(dot("jk,kl->jl", k, state.h))
            crossing = between * jnp.square(dot("ik,jk->ij", k, k))
            added = 2 * since[:, 0] * jnp.sum(k * asked, axis=1)
            added = added + jnp.sum((2 - jnp.eye(size, dtype=dtype)) * crossing, axis=1)
            square = jnp.square(since[:, 0]) * jnp.sum(jnp.square(state.h))
            square = square + dot("ij,j->i", jnp.square(between), added)
            q = q + alpha * (self._solve(multiply, square, q) - q)
            y = since * dot("ik,kv->iv", q, state.u)
            y = y + dot("ij,jv->iv", between * dot("ik,jk->ij", q, k), v)
            faded = ending * k
            new = Moments(
                since[-1] * state.h + dot("jk,jl->kl", faded, k),
                since[-1] * state.u + dot("jk,jv->kv", faded, v),
            )
            return new, self._answer(y)

        final, y = lax.scan(chunk, state, to_chunks(tokens, size))
        return from_chunks(y, length).astype(output), final

    def pallas(self, params, state, xs, reset, write):
        """`pallas_kernels.gka`."""
        from pallas_kernels import gka

        if self.iterations == 0:
            raise NotImplementedError(
                f"GatedKalmaNet: the kernel gka solves; given iterations=0 in {self}; use 'chunked'"
            )
        heads, (q, k, *own) = memories(params, state, xs), xs
        fewer = max(leaf.shape[2] for leaf in (q, k))

        def repeated(tree, count=heads):
            return jax.tree.map(lambda a: jnp.repeat(a, count // a.shape[2], axis=2), tree)

        v, beta, g, alpha = repeated(own)
        if write is not None:  # a token whose rate is zero changes nothing
            write = write[..., None] if write.ndim == 2 else write
            fewer = max(fewer, write.shape[2])
            k = select(repeated(write, fewer), repeated(k, fewer), jnp.zeros((), k.dtype))
            zeros = jax.tree.map(jnp.zeros_like, (v, beta, g))
            v, beta, g = select(repeated(write), (v, beta, g), zeros)
        q, k = repeated((q, k), fewer)
        options = {"ridge": self.ridge, "iterations": self.iterations, "platform": mesh_platform()}
        o, found = gka(q, k, v, beta, alpha, g=g, initial_state=state, reset=reset, **options)
        return o, Moments(*found)

    @per_state
    def fold(self, params, state, xs, reset, write):
        """Nothing is solved: both moments are gated linear attention, of one matrix [H | U]."""
        dtype = accumulator_dtype(state, xs)
        xs, state = promote(xs, dtype), self.fresh(params, dtype) if state is None else state
        if write is not None:
            xs = select(write, xs, jax.tree.map(jnp.zeros_like, xs))
        k, v = xs.beta[:, None] * xs.k, xs.beta[:, None] * xs.v
        terms = Terms(k, k, jnp.concatenate([k, v], axis=1), xs.g)
        joined = SimpleGLA(self.key_dim, self.key_dim + self.value_dim, chunk=self.chunk)
        through, new = joined.fold_terms(jnp.concatenate(state, axis=1), terms, reset, write)
        return through, Moments(*jnp.split(new, [self.key_dim], axis=1))

    def compose(self, later, earlier):
        """As of gated linear attention."""
        (through, new), (before, old) = later, earlier
        return through * before, jax.tree.map(lambda a, b: through * a + b, old, new)


class GatedKalmaNetMixer(DeltaNetMixer):
    """Gated DeltaNet's layer with beta + 1e-6; alpha = sigmoid(W x + b). beta_max is 1. ridge,
    iterations: see the cell. half_life: tokens, of every memory before training; 0: drawn."""

    gate: str = "silu"
    half_life: float = 0.0
    ridge: float = 0.02
    iterations: int = 30

    def make_cell(self):
        return GatedKalmaNet(*self.sizes(), self.ridge, self.iterations)

    def setup(self):
        super().setup()
        if self.beta_max > 1:
            raise ValueError(f"gated_kalmanet: beta_max must lie in (0, 1]; given {self.beta_max}")
        self.log_decay = LogDecay(self.memories, self.std, 0.0, self.half_life)
        self.share = Gate(self.memories, self.std)

    def inputs(self, x, state, ctx):
        xs, kept, state = super().inputs(x, state, ctx)
        xs = xs._replace(beta=xs.beta + 1e-6)
        alpha = jax.nn.sigmoid(self.share(x))
        return Inputs(**xs._asdict(), g=self.log_decay(x), alpha=alpha), kept, state


register(
    CellSpec(
        name="gated_kalmanet",
        cell=lambda: GatedKalmaNet(8, 6),
        mixer=GatedKalmaNetMixer,
        paper="Peng et al. 2025, arXiv 2511.21016",
        recurrence="H = e^g H + k kᵀ, U = e^g U + k vᵀ, y = Uᵀ (H + a‖H‖ I)⁻¹ q",
    )
)
