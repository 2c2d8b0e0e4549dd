"""Layers that mixers are made of. Every parameter carries logical axis names for sharding, and so
do the outputs of products."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.axes import constrain
from memjax.recurrence import lags
from memjax.typing import Array, Bool, DTypeLike, Float, Int, PyTree

Published = tuple[Array, PyTree]


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a model is told besides its input.

    reset: True where a token is the first of a document; None when no document starts here.
    write: False where a token only reads (padding); None when all are written.
    position: number of written tokens in front of each token in its document.
    layer: index of the layer that is told, from 0; an array inside a scan over layers.
    depth: number of layers of the model.
    published: what earlier layers have for later ones: name -> (whether one has set it, arrays
      [B, ...]); see `Mixer.published`.
    losses: what layers add to the training loss (see `Mixer.publish`), summed so far.
    differentiate: whether gradients will be taken, known when the model is traced.
    """

    reset: Bool[Array, "B T"] | None
    write: Bool[Array, "B T"] | None
    position: Int[Array, "B T"]
    layer: Int[Array, ""] | int = 0
    depth: int = 1
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    losses: Float[Array, ""] | float = 0.0
    differentiate: bool = True

    def replace(self, **changes: Any) -> "Context":
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)


jax.tree_util.register_dataclass(
    Context,
    data_fields=["reset", "write", "position", "layer", "published", "losses"],
    meta_fields=["depth", "differentiate"],
)


def unpublished(name: str) -> str:
    """The message for a layer that reads what nobody in front of it publishes."""
    return (
        f"it reads the {name} that a layer in front of it publishes, and none does; put one in "
        "`published`, as published(mamba2) for a memory or published(attention) for attention"
    )


def normal(std: float) -> Callable:
    """Initialiser: N(0, std^2)."""
    return nn.initializers.normal(std)


def uniform(bound: float) -> Callable:
    """Initialiser: U(-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def orthogonal(gain: float) -> Callable:
    """Initialiser of [rows, columns]: gain times a random matrix with orthonormal rows or columns.

    The polar factor of a Gaussian matrix, by Newton and Schulz's iteration X <- (3 X - X X^T X)/2:
    batched LAPACK calls can deadlock two CPU threads in jax 0.10.
    """

    def init(key, shape, dtype):
        flat = jax.random.normal(key, (min(shape), max(shape)), dtype)
        dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        def step(_, x):
            return 1.5 * x - 0.5 * dot(dot(x, x.T), x)

        flat = jax.lax.fori_loop(0, 48, step, flat / jnp.linalg.norm(flat))
        return gain * (flat if shape[0] <= shape[1] else flat.T)

    return init


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, or as it is in float64: the dtype of norms, gates, decays and logits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l2_normalise(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """x / ||x|| with 1e-6 inside the root, computed in float32."""
    wide = widen(x)
    scale = jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def rotary(x: Float[Array, "B T *h K"], position: Int[Array, "B T"], theta: float = 1e4):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated together.

    K must be even. The angles are computed in float32, position 0 is the identity.
    """
    half = x.shape[-1] // 2
    if 2 * half != x.shape[-1]:
        raise ValueError(f"rotary needs an even head dimension; given {x.shape[-1]}")
    wide = widen(x)
    angle = position[..., None] * theta ** (-jnp.arange(half, dtype=wide.dtype) / half)
    angle = jnp.expand_dims(angle, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Dense(nn.Module):
    """y = x W (+ b): contracts the last `contract` axes of x, with logical axis names on W.

    shape, axes: sizes and logical names of the output axes; inner: names of the contracted axes.
    initial: initialiser of W as a matrix [contracted, output]; None for N(0, std^2).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inner: tuple[str | None, ...] = ("embed",)
    std: float = 0.02
    bias: bool = False
    dtype: DTypeLike = jnp.float32
    initial: Callable | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        contract = len(self.inner)
        size = x.shape[-contract:]

        def matrix(key, shape, dtype):
            init = self.initial or normal(self.std)
            flat = init(key, (math.prod(size), math.prod(self.shape)), dtype)
            return flat.reshape(shape)

        init = nn.with_logical_partitioning(matrix, (*self.inner, *self.axes))
        kernel = self.param("kernel", init, (*size, *self.shape), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = jnp.tensordot(x, kernel, axes=contract)
        before = ("batch", "seq", *(None,) * x.ndim)[: x.ndim - contract]
        y = constrain(y, *before, *self.axes)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
            y = y + self.param("bias", zeros, self.shape, jnp.float32).astype(self.dtype)
        return y


class LowRank(nn.Module):
    """y = W_2 W_1 x (+ b), the product of rank `rank`; shape and axes as in `Dense`."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    rank: int
    std: float = 0.02
    bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        sizes = dict(std=self.std, dtype=self.dtype)
        x = Dense((self.rank,), (None,), name="first", **sizes)(x)
        return Dense(self.shape, self.axes, (None,), bias=self.bias, name="second", **sizes)(x)


def standardise(x: Float[Array, "... D"], centre: bool, epsilon: float) -> Float[Array, "... D"]:
    """x over its root mean square along the last axis, minus its mean with `centre`; float32."""
    y = widen(x)
    if centre:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis, computed in float32.

    axes: logical names of the axes that the scale spans (the last len(axes) axes of x).
    """

    kind: str = "rms"
    axes: tuple[str | None, ...] = ("embed",)
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"norm {self.kind!r}: allowed are 'rms' and 'layer'")
        shape = x.shape[-len(self.axes) :]
        y = standardise(x, self.kind == "layer", self.epsilon)
        ones = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        y = y * self.param("scale", ones, shape, jnp.float32)
        if self.kind == "layer":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
            y = y + self.param("bias", zeros, shape, jnp.float32)
        return y.astype(x.dtype)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, within documents and over written tokens only.

    State: the last width - 1 written inputs [B, width - 1, D], zeros before the document.
    Weights U(-1, 1) / sqrt(width), as torch's depthwise default.
    """

    width: int = 4
    activation: Callable | None = jax.nn.silu
    bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], state: Float[Array, "B n D"] | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B n D"]]:
        batch, _, dim = x.shape
        init = nn.with_logical_partitioning(uniform(self.width**-0.5), (None, "conv"))
        kernel = self.param("kernel", init, (self.width, dim), jnp.float32).astype(self.dtype)
        x = x.astype(self.dtype)
        if state is None:
            state = jnp.zeros((batch, self.width - 1, dim), self.dtype)
        past, state = lags(x, state, ctx.reset, ctx.write)
        y = sum((a * w for a, w in zip(past, kernel[1:], strict=True)), x * kernel[0])
        if self.bias:
            init = nn.with_logical_partitioning(uniform(self.width**-0.5), ("conv",))
            y = y + self.param("bias", init, (dim,), jnp.float32).astype(self.dtype)
        return (self.activation(y) if self.activation else y), state


