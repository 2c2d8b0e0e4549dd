"""One legend of letters for every shape in memjax, and the array types that annotations use.

B  sequences in a batch            K  key dimension of one memory
T  tokens in a sequence            V  value dimension of one memory
H  memories ("heads") of a layer   G  queries that share one memory (grouped-query attention)
N  chunks of a sequence            C  tokens in a chunk
D  width of the model              W  slots of a window
M  micro-steps of a token               c  pairs that one step learns from
m  memories behind a router             P  channels of what stands for a segment of tokens

`h` in a leaf of a cell's inputs is a number of heads that divides H (see `memjax.run`).
A trailing `...` stands for the axes of one token of one head. Decays are natural logarithms, <= 0.
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, Shaped

PyTree = Any  # a tree of arrays whose structure the cell decides

__all__ = [
    "Array",
    "Bool",
    "DTypeLike",
    "Field",
    "Float",
    "Int",
    "PRNGKeyArray",
    "PyTree",
    "Shaped",
    "fields",
]

# Letter -> attribute of the cell; other letters are free.
AXES = {"K": "key_dim", "V": "value_dim", "M": "steps", "c": "context"}


KINDS = (
    *("query", "key", "value", "exponent", "bonus"),
    *("log_decay", "rate", "query_rate", "multiple"),
)


@dataclasses.dataclass(frozen=True)
class Field:
    """What one leaf of a cell's inputs holds: its annotation in their NamedTuple.

        class Inputs(NamedTuple):
            k: Annotated[Array, Field("K", "key")]

    `memjax.run` checks the shape; tests and benchmarks draw their inputs from the rest.

    shape: the axes of one token of one head, in letters of the legend ("K", "V", "G K", "").
    kind: "query", "key" (unit norm), "value" (normal), "exponent" (normal; of a weight), "bonus"
    (the same for the answer to its own token only), "log_decay" (<= 0), "rate", "query_rate" (a
    rate that only the answer depends on), or "multiple", another leaf times a rate per channel.
    low, high: the closed range of the rate. of: the leaf that a multiple is of. plain: the value
    with which a token stores its pair and changes nothing else, as probes do; None for 0, of a rate
    1 or what is nearest to it in the range.
    """

    shape: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    of: str = ""
    plain: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"field kind {self.kind!r}: allowed are {', '.join(KINDS)}")

    @property
    def asks(self) -> bool:
        """Whether the leaf belongs to the query: `read` may look at it."""
        return self.kind in ("query", "query_rate")


@functools.cache
def fields(inputs: type) -> Mapping[str, Field]:
    """Name of each leaf of an inputs type -> its Field; ValueError for a leaf without one."""
    found = {}
    for name, hint in typing.get_type_hints(inputs, include_extras=True).items():
        marks = [mark for mark in typing.get_args(hint) if isinstance(mark, Field)]
        if len(marks) != 1:
            raise ValueError(f"{inputs.__qualname__}.{name}: annotate it with one memjax Field")
        found[name] = marks[0]
    return found
