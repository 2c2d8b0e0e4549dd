"""RWKV-4's recurrence by a kernel."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import walks
from pallas_kernels.wkv4.rule import RULE

NAME = "wkv4"


def wkv4(v, k, w, u, *, initial_state=None, reset=None, platform=None):
    """y_t = (sum_{i<t} e^(k_i + w_{i+1} + ... + w_{t-1}) v_i + e^(u_t + k_t) v_t) / (.. without v).

    Every channel by itself: RWKV-4's average of the past values of a document (Peng et al. 2023,
    arXiv 2305.13048, Eq. 14), where w and u are the same for all tokens.

    Args:
      v: [B, T, D], float32 or bfloat16; D best a multiple of 1024.
      k: exponent of a token's weight, [B, T, D]. One with -2^126 or less changes
        nothing and is answered with the average of what is in front of it.
      w: log decay <= 0, [B, T, D]; -inf as a reset.
      u: what is added to k in the token's own answer, [B, T, D].
      initial_state: (p, q, o), [B, D] each, e^o p the sum of e^k v and e^o q that of e^k, both
        decayed to the last token; None for nothing, which is (0, 0, -2^126).
      reset: bool [B, T], True at the first token of a document.
      platform: "tpu", "gpu" for H100 and H200; None for the default backend.

    Returns:
      y [B, T, D] in the dtype of v, and the last state, float32. Both, and the gradients, are those
      of `reference.sequential`, exact to float32 for float32. Names for `jax.checkpoint` as in
      `linear_scan`. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform or dtype.
      ValueError: shapes that do not fit together.
    """
    tokens = {"v": v, "k": k, "w": walks.forgetting(NAME, reset, w), "u": u}
    if initial_state is not None:
        p, q, o = initial_state
        grown = jnp.exp(o - lax.stop_gradient(o))  # 1, and the slope that p and q have through o
        initial_state = grown * p, grown * q, o
    y, (p, q, o) = walks.run(RULE, tokens, initial_state, platform)
    shrunk = jnp.exp(lax.stop_gradient(o) - o)
    return y, (shrunk * p, shrunk * q, o)
