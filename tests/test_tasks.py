"""The synthetic tasks: fixed examples, layout, and laws with known values."""

import hashlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from memjax import tasks
from memjax.tasks import __main__ as command
from memjax.tasks import draws

GOLDEN = {
    ("mqar", "train"): "327ff8b138a81326",
    ("mqar", "test"): "7525255f912d668a",
    ("forgetting_mqar", "train"): "74a9c25523282401",
    ("forgetting_mqar", "test"): "aded397eec6c39c5",
    ("passkey", "train"): "82c0c61fe4ab0f44",
    ("passkey", "test"): "0ce75bbdde4e29f6",
}
SMALL = {"mqar": {"vocab": 1024}, "forgetting_mqar": {"vocab": 1024}, "passkey": {"distractors": 2}}
BASED_CELLS = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# --- the same examples everywhere ---------------------------------------------------------------


def test_golden_covers_every_task():
    assert sorted({name for name, _ in GOLDEN}) == tasks.names()


@pytest.mark.parametrize("name, split", GOLDEN)
def test_golden_examples(name, split):
    """A changed hash means that every published number was trained on other data."""
    source = tasks.make(name, split=split, **SMALL[name])
    digest = hashlib.blake2b(digest_size=8)
    for index in (0, 1, 2**20):
        for key, array in sorted(source[index].items()):
            digest.update(key.encode() + array.tobytes())
    assert digest.hexdigest() == GOLDEN[name, split]


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


@pytest.mark.parametrize("name", tasks.names())
def test_any_order_and_pickled(name):
    source = tasks.make(name, seed=3, **SMALL[name])
    forward = [source[i] for i in range(50)]
    for i in np.random.default_rng(0).permutation(50):
        assert same(source[i], forward[i])
    again = pickle.loads(pickle.dumps(source))
    assert again == source and same(again[49], forward[49])


