"""RG-LRU: the real-gated linear recurrent unit of Griffin, one number per channel.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * u_t),   a_t = e^(g_t), g_t <= 0
    y_t = h_t,   and h = i * u at the first token of a document

De et al. 2024, arXiv 2402.19427, Eq. 1-4. A memory is a block of channels; there is no query. The
slope of the root is held below 1000, as in the authors' code: it is infinite at a = 1, which a gate
reaches by rounding. Stable for any input: with independent inputs of variance 1 so is the state's.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform
from memjax.cell import MemoryCell
from memjax.nn.layers import Dense, ShortConvolution, normal, widen
from memjax.nn.mixer import Mixer, convolve
from memjax.recurrence import (
    accumulator_dtype,
    by_head,
    linear_scan,
    memories,
    passing,
    per_head,
    per_state,
    promote,
    select,
    written_tokens,
)
from memjax.registry import CellSpec, register
from memjax.typing import Array, Bool, Field, Float, Int


class Inputs(NamedTuple):
    """x: [B, T, h, V], i * u; g: [B, T, h, V], log decay <= 0."""

    x: Annotated[Array, Field("V", "value")]
    g: Annotated[Array, Field("V", "log_decay", plain=-0.05)]  # 0 would store nothing


class Level(NamedTuple):
    """h: [V]. begun: 1 when the document has a token, else 0; None in what is kept to be read."""

    h: Float[Array, " V"]
    begun: Any


@jax.custom_jvp
def bounded_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sqrt(x) with a slope of at most 1000."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _(primals, tangents):
    (x,), (change,) = primals, tangents
    return jnp.sqrt(x), change * 0.5 * lax.rsqrt(jnp.maximum(x, 1 / (4 * 1000**2)))


def share(g: Float[Array, "..."]) -> Float[Array, "..."]:
    """sqrt(1 - a^2) of the log decay g."""
    return bounded_sqrt(-jnp.expm1(2 * g))


def has_begun(
    start: Int[Array, "..."],
    written: Bool[Array, "..."],
    reset: Bool[Array, "..."] | None,
    axis: int = 0,
) -> tuple[Bool[Array, "..."], Bool[Array, "..."]]:
    """Whether the document has a written token in front of each token, and behind the last one;
    start: whether it has one in front of all. axis: that of time."""
    number = jnp.cumsum(written.astype(jnp.int32), axis) + start
    before = number - written
    origin = jnp.zeros_like(before)
    if reset is not None:
        origin = lax.cummax(jnp.where(reset, before, 0), axis)
    return before > origin, jnp.take(number > origin, -1, axis)


@dataclasses.dataclass(frozen=True)
class RGLRU(MemoryCell):
    """value_dim: V, the channels of one memory. chunk: tokens in a chunk of the chunked form, None
    for what `running` takes; changes speed only."""

    inputs = Inputs

    value_dim: int
    chunk: int | None = None

    def __post_init__(self):
        if self.value_dim < 1 or (self.chunk is not None and self.chunk < 1):
            raise ValueError(f"RGLRU: value_dim and chunk must be at least 1; given {self}")

    @property
    def linear(self) -> bool:
        """The answer is the state."""
        return True

    def readable(self, state):
        """h alone."""
        return Level(state.h, None)

    def init_state(self, params):
        """Zero, and no token."""
        return Level(jnp.zeros(self.value_dim, jnp.float32), jnp.zeros((), jnp.int32))

    def write(self, params, state, x):
        added = jnp.where(state.begun == 1, share(x.g), 1) * x.x
        return Level(jnp.exp(x.g) * state.h + added, jnp.ones_like(state.begun))

    def read(self, params, state, x):
        return state.h

    def one_head(self, params, state, xs, reset, write):
        """`linear_scan` of h -> a h + b."""
        dtype, output = accumulator_dtype(state, xs), xs.x.dtype
        xs, length = promote(xs, dtype), xs.x.shape[0]
        state = self.fresh(params, dtype) if state is None else state
        written = jnp.ones(length, bool) if write is None else write
        goes_on, ends = has_begun(state.begun, written, reset)
        xs = select(written, xs, jax.tree.map(jnp.zeros_like, xs))
        added = jnp.where(goes_on[:, None], share(xs.g), 1) * xs.x
        decay = jnp.exp(xs.g)
        if reset is not None:
            decay = jnp.where(reset[:, None], 0, decay)
        h = linear_scan(decay, added, state.h, self.chunk)
        return h.astype(output), Level(h[-1], ends.astype(jnp.int32))

    chunked = per_head(one_head)

    def pallas(self, params, state, xs, reset, write):
        """`pallas_kernels.linear_scan`, where a token that forgets has the weight 1: the first one
        of a document. A state without a token is taken for zero, which it is."""
        from pallas_kernels import linear_scan as kernel

        (batch, length), heads = xs.x.shape[:2], memories(params, state, xs)
        x, g, written = by_head((*xs, written_tokens(write, batch, length)), heads)
        start = jnp.zeros((batch, 1, 1), jnp.int32) if state is None else state.begun[:, None]
        first = None if reset is None else reset[..., None]
        goes_on, ends = has_begun(start, written, first, axis=1)
        forgets = written & ~goes_on
        forgets = forgets if first is None else forgets | first
        g = select(forgets, jnp.full_like(g, -jnp.inf), select(written, g, jnp.zeros_like(g)))
        x = select(written, x, jnp.zeros_like(x))
        h, last = kernel(
            *(a.reshape(batch, length, -1) for a in (x, g)),
            initial_state=None if state is None else state.h.reshape(batch, -1),
            weighted=True,
            platform=mesh_platform(),
        )
        final = Level(last.reshape(batch, heads, -1), ends.astype(jnp.int32))
        return h.reshape(x.shape), final

    @per_state
    def fold(self, params, state, xs, reset, write):
        """The decay over all tokens and what a document that has begun changes, beside the
        level."""
        dtype = accumulator_dtype(state, xs)
        fresh = self.fresh(params, dtype)
        begun = fresh._replace(begun=jnp.ones_like(fresh.begun))
        starts = fresh if state is None else state, fresh, begun
        starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        every = jax.vmap(lambda start: self.one_head(params, start, xs, reset, write)[1])(starts)
        new, empty, begun = (jax.tree.map(lambda a, i=i: a[i], every) for i in range(3))
        decay = jnp.exp(passing(promote(xs.g, dtype), reset, write))
        return (decay, jax.tree.map(jnp.subtract, begun, empty)), new

    def compose(self, later, earlier):
        """The state (h, begun) is affine in the one in front."""
        ((decay, change), new), ((before, old_change), old) = later, earlier

        def act(level):
            h = decay * level.h + level.begun * change.h
            return Level(h, level.begun * change.begun)

        state = jax.tree.map(jnp.add, act(old), new)
        return (decay * before, act(old_change)), state


class RGLRUMixer(Mixer):
    """Griffin's recurrent block: u = convolution(W_x x) + bias, out = W_o (h * gelu(W_y x)).

    r, i = sigmoid(W u + b), W block-diagonal with a block for each head, of standard deviation
    1 / sqrt(its size) at the start, whatever `std` says; g = -8 r softplus(Lambda), where Lambda
    starts so that a^(1/8) is spread over [0.9, 0.999] at r = 1 (the authors' code). width: channels
    of the recurrence, None for dim. heads: of width / heads channels. convolution: its width, 0 for
    none.
    """

    beside = ("gate",)

    heads: int = 4
    width: int | None = None
    convolution: int = 4

    @property
    def memories(self):
        return self.heads

    @property
    def size(self) -> int:
        """Channels of one head; ValueError when the width does not divide into heads."""
        width = self.width or self.dim
        if width % self.heads:
            raise ValueError(f"rg_lru: width {width} does not divide into {self.heads} heads")
        return width // self.heads

    def make_cell(self):
        return RGLRU(self.size)

    def setup(self):
        super().setup()
        shape, axes = (self.heads, self.size), ("heads", "head_dim")
        sizes = dict(std=self.std, dtype=self.dtype)
        self.value, self.gate = Dense(shape, axes, **sizes), Dense(shape, axes, **sizes)
        if self.convolution:
            self.short_convolution = ShortConvolution(
                self.convolution, None, bias=True, dtype=self.dtype
            )
        std = self.std * self.out_scale
        self.output = Dense((self.dim,), ("embed",), axes, std=std, dtype=self.dtype)

        def decay(key):
            square = jax.random.uniform(key, shape, jnp.float32, 0.9**2, 0.999**2)
            return jnp.log(square**-0.5 - 1)

        self.decay = self.param("Lambda", nn.with_logical_partitioning(decay, axes))
        block = nn.with_logical_partitioning(
            normal(self.size**-0.5), (None, "heads", None, "head_dim")
        )
        square = (2, *shape, self.size)
        self.blocks = self.param("blocks", block, square, jnp.float32)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, *axes))
        self.biases = self.param("biases", zeros, (2, *shape), jnp.float32)

    def inputs(self, x, state, ctx):
        u: Array = self.value(x)
        new: dict = {}
        if self.convolution:
            (u,), new = convolve(self.short_convolution, (u,), state, ctx)
        gates = jnp.einsum("bthv,rhvw->rbthw", u, self.blocks.astype(u.dtype))
        r, i = jax.nn.sigmoid(widen(gates) + self.biases[:, None, None])
        g = -8 * r * jax.nn.softplus(self.decay)
        return Inputs((i * widen(u)).astype(u.dtype), g), self.gate(x), new

    def outputs(self, y, kept):
        return self.output(y * jax.nn.gelu(kept))


register(
    CellSpec(
        name="rg_lru",
        cell=lambda: RGLRU(6),
        mixer=RGLRUMixer,
        paper="De et al. 2024, arXiv 2402.19427",
        recurrence="h = a h + √(1 − a²) x, per channel",
    )
)
