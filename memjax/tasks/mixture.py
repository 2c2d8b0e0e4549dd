"""A mixture of one task's rows with different sizes, such as MQAR with 4 to 64 pairs.

    tasks.make("mixture", task="mqar", cells="64x4,64x8,128x32", weights="2,1,1")
    tasks.make("mixture", task="mqar", cells="based", order="published")

A cell is a length and a number of pairs. Rows are padded to the longest cell and carry the fact
`part`, the number of their cell.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import numpy as np

from memjax.tasks import draws
from memjax.tasks.source import SPLITS, Example, Source, parse_setting

_PART = 0  # number of the draw
ORDERS = ("mixed", "published")
EACH = 1000  # rows of a cell whose number is not said, in the published order


@dataclasses.dataclass(frozen=True)
class Cells:
    """Length x pairs of each cell; their weights, or rows, "" for equal ones; and settings."""

    sizes: str
    rows: str = ""
    settings: str = ""


def _zoology(cell: str) -> dict[str, Cells]:
    rows = {"train": "100000", "test": "3000"}
    return {split: Cells(cell, rows[split], "noise=False") for split in SPLITS}


_ROWS = "100000,20000,20000,20000,20000"
_BASED = {
    "train": Cells("64x4,128x8,256x16,256x32,256x64", _ROWS),
    "test": Cells("64x4,64x8,64x16,128x32,256x64,512x128,1024x256"),
}
_SQUARES = {
    "train": Cells("64x4,128x9,256x16,256x25,256x36", _ROWS),
    "test": Cells("64x4,64x9,128x16,256x36,512x64,1024x144,2048x256"),
}
_STACKED = {
    "train": Cells("8x4,16x8,32x16,64x32,128x64", _ROWS),
    "test": Cells("8x4,16x8,32x16,64x32,128x64,256x128,512x256"),
}
# By task, name and split. "based": the recall-memory tradeoff of Based (arXiv:2402.18668).
# "zoology_..": the panels of figure 2 of Zoology (arXiv:2312.04927), one cell each. "published":
# those of Zoology's code.
PUBLISHED: dict[str, dict[str, dict[str, Cells]]] = {
    "mqar": {
        "based": _BASED,
        "zoology_64": _zoology("64x4"),
        "zoology_128": _zoology("128x8"),
        "zoology_256": _zoology("256x16"),
        "zoology_512": _zoology("512x64"),
    },
    "forgetting_mqar": {"published": _SQUARES},
    "compositional_mqar": {"published": _SQUARES},
    "stacked_mqar": {"published": _STACKED},
}


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """With zeros behind it; a fact of the row as it is."""
    if not array.ndim:
        return array
    row = np.zeros((length, *array.shape[1:]), array.dtype)
    row[: len(array)] = array
    return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Source):
    """Rows of one task in several sizes.

    Args:
      task: a task with the settings `length` and `pairs`.
      cells: "64x4,128x8,.." (length x pairs), or a name in PUBLISHED[task], which stands for the
        training cells in the split "train" and for the test cells in "test"; "<name>_train" and
        "<name>_test" for one of them in both splits.
      weights: "5,1,.." one number for each of the `cells` that are written out, such as its rows;
        "" for equal ones. A name has its own.
      settings: the task's other settings, "vocab=1024,noise=False"; they override those of a name.
      order: "mixed" draws the cell of every row by weight and never repeats a row. "published" has
        a finite set, in which `weights` are numbers of rows (1000 each when not said): cell after
        cell, then all of it again, as in Zoology's training.
      seed: 0 to 2**64 - 1.
      split: "train" or "test", two disjoint streams.
    Raises ValueError for settings that are impossible.

    `length` is that of the longest cell. `source[i]`, i below 2**31, holds what the task's rows do,
    padded with zeros on the right, and of the whole row
      part: int32[], the number of the cell.
    """

    name: ClassVar[str] = "mixture"

    task: str = "mqar"
    cells: str = "64x4,64x8,64x16,128x32"
    weights: str = ""
    settings: str = ""
    order: str = "mixed"
    seed: int = 0
    split: Literal["train", "test"] = "train"

    def __post_init__(self):
        super().__post_init__()
        if self.order not in ORDERS:
            self._refuse(f"order={self.order!r} does not exist; allowed: {', '.join(ORDERS)}")
        _ = self.parts, self._shares  # every part is made, and refuses what is impossible

    @functools.cached_property
    def parts(self) -> tuple[Source, ...]:
        """The sources of the cells."""
        from memjax import tasks  # it knows this task, too

        able = [
            name for name in tasks.names() if {"length", "pairs"} <= tasks.settings(name).keys()
        ]
        if self.task in tasks.names() and self.task not in able:
            self._refuse(
                f"task={self.task!r} has no settings length and pairs; allowed: {', '.join(able)}"
            )
        settings = {**self._parsed(self._cells.settings), **self._parsed(self.settings)}
        settings |= {"seed": self.seed, "split": self.split}
        sizes = map(self._size, self._cells.sizes.split(","))
        return tuple(tasks.make(self.task, **settings, **size) for size in sizes)

    @property
    def length(self) -> int:
        """Tokens of a row: those of the longest cell."""
        return max(part.length for part in self.parts)

    @property
    def vocab(self) -> int:
        """That of the task."""
        return self.parts[0].vocab

    @property
    def features(self) -> int:
        """Those of the task."""
        return self.parts[0].features

    @property
    def queries(self) -> int:
        """The largest number of scored positions of a row."""
        return max(part.queries for part in self.parts)

    @property
    def chance(self) -> float:
        """The mean accuracy of a guess over rows."""
        return float(np.diff(self._shares, prepend=0) @ [part.chance for part in self.parts])

    @functools.cached_property
    def _cells(self) -> Cells:
        """Those of the name, or those that are written out."""
        name, split = self.cells, str(self.split)
        for half in SPLITS:
            if name.endswith("_" + half):
                name, split = name.removesuffix("_" + half), half
        named = PUBLISHED.get(self.task, {}).get(name)
        if named and self.weights:
            self._refuse(
                f"weights={self.weights!r} has no use: cells={self.cells!r} has its own; write the "
                "cells out, or leave weights out"
            )
        return named[split] if named else Cells(self.cells, self.weights)

    def _size(self, cell: str) -> dict[str, int]:
        length, _, pairs = cell.strip().partition("x")
        if not (length.isdecimal() and pairs.isdecimal()):
            names = ", ".join(PUBLISHED.get(self.task, {})) or "none"
            self._refuse(
                f"{cell!r} is no cell; write length x pairs, such as cells='64x4,128x8', or a name "
                f"that task={self.task!r} has: {names}"
            )
        return {"length": int(length), "pairs": int(pairs)}

    def _parsed(self, settings: str) -> dict[str, object]:
        try:
            found = dict(parse_setting(text.strip()) for text in settings.split(",") if text)
        except ValueError as error:
            self._refuse(f"settings={settings!r}: {error}")
        for name in {"length", "pairs", "seed", "split"} & found.keys():
            self._refuse(f"settings={settings!r}: {name} is no setting of the parts; leave it out")
        return found

    @functools.cached_property
    def _shares(self) -> np.ndarray:
        """Cumulative shares of the cells, the last one 1. float64[parts]."""
        return np.cumsum(self._rows) / sum(self._rows)

    @functools.cached_property
    def _rows(self) -> list[float]:
        """Weight or number of rows of each cell."""
        weights = self._cells.rows
        if not weights:
            return [EACH] * len(self.parts)
        try:
            rows = [float(weight) for weight in weights.split(",")]
        except ValueError:
            rows = []
        whole = self.order == "mixed" or all(row.is_integer() for row in rows)
        if len(rows) != len(self.parts) or not whole or not all(0 < row < 2**53 for row in rows):
            kind = "positive numbers" if self.order == "mixed" else "positive numbers of rows"
            self._refuse(
                f"weights={weights!r} with order={self.order!r} are not {len(self.parts)} {kind}, "
                "one for each cell, such as '2,1'"
            )
        return rows

    def __getitem__(self, index: int) -> Example:
        index = self._index(index)
        if self.order == "published":
            index %= int(sum(self._rows))
            part = int(np.searchsorted(np.cumsum(self._rows), index, side="right"))
        else:
            u = draws.uniforms(self._bits(index, _PART), 1)[0]
            part = int(np.searchsorted(self._shares[:-1], u, side="right"))
        padded = {
            name: _padded(array, self.length) for name, array in self.parts[part][index].items()
        }
        return {**padded, "part": np.array(part, np.int32)}

    def show(self, example: Example) -> list[str]:
        """The row as its task shows it, under its cell."""
        number = int(example["part"])
        part = self.parts[number]
        row = {
            name: array[: part.length] if array.ndim else array
            for name, array in example.items()
            if name != "part"
        }
        cell = f"part      {number}: {part.name}, length={part.length}, pairs={row['pairs']}"
        return [cell, "", *part.show(row)]
