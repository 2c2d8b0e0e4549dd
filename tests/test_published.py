"""What layers give to later ones: gated memory units and cross attention against their equations.

Splits, resets, padding and causality of a model of them: tests/test_models.py, "sambay".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

from memjax.blocks.published import GMU
from memjax.nn.layers import Context
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.nn.stack import make_mixer

pytestmark = pytest.mark.usefixtures("exact_products")
B, T, D, KEY = 2, 7, 8, jax.random.key(0)
OPTIONS = {
    "mamba2": {"heads": 2, "state_dim": 4},
    "delta_net": {"heads": 2},
    "memory_caching": {"segment": 3, "slots": 3},
    "mixture_of_memories": {"routed": 2, "top": 1},
    "attention": {"heads": 4, "kv_heads": 2, "window": T},
    "cross_attention": {"heads": 4},
}


def context(**published):
    """Two documents in the second row."""
    reset = np.zeros((B, T), bool)
    reset[1, 3] = True
    position = np.arange(T) - 3 * np.cumsum(reset, axis=1)
    found = {name: (jnp.ones((), bool), value) for name, value in published.items()}
    return Context(jnp.asarray(reset), None, jnp.asarray(position), published=found)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(module, x, ctx, params=None):
    """(y, what is published, parameters)."""
    if params is None:
        params = nn.unbox(module.init(KEY, x, None, ctx)["params"])
    y, _, ctx = module.apply({"params": params}, x, None, ctx)
    return y, {name: value for name, (_, value) in ctx.published.items()}, params


def layer(text, **shared):
    return make_mixer(text, OPTIONS, dim=D, std=0.5, **shared)(parent=None)


def silu(a):
    return a / (1 + np.exp(-a))


def norm(a):
    return a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-5)


def project(a, params, name, axes=1):
    return np.tensordot(np.float64(a), np.float64(params[name]["kernel"]), axes)


@pytest.mark.parametrize("kind", ["rms", "none"])
def test_the_gated_memory_unit_equals_its_equation(kind):
    """Without the norm it is linear in m; with both it sees its own token alone."""
    x, m, other = normal(1, B, T, D), normal(2, B, T, 2, 6), normal(4, B, T, 2, 6)
    order = np.random.default_rng(3).permutation(T)

    @jax.jit
    def results():
        module = GMU(D, std=0.5, norm=kind)
        y, _, params = call(module, x, context(memory=m))
        shuffled, *_ = call(module, x[:, order], context(memory=m[:, order]), params)
        one, *_ = call(module, x, context(memory=other), params)
        both, *_ = call(module, x, context(memory=2 * m - 3 * other), params)
        return params, y, shuffled, one, both

    params, y, shuffled, one, both = results()
    gated = silu(project(x, params, "gate")) * m.reshape(B, T, 12)
    assert distance(y, project(norm(gated) if kind == "rms" else gated, params, "output")) < 1e-5
    assert distance(shuffled, np.asarray(y)[:, order]) < 1e-6
    sums = 2 * np.float64(y) - 3 * np.float64(one)
    assert (distance(both, sums) < 1e-5) == (kind == "none")


@pytest.mark.parametrize(
    "inner",
    [
        "mamba2",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("delta_net", "memory_caching(mamba2)", "mixture_of_memories(mamba2)")
        ),
    ],
)
def test_a_memory_is_published_in_front_of_its_norm_and_gate(inner):
    """The rest of the layer, applied to what is published, gives the layer's output."""
    x, ctx = normal(1, B, T, D), context()

    @jax.jit
    def results():
        y, published, params = call(layer(f"published({inner})"), x, ctx)
        alone, *_ = call(layer(inner), x, ctx, params["mixer"])
        return y, alone, published, params["mixer"]

    y, alone, published, own = results()
    assert distance(y, alone) <= 1e-6, "the layer is as it was"
    own = own.get("wrapped", own)
    if "memories" in own:  # the shared memory's layer
        own = {**own["shared"], **jax.tree.map(lambda a: a[-1], own["memories"])}
    m = np.float64(published["memory"])
    if "mamba2" in inner:
        m = norm((m * silu(project(x, own, "gate"))).reshape(B, T, 1, 16)).reshape(m.shape)
    else:
        m = norm(m)
    assert distance(y, project(m, own, "output", 2)) < 1e-5


def test_cross_attention_equals_attention_with_the_same_weights():
    """And has no others, and no state; its queries are its own."""
    x, ctx, reader = normal(1, B, T, D), context(), layer("cross_attention")

    @jax.jit
    def results():
        y, published, params = call(layer("published(attention)"), x, ctx)
        weights = {name: params["mixer"][name] for name in ("query", "output")}
        given = context(**published)
        same, *_ = call(reader, x, given, weights)
        other, *_ = call(reader, x[::-1], given, weights)
        own = nn.unbox(jax.eval_shape(reader.init, KEY, x, None, given)["params"])
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, weights)
        assert jax.eval_shape(reader.apply, {"params": weights}, x, None, given)[1] == {}
        return y, same, other

    y, same, other = results()
    assert distance(same, y) < 1e-6 and distance(other, y) > 0.01


MODELS = {
    "layer 'gmu': it reads the memory that a layer in front of it publishes": ("gmu",),
    "layer 'hybrid(sliding_window, gmu)': it reads the memory": (
        "hybrid(sliding_window, gmu)",
        "published(mamba2)",
    ),
    "layer 'cross_attention': it reads the attention that": (
        "published(mamba2)",
        "cross_attention",
        "published(attention)",
    ),
    "rotary_base 10000.0 is not that of the attention which it reads, 0.0": (
        "published(attention)",
        "cross_attention",
    ),
    "published needs a memory cell inside; given Hybrid, a block": ("published(hybrid)",),
}


@pytest.mark.parametrize("message", MODELS)
def test_what_nobody_publishes_is_refused(message):
    with pytest.raises(ValueError) as error:
        mixers = {"attention": {"rotary_base": 0.0}} if "rotary" in message else {}
        ModelConfig(vocab=17, dim=16, layers=((MODELS[message], 2),), mixers=mixers)
    assert message in str(error.value)


def test_messages_of_a_call():
    def shapes(layers, **mixers):
        model = LanguageModel(ModelConfig(vocab=17, dim=16, layers=layers, mixers=mixers))
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 3), jnp.int32))

    with pytest.raises(ValueError, match="heads 3 must be a multiple of the 2 heads of the publ"):
        heads = {"attention": {"heads": 2}, "cross_attention": {"heads": 3}}
        shapes(((("published(attention)", "cross_attention"), 1),), **heads)
    with pytest.raises(ValueError, match="publish different shapes of memory: .*has room for one"):
        shapes(((("published(mamba2)", "published(delta_net)"), 1),))
    with pytest.raises(ValueError, match="it reads the memory .* put one in `published`, as publ"):
        jax.eval_shape(GMU(8).init, KEY, jnp.zeros((1, 3, 8)), None, context())
