"""Trains what an experiment lists and gathers the results.

    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --jobs=2
    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --only=cell=delta_net,seed=0
    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --show

A sweep file is Python and defines

    trials() -> list of Trial      what is trained
    tables(rows) -> {name: (head, lines)}      for the README.md beside it (memjax.results)
    draw(rows) -> matplotlib Figure      the picture, <folder>.png beside it
    keep(found) -> dict      optional: what a row keeps of the figures of memjax.evaluate

A trial is one run of `python -m memjax.train` in runs/<folder>/. Rows of results.jsonl, beside the
sweep file, have the trial's labels, its config and a hash of all its settings, and what the run
measured at its last step. A trial whose row is there with the same hash is not trained again, and
one that was interrupted continues; `--again` ignores the rows. One that fails is named and left
out. `--show` trains nothing and writes the tables and the picture from the rows; `--rehash` gives
the rows the hashes of today's settings, for a change of settings that changes no result.

In place of trials, a file may have PARTS, the names of other experiments. They are run and shown
first; then tables and draw are given the rows of all of them, each with its "experiment".
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from memjax import config, evaluate, metrics, progress, results
from memjax.train import MAY_CHANGE, UNFINISHED

# What a row keeps of a run's summary.json.
KEPT = (
    "steps", "seed", "query_accuracy", "sequence_accuracy", "scaled_accuracy", "bits_per_byte",
    "loss", "seconds", "tokens_per_second", "parameters", "state_bytes", "versions",
)  # fmt: skip


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
    def hash(self) -> str:
        """Of all settings that a result depends on."""
        settings = config.load(self.config, self.changes)
        kept = ConfigDict({k: v for k, v in settings.items() if k not in MAY_CHANGE})
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

    parts: the sweeps of its PARTS.

    Raises UserError for a file that is missing, is no sweep, or has trials with the same labels.
    """

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise config.UserError(f"--sweep={path}: no such file; give the path of a sweep.py")
        self.folder = os.path.dirname(os.path.abspath(path))
        self.name = os.path.basename(self.folder)
        self.results = os.path.join(self.folder, "results.jsonl")
        spec = importlib.util.spec_from_file_location(f"memjax_sweep_{self.name}", path)
        assert spec is not None and spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        parts = getattr(self.module, "PARTS", ())
        for function in ("tables", "draw") if parts else ("trials", "tables", "draw"):
            if not callable(getattr(self.module, function, None)):
                raise config.UserError(f"--sweep={path}: the file defines no function {function}")
        beside = os.path.dirname(self.folder)
        self.parts = [Sweep(os.path.join(beside, part, "sweep.py")) for part in parts]
        self.trials: list[Trial] = [] if parts else self.module.trials()
        names = [trial.name for trial in self.trials]
        for name in names:
            if names.count(name) > 1:
                raise config.UserError(f"--sweep={path}: two trials have the labels {name}")

    def sweeps(self) -> list["Sweep"]:
        """Its parts, and theirs, and itself."""
        return [*(each for part in self.parts for each in part.sweeps()), self]

    def rows(self) -> dict[str, results.Row]:
        """The rows of results.jsonl by the name of the trial, in the order of the trials; rows of
        no trial are left out."""
        rows = results.read(self.results)
        found = {trial.name: results.select(rows, **trial.labels)[:1] for trial in self.trials}
        return {name: row for name, group in found.items() for row in group}

    def shown(self) -> list[results.Row]:
        """The rows of which tables and picture are made."""
        parts = [{"experiment": part.name, **row} for part in self.parts for row in part.shown()]
        return [*parts, *self.rows().values()]

    def tables(self) -> dict[str, results.Table]:
        """The tables of its README.md."""
        return self.module.tables(self.shown())

    def waiting(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those of `trials` that have no row, or one of other settings."""
        rows = self.rows()
        return [t for t in trials if rows.get(t.name, {}).get("hash") != t.hash]

    def add(self, trial: Trial, row: results.Row) -> None:
        """Writes a trial's row, in the place of the one that it had."""
        rows = {**self.rows(), trial.name: row}
        results.write(self.results, (rows[t.name] for t in self.trials if t.name in rows))

    def rehash(self) -> None:
        """Gives every row its trial's settings and hash as they are today."""
        rows = self.rows()
        made = [{**rows[t.name], **t.described()} for t in self.trials if t.name in rows]
        if made:
            results.write(self.results, made)

    def show(self) -> None:
        """Writes the tables into the README.md and draws the picture."""
        if not self.shown():
            raise config.UserError(f"{self.results} has no row; run the sweep without --show first")
        results.write_tables(os.path.join(self.folder, "README.md"), self.tables())
        figure = self.module.draw(self.shown())
        figure.savefig(os.path.join(self.folder, f"{self.name}.png"))


# ---------------------------------------------------------------- running


class Runner:
    """Trains trials side by side, each in a process of its own.

    jobs: runs at a time, one core each if more than one. root: folder of the runs' workdirs.
    """

    def __init__(self, sweep: Sweep, jobs: int, root: str):
        self.sweep, self.jobs, self.root = sweep, jobs, root
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.workdirs: dict[str, threading.Lock] = {}  # held while a run is made there
        self.stopped = False

    def run(self, trials: Sequence[Trial]) -> list[str]:
        """Trains trials, writing each one's row when it ends; the names of those that failed."""
        began, failed = time.monotonic(), []
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._one, trial): trial for trial in trials}
            try:
                for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                    trial, row = futures[future], future.result()
                    if row is None:
                        failed.append(trial.name)
                    else:
                        self.sweep.add(trial, row)
                    left = (time.monotonic() - began) / done * (len(trials) - done)
                    print(
                        f"[{done}/{len(trials)}] {trial.name}: {_told(row)}; "
                        f"{progress.duration(left)} left",
                        flush=True,
                    )
            except BaseException:
                self.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return failed

    def workdir(self, trial: Trial) -> str:
        """The folder of a trial's run."""
        return os.path.join(self.root, self.sweep.name, f"{trial.name}-{trial.hash}")

    def command(self, trial: Trial) -> list[str]:
        """The command that trains a trial in its workdir."""
        first = trial.init_from
        start = [f"--config.init_from={self.workdir(first)}"] if first else []
        return [*trial.command(self.workdir(trial)), *start]

    def stop(self) -> None:
        """Asks the runs to save and end, and starts no other."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def _one(self, trial: Trial) -> results.Row | None:
        """The row of one trial; None when it fails."""
        began = time.monotonic()
        summary = self._trained(trial)
        if summary is None:
            return None
        row = trial.described() | {name: summary[name] for name in KEPT if name in summary}
        if hasattr(self.sweep.module, "keep"):
            workdir = self.workdir(trial)
            row |= self.sweep.module.keep(
                *(_evaluated(workdir, arguments) for arguments in trial.evaluations or ({},))
            )
        row["wall"] = round(time.monotonic() - began, 1)
        return {**trial.labels, **row, **trial.labels}

    def _trained(self, trial: Trial) -> dict[str, Any] | None:
        """The summary of a run that is finished, now or earlier; None when it, or the run that it
        starts from, fails."""
        if trial.init_from and self._trained(trial.init_from) is None:
            return None
        workdir = self.workdir(trial)
        path = os.path.join(workdir, "summary.json")
        with self.workdirs.setdefault(workdir, threading.Lock()):
            if not _finished(path) and self._process(trial, f"{workdir}.log"):
                return None
        return _finished(path)

    def _process(self, trial: Trial, log: str) -> int:
        """Runs a trial's command, its output added to the file `log`; the exit code."""
        environment = {"JAX_COMPILATION_CACHE_DIR": os.path.join(self.root, "compiled")}
        environment |= os.environ
        if self.jobs > 1:
            one_core = "--xla_cpu_multi_thread_eigen=false"
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {one_core}".strip()
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            with self.lock:
                if self.stopped:
                    return UNFINISHED
                process = subprocess.Popen(
                    self.command(trial),
                    env=environment,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,  # Ctrl-C reaches it through `stop` alone
                )
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        return code


