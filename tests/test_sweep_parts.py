"""Sweeps without Ray and Optuna: runs that fail, spaces, what is exported, what is seen."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_sweeps import CONFIG, begun, command, file, rows_of, tell

from memjax import config, trials
from memjax.sweeps import export, search, table

__all__ = ["command", "file"]  # fixtures
ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- runs that end early


def test_failures_that_last_are_rows(file, command):
    """Of a loss that is not finite, and of too little memory; they are not figures, not fatal, and
    not tried again unless that is asked for."""
    tell(file, codes={"delta_net-0": [3], "rwkv4-0": [1]})
    code, out, err = command(f"--sweep={file}", "--only=seed=0")
    assert (code, err) == (0, "") and "delta_net-0: failed: the loss of step 5 is nan" in out
    rows = rows_of(file)
    assert [row["failure"] for row in rows] == [
        "the loss of step 5 is nan", "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
    ]  # fmt: skip
    sweep = trials.Sweep(str(file))
    for row, trial in zip(rows, (sweep.trials[0], sweep.trials[2]), strict=True):
        assert row == {**trial.labels, **trial.described(), "failure": row["failure"]}
    assert sweep.shown() == [] and not (file.parent / "experiment.png").exists()
    assert "2 of them in the results" in command(f"--sweep={file}", "--only=seed=0")[1]
    assert len(begun(file)) == 2
    command(f"--sweep={file}", "--only=seed=0", "--again")
    assert len(begun(file)) == 4 and all("failure" not in row for row in rows_of(file))
    assert len(trials.Sweep(str(file)).shown()) == 2


def test_too_little_memory_beside_another_run(file, command):
    """May be enough for one alone: no row says that it failed."""
    tell(file, codes={"rwkv4-0": [1]})
    arguments = (f"--sweep={file}", "--only=cell=rwkv4,seed=0", "--jobs=2")
    code, _, err = command(*arguments)
    assert code == 1 and "failed: rwkv4-0;" in err and rows_of(file) == []
    assert command(*arguments)[0] == 0 and len(rows_of(file)) == 1


def test_interrupted_runs_go_on_as_long_as_they_come_further(file, command):
    """Killed, or stopped by a signal, more often than `retries`; but not where nothing is new."""
    tell(file, codes={"delta_net-0": [-9, 75, 75, -9, 75], "delta_net-1": [75, -9, -9, 75]})
    arguments = (f"--sweep={file}", "--only=cell=delta_net", "--retries=1")
    code, out, err = command(*arguments)
    assert code == 1 and "failed: delta_net-1;" in err
    assert [row["seed"] for row in rows_of(file)] == [0] and len(begun(file)) == 6 + 3
    told = re.findall(r"delta_net-0-.*(?:begins again|continues from step \d)", out)
    assert [line.rpartition(" ")[2] for line in told] == ["again", "2", "3", "3", "5"]
    assert command(*arguments)[0] == 0 and len(rows_of(file)) == 2


# ---------------------------------------------------------------- spaces


def test_grid_and_sample():
    made = search.grid(cell=("a", "b"), lr=(1, 2))
    assert made == [{"cell": c, "lr": lr} for c in "ab" for lr in (1, 2)]
    space = {
        "cell": ("a", "b"),
        "lr": search.Range(1e-4, 1e-1, log=True),
        "width": search.Range(0.0, 1.0),
        "heads": search.Range(1, 3, log=True),
        "layers": search.Range(1, 3),
    }
    points = search.sample(space, 3000, seed=1)
    assert points == search.sample(space, 3000, seed=1) != search.sample(space, 3000, seed=2)
    # Four standard errors of a share of 3000 draws are at most 4 * 0.5 / sqrt(3000) = 0.037.
    shares = {
        1 / 2: lambda p: p["cell"] == "a",
        1 / 3: lambda p: p["lr"] < 1e-3,
        1 / 4: lambda p: p["width"] < 0.25,
        # log(1.5 / 0.5) / log(3.5 / 0.5)
        0.5646: lambda p: p["heads"] == 1,
        0.3333: lambda p: p["layers"] == 3,
    }
    for share, holds in shares.items():
        assert abs(sum(map(holds, points)) / 3000 - share) < 0.037, share
    for point in points:
        assert 1e-4 <= point["lr"] <= 1e-1 and float(f"{point['lr']:.3g}") == point["lr"]
        assert isinstance(point["heads"], int) and {point["heads"], point["layers"]} <= {1, 2, 3}
    for wrong in ((2, 1), (0.0, 1.0, True)):
        with pytest.raises(config.UserError, match="must have (0 < )?low < high"):
            search.Range(*wrong)


def test_a_search_knows_the_trials_of_rows():
    """Those of today's settings in its space; labels must say which point a trial is."""

    def trial(lr, batch=4):
        return trials.Trial({"lr": lr, "seed": 0}, CONFIG, {"optim.lr": lr, "batch": batch})

    wanted = search.Search({"lr": search.Range(1e-3, 1e-1)}, trial, count=3)
    rows = [t.labels | t.described() for t in (trial(0.01), trial(0.02, batch=8), trial(0.5))]
    assert wanted.known([*rows, {"seed": 1}]) == [trial(0.01)]
    assert wanted.known(rows, today=False) == [trial(0.01), trial(0.02)]
    with pytest.raises(config.UserError, match="no label 'lr' of the value 0.01"):
        search.Search(wanted.space, lambda lr: trials.Trial({"seed": 0}, CONFIG), count=3).made(
            {"lr": 0.01}
        )


