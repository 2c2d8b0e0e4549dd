"""Trains trials side by side and makes their rows: all but where a run's process is."""

import abc
import concurrent.futures
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from memjax import evaluate, metrics, results
from memjax.errors import DIVERGED, UNFINISHED
from memjax.sweeps import process, table
from memjax.trials import Sweep, Trial

# What a row keeps of a run's summary.json.
KEPT = (
    "steps", "seed", "query_accuracy", "sequence_accuracy", "scaled_accuracy", "bits_per_byte",
    "loss", "seconds", "tokens_per_second", "parameters", "state_bytes", "versions",
)  # fmt: skip


class Failed(Exception):
    """A run that did not finish. reason: why it never will, '' where another try may help."""

    def __init__(self, reason: str):
        self.reason = reason


class Runner(abc.ABC):
    """Trains trials, each in a process of its own.

    jobs: runs at a time.  root: folder of the runs' workdirs.
    retries: times in a row that an interrupted run may come no further than before.
    one_core: whether a run has one core.  alone: whether nothing else takes of its memory.
    """

    def __init__(
        self, sweep: Sweep, jobs: int, root: str, retries: int, *, one_core: bool, alone: bool
    ):
        self.sweep, self.jobs, self.root, self.retries = sweep, jobs, root, retries
        self.alone = alone
        self.environment = _environment(root, one_core)
        self.workdirs: dict[str, threading.Lock] = {}  # held while a run is made there
        self.stopped = threading.Event()
        self.note: Callable[[str], None] = print

    @abc.abstractmethod
    def attempt(self, job: process.Job) -> int:
        """Runs a job once, unless it is finished; its exit code, UNFINISHED or that of a signal
        where it was interrupted."""

    @abc.abstractmethod
    def evaluate(self, workdir: str, path: str, arguments: Mapping[str, int]) -> None:
        """Writes the figures of a finished run by `memjax.evaluate` to `path`."""

    def run(
        self,
        trials: Iterable[Trial],
        shown: "table.Table",
        ended: Callable[[Trial, results.Row | None], None],
    ) -> list[str]:
        """Trains trials, each taken when there is room for it, and hands each one's row to `ended`,
        None when it failed; the names of those that failed."""
        self.note = shown.note
        waiting = iter(trials)
        failed: list[str] = []
        running: dict[concurrent.futures.Future, Trial] = {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    while len(running) < self.jobs:
                        trial = next(waiting, None)
                        if trial is None:
                            break
                        running[pool.submit(self._one, trial)] = trial
                    if not running:
                        return failed
                    shown.show({trial.name: self._line(trial) for trial in running.values()})
                    for future in concurrent.futures.wait(
                        running, shown.period, concurrent.futures.FIRST_COMPLETED
                    ).done:
                        trial, row = running.pop(future), future.result()
                        ended(trial, row)
                        if row is None:
                            failed.append(trial.name)
                        shown.ended(trial.name, row)
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                shown.show({})

    def close(self) -> None:
        """Gives back what it holds outside of this process."""
        return None

    def workdir(self, trial: Trial) -> str:
        """The folder of a trial's run."""
        return self.sweep.workdir(trial, self.root)

    def _line(self, trial: Trial) -> str:
        if trial.init_from and not os.path.exists(self.workdir(trial)):
            return f"after {trial.init_from.name}: {self._line(trial.init_from)}"
        return table.progress_of(self.workdir(trial), trial.settings.steps)

    def _one(self, trial: Trial) -> results.Row | None:
        """The row of one trial, that of a failure when it would fail again; None when it fails."""
        try:
            summary = self._trained(trial)
            row = {name: summary[name] for name in KEPT if name in summary}
            if hasattr(self.sweep.module, "keep"):
                row |= self.sweep.module.keep(*self._figures(trial))
        except Failed as failure:
            if not failure.reason:
                return None
            row = {"failure": failure.reason}
        except Exception:  # this trial's, and not that of the others
            with open(f"{self.workdir(trial)}.log", "a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
            return None
        return {**trial.labels, **trial.described(), **row, **trial.labels}

    def _figures(self, trial: Trial) -> Iterator[dict[str, Any]]:
        """The figures of a finished run for each of the trial's evaluations, made once; not those
        that `memjax.evaluate` left there, which may be of a few rows or another step."""
        workdir = self.workdir(trial)
        for arguments in trial.evaluations or ({},):
            words = "".join(f"-{name}-{value}" for name, value in arguments.items())
            path = os.path.join(workdir, f"sweep{words}.json")
            if not os.path.exists(path):
                self.evaluate(workdir, path, arguments)
            found = process.finished(path)
            assert found is not None, path
            yield found

    def _trained(self, trial: Trial) -> dict[str, Any]:
        """The summary of a run that is finished, now or earlier.

        Raises Failed when it, or the run that it starts from, did not finish.
        """
        if trial.init_from:
            self._trained(trial.init_from)
        workdir = self.workdir(trial)
        job = self.job(
            self.sweep.command(trial, self.root),
            os.path.join(workdir, "summary.json"),
            f"{workdir}.log",
        )
        with self.workdirs.setdefault(workdir, threading.Lock()):
            if not process.finished(job.done):
                self.finish(job, workdir, self.attempt)
        found = process.finished(job.done)
        if not found:
            raise Failed("")
        return found

    def job(self, command: Iterable[str], done: str, log: str) -> process.Job:
        """A command of this sweep, whose log has a folder."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        return process.Job(tuple(command), done, log, self.environment, os.getcwd())

    def finish(self, job: process.Job, workdir: str, attempt: Callable[[process.Job], int]) -> None:
        """Runs a job by `attempt`, again while it is interrupted. Raises Failed when it fails."""
        left, reached = self.retries, _last_checkpoint(workdir)
        while True:
            begin = os.path.getsize(job.log) if os.path.exists(job.log) else 0
            code = attempt(job)
            if not code:
                return
            step = _last_checkpoint(workdir)
            left = self.retries if step > reached else left - 1
            reached = step
            interrupted = code == UNFINISHED or code < 0
            if not interrupted or left < 0 or self.stopped.is_set():
                raise Failed(self._lasting(code, job.log, begin))
            where = f"continues from step {step}" if step else "begins again"
            self.note(f"{os.path.basename(workdir)}: interrupted (exit code {code}); {where}")

    def _lasting(self, code: int, log: str, begin: int) -> str:
        """Why a run, whose output stands in the log from byte `begin`, ended, where it would end so
        again; otherwise ''."""
        if not os.path.exists(log):
            return ""
        with open(log, "rb") as file:
            file.seek(begin)
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if code == DIVERGED and line.startswith("error: "):
                return line.removeprefix("error: ")
            if code == 1 and self.alone and "RESOURCE_EXHAUSTED" in line:  # jax's word for memory
                return line.strip()[:300]
        return ""


class Local(Runner):
    """Runs are processes of this machine, one core each if there are several at a time."""

    def __init__(self, sweep: Sweep, jobs: int, root: str, retries: int = 3):
        super().__init__(sweep, jobs, root, retries, one_core=jobs > 1, alone=jobs == 1)

    def attempt(self, job: process.Job) -> int:
        return process.execute(job, self.stopped, self.note)

    def evaluate(self, workdir: str, path: str, arguments: Mapping[str, int]) -> None:
        metrics.write_json(path, evaluate.evaluate(workdir, **arguments))


def _environment(root: str, one_core: bool) -> dict[str, str]:
    """The variables that a run is given: those that configure jax, wherever it runs."""
    known = {name: text for name, text in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    known.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(root, "compiled"))
    known["JAX_NUM_PROCESSES"] = "1"  # it looks for no others, on a TPU slice or under Slurm
    if one_core:
        flag = "--xla_cpu_multi_thread_eigen=false"
        known["XLA_FLAGS"] = f"{known.get('XLA_FLAGS', '')} {flag}".strip()
    return known


def _last_checkpoint(workdir: str) -> int:
    """The step of a run's last checkpoint; 0 before the first."""
    folder = os.path.join(workdir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def evaluation(workdir: str, path: str, arguments: Mapping[str, int]) -> list[str]:
    """The command that writes the figures of a run."""
    program = [sys.executable, "-m", "memjax.evaluate", f"--workdir={workdir}", f"--out={path}"]
    return [*program, *(f"--{name}={value}" for name, value in arguments.items())]
