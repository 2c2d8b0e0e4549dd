"""Global and in-context bigrams: the law of all rows, triggers, groups and the oracle."""

import math

import numpy as np
import pytest
from task_checks import chi_square, close_to, refuses

from memjax import tasks
from memjax.tasks import bigrams

GROUPS = ("global", "first", "second", "later")


def test_law_is_a_chain_with_its_stationary_law():
    rows, stationary, bounds = bigrams.law(64, 0)
    assert (rows > 0).all() and (stationary > 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(stationary @ rows, stationary, rtol=1e-10)
    np.testing.assert_allclose(stationary.sum(), 1, rtol=1e-12)
    assert len(bounds) == 65 and all(row[-1] == 1 for row in bounds)
    # exp(2 z): logarithms have the standard deviation 2, but for the row's sum.
    spread = np.log(rows).std(axis=1)
    assert abs(spread.mean() - 2) < 4 * 2 / np.sqrt(2 * 64 * 64)
    assert (bigrams.law(64, 1).rows != rows).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 64},
        {"length": 64, "choice": "random", "own_rows": True, "split": "test"},
        {"length": 64, "no_repeat": False, "vocab": 8, "triggers": 8},
        {"length": 64, "scored": "in_context", "triggers": 20},
        {"triggers": 0, "length": 1},
    ],
)
def test_layout(settings):
    """After a trigger always its output; groups, distances and the oracle by counting."""
    source = tasks.make("bigrams", **settings)
    rows = bigrams.law(source.vocab, 0).rows
    for index in range(1000):
        example = source[index]
        triggers, outputs, chances = source.outputs(index)
        assert len(set(triggers)) == source.triggers
        output = dict(zip(triggers.tolist(), outputs.tolist(), strict=True))
        chance = dict(zip(triggers.tolist(), chances, strict=True))
        inputs = example["inputs"].tolist()
        count, last = dict.fromkeys(output, 0), {}
        for at, token in enumerate(inputs):
            following = inputs[at + 1] if at + 1 < len(inputs) else None
            distance, target = 0, following
            if token in output:
                count[token] += 1
                group, target = min(count[token], 3), output[token]
                assert following in (None, target)
                nats = -np.log(chance[token]) if group == 1 else 0
                distance = at - last[token] - 1 if group > 1 else 0
                last[token] = at
            else:
                group = 0
                target = int(example["targets"][at]) if following is None else following
                nats = -np.log(rows[token, target])
            scored = source.scored == "all" or group > 1
            assert example["mask"][at] == scored
            assert [example[name][at] for name in GROUPS] == [
                scored and group == i for i in range(4)
            ]
            assert example["targets"][at] == (target if scored else 0)
            assert example["distance"][at] == distance
            assert math.isclose(example["oracle"][at], nats if scored else 0, rel_tol=1e-6)


def test_fixed_triggers_are_the_most_frequent_tokens():
    source = tasks.make("bigrams")
    stationary = bigrams.law(64, 0).stationary
    frequent = set(np.sort(stationary)[-5:])
    for index in range(20):
        triggers, outputs, chances = source.outputs(index)
        assert set(stationary[triggers]) == frequent
        assert (outputs != triggers).all() and np.allclose(chances, 1 / 63)


def test_random_triggers_are_drawn_by_frequency():
    """The first of them has the stationary law."""
    source = tasks.make("bigrams", vocab=8, triggers=2, choice="random")
    first = np.bincount([source.outputs(i)[0][0] for i in range(4000)], minlength=8)
    assert chi_square(first, bigrams.law(8, 0).stationary) < 24.3  # p = 0.001, 7 degrees


