"""Parity and arithmetic: the answers, their laws and the layout of rows."""

import itertools

import numpy as np
import pytest
from task_checks import chi_square, close_to, refuses

from memjax import tasks
from memjax.tasks.formal import BracketArithmetic, ModularArithmetic, Parity

NAMES = ["parity", "modular_arithmetic", "bracket_arithmetic"]


def symbols(source, example):
    """The tokens of a row without filler, as characters, and the answer."""
    at = int(np.flatnonzero(example["mask"])[0])
    row = "".join(source.symbols[token] for token in example["inputs"])
    assert row[at + 1 :] == "_" * (source.length - at - 1)
    return row[: at + 1], source.symbols[example["targets"][at]]


def answers_of(source, count):
    return np.array([int(symbols(source, source[i])[1]) for i in range(count)])


@pytest.mark.parametrize(
    "name, settings",
    [
        ("parity", {}),
        ("parity", dict(min_size=3, max_size=3, length=3)),
        ("parity", dict(min_size=40, max_size=90, length=256, split="test")),
        ("modular_arithmetic", {}),
        ("modular_arithmetic", dict(mult=False, min_size=40, max_size=60, length=64)),
        ("bracket_arithmetic", {}),
        ("bracket_arithmetic", dict(mult=True, min_size=40, max_size=90, length=90)),
    ],
)
def test_answers(name, settings):
    """By Python's own arithmetic. Every size comes up; a row is as long as its size says."""
    source = tasks.make(name, **settings)
    sizes, operators = set(), set()
    for index in range(1000):
        example = source[index]
        row, answer = symbols(source, example)
        size = int(example["size"])
        sizes.add(size)
        if name == "parity":
            assert len(row) == size - 1 and set(row) <= set("01")
            assert int(answer) == row.count("1") % 2
            continue
        assert len(row) == (size - 1 if name == "modular_arithmetic" else max(size, 5) - 2)
        assert row[-1] == "=" and int(answer) == eval(row[:-1]) % 5
        operators |= set(row) - set("01234()=")
        if name == "modular_arithmetic":
            assert size % 2 and all(digit.isdigit() for digit in row[:-1:2])
    assert sizes == set(source.sizes)
    low, high = source.min_size, source.max_size
    assert sizes == {s for s in range(low, high + 1) if s % 2 or name != "modular_arithmetic"}
    assert name == "parity" or operators == (set("+-*") if source.mult else set("+-"))


def test_tokens_of_the_publication():
    assert Parity.symbols[Parity.pad] == "_" and Parity.symbols[1:] == "01"
    assert ModularArithmetic.symbols == "_+-*=01234" and ModularArithmetic.pad == 0
    assert BracketArithmetic.symbols == "01234+-*()=_" and BracketArithmetic.pad == 11


def test_parity_law():
    """Both answers are equally likely, at every size."""
    source = tasks.make("parity", max_size=6)
    drawn, sizes = answers_of(source, 6000), np.array([source[i]["size"] for i in range(6000)])
    assert close_to(drawn.sum(), 6000, 1 / 2)
    assert chi_square(np.bincount(sizes - 3)) < 16.3  # 3 degrees of freedom, p = 0.001
    for size in range(3, 7):
        assert close_to(drawn[sizes == size].sum(), (sizes == size).sum(), 1 / 2)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("mult", [False, True])
def test_law_of_answers(name, mult):
    """Uniform without products, where the last number shifts whatever is before it; else `answers`,
    in which 0 is the most frequent."""
    source = tasks.make(name, mult=mult, max_size=12)
    counts = np.bincount(answers_of(source, 10000))
    assert chi_square(counts, source.answers) < 18.5  # 4 degrees of freedom, p = 0.001
    np.testing.assert_allclose(source.answers.sum(), 1, rtol=1e-12)
    if mult:
        assert source.majority == source.answers[0] > source.chance + 0.01
        assert chi_square(counts) > 18.5  # a uniform law would be refused
    else:
        np.testing.assert_allclose(source.answers, 0.2, rtol=1e-12)
        np.testing.assert_allclose(source.majority, source.chance, rtol=1e-12)


def test_law_of_short_expressions_by_enumeration():
    for size, count in ((3, 1), (5, 2), (7, 3)):
        found = []
        for numbers in itertools.product("01234", repeat=count):
            for operators in itertools.product("+-*", repeat=count - 1):
                words = itertools.zip_longest(numbers, operators, fillvalue="")
                found.append(eval("".join(itertools.chain(*words))) % 5)
        source = tasks.make("modular_arithmetic", min_size=size, max_size=size)
        np.testing.assert_allclose(source.answers, np.bincount(found) / len(found), rtol=1e-12)
    # A product of two numbers is 0 in 9 of 25 cases, a sum in 5 of 25.
    two = tasks.make("modular_arithmetic", min_size=5, max_size=5)
    np.testing.assert_allclose(two.majority, (5 + 5 + 9) / 75)
    one = tasks.make("bracket_arithmetic", mult=True, min_size=8, max_size=8)  # (a op b)
    np.testing.assert_allclose(one.majority, (5 + 5 + 9) / 75)
    assert one.chance == 0.2


def test_brackets_split_uniformly():
    """An expression of 9 tokens is "(" left operator right ")": 1 to 5 tokens on the left."""
    source = tasks.make("bracket_arithmetic", min_size=12, max_size=12)
    lengths = []
    for index in range(2000):
        inside, _ = symbols(source, source[index])
        inside = inside[1:-2]
        for at in range(1, 6):
            before, after = inside[:at], inside[at + 1 :]
            whole = before.count("(") == before.count(")") and not before.endswith(("+", "-"))
            if inside[at] in "+-" and whole and after.count("(") == after.count(")"):
                lengths.append(at)
                break
    counts = np.bincount(lengths)[1:]
    assert counts.sum() == 2000 and len(counts) == 5
    assert chi_square(counts) < 18.5  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("parity", dict(min_size=2), "min_size=2 with max_size=40 .* 3 <= min_size"),
        ("parity", dict(min_size=9, max_size=8), "min_size=9 with max_size=8 .* <= max_size"),
        ("parity", dict(max_size=256), "max_size=256 is more than length=40; use length=256"),
        ("bracket_arithmetic", dict(length=39), "max_size=40 is more than length=39"),
        ("modular_arithmetic", dict(min_size=6, max_size=6), "no odd size .* use max_size=7"),
        ("modular_arithmetic", dict(mult=1), "mult=1 has the type int"),
        ("parity", dict(mult=True), "unknown setting 'mult'"),
    ],
)
def test_impossible_settings(name, settings, message):
    refuses(name, settings, message)


def test_show_writes_the_expression():
    source = tasks.make("bracket_arithmetic", min_size=20, max_size=20)
    row, answer = symbols(source, source[1])
    text = source.show(source[1])
    assert text[1] == "expression " + " ".join(row) and text[2].startswith(f"answer     {answer},")
