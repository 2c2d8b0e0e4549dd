"""Imports go one way. LAYERS is the whole rule; the tests parse the imports and hold them to it.

The same walk over the files refuses absolute paths of somebody's machine, reads outside the
repository, and addresses of a package registry in the constraints files.
"""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("memjax", "pallas_kernels", "configs", "experiments")  # what the rule is about

CORE = (
    "memjax.typing",
    "memjax.axes",
    "memjax.spans",
    "memjax.registry",
    "memjax.recurrence",
    "memjax.forms",
    "memjax.cell",
)
SHELL = ("memjax.nn",)
HELPERS = (
    "memjax.checkpoint",
    "memjax.chips",
    "memjax.config",
    "memjax.config_text",
    "memjax.cost",
    "memjax.errors",
    "memjax.defaults",
    "memjax.hosts",
    "memjax.inputs",
    "memjax.locks",
    "memjax.metrics",
    "memjax.optim",
    "memjax.peers",
    "memjax.profile",
    "memjax.progress",
    "memjax.results",
    "memjax.sharding",
)
SOURCES = ("memjax.data", "memjax.tasks")
COMMANDS = (
    "memjax.aot",
    "memjax.benchmark",
    "memjax.evaluate",
    "memjax.generate",
    "memjax.notebooks",
    "memjax.probe",
    "memjax.readme",
    "memjax.sweep",
    "memjax.sweeps",
    "memjax.train",
    "memjax.train_step",
    "memjax.trials",
    "memjax.workload",
)
LIBRARY = (*CORE, *SHELL, *HELPERS, *SOURCES, "memjax.cells", "memjax.wrappers", "memjax.blocks")

JAX = ("jax", "jaxtyping", "numpy")
FLAX = (*JAX, "flax")
NUMPY = ("absl", "grain", "numpy")  # optional packages are imported by `data.tokens.optional`
ANY = ("*",)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the modules of a layer may import; the standard library and the layer itself always.

    ours: modules of this repository, with everything below them.
    packages: other packages; "*" stands for all.
    never: exceptions from `ours`.
    inside: modules of this repository that may be imported inside a function only.
    """

    ours: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


# A module belongs to the longest name that is the start of its own. A name without an entry fails.
LAYERS = {
    "pallas_kernels": Layer(packages=("jax", "numpy")),
    "memjax.typing": Layer(packages=JAX),
    "memjax.axes": Layer(ours=CORE, packages=JAX),
    "memjax.spans": Layer(ours=CORE, packages=JAX),
    "memjax.registry": Layer(ours=CORE, packages=JAX),
    "memjax.recurrence": Layer(ours=CORE, packages=JAX),
    "memjax.forms": Layer(),
    "memjax.cell": Layer(ours=CORE, packages=JAX),
    "memjax.cells": Layer(
        ours=(*CORE, "memjax.nn.layers", "memjax.nn.mixer"),
        packages=FLAX,
        inside=("pallas_kernels",),
    ),
    "memjax.wrappers": Layer(ours=(*CORE, "memjax.nn.layers", "memjax.nn.mixer"), packages=FLAX),
    "memjax.blocks": Layer(
        ours=(*CORE, *SHELL, "memjax.cells"), packages=FLAX, never=("memjax.nn.lm",)
    ),
    "memjax.nn.layers": Layer(ours=CORE, packages=FLAX),
    "memjax.nn.mixer": Layer(ours=(*CORE, "memjax.nn.layers"), packages=FLAX),
    "memjax.nn": Layer(ours=CORE, packages=FLAX),
    "memjax.tasks": Layer(packages=NUMPY),
    "memjax.data": Layer(ours=("memjax.tasks",), packages=NUMPY),
    **{name: Layer(ours=LIBRARY, packages=ANY) for name in HELPERS},
    "memjax.errors": Layer(),
    "memjax.probes": Layer(ours=LIBRARY, packages=FLAX),
    **{name: Layer(ours=("memjax",), packages=ANY) for name in COMMANDS},
    "memjax.aot": Layer(ours=("memjax", "pallas_kernels.programs"), packages=ANY),
    "memjax": Layer(ours=("memjax",), packages=ANY),
    "configs": Layer(ours=("memjax",), packages=("ml_collections",), never=COMMANDS),
    "experiments": Layer(ours=("memjax",), packages=ANY),
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, the line, and whether it's inside a function."""

    name: str
    line: int
    inside: bool


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or below one of them."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def module_name(path: Path, root: Path) -> str:
    """The dotted name of a file; a package's `__init__.py` has the name of the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, root: Path) -> bool:
    """Whether a dotted name is a module or a package in the tree."""
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path, root: Path) -> Iterator[Import]:
    """All imports of a file, absolute; `from a import b` is `a.b` when that is a module."""
    package = path.relative_to(root).parent.parts

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *((node.module,) if node.module else ())))
            full = [f"{base}.{alias.name}" for alias in node.names]
            for name in dict.fromkeys(n if is_module(n, root) else base for n in full):
                yield Import(name, node.lineno, inside)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(path.read_text(encoding="utf-8")), inside=False)


def allowed(found: Import, owner: str) -> bool:
    """Whether a module of the layer `owner` may have this import."""
    layer = LAYERS[owner]
    top = found.name.partition(".")[0]
    if top not in TREES:
        standard = top in sys.stdlib_module_names
        return standard or layer.packages == ANY or within(found.name, layer.packages)
    if within(found.name, (owner,)):
        return True
    if found.inside and within(found.name, layer.inside):
        return True
    return within(found.name, layer.ours) and not within(found.name, layer.never)


def upward(root: Path) -> list[str]:
    """One line for every import that its layer may not have, and every module without a layer."""
    lines = []
    for path in (path for top in TREES for path in sorted((root / top).rglob("*.py"))):
        name, where = module_name(path, root), path.relative_to(root)
        owner = max((key for key in LAYERS if within(name, (key,))), key=len)
        if owner == "memjax" and name != "memjax":
            lines.append(f"{where}: {name} has no layer; add it to LAYERS in {Path(__file__).name}")
            continue
        lines += [
            f"{where}:{found.line}: {owner} may not import {found.name}"
            for found in imports(path, root)
            if not allowed(found, owner)
        ]
    return lines


PLACES = re.compile(r"(?<![\w.~])/(?:home|Users|root|work)/\w|\.\./shared")
PIN = re.compile(r"[\w.-]+==[\w.+]+( ; .+)?")
NOT_OURS = ("build", "dist", "runs", "__pycache__")
TEXT = ("", ".cff", ".ipynb", ".md", ".py", ".sh", ".toml", ".txt")


def texts(root: Path) -> Iterator[Path]:
    """The repository's text files, found without git; of the hidden folders only .ci."""
    for path in sorted(root.iterdir()):
        if path.name in NOT_OURS or (path.name.startswith(".") and path.name != ".ci"):
            continue
        if path.is_dir():
            yield from texts(path)
        elif path.suffix in TEXT:
            yield path


