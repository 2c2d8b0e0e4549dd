"""Training in two processes of two devices each, and what they say when they cannot."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_runs as runs

from memjax import hosts, locks, train
from memjax.errors import UserError

LINEAR = f"{runs.MQAR}:linear_attention"
SETTINGS = {
    **runs.TASK,
    "steps": 200,
    "batch": 8,
    "optim.lr": 1e-3,
    "eval.every": 0,
    "checkpoint.every": 100,
}
MESH = {"mesh.data": 2, "mesh.fsdp": -1}
SHARED = {"mesh.fsdp": 1, "mesh.context": 2, "mesh.tensor": 2}

pytestmark = pytest.mark.usefixtures("compiled_once")
compiled_once = runs.compiled_once


def variables():
    """The environment of two processes, which meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
    return [{**shared, "JAX_PROCESS_ID": process} for process in "01"]


def start(source, workdir, settings, cache):
    """The training command in two processes."""
    given = runs.arguments(source, workdir, settings)
    return [runs.command("train", *given, cache=cache, **mine) for mine in variables()]


def finish(processes, code=0):
    """Waits for two processes that must exit with `code`; what the first prints. The other prints
    nothing but the lines of jax about its connections."""
    zero, other = (runs.finish(process, code)[0] for process in processes)
    assert not re.search("memjax|loss|step|accuracy|saved", other), other
    return zero


def interrupt(processes, after, number, receiver):
    """Sends a signal to one of two running processes when the first has printed `after`; the step
    at which both have stopped."""
    for line in processes[0].stdout:
        if after in line:
            break
    processes[receiver].send_signal(number)
    (step,) = re.findall(r"stopped at step (\d+) and saved", finish(processes, train.UNFINISHED))
    return int(step)


def saved(workdir):
    """The step of the newest checkpoint, which both processes and the summary have."""
    step = max(int(name) for name in os.listdir(f"{workdir}/checkpoints"))
    files = sorted(os.listdir(f"{workdir}/checkpoints/{step}/data"))
    places = [name for name in files if name.startswith("process")]
    summary = runs.summary(workdir)
    assert places == ["process_0-of-2.json", "process_1-of-2.json"]
    assert summary["step"] == step and summary["finished"] is False
    return step


def assert_close(found, expected):
    """The same losses up to the order of sums over devices: rounding of 6e-8, a few times."""
    assert [(r["kind"], r["step"]) for r in found] == [(r["kind"], r["step"]) for r in expected]
    losses = np.array([[r["loss"] for r in rows] for rows in (found, expected)])
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_two_processes_train_as_one_and_stop_together(tmp_path):
    """SIGTERM to one of them ends both behind the same step; one process goes on from there."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.train(runs.load(LINEAR, SETTINGS), str(one))["finished"]
    processes = start(LINEAR, two, {**SETTINGS, **MESH}, tmp_path / "cache")
    step = interrupt(processes, "step   3/200", signal.SIGTERM, receiver=1)
    assert step == saved(two) and 3 <= step < 200
    whole = runs.records(one)
    assert_close(runs.records(two), whole[:step])
    assert train.train(runs.load(LINEAR, SETTINGS), str(two))["finished"]
    assert_close(runs.records(two), whole)
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_continue_bit_for_bit(tmp_path):
    """Text, in pieces, with Ctrl-C to process 0; and, up to rounding, on a mesh where both
    processes share each row, as do the heads of each."""
    settings = {**runs.text(tmp_path, steps=60, batch=8, accumulate=2), "checkpoint.keep": 30}
    cache, meshed = tmp_path / "cache", {**settings, **MESH}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    printed = finish(start(runs.TEXT, whole, meshed, cache))
    assert "4 x cpu in 2 processes" in printed and "this model" in printed
    step = interrupt(start(runs.TEXT, broken, meshed, cache), "step  6/60", signal.SIGINT, 0)
    assert step == saved(broken) and 6 <= step < 60
    finish(start(runs.TEXT, broken, meshed, cache))
    expected = runs.records(whole)
    assert runs.records(broken) == expected
    assert runs.summary(broken) == runs.summary(whole)
    for name in os.listdir(broken / "checkpoints"):
        if int(name) > step:
            shutil.rmtree(broken / "checkpoints" / name)
    finish(start(runs.TEXT, broken, {**settings, **SHARED}, cache))
    assert_close(runs.records(broken), expected)


# ---------------------------------------------------------------- what cannot be

PAIR = """
import json, os, sys
import jax
import tiny_runs as runs
from memjax import hosts, train
from memjax.errors import UserError
from test_hosts import LINEAR, SETTINGS

def message(function, *given):
    try:
        function(*given)
    except UserError as error:
        return str(error)

def fails():
    with hosts.agreement():
        if not hosts.first():
            raise UserError("no room")

