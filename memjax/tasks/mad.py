"""MAD without its recall tasks (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid
Architectures", arXiv:2403.17844); those are in `mad_recall`.

    selective_copy   a _ _ b _ c COPY . . .    the tokens between blanks, in order
    compression      a b c END . . .           all tokens, in order
    memorization     k1 ? k2 ? ..              values of a map that is the same in all rows

MAD's figure for a task is a mean over settings: the defaults here, then vocab, length, the number
of different training examples (12,800 with the defaults, 256 in memorization; `train_examples` in a
configuration), noise and copies varied one at a time. Its accuracy is a mean over classes, not over
scored positions.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
_KEYS, _PAYLOAD, _BLANKS = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mad(Source):
    """What all six share."""

    length: int = 128
    vocab: int = 16
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if self.vocab > 2**31:
            self._refuse(f"vocab={self.vocab} is out of range; allowed: up to 2**31")

    def _check_even(self) -> None:
        if self.length % 2:
            self._refuse(f"length={self.length} is odd; use length={self.length + 1}")

    def _copy(self, copied: np.ndarray, shown: np.ndarray) -> Example:
        """A row with the tokens `copied` [N] at the positions `shown` [N], ascending, among blanks;
        behind them the last token of the vocabulary and blanks, at which they are asked for."""
        blank = self.vocab - 2
        inputs = np.full(self.length, blank, np.int32)
        inputs[shown], inputs[shown[-1] + 1] = copied, blank + 1
        at = shown[-1] + 2 + np.arange(len(copied))
        return {"inputs": inputs, **self._scored(at, copied, at - shown)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Mad):
    """Tokens among blanks, asked for in order [MAD, arXiv:2403.17844; after Mamba].

    `copies` uniform tokens and length - 2 copies - 1 blanks, each in front of a token chosen
    uniformly; the copy token; as many blanks as tokens, at which the tokens are the answers. Where
    the tokens are is known from their content only: a convolution of bounded width fails.

    Args:
      length: tokens in a row, T; 2 copies + 1 or more.
      vocab: the last token asks for the copy, the one before it is the blank; 3 or more.
      copies: tokens to be copied, 1 or more.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the token that the output must give, else 0.
      mask: bool, whether the position is scored: the last `copies` ones.
      distance: int32, at a scored position how many tokens ago the answer was shown, else 0.
    """

    name: ClassVar[str] = "selective_copy"

    length: int = 256
    copies: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._check_least(vocab=3)
        if not 1 <= self.copies <= (self.length - 1) // 2:
            self._refuse(
                f"copies={self.copies} is out of range; allowed: 1 to (length - 1) // 2, "
                f"{(self.length - 1) // 2}"
            )

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all."""
        return self.copies

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all tokens that are copied."""
        return 1 / (self.vocab - 2)

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        copied = draws.uniform_ints(self._bits(index, _PAYLOAD), self.vocab - 2, self.copies)
        blanks = self.length - 2 * self.copies - 1
        chosen = draws.uniform_ints(self._bits(index, _BLANKS), self.copies, blanks)
        in_front = np.cumsum(np.bincount(chosen, minlength=self.copies))
        return self._copy(copied, np.arange(self.copies) + in_front)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression(Mad):
    """All tokens of a row again, after they have been read [MAD, arXiv:2403.17844].

    length / 2 - 1 uniform tokens, the compression token, and as many blanks, at which the tokens
    are the answers, in order; one more blank makes the length even.

    This is a form for language models. In the published task the model's output at the compression
    token goes, with a position, through a decoder that has to give the token of that position: one
    vector holds the row. Here it is the whole state, and attention may look at the tokens again.
    Figures are not comparable with published ones, nor between memories of different size.

    Args: those of `SelectiveCopy` without `copies`, with length even, 4 or more, twice that of the
      published task. The last token compresses, the one before it is the blank, so that `vocab` is
      one more than published.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `SelectiveCopy`; length / 2 - 1 positions are scored.
    """

    name: ClassVar[str] = "compression"

    length: int = 64
    vocab: int = 17

    def __post_init__(self):
        super().__post_init__()
        self._check_least(length=4, vocab=3)
        self._check_even()

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all."""
        return self.length // 2 - 1

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all tokens but the last two."""
        return 1 / (self.vocab - 2)

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        tokens = draws.uniform_ints(self._bits(index, _PAYLOAD), self.vocab - 2, self.queries)
        return self._copy(tokens, np.arange(self.queries))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization(Mad):
    """Values of one map that is the same in all rows: knowledge of the weights [arXiv:2403.17844].

    length / 2 times a uniform key and the insert token, at which the key's value is the answer.

    Args:
      length: tokens in a row, T; even, 2 or more.
      vocab: the last token is the insert token, the first half of the others are keys, the rest
        values, of which one is left over when the others are odd in number; 3 or more.
      map_seed: of the map, in both splits and with any `seed`; 0 to 2**64 - 1.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the value of the key in front of it, else 0.
      mask: bool, whether the position is scored: the insert tokens, every second one.
    """

    name: ClassVar[str] = "memorization"

    length: int = 32
    vocab: int = 256
    map_seed: int = 12345

    def __post_init__(self):
        super().__post_init__()
        self._check_least(length=2, vocab=3)
        self._check_even()
        self._check_seed("map_seed")

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all."""
        return self.length // 2

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all values of the map."""
        return 1 / len(_map(self.vocab, self.map_seed))

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        values = _map(self.vocab, self.map_seed)
        keys = draws.uniform_ints(self._bits(index, _KEYS), len(values), self.queries)
        inputs, targets = np.zeros((2, self.length), np.int32)
        inputs[0::2], inputs[1::2] = keys, self.vocab - 1
        targets[1::2] = values[keys]
        mask = np.zeros(self.length, bool)
        mask[1::2] = True
        return {"inputs": inputs, "targets": targets, "mask": mask}

    def show(self, example: Example) -> list[str]:
        """The keys and their values, which are not in the row."""
        keys, values = example["inputs"][0::2], example["targets"][1::2]
        pairs = enumerate(zip(keys, values, strict=True))
        lines = [f"{2 * i:8d}   {key:5d}   {value:5d}" for i, (key, value) in pairs]
        return ["position     key   value", *lines]


@functools.lru_cache(maxsize=64)
def _map(vocab: int, seed: int) -> np.ndarray:
    """The values of the keys 0, 1, .. (`vocab - 1` halved), all different. int64[keys]."""
    keys = (vocab - 1) // 2
    values = keys + draws.permutations(draws.bits(seed, "memorization/map", 0, 0), vocab - 1 - keys)
    values.flags.writeable = False
    return values[:keys]
