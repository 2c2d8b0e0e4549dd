"""Recurrences without products: against their references, by the interpreters, as lowered, and
through the cells."""

import dataclasses
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
from memjax.cells.rg_lru import RGLRU, Level
from memjax.cells.rwkv4 import RWKV4, Sums
from memjax.typing import fields
from pallas_kernels import interpreted, linear_scan, ops, walks, walks_tpu, wkv4
from pallas_kernels.linear_scan import reference as scan
from pallas_kernels.linear_scan import rule as scan_rule
from pallas_kernels.linear_scan import specs as scan_specs
from pallas_kernels.specs import held
from pallas_kernels.wkv4 import reference as rwkv
from pallas_kernels.wkv4 import rule as rwkv_rule
from pallas_kernels.wkv4 import specs as rwkv_specs

OPS = {
    "linear_scan": (linear_scan, scan, scan_specs.SPECS),
    "wkv4": (wkv4, rwkv, rwkv_specs.SPECS),
}
CASES = kernel_checks.cases(OPS)


def results(op, spec, dtype) -> dict[str, np.ndarray]:
    """Outputs and gradients of everything an op can be differentiated by, as float64.

    dtype: of the first array, and of all of a narrow spec; the others are float32, or float64 with
    it. The cotangent of y is held by the spec's dtype.
    """
    given = spec.inputs()
    reset, state = (given.pop(name) for name in ("reset", "initial_state"))
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    x = {
        name: jnp.asarray(a, wide if n and not spec.narrow else dtype)
        for n, (name, a) in enumerate(given.items())
    }
    if state is not None:
        x["state"] = jax.tree.map(lambda a: jnp.asarray(a, wide), state)
    more = {"weighted": True} if spec.weighted else {}
    rng = np.random.default_rng(1)
    shape = spec.B, spec.T, spec.D
    dy = held(rng.standard_normal(shape), spec.dtype)
    dstate = rng.standard_normal((3, spec.B, spec.D)).astype(np.float32)

    @jax.jit
    def run(x, dy, dstate):
        def of(x):
            arrays = {name: a for name, a in x.items() if name != "state"}
            return op(**arrays, initial_state=x.get("state"), reset=reset, **more)

        (y, state), backward = jax.vjp(of, x)
        leaves, tree = jax.tree.flatten(state)
        slopes = [a.astype(b.dtype) for a, b in zip(dstate, leaves, strict=False)]
        (gradients,) = backward((dy.astype(y.dtype), jax.tree.unflatten(tree, slopes)))
        return {"y": y, "state": state} | {f"d{name}": a for name, a in gradients.items()}

    found = jax.tree_util.tree_leaves_with_path(run(x, dy, dstate))
    return {jax.tree_util.keystr(path): np.asarray(a, np.float64) for path, a in found}


def check(case, how=True, platform="tpu") -> None:
    """The bounds of `kernel_checks.check`. Gradients that are zero, such as that of the exponent of
    sums that are only read, are sums of terms of size 1 that cancel: at most 1e-5 off."""
    op, reference, _ = OPS[case.op]
    spec = case.spec
    with kernel_checks.on_cpu(), contract.x64(True):
        exact = results(reference.sequential, spec, jnp.float64)
    half = spec.dtype == kernel_checks.HALF
    size = max(n for n in (1, 4, 8) if spec.T % n == 0)
    plain = partial(reference.chunked, chunk=size) if half else reference.sequential
    with kernel_checks.on_cpu():
        own = results(plain, spec, jnp.dtype(spec.dtype))
    with kernel_checks.running(platform, how):
        found = results(op, spec, jnp.dtype(spec.dtype))
    for name in [name for name, wanted in exact.items() if np.abs(wanted).max() < 1e-12]:
        error = np.abs(found.pop(name)).max()
        assert error < 1e-5, f"{spec}: {name} is {error:.1e} off, at most 1e-5"
        del exact[name]
    kernel_checks.assert_within(spec, found, own, exact, dict.fromkeys(exact, 0.0))


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    check(case)


def shorter(case):
    """The case with 72 tokens at most: an interpreter that looks for races takes milliseconds for
    each."""
    length = min(case.spec.T, 72)
    resets = tuple(t for t in case.spec.resets if t < length)
    return case._replace(spec=dataclasses.replace(case.spec, T=length, resets=resets))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES.values() if "race" in c.spec.tags], ids=str)
