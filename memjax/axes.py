"""Axes of a mesh, logical names of the axes of arrays, and which of the former split the latter."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memjax.typing import Array

# Slowest links first: copies of the model, rows, rows and parameters, time, heads and channels.
AXES = ("replica", "data", "fsdp", "context", "tensor")
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

    The mesh is the one that x lies on. Nothing is done where there is none or one of one device,
    where the caller has split the work itself (`jax.shard_map`) or wants types to say how arrays
    lie (explicit axes), and to arrays that are computed already.
    """
    if not isinstance(x, jax.core.Tracer):
        return x
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(names, x.shape, mesh)))
