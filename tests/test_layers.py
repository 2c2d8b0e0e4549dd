"""The layers that mixers are made of, against numpy and against what their papers say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

from memjax.nn import layers
from memjax.nn.block import GeGLU, SwiGLU
from memjax.nn.layers import Context

pytestmark = pytest.mark.usefixtures("exact_products")
KEY = jax.random.key(0)


def context(shape, reset=None, write=None):
    return Context(reset, write, jnp.zeros(shape, jnp.int32))


def run(module, *arguments):
    """(output, unboxed parameters) of a freshly initialised module."""
    params = nn.unbox(module.init(KEY, *arguments)["params"])
    return module.apply({"params": params}, *arguments), params


def convolve(x, tail, reset, write, kernel, bias):
    """The short convolution of one sequence in a loop: (y, tail)."""
    past, answers = [*tail], []
    for t in range(len(x)):
        if reset[t]:
            past = [np.zeros_like(a) for a in past]
        seen = [x[t], *past[::-1]]
        answers.append(sum(w * a for w, a in zip(kernel, seen, strict=True)) + bias)
        if write[t]:
            past = [*past[1:], x[t]] if past else []
    return np.array(answers), np.array(past).reshape(tail.shape)


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_short_convolution_equals_a_loop(width, length):
    rng, batch, dim = np.random.default_rng(width), 3, 4
    x = rng.normal(size=(batch, length, dim)).astype(np.float32)
    tail = rng.normal(size=(batch, width - 1, dim)).astype(np.float32)
    reset, write = rng.random((2, batch, length)) < np.array([0.2, 0.7])[:, None, None]
    module = layers.ShortConvolution(width, activation=None, bias=True)
    (y, new), params = run(module, x, tail, context((batch, length), reset, write))
    for row in range(batch):
        masks = reset[row], write[row]
        expected = convolve(x[row], tail[row], *masks, params["kernel"], params["bias"])
        assert distance(y[row], expected[0]) <= 1e-6
        assert np.array_equal(new[row], expected[1])
    kernel = np.asarray(params["kernel"])
    assert kernel.shape == (width, dim) and np.abs(kernel).max() <= width**-0.5


def test_short_convolution_without_masks_and_state():
    x = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)
    (y, tail), params = run(layers.ShortConvolution(4), x, None, context((2, 9)))
    none, zeros = np.zeros(9, bool), np.zeros((3, 5), np.float32)
    for row in range(2):
        linear, last = convolve(x[row], zeros, none, ~none, params["kernel"], 0)
        assert distance(y[row], linear / (1 + np.exp(-linear))) <= 1e-6
        assert np.array_equal(tail[row], last)


def test_rotary_depends_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 2, 8)).astype(np.float32)
    at = lambda a, p: np.asarray(layers.rotary(a, np.array([[p]], np.int32)))  # noqa: E731
    assert np.array_equal(at(q, 0), q)
    for distance_ in (0, 1, 7):
        products = [np.sum(at(q, p + distance_) * at(k, p), axis=-1) for p in (0, 3, 50)]
        np.testing.assert_allclose(products[1:], [products[0]] * 2, atol=2e-5)
    assert not np.allclose(np.sum(at(q, 1) * k, -1), np.sum(at(q, 2) * k, -1), atol=1e-3)
    assert distance(np.linalg.norm(at(q, 9), axis=-1), np.linalg.norm(q, axis=-1)) <= 1e-6


def test_rotary_rotates_pairs_by_the_published_angles():
    x = np.random.default_rng(1).normal(size=(2, 3, 2, 6)).astype(np.float32)
    position = np.array([[0, 5, 100], [1, 2, 3]], np.int32)
    y = np.asarray(layers.rotary(x, position, 100.0))
    for i in range(3):  # theta_i = base^(-2i / K), arXiv 2104.09864, Eq. 15
        turn = np.exp(1j * position * 100.0 ** (-2 * i / 6))[:, :, None]
        expected = (x[..., i] + 1j * x[..., i + 3]) * turn
        assert distance(y[..., i] + 0.0, expected.real) <= 1e-5
        assert distance(y[..., i + 3], expected.imag) <= 1e-5
    grouped = layers.rotary(x[:, :, :, None], position, 100.0)
    assert np.array_equal(grouped[:, :, :, 0], y)
    with pytest.raises(ValueError, match="rotary needs an even head dimension; given 5"):
        layers.rotary(x[..., :5], position)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_equals_numpy(kind):
    rng = np.random.default_rng(0)
    x = (3 + 2 * rng.normal(size=(2, 5, 8))).astype(np.float32)
    module = layers.Norm(kind)
    params = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype(np.float32),
        nn.unbox(module.init(KEY, x)["params"]),
    )
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True) * (kind == "layer")
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * params["scale"] + params.get("bias", 0)
    assert distance(module.apply({"params": params}, x), expected) <= 1e-6
    narrow = module.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    assert distance(narrow, expected) <= 2 * 2**-8  # the input and the output are rounded
    assert set(params) == ({"scale", "bias"} if kind == "layer" else {"scale"})
    with pytest.raises(ValueError, match="norm 'l2': allowed are 'rms' and 'layer'"):
        layers.Norm("l2").init(KEY, x)


def test_norm_of_each_head():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    y, params = run(layers.Norm("rms", ("head_dim",)), x)
    assert params["scale"].shape == (5,)
    assert distance((np.asarray(y) ** 2).mean(-1), np.ones((2, 3, 4))) <= 1e-3


def test_l2_normalise():
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True) + 1e-6)
    assert distance(layers.l2_normalise(x), expected) <= 1e-6
    assert layers.l2_normalise(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    zero = np.zeros((2, 3), np.float32)
    assert not np.asarray(layers.l2_normalise(zero)).any()
    slope = jax.grad(lambda a: jnp.sum(layers.l2_normalise(a)))(zero)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_log_decay_starts_as_published(low):
    """A ~ U(low, 16), dt log-uniform in [1e-3, 1e-1]: Dao and Gu 2024, Yang et al. 2024."""
    heads = 4000
    x = np.zeros((1, 1, 2), np.float32)
    g, params = run(layers.LogDecay(heads, low=low), x)
    rate = np.exp(np.asarray(params["A_log"], np.float64))
    dt = np.logaddexp(0, np.asarray(params["dt_bias"], np.float64))
    assert max(low, 1e-4) * (1 - 1e-5) <= rate.min() and rate.max() <= 16 * (1 + 1e-5)
    assert 1e-3 * (1 - 1e-4) <= dt.min() and dt.max() <= 1e-1 * (1 + 1e-4)
    # the mean of n uniform draws is normal: five standard errors
    error = 5 * (16 - low) / np.sqrt(12 * heads)
    assert abs(rate.mean() - (16 + low) / 2) <= error
    assert abs(np.log(dt).mean() - np.log(1e-2)) <= 5 * np.log(100) / np.sqrt(12 * heads)
    assert g.dtype == jnp.float32 and g.shape == (1, 1, heads)
    assert distance(g[0, 0], -rate * dt) <= 1e-5


def test_log_decay_starts_with_a_half_life():
    x = np.zeros((1, 1, 2), np.float32)
    for half_life in (0.5, 64.0):
        g, _ = run(layers.LogDecay(3, half_life=half_life, channels=2, rank=1), x)
        assert distance(half_life * g[0, 0], np.full((3, 2), np.log(0.5))) <= 1e-5
    with pytest.raises(ValueError, match="half_life: tokens, or 0 .* given -1"):
        run(layers.LogDecay(3, half_life=-1.0), x)


def test_log_decay_reads_its_input():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    g, params = run(layers.LogDecay(4, std=1.0), x)
    dt = np.logaddexp(0, x @ np.asarray(params["dt"]["kernel"], np.float64) + params["dt_bias"])
    assert distance(g, -np.exp(params["A_log"]) * dt) <= 1e-6
    assert (np.asarray(g) <= 0).all()


def test_dense_contracts_the_named_axes():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    module = layers.Dense((6,), ("embed",), ("heads", "head_dim"), bias=True)
    boxed = module.init(KEY, x)["params"]
    assert boxed["kernel"].names == ("heads", "head_dim", "embed")
    assert boxed["bias"].names == ("embed",)
    y, params = run(module, x)
    assert distance(y, np.einsum("bthk,hkd->btd", x, params["kernel"])) <= 1e-6
    assert params["kernel"].dtype == jnp.float32 and not np.asarray(params["bias"]).any()
    narrow, params = run(layers.Dense((6,), ("mlp",), dtype=jnp.bfloat16), x)
    assert narrow.dtype == jnp.bfloat16 and params["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("kind", [SwiGLU, GeGLU])
def test_gated_mlps_equal_numpy(kind):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    ctx = context((2, 3))
    (y, state, same), params = run(kind(4, hidden=8, std=1.0), x, None, ctx)
    gate, up, down = (np.asarray(params[n]["kernel"], np.float64) for n in ("gate", "up", "down"))
    z = x @ gate
    gelu = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    hidden = (gelu if kind is GeGLU else z / (1 + np.exp(-z))) * (x @ up)
    assert distance(y, hidden @ down) <= 1e-6
    assert state is None and same is ctx
