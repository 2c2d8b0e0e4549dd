"""Memory cells, one file each; every module here that does not begin with `_` is discovered."""

from memjax import registry


def names() -> list[str]:
    """Names of the registered cells."""
    return registry.names(registry.CellSpec)


def get(name: str) -> registry.CellSpec:
    """The spec of one cell; ValueError, with a suggestion, for a name that does not exist."""
    if name not in names():
        raise ValueError(registry.unknown("cell", name, names()))
    spec = registry.get(name)
    assert isinstance(spec, registry.CellSpec)
    return spec


def named(text: str) -> str:
    """A cell's name, or cells in wrappers such as "memory_caching(titans)", without spaces;
    ValueError, with a suggestion, for what does not exist."""
    name, inside = registry.parse(text)
    get(name)
    return f"{name}({','.join(map(named, inside))})" if inside else name
