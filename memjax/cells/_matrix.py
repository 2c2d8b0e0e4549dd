"""The algebra that linear attention, its gated forms and the delta rules share.

State S [K, V], one matrix per head. With an optional log decay g <= 0 and an optional write
strength beta, a token does (Yang et al. 2024, arXiv 2412.06464, Eq. 10; 2406.06484, Eq. 3)

    S <- exp(g) S                                   decay
    S <- S + k v^T                                  plain write, or
    S <- S + beta k (v - S^T k)^T                   delta rule: k first forgets what it held
    y  = scale S^T q

Within a chunk of C tokens, with D_ij the decay between tokens j <= i and f_i the decay since the
chunk's start, all tokens are solved at once (the WY or UT transform of the delta rule):

    A   = tril(k k^T * D, -1)
    Vn  = (I + diag(beta) A)^-1 diag(beta) (v - f k S)      the values that are really added
    y   = scale (f q S + (tril(q k^T) * D) Vn)
    S'  = f_C S + (D_C k)^T Vn
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from memjax.cell import MemoryCell
from memjax.recurrence import (
    accumulator_dtype,
    from_chunks,
    per_head,
    power_of_two_at_least,
    promote,
    to_chunks,
)
from memjax.typing import Array, Bool, Float, PyTree

dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class MatrixMemory(MemoryCell):
    """A memory whose state is one matrix [K, V], zero at the start.

    key_dim, value_dim: K and V of one head.
    scale: factor of the read-out; None for K ** -0.5.
    chunk: tokens in a chunk of the chunked form, a power of two; None for 32 on CPU and 64
    elsewhere, the fastest in `python -m memjax.benchmark`. Changes speed only.
    """

    key_dim: int
    value_dim: int
    scale: float | None = None
    chunk: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        if min(self.key_dim, self.value_dim) < 1:
            raise ValueError(f"{name}: key_dim and value_dim must be at least 1; given {self}")
        if self.chunk is not None and (self.chunk < 1 or self.chunk & (self.chunk - 1)):
            raise ValueError(f"{name}: chunk must be a power of two; given {self.chunk}")

    def init_state(self, params: PyTree) -> Float[Array, "K V"]:
        """Zero."""
        return jnp.zeros((self.key_dim, self.value_dim), jnp.float32)

    def read(self, params: PyTree, state: Float[Array, "K V"], x: PyTree) -> Float[Array, " V"]:
        """scale S^T q."""
        return self._scale * dot("k,kv->v", x.q, state)

    def preferred(self, length: int, differentiate: bool) -> tuple[str, ...]:
        """On CPU the forward pass alone is faster token by token (`python -m memjax.benchmark`)."""
        if not differentiate and jax.default_backend() == "cpu":
            return ("scan",)
        return super().preferred(length, differentiate)

    @property
    def _scale(self) -> float:
        return self.key_dim**-0.5 if self.scale is None else self.scale

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """The chunk form of the module's docstring."""
        y, new = self._chunks(params, state, xs, reset, write)
        return (self._scale * y).astype(xs.q.dtype), new

    def _chunks(self, params, state, xs, reset, write):
        """S^T q for every token [T, V], not yet scaled, and the final state."""
        dtype = accumulator_dtype(state, xs)
        state = self.fresh(params, dtype) if state is None else state
        length = xs.q.shape[0]
        chunk = self.chunk or (32 if jax.default_backend() == "cpu" else 64)
        size = min(chunk, power_of_two_at_least(length))
        y, state = scan_chunks(state, *to_chunks((promote(xs, dtype), reset, write), size))
        return from_chunks(y, length), state


