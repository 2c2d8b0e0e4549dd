"""Every op: against its reference, by the interpreters, as lowered, and through the cells."""

import dataclasses
import itertools
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

import memjax
from memjax.cells.delta_net import DeltaNet
from memjax.cells.delta_product import DeltaProduct
from memjax.cells.dplr import DPLR
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.gla import GLA
from memjax.cells.kda import KDA
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.simple_gla import SimpleGLA
from pallas_kernels import chunk_delta, chunk_dplr, chunk_linear, decays, interpreted, ops
from pallas_kernels.chunk_delta import reference as delta
from pallas_kernels.chunk_delta import specs as delta_specs
from pallas_kernels.chunk_delta import tpu as delta_tpu
from pallas_kernels.chunk_delta import tpu_vjp as delta_vjp
from pallas_kernels.chunk_dplr import reference as dplr
from pallas_kernels.chunk_dplr import specs as dplr_specs
from pallas_kernels.chunk_dplr import tpu as dplr_tpu
from pallas_kernels.chunk_dplr import tpu_vjp as dplr_vjp
from pallas_kernels.chunk_linear import reference as linear
from pallas_kernels.chunk_linear import specs as linear_specs
from pallas_kernels.chunk_linear import tpu as linear_tpu
from pallas_kernels.chunk_linear import tpu_vjp as linear_vjp
from pallas_kernels.specs import Spec

OPS = {
    "chunk_linear": (chunk_linear, linear, linear_specs.SPECS),
    "chunk_delta": (chunk_delta, delta, delta_specs.SPECS),
    "chunk_dplr": (chunk_dplr, dplr, dplr_specs.SPECS),
}
MODULES = (linear_tpu, linear_vjp, delta_tpu, delta_vjp, dplr_tpu, dplr_vjp)


def race():
    """The interpreter that detects races, with two cores; jax 0.7 has none with more than one."""
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
        num_cores_or_threads=2,
        random_seed=0,
    )


CASES = kernel_checks.cases(OPS)


def check(case, how=True):
    op, reference, _ = OPS[case.op]
    size = max(n for n in (1, 8, 32) if case.spec.T % n == 0)
    with kernel_checks.running("tpu", how):
        kernel_checks.check(
            partial(op, chunk=case.spec.chunk),
            reference.sequential,
            partial(reference.chunked, chunk=size),
            case.spec,
        )


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES.values() if "race" in c.spec.tags], ids=str)
def test_no_races_and_no_uninitialised_memory(case):
    check(case, race())


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_a_walk_in_parallel_is_found(module, monkeypatch):
    """Chunks wait for each other; by one core the interpreter would not notice."""
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    fake = SimpleNamespace(CompilerParams=lambda **_: parallel)
    monkeypatch.setattr(module, "pltpu", fake)
    op = module.__name__.split(".")[1]
    with pytest.raises(Exception, match="RACE DETECTED|not finite|off, at most"):
        check(CASES[f"{op}-resets"], race())


@pytest.mark.parametrize(
    "op, name",
    [
        *itertools.product(
            ("chunk_linear", "chunk_delta"), ("no_decay_resets", "gate_mixed", "channel_resets")
        ),
        ("chunk_dplr", "channel_resets"),
    ],
)
def test_the_chunked_reference_is_the_token_loop(op, name):
    spec, reference = CASES[f"{op}-{name}"].spec, OPS[op][1]
    with contract.x64(True):
        wanted = kernel_checks.results(reference.sequential, spec, jnp.float64)
        found = kernel_checks.results(partial(reference.chunked, chunk=16), spec, jnp.float64)
    for leaf, value in wanted.items():
        assert kernel_checks.distance(found[leaf], value) < 1e-10, leaf


def sees_later(decay):
    return dataclasses.replace(decay, between=decay.between + decay.between.T)


def keeps_all(decay):
    return dataclasses.replace(decay, through=jnp.ones_like(decay.through))


def forgets_a_level(decay):
    *others, last = decay.levels
    return dataclasses.replace(decay, levels=[*others, jnp.ones_like(last)])


def forgets_the_middle(decay):
    up, down = decay.near
    return dataclasses.replace(decay, near=(up, jnp.ones_like(down)))


