"""Memories that are small networks, trained on every token by gradient descent.

The memory is a network M: one matrix, or layers x + gelu(.. gelu(x W_1) ..) W_L. Token t brings a
pair (k_t, v_t), a log decay a_t <= 0 of the weights, a log decay m_t <= 0 of the momentum and
weights r_t[j] >= 0 for the pairs of the last c tokens, its own first. With W the weights and Z the
momentum (Behrouz et al. 2025, arXiv 2501.00663, Eq. 9-14; 2505.23735, Eq. 9-16):

    U_t = sum_{j<c} r_t[j] grad loss(W_b; k_{t-j}, v_{t-j})
    Z_t = e^(m_t) Z_{t-1} - U_t;   W_t = e^(a_t) W_{t-1} + Z_t;   y_t = M(q_t; W_t)
    or, with a function F of a matrix:   W_t = e^(a_t) W_{t-1} + s_t F(Z_t)
    loss = ||M(k) - v||^2, or -<M(k), v>

W_b is frozen: the weights in front of the frozen chunk's first token. Frozen chunks of C written
tokens are counted from a document's start, so that C is part of the definition. Within one, the
gradient of layer l at pair i is an outer product of what goes into the layer, h_i, and an error
d_i, so that all tokens of a chunk are answered by matrix products, without weights per token:

    x W_t = e^(a_1 + .. + a_t) x W_0 + p_t x Z_0 - sum_i G[t, i] (x . h_i) d_i
    G = A B R;  A[t, j] = e^(a_{j+1} + .. + a_t);  B the same with m;  R[t, i] = r_t[t - i]
    p_t = sum_{j<=t} A[t, j] e^(m_1 + .. + m_j)

for layer after layer of the network. The state after the chunk has the same form. With F the Z_t
and W_t of a chunk are formed, C matrices of each layer. Without momentum B = 1 and Z_t = -U_t.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform
from memjax.cell import MemoryCell
from memjax.cells._pairs import Pairs, Window
from memjax.recurrence import (
    accumulator_dtype,
    dot,
    from_chunks,
    memories,
    per_head,
    phase_split,
    promote,
    select,
    to_chunks,
)
from memjax.typing import Array, Bool, Float, PRNGKeyArray, PyTree

LOSSES = ("l2", "dot")
Layers = tuple[Float[Array, "m n"], ...]


class Terms(NamedTuple):
    """What each token brings, in the letters of the module's docstring.

    q, k: [..., K]; v: [..., V]; a: [...]; r: [..., c], the step times the weight of each pair;
    m: [...], None without momentum; s: [...], the step of a transformed momentum, see
    `GradientMemory.transform`.
    """

    q: Array
    k: Array
    v: Array
    a: Array
    r: Array
    m: Array | None = None
    s: Array | None = None


class Learner(NamedTuple):
    """weights, momentum, base: the layers of W, Z and W_b. place: written tokens of the running
    frozen chunk, counted from 0 to C - 1. pairs: None when c = 1; momentum: None without. All but
    the weights: None in what is kept to be read."""

    weights: Layers
    momentum: Layers | None
    base: Any
    place: Any
    pairs: Pairs | None


@dataclasses.dataclass(frozen=True)
class GradientMemory(MemoryCell):
    """A subclass defines `terms`.

    key_dim, value_dim: K and V. depth: layers L of the network, 1 for a matrix. expansion: hidden
    width over K. frozen_chunk: C. loss: "l2" or "dot". std: of the initial weights that a matrix or
    the last layer has; those of the others are 1 / sqrt(inputs). A network has the residual x when
    K = V.
    """

    key_dim: int
    value_dim: int
    depth: int = 1
    expansion: int = 4
    frozen_chunk: int = 16
    loss: str = "l2"
    std: float = 0.02

    def __post_init__(self):
        name = type(self).__name__
        sizes = (self.key_dim, self.value_dim, self.depth, self.expansion, self.frozen_chunk)
        if min(sizes) < 1:
            raise ValueError(
                f"{name}: key_dim, value_dim, depth, expansion and frozen_chunk must be at least "
                f"1; given {self}"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"{name}: loss {self.loss!r}: allowed are {', '.join(LOSSES)}")

    @property
    def pairs(self) -> int:
        """c, the pairs that a step learns from."""
        return 1

    @property
    def momentum(self) -> bool:
        """Whether steps have momentum."""
        return True

    def terms(self, xs: PyTree) -> Terms:
        """Inputs, with any axes in front, in the letters of the module's docstring."""
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    @property
    def transform(self) -> Callable[[Array], Array] | None:
        """F of the module's docstring, of matrices [..., m, n]; None for the momentum itself."""
        return None

    # ------------------------------------------------------------ the network

    def init_params(self, key: PRNGKeyArray, heads: int) -> Layers:
        """The weights in front of a document's first token, learned with the model."""
        hidden = (self.expansion * self.key_dim,) * (self.depth - 1)
        widths = (self.key_dim, *hidden, self.value_dim)
        layers = []
        for i, seed in enumerate(jax.random.split(key, self.depth)):
            std = self.std if i == self.depth - 1 else widths[i] ** -0.5
            layers.append(std * jax.random.normal(seed, (heads, widths[i], widths[i + 1])))
        return tuple(layers)

    def apply(self, multiply, x: Float[Array, "... K"]) -> Float[Array, "... V"]:
        """The network; multiply(l, x) is x W_l."""
        hidden = x
        for layer in range(self.depth - 1):
            hidden = jax.nn.gelu(multiply(layer, hidden))
        y = multiply(self.depth - 1, hidden)
        return x + y if self.depth > 1 and self.key_dim == self.value_dim else y

    def gradients(
        self, weights: Layers, k: Float[Array, "... K"], v: Float[Array, "... V"]
    ) -> tuple[list[Array], list[Array]]:
        """h and d of each layer: the loss's gradient at one pair is the outer product h d^T."""
        entering, before = [k], []
        for layer in weights[:-1]:
            before.append(dot("...m,mn->...n", entering[-1], layer))
            entering.append(jax.nn.gelu(before[-1]))
        if self.loss == "dot":
            error = -v
        else:
            error = 2 * (self.apply(lambda i, x: dot("...m,mn->...n", x, weights[i]), k) - v)
        errors = [error]
        for layer, z in zip(weights[:0:-1], before[::-1], strict=True):
            _, pull = jax.vjp(jax.nn.gelu, z)
            errors.append(pull(dot("...n,mn->...m", errors[-1], layer))[0])
        return entering, errors[::-1]

    # ------------------------------------------------------------ token by token

    def init_state(self, params: Layers) -> Learner:
        """The learned weights, no momentum, no pairs."""
        zero = jnp.zeros((), jnp.int32)
        momentum = jax.tree.map(jnp.zeros_like, params) if self.momentum else None
        pairs = self.no_pairs(self.pairs - 1) if self.pairs > 1 else None
        return Learner(params, momentum, params, zero, pairs)

    def no_pairs(self, size: int) -> Pairs:
        """Room for `size` pairs, of which none is there."""
        k, v = (jnp.zeros((size, n), jnp.float32) for n in (self.key_dim, self.value_dim))
        return Pairs(k, v, jnp.zeros((), jnp.int32))

    @property
    def linear(self) -> bool:
        """Whether the memory is a matrix."""
        return self.depth == 1

    def readable(self, state: Learner) -> Learner:
        """The weights alone."""
        return Learner(state.weights, None, None, None, None)

    def write(self, params, state, x):
        x = self.terms(x)
        base = select(state.place == 0, state.weights, state.base)
        past = state.pairs or self.no_pairs(0)
        k, v = jnp.concatenate([past.k, x.k[None]]), jnp.concatenate([past.v, x.v[None]])
        age = jnp.arange(self.pairs - 1, -1, -1)
        rates = jnp.where(age <= past.number, x.r[age], 0)
        entering, errors = self.gradients(base, k, v)
        momentum = tuple(
            -dot("i,im,in->mn", rates, h, d) for h, d in zip(entering, errors, strict=True)
        )
        if state.momentum is not None:
            fade = jnp.exp(x.m)
            momentum = tuple(
                fade * z + step for z, step in zip(state.momentum, momentum, strict=True)
            )
        transform = self.transform
        steps = momentum if transform is None else tuple(x.s * transform(z) for z in momentum)
        weights = tuple(jnp.exp(x.a) * w + z for w, z in zip(state.weights, steps, strict=True))
        number = jnp.minimum(past.number + 1, self.pairs - 1)
        pairs = state.pairs and Pairs(k[1:], v[1:], number)
        kept = None if state.momentum is None else momentum
        return Learner(weights, kept, base, (state.place + 1) % self.frozen_chunk, pairs)

    def read(self, params, state, x):
        q = self.terms(x).q
        return self.apply(lambda i, h: dot("m,mn->n", h, state.weights[i]), q)

    # ------------------------------------------------------------ chunk by chunk

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """The chunk form of the module's docstring, in windows of C tokens.

        A window that need not begin with a frozen chunk crosses at most one border of the running
        document's chunks; documents that begin in it all learn from the initial weights. Two passes
        over the window are then exact: up to the border, and behind it, where there is one.
        """
        dtype = accumulator_dtype(params, state, xs)
        params, output = promote(params, dtype), jax.tree.leaves(xs)[0].dtype
        fresh = self.fresh(params, dtype)
        terms, length = self.terms(promote(xs, dtype)), jax.tree.leaves(xs)[0].shape[0]
        aligned = state is None and reset is None and write is None
        written = jnp.ones(length, bool) if write is None else write
        if write is not None:  # what an unwritten token holds, even NaN, must not matter
            zeroed = select(write, terms, jax.tree.map(jnp.zeros_like, terms))
            terms = zeroed._replace(q=terms.q)
        chunks = to_chunks((terms, reset, written), min(self.frozen_chunk, length))

        @jax.checkpoint
        def window(state, inputs):
            x, reset, written = inputs
            return self._window(fresh, state, x, reset, written, aligned)

        final, y = lax.scan(window, fresh if state is None else state, chunks)
        return from_chunks(y, length).astype(output), final

    def pallas(self, params, state, xs, reset, write):
        """`pallas_kernels.deep_memory` or `deep_network`, without a transform of the momentum."""
        from pallas_kernels import deep_memory, deep_network
        from pallas_kernels.deep_memory.reference import State

        if self.transform is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: the kernels deep_memory and deep_network have no "
                f"Newton-Schulz; given {self}; use 'chunked'"
            )
        heads, terms = memories(params, state, xs), self.terms(xs)
        q, k, v, g, rates, m = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, heads // leaf.shape[2], axis=2), tuple(terms[:6])
        )
        if write is not None and write.ndim == 3:
            write = jnp.repeat(write, heads // write.shape[2], axis=2)
        op, is_matrix = (deep_memory, True) if self.depth == 1 else (deep_network, False)

        def given(layers):
            """Layers as the op takes them."""
            return layers[0] if is_matrix and layers else layers

        carried = None
        if state is not None:
            weights, momentum, base = map(given, (state.weights, state.momentum, state.base))
            past_k, past_v, number = state.pairs or (None, None, None)
            carried = State(weights, momentum, base, state.place, past_k, past_v, number)
        o, found = op(
            *(q, k, v, g, rates, given(params)),
            m=m,
            frozen_chunk=self.frozen_chunk,
            loss=self.loss,
            state=carried,
            reset=reset,
            write=write,
            platform=mesh_platform(),
        )
        weights, momentum, base = ((a,) if is_matrix else a for a in found[:3])
        pairs = Pairs(found.k, found.v, found.number) if self.pairs > 1 else None
        momentum = momentum if self.momentum else None
        return o, Learner(weights, momentum, base, found.place, pairs)

    def _window(self, fresh: Learner, state: Learner, x: Terms, reset, written, aligned: bool):
        """A window of at most C tokens; `aligned` when it is a frozen chunk of one document."""
        past = state.pairs or self.no_pairs(0)
        phases = phase_split(self.frozen_chunk, state.place, reset, written)
        whole = Window.of(past, x.k, x.v, phases)
        base = state.weights if aligned else select(state.place == 0, state.weights, state.base)
        learnt = self.gradients(base, whole.k, whole.v)
        one = whole._replace(document=jnp.zeros_like(phases.document))
        y, weights, momentum = self._pass(state, None, x, one, phases.first, learnt)

        def behind(y, weights, momentum):
            learnt = select(
                whole.document_of_pairs() == 0,
                self.gradients(weights, whole.k, whole.v),
                self.gradients(fresh.weights, whole.k, whole.v),
            )
            start = state._replace(weights=weights, momentum=momentum)
            later, *end = self._pass(start, fresh, x, whole, phases.second, learnt)
            return jnp.where(phases.before[:, None], y, later), *end

        if not aligned:
            base = phases.base(state.base, base, weights, fresh.weights)
            y, weights, momentum = phases.with_second_pass(behind, (y, weights, momentum))
        place, pairs = phases.place(state.place), state.pairs and whole.kept(past)
        return Learner(weights, momentum, base, place, pairs), y

    def _pass(self, state, fresh, x, whole, use, learnt):
        """(y, weights and momentum after the last token) when the tokens of `use` alone learn.

        learnt: h and d of every pair, see `gradients`. fresh: where later documents begin.
        """
        same = jnp.tril(whole.document[:, None] == whole.document)
        live = whole.live.astype(x.a.dtype)
        fading, faded = decay(x.a, use, same)
        fading = fading * use  # a token that does not learn adds no momentum to the weights
        starts = [(faded * live, state.weights)]
        if fresh is not None:
            starts.append((faded * (1 - live), fresh.weights))
        push, momentum = whole.rates(x.r, use), state.momentum
        pushed: Any = None
        if momentum is not None:
            pushing, pushed = decay(x.m, use, same)
            push, pushed = times(pushing, push), pushed * live
            momentum = tuple(
                pushed[-1] * z - dot("im,i,in->mn", h, push[-1], d)
                for z, h, d in zip(momentum, *learnt, strict=True)
            )
        transform = self.transform
        if transform is not None:
            momenta = [
                pushed[:, None, None] * z - dot("ti,im,in->tmn", push, h, d)
                for z, h, d in zip(state.momentum, *learnt, strict=True)
            ]
            every = [
                dot("tj,jmn->tmn", fading * x.s, transform(z))
                + sum(scale[:, None, None] * start[layer] for scale, start in starts)
                for layer, z in enumerate(momenta)
            ]
            y = self.apply(lambda layer, h: dot("tm,tmn->tn", h, every[layer]), x.q)
            return y, tuple(w[-1] for w in every), momentum
        if momentum is not None:
            starts.append((dot("tj,j->t", fading, pushed), state.momentum))
        step = times(fading, push)

        def multiply(layer, x):
            h, d = learnt[0][layer], learnt[1][layer]
            y = -dot("ti,in->tn", step * dot("tm,im->ti", x, h), d)
            for scale, weights in starts:
                y = y + scale[:, None] * dot("tm,mn->tn", x, weights[layer])
            return y

        weights = []
        for layer, (h, d) in enumerate(zip(*learnt, strict=True)):
            new = -dot("im,i,in->mn", h, step[-1], d)
            weights.append(new + sum(scale[-1] * start[layer] for scale, start in starts))
        return self.apply(multiply, x.q), tuple(weights), momentum


def times(factor: Float[Array, "C C"], rates: Float[Array, "C *P"]) -> Float[Array, "C P"]:
    """factor R, R by its diagonal where that is all it has."""
    return factor * rates if rates.ndim == 1 else dot("tj,ji->ti", factor, rates)


def decay(
    g: Float[Array, " C"], use: Bool[Array, " C"], visible: Bool[Array, "C C"]
) -> tuple[Float[Array, "C C"], Float[Array, " C"]]:
    """exp(g_{j+1} + .. + g_i) where visible and 0 elsewhere, and exp of all visible terms of i; the
    terms of `use` alone count. Each exponent is the sum of just its terms."""
    g = jnp.where(use, jnp.maximum(g, -1e4), 0)  # exp is zero there; -inf would meet 0
    lower = jnp.tril(jnp.ones((len(g), len(g)), bool))
    after = jnp.where(~lower, g, 0)  # [j, l], l > j
    through = jnp.where(visible, dot("jl,il->ij", after, lower), -jnp.inf)
    return jnp.exp(through), jnp.exp(dot("tj,j->t", visible, g))
