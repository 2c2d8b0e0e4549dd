"""RWKV-4 and RWKV-7 against their papers: brute force, whole layers in float64, initialisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

import memjax
from memjax import registry
from memjax.cells import rwkv4
from memjax.nn.layers import Context, orthogonal
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.train_step import init_params

pytestmark = pytest.mark.usefixtures("exact_products")
B, T, D = 2, 11, 8


def drawn(seed, scale=1.0, length=T):
    """Inputs of RWKV4 with the decay and the bonus of each channel constant, and those [V]."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, B, length, 2, 6)).astype(np.float32)
    w, u = -np.exp(rng.normal(size=(2, 6))), rng.normal(size=(2, 6))
    shape = k.shape
    xs = rwkv4.Inputs(v, scale * k, *(np.broadcast_to(a, shape).astype(np.float32) for a in (w, u)))
    return xs, w, u


@jax.jit
def wkv(xs):
    return memjax.run(rwkv4.RWKV4(6), {}, xs)[0]


def test_wkv_equals_the_papers_sum():
    xs, w, u = drawn(0)
    k, v = np.float64(xs.k), np.float64(xs.v)
    expected = np.zeros_like(v)
    for t in range(T):
        weights = [np.exp((t - 1 - i) * np.float32(w) + k[:, i]) for i in range(t)]
        weights = np.stack([*weights, np.exp(np.float32(u) + k[:, t])])
        expected[:, t] = (weights * np.moveaxis(v[:, : t + 1], 1, 0)).sum(0) / weights.sum(0)
    assert distance(wkv(xs), expected) < 1e-6


def test_wkv_is_an_average_of_the_values_seen():
    for scale in (1.0, 1e4):  # no product of raw exponentials survives keys of 10,000
        xs, *_ = drawn(1, scale)
        y = np.asarray(wkv(xs))
        assert np.isfinite(y).all()
        low, high = np.minimum.accumulate(xs.v, axis=1), np.maximum.accumulate(xs.v, axis=1)
        assert (y >= low - 1e-6).all() and (y <= high + 1e-6).all()
    xs, *_ = drawn(2)
    shifted = wkv(xs._replace(k=xs.k + 3))
    assert distance(shifted, wkv(xs)) < 1e-5, "the same added to all keys changes nothing"
    assert distance(wkv(xs._replace(u=np.full_like(xs.u, 1e4))), xs.v) < 1e-6
    assert np.array_equal(np.asarray(wkv(xs))[:, 0], xs.v[:, 0])


# ---------------------------------------------------------------- whole layers


def context(layer=0, depth=1, **published):
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    return Context(None, None, position, layer, depth, published)


