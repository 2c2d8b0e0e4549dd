"""Makes the site's pages of the texts in the repository; mkdocs.yml says in which order they stand.

Every page has the place of its file, so that a relative link is right in the repository and in the
site; files that pages link to, such as pictures, come along. In a page the lines

    <!-- include: ../README.md#memories -->
    <!-- include: ../memjax/cells/_template.py -->

become that section, and that file as code. In the nav, an entry that ends with "/" is all pages of
a folder.

Made here are `colabs/*.md`, from the sources of the notebooks, and `reference/*.md`: a page for
each package with its public modules, but those that a page of docs/ has already, and two for the
modules of memjax itself, with and without a command.
"""

import re
from collections import defaultdict
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from pymdownx.slugs import slugify

from memjax import notebooks

ROOT = Path(__file__).parent.parent
TEXTS = ("*.md", "docs/*.md", "colabs/*.md", "pallas_kernels/*.md", "experiments/*/*.md")
LINK = re.compile(r"\]\(([^)\s#]+)")
INCLUDE = re.compile(r"<!-- include: ([^\s#]+)#?(\S*) -->")
PICTURE = re.compile(r"^!\[[^\]]*\]\(\w+\.png\)$", re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
COMMAND = 'if __name__ == "__main__":'


def on_config(config):
    found = pages()
    config.nav = [{title: expanded(value, found)} for entry in config.nav
                  for title, value in entry.items()]  # fmt: skip
    return config


def on_files(files, config):
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)  # it comes again, with its place in the repository
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for name in sorted(linked()):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def expanded(value, found: dict[str, str]):
    """An entry of the nav with the pages of its folders."""
    if isinstance(value, list):
        return [page for part in value for page in listed(part, found)]
    return value


def listed(part, found: dict[str, str]) -> list:
    if isinstance(part, str) and part.endswith("/"):
        inside = (name for name in found if name.startswith(part))
        return sorted(inside, key=lambda name: (name != f"{part}README.md", name))
    return [part]


def texts() -> list[Path]:
    return sorted(path for pattern in TEXTS for path in ROOT.glob(pattern))


def pages() -> dict[str, str]:
    """The Markdown of every page, by its name in the site."""
    found = {path.relative_to(ROOT).as_posix(): page(path) for path in texts()}
    for path in ROOT.glob("colabs/*.py"):
        found[f"colabs/{path.stem}.md"] = notebook(path)
    return found | reference("".join(found.values()))


def page(path: Path) -> str:
    text = path.read_text(encoding="utf-8").replace(".ipynb)", ".md)")
    if not (path.parent / f"{path.parent.name}.png").exists():  # the picture of an experiment
        text = PICTURE.sub("*Not run yet.*", text)
    return INCLUDE.sub(lambda given: included(path.parent / given[1], given[2]), text)


def included(path: Path, anchor: str) -> str:
    """What stands below a heading, up to the next one; without an anchor a file as code."""
    text = path.read_text(encoding="utf-8")
    if not anchor:
        return code(text)
    _, *parts = re.split(r"\n#+ (.+)\n", text)
    anchors = (slugify(case="lower")(title, "-") for title in parts[::2])
    return dict(zip(anchors, parts[1::2], strict=True))[anchor]


def code(text: str) -> str:
    return f"```python\n{text.rstrip()}\n```"


def linked() -> set[str]:
    """Names of the files that texts link to and that are no pages."""
    found = set()
    for path in texts():
        for link in LINK.findall(path.read_text(encoding="utf-8")):
            target = (path.parent / link).resolve()
            if target.is_file() and target.suffix not in (".md", ".ipynb"):
                found.add(target.relative_to(ROOT).as_posix())
    return found


def notebook(path: Path) -> str:
    """A notebook's cells as Markdown, without the setup that all of them have."""
    shown = (cell for cell in notebooks.cells(path.read_text(encoding="utf-8"))
             if not cell[1].startswith("# @title Setup"))  # fmt: skip
    return "\n\n".join(FORMULA.sub(formula, text) if kind == "markdown" else code(text)
                       for kind, text in shown)  # fmt: skip


def formula(found: re.Match) -> str:
    """TeX as MathML, which browsers show without a script."""
    return convert(found[1] or found[2], display="block" if found[1] else "inline")


def reference(written: str) -> dict[str, str]:
    """A page for each package with its public modules, unless they are in what is written."""
    modules = defaultdict(list)
    for path in sorted([*ROOT.glob("memjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not path.stem.startswith("_") and f"::: {'.'.join(parts)}\n" not in written:
            modules[package(parts, path.read_text(encoding="utf-8"))].append(".".join(parts))
    return {
        f"reference/{name}.md": f"# {name}\n\n" + "".join(f"::: {module}\n\n" for module in found)
        for name, found in modules.items()
    }


def package(parts: tuple[str, ...], text: str) -> str:
    """The title of the page that a module is on."""
    if parts[0] != "memjax":
        return parts[0]
    if len(parts) > 2:
        return f"memjax.{parts[1]}"
    return "commands" if COMMAND in text else "memjax"
