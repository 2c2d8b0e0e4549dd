"""What all tasks share: checks of settings, random access, and the words of a draw."""

import ast
import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import numpy as np

from memjax.tasks import draws

SPLITS = ("train", "test")

Example = dict[str, np.ndarray]


def parse_setting(text: str, known: Mapping[str, Any] | None = None) -> tuple[str, Any]:
    """The name and value in "pairs=4". A value that is no Python literal is text; so is one whose
    setting is, as in weights=2,1 or cells=based.

    known: the settings' defaults. Raises ValueError without "=".
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: expected SETTING=VALUE, such as pairs=4")
    try:
        found = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
    is_text = isinstance((known or {}).get(name), str) and not isinstance(found, str)
    return name, value if is_text else found


class Source:
    """A task's frozen dataclass derives from it and has `length`, `seed` and `split` among its
    fields.

    An example has arrays [length]: inputs (of vector inputs [length, features]), targets, mask,
    and where they mean something distance (tokens since the answer was shown), oracle (float32,
    nats of the best prediction that is possible) and bool ones that mark groups of scored
    positions; integers [] are facts of the whole row. `show` tells a person what is in it; a task
    whose rows need more words overrides it.
    """

    name: ClassVar[str]
    # Examples that are held out, unless a config says otherwise.
    eval_examples: ClassVar[int] = 3000

    length: Any
    seed: Any
    split: Any

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # of the task
            self._check_type(field.name, field.default)
        if self.split not in SPLITS:
            self._refuse(f"split={self.split!r} does not exist; allowed: {', '.join(SPLITS)}")
        self._check_seed("seed")

    @property
    def vocab(self) -> int:
        """Number of tokens, or of answers where the inputs are vectors."""
        raise NotImplementedError

    @property
    def features(self) -> int:
        """Numbers at a position of `inputs`; 0 where they are tokens."""
        return 0

    @property
    def queries(self) -> int:
        """The largest number of scored positions that a row can have."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The query accuracy of a guess."""
        raise NotImplementedError

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def show(self, example: Example) -> list[str]:
        """The example as lines of text: facts, scored positions and the groups they are in, row."""
        inputs, mask, distance = example["inputs"], example["mask"], example.get("distance")
        facts = {name: int(array) for name, array in example.items() if not array.ndim}
        groups = {
            name: array for name, array in example.items() if array.dtype == bool and name != "mask"
        }
        lines = [f"{name:9s} {value}" for name, value in facts.items()]
        lines.append("query     position   token  answer" + "   distance" * (distance is not None))
        for count, at in enumerate(np.flatnonzero(mask).tolist(), 1):
            line = f"{count:7d}   {at:8d}   {inputs[at]:5d}   {example['targets'][at]:5d}"
            line += "" if distance is None else f"   {distance[at]:8d}"
            lines.append(
                line + "".join(f"   {name}" for name, marks in groups.items() if marks[at])
            )
        lines += ["", "row (queries in brackets; the answer comes next, and is not in the row)"]
        words = [f"[{t}]" if m else f"{t} " for t, m in zip(inputs, mask, strict=True)]
        words = words[: np.flatnonzero(inputs).max(initial=0) + 1]  # without zeros that fill it up
        return lines + [
            "".join(f"{word:>7}" for word in words[start : start + 12])
            for start in range(0, len(words), 12)
        ]

    def _check_type(self, name: str, default: object) -> None:
        given, kind = getattr(self, name), type(default)
        allowed = {float: (float, int, np.floating), int: (int, np.integer)}.get(kind, kind)
        if not isinstance(given, allowed) or (isinstance(given, bool) and kind is not bool):
            self._refuse(
                f"{name}={given!r} has the type {type(given).__name__}; use one of type "
                f"{kind.__name__}, such as {default!r}"
            )

    def _check_seed(self, name: str) -> None:
        if not 0 <= getattr(self, name) < 2**64:
            self._refuse(f"{name}={getattr(self, name)} is out of range; allowed: 0 to 2**64 - 1")

    def _check_least(self, **least: int) -> None:
        for name, low in least.items():
            if getattr(self, name) < low:
                self._refuse(
                    f"{name}={getattr(self, name)} is out of range; allowed: {low} or more"
                )

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{self.name}: {reason}")

    def _bits(self, index: int, field: int) -> np.random.Philox:
        return draws.bits(self.seed, f"{self.name}/{self.split}", index, field)

    def _scored(self, at: np.ndarray | int, answers, ago) -> Example:
        """Targets, mask and distance of a row that is scored at the positions `at`.

        answers: the tokens to predict there; ago: how many tokens before `at` they were shown.
        """
        targets, distance = np.zeros((2, self.length), np.int32)
        mask = np.zeros(self.length, bool)
        targets[at], distance[at], mask[at] = answers, ago, True
        return {"targets": targets, "mask": mask, "distance": distance}

    def _index(self, index) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: example {index} is out of range; allowed: 0 to 2**31-1")
        return index
