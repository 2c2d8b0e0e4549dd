"""Slots of unit norm: against their reference, by the interpreters, as lowered, and through the
cell."""

import re
from functools import partial
from types import SimpleNamespace

import contract
import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_ops import race

import memjax
from memjax.cells.lattice import Lattice
from pallas_kernels import interpreted, lattice, ops
from pallas_kernels.lattice import reference, tpu_vjp
from pallas_kernels.lattice.specs import SPECS, Spec, flat
from pallas_kernels.lattice.tiles import Tiles

CASES = kernel_checks.cases({"lattice": (lattice, reference, SPECS)})


def check(case, how=True):
    """`kernel_checks.check`; in bfloat16 the plain form is the token loop with float32 sums."""
    spec = case.spec
    op, loop = flat(lattice, spec, chunk=spec.chunk), flat(reference.sequential, spec)
    with kernel_checks.running("tpu", how):
        kernel_checks.check(op, loop, loop, spec)


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    """Without races and uninitialised memory, where that is asked for."""
    check(case, race() if "race" in case.spec.tags else True)


@pytest.mark.slow
def test_a_walk_in_parallel_is_found(monkeypatch):
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    fake = SimpleNamespace(**vars(pltpu) | {"CompilerParams": lambda **_: parallel})
    monkeypatch.setattr(tpu_vjp, "pltpu", fake)
    with pytest.raises(Exception, match="RACE DETECTED|not finite|off, at most"):
        check(CASES["lattice-exact"], race())


@pytest.mark.slow
def test_the_check_finds_a_planted_mistake(monkeypatch):
    """The gradient of a base does not join that of slots, nor that of slots the one of `start`."""
    monkeypatch.setattr(tpu_vjp, "unprepare", lambda *_: None)
    with pytest.raises(AssertionError, match="off, at most"):
        check(CASES["lattice-frozen"])


def test_the_chunked_reference_is_the_token_loop():
    """From the initial state, all tokens written: the form whose cost is the plain form's."""
    spec = Spec(name="", T=24, K=8, V=4, frozen=4, state=False, objective="encoding")
    plain = lambda *given, state, reset, write, **others: reference.chunked(*given, **others)  # noqa: E731
    run = partial(kernel_checks.results, spec=spec, dtype=jnp.float64)
    with contract.x64(True):
        wanted, found = run(flat(reference.sequential, spec)), run(flat(plain, spec))
    found["base"], wanted["base"] = found["slots"], wanted["slots"]
    for leaf in ("o", "slots", "dq"):
        assert kernel_checks.distance(found[leaf], wanted[leaf]) < 1e-10, leaf


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tiles(dim):
    """Sums over slots and over channels are those of the arrays, and so is what they return to."""
    tiles, rng = Tiles(dim), np.random.default_rng(0)
    states = rng.standard_normal((2, 2 * tiles.memories, dim, dim)).astype(np.float32)
    tiled = tiles.tiled(jnp.asarray(states))
    assert tiled.shape == (2, 2, *tiles.shape)
    np.testing.assert_array_equal(tiles.untiled(tiled), states)
    rows = lambda a: a.reshape(8, tiles.width)  # noqa: E731
    one, mine = tiled[1, 1], states[1, tiles.memories :]
    x = rng.standard_normal((tiles.memories, dim)).astype(np.float32)
    weighted = tiles.over_slots(jnp.sum(tiles.of_slots(rows(x)) * one, axis=1))
    np.testing.assert_allclose(weighted, rows(np.einsum("mk,mkv->mv", x, mine)), atol=1e-4)
    weighted = tiles.over_channels(jnp.sum(tiles.of_channels(rows(x))[:, None] * one, axis=0))
    np.testing.assert_allclose(weighted, rows(np.einsum("mv,mkv->mk", x, mine)), atol=1e-4)


# ---------------------------------------------------------------- refusals


def arrays(heads=8, width=128, dtype=jnp.float32):
    return ops.arguments("lattice", "exact", (1, 32, heads, width), dtype)


