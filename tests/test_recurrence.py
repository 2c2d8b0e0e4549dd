"""Heads, chunks, document borders, decays, the triangular inverse, and what `run` refuses."""

import dataclasses
from functools import partial

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax
from memjax import recurrence
from memjax.cells import linear_attention
from memjax.cells._heads import Inputs as AttentionInputs
from memjax.cells._matrix import decay_to_end, decays, unit_lower_inverse
from memjax.cells.attention import Attention
from memjax.cells.delta_net import DeltaNet, Inputs


def plain_lags(x, tail, reset, write):
    """The definition of `lags`, token by token."""
    batch, length, dim = x.shape
    n = tail.shape[1]
    lags = np.zeros((n, batch, length, dim), x.dtype)
    ends = np.zeros_like(tail)
    for b in range(batch):
        line = list(tail[b])
        for t in range(length):
            if reset[b, t]:
                line = [np.zeros(dim, x.dtype)] * n
            for j in range(n):
                lags[j, b, t] = line[-1 - j]
            if write[b, t]:
                line.append(x[b, t])
        ends[b] = line[-n:]
    return lags, ends


@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("masks", ["none", "reset", "write", "both", "never"])
def test_lags_follow_documents_and_written_tokens(length, masks):
    rng = np.random.default_rng(length)
    x = rng.normal(size=(contract.BATCH, length, 2)).astype(np.float32)
    tail = rng.normal(size=(contract.BATCH, 3, 2)).astype(np.float32)
    reset = contract.reset_mask(length, rng) if masks in ("reset", "both") else None
    write = rng.random((contract.BATCH, length)) < 0.6 if masks in ("write", "both") else None
    write = np.zeros((contract.BATCH, length), bool) if masks == "never" else write
    past, new_tail = jax.jit(recurrence.lags)(x, tail, reset, write)
    no = np.zeros((contract.BATCH, length), bool)
    expected = plain_lags(x, tail, no if reset is None else reset, ~no if write is None else write)
    contract.assert_identical((np.stack(past), np.asarray(new_tail)), expected, masks)


def test_convolution_does_not_cross_packed_documents():
    """The gradient of a lag with respect to another document is zero exactly."""
    x = jnp.ones((1, 12, 1))
    reset = jnp.zeros((1, 12), bool).at[0, jnp.array([4, 5])].set(True)

    def answers(x):
        return sum(recurrence.lags(x, jnp.ones((1, 3, 1)), reset, None)[0])[0, :, 0]

    seen = np.asarray(jax.jacobian(answers)(x))[:, 0, :, 0] != 0
    document = np.cumsum(np.asarray(reset)[0])
    near = np.tri(12, k=-1, dtype=bool) & ~np.tri(12, k=-4, dtype=bool)
    assert np.array_equal(seen, near & (document[:, None] == document))


@pytest.mark.parametrize("masks", ["none", "reset", "write", "both"])
def test_positions_count_written_tokens(masks):
    length, rng = 17, np.random.default_rng(3)
    reset = contract.reset_mask(length, rng) if masks in ("reset", "both") else None
    write = rng.random((contract.BATCH, length)) < 0.6 if masks in ("write", "both") else None
    start = np.array([0, 4, 9], np.int32)
    before, after = contract.to_numpy(recurrence.positions(reset, write, start, length))
    expected, ends = np.zeros_like(before), []
    for b in range(contract.BATCH):
        count = start[b]
        for t in range(length):
            count = 0 if reset is not None and reset[b, t] else count
            expected[b, t] = count
            count += 1 if write is None else write[b, t]
        ends.append(count)
    assert np.array_equal(before, expected) and np.array_equal(after, ends)
    assert before.dtype == after.dtype == np.int32


@pytest.mark.parametrize("counts", [(1, 1), (1, 6), (2, 6), (6, 3), (3, 6)])
def test_per_head_shares_leaves(counts):
    """The lifted form gives each head the leaf of its group, in the order of `np.repeat`."""

    class Sum:
        @recurrence.per_head
        def form(self, params, state, xs, reset, write):
            a, b = xs
            return a * b + params + state, state + jnp.sum(a)

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 5, h)).astype(np.float32) for h in counts)
    heads = max(counts)
    params = rng.normal(size=heads).astype(np.float32)
    state = rng.normal(size=(2, heads)).astype(np.float32)
    y, new = Sum().form(params, state, (a, b), None, None)
    a, b = (contract.repeat(leaf, heads) for leaf in (a, b))
    np.testing.assert_allclose(y, a * b + params + state[:, None], rtol=1e-6)
    np.testing.assert_allclose(new, state + a.sum(1), rtol=1e-5)


