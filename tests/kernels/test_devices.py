"""Kernels on several devices: each runs on its own rows, or heads, and nothing is sent for it."""

import json
import os
import pathlib
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import memjax
from memjax import sharding
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.sliding_window import SlidingWindow
from memjax.typing import fields
from pallas_kernels import deviceless, interpreted

ROOT = pathlib.Path(__file__).parents[2]

SPLIT = """
import jax, numpy as np, memjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from memjax import sharding
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.sliding_window import SlidingWindow
from pallas_kernels import interpreted

cell, rng, T = GatedDeltaNet(64, 64), np.random.default_rng(0), 20

def inputs(batch, heads, fewer):
    def normal(*shape):
        return rng.standard_normal((batch, T, *shape)).astype(np.float32)
    k = normal(fewer, 64)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    xs = cell.inputs(normal(fewer, 64), k, normal(heads, 64), abs(normal(1)) % 1,
                     -abs(normal(heads)))
    state = rng.standard_normal((batch, heads, 64, 64)).astype(np.float32)
    return xs, state, rng.random((batch, T)) < 0.1, rng.random((batch, T, heads)) < 0.8

def all_of(xs, state, reset, write):
    def loss(xs, state):
        y, new = memjax.run(cell, {}, xs, state=state, reset=reset, write=write,
                            implementation='pallas')
        return (y ** 3).sum() + (new ** 2).sum(), (y, new)
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(xs, state)

def same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.isfinite(b).all() and abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max())

def specs(found):
    (_, (y, state)), _ = found
    return tuple((*a.sharding.spec, None, None, None)[:n] for a, n in ((y, 3), (state, 2)))

mesh, both = sharding.mesh(dict(data=2, fsdp=2)), ('data', 'fsdp')
SPLITS = {  # rows, heads, heads of q and k -> axes of rows, axes of heads
    (8, 2, 2): (both, None),
    (2, 4, 2): ('data', 'fsdp'),
    (3, 4, 1): (None, both),
    (3, 3, 3): (None, None),
}
with interpreted():
    for sizes, (rows, heads) in SPLITS.items():
        given = inputs(*sizes)
        wanted = jax.device_get(jax.jit(all_of)(*given))
        lie = NamedSharding(mesh, P(both) if rows == both else P())
        placed = jax.device_put(given, lie)
        found = jax.jit(lambda *given: all_of(*given))(*placed)
        same(found, wanted)
        assert specs(found) == ((rows, None, heads), (rows, heads)), (sizes, specs(found))
        with jax.set_mesh(mesh):
            same(jax.jit(lambda *given: all_of(*given))(*given), wanted)
    two = sharding.mesh(dict(data=2, tensor=2))
    for sizes, wanted in {
        (4, 4, 2): (('data', None, 'tensor'), ('data', 'tensor')),
        (4, 3, 1): ((('data', 'tensor'), None, None), (('data', 'tensor'), None)),
    }.items():
        given = inputs(*sizes)
        placed = jax.device_put(given, NamedSharding(two, P()))
        found = jax.jit(lambda *given: all_of(*given))(*placed)
        same(found, jax.device_get(jax.jit(all_of)(*given)))
        assert specs(found) == wanted, (sizes, specs(found))
    given = inputs(4, 4, 2)
    wanted = jax.device_get(jax.jit(all_of)(*given))
    shared = NamedSharding(sharding.mesh(dict(tensor=2, context=2)), P())
    found = jax.jit(lambda *given: all_of(*given))(*jax.device_put(given, shared))
    same(found, wanted)
    assert specs(found) == ((None, 'context', 'tensor'), (None, 'tensor')), specs(found)
    same(all_of(*jax.device_put(given, NamedSharding(mesh, P(both)))), wanted)

    for taken in ({'data'}, {'data', 'fsdp'}):  # by the caller
        parts = P(tuple(taken))
        run = lambda *given: all_of(*given)[0][1]
        mapped = jax.shard_map(run, mesh=mesh, in_specs=parts, out_specs=parts, axis_names=taken,
                               check_vma=False)
        same(jax.jit(mapped)(*given), wanted[0][1])

    explicit = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Explicit,) * 2)
    lie = lambda array, *names: jax.device_put(array, NamedSharding(explicit, P(*names)))
    xs, state, reset, write = given
    placed = cell.inputs(*(lie(x, *('a', None, 'b')[:2 + (x.shape[2] > 1)]) for x in xs))
    found = jax.jit(lambda *given: all_of(*given))(placed, lie(state, 'a'), lie(reset), lie(write))
    same(found, wanted)
    assert specs(found) == (('a', None, 'b'), ('a', 'b')), specs(found)

    window = SlidingWindow(64, 64, window=9)
    normal = lambda *shape: rng.standard_normal((4, T, 2, *shape)).astype(np.float32)
    xs = window.inputs(normal(2, 64), normal(64), normal(64))
    def ring_of(xs, reset, ring):
        return memjax.run(window, {}, xs, reset=reset, state=ring, implementation='pallas')
    given = xs, reset, ring_of(xs, reset, None)[1]
    wanted = jax.device_get(ring_of(*given))
    placed = jax.device_put(given, NamedSharding(mesh, P(both)))
    found = jax.jit(lambda *given: ring_of(*given))(*placed)
    same(found, wanted)
    assert found[1].written.sharding.spec[0] == both
try:
    memjax.run(window, {}, xs, implementation='pallas')
except NotImplementedError as reason:
    assert 'none for cpu' in str(reason), reason
else:
    raise AssertionError
print('fine')
"""

