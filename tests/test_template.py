"""A new memory is one file: `_template.py`, copied, passes the contract and trains on MQAR."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_runs import ROOT, TASK, arguments


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with one more file in memjax/cells, and nothing else changed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("memjax", "configs", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    template = (folder / "memjax/cells/_template.py").read_text(encoding="utf-8")
    new = template.replace('name="template"', 'name="my_memory"')
    (folder / "memjax/cells/my_memory.py").write_text(new, encoding="utf-8")
    return folder


def run(folder, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_it_trains_on_mqar(copy):
    source = "configs/mqar.py:my_memory"
    run(copy, "memjax.train", *arguments(source, copy / "run", TASK))
    summary = json.loads((copy / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["finished"] and summary["step"] == TASK["steps"]


@pytest.mark.slow
def test_it_passes_the_tests_of_every_cell(copy):
    shown = run(
        copy, "pytest", "-q", "-p", "no:cacheprovider", "tests", "-m", "not slow",
        "-k", "my_memory",
    )  # fmt: skip
    assert " passed" in shown and "my_memory" not in shown


def test_it_is_offered_where_cells_are_named(copy):
    assert "my_memory" in run(copy, "memjax.benchmark", "--cells=my_memory", "--length=5")
