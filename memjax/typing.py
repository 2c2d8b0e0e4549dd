"""One legend of letters for every shape in memjax, and the array types that annotations use.

B  sequences in a batch            K  key dimension of one memory
T  tokens in a sequence            V  value dimension of one memory
H  memories ("heads") of a layer   G  queries that share one memory (grouped-query attention)
N  chunks of a sequence            C  tokens in a chunk
D  width of the model              W  slots of a window

`h` in a leaf of a cell's inputs is a number of heads that divides H (see `memjax.run`).
A trailing `...` stands for the axes of one token of one head. Decays are natural logarithms, <= 0.
"""

from typing import Any

from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, Shaped

PyTree = Any  # a tree of arrays whose structure the cell decides

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "PRNGKeyArray", "PyTree", "Shaped"]
