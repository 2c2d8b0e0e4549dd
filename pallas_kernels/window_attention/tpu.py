"""Attention over a window on TPUs: JAX's splash attention, which visits only blocks in the window.

Flash attention (Dao et al. 2022, arXiv 2205.14135) on a sparse grid of blocks. What is added here:
documents as its segment ids, whole blocks, the precision of its products, forward and backward.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

KEPT = "memory_state"  # the name of what the backward pass needs


class Static(NamedTuple):
    """What the kernel is compiled for. window: W. front: tokens in front of the first query. block:
    queries, and keys, of one grid step. interpret: the `interpret` of `pallas_call`."""

    window: int
    front: int
    block: int
    interpret: Any


def attend(q, k, v, document, static: Static):
    """q: [B, T, H, K], scaled. k, v: [B, front + T, h, D]. document: int32 [B, front + T] or None.
    Returns o [B, T, H, V]."""
    length, block = q.shape[1], static.block
    more = -length % block
    behind = more + -(k.shape[1] + more) % block  # a padded query sees itself: no row is empty
    q, k, v = _padded(q, more), _padded(k, behind), _padded(v, behind)
    ids = None
    if document is not None:
        document = _padded(document, behind)
        asking = document[:, static.front : static.front + q.shape[1]]
        ids = splash.SegmentIds(asking, document)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    return jnp.swapaxes(_op(static, q, k, v, ids), 1, 2)[:, :length]


def _padded(a, more: int):
    return jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2)) if more else a


# Without a precision of its own a product takes the ambient one when it is traced, in the backward
# pass too: float32 factors would be rounded to bfloat16, and Mosaic refuses bfloat16 ones in more.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, q, k, v, ids):
    with _precision(q.dtype):
        return _of_rows(static, ids)(q, k, v)


def _of_rows(static, ids):
    def attend(q, k, v):
        kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], static)
        return jax.vmap(kernel)(q, k, v, ids)

    return attend


def _op_forward(static, q, k, v, ids):
    with _precision(q.dtype):
        return jax.vjp(_of_rows(static, ids), q, k, v)


def _op_backward(static, pull_back, do):
    with _precision(do.dtype):
        return *pull_back(do), None


_op.defvjp(_op_forward, _op_backward)


def _precision(dtype) -> contextlib.AbstractContextManager:
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


class _Window(splash.LocalMask):
    """Which blocks are visited is found by looking at all of them. Blocks at the same distance from
    the diagonal are the same and computed once: 2 s instead of 20 s for 65536 tokens."""

    def __init__(self, shape, sizes, offset):
        super().__init__(shape, sizes, offset)
        self._blocks = {}

    def __getitem__(self, idx):
        rows, keys = idx
        at = rows.start - keys.start, rows.stop - rows.start, keys.stop - keys.start
        if at not in self._blocks:
            block = super().__getitem__(idx)
            if block.all() == block.any():  # nothing or all of it is seen: one array for all such
                block = self._blocks.setdefault((str(block.all()), *block.shape), block)
            self._blocks[at] = block
        return self._blocks[at]


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, queries: int, keys: int, static: Static):
    """The kernel of one row; which blocks it visits is computed once, in numpy."""
    window, front, block, interpret = static
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = _Window((queries, keys), (window - 1, 0), front)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, kernel)
