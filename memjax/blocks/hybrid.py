"""The hybrid block: sliding-window attention and a recurrent long-term memory in one mixer.

parallel     y = s * attention(x) + (1 - s) * memory(x),   s = sigmoid(W_s x + b) per channel
sequential   h = memory(x);  y = h + attention(norm(x + h))

The window holds the last tokens exactly, the memory holds the rest in a state of fixed size (De et
al. 2024, arXiv 2402.19427; Ren et al. 2024, arXiv 2406.07522; parallel with a gate: Behrouz et
al. 2025, arXiv 2501.00663, Sec. 4.2). The gate, a convex sum per channel that starts at one half,
is our choice. Any two mixers may stand in: `hybrid(sliding_window, gated_delta_net)`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.nn.layers import Dense, Norm
from memjax.registry import BlockSpec, register
from memjax.typing import DTypeLike

COMBINE = ("parallel", "sequential")


class Hybrid(nn.Module):
    """(x, state, ctx) -> (y, state, ctx); the state is {"attention": ..., "memory": ...}.

    inner: makers of the attention mixer and of the memory mixer, called with `name`.
    combine: "parallel" or "sequential". norm: "rms" or "layer", in front of the second mixer.
    """

    dim: int
    inner: tuple[Callable[..., nn.Module], ...] = ()
    std: float = 0.02
    out_scale: float = 1.0
    combine: str = "parallel"
    norm: str = "rms"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, state, ctx):
        if self.combine not in COMBINE:
            raise ValueError(f"combine {self.combine!r}: allowed are {', '.join(COMBINE)}")
        attention, memory = (
            make(name=name) for make, name in zip(self.inner, ("attention", "memory"), strict=True)
        )
        state = {"attention": None, "memory": None} if state is None else state
        held, memory_state, ctx = memory(x, state["memory"], ctx)
        if self.combine == "sequential":
            seen = Norm(self.norm, name="norm")(x + held)
            near, attention_state, ctx = attention(seen, state["attention"], ctx)
            y = held + near
        else:
            near, attention_state, ctx = attention(x, state["attention"], ctx)
            options = dict(std=self.std, bias=True, dtype=self.dtype)
            share = jax.nn.sigmoid(Dense((self.dim,), ("mlp",), **options, name="gate")(x))
            y = share * near + (1 - share) * held
        return y, {"attention": attention_state, "memory": memory_state}, ctx


register(
    BlockSpec(
        name="hybrid",
        mixer=Hybrid,
        arguments=(2,),
        defaults=("sliding_window", "gated_delta_net"),
        paper="De et al. 2024, arXiv 2402.19427; Behrouz et al. 2025, arXiv 2501.00663",
    )
)
