"""Mamba-2: a state-space layer whose core is simple gated linear attention.

    h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t)^T,   A < 0, dt_t > 0
    y_t = h_t^T C_t + D x_t

Dao & Gu 2024, arXiv 2405.21060, Sec. 7. The cell is `SimpleGLA` with k = B, q = C, v = dt x,
g = dt A and scale 1; D x is added by the mixer. B and C are shared by the heads of a group.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cells.simple_gla import Inputs, SimpleGLA
from memjax.nn.layers import Dense, Norm, ShortConvolution, decay_parameters, widen
from memjax.nn.mixer import Mixer, convolve
from memjax.registry import CellSpec, register


class Mamba2Mixer(Mixer):
    """[z, x B C, dt] = W u; x B C = SiLU(convolution + bias); W_o RMSNorm(y SiLU(z)).

    heads: of x, each expand dim / heads wide (P). groups: a divisor of heads, each with a B and a
    C of state_dim channels (N). convolution: width of the short convolution, 0 for a
    SiLU alone. A ~ U(1, 16), D = 1. half_life: tokens, of every head before training; 0: drawn.
    """

    beside = ("gate", "D")

    heads: int = 4
    expand: int = 2
    groups: int = 1
    state_dim: int = 128
    convolution: int = 4
    half_life: float = 0.0

    @property
    def memories(self):
        return self.heads

    @property
    def width(self) -> int:
        """P; ValueError when expand dim does not divide into heads."""
        if self.expand * self.dim % self.heads or self.heads % self.groups:
            raise ValueError(
                f"mamba2: heads {self.heads} must divide expand dim = {self.expand * self.dim} "
                f"and be a multiple of groups {self.groups}"
            )
        return self.expand * self.dim // self.heads

    def make_cell(self):
        return SimpleGLA(self.state_dim, self.width, scale=1.0)

    def setup(self):
        super().setup()
        axes, sizes = ("heads", "head_dim"), dict(std=self.std, dtype=self.dtype)
        inner, shared = (self.heads, self.width), (self.groups, self.state_dim)
        self.values, self.gate = Dense(inner, axes, **sizes), Dense(inner, axes, **sizes)
        self.key = Dense(shared, (None, "state"), **sizes)
        self.query = Dense(shared, (None, "state"), **sizes)
        self.step = Dense((self.heads,), ("heads",), **sizes)
        if self.convolution:
            self.short_convolution = ShortConvolution(self.convolution, bias=True, dtype=self.dtype)
        self.output_norm = Norm("rms", (None, "head_dim"))
        self.output = Dense(
            (self.dim,), ("embed",), axes, std=self.std * self.out_scale, dtype=self.dtype
        )

        def head(name, init):
            init = nn.with_logical_partitioning(init, ("heads",))
            return self.param(name, init, (self.heads,), jnp.float32)

        a_log, dt_bias = decay_parameters(1.0, self.half_life)
        self.a_log, self.dt_bias = head("A_log", a_log), head("dt_bias", dt_bias)
        self.skip = head("D", nn.initializers.ones)

    def inputs(self, x, state, ctx):
        projected = self.values(x), self.key(x), self.query(x)
        if self.convolution:
            (values, k, q), new = convolve(self.short_convolution, projected, state, ctx)
        else:
            (values, k, q), new = (jax.nn.silu(a) for a in projected), {}
        dt = jax.nn.softplus(widen(self.step(x)) + self.dt_bias)
        v = (dt[..., None] * values).astype(values.dtype)
        xs = Inputs(q, k, v, -jnp.exp(self.a_log) * dt)
        return xs, (values, self.gate(x)), new

    def readout(self, y, kept):
        """With the skip D x."""
        return y + self.skip[:, None].astype(y.dtype) * kept[0]

    def outputs(self, y, kept):
        y = self.readout(y, kept) * jax.nn.silu(kept[1])
        grouped = y.reshape(*y.shape[:2], self.groups, -1)  # the norm is over a group's channels
        return self.output(self.output_norm(grouped).reshape(y.shape))


register(
    CellSpec(
        name="mamba2",
        cell=lambda: SimpleGLA(8, 6, scale=1.0),
        mixer=Mamba2Mixer,
        paper="Dao & Gu 2024, arXiv 2405.21060",
        recurrence="simple_gla in Mamba-2's layer",
    )
)
