"""Blocks, the parameters of every mixer, and the messages of a model's settings."""

import dataclasses
from typing import Annotated, NamedTuple

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from block_references import softmax
from contract import distance

from memjax import sharding
from memjax.axes import RULES
from memjax.cell import MemoryCell
from memjax.defaults import default_mixers
from memjax.nn.layers import Context, Norm
from memjax.nn.lm import ModelConfig
from memjax.nn.mixer import Mixer
from memjax.nn.stack import make_mixer
from memjax.train_step import init_params
from memjax.typing import Array, Field

KEY = jax.random.key(0)


def boxed(config):
    """The boxed shapes of a model's parameters, by path."""
    shapes = jax.eval_shape(lambda: init_params(models.LanguageModel(config), KEY))
    leaves = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda a: hasattr(a, "names"))
    return shapes, {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", models.FAST)
def test_every_parameter_has_axes_that_the_sharding_rules_know(name):
    known = set(RULES)
    for changes in ({}, {"norm": "layer", "tie": False}):
        shapes, leaves = boxed(models.config(name, **changes))
        for path, leaf in leaves.items():
            assert hasattr(leaf, "names"), f"{path} has no logical axes"
            assert len(leaf.names) == leaf.value.ndim, f"{path}: {leaf.names}"
            assert set(leaf.names) - {None} <= known, f"{path}: {leaf.names}"
            assert set(leaf.names) != {None}, f"{path} names no axis"
            assert leaf.value.dtype == jnp.float32, f"{path} is {leaf.value.dtype}"
        placed = sharding.shardings(shapes, sharding.mesh({"fsdp": -1}))
        assert jax.tree.structure(placed) == jax.tree.structure(nn.unbox(shapes))
    repeated = [leaf for path, leaf in leaves.items() if "group_1" in path]
    assert all(leaf.names[0] == "layers" for leaf in repeated)


class Vectors(NamedTuple):
    v: Annotated[Array, Field("n", "value")]


class Weighted(MemoryCell):
    """A memory with weights of its own, of two shapes."""

    inputs = Vectors

    def init_params(self, key, heads):
        return {"first": jax.random.normal(key, (heads, 3)), "rate": jnp.ones((heads,))}

    def init_state(self, params):
        return params["first"]

    def write(self, params, state, x):
        return params["rate"] * state + x.v

    def read(self, params, state, x):
        return state


class WeightedMixer(Mixer):
    memories = 2

    def make_cell(self):
        return Weighted()

    def inputs(self, x, state, ctx):
        return Vectors(jnp.broadcast_to(x[:, :, None, :3], (*x.shape[:2], 2, 3))), x, {}

    def outputs(self, y, kept):
        return kept + y.mean((2, 3))[..., None]


def test_a_memorys_own_weights_have_axes():
    module = WeightedMixer(dim=4)
    x = jnp.ones((1, 3, 4))
    ctx = Context(None, None, jnp.zeros((1, 3), jnp.int32))
    variables = module.init(KEY, x, None, ctx)
    memory = variables["params"]["memory"]
    assert memory["first"].names == ("heads", None) and memory["rate"].names == ("heads",)
    y, state, _ = module.apply(nn.unbox(variables), x, None, ctx)
    first = np.asarray(memory["first"].value)
    assert distance(state["memory"], (first + 3)[None]) <= 1e-6
    assert y.shape == x.shape


# RWKV's own initialisation is tested in test_rwkv.py.
SPREAD = [name for name, layers in models.FAST.items() if "rwkv" not in str(layers)]
# Output projections of mixers in mixers, which do not write into the residual stream.
INSIDE = {"mal": "memory/output", "mac": ("memory/output", "attention/output")}
FIRST = ("scanned", "nested", "mamba2", "titans", "rg_lru", "memory_caching")  # layers that differ


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.slow) for n in SPREAD]
)
def test_initial_weights_have_the_promised_spread(name):
    """std, and std / sqrt(2 layers) where a layer writes into the residual stream. The sample's
    own relative standard error is 1 / sqrt(2 n); five of them are allowed."""
    config = models.config(name, dim=32, std=0.02)
    params = contract.to_numpy(models.initialise(models.LanguageModel(config)))
    residual = ("output", "down", *(("group_0/layer_0/mixer/gate",) if name == "scanned" else ()))
    checked = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *names, last = (getattr(key, "key", None) for key in path)
        layer = "/".join(map(str, names))
        if last not in ("kernel", "embedding") or layer.endswith("short_convolution"):
            continue
        if layer.endswith("memory/output") and name == "window_exit":
            continue  # starts at zero, see below
        scaled = layer.endswith(residual) and not layer.endswith(INSIDE.get(name, "fading/output"))
        expected = 0.02 * ((2 * config.depth) ** -0.5 if scaled else 1)
        off = abs(float(np.std(leaf)) / expected - 1)
        assert off <= 5 / np.sqrt(2 * leaf.size), f"{layer}: {np.std(leaf)}, not {expected}"
        checked.add(scaled)
    assert checked == {False, True}


