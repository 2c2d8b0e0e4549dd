"""Lattice: what a write does to a slot, against autodiff and geometry; its variants."""

import dataclasses

import contract
import contract_checks as checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

from memjax.cells.lattice import OBJECTIVES, Lattice

CASES = {case.name: case for case in contract.cases()}
K, V = 8, 6


def token(seed, cell, dtype=np.float64):
    """A state whose slots are unit (or not, without retraction), and inputs of one token."""
    rng = np.random.default_rng(seed)
    slots = rng.normal(size=(K, V))
    norms = np.linalg.norm(slots, axis=-1, keepdims=True)
    slots = slots / norms * (1 if cell.retraction else rng.uniform(0.5, 2, (K, 1)))
    q, k = rng.normal(size=(2, K))
    x = cell.inputs(q, k, rng.normal(size=V), np.zeros(()), np.full((), 0.3))
    state = cell.init_state(jnp.asarray(slots))._replace(slots=slots, base=slots)
    return contract.cast((state, x), dtype)


def loss(objective, slots, x):
    """Of the normalised slots, as the paper states it."""
    s = slots / jnp.linalg.norm(slots, axis=-1, keepdims=True)
    if objective == "decoding":
        return 0.5 * jnp.sum((x.v - s.T @ x.k) ** 2)
    if objective == "encoding":
        return 0.5 * jnp.sum((x.k - s @ x.v) ** 2)
    return -jnp.dot(x.v, s.T @ x.k)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("retraction", [True, False])
def test_the_update_is_minus_the_gradient_of_the_loss(objective, retraction):
    """L2, and L1: it is at a right angle to every slot, in float32 to rounding."""
    cell = Lattice(K, V, objective, frozen_chunk=2, retraction=retraction)
    with contract.x64(True):
        state, x = token(0, cell)
        after = contract.to_numpy(cell.write(None, state, x)).slots
        slope = np.asarray(jax.grad(lambda s: loss(objective, s, x))(state.slots))
    assert distance(after - state.slots, -0.3 * slope) < 1e-12
    state, x = token(1, cell, np.float32)
    kept, added, h = (np.asarray(a) for a in cell.change(state.slots, x))
    change = (kept - 1)[:, None] * state.slots + added[:, None] * h
    along = np.abs(np.sum(change * state.slots, axis=-1))
    norms = np.linalg.norm(state.slots, axis=-1)
    sizes = norms * (norms + np.abs(added) * np.linalg.norm(h))
    assert (along <= 4 * np.finfo(np.float32).eps * sizes).all()
    grown = np.linalg.norm(state.slots + change, axis=-1) ** 2
    expected = np.linalg.norm(state.slots, axis=-1) ** 2 + np.linalg.norm(change, axis=-1) ** 2
    assert distance(grown, expected) < 1e-6  # L4


def test_slots_that_are_not_meant_stay():
    """L5: h along the slot, or no weight on it."""
    cell = Lattice(K, V, "similarity", frozen_chunk=2)
    state, x = token(2, cell)
    along = np.asarray(cell.write(None, state, x._replace(v=3 * state.slots[4])).slots)
    assert distance(along[4], state.slots[4]) < 1e-6
    weight = np.where(np.arange(K) == 2, 0, x.k)
    other = np.asarray(cell.write(None, state, x._replace(k=weight)).slots)
    assert np.array_equal(other[2], np.float32(state.slots[2])) and not np.array_equal(
        other[1], np.float32(state.slots[1])
    )


def problem(cell, gamma=None, length=24):
    case = CASES["lattice"]._replace(cell=cell)
    given = contract.problem(case, 5, length, state=False, masks=False)
    given = contract.cast(given, np.float64)
    if gamma is not None:
        given = given._replace(xs=given.xs._replace(gamma=np.full_like(given.xs.gamma, gamma)))
    return given


def values(cell, given, form="scan"):
    with contract.x64(True):
        return contract.values(cell, form, given)


