"""What the training step of a model of 1.3B parameters takes on slices of TPUs, none attached.

    python experiments/ahead/ahead.py

Runs `python -m memjax.aot` for each context and slice, a quarter of an hour each on two cores.
Results and table are beside this file. What is compiled is kept; --again compiles all of it.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

from memjax import results
from memjax.aot import size_in_words

FOLDER = pathlib.Path(__file__).parent
RESULTS = str(FOLDER / "results.jsonl")
CONFIG = "configs/hybrid_1b.py"
# Length of a row, slice, and settings that differ from those of the config.
CASES = (
    ("8k", "v5e:4x4", {}),
    ("128k", "v5e:4x4", {}),
    ("8k", "v5p:2x2x4", {}),
    ("128k", "v5p:2x2x4", {}),
    ("128k", "v5e:8x8", {"mesh.fsdp": 4, "mesh.context": 16, "accumulate": 4}),
)


def compiled(context, topology, changes):
    """The figures of one case."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "figures.json"
        flags = [f"--config={CONFIG}:{context}", f"--topology={topology}", f"--out={out}"]
        flags += [f"--config.{name}={value}" for name, value in changes.items()]
        subprocess.run([sys.executable, "-m", "memjax.aot", *flags], check=True)
        found = json.loads(out.read_text(encoding="utf-8"))
    return {"context": context, "date": str(datetime.date.today()), **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="compile all of it again")
    known = [] if parser.parse_args().again else results.read(RESULTS)
    rows = {(row["context"], row["topology"]): row for row in known}
    for context, topology, changes in CASES:
        if (context, topology) not in rows:
            rows[context, topology] = compiled(context, topology, changes)
            results.write(RESULTS, rows.values())
    results.write_tables(str(FOLDER / "README.md"), tables(rows.values()))


def tables(rows):
    """A line for each case."""
    head = ["row", "slice", "mesh", "tokens a chip", "parameters, optimiser", "temporary", "peak"]
    head += ["fits", "collectives", "a step at least", "MFU at most", "compiled in"]
    return {"ahead": (head, [line(row) for row in rows])}


def line(row):
    held = row["bytes"]
    tokens = row["rows"] * row["length"] // row["devices"]
    pieces = f" in {row['accumulate']} pieces" if row["accumulate"] > 1 else ""
    if row["fits"]:
        compiled = [size_in_words(held[name]) for name in ("temporary", "peak")]
        compiled += [f"yes, {size_in_words(row['memory'])}", moved(row["collectives"])]
    else:
        needs, offered = (size_in_words(row[name]) for name in ("needs", "offered"))
        compiled = ["-", "-", f"no: the compiler needs {needs} of {offered}", "-"]
    return [
        row["context"],
        f"`{row['topology']}`",
        ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()),
        f"{tokens}{pieces}",
        size_in_words(held["parameters"] + held["optimiser"]),
        *compiled,
        f"{row['seconds_at_least']:.2f} s",
        f"{100 * row['mfu_at_most']:.0f} %",
        f"{row['compile_seconds']:.0f} s",
    ]


def moved(collectives):
    """How many, and the bytes of their results on one chip."""
    number, size = (sum(kind[name] for kind in collectives.values()) for name in ("count", "bytes"))
    return f"{number}, {size_in_words(size)}"


if __name__ == "__main__":
    main()
