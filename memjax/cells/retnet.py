"""RetNet: linear attention whose memory fades at a fixed rate, another one for each head.

    S_t = gamma_h S_{t-1} + k_t v_t^T,   gamma_h = 1 - 2^(-5-h), h = 0 .. H-1
    y_t = scale S_t^T q_t                                       scale = K^-1/2

Sun et al. 2023, arXiv 2307.08621, Eq. 6 and 8. The cell is `SimpleGLA` with a constant g = log
gamma_h. The paper's row-sum stabilisers are left out: the output norm per head takes their place.
"""

import jax.numpy as jnp

from memjax.cells.simple_gla import Inputs, SimpleGLA
from memjax.nn.layers import rotary
from memjax.nn.mixer import ProjectionMixer
from memjax.registry import CellSpec, register


class RetNetMixer(ProjectionMixer):
    """Rotary queries and keys, no convolution, output RMSNorm gated by SiLU.

    rotary_base: theta of the rotary embedding, 0 for no positions.
    """

    convolution: int = 0
    gate: str = "silu"
    rotary_base: float = 1e4

    def make_cell(self):
        return SimpleGLA(*self.sizes())

    def inputs(self, x, state, ctx):
        q, k, v, state = self.project(x, state, ctx)
        if self.rotary_base:
            q, k = (rotary(a, ctx.position, self.rotary_base) for a in (q, k))
        g = jnp.log1p(-(2.0 ** (-5 - jnp.arange(self.memories, dtype=jnp.float32))))
        return Inputs(q, k, v, jnp.broadcast_to(g, (*x.shape[:2], self.memories))), x, state


register(
    CellSpec(
        name="retnet",
        cell=lambda: SimpleGLA(8, 6),
        mixer=RetNetMixer,
        paper="Sun et al. 2023, arXiv 2307.08621",
        recurrence="simple_gla with a fixed g for each head",
    )
)
