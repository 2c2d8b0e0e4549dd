"""What the tests of blocks compare with, in numpy float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memjax.nn.layers import Context

KEY = jax.random.key(0)
W, T = 3, 11  # window, tokens


class Same(nn.Module):
    """A mixer that changes nothing."""

    dim: int = 8
    out_scale: float = 1.0

    def __call__(self, x, state, ctx):
        return x, {}, ctx


def context(batch: int = 1, length: int = T) -> Context:
    """One document a row, from its start."""
    return Context(None, None, jnp.broadcast_to(jnp.arange(length), (batch, length)))


def tokens(batch: int = 1, length: int = T) -> np.ndarray:
    """Random inputs [batch, length, 8]."""
    return np.random.default_rng(1).normal(size=(batch, length, 8)).astype(np.float32)


def initialise(module: nn.Module, x: np.ndarray):
    """(its parameters, unboxed; y of x from them by jit)."""
    ctx = context(*x.shape[:2])
    params = nn.unbox(jax.jit(module.init)(KEY, x, None, ctx)["params"])
    return params, jax.jit(lambda params, x: module.apply({"params": params}, x, None, ctx)[0])


def project(x: np.ndarray, layer) -> np.ndarray:
    """x W without a bias."""
    return np.tensordot(x, np.float64(layer["kernel"]), 1)


def norm(a: np.ndarray) -> np.ndarray:
    """RMSNorm with scales of one."""
    return a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-5)


def softmax(scores, visible):
    """Over the last axis, where visible."""
    weights = np.where(visible, np.exp(scores), 0)
    return weights / weights.sum(-1, keepdims=True)


def attend(params, q, k, v, visible) -> np.ndarray:
    """One softmax of q [B, T, h, 1, K] over k, v [B, n, h, ...] where visible [T, n], projected."""
    scores = np.einsum("bthk,bshk->bhts", q[:, :, :, 0], k) / k.shape[-1] ** 0.5
    y = np.einsum("bhts,bshv->bthv", softmax(scores, visible), v)
    return np.einsum("bthv,hvd->btd", y, np.float64(params["output"]["kernel"])[:, 0])
