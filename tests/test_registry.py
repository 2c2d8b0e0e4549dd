"""Names, suggestions and specs of the registry."""

import dataclasses

import pytest

import memjax
from memjax import registry
from memjax.cell import MemoryCell
from memjax.registry import CellSpec
from memjax.typing import fields

CELLS = (
    "attention", "delta_net", "gated_delta_net", "linear_attention", "simple_gla", "sliding_window",
)  # fmt: skip


def test_cells_are_found_and_sorted():
    names = memjax.cells.names()
    assert names == sorted(names)
    assert set(CELLS) <= set(names)


@pytest.mark.parametrize("name", memjax.cells.names())
def test_spec_is_complete(name):
    spec = memjax.cells.get(name)
    assert spec.name == name
    assert "arXiv" in spec.paper
    for make in (spec.cell, *spec.variants.values()):
        cell = make()
        assert isinstance(cell, MemoryCell)
        assert make() == cell and hash(make()) == hash(cell)
        assert type(cell).__name__ in repr(cell)
        with pytest.raises(dataclasses.FrozenInstanceError):
            cell.key_dim = 3
        assert set(fields(cell.inputs)) == set(cell.inputs._fields)
        for field in fields(cell.inputs).values():
            assert field.low < field.high


def test_unknown_cell_gets_a_suggestion():
    with pytest.raises(ValueError, match="unknown cell 'delta_nett'.*Did you mean 'delta_net'"):
        memjax.cells.get("delta_nett")
    with pytest.raises(ValueError, match="allowed: .*gated_delta_net"):
        memjax.cells.get("zzz")
    with pytest.raises(ValueError, match="unknown cell or block 'sliding_windw'.*sliding_window"):
        registry.get("sliding_windw")


def test_far_names_get_no_suggestion():
    assert "Did you mean" not in registry.unknown("cell", "qqq", list(CELLS))


def test_taken_name_is_refused():
    spec = memjax.cells.get("delta_net")

    class Mixer:
        __module__ = "somewhere.else"

    with pytest.raises(ValueError, match="'delta_net' is taken by .*; choose another"):
        registry.register(dataclasses.replace(spec, mixer=Mixer))
    assert memjax.cells.get("delta_net") is spec


def test_same_module_registers_again():
    spec = memjax.cells.get("delta_net")
    registry.register(spec)
    assert memjax.cells.get("delta_net") is spec


def test_names_are_of_one_kind(monkeypatch):
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    block = registry.BlockSpec("a_block", memjax.cells.get("delta_net").mixer, "arXiv 0000.00000")
    registry.register(block)
    assert "a_block" in registry.names(registry.BlockSpec)
    assert "a_block" not in registry.names(CellSpec)
    with pytest.raises(ValueError, match="unknown cell 'a_block'"):
        memjax.cells.get("a_block")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delta_net", ("delta_net", ())),
        ("  delta_net ", ("delta_net", ())),
        ("hybrid(a, b)", ("hybrid", ("a", "b"))),
        ("hybrid( a,b(c, d) )", ("hybrid", ("a", "b(c, d)"))),
        ("f(g(h(i)))", ("f", ("g(h(i))",))),
    ],
)
def test_parse(text, expected):
    assert registry.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a b", "f(", "f()", "f(a,)", "f(a))", "f(a)(b)", "1f", "f(,a)"]
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="expected a name or name\\(name, ...\\)"):
        registry.parse(text)
