"""The documentation: links between the texts of the repository, and what the site is made of.

`make docs` builds the site, where the rest of the links are checked.
"""

import importlib
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def texts():
    for pattern in ("*.md", "*/*.md", "*/*/*.md"):
        paths = (path.relative_to(ROOT) for path in ROOT.glob(pattern))
        yield from (p for p in paths if not p.parts[0].startswith((".", "runs", "build", "dist")))


def anchors(path):
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def expected(path, link):
    """Whether a link may have no target yet: the picture of an experiment without rows."""
    folder = (ROOT / path).parent
    return link == f"{folder.name}.png" and not (folder / "results.jsonl").exists()


def test_links_lead_to_files_and_headings():
    """Files, not folders, which a site has no page for."""
    checked, broken = 0, []
    for path in texts():
        text = CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)\s]+)\)|<!-- include: (\S+) -->", text):
            name, _, anchor = "".join(link).partition("#")
            if "://" in name or expected(path, name):
                continue
            target = (ROOT / path).parent / name if name else ROOT / path
            checked += 1
            if not target.is_file() or anchor and anchor not in anchors(target):
                broken.append(f"{path}: {''.join(link)}")
    assert checked > 50 and not broken


def test_every_page_is_in_the_nav():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    shown = re.findall(r"^ +- (?:\w+: )?(\S+/|\S+\.md)$", nav, re.MULTILINE)
    assert len(shown) == len(set(shown))
    for path in texts():
        folders = {f"{folder.as_posix()}/" for folder in path.parents}
        assert folders & {*shown} or path.as_posix() in shown, f"mkdocs.yml: no place for {path}"


DOCSTRING = """\
S_t <= 2**d - 1, as `S_t` in [B, T].

    S_t = <S>

* a point

length: tokens, *not* bytes,
of a row.
other: a sentence.

Args:
  a, b: two of them;
    both counted.
Raises:
  ValueError: never.
The end.
"""
SHOWN = """\
S\\_t &lt;= 2\\*\\*d - 1, as `S_t` in \\[B, T\\].

    S_t = <S>

* a point


- `length`: tokens, \\*not\\* bytes,
of a row.
other: a sentence.

Args:

- `a, b`: two of them;
    both counted.

Raises:

- `ValueError`: never.

The end.
"""


def test_docstrings_become_markdown(monkeypatch):
    """Items of lists are found, formulas are no markup, code is left alone."""
    griffe = types.SimpleNamespace(Extension=object)
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    monkeypatch.syspath_prepend(ROOT / "docs")
    docstrings = importlib.import_module("docstrings")
    assert docstrings.escaped(docstrings.with_lists(DOCSTRING, {"length"})) == SHOWN
