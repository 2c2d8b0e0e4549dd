"""Memory Caching and Mixture of Memories: the papers' identities, and loops in float64."""

import dataclasses
import functools

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import distance

from memjax import cells, cost, train_step
from memjax.cells.atlas import OmegaNet
from memjax.cells.attention import Attention
from memjax.cells.delta_net import DeltaNet
from memjax.cells.gated_delta_net import GatedDeltaNet
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.titans import Titans
from memjax.nn.layers import Context
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.nn.stack import make_mixer
from memjax.wrappers.memory_caching import MemoryCaching
from memjax.wrappers.mixture_of_memories import MixtureOfMemories, merge

T, B, D = 22, 2, 16
FORMS = ("scan", "chunked")
LINEAR = LinearAttention(4, 3, scale=1.0, chunk=4)
DELTA = GatedDeltaNet(4, 3, chunk=4)
DEEP = Titans(4, 4, depth=2, expansion=2, frozen_chunk=4, std=0.5)
jit = functools.partial(jax.jit, compiler_options=contract.PLAIN)
either = pytest.mark.parametrize("form", FORMS)


def given_for(cell, seed=0, length=T, **changes):
    """What `run` is given for any cell, from its start."""
    spec = dataclasses.replace(cells.get("memory_caching"), cell=lambda: cell)
    case = contract.Case("a wrapper", spec, cell)
    plain = {"state": False, "masks": False, "heads": 1, **changes}
    return contract.problem(case, seed, length, **plain)


def bare(given):
    """The inner cell's part of a wrapper's inputs."""
    return given._replace(xs=given.xs[:-1])


def answers(cell, form, given):
    """y in float64's place: the forms of a cell in float32."""
    xs = cell.inputs(*given.xs)
    return contract.values(cell, form, given._replace(xs=xs))[0]


# ------------------------------------------------------------ Memory Caching


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
@pytest.mark.parametrize("start", ["checkpoint", "independent"])
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


# ------------------------------------------------------------ Mixture of Memories


@either
def test_one_memory_is_the_cell_itself(form):
    cell = MixtureOfMemories(DELTA, 1)
    given = given_for(cell)
    given = given._replace(xs=given.xs._replace(gates=np.ones_like(given.xs.gates)))
    alone = jax.tree.map(lambda a: a[:, :, :, 0], bare(given))
    assert distance(answers(cell, form, given), answers(DELTA, form, alone)) < 1e-6


def sparse(cell, seed=0, **changes):
    """Inputs of which each token goes to two memories of the cell."""
    given = given_for(cell, seed, **changes)
    order = np.random.default_rng(seed).random(given.xs.gates.shape).argsort(axis=-1)
    gates = np.where(order < 2, given.xs.gates, 0)
    return given._replace(xs=given.xs._replace(gates=gates))


@either
@pytest.mark.parametrize("inner", [DELTA, DEEP])
def test_each_memory_sees_its_tokens_packed(inner, form):
    """The paper's form: the tokens of each memory alone, one after another."""
    cell = MixtureOfMemories(inner, 4)
    given = sparse(cell)
    expected = np.zeros((T, inner.value_dim))
    for m in range(4):
        gates = np.float64(given.xs.gates[0, :, 0, m])
        mine = np.flatnonzero(gates)
        leaves = [leaf[:1, mine][:, :, :, m] for leaf in given.xs[:-1]]
        params = jax.tree.map(lambda a, m=m: a[:, m], given.params)
        packed = contract.Given(params, leaves)
        expected[mine] += gates[mine, None] * answers(inner, "scan", packed)[0, :, 0]
    assert distance(answers(cell, form, given)[0, :, 0], expected) < 1e-6


@either
def test_memories_without_a_token_stay_as_they_are(form):
    cell = MixtureOfMemories(DELTA, 4)
    given = sparse(cell, state=True)
    gates = given.xs.gates.copy()
    gates[..., 2] = 0
    given = given._replace(xs=given.xs._replace(gates=gates))
    _, state = contract.values(cell, form, given)
    assert np.array_equal(state[:, :, 2], given.state[:, :, 2])
    assert not np.array_equal(state[:, :, 1], given.state[:, :, 1])


@either
def test_the_order_of_memories_does_not_matter(form):
    cell = MixtureOfMemories(DELTA, 4)
    given, order = sparse(cell), [2, 0, 3, 1]
    other = given._replace(xs=jax.tree.map(lambda a: a[:, :, :, order], given.xs))
    assert distance(answers(cell, form, other), answers(cell, form, given)) < 1e-6


