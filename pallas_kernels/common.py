"""What the kernels share: where they run, what they serve, and their blocks."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# ---------------------------------------------------------------- where a kernel runs

GENERATIONS = ("v4", "v5e", "v5p", "v6e", "v7x")  # of TPUs
_interpreted: list = []


@contextlib.contextmanager
def interpreted(platform: str = "tpu", how=True):
    """Within it kernels for a platform run on the machine at hand, slowly, for tests.

    how: the `interpret` of `pallas_call`: True, or `pltpu.InterpretParams`; for "gpu"
    `plgpu.InterpretGPUParams`. Functions that were traced before are not traced again by `jax.jit`.
    """
    _interpreted.append((how, platform))
    try:
        yield
    finally:
        _interpreted.pop()


def target(platform: str | None):
    """(how to interpret or False, platform, its generation or ""); of the default backend when none
    is given."""
    platform, _, generation = (platform or "").partition(" ")
    platform = "gpu" if platform == "cuda" else platform
    if generation and (platform != "tpu" or generation not in GENERATIONS):
        raise ValueError(f"generations of tpu: {', '.join(GENERATIONS)}; given {generation!r}")
    if _interpreted and platform in ("", _interpreted[-1][1], jax.default_backend()):
        return *_interpreted[-1], generation
    return False, platform or jax.default_backend(), generation


def only_on(name: str, platforms: tuple[str, ...], platform: str | None):
    """`target`; NotImplementedError where it is none of these platforms."""
    interpret, platform, generation = target(platform)
    if platform not in platforms:
        raise NotImplementedError(
            f"{name} has kernels for {' and '.join(platforms)}, none for {platform}; use a plain "
            "form"
        )
    return interpret, platform, generation


_capabilities: list[str] = []


@contextlib.contextmanager
def compiling_for(capability: str):
    """Within it kernels for GPUs are lowered for this compute capability, such as "9.0", whatever
    GPU is at hand."""
    _capabilities.append(capability)
    try:
        yield
    finally:
        _capabilities.pop()


def gpu_capability() -> str | None:
    """That of `compiling_for`, of the GPU at hand, or None."""
    if _capabilities:
        return _capabilities[-1]
    try:
        return jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:  # this is how jax says that there is none
        return None


def kernels(op: str, static, g=None) -> tuple[Callable, Callable]:
    """The forward and the backward function of an op, on GPUs others for a decay g of each channel.
    Imported here, because Mosaic GPU needs what a machine without GPUs may not have."""
    other = static.platform == "gpu" and g is not None and g.ndim == 4
    module = f"pallas_kernels.{op}.{static.platform}{'_channel' * other}"
    forward, backward = (importlib.import_module(module + end) for end in ("", "_vjp"))
    return forward.forward, backward.backward


def padded(tree, chunk: int):
    """Leaves [B, T, ...] with zeros behind them up to a multiple of chunk tokens."""

    def pad(leaf):
        more = -leaf.shape[1] % chunk
        return jnp.pad(leaf, [(0, 0), (0, more)] + [(0, 0)] * (leaf.ndim - 2)) if more else leaf

    return jax.tree.map(pad, tree)


def wider(a, *axes: int):
    """a with zeros behind its last axes, up to these sizes."""
    front = [(0, 0)] * (a.ndim - len(axes))
    more = zip(axes, a.shape[-len(axes) :], strict=True)
    return jnp.pad(a, [*front, *((0, size - has) for size, has in more)])


def cut(a, *axes: int):
    """The first numbers of its last axes."""
    return a[(..., *map(slice, axes))]


# ---------------------------------------------------------------- what a kernel serves

CHUNKS = (128, 64, 32, 16)
GPU_CHUNK = 64
GPU_CAPABILITY = "9.0"  # Hopper
GPU_JAX = (0, 11, 2)  # the first version that these kernels are tested with on GPUs
WIDTHS = (64, 128, 256)
MIB = 2**20
# Bytes of VMEM that a kernel may take by our count on a v4, which has 16 MiB, and on later TPUs,
# which have 64 or more; and the limit that the compiler is told there.
SMALL, LARGE, LIMIT = int(15.5 * MIB), 40 * MIB, 60 * MIB


class Block(NamedTuple):
    """What one grid step takes: tokens and heads."""

    chunk: int
    heads: int


class Static(NamedTuple):
    """What a kernel is compiled for. interpret: that of `pallas_call`. limit: of its VMEM in bytes;
    None for the compiler's own."""

    scale: float
    chunk: int
    heads: int
    interpret: Any
    limit: int | None = None
    platform: str = "tpu"

    def options(self) -> dict[str, Any]:
        """What the functions of `kernels` take by name."""
        options = self._asdict()
        del options["platform"]
        if self.platform == "gpu":
            del options["limit"]
        return options


