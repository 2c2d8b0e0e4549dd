"""The elementwise linear recurrence in plain JAX, token by token and in chunks: what kernels equal.

    h_t = e^(g_t) h_{t-1} + c_t x_t          c_t = 1, or weighted sqrt(1 - e^(2 g_t))

x, g: [B, T, D], g <= 0. reset: bool [B, T] or None: at such a token e^g is 0, whatever g is.
initial_state: [B, D] or None for zero. Returns h [B, T, D] in the dtype of x, and the last state.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_scan.rule import STEEPEST


@jax.custom_jvp
def bounded_sqrt(x):
    """sqrt(x) with a slope of at most `STEEPEST`."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _(primals, tangents):
    (x,), (change,) = primals, tangents
    return jnp.sqrt(x), change * 0.5 * lax.rsqrt(jnp.maximum(x, 1 / (2 * STEEPEST) ** 2))


def terms(x, g, reset, weighted):
    """(decay, what is added), in float32 or wider."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    x, g = x.astype(wide), g.astype(wide)
    if reset is not None:
        g = jnp.where(reset[..., None], -jnp.inf, g)
    return jnp.exp(g), bounded_sqrt(-jnp.expm1(2 * g)) * x if weighted else x


def start(initial_state, like):
    """The state in front of the tokens, [B, D]."""
    return jnp.zeros_like(like[:, 0]) if initial_state is None else initial_state.astype(like.dtype)


def sequential(x, g, reset=None, initial_state=None, weighted=False):
    """The definition; float64 to compare with."""
    decay, added = terms(x, g, reset, weighted)

    def token(h, x):
        h = x[0] * h + x[1]
        return h, h

    last, h = lax.scan(
        token, start(initial_state, added), (decay.swapaxes(0, 1), added.swapaxes(0, 1))
    )
    return h.swapaxes(0, 1).astype(x.dtype), last


def chunked(x, g, reset=None, initial_state=None, weighted=False, chunk=64):
    """The same by `scan_in_chunks`: the plain form that the cost of the kernel is compared with."""
    decay, added = terms(x, g, reset, weighted)
    h = scan_in_chunks(decay, added, start(initial_state, added), chunk)
    return h.astype(x.dtype), h[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan_in_chunks(decay, added, first, chunk):
    """h_t = decay_t h_{t-1} + added_t, h_0 = first, of [B, T, D], T a multiple of chunk; the
    gradient is the same recurrence, backwards."""

    def join(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    def step(h, element):
        return element[0] * h + element[1]

    return in_chunks(join, step, first, (decay, added), chunk)


def _scan_forward(decay, added, first, chunk):
    h = scan_in_chunks(decay, added, first, chunk)
    return h, (decay, shifted(first, h))


def _scan_backward(chunk, kept, slope):
    decay, before = kept
    zero = jnp.zeros_like(slope[:, 0])
    behind = shifted(zero, decay[:, ::-1])
    added = scan_in_chunks(behind, slope[:, ::-1], zero, chunk)[:, ::-1]
    return added * before, added, decay[:, 0] * added[:, 0]


scan_in_chunks.defvjp(_scan_forward, _scan_backward)


def shifted(first, after):
    """What stands in front of each token, of what stands behind it."""
    return jnp.concatenate([first[:, None], after[:, :-1]], axis=1)


def in_chunks(join, step, first, elements, chunk):
    """The states behind the elements, leaves [B, T, D], T a multiple of chunk.

    step(state, element) is the next state; join(earlier, later) is the one element that does what
    two do. All chunks are joined at once, a scan over them gives the states in between, and then
    all chunks go step by step at once.
    """

    def split(a):  # [C, N, B, D]
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, a.shape[2]), 0, 2).swapaxes(0, 1)

    def every(state, element):
        state = step(state, element)
        return state, state

    across = jax.tree.map(split, elements)
    begin, rest = (jax.tree.map(lambda a, at=at: a[at], across) for at in (0, slice(1, None)))
    totals, _ = lax.scan(lambda sofar, later: (join(sofar, later), None), begin, rest)
    _, before = lax.scan(lambda state, total: (step(state, total), state), first, totals)
    _, states = lax.scan(every, before, across)

    def joined(a):
        a = jnp.moveaxis(a.swapaxes(0, 1), 2, 0)
        return a.reshape(a.shape[0], -1, a.shape[3])

    return jax.tree.map(joined, states)