TRAIN = """
import itertools, json, sys
import tiny_runs as runs
from memjax import train_step
from pallas_kernels import interpreted

def losses(**changes):
    settings = {
        **runs.TASK, 'batch': 8, 'steps': 4, 'data.length': 24, 'model.dim': 64,
        'model.mixers.gated_delta_net.implementation': 'pallas', **changes
    }
    run = train_step.build(runs.load(f'{runs.MQAR}:gated_delta_net', settings))
    state, found = run.init(), []
    for batch in itertools.islice(iter(run.data.train), 4):
        state, values = run.step(state, run.put(batch))
        found.append([float(values[name]) for name in ('loss', 'grad_norm')])
    return found, run.evaluation(state.params, 1)['loss'], run.mesh.size

with interpreted():
    print(json.dumps(losses(**json.loads(sys.argv[1]))))
"""


def run_on(devices: int, program: str, *arguments: str) -> str:
    """What a program prints on a machine with so many virtual devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(
            [os.environ["XLA_FLAGS"], f"--xla_force_host_platform_device_count={devices}"]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_four_devices_compute_what_one_does():
    assert run_on(4, SPLIT) == "fine\n"


@pytest.mark.slow
def test_four_devices_train_as_one_does():

    alone, evaluation, one = json.loads(run_on(1, TRAIN, "{}"))
    found, again, four = json.loads(run_on(4, TRAIN, json.dumps({"mesh.data": 2, "mesh.fsdp": 2})))
    assert (one, four) == (1, 4)
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    assert again == pytest.approx(evaluation, rel=1e-5)


CELLS = {"gated_delta_net": GatedDeltaNet(64, 64), "window": SlidingWindow(64, 64, window=40)}


@pytest.mark.slow
@pytest.mark.parametrize("rows, heads", [(4, 2), (2, 4)])
@pytest.mark.parametrize("name", CELLS)
def test_nothing_is_sent_between_chips(name, rows, heads):
    """Both passes, compiled for four chips whose rows, or rows and heads, are split."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install memjax[tpu]")
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=deviceless.TOPOLOGIES["v5e"]
    ).devices
    mesh = sharding.mesh({"data": 2, "fsdp": 2}, chips)
    places = P(("data", "fsdp")) if rows == 4 else P("data", None, "fsdp")
    placed = partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=NamedSharding(mesh, places))
    cell, sizes = CELLS[name], {"K": 64, "V": 64, "G": 2}
    axes = ([sizes[axis] for axis in field.shape.split()] for field in fields(cell.inputs).values())
    xs = cell.inputs(*(placed((rows, 64, heads, *more)) for more in axes))

    def both(xs):
        y, pull_back = jax.vjp(lambda xs: memjax.run(cell, {}, xs, implementation="pallas")[0], xs)
        return y, pull_back(y)

    with interpreted("tpu", how=False):
        text = jax.jit(both).trace(xs).lower().compile().as_text()
    kernels = {"gated_delta_net": 2, "window": 3}
    assert text.count('custom_call_target="tpu_custom_call"') == kernels[name]
    sent = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    assert not re.findall(sent, text)
