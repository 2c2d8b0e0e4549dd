"""MAD's six tasks: layout, targets of both splits, and laws with known values."""

import numpy as np
import pytest
from task_checks import chi_square, refuses

from memjax import tasks

RECALL = ["in_context_recall", "noisy_recall", "fuzzy_recall"]


def uniform(drawn, number):
    """The chi-square of integers below `number` against the uniform law."""
    return chi_square(np.bincount(drawn, minlength=number))


# --- recall -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("in_context_recall", {}),
        ("in_context_recall", dict(length=4, vocab=2)),
        ("in_context_recall", dict(vocab=17)),
        ("noisy_recall", {}),
        ("noisy_recall", dict(noise=0.9, noise_tokens=3, vocab=10, length=20)),
        ("noisy_recall", dict(noise=0.0)),
    ],
)
def test_recall_of_pairs(name, settings, split):
    """A key's value never changes, and is asked for wherever the key was seen before."""
    source = tasks.make(name, **settings, split=split)
    length, keys, values = source.length, source.keys, source.values
    noise_tokens = getattr(source, "noise_tokens", 0)
    assert keys + values + noise_tokens == source.vocab and keys in (values, values - 1)
    for index in range(1000):
        example = source[index]
        inputs, distance = example["inputs"].tolist(), example["distance"]
        bound, known = {}, {}
        for at in range(0, length, 2):
            key, value = inputs[at : at + 2]
            if key >= keys + values:
                assert value >= keys + values and name == "noisy_recall" and at < length - 2
                continue
            assert key < keys <= value < keys + values
            if key in bound:
                assert inputs[bound[key]] == value
                known[at] = at - bound[key]
            bound[key] = at + 1
        assert length - 2 in known
        assert {at: distance[at] for at in np.flatnonzero(distance)} == known
        scored = list(range(length - 1)) if split == "train" else sorted(known)
        assert np.flatnonzero(example["mask"]).tolist() == scored
        assert len(scored) <= source.queries
        assert all(example["targets"][at] == inputs[at + 1] for at in scored)


@pytest.mark.parametrize("name", RECALL)
def test_both_splits_score_what_the_publication_scores(name):
    train, test = (tasks.make(name, split=split) for split in ("train", "test"))
    random = np.concatenate([train[i]["targets"] for i in range(200)])
    assert set(random) == set(range(train.vocab - (name == "fuzzy_recall")))  # all tokens
    answers = [test[i]["targets"][test[i]["mask"]] for i in range(200)]
    assert set(np.concatenate(answers)) == set(range(test.keys, test.keys + test.values))


def test_expected_number_of_scored_positions():
    """n - K (1 - (1 - 1/K)**n) + 1 for n pairs, K keys: 56.0 with the defaults. What is taken away
    is the number of different keys, whose variance is at most K / 4."""
    for settings in ({}, {"vocab": 128}, {"length": 64, "vocab": 33}):
        source = tasks.make("in_context_recall", split="test", **settings)
        n, keys = source.length // 2 - 1, source.keys
        law = n - keys * (1 - (1 - 1 / keys) ** n) + 1
        assert settings or abs(law - 56.0) < 0.01
        found = np.mean([source[i]["mask"].sum() for i in range(1000)])
        assert abs(found - law) < 4 * np.sqrt(keys / 4 / 1000)


def test_keys_values_and_the_last_key_are_uniform():
    source = tasks.make("in_context_recall", length=12)
    first, last = [], []
    for index in range(3000):
        inputs = source[index]["inputs"]
        first.append(inputs[:2])
        seen = np.unique(inputs[:-2:2])
        if len(seen) == 4:
            last.append(np.flatnonzero(seen == inputs[-2])[0])
    keys, values = np.transpose(first)
    assert uniform(keys, 8) < 24.3 and uniform(values - 8, 8) < 24.3  # p = 0.001, 7 degrees
    assert len(last) > 1000 and uniform(np.array(last), 4) < 16.3  # 3 degrees


@pytest.mark.parametrize("noise", [0.2, 0.8])
def test_share_of_noise(noise):
    """One of the n pairs in front of the last is none: noise (n - 1) / n of them are."""
    source = tasks.make("noisy_recall", noise=noise, length=32)
    noisy = np.array([source[i]["inputs"][:-2:2] >= 16 for i in range(2000)])
    assert noisy.shape == (2000, 15) and (noisy.sum(axis=1) < 15).all()
    law = noise * 14 / 15
    assert abs(noisy.mean() - law) < 4 * np.sqrt(law * (1 - law) / noisy.size)
    tokens = np.concatenate([source[i]["inputs"] for i in range(300)])
    assert uniform(tokens[tokens >= 16] - 16, 16) < 37.7  # p = 0.001, 15 degrees


