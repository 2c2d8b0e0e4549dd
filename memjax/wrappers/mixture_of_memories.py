"""Mixture of Memories: a router sends each token to a few of several memories.

    p_t = softmax(W_r x_t);   the k largest, divided by their sum, are w_t, the others 0
    memory i is written where w_t^i > 0, and stays as it is elsewhere
    y_t = sum_i w_t^i M_t^i(q_t^i) (+ M_t^s(q_t^s), a shared memory that every token writes)

Du et al. 2025, arXiv 2502.13685, Eq. 5-8, over any memory; the paper's is Gated DeltaNet. Memories
have keys, values, decays and strengths of their own and share queries, short convolution and output
layers. The short convolution of a memory sees the tokens of its document that are routed to it.

All memories run over all tokens with a write mask: M / k times the work of the routed ones alone,
in any form of the inner cell. It is stable where the inner cell is.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta
from jax import lax

from memjax.cell import MemoryCell, contains, initial_state, run
from memjax.nn.layers import Context, Dense, widen
from memjax.recurrence import accumulator_dtype, dot, memories, promote, select
from memjax.registry import CellSpec, get, register
from memjax.typing import Array, Field, Float, PyTree, fields
from memjax.wrappers._mixer import WrapperMixer


@functools.cache
def with_router(inputs: type) -> Any:
    """The inputs of m memories: leaves [B, T, h, m, ...]; gates [B, T, h, m] in [0, 1], the weights
    of their answers. A memory whose gate is 0 is not written."""
    leaves: list[tuple[str, Any]] = []
    for name, field in fields(inputs).items():
        field = dataclasses.replace(field, shape=f"m {field.shape}")
        leaves.append((name, Annotated[Array, field]))
    return NamedTuple(
        "MixedInputs", [*leaves, ("gates", Annotated[Array, Field("m", "query_rate")])]
    )


@dataclasses.dataclass(frozen=True)
class MixtureOfMemories(MemoryCell):
    """State: that of m inner cells, leaves [m, ...]. inner: the cell. number: m, a shared memory
    counted, whose gate is always 1. implementation: the form of the inner cell, as in
    `memjax.run`; changes speed only."""

    inner: MemoryCell
    number: int = 5
    implementation: str | tuple[str, ...] | None = None

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"mixture_of_memories: number must be at least 1; given {self}")
        if contains(self.inner, MixtureOfMemories):
            raise ValueError("mixture_of_memories cannot wrap itself; take more memories")

    @property
    def inputs(self) -> Any:  # type: ignore[override]  # of this cell, not of the class
        """Those of m inner cells, and gates [B, T, h, m]."""
        return with_router(self.inner.inputs)

    @property
    def routes(self) -> bool:
        """By the gates."""
        return True

    @property
    def linear(self) -> bool:
        """As the inner cell."""
        return self.inner.linear

    def readable(self, state):
        """What the inner cells need."""
        return self.inner.readable(state)

    def axis(self, letter):
        """m: the memories."""
        return self.number if letter == "m" else self.inner.axis(letter)

    def init_params(self, key, heads):
        """Leaves [H, m, ...]."""
        flat = self.inner.init_params(key, heads * self.number)
        return jax.tree.map(lambda a: a.reshape(heads, self.number, *a.shape[1:]), flat)

    def init_state(self, params):
        """m initial states."""
        return jax.vmap(self.inner.init_state, axis_size=self.number)(params)

    def step(self, params, state, x):
        inner, written = self.inner.inputs(*x[:-1]), x.gates > 0
        answers, new = jax.vmap(self.inner.step)(params, state, inner)
        kept = jax.vmap(self.inner.read)(params, state, inner)
        answers = select(written, answers, kept)
        return dot("m,m...->...", x.gates, answers), select(written, new, state)

    def write(self, params, state, x):
        return self.step(params, state, x)[1]

    def read(self, params, state, x):
        answers = jax.vmap(self.inner.read)(params, state, self.inner.inputs(*x[:-1]))
        return dot("m,m...->...", x.gates, answers)

    def chunked(self, params, state, xs, reset, write):
        """m H memories of the inner cell in any of its forms, each with a write mask."""
        output, heads = jax.tree.leaves(xs)[0].dtype, memories(params, state, xs)
        params, state, inner, gates, write = self._flat(params, state, xs, write)
        y, new = run(
            self.inner,
            params,
            inner,
            state=state,
            reset=reset,
            write=write,
            implementation=self.implementation,
        )
        y = dot("bthm,bthm...->bth...", gates, self._split(y, 2, heads))
        return y.astype(output), self._split(new, 1, heads)

    @property
    def folds(self) -> bool:
        """As the inner cell."""
        return self.inner.folds

    def fold(self, params, state, xs, reset, write):
        """Those of m H memories of the inner cell, each with a write mask."""
        heads = memories(params, state, xs)
        params, state, inner, _, write = self._flat(params, state, xs, write)
        return self._split(self.inner.fold(params, state, inner, reset, write), 1, heads)

    def compose(self, later, earlier):
        """Memory by memory."""
        return jax.vmap(self.inner.compose)(later, earlier)

    def _flat(self, params, state, xs, write):
        """Weights, state and inputs of m H memories of the inner cell, gates [B, T, H, m], and
        which tokens are written, [B, T, m H]."""
        dtype, heads = accumulator_dtype(params, state, xs), memories(params, state, xs)
        batch, length = jax.tree.leaves(xs)[0].shape[:2]
        params, xs = promote((params, xs), dtype)
        state = initial_state(self, params, batch, heads, dtype) if state is None else state

        def flat(tree, axis):  # the heads that share an input stay neighbours
            def join(leaf):
                leaf = jnp.swapaxes(leaf, axis, axis + 1)
                return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])

            return jax.tree.map(join, tree)

        gates = jnp.repeat(xs.gates, heads // xs.gates.shape[2], axis=2)
        written = gates > 0
        if write is not None:
            given = write.reshape(batch, length, -1)
            given = jnp.repeat(given, heads // given.shape[2], axis=2)
            written = written & given[..., None]
        inner = self.inner.inputs(*xs[:-1])
        return flat(params, 0), flat(state, 1), flat(inner, 2), gates, flat(written, 2)

    def _split(self, tree, axis, heads):
        """m H memories as [H, m]."""

        def part(leaf):
            leaf = leaf.reshape(*leaf.shape[:axis], self.number, heads, *leaf.shape[axis + 1 :])
            return jnp.swapaxes(leaf, axis, axis + 1)

        return jax.tree.map(part, tree)


# What memories share of the inner mixer, by the names of its layers or parameters.
SHARED = ("query", "short_convolution", "A_log", "dt_bias", "output", "output_norm", "output_gate")


def part(params: PyTree, names: Sequence[str], named: bool) -> PyTree:
    """Those parameters of a mixer on whose path one of `names` stands, or the others."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if bool(set(names) & set(path)) == named}
    )


