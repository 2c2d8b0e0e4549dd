"""Compiles the training step of a config for devices that are not there, and says what it takes.

    python -m memjax.aot --config=configs/hybrid_1b.py:8k --topology=v5e:4x4
    python -m memjax.aot --config=configs/quickstart.py --topology=cpu:8 --config.mesh.tensor=2

The step is that of `python -m memjax.train`, with its mesh (`--config.mesh.fsdp=8`) and its forms
of the memories; the text of the config need not be there. A topology is a generation of TPUs and
the chips of a slice, v5e:4x4, v5p:2x2x4, v6e:2x4, v7x:2x2x1, which need libtpu (`pip install
memjax[tpu]`) and no TPU, or cpu:8, virtual CPU devices. Of one device, as jax counts them (a chip;
on v4 and v7x a core, two to a chip):

  parameters, optimiser, batch   what it holds of them; all are arguments of the step
  temporary                      activations and whatever else lives within the step, as the
                                 compiler has laid it out
  peak                           arguments, temporary memory, the program, and results that are not
                                 written over arguments
  collectives                    how many run in a step, those in loops as often as they run, and
                                 the bytes of their results

A step that does not fit is one that the compiler refuses; how much it would take is its own word.
FLOPs of a token are `memjax.cost.model_flops`; those of a step are its products as they are
computed, what is computed twice too, in loops as often as they run. Over the peak of the devices
they bound the time of a step from below and the utilisation (MFU) from above: nothing here says how
near a step comes. `--out` writes the figures as JSON.
"""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels import programs

os.environ.update(programs.WITHOUT_TPUS)  # before jax loads libtpu

import jax
from absl import app, flags
from jax.experimental import topologies

from memjax import chips, config, cost, metrics, progress, train, train_step
from memjax.config import UserError
from memjax.typing import PyTree

NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}  # of libtpu
TOPOLOGIES = (
    f"GENERATION:CHIPS with one of {', '.join(NAMES)}, such as v5e:4x4 or v5p:2x2x4, or cpu:NUMBER"
)
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\w*\[([\d,]*)\]")
# What libtpu says of a step that is too large: of all memory, or of temporaries alone.
_TOO_MUCH = re.compile(
    r"(?:Used |temporaries \()([\d.]+)([KMG]?)(?: of |\) exceeds available HBM \()([\d.]+)([KMG]?)"
)

# ---------------------------------------------------------------- devices


def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology.

    Raises UserError for one that there is not, or that lacks what compiles for it.
    """
    generation, _, shape = topology.partition(":")
    if generation == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return _virtual(int(shape))
    if generation not in NAMES or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={topology}: no such topology; write {TOPOLOGIES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology}: libtpu, which compiles for TPUs, is not installed; run pip "
            "install 'memjax[tpu]', which needs no TPU, or take cpu:8"
        )
    name = f"{NAMES[generation]}:{shape}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology}: libtpu has no such slice ({reason}); write {TOPOLOGIES}"
        ) from error
    return list(found.devices)


def _virtual(number: int) -> list[jax.Device]:
    """So many CPU devices, which have to be made before jax is used."""
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        pass  # jax has begun
    found = jax.devices("cpu")
    if len(found) < number:
        raise UserError(
            f"--topology=cpu:{number}: this process has {len(found)} CPU devices already; start "
            "another one"
        )
    return found[:number]


# ---------------------------------------------------------------- figures


def figures(settings: Any, topology: str) -> dict[str, Any]:
    """What the training step of a config takes on a topology; see the module's docstring.

    Bytes are of one device. Of a step that the compiler refuses there are "refusal" and, where it
    says so, "needs" and "offered", in place of what it would have laid out.
    """
    mesh_of = devices(topology)
    with config.user_errors("config"):
        run = train_step.build(settings, mesh_of)
        state, batch = run.abstract_state(), run.abstract_batch()
        jaxpr, lowered = run.lower()
    sizes = {"parameters": state.params, "optimiser": state.opt_state, "batch": batch}
    chip = chips.chip(mesh_of[0])
    found = {
        "topology": topology,
        "devices": len(mesh_of),
        "kind": mesh_of[0].device_kind,
        "mesh": {axis: size for axis, size in run.mesh.shape.items() if size > 1},
        "rows": settings.batch,
        "length": run.data.length,
        "accumulate": settings.accumulate,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "bytes": {name: on_one_device(tree) for name, tree in sizes.items()},
        "memory": None if chip is None else chip.memory,
        "flops_per_token": cost.model_flops(
            run.model.config, state.params, run.data.length, run.data.queries
        ),
        **bounds(jaxpr, chips.peak(mesh_of)),
        "versions": {**train.versions(), "libtpu": train.version("libtpu")},
    }
    step = found["flops_per_token"] * settings.batch * run.data.length
    if found["products"]:
        found["mfu_at_most"] = step / found["products"]
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (refusal := refused(str(error))):
            raise
        found |= refusal
    else:
        found |= {"fits": True, "collectives": collectives(compiled.as_text() or "")}
        found["bytes"] |= memory(compiled)
    return found | {"compile_seconds": round(time.perf_counter() - began, 1)}


def on_one_device(tree: PyTree) -> int:
    """Bytes that one device holds of placed shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def bounds(jaxpr: Any, peak: float | None) -> dict[str, float | None]:
    """Products of a step, and the least time that they take at the peak; None where something is
    not counted, such as a kernel."""
    try:
        products = cost.products(jaxpr)
    except ValueError:
        return {"products": None, "seconds_at_least": None}
    return {"products": products, "seconds_at_least": None if peak is None else products / peak}


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device that a program takes, as its compiler has laid it out."""
    found = compiled.memory_analysis()
    assert found is not None  # compilers for CPUs and TPUs say it
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
        "other results": found.output_size_in_bytes - found.alias_size_in_bytes,
    }
    return parts | {"peak": sum(parts.values())}


def refused(message: str) -> dict[str, Any]:
    """What a compiler says that finds no room for a step; {} for any other of its errors."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return {}
    used = _TOO_MUCH.search(message)
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    found: dict[str, Any] = {"fits": False, "refusal": message.splitlines()[0]}
    if used:
        found["needs"] = float(used[1]) * unit[used[2]]
        found["offered"] = float(used[3]) * unit[used[4]]
    return found


