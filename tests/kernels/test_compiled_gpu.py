"""Kernels compiled for GPUs that this machine does not have: they take no more than
compiled_gpu.json says, which `python -m pallas_kernels.cost_gpu` writes."""

import json

import jax
import pytest

from pallas_kernels import cost_gpu, deviceless_gpu, ops, tables
from pallas_kernels.common import GPU_JAX, WIDTHS

RECORDED = json.loads(cost_gpu.COMPILED.read_text(encoding="utf-8"))
ROWS = RECORDED["kernels"]


def named(row):
    return "-".join(str(row[name]) for name in (*cost_gpu.CASE, "target"))


def test_every_case_is_recorded():
    wanted = {
        (*case, width, target)
        for case in ops.ON_GPU
        for width in WIDTHS
        for target in deviceless_gpu.BANDWIDTH
    }
    assert {tuple(row[name] for name in (*cost_gpu.CASE, "target")) for row in ROWS} == wanted


needs_plugin = pytest.mark.skipif(
    not deviceless_gpu.PLUGIN.is_dir() or jax.__version_info__ < GPU_JAX,
    reason="needs the CUDA plugin (make test-kernels) and jax 0.11.2",
)


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("row", [row for row in ROWS if row["target"] == "h200"], ids=named)
def test_a_kernel_takes_no_more_than_recorded(row):
    """An H100 is of the same architecture. The registers of one kernel have differed by six from
    one compilation to the next. A program that is the recorded one is not compiled again, but for
    those of one shape."""
    case = {name: row[name] for name in cost_gpu.CASE}
    same = tables.made(*cost_gpu.PACKAGES)["versions"] == RECORDED["versions"]
    always = case["decay"] == "head" and case["width"] == 64
    if same and not always and deviceless_gpu.fingerprint(**case) == row["program"]:
        return
    (found,) = deviceless_gpu.compiled(row["target"], [case])
    assert found["kernels"].keys() == row["kernels"].keys()
    if not same:
        pytest.skip(f"recorded with {RECORDED['versions']}, compiled with another: it compiles")
    for name, kernel in found["kernels"].items():
        for figure in ("spills", "shared"):
            assert kernel[figure] <= row["kernels"][name][figure], f"{name}: {figure}"


@pytest.mark.slow
@needs_plugin
def test_what_does_not_compile_is_told():
    case = {"op": "chunk_linear", "decay": "head", "width": 32}
    with pytest.raises(RuntimeError, match="(?s)cannot compile for h100:.*K = 32"):
        deviceless_gpu.compiled("h100", [case])
