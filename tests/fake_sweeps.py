"""A sweep of four trials whose runs are a stand-in, for the tests of sweeps."""

import functools
import os
import sys

import pytest
import tiny_runs as runs

from memjax import results, sweep, trials

CONFIG = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "mqar.py")
FILE = """
from matplotlib.figure import Figure
from memjax import results
from memjax.trials import Trial

def trials():
    return [
        Trial({"cell": cell, "seed": seed}, f"{CONFIG}:{cell},seed={seed}", {"batch": 4})
        for cell in ("delta_net", "rwkv4") for seed in (0, 1)
    ]

def tables(rows):
    cells = results.labels(rows, "cell")
    lines = [[c, results.spread(results.select(rows, cell=c), "query_accuracy")] for c in cells]
    return {"accuracy": (["cell", "accuracy"], lines)}

def draw(rows):
    return Figure()
"""
README = "# Which?\n\n<!-- table: accuracy -->\nold\n<!-- /table -->\n\nThat one.\n"
# Stands for the training command: fails on rwkv4, seed 1, unless a file says otherwise. FAKE_CODES
# has the exit codes of the first times that a run is begun; with 75 it leaves a checkpoint.
FAKE = """
import json, os, sys, time
workdir = sys.argv[1]
name = os.path.basename(workdir)
log = os.path.join(os.path.dirname(workdir), "runs.txt")
with open(log, "a") as file:
    file.write(" ".join([name, *sys.argv[2:]]) + "\\n")
with open(log) as file:
    begun = sum(line.split()[0] == name for line in file)
if "rwkv4-1" in workdir and not os.path.exists("mended"):
    sys.exit(1)
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
os.makedirs(workdir, exist_ok=True)
for part, codes in json.loads(os.environ.get("FAKE_CODES", "{}")).items():
    if part in name and begun <= len(codes):
        code = codes[begun - 1]
        if code == 3:
            print("error: the loss of step 5 is nan", file=sys.stderr)
        if code == 1:
            print("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory", file=sys.stderr)
        if code == 75:
            os.makedirs(os.path.join(workdir, "checkpoints", str(begun)))
        if code < 0:
            os.kill(os.getpid(), -code)
        if code:
            sys.exit(code)
summary = {"finished": True, "seed": 1, "seconds": 2.0, "ignored": 3}
summary["query_accuracy"] = len(workdir) % 7 / 10
with open(os.path.join(workdir, "summary.json"), "w") as file:
    json.dump(summary, file)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A sweep of four trials, whose runs are made by FAKE."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "sweep.py").write_text(FILE.replace("{CONFIG}", CONFIG))
    (folder / "README.md").write_text(README)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(
        trials.Trial, "command", lambda self, at: [sys.executable, f"{tmp_path}/fake.py", at]
    )
    monkeypatch.chdir(tmp_path)
    return folder / "sweep.py"


@pytest.fixture
def command(capsys):
    """Runs the command: (exit code, stdout, stderr)."""
    return functools.partial(runs.called, sweep, capsys)


def begun(file):
    """What was begun so far: the name of each run's folder, and further arguments."""
    log = file.parent.parent / "runs" / "experiment" / "runs.txt"
    return log.read_text().splitlines() if log.exists() else []


def made(file):
    return len(begun(file))


def rows_of(file):
    return results.read(str(file.parent / "results.jsonl"))
