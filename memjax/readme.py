"""Writes the README's table of cells from the registry and a benchmark's figures.

    python -m memjax.benchmark --length=1,64,1024,4096,16384 --record \\
        --out=experiments/benchmark/cpu.json
    python -m memjax.readme README.md experiments/benchmark/cpu.json
"""

import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memjax import cells
from memjax.cell import FORMS
from memjax.registry import CellSpec

BEGIN, END = "<!-- cells: written by python -m memjax.readme -->\n", "<!-- /cells -->\n"
LENGTH = 4096
HEADINGS = ("cell", "what it is", "state", "scan", "chunked", "decode", "paper")

Records = Sequence[Mapping[str, Any]]


def rows(records: Records) -> Iterator[list[str]]:
    """One list of texts for each cell; "-" where nothing was measured."""
    for name in cells.names():
        spec = cells.get(name)
        ours = (r for r in records if r["form"] in FORMS)
        found = {r["form"]: r for r in ours if (r["cell"], r["length"]) == (name, LENGTH)}
        states = [r["state_bytes"] for r in found.values()]
        decode = [r["decode_us"] for r in found.values()]
        yield [
            f"`{name}`",
            what(spec),
            number(max(states, default=None), 1024, "{:.0f} KiB"),
            *(number(found[f]["both_ms"] if f in found else None, LENGTH / 1e3, "{:.1f}")
              for f in ("scan", "chunked")),
            number(min(decode, default=None), 1, "{:.0f}"),
            link(spec.paper),
        ]  # fmt: skip


def what(spec: CellSpec) -> str:
    """The first sentence of the file that registers the cell, without the name in front."""
    text = (sys.modules[spec.mixer.__module__].__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return text.partition(": ")[2].rstrip(".") or text.rstrip(".")


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
    """The README's text with the table between its marks; ValueError without them."""
    before, begun, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"the text needs the lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table(records) + END + after


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        sys.exit("usage: python -m memjax.readme README.md FIGURES.json")
    readme, figures = map(pathlib.Path, arguments)
    records = json.loads(figures.read_text(encoding="utf-8"))["records"]
    readme.write_text(written(readme.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
