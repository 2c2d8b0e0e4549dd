"""Byte tokens, corpora and their splits, and the baselines of memjax.data."""

import math
import os
import zlib

import numpy as np
import pytest

from memjax import data
from memjax.data import baselines, text, tokens


def random_texts(count=12, low=1, high=90, seed=0):
    """Documents of random bytes, 0 and 255 among them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(low, high, count)
    return [rng.integers(0, 256, size).astype(np.uint8).tobytes() for size in sizes]


@pytest.fixture
def folder(tmp_path):
    """40 small files in two levels, one of them empty, and one that the glob leaves out."""
    root = tmp_path / "books"
    (root / "deep").mkdir(parents=True)
    for i, content in enumerate(random_texts(40)):
        (root / ("deep" if i % 2 else "") / f"{i:02}.txt").write_bytes(content)
    (root / "empty.txt").write_bytes(b"")
    (root / "notes.md").write_bytes(b"left out")
    return root


# Tokens ----------------------------------------------------------------------------------------


def test_tokens_round_trip():
    every = bytes(range(256))
    ids = tokens.BYTES.encode(every)
    assert ids.dtype == np.int32 and ids.min() == 3 and ids.max() == tokens.BYTES.vocab - 1 == 258
    assert tokens.BYTES.decode_bytes(ids) == every
    assert tokens.BYTES.decode(tokens.BYTES.encode("Grüße, 世界")) == "Grüße, 世界"
    assert tokens.BYTES.decode([1, ord("a") + 3, 0, 0xFF + 3, 2]) == "a\ufffd"
    assert tokens.BYTES.decode([]) == ""
    with pytest.raises(ValueError, match=r"tokens from 5 to 259: this tokeniser has 0\.\.258"):
        tokens.BYTES.decode([5, 259])


# Corpora ---------------------------------------------------------------------------------------


def test_standard_library_leaves_out_tests_and_tables():
    corpus = data.standard_library()
    assert corpus.facts()["files"] > 300 and 4e6 < corpus.facts()["bytes"] < 2e7
    assert "dataclasses.py" in corpus.names and "asyncio/base_events.py" in corpus.names
    parts = {part for name in corpus.names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert "html/entities.py" not in corpus.names
    assert not any("_sysconfigdata" in name or "config-" in name for name in corpus.names)
    train, heldout = corpus.split(0.05)
    assert 0.02 < len(heldout.names) / len(corpus.names) < 0.08
    assert sorted(train.names + heldout.names) == list(corpus.names)


def test_standard_library_without_sources(tmp_path):
    with pytest.raises(ValueError, match=r"has no \.py files.*data\.glob="):
        text.standard_library(str(tmp_path))


def test_glob_names_are_relative_and_sorted(folder):
    corpus = data.from_glob(f"{folder}/**/*.txt")
    assert corpus.names[:2] == ("00.txt", "02.txt") and corpus.names[-1] == "deep/39.txt"
    assert len(corpus.names) == 40  # the empty file is left out
    assert corpus.texts[0] == (folder / "00.txt").read_bytes()
    assert data.from_glob(f"{folder}/00.txt").names == ("00.txt",)


def test_glob_expands_home_and_working_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    expected = data.from_glob(f"{folder}/**/*.txt")
    assert data.from_glob("~/books/**/*.txt") == expected == data.from_glob("books/**/*.txt")


def test_glob_errors(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data\.glob='nowhere/\*\.txt' matches nothing.*'' takes"):
        data.from_glob("nowhere/*.txt")
    with pytest.raises(
        ValueError, match=r"matches 1 paths, none of them a file.*books/\*\*/\*\.txt"
    ):
        data.from_glob(str(folder))
    with pytest.raises(ValueError, match=r"has 1 files, all empty"):
        data.from_glob(f"{folder}/empty.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"matches 1 paths, none of them a file"):
        data.from_glob(f"{tmp_path}/*.txt")


def test_unreadable_file_is_named(folder, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(text, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"cannot read .*\.txt \(Permission denied\)"):
        data.from_glob(f"{folder}/**/*.txt")


def test_corpus_needs_documents():
    with pytest.raises(ValueError, match="a corpus of 0 documents"):
        data.Corpus.of([("a", b"")])
    with pytest.raises(ValueError, match="names sorted and each once"):
        data.Corpus.of([("a", b"x"), ("a", b"y")])


def test_split_is_stable_when_files_come_and_go():
    names = [f"file{i}.py" for i in range(200)]
    held = data.Corpus.of((n, b"x") for n in names).split(0.2)[1].names
    assert 20 < len(held) < 60
    fewer = data.Corpus.of((n, b"y") for n in names[::2]).split(0.2)[1].names
    assert set(fewer) == set(held) & set(names[::2])
    more = data.Corpus.of((n, b"x") for n in [*names, "aaa", "zzz"]).split(0.2)[1].names
    assert set(more) - {"aaa", "zzz"} == set(held)
    other = data.Corpus.of((n, b"x") for n in names).split(0.2, seed=1)[1].names
    assert set(other) != set(held)


def test_split_errors_name_a_fraction_that_works():
    corpus = data.Corpus.of((f"{i}.txt", b"x") for i in range(3))
    for wrong in (0, 1, -0.5, 1.5, True, math.nan):
        with pytest.raises(ValueError, match="allowed is a fraction of the files between 0 and 1"):
            corpus.split(wrong)
    for extreme, side in ((1e-9, "held-out"), (1 - 1e-9, "training")):
        with pytest.raises(ValueError, match=f"of 3 files leaves no {side} file") as error:
            corpus.split(extreme)
        low, high = str(error.value).partition("allowed is ")[2].partition(":")[0].split(" to ")
        for holdout in (float(low), float(high)):
            assert all(len(side.names) for side in corpus.split(holdout))
    with pytest.raises(ValueError, match=r"one file \(a\.txt\).*needs at least 2"):
        data.Corpus.of([("a.txt", b"x")]).split(0.5)


# Baselines -------------------------------------------------------------------------------------


def test_baselines_by_hand():
    # Trained on "ab", "a": counts a 2, b 1; begin->a 2, a->b 1. Scored on "ab".
    found = baselines.baselines([b"ab", b"a"], [b"ab"])
    assert found["uniform"] == 8
    assert found["unigram"] == pytest.approx(-(math.log2(3 / 259) + math.log2(2 / 259)) / 2)
    assert found["bigram"] == pytest.approx(-(math.log2(3 / 258) + math.log2(2 / 257)) / 2)
    assert found["zlib"] == 8 * len(zlib.compress(b"ab", 9)) / 2


def test_baselines_count_no_pair_across_documents(monkeypatch):
    monkeypatch.setattr(baselines, "_BLOCK", 5)  # blocks cut the documents anywhere
    train, heldout = random_texts(9), random_texts(4, seed=1)
    counts = np.zeros((257, 256))
    for document in train:
        for before, after in zip([256, *document], document, strict=False):
            counts[before, after] += 1
    bits = 0.0
    for document in heldout:
        for before, after in zip([256, *document], document, strict=False):
            bits -= math.log2((counts[before, after] + 1) / (counts[before].sum() + 256))
    found = baselines.baselines(train, heldout)
    assert found["bigram"] == pytest.approx(bits / sum(map(len, heldout)))


def test_baselines_need_a_held_out_byte():
    with pytest.raises(ValueError, match="no held-out byte"):
        baselines.baselines([b"a"], [])
