"""Experiments: trials that load, rows of today's settings, READMEs and pictures of the rows."""

import importlib.util
import pathlib

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from memjax import results
from memjax.sweep import chosen
from memjax.trials import Sweep

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "experiments"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/sweep.py"))
RUN = [name for name in NAMES if (FOLDER / name / f"{name}.png").exists()]
UNRUN = "Not run yet"
# What rows lack that were made before it was recorded.
LACK = {"hybrid_recall": {"versions"}, "length": {"seconds"}}


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


def of(name):
    return Sweep(f"experiments/{name}/sweep.py")


def readme(name):
    return (FOLDER / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_trials(name):
    """Distinct labels of one kind (`Sweep` refuses others), and settings that load."""
    sweep = of(name)
    if sweep.search:
        assert 0 < len(sweep.trials) <= sweep.search.count, "a search with no row"
    assert bool(sweep.trials) != bool(sweep.parts)
    for trial in sweep.trials:
        assert trial.labels.keys() == sweep.trials[0].labels.keys()
        assert f"seed={trial.labels['seed']}" in trial.config
        assert len(trial.hash) == 12
        only = ",".join(f"{label}={value}" for label, value in trial.labels.items())
        assert chosen(sweep.trials, only) == [trial]
    command = f"--sweep=experiments/{name}/sweep.py --jobs="
    assert command in readme(name) and command in sweep.module.__doc__


@pytest.mark.parametrize("name", RUN)
def test_rows(name):
    """Each row is one of the trials, as they are today, and says how it was made."""
    sweep = of(name)
    if sweep.search:
        sweep.trials = sweep.search.known(results.read(sweep.results), today=False)
    rows = sweep.rows()
    assert len(rows) == len(results.read(sweep.results)), "rows of no trial, or two of one"
    assert UNRUN not in readme(name)
    again = f"python -m memjax.sweep --sweep=experiments/{name}/sweep.py"
    for trial in sweep.trials:
        if trial.name in rows:
            row = rows[trial.name]
            if "failure" in row:
                continue
            needed = {"config", "changes", "hash", "seed", "versions", "seconds"}
            assert needed - row.keys() <= LACK.get(name, set()), trial.name
            assert {field: row[field] for field in trial.described()} == trial.described(), (
                f"{trial.name} has other settings than its row; run {again} --jobs=2 or, if the "
                f"change of settings changes no result, {again} --rehash"
            )


@pytest.mark.parametrize("name", RUN)
def test_readme_and_picture(name):
    """Tables are those of the committed rows, of which the picture can be drawn."""
    sweep = of(name)
    again = f"run python -m memjax.sweep --sweep=experiments/{name}/sweep.py --show"
    for path in map(pathlib.Path, sweep.readmes()):
        text = path.read_text(encoding="utf-8")
        assert results.with_tables(text, sweep.tables()) == text, again
        assert f"{name}.png)" in text
    check(sweep.module.draw(sweep.shown()))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RUN)))
def test_without_rows(name):
    """What was not run yet says so, has an empty place for each table, and takes having no rows."""
    assert not (FOLDER / name / "results.jsonl").exists(), "rows without a picture"
    assert UNRUN in readme(name)
    for table in of(name).tables():
        assert f"<!-- table: {table} -->\n<!-- /table -->" in readme(name)


def measured(name):
    """The module of an experiment that trains nothing, and its rows."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / name / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, results.read(module.RESULTS)


@pytest.mark.parametrize("name", ["ahead", "capacity", "decode"])
def test_measured(name):
    module, rows = measured(name)
    assert rows and results.with_tables(readme(name), module.tables(rows)) == readme(name)
    if hasattr(module, "draw"):
        check(module.draw(rows))


def test_capacity_keeps_to_its_laws():
    """Of the rows that have a law: |mean - law| <= max(3 %, 3 standard errors)."""
    checked = 0
    for row in measured("capacity")[1]:
        for figures in row["capacity"]:
            if "theory" not in figures:
                continue
            error = figures["error_sd"] / row["study"]["seeds"] ** 0.5
            bound = max(0.03 * figures["theory"], 3 * error)
            assert abs(figures["error"] - figures["theory"]) <= bound, (row["cell"], figures)
            checked += 1
    assert checked == 5 * 14  # five numbers of pairs


def check(figure):
    """All axes have lines, and nothing that is written is cut off."""
    assert figure.axes and all(axes.lines for axes in figure.axes)
    FigureCanvasAgg(figure).draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
