"""B'MOJO-F: one softmax over an exact window and, behind it, a window of a memory's outputs.

    F = memory(x);   q_i, k_j, v_j of x;   k'_j, v'_j of F by the same weights, or by their own
    y_i = softmax over  k_j, v_j    of the last W tokens, i included,
                        k'_j, v'_j  of the W tokens in front of them

Zancato et al. 2024, arXiv 2407.06324. Keys of both kinds are rotated by their own position. A
fading token j sums up tokens up to j, so that nothing is seen twice: 2 W positions are exact or
nearly so, and what lies behind them is seen through F.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax.numpy as jnp

from memjax.cells.attention import HeadsMixer, SlidingWindow, without_sinks
from memjax.nn.layers import rotary
from memjax.registry import BlockSpec, register
from memjax.typing import Array, Field, Float, Int


class Inputs(NamedTuple):
    """q: [B, T, h, G, K]; k, fading_k: [B, T, h, K]; v, fading_v: [B, T, h, V]. The answer is
    [B, T, H, G, V]."""

    q: Annotated[Array, Field("G K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]
    fading_k: Annotated[Array, Field("K", "key")]
    fading_v: Annotated[Array, Field("V", "value")]


class Ring(NamedTuple):
    """The n-th written token of a document stands in slot n mod 2 W; free slots are zero. Its own
    key and value are kept as long as the fading ones, though they are seen half as long."""

    k: Float[Array, "2W K"]
    v: Float[Array, "2W V"]
    fading_k: Float[Array, "2W K"]
    fading_v: Float[Array, "2W V"]
    written: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class FadingWindow(SlidingWindow):
    """window: W. A token that has left the window is seen by its fading key and value, as long
    again. There are no sinks."""

    inputs: ClassVar[type] = Inputs

    def __post_init__(self):
        super().__post_init__()
        without_sinks(self)

    @property
    def ages(self):
        return (0, self.window), (self.window, 2 * self.window)

    def leaves(self, x):
        return x.k, x.v, x.fading_k, x.fading_v

    def init_state(self, params):
        k, v, written = super().init_state(params)
        return Ring(k, v, jnp.zeros_like(k), jnp.zeros_like(v), written)


class BMojoF(HeadsMixer):
    """A window over tokens and over what a mixer makes of them; the state has that mixer's own,
    "fading".

    inner: one maker of that mixer, called without a name. tie: one set of weights for the keys and
    values of tokens and of F; otherwise F has its own.
    """

    inner: tuple[Callable[..., Any], ...] = ()
    tie: bool = True

    def make_cell(self):
        return FadingWindow(self.size, self.size, self.window, store_dtype=self.dtype)

    def setup(self):
        super().setup()
        self.fading = self.inner[0](out_scale=1.0)  # F does not join the residual stream
        if not self.tie:
            self.fading_key, self.fading_value = self.projection(), self.projection()

    def inputs(self, x, state, ctx):
        xs, _, new = super().inputs(x, state, ctx)
        made, new["fading"], ctx = self.fading(x, state.get("fading"), ctx)
        key, value = (self.key, self.value) if self.tie else (self.fading_key, self.fading_value)
        k, v = key(made), value(made)
        if self.rotary_base:
            k = rotary(k, ctx.position, self.rotary_base)
        return Inputs(xs.q, xs.k, xs.v, k, v), ctx, new

    def publish(self, kept, ctx):
        """What the mixer inside has published."""
        return kept


register(
    BlockSpec(
        name="bmojo_f",
        mixer=BMojoF,
        arguments=(1,),
        defaults=("gated_delta_net",),
        paper="Zancato et al. 2024, arXiv 2407.06324",
        cell=lambda: FadingWindow(8, 6, window=3, block=4),
    )
)
