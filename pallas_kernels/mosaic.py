"""What kernels for Hopper share, written with Pallas Mosaic GPU.

A kernel is one warpgroup of 128 threads. Tiles [64 n, 64 m] of bfloat16 lie in shared memory in
the order that wgmma reads (rows of 128 bytes, swizzled); what it sums is float32 in registers, in
`WGMMA` layout, where a vector has one number for each row or for each column of a tile.
"""

import inspect

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SIDE = 64  # of a tile, and the tokens of a chunk: wgmma makes 64 rows at a time
WGMMA = plgpu.Layout.WGMMA
_NEW = "out_type" in inspect.signature(plgpu.kernel).parameters  # jax 0.12
_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before it


def kernel(body, out, scratch, *, name, grid, interpret):
    """`plgpu.kernel` of one warpgroup. out: tree of shapes. scratch, grid: by name; the first axis
    of the grid is the fastest."""
    out_name, scratch_name = (
        ("out_type", "scratch_types") if _NEW else ("out_shape", "scratch_shapes")
    )
    return plgpu.kernel(
        body,
        **{out_name: out, scratch_name: scratch},
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
    )


SUMS = plgpu.ACC((SIDE, SIDE), jnp.float32)


def tile(*buffers):
    """Tiles [64, 64] of bfloat16 in shared memory, as wgmma reads them."""
    tiling = plgpu.TilingTransform((8, SIDE))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(2 * SIDE)  # type: ignore[abstract]
    return plgpu.SMEM((*buffers, SIDE, SIDE), jnp.bfloat16, transforms=(tiling, swizzle))


def copy_in(barrier, *pairs):
    """Starts copies to shared memory, each an arrival at a barrier. pairs: (from, to)."""
    for source, there in pairs:
        plgpu.copy_gmem_to_smem(source, there, barrier)


def load(ref, dtype=None):
    """A tile in registers."""
    found = plgpu.load(ref, *_INDEX, layout=WGMMA)
    return found if dtype is None else found.astype(dtype)


def of_rows(ref, shape):
    """A vector in shared memory as a number for each row of shape."""
    vector = plgpu.load(ref, *_INDEX, layout=WGMMA.reduce(1))
    return lax.broadcast_in_dim(vector, shape, [0])


def of_columns(ref, shape):
    """A vector in shared memory as a number for each column of shape."""
    vector = plgpu.load(ref, *_INDEX, layout=WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(vector, shape, [1])


def places(size: int):
    """Row and column of every place of [size, size]."""
    return tuple(
        plgpu.broadcasted_iota(jnp.int32, (size, size), axis, layout=WGMMA) for axis in (0, 1)
    )


def turned(ref):
    """The transpose of a tile, without a move."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def dot(a, b):
    """The product of two tiles in shared memory; float32 sums in registers."""

    def run(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(run, SUMS)


# ---------------------------------------------------------------- decays


def decayed(x, sums, since_start: bool):
    """x [C, D] float32 times the decay of each row's token, since the chunk's start or to its end.

    sums [2, C] in shared memory: those of `common.log_decay_sums`; None leaves x as it is.
    """
    if sums is None:
        return x
    whole, part = (of_rows(sums.at[n], x.shape) for n in (0, 1))
    if not since_start:
        whole, part = sums[0, SIDE - 1] - whole, sums[1, SIDE - 1] - part
    return x * jnp.exp(whole + part)


def through(x, sums):
    """x times the decay of the whole chunk."""
    return x if sums is None else x * jnp.exp(sums[0, SIDE - 1] + sums[1, SIDE - 1])


def lower(x, sums, reverse: bool = False):
    """x [C, C] times the decays from token j to token i, zero where j > i; with reverse the rows
    are the earlier tokens. Masked before exp; all exponents are at most 0."""
    i, j = places(SIDE)
    late, early = (j, i) if reverse else (i, j)
    if sums is None:
        return jnp.where(late >= early, x, 0.0)
    of_late, of_early = (of_columns, of_rows) if reverse else (of_rows, of_columns)
    whole, part = (of_late(sums.at[n], x.shape) - of_early(sums.at[n], x.shape) for n in (0, 1))
    return x * jnp.exp(jnp.where(late >= early, whole + part, -jnp.inf))
