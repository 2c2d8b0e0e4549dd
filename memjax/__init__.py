"""memjax: recurrent and associative memory for sequence models, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memjax import cells as cells
    from memjax.cell import MemoryCell as MemoryCell
    from memjax.cell import initial_state as initial_state
    from memjax.cell import run as run
    from memjax.train_step import build as build

__version__ = "0.1.0"

# Loaded when first used, so that `memjax.tasks` and `memjax.data` can be imported without jax.
_HOMES = {
    "MemoryCell": "memjax.cell",
    "initial_state": "memjax.cell",
    "run": "memjax.cell",
    "build": "memjax.train_step",
}

__all__ = ["MemoryCell", "__version__", "build", "cells", "initial_state", "run"]


def __getattr__(name: str) -> Any:
    if name == "cells":
        return importlib.import_module("memjax.cells")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'memjax' has no attribute {name!r}")