class Call(NamedTuple):
    """static; arrays: keys, v, g, reset, initial_state, padded to whole chunks."""

    static: Static
    arrays: tuple


def call(
    name: str,
    keys: dict[str, Any],
    v,
    g,
    initial_state,
    reset,
    scale,
    chunk,
    platform,
    *,
    size_of,
    beta=None,
    channels: bool = False,
    platforms: tuple[str, ...] = ("tpu", "gpu"),
) -> Call:
    """What an op hands to its kernel; NotImplementedError when that does not serve.

    keys: by name q, k and what has their shape. Heads that share them read them where they lie on
    GPUs; for TPUs they are repeated. channels: there is a decay for each channel. platforms: those
    with a kernel.
    """
    check_shapes(name, keys, v, beta, g, initial_state, reset, channels)
    interpret, platform, generation = only_on(name, platforms, platform)
    check_served(name, keys, v)
    limit, q = None, keys["q"]
    if platform == "gpu":
        block = plan_gpu(name, v, chunk, interpret)
    elif has_small_memory(generation):
        block = plan(name, q, v, g, chunk, size_of, SMALL)
    else:
        block, limit = plan(name, q, v, g, chunk, size_of, LARGE), LIMIT
    batch, _, heads, size = v.shape
    width = q.shape[-1]
    of_keys = tuple(keys.values())
    if platform == "tpu":
        of_keys = tuple(jnp.repeat(a, heads // a.shape[2], axis=2) for a in of_keys)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width, size))
    if g is None and reset is not None:
        g = jnp.zeros(v.shape[:3])
    g, initial_state = jax.tree.map(lambda a: a.astype(jnp.float32), (g, initial_state))
    scale = float(width**-0.5 if scale is None else scale)
    static = Static(scale, *block, interpret, limit, platform)
    # A token of zeros changes nothing.
    return Call(static, (*padded((*of_keys, v, g, reset), block.chunk), initial_state))


def check_shapes(name: str, keys, v, beta, g, initial_state, reset, channels) -> None:
    """ValueError for shapes that do not fit together."""
    q, names = keys["q"], ", ".join([*keys, "v"])
    if v.ndim != 4 or q.ndim != 4:
        raise ValueError(f"{name}: {names} must be [B, T, h, D]; given {q.shape}, {v.shape}")
    batch, length, heads, size = v.shape
    fewer, width = q.shape[2:]
    wanted = {
        **{leaf: (array, (batch, length, fewer, width)) for leaf, array in keys.items()},
        "reset": (reset, (batch, length)),
        "initial_state": (initial_state, (batch, heads, width, size)),
        "beta": (beta, (batch, length, heads)),
        "g": (g, (batch, length, heads, *([width] if channels else []))),
    }
    for leaf, (array, shape) in wanted.items():
        by_channel = leaf == "g" and array is not None and array.shape == (*shape[:3], width)
        if array is not None and array.shape != shape and not by_channel:
            raise ValueError(f"{name}: {leaf} must be {list(shape)}; given {list(array.shape)}")
    if reset is not None and reset.dtype != bool:
        raise ValueError(f"{name}: reset must be bool; given {reset.dtype}")
    if length == 0:
        raise ValueError(f"{name}: the sequence is empty (T = 0); give at least one token")
    if heads % fewer:
        raise ValueError(f"{name}: {fewer} heads of q and k do not divide the {heads} of v")


def check_frozen(
    name: str, frozen_chunk: int, loss: str, losses, write, tokens, called: str = "loss"
) -> None:
    """ValueError for what a memory of frozen gradients cannot learn with; tokens: (B, T, H);
    called: the name of the loss."""
    if write is not None and (write.shape not in (tokens[:2], tokens) or write.dtype != bool):
        raise ValueError(
            f"{name}: write must be bool {list(tokens[:2])} or {list(tokens)}; given {write.dtype} "
            f"{list(write.shape)}"
        )
    if frozen_chunk < 1 or loss not in losses:
        raise ValueError(
            f"{name}: frozen_chunk must be at least 1 and {called} one of {', '.join(losses)}; "
            f"given {frozen_chunk} and {loss!r}"
        )


def check_state(name: str, state, wanted) -> None:
    """ValueError for a carried state, a named tuple of arrays, tuples of them and None, whose
    shapes are not the wanted ones."""
    for field, shape in wanted._asdict().items():
        given = jax.tree.map(jnp.shape, getattr(state, field))
        if given != shape:
            raise ValueError(f"{name}: state.{field} must be {shape}; given {given}")


def check_served(name: str, keys, v) -> None:
    """NotImplementedError for dtypes and head dimensions that no kernel takes."""
    q, dtypes = keys["q"], [str(a.dtype) for a in (*keys.values(), v)]
    if set(dtypes) not in ({"float32"}, {"bfloat16"}):
        raise NotImplementedError(
            f"{name} takes {', '.join([*keys, 'v'])} all float32 or all bfloat16; given "
            f"{', '.join(dtypes)}"
        )
    if {q.shape[-1], v.shape[-1]} - set(WIDTHS):
        raise NotImplementedError(
            f"{name} takes head dimensions of {', '.join(map(str, WIDTHS[:-1]))} and "
            f"{WIDTHS[-1]}, or where it pads them at most that; given K = {q.shape[-1]}, V = "
            f"{v.shape[-1]}"
        )


def plan_gpu(name: str, v, chunk, interpret) -> Block:
    """The only block; NotImplementedError when the kernel does not serve."""
    if v.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"{name} takes bfloat16 on GPUs, whose tensor cores round float32 to TF32; given "
            f"{v.dtype}; use a plain form"
        )
    if chunk not in (None, GPU_CHUNK):
        raise NotImplementedError(f"{name} takes chunks of {GPU_CHUNK} on GPUs; given {chunk}")
    check_gpu(name, interpret)
    return Block(GPU_CHUNK, 1)


def check_gpu(name: str, interpret) -> None:
    """NotImplementedError for a GPU, or a version of jax, that kernels are not made for."""
    capability = GPU_CAPABILITY if interpret else gpu_capability()
    if capability != GPU_CAPABILITY:
        raise NotImplementedError(
            f"{name} has kernels for GPUs of compute capability {GPU_CAPABILITY} (H100, H200); "
            + (f"this one has {capability}; use a plain form" if capability else "there is no GPU")
        )
    if jax.__version_info__ < GPU_JAX:
        raise NotImplementedError(
            f"{name} needs jax {'.'.join(map(str, GPU_JAX))} on GPUs; this is {jax.__version__}"
        )


def has_small_memory(generation: str) -> bool:
    """Whether kernels have to fit a v4; so where the TPU's generation is not known."""
    if not generation and jax.default_backend() == "tpu":
        return jax.devices()[0].device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
    return generation in ("", "v4")


def vmem(
    tokens: int,
    heads: int,
    width: int,
    size: int,
    like,
    *,
    states: int,
    pairs: int,
    logs: int,
    keys: int = 2,
) -> int:
    """Bytes of VMEM of a backward kernel, about what is compiled for v4, which needs most.

    Arrays of tokens, `keys` of width K (q, k), v and their gradients, each in two buffers and
    turned once (float32 ones twice); `states` bytes for each number of the heads' states, `pairs`
    arrays [C, C] of each head that leave the registers, and, with a decay of each channel, `logs`
    float32 arrays [C, K] besides g and dg.
    """
    width, size = max(width, 128), max(size, 128)  # lanes
    copies = 4 if like.dtype == jnp.float32 else 3
    rows = tokens * (heads + -heads % 8)
    of_tokens = copies * rows * (2 * keys * width + 3 * size) * like.dtype.itemsize
    of_tokens += (6 * rows * width * 4) if logs else 0
    of_heads = states * width * size + pairs * tokens**2 * 4 + logs * tokens * width * 4
    return of_tokens + heads * of_heads


def plan(name: str, q, v, g, chunk, size_of, room: int) -> Block:
    """The largest block that fits a TPU; NotImplementedError when the kernel does not serve.

    size_of: (tokens, heads) -> bytes of VMEM. room: those that it may take.
    """
    length, count, size = v.shape[1:]
    width = q.shape[-1]
    if chunk is not None and chunk not in CHUNKS:
        raise NotImplementedError(f"{name} takes chunks of {CHUNKS}; given {chunk}")
    heads = 8 if count % 8 == 0 else count
    longest = chunk or max(CHUNKS[-1], 1 << (length - 1).bit_length())
    # With a decay of each channel longer chunks cost as much.
    chunks = CHUNKS if g is None or g.ndim == 3 else CHUNKS[1:]
    for tokens in (chunk,) if chunk else chunks:
        if tokens <= longest and size_of(tokens, heads) <= room:
            return Block(tokens, heads)
    raise NotImplementedError(
        f"{name} does not fit {room // MIB} MiB of a TPU core: {heads} heads of {width} x {size} "
        f"{v.dtype} at once"
        + (f" in chunks of {chunk}" if chunk else "")
        + "; use "
        + ("bfloat16, " if v.dtype == jnp.float32 else "")
        + ("a number of heads that 8 divides, " if count % 8 else "fewer heads, ")
        + "smaller ones, or a plain form"
    )


# ---------------------------------------------------------------- blocks


def by_chunk(x, static: Static):
    """[B, T, H] -> columns [B, G, N, C, heads]."""
    batch, length, count = x.shape
    split = x.reshape(batch, -1, static.chunk, count // static.heads, static.heads)
    return jnp.moveaxis(split, 3, 1)


def by_token(columns):
    """[B, G, N, C, heads] -> [B, T, H]."""
    batch, groups, chunks, chunk, heads = columns.shape
    return jnp.moveaxis(columns, 1, 3).reshape(batch, chunks * chunk, groups * heads)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a grid [batch, groups of heads, chunks], the last walked forward or backward."""

    chunk: int
    heads: int
    chunks: int
    backward: bool = False

    def _at(self, n):
        return self.chunks - 1 - n if self.backward else n

    def tokens(self, width: int):
        """[C, heads, width] of [B, T, H, width]."""
        shape = (None, self.chunk, self.heads, width)
        return pl.BlockSpec(shape, lambda b, g, n: (b, self._at(n), g, 0))

    def columns(self, per_head: int = 2):
        """[C, per_head heads]."""
        shape = (None, None, None, self.chunk, per_head * self.heads)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, self._at(n), 0, 0))

    def rows(self, per_head: int = 2):
        """[per_head heads, C]."""
        shape = (None, None, None, per_head * self.heads, self.chunk)
        return pl.BlockSpec(shape, lambda b, g, n: (b, g, self._at(n), 0, 0))

    def marks(self):
        """[C, 1] of [B, N, C, 1]."""
        return pl.BlockSpec((None, None, self.chunk, 1), lambda b, g, n: (b, self._at(n), 0, 0))

    def state(self, width: int, size: int):
        """[heads, K, V] of [B, H, K, V], the same for all chunks: one buffer is enough."""
        shape = (None, self.heads, width, size)
        at = lambda b, g, n: (b, g, 0, 0)  # noqa: E731
        return pl.BlockSpec(shape, at, pipeline_mode=pl.Buffered(1))

    def bounds(self, width: int, size: int):
        """[heads, K, V] of [B, N, H, K, V]."""
        shape = (None, None, self.heads, width, size)
        return pl.BlockSpec(shape, lambda b, g, n: (b, self._at(n), g, 0, 0))
