"""Recurrences without products on Hopper: against their references, on the GPU at hand or, without
one, by the GPU interpreter, which looks for races; and as lowered."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_checks
import pytest
import test_walks
from kernel_checks import Case

from pallas_kernels import common, linear_scan, ops, wkv4
from pallas_kernels.linear_scan import rule as scan_rule
from pallas_kernels.wkv4 import rule as rwkv_rule

if jax.__version_info__ < common.GPU_JAX:
    pytest.skip("the GPU interpreter needs jax 0.11.2", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import walks_gpu

OPS = {"linear_scan": linear_scan, "wkv4": wkv4}
RACE = plgpu.InterpretGPUParams(detect_races=True)
# Those in which the walk differs: chunks have 64 tokens at most.
HERE = """ragged one_token resets gate_infinite bf16 bf16_narrow weighted_resets weighted_gate_slow
only_read never_written equal_exponents"""
CASES = {
    name: test_walks.shorter(case)
    for name, case in test_walks.CASES.items()
    if case.spec.name in HERE.split()
}


def check(case):
    test_walks.check(case, RACE, "gpu")


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    check(case)


SMALL = [
    Case("linear_scan", dataclasses.replace(CASES["linear_scan-resets"].spec, B=1, T=50)),
    Case("wkv4", dataclasses.replace(CASES["wkv4-resets"].spec, B=1, T=50)),
]


def walks_forward(step, state, given, made, chunk, backward=False):
    return WALK(step, state, given, made, chunk)


WALK = walks_gpu.walk


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, module, name, mistake",
    [
        (SMALL[0], walks_gpu, "walk", walks_forward),
        (SMALL[1], walks_gpu, "walk", walks_forward),
        (CASES["wkv4-only_read"], rwkv_rule, "EMPTY", 2.0 * rwkv_rule.EMPTY),
    ],
)
def test_the_check_finds_a_planted_mistake(case, module, name, mistake, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(AssertionError, match="off, at most|not finite"):
        check(case)


RACES = """
import test_walks_gpu
from jax.experimental.pallas import mosaic_gpu
mosaic_gpu.{name} = lambda *_, **__: None
test_walks_gpu.check(test_walks_gpu.SMALL[{number}])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["barrier_wait", "commit_smem", "wait_smem_to_gmem"])
@pytest.mark.parametrize("number", [0, 1], ids=list(OPS))
def test_a_missing_wait_is_found(number, name):
    """In a process of its own: the interpreter cannot be used again after an error."""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = RACES.format(number=number, name=name)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode and "RACE DETECTED" in done.stderr, done.stderr


# ---------------------------------------------------------------- refusals, what runs


def given(op, dtype=jnp.bfloat16):
    return ops.arguments(op, "channel", (1, 100, 2, 64), dtype)


def loss(op, arrays):
    y, state = OPS[op](**arrays, platform="cuda")
    return y.astype(jnp.float32).sum() + sum((a**2).sum() for a in jax.tree.leaves(state))


@pytest.mark.parametrize("op", OPS)
def test_other_gpus_are_refused(op, monkeypatch):
    with (
        common.compiling_for("8.0"),
        pytest.raises(NotImplementedError, match=f"{op} .*9.0 .*has 8.0; use"),
    ):
        jax.eval_shape(lambda arrays: loss(op, arrays), given(op))
    monkeypatch.setattr(common, "gpu_capability", lambda: None)
    with pytest.raises(NotImplementedError, match="there is no GPU"):
        jax.eval_shape(lambda arrays: loss(op, arrays), given(op))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_how_often_the_kernels_run(op, dtype):
    def kernels(fn):
        with common.compiling_for("9.0"):
            program = jax.jit(fn).trace(given(op, dtype)).lower(lowering_platforms=("cuda",))
        names = re.findall(rf"\\00{op}_(\w+)_mosaic_gpu\\00", program.as_text())
        return {name: names.count(name) for name in sorted(set(names))}

    assert kernels(lambda arrays: loss(op, arrays)) == {"forward": 1}
    assert kernels(jax.value_and_grad(lambda arrays: loss(op, arrays))) == {
        "backward": 1,
        "forward": 1,
    }


@pytest.mark.parametrize("length, chunk", [(4096, 16), (40, 16), (9, 16), (8, 8), (1, 8)])
def test_chunks(length, chunk):
    x, g = (jax.ShapeDtypeStruct((1, length, 128), a) for a in (jnp.bfloat16, jnp.float32))
    assert walks_gpu.block(scan_rule.RULE, (x, g), 128) == (chunk, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_walks.CELLS)
def test_cells_run_them(name):
    """In bfloat16."""
    cell = test_walks.CELLS[name]
    xs, given = test_walks.cell_inputs(cell, jnp.bfloat16)
    (_, wanted), _ = test_walks.outcome(cell, "scan", xs, given)
    (_, found), _ = test_walks.outcome(cell, "pallas", xs, given, "gpu", RACE)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(a, b) < 1e-2
