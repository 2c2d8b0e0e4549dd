"""Text by path (plain, JSON lines, parquet), tensorflow-datasets, and byte-pair encodings."""

import json

import numpy as np
import pytest
import tiny_runs as runs

from memjax import data, generate, train
from memjax.data import text, tokens

SENTENCES = [f"The {a} {b} sees {n} birds.\n" for a in ("old", "red") for b in ("cat", "fox")
             for n in range(12)]  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_each_line_of_json_is_a_document(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "zwei", "id": 1}, {"text": ""}, {"text": "drei"}])
    (tmp_path / "a.txt").write_text("eins", encoding="utf-8")
    corpus = text.from_glob(f"{tmp_path}/*")
    assert corpus.names == ("a.txt", "b.jsonl#0", "b.jsonl#2")
    assert corpus.texts == (b"eins", b"zwei", b"drei")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": "b', r"x.jsonl, line 2: no JSON .*mend the line"),
        (
            '{"body": "a"}\n',
            r"line 1: no text in the field 'text'; it has body \(str\): set data.field",
        ),
        ("[1, 2]\n", r"line 1: no text in the field 'text'; it has list"),
        ('{"text": 3}\n', r"line 1: no text in the field 'text'; it has text \(int\)"),
    ],
)
def test_json_that_cannot_be_read_is_refused(tmp_path, lines, message):
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        text.from_glob(f"{tmp_path}/x.jsonl")


def test_each_row_of_parquet_is_a_document(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[text]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"body": ["eins", None, "drei"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "x.parquet")
    corpus = text.from_glob(f"{tmp_path}/*.parquet", field="body")
    assert corpus.names == ("x.parquet#0", "x.parquet#2") and corpus.texts == (b"eins", b"drei")
    with pytest.raises(ValueError, match="no column 'text'; it has body, n: set data.field"):
        text.from_glob(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="the column 'n' holds int, no text"):
        text.from_glob(f"{tmp_path}/*.parquet", field="n")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"x.parquet: not a whole parquet file"):
        text.from_glob(f"{tmp_path}/*.parquet", field="body")


# ---------------------------------------------------------------- byte-pair encoding


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -e '.[text]'")
    return tokens.train_bpe([sentence.encode() for sentence in SENTENCES], 290)


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"The old cat sees 7 birds.\n",
        "Zwölf いろは".encode(),
        bytes(range(256)),
        b"<pad> <begin><unused> <s>",
    ],
)
def test_byte_pairs_lose_nothing(bpe, given):
    ids = bpe.encode(given)
    assert bpe.decode_bytes(ids) == given
    assert ids.dtype == np.int32 and (ids >= tokens.OFFSET).all() and (ids < bpe.vocab).all()
    assert bpe.vocab == 290


def test_byte_pairs_are_shorter_and_a_function_of_the_text(bpe):
    joined = "".join(SENTENCES).encode()
    assert len(bpe.encode(joined)) < len(joined) / 2
    again = tokens.train_bpe([sentence.encode() for sentence in SENTENCES], 290)
    assert again.model == bpe.model
    assert tokens.from_json(bpe.model) == bpe
    document = bpe.document(b"The fox")
    assert document["tokens"][0] == tokens.BOS and document["start"].sum() == 1


def test_impossible_byte_pairs_are_refused(bpe):
    with pytest.raises(ValueError, match="data.bpe=100: allowed is 0 for bytes, or at least 259"):
        tokens.train_bpe([b"text"], 100)
    with pytest.raises(ValueError, match="gives no more than .* tokens; ask for at most that"):
        tokens.train_bpe([b"ab"], 5000)


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"x needs the package no_such, .*pip install -e"):
        tokens.optional("no_such.module", "x")


