"""A memory that averages: copy this file to begin a new one.

    cp memjax/cells/_template.py memjax/cells/my_memory.py

Then change the name at the end, this docstring, the inputs, `write` and `read`. Say here what a
token does, in the paper's notation; name the paper and the equation; say for which inputs it is
stable, and what is your choice where the paper is silent.

    S_t = (1 - beta_t) S_{t-1} + beta_t k_t v_t^T,   beta_t in [0, 1]
    y_t = S_t^T q_t
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from memjax.cell import MemoryCell
from memjax.nn.layers import Dense, widen
from memjax.nn.mixer import ProjectionMixer
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field, Float


class Inputs(NamedTuple):
    """q, k: [B, T, h, K]; v: [B, T, h, V]; beta: [B, T, h] in [0, 1]."""

    q: Annotated[Array, Field("K", "query")]  # `read` may look at leaves of kind "query" only
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "rate", 0.0, 1.0)]


@dataclasses.dataclass(frozen=True)
class Average(MemoryCell):
    """State S [K, V]. One memory and one token: no batch, no time, no heads."""

    inputs = Inputs

    key_dim: int
    value_dim: int

    def __post_init__(self):
        if min(self.key_dim, self.value_dim) < 1:
            raise ValueError(f"Average: key_dim and value_dim must be at least 1; given {self}")

    def init_state(self, params) -> Float[Array, "K V"]:
        return jnp.zeros((self.key_dim, self.value_dim), jnp.float32)

    def write(self, params, state, x):
        return (1 - x.beta) * state + x.beta * jnp.outer(x.k, x.v)

    def read(self, params, state, x):
        return dot("k,kv->v", x.q, state)


class AverageMixer(ProjectionMixer):
    """Unit-norm queries and keys behind a short convolution; beta = sigmoid(W x)."""

    def make_cell(self):
        return Average(*self.sizes())

    def setup(self):
        super().setup()
        self.rate = Dense((self.memories,), ("heads",), std=self.std, dtype=self.dtype)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        return Inputs(q, k, v, jax.nn.sigmoid(widen(self.rate(x)))), x, state


register(
    CellSpec(
        name="template",
        cell=lambda: Average(8, 6),
        mixer=AverageMixer,
        paper="the paper, arXiv 0000.00000",
        recurrence="S += β (k vᵀ − S)",
    )
)
