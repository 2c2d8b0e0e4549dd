"""Kernels compiled for GPUs that this machine does not have: they take no more than
compiled_gpu.json says, which `python -m pallas_kernels.cost_gpu` writes."""

import json

import pytest

from pallas_kernels import cost_gpu, deviceless_gpu, ops, tables
from pallas_kernels.common import WIDTHS

RECORDED = json.loads(cost_gpu.COMPILED.read_text(encoding="utf-8"))
ROWS = RECORDED["kernels"]


def named(row):
    return "-".join(str(row[name]) for name in (*cost_gpu.CASE, "target"))


def test_every_case_is_recorded():
    wanted = {
        (*case, width, target)
        for case in ops.OPS
        for width in WIDTHS
        for target in deviceless_gpu.BANDWIDTH
    }
    assert {tuple(row[name] for name in (*cost_gpu.CASE, "target")) for row in ROWS} == wanted


@pytest.fixture(scope="module")
def compiled():
    """The figures of a target's cases, compiled when they are first asked for."""
    if not deviceless_gpu.PLUGIN.is_dir():
        pytest.skip("needs the CUDA plugin: make test-kernels")
    found = {}

    def of(target):
        if target not in found:
            rows = [row for row in ROWS if row["target"] == target]
            cases = [{name: row[name] for name in cost_gpu.CASE} for row in rows]
            found[target] = {named(row): row for row in deviceless_gpu.compiled(target, cases)}
        return found[target]

    return of


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_kernel_takes_no_more_than_recorded(row, compiled):
    found = compiled(row["target"])[named(row)]["kernels"]
    assert found.keys() == row["kernels"].keys()
    assert all(kernel["registers"] <= 255 for kernel in found.values())
    versions = tables.made(*cost_gpu.PACKAGES)["versions"]
    if versions != RECORDED["versions"]:
        pytest.skip(f"recorded with {RECORDED['versions']}, compiled with {versions}: it compiles")
    for name, kernel in found.items():
        for figure, value in kernel.items():
            assert value <= row["kernels"][name][figure], f"{name}: {figure}"


@pytest.mark.slow
def test_what_does_not_compile_is_told(compiled):
    compiled("h100")
    case = {"op": "chunk_linear", "decay": "head", "width": 32}
    with pytest.raises(RuntimeError, match="(?s)cannot compile for h100:.*K = 32"):
        deviceless_gpu.compiled("h100", [case])
