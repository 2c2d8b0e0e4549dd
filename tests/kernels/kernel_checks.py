"""What every kernel must satisfy: values and all gradients against its reference in float64."""

import contextlib
import functools
from typing import Any, NamedTuple

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.typing import fields
from pallas_kernels import interpreted
from pallas_kernels.specs import Spec, held

HALF = "bfloat16"


needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU that is jax's default (make test-gpu)"
)


def running(platform: str, how):
    """Within it kernels run on this platform, where it is jax's default here, or else as
    `interpreted` runs them."""
    here = jax.default_backend() == platform
    return contextlib.nullcontext() if here else interpreted(platform, how)


def on_cpu():
    """Within it arrays and what is made of them are on the CPU, as references are, wherever kernels
    run."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


class Case(NamedTuple):
    op: str
    spec: Spec

    def __str__(self):
        return f"{self.op}-{self.spec}"


def cases(ops: dict[str, tuple]) -> dict[str, Case]:
    """By name, the cases of ops, each (the op, its reference, its specs)."""
    found = [Case(op, spec) for op, (_, _, specs) in ops.items() for spec in specs]
    return {str(case): case for case in found}


def marked(cases: dict[str, Case]) -> list:
    """The cases as parameters of a test, slow where they are not tagged as fast."""
    return [
        pytest.param(case, marks=() if "fast" in case.spec.tags else pytest.mark.slow, id=name)
        for name, case in cases.items()
    ]


def results(op, spec: Spec, dtype, longer: float = 1.0) -> dict[str, np.ndarray]:
    """Outputs and gradients of everything an op can be differentiated by, as float64.

    dtype: of q, k, v, a and b; the others are float32, or float64 with them. The cotangent of o is
    held by the spec's dtype. longer: a factor of k and a. A state of several arrays is a dict.
    """
    given = spec.inputs()
    given |= {name: longer * np.float64(given[name]) for name in ("k", "a") if name in given}
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    reset = given.pop("reset")
    x = {
        name: jnp.asarray(array, dtype if name in tuple("qkvab") else wide)
        for name, array in given.items()
        if array is not None
    }
    rng = np.random.default_rng(1)

    def cotangent(a, dtype):
        return jnp.asarray(held(rng.standard_normal(a.shape), dtype)).astype(a.dtype)

    @jax.jit
    def run(x):
        (o, state), backward = jax.vjp(lambda x: op(**x, reset=reset), x)
        do = cotangent(o, spec.dtype)
        dstate = jax.tree.map(lambda a: cotangent(a, "float32"), state)
        (gradients,) = backward((do, dstate))
        states = state if isinstance(state, dict) else {"state": state}
        return {"o": o, **states} | {f"d{name}": a for name, a in gradients.items()}

    return {name: np.asarray(a, np.float64) for name, a in run(x).items()}


def heads_repeated(reference):
    """A reference that takes fewer heads of q and k too."""

    def run(v, **given):
        keys = [name for name in tuple("qkab") if name in given]
        given |= {n: jnp.repeat(given[n], v.shape[2] // given[n].shape[2], axis=2) for n in keys}
        return reference(v=v, **given)

    return run


def cell_inputs(cell, dtype=np.float32) -> tuple[Any, dict[str, Any]]:
    """Inputs of a cell of memjax and what else `memjax.run` takes: keys of one head for two
    memories, resets, tokens that only read, a state."""
    rng = np.random.default_rng(0)
    batch, length, heads = 2, 37, 2

    made = {
        "query": (1, lambda x: x),
        "key": (1, lambda x: x / 8),
        "value": (heads, lambda x: x),
        "log_decay": (heads, lambda x: -np.abs(x)),
        "rate": (1, lambda x: np.abs(x) % 1),
        "multiple": (1, lambda x: x / 8),
    }

    def leaf(field):
        count, make = made[field.kind]
        axes = (64,) if field.shape else ()
        return make(rng.standard_normal((batch, length, count, *axes))).astype(dtype)

    xs = cell.inputs(*map(leaf, fields(cell.inputs).values()))
    return xs, dict(
        reset=jnp.asarray(rng.random((batch, length)) < 0.1),
        write=jnp.asarray(rng.random((batch, length)) < 0.8),
        state=rng.standard_normal((batch, heads, 64, 64)).astype(np.float32),
    )


def distance(found, wanted) -> float:
    """Relative RMS; what is exactly zero may be off by 1e-20."""
    return contract.distance(found, wanted, floor=1e-15)


def check(op, sequential, chunked, spec: Spec) -> None:
    """float32: at most max(1e-5, 3 x the distance of the float32 token loop from float64), and for
    equal or alike keys what rounding k.k, as much as float32 may lose in a sum of K products, does
    to the float64 result.
    bfloat16: at most twice the distance of the plain chunked form on the same inputs; what leaves
    in float32 may be as far as if it were rounded to bfloat16 twice, like the factors it is made
    of."""
    own, exact, allowed = expected(sequential, chunked, spec)
    found = results(op, spec, jnp.dtype(spec.dtype))
    assert_within(spec, found, own, exact, allowed)


@functools.lru_cache(maxsize=2)  # the cases of planted mistakes are few
def expected(sequential, chunked, spec: Spec) -> tuple[dict[str, Any], ...]:
    """What `assert_within` takes besides what was found."""
    with on_cpu(), contract.x64(True):
        exact = results(heads_repeated(sequential), spec, jnp.float64)
        allowed = dict.fromkeys(exact, 0.0)
        if spec.keys != "random":
            longer = 1 + spec.K * 2.0**-25
            moved = results(heads_repeated(sequential), spec, jnp.float64, longer)
            allowed = {name: distance(moved[name], exact[name]) for name in exact}
    plain = chunked if spec.dtype == HALF else sequential
    with on_cpu():
        own = results(heads_repeated(plain), spec, jnp.dtype(spec.dtype))
    return own, exact, allowed


def assert_within(spec, found, own, exact, allowed) -> None:
    """`check`'s bounds for what was found, from the own distance of a plain form and what is
    allowed besides."""
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        if spec.dtype == HALF:
            rounded = distance(held(wanted, HALF).astype(np.float64), wanted)
            bound = max(1e-5, 2 * max(distance(own[name], wanted), rounded))
        else:
            bound = max(1e-5, 3 * distance(own[name], wanted))
        bound += allowed[name]
        error = distance(found[name], wanted)
        assert error <= bound, f"{spec}: {name} is {error:.1e} off, at most {bound:.1e}"
