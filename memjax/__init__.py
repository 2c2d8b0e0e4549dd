"""memjax: recurrent and associative memory for sequence models, in JAX and Flax."""

from memjax import cells
from memjax.cell import MemoryCell, initial_state, run

__version__ = "0.1.0"

__all__ = ["MemoryCell", "__version__", "cells", "initial_state", "run"]
