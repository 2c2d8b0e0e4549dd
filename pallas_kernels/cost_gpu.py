"""What every kernel takes of an H100 and an H200, on a machine that has none.

    python -m pallas_kernels.cost_gpu    # writes compiled_gpu.json and the table of README.md

Needs the plugin that `make test-kernels` installs (deviceless_gpu.py).
"""

import json

from pallas_kernels import deviceless_gpu, tables
from pallas_kernels.common import WIDTHS
from pallas_kernels.ops import ON_GPU

COMPILED = tables.HERE / "compiled_gpu.json"
PACKAGES = ("jax",)  # the plugin has its version
CASE = ("op", "decay", "width")
THREADS = 128  # of a kernel
# Of a multiprocessor: registers, and bytes of shared memory, 1024 of which every block takes.
REGISTERS, SHARED, OWN = 65536, 233472, 1024


def main():
    cases = [{"op": op, "decay": decay, "width": width} for op, decay in ON_GPU for width in WIDTHS]
    found = {
        **tables.made(*PACKAGES),
        "kernels": [
            row
            for target in deviceless_gpu.BANDWIDTH
            for row in deviceless_gpu.compiled(target, cases)
        ],
    }
    COMPILED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables.write({"gpu": f"Written {tables.when(found)}.\n\n{table(found['kernels'])}"})


def resident(kernel: dict[str, int]) -> int:
    """Blocks of a kernel that a multiprocessor holds at once."""
    registers = THREADS * (kernel["registers"] + -kernel["registers"] % 8)
    return min(REGISTERS // registers, SHARED // (kernel["shared"] + OWN))


def table(rows: list[dict]) -> str:
    """A line for each kernel and width; the targets that compile it to the same share one."""
    merged: dict[tuple, list[str]] = {}
    for row in rows:
        for name, kernel in row["kernels"].items():
            kib = f"{kernel['shared'] / 1024:.0f}"
            figures = (kernel["registers"], kernel["spills"], kib, resident(kernel))
            line = (row["op"], row["decay"], name, row["width"], *figures)
            merged.setdefault(line, []).append(row["target"].upper())
    head = ("op", "decay", "kernel", "width", "registers", "spilled", "KiB", "blocks")
    return tables.markdown([*head, "GPU"], [[*line, ", ".join(on)] for line, on in merged.items()])


if __name__ == "__main__":
    main()
