"""ATLAS: a network that learns, at every token, the pairs of the last c tokens (the Omega rule).

    U_t = sum_{i=t-c+1..t} gamma_t[t - i] grad ||M(k_i) - v_i||^2,   gamma in [0, 1]
    OmegaNet:  M_t = alpha_t M_{t-1} - eta_t U_t
    Atlas:     S_t = theta_t S_{t-1} + U_t;  M_t = alpha_t M_{t-1} - eta_t NS(S_t);   y_t = M_t(q_t)

Behrouz et al. 2025, arXiv 2505.23735, Eq. 9-10 and 32-33 (the signs of Eq. 11 and 28-31 are
misprints), with gradients frozen for chunks of C tokens (Eq. 15). alpha here is what is kept,
theta the momentum, eta the step. NS is Newton and Schulz's iteration, as in Muon: an odd function
that leaves the singular vectors and brings the singular values near 1; the paper's other form (Eq.
57), without eta outside, is eta = 1. newton_schulz = 0 is Eq. 12-13, S_t = theta_t S_{t-1} - eta_t
U_t and M_t = alpha_t M_{t-1} + S_t: with c = 1 that is Titans.

Special cases: loss "dot" of a network is DLA (Eq. 19, with the sign that Eq. 51 needs), of a matrix
with c > 1 SWLA (Eq. 20; its start is zero: std = 0). The pairs of a window are carried across the
borders of chunks.

A matrix and keys of unit norm, one constant key: without momentum errors do not grow when eta c C
<= 1. With NS each step adds at most 1.21 eta to a layer's spectral norm, so that it stays below
alpha^t ||M_0|| + 1.21 eta / (1 - alpha) for any eta.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import Annotated, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cells._gradient import GradientMemory, Terms
from memjax.nn.layers import Dense, Gate, widen
from memjax.nn.mixer import ProjectionMixer
from memjax.recurrence import dot
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field, Float


class OmegaInputs(NamedTuple):
    """q, k: [B, T, h, K], k of unit norm; v: [B, T, h, V]; alpha: [B, T, h], log of what is kept,
    <= 0; eta: [B, T, h], the step; gamma: [B, T, h, c] in [0, 1], of a token's own pair first."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    alpha: Annotated[Array, Field("", "log_decay")]
    eta: Annotated[Array, Field("", "rate", 0.0, 0.02)]
    gamma: Annotated[Array, Field("c", "rate")]


class AtlasInputs(NamedTuple):
    """As `OmegaInputs`; theta: [B, T, h], log of the momentum that is kept, <= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    alpha: Annotated[Array, Field("", "log_decay")]
    eta: Annotated[Array, Field("", "rate", 0.0, 0.02)]
    gamma: Annotated[Array, Field("c", "rate")]
    theta: Annotated[Array, Field("", "log_decay", plain=-30.0)]  # no momentum


@dataclasses.dataclass(frozen=True)
class OmegaNet(GradientMemory):
    """context: c, the pairs that a step learns from."""

    inputs: ClassVar[type] = OmegaInputs

    context: int = 4

    @property
    def pairs(self):
        return self.context

    @property
    def momentum(self):
        return False

    def terms(self, xs):
        return Terms(xs.q, xs.k, xs.v, xs.alpha, xs.eta[..., None] * xs.gamma)


@dataclasses.dataclass(frozen=True)
class Atlas(OmegaNet):
    """newton_schulz: steps of the iteration, 0 for none."""

    inputs: ClassVar[type] = AtlasInputs

    newton_schulz: int = 5

    @property
    def momentum(self):
        return True

    @property
    def transform(self):
        if self.newton_schulz:
            return functools.partial(orthogonalise, steps=self.newton_schulz)
        return None

    def terms(self, xs):
        given = xs.q, xs.k, xs.v, xs.alpha
        if self.newton_schulz:
            return Terms(*given, xs.gamma, xs.theta, xs.eta)
        return Terms(*given, xs.eta[..., None] * xs.gamma, xs.theta)


MUON = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Float[Array, "... m n"], steps: int) -> Float[Array, "... m n"]:
    """Newton and Schulz's quintic iteration with Muon's coefficients (Jordan et al. 2024): singular
    values of x over its norm, brought near 1: by 5 steps above 1 % to [0.68, 1.2]. 0 stays 0, and
    rounding in a direction that x does not have grows by 3.4445 in each step, 485-fold in 5."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT, steps).mT
    x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True) + 1e-14)
    for _ in range(steps):
        x = _newton_schulz(x)
    return x


@jax.custom_jvp
def _newton_schulz(x):
    """a x + b G x + c G G x with G = x x^T."""
    return _with_factors(x)[0]


def _with_factors(x):
    a, b, c = MUON
    gram = dot("...mn,...kn->...mk", x, x)
    mixed = b * gram + c * dot("...mk,...kl->...ml", gram, gram)
    return a * x + dot("...mk,...kn->...mn", mixed, x), gram, mixed


@_newton_schulz.defjvp
def _(primals, tangents):
    """All factors are symmetric: one product stands for the two that plain differentiation makes of
    each, and its transpose, the gradient, needs no transposed matrix."""
    (x,), (d,) = primals, tangents
    y, gram, mixed = _with_factors(x)
    a, b, c = MUON
    d_gram = _and_transposed(dot("...mn,...kn->...mk", d, x))
    d_mixed = b * d_gram + c * _and_transposed(dot("...mk,...kl->...ml", d_gram, gram))
    moved = dot("...km,...kn->...mn", mixed, d)  # mixed d
    return y, a * d + moved + dot("...mk,...kn->...mn", d_mixed, x)


def _and_transposed(x):
    return x + x.mT


