"""Tokens of text: bytes, or a byte-pair encoding that is trained on the spot.

Tokens 0 to 2 are no text in either: 0 is padding, 1 begins a document, 2 is not used.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

PAD, BOS = 0, 1
OFFSET = 3  # tokens that are no text
# No text has them: it reaches the model as characters up to U+00FF.
_SPECIAL = ("\u0100pad", "\u0100begin", "\u0100unused")
# Words, numbers and everything that is not ASCII; punctuation; white space: merges stay inside.
_PIECES = r" ?[A-Za-z0-9_\x80-\xff]+| ?[^\sA-Za-z0-9_\x80-\xff]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """Bytes to tokens and back, without loss.

    pieces: the bytes that each token stands for, b"" for those that are no text.
    model: JSON of the `tokenizers` package, or "" where a token is a byte.
    """

    pieces: tuple[bytes, ...]
    model: str = ""

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    def encode(self, text: bytes | str) -> np.ndarray:
        """Tokens int32[N] of a text; a str is taken as UTF-8. No special token is added."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        if self.model:
            return np.array(_bpe(self.model).encode(data.decode("latin-1")).ids, np.int32)
        return np.frombuffer(data, np.uint8).astype(np.int32) + OFFSET

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """Bytes of a flat sequence of tokens; tokens that are no text are left out.

        Raises:
          ValueError: a token outside 0..vocab - 1.
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab:
            raise ValueError(
                f"tokens from {tokens.min()} to {tokens.max()}: this tokeniser has 0.."
                f"{self.vocab - 1}; use the one that the model was trained with"
            )
        return b"".join(map(self.pieces.__getitem__, tokens))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of a flat sequence of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def document(self, text: bytes) -> dict[str, np.ndarray]:
        """One document of N tokens for the packer: BOS, then its text.

        Returns:
          tokens int16[N + 1] (int32 for more than 32,768 tokens) and start bool[N + 1], which is
          True at BOS alone. Narrow types, because a document may be a whole book;
          `pipeline.examples` widens the batches.
        """
        ids = self.encode(text)
        tokens = np.empty(len(ids) + 1, np.int16 if self.vocab <= 2**15 else np.int32)
        tokens[0], tokens[1:] = BOS, ids
        start = np.zeros(len(tokens), bool)
        start[0] = True
        return {"tokens": tokens, "start": start}


BYTES = Tokeniser((b"",) * OFFSET + tuple(bytes([b]) for b in range(256)))


def train_bpe(texts: Iterable[bytes], vocab: int) -> Tokeniser:
    """A byte-pair encoding of `vocab` tokens (Sennrich et al. 2016), the same for the same texts.

    Raises:
      ValueError: `vocab` is below 259, the bytes and the tokens that are no text; the texts have
        too little to merge; or the package `tokenizers` is not installed.
    """
    if vocab < BYTES.vocab:
        raise ValueError(
            f"data.bpe={vocab}: allowed is 0 for bytes, or at least {BYTES.vocab}: every byte is a "
            "token; 4096 suits a few megabytes"
        )
    package = optional("tokenizers", f"data.bpe={vocab}")
    model = package.Tokenizer(package.models.BPE())
    model.pre_tokenizer = package.pre_tokenizers.Split(package.Regex(_PIECES), "isolated")
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(_SPECIAL),
        initial_alphabet=[chr(byte) for byte in range(256)],
        show_progress=False,
    )
    model.train_from_iterator((text.decode("latin-1") for text in texts), trainer)
    found = model.get_vocab_size()
    if found < vocab:
        raise ValueError(
            f"data.bpe={vocab}: the training text gives no more than {found} tokens; ask for at "
            "most that, or give more text"
        )
    return from_json(model.to_str())


def from_json(model: str) -> Tokeniser:
    """The tokeniser of `Tokeniser.model`."""
    tokens = _bpe(model).get_vocab()
    pieces = [b""] * len(tokens)
    for text, index in tokens.items():
        if index >= OFFSET:
            pieces[index] = text.encode("latin-1")
    return Tokeniser(tuple(pieces), model)


@functools.lru_cache(maxsize=4)
def _bpe(model: str) -> Any:
    return optional("tokenizers", "byte-pair encoding").Tokenizer.from_str(model)


def optional(package: str, what: str) -> Any:
    """Imports an optional package; ValueError with what to do when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{what} needs the package {package.partition('.')[0]}, which cannot be imported "
            f"({error}); run `pip install -e '.[tfds]'`, or '.[text]' without tensorflow-datasets"
        ) from error


def sample(texts: Sequence[bytes], limit: int) -> list[bytes]:
    """The first texts, up to `limit` bytes, at least one."""
    kept: list[bytes] = []
    size = 0
    for text in texts:
        if kept and size + len(text) > limit:
            break
        kept.append(text)
        size += len(text)
    return kept
