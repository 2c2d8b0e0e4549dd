"""Writes the README's table of cells from the registry and the figures of benchmark runs.

State and operations are counted from the cells themselves, at the benchmark's sizes; the times, and
the peak of temporary memory per token of the chunked form's forward and backward pass, are those of
the figures.

python -m memjax.benchmark --length=4096 --out=experiments/benchmark/cpu.json
python -m memjax.readme README.md experiments/benchmark/cpu.json
"""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from memjax import cells, cost, inputs, workload
from memjax.cell import FORMS, initial_state
from memjax.config import UserError, exit_on_user_error, user_errors, write_text
from memjax.registry import CellSpec

BEGIN, END = "<!-- cells: written by python -m memjax.readme -->\n", "<!-- /cells -->\n"
LENGTH = 4096
SIZES = {"batch": 1, "heads": 4, "dim": 64, "chunk": 0}  # what the README says the figures are of
MICROSECONDS = "scan µs", "chunked µs", "decode µs"
HEADINGS = (
    "cell", "what a token does", "state", "kFLOP", *MICROSECONDS, "peak KiB", "context",
    "our choice", "paper",
)  # fmt: skip

Records = Sequence[Mapping[str, Any]]


def rows(records: Records) -> Iterator[list[str]]:
    """One list of texts for each cell; "-" where nothing was measured."""
    for name in cells.names():
        spec = cells.get(name)
        kind = type(spec.cell()).__name__  # several layers may have one memory
        ours = (r for r in records if r["form"] in FORMS)
        found = {r["form"]: r for r in ours if (r["class"], r["length"]) == (kind, LENGTH)}
        decode = [r["decode_us"] for r in found.values()]
        held, operations = of_one_token(spec)
        yield [
            f"`{name}`",
            spec.recurrence,
            number(held, 1024, "{:.0f} KiB"),
            number(operations, 1e3, "{:.0f}"),
            *(number(found[f]["both_ms"] if f in found else None, LENGTH / 1e3, "{:.1f}")
              for f in ("scan", "chunked")),
            number(min(decode, default=None), 1, "{:.0f}"),
            number(found.get("chunked", {}).get("peak_bytes"), LENGTH * 1024, "{:.0f}"),
            "yes" if spec.cell().folds else "-",
            spec.choice or "-",
            link(spec.paper),
        ]  # fmt: skip


def of_one_token(spec: CellSpec) -> tuple[int, int]:
    """Bytes of one sequence's state, and operations of one token read and written by `scan`."""
    shape = workload.Shape(length=LENGTH)
    cell, heads = workload.make_cell(spec, shape), shape.heads
    params = jax.eval_shape(lambda: cell.init_params(jax.random.key(0), heads))
    state = jax.eval_shape(functools.partial(initial_state, cell, batch=1, heads=heads), params)
    token = inputs.draw(cell, np.random.default_rng(0), 1, 1, heads)
    step = functools.partial(workload.forward, cell, "scan")
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return held, cost.flops(step, params, token, state)


def number(value: float | None, unit: float, shown: str) -> str:
    return "-" if value is None else shown.format(value / unit)


def link(paper: str) -> str:
    numbers = re.findall(r"arXiv (\d{4}\.\d{5})", paper)
    return ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in numbers)


def table(records: Records) -> str:
    """The table in Markdown."""
    lines = [list(HEADINGS), ["---"] * len(HEADINGS), *rows(records)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def written(readme: str, records: Records) -> str:
    """The README's text with the table between its marks; UserError without them."""
    before, begun, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise UserError(f"the text needs the lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table(records) + END + after


@exit_on_user_error
def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 3:
        raise UserError("usage: python -m memjax.readme README.md FIGURES.json ..")
    readme, *figures = map(pathlib.Path, arguments[1:])
    records = [record for path in figures for record in read(path)]
    with user_errors(str(readme), OSError):
        write_text(str(readme), written(readme.read_text(encoding="utf-8"), records))


def read(figures: pathlib.Path) -> Records:
    """The records of a benchmark's --out; UserError unless they are of the table's sizes."""
    with user_errors(f"{figures}: no figures of a benchmark", OSError, ValueError, KeyError):
        found = json.loads(figures.read_text(encoding="utf-8"))
        records, where = found["records"], found["platform"]
        sizes = {tuple(record[name] for name in SIZES) for record in records}
    if where != "cpu" or sizes - {tuple(SIZES.values())}:
        raise UserError(f"{figures}: the table is of {SIZES} on cpu; given {sizes} on {where}")
    return records


if __name__ == "__main__":
    main(sys.argv)
