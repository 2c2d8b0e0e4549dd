"""A network trained by gradient steps on TPU, forward: one walk over windows, the layers of W, Z
and W_b on the chip.

A grid step is a block of windows of a group of heads, one after the other; network.py has the work
of a window, which the heads of a group do in step (`jax.vmap`). When gradients follow, the layers
in front of each block leave the chip, 12 bytes for each weight of the network and block, 8 without
momentum. Products of float32 are exact to float32; with bfloat16, float32 factors are the sum of
two arrays.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.deep_network.network import answered
from pallas_kernels.deep_network.windows import Rule


class Static(NamedTuple):
    """What a kernel is compiled for. rows: of a window; windows, heads: of a grid step.
    interpret, limit: of `pallas_call`, as in `common.Static`."""

    rows: int
    windows: int
    heads: int
    interpret: Any
    limit: int | None


class Blocks(NamedTuple):
    """Blocks of a grid [batch, groups of heads, blocks of windows], the last walked forward or
    backward."""

    static: Static
    number: int
    backward: bool = False

    def _at(self, n):
        return self.number - 1 - n if self.backward else n

    def rows(self, width: int):
        """[h, M S, width] of [B, H, N S, width]."""
        shape = (None, self.static.heads, self.static.windows * self.static.rows, width)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, self._at(n), 0))

    def coefficients(self, rows: int, width: int):
        """[h, M, rows, width] of [B, H, N, rows, width]."""
        shape = (None, self.static.heads, self.static.windows, rows, width)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, self._at(n), 0, 0))

    def start(self, m: int, n: int):
        """[h, m, n] of [H, m, n]."""
        shape = (self.static.heads, m, n)
        return pl.BlockSpec(shape, lambda b, g, n: (g, 0, 0), pipeline_mode=pl.Buffered(1))

    def layer(self, m: int, n: int):
        """[h, m, n] of [B, H, m, n], the same for all blocks: one buffer is enough."""
        shape = (None, self.static.heads, m, n)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, 0, 0), pipeline_mode=pl.Buffered(1))

    def bounds(self, m: int, n: int):
        """[h, m, n] of [B, N / M, H, m, n]."""
        shape = (None, None, self.static.heads, m, n)
        return pl.BlockSpec(shape, lambda b, g, n: (b, self._at(n), g, 0, 0))


def rows_at(window, count: int):
    """The rows of a window."""
    return pl.ds(pl.multiple_of(window * count, 16), count)


def read(refs) -> list:
    """Their arrays."""
    return [ref[...] for ref in refs]


def kernel(*refs, static, rule, count, fresh, keep):
    """q, k, v, coefficients; start; the layers in front; o; those behind, whose blocks carry them
    along the walk; with keep those in front of the block."""
    q_ref, k_ref, v_ref, coefficients_ref, *others = refs
    start_refs, others = others[:fresh], others[fresh:]
    initial_refs, o_ref, layer_refs = others[:count], others[count], others[count + 1 :][:count]
    kept_refs = others[2 * count + 1 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for layer_ref, initial_ref in zip(layer_refs, initial_refs, strict=True):
            layer_ref[...] = initial_ref[...]

    for kept_ref, layer_ref in zip(kept_refs, layer_refs, strict=keep):
        kept_ref[...] = layer_ref[...]

    start, like = tuple(read(start_refs)) or None, q_ref.dtype

    def window(n, _):
        rows = rows_at(n, static.rows)
        q, k, v = (ref[:, rows].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref))
        numbers = coefficients_ref[:, n]
        o, layers = answered(read(layer_refs), q, k, v, numbers, start, rule=rule, like=like)
        o_ref[:, rows] = o.astype(like)
        for ref, layer in zip(layer_refs, layers, strict=True):
            ref[...] = layer

    jax.lax.fori_loop(0, static.windows, window, None)


def forward(q, k, v, coefficients, start, layers, *, static: Static, rule: Rule, keep: bool):
    """(o [B, H, N S, V], layers behind, with keep those in front of each block, [B, N / M, H, m,
    n]).

    q, k, v [B, H, N S, ...]; coefficients [B, H, N, ...]; start: layers [H, m, n] or (); layers: of
    W, Z and W_b, [B, H, m, n], and pairs, [B, H, F, ...], float32.
    """
    batch, heads, windows, rows, width = coefficients.shape
    blocks = Blocks(static, windows // static.windows)
    shape, size, axes = jax.ShapeDtypeStruct, v.shape[-1], [x.shape[2:] for x in layers]
    kept = [shape((batch, blocks.number, heads, *two), jnp.float32) for two in axes if keep]
    o, *found = pl.pallas_call(
        partial(kernel, static=static, rule=rule, count=len(layers), fresh=len(start), keep=keep),
        grid=(batch, heads // static.heads, blocks.number),
        in_specs=[
            *(blocks.rows(a.shape[-1]) for a in (q, k, v)),
            blocks.coefficients(rows, width),
            *(blocks.start(*x.shape[1:]) for x in start),
            *(blocks.layer(*two) for two in axes),
        ],
        out_specs=[
            blocks.rows(size),
            *(blocks.layer(*two) for two in axes),
            *(blocks.bounds(*two) for two in axes if keep),
        ],
        out_shape=[
            shape((*q.shape[:3], size), v.dtype),
            *(shape(x.shape, jnp.float32) for x in layers),
            *kept,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.limit,
        ),
        name="deep_network_forward",
        interpret=static.interpret,
    )(q, k, v, coefficients, *start, *layers)
    return o, found[: len(layers)], found[len(layers) :]
