"""Attention over a window: splash attention and the plain form against the definition in float64,
what cuDNN is given, refusals, and what is lowered."""

import dataclasses
import re
from functools import partial

import contract
import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest

import memjax
from memjax.blocks.bmojo import FadingWindow
from memjax.cells.attention import Attention
from memjax.cells.sliding_window import SlidingWindow
from pallas_kernels import deviceless, interpreted, ops, window_attention
from pallas_kernels.specs import held
from pallas_kernels.window_attention import api, reference
from pallas_kernels.window_attention.specs import SPECS, Spec

NAMED = {spec.name: spec for spec in SPECS}
EACH = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=() if "fast" in spec.tags else pytest.mark.slow, id=spec.name)
        for spec in SPECS
    ],
)


def cotangent(spec: Spec) -> np.ndarray:
    """That of o, held by the spec's dtype."""
    shape = (spec.B, spec.T, spec.H, spec.V)
    return held(np.random.default_rng(1).standard_normal(shape), spec.dtype)


def results(op, spec: Spec, dtype) -> dict[str, np.ndarray]:
    """o and the gradients of q, k and v, as float64."""
    given = spec.inputs()
    reset = given.pop("reset")
    x = {name: jnp.asarray(array, dtype) for name, array in given.items()}

    @jax.jit
    def run(x, do):
        o, backward = jax.vjp(lambda x: op(**x, reset=reset, window=spec.window), x)
        (gradients,) = backward(do.astype(o.dtype))
        return {"o": o} | {f"d{name}": a for name, a in gradients.items()}

    return {name: np.asarray(a, np.float64) for name, a in run(x, cotangent(spec)).items()}


def check(op, spec: Spec) -> None:
    """The bounds of `kernel_checks.check`. Gradients that are zero, where a query sees one token or
    equal keys, are sums of terms of size 1 that cancel: at most 1e-5 off."""
    half = spec.dtype == kernel_checks.HALF
    plain = reference.blocked if half else reference.definition
    with kernel_checks.on_cpu(), contract.x64(True):
        exact = results(reference.definition, spec, jnp.float64)
        allowed = dict.fromkeys(exact, 0.0)
        if half and spec.norm > 1:
            allowed |= rounding_of_o(spec, exact)
    with kernel_checks.on_cpu():
        own = results(plain, spec, jnp.dtype(spec.dtype))
    found = results(op, spec, jnp.dtype(spec.dtype))
    for name in [name for name, wanted in exact.items() if np.abs(wanted).max() < 1e-12]:
        assert np.abs(found.pop(name)).max() < 1e-5, f"{spec}: {name}"
        del exact[name]
    kernel_checks.assert_within(spec, found, own, exact, allowed)


def rounding_of_o(spec: Spec, exact) -> dict[str, float]:
    """How far dq and dk move when the do.o that flash attention subtracts from each do.v is made of
    o as rounded to bfloat16: where one weight is almost 1 the two cancel."""
    given = spec.inputs()
    q, k = (jnp.asarray(given[name], jnp.float64) for name in "qk")
    every = jnp.broadcast_to(jnp.eye(spec.T)[None, :, None], (spec.B, spec.T, spec.H, spec.T))
    weights = np.asarray(reference.definition(q, k, every, window=spec.window))
    lost = exact["o"] - held(exact["o"], spec.dtype)
    lost = spec.K**-0.5 * (cotangent(spec) * lost).sum(-1, keepdims=True) * weights
    moved = {"dq": np.einsum("bths,bshk->bthk", lost, k)}
    moved["dk"] = np.einsum("bths,bthk->bshk", lost, q)
    return {n: kernel_checks.distance(exact[n] + a, exact[n]) for n, a in moved.items()}


@EACH
def test_splash_attention(spec):
    with kernel_checks.running("tpu", True):
        check(partial(window_attention, block=spec.block), spec)