def test_no_races_and_no_uninitialised_memory(case, monkeypatch):
    """In blocks of 32 tokens."""
    monkeypatch.setattr(walks_tpu, "TOKENS", 32)
    check(shorter(case), race())


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_a_walk_in_parallel_is_found(op, monkeypatch):
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    fake = SimpleNamespace(CompilerParams=lambda **_: parallel, VMEM=pltpu.VMEM)
    monkeypatch.setattr(walks_tpu, "pltpu", fake)
    monkeypatch.setattr(walks_tpu, "TOKENS", 32)
    with pytest.raises(Exception, match="RACE DETECTED|not finite|off, at most"):
        check(shorter(CASES[f"{op}-resets"]), race())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "linear_scan-gate_slow",
        "linear_scan-weighted_resets",
        "wkv4-only_read",
        "wkv4-large_exponents",
    ],
)
def test_the_chunked_reference_is_the_token_loop(name):
    spec, reference = CASES[name].spec, OPS[CASES[name].op][1]
    size = max(n for n in (4, 10, 16) if spec.T % n == 0)
    with contract.x64(True):
        wanted = results(reference.sequential, spec, jnp.float64)
        found = results(partial(reference.chunked, chunk=size), spec, jnp.float64)
    for leaf, value in wanted.items():
        assert kernel_checks.distance(found[leaf], value) < 1e-10, leaf


def forgets_nothing(name, reset, logs):
    return logs


def starts_with_ones(carried, given):
    walks_tpu.store(carried, [jnp.ones(ref.shape) for ref in carried])


def walks_forward(step, state, given, made, *, backward=False, unroll):
    return WALK(step, state, given, made, unroll=unroll)


