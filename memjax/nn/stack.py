"""A stack of layers: groups of a pattern that repeats, each group one `nn.scan`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from memjax import registry
from memjax.nn.block import Block
from memjax.nn.layers import Context
from memjax.typing import Array, Float, PyTree

# Fields of a mixer that the model sets, not the user.
_SET_BY_MODEL = ("parent", "name", "dim", "inner", "std", "out_scale", "dtype")
REMAT = ("none", "full")


def mixer_options(name: str) -> dict[str, dataclasses.Field]:
    """The options of a registered mixer, with their defaults and types."""
    fields = dataclasses.fields(registry.get(name).mixer)
    return {f.name: f for f in fields if f.name not in _SET_BY_MODEL}


def mixer_texts(text: str) -> list[str]:
    """A layer such as "hybrid(sliding_window, delta_net)" and every mixer in it, outermost
    first."""
    name, inside = registry.parse(text)
    inside = inside or getattr(registry.get(name), "defaults", ())
    return [text, *(found for part in inside for found in mixer_texts(part))]


def mixer_names(text: str) -> list[str]:
    """The name of each of them."""
    return [registry.parse(found)[0] for found in mixer_texts(text)]


def make_mixer(
    text: str, options: Mapping[str, Mapping[str, Any]], **shared: Any
) -> Callable[..., nn.Module]:
    """A maker of the mixer that `text` names, to be called with `name`.

    options: per name, values for fields of that mixer; names that are absent keep the defaults.
    shared: what the model sets on every mixer (dim, std, out_scale, dtype).
    Raises ValueError for unknown names, unknown options and a wrong number of inner mixers.
    """
    name, inside = registry.parse(text)
    spec = registry.get(name)
    chosen = dict(options.get(name, {}))
    allowed = mixer_options(name)
    for key in chosen:
        if key not in allowed:
            raise ValueError(registry.unknown(f"option of {name}", key, sorted(allowed)))
    inside = inside or spec.defaults
    if len(inside) not in spec.arguments:
        counts = " or ".join(map(str, spec.arguments))
        raise ValueError(f"layer {text!r}: {name} takes {counts} mixers; given {len(inside)}")
    if isinstance(spec, registry.CellSpec) and not all(map(_is_cell, inside)):
        raise ValueError(
            f"layer {text!r}: {name} wraps a memory cell; given {', '.join(inside)}. Put "
            f"{name} inside of the block"
        )
    if inside:
        chosen["inner"] = tuple(make_mixer(part, options, **shared) for part in inside)
    return functools.partial(spec.mixer, **shared, **chosen)


def _is_cell(text: str) -> bool:
    return isinstance(registry.get(registry.parse(text)[0]), registry.CellSpec)


class Group(nn.Module):
    """The layers of one pattern in a row; carry (x, ctx), states one per layer."""

    mixers: tuple[Callable[..., nn.Module], ...]
    channel: Callable[..., nn.Module] | None
    norm: str

    @nn.compact
    def __call__(self, carry: tuple[Array, Context], states: PyTree):
        (x, ctx), new = carry, []
        for i, mixer in enumerate(self.mixers):
            block = Block(mixer, self.channel, self.norm, name=f"layer_{i}")
            x, state, ctx = block(x, None if states is None else states[i], ctx)
            new.append(state)
        return (x, ctx), tuple(new)


class Stack(nn.Module):
    """Groups of layers: (x, states, ctx) -> (x, states, ctx).

    groups: pairs (makers of a pattern's mixers, repeats). A group that repeats is scanned: its
    parameters and states have a leading axis "layers". states: one tuple for each group, or None.
    remat: "none", or "full" to recompute each pattern in the backward pass.
    """

    groups: tuple[tuple[tuple[Callable[..., nn.Module], ...], int], ...]
    channel: Callable[..., nn.Module] | None
    norm: str = "rms"
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], states: tuple | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], tuple, Context]:
        carry, new = (x, ctx), []
        for i, (mixers, repeats) in enumerate(self.groups):
            module = nn.remat(Group, prevent_cse=False) if self.remat == "full" else Group
            if repeats > 1:
                module = nn.scan(
                    module,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=repeats,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
            group = module(mixers, self.channel, self.norm, name=f"group_{i}")
            carry, state = group(carry, None if states is None else states[i])
            new.append(state)
        return carry[0], tuple(new), carry[1]
