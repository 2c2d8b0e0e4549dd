"""Cases that recurrences without products are tested with."""

import dataclasses

import numpy as np

from pallas_kernels.specs import held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes and hard inputs of one case.

    dtype: of the first array; narrow: whether the others have it too, which are float32 otherwise.
    gate: what log decays of softplus size are multiplied by. strong: a further factor of one in
    twenty. exponent: the standard deviation of exponents. only_read: the share of tokens that are
    not written. resets: tokens of the first row where a document begins. weighted: the RG-LRU's.
    tags: "fast" (part of `make test`), "race" (also run by the interpreter that detects races).
    """

    name: str
    B: int = 1
    T: int
    D: int = 128
    dtype: str = "float32"
    narrow: bool = False
    gate: float = 1.0
    strong: float = 1.0
    exponent: float = 1.0
    only_read: float = 0.0
    resets: tuple[int, ...] = ()
    state: bool = True
    weighted: bool = False
    tags: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def numbers(self, rng) -> np.ndarray:
        """[B, T, D] of variance 1."""
        return rng.standard_normal((self.B, self.T, self.D))

    def logs(self, rng) -> np.ndarray:
        """Log decays [B, T, D]."""
        logs = -self.gate * np.logaddexp(0, self.numbers(rng) - 2)
        return logs * np.where(rng.random(logs.shape) < 0.05, self.strong, 1)

    def reset(self) -> np.ndarray | None:
        if not self.resets:
            return None
        reset = np.zeros((self.B, self.T), bool)
        reset[0, list(self.resets)] = True
        return reset

    def arrays(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """As float32 that their dtypes hold exactly."""
        rest = self.dtype if self.narrow else "float32"
        return [held(a, rest if n else self.dtype) for n, a in enumerate(arrays)]
