"""Where arrays lie: a mesh of data and fsdp axes, and the mesh axes of every logical axis name.

Parameters carry logical names (`nn.with_logical_partitioning`); `RULES` says which mesh axis each
name is split over. Batches are split over all devices, parameters over `fsdp` along `embed`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memjax.errors import UserError, did_you_mean

AXES = ("data", "fsdp")
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("layers", None),
    ("seq", None),
    ("heads", None),
    ("head_dim", None),
    ("kv", None),
    ("state", None),
    ("mlp", None),
    ("vocab", None),
    ("conv", None),
    ("norm", None),
)


def mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `AXES`, automatic on every version of JAX.

    Args:
      sizes: axis name -> number of devices; an axis left out has 1; one may be -1: all the rest.
      devices: default all of them.

    Raises:
      UserError: an unknown axis, an impossible size, or sizes that do not use all devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = dict(sizes), len(devices)
    shown = "config.mesh=dict(" + ", ".join(f"{k}={v}" for k, v in sizes.items()) + ")"
    for name, size in sizes.items():
        if name not in AXES:
            raise UserError(
                f"{shown}: no mesh axis {name!r}; axes: {', '.join(AXES)}."
                f"{did_you_mean(name, AXES)}"
            )
        if size < 1 and size != -1:
            raise UserError(f"{shown}: {name} must be at least 1, or -1 for all other devices.")
    shape = [sizes.get(name, 1) for name in AXES]
    if shape.count(-1) > 1:
        raise UserError(f"{shown}: only one axis can be -1.")
    fixed = math.prod(s for s in shape if s != -1)
    if count % fixed or (-1 not in shape and fixed != count):
        raise UserError(
            f"{shown}: the fixed sizes make {fixed}, there are {count} devices; "
            + (
                f"choose sizes that divide {count}."
                if -1 in shape
                else f"choose sizes whose product is {count}, or set one to -1."
            )
        )
    shape = [count // fixed if s == -1 else s for s in shape]
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """How `[batch, ...]` arrays lie: rows split over all devices.

    Raises:
      UserError: `rows` is given and the number of devices does not divide it.
    """
    if rows is not None and rows % mesh.size:
        raise UserError(
            f"config.batch / config.accumulate = {rows} rows do not divide over the {mesh.size} "
            f"devices of the mesh {dict(mesh.shape)}; choose a multiple of {mesh.size}."
        )
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(abstract: Any, mesh: Mesh, rules: Sequence[tuple[str, Any]] = RULES) -> Any:
    """The sharding of every parameter.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`, boxed by `nn.with_logical_partitioning` (the result
        of `jax.eval_shape(model.init, ...)`); a leaf without a box is replicated.
      mesh: from `mesh`.
      rules: logical name -> mesh axis, axes or None.

    Returns:
      The unboxed tree with `NamedSharding` leaves. A leaf with a dimension that its mesh axes do
      not divide is replicated.

    Raises:
      ValueError: a logical name that `rules` does not have.
    """
    logical = nn.get_partition_spec(abstract)
    names = [name for name, _ in rules]
    for path, spec in jax.tree_util.tree_flatten_with_path(logical, is_leaf=_is_spec)[0]:
        for name in spec:
            if name is not None and name not in names:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)} has the logical axis "
                    f"{name!r}; names: {', '.join(names)}.{did_you_mean(name, names)}"
                )
    placed = nn.logical_to_mesh_sharding(logical, mesh, list(rules))

    def or_replicated(sharding, leaf):
        return sharding if _divides(sharding.spec, leaf.shape, mesh) else replicated(mesh)

    return jax.tree.map(or_replicated, placed, nn.meta.unbox(abstract))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _divides(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> bool:
    for size, axes in zip(shape, spec, strict=False):
        axes = axes if isinstance(axes, tuple) else (axes,)
        if size % math.prod(mesh.shape[a] for a in axes if a is not None):
            return False
    return True


def optimizer_shardings(
    optimizer: optax.GradientTransformation, abstract_state: Any, param_shardings: Any, mesh: Mesh
) -> Any:
    """The sharding of the optimiser's state: moments lie as their parameters, counters everywhere.

    Args:
      abstract_state: `jax.eval_shape(optimizer.init, params)` of unboxed parameters.
      param_shardings: from `shardings`.
    """
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_state,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
