"""Axes of a mesh, logical names of the axes of arrays, and which of the former split the latter:
the rules, and how a computation follows them."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memjax.typing import Array, PyTree

# Slowest links first: copies of the model, rows, rows and parameters, time, heads and channels.
MESH_AXES = ("replica", "data", "fsdp", "context", "tensor")
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp"),
    "seq": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "state": (),
    "conv": (),
    "layers": (),
}


def partition(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How the axes of an array with these logical names are split, by `RULES`.

    The axes of the mesh that a name stands for split its axis where an earlier axis of the array
    has not taken them and their number divides the size; otherwise that axis is not split.
    """
    taken: set[str] = set()
    places: list[tuple[str, ...] | str | None] = []
    for name, size in zip(names, shape, strict=True):
        rule = () if name is None else RULES[name]
        split = [axis for axis in rule if mesh.shape.get(axis, 1) > 1]
        if not split or taken & set(split) or size % math.prod(mesh.shape[a] for a in split):
            places.append(None)
            continue
        taken |= set(split)
        places.append(split[0] if len(split) == 1 else tuple(split))
    return PartitionSpec(*places)


def constrain(x: Array, *names: str | None) -> Array:
    """x, which the compiler is told to split as `partition` says.

    The mesh is the one that x lies on. Nothing is done where it has one device or other axes than
    MESH_AXES, where the caller has split the work (`jax.shard_map`) or types say how arrays
    lie (explicit axes), and to arrays that are computed already.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not isinstance(x, jax.core.Tracer) or mesh.axis_names != MESH_AXES or mesh.size == 1:
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(names, x.shape, mesh)))


def mesh_platform() -> str | None:
    """The platform of the mesh in force, which a program may be compiled for without being there;
    None where no mesh is in force (`jax.sharding.use_abstract_mesh`)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    kind = "tpu" if device.device_kind.startswith("TPU") else None  # jax 0.7 has no platform here
    return getattr(device, "platform", kind)


def platform() -> str:
    """The platform that is traced for: that of the mesh in force, or else the default backend."""
    return mesh_platform() or jax.default_backend()


def per_device(form: Callable) -> Callable:
    """Splits the work of a sequence form over a mesh, for a form that the compiler cannot split by
    itself, such as a kernel. Takes and returns whole batches, as the forms of a cell do.

    The mesh is the one in force (`jax.set_mesh`), or else the one that the arrays lie on. Each of
    its axes splits the rows where their number divides, or else the heads; `tensor`, and an
    explicit axis that the heads lie on, split the heads first. Over an axis that divides neither
    all devices do the same. Inside `jax.shard_map` nothing is left to split.
    """

    @functools.wraps(form)
    def lifted(*given):
        mesh, names = mesh_of(given)
        if math.prod(mesh.shape[name] for name in names) == 1:
            return form(*given)
        rows, heads = _shares(mesh, names, given)

        def spec(head_axis, leaf):
            places: list = [None if head_axis == 0 else rows, *(None,) * (leaf.ndim - 1)]
            if leaf.ndim > head_axis and leaf.shape[head_axis] > 1:
                places[head_axis] = heads
            return PartitionSpec(*places)

        specs = tuple(
            jax.tree.map(functools.partial(spec, axis), tree)
            for axis, tree in zip(_HEAD_AXES, given, strict=True)
        )
        if AxisType.Explicit in mesh.axis_types:
            shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
            given = jax.tree.map(jax.sharding.reshard, given, shardings)
        out = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        split = jax.shard_map(
            form,
            mesh=mesh,
            in_specs=specs,
            out_specs=out,
            axis_names=set(names),
            check_vma=False,
        )
        return split(*given)

    return lifted


_HEAD_AXES = (0, 1, 2, 2, 2)  # of params, state, xs, reset, which has none, and write


def mesh_of(tree: PyTree) -> tuple[AbstractMesh, list[str]]:
    """The mesh in force, or the one that arrays lie on; its axes that are not split yet."""
    meshes = [leaf.sharding.mesh for leaf in map(jax.typeof, jax.tree.leaves(tree))]
    meshes = [jax.sharding.get_abstract_mesh(), *meshes]
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, [name for name, kind in kinds if kind != AxisType.Manual]


def _shares(mesh: AbstractMesh, names: list[str], given: PyTree) -> list[tuple[str, ...] | None]:
    """The axes of the mesh that split rows, and those that split heads; None for no axis."""
    xs = jax.tree.leaves(given[2])
    counts = {
        leaf.shape[axis]
        for axis, tree in zip(_HEAD_AXES, given, strict=True)
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim > axis
    }
    lying = {name for leaf in xs for name in jax.tree.leaves(jax.typeof(leaf).sharding.spec[2])}
    lying |= set(RULES["heads"])
    sizes = {0: {xs[0].shape[0]}, 2: counts - {1}}  # by axis of xs
    chosen: dict[int, list[str]] = {0: [], 2: []}
    for name in names:
        if mesh.shape[name] == 1:
            continue
        first = 2 if name in lying else 0
        for axis in (first, 2 - first):
            parts = math.prod(mesh.shape[n] for n in (*chosen[axis], name))
            if sizes[axis] and all(size % parts == 0 for size in sizes[axis]):
                chosen[axis].append(name)
                break
    return [tuple(split) or None for split in chosen.values()]
