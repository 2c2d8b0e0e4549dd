"""Word problems of finite groups: name the product of all elements so far, after every element.

    BOS  g1  g2     g3
     .   g1  g1 g2  g1 g2 g3  ..     what the outputs must be

A state has to be tracked exactly, and the group says how hard that is: Z60, A4xZ5 and A5 have 60
elements each, but the products of the first commute and the last is not solvable. The task is that
of "The Illusion of State in State-Space Models" (Merrill et al., arXiv:2404.08819), with variants
of "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv:2411.12537) and
DeltaProduct (arXiv:2502.10297). Report the share of rows that are right up to each position as well
as the accuracy at it.

An element is the index of a permutation in lexicographic order, so that 0 is the identity; A4 and
A5 are the even permutations in that order; (p q)(x) = p(q(x)). In A4xZ5 the element (a, z) is
5 a + z.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

_ELEMENTS = 0  # the number of the one named draw
GROUPS = ("S3", "S4", "A5", "S5", "Z60", "A4xZ5")
_PERMUTATIONS = GROUPS[:4]


@functools.cache
def permutations(group: str) -> np.ndarray:
    """The elements of "S3", "A5", .. in order, int64[elements, points]; read-only."""
    points = int(group[1])
    every = np.array(list(itertools.permutations(range(points))))
    if group[0] == "A":
        first, second = np.triu_indices(points, 1)
        every = every[(every[:, first] > every[:, second]).sum(axis=1) % 2 == 0]
    every.flags.writeable = False
    return every


@functools.cache
def table(group: str) -> np.ndarray:
    """The product p q of elements at [p, q], int64[elements, elements]; read-only."""
    factors = group.split("x")
    if len(factors) == 2:
        left, right = map(table, factors)
        products = left[:, None, :, None] * len(right) + right[None, :, None, :]
        products = products.reshape(len(left) * len(right), -1)
    elif group[0] == "Z":
        order = int(group[1:])
        products = np.add.outer(np.arange(order), np.arange(order)) % order
    else:
        every = permutations(group)
        digits = every.shape[1] ** np.arange(every.shape[1])[::-1]  # numbers in the same order
        products = np.searchsorted(every @ digits, every[:, every] @ digits)
    products.flags.writeable = False
    return products


@functools.cache
def _rows(group: str) -> list[list[int]]:
    return table(group).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupWords(Source):
    """Products of the elements of a group, one more at each position.

    Args:
      length: tokens in a row, T: BOS and T - 1 elements; the published rows have 128 or 32 elements
        in training and 512 in tests.
      group: "S3" (6 elements), "S4" (24), "A5" (60), "S5" (120), "Z60" or "A4xZ5" (60).
      moves: 0 draws from the whole group; m >= 2 draws permutations that move at most m points, so
        that S5 has 11 elements to draw from with 2 ("only swaps") and 31 with 3 ("limit to 3").
        The products are still those of the whole group. Not for Z60 and A4xZ5.
      repeat: how often each element is written; the products change with an element's last token
        (4: "4 tokens per element"). Until the first one is complete the answer is the identity.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, BOS (the number of elements), then elements, uniform and independent.
      targets: int32, the product of the elements so far; 0 at BOS.
      mask: bool, whether the position is scored: all but BOS.
    """

    name: ClassVar[str] = "group_words"

    length: int = 129
    group: str = "S3"
    moves: int = 0
    repeat: int = 1
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if self.group not in GROUPS:
            self._refuse(f"group={self.group!r} does not exist; allowed: {', '.join(GROUPS)}")
        self._check_least(length=2, repeat=1)
        if self.moves and self.group not in _PERMUTATIONS:
            self._refuse(
                f"moves={self.moves} is for groups of permutations, {', '.join(_PERMUTATIONS)}; "
                f"use moves=0 with {self.group}"
            )
        least = 3 if self.group[0] == "A" else 2
        if self.moves and self.moves < least:
            self._refuse(
                f"moves={self.moves} leaves only the identity of {self.group}; allowed: 0 for all "
                f"elements, or {least} or more"
            )

    @property
    def elements(self) -> int:
        """Number of elements of the group."""
        return len(table(self.group))

    @property
    def drawn(self) -> np.ndarray:
        """The elements that words are made of, all of them equally likely. int64[n], ascending."""
        if not self.moves:
            return np.arange(self.elements)
        every = permutations(self.group)
        return np.flatnonzero((every != every[0]).sum(axis=1) <= self.moves)

    @property
    def vocab(self) -> int:
        """Number of tokens: the elements and BOS."""
        return self.elements + 1

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all: all but BOS."""
        return self.length - 1

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all elements."""
        return 1 / self.elements

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        steps, allowed = self.length - 1, self.drawn
        count = -(-steps // self.repeat)
        word = allowed[draws.uniform_ints(self._bits(index, _ELEMENTS), len(allowed), count)]
        products = _rows(self.group)
        reached = list(itertools.accumulate(word.tolist(), lambda p, q: products[p][q], initial=0))
        inputs, targets = np.empty((2, self.length), np.int32)
        inputs[0], targets[0] = self.elements, 0
        inputs[1:] = np.repeat(word, self.repeat)[:steps]
        targets[1:] = np.repeat(reached, self.repeat)[1 : self.length]
        mask = np.ones(self.length, bool)
        mask[0] = False
        return {"inputs": inputs, "targets": targets, "mask": mask}

    def show(self, example: Example) -> list[str]:
        """Each element and the product so far, permutations as the images of their points."""
        if self.group in _PERMUTATIONS:
            names = ["".join(map(str, images)) for images in permutations(self.group)]
        elif "x" in self.group:
            names = [f"({element // 5},{element % 5})" for element in range(self.elements)]
        else:
            names = [f"+{z}" for z in range(self.elements)]
        lines = ["position   token   element   answer   product"]
        scored = zip(example["inputs"][1:], example["targets"][1:], strict=True)
        for position, (token, answer) in enumerate(scored, 1):
            lines.append(
                f"{position:8d}   {token:5d}   {names[token]:>7}   {answer:6d}   {names[answer]:>7}"
            )
        return lines
