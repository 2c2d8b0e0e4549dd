"""Associative treecall: the grammar's laws, the tree behind a row, held-out pairs, messages."""

import itertools

import numpy as np
import pytest
from task_checks import chi_square, close_to, refuses

from memjax import tasks
from memjax.tasks import __main__ as command
from memjax.tasks import draws, treecall

SETTINGS = [
    {},
    dict(max_rhs_len=10, length=1027, grammar_seed=1),
    dict(terminals=8192, factor=20, grammar_seed=2),
]


def parse(made, words, parents):
    """Whether some derivation of the grammar has these words and parents.

    Every position whose head it is has children; with its own place they spell a rule of some
    nonterminal. Returns for each position the nonterminals that it may be the head of.
    """
    children = {at: [] for at in range(len(words))}
    for at, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(at)
    able = []
    for at in range(len(words)):
        spelt = set()
        for number, rules in enumerate(made.rules):
            for rule in rules:
                if len(rule) == len(children[at]) and all(
                    symbol in able[child]
                    if symbol < 0
                    else not children[child] and words[child] == symbol
                    for symbol, child in zip(rule, children[at], strict=True)
                ):
                    spelt.add(-1 - number)
        able.append(spelt if children[at] else set())
    return able


@pytest.mark.parametrize("settings", SETTINGS)
def test_layout_and_tree(settings):
    source = tasks.make("treecall", **settings)
    for index in range(300):
        example = source[index]
        words, parents, query, target = source.document(index)
        inputs, at = example["inputs"], len(words) + 2
        assert inputs[: at + 1].tolist() == [1, *(w + 3 for w in words), 2, words[query] + 3]
        assert not inputs[at + 1 :].any() and 3 <= len(words) <= min(1024, source.length - 3)
        assert np.flatnonzero(example["mask"]).tolist() == [at]
        assert example["targets"][at] == words[target] + 3
        assert inputs[at - example["distance"][at]] == example["targets"][at]
        assert example["words"] == len(words) and example["span"] == target - query > 0
        assert parents[query] == target and words[query] not in words[query + 1 :]
        assert parents.count(-1) == 1 and parents[-1] == -1  # the root's head ends the sentence
        assert all(parent > child for child, parent in enumerate(parents[:-1]))
        if index < 30:
            assert parse(source.grammar, words, parents)[-1]


@pytest.mark.parametrize("settings", SETTINGS)
def test_rules_go_deeper(settings):
    source = tasks.make("treecall", **settings)
    made = source.grammar
    assert len(made.rules) == 40 and 1 <= made.depths.min() and made.depths.max() <= 10
    for a, rules in enumerate(made.rules):
        assert 1 <= len(rules) <= 5 and len(made.rule_probability[a]) == len(rules) - 1
        assert len(made.head_probability[a]) == source.terminals - 1
        for rule in rules:
            assert 1 <= len(rule) < source.max_rhs_len
            assert all(s < source.terminals for s in rule)
            assert all(made.depths[-1 - s] > made.depths[a] for s in rule if s < 0)


def test_laws_of_grammars():
    """Depths, numbers of rules and lengths are uniform; a symbol by its weight; Dirichlet(1)."""
    depths, counts, lengths = np.zeros(10), np.zeros(5), np.zeros(4)
    words, expected, variance, squares = 0, 0.0, 0.0, []
    for seed in range(100):
        weight = (5, 20, 80)[seed % 3]
        made = treecall.grammar(seed, 40, 20, 10, 5, 4, weight)
        depths += np.bincount(made.depths - 1, minlength=10)
        for a, rules in enumerate(made.rules):
            counts[len(rules) - 1] += 1
            lengths += np.bincount([len(rule) - 1 for rule in rules], minlength=4)
            share = weight / (weight + (made.depths > made.depths[a]).sum())
            symbols = list(itertools.chain(*rules))
            words += sum(symbol >= 0 for symbol in symbols)
            expected += share * len(symbols)
            variance += share * (1 - share) * len(symbols)
            heads = np.diff([0, *made.head_probability[a], 1])
            squares.append((heads**2).sum())
    for found, bound in ((depths, 27.9), (counts, 18.5), (lengths, 16.3)):  # p = 0.001
        assert chi_square(found) < bound
    assert abs(words - expected) < 4.5 * np.sqrt(variance)
    # of Dirichlet(1, .., 1) over n: the sum of squares has mean 2 / (n + 1)
    error = np.std(squares) / np.sqrt(len(squares))
    assert abs(np.mean(squares) - 2 / 21) < 4.5 * error


