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
out. `--show` trains nothing and writes the tables and the picture from the rows.
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
    """

    labels: Mapping[str, Any]
    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        text = json.dumps(config.flatten(config.plain(kept)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def command(self, workdir: str) -> list[str]:
        """The command that trains it."""
        changes = [f"--config.{path}={value}" for path, value in self.changes.items()]
        program = [sys.executable, "-m", "memjax.train", f"--workdir={workdir}"]
        return [*program, f"--config={self.config}", *changes]


class Sweep:
    """A sweep file, its folder and its results.

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
        for function in ("trials", "tables", "draw"):
            if not callable(getattr(self.module, function, None)):
                raise config.UserError(f"--sweep={path}: the file defines no function {function}")
        self.trials: list[Trial] = self.module.trials()
        names = [trial.name for trial in self.trials]
        for name in names:
            if names.count(name) > 1:
                raise config.UserError(f"--sweep={path}: two trials have the labels {name}")

    def rows(self) -> dict[str, results.Row]:
        """The rows of results.jsonl by the name of the trial, in the order of the trials; rows of
        no trial are left out."""
        rows = results.read(self.results)
        found = {trial.name: results.select(rows, **trial.labels)[:1] for trial in self.trials}
        return {name: row for name, group in found.items() for row in group}

    def waiting(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those of `trials` that have no row, or one of other settings."""
        rows = self.rows()
        return [t for t in trials if rows.get(t.name, {}).get("hash") != t.hash]

    def add(self, trial: Trial, row: results.Row) -> None:
        """Writes a trial's row, in the place of the one that it had."""
        rows = {**self.rows(), trial.name: row}
        results.write(self.results, (rows[t.name] for t in self.trials if t.name in rows))

    def show(self) -> None:
        """Writes the tables into the README.md and draws the picture."""
        rows = list(self.rows().values())
        if not rows:
            raise config.UserError(f"{self.results} has no row; run the sweep without --show first")
        readme = os.path.join(self.folder, "README.md")
        with open(readme, encoding="utf-8") as file:
            text = file.read()
        config.write_text(readme, results.with_tables(text, self.module.tables(rows)))
        self.module.draw(rows).savefig(os.path.join(self.folder, f"{self.name}.png"))


# ---------------------------------------------------------------- running


class Runner:
    """Trains trials side by side, each in a process of its own.

    jobs: runs at a time, one core each if more than one. root: folder of the runs' workdirs.
    """

    def __init__(self, sweep: Sweep, jobs: int, root: str):
        self.sweep, self.jobs, self.root = sweep, jobs, root
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
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

    def stop(self) -> None:
        """Asks the runs to save and end, and starts no other."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def _one(self, trial: Trial) -> results.Row | None:
        """The row of one trial; None when it fails."""
        began = time.monotonic()
        workdir = self.workdir(trial)
        summary = self._trained(trial, workdir)
        if summary is None:
            return None
        row: results.Row = {
            "config": trial.config,
            "changes": dict(trial.changes),
            "hash": trial.hash,
        }
        row |= {name: summary[name] for name in KEPT if name in summary}
        if hasattr(self.sweep.module, "keep"):
            row |= self.sweep.module.keep(_evaluated(workdir))
        row["wall"] = round(time.monotonic() - began, 1)
        return {**trial.labels, **row, **trial.labels}

    def _trained(self, trial: Trial, workdir: str) -> dict[str, Any] | None:
        """The summary of a run that is finished, now or earlier; None when it fails."""
        path = os.path.join(workdir, "summary.json")
        if not _finished(path):
            environment = {"JAX_COMPILATION_CACHE_DIR": os.path.join(self.root, "compiled")}
            environment |= os.environ
            if self.jobs > 1:
                one_core = "--xla_cpu_multi_thread_eigen=false"
                environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {one_core}".strip()
            os.makedirs(os.path.dirname(workdir), exist_ok=True)
            with open(f"{workdir}.log", "a", encoding="utf-8") as log:
                with self.lock:
                    if self.stopped:
                        return None
                    process = subprocess.Popen(
                        trial.command(workdir),
                        env=environment,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # Ctrl-C reaches it through `stop` alone
                    )
                    self.running.add(process)
                code = process.wait()
                with self.lock:
                    self.running.discard(process)
            if code:
                return None
        return _finished(path)


def _finished(path: str) -> dict[str, Any] | None:
    """The summary of a finished run."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        summary = json.load(file)
    return summary if summary["finished"] else None


def _evaluated(workdir: str) -> dict[str, Any]:
    """The figures of a finished run on its held-out data, made once."""
    path = os.path.join(workdir, "evaluation.json")
    if not os.path.exists(path):
        metrics.write_json(path, evaluate.evaluate(workdir))
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


@config.exit_on_user_error
def main(argv: Sequence[str]) -> int:
    if argv[1:]:
        raise config.UserError(f"{argv[1]!r} is no flag; flags begin with --")
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    given = flags.FLAGS
    sweep = Sweep(given.sweep)
    failed: list[str] = []
    if not given.show:
        trials = chosen(sweep.trials, given.only)
        waiting = trials if given.again else sweep.waiting(trials)
        print(f"{len(trials)} trials, {len(trials) - len(waiting)} of them in the results")
        runner = Runner(sweep, given.jobs, given.runs)
        if given.dry_run:
            for trial in waiting:
                print(shlex.join(trial.command(runner.workdir(trial))))
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = runner.run(waiting)
        except KeyboardInterrupt:
            print("stopped; the same command continues")
            return UNFINISHED
    if failed:
        print(f"failed: {', '.join(failed)}; see their .log in {given.runs}", file=sys.stderr)
    if given.show or sweep.rows():
        sweep.show()
    return int(bool(failed))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
