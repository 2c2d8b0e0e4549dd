"""Packing, resume, evaluation, settings and fingerprints of memjax.data."""

import json
import math

import grain
import numpy as np
import pytest

from memjax import data, tasks
from memjax.data import pipeline, sources, tokens


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


def config(root, **settings):
    given = {"name": "text", "glob": f"{root}/**/*.txt", "length": 16, "holdout": 0.3}
    return {**given, **settings}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


# Packing ---------------------------------------------------------------------------------------


def test_packing_marks_documents_not_rows():
    # Documents of 9 and 6 tokens in rows of 6: the third row begins inside a document.
    source = grain.MapDataset.source(pipeline.Documents([b"abcdefgh", b"ijklm"]))
    packed = grain.experimental.ConcatThenSplitIterDataset(
        source.map(tokens.BYTES.document).to_iter_dataset(), length_struct={"tokens": 6, "start": 6}
    )
    rows = list(packed)
    starts = np.stack([row["start"] for row in rows]).astype(int)
    np.testing.assert_array_equal(starts, [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6])
    second = pipeline.examples(rows[1])
    assert (
        tokens.BYTES.decode(second["inputs"]) == "fghi"
        and tokens.BYTES.decode(second["targets"]) == "ghij"
    )
    np.testing.assert_array_equal(second["mask"], [True, True, False, True, True])
    np.testing.assert_array_equal(second["reset"], [False, False, False, True, False])
    last = pipeline.examples(rows[2])
    np.testing.assert_array_equal(last["mask"], [True, True, False, False, False])
    assert not last["reset"].any()


def test_train_batches_are_the_shuffled_documents_end_to_end():
    texts = random_texts(7)
    length, batch = 10, 3
    it = iter(pipeline.text_rows(texts, length=length, batch=batch, seed=3))
    rows = []
    for _ in range(30):
        b = next(it)
        assert {k: v.dtype for k, v in b.items()} == {
            'inputs': np.int32, 'targets': np.int32, 'mask': bool, 'reset': bool,
        }  # fmt: skip
        assert all(v.shape == (batch, length) for v in b.values())
        np.testing.assert_array_equal(b["inputs"][:, 1:], b["targets"][:, :-1])
        np.testing.assert_array_equal(b["reset"], b["inputs"] == tokens.BOS)
        np.testing.assert_array_equal(b["mask"], b["targets"] != tokens.BOS)
        rows += list(np.concatenate([b["inputs"], b["targets"][:, -1:]], 1))
    stream = np.concatenate(rows)
    documents = np.split(stream, np.flatnonzero(stream == tokens.BOS))[1:-1]
    seen = [tokens.BYTES.decode_bytes(d) for d in documents]
    first, second = seen[: len(texts)], seen[len(texts) : 2 * len(texts)]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second and first != texts


@pytest.mark.parametrize("settings", [{}, {"name": "mqar", "length": 16, "pairs": 2}])
def test_shares_are_rows_of_the_same_batches(folder, settings):
    """And whoever continues from the place of one of them reads on with all rows."""
    given = dict(config_data=settings or config(folder), batch=6, seed=3)
    whole = data.make(**given)
    shares = [data.make(**given, share=rows) for rows in ([0, 3], [1, 2, 4, 5])]
    for part, rows in zip(shares, ([0, 3], [1, 2, 4, 5]), strict=True):
        assert part.fingerprint == whole.fingerprint
        assert {k: v.shape for k, v in part.example.items()} == {
            k: (len(rows), *v.shape[1:]) for k, v in whole.example.items()
        }
        every, some = iter(whole.train), iter(part.train)
        evaluations = zip(whole.evaluation(3), part.evaluation(3), strict=True)
        batches = [*evaluations, *((next(every), next(some)) for _ in range(5))]
        for all_rows, taken in batches:
            assert_same(taken, {key: array[rows] for key, array in all_rows.items()})
        assert some.get_state() == every.get_state()


def text_rows(shuffle=1):
    texts = random_texts(20, high=400)
    return pipeline.text_rows(texts, length=24, batch=2, seed=5, shuffle=shuffle)


def test_resume_by_grains_own_check():
    limited = grain.experimental.LimitIterDataset(text_rows(), 8)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


