"""A run as a process of this machine. Ray's workers import this module: it needs neither jax nor
Ray."""

import ctypes
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from memjax.errors import UNFINISHED
from memjax.locks import lock

SAVING = 60.0  # seconds in which a run that is asked to end has to save


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that writes a file at its end.

    Attributes:
      command: the program and its arguments.
      done: the JSON file; a run of training has "finished" in it, False when it was interrupted.
      log: the file to which the output is added.
      environment: variables that are added to those of the process that runs it.
      folder: where the command runs, and where `done` and `log` are named from.
    """

    command: tuple[str, ...]
    done: str
    log: str
    environment: Mapping[str, str]
    folder: str


def execute(
    job: Job,
    stop: threading.Event | None = None,
    told: Callable[[str], None] = print,
    bound: bool = False,
) -> int:
    """Runs a job to its end, unless it has been finished; the exit code, -n for signal n.

    Two runs of one job are never made at once on a machine, or where they see one file system with
    locks: the log's lock is also the run's, whose output the log is, so that it outlives a kill of
    this process.

    stop: ends the run when it is set.  told: is given a word on what is waited for.
    bound: the run is asked to save and end when this process dies (on Linux).
    """
    stop = stop or threading.Event()
    done, path = (os.path.join(job.folder, name) for name in (job.done, job.log))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as log:
        waited = False
        while not lock(log, wait=False):
            if not waited:
                told(f"{job.log}: waiting for a run that another sweep began")
            waited = True
            if stop.wait(0.2):
                return UNFINISHED
        if finished(done):
            return 0
        if stop.is_set():
            return UNFINISHED
        process = subprocess.Popen(
            job.command,
            cwd=job.folder,
            env={**os.environ, **job.environment},
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches it through `stop` alone
            preexec_fn=_end_with_parent if bound and sys.platform == "linux" else None,
        )
        try:
            while process.poll() is None and not stop.wait(0.1):
                pass
        finally:  # Ray cancels by an exception
            _end(process)
        return process.returncode


def finished(path: str) -> dict[str, Any] | None:
    """What a job has left at its end; None before that."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    return found if found.get("finished", True) else None


def free_address() -> str:
    """host:port of this machine, as the others of its network see it, on which nothing listens."""
    import ray

    with socket.socket() as listener:
        listener.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"


def _end(process: subprocess.Popen) -> None:
    """Asks a process to save and end; kills it when it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Linux sends this process a SIGTERM when the thread that began it ends."""
    assert _LIBC is not None
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
