"""Trains a model: the whole loop, in reading order.

    python -m memjax.train --config=configs/mqar.py:delta_net --workdir=runs/mqar
    python -m memjax.train --config=configs/quickstart.py --workdir=runs/x --config.optim.lr=1e-3

The same command continues a run that was interrupted, bit for bit on CPU. The workdir receives
config.json, metrics.jsonl, checkpoints/, loss.png and summary.json, with --profile=100:5 also
profile/, a trace of 5 steps behind the 100th (see memjax/profile.py). Exit codes: 0 finished, 75
interrupted by SIGTERM or Ctrl-C after saving, 3 a loss that is not finite, 2 a mistake in the
request, 1 a defect.

On several hosts, start the same command on each, with a workdir that all of them share. TPU slices,
Slurm (srun), Open MPI and Kubernetes are found by jax; elsewhere set on each host

    JAX_COORDINATOR_ADDRESS=HOST:PORT    of process 0, a port that is free there
    JAX_NUM_PROCESSES=2
    JAX_PROCESS_ID=0    or 1

JAX_NUM_PROCESSES=1 trains in this process alone. SIGTERM or Ctrl-C to one of several saves and ends
all.
"""

import itertools
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from memjax import (
    __version__,
    checkpoint,
    chips,
    config,
    cost,
    generate,
    hosts,
    locks,
    metrics,
    progress,
    train_step,
)
from memjax.data import tokens as text_tokens
from memjax.errors import DIVERGED, UNFINISHED
from memjax.nn.lm import capacity, initial_state
from memjax.profile import Trace

# Config fields that a resumed run may change. init_from is of a run's beginning alone, and earlier
# runs do not have it.
MAY_CHANGE = ("checkpoint", "eval", "init_from", "log", "mesh", "next_steps")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def train(settings: Any, workdir: str, profile: str = "") -> dict[str, Any]:
    """Runs, or continues, what `settings` (a config) describes; returns the summary.

    profile: the steps that are traced (see `memjax.profile`), "" for none.
    summary["finished"] is False when SIGTERM or SIGINT interrupted the run; it was saved before.
    Raises config.UserError for settings that cannot work and FloatingPointError for a loss that
    is not finite.
    """
    with hosts.signals() as stopped, ExitStack() as held:
        return _train(settings, workdir, profile, stopped, held)