def scan_chunks(
    state: Float[Array, "K V"],
    xs: PyTree,
    reset: Bool[Array, "N C"] | None,
    write: Bool[Array, "N C"] | None,
) -> tuple[Float[Array, "N C V"], Float[Array, "K V"]]:
    """Runs chunks [N, C, ...] of q, k, v and, where the inputs have them, g and beta."""
    q, k, v = xs.q, xs.k, xs.v
    g, beta = getattr(xs, "g", None), getattr(xs, "beta", None)
    if write is not None:  # an all-zero write changes nothing
        k, v, g, beta = jax.tree.map(
            lambda a: jnp.where(write.reshape(write.shape + (1,) * (a.ndim - 2)), a, 0),
            (k, v, g, beta),
        )
    between, since_start = decays(g, reset, q)
    scores = dot("nik,njk->nij", q, k) * between
    solve = None
    if beta is not None:
        gram = jnp.tril(dot("nik,njk->nij", k, k) * between, -1)
        solve = unit_lower_inverse(beta[..., None] * gram) * beta[:, None, :]

    def chunk(state, inputs):
        q, k, v, scores, solve, to_end, since_start = inputs
        since_start = since_start[:, None]
        if solve is not None:
            v = dot("ij,jv->iv", solve, v - dot("ik,kv->iv", since_start * k, state))
        y = dot("ik,kv->iv", since_start * q, state) + dot("ij,jv->iv", scores, v)
        state = since_start[-1] * state + dot("ik,iv->kv", to_end[:, None] * k, v)
        return state, y

    inputs = (q, k, v, scores, solve, between[:, -1], since_start)
    state, y = lax.scan(chunk, state, inputs)
    return y, state


def decays(
    g: Float[Array, "N C"] | None, reset: Bool[Array, "N C"] | None, like: Float[Array, "N C K"]
) -> tuple[Float[Array, "N C C"], Float[Array, "N C"]]:
    """exp(g_{j+1} + ... + g_i) for j <= i, and exp(g_1 + ... + g_i); zero across a reset.

    Every exponent is a sum of the terms between, not a difference of two long sums, so that a
    strong decay elsewhere in the chunk costs no precision; the mask comes before exp.
    """
    chunks, size = like.shape[:2]
    lower = jnp.tril(jnp.ones((size, size), bool))
    if g is None:
        exponent, total = jnp.zeros((1, size, size)), jnp.zeros((chunks, size))
    else:
        g = jnp.maximum(g, -1e4)  # exp is zero there; -inf would meet 0 in the product below
        after_j = jnp.where(lower.T & ~jnp.eye(size, dtype=bool), g[:, None, :], 0)
        exponent = dot("il,njl->nij", lower.astype(g.dtype), after_j)
        total = jnp.cumsum(g, axis=1)
    visible, first = lower[None], jnp.ones((1, size), bool)
    if reset is not None:
        document = jnp.cumsum(reset, axis=1)
        visible = visible & (document[:, :, None] == document[:, None, :])
        first = document == 0
    masked_exp = lambda mask, x: jnp.exp(jnp.where(mask, x, -jnp.inf)).astype(like.dtype)  # noqa: E731
    between = jnp.broadcast_to(masked_exp(visible, exponent), (chunks, size, size))
    return between, masked_exp(first, total)


@jax.custom_jvp
def unit_lower_inverse(lower: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """(I + lower)^-1 for strictly lower triangular matrices, C a power of two.

    Inverts the two halves of the diagonal and joins them: with inverses X and Z of the diagonal
    blocks and L between them, the block below the diagonal is -Z L X. Exact for equal keys; no
    matrix powers, whose terms grow without bound, and no LAPACK call, which can deadlock two CPU
    threads in jax 0.10.
    """
    size = lower.shape[-1]
    if size & (size - 1):
        raise ValueError(f"unit_lower_inverse: C must be a power of two; given {size}")
    if size <= 16:
        return _small_inverse(lower)
    half = size // 2
    first, second = lower[..., :half, :half], lower[..., half:, half:]
    first, second = unit_lower_inverse(jnp.stack([first, second]))
    join = -dot("...ij,...jk,...kl->...il", second, lower[..., half:, :half], first)
    above = jnp.zeros_like(join)
    return jnp.block([[first, above], [join, second]])


def _small_inverse(lower: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """The same by masks: X <- X - X L X doubles the inverted blocks, L what joins two of them."""
    size = lower.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for bits in range(size.bit_length() - 1):
        pair = (row >> (bits + 1) == column >> (bits + 1)) & (row >> bits != column >> bits)
        join = jnp.where(pair, lower, 0)
        inverse = inverse - dot("...ij,...jk,...kl->...il", inverse, join, inverse)
    return inverse


@unit_lower_inverse.defjvp
def _(primals, tangents):
    inverse = unit_lower_inverse(*primals)
    change = jnp.tril(tangents[0], -1)
    return inverse, -dot("...ij,...jk,...kl->...il", inverse, change, inverse)