def build(module, seed, ctx):
    """Parameters that are all moved from where they start, and x."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    params = nn.unbox(jax.jit(lambda key: module.init(key, x, None, ctx))(jax.random.key(seed)))
    moved = jax.tree.map(lambda a: a + 0.4 * rng.normal(size=a.shape).astype(np.float32), params)
    return moved["params"], x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def before(x):
    return np.concatenate([np.zeros((B, 1, D)), x[:, :-1]], axis=1)


def weights(params):
    """float64, kernels as matrices [in, D or hidden]."""
    w = jax.tree.map(np.float64, params)
    return {
        name: leaf["kernel"].reshape(-1, D if name == "output" else leaf["kernel"][0].size)
        if isinstance(leaf, dict)
        else leaf
        for name, leaf in w.items()
    }


def test_rwkv4_is_its_papers_layer():
    module = registry.get("rwkv4").mixer(dim=D, heads=2)
    params, x = build(module, 0, context())
    y, state, _ = jax.jit(module.apply)({"params": params}, x, None, context())
    w, x = weights(params), np.float64(x)
    xk, xv, xr = (w[f"mix_{n}"] * x + (1 - w[f"mix_{n}"]) * before(x) for n in "kvr")
    k, v, r = xk @ w["key"], xv @ w["value"], xr @ w["receptance"]
    a, b, answers = np.zeros((B, D)), np.zeros((B, D)), []
    for t in range(T):
        own = np.exp(w["time_first"] + k[:, t])
        answers.append((a + own * v[:, t]) / (b + own))
        fade = np.exp(-np.exp(w["time_decay"]))
        a, b = fade * a + np.exp(k[:, t]) * v[:, t], fade * b + np.exp(k[:, t])
    expected = (sigmoid(r) * np.stack(answers, 1)) @ w["output"]
    assert distance(y, expected) < 1e-5
    assert distance(state["shift"][:, 0], x[:, -1]) < 1e-6


def layer_of_rwkv7(w, x, heads, first=None):
    """TimeMix in the letters of arXiv 2503.14456, state [V, K], row vectors; (out, values)."""
    size = D // heads
    split = lambda a: a.reshape(*a.shape[:-1], heads, size)  # noqa: E731
    mixed = {n: x + (before(x) - x) * w[f"mix_{n}"] for n in "rkvwag"}
    r, k, v = mixed["r"] @ w["receptance"], mixed["k"] @ w["key"], mixed["v"] @ w["value"]
    low = lambda n, f=lambda a: a: f(mixed[n] @ w[f"{n}_first"]) @ w[f"{n}_second"]  # noqa: E731
    decay = np.exp(-np.exp(-0.5) * sigmoid(w["w0"] + low("w", np.tanh)))
    rate = sigmoid(w["a0"] + low("a"))
    if first is not None:
        v = v + (first - v) * sigmoid(w["v0"] + low("v"))
    kappa = split(k * w["k_k"])
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    k = k * (1 + (rate - 1) * w["k_a"])
    r, k, vs, decay, rate = map(split, (r, k, v, decay, rate))
    state, answers = np.zeros((B, heads, size, size)), []
    for t in range(T):
        erase = np.einsum("bhi,bhj->bhij", kappa[:, t], rate[:, t] * kappa[:, t])
        transition = np.einsum("bhi,ij->bhij", decay[:, t], np.eye(size)) - erase
        state = state @ transition + np.einsum("bhv,bhk->bhvk", vs[:, t], k[:, t])
        answers.append(np.einsum("bhvk,bhk->bhv", state, r[:, t]))
    y = np.stack(answers, 1)
    y = y - y.mean(-1, keepdims=True)
    y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + 64e-5)).reshape(B, T, D)
    y = y * w["norm_scale"] + w["norm_bias"]
    bonus = (r * k * split(w["r_k"])).sum(-1, keepdims=True) * vs
    gate = low("g", sigmoid)
    return ((y + bonus.reshape(B, T, D)) * gate) @ w["output"], v


@pytest.mark.parametrize("later", [False, True])
def test_rwkv7_is_its_papers_layer(later):
    """Also as a later layer, which mixes the first one's values into its own."""
    module = registry.get("rwkv7").mixer(dim=D, heads=2, ranks=(3, 4, 5, 6))
    first = np.random.default_rng(9).normal(size=(B, T, D))
    shape = module.published(B, T, False)["rwkv7_value"].shape
    published = jnp.asarray(later), jnp.asarray(first.reshape(shape), jnp.float32)
    ctx = context(rwkv7_value=published)
    params, x = build(module, 1, ctx)
    y, _, ctx = jax.jit(module.apply)({"params": params}, x, None, ctx)
    expected, values = layer_of_rwkv7(weights(params), np.float64(x), 2, first if later else None)
    assert distance(y, expected) < 1e-5
    known, given = ctx.published["rwkv7_value"]
    assert bool(known)
    assert distance(given.reshape(B, T, D), first if later else values) < 1e-6


def test_rwkv7_transitions_have_eigenvalues_between_w_minus_1_and_1():
    module = registry.get("rwkv7").mixer(dim=D, heads=2)
    params, x = build(module, 2, context())
    take = functools.partial(module.apply, method="inputs")
    xs = jax.jit(lambda p: take({"params": p}, x, {}, context())[0])(params)
    w = np.exp(np.float64(xs.g))
    assert (w > np.exp(-np.exp(-0.5))).all() and (w < 1).all()
    assert distance(np.linalg.norm(xs.a, axis=-1), np.ones((B, T, 2))) < 1e-6
    transition = np.einsum("...i,ij->...ij", w, np.eye(4))
    transition = transition + np.einsum("...i,...j->...ij", np.float64(xs.b), np.float64(xs.a))
    values = np.linalg.eigvals(transition)
    assert np.abs(values.imag).max() < 1e-7
    assert (values.real > w.min(-1, keepdims=True) - 1).all() and (values.real < 1).all()