def _train(settings, workdir, profile, stopped, held):
    # ------------------------------------------------------------------ what is trained
    check_intervals(settings)
    trace = Trace(profile, workdir)
    hosts.check_same("command", {"workdir": os.path.abspath(workdir), "config": settings})
    with hosts.agreement(), config.user_errors("config"):
        run = train_step.build(settings)
        abstract = run.abstract_state()
        _, lowered = run.lower()
    start = None
    if settings.get("init_from") and not checkpoint.exists(workdir):
        start = parameters_of(settings.init_from, abstract.params)
    hosts.check_same("data", run.data.fingerprint)
    claim(workdir, settings, held)
    summary = {
        "finished": False,
        "step": 0,
        "steps": settings.steps,
        "parameters": sum(a.size for a in jax.tree.leaves(abstract.params)),
        "state_bytes": state_bytes(run.model, abstract.params),  # of one sequence
        "flops_per_token": cost.model_flops(
            run.model.config, abstract.params, run.data.length, run.data.queries
        ),
        "seed": settings.seed,
        "versions": versions(),
    }
    per_step = settings.batch * run.data.length
    iterator = iter(run.data.train)
    saver = checkpoint.Checkpoints(workdir, settings.checkpoint.every, settings.checkpoint.keep)

    # ------------------------------------------------------------------ where it continues
    meta = {"config": settings, "data": run.data.fingerprint}
    restored = saver.restore(abstract, iterator, expect=meta, ignore=MAY_CHANGE)
    step, state, saved = restored if restored else (0, run.init(), {})
    if start is not None:
        state = state._replace(params=start)
    tokeniser = run.data.tokeniser
    if hosts.first() and tokeniser is not None and tokeniser.model:  # the data is the run's
        config.write_text(os.path.join(workdir, generate.TOKENISER), tokeniser.model)
    clock = metrics.Clock(**saved.get("clock", {}))
    log = metrics.Metrics(
        workdir,
        step if restored else None,
        tensorboard=settings.log.tensorboard,
        wandb=settings.log.wandb,
        config=settings,
    )
    show = progress.Progress(settings.steps, step)
    describe(show, run, summary, step)

    # ------------------------------------------------------------------ compilation
    began = time.perf_counter()
    advance = lowered.compile()
    if step < settings.steps:
        took, needs = time.perf_counter() - began, progress.memory(advance)
        show.note(f"compiled in {took:.1f} s{needs}")
    peak = chips.peak(list(run.mesh.devices.flat))
    if profile:
        show.note(f"steps {trace.borders[0] + 1} to {trace.borders[1]} are traced: {trace.folder}")
    late = metrics.Late()
    fed: deque = deque(maxlen=2)  # (step, batch) of the step in flight and of the one before

    def record(arrived):
        if arrived is None:
            return
        clock.tick(per_step)  # the step has ended: the one behind it is in flight, if any
        at, values = arrived
        for name in ("loss", "grad_norm"):  # before the state of this step can be saved
            if not math.isfinite(values[name]):
                own = "" if jax.process_count() == 1 else f"-{jax.process_index()}"
                looked_at = os.path.join(workdir, f"nonfinite{own}.npz")
                np.savez(looked_at, **dict(fed)[at])
                raise FloatingPointError(
                    f"the {name} of step {at} is {values[name]}; its batch is in {looked_at}, the "
                    f"last checkpoint is of step {saver.latest()}. Lower optim.lr or optim.clip in "
                    "a new --workdir, or look for bad data"
                )
        if run.data.bytes_per_token:
            values["bits_per_byte"] = values["loss"] / math.log(2) / run.data.bytes_per_token
        values["tokens_per_second"] = clock.tokens_per_second()
        if peak is not None:
            flops = summary["flops_per_token"] * values["tokens_per_second"]
            values["mfu"] = flops / peak
        log.write(at, values)
        if at % settings.log.every == 0 or at == settings.steps:
            show.update(at, {**values, "eta": clock.eta(settings.steps - at)})

    def evaluate(at, limit):
        values = run.evaluation(state.params, limit)
        log.write(at, {"kind": "eval", **values})
        show.update(at, {"kind": "eval", **values})
        return values

    def switch(traced):
        if traced:
            with clock.paused(wait_for=state):
                trace.switch()

    def due(at):
        every = settings.eval.every
        return every and at % every == 0 and 0 < at < settings.steps

    # ------------------------------------------------------------------ the loop
    with saver, trace:
        if due(step):  # where a signal stopped the run, it did not take the time to evaluate
            evaluate_once(workdir, evaluate, step, settings.eval.batches)
        clock.start()
        while step < settings.steps:
            switch(trace.begins(step))
            batch = next(iterator)
            fed.append((step + 1, batch))
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, values = advance(state, run.put(batch))
            step += 1
            switch(trace.ends(step))
            record(late.push(step, values))
            last = step == settings.steps or stopped()
            if last or due(step) or saver.due(step):
                record(late.flush())
                with clock.paused():
                    if due(step) and not last:
                        evaluate(step, settings.eval.batches)
                    log.flush()
                    saver.save(step, state, iterator, {**meta, "clock": clock.state()}, force=last)
            if last:
                break

        # -------------------------------------------------------------- the end
        summary |= {
            "step": step,
            "seconds": round(clock.spent, 3),
            "tokens_per_second": round(clock.mean_tokens_per_second(), 1),
        }
        if step == settings.steps and not stopped():
            show.note("evaluating")
            summary |= evaluate_once(workdir, evaluate, step, None)
            summary["finished"] = True
            if run.data.bytes_per_token and settings.eval.sample and jax.process_count() == 1:
                summary["sample"] = sample_text(
                    run.model, state.params, tokeniser, settings.eval.sample
                )
    if hosts.first():
        write_end(run, workdir, summary)
    log.close()
    show.close()
    return summary


def write_end(run: train_step.Training, workdir: str, summary: dict[str, Any]) -> None:
    """summary.json and loss.png."""
    if summary["finished"]:
        summary["baselines"] = run.data.baselines()
    metrics.write_json(os.path.join(workdir, "summary.json"), summary)
    progress.plot_loss(
        os.path.join(workdir, "metrics.jsonl"),
        os.path.join(workdir, "loss.png"),
        summary.get("baselines"),
        title=os.path.basename(os.path.abspath(workdir)),
    )


# The lowest values of settings that count steps, batches or tokens, and what a zero means.
LOWEST = {
    "checkpoint.every": (1, ""),
    "checkpoint.keep": (1, ""),
    "log.every": (1, ""),
    "eval.every": (0, "; 0 evaluates at the end only"),
    "eval.batches": (1, ""),
    "eval.sample": (0, "; 0 draws none"),
}


def check_intervals(settings: Any) -> None:
    """Raises UserError for a number that the loop cannot keep, before anything is written."""
    for name, (low, zero) in LOWEST.items():
        section, field = name.split(".")
        value = settings[section][field]
        if value < low:
            raise config.UserError(f"config.{name}={value}: must be at least {low}{zero}")