def test_per_head_refuses_counts_that_do_not_divide():
    xs = inputs(heads=6)._replace(k=inputs(heads=4).k)
    for form in ("scan", "chunked"):
        with pytest.raises(ValueError, match=r"6 memories; .* divisors; given .*'k': 4"):
            memjax.run(DeltaNet(8, 6), {}, xs, implementation=form)


def test_chunks_pad_with_zeros_and_join():
    x = np.arange(14, dtype=np.float32).reshape(7, 2) + 1
    chunks = np.asarray(recurrence.to_chunks(x, 4))
    assert chunks.shape == (2, 4, 2) and not chunks[1, 3].any()
    assert np.array_equal(recurrence.from_chunks(chunks, 7), x)
    assert recurrence.to_chunks((None, x), 7)[0] is None


def test_a_second_pass_is_made_where_a_sequence_needs_it():
    """A condition over all of a batch: one `cond` under two `vmap`s, in gradients too; right when
    one sequence of many is behind a border, and not made when none is."""

    def window(x, before):
        phases = recurrence.Phases(2, None, None, None, before)
        return phases.with_second_pass(lambda y: (jnp.where(before, y, jnp.sin(1 / y)),), (x,))[
            0
        ].sum()

    mapped = jax.vmap(jax.vmap(jax.value_and_grad(window)))
    x = np.ones((3, 2, 4), np.float32)
    x[0] = 0  # sin(1 / 0) is not a number, and is not computed
    before = np.ones((3, 2, 4), bool)
    whole = mapped(x, before)
    assert np.array_equal(whole[0], x.sum(-1)) and np.array_equal(whole[1], np.ones_like(x))
    before[2, 1, 3:] = False
    value, slope = mapped(x + 1, before)
    assert np.allclose(value[2, 1], 6 + np.sin(1 / 2)) and np.allclose(value[2, 0], 8)
    assert np.allclose(slope[2, 1], [1, 1, 1, -np.cos(1 / 2) / 4])
    assert " cond[" in str(jax.make_jaxpr(mapped)(x, before))


def test_power_of_two_at_least():
    powers = {1: 1, 2: 2, 3: 4, 8: 8, 9: 16, 64: 64, 65: 128}
    assert {n: recurrence.power_of_two_at_least(n) for n in powers} == powers


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64])
def test_unit_lower_inverse(size):
    """Random and the worst case: equal keys with beta 2, where powers of L reach 1e30."""
    rng = np.random.default_rng(size)
    below = np.tri(size, k=-1)
    for lower in (0.5 * rng.normal(size=(3, size, size)) * below / np.sqrt(size), 2 * below[None]):
        exact = np.linalg.inv(np.eye(size) + lower)
        out = np.asarray(unit_lower_inverse(jnp.asarray(lower, jnp.float32)))
        assert contract.distance(out, exact) < 1e-6
        assert not out[:, np.triu(np.ones((size, size), bool), 1)].any()


def test_unit_lower_inverse_of_powers_would_fail():
    lower = 2 * np.tri(64, k=-1, dtype=np.float32)
    exact = np.linalg.inv(np.eye(64) + np.float64(lower))
    power, inverse = -lower, np.eye(64, dtype=np.float32) - lower
    for _ in range(5):
        power = power @ power
        inverse = inverse + inverse @ power
    assert contract.distance(inverse, exact) > 1


def test_unit_lower_inverse_gradient():
    lower = 0.3 * np.random.default_rng(0).normal(size=(32, 32)) * np.tri(32, k=-1)
    weights = np.random.default_rng(1).normal(size=(32, 32))
    grad = jax.grad(lambda a: jnp.sum(weights * unit_lower_inverse(a)))(jnp.float32(lower))
    inverse = np.linalg.inv(np.eye(32) + lower)
    exact = -np.tril(inverse.T @ weights @ inverse.T, -1)
    assert contract.distance(grad, exact) < 1e-5


def test_a_chunk_of_one_token_has_gradients_inside_a_loop():
    """Its inverse is a constant, whose custom derivative jax 0.12 cannot batch there."""
    beta, values = np.float32([[[0.5, 2.0]]]), np.ones((1, 1, 2), np.float32)  # [T, B, H]

    def corrected(beta, value):
        inverse = unit_lower_inverse(beta * jnp.zeros((1, 1, 1), jnp.float32))
        return jnp.sum(inverse * jnp.reshape(beta, (1, 1))[:, None, :] * value)

    def loss(beta):
        def body(carry, inputs):
            return carry, jax.vmap(jax.vmap(corrected))(*inputs)

        return jnp.sum(jax.lax.scan(body, 0.0, (beta, values))[1])

    assert np.array_equal(jax.jit(jax.grad(loss))(beta), values)


def test_unit_lower_inverse_refuses_other_sizes():
    with pytest.raises(ValueError, match="C must be a power of two; given 12"):
        unit_lower_inverse(jnp.zeros((12, 12)))


