"""Passkeys: layout of the text, its tokens, and laws with known values."""

import re
import sys

import numpy as np
import pytest
from task_checks import refuses

from memjax import tasks
from memjax.data import tokens
from memjax.tasks import __main__ as command
from memjax.tasks import passkey
from memjax.tasks.passkey import LINE


def text_of(example):
    """The bytes of a row of `passkey`, with the last digit."""
    shown = np.append(example["inputs"][1:], example["targets"][-1])
    return bytes((shown - tokens.OFFSET).tolist()).decode()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"template": "ruler", "length": 512},
        {"template": "ruler", "length": 1024, "distractors": 3, "every_byte": True},
        {"length": 700, "distractors": 2, "every_byte": True, "split": "test"},
        {"length": 178, "split": "test"},  # the shortest
    ],
)
def test_passkey_layout(settings):
    source = tasks.make("passkey", **settings)
    length, lines, number = source.length, source.lines, 1 + source.distractors
    word, value = "[bdfgklmnprstvz][aeiou]" * 2 + "[bdfgklmnprstvz]", "[1-9][0-9]{6}"
    short = source.template == "short"
    begin = "The magic number for" if short else "One of the special magic numbers for"
    needle = re.compile(f"{begin} ({word}-{word}) is{'' if short else ':'} ({value})\\.\n")
    answer = re.compile(f"agic number for ({word}-{word})(?: mentioned .* text)? is ({value})$")
    places = set()
    for index in range(300):
        example = source[index]
        inputs, targets, mask = example["inputs"], example["targets"], example["mask"]
        kinds = {name: (array.dtype, array.shape) for name, array in example.items()}
        row = {name: (np.dtype(np.int32), (length,)) for name in ("inputs", "targets", "distance")}
        assert kinds == row | {"mask": (np.bool_, (length,)), "depth": (np.int32, ())}
        assert inputs[0] == tokens.BOS and (inputs[1:] >= tokens.OFFSET).all()
        text = text_of(example)
        assert len(text) == length and len(text) - len(text.lstrip(" ")) < 90
        bound = dict(needle.findall(text))
        assert len(needle.findall(text)) == len(bound) == len(set(bound.values())) == number
        key, digits = answer.search(text).groups()
        assert bound[key] == digits
        rest = needle.sub("", text).lstrip(" ")
        assert rest.count(LINE) == lines
        before = text[: text.index(f"{key} is{'' if short else ':'} {digits}.")]
        assert before.count(LINE) == example["depth"] * lines // 100
        places.add(before.count(LINE))
        scored = len(text.lstrip(" ")) if source.every_byte and source.split == "train" else 7
        assert mask[length - scored :].all() and mask.sum() == source.queries == scored
        ahead = np.append(inputs[1:], targets[-1])
        assert (targets == np.where(mask, ahead, 0)).all()
        at = np.arange(length - 7, length)
        shown = at - example["distance"][at]
        assert (inputs[shown] == targets[at]).all() and (np.diff(shown) == 1).all()
        assert inputs[shown[-1] + 1] == tokens.OFFSET + ord(".")  # in the needle
        assert not example["distance"][: length - 7].any()
    assert places == set(range(lines + 1))


def test_passkey_has_the_tokens_of_text_and_the_sizes_of_its_specification():
    assert (passkey.BOS, passkey.OFFSET) == (tokens.BOS, tokens.OFFSET)
    assert passkey.VOCAB == tokens.BYTES.vocab
    sizes = [tasks.make("passkey", template="ruler", length=n).lines for n in (512, 1024, 2048)]
    assert sizes == [1, 7, 18]


def test_passkey_laws():
    """Depths, digits and letters are uniform; the split "test" walks through the grid of 40."""
    source = tasks.make("passkey")
    depths, digits, letters = [], [], []
    for index in range(4000):
        example = source[index]
        text = text_of(example)
        depths.append(example["depth"])
        digits.append([int(digit) for digit in text[-7:]])
        letters.append(["bdfgklmnprstvz".index(text[at]) for at in (-22, -20, -18, -16, -14, -12)])
    digits = np.array(digits)
    for drawn, number, bound in (  # p = 0.001 of chi-square with number - 1 degrees of freedom
        (np.array(depths), 101, 149.4),
        (digits[:, 0] - 1, 9, 26.1),
        (digits[:, 1:].ravel(), 10, 27.9),
        (np.ravel(letters), 14, 34.5),
    ):
        counts, expected = np.bincount(drawn, minlength=number), len(drawn) / number
        assert len(counts) == number and ((counts - expected) ** 2 / expected).sum() < bound
    test = tasks.make("passkey", split="test")
    found = [int(test[i]["depth"]) for i in range(80)]
    assert found == [round(100 * i / 39) for i in range(40)] * 2


def test_show_prints_the_text(monkeypatch, capsys):
    given = "--show=passkey", "--index=3", "template=ruler", "length=1024"
    monkeypatch.setattr(sys, "argv", ["memjax.tasks", *given])
    command.main()
    shown = capsys.readouterr().out
    example = tasks.make("passkey", template="ruler", length=1024)[3]
    text = text_of(example)
    assert shown.endswith(text.lstrip(" ") + "\n") and f"answer    {text[-7:]}\n" in shown
    assert f"depth     {example['depth']} %" in shown and "haystack  7 lines" in shown
    assert f"distance  {example['distance'][-1]} tokens" in shown


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(length=177), "haystack takes 178 bytes, .* use length=178 or more"),
        (dict(template="long"), "template='long' .* short, ruler"),
        (dict(distractors=-1), "distractors=-1 .* 0 or more"),
        (dict(every_byte=1), "every_byte=1 has the type int"),
        (dict(split="valid"), "split='valid' .* train, test"),
        (dict(vocab=259), "unknown setting 'vocab'"),
    ],
)
def test_impossible_settings(settings, message):
    refuses("passkey", settings, message)
