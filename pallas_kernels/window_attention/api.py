"""Attention over a window by each platform's library: checks, refusals, and the choice."""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common
from pallas_kernels.window_attention import gpu, reference, tpu

NAME = "window_attention"
LANES = 128
# Tokens of a block -> cycles of both passes for each token, head and block of keys that it visits:
# bundles on v5e for 128 channels in bfloat16; on v6e 8.1, 8.2 and 7.7.
CYCLES = {512: 11.0, 256: 9.3, 128: 9.1}


def window_attention(
    q, k, v, *, window, reset=None, scale=None, block=None, platform=None, plain=True
):
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over the last `window` tokens s of t's document,
    t included.

    Child et al. 2019, arXiv 1904.10509; Beltagy et al. 2020, arXiv 2004.05150; grouped queries:
    Ainslie et al. 2023, arXiv 2305.13245. On TPU JAX's splash attention, on GPU the flash attention
    of cuDNN, elsewhere `reference.blocked`.

    Args:
      q: [B, T, H, K].
      k, v: [B, S, h, K], [B, S, h, V], h dividing H; head i of H takes head i h // H. S - T tokens
        stand in front of the first query. A kernel takes K and V of 64, 128 or 256, all three
        float32 or all bfloat16; cuDNN bfloat16, K = V and S = T.
      window: W, at least 1; longer than the sequence for all tokens.
      reset: bool [B, S], True at the first token of a document; cuDNN takes none.
      scale: a Python number; None for K ** -0.5.
      block: on TPU queries, and keys, of a grid step, a multiple of 128; elsewhere queries that the
        plain form handles together. None chooses. Changes speed only.
      platform: "tpu", "gpu", or another, which is served by the plain form; None for the default
        backend.
      plain: whether the plain form may serve a platform that has no kernel.

    Returns:
      o [B, T, H, V] in the dtype of v. On TPU products of float32 are exact to float32, those of
      bfloat16 have float32 sums, q times scale is rounded to bfloat16, and under `jax.checkpoint`
      the names "memory_out" (what is returned) and "memory_state" (what the backward pass needs)
      can be saved, so that the forward kernel runs once. There is no forward-mode derivative there.

    Raises:
      NotImplementedError: no kernel serves this platform, dtype, shape or block.
      ValueError: shapes that do not fit together.
    """
    _check(q, k, v, window, reset)
    interpret, platform, _ = common.target(platform)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    given = dict(window=window, scale=scale)
    if platform == "tpu":
        common.check_served(NAME, {"q": q, "k": k}, v)
        o = _on_tpu(q, k, v, window, reset, scale, block, interpret)
    elif platform == "gpu":
        common.check_served(NAME, {"q": q, "k": k}, v)
        _check_cudnn(q, k, v, reset, interpret)
        try:
            o = gpu.attend(q, k, v, **given)
        except RuntimeError as reason:  # so jax says that there is no cuDNN
            raise NotImplementedError(f"{NAME} by cuDNN: {reason}; use a plain form") from reason
    elif plain:
        o = reference.blocked(q, k, v, reset=reset, block=block, **given)
    else:
        raise NotImplementedError(
            f"{NAME} has a kernel for tpu and gpu, none for {platform}; use a plain form"
        )
    return checkpoint_name(o, "memory_out")


def _on_tpu(q, k, v, window, reset, scale, block, interpret):
    length = q.shape[1]
    if block is not None and (block < LANES or block % LANES):
        raise NotImplementedError(f"{NAME} takes blocks of a multiple of {LANES}; given {block}")
    document = None if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    front = min(k.shape[1] - length, window - 1)  # tokens further in front are not seen
    k, v, document = (
        None if a is None else a[:, a.shape[1] - front - length :] for a in (k, v, document)
    )
    block = block or _block(length, k.shape[1], window)
    q = (scale * q.astype(jnp.float32)).astype(q.dtype)
    return tpu.attend(q, k, v, document, tpu.Static(window, front, block, interpret))


def _block(length: int, total: int, window: int) -> int:
    """The block that costs least for so many queries and keys."""

    def cost(block):
        visited = min(-(-(window - 1) // block) + 1, -(-total // block))
        return -(-length // block) * block * visited * CYCLES[block]

    return min(CYCLES, key=cost)


def _check(q, k, v, window, reset) -> None:
    """ValueError for what does not fit together."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{NAME}: q, k, v must be [B, T, h, D]; given {q.shape}, {v.shape}")
    batch, length, heads, width = q.shape
    total, fewer = v.shape[1:3]
    wanted = {
        "k": (k, (batch, total, fewer, width)),
        "v": (v, (batch, total, fewer, v.shape[3])),
        "reset": (reset, (batch, total)),
    }
    for leaf, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{NAME}: {leaf} must be {list(shape)}; given {list(array.shape)}")
    if length == 0:
        raise ValueError(f"{NAME}: the sequence is empty (T = 0); give at least one token")
    if total < length:
        raise ValueError(f"{NAME}: {length} queries have {total} keys; give each its own")
    if heads % fewer:
        raise ValueError(f"{NAME}: {fewer} heads of k and v do not divide the {heads} of q")
    if window < 1:
        raise ValueError(f"{NAME}: window must be at least 1; given {window}")


def _check_cudnn(q, k, v, reset, interpret) -> None:
    """NotImplementedError for what `jax.nn` does not hand to cuDNN."""
    problems = {
        "it takes bfloat16 only": v.dtype != jnp.bfloat16,
        "K and V must be the same": q.shape[-1] != v.shape[-1],
        "jax.nn gives it documents only as a mask of all pairs of tokens": reset is not None,
        "its window has no tokens in front of the first query": k.shape[1] != q.shape[1],
        "it cannot be interpreted": interpret is not False,
    }
    for reason, found in problems.items():
        if found:
            raise NotImplementedError(f"{NAME} by cuDNN: {reason}; use a plain form")
