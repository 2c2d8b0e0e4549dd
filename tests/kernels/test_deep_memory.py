"""Matrices and networks trained by gradient steps: against their references, by the interpreters,
as lowered, and through the cells."""

import dataclasses
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
from memjax.cells.atlas import Atlas, OmegaNet
from memjax.cells.titans import Titans
from memjax.typing import fields
from pallas_kernels import deep_memory, deep_network, interpreted, ops
from pallas_kernels.deep_memory import factors, layout, reference, specs, tpu, tpu_vjp
from pallas_kernels.deep_memory.specs import Spec
from pallas_kernels.deep_network import network, plain, windows
from pallas_kernels.deep_network import reference as network_reference
from pallas_kernels.deep_network import specs as network_specs
from pallas_kernels.deep_network import tpu as network_tpu
from pallas_kernels.deep_network import tpu_vjp as network_vjp

OPS = {
    "deep_memory": (deep_memory, reference, specs.SPECS),
    "deep_network": (deep_network, network_reference, network_specs.SPECS),
}
FLAT = {"deep_memory": specs.flat, "deep_network": network_specs.flat}
CASES = kernel_checks.cases(OPS)


def check(case, how=True):
    """`kernel_checks.check`; in bfloat16 the plain form is the token loop with float32 sums."""
    spec, flat, (op, source, _) = case.spec, FLAT[case.op], OPS[case.op]
    options = {} if spec.chunk is None else {"chunk": spec.chunk}
    op, loop = flat(op, spec, **options), flat(source.sequential, spec)
    with kernel_checks.running("tpu", how):
        kernel_checks.check(op, loop, loop, spec)


@pytest.mark.parametrize("case", kernel_checks.marked(CASES))
def test_values_and_gradients(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES.values() if "race" in c.spec.tags], ids=str)
def test_no_races_and_no_uninitialised_memory(case):
    check(case, race())


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name",
    [
        (tpu, "deep_memory-ragged"),
        (tpu_vjp, "deep_memory-ragged"),
        (network_tpu, "deep_network-blocks"),
        (network_vjp, "deep_network-blocks"),
    ],
)
def test_a_walk_in_parallel_is_found(module, name, monkeypatch):
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    fake = SimpleNamespace(**{**vars(pltpu), "CompilerParams": lambda **_: parallel})
    monkeypatch.setattr(module, "pltpu", fake)
    with pytest.raises(Exception, match="RACE DETECTED|not finite|off, at most"):
        check(CASES[name], race())


SMALL: dict = {"name": "", "T": 24, "K": 8, "V": 4, "frozen": 4, "state": False}
MATRIX, NETWORK = partial(Spec, **SMALL), partial(network_specs.Spec, **SMALL, hidden=(16,))


@pytest.mark.parametrize(
    "op, form, spec, bound",
    [
        ("deep_memory", reference.chunked, MATRIX(), 1e-10),
        ("deep_memory", reference.chunked, MATRIX(momentum=False, context=5), 1e-10),
        ("deep_memory", reference.chunked, MATRIX(context=3, loss="dot"), 1e-10),
        ("deep_network", plain.chunked, NETWORK(context=3), 1e-5),
    ],
)
def test_the_chunked_form_is_the_token_loop(op, form, spec, bound):
    """From the initial state, all tokens written: the form whose cost is the plain form's. That of
    a network has float32 sums."""

    def chunked(*given, state, reset, write, **others):
        return form(*given, **others)

    with contract.x64(True):
        wanted = kernel_checks.results(FLAT[op](OPS[op][1].sequential, spec), spec, jnp.float64)
        found = kernel_checks.results(FLAT[op](chunked, spec), spec, jnp.float64)
    for leaf, value in wanted.items():
        assert kernel_checks.distance(found[leaf], value) < bound, leaf


def sees_its_own_chunk(x):
    """Bases that stand behind their own row."""
    return x._replace(paths_of_bases=x.paths)


