"""Memory Caching: keeps the memory as it stood at the end of each segment, and reads them all.

    y_t = gamma_t M_t(q_t) + sum_i gamma_t^i M^i(q_t),   M^i the memory behind the i-th past segment
    residual  gamma = 1
    grm       gamma = softmax over i and the running segment of u_t . m^i / sqrt(P), m^i the mean
              of the segment's keys, up to t for the running one
    soup      y_t = (gamma_t M_t + sum_i gamma_t^i M^i)(q_t): the weights are mixed, not the answers
    ssc       grm over the running segment and the k past ones with the largest u_t . m^i

Memory Caching, 2026, arXiv 2602.24281: Residual, Gated Residual Memory, Memory Soup and Sparse
Selective Caching. A segment is L written tokens of a document, and is put away when the token
behind it is written. Logarithmic segmentation keeps blocks of 1, 2, 4, .. segments instead, those
of the binary number of past segments; a block's memory is the sum of its segments' (grm of linear
attention with segments of one token: Log-Linear++).

The paper's text is not public; the equations are those that several descriptions of it agree on.
Our choice is: means of keys, up to the token itself in the running segment; u from a projection of
its own, a gate per head, scores over sqrt(P); gradients through all that is kept; softmax over the
selected segments only; the sizes. Scores are rounded to bfloat16 for the selection and the newest
of equals goes first, so that the last bits, in which forms differ, seldom decide. Past memories
are kept in N slots: the oldest is dropped, or the last slot takes the rest (logarithmic). A segment
goes on with the memory of the one before ("checkpoint": grm, soup, ssc) or begins anew
("independent": residual and logarithmic), unless `start` says otherwise.

A token reads N memories, k with ssc; in the chunked form with logarithmic segments all of them.
With resets, masks or a state the chunked form runs the inner cell twice. A soup of memories that
are not linear has no chunked form: it is trained token by token and holds N memories for each. What
is stable is the wrapped cell's own business.
"""

import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.cell import MemoryCell, contains
from memjax.nn.layers import Dense
from memjax.recurrence import dot, select
from memjax.registry import CellSpec, get, register
from memjax.typing import Array, Bool, Field, Int, fields
from memjax.wrappers._mixer import WrapperMixer
from memjax.wrappers._segments import Caches, chunked, scores

MODES = ("residual", "grm", "soup", "ssc")
STARTS = ("checkpoint", "independent")
SEGMENTATIONS = ("constant", "logarithmic")


@functools.cache
def with_gate(inputs: type) -> Any:
    """The type of a cell's inputs with one more leaf, ask [B, T, h, P]: u, the segments' query."""
    leaves: list[tuple[str, Any]] = [
        (name, Annotated[Array, field]) for name, field in fields(inputs).items()
    ]
    return NamedTuple("CachedInputs", [*leaves, ("ask", Annotated[Array, Field("P", "query")])])


