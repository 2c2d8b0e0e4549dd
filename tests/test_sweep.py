"""The command that trains what an experiment lists, and the tables of its rows."""

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import time

import pytest
from fake_sweeps import (
    CONFIG,
    FILE,
    README,
    begun,
    command,
    file,
    made,
    process_of,
    rows_of,
    tell,
    wait_for_a_run,
)
from matplotlib.figure import Figure

from memjax import config, evaluate, results, sweep, trials

__all__ = ["command", "file"]  # fixtures
STARTED = """
def trials():
    first = Trial({"part": "first"}, "{CONFIG}:delta_net")
    return [
        Trial({"part": n}, "{CONFIG}:delta_net", {}, first, [{"length": 64}, {"length": n}])
        for n in (128, 256)
    ]

def keep(*found):
    return {"lengths": list(found)}
"""
PARTS = """
from matplotlib.figure import Figure

PARTS = ("experiment", "other")

def tables(rows):
    return {"rows": (["experiment", "cell"], [[row["experiment"], row["cell"]] for row in rows])}

def draw(rows):
    return Figure()
"""


def test_trains_what_is_missing_and_names_what_fails(file, command):
    code, out, err = command(f"--sweep={file}", "--jobs=2")
    assert code == 1 and "failed: rwkv4-1" in err and "rwkv4-1: failed" in out
    rows = rows_of(file)
    assert [(row["cell"], row["seed"]) for row in rows] == [
        ("delta_net", 0), ("delta_net", 1), ("rwkv4", 0),
    ]  # fmt: skip
    for row in rows:
        assert row["changes"] == {"batch": 4} and "ignored" not in row
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


def test_a_run_from_another_evaluated_several_times(file, command, monkeypatch):
    """Both trials start from one run, which is made once."""
    calls = []

    def figures(workdir, **arguments):
        calls.append((os.path.basename(workdir), arguments))
        return dict(arguments)

    monkeypatch.setattr(evaluate, "evaluate", figures)
    tell(file, seconds=0.2)
    file.write_text(file.read_text() + STARTED.replace("{CONFIG}", CONFIG))
    file.write_text(file.read_text().replace('"cell"', '"part"'))
    code, out, err = command(f"--sweep={file}", "--jobs=2")
    assert (code, err) == (0, ""), out
    first, *later = begun(file)
    assert first.startswith("first-") and len(later) == 2
    for line in later:
        assert line.endswith(f" --config.init_from={os.path.join('runs', 'experiment', first)}")
    assert [row["lengths"] for row in rows_of(file)] == [
        [{"length": 64}, {"length": n}] for n in (128, 256)
    ]
    begin = rows_of(file)[0]["init_from"]
    assert first == f"first-{begin['hash']}" and begin["config"].endswith("mqar.py:delta_net")
    command(f"--sweep={file}", "--again")
    assert len(calls) == 4 and made(file) == 3  # all of it was in runs/
    out = command(f"--sweep={file}", "--again", "--dry_run", "--only=part=128")[1]
    lines = [line for line in out.splitlines()[1:] if not line.startswith("#")]
    assert [first in line for line in lines] == [True, True]


def test_a_run_whose_first_one_fails_is_not_begun(file, command):
    text = STARTED.replace("{CONFIG}", CONFIG).replace('"part": "first"', '"part": "rwkv4-1"')
    file.write_text(file.read_text() + text)
    code, _, err = command(f"--sweep={file}")
    assert code == 1 and "failed: 128, 256" in err
    assert all(line.startswith("rwkv4-1-") for line in begun(file))


