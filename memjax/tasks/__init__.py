"""Synthetic tasks: random-access sources that are a pure function of their settings (numpy only).

    source = tasks.make("mqar", length=64, pairs=8, vocab=1024, seed=0, split="train")
    source[5]  ->  {"inputs": int32[64], "targets": int32[64], "mask": bool[64], ...}

`source[i]` is the same in any order, process and release. `python -m memjax.tasks --show=mqar`
prints one example.
"""

import dataclasses
import difflib
from typing import Any

from memjax.tasks.bigrams import Bigrams
from memjax.tasks.formal import BracketArithmetic, ModularArithmetic, Parity
from memjax.tasks.group_words import GroupWords
from memjax.tasks.mad import Compression, Memorization, SelectiveCopy
from memjax.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from memjax.tasks.mqar import MQAR, ForgettingMQAR
from memjax.tasks.passkey import Passkey
from memjax.tasks.piecewise import Piecewise
from memjax.tasks.source import Source

_TASKS = {
    task.name: task
    for task in (
        *(MQAR, ForgettingMQAR),
        Passkey,
        *(Parity, ModularArithmetic, BracketArithmetic),
        GroupWords,
        *(InContextRecall, NoisyRecall, FuzzyRecall),
        *(SelectiveCopy, Compression, Memorization),
        Piecewise,
        Bigrams,
    )
}


def names() -> list[str]:
    """The names that `make` takes, sorted."""
    return sorted(_TASKS)


def make(name: str, **settings: Any) -> Source:
    """The source of a task; settings that are left out keep the defaults of its class.

    Raises ValueError for an unknown name or setting and for settings that are impossible.
    """
    if name not in _TASKS:
        raise ValueError(_unknown("task", name, names()))
    task = _TASKS[name]
    allowed = sorted(field.name for field in dataclasses.fields(task))
    for given in settings:
        if given not in allowed:
            raise ValueError(f"{name}: {_unknown('setting', given, allowed)}")
    return task(**settings)


def _unknown(what: str, given: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(given, allowed, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}; allowed: {', '.join(allowed)}.{hint}"
