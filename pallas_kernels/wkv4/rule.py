"""RWKV-4's average of past values, by sums p and q times e^-o, so that no exponent is above 0.

    f_t = o_{t-1} + w_t,  o_t = max(f_t, k_t),  q_t = e^(f_t - o_t) q_{t-1} + e^(k_t - o_t)
    y_t = (e^(o_{t-1} - s) p_{t-1} + e^(u_t + k_t - s) v_t) / (.. q_{t-1} + e^(u_t + k_t - s)),
    s = max(o_{t-1}, u_t + k_t),  p_t as q_t, with values

A w of -inf empties the sums in front of a token; a token whose k is EMPTY or less only reads. y, p
and q take o as a constant, which they do not depend on as a whole; the slope of o is that along its
maxima, and at ties half of it goes either way.
"""

import jax.numpy as jnp

from pallas_kernels.walks import Rule

EMPTY = -(2.0**126)  # the exponent of nothing, exact in all types


def weights(a, b):
    """e^(a - m) and e^(b - m), m the larger one, by one exponential."""
    smaller = jnp.exp(-jnp.abs(a - b))
    return jnp.where(a > b, 1.0, smaller), jnp.where(a > b, smaller, 1.0)


def parts(state, token):
    """What both passes need: whether the token keeps the state, writes, and does both; the state in
    front of it and f; the weights of the past and of the token, in the sums and in the answer."""
    p, q, o = state
    _, k, w, u = token
    keeps, writes = w > -jnp.inf, k > EMPTY
    fades = keeps & writes
    p, q, o = jnp.where(keeps, p, 0.0), jnp.where(keeps, q, 0.0), jnp.where(keeps, o, EMPTY)
    faded = jnp.maximum(o + jnp.where(fades, w, 0.0), EMPTY)
    kept, added = weights(faded, k)
    old, new = weights(o, u + k)
    added, new = jnp.where(writes, added, 0.0), jnp.where(writes, new, 0.0)
    return (keeps, writes, fades), (p, q, o, faded), (kept, added, old, new)


def step(state, token):
    v, k, *_ = token
    _, (p, q, _, faded), (kept, added, old, new) = parts(state, token)
    total = old * q + new
    y = (old * p + new * v) / jnp.where(total == 0, 1.0, total)
    return (kept * p + added * v, kept * q + added, jnp.maximum(faded, k)), y


def back(slopes, state, token, dy):
    dp, dq, do = slopes
    v, k, *_ = token
    (keeps, writes, fades), (p, q, _, faded), (kept, added, old, new) = parts(state, token)
    total = old * q + new
    share = 1 / jnp.where(total == 0, 1.0, total)
    y = (old * p + new * v) * share
    dtotal = dy * share
    dold, dnew = old * dtotal, new * dtotal
    dp_faded, dq_faded = kept * dp, kept * dq
    stays = jnp.where(faded > k, 1.0, jnp.where(faded == k, 0.5, 0.0))
    do_faded = jnp.where(keeps, jnp.where(writes, stays, 1.0) * do, 0.0)
    du = dnew * (v - y)
    dk = added * (dp * v + dq) + du + jnp.where(writes, do - do_faded, 0.0)
    dw = jnp.where(fades, dp_faded * p + dq_faded * q + do_faded, 0.0)
    slopes = jnp.where(keeps, dp_faded + dold, 0.0), jnp.where(keeps, dq_faded - dold * y, 0.0)
    return (*slopes, do_faded), (added * dp + dnew, dk, dw, du)


RULE = Rule("wkv4", step, back, (0.0, EMPTY, 0.0, 0.0), (0.0, 0.0, EMPTY))