def test_an_experiment_of_others(file, command):
    """Both parts are trained and shown, and so is what is made of them."""
    root = file.parent.parent
    for name, text in (("other", file.read_text()), ("both", PARTS)):
        (root / name).mkdir()
        (root / name / "sweep.py").write_text(text)
        (root / name / "README.md").write_text(README.replace("accuracy", "rows"))
    (root / "other" / "README.md").write_text(README)
    both = root / "both" / "sweep.py"
    code, out, err = command(f"--sweep={both}", "--only=cell=delta_net")
    assert (code, err) == (0, ""), out
    assert "experiment: 2 trials, 0 of" in out and "other: 2 trials, 0 of" in out
    lines = "| experiment | delta_net |\n" * 2 + "| other | delta_net |\n" * 2
    assert lines in (root / "both" / "README.md").read_text()
    for name in ("both", "other", "experiment"):
        assert (root / name / f"{name}.png").exists()
        assert (root / name / "results.jsonl").exists() == (name != "both")
    both.write_text(PARTS.replace("other", "nowhere"))
    code, _, err = command(f"--sweep={both}")
    assert code == 2 and re.search("nowhere/sweep.py: no such file", err)


def test_rehash_trains_nothing(file, command):
    command(f"--sweep={file}", "--only=cell=delta_net")
    before = rows_of(file)
    file.write_text(file.read_text().replace('{"batch": 4}', '{"batch": 8}'))
    assert command(f"--sweep={file}", "--rehash")[0] == 0
    new = {"changes": {"batch": 8}}
    for old, row in zip(before, rows_of(file), strict=True):
        assert row["hash"] != old["hash"] and row == old | new | {"hash": row["hash"]}
    assert "2 trials, 2 of them" in command(f"--sweep={file}", "--only=cell=delta_net")[1]
    assert made(file) == 2


def test_rows_of_no_trial_stay(file, command):
    """Trials that are left out of the file for a while lose no results."""
    command(f"--sweep={file}", "--only=cell=delta_net")
    lost, kept = rows_of(file)
    file.write_text(file.read_text().replace("(0, 1)", "(1, 2)"))
    command(f"--sweep={file}", "--only=cell=delta_net")
    assert [row["seed"] for row in rows_of(file)] == [1, 2, 0]
    assert rows_of(file)[0] == kept and rows_of(file)[2] == lost
    assert len(trials.Sweep(str(file)).shown()) == 2
    assert command(f"--sweep={file}", "--rehash")[0] == 0
    assert rows_of(file)[2] == lost


def test_rows_are_written_one_after_another(file, monkeypatch):
    """Of sweeps that read and write at once none loses another one's row."""
    read = results.read
    monkeypatch.setattr(results, "read", lambda path: time.sleep(0.02) or read(path))
    sweeps = [trials.Sweep(str(file)) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(each.add, trial, dict(trial.labels))
            for each, trial in zip(sweeps, sweeps[0].trials, strict=True)
        ]
        for future in futures:
            future.result()
    assert rows_of(file) == [trial.labels for trial in sweeps[0].trials]


def test_figures_are_the_sweeps_own(file, command, monkeypatch):
    """What `memjax.evaluate` wrote into the run's folder is of whatever it was asked for."""
    monkeypatch.setattr(evaluate, "evaluate", lambda workdir: {"whole": True})
    file.write_text(file.read_text() + "\ndef keep(found):\n    return found\n")
    trial = trials.Sweep(str(file)).trials[0]
    workdir = file.parent.parent / "runs" / "experiment" / f"{trial.name}-{trial.hash}"
    workdir.mkdir(parents=True)
    (workdir / "evaluation.json").write_text('{"whole": false}')
    assert command(f"--sweep={file}", "--only=cell=delta_net,seed=0")[0] == 0
    assert rows_of(file)[0]["whole"] is True


def test_hash_knows_what_a_result_depends_on():
    def of(**changes):
        return trials.Trial({}, "configs/mqar.py:delta_net", changes).hash

    assert of() == of(**{"log.every": 7}) == of(**{"checkpoint.every": 7})
    assert len({of(), of(**{"optim.lr": 0.5}), of(**{"data.pairs": 4}), of(seed=1)}) == 4
    begin = trials.Trial({}, CONFIG)
    others = [
        {},
        {"init_from": begin},
        {"init_from": dataclasses.replace(begin, changes={"steps": 1})},
        {"evaluations": [{"length": 128}]},
    ]
    assert len({trials.Trial({}, CONFIG, {}, **other).hash for other in others}) == len(others)


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
    code, out, _ = command(f"--sweep={file}", "--dry-run", "--only=seed=1")
    lines = [line for line in out.splitlines() if "memjax.train" in line]
    assert code == 0 and len(lines) == 2 and made(file) == 0
    assert lines[0].endswith("mqar.py:delta_net,seed=1 --config.batch=4")


