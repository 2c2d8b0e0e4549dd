"""Kernels for Hopper: against their references, on the GPU at hand or, without one, by the GPU
interpreter, which looks for races; and as lowered."""

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest
from kernel_checks import Case
from test_ops import CELLS

import memjax
from memjax import cost
from memjax.cells.dplr import DPLR
from pallas_kernels import bench, chunk_delta, chunk_dplr, chunk_linear, common, interpreted, ops
from pallas_kernels.chunk_delta import reference as delta
from pallas_kernels.chunk_delta import specs as delta_specs
from pallas_kernels.chunk_dplr import reference as dplr
from pallas_kernels.chunk_dplr import specs as dplr_specs
from pallas_kernels.chunk_linear import reference as linear
from pallas_kernels.chunk_linear import specs as linear_specs
from pallas_kernels.specs import Spec

if jax.__version_info__ < common.GPU_JAX:
    pytest.skip("the GPU interpreter needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels import mosaic_channels as channels
from pallas_kernels.chunk_dplr import gpu as dplr_gpu
from pallas_kernels.chunk_dplr import gpu_vjp as dplr_vjp

OPS = {
    "chunk_linear": (chunk_linear, linear, linear_specs.GPU_SPECS),
    "chunk_delta": (chunk_delta, delta, delta_specs.GPU_SPECS),
    "chunk_dplr": (partial(chunk_dplr, lowest=-1), dplr, dplr_specs.GPU_SPECS),
}
BY_CHANNEL = ("chunk_dplr",)  # with no other decays
RACE = plgpu.InterpretGPUParams(detect_races=True)


CASES = kernel_checks.cases(OPS)


def check(case):
    op, reference, _ = OPS[case.op]
    if case.spec.lowest is not None:
        op = partial(op, lowest=case.spec.lowest)
    with kernel_checks.running("gpu", RACE):
        kernel_checks.check(op, reference.sequential, plain(reference, case.spec.T), case.spec)


@functools.cache
def plain(reference, length):
    """The chunked form, in chunks that divide the length."""
    size = max(n for n in (1, 8, 32) if length % n == 0)

    def form(*given, g=None, **more):
        g = None if g is None else jnp.maximum(g, -60)  # it cannot take an infinite decay
        return reference.chunked(*given, g=g, chunk=size, **more)

    return form


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    check(case)


@pytest.mark.slow
@kernel_checks.needs_gpu
@pytest.mark.parametrize("width", common.WIDTHS)
@pytest.mark.parametrize("case", ops.ON_GPU, ids="-".join)
def test_many_blocks_at_once(case, width):
    """Eight chunks of 16 to 64 states, or of 4096 channels, are right and each time the same."""
    form, shape = bench.in_jax(ops.ON_GPU[case][0]), (4, 500, 1024 // width, width)
    assert not bench.wrong(*case, form, shape)
    call, _ = form(*bench.drawn(*case, shape), "both")
    first = jax.device_get(call())
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(call()), first)


SMALL = {
    "chunk_linear": Spec(name="small", T=100, dtype="bfloat16", resets=(40,)),
    "chunk_delta": Spec(name="small", T=200, dtype="bfloat16", resets=(40,), beta=(0.0, 2.0)),
    "chunk_dplr": Spec(name="small", **dplr_specs.ONE, gate=0.01, resets=(40,)),
}
SMALL_CASES = [
    Case(op, dataclasses.replace(spec, decay=decay, name=decay))
    for op, spec in SMALL.items()
    for decay in (() if op in BY_CHANNEL else ("head",)) + ("channel",)
]


def sees_later(original):
    return lambda x, sums, *backward: x


def keeps_all(original):
    return lambda x, sums: x


def takes_one_document(original):
    return lambda x, documents: original(x, None)


def forgets_a_level(original):
    return lambda bits: original(bits) & (bits != 2)


def does_not_decay(original):
    return lambda x, bits, since=None: original(x, bits, since) * 0 + 1


def passes_nothing(original):
    return lambda *given: 0 * original(*given)


MISTAKES = [
    *itertools.product(
        ("chunk_linear", "chunk_delta"),
        ("head",),
        (mosaic,),
        [("lower", sees_later), ("through", keeps_all)],
    ),
    *itertools.product(
        ("chunk_linear", "chunk_delta"),
        ("channel",),
        (channels,),
        [("joins", forgets_a_level), ("decay", does_not_decay)],
    ),
    ("chunk_dplr", "channel", dplr_gpu, ("factors", takes_one_document)),
    ("chunk_dplr", "channel", dplr_gpu, ("asking", takes_one_document)),
    ("chunk_dplr", "channel", dplr_vjp, ("lower", sees_later)),
    ("chunk_dplr", "channel", dplr_vjp, ("passed_on", passes_nothing)),
]


@pytest.mark.slow
@pytest.mark.parametrize("op, decay, module, mistake", MISTAKES)
def test_the_check_finds_a_planted_mistake(op, decay, module, mistake, monkeypatch):
    name, make = mistake
    monkeypatch.setattr(module, name, make(getattr(module, name)))
    with pytest.raises(AssertionError, match="off, at most"):
        check(Case(op, dataclasses.replace(SMALL[op], decay=decay)))


RACES = """
import test_gpu
from jax.experimental.pallas import mosaic_gpu
mosaic_gpu.{name} = lambda *_, **__: None
test_gpu.check(test_gpu.SMALL_CASES[{number}])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("barrier_wait", "RACE DETECTED"),
        ("commit_smem", "RACE DETECTED"),
        ("wait_smem_to_gmem", "copy_smem_to_gmem read-side operations completed before"),
    ],
)
@pytest.mark.parametrize("number", range(len(SMALL_CASES)), ids=map(str, SMALL_CASES))
def test_a_missing_wait_is_found(number, name, message):
    """In a process of its own: the interpreter cannot be used again after an error."""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = RACES.format(number=number, name=name)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode and message in done.stderr, done.stderr


# ---------------------------------------------------------------- refusals


def given(op, heads=2, width=64, dtype=jnp.bfloat16, decay="head"):
    decay = "channel" if op in BY_CHANNEL else decay
    return ops.arguments(op, decay, (1, 100, heads, width), dtype)


def shape_of(op, arrays, **options):
    return jax.eval_shape(lambda arrays: OPS[op][0](**arrays, platform="gpu", **options), arrays)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes, options, message",
    [
        (dict(dtype=jnp.float32), {}, "takes bfloat16 on GPUs, .* TF32; given float32"),
        (dict(width=32), {}, "K = 32"),
        ({}, dict(chunk=32), "chunks of 64 on GPUs; given 32"),
    ],
)
def test_a_refusal_has_its_reason(op, changes, options, message):
    with common.compiling_for("9.0"), pytest.raises(NotImplementedError, match=f"{op} .*{message}"):
        shape_of(op, given(op, **changes), **options)


@pytest.mark.parametrize("lowest", [None, -1.2])
def test_fast_decays_are_refused(lowest):
    message = f"chunk_dplr takes log decays of -1.125 and above on GPUs, .*lowest={lowest}; use"
    with common.compiling_for("9.0"), pytest.raises(NotImplementedError, match=message):
        shape_of("chunk_dplr", given("chunk_dplr"), lowest=lowest)


@pytest.mark.parametrize("op", OPS)
def test_other_gpus_are_refused(op, monkeypatch):
    with (
        common.compiling_for("8.0"),
        pytest.raises(NotImplementedError, match="9.0 .*has 8.0; use"),
    ):
        shape_of(op, given(op))
    monkeypatch.setattr(common, "gpu_capability", lambda: None)
    with pytest.raises(NotImplementedError, match="there is no GPU"):
        shape_of(op, given(op))


# ---------------------------------------------------------------- what runs


def loss(op, arrays):
    o, state = OPS[op][0](**arrays, platform="cuda")
    return o.astype(jnp.float32).sum() + (state**2).sum()


def kernels(op, fn, decay="head"):
    """How often each kernel is in the lowered program."""
    with common.compiling_for("9.0"):
        arrays = given(op, decay=decay)
        program = jax.jit(fn).trace(arrays).lower(lowering_platforms=("cuda",))
    names = re.findall(rf"\\00{op}_(\w+)_mosaic_gpu\\00", program.as_text())
    return {name: names.count(name) for name in sorted(set(names))}


# The kernels of an op's passes.
FORWARD = {
    "chunk_linear": ("states", "outputs"),
    "chunk_delta": ("inverses", "walk"),
    "chunk_dplr": ("weights", "walk", "outputs"),
}
BACKWARD = {
    "chunk_linear": ("states", "values", "keys"),
    "chunk_delta": ("walk", "pairs", "keys"),
    "chunk_dplr": ("walk", "values", "keys"),
}


def both(op, forward=1, backward=1):
    return {f"forward_{name}": forward for name in FORWARD[op]} | {
        f"backward_{name}": backward for name in BACKWARD[op]
    }


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_how_often_the_kernels_run(op):
    def twice(arrays):
        return loss(op, arrays | {"q": OPS[op][0](**arrays, platform="gpu")[0]})

    once = partial(loss, op)
    assert kernels(op, once) == {f"forward_{name}": 1 for name in FORWARD[op]}
    assert kernels(op, jax.value_and_grad(once)) == both(op)
    found, wanted = kernels(op, jax.value_and_grad(jax.checkpoint(twice))), both(op, 4, 2)
    if "outputs" in FORWARD[op]:  # nobody reads the outputs of the second forward pass of the last
        wanted["forward_outputs"] = 3
    assert found == wanted


@pytest.mark.parametrize("op", OPS)
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernel(op):
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    run = jax.value_and_grad(jax.checkpoint(partial(loss, op), policy=policy))
    assert kernels(op, run) == both(op)


@pytest.mark.parametrize("op", OPS)
def test_the_operations_of_a_kernel_are_not_counted(op):
    with common.compiling_for("9.0"), pytest.raises(ValueError, match="that is not counted"):
        cost.flops(lambda arrays: OPS[op][0](**arrays, platform="gpu"), given(op))


@pytest.mark.slow
def test_how_often_the_kernels_for_channels_run():
    found = {
        op: kernels(op, jax.value_and_grad(partial(loss, op)), "channel")
        for op in ("chunk_linear", "chunk_delta")
    }
    assert found["chunk_linear"] == both("chunk_linear") | {"forward_scores": 1}
    wanted = both("chunk_delta") | {"forward_weights": 1}
    del wanted["forward_inverses"]
    assert found["chunk_delta"] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_cells_run_them(name):
    cell = CELLS[name]
    xs, given = kernel_checks.cell_inputs(cell, jnp.bfloat16)
    if name == "dplr":  # with decays as slow as RWKV-7's
        cell, xs = DPLR(64, 64, lowest=-0.607), xs._replace(g=jnp.maximum(xs.g, -0.607))
    wanted = memjax.run(cell, {}, xs, **given, implementation="scan")
    with kernel_checks.running("gpu", RACE):
        found = memjax.run(cell, {}, xs, **given, implementation="pallas")
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-2


@pytest.mark.slow
def test_a_cell_with_any_decays_is_refused():
    cell = CELLS["dplr"]
    xs, given = kernel_checks.cell_inputs(cell, jnp.bfloat16)
    with interpreted("gpu", RACE), pytest.raises(NotImplementedError, match="by lowest"):
        memjax.run(cell, {}, xs, **given, implementation="pallas")
