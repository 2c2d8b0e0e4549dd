"""What every kernel takes of an H100 and an H200, on a machine that has none.

    python -m pallas_kernels.cost_gpu    # writes compiled_gpu.json and the table of README.md
    python -m pallas_kernels.cost_gpu --only=chunk_delta    # of some ops; the other rows stay

Needs the plugin that `make test-kernels` installs (deviceless_gpu.py).
"""

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="these ops, by comma")
    given = parser.parse_args()
    kept = json.loads(COMPILED.read_text(encoding="utf-8")) if COMPILED.exists() else {}
    made = tables.made(*PACKAGES)
    only = tables.chosen(given.only, ON_GPU, kept, made)
    cases = [{"op": op, "decay": decay, "width": width} for op, decay in only for width in WIDTHS]
    rows = [
        row for target in deviceless_gpu.BANDWIDTH for row in deviceless_gpu.compiled(target, cases)
    ]
    stay = [row for row in kept.get("kernels", ()) if (row["op"], row["decay"]) not in only]
    order = list(deviceless_gpu.BANDWIDTH)
    rows = sorted(stay + rows, key=lambda row: order.index(row["target"]))
    found = {**made, "kernels": rows}
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
