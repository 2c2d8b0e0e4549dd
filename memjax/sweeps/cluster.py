"""Trials on a Ray cluster: each a task, or a gang of tasks where a trial has several hosts.

The command of a trial runs in the driver's folder on whatever node has room, so that all nodes have
the same checkout and environment at the same path, and see the folder of the runs.
"""

import collections
import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from memjax.errors import DIVERGED, UNFINISHED, UserError, optional
from memjax.sweeps import process
from memjax.sweeps.runner import Runner, evaluation
from memjax.trials import Sweep

SLICE = "ray.io/tpu-slice-name"  # a label that Ray gives the hosts of a TPU slice
TOGETHER = 30.0  # seconds in which the others of a gang end after one has failed


class Cluster(Runner):
    """Runs are tasks of Ray.

    jobs: runs at a time; None: as many as the cluster has room for now.
    address: of the cluster, "auto" for the one that this machine is part of, "local" for a new one
      of this machine.
    hosts: processes of one run, each on another node: of one TPU slice where nodes belong to
      slices. Each is given JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    resources: of each process, as Ray counts them, such as {"TPU": 4}.

    Raises UserError when there is no Ray or no such cluster, or never room for a run.
    """

    def __init__(
        self,
        sweep: Sweep,
        jobs: int | None,
        root: str,
        retries: int = 3,
        *,
        address: str,
        hosts: int = 1,
        resources: Mapping[str, float],
    ):
        self.ray = optional("ray", "--address", "run `pip install -e '.[sweeps]'`")
        self.hosts, self.resources = hosts, dict(resources)
        self.gangs: collections.Counter[str] = collections.Counter()  # by the slice they are on
        self.choice = threading.Lock()
        self._connect(address)
        room = sum(self._room().values())
        if not room:
            nodes = self._nodes_in_words()
            self.ray.shutdown()
            raise UserError(
                f"--hosts={hosts} with --resources={_words(resources)}: the cluster at {address} "
                f"has no room for it; its nodes have {nodes}"
            )
        one_core = resources == {"CPU": 1}
        super().__init__(sweep, jobs or room, root, retries, one_core=one_core, alone=True)

    def attempt(self, job: process.Job) -> int:
        if self.hosts == 1:
            return self._alone(job)
        with self._gang() as placed:
            if self.stopped.is_set():  # perhaps without room for it
                return UNFINISHED
            where = [self._placed(placed, index) for index in range(self.hosts)]
            ask = self.ray.remote(process.free_address).options(**where[0] | {"num_cpus": 0})
            try:
                address = self.ray.get(ask.remote())
            except self.ray.exceptions.RayError:  # the node is lost
                return UNFINISHED
            return self._ended(
                [
                    self._begin(_member(job, index, self.hosts, address), **where[index])
                    for index in range(self.hosts)
                ]
            )

    def evaluate(self, workdir: str, path: str, arguments: Mapping[str, int]) -> None:
        job = self.job(evaluation(workdir, path, arguments), path, f"{workdir}.log")
        if self.hosts > 1:  # a host of a TPU slice cannot use its chips alone
            job = dataclasses.replace(job, environment={**job.environment, "JAX_PLATFORMS": "cpu"})
        self.finish(job, workdir, self._alone)

    def close(self) -> None:
        """Leaves the cluster, and ends it where it was of this process."""
        self.ray.shutdown()

    # ---------------------------------------------------------------- tasks

    def _alone(self, job: process.Job) -> int:
        return self._ended([self._begin(job, **self._options())])

    def _begin(self, job: process.Job, **options: Any) -> Any:
        # Attempts are counted in `Runner`, for tasks, gangs and processes alike.
        task = self.ray.remote(process.execute).options(max_retries=0, **options)
        return task.remote(job, bound=True)

    def _options(self) -> dict[str, Any]:
        """The resources of a process as Ray takes them."""
        rest = {name: n for name, n in self.resources.items() if name not in ("CPU", "GPU")}
        given = {"num_cpus": self.resources.get("CPU", 0), "resources": rest}
        return given | {"num_gpus": self.resources.get("GPU", 0)}

    def _ended(self, tasks: list[Any]) -> int:
        """The exit code of a run with these processes, all ended when this returns. A gang that
        lost one is interrupted, unless another one says what would end it again."""
        codes: list[int] = []
        waiting, end = tasks, math.inf
        while waiting and not self.stopped.is_set() and time.monotonic() < end:
            done, waiting = self.ray.wait(waiting, timeout=0.5)
            codes += [self._code(task) for task in done]
            if any(codes):
                end = min(end, time.monotonic() + TOGETHER)
        for task in waiting:
            self.ray.cancel(task)
        if waiting:
            self.ray.wait(waiting, num_returns=len(waiting), timeout=2 * process.SAVING)
        if self.stopped.is_set():
            return UNFINISHED
        lasting = {DIVERGED, 2}.intersection(codes)
        lost = any(code < 0 or code == UNFINISHED for code in codes)
        return max(lasting) if lasting else UNFINISHED if lost else max(codes)

    def _code(self, task: Any) -> int:
        errors = self.ray.exceptions
        try:
            return self.ray.get(task)
        except errors.RayTaskError:  # raised by `execute`
            raise
        except errors.RayError:  # its worker or its node is lost
            return UNFINISHED

    # ---------------------------------------------------------------- gangs

    @contextlib.contextmanager
    def _gang(self) -> Iterator[Any]:
        """A placement group for the processes of a run, when there is room for it."""
        util = self.ray.util
        while True:
            name = self._slice()
            group = util.placement_group(
                [self.resources] * self.hosts,
                strategy="STRICT_SPREAD",
                bundle_label_selector=[{SLICE: name}] * self.hosts if name else None,
            )
            try:
                ready, _ = self.ray.wait([group.ready()], timeout=20)
                if ready or self.stopped.is_set():
                    yield group
                    return
            finally:  # not ready: the slice may be lost, another one free
                with self.choice:
                    self.gangs[name] -= 1
                util.remove_placement_group(group)

    def _slice(self) -> str:
        """The slice on which the fewest gangs are, '' where nodes are of none."""
        while True:
            with self.choice:
                room = self._room()
                if room or self.stopped.is_set():
                    name = min(room, key=lambda n: self.gangs[n] / room[n], default="")
                    self.gangs[name] += 1
                    return name
            self.stopped.wait(5)

    def _placed(self, group: Any, index: int) -> dict[str, Any]:
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        return self._options() | {
            "scheduling_strategy": strategy(group, placement_group_bundle_index=index)
        }

    # ---------------------------------------------------------------- the cluster

    def _connect(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except ConnectionError as err:
            raise UserError(
                f"--address={address}: no Ray cluster there that lets this program in ({err}). "
                "Begin one with `ray start --head`, set RAY_AUTH_MODE=token if that speaks of a "
                "token, or write --address=local for a cluster of this machine alone"
            ) from err
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own there

    def _room(self) -> dict[str, int]:
        """Slice -> runs that it has room for at once; the nodes of none are under ''."""
        fitting: dict[str, list[int]] = collections.defaultdict(list)
        for node in self.ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                fits = min(int(has.get(name, 0) // n) for name, n in self.resources.items())
                name = node.get("Labels", {}).get(SLICE, "") if self.hosts > 1 else ""
                fitting[name] += [fits] if fits else []
        if self.hosts == 1:
            return {name: sum(fits) for name, fits in fitting.items() if fits}
        # Runs that span `hosts` nodes, the fullest of which bounds them.
        spans = {
            n: sorted(f, reverse=True)[self.hosts - 1 :: self.hosts] for n, f in fitting.items()
        }
        return {name: sum(fits) for name, fits in spans.items() if fits}

    def _nodes_in_words(self) -> str:
        return "; ".join(
            _words({k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU", "TPU")})
            for node in self.ray.nodes()
            if node["Alive"]
        )


def _member(job: process.Job, index: int, hosts: int, address: str) -> process.Job:
    """The job of one process of a gang, with a log of its own beside the first one's."""
    given = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(index),
    }
    log = f"{job.log.removesuffix('.log')}.{index}.log" if index else job.log
    return dataclasses.replace(job, log=log, environment={**job.environment, **given})


def parse_resources(text: str) -> dict[str, float]:
    """'CPU=1,TPU=4' as a dictionary.

    Raises UserError for what is none.
    """
    found = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            found[name] = 0.0
        if not name or found[name.strip()] <= 0:
            raise UserError(f"--resources={text}: expected names and numbers, as in CPU=1,TPU=4")
    return found


def _words(resources: Mapping[str, float]) -> str:
    return ",".join(f"{name}={n:g}" for name, n in resources.items())
