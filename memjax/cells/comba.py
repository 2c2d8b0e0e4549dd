"""Comba: a delta rule whose error is read with a weaker key, and whose query is corrected by it.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T,   g_t <= 0
    y_t = scale S_t^T q_t                                       scale = K^-1/2

Hu et al. 2025, arXiv 2506.02475. p reads the state before it decays, as in the authors' kernels;
their sequential reference lets it decay first, which is p = exp(g) p here. The mixer forms
p = sigmoid(b_h) k and hands in q - D_h p as q, from unit-norm q and k without a second norm, so
that b_h keeps its meaning; the sources leave that open. Gated DeltaNet is p = exp(g) k, D = 0.
Along a key of unit norm the transition is exp(g) - beta p.k: stable for p.k and beta in [0, 1].
"""

import dataclasses
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory
from memjax.cells.gated_delta_net import GatedDeltaNetMixer
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q, k, p: [B, T, h, K]; v: [B, T, h, V]; beta: [B, T, h] in [0, 1]; g: [B, T, h], log decay
    <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate")]
    g: Annotated[Array, Field("", "log_decay")]
    p: Annotated[Array, Field("K", "multiple", of="k")]


@dataclasses.dataclass(frozen=True)
class Comba(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        error = x.v - dot("k,kv->v", x.p, state)
        return jnp.exp(x.g) * state + jnp.outer(x.beta * x.k, error)


class CombaMixer(GatedDeltaNetMixer):
    """Gated DeltaNet's mixer with the feedback b_h and the correction D_h, both 1 at the start, and
    an output RMSNorm gated by a sigmoid."""

    gate: str = "sigmoid"

    def make_cell(self):
        return Comba(*self.sizes())

    def setup(self):
        super().setup()
        if self.beta_max > 1:
            raise ValueError(f"comba: beta_max must lie in (0, 1]; given {self.beta_max}")
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("heads",))
        self.feedback = self.param("feedback", ones, (self.heads,), jnp.float32)
        self.correction = self.param("correction", ones, (self.heads,), jnp.float32)

    def inputs(self, x, state, ctx):
        xs, kept, state = super().inputs(x, state, ctx)
        p = (jax.nn.sigmoid(self.feedback)[:, None] * xs.k).astype(xs.k.dtype)
        q = (xs.q - self.correction[:, None] * p).astype(xs.q.dtype)
        return Inputs(q, xs.k, xs.v, xs.beta, xs.g, p), kept, state


register(
    CellSpec(
        name="comba",
        cell=lambda: Comba(8, 6),
        mixer=CombaMixer,
        paper="Hu et al. 2025, arXiv 2506.02475",
        recurrence="S = e^g S + β k (v − Sᵀp)ᵀ, p = σ(b) k",
    )
)
