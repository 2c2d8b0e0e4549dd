"""Sweeps through Ray and Optuna, on clusters that one machine simulates."""

import collections
import concurrent.futures
import contextlib
import os
import pathlib
import re
import signal
import time

import pytest
import tiny_runs as runs
from fake_sweeps import (
    CONFIG,
    FILE,
    README,
    begun,
    command,
    file,
    process_of,
    rows_of,
    tell,
    wait_for_a_run,
)

from memjax import results, trials
from memjax.sweeps import cluster, search

ray = pytest.importorskip("ray")
pytest.importorskip("optuna")
cluster_utils = pytest.importorskip("ray.cluster_utils")

__all__ = ["command", "file"]  # fixtures
SEARCH = """
from memjax.sweeps.search import Range, Search

def search():
    return Search(
        {"cell": ("delta_net", "rwkv4"), "lr": Range(1e-3, 1e-1, log=True)},
        lambda cell, lr: Trial({"cell": cell, "lr": lr}, f"{CONFIG}:{cell},lr={lr}"),
        count=5,
    )
"""
NAMES = ("ray", "local")
REAL = """
def trials():
    return [
        Trial({"cell": "delta_net", "lr": lr}, "{CONFIG}:delta_net", {CHANGES} | {"optim.lr": lr})
        for lr in (1e-2, 1e30)
    ]

def keep(found):
    return {"by_distance": found["by_distance"]}
"""


@pytest.fixture
def nodes():
    """Begins a cluster of nodes with these settings beside a head on which nothing runs."""
    made = []

    def of(*settings):
        made.append(cluster_utils.Cluster())
        made[0].add_node(num_cpus=0)
        added = [made[0].add_node(**each) for each in settings]
        made[0].wait_for_nodes()
        return made[0], added

    yield of
    ray.shutdown()
    for each in made:
        each.shutdown()


def pids(file, name):
    """Of the run with this name that was begun last: Ray's worker and the node's raylet. Waits for
    it."""
    path = file.parent.parent / "pids.txt"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        lines = path.read_text().splitlines() if path.exists() else []
        found = [line.split()[1:] for line in lines if line.split()[0] == name]
        if found:
            return tuple(map(int, found[-1]))
        time.sleep(0.1)
    raise AssertionError(f"{name} was not begun")


def raylet_of(node):
    return node.all_processes["raylet"][0].process.pid


def test_no_cluster(file, command, monkeypatch):
    def refused(**_):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", refused)
    code, _, err = command(f"--sweep={file}", "--address=auto")
    assert code == 2 and "--address=auto: no Ray cluster there" in err and err.count("\n") == 1


