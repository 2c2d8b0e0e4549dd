"""Global bigrams against bigrams of the row: what is known from training, and what from context.

    a b T x c a T x b T x ..     T is a trigger: in this row, and only there, x follows it always

Most tokens follow the token before them by one law for all rows, which a model learns by heart.
After a trigger comes an output that is drawn anew for each row: at its first occurrence it can only
be guessed, later it has to be recalled (what an induction head does). "Birth of a Transformer: A
Memory Viewpoint" (Bietti et al. 2023, arXiv:2306.00802), which finds that the global law is learnt
first. There the law is that of the characters of a text; here it is random, exp(2 z) with standard
normal z normalised by rows, so that nothing has to be downloaded.
"""

import bisect
import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

# One number per named draw; a new draw takes a new number, so that examples never change.
_CHAIN, _TRIGGERS, _OUTPUTS = range(3)
CHOICES = ("fixed", "random")
SCORED = ("all", "in_context")


class Law(NamedTuple):
    """The law of all rows; arrays are read-only.

    rows: float64[V, V], the probabilities of the next token at [token, next].
    stationary: float64[V], how frequent tokens are in the long run.
    bounds: the running sums of the rows and, last, of `stationary`, with 1 at their ends.
    """

    rows: np.ndarray
    stationary: np.ndarray
    bounds: list[list[float]]