@pytest.mark.slow
def test_a_run_on_byte_pairs_trains_and_writes_text(bpe, tmp_path):
    settings = runs.text(tmp_path, steps=3, **{"data.bpe": 300, "model.vocab": 300})
    settings["optim.warmup"] = 1
    summary = train.train(runs.load(runs.TEXT, settings), str(tmp_path / "run"))
    made = data.make(runs.load(runs.TEXT, settings).data, batch=4, seed=0)
    assert made.tokeniser.vocab == 300 and made.bytes_per_token > 1
    assert made.fingerprint["tokens"].startswith("bpe of 300, ")
    kept = generate.load_tokeniser(str(tmp_path / "run"), 300)
    assert kept == made.tokeniser
    nats = summary["loss"]
    assert summary["bits_per_byte"] == pytest.approx(nats / np.log(2) / made.bytes_per_token)
    scored = sum(int(batch["mask"].sum()) for batch in made.evaluation())
    _, heldout = text.from_glob(settings["data.glob"]).split(0.45)
    assert made.bytes_per_token == pytest.approx(sum(map(len, heldout.texts)) / scored)
    _, model, params, _ = generate.load(str(tmp_path / "run"))
    drawn = generate.sample(model, params, [tokens.BOS, *kept.encode("The ")], 5)
    assert "".join(generate.stream_text(drawn, kept))


# ---------------------------------------------------------------- tensorflow-datasets


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip(
        "tensorflow_datasets", reason="needs tensorflow-datasets: pip install -e '.[tfds]'"
    )


@pytest.fixture(scope="module")
def prepared(tfds, tmp_path_factory):
    """A folder with a tiny dataset, built without TensorFlow in the array_record format."""
    pytest.importorskip("array_record", reason="needs array_record: pip install -e '.[tfds]'")

    class TinySentences(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._rows(SENTENCES[:40]), "test": self._rows(SENTENCES[40:])}

        def _generate_examples(self):
            raise NotImplementedError

        def _rows(self, sentences):
            return ((i, {"text": s, "n": i}) for i, s in enumerate(sentences))

    folder = tmp_path_factory.mktemp("tfds")
    TinySentences(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def settings_of(folder, **changes):
    return {"name": "tfds", "dataset": "tiny_sentences", "folder": str(folder), "length": 16,
            "shuffle": 4, **changes}  # fmt: skip


def test_a_prepared_dataset_gives_batches(prepared):
    made = data.make(settings_of(prepared), batch=2, seed=0)
    assert made.fingerprint["source"] == "tfds tiny_sentences/1.0.0"
    assert made.heldout[0] == "test#00000000" and len(made.heldout) == len(SENTENCES) - 40
    scored = "".join(
        made.tokeniser.decode(batch["targets"][batch["mask"]]) for batch in made.evaluation()
    )
    assert sorted(scored.splitlines(True)) == sorted(SENTENCES[40:])
    batch = next(iter(made.train))
    assert batch["inputs"].shape == (2, 16)
    assert all(made.tokeniser.decode(row)[:6] in "".join(SENTENCES) for row in batch["inputs"])
    assert made.baselines()["bigram"] < 8


def test_a_mocked_dataset_gives_batches(tfds, prepared):
    """The published definition of a dataset, with random text in its place."""
    with tfds.testing.mock_data(num_examples=20):
        made = data.make(settings_of("", dataset="imdb_reviews"), batch=2, seed=0)
        batch = next(iter(made.train))
    assert batch["inputs"].shape == (2, 16) and made.fingerprint["train"] == "train, 20"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, "data.dataset='': allowed is a name"),
        ({"dataset": "no_such"}, "data.dataset='no_such'.*tfds build no_such"),
        ({"heldout": "validation"}, "splits 'train' and 'validation'"),
        ({"field": "body"}, "no feature 'body'; it has text, n"),
        ({"folder": "/nowhere"}, "folder '/nowhere'"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(prepared, changes, message):
    with pytest.raises(ValueError, match=message):
        data.make(settings_of(prepared) | changes, batch=2, seed=0)
