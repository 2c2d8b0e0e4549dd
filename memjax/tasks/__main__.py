"""Prints one example of a task: python -m memjax.tasks --show=mqar [--index=0] [pairs=4 ...]."""

import argparse
import dataclasses

from memjax import tasks
from memjax.tasks.source import parse_setting


def show(source, index: int) -> str:
    """The example as text, under its settings."""
    settings = (
        f"{field.name}={getattr(source, field.name)!r}" for field in dataclasses.fields(source)
    )
    lines = [f"{source.name}, example {index} of 2**31: {', '.join(settings)}", ""]
    return "\n".join(lines + source.show(source[index]))


def main() -> None:
    parser = argparse.ArgumentParser("python -m memjax.tasks", allow_abbrev=False)
    parser.add_argument("--show", required=True, metavar="TASK", help=", ".join(tasks.names()))
    parser.add_argument("--index", type=int, default=0, help="number of the example")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="such as pairs=4")
    arguments = parser.parse_intermixed_args()
    try:
        known = tasks.settings(arguments.show)
        settings = dict(parse_setting(text, known) for text in arguments.settings)
        print(show(tasks.make(arguments.show, **settings), arguments.index))
    except (ValueError, IndexError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
