"""Gated KalmaNet in plain JAX, one token at a time and in chunks: what kernels equal.

    H_t = exp(g_t) H_{t-1} + beta_t^2 k_t k_t^T      H, U = 0 before a token with reset
    U_t = exp(g_t) U_{t-1} + beta_t^2 k_t v_t^T
    x_t = (H_t + a ||H_t||_F I)^-1 q_t               by steps of Chebyshev's iteration
    o_t = K^-1/2 U_t^T (q_t + alpha_t (x_t - q_t))

q, k: [B, T, H, K]. v: [B, T, H, V]. beta, alpha: [B, T, H]. g: log decay <= 0, [B, T, H], or None
for no decay. reset: bool [B, T] or None. initial_state: (H [B, H, K, K], symmetric, U [B, H, K, V])
or None for zero. ridge: a. Returns o [B, T, H, V] and the last state.

For a symmetric M / ||H|| with eigenvalues between a and 1 + a the iteration is
x <- w (x - s (M x - q)) - (w - 1) x', x' in front of x, s = 2 / (2 a + 1), from x = s q, x' = 0.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def step_of(ridge: float) -> float:
    """s."""
    return 2 / (2 * ridge + 1)


def weights_of(ridge: float, iterations: int) -> list[float]:
    """w of each iteration."""
    quarter, found = (step_of(ridge) / 4) ** 2, [2.0]
    for _ in range(iterations):
        found.append(1 / (1 - quarter * found[-1]))
    return found[1:]


def solved(multiply, square, q, ridge: float, iterations: int):
    """(H + a ||H|| I)^-1 q for q [..., K]; multiply(x) is H x, square [...] is ||H||^2; q where
    that is zero."""
    empty = (square == 0)[..., None]
    norm = jnp.sqrt(jnp.where(empty, 1, square[..., None]))
    step = step_of(ridge)

    @jax.checkpoint
    def iterate(carry, weight):
        x, before = carry
        error = multiply(x) / norm + ridge * x - q
        return (weight * (x - step * error) - (weight - 1) * before, x), None

    weights = jnp.asarray(weights_of(ridge, iterations), q.dtype)
    (x, _), _ = lax.scan(iterate, (step * q, jnp.zeros_like(q)), weights)
    return jnp.where(empty, q, x / norm)


def sequential(
    q, k, v, beta, alpha, g=None, reset=None, initial_state=None, ridge=0.02, iterations=30
):
    """The definition, in the dtype of q: float64 to compare with."""
    batch, _, heads, width = q.shape
    if initial_state is None:
        initial_state = _zero(batch, heads, width, v.shape[-1], q.dtype)

    def token(state, xs):
        q, k, v, beta, alpha, g, reset = xs
        if reset is not None:
            state = jax.tree.map(lambda a: jnp.where(reset[:, None, None, None], 0, a), state)
        if g is not None:
            state = jax.tree.map(lambda a: jnp.exp(g[..., None, None]) * a, state)
        h, u = state
        k, v = beta[..., None] * k, beta[..., None] * v
        h = h + k[..., :, None] * k[..., None, :]
        u = u + k[..., :, None] * v[..., None, :]
        square = jnp.sum(h * h, axis=(-2, -1))
        x = solved(lambda x: dot("bhk,bhkj->bhj", x, h), square, q, ridge, iterations)
        asked = q + alpha[..., None] * (x - q)
        return (h, u), width**-0.5 * dot("bhk,bhkv->bhv", asked, u)

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, beta, alpha, g, reset))
    state, o = lax.scan(token, jax.tree.map(lambda a: a.astype(q.dtype), initial_state), xs)
    return jnp.moveaxis(o, 0, 1), state


def chunked(
    q, k, v, beta, alpha, g=None, reset=None, initial_state=None, ridge=0.02, iterations=30,
    chunk=64,
):  # fmt: skip
    """The same over chunks, T a multiple of `chunk`, exact to float32; no H_t is formed.

    The plain form that the cost of the kernel is compared with.
    """
    batch, length, heads, width = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    state = initial_state
    if state is None:
        state = _zero(batch, heads, width, v.shape[-1], wide)
    g = jnp.zeros(beta.shape, wide) if g is None else g
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    document = jnp.cumsum(reset.reshape(batch, -1, chunk), axis=-1).reshape(batch, length)
    everywhere = jnp.broadcast_to(document[..., None], beta.shape)
    arrays = (a.astype(wide) for a in (q, k, v, beta, alpha, g))

    def split(a):  # [N, B, H, C, ...]
        a = a.reshape(batch, length // chunk, chunk, *a.shape[2:])
        return jnp.moveaxis(a, (1, 3), (0, 2))

    def of_head(state, xs):
        return _chunk(state, xs, ridge, iterations)

    walk = jax.checkpoint(jax.vmap(jax.vmap(of_head)))
    state, o = lax.scan(walk, state, jax.tree.map(split, (*arrays, everywhere)))
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(v.shape)
    return o.astype(v.dtype), state


def _chunk(state, xs, ridge, iterations):
    """(state behind a chunk of one head, o [C, V])."""
    (h, u), (q, k, v, beta, alpha, g, document) = state, xs
    k, v, total = beta[:, None] * k, beta[:, None] * v, jnp.cumsum(g)
    seen = jnp.tril(document[:, None] == document)
    pairs = jnp.exp(jnp.where(seen, total[:, None] - total, -jnp.inf))
    since = jnp.exp(jnp.where(document == 0, total, -jnp.inf))
    to_end = jnp.exp(jnp.where(document == document[-1], total[-1] - total, -jnp.inf))

    def multiply(x):
        near = dot("ij,jk->ik", pairs * dot("ik,jk->ij", x, k), k)
        return since[:, None] * dot("ik,kj->ij", x, h) + near

    # A barrier between product and sum: XLA for TPU v6e and v7x ends in an internal error else.
    asked = lax.optimization_barrier(dot("jk,kl->jl", k, h))
    alike = jnp.square(dot("ik,jk->ij", k, k))
    added = 2 * since * jnp.sum(k * asked, axis=1)
    added = added + jnp.sum((2 - jnp.eye(len(q))) * pairs * alike, axis=1)
    square = jnp.square(since) * jnp.sum(h * h) + dot("ij,j->i", jnp.square(pairs), added)
    q = q + alpha[:, None] * (solved(multiply, square, q, ridge, iterations) - q)
    o = since[:, None] * dot("ik,kv->iv", q, u)
    o = o + dot("ij,jv->iv", pairs * dot("ik,jk->ij", q, k), v)
    faded = to_end[:, None] * k
    state = since[-1] * h + dot("jk,jl->kl", faded, k), since[-1] * u + dot("jk,jv->kv", faded, v)
    return state, len(k[0]) ** -0.5 * o


def _zero(batch, heads, width, size, dtype):
    return tuple(jnp.zeros((batch, heads, width, n), dtype) for n in (width, size))
