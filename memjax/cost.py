"""What a function costs, counted from its jaxpr: on any machine, without running it.

XLA's own count takes the body of a loop once; here it is taken as often as it runs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memjax.nn.lm import LanguageModel, ModelConfig, blank, mixers_of
from memjax.nn.stack import mixer_options
from memjax.typing import PyTree

# One operation for each element of the output.
_ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp cos cosh div eq erf erf_inv exp exp2 expm1 floor ge gt "
    "integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt "
    "select_n sign sin sinh sqrt square sub tan tanh xor".split()
)
# One operation for each element of the first input.
_REDUCTIONS = frozenset(
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min "
    "reduce_or reduce_prod reduce_sum".split()
)

_UNKNOWN = {
    "while": "a while loop's number of trips is not known before it runs",
    **dict.fromkeys(
        ("conv_general_dilated", "mpmd_map", "pallas_call", "fft", "cholesky", "eigh", "lu", "qr",
         "svd", "triangular_solve", "ffi_call"),
        "the function has an operation that is not counted (see memjax/cost.py)",
    ),
}  # fmt: skip


def flops(function: Callable, *arguments: Any) -> int:
    """Floating-point operations of `function(*arguments)`: 2 for a multiply-add of a product, 1
    for each element of an elementwise operation or a reduction, 0 for what only moves data.

    arguments: arrays, or `jax.ShapeDtypeStruct`s. Of a branch the costlier side counts, of work
    that is split over devices all of it.

    Raises:
      ValueError: a `while` loop, whose number of trips is known at run time only, or an operation
        of linear algebra or a kernel, which is not counted.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, False)


def products(jaxpr: Any) -> int:
    """Those of the products of a jaxpr alone, which is what a peak of a chip is of.

    Raises:
      ValueError: as `flops`.
    """
    return _count(jaxpr, True)


def model_flops(
    config: ModelConfig, params: PyTree, length: int, queries: int | None = None
) -> float:
    """Model FLOPs of a token in training: three times the products of the forward pass of a row of
    `length` tokens, once for the pass and twice for its gradients, over `length`.

    They are the model's, whatever form runs and whatever is computed twice: memories count by
    their recurrence, token by token. That is 6 for each parameter of a product (of an embedding:
    once, at the output), 12 for each channel of attention's queries and each token that it can see,
    a row's at most, masked ones too, and the products of a memory's write and read. What is
    elementwise counts nothing, as rank-one writes and decays. Of mixture_of_memories all memories
    count, not the active ones alone.

    params: the model's, or their shapes. queries: positions of a row whose logits are computed;
    None for all.

    Raises:
      ValueError: as `flops`.
    """
    mixers: dict[str, dict[str, Any]] = {}
    for name in mixers_of(config):
        known, given = mixer_options(name), dict(config.mixers.get(name, {}))
        if "implementation" in known:
            given["implementation"] = "scan"
        if "window" in known:
            given["window"] = min(given.get("window", known["window"].default), length)
        mixers[name] = given
    model = LanguageModel(dataclasses.replace(config, mixers=mixers))
    select = None if queries is None else jnp.zeros((1, queries), jnp.int32)
    row = blank(config, 1, length)
    forward = jax.make_jaxpr(lambda params: model.apply({"params": params}, row, select=select))
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)  # on no mesh
    return 3 * products(forward(whole).jaxpr) / length


def _count(jaxpr: Any, products: bool) -> int:
    return sum(_equation(equation, products) for equation in jaxpr.eqns)


def _equation(equation: Any, products: bool) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr, products)
    if name == "shard_map":  # its jaxpr is what one device does
        axes = params.get("newly_manual_axes", params.get("manual_axes"))  # the latter in jax 0.7
        shares = math.prod(params["mesh"].shape[axis] for axis in axes)
        return shares * _count(params["jaxpr"], products)
    if name in _UNKNOWN:
        raise ValueError(f"flops: {_UNKNOWN[name]}")
    if name == "cond":
        return max(_count(branch.jaxpr, products) for branch in params["branches"])
    if name in _ELEMENTWISE:
        return 0 if products else _size(equation.outvars[0])
    if name in _REDUCTIONS:
        return 0 if products else _size(equation.invars[0])
    inner = [params[key] for key in ("jaxpr", "call", "call_jaxpr", "fun_jaxpr") if key in params]
    return sum(_count(getattr(jaxpr, "jaxpr", jaxpr), products) for jaxpr in inner)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