def _finished(path: str) -> dict[str, Any] | None:
    """The summary of a finished run."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        summary = json.load(file)
    return summary if summary["finished"] else None


def _evaluated(workdir: str, arguments: Mapping[str, int]) -> dict[str, Any]:
    """The figures of a finished run by `evaluate` with these arguments, made once."""
    words = "".join(f"-{name}-{value}" for name, value in arguments.items())
    path = os.path.join(workdir, f"evaluation{words}.json")
    if not os.path.exists(path):
        metrics.write_json(path, evaluate.evaluate(workdir, **arguments))
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _told(row: results.Row | None) -> str:
    if row is None:
        return "failed, see its .log"
    figure = next(k for k in ("query_accuracy", "bits_per_byte", "loss") if k in row)
    return f"{figure.replace('_', ' ')} {row[figure]:.4f} in {row['wall']:.0f} s"


# ---------------------------------------------------------------- the command


def chosen(trials: Sequence[Trial], only: str) -> list[Trial]:
    """The trials whose labels have the values that `only` gives, as in 'cell=delta_net,seed=0'.

    Raises UserError for a label or a value that no trial has.
    """
    kept = list(trials)
    for part in filter(None, only.split(",")):
        label, _, value = part.partition("=")
        known = {str(trial.labels[label]) for trial in trials if label in trial.labels}
        if value not in known:
            allowed = sorted(known) or sorted({name for t in trials for name in t.labels})
            raise config.UserError(
                f"--only={part}: no trial has it; allowed are {', '.join(allowed)}."
                f"{config.did_you_mean(value, known)}"
            )
        kept = [trial for trial in kept if str(trial.labels.get(label)) == value]
    return kept


def define_flags() -> None:
    """The command's flags; made when it runs, so that sweep files may import this module."""
    flags.DEFINE_string("sweep", None, "the sweep file", required=True)
    flags.DEFINE_integer("jobs", 1, "runs at a time, one core each if > 1", lower_bound=1)
    flags.DEFINE_string("only", "", "trials with these labels, such as cell=delta_net,seed=0")
    flags.DEFINE_string("runs", "runs", "folder for the workdirs of all sweeps")
    flags.DEFINE_bool("again", False, "train also what the results have")
    flags.DEFINE_bool("dry_run", False, "print the commands and train nothing")
    flags.DEFINE_bool("show", False, "train nothing; write tables and picture from the results")
    flags.DEFINE_bool("rehash", False, "train nothing; give the rows the hashes of these settings")