def polynomial(x: Float[Array, "... n"], weights: Float[Array, " p"]) -> Float[Array, "... m"]:
    """phi with phi(x) . phi(y) = sum_i weights[i] (x . y)^i / sum(weights): all monomials of degree
    0 to p - 1, C(n + p - 1, p - 1) of them (arXiv 2505.23735, Eq. 5); weights >= 0."""
    size, features = x.shape[-1], []
    for degree in range(len(weights)):
        terms = list(itertools.combinations_with_replacement(range(size), degree))
        times = [math.factorial(degree) for _ in terms]
        for i, term in enumerate(terms):
            times[i] //= math.prod(math.factorial(n) for n in Counter(term).values())
        index = jnp.array(terms, jnp.int32).reshape(len(terms), degree)
        monomials = jnp.prod(x[..., index], axis=-1)
        features.append(jnp.sqrt(weights[degree] * jnp.array(times, x.dtype)) * monomials)
    return jnp.concatenate(features, axis=-1) * jax.lax.rsqrt(jnp.sum(weights))


class OmegaNetMixer(ProjectionMixer):
    """Queries and keys of unit norm through polynomial features; alpha = sigmoid(W x + 4), gamma =
    sigmoid(W x) and eta = sigmoid(W x) / (c C): where a matrix is stable for one constant key.

    key_dim: before the features. degree: of the polynomial, 1 for none; its weights are learned
    from 1 / i!. depth, expansion, frozen_chunk, context, loss: see the cell. The gates' form and
    all sizes are our choice, as the paper gives none.
    """

    key_dim: int | None = 16
    gate: str = "silu"
    degree: int = 2
    depth: int = 1
    expansion: int = 4
    frozen_chunk: int = 16
    context: int = 4
    loss: str = "l2"

    @property
    def features(self) -> int:
        """K, behind the feature map."""
        size = self.sizes()[0]
        return size if self.degree == 1 else math.comb(size + self.degree, self.degree)

    def make_cell(self):
        sizes = self.depth, self.expansion, self.frozen_chunk, self.loss
        return OmegaNet(self.features, self.sizes()[1], *sizes, context=self.context)

    def setup(self):
        super().setup()
        if self.degree < 1:
            raise ValueError(f"degree must be at least 1; given {self.degree}")
        self.keep = Gate(self.memories, self.std, 4.0)
        self.step = Gate(self.memories, self.std)
        shape, axes = (self.memories, self.context), ("heads", None)
        self.weigh = Dense(shape, axes, std=self.std, bias=True, dtype=self.dtype)
        if self.degree > 1:
            start = jnp.array([1 / math.factorial(i) for i in range(self.degree + 1)])
            init = nn.with_logical_partitioning(lambda key: jnp.log(jnp.expm1(start)), ("state",))
            self.coefficients = self.param("coefficients", init)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        if self.degree > 1:
            weights = jax.nn.softplus(self.coefficients)
            q, k = (polynomial(widen(a), weights).astype(a.dtype) for a in (q, k))
        gamma = jax.nn.sigmoid(widen(self.weigh(x)))
        eta = jax.nn.sigmoid(self.step(x)) / (self.context * self.frozen_chunk)
        return OmegaInputs(q, k, v, jax.nn.log_sigmoid(self.keep(x)), eta, gamma), x, state


class AtlasMixer(OmegaNetMixer):
    """The same with theta = sigmoid(W x + 1.4). newton_schulz: see the cell; with 0 eta is
    sigmoid(W x) (1 - theta) / (2 c C)."""

    newton_schulz: int = 5

    def make_cell(self):
        sizes = self.depth, self.expansion, self.frozen_chunk, self.loss
        steps = self.newton_schulz
        return Atlas(
            self.features, self.sizes()[1], *sizes, context=self.context, newton_schulz=steps
        )

    def setup(self):
        super().setup()
        self.momentum = Gate(self.memories, self.std, 1.4)

    def inputs(self, x, state, ctx):
        xs, kept, state = super().inputs(x, state, ctx)
        momentum = self.momentum(x)
        if not self.newton_schulz:
            xs = xs._replace(eta=xs.eta * jax.nn.sigmoid(-momentum) / 2)
        theta = jax.nn.log_sigmoid(momentum)
        return AtlasInputs(**xs._asdict(), theta=theta), kept, state


register(
    CellSpec(
        name="omega_net",
        cell=lambda: OmegaNet(8, 6, frozen_chunk=8, context=3),
        mixer=OmegaNetMixer,
        paper="Behrouz et al. 2025, arXiv 2505.23735",
        recurrence="M = α M − η Σ γ ∇‖M(kᵢ) − vᵢ‖² over the last c tokens, ∇ frozen per chunk",
        choice="form of the gates, sizes",
        variants={
            "deep": lambda: OmegaNet(4, 4, 2, 2, frozen_chunk=5, std=0.5, context=7),
            "dla": lambda: OmegaNet(4, 4, 2, 2, 5, "dot", std=0.5, context=2),
        },
    )
)
register(
    CellSpec(
        name="atlas",
        cell=lambda: Atlas(8, 6, frozen_chunk=8, context=3),
        mixer=AtlasMixer,
        paper="Behrouz et al. 2025, arXiv 2505.23735",
        recurrence="S = θ S + Σ γ ∇‖M(kᵢ) − vᵢ‖², M = α M − η NS(S), NS: Newton-Schulz",
        choice="form of the gates, sizes",
        variants={
            "momentum": lambda: Atlas(8, 6, frozen_chunk=8, context=3, newton_schulz=0),
            # of a network in float32, 5 steps lose 1e-4 of the momentum with gates at their limits
            "deep": lambda: Atlas(4, 4, 2, 2, frozen_chunk=5, std=0.5, context=2, newton_schulz=3),
        },
    )
)
