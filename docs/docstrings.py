"""Docstrings as the site shows them.

They are Markdown in plain words: lines `name: text` are items of a list, and signs in formulas,
such as `S_t`, `2 ** d` or `<name>`, are no markup outside of code.
"""

import re

import griffe

# Code, in backticks or indented behind an empty line, is left alone.
CODE = r"`[^`]*`|(?:\A|(?<=\n\n)) {4}.*(?:\n(?: {4}.*)?)*"
SIGN = re.compile(rf"({CODE})|([*_<#+>\[\]])", re.MULTILINE)
SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Attributes):$")
ITEM = re.compile(r"^( *)(\**\w+(?:, \**\w+)*): +(.*)$")


class Readable(griffe.Extension):
    """Rewrites every docstring into Markdown."""

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            known = {*obj.members, *(p.name for p in getattr(obj, "parameters", ()))}
            obj.docstring.value = escaped(with_lists(obj.docstring.value, known))


def with_lists(text: str, known: set[str]) -> str:
    """Items of the sections, and lines about what is known, as items of lists."""
    lines, section, listing = [], False, False
    for number, line in enumerate(text.split("\n")):
        item = ITEM.match(line)
        names = item[2].replace("*", "").split(", ") if item else []
        if SECTION.match(line):
            lines += ["", line, ""]
            section, listing = True, True
        elif item and number and (section and item[1] == "  " or known.issuperset(names)):
            lines += [] if listing else [""]
            lines.append(f"- `{item[2]}`: {item[3]}")
            listing = True
        else:
            section, listing = section and bool(line), listing and bool(line)
            lines.append(line)
    return "\n".join(lines)


def escaped(text: str) -> str:
    return SIGN.sub(lambda found: found[1] or {"<": "&lt;"}.get(found[2], f"\\{found[2]}"), text)
