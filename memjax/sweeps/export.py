"""A sweep as something that runs elsewhere: plain commands, or a SkyPilot job on spot TPU VMs."""

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence

from memjax.errors import UserError, did_you_mean
from memjax.trials import Sweep, Trial


def commands(sweep: Sweep, trials: Sequence[Trial], root: str) -> list[str]:
    """The commands that train trials, those of the runs that others start from first, with a
    comment between the two."""
    firsts = {sweep.workdir(t.init_from, root): t.init_from for t in trials if t.init_from}
    before = [shlex.join(sweep.command(first, root)) for first in firsts.values()]
    if before:
        before.append("# the others start from the runs above, when they are finished")
    return [*before, *(shlex.join(sweep.command(trial, root)) for trial in trials)]


# ---------------------------------------------------------------- TPUs


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU as Google Cloud sells it.

    cores: that the number in a slice's name counts, per chip.
    single: the numbers of the slices of one host.  pods: those of several hosts, of 4 chips each.
    runtime: the version of the TPU VM's software.
    """

    cores: int
    single: Sequence[int]
    pods: Sequence[int]
    runtime: str


GENERATIONS = {
    "v4": Generation(2, (8,), [2**n for n in range(4, 13)], "tpu-ubuntu2204-base"),
    "v5litepod": Generation(1, (1, 4, 8), (16, 32, 64, 128, 256), "v2-alpha-tpuv5-lite"),
    "v5p": Generation(2, (8,), (16, 32, 64, *range(128, 12289, 128)), "v2-alpha-tpuv5"),
    "v6e": Generation(1, (1, 4, 8), (16, 32, 64, 128, 256), "v2-alpha-tpuv6e"),
}
EXAMPLES = ("tpu-v4-8", "tpu-v5litepod-8", "tpu-v5p-8", "tpu-v6e-8", "tpu-v6e-16")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice by its name in SkyPilot; hosts, and chips of each."""

    name: str
    hosts: int
    chips: int
    runtime: str


def tpu_slice(name: str) -> Slice:
    """The slice of a name such as "tpu-v6e-8".

    Raises UserError for a name that Google Cloud does not have; SkyPilot takes any.
    """
    found = re.fullmatch(r"tpu-(\w+)-(\d+)", name)
    known = found and GENERATIONS.get(found[1])
    if not found or not known:
        kinds = ", ".join(f"tpu-{kind}-N" for kind in GENERATIONS)
        raise UserError(
            f"--accelerator={name}: no such TPU; allowed are {kinds}.{did_you_mean(name, EXAMPLES)}"
        )
    size = int(found[2])
    if size in known.single:
        return Slice(name, 1, size // known.cores, known.runtime)
    if size in known.pods:
        return Slice(name, size // known.cores // 4, 4, known.runtime)
    sizes = [str(n) for n in (*known.single, *known.pods)]
    shown = sizes if len(sizes) < 12 else [*sizes[:8], "..", sizes[-1]]
    raise UserError(f"--accelerator={name}: tpu-{found[1]}-N has N of {', '.join(shown)}")


# ---------------------------------------------------------------- SkyPilot

YAML = """\
# {sweep}
# on {count} spot {slice}: `sky jobs launch {name}.yaml`. docs/sweeps.md has all the steps.
name: {name}
num_nodes: {count}
workdir: .
resources:
  infra: gcp
  accelerators: {slice}
  accelerator_args:
    runtime_version: {runtime}
  use_spot: true
  job_recovery:  # the job begins again, and the sweep continues with the runs in the bucket
    strategy: EAGER_NEXT_REGION
    max_restarts_on_errors: 3
file_mounts:
  /outputs:
    name: {bucket}
    store: gcs
    mode: MOUNT
setup: |
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --seed --python 3.12 ~/memjax
  ~/memjax/bin/python -m pip install --quiet -c constraints.txt -e '.[tpu,sweeps]'
run: |
  export PATH=~/.local/bin:$PATH
  . ~/memjax/bin/activate
  export RAY_AUTH_MODE=disabled  # from outside SkyPilot's network admits ssh alone
  ~/sky_templates/ray/start_cluster  # SkyPilot's own script, which waits for all hosts
  if [ "$SKYPILOT_NODE_RANK" != 0 ]; then exit 0; fi
  mkdir -p /outputs/{folder}
  cp /outputs/{folder}/results.jsonl {folder}/ || true  # of a job that was stopped
  code=0
  {command} || code=$?
  cp {folder}/README.md {folder}/results.jsonl {folder}/*.png /outputs/{folder}/ || true
  exit $code
"""


def skypilot(
    sweep: Sweep,
    *,
    accelerator: str,
    count: int,
    bucket: str,
    resources: Mapping[str, float] | None = None,
    only: str = "",
) -> str:
    """A SkyPilot task that runs a sweep on `count` spot slices and keeps its runs in a bucket.

    resources: of each process of a trial; default all chips of a host, and as many hosts as the
      slice has. A trial with fewer chips than a host is one process.
    only: as the sweep's --only.

    Raises UserError for names that Google Cloud does not take.
    """
    place = tpu_slice(accelerator)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", bucket):
        raise UserError(
            f"--bucket={bucket}: give the name of a bucket for the runs, which is made when it is "
            "not there: 3 to 63 of a-z, 0-9, '-', '_' and '.', beginning and ending with a letter "
            "or digit, and nobody else's"
        )
    needed = dict(resources or {"TPU": place.chips})
    whole = needed.get("TPU") == place.chips
    path = os.path.relpath(sweep.path)
    if path.startswith(os.pardir):
        raise UserError(f"--sweep={path}: give the command in the checkout that has the sweep")
    command = ["python", "-m", "memjax.sweep", f"--sweep={path}", "--address=127.0.0.1:6379"]
    command += ["--runs=/outputs/runs"]
    command += [f"--resources={','.join(f'{name}={n:g}' for name, n in needed.items())}"]
    command += [f"--hosts={place.hosts}"] if whole and place.hosts > 1 else []
    command += [f"--only={only}"] if only else []
    return YAML.format(
        sweep=f"{sweep.name}, by python -m memjax.sweep --sweep={path} --export=skypilot",
        name=f"memjax-{sweep.name.replace('_', '-')}",
        count=count,
        slice=place.name,
        runtime=place.runtime,
        bucket=bucket,
        folder=os.path.dirname(path),
        command=shlex.join(command),
    )
