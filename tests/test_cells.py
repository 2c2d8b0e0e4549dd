"""Laws of single cells and reductions from one cell to another."""

import dataclasses

import contract
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax.cells._heads import Inputs as AttentionInputs
from memjax.cells._matrix import MatrixMemory
from memjax.cells.attention import Attention
from memjax.cells.comba import Comba
from memjax.cells.comba import Inputs as CombaInputs
from memjax.cells.delta_net import DeltaNet
from memjax.cells.delta_net import Inputs as DeltaInputs
from memjax.cells.delta_product import DeltaProduct
from memjax.cells.delta_product import Inputs as ProductInputs
from memjax.cells.dplr import DPLR
from memjax.cells.dplr import Inputs as LowRankInputs
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.gated_delta_net import Inputs as GatedInputs
from memjax.cells.gla import GLA
from memjax.cells.kda import KDA
from memjax.cells.linear_attention import Inputs as LinearInputs
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.simple_gla import Inputs as DecayInputs
from memjax.cells.simple_gla import SimpleGLA
from memjax.cells.sliding_window import SlidingWindow

# The contract holds the two forms together.
FORMS = pytest.mark.parametrize("form", [pytest.param("scan", marks=pytest.mark.slow), "chunked"])
MATRIX = (LinearAttention, SimpleGLA, DeltaNet, GatedDeltaNet)
FAMILY = (*MATRIX, GLA, KDA, DPLR, Comba, DeltaProduct)
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


PER_CHANNEL = {KDA: (GatedDeltaNet, GatedInputs), GLA: (SimpleGLA, DecayInputs)}


@FORMS
@pytest.mark.parametrize("kind", PER_CHANNEL)
def test_the_same_decay_in_all_channels_is_one_decay(form, kind):
    given = problem(kind)
    plain, inputs = PER_CHANNEL[kind]
    g = given.xs.g[..., :1]
    same = given.xs._replace(g=np.broadcast_to(g, given.xs.g.shape))
    scalar = inputs(**{**same._asdict(), "g": g[..., 0]})
    out = outputs(kind(8, 6, chunk=8), form, given._replace(xs=same))
    assert_near(out, outputs(plain(8, 6, chunk=8), form, given._replace(xs=scalar)))


@FORMS
@pytest.mark.parametrize("kind", [KDA, GatedDeltaNet])
def test_delta_rules_are_diagonal_plus_low_rank(form, kind):
    """a = -exp(g) k, because they erase from the decayed state, and b = beta k."""
    given = problem(kind)
    q, k, v, beta, g = given.xs
    g = g if kind is KDA else np.broadcast_to(g[..., None], k.shape)
    beta = beta[..., None]
    low_rank = given._replace(xs=LowRankInputs(q, k, beta * v, -np.exp(g) * k, beta * k, g))
    assert_near(
        outputs(DPLR(8, 6, chunk=8), form, low_rank), outputs(kind(8, 6, chunk=8), form, given)
    )


@FORMS
def test_comba_with_the_decayed_key_is_gated_delta_net(form):
    given = problem(GatedDeltaNet)
    xs = CombaInputs(*given.xs, p=np.exp(given.xs.g)[..., None] * given.xs.k)
    comba = outputs(Comba(8, 6, chunk=8), form, given._replace(xs=xs))
    assert_near(comba, outputs(GatedDeltaNet(8, 6, chunk=8), form, given))


@FORMS
def test_comba_without_feedback_is_simple_gla(form):
    given = problem(Comba)
    q, k, v, beta, g, p = given.xs
    open_loop = given._replace(xs=given.xs._replace(p=0 * p))
    plain = given._replace(xs=DecayInputs(q, k, beta[..., None] * v, g))
    assert_near(
        outputs(Comba(8, 6, chunk=8), form, open_loop),
        outputs(SimpleGLA(8, 6, chunk=8), form, plain),
    )


def micro_steps(given, count):
    """Gated DeltaNet's inputs with `count` micro-steps to a token."""

    def gather(leaf):
        return np.moveaxis(leaf.reshape(contract.BATCH, -1, count, *leaf.shape[2:]), 2, 3)

    xs = given.xs
    return ProductInputs(
        xs.q[:, count - 1 :: count],
        *(gather(leaf) for leaf in (xs.k, xs.v, xs.beta)),
        xs.g[:, ::count],
    )


