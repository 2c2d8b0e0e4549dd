"""Passkey: find one number in a long text and repeat it; a smoke test of long contexts.

    <spaces> The grass is green. The sky is blue. ...     haystack, the same line again and again
             The magic number for dafin-mosor is 4070213.     needle
             The grass is green. The sky is blue. ...
             The magic number for dafin-mosor is 4070213      question; the digits are the answer

The needle stands before line floor(depth lines / 100) of the haystack. Keys are two words of
consonants and vowels, so that no list of words is needed; values have 7 digits. The haystack and
the template `ruler` are those of RULER's niah_single_1 (Hsieh et al. 2024, arXiv 2404.06654);
`short` leaves room for more haystack and suits training from scratch. Further needles with other
keys (`distractors`) are our option; of needles in one place the one that is asked for comes first.

Tokens are those of text (`memjax.data.tokens`): BOS, then bytes + 3. A row is a pure function of
the settings, the seed, the split and its index.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

BOS, OFFSET, VOCAB = 1, 3, 259  # of memjax.data.tokens
# One number per named draw; a new draw takes a new number, so that examples never change.
_KEYS, _VALUES, _DEPTH, _LINES = range(4)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_WORD = (_CONSONANTS, _VOWELS) * 2 + (_CONSONANTS,)
_WORDS = 14 * 5 * 14 * 5 * 14
DIGITS = 7
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
GRID = np.round(np.linspace(0, 100, 40)).astype(np.int32)  # depths of the split "test"


@dataclasses.dataclass(frozen=True)
class Template:
    """The texts around the haystack; `question` ends before the space in front of the answer."""

    intro: str
    needle: str
    question: str


TEMPLATES = {
    "short": Template(
        "", "The magic number for {key} is {value}.\n", "The magic number for {key} is"
    ),
    "ruler": Template(
        "A special magic number is hidden within the following text. Make sure to memorize it. I "
        "will quiz you about the number afterwards.\n",
        "One of the special magic numbers for {key} is: {value}.\n",
        "What is the special magic number for {key} mentioned in the provided text? The special "
        "magic number for {key} mentioned in the provided text is",
    ),
}


def word(number: int) -> str:
    """The consonants and vowels of a word, CVCVC, from its number below 68,600."""
    letters = []
    for alphabet in _WORD:
        number, letter = divmod(number, len(alphabet))
        letters.append(alphabet[letter])
    return "".join(letters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Source):
    """One number in a haystack, asked for at the end.

    Args:
      length: tokens in a row, T: as many bytes of text, the last digit among the targets only.
        Spaces in front fill up what is no whole line of the haystack; they are not scored.
      template: "short" or "ruler".
      distractors: further needles with other keys and values, at uniform places.
      every_byte: whether the split "train" scores all bytes of the text; "test" scores the digits.
      seed: 0 to 2**64 - 1.
      split: "train", with depths uniform over 0 to 100, or "test", whose example i has depth
        GRID[i mod 40].
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the token that the output must predict, else 0.
      mask: bool, whether the position is scored: `queries` of them are.
      distance: int32, at the digits how many tokens ago the digit was shown, else 0.
    and of the whole row
      depth: int32[], in per cent.
    """

    name: ClassVar[str] = "passkey"
    eval_examples: ClassVar[int] = 400

    length: int = 512
    template: str = "short"
    distractors: int = 0
    every_byte: bool = False
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if self.template not in TEMPLATES:
            self._refuse(
                f"template={self.template!r} does not exist; allowed: {', '.join(TEMPLATES)}"
            )
        self._check_least(distractors=0)
        if self.lines < 1:
            needed = self._overhead + len(LINE)
            self._refuse(
                f"template={self.template!r} with distractors={self.distractors} and a line of "
                f"haystack takes {needed} bytes, more than length={self.length}; use "
                f"length={needed} or more"
            )

    @property
    def _overhead(self) -> int:
        """Bytes of a row that are no haystack."""
        texts, sizes = TEMPLATES[self.template], {"key": "CVCVC-CVCVC", "value": DIGITS * "0"}
        needles = (1 + self.distractors) * len(texts.needle.format(**sizes))
        return len(texts.intro) + needles + len(texts.question.format(**sizes)) + 1 + DIGITS

    @property
    def lines(self) -> int:
        """Lines of the haystack."""
        return (self.length - self._overhead) // len(LINE)

    @property
    def vocab(self) -> int:
        """That of bytes."""
        return VOCAB

    @property
    def chance(self) -> float:
        """The accuracy of a guess among ten digits."""
        return 0.1

    @property
    def queries(self) -> int:
        """Scored positions of every row, the same number in all."""
        if self.split == "train" and self.every_byte:
            return self._overhead + self.lines * len(LINE)
        return DIGITS

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        depth = self._depth(index)
        text, shown = self._text(index, depth)
        tokens = np.empty(self.length + 1, np.int32)
        tokens[0] = BOS
        tokens[1:] = np.frombuffer(text.rjust(self.length).encode(), np.uint8)
        tokens[1:] += OFFSET
        mask, digits = np.zeros((2, self.length), bool)
        mask[self.length - self.queries :] = digits[self.length - DIGITS :] = True
        # the j-th digit is asked for at T - 7 + j and stands in inputs behind BOS
        distance = self.length - DIGITS - (self.length - len(text) + shown + 1)
        return {
            "inputs": tokens[:-1],
            "targets": np.where(mask, tokens[1:], 0),
            "mask": mask,
            "distance": np.where(digits, np.int32(distance), 0),
            "depth": depth,
        }

    def show(self, example: Example) -> list[str]:
        """The text of a row with its last digit, without the spaces in front."""
        shown = [*example["inputs"][1:], example["targets"][-1]]
        text = bytes(token - OFFSET for token in shown).decode()
        begin = text.lstrip(" ")
        return [
            f"haystack  {self.lines} lines of {len(LINE)} bytes",
            f"padding   {len(text) - len(begin)} spaces",
            f"depth     {example['depth']} %",
            f"distance  {example['distance'][-1]} tokens",
            f"scored    {example['mask'].sum()} of {self.length} positions",
            f"answer    {text[-DIGITS:]}",
            "",
            begin,
        ]

    def _depth(self, index: int) -> np.ndarray:
        """Of the needle in the haystack in per cent, int32[]."""
        if self.split == "test":
            return GRID[index % len(GRID)].copy()
        return draws.uniform_ints(self._bits(index, _DEPTH), 101, 1)[0].astype(np.int32)

    def _text(self, index: int, depth: np.ndarray) -> tuple[str, int]:
        """The text of a row, and where in it the needle shows the first digit."""
        texts, number = TEMPLATES[self.template], 1 + self.distractors
        keys = draws.subset(self._bits(index, _KEYS), _WORDS**2, number).tolist()
        keys = ["-".join(map(word, divmod(key, _WORDS))) for key in keys]
        low = 10 ** (DIGITS - 1)
        values = low + draws.subset(self._bits(index, _VALUES), 9 * low, number)
        needles = [
            texts.needle.format(key=key, value=value)
            for key, value in zip(keys, values.tolist(), strict=True)
        ]
        elsewhere = draws.uniform_ints(self._bits(index, _LINES), self.lines + 1, self.distractors)
        haystack: list[list[str]] = [[] for _ in range(self.lines + 1)]
        for line, needle in zip([depth * self.lines // 100, *elsewhere], needles, strict=True):
            haystack[line].append(needle)
        body = LINE.join("".join(in_front) for in_front in haystack)
        text = f"{texts.intro}{body}{texts.question.format(key=keys[0])} {values[0]}"
        return text, text.index(needles[0]) + needles[0].index(str(values[0]))