def test_another_process_sees_the_same():
    """As a data worker would: the pickled sources, in a process that hashes strings otherwise."""
    sources = [tasks.make(name, seed=3, **SMALL[name]) for name in tasks.names()]
    code = (
        "import pickle, sys; sources = pickle.load(sys.stdin.buffer); "
        "pickle.dump([source[7] for source in sources], sys.stdout.buffer)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    made = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(sources),
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": paths},
        check=True,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    for example, source in zip(pickle.loads(made.stdout), sources, strict=True):
        assert same(example, source[7])


@pytest.mark.parametrize("name", tasks.names())
def test_seed_split_and_index_each_give_other_rows(name):
    sources = [
        tasks.make(name, seed=seed, split=split) for seed in (0, 1) for split in ("train", "test")
    ]
    rows = {source[i]["inputs"].tobytes() for source in sources for i in range(250)}
    assert len(rows) == 1000


@pytest.mark.parametrize("name", tasks.names())
def test_random_access_interface(name):
    source = tasks.make(name)
    assert len(source) == 2**31
    assert same(source[np.int64(2**31 - 1)], source[2**31 - 1])
    for index in (-1, 2**31):
        with pytest.raises(IndexError, match="allowed: 0 to"):
            source[index]
    example = source[0]
    example["inputs"][:] = -1
    assert (source[0]["inputs"] >= 0).all()


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
        for key, array in example.items():
            kind = np.int32 if key in ("inputs", "targets", "distance") else np.bool_
            assert array.dtype == kind and array.shape == (length,)
        inputs, targets, mask = example["inputs"], example["targets"], example["mask"]
        assert (inputs >= 0).all() and (inputs < source.vocab).all()
        assert not targets[~mask].any() and not example["distance"][~mask].any()
        keys, values = inputs[: source.context].reshape(-1, 2).T
        assert (keys >= 1).all() and (keys < middle).all() and (values >= middle).all()
        assert len(set(keys[:pairs])) == len(set(values[:pairs])) == pairs
        assert set(keys) == set(keys[:pairs])
        queries = np.flatnonzero(mask)
        assert len(queries) == source.queries == pairs
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


# --- laws ---------------------------------------------------------------------------------------


def test_window_law_of_the_based_mixture():
    """A window of w tokens answers a query when the value is inside it: P(distance < w).

    The expected column was computed apart from this code, by a sampler of the published recipe;
    seven of its eight values are also the points of the published figure for sliding-window
    attention within reading error (Based, arXiv:2402.18668, mean over the seven test cells).
    """
    widths = 2 ** np.arange(3, 11)
    shares = []
    for length, pairs in BASED_CELLS:
        source = tasks.make("mqar", length=length, pairs=pairs, split="test")
        distance = np.concatenate(
            [
                example["distance"][example["mask"]]
                for example in map(source.__getitem__, range(1000))
            ]
        )
        assert len(distance) == 1000 * pairs
        shares.append((distance[:, None] < widths).mean(0))
    expected = np.array([0.059, 0.145, 0.313, 0.514, 0.655, 0.797, 0.936, 1.000])
    tolerance = np.where(widths <= 32, 0.004, 0.002)
    assert (np.abs(np.mean(shares, 0) - expected) <= tolerance).all(), np.mean(shares, 0)
    # By cell: the widest window that sees some of it, in the order of BASED_CELLS.
    some = [shares[0][2], shares[1][2], shares[2][2], *(shares[i][i] for i in range(3, 7))]
    np.testing.assert_allclose(some, [0.807, 0.758, 0.593, 0.572, 0.560, 0.554, 0.552], atol=0.02)


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_first_key_is_placed_by_the_power_law(power):
    source = tasks.make("mqar", length=24, pairs=4, power=power)
    slots = np.arange(1, 9)
    law = slots ** (power - 1) / (slots ** (power - 1)).sum()
    counts = np.zeros(8)
    for index in range(4000):
        row = source[index]
        counts[(np.flatnonzero((row["inputs"] == row["inputs"][0]) & row["mask"])[0] - 8) // 2] += 1
    chi_square = ((counts - 4000 * law) ** 2 / (4000 * law)).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001; the seed is fixed


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
    assert ((others - 4000 / 42) ** 2 / (4000 / 42)).sum() < 74.7  # 41 degrees, p = 0.001


# --- draws --------------------------------------------------------------------------------------


def test_subset_is_uniform_ordered_and_may_be_everything():
    counts = {}
    for index in range(4000):
        pair = tuple(draws.subset(draws.bits(0, "test", index, 0), 4, 2))
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 12 and all(a != b for a, b in counts)
    assert sum((n - 4000 / 12) ** 2 / (4000 / 12) for n in counts.values()) < 31.3  # p = 0.001
    assert sorted(draws.subset(draws.bits(0, "test", 0, 1), 300, 300)) == list(range(300))
    assert draws.subset(draws.bits(0, "test", 0, 2), 5, 0).shape == (0,)


def test_weighted_subset_has_the_law_of_successive_draws():
    weights = np.array([3.0, 2.0, 1.0])
    counts = np.zeros((3, 3))
    for index in range(6000):
        a, b = draws.weighted_subset(draws.bits(0, "test", index, 0), np.log(weights), 2)
        counts[a, b] += 1
    law = weights[:, None] / 6 * weights / (6 - weights[:, None])
    law[np.eye(3, dtype=bool)] = 0
    off = law > 0
    assert counts[~off].sum() == 0
    chi_square = ((counts - 6000 * law)[off] ** 2 / (6000 * law[off])).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_draws_refuse_more_items_than_there_are():
    source = draws.bits(0, "test", 0, 0)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.subset(source, 4, 5)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.weighted_subset(source, np.zeros(4), 5)


# --- messages -----------------------------------------------------------------------------------


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
        (
            "passkey",
            dict(length=177),
            "haystack takes 178 bytes, .* use length=178 or more",
        ),
        ("passkey", dict(template="long"), "template='long' .* short, ruler"),
        ("passkey", dict(distractors=-1), "distractors=-1 .* 0 or more"),
        ("passkey", dict(every_byte=1), "every_byte=1 has the type int"),
        ("passkey", dict(split="valid"), "split='valid' .* train, test"),
        ("passkey", dict(vocab=259), "unknown setting 'vocab'"),
        ("forgeting_mqar", {}, "unknown task .* Did you mean 'forgetting_mqar'"),
    ],
)
def test_impossible_settings(name, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        tasks.make(name, **settings)
    assert "\n" not in str(caught.value)


def test_largest_settings_that_fit():
    assert tasks.make("mqar", length=64, pairs=16).queries == 16
    assert tasks.make("forgetting_mqar", length=60, pairs=10, updates=10).context == 40


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memjax.tasks", *arguments])
    command.main()


def test_show_prints_the_example(monkeypatch, capsys):
    run_command(monkeypatch, "--show=forgetting_mqar", "--index=3", "pairs=2", "updates=1")
    text = capsys.readouterr().out
    example = tasks.make("forgetting_mqar", pairs=2, updates=1)[3]
    assert text.startswith("forgetting_mqar, example 3 of 2**31: length=64, pairs=2")
    assert text.count("bound twice") == 1
    for position in np.flatnonzero(example["mask"]):
        numbers = [position, *(example[k][position] for k in ("inputs", "targets", "distance"))]
        assert any(line.split()[1:5] == [str(n) for n in numbers] for line in text.splitlines())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--show=mqa"], "Did you mean 'mqar'"),
        (["--show=mqar", "pairs"], "expected SETTING=VALUE"),
        (["--show=mqar", "pairs=x"], "pairs='x' has the type str"),
        (["--show=mqar", "--index=-1"], "example -1 is out of range"),
    ],
)
def test_show_refuses_with_one_message(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run_command(monkeypatch, *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
