"""Synthetic tasks: random-access sources that are a pure function of their settings (numpy only).

    source = tasks.make("mqar", length=64, pairs=8, vocab=1024, seed=0, split="train")
    source[5]  ->  {"inputs": int32[64], "targets": int32[64], "mask": bool[64], ...}

`source[i]` is the same in any order, process and release. `python -m memjax.tasks --show=mqar`
prints one example.
"""

import dataclasses
import difflib
from typing import Any

from memjax.tasks.associative_recall import AssociativeRecall
from memjax.tasks.bigrams import Bigrams
from memjax.tasks.formal import BracketArithmetic, ModularArithmetic, Parity
from memjax.tasks.group_words import GroupWords
from memjax.tasks.joint_recall import JointRecall
from memjax.tasks.mad import Compression, Memorization, SelectiveCopy
from memjax.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from memjax.tasks.mixture import Mixture
from memjax.tasks.mqar import MQAR, CompositionalMQAR, ForgettingMQAR
from memjax.tasks.passkey import Passkey
from memjax.tasks.piecewise import Piecewise
from memjax.tasks.source import Source
from memjax.tasks.stacked_mqar import StackedMQAR
from memjax.tasks.treecall import Treecall

_TASKS: dict[str, type[Any]] = {
    task.name: task
    for task in (
        MQAR,
        ForgettingMQAR,
        CompositionalMQAR,
        StackedMQAR,
        JointRecall,
        AssociativeRecall,
        Treecall,
        InContextRecall,
        NoisyRecall,
        FuzzyRecall,
        SelectiveCopy,
        Compression,
        Memorization,
        Parity,
        ModularArithmetic,
        BracketArithmetic,
        GroupWords,
        Piecewise,
        Bigrams,
        Passkey,
        Mixture,
    )
}


def names() -> list[str]:
    """The names that `make` takes, sorted."""
    return sorted(_TASKS)


def settings(name: str) -> dict[str, Any]:
    """The settings of a task with their defaults, but for `seed` and `split`.

    Raises ValueError for an unknown name.
    """
    fields = {field.name: field.default for field in dataclasses.fields(_task(name))}
    return {k: v for k, v in fields.items() if k not in ("seed", "split")}


def eval_examples(name: str) -> int:
    """The usual number of a task's examples that are held out."""
    return _task(name).eval_examples


def make(name: str, **settings: Any) -> Source:
    """The source of a task; settings that are left out keep the defaults of its class.

    Raises ValueError for an unknown name or setting and for settings that are impossible.
    """
    task = _task(name)
    allowed = sorted(field.name for field in dataclasses.fields(task))
    for given in settings:
        if given not in allowed:
            raise ValueError(f"{name}: {_unknown('setting', given, allowed)}")
    return task(**settings)


def _task(name: str) -> type[Any]:
    if name not in _TASKS:
        raise ValueError(_unknown("task", name, names()))
    return _TASKS[name]


def _unknown(what: str, given: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(given, allowed, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}; allowed: {', '.join(allowed)}.{hint}"