def check_resume(dataset, before, after):
    it = iter(dataset)
    for _ in range(before):
        next(it)
    state = json.loads(json.dumps(it.get_state()))  # as a checkpoint hands it back
    expected = [next(it) for _ in range(after)]
    fresh = iter(dataset)
    fresh.set_state(state)
    for batch in expected:
        assert_same(next(fresh), batch)
    it.set_state(state)  # back on a used iterator
    assert_same(next(it), expected[0])
    return expected[0], (it, fresh)


@pytest.mark.parametrize("shuffle", [1, 16, 64])
@pytest.mark.parametrize("before", [1, 7, 40])
def test_resume_in_the_middle(before, shuffle):
    check_resume(text_rows(shuffle), before, 20)


def test_shuffle_moves_rows_within_their_window_only():
    def rows(dataset, batches):
        it = iter(dataset)
        return [row.tobytes() for _ in range(batches) for row in next(it)["inputs"]]

    ordered, shuffled = rows(text_rows(), 16), rows(text_rows(shuffle=16), 16)
    assert shuffled != ordered
    for first in (0, 16):
        window = slice(first, first + 16)
        assert sorted(shuffled[window]) == sorted(ordered[window])


def test_workers_take_turns_and_resume():
    texts, order = random_texts(20, high=400), {"length": 24, "batch": 2, "seed": 5}
    it = iter(pipeline.text_rows(texts, workers=2, **order))
    try:
        found, states = [], []
        for _ in range(6):
            states.append(it.get_state())
            found.append(next(it))
        it.set_state(states[3])
        for batch in found[3:]:
            assert_same(next(it), batch)
    finally:
        it.close()
    # Each worker packs every second document, and batches come from them in turn.
    shuffled = grain.MapDataset.source(pipeline.Documents(texts)).seed(5).shuffle().repeat(None)
    for worker in (0, 1):
        documents = [tokens.BYTES.document(shuffled[i])["tokens"] for i in range(worker, 40, 2)]
        rows = np.concatenate(documents)[: 3 * 2 * 25].reshape(3, 2, 25)
        np.testing.assert_array_equal([b["inputs"] for b in found[worker::2]], rows[..., :-1])


# Evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_held_out_byte_is_scored_exactly_once(length, batch):
    texts = [*random_texts(6), b"x", b"y" * 64]
    rows = pipeline.TextEvaluation(texts, length)
    batches = list(pipeline.evaluation_batches(rows, count=len(rows), batch=batch))
    assert len(batches) == math.ceil(len(rows) / batch)
    assert all(v.shape == (batch, length) for b in batches for v in b.values())
    scored = np.concatenate([b["targets"][b["mask"]] for b in batches])
    assert tokens.BYTES.decode_bytes(scored) == b"".join(texts)
    assert sum(int(b["reset"].sum()) for b in batches) == len(texts)
    # The input at every scored position is the token just before.
    before = np.concatenate([b["inputs"][b["mask"]] for b in batches])
    expected = np.concatenate([tokens.BYTES.document(t)["tokens"][:-1] for t in texts])
    np.testing.assert_array_equal(before, expected)


