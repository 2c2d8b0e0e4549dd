"""Text of tensorflow-datasets without TensorFlow: datasets prepared in the array_record format."""

from collections.abc import Sequence
from typing import Any

from memjax.data.text import Corpus
from memjax.data.tokens import optional

HELDOUT = 1000  # documents of the held-out split that are used, its first ones


class Rows(Sequence):
    """The texts of a split, read when they are asked for."""

    def __init__(self, source: Any, field: str):
        self._source, self._field = source, field

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        text = self._source[index][self._field]
        if not isinstance(text, (str, bytes)):
            raise ValueError(
                f"the feature {self._field!r} holds {type(text).__name__}, no text: set data.field "
                "to the one that holds the text"
            )
        return text.encode() if isinstance(text, str) else text


def load(
    dataset: str, folder: str, train: str, heldout: str, field: str
) -> tuple[Rows, Corpus, dict[str, Any]]:
    """(training texts, held-out corpus, facts for the fingerprint).

    Args:
      dataset: name, with a config and a version where there are several, as "wikipedia/simple".
      folder: where prepared datasets lie; "" for tensorflow-datasets' own place.
      train, heldout: splits, in its own notation, as "train[:90%]".
      field: the feature that holds the text.

    Raises:
      ValueError: no such dataset, split or field, one that is not prepared, or a package that is
        not installed.
    """
    named = f"data.dataset={dataset!r}"
    package = optional("tensorflow_datasets", named)
    optional("array_record.python.array_record_module", named)
    try:
        builder = package.builder(dataset, data_dir=folder or None, file_format="array_record")
        sources = [builder.as_data_source(split=split) for split in (train, heldout)]
    except Exception as error:  # its exceptions share no base
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{named}, splits {train!r} and {heldout!r}, folder {folder!r}: {reason}; the dataset "
            "must be prepared in the array_record format: tfds build "
            f"{dataset} --file_format=array_record"
        ) from error
    features = builder.info.features
    if field not in features:
        raise ValueError(
            f"{named}: no feature {field!r}; it has {', '.join(features)}: set data.field to the "
            "one that holds the text"
        )
    rows, held = (Rows(source, field) for source in sources)
    for split, texts in ((train, rows), (heldout, held)):
        if not len(texts):
            raise ValueError(f"{named}: the split {split!r} is empty; choose a larger one")
    rows[0]  # refuses a field that is no text before anything else is done
    kept = [(f"{heldout}#{i:08d}", held[i]) for i in range(min(HELDOUT, len(held)))]
    facts = {
        "source": f"tfds {builder.info.full_name}",
        "train": f"{train}, {len(rows)}",
        "heldout": f"{heldout}, {len(kept)}",
        "field": field,
    }
    return rows, Corpus.of(kept), facts
