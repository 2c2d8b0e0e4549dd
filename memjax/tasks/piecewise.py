"""Sources whose law changes at unseen points, with the loss of the best possible predictor.

    BOS 0 0 1 0 0 0 | 1 1 0 1 1 1 1 | 0 0 ..     | is a switch, after which the law is a new one

Each segment has a law of its own, drawn from Dirichlet(1/2, .., 1/2) (for two symbols
Beta(1/2, 1/2)); symbols within it are independent. The output must predict the next symbol
everywhere. "Memory-Based Meta-Learning on Non-Stationary Distributions" (Genewein et al. 2023,
arXiv:2302.03067); the Bayes-optimal predictors are exact, by run lengths (Adams and MacKay 2007,
arXiv:0710.3742) and by partition tree weighting (Veness et al. 2013, arXiv:1211.0587). A model
whose mean loss is below theirs has seen what it should not.
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
_SWITCHES, _LAWS, _SYMBOLS = range(3)
SWITCHING = ("ptw", "lin", "geometric", "regular", "static")


@functools.lru_cache(maxsize=64)
def hazards(switching: str, period: int, length: int) -> np.ndarray:
    """The probabilities that a segment ends after its r-th symbol, given that it has r symbols.

    They are 1 / 2r ("lin"), 1 / period ("geometric"), 1 at r = period ("regular") or 0 ("static").
    Returns float64[length], read-only, for r = 1, 2, ..
    """
    runs = np.arange(1, length + 1)
    found = {
        "lin": 0.5 / runs,
        "geometric": np.full(length, 1 / period),
        "regular": (runs == period).astype(float),
        "static": np.zeros(length),
    }[switching]
    found.flags.writeable = False
    return found


def run_length_nats(symbols: np.ndarray, alphabet: int, ending: np.ndarray) -> np.ndarray:
    """Nats of each of symbols [T] by the Bayes-optimal predictor where switches follow a hazard.

    It weighs every start of the running segment; within a segment of r symbols, of which n were x,
    it predicts x with probability (n + 1/2) / (r + alphabet / 2). O(T**2).

    ending: float64[T], the probability of a switch after the 1st, 2nd, .. symbol of a segment.
    Returns float64[T].
    """
    length = len(symbols)
    before = np.zeros((alphabet, length + 1))  # how often each symbol stands in front of a position
    before[symbols, np.arange(1, length + 1)] = 1
    before = np.cumsum(before, axis=1)
    # By the length of a run, longest first: at time t the last t + 1 are for the starts 0 to t.
    scale = 1 / (np.arange(length - 1, -1, -1) + alphabet / 2)
    ending = ending[::-1]
    lasting = 1 - ending
    # A start whose weight underflows cannot matter again: the best later one gains on it for good.
    weights = np.zeros(length + 1)
    weights[0] = 1
    nats = np.empty(length)
    for t, symbol in enumerate(symbols.tolist()):
        runs, starts = slice(length - 1 - t, None), slice(0, t + 1)
        posterior = before[symbol, t] + 0.5 - before[symbol, starts]
        posterior *= scale[runs]
        posterior *= weights[starts]
        probability = posterior.sum()
        posterior /= probability
        weights[t + 1] = posterior @ ending[runs]
        np.multiply(posterior, lasting[runs], out=weights[starts])
        nats[t] = -math.log(probability)
    return nats


def tree_nats(symbols: np.ndarray, alphabet: int) -> np.ndarray:
    """Nats of each of symbols [T] by partition tree weighting, Bayes-optimal for "ptw" switches.

    A block of 2**d positions, of which the first n are seen, has the probability
    1/2 KT + 1/2 (left half) (right half); one of one position has KT, that of a single law. All
    prefixes at once, level by level. O(T log T).
    Returns float64[T].
    """
    length = len(symbols)
    time = np.arange(length)
    seen = np.zeros((alphabet, length + 1))
    seen[symbols, time + 1] = 1
    seen = np.cumsum(seen, axis=1)
    block = np.zeros(length)  # log probability of the part that is seen of the block around t
    for level in range((length - 1).bit_length() + 1):
        start = time >> level << level
        counts = seen[symbols, time] - seen[symbols, start]
        steps = np.log((counts + 0.5) / (time - start + alphabet / 2))
        total = np.concatenate([[0], np.cumsum(steps)])
        single = total[1:] - total[start]
        if not level:
            block = single
            continue
        middle = start + (1 << level - 1)
        left = np.where(time >= middle, block[np.minimum(middle, length) - 1], 0)
        block = np.logaddexp(single, left + block) - math.log(2)
    return -np.diff(block, prepend=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piecewise(Source):
    """Symbols of a law that changes at unseen points [arXiv:2302.03067].

    Args:
      length: tokens in a row, T: BOS and T - 1 symbols, the T-th among the targets only.
      switching: after which symbols the law changes:
        "ptw"        of the 2**D >= T positions, with probability 1/2 after the middle one, and then
                     likewise within both halves, and so on;
        "lin"        after the r-th symbol of a segment with probability 1 / 2r;
        "geometric"  with probability 1 / period;
        "regular"    after every `period` symbols;
        "static"     never.
      period: of "geometric" and "regular"; 1 or more. No effect otherwise.
      alphabet: number of symbols; 2 or more.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams; "test" has the oracle as well.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, BOS (the number `alphabet`), then symbols.
      targets: int32, the next symbol.
      mask: bool, all True.
      oracle: float32, in the split "test" only: nats of the target by the Bayes-optimal predictor,
        which knows the kind of switching, and sees what a model sees.
      switch: bool, whether the target is the first symbol of a new segment (but the row's first).
    and of the whole row
      switches: int32[], how many there are.
    """

    name: ClassVar[str] = "piecewise"

    length: int = 256
    switching: str = "ptw"
    period: int = 32
    alphabet: int = 2
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if self.switching not in SWITCHING:
            self._refuse(
                f"switching={self.switching!r} does not exist; allowed: {', '.join(SWITCHING)}"
            )
        self._check_least(length=1, period=1, alphabet=2)

    @property
    def vocab(self) -> int:
        """Number of tokens: the symbols and BOS."""
        return self.alphabet + 1

    @property
    def queries(self) -> int:
        """Scored positions of every row: all."""
        return self.length

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all symbols."""
        return 1 / self.alphabet

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        segment, laws = self.segments(index)
        symbols = draws.categorical(self._bits(index, _SYMBOLS), laws[segment]).astype(np.int32)
        example = {
            "inputs": np.append(np.int32(self.alphabet), symbols[:-1]),
            "targets": symbols,
            "mask": np.ones(self.length, bool),
            "switch": np.diff(segment, prepend=0) > 0,
            "switches": np.array(len(laws) - 1, np.int32),
        }
        if self.split == "test":
            example["oracle"] = self.oracle(symbols).astype(np.float32)
        return example

    def show(self, example: Example) -> list[str]:
        """The symbols, a bar in front of each new segment."""
        words = [
            f"| {symbol}" if new else str(symbol)
            for symbol, new in zip(example["targets"], example["switch"], strict=True)
        ]
        lines = [f"switches  {example['switches']}"]
        if "oracle" in example:
            lines.append(f"oracle    {example['oracle'].mean():.3f} nats a symbol")
        return [*lines, "", *(" ".join(words[i : i + 32]) for i in range(0, len(words), 32))]

    def segments(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The segment of each symbol, int64[length], and its law, float64[segments, alphabet]."""
        ends = self._ends(self._bits(index, _SWITCHES))
        segment = np.append(0, np.cumsum(ends[:-1]))
        size = int(segment[-1]) + 1, self.alphabet
        return segment, draws.half_dirichlet(self._bits(index, _LAWS), size)

    def oracle(self, symbols: np.ndarray) -> np.ndarray:
        """Nats of each of symbols [T] by the Bayes-optimal predictor, float64[T]."""
        if self.switching == "ptw":
            return tree_nats(symbols, self.alphabet)
        ending = hazards(self.switching, self.period, len(symbols))
        return run_length_nats(symbols, self.alphabet, ending)

    def _ends(self, bits: np.random.Philox) -> np.ndarray:
        """After which symbols a segment ends, bool[length]; the last one has no effect."""
        if self.switching == "ptw":
            return self._tree_ends(bits)
        ends, run = np.zeros(self.length, bool), 0
        ending = hazards(self.switching, self.period, self.length)
        for t, u in enumerate(draws.uniforms(bits, self.length).tolist()):
            ends[t] = u < ending[run]
            run = 0 if ends[t] else run + 1
        return ends

    def _tree_ends(self, bits: np.random.Philox) -> np.ndarray:
        """`_ends` of "ptw": each block takes one word, level by level from the largest one."""
        depth = (self.length - 1).bit_length()
        ends, split = np.zeros(1 << depth, bool), np.ones(1, bool)
        for level in range(depth, 0, -1):
            split = split & (draws.uniforms(bits, len(split)) < 0.5)
            ends[(1 << level - 1) - 1 :: 1 << level] = split
            split = np.repeat(split, 2)
        return ends[: self.length]
