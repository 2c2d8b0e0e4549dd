"""Tables in README.md, between the marks <!-- name --> and <!-- /name -->."""

import datetime
import pathlib
from importlib import metadata

HERE = pathlib.Path(__file__).parent


def made(*packages: str) -> dict:
    """When figures are made, and with which versions of what they depend on."""
    versions = {name: metadata.version(name) for name in packages}
    return {"date": datetime.date.today().isoformat(), "versions": versions}


def chosen(only, runs: dict, kept: dict, made: dict) -> dict:
    """The cases (op, decay) to compile: all, or those of some names. Rows that stay have to be of
    the same versions."""
    if only is None:
        return runs
    if unknown := set(only) - {op for op, _ in runs}:
        names = ", ".join(dict.fromkeys(op for op, _ in runs))
        raise SystemExit(f"--only takes {names}; given {', '.join(sorted(unknown))}")
    if kept.get("versions") != made["versions"]:
        raise SystemExit(
            f"--only keeps rows of {kept.get('versions')}, and here is {made['versions']}; run "
            "without it"
        )
    return {case: forms for case, forms in runs.items() if case[0] in only}


def when(found: dict) -> str:
    """What `made` says, in words."""
    versions = (f"{name} {version}" for name, version in found["versions"].items())
    return f"on {found['date']} with {', '.join(versions)}"


def markdown(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def write(tables: dict[str, str]) -> None:
    """Writes texts by mark."""
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for mark, table in tables.items():
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, _, after = rest.partition(f"<!-- /{mark} -->")
        text = f"{before}<!-- {mark} -->\n{table}<!-- /{mark} -->{after}"
    readme.write_text(text, encoding="utf-8")
