"""h_t = a h_{t-1} + x_t, or with the RG-LRU's weight a h_{t-1} + sqrt(1 - a^2) x_t; a = e^(g_t).

Where g is -inf, h is forgotten, and the weight is 1.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.walks import Rule

STEEPEST = 1000.0  # slope of the root, which is infinite at a = 1 (Griffin's code)
LEAST = 1e-35


def left(g, a):
    """1 - a^2: by its series in 2 g where they would cancel, exact to 1e-6 on either side."""
    y = 2 * g
    series = 1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5)))
    return jnp.where(y > -0.125, -y * series, 1 - a * a)


def step(state, token):
    (h,), (x, g) = state, token
    h = jnp.exp(g) * h + x
    return (h,), h


def back(slopes, state, token, dy):
    (slope,), (h,), (_, g) = slopes, state, token
    dx = dy + slope
    through = jnp.exp(g) * dx
    return (through,), (dx, through * h)


def weighted_step(state, token):
    (h,), (x, g) = state, token
    a = jnp.exp(g)
    rest = left(g, a)
    h = a * h + rest * lax.rsqrt(jnp.maximum(rest, LEAST)) * x
    return (h,), h


def weighted_back(slopes, state, token, dy):
    """The slope of the root is at most STEEPEST."""
    (slope,), (h,), (x, g) = slopes, state, token
    a = jnp.exp(g)
    rest = left(g, a)
    dh = dy + slope
    through = a * dh
    steep = lax.rsqrt(jnp.maximum(rest, 1 / (2 * STEEPEST) ** 2))
    dx = rest * lax.rsqrt(jnp.maximum(rest, LEAST)) * dh
    return (through,), (dx, through * (h - a * steep * x))


PADDING, FRESH = (0.0, 0.0), (0.0,)
RULE = Rule("linear_scan", step, back, PADDING, FRESH)
WEIGHTED = Rule("linear_scan", weighted_step, weighted_back, PADDING, FRESH)
