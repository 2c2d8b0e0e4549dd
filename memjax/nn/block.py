"""One layer of a model: a token mixer and a channel mixer, each behind a norm, each residual."""

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.axes import constrain
from memjax.nn.layers import Context, Dense, Norm
from memjax.registry import ChannelSpec, register
from memjax.typing import Array, DTypeLike, Float, PyTree


class SwiGLU(nn.Module):
    """W_2 (SiLU(W_1 x) * W_3 x) (Shazeer 2020, arXiv 2002.05202), bias-free; has no state."""

    dim: int
    hidden: int
    std: float = 0.02
    out_scale: float = 1.0
    dtype: DTypeLike = jnp.float32
    activation: ClassVar[Callable] = staticmethod(jax.nn.silu)

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], state: None, ctx: Context):
        wide = functools.partial(Dense, (self.hidden,), ("mlp",), std=self.std, dtype=self.dtype)
        gate, up = wide(name="gate")(x), wide(name="up")(x)
        std = self.std * self.out_scale
        down = Dense((self.dim,), ("embed",), ("mlp",), std=std, dtype=self.dtype, name="down")
        return down(self.activation(gate) * up), None, ctx


class GeGLU(SwiGLU):
    """The same with GELU, in the approximation by tanh."""

    activation = staticmethod(jax.nn.gelu)


for name, mixer in (("swiglu", SwiGLU), ("geglu", GeGLU)):
    register(ChannelSpec(name=name, mixer=mixer, paper="Shazeer 2020, arXiv 2002.05202"))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel(norm(x)).

    mixer, channel: makers of the two modules, called with `name`; channel may be None.
    The state is {"mixer": ..., "channel": ...}.
    """

    mixer: Callable[..., nn.Module]
    channel: Callable[..., nn.Module] | None
    norm: str = "rms"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], state: dict[str, PyTree] | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict[str, PyTree], Context]:
        state = {"mixer": None, "channel": None} if state is None else state
        new = {"channel": None}
        normed = Norm(self.norm, name="mixer_norm")(x)
        y, new["mixer"], ctx = self.mixer(name="mixer")(normed, state["mixer"], ctx)
        x = x + y
        if self.channel is not None:
            normed = Norm(self.norm, name="channel_norm")(x)
            y, new["channel"], ctx = self.channel(name="channel")(normed, state["channel"], ctx)
            x = x + y
        x = constrain(x, "batch", "seq", None)
        return x, new, ctx.replace(layer=ctx.layer + 1)
