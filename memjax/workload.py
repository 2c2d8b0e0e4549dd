"""What the benchmark runs, and the gate: each form of a cell is compared before it is timed."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

import memjax
from memjax import inputs
from memjax.cell import FORMS, MemoryCell
from memjax.config import UserError
from memjax.registry import CellSpec
from memjax.typing import PyTree

GATE = 256  # tokens on which a form is compared with scan
STEPS = 20  # decoding steps in one timed call, for which attention keeps room
SHOWN = tuple(reversed(FORMS))


@dataclasses.dataclass(frozen=True)
class Shape:
    """batch rows of length tokens; heads memories of dim x dim; window of sliding_window; chunk of
    the chunked forms, 0 for the library's."""

    batch: int = 1
    length: int = 4096
    heads: int = 4
    dim: int = 64
    window: int = 256
    chunk: int = 0


def make_cell(spec: CellSpec, shape: Shape) -> MemoryCell:
    """The cell of a spec at the benchmark's sizes, with the library's chunk and block.

    A cell that sees all tokens gets room for the sequence and for the decoded tokens.
    """
    return _sized(spec.cell(), shape, hasattr(spec.mixer, "capacity"))


def _sized(cell: MemoryCell, shape: Shape, unbounded: bool) -> MemoryCell:
    known = {field.name: field for field in dataclasses.fields(cell)}
    usual = ("chunk", "block", "frozen_chunk", "context", "segment", "slots", "number")
    changes: dict[str, Any] = {name: known[name].default for name in usual if name in known}
    if "inner" in known:
        changes["inner"] = _sized(vars(cell)["inner"], shape, unbounded)
    changes |= {name: shape.dim for name in ("key_dim", "value_dim") if name in known}
    if shape.chunk:
        changes |= {name: shape.chunk for name in ("chunk", "block") if name in known}
    if "window" in known:
        changes["window"] = shape.length + STEPS if unbounded else shape.window
    return dataclasses.replace(cell, **changes)


def problem(spec: CellSpec, shape: Shape) -> tuple[MemoryCell, PyTree, PyTree]:
    """(cell, its parameters, inputs), the same at every call."""
    cell = make_cell(spec, shape)
    params = jax.device_get(cell.init_params(jax.random.key(0), shape.heads))
    rng = np.random.default_rng(0)
    return cell, params, inputs.draw(cell, rng, shape.batch, shape.length, shape.heads)


# ---------------------------------------------------------------- what is measured


def forward(cell: MemoryCell, form: str | None, params: PyTree, xs: PyTree, state: PyTree = None):
    """(y, state) of one form."""
    return memjax.run(cell, params, xs, state=state, implementation=form)


def backward(cell: MemoryCell, form: str, params: PyTree, xs: PyTree, cotangent):
    """((y, state), gradients of <cotangent, y> and of the sum of the final state's squares)."""

    def loss(weights, xs):
        y, state = forward(cell, form, weights, xs)
        floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
        return jnp.sum(cotangent * y) + sum(0.5 * jnp.mean(a * a) for a in floats), (y, state)

    (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, xs)
    return out, gradients


def forms_of(cell: MemoryCell, params: PyTree, xs: PyTree, wanted: Sequence[str]) -> list[str]:
    """Those of `wanted` that serve this cell, `scan` first."""
    serving = []
    for form in (form for form in SHOWN if form in wanted):
        try:
            jax.eval_shape(functools.partial(forward, cell, form), params, xs)
        except NotImplementedError:
            continue
        serving.append(form)
    return serving


# ---------------------------------------------------------------- the gate


def distances(value: PyTree, exact: PyTree, share: float = 0.0) -> list[float]:
    """Relative RMS distance of each leaf; infinite where a value is not finite.

    share: of the largest leaf's RMS, by which each is measured at least. A gradient may be zero on
    paper (of RWKV-4's bonus at a first token), where only rounding is left.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(exact), strict=True)
    ]
    sizes = [float(np.sqrt(np.mean(b * b))) for _, b in pairs]
    floor, found = share * max(sizes, default=0.0), []
    for (a, b), size in zip(pairs, sizes, strict=True):
        difference = float(np.sqrt(np.mean((a - b) ** 2)))
        far = difference / max(size, floor) if difference else 0.0
        found.append(far if math.isfinite(far) else math.inf)
    return found


def distances_of_both(value: tuple, exact: tuple) -> list[float]:
    """Those of ((y, state), gradients), the gradients' by 1 % of the largest at least."""
    return distances(value[0], exact[0]) + distances(value[1], exact[1], 0.01)


def check(spec: CellSpec, shape: Shape, forms: Sequence[str]) -> dict[str, float]:
    """Distance of each form from `scan`, the worst over y, state and gradients.

    Raises:
      UserError: a form is further away than max(1e-5, 3 x scan's distance from float64).
    """
    shape = dataclasses.replace(shape, batch=1, length=min(shape.length, GATE))
    cell, params, xs = problem(spec, shape)
    answers = jax.eval_shape(functools.partial(forward, cell, "scan"), params, xs)[0]
    cotangent = np.random.default_rng(1).normal(size=answers.shape).astype(np.float32)

    def results(form, dtype):
        given = jax.tree.map(lambda a: np.asarray(a, dtype), (params, xs, cotangent))
        owner = jax if hasattr(jax, "enable_x64") else jax.experimental
        with owner.enable_x64(dtype == np.float64):
            return jax.device_get(jax.jit(functools.partial(backward, cell, form))(*given))

    own, found = results("scan", np.float32), {}
    bounds = [max(1e-5, 3 * d) for d in distances_of_both(own, results("scan", np.float64))]
    for form in forms:
        far = distances_of_both(own if form == "scan" else results(form, np.float32), own)
        for distance, bound in zip(far, bounds, strict=True):
            if distance > bound:
                raise UserError(
                    f"{spec.name}, {form}: relative distance {distance:.1e} from scan, allowed "
                    f"{bound:.1e}; it is wrong and is not timed. Run the contract tests: "
                    "python -m pytest tests/test_contract.py"
                )
        found[form] = max(far)
    return found