def test_base_conv_equals_its_equation():
    x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
    module = make_mixer("base_conv", {}, dim=4, std=1.0)(name="mixer")
    ctx = Context(None, None, jnp.zeros((1, 6), jnp.int32))
    params = nn.unbox(module.init(KEY, x, None, ctx)["params"])
    y, state, _ = module.apply({"params": params}, x, None, ctx)
    kernel, bias = params["short_convolution"]["kernel"], params["short_convolution"]["bias"]
    padded = np.concatenate([np.zeros((1, 2, 4)), x], axis=1)
    past = sum(kernel[j] * padded[:, 2 - j : 8 - j] for j in range(3)) + bias
    expected = past * (x @ params["gate"]["kernel"] + params["gate"]["bias"]) + x
    assert distance(y, expected) <= 1e-6
    assert np.array_equal(state["convolution"], x[:, -2:])


@pytest.mark.parametrize("combine", ["gate", "parallel", "sequential"])
@pytest.mark.usefixtures("exact_products")
def test_hybrid_equals_its_equation(combine):
    x = np.random.default_rng(1).normal(size=(2, 7, 8)).astype(np.float32)
    options = {"hybrid": {"combine": combine}, "sliding_window": {"heads": 2, "window": 3}}
    options["delta_net"] = {"heads": 2}
    shared = dict(dim=8, std=0.5)
    ctx = Context(None, None, jnp.broadcast_to(jnp.arange(7), (2, 7)))
    module = make_mixer("hybrid(sliding_window, delta_net)", options, **shared)(name="mixer")
    params = nn.unbox(jax.jit(module.init)(KEY, x, None, ctx)["params"])

    def inner(name, which, x):
        mixer = make_mixer(name, options, **shared)(name="mixer")
        return np.asarray(jax.jit(mixer.apply)({"params": params[which]}, x, None, ctx)[0])

    held = inner("delta_net", "memory", x)
    if combine == "sequential":
        normed = Norm("rms").apply({"params": params["norm"]}, x + held)
        expected = held + inner("sliding_window", "attention", normed)
    elif combine == "parallel":
        expected = held + inner("sliding_window", "attention", x)
    else:
        gate = x @ np.asarray(params["gate"]["kernel"]) + params["gate"]["bias"]
        share = 1 / (1 + np.exp(-gate))
        expected = share * inner("sliding_window", "attention", x) + (1 - share) * held
    y, state, _ = jax.jit(module.apply)({"params": params}, x, None, ctx)
    assert distance(y, expected) <= 2e-6
    assert set(state) == {"attention", "memory"}


W, S, T = 3, 2, 11  # window, sinks, tokens


def attended(params, x, visible, weigh):
    """A layer of two heads in float64, its tokens weighed where visible [T, T]."""
    kernels = (np.float64(params[name]["kernel"]) for name in ("query", "key", "value"))
    q, k, v = (np.tensordot(x, kernel, 1) for kernel in kernels)
    scores = np.einsum("bthk,bshk->bhts", q.reshape(*q.shape[:2], 2, -1), k) / 2  # K ** 0.5
    answers = np.einsum("bhts,bshv->bthv", weigh(scores, visible), v)
    kernel = np.float64(params["output"]["kernel"]).reshape(2, -1, 8)
    return np.einsum("bthv,hvd->btd", answers, kernel)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("window", [1, W, T])  # the last: attention to all tokens