def test_evaluation_limit_spreads(folder):
    whole = data.make(config(folder), batch=4, seed=0)
    full = list(whole.evaluation())
    assert len(full) == whole.evaluation_count > 6
    few = list(whole.evaluation(3))
    for batch, index in zip(few, [0, len(full) // 3, 2 * len(full) // 3], strict=True):
        assert_same(batch, full[index])
    assert len(list(whole.evaluation(10**6))) == len(full)
    with pytest.raises(ValueError, match="0 evaluation batches: allowed is at least 1, or None"):
        whole.evaluation(0)


# make and its fingerprint ----------------------------------------------------------------------


def test_make_text(folder):
    made = data.make(config(folder), batch=2, seed=0)
    assert made.vocab == 259 and made.queries is None and made.length == 16
    assert made.bytes_per_token == 1.0 and made.tokeniser.decode([100]) == "a"
    again = data.make(config(folder), batch=2, seed=0)
    assert_same(next(iter(made.train)), next(iter(again.train)))
    _, heldout = data.from_glob(f"{folder}/**/*.txt").split(0.3)
    scored = np.concatenate([b["targets"][b["mask"]] for b in made.evaluation()])
    assert tokens.BYTES.decode_bytes(scored) == b"".join(heldout.texts)
    assert made.baselines().keys() == {"uniform", "unigram", "bigram", "zlib"}


def test_fingerprint_does_not_depend_on_the_place(folder, tmp_path):
    first = data.make(config(folder), batch=2, seed=0).fingerprint
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert data.make(config(moved), batch=2, seed=0).fingerprint == first
    assert str(tmp_path) not in str(first)
    assert first["workers"] == 0 and first["files"] == 40 and first["packing"] == "concat"


@pytest.mark.parametrize(
    ("fact", "settings", "order"),
    [
        ("holdout", {"holdout": 0.4}, {}),
        ("length", {"length": 8}, {}),
        ("workers", {"workers": 2}, {}),
        ("batch", {}, {"batch": 4}),
        ("seed", {}, {"seed": 1}),
    ],
)
def test_fingerprint_changes_with_each_setting(folder, fact, settings, order):
    base = data.make(config(folder), batch=2, seed=0).fingerprint
    given = {"batch": 2, "seed": 0, **order}
    other = data.make(config(folder, **settings), **given).fingerprint
    assert {key for key in base if base[key] != other[key]} == {fact, "hash"}


def test_fingerprint_changes_with_the_files(folder):
    base = data.make(config(folder), batch=2, seed=0).fingerprint

    def changed():
        other = data.make(config(folder), batch=2, seed=0).fingerprint
        return {key for key in base if base[key] != other[key]}

    original = (folder / "00.txt").read_bytes()
    (folder / "00.txt").write_bytes(bytes([original[0] ^ 1]) + original[1:])
    assert changed() == {"content", "hash"}
    (folder / "00.txt").rename(folder / "000.txt")
    (folder / "000.txt").write_bytes(original)
    assert changed() == {"names", "hash"}
    (folder / "000.txt").rename(folder / "00.txt")
    assert changed() == set()
    (folder / "more.txt").write_bytes(b"abc")
    assert changed() == {"files", "bytes", "names", "content", "hash"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "txt"}, r"data\.name='txt': allowed sources are text, tfds.*mean 'text'"),
        ({"name": None}, r"data\.name=None: allowed sources are text, tfds, .*mqar"),
        ({"name": "text", "lenght": 8}, r"lenght=8.*allowed are bpe, .*mean 'length'"),
        ({"name": "mqar", "updates": 8}, r"data\.updates=8: the source 'mqar' has no such"),
        ({"name": "text", "length": 8.5}, r"data\.length=8\.5 is of type float.*an integer"),
        ({"name": "text", "length": True}, r"data\.length=True is of type bool.*an integer"),
        ({"name": "text", "holdout": "x"}, r"data\.holdout='x' is of type str.*a number"),
        ({"name": "text", "length": 0}, r"data\.length=0: allowed is at least 1"),
        ({"name": "text", "workers": -1}, r"data\.workers=-1: allowed is at least 0"),
        ({"name": "text", "holdout": 1}, r"holdout=1\.0: allowed is a fraction"),
        ({"name": "text", "glob": "no/such"}, r"data\.glob='no/such' matches nothing"),
        ({"name": "mqar", "eval_examples": 0}, r"data\.eval_examples=0: allowed is at least 1"),
        ({"name": "mqar", "vocab": 0}, r"mqar: vocab=0 is out of range"),
        ({"name": "mqar", "noise": 1}, r"data\.noise=1 is of type int.*True or False"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        data.make(wrong, batch=2, seed=0)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"batch": 0}, r"batch=0: allowed is a positive number of rows; use 1 or more"),
        ({"seed": -1}, r"seed=-1: allowed is an integer from 0"),
    ],
)
def test_wrong_order(folder, order, message):
    with pytest.raises(ValueError, match=message):
        data.make(config(folder), **{"batch": 2, "seed": 0, **order})


# Tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mqar", "forgetting_mqar"])
def test_make_task(name):
    small = {"name": name, "length": 32, "pairs": 2, "vocab": 64, "eval_examples": 10}
    if name == "forgetting_mqar":
        small["updates"] = 2
    made = data.make(small, batch=4, seed=7)
    assert made.vocab == 64 and made.length == 32 and made.queries >= 2
    assert made.tokeniser is None and made.bytes_per_token is None
    assert made.baselines() == {"chance": 1 / 32}
    first, _ = check_resume(made.train, 3, 5)
    assert first["inputs"].shape == (4, 32) and "reset" not in first
    np.testing.assert_array_equal(first["mask"].sum(1), made.queries)
    batches = list(made.evaluation())
    assert len(batches) == made.evaluation_count == 3
    assert [b["mask"].any(1).sum() for b in batches] == [4, 4, 2]
    assert {v.shape[:1] for b in batches for v in b.values()} == {(4,)}
    other = data.make(small, batch=4, seed=8)
    assert_same(next(other.evaluation()), batches[0])
    assert not np.array_equal(next(iter(other.train))["inputs"], next(iter(made.train))["inputs"])
    changed = data.make({**small, "noise": False}, batch=4, seed=7).fingerprint
    differs = {k for k in changed if changed[k] != made.fingerprint[k]}
    assert differs == {"noise", "hash"}


