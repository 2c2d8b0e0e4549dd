"""Word problems: the groups, the words and the products."""

import itertools
import math

import numpy as np
import pytest
from task_checks import chi_square, refuses

from memjax import tasks
from memjax.tasks import group_words

ORDERS = {"S3": 6, "S4": 24, "A5": 60, "S5": 120, "Z60": 60, "A4xZ5": 60}
COMMUTING = {"Z60": 1.0, "S3": 3 / 6, "S4": 5 / 24, "A5": 5 / 60, "S5": 7 / 120, "A4xZ5": 20 / 60}


@pytest.mark.parametrize("group", group_words.GROUPS)
def test_group_axioms(group):
    """Closed, with identity 0, inverses and (a b) c = a (b c) for all triples; and it is the group
    it says it is: the share of pairs that commute is classes / elements."""
    products = group_words.table(group)
    every = np.arange(ORDERS[group])
    assert products.shape == (len(every), len(every))
    assert (products[0] == every).all() and (products[:, 0] == every).all()
    assert (np.sort(products, axis=0) == every[:, None]).all()
    assert (np.sort(products, axis=1) == every).all()
    inverse = np.argmin(products, axis=1)
    assert not products[every, inverse].any() and not products[inverse, every].any()
    assert (products[products] == products[:, products]).all()
    assert math.isclose(np.mean(products == products.T), COMMUTING[group])


def test_elements_are_permutations_in_lexicographic_order():
    """(p q)(x) = p(q(x)); the elements of A5 have determinant 1."""
    for group, points in (("S3", 3), ("S4", 4), ("S5", 5), ("A5", 5)):
        every = [tuple(images) for images in group_words.permutations(group).tolist()]
        assert every == sorted(every) and every[0] == tuple(range(points))
        for p, q in itertools.product(range(0, len(every), 7), repeat=2):
            composed = tuple(every[p][every[q][x]] for x in range(points))
            assert every[group_words.table(group)[p, q]] == composed
    matrices = np.eye(5)[group_words.permutations("A5")]
    np.testing.assert_allclose(np.linalg.det(matrices), 1)


@pytest.mark.parametrize(
    "settings",
    [
        *({"group": group} for group in group_words.GROUPS),
        {"group": "S5", "moves": 2},
        {"group": "S5", "moves": 3, "length": 7},
        {"group": "S4", "repeat": 4, "length": 12},
        {"length": 2},
    ],
)
def test_targets_are_products(settings):
    source = tasks.make("group_words", **settings)
    products, repeat = group_words.table(source.group), source.repeat
    drawn = set()
    for index in range(1000):
        example = source[index]
        inputs, targets = example["inputs"].tolist(), example["targets"].tolist()
        assert inputs[0] == source.vocab - 1 == ORDERS[source.group]
        assert not example["mask"][0] and example["mask"][1:].all()
        assert example["mask"].sum() == source.queries
        product = 0
        for at in range(1, source.length):
            first = 1 + (at - 1) // repeat * repeat
            assert inputs[at] == inputs[first]
            if at % repeat == 0:
                product = products[product, inputs[at]]
            assert targets[at] == product
        drawn.update(inputs[1:])
    assert drawn == set(source.drawn.tolist())


def test_moves_count_the_tokens_of_the_publication():
    """Only swaps: the identity and 10 transpositions; limit to 3: 20 cycles of three more."""
    for moves, count in ((2, 11), (3, 31), (5, 120), (0, 120)):
        assert len(tasks.make("group_words", group="S5", moves=moves).drawn) == count
    swaps = tasks.make("group_words", group="S5", moves=2).drawn
    assert not np.diag(group_words.table("S5"))[swaps].any()  # each is its own inverse
    assert len(tasks.make("group_words", group="A5", moves=3).drawn) == 21


@pytest.mark.parametrize("group, bound", [("S3", 20.5), ("A5", 98.3)])  # p = 0.001, elements - 1
def test_targets_are_uniform_at_every_position(group, bound):
    source = tasks.make("group_words", group=group, length=9)
    targets = np.stack([source[i]["targets"][1:] for i in range(3000)])
    for at in range(8):
        assert chi_square(np.bincount(targets[:, at], minlength=source.elements)) < bound
    before, after = targets[:, 3], targets[:, 4]  # and independent of the one before
    pairs = np.bincount(before % 6 * 6 + after % 6, minlength=36)
    assert chi_square(pairs) < 66.6  # 35 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(group="S6"), "group='S6' does not exist; allowed: S3, S4, A5, S5, Z60, A4xZ5"),
        (dict(length=1), "length=1 .* 2 or more"),
        (dict(repeat=0), "repeat=0 .* 1 or more"),
        (dict(group="Z60", moves=2), "moves=2 is for .*S3, S4, A5, S5; use moves=0 with Z60"),
        (dict(group="A5", moves=2), "moves=2 leaves only the identity of A5; .* 3 or more"),
        (dict(moves=-1), "moves=-1 .* 0 for all"),
        (dict(group=3), "group=3 has the type int"),
    ],
)
def test_impossible_settings(settings, message):
    refuses("group_words", settings, message)


@pytest.mark.parametrize("group, name", [("S3", "021"), ("Z60", "+1"), ("A4xZ5", "(0,1)")])
def test_show_names_elements(group, name):
    """The element 1: the second permutation, or the second of the cyclic group."""
    source = tasks.make("group_words", group=group, length=300)
    lines = source.show(source[0])
    assert len(lines) == 300
    assert any(line.split()[1:3] == ["1", name] for line in lines)