WALK = walks_tpu.walk


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, module, name, mistake",
    [
        ("linear_scan-resets", walks, "forgetting", forgets_nothing),
        ("wkv4-resets", walks, "forgetting", forgets_nothing),
        ("linear_scan-one_block", walks_tpu, "begin", starts_with_ones),
        ("linear_scan-one_block", walks_tpu, "walk", walks_forward),
        ("linear_scan-weighted_gate_slow", scan_rule, "left", lambda g, a: 1 - a * a),
        ("wkv4-only_read", rwkv_rule, "EMPTY", 2.0 * rwkv_rule.EMPTY),
    ],
)
def test_the_check_finds_a_planted_mistake(case, module, name, mistake, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(AssertionError, match="off, at most|not finite"):
        check(CASES[case])


# ---------------------------------------------------------------- refusals


def arrays(op, dtype=jnp.float32):
    return ops.arguments(op, "channel", (1, 32, 2, 64), dtype)


def shapes_of(op, given, **options):
    return jax.eval_shape(lambda given: OPS[op][0](**given, **options), given)


@pytest.mark.parametrize("op", OPS)
def test_a_refusal_has_its_reason(op):
    with pytest.raises(NotImplementedError, match=f"{op} has kernels for .*, none for cpu"):
        shapes_of(op, arrays(op), platform="cpu")
    with pytest.raises(NotImplementedError, match=f"{op} takes .* bfloat16; given float16"):
        shapes_of(op, arrays(op, jnp.float16), platform="tpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"first": (1, 31, 128)}, r"must all be \[B, T, D\]; given . \[1, 31, 128\], "),
        ({"first": (1, 32, 2, 64)}, r"must all be \[B, T, D\]; given . \[1, 32, 2, 64\], "),
        ({"all": (1, 0, 128)}, r"nothing to do for \[1, 0, 128\]"),
        ({"initial_state": (1, 64)}, r"initial_state must be \[1, 128\]; given \[1, 64\]"),
        ({"reset": (1, 30)}, r"reset must be bool\[1, 32\]; given float32\[1, 30\]"),
        ({"reset": (1, 32)}, r"reset must be bool\[1, 32\]; given float32\[1, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_told(op, changes, message):
    given = arrays(op)
    named = {"first": list(given)[:1], "all": list(given)}
    for what, shape in changes.items():
        array = jax.ShapeDtypeStruct(shape, jnp.float32)
        if what == "initial_state" and op == "wkv4":
            array = (array,) * 3
        given |= dict.fromkeys(named.get(what, [what]), array)
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        shapes_of(op, given, platform="tpu")


# ---------------------------------------------------------------- what runs


def loss(op, given):
    y, state = OPS[op][0](**given, platform="tpu")
    return y.sum() + sum((a**2).sum() for a in jax.tree.leaves(state))


def kernels(fn, op):
    """How often each kernel is in the lowered program."""
    text = jax.jit(fn).trace(arrays(op)).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(rf'kernel_name = "{op}_([^"]+)"', text)
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("op", OPS)
def test_how_often_the_kernels_run(op):
    once = partial(loss, op)
    assert kernels(once, op) == {"forward": 1}
    assert kernels(jax.value_and_grad(once), op) == {"backward": 1, "forward": 1}
    again = jax.value_and_grad(jax.checkpoint(once))
    assert kernels(again, op) == {"backward": 1, "forward": 2}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernel(op):
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    grad = jax.grad(jax.checkpoint(partial(loss, op), policy=policy))
    assert kernels(grad, op) == {"backward": 1, "forward": 1}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_vmap_is_a_loop(op):
    spec = CASES[f"{op}-ragged"].spec
    rows = [spec.inputs(seed) for seed in (0, 1)]

    @jax.jit
    def run(given):
        y, state = OPS[op][0](**given)
        return (y**3).sum() + sum((a**2).sum() for a in jax.tree.leaves(state)), (y, state)

    both = jax.value_and_grad(run, has_aux=True)
    with interpreted():
        wanted = jax.tree.map(lambda *a: np.stack(a), *map(both, rows))
        found = jax.vmap(both)(jax.tree.map(lambda *a: np.stack(a), *rows))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-6


@pytest.mark.parametrize(
    "channels, dtype, length, block",
    [
        (1024, jnp.bfloat16, 4096, (256, 1024)),
        (2560, jnp.bfloat16, 4096, (256, 640)),
        (128, jnp.float32, 1, (32, 128)),
        (1536, jnp.bfloat16, 100, (128, 768)),
    ],
)
def test_blocks(channels, dtype, length, block):
    x, g = (jax.ShapeDtypeStruct((1, length, channels), a) for a in (dtype, jnp.float32))
    assert walks_tpu.block(scan_rule.RULE, (x, g), channels) == block


def test_the_bytes_that_are_counted():
    given = ops.arguments("linear_scan", "channel", (1, 256, 8, 64), jnp.bfloat16)
    flops, size = ops.work(ops.function(linear_scan, "forward", platform="tpu"), given)
    assert flops == 0
    assert size == 512 * (256 * (2 + 4 + 2) + 2 * 4)


# ---------------------------------------------------------------- cells


CELLS = {"rg_lru": RGLRU(24), "rwkv4": RWKV4(24)}


def cell_inputs(cell, dtype=np.float32):
    """Inputs for two heads that share what a token leaves of the state, resets, tokens that only
    read, and a state, which one memory of three has none of."""
    rng = np.random.default_rng(0)
    batch, length, heads, size = 3, 37, 2, cell.value_dim

    def leaf(name, field):
        count = 1 if field.kind == "log_decay" else heads
        x = rng.standard_normal((batch, length, count, size))
        x = -np.abs(x) if field.kind == "log_decay" else x
        return x.astype(dtype if name in "xv" else np.float32)

    xs = cell.inputs(*(leaf(*item) for item in fields(cell.inputs).items()))
    state = rng.standard_normal((3, batch, heads, size)).astype(np.float32)
    begun = np.array([[1, 1], [0, 1], [1, 0]], np.int32)
    filled = Sums(state[0], np.exp(state[1]), state[2])
    state = Level(np.where(begun[..., None], state[0], 0), begun) if type(cell) is RGLRU else filled
    reset = rng.random((batch, length)) < 0.1
    write = rng.random((batch, length, heads)) < 0.7
    return xs, {"state": state, "reset": reset, "write": write}


def outcome(cell, form, xs, given, platform="tpu", how=True):
    """Answers, state, and gradients of the inputs and of what is real in the state."""

    def loss(xs, state):
        given_state = None if state is None else given["state"]._replace(**state)
        y, new = memjax.run(cell, {}, xs, **given | {"state": given_state}, implementation=form)
        new = [a for a in jax.tree.leaves(new) if a.dtype == jnp.float32]
        whole = sum((a**2).sum() for a in new)
        return (y.astype(jnp.float32) ** 3).sum() + whole, (y, new)

    state = given["state"]
    if state is not None:
        state = {n: a for n, a in state._asdict().items() if a.dtype == np.float32}
    with kernel_checks.running(platform, how):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(xs, state)


def written_alone(gradients, given):
    """Of a state without a token, which is zero, `scan` has a slope."""
    (dxs, dstate), begun = gradients, getattr(given["state"], "begun", None)
    if begun is not None:
        dstate = {"h": np.where(begun[..., None], dstate["h"], 0)}
    return dxs, dstate


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("masks", ["all", pytest.param("none", marks=pytest.mark.slow)])
def test_cells_run_them(name, masks):
    cell = CELLS[name]
    xs, given = cell_inputs(cell)
    given = given if masks == "all" else dict.fromkeys(given)
    (_, wanted), gradients = outcome(cell, "scan", xs, given)
    (_, found), ours = outcome(cell, "pallas", xs, given)
    wanted, found = (wanted, written_alone(gradients, given)), (found, written_alone(ours, given))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-5
    with pytest.raises(NotImplementedError, match="none for cpu"):
        memjax.run(cell, {}, xs, **given, implementation="pallas")


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_what_a_token_that_only_reads_would_write_does_not_matter(name):
    cell = CELLS[name]
    xs, given = cell_inputs(cell)
    xs = jax.tree.map(lambda a: jnp.repeat(a, 2 // a.shape[2], axis=2), xs)
    hidden = jax.tree.map(lambda a: jnp.where(given["write"][..., None], a, jnp.nan), xs)
    (_, wanted), _ = outcome(cell, "pallas", xs, given)
    (_, found), _ = outcome(cell, "pallas", hidden, given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_a_memory_that_is_not_written_stays_as_it_is(name):
    cell = CELLS[name]
    xs, given = cell_inputs(cell)
    never = given | {"write": np.zeros((3, 37), bool), "reset": None}
    with interpreted():
        _, kept = memjax.run(cell, {}, xs, **never, implementation="pallas")
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(given["state"]), strict=True):
        np.testing.assert_array_equal(a, b)
