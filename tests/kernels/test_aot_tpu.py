"""Whole training steps compiled for slices of TPUs that this machine does not have."""

import jax
import jax.numpy as jnp
import pytest
import tiny_runs as runs

import memjax
from memjax import aot
from memjax.cells.gated_kalmanet import GatedKalmaNet, Inputs
from pallas_kernels import deviceless

pytest.importorskip("libtpu", reason="needs libtpu: pip install memjax[tpu]")
pytestmark = pytest.mark.slow
MIXED = f"{runs.ROOT}/configs/text.py:gated_delta_net+sliding_window,layers=1,dim=128,length=256"


def test_a_step_with_kernels_fits():
    """Forms are chosen for the slice: kernels for its TPUs, which run on the rows of each chip."""
    mixers = "model.mixers.gated_delta_net", "model.mixers.sliding_window"
    settings = {"batch": 8, **{f"{name}.heads": 2 for name in mixers}}
    settings |= {f"{name}.implementation": "pallas" for name in mixers}
    found = aot.figures(runs.load(MIXED, settings), "v5e:2x2")
    held = found["bytes"]
    assert found["fits"] and found["kind"] == "TPU v5 lite" and found["mesh"] == {"fsdp": 4}
    assert held["parameters"] + held["optimiser"] + held["batch"] < held["arguments"]
    assert held["arguments"] < held["peak"] < found["memory"] == 16 * 2**30
    assert sum(kind["count"] for kind in found["collectives"].values()) > 0
    assert found["products"] is None  # kernels are not counted


def test_a_step_that_does_not_fit():
    """5.7 G parameters in float32, three times, over four chips."""
    source = f"{runs.ROOT}/configs/text.py:delta_net,layers=2,dim=16384,length=64"
    found = aot.figures(runs.load(source, {"batch": 4}), "v5e:2x2")
    assert not found["fits"]
    assert found["needs"] > found["offered"] > 15 * 2**30
    state = sum(found["bytes"].values())
    assert state > found["offered"] and found["needs"] > state


@pytest.mark.parametrize("generation", ["v6e", "v7x"])
def test_gated_kalmanet_compiles(generation):
    """A product that is summed at once with its factor ends there in an internal error of XLA."""
    cell, axes = GatedKalmaNet(128, 128, iterations=1), (1, 256, 8)
    wide, one = (jax.ShapeDtypeStruct((*axes, *n), jnp.bfloat16) for n in ((128,), ()))

    def gradients(*xs):
        return jax.grad(lambda *xs: memjax.run(cell, {}, Inputs(*xs))[0].sum(), range(6))(*xs)

    deviceless.compile_for(generation, gradients, wide, wide, wide, one, one, one)
