"""Several processes, one on each host, that run the same command as one.

Every process joins before it asks jax for anything else (`initialise`), makes its rows of each
batch and takes part in every step, evaluation and checkpoint. Process 0 alone writes and prints
(`first`).

Processes wait for each other at whatever all take part in. What may fail in one of them alone is
therefore done under `agreement`, which makes an error of one an error of all.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.config_text import difference, plain
from memjax.errors import UserError

# jax reads the first by itself, and the others nowhere.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ALONE = "set JAX_NUM_PROCESSES=1 to run in this process alone"


def initialise(timeout: int = 300) -> None:
    """Joins the other processes, where there are any; comes before any other call of jax.

    VARIABLES of the environment say who they are, or else a cluster that jax detects: TPU slices,
    Slurm, Open MPI, Kubernetes. Processes that are not all there after `timeout` seconds end, each
    with a message and exit code 2 (jax would abort them).

    Raises:
      UserError: variables that are incomplete or impossible, or a cluster that cannot be joined.
    """
    count = launched(os.environ)
    if count == 1 or jax.distributed.is_initialized():
        return
    given = explicit(os.environ)
    where = given.get("coordinator_address") or "the address that jax has found"

    def give_up():
        print(
            f"error: not all processes have met at {where} in {timeout} s; start the same command "
            f"on every host, check {', '.join(VARIABLES)} and that the hosts reach this port, or "
            f"{ALONE}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the main thread is inside of jax

    watch = threading.Timer(timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**given, initialization_timeout=timeout + 60)
    except Exception as err:
        # What jax says where there is no cluster, and, before it looks for one, in a notebook that
        # has computed something.
        alone = any(words in str(err) for words in ("coordinator_address should", "called before"))
        if given or count or not alone:
            raise UserError(
                f"no cluster to join ({err}); set {', '.join(VARIABLES)}, or {ALONE}"
            ) from err
    else:
        # jax has taken SIGTERM for itself; `signals` is about it.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    finally:
        watch.cancel()


def explicit(environment: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that VARIABLES give; {} leaves all to jax.

    Raises:
      UserError: some of them without the others (the address alone is jax's), or no numbers.
    """
    found = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not set(found) - {VARIABLES[0]}:
        return {}
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    if missing := [name for name in VARIABLES if name not in found]:
        raise UserError(f"{shown} without {' and '.join(missing)}; set all three, or {ALONE}")
    address, count, process = found.values()
    host, _, port = address.rpartition(":")
    numbers = count.isdecimal() and process.isdecimal() and int(process) < int(count)
    if not (host and port.isdecimal() and numbers):
        raise UserError(
            f"{shown}: expected HOST:PORT of process 0, the number of processes, and this one's, "
            "from 0 to that number - 1"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(process),
        "cluster_detection_method": "deactivate",
    }


def launched(environment: Mapping[str, str]) -> int | None:
    """How many processes there are by the user's or the launcher's word; None where neither says.

    jax's detection takes a single process for a cluster of one, with a port that depends on the job
    alone, so that two trials side by side in one job would meet there.
    """
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return 1
    if any(environment.get(name) for name in VARIABLES):
        return None
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"])
    if "SLURM_JOB_ID" in environment:
        return int(environment.get("SLURM_STEP_NUM_TASKS", 1))  # which srun sets
    tpu = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if tpu:
        return len(tpu.split(",")) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    return None


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The texts of all processes in their order; every process has to call it."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.pad(mine, (0, sizes.max() + 1 - len(mine)))
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def agreement() -> Iterator[None]:
    """A UserError that one process raises in here, all raise behind it."""
    error = None
    try:
        yield
    except UserError as err:
        error = err
    messages = gather(str(error or ""))
    if error:
        raise error
    for process, message in enumerate(messages):
        if message:
            raise UserError(f"process {process}: {message}")


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises a UserError that names the facts in which a process differs from process 0."""
    zero, *others = map(json.loads, gather(json.dumps(plain(facts))))
    for process, found in enumerate(others, 1):
        if lines := difference(zero, found):
            head = f"process {process} has another {what} than process 0. What differs, 0 -> other:"
            raise UserError("\n  ".join([head, *lines]) + "\nStart the same command on every host.")


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether to stop, because of SIGTERM or SIGINT; a second signal ends the
    process as usual. Several processes have to call it equally often; it gives all the same answer.
    """
    received: list[int] = []
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    else:
        before = {}

    def note(number, frame):
        del frame
        # Not print, which a signal may find in the middle of a line.
        os.write(2, b"\nstopping after this step; once more stops at once\n")
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield (lambda: bool(received)) if jax.process_count() == 1 else _Any(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Any:
    """Called by all processes: whether a process had anything in its list at the call before this.

    One call late, so that no process waits for the step in flight. It is not jax's own notice of
    SIGTERM (`reached_preemption_sync_point`), because orbax asks for that too, from the thread that
    ends a save: the step it names, an earlier one, can be taken for the one that the run has come
    to; the step to stop at has then gone by, and the signal is lost.
    """

    def __init__(self, noted: list):
        self._noted = noted
        mesh = Mesh(np.array(jax.devices()), "all")
        self._placed = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self) -> bool:
        mine = np.full(jax.local_device_count(), bool(self._noted))
        before = self._before
        self._before = self._any(jax.make_array_from_process_local_data(self._placed, mine))
        return before is not None and bool(before)