def test_an_interrupted_sweep_continues(file):
    """SIGTERM ends it with the code of an unfinished run and its rows; again, it goes on."""
    tell(file, seconds=60)
    process = process_of(file, "--only=cell=delta_net")
    wait_for_a_run(file, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues" in out
    assert made(file) == 1 and rows_of(file) == []
    tell(file)
    again = process_of(file, "--only=cell=delta_net")
    again.communicate(timeout=120)
    assert again.returncode == 0 and len(rows_of(file)) == 2


@pytest.mark.parametrize("kill", [False, True])
def test_one_run_in_a_folder(file, command, kill):
    """Another sweep's run is waited for, also when that sweep was killed; it is not made twice."""
    tell(file, seconds=4)
    process = process_of(file, "--only=cell=delta_net,seed=0")
    wait_for_a_run(file, process)
    if kill:
        process.kill()
        process.communicate()
    code, out, _ = command(f"--sweep={file}", "--only=cell=delta_net,seed=0")
    assert code == 0 and "waiting for a run that another sweep began" in out
    process.communicate(timeout=60)
    assert made(file) == 1 and [row["seed"] for row in rows_of(file)] == [0]


def test_values_with_commas():
    models = ("delta_net, beta <= 1", "delta_net, beta <= 2", "delta_net")
    made = [trials.Trial({"model": m, "seed": s}, CONFIG) for m in models for s in (0, 1)]
    for trial in made:
        only = ",".join(f"{label}={value}" for label, value in trial.labels.items())
        assert sweep.chosen(made, only) == [trial]
    assert sweep.chosen(made, "seed=1,model=delta_net, beta <= 2") == [made[3]]
    with pytest.raises(config.UserError, match="allowed are delta_net, 'delta_net, beta <= 1', "):
        sweep.chosen(made, "model=delta_net, beta <= 3,seed=0")


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


def test_points():
    """A line for each group, the first on top, with its mean."""
    rows = [{"cell": "b", "x": 0.5}, {"cell": "a", "x": 0.7}, {"cell": "b", "x": 1.0}]
    groups = results.grouped(rows, "cell")
    assert groups == {"b": [rows[0], rows[2]], "a": [rows[1]]}
    axes = Figure().subplots()
    results.draw_points(axes, groups, "x")
    found = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert found == [([0.5, 1.0], [0, 0]), ([0.75], [0]), ([0.7], [1]), ([0.7], [1])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert axes.yaxis_inverted()


def test_spread():
    rows = [{"cell": "a", "x": 0.5}, {"cell": "a", "x": 0.7}, {"cell": "b", "x": 1.0}]
    assert results.spread(results.select(rows, cell="a"), "x") == "0.600 (0.141), two seeds"
    assert results.spread([*rows, *rows], "x", 1) == "0.7 (0.2)"
    assert results.spread(results.select(rows, cell="b"), "x") == "1.000, one seed"
    assert results.spread([], "x") == "-" and results.labels(rows, "cell") == ["a", "b"]
    assert results.mean(rows, "x") == pytest.approx(2.2 / 3)


def test_an_error_of_one_trial_is_not_that_of_the_others(file, command, monkeypatch):
    text = file.read_text() + "\ndef keep(found):\n    return {'kept': 1 / found['seed']}\n"
    file.write_text(text)
    monkeypatch.setattr(evaluate, "evaluate", lambda at: {"seed": int("-1-" in at)})
    code, _, err = command(f"--sweep={file}", "--only=cell=delta_net")
    assert code == 1 and "failed: delta_net-0;" in err
    assert [row["kept"] for row in rows_of(file)] == [1.0]
    (log,) = (file.parent.parent / "runs" / "experiment").glob("delta_net-0-*.log")
    assert "ZeroDivisionError" in log.read_text()


@pytest.mark.slow
def test_a_real_run(tmp_path, command, monkeypatch):
    """One trial by the training command, with figures of its evaluation."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    text = FILE.replace("{CONFIG}", CONFIG).replace(
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