def shaped(given, **options):
    return jax.eval_shape(lambda given: lattice(**given, **{"platform": "tpu", **options}), given)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(platform="cpu"), "none for cpu"),
        ({}, dict(platform="gpu"), "none for gpu"),
        (dict(width=257), {}, "K = 257"),
        (dict(dtype=jnp.float16), {}, "float16"),
        ({}, dict(chunk=24), "given 24"),
        (dict(width=256), {}, "does not fit 15 MiB .*256 slots of 256 channels"),
        ({}, dict(chunk=32), "does not fit 15 MiB .*in chunks of 32"),
    ],
)
def test_a_refusal_has_its_reason(changes, options, message):
    with pytest.raises(NotImplementedError, match=f"lattice .*{message}"):
        shaped(arrays(**changes), **options)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"k": (1, 31, 8, 128)}, {}, r"k must be \[1, 32, 8, 128\]; given \[1, 31, 8, 128\]"),
        ({"q": (1, 32, 1, 128), "k": (1, 32, 1, 128)}, {}, r"q must be \[1, 32, 8, 128\]"),
        ({"gamma": (1, 32, 1)}, {}, r"gamma must be \[1, 32, 8\]; given \[1, 32, 1\]"),
        ({"start": (8, 128, 32)}, {}, r"start must be \[8, 128, 128\]"),
        ({"write": (1, 32)}, {}, r"write must be bool \[1, 32\] or \[1, 32, 8\]; given float32"),
        ({}, {"frozen_chunk": 0}, "frozen_chunk must be at least 1 .*given 0"),
        ({}, {"objective": "l1"}, "objective one of decoding, encoding, similarity; given .*'l1'"),
    ],
)
def test_what_does_not_fit_is_told(changes, options, message):
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in changes.items()}
    with pytest.raises(ValueError, match=f"lattice: .*{message}"):
        shaped(arrays() | shapes, **options)


@pytest.mark.parametrize("frozen_chunk", [1, 4])
def test_a_base_belongs_to_frozen_chunks(frozen_chunk):
    shape = jax.ShapeDtypeStruct
    slots = shape((1, 8, 128, 128), jnp.float32)
    base = slots if frozen_chunk == 1 else None
    state = reference.State(slots, base, shape((1, 8), jnp.int32))
    with pytest.raises(
        ValueError,
        match=r"lattice: state.base must be (None; given \(1, 8|\(1, 8, 128, 128\); given None)",
    ):
        shaped(arrays() | {"state": state}, frozen_chunk=frozen_chunk)


# ---------------------------------------------------------------- what runs


def loss(given):
    o, state = lattice(**given, platform="tpu")
    return o.sum() + (state.slots**2).sum()


def kernels(fn):
    """How often each kernel is in the lowered program."""
    text = jax.jit(fn).trace(arrays()).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(r'kernel_name = "lattice_([^"]+)"', text)
    return {name: names.count(name) for name in sorted(set(names))}


def test_how_often_the_kernels_run():
    assert kernels(loss) == {"forward": 1}
    assert kernels(jax.value_and_grad(loss)) == {"backward": 1, "forward": 1}


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernel():
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    grad = jax.grad(jax.checkpoint(loss, policy=policy))
    assert kernels(grad) == {"backward": 1, "forward": 1}


# ---------------------------------------------------------------- the cell

CELLS = {"exact": Lattice(12, 20, frozen_chunk=1), "frozen": Lattice(12, 20, frozen_chunk=5)}


def cell_inputs(cell, seed=0):
    """Weights of two memories and inputs, whose keys and steps they share."""
    rng, shape = np.random.default_rng(seed), (2, 19)
    q, k = rng.standard_normal((2, *shape, 1, 12)) / 12**0.5
    v, beta = rng.standard_normal((*shape, 2, 20)) / 20**0.5, -rng.random((*shape, 2))
    xs = cell.inputs(q, k, v, beta, 0.5 * rng.random((*shape, 1)))
    params = cell.init_params(jax.random.key(0), 2)
    return params, jax.tree.map(np.float32, xs)


@pytest.mark.parametrize("name", ["exact", pytest.param("frozen", marks=pytest.mark.slow)])
def test_the_cell_runs_it(name):
    """As `scan` does; what a token that only reads would write does not matter."""
    cell, rng = CELLS[name], np.random.default_rng(1)
    params, xs = cell_inputs(cell)
    _, state = memjax.run(cell, *cell_inputs(cell, 2), implementation="scan")
    given = {"reset": rng.random((2, 19)) < 0.1, "write": rng.random((2, 19)) < 0.8, "state": state}
    given = jax.tree.map(jnp.asarray, given)
    wanted = memjax.run(cell, params, xs, **given, implementation="scan")
    hidden = jax.tree.map(lambda a: jnp.where(written(given, a), a, jnp.nan), xs)._replace(q=xs.q)
    never = jax.tree.map(jnp.zeros_like, {n: given[n] for n in ("reset", "write")})

    @jax.jit
    def run(xs, given):
        return memjax.run(cell, params, xs, **given, implementation="pallas")

    with interpreted():
        found, again, (_, kept) = run(xs, given), run(hidden, given), run(xs, given | never)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b, c in zip(*map(jax.tree.leaves, (found, wanted, again)), strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-5
        np.testing.assert_array_equal(a, c)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def written(given, leaf):
    return jnp.expand_dims(given["write"], range(2, leaf.ndim))


def test_slots_that_grow_have_no_kernel():
    cell = Lattice(12, 20, retraction=False)
    with interpreted(), pytest.raises(NotImplementedError, match="Lattice: .*retraction True"):
        memjax.run(cell, *cell_inputs(cell), implementation="pallas")
