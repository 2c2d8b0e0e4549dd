"""Associative recall with one query, in both directions.

    BOS k1 v1 k2 v2 ... kn vn EOS q

The query q is one of the keys, each equally likely, and the answer its value; or the other way
round. The task AR of "Mechanistic evaluation of Transformers and state space models"
(arXiv:2505.15105).
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

BOS, EOS, KEY = 1, 2, 3  # KEY is the first key; the values come behind the keys
# One number per named draw; a new draw takes a new number, so that examples never change.
_KEYS, _VALUES, _QUERY = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Source):
    """One of n pairs is asked for, by its key or by its value.

    Args:
      length: tokens in a row, T, at least 2 * pairs + 3; zeros fill up the rest. (The answer and
        the EOS behind it, two more tokens in the paper, are no inputs here.)
      pairs: n, distinct keys with distinct values. The published 16 are 32 tokens.
      num_keys: how many keys there are, and as many values.
      by_value: whether the query is a value, whose key is the answer.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at the query the token that the output must predict, else 0.
      mask: bool, true at the query alone.
      distance: int32, at the query how many tokens ago the answer was shown, else 0.
    and of the whole row
      pairs: int32[], n.
    """

    name: ClassVar[str] = "associative_recall"

    length: int = 35
    pairs: int = 16
    num_keys: int = 4096
    by_value: bool = False
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.pairs <= self.num_keys:
            self._refuse(
                f"pairs={self.pairs} is out of range; allowed: 1 to num_keys, {self.num_keys}"
            )
        if self.vocab > 2**31:
            self._refuse(f"num_keys={self.num_keys} is out of range; allowed: to 2**30 - 2")
        needed = 2 * self.pairs + 3
        if needed > self.length:
            self._refuse(
                f"pairs={self.pairs} takes {needed} tokens, more than length={self.length}; use "
                f"length={needed} or fewer pairs"
            )

    @property
    def vocab(self) -> int:
        """Number of tokens: padding, BOS, EOS, keys and values."""
        return KEY + 2 * self.num_keys

    @property
    def queries(self) -> int:
        """Scored positions of every row."""
        return 1

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all values, or all keys."""
        return 1 / self.num_keys

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        keys = KEY + draws.subset(self._bits(index, _KEYS), self.num_keys, self.pairs)
        first_value = KEY + self.num_keys
        values = first_value + draws.subset(self._bits(index, _VALUES), self.num_keys, self.pairs)
        asked = draws.uniform_ints(self._bits(index, _QUERY), self.pairs, 1)[0]
        query, answer = 1 + 2 * asked, 2 + 2 * asked
        if self.by_value:
            query, answer = answer, query
        inputs = np.zeros(self.length, np.int32)
        at = 2 * self.pairs + 2
        inputs[0], inputs[at - 1] = BOS, EOS
        inputs[1 : at - 1] = np.stack([keys, values], axis=1).ravel()
        inputs[at] = inputs[query]
        scored = self._scored(at, inputs[answer], at - answer)
        return {"inputs": inputs, **scored, "pairs": np.array(self.pairs, np.int32)}
