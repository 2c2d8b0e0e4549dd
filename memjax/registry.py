"""Names for cells and blocks: registration, look-up with a suggestion, and specs such as
`"hybrid(sliding_window, gated_delta_net)"`, written in a config exactly as they read."""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """All that memjax knows about a memory cell; registering it buys configs, tests and tables.

    name: the field's name for it, in snake case.
    cell: makes the cell of the contract tests; takes no argument.
    mixer: the Linen module that puts the cell into a model.
    paper: where the recurrence stands.
    recurrence: what one token does to one memory, as a line of text for the README's table.
    choice: what the paper leaves open and we chose, in a few words for the same table.
    variants: further cells that must pass the same tests, by name.
    arguments, defaults: of a wrapper around a cell, as in `BlockSpec`.
    """

    name: str
    cell: Callable[[], Any]
    mixer: type
    paper: str
    recurrence: str
    choice: str = ""
    variants: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
    arguments: tuple[int, ...] = (0,)
    defaults: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """A token mixer that is built from other token mixers, or that is no memory in itself.

    mixer: the Linen module; its field `inner` receives makers of the mixers in the parentheses.
    arguments: how many names may stand in the parentheses.
    defaults: what stands there when there are no parentheses.
    cell, variants: as in `CellSpec`, where the block has a memory of its own.
    """

    name: str
    mixer: type
    paper: str
    arguments: tuple[int, ...] = (0,)
    defaults: tuple[str, ...] = ()
    cell: Callable[[], Any] | None = None
    variants: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ChannelSpec:
    """A channel mixer, which follows the token mixer in a layer.

    mixer: the Linen module, (x, state, ctx) -> (y, state, ctx), with the fields dim, hidden, std,
    out_scale and dtype; one with an initialisation of its own may ignore std and out_scale.
    """

    name: str
    mixer: type
    paper: str


Spec = CellSpec | BlockSpec | ChannelSpec
_SPECS: dict[str, Spec] = {}


def register(spec: Spec) -> None:
    """Adds a spec; a name that is taken raises ValueError."""
    if spec.name in _SPECS and _SPECS[spec.name].mixer.__module__ != spec.mixer.__module__:
        taken = _SPECS[spec.name].mixer.__module__
        raise ValueError(f"the name {spec.name!r} is taken by {taken}; choose another one")
    _SPECS[spec.name] = spec


@functools.cache
def _discover() -> None:
    """Imports every module of the rooms that register, so that a name need not be imported."""
    for room in ("memjax.cells", "memjax.wrappers", "memjax.blocks"):
        package = importlib.import_module(room)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{room}.{module.name}")


def names(kind: type = CellSpec) -> list[str]:
    """Registered names of one kind (CellSpec, BlockSpec or ChannelSpec), sorted."""
    _discover()
    return sorted(name for name, spec in _SPECS.items() if isinstance(spec, kind))


def get(name: str) -> Any:
    """The spec of a registered cell or block; ValueError with a suggestion when there is none."""
    return _find("cell or block", name, (CellSpec, BlockSpec))


def is_cell(mixer: Any) -> bool:
    """Whether a module is the mixer of a registered cell or of a wrapper around one."""
    return any(type(mixer) is get(name).mixer for name in names())


def channel(name: str) -> Any:
    """The spec of a registered channel mixer; ValueError with a suggestion when there is none."""
    return _find("channel mixer", name, (ChannelSpec,))


def _find(what: str, name: str, kinds: tuple[type, ...]) -> Any:
    allowed = sorted(n for kind in kinds for n in names(kind))
    if name not in allowed:
        raise ValueError(unknown(what, name, allowed))
    return _SPECS[name]


def unknown(what: str, given: str, allowed: list[str]) -> str:
    """The message for a name that does not exist: what was given, what is allowed, what is near."""
    near = difflib.get_close_matches(given, allowed, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}; allowed: {', '.join(allowed)}.{hint}"


_SPEC = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse(text: str) -> tuple[str, tuple[str, ...]]:
    """Splits `"hybrid(sliding_window, delta_net)"` into its name and the names inside.

    Names inside may have parentheses of their own. ValueError when the text is not of that form.
    """
    match = _SPEC.fullmatch(text)
    if not match:
        raise ValueError(f"layer {text!r}: expected a name or name(name, ...)")
    name, inside = match.groups()
    if inside is None:
        return name, ()
    parts, depth = [""], 0
    for character in inside:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0 or not all(part.strip() for part in parts):
        raise ValueError(f"layer {text!r}: expected a name or name(name, ...)")
    return name, tuple(part.strip() for part in parts)