@pytest.mark.parametrize("no_repeat", [False, True])
@pytest.mark.parametrize("own_rows", [False, True])
def test_law_of_outputs(no_repeat, own_rows):
    source = tasks.make("bigrams", vocab=8, triggers=1, no_repeat=no_repeat, own_rows=own_rows)
    drawn = [source.outputs(i) for i in range(4000)]
    trigger = drawn[0][0][0]
    law = bigrams.law(8, 0).rows[trigger].copy() if own_rows else np.full(8, 1 / 8)
    if no_repeat:
        law[trigger] = 0
        law /= law.sum()
    counts = np.bincount([outputs[0] for _, outputs, _ in drawn], minlength=8)
    assert not counts[law == 0].any()
    assert chi_square(counts[law > 0], law[law > 0]) < 24.3  # p = 0.001, 7 degrees
    assert all(np.isclose(chances[0], law[outputs[0]]) for _, outputs, chances in drawn)


def test_share_of_rows_with_a_self_loop():
    """A trigger is its own output in 1 - (1 - 1/V)**K of the rows: 7.5 % at V = 65, K = 5."""
    source = tasks.make("bigrams", vocab=65, no_repeat=False)
    loops = [(np.equal(*source.outputs(i)[:2])).any() for i in range(4000)]
    law = 1 - (64 / 65) ** 5
    assert abs(law - 0.0746) < 1e-4
    assert close_to(np.sum(loops), 4000, law)


def test_rows_follow_the_law_and_the_oracle_its_entropy():
    source = tasks.make("bigrams", vocab=16, triggers=3)
    rows, stationary, _ = bigrams.law(16, 0)
    pairs, first, nats = np.zeros((16, 16)), np.zeros(16), []
    entropy = -(rows * np.log(rows)).sum(axis=1)
    for index in range(400):
        example = source[index]
        by_law = example["global"]
        inputs, targets = example["inputs"], example["targets"]
        first[inputs[0]] += 1
        np.add.at(pairs, (inputs[by_law], targets[by_law]), 1)
        nats.append(example["oracle"][by_law] - entropy[inputs[by_law]])
        np.testing.assert_allclose(example["oracle"][example["first"]], np.log(15), rtol=1e-6)
        assert not example["oracle"][example["second"] | example["later"]].any()
    nats = np.concatenate(nats)
    # Given the tokens before, each term has mean 0: a sum of them has the sum of their variances.
    assert abs(nats.mean()) < 4 * nats.std() / np.sqrt(len(nats))
    assert chi_square(first, stationary) < 37.7  # p = 0.001, 15 degrees
    for token in np.flatnonzero(pairs.any(axis=1)):
        assert chi_square(pairs[token], rows[token]) < 45.2  # p = 0.001 / 13, 15 degrees
    assert pairs.any(axis=1).sum() == 13  # all but the triggers


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(choice="any"), "choice='any' does not exist; allowed: fixed, random"),
        (dict(scored="none"), "scored='none' does not exist; allowed: all, in_context"),
        (dict(triggers=65), "triggers=65 .* 0 to 64"),
        (dict(vocab=1, triggers=0), "vocab=1 .* 2 to 4096"),
        (dict(length=0), "length=0 .* 1 or more"),
        (dict(law_seed=-1), "law_seed=-1 .* 0 to"),
        (dict(scored="in_context", triggers=0), "scored='in_context' .* triggers=0; use 1"),
        (dict(no_repeat=1), "no_repeat=1 has the type int"),
    ],
)
def test_impossible_settings(settings, message):
    refuses("bigrams", settings, message)


def test_a_row_without_scored_positions():
    source = tasks.make("bigrams", scored="in_context", length=1)
    assert not source[0]["mask"].any() and len(source.show(source[0])) == 7


def test_show_lists_the_triggers():
    source = tasks.make("bigrams")
    example = source[0]
    lines = source.show(example)
    marked = example["mask"] & ~example["global"]
    shown = {tuple(map(int, line.split())) for line in lines[1 : lines.index("")]}
    assert sum(count for _, _, count in shown) == marked.sum()
    triggers, outputs, _ = source.outputs(0)
    pairs = set(zip(triggers.tolist(), outputs.tolist(), strict=True))
    assert {(trigger, output) for trigger, output, _ in shown} <= pairs
    assert "\n".join(lines).count("[") == marked.sum()
