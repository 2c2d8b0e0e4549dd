"""Titans' neural long-term memory: a network that learns each token by a gradient step.

    S_t = eta_t S_{t-1} - theta_t grad ||M(k_t) - v_t||^2,   eta_t, alpha_t in [0, 1], theta_t >= 0
    M_t = (1 - alpha_t) M_{t-1} + S_t;   y_t = M_t(q_t)

Behrouz et al. 2024, arXiv 2501.00663, Eq. 9-15, with the gradients of a chunk of C tokens taken at
the weights in front of it (Eq. 16); C is part of the definition. Forgetting acts on M alone, not on
the momentum S. The network is that of the same group's later text (2505.23735, App. E) without its
layer norm at the end of a chunk, of which it is open what it acts on. The loss has no factor 1/2
(Eq. 12). Where the paper is silent: the initial weights are learned, the momentum starts at zero.

A matrix that is given one key of unit norm at constant gates is stable when 2 theta C <= 1 - eta:
the weights along the key and their momentum go through a linear map from chunk to chunk, whose
eigenvalues are then below 1 (Jury's conditions). Keys that come and go can pump the momentum: for
every sequence of unit keys C = 1 is stable when theta < (1 - eta)^2 / (1 + eta) (circle criterion).
A network of several layers has no such bound.
"""

import dataclasses
import functools
from typing import Annotated, NamedTuple

import jax

from memjax.cells._gradient import GradientMemory, Terms
from memjax.nn.layers import Gate
from memjax.nn.mixer import ProjectionMixer
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field


class Inputs(NamedTuple):
    """q, k: [B, T, h, K], k of unit norm; v: [B, T, h, V]; alpha, eta: [B, T, h], the logarithms of
    1 - alpha and of eta, <= 0; theta: [B, T, h], the step >= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    alpha: Annotated[Array, Field("", "log_decay")]
    eta: Annotated[Array, Field("", "log_decay", plain=-30.0)]  # no momentum
    theta: Annotated[Array, Field("", "rate", 0.0, 0.05)]


@dataclasses.dataclass(frozen=True)
class Titans(GradientMemory):
    """State: weights, momentum, frozen weights, the token's place in its chunk."""

    inputs = Inputs

    def terms(self, xs):
        return Terms(xs.q, xs.k, xs.v, xs.alpha, xs.theta[..., None], xs.eta)


class TitansMixer(ProjectionMixer):
    """alpha = sigmoid(W x + b), near 0.02 at the start; eta the same, near 0.8; theta =
    sigmoid(W x + b) (1 - eta) / (2 C): where a matrix is stable for one constant key.

    depth: layers of the memory, 1 for a matrix. expansion: hidden width over K. frozen_chunk: C.
    The gates' form is our choice, as the paper gives none.
    """

    gate: str = "silu"
    depth: int = 1
    expansion: int = 4
    frozen_chunk: int = 16

    def make_cell(self):
        return Titans(*self.sizes(), self.depth, self.expansion, self.frozen_chunk)

    def setup(self):
        super().setup()
        gate = functools.partial(Gate, self.memories, self.std)
        self.forget, self.momentum, self.rate = gate(-4.0), gate(1.4), gate(0.0)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        forget, momentum, rate = self.forget(x), self.momentum(x), self.rate(x)
        theta = jax.nn.sigmoid(rate) * jax.nn.sigmoid(-momentum) / (2 * self.frozen_chunk)
        alpha, eta = jax.nn.log_sigmoid(-forget), jax.nn.log_sigmoid(momentum)
        return Inputs(q, k, v, alpha, eta, theta), x, state


register(
    CellSpec(
        name="titans",
        cell=lambda: Titans(8, 6, frozen_chunk=8),
        mixer=TitansMixer,
        paper="Behrouz et al. 2024, arXiv 2501.00663",
        recurrence="Z = η Z − θ ∇‖M(k) − v‖², M = (1 − α) M + Z, ∇ frozen per chunk",
        choice="form of the gates, learned start",
        variants={
            "deep": lambda: Titans(4, 4, depth=2, expansion=2, frozen_chunk=5, std=0.5),
            "three": lambda: Titans(4, 3, depth=3, expansion=2, frozen_chunk=8, std=0.5),
        },
    )
)