def test_window_sinks_and_memory_cover_every_position_once(window):
    """Against sums over explicit sets; at the start the memory's output is zero."""
    options = {
        "hybrid": {"combine": "window_exit"},
        "sliding_window": {"heads": 2, "window": window, "sinks": S, "rotary_base": 0.0},
        "linear_attention": {"heads": 2, "feature_map": "identity", "norm": "none"},
    }
    make = make_mixer("hybrid(sliding_window, linear_attention)", options, dim=8, std=0.5)
    module, ctx = make(name="mixer"), Context(None, None, jnp.arange(T)[None])
    x = np.random.default_rng(1).normal(size=(1, T, 8)).astype(np.float32)
    params = nn.unbox(jax.jit(module.init)(KEY, x, None, ctx)["params"])
    apply = jax.jit(lambda params: module.apply({"params": params}, x, None, ctx)[0])

    age, token = np.arange(T)[:, None] - np.arange(T), np.arange(T)
    near = (age >= 0) & ((age < window) | (token < S))
    left = (age >= window) & (token >= S)
    assert np.array_equal(near ^ left, np.tri(T, dtype=bool)) and not (near & left).any()
    expected = attended(params["attention"], x, near, softmax)
    assert distance(apply(params), expected) <= 1e-6
    output = params["memory"]["output"]
    output["kernel"] = np.random.default_rng(2).normal(size=(2, 4, 8)).astype(np.float32)
    expected = expected + attended(params["memory"], x, left, lambda s, visible: s * visible)
    assert distance(apply(params), expected) <= 1e-6


@pytest.mark.slow
def test_a_wrapped_memory_behind_a_window_starts_silent():
    """The zero of its output projection reaches the mixer inside the wrapper."""
    options = {"hybrid": {"combine": "window_exit"}, "sliding_window": {"heads": 2, "window": 2}}
    options |= {"delta_net": {"heads": 2}, "memory_caching": {"segment": 2, "slots": 2}}
    layer, x = "hybrid(sliding_window, memory_caching(delta_net))", np.ones((1, T, 8), np.float32)
    module = make_mixer(layer, options, dim=8, std=0.5)(name="mixer")
    ctx = Context(None, None, jnp.arange(T)[None])
    params = nn.unbox(jax.jit(module.init)(KEY, x, None, ctx)["params"])
    window = make_mixer("sliding_window", options, dim=8, std=0.5)(name="mixer")
    expected = jax.jit(window.apply)({"params": params["attention"]}, x, None, ctx)[0]
    assert distance(jax.jit(module.apply)({"params": params}, x, None, ctx)[0], expected) <= 1e-6


