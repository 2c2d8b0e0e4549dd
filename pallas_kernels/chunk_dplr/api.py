"""Diagonal plus low rank by a kernel: checks, padding, and the choice of blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common, decays

NAME = "chunk_dplr"
LEAST = -1.125  # of log decays on GPUs: factors of half a chunk of 64 are at most e^36


def chunk_dplr(
    q,
    k,
    v,
    a,
    b,
    g,
    *,
    lowest=None,
    initial_state=None,
    reset=None,
    scale=None,
    chunk=None,
    platform=None,
):
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, o_t = scale S_t^T q_t.

    The generalised delta rule of RWKV-7 (Peng et al. 2025, arXiv 2503.14456, Eq. 1), a = -kappa and
    b = kappa times a rate for each channel.

    Args:
      q, k, a, b: [B, T, h, K], h dividing H; head i of H takes head i h // H. K 64, 128 or 256. A
        contraction where g = 0 and b = -r a, ||a|| = 1, with one r in [0, 2].
      v: [B, T, H, V], V 64, 128 or 256. All five float32 or all bfloat16.
      g: log decay <= 0 of each row of S, [B, T, H, K], taken as float32.
      lowest: a Python number that no log decay is below, but for resets; None for any decay. Log
        decays of -1.1 and above take fewer products: -0.61 is RWKV-7's. On GPUs at least -1.125.
      initial_state: [B, H, K, V], finite; None for zero.
      reset: bool [B, T], True where the state is emptied before the token reads and writes.
      scale: a Python number; None for K ** -0.5.
      chunk: tokens in a chunk, 16, 32, 64 or 128, on GPUs 64; None chooses. Changes speed only.
      platform: "tpu", or with its generation, such as "tpu v5e", without which blocks fit a v4;
        "gpu" for H100 and H200; None for the default backend.

    Returns:
      o [B, T, H, V] in the dtype of v, and the last state, float32 [B, H, K, V], on GPUs for K 256
      rounded to two bfloat16 parts in each chunk, 2^-17. Both, and the gradients, are those of
      `reference.sequential`, exact to float32 for float32. Under `jax.checkpoint` the names
      "memory_out" (what is returned) and "memory_state" (what the backward pass needs) can be
      saved, so that the forward kernel runs once. There is no forward-mode derivative.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape, chunk or lowest.
      ValueError: shapes that do not fit together, or lowest above 0.
    """
    size_of = functools.partial(
        common.vmem,
        width=q.shape[-1],
        size=v.shape[-1],
        like=v,
        states=28,
        pairs=41 if v.dtype == jnp.float32 else 16,
        logs=44 if v.dtype == jnp.float32 else 34,
        keys=4,
    )
    if lowest is not None and lowest > 0:
        raise ValueError(f"{NAME}: lowest must be at most 0, as log decays are; given {lowest}")
    keys = {"q": q, "k": k, "a": a, "b": b}
    given = (keys, v, g, initial_state, reset, scale, chunk, platform)
    call = common.call(NAME, *given, size_of=size_of, channels=True)
    if call.static.platform == "gpu" and (lowest is None or lowest < LEAST):
        raise NotImplementedError(
            f"{NAME} takes log decays of {LEAST} and above on GPUs, promised by lowest; given "
            f"lowest={lowest}; use a plain form"
        )
    *tokens, reset, initial = call.arrays
    if reset is not None:  # there is nothing for a to read
        tokens[2] = jnp.where(reset[..., None, None], 0, tokens[2])
    o, state = _op(call.static, lowest, *tokens, reset, initial)
    return checkpoint_name((o[:, : v.shape[1]], state), "memory_out")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _op(static, lowest, q, k, a, b, v, g, reset, initial):
    return _forward(static, lowest, q, k, a, b, v, g, reset, initial, keep=False)[:2]


def _decaying(static, g, reset):
    return (g, reset) if static.platform == "gpu" else decays.arrays(g, reset, static)


def _forward(static, lowest, q, k, a, b, v, g, reset, initial, keep):
    forward, _ = common.kernels(NAME, static)
    decaying = _decaying(static, g, reset)
    return forward(q, k, a, b, v, decaying, initial, keep=keep, lowest=lowest, **static.options())


def _op_forward(static, lowest, q, k, a, b, v, g, reset, initial):
    o, final, *kept = _forward(static, lowest, q, k, a, b, v, g, reset, initial, keep=True)
    kept = [checkpoint_name(x, "memory_state") for x in kept]
    return (o, final), (q, k, a, b, v, g, reset, kept)


def _op_backward(static, lowest, saved, cotangents):
    *tokens, g, reset, kept = saved
    _, backward = common.kernels(NAME, static)
    decaying = _decaying(static, g, reset)
    options = {"lowest": lowest, **static.options()}
    *found, dinitial = backward(*tokens, decaying, kept, *cotangents, **options)
    return *found, None, dinitial


_op.defvjp(_op_forward, _op_backward)
