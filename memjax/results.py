"""Rows of an experiment's results.jsonl, chosen, averaged, and as the tables of its README."""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memjax.config_text import write_text
from memjax.errors import UserError

Row = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]  # the head, and the lines below it


def read(path: str) -> list[Row]:
    """The rows of a results.jsonl in file order; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: str, rows: Iterable[Row]) -> None:
    """Writes rows in one step: a kill leaves the old file or the new one."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def select(rows: Iterable[Row], **labels: Any) -> list[Row]:
    """The rows that have these labels."""
    return [row for row in rows if all(row.get(k) == v for k, v in labels.items())]


def labels(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a label, in the order in which they first come."""
    return list(dict.fromkeys(row[name] for row in rows))


def grouped(rows: Iterable[Row], name: str) -> dict[Any, list[Row]]:
    """The rows of each value of a label, in the order in which they first come."""
    rows = list(rows)
    return {value: select(rows, **{name: value}) for value in labels(rows, name)}


def mean(rows: Iterable[Row], name: str) -> float:
    """The mean of a figure over rows."""
    return statistics.mean(row[name] for row in rows)


def best(rows: Iterable[Row], name: str, figure: str) -> list[Row]:
    """The rows of the value of a label with the highest mean of a figure; none for no row."""
    return max(grouped(rows, name).values(), key=lambda group: mean(group, figure), default=[])


def spread(rows: Sequence[Row], name: str, digits: int = 3) -> str:
    """'mean (standard deviation)' of a figure over rows, and how many they are if fewer than three;
    '-' for no row."""
    if not rows:
        return "-"
    values = [row[name] for row in rows]
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{text}, one seed"
    text += f" ({statistics.stdev(values):.{digits}f})"
    return text if len(values) > 2 else f"{text}, two seeds"


def draw_points(axes: Any, groups: Mapping[str, Sequence[Row]], figure: str) -> None:
    """A line of matplotlib's `axes` for each group, from top to bottom: a point for each row, and
    their mean as a bar."""
    for height, group in enumerate(groups.values()):
        values = [row[figure] for row in group]
        axes.plot(values, [height] * len(values), "o", color="#1f77b4", alpha=0.7)
        axes.plot([statistics.mean(values)], [height], "|", color="black", markersize=16)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)


def markdown(table: Table) -> str:
    """A table as Markdown."""
    head, lines = table
    return "".join(
        f"| {' | '.join(map(str, line))} |\n" for line in (head, ["---"] * len(head), *lines)
    )


def with_tables(text: str, tables: Mapping[str, Table], where: str = "README.md") -> str:
    """A README's text with its tables made anew, each between the lines `<!-- table: name -->` and
    `<!-- /table -->`. where: what an error calls it.

    Raises UserError for a table that has no place in the text.
    """
    for name, table in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- /table -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise UserError(
                f"{where} has no place for the table {name!r}; write the lines {begin.strip()} "
                f"and {end} where it belongs"
            )
        text = before + begin + markdown(table) + end + rest.partition(end)[2]
    return text


def write_tables(readme: str, tables: Mapping[str, Table]) -> None:
    """Makes the tables of a README.md file anew; see `with_tables`."""
    with open(readme, encoding="utf-8") as file:
        text = file.read()
    write_text(readme, with_tables(text, tables, readme))
