"""Titans, OmegaNet, Atlas: updates are gradients of the stated loss; identities; stability."""

import dataclasses
import math

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

import memjax
from memjax.cells import dplr, linear_attention, titans
from memjax.cells.atlas import Atlas, OmegaNet, orthogonalise, polynomial
from memjax.cells.titans import Titans

CASES = {case.name: case for case in contract.cases()}
LEARNERS = [n for n in CASES if n.split("-")[0] in ("titans", "omega_net", "atlas")]
B, T, H = contract.BATCH, 29, contract.HEADS


def given(cell, seed=0, length=T, **changes):
    """Float64 params and inputs, no masks, a plain start; `changes` replace leaves everywhere."""
    case = contract.Case("a cell", CASES["titans"].spec, cell)
    problem = contract.problem(case, seed, length, state=False, masks=False)
    leaves = {
        name: np.broadcast_to(value, getattr(problem.xs, name).shape)
        for name, value in changes.items()
    }
    return contract.cast(problem._replace(xs=problem.xs._replace(**leaves)), np.float64)


def exact(cell, problem, form="scan"):
    """(y, state) in float64."""
    with contract.x64(True):
        return contract.values(cell, form, problem)


# ---------------------------------------------------------------- the update is a gradient


def network(cell, weights, x):
    """The memory as its docstring has it."""
    hidden = x
    for layer in weights[:-1]:
        hidden = jax.nn.gelu(hidden @ layer)
    y = hidden @ weights[-1]
    return x + y if len(weights) > 1 and cell.key_dim == cell.value_dim else y


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("atlas-deep", "omega_net-deep") else ())
        for n in LEARNERS
    ],
)
def test_the_update_is_minus_the_gradient_of_the_loss(name):
    """Token by token, by `jax.grad` in float64, from the definition."""
    cell = CASES[name].cell
    length, pairs = 12, cell.pairs  # more than a frozen chunk
    problem = given(cell, 3, length)

    def loss(weights, ks, vs, rates):
        total = 0.0
        for k, v, rate in zip(ks, vs, rates, strict=True):
            y = network(cell, weights, k)
            one = -jnp.dot(y, v) if cell.loss == "dot" else jnp.sum((y - v) ** 2)
            total = total + rate * one
        return total

    def run(params, xs):
        weights, base, momentum = params, params, jax.tree.map(jnp.zeros_like, params)
        for t in range(length):
            x = jax.tree.map(lambda a, t=t: a[t], xs)
            if t % cell.frozen_chunk == 0:
                base = weights
            first = max(0, t - pairs + 1)
            rates, step, push = [1.0] * (t - first + 1), 0.0, lambda z: z
            if isinstance(cell, Titans):
                keep, rates = jnp.exp(x.eta), [x.theta]
            else:
                rates = [x.gamma[t - i] for i in range(first, t + 1)]
                keep, step = 0.0, x.eta
            if isinstance(cell, Atlas):
                keep = jnp.exp(x.theta)
            if getattr(cell, "newton_schulz", 0):
                push = lambda z, s=step: s * orthogonalise(z, cell.newton_schulz)  # noqa: E731
            elif not isinstance(cell, Titans):
                rates = [step * rate for rate in rates]
            slope = jax.grad(loss)(base, xs.k[first : t + 1], xs.v[first : t + 1], rates)
            momentum = jax.tree.map(lambda z, u, m=keep: m * z - u, momentum, slope)
            fade = jnp.exp(x.alpha)
            weights = jax.tree.map(lambda w, z, a=fade: a * w + push(z), weights, momentum)  # noqa: B023
        return weights

    with contract.x64(True):
        one = jax.tree.map(lambda a: a[0, :, 1], problem.xs)
        params = jax.tree.map(lambda a: a[1], problem.params)
        expected = contract.to_numpy(jax.jit(run)(params, one))
    _, state = exact(cell, problem)
    for layer, wanted in zip(state.weights, expected, strict=True):
        assert distance(layer[0, 1], wanted) < 1e-12, name


# ---------------------------------------------------------------- identities


