"""Associative treecall: which word is the parent of this one, in a sentence of a random grammar?

    BOS  a b A  c B ... S  EOS  q        the answer is the parent of q

A sentence comes from a context-free grammar in which expanding a nonterminal under a parent emits
its rule's symbols from left to right and then its head, a word that is their parent and stands to
the right of them. So a model has to find the query in the sentence and then the word that governs
it, some words later. The task ATR of "Mechanistic evaluation of Transformers and state space
models" (arXiv:2505.15105). A grammar is drawn once, from its own seed.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import Example, Source

BOS, EOS, WORD = 1, 2, 3  # WORD is the first terminal; three types of query follow the terminals
MOST = 1024  # terminals of a sentence
TRIES = 10_000
# One number per named draw; a new draw takes a new number, so that examples never change.
_SENTENCE, _QUERY = range(2)
_DEPTHS, _COUNTS, _LENGTHS, _SYMBOLS, _RULES, _HEADS, _PROHIBITED = range(7)
_STREAM = "treecall/grammar"


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Nonterminals are -1, -2, ..; terminals 0, 1, ... Probabilities are cumulative.

    depths: of each nonterminal. rules: of each, the symbols of its rules. rule_probability,
    head_probability: of each, those of its rules and of every terminal as its head.
    """

    depths: np.ndarray
    rules: list[list[list[int]]]
    rule_probability: list[list[float]]
    head_probability: list[list[float]]


@functools.lru_cache(maxsize=4)
def grammar(
    seed: int, nonterminals: int, terminals: int, depth: int, rules: int, symbols: int, weight: int
) -> Grammar:
    """The grammar of a seed.

    A nonterminal has a depth, uniform in 1..depth, and between 1 and `rules` rules of 1 to
    `symbols` symbols. A symbol is one of the deeper nonterminals, of weight 1 each, or any
    terminal, all together of weight `weight`. Rules and heads have probabilities of the law
    Dirichlet(1, .., 1).
    """

    def bits(field):
        return draws.bits(seed, _STREAM, 0, field)

    depths = 1 + draws.uniform_ints(bits(_DEPTHS), depth, nonterminals)
    counts = 1 + draws.uniform_ints(bits(_COUNTS), rules, nonterminals)
    lengths = 1 + draws.uniform_ints(bits(_LENGTHS), symbols, (nonterminals, rules))
    drawn = draws.uniforms(bits(_SYMBOLS), (nonterminals, rules, symbols))
    shares = draws.exponentials(bits(_RULES), (nonterminals, rules))
    heads = draws.exponentials(bits(_HEADS), (nonterminals, terminals))
    made = []
    for a in range(nonterminals):
        deeper = np.flatnonzero(depths > depths[a])
        place = drawn[a] * (len(deeper) + weight)
        word = ((place - len(deeper)) * terminals / weight).astype(np.int64)
        names = np.append(-1 - deeper, 0)[np.minimum(place.astype(np.int64), len(deeper))]
        chosen = np.where(place < len(deeper), names, word)
        made.append([chosen[r, : lengths[a, r]].tolist() for r in range(counts[a])])
    rule_probability = [_cumulative(shares[a, : counts[a]]) for a in range(nonterminals)]
    return Grammar(depths, made, rule_probability, [_cumulative(row) for row in heads])


def _cumulative(weights: np.ndarray) -> list[float]:
    """Sums of the first weights over that of all; the last is left out, it is 1."""
    return (np.cumsum(weights)[:-1] / weights.sum()).tolist()


@functools.lru_cache(maxsize=2**14)
def prohibited(seed: int, terminals: int, share: float, target: int) -> np.ndarray:
    """Which queries the test keeps for this target, each with chance `share`. bool[terminals]."""
    row = draws.uniforms(draws.bits(seed, _STREAM, target, _PROHIBITED), terminals) < share
    row.flags.writeable = False
    return row


