"""The recall tasks of MAD (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid
Architectures", arXiv:2403.17844).

    in_context_recall   k1 v1 k2 v2 k1 .              the value of a key that was seen before
    noisy_recall        k1 v1 n n k1 .                the same among tokens that are neither
    fuzzy_recall        k1 k2 k3 v1 v2 k1 k2 k3 . .   keys and values of 1 to 3 tokens

The split "train" scores the next token everywhere, random tokens included, and "test" only values
that can be known, as published. A row's last token is part of it, though no output there is scored.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from memjax.tasks import draws
from memjax.tasks.mad import Mad
from memjax.tasks.source import Example

# One number per named draw; a new draw takes a new number, so that examples never change.
_KEYS, _VALUES, _LAST, _NOISE, _NOISY, _KEPT, _KEY_SIZES, _VALUE_SIZES = range(8)
_MOTIF = 3  # tokens of the longest key or value of fuzzy recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recall(Mad):
    """What the three tasks share: keys and values, halves of all tokens but the last `_others`."""

    @property
    def _others(self) -> int:
        """Tokens that are neither keys nor values."""
        return 0

    @property
    def keys(self) -> int:
        """Number of keys, the tokens 0 to keys - 1."""
        return (self.vocab - self._others) // 2

    @property
    def values(self) -> int:
        """Number of values, the tokens from `keys` on."""
        return self.vocab - self._others - self.keys

    @property
    def queries(self) -> int:
        """The most positions that a row can have scored."""
        return self.length - 1 if self.split == "train" else self.length // 2 - 1

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all values."""
        return 1 / self.values


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextRecall(_Recall):
    """Values of keys that were seen before in the row [MAD, arXiv:2403.17844].

    length / 2 - 1 pairs of a uniform key and its value, which is drawn for each row and key; then
    one more pair, whose key is uniform among those seen.

    Args:
      length: tokens in a row, T; even, 4 or more.
      vocab: the first half of the tokens are keys, the rest values; 2 or more.
      seed: 0 to 2**64 - 1.
      split: "train" scores every next token, "test" the values of keys seen before.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the token that the output must predict, else 0.
      mask: bool, whether the position is scored; never the last one.
      distance: int32, at a key seen before how many tokens ago its value was last shown, else 0.
    """

    name: ClassVar[str] = "in_context_recall"

    def __post_init__(self):
        super().__post_init__()
        self._check_least(length=4, vocab=self._others + 2)
        self._check_even()

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        drawn = draws.uniform_ints(self._bits(index, _KEYS), self.keys, self.length // 2 - 1)
        table = draws.uniform_ints(self._bits(index, _VALUES), self.values, self.keys) + self.keys
        noisy, noise = self._noise(index, len(drawn))
        seen = np.unique(drawn[~noisy])
        keys = np.append(drawn, seen[draws.uniform_ints(self._bits(index, _LAST), len(seen), 1)])
        pairs = np.stack([keys, table[keys]], axis=1).astype(np.int32)
        pairs[:-1][noisy] = noise
        keys[:-1][noisy] = -1 - np.arange(len(noise))  # all different
        before = _previous(keys)
        known = np.flatnonzero(before >= 0)
        inputs, distance = pairs.ravel(), np.zeros(self.length, np.int32)
        distance[2 * known] = 2 * (known - before[known]) - 1
        mask = distance > 0
        mask[:-1] |= self.split == "train"
        targets = np.where(mask, np.roll(inputs, -1), 0)
        return {"inputs": inputs, "targets": targets, "mask": mask, "distance": distance}

    def _noise(self, index: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the pairs are noise, bool[pairs], and their tokens, int64[noise, 2]."""
        return np.zeros(pairs, bool), np.empty((0, 2), np.int64)

    def show(self, example: Example) -> list[str]:
        """The pairs, and which values are known."""
        lines = ["position     key   value"]
        for at in range(0, self.length, 2):
            key, value = example["inputs"][at : at + 2]
            line = f"{at:8d}   {key:5d}   {value:5d}"
            if example["distance"][at]:
                line += f"   known, shown {example['distance'][at]} tokens ago"
            lines.append(line + ("   noise" if key >= self.keys else ""))
        return [*lines, "", f"scored  {example['mask'].sum()} of {self.length} positions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall in which pairs are replaced by noise [MAD, arXiv:2403.17844].

    Each pair but the last is replaced by two uniform noise tokens with probability `noise`; one of
    them, any with equal chance, never is.

    Args: those of `InContextRecall`, where keys and values are halves of the tokens that are no
    noise, and
      noise_tokens: how many of the tokens are noise, the last ones; 1 to vocab - 2.
      noise: the probability, 0 to below 1.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `InContextRecall`.
    """

    name: ClassVar[str] = "noisy_recall"

    vocab: int = 32
    noise_tokens: int = 16
    noise: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        self._check_least(noise_tokens=1)
        if not 0 <= self.noise < 1:
            self._refuse(f"noise={self.noise} is out of range; allowed: 0 to below 1")

    @property
    def _others(self) -> int:
        return self.noise_tokens

    def _noise(self, index: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        noisy = draws.uniforms(self._bits(index, _NOISY), pairs) < self.noise
        noisy[draws.uniform_ints(self._bits(index, _KEPT), pairs, 1)] = False
        size = int(noisy.sum()), 2
        tokens = draws.uniform_ints(self._bits(index, _NOISE), self.noise_tokens, size)
        return noisy, self.keys + self.values + tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyRecall(_Recall):
    """In-context recall of keys and values that are 1 to 3 tokens long [MAD, arXiv:2403.17844].

    A key is an ordered tuple of different key tokens, uniform given its size, which is uniform over
    1 to 3 in the split "train" and 3 in "test"; values likewise, 1 to 3 in both. One pair, the
    probe, stands at a uniform place and is asked for at the end; rows are filled up on the left.
    (In the published generator a few rows ask for a probe that they never show, because its place
    is too late, and training scores filler too. Here such a place is moved to the front as far as
    it has to be, and filler is not scored.)

    Args: those of `InContextRecall`, with length 13 or more and vocab 7 or more: the last token is
    filler, the others are halved into keys and values.
    Raises ValueError for settings that are impossible.

    `source[i]` holds what it does in `InContextRecall`; the last token of the answer is among the
    targets only.
    """

    name: ClassVar[str] = "fuzzy_recall"

    def __post_init__(self):
        super().__post_init__()
        self._check_least(length=4 * _MOTIF + 1, vocab=2 * _MOTIF + 1)

    @property
    def _others(self) -> int:
        return 1  # the filler

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        document, asked = self._document(index)
        front = self.length + 1 - len(document)
        row = np.full(self.length + 1, self.vocab - 1, np.int32)
        row[front:] = document
        distance, mask = np.zeros(self.length, np.int32), np.zeros(self.length, bool)
        for start, size, ago in asked:
            distance[front + start - 1 : front + start - 1 + size] = ago
        mask[front - 1 :] = self.split == "train"
        mask |= distance > 0
        targets = np.where(mask, row[1:], 0)
        return {"inputs": row[:-1], "targets": targets, "mask": mask, "distance": distance}

    def _document(self, index: int) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Tokens without filler; start and size of each value known before, and its distance."""
        most = self.length // 2
        keys = self._motifs(index, (_KEYS, _KEY_SIZES), self.keys, most, self.split == "test")
        values = self._motifs(index, (_VALUES, _VALUE_SIZES), self.values, most, False)
        values = [tuple(self.keys + token for token in value) for value in values]
        probe, table = keys[0], {keys[0]: values[0]}
        size = len(probe) + len(values[0])
        end = self.length - size - 2 * _MOTIF
        place = draws.uniform_ints(self._bits(index, _LAST), self.length - 2 * size, 1)[0]
        place = min(place, end - 2 * _MOTIF)  # a pair begins there or later, but in front of `end`
        document: list[int] = []
        shown: dict[tuple[int, ...], int] = {}
        asked: list[tuple[int, int, int]] = []

        def write(key):
            start, value = len(document) + len(key), table[key]
            document.extend(key + value)
            if key in shown:
                asked.append((start, len(value), start - shown[key] - 1))
            shown[key] = start

        for key, value in zip(keys[1:], values[1:], strict=True):
            if probe not in shown and len(document) >= place:
                write(probe)
            if len(document) >= end:
                break
            table.setdefault(key, value)
            write(key)
        write(probe)
        return document, asked

    def _motifs(self, index: int, fields, tokens: int, count: int, longest: bool) -> list[tuple]:
        """`count` tuples of different numbers below `tokens`."""
        motifs = draws.tuples(self._bits(index, fields[0]), tokens, (count, _MOTIF)).tolist()
        sizes = draws.uniform_ints(self._bits(index, fields[1]), _MOTIF, count).tolist()
        return [
            tuple(m[: _MOTIF if longest else 1 + s]) for m, s in zip(motifs, sizes, strict=True)
        ]

    def show(self, example: Example) -> list[str]:
        """A line for each key with its value; known values in brackets."""
        row = np.append(example["inputs"], example["targets"][-1]).tolist()
        known = np.append(False, example["distance"] > 0).tolist()
        lines, value = [f"filler   {row.count(self.vocab - 1)} tokens"], True
        for at, token in enumerate(row):
            if token == self.vocab - 1:
                continue
            if value and token < self.keys:
                lines.append(f"{at:8d}  ")
            lines[-1] += " ->" * (not value and token >= self.keys)
            lines[-1] += f" [{token}]" if known[at] else f" {token}"
            value = token >= self.keys
        return [*lines, "", f"scored  {example['mask'].sum()} of {self.length} positions"]


def _previous(keys: np.ndarray) -> np.ndarray:
    """For each of keys [N] the last place before it that has the same, or -1. int64[N]."""
    order = np.argsort(keys, kind="stable")
    again = keys[order[1:]] == keys[order[:-1]]
    before = np.full(len(keys), -1)
    before[order[1:][again]] = order[:-1][again]
    return before
