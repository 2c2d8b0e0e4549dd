"""Joint recall: the value of a key depends on the context that the key stands in.

    BOS  c2 k1 v k3 v k2 v  c1 k2 v k1 v k3 v   SEP   c1 k3 v k2 v k1 v  c2 k1 v k2 v k3 v
         `--- a table, context by context ---'        `- the same table, in other orders -'

A row is a table of values [contexts, keys], written twice in random orders. In the second half the
model must name, at every key, the value that follows it. The task of HAX (arXiv:2507.00449).

The value of a key in another context says nothing about the answer, but how often each value stood
behind a key does, the more so as answers are in the row: who counts them without the context and
takes off those that were asked for is right more often than a guess (`counted`).
"""

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

BOS, PAD, SEP, VALUE = 1, 3, 4, 10  # VALUE is the first value; then come the keys, the contexts
# One number per named draw; a new draw takes a new number, so that examples never change.
_SIZES, _CONTEXTS, _KEYS, _TABLE, _CONTEXT_ORDERS, _KEY_ORDERS = range(6)


def counted(number: int, values: int) -> float:
    """The accuracy of naming the most frequent of those values of a key that are left.

    number: of contexts, each of which gives the key one of `values` values, independent and
    uniform. The same holds for a context without its keys. With m left it is right with the mean of
    the largest count, over m; at most j are alike in m! [x^m] (1 + x + .. + x^j / j!)^values cases.
    """
    right = 0.0
    for left in range(1, number + 1):
        largest = 0.0
        for most in range(left):
            powers, series = np.ones(1), 1 / np.array([math.factorial(i) for i in range(most + 1)])
            for _ in range(values):
                powers = np.convolve(powers, series)[: left + 1]
            cases = powers[left] * math.factorial(left) if len(powers) > left else 0.0
            largest += 1 - cases / values**left
        right += largest / left / number
    return right


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointRecall(Source):
    """A table that has to be recalled by context and key.

    The defaults are the published task. A small one: min_contexts = max_contexts = min_keys =
    max_keys = 5, num_values = 8, length = 112.

    Args:
      length: tokens in a row, T, at least 2 + 2 c (2 k + 1) for c = max_contexts, k = max_keys; PAD
        fills up the rest of smaller tables.
      min_contexts, max_contexts: a row's number of contexts is uniform between them.
      min_keys, max_keys: so is the number of keys, the same in all contexts of a row.
      num_values: number of values, 2 or more; those of a table are independent and uniform.
      vocab: tokens 10 to 9 + num_values are values, then come max_keys keys, out of which a row has
        a random subset, then max_contexts contexts, likewise.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the token that the output must predict, else 0.
      mask: bool, whether the position is scored: the keys in the second half.
      distance: int32, at a scored position how many tokens ago the value was shown, else 0.
    and of the whole row
      contexts, keys: int32[], their numbers.
    """

    name: ClassVar[str] = "joint_recall"

    length: int = 1058
    min_contexts: int = 5
    max_contexts: int = 16
    min_keys: int = 5
    max_keys: int = 16
    num_values: int = 16
    vocab: int = 100
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        for what in ("contexts", "keys"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if not 1 <= low <= high:
                self._refuse(
                    f"min_{what}={low} with max_{what}={high} is out of range; allowed: "
                    f"1 <= min_{what} <= max_{what}"
                )
        self._check_least(num_values=2)
        tokens = VALUE + self.num_values + self.max_keys + self.max_contexts
        if not tokens <= self.vocab <= 2**31:
            self._refuse(
                f"vocab={self.vocab} is out of range; num_values={self.num_values}, "
                f"max_keys={self.max_keys} and max_contexts={self.max_contexts} take {tokens} or "
                "more, to 2**31"
            )
        needed = 2 + 2 * self.max_contexts * (2 * self.max_keys + 1)
        if needed > self.length:
            self._refuse(
                f"max_contexts={self.max_contexts} with max_keys={self.max_keys} takes {needed} "
                f"tokens, more than length={self.length}; use length={needed} or smaller tables"
            )

    @property
    def queries(self) -> int:
        """The largest number of scored positions of a row."""
        return self.max_contexts * self.max_keys

    @property
    def chance(self) -> float:
        """The query accuracy of a guess among the values; see `counted` for a better one."""
        return 1 / self.num_values

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        u = draws.uniforms(self._bits(index, _SIZES), 2)
        contexts = self.min_contexts + int(u[0] * (self.max_contexts - self.min_contexts + 1))
        keys = self.min_keys + int(u[1] * (self.max_keys - self.min_keys + 1))
        table = draws.uniform_ints(self._bits(index, _TABLE), self.num_values, (contexts, keys))
        context_orders = draws.permutations(self._bits(index, _CONTEXT_ORDERS), (2, contexts))
        key_orders = draws.permutations(self._bits(index, _KEY_ORDERS), (2, contexts, keys))
        first_key = VALUE + self.num_values
        key_tokens = first_key + draws.subset(self._bits(index, _KEYS), self.max_keys, keys)
        context_tokens = draws.subset(self._bits(index, _CONTEXTS), self.max_contexts, contexts)
        context_tokens += first_key + self.max_keys
        # blocks [half, place of a context, context and then (key, value) in turn]
        blocks = np.empty((2, contexts, 2 * keys + 1), np.int32)
        blocks[:, :, 0] = context_tokens[context_orders]
        blocks[:, :, 1::2] = key_tokens[key_orders]
        blocks[:, :, 2::2] = VALUE + table[context_orders[:, :, None], key_orders]
        half = blocks[0].size
        inputs = np.full(self.length, PAD, np.int32)
        inputs[0], inputs[1 + half] = BOS, SEP
        inputs[1 : 1 + half], inputs[2 + half : 2 + 2 * half] = blocks[0].ravel(), blocks[1].ravel()
        places = np.arange(half).reshape(blocks[0].shape)
        shown = np.empty((contexts, keys), np.int64)  # where the first half shows each value
        shown[context_orders[0][:, None], key_orders[0]] = 1 + places[:, 2::2]
        at = (2 + half + places[:, 1::2]).ravel()
        ago = at - shown[context_orders[1][:, None], key_orders[1]].ravel()
        return {
            "inputs": inputs,
            **self._scored(at, inputs[at + 1], ago),
            "contexts": np.array(contexts, np.int32),
            "keys": np.array(keys, np.int32),
        }

    def show(self, example: Example) -> list[str]:
        """Both halves of the row, one context a line: its token, then key:value."""
        width = 2 * int(example["keys"]) + 1
        half = width * int(example["contexts"])
        lines = [f"tables    {example['contexts']} contexts of {example['keys']} keys"]
        for title, start in (("shown", 1), ("asked (value = answer)", 2 + half)):
            lines += ["", f"{title:11s} context   key:value ..."]
            for at in range(start, start + half, width):
                context, *pairs = example["inputs"][at : at + width].tolist()
                words = [f"{k}:{v}" for k, v in zip(pairs[::2], pairs[1::2], strict=True)]
                lines.append(f"{at:11d} {context:7d}   {' '.join(words)}")
        return lines
