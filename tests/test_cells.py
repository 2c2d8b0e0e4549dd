"""Laws of single cells and reductions from one cell to another."""

import dataclasses

import contract
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax.cells.attention import Attention, SlidingWindow
from memjax.cells.attention import Inputs as AttentionInputs
from memjax.cells.delta_net import DeltaNet
from memjax.cells.delta_net import Inputs as DeltaInputs
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.linear_attention import Inputs as LinearInputs
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.simple_gla import Inputs as DecayInputs
from memjax.cells.simple_gla import SimpleGLA

FORMS = pytest.mark.parametrize("form", ["scan", "chunked"])
MATRIX = (LinearAttention, SimpleGLA, DeltaNet, GatedDeltaNet)
LENGTH = 29


def case_of(cell):
    """The contract's case for a cell, whose fields say how inputs are drawn."""
    spec = next(c.spec for c in contract.cases() if type(c.cell) is type(cell))
    return contract.Case(spec.name, spec, cell)


def problem(kind, seed=0, **changes):
    return contract.problem(case_of(kind(8, 6, chunk=8)), seed, LENGTH, **changes)


def outputs(cell, form, given):
    return contract.named(contract.values(cell, form, given))


def assert_near(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        far = contract.distance(a[name], b[name])
        assert far < tolerance, f"{name}: {far}"


def memory_after(cell, form, given):
    """The matrix after the last token, [B, H, K, V]."""
    return contract.values(cell, form, given)[1]


# From one cell to another.


@FORMS
def test_gated_delta_net_without_decay_is_delta_net(form):
    given = problem(GatedDeltaNet)
    xs = given.xs._replace(g=np.zeros_like(given.xs.g))
    delta = given._replace(xs=DeltaInputs(*xs[:4]))
    gated = outputs(GatedDeltaNet(8, 6, chunk=8), form, given._replace(xs=xs))
    assert_near(gated, outputs(DeltaNet(8, 6, chunk=8), form, delta))


@FORMS
def test_gated_delta_net_that_erases_nothing_is_simple_gla(form):
    """Keys that are orthogonal to all that is stored leave only the write, beta k v^T."""
    case = case_of(GatedDeltaNet(32, 6, chunk=8))
    given = contract.problem(case, 0, LENGTH, state=False)
    basis = np.eye(32, dtype=np.float32)[None, :LENGTH, None]
    xs = given.xs._replace(k=np.broadcast_to(basis, given.xs.k.shape))
    plain = DecayInputs(xs.q, xs.k, xs.beta[..., None] * xs.v, xs.g)
    gated = outputs(case.cell, form, given._replace(xs=xs))
    assert_near(gated, outputs(SimpleGLA(32, 6, chunk=8), form, given._replace(xs=plain)))


@FORMS
def test_simple_gla_without_decay_is_linear_attention(form):
    given = problem(SimpleGLA)
    xs = given.xs._replace(g=np.zeros_like(given.xs.g))
    plain = given._replace(xs=LinearInputs(*xs[:3]))
    decayed = outputs(SimpleGLA(8, 6, chunk=8), form, given._replace(xs=xs))
    assert_near(decayed, outputs(LinearAttention(8, 6, chunk=8), form, plain))


@FORMS
def test_simple_gla_of_a_constant_decay_is_retention(form):
    """y_t = sum_s gamma^(t-s) (q_t . k_s) v_s, Sun et al. 2023, arXiv 2307.08621."""
    given = problem(SimpleGLA, state=False, masks=False)
    xs = given.xs._replace(g=np.full_like(given.xs.g, np.log(0.9)))
    y, _ = contract.values(SimpleGLA(8, 6, scale=1.0, chunk=8), form, given._replace(xs=xs))
    time = np.arange(LENGTH)
    decay = np.tril(0.9 ** np.maximum(time[:, None] - time, 0))
    scores = np.einsum("bthk,bshk->bhts", *np.float64((xs.q, xs.k))) * decay
    assert contract.distance(y, np.einsum("bhts,bshv->bthv", scores, np.float64(xs.v))) < 1e-5


@FORMS
def test_wide_window_is_attention(form):
    window, attention = SlidingWindow(8, 6, 40, block=8), Attention(8, 6, 40, block=8)
    given = contract.problem(case_of(attention), 0, LENGTH)
    contract.assert_identical(
        contract.values(window, form, given), contract.values(attention, form, given), form
    )


# Attention and linear attention against their quadratic forms, in numpy float64.


def softmax_attention(xs, visible):
    """Softmax over the keys that visible [T, T] allows; q [B, T, H, G, K]."""
    q, k, v = (np.float64(leaf) for leaf in xs)
    scores = np.einsum("bthgk,bshk->bhgts", q, k) * k.shape[-1] ** -0.5
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhgts,bshv->bthgv", weights, v)


@FORMS
@pytest.mark.parametrize("window", [1, 5, 8, 40])
def test_window_is_masked_softmax(form, window):
    """Grouped queries: `draw` gives two of them to each memory."""
    cell = SlidingWindow(8, 6, window, block=8)
    given = contract.problem(case_of(cell), 0, LENGTH, state=False, masks=False)
    given = given._replace(xs=AttentionInputs(*(3 * leaf for leaf in given.xs)))
    age = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    y, _ = contract.values(cell, form, given)
    assert contract.distance(y, softmax_attention(given.xs, (age >= 0) & (age < window))) < 1e-5


@FORMS
def test_large_scores_do_not_overflow(form):
    cell = SlidingWindow(8, 6, 5, block=8)
    given = contract.problem(case_of(cell), 0, LENGTH, state=False, masks=False)
    xs = given.xs._replace(q=1e4 * given.xs.q)
    age = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    y, _ = contract.values(cell, form, given._replace(xs=xs))
    expected = softmax_attention(xs, (age >= 0) & (age < 5))
    assert contract.distance(y, expected) < 1e-3  # scores of 1e4 are rounded to 1e-3


@FORMS
def test_ring_holds_the_last_written_tokens(form):
    cell = SlidingWindow(8, 6, 5, block=8)
    given = contract.problem(case_of(cell), 0, LENGTH, masks=False)
    state = memory_after(cell, form, given)
    last = np.arange(LENGTH - 5, LENGTH)
    slots = (given.state.written[..., None] + last) % 5
    for b, h in np.ndindex(*given.state.written.shape):
        assert np.array_equal(state.k[b, h][slots[b, h]], given.xs.k[b, last, h])
    assert np.array_equal(state.written, given.state.written + LENGTH)


@FORMS
def test_ring_is_stored_as_asked(form):
    cell = SlidingWindow(8, 6, 5, store_dtype=jnp.bfloat16, block=8)
    given = contract.problem(case_of(cell), 0, LENGTH)
    y, state = contract.values(cell, form, given)
    assert y.dtype == np.float32
    assert state.k.dtype == state.v.dtype == jnp.bfloat16 and state.written.dtype == np.int32
    rounded = contract.cast(contract.cast(given.xs, jnp.bfloat16), np.float32)
    wide = given._replace(
        xs=rounded._replace(q=given.xs.q), state=contract.cast(given.state, np.float32)
    )
    exact, _ = contract.values(dataclasses.replace(cell, store_dtype=jnp.float32), "scan", wide)
    assert contract.distance(y, exact) < 1e-5


@FORMS
def test_normalised_linear_attention_is_its_quadratic_form(form):
    cell = LinearAttention(8, 6, feature_map="elu_plus_one", normalise=True, chunk=8)
    given = contract.problem(case_of(cell), 0, LENGTH, state=False, masks=False)
    q, k, v = (np.float64(leaf) for leaf in given.xs)
    phi = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
    weights = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * np.tri(LENGTH)
    weights /= weights.sum(-1, keepdims=True)
    y, _ = contract.values(cell, form, given)
    assert contract.distance(y, np.einsum("bhts,bshv->bthv", weights, v)) < 1e-5


# The delta rule.


def delta_inputs(k, v, beta):
    """One sequence of one head from [T, K], [T, V] and a number; the queries are the keys."""
    lead = lambda a: np.asarray(a, np.float32)[None, :, None]  # noqa: E731
    beta = np.full(len(k), beta, np.float32)
    return contract.Given({}, DeltaInputs(lead(k), lead(k), lead(v), lead(beta)))


def unit_keys(rng, count, size=8):
    keys = rng.normal(size=(count, size))
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


@FORMS
def test_orthonormal_keys_are_stored_exactly(form):
    rng = np.random.default_rng(0)
    k, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    v = rng.normal(size=(8, 6))
    state = memory_after(DeltaNet(8, 6, chunk=4), form, delta_inputs(k, v, 1.0))
    assert contract.distance(k @ state[0, 0], v) < 1e-6


@FORMS
def test_strength_one_reads_back_what_was_written(form):
    """Right after the write, whatever was in the memory; a rewritten key has its newest value."""
    rng = np.random.default_rng(1)
    k, v = unit_keys(rng, 21), rng.normal(size=(21, 6))
    k[9] = k[3]
    y, _ = contract.values(DeltaNet(8, 6, scale=1.0, chunk=8), form, delta_inputs(k, v, 1.0))
    assert contract.distance(y[0, :, 0], v) < 1e-5


@FORMS
def test_strength_zero_changes_nothing(form):
    given = problem(DeltaNet, masks=False)
    given = given._replace(xs=given.xs._replace(beta=np.zeros_like(given.xs.beta)))
    assert np.array_equal(memory_after(DeltaNet(8, 6, chunk=8), form, given), given.state)


@FORMS
def test_strength_two_is_a_reflection(form):
    """With v = 0 the norm is kept, and the same key twice gives the state back."""
    given = problem(DeltaNet, masks=False)
    xs = given.xs._replace(v=0 * given.xs.v, beta=np.full_like(given.xs.beta, 2))
    cell = DeltaNet(8, 6, chunk=8)
    state = memory_after(cell, form, given._replace(xs=xs))
    norms = [np.linalg.norm(np.float64(s), axis=-2) for s in (state, given.state)]
    assert contract.distance(*norms) < 1e-5
    twice = contract.tokens(xs, np.array([4, 4]))
    again = memory_after(cell, form, given._replace(xs=twice))
    assert contract.distance(again, given.state) < 1e-5


@FORMS
@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
def test_delta_rule_is_a_contraction(form, kind):
    """||S_t|| <= ||S_{t-1}|| + beta ||v|| for unit keys, over a long run of correlated keys."""
    cell = kind(8, 6, chunk=8)
    given = contract.problem(case_of(cell), 0, 197, "correlated", masks=False)
    state = np.float64(memory_after(cell, form, given))
    added = (given.xs.beta * np.linalg.norm(given.xs.v, axis=-1)).sum(axis=1)
    norm = np.linalg.norm(state, axis=(-2, -1))
    assert (norm <= np.linalg.norm(np.float64(given.state), axis=(-2, -1)) + added).all()


# Symmetries of the family.


@FORMS
@pytest.mark.parametrize("kind", MATRIX)
def test_rotated_keys_and_queries_read_the_same(form, kind):
    """q, k -> R q, R k and S_0 -> R S_0 leave the answers as they are."""
    given, cell = problem(kind), kind(8, 6, chunk=8)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
    rotation = rotation.astype(np.float32)
    xs = given.xs._replace(q=given.xs.q @ rotation.T, k=given.xs.k @ rotation.T)
    y, state = contract.values(cell, form, given)
    turned, new = contract.values(cell, form, given._replace(xs=xs, state=rotation @ given.state))
    assert contract.distance(turned, y) < 1e-5
    assert contract.distance(new, rotation @ state) < 1e-5


@FORMS
@pytest.mark.parametrize("kind", MATRIX)
def test_answers_are_linear_in_queries_and_in_values(form, kind):
    cell = kind(8, 6, chunk=8)
    first, second = (problem(kind, seed, state=False) for seed in (0, 1))

    def answer(**leaves):
        return contract.values(cell, form, first._replace(xs=first.xs._replace(**leaves)))[0]

    for name in ("q", "v"):
        a, b = getattr(first.xs, name), getattr(second.xs, name)
        mixed = answer(**{name: 2 * a - 3 * b})
        assert contract.distance(mixed, 2 * answer(**{name: a}) - 3 * answer(**{name: b})) < 1e-5


@FORMS
@pytest.mark.parametrize("kind", MATRIX)
def test_scale_multiplies_the_answer_only(form, kind):
    given = problem(kind)
    y, state = contract.values(kind(8, 6, chunk=8), form, given)
    plain, same = contract.values(kind(8, 6, scale=1.0, chunk=8), form, given)
    assert contract.distance(y, plain * 8**-0.5) < 1e-6
    assert np.array_equal(state, same)


def test_initial_state_is_empty():
    for case in contract.cases():
        state = memjax.initial_state(case.cell, {}, 2, 3)
        for leaf in contract.named(state).values():
            assert leaf.shape[:2] == (2, 3) and not leaf.any()
