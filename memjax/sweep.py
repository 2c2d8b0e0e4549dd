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
one that was interrupted continues; `--again` makes the rows anew, from the finished runs that are
in runs/. One that fails is named and left out. Rows of no trial stay in the file and are not shown.
`--show` trains nothing and writes the tables and the picture from the rows; `--rehash` gives the
rows the hashes of today's settings, for a change of settings that changes no result. Sweeps may run
at once: one waits for the end of a run that another one makes, or that a killed one left behind.

In place of trials, a file may have PARTS, the names of other experiments. They are run and shown
first; then tables and draw are given the rows of all of them, each with its "experiment". READMES
names other files that show the same tables, such as ("../../README.md",).
"""

import concurrent.futures
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from absl import app, flags, logging

from memjax import config, evaluate, metrics, progress, results
from memjax.locks import lock
from memjax.train import UNFINISHED
from memjax.trials import Sweep, Trial

# What a row keeps of a run's summary.json.
KEPT = (
    "steps", "seed", "query_accuracy", "sequence_accuracy", "scaled_accuracy", "bits_per_byte",
    "loss", "seconds", "tokens_per_second", "parameters", "state_bytes", "versions",
)  # fmt: skip

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
        summary = self._trained(trial)
        if summary is None:
            return None
        row = trial.described() | {name: summary[name] for name in KEPT if name in summary}
        if hasattr(self.sweep.module, "keep"):
            workdir = self.workdir(trial)
            try:
                row |= self.sweep.module.keep(
                    *(_evaluated(workdir, arguments) for arguments in trial.evaluations or ({},))
                )
            except Exception:  # this trial's, and not that of the others
                with open(f"{workdir}.log", "a", encoding="utf-8") as log:
                    traceback.print_exc(file=log)
                return None
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
            self._wait(file)
            if _finished(os.path.join(self.workdir(trial), "summary.json")):
                return 0
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

    def _wait(self, log: TextIO) -> None:
        """Waits for the end of another sweep's run with this log, as long as this one goes on. The
        lock is also the run's, whose output the log is, so that it outlives a sweep's kill."""
        told = False
        while not (self.stopped or lock(log, wait=False)):
            if not told:
                print(f"{log.name}: waiting for a run that another sweep began", flush=True)
            told = True
            time.sleep(0.2)


def _finished(path: str) -> dict[str, Any] | None:
    """The summary of a finished run."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        summary = json.load(file)
    return summary if summary["finished"] else None


def _evaluated(workdir: str, arguments: Mapping[str, int]) -> dict[str, Any]:
    """The figures of a finished run by `evaluate` with these arguments, made once; not those that
    the command left there, which may be of a few rows or another step."""
    words = "".join(f"-{name}-{value}" for name, value in arguments.items())
    path = os.path.join(workdir, f"sweep{words}.json")
    if not os.path.exists(path):
        metrics.write_json(path, evaluate.evaluate(workdir, **arguments))
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _told(row: results.Row | None) -> str:
    if row is None:
        return "failed, see its .log"
    figure = next(k for k in ("query_accuracy", "bits_per_byte", "loss") if k in row)
    return f"{figure.replace('_', ' ')} {row[figure]:.4f} in {row['seconds']:.0f} s"


# ---------------------------------------------------------------- the command


def chosen(trials: Sequence[Trial], only: str) -> list[Trial]:
    """The trials whose labels have the values that `only` gives, as in 'cell=delta_net,seed=0'; a
    comma is part of a value unless a label and "=" follow.

    Raises UserError for a label or a value that no trial has.
    """
    kept = list(trials)
    names = "|".join({re.escape(name) for trial in trials for name in trial.labels})
    for part in filter(None, re.split(f",(?=(?:{names})=)", only)):
        label, _, value = part.partition("=")
        known = {str(trial.labels[label]) for trial in trials if label in trial.labels}
        if value not in known:
            allowed = sorted(known) or sorted({name for t in trials for name in t.labels})
            words = [repr(word) if "," in word else word for word in allowed]
            raise config.UserError(
                f"--only={part}: no trial has it; allowed are {', '.join(words)}."
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
    flags.DEFINE_bool("again", False, "make the rows that the results have anew")
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
