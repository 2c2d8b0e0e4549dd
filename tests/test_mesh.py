"""Training on meshes of eight virtual devices, in processes of their own, and on one device."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import memjax
from memjax import train
from memjax.axes import MESH_AXES, RULES, constrain, partition

STEPS = """
import json, sys
import jax
import tiny_runs as runs
from memjax import train
from test_mesh import three_steps
source, settings, workdir = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
run, state, values, evaluation = three_steps(source, settings)
planned = jax.tree.leaves(jax.tree.map(lambda a: a.sharding, run.abstract_state()))
leaves = jax.tree_util.tree_leaves_with_path(state)
print(json.dumps({
    "values": values,
    "as planned": all(a.sharding.is_equivalent_to(s, a.ndim) for (_, a), s in zip(leaves, planned)),
    "split": {
        jax.tree_util.keystr(path, simple=True, separator="/"):
            [n // m for n, m in zip(a.shape, a.addressable_shards[0].data.shape)]
        for path, a in leaves
    },
    "devices": run.mesh.size,
    "evaluation": evaluation,
    "finished": bool(workdir) and train.train(runs.load(source, settings), workdir)["finished"],
}))
"""
# At the rate of the configs, 1e-2, three steps make 1e-3 of the rounding of their first gradient.
SETTINGS = {**runs.TASK, "batch": 8, "optim.lr": 1e-3, "model.dim": 16, "model.mlp": 2.0}
LINEAR = f"{runs.MQAR}:linear_attention"
LINEAR_SETTINGS = {**SETTINGS, "model.mixers.linear_attention.heads": 2}
HYBRID = f"{runs.ROOT}/configs/hybrid_recall.py"  # attention and Gated DeltaNet in one layer
HYBRID_SETTINGS = {
    **SETTINGS,
    "model.dim": 32,
    "model.mixers.gated_delta_net.heads": 8,
    "model.mixers.gated_delta_net.convolution": 2,
    "model.mixers.gated_delta_net.gate": "silu",
    "model.mixers.sliding_window.heads": 8,
}
MIXED = {"data": 2, "fsdp": 2, "tensor": -1}
ONE_EACH = [
    {"replica": -1, "fsdp": 1},
    {"data": 8, "fsdp": 1},
    {"fsdp": 8},
    {"fsdp": 1, "tensor": 8},
    {"fsdp": 1, "context": 8},
]


def trained_on_eight(source, settings, mesh, workdir=""):
    """What STEPS finds on a mesh of eight devices."""
    given = json.dumps({**settings, **{f"mesh.{axis}": size for axis, size in mesh.items()}})
    return runs.on_eight_devices(STEPS, source, given, str(workdir))


def three_steps(source, settings):
    """A run, its state after three steps, their values, and the loss of the evaluation then."""
    run = memjax.build(runs.load(source, settings))
    state, batches, values = run.init(), iter(run.data.train), []
    for _ in range(3):
        state, found = run.step(state, run.put(next(batches)))
        values.append([float(found[name]) for name in ("loss", "grad_norm")])
    return run, state, values, run.evaluation(state.params, 1)["loss"]


@pytest.fixture(scope="module")
def alone():
    """The hybrid on one device."""
    return three_steps(HYBRID, HYBRID_SETTINGS)


def assert_same(found, alone):
    _, _, values, evaluation = alone
    assert np.isfinite(found["values"]).all() and found["devices"] == 8 and found["as planned"]
    np.testing.assert_allclose(found["values"], values, rtol=1e-5)
    assert found["evaluation"] == pytest.approx(evaluation, rel=1e-5)


def assert_split(found, parts):
    """parts: end of a parameter's path -> into how many parts each of its axes is split; it and
    its two moments."""
    for name, wanted in parts.items():
        ends = [split for path, split in found["split"].items() if path.endswith(name)]
        assert ends and len(ends) % 3 == 0, name
        assert all(split[-len(wanted) :] == wanted for split in ends), (name, ends, wanted)


def test_a_small_model_on_a_mixed_mesh():
    found = trained_on_eight(LINEAR, LINEAR_SETTINGS, MIXED)
    assert_same(found, three_steps(LINEAR, LINEAR_SETTINGS))
    wide = {f"mixer/{name}/kernel": [2, 2, 1] for name in ("query", "key", "value")}
    assert_split(found, {**wide, "mixer/output/kernel": [2, 1, 2], "embedding": [2, 2]})
    assert_split(found, {"channel/up/kernel": [2, 2], "channel/down/kernel": [2, 2]})


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*ONE_EACH, MIXED], ids=str)
def test_eight_devices_train_as_one_does(tmp_path, alone, mesh):
    """And one device continues what eight have begun."""
    found = trained_on_eight(HYBRID, HYBRID_SETTINGS, mesh, tmp_path)
    assert_same(found, alone)
    fsdp, tensor = mesh["fsdp"], 2 if mesh == MIXED else mesh.get("tensor", 1)
    for inner, group in {"memory": [], "attention": [1]}.items():  # queries that share a key
        wide = {f"{inner}/{name}/kernel": [fsdp, tensor, 1] for name in ("key", "value")}
        wide[f"{inner}/query/kernel"] = [fsdp, tensor, *group, 1]
        wide[f"{inner}/output/kernel"] = [tensor, *group, 1, fsdp]
        assert_split(found, wide)
    channel = {f"channel/{name}/kernel": [fsdp, tensor] for name in ("gate", "up")}
    assert_split(found, {**channel, "down/kernel": [tensor, fsdp], "embedding": [tensor, fsdp]})
    assert found["finished"]
    before = runs.records(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    assert train.train(runs.load(HYBRID, HYBRID_SETTINGS), str(tmp_path))["finished"]
    again = runs.records(tmp_path)
    assert [row["step"] for row in again] == [row["step"] for row in before]
    np.testing.assert_allclose(*([r["loss"] for r in rows] for rows in (again, before)), rtol=1e-5)


# ---------------------------------------------------------------- without devices


def planned(*shape: int) -> AbstractMesh:
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def traced(function, mesh, *shape):
    """A function's program for an array of this shape on a mesh."""
    placed = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function).trace(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed))


