"""Multi-query associative recall: bind keys to values, then ask for the value of every key.

    k1 v1 k2 v2 ... kN vN  . . k2 . k1 . . . kN . . .
    `----- context -----'  `--- queries among noise ---'

At a query the model sees a key and must name its value as the next token. Queries stand at even
distances from the end of the context, most of them close to it (a power law).

`MQAR` is the task of Zoology (Arora et al., ICLR 2024) and Based (Arora et al., ICML 2024);
`ForgettingMQAR` binds some of the keys, or all, a second time and asks for the last value. Both are
random-access sources: `source[i]` depends on the settings, the seed, the split and i alone.
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
_KEYS, _VALUES, _GAPS, _NOISE, _UPDATED, _NEW_VALUES = range(6)


@functools.lru_cache(maxsize=64)
def _log_weights(slots: int, power: float) -> np.ndarray:
    weights = (power - 1) * np.log(np.arange(1, slots + 1))
    weights.flags.writeable = False
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recall(Source):
    """What both tasks share: settings, checks, the token ranges and the query half of a row."""

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
        if self.pairs < 1:
            self._refuse(f"pairs={self.pairs} is out of range; allowed: 1 or more")
        if self.length % 2:
            self._refuse(
                f"length={self.length} is odd; a pair is two tokens, so use an even length "
                f"such as {self.length + 1}"
            )
        if not self.length < self.vocab <= 2**31:
            self._refuse(
                f"vocab={self.vocab} is out of range; allowed: above the length, {self.length}, "
                "to 2**31"
            )

    def _check_fit(self, sizes: str) -> None:
        needed = self.context + 2 * self.pairs
        if needed > self.length:
            self._refuse(
                f"{sizes} takes {self.context} tokens of context and {2 * self.pairs} for the "
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

    @property
    def chance(self) -> float:
        """The query accuracy of a guess among all values, the upper half of the tokens."""
        return 1 / (self.vocab - self.vocab // 2)

    def show(self, example: Example) -> list[str]:
        """The bindings in order, the queries, and the whole row."""
        lines = ["binding   position     key   value"]
        for position in range(0, self.context, 2):
            key, value = example["inputs"][position : position + 2]
            lines.append(f"{position // 2 + 1:7d}   {position:8d}   {key:5d}   {value:5d}")
        return [*lines, "", *super().show(example)]

    def _pairs(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys, out of 1..vocab//2-1, and their first values, out of vocab//2..vocab-1. [pairs]."""
        first_value = self.vocab // 2
        keys = draws.subset(self._bits(index, _KEYS), first_value - 1, self.pairs) + 1
        values = draws.subset(self._bits(index, _VALUES), self.vocab - first_value, self.pairs)
        return keys, values + first_value

    def _row(self, index: int, context, keys, answers, bound_at) -> tuple[Example, np.ndarray]:
        """The example, and the positions [pairs] at which its keys are asked for.

        context: [self.context] tokens; keys, answers: [pairs]; bound_at: [pairs], the position of
        the token that answers the key, for its distance.
        """
        slots = (self.length - self.context) // 2
        weights = _log_weights(slots, float(self.power))
        gaps = draws.weighted_subset(self._bits(index, _GAPS), weights, self.pairs)
        at = self.context + 2 * gaps
        inputs, targets, distance = np.zeros((3, self.length), np.int32)
        mask = np.zeros(self.length, bool)
        inputs[: self.context] = context
        inputs[at], targets[at], distance[at], mask[at] = keys, answers, at - bound_at, True
        if self.noise:
            # Any token may be noise, filler, keys and values included, as in the published task.
            rest = inputs[self.context :]
            noise = draws.uniform_ints(self._bits(index, _NOISE), self.vocab, len(rest))
            rest[rest == 0] = noise[rest == 0]
        return {"inputs": inputs, "targets": targets, "mask": mask, "distance": distance}, at


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(_Recall):
    """Multi-query associative recall [Zoology, arXiv:2312.04927; Based, arXiv:2402.18668].

    Args:
      length: tokens in a row, T; even, at least 2 * pairs * (passes + 1).
      pairs: keys N, each with its own value; all of them are asked for.
      vocab: token 0 is filler, 1..vocab//2-1 are keys, the rest are values; above `length`.
      power: a > 0. The g-th even slot after the context is drawn with weight g**(a - 1); the i-th
        draw places the query of the i-th key. 1 is uniform.
      noise: whether tokens 0..vocab-1 at random, or the filler 0, stand between the queries.
      passes: how often the whole context is repeated, 1 or more.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the token that the output must predict, else 0.
      mask: bool, whether the position is scored; `queries` of them are.
      distance: int32, at a scored position how many tokens ago the value was last shown, else 0.
    """

    name: ClassVar[str] = "mqar"

    passes: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.passes < 1:
            self._refuse(f"passes={self.passes} is out of range; allowed: 1 or more")
        self._check_fit(f"pairs={self.pairs} with passes={self.passes}")

    @property
    def context(self) -> int:
        """Tokens of context at the start of every row."""
        return 2 * self.pairs * self.passes

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        keys, values = self._pairs(index)
        context = np.tile(np.stack([keys, values], axis=1).ravel(), self.passes)
        last = self.context - 2 * self.pairs + 2 * np.arange(self.pairs) + 1
        return self._row(index, context, keys, values, last)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(_Recall):
    """MQAR whose context goes on to bind `updates` of the keys again; the last value counts.

    The delta rule overwrites. A Hebbian sum keeps both values and does no better than choosing
    between them, 1/2 on re-bound keys; nor can attention without positions tell which came last.

    With updates < pairs the re-bound keys are an ordered subset and their new values independent,
    uniform over all values but the key's own old one. (The published generator means to do that,
    but leaves out the old value of another key.) With updates == pairs every key is re-bound, in
    random order, and the new values are distinct, like the first ones; by chance a key may then
    get its old value back.

    Args: those of `MQAR` without `passes`, and
      updates: pairs that are bound again, 0 to `pairs`; length is at least 4 * pairs + 2 * updates.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `MQAR` (targets are the last values), and
      rebound: bool[length], whether the position is scored and its key was bound again.
    """

    name: ClassVar[str] = "forgetting_mqar"

    updates: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.updates <= self.pairs:
            self._refuse(
                f"updates={self.updates} is out of range; allowed: 0 to pairs, {self.pairs}"
            )
        self._check_fit(f"pairs={self.pairs} with updates={self.updates}")

    @property
    def context(self) -> int:
        """Tokens of context at the start of every row."""
        return 2 * (self.pairs + self.updates)

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        keys, old = self._pairs(index)
        which = draws.subset(self._bits(index, _UPDATED), self.pairs, self.updates)
        values, bound_at = old.copy(), 2 * np.arange(self.pairs) + 1
        values[which] = self._new_values(index, old[which])
        bound_at[which] = 2 * (self.pairs + np.arange(self.updates)) + 1
        bindings = [keys, old], [keys[which], values[which]]
        context = np.concatenate([np.stack(pair, axis=1).ravel() for pair in bindings])
        example, at = self._row(index, context, keys, values, bound_at)
        example["rebound"] = np.zeros(self.length, bool)
        example["rebound"][at[which]] = True
        return example

    def _new_values(self, index: int, old: np.ndarray) -> np.ndarray:
        """The second values [updates] of keys whose first ones are `old` [updates]."""
        source, first = self._bits(index, _NEW_VALUES), self.vocab // 2
        count = self.vocab - first
        if self.updates == self.pairs:
            return first + draws.subset(source, count, self.updates)
        new = first + draws.uniform_ints(source, count - 1, self.updates)
        return new + (new >= old)