def keeps_the_base(x):
    return x._replace(carried=jnp.ones_like(x.carried))


def starts_at_zero(x):
    return x._replace(coefficients=x.coefficients.at[:, -1:].set(0))


def forgets_momentum(x):
    return x._replace(mu=jnp.ones_like(x.mu))


def forgets_older_pairs(x):
    at = jnp.eye(len(x.paths), dtype=bool)
    return x._replace(paths=jnp.where(at, x.paths, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name, mistake",
    [
        (tpu, "resets", sees_its_own_chunk),
        (tpu, "omega", forgets_older_pairs),
        (tpu_vjp, "ragged", keeps_the_base),
        (tpu_vjp, "resets", starts_at_zero),
        (tpu_vjp, "resets", forgets_momentum),
    ],
)
def test_the_check_finds_a_planted_mistake(module, name, mistake, monkeypatch):
    def mistaken(*given):
        found = yield from factors.factors(*given)
        return mistake(found)

    monkeypatch.setattr(module, "factors", mistaken)
    with pytest.raises(AssertionError, match="off, at most|not finite"):
        check(CASES[f"deep_memory-{name}"])


def never_opens(layers, q, k, v, numbers, *more):
    return layers, q, k, v, numbers.at[:, windows.FLAGS - windows.EXTRA].set(0), *more


def keeps_no_momentum(layers, q, k, v, numbers, *more):
    return layers, q, k, v, numbers.at[:, windows.MOMENTUM - windows.EXTRA].set(0), *more


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name, mistake",
    [(network_tpu, "resets", never_opens), (network_vjp, "initial", keeps_no_momentum)],
)
def test_the_check_finds_a_mistake_in_a_window(module, name, mistake, monkeypatch):
    def mistaken(*given, **more):
        return network.answered(*mistake(*given), **more)

    monkeypatch.setattr(module, "answered", mistaken)
    with pytest.raises(AssertionError, match="off, at most|not finite"):
        check(CASES[f"deep_network-{name}"])


@pytest.mark.parametrize("context, frozen", [(2, 1), (4, 3), (3, 16)])
def test_rows_of_a_tile_are_enough(context, frozen):
    """Every token has a row, and every pair that it learns from one in the same tile that its
    numbers tell, by counting in the tokens' own order."""
    rng, length, rows = np.random.default_rng(0), 61, 32
    reset, write = rng.random((1, length)) < 0.1, rng.random((1, length, 1)) < 0.7
    zero = jnp.zeros((1, 1), jnp.int32)
    found = layout.layout(
        jnp.asarray(reset),
        jnp.asarray(write),
        zero + frozen - 1,
        zero + 1,
        (1, length, 1),
        frozen_chunk=frozen,
        context=context,
        rows=rows,
    )
    source, slot, asking, paired = (
        np.asarray(a)[0, :, 0] for a in (found.source, found.slot, found.asking, found.paired)
    )
    older, pairs = context - 1, [context - 2]  # the one that was carried in
    for t in range(length):
        pairs = [] if reset[0, t] else pairs
        row = slot[t]
        assert source[row] == older + t
        if not write[0, t, 0]:
            continue
        pairs = [*pairs, older + t]
        tile = slice(row // rows * rows, row // rows * rows + rows)
        age = asking[row] - paired[tile]
        seen = {a: source[tile][age == a].tolist() for a in range(context)}
        wanted = dict(enumerate(pairs[::-1][:context]))
        assert seen == {a: [wanted[a]] if a in wanted else [] for a in range(context)}


# ---------------------------------------------------------------- refusals


def arrays(heads=2, width=64, dtype=jnp.float32):
    return ops.arguments("deep_memory", "momentum", (1, 32, heads, width), dtype)


def shaped(given, **options):
    options = {"platform": "tpu", "frozen_chunk": 4, **options}
    return jax.eval_shape(lambda given: deep_memory(**given, **options), given)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(platform="cpu"), "none for cpu"),
        ({}, dict(platform="gpu"), "none for gpu"),
        (dict(width=257), {}, "K = 257"),
        (dict(dtype=jnp.float16), {}, "float16"),
        ({}, dict(chunk=24), "given 24"),
        (dict(heads=60, width=256), {}, "60 heads"),
    ],
)
def test_a_refusal_has_its_reason(changes, options, message):
    with pytest.raises(NotImplementedError, match=f"deep_memory .*{message}"):
        shaped(arrays(**changes), **options)