def depth_fractions(ctx: Context) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How deep a layer stands: l / (L - 1) from 0 to 1, and 1 - l / L."""
    layer = jnp.asarray(ctx.layer, jnp.float32)
    return layer / max(ctx.depth - 1, 1), 1 - layer / ctx.depth


def channel_vector(module: nn.Module, name: str, value: Float[Array, " D"]) -> Float[Array, " D"]:
    """A parameter [D] of `module` that starts at `value`."""
    init = nn.with_logical_partitioning(lambda key: value, ("embed",))
    return module.param(name, init)


def previous(
    x: Float[Array, "B T D"], state: Float[Array, "B 1 D"] | None, ctx: Context
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """The input written before each token in its document, zero before the first, and the last.

    What RWKV's token shift sees (Peng et al. 2023, arXiv 2305.13048, Eq. 11); its state.
    """
    state = jnp.zeros_like(x[:, :1]) if state is None else state
    (before,), state = lags(x, state, ctx.reset, ctx.write)
    return before, state


def decay_parameters(low: float, half_life: float = 0.0) -> tuple[Callable, Callable]:
    """Initialisers of A_log and dt_bias in Mamba-2's style (Dao & Gu 2024, arXiv 2405.21060).

    A ~ U(low, 16), kept at 1e-4 or above so that its logarithm is finite; dt is log-uniform in
    [1e-3, 1e-1] and dt_bias its inverse softplus. half_life: if not 0, dt is 1e-2 and A such that
    a memory fades to a half in so many tokens: with a single head the draw decides what can be
    learned from (experiments/first_decay).
    """
    if half_life < 0:
        raise ValueError(f"half_life: tokens, or 0 for decays that are drawn; given {half_life}")
    middle = 1e-2

    def a_log(key, shape, dtype):
        if half_life:
            return jnp.full(shape, jnp.log(jnp.log(2.0) / (half_life * middle)), dtype)
        return jnp.log(jnp.maximum(jax.random.uniform(key, shape, dtype, low, 16.0), 1e-4))

    def dt_bias(key, shape, dtype):
        low, high = jnp.log(1e-3), jnp.log(1e-1)
        drawn = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), 1e-4)
        dt = jnp.full(shape, middle, dtype) if half_life else drawn
        return dt + jnp.log(-jnp.expm1(-dt))

    return a_log, dt_bias


class Gate(nn.Module):
    """W x + b for each head, in float32; b starts at `start`."""

    heads: int
    std: float = 0.02
    start: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        y = Dense((self.heads,), ("heads",), std=self.std, dtype=x.dtype, name="gate")(x)
        constant = nn.initializers.constant(self.start)
        init = nn.with_logical_partitioning(constant, ("heads",))
        return widen(y) + self.param("bias", init, (self.heads,), jnp.float32)


class LogDecay(nn.Module):
    """g = -exp(A_log) softplus(W x + dt_bias): log decays <= 0, in float32.

    One for each head; with `channels` one for each of its key channels, where A_log stays one per
    head and W has rank `rank`. low, half_life: see `decay_parameters`.
    """

    heads: int
    std: float = 0.02
    low: float = 0.0
    half_life: float = 0.0
    channels: int = 0
    rank: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H *K"]:
        shape: tuple[int, ...] = (self.heads,)
        axes: tuple[str, ...] = ("heads",)
        a_log_init, dt_bias_init = decay_parameters(self.low, self.half_life)
        a_log = self.param(
            "A_log", nn.with_logical_partitioning(a_log_init, axes), shape, jnp.float32
        )
        sizes = dict(std=self.std, dtype=x.dtype, name="dt")
        if self.channels:
            shape, axes = (*shape, self.channels), (*axes, "head_dim")
            a_log = a_log[:, None]
            dt = LowRank(shape, axes, rank=self.rank, **sizes)(x)
        else:
            dt = Dense(shape, axes, **sizes)(x)
        dt_bias = self.param(
            "dt_bias", nn.with_logical_partitioning(dt_bias_init, axes), shape, jnp.float32
        )
        return -jnp.exp(a_log) * jax.nn.softplus(widen(dt) + dt_bias)