def claim(workdir: str, settings: Any, held: ExitStack) -> None:
    """Makes the workdir this run's, until `held` is left. Raises UserError when it is another's."""
    with hosts.agreement():
        if hosts.first():
            held.enter_context(locks.alone(workdir))
            config.claim(workdir, settings, MAY_CHANGE)
    with hosts.agreement():
        if not appears(os.path.join(workdir, "config.json")):
            raise config.UserError(
                f"--workdir={workdir} is another folder than that of process 0; give one that all "
                "hosts share"
            )


def appears(path: str, seconds: int = 60) -> bool:
    """Whether a file is seen, which another host has written just now."""
    for _ in range(seconds):
        if os.path.exists(path):
            return True
        time.sleep(1)
    return False


def parameters_of(folder: str, abstract_params: Any) -> Any:
    """The last parameters of another run, placed as `abstract_params` says."""
    try:
        return checkpoint.restore_params(folder, abstract_params)[1]
    except config.UserError as error:
        raise config.UserError(f"config.init_from={folder!r}: {error}") from None


def evaluate_once(workdir, evaluate, step, limit) -> dict[str, float]:
    """The held-out metrics of a step; read back when an interrupted run had recorded them.

    Process 0 decides; what the others have is not used.
    """
    records = metrics.read_records(os.path.join(workdir, "metrics.jsonl"))
    found = [r for r in records if r["kind"] == "eval" and r["step"] == step]
    if not hosts.gather("recorded" if found else "")[0]:
        return evaluate(step, limit)
    return {k: v for r in found for k, v in r.items() if k not in ("step", "time", "kind")}


def sample_text(model, params, tokeniser, length: int) -> str:
    """What the model writes from the start of a document."""
    room = capacity(model.config)
    length = length if room is None else min(length, room - 1)  # the document's start is a token
    tokens = generate.sample(model, params, [text_tokens.BOS], length, temperature=0.7)
    return "".join(generate.stream_text(tokens, tokeniser))


def state_bytes(model, params: Any) -> int:
    """Bytes of the decode state of one sequence."""
    state = jax.eval_shape(lambda p: initial_state(model, p, 1), params)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


def describe(show, run: train_step.Training, summary: dict[str, Any], step: int) -> None:
    """Says once what runs where on what."""
    device = jax.devices()[0].device_kind
    shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    devices = f"{jax.device_count()} x {device}{shared}"
    show.note(f"memjax {__version__}, jax {jax.__version__}, {devices}")
    show.note(
        f"model: {progress.human(summary['parameters'])} parameters, "
        f"{progress.human(summary['flops_per_token'])} model FLOPs a token, "
        f"{progress.human(summary['state_bytes'])}B of state a sequence; "
        f"{in_words(run.model.config.layers)}"
    )
    facts = {k: v for k, v in run.data.fingerprint.items() if not isinstance(v, (list, dict))}
    show.note("data: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    if step:
        show.note(f"continuing from the checkpoint of step {step}")


def in_words(layers: tuple) -> str:
    """The layers in order, equal ones in a row counted: "3 x delta_net, sliding_window"."""
    names = [name for pattern, repeats in layers for name in pattern * repeats]
    runs = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in runs)


def versions() -> dict[str, str]:
    """Versions of memjax, Python and the packages that a result depends on."""
    return {
        "memjax": __version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        **{package: version(package) for package in PACKAGES},
    }


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@config.exit_on_user_error
def main(argv: Sequence[str]) -> int:
    if argv[1:]:
        raise config.UserError(
            f"{argv[1]!r} is no flag; write --config.section.field=value, a value with spaces in "
            "quotes"
        )
    logging.set_verbosity(logging.WARNING)  # orbax tells a lot
    settings, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if not workdir:
        raise config.UserError("--workdir is missing; write --workdir=runs/NAME")
    hosts.initialise()
    try:
        summary = train(settings, workdir, flags.FLAGS.profile)
    except FloatingPointError as err:
        print(f"error: {err}", file=sys.stderr)
        return DIVERGED
    except OSError as err:
        raise config.UserError(
            f"{err.filename or workdir} cannot be written ({err.strerror or err}). Make room, then "
            "give the same command again: it continues from the last complete checkpoint"
        ) from err
    if not hosts.first():
        return 0 if summary["finished"] else UNFINISHED
    if not summary["finished"]:
        print(f"stopped at step {summary['step']} and saved; the same command continues")
        return UNFINISHED
    print(progress.report(summary, workdir))
    if settings.get("next_steps"):
        print("\nwhat to try next:\n" + settings.next_steps.format(workdir=workdir))
    return 0


def define_flags() -> None:
    """The command's flags; made when it runs, so that other programs may import this module."""
    flags.DEFINE_string("workdir", None, "folder of the run; made when absent")
    flags.DEFINE_string("profile", "", "START:NUMBER: trace so many steps behind the START-th")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