def test_retraction_and_growing_slots_agree_for_small_steps():
    """L7, with nothing forgotten; answers, which are normalised, to third order."""
    far = []
    for gamma in (0.02, 0.01):
        results = []
        for retraction in (True, False):
            cell = Lattice(K, V, frozen_chunk=1, retraction=retraction)
            given = problem(cell, gamma, length=3)
            xs = given.xs._replace(beta=np.zeros_like(given.xs.beta))
            results.append(values(cell, given._replace(xs=xs))[0])
        far.append(distance(*results))
    assert 7 < far[0] / far[1] < 9, far


def test_longer_chunks_approach_the_exact_rule_as_the_step_shrinks():
    """L8: an error of second order in the step."""
    far = []
    for gamma in (0.02, 0.01):
        exact = Lattice(K, V, frozen_chunk=1)
        given = problem(exact, gamma)
        xs = given.xs._replace(beta=np.zeros_like(given.xs.beta))
        given = given._replace(xs=xs)
        frozen = dataclasses.replace(exact, frozen_chunk=8)
        far.append(distance(values(frozen, given)[0], values(exact, given)[0]))
    assert 3 < far[0] / far[1] < 5, far


def test_symmetries():
    """L10: slots may be permuted with q and k; L11: values and slots may be rotated."""
    cell = Lattice(K, V, frozen_chunk=4)
    given, rng = problem(cell), np.random.default_rng(0)
    y, _ = values(cell, given)
    order = rng.permutation(K)
    xs = given.xs._replace(q=given.xs.q[..., order], k=given.xs.k[..., order])
    permuted = given._replace(xs=xs, params=given.params[:, order])
    assert distance(values(cell, permuted)[0], y) < 1e-12
    turn = np.linalg.qr(rng.normal(size=(V, V)))[0]
    turned = given._replace(xs=given.xs._replace(v=given.xs.v @ turn), params=given.params @ turn)
    assert distance(values(cell, turned)[0], y @ turn) < 1e-12


@pytest.mark.slow
def test_a_single_slot_keeps_the_contract():
    """L9."""
    case = CASES["lattice"]._replace(cell=Lattice(1, V, frozen_chunk=8))
    for form in contract.forms(case):
        checks.check_forms(case, form, contract.problem(case, 0, 29))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["random", "correlated", "equal"])
def test_growing_slots_keep_the_contract(scenario):
    """Not with beta at 0, which its docstring excludes."""
    case = CASES["lattice"]
    case = case._replace(cell=Lattice(K, V, frozen_chunk=8, retraction=False))
    for form in contract.forms(case):
        checks.check_forms(case, form, contract.problem(case, 0, 29, scenario))


@pytest.mark.slow
def test_slots_stay_of_unit_norm_for_16_thousand_tokens():
    cell = Lattice(K, V, frozen_chunk=16)
    case = CASES["lattice"]._replace(cell=cell)
    given = contract.problem(case, 0, 16_384, "equal", state=False, masks=False)
    y, state = contract.values(cell, "chunked", given)
    assert np.isfinite(y).all() and state.place.max() == 0
    norms = np.linalg.norm(state.slots, axis=-1)
    assert distance(norms, np.ones_like(norms)) < 1e-5
    found = contract.evaluate(cell, "chunked", given)
    assert all(np.isfinite(leaf).all() for leaf in found.values())


def test_values_too_large_for_a_chunk_leave_unit_slots():
    """Slots that grow far beyond what their squares can hold are brought back."""
    case = CASES["lattice"]
    given = contract.problem(case, 0, 64, state=False, masks=False)
    given = given._replace(xs=given.xs._replace(v=3000 * given.xs.v))
    for form in contract.forms(case):
        y, state = contract.values(case.cell, form, given)
        assert np.isfinite(y).all()
        norms = np.linalg.norm(state.slots, axis=-1)
        assert distance(norms, np.ones_like(norms)) < 1e-5


def test_bad_options():
    with pytest.raises(ValueError, match="objective 'hebbian': allowed are decoding, encoding"):
        Lattice(K, V, "hebbian")
    with pytest.raises(NotImplementedError, match="frozen_chunk 1 has no parallel form"):
        contract.values(Lattice(K, V, frozen_chunk=1), "chunked", problem(Lattice(K, V)))
