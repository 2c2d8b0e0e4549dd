"""Untrained memories against closed forms, in every form that is plain JAX, over several seeds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax import cells, workload
from memjax.cells.delta_net import DeltaNet
from memjax.cells.delta_product import DeltaProduct
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.gated_kalmanet import GatedKalmaNet
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.simple_gla import SimpleGLA
from memjax.cells.sliding_window import SlidingWindow
from memjax.cells.titans import Titans
from memjax.probes import laws, pairs
from memjax.wrappers.memory_caching import MemoryCaching
from memjax.wrappers.mixture_of_memories import MixtureOfMemories

SEEDS = 24
DIM = 32
FORMS = ("scan", "chunked")
SLOWER = ("scan", pytest.param("chunked", marks=pytest.mark.slow))
GROUPED_BY = "form"  # tests of one form share what is compiled


def drawn(seeds, number, dim=DIM, seed=0):
    """Keys and values [seeds, number, dim]."""
    rng = np.random.default_rng(seed)
    return pairs.unit(rng, seeds, number, dim), pairs.unit(rng, seeds, number, dim)


def answers(cell, form, keys, values, asked=None, **settings):
    """What a memory answers, in float64, to `asked` (the stored keys) after all pairs."""
    params = cell.init_params(jax.random.key(0), 1)
    stored = pairs.tokens(cell, keys, values, **settings)
    asked = stored if asked is None else pairs.tokens(cell, asked, np.zeros_like(asked))
    call = functools.partial(pairs.recall, cell, implementation=form)
    y = np.asarray(jax.jit(call)(params, stored, asked)[0], np.float64)
    assert np.isfinite(y).all()
    return y


def squared(y, values):
    """||answer - value||^2, [seeds, items]."""
    return np.square(y - values).sum(axis=-1)


def close(measured, theory):
    """|mean - theory| <= max(3 % of it, 3 standard errors); measured: [seeds, items], theory a
    number or for each item."""
    means = measured.mean(axis=1)
    expected = float(np.mean(np.broadcast_to(theory, measured.shape[1])))
    bound = max(0.03 * expected, 3 * means.std(ddof=1) / len(means) ** 0.5)
    assert abs(means.mean() - expected) <= bound, (means.mean(), expected, bound)


def named(y, values, candidates):
    """Share of the answers [seeds, items, V] nearest in angle to their own value, among all values
    of the seed and common candidates [n, V]."""
    own = np.einsum("siv,siv->si", y, values)
    best = np.maximum(np.einsum("siv,sjv->sij", y, values).max(axis=-1), (y @ candidates.T).max(-1))
    return np.mean(own >= best - 1e-9)


def ages(number):
    return np.arange(number)[::-1]


ADDERS = {
    "linear_attention": LinearAttention(DIM, DIM, scale=1.0),
    "simple_gla": SimpleGLA(DIM, DIM, scale=1.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [16, 128])
def test_a_sum_of_pairs(form, number):
    keys, values = drawn(SEEDS, number)
    y = answers(ADDERS["linear_attention"], form, keys, values)
    close(squared(y, values), laws.hebbian_error(number, DIM))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.9, 0.99])
def test_decay(form, keep):
    keys, values = drawn(8 * SEEDS, 128)  # one age is one item of a seed
    error = squared(answers(ADDERS["simple_gla"], form, keys, values, keep=keep), values)
    close(error, laws.decay_error(keep, 128, ages(128), DIM))
    for age in (0, 20):
        close(error[:, [127 - age]], laws.decay_error(keep, 128, age, DIM))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("number", [16, 128])
def test_delta_rule(form, beta, number):
    keys, values = drawn(SEEDS, number)
    cell = DeltaNet(DIM, DIM, scale=1.0)
    y = answers(cell, form, keys, values, strength=beta)
    close(squared(y, values), laws.delta_error(beta, number, ages(number), DIM))
    signal = np.einsum("siv,siv->si", y, values)
    close(signal, laws.delta_signal(beta, ages(number), DIM))
    basis = np.broadcast_to(np.eye(DIM, dtype=np.float32), (SEEDS, DIM, DIM))
    memory = answers(cell, form, keys, values, basis, strength=beta)
    close(np.square(memory).sum(axis=(1, 2))[:, None], laws.delta_square(beta, number, DIM))


DELTAS = ("comba", "delta_product", "dplr", "gated_delta_net", "kda", "rwkv7")
SUMS = ("gla", "mamba2", "retnet", "simple_gla")


@pytest.mark.parametrize("form", SLOWER)
@pytest.mark.parametrize(
    ("names", "plainest"), [(DELTAS, DeltaNet(8, 6)), (SUMS, LinearAttention(8, 6))]
)
def test_plain_inputs_make_one_rule_of_a_family(form, names, plainest):
    """Without decay and with strength 1 every cell answers as the plainest one of its family."""
    rng = np.random.default_rng(0)
    keys, values = pairs.unit(rng, 2, 24, 8), pairs.unit(rng, 2, 24, 6)
    expected = answers(plainest, form, keys, values)
    for name in names:
        cell = cells.get(name).cell()
        y = answers(cell, form, keys, values) * plainest.factor / cell.factor
        np.testing.assert_allclose(y, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("form", SLOWER)
def test_a_learner_that_takes_one_step_per_pair_is_the_delta_rule(form):
    """A matrix from zero, chunks of one token, no momentum: step 2 theta = beta."""
    keys, values = drawn(2, 48)
    cell = Titans(DIM, DIM, frozen_chunk=1, std=0.0)
    y = answers(cell, form, keys, values, theta=np.full(keys.shape[:2], 0.25, np.float32))
    expected = answers(DeltaNet(DIM, DIM, scale=1.0), form, keys, values, strength=0.5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("form", SLOWER)
def test_orthogonal_keys_are_exact(form):
    values = drawn(2, DIM)[1]
    keys = np.linalg.qr(np.random.default_rng(1).normal(size=(2, DIM, DIM)))[0].astype(np.float32)
    for cell in (DeltaNet(DIM, DIM, scale=1.0), ADDERS["linear_attention"]):
        assert squared(answers(cell, form, keys, values), values).max() < 1e-4


def test_what_is_named_right():
    """Top-1 with 4096 more candidates, d = 64: near the predicted numbers half is right; in squared
    error the delta rule wins at every N, in top-1 it loses to the sum as soon as N > d."""
    dim, more = 64, pairs.unit(np.random.default_rng(9), 4096, 64)
    half = laws.hebbian_half(dim, dim, 4096 + 256)
    assert 240 < half < 250
    rules = {"sum": LinearAttention(dim, dim, scale=1.0), "delta": DeltaNet(dim, dim, scale=1.0)}
    right, error = {}, {}
    for number in (32, 128, round(half)):
        keys, values = drawn(4, number, dim)
        for rule, cell in rules.items():
            y = answers(cell, "chunked", keys, values)
            right[rule, number] = named(y, values, more)
            error[rule, number] = squared(y, values).mean()
            recent = round(laws.delta_half(dim, dim, 4096 + number))
            if rule == "delta" and number > 2 * recent:
                assert 45 < recent < 55
                assert named(y[:, -recent // 2 :], values[:, -recent // 2 :], more) > 0.75
                assert named(y[:, : -2 * recent], values[:, : -2 * recent], more) < 0.25
    assert right["sum", 128] > 0.9 and 0.4 < right["sum", round(half)] < 0.65
    for number in (32, 128, round(half)):
        assert error["delta", number] < error["sum", number]
    assert right["delta", 32] > 0.95 and right["delta", 128] < right["sum", 128] - 0.3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [16, 64])
def test_ridge(form, number):
    """Gated KalmaNet with a ridge that hardly counts and enough steps of its solver: with s^2 =
    (1 + a) / a the relative error is 2 ((s - 1) / (s + 1))^301 < 1e-8 for a = 1e-3."""
    keys, values = drawn(SEEDS, number)
    cell = GatedKalmaNet(DIM, DIM, ridge=1e-3, iterations=300)
    error = squared(answers(cell, form, keys, values) * DIM**0.5, values)
    if number > DIM:
        close(error, laws.ridge_error(number, DIM))
        return
    # what the ridge leaves, (r / (s + r))^2 for each eigenvalue s > 0 of K K^T
    gram = np.einsum("sid,sjd->sij", keys, keys, dtype=np.float64)
    spectrum = np.linalg.eigvalsh(gram)
    ridge = cell.ridge * np.linalg.norm(gram, axis=(1, 2))[:, None]
    left = np.square(ridge / (spectrum + ridge)).mean()
    assert laws.ridge_error(number, DIM) == 0 and left < 5e-3
    assert error.mean() < 1.5 * left + 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_overwrite(form):
    """Every key bound twice, the last value asked for. Sums and least squares without forgetting
    cannot tell the last from the first; delta rules and decays can."""
    number = 16
    keys, values = drawn(SEEDS, 2 * number)
    keys[:, number:] = keys[:, :number]
    new = values[:, number:]

    def last(cell, **settings):
        return answers(cell, form, keys, values, keys[:, number:], **settings)

    twice = ADDERS["linear_attention"]
    close(squared(last(twice), new), laws.overwritten_hebbian_error(number, DIM))
    faded = last(ADDERS["simple_gla"], keep=0.95)
    close(squared(faded, new), laws.overwritten_decay_error(0.95, number, ages(number), DIM))
    ridge = last(GatedKalmaNet(DIM, DIM, ridge=1e-4, iterations=600)) * DIM**0.5
    close(squared(ridge, new), laws.OVERWRITTEN_RIDGE_ERROR)
    delta = last(DeltaNet(DIM, DIM, scale=1.0))
    gap = squared(ridge, new).mean(axis=1) - squared(delta, new).mean(axis=1)
    assert gap.mean() > 3 * gap.std(ddof=1) / SEEDS**0.5
    old = values[:, :number]
    newer = {
        name: np.mean(squared(y, new) < squared(y, old))
        for name, y in (("sum", last(twice)), ("ridge", ridge), ("delta", delta))
    }
    chance = 3 * 0.5 / (SEEDS * number) ** 0.5  # three standard deviations of a fair coin
    assert abs(newer["sum"] - 0.5) < chance and abs(newer["ridge"] - 0.5) < chance
    assert newer["delta"] > 0.95


@pytest.mark.parametrize("form", SLOWER)
def test_the_square_of_the_product(form):
    """The features k k^T, whose products are (k . k')^2, in linear attention."""
    dim, number = 16, 64
    rng = np.random.default_rng(0)
    keys, values = pairs.unit(rng, SEEDS, number, dim), pairs.unit(rng, SEEDS, number, DIM)
    features = (keys[..., :, None] * keys[..., None, :]).reshape(SEEDS, number, dim * dim)
    y = answers(LinearAttention(dim * dim, DIM, scale=1.0), form, features, values)
    close(squared(y, values), laws.square_error(number, dim))


@pytest.mark.parametrize("form", SLOWER)
def test_softmax_with_a_sharp_temperature_is_exact(form):
    """At inverse temperature b the other pairs have the weight w <= sum exp(b (k . k' - 1)), and
    the error is below (2 w)^2 (Ramsauer et al. 2020, arXiv 2008.02217)."""
    dim, number, sharp = 64, 256, 32.0
    keys, values = drawn(2, number, dim)
    cell = SlidingWindow(dim, dim, window=2 * number, scale=sharp)
    error = squared(answers(cell, form, keys, values), values)
    products = np.einsum("sid,sjd->sij", keys, keys, dtype=np.float64)
    products[:, np.arange(number), np.arange(number)] = -np.inf
    others = np.exp(sharp * (products - 1)).sum(axis=-1)
    assert (error <= np.square(2 * others) + 1e-10).all() and error.mean() < 1e-4


@pytest.mark.parametrize("form", SLOWER)
def test_segments_with_an_oracle(form):
    """Memory Caching whose gate, and a mixture of memories whose router, know where a pair is."""
    number, segments, inner = 128, 4, LinearAttention(DIM, DIM, scale=1.0)
    keys, values = drawn(SEEDS, number)
    theory = laws.hebbian_error(number / segments, DIM)
    where = np.arange(number) // (number // segments)
    router = np.broadcast_to(np.eye(segments, dtype=np.float32)[where], (SEEDS, number, segments))
    mixture = MixtureOfMemories(inner, number=segments)
    close(squared(answers(mixture, form, keys, values, gates=router), values), theory)
    # a segment's score is u . (mean of its keys), here far above the others'
    means = keys.reshape(SEEDS, segments, -1, DIM).mean(axis=2)
    oracle = 1e6 * means[:, where]
    cached = MemoryCaching(inner, segment=number // segments, slots=segments, start="independent")
    close(squared(answers(cached, form, keys, values, ask=oracle), values), theory)


@pytest.mark.parametrize("form", SLOWER)
def test_parity(form):
    """k = 1, beta = 2 for a one: each flips the sign of a state of 1 (Grazzi et al. 2024, arXiv
    2411.12537); with beta = 1 it is erased."""
    bits = np.random.default_rng(0).integers(0, 2, (2, 4096)).astype(np.float32)
    one = np.ones((2, 4096, 1, 1), np.float32)
    cell = DeltaNet(1, 1, scale=1.0)
    state = np.ones((2, 1, 1, 1), np.float32)

    def run(rate):
        xs = cell.inputs(one, one, 0 * one, rate * bits[..., None])
        return np.asarray(memjax.run(cell, {}, xs, state=state, implementation=form)[0])[..., 0, 0]

    np.testing.assert_array_equal(run(2.0), 1 - 2 * (np.cumsum(bits, axis=1) % 2))
    assert (run(1.0)[:, 64:] == 0).all()


def reflections(permutation):
    """Transpositions whose product it is, at most 4 for 5 elements."""
    left, found = list(permutation), []
    for i in range(len(left)):
        while left[i] != i:
            j = left[i]
            left[i], left[j] = left[j], left[i]
            found.append((i, j))
    return found[::-1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", SLOWER)
def test_permutations_of_five(form, dtype):
    """Each element of S5 is at most 4 transpositions, each a Householder matrix with k = (e_i -
    e_j) / sqrt(2), beta = 2 (Siems et al. 2025, arXiv 2502.10297): all prefixes of a word are
    right. In bfloat16 ||k||^2 is 1 - 2e-4, and what is told shrinks by 4e-4 a transposition."""
    elements = list(itertools.permutations(range(5)))
    word = np.random.default_rng(0).integers(0, 120, 2000)
    k = np.zeros((1, len(word), 1, 4, 5), np.float32)
    k[..., 0] = 1.0
    beta = np.zeros(k.shape[:-1], np.float32)
    expected, product = [], np.arange(5)
    for t, index in enumerate(word):
        for step, (i, j) in enumerate(reflections(elements[index])):
            k[0, t, 0, step] = (np.eye(5)[i] - np.eye(5)[j]) / 2**0.5
            beta[0, t, 0, step] = 2
            product = np.where(product == i, j, np.where(product == j, i, product))
        expected.append(product)
    cell = DeltaProduct(5, 5, scale=1.0, steps=4)
    asked = np.broadcast_to(np.arange(1.0, 6.0, dtype=np.float32), (1, len(word), 1, 5))
    xs = cell.inputs(asked, k, 0 * k, beta, np.zeros((1, len(word), 1), np.float32))
    xs = jax.tree.map(lambda a: jnp.asarray(a, dtype), xs)
    state = np.eye(5, dtype=np.float32)[None, None]
    y = memjax.run(cell, {}, xs, state=state, implementation=form)[0]
    y = np.asarray(y, np.float64)[0, :, 0]
    assert np.isfinite(y).all()
    # S^T q holds q at place `product[x]` of x for every x; S began as the identity
    wanted = np.array(expected) + 1.0
    if dtype == jnp.float32:
        # 8000 reflections that each round 5 to 5 * 2^-24 could add up to 2.4e-3
        np.testing.assert_allclose(y, wanted, atol=1e-3)
    else:
        assert np.abs(y[-1] - wanted[-1]).max() > 0.5


@pytest.mark.slow
def test_every_cell_stores_a_plain_pair():
    """An empty memory answers a pair that it was given alone with something of its value."""
    for name in cells.names():
        cell = workload.make_cell(cells.get(name), workload.Shape(dim=8))
        keys, values = drawn(64, 1, dim=8)
        pair, params = pairs.tokens(cell, keys, values), cell.init_params(jax.random.key(0), 1)
        assert pairs.gain(cell, params, pair, values) > 0.01, name


def test_gated_delta_net_is_tested_with_what_it_forgets():
    """`keep` reaches decays and nothing else."""
    keys = np.ones((1, 3, 4), np.float32)
    xs = pairs.tokens(GatedDeltaNet(4, 4), keys, keys, keep=0.5, strength=0.25)
    assert np.allclose(xs.g, np.log(0.5)) and np.allclose(xs.beta, 0.25)