@either
def test_equal_memories_with_gates_of_sum_one_are_one(form):
    cell = MixtureOfMemories(DELTA, 4)
    given = given_for(cell)
    same = jax.tree.map(lambda a: np.repeat(a[:, :, :, :1], 4, axis=3), given.xs)
    given = given._replace(xs=same._replace(gates=np.full_like(same.gates, 0.25)))
    alone = jax.tree.map(lambda a: a[:, :, :, 0], bare(given))
    assert distance(answers(cell, form, given), answers(DELTA, form, alone)) < 1e-6


def test_memories_that_overflow_reach_no_earlier_token():
    """Attention answers NaN past its capacity; tokens in front of that stay finite."""
    cell = MemoryCaching(Attention(4, 3, window=8), segment=4)
    given = given_for(cell)
    for form in FORMS:
        finite = np.isfinite(answers(cell, form, given)).all(axis=(0, 2, 3, 4))
        assert finite.tolist() == [t < 8 for t in range(T)], form


@pytest.mark.parametrize(
    "cell",
    [
        MemoryCaching(LINEAR, segment=4, start="independent"),
        MemoryCaching(LINEAR, segment=4),
        MixtureOfMemories(LINEAR, 2),
    ],
)
def test_heads_may_be_counted_by_the_wrappers_own_leaf(cell):
    """Keys and values of one head, gates of two; and a write mask of two heads of four."""
    for heads, masked in ((2, False), (4, True)):
        given = given_for(cell, heads=heads)
        few = [a[:, :, :1] for a in given.xs[:-1]]
        write = np.random.default_rng(0).random((contract.BATCH, T, 2)) < 0.7 if masked else None
        given = given._replace(xs=[*few, given.xs[-1]], write=write)
        expected = answers(cell, "scan", given)
        assert expected.shape[2] == heads
        assert distance(answers(cell, "chunked", given), expected) < 1e-6


NAMES = [
    n if n in ("rwkv4", "mamba2", "titans") else pytest.param(n, marks=pytest.mark.slow)
    for n in cells.names()
]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_can_be_wrapped(name):
    """Shapes alone: parameters, and a token after others."""
    wrappers = ("memory_caching", "mixture_of_memories")
    texts = [f"{wrapper}({name})" for wrapper in wrappers if wrapper not in name]
    if name not in wrappers:
        texts += [f"memory_caching({texts[1]})", f"mixture_of_memories({texts[0]})"]
    for text in texts:
        model = LanguageModel(ModelConfig(11, D, (((text,), 1),), mlp=0.0))
        params = train_step.abstract_params(model)

        def run(params, tokens, model=model):
            _, state = model.apply({"params": params}, tokens)
            return model.apply({"params": params}, tokens[:, :1], state)

        logits, _ = jax.eval_shape(run, params, jax.ShapeDtypeStruct((B, 5), jnp.int32))
        assert logits.shape == (B, 1, 11)


def test_wrappers_wrap_each_other():
    cell = MemoryCaching(MixtureOfMemories(DELTA, 3), segment=4)
    given = given_for(cell, state=True, masks=True, heads=2)
    scan, chunked = (contract.values(cell, form, given) for form in FORMS)
    for name, leaf in contract.named(scan).items():
        assert distance(contract.named(chunked)[name], leaf) < 1e-5, name


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="number must be at least 1"):
        MixtureOfMemories(DELTA, 0)
    with pytest.raises(ValueError, match="cannot wrap itself"):
        MixtureOfMemories(MemoryCaching(MixtureOfMemories(DELTA)))
    with pytest.raises(ValueError, match="Mamba2Mixer puts gate, D beside its memory's answers"):
        options = {"mixture_of_memories": {"shared": False}}
        make_mixer("mixture_of_memories(mamba2)", options, dim=16)().make_cell()
    with pytest.raises(ValueError, match="memory_caching wraps a memory cell; given hybrid"):
        make_mixer("memory_caching(hybrid)", {})


# ------------------------------------------------------------ in a model


@functools.cache
def mixture(**options):
    """(module, parameters, x, context) around Gated DeltaNet with its short convolution."""
    found = {"mixture_of_memories": options, "gated_delta_net": {"heads": 2}}
    module = make_mixer("mixture_of_memories", found, dim=D, std=0.3)()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    ctx = Context(None, None, jnp.broadcast_to(jnp.arange(T), (B, T)), losses=jnp.zeros(()))
    variables = jit(lambda: nn.unbox(module.init(jax.random.key(0), x, None, ctx)))()
    return module, variables, x, ctx


