"""Lattice: a bank of slots of unit norm; a write moves each slot at a right angle to itself.

    h = v - S^T k, w = k  (decoding);  h = v, w = k - S v  (encoding);  h = v, w = k  (similarity)
    s_i = beta s_i + gamma w_i (h - s_i (s_i . h)),  then  s_i = s_i / ||s_i||;   y = S^T q

Karami & Mirrokni 2025, arXiv 2504.05646: one gradient step, on the sphere, of ||v - S^T k||^2 / 2,
||k - S v||^2 / 2 or -<v, S^T k>, with the K slots s_i in the rows of S [K, V]; S and s_i . h are of
normalised slots. Not all of the paper's equations are public. Our choice is: h, w and s_i . h are
those of the slots in front of a chunk of C written tokens (C = 1 is the exact rule), slots are
normalised at its end, answers are read from normalised slots, the start is learned. Without
retraction slots are stored as they grow, and the step is divided by their norm.

C = 1 is stable for all inputs: slots have unit norm (those below 1e-6 stay as they are). Within a
longer chunk a slot is multiplied by beta - gamma w_i (s_i . h) token by token: stable where
gamma |w_i| |s_i . h| <= 1 + beta; beyond, it grows up to the C-th power of that, and rounding with
it. Without retraction beta must stay away from 0: the step grows as a slot shrinks.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform
from memjax.cell import MemoryCell
from memjax.nn.layers import Gate, widen
from memjax.nn.mixer import ProjectionMixer
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
from memjax.registry import CellSpec, register
from memjax.typing import Array, Field, Float, PRNGKeyArray

OBJECTIVES = ("decoding", "encoding", "similarity")


class Inputs(NamedTuple):
    """q, k: [B, T, h, K], over slots; v: [B, T, h, V]; beta: [B, T, h], log of what is kept, <= 0;
    gamma: [B, T, h], the step >= 0."""

    q: Annotated[Array, Field("K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    beta: Annotated[Array, Field("", "log_decay")]
    gamma: Annotated[Array, Field("", "rate", 0.0, 0.5)]


class Slots(NamedTuple):
    """slots, base: [K, V], now and in front of the running chunk, None where a chunk is one token;
    place: its written tokens. base and place: None in what is kept to be read."""

    slots: Float[Array, "K V"]
    base: Any
    place: Any


def inverse_norm(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / norm, but 1 for norms below 1e-6: to normalise twice is to normalise once, slopes too."""
    return lax.rsqrt(jnp.where(square < 1e-12, 1.0, square))


