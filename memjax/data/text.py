"""Corpora of bytes: the standard library's own sources, or any local files by a glob.

A corpus keeps names relative to where its files lie, sorted, so that its facts and its split are
the same on every machine that has the same files.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterable

from memjax.data.tokens import optional

# Directories of the standard library that are not its own prose: installed packages, tests, tables.
_SKIPPED_DIRECTORIES = frozenset({
    'site-packages', 'dist-packages', '__pycache__',
    'test', 'tests', 'idle_test',
    'encodings', 'pydoc_data',
})  # fmt: skip
# A large table, and files that a build or a machine writes (they hold local paths).
_SKIPPED_FILES = frozenset({"html/entities.py", "sitecustomize.py", "usercustomize.py"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Named documents.

    Attributes:
      names: relative names, '/' between parts, sorted, each once.
      texts: the documents' bytes, none empty, in the order of `names`.
    """

    names: tuple[str, ...]
    texts: tuple[bytes, ...]

    def __post_init__(self):
        if len(self.names) != len(self.texts) or list(self.names) != sorted(set(self.names)):
            raise ValueError(
                f"{len(self.names)} names for {len(self.texts)} texts: give as many, names sorted "
                "and each once; Corpus.of(pairs) does it"
            )
        if not self.names or not all(self.texts):
            raise ValueError(
                f"a corpus of {len(self.names)} documents, {sum(map(bool, self.texts))} not empty: "
                "it needs at least one, and no empty ones; Corpus.of(pairs) leaves those out"
            )

    @classmethod
    def of(cls, documents: Iterable[tuple[str, bytes]]) -> "Corpus":
        """Corpus of (name, bytes) pairs in any order; empty documents are left out.

        Raises:
          ValueError: no document with content, or one name twice.
        """
        kept = sorted((name, bytes(text)) for name, text in documents if text)
        return cls(tuple(name for name, _ in kept), tuple(text for _, text in kept))

    def split(self, holdout: float, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """Training and held-out corpus, by file.

        A file is held out when the hash of its name and `seed`, as a fraction, is below `holdout`,
        so adding a file moves no other.

        Args:
          holdout: expected fraction of the files to hold out, 0 < holdout < 1.
          seed: chooses another split.

        Raises:
          ValueError: `holdout` out of range, or one of the two sides would be empty.
        """
        if isinstance(holdout, bool) or not 0 < holdout < 1:
            raise ValueError(
                f"holdout={holdout}: allowed is a fraction of the files between 0 and 1, "
                "both excluded; 0.05 holds out one file in twenty"
            )
        if len(self.names) < 2:
            raise ValueError(
                f"holdout={holdout} of one file ({self.names[0]}): the split is by file and needs "
                "at least 2; cut the file into several, or match more files"
            )
        fractions = [_fraction(seed, name) for name in self.names]
        held = [fraction < holdout for fraction in fractions]
        if all(held) or not any(held):
            side = "training" if all(held) else "held-out"
            low = (math.floor(min(fractions) * 1e4) + 1) / 1e4
            high = math.floor(max(fractions) * 1e4) / 1e4
            raise ValueError(
                f"holdout={holdout} of {len(held)} files leaves no {side} file; for these files "
                f"allowed is {low} to {high}: set holdout there, or match more files"
            )
        return self._only(held, False), self._only(held, True)

    def _only(self, held, side):
        pairs = zip(self.names, self.texts, held, strict=True)
        return Corpus.of((name, text) for name, text, is_held in pairs if is_held == side)

    def facts(self) -> dict[str, int | str]:
        """What identifies the corpus wherever it lies: files, bytes, and two hashes.

        `names` is the hash of the sorted names with their sizes, `content` that of all bytes.
        """
        names, content = hashlib.sha256(), hashlib.sha256()
        for name, text in zip(self.names, self.texts, strict=True):
            names.update(_bytes(name) + b"\0%d\0" % len(text))
            content.update(b"%d\0" % len(text) + text)
        return {
            "files": len(self.names),
            "bytes": sum(map(len, self.texts)),
            "names": names.hexdigest()[:16],
            "content": content.hexdigest()[:16],
        }


def standard_library(root: str = "") -> Corpus:
    """The Python standard library's `.py` sources, about 9 MB, without tests and large tables.

    Left out: installed packages, test directories, `encodings`, `pydoc_data`, `html/entities.py`,
    and what a build writes (`_sysconfigdata*`, `config-*`, `sitecustomize.py`).

    Args:
      root: the library's directory; '' is that of the running Python.

    Raises:
      ValueError: there are no sources there.
    """
    root = root or sysconfig.get_path("stdlib")
    found = []
    for directory, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if not _skipped_directory(folder)]
        for file in files:
            path = os.path.join(directory, file)
            name = _relative(path, root)
            skipped = name in _SKIPPED_FILES or file.startswith(_SKIPPED_PREFIXES)
            if file.endswith(".py") and not skipped:
                found.append((name, path))
    if not found:
        raise ValueError(
            f"{root} has no .py files: this Python comes without the sources of its standard "
            "library; give text of your own, data.glob='~/books/**/*.txt'"
        )
    return _load(found, root)


