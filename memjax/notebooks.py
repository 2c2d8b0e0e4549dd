"""Writes the notebooks of colabs/ from their sources, percent-format Python beside them.

    python -m memjax.notebooks colabs/*.py

A source is cells behind lines `# %%` (code) or `# %% [markdown]` (text, commented out), as jupytext
reads them. The first cell has the title, the second is `SETUP`, the same in all: this command
writes it into the sources, with the address of the repository that pyproject.toml names
([project.urls] Repository), and a badge below the title where that address is on GitHub. Notebooks
are written without outputs.
"""

import json
import pathlib
import re
import sys
import tomllib
from collections.abc import Sequence
from typing import Any

from memjax.config_text import write_text

MARK = re.compile(r"^# %%( \[markdown\])?$", re.MULTILINE)
SETUP = """\
# @title Setup: on Colab a clone of memjax and what else its image lacks; jax stays as it is
import os
import subprocess
import sys

REPOSITORY = "{address}"  # @param {{type: "string"}}
PACKAGES = ["jaxtyping", "wadler-lindig", "ml-collections"]
if "google.colab" in sys.modules:
    if not os.path.isdir("memjax"):
        assert REPOSITORY, "REPOSITORY: give the address from which git can clone memjax"
        subprocess.run(["git", "clone", "-q", "--depth=1", REPOSITORY, "memjax"], check=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*pip, *PACKAGES], check=True)
    sys.path.insert(0, os.path.abspath("memjax"))

FAST = os.environ.get("MEMJAX_FAST") == "1"  # smaller sizes, for tests"""
COLAB = "https://colab.research.google.com"
BADGE = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/"
# What Colab is asked for besides its CPU.
ACCELERATORS = {"05_kernels": {"accelerator": "GPU", "colab": {"gpuType": "T4"}}}

Cell = tuple[str, str]  # "code" or "markdown", and what stands in it


def repository(pyproject: pathlib.Path) -> str:
    """The address of the repository in pyproject.toml; '' when it names none."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def cells(source: str) -> list[Cell]:
    """The cells of a percent-format source.

    Raises ValueError for text in front of the first cell, or in a text cell and not commented out.
    """
    head, *parts = MARK.split(source)
    if head.strip():
        raise ValueError(f"a source begins with a line '# %%'; given {head.splitlines()[0]!r}")
    found = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        lines = body.strip("\n").split("\n")
        if mark:
            for line in lines:
                if line != "#" and not line.startswith("# "):
                    raise ValueError(f"a line of a text cell begins with '# '; given {line!r}")
            lines = [line[2:] for line in lines]
        found.append(("markdown" if mark else "code", "\n".join(lines)))
    return found


def with_setup(source: str, name: str, address: str) -> str:
    """A source with the setup of today as its second cell, put in where there is none, and the
    badge below the title of its first. name: of the notebook, without its ending."""
    source = re.sub(rf"# {re.escape(BADGE)}.*\n#\n", "", source)
    page = re.fullmatch(r"https://github\.com/([\w.-]+/[\w-]+)(?:\.git)?", address)
    if page:
        badge = f"# {BADGE}{page[1]}/blob/main/colabs/{name}.ipynb)"
        source = source.replace("\n#\n", f"\n#\n{badge}\n#\n", 1)
    head, first, *rest = re.split(r"(?m)^(?=# %%)", source)
    if rest and "# @title Setup" in rest[0]:
        rest = rest[1:]
    setup = f"# %%\n{SETUP.format(address=address)}\n\n"
    return "".join([head, first, setup, *rest])


def notebook(source: str, name: str) -> dict[str, Any]:
    """A notebook in version 4.5 of its format."""
    found = []
    for number, (kind, text) in enumerate(cells(source)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        found.append({**cell, "source": text.splitlines(keepends=True)})
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata: dict[str, Any] = {"kernelspec": python, "language_info": {"name": "python"}}
    metadata |= ACCELERATORS.get(name, {})
    return {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def written(source: str, name: str, address: str) -> tuple[str, str]:
    """The texts of a source and of its notebook."""
    source = with_setup(source, name, address)
    return source, json.dumps(notebook(source, name), indent=1, ensure_ascii=False) + "\n"


def main(paths: Sequence[str]) -> None:
    if not paths:
        raise SystemExit("give the sources: python -m memjax.notebooks colabs/*.py")
    for path in map(pathlib.Path, paths):
        where = repository(path.resolve().parents[1] / "pyproject.toml")
        source, made = written(path.read_text(encoding="utf-8"), path.stem, where)
        write_text(str(path), source)
        write_text(str(path.with_suffix(".ipynb")), made)
        print(path.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
