"""A network trained by gradient steps, by a kernel: checks, sizes, and the choice of blocks."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common
from pallas_kernels.deep_memory.reference import LOSSES, State, shapes_of
from pallas_kernels.deep_network import tpu, tpu_vjp
from pallas_kernels.deep_network.layout import Sizes, layout, memory, sizes, state_of
from pallas_kernels.deep_network.network import flat, memory_of
from pallas_kernels.deep_network.reference import initial_state
from pallas_kernels.deep_network.windows import EXTRA, Rule, coefficients

NAME = "deep_network"
ROOM = 50 * common.MIB  # bytes of VMEM by our count, but on a v4
LONGEST = (128, 64, 32, 16)  # tokens of a window at most, the first that fits
WINDOWS, HEADS = (8, 4, 2, 1), (4, 2, 1)  # of a grid step, the best first


def deep_network(
    q, k, v, g, rates, start, *, m=None, frozen_chunk, loss="l2", state=None, reset=None,
    write=None, platform=None,
):  # fmt: skip
    """`deep_memory` of a network M(x; W) = (x +) gelu(.. gelu(x W_1) ..) W_L, with x where K = V:

    W_t = exp(g_t) W_{t-1} + Z_t, Z_t = exp(m_t) Z_{t-1} - sum_{j<c} r_t[j] grad loss(W_b; k_{t-j},
    v_{t-j}), o_t = M(q_t; W_t), W_b in front of the token's frozen chunk.

    The memories of Titans, OmegaNet and DLA, and ATLAS without Newton-Schulz, with two layers or
    more. `reference` has the definition.

    Args:
      q, k, v, g, m, rates, frozen_chunk, loss, reset, write, platform: as of `deep_memory`. Zeros
        are put behind K and V up to 64, 128 or 256, and behind hidden widths up to multiples of
        128.
      start: layers [H, m, n] in a tuple, two or more, K to V: the weights in front of a document.
      state: `State`, whose weights, momentum and base are tuples of layers [B, H, m, n], or None.

    Returns:
      o and the last `State` as of `deep_memory`, with the same names under `jax.checkpoint`.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype or shape.
      ValueError: shapes that do not fit together, or another loss.
    """
    batch, length, heads = _check(
        q, k, v, g, rates, start, m, frozen_chunk, loss, state, reset, write
    )
    residual = q.shape[-1] == v.shape[-1]
    widths = [layer.shape[1] for layer in start] + [v.shape[-1]]
    served = [_served(n, inner) for n, inner in zip(widths, _inner(widths), strict=True)]
    q, k = (common.wider(a, served[0]) for a in (q, k))
    v, start = common.wider(v, served[-1]), _wider(start, served)
    interpret, _, generation = common.only_on(NAME, ("tpu",), platform)
    common.check_served(NAME, {"q": q, "k": k}, v)
    kind, carried = (m is not None, rates.shape[-1], loss, residual), state is not None
    for longest in LONGEST:
        size = sizes(length, frozen_chunk, longest)
        apart = carried or write is not None or size.tokens < min(frozen_chunk, length)
        rule = Rule(*kind, 1 + apart if reset is None else 3)
        static = _plan(size, served, rule, heads, v.dtype, generation, interpret)
        if static is not None:
            break
    else:
        raise NotImplementedError(
            f"{NAME} does not fit a TPU core: layers of widths {', '.join(map(str, widths))} in "
            f"{v.dtype}; use bfloat16, smaller heads, a smaller expansion, or a plain form"
        )
    if state is None:
        state = initial_state(batch, start, rates, rule.momentum)
    else:
        state = _fitted(state, lambda layers: _wider(layers, served), common.wider, served)
    size = size._replace(number=size.number + -size.number % static.windows)
    start = tuple(layer.astype(jnp.float32) for layer in start)
    q, k, v, scalars, write = _masked(q, k, v, (g, m, rates), write)
    rows = layout(q, k, v, scalars, reset, write, state, frozen_chunk, size)
    numbers = coefficients(rows.tokens, rule, frozen_chunk)
    given = [layer.astype(jnp.float32) for layer in flat(memory(state, rule))]
    fresh = start if rule.bases == 3 else ()
    o, found = _op((static, rule), rows.q, rows.k, rows.v, numbers, fresh, given)
    o = o.reshape(batch, heads, size.number, size.rows, -1)[:, :, :, : size.tokens]
    o = jnp.moveaxis(o, 1, 3).reshape(batch, -1, heads, o.shape[-1])[:, :length]
    new = state_of(memory_of(found, rule), rows.place, rows.number, rule)
    narrow = functools.partial(_narrowed, widths=widths)
    new = _fitted(new, narrow, common.cut, widths)
    return checkpoint_name((common.cut(o, widths[-1]), new), "memory_out")


def _check(q, k, v, g, rates, start, m, frozen_chunk, loss, state, reset, write):
    """(B, T, H); ValueError for what does not fit together."""
    common.check_shapes(NAME, {"q": q, "k": k}, v, None, g, None, reset, False)
    batch, length, heads, size = v.shape
    if not isinstance(start, tuple) or len(start) < 2:
        raise ValueError(
            f"{NAME}: start must be a tuple of two layers or more; given "
            f"{jax.tree.map(jnp.shape, start)}; deep_memory has a matrix"
        )
    one, width = (batch, length, heads), q.shape[-1]
    wanted = {"q": (q, (*one, width)), "g": (g, one), "m": (m, one)}
    wanted["rates"] = rates, (*one, rates.shape[-1])
    widths = [width, *(layer.shape[-1] for layer in start[:-1]), size]
    for n, axes in enumerate(itertools.pairwise(widths)):
        wanted[f"start[{n}]"] = start[n], (heads, *axes)
    for name, (array, axes) in wanted.items():
        if array is not None and array.shape != axes:
            raise ValueError(f"{NAME}: {name} must be {list(axes)}; given {list(array.shape)}")
    common.check_frozen(NAME, frozen_chunk, loss, LOSSES, write, one)
    if state is not None:
        layers = tuple((batch, *layer.shape) for layer in start)
        older = rates.shape[-1] - 1
        pairs = (older, width), (older, size)
        common.check_state(NAME, state, shapes_of(layers, one[::2], pairs, m is not None))
    return one


def _plan(size: Sizes, widths, rule: Rule, heads: int, dtype, generation, interpret):
    """`tpu.Static` with the blocks of a TPU; None where none fits."""
    small = common.has_small_memory(generation)
    room, limit = (common.SMALL, None) if small else (ROOM, common.LIMIT)
    weights = 4 * sum(max(m, 8) * max(n, 128) for m, n in itertools.pairwise(widths))
    # what a window makes, as compiled, with what spills; float32 factors are in three parts
    made = 5 * weights + 44 * rule.bases * (size.rows + rule.front) * sum(widths)
    made *= 1 if dtype == jnp.bfloat16 else 3
    made += 8 * weights if small and rule.bases == 3 else 0  # v4 spills more with a start
    # carried, their gradients behind all, two buffers of those in front
    once = (4 * rule.states + 2 * (rule.bases == 3)) * weights + made
    # two buffers of what rows have, and of coefficients and their gradients
    width, numbers = sum(max(n, 128) for n in widths[:: len(widths) - 1]), rule.columns(size.rows)
    of_rows = 8 * dtype.itemsize * size.rows * width
    of_rows += 16 * (size.rows + EXTRA + rule.front) * (numbers + -numbers % 128)
    for windows, count in itertools.product(WINDOWS, HEADS):
        bytes_of = once + windows * (rule.states * weights + of_rows)
        if heads % count == 0 and count * bytes_of <= room and windows <= size.number:
            return tpu.Static(size.rows, windows, count, interpret, limit)
    return None


# ---------------------------------------------------------------- layers of other sizes


def _inner(widths):
    """Whether each is the width of a hidden layer."""
    return [0 < n < len(widths) - 1 for n in range(len(widths))]


def _served(width: int, inner: bool) -> int:
    """A width that kernels take, the next one; itself where there is none. Zeros behind keys,
    hidden units and values change nothing: gelu(0) = 0."""
    if inner:
        return width + -width % 128
    return next((n for n in common.WIDTHS if width <= n), width)


def _wider(layers, widths):
    pairs = zip(layers, itertools.pairwise(widths), strict=True)
    return tuple(common.wider(layer, *axes) for layer, axes in pairs)


def _narrowed(layers, widths):
    pairs = zip(layers, itertools.pairwise(widths), strict=True)
    return tuple(common.cut(layer, *axes) for layer, axes in pairs)


def _fitted(state: State, fit, fit_pairs, widths) -> State:
    """A state with layers and pairs of these widths."""
    weights, momentum, base = (layers and fit(layers) for layers in state[:3])
    k, v = (
        a if a is None else fit_pairs(a, n)
        for a, n in ((state.k, widths[0]), (state.v, widths[-1]))
    )
    return state._replace(weights=weights, momentum=momentum, base=base, k=k, v=v)


def _masked(q, k, v, scalars, write):
    """The same with float32 scalars and zeros where a token only reads: what it has there, even
    NaN, must not matter."""
    if write is not None:
        write = jnp.broadcast_to(write if write.ndim == 3 else write[..., None], k.shape[:3])
        zeroed = lambda a: jnp.where(  # noqa: E731
            jnp.expand_dims(write, range(3, a.ndim)), a, jnp.zeros_like(a)
        )
        k, v, *scalars = jax.tree.map(zeroed, (k, v, *scalars))
    return q, k, v, jax.tree.map(lambda a: a.astype(jnp.float32), tuple(scalars)), write


# ---------------------------------------------------------------- the op


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(how, q, k, v, numbers, start, layers):
    (static, rule), given = how, (q, k, v, numbers, start, layers)
    return tpu.forward(*given, static=static, rule=rule, keep=False)[:2]


def _op_forward(how, *given):
    static, rule = how
    o, final, kept = tpu.forward(*given, static=static, rule=rule, keep=True)
    kept = [checkpoint_name(a, "memory_state") for a in kept]
    return (o, final), (given[:-1], kept)


def _op_backward(how, saved, cotangents):
    (static, rule), ((q, k, v, numbers, start), kept), (do, dfinals) = how, saved, cotangents
    *found, dlayers, dstart = tpu_vjp.backward(
        q, k, v, numbers, start, kept, do, dfinals, static=static, rule=rule
    )
    dstart = tuple(jnp.sum(d, axis=0) for d in dstart)
    return *found, dstart, list(dlayers)


_op.defvjp(_op_forward, _op_backward)