@FORMS
@pytest.mark.parametrize("count", [1, 3])
def test_delta_product_is_the_interleaved_delta_rule(form, count):
    """It decays at a token's first micro-step and is asked at the last."""
    case = case_of(GatedDeltaNet(8, 6, chunk=8))
    given = contract.problem(case, 0, 13 * count, masks=False)
    first = np.arange(13 * count) % count == 0
    given = given._replace(xs=given.xs._replace(g=given.xs.g * first[:, None]))
    y, state = contract.values(case.cell, form, given)
    product = given._replace(xs=micro_steps(given, count))
    found, new = contract.values(DeltaProduct(8, 6, steps=count, chunk=8), form, product)
    assert contract.distance(found, y[:, count - 1 :: count]) < 1e-5
    assert contract.distance(new, state) < 1e-5


@FORMS
def test_wide_window_is_attention(form):
    window, attention = SlidingWindow(8, 6, 40, block=8), Attention(8, 6, 40, block=8)
    given = contract.problem(case_of(attention), 0, LENGTH)
    contract.assert_identical(
        contract.values(window, form, given), contract.values(attention, form, given), form
    )


def test_windows_decode_by_the_form_that_does_not_copy_them():
    for cell in (SlidingWindow(8, 6, 40), Attention(8, 6, 40)):
        assert cell.preferred(1, False) == ("scan", "chunked")
        assert cell.preferred(64, False) == memjax.MemoryCell.preferred(cell, 64, False)


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


@pytest.mark.parametrize("feature_map", ["identity", "silu_l2"])
def test_the_normaliser_needs_a_positive_kernel(feature_map):
    with pytest.raises(ValueError, match=f"feature_map elu_plus_one or taylor; .*{feature_map}"):
        LinearAttention(8, 6, feature_map=feature_map, normalise=True)


@FORMS
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_taylor_features_are_a_polynomial_kernel(form, size):
    """Weights 1 + s + s^2 / 2; small keys give the mean of the values."""
    cell = LinearAttention(3, 6, feature_map="taylor", normalise=True, chunk=8)
    given = contract.problem(case_of(cell), 0, LENGTH, state=False, masks=False)
    given = given._replace(xs=given.xs._replace(k=np.float32(size) * given.xs.k))
    q, k, v = (np.float64(leaf) for leaf in given.xs)
    s = np.einsum("bthk,bshk->bhts", q, k) * 3**-0.5
    weights = (1 + s + s * s / 2) * np.tri(LENGTH)
    weights /= weights.sum(-1, keepdims=True)
    y, state = contract.values(cell, form, given)
    assert state.shape[2:] == (1 + 3 + 9, 7)
    assert contract.distance(y, np.einsum("bhts,bshv->bthv", weights, v)) < 1e-5
    if size < 1e-3:
        count = np.arange(1, LENGTH + 1)[:, None, None]
        assert contract.distance(y, np.cumsum(v, axis=1) / count) < 1e-3


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
@pytest.mark.parametrize(
    "kind",
    [
        DeltaNet,
        GatedDeltaNet,
        *(pytest.param(c, marks=pytest.mark.slow) for c in (KDA, DeltaProduct)),
    ],
)
def test_delta_rule_is_a_contraction(form, kind):
    """Without new values the memory never grows: unit keys, rates at their limits."""
    case = contract.small(case_of(kind(8, 6)))
    given = contract.problem(case, 0, 61, "gates", masks=False)
    given = given._replace(xs=given.xs._replace(v=0 * given.xs.v))
    before = np.linalg.norm(np.float64(given.state), axis=(-2, -1))
    for t in range(0, 61, 10):
        head = given._replace(xs=contract.tokens(given.xs, slice(0, t + 1)))
        norm = np.linalg.norm(np.float64(memory_after(case.cell, form, head)), axis=(-2, -1))
        assert (norm <= before * (1 + 1e-5)).all()
        before = norm


