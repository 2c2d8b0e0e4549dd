"""Batches of the common format from documents and from task sources, with grain's Dataset API.

A batch is a dict of numpy arrays: inputs int32[B,T], targets int32[B,T] (the token that the output
at t predicts), mask bool[B,T] (whether it is scored) and, for text, reset bool[B,T] (the input at t
is the first token of a document). A task's further arrays pass through.

Training batches come from a grain IterDataset, whose iterators save and restore their place with
`get_state` and `set_state`. Evaluation is a fixed finite list of batches of the same shapes.

One of several processes makes its `share`, some rows of each batch. Batches, and the place in them,
are the same however many processes share them out.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from memjax.data.tokens import BYTES, PAD, Tokeniser

Batch = dict[str, np.ndarray]


class Documents:
    """Random-access source of documents for grain."""

    def __init__(self, texts: Sequence[bytes]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> bytes:
        return self.texts[index]


def examples(packed: dict[str, np.ndarray]) -> Batch:
    """Rows of T + 1 tokens (tokens, start: [..., T+1]) as inputs and shifted targets ([..., T]).

    A document's first token is never scored (nothing predicts it), nor is padding.
    """
    tokens, start = packed["tokens"].astype(np.int32), packed["start"].astype(bool)
    targets = tokens[..., 1:]
    return {
        "inputs": tokens[..., :-1],
        "targets": targets,
        "mask": (targets != PAD) & ~start[..., 1:],
        "reset": start[..., :-1],
    }


class _Restorable(grain.IterDataset):
    """A packer whose place can be restored from JSON also before its first row.

    grain marks "nothing is left over" by the tuple (-1, -1), which JSON hands back as a list and
    grain then takes for a slice. A shuffled window saves the place of its first row.
    """

    def __iter__(self):
        return _RestorableIterator(iter(self._parent))


class _RestorableIterator(grain.DatasetIterator):
    def __next__(self):
        return next(self._parent)

    def get_state(self):
        return self._parent.get_state()

    def set_state(self, state):
        left_over = {key: tuple(value) for key, value in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": left_over})


def text_rows(
    texts: Sequence[bytes],
    *,
    length: int,
    batch: int,
    seed: int,
    share: Sequence[int] | None = None,
    shuffle: int = 1,
    workers: int = 0,
    tokeniser: Tokeniser = BYTES,
) -> grain.IterDataset:
    """Endless training batches of packed documents.

    Documents are shuffled anew each epoch, then laid end to end and cut into rows of T + 1 tokens,
    and the rows are shuffled within windows: else the rows of a batch, and of the batches after
    it, would come from one long document. A row may begin inside a document: `reset` is False
    there. Where a row begins depends on all documents before it, so that one of several processes
    lays out all rows and then keeps its share.

    Args:
      texts: the documents.
      length: T, tokens of a row.
      batch: B, rows of one batch.
      seed: of the shuffle.
      share: the rows of each batch to make, all by default.
      shuffle: rows of a window within which rows are shuffled; 1 leaves them in order, which a
        memory that is carried from row to row needs.
      tokeniser: of the documents.
      workers: processes that pack; 0 packs in this one. It is part of the order of the data.
    """
    documents = grain.MapDataset.source(Documents(texts)).seed(seed).shuffle().repeat(None)
    documents = documents.map(tokeniser.document)
    row = {"tokens": length + 1, "start": length + 1}
    packed = grain.experimental.ConcatThenSplitIterDataset(_here(documents), length_struct=row)
    if shuffle > 1:
        packed = grain.experimental.WindowShuffleIterDataset(
            _Restorable(packed), window_size=shuffle, seed=seed
        )
    chosen = _index(share)
    rows = packed.batch(batch, drop_remainder=True).map(
        lambda whole: examples({key: array[chosen] for key, array in whole.items()})
    )
    if workers:
        _parse_absl_flags()
        rows = rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return rows


def task_rows(
    source: Any,
    *,
    batch: int,
    share: Sequence[int] | None = None,
    examples: int = 0,
    seed: int = 0,
) -> grain.IterDataset:
    """Endless batches of a task source in the order of its index, or of its first examples only,
    shuffled anew each epoch. Only the rows of the share are made.

    Args:
      source: random access; `source[i]` is a dict of arrays [T].
      batch: B, rows of one batch.
      share: the rows of each batch to make, all by default.
      examples: how many there are; 0 for all that the source has, in order.
      seed: of the shuffle.
    """
    numbers = grain.MapDataset.range(examples or len(source))
    if examples:
        numbers = numbers.seed(seed).shuffle()
    batches, chosen = _here(numbers.repeat(None)).batch(batch, drop_remainder=True), _index(share)
    return batches.map(lambda whole: _stacked([source[i] for i in whole[chosen]]))


class TextEvaluation:
    """Held-out documents laid end to end in order, in rows that overlap by one token.

    Row r covers tokens [rT, rT + T], so that every token is the scored target of exactly one
    position; the last row is padded with unscored tokens.
    """

    def __init__(self, texts: Sequence[bytes], length: int, tokeniser: Tokeniser = BYTES):
        parts = [tokeniser.document(text) for text in texts]
        self._stream = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        self._length = length
        self.tokens = len(self._stream["tokens"]) - len(parts)  # scored ones, in all rows

    def __len__(self) -> int:
        return math.ceil((len(self._stream["tokens"]) - 1) / self._length)

    def __getitem__(self, index: int) -> Batch:
        first = index * self._length
        row = {}
        for key, stream in self._stream.items():
            window = stream[first : first + self._length + 1]
            row[key] = np.pad(window, (0, self._length + 1 - len(window)))
        return examples(row)


def blank(row: Batch, batch: int) -> Batch:
    """A batch of rows of zeros with the shapes of `row`."""
    return {key: np.zeros((batch, *array.shape), array.dtype) for key, array in row.items()}


def evaluation_batches(
    rows: Any,
    *,
    count: int,
    batch: int,
    share: Sequence[int] | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Batches of the first `count` rows in order, all of one shape.

    The last is filled up with rows of zeros, whose mask is False.

    Args:
      rows: random access; `rows[i]` is a dict of arrays [T].
      count: number of rows to cover.
      batch: rows of one batch.
      share: the rows of each batch to make, all by default.
      limit: at most so many batches, spread evenly over the rows; None yields all.
    """
    total = math.ceil(count / batch)
    blank = {key: np.zeros_like(value) for key, value in rows[0].items()}
    kept = total if limit is None else min(limit, total)
    for number in range(kept):
        first = number * total // kept * batch
        indices = (first + row for row in (range(batch) if share is None else share))
        yield _stacked([rows[i] if i < count else blank for i in indices])


def _index(share: Sequence[int] | None) -> slice | list[int]:
    """What picks the rows `share` of an array."""
    return slice(None) if share is None else list(share)


def _stacked(rows: Sequence[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _here(dataset):
    """Read in the caller's thread: packing costs microseconds, and threads would take a core."""
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def _parse_absl_flags():
    """grain's workers read absl flags, which nothing has parsed in a notebook, pytest or script."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
