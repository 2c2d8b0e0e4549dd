"""The command that trains what an experiment lists, and the tables of its rows."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from memjax import config, results, sweep

FILE = """
from matplotlib.figure import Figure
from memjax import results
from memjax.sweep import Trial

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
# Stands for the training command: fails on rwkv4, seed 1, unless a file says otherwise.
FAKE = """
import json, os, sys, time
workdir = sys.argv[1]
open(os.path.join(os.path.dirname(workdir), "runs.txt"), "a").write(workdir + "\\n")
if "rwkv4-1" in workdir and not os.path.exists("mended"):
    sys.exit(1)
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
os.makedirs(workdir, exist_ok=True)
summary = {"finished": True, "seed": 1, "query_accuracy": len(workdir) % 7 / 10, "ignored": 3}
json.dump(summary, open(os.path.join(workdir, "summary.json"), "w"))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A sweep of four trials, whose runs are made by FAKE."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    configs = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "mqar.py")
    (folder / "sweep.py").write_text(FILE.replace("{CONFIG}", configs))
    (folder / "README.md").write_text(README)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(
        sweep.Trial, "command", lambda self, at: [sys.executable, f"{tmp_path}/fake.py", at]
    )
    monkeypatch.chdir(tmp_path)
    return folder / "sweep.py"


@pytest.fixture
def command(capsys):
    """Runs the command: (exit code, stdout, stderr)."""

    def run(*args):
        before = set(flags.FLAGS)
        sweep.define_flags()
        capsys.readouterr()
        try:
            code = sweep.main(config.parse_flags(["sweep", *args], config=False)) or 0
        except SystemExit as end:
            code = end.code
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        return code, *capsys.readouterr()

    return run


def made(file):
    """How many runs were begun so far."""
    log = file.parent.parent / "runs" / "experiment" / "runs.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def rows_of(file):
    return results.read(str(file.parent / "results.jsonl"))


def test_trains_what_is_missing_and_names_what_fails(file, command):
    code, out, err = command(f"--sweep={file}", "--jobs=2")
    assert code == 1 and "failed: rwkv4-1" in err and "rwkv4-1: failed" in out
    rows = rows_of(file)
    assert [(row["cell"], row["seed"]) for row in rows] == [
        ("delta_net", 0), ("delta_net", 1), ("rwkv4", 0),
    ]  # fmt: skip
    for row in rows:
        assert row["changes"] == {"batch": 4} and "ignored" not in row and row["wall"] >= 0
        assert row["config"].endswith(f"mqar.py:{row['cell']},seed={row['seed']}")
    text = (file.parent / "README.md").read_text()
    assert "old" not in text and text.startswith("# Which?") and text.endswith("That one.\n")
    assert "| delta_net | 0." in text and (file.parent / "experiment.png").exists()
    (file.parent.parent / "mended").touch()
    assert command(f"--sweep={file}")[0] == 0
    assert len(rows_of(file)) == 4 and made(file) == 5
    assert "4 trials, 4 of them in the results" in command(f"--sweep={file}")[1]
    assert made(file) == 5
    assert command(f"--sweep={file}", "--again", "--only=cell=rwkv4")[0] == 0
    assert made(file) == 5  # finished in runs/, so that only the rows are made again


def test_other_settings_are_another_trial(file, command):
    command(f"--sweep={file}", "--only=cell=delta_net,seed=0")
    assert len(rows_of(file)) == made(file) == 1
    file.write_text(file.read_text().replace('{"batch": 4}', '{"batch": 8}'))
    command(f"--sweep={file}", "--only=cell=delta_net,seed=0")
    assert len(rows_of(file)) == 1 and made(file) == 2
    assert rows_of(file)[0]["changes"] == {"batch": 8}


def test_hash_knows_what_a_result_depends_on():
    def of(**changes):
        return sweep.Trial({}, "configs/mqar.py:delta_net", changes).hash

    assert of() == of(**{"log.every": 7}) == of(**{"checkpoint.every": 7})
    assert len({of(), of(**{"optim.lr": 0.5}), of(**{"data.pairs": 4}), of(seed=1)}) == 4


def test_show_trains_nothing(file, command):
    code, _, err = command(f"--sweep={file}", "--show")
    assert code == 2 and "has no row" in err and made(file) == 0
    command(f"--sweep={file}")
    (file.parent / "README.md").write_text(README)
    assert command(f"--sweep={file}", "--show")[0] == 0
    assert "old" not in (file.parent / "README.md").read_text() and made(file) == 4


def test_dry_run(file, command, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(file.parent.parent)
    code, out, _ = command(f"--sweep={file}", "--dry_run", "--only=seed=1")
    lines = [line for line in out.splitlines() if "memjax.train" in line]
    assert code == 0 and len(lines) == 2 and made(file) == 0
    assert lines[0].endswith("mqar.py:delta_net,seed=1 --config.batch=4")


def test_an_interrupted_sweep_continues(file):
    """SIGTERM ends it with the code of an unfinished run and its rows; again, it goes on."""
    begin = (
        "import sys; from absl import app; from memjax import config, sweep; "
        "sweep.Trial.command = lambda self, at: [sys.executable, 'fake.py', at]; "
        "sweep.define_flags(); "
        "app.run(sweep.main, flags_parser=lambda a: config.parse_flags(a, config=False))"
    )
    program = [sys.executable, "-c", begin, f"--sweep={file}", "--only=cell=delta_net"]
    environment = {**os.environ, "FAKE_SECONDS": "60", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)
    while not made(file):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues" in out
    assert made(file) == 1 and rows_of(file) == []
    done = subprocess.run(program, env={**environment, "FAKE_SECONDS": "0"}, timeout=120)
    assert done.returncode == 0 and len(rows_of(file)) == 2


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (None, ["--sweep=nowhere.py"], "no such file; give the path of a sweep.py"),
        (("def draw", "def paint"), [], "the file defines no function draw"),
        (
            ("for seed in (0, 1)", "for seed in (0, 0)"),
            [],
            "two trials have the labels delta_net-0",
        ),
        (None, ["--only=cell=delta_ned"], "no trial has it; .*delta_net, rwkv4.* Did you mean"),
        (None, ["--only=sell=3"], "no trial has it; allowed are cell, seed"),
        (None, ["more"], "'more' is no flag"),
    ],
)
def test_mistakes(file, command, change, arguments, message):
    if change:
        file.write_text(file.read_text().replace(*change))
    code, _, err = command(f"--sweep={file}", *arguments)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1 and made(file) == 0


def test_a_table_needs_its_place():
    table = (["a", "b"], [[1, "x"]])
    text = "<!-- table: one -->\n<!-- /table -->\n<!-- table: two -->\n<!-- /table -->\n"
    made = results.with_tables(text, {"two": table})
    assert made == text.replace("two -->\n", "two -->\n| a | b |\n| --- | --- |\n| 1 | x |\n")
    assert results.with_tables(made, {"two": table}) == made
    with pytest.raises(config.UserError, match="no place for the table 'three'"):
        results.with_tables(text, {"three": table})


def test_spread():
    rows = [{"cell": "a", "x": 0.5}, {"cell": "a", "x": 0.7}, {"cell": "b", "x": 1.0}]
    assert results.spread(results.select(rows, cell="a"), "x") == "0.600 (0.141)"
    assert results.spread(results.select(rows, cell="b"), "x") == "1.000 (nan)"
    assert results.spread([], "x") == "-" and results.labels(rows, "cell") == ["a", "b"]
    assert results.mean(rows, "x") == pytest.approx(2.2 / 3)


@pytest.mark.slow
def test_a_real_run(tmp_path, command, monkeypatch):
    """One trial by the training command, with figures of its evaluation."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    configs = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "mqar.py")
    text = FILE.replace("{CONFIG}", configs).replace(
        '{"batch": 4}', '{"batch": 4, "steps": 2, "optim.warmup": 1}'
    )
    text += "\ndef keep(found):\n    return {'near': found['by_distance'][0]}\n"
    (folder / "sweep.py").write_text(text)
    (folder / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    code, out, err = command(f"--sweep={folder / 'sweep.py'}", "--only=cell=delta_net,seed=1")
    assert (code, err) == (0, "")
    assert "[1/1] delta_net-1: query accuracy" in out
    (row,) = rows_of(folder / "sweep.py")
    assert row["seed"] == 1 and row["steps"] == 2 and row["near"]["queries"] > 0
    assert json.loads((tmp_path / "runs" / "experiment" / f"delta_net-1-{row['hash']}"
                       / "summary.json").read_text())["finished"]  # fmt: skip