def test_titans_without_momentum_and_with_chunks_of_1_is_dplr():
    """w = log(1 - alpha), a = -k, b = 2 theta k, values 2 theta v (specification, T1)."""
    cell = Titans(8, 6, frozen_chunk=1)
    problem = given(cell, eta=-np.inf)
    xs = problem.xs
    theta, g = 2 * xs.theta[..., None], np.broadcast_to(xs.alpha[..., None], xs.k.shape)
    other = dplr.DPLR(8, 6, scale=1.0)
    inputs = dplr.Inputs(xs.q, xs.k, theta * xs.v, -xs.k, theta * xs.k, g)
    state = np.broadcast_to(problem.params[0], (B, H, 8, 6))
    y, _ = exact(other, contract.Given({}, inputs, state))
    assert distance(exact(cell, problem)[0], y) < 1e-12


def test_titans_projects_onto_a_pair():
    """theta = 1/2, nothing kept or forgotten, ||k|| = 1: M k = v (T2); alpha = 1: M = S (T4)."""
    cell = Titans(8, 6, frozen_chunk=1)
    problem = given(cell, eta=-np.inf, alpha=0.0, theta=0.5)
    _, state = exact(cell, problem)
    last = np.einsum("bhk,bhkv->bhv", np.float64(problem.xs.k[:, -1]), state.weights[0])
    assert distance(last, problem.xs.v[:, -1]) < 1e-6
    _, state = exact(cell, given(cell, alpha=-np.inf))
    assert distance(state.weights[0], state.momentum[0]) < 1e-12
    _, state = exact(cell, given(cell, theta=0.0, alpha=-0.1))
    start = np.broadcast_to(problem.params[0], state.weights[0].shape)
    assert distance(state.weights[0], np.exp(-0.1 * T) * start) < 1e-6


def test_a_repeated_pair_is_learnt_step_by_step():
    cell = Titans(4, 4, depth=2, frozen_chunk=1, std=0.1)
    problem = given(cell, eta=-np.inf, alpha=0.0, theta=0.02)
    xs = jax.tree.map(lambda a: np.broadcast_to(a[:, :1], a.shape), problem.xs)
    y, _ = exact(cell, problem._replace(xs=xs._replace(q=xs.k)))
    errors = np.linalg.norm(y - xs.v, axis=-1)
    assert (np.diff(errors, axis=1) < 0).all()


def test_omega_with_one_pair_is_the_delta_rule_and_the_window_reaches_no_further():
    """c = 1, alpha = 1: beta = 2 eta gamma (O1); gamma = 0 for earlier pairs equals c = 1 (O3)."""
    cell = OmegaNet(8, 6, frozen_chunk=1, context=1)
    problem = given(cell, alpha=0.0)
    xs = problem.xs
    rate = 2 * xs.eta * xs.gamma[..., 0]
    other = memjax.cells.get("delta_net").cell()
    inputs = other.inputs(xs.q, xs.k, xs.v, rate)
    state = np.broadcast_to(problem.params[0], (B, H, 8, 6))
    y, _ = exact(dataclasses.replace(other, scale=1.0), contract.Given({}, inputs, state))
    assert distance(exact(cell, problem)[0], y) < 1e-12
    wide = dataclasses.replace(cell, context=4)
    gamma = np.concatenate([xs.gamma, np.zeros((B, T, H, 3))], axis=-1)
    again = exact(wide, problem._replace(xs=xs._replace(gamma=gamma)))[0]
    assert distance(again, y) < 1e-12


def test_a_window_of_all_pairs_descends_to_least_squares():
    """O11, Prop. 1: once n pairs that return are all in the window, each token is a step of
    gradient descent on their loss: from W, (I - 2 eta K^T K)^t (W - W*) is left of the error."""
    pairs, cycles, size, eta = 6, 30, 4, 0.1
    cell = OmegaNet(size, 3, frozen_chunk=1, context=pairs)
    problem = given(cell, 0, pairs * cycles, alpha=0.0, eta=eta, gamma=1.0)
    xs = jax.tree.map(lambda a: np.tile(a[:, :pairs], (1, cycles, *[1] * (a.ndim - 2))), problem.xs)
    _, start = exact(cell, problem._replace(xs=jax.tree.map(lambda a: a[:, : pairs - 1], xs)))
    _, final = exact(cell, problem._replace(xs=xs))
    steps = pairs * (cycles - 1) + 1
    for b, h in np.ndindex(B, H):
        keys, found = np.float64(xs.k[b, :pairs, h]), np.float64(xs.v[b, :pairs, h])
        best = np.linalg.lstsq(keys, found, rcond=None)[0]
        shrinks = np.linalg.matrix_power(np.eye(size) - 2 * eta * keys.T @ keys, steps)
        left = shrinks @ (start.weights[0][b, h] - best)
        assert distance(final.weights[0][b, h], best + left) < 1e-6
        assert np.linalg.norm(left) < 0.1 * np.linalg.norm(start.weights[0][b, h] - best)


