"""What a function costs, counted from its jaxpr: on any machine, without running it.

XLA's own count takes the body of a loop once; here it is taken as often as it runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

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

    arguments: arrays, or `jax.ShapeDtypeStruct`s. Of a branch the costlier side counts.

    Raises:
      ValueError: a `while` loop, whose number of trips is known at run time only, or an operation
        of linear algebra or a kernel, which is not counted.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name in _UNKNOWN:
        raise ValueError(f"flops: {_UNKNOWN[name]}")
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    if name in _ELEMENTWISE:
        return _size(equation.outvars[0])
    if name in _REDUCTIONS:
        return _size(equation.invars[0])
    inner = [params[key] for key in ("jaxpr", "call", "call_jaxpr", "fun_jaxpr") if key in params]
    return sum(_count(getattr(jaxpr, "jaxpr", jaxpr)) for jaxpr in inner)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
