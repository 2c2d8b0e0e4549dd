"""Token mixers built from other mixers, one file for each way of combining; found like cells."""

import importlib
import pkgutil

from memjax import registry

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")


def names() -> list[str]:
    """Names of the registered blocks."""
    return registry.names(registry.BlockSpec)
