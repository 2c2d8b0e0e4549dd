"""Where arrays lie: the mesh of a config, and the shardings of batches, parameters and the
optimiser's state by the rules of `memjax.axes`.

Parameters carry logical names (`nn.with_logical_partitioning`): their model dimension is split over
`fsdp`; heads, hidden channels and the vocabulary over `tensor`. Rows of a batch are split over
`replica`, `data` and `fsdp`, their tokens over `context`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memjax.axes import MESH_AXES, RULES, partition
from memjax.errors import UserError, did_you_mean


def mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`, automatic on every version of JAX.

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
        if name not in MESH_AXES:
            raise UserError(
                f"{shown}: no mesh axis {name!r}; axes: {', '.join(MESH_AXES)}."
                f"{did_you_mean(name, MESH_AXES)}"
            )
        if size < 1 and size != -1:
            raise UserError(f"{shown}: {name} must be at least 1, or -1 for all other devices.")
    shape = [sizes.get(name, 1) for name in MESH_AXES]
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
        tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh, rows: int | None = None, length: int | None = None) -> NamedSharding:
    """How `[batch, ...]` arrays lie: rows split over the axes of "batch"; with a length those of
    `[batch, length, ...]`, tokens split over the axis of "seq".

    Raises:
      UserError: `rows` or `length` is given and the number of parts does not divide it.
    """
    parts = row_parts(mesh)
    if rows is not None and rows % parts:
        raise UserError(
            f"config.batch / config.accumulate = {rows} rows do not divide into {parts} parts, "
            f"the product of {', '.join(RULES['batch'])} in the mesh {dict(mesh.shape)}; choose "
            f"a multiple of {parts}."
        )
    if length is None:
        return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    (axis,) = RULES["seq"]
    if length % mesh.shape[axis]:
        raise UserError(
            f"config.mesh.{axis}={mesh.shape[axis]} does not divide rows of {length} tokens; "
            "choose a divisor, or another length of rows"
        )
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], axis))


def share(mesh: Mesh, rows: int) -> list[int] | None:
    """Which rows of a batch lie on devices of this process, in order; None for all of them."""
    places = batch_sharding(mesh, rows).addressable_devices_indices_map((rows,)).values()
    here = np.unique([row for place in places if place for row in range(rows)[place[0]]]).tolist()
    return None if len(here) == rows else here


def placed(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """A batch [rows, length, ...], or a fact of each row, on the devices; a process gives the rows
    of `share`, whole."""
    parts = row_parts(mesh)
    rows = len(array) * parts // len(share(mesh, parts) or range(parts))
    lie = batch_sharding(mesh, None, *array.shape[1:2])
    return jax.make_array_from_process_local_data(lie, array, (rows, *array.shape[1:]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`, boxed by `nn.with_logical_partitioning` (the result
        of `jax.eval_shape(model.init, ...)`); a leaf without a box is replicated.
      mesh: from `mesh`.

    Returns:
      The unboxed tree with `NamedSharding` leaves, split as `memjax.axes.partition` says.

    Raises:
      ValueError: a logical name that has no rule.
    """

    def place(path, leaf):
        if not _is_boxed(leaf):
            return replicated(mesh)
        for name in leaf.names:
            if name is not None and name not in RULES:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)} has the logical axis "
                    f"{name!r}; names: {', '.join(RULES)}.{did_you_mean(name, list(RULES))}"
                )
        return NamedSharding(mesh, partition(leaf.names, nn.meta.unbox(leaf).shape, mesh))

    return jax.tree_util.tree_map_with_path(place, abstract, is_leaf=_is_boxed)


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


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
