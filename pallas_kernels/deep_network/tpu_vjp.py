"""A network trained by gradient steps on TPU, backward: the walk of tpu.py in reverse, the
gradients of the layers on the chip.

A grid step makes the layers in front of each window of its block again, from those in front of the
block, and then goes back through the windows by `jax.vjp` of the function that the forward kernel
runs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.deep_network.network import advanced, answered
from pallas_kernels.deep_network.tpu import Blocks, Static, read, rows_at
from pallas_kernels.deep_network.windows import Rule


def kernel(*refs, static, rule, count, fresh):
    """q, k, v, do, coefficients; start; the layers in front of the block; gradients of those behind
    all; gradients of q, k, v, coefficients, of the layers and of start, whose blocks carry them
    along the walk; room for the layers in front of each window."""
    q_ref, k_ref, v_ref, do_ref, coefficients_ref, *others = refs
    start_refs, others = others[:fresh], others[fresh:]
    bound_refs, dfinal_refs, others = others[:count], others[count : 2 * count], others[2 * count :]
    (dq_ref, dk_ref, dv_ref, dcoefficients_ref), others = others[:4], others[4:]
    dlayer_refs, dstart_refs = others[:count], others[count : count + fresh]
    room_refs = others[count + fresh :]
    like = q_ref.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref, final in zip(dlayer_refs, dfinal_refs, strict=True):
            ref[...] = final[...]
        for ref in dstart_refs:
            ref[...] = jnp.zeros_like(ref)

    start = tuple(read(start_refs)) or None
    for room, bound in zip(room_refs, bound_refs, strict=True):
        room[0] = bound[...]

    def wide(ref, rows):
        return ref[:, rows].astype(jnp.float32)

    def again(n, _):
        rows = rows_at(n, static.rows)
        given = wide(k_ref, rows), wide(v_ref, rows), coefficients_ref[:, n]
        layers = advanced([room[n] for room in room_refs], *given, start, rule, like)
        for room, layer in zip(room_refs, layers, strict=True):
            room[n + 1] = layer

    jax.lax.fori_loop(0, static.windows - 1, again, None)

    def back(step, _):
        n = static.windows - 1 - step
        rows = rows_at(n, static.rows)
        given = (wide(ref, rows) for ref in (q_ref, k_ref, v_ref))
        layers = [room[n] for room in room_refs]
        run = partial(answered, rule=rule, like=like)
        _, pull = jax.vjp(run, layers, *given, coefficients_ref[:, n], start)
        dlayers, *found, dcoefficients, dstart = pull((wide(do_ref, rows), read(dlayer_refs)))
        for ref, d in zip((dq_ref, dk_ref, dv_ref), found, strict=True):
            ref[:, rows] = d.astype(like)
        dcoefficients_ref[:, n] = dcoefficients
        for ref, d in zip(dlayer_refs, dlayers, strict=True):
            ref[...] = d
        for ref, d in zip(dstart_refs, dstart or (), strict=True):
            ref[...] += d

    jax.lax.fori_loop(0, static.windows, back, None)


def backward(q, k, v, coefficients, start, kept, do, dfinals, *, static: Static, rule: Rule):
    """(dq, dk, dv, dcoefficients, dlayers, dstart [B, H, m, n]) from what `forward` kept."""
    batch, heads, windows, rows, width = coefficients.shape
    blocks = Blocks(static, windows // static.windows, backward=True)
    shape, axes = jax.ShapeDtypeStruct, [x.shape[2:] for x in dfinals]
    layers = [blocks.layer(*two) for two in axes]
    of_rows = [blocks.rows(a.shape[-1]) for a in (q, k, v)]
    carried = [shape(x.shape, jnp.float32) for x in (*dfinals, *dfinals[: len(start)])]
    dq, dk, dv, dcoefficients, *found = pl.pallas_call(
        partial(kernel, static=static, rule=rule, count=len(axes), fresh=len(start)),
        grid=(batch, heads // static.heads, blocks.number),
        in_specs=[
            *of_rows,
            blocks.rows(v.shape[-1]),
            blocks.coefficients(rows, width),
            *(blocks.start(*x.shape[1:]) for x in start),
            *(blocks.bounds(*two) for two in axes),
            *layers,
        ],
        out_specs=[
            *of_rows,
            blocks.coefficients(rows, width),
            *layers,
            *layers[: len(start)],
        ],
        out_shape=[
            *(shape(a.shape, a.dtype) for a in (q, k, v)),
            shape(coefficients.shape, jnp.float32),
            *carried,
        ],
        scratch_shapes=[
            pltpu.VMEM((static.windows, static.heads, *two), jnp.float32) for two in axes
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.limit,
        ),
        name="deep_network_backward",
        interpret=static.interpret,
    )(q, k, v, do, coefficients, *start, *kept, *dfinals)
    return dq, dk, dv, dcoefficients, found[: len(axes)], found[len(axes) :]
