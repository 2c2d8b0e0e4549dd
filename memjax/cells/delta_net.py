"""DeltaNet: each write first removes what its key already reads (the delta rule).

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
    y_t = scale S_t^T q_t                                       scale = K^-1/2

Schlag et al. 2021, arXiv 2102.11174; in parallel over the sequence: Yang et al. 2024,
arXiv 2406.06484. A contraction for ||k|| = 1 and beta in [0, 2]; beta > 1 gives the negative
eigenvalues that state tracking needs (Grazzi et al. 2024, arXiv 2411.12537). Keys that are not
normalised diverge once beta ||k||^2 > 2.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory
from memjax.nn.layers import Dense, widen
from memjax.nn.mixer import ProjectionMixer
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q, k: [B, T, h, K], k of unit norm; v: [B, T, h, V]; beta: [B, T, h] in [0, 2]."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate", 0.0, 2.0)]


@dataclasses.dataclass(frozen=True)
class DeltaNet(MatrixMemory):
    """State S [K, V]."""

    inputs = Inputs

    def write(self, params, state, x):
        error = x.v - dot("k,kv->v", x.k, state)
        return state + jnp.outer(x.beta * x.k, error)


class DeltaNetMixer(ProjectionMixer):
    """q, k of unit norm; beta = beta_max sigmoid(W x) per head, in float32.

    beta_max: 1, or 2 to allow negative eigenvalues.
    """

    beta_max: float = 1.0

    def make_cell(self):
        return DeltaNet(*self.sizes())

    def strengths(self) -> tuple[int, ...]:
        """The axes of beta of one token."""
        return (self.memories,)

    def setup(self):
        super().setup()
        if not 0 < self.beta_max <= 2:
            raise ValueError(f"beta_max must lie in (0, 2]; given {self.beta_max}")
        shape = self.strengths()
        axes = ("heads", *(None,) * (len(shape) - 1))
        self.write_strength = Dense(shape, axes, std=self.std, dtype=self.dtype)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        beta = self.beta_max * jax.nn.sigmoid(widen(self.write_strength(x)))
        return Inputs(q, k, v, beta), x, state


register(
    CellSpec(
        name="delta_net",
        cell=lambda: DeltaNet(8, 6),
        mixer=DeltaNetMixer,
        paper="Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484",
        recurrence="S += β k (v − Sᵀk)ᵀ, β up to 2",
    )
)