def trained(workdir, **changes):
    return message(train.train, runs.load(LINEAR, {**SETTINGS, **changes}), workdir)

hosts.initialise(timeout=200)
process, workdir = jax.process_index(), sys.argv[1]
print(json.dumps({
    "first": hosts.first(),
    "gathered": hosts.gather("\\u00fc" * 3 * process),
    "agreement": message(fails),
    "config": trained(workdir, seed=process),
    "workdir": trained(f"{workdir}{process}"),
    "mesh": trained(workdir, **{"mesh.data": 3}),
    "batch": trained(workdir, batch=6),
    "empty": not os.path.exists(workdir),
}))
"""


def test_what_two_processes_refuse(tmp_path):
    workdir = tmp_path / "run"
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{runs.ROOT}{os.pathsep}{runs.ROOT}/tests",
    }
    program = [sys.executable, "-c", PAIR, str(workdir)]
    processes = [
        subprocess.Popen(
            program,
            env={**os.environ, **environment, **mine},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mine in variables()
    ]
    outputs = [runs.finish(process)[0] for process in processes]
    zero, one = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert (zero.pop("first"), one.pop("first")) == (True, False)
    assert (zero.pop("agreement"), one.pop("agreement")) == ("process 1: no room", "no room")
    assert zero == one and zero["gathered"] == ["", "üüü"] and zero["empty"]
    assert zero["config"] == (
        "process 1 has another command than process 0. What differs, 0 -> other:\n"
        "  config.seed: 0 -> 1\nStart the same command on every host."
    )
    assert f"workdir: '{workdir}0' -> '{workdir}1'" in zero["workdir"]
    assert "data=3" in zero["mesh"] and "choose sizes that divide 4" in zero["mesh"]
    assert "6 rows do not divide into 4 parts" in zero["batch"]


def test_processes_that_do_not_come():
    """Process 1 alone; process 0 alone says the same."""
    _, mine = variables()
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", "from memjax import hosts; hosts.initialise(timeout=1)"],
        env={**os.environ, **mine, "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 2 and time.monotonic() - began > 1
    message = process.stderr.splitlines()[-1]
    assert message.startswith(
        f"error: not all processes have met at {mine['JAX_COORDINATOR_ADDRESS']}"
    )
    assert "in 1 s; start the same command on every host" in message
    assert message.endswith("or set JAX_NUM_PROCESSES=1 to run in this process alone")


ADDRESS, COUNT, PROCESS = hosts.VARIABLES


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({PROCESS: "0"}, "without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES; set all three"),
        ({ADDRESS: "a:1", COUNT: "2"}, "without JAX_PROCESS_ID; set all three, or set JAX_NUM_PRO"),
        ({ADDRESS: "a:1", COUNT: "2", PROCESS: "2"}, "from 0 to that number - 1"),
        ({ADDRESS: "a:1", COUNT: "two", PROCESS: "0"}, "JAX_NUM_PROCESSES=two, .* the number of"),
        ({ADDRESS: "a", COUNT: "2", PROCESS: "0"}, "expected HOST:PORT of process 0"),
    ],
)
def test_impossible_variables(environment, message):
    with pytest.raises(UserError, match=message):
        hosts.explicit(environment)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, None),
        ({COUNT: "1", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 1),  # a batch script, without srun
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_JOB_ID": "7", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
        ({ADDRESS: "a:1", "SLURM_JOB_ID": "7"}, None),  # jax finds the rest
    ],
)
def test_processes_that_a_launcher_has_started(environment, count):
    assert hosts.launched(environment) == count
    assert hosts.explicit({**environment, COUNT: ""}) == {}


def test_nothing_to_join(monkeypatch):
    """One process is left as it was, also after its first computation, when jax joins no other."""
    hosts.initialise()
    assert hosts.first() and hosts.gather("a") == ["a"]
    monkeypatch.setattr(os, "environ", {ADDRESS: "a:1", COUNT: "2", PROCESS: "0"})
    with pytest.raises(
        UserError, match="no cluster to join .*called before any JAX calls.* set JAX"
    ):
        hosts.initialise()


def test_two_trainings_in_one_workdir(tmp_path):
    settings, workdir = runs.load(LINEAR, runs.TASK), str(tmp_path / "run")
    with locks.alone(workdir):
        before = runs.tree(workdir)
        with pytest.raises(UserError, match="run: another training runs there; wait until it has"):
            train.train(settings, workdir)
        assert runs.tree(workdir) == before
    with locks.alone(workdir):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "), locks.alone(f"{tmp_path}/file/run"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    """Some network file systems have none; other errors are told."""

    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "file", "w") as file:
        if code == errno.EIO:
            with pytest.raises(OSError, match=os.strerror(code)):
                locks.lock(file, wait=False)
        else:
            assert locks.lock(file, wait=False)