def merge(shared: PyTree, own: PyTree) -> PyTree:
    """All parameters of a mixer."""
    flat = traverse_util.flatten_dict(shared) | traverse_util.flatten_dict(own)
    return traverse_util.unflatten_dict(flat)


class Kept(NamedTuple):
    """inner: what the inner mixer keeps for its output, of the shared memory or the first, and
    params: its parameters. memory: the cell's own weights [H, m, ...]. loss: see `balance`."""

    inner: PyTree
    params: PyTree
    memory: PyTree
    loss: Float[Array, ""]


class MixtureOfMemoriesMixer(WrapperMixer):
    """Any mixer with several memories behind a router.

    routed: memories that the router chooses from. top: k. shared: one more memory for all tokens.
    balance: weight of the load-balancing loss, which the trainer adds to its own: sum_e f_e p_e
    times their number, with f_e how often memory e is chosen by a token (k in all) and p_e its mean
    probability; k when the load is even (Fedus et al. 2021, arXiv 2101.03961, Eq. 4). It is summed
    over layers; the paper's code takes the two means over all layers together. With
    config.accumulate it is that of each piece of the batch.

    What the inner layer puts beside its memory's answers (a gate, Mamba-2's D x) is computed once,
    from the shared memory's inputs; without a shared memory such layers are refused.
    """

    reports_loss = True

    routed: int = 4
    top: int = 2
    shared: bool = True
    balance: float = 0.01

    def make_cell(self):
        if not 1 <= self.top <= self.routed:
            raise ValueError(
                f"mixture_of_memories: top must be from 1 to routed = {self.routed}; given "
                f"{self.top}"
            )
        inner = self.template
        if inner.beside and not self.shared:
            raise ValueError(
                f"mixture_of_memories: {type(inner).__name__} puts {', '.join(inner.beside)} "
                "beside its memory's answers; set shared=True"
            )
        return MixtureOfMemories(inner.make_cell(), self.number, inner.implementation)

    @property
    def number(self) -> int:
        """Memories, the shared one counted."""
        return self.routed + self.shared

    def setup(self):
        self.cell = self.make_cell()
        wide = jnp.promote_types(self.dtype, jnp.float32)
        self.router = Dense((self.routed,), (None,), std=self.std, dtype=wide)

    @nn.compact
    def inputs(self, x, state, ctx):
        inner = self.template
        names = (*SHARED, *inner.beside)

        def init(key):  # one token is enough
            one = jax.tree.map(lambda a: a[:, :1] if jnp.ndim(a) > 1 else a, ctx)
            return inner.init(key, x[:, :1], None, one)["params"]

        def init_own(key):
            every = jax.vmap(init)(jax.random.split(key, self.number))
            return meta.add_axis(part(every, names, False), 0, {nn.PARTITION_NAME: None})

        shared = self.param("shared", lambda key: part(init(key), names, True))
        own = self.param("memories", init_own)
        gates, loss = self.route(x, ctx)

        def one(own, gate, state):
            written = gate > 0 if ctx.write is None else (gate > 0) & ctx.write
            params = {"params": merge(shared, own)}
            given = x, state, ctx.replace(write=written)
            xs, kept, new = inner.apply(params, *given, method="inputs")
            return xs, kept, new, inner.apply(params, kept, method="weights")

        carried = {name: leaf for name, leaf in state.items() if name != "memory"}
        every = jax.vmap(one, in_axes=(0, 2, 1), out_axes=(3, 0, 1, 1))
        xs, kept, new, memory = every(own, gates, carried)
        which = self.number - 1 if self.shared else 0
        kept, params = jax.tree.map(lambda a: a[which], (kept, own))
        xs = self.cell.inputs(*xs, gates[:, :, None])
        return xs, Kept(kept, merge(shared, params), memory, loss), new

    def route(
        self, x: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T m"], Float[Array, ""]]:
        """The gates of all memories, and the load-balancing loss of the written tokens."""
        p = jax.nn.softmax(self.router(widen(x)), axis=-1)
        chosen = jnp.sum(jax.nn.one_hot(lax.top_k(p, self.top)[1], self.routed), axis=-2)
        gates = p * chosen / jnp.sum(p * chosen, axis=-1, keepdims=True)
        if self.shared:
            gates = jnp.concatenate([gates, jnp.ones_like(gates[..., :1])], axis=-1)
        written = jnp.ones(x.shape[:2], bool) if ctx.write is None else ctx.write
        number = jnp.maximum(jnp.sum(written), 1)
        often, mean = (
            jnp.sum(jnp.where(written[..., None], a, 0), axis=(0, 1)) / number for a in (chosen, p)
        )
        return gates, self.routed * jnp.sum(often * mean)

    def weights(self, kept):
        return kept.memory

    def readout(self, y, kept):
        """As the inner mixer."""
        return self.template.apply({"params": kept.params}, y, kept.inner, method="readout")

    def outputs(self, y, kept):
        return self.template.apply({"params": kept.params}, y, kept.inner, method="outputs")

    def publish(self, kept, ctx):
        ctx = self.template.apply({"params": kept.params}, kept.inner, ctx, method="publish")
        return ctx.replace(losses=ctx.losses + self.balance * kept.loss)


def example(inner: str = "gated_delta_net", number: int = 3) -> MixtureOfMemories:
    """A small cell for tests, around the one that `inner` is tested with."""
    return MixtureOfMemories(get(inner).cell(), number)


register(
    CellSpec(
        name="mixture_of_memories",
        cell=example,
        mixer=MixtureOfMemoriesMixer,
        paper="Du et al. 2025, arXiv 2502.13685",
        recurrence="y = Σ wᵢ Mᵢ(q) over the k memories of a token, which alone are written",
        choice="masks instead of packing, balance summed over layers",
        arguments=(1,),
        defaults=("gated_delta_net",),
        variants={"titans": lambda: example("titans")},
    )
)