def test_more_pairs_than_a_tile_holds_are_refused():
    given = arrays() | {"rates": jax.ShapeDtypeStruct((1, 32, 2, 70), jnp.float32)}
    with pytest.raises(NotImplementedError, match="learns from 70 in frozen chunks of 4"):
        shaped(given)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"k": (1, 31, 2, 64)}, {}, r"k must be \[1, 32, 2, 64\]; given \[1, 31, 2, 64\]"),
        ({"q": (1, 32, 1, 64), "k": (1, 32, 1, 64)}, {}, r"q must be \[1, 32, 2, 64\]"),
        ({"m": (1, 32, 1)}, {}, r"m must be \[1, 32, 2\]; given \[1, 32, 1\]"),
        ({"rates": (1, 32, 1, 1)}, {}, r"rates must be \[1, 32, 2, 1\]"),
        ({"start": (2, 64, 32)}, {}, r"start must be \[2, 64, 64\]"),
        ({"write": (1, 32)}, {}, r"write must be bool \[1, 32\] or \[1, 32, 2\]; given float32"),
        ({"state": (1, 2)}, {}, r"state.momentum must be \(1, 2, 64, 64\); given None"),
        ({}, {"frozen_chunk": 0}, "frozen_chunk must be at least 1 .*given 0"),
        ({}, {"loss": "l1"}, "loss one of l2, dot; given .*'l1'"),
    ],
)
def test_what_does_not_fit_is_told(changes, options, message):
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in changes.items()}
    if "state" in shapes:
        matrix, place = of_shape(1, 2, 64, 64), shapes["state"]
        shapes["state"] = reference.State(matrix, None, matrix, place, None, None, None)
    with pytest.raises(ValueError, match=f"deep_memory: .*{message}"):
        shaped(arrays() | shapes, **options)


def networks(**changes):
    """Shapes of a network of two layers."""
    return ops.arguments("deep_network", "momentum", (1, 32, 2, 64), jnp.float32) | changes


def of_shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    "changes, options, error, message",
    [
        ({}, dict(platform="cpu"), NotImplementedError, "none for cpu"),
        (
            {"start": (of_shape(2, 64, 9000), of_shape(2, 9000, 64))},
            {},
            NotImplementedError,
            "does not fit a TPU core: layers of widths 64, 9000, 64 in float32; use bfloat16",
        ),
        (
            {"state": network_reference.State(*[None] * 7)},
            {},
            ValueError,
            r"state.weights must be \(\(1, 2, 64, 256\), .*; given None",
        ),
        ({"start": of_shape(2, 64, 64)}, {}, ValueError, "start must be a tuple of two layers"),
        (
            {"start": (of_shape(2, 64, 128), of_shape(2, 64, 64))},
            {},
            ValueError,
            r"start\[1\] must be \[2, 128, 64\]; given \[2, 64, 64\]",
        ),
        ({}, dict(loss="l1"), ValueError, "loss one of l2, dot; given .*'l1'"),
    ],
)
def test_what_a_network_refuses(changes, options, error, message):
    options = {"platform": "tpu", "frozen_chunk": 4, **options}
    with pytest.raises(error, match=f"deep_network:? .*{message}"):
        jax.eval_shape(lambda given: deep_network(**given, **options), networks(**changes))


# ---------------------------------------------------------------- what runs


SHAPES = {"deep_memory": arrays, "deep_network": networks}


def loss(op, given):
    o, state = OPS[op][0](**given, frozen_chunk=4, platform="tpu")
    return o.sum() + sum((layer**2).sum() for layer in jax.tree.leaves(state.weights))