@dataclasses.dataclass(frozen=True)
class MemoryCaching(MemoryCell):
    """inner: the cell whose memories are kept. mode: "residual", "grm", "soup" or "ssc". segment:
    L, written tokens. slots: N, the past memories that are kept. top: k of ssc. start:
    "checkpoint", "independent", or None for that of the mode. segmentation: "constant" or
    "logarithmic" (grm or residual of a linear memory with start "independent"). implementation:
    the form of the inner cell, as in `memjax.run`; changes speed only.
    """

    inner: MemoryCell
    mode: str = "grm"
    segment: int = 256
    slots: int = 16
    top: int = 2
    start: str | None = None
    segmentation: str = "constant"
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self):
        for name, allowed in (
            ("mode", MODES),
            ("start", (*STARTS, None)),
            ("segmentation", SEGMENTATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"memory_caching: {name} {getattr(self, name)!r}: allowed are "
                    f"{', '.join(map(str, allowed))}"
                )
        if min(self.segment, self.slots, self.top) < 1:
            raise ValueError(f"memory_caching: segment, slots and top must be >= 1; given {self}")
        kind = type(self.inner)
        if contains(self.inner, MemoryCaching):
            raise ValueError("memory_caching cannot wrap itself; take more slots")
        if self.mode == "soup" and (kind.step is not MemoryCell.step or not self._mixes()):
            raise ValueError(
                f"memory_caching: soup mixes weights, and {kind.__name__} is not read from weights "
                "alone; use grm"
            )
        if self.segmentation == "logarithmic" and (
            self.mode not in ("grm", "residual")
            or not self.inner.linear
            or not self.independent
            or self.slots > 30
        ):
            raise ValueError(
                "memory_caching: logarithmic segments are for mode grm or residual, a cell that is "
                f"read linearly, start 'independent' and at most 30 slots; given {self}"
            )

    def _mixes(self) -> bool:
        """Whether all that `read` needs are floating-point leaves."""
        cell = self.inner
        params = jax.eval_shape(lambda: cell.init_params(jax.random.key(0), 1))
        one = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), params)
        state = jax.eval_shape(lambda: cell.readable(cell.init_state(one)))
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(state))

    @property
    def inputs(self) -> Any:  # type: ignore[override]  # of this cell, not of the class
        """Those of the inner cell, and ask [B, T, h, P], the u of the equations."""
        return with_gate(self.inner.inputs)

    @property
    def independent(self) -> bool:
        """Whether a segment begins with the initial memory."""
        anew = self.mode == "residual" or self.segmentation == "logarithmic"
        return (self.start or STARTS[anew]) == "independent"

    @property
    def key(self) -> str:
        """The leaf of the inner inputs whose mean stands for a segment: the keys, or what comes
        nearest."""
        leaves = fields(self.inner.inputs).items()
        order = ("key", "exponent", "value")
        found = [name for kind in order for name, field in leaves if field.kind == kind]
        return found[0]

    def axis(self, letter):
        """P: the channels of a key, all micro-steps or memories together."""
        if letter != "P":
            return self.inner.axis(letter)
        axes = fields(self.inner.inputs)[self.key].shape.split()
        return math.prod(self.inner.axis(a) or 1 for a in axes)

    def init_params(self, key, heads):
        return self.inner.init_params(key, heads)

    def init_state(self, params):
        """The inner cell's, and free slots."""
        state, width = self.inner.init_state(params), self.axis("P")
        kept = jax.tree.map(
            lambda a: jnp.broadcast_to(a, (self.slots, *a.shape)), self.inner.readable(state)
        )
        zero, floating = jnp.zeros((), jnp.int32), jnp.zeros((width,), jnp.float32)
        keys = jnp.zeros((self.slots, width), jnp.float32)
        return Caches(state, kept, keys, floating, zero, zero)

    def sizes(self, number: Int[Array, ""]) -> Int[Array, " N"]:
        """How many segments each slot holds when there are `number` past ones."""
        slot = jnp.arange(self.slots)
        if self.segmentation == "constant":
            return (slot < number).astype(jnp.int32)
        above = number >> slot  # the last slot takes all that is left
        return jnp.where(slot < self.slots - 1, above & 1, above) << slot

    def firsts(self, number: Int[Array, ""]) -> Int[Array, " N"]:
        """The first segment in each slot, counted in the document; any number where it is free."""
        slot = jnp.arange(self.slots)
        if self.segmentation == "constant":
            return number - 1 - (number - 1 - slot) % self.slots
        return jnp.where(slot < self.slots - 1, (number >> (slot + 1)) << (slot + 1), 0)

    # ------------------------------------------------------------ token by token

    def step(self, params, state, x):
        inner, fresh = self.inner.inputs(*x[:-1]), self.inner.init_state(params)
        full = state.place == self.segment
        kept, keys = self._put_away(fresh, state, full)
        running = state.running
        if self.independent:
            running = select(full, fresh, running)
        y, running = self.inner.step(params, running, inner)
        key = getattr(inner, self.key).reshape(-1)
        total = jnp.where(full, 0, state.total) + key.astype(state.total.dtype)
        place = jnp.where(full, 0, state.place) + 1
        state = Caches(running, kept, keys, total, place, state.number + full)
        return self._answer(params, state, x, y), state

    def write(self, params, state, x):
        return self.step(params, state, x)[1]

    def read(self, params, state, x):
        y = self.inner.read(params, state.running, self.inner.inputs(*x[:-1]))
        return self._answer(params, state, x, y)

    def _put_away(self, fresh, state: Caches, full: Bool[Array, ""]):
        """The slots, and their keys, behind a segment that is put away when it is full."""
        held = (state.kept, state.keys)
        one = (self.inner.readable(state.running), state.total / self.segment)
        if self.segmentation == "constant":
            slot = state.number % self.slots
            return jax.tree.map(lambda a, b: a.at[slot].set(jnp.where(full, b, a[slot])), held, one)
        # blocks of 1, 2, .. 2^(j-1) segments and the new one become one of 2^j, as bits carry
        sizes, slot = self.sizes(state.number), jnp.arange(self.slots)
        ones = lax.population_count(state.number ^ (state.number + 1)) - 1
        target = jnp.minimum(ones, self.slots - 1)
        joined = (sizes * (slot <= target)).astype(state.keys.dtype)
        share = jnp.minimum(joined, 1)  # memories are summed, keys averaged
        empty = (self.inner.readable(fresh), jnp.zeros_like(state.total))

        def put(all, one, empty, weights, norm):
            merged = (one + dot("n,n...->...", weights, all)) / norm
            new = jnp.where(jnp.expand_dims(slot == target, range(1, all.ndim)), merged, all)
            new = jnp.where(jnp.expand_dims(slot < target, range(1, all.ndim)), empty, new)
            return jnp.where(full, new, all)

        kept = jax.tree.map(lambda a, b, c: put(a, b, c, share, 1), held[0], one[0], empty[0])
        return kept, put(held[1], one[1], empty[1], joined, 1 + jnp.sum(joined))

    def _answer(self, params, state: Caches, x, y):
        """The answer of one token, y being that of the running memory."""
        x, u = self.inner.inputs(*x[:-1]), x.ask
        mean = state.total / jnp.maximum(state.place, 1)
        there, kept, keys = self.sizes(state.number) > 0, state.kept, state.keys
        if self.mode == "ssc":
            chosen = self.choose(scores("p,np->n", u, keys), there, self.firsts(state.number))
            there, kept, keys = jax.tree.map(lambda a: a[chosen], (there, kept, keys))
        gates, own = self.gates(scores("p,np->n", u, keys), there, scores("p,p->", u, mean))
        if self.mode == "soup":
            mixed = jax.tree.map(
                lambda a, b: own * a + dot("n,n...->...", gates, b),
                self.inner.readable(state.running),
                kept,
            )
            return self.inner.read(params, mixed, x)
        answers = jax.vmap(self.inner.read, (None, 0, None))(params, kept, x)
        return own * y + dot("n,n...->...", gates, answers)

    def gates(self, logits, there, own):
        """gamma of past memories [..., N] and of the running one [...]."""
        if self.mode == "residual":
            return there.astype(logits.dtype), jnp.ones_like(own)
        logits = jnp.where(there, logits, -jnp.inf)
        gates = jax.nn.softmax(jnp.concatenate([logits, own[..., None]], axis=-1), axis=-1)
        return gates[..., :-1], gates[..., -1]

    def choose(self, logits, there, first):
        """The k memories of the largest scores, the newest of equals first: [..., k]."""
        rounded = jnp.where(there, logits, -jnp.inf).astype(jnp.bfloat16).astype(jnp.float32)
        first = jnp.broadcast_to(first, logits.shape)
        index = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
        order = lax.sort((-lax.stop_gradient(rounded), -first, index), num_keys=2)[2]
        return order[..., : self.top]

    def chunked(self, params, state, xs, reset, write):
        """See `memjax.wrappers._segments`."""
        if self.mode == "soup" and not self.inner.linear:
            raise NotImplementedError(
                f"soup of {type(self.inner).__name__} mixes weights for every token; use 'scan', "
                "or grm"
            )
        return chunked(self, params, state, xs, reset, write)