def test_factor_is_the_number_of_terminals_by_default():
    assert tasks.make("treecall", factor=20).grammar is tasks.make("treecall").grammar
    assert tasks.make("treecall", factor=5).grammar.rules != tasks.make("treecall").grammar.rules


def test_heads_follow_their_distribution():
    """The root's head, in sentences without rejection."""
    made = tasks.make("treecall").grammar
    u = iter(draws.uniforms(draws.bits(0, "test", 0, 0), 2**18).tolist())
    counts = np.zeros(20)
    for _ in range(3000):
        counts[treecall.expand(made, -1, u, 1024)[0][-1]] += 1
    law = np.diff([0, *made.head_probability[0], 1])
    rare = 3000 * law < 5  # taken together, for the approximation to hold
    found, law = (np.append(array[~rare], array[rare].sum()) for array in (counts, law))
    assert chi_square(found[law > 0], law[law > 0]) < 43.8  # at most 19 degrees, p = 0.001


def test_the_parent_is_chosen_first():
    """Of parents with one child to ask for and with two: 1/2 for the one, 1/4 for each of two."""
    source, counts = tasks.make("treecall"), {}
    for index in range(6000):
        words, parents, query, target = source.document(index)
        may = source.askable(words, parents)
        if sorted(map(len, may.values())) == [1, 2]:
            counts.setdefault(len(may[target]), [0, 0])[may[target].index(query)] += 1
    (single, _), (first, second) = counts[1], counts[2]
    total = single + first + second
    assert total > 200
    assert chi_square(np.array([single, first, second]), [1 / 2, 1 / 4, 1 / 4]) < 13.9  # p = 0.001


def test_held_out_pairs_are_asked_in_the_test_only():
    asked = {}
    for split in ("train", "test"):
        source = tasks.make("treecall", held_out=0.2, split=split)
        pairs = [
            (words[target], words[query])
            for words, _, query, target in map(source.document, range(1500))
        ]
        kept = [treecall.prohibited(0, 20, 0.2, target)[query] for target, query in pairs]
        assert all(kept) if split == "test" else not any(kept)
        asked[split] = set(pairs)
    assert not asked["train"] & asked["test"] and min(map(len, asked.values())) > 20
    table = np.stack([treecall.prohibited(0, 20, 0.2, target) for target in range(20)])
    assert close_to(table.sum(), 400, 0.2)
    free = tasks.make("treecall")
    both = {bool(table[w[t], w[q]]) for w, _, q, t in map(free.document, range(200))}
    assert both == {False, True}


def test_statistics_are_means_of_the_facts():
    source = tasks.make("treecall", grammar_seed=4)
    means = source.statistics(50)
    for fact, mean in means.items():
        assert mean == np.mean([source[index][fact] for index in range(50)])
    text = command.show(source, 0)
    full = source.statistics()
    assert f"{full['words']:.1f} words a sentence, {full['span']:.1f} words from a query" in text


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(length=5), "length=5 .* 6 or more"),
        (dict(terminals=1), "terminals=1 .* 2 or more"),
        (dict(max_rhs_len=1), "max_rhs_len=1 .* 2 or more"),
        (dict(factor=-1), "factor=-1 .* 0 or more"),
        (dict(held_out=1.0), "held_out=1.0 .* 0 to below 1"),
        (dict(grammar_seed=-1), r"grammar_seed=-1 .* 0 to 2\*\*64 - 1"),
        (
            dict(nonterminals=1, max_rhs_len=2),
            "grammar_seed=0 made no sentence of 3 to 125 words .* use another grammar_seed",
        ),
    ],
)
def test_impossible_settings(settings, message):
    refuses("treecall", settings, message)
