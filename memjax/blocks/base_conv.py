"""BaseConv: a gated short convolution, the first layer of the small recall models.

    y_t = conv_3(x)_t * (W x_t + b) + x_t

Arora et al. 2023, arXiv 2312.04927, Sec. 4. It has no memory beyond the convolution's tail of two
inputs; it shows the next layer each token together with the one before it.
"""

import flax.linen as nn
import jax.numpy as jnp

from memjax.nn.layers import Dense, ShortConvolution
from memjax.registry import BlockSpec, register
from memjax.typing import DTypeLike


class BaseConv(nn.Module):
    """(x, state, ctx) -> (y, state, ctx); the state is {"convolution": [B, width - 1, D]}."""

    dim: int
    std: float = 0.02
    out_scale: float = 1.0
    width: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, state, ctx):
        convolution = ShortConvolution(
            self.width, activation=None, bias=True, dtype=self.dtype, name="short_convolution"
        )
        past, tail = convolution(x, None if state is None else state["convolution"], ctx)
        std = self.std * self.out_scale
        gate = Dense((self.dim,), ("mlp",), std=std, bias=True, dtype=self.dtype, name="gate")(x)
        return past * gate + x, {"convolution": tail}, ctx


register(BlockSpec(name="base_conv", mixer=BaseConv, paper="Arora et al. 2023, arXiv 2312.04927"))