def test_atlas_with_one_pair_and_without_newton_schulz_is_titans():
    for frozen in (1, 8):
        cell = Atlas(8, 6, frozen_chunk=frozen, context=1, newton_schulz=0)
        problem = given(cell)
        xs = problem.xs
        inputs = titans.Inputs(xs.q, xs.k, xs.v, xs.alpha, xs.theta, xs.eta * xs.gamma[..., 0])
        other = Titans(8, 6, frozen_chunk=frozen)
        y, _ = exact(other, problem._replace(xs=inputs))
        assert distance(exact(cell, problem, "chunked")[0], y) < 1e-12


def test_a_hebbian_matrix_is_linear_attention():
    """DLA with a matrix, alpha = eta = gamma = 1, M_0 = 0; with a window SWLA: its sums."""
    cell = OmegaNet(8, 6, frozen_chunk=4, context=1, loss="dot")
    problem = given(cell, alpha=0.0, eta=1.0, gamma=1.0)
    problem = problem._replace(params=(np.zeros_like(problem.params[0]),))
    xs = problem.xs
    plain = linear_attention.LinearAttention(8, 6, scale=1.0)
    y, _ = exact(plain, contract.Given({}, plain.inputs(xs.q, xs.k, xs.v)))
    assert distance(exact(cell, problem, "chunked")[0], y) < 1e-12
    wide = dataclasses.replace(cell, context=3)
    gamma = np.ones((B, T, H, 3))
    y, _ = exact(wide, problem._replace(xs=xs._replace(gamma=gamma)), "chunked")
    q, k, v = (np.float64(a) for a in (xs.q, xs.k, xs.v))
    memory, answers = np.zeros((B, H, 8, 6)), []
    for t in range(T):
        for i in range(max(0, t - 2), t + 1):
            memory = memory + np.einsum("bhk,bhv->bhkv", k[:, i], v[:, i])
        answers.append(np.einsum("bhk,bhkv->bhv", q[:, t], memory))
    assert distance(y, np.stack(answers, axis=1)) < 1e-12


def test_newton_schulz():
    """Odd, blind to scale, commutes with rotations and transposition; zero stays zero; the singular
    values land in [0.68, 1.13], a single one at 0.70 (specification 7.6)."""
    rng = np.random.default_rng(0)
    with contract.x64(True):
        f = jax.jit(lambda x: orthogonalise(x, 5))
        x = rng.normal(size=(6, 4))
        y = np.asarray(f(x))
        assert distance(f(-3 * x), -y) < 1e-9 and distance(f(x.T), y.T) < 1e-12
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (6, 4))
        assert distance(f(left @ x @ right), left @ y @ right) < 1e-9
        singular = np.linalg.svd(y, compute_uv=False)
        assert (singular > 0.6).all() and (singular < 1.2).all()
        one = np.asarray(f(np.outer(x[:, 0], x[0])))
        assert abs(np.linalg.svd(one, compute_uv=False)[0] - 0.70) < 0.01
        assert not np.asarray(f(np.zeros((6, 4)))).any()
        assert np.isfinite(jax.grad(lambda x: f(x).sum())(np.zeros((6, 4)))).all()


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3), (2, 4, 4)])
def test_derivatives_of_newton_schulz_are_those_of_its_polynomial(shape):
    """Forwards and backwards, against plain differentiation of X (a + b S + c S S), S = X^T X."""

    def plain(x):
        a, b, c = 3.4445, -4.7750, 2.0315
        x = x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
        for _ in range(5):
            s = x.mT @ x
            x = x @ (a * jnp.eye(s.shape[-1]) + b * s + c * s @ s)
        return x

    rng = np.random.default_rng(1)
    x, tangent, cotangent = rng.normal(size=(3, *shape))
    with contract.x64(True):
        y, moved = jax.jvp(lambda x: orthogonalise(x, 5), (x,), (tangent,))
        expected, expected_moved = jax.jvp(plain, (x,), (tangent,))
        assert distance(y, expected) < 1e-11 and distance(moved, expected_moved) < 1e-10
        (back,), (expected_back,) = (
            jax.vjp(f, x)[1](cotangent) for f in (lambda x: orthogonalise(x, 5), plain)
        )
        assert distance(back, expected_back) < 1e-10


