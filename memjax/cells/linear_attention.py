"""Linear attention: an additive key-value memory.

    S_t = S_{t-1} + phi(k_t) v_t^T
    y_t = scale S_t^T phi(q_t)                                  scale = K^-1/2
    y_t = S_t^T phi(q_t) / (phi(q_t) . z_t + 1e-10), z_t = z_{t-1} + phi(k_t)      normalised

Katharopoulos et al. 2020, arXiv 2006.16236, Eq. 16-18. It is stable for any input, and its state
grows with the number of tokens. The feature map must be positive for the normalised form.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory, Terms
from memjax.nn.layers import l2_normalise
from memjax.nn.mixer import ProjectionMixer
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field, Float


def taylor(x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(K); F = 1 + K + K^2.

    The second-order Taylor map of exp (Arora et al. 2024, arXiv 2402.18668, Based).
    """
    size = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], size * size)
    parts = jnp.ones_like(x[..., :1]), x * size**-0.25, square * (2 * size) ** -0.5
    return jnp.concatenate(parts, axis=-1)


FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1,
    "silu_l2": lambda x: l2_normalise(jax.nn.silu(x)),
    "taylor": taylor,
}


class Inputs(NamedTuple):
    """q, k: [B, T, h, K]; v: [B, T, h, V]."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]


@dataclasses.dataclass(frozen=True)
class LinearAttention(MatrixMemory):
    """State S [F, V], F features of K; with `normalise` [F, V + 1], the last column being z.

    feature_map: phi, "identity", "elu_plus_one", "silu_l2" (SiLU, then unit L2 norm) or "taylor"
    (1 + K + K^2 features, the others K; its scale is inside, None is 1).
    normalise: divide the read-out by phi(q) . z, the sum of its weights; `scale` is not used.
    """

    inputs = Inputs

    feature_map: str = "identity"
    normalise: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.feature_map not in FEATURE_MAPS:
            allowed = ", ".join(FEATURE_MAPS)
            raise ValueError(f"feature_map {self.feature_map!r}: allowed are {allowed}")
        if self.normalise and self.feature_map not in ("elu_plus_one", "taylor"):
            raise ValueError(
                f"normalise needs a positive kernel, feature_map elu_plus_one or taylor; given "
                f"{self.feature_map!r}"
            )

    def init_state(self, params) -> Float[Array, "F V"]:
        features = FEATURE_MAPS[self.feature_map](jnp.zeros((self.key_dim,)))
        return jnp.zeros((features.size, self.value_dim + self.normalise), jnp.float32)

    @property
    def linear(self):
        return not self.normalise

    def write(self, params, state, x):
        x = self.terms(x)
        return state + jnp.outer(x.k, x.v)

    def terms(self, xs: Inputs) -> Terms:
        phi = FEATURE_MAPS[self.feature_map]
        v = xs.v
        if self.normalise:  # z accumulates as one more column of values, all ones
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        return Terms(phi(xs.q), phi(xs.k), v)

    @property
    def factor(self):
        return 1.0 if self.feature_map == "taylor" and self.scale is None else super().factor

    def answer(self, y):
        if not self.normalise:
            return super().answer(y)
        return y[..., :-1] / (y[..., -1:] + 1e-10)


class LinearAttentionMixer(ProjectionMixer):
    """Projections and output norm around linear attention.

    There is no short convolution unless it is asked for: it ends in a SiLU of its own. Based is
    feature_map="taylor", normalise=True, key_dim=16, norm="none".
    """

    convolution: int = 0
    feature_map: str = "silu_l2"
    normalise: bool = False

    def make_cell(self):
        return LinearAttention(
            *self.sizes(), feature_map=self.feature_map, normalise=self.normalise
        )

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project(x, state, ctx)
        return Inputs(q, k, v), x, state


register(
    CellSpec(
        name="linear_attention",
        cell=lambda: LinearAttention(8, 6),
        variants={
            "elu": lambda: LinearAttention(8, 6, feature_map="elu_plus_one", normalise=True),
            "silu_l2": lambda: LinearAttention(8, 6, feature_map="silu_l2"),
            "taylor": lambda: LinearAttention(3, 6, feature_map="taylor", normalise=True),
        },
        mixer=LinearAttentionMixer,
        paper="Katharopoulos et al. 2020, arXiv 2006.16236",
        recurrence="S += φ(k) vᵀ, with or without a normaliser; φ: identity, elu+1, silu, Taylor",
    )
)
