"""The elementwise linear recurrence by a kernel."""

from pallas_kernels import walks
from pallas_kernels.linear_scan.rule import RULE, WEIGHTED

NAME = "linear_scan"


def linear_scan(x, g, *, initial_state=None, reset=None, weighted=False, platform=None):
    """h_t = exp(g_t) h_{t-1} + x_t, and weighted exp(g_t) h_{t-1} + sqrt(1 - exp(2 g_t)) x_t.

    Every channel by itself. Weighted it is the RG-LRU (De et al. 2024, arXiv 2402.19427, Eq. 4),
    where the slope of the root is held below 1000, as in the authors' code.

    Args:
      x: [B, T, D], float32 or bfloat16; D best a multiple of 1024.
      g: log decay <= 0, [B, T, D], float32 or bfloat16. -inf forgets the state.
      initial_state: [B, D], taken as float32; None for zero.
      reset: bool [B, T], True where the state is forgotten before the token is added.
      weighted: whether x has the weight.
      platform: "tpu", "gpu" for H100 and H200; None for the default backend.

    Returns:
      h [B, T, D] in the dtype of x, and the last state, float32 [B, D]. Both, and the gradients,
      are those of `reference.sequential`, exact to float32 for float32. Under `jax.checkpoint` the
      names "memory_out" (what is returned) and "memory_state" (what the backward pass needs) can be
      saved, so that the forward kernel runs once. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform or dtype.
      ValueError: shapes that do not fit together.
    """
    tokens = {"x": x, "g": walks.forgetting(NAME, reset, g)}
    state = None if initial_state is None else (initial_state,)
    h, (last,) = walks.run(WEIGHTED if weighted else RULE, tokens, state, platform)
    return h, last