def kernels(op, fn):
    """How often each kernel is in the lowered program."""
    text = jax.jit(fn).trace(SHAPES[op]()).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(rf'kernel_name = "{op}_([^"]+)"', text)
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("op", OPS)
def test_how_often_the_kernels_run(op):
    one = partial(loss, op)
    assert kernels(op, one) == {"forward": 1}
    assert kernels(op, jax.value_and_grad(one)) == {"backward": 1, "forward": 1}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernel(op):
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    grad = jax.grad(jax.checkpoint(partial(loss, op), policy=policy))
    assert kernels(op, grad) == {"backward": 1, "forward": 1}


# ---------------------------------------------------------------- cells

CELLS = {
    "titans": Titans(64, 64, frozen_chunk=8),
    "narrow": Titans(24, 16, frozen_chunk=5),
    "omega_net": OmegaNet(64, 64, frozen_chunk=8, context=3),
    "swla": OmegaNet(64, 64, frozen_chunk=8, context=3, loss="dot"),
    "atlas": Atlas(64, 64, frozen_chunk=8, context=2, newton_schulz=0),
    "network": OmegaNet(24, 16, 2, 2, frozen_chunk=5, context=3),
}


def cell_inputs(cell, seed=0):
    """Weights of two memories and inputs, whose keys and rates they share."""
    rng, shape, heads = np.random.default_rng(seed), (2, 37), 2
    made = {
        "query": (1, lambda x: x),
        "key": (1, lambda x: x / 8),
        "value": (heads, lambda x: x),
        "log_decay": (heads, lambda x: -np.abs(x)),
        "rate": (1, lambda x: np.abs(x) % 1 / 8),
    }

    def leaf(field):
        count, make = made[field.kind]
        sizes = [cell.axis(a) or cell.pairs for a in field.shape.split()]
        return make(rng.standard_normal((*shape, count, *sizes))).astype(np.float32)

    params = cell.init_params(jax.random.key(0), heads)
    return params, cell.inputs(*map(leaf, fields(cell.inputs).values()))


def carried(cell):
    """What else `memjax.run` takes: resets, tokens that only read, a state behind other tokens."""
    rng = np.random.default_rng(1)
    _, state = memjax.run(cell, *cell_inputs(cell, 2), implementation="chunked")
    masks = {"reset": rng.random((2, 37)) < 0.1, "write": rng.random((2, 37)) < 0.8}
    return jax.tree.map(jnp.asarray, masks) | {"state": state}


@pytest.mark.parametrize("name", CELLS)
def test_cells_run_it(name):
    cell = CELLS[name]
    (params, xs), given = cell_inputs(cell), carried(cell)
    wanted = memjax.run(cell, params, xs, **given, implementation="chunked")
    with interpreted():
        found = memjax.run(cell, params, xs, **given, implementation="pallas")
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-5


def test_what_a_token_that_only_reads_would_write_does_not_matter():
    cell = CELLS["omega_net"]
    (params, xs), given = cell_inputs(cell), carried(cell)
    hidden = {
        leaf: jnp.where(jnp.expand_dims(given["write"], range(2, array.ndim)), array, jnp.nan)
        for leaf, array in xs._asdict().items()
        if leaf != "q"
    }
    never = given | {"write": jnp.zeros((2, 37, 2), bool), "reset": None}
    with interpreted():
        run = partial(memjax.run, cell, params, implementation="pallas")
        wanted, found = (run(x, **given) for x in (xs, xs._replace(**hidden)))
        _, kept = run(xs, **never)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(given["state"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_newton_schulz_has_no_kernel():
    cell = dataclasses.replace(CELLS["atlas"], newton_schulz=1)
    params, xs = cell_inputs(cell)
    with interpreted(), pytest.raises(NotImplementedError, match="Atlas: .*use 'chunked'"):
        memjax.run(cell, params, xs, implementation="pallas")
