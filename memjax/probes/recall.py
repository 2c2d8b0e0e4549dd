"""How well given pairs are recalled: scores of answers, and the probes of an untrained cell.

A cell writes two lists of random unit pairs: one of different keys, for capacity, recall by age and
interference; and one of a few keys that are bound again and again, for overwriting. It is asked
after every few writes. Answers are divided by what a pair that is alone is answered with
(`pairs.gain`), so that scales and steps of cells can be compared.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from memjax.cell import MemoryCell, initial_state
from memjax.cells._matrix import MatrixMemory
from memjax.probes import laws, pairs, states
from memjax.typing import Float, fields


class Scores(NamedTuple):
    """error: ||answer - value||^2 / ||value||^2. cosine: of their angle. right: top-1, 1 where no
    other candidate is nearer in angle, 1 / n where n are as near. [..., m] each."""

    error: np.ndarray
    cosine: np.ndarray
    right: np.ndarray


def scores(
    answers: Float[np.ndarray, "... m V"],
    values: Float[np.ndarray, "... m V"],
    candidates: Float[np.ndarray, "... n V"],
    distractors: Float[np.ndarray, "d V"],
) -> Scores:
    """answers against the values that are right, among the candidates of a sequence, which hold
    them, and distractors that all sequences share."""
    power = np.square(values).sum(axis=-1)
    error = np.square(answers - values).sum(axis=-1) / power
    own = np.sum(answers * values, axis=-1) / np.sqrt(power)
    least = (own - 1e-5 * np.abs(own))[..., None]  # what is as near, up to rounding
    nearer, near = np.zeros(own.shape, bool), np.zeros(own.shape, int)
    for others in (candidates, distractors):
        others = others / np.linalg.norm(others, axis=-1, keepdims=True)
        products = answers @ np.swapaxes(others, -1, -2)
        nearer |= (products > 2 * own[..., None] - least).any(axis=-1)
        near += (products >= least).sum(axis=-1)
    return Scores(error, states.cosine(answers, values), np.where(nearer, 0, 1 / near))


@dataclasses.dataclass(frozen=True)
class Study:
    """What `probe` measures on. dim: K = V. seeds: lists. pairs: of the longest list; 2, 4, 8, ..
    times `keys`. every: writes between two times of asking. keys: of the list whose keys are bound
    again, and of the first context of interference; 1, 2, 4, .. times `every`. distractors: values
    that are never stored. keep, strength: of what fades and of rates, see `pairs.tokens`. seed: of
    the draws."""

    dim: int = 64
    seeds: int = 8
    pairs: int = 256
    every: int = 16
    keys: int = 32
    distractors: int = 4096
    keep: float = 1.0
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, least in (("keys", self.every), ("pairs", 2 * self.keys)):
            if getattr(self, name) not in [least * 2**i for i in range(20)]:
                raise ValueError(
                    f"{name}={getattr(self, name)}: allowed are {least}, {2 * least}, {4 * least}, "
                    "and so on, each twice the one before"
                )
        if min(self.seeds, self.dim) < 2:
            raise ValueError(f"seeds={self.seeds}, dim={self.dim}: allowed is 2 or more")

    @property
    def counts(self) -> list[int]:
        """Numbers of pairs at which capacity is measured."""
        return [self.every * 2**i for i in range(20) if self.every * 2**i <= self.pairs]


class Lists(NamedTuple):
    """keys, values: [2 seeds, pairs, dim], the second half of the rows with keys bound again.
    distractors: [n, dim]."""

    keys: np.ndarray
    values: np.ndarray
    distractors: np.ndarray


def draw(study: Study) -> Lists:
    """The lists of a study, the same for all cells."""
    rng = np.random.default_rng(study.seed)
    shape = 2 * study.seeds, study.pairs, study.dim
    keys, values = pairs.unit(rng, *shape), pairs.unit(rng, *shape)
    again = keys[study.seeds :, : study.keys]
    keys[study.seeds :] = np.tile(again, (1, study.pairs // study.keys, 1))
    return Lists(keys, values, pairs.unit(rng, study.distractors, study.dim))


class Answers(NamedTuple):
    """What one cell did with the lists. after: number of writes -> answers [2 seeds, pairs, dim] to
    all keys. norm, write: [pairs, seeds]; rank: [times, seeds]; of the lists of different keys."""

    after: dict[int, np.ndarray]
    norm: np.ndarray
    write: np.ndarray
    rank: np.ndarray
    gain: float


def answer(cell: MemoryCell, study: Study, lists: Lists) -> Answers:
    """Writes the lists and asks for all keys after every few writes."""
    seeds = study.seeds
    params = cell.init_params(jax.random.key(study.seed), 1)
    xs = pairs.tokens(cell, lists.keys, lists.values, keep=study.keep, strength=study.strength)
    norm, write, held = states.timeline(cell, params, xs, study.every)
    first = jax.tree.map(lambda a: a[:, :1], xs)
    gain = pairs.gain(cell, params, first, lists.values[:, :1])
    y = np.asarray(pairs.ask(cell, params, held, xs))[..., 0, :] / gain
    different = jax.tree.map(lambda a: a[:, :seeds], held)
    rank = states.effective_rank(states.read_map(cell, params, different)[:, :, 0])
    after = {study.every * (i + 1): given for i, given in enumerate(y)}
    norm, write = (np.asarray(a)[:, :seeds, 0] for a in (norm, write))
    return Answers(after, norm, write, rank, gain)


# ---------------------------------------------------------------- the probes


def averaged(figures: Mapping[str, np.ndarray], **about: Any) -> dict[str, Any]:
    """A row: what it is about, and of each figure [seeds, ...] the mean and the standard deviation
    of the seeds' means."""
    row = dict(about)
    for name, values in figures.items():
        each = values.reshape(len(values), -1).mean(axis=1)
        row |= {name: float(each.mean()), f"{name}_sd": float(each.std(ddof=1))}
    return row


