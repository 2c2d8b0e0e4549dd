"""A run that is killed, terminated or interrupted at any moment continues as if nothing had been.

The processes are those a person starts. Moments are drawn with a seed and expressed in what the run
has done (its records, its files), so that they mean the same on a fast and on a slow machine.
"""

import dataclasses
import glob
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_runs as runs

from memjax import checkpoint, metrics, train
from memjax.errors import UserError

STEPS, EVAL, SAVE = 120, 8, 10
LONG = {"steps": STEPS, "checkpoint.every": SAVE, "eval.every": EVAL, "log.every": 40}


@dataclasses.dataclass
class Run:
    """The same command in one workdir, again and again."""

    args: list[str]
    workdir: str
    cache: str

    def start(self):
        return runs.command("train", *self.args, cache=self.cache)

    def steps(self) -> int:
        """The last recorded training step; 0 before the first."""
        rows = metrics.read_records(f"{self.workdir}/metrics.jsonl")
        return max((r["step"] for r in rows if r["kind"] == "train"), default=0)

    def saving(self) -> bool:
        """Whether a checkpoint is being written: its folder has a temporary name."""
        found = glob.glob(f"{self.workdir}/checkpoints/*")
        return any(not os.path.basename(path).isdigit() for path in found)

    def evaluating(self) -> bool:
        """Whether the last record is that of a step after which the run evaluates."""
        rows = metrics.read_records(f"{self.workdir}/metrics.jsonl")
        return bool(rows) and rows[-1]["kind"] == "train" and rows[-1]["step"] % EVAL == 0

    def send(self, number: int, moment, delay: float = 0.0, code: int | None = None) -> None:
        """Starts the run and sends a signal `delay` seconds after `moment()` becomes true."""
        process = self.start()
        while not moment():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(number)
        runs.finish(process, -number if code is None else code)


def reach(run: Run, step: int):
    """A moment: `step` is recorded."""
    return lambda: run.steps() >= step


def early(run: Run, seconds: float):
    """A moment: so many seconds from now, or the first new step when that is sooner."""
    end, first = time.monotonic() + seconds, run.steps() + 1
    return lambda: time.monotonic() >= end or run.steps() >= first


def kill(run: Run, where: str, draw: random.Random, seconds: float, last: int) -> None:
    """Kills -9 at a random moment by about step `last`: in start-up, or while it does `where`."""
    step = min(last, run.steps() + 1 + draw.randrange(max(1, last - run.steps())))
    doing = {"step": lambda: True, "save": run.saving, "evaluation": run.evaluating}

    def moment():
        steps = run.steps()
        return steps >= step and (doing[where]() or steps >= step + 8)

    if where == "start":
        run.send(signal.SIGKILL, early(run, draw.uniform(0, seconds)))
    else:
        run.send(signal.SIGKILL, moment, draw.uniform(0, 0.01))


def pair(tmp_path, source, settings) -> tuple[Run, Run, float]:
    """An uninterrupted run, one to interrupt, and the seconds until a run has begun."""
    cache = str(tmp_path / "cache")
    whole, broken = (
        Run(runs.arguments(source, tmp_path / name, settings), str(tmp_path / name), cache)
        for name in ("whole", "broken")
    )
    began = time.monotonic()
    runs.finish(whole.start())
    assert os.listdir(cache)  # of compiled programs, by JAX_COMPILATION_CACHE_DIR
    return whole, broken, (time.monotonic() - began) / 2


def check_same(whole: Run, broken: Run) -> None:
    """All records, bit for bit and in order; the summary; and nothing left of unfinished saves."""
    expected = runs.records(whole.workdir)
    for kind, first in (("train", 1), ("eval", EVAL)):
        steps = [r["step"] for r in expected if r["kind"] == kind]
        assert steps == list(range(first, STEPS + 1, first))
    assert runs.records(broken.workdir) == expected
    assert runs.summary(broken.workdir) == runs.summary(whole.workdir)
    assert runs.summary(broken.workdir)["finished"] is True
    assert sorted(os.listdir(broken.workdir)) == sorted(os.listdir(whole.workdir))
    assert sorted(os.listdir(f"{broken.workdir}/checkpoints")) == ["110", "120"]


