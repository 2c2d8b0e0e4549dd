"""RWKV-4's average in plain JAX, token by token and in chunks: what kernels equal.

    y_t = (e^(o_{t-1}) p_{t-1} + e^(u_t + k_t) v_t) / (e^(o_{t-1}) q_{t-1} + e^(u_t + k_t))
    e^(o_t) p_t = e^(o_{t-1} + w_t) p_{t-1} + e^(k_t) v_t,  q_t the same without v
    o_t = max(o_{t-1} + w_t, k_t)

v, k, w, u: [B, T, D], w <= 0. A token whose k is EMPTY or less changes nothing. reset: bool [B, T]
or None. initial_state: (p, q, o), [B, D] each, or None for (0, 0, EMPTY). Returns y [B, T, D] in
the dtype of v, and the last state.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_scan.reference import in_chunks, scan_in_chunks, shifted
from pallas_kernels.wkv4.rule import EMPTY


def wide(*arrays):
    """In float32, or in float64 where one is."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return [a.astype(dtype) for a in arrays]


def start(initial_state, like):
    """The state in front of the tokens."""
    zero = jnp.zeros_like(like[:, 0])
    return (zero, zero, zero + EMPTY) if initial_state is None else tuple(initial_state)


def average(p, q):
    return p / jnp.where(q == 0, 1, q)


def sequential(v, k, w, u, reset=None, initial_state=None):
    """The definition; float64 to compare with."""
    dtype = v.dtype
    v, k, w, u = wide(v, k, w, u)
    reset = jnp.zeros(v.shape[:2], bool) if reset is None else reset
    state = start(initial_state, v)

    def plus(a, b):
        o = jnp.maximum(a[2], b[2])
        left, right = jnp.exp(a[2] - o), jnp.exp(b[2] - o)
        return left * a[0] + right * b[0], left * a[1] + right * b[1], o

    def token(state, x):
        v, k, w, u, reset = x
        fresh = (0.0, 0.0, EMPTY)
        state = tuple(jnp.where(reset[:, None], a, b) for a, b in zip(fresh, state, strict=True))
        one, written = jnp.ones_like(v), k > EMPTY
        p, q, _ = plus(state, (v, one, u + k))
        y = jnp.where(written, average(p, q), average(*state[:2]))
        faded = *state[:2], jnp.maximum(state[2] + w, EMPTY)
        new = plus(faded, (v, one, k))
        state = tuple(jnp.where(written, *pair) for pair in zip(new, state, strict=True))
        return state, y

    xs = [a.swapaxes(0, 1) for a in (v, k, w, u, reset)]
    state, y = lax.scan(token, state, xs)
    return y.swapaxes(0, 1).astype(dtype), state


def chunked(v, k, w, u, reset=None, initial_state=None, chunk=64):
    """First the exponents o of all tokens, then p and q as linear recurrences, T a multiple of
    chunk. Answers do not depend on o, which has a slope in the last state alone.

    The plain form that the cost of the kernel is compared with.
    """
    dtype = v.dtype
    v, k, w, u = wide(v, k, w, u)
    state = start(initial_state, v)
    written = k > EMPTY
    fading = jnp.where(written, w, 0)
    if reset is not None:
        fading = jnp.where(reset[..., None], -jnp.inf, fading)

    def join(earlier, later):
        return earlier[0] + later[0], jnp.maximum(earlier[1] + later[0], later[1])

    def step(o, element):
        return jnp.maximum(jnp.maximum(o + element[0], EMPTY), element[1])

    o = in_chunks(join, step, *lax.stop_gradient((state[2], (fading, k))), chunk)
    before = shifted(state[2], o)
    decay, weight = jnp.exp(fading + before - o), jnp.where(written, jnp.exp(k - o), 0)
    p = scan_in_chunks(decay, weight * v, state[0], chunk)
    q = scan_in_chunks(decay, weight, state[1], chunk)
    past = [shifted(state[0], p), shifted(state[1], q), before]
    if reset is not None:
        past = [
            jnp.where(reset[..., None], *pair) for pair in zip((0, 0, EMPTY), past, strict=True)
        ]
    scale = lax.stop_gradient(jnp.maximum(past[2], u + k))
    old, new = jnp.exp(past[2] - scale), jnp.where(written, jnp.exp(u + k - scale), 0)
    y = average(old * past[0] + new * v, old * past[1] + new)
    exact = _with_slope(o[:, -1], state[2], fading, k)
    factor = jnp.exp(o[:, -1] - exact)  # 1, and the slope that p and q have through o
    return y.astype(dtype), (factor * p[:, -1], factor * q[:, -1], exact)


def _with_slope(last, first, fading, k):
    """The last o [B, D] with its slope: it is the largest of all exponents, decayed to the end."""
    later = jnp.flip(jnp.cumsum(jnp.flip(fading, 1), axis=1), 1)
    behind = jnp.concatenate([later[:, 1:], jnp.zeros_like(first)[:, None]], axis=1)
    largest = jnp.maximum(jnp.max(behind + k, axis=1), first + later[:, 0])
    return last + largest - lax.stop_gradient(largest)
