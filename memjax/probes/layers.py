"""The memories of a trained model, opened: what each is given and answers on the model's own data.

`capture` runs the model once and keeps, for every memory cell in it, the inputs that its mixer
makes, its own weights, and what the layer's mixer adds to the residual stream.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memjax.cell import MemoryCell
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.nn.mixer import Mixer
from memjax.probes import states
from memjax.typing import Array, Bool, Float, Int, PyTree

KEPT = "probe"  # the collection that is kept of a run


class Memory(NamedTuple):
    """One memory of a model. name: its path, such as "layer_1/memory". layer: from 0. cell,
    weights, inputs: for `memjax.run`, float32."""

    name: str
    layer: int
    cell: MemoryCell
    weights: PyTree
    inputs: Any


def unrolled(config: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The same model with every layer in a group of its own, (config, params), without a scan or
    recomputation: what happens inside of a layer can then be read and changed."""
    layers, groups, number = [], {}, 0
    for i, (pattern, repeats) in enumerate(config.layers):
        group = params["stack"][f"group_{i}"]
        for repeat in range(repeats):
            for j, mixer in enumerate(pattern):
                layer = group[f"layer_{j}"]
                if repeats > 1:
                    layer = jax.tree.map(lambda a, n=repeat: a[n], layer)
                layers.append(((mixer,), 1))
                groups[f"group_{number}"] = {"layer_0": layer}
                number += 1
    config = dataclasses.replace(config, layers=tuple(layers), remat="none")
    return config, {**params, "stack": {**params["stack"], **groups}}


def capture(
    model: LanguageModel,
    params: PyTree,
    tokens: Int[Array, "B T"],
    reset: Bool[Array, "B T"] | None = None,
) -> tuple[list[Memory], Float[np.ndarray, "layers B T D"]]:
    """(memories, what each layer's mixer gives) for these tokens, or vectors [B, T, F].

    Of a wrapper the outer cell counts. A memory that its block asks in another way than
    `Mixer.answers` (hybrid's window_exit), or window by window (mac), is left out.
    """
    config, params = unrolled(model.config, params)
    plain, cells = LanguageModel(config), dict[tuple[str, ...], MemoryCell]()

    def keep(module, name, value):  # False inside of a loop over windows
        return module.sow(KEPT, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def note(call, args, kwargs, context):
        out, module = call(*args, **kwargs), context.module
        path: tuple[str, ...] = module.path if module.scope is not None else ()
        if path[:1] != ("stack",):
            return out
        if isinstance(module, Mixer) and context.method_name == "answers":
            xs, _, kept, _ = out
            whole = xs[0].shape[:2] == tokens.shape[:2]
            if whole and keep(module, "probed_inputs", (module.weights(kept), xs)):
                cells[path] = module.cell
        if path[3:] == ("mixer",) and context.method_name == "__call__":
            keep(module, "probed_output", out[0])
        return out

    def run(params, tokens, reset):
        with nn.intercept_methods(note):
            _, found = plain.apply(
                {"params": params}, tokens, reset=reset, differentiate=False, mutable=KEPT
            )
        return found[KEPT]

    found = jax.tree.map(_single, jax.device_get(jax.jit(run)(params, tokens, reset)))
    memories = []
    for path, cell in cells.items():
        layer = int(path[1].removeprefix("group_"))
        name = "/".join((f"layer_{layer}", *path[4:]))
        weights, xs = functools.reduce(lambda tree, part: tree[part], path, found)["probed_inputs"]
        memories.append(Memory(name, layer, cell, weights, xs))
    mixers = [found["stack"][f"group_{i}"]["layer_0"]["mixer"] for i in range(config.depth)]
    return memories, np.stack([mixer["probed_output"] for mixer in mixers])


def _single(leaf):
    return leaf.astype(np.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def across_layers(outputs: Float[np.ndarray, "layers B T D"]) -> Float[np.ndarray, " layers-1"]:
    """The mean cosine, over tokens, between what a layer's mixer reads for a token and what the
    next layer's reads for it, both in the residual stream, where they can be compared.

    The idea of MemMamba's fidelity across layers (2025); the formula is ours.
    """
    return states.cosine(outputs[:-1], outputs[1:]).mean(axis=(1, 2))


def measure(
    memory: Memory, reset: Bool[np.ndarray, "B T"] | None, lags: tuple[int, ...], every: int
) -> dict[str, Any]:
    """State norm, write norm and effective rank over time, and fidelity by lag, of one memory on
    its own data: means over sequences and heads; a write norm is the mean of the `every` tokens."""
    norms, writes, held = states.timeline(memory.cell, memory.weights, memory.inputs, every, reset)
    ranks = states.effective_rank(states.read_map(memory.cell, memory.weights, held))
    norms, writes = (np.asarray(a).reshape(len(ranks), every, -1) for a in (norms, writes))
    fidelity = states.fidelity(memory.cell, memory.weights, memory.inputs, lags, reset)
    return {
        "name": memory.name,
        "cell": type(memory.cell).__name__,
        "over_time": [
            {
                "tokens": every * (i + 1),
                "norm": float(norms[i, -1].mean()),
                "write": float(writes[i].mean()),
                "rank": float(ranks[i].mean()),
            }
            for i in range(len(ranks))
        ],
        "fidelity": [
            {"lag": lag, "cosine": float(value)} for lag, value in zip(lags, fidelity, strict=True)
        ],
    }
