"""Every file in configs/: its settings in full, as in tests/golden, and models that can be built.

A change of a default changes what a config trains; here it is seen. After a change that is meant:

    python tests/test_configs.py
"""

import ast
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from memjax import cells, config, registry, train_step
from memjax.nn.stack import mixer_options

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name[0] != "_")
PER_CELL = [path for path in FILES if "cells.named" in path.read_text(encoding="utf-8")]


def flattened(path: pathlib.Path) -> dict:
    return config.flatten(config.plain(config.load(str(path))))


def mixers() -> dict:
    """The options of every cell's and block's mixer, with their defaults."""
    names = [*cells.names(), *registry.names(registry.BlockSpec)]
    options = {name: {k: f.default for k, f in mixer_options(name).items()} for name in names}
    return config.flatten(config.plain(options))


def check_model(settings) -> None:
    """Shapes alone: parameters, and logits of every token of a batch."""
    model = train_step.LanguageModel(train_step.model_of(settings))
    rows = jax.ShapeDtypeStruct((2, settings.data.length), jnp.int32)
    params = train_step.abstract_params(model)
    logits, _ = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, rows)
    assert logits.shape == (2, settings.data.length, settings.model.vocab)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_settings_are_the_golden_ones(path):
    golden = GOLDEN / f"{path.stem}.json"
    command = "python tests/test_configs.py"
    assert golden.exists(), f"{golden} is missing; write it with `{command}`"
    found = json.loads(golden.read_text(encoding="utf-8"))
    lines = config.difference(found, flattened(path))
    told = "\n  ".join([f"{path.name} no longer gives the settings of {golden.name}:", *lines])
    assert not lines, f"{told}\nIf that is meant, run `{command}` and commit what it writes."


def test_the_mixers_have_their_published_options():
    found = json.loads((GOLDEN / "mixers.json").read_text(encoding="utf-8"))
    lines = config.difference(found, mixers())
    assert not lines, "\n  ".join(["options of mixers changed:", *lines])


def test_every_golden_file_has_a_config():
    stems = {path.stem for path in GOLDEN.glob("*.json")}
    assert stems == {path.stem for path in FILES} | {"mixers"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_default_model_can_be_built(path):
    settings = config.load(str(path))
    check_model(settings)
    assert config.from_json(config.to_json(settings)).to_dict() == settings.to_dict()


@pytest.mark.parametrize("cell", cells.names())
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem == "mqar" else pytest.mark.slow)
        for path in PER_CELL
    ],
    ids=lambda path: path.stem,
)
def test_the_model_of_every_cell_can_be_built(path, cell):
    settings = config.load(f"{path}:{cell}")
    assert cell in settings.model.mixers and cell in str(settings.model.layers)
    check_model(settings)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_gives_the_command(path):
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(document.split())
    assert "python -m memjax.train --config=" in text and f"configs/{path.name}" in text
    assert "--workdir=" in text


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    written = {path.stem: flattened(path) for path in FILES} | {"mixers": mixers()}
    for unused in {p.stem for p in GOLDEN.glob("*.json")} - written.keys():
        (GOLDEN / f"{unused}.json").unlink()
    for stem, settings in written.items():
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (GOLDEN / f"{stem}.json").write_text(text, encoding="utf-8")
        print(f"wrote {(GOLDEN / f'{stem}.json').relative_to(ROOT)}")