def unit(slots: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """Slots of unit norm."""
    largest = jnp.max(jnp.abs(slots), axis=-1, keepdims=True)  # whose square may overflow
    slots = slots / lax.stop_gradient(jnp.maximum(largest, 1.0))
    return slots * inverse_norm(jnp.sum(jnp.square(slots), axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Lattice(MemoryCell):
    """key_dim, value_dim: K slots of V channels. objective: "decoding", "encoding" or "similarity".
    frozen_chunk: C. retraction: bring slots back to unit norm at the end of a chunk."""

    inputs = Inputs

    key_dim: int
    value_dim: int
    objective: str = "decoding"
    frozen_chunk: int = 16
    retraction: bool = True

    def __post_init__(self):
        if min(self.key_dim, self.value_dim, self.frozen_chunk) < 1:
            raise ValueError(
                f"Lattice: key_dim, value_dim and frozen_chunk must be at least 1; given {self}"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"Lattice: objective {self.objective!r}: allowed are {', '.join(OBJECTIVES)}"
            )

    @property
    def exact(self) -> bool:
        """Whether nothing is frozen."""
        return self.frozen_chunk == 1

    def init_params(self, key: PRNGKeyArray, heads: int) -> Float[Array, "H K V"]:
        """The first slots, random directions; learned."""
        return unit(jax.random.normal(key, (heads, self.key_dim, self.value_dim)))

    def init_state(self, params):
        """The learned slots, of unit norm."""
        slots = unit(params)
        return Slots(slots, None if self.exact else slots, jnp.zeros((), jnp.int32))

    def readable(self, state):
        """The slots alone."""
        return Slots(state.slots, None, None)

    def change(self, base: Float[Array, "K V"], x: Inputs):
        """(kept, added, h) of a token [...]: each slot becomes kept_i s_i + added_i h; [..., K],
        [..., K] and [..., V]."""
        square = jnp.sum(jnp.square(base), axis=-1)
        inverse = jnp.ones_like(square) if self.retraction else inverse_norm(square)
        directions = base * inverse[:, None]
        h, w = x.v, x.k
        if self.objective == "decoding":
            h = x.v - dot("...k,kv->...v", x.k, directions)
        if self.objective == "encoding":
            w = x.k - dot("...v,kv->...k", x.v, directions)
        along = dot("...v,kv->...k", h, directions)
        step = x.gamma[..., None] * w * inverse
        return jnp.exp(x.beta)[..., None] - step * along * inverse, step, h

    def write(self, params, state, x):
        base = state.slots
        if not self.exact:
            base = select(state.place == 0, base, state.base)
        kept, added, h = self.change(base, x)
        slots = kept[:, None] * state.slots + jnp.outer(added, h)
        place = (state.place + 1) % self.frozen_chunk
        if self.retraction:
            slots = select(place == 0, unit(slots), slots)
        return Slots(slots, None if self.exact else base, place)

    def read(self, params, state, x):
        return dot("k,kv->v", x.q, unit(state.slots))

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """Within a chunk a slot is a sum of itself and of the h of its tokens: all slots after all
        tokens are one product. They are formed, C V numbers for each slot, because norms from the
        products of the vectors alone lose what cancels."""
        if self.exact:
            raise NotImplementedError(
                "frozen_chunk 1 has no parallel form; use 'scan', or a longer frozen_chunk"
            )
        dtype, length = accumulator_dtype(params, state, xs), xs.q.shape[0]
        output, params = xs.q.dtype, promote(params, dtype)
        fresh = self.fresh(params, dtype)
        written = jnp.ones(length, bool) if write is None else write
        aligned = state is None and reset is None and write is None
        if write is not None:  # what an unwritten token holds, even NaN, must not matter
            xs = select(write, xs, jax.tree.map(jnp.zeros_like, xs))._replace(q=xs.q)
        chunks = to_chunks((promote(xs, dtype), reset, written), min(self.frozen_chunk, length))

        @jax.checkpoint
        def window(state, inputs):
            x, reset, written = inputs
            return self._window(fresh, state, x, reset, written, aligned)

        final, y = lax.scan(window, fresh if state is None else state, chunks)
        return from_chunks(y, length).astype(output), final

    def pallas(self, params, state, xs, reset, write):
        """`pallas_kernels.lattice`, for slots of unit norm."""
        from pallas_kernels import lattice
        from pallas_kernels.lattice.reference import State

        if not self.retraction:
            raise NotImplementedError(
                f"Lattice: the kernel has slots of unit norm (retraction True); given {self}; use "
                "another form"
            )
        heads = memories(params, state, xs)
        repeated = lambda leaf: jnp.repeat(leaf, heads // leaf.shape[2], axis=2)  # noqa: E731
        q, k, v, beta, gamma = map(repeated, xs)
        if write is not None and write.ndim == 3:
            write = repeated(write)
        o, found = lattice(
            *(q, k, v, beta, gamma, unit(params)),
            frozen_chunk=self.frozen_chunk,
            objective=self.objective,
            state=None if state is None else State(*state),
            reset=reset,
            write=write,
            platform=mesh_platform(),
        )
        return o, Slots(*found)

    def _window(self, fresh: Slots, state: Slots, x: Inputs, reset, written, aligned: bool):
        """A window of at most C tokens; `aligned` when it is a frozen chunk of one document."""
        phases = phase_split(self.frozen_chunk, state.place, reset, written)
        base = select(state.place == 0, state.slots, state.base)
        alone = jnp.zeros_like(phases.document)
        y, slots = self._pass(state.slots, None, x, alone, phases.first, self.change(base, x))
        slots = self._retract(slots, state.place + jnp.sum(phases.first))

        def behind(y, slots):
            change = select(phases.live, self.change(slots, x), self.change(fresh.base, x))
            later, end = self._pass(slots, fresh.slots, x, phases.document, phases.second, change)
            end = select(phases.live[-1], end, self._retract(end, phases.number()))
            return jnp.where(phases.before[:, None], y, later), end

        if not aligned:
            base = phases.base(state.base, base, slots, fresh.base)
            y, slots = phases.with_second_pass(behind, (y, slots))
        return Slots(slots, base, phases.place(state.place)), y

    def _retract(self, slots, number):
        """Slots behind `number` tokens of a chunk."""
        if not self.retraction:
            return slots
        return select(number == self.frozen_chunk, unit(slots), slots)

    def _pass(self, start, fresh, x, document, use, change):
        """(y, slots after the last token) when the tokens of `use` alone are written.

        start, fresh: the slots in front of the document that runs on, and of later ones.
        """
        kept, added, h = change
        kept = jnp.where(use[:, None], kept, 1)
        added = jnp.where(use[:, None], added, 0)
        size = len(use)
        same = jnp.tril(document[:, None] == document)  # [t, j]
        behind = jnp.tril(jnp.ones((size, size), bool), -1)
        between = jnp.cumprod(jnp.where(behind[..., None], kept[:, None], 1), axis=0)  # l in (j, t]
        share = jnp.where(same[..., None], between, 0) * added  # of h_j in the slots, [t, j, K]
        faded = jnp.prod(jnp.where(same[..., None], kept, 1), axis=1)  # [t, K]
        slots = dot("tjk,jv->tkv", share, h)
        for origin, mine in ((start, document == 0), (fresh, document != 0)):
            if origin is not None:
                slots = slots + jnp.where(mine[:, None], faded, 0)[..., None] * origin
        return dot("tk,tkv->tv", x.q, unit(slots)), slots[size - 1]


class LatticeMixer(ProjectionMixer):
    """q and k of unit norm over the slots, values of norm 1 at most; beta = sigmoid(W x + 4) and
    gamma = sigmoid(W x) / 2.

    key_dim: slots; None for dim / heads. objective, frozen_chunk, retraction: see the cell. The
    gates' form is our choice, as the paper's is not public.
    """

    objective: str = "decoding"
    frozen_chunk: int = 16
    retraction: bool = True

    def make_cell(self):
        return Lattice(*self.sizes(), self.objective, self.frozen_chunk, self.retraction)

    def setup(self):
        super().setup()
        self.keep = Gate(self.memories, self.std, 4.0)
        self.step = Gate(self.memories, self.std)

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project_unit(x, state, ctx)
        v = v / jnp.maximum(1, jnp.linalg.norm(widen(v), axis=-1, keepdims=True)).astype(v.dtype)
        beta, gamma = jax.nn.log_sigmoid(self.keep(x)), jax.nn.sigmoid(self.step(x)) / 2
        return Inputs(q, k, v, beta, gamma), x, state


register(
    CellSpec(
        name="lattice",
        cell=lambda: Lattice(8, 6, frozen_chunk=8),
        mixer=LatticeMixer,
        paper="Karami & Mirrokni 2025, arXiv 2504.05646",
        recurrence="sᵢ = β sᵢ + γ kᵢ (I − sᵢ sᵢᵀ)(v − Sᵀk), slots of unit norm",
        choice="what a chunk freezes, unit slots at reads, form of the gates",
        variants={
            "exact": lambda: Lattice(8, 6, frozen_chunk=1),
            "encoding": lambda: Lattice(8, 6, "encoding", frozen_chunk=5),
            "similarity": lambda: Lattice(8, 6, "similarity", frozen_chunk=8),
        },
    )
)
