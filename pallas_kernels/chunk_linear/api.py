"""Decayed linear attention by a kernel: checks, padding, and the choice of blocks."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common, decays

NAME = "chunk_linear"


def chunk_linear(
    q, k, v, *, g=None, initial_state=None, reset=None, scale=None, chunk=None, platform=None
):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236); with a decay for each head
    RetNet (Sun et al. 2023, arXiv 2307.08621) and the core of Mamba-2 (Dao & Gu 2024,
    arXiv 2405.21060); with one for each channel GLA (Yang et al. 2023, arXiv 2312.06635).

    Args:
      q, k: [B, T, h, K], h dividing H; head i of H takes head i h // H. K 64, 128 or 256.
      v: [B, T, H, V], V 64, 128 or 256. All three float32 or all bfloat16.
      g: log decay <= 0, taken as float32: [B, T, H] for each head, [B, T, H, K] for each row of
        S; None for no decay.
      initial_state: [B, H, K, V], finite; None for zero.
      reset: bool [B, T], True where the state is emptied before the token is written.
      scale: a Python number; None for K ** -0.5.
      chunk: tokens in a chunk, 16, 32, 64 or 128, on GPUs 64; None chooses. Changes speed only.
      platform: "tpu", or with its generation, such as "tpu v5e", without which blocks fit a v4;
        "gpu" for H100 and H200; None for the default backend.

    Returns:
      o [B, T, H, V] in the dtype of v, and the last state, float32 [B, H, K, V]. Both, and the
      gradients, are those of `reference.sequential`; products of float32 are exact to float32,
      those of bfloat16 have float32 sums. Under `jax.checkpoint` the names "memory_out" (what is
      returned) and "memory_state" (what the backward pass needs) can be saved, so that the forward
      kernel runs once. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape or chunk.
      ValueError: shapes that do not fit together.
    """
    size_of = functools.partial(
        common.vmem,
        width=q.shape[-1],
        size=v.shape[-1],
        like=v,
        states=16 + 2 * v.dtype.itemsize,
        pairs=10,
        logs=0 if g is None or g.ndim == 3 else 26,
    )
    given = ({"q": q, "k": k}, v, g, initial_state, reset, scale, chunk, platform)
    call = common.call(NAME, *given, size_of=size_of)
    o, state = _op(call.static, *call.arrays)
    return checkpoint_name((o[:, : v.shape[1]], state), "memory_out")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, q, k, v, g, reset, initial):
    return _forward(static, q, k, v, g, reset, initial, keep=False)[:2]


def _forward(static, q, k, v, g, reset, initial, keep):
    forward, _ = common.kernels(NAME, static, g)
    decaying = decays.arrays(g, reset, static)
    return forward(q, k, v, decaying, initial, keep=keep, **static.options())


def _op_forward(static, q, k, v, g, reset, initial):
    o, final, *kept = _forward(static, q, k, v, g, reset, initial, keep=True)
    kept = [checkpoint_name(a, "memory_state") for a in kept]
    return (o, final), (q, k, v, g, reset, kept)


def _op_backward(static, saved, cotangents):
    q, k, v, g, reset, kept = saved
    _, backward = common.kernels(NAME, static, g)
    decaying = decays.arrays(g, reset, static)
    dq, dk, dv, dg, dinitial = backward(q, k, v, decaying, *kept, *cotangents, **static.options())
    return dq, dk, dv, decays.clipped(dg, g), None, dinitial


_op.defvjp(_op_forward, _op_backward)
