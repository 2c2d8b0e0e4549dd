"""The static cost of every op on every TPU generation, on a machine that has none.

    python -m pallas_kernels.cost            # writes compiled.json and the tables of README.md
    python -m pallas_kernels.cost --plain    # that of the plain chunked forms too, half an hour
    python -m pallas_kernels.cost --only=chunk_delta    # of some ops; the other rows stay, of the
                                                        # plain forms too

Needs libtpu (`pip install memjax[tpu]`). README.md says how to read it.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from pallas_kernels import deviceless, tables
from pallas_kernels.ops import OPS, PEAKS, answered, arguments, fingerprint, function, work
from pallas_kernels.tables import markdown

COMPILED = tables.HERE / "compiled.json"
PACKAGES = ("jax", "libtpu")
# What names a row of the table of memory, and one of the table of costs.
CASE = ("op", "decay", "dtype", "width", "generation")
NAMED = ("op", "decay", "direction", "generation")
WORK = ("flops", "bytes")
DIRECTIONS = ("forward", "both")  # forward alone; forward and backward
SHAPE = (1, 4096, 8, 128)  # B, T, H, D of the table of costs, in bfloat16
WIDTHS = (64, 128, 256)
# Of what takes long to compile.
FEWER = dict.fromkeys(("deep_memory", "deep_network", "gka", "lattice"), [("bfloat16", 128)])
GENERATIONS = {"deep_network": ("v4", *PEAKS)}
DTYPES = ("bfloat16", "float32")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="the plain chunked forms too")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these ops, by comma")
    given = parser.parse_args()
    kept = json.loads(COMPILED.read_text(encoding="utf-8")) if COMPILED.exists() else {}
    made = tables.made(*PACKAGES)
    only = tables.chosen(given.only, OPS, kept, made)
    rows = kept if given.only else {}
    found = {
        **made,
        "costs": merged(rows, "costs", NAMED, costs(False, only)),
        "plain": kept.get("plain"),
        "memory": merged(rows, "memory", CASE, memory(only)),
    }
    if given.plain:
        old = (kept.get("plain") or {}) if given.only else {}
        found["plain"] = {**made, "costs": merged(old, "costs", NAMED, costs(True, only))}
    COMPILED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_tables(found)


def merged(kept: dict, table: str, names: tuple, new: Iterable[dict]) -> list[dict]:
    """The rows of a table, kept ones where there is no new one, in the order of `OPS`."""
    rows = {tuple(row[n] for n in names): row for row in (*kept.get(table, ()), *new)}
    order = list(OPS)
    return sorted(rows.values(), key=lambda row: order.index((row["op"], row["decay"])))


def memory(runs: dict) -> Iterator[dict]:
    """Rows of the table of memory."""
    for values in cases(runs):
        case = dict(zip(CASE, values, strict=True))
        yield {**case, **compiled(**case)}


def cases(runs) -> Iterator[tuple]:
    """The values of `CASE` that are recorded of some of `OPS`."""
    for op, decay in runs:
        for kind in FEWER.get(op, itertools.product(DTYPES, WIDTHS)):
            yield from ((op, decay, *kind, generation) for generation in generations(op))


def generations(op: str) -> Iterable[str]:
    """Those that an op is compiled for."""
    return GENERATIONS.get(op, deviceless.TOPOLOGIES)


def costs(plain: bool, ops: dict = OPS) -> Iterator[dict]:
    """Rows of the table of costs: cycles for each token and head."""
    number = math.prod(SHAPE[:3])
    for (op, decay), runs in ops.items():
        for direction in DIRECTIONS:
            arrays = arguments(op, decay, SHAPE, jnp.bfloat16)
            given = (arrays,) if direction == "forward" else (arrays, answered(arrays))
            for generation in PEAKS if plain or op in GENERATIONS else generations(op):
                options = {} if plain else {"platform": f"tpu {generation}"}
                fn = function(runs[plain], direction, **options)
                cost = deviceless.cost(generation, fn, *given)
                row: dict = {
                    "op": op,
                    "decay": decay,
                    "direction": direction,
                    "generation": generation,
                }
                kernels = sum(kernel.cycles for kernel in cost.kernels.values())
                row |= {"kernels": kernels / number, "rest": cost.rest / number}
                if not plain:
                    flops, size = work(fn, *given)
                    row |= {"flops": flops / number, "bytes": size / number}
                    row |= {name: vars(kernel) for name, kernel in cost.kernels.items()}
                print(json.dumps(row), flush=True)
                yield row


def program(op, decay, dtype, width, generation):
    """The function of a case, forward and backward, and the shapes that it is compiled for."""
    fn = function(OPS[op, decay][0], "both", platform=f"tpu {generation}")
    given = arguments(op, decay, (1, 1024, 8, width), jnp.dtype(dtype))
    return fn, given, answered(given)


def compiled(**case) -> dict:
    """The fingerprint of a case's program, and VMEM and spills of its kernels; or why it is
    refused."""
    print(*case.values(), flush=True)
    fn, *given = program(**case)
    try:
        cost = deviceless.cost(case["generation"], fn, *given)
    except NotImplementedError as reason:
        return {"refused": str(reason)}
    return {"program": fingerprint(fn, *given)} | {
        name.removeprefix(f"{case['op']}_"): {"vmem": kernel.vmem, "spills": kernel.spills}
        for name, kernel in sorted(cost.kernels.items())
    }


# ---------------------------------------------------------------- tables


def write_tables(found: dict) -> None:
    """Writes the tables of README.md."""
    written = f"Written {tables.when(found)}"
    plain = f"; the plain forms {tables.when(found['plain'])}" if found["plain"] else ""
    tables.write(
        {
            "costs": f"{written}{plain}.\n\n{cost_table(found)}",
            "memory": f"{written}.\n\n{memory_table(found['memory'])}",
        }
    )


def cost_table(found: dict) -> str:
    measured = found["plain"]["costs"] if found["plain"] else []
    plain = {tuple(row[n] for n in NAMED): row for row in measured}
    figures = "kernels", "rest", "plain form", "bound by arithmetic", "bound by memory", "MXU busy"
    head = ["op", "decay", "direction", "TPU", *figures]
    rows = []
    for row in found["costs"]:
        other = plain.get(tuple(row[n] for n in NAMED))
        peaks = PEAKS.get(row["generation"])
        bounds = [f"{row[n] / peaks[i]:.1f}" if peaks else "" for i, n in enumerate(WORK)]
        busy = [f"{k['mxu']} %" for k in row.values() if isinstance(k, dict)]
        rows.append(
            [
                *(row[name] for name in NAMED),
                *(f"{row[name]:.2f}" for name in ("kernels", "rest")),
                f"{other['kernels'] + other['rest']:.1f}" if other else "",
                *bounds,
                ", ".join(busy),
            ]
        )
    return markdown(head, rows)


def memory_table(rows: list[dict]) -> str:
    """MiB of VMEM / spilled stores of a grid step, forward; backward."""
    generations = list(deviceless.TOPOLOGIES)

    def cell(row):
        kernels = [value for value in row.values() if isinstance(value, dict)]
        if not kernels:
            return "refused"
        return "; ".join(
            f"{k['vmem'] / 2**20:.1f} / {k['spills']}" for k in reversed(kernels)
        )  # "backward" is before "forward", and "dkv" before "dq" and "fwd"

    found = {tuple(row[n] for n in CASE): cell(row) for row in rows}
    keys = dict.fromkeys(key[:-1] for key in found)
    lines = [[*key, *(found.get((*key, g), "") for g in generations)] for key in keys]
    return markdown([*CASE[:-1], *generations], lines)


if __name__ == "__main__":
    main()