def test_a_routed_convolution_leaks_neither_the_future_nor_other_sequences():
    module, variables, x, ctx = mixture()
    run = jit(lambda x: module.apply(variables, x, None, ctx)[0])
    y, t = np.asarray(run(x)), T // 2
    moved = np.asarray(run(x.at[0, t].add(1.0)))
    assert np.array_equal(moved[1], y[1])
    assert np.array_equal(moved[0, :t], y[0, :t])
    assert not np.array_equal(moved[0, t], y[0, t])


def test_a_memory_convolves_the_tokens_that_are_routed_to_it():
    """One memory of the mixer alone, on the tokens of its own, has the same inputs."""
    module, variables, x, ctx = mixture()
    xs = jit(lambda x: module.apply(variables, x, {}, ctx, method="inputs")[0])(x)
    params, inner = variables["params"], module.template
    for m in range(4):
        mine = np.flatnonzero(np.asarray(xs.gates[0, :, 0, m]))
        own = jax.tree.map(lambda a, m=m: a[m], params["memories"])
        few = Context(None, None, jnp.arange(len(mine))[None])
        alone, _, _ = inner.apply(
            {"params": merge(params["shared"], own)}, x[:1, mine], {}, few, method="inputs"
        )
        for leaf, one in zip(xs[:-1], alone, strict=True):
            assert distance(np.asarray(leaf[:1, mine][:, :, :, m]), np.asarray(one)) < 1e-6


def test_one_routed_memory_is_the_inner_mixer():
    module, variables, x, ctx = mixture(routed=1, top=1, shared=False)
    params = variables["params"]
    own = jax.tree.map(lambda a: a[0], params["memories"])
    inner = {"params": merge(params["shared"], own)}
    expected = jit(lambda x: module.template.apply(inner, x, None, ctx)[0])(x)
    y = jit(lambda x: module.apply(variables, x, None, ctx)[0])(x)
    assert distance(np.asarray(y), np.asarray(expected)) < 1e-6


def test_an_even_load_costs_the_number_of_choices():
    """Equal probabilities choose the same memories for all; the loss is k for any mean choice."""
    module, variables, x, ctx = mixture()
    even = jax.tree.map(jnp.zeros_like, variables["params"]["router"])
    variables = {"params": {**variables["params"], "router": even}}
    new = jit(lambda x: module.apply(variables, x, None, ctx)[2])(x)
    assert abs(float(new.losses) - 0.01 * 2) < 1e-6
    ctx = ctx.replace(write=jnp.arange(T)[None, :] < jnp.array([[5], [9]]))
    _, loss = module.apply(variables, x, ctx, method="route")
    assert abs(float(loss) - 2) < 1e-6
    rows = np.concatenate([x[0, :5], x[1, :9]])[None]
    trained = mixture()[1]
    _, loss = module.apply(trained, x, ctx, method="route")
    short = Context(None, None, jnp.zeros((1, 14), jnp.int32))
    _, expected = module.apply(trained, jnp.asarray(rows), short, method="route")
    assert abs(float(loss) - float(expected)) < 1e-6


def test_the_trainer_adds_the_load_balancing_loss():
    """The gradient of the router is that of both losses, and the metric names the second."""
    layers = ((("mixture_of_memories(linear_attention)",), 2),)
    options = {"mixture_of_memories": {"balance": 0.5}, "linear_attention": {"heads": 2}}
    tokens = np.random.default_rng(0).integers(0, 11, (4, 9))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((4, 8), bool)}

    def router(params):
        return params["stack"]["group_0"]["layer_0"]["mixer"]["router"]["kernel"]

    def step(options):
        config = ModelConfig(11, D, layers, mlp=0.0, mixers=options)
        model, descent = LanguageModel(config), optax.sgd(1.0)
        params = jax.jit(lambda key: nn.unbox(train_step.init_params(model, key)))(
            jax.random.key(0)
        )
        update = train_step.make_train_step(model, descent, lambda _: 1.0)
        state = train_step.TrainState(jnp.zeros((), jnp.int32), params, descent.init(params))
        new, metrics = jax.jit(update)(state, batch)
        return model, params, metrics, np.asarray(router(params) - router(new.params))

    model, params, metrics, change = step(options)
    off = {**options, "mixture_of_memories": {"balance": 0.0}}
    *_, plain, still = step(off)
    assert float(plain["auxiliary"]) == 0 and float(metrics["loss"]) == float(plain["loss"])
    assert 2 * 0.5 * 1.5 < float(metrics["auxiliary"]) < 2 * 0.5 * 4  # two layers, k = 2

    def balance(params):
        return train_step.score(model, params, batch, None).auxiliary

    slope = router(jax.jit(jax.grad(balance))(params))
    assert distance(change - still, np.asarray(slope)) < 1e-4
