"""DeltaProduct: M micro-steps of the delta rule in each token.

    S <- exp(g_t) S,   g_t <= 0
    S <- S + beta_tj k_tj (v_tj - S^T k_tj)^T    for j = 1 .. M
    y_t = scale S^T q_t                                         scale = K^-1/2

Siems et al. 2025, arXiv 2502.10297, Eq. 4 and Sec. 3 (gated). A token's transition is a product of
M generalised Householder matrices: with beta = 2 it can be any product of M reflections. M = 1 is
Gated DeltaNet. A contraction for ||k|| = 1, beta in [0, 2], g <= 0.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax.numpy as jnp

from memjax.cells._matrix import MatrixMemory, Terms
from memjax.cells.gated_delta_net import GatedDeltaNetMixer
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q: [B, T, h, K]; k: [B, T, h, M, K] of unit norm; v: [B, T, h, M, V]; beta: [B, T, h, M] in
    [0, 2]; g: [B, T, h], log decay <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("M K", "key")]
    v: Annotated[Array, Field("M V", "value")]
    beta: Annotated[Array, Field("M", "rate", 0.0, 2.0)]
    g: Annotated[Array, Field("", "log_decay")]


@dataclasses.dataclass(frozen=True)
class DeltaProduct(MatrixMemory):
    """State S [K, V]. steps: M."""

    inputs = Inputs

    steps: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"DeltaProduct: steps must be at least 1; given {self.steps}")

    def write(self, params, state, x):
        state = jnp.exp(x.g) * state
        for k, v, beta in zip(x.k, x.v, x.beta, strict=True):
            state = state + jnp.outer(beta * k, v - dot("k,kv->v", k, state))
        return state

    def chunks(self, state, terms, reset, write):
        """A sequence M times as long: a token decays at its first micro-step and asks at its
        last."""
        length = terms.q.shape[0]

        def at(step, leaf):
            if leaf is None:
                return None
            spread = jnp.zeros((length, self.steps, *leaf.shape[1:]), leaf.dtype)
            return flat(spread.at[:, step].set(leaf))

        def flat(leaf):
            return leaf.reshape(-1, *leaf.shape[2:])

        micro = Terms(
            at(-1, terms.q), flat(terms.k), flat(terms.v), at(0, terms.g), flat(terms.beta)
        )
        write = None if write is None else jnp.repeat(write, self.steps)
        y, state = super().chunks(state, micro, at(0, reset), write)
        return y.reshape(length, self.steps, -1)[:, -1], state


class DeltaProductMixer(GatedDeltaNetMixer):
    """Gated DeltaNet's mixer with M keys, values and write strengths for each token.

    steps: M. decay: False for no forgetting, g = 0.
    """

    beta_max: float = 2.0
    steps: int = 2
    decay: bool = True

    def make_cell(self):
        return DeltaProduct(*self.sizes(), steps=self.steps)

    def projections(self):
        query, key, value = super().projections()
        return query, (key[0], self.steps, key[1]), (value[0], self.steps, value[1])

    def strengths(self):
        return self.memories, self.steps

    def inputs(self, x, state, ctx):
        xs, kept, state = super().inputs(x, state, ctx)
        g = xs.g if self.decay else jnp.zeros_like(xs.g)
        return Inputs(**{**xs._asdict(), "g": g}), kept, state


register(
    CellSpec(
        name="delta_product",
        cell=lambda: DeltaProduct(8, 6),
        mixer=DeltaProductMixer,
        paper="Siems et al. 2025, arXiv 2502.10297",
        recurrence="S = e^g S, then M delta rules",
    )
)
