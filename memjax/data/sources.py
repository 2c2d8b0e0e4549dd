"""`make`: from `config.data` to training batches, evaluation batches and their fingerprint."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain

from memjax import tasks
from memjax.data import baselines, pipeline, text, tfds, tokens

# What the pipeline does with the same settings; raised when a change of code changes the batches.
_VERSION = 1
# Bytes of training text that the baselines and a byte-pair encoding are fitted on.
_SAMPLE = 2**26


def _examples(task):
    """How many examples are held out, and how many a run trains on again and again, 0 for new
    ones at every step."""
    return {"eval_examples": tasks.eval_examples(task), "train_examples": 0}


# The settings of each source, with their defaults; a default's type is the setting's type.
_ROWS: dict[str, Any] = {"length": 512, "shuffle": 1024, "workers": 0, "bpe": 0, "field": "text"}
SETTINGS: dict[str, dict[str, Any]] = {
    "text": {"glob": "", "holdout": 0.05, **_ROWS},
    "tfds": {"dataset": "", "folder": "", "train": "train", "heldout": "test", **_ROWS},
    **{name: {**tasks.settings(name), **_examples(name)} for name in tasks.names()},
}


@dataclasses.dataclass(frozen=True)
class Data:
    """A source of batches; their format is described in `memjax.data.pipeline`.

    Attributes:
      train: endless batches. `iter(train)` gives an iterator with `get_state` and
        `set_state`; with workers, `close()` it after use.
      example: a training batch of zeros, for its shapes; like all batches, the rows of `share`.
      evaluation: called with no argument it yields every evaluation batch, the same each time;
        `evaluation(n)` yields at most n of them, spread evenly.
      evaluation_count: number of batches of `evaluation()`.
      vocab: number of tokens.
      features: F, numbers that a position of `inputs` holds in place of a token; 0 for tokens.
      length: T, tokens of a training row.
      queries: the largest number of scored positions of a training row, or None for all (text).
      evaluation_length, evaluation_queries: those of an evaluation row.
      bytes_per_token: bytes that a scored target of the held-out text stands for on average, so
        that its bits per byte are nats per scored target / ln 2 / bytes_per_token; None where
        targets are no text.
      heldout: names of the held-out files in the order of `evaluation`; () for tasks.
      tokeniser: of text, or None where tokens are no text.
      chance: the query accuracy of a guess; None for text.
      baselines: computes reference figures by name: bits per byte of the held-out files for text,
        the query accuracy of a guess (`chance`) for tasks.
      fingerprint: everything the order of the training data depends on, with its `hash`.
    """

    train: grain.IterDataset
    example: pipeline.Batch
    evaluation: Callable[..., Iterator[pipeline.Batch]]
    evaluation_count: int
    vocab: int
    features: int
    length: int
    queries: int | None
    evaluation_length: int
    evaluation_queries: int | None
    bytes_per_token: float | None
    heldout: tuple[str, ...]
    tokeniser: tokens.Tokeniser | None
    chance: float | None
    baselines: Callable[[], dict[str, float]]
    fingerprint: dict[str, Any]


def make(
    config_data: Mapping[str, Any],
    *,
    batch: int,
    seed: int,
    share: Sequence[int] | None = None,
    read: bool = True,
) -> Data:
    """The data that `config_data` describes.

    The held-out files and a task's evaluation examples do not depend on `seed`, so that runs with
    different seeds are measured on the same data.

    Args:
      config_data: `name`, one of `SETTINGS`, and any of that source's settings; a setting that is
        left out has its default. A task may have `test`, the settings that differ in evaluation.
      batch: rows of a step.
      seed: of the training order (text) or of the training examples (tasks), 0 to 2**32 - 1.
      share: the rows of each batch, counted from 0, that one of several processes makes; all by
        default. Batches, their order and the fingerprint do not depend on it.
      read: False for blank text of the same shapes and number of tokens, whatever files there are.

    Raises:
      ValueError: an unknown source or setting, a value of the wrong type or out of range, or files
        that do not allow a split.
    """
    name, settings = _settings(config_data)
    _check(isinstance(seed, numbers.Integral) and 0 <= seed < 2**32,
           f'seed={seed}', 'an integer from 0 to 2**32 - 1', 'choose another')  # fmt: skip
    _check(isinstance(batch, numbers.Integral) and batch >= 1,
           f'batch={batch}', 'a positive number of rows', 'use 1 or more')  # fmt: skip
    order = {"seed": int(seed), "batch": int(batch), "pipeline": _VERSION}
    texts = {"text": _text, "tfds": _tfds} if read else dict.fromkeys(("text", "tfds"), _blank)
    build = texts.get(name, functools.partial(_task, name))
    return build(settings, int(batch), int(seed), share, order)


def _text(settings, batch, seed, share, order):
    glob = settings["glob"]
    corpus = text.from_glob(glob, settings["field"]) if glob else text.standard_library()
    train, heldout = corpus.split(settings["holdout"])
    facts = {"source": "files" if glob else "python standard library", **corpus.facts()}
    facts["holdout"] = settings["holdout"]
    return _documents(train.texts, heldout, facts, settings, batch, seed, share, order)


def _tfds(settings, batch, seed, share, order):
    _check(settings["dataset"], "data.dataset=''", "a name of tensorflow-datasets, such as 'lm1b'",
           "see tensorflow.org/datasets")  # fmt: skip
    names = {key: settings[key] for key in ("dataset", "folder", "train", "heldout", "field")}
    train, heldout, facts = tfds.load(**names)
    return _documents(train, heldout, facts, settings, batch, seed, share, order)


def _blank(settings, batch, seed, share, order):
    corpus = text.Corpus.of([("blank", b" ")])
    pieces = (b" ",) * (settings["bpe"] or tokens.BYTES.vocab)
    given = {**settings, "bpe": 0}
    return _documents(
        corpus.texts, corpus, {}, given, batch, seed, share, order, tokens.Tokeniser(pieces)
    )


def _documents(train, heldout, facts, settings, batch, seed, share, order, tokeniser=tokens.BYTES):
    """Data of training texts (any sequence of bytes) and a held-out corpus. tokeniser: where
    `bpe` asks for none to be trained."""
    length, workers, bpe = settings["length"], settings["workers"], settings["bpe"]
    _check(length >= 1, f"data.length={length}", "at least 1", "use 512")
    _check(
        settings["shuffle"] >= 1,
        f"data.shuffle={settings['shuffle']}",
        "at least 1",
        "use 1 to keep the rows in order",
    )
    _check(workers >= 0, f"data.workers={workers}", "at least 0", "use 0 to pack in this process")
    named = "bytes"
    if bpe:
        tokeniser = tokens.train_bpe(tokens.sample(train, _SAMPLE), bpe)
        digest = hashlib.sha256(tokeniser.model.encode()).hexdigest()[:16]
        named = f"bpe of {bpe}, {digest}"
    rows = pipeline.TextEvaluation(heldout.texts, length, tokeniser)
    size = sum(map(len, heldout.texts))
    fingerprint = _fingerprint(
        **facts,
        tokens=named,
        packing="concat",
        length=length,
        shuffle=settings["shuffle"],
        workers=workers,
        **order,
    )
    return Data(
        train=pipeline.text_rows(
            train,
            length=length,
            batch=batch,
            seed=seed,
            share=share,
            shuffle=settings["shuffle"],
            workers=workers,
            tokeniser=tokeniser,
        ),
        example=pipeline.blank(rows[0], batch if share is None else len(share)),
        **_evaluation(rows, len(rows), batch, share),
        vocab=tokeniser.vocab,
        features=0,
        length=length,
        queries=None,
        evaluation_length=length,
        evaluation_queries=None,
        bytes_per_token=size / rows.tokens,
        heldout=heldout.names,
        tokeniser=tokeniser,
        chance=None,
        baselines=lambda: baselines.baselines(tokens.sample(train, _SAMPLE), heldout.texts),
        fingerprint=fingerprint,
    )


def _task(name, settings, batch, seed, share, order):
    facts = dict(settings)
    count, trained, other = map(settings.pop, ("eval_examples", "train_examples", "test"))
    _check(count >= 1, f"data.eval_examples={count}", "at least 1", "use 3000")
    _check(trained >= 0, f"data.train_examples={trained}", "at least 0",
           "use 0 for new examples at every step")  # fmt: skip
    source = tasks.make(name, split="train", seed=seed, **settings)
    test = tasks.make(name, split="test", seed=0, **{**settings, **other})
    for fact in ("vocab", "features"):
        expected, found = getattr(source, fact), getattr(test, fact)
        _check(expected == found, f"{fact} {found} by the settings of data.test",
               f"{expected}, as in training", "leave it out there")  # fmt: skip
    return Data(
        train=pipeline.task_rows(source, batch=batch, share=share, seed=seed, examples=trained),
        example=pipeline.blank(source[0], batch if share is None else len(share)),
        **_evaluation(test, count, batch, share),
        vocab=source.vocab,
        features=source.features,
        length=source.length,
        queries=source.queries,
        evaluation_length=test.length,
        evaluation_queries=test.queries,
        bytes_per_token=None,
        heldout=(),
        tokeniser=None,
        chance=test.chance,
        baselines=lambda: {"chance": test.chance},
        fingerprint=_fingerprint(source=name, **facts, packing="none", workers=0, **order),
    )


def _evaluation(rows, count, batch, share):
    def evaluation(limit: int | None = None) -> Iterator[pipeline.Batch]:
        _check(limit is None or limit >= 1, f'{limit} evaluation batches', 'at least 1, or None',
               'None evaluates on everything')  # fmt: skip
        return pipeline.evaluation_batches(rows, count=count, batch=batch, share=share, limit=limit)

    return {"evaluation": evaluation, "evaluation_count": math.ceil(count / batch)}


def _fingerprint(**facts):
    text_of_facts = json.dumps(facts, sort_keys=True)
    return {**facts, "hash": hashlib.sha256(text_of_facts.encode()).hexdigest()[:16]}


def _settings(config_data):
    """The source's name and all of its settings, checked by name and type."""
    given = dict(config_data.items())
    name = given.pop("name", None)
    if name not in SETTINGS:
        raise ValueError(
            f"data.name={name!r}: allowed sources are {', '.join(SETTINGS)}; "
            f"choose one{_near(name, SETTINGS)}"
        )
    defaults = SETTINGS[name]
    test = dict(given.pop("test", {}).items()) if name in tasks.names() else {}
    settings = {**defaults, **_checked("data", name, given, defaults)}
    if name in tasks.names():
        known = {key: value for key, value in defaults.items() if key not in _examples(name)}
        settings["test"] = _checked("data.test", name, test, known)
    return name, settings


def _checked(where, name, given, defaults):
    """The given settings in the types of their defaults."""
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(
                f"{where}.{key}={value!r}: the source {name!r} has no such setting; allowed are "
                f"{', '.join(sorted(defaults))}{_near(key, defaults)}"
            )
    return {
        key: _typed(f"{where}.{key}", value, type(defaults[key])) for key, value in given.items()
    }


def _typed(key, value, kind):
    accepts = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}[kind]
    is_flag = isinstance(value, bool)
    if not isinstance(value, accepts) or is_flag != (kind is bool):
        words = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
        raise ValueError(
            f"{key}={value!r} is of type {type(value).__name__}; "
            f"it must be {words[kind]}: change it in the config"
        )
    return kind(value)


def _near(word, names):
    close = difflib.get_close_matches(str(word), list(names), 1, 0.5)
    return f". Did you mean {close[0]!r}?" if close else ""


def _check(valid, given, allowed, remedy):
    if not valid:
        raise ValueError(f"{given}: allowed is {allowed}; {remedy}")
