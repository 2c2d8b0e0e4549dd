"""Docstrings as the site shows them.

They are Markdown in plain words: lines `name: text` are items of a list, and signs in formulas,
such as `S_t`, `2 ** d` or `<name>`, are no markup outside of code.
"""

import re

import griffe

# Code, in backticks or indented behind an empty line, is left alone.
CODE = r"`[^`]*`|(?:\A|(?<=\n\n)) {4}.*(?:\n(?: {4}.*)?)*"
SIGN = re.compile(rf"({CODE})|(?!^\* )([*_<#+>\[\]])", re.MULTILINE)
ITEM = re.compile(r"^(|  )(\**\w+(?:, \**\w+)*): +(.*)$")


class Readable(griffe.Extension):
    """Rewrites every docstring into Markdown."""

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            known = {*obj.members, *(p.name for p in getattr(obj, "parameters", ()))}
            obj.docstring.value = escaped(with_lists(obj.docstring.value, known))


def with_lists(text: str, known: set[str]) -> str:
    """Lines `name: text` as items: all that are indented by two, others about what is known."""
    first, *others = text.split("\n")
    lines, listing = [first], None  # the indentation of the list in front of a line
    for line in others:
        item = ITEM.match(line)
        names = set(item[2].replace("*", "").split(", ")) if item else set()
        if item and (item[1] or names <= known):
            begins, line = listing != item[1], f"- `{item[2]}`: {item[3]}"
            listing = item[1]
        else:
            begins = bool(listing) and not line.startswith(listing)
            listing = listing if line and not begins else None
        lines += ["", line] if begins else [line]
    return "\n".join(lines)


def escaped(text: str) -> str:
    return SIGN.sub(lambda found: found[1] or {"<": "&lt;"}.get(found[2], f"\\{found[2]}"), text)