def collectives(text: str) -> dict[str, dict[str, int]]:
    """By kind, how many collectives run in one step, and the bytes of their results on one device.

    text: of a compiled program. The parts of a collective that runs beside other operations have
    one channel; it runs as often as the part that runs least.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for times, line in programs.Program(text).operations(inside=True):
        if match := _COLLECTIVE.search(line):
            result, kind, start = match.groups()
            channel = re.search(r"channel_id=\d+", line)
            name = channel[0] if channel else line
            least = min(times, found[name][1]) if name in found else times
            sizes = [_bytes(*array) for array in _ARRAY.findall(result)]
            found[name] = kind, least, max(sizes) if start else sum(sizes)
    counts: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    for kind, times, size in found.values():
        counts[kind] += times
        sums[kind] += times * size
    return {kind: {"count": counts[kind], "bytes": sums[kind]} for kind in sorted(counts)}


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


# ---------------------------------------------------------------- the command


def table(found: Mapping[str, Any]) -> str:
    """The figures for a person."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    pieces = f" in {found['accumulate']} pieces" if found["accumulate"] > 1 else ""
    count, flops = (progress.human(found[name]) for name in ("parameters", "flops_per_token"))
    lines = [
        f"{found['topology']}: {found['devices']} x {found['kind']}, mesh {mesh}",
        f"{found['rows']} x {found['length']} tokens a step{pieces}",
        f"{count} parameters, {flops} model FLOPs a token",
        "",
        "of one device",
        *(f"  {name:<18} {size_in_words(size):>14}" for name, size in found["bytes"].items()),
        f"  {verdict(found)}",
        "",
    ]
    if found["fits"]:
        lines.append("collectives of a step, and the bytes of their results on one device")
        for kind, values in found["collectives"].items():
            lines.append(f"  {kind:<18} {values['count']:>6} {size_in_words(values['bytes']):>14}")
        lines += [] if found["collectives"] else ["  none"]
    if found["seconds_at_least"]:
        seconds, share = found["seconds_at_least"], 100 * found["mfu_at_most"]
        lines.append(
            f"at the devices' peak: {seconds:.3g} s a step or more, MFU {share:.0f} % or less"
        )
    return "\n".join([*lines, f"compiled in {found['compile_seconds']:.0f} s"])


def size_in_words(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def verdict(found: Mapping[str, Any]) -> str:
    """Whether the step fits, and by how much."""
    if "needs" in found:
        sizes = found["needs"], found["offered"], found["needs"] - found["offered"]
        needs, offered, more = map(size_in_words, sizes)
        return f"does not fit: the compiler needs {needs}, {more} more than the {offered} there are"
    if not found["fits"]:
        return f"does not fit: {found['refusal']}"
    if found["memory"] is None:
        return "compiles; how much memory this device has is not known"
    spare = size_in_words(found["memory"] - found["bytes"]["peak"])
    return f"fits: the device has {size_in_words(found['memory'])}, {spare} to spare"


def define_flags() -> None:
    """The command's flags; made when it runs, so that other programs may import this module."""
    flags.DEFINE_string("topology", "", TOPOLOGIES)
    flags.DEFINE_string("out", "", "file for the figures, *.json")


@config.exit_on_user_error
def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise UserError(f"{argv[1]!r} is no flag; flags begin with --")
    given = flags.FLAGS
    found = figures(given.config, given.topology)
    print(table(found))
    if given.out:
        with config.user_errors(f"--out={given.out}", OSError):
            metrics.write_json(given.out, found)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # whatever is attached stays free
    define_flags()
    app.run(main, flags_parser=config.parse_flags)
