"""What one layer gives to later ones, as in SambaY: a memory's answers to gates, keys and values to
other queries.

published(memory)      the memory's layer as it is; m, its answers, are given to later layers
published(attention)   the same; keys and values are given, of these tokens and of those before
gmu                    y = W_o norm(silu(W_i x) * m), the gated memory unit
cross_attention        y = W_o attention(W_q x; keys, values)

Ren et al. 2025, arXiv 2507.06607. m is what the memory answers, in front of its layer's norm, gate
and projection, with Mamba-2's skip. The norm is the authors' for memories that are matrices;
`norm="none"` is theirs for Mamba. A layer reads what the nearest layer in front of it has
published. Neither reader has a state: all cross attention reads the one cache of keys and values
that the attention layer has. The paper's prefill stops at that layer, for all tokens but the last;
here every layer runs over all tokens.
"""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cell import run
from memjax.cells._heads import Inputs
from memjax.cells.attention import Attention
from memjax.nn.layers import Context, Dense, Norm, rotary, unpublished
from memjax.nn.mixer import Mixer
from memjax.registry import BlockSpec, register
from memjax.typing import DTypeLike, PyTree


class Published(nn.Module):
    """(x, state, ctx) -> (y, state, ctx), output and state of the mixer inside. inner: one maker of
    it."""

    dim: int
    inner: tuple[Callable[..., nn.Module], ...] = ()
    std: float = 0.02
    out_scale: float = 1.0
    dtype: DTypeLike = jnp.float32

    @property
    def publishes(self) -> str:
        """The name of what later layers are given; ValueError when there is no memory inside."""
        inner = self.inner[0](parent=None)
        if not isinstance(inner, Mixer):
            raise ValueError(
                f"published needs a memory cell inside; given {type(inner).__name__}, a block. "
                "Put published inside of the block"
            )
        return inner.offers

    def published(self, batch: int, length: int, carried: bool) -> dict[str, PyTree]:
        """As `Mixer.published`."""

        def publish(x, state):
            ctx = Context(None, None, jnp.zeros((batch, length), jnp.int32))
            (_, state, ctx), _ = self.init_with_output(jax.random.key(0), x, state, ctx)
            return state, ctx.published[self.publishes][1]

        x = jax.ShapeDtypeStruct((batch, length, self.dim), self.dtype)
        state, shapes = jax.eval_shape(publish, x, None)
        if carried:
            shapes = jax.eval_shape(publish, x, state)[1]
        return {self.publishes: shapes}

    @nn.compact
    def __call__(self, x, state, ctx):
        mixer, state = self.inner[0](name="mixer", out_scale=self.out_scale), state or {}
        xs, y, kept, new = mixer.answers(x, state, ctx)
        ctx = mixer.publish(kept, ctx)
        offer = mixer.offer(xs, y, kept, state.get("memory"))
        published = {**ctx.published, self.publishes: (jnp.ones((), bool), offer)}
        return mixer.outputs(y, kept), new, ctx.replace(published=published)


def read(ctx: Context, name: str) -> PyTree:
    """What a layer in front has published; ValueError when there is none."""
    if name not in ctx.published:
        raise ValueError(unpublished(name))
    return ctx.published[name][1]


class GMU(nn.Module):
    """(x, state, ctx) -> (y, state, ctx) without a state. norm: "rms", "layer" or "none"."""

    reads: ClassVar[str] = "memory"

    dim: int
    std: float = 0.02
    out_scale: float = 1.0
    norm: str = "rms"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, state, ctx):
        m = read(ctx, self.reads)
        m = m.reshape(*x.shape[:2], -1).astype(self.dtype)
        gate = Dense((m.shape[-1],), ("mlp",), std=self.std, dtype=self.dtype, name="gate")(x)
        y = jax.nn.silu(gate) * m
        if self.norm != "none":
            y = Norm(self.norm, ("mlp",), name="norm")(y)
        std = self.std * self.out_scale
        output = Dense((self.dim,), ("embed",), ("mlp",), std=std, dtype=self.dtype, name="output")
        return output(y), {}, ctx


class CrossAttention(nn.Module):
    """(x, state, ctx) -> (y, state, ctx) without a state.

    heads: of queries, a multiple of the published heads of keys, whose width they have.
    rotary_base: that of the attention that is read. implementation: as in `memjax.run`.
    """

    reads: ClassVar[str] = "attention"

    dim: int
    heads: int = 4
    std: float = 0.02
    out_scale: float = 1.0
    rotary_base: float = 1e4
    dtype: DTypeLike = jnp.float32
    implementation: str | tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x, state, ctx):
        k, v, carried = read(ctx, self.reads)
        kv_heads, size = k.shape[2:]
        if self.heads % kv_heads:
            raise ValueError(
                f"cross_attention: heads {self.heads} must be a multiple of the {kv_heads} heads "
                "of the published keys"
            )
        axes = ("heads", None, "head_dim")
        shape, sizes = (kv_heads, self.heads // kv_heads, size), dict(dtype=self.dtype)
        q = Dense(shape, axes, std=self.std, name="query", **sizes)(x)
        if self.rotary_base:
            q = rotary(q, ctx.position, self.rotary_base)
        # the ring as the attention layer was given it; what is written into it here is dropped
        capacity = x.shape[1] if carried is None else carried.k.shape[2]
        y, _ = run(
            Attention(size, size, capacity, store_dtype=k.dtype),
            {},
            Inputs(q, k, v),
            state=carried,
            reset=ctx.reset,
            write=ctx.write,
            implementation=self.implementation,
            differentiate=ctx.differentiate,
        )
        std = self.std * self.out_scale
        output = Dense((self.dim,), ("embed",), axes, std=std, name="output", **sizes)
        return output(y), {}, ctx


SAMBAY = "Ren et al. 2025, arXiv 2507.06607"
register(
    BlockSpec(
        name="published",
        mixer=Published,
        arguments=(1,),
        defaults=("mamba2",),
        paper=SAMBAY,
    )
)
register(BlockSpec(name="gmu", mixer=GMU, paper=SAMBAY))
register(BlockSpec(name="cross_attention", mixer=CrossAttention, paper=SAMBAY))
