"""Simple gated linear attention: linear attention with one data-dependent decay per head.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,   g_t <= 0
    y_t = scale S_t^T q_t                                       scale = K^-1/2

The core of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, Eq. 6, with k = B, q = C, v = dt x,
g = dt A, scale = 1) and of Lightning attention; RetNet with a constant g. Stable for g <= 0.
The mixer's decay is Mamba-2's; unit-norm q and k are our choice.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory
from memjax.nn.layers import LogDecay
from memjax.nn.mixer import ProjectionMixer
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q, k: [B, T, h, K]; v: [B, T, h, V]; g: [B, T, h], log decay <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    g: Annotated[Array, Field("", "log_decay")]


@dataclasses.dataclass(frozen=True)
class SimpleGLA(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        return jnp.exp(x.g) * state + jnp.outer(x.k, x.v)


class SimpleGLAMixer(ProjectionMixer):
    """Unit-norm queries and keys, Mamba-2's decay, output RMSNorm gated by SiLU.

    half_life: tokens, of every memory before training; 0: drawn.
    """

    gate: str = "silu"
    half_life: float = 0.0

    def make_cell(self):
        return SimpleGLA(*self.sizes())

    def setup(self):
        super().setup()
        self.log_decay = LogDecay(self.memories, self.std, 1.0, self.half_life)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        return Inputs(q, k, v, self.log_decay(x)), x, state


register(
    CellSpec(
        name="simple_gla",
        cell=lambda: SimpleGLA(8, 6),
        mixer=SimpleGLAMixer,
        paper="Dao & Gu 2024, arXiv 2405.21060; Yang et al. 2023, arXiv 2312.06635",
        recurrence="S = e^g S + k vᵀ, the core of Mamba-2",
        choice="unit-norm q and k",
    )
)
