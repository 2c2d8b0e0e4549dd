"""Multi-query associative recall: bind keys to values, then ask for the value of every key.

`MQAR` is the task of Zoology (Arora et al., ICLR 2024) and Based (Arora et al., ICML 2024);
`ForgettingMQAR` binds some of the keys, or all, a second time and asks for the last value;
`CompositionalMQAR` binds pairs of keys, neither of which tells the value. All are random-access
sources: `source[i]` depends on the settings, the seed, the split and i alone. The layout of a row
is described in `memjax.tasks.recall`.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from memjax.tasks import draws, recall
from memjax.tasks.source import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pairs(recall.Recall):
    """A key is one token: 1..vocab//2-1 are keys, vocab//2..vocab-1 are values."""

    @property
    def chance(self) -> float:
        """The query accuracy of a guess among all values, the upper half of the tokens."""
        return 1 / (self.vocab - self.vocab // 2)

    def _keys(self, index: int) -> np.ndarray:
        """An ordered subset of the keys. [pairs]."""
        return draws.subset(self._bits(index, recall.KEYS), self.vocab // 2 - 1, self.pairs) + 1

    def _values(self, index: int) -> np.ndarray:
        """An ordered subset of the values, first ones. [pairs]."""
        first = self.vocab // 2
        source = self._bits(index, recall.VALUES)
        return draws.subset(source, self.vocab - first, self.pairs) + first


@functools.lru_cache(maxsize=16)
def _frequent(keys: int, zipf: float) -> int:
    """How many of the heaviest keys, of weights 1, 2**-zipf, .., keys**-zipf, weigh half of all."""
    weights = np.cumsum(np.exp(recall.log_weights(keys, 1 - zipf)))
    return int(np.searchsorted(weights, weights[-1] / 2)) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(_Pairs):
    """Multi-query associative recall [Zoology, arXiv:2312.04927; Based, arXiv:2402.18668].

    Args:
      length: tokens in a row, T; even, at least 2 * pairs * (passes + 1).
      pairs: keys N, each with its own value; all of them are asked for.
      vocab: token 0 is filler, 1..vocab//2-1 are keys, the rest are values; above `length`.
      power: a > 0. The g-th even slot after the context is drawn with weight g**(a - 1); the i-th
        draw places the query of the i-th key. 1 is uniform.
      noise: whether tokens 0..vocab-1 at random, or the filler 0, stand between the queries.
      passes: how often the whole context is repeated, 1 or more.
      zipf: 0 makes all keys equally frequent. Above 0 the N keys of a context are drawn one after
        another without replacement with weight k**-zipf for the token k: training sees the first
        ones often and the last ones rarely. An extension of the published task.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the token that the output must predict, else 0.
      mask: bool, whether the position is scored; `queries` of them are.
      distance: int32, at a scored position how many tokens ago the value was last shown, else 0.
      frequent: bool, with zipf above 0, whether the position is scored and its key is one of the
        heaviest that together have half of the weight.
    and of the whole row
      pairs: int32[], N.
    """

    name: ClassVar[str] = "mqar"

    passes: int = 1
    zipf: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.zipf) and self.zipf >= 0):
            self._refuse(f"zipf={self.zipf} is out of range; allowed: 0 or more, and finite")
        self._check_least(passes=1)
        self._check_fit(f"pairs={self.pairs} with passes={self.passes}")

    @property
    def context(self) -> int:
        """Tokens of context at the start of every row."""
        return 2 * self.pairs * self.passes

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        keys, values = self._keys(index), self._values(index)
        context = np.tile(np.stack([keys, values], axis=1).ravel(), self.passes)
        last = self.context - 2 * self.pairs + 2 * np.arange(self.pairs) + 1
        example, at = self._row(index, context, keys[:, None], values, last)
        if self.zipf:
            example["frequent"] = np.zeros(self.length, bool)
            example["frequent"][at] = keys <= _frequent(self.vocab // 2 - 1, float(self.zipf))
        return example

    def _keys(self, index: int) -> np.ndarray:
        if not self.zipf:
            return super()._keys(index)
        weights = recall.log_weights(self.vocab // 2 - 1, 1 - float(self.zipf))
        return draws.weighted_subset(self._bits(index, recall.KEYS), weights, self.pairs) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(_Pairs):
    """MQAR whose context goes on to bind `updates` of the keys again; the last value counts.

    The delta rule overwrites. A Hebbian sum keeps both values and does no better than choosing
    between them, 1/2 on re-bound keys; nor can attention without positions tell which came last.

    With updates < pairs the re-bound keys are an ordered subset and their new values independent,
    uniform over all values but the key's own old one. (The published generator means to do that,
    but leaves out the old value of another key.) With updates == pairs every key is re-bound, in
    random order, and the new values are distinct, like the first ones; by chance a key may then
    get its old value back.

    Args: those of `MQAR` without `passes` and `zipf`, and
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
        keys, old = self._keys(index), self._values(index)
        which = draws.subset(self._bits(index, recall.UPDATED), self.pairs, self.updates)
        values, bound_at = old.copy(), 2 * np.arange(self.pairs) + 1
        values[which] = self._new_values(index, old[which])
        bound_at[which] = 2 * (self.pairs + np.arange(self.updates)) + 1
        bindings = [keys, old], [keys[which], values[which]]
        context = np.concatenate([np.stack(pair, axis=1).ravel() for pair in bindings])
        example, at = self._row(index, context, keys[:, None], values, bound_at)
        example["rebound"] = np.zeros(self.length, bool)
        example["rebound"][at[which]] = True
        return example

    def _new_values(self, index: int, old: np.ndarray) -> np.ndarray:
        """The second values [updates] of keys whose first ones are `old` [updates]."""
        source, first = self._bits(index, recall.NEW_VALUES), self.vocab // 2
        count = self.vocab - first
        if self.updates == self.pairs:
            return first + draws.subset(source, count, self.updates)
        new = first + draws.uniform_ints(source, count - 1, self.updates)
        return new + (new >= old)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositionalMQAR(recall.Recall):
    """MQAR whose bindings have two keys: all pairs of g first and g second keys, N = g * g.

    Neither key tells the value: who knows one of them guesses among g values. The published task
    of the same name [Zoology's code, arXiv:2312.04927].

    Args: those of `MQAR` without `passes` and `zipf`; `pairs` is a square, length at least
      6 * pairs. Of t = vocab // 3, tokens 1..t-1 are first keys, t..2t-1 second keys, the rest
      values.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `MQAR`. A query is the two keys in turn, in a slot of three
    tokens; it is scored at the second key.
    """

    name: ClassVar[str] = "compositional_mqar"
    binding: ClassVar[int] = 3

    pairs: int = 9

    def __post_init__(self):
        super().__post_init__()
        if math.isqrt(self.pairs) ** 2 != self.pairs:
            near = round(math.sqrt(self.pairs)) ** 2
            self._refuse(f"pairs={self.pairs} is no square; use one such as {near}")
        self._check_fit(f"pairs={self.pairs}")

    @property
    def context(self) -> int:
        """Tokens of context at the start of every row."""
        return 3 * self.pairs

    @property
    def chance(self) -> float:
        """The query accuracy of a guess among all values, the last third of the tokens."""
        return 1 / (self.vocab - 2 * (self.vocab // 3))

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        side, third = math.isqrt(self.pairs), self.vocab // 3
        first = draws.subset(self._bits(index, recall.KEYS), third - 1, side) + 1
        second = draws.subset(self._bits(index, recall.SECOND_KEYS), third, side) + third
        order = draws.permutations(self._bits(index, recall.ORDER), self.pairs)
        keys = np.stack([first[order // side], second[order % side]], axis=1)
        count = self.vocab - 2 * third
        values = draws.subset(self._bits(index, recall.VALUES), count, self.pairs) + 2 * third
        context = np.concatenate([keys, values[:, None]], axis=1).ravel()
        return self._row(index, context, keys, values, 3 * np.arange(self.pairs) + 2)[0]
