"""Recurrences without products: every channel of every row is a walk of its own over tokens.

An op is a `Rule`, a step and its gradient for one token, which the kernels of walks_tpu.py and
walks_gpu.py run over arrays [B, T, D]. They are bound by memory: each array is read or written once
forward, and once backward, where the states are made again on the chip from those in front of
chunks of tokens.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import common

LANES = 128  # channels come in multiples of it
DTYPES = (jnp.float32, jnp.bfloat16)


class Rule(NamedTuple):
    """A recurrence of float32 numbers, all functions of arrays of any shape.

    step(state, token) -> (state, y). back(slopes, state, token, dy) -> (slopes, gradients of the
    token), slopes: those of the state behind, then in front of the token; state: that in front.
    padding: a token that changes nothing. fresh: the state in front of all.
    """

    name: str
    step: Callable[[tuple, tuple], tuple[tuple, Any]]
    back: Callable[[tuple, tuple, tuple, Any], tuple[tuple, tuple]]
    padding: tuple[float, ...]
    fresh: tuple[float, ...]


class Static(NamedTuple):
    """What a kernel is compiled for. chunk: tokens of a block. width: its channels. interpret: that
    of `pallas_call`."""

    rule: Rule
    chunk: int
    width: int
    interpret: Any
    platform: str


def run(rule: Rule, tokens: dict[str, Any], state: tuple | None, platform: str | None):
    """(y [B, T, D] in the dtype of the first array, the last state, float32 [B, D] each).

    tokens: arrays [B, T, D] by name, in the order of the rule's. state: as the one returned, or
    None for `fresh`.
    """
    arrays, name = tuple(tokens.values()), rule.name
    batch, length, channels = _check(name, tokens, state)
    interpret, platform, _ = common.target(platform)
    if platform not in ("tpu", "gpu"):
        raise NotImplementedError(
            f"{name} has kernels for tpu and gpu, none for {platform}; use a plain form"
        )
    if others := {a.dtype.name for a in arrays} - {jnp.dtype(d).name for d in DTYPES}:
        raise NotImplementedError(
            f"{name} takes float32 and bfloat16; given {', '.join(sorted(others))}"
        )
    if platform == "gpu":
        common.check_gpu(name, interpret)
    more = -channels % LANES
    chunk, width = _kernels(platform).block(rule, arrays, channels + more)
    static = Static(rule, chunk, width, interpret, platform)
    if state is None:
        state = tuple(jnp.full((batch, channels), x, jnp.float32) for x in rule.fresh)
    behind = (0, -length % chunk)

    def padded(leaves, values, pads):
        pairs = zip(leaves, values, strict=True)
        return tuple(jnp.pad(a, pads, constant_values=x) for a, x in pairs)

    arrays = padded(arrays, rule.padding, [(0, 0), behind, (0, more)])
    state = padded(state, rule.fresh, [(0, 0), (0, more)])
    y, state = _op(static, arrays, tuple(a.astype(jnp.float32) for a in state))
    y, state = y[:, :length, :channels], tuple(a[:, :channels] for a in state)
    return checkpoint_name((y, state), "memory_out")


def _check(name: str, tokens: dict[str, Any], state) -> tuple[int, int, int]:
    """[B, T, D]; ValueError for shapes that do not fit together."""
    first, *_ = tokens.values()
    given = {leaf: list(a.shape) for leaf, a in tokens.items()}
    if first.ndim != 3 or any(shape != list(first.shape) for shape in given.values()):
        shown = ", ".join(f"{leaf} {shape}" for leaf, shape in given.items())
        raise ValueError(f"{name}: {', '.join(given)} must all be [B, T, D]; given {shown}")
    batch, length, channels = first.shape
    for a in state or ():
        if a.shape != (batch, channels):
            raise ValueError(
                f"{name}: initial_state must be {[batch, channels]}; given {list(a.shape)}"
            )
    if math.prod(first.shape) == 0:
        raise ValueError(f"{name}: nothing to do for {list(first.shape)}; give at least one token")
    return batch, length, channels


def forgetting(name: str, reset, logs):
    """Log decays [B, T, D], -inf where a document begins; reset: bool [B, T] or None."""
    if reset is None:
        return logs
    if reset.shape != logs.shape[:2] or reset.dtype != bool:
        raise ValueError(
            f"{name}: reset must be bool{list(logs.shape[:2])}; given "
            f"{reset.dtype}{list(reset.shape)}"
        )
    return jnp.where(reset[..., None], -jnp.inf, logs)


def _kernels(platform: str):
    """The module with a platform's kernels; Mosaic GPU needs what a machine without GPUs may not
    have."""
    return importlib.import_module(f"pallas_kernels.walks_{platform}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, tokens, state):
    return _kernels(static.platform).forward(static, tokens, state, keep=False)[:2]


def _op_forward(static, tokens, state):
    y, final, bounds = _kernels(static.platform).forward(static, tokens, state, keep=True)
    bounds = [checkpoint_name(a, "memory_state") for a in bounds]
    return (y, final), (tokens, bounds)


def _op_backward(static, saved, cotangents):
    return _kernels(static.platform).backward(static, *saved, *cotangents)


_op.defvjp(_op_forward, _op_backward)