def test_what_is_not_installed(file, command, monkeypatch):
    text = "\nfrom memjax.sweeps.search import Range, Search\ndef search():\n    return Search("
    text += '{"lr": Range(1e-3, 1e-1)}, lambda lr: Trial({"lr": lr}, "CONFIG"), count=2)\n'
    for package, flag in (("ray", "--address"), ("optuna", "search()")):
        monkeypatch.setitem(sys.modules, package, None)
        code, _, err = command(f"--sweep={file}", "--address=local")
        assert code == 2 and f"{flag} needs the package {package}" in err
        assert "run `pip install -e '.[sweeps]'`" in err and begun(file) == []
        file.write_text(file.read_text() + text.replace("CONFIG", CONFIG))


# ---------------------------------------------------------------- elsewhere


def test_exported_commands(file, command, monkeypatch):
    """What is printed can be given to a shell, and leaves what the sweep gathers."""
    code, out, err = command(f"--sweep={file}", "--export=commands", "--only=cell=delta_net")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2 and begun(file) == []
    for line in out.splitlines():
        subprocess.run(shlex.split(line), check=True)
    assert "2 of" not in command(f"--sweep={file}", "--only=cell=delta_net")[1].splitlines()[0]
    assert len(rows_of(file)) == 2 and len(begun(file)) == 2