def different(answers: Answers, study: Study, lists: Lists, count: int, first: int) -> Scores:
    """Scores of the first keys after `count` pairs with different keys. [seeds, first]."""
    y = answers.after[count][: study.seeds, :first]
    values = lists.values[: study.seeds]
    return scores(y, values[:, :first], values[:, :count], lists.distractors)


def capacity(answers: Answers, study: Study, lists: Lists) -> list[dict]:
    """Scores of all stored pairs, a row for each number of pairs N."""
    return [
        averaged(different(answers, study, lists, count, count)._asdict(), pairs=count)
        for count in study.counts
    ]


def by_position(answers: Answers, study: Study, lists: Lists, parts: int = 8) -> list[dict]:
    """Primacy and recency: the same by the place in the list, in `parts` equal parts, the first
    pair first; a row for each part of each N."""
    rows = []
    for count in study.counts:
        found = different(answers, study, lists, count, count)
        size = max(1, count // parts)
        for i in range(count // size):
            part = Scores(*(a[:, i * size : (i + 1) * size] for a in found))
            about = {"pairs": count, "from": i * size, "to": (i + 1) * size - 1}
            rows.append(averaged(part._asdict(), **about))
    return rows


def by_age(answers: Answers, study: Study, lists: Lists) -> list[dict]:
    """The same after half of the pairs by the age of a pair, in octaves; age 0 is the last one."""
    count, rows = study.pairs // 2, []
    found = different(answers, study, lists, count, count)
    edges = [0, *(2**i for i in range(20) if 2**i < count), count]
    for young, old in zip(edges, edges[1:], strict=False):
        part = Scores(*(a[:, count - old : count - young] for a in found))
        rows.append(averaged(part._asdict(), **{"pairs": count, "from": young, "to": old - 1}))
    return rows


def overwrite(answers: Answers, study: Study, lists: Lists) -> list[dict]:
    """Every key bound m + 1 times, all keys in the same order each time; the last values are asked
    for, old ones are candidates. A row for m = 0, 1, 3, ..."""
    rows, bound = [], 1
    while bound * study.keys <= study.pairs:
        count = bound * study.keys
        y = answers.after[count][study.seeds :, : study.keys]
        values = lists.values[study.seeds :, :count]
        found = scores(y, values[:, -study.keys :], values, lists.distractors)
        rows.append(averaged(found._asdict(), rebound=bound - 1))
        bound *= 2
    return rows


def interference(answers: Answers, study: Study, lists: Lists) -> list[dict]:
    """Top-1 on the pairs of a first context after m pairs of another one, minus before: `change`.
    Candidates are the values of both, all the time."""
    rows, count, before = [], study.keys, None
    while count <= study.pairs:
        y = answers.after[count][: study.seeds, : study.keys]
        values = lists.values[: study.seeds]
        found = scores(y, values[:, : study.keys], values, lists.distractors)
        before = found.right if before is None else before
        row = averaged(found._asdict(), items=count - study.keys)
        rows.append(row | {"change": float(np.mean(found.right - before))})
        count *= 2
    return rows


def over_time(answers: Answers, study: Study) -> list[dict]:
    """||S||_F, the write norm (of the write itself) and the effective rank of the read map, after
    every few writes of different keys."""
    rows = []
    for i, rank in enumerate(answers.rank):
        count = study.every * (i + 1)
        figures = {"norm": answers.norm[count - 1], "write": answers.write[count - 1], "rank": rank}
        rows.append(averaged(figures, pairs=count))
    return rows


# ---------------------------------------------------------------- with the laws beside


def closed_form(cell: MemoryCell, study: Study) -> Callable[..., laws.Number] | None:
    """The error of answers in units of the gain, as a function (N, age, d); None where no law is
    known. Linear memories without a feature map add up, or follow the delta rule."""
    if not isinstance(cell, MatrixMemory) or getattr(cell, "feature_map", "identity") != "identity":
        return None
    one = np.zeros((1, 1, cell.key_dim)), np.zeros((1, 1, cell.value_dim))
    terms = cell.terms(pairs.tokens(cell, *one))
    fades = study.keep < 1 and any(
        field.kind == "log_decay" for field in fields(cell.inputs).values()
    )
    if terms.beta is None and terms.a is None:
        if fades:
            return functools.partial(laws.decay_error, study.keep)
        return lambda number, age, dim: laws.hebbian_error(number, dim) + 0.0 * age
    if fades or (terms.beta is None and study.strength != 1):
        return None
    beta = 1 - (1 - study.strength) ** getattr(cell, "steps", 1)  # of all micro-steps together

    def error(number, age, dim):
        own = laws.delta_error(beta, number, age, dim)
        return laws.rescaled_error(own, laws.delta_signal(beta, age, dim), beta)

    return error


def measure(cell: MemoryCell, study: Study, lists: Lists) -> dict[str, Any]:
    """All probes of one cell, as rows of numbers; "theory" is the closed form of an error, where
    there is one."""
    found = answer(cell, study, lists)
    rows = {
        probe.__name__: probe(found, study, lists)
        for probe in (capacity, by_position, by_age, overwrite, interference)
    }
    law = closed_form(cell, study)
    if law is not None:
        for row in rows["capacity"]:
            row["theory"] = float(np.mean(law(row["pairs"], np.arange(row["pairs"]), study.dim)))
        for row in rows["by_age"]:
            ages = np.arange(row["from"], row["to"] + 1)
            row["theory"] = float(np.mean(law(row["pairs"], ages, study.dim)))
    state = jax.eval_shape(
        lambda: initial_state(cell, cell.init_params(jax.random.key(0), 1), 1, 1)
    )
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
    about = {"gain": found.gain, "queries": pairs.has_queries(cell), "state_bytes": size}
    return {**about, **rows, "over_time": over_time(found, study)}
