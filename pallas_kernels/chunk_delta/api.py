"""The delta rule by a kernel: checks, padding, and the choice of blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common, decays

NAME = "chunk_delta"
LEAST = 2.0**-100  # of beta, by which its gradient divides what was written


def chunk_delta(
    q, k, v, beta, *, g=None, initial_state=None, reset=None, scale=None, chunk=None, platform=None
):
    """P_t = exp(g_t) S_{t-1}, S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T, o_t = scale S_t^T q_t.

    DeltaNet (Schlag et al. 2021, arXiv 2102.11174; in chunks: Yang et al. 2024, arXiv 2406.06484);
    with a decay for each head Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, Eq. 10), with one
    for each channel KDA (Kimi Team 2025, arXiv 2510.26692).

    Args:
      q, k: [B, T, h, K], h dividing H; head i of H takes head i h // H. K 64, 128 or 256. A
        contraction for unit-norm keys.
      v: [B, T, H, V], V 64, 128 or 256. All three float32 or all bfloat16.
      beta: [B, T, H], 0 to 2, taken as float32; what is below 2^-100 is 2^-100, or for a
        decay of each channel on GPUs, below 2^-80, 2^-80.
      g: log decay <= 0, taken as float32: [B, T, H] for each head, [B, T, H, K] for each row of
        S; None for no decay.
      initial_state: [B, H, K, V], finite; None for zero.
      reset: bool [B, T], True where the state is emptied before the token is written.
      scale: a Python number; None for K ** -0.5.
      chunk: tokens in a chunk, 16, 32, 64 or 128, on GPUs 64; None chooses. Changes speed only.
      platform: "tpu", or with its generation, such as "tpu v5e", without which blocks fit a v4;
        "gpu" for H100 and H200; None for the default backend.

    Returns:
      o [B, T, H, V] in the dtype of v, and the last state, float32 [B, H, K, V], on GPUs for K 256
      rounded to two bfloat16 parts in each chunk, 2^-17. Both, and the
      gradients, are those of `reference.sequential`, exact to float32 for float32. Under
      `jax.checkpoint` the names "memory_out" (what is returned) and "memory_state" (what the
      backward pass needs) can be saved, so that the forward kernel runs once. There is no
      forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape or chunk.
      ValueError: shapes that do not fit together.
    """
    size_of = functools.partial(
        common.vmem,
        width=q.shape[-1],
        size=v.shape[-1],
        like=v,
        states=28,
        pairs=41 if v.dtype == jnp.float32 else 16,
        logs=0 if g is None or g.ndim == 3 else 34,
    )
    given = ({"q": q, "k": k}, v, g, initial_state, reset, scale, chunk, platform)
    call = common.call(NAME, *given, size_of=size_of, beta=beta)
    beta = common.padded(beta.astype(jnp.float32), call.static.chunk)
    o, state = _op(call.static, *call.arrays[:3], beta, *call.arrays[3:])
    return checkpoint_name((o[:, : v.shape[1]], state), "memory_out")


def _columns(beta, static):
    return common.by_chunk(jnp.maximum(beta, LEAST), static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, q, k, v, beta, g, reset, initial):
    return _forward(static, q, k, v, beta, g, reset, initial, keep=False)[:2]


def _forward(static, q, k, v, beta, g, reset, initial, keep):
    decaying, columns = decays.arrays(g, reset, static), _columns(beta, static)
    forward, _ = common.kernels(NAME, static, g)
    return forward(q, k, v, columns, decaying, initial, keep=keep, **static.options())


def _op_forward(static, q, k, v, beta, g, reset, initial):
    o, final, *kept = _forward(static, q, k, v, beta, g, reset, initial, keep=True)
    kept = [checkpoint_name(a, "memory_state") for a in kept]
    return (o, final), (q, k, v, beta, g, reset, kept)


def _op_backward(static, saved, cotangents):
    q, k, v, beta, g, reset, kept = saved
    decaying, columns = decays.arrays(g, reset, static), _columns(beta, static)
    _, backward = common.kernels(NAME, static, g)
    dq, dk, dv, dbeta, dg, dinitial = backward(
        q, k, v, columns, decaying, kept, *cotangents, **static.options()
    )
    return (
        dq,
        dk,
        dv,
        common.by_token(dbeta),
        decays.clipped(dg, g),
        None,
        dinitial,
    )


_op.defvjp(_op_forward, _op_backward)
