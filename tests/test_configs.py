"""Every file in configs/: its settings in full, as in tests/golden, and models that can be built.

A change of a default changes what a config trains; here it is seen. After a change that is meant:

    python tests/test_configs.py
"""

import ast
import functools
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
ARRANGEMENTS = f"{ROOT}/configs/arrangements.py"
PER_CELL = [path for path in FILES if "cells.named" in path.read_text(encoding="utf-8")]
PAIRS = [(memory, block) for memory in ("titans", "atlas") for block in ("mag", "mal")]
PAPERS = ("based", "samba", "sambay", "griffin", "olmo_hybrid", *(f"{m}_{b}" for m, b in PAIRS))


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
    length = settings.data.get("length", 32)  # a mixture's is that of its longest part
    rows = jax.ShapeDtypeStruct((2, length), jnp.int32)
    params = train_step.abstract_params(model)
    logits, _ = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, rows)
    assert logits.shape == (2, length, settings.model.vocab)


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


def arranged(argument: str) -> list[str]:
    """The layers of an arrangement, one after the other."""
    groups = config.load(f"{ARRANGEMENTS}:{argument}").model.layers
    return [text for pattern, repeats in groups for _ in range(repeats) for text in pattern]


def based(i: int) -> str:
    """Of 27 layers: the list of the released 360M model."""
    kinds = {"linear_attention": (1, 6, 11, 16, 21), "sliding_window": (2, 7, 12, 17, 22)}
    return next((kind for kind, layers in kinds.items() if i in layers), "base_conv")


def sambay(i: int, depth: int) -> str:
    if i in (depth // 2, depth // 2 + 1):
        return "published(attention)" if i % 2 else "published(mamba2)"
    return (("mamba2", "sliding_window") if i < depth // 2 else ("gmu", "cross_attention"))[i % 2]


@pytest.mark.parametrize(
    ("name", "depth", "expected"),
    [
        ("based", 27, based),
        ("samba", 7, lambda i: ("mamba2", "sliding_window")[i % 2]),
        *(("sambay", n, functools.partial(sambay, depth=n)) for n in (4, 8, 32)),
        ("griffin", 26, lambda i: ("rg_lru", "rg_lru", "sliding_window")[i % 3]),
        ("olmo_hybrid", 32, lambda i: "attention" if i % 4 == 3 else "gated_delta_net"),
        *((f"{m}_{b}", 2, lambda i, m=m, b=b: f"{b}(sliding_window, {m})") for m, b in PAIRS),
    ],
)
def test_layers_stand_where_the_paper_has_them(name, depth, expected):
    assert arranged(f"{name},layers={depth}") == [expected(i) for i in range(depth)]


@pytest.mark.parametrize("name", PAPERS)
def test_every_arrangement_can_be_built(name):
    check_model(config.load(f"{ARRANGEMENTS}:{name},layers=8,dim=64,length=32"))


def test_settings_that_the_papers_name():
    mixers = config.load(f"{ARRANGEMENTS}:olmo_hybrid").model.mixers
    delta = mixers.gated_delta_net
    assert (delta.beta_max, delta.key_dim, delta.value_dim) == (2, 0.75 * 256 / 4, 1.5 * 256 / 4)
    assert mixers.attention.rotary_base == 0
    griffin = config.load(f"{ARRANGEMENTS}:griffin").model
    assert griffin.channel == "geglu" and griffin.mixers.sliding_window.kv_heads == 1
    assert config.load(f"{ARRANGEMENTS}:based").model.mixers.sliding_window.window == 64
    mixers = config.load(f"{ARRANGEMENTS}:sambay,length=4096").model.mixers
    readers = ("sliding_window", "attention", "cross_attention")
    assert {mixers[name].rotary_base for name in readers} == {0.0}
    assert mixers.attention.window == 4096


@pytest.mark.parametrize(
    ("argument", "message"),
    {
        "sambay,layers=6": "sambay: layers must be a multiple of 4; given 6",
        "based,layers=2": "based: layers must be at least 3; given 2",
        "samba,layers=0": "layers must be at least 1; given 0",
        "sambo": "'sambo' is not allowed; allowed: based, samba, .*Did you mean 'samba'?",
    }.items(),
)
def test_arrangements_that_there_are_not(argument, message):
    with pytest.raises(config.UserError, match=message):
        config.load(f"{ARRANGEMENTS}:{argument}")


@pytest.mark.parametrize("mixer", ["rwkv4", "hybrid(sliding_window, gated_delta_net)"])
def test_models_of_equal_parameters(mixer):
    for wanted in (120_000, 150_000):
        settings = config.load(f"{ROOT}/configs/lm_stdlib.py:{mixer},parameters={wanted}")
        model = train_step.LanguageModel(train_step.model_of(settings))
        shapes = train_step.abstract_params(model)
        step = 2 * 3 * settings.model.dim * 8  # 8 channels of both MLPs
        assert abs(sum(a.size for a in jax.tree.leaves(shapes)) - wanted) <= step / 2
    with pytest.raises(config.UserError, match="parameters=9000: this model has at least [0-9]"):
        config.load(f"{ROOT}/configs/lm_stdlib.py:{mixer},parameters=9000")


def test_spans_are_shorter_than_rows():
    """Else a window is attention to all, and memory_caching never keeps a memory."""
    mixers = {}
    for name in ("attention", "memory_caching", "bmojo(delta_net)", "hybrid(sliding_window, gla)"):
        settings = config.load(f"{ROOT}/configs/lm_stdlib.py:{name}")
        assert settings.data.length == 256
        mixers |= settings.model.mixers.to_dict()
    spans = [mixers[n]["window"] for n in ("bmojo", "sliding_window", "attention")]
    assert [*spans, mixers["memory_caching"]["segment"]] == [64, 64, 2048, 64]


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