@FORMS
def test_two_reflections_a_token_compose_permutations(form):
    """S_3 exactly: a transposition is the reflection at e_i - e_j, a 3-cycle two of them."""
    rng = np.random.default_rng(0)
    swaps = {(i, j): np.eye(3)[i] - np.eye(3)[j] for i, j in ((0, 1), (0, 2), (1, 2))}
    pairs = [list(swaps.values())[i] for i in rng.integers(0, 3, 64)]
    k = np.stack(pairs).reshape(32, 2, 3) / np.sqrt(2)
    beta = 2.0 * (rng.random((32, 2)) < 0.7)  # a micro-step of strength 0 does nothing
    expected = np.eye(3)
    for key, strength in zip(k.reshape(-1, 3), beta.reshape(-1), strict=True):
        expected = expected - strength * np.outer(key, key @ expected)
    lead = lambda a: np.asarray(a, np.float32)[None, :, None]  # noqa: E731
    zeros = np.zeros((32, 2, 3))
    xs = ProductInputs(lead(k[:, 0]), lead(k), lead(zeros), lead(beta), lead(np.zeros(32)))
    state = np.eye(3, dtype=np.float32)[None, None]
    cell = DeltaProduct(3, 3, steps=2, chunk=8)
    found = memory_after(cell, form, contract.Given({}, xs, state=state))[0, 0]
    assert np.abs(found - expected).max() < 1e-5
    assert np.array_equal(np.sort(np.round(expected), axis=0)[-1], np.ones(3))  # a permutation


@FORMS
@pytest.mark.parametrize("top", [1.0, 2.0])
def test_parity_needs_a_strength_above_one(form, top):
    """One value is stored, then each 1 of the input reflects it: its sign is the parity. With
    strengths up to 1 the first 1 erases it for good."""
    bits = np.random.default_rng(0).integers(0, 2, 64)
    k = np.ones((65, 1))
    v = np.concatenate([np.ones((1, 1)), np.zeros((64, 1))])
    given = delta_inputs(k, v, 1.0)
    beta = np.concatenate([[1.0], top * bits]).astype(np.float32)[None, :, None]
    given = given._replace(xs=given.xs._replace(beta=beta))
    y, _ = contract.values(DeltaNet(1, 1, scale=1.0, chunk=8), form, given)
    parity = (-1.0) ** np.cumsum(bits)
    expected = parity if top == 2 else np.cumsum(bits) == 0
    assert np.abs(y[0, 1:, 0, 0] - expected).max() < 1e-5


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
@pytest.mark.parametrize("kind", [GLA, KDA])
def test_decays_per_channel_follow_their_channels(form, kind):
    """Permuted channels read the same; rotated ones do not."""
    given, cell = problem(kind), kind(8, 6, chunk=8)
    y, _ = contract.values(cell, form, given)
    order = np.random.default_rng(2).permutation(8)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))

    def turned(matrix, **changes):
        xs = given.xs._replace(q=given.xs.q @ matrix.T, k=given.xs.k @ matrix.T, **changes)
        return contract.values(cell, form, given._replace(xs=xs, state=matrix @ given.state))[0]

    permutation = np.eye(8, dtype=np.float32)[order]
    assert contract.distance(turned(permutation, g=given.xs.g[..., order]), y) < 1e-5
    assert contract.distance(turned(rotation.astype(np.float32)), y) > 0.01


@FORMS
@pytest.mark.parametrize("kind", FAMILY)
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
@pytest.mark.parametrize("kind", FAMILY)
def test_scale_multiplies_the_answer_only(form, kind):
    given = problem(kind)
    y, state = contract.values(kind(8, 6, chunk=8), form, given)
    plain, same = contract.values(kind(8, 6, scale=1.0, chunk=8), form, given)
    assert contract.distance(y, plain * 8**-0.5) < 1e-6
    assert np.array_equal(state, same)


def test_initial_state_is_empty():
    for case in contract.cases():
        if not isinstance(case.cell, (MatrixMemory, SlidingWindow)):
            continue
        state = memjax.initial_state(case.cell, {}, 2, 3)
        for leaf in contract.named(state).values():
            assert leaf.shape[:2] == (2, 3) and not leaf.any()
