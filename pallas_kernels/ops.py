"""Every op with its plain form, the shapes of its arrays, and the work that its kernels do."""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chunk_delta import reference as delta
from pallas_kernels.chunk_delta.api import chunk_delta
from pallas_kernels.chunk_dplr import reference as dplr
from pallas_kernels.chunk_dplr.api import chunk_dplr
from pallas_kernels.chunk_linear import reference as linear
from pallas_kernels.chunk_linear.api import chunk_linear
from pallas_kernels.deep_memory import reference as deep
from pallas_kernels.deep_memory.api import deep_memory
from pallas_kernels.deep_network import plain as network
from pallas_kernels.deep_network.api import deep_network
from pallas_kernels.gka import reference as kalman
from pallas_kernels.gka.api import gka
from pallas_kernels.lattice import reference as slots
from pallas_kernels.lattice.api import lattice
from pallas_kernels.linear_scan import reference as scan
from pallas_kernels.linear_scan.api import linear_scan
from pallas_kernels.window_attention import reference as window
from pallas_kernels.window_attention.api import window_attention
from pallas_kernels.wkv4 import reference as rwkv4
from pallas_kernels.wkv4.api import wkv4

WINDOW = 512
FROZEN = 16  # tokens of a frozen chunk
EXPANSION = 4  # hidden width of a network over K
# Of one core, in a cycle: floating-point operations of bfloat16 products, bytes of HBM.
PEAKS = {"v5e": (131072, 546), "v6e": (524288, 937)}


def windowed(run):
    """Attention over a window of 512, which leaves no state."""
    return lambda **given: (run(**given, window=WINDOW), ())


# (op, decay) -> the op and its plain form
OPS = {
    ("chunk_linear", "none"): (chunk_linear, linear.chunked),
    ("chunk_linear", "head"): (chunk_linear, linear.chunked),
    ("chunk_linear", "channel"): (chunk_linear, partial(linear.chunked, chunk=16)),
    ("chunk_delta", "none"): (chunk_delta, delta.chunked),
    ("chunk_delta", "head"): (chunk_delta, delta.chunked),
    ("chunk_delta", "channel"): (chunk_delta, partial(delta.chunked, chunk=16)),
    ("chunk_dplr", "channel"): (chunk_dplr, dplr.chunked),
    ("deep_memory", "momentum"): (
        partial(deep_memory, frozen_chunk=FROZEN),
        partial(deep.chunked, frozen_chunk=FROZEN),
    ),
    ("deep_network", "momentum"): (
        partial(deep_network, frozen_chunk=FROZEN),
        partial(network.chunked, frozen_chunk=FROZEN),
    ),
    ("gka", "head"): (gka, kalman.chunked),
    ("lattice", "exact"): (lattice, slots.sequential),
    ("lattice", "frozen"): (
        partial(lattice, frozen_chunk=FROZEN),
        partial(slots.chunked, frozen_chunk=FROZEN),
    ),
    ("window_attention", "none"): (windowed(window_attention), windowed(window.blocked)),
    ("linear_scan", "channel"): (linear_scan, scan.chunked),
    ("linear_scan", "weighted"): (
        partial(linear_scan, weighted=True),
        partial(scan.chunked, weighted=True),
    ),
    ("wkv4", "channel"): (wkv4, rwkv4.chunked),
}
# Recurrences without products: their arrays, [B, T, H D], the first of them in the op's dtype.
WALKS = {"linear_scan": ("x", "g"), "wkv4": ("v", "k", "w", "u")}


SLOW = -0.61  # RWKV-7's log decays are above it

# Those that have kernels of ours for GPUs; chunk_dplr has them for slow decays.
ON_GPU = {
    case: runs
    for case, runs in OPS.items()
    if case[0] not in ("deep_memory", "deep_network", "gka", "lattice", "window_attention")
} | {("chunk_dplr", "channel"): (partial(chunk_dplr, lowest=SLOW), dplr.chunked)}