def held(decay, chunks, size, width):
    """All decays between the tokens of chunks, [N, C, C, K], and those since the start."""
    one = np.ones((chunks, size, 1), np.float32)
    pairs = [
        decay.pairs(jnp.pad(one, ((0, 0), (0, 0), (d, width - 1 - d))), one * np.ones(width))
        for d in range(width)
    ]
    return jnp.stack(pairs, -1), jnp.broadcast_to(decay.since_start, (chunks, size, width))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("with_reset", [False, True])
def test_decays(with_reset, channels, before):
    """Chunks of 64 tokens, so that decays per channel cross several blocks."""
    rng, size = np.random.default_rng(0), 64
    g = -rng.random((3, size, channels)).astype(np.float32) / 8
    g[0, 2], g[1, 5, 0], g[2, 0], g[2, 40] = -1e3, -1e4, 0, -1e3
    reset = contract.reset_mask(size, rng) if with_reset else None
    like = np.zeros((3, size, 3), np.float32)

    def every(g, reset):
        return *held(decays(g, reset, like, before), 3, size, 3), decay_to_end(g, reset, like)

    between, since_start, to_end = contract.to_numpy(jax.jit(every)(g, reset))
    document = np.cumsum(np.zeros((3, size)) if reset is None else reset, axis=1)
    g = np.broadcast_to(np.float64(g), (3, size, 3))
    expected = np.zeros((3, size, size, 3))
    for n, i, j in np.ndindex(3, size, size):
        if j <= i - before and document[n, i] == document[n, j]:
            expected[n, i, j] = np.exp(np.sum(g[n, j + 1 : i + 1 - before], axis=0))
    since = np.cumsum(g, axis=1)
    if before:
        since = np.concatenate([np.zeros((3, 1, 3)), since[:, :-1]], axis=1)
    since = np.where((document == 0)[..., None], np.exp(since), 0)
    after = np.cumsum(g[:, ::-1], axis=1)[:, ::-1]
    after = np.concatenate([after[:, 1:], np.zeros((3, 1, 3))], axis=1)
    after = np.where((document == document[:, -1:])[..., None], np.exp(after), 0)
    np.testing.assert_allclose(between, expected, rtol=3e-6, atol=1e-30)
    np.testing.assert_allclose(since_start, since, rtol=3e-6, atol=1e-30)
    np.testing.assert_allclose(np.broadcast_to(to_end, after.shape), after, rtol=3e-6, atol=1e-30)


STRONG = (-0.1, -1e3, -1e4, 0, -80, -90, -0.2, -1e4)


@pytest.mark.parametrize("channels", [1, 3])
def test_decays_of_strong_gates_have_finite_gradients(channels):
    g = jnp.broadcast_to(jnp.asarray(STRONG * 8)[None, :, None], (1, 64, channels))
    like = jnp.zeros((1, 64, 3))

    def total(g):
        return sum(jnp.sum(a) for before in (False, True) for a in every(g, before))

    def every(g, before):
        return held(decays(g, None, like, before), 1, 64, 3)

    assert np.isfinite(np.asarray(jax.jit(jax.grad(total))(g))).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_decay_elsewhere_costs_no_precision(channels):
    """A difference of two long sums would lose the small decay behind a strong one."""
    g = np.full((1, 64, channels), -1e-3, np.float32)
    g[0, 1] = -9e3
    like = jnp.zeros((1, 64, 3))
    between, _ = jax.jit(lambda g: held(decays(g, None, like), 1, 64, 3))(g)
    for i in (7, 50):
        np.testing.assert_allclose(between[0, i, 3], np.exp(-1e-3 * (i - 3)), rtol=1e-6)


# What `run` refuses.

CELL = DeltaNet(8, 6)


def inputs(batch=2, length=5, heads=3):
    lead = (batch, length, heads)
    return Inputs(*(jnp.zeros((*lead, *tail)) for tail in ((8,), (8,), (6,), ())))


def given(**changes):
    return dict(params={}, xs=inputs()) | changes