GOLDEN = ROOT / "tests" / "golden"
EXPORTS = {
    "skypilot_host": ["--slices=4"],
    "skypilot_pod": ["--accelerator=tpu-v6e-16", "--only=cell=delta_net,seed=0"],
    "skypilot_chips": ["--accelerator=tpu-v5litepod-8", "--resources=TPU=1"],
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_job(name, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ("--sweep=experiments/eight_pairs/sweep.py", "--export=skypilot")
    code, out, err = command(*arguments, "--bucket=our-runs", *EXPORTS[name])
    assert (code, err) == (0, "")
    assert out == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--bucket=: give the name of a bucket"),
        (["--accelerator=tpu-v6-8"], "no such TPU; allowed are .*. Did you mean 'tpu-v6e-8'"),
        (["--accelerator=tpu-v6e-12"], "tpu-v6e-N has N of 1, 4, 8, 16, 32"),
        (["--accelerator=tpu-v5p-4"], "tpu-v5p-N has N of 8, 16, 32, 64, 128, .*, 12288"),
        (["--resources=TPU"], "expected names and numbers, as in CPU=1,TPU=4"),
    ],
)
def test_mistakes_of_an_export(command, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    sweep = "--sweep=experiments/eight_pairs/sweep.py"
    code, _, err = command(sweep, "--export=skypilot", *arguments)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


def test_slices():
    """Hosts and chips as Google Cloud lists them."""
    sizes = {
        "tpu-v4-8": (1, 4), "tpu-v4-32": (4, 4), "tpu-v5litepod-1": (1, 1),
        "tpu-v5litepod-8": (1, 8), "tpu-v5litepod-256": (64, 4), "tpu-v5p-8": (1, 4),
        "tpu-v5p-16": (2, 4), "tpu-v6e-4": (1, 4), "tpu-v6e-8": (1, 8), "tpu-v6e-16": (4, 4),
    }  # fmt: skip
    for name, size in sizes.items():
        found = export.tpu_slice(name)
        assert (found.hosts, found.chips) == size, name


def test_skypilot_takes_it(tmp_path):
    """`sky.Task.from_yaml`, in the environment that `make test-skypilot` makes."""
    python = ROOT / ".venv" / "skypilot" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv/skypilot; `make test-skypilot` makes it")
    program = (
        "import sys, sky\n"
        "for path in sys.argv[1:]:\n"
        "    task = sky.Task.from_yaml(path)\n"
        "    (place,) = task.resources\n"
        "    print(task.num_nodes, *place.accelerators, place.use_spot, *task.storage_mounts)\n"
    )
    paths = [str(GOLDEN / f"{name}.yaml") for name in EXPORTS]
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((GOLDEN / "skypilot_host.yaml").read_text().replace("resources:", "resorces:"))
    variables = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    made, refused = (
        subprocess.run(
            [python, "-c", program, *given], capture_output=True, text=True, env=variables
        )
        for given in (paths, [wrong])
    )
    assert made.stdout.splitlines() == [
        f"{nodes} {name} True /outputs"
        for nodes, name in ((4, "tpu-v6e-8"), (1, "tpu-v6e-16"), (1, "tpu-v5litepod-8"))
    ], made.stderr[-2000:]
    assert refused.returncode != 0 and "did you mean 'resources'" in refused.stderr


# ---------------------------------------------------------------- what is seen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """What a terminal shows after `text`, by its lines."""
    lines = [""]
    for part in re.split(r"(\n|\x1b\[\d+F|\x1b\[J)", text):
        if part == "\n":
            lines.append("")
        elif part.endswith("F") and part.startswith("\x1b"):
            assert lines[-1] == ""
            lines = [*lines[: -1 - int(part[2:-1])], ""]
        elif part != "\x1b[J":
            lines[-1] += part
    return lines[:-1]


def test_table(monkeypatch):
    """In a terminal: what ended stays, the lines of what runs are drawn anew, as many as fit."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "5")
    rows = {"a": {"loss": 2.0, "seconds": 1.0}, "x": {"failure": "nan"}}
    shown = table.Table(rows, 6, stream=Terminal())
    shown.show({"b": "step 1/2", "long": "step 2/2" + "." * 80})
    assert screen(shown.stream.getvalue()) == [
        "2 of 6 done, 2 running; best a, loss 2.0000", "  b     step 1/2",
        ("  long  step 2/2" + "." * 80)[:59],
    ]  # fmt: skip
    shown.ended("b", {"loss": 1.0, "seconds": 61.2})
    shown.show(dict.fromkeys("cdef", "begins"))
    first, head, *below = screen(shown.stream.getvalue())
    assert first.startswith("[1/4] b: loss 1.0000 in 61 s; best b, loss 1.0000; ")
    assert head.startswith("3 of 6 done, 4 running; best b, loss 1.0000; ")
    assert below == ["  c  begins", "  d  begins", "  and 2 more"]
    shown.ended("c", None)
    shown.show({})
    assert [line[:31] for line in screen(shown.stream.getvalue())] == [
        first[:31], "[2/4] c: failed, see its .log; ",
    ]  # fmt: skip


def test_lines_of_runs(tmp_path):
    assert table.progress_of(str(tmp_path), 50) == "begins"
    with open(tmp_path / "metrics.jsonl", "w") as log:
        for step in range(1, 900):
            log.write(f'{{"step": {step}, "kind": "train", "loss": {step / 100}}}\n')
        log.write('{"step": 900, "loss"')
    assert table.progress_of(str(tmp_path), 1000) == "step  899/1000  89.9% | loss  8.990"
