"""Softmax attention over all tokens: the ring of `sliding_window` with room for every one of them.

    y_t = sum_(s <= t) softmax_s(scale q_t . k_s) v_s,   written tokens s of the document
                                                         scale = K^-1/2

Vaswani et al. 2017, arXiv 1706.03762. It tells when the tokens do not fit.
"""

import dataclasses

import jax.numpy as jnp

from memjax.cells._heads import HeadsMixer
from memjax.cells.sliding_window import SlidingWindow, without_sinks
from memjax.registry import CellSpec, register


@dataclasses.dataclass(frozen=True)
class Attention(SlidingWindow):
    """Attention to all written tokens of the document; `window` is the most that fit, and there are
    no sinks.

    A longer sequence raises ValueError. Where the count is known at run time only (decoding under
    jit), answers past the capacity are NaN.
    """

    def __post_init__(self):
        super().__post_init__()
        without_sinks(self)

    def check(self, length):
        if length > self.window:
            raise ValueError(
                f"attention: {length} tokens do not fit its capacity of {self.window}; "
                "raise the capacity, or use sliding_window"
            )

    def _given(self, y, count):
        return jnp.where((count > self.window)[..., None, None], jnp.nan, y)


class AttentionMixer(HeadsMixer):
    """Over all tokens. window: the capacity, the longest context that can be held."""

    offers = "attention"

    window: int = 2048

    @property
    def capacity(self) -> int:
        """The most tokens of a document that this layer can hold."""
        return self.window

    def make_cell(self):
        return Attention(self.size, self.size, self.window, store_dtype=self.dtype)

    def offer(self, xs, y, kept, carried):
        """Keys and values of these tokens, and the ring of those in front of them."""
        return xs.k, xs.v, carried


register(
    CellSpec(
        name="attention",
        cell=lambda: Attention(8, 6, window=512, block=16),
        mixer=AttentionMixer,
        paper="Vaswani et al. 2017, arXiv 1706.03762",
        recurrence="softmax over all tokens; the state is a ring of keys and values",
    )
)
