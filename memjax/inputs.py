"""Random inputs for any cell, drawn from its fields: for tests and benchmarks."""

from collections.abc import Callable
from typing import Any

import numpy as np

from memjax.cell import MemoryCell
from memjax.typing import Field, fields


def draw(
    cell: MemoryCell,
    rng: np.random.Generator,
    batch: int,
    length: int,
    heads: int,
    queries: int = 1,
    draw_leaf: Callable[..., np.ndarray] | None = None,
) -> Any:
    """Independent inputs of `cell`, float32 leaves [batch, length, heads, ...].

    queries: G, the queries that share one memory, where the cell has that axis.
    draw_leaf: draws instead of `draw_field`.
    """
    leaves: dict[str, np.ndarray] = {}
    for name, field in sorted(fields(cell.inputs).items(), key=lambda item: item[1].of):
        shape = batch, length, heads, *field_shape(field, cell, queries)
        leaves[name] = (draw_leaf or draw_field)(field, rng, shape)
        if field.of:
            leaves[name] = leaves[name] * leaves[field.of]
    return cell.inputs(**{name: leaf.astype(np.float32) for name, leaf in leaves.items()})


def field_shape(field: Field, cell: MemoryCell, queries: int = 1) -> tuple[int, ...]:
    """The axes of one token of one head."""
    sizes = (cell.axis(letter) for letter in field.shape.split())
    return tuple(queries if size is None else size for size in sizes)


def draw_field(field: Field, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One leaf in float64. value, exponent, bonus: normal; query, key: uniform on the unit sphere;
    log_decay: -softplus(z - 1); rate, query_rate, and the rates of a multiple: low + (high - low)
    sigmoid(z), with z normal."""
    normal = rng.normal(size=shape)
    if field.kind in ("value", "exponent", "bonus"):
        return normal
    if field.kind in ("query", "key"):
        return normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    if field.kind == "log_decay":
        return -np.logaddexp(0, normal - 1)
    return field.low + (field.high - field.low) / (1 + np.exp(-normal))  # rates
