"""Ridge regression over all pairs: against its reference, by the interpreters, as lowered, and
through the cell."""

import re
from functools import partial
from types import SimpleNamespace

import contract
import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_ops import race

import memjax
from memjax.cells.gated_kalmanet import GatedKalmaNet, Inputs, Moments
from pallas_kernels import gka, interpreted, ops
from pallas_kernels.gka import reference, tpu, tpu_vjp
from pallas_kernels.gka.specs import SPECS, Spec, flat

CASES = kernel_checks.cases({"gka": (gka, reference, SPECS)})


def check(case, how=True):
    spec = case.spec
    size = max(n for n in (1, 8, 32) if spec.T % n == 0)
    with kernel_checks.running("tpu", how):
        kernel_checks.check(
            flat(gka, spec, chunk=spec.chunk),
            flat(reference.sequential, spec),
            flat(reference.chunked, spec, chunk=size),
            spec,
        )


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES.values() if "race" in c.spec.tags], ids=str)
def test_no_races_and_no_uninitialised_memory(case):
    check(case, race())


@pytest.mark.slow
@pytest.mark.parametrize("module", [tpu, tpu_vjp])
def test_a_walk_in_parallel_is_found(module, monkeypatch):
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    fake = SimpleNamespace(**{**vars(pltpu), "CompilerParams": lambda **_: parallel})
    monkeypatch.setattr(module, "pltpu", fake)
    with pytest.raises(Exception, match="RACE DETECTED|not finite|off, at most"):
        check(CASES["gka-ragged"], race())


@pytest.mark.parametrize("name", ["resets", "ragged", "alike_keys"])
def test_the_chunked_reference_is_the_token_loop(name):
    spec = CASES[f"gka-{name}"].spec
    length = spec.T // 16 * 16
    spec = Spec(
        **{**vars(spec), "T": length, "resets": tuple(t for t in spec.resets if t < length)}
    )
    with contract.x64(True):
        wanted = kernel_checks.results(flat(reference.sequential, spec), spec, jnp.float64)
        found = kernel_checks.results(flat(reference.chunked, spec, chunk=16), spec, jnp.float64)
    for leaf, value in wanted.items():
        assert kernel_checks.distance(found[leaf], value) < 1e-10, leaf


def test_enough_iterations_solve():
    """x is (H + a ||H|| I)^-1 q by elimination, as far as the bound of the paper says."""
    rng, (a, count) = np.random.default_rng(0), (0.02, 30)
    k = rng.standard_normal((12, 8))
    h, q = k.T @ k, rng.standard_normal(8)
    with contract.x64(True):
        x = reference.solved(lambda x: x @ h, jnp.sum(h * h)[None], q[None], a, count)
    wanted = np.linalg.solve(h + a * np.linalg.norm(h) * np.eye(8), q)
    root = np.sqrt((1 + a) / a)
    bound = 2 * ((root - 1) / (root + 1)) ** (count + 1)
    assert 0 < np.linalg.norm(x[0] - wanted) < bound * np.linalg.norm(wanted)


def forgets_the_norm(found):
    return found._replace(square=jnp.ones_like(found.square))


def forgets_pairs_of_the_chunk(found):
    return found._replace(near=jnp.zeros_like(found.near))


def sees_later(found):
    return found._replace(weights=found.weights + found.weights.T)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, mistake",
    [
        (tpu, forgets_the_norm),
        (tpu_vjp, forgets_the_norm),
        (tpu_vjp, forgets_pairs_of_the_chunk),
        (tpu, sees_later),
        (tpu_vjp, sees_later),
    ],
)
def test_the_check_finds_a_planted_mistake(module, mistake, monkeypatch):
    right = tpu.moments

    def mistaken(*given):
        return mistake((yield from right(*given)))

    monkeypatch.setattr(module, "moments", mistaken)
    with pytest.raises(AssertionError, match="off, at most|not finite"):
        check(CASES["gka-resets"])


# ---------------------------------------------------------------- refusals


def arrays(heads=2, width=64, dtype=jnp.float32):
    return ops.arguments("gka", "head", (1, 32, heads, width), dtype)


