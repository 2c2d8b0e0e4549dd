"""A matrix trained by gradient steps, by a kernel: checks, rows, and the choice of blocks."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common
from pallas_kernels.decays import LOWEST, RESET
from pallas_kernels.deep_memory import layout, tpu, tpu_vjp
from pallas_kernels.deep_memory.reference import LOSSES, State, initial_state, shapes_of

NAME = "deep_memory"


def deep_memory(
    q, k, v, g, rates, start, *, m=None, frozen_chunk, loss="l2", state=None, reset=None,
    write=None, chunk=None, platform=None,
):  # fmt: skip
    """W_t = exp(g_t) W_{t-1} + Z_t, Z_t = exp(m_t) Z_{t-1} - sum_{j<c} r_t[j] k_{t-j} e_{t-j}^T,
    e = 2 (W_b^T k - v), o_t = W_t^T q_t, W_b in front of the token's frozen chunk.

    The matrix memories of Titans (Behrouz et al. 2024, arXiv 2501.00663, Eq. 9-16), OmegaNet, and
    ATLAS without Newton-Schulz (2505.23735, Eq. 9-16). `reference` has the definition.

    Args:
      q, k: [B, T, H, K]. v: [B, T, H, V]. K and V at most 256, with zeros behind them up to 64, 128
        or 256. All three float32 or all bfloat16.
      g, m: log decays <= 0 of the weights and of the momentum, [B, T, H], taken as float32; m None
        without momentum.
      rates: steps >= 0, [B, T, H, c], for the last c pairs, a token's own first. Steps have to be
        so small that what is learned does not diverge (memjax's `cells/titans.py` has bounds).
      start: [H, K, V], the weights in front of a document.
      frozen_chunk: written tokens for which W_b is frozen, from a document's start; at least 1.
      loss: "l2" for ||W^T k - v||^2 or "dot" for -<W^T k, v>, whose e is -v.
      state: `State`, finite, or None for the initial one.
      reset: bool [B, T], True where a document begins. write: bool [B, T] or [B, T, H], False
        where a token only reads: its other arrays may hold anything.
      chunk: rows in a chunk, 16, 32, 64 or 128; None chooses. Changes speed only. With c > 1 a
        chunk also has c - 1 rows in front of it and of each frozen chunk in it.
      platform: "tpu", or with its generation, such as "tpu v5e"; None for the default backend.

    Returns:
      o [B, T, H, V] in the dtype of v, and the last `State`, float32. Both, and the gradients, are
      those of `reference.sequential`, exact to float32 for float32. Under `jax.checkpoint` the
      names "memory_out" (what is returned) and "memory_state" (what the backward pass needs) can be
      saved, so that the forward kernel runs once. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape or chunk.
      ValueError: shapes that do not fit together, or another loss.
    """
    batch, length, heads = _check(
        q, k, v, g, rates, start, m, frozen_chunk, loss, state, reset, write
    )
    axes = q.shape[-1], v.shape[-1]
    q, k, v, start, state = _served_heads(q, k, v, start, state)
    interpret, _, generation = common.only_on(NAME, ("tpu",), platform)
    common.check_served(NAME, {"q": q, "k": k}, v)
    context = rates.shape[-1]
    rule = tpu.Rule(m is not None, context, reset is not None, loss, 1)
    static = _plan(q, v, rule, chunk, frozen_chunk, generation, interpret)
    if state is None and reset is None and write is None and context == 1:
        evenly = frozen_chunk & -frozen_chunk  # the largest power of two that divides it
        rule = rule._replace(apart=min(evenly, static.chunk // 2))
    narrow = state is None and (write is None or write.ndim == 2)
    write = write[..., None] if write is not None and write.ndim == 2 else write
    if state is None:
        state = initial_state(k, v, rates, start.astype(jnp.float32), rule.momentum)
    place, number = state.place, state.number
    number = jnp.zeros_like(place) if number is None else number
    if narrow:
        place, number = place[:, :1], number[:, :1]
    shape = (batch, length, place.shape[1])
    options = dict(frozen_chunk=frozen_chunk, context=context, rows=static.chunk)
    rows = layout.layout(reset, write, place, number, shape, **options)
    q, k, v, pairs, scalars = _rows(q, k, v, (g, m, rates), write, state, rows, static.chunk)
    carried = [state.weights, *([state.momentum] if rule.momentum else []), state.base]
    carried = [a.astype(jnp.float32) for a in carried]
    fresh = start.astype(jnp.float32) if rule.fresh else None
    o, found = _op((static, rule), q, k, v, *scalars, _integers(rows), fresh, carried)
    o = o[:, :length] if rows.slot is None else _take(o, rows.slot)
    everywhere = lambda a: jnp.broadcast_to(a, (batch, heads))  # noqa: E731
    place = everywhere(rows.place)
    momentum = found[1] if rule.momentum else None
    number = None if rows.there is None else everywhere(rows.there)
    new = State(found[0], momentum, found[-1], place, pairs[0], pairs[1], number)
    return checkpoint_name((o[..., : axes[1]], _of_heads(new, common.cut, *axes)), "memory_out")


def _check(q, k, v, g, rates, start, m, frozen_chunk, loss, state, reset, write):
    """(B, T, H); ValueError for what does not fit together."""
    common.check_shapes(NAME, {"q": q, "k": k}, v, None, g, None, reset, False)
    batch, length, heads, size = v.shape
    one = (batch, length, heads)
    wanted = {
        "q": (q, (*one, q.shape[-1])),
        "g": (g, one),
        "m": (m, one),
        "rates": (rates, (*one, rates.shape[-1])),
        "start": (start, (heads, q.shape[-1], size)),
    }
    for name, (array, axes) in wanted.items():
        if array is not None and array.shape != axes:
            raise ValueError(f"{NAME}: {name} must be {list(axes)}; given {list(array.shape)}")
    common.check_frozen(NAME, frozen_chunk, loss, LOSSES, write, one)
    if state is not None:
        matrix, older = (batch, heads, q.shape[-1], size), rates.shape[-1] - 1
        pairs = (older, q.shape[-1]), (older, size)
        common.check_state(NAME, state, shapes_of(matrix, one[::2], pairs, m is not None))
    return one


def _plan(q, v, rule, chunk, frozen_chunk, generation: str, interpret) -> common.Static:
    """The block of a TPU; NotImplementedError where none serves."""
    small, wide = common.has_small_memory(generation), v.dtype == jnp.float32
    room, limit = (common.SMALL, None) if small else (common.LARGE, common.LIMIT)
    # bytes for each pair of rows, as compiled: v4 keeps more of what others spill in turn
    pairs = (500 if wide else 156) if small else 96

    def bytes_of(rows, heads):
        if not layout.tokens_in(rows, rule.context, frozen_chunk):
            return float("inf")
        states = 16 * rule.states + 8 * rule.fresh
        options = dict(width=q.shape[-1], size=v.shape[-1], like=v, states=states, pairs=0, logs=0)
        return common.vmem(rows, heads, **options) + heads * rows * max(rows, 128) * pairs

    try:
        block = common.plan(NAME, q, v, None, chunk, bytes_of, room)
    except NotImplementedError as reason:
        if rule.context == 1:
            raise
        raise NotImplementedError(
            f"{reason}, or fewer pairs: a step learns from {rule.context} in frozen chunks of "
            f"{frozen_chunk}"
        ) from None
    return common.Static(1.0, *block, interpret, limit)


# ---------------------------------------------------------------- heads of other sizes


def _of_heads(state: State, fit, width: int, size: int) -> State:
    """A state whose heads fit(array, sizes of its last axes) makes K x V."""
    axes: dict[str, tuple[int, ...]] = {"k": (width,), "v": (size,)}
    axes |= dict.fromkeys(("weights", "momentum", "base"), (width, size))
    there = state._asdict()
    return state._replace(
        **{name: fit(there[name], *n) for name, n in axes.items() if there[name] is not None}
    )


def _served_heads(q, k, v, start, state):
    """The same with K and V among `common.WIDTHS`, where they are not larger: zeros behind keys and
    values change nothing."""
    width, size = (
        next((w for w in common.WIDTHS if n <= w), n) for n in (q.shape[-1], v.shape[-1])
    )
    if (width, size) == (q.shape[-1], v.shape[-1]):
        return q, k, v, start, state
    state = None if state is None else _of_heads(state, common.wider, width, size)
    return (
        common.wider(q, width),
        common.wider(k, width),
        common.wider(v, size),
        common.wider(start, width, size),
        state,
    )


# ---------------------------------------------------------------- rows


def _take(a, index):
    """Rows [B, n, h, ...] of a [B, T, H, ...] by their places [B, n, h or 1]."""
    index = index.reshape(*index.shape, *[1] * (a.ndim - 3))
    return jnp.take_along_axis(a, index, axis=1)


def _rows(q, k, v, scalars, write, state, rows, chunk: int):
    """(q, k, v of rows, the last pairs, the scalars of rows, zero where a token only reads)."""
    if write is not None:  # what is not written, even NaN, must not matter
        zeroed = lambda a: jnp.where(  # noqa: E731
            jnp.expand_dims(write, range(3, a.ndim)), a, jnp.zeros_like(a)
        )
        k, v, *scalars = jax.tree.map(zeroed, (k, v, *scalars))
    scalars = jax.tree.map(lambda a: a.astype(jnp.float32), scalars)
    if rows.source is None:
        given = common.padded((q, k, v, *scalars), chunk)
        return *given[:3], (None, None), given[3:]
    older = state.k.shape[2]

    def extended(a, pairs=None):
        """[pairs in front | tokens | zero]."""
        if pairs is None:
            pairs = jnp.zeros((a.shape[0], older, *a.shape[2:]), a.dtype)
        else:
            pairs = jnp.swapaxes(pairs, 1, 2).astype(a.dtype)
        return jnp.concatenate([pairs, a, jnp.zeros_like(a[:, :1])], axis=1)

    wide = [extended(a, pairs) for a, pairs in ((k, state.k), (v, state.v))]
    q, *scalars = jax.tree.map(lambda a: _take(extended(a), rows.source), (q, *scalars))
    scalars = [
        None if a is None else jnp.where(jnp.expand_dims(rows.own, range(3, a.ndim)), a, 0)
        for a in scalars
    ]
    last = [jnp.swapaxes(_take(a.astype(jnp.float32), rows.kept), 1, 2) for a in wide]
    return q, *(_take(a, rows.source) for a in wide), last, scalars


def _integers(rows):
    """What rows have besides arrays of numbers, for every head."""
    return rows.base, rows.use, rows.first, rows.asking, rows.paired


def _columns(static, rule, g, m, rates, integers):
    """The columns of `factors.names`, [B, G, N, C, n heads]."""
    base, use, first, asking, paired = integers
    logs = jnp.stack([jnp.maximum(a, LOWEST) for a in (g, m) if a is not None])
    whole = jnp.round(logs)
    both = jnp.stack([whole - RESET * first, logs - whole], axis=1)
    both = both.reshape(*both.shape[:3], -1, static.chunk, both.shape[-1])
    last = jnp.tril(jnp.ones((static.chunk, static.chunk), jnp.float32))
    sums = jnp.einsum("ij,apbnjh->apbnih", last, both, precision=lax.Precision.HIGHEST)
    sums = sums.reshape(*sums.shape[:3], *g.shape[1:])
    made = {"whole": sums[0, 0], "part": sums[0, 1], "base": base, "use": use | first}
    if rule.momentum:
        made |= {"whole_m": sums[1, 0], "part_m": sums[1, 1]}
    made |= {"rho": jnp.where(first, jnp.exp(g), 0), "asking": asking, "paired": paired}
    made |= {f"rate{age}": rates[..., age] for age in range(rule.context)}
    columns = [
        common.by_chunk(jnp.broadcast_to(made[name], g.shape).astype(jnp.float32), static)
        for name in rule.names
    ]
    return jnp.concatenate(columns, axis=-1)


# ---------------------------------------------------------------- the op


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(how, q, k, v, g, m, rates, integers, fresh, states):
    given = q, k, v, g, m, rates, integers, fresh, states
    return _forward(how, given, keep=False)[:2]


def _options(static):
    options = static.options()
    del options["scale"]
    return options


def _forward(how, given, keep):
    (static, rule), (q, k, v, g, m, rates, integers, fresh, states) = how, given
    columns = _columns(static, rule, g, m, rates, integers)
    return tpu.forward(q, k, v, columns, fresh, states, rule=rule, keep=keep, **_options(static))


def _op_forward(how, *given):
    o, final, kept = _forward(how, given, keep=True)
    kept = [checkpoint_name(a, "memory_state") for a in kept]
    return (o, final), (given[:-1], kept)


def _op_backward(how, saved, cotangents):
    (static, rule), ((q, k, v, g, m, rates, integers, fresh), kept) = how, saved
    columns = _columns(static, rule, g, m, rates, integers)
    dq, dk, dv, dcolumns, dstates, dfresh = tpu_vjp.backward(
        q, k, v, columns, fresh, kept, *cotangents, rule=rule, **_options(static)
    )
    columns = jnp.split(dcolumns, dcolumns.shape[-1] // static.heads, axis=-1)
    dg, *others = map(common.by_token, columns)
    dm = jnp.where(m < LOWEST, 0, others.pop(0)) if rule.momentum else None
    dfresh = None if dfresh is None else jnp.sum(dfresh, axis=0)
    drates = jnp.stack(others, axis=-1)
    return dq, dk, dv, jnp.where(g < LOWEST, 0, dg), dm, drates, None, dfresh, list(dstates)


_op.defvjp(_op_forward, _op_backward)
