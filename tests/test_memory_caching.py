"""Memory Caching: the paper's identities, and its equations as a loop in float64."""

import dataclasses
import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance
from wrapped import DEEP, DELTA, FORMS, LINEAR, T, answers, bare, either, given_for

from memjax import cells, cost
from memjax.cells.atlas import OmegaNet
from memjax.cells.attention import Attention
from memjax.cells.delta_net import DeltaNet
from memjax.cells.linear_attention import LinearAttention
from memjax.wrappers.memory_caching import MemoryCaching


@either
@pytest.mark.parametrize("inner", [DELTA, DEEP])
def test_one_segment_is_the_cell_itself(inner, form):
    for mode in ("residual", "grm", "soup", "ssc"):
        cell = MemoryCaching(inner, mode, segment=T)
        if mode == "soup" and form == "chunked" and not inner.linear:
            continue
        given = given_for(cell)
        assert distance(answers(cell, form, given), answers(inner, form, bare(given))) < 1e-6


@either
def test_residual_of_linear_attention_from_new_starts_is_linear_attention(form):
    cell = MemoryCaching(LINEAR, "residual", segment=4, slots=8)
    given = given_for(cell)
    assert cell.independent
    assert distance(answers(cell, form, given), answers(LINEAR, form, bare(given))) < 1e-6


@either
def test_residual_of_checkpoints_counts_every_memory_that_holds_a_token(form):
    cell = MemoryCaching(LINEAR, "residual", segment=4, slots=8, start="checkpoint")
    given = given_for(cell)
    q, k, v, _ = (np.float64(a[:, :, 0]) for a in given.xs)
    segment = np.arange(T) // 4
    weight = np.tril(segment[:, None] - segment + 1)
    expected = np.einsum("btk,bsk,ts,bsv->btv", q, k, weight, v)
    assert distance(answers(cell, form, given)[:, :, 0], expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("segmentation", "segment"), [("logarithmic", 2), ("constant", 5)])
def test_the_forms_agree_to_float64_and_free_slots_pass_on_what_they_hold(segmentation, segment):
    """Also the gradients of slots that hold no segment, which carry those of the learned start."""
    sizes = dict(segment=segment, slots=3, segmentation=segmentation)
    cell = MemoryCaching(LINEAR, "grm", start="independent", **sizes)
    for length in (1, 3):
        given = given_for(cell, length=length, state=True, masks=True)
        given = given._replace(xs=cell.inputs(*given.xs))
        scan, chunked = (contract.evaluate(cell, form, given, np.float64) for form in FORMS)
        for name, floor in contract.floors(scan).items():
            assert distance(chunked[name], scan[name], floor) < 1e-12, name


@either
def test_equal_gates_are_the_residual_mean(form):
    grm = MemoryCaching(DELTA, "grm", segment=4, slots=8)
    given = given_for(grm)
    given = given._replace(xs=given.xs._replace(ask=0 * given.xs.ask))
    residual = MemoryCaching(DELTA, "residual", segment=4, slots=8, start="checkpoint")
    count = 1 + np.arange(T) // 4
    expected = np.float64(answers(residual, form, given)) / count[:, None, None]
    assert distance(answers(grm, form, given), expected) < 1e-6


@either
def test_soup_is_grm_where_memories_are_linear_and_not_elsewhere(form):
    for inner in (DELTA, OmegaNet(4, 3, frozen_chunk=4)):
        grm, soup = (MemoryCaching(inner, mode, segment=4, slots=8) for mode in ("grm", "soup"))
        given = given_for(grm)
        assert distance(answers(soup, form, given), answers(grm, form, given)) < 1e-6
    grm, soup = (MemoryCaching(DEEP, mode, segment=4, slots=8) for mode in ("grm", "soup"))
    given = given_for(grm)
    if form == "scan":
        assert distance(answers(soup, form, given), answers(grm, form, given)) > 1e-3
    else:
        with pytest.raises(NotImplementedError, match="use 'scan', or grm"):
            answers(soup, form, given)


def test_soup_of_a_network_mixes_its_weights():
    cell = MemoryCaching(DEEP, "soup", segment=4, slots=8)
    given = given_for(cell)
    assert distance(answers(cell, "scan", given)[0, :, 0], loop(cell, given)) < 2e-6


def weighted(gates, *leaves):
    return sum(gate * leaf for gate, leaf in zip(gates, leaves, strict=True))


