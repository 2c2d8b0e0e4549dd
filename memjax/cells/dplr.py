"""The generalised delta rule: a transition that is diagonal plus low rank.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,   g_t <= 0
    y_t = scale S_t^T q_t                                       scale = K^-1/2

The core of RWKV-7 (Peng et al. 2025, arXiv 2503.14456, Eq. 1, with a = -kappa and b = kappa times
a rate per channel). a reads the state before it decays. KDA is a = -exp(g) k, b = beta k with
values beta v. The transition need not be a contraction; it is one for g = 0 and b = -r a, ||a|| =
1, with the same r in [0, 2] in all channels.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory
from memjax.nn.layers import Dense, LogDecay
from memjax.nn.mixer import ProjectionMixer
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q, k, a, b: [B, T, h, K]; v: [B, T, h, V]; g: [B, T, h, K], log decay <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    a: Annotated[Array, Field("K", "key")]
    b: Annotated[Array, Field("K", "multiple", -1.0, 0.0, of="a")]
    g: Annotated[Array, Field("K", "log_decay")]


@dataclasses.dataclass(frozen=True)
class DPLR(MatrixMemory):
    """State S [K, V].

    lowest: what no log decay is below, by which the kernel takes fewer products, and without which
    there is none for GPUs; None for any.
    """

    inputs = Inputs
    lowest: float | None = None

    def write(self, params, state, x):
        erased = dot("k,kv->v", x.a, state)
        state = jnp.exp(x.g)[:, None] * state
        return state + jnp.outer(x.b, erased) + jnp.outer(x.k, x.v)

    def kernel(self, terms, given):
        """`chunk_dplr`."""
        from pallas_kernels import chunk_dplr

        q, k, v, g, _, _, a, b = terms
        return chunk_dplr(q, k, v, a, b, g, lowest=self.lowest, **given)


class DPLRMixer(ProjectionMixer):
    """a = -k, b = k times a rate sigmoid(W x) per channel, decays per channel as KDA's.

    All of it is our choice, after RWKV-7: the rule has no parametrisation of its own.
    """

    def make_cell(self):
        return DPLR(*self.sizes())

    def setup(self):
        super().setup()
        key, value = self.sizes()
        axes = ("heads", "head_dim")
        self.rate = Dense((self.heads, key), axes, std=self.std, dtype=self.dtype)
        self.log_decay = LogDecay(self.heads, self.std, low=1.0, channels=key, rank=value)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        rate = jax.nn.sigmoid(self.rate(x))
        return Inputs(q, k, v, -k, rate * k, self.log_decay(x)), x, state


register(
    CellSpec(
        name="dplr",
        cell=lambda: DPLR(8, 6),
        mixer=DPLRMixer,
        paper="Peng et al. 2025, arXiv 2503.14456",
        recurrence="S = diag(e^g) S + b (Sᵀa)ᵀ + k vᵀ, the core of RWKV-7",
        choice="its parametrisation, after RWKV-7",
    )
)