class MemoryCachingMixer(WrapperMixer):
    """Any mixer with its memory cached; u = W_u x. The options are those of the cell; the inner
    form is the inner mixer's `implementation`."""

    mode: str = "grm"
    segment: int = 256
    slots: int = 16
    top: int = 2
    start: str | None = None
    segmentation: str = "constant"

    @property
    def beside(self):  # type: ignore[override]
        """As the inner mixer."""
        return self.template.beside

    def make_cell(self):
        return MemoryCaching(
            self.template.make_cell(),
            self.mode,
            self.segment,
            self.slots,
            self.top,
            self.start,
            self.segmentation,
            self.template.implementation,
        )

    def setup(self):
        self.cell, self.wrapped = self.make_cell(), self.inner[0](out_scale=self.out_scale)
        if self.mode != "residual":
            shape = self.memories, self.cell.axis("P")
            self.ask = Dense(shape, ("heads", None), std=self.std, dtype=self.dtype)

    def inputs(self, x, state, ctx):
        xs, kept, new = self.wrapped.inputs(x, state, ctx)
        if self.mode == "residual":
            ask = jnp.zeros((*x.shape[:2], self.memories, self.cell.axis("P")), x.dtype)
        else:
            ask = self.ask(x)
        return self.cell.inputs(*xs, ask), kept, new

    def weights(self, kept):
        return self.wrapped.weights(kept)

    def readout(self, y, kept):
        """As the inner mixer."""
        return self.wrapped.readout(y, kept)

    def outputs(self, y, kept):
        return self.wrapped.outputs(y, kept)

    def publish(self, kept, ctx):
        return self.wrapped.publish(kept, ctx)


def example(inner: str = "gated_delta_net", **options: Any) -> MemoryCaching:
    """A small cell for tests, around the one that `inner` is tested with."""
    return MemoryCaching(get(inner).cell(), **{"segment": 5, "slots": 3, **options})


register(
    CellSpec(
        name="memory_caching",
        cell=example,
        mixer=MemoryCachingMixer,
        paper="Memory Caching, 2026, arXiv 2602.24281",
        recurrence="y = Σ γᵢ Mᵢ(q) over the memories at the ends of past segments and the last one",
        choice="what gates read, a gate per head, sizes",
        arguments=(1,),
        defaults=("gated_delta_net",),
        variants={
            "residual": lambda: example("linear_attention", mode="residual"),
            "soup": lambda: example("titans", mode="soup"),
            "ssc": lambda: example(mode="ssc", top=2),
            "logarithmic": lambda: example(
                "linear_attention", start="independent", segmentation="logarithmic", segment=2
            ),
            "titans": lambda: example("titans", start="independent"),
        },
    )
)
