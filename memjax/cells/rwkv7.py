"""RWKV-7: the generalised delta rule with a decay and a learning rate for each channel.

    S_t = diag(w_t) S_{t-1} - (a_t * kappa_t) (kappa_t^T S_{t-1}) + k_t v_t^T,   0.545 < w_t < 1
    y_t = S_t^T r_t

Peng et al. 2025, arXiv 2503.14456, Eq. 14-22, with S [K, V] (the paper's is the transpose): `DPLR`
with a = -kappa and b = kappa * a_t. The removal key kappa has unit norm, the rate a_t is in (0, 1).
One transition is similar to the symmetric diag(w) - (sqrt(a) kappa)(sqrt(a) kappa)^T, so that its
eigenvalues are real and between min(w) - 1 and 1. Products of them are contractions when a is the
same in all channels; when it varies they may grow, the alternation of two tokens by 1.23 a pair.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cells.dplr import DPLR, Inputs
from memjax.nn.layers import (
    Dense,
    channel_vector,
    depth_fractions,
    orthogonal,
    previous,
    standardise,
    uniform,
    widen,
)
from memjax.nn.mixer import Mixer
from memjax.registry import CellSpec, ChannelSpec, register
from memjax.typing import DTypeLike

VALUE = "rwkv7_value"  # what the first layer publishes: its values
LOWEST = -math.exp(-0.5)  # of the log decays


class RWKV7Mixer(Mixer):
    """TimeMix of v7 with the authors' initialisation (their code, train_temp); out = W_o (y * g).

    y is the group norm of the answers plus the bonus (r . (k * r_k)) v; values are mixed with those
    of the model's first such layer. heads: of dim / heads channels each, 64 in the paper. ranks: of
    the low-rank maps that make w, a, the value mix and the gate; None for the paper's, which grow
    with the root of dim. std: of no weight.
    """

    beside = (
        *("receptance", "mix_r", "g_first", "g_second", "mix_g", "r_k"),
        *("norm_scale", "norm_bias"),
    )

    heads: int = 4
    ranks: tuple[int, int, int, int] | None = None

    @property
    def memories(self):
        return self.heads

    def make_cell(self):
        if self.dim % self.heads:
            raise ValueError(f"rwkv7: dim {self.dim} does not divide into {self.heads} heads")
        size = self.dim // self.heads
        return DPLR(size, size, scale=1.0, lowest=LOWEST)

    def published(self, batch, length, carried):
        shape = batch, length, self.heads, self.dim // self.heads
        return {VALUE: jax.ShapeDtypeStruct(shape, self.dtype)}

    def publish(self, kept, ctx):
        return ctx.replace(published={**ctx.published, VALUE: (jnp.ones((), bool), kept["first"])})

    def setup(self):
        super().setup()
        shape, axes = (self.heads, self.dim // self.heads), ("heads", "head_dim")
        bound = self.dim**-0.5
        self.receptance = Dense(shape, axes, initial=uniform(0.5 * bound), dtype=self.dtype)
        self.key = Dense(shape, axes, initial=uniform(0.05 * bound), dtype=self.dtype)
        self.value = Dense(shape, axes, initial=uniform(0.5 * bound), dtype=self.dtype)
        zeros = nn.initializers.zeros
        self.output = Dense((self.dim,), ("embed",), axes, initial=zeros, dtype=self.dtype)

    def _ranks(self) -> tuple[int, ...]:
        sizes = (factor * self.dim**0.5 for factor in (2.5, 2.5, 1.7, 5.0))
        return self.ranks or tuple(max(32, 32 * round(size / 32)) for size in sizes)

    @nn.compact
    def inputs(self, x, state, ctx):
        shape, axes = (self.heads, self.dim // self.heads), ("heads", "head_dim")
        down, up = depth_fractions(ctx)
        channel = jnp.arange(self.dim)
        place, line = channel / self.dim, channel / max(self.dim - 1, 1)
        half = max((shape[1] - 1) / 2, 0.5)
        wave = (channel % shape[1] - (shape[1] - 1) / 2) / half
        wave = wave * jnp.abs(wave)
        before, shift = previous(x, state.get("shift"), ctx)

        def mixed(name, power):
            mix = channel_vector(self, f"mix_{name}", 1 - place ** (power * up)).astype(x.dtype)
            return x + mix * (before - x)

        def vector(name, value):  # [H, K], float32
            return channel_vector(self, name, value).reshape(shape)

        def low_rank(name, x, rank, activation=lambda a: a):
            zeros, sizes = nn.initializers.zeros, dict(dtype=self.dtype)
            down = Dense((rank,), (None,), initial=zeros, name=f"{name}_first", **sizes)(x)
            wide = Dense(
                shape, axes, (None,), initial=orthogonal(0.1), name=f"{name}_second", **sizes
            )
            return wide(activation(down))

        ranks, flat = self._ranks(), jnp.full(self.dim, 1.0)
        r, k = self.receptance(mixed("r", 0.2)), self.key(mixed("k", 0.7))
        value = mixed("v", 0.7)
        v = self.value(value)
        start = -5.5 + 6 * line ** (1 + down**0.3) + 2.5 * wave
        omega = vector("w0", start) + widen(low_rank("w", mixed("w", 0.9), ranks[0], jnp.tanh))
        start = -0.19 + 0.3 * wave + 0.4 * (line - 0.5)
        rate = jax.nn.sigmoid(vector("a0", start) + widen(low_rank("a", mixed("a", 0.9), ranks[1])))
        start = 0.73 - 0.4 * (line - 0.5)
        share = jax.nn.sigmoid(vector("v0", start) + widen(low_rank("v", value, ranks[2])))
        known, first = ctx.published.get(VALUE, (False, v))
        first = jnp.where(known, first, v)  # of this layer when it is the first
        v = v + (first - v) * share.astype(v.dtype)
        gate = low_rank("g", mixed("g", 0.2), ranks[3], jax.nn.sigmoid)
        removed = widen(k) * vector("k_k", 0.71 - 0.1 * (line - 0.5))
        length = jnp.maximum(jnp.sum(jnp.square(removed), axis=-1, keepdims=True), 1e-24)
        removed = removed * jax.lax.rsqrt(length)
        k = widen(k) * (1 + (rate - 1) * vector("k_a", 1.02 * flat))
        bonus = jnp.sum(widen(r) * k * vector("r_k", -0.04 * flat), axis=-1, keepdims=True)
        depth = (jnp.asarray(ctx.layer, jnp.float32) + 1) / ctx.depth
        kept = {
            "first": first,
            "gate": gate,
            "bonus": (bonus * v).astype(v.dtype),
            "scale": vector("norm_scale", flat * depth**0.7),
            "bias": vector("norm_bias", 0 * flat),
        }
        decay = LOWEST * jax.nn.sigmoid(omega)
        k, read, erased = (x.astype(v.dtype) for x in (k, -removed, rate * removed))
        return Inputs(r, k, v, read, erased, decay), kept, {"shift": shift}

    def outputs(self, y, kept):
        y = standardise(y, True, 64e-5) * kept["scale"] + kept["bias"]
        return self.output((y.astype(self.dtype) + kept["bonus"]) * kept["gate"])


class RWKV7ChannelMix(nn.Module):
    """W_v relu(W_k x_k)^2 with x_k mixed with the input before it; state: that one.

    Peng et al. 2025, arXiv 2503.14456, Eq. 23; the paper's hidden width is 4 dim.
    """

    dim: int
    hidden: int
    std: float = 0.02
    out_scale: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, state, ctx):
        before, state = previous(x, state, ctx)
        place, up = jnp.arange(self.dim) / self.dim, depth_fractions(ctx)[1]
        mix = channel_vector(self, "mix_k", 1 - place ** (up**4)).astype(x.dtype)
        sizes = dict(dtype=self.dtype)
        key = Dense(
            (self.hidden,), ("mlp",), initial=uniform(0.5 * self.dim**-0.5), name="key", **sizes
        )
        zeros = nn.initializers.zeros
        value = Dense((self.dim,), ("embed",), ("mlp",), initial=zeros, name="value", **sizes)
        return value(jnp.square(jax.nn.relu(key(x + mix * (before - x))))), state, ctx


register(
    CellSpec(
        name="rwkv7",
        cell=lambda: DPLR(8, 6, scale=1.0, lowest=LOWEST),
        mixer=RWKV7Mixer,
        paper="Peng et al. 2025, arXiv 2503.14456",
        recurrence="S = diag(w) S − (a κ)(κᵀS) + k vᵀ, rates a per channel: dplr in RWKV-7's layer",
    )
)
register(
    ChannelSpec(
        name="rwkv7_channel", mixer=RWKV7ChannelMix, paper="Peng et al. 2025, arXiv 2503.14456"
    )
)
