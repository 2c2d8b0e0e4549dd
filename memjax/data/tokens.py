"""Byte tokens: 0 is padding, 1 begins a document, 2 is not used, byte b is b + 3."""

from collections.abc import Iterable

import numpy as np

PAD, BOS = 0, 1
OFFSET = 3
VOCAB = 256 + OFFSET


def encode(text: bytes | str) -> np.ndarray:
    """Tokens int32[N] in 3..258 of N bytes; a str is taken as UTF-8. No special token is added."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32) + OFFSET


def decode_bytes(ids: Iterable[int] | np.ndarray) -> bytes:
    """Bytes of a flat sequence of tokens; tokens that are no bytes are left out.

    Raises:
      ValueError: a token outside 0..258.
    """
    tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < VOCAB:
        raise ValueError(
            f"tokens from {tokens.min()} to {tokens.max()}: byte tokens are 0..{VOCAB - 1}; "
            f"use a model with vocab={VOCAB}, or the tokeniser that the model was trained with"
        )
    return (tokens[tokens >= OFFSET] - OFFSET).astype(np.uint8).tobytes()


def decode(ids: Iterable[int] | np.ndarray) -> str:
    """Text of a flat sequence of tokens; bytes that are not UTF-8 become U+FFFD."""
    return decode_bytes(ids).decode("utf-8", "replace")


def document(text: bytes) -> dict[str, np.ndarray]:
    """One document of N bytes for the packer: BOS, then its bytes.

    Returns:
      tokens int16[N + 1] and start bool[N + 1], which is True at BOS alone. Narrow types, because
      a document may be a whole book; `pipeline.examples` widens the batches.
    """
    tokens = np.empty(len(text) + 1, np.int16)
    tokens[0] = BOS
    tokens[1:] = np.frombuffer(text, np.uint8)
    tokens[1:] += OFFSET
    start = np.zeros(len(tokens), bool)
    start[0] = True
    return {"tokens": tokens, "start": start}
