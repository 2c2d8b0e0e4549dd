"""Which settings are tried: all of a grid, some at random, or those that Optuna suggests."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from memjax import results
from memjax.errors import UserError, optional

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; integers when both are.

    log: evenly by their logarithm. Fractions are drawn with three significant digits.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or self.log and self.low <= 0:
            above = "0 < low < high" if self.log else "low < high"
            raise UserError(f"{self}: must have {above}")

    @property
    def whole(self) -> bool:
        """Whether it is a range of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def rounded(self, value: float) -> float:
        """A value as trials have it."""
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.3g}"), self.low), self.high)


Space = Mapping[str, Sequence[Any] | Range]


def grid(**values: Sequence[Any]) -> list[Point]:
    """All combinations, the last name's values changing fastest."""
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def sample(space: Space, count: int, seed: int = 0) -> list[Point]:
    """`count` points at random, the same for the same seed."""
    source = random.Random(seed)
    return [{name: _draw(values, source) for name, values in space.items()} for _ in range(count)]


def _draw(values: Sequence[Any] | Range, source: random.Random) -> Any:
    if not isinstance(values, Range):
        return source.choice(values)
    if values.log:
        half = 0.5 if values.whole else 0.0  # an integer stands for all that is rounded to it
        low, high = values.low - half, values.high + half
        drawn = low * (high / low) ** source.random()
        return values.rounded(min(round(drawn), values.high) if values.whole else drawn)
    if values.whole:
        return source.randint(int(values.low), int(values.high))
    return values.rounded(source.uniform(values.low, values.high))


def _has(values: Sequence[Any] | Range, value: Any) -> bool:
    """Whether a value is one of a space's."""
    if isinstance(values, Range):
        return isinstance(value, (int, float)) and values.low <= value <= values.high
    return value in values


@dataclasses.dataclass(frozen=True)
class Search:
    """Trials that Optuna's TPE chooses by the results of the earlier ones.

    Attributes:
      space: name -> its values, or a Range of them.
      trial: from a point of the space, by name, to its Trial, whose labels have the point in them.
      count: trials in all; the first third of them is drawn at random.
      goal: the figure of a row that is to be high or, without `maximise`, low.
      seed: of Optuna's draws.
    """

    space: Space
    trial: Callable[..., Any]
    count: int
    goal: str = "query_accuracy"
    maximise: bool = True
    seed: int = 0

    def made(self, point: Mapping[str, Any]) -> Any:
        """The trial of a point.

        Raises UserError when its labels do not say which one it is.
        """
        trial = self.trial(**point)
        lost = [name for name, value in point.items() if trial.labels.get(name) != value]
        if lost:
            raise UserError(
                f"the search's trial has no label {lost[0]!r} of the value {point[lost[0]]!r}; "
                "give it the point's names and values as labels"
            )
        return trial

    def known(self, rows: Sequence[results.Row], today: bool = True) -> list[Any]:
        """The trials of which there are rows, of today's settings or of any."""
        trials = []
        for row in rows:
            if all(name in row and _has(values, row[name]) for name, values in self.space.items()):
                trial = self.made({name: row[name] for name in self.space})
                if trial not in trials and (not today or trial.hash == row.get("hash")):
                    trials.append(trial)
        return trials

    @property
    def key(self) -> str:
        """Of all that makes results comparable: the space, the goal, and the other settings."""
        corner = {k: v.low if isinstance(v, Range) else v[0] for k, v in self.space.items()}
        known = [repr(self.space), self.goal, self.maximise, self.seed, self.made(corner).hash]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


