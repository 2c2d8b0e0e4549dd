"""Cells to wrap, and how the tests of wrappers run them."""

import dataclasses

import contract
import pytest

from memjax import cells
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.titans import Titans

T, B, D = 22, 2, 16
FORMS = ("scan", "chunked")
LINEAR = LinearAttention(4, 3, scale=1.0, chunk=4)
DELTA = GatedDeltaNet(4, 3, chunk=4)
DEEP = Titans(4, 4, depth=2, expansion=2, frozen_chunk=4, std=0.5)
# The contract holds the two forms together.
either = pytest.mark.parametrize("form", [pytest.param("scan", marks=pytest.mark.slow), "chunked"])


def given_for(cell, seed=0, length=T, **changes):
    """What `run` is given for any cell, from its start."""
    spec = dataclasses.replace(cells.get("memory_caching"), cell=lambda: cell)
    case = contract.Case("a wrapper", spec, cell)
    plain = {"state": False, "masks": False, "heads": 1, **changes}
    return contract.problem(case, seed, length, **plain)


def bare(given):
    """The inner cell's part of a wrapper's inputs."""
    return given._replace(xs=given.xs[:-1])


def answers(cell, form, given):
    """y of one form, in float32."""
    xs = cell.inputs(*given.xs)
    return contract.values(cell, form, given._replace(xs=xs))[0]
