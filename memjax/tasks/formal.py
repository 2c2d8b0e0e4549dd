"""Formal languages of regular and context-free kind: parity and arithmetic modulo 5.

    1 2 2 1 2 . .             parity: token 2 is a one; what comes next is 1 (even) or 2 (odd)
    3 + 1 * 4 = . .           arithmetic; the product first, what comes next is 7 mod 5 = 2
    ( ( - 2 ) + 4 ) = . .     with brackets, what comes next is 2

A row has one answer, at the last token of its expression, and is filled up on the right. They show
whether a memory tracks a state: train on short rows, test on longer ones (in a configuration,
`test = {"length": 256, "min_size": 40, "max_size": 256}`), because parity at lengths seen in
training can be fitted without tracking anything.

Tokens and laws are those of "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues"
(Grazzi et al., arXiv:2411.12537), whose tasks follow xLSTM (Beck et al., arXiv:2405.04517): sizes
are 3 to 40 in training and 40 to 256 in tests; the figure is (accuracy - chance) / (1 - chance).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
_SIZE, _BITS, _NUMBERS, _OPERATORS, _SPLITS = range(5)
MODULUS = 5
_VALUES = np.arange(MODULUS)
# The values of a + b, a - b, a * b at [a, b], in the order of the tokens of the operators.
_RESULTS = (
    np.stack([np.add.outer(_VALUES, _VALUES), np.subtract.outer(_VALUES, _VALUES),
              np.multiply.outer(_VALUES, _VALUES)]) % MODULUS
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Expressions(Source):
    """What all three share: expressions of random size with one answer behind each."""

    length: int = 40
    min_size: int = 3
    max_size: int = 40
    seed: int = 0
    split: Literal["train", "test"] = "train"

    symbols: ClassVar[str]  # a character for each token
    pad: ClassVar[int]  # the token that fills rows up

    def __post_init__(self):
        super().__post_init__()
        if not 3 <= self.min_size <= self.max_size:
            self._refuse(
                f"min_size={self.min_size} with max_size={self.max_size} is out of range; allowed: "
                "3 <= min_size <= max_size"
            )
        if self.max_size > self.length:
            self._refuse(
                f"max_size={self.max_size} is more than length={self.length}; use "
                f"length={self.max_size} or a smaller max_size"
            )

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return len(self.symbols)

    @property
    def queries(self) -> int:
        """Scored positions of a row: one, the last token of the expression."""
        return 1

    @property
    def sizes(self) -> range:
        """The sizes that rows have, all of them equally likely."""
        return range(self.min_size, self.max_size + 1)

    def show(self, example: Example) -> list[str]:
        """The expression and its answer in symbols."""
        at = int(np.flatnonzero(example["mask"])[0])
        shown = " ".join(self.symbols[token] for token in example["inputs"][: at + 1])
        return [
            f"size       {example['size']}",
            f"expression {shown}",
            f"answer     {self.symbols[example['targets'][at]]}, scored at position {at}",
            f"padding    {self.length - at - 1} tokens",
        ]

    def _size(self, index: int) -> int:
        sizes = self.sizes
        return sizes[draws.uniform_ints(self._bits(index, _SIZE), len(sizes), 1)[0]]

    def _row(self, size: int, tokens, answer: int) -> Example:
        inputs, targets = np.full(self.length, self.pad, np.int32), np.zeros(self.length, np.int32)
        mask = np.zeros(self.length, bool)
        inputs[: len(tokens)] = tokens
        targets[len(tokens) - 1], mask[len(tokens) - 1] = answer, True
        return {
            "inputs": inputs,
            "targets": targets,
            "mask": mask,
            "size": np.array(size, np.int32),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(_Expressions):
    """Whether the number of ones is odd [xLSTM, arXiv:2405.04517; arXiv:2411.12537].

    Args:
      length: tokens in a row, T; at least `max_size`.
      min_size, max_size: the least and the largest size, 3 <= min_size <= max_size. A row of size s
        has s - 1 bits; its s-th token would be the answer. Sizes are uniform.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, bits as tokens 1 and 2, then 0.
      targets: int32, at the scored position 2 for an odd number of ones, 1 for an even one; else 0.
      mask: bool, whether the position is scored: the last bit.
    and of the whole row
      size: int32[].
    """

    name: ClassVar[str] = "parity"
    symbols: ClassVar[str] = "_01"
    pad: ClassVar[int] = 0

    @property
    def chance(self) -> float:
        """The accuracy of a guess."""
        return 0.5

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        size = self._size(index)
        bits = draws.uniform_ints(self._bits(index, _BITS), 2, size - 1)
        return self._row(size, 1 + bits, 1 + bits.sum() % 2)


class _Arithmetic(_Expressions):
    """What both kinds of arithmetic share: the law of their answers."""

    @property
    def chance(self) -> float:
        """The accuracy of a guess among five values, by which published figures are scaled."""
        return 1 / MODULUS

    @property
    def answers(self) -> np.ndarray:
        """The probabilities of the answers 0 to 4, float64[5]."""
        raise NotImplementedError

    @property
    def majority(self) -> float:
        """The accuracy of naming the most frequent answer always; `chance` or more."""
        return float(self.answers.max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmetic(_Arithmetic):
    """Sums and products modulo 5 without brackets [arXiv:2411.12537].

    Products bind first. The answer 0 is too frequent, most in short expressions (a product of two
    numbers is 0 in 9 of 25 cases): compare with `majority`.

    Args: those of `Parity`, where sizes are odd (all odd ones from min_size to max_size are equally
    likely): size s has (s - 1) / 2 numbers with operators between them, and "=", the (s - 1)-th
    token. And
      mult: whether operators are uniform over + - * (as published), or over + -.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `Parity`, with tokens 0 (filler), 1 to 4 (+ - * =) and
    5 to 9 (the numbers 0 to 4); the answer is scored at "=".
    """

    name: ClassVar[str] = "modular_arithmetic"
    symbols: ClassVar[str] = "_+-*=01234"
    pad: ClassVar[int] = 0

    mult: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.sizes:
            self._refuse(
                f"min_size={self.min_size} and max_size={self.max_size} have no odd size between "
                f"them; use max_size={self.max_size + 1}"
            )

    @property
    def sizes(self) -> range:
        """The sizes that rows have, all of them equally likely."""
        return range(self.min_size | 1, self.max_size + 1, 2)

    @property
    def answers(self) -> np.ndarray:
        """The probabilities of the answers 0 to 4, float64[5]."""
        return _law_without_brackets(self.sizes, self.mult).copy()

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        size = self._size(index)
        count = (size - 1) // 2
        numbers = draws.uniform_ints(self._bits(index, _NUMBERS), MODULUS, count)
        operators = draws.uniform_ints(self._bits(index, _OPERATORS), 2 + self.mult, count - 1)
        tokens = np.full(size - 1, self.symbols.index("="), np.int32)
        tokens[:-1:2], tokens[1:-1:2] = 5 + numbers, 1 + operators
        return self._row(size, tokens, 5 + _value(numbers.tolist(), operators.tolist()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BracketArithmetic(_Arithmetic):
    """Arithmetic modulo 5 with nested brackets [arXiv:2411.12537].

    An expression of n tokens is drawn so: n = 1 is a number x, 2 is -x, 3 is (x), 4 is (-x); a
    longer one is "(" left operator right ")", where left has 1 to n - 4 tokens, all equally likely.

    Args: those of `Parity`, where size s has an expression of max(s, 5) - 3 tokens, and "=" behind
    it. And
      mult: whether operators are uniform over + - * or over + - (as published). Without products
        the answer is uniform; with them 0 is more frequent, see `majority`.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `Parity`, with tokens 0 to 4 (the numbers), 5 to 10
    (+ - * ( ) =) and 11 (filler); the answer is scored at "=".
    """

    name: ClassVar[str] = "bracket_arithmetic"
    symbols: ClassVar[str] = "01234+-*()=_"
    pad: ClassVar[int] = 11

    mult: bool = False

    @property
    def answers(self) -> np.ndarray:
        """The probabilities of the answers 0 to 4, float64[5]."""
        laws = _laws_with_brackets(_tokens(self.max_size), self.mult)
        return np.mean([laws[_tokens(size)] for size in self.sizes], axis=0)

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        size = self._size(index)
        count = _tokens(size)
        most = count // 4 + 1  # an operator comes with two brackets and one number at least
        drawn = _Drawn(
            iter(draws.uniforms(self._bits(index, _SPLITS), most).tolist()),
            iter(draws.uniform_ints(self._bits(index, _OPERATORS), 2 + self.mult, most).tolist()),
            iter(draws.uniform_ints(self._bits(index, _NUMBERS), MODULUS, most).tolist()),
        )
        tokens, value = _expression(count, drawn)
        return self._row(size, [*tokens, self.symbols.index("=")], value)


# --- values and laws ----------------------------------------------------------------------------


def _value(numbers: list[int], operators: list[int]) -> int:
    """Of numbers [N] with operators [N - 1] (0 to 2: + - *) between them, modulo 5."""
    total, term = 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == 2:
            term *= number
        else:
            total, term = total + term, -number if operator else number
    return (total + term) % MODULUS


@functools.cache
def _law_without_brackets(sizes: range, mult: bool) -> np.ndarray:
    """The law of `_value` of uniform draws, averaged over sizes. float64[5]."""
    uniform = np.full(MODULUS, 1 / MODULUS)
    joint = np.zeros((MODULUS, MODULUS))  # of the sum of finished terms and the last term
    joint[0] = uniform
    times = np.eye(MODULUS)[_RESULTS[2]].mean(axis=1)  # from a term to its product with a number
    laws = {}
    for size in range(3, sizes[-1] + 1, 2):
        total = np.bincount(_RESULTS[0].ravel(), joint.ravel(), MODULUS)
        laws[size] = total
        begun = np.outer(total, uniform)  # after + and -, whose numbers have the same law
        joint = (2 * begun + joint @ times) / 3 if mult else begun
    return np.mean([laws[size] for size in sizes], axis=0)


def _tokens(size: int) -> int:
    """Of an expression with brackets, "=" and the answer not counted."""
    return max(size, 5) - 3


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What an expression with brackets takes in turn, from left to right."""

    splits: Iterator[float]
    operators: Iterator[int]
    numbers: Iterator[int]