@pytest.mark.parametrize(
    ("names", "shape", "wanted"),
    [
        (("embed", "heads", "head_dim"), (16, 4, 8), ("fsdp", "tensor", None)),
        (("embed", "heads", "head_dim"), (16, 3, 8), ("fsdp", None, None)),  # 3 heads
        (("layers", "mlp", "embed"), (2, 8, 6), (None, "tensor", "fsdp")),
        (("batch", "seq", "embed"), (8, 5, 16), (("data", "fsdp"), None, None)),  # fsdp is taken
        (("batch", None, "vocab"), (2, 5, 9), (None, None, None)),
    ],
)
def test_partition(names, shape, wanted):
    assert tuple(partition(names, shape, planned(1, 2, 2, 1, 2))) == wanted


def test_every_rule_names_axes_of_the_mesh():
    assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)


def test_activations_are_constrained():
    def heads(x):
        return constrain(x, "batch", "seq", "heads", None)

    here, shape = planned(2, 2, 1, 1, 2), (8, 3, 4, 5)
    text = traced(heads, here, *shape).lower(lowering_platforms=("cpu",)).as_text()
    assert '<@mesh, [{"replica", "data"}, {}, {"tensor"}, {}]>' in text
    explicit = AbstractMesh((2,) * 5, MESH_AXES, axis_types=(AxisType.Explicit,) * 5)
    others = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    assert "sharding_constraint" in str(traced(heads, here, *shape).jaxpr)
    for mesh in (planned(1, 1, 1, 1, 1), explicit, others):
        assert "sharding_constraint" not in str(traced(heads, mesh, *shape).jaxpr)
    x = jnp.ones(shape)
    assert heads(x) is x


def test_one_device_has_no_constraints():
    run = memjax.build(runs.load(LINEAR, LINEAR_SETTINGS))
    batch = run.put(next(iter(run.data.train)))
    text = run.step.lower(run.abstract_state(), batch).as_text()
    assert "sharding_constraint" not in text and "@Sharding" not in text
