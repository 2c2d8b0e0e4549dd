"""Prints one example of a task: python -m memjax.tasks --show=mqar [--index=0] [pairs=4 ...]."""

import argparse
import ast
import dataclasses

import numpy as np

from memjax import tasks
from memjax.tasks import passkey
from memjax.tasks.source import Example


def show(source, index: int) -> str:
    """The example as text, under its settings."""
    settings = (
        f"{field.name}={getattr(source, field.name)!r}" for field in dataclasses.fields(source)
    )
    lines = [f"{source.name}, example {index} of 2**31: {', '.join(settings)}", ""]
    example = source[index]
    show_row = show_text if isinstance(source, passkey.Passkey) else show_recall
    return "\n".join(lines + show_row(source, example))


def show_recall(source, example: Example) -> list[str]:
    """The bindings in order, the queries, and the whole row."""
    inputs = example["inputs"]
    lines = ["binding   position     key   value"]
    for position in range(0, source.context, 2):
        key, value = inputs[position : position + 2]
        lines.append(f"{position // 2 + 1:7d}   {position:8d}   {key:5d}   {value:5d}")
    lines += ["", "query     position     key  answer   distance"]
    again = example.get("rebound", np.zeros_like(example["mask"]))
    for count, at in enumerate(np.flatnonzero(example["mask"]).tolist(), 1):
        answer, distance = example["targets"][at], example["distance"][at]
        line = f"{count:7d}   {at:8d}   {inputs[at]:5d}   {answer:5d}   {distance:8d}"
        lines.append(line + ("   bound twice" if again[at] else ""))
    lines += ["", "row (queries in brackets; the answer comes next, and is not in the row)"]
    words = [f"[{t}]" if m else f"{t} " for t, m in zip(inputs, example["mask"], strict=True)]
    lines += ["".join(f"{w:>7}" for w in words[i : i + 12]) for i in range(0, len(words), 12)]
    return lines


def show_text(source, example: Example) -> list[str]:
    """The text of a row with its last digit, without the spaces in front."""
    shown = [*example["inputs"][1:], example["targets"][-1]]
    text = bytes(token - passkey.OFFSET for token in shown).decode()
    begin = text.lstrip(" ")
    return [
        f"haystack  {source.lines} lines of {len(passkey.LINE)} bytes",
        f"padding   {len(text) - len(begin)} spaces",
        f"depth     {example['depth']} %",
        f"distance  {example['distance'][-1]} tokens",
        f"scored    {example['mask'].sum()} of {source.length} positions",
        f"answer    {text[-passkey.DIGITS :]}",
        "",
        begin,
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m memjax.tasks", allow_abbrev=False)
    parser.add_argument("--show", required=True, metavar="TASK", help=", ".join(tasks.names()))
    parser.add_argument("--index", type=int, default=0, help="number of the example")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="such as pairs=4")
    arguments = parser.parse_args()
    settings = {}
    for text in arguments.settings:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(f"{text!r}: expected SETTING=VALUE, such as pairs=4")
        try:
            settings[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[name] = value
    try:
        print(show(tasks.make(arguments.show, **settings), arguments.index))
    except (ValueError, IndexError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