def from_glob(pattern: str, field: str = "text") -> Corpus:
    """Every file that `pattern` matches, one document each; any bytes will do.

    Each line of a `.jsonl` file and each row of a `.parquet` file is a document, whose text is in
    `field`; its name is that of the file, "#" and its number from 0.

    Args:
      pattern: a glob; `~` is the home directory, `**` any depth. Names are relative to the part
        before its first wildcard.

    Raises:
      ValueError: it matches nothing, only directories, only empty files, or an unreadable file.
    """
    expanded = os.path.expanduser(pattern)
    matched = glob.glob(expanded, recursive=True)
    files = [path for path in matched if os.path.isfile(path)]
    if not matched:
        raise ValueError(
            f"data.glob={pattern!r} matches nothing (searched from {os.getcwd()}); it must match "
            "at least two files, as '~/books/**/*.txt'; '' takes the standard library"
        )
    if not files:
        inside = os.path.join(pattern.rstrip("*/"), "**", "*.txt")
        raise ValueError(
            f"data.glob={pattern!r} matches {len(matched)} paths, none of them a file (a directory "
            f"is not enough); it must match files: {inside!r} takes the text inside"
        )
    root = _fixed_part(expanded)
    found = [(_relative(path, root), path) for path in set(files)]
    return _load(found, f"data.glob={pattern!r}", field)


def _load(found, origin, field="text"):
    documents = []
    for name, path in found:
        read = _READERS.get(os.path.splitext(path)[1].lower(), _whole)
        try:
            documents += read(name, path, field)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"{origin}: cannot read {path} ({reason}); every file must be readable: mend it, "
                "change its permissions, or leave it out"
            ) from error
    if not any(text for _, text in documents):
        raise ValueError(
            f"{origin} has {len(documents)} files, all empty; at least two files need content: "
            "give files with text in them"
        )
    return Corpus.of(documents)


def _whole(name, path, field):
    with open(path, "rb") as file:
        return [(name, file.read())]


def _jsonl(name, path, field):
    documents = []
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number + 1}: no JSON ({error}); every line must be an object "
                    f"with the field {field!r}: mend the line, or the file's end if it was cut off"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                given = type(row).__name__
                if isinstance(row, dict):
                    given = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.items())
                raise ValueError(
                    f"{path}, line {number + 1}: no text in the field {field!r}; it has {given}: "
                    "set data.field to the one that holds the text"
                )
            documents.append((f"{name}#{number}", row[field].encode("utf-8", "surrogatepass")))
    return documents


def _parquet(name, path, field):
    parquet = optional("pyarrow.parquet", path)
    try:
        columns = parquet.read_schema(path).names
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole parquet file ({error}); download or write it again"
        ) from error
    if field not in columns:
        raise ValueError(
            f"{path}: no column {field!r}; it has {', '.join(columns)}: set data.field to the one "
            "that holds the text"
        )
    rows = parquet.read_table(path, columns=[field])[field].to_pylist()
    kinds = {type(row).__name__ for row in rows} - {"str", "NoneType"}
    if kinds:
        raise ValueError(
            f"{path}: the column {field!r} holds {', '.join(sorted(kinds))}, no text: set "
            "data.field to the one that holds the text"
        )
    return [(f"{name}#{i}", (row or "").encode()) for i, row in enumerate(rows)]


_READERS = {".jsonl": _jsonl, ".parquet": _parquet}


def _skipped_directory(name):
    return name in _SKIPPED_DIRECTORIES or name.startswith(_SKIPPED_PREFIXES)


def _fixed_part(pattern):
    """The directory before the first wildcard; a pattern without one is a file in its directory."""
    fixed = pattern
    while glob.has_magic(fixed) or fixed == pattern:
        shorter = os.path.dirname(fixed)
        if shorter == fixed:
            break
        fixed = shorter
    return fixed or os.curdir


def _relative(path, root):
    return os.path.relpath(path, root).replace(os.sep, "/")


def _bytes(name):
    return name.encode("utf-8", "surrogateescape")


def _fraction(seed, name):
    """A fixed number in [0, 1) of the name, uniform over names."""
    digest = hashlib.sha256(b"%d\0" % seed + _bytes(name)).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
