"""What every synthetic task keeps: fixed examples, random access, format, text; and draws."""

import hashlib
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from task_checks import chi_square

from memjax import tasks
from memjax.tasks import __main__ as command
from memjax.tasks import draws

GOLDEN = {
    ("mqar", "train"): "f92a664c3a72c725",
    ("mqar", "test"): "572efcf07e8ad27e",
    ("forgetting_mqar", "train"): "c5ac3bc219dc1a8d",
    ("forgetting_mqar", "test"): "7645a7a5288601d6",
    ("compositional_mqar", "train"): "f202ba001e0a72d4",
    ("compositional_mqar", "test"): "bc398ec14ce75d68",
    ("associative_recall", "train"): "35c0b5012f2dc6cb",
    ("associative_recall", "test"): "6c1e031dd5df1685",
    ("joint_recall", "train"): "fdf08c2e5f05ca2b",
    ("joint_recall", "test"): "8225dbfefad35f4d",
    ("mixture", "train"): "76afd20850124fb8",
    ("mixture", "test"): "19c2158889bdf1b0",
    ("stacked_mqar", "train"): "7e443f4236c37337",
    ("stacked_mqar", "test"): "78defd923f500059",
    ("treecall", "train"): "3044ce502632c3a4",
    ("treecall", "test"): "95e672671ba061fe",
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
    ("bigrams", "train"): "ed392692eb099b8d",
    ("bigrams", "test"): "b2f35f82767de76a",
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
            vectors = key == "inputs" and source.features
            shape = (source.length, source.features) if vectors else (source.length,)
            assert array.shape == (shape if array.ndim else ())
            real = vectors or key == "oracle"
            kind = np.int32 if key in OF_TOKENS or not array.ndim else np.bool_
            assert array.dtype == (np.float32 if real else kind), key
        mask = example["mask"]
        assert 1 <= mask.sum() <= source.queries
        for key in keys - {"inputs", "mask"}:
            assert not example[key].ndim or not example[key][~mask].any(), key
        for key in ("targets",) if source.features else ("inputs", "targets"):
            assert example[key].min() >= 0 and example[key].max() < source.vocab


@pytest.mark.parametrize("name", tasks.names())
def test_show_of_every_task(name):
    source = tasks.make(name, **SMALL.get(name, {}))
    text = command.show(source, 3)
    assert text.startswith(f"{name}, example 3 of 2**31: ")
    assert text.count("\n") >= 3


# --- draws --------------------------------------------------------------------------------------


def test_subset_is_uniform_ordered_and_may_be_everything():
    counts = {}
    for index in range(4000):
        pair = tuple(draws.subset(draws.bits(0, "test", index, 0), 4, 2))
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 12 and all(a != b for a, b in counts)
    assert chi_square([*counts.values()]) < 31.3  # p = 0.001
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
    assert chi_square(counts[off], law[off]) < 20.5  # 5 degrees of freedom, p = 0.001


def test_permutations_are_uniform_and_independent():
    counts = np.zeros((6, 6))
    for index in range(3600):
        made = draws.permutations(draws.bits(0, "test", index, 0), (2, 3))
        first, second = made @ [9, 3, 1]
        counts[[5, 7, 11, 15, 19, 21].index(first), [5, 7, 11, 15, 19, 21].index(second)] += 1
    assert chi_square(counts) < 66.7  # 35 degrees of freedom, p = 0.001
    assert draws.permutations(draws.bits(0, "test", 0, 1), 0).shape == (0,)


@pytest.mark.parametrize(
    "draw, law",
    [
        (draws.uniforms, lambda x: x),
        (draws.exponentials, lambda x: -np.expm1(-x)),
        (draws.normals, lambda x: np.vectorize(math.erfc)(-x / np.sqrt(2)) / 2),
    ],
)
def test_distribution_of_numbers(draw, law):
    """The largest distance between the distribution functions (Kolmogorov and Smirnov)."""
    drawn = draw(draws.bits(0, "test", 0, 0), (50, 400))
    assert drawn.shape == (50, 400) and np.isfinite(drawn).all()
    place = law(np.sort(drawn.ravel()))
    assert np.abs(place - (np.arange(20000) + 0.5) / 20000).max() < 1.95 / np.sqrt(20000)  # .001


def test_tuples_are_ordered_subsets_and_uniform():
    drawn = draws.tuples(draws.bits(0, "test", 0, 0), 4, (6000, 3))
    assert (np.sort(drawn, axis=1)[:, 1:] > np.sort(drawn, axis=1)[:, :-1]).all()
    counts = np.unique(drawn @ [16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24 and chi_square(counts) < 49.7  # 23 degrees of freedom, p = 0.001


def test_categorical_has_its_law():
    law = np.array([0.5, 0.0, 0.3, 0.2])
    counts = np.bincount(draws.categorical(draws.bits(0, "test", 0, 0), np.tile(law, (5000, 1))))
    assert counts[1] == 0 and len(counts) == 4
    assert chi_square(counts[law > 0], law[law > 0]) < 13.8  # 2 degrees of freedom, p = 0.001


@pytest.mark.parametrize("symbols", [2, 4])
def test_half_dirichlet_has_its_moments(symbols):
    """Means 1/K, variances (K - 1) / (K**2 (K/2 + 1)), sums 1."""
    drawn = draws.half_dirichlet(draws.bits(0, "test", 0, 0), (5000, symbols))
    assert drawn.shape == (5000, symbols)
    np.testing.assert_allclose(drawn.sum(axis=1), 1, rtol=1e-12)
    mean, variance = 1 / symbols, (symbols - 1) / (symbols**2 * (symbols / 2 + 1))
    assert (np.abs(drawn.mean(axis=0) - mean) < 4 * np.sqrt(variance / 5000)).all()
    squares = (drawn - mean) ** 2
    error = squares.std(axis=0) / np.sqrt(5000)
    assert (np.abs(squares.mean(axis=0) - variance) < 4 * error).all()


def test_draws_refuse_more_items_than_there_are():
    source = draws.bits(0, "test", 0, 0)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.subset(source, 4, 5)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.weighted_subset(source, np.zeros(4), 5)
    with pytest.raises(ValueError, match="5 different items out of 4"):
        draws.tuples(source, 4, (1, 5))


# --- the command --------------------------------------------------------------------------------


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memjax.tasks", *arguments])
    command.main()


def test_settings_stand_anywhere(monkeypatch, capsys):
    run_command(monkeypatch, "pairs=2", "--show=mqar", "noise=False", "--index=3", "split=test")
    first = capsys.readouterr().out.splitlines()[0]
    assert "example 3 of" in first and "pairs=2" in first and "noise=False, " in first
    assert "split='test'" in first


def test_settings_that_are_text_need_no_quotes(monkeypatch, capsys):
    cells = ["cells=64x4,128x8", "settings=vocab=256,noise=False"]
    for weights in ("weights=2,1", "weights='2,1'"):
        run_command(monkeypatch, "--show=mixture", *cells, weights)
        assert "weights='2,1', settings='vocab=256" in capsys.readouterr().out
    run_command(monkeypatch, "--show=mixture", "cells=64x4", "weights=2")
    assert "weights='2'" in capsys.readouterr().out


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
