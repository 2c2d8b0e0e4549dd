"""What a corpus costs without a neural network, in bits per byte of the held-out files."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

_BEGIN = 256  # stands before the first byte of a document
_BLOCK = 1 << 22  # symbols that are counted at a time


def baselines(train_texts: Sequence[bytes], heldout_texts: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of the held-out documents.

    * `uniform`: 8.
    * `unigram`: add-one counts of the training bytes, p(b) = (n(b) + 1) / (n + 256).
    * `bigram`: add-one counts given the byte before, p(b|a) = (n(a,b) + 1) / (n(a) + 256); before a
      document's first byte stands a begin mark, fitted on the training documents' first bytes.
    * `zlib`: `zlib.compress(heldout, 9)` of the held-out documents one after another; it has not
      seen the training files.

    Args:
      train_texts: documents to fit on.
      heldout_texts: documents to score, with at least one byte in all.

    Raises:
      ValueError: no held-out byte.
    """
    size = sum(map(len, heldout_texts))
    if not size:
        raise ValueError("no held-out byte: the baselines need at least one; hold out a file")
    fitted, scored = _pair_counts(train_texts), _pair_counts(heldout_texts)
    unigram = _log2_add_one(fitted.sum(0))
    bigram = _log2_add_one(fitted)
    return {
        "uniform": 8.0,
        "unigram": float(-(scored.sum(0) * unigram).sum() / size),
        "bigram": float(-(scored * bigram).sum() / size),
        "zlib": 8.0 * len(zlib.compress(b"".join(heldout_texts), 9)) / size,
    }


def _log2_add_one(counts):
    """log2 of add-one probabilities over the last axis."""
    return np.log2(counts + 1.0) - np.log2(counts.sum(-1, keepdims=True) + counts.shape[-1])


def _pair_counts(texts) -> np.ndarray:
    """int64[257, 256]: how often byte b follows a, the begin mark being a = 256."""
    counts = np.zeros(257 * 257, np.int64)
    for before, after in _pairs(texts):
        counts += np.bincount(before * np.int64(257) + after, minlength=counts.size)
    return counts.reshape(257, 257)[:, :256]  # the last column counts begin marks after a byte


def _pairs(texts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Neighbours in the stream of documents, in blocks: (before uint16[n], after uint16[n])."""
    total = sum(len(text) + 1 for text in texts)
    stream = np.empty(total, np.uint16)
    end = 0
    for text in texts:
        stream[end] = _BEGIN
        stream[end + 1 : end + 1 + len(text)] = np.frombuffer(text, np.uint8)
        end += len(text) + 1
    for first in range(0, total - 1, _BLOCK):
        block = stream[first : first + _BLOCK + 1]
        yield block[:-1], block[1:]
