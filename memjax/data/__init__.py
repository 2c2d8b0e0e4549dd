"""Text corpora, byte tokens, packing, and `make`, which turns `config.data` into batches.

numpy and grain only: grain's worker processes import this package.
"""

from memjax.data.sources import Data, make
from memjax.data.text import Corpus, from_glob, standard_library
from memjax.data.tokens import BYTES

__all__ = ["BYTES", "Corpus", "Data", "from_glob", "make", "standard_library"]
