"""Gated linear attention: linear attention with a data-dependent decay per key channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,   g_t <= 0
    y_t = scale S_t^T q_t                                       scale = K^-1/2

Yang et al. 2023, arXiv 2312.06635, Eq. 3. Stable for g <= 0. With the same g in all channels it is
`simple_gla`.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory
from memjax.nn.layers import LowRank, widen
from memjax.nn.mixer import ProjectionMixer
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q, k: [B, T, h, K]; v: [B, T, h, V]; g: [B, T, h, K], log decay <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    g: Annotated[Array, Field("K", "log_decay")]


@dataclasses.dataclass(frozen=True)
class GLA(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        return jnp.exp(x.g)[:, None] * state + jnp.outer(x.k, x.v)


class GLAMixer(ProjectionMixer):
    """No convolution; g = log_sigmoid(W_2 W_1 x + b) / temper; output RMSNorm gated by SiLU.

    key_dim: None for half of dim / heads. rank: of W_2 W_1. temper: how much slower than a sigmoid
    the memory fades (Sec. 4.4 of the paper).
    """

    convolution: int = 0
    gate: str = "silu"
    rank: int = 16
    temper: float = 16.0

    def sizes(self):
        key, value = super().sizes()
        return self.key_dim or max(1, key // 2), value

    def make_cell(self):
        return GLA(*self.sizes())

    def setup(self):
        super().setup()
        shape, axes = (self.heads, self.sizes()[0]), ("heads", "head_dim")
        self.decay = LowRank(shape, axes, rank=self.rank, std=self.std, bias=True, dtype=self.dtype)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project(x, state, ctx)
        g = jax.nn.log_sigmoid(widen(self.decay(x))) / self.temper
        return Inputs(q, k, v, g), x, state


register(
    CellSpec(
        name="gla",
        cell=lambda: GLA(8, 6),
        mixer=GLAMixer,
        paper="Yang et al. 2023, arXiv 2312.06635",
        recurrence="S = diag(e^g) S + k vᵀ",
    )
)