def test_a_killed_worker_and_a_lost_node(file, command, nodes):
    """What hangs there is begun again elsewhere; not before the processes that were left end, which
    would otherwise take 600 seconds."""
    (file.parent.parent / "mended").touch()
    tell(file, hangs={"delta_net-0": 1, "delta_net-1": 1})
    simulated, added = nodes({"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1})
    sweeping = process_of(file, f"--address={simulated.address}")
    worker, _ = pids(file, "delta_net-0")
    os.kill(worker, signal.SIGKILL)
    _, raylet = pids(file, "delta_net-1")
    (lost,) = (node for node in added if raylet_of(node) == raylet)
    simulated.remove_node(lost, allow_graceful=False)
    out, _ = sweeping.communicate(timeout=200)
    assert sweeping.returncode == 0 and out.count("begins again") == 2, out
    times = collections.Counter(name.rpartition("-")[0] for name in begun(file))
    assert times == {"delta_net-0": 2, "delta_net-1": 2, "rwkv4-0": 1, "rwkv4-1": 1}
    rows = rows_of(file)
    assert len(rows) == 4
    command(f"--sweep={file}", "--again")  # here, of the same runs
    assert rows_of(file) == rows and len(begun(file)) == 6


def test_gangs(file, command, nodes, monkeypatch):
    """Two runs of two processes, each within one slice; one that loses a process is begun again as
    a whole, on the slice that is free by then."""
    monkeypatch.setattr(cluster, "TOGETHER", 1.0)
    tell(file, seconds=1, codes={"delta_net-0/1": [-9]}, hangs={"delta_net-0/0": 1})
    labels = [{"labels": {cluster.SLICE: name}} for name in "AABBC"]
    simulated, added = nodes(*({"num_cpus": 1, **label} for label in labels))
    arguments = (f"--sweep={file}", "--only=cell=delta_net", f"--address={simulated.address}")
    code, out, err = command(*arguments, "--hosts=3")
    assert code == 2 and "--hosts=3 with --resources=CPU=1: the cluster at" in err
    assert "has no room for it; its nodes have" in err and begun(file) == []
    code, out, err = command(*arguments, "--hosts=2")
    assert (code, err) == (0, "") and out.count("begins again") == 1, out
    times = collections.Counter(name.split("-")[1] + name[-2:] for name in begun(file))
    assert times == {"0/0": 2, "0/1": 2, "1/0": 1, "1/1": 1}
    assert len(rows_of(file)) == 2
    logs = [path.name for path in (file.parent.parent / "runs" / "experiment").glob("*.log")]
    assert len(logs) == 4 and sum(name.endswith(".1.log") for name in logs) == 2
    of_slice = dict(zip(map(raylet_of, added), "AABBC", strict=True))
    of_run = [[of_slice[pids(file, f"delta_net-{n}/{i}")[1]] for i in (0, 1)] for n in (0, 1)]
    assert all(each in (["A", "A"], ["B", "B"]) for each in of_run), of_run


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_search_continues(file, end):
    """The trials that ran when the driver was killed are finished, and no more than the search's
    are made."""
    file.write_text(file.read_text() + SEARCH.replace("{CONFIG}", CONFIG))
    tell(file, seconds=2)
    arguments = ("--address=local", "--jobs=2")
    driver = process_of(file, *arguments)
    while len(begun(file)) < 3:
        wait_for_a_run(file, driver)
        time.sleep(0.1)
    driver.send_signal(end)
    out, _ = driver.communicate(timeout=60)
    assert (driver.returncode, "the same command continues" in out) in ((-9, False), (75, True))
    finished = [row["hash"] for row in rows_of(file)]
    first = begun(file)
    tell(file)
    again = process_of(file, *arguments)
    out, _ = again.communicate(timeout=200)
    assert again.returncode == 0, out
    assert f"5 trials, {len(finished)} of them in the results" in out
    assert len(rows_of(file)) == 5 and set(first) <= set(begun(file))
    assert len(set(begun(file))) == 5
    for name, times in collections.Counter(begun(file)).items():
        assert times == 1 or name in first and name.rpartition("-")[2] not in finished
    sweep = trials.Sweep(str(file))
    path = file.parent.parent / "runs" / "experiment" / "study.journal"
    study = search.Study(sweep.search, str(path), sweep.rows()).study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5
    values = sorted(trial.value for trial in study.trials)
    assert values == sorted(row["query_accuracy"] for row in rows_of(file))


def real(folder, changes):
    """A sweep of real runs in a folder, the second of which diverges."""
    text = REAL.replace("{CONFIG}", runs.MQAR).replace("{CHANGES}", repr(runs.TASK | changes))
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "sweep.py").write_text(FILE + text)
    (folder / "experiment" / "README.md").write_text(README)


def test_a_real_gang(tmp_path, command, nodes, monkeypatch):
    """Two processes of `memjax.train` meet, end as one run, and are evaluated."""
    real(tmp_path, {"steps": 8})
    simulated, _ = nodes({"num_cpus": 1}, {"num_cpus": 1})
    monkeypatch.chdir(tmp_path)
    arguments = (f"--address={simulated.address}", "--hosts=2", "--only=lr=0.01")
    code, out, err = command("--sweep=experiment/sweep.py", *arguments)
    assert (code, err) == (0, ""), out
    (row,) = results.read("experiment/results.jsonl")
    assert row["steps"] == 8 and row["by_distance"]
    (log,) = tmp_path.glob("runs/experiment/delta_net-0.01-????????????.log")
    assert "in 2 processes" in log.read_text()


def test_a_real_run_resumes_and_another_diverges(tmp_path, command, monkeypatch):
    """A worker is killed while it trains: the row is that of a run without interruption. A loss
    that is not finite is a row of its own."""
    for name in NAMES:
        real(tmp_path / name, {"steps": 2000, "checkpoint.every": 200, "eval.every": 0})
    monkeypatch.chdir(tmp_path / "ray")
    monkeypatch.setattr(trials.Sweep, "show", lambda self: None)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_the_worker, tmp_path / "ray")
        code, out, err = command("--sweep=experiment/sweep.py", "--address=local", "--jobs=1")
        killing.result()
    assert (code, err) == (0, "") and "delta_net-0.01-" in out and "continues from step" in out
    (log,) = tmp_path.glob("ray/runs/experiment/delta_net-0.01-*.log")
    assert re.search("continuing from the checkpoint of step [1-9]", log.read_text())
    monkeypatch.chdir(tmp_path / "local")
    assert command("--sweep=experiment/sweep.py", "--jobs=2")[0] == 0
    rows = [results.read(str(tmp_path / name / "experiment" / "results.jsonl")) for name in NAMES]
    for row, same in zip(*rows, strict=True):
        assert row.keys() == same.keys()
        differ = {key for key in row if row[key] != same[key]}
        assert differ <= {"seconds", "tokens_per_second"}, differ
    assert rows[0][0]["by_distance"] and re.match("the (loss|grad_norm)", rows[0][1]["failure"])


def kill_the_worker(folder):
    """Kills Ray's worker of the first run once that has a checkpoint."""
    end = time.monotonic() + 200
    while not (steps := list(folder.glob("runs/*/delta_net-0.01-*/checkpoints/[1-9]*[0-9]"))):
        assert time.monotonic() < end
        time.sleep(0.02)
    workdir = str(steps[0].parent.parent.relative_to(folder))
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has just ended
            if f"--workdir={workdir}" in (path / "cmdline").read_text().split("\0"):
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                os.kill(int(parent), signal.SIGKILL)
                return
    raise AssertionError("the run has ended")