def test_rwkv7_transitions_may_grow_together():
    """As the docstring says: rates that differ between channels, two tokens in turn."""
    keys, rates = np.array([[0.5, 0.75**0.5], [0.75**0.5, 0.5]]), np.eye(2)
    first, second = (np.eye(2) - np.outer(a * k, k) for k, a in zip(keys, rates, strict=True))
    assert abs(np.linalg.eigvals(second @ first)).max() == pytest.approx(1.23, abs=0.005)
    even = [np.eye(2) - 0.7 * np.outer(k, k) for k in keys]
    assert np.linalg.norm(even[1] @ even[0], 2) <= 1


@pytest.mark.parametrize("name", ["rwkv4_channel", "rwkv7_channel"])
def test_channel_mixers_are_their_papers(name):
    module = registry.channel(name).mixer(dim=D, hidden=12)
    params, x = build(module, 3, context())
    y, state, _ = jax.jit(module.apply)({"params": params}, x, None, context())
    w, x = jax.tree.map(np.float64, params), np.float64(x)
    if name == "rwkv4_channel":
        xk, xr = (w[f"mix_{n}"] * x + (1 - w[f"mix_{n}"]) * before(x) for n in "kr")
        gate = sigmoid(xr @ w["receptance"]["kernel"])
    else:
        xk, gate = x + (before(x) - x) * w["mix_k"], 1.0
    hidden = np.maximum(xk @ w["key"]["kernel"], 0) ** 2
    assert distance(y, gate * (hidden @ w["value"]["kernel"])) < 1e-5
    assert distance(state[:, 0], x[:, -1]) < 1e-6


# ---------------------------------------------------------------- initialisation


def initial(name, repeats):
    layers, channel = ((((name,)), repeats),), f"{name}_channel"
    config = ModelConfig(
        vocab=5, dim=16, layers=layers, channel=channel, mixers={name: dict(heads=2)}
    )
    params = jax.jit(functools.partial(init_params, LanguageModel(config)))(jax.random.key(0))
    return jax.tree.map(np.asarray, nn.unbox(params)["stack"]["group_0"]["layer_0"])


def test_initial_weights_follow_layer_and_channel():
    """Layers inside a scan too: layer 1 of 3 has l / (L - 1) = 1/2 and 1 - l / L = 2/3."""
    i = np.arange(16)
    mixer = initial("rwkv4", 3)["mixer"]
    assert distance(mixer["time_decay"][1], -5 + 8 * (i / 15) ** (0.7 + 1.3 / 2)) < 1e-6
    assert distance(mixer["time_first"][1], np.log(0.3) + 0.5 * ((i + 1) % 3 - 1)) < 1e-6
    assert distance(mixer["mix_v"][1], (i / 16) ** (2 / 3) + 0.15) < 1e-6
    assert not mixer["output"]["kernel"].any() and mixer["value"]["kernel"].any()
    both = initial("rwkv7", 3)
    mixer = both["mixer"]
    z = (i % 8 - 3.5) / 3.5
    decay = -6 + 6 * (i / 15) ** (1 + 0.5**0.3) + 0.5 + 2.5 * z * np.abs(z)
    assert distance(mixer["w0"][1], decay) < 1e-6
    assert distance(mixer["mix_k"][1], 1 - (i / 16) ** (0.7 * 2 / 3)) < 1e-6
    assert distance(mixer["norm_scale"][1], np.full(16, (2 / 3) ** 0.7)) < 1e-6
    assert distance(both["channel"]["mix_k"][1], 1 - (i / 16) ** ((2 / 3) ** 4)) < 1e-6
    hidden = initial("rwkv4", 1)["channel"]["key"]["kernel"]  # wider than the input: gain > 1
    wide = hidden.shape[1] / hidden.shape[0]
    assert distance(hidden @ hidden.T, wide * np.eye(len(hidden))) < 1e-5
    assert np.abs(mixer["key"]["kernel"]).max() <= 0.05 / 4 < np.abs(mixer["value"]["kernel"]).max()


@pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])
def test_a_single_layer_starts_finite(name):
    for leaf in jax.tree.leaves(initial(name, 1)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (32, 32)])
def test_orthogonal(shape):
    draw = jax.jit(lambda key: orthogonal(2.0)(key, shape, jnp.float32))
    matrix = np.float64(draw(jax.random.key(0)))
    gram = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
    assert distance(gram, 4 * np.eye(min(shape))) < 1e-5