MISTAKES = {
    ("resets", sees_later): MODULES[:4],
    ("resets", keeps_all): MODULES[:4],
    ("channel", keeps_all): MODULES,
    ("channel", forgets_a_level): MODULES[:4],
    ("channel", forgets_the_middle): MODULES[:4],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name, mistake",
    [(module, *mistake) for mistake, modules in MISTAKES.items() for module in modules],
)
def test_the_check_finds_a_planted_mistake(module, name, mistake, monkeypatch):
    def mistaken(*given, **more):
        return list(map(mistake, decays.of_heads(*given, **more)))

    fake = SimpleNamespace(**{**vars(decays), "of_heads": mistaken})
    monkeypatch.setattr(module, "decays", fake)
    op = module.__name__.split(".")[1]
    with pytest.raises(AssertionError, match="off, at most"):
        check(CASES[f"{op}-{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("module, name", [(dplr_tpu, "earlier"), (dplr_vjp, "later")])
def test_the_check_finds_what_reads_a_token_late(module, name, monkeypatch):
    monkeypatch.setattr(module, name, lambda x, first=0.0: x)
    with pytest.raises(AssertionError, match="off, at most"):
        check(CASES["chunk_dplr-ragged"])


SLOW = dict(decay="channel", gate=0.2, removal=(0, 1), T=64, H=1, chunk=32, resets=(0, 7, 33))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slow_decays(dtype):
    """With `lowest` all pairs of a chunk are one product, those of documents apart."""
    spec, lowest = Spec(name="slow", dtype=dtype, **SLOW), -1.1
    assert spec.inputs()["g"].min() > lowest
    op = partial(chunk_dplr, chunk=spec.chunk, lowest=lowest)
    with interpreted():
        kernel_checks.check(op, dplr.sequential, partial(dplr.chunked, chunk=32), spec)


def test_slow_decays_take_fewer_products():
    def flops(**more):
        op = ops.function(chunk_dplr, "both", platform="tpu", **more)
        given = arrays("chunk_dplr")
        return ops.work(op, given, given["v"])[0]

    assert flops(lowest=-20) == flops() > 1.2 * flops(lowest=-0.61)


def test_a_bound_that_no_decay_has_is_told():
    given, message = arrays("chunk_dplr"), "lowest must be at most 0, as log decays are; given 0.5"
    with pytest.raises(ValueError, match=f"chunk_dplr: {message}"):
        jax.eval_shape(lambda arrays: chunk_dplr(**arrays, platform="tpu", lowest=0.5), given)


# ---------------------------------------------------------------- refusals


def arrays(op="chunk_linear", heads=2, width=64, dtype=jnp.float32):
    decay = "channel" if op == "chunk_dplr" else "head"
    return ops.arguments(op, decay, (1, 32, heads, width), dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(platform="cpu"), "none for cpu"),
        (dict(width=32), {}, "K = 32"),
        (dict(dtype=jnp.float16), {}, "float16"),
        ({}, dict(chunk=24), "given 24"),
        (dict(heads=60, width=256), {}, "60 heads"),
    ],
)
def test_a_refusal_has_its_reason(op, changes, options, message):
    given = {"platform": "tpu", **arrays(op, **changes), **options}
    shapes = {k: v for k, v in given.items() if hasattr(v, "shape")}
    others = {k: v for k, v in given.items() if k not in shapes}
    with pytest.raises(NotImplementedError, match=f"{op} .*{message}"):
        jax.eval_shape(lambda shapes: OPS[op][0](**shapes, **others), shapes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": (1, 31, 2, 64)}, r"k must be \[1, 32, 2, 64\]; given \[1, 31, 2, 64\]"),
        ({"g": (1, 32, 4)}, r"g must be \[1, 32, 2(, 64)?\]; given \[1, 32, 4\]"),
        ({"reset": (1, 30)}, r"reset must be \[1, 32\]"),
        ({"reset": (1, 32)}, "reset must be bool; given float32"),
        ({"initial_state": (1, 2, 64, 32)}, r"initial_state must be \[1, 2, 64, 64\]"),
        ({"v": (1, 32, 3, 64), "g": (1, 32, 3), "beta": (1, 32, 3)}, "2 heads of q and k"),
        ({"v": (32, 2, 64)}, r"q, k,( a, b,)? v must be \[B, T, h, D\]"),
    ],
)
def test_shapes_that_do_not_fit_are_told(op, changes, message):
    given = arrays(op)
    for name, shape in changes.items():
        if name == "g" and op == "chunk_dplr" and shape[2] == 3:
            shape = (*shape, 64)
        if name in given or name in ("reset", "initial_state"):
            given[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        jax.eval_shape(lambda given: OPS[op][0](**given, platform="tpu"), given)


# ---------------------------------------------------------------- what runs


def loss(op, given):
    o, state = OPS[op][0](**given, platform="tpu")
    return o.sum() + (state**2).sum()


def kernels(fn, given):
    """How often each kernel is in the lowered program."""
    text = jax.jit(fn).trace(given).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(r'kernel_name = "chunk_[a-z]*_([^"]+)"', text)
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("op", OPS)
def test_how_often_the_kernels_run(op):
    def twice(given):
        return loss(op, given | {"q": OPS[op][0](**given, platform="tpu")[0]})

    once, given = partial(loss, op), arrays(op)
    assert kernels(once, given) == {"forward": 1}
    assert kernels(jax.value_and_grad(once), given) == {"backward": 1, "forward": 1}
    again = jax.value_and_grad(jax.checkpoint(twice))
    assert kernels(again, given) == {"backward": 2, "forward": 4}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernel(op):
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    grad = jax.grad(jax.checkpoint(partial(loss, op), policy=policy))
    assert kernels(grad, arrays(op)) == {"backward": 1, "forward": 1}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shared", [(), ("q", "k", "reset", "initial_state")])
def test_vmap_is_a_loop(op, shared):
    """Values and gradients, of all arrays or with some that all share."""
    more: dict = {
        "chunk_linear": {},
        "chunk_delta": {"beta": (0, 1)},
        "chunk_dplr": {"removal": (0, 1), "decay": "channel", "H": 1},
    }[op]
    spec = Spec(name="", B=2, T=37, resets=(3, 20), **more)
    one, two = (spec.inputs(seed) for seed in (0, 1))
    rows = [one, two | {name: one[name] for name in shared}]
    many = {name: a if name in shared else np.stack([a, two[name]]) for name, a in one.items()}

    @jax.jit
    def both(given):
        def loss(x):
            o, state = OPS[op][0](**given | x, chunk=16)
            return (o**3).sum() + (state**2).sum(), (o, state)

        arrays = {name: a for name, a in given.items() if name != "reset"}
        return jax.value_and_grad(loss, has_aux=True)(arrays)

    with interpreted():
        wanted = jax.tree.map(lambda *a: np.stack(a), *map(both, rows))
        axes = ({name: None if name in shared else 0 for name in many},)
        found = jax.vmap(both, in_axes=axes)(many)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-6


def test_the_work_that_is_counted():
    given = ops.arguments("chunk_linear", "none", (1, 256, 8, 64), jnp.float32)
    given["v"] = jax.ShapeDtypeStruct((1, 256, 8, 128), jnp.float32)
    flops, size = ops.work(ops.function(chunk_linear, "forward", platform="tpu", chunk=32), given)
    chunks, c, k, v = 8 * 8, 32, 64, 128
    assert flops == chunks * 2 * (c * c * k + c * c * v + 2 * c * k * v)
    assert size == 4 * 8 * (256 * (2 * k + 2 * v) + 2 * k * v)


# ---------------------------------------------------------------- cells


CELLS = {
    "linear_attention": LinearAttention(64, 64, scale=0.5),
    "simple_gla": SimpleGLA(64, 64),
    "delta_net": DeltaNet(64, 64),
    "gated_delta_net": GatedDeltaNet(64, 64),
    "gla": GLA(64, 64),
    "kda": KDA(64, 64),
    "dplr": DPLR(64, 64),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_run_them(name):
    cell = CELLS[name]
    xs, given = kernel_checks.cell_inputs(cell)
    wanted = memjax.run(cell, {}, xs, **given, implementation="scan")
    with interpreted():
        found = memjax.run(cell, {}, xs, **given, implementation="pallas")
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-5
    never = given | {"write": jnp.zeros((2, 37, 2), bool), "reset": None}
    with interpreted():
        _, kept = memjax.run(cell, {}, xs, **never, implementation="pallas")
    np.testing.assert_array_equal(kept, given["state"])
    with pytest.raises(NotImplementedError, match="none for cpu"):
        memjax.run(cell, {}, xs, **given, implementation="pallas")


@pytest.mark.parametrize("name", CELLS)
def test_what_a_token_that_only_reads_would_write_does_not_matter(name):
    cell = CELLS[name]
    xs, given = kernel_checks.cell_inputs(cell)
    hidden = {
        leaf: jnp.where(jnp.expand_dims(given["write"], range(2, array.ndim)), array, jnp.nan)
        for leaf, array in xs._asdict().items()
        if leaf != "q"
    }
    with interpreted():
        wanted = memjax.run(cell, {}, xs, **given, implementation="pallas")
        found = memjax.run(cell, {}, xs._replace(**hidden), **given, implementation="pallas")
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unknown_generation_is_told():
    with pytest.raises(ValueError, match="generations of tpu: v4, v5e.*given 'v9'"):
        jax.eval_shape(lambda given: chunk_linear(**given, platform="tpu v9"), arrays())


def test_a_cell_of_another_form_has_no_kernel():
    cell, shape = DeltaProduct(64, 64), (1, 8, 2)
    xs = cell.inputs(
        *(np.zeros((*shape, *axes), np.float32) for axes in ((64,), (2, 64), (2, 64), (2,), ()))
    )
    with interpreted(), pytest.raises(NotImplementedError, match="DeltaProduct has no Pallas"):
        memjax.run(cell, {}, xs, implementation="pallas")
