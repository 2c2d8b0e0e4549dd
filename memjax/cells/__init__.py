"""Memory cells, one file each. Every module here that does not begin with `_` registers itself."""

import importlib
import pkgutil

from memjax import registry

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


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