MESSAGES = {
    "model.vocab must be at least 1; given 0": dict(vocab=0),
    "model.dim must be at least 1; given 0": dict(dim=0),
    "model.mlp must be >= 0 and model.std > 0; given -1": dict(mlp=-1),
    "model.std > 0; given 1.0, 0": dict(std=0, mlp=1.0),
    "model.norm 'batch': allowed are rms, layer": dict(norm="batch"),
    "model.dtype 'float64': allowed are float32, bfloat16": dict(dtype="float64"),
    "model.remat 'some': allowed are none, full": dict(remat="some"),
    "expected pairs (pattern, repeats)": dict(layers=("delta_net", 2)),
    'such as ((("delta_net",), 2),); given ()': dict(layers=()),
    "given ((('delta_net',), 0),)": dict(layers=((("delta_net",), 0),)),
    "Did you mean 'delta_net'?": dict(layers=((("delta_nte",), 1),)),
    "expected a name or name(name, ...)": dict(layers=((("hybrid(delta_net",), 1),)),
    "hybrid takes 2 mixers; given 1": dict(layers=((("hybrid(delta_net)",), 1),)),
    "hybrid takes 2 mixers; given 3": dict(
        layers=((("hybrid(delta_net, delta_net, delta_net)",), 1),)
    ),
    "base_conv takes 0 mixers; given 1": dict(layers=((("base_conv(delta_net)",), 1),)),
    "delta_net takes 0 mixers; given 1": dict(layers=((("delta_net(delta_net)",), 1),)),
    "unknown mixer in model.mixers 'delta_nte'; allowed: delta_net. Did you": dict(
        mixers={"delta_nte": {}}
    ),
    "unknown option of delta_net 'beta_mx'": dict(mixers={"delta_net": {"beta_mx": 2.0}}),
    "Did you mean 'beta_max'?": dict(mixers={"delta_net": {"beta_mx": 2.0}}),
    "unknown option of delta_net 'dim'": dict(mixers={"delta_net": {"dim": 2}}),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_a_config(message):
    settings = dict(vocab=17, dim=16, layers=((("delta_net",), 1),)) | MESSAGES[message]
    with pytest.raises(ValueError) as error:
        ModelConfig(**settings)
    assert message in str(error.value)


# settings that only the model itself can judge
IMPOSSIBLE = {
    "dim 16 does not divide into 3 heads": ("delta_net", {"heads": 3}),
    "attention: dim 16 does not divide into 3 heads": ("sliding_window", {"heads": 3}),
    "heads 4 must be a multiple of kv_heads 3": ("attention", {"kv_heads": 3, "head_dim": 4}),
    "beta_max must lie in (0, 2]; given 3": ("delta_net", {"beta_max": 3.0}),
    "gate 'tanh': allowed are none, silu, sigmoid": ("delta_net", {"gate": "tanh"}),
    "norm 'l2': allowed are 'rms' and 'layer'": ("delta_net", {"norm": "l2"}),
    "window and block must be at least 1, sinks and persistent at least 0; given": (
        "sliding_window",
        {"window": 0},
    ),
    "feature_map 'relu': allowed are": ("linear_attention", {"feature_map": "relu"}),
    "combine 'series': allowed are gate, parallel": ("hybrid", {"combine": "series"}),
    "needs sliding_window in front, whose tokens leave; given AttentionMixer": (
        "hybrid(attention, delta_net)",
        {"combine": "window_exit"},
    ),
    "needs a memory cell behind the window; given BaseConv, a block": (
        "hybrid(sliding_window, base_conv)",
        {"combine": "window_exit"},
    ),
    "sinks=-1": ("sliding_window", {"sinks": -1}),
    "MixtureOfMemoriesMixer chooses what a token writes": (
        "hybrid(sliding_window, mixture_of_memories)",
        {"combine": "window_exit"},
    ),
    "mac: segment must be at least 1": ("mac", {"segment": 0}),
    "heads a divisor of dim 16; given 64, 4, 3": ("mac", {"heads": 3}),
    "implementation 'fast': allowed are": ("delta_net", {"implementation": "fast"}),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_messages_of_a_model(message):
    name, options = IMPOSSIBLE[message]
    mixers = {name.partition("(")[0]: options}
    config = ModelConfig(vocab=17, dim=16, layers=(((name,), 1),), mixers=mixers)
    with pytest.raises(ValueError) as error:
        boxed(config)
    assert message in str(error.value)


def test_default_mixers_list_every_option():
    layers = ((("base_conv", "hybrid(attention, delta_net)"), 2), (("hybrid",), 1))
    mixers = default_mixers(layers, {"delta_net": {"beta_max": 2.0}})
    inside = {"sliding_window", "gated_delta_net"}
    assert set(mixers) == {"attention", "base_conv", "delta_net", "hybrid"} | inside
    assert mixers["delta_net"]["beta_max"] == 2.0 and mixers["gated_delta_net"]["beta_max"] == 1.0
    assert not {"dim", "std", "dtype", "name", "parent", "inner"} & set(mixers["hybrid"])
    config = ModelConfig(vocab=17, dim=16, layers=layers, mixers=mixers)
    assert config.depth == 5
    assert dataclasses.replace(config, mixers={}).layers == layers