def loop(cell, given):
    """The paper's equations for the first sequence, in float64: [T, V]."""
    inner, mode = cell.inner, cell.mode
    with contract.x64(True):
        params = jax.tree.map(lambda a: jnp.float64(a[0]), given.params)
        xs = [jnp.float64(a[0, :, 0]) for a in given.xs]
        u, k = np.asarray(xs[-1]), np.asarray(xs[1])
        state, past, means, out = inner.init_state(params), [], [], []
        for t in range(u.shape[0]):
            begin = t - t % cell.segment
            if t and t == begin:
                past.append(state)
                means.append(k[t - cell.segment : t].mean(axis=0))
                if cell.independent:
                    state = inner.init_state(params)
            x = inner.inputs(*(a[t] for a in xs[:-1]))
            y, state = inner.step(params, state, x)
            logits = np.array([u[t] @ m for m in means]) / k.shape[1] ** 0.5
            chosen = list(range(len(past)))
            if mode == "ssc":
                chosen = sorted(chosen, key=lambda i: -logits[i])[: cell.top]
            own = u[t] @ k[begin : t + 1].mean(axis=0) / k.shape[1] ** 0.5
            gates = np.exp(np.array([own, *(logits[i] for i in chosen)]))
            gates = np.ones_like(gates) if mode == "residual" else gates / gates.sum()
            memories = [state, *(past[i] for i in chosen)]
            if mode == "soup":
                mixed = jax.tree.map(functools.partial(weighted, gates), *memories)
                out.append(inner.read(params, mixed, x))
            else:
                read = [y, *(inner.read(params, m, x) for m in memories[1:])]
                out.append(weighted(gates, *read))
        return np.asarray(jnp.stack(out))


@either
@pytest.mark.parametrize("mode", ["residual", "grm", "ssc"])
@pytest.mark.parametrize(
    "start", ["checkpoint", pytest.param("independent", marks=pytest.mark.slow)]
)
def test_answers_are_the_papers(mode, start, form):
    for inner in (DELTA, DEEP)[: 2 if mode == "grm" else 1]:
        cell = MemoryCaching(inner, mode, segment=4, slots=8, top=2, start=start)
        given = given_for(cell)
        assert distance(answers(cell, form, given)[0, :, 0], loop(cell, given)) < 2e-6


@either
def test_enough_selected_memories_are_all(form):
    grm = MemoryCaching(DELTA, "grm", segment=4, slots=8)
    given = given_for(grm)
    for top in (5, 8, 11):
        ssc = dataclasses.replace(grm, mode="ssc", top=top)
        assert distance(answers(ssc, form, given), answers(grm, form, given)) < 1e-6


@either
def test_segments_of_one_token_are_gated_softmax_attention(form):
    cell = MemoryCaching(LINEAR, "grm", segment=1, slots=T, start="independent")
    given = given_for(cell)
    q, k, v, u = (np.float64(a[:, :, 0]) for a in given.xs)
    gates = np.exp(np.einsum("btk,bsk->bts", u, k) / 2) * np.tri(T)
    gates = gates / gates.sum(axis=-1, keepdims=True)
    expected = np.einsum("bts,btk,bsk,bsv->btv", gates, q, k, v)
    assert distance(answers(cell, form, given)[:, :, 0], expected) < 1e-6


def test_logarithmic_segments_are_the_binary_number():
    cell = MemoryCaching(LINEAR, slots=10, start="independent", segmentation="logarithmic")
    for number, blocks in ((37, [1, 4, 32]), (0, []), (7, [1, 2, 4]), (8, [8])):
        sizes = np.asarray(cell.sizes(jnp.int32(number)))
        assert sizes[sizes > 0].tolist() == blocks
        ends = np.asarray(cell.firsts(jnp.int32(number)))[sizes > 0]
        assert (
            sorted(ends.tolist())
            == [number - sum(blocks[: i + 1]) for i in range(len(blocks))][::-1]
        )
    few = dataclasses.replace(cell, slots=2)
    assert np.asarray(few.sizes(jnp.int32(37))).tolist() == [1, 36]


