"""Compiles for TPUs on a machine that has none, and reads from the compiler what a program costs.

Needs libtpu of jax's version (`pip install memjax[tpu]`). Import it before anything else makes jax
load libtpu. Figures are static: bundles, VLIW instructions of about one cycle each, weighted by the
trips of the loops around them. They hold no waiting for memory and are of one core.
"""

import atexit
import dataclasses
import glob
import os
import re
import shutil
import tempfile

from pallas_kernels import programs

os.environ.update(programs.WITHOUT_TPUS)
_DUMP = tempfile.mkdtemp(prefix="deviceless")
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
# The last pass alone: the dumps of all of them take longer than the compilation.
os.environ["LIBTPU_INIT_ARGS"] = (
    f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={_DUMP} "
    "--xla_jf_dump_llo_pass_label_regex=final.* --xla_jf_dump_hlo_text=false"
)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

TOPOLOGIES = {  # of common.GENERATIONS
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}


@dataclasses.dataclass
class Kernel:
    """One compiled kernel: cycles of a whole call, VMEM in bytes, stores of spilled registers in
    one grid step, and the share of bundles whose matrix unit is busy, in per cent."""

    cycles: int = 0
    vmem: int = 0
    spills: int = 0
    mxu: int = 0


@dataclasses.dataclass
class Cost:
    """kernels: by name. rest: XLA's own estimate of cycles for all else, 3 to 4 times too high for
    what only moves memory."""

    kernels: dict[str, Kernel]
    rest: int


def compile_for(generation: str, fn, *shapes):
    """The compiled program; shapes: trees of arrays or `jax.ShapeDtypeStruct`."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    sharding = SingleDeviceSharding(topology.devices[0])
    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
    )
    return jax.jit(fn).trace(*given).lower().compile()


def cost(generation: str, fn, *shapes) -> Cost:
    """What a whole jitted function costs.

    Raises ValueError for a loop whose number of trips cannot be read.
    """
    for entry in os.scandir(_DUMP):
        shutil.rmtree(entry) if entry.is_dir() else os.remove(entry)
    program = programs.Program(compile_for(generation, fn, *shapes).as_text())
    found = Cost({}, 0)
    for times, line in program.operations():
        name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line)
        if name and 'custom_call_target="tpu_custom_call"' in line:
            kernel, plain = _kernel(name[1], line), _plain(name[1])
            before = found.kernels.get(plain, Kernel())
            found.kernels[plain] = Kernel(
                before.cycles + times * kernel.cycles,
                *(max(pair) for pair in zip(_sizes(before), _sizes(kernel), strict=True)),
            )
        elif estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            found.rest += times * int(estimate[1])
    return found


def _sizes(kernel: Kernel) -> tuple[int, int, int]:
    return kernel.vmem, kernel.spills, kernel.mxu


def _plain(name: str) -> str:
    """The name that `pallas_call` was given, without what transformations add to it."""
    return re.sub(r"^((transpose|jvp|checkpoint|remat)_+)+|_*(\.\d+)?$", "", name)


# ---------------------------------------------------------------- what the compiler dumps

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:\s*((?:> ?)*)\{(.*)")
_EXIT = re.compile(r"scmp\.\w+\.[su]32\.totalorder \S+ (\d+) /\* (?:[^*]*:: )?loop exit test")


def _kernel(name: str, line: str) -> Kernel:
    use = _units(_file(f"*-{name}-*final_hlo-static-per-bundle-utilization.txt"))
    scoped = re.findall(r'scoped_memory_configs":\[([^\]]*)\]', line)
    sizes = re.findall(r'"size":"(\d+)"', " ".join(scoped))
    return Kernel(
        cycles=_cycles(_file(f"*-{name}-*final_bundles.txt", without="schedule-analysis")),
        vmem=int(sizes[-1]) if sizes else 0,
        spills=use["VSTORE:SPILL"],
        mxu=round(100 * use["busy"] / use["bundles"]),
    )


def _file(pattern: str, without: str = "\0") -> str:
    found = [p for p in sorted(glob.glob(f"{_DUMP}/{pattern}")) if without not in p]
    if not found:
        raise FileNotFoundError(f"the compiler wrote no {pattern}; libtpu was loaded before")
    with open(found[-1], errors="replace") as file:
        return file.read()


def _units(text: str) -> dict[str, int]:
    """How often each unit is used in one grid step, and bundles with a matrix product."""
    _, _, table = text.partition("CAPACTIY:")  # so spelled
    head, _, _, *lines = table.strip().splitlines()
    names = [unit.strip() for unit in head.split(",")]
    rows = [[int(x) for x in line.split()] for line in lines]
    used = {name: sum(row[i] for row in rows) for i, name in enumerate(names)}
    busy = sum(row[names.index("MXU")] > 0 for row in rows)
    return used | {"bundles": len(rows), "busy": busy}


def _cycles(text: str) -> int:
    """Bundles weighted by the trips of their loops. The loop over the grid is pipelined: it makes
    two trips more than there are grid steps, the first and the last with nothing to compute; no
    other loop of more than 4 trips stands outermost."""
    matches = filter(None, map(_BUNDLE.match, text.splitlines()))
    rows = [(m[1], m[2].count(">"), m[3]) for m in matches]
    weight = [1] * len(rows)
    for i, (label, depth, _) in enumerate(rows):
        if label != "LB":
            continue
        later = range(i + 1, len(rows))
        stop = next((j for j in later if rows[j][0] == "LB" and rows[j][1] <= depth), len(rows))
        end = 1 + max(j for j in range(i, stop) if rows[j][1] >= depth)
        inside = (text for _, d, text in rows[i:end] if d == depth)
        trips = [int(n) for text in inside for n in _EXIT.findall(text)]
        if not trips:
            raise ValueError("the number of trips of a loop in a kernel is unknown")
        times = trips[-1] - 2 if depth == 1 and trips[-1] > 4 else trips[-1]
        weight[i:end] = [times * w for w in weight[i:end]]
    return sum(weight)
