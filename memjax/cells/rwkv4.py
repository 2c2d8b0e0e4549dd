"""RWKV-4: per channel, an average of the past values whose weights e^k fade with the distance.

    wkv_t = (sum_{i<t} e^(k_i + w_{i+1} + ... + w_{t-1}) v_i + e^(u_t + k_t) v_t)
            / (the same sums without v),                            w <= 0

Peng et al. 2023, arXiv 2305.13048, Eq. 14, where w and u are constants of a channel; the cell takes
them as inputs, and its answer for a token that is not written leaves that token's own term out. The
newest past token is not decayed. A memory is a block of channels. State (p, q, o): numerator and
denominator times e^-o, so that no exponent is above 0. Stable for any k and u: the answer lies
between the smallest and the largest value.
"""

import dataclasses
import functools
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform
from memjax.cell import MemoryCell
from memjax.nn.layers import (
    Dense,
    channel_vector,
    depth_fractions,
    orthogonal,
    previous,
    widen,
)
from memjax.nn.mixer import Mixer
from memjax.recurrence import (
    accumulator_dtype,
    by_head,
    linear_scan,
    memories,
    passing,
    per_head,
    per_state,
    promote,
    reverse_scan,
    running,
    select,
    shifted,
    written_tokens,
)
from memjax.registry import CellSpec, ChannelSpec, register
from memjax.typing import Array, Bool, DTypeLike, Field, Float, PyTree

EMPTY = -(2.0**126)  # the exponent of nothing, exact in all types; -inf - (-inf) would be NaN


class Inputs(NamedTuple):
    """v, k: [B, T, h, V]; w: [B, T, h, V], log decay <= 0; u: [B, T, h, V], the bonus."""

    v: Annotated[Array, Field("V", "value")]
    k: Annotated[Array, Field("V", "exponent")]
    w: Annotated[Array, Field("V", "log_decay")]
    u: Annotated[Array, Field("V", "bonus")]


class Sums(NamedTuple):
    """p, q, o: [V], with e^o p the sum of e^k v and e^o q that of e^k, both decayed to now."""

    p: Float[Array, " V"]
    q: Float[Array, " V"]
    o: Float[Array, " V"]


def add(a: Sums, b: Sums) -> Sums:
    """The sums of both."""
    o = jnp.maximum(a.o, b.o)
    left, right = jnp.exp(a.o - o), jnp.exp(b.o - o)
    return Sums(left * a.p + right * b.p, left * a.q + right * b.q, o)


def fade(sums: Sums, w: Float[Array, " V"]) -> Sums:
    """The sums, times e^w."""
    return sums._replace(o=jnp.maximum(sums.o + w, EMPTY))


