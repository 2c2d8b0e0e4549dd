"""Experiments that are published: their tables and pictures come from their rows."""

import importlib.util
import pathlib

import pytest

from memjax import results

ROOT = pathlib.Path(__file__).parents[1] / "experiments"
SCRIPTS = sorted(
    path
    for name in ("measure.py", "sweep.py")
    for path in ROOT.glob(f"*/{name}")
    if (path.parent / "results.jsonl").exists() and (path.parent / "README.md").exists()
)


def load(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.parent.name)
def test_the_tables_are_those_of_the_rows(path):
    rows = results.read(str(path.parent / "results.jsonl"))
    text = (path.parent / "README.md").read_text(encoding="utf-8")
    assert rows and results.with_tables(text, load(path).tables(rows)) == text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.parent.name)
def test_the_picture_is_drawn_from_the_rows(path):
    figure = load(path).draw(results.read(str(path.parent / "results.jsonl")))
    assert any(axes.lines or axes.collections or axes.images for axes in figure.axes)
    assert (path.parent / f"{path.parent.name}.png").read_bytes().startswith(b"\x89PNG")


def test_there_is_one():
    assert "capacity" in [path.parent.name for path in SCRIPTS]


def test_capacity_keeps_to_its_laws():
    """Of the rows that have a law: |mean - law| <= max(3 %, 3 standard errors)."""
    checked = 0
    for row in results.read(str(ROOT / "capacity" / "results.jsonl")):
        for figures in row["capacity"]:
            if "theory" not in figures:
                continue
            error = figures["error_sd"] / row["study"]["seeds"] ** 0.5
            bound = max(0.03 * figures["theory"], 3 * error)
            assert abs(figures["error"] - figures["theory"]) <= bound, (row["cell"], figures)
            checked += 1
    assert checked >= 5 * 14
