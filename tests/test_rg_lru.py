"""RG-LRU: what its paper promises of the recurrence and of the layer's start; `linear_scan`."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

import memjax
from memjax.cells.rg_lru import RGLRU, Inputs, RGLRUMixer
from memjax.recurrence import linear_scan, running

FORMS = ("scan", "chunked")


def outputs(form, x, g):
    """y [T, V] of one sequence from its start."""
    xs = Inputs(*(np.asarray(a, np.float32)[None, :, None] for a in (x, g)))
    return contract.values(RGLRU(x.shape[1]), form, contract.Given({}, xs))[0][0, :, 0]


@pytest.mark.parametrize("form", FORMS)
def test_independent_inputs_of_variance_one_keep_it(form):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 64))
    for decay in (0.1, 0.9, 0.99):
        y = outputs(form, x, np.full(x.shape, np.log(decay)))
        # 64 channels with about 500 (1 - a) / (1 + a) independent squares each; five deviations
        number = 64 * max(1, 500 * (1 - decay) / (1 + decay))
        assert abs(np.mean(y[500:].astype(np.float64) ** 2) - 1) < 5 * (2 / number) ** 0.5


@pytest.mark.parametrize("form", FORMS)
def test_the_first_token_is_taken_whole_and_no_decay_copies(form):
    x = np.random.default_rng(0).normal(size=(9, 4))
    y = outputs(form, x, np.zeros(x.shape))
    assert np.array_equal(y, np.broadcast_to(np.float32(x[0]), y.shape))


def test_the_slope_of_the_root_is_bounded():
    def answer(g):
        xs = Inputs(jnp.ones((1, 2, 1, 1)), jnp.full((1, 2, 1, 1), g))
        return memjax.run(RGLRU(1), {}, xs, implementation="scan")[0][0, 1, 0, 0]

    for g in (0.0, -1e-12, -1e-9):  # 1 - a^2 below 1 / (4 1000^2): 1000 times the slope of 1 - a^2
        assert abs(float(jax.grad(answer)(g)) - (1 - 2000)) < 0.01
    slope = float(jax.grad(answer)(-0.5))
    a = np.exp(-0.5)
    assert abs(slope - (a - a**2 / np.sqrt(1 - a**2))) < 1e-5


def test_decays_start_between_the_authors_limits():
    mixer = RGLRUMixer(dim=256, convolution=0)
    ctx = memjax.nn.layers.Context(None, None, jnp.zeros((1, 2), jnp.int32))
    x = jnp.zeros((1, 2, 256))
    params = mixer.init(jax.random.key(0), x, None, ctx)["params"]
    first = np.exp(-np.logaddexp(0, np.float64(params["Lambda"].value)))  # a^(1/8) at r = 1
    assert 0.9 <= first.min() < 0.91 and 0.99 < first.max() <= 0.999
    g = mixer.apply({"params": params}, x, {}, ctx, method="inputs")[0].g
    assert distance(np.exp(np.asarray(g[0, 0])), first**4) < 1e-6  # r = 1/2


SIZES = [(1, None), (7, None), (16, 4), (23, 5), (4, 9)]


@pytest.mark.parametrize(("length", "size"), SIZES)
def test_running_is_a_loop(length, size):
    """Of matrices, whose product does not commute."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(length, 3, 2, 2)).astype(np.float32)
    first = rng.normal(size=(3, 2, 2)).astype(np.float32)

    def after(earlier, later):
        return jnp.einsum("...ij,...jk->...ik", later, earlier)

    expected, product = [], np.float64(first)
    for row in rows:
        product = np.float64(row) @ product
        expected.append(product)
    assert distance(running(after, after, first, rows, size), np.stack(expected)) < 1e-5


@pytest.mark.parametrize(("length", "size"), SIZES)
def test_linear_scan_and_its_slopes(length, size):
    """Against autodiff of a plain scan in float64, decays of 0 and 1 among them."""
    rng = np.random.default_rng(0)
    decay = rng.choice([0.0, 0.5, 0.9, 1.0], size=(length, 3))
    added, first, weights = (rng.normal(size=s) for s in ((length, 3), (3,), (length, 3)))

    def plain(decay, added, first):
        def step(h, x):
            h = x[0] * h + x[1]
            return h, h

        return jax.lax.scan(step, first, (decay, added))[1]

    def fast(decay, added, first):
        return linear_scan(decay, added, first, size)

    def slopes(form, *given):
        return jax.grad(lambda *given: jnp.sum(weights * form(*given)), (0, 1, 2))(*given)

    given = decay, added, first
    with contract.x64(True):
        value, expected = (
            (f(*given), *jax.jit(slopes, static_argnums=0)(f, *given)) for f in (fast, plain)
        )
        for a, b in zip(value, expected, strict=True):
            assert distance(a, b) < 1e-12