class Study:
    """The trials of a search, one after another, in an Optuna study that outlives this process.

    path: the study's file.  rows: those that are in the results, by the name of their trial.
    again: hands out the trials that are known once more, too.
    """

    def __init__(
        self, search: Search, path: str, rows: Mapping[str, results.Row], again: bool = False
    ):
        self.search, self.optuna = search, optuna()
        self.distributions = {k: self._distribution(v) for k, v in search.space.items()}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        journal = self.optuna.storages.journal
        storage = self.optuna.storages.JournalStorage(journal.JournalFileBackend(path))
        self.study = self.optuna.create_study(
            storage=storage,
            study_name=search.key,
            load_if_exists=True,
            direction="maximize" if search.maximise else "minimize",
        )
        self.study.sampler = self._sampler()
        self.trials: dict[str, Any] = {}  # by name
        self.numbers: dict[str, list[int]] = {}  # in the study, by the trial's name
        for found in self.study.trials:
            self._note(found)
        self.rows, self.again = dict(rows), again
        for trial in search.known(list(rows.values())):
            if trial.name not in self.trials:
                self._add(rows[trial.name])

    def __iter__(self) -> Iterator[Any]:
        """The trials without a row that were begun, then new ones up to the search's count."""
        for name, trial in list(self.trials.items()):
            if self.again or name not in self.rows:
                yield trial
        while len(self.study.trials) < self.search.count:
            trial, new = self._note(self.study.ask(self.distributions))
            if new:
                yield trial
            elif trial.name in self.rows:
                self._tell(trial.name)

    def tell(self, trial: Any, row: results.Row | None) -> None:
        """Hands a trial's row to the study; without one, it is tried again when the search is
        continued.

        Raises UserError when the row has no goal.
        """
        if row is None:
            return
        if "failure" not in row and self.search.goal not in row:
            figures = ", ".join(name for name, value in row.items() if isinstance(value, float))
            raise UserError(
                f"the search's goal is {self.search.goal!r}, and {trial.name} has {figures}"
            )
        self.rows[trial.name] = row
        self._tell(trial.name)

    def _tell(self, name: str) -> None:
        value, state = self._outcome(self.rows[name])
        for number in self.numbers[name]:
            self.study.tell(number, value, state=state, skip_if_finished=True)

    def _outcome(self, row: results.Row) -> tuple[float | None, Any]:
        states = self.optuna.trial.TrialState
        if "failure" in row:
            return None, states.FAIL
        return row[self.search.goal], states.COMPLETE

    def _add(self, row: results.Row) -> None:
        """Puts a trial into the study that was made without it."""
        value, state = self._outcome(row)
        point = {name: row[name] for name in self.search.space}
        self.study.add_trial(
            self.optuna.trial.create_trial(
                params=point, distributions=self.distributions, value=value, state=state
            )
        )
        self._note(self.study.trials[-1])

    def _note(self, found: Any) -> tuple[Any, bool]:
        """The trial of one of the study's, and whether it is the first with this point."""
        point = {
            name: values.rounded(found.params[name])
            if isinstance(values, Range)
            else found.params[name]
            for name, values in self.search.space.items()
        }
        trial = self.search.made(point)
        numbers = self.numbers.setdefault(trial.name, [])
        numbers.append(found.number)
        return self.trials.setdefault(trial.name, trial), len(numbers) == 1

    def _sampler(self) -> Any:
        """A continued search does not draw the numbers of its beginning again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is marked experimental
            return self.optuna.samplers.TPESampler(
                seed=self.search.seed + len(self.study.trials),
                n_startup_trials=max(1, self.search.count // 3),
                constant_liar=True,
            )

    def _distribution(self, values: Sequence[Any] | Range) -> Any:
        kinds = self.optuna.distributions
        if not isinstance(values, Range):
            return kinds.CategoricalDistribution(tuple(values))
        if values.whole:
            return kinds.IntDistribution(int(values.low), int(values.high), log=values.log)
        return kinds.FloatDistribution(values.low, values.high, log=values.log)


def optuna() -> Any:
    """The package, quiet; UserError when it is not installed."""
    module = optional("optuna", "search()", "run `pip install -e '.[sweeps]'`")
    module.logging.set_verbosity(module.logging.ERROR)
    return module