def arguments(op, decay, shape, dtype) -> dict[str, Any]:
    """The shapes of an op's arrays."""
    if op in WALKS:
        first, *others = WALKS[op]
        channels = *shape[:2], shape[2] * shape[3]
        wide = jax.ShapeDtypeStruct(channels, jnp.float32)
        return {first: jax.ShapeDtypeStruct(channels, dtype), **dict.fromkeys(others, wide)}
    rate = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    given = dict.fromkeys("qkv", jax.ShapeDtypeStruct(shape, dtype))
    given |= {"beta": rate} if op in ("chunk_delta", "gka") else {}
    given |= {"alpha": rate} if op == "gka" else {}
    given |= dict.fromkeys("ab", given["k"]) if op == "chunk_dplr" else {}
    if op in ("deep_memory", "deep_network"):
        steps = jax.ShapeDtypeStruct((*shape[:3], 1), jnp.float32)
        hidden = (EXPANSION * shape[3],) * (op == "deep_network")
        pairs = itertools.pairwise((shape[3], *hidden, shape[3]))
        layers = tuple(jax.ShapeDtypeStruct((shape[2], m, n), jnp.float32) for m, n in pairs)
        start = layers if hidden else layers[0]
        return given | {"g": rate, "m": rate, "rates": steps, "start": start}
    if op == "lattice":
        start = jax.ShapeDtypeStruct((*shape[2:], shape[3]), jnp.float32)
        return given | {"beta": rate, "gamma": rate, "start": start}
    logs = jax.ShapeDtypeStruct(shape, jnp.float32)
    return given | {"none": {}, "head": {"g": rate}, "channel": {"g": logs}}[decay]


def answered(given):
    """The array of an op that its answers are like."""
    return given["v" if "v" in given else "x"]


def function(run, direction, **options):
    """A function of arrays by name: the op, or, with the cotangent of o besides, its outputs and
    gradients."""

    def op(given):
        return run(**given, **options)

    def both(given, do):
        o, backward, state = jax.vjp(op, given, has_aux=True)
        return o, state, backward(do)

    return op if direction == "forward" else both


def work(fn, *shapes) -> tuple[int, int]:
    """(floating-point operations of products, bytes of operands and results) of the kernels."""
    flops = size = 0
    for equation in equations(jax.make_jaxpr(fn)(*shapes).jaxpr):
        if equation.primitive.name != "pallas_call":
            continue
        arrays = (*equation.invars, *equation.outvars)
        size += sum(a.aval.size * a.aval.dtype.itemsize for a in arrays)
        steps = math.prod(equation.params["grid_mapping"].grid)
        flops += steps * products(equation.params["jaxpr"])
    return flops, size


def fingerprint(fn, *shapes) -> str:
    """A hash of a function's program, its kernels and their blocks: what is equal compiles to the
    same."""
    program = jax.make_jaxpr(fn)(*shapes)
    text = [str(program)]
    for equation in equations(program.jaxpr):
        if equation.primitive.name == "pallas_call":
            blocks = equation.params["grid_mapping"].block_mappings
            text += [f"{block.index_map_jaxpr} {block.pipeline_mode}" for block in blocks]
    without_addresses = re.sub("0x[0-9a-f]+", "", "\n".join(text))
    return hashlib.sha256(without_addresses.encode()).hexdigest()[:16]


def equations(jaxpr) -> Iterator:
    """Every equation, those inside of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inside(equation):
            yield from equations(inner)


def products(jaxpr) -> int:
    """Floating-point operations of all matrix products, those of loops as often as they run."""
    flops = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        flops += product(equation) + times * sum(map(products, _inside(equation)))
    return flops


def _inside(equation) -> list:
    """The programs within an equation."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    return [getattr(value, "jaxpr", value) for value in values if _is_jaxpr(value)]


def _is_jaxpr(value) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def product(equation) -> int:
    """Floating-point operations of a matrix product, 0 for anything else."""
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