def average(sums: Sums) -> Float[Array, " V"]:
    """p / q, zero where nothing was summed."""
    return sums.p / jnp.where(sums.q == 0, 1, sums.q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def exponents(
    w: Float[Array, "T V"],
    k: Float[Array, "T V"],
    first: Float[Array, " V"],
    written: Bool[Array, " T"],
    size: int | None,
) -> Float[Array, "T V"]:
    """o_t = max(o_{t-1} + w_t, k_t, EMPTY), w_t = -inf where a document begins. A token that is
    not written has w_t = 0 (or -inf) and k_t = EMPTY. size: as in `running`."""

    def join(earlier, later):
        return earlier[0] + later[0], jnp.maximum(earlier[1] + later[0], later[1])

    def step(o, element):
        return jnp.maximum(jnp.maximum(o + element[0], EMPTY), element[1])

    return running(join, step, first, (w, k), size)


def _exponents_forward(w, k, first, written, size):
    o = exponents(w, k, first, written, size)
    faded = shifted(first, o) + w
    stays = jnp.where(faded == k, 0.5, (faded > k) & (faded > EMPTY))  # `maximum` halves at ties
    return o, jnp.where(written[:, None], stays, w == 0).astype(o.dtype)


def _exponents_backward(size, stays, slope):
    moved = reverse_scan(stays, slope, size)
    return stays * moved, (1 - stays) * moved, stays[0] * moved[0], None


exponents.defvjp(_exponents_forward, _exponents_backward)


@dataclasses.dataclass(frozen=True)
class RWKV4(MemoryCell):
    """value_dim: V, the channels of one memory. chunk: tokens in a chunk of the chunked form, None
    for what `running` takes; changes speed only."""

    inputs = Inputs

    value_dim: int
    chunk: int | None = None

    def __post_init__(self):
        if self.value_dim < 1 or (self.chunk is not None and self.chunk < 1):
            raise ValueError(f"RWKV4: value_dim and chunk must be at least 1; given {self}")

    def init_state(self, params: PyTree) -> Sums:
        """Nothing."""
        zero = jnp.zeros(self.value_dim, jnp.float32)
        return Sums(zero, zero, jnp.full(self.value_dim, EMPTY, jnp.float32))

    def write(self, params, state, x):
        return add(fade(state, x.w), Sums(x.v, jnp.ones_like(x.v), x.k))

    def read(self, params, state, x):
        return average(state)

    def step(self, params, state, x):
        y = average(add(state, Sums(x.v, jnp.ones_like(x.v), x.u + x.k)))
        return y, self.write(params, state, x)

    def one_head(self, params, state, xs, reset, write):
        """First the exponents o of all tokens, then p and q as linear recurrences with decays
        e^(w_t + o_{t-1} - o_t). Answers do not depend on o, which therefore needs a slope in the
        final state only."""
        dtype, length = accumulator_dtype(state, xs), xs.v.shape[0]
        output, fresh, xs = xs.v.dtype, self.fresh(params, dtype), promote(xs, dtype)
        state = fresh if state is None else state
        written = jnp.ones(length, bool) if write is None else write
        w, k = jnp.where(written[:, None], xs.w, 0), jnp.where(written[:, None], xs.k, EMPTY)
        fading = w if reset is None else jnp.where(reset[:, None], -jnp.inf, w)
        exact = exponents(fading, k, state.o, written, self.chunk)
        o = lax.stop_gradient(exact)
        before = shifted(state.o, o)
        decay, weight = jnp.exp(fading + before - o), jnp.exp(k - o)
        weight = jnp.where(written[:, None], weight, 0)
        p = linear_scan(decay, weight * jnp.where(written[:, None], xs.v, 0), state.p, self.chunk)
        q = linear_scan(decay, weight, state.q, self.chunk)
        past = Sums(shifted(state.p, p), shifted(state.q, q), before)
        if reset is not None:
            past = select(reset, jax.tree.map(lambda a: a[None], fresh), past)
        bonus = xs.u + xs.k
        scale = lax.stop_gradient(jnp.maximum(past.o, bonus))  # of both sums, needs no slope either
        old, new = jnp.exp(past.o - scale), jnp.exp(bonus - scale)
        y = (old * past.p + new * xs.v) / (old * past.q + new)
        if write is not None:
            y = select(written, y, average(past))
        factor = jnp.exp(o[-1] - exact[-1])  # 1, and the slope that p and q have through o
        return y.astype(output), Sums(factor * p[-1], factor * q[-1], exact[-1])

    chunked = per_head(one_head)

    def pallas(self, params, state, xs, reset, write):
        """`pallas_kernels.wkv4`, for which a token with the exponent EMPTY is not written."""
        from pallas_kernels import wkv4

        (batch, length), heads = xs.v.shape[:2], memories(params, state, xs)
        *xs, written = by_head((*xs, written_tokens(write, batch, length)), heads)
        nothing = [jnp.full_like(a, n) for a, n in zip(xs, (0, EMPTY, 0, 0), strict=True)]
        v, k, w, u = select(written, xs, nothing)
        y, final = wkv4(
            *(a.reshape(batch, length, -1) for a in (v, k, jnp.maximum(w, EMPTY), u)),
            initial_state=None if state is None else [a.reshape(batch, -1) for a in state],
            reset=reset,
            platform=mesh_platform(),
        )
        return y.reshape(v.shape), Sums(*(a.reshape(batch, heads, -1) for a in final))

    @per_state
    def fold(self, params, state, xs, reset, write):
        """The log decay over all tokens, beside the sums."""
        w = promote(xs.w, accumulator_dtype(state, xs))
        return passing(w, reset, write), self.one_head(params, state, xs, reset, write)[1]

    def compose(self, later, earlier):
        """Log decays added, sums faded and added; nothing of what is in front of a document, which
        `fade` would leave with the exponent EMPTY."""
        (through, new), (before, old) = later, earlier
        old = jax.tree.map(lambda a: jnp.where(through == -jnp.inf, 0.0, a), old)
        return through + before, add(fade(old, through), new)


class RWKV4Mixer(Mixer):
    """TimeMix: k, v, r = W (x mixed with the input before it), out = W_o (sigmoid(r) wkv).

    The weights of keys, receptances and output start at zero, those of values orthogonal, decays,
    bonus and mixing weights by channel and layer (the authors' code, v4). heads: blocks of
    channels, which change nothing. std: of no weight.
    """

    beside = ("receptance", "mix_r")

    heads: int = 4

    @property
    def memories(self):
        return self.heads

    def make_cell(self):
        if self.dim % self.heads:
            raise ValueError(f"rwkv4: dim {self.dim} does not divide into {self.heads} heads")
        return RWKV4(self.dim // self.heads)

    def setup(self):
        super().setup()
        zeros, sizes = nn.initializers.zeros, dict(dtype=self.dtype)
        shape, axes = (self.heads, self.dim // self.heads), ("heads", "head_dim")
        self.key = Dense(shape, axes, initial=zeros, **sizes)
        self.receptance = Dense(shape, axes, initial=zeros, **sizes)
        self.value = Dense(shape, axes, initial=orthogonal(1.0), **sizes)
        self.output = Dense((self.dim,), ("embed",), axes, initial=zeros, **sizes)

    @nn.compact
    def inputs(self, x, state, ctx):
        before, shift = previous(x, state.get("shift"), ctx)
        down, up = depth_fractions(ctx)
        place = jnp.arange(self.dim) / self.dim
        initial = {"k": place**up, "v": place**up + 0.3 * down, "r": place ** (0.5 * up)}
        mixed = {}
        for name, start in initial.items():
            mix = channel_vector(self, f"mix_{name}", start).astype(x.dtype)
            mixed[name] = mix * x + (1 - mix) * before
        place = jnp.arange(self.dim) / max(self.dim - 1, 1)
        decay = channel_vector(self, "time_decay", -5 + 8 * place ** (0.7 + 1.3 * down))
        zigzag = 0.5 * ((jnp.arange(self.dim) + 1) % 3 - 1)
        bonus = channel_vector(self, "time_first", jnp.log(0.3) + zigzag)
        k, v = widen(self.key(mixed["k"])), self.value(mixed["v"])
        w, u = (jnp.broadcast_to(a.reshape(k.shape[2:]), k.shape) for a in (-jnp.exp(decay), bonus))
        return Inputs(v, k, w, u), self.receptance(mixed["r"]), {"shift": shift}

    def outputs(self, y, kept):
        return self.output(jax.nn.sigmoid(kept) * y.astype(kept.dtype))


class RWKV4ChannelMix(nn.Module):
    """sigmoid(W_r x_r) W_v relu(W_k x_k)^2, each x mixed with the input before it; state: that one.

    Peng et al. 2023, arXiv 2305.13048, Eq. 16-18; the paper's hidden width is 4 dim.
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

        def mixed(name):
            mix = channel_vector(self, f"mix_{name}", place**up).astype(x.dtype)
            return mix * x + (1 - mix) * before

        zeros, dtype = nn.initializers.zeros, self.dtype
        tall = orthogonal(max(1.0, (self.hidden / self.dim) ** 0.5))
        key = Dense((self.hidden,), ("mlp",), initial=tall, dtype=dtype, name="key")
        value = Dense((self.dim,), ("embed",), ("mlp",), initial=zeros, dtype=dtype, name="value")
        receptance = Dense((self.dim,), (None,), initial=zeros, dtype=dtype, name="receptance")
        hidden = jnp.square(jax.nn.relu(key(mixed("k"))))
        return jax.nn.sigmoid(receptance(mixed("r"))) * value(hidden), state, ctx


register(
    CellSpec(
        name="rwkv4",
        cell=lambda: RWKV4(6),
        mixer=RWKV4Mixer,
        paper="Peng et al. 2023, arXiv 2305.13048",
        recurrence="per channel, the average of past values by weights e^k that fade by e^w",
    )
)
register(
    ChannelSpec(
        name="rwkv4_channel", mixer=RWKV4ChannelMix, paper="Peng et al. 2023, arXiv 2305.13048"
    )
)
