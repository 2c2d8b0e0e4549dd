"""Compiles for H100 and H200 on a machine that has none, and reads what each kernel takes.

    python -m pallas_kernels.deviceless_gpu h100 < cases.json    # a line of figures for each case

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, which `make test-kernels` puts beside
the environment's packages in .venv/cuda: among them, a plugin that finds no cuDNN would end every
run. Each target has its own process, since jax keeps a compiled kernel for whatever target.
"""

import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

PLUGIN = pathlib.Path(sys.prefix) / "cuda"
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}  # bytes a second
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_NAMED = {"h100": ("NVIDIA H100 80GB HBM3", 85899345920), "h200": ("NVIDIA H200", 150754820096)}


def compiled(target: str, cases: list[dict]) -> list[dict]:
    """What `main` prints for these cases, by a process with the plugin."""
    paths = [str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as dump:
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.deviceless_gpu", target],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join(paths),
                "MOSAIC_GPU_DUMP_TO": dump,
                "MOSAIC_GPU_DUMP_PTXAS": "1",
            },
            input=json.dumps(cases),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"cannot compile for {target}:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compile_for(target: str, fn, *shapes):
    """The compiled program; shapes: trees of arrays or `jax.ShapeDtypeStruct`."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import common

    name, memory = _NAMED[target]
    config = _TARGET.format(name=name, memory=memory, bandwidth=BANDWIDTH[target])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
    )
    with common.compiling_for(common.GPU_CAPABILITY):
        return jax.jit(fn).trace(*given).lower().compile()


def figures(folder: str) -> dict[str, dict[str, int]]:
    """Of each kernel whose compilation was dumped there: registers of a thread, bytes of them that
    were spilled, bytes of shared memory."""
    found: dict[str, dict[str, int]] = {}
    patterns = {
        "registers": ("ptxas", r"Used (\d+) registers"),
        "spills": ("ptxas", r"(\d+) bytes spill stores"),
        "shared": ("resources.txt", r"smem_scratch_bytes=(\d+)"),
    }
    for figure, (kind, pattern) in patterns.items():
        for path in glob.glob(f"{folder}/*.{kind}"):
            kernel = re.sub(rf"_\d+\.{kind}$", "", os.path.basename(path))
            values = re.findall(pattern, pathlib.Path(path).read_text(encoding="utf-8"))
            of_kernel = found.setdefault(kernel, {})
            of_kernel[figure] = max(of_kernel.get(figure, 0), *map(int, values))
    return found


def programs(op: str, decay: str, width: int) -> list[tuple]:
    """The functions of a case, the forward pass and both, each with the shapes it is compiled
    for."""
    import jax.numpy as jnp

    from pallas_kernels.ops import ON_GPU, answered, arguments, function

    arrays = arguments(op, decay, (1, 1024, 8, width), jnp.bfloat16)
    forward, both = (
        function(ON_GPU[op, decay][0], direction, platform="gpu")
        for direction in ("forward", "both")
    )
    return [(forward, arrays), (both, arrays, answered(arrays))]


def fingerprint(**case) -> str:
    """That of both passes of a case."""
    from pallas_kernels import common, ops

    with common.compiling_for(common.GPU_CAPABILITY):
        return ops.fingerprint(*programs(**case)[1])


def main():
    """Cases from stdin: op, decay and width; a line of JSON for each with the fingerprint of its
    program and its kernels, the larger figures of the forward pass alone and of both passes."""
    folder, target = os.environ["MOSAIC_GPU_DUMP_TO"], sys.argv[1]
    for case in json.load(sys.stdin):
        for path in glob.glob(f"{folder}/*"):
            os.remove(path)
        for fn, *shapes in programs(**case):
            compile_for(target, fn, *shapes)
        kernels = {
            name.removeprefix(f"{case['op']}_"): kernel
            for name, kernel in sorted(figures(folder).items())
        }
        row = {**case, "target": target, "program": fingerprint(**case), "kernels": kernels}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