@functools.lru_cache(maxsize=16)
def law(vocab: int, seed: int) -> Law:
    """The law of `vocab` tokens with the number `seed`."""
    rows = np.exp(2 * draws.normals(draws.bits(seed, "bigrams/law", 0, 0), (vocab, vocab)))
    rows /= rows.sum(axis=1, keepdims=True)
    # p rows = p and sum p = 1; one of the V equations of the former follows from the others.
    equations = np.vstack([(rows.T - np.eye(vocab))[1:], np.ones(vocab)])
    stationary = np.linalg.solve(equations, np.eye(vocab)[-1])
    sums = np.cumsum(np.vstack([rows, stationary]), axis=1)
    sums[:, -1] = 1
    for array in (rows, stationary):
        array.flags.writeable = False
    return Law(rows, stationary, sums.tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bigrams(Source):
    """A Markov chain in which the triggers of a row have one successor each [arXiv:2306.00802].

    Args:
      length: tokens in a row, T, of which the first is drawn from the stationary law.
      vocab: number of tokens, 2 to 4096 (the law is a matrix).
      triggers: how many tokens are triggers, 0 to vocab.
      choice: "fixed" (the most frequent tokens) or "random" (drawn for each row one after another,
        by frequency).
      no_repeat: whether no trigger is its own output. Without it a trigger is with probability
        1 / vocab, and the row never leaves it.
      own_rows: whether outputs are drawn from the trigger's row of the law, or uniformly.
      scored: "all" positions or "in_context", the second and later occurrences of triggers; a short
        row may have none.
      law_seed: of the law of all rows, in both splits and with any `seed`; 0 to 2**64 - 1.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at a scored position the next token, else 0.
      mask: bool, whether the position is scored.
      distance: int32, at a scored second or later occurrence of a trigger how many tokens ago its
        output was last shown, else 0.
      global, first, second, later: bool, one of which is True at each scored position: whether the
        token is no trigger, or a trigger's first, second or later occurrence in the row.
      oracle: float32, at a scored position nats of the target by a predictor that knows the law and
        the triggers: the best there is with fixed triggers, a lower bound with random ones.
    """

    name: ClassVar[str] = "bigrams"

    length: int = 256
    vocab: int = 64
    triggers: int = 5
    choice: str = "fixed"
    no_repeat: bool = True
    own_rows: bool = False
    scored: str = "all"
    law_seed: int = 0
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("choice", CHOICES), ("scored", SCORED)):
            if getattr(self, name) not in allowed:
                self._refuse(
                    f"{name}={getattr(self, name)!r} does not exist; allowed: {', '.join(allowed)}"
                )
        self._check_seed("law_seed")
        self._check_least(length=1)
        for name, least, most in (("vocab", 2, 4096), ("triggers", 0, self.vocab)):
            if not least <= getattr(self, name) <= most:
                self._refuse(
                    f"{name}={getattr(self, name)} is out of range; allowed: {least} to {most}"
                )
        if self.scored == "in_context" and not self.triggers:
            self._refuse("scored='in_context' scores triggers, and triggers=0; use 1 or more")

    @property
    def queries(self) -> int:
        """The most positions that a row can have scored."""
        return self.length

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all tokens."""
        return 1 / self.vocab

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        law_of_all = law(self.vocab, self.law_seed)
        triggers, outputs, chances = self.outputs(index)
        tokens, count, distance = self._chain(index, law_of_all.bounds, triggers, outputs)
        inputs, targets = tokens[:-1], tokens[1:]
        probability = law_of_all.rows[inputs, targets]
        guessed = np.ones(self.vocab)
        guessed[triggers] = chances
        probability = np.where(count == 0, probability, np.where(count == 1, guessed[inputs], 1))
        mask = np.ones(self.length, bool) if self.scored == "all" else count >= 2
        return {
            "inputs": inputs,
            "targets": np.where(mask, targets, 0),
            "mask": mask,
            "distance": distance,
            "global": mask & (count == 0),
            "first": mask & (count == 1),
            "second": count == 2,
            "later": count > 2,
            "oracle": np.where(mask, -np.log(probability), 0).astype(np.float32),
        }

    def outputs(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The triggers of a row, their outputs and the probabilities of these, [triggers] each."""
        rows, stationary, _ = law(self.vocab, self.law_seed)
        if self.choice == "random":
            bits = self._bits(index, _TRIGGERS)
            triggers = draws.weighted_subset(bits, np.log(stationary), self.triggers)
        else:
            triggers = np.argsort(-stationary, kind="stable")[: self.triggers]
        laws = rows[triggers] if self.own_rows else np.ones((self.triggers, self.vocab))
        every = np.arange(self.triggers)
        if self.no_repeat:
            laws[every, triggers] = 0
        laws /= laws.sum(axis=1, keepdims=True)
        outputs = draws.categorical(self._bits(index, _OUTPUTS), laws)
        return triggers, outputs, laws[every, outputs]

    def _chain(self, index: int, bounds, triggers, outputs):
        """Tokens int32[length + 1]; for all but the last, int32[length], which occurrence of a
        trigger it is (0 for none), and the distance."""
        successor = dict(zip(triggers.tolist(), outputs.tolist(), strict=True))
        occurrences, last = dict.fromkeys(successor, 0), dict.fromkeys(successor, 0)
        tokens, (count, distance) = [], np.zeros((2, self.length), np.int32)
        row, given = bounds[-1], None
        for t, u in enumerate(draws.uniforms(self._bits(index, _CHAIN), self.length + 1).tolist()):
            token = bisect.bisect_right(row, u) if given is None else given
            tokens.append(token)
            row, given = bounds[token], successor.get(token)
            if given is not None and t < self.length:
                occurrences[token] += 1
                count[t] = occurrences[token]
                distance[t] = t - last[token] - 1 if count[t] > 1 else 0
                last[token] = t
        return np.array(tokens, np.int32), count, distance

    def show(self, example: Example) -> list[str]:
        """The triggers with their outputs, then the row with its scored triggers in brackets."""
        inputs, targets = example["inputs"], example["targets"]
        trigger = example["mask"] & ~example["global"]
        lines = ["trigger   output   scored occurrences"]
        for token in np.unique(inputs[trigger]):
            at = np.flatnonzero(trigger & (inputs == token))
            lines.append(f"{token:7d}   {targets[at[0]]:6d}   {len(at):18d}")
        repeats = np.sum(inputs[1:] == inputs[:-1]) / self.length
        oracle = example["oracle"].sum() / max(1, example["mask"].sum())
        lines += ["", f"tokens that repeat the one before  {repeats:.3f}"]
        lines += [f"oracle, nats a scored position     {oracle:.3f}"]
        lines += ["", "row (scored triggers in brackets)"]
        words = [f"[{t}]" if m else f"{t} " for t, m in zip(inputs, trigger, strict=True)]
        return lines + [
            "".join(f"{w:>6}" for w in words[i : i + 16]) for i in range(0, len(words), 16)
        ]
