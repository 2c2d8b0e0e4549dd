"""Sequences that the devices along the mesh's axis `context` share, each a span of the tokens.

What a span does to the memory in front of it is an element of fixed size, (through, state): what
passes through the span, and the state that it leaves behind the initial one (`MemoryCell.fold`).
Two neighbours make one (`MemoryCell.compose`), for S' = A S + B

    (A2, B2) after (A1, B1) = (A2 A1, A2 B1 + B2)

so that ceil(log2 n) exchanges (Hillis & Steele 1986) give every device the state in front of its
span, and it runs its tokens from there. One element is held at a time and none is gathered. A reset
lets nothing through, so documents may lie across devices anyhow.

All else in a model (layers of one token, positions, the loss) is left to the compiler, which splits
it by the logical axis "seq".
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from memjax.axes import MESH_AXES, RULES, mesh_of
from memjax.typing import Array, Bool, PyTree

(AXIS,) = RULES["seq"]


def sharing(tree: PyTree) -> AbstractMesh | None:
    """The mesh whose devices share the sequences of a traced computation on these arrays; None
    where a device has whole ones, and in what has been split already."""
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return None
    mesh, free = mesh_of(tree)
    if mesh.axis_names != MESH_AXES or AXIS not in free or mesh.shape[AXIS] == 1:
        return None
    return None if AxisType.Explicit in mesh.axis_types else mesh


def split(
    form: Callable,
    fold: Callable,
    compose: Callable | None,
    mesh: AbstractMesh,
) -> Callable:
    """A sequence form for sequences that the devices of a mesh share.

    Args:
      form: (params, state, xs, reset, write) -> (y, state), as the forms of a cell.
      fold: the same arguments -> (through, state), the state being that of `form`.
      compose: (later, earlier) -> their element; None where the state behind a span does not
        depend on what is in front of it.
      mesh: from `sharing`. The size of its axis divides T.

    Returns:
      (params, state, fresh, xs, reset, write) -> (y, state): fresh, the initial state, is in front
      of every span but the first. The final state is on all devices.
    """
    size = mesh.shape[AXIS]

    def moved(tree, hop):
        pairs = [(device, device + hop) for device in range(size - hop)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, AXIS, pairs), tree)

    def local(params, state, fresh, xs, reset, write):
        place = lax.axis_index(AXIS)
        first = place == 0
        begin = choose(first, state, fresh)
        through, behind = fold(params, begin, xs, reset, write)
        hop = 1
        while compose is not None and hop < size:
            joined = compose((through, behind), moved((through, behind), hop))
            through, behind = choose(place >= hop, joined, (through, behind))
            hop *= 2
        begin = choose(first, state, moved(behind, 1))
        y, new = form(params, begin, xs, reset, write)
        new = choose(place == size - 1, new, jax.tree.map(jnp.zeros_like, new))
        return y, lax.psum(new, AXIS)

    whole, part = PartitionSpec(), PartitionSpec(None, AXIS)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, whole, whole, part, part, part),
        out_specs=(part, whole),
        axis_names={AXIS},
        check_vma=False,
    )


def whole(x: Array, layer: str) -> None:
    """ValueError where devices share the sequences x, which a layer needs whole."""
    mesh = sharing(x)
    if mesh is not None:
        raise ValueError(
            f"{layer} with config.mesh.{AXIS}={mesh.shape[AXIS]}: it runs through a sequence "
            f"piece by piece, which devices cannot share; set {AXIS}=1 and split rows (data, fsdp) "
            "or heads (tensor)"
        )


def choose(condition: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    """`where` over two trees."""
    return jax.tree.map(functools.partial(jnp.where, condition), on_true, on_false)
