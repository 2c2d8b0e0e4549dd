"""What MQAR and its kin share: a context of bindings, then queries among noise.

    k1 v1 k2 v2 ... kN vN  . . k2 . k1 . . . kN . . .
    `----- context -----'  `--- queries among noise ---'

At a query the model sees a key, or the keys of a binding, and must name the value as the next
token. Queries stand in slots, as many tokens wide as a binding, that begin at the end of the
context; most are close to it (a power law).
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
KEYS, VALUES, GAPS, NOISE, UPDATED, NEW_VALUES, SECOND_KEYS, ORDER = range(8)


@functools.lru_cache(maxsize=64)
def log_weights(slots: int, power: float) -> np.ndarray:
    """The logarithms of 1, 2**(power - 1), .., slots**(power - 1). float64[slots], read-only."""
    weights = (power - 1) * np.log(np.arange(1, slots + 1))
    weights.flags.writeable = False
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Source):
    """What these tasks share: settings, checks, the token ranges and the query half of a row."""

    binding: ClassVar[int] = 2  # tokens of a binding, its keys and a value; also of a query's slot

    length: int = 64
    pairs: int = 8
    vocab: int = 8192
    power: float = 0.01
    noise: bool = True
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.power) and self.power > 0):
            self._refuse(
                f"power={self.power} is out of range; allowed: above 0, where 1 puts the queries "
                "anywhere with equal chance and 0.01 puts most of them near the context"
            )
        self._check_least(pairs=1)
        if self.length % 2:
            self._refuse(
                f"length={self.length} is odd; use an even length such as {self.length + 1}"
            )
        if not self.length < self.vocab <= 2**31:
            self._refuse(
                f"vocab={self.vocab} is out of range; allowed: above the length, {self.length}, "
                "to 2**31"
            )

    def _check_fit(self, sizes: str) -> None:
        queries = self.binding * self.pairs
        needed = self.context + queries
        if needed > self.length:
            self._refuse(
                f"{sizes} takes {self.context} tokens of context and {queries} for the "
                f"queries, more than length={self.length}; use length={needed} or fewer pairs"
            )

    @property
    def context(self) -> int:
        """Tokens of context at the start of every row."""
        raise NotImplementedError

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all: one for each key."""
        return self.pairs

    def show(self, example: Example) -> list[str]:
        """The bindings in order, the queries, and the whole row."""
        lines = ["binding   position " + "    key  " * (self.binding - 1) + "  value"]
        for position in range(0, self.context, self.binding):
            tokens = example["inputs"][position : position + self.binding]
            words = "".join(f"   {token:5d} " for token in tokens).rstrip()
            lines.append(f"{position // self.binding + 1:7d}   {position:8d}{words}")
        return [*lines, "", *super().show(example)]

    def _row(self, index: int, context, keys, answers, bound_at) -> tuple[Example, np.ndarray]:
        """The example, and the positions [pairs] at which it is scored.

        context: [self.context] tokens; keys: [pairs, binding - 1], those of each query; answers:
        [pairs]; bound_at: [pairs], the position of the token that answers, for its distance.
        """
        slots = (self.length - self.context) // self.binding
        weights = log_weights(slots, float(self.power))
        gaps = draws.weighted_subset(self._bits(index, GAPS), weights, self.pairs)
        first = self.context + self.binding * gaps
        at = first + self.binding - 2
        inputs = np.zeros(self.length, np.int32)
        inputs[: self.context] = context
        inputs[first[:, None] + np.arange(self.binding - 1)] = keys
        if self.noise:
            # Any token may be noise, filler, keys and values included, as in the published task.
            rest = inputs[self.context :]
            noise = draws.uniform_ints(self._bits(index, NOISE), self.vocab, len(rest))
            rest[rest == 0] = noise[rest == 0]
        scored = self._scored(at, answers, at - bound_at)
        return {"inputs": inputs, **scored, "pairs": np.array(self.pairs, np.int32)}, at
