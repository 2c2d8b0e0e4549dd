"""What every synthetic task keeps: fixed examples, random access, format, text; and draws."""

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
    ("parity", "train"): "a1de08d4796fca93",
    ("parity", "test"): "5843d9503fa9deda",
    ("modular_arithmetic", "train"): "81657c1a236a23d7",
    ("modular_arithmetic", "test"): "3a5e302d4b115407",
    ("bracket_arithmetic", "train"): "0d5ca230df77db58",
    ("bracket_arithmetic", "test"): "1a5cc3553df91c9d",
    ("group_words", "train"): "d195d0305878ea7e",
    ("group_words", "test"): "b47e3b479066c159",
    ("in_context_recall", "train"): "4dced65ab7b46941",
    ("in_context_recall", "test"): "7b540db343a6fe95",
    ("noisy_recall", "train"): "83264d24c2ab3c8e",
    ("noisy_recall", "test"): "5b22caabe4f083df",
    ("fuzzy_recall", "train"): "a4eebd9e8bd30ed2",
    ("fuzzy_recall", "test"): "5bf28502b57cdd95",
    ("selective_copy", "train"): "83c755fe64b877e5",
    ("selective_copy", "test"): "a5cccd2bfc8b79eb",
    ("compression", "train"): "0cb9ca5fa1416199",
    ("compression", "test"): "ffe7fe762bf68533",
    ("memorization", "train"): "d08e405bcb97531f",
    ("memorization", "test"): "3e0dba12e2cd77a5",
    ("piecewise", "train"): "62db4ac5f45e931c",
    ("piecewise", "test"): "8fa6841645d324ec",
    ("bigrams", "train"): "0e3a92acb6652926",
    ("bigrams", "test"): "00b4d17c123747d2",
}
# Settings for these tests where the defaults will not do; a changed one changes GOLDEN.
SMALL = {"mqar": {"vocab": 1024}, "forgetting_mqar": {"vocab": 1024}, "passkey": {"distractors": 2}}
OF_TOKENS = ("inputs", "targets", "distance")


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# --- the same examples everywhere ---------------------------------------------------------------


def test_golden_covers_every_task():
    assert sorted({name for name, _ in GOLDEN}) == tasks.names()


@pytest.mark.parametrize("name, split", GOLDEN)
def test_golden_examples(name, split):
    """A changed hash means that every published number was trained on other data."""
    source = tasks.make(name, split=split, **SMALL.get(name, {}))
    digest = hashlib.blake2b(digest_size=8)
    for index in (0, 1, 2**20):
        for key, array in sorted(source[index].items()):
            digest.update(key.encode() + array.tobytes())
    assert digest.hexdigest() == GOLDEN[name, split]


@pytest.mark.parametrize("name", tasks.names())
def test_any_order_and_pickled(name):
    source = tasks.make(name, seed=3, **SMALL.get(name, {}))
    forward = [source[i] for i in range(50)]
    for i in np.random.default_rng(0).permutation(50):
        assert same(source[i], forward[i])
    again = pickle.loads(pickle.dumps(source))
    assert again == source and same(again[49], forward[49])


def test_another_process_sees_the_same():
    """As a data worker would: the pickled sources, in a process that hashes strings otherwise."""
    sources = [tasks.make(name, seed=3, **SMALL.get(name, {})) for name in tasks.names()]
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
    """Short rows may be equal by chance; a setting without effect would leave half of them."""
    settings = SMALL.get(name, {})
    sources = [
        tasks.make(name, **{**settings, "seed": seed, "split": split})
        for seed in (0, 1)
        for split in ("train", "test")
    ]
    rows = {source[i]["inputs"].tobytes() for source in sources for i in range(250)}
    assert len(rows) > 500


@pytest.mark.parametrize("name", tasks.names())
def test_random_access_interface(name):
    source = tasks.make(name)
    assert len(source) == 2**31
    assert same(source[np.int64(2**31 - 1)], source[2**31 - 1])
    for index in (-1, 2**31):
        with pytest.raises(IndexError, match="allowed: 0 to"):
            source[index]
    example, fresh = source[0], source[0]
    for array in example.values():
        if array.ndim:
            array[...] = 1
    assert same(source[0], fresh)


