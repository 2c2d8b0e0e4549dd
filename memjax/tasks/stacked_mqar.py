"""Stacked MQAR: recall over vectors, in which a write holds a key beside its value.

    [k1; v1] [k2; v2] ... [kN; vN]   [k3; 0] [k1; 0] ... [kN; 0]
    `--------- N writes ---------'   `------ N queries -------'

Nothing has to be shifted or found in noise, so that one layer without a convolution can solve it:
the task measures the memory alone. It is `stacked_mqar` of Zoology's code (arXiv:2312.04927), whose
keys and values are rows of one frozen table on the unit sphere.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
_KEYS, _VALUES, _ORDERS = range(3)


@functools.lru_cache(maxsize=4)
def table(seed: int, rows: int, width: int) -> np.ndarray:
    """Directions that are uniform over the sphere, read-only. float32[rows, width], norms 1."""
    drawn = draws.normals(draws.bits(seed, "stacked_mqar/table", 0, 0), (rows, width))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn = drawn.astype(np.float32)
    drawn.flags.writeable = False
    return drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackedMQAR(Source):
    """MQAR over vectors: N writes (a key beside its value), repeated, then N queries (key, zeros).

    Args:
      length: vectors in a row, T, at least (passes + 1) * pairs; zeros fill up the rest.
      pairs: N, keys with a value each; every one is asked for, in random order.
      num_values: how many values there are, and as many keys; at least `pairs`. The published 4096.
      width: d of a key and of a value.
      passes: how often the writes are repeated, each time in another order; 1 or more.
      table_seed: of the frozen directions, 0 to 2**64 - 1, the same in both splits.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: float32[length, 2 * width], a key and its value, or zeros at a query.
      targets: int32, at a scored position the number of the value below `num_values`, else 0.
      mask: bool, whether the position is scored; `queries` of them are.
      distance: int32, at a scored position how many vectors ago its key was last written, else 0.
    and of the whole row
      pairs: int32[], N.
    """

    name: ClassVar[str] = "stacked_mqar"

    length: int = 16
    pairs: int = 8
    num_values: int = 4096
    width: int = 64
    passes: int = 1
    table_seed: int = 0
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        self._check_least(pairs=1, width=1, passes=1)
        if self.num_values < self.pairs:
            self._refuse(
                f"num_values={self.num_values} is out of range; allowed: pairs, {self.pairs}, up"
            )
        self._check_seed("table_seed")
        needed = (self.passes + 1) * self.pairs
        if needed > self.length:
            self._refuse(
                f"pairs={self.pairs} with passes={self.passes} takes {needed} vectors, more than "
                f"length={self.length}; use length={needed} or fewer pairs"
            )

    @property
    def features(self) -> int:
        """Numbers in an input vector."""
        return 2 * self.width

    @property
    def vocab(self) -> int:
        """Values to choose among."""
        return self.num_values

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all: one for each key."""
        return self.pairs

    @property
    def chance(self) -> float:
        """The query accuracy of a guess among all values."""
        return 1 / self.num_values

    @property
    def table(self) -> np.ndarray:
        """The frozen directions, keys first, then values. float32[2 * num_values, width]."""
        return table(int(self.table_seed), 2 * int(self.num_values), int(self.width))

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        keys = draws.subset(self._bits(index, _KEYS), self.num_values, self.pairs)
        values = draws.subset(self._bits(index, _VALUES), self.num_values, self.pairs)
        shape = (self.passes + 1, self.pairs)
        orders = draws.permutations(self._bits(index, _ORDERS), shape)
        written, asked = orders[:-1].ravel(), orders[-1]
        inputs = np.zeros((self.length, self.features), np.float32)
        inputs[: len(written), : self.width] = self.table[keys[written]]
        inputs[: len(written), self.width :] = self.table[self.num_values + values[written]]
        at = len(written) + np.arange(self.pairs)
        inputs[at, : self.width] = self.table[keys[asked]]
        last = np.empty(self.pairs, np.int64)  # where each key is written last
        last[orders[-2]] = len(written) - self.pairs + np.arange(self.pairs)
        scored = self._scored(at, values[asked], at - last[asked])
        return {"inputs": inputs, **scored, "pairs": np.array(self.pairs, np.int32)}

    def show(self, example: Example) -> list[str]:
        """The numbers of the keys and values that the vectors stand for."""
        keys, values = np.split(example["inputs"], 2, axis=1)
        key = np.argmax(keys @ self.table[: self.num_values].T, axis=1)
        value = np.argmax(values @ self.table[self.num_values :].T, axis=1)
        lines = [f"vectors of {self.features} numbers; numbers of keys and values", ""]
        lines.append("write   position     key   value")
        for at in range(self.passes * self.pairs):
            lines.append(f"{at + 1:5d}   {at:8d}   {key[at]:5d}   {value[at]:5d}")
        lines += ["", "query   position     key  answer   distance"]
        for count, at in enumerate(np.flatnonzero(example["mask"]).tolist(), 1):
            answer, distance = example["targets"][at], example["distance"][at]
            lines.append(f"{count:5d}   {at:8d}   {key[at]:5d}   {answer:5d}   {distance:8d}")
        return lines