def train(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """Trains those of a sweep's trials that have no row, as the flags say; the names of those that
    failed."""
    given = flags.FLAGS
    waiting = trials if given.again else sweep.waiting(trials)
    runner = Runner(sweep, given.jobs, given.runs)
    if trials:
        known = len(trials) - len(waiting)
        print(f"{sweep.name}: {len(trials)} trials, {known} of them in the results")
    if not given.dry_run:
        return runner.run(waiting)
    for trial in waiting:
        for run in filter(None, (trial.init_from, trial)):
            print(shlex.join(runner.command(run)))
    return []


@config.exit_on_user_error
def main(argv: Sequence[str]) -> int:
    if argv[1:]:
        raise config.UserError(f"{argv[1]!r} is no flag; flags begin with --")
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    given = flags.FLAGS
    sweeps = Sweep(given.sweep).sweeps()
    failed: list[str] = []
    if given.rehash:
        for each in sweeps:
            each.rehash()
        return 0
    if not given.show:
        trials = chosen([trial for each in sweeps for trial in each.trials], given.only)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for each in sweeps:
                failed += train(each, [trial for trial in each.trials if trial in trials])
        except KeyboardInterrupt:
            print("stopped; the same command continues")
            return UNFINISHED
    if failed:
        print(f"failed: {', '.join(failed)}; see their .log in {given.runs}", file=sys.stderr)
    for each in () if given.dry_run else sweeps:
        if given.show or each.shown():
            each.show()
    return int(bool(failed))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