def text_settings(tmp_path) -> dict:
    return runs.text(tmp_path, **LONG, accumulate=2)


@pytest.mark.slow
def test_killed_terminated_and_interrupted_run_equals_an_uninterrupted_one(tmp_path):
    draw = random.Random(0)
    whole, broken, seconds = pair(tmp_path, runs.TEXT, text_settings(tmp_path))
    broken.send(signal.SIGKILL, early(broken, draw.uniform(0, seconds)))
    broken.send(signal.SIGKILL, lambda: broken.steps() >= 19 and broken.saving())
    broken.send(signal.SIGTERM, reach(broken, broken.steps() + 2), code=train.UNFINISHED)
    stopped = runs.summary(broken.workdir)
    assert stopped["finished"] is False and stopped["step"] == broken.steps()
    assert os.path.isdir(f"{broken.workdir}/checkpoints/{stopped['step']}")
    broken.send(signal.SIGINT, reach(broken, broken.steps() + 3), code=train.UNFINISHED)
    assert runs.summary(broken.workdir)["step"] == broken.steps() > stopped["step"]
    runs.finish(broken.start())
    check_same(whole, broken)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["task", "text"])
def test_ten_kills_in_one_run(tmp_path, kind):
    source, settings = runs.MQAR, {**runs.TASK, **LONG}
    if kind == "text":
        source, settings = runs.TEXT, text_settings(tmp_path)
    whole, broken, seconds = pair(tmp_path, source, settings)
    draw = random.Random(kind)
    moments = ["start", "step", "save", "evaluation"] * 2 + ["start", "save"]
    draw.shuffle(moments)
    for i, where in enumerate(moments):
        kill(broken, where, draw, seconds, STEPS * (i + 1) // 11)
    runs.finish(broken.start())
    check_same(whole, broken)


def limited(args: list[str], size: int) -> subprocess.CompletedProcess:
    """The training command, unable to write files above `size` bytes, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, "-m", "memjax.train", *args],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=runs.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)},
        preexec_fn=limit,
    )


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_loses_nothing(tmp_path):
    """At a later checkpoint: the earlier one stays, and with room again the run goes on from it."""
    settings = {**runs.TASK, "steps": 80, "checkpoint.every": 4, "eval.every": 0}
    whole, broken = (runs.arguments(runs.MQAR, tmp_path / n, settings) for n in ("whole", "broken"))
    runs.finish(runs.command("train", *whole))
    process = runs.command("train", *broken)
    while not os.path.isdir(tmp_path / "broken" / "checkpoints" / "4"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    kept = [p for p in os.listdir(tmp_path / "broken" / "checkpoints") if p.isdigit()]
    kept.sort(key=int)
    assert kept[-1] != "80", "the run was over before it was killed"
    done = limited(broken, 8192)
    message = done.stderr.splitlines()[-1] if done.stderr else ""
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"the last complete one is of step {kept[-1]}. Make room" in done.stderr, message
    assert kept[-1] in os.listdir(tmp_path / "broken" / "checkpoints")
    runs.finish(runs.command("train", *broken))
    assert runs.records(tmp_path / "broken") == runs.records(tmp_path / "whole")
    assert runs.summary(tmp_path / "broken") == runs.summary(tmp_path / "whole")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    saver = checkpoint.Checkpoints(str(tmp_path), every=1)
    with pytest.raises(UserError, match="No space left.*MiB are needed.*none yet. Make room"):
        saver.save(1, {"w": np.zeros(1000)})
    assert os.listdir(tmp_path / "checkpoints") == []