def expand(made: Grammar, start: int, u: Iterator[float], most: int) -> tuple[list, list] | None:
    """A sentence: its terminals, and the position of each one's parent, -1 for the root's.

    start: a nonterminal. u: uniform numbers. most: terminals that it may have, None where it would
    have more.
    """
    words: list[int] = []
    parents: list[int] = []
    places: list[int] = []  # of the heads, by node
    waiting = [(start, -1, -1)]  # symbol, node of its parent, node whose head it is
    while waiting:
        symbol, parent, node = waiting.pop()
        if symbol >= 0:
            if node >= 0:
                places[node] = len(words)
            words.append(symbol)
            parents.append(parent)
            if len(words) > most:
                return None
            continue
        a, node = -1 - symbol, len(places)
        places.append(0)
        head = bisect.bisect_right(made.head_probability[a], next(u))
        rule = made.rules[a][bisect.bisect_right(made.rule_probability[a], next(u))]
        waiting.append((head, parent, node))
        waiting += [(symbol, node, -1) for symbol in reversed(rule)]
    return words, [places[node] if node >= 0 else -1 for node in parents]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treecall(Source):
    """The parent of a word of a sentence.

    The word that is asked for is the last of its kind in the sentence and has a parent. The parent
    is chosen first, uniformly among the positions that have such a child, then one of its children.
    The defaults are the published task "easy"; max_rhs_len = 10 and length = 1027 the medium one;
    terminals = 8192 and factor = 20 the one of many words.

    Args:
      length: tokens in a row, T; zeros fill up the rest. Sentences of fewer than 3 words or more
        than length - 3 or 1024 words, or without a word that could be asked for, are drawn again.
      terminals: words of the language.
      nonterminals, max_depth, max_rules: of the grammar.
      max_rhs_len: R; a rule has 1 to R - 1 symbols.
      factor: weight of all terminals together in a rule, where a nonterminal weighs 1; 0 for their
        number.
      held_out: share of the ordered pairs of words (parent, query) that the split "train" never
        asks for; above 0, "test" asks for these alone.
      grammar_seed: 0 to 2**64 - 1, of the grammar and of the held-out pairs.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `source[i]`, i below 2**31, holds arrays [length]:
      inputs: int32, the tokens.
      targets: int32, at the query the token that the output must predict, else 0.
      mask: bool, true at the query alone.
      distance: int32, at the query how many tokens ago the parent stood, else 0.
    and of the whole row
      words: int32[], of the sentence.
      span: int32[], how many words behind the word that is asked for its parent stands.
    """

    name: ClassVar[str] = "treecall"

    length: int = 128
    terminals: int = 20
    nonterminals: int = 40
    max_depth: int = 10
    max_rules: int = 5
    max_rhs_len: int = 5
    factor: int = 0
    held_out: float = 0.0
    grammar_seed: int = 0
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        self._check_least(length=6, terminals=2, nonterminals=1, max_depth=1, max_rules=1)
        self._check_least(max_rhs_len=2, factor=0)
        if not 0 <= self.held_out < 1:
            self._refuse(f"held_out={self.held_out} is out of range; allowed: 0 to below 1")
        self._check_seed("grammar_seed")
        self.document(0)

    @property
    def vocab(self) -> int:
        """Number of tokens: padding, BOS, EOS, terminals, and three types of query, unused."""
        return WORD + self.terminals + 3

    @property
    def queries(self) -> int:
        """Scored positions of every row."""
        return 1

    @property
    def chance(self) -> float:
        """The accuracy of a guess among all words."""
        return 1 / self.terminals

    @property
    def grammar(self) -> Grammar:
        """That of `grammar_seed`."""
        return grammar(
            int(self.grammar_seed),
            int(self.nonterminals),
            int(self.terminals),
            int(self.max_depth),
            int(self.max_rules),
            int(self.max_rhs_len) - 1,
            int(self.factor or self.terminals),
        )

    def document(self, index: int) -> tuple[list[int], list[int], int, int]:
        """Words, their parents (see `expand`), and the positions of the query and its parent."""
        made, source = self.grammar, self._bits(index, _SENTENCE)
        u = itertools.chain.from_iterable(iter(lambda: draws.uniforms(source, 64).tolist(), None))
        for _ in range(TRIES):
            start = -1 - int(self.nonterminals * next(u))
            sentence = expand(made, start, u, min(MOST, self.length - 3))
            if sentence is None or len(sentence[0]) < 3:
                continue
            words, parents = sentence
            children = self.askable(words, parents)
            if children:
                first, second = draws.uniforms(self._bits(index, _QUERY), 2)
                target = sorted(children)[int(first * len(children))]
                among = children[target]
                return words, parents, among[int(second * len(among))], target
        self._refuse(
            f"the grammar of grammar_seed={self.grammar_seed} made no sentence of 3 to "
            f"{min(MOST, self.length - 3)} words to ask for in {TRIES} tries; use another "
            "grammar_seed, or a larger length"
        )

    def askable(self, words: list[int], parents: list[int]) -> dict[int, list[int]]:
        """The positions that may be asked for, by the position of their parent."""
        last = {word: at for at, word in enumerate(words)}
        children: dict[int, list[int]] = {}
        for word, at in sorted(last.items(), key=lambda item: item[1]):
            target = parents[at]
            if target >= 0 and self._may_ask(words[target], word):
                children.setdefault(target, []).append(at)
        return children

    def _may_ask(self, target: int, query: int) -> bool:
        if not self.held_out:
            return True
        pairs = prohibited(
            int(self.grammar_seed), int(self.terminals), float(self.held_out), target
        )
        return bool(pairs[query]) == (self.split == "test")

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        words, _, query, target = self.document(index)
        inputs = np.zeros(self.length, np.int32)
        at = len(words) + 2
        inputs[: at + 1] = [BOS, *(WORD + word for word in words), EOS, WORD + words[query]]
        return {
            "inputs": inputs,
            **self._scored(at, WORD + words[target], at - 1 - target),
            "words": np.array(len(words), np.int32),
            "span": np.array(target - query, np.int32),
        }

    def statistics(self, examples: int = 500) -> dict[str, float]:
        """Mean number of words and mean span of the first examples; the grammar decides on them."""
        documents = [self.document(index) for index in range(examples)]
        return {
            "words": float(np.mean([len(words) for words, *_ in documents])),
            "span": float(np.mean([target - query for *_, query, target in documents])),
        }

    def show(self, example: Example) -> list[str]:
        """What the grammar's sentences are like, the query, and the row."""
        means = self.statistics()
        about = f"grammar   {means['words']:.1f} words a sentence, {means['span']:.1f} words from "
        return [about + "a query to its parent (means of 500)", *super().show(example)]
