"""MQAR and its kin: layout of a row, laws with known values, messages."""

import hashlib

import numpy as np
import pytest
from task_checks import chi_square, refuses

from memjax import tasks
from memjax.tasks import __main__ as command


def test_reference_by_the_recipe_in_plain_python():
    source = tasks.make("mqar", length=32, pairs=4, vocab=64, seed=7, split="test")
    for index in range(20):
        hashed = hashlib.blake2b(b"mqar/test", digest_size=8).digest()
        key = np.array([7, int.from_bytes(hashed, "little")], np.uint64)

        def words(field, count, key=key, index=index):
            counter = np.array([0, 0, index, field], np.uint64)
            return [
                int(w) >> 11 for w in np.random.Philox(key=key, counter=counter).random_raw(count)
            ]

        keys = list(dict.fromkeys(1 + w * 31 // 2**53 for w in words(0, 99)))[:4]
        values = list(dict.fromkeys(32 + w * 32 // 2**53 for w in words(1, 99)))[:4]
        u = (np.array(words(2, 12)) + 0.5) / 2**53
        scores = np.log(0.01 * np.arange(1.0, 13) ** -0.99) - np.log(-np.log(u))
        row = [token for pair in zip(keys, values, strict=True) for token in pair]
        row += [w * 64 // 2**53 for w in words(3, 24)]
        targets = [0] * 32
        for slot, key_token, value in zip(np.argsort(-scores), keys, values, strict=False):
            row[8 + 2 * slot], targets[8 + 2 * slot] = key_token, value
        assert source[index]["inputs"].tolist() == row
        assert source[index]["targets"].tolist() == targets


# --- layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings",
    [
        ("mqar", dict(vocab=1024)),
        ("mqar", dict(length=64, pairs=16, vocab=65)),
        ("mqar", dict(length=64, pairs=8, passes=2, noise=False)),
        ("mqar", dict(length=4, pairs=1, vocab=5, power=1)),
        ("forgetting_mqar", dict(vocab=1024)),
        ("forgetting_mqar", dict(vocab=1024, updates=8)),
        ("forgetting_mqar", dict(updates=0, noise=False)),
    ],
)
def test_layout(name, settings):
    source = tasks.make(name, **settings)
    length, pairs, middle = source.length, source.pairs, source.vocab // 2
    at_random_even_slots = set()
    for index in range(1000):
        example = source[index]
        inputs, targets, mask = example["inputs"], example["targets"], example["mask"]
        assert (inputs >= 0).all() and (inputs < source.vocab).all()
        assert not targets[~mask].any() and not example["distance"][~mask].any()
        keys, values = inputs[: source.context].reshape(-1, 2).T
        assert (keys >= 1).all() and (keys < middle).all() and (values >= middle).all()
        assert len(set(keys[:pairs])) == len(set(values[:pairs])) == pairs
        assert set(keys) == set(keys[:pairs])
        queries = np.flatnonzero(mask)
        assert len(queries) == source.queries == pairs == example["pairs"]
        assert (queries >= source.context).all() and not (queries % 2).any()
        assert sorted(inputs[queries]) == sorted(keys[:pairs])
        last = dict(zip(keys, values, strict=True))
        assert targets[queries].tolist() == [last[key] for key in inputs[queries]]
        shown = queries - example["distance"][queries]
        assert (inputs[shown] == targets[queries]).all()
        assert (inputs[shown - 1] == inputs[queries]).all()
        position = {key: 2 * i + 1 for i, key in enumerate(keys)}
        assert shown.tolist() == [position[key] for key in inputs[queries]]
        if not source.noise:
            filler = ~mask
            filler[: source.context] = False
            assert not inputs[filler].any()
        at_random_even_slots.update(queries)
    assert at_random_even_slots == set(range(source.context, length - 1, 2))


def test_passes_repeat_the_context():
    source = tasks.make("mqar", length=64, pairs=4, passes=3)
    assert source.context == 24
    blocks = source[5]["inputs"][:24].reshape(3, 8)
    assert (blocks == blocks[0]).all()


@pytest.mark.parametrize("settings", [{}, dict(length=25 * 6, pairs=25, vocab=151)])
def test_compositional_layout(settings):
    source = tasks.make("compositional_mqar", **settings)
    side, third = round(source.pairs**0.5), source.vocab // 3
    orders = set()
    for index in range(1000):
        example = source[index]
        inputs, queries = example["inputs"], np.flatnonzero(example["mask"])
        first, second, values = inputs[: source.context].reshape(-1, 3).T
        assert 1 <= first.min() and first.max() < third <= second.min()
        assert second.max() < 2 * third <= values.min() and values.max() < source.vocab
        assert len(set(first)) == len(set(second)) == side
        assert len(set(zip(first, second, strict=True))) == len(set(values)) == source.pairs
        assert len(queries) == source.queries == source.pairs
        assert not ((queries - source.context - 1) % 3).any()
        at = np.array([np.flatnonzero(values == v)[0] for v in example["targets"][queries]])
        assert (inputs[queries - 1] == first[at]).all() and (inputs[queries] == second[at]).all()
        assert (queries - example["distance"][queries] == 3 * at + 2).all()
        orders.add(tuple(np.argsort(first * source.vocab + second)))
    assert len(orders) > 900


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_first_key_is_placed_by_the_power_law(power):
    source = tasks.make("mqar", length=24, pairs=4, power=power)
    slots = np.arange(1, 9)
    law = slots ** (power - 1) / (slots ** (power - 1)).sum()
    counts = np.zeros(8)
    for index in range(4000):
        row = source[index]
        counts[(np.flatnonzero((row["inputs"] == row["inputs"][0]) & row["mask"])[0] - 8) // 2] += 1
    assert chi_square(counts, law) < 24.3  # 7 degrees of freedom, p = 0.001; the seed is fixed


def test_noise_is_any_token():
    """A context key comes back by chance (T - 3N) N / V times in a row: 1/2 at (256, 64)."""
    source = tasks.make("mqar", length=256, pairs=64)
    repeats, noise = [], []
    for index in range(1000):
        example = source[index]
        tokens = example["inputs"][128:][~example["mask"][128:]]
        repeats.append(np.isin(tokens, example["inputs"][:128:2]).sum())
        noise.append(tokens)
    noise = np.concatenate(noise)
    assert abs(np.mean(repeats) - 0.5) < 4 * np.sqrt(0.5 / 1000)
    assert abs(noise.mean() - 8191 / 2) < 4 * 8192 / np.sqrt(12 * noise.size)
    assert noise.min() == 0 and noise.max() == 8191


@pytest.mark.parametrize("updates", [0, 2, 4, 7, 8])
def test_forgetting_law(updates):
    """The answer is the key's first value in 1 - updates / pairs of the queries."""
    source = tasks.make("forgetting_mqar", vocab=1024, updates=updates)
    first, answered, order = [], 0, set()
    for index in range(1000):
        example = source[index]
        inputs, mask, rebound = example["inputs"], example["mask"], example["rebound"]
        keys, old = inputs[:16].reshape(8, 2).T
        again, new = inputs[16 : source.context].reshape(-1, 2).T
        original = dict(zip(keys, old, strict=True))
        kept = np.array([original[key] for key in inputs[mask]]) == example["targets"][mask]
        first.append(kept.mean())
        answered += kept[rebound[mask]].sum()
        assert not rebound[~mask].any()
        assert sorted(inputs[rebound]) == sorted(again)
        assert len(set(again)) == updates
        order.add(tuple(np.searchsorted(np.sort(keys), again)))
        if updates == 8:
            assert len(set(new)) == 8
    if updates < 8:
        assert answered == 0
        assert np.mean(first) == 1 - updates / 8
    else:  # by chance a key gets its old value back, once in 512
        assert abs(answered - 8000 / 512) < 4 * np.sqrt(8000 / 512)
    assert updates == 0 or len(order) > 50


@pytest.mark.parametrize("part", [0, 1])
def test_one_key_of_two_is_right_once_in_g(part):
    """Who sees one key only chooses among the g values bound with it; any choice gets 1/g."""
    source = tasks.make("compositional_mqar", length=96, pairs=16)
    for index in range(200):
        example = source[index]
        bindings = example["inputs"][: source.context].reshape(-1, 3)
        choice = {binding[part]: binding[2] for binding in bindings}
        queries = np.flatnonzero(example["mask"])
        chosen = [choice[key] for key in example["inputs"][queries - 1 + part]]
        assert (chosen == example["targets"][queries]).mean() == 1 / 4


def test_frequent_keys_by_zipf():
    """One key a row has the law itself; several are drawn without replacement.

    With exponent 1 the weights of 31 keys add up to 4.027; the heaviest three have 1.833 of it and
    the fourth passes the half.
    """
    source = tasks.make("mqar", length=4, pairs=1, vocab=64, zipf=1.0)
    weights = 1 / np.arange(1, 32)
    counts, frequent = np.zeros(31), 0
    for index in range(4000):
        example = source[index]
        counts[example["inputs"][0] - 1] += 1
        marked = example["frequent"][example["mask"]]
        assert (marked == (example["inputs"][0] <= 4)).all()
        frequent += marked.sum()
    assert chi_square(counts, weights / weights.sum()) < 59.7  # 30 degrees of freedom, p = 0.001
    assert frequent == counts[:4].sum()
    assert "frequent" not in tasks.make("mqar")[0]
    skewed = tasks.make("mqar", zipf=1.5)
    rows = [skewed[index] for index in range(1000)]
    keys = np.array([row["inputs"][:16:2] for row in rows])
    assert all(len(set(row)) == 8 for row in keys)
    assert (keys == 1).any(1).mean() > 0.9 > (keys == 9).any(1).mean() > (keys == 99).any(1).mean()
    assert {int(row["frequent"].sum()) for row in rows} <= {0, 1, 2}  # keys 1 and 2 weigh half


def test_new_values_cover_all_but_the_old_one():
    source = tasks.make("forgetting_mqar", length=8, pairs=1, updates=0, vocab=9)
    assert source[0]["rebound"].sum() == 0
    source = tasks.make("forgetting_mqar", length=12, pairs=2, updates=1, vocab=13)
    counts = np.zeros((7, 7))
    for index in range(4000):
        example = source[index]
        keys, values = example["inputs"][:6].reshape(3, 2).T
        counts[values[list(keys[:2]).index(keys[2])] - 6, values[2] - 6] += 1
    assert not np.diag(counts).any()
    others = counts[~np.eye(7, dtype=bool)]
    assert chi_square(others) < 74.7  # 41 degrees, p = 0.001


# --- messages and text -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("mqar", dict(length=63), "length=63 is odd.* 64"),
        ("mqar", dict(pairs=17), "pairs=17 with passes=1 takes 34 .* use length=68"),
        ("mqar", dict(passes=4), "pairs=8 with passes=4 takes 64 .* use length=80"),
        ("mqar", dict(pairs=0), "pairs=0 .* 1 or more"),
        ("mqar", dict(passes=0), "passes=0 .* 1 or more"),
        ("mqar", dict(vocab=64), "vocab=64 .* above the length, 64"),
        ("mqar", dict(power=0.0), "power=0.0 .* above 0"),
        ("mqar", dict(power=float("nan")), "power=nan .* above 0"),
        ("mqar", dict(seed=-1), r"seed=-1 .* 0 to 2\*\*64 - 1"),
        ("mqar", dict(split="valid"), "split='valid' .* train, test"),
        ("mqar", dict(length=64.0), "length=64.0 has the type float; use one of type int"),
        ("mqar", dict(noise=1), "noise=1 has the type int; use one of type bool"),
        ("mqar", dict(pairs=True), "pairs=True has the type bool"),
        ("mqar", dict(pair=4), "unknown setting 'pair'; allowed: .* Did you mean 'pairs'"),
        (
            "mqar",
            dict(updates=4),
            "unknown setting 'updates'; allowed: length, noise, pairs, passes",
        ),
        ("forgetting_mqar", dict(updates=9), "updates=9 .* 0 to pairs, 8"),
        ("forgetting_mqar", dict(updates=-1), "updates=-1 .* 0 to pairs, 8"),
        ("forgetting_mqar", dict(pairs=15), "pairs=15 with updates=4 takes 38 .* use length=68"),
        ("mqar", dict(zipf=-1.0), "zipf=-1.0 .* 0 or more"),
        ("compositional_mqar", dict(pairs=8), "pairs=8 is no square; use one such as 9"),
        ("compositional_mqar", dict(pairs=16), "pairs=16 takes 48 .* use length=96"),
        ("forgeting_mqar", {}, "unknown task .* Did you mean 'forgetting_mqar'"),
    ],
)
def test_impossible_settings(name, settings, message):
    refuses(name, settings, message)


def test_largest_settings_that_fit():
    assert tasks.make("mqar", length=64, pairs=16).queries == 16
    assert tasks.make("forgetting_mqar", length=60, pairs=10, updates=10).context == 40


def test_show_prints_bindings_and_queries():
    source = tasks.make("forgetting_mqar", pairs=2, updates=1)
    text, example = command.show(source, 3), source[3]
    assert text.startswith("forgetting_mqar, example 3 of 2**31: length=64, pairs=2")
    assert text.count("rebound") == 1
    for position in np.flatnonzero(example["mask"]):
        numbers = [position, *(example[k][position] for k in ("inputs", "targets", "distance"))]
        assert any(line.split()[1:5] == [str(n) for n in numbers] for line in text.splitlines())
    for position in range(0, source.context, 2):
        pair = [str(n) for n in (position, *example["inputs"][position : position + 2])]
        assert any(line.split()[1:] == pair for line in text.splitlines())
