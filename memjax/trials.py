"""What an experiment trains, `Trial`, and its file, rows, tables and picture, `Sweep`; see
`memjax.sweep`."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from memjax import config, results
from memjax.locks import lock
from memjax.sweeps.search import Search
from memjax.train import MAY_CHANGE


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
      labels: what tells it from the others, such as {"cell": "delta_net", "seed": 0}; the first
        columns of its row.
      config: of `--config`, such as "configs/mqar.py:delta_net,seed=0".
      changes: dotted path -> value of settings that differ from it, such as {"optim.lr": 1e-3}.
      init_from: a trial, trained first, whose last parameters this one starts with.
      evaluations: arguments of `memjax.evaluate.evaluate`, such as {"length": 2048}, for each time
        that `keep` is to be given figures; () for once, as in training.
    """

    labels: Mapping[str, Any]
    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init_from: "Trial | None" = None
    evaluations: Sequence[Mapping[str, int]] = ()

    @property
    def name(self) -> str:
        """The labels' values as one word."""
        words = "-".join(str(value) for value in self.labels.values())
        return "".join(c if c.isalnum() or c in "-_.=" else "-" for c in words)

    @functools.cached_property
    def settings(self) -> ConfigDict:
        """Its config."""
        return config.load(self.config, self.changes)

    @functools.cached_property
    def hash(self) -> str:
        """Of all settings that a result depends on."""
        kept = ConfigDict({k: v for k, v in self.settings.items() if k not in MAY_CHANGE})
        known = config.flatten(config.plain(kept))
        if self.init_from:
            known["init_from"] = self.init_from.hash
        if self.evaluations:
            known["evaluations"] = [dict(arguments) for arguments in self.evaluations]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]

    def described(self) -> results.Row:
        """What its row says of the run's settings."""
        start = {"init_from": self.init_from.described()} if self.init_from else {}
        return {"config": self.config, "changes": dict(self.changes), **start, "hash": self.hash}

    def command(self, workdir: str) -> list[str]:
        """The command that trains it."""
        changes = [f"--config.{path}={value}" for path, value in self.changes.items()]
        program = [sys.executable, "-m", "memjax.train", f"--workdir={workdir}"]
        return [*program, f"--config={self.config}", *changes]


class Sweep:
    """A sweep file, its folder and its results.

    parts: the sweeps of its PARTS.  search: what its `search` returns.
    trials: those of its `trials`; of a search those that are known.

    Raises UserError for a file that is missing, is no sweep, or has trials with the same labels.
    """

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise config.UserError(f"--sweep={path}: no such file; give the path of a sweep.py")
        self.path = os.path.abspath(path)
        self.folder = os.path.dirname(self.path)
        self.name = os.path.basename(self.folder)
        self.results = os.path.join(self.folder, "results.jsonl")
        spec = importlib.util.spec_from_file_location(f"memjax_sweep_{self.name}", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        parts = getattr(self.module, "PARTS", ())
        searches = hasattr(self.module, "search")
        first = [] if parts else ["search" if searches else "trials"]
        for function in (*first, "tables", "draw"):
            if not callable(getattr(self.module, function, None)):
                raise config.UserError(f"--sweep={path}: the file defines no function {function}")
        beside = os.path.dirname(self.folder)
        self.parts = [Sweep(os.path.join(beside, part, "sweep.py")) for part in parts]
        self.search: Search | None = self.module.search() if searches else None
        self.trials: list[Trial]
        if self.search:
            self.trials = self.search.known(results.read(self.results))
        else:
            self.trials = [] if parts else self.module.trials()
        names = [trial.name for trial in self.trials]
        for name in names:
            if names.count(name) > 1:
                raise config.UserError(f"--sweep={path}: two trials have the labels {name}")

    def sweeps(self) -> list["Sweep"]:
        """Its parts, and theirs, and itself."""
        return [*(each for part in self.parts for each in part.sweeps()), self]

    def workdir(self, trial: Trial, root: str) -> str:
        """The folder of a trial's run; root: the folder of the runs of all sweeps."""
        return os.path.join(root, self.name, f"{trial.name}-{trial.hash}")

    def command(self, trial: Trial, root: str) -> list[str]:
        """The command that trains a trial in its workdir."""
        first = trial.init_from
        start = [f"--config.init_from={self.workdir(first, root)}"] if first else []
        return [*trial.command(self.workdir(trial, root)), *start]

    def rows(self) -> dict[str, results.Row]:
        """The rows of results.jsonl by the name of the trial, in the order of the trials; rows of
        no trial are left out."""
        rows = results.read(self.results)
        found = {trial.name: results.select(rows, **trial.labels)[:1] for trial in self.trials}
        return {name: row for name, group in found.items() for row in group}

    def shown(self) -> list[results.Row]:
        """The rows of which tables and picture are made: those that have figures."""
        parts = [{"experiment": part.name, **row} for part in self.parts for row in part.shown()]
        return [*parts, *(row for row in self.rows().values() if "failure" not in row)]

    def readmes(self) -> list[str]:
        """The files that show its tables."""
        names = ("README.md", *getattr(self.module, "READMES", ()))
        return [os.path.join(self.folder, name) for name in names]

    def tables(self) -> dict[str, results.Table]:
        """The tables of its README.md."""
        return self.module.tables(self.shown())

    def waiting(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those of `trials` that have no row, or one of other settings."""
        rows = self.rows()
        return [t for t in trials if rows.get(t.name, {}).get("hash") != t.hash]

    def add(self, trial: Trial, row: results.Row) -> None:
        """Writes a trial's row, in the place of the one that it had."""
        if trial not in self.trials:  # a search's
            self.trials.append(trial)
        with self._alone():
            self._write({**self.rows(), trial.name: row})

    def rehash(self) -> None:
        """Gives every row its trial's settings and hash as they are today."""
        if self.search:
            self.trials = self.search.known(results.read(self.results), today=False)
        with self._alone():
            rows = self.rows()
            self._write(
                {t.name: rows[t.name] | t.described() for t in self.trials if t.name in rows}
            )

    def _write(self, rows: Mapping[str, results.Row]) -> None:
        """Writes rows by the name of the trial, then those of no trial, as they are."""
        made = [rows[t.name] for t in self.trials if t.name in rows]
        for row in results.read(self.results):
            if not any(results.select([row], **trial.labels) for trial in self.trials):
                made.append(row)
        if made:
            results.write(self.results, made)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other sweep of this file writes rows."""
        with open(self.path, "a", encoding="utf-8") as file:  # NFS locks what may be written
            lock(file, wait=True)
            yield

    def show(self) -> None:
        """Writes the tables into the README.md, and others that it names, and draws the picture."""
        if not self.shown():
            raise config.UserError(f"{self.results} has no row; run the sweep without --show first")
        for readme in self.readmes():
            results.write_tables(readme, self.tables())
        figure = self.module.draw(self.shown())
        figure.savefig(os.path.join(self.folder, f"{self.name}.png"))
