"""Titans' ways of joining a window with a long-term memory: as a gate and as a layer.

mag   o = norm(attention(x)) * sigmoid(norm(memory(x)))
mal   o = attention(memory(x))

Behrouz et al. 2024, arXiv 2501.00663, Sec. 4.2 and 4.3, Eq. 26-31. The form of the gate, RMSNorm
with learned weights on both sides and a sigmoid, is our choice. The paper's persistent tokens, in
front of every document, are the window's `persistent` keys and values; in front of the memory they
are what it has learned to start with (M_0), our choice. Without parentheses `mag` and `mal` are
over sliding_window and titans.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.nn.layers import Norm
from memjax.registry import BlockSpec, register
from memjax.typing import DTypeLike


class Pair(nn.Module):
    """(x, state, ctx) -> (y, state, ctx); the state is {"attention": ..., "memory": ...}.

    inner: makers of the attention mixer and of the memory mixer, called with `name`.
    """

    dim: int
    inner: tuple[Callable[..., nn.Module], ...] = ()
    std: float = 0.02
    out_scale: float = 1.0
    dtype: DTypeLike = jnp.float32


class MAG(Pair):
    """Memory as a gate."""

    @nn.compact
    def __call__(self, x, state, ctx):
        state = {"attention": None, "memory": None} if state is None else state
        attention, memory = self.inner
        near, near_state, ctx = attention(name="attention")(x, state["attention"], ctx)
        held, held_state, ctx = memory(name="memory")(x, state["memory"], ctx)
        gate = jax.nn.sigmoid(Norm(name="memory_norm")(held))
        y = Norm(name="attention_norm")(near) * gate
        return y, {"attention": near_state, "memory": held_state}, ctx


class MAL(Pair):
    """Memory as a layer."""

    @nn.compact
    def __call__(self, x, state, ctx):
        state = {"attention": None, "memory": None} if state is None else state
        attention, memory = self.inner
        # what the memory gives does not join the residual stream
        held, held_state, ctx = memory(name="memory", out_scale=1.0)(x, state["memory"], ctx)
        y, near_state, ctx = attention(name="attention")(held, state["attention"], ctx)
        return y, {"attention": near_state, "memory": held_state}, ctx


for name, mixer in (("mag", MAG), ("mal", MAL)):
    register(
        BlockSpec(
            name=name,
            mixer=mixer,
            arguments=(2,),
            defaults=("sliding_window", "titans"),
            paper="Behrouz et al. 2024, arXiv 2501.00663",
        )
    )