STATE = jnp.zeros((2, 3, 8, 6))
MASK = jnp.zeros((2, 5), bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            given(xs=inputs()._replace(v=jnp.zeros((2, 5)))),
            r"v must be \[B, T, h, 6\]; given",
        ),
        (given(xs=inputs()._replace(k=inputs().v)), r"k must be \[B, T, h, 8\]; .* \[2, 5, 3, 6\]"),
        (given(xs=inputs()._replace(beta=inputs().v)), r"beta must be \[B, T, h\]; given"),
        (
            given(xs=()),
            r"must be memjax.cells.delta_net.Inputs\(q, k, v, beta\); given tuple",
        ),
        (
            given(xs=linear_attention.Inputs(*inputs()[:3])),
            r"must be .*delta_net.Inputs\(q, k, v, beta\); given Inputs\(q, k, v\)",
        ),
        (given(xs=inputs()._replace(v=inputs(length=4).v)), r"differ in their axes \[B, T\]"),
        (given(xs=inputs(length=0)), r"empty \(T = 0\); give at least one token"),
        (given(reset=MASK[:, :4]), r"reset must be bool\[2, 5\]; given bool\(2, 4\)"),
        (given(reset=MASK.astype(int)), r"reset must be bool\[2, 5\]; given int32\(2, 5\)"),
        (given(reset=jnp.zeros((2, 5, 3), bool)), r"reset must be bool\[2, 5\]; given"),
        (given(write=MASK[:1]), r"write must be bool\[2, 5\]; given bool\(1, 5\)"),
        (given(write=MASK.astype(jnp.float32)), r"write must be bool\[2, 5\]; given float32"),
        (given(state=(STATE, STATE)), r"the state does not fit; given .*\[1\].*, expected"),
        (given(state=STATE[:1]), r"given .*\[1, 3, 8, 6\].*expected .*\[2, 3, 8, 6\]"),
        (given(state=STATE.astype(jnp.bfloat16)), r"given .*bfloat16.*expected .*float32"),
        (given(state=STATE[:, :, :4]), r"the state does not fit; given .*expected"),
        (given(implementation="fast"), "'fast': allowed are pallas, chunked, scan, or None"),
        (given(implementation=("pallas", "fast")), "'fast': allowed are"),
    ],
)
def test_run_says_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        memjax.run(CELL, **arguments)


def test_run_names_the_cell():
    with pytest.raises(ValueError, match="^DeltaNet: "):
        memjax.run(CELL, **given(xs=inputs(length=0)))


def test_run_gives_every_reason():
    class Bare(DeltaNet):
        pallas = memjax.MemoryCell.pallas

        def chunked(self, params, state, xs, reset, write):
            raise NotImplementedError("not today")

    with pytest.raises(NotImplementedError, match="Bare has no Pallas kernel; use 'chunked'"):
        memjax.run(Bare(8, 6), **given(implementation="pallas"))
    message = "^pallas: Bare has no Pallas kernel; use 'chunked'; chunked: not today$"
    with pytest.raises(NotImplementedError, match=message):
        memjax.run(Bare(8, 6), **given(implementation=("pallas", "chunked")))
    with pytest.warns(UserWarning, match=f"^'scan' runs instead of {message[1:]}"):
        y, _ = memjax.run(Bare(8, 6), **given(implementation=("pallas", "chunked", "scan")))
    assert y.shape == (2, 5, 3, 6)


def test_a_cell_must_define_itself():
    bare = memjax.MemoryCell()
    for method, arguments in ((bare.init_state, 1), (bare.write, 3), (bare.read, 3)):
        with pytest.raises(NotImplementedError, match="MemoryCell must define"):
            method(*[{}] * arguments)
    with pytest.raises(NotImplementedError, match="MemoryCell has no chunked form; use 'scan'"):
        bare.chunked({}, None, inputs(), None, None)


@pytest.mark.parametrize("name", memjax.cells.names())
def test_impossible_sizes_are_refused(name):
    cell = memjax.cells.get(name).cell()
    for field in {field.name for field in dataclasses.fields(cell)} & {
        "key_dim", "value_dim", "chunk", "block", "window"
    }:  # fmt: skip
        with pytest.raises(ValueError, match=f"{type(cell).__name__}: .*{field}.* must be .*given"):
            dataclasses.replace(cell, **{field: 0})


def test_unknown_feature_map_is_refused():
    with pytest.raises(ValueError, match="feature_map 'relu': allowed are identity, elu_plus_one"):
        linear_attention.LinearAttention(8, 6, feature_map="relu")


@pytest.mark.parametrize("form", ["scan", "chunked"])
def test_attention_says_when_tokens_do_not_fit(form):
    cell, rng = Attention(8, 6, window=4), np.random.default_rng(0)
    xs = AttentionInputs(
        *(rng.normal(size=(1, 7, 1, *tail)).astype(np.float32) for tail in ((1, 8), (8,), (6,)))
    )
    with pytest.raises(ValueError, match="7 tokens do not fit its capacity of 4; raise"):
        memjax.run(cell, {}, xs, implementation=form)
    run = jax.jit(partial(memjax.run, cell, {}, implementation=form))
    _, state = run(contract.tokens(xs, slice(0, 3)))
    y, _ = run(contract.tokens(xs, slice(3, 7)), state=state)
    empty = np.isnan(np.asarray(y)).all(axis=(0, 2, 3, 4))
    assert empty.tolist() == [False, True, True, True]
