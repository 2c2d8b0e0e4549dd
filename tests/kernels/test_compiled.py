"""Kernels compiled for TPUs that this machine does not have: they fit, and do not spill more than
compiled.json says, which `python -m pallas_kernels.cost` writes."""

import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import cost, deviceless, ops, tables

pytest.importorskip("libtpu", reason="needs libtpu: pip install memjax[tpu]")
RECORDED = json.loads(cost.COMPILED.read_text(encoding="utf-8"))
VERSIONS = tables.made(*cost.PACKAGES)["versions"]


def named(row):
    return "-".join(str(row[name]) for name in cost.CASE)


def test_every_case_is_recorded():
    wanted = set(cost.cases(ops.OPS))
    assert {tuple(row[name] for name in cost.CASE) for row in RECORDED["memory"]} == wanted


def is_as_recorded(case, row) -> bool:
    """Whether the program is the one that the figures are of: the same compiler makes the same of
    it. Some are compiled all the same, of what does not take longest."""
    always = case["dtype"] == "bfloat16" and case["width"] == 128
    always = always and case["op"] not in ("lattice", *cost.GENERATIONS)
    if always and case["generation"] in ("v4", "v6e") or "refused" in row:
        return False
    fn, *given = cost.program(**case)
    return VERSIONS == RECORDED["versions"] and ops.fingerprint(fn, *given) == row["program"]


@pytest.mark.slow
@pytest.mark.parametrize("row", RECORDED["memory"], ids=named)
def test_a_kernel_fits_and_spills_no_more_than_recorded(row):
    case = {name: row[name] for name in cost.CASE}
    if is_as_recorded(case, row):
        return
    found = cost.compiled(**case)
    assert found.keys() == row.keys() - set(cost.CASE)
    if "refused" in row:
        assert found["refused"] == row["refused"]
        return
    if VERSIONS != RECORDED["versions"]:
        pytest.skip(f"recorded with {RECORDED['versions']}, compiled with {VERSIONS}: fits")
    for name in found.keys() - {"program"}:
        for figure, value in found[name].items():
            assert value <= row[name][figure], f"{name}: {figure}"


@pytest.mark.parametrize("change", [{"platform": "tpu v4"}, {"chunk": 64}, {"scale": 0.5}])
def test_a_fingerprint_is_of_what_is_compiled(change):
    def program(**options):
        run = ops.function(ops.OPS["chunk_linear", "none"][0], "both", **options)
        given = ops.arguments("chunk_linear", "none", (1, 256, 8, 64), jnp.bfloat16)
        return ops.fingerprint(run, given, given["v"])

    assert program(platform="tpu v5e") == program(platform="tpu v5e")
    assert program(platform="tpu v5e") != program(**{"platform": "tpu v5e", **change})


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize(
    "op, heads, key, value, dtype",
    [
        ("chunk_delta", 4, 256, 256, "float32"),
        ("chunk_delta", 9, 64, 64, "float32"),
        ("chunk_linear", 12, 128, 128, "bfloat16"),
        ("chunk_linear", 5, 256, 256, "bfloat16"),
        ("chunk_linear", 4, 128, 256, "float32"),
    ],
)
def test_other_heads_fit_too(op, heads, key, value, dtype, decay):
    given = ops.arguments(op, decay, (1, 512, heads, key), jnp.dtype(dtype))
    given["v"] = jax.ShapeDtypeStruct((1, 512, heads, value), jnp.dtype(dtype))
    run = ops.function(ops.OPS[op, decay][0], "both", platform="tpu")
    deviceless.compile_for("v4", run, given, given["v"])


@pytest.mark.slow
def test_twelve_heads_of_rwkv7_fit_too():
    given = ops.arguments("chunk_dplr", "channel", (1, 512, 12, 64), jnp.bfloat16)
    op, _ = ops.OPS["chunk_dplr", "channel"]
    run = ops.function(op, "both", platform="tpu", lowest=-0.61)
    deviceless.compile_for("v4", run, given, given["v"])


@pytest.mark.slow
def test_twice_the_tokens_cost_twice_the_cycles():
    def cycles(batch, length, heads):
        given = ops.arguments("chunk_linear", "none", (batch, length, heads, 128), jnp.bfloat16)
        run = ops.function(ops.OPS["chunk_linear", "none"][0], "forward", platform="tpu")
        return deviceless.cost("v5e", run, given).kernels["chunk_linear_forward"].cycles

    once = cycles(1, 2048, 8)
    for more in ((1, 4096, 8), (2, 2048, 8), (1, 2048, 16)):
        assert 1.9 < cycles(*more) / once < 2.1


@pytest.mark.slow
def test_a_loop_costs_its_trips():
    def loop(x, trips):
        return jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ x), x)

    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    once, often = (deviceless.cost("v5e", lambda x, n=n: loop(x, n), x).rest for n in (4, 32))
    assert 7 < often / once < 9
    with pytest.raises(ValueError, match="number of trips of a loop is unknown"):
        deviceless.cost("v5e", loop, x, jax.ShapeDtypeStruct((), jnp.int32))