@pytest.mark.parametrize("name", tasks.names())
def test_format_of_an_example(name):
    source = tasks.make(name, **SMALL.get(name, {}))
    keys = source[0].keys()
    assert {"inputs", "targets", "mask"} <= keys and 0 <= source.chance < 1
    for index in range(1000):
        example = source[index]
        assert example.keys() == keys
        for key, array in example.items():
            assert array.shape == ((source.length,) if array.ndim else ())
            integer = key in OF_TOKENS or not array.ndim
            kind = np.float32 if key == "oracle" else np.int32 if integer else np.bool_
            assert array.dtype == kind
        mask = example["mask"]
        assert 1 <= mask.sum() <= source.queries
        for key in keys - {"inputs", "mask"}:
            assert not example[key].ndim or not example[key][~mask].any(), key
        for key in ("inputs", "targets"):
            assert example[key].min() >= 0 and example[key].max() < source.vocab


@pytest.mark.parametrize("name", tasks.names())
def test_show_of_every_task(name):
    source = tasks.make(name, **SMALL.get(name, {}))
    text = command.show(source, 3)
    assert text.startswith(f"{name}, example 3 of 2**31: length={source.length}, ")
    assert text.count("\n") >= 3


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


def test_permutation_and_tuples_are_uniform():
    source = draws.bits(0, "test", 0, 0)
    orders = [tuple(draws.permutation(source, 3)) for _ in range(3000)]
    for drawn, number in ((orders, 6), (map(tuple, draws.tuples(source, 4, 3, 6000)), 24)):
        counts = {}
        for items in drawn:
            assert len(set(items)) == 3
            counts[items] = counts.get(items, 0) + 1
        expected = sum(counts.values()) / number
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert len(counts) == number and chi_square < {6: 20.5, 24: 49.7}[number]  # p = 0.001


def test_categorical_has_its_law():
    law = np.array([0.5, 0.0, 0.3, 0.2])
    counts = np.bincount(draws.categorical(draws.bits(0, "test", 0, 0), np.tile(law, (5000, 1))))
    assert counts[1] == 0 and len(counts) == 4
    assert ((counts - 5000 * law)[[0, 2, 3]] ** 2 / (5000 * law[[0, 2, 3]])).sum() < 13.8


def test_normals_are_normal():
    """Shares below the quantiles at 2.3, 15.9, 50, 84.1 and 97.7 %; an odd number; independent."""
    drawn = draws.normals(draws.bits(0, "test", 0, 0), 20001)
    assert drawn.shape == (20001,) and np.isfinite(drawn).all()
    law = np.array([0.02275, 0.15866, 0.5, 0.84134, 0.97725])
    shares = (drawn[:, None] < np.arange(-2, 3)).mean(axis=0)
    assert (np.abs(shares - law) < 4 * np.sqrt(law * (1 - law) / 20001)).all()
    assert abs((drawn[:10000] * drawn[10000:20000]).mean()) < 4 / np.sqrt(10000)


def test_draws_refuse_more_items_than_there_are():
    source = draws.bits(0, "test", 0, 0)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.subset(source, 4, 5)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.weighted_subset(source, np.zeros(4), 5)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.tuples(source, 4, 5, 1)


# --- the command --------------------------------------------------------------------------------


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memjax.tasks", *arguments])
    command.main()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--show=mqa"], "Did you mean 'mqar'"),
        (["--show=mqar", "pairs"], "expected SETTING=VALUE"),
        (["--show=mqar", "pairs=x"], "pairs='x' has the type str"),
        (["--show=mqar", "pair=4"], "unknown setting 'pair'"),
        (["--show=mqar", "--index=-1"], "example -1 is out of range"),
    ],
)
def test_show_refuses_with_one_message(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run_command(monkeypatch, *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