def document(source, example):
    """The tokens of a row of fuzzy recall, with the last one and without filler."""
    whole = [*example["inputs"].tolist(), int(example["targets"][-1])]
    return [token for token in whole if token < source.vocab - 1]


def motifs(source, row):
    """Of tokens without filler: (start of the value, key, value) of each pair."""
    pairs, at = [], 0
    while at < len(row):
        middle = at
        while row[middle] < source.keys:
            middle += 1
        end = middle
        while end < len(row) and row[end] >= source.keys:
            end += 1
        pairs.append((middle, tuple(row[at:middle]), tuple(row[middle:end])))
        at = end
    return pairs


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("settings", [{}, dict(length=13, vocab=7), dict(length=40, vocab=32)])
def test_fuzzy_recall(settings, split):
    source = tasks.make("fuzzy_recall", **settings, split=split)
    filler = source.vocab - 1
    assert source.keys + source.values == filler
    places, fill = set(), set()
    for index in range(1000):
        example = source[index]
        row = document(source, example)
        front = source.length + 1 - len(row)
        whole = [filler] * front + row
        assert whole[:-1] == example["inputs"].tolist()
        fill.add(front)
        pairs = motifs(source, row)
        bound, shown, known = {}, {}, {}
        for start, key, value in pairs:
            assert len(set(key)) == len(key) <= 3 and len(set(value)) == len(value) <= 3
            assert split == "train" or len(key) == 3
            assert bound.setdefault(key, value) == value
            if key in shown:
                for j in range(len(value)):
                    known[front + start + j - 1] = start - shown[key] - 1
            shown[key] = start
        probe = pairs[-1][1]
        earlier = [start for start, key, _ in pairs[:-1] if key == probe]
        assert earlier  # the question can be answered
        places.add(earlier[0])
        distance = example["distance"]
        assert {at: distance[at] for at in np.flatnonzero(distance)} == known
        scored = range(front - 1, source.length) if split == "train" else sorted(known)
        assert np.flatnonzero(example["mask"]).tolist() == list(scored)
        assert len(scored) <= source.queries
        assert all(example["targets"][at] == whole[at + 1] for at in scored)
    assert min(fill) >= 2  # as many tokens as published, and none more
    assert len(places) > 0.4 * (source.length - 12) or source.length == 13


def test_fuzzy_sizes_and_tuples_are_uniform():
    source = tasks.make("fuzzy_recall", vocab=9)
    sizes, pairs = [], []
    for index in range(1500):
        (_, key, value), *_ = motifs(source, document(source, source[index]))
        sizes.append((len(key) - 1) * 3 + len(value) - 1)
        if len(key) == 2:
            pairs.append(key)
    assert uniform(np.array(sizes), 9) < 26.1  # p = 0.001, 8 degrees
    a, b = np.transpose(pairs)
    assert (a != b).all() and uniform(a * 3 + b - (b > a), 12) < 31.3  # 11 degrees


# --- copies and the map -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, dict(length=9, copies=4), dict(length=3, copies=1, vocab=3), dict(copies=96)]
)
def test_selective_copy(settings):
    source = tasks.make("selective_copy", **settings)
    copies, blank = source.copies, source.vocab - 2
    begin = source.length - copies
    for index in range(1000):
        example = source[index]
        inputs = example["inputs"]
        assert inputs[begin - 1] == blank + 1 and (inputs[begin:] == blank).all()
        at = np.flatnonzero(inputs < blank)
        assert len(at) == copies and at[-1] == begin - 2  # no blank behind the last one
        assert (inputs[: begin - 1] <= blank).all()
        assert np.flatnonzero(example["mask"]).tolist() == list(range(begin, source.length))
        assert (example["targets"][begin:] == inputs[at]).all()
        assert (example["distance"][begin:] == np.arange(begin, source.length) - at).all()


def test_blanks_law():
    """Blanks in front of a token: binomial, mean (T - 2n - 1) / n; tokens uniform."""
    source = tasks.make("selective_copy", length=64, copies=8)
    at, tokens = [], []
    for index in range(2000):
        inputs = source[index]["inputs"]
        at.append(np.flatnonzero(inputs < 14))
        tokens.append(inputs[at[-1]])
    blanks = np.diff(at, axis=1, prepend=-1) - 1
    total = 64 - 2 * 8 - 1
    assert (blanks.sum(axis=1) == total).all()
    mean, variance = total / 8, total / 8 * 7 / 8
    assert (np.abs(blanks.mean(axis=0) - mean) < 4 * np.sqrt(variance / 2000)).all()
    # The variance of a sample variance is about 2 variance**2 / N for so many blanks.
    assert (np.abs(blanks.var(axis=0) / variance - 1) < 4 * np.sqrt(2 / 2000)).all()
    assert uniform(np.ravel(tokens), 14) < 34.5  # p = 0.001, 13 degrees


