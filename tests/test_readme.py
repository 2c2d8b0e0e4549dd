"""The table of cells that goes into the README."""

import json
import pathlib
import re

import pytest

from memjax import cells, readme, tasks
from memjax.errors import UserError


def record(form, both, decode, **changes):
    known = {"class": "DeltaNet", "length": readme.LENGTH, "peak_bytes": 80 * 2**20}
    return {**known, "form": form, "both_ms": both, "decode_us": decode, **changes}


RECORDS = [
    record("scan", 409.6, 40.2),
    record("chunked", 81.92, 30.4),
    record("scan", 1.0, 1.0, length=64),
    record("a peer", 5.0, None),
]


def test_the_table_has_a_row_for_every_cell():
    lines = readme.table(RECORDS).splitlines()
    assert len(lines) == 2 + len(cells.names())
    row = next(line for line in lines if "`delta_net`" in line)
    # four memories: S^T k, k e^T, its sum with S and S^T q are 6 K V operations; the rest: vectors
    _, _, _, state, operations, *times, context, _, _, _ = (part.strip() for part in row.split("|"))
    assert state == "64 KiB" and times == ["100.0", "20.0", "30", "20"] and context == "yes"
    assert 6 * 4 * 64**2 / 1e3 <= int(operations) < 1.05 * 6 * 4 * 64**2 / 1e3
    assert cells.get("delta_net").recurrence in row and "/abs/2102.11174)" in row
    other = next(line for line in lines if "`titans`" in line)
    assert other.count("| - ") == 5 and cells.get("titans").choice in other


def test_the_table_of_tasks_has_every_task_and_its_config():
    root = pathlib.Path(__file__).parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if "| `configs/" in line]
    found = {name: row[-2].strip(" `") for row in rows for name in re.findall("`(\\w+)`", row[1])}
    assert sorted(found) == tasks.names()
    for name, path in found.items():
        assert f'"{name}"' in (root / path).read_text(encoding="utf-8"), name


def test_only_what_is_between_the_marks_changes():
    text = f"before\n{readme.BEGIN}old\n{readme.END}after\n"
    new = readme.written(text, RECORDS)
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert readme.written(new, RECORDS) == new
    for broken in ("no marks", f"{readme.BEGIN}no end", f"no begin{readme.END}"):
        with pytest.raises(UserError, match="the text needs the lines"):
            readme.written(broken, RECORDS)


def test_the_readme_is_fresh():
    root = pathlib.Path(__file__).parents[1]
    figures = sorted((root / "experiments/benchmark").glob("*.json"))
    text = (root / "README.md").read_text(encoding="utf-8")
    again = "run python -m memjax.readme README.md experiments/benchmark/*.json"
    assert figures
    assert readme.written(text, [r for path in figures for r in readme.read(path)]) == text, again


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("no marks")
    sizes = json.dumps({"platform": "cpu", "records": [{**readme.SIZES, "heads": 8}]})
    wrong = {
        "{": "figures.json: no figures of a benchmark",
        "{}": "records",
        '{"platform": "gpu", "records": []}': "on gpu",
        sizes: "(1, 8, 64, 0)",
        '{"platform": "cpu", "records": []}': "needs the lines",
    }
    for content, named in wrong.items():
        figures.write_text(content)
        with pytest.raises(SystemExit, match="2"):
            readme.main(["", str(page), str(figures)])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and named in error, error
    assert page.read_text() == "no marks"