def _expression(count: int, drawn: _Drawn) -> tuple[list[int], int]:
    """Tokens [count] and the value of an expression with brackets."""
    plus, minus, opening, closing = map(BracketArithmetic.symbols.index, "+-()")
    if count > 4:
        left = 1 + int((count - 4) * next(drawn.splits))
        operator = next(drawn.operators)
        a, x = _expression(left, drawn)
        b, y = _expression(count - 3 - left, drawn)
        return [opening, *a, plus + operator, *b, closing], int(_RESULTS[operator, x, y])
    number = next(drawn.numbers)
    tokens, value = ([number], number) if count % 2 else ([minus, number], -number % MODULUS)
    return ([opening, *tokens, closing] if count > 2 else tokens), value


@functools.cache
def _laws_with_brackets(largest: int, mult: bool) -> np.ndarray:
    """The law of the value of an expression by its number of tokens, float64[largest + 1, 5]."""
    laws = np.full((max(largest, 4) + 1, MODULUS), 1 / MODULUS)
    results = _RESULTS[: 2 + mult].ravel()
    for count in range(5, largest + 1):
        joint = laws[1 : count - 3].T @ laws[count - 4 : 0 : -1] / (count - 4)
        weights = np.tile(joint.ravel(), 2 + mult)
        laws[count] = np.bincount(results, weights, MODULUS) / (2 + mult)
    return laws