@EACH
def test_the_plain_form(spec):
    check(partial(window_attention, platform="cpu", block=spec.block and spec.block // 4), spec)


@EACH
def test_the_plain_form_is_the_definition(spec):
    with contract.x64(True):
        wanted = results(reference.definition, spec, jnp.float64)
        for block in (None, 7):
            found = results(partial(reference.blocked, block=block), spec, jnp.float64)
            for name, value in wanted.items():
                assert np.abs(found[name] - value).max() < 1e-12, name


@pytest.mark.parametrize("window, age", [(1, 0), (40, 39), (40, 40), (200, 131)])
def test_what_a_query_sees(window, age):
    """By gradient: o_t of the keys and values that are `age` old, and of later ones."""
    spec, at = Spec(name="", T=140, window=window, H=1), 133
    given = {name: jnp.asarray(a) for name, a in spec.inputs().items() if a is not None}
    with interpreted():
        grad = jax.grad(lambda x: (window_attention(**x, window=window)[:, at] ** 2).sum())(given)
    for name in "kv":
        size = np.abs(np.asarray(grad[name])).max((0, 2, 3))
        assert not size[at + 1 :].any() and not size[: max(0, at - window + 1)].any()
        if (name, window) != ("k", 1):
            assert (size[at - age] > 0) == (age < window)


def test_a_document_sees_nothing_of_others():
    spec = NAMED["resets"]
    given = {name: jnp.asarray(a) for name, a in spec.inputs().items()}
    alone = {name: a[:1, 40:128] for name, a in given.items()} | {"reset": None}
    with interpreted():
        whole = window_attention(**given, window=spec.window)
        found = window_attention(**alone, window=spec.window)
    np.testing.assert_allclose(whole[:1, 40:128], found, atol=1e-6)


# ---------------------------------------------------------------- mistakes


def plant(monkeypatch, change):
    """Splash attention of a changed mask."""
    original = api.tpu._Window
    fake = lambda shape, sizes, offset: original(shape, *change(sizes, offset))  # noqa: E731
    monkeypatch.setattr(api.tpu, "_Window", fake)
    api.tpu._kernel.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda sizes, offset: ((sizes[0] + 1, 0), offset),
        lambda sizes, offset: ((sizes[0], 1), offset),
        lambda sizes, offset: (sizes, offset + 1),
    ],
)
def test_the_check_finds_a_planted_mistake(change, monkeypatch):
    plant(monkeypatch, change)
    try:
        with interpreted(), pytest.raises(AssertionError, match="off, at most"):
            check(window_attention, NAMED["window_over_blocks"])
    finally:
        api.tpu._kernel.cache_clear()


# ---------------------------------------------------------------- cuDNN