@either
@pytest.mark.parametrize("slots", [2, 6])
def test_log_linear_attention(form, slots):
    """Blocks of 1, 2, 4, .. tokens in front of each, a gate for each block."""
    cell = MemoryCaching(
        LINEAR, "grm", segment=1, slots=slots, start="independent", segmentation="logarithmic"
    )
    given = given_for(cell)
    q, k, v, u = (np.float64(a[:, :, 0]) for a in given.xs)
    expected = np.zeros_like(v)
    for t in range(T):
        blocks, end = [[t]], t
        for level in range(slots - 1):
            if t >> level & 1:
                blocks.append(list(range(end - (1 << level), end)))
                end -= 1 << level
        blocks += [list(range(end))] if end else []
        means = np.stack([k[:, b].mean(axis=1) for b in blocks], axis=1)
        gates = np.exp(np.einsum("bk,bnk->bn", u[:, t], means) / 2)
        gates = gates / gates.sum(axis=1, keepdims=True)
        for n, block in enumerate(blocks):
            weight = np.einsum("bk,bsk->bs", q[:, t], k[:, block])
            expected[:, t] += gates[:, n, None] * np.einsum("bs,bsv->bv", weight, v[:, block])
    assert distance(answers(cell, form, given)[:, :, 0], expected) < 1e-6


@either
def test_equal_memories_answer_as_one(form):
    """Nothing is learnt: all that is kept is the state that was carried in."""
    cell = MemoryCaching(DeltaNet(4, 3, chunk=4), "grm", segment=4, slots=3)
    given = given_for(cell, state=True)
    xs = given.xs._replace(beta=0 * given.xs.beta)
    begun = given.state._replace(number=0 * given.state.number)
    given = given._replace(xs=xs, state=begun)
    expected = np.einsum("btk,bkv->btv", np.float64(xs.q[:, :, 0]), begun.running[:, 0]) / 2
    assert distance(answers(cell, form, given)[:, :, 0], expected) < 1e-6


def test_the_newest_of_equal_memories_is_chosen():
    cell = MemoryCaching(LINEAR, "ssc", segment=4, slots=8, top=1, start="independent")
    given = given_for(cell, scenario="equal")
    same = given._replace(xs=given.xs._replace(k=np.repeat(given.xs.k[:, :1], T, axis=1)))
    q, k, v, _ = (np.float64(a[:, :, 0]) for a in same.xs)
    segment = np.arange(T) // 4
    seen = np.tril((segment[:, None] - segment <= 1).astype(float))
    gates = np.where(segment == 0, 1.0, 0.5)[None, :, None]
    expected = gates * np.einsum("btk,bsk,ts,bsv->btv", q, k, seen, v)
    for form in FORMS:
        assert distance(answers(cell, form, same)[:, :, 0], expected) < 1e-6


def test_a_token_reads_its_selected_memories_only():
    """Floating-point operations of the whole form, with 4 and with 64 memories behind."""

    def flops(mode, length):
        inner = LinearAttention(64, 64)
        cell = MemoryCaching(inner, mode, segment=64, slots=64, top=1)
        given = contract.to_numpy(given_for(cell, length=length))
        form = functools.partial(contract.apply, cell, "chunked")
        return cost.flops(form, given) / length

    grm, ssc = ([flops(mode, 64 * n) for n in (4, 32)] for mode in ("grm", "ssc"))
    assert grm[1] > 3 * grm[0]
    assert ssc[1] < 1.5 * ssc[0]


def test_dropped_memories_cost_nothing():
    """The same with room for four of them, and twice the tokens."""

    def flops(length):
        cell = MemoryCaching(LinearAttention(64, 64), segment=64, slots=4)
        given = contract.to_numpy(given_for(cell, length=length))
        return cost.flops(functools.partial(contract.apply, cell, "chunked"), given) / length

    assert flops(64 * 32) < 1.05 * flops(64 * 16)


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "mode 'mean': allowed are residual, grm": dict(mode="mean"),
        "start 'zero': allowed are checkpoint, independent, None": dict(start="zero"),
        "segment, slots and top must be >= 1": dict(slots=0),
        "soup mixes weights, and RWKV4": dict(inner=cells.get("rwkv4").cell(), mode="soup"),
        "soup mixes weights, and SlidingWindow": dict(
            inner=cells.get("sliding_window").cell(), mode="soup"
        ),
        "logarithmic segments are for": dict(mode="ssc", segmentation="logarithmic"),
        "cannot wrap itself": dict(inner=MemoryCaching(LINEAR)),
    }.items(),
)
def test_bad_caches_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        MemoryCaching(**{"inner": LINEAR, **options})


def test_memories_that_overflow_reach_no_earlier_token():
    """Attention answers NaN past its capacity; tokens in front of that stay finite."""
    cell = MemoryCaching(Attention(4, 3, window=8), segment=4)
    given = given_for(cell)
    for form in FORMS:
        finite = np.isfinite(answers(cell, form, given)).all(axis=(0, 2, 3, 4))
        assert finite.tolist() == [t < 8 for t in range(T)], form