def places(root: Path) -> list[str]:
    """One line for every place in a text file that exists on one machine only."""
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in texts(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PLACES.search(line)
    ]


def write(root: Path, files: dict[str, str]) -> None:
    """Writes a tree of files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_imports_go_one_way():
    assert is_module("memjax.cell", ROOT)
    assert upward(ROOT) == []


def test_no_path_of_one_machine():
    assert Path(__file__) in texts(ROOT)
    assert places(ROOT) == []


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-floor.txt"])
def test_constraints_are_versions_without_addresses(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not (line.startswith("#") or PIN.fullmatch(line))] == []


# file, its text, and what the report says about it (None: nothing)
EXAMPLES = [
    ("memjax/typing.py", "from memjax.cell import run", "memjax.typing may not import memjax.cell"),
    ("memjax/cell.py", "import flax.linen", "memjax.cell may not import flax.linen"),
    ("memjax/cell.py", "from . import train", "memjax.cell may not import memjax.train"),
    ("memjax/cells/a.py", "from memjax.blocks import hybrid", "not import memjax.blocks.hybrid"),
    ("memjax/cells/a.py", "import memjax", "memjax.cells may not import memjax"),
    ("memjax/cells/a.py", "import pallas_kernels.op", "not import pallas_kernels.op"),
    ("memjax/cells/a.py", "def f():\n    import pallas_kernels.op", None),
    ("memjax/cells/a.py", "from ..nn import layers", None),
    ("memjax/cells/a.py", "from ..nn import lm", "memjax.cells may not import memjax.nn.lm"),
    ("memjax/nn/stack.py", "def f():\n    from memjax import cells", "not import memjax.cells"),
    ("memjax/blocks/b.py", "from memjax.nn.lm import Decoder", "not import memjax.nn.lm"),
    ("memjax/blocks/b.py", "from memjax.nn.stack import Stack", None),
    ("memjax/wrappers/w.py", "from memjax.cells import delta_net", "not import memjax.cells"),
    ("memjax/data/text.py", "import os.path, numpy.linalg, grain", None),
    ("memjax/data/text.py", "import jax.numpy", "memjax.data may not import jax.numpy"),
    ("memjax/tasks/t.py", "from memjax import data", "memjax.tasks may not import memjax.data"),
    ("memjax/config.py", "import memjax.train", "memjax.config may not import memjax.train"),
    ("memjax/train.py", "from memjax.nn import lm", None),
    ("memjax/other.py", "", "memjax.other has no layer"),
    ("pallas_kernels/op/tpu.py", "import memjax.cell", "pallas_kernels may not import memjax.cell"),
    ("configs/c.py", "from memjax.train import main", "configs may not import memjax.train"),
]


@pytest.mark.parametrize(("name", "text", "report"), EXAMPLES)
def test_the_rule_can_fail(tmp_path, name, text, report):
    modules = "cell blocks/hybrid cells/delta_net data/text nn/layers nn/lm nn/stack train".split()
    write(tmp_path, {f"memjax/{module}.py": "" for module in modules})
    assert upward(tmp_path) == []
    write(tmp_path, {name: text})
    found = upward(tmp_path)
    if report is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith(name) and report in found[0]


def test_a_path_of_one_machine_is_found(tmp_path):
    shared, home = "/".join(("..", "shared", "a")), "/".join(("", "home", "someone", "data"))
    write(tmp_path, {"memjax/a.py": f"x = {shared!r}\n", "b.md": f"\nsee `{home}`\n"})
    write(tmp_path, {"c.md": "tests/home/a, ~/work/b, https://example.org/home/c\n"})
    write(tmp_path, {"runs/log.txt": home, ".venv/d.txt": home})
    assert [line.split(": ")[0] for line in places(tmp_path)] == ["b.md:2", "memjax/a.py:1"]