def shaped(given, **options):
    return jax.eval_shape(lambda given: gka(**given, **{"platform": "tpu", **options}), given)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(platform="cpu"), "none for cpu"),
        ({}, dict(platform="gpu"), "none for gpu"),
        (dict(width=32), {}, "K = 32"),
        (dict(dtype=jnp.float16), {}, "float16"),
        ({}, dict(chunk=128), "chunks of .64, 32, 16.; given 128"),
        (dict(heads=60, width=256), {}, "60 heads"),
        ({}, dict(iterations=3000), "does not fit"),
    ],
)
def test_a_refusal_has_its_reason(changes, options, message):
    with pytest.raises(NotImplementedError, match=f"gka .*{message}"):
        shaped(arrays(**changes), **options)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"k": (1, 31, 2, 64)}, {}, r"k must be \[1, 32, 2, 64\]; given \[1, 31, 2, 64\]"),
        ({"g": (1, 32, 2, 64)}, {}, r"g must be \[1, 32, 2\]; given \[1, 32, 2, 64\]"),
        ({"alpha": (1, 32, 1)}, {}, r"alpha must be \[1, 32, 2\]; given \[1, 32, 1\]"),
        ({"beta": (1, 32, 1)}, {}, r"beta must be \[1, 32, 2\]; given \[1, 32, 1\]"),
        ({}, {"iterations": 0}, "iterations at least 1; given 0.02 and 0"),
        ({}, {"ridge": 0.0}, "ridge must be above 0 .*given 0.0 and 30"),
    ],
)
def test_what_does_not_fit_is_told(changes, options, message):
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in changes.items()}
    with pytest.raises(ValueError, match=f"gka: .*{message}"):
        shaped(arrays() | shapes, **options)


@pytest.mark.parametrize("n", [0, 1])
def test_a_state_of_another_size_is_told(n):
    state = [jnp.zeros((1, 2, 64, 64)), jnp.zeros((1, 2, 64, 64))]
    state[n] = jnp.zeros((1, 2, 32, 64))
    with pytest.raises(ValueError, match=rf"gka: initial_state\[{n}\] must be \[1, 2, 64, 64\]"):
        shaped(arrays(), initial_state=tuple(state))


# ---------------------------------------------------------------- what runs


def loss(given):
    o, (held, linear) = gka(**given, platform="tpu")
    return o.sum() + (held**2).sum() + (linear**2).sum()


def kernels(fn):
    """How often each kernel is in the lowered program."""
    text = jax.jit(fn).trace(arrays()).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(r'kernel_name = "([^"]+)"', text)
    return {name: names.count(name) for name in sorted(set(names))}


FORWARD = {"chunk_linear_forward": 1, "gka_forward": 1}
BOTH = {"chunk_linear_backward": 1, "gka_backward": 1} | FORWARD


def test_how_often_the_kernels_run():
    assert kernels(loss) == FORWARD
    assert kernels(jax.value_and_grad(loss)) == BOTH


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernels():
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    assert kernels(jax.grad(jax.checkpoint(loss, policy=policy))) == BOTH


# ---------------------------------------------------------------- the cell


def cell_inputs():
    """Inputs of two memories, whose keys they share; resets, tokens that only read, a state."""
    rng, shape = np.random.default_rng(0), (2, 37)

    def normal(*axes):
        return rng.standard_normal((*shape, *axes)).astype(np.float32)

    k = normal(1, 64)
    rates = [np.abs(normal(2)) % 1 for _ in range(2)]
    g = -np.abs(normal(2))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    xs = Inputs(normal(1, 64), k, normal(2, 64), rates[0], g, rates[1])
    given = {"reset": rng.random(shape) < 0.1, "write": rng.random((*shape, 1)) < 0.8}
    return xs, jax.tree.map(jnp.asarray, given)


@pytest.fixture(scope="module")
def cell():
    return GatedKalmaNet(64, 64, iterations=3)


@pytest.fixture(scope="module")
def state(cell):
    xs, _ = cell_inputs()
    return memjax.run(cell, {}, xs, implementation="scan")[1]


def test_the_cell_runs_it(cell, state):
    xs, given = cell_inputs()
    given["state"] = state
    wanted = memjax.run(cell, {}, xs, **given, implementation="scan")
    with interpreted():
        found = memjax.run(cell, {}, xs, **given, implementation="pallas")
    assert isinstance(found[1], Moments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-5


def test_what_a_token_that_only_reads_would_write_does_not_matter(cell, state):
    xs, given = cell_inputs()
    given["state"] = state
    written = given["write"]
    hidden = {
        leaf: jnp.where(jnp.expand_dims(written, range(3, array.ndim)), array, jnp.nan)
        for leaf, array in xs._asdict().items()
        if leaf not in ("q", "alpha")
    }
    never = given | {"write": jnp.zeros_like(written), "reset": None}
    with interpreted():
        run = partial(memjax.run, cell, {}, implementation="pallas")
        wanted, found = (run(x, **given) for x in (xs, xs._replace(**hidden)))
        _, kept = run(xs, **never)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_iterations_have_no_kernel():
    xs, _ = cell_inputs()
    with interpreted(), pytest.raises(NotImplementedError, match="iterations=0.*use 'chunked'"):
        memjax.run(GatedKalmaNet(64, 64, iterations=0), {}, xs, implementation="pallas")


def test_products_of_a_loop_are_counted_as_often_as_it_runs():
    def flops(iterations):
        op = ops.function(gka, "forward", platform="tpu", iterations=iterations)
        return ops.work(op, arrays())[0]

    tokens, width, heads = 32, 64, 2
    once = 2 * tokens * (2 * tokens * width + width * width) * heads
    assert flops(7) - flops(2) == 5 * once
