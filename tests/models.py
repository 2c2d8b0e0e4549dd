"""Tiny language models over every registered mixer, and how tests run them.

`apply` gives (logits, state) in numpy; `exact` the same in float64 from the same parameters.
Every call of a model with masks and a state shares one compilation for each length.
"""

import dataclasses
import functools

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import memjax
from memjax.blocks.hybrid import COMBINE
from memjax.nn.lm import LanguageModel, ModelConfig, initial_state
from memjax.nn.stack import mixer_names, mixer_options
from memjax.registry import get
from memjax.train_step import init_params

BATCH, LENGTH, VOCAB = 3, 10, 17

# The layers of each model; cells stand alone, so that a mistake names its cell.
CELLS = {name: (((name,), 1),) for name in memjax.cells.names()}
COMBINED = {
    "scanned": ((("base_conv",), 1), (("hybrid(sliding_window, gated_delta_net)",), 2)),
    "sequential": ((("hybrid(attention, linear_attention)",), 1),),
    "bmojo_f": ((("bmojo_f(gated_delta_net)",), 2),),
    "bmojo": ((("bmojo(gated_delta_net)",), 2),),
    "mac": ((("mac(delta_net)",), 2),),
    "mag": ((("mag(sliding_window, titans)",), 1),),
    "mal": ((("mal(sliding_window, titans)",), 1),),
    "window_exit": ((("hybrid(sliding_window, gated_delta_net)",), 2),),
    "rwkv4_channel": ((("rwkv4",), 2),),
    "rwkv7_channel": ((("base_conv",), 1), (("rwkv7",), 2)),
    "sambay": (
        (("published(mamba2)",), 1),
        (("published(attention)", "gmu", "cross_attention"), 2),
    ),
    "nested": ((("hybrid(attention, hybrid(sliding_window, delta_net))",), 1),),
}
FAST = {**CELLS, **COMBINED}
# Behind another layer, beside attention, in a scan over layers: one of each kind of layer. A layer
# is told the same there whatever it is; those that publish, report a loss, cache or freeze differ.
INSIDE = ("mamba2", "memory_caching", "mixture_of_memories", "rg_lru", "rwkv4", "rwkv7", "titans")
PRODUCT = {
    f"product-{cell}": ((("base_conv",), 1), ((f"hybrid(sliding_window, {cell})",), 2))
    for cell in INSIDE
}
ALL = {**FAST, **PRODUCT, "mac_tokens": COMBINED["mac"]}


class Wide(ModelConfig):
    """A config whose dtype may be float64, which is for references only."""

    def __post_init__(self):
        pass


def options(layers, changes=None) -> dict:
    """Two heads everywhere, windows of 3 and room for 40 tokens where a layer has a capacity."""
    found = {}
    for name in {n for pattern, _ in layers for text in pattern for n in mixer_names(text)}:
        window = 40 if hasattr(get(name).mixer, "capacity") else 3
        small = {
            "heads": 2,
            "frozen_chunk": 4,
            "window": window,
            "segment": 3,
            "slots": 2,
            "stored": 2,
            "top": 2,
        }
        found[name] = {k: v for k, v in small.items() if k in mixer_options(name)}
    for name, changed in (changes or {}).items():
        found[name] |= changed
    return found


def config(name: str, **changes) -> ModelConfig:
    """The tiny config of one name of `ALL`; weights large enough that each layer matters."""
    combine = {"hybrid": {"combine": name}} if name in COMBINE else {}
    if name == "window_exit":
        combine["sliding_window"] = {"window": 2, "sinks": 1}
    if name == "mac_tokens":
        combine["mac"] = {"written": "tokens"}
    settings = dict(layers=ALL[name], vocab=VOCAB, dim=16, mlp=1.0, std=0.3)
    settings |= {"channel": name} if name.endswith("_channel") else {}
    settings["mixers"] = options(settings["layers"], combine)
    return ModelConfig(**{**settings, **changes})


def initialise(shell: LanguageModel, seed: int = 1):
    """Its parameters, unboxed; kernels that start at zero are moved, so that each layer matters."""
    params = nn.unbox(jax.jit(functools.partial(init_params, shell))(jax.random.key(seed)))
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        zero = "kernel" in jax.tree_util.keystr(path[-1:]) and not np.any(leaf)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) if zero else leaf

    return jax.tree_util.tree_map_with_path(move, params)


@functools.cache
def model(name: str, dtype: str = "float32"):
    """(LanguageModel, its parameters, jitted apply) of one name of `ALL`."""
    shell = LanguageModel(config(name))
    params = initialise(shell)
    fields = {f.name: getattr(shell.config, f.name) for f in dataclasses.fields(ModelConfig)}
    shell = LanguageModel(Wide(**{**fields, "dtype": dtype}))
    if dtype == "float64":
        with contract.x64(True):
            params = contract.cast(contract.to_numpy(params), np.float64)
    return shell, params, jax.jit(shell.apply)


def apply(name, tokens, state=None, reset=None, write=None, select=None, dtype="float32"):
    """(logits, state) in numpy."""
    _, params, run = model(name, dtype)
    with contract.x64(dtype == "float64"):
        if dtype == "float64":
            state = contract.cast(state, np.float64)
        return contract.to_numpy(run({"params": params}, tokens, state, reset, write, select))


@functools.cache
def fresh(name: str):
    """The initial state of `BATCH` sequences, explicit."""
    shell, params, _ = model(name)
    return contract.to_numpy(jax.jit(lambda params: initial_state(shell, params, BATCH))(params))


def masks(length: int, reset=(), unwritten=()):
    """reset, write [BATCH, length]: True, False at these tokens of every row."""
    first, written = np.zeros((BATCH, length), bool), np.ones((BATCH, length), bool)
    first[:, list(reset)] = True
    written[:, list(unwritten)] = False
    return first, written


def text(seed: int = 0, length: int = LENGTH) -> np.ndarray:
    """Random tokens [BATCH, length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, (BATCH, length)).astype(np.int32)


def explicit(name, tokens):
    """The arguments of `apply` for plain tokens, with what `None` stands for."""
    return (tokens, fresh(name), *masks(tokens.shape[1]))


def assert_close(name, out, given, what: str) -> None:
    """`out` against the float64 model on `given`, all the arguments of `apply`."""
    own, exact = (
        contract.named(apply(name, *given, dtype=dtype)) for dtype in ("float32", "float64")
    )
    contract.assert_close(contract.named(out), own, exact, f"{name}, {what}")