@pytest.mark.parametrize("name", ["bf16", "bf16_groups", "longer_than_all", "window_in_a_block"])
def test_what_cudnn_is_given(name, monkeypatch):
    """The same call with XLA's form in cuDNN's place."""
    spec, asked = NAMED[name], []
    call = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        asked.append(implementation)
        return call(*(a.astype(jnp.float32) for a in arrays), implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    given = {key: a for key, a in spec.inputs().items() if a is not None}
    with kernel_checks.on_cpu():
        given = {key: jnp.asarray(a, jnp.bfloat16) for key, a in given.items()}
        found = window_attention(**given, window=spec.window, platform="gpu")
        given = {key: a.astype(jnp.float32) for key, a in given.items()}
        exact = reference.definition(**given, window=spec.window)
    assert asked == ["cudnn"]
    np.testing.assert_allclose(found, exact, atol=1e-5)


@kernel_checks.needs_gpu
@pytest.mark.parametrize("name", ["bf16", "bf16_one_token", "bf16_groups", "bf16_long_keys"])
def test_cudnn(name):
    check(window_attention, NAMED[name])


# ---------------------------------------------------------------- refusals


def shapes(length=256, total=None, heads=4, fewer=2, width=64, size=64, dtype=jnp.bfloat16):
    total = total or length
    return {
        "q": jax.ShapeDtypeStruct((1, length, heads, width), dtype),
        "k": jax.ShapeDtypeStruct((1, total, fewer, width), dtype),
        "v": jax.ShapeDtypeStruct((1, total, fewer, size), dtype),
    }


def traced(given, **options):
    options = {"window": 100, "platform": "tpu"} | options
    return jax.eval_shape(lambda given: window_attention(**given, **options), given)


@pytest.mark.parametrize(
    "given, options, message",
    [
        (shapes(width=32), {}, "K = 32"),
        (shapes(dtype=jnp.float16), {}, "float16"),
        (shapes(), dict(block=100), "multiple of 128; given 100"),
        (shapes(), dict(platform="cpu", plain=False), "tpu and gpu, none for cpu"),
        (shapes(dtype=jnp.float32), dict(platform="gpu"), "cuDNN: it takes bfloat16"),
        (shapes(size=128), dict(platform="gpu"), "K and V must be the same"),
        (shapes(total=300), dict(platform="gpu"), "in front of the first query"),
        (shapes(), dict(platform="gpu", reset=jnp.zeros((1, 256), bool)), "only as a mask"),
    ],
)
def test_a_refusal_has_its_reason(given, options, message):
    with pytest.raises(NotImplementedError, match=f"^window_attention .*{message}"):
        traced(given, **options)


def test_a_gpu_without_cudnn_is_refused(monkeypatch):
    def missing(*args, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    with pytest.raises(NotImplementedError, match="by cuDNN: cuDNN is not detected"):
        traced(shapes(), platform="gpu")


def test_cudnn_is_not_interpreted():
    with interpreted("gpu"), pytest.raises(NotImplementedError, match="cannot be interpreted"):
        traced(shapes(), platform=None)


@pytest.mark.parametrize(
    "given, options, message",
    [
        (shapes(fewer=3), {}, "3 heads of k and v do not divide the 4 of q"),
        (shapes(total=200), {}, "256 queries have 200 keys"),
        (shapes(length=0), {}, "T = 0"),
        (shapes(), dict(window=0), "at least 1; given 0"),
        (shapes(), dict(reset=jnp.zeros((1, 255), bool)), r"\[1, 256\]; given \[1, 255\]"),
        (shapes() | {"k": jax.ShapeDtypeStruct((1, 9, 2, 64), jnp.bfloat16)}, {}, "k must be"),
        ({key: jax.ShapeDtypeStruct((9, 2, 64), jnp.bfloat16) for key in "qkv"}, {}, "h, D"),
    ],
)
def test_shapes_that_do_not_fit_are_told(given, options, message):
    with pytest.raises(ValueError, match=f"^window_attention: .*{message}"):
        traced(given, **options)


# ---------------------------------------------------------------- what runs


def loss(given, **options):
    return (window_attention(**given, window=100, platform="tpu", **options) ** 2).sum()


def kernels(fn, given):
    """How often each kernel is in the lowered program."""
    text = jax.jit(fn).trace(given).lower(lowering_platforms=("tpu",)).as_text()
    names = re.findall(r'kernel_name = "splash_mha_([a-z]+)_[^"]*"', text)
    return {name: names.count(name) for name in sorted(set(names))}


def test_how_often_the_kernels_run():
    given, both = shapes(), {"dkv": 1, "dq": 1, "fwd": 1}
    assert kernels(loss, given) == {"fwd": 1}
    assert kernels(jax.value_and_grad(loss), given) == both
    twice = jax.checkpoint(lambda given: loss(given) ** 2)
    assert kernels(jax.value_and_grad(twice), given) == both | {"fwd": 2}


def test_vmap_is_a_loop():
    """Values and gradients; documents differ, the queries are shared."""
    one, two = (NAMED["groups"].inputs(seed) for seed in (0, 1))
    two |= {"q": one["q"], "reset": ~one["reset"]}
    many = {name: a if name == "q" else np.stack([a, two[name]]) for name, a in one.items()}

    @jax.jit
    def both(q, k, v, reset):
        run = partial(window_attention, window=60, reset=reset)
        o, pull_back = jax.vjp(run, q, k, v)
        return o, pull_back(o**2)

    with interpreted():
        wanted = jax.tree.map(lambda *a: np.stack(a), both(**one), both(**two))
        found = jax.vmap(both, in_axes=(None, 0, 0, 0))(*many.values())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert kernel_checks.distance(np.float64(a), np.float64(b)) < 1e-6


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older ones leave a dead call, jax 0.12")
def test_a_policy_saves_the_second_forward_kernel():
    policy = jax.checkpoint_policies.save_only_these_names("memory_state", "memory_out")
    grad = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
    assert kernels(grad, shapes()) == {"dkv": 1, "dq": 1, "fwd": 1}


@pytest.mark.parametrize("ambient", [None, "highest", "bfloat16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_precision_of_products_is_our_own(ambient, dtype):
    """In the kernels of both passes, whatever is ambient."""
    with jax.default_matmul_precision(ambient):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(shapes(dtype=dtype)).jaxpr
    calls = [e for e in ops.equations(jaxpr) if e.primitive.name == "pallas_call"]
    products = [e for call in calls for e in ops.equations(call.params["jaxpr"]) if ops.product(e)]
    highest = [jax.lax.Precision.HIGHEST in (e.params["precision"] or ()) for e in products]
    assert len(calls) == 3 and len(products) == 9 and highest == [dtype == jnp.float32] * 9


def test_the_plain_form_keeps_no_scores():
    """What the backward pass holds is no larger than keys with a window in front: the scores of one
    block are computed again."""
    given = shapes(length=4096, heads=1, fewer=1, dtype=jnp.float32)
    run = jax.grad(lambda x: window_attention(**x, window=1024, platform="cpu").sum())
    sizes = [
        v.aval.size for e in ops.equations(jax.make_jaxpr(run)(given).jaxpr) for v in e.outvars
    ]
    assert max(sizes) <= (4096 + 1024) * 64 < 4096 * 128


@pytest.mark.parametrize(
    "queries, keys, window, front, block",
    [(1024, 1536, 300, 400, 128), (2048, 2048, 700, 0, 512), (512, 512, 1, 0, 256)],
)
def test_the_blocks_that_are_visited(queries, keys, window, front, block, monkeypatch):
    """Those of the library's own mask."""
    given = 2, queries, keys, api.tpu.Static(window, front, block, False)
    found = api.tpu._kernel.__wrapped__(*given)
    monkeypatch.setattr(api.tpu, "_Window", api.tpu.splash.LocalMask)
    wanted = api.tpu._kernel.__wrapped__(*given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_block_that_costs_least():
    assert api._block(4096, 4096, 512) == 512
    assert api._block(4096, 4096, 1024) == 512
    assert api._block(4096, 4096, 257) == 256
    assert api._block(520, 520, 512) == 256  # whole blocks of 512 would be twice as many tokens
    assert api._block(100, 100, 4096) == 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("generation", deviceless.TOPOLOGIES)
def test_what_the_memory_table_has_not_compiles_too(generation, dtype):
    """Documents, tokens in front, shared keys, an odd length, the largest heads."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install memjax[tpu]")
    given = shapes(1001, 1300, 4, 1, 128, 256, jnp.dtype(dtype))
    given["reset"] = jax.ShapeDtypeStruct((1, 1300), bool)

    def both(q, k, v, reset):
        run = partial(window_attention, window=700, reset=reset, platform="tpu")
        return jax.value_and_grad(lambda *x: run(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    deviceless.compile_for(generation, both, *given.values())


# ---------------------------------------------------------------- cells


LENGTH = 37
WINDOWS = {
    "sliding_window": SlidingWindow(64, 64, window=11),
    "wider_than_all": SlidingWindow(64, 128, window=64, scale=0.3),
    "in_bfloat16": SlidingWindow(64, 64, window=11, store_dtype=jnp.bfloat16),
    "attention": Attention(64, 64, window=60),
}


def problem(cell, queries=1, keys=2):
    """Inputs of 2 memories with 2 queries each, numbers that bfloat16 holds; a ring, behind another
    number of tokens for each memory; where documents begin."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return held(rng.standard_normal((2, LENGTH, *shape)), "bfloat16")

    def inputs():
        return cell.inputs(
            normal(queries, 2, cell.key_dim), normal(keys, cell.key_dim), normal(2, cell.value_dim)
        )

    write = jnp.asarray(rng.random((2, LENGTH, 2)) < 0.7)  # the memories differ
    params = cell.init_params(jax.random.key(0), 2)
    _, state = memjax.run(cell, params, inputs(), write=write, implementation="scan")
    return inputs(), state, jnp.asarray(rng.random((2, LENGTH)) < 0.1)


def outputs(cell, form, xs, state, reset):
    """y, the final ring, and gradients of the inputs and of the ring that was carried in."""
    kept = () if state is None else tuple(state[:-1])

    def loss(xs, kept):
        ring = None if state is None else type(state)(*kept, state.written)
        y, new = memjax.run(cell, {}, xs, state=ring, reset=reset, implementation=form)
        return (y**3).sum() + (new.k**2).sum() + (new.v**3).sum(), (y, new)

    found = jax.value_and_grad(loss, (0, 1), has_aux=True)(xs, kept)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), (found[0][1], found[1]))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_cells_run_it(name, documents, carried):
    cell = WINDOWS[name]
    xs, state, reset = problem(cell, queries=1 + carried, keys=2 - carried)
    given = xs, state if carried else None, reset if documents else None
    with interpreted():
        found = outputs(cell, "pallas", *given)
    rounded = 1e-5
    if cell.store_dtype == jnp.bfloat16:  # gradients of what is stored are rounded to it
        cell, rounded = dataclasses.replace(cell, store_dtype=jnp.float32), 2.0**-8
        if carried:
            wide = (a.astype(jnp.float32) for a in state[:-1])
            given = xs, type(state)(*wide, state.written), given[2]
    wanted = outputs(cell, "scan", *given)
    for part, allowed in ((0, 1e-5), (1, rounded)):
        pairs = zip(jax.tree.leaves(found[part]), jax.tree.leaves(wanted[part]), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
            assert kernel_checks.distance(np.nan_to_num(a), np.nan_to_num(b)) < allowed
    past = name == "attention" and carried and not documents
    assert np.isnan(wanted[0][0]).any() == past  # what does not fit its capacity


@pytest.mark.parametrize("length", [1, 5])
def test_a_cell_goes_on_from_nothing(length):
    cell = WINDOWS["sliding_window"]
    xs, _, _ = problem(cell)
    xs = jax.tree.map(lambda a: a[:, :length], xs)
    empty = memjax.initial_state(cell, {}, 2, 2)
    wanted = outputs(cell, "scan", xs, None, None)[0]
    with interpreted():
        found = outputs(cell, "pallas", xs, empty, None)[0]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "cell, options, message",
    [
        (SlidingWindow(64, 64, window=9, sinks=2), {}, "SlidingWindow has a kernel for a window"),
        (SlidingWindow(64, 64, window=9, persistent=1), {}, "for a window alone"),
        (SlidingWindow(64, 64, window=9), dict(write=True), "no kernel for a write mask"),
        (SlidingWindow(8, 8, window=9), {}, "K = 8"),
    ],
)
def test_what_a_cell_refuses(cell, options, message):
    xs, *_ = problem(cell)
    options = {name: jnp.ones((2, LENGTH), bool) for name in options}
    params = cell.init_params(jax.random.key(0), 2)
    with interpreted(), pytest.raises(NotImplementedError, match=f"^pallas: .*{message}"):
        memjax.run(cell, params, xs, implementation="pallas", **options)


def test_a_cell_that_sees_its_tokens_twice_refuses():
    cell = FadingWindow(64, 64, window=9)
    xs = cell.inputs(*(np.zeros((1, 5, 2, *n), np.float32) for n in ((1, 64), *4 * [(64,)])))
    with interpreted(), pytest.raises(NotImplementedError, match="FadingWindow has a kernel for"):
        memjax.run(cell, {}, xs, implementation="pallas")


def test_a_cell_does_not_take_the_plain_form_in_silence():
    cell = WINDOWS["sliding_window"]
    xs, *_ = problem(cell)
    with pytest.raises(NotImplementedError, match="window_attention .* none for cpu"):
        memjax.run(cell, {}, xs, implementation="pallas")