def test_polynomial_features_have_the_kernel():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 5))
    x, y = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (x, y))
    with contract.x64(True):
        for weights in ([0.3, 2.0], [1.0, 1.0, 0.5], [0.1, 0.7, 0.2, 1.3]):
            a, b = (np.asarray(polynomial(z, jnp.array(weights))) for z in (x, y))
            s = np.sum(x * y, axis=-1)
            kernel = sum(w * s**i for i, w in enumerate(weights)) / sum(weights)
            assert distance(np.sum(a * b, axis=-1), kernel) < 1e-12
            degree = len(weights) - 1
            assert a.shape[-1] == math.comb(5 + degree, degree)
        weights = jnp.array([1 / math.factorial(i) for i in range(7)])
        a, b = (np.asarray(polynomial(z, weights)) for z in (x[:, :3], y[:, :3]))
        s = np.sum(x[:, :3] * y[:, :3], axis=-1)
        assert np.abs(np.sum(a * b, axis=-1) * float(weights.sum()) - np.exp(s)).max() < 6e-4


# ---------------------------------------------------------------- the stable region


def growth(cell, theta, eta, alpha=0.0, chunks=40, **more):
    """The largest answer of the last chunk when every key is the same."""
    length = chunks * cell.frozen_chunk
    changes = dict(theta=theta, eta=np.log(eta) if eta else -np.inf, alpha=np.log1p(-alpha), **more)
    problem = given(cell, 1, length, **changes)
    xs = jax.tree.map(lambda a: np.broadcast_to(a[:, :1], a.shape), problem.xs)
    y, _ = exact(cell, problem._replace(xs=xs._replace(q=xs.k)), "chunked")
    return np.abs(y[:, -cell.frozen_chunk :]).max() / np.abs(xs.v).max()


def test_titans_is_stable_where_its_docstring_says():
    for chunk in (1, 4, 16):
        cell = Titans(4, 3, frozen_chunk=chunk)
        for eta in (0.0, 0.5, 0.9, 0.99):
            for alpha in (0.0, 0.05):
                assert growth(cell, (1 - eta) / (2 * chunk), eta, alpha) < 3, (chunk, eta, alpha)


def test_titans_diverges_outside():
    """A chunk of 64 with theta 0.02, eta 0.9 and alpha 0.05."""
    with np.errstate(over="ignore"):
        assert growth(Titans(4, 3, frozen_chunk=64), 0.02, 0.9, 0.05, chunks=20) > 1e6


def swings(theta, eta, on, off, cycles):
    """The largest answer to a first key in the last cycle: it comes for `on` tokens, then another
    one for `off`; C = 1, nothing is forgotten, values are zero."""
    cell = Titans(2, 1, frozen_chunk=1)
    length = cycles * (on + off)
    problem = given(cell, 0, length, theta=theta, eta=np.log(eta), alpha=0.0, v=0.0)
    first = np.arange(length) % (on + off) < on
    keys = np.where(first[:, None], [1.0, 0.0], [0.0, 1.0])[None, :, None]
    xs = problem.xs._replace(
        k=np.broadcast_to(keys, problem.xs.k.shape),
        q=np.broadcast_to([1.0, 0.0], problem.xs.k.shape),
    )
    start = (np.ones_like(problem.params[0]),)
    y, _ = exact(cell, problem._replace(params=start, xs=xs))
    return np.abs(y[:, -on - off :]).max()


def test_titans_with_keys_that_come_and_go():
    """They pump the momentum where one constant key is stable, and not within the circle bound,
    which holds for every sequence of keys."""
    assert growth(Titans(4, 3, frozen_chunk=1), 0.005, 0.99) < 3
    assert swings(0.005, 0.99, on=16, off=300, cycles=4) > 100
    for eta in (0.5, 0.9, 0.99):
        theta = 0.99 * (1 - eta) ** 2 / (1 + eta)
        for on, off in ((16, 300), (3, 5), (40, 40)):
            assert swings(theta, eta, on, off, cycles=4) < 1.5, (eta, on, off)
