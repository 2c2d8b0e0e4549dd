"""Notebooks: in step with their sources, careful with Colab's image, and they run."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from memjax import notebooks

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "colabs").glob("*.py"))
NAMES = [path.stem for path in SOURCES]
OF_GRAIN = "Grain multiprocess worker profiling requires jaxlib"  # what it warns old versions of
ADDRESS = "https://github.com/owner/name"
SOURCE = "# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nx = 1\n"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_in_step_with_its_source(path):
    source, made = (path.with_suffix(end).read_text(encoding="utf-8") for end in (".py", ".ipynb"))
    address = notebooks.repository(ROOT / "pyproject.toml")
    again = "run python -m memjax.notebooks colabs/*.py"
    assert notebooks.written(source, path.stem, address) == (source, made), again
    question = re.search(r"^# \*\*(.*)\*\*$", source, re.MULTILINE)
    assert f"({path.stem}.ipynb) | {question[1]} |" in (ROOT / "colabs/README.md").read_text()


def test_all_notebooks_have_a_source():
    assert len(NAMES) == 7
    assert sorted(path.stem for path in (ROOT / "colabs").glob("*.ipynb")) == NAMES


def test_the_address_is_in_setup_and_badge():
    """Once each, whatever was there; none without an address."""
    plain = notebooks.with_setup(SOURCE, "a", "")
    known = notebooks.with_setup(SOURCE, "a", ADDRESS)
    assert [notebooks.with_setup(known, "a", other) for other in (ADDRESS, "")] == [known, plain]
    title, setup, code = notebooks.cells(known)
    badge = f"{notebooks.BADGE}owner/name/blob/main/colabs/a.ipynb)"
    assert title == ("markdown", f"# Title\n\n{badge}\n\nText")
    assert setup == ("code", notebooks.SETUP.format(address=ADDRESS)) and code == ("code", "x = 1")
    assert notebooks.cells(plain)[0] == ("markdown", "# Title\n\nText")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "a source begins with a line '# %%'; given 'x = 1'"),
        ("# %% [markdown]\n# a\nb\n", "a line of a text cell begins with '# '; given 'b'"),
    ],
)
def test_what_is_no_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        notebooks.cells(source)


def run_setup(address):
    exec(notebooks.SETUP.format(address=address), {})


def test_setup_leaves_the_image_alone(tmp_path, monkeypatch):
    """On Colab: one clone and one installation without dependencies, at the first run alone."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    run_setup(ADDRESS)
    assert commands == []  # elsewhere nothing
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    with pytest.raises(AssertionError, match="REPOSITORY: give the address"):
        run_setup("")
    run_setup(ADDRESS)
    clone, install = commands
    assert clone == ["git", "clone", "-q", "--depth=1", ADDRESS, "memjax"]
    assert "--no-deps" in install
    assert sys.path[0] == str(tmp_path / "memjax")
    (tmp_path / "memjax").mkdir()
    run_setup(ADDRESS)
    assert len(commands) == 2
    packages = set(install[install.index("--no-deps") + 1 :])
    image = {name for package in ("flax", "orbax-checkpoint") for name in required(package)}
    assert set().union(*map(required, packages)) <= packages | image
    assert not packages & image and "jax" in image


def required(package):
    """Names of the packages that one cannot do without."""
    lines = (line for line in metadata.requires(package) or () if "extra ==" not in line)
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_jupytext_reads_the_same_cells(path):
    jupytext, nbformat = (pytest.importorskip(name) for name in ("jupytext", "nbformat"))
    made = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(made)
    found = ([(c.cell_type, c.source) for c in n.cells] for n in (jupytext.read(path), made))
    assert next(found) == next(found)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute on a free core
@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_runs(path, tmp_path):
    """In its fast mode, from any folder, without a warning, and draws."""
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    made = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    environment = {**os.environ, "MEMJAX_FAST": "1"}
    del environment["MPLBACKEND"]  # the kernel has its own
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(made, timeout=600, resources=resources).execute(env=environment)
    outputs = [output for cell in made.cells for output in cell.get("outputs", ())]
    told = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert [line for line in told.splitlines() if OF_GRAIN not in line] == []
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
