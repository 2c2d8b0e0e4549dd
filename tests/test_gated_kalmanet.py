"""Gated KalmaNet against ridge regression; what the solver's iterations leave; identities."""

import dataclasses

import contract
import numpy as np
import pytest
from contract import distance

from memjax.cells import simple_gla
from memjax.cells.gated_kalmanet import GatedKalmaNet

(CASE,) = (case for case in contract.cases() if case.name == "gated_kalmanet")
T = 23


def given(length=T, **changes):
    """Float64 inputs without masks, from an empty memory; `changes` replace leaves everywhere."""
    problem = contract.problem(CASE, 0, length, state=False, masks=False)
    leaves = {k: np.broadcast_to(a, getattr(problem.xs, k).shape) for k, a in changes.items()}
    return contract.cast(problem._replace(xs=problem.xs._replace(**leaves)), np.float64)


def answers(problem, form="chunked", **changes):
    with contract.x64(True):
        return contract.values(dataclasses.replace(CASE.cell, **changes), form, problem)[0]


def ridge(xs, t, a):
    """y_t by a direct solution of the weighted least squares."""
    out = np.zeros(xs.v.shape[:1] + xs.v.shape[2:])
    for b, h in np.ndindex(*out.shape[:2]):
        k, v = xs.k[b, : t + 1, h], xs.v[b, : t + 1, h]
        fade = np.exp(np.cumsum(xs.g[b, : t + 1, h][::-1])[::-1] - xs.g[b, : t + 1, h])
        weight = (fade * xs.beta[b, : t + 1, h] ** 2)[:, None]
        gram = k.T @ (weight * k)
        gram = gram + a * np.linalg.norm(gram) * np.eye(len(gram))
        asked = np.linalg.solve(gram, xs.q[b, t, h])
        asked = xs.q[b, t, h] + xs.alpha[b, t, h] * (asked - xs.q[b, t, h])
        out[b, h] = (weight * v).T @ (k @ asked) / np.sqrt(k.shape[1])
    return out


@pytest.mark.parametrize("form", ["scan", "chunked"])
def test_it_is_weighted_ridge_regression(form):
    """The error of r iterations stays below 2 ((s - 1) / (s + 1))^(r + 1), s^2 = (1 + a) / a."""
    problem = given()
    for strength, iterations in ((0.02, 30), (0.1, 30), (0.1, 10), (0.02, 120)):
        y = answers(problem, form, ridge=strength, iterations=iterations)
        s = np.sqrt((1 + strength) / strength)
        bound = 2 * ((s - 1) / (s + 1)) ** (iterations + 1)
        condition = (1 + strength) / strength
        for t in (0, 5, T - 1):
            assert distance(y[:, t], ridge(problem.xs, t, strength)) <= bound * condition + 1e-12


@pytest.mark.parametrize(("strength", "iterations"), [(0.02, 30), (0.1, 20), (0.02, 10)])
def test_the_solver_keeps_its_bound(strength, iterations):
    """For the symmetric matrices of the memory, in the norm of x itself."""
    cell = GatedKalmaNet(8, 6, ridge=strength, iterations=iterations)
    s = np.sqrt((1 + strength) / strength)
    bound, far, rng = 2 * ((s - 1) / (s + 1)) ** (iterations + 1), [], np.random.default_rng(0)
    with contract.x64(True):
        for rank in (1, 2, 4, 8, 40):
            k = rng.normal(size=(rank, 8))
            h, q = k.T @ k, rng.normal(size=8)
            x = cell._solve(lambda x, h=h: x @ h, np.sum(h * h), q)
            wanted = np.linalg.solve(h + strength * np.linalg.norm(h) * np.eye(8), q)
            far.append(np.linalg.norm(x - wanted) / np.linalg.norm(wanted))
    assert bound / 1e3 < max(far) <= bound * (1 + 1e-9)  # it is reached


def test_the_first_token_in_closed_form():
    """beta = alpha = 1: y = v (k . q) / (1 + a), before the scale."""
    xs = given(1, beta=1.0, alpha=1.0).xs
    y = answers(contract.Given({}, xs), iterations=200)
    expected = xs.v * np.sum(xs.k * xs.q, axis=-1, keepdims=True) / 1.02 / np.sqrt(8)
    assert distance(y, expected) < 1e-6  # k.k is 1 to float32 rounding


def test_without_the_solution_it_is_simple_gla():
    xs = given().xs
    values = xs.beta[..., None] ** 2 * xs.v
    other = simple_gla.SimpleGLA(8, 6)
    with contract.x64(True):
        inputs = simple_gla.Inputs(xs.q, xs.k, values, xs.g)
        expected = contract.values(other, "scan", contract.Given({}, inputs))[0]
    zero = contract.Given({}, xs._replace(alpha=np.zeros_like(xs.alpha)))
    assert distance(answers(zero), expected) < 1e-12
    assert distance(answers(contract.Given({}, xs), iterations=0), expected) < 1e-12


def test_the_scale_of_pairs_does_not_matter():
    """alpha = 1: the ridge follows ||H||, so that c k and c v give the same answers."""
    xs = given(alpha=1.0).xs
    large = contract.Given({}, xs._replace(beta=7 * xs.beta))
    assert distance(answers(large), answers(contract.Given({}, xs))) < 1e-12


def test_keys_that_share_no_direction_are_recalled():
    """Orthonormal keys, no fading: H = I on their span, so that every pair shrinks alike."""
    problem = given(8, beta=1.0, alpha=1.0, g=0.0)
    keys = np.broadcast_to(np.eye(8)[None, :, None], problem.xs.k.shape)
    q = np.broadcast_to(keys[:, :1], keys.shape)
    y = answers(contract.Given({}, problem.xs._replace(k=keys, q=q)), iterations=100)
    wanted = problem.xs.v[:, :1] / np.sqrt(8) / (1 + 0.02 * np.sqrt(8))
    assert distance(y[:, -1:], wanted) < 1e-6


def test_an_empty_memory_answers_zero_with_finite_gradients():
    problem = contract.problem(CASE, 0, 9)
    state = contract.values(CASE.cell, "scan", contract.problem(CASE, 0, 1, state=False))[1]
    empty = problem._replace(state=type(state)(*(0 * a for a in state)))
    empty = empty._replace(write=np.zeros_like(problem.write))
    for form in ("scan", "chunked"):
        found = contract.evaluate(CASE.cell, form, empty)
        assert not found["[0]"].any()
        assert all(np.isfinite(leaf).all() for leaf in found.values())


def test_bad_sizes():
    with pytest.raises(ValueError, match="ridge above 0; given"):
        GatedKalmaNet(8, 6, ridge=0.0)
