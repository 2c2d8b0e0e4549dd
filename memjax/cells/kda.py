"""Kimi Delta Attention: Gated DeltaNet with a decay per key channel.

    P_t = diag(exp(g_t)) S_{t-1},   g_t <= 0
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T
    y_t = scale S_t^T q_t                                       scale = K^-1/2

Kimi Team 2025, arXiv 2510.26692, Eq. 1. The error is measured against the decayed state. With the
same g in all channels it is Gated DeltaNet. A contraction for ||k|| = 1, beta in [0, 2], g <= 0.
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
    """q, k: [B, T, h, K], k of unit norm; v: [B, T, h, V]; beta: [B, T, h] in [0, 2];
    g: [B, T, h, K], log decay <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate", 0.0, 2.0)]
    g: Annotated[Array, Field("K", "log_decay")]


@dataclasses.dataclass(frozen=True)
class KDA(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        state = jnp.exp(x.g)[:, None] * state
        error = x.v - dot("k,kv->v", x.k, state)
        return state + jnp.outer(x.beta * x.k, error)


class KDAMixer(DeltaNetMixer):
    """DeltaNet's mixer with a decay per channel, W of rank V, and an output RMSNorm gated by a
    sigmoid of rank V. half_life: tokens, of every channel before training; 0: drawn."""

    gate: str = "sigmoid"
    gate_rank: str = "value"
    half_life: float = 0.0

    def make_cell(self):
        return KDA(*self.sizes())

    def setup(self):
        super().setup()
        key, value = self.sizes()
        self.log_decay = LogDecay(
            self.memories, self.std, 1.0, self.half_life, channels=key, rank=value
        )

    def inputs(self, x, state, ctx):
        xs, kept, state = super().inputs(x, state, ctx)
        return Inputs(**xs._asdict(), g=self.log_decay(x)), kept, state


register(
    CellSpec(
        name="kda",
        cell=lambda: KDA(8, 6),
        mixer=KDAMixer,
        paper="Kimi Team 2025, arXiv 2510.26692",
        recurrence="S = diag(e^g) S, then the delta rule",
    )
)
