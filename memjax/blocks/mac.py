"""Titans' memory as a context: attention within a segment, with what the memory says of each token.

    h_i = M_(s-1)(x_i)                      the memory behind the previous segment, read only
    y_i = attention of x_i over persistent tokens, h_j and x_j of its segment, j <= i
    o_i = norm(y_i) * sigmoid(norm(M(y_i)))   the memory goes on with y

Behrouz et al. 2024, arXiv 2501.00663, Sec. 4.1, Eq. 21-25. A segment is C written tokens, counted
from a document's start. In the paper's figure all h of a segment are a prefix that every token
sees; h_j depends on x_j, so that the past would see the future: a token sees those up to its own,
our choice. So is: h is what the memory's layer answers to a token that is not written; h and x go
through the same projections, at the same position, and queries and keys are normed; M(y_i) is read
when y_i is written; the form of the gate; persistent tokens are learned keys and values.

Not the paper's: `written="tokens"` writes the memory with x_i and reads M(x_i), so that the
attention's answers cannot blur it (compared in experiments/hybrid_recall).

Segments follow one another, the tokens of one are handled together. Where a batch has documents
that begin or segments that end inside of a window of C tokens, the window is gone through twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax import spans
from memjax.blocks.bmojo import FadingWindow, Inputs
from memjax.cells._heads import HeadsMixer
from memjax.nn.layers import Context, Norm
from memjax.recurrence import from_chunks, phase_split, select, to_chunks
from memjax.registry import BlockSpec, is_cell, register
from memjax.typing import Array, DTypeLike, Float, PyTree


@dataclasses.dataclass(frozen=True)
class Segment(FadingWindow):
    """window: C. A token sees both keys of the tokens of its segment, its own included, and the
    persistent ones."""

    @property
    def ages(self):
        return (0, self.window), (0, self.window)

    def lowest(self, high, origin):
        begun = (high - origin) // self.window * self.window
        return jnp.maximum(origin + jnp.maximum(begun, 0), 0)


class SegmentMixer(HeadsMixer):
    """Attention of tokens x and of what the memory says of them, h: [B, T, 2 D]."""

    persistent: int = 0

    def make_cell(self):
        sizes = self.size, self.size, self.window
        return Segment(*sizes, store_dtype=self.dtype, persistent=self.persistent)

    def inputs(self, x, state, ctx):
        x, held = jnp.split(x, 2, axis=-1)
        xs, kept, new = super().inputs(x, state, ctx)
        k, v = self.keys(self.key(held), ctx), self.value(held)
        return Inputs(xs.q, xs.k, xs.v, k, v), kept, new


WRITTEN = ("answers", "tokens")


class MAC(nn.Module):
    """(x, state, ctx) -> (y, state, ctx); the state has those of the attention and the memory, and
    "base", the memory's in front of the running segment.

    inner: one maker of a memory's mixer. segment: C. persistent: learned keys and values. written:
    what the memory goes on with, the attention's "answers" (the paper's) or the "tokens". heads,
    rotary_base: of the attention, as in `HeadsMixer`.
    """

    dim: int
    inner: tuple[Callable[..., nn.Module], ...] = ()
    std: float = 0.02
    out_scale: float = 1.0
    segment: int = 64
    persistent: int = 4
    written: str = "answers"
    heads: int = 4
    rotary_base: float = 1e4
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.written not in WRITTEN:
            raise ValueError(f"mac: written {self.written!r}: allowed are {', '.join(WRITTEN)}")
        if self.segment < 1 or self.persistent < 0 or self.heads < 1 or self.dim % self.heads:
            raise ValueError(
                f"mac: segment must be at least 1, persistent at least 0, heads a divisor of dim "
                f"{self.dim}; given {self.segment}, {self.persistent}, {self.heads}"
            )
        # neither joins the residual stream
        self.memory = self.inner[0](out_scale=1.0)
        check_memory(self.memory)
        self.attention = SegmentMixer(
            self.dim,
            self.std,
            dtype=self.dtype,
            heads=self.heads,
            window=self.segment,
            rotary_base=self.rotary_base,
            qk_norm=True,  # the scale of h is not bounded, see `memjax.blocks.bmojo`
            persistent=self.persistent,
        )
        self.attention_norm, self.memory_norm = Norm(), Norm()

    def __call__(self, x, state, ctx):
        spans.whole(x, "mac")
        aligned = state is None and ctx.reset is None and ctx.write is None
        _, fresh, _ = self.memory(x[:, :1], None, reads(part(ctx, slice(0, 1))))
        if state is None:
            _, near, _ = self.attend(x[:, :1], x[:, :1], None, reads(part(ctx, slice(0, 1))))
            state = {"attention": near, "memory": fresh, "base": fresh}
        length = x.shape[1]
        size = min(self.segment, length)
        step = functools.partial(MAC.window, aligned=aligned, fresh=fresh, ctx=ctx)
        if length == size:
            state, y = step(self, state, (x, ctx.reset, ctx.write, ctx.position))
            return y, state, ctx
        write = ctx.write
        if write is None and length % size:
            write = jnp.ones(x.shape[:2], bool)
        leaves = x, ctx.reset, write, ctx.position
        windows = jax.tree.map(
            lambda a: jnp.swapaxes(jax.vmap(lambda one: to_chunks(one, size))(a), 0, 1), leaves
        )
        if self.is_initializing():
            state, _ = step(self, state, jax.tree.map(lambda a: a[0], windows))
            return x, state, ctx
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        state, y = scan(self, state, windows)
        y = jax.vmap(lambda one: from_chunks(one, length), 1)(y)
        return y, state, ctx

    def window(self, state: dict, inputs, *, aligned: bool, fresh: PyTree, ctx: Context):
        """At most C tokens of each sequence; `aligned` when they are a segment."""
        x, reset, write, position = inputs
        ctx = ctx.replace(reset=reset, write=write, position=position)
        held, near = state["memory"], state["attention"]
        if x.shape[1] == 1 and reset is not None:  # a border of documents cannot be inside
            held = select(reset[:, 0], fresh, held)
        place = position[:, 0] % self.segment
        base = select(place == 0, held, state["base"])
        told = self.memory.consult(x, base, ctx.replace(reset=None))
        y, after, _ = self.attend(x, told, near, ctx)
        if aligned or x.shape[1] == 1:
            if x.shape[1] == 1 and write is not None:  # nothing changes that is not written
                old = state["base"] if reset is None else select(reset[:, 0], fresh, state["base"])
                base = select(write[:, 0], base, old)
            m, held, _ = self.memory(self.fed(x, y), held, ctx.replace(reset=None))
            return {"attention": after, "memory": held, "base": base}, self.gated(y, m)
        written = jnp.ones(x.shape[:2], bool) if write is None else write
        phases = jax.vmap(functools.partial(phase_split, self.segment))(place, reset, written)
        first = ctx.replace(reset=None, write=phases.first)
        m, border, _ = self.memory(self.fed(x, y), held, first)

        def behind(block, y, after, m, held):
            """The same behind the border."""
            later = block.memory.consult(x, held, ctx)
            both = jnp.where(phases.before[..., None], told, later)
            y, after, _ = block.attend(x, both, near, ctx)
            second = ctx.replace(write=phases.second)
            late, held, _ = block.memory(block.fed(x, y), held, second)
            return y, after, jnp.where(phases.before[..., None], m, late), held

        given = y, after, m, border
        if self.is_initializing():
            y, after, m, held = behind(self, *given)
        else:
            needed = ~jnp.all(phases.before)
            y, after, m, held = nn.cond(needed, behind, lambda _, *same: same, self, *given)
        base = jax.vmap(type(phases).base)(phases, state["base"], base, border, fresh)
        return {"attention": after, "memory": held, "base": base}, self.gated(y, m)

    def attend(
        self, x: Float[Array, "B T D"], told: Float[Array, "B T D"], near: PyTree, ctx: Context
    ):
        """The attention over tokens and what the memory says of them."""
        return self.attention(jnp.concatenate([x, told], axis=-1), near, ctx)

    def fed(self, x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the memory goes on with."""
        return y if self.written == "answers" else x

    def gated(self, y: Float[Array, "B T D"], m: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """o of the module's docstring."""
        return self.attention_norm(y) * jax.nn.sigmoid(self.memory_norm(m))


def reads(ctx: Context) -> Context:
    """The same tokens of one document, none of which is written."""
    return ctx.replace(reset=None, write=jnp.zeros_like(ctx.position, bool))


def part(ctx: Context, span: slice) -> Context:
    """These tokens alone."""
    reset, write = (None if a is None else a[:, span] for a in (ctx.reset, ctx.write))
    return ctx.replace(reset=reset, write=write, position=ctx.position[:, span])


def check_memory(memory: Any) -> None:
    """ValueError for what has no state of a memory, or speaks to other layers."""
    parts = [memory]
    while hasattr(parts[-1], "template"):  # of a wrapper
        parts.append(parts[-1].template)
    speaks = [part.published(1, 1, False) or part.reports_loss for part in parts if is_cell(part)]
    if not is_cell(memory) or any(speaks):
        raise ValueError(
            f"mac needs a memory cell that publishes nothing; given {type(memory).__name__}. Use "
            "titans, gated_delta_net or another cell"
        )


register(
    BlockSpec(
        name="mac",
        mixer=MAC,
        arguments=(1,),
        defaults=("titans",),
        paper="Behrouz et al. 2024, arXiv 2501.00663",
        cell=lambda: Segment(8, 6, window=3, block=4, persistent=2),
    )
)
