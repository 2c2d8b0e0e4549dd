"""Projections of attention: queries, keys and values of heads, with rotary positions.

Vaswani et al. 2017, arXiv 1706.03762; grouped queries: Ainslie et al. 2023, arXiv 2305.13245.
"""

from typing import Annotated, NamedTuple

from memjax.nn.layers import Context, Dense, Norm, rotary
from memjax.nn.mixer import Mixer
from memjax.typing import Array, Field, Float


class Inputs(NamedTuple):
    """q: [B, T, h, G, K]; k: [B, T, h, K]; v: [B, T, h, V]. The answer is [B, T, H, G, V]."""

    q: Annotated[Array, Field("G K", "query")]
    k: Annotated[Array, Field("K", "key")]
    v: Annotated[Array, Field("V", "value")]


class HeadsMixer(Mixer):
    """Multi-head attention with rotary positions and grouped queries, bias-free.

    heads: of queries. kv_heads: of keys and values, a divisor of heads; None for as many.
    head_dim: per head; None for dim / heads. window: W. rotary_base: theta of the rotary
    embedding (Su et al. 2021), 0 for no positions. qk_norm: RMSNorm of each query and key in front
    of it (Dehghani et al. 2023, arXiv 2302.05442). A subclass defines `make_cell`.
    """

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 256
    rotary_base: float = 1e4
    qk_norm: bool = False

    @property
    def memories(self):
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """Width of one head; ValueError when dim does not divide into heads."""
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"attention: dim {self.dim} does not divide into {self.heads} heads; "
                "change heads, or set head_dim"
            )
        return self.head_dim or self.dim // self.heads

    def setup(self):
        super().setup()
        kv_heads, size = self.memories, self.size
        if self.heads % kv_heads:
            raise ValueError(
                f"attention: heads {self.heads} must be a multiple of kv_heads {kv_heads}"
            )
        grouped, dtype = ("heads", None, "head_dim"), self.dtype
        queries = kv_heads, self.heads // kv_heads, size
        self.query = Dense(queries, grouped, std=self.std, dtype=dtype)
        self.key, self.value = self.projection(), self.projection()
        if self.qk_norm:
            self.query_norm, self.key_norm = (Norm("rms", ("head_dim",)) for _ in range(2))
        std = self.std * self.out_scale
        self.output = Dense((self.dim,), ("embed",), grouped, std=std, dtype=dtype)

    def projection(self) -> Dense:
        """To keys or values [kv_heads, head_dim]."""
        shape = self.memories, self.size
        return Dense(shape, ("heads", "head_dim"), std=self.std, dtype=self.dtype)

    def inputs(self, x, state, ctx):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qk_norm:
            q = self.query_norm(q)
        return Inputs(self.rotated(q, ctx), self.keys(k, ctx), v), None, {}

    def keys(self, k: Float[Array, "B T h K"], ctx: Context) -> Float[Array, "B T h K"]:
        """Projected keys as they are kept."""
        return self.rotated(self.key_norm(k) if self.qk_norm else k, ctx)

    def rotated(self, a: Float[Array, "B T *h K"], ctx: Context) -> Float[Array, "B T *h K"]:
        """By their positions."""
        return rotary(a, ctx.position, self.rotary_base) if self.rotary_base else a

    def outputs(self, y, kept):
        return self.output(y)
