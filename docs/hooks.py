"""Makes the site's pages of the texts in the repository; mkdocs.yml says in which order they stand.

Every page has the place of its file, so that a relative link is right in the repository and in the
site; files that pages link to, such as pictures, come along. In a page of docs/ a line

    <!-- include: ../README.md#memories -->

becomes that section. In the nav, an entry that ends with "/" is all pages of a folder.

Made here are `colabs/*.md`, from the sources of the notebooks, and `reference/*.md`: a page for each
package with its public modules, but those that a page of docs/ has already, and two for the modules
of memjax itself, with and without a command.
"""

import re
from collections import defaultdict
from pathlib import Path

from mkdocs.structure.files import File

from memjax import notebooks

ROOT = Path(__file__).parent.parent
TEXTS = ("*.md", "docs/*.md", "colabs/*.md", "pallas_kernels/*.md", "experiments/*/*.md")
LINK = re.compile(r"\]\(([^)\s#]+)")
INCLUDE = re.compile(r"<!-- include: (\S+)#(\S+) -->")
PICTURE = re.compile(r"!\[[^\]]*\]\(\w+\.png\)")
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
        return sorted(name for name in found if name.startswith(part))
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
    if (path.parent / "sweep.py").exists() and not (path.parent / "results.jsonl").exists():
        text = PICTURE.sub("*Not run yet.*", text)
    return INCLUDE.sub(lambda given: section(path.parent / given[1], given[2]), text)


def section(path: Path, anchor: str) -> str:
    """What stands below a heading, up to the next one."""
    parts = re.split(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip((slug(title) for title in parts[1::2]), parts[2::2], strict=True))[anchor]


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


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
    return "\n\n".join(
        text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in shown
    )


def reference(written: str) -> dict[str, str]:
    """A page for each package with its public modules, unless they are in what is written."""
    modules = defaultdict(list)
    for path in sorted([*ROOT.glob("memjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]):
        module = path.relative_to(ROOT).with_suffix("")
        if not path.stem.startswith("_") and f"::: {'.'.join(module.parts)}\n" not in written:
            modules[package(module, path.read_text(encoding="utf-8"))].append(".".join(module.parts))
    return {
        f"reference/{name}.md": f"# {name}\n\n" + "".join(f"::: {module}\n\n" for module in found)
        for name, found in modules.items()
    }


def package(module: Path, text: str) -> str:
    """The title of a module's page."""
    if module.parts[0] != "memjax":
        return module.parts[0]
    if len(module.parts) > 2:
        return f"memjax.{module.parts[1]}"
    return "commands" if COMMAND in text else "memjax"
