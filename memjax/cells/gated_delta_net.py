"""Gated DeltaNet: the delta rule on a memory that first decays by one scalar per head.

    P_t = exp(g_t) S_{t-1},   g_t <= 0
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    y_t = scale S_t^T q_t                                       scale = K^-1/2

Yang et al. 2024, arXiv 2412.06464, Eq. 10. The error is measured against the decayed state.
g = 0 is DeltaNet. A contraction for ||k|| = 1, beta in [0, 2], g <= 0.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory
from memjax.cells.delta_net import DeltaNetMixer
from memjax.nn.layers import LogDecay
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """As DeltaNet's, and g: [B, T, h], log decay <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate", 0.0, 2.0)]
    g: Annotated[Array, Field("", "log_decay")]


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        state = jnp.exp(x.g) * state
        error = x.v - dot("k,kv->v", x.k, state)
        return state + jnp.outer(x.beta * x.k, error)


class GatedDeltaNetMixer(DeltaNetMixer):
    """DeltaNet's mixer with Mamba-2's decay and an output RMSNorm gated by SiLU.

    half_life: tokens, of every memory before training; 0: drawn.
    """

    gate: str = "silu"
    half_life: float = 0.0

    def make_cell(self):
        return GatedDeltaNet(*self.sizes())

    def setup(self):
        super().setup()
        self.log_decay = LogDecay(self.memories, self.std, 0.0, self.half_life)

    def inputs(self, x, state, ctx):
        xs, kept, state = super().inputs(x, state, ctx)
        return Inputs(**xs._asdict(), g=self.log_decay(x)), kept, state


register(
    CellSpec(
        name="gated_delta_net",
        cell=lambda: GatedDeltaNet(8, 6),
        mixer=GatedDeltaNetMixer,
        paper="Yang et al. 2024, arXiv 2412.06464",
        recurrence="S = e^g S, then the delta rule",
    )
)