@pytest.mark.parametrize("settings", [{}, dict(length=4, vocab=3)])
def test_compression(settings):
    source = tasks.make("compression", **settings)
    count = source.length // 2 - 1
    for index in range(1000):
        example = source[index]
        inputs, blank = example["inputs"], source.vocab - 2
        assert (inputs[:count] < blank).all() and inputs[count] == blank + 1
        assert (inputs[count + 1 :] == blank).all()
        at = np.arange(count + 1, 2 * count + 1)
        assert np.flatnonzero(example["mask"]).tolist() == at.tolist()
        assert (example["targets"][at] == inputs[:count]).all()
        assert (example["distance"][at] == count + 1).all()
    if not settings:  # as published: 31 tokens out of 15
        assert count == 31 and blank == 15
        tokens = np.concatenate([source[i]["inputs"][:31] for i in range(300)])
        assert uniform(tokens, 15) < 36.1  # p = 0.001, 14 degrees


@pytest.mark.parametrize("vocab, keys, values", [(256, 127, 128), (257, 128, 128), (3, 1, 1)])
def test_memorization(vocab, keys, values):
    """One map for all seeds and both splits; another one with another `map_seed`."""
    bound, others = {}, {}
    for seed, split in ((0, "train"), (1, "train"), (0, "test")):
        source = tasks.make("memorization", vocab=vocab, seed=seed, split=split)
        assert source.chance == 1 / keys
        for index in range(300):
            example = source[index]
            inputs, targets = example["inputs"], example["targets"]
            assert (inputs[1::2] == vocab - 1).all() and example["mask"].tolist() == [0, 1] * 16
            for key, value in zip(inputs[::2].tolist(), targets[1::2].tolist(), strict=True):
                assert bound.setdefault(key, value) == value
    assert set(bound) == set(range(keys)) and len(set(bound.values())) == keys
    assert set(bound.values()) <= set(range(keys, keys + values))
    if keys > 1:
        other = tasks.make("memorization", vocab=vocab, map_seed=7)
        for index in range(300):
            example = other[index]
            others.update(zip(example["inputs"][::2], example["targets"][1::2], strict=True))
        assert others != bound
        # About one key in `values` keeps its value.
        assert sum(bound[key] == value for key, value in others.items()) < 8


# --- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("in_context_recall", dict(length=127), "length=127 is odd; use length=128"),
        ("in_context_recall", dict(length=2), "length=2 .* 4 or more"),
        ("in_context_recall", dict(vocab=1), "vocab=1 .* 2 or more"),
        ("in_context_recall", dict(vocab=2**31 + 1), r"vocab=2147483649 .* up to 2\*\*31"),
        ("noisy_recall", dict(vocab=17), "vocab=17 .* 18 or more"),
        ("noisy_recall", dict(noise=1.0), "noise=1.0 .* 0 to below 1"),
        ("noisy_recall", dict(noise=float("nan")), "noise=nan .* 0 to below 1"),
        ("noisy_recall", dict(noise_tokens=0), "noise_tokens=0 .* 1 or more"),
        ("fuzzy_recall", dict(length=12), "length=12 .* 13 or more"),
        ("fuzzy_recall", dict(vocab=6), "vocab=6 .* 7 or more"),
        ("selective_copy", dict(copies=128), r"copies=128 .* 1 to \(length - 1\) // 2, 127"),
        ("selective_copy", dict(copies=0), "copies=0 .* 1 to"),
        ("selective_copy", dict(vocab=2), "vocab=2 .* 3 or more"),
        ("compression", dict(length=65), "length=65 is odd; use length=66"),
        ("memorization", dict(vocab=2), "vocab=2 .* 3 or more"),
        ("memorization", dict(length=33), "length=33 is odd; use length=34"),
        ("memorization", dict(map_seed=-1), r"map_seed=-1 .* 0 to 2\*\*64 - 1"),
    ],
)
def test_impossible_settings(name, settings, message):
    refuses(name, settings, message)


def test_show_marks_what_is_known():
    recall = tasks.make("noisy_recall", split="test")
    example = recall[0]
    text = recall.show(example)
    assert sum("known" in line for line in text) == example["mask"].sum()
    assert sum("noise" in line for line in text) == (example["inputs"][::2] >= 16).sum() > 0
    fuzzy = tasks.make("fuzzy_recall", split="test")
    example = fuzzy[0]
    assert "\n".join(fuzzy.show(example)).count("[") == example["mask"].sum()
    memory = tasks.make("memorization")
    example = memory[0]
    answer = f"{example['inputs'][0]:5d}   {example['targets'][1]:5d}"
    assert memory.show(example)[1].endswith(answer)
