"""What kernels for Hopper share, written with Pallas Mosaic GPU.

A kernel is one warpgroup of 128 threads. Tiles [64, 64] of bfloat16 lie in shared memory in the
order that wgmma reads (rows of 128 bytes, swizzled); what it sums is float32 in registers, in its
own layout, where a vector has one number for each row or for each column of a tile.
"""

import functools
import inspect
from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HALF, WIDE = jnp.bfloat16, jnp.float32
SIDE = 64  # of a tile, and the tokens of a chunk: wgmma makes 64 rows at a time
WGMMA = plgpu.Layout.WGMMA
_OLD = "out_shape" in inspect.signature(plgpu.kernel).parameters  # before jax 0.12
_TYPES = ("out_shape", "scratch_shapes") if _OLD else ("out_type", "scratch_types")
INDEX = ((),) if _OLD else ()


def run(body, given, out, scratch, *, name, grid, interpret, by_lane=False, exact=False):
    """Runs `body(x)` of one warpgroup in every cell of a grid; returns the outputs as a list.

    given: arrays by name; out: shapes; scratch: what lies in shared memory. x has a ref for each,
    and None for what is None. grid: axes by name, the first the fastest. by_lane: lowered by the
    older rules, which take layouts from the operands; the newer ones search for them, for minutes
    in a long kernel. exact: whether exp and the like are exact to float32.
    """
    absent = dict.fromkeys({**given, **out, **scratch})
    given, out, scratch = (
        {key: value for key, value in of.items() if value is not None}
        for of in (given, out, scratch)
    )

    def named(*refs, **scratch):
        body(SimpleNamespace(**absent | dict(zip([*given, *out], refs, strict=True)) | scratch))

    semantics = plgpu.LoweringSemantics
    types = dict(zip(_TYPES, (list(out.values()), scratch), strict=True))
    return plgpu.kernel(
        named,
        **types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=not exact,
            reduction_scratch_bytes=0 if by_lane else 2048,
            lowering_semantics=semantics.Lane if by_lane else semantics.Warpgroup,
        ),
        interpret=interpret or False,
    )(*given.values())


# ---------------------------------------------------------------- tiles

SUMS = plgpu.ACC((SIDE, SIDE), WIDE)
NUMBERS = plgpu.SMEM((SIDE,), WIDE)


def tile(*buffers):
    """Tiles [64, 64] of bfloat16 in shared memory, as wgmma reads them."""
    tiling = plgpu.TilingTransform((8, SIDE))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(2 * SIDE)  # type: ignore[abstract]
    return plgpu.SMEM((*buffers, SIDE, SIDE), HALF, transforms=(tiling, swizzle))


def copy_in(barrier, *pairs):
    """Starts copies to shared memory, each an arrival at a barrier. pairs: (from, to)."""
    for source, there in pairs:
        plgpu.copy_gmem_to_smem(source, there, barrier)


def load(ref, dtype=None, *, shared=True):
    """A tile in registers; shared: whether it lies in shared memory."""
    found = plgpu.load(ref, *INDEX, layout=WGMMA, optimized=shared)
    return found if dtype is None else found.astype(dtype)


def store(ref, x):
    """Rounds x to a tile in shared memory."""
    ref[...] = x.astype(HALF)


def span(n):
    """The n-th 64 places of an axis."""
    return pl.ds(n * SIDE, SIDE)


def vector(ref):
    """A vector in shared memory in registers, a number for each row."""
    return plgpu.load(ref, *INDEX, layout=WGMMA.reduce(1))


def of_rows(ref, shape):
    """A vector in shared memory as a number for each row of shape."""
    return lax.broadcast_in_dim(vector(ref), shape, [0])


def of_columns(ref, shape):
    """A vector in shared memory as a number for each column of shape."""
    vector = plgpu.load(ref, *INDEX, layout=WGMMA.reduce(0), optimized=False)
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


def sums_over(steps: int, slots: int, arrived, fetch, use, count: int) -> list:
    """`count` tiles of sums over steps, whose operands are copied to slots in turn, and behind them
    the sum of what `use` returns, if that is not None.

    fetch(n, slot): starts the copies of step n, which arrive at the slot's barrier.
    use(slot, *sums): starts the products of what is there.
    """

    def run(*sums):
        beside = []
        for n in range(slots):
            fetch(n, n)
        for n in range(steps):
            slot = n % slots
            plgpu.barrier_wait(arrived.at[slot])
            beside.append(use(slot, *sums))
            if n + slots < steps:
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()  # what `use` has loaded too
                fetch(n + slots, slot)
        found = [x[...] for x in sums]
        return found if beside[0] is None else [*found, functools.reduce(jnp.add, beside)]

    return pl.run_scoped(run, *[SUMS] * count)


# ---------------------------------------------------------------- arrays in two parts


def put(parts, x):
    """x [64, 64] as the sum of two tiles in shared memory, exact to 2^-17. It is rounded to the
    first by its bits, since conversions that are not of two numbers at once are slow."""
    bits = (lax.bitcast_convert_type(x, jnp.int32) + 0x8000) & ~0xFFFF
    main = lax.bitcast_convert_type(bits, WIDE)
    parts[0] = main.astype(HALF)
    parts[1] = (x - main).astype(HALF)


def total(parts):
    """The sum of two parts, in registers."""
    return load(parts.at[0], WIDE) + load(parts.at[1], WIDE)


def in_pairs(tiles, count):
    """The parts of `count` arrays."""
    return [tiles.at[2 * n : 2 * n + 2] for n in range(count)]


def unhoisted(*tiles):
    """The same tiles [n, 64, 64], at addresses that depend on what the compiler takes for unknown.
    It would compute them all in front of a loop, for more registers than there are."""
    zero = lax.optimization_barrier(jnp.int32(0))
    return [ref.at[pl.ds(zero, ref.shape[0])] for ref in tiles]


def halves(parts, turn=False):
    """Both parts as operands of products, or those of the transpose."""
    return [turned(parts.at[n]) if turn else parts.at[n] for n in range(2)]


def both(a, b):
    """Products of a tile with both parts of an array."""
    return [(a, part) for part in b]


def in_parts(a, b):
    """Products of two arrays in parts, without that of what is small in both."""
    return [*both(a[0], b), (a[1], b[0])]


def dots(*wanted):
    """Sums of products of tiles, each from a list of (a, b); all run at once."""

    def run(*sums):
        for found, pairs in zip(sums, wanted, strict=True):
            for a, b in pairs:
                plgpu.wgmma(found, a, b)
        return [found[...] for found in sums]

    return pl.run_scoped(run, *[SUMS] * len(wanted))


# ---------------------------------------------------------------- decays


def decayed(x, sums, since_start: bool):
    """x [C, C] times the decay of each row's token, since the chunk's start or to its end.

    sums [2, C] in shared memory: those of `decays.log_decay_sums`; None leaves x as it is.
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


def lower(x, sums, backward: bool = False):
    """x [C, C] times the decays from token j to token i, zero where j > i; the transpose of that
    where backward. Masked before exp; all exponents are at most 0."""
    i, j = places(SIDE)
    late, early = (j, i) if backward else (i, j)
    if sums is None:
        return jnp.where(late >= early, x, 0.0)
    of_late, of_early = (of_columns, of_rows) if backward else (of_rows, of_columns)
    whole, part = (of_late(sums.at[n], x.shape) - of_early(sums.at[n], x.shape) for n in (0, 1))
    return x * jnp.exp(jnp.where(late >= early, whole + part, -jnp.inf))
