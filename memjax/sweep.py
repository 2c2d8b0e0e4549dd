"""Trains what an experiment lists or searches, and gathers the results.

    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --jobs=2
    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --only=cell=delta_net,seed=0
    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --show
    python -m memjax.sweep --sweep=experiments/mqar/sweep.py --address=auto --resources=TPU=4

A sweep file is Python and defines

    trials() -> list of Trial      what is trained
    tables(rows) -> {name: (head, lines)}      for the README.md beside it (memjax.results)
    draw(rows) -> matplotlib Figure      the picture, <folder>.png beside it
    keep(found) -> dict      optional: what a row keeps of the figures of memjax.evaluate

and may have, in place of trials,

    search() -> memjax.sweeps.search.Search      trials that Optuna chooses by the earlier results

`grid` and `sample` in memjax/sweeps/search.py make the points of lists. A trial is one run of
`python -m memjax.train` in runs/<folder>/. Rows of results.jsonl, beside the sweep file, have the
trial's labels, its config and a hash of all its settings, and what the run measured at its last
step. A trial whose row is there with the same hash is not trained again, and one that was
interrupted continues; `--again` makes the rows anew, from the finished runs that are in runs/. One
whose loss is not finite, or whose memory does not suffice, has a row with "failure", its reason,
and no figures; tables and draw are not given it. One that fails otherwise is named and left out.
Rows of no trial stay in the file and are not shown. `--show` trains nothing and writes the tables
and the picture from the rows; `--rehash` gives the rows the hashes of today's settings, for a
change of settings that changes no result. Sweeps may run at once: one waits for the end of a run
that another one makes, or that a killed one left behind.

Runs are processes of this machine or, with `--address`, tasks of a Ray cluster, several together
with `--hosts`; `--export` writes what runs the sweep elsewhere. docs/sweeps.md tells of both.

In place of trials, a file may have PARTS, the names of other experiments. They are run and shown
first; then tables and draw are given the rows of all of them, each with its "experiment". READMES
names other files that show the same tables, such as ("../../README.md",).
"""

import functools
import os
import re
import signal
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from memjax import config, results
from memjax.errors import UNFINISHED
from memjax.sweeps import export
from memjax.sweeps.cluster import Cluster, parse_resources
from memjax.sweeps.runner import Local, Runner
from memjax.sweeps.search import Study
from memjax.sweeps.table import Table
from memjax.trials import Sweep, Trial


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
    flags.DEFINE_integer(
        "jobs", None, "runs at a time, one core each if > 1; default 1, with --address what fits",
        lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_string("only", "", "trials with these labels, such as cell=delta_net,seed=0")
    flags.DEFINE_string("runs", "runs", "folder for the workdirs of all sweeps")
    flags.DEFINE_bool("again", False, "make the rows that the results have anew")
    flags.DEFINE_integer(
        "retries", 3, "times in a row that an interrupted run may come no further", lower_bound=0
    )
    flags.DEFINE_bool("dry_run", False, "print the commands and train nothing")
    flags.DEFINE_alias("dry-run", "dry_run")
    flags.DEFINE_bool("show", False, "train nothing; write tables and picture from the results")
    flags.DEFINE_bool("rehash", False, "train nothing; give the rows the hashes of these settings")
    flags.DEFINE_string("address", "", "a Ray cluster: auto, local (this machine) or host:port")
    flags.DEFINE_integer("hosts", 1, "processes of a run, each on another node", lower_bound=1)
    flags.DEFINE_string("resources", "", "of each process, such as TPU=4; default CPU=1")
    flags.DEFINE_enum(
        "export", None, ["commands", "skypilot"], "print what runs the sweep elsewhere"
    )
    flags.DEFINE_string("accelerator", "tpu-v6e-8", "slices of --export=skypilot")
    flags.DEFINE_integer("slices", 1, "how many of them", lower_bound=1)
    flags.DEFINE_string("bucket", "", "for the runs of --export=skypilot")


def runner_of(sweep: Sweep) -> Runner:
    """Where the flags say that runs are made."""
    given = flags.FLAGS
    if not given.address:
        return Local(sweep, given.jobs or 1, given.runs, given.retries)
    return Cluster(
        sweep,
        given.jobs,
        given.runs,
        given.retries,
        address=given.address,
        hosts=given.hosts,
        resources=parse_resources(given.resources or "CPU=1"),
    )


def train(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """Trains those of a sweep's trials that have no row, and those of its search, as the flags say;
    the names of those that failed."""
    given, search = flags.FLAGS, sweep.search
    waiting = trials if given.again else sweep.waiting(trials)
    known, total = len(trials) - len(waiting), search.count if search else len(trials)
    if total:
        print(f"{sweep.name}: {total} trials, {known} of them in the results")
    for line in export.commands(sweep, waiting, given.runs) if given.dry_run else ():
        print(line)
    if given.dry_run or known >= total:
        return []
    names = {trial.name for trial in trials} - {trial.name for trial in waiting}
    rows = {name: row for name, row in sweep.rows().items() if name in names}
    study = None
    if search:
        path = os.path.join(given.runs, sweep.name, "study.journal")
        study = Study(search, path, sweep.rows(), given.again)

    def ended(trial: Trial, row: results.Row | None) -> None:
        if row:
            sweep.add(trial, row)
        if study:
            study.tell(trial, row)

    goal = {search.goal: search.maximise} if search else None
    runner = runner_of(sweep)
    try:
        return runner.run(study or waiting, Table(rows, total, goal), ended)
    finally:
        runner.close()


def exported(sweep: Sweep, sweeps: Sequence[Sweep], trials: Sequence[Trial]) -> str:
    """What runs a sweep elsewhere, as the flags say."""
    given = flags.FLAGS
    if given.export == "skypilot":
        return export.skypilot(
            sweep,
            accelerator=given.accelerator,
            count=given.slices,
            bucket=given.bucket,
            resources=parse_resources(given.resources) if given.resources else None,
            only=given.only,
        )
    lines = []
    for each in sweeps:
        if each.search:
            raise config.UserError(
                f"--export=commands: {each.name} is a search, which chooses trials by the results "
                "of earlier ones; run it, or write --export=skypilot"
            )
        chosen_ones = [trial for trial in each.trials if trial in trials]
        waiting = chosen_ones if given.again else each.waiting(chosen_ones)
        lines += export.commands(each, waiting, given.runs)
    return "".join(f"{line}\n" for line in lines)


@config.exit_on_user_error
def main(argv: Sequence[str]) -> int:
    if argv[1:]:
        raise config.UserError(f"{argv[1]!r} is no flag; flags begin with --")
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the runs
    sweep = Sweep(given.sweep)
    sweeps = sweep.sweeps()
    if given.rehash:
        for each in sweeps:
            each.rehash()
        return 0
    if given.only and any(each.search for each in sweeps):
        raise config.UserError(f"--only={given.only}: a search chooses its trials itself")
    trials = chosen([trial for each in sweeps for trial in each.trials], given.only)
    if given.export:
        print(exported(sweep, sweeps, trials), end="")
        return 0
    failed: list[str] = []
    if not given.show:
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
        if each.shown() or given.show and each is sweep:
            each.show()
    return int(bool(failed))


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