def test_evaluation_of_a_task_may_have_other_settings():
    small = {"name": "mqar", "length": 32, "pairs": 2, "vocab": 64, "eval_examples": 3}
    made = data.make({**small, "test": {"length": 48, "pairs": 8}}, batch=2, seed=0)
    assert (made.length, made.evaluation_length) == (32, 48)
    assert (made.queries, made.evaluation_queries) == (2, 8)
    assert next(iter(made.train))["inputs"].shape == (2, 32)
    assert next(made.evaluation())["inputs"].shape == (2, 48)
    assert made.fingerprint["hash"] != data.make(small, batch=2, seed=0).fingerprint["hash"]


def test_a_finite_set_of_examples_is_shuffled_anew_each_epoch():
    small = {"name": "mqar", "length": 32, "pairs": 2, "vocab": 64, "train_examples": 6}
    made = data.make(small, batch=2, seed=0)
    rows = check_resume(made.train, 4, 5)[0]["inputs"]
    batches = iter(made.train)
    epochs = [[next(batches)["inputs"].tobytes() for _ in range(3)] for _ in range(3)]
    source = tasks.make("mqar", length=32, pairs=2, vocab=64, seed=0)
    every = {source[i]["inputs"].tobytes() for i in range(6)}
    assert rows.shape == (2, 32) and len({tuple(epoch) for epoch in epochs}) == 3
    for epoch in epochs:
        joined = b"".join(epoch)
        size = len(joined) // 6
        assert {joined[i * size : (i + 1) * size] for i in range(6)} == every


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_examples": -1}, "train_examples=-1: allowed is at least 0; use 0 for new"),
        ({"test": {"lenght": 3}}, "data.test.lenght=3: the source 'mqar' has no such setting.*len"),
        ({"test": {"length": "3"}}, "data.test.length='3' is of type str; it must be an integer"),
        ({"test": {"eval_examples": 3}}, "data.test.eval_examples=3: .* no such setting"),
        ({"test": {"vocab": 65}}, "vocab 65 by the settings of data.test: allowed is 64"),
    ],
)
def test_wrong_settings_of_evaluation(change, message):
    small = {"name": "mqar", "length": 32, "pairs": 2, "vocab": 64}
    with pytest.raises(ValueError, match=message):
        data.make({**small, **change}, batch=2, seed=0)


def test_make_passkey():
    """Every byte is scored in training, the digits in evaluation; facts of rows pass through."""
    small = {"name": "passkey", "length": 200, "every_byte": True, "eval_examples": 5}
    made = data.make(small, batch=4, seed=7)
    assert (made.vocab, made.length, made.baselines()) == (259, 200, {"chance": 0.1})
    first, _ = check_resume(made.train, 3, 5)
    np.testing.assert_array_equal(first["mask"].sum(1), made.queries)
    assert made.queries > 7 and first["depth"].shape == (4,)
    batches = list(made.evaluation())
    assert [b["mask"].sum(1).tolist() for b in batches] == [[7] * 4, [7, 0, 0, 0]]
    assert [b["depth"].tolist() for b in batches] == [[0, 3, 5, 8], [10, 0, 0, 0]]


class Numbers:
    """Example i of a task is the number i."""

    def __len__(self):
        return 1 << 31

    def __getitem__(self, index):
        return {"inputs": np.full(3, index, np.int32), "mask": np.ones(3, bool)}


def test_task_batches_come_in_order():
    rows = iter(pipeline.task_rows(Numbers(), batch=3))
    assert [next(rows)["inputs"][:, 0].tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_sources_agree_on_their_settings():
    assert sources.SETTINGS["text"]["length"] == 512
    assert set(sources.SETTINGS["forgetting_mqar"]) - set(sources.SETTINGS["mqar"]) == {"updates"}
